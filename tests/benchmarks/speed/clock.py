"""How everything is timed: contestants in turn, the best of several repetitions, peak memory, the machine's name."""

import ctypes
import gc
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]
ROOT = Path(__file__).parents[3]
PACKAGES = (
    "openmm", "OpenMM-CUDA-12", "OpenMM-CUDA-13", "openmmtools", "numpy", "zuko", "nflows", "normflows", "flowjax",
    "jax", "bgflow",
)  # fmt: skip


def race(calls: Mapping[str, Call], seconds: float = 1.0, wall: bool = False, device: str = "cpu") -> dict[str, float]:
    """Shortest time of each call [s]; the contestants take turns, so that a busy machine disturbs them alike.

    Args:
        calls: what to time; each is called once before, to warm up.
        seconds: for each contestant; three repetitions at least.
        wall: wall-clock instead of the process's CPU time. CPU time does not count other processes, but adds up over
            threads: it suits one thread.
        device: "cuda" waits for the device after each call, and always takes wall-clock.
    """
    clock = time.perf_counter if wall or device != "cpu" else time.process_time
    best, spent, rounds = dict.fromkeys(calls, math.inf), dict.fromkeys(calls, 0.0), 0
    for call in calls.values():
        call()
    while waiting := [name for name in calls if spent[name] < seconds or rounds < 3]:
        for name in waiting:
            wait(device)
            began = clock()
            calls[name]()
            wait(device)
            took = clock() - began
            spent[name] += took
            best[name] = min(best[name], took)
        rounds += 1
    return best


def once(call: Call, wall: bool = False) -> float:
    """Time of a single call [s], not warmed up: for work that lasts seconds."""
    clock = time.perf_counter if wall else time.process_time
    began = clock()
    call()
    return clock() - began


def wait(device: str) -> None:
    """Let a GPU finish what it was given; nothing to do on a CPU."""
    if device != "cpu":
        torch.cuda.synchronize()


def peak_memory(call: Call) -> float:
    """Most memory that a call needed beyond what the process had before [bytes]; from the kernel's own book (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    call()
    return max(0.0, _status("VmHWM") - before)


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024.0 * float(line.split()[1])
    raise KeyError(key)


def exponent(sizes: Any, values: Any) -> float:
    """Slope of log(values) against log(sizes), by least squares."""
    x, y = (torch.as_tensor(list(v), dtype=torch.float64).log() for v in (sizes, values))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def conditions() -> dict[str, Any]:
    """Where and when: processor, cores, other work on the machine, versions, commit."""
    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "load average at the start": round(os.getloadavg()[0], 1),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "versions": versions,
    }


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checkout, or "unknown" outside of one."""
    done = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
