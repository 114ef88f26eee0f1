"""Part 2: 200,000 samples of alanine dipeptide with likelihoods, by every architecture and by the CNF teacher.

The shipped spline draws all of them. The other architectures (untrained: weights cost the same whatever they are) draw
one chunk and are scaled up. The CNF is trained here for a few seconds, so that its field bends as a trained one does;
it is integrated with dopri5 and exact divergences at the tolerance to which the shipped flow inverts itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from openmm_regflow import Flow, flows, load_system
from openmm_regflow.objectives import FlowMatchingLoss
from openmm_regflow.recipes import data_batches
from openmm_regflow.teachers import VectorField, integrate
from openmm_regflow.training import TrainConfig, train
from speed.clock import once, race

N, CHUNK, N_TEACHER = 200_000, 4096, 128
#: Published: Rehman et al., arXiv 2506.01158, on an accelerator that is not named.
PUBLISHED = {"spline": 8.18, "res_nvp": 3.51, "jet": 60.4, "cnf": 26_970.0}


def measure(n: int = N, chunk: int = CHUNK, n_teacher: int = N_TEACHER, teacher_steps: int = 800) -> dict[str, Any]:
    """Seconds for n samples with log-densities."""
    torch.manual_seed(0)
    molecule = load_system("alanine-dipeptide")
    flow = Flow.load(molecule.folder / "flow.safetensors")
    found: dict[str, Any] = {"n": n, "published": PUBLISHED, "shipped": shipped(flow, n)}
    found["architectures"] = {
        kind: architectures(molecule, kind, chunk, n / chunk) for kind in ("internal", "cartesian")
    }
    found["round trip"] = round_trip(flow)
    found["cnf"] = teacher(molecule, flow, n, n_teacher, teacher_steps, found["round trip"]["rms"])
    spline = found["shipped"]["eager, 1 thread"]
    found["cnf over shipped spline"] = found["cnf"]["dopri5"]["seconds"] / spline
    return found


def shipped(flow: Flow, n: int) -> dict[str, float]:
    """All n samples of the shipped flow: CPU time of one thread, wall-clock of two."""
    found = {}
    for way in ("eager", "fused"):
        flow.fuse(way == "fused")
        for threads in (1, 2):
            torch.set_num_threads(threads)
            flow.sample(CHUNK)  # compiles, for each number of threads anew
            seconds = once(lambda: flow.sample(n), wall=threads > 1)
            found[f"{way}, {threads} thread{'s' * (threads > 1)}"] = seconds
    torch.set_num_threads(1)
    flow.fuse(False)
    return found


def architectures(molecule: Any, kind: str, chunk: int, factor: float) -> dict[str, float]:
    """Untrained flows of the sizes of `openmm-regflow benchmark paper`, one chunk, scaled."""
    x = torch.as_tensor(molecule.reference("train")[:4000])
    coordinates = flows.coordinates_for(molecule.topology, x, kind)
    made = {
        "real_nvp": flows.real_nvp(coordinates, n_layers=8, hidden=128, depth=1),
        "res_nvp": flows.res_nvp(coordinates, n_layers=8, hidden=128, depth=1),
        "spline": flows.spline(coordinates, n_layers=8, hidden=128, depth=1),
        "jet": flows.jet(coordinates, n_layers=8, hidden=64, depth=1),
    }
    calls = {name: lambda flow=flow: flow.sample(chunk) for name, flow in made.items()}
    return {name: factor * seconds for name, seconds in race(calls, 0.1).items()}


@torch.no_grad()
def round_trip(flow: Flow, n: int = 4096) -> dict[str, float]:
    """Error of f^-1(f(z)) in units of the prior's standard deviation."""
    z = flow.prior.sample(n, torch.Generator().manual_seed(1), flow.dtype)
    error = flow.bijection.inverse(flow.bijection(z)[0])[0] - z
    error = torch.where(flow.prior.circular, torch.remainder(error + torch.pi, 2 * torch.pi) - torch.pi, error).abs()
    return {"rms": float(error.square().mean().sqrt()), "largest": float(error.max())}


def teacher(molecule: Any, flow: Flow, n: int, subset: int, steps: int, tolerance: float) -> dict[str, Any]:
    """CNF of the size that trained the shipped flow (3 x 256)."""
    x = torch.as_tensor(molecule.reference("train"))
    config = TrainConfig(steps=steps, learning_rate=1e-3, seed=0)
    field = VectorField(flow.prior.circular, "mlp", 256, 3)
    train(field, FlowMatchingLoss(field.prior), data_batches(flow.coordinates, x, config), config)
    z = field.prior.sample(subset, torch.Generator().manual_seed(2))
    # Below this, float32 cannot tell whether a step was good.
    work = field.double() if tolerance < 1e-5 else field
    start = z.to(next(work.parameters()).dtype)
    dtype = str(start.dtype).removeprefix("torch.")
    found: dict[str, Any] = {"samples": subset, "training steps": steps, "dtype": dtype}
    ways = {"dopri5": {"method": "dopri5", "tolerance": tolerance}, "10 midpoint steps": {"n_steps": 10}}
    for name, options in ways.items():
        calls = count_calls(work)
        seconds = once(lambda options=options: integrate(work, start, log_det="exact", **options))
        found[name] = {"seconds": seconds * n / subset, "evaluations": calls() / (start.shape[1])}
    return found | {"tolerance": tolerance}


def count_calls(field: VectorField) -> Callable[[], int]:
    """Counts the field's evaluations from now on; one exact divergence makes one for every dimension."""
    seen: list[int] = []
    hook = field.register_forward_hook(lambda module, given, out: seen.append(1))

    def stop() -> int:
        hook.remove()
        return len(seen)

    return stop


def features(molecule: Any, coordinates: Any, n: int) -> Tensor:
    """Features `(n, dim)` of training frames, for steps that need data."""
    y = coordinates.to_features(torch.as_tensor(molecule.reference("train")[:n]).double())[0]
    return y.float()
