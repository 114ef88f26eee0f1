"""Langevin steps per second of both replica-exchange engines, within one run.

``python -m pytest tests/benchmarks/test_tempering_speed.py -o addopts="" --benchmark-only``
"""

import time

import pytest
import torch

from openmm_regflow.simulate import BatchedSettings, TemperingSettings, batched_tempering, parallel_tempering
from openmm_regflow.systems import load_system

COMMON = {"n_replicas": 4, "max_temperature": 500.0, "timestep": 0.002, "steps_per_iteration": 100}


def rate(make, folder, settings, short, long, per_iteration):
    """Steps per second of process time between ``short`` and ``long`` iterations: set-up and compilation cancel."""
    stamps = {}

    def progress(done, total):
        stamps[done] = time.process_time()

    make(folder, settings.model_copy(update={"n_iterations": long}), progress)
    return per_iteration * (long - short) / (stamps[long] - stamps[short])


@pytest.mark.parametrize("name", ["alanine-dipeptide", "alanine-tripeptide", "alanine-tetrapeptide"])
def test_batched_against_openmmtools(benchmark, name, tmp_path):
    torch.set_num_threads(1)
    molecule = load_system(name)
    one = TemperingSettings.create(**COMMON, scramble_steps=10, platform=None, checkpoint_interval=1000)
    many = BatchedSettings.create(**COMMON, scramble_steps=10, n_copies=32)

    def openmmtools(folder, settings, progress):
        parallel_tempering(molecule, folder, settings, progress=progress)

    def batched(folder, settings, progress):
        batched_tempering(molecule, folder, settings, progress=progress)

    steps = COMMON["n_replicas"] * COMMON["steps_per_iteration"]
    slow = rate(openmmtools, tmp_path / "one", one, 20, 60, steps)
    fast = benchmark.pedantic(
        rate, args=(batched, tmp_path / "many", many, 5, 15, steps * many.n_copies), rounds=1, iterations=1
    )
    benchmark.extra_info |= {"openmmtools": slow, "batched": fast, "ratio": fast / slow}
    print(f"{name}: batched {fast:,.0f} steps/s, openmmtools {slow:,.0f} steps/s, ratio {fast / slow:.1f}")
