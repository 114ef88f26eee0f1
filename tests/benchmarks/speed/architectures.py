"""Part 1: samples with log-density, density of given data, and training steps, against peers and the bare products."""

from typing import Any

import torch

from openmm_regflow.products import coarse_gradients
from speed.clock import Call, race
from speed.peers import BATCH, DIM, ENTRIES, installed

WORK = ("sample", "density", "training step")


def calls_of(contestant: Any, y: torch.Tensor, mixed: bool = False) -> dict[str, Call]:
    """What a contestant is asked to do; `mixed` trains as ``precision = "mixed"`` does."""
    module, sample, density = contestant

    def quiet(call: Call) -> None:
        with torch.no_grad():
            call()

    def step() -> None:
        loss = density(y)
        if module is not None:
            module.zero_grad(set_to_none=True)
            with coarse_gradients(mixed):
                (-loss.mean()).backward()

    return {"sample": lambda: quiet(lambda: sample(BATCH)), "density": lambda: quiet(lambda: density(y)), WORK[2]: step}


def measure(seconds: float = 0.5, threads: int = 1, architectures: Any = tuple(ENTRIES), work: Any = WORK) -> dict:
    """Samples per second of each architecture, contestant and kind of work; per CPU second with one thread."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    found: dict[str, Any] = {"batch": BATCH, "dimensions": DIM, "threads": threads, "per second": {}}
    y = torch.randn(BATCH, DIM)
    for architecture in architectures:
        ready = {name: made for name in ENTRIES[architecture] if (made := installed(name, architecture))}
        calls = {name: calls_of(made, y, "mixed" in name) for name, made in ready.items()}
        rows: dict[str, dict[str, float]] = {name: {} for name in ready}
        for kind in work:
            times = race({name: c[kind] for name, c in calls.items()}, seconds, wall=threads > 1)
            for name, best in times.items():
                rows[name][kind] = BATCH / best
        found["per second"][architecture] = rows
    return found
