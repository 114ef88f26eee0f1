"""Energies and forces per second against OpenMM on the same machine, in the same run: the goals, as pass or fail.

    pytest tests/benchmarks/test_potentials_speed.py -o addopts="" --benchmark-only

The figures themselves are in docs/speed.md (``make benchmark``). Times are those of the process (CPU seconds of one
thread), so that other work on the machine disturbs the ratios less.
"""

import time
from functools import cache

import pytest
import torch
from speed.energies import PEPTIDES, frames, openmm_rates, torch_rate

from openmm_regflow.potentials import OpenMMPotential
from openmm_regflow.systems import load_system

GOALS = {"compiled energies": 8.0, "eager energies": 1.5, "compiled forces": 3.0}


@cache
def engine(name):
    """The fastest platform and its rates."""
    return openmm_rates(load_system(name))


@pytest.mark.parametrize("kind", list(GOALS))
@pytest.mark.parametrize("name", PEPTIDES)
def test_rate(benchmark, name, kind):
    torch.set_num_threads(1)
    rates = engine(name)
    rate = benchmark.pedantic(torch_rate, (load_system(name), kind, 2.0), rounds=1)
    ratio = rate / rates["steps" if kind.endswith("forces") else "energies"]
    benchmark.extra_info |= {"per_second": round(rate), "ratio": round(ratio, 2), **rates}
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
