"""Energies and forces per second against OpenMM on the same machine, in the same run.

    pytest tests/benchmarks/test_potentials_speed.py --benchmark-only

Times are those of the process (CPU seconds of one thread), so that other work on the machine disturbs the ratios
less. The goals are asserted; the rates are written to the benchmark's extra information.
"""

import time

import numpy as np
import openmm
import pytest
import torch

from openmm_regflow.potentials import OpenMMPotential, TorchPotential
from openmm_regflow.systems import load_system

PEPTIDES = ["alanine-dipeptide", "alanine-hexapeptide"]
GOALS = {"compiled energies": 8.0, "eager energies": 1.5, "compiled forces": 3.0}
_CACHE: dict = {}


def per_second(function, count, seconds=1.0):
    """Best of several repetitions, in calls of ``count`` evaluations, by process time."""
    function()
    best, end = np.inf, time.process_time() + seconds
    while time.process_time() < end:
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return count / best


def frames(molecule, n=2048):
    noise = np.random.default_rng(0).normal(size=(n, *molecule.positions.shape))
    return torch.tensor(molecule.positions + 0.003 * noise, dtype=torch.float32)


def openmm_rates(name):
    """Energies and Langevin steps per second of the fastest platform."""
    if name not in _CACHE:
        molecule = load_system(name)
        potential, x = OpenMMPotential(molecule.system), frames(molecule)
        engine = potential.engine(x.double().numpy())
        integrator = openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.0005)
        platform = openmm.Platform.getPlatformByName(engine.platform)
        context = openmm.Context(molecule.system, integrator, platform, engine.properties)
        context.setPositions(molecule.positions)
        context.setVelocitiesToTemperature(300.0, 1)
        energies = per_second(lambda: potential(x[:200]), 200)
        _CACHE[name] = engine.platform, energies, per_second(lambda: integrator.step(200), 200)
    return _CACHE[name]


@pytest.mark.parametrize("kind", list(GOALS))
@pytest.mark.parametrize("name", PEPTIDES)
def test_rate(benchmark, name, kind):
    torch.set_num_threads(1)
    molecule = load_system(name)
    x = frames(molecule)
    potential = TorchPotential(molecule.system, dtype=torch.float32, compile=kind.startswith("compiled"))
    function = potential.energy_and_forces if kind.endswith("forces") else potential
    platform, energies, steps = openmm_rates(name)
    rate = per_second(lambda: function(x), len(x), 2.0)
    ratio = rate / (steps if kind.endswith("forces") else energies)
    benchmark.extra_info |= {
        "per_second": round(rate),
        "platform": platform,
        "platform_energies_per_second": round(energies),
        "platform_steps_per_second": round(steps),
        "ratio": round(ratio, 2),
    }
    benchmark.pedantic(function, (x,), rounds=3)
    assert ratio >= GOALS[kind]


def test_two_processes(benchmark):
    """Wall-clock time: two workers against one; needs two idle cores."""
    molecule = load_system("alanine-hexapeptide")
    x = frames(molecule, 2000).double().numpy()
    best = {}
    for workers in (1, 2):
        with OpenMMPotential(molecule.system, "Reference", workers) as potential:
            potential(x[:64])
            times = []
            for _ in range(3):
                start = time.perf_counter()
                potential(x)
                times.append(time.perf_counter() - start)
            best[workers] = min(times)
            if workers == 2:
                benchmark.extra_info |= {"ratio": round(best[1] / best[2], 2)}
                benchmark.pedantic(potential, (x,), rounds=3)
    assert best[1] / best[2] >= 1.8
