"""Annealed importance sampling on a molecule with known answers, from a poor flow; errors planted are seen."""

import math

import numpy as np
import pytest
import torch
from analytic_molecules import TEMPERATURE, Chain, MethylChain, dihedral

import openmm_regflow as rf
from openmm_regflow import flows, reweighting
from openmm_regflow.errors import InputError
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.sampling import annealed, annealed_samples

SIGMAS = 4.5  # 1e-5 two-sided probability per figure
CHAIN = Chain(4)


def poor_flow(kind="internal"):
    """A spline flow whose weights are shaken: skewed, and nothing like the target."""
    x = CHAIN.sample(2000, torch.Generator().manual_seed(0))
    flow = flows.spline(flows.coordinates_for(CHAIN.topology, x, kind), n_layers=2, hidden=8).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in flow.bijection.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return flow


@pytest.fixture(scope="module")
def proposal():
    return rf.FlowProposal(poor_flow(), TorchPotential(CHAIN.system), TEMPERATURE)


def scores(batch):
    """|z| of every observable of the self-normalised estimate, by its delta-method error."""
    w = reweighting.normalised_weights(batch.log_weights.numpy())
    found = {}
    for name, (f, exact) in CHAIN.observables().items():
        value = f(batch.positions.double()).numpy()
        found[name] = abs(np.sum(w * value) - exact) / math.sqrt(np.sum((w * (value - exact)) ** 2))
    return found


def log_mean_weight(log_w):
    """log of the mean weight and its error."""
    w = np.exp(log_w - log_w.max())
    return math.log(w.mean()) + log_w.max(), w.std() / w.mean() / math.sqrt(len(w))


def test_unbiased_and_worth_more(proposal):
    g = torch.Generator().manual_seed(2)
    found = annealed_samples(proposal, 12_000, g, n_steps=4)
    assert max(scores(found.batch).values()) < SIGMAS
    before, after = found.log_weights_before.numpy(), found.batch.log_weights.numpy()
    assert reweighting.effective_sample_size(before) < 0.3
    assert reweighting.effective_sample_size(after) > 2 * reweighting.effective_sample_size(before)
    (z0, e0), (z1, e1) = log_mean_weight(before), log_mean_weight(after)  # one and the same normalisation
    assert abs(z0 - z1) < SIGMAS * math.hypot(e0, e1)
    assert all(0.4 < rate < 0.99 for rate in found.acceptance)
    assert found.energies == 12_000 * (1 + 4 * 5) + annealed.PILOT * (1 + annealed.TRIALS * 5)


def never_rejects(self, start, b, generator):
    now, _ = real_trajectory(self, start, b, generator)
    return self.at(now.z + 0.3 * torch.ones_like(now.z), now.turns), 1.0


def other_bridge(self, start, b, generator):
    return real_trajectory(self, start, 0.5 * b, generator)


real_trajectory = annealed._Latent.trajectory


@pytest.mark.parametrize("planted", [never_rejects, other_bridge])
def test_a_planted_error_is_seen(proposal, monkeypatch, planted):
    monkeypatch.setattr(annealed._Latent, "trajectory", planted)
    monkeypatch.setattr(annealed._Latent, "tune", lambda self, generator: None)
    found = annealed_samples(proposal, 12_000, torch.Generator().manual_seed(2), n_steps=4)
    z = max(scores(found.batch).values())
    (z0, e0), (z1, e1) = (log_mean_weight(v.numpy()) for v in (found.log_weights_before, found.batch.log_weights))
    assert max(z, abs(z0 - z1) / math.hypot(e0, e1)) > 2 * SIGMAS


def test_no_steps_are_plain_importance_sampling(proposal):
    found = annealed_samples(proposal, 500, torch.Generator().manual_seed(3), n_steps=0)
    plain = proposal.sample(500, torch.Generator().manual_seed(3))
    assert torch.allclose(found.batch.log_weights, plain.log_weights, atol=1e-9)
    assert torch.allclose(found.log_weights_before, plain.log_weights, atol=1e-9) and found.energies == 500


def test_cartesian_flow_in_its_own_frame():
    """Whose plain weights are worth nothing."""
    proposal = rf.FlowProposal(poor_flow("cartesian"), TorchPotential(CHAIN.system), TEMPERATURE)
    found = annealed_samples(proposal, 4000, torch.Generator().manual_seed(4), n_steps=40)
    before, after = found.log_weights_before.numpy(), found.batch.log_weights.numpy()
    assert reweighting.effective_sample_size(after) > 20 * reweighting.effective_sample_size(before)
    assert max(scores(found.batch).values()) < SIGMAS


def test_gradients_are_those_of_the_bridge(proposal):
    check_gradients(proposal)


def check_gradients(proposal):
    latent = annealed._Latent(proposal, 1)
    start = latent.start(4, torch.Generator().manual_seed(5), forces=False)
    z, turns = start.z, start.turns
    for b in (0.3, 1.0):
        gradient = latent.at(z, turns).gradient(b)
        for k in range(z.shape[1]):
            step = torch.zeros_like(z)
            step[:, k] = 1e-5
            up, down = (latent.at(z + s, turns, forces=False).log_density(b) for s in (step, -step))
            torch.testing.assert_close(gradient[:, k], (up - down) / 2e-5, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def unlike_hydrogens():
    """A flow that knows no labels of a methyl's hydrogens, and a target that tells them apart."""
    target = MethylChain()
    x = target.sample(2000, torch.Generator().manual_seed(6))
    flow = flows.real_nvp(flows.coordinates_for(target.topology, x), n_layers=2, hidden=8).double()
    assert flow.coordinates.rotors
    return target, rf.FlowProposal(flow, TorchPotential(target.system), TEMPERATURE)


def test_energies_are_those_of_the_labels_that_come_back(unlike_hydrogens):
    target, proposal = unlike_hydrogens
    found = annealed_samples(proposal, 2000, torch.Generator().manual_seed(7), n_steps=5)
    batch = found.batch
    usable = torch.isfinite(batch.u)
    torch.testing.assert_close(proposal.reduced_potential(batch.positions)[usable], batch.u[usable])
    w = reweighting.normalised_weights(batch.log_weights.numpy())
    assert 1 / np.sum(w**2) > 100
    torsion = dihedral(batch.positions[:, [16, 17, 18, 19]])
    for name, f in (("cos", torch.cos), ("sin", torch.sin)):
        value, exact = f(torsion).numpy(), target.torsion.mean(getattr(np, name))
        assert abs(np.sum(w * value) - exact) < SIGMAS * math.sqrt(np.sum((w * (value - exact)) ** 2))


def test_gradients_with_labels(unlike_hydrogens):
    check_gradients(unlike_hydrogens[1])


@pytest.mark.parametrize("keywords", [{"n": 0}, {"n": 5, "n_steps": -1}, {"n": 5, "n_leapfrog": 0}])
def test_numbers_that_are_none(proposal, keywords):
    with pytest.raises(InputError, match="are needed"):
        annealed_samples(proposal, **keywords)


def test_forces_are_needed(proposal):
    bare = rf.FlowProposal(proposal.flow, lambda x: proposal.potential(x), TEMPERATURE)
    with pytest.raises(InputError, match="needs forces"):
        annealed_samples(bare, 10)
    assert len(annealed_samples(bare, 10, n_steps=0).batch.u) == 10
