"""Alanine dipeptide: chains with flow moves have the populations of parallel tempering and of constrained dynamics."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import openmm_regflow as rf
from openmm_regflow import flows, metrics
from openmm_regflow.chains import run_chain
from openmm_regflow.constraints import fixed_bonds

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


def trained_on_constrained_bonds(molecule, n_steps=300):
    """A flow that holds the bonds of hydrogens fixed, trained by likelihood for seconds: an ESS of some per cent."""
    x = torch.as_tensor(molecule.reference("train")).double()
    coordinates = flows.coordinates_for(molecule.topology, x, fixed=fixed_bonds(molecule.system))
    flow, y = flows.spline(coordinates, n_layers=6, hidden=64), coordinates.to_features(x)[0].float()
    optimiser, g = torch.optim.Adam(flow.bijection.parameters(), 2e-3), torch.Generator().manual_seed(1)
    for _ in range(n_steps):
        z, log_det = flow.bijection.inverse(y[torch.randint(len(y), (256,), generator=g)])
        loss = -(flow.prior.log_prob(z) + log_det).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.bijection.parameters(), 1.0)
        optimiser.step()
    return flow.requires_grad_(False).eval()


def on_the_left(molecule, positions):
    """name -> series over the frames with phi < 0, a side that dynamics do not leave: torsions, psi's basin, geometry,
    energy [kT]."""
    x = np.asarray(positions, dtype=np.float64)
    phi, psi = (metrics.dihedrals(x, molecule.torsions(kind)[:1])[:, 0] for kind in ("phi", "psi"))
    left = ~metrics.in_range(phi, (0.0, 2.0))
    x, phi, psi = x[left], phi[left], psi[left]
    energy = rf.OpenMMPotential(molecule.system, "Reference")(x).numpy() / rf.units.thermal_energy(molecule.temperature)
    centre, nitrogen, carbon, beta = molecule.chiral_centres[0]
    arms = [x[:, atom] - x[:, centre] for atom in (nitrogen, carbon, beta)]
    lengths = [np.linalg.norm(arm, axis=1) for arm in arms]
    bend = np.arccos((arms[0] * arms[1]).sum(1) / lengths[0] / lengths[1])
    return {
        "cos phi": np.cos(phi), "sin phi": np.sin(phi), "cos psi": np.cos(psi), "sin psi": np.sin(psi),
        "alpha R": metrics.in_range(psi, (-2.0, 1.0)).astype(float),
        "N-CA": lengths[0], "CA-CB": lengths[2], "N-CA-C": bend, "energy": energy,
    }  # fmt: skip


class WrongSign(rf.FlowProposal):
    """The planted error: log q with the wrong sign."""

    def sample(self, n, generator=None):
        batch = super().sample(n, generator)
        return batch._replace(log_q=-batch.log_q)

    def log_q(self, positions):
        return -super().log_q(positions)


@pytest.mark.slow
def test_constrained_hydrogens_agree_with_long_constrained_dynamics():
    """Flow moves alone, and with dynamics, against constrained dynamics of 1 ns; a wrong density is seen."""
    molecule = rf.load_system("alanine-dipeptide", constraints="HBonds")
    potential, flow = rf.OpenMMPotential(molecule.system, "Reference"), trained_on_constrained_bonds(molecule)

    def sampled(kind, n, n_md_steps):
        move = rf.FlowMove(kind(flow, potential, molecule.temperature), 16, pool_size=2048, seed=1)
        trace = run_chain(molecule, move, n_iterations=n, n_md_steps=n_md_steps, timestep=0.002, seed=3)
        print(f"{kind.__name__}, {n_md_steps} steps between: {trace.statistics}")
        return on_the_left(molecule, trace.positions)

    dynamics = run_chain(molecule, n_iterations=2000, n_md_steps=250, timestep=0.002, seed=4)
    long = on_the_left(molecule, dynamics.positions)
    assert len(long["energy"]) == 2000

    def scores(chain):
        found = {}
        for name, reference in long.items():
            (a, error_a), (b, error_b) = population(chain[name][None]), population(reference[None])
            found[name] = (a - b) / math.hypot(error_a, error_b)
            print(f"  {name}: flow {a:.5f} +- {error_a:.5f}, dynamics {b:.5f} +- {error_b:.5f}")
        return max(map(abs, found.values()))

    assert scores(sampled(rf.FlowProposal, 700, 50)) < SIGMAS
    assert scores(sampled(rf.FlowProposal, 500, 1)) < SIGMAS
    assert scores(sampled(WrongSign, 200, 1)) > SIGMAS
