"""Start-up: seconds until ``import openmm_regflow``, ``openmm-regflow --help`` and a script's first line are done."""

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
    """Shortest wall-clock of each [s], and whether anything but help was printed."""
    found = {}
    for name, arguments in COMMANDS.items():
        times, quiet = [], True
        for _ in range(repeats):
            began = time.perf_counter()
            done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
            times.append(time.perf_counter() - began)
            quiet &= not done.stderr and (not done.stdout or "--help" in name)
        found[name] = {"seconds": min(times), "silent": quiet}
    return found
