"""Alanine dipeptide: a mixed chain of flow moves and dynamics has the populations that parallel tempering finds."""

import math
import os
from pathlib import Path

import numpy as np
import pytest

import openmm_regflow as rf
from openmm_regflow import metrics
from openmm_regflow.chains import run_chain

SIGMAS = 4.5
#: Basins (phi, psi) [rad] that cover the torus: low and high of each arc, going round through pi where low > high.
BASINS = {
    "alpha L": ((0.0, 2.0), (-math.pi, math.pi)),
    "alpha R": ((2.0, 0.0), (-2.0, 1.0)),
    "C5": ((2.0, -1.9), (1.0, -2.0)),
    "PII and C7eq": ((-1.9, 0.0), (1.0, -2.0)),
}


def indicators(molecule, x):
    """name -> 0 or 1 per frame `(n,)`."""
    x = np.asarray(x, dtype=np.float64)
    angles = [metrics.dihedrals(x, molecule.torsions(kind)[:1])[:, 0] for kind in ("phi", "psi")]
    inside = {
        name: np.logical_and(*(metrics.in_range(a, arc) for a, arc in zip(angles, arcs)))
        for name, arcs in BASINS.items()
    }
    return {name: values.astype(float) for name, values in inside.items()}


def population(chains):
    """Mean of chains `(n_chains, n)` and its standard error by their integrated autocorrelation time."""
    n_effective = chains.size / metrics.integrated_autocorrelation_time(chains)
    return chains.mean(), chains.std() / math.sqrt(n_effective)


@pytest.fixture(scope="module")
def molecule():
    return rf.load_system("alanine-dipeptide")


@pytest.fixture(scope="module")
def flow_file(molecule):
    path = Path(os.environ.get("REGFLOW_FLOW", molecule.folder / "flow.safetensors"))
    if not path.is_file():
        pytest.skip(f"no flow at {path}; train one, or name another in REGFLOW_FLOW")
    return path


def test_basins_cover_the_torus(molecule):
    x = molecule.reference("test")[::10]
    assert (sum(indicators(molecule, x).values()) == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("n_proposals", [1, 32])
def test_mixed_chain_agrees_with_parallel_tempering(molecule, flow_file, n_proposals):
    """Held-out tempering runs (two, one after the other in the file) against an openmmtools chain."""
    proposal = rf.FlowProposal(rf.Flow.load(flow_file), rf.OpenMMPotential(molecule.system), molecule.temperature)
    move = rf.FlowMove(proposal, n_proposals, pool_size=1024, seed=n_proposals)
    trace = run_chain(molecule, move, n_iterations=4000, n_md_steps=50, seed=n_proposals)
    assert trace.statistics["acceptance_rate"] > 0.1
    reference = indicators(molecule, molecule.reference("test"))
    for name, values in indicators(molecule, trace.positions).items():
        (a, error_a), (b, error_b) = population(values[None]), population(reference[name].reshape(2, -1))
        print(f"{name}: chain {a:.4f} +- {error_a:.4f}, tempering {b:.4f} +- {error_b:.4f}")
        assert values.any() and abs(a - b) < SIGMAS * math.hypot(error_a, error_b), name
