"""Everything on a GPU: its tests, then its figures, written to docs/results/gpu-<chip>.json: ``make gpu-check``.

    python tests/benchmarks/gpu.py --skip-tests

Where torch finds no GPU it says so in one line, writes nothing and ends with exit code 0: nothing was checked.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import openmm
import torch
from speed.clock import conditions, race
from speed.energies import frames
from speed.likelihoods import features

from openmm_regflow import Flow, FlowProposal, TorchPotential, flows, load_system
from openmm_regflow.device import choose_way, openmm_properties, read_positions, why_no_gpu, write_positions
from openmm_regflow.doctor import transfer_rows
from openmm_regflow.objectives import LikelihoodLoss, RegFlowLoss

ROOT = Path(__file__).parents[2]
DEVICE = "cuda"
N_LIKELIHOODS, N_ENERGIES, BATCH, POOL = 200_000, 100_000, 8192, 10_000


def measure() -> dict[str, Any]:
    """All figures of the GPU that torch has chosen."""
    parts = (likelihoods, architectures, energies, pool, context)
    found: dict[str, Any] = {"chip": torch.cuda.get_device_name(), "CUDA of torch": torch.version.cuda}
    for part in parts:
        print(part.__doc__.splitlines()[0], flush=True)
        found[part.__name__] = part()
        print(json.dumps(found[part.__name__], indent=1), flush=True)
    return found | {"conditions": conditions()}


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
    potential = TorchPotential(molecule.system, dtype=torch.float32, device=DEVICE)
    proposal = FlowProposal(flow, potential, molecule.temperature, chunk_size=POOL)
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    best = race({"": lambda: proposal.sample(POOL, generator).log_weights}, 1.0, device=DEVICE)[""]
    batch = proposal.sample(POOL, generator)
    return {
        "seconds": best,
        "samples per second": POOL / best,
        "on the device": all(t.device.type == DEVICE for t in batch),
        "peak memory since the start [MB]": torch.cuda.max_memory_allocated() / 1e6,
    }


def context() -> dict[str, Any]:
    """Positions between an OpenMM Context on CUDA and torch: the way, its latency and bandwidth."""
    rows, fine = transfer_rows()
    found: dict[str, Any] = {"table": rows, "agrees": fine}
    molecule = load_system("alanine-dipeptide")
    try:
        platform = openmm.Platform.getPlatformByName("CUDA")
    except openmm.OpenMMException as error:
        return found | {"OpenMM": f"has no CUDA platform here: {error}"}
    made = openmm.Context(molecule.system, openmm.VerletIntegrator(0.001), platform, openmm_properties("CUDA"))
    made.setPositions(molecule.positions)
    transfer = choose_way(made, DEVICE)
    x = read_positions(made, DEVICE)
    calls = {"read": lambda: read_positions(made, DEVICE), "write": lambda: write_positions(made, x)}
    times = {name: 1e6 * best for name, best in race(calls, 0.3, device=DEVICE).items()}
    return found | {"way": transfer.way, "reason": transfer.reason, "readings [µs]": transfer.microseconds, "µs": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-tests", action="store_true", help="figures alone")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"NOT RUN: there is no GPU here ({why_no_gpu()}). Neither the GPU tests nor the GPU benchmarks were run.")
        return
    tests = 0
    if not options.skip_tests:
        tests = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-o", "addopts="], cwd=ROOT).returncode
    found = measure()
    chip = re.sub(r"[^a-z0-9]+", "-", found["chip"].lower()).strip("-")
    target = ROOT / "docs" / "results" / f"gpu-{chip}.json"
    target.write_text(json.dumps(found | {"tests passed": None if options.skip_tests else tests == 0}, indent=1) + "\n")
    print(f"wrote {target}")
    sys.exit(tests)


if __name__ == "__main__":
    main()
