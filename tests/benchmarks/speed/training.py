"""Part 3: training steps per second of RegFlow, of maximum likelihood and of the teacher, on alanine dipeptide."""

import contextlib
import time
from typing import Any

import torch

from openmm_regflow import flows, load_system
from openmm_regflow.objectives import FlowMatchingLoss, LikelihoodLoss, RegFlowLoss
from openmm_regflow.teachers import VectorField
from openmm_regflow.training import Batches, TrainConfig, train
from speed.likelihoods import features

BATCH, FRAMES = 512, 4096


def measure(seconds: float = 1.2) -> dict[str, Any]:
    """Steps of 512 samples per CPU second, whole: batch, loss, gradient, clipping, AdamW, average of the weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    molecule = load_system("alanine-dipeptide")
    x = torch.as_tensor(molecule.reference("train")[:FRAMES])
    coordinates = flows.coordinates_for(molecule.topology, x)
    y = features(molecule, coordinates, FRAMES)
    rows: dict[str, dict[str, float]] = {}
    for name in ("real_nvp", "res_nvp", "spline", "spline, fused", "jet"):
        factory = getattr(flows, name.split(",")[0])
        flow = factory(coordinates, n_layers=8, hidden=64 if name == "jet" else 128, depth=1).fuse("fused" in name)
        z = flow.prior.sample(len(y))
        pairs = Batches((z, y, torch.zeros(len(y))), BATCH)
        regflow = RegFlowLoss(flow.prior.circular, log_det=1e-3, forward_backward=1e-6)
        rows[name] = {
            "RegFlow": rate(flow.bijection, regflow, pairs, seconds),
            "maximum likelihood": rate(flow.bijection, LikelihoodLoss(flow.prior), Batches((y,), BATCH), seconds),
        }
    field = VectorField(coordinates.circular, "mlp", 256, 3)
    matching = {"flow matching": rate(field, FlowMatchingLoss(field.prior), Batches((y,), BATCH), seconds)}
    return {"batch": BATCH, "steps per second": rows | {"teacher (3 x 256)": matching}}


def rate(module: Any, loss: Any, batches: Any, seconds: float, skip: int = 3) -> float:
    """Steps per second of process time, the first few left out."""
    stamps: list[float] = []
    end = time.monotonic() + 20 * seconds

    def progress(done: int, total: int, figures: dict[str, float]) -> None:
        stamps.append(time.process_time())
        # Compilation lies in the first steps; the clock of the measurement starts behind them.
        if len(stamps) > skip + 3 and (stamps[-1] - stamps[skip] > seconds or time.monotonic() > end):
            raise TimeIsUp

    config = TrainConfig(steps=100_000, checkpoint_every=100_000, warmup=1000)
    with contextlib.suppress(TimeIsUp):
        train(module, loss, batches, config, progress=progress)
    return (len(stamps) - 1 - skip) / (stamps[-1] - stamps[skip])


class TimeIsUp(Exception):
    """Ends a training that knows no clock of its own."""
