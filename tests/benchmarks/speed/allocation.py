"""Part 8: density of given data with freed memory given back to the kernel, as glibc does it, and kept.

Each way has a process of its own: the setting cannot be undone.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BATCHES = (512, 1024, 2048, 4096, 8192)
ARCHITECTURES = ("real_nvp", "res_nvp", "spline")
WAYS = ("given back", "kept")


def measure(seconds: float = 0.4) -> dict[str, Any]:
    """Microseconds of CPU time per sample by architecture, way and size of the batch; the sizes take turns."""
    here = str(Path(__file__).parents[1])
    program = f"import sys; sys.path.insert(0, {here!r}); import speed.allocation as a; a.child({seconds}, sys.argv[1])"
    found: dict[str, Any] = {"microseconds": {}}
    for way in WAYS:
        done = subprocess.run([sys.executable, "-c", program, way], capture_output=True, text=True, check=True)
        found["microseconds"][way] = json.loads(done.stdout)
    return found


def child(seconds: float, way: str) -> None:
    """One way: print its figures as JSON."""
    import torch

    from openmm_regflow.allocation import keep_freed_memory
    from speed.clock import race
    from speed.peers import DIM, ours

    if way == "kept":
        keep_freed_memory()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    found = {}
    for architecture in ARCHITECTURES:
        _, _, density = ours(architecture)
        data = {n: torch.randn(n, DIM) for n in BATCHES}
        times = race({str(n): lambda y=y, density=density: density(y) for n, y in data.items()}, seconds)
        found[architecture] = {n: 1e6 * took / int(n) for n, took in times.items()}
    print(json.dumps(found))
