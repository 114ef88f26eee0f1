"""Part 7: two processes against one, by wall-clock: energies on an executor, training and refinement by torchrun."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from openmm_regflow import OpenMMPotential, load_system
from speed.energies import frames

JOB = Path(__file__).parents[1] / "ranks_job.py"


def measure(n: int = 1500, steps: int = 15, rounds: int = 2) -> dict[str, Any]:
    """Energies of the hexapeptide, training steps and rounds of refinement per second, with one and two processes."""
    jobs = {workers: job(workers, steps) for workers in (1, 2)}
    found = {"energies": executors(n, rounds)}
    found |= {name: {workers: rates[name] for workers, rates in jobs.items()} for name in jobs[1]}
    ratios = {name: rates[2] / rates[1] for name, rates in found.items()}
    named = {name: {str(k): v for k, v in rates.items()} for name, rates in found.items()}
    return {"per second": named, "ratio": ratios, "load average": round(os.getloadavg()[0], 1)}


def executors(n: int, rounds: int) -> dict[int, float]:
    """Energies per second of `OpenMMPotential(executor=workers)`; workers are started and warm."""
    molecule = load_system("alanine-hexapeptide")
    x = frames(molecule, n).double().numpy()
    with (
        OpenMMPotential(molecule.system, "Reference", 1) as one,
        OpenMMPotential(molecule.system, "Reference", 2) as two,
    ):
        both, best = {1: one, 2: two}, {1: 0.0, 2: 0.0}
        for potential in both.values():
            potential(x[:64])
        for _ in range(rounds):
            for workers, potential in both.items():
                began = time.perf_counter()
                potential(x)
                best[workers] = max(best[workers], n / (time.perf_counter() - began))
    return best


def job(workers: int, steps: int) -> dict[str, float]:
    """RegFlow steps and rounds of refinement per second of a torchrun job; batches of 1024 and pools shared by all."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    done = subprocess.run(
        [*command, JOB, str(steps)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the job of {workers} failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
