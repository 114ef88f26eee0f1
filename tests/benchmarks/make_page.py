"""docs/speed.md from measurements on this machine: ``make benchmark``.

    python tests/benchmarks/make_page.py                      # every part, 15 minutes on two idle cores
    python tests/benchmarks/make_page.py --parts energies     # one part; the others stay as they were
    python tests/benchmarks/make_page.py --parts              # the page again, from docs/results/speed-cpu.json

Every part runs in a process of its own. One that fails says so, keeps its last figures, and the command ends with
exit code 1. Peers that are not installed are left out (``pip install -e '.[peers]'``).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

from openmm_regflow.allocation import keep_freed_memory
from openmm_regflow.files import write_json

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS, PAGE = ROOT / "docs" / "results" / "speed-cpu.json", ROOT / "docs" / "speed.md"
CHART = ROOT / "docs" / "images" / "pipeline.png"
#: Part -> (cores it may use, module, arguments of its `measure`). One core where CPU time is measured: jax then has one
#: thread, too.
PARTS = {
    "startup": (2, "startup", {}),
    "architectures": (1, "architectures", {}),
    "two threads": (2, "architectures", {"threads": 2, "architectures": ["spline"], "work": ["sample"]}),
    "likelihoods": (2, "likelihoods", {}),
    "training": (1, "training", {}),
    "energies": (1, "energies", {}),
    "pipeline": (1, "pipeline", {}),
    "growth": (1, "growth", {}),
    "allocation": (1, "allocation", {}),
    "processes": (2, "processes", {}),
    "limits": (1, "limits", {}),
}


def run_part(name: str) -> None:
    """In the child: measure and print one line of JSON."""
    cores, module, arguments = PARTS[name]
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, allowed[:cores])  # before torch and jax look
    keep_freed_memory()  # as in the package's own commands; for all contestants alike
    print(json.dumps(import_module(f"speed.{module}").measure(**arguments)))


def child(name: str) -> dict | None:
    """Run a part in a process of its own; None if it failed."""
    began = time.monotonic()
    print(f"{name} ...", flush=True)
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, __file__, "--child", name]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    took = time.monotonic() - began
    if done.returncode:
        print(f"{name} FAILED after {took:.0f} s:\n{done.stderr[-3000:]}", flush=True)
        return None
    print(f"{name}: {took:.0f} s", flush=True)
    return json.loads(done.stdout.splitlines()[-1]) | {"wall seconds of this part": round(took)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_part(options.child)
        return
    sys.path.insert(0, str(HERE))
    from speed import page
    from speed.clock import conditions

    found = json.loads(options.results.read_text()) if options.results.is_file() else {}
    failed = []
    for name in options.parts:
        where = conditions()
        result = child(name)
        if result is None:
            failed.append(name)
            continue
        found[name] = result | {"conditions": where}
        options.results.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.results, found)
    page.write(found, PAGE, CHART)
    print(f"wrote {PAGE.relative_to(ROOT)} and {options.results}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
