"""Start-up: seconds until ``import openmm_regflow``, ``openmm-regflow --help`` and a script's first line are done."""

import resource
import subprocess
import sys
import time
from typing import Any

COMMANDS = {
    "import openmm_regflow": ["-c", "import openmm_regflow"],
    "openmm-regflow --help": ["-m", "openmm_regflow", "--help"],
    "from openmm_regflow import Flow": ["-c", "from openmm_regflow import Flow"],
    "everything that FlowMove needs": ["-c", "from openmm_regflow import FlowMove, FlowProposal, OpenMMPotential"],
    "import torch, for comparison": ["-c", "import torch"],
}


def measure(repeats: int = 3) -> dict[str, Any]:
    """Shortest wall-clock and CPU time of each [s], and whether anything but help was printed."""
    found = {}
    for name, arguments in COMMANDS.items():
        times, used, quiet = [], [], True
        for _ in range(repeats):
            began, before = time.perf_counter(), cpu_of_children()
            done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
            times.append(time.perf_counter() - began)
            used.append(cpu_of_children() - before)
            quiet &= not done.stderr and (not done.stdout or "--help" in name)
        found[name] = {"seconds": min(times), "CPU seconds": min(used), "silent": quiet}
    return found


def cpu_of_children() -> float:
    """CPU time of all processes that this one started and that have ended [s]; other work does not enter it."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime
