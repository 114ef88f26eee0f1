"""Everything on a GPU: its tests, then its figures, written to docs/results/gpu-<chip>.json: ``make gpu-check``.

    python tests/benchmarks/gpu.py --parts training dynamics

The file is written after every part, so that one which fails or is stopped takes nothing along; parts that are not run
again stay, if they are of the same commit. Exit code 1 if one failed. Where torch finds no GPU it says so in one line,
writes nothing and ends with exit code 0: nothing was checked.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import openmm
import torch
from speed.clock import conditions, race
from speed.energies import frames
from speed.likelihoods import features

from openmm_regflow import Flow, FlowProposal, TorchPotential, flows, load_system
from openmm_regflow.device import choose_way, openmm_properties, read_positions, why_no_gpu, write_positions
from openmm_regflow.doctor import driver_version, platform_rows, plugin_failures, torch_rows, transfer_rows
from openmm_regflow.files import write_json
from openmm_regflow.graphs import Gradients
from openmm_regflow.objectives import LikelihoodLoss, RegFlowLoss
from openmm_regflow.potentials import platform_names
from openmm_regflow.simulate import BatchedSettings
from openmm_regflow.simulate.batched import _Ladder
from openmm_regflow.training import adamw

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
DEVICE = "cuda"
N_LIKELIHOODS, N_ENERGIES, BATCH, POOL = 200_000, 100_000, 8192, 10_000


class Record:
    """Figures of several parts in one JSON file, whole after every part.

    Args:
        path: of the file.
        header: what all parts have in common.

    Attributes:
        found: what the file holds.
        failed: names of the parts that failed.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.found, self.failed = path, dict(header), []
        before = json.loads(path.read_text()) if path.is_file() else {}
        if before.get("conditions", {}).get("commit") == header.get("conditions", {}).get("commit", ""):
            self.found = before | self.found
        self._write()

    def add(self, part: Callable[..., Any], *arguments: Any) -> None:
        """Run a part and write what it found, or how it failed, with its own peak of the GPU's memory."""
        print(part.__doc__.splitlines()[0], flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            figures = part(*arguments)
        except Exception as error:
            figures = {"FAILED": f"{type(error).__name__}: {' '.join(str(error).split())}"}
            self.failed.append(part.__name__)
        print(json.dumps(figures, indent=1), flush=True)
        self.found[part.__name__] = figures
        if torch.cuda.is_available():
            peaks = self.found.setdefault("peak memory [MB]", {})
            peaks[part.__name__] = torch.cuda.max_memory_allocated() / 1e6
        self._write()

    def _write(self) -> None:
        write_json(self.path, self.found)


def header() -> dict[str, Any]:
    """Chip, driver, versions and commit."""
    chip = torch.cuda.get_device_properties(torch.cuda.current_device())
    platforms = platform_names()
    return {
        "chip": chip.name,
        "memory [GB]": chip.total_memory / 1e9,
        "compute capability": f"{chip.major}.{chip.minor}",
        "driver": driver_version(),
        "CUDA of torch": torch.version.cuda,
        "OpenMM platforms": platforms,
        "OpenMM plugins that failed to load": plugin_failures(openmm.Platform.getPluginLoadFailures()),
        "conditions": conditions(),
    }


def tests(processes: int = 0) -> dict[str, Any]:
    """The tests with the marker gpu: how many passed, failed or were skipped, and why."""
    counts = outcomes(["-m", "gpu", "tests", *(["-n", str(processes)] if processes else [])], ROOT)
    if counts["failed"] or not counts["passed"]:
        raise RuntimeError(json.dumps(counts))
    return counts


def outcomes(arguments: list[str], folder: Path) -> dict[str, Any]:
    """Counts of a run of pytest in a process of its own: passed, failed (errors included), skipped, with reasons."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", f"--junitxml={report}", *arguments]
        done = subprocess.run(command, cwd=folder)
        if not report.is_file():
            raise RuntimeError(f"pytest ended with exit code {done.returncode} before its first test")
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case.find("skipped") for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": failed,
        "skipped": len(skipped),
        "reasons": sorted({str(case.get("message")) for case in skipped}),
    }


def shipped() -> tuple[Any, Flow]:
    """Alanine dipeptide and its flow, on the GPU."""
    molecule = load_system("alanine-dipeptide")
    return molecule, Flow.load(molecule.folder / "flow.safetensors", DEVICE)


def likelihoods() -> dict[str, float]:
    """Seconds for 200,000 samples with log-densities by the shipped spline (goal: 0.5)."""
    _, flow = shipped()
    found = {}
    for way in ("eager", "fused"):
        flow.fuse(way == "fused")
        found[way] = race({"": lambda: flow.sample(N_LIKELIHOODS)}, 1.0, device=DEVICE)[""]
    return found


def architectures() -> dict[str, dict[str, float]]:
    """Samples with log-density, densities and training steps of 8192 per second, each architecture."""
    molecule = load_system("alanine-dipeptide")
    coordinates = flows.coordinates_for(molecule.topology, torch.as_tensor(molecule.reference("train")[:BATCH]))
    y = features(molecule, coordinates, BATCH).to(DEVICE)
    coordinates = coordinates.to(DEVICE)
    found = {}
    for name in ("real_nvp", "res_nvp", "spline", "spline, fused", "jet"):
        factory = getattr(flows, name.split(",")[0])
        flow = factory(coordinates, n_layers=8, hidden=64 if name == "jet" else 128).to(DEVICE).fuse("fused" in name)
        x = flow.sample(BATCH)[0]
        z = flow.prior.sample(len(y))
        generator = torch.Generator().manual_seed(0)
        regflow = RegFlowLoss(flow.prior.circular, log_det=1e-3, forward_backward=1e-6)
        likelihood = LikelihoodLoss(flow.prior)

        def step(loss: Any, *batch: torch.Tensor, flow: Flow = flow, generator: torch.Generator = generator) -> None:
            flow.zero_grad(set_to_none=True)
            loss(flow.bijection, batch, generator)[0].backward()

        calls = {
            "samples": lambda flow=flow: flow.sample(BATCH),
            "densities": lambda flow=flow, x=x: flow.log_prob(x),
            "RegFlow": lambda step=step, regflow=regflow, z=z: step(regflow, z, y),
            "likelihood": lambda step=step, likelihood=likelihood: step(likelihood, y),
        }
        found[name] = {work: len(y) / best for work, best in race(calls, 0.5, device=DEVICE).items()}
    return found


def training() -> dict[str, dict[str, float]]:
    """Gradients and AdamW per second, tetrapeptide's spline (8 + 8 couplings of 128): kernel by kernel, or recorded.

    `train` adds the choice of a batch, two waits for figures and the average of the weights.
    """
    molecule = load_system("alanine-tetrapeptide")
    x = torch.as_tensor(molecule.reference("train"))
    coordinates = flows.coordinates_for(molecule.topology, x)
    y = coordinates.to_features(x.double())[0].float().to(DEVICE)
    flow = flows.spline(coordinates, n_layers=8, torsion_layers=8, hidden=128, line_bins=4).to(DEVICE)
    optimizer = adamw(flow.bijection, 1e-4, 0.0)
    found: dict[str, dict[str, float]] = {}
    for size in (1024, 4096):
        calls = {}
        for way in ("eager", "eager, recorded", "fused", "fused, recorded"):
            gradients = Gradients(LikelihoodLoss(flow.prior).of, flow.bijection, record=way.endswith("recorded"))

            def step(gradients: Gradients = gradients, way: str = way, batch: torch.Tensor = y[:size]) -> None:
                flow.fuse(way.startswith("fused"))
                gradients((batch,))
                torch.nn.utils.clip_grad_norm_(flow.bijection.parameters(), 1.0)
                optimizer.step()

            calls[way] = step
        found[f"batch {size}"] = {way: 1 / best for way, best in race(calls, 0.5, device=DEVICE).items()}
    return found


def dynamics() -> dict[str, float]:
    """Langevin steps of 4,096 alanine hexapeptides together, per second."""
    molecule = load_system("alanine-hexapeptide")
    settings = BatchedSettings.create(n_copies=1024, device=DEVICE)
    ladder = _Ladder(molecule, None, settings)
    x = torch.as_tensor(molecule.positions, dtype=torch.float32, device=DEVICE).repeat(4096, 1, 1)
    states = torch.arange(4, device=DEVICE).repeat(1024)
    found = {}
    for way in ("recorded", "kernel by kernel"):
        ladder._step.failed = way != "recorded"
        generator = torch.Generator(DEVICE).manual_seed(0)
        run = partial(ladder.dynamics, x, torch.zeros_like(x), states, 50, generator)
        found[way] = 50 / race({"": run}, 0.3, device=DEVICE)[""]
    return found


def energies() -> dict[str, float]:
    """Energies per second of alanine dipeptide and hexapeptide in batches of 100,000, by TorchPotential."""
    found = {}
    for name in ("alanine-dipeptide", "alanine-hexapeptide"):
        molecule = load_system(name)
        x = frames(molecule, N_ENERGIES).to(DEVICE)
        for dtype in (torch.float32, torch.float64):
            for compiled in (False, True):
                u = TorchPotential(molecule.system, dtype=dtype, device=DEVICE, compile=compiled)
                best = race({"": lambda u=u, x=x: u(x)}, 0.5, device=DEVICE)[""]
                way = "compiled" if compiled else "eager"
                found[f"{name}, {str(dtype).removeprefix('torch.')}, {way}"] = len(x) / best
    return found


def pool() -> dict[str, Any]:
    """A pool of 10,000 proposals with densities, energies and weights; none of it leaves the device."""
    molecule, flow = shipped()
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    found: dict[str, Any] = {}
    for way in ("eager", "eager, recorded", "fused and compiled", "fused and compiled, recorded"):
        compiled = way.startswith("fused")
        flow.fuse(compiled)
        flow._drawn.failed = not way.endswith("recorded")
        potential = TorchPotential(molecule.system, dtype=torch.float32, device=DEVICE, compile=compiled)
        proposal = FlowProposal(flow, potential, molecule.temperature, chunk_size=POOL)
        for _ in range(3):
            batch = proposal.sample(POOL, generator)
        best = race({"": lambda p=proposal: p.sample(POOL, generator).log_weights}, 0.5, device=DEVICE)[""]
        found[way] = {"seconds": best, "samples per second": POOL / best}
        found["on the device"] = all(t.device.type == DEVICE for t in batch)
    return found


def agreement() -> dict[str, Any]:
    """Energies by every OpenMM platform and by torch on every device against each other."""
    (platforms, agree), (devices, same) = platform_rows(), torch_rows()
    if not (agree and same):
        raise RuntimeError(json.dumps([platforms, devices]))
    return {"platforms": platforms, "torch": devices}


def context() -> dict[str, Any]:
    """Positions between an OpenMM Context on CUDA and torch: the way, its latency and bandwidth."""
    rows, fine = transfer_rows()
    found: dict[str, Any] = {"table": rows, "agrees": fine}
    molecule = load_system("alanine-dipeptide")
    platform = openmm.Platform.getPlatformByName("CUDA")
    made = openmm.Context(molecule.system, openmm.VerletIntegrator(0.001), platform, openmm_properties("CUDA"))
    made.setPositions(molecule.positions)
    transfer = choose_way(made, DEVICE)
    x = read_positions(made, DEVICE)
    calls = {"read": lambda: read_positions(made, DEVICE), "write": lambda: write_positions(made, x)}
    times = {name: 1e6 * best for name, best in race(calls, 0.3, device=DEVICE).items()}
    return found | {"way": transfer.way, "reason": transfer.reason, "readings [µs]": transfer.microseconds, "µs": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.__name__ for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--processes", type=int, default=0, help="for the tests; needs pytest-xdist")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        if driver := driver_version():
            sys.exit(f"NOT RUN: torch cannot use the GPU of driver {driver}: {why_no_gpu()}")
        print(f"NOT RUN: there is no GPU here ({why_no_gpu()}). Neither the GPU tests nor the GPU benchmarks were run.")
        return
    chip = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    record = Record(RESULTS / f"gpu-{chip}.json", header())
    for part in PARTS:
        if part.__name__ in options.parts:
            record.add(part, *([options.processes] if part is tests else []))
    print(f"wrote {record.path}")
    if record.failed:
        sys.exit(f"failed: {', '.join(record.failed)}")


#: In this order; the tests first.
PARTS = (tests, agreement, likelihoods, training, pool, context, dynamics, architectures, energies)

if __name__ == "__main__":
    main()
