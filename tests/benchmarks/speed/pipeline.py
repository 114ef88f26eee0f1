"""Part 5: effective samples per second of the shipped flows, and where the time goes."""

from typing import Any

import torch

from openmm_regflow import Flow, FlowProposal, OpenMMPotential, TorchPotential, load_system, reweighting
from speed.clock import race

SYSTEMS = ("alanine-dipeptide", "alanine-tripeptide", "alanine-tetrapeptide")
#: Configurations per call: one chunk of a proposal; of the slow energies a part is enough.
BATCH, N_WEIGHTS, FEW = 8192, 40_000, 512


def measure(seconds: float = 0.5) -> dict[str, Any]:
    """Microseconds of CPU time per sample by part, and effective samples per second, one thread."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"batch": BATCH, "samples for the ESS": N_WEIGHTS, "rows": []}
    for name in SYSTEMS:
        molecule = load_system(name)
        flow = Flow.load(molecule.folder / "flow.safetensors")
        quick = TorchPotential(molecule.system, dtype=torch.float32, compile=True)
        proposal = FlowProposal(flow.fuse(), quick, molecule.temperature)
        batch = proposal.sample(N_WEIGHTS, torch.Generator().manual_seed(0))
        ess = reweighting.effective_sample_size(batch.log_weights)
        usual = OpenMMPotential(molecule.system)  # without a platform's name: the fastest one, by its own probe
        for way, potential in (("eager, OpenMM", usual), ("compiled", quick)):
            flow.fuse(way == "compiled")
            parts = split(flow, potential, BATCH if way == "compiled" else FEW, seconds)
            whole = FlowProposal(flow, potential, molecule.temperature)
            n = BATCH if way == "compiled" else 2048
            total = 1e6 / n * race({"": lambda whole=whole, n=n: weigh(whole, n)}, seconds)[""]
            rate = 1e6 / total
            row = {"system": name, "way": way, "microseconds": parts, "whole": total, "ESS": ess, "samples": rate}
            if potential is usual:
                row["platform"] = usual.engine(molecule.positions[None]).platform
            found["rows"].append(row | {"effective samples": ess * rate})
    return found


def weigh(proposal: FlowProposal, n: int) -> float:
    """The pipeline: samples, densities, energies, weights."""
    return reweighting.effective_sample_size(proposal.sample(n).log_weights)


@torch.no_grad()
def split(flow: Flow, potential: Any, n_energies: int, seconds: float) -> dict[str, float]:
    """Microseconds per sample of each part of the pipeline, called by itself."""
    z = flow.prior.sample(BATCH, torch.Generator().manual_seed(0), flow.dtype)
    y = flow.bijection(z)[0].double()
    x = flow.coordinates.to_positions(y)[0]
    x = x[torch.isfinite(x).flatten(1).all(1)]
    some, log_w = x[:n_energies], torch.randn(BATCH)

    def prior() -> None:
        flow.prior.log_prob(flow.prior.sample(BATCH, None, flow.dtype))

    def coordinates() -> None:
        flow.frame_log_density(flow.coordinates.relabel(flow.coordinates.to_positions(y)[0], None))

    calls = {
        "prior": prior,
        "couplings": lambda: flow.bijection(z),
        "coordinates": coordinates,
        "energies": lambda: potential(some),
        "weights": lambda: reweighting.effective_sample_size(log_w),
    }
    sizes = {"energies": len(some)}
    return {name: 1e6 * took / sizes.get(name, BATCH) for name, took in race(calls, seconds).items()}
