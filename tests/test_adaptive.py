"""Adaptation is a stage that ends: nothing retrains a flow that production uses."""

import numpy as np
import pytest
import torch
from analytic_molecules import TEMPERATURE, Chain, GaussianFlow, Well, chain_topology, z_scores
from openmm import unit
from openmmtools import mcmc, states
from test_sampling import SIGMAS, chain_z, generator

from openmm_regflow import flows
from openmm_regflow.chains import context_platform
from openmm_regflow.errors import IncompatibleFlowError, InputError, RegflowError
from openmm_regflow.moves import FlowMove
from openmm_regflow.potentials import OpenMMPotential
from openmm_regflow.proposals import FlowProposal
from openmm_regflow.sampling import AdaptiveFlow, run_chain

WELL = Well()
N_CHAINS = 500


def narrow_proposal():
    """A flow far too narrow, around one of the two wells."""
    flow = GaussianFlow(torch.tensor([[-0.15, 0.0, 0.0]]), 0.15**2 * torch.eye(3))
    return FlowProposal(flow, WELL, TEMPERATURE)


def sample(proposal, steps=40):
    g = generator(7)
    chain = run_chain(proposal, WELL.sample(N_CHAINS, g), steps, generator=g, thin=steps)
    return chain.positions[-1].numpy()


def retrain(flow, frames):
    """Moment matching: what maximum likelihood is for a Gaussian."""
    x = torch.as_tensor(frames)
    covariance = 1.2**2 * torch.cov(x.flatten(1).T)
    flow.mean.copy_(x.mean(0).flatten())
    flow.scale.copy_(torch.linalg.cholesky(covariance))
    return flow


def ess(proposal):
    w = torch.softmax(proposal.sample(4000, generator(1)).log_weights, 0)
    return float(1 / (w**2).sum() / len(w))


def test_adapt_freeze_produce():
    proposal = narrow_proposal()
    adaptive = AdaptiveFlow(proposal, sample, retrain)
    before, original = ess(adaptive.proposal), proposal.flow.mean.clone()
    adaptive.adapt(2)
    assert len(adaptive.adaptation) == 2 and adaptive.stage == "adapting"
    frames = adaptive.freeze().produce()
    assert adaptive.stage == "frozen" and ess(adaptive.proposal) > 2 * before
    assert torch.equal(proposal.flow.mean, original)  # the caller's flow is as it was
    scores = z_scores(torch.as_tensor(frames), WELL.observables())
    assert max(map(abs, scores.values())) < SIGMAS, scores


def test_production_waits_for_the_freeze():
    with pytest.raises(InputError, match="freeze"):
        AdaptiveFlow(narrow_proposal(), sample, retrain).produce()


def test_no_adaptation_after_the_freeze():
    adaptive = AdaptiveFlow(narrow_proposal(), sample, retrain).freeze()
    with pytest.raises(InputError, match="adaptation is over"):
        adaptive.adapt()
    with pytest.raises(InputError, match="at least one round"):
        AdaptiveFlow(narrow_proposal(), sample, retrain).adapt(0)


def test_a_flow_changed_after_the_freeze_is_noticed():
    adaptive = AdaptiveFlow(narrow_proposal(), sample, retrain).freeze()
    retrain(adaptive.proposal.flow, np.random.default_rng(0).normal(size=(50, 1, 3)))
    with pytest.raises(RegflowError, match="changed after freeze"):
        adaptive.produce()


def test_freezing_again_does_not_hide_a_change():
    adaptive = AdaptiveFlow(narrow_proposal(), sample, retrain).adapt().freeze()
    adaptive.freeze()
    retrain(adaptive.proposal.flow, np.random.default_rng(0).normal(size=(50, 1, 3)))
    with pytest.raises(RegflowError, match="changed after freeze"):
        adaptive.freeze()


def test_a_flow_changed_during_production_is_noticed():
    def sample_and_retrain(proposal):
        frames = sample(proposal, 2)
        retrain(proposal.flow, frames)
        return frames

    with pytest.raises(RegflowError, match="changed after freeze"):
        AdaptiveFlow(narrow_proposal(), sample_and_retrain, retrain).freeze().produce()


def test_retraining_the_old_object_does_not_touch_the_frozen_flow():
    flows = []

    def remember(flow, frames):
        flows.append(flow)
        return retrain(flow, frames)

    adaptive = AdaptiveFlow(narrow_proposal(), sample, remember).adapt().freeze()
    retrain(flows[-1], np.random.default_rng(0).normal(size=(50, 1, 3)))
    assert adaptive.produce().shape == (N_CHAINS, 1, 3)


def test_a_retrained_flow_of_another_molecule_is_refused():
    class TwoAtoms:
        n_atoms, system = 1, None

        def __call__(self, x):
            return WELL(x)

    proposal = FlowProposal(narrow_proposal().flow, TwoAtoms(), TEMPERATURE)
    other = GaussianFlow(torch.zeros(2, 3), torch.eye(6))
    with pytest.raises(IncompatibleFlowError, match="2 atoms"):
        AdaptiveFlow(proposal, sample, lambda flow, frames: other).adapt()


def refitted(flow, frames):
    """A new flow on coordinates whitened with the frames of the adaptation: the maximum-likelihood Gaussian."""
    return flows.spline(
        flows.coordinates_for(chain_topology(4), torch.as_tensor(frames)), n_layers=2, hidden=16
    ).double()


def test_flow_moves_adapt_and_then_produce(tmp_path):
    """A real FlowMove beside dynamics in openmmtools: sampled, retrained, frozen; production has the exact answers."""
    target, cold = Chain(4), Chain(4, temperature=150.0)
    coordinates = flows.coordinates_for(chain_topology(4), cold.sample(500, generator(1)))  # far too narrow
    flow = flows.spline(coordinates, n_layers=2, hidden=16).double()
    proposal = FlowProposal(flow, OpenMMPotential(target.system, "Reference"), TEMPERATURE)
    lengths, accepted = iter((250, 250, 700)), []  # two rounds, then production

    def openmmtools_chain(proposal):
        np.random.seed(4)
        n = next(lengths)
        move = FlowMove(proposal, seed=n)
        state = states.ThermodynamicState(target.system, TEMPERATURE * unit.kelvin)
        start = states.SamplerState(target.sample(1, generator(6))[0].numpy() * unit.nanometer)
        ghmc = mcmc.GHMCMove(timestep=3 * unit.femtosecond, collision_rate=5 / unit.picosecond, n_steps=5)
        frames = []
        with context_platform("Reference"):
            sampler = mcmc.MCMCSampler(state, start, mcmc.SequenceMove([ghmc, move]))
            for _ in range(n):
                sampler.run(1)
                frames.append(sampler.sampler_state.positions.value_in_unit(unit.nanometer))
        accepted.append(move.n_accepted / n)
        return np.array(frames)

    adaptive = AdaptiveFlow(proposal, openmmtools_chain, refitted)
    frames = adaptive.adapt(2).freeze().produce()
    assert [len(part) for part in adaptive.adaptation] == [250, 250] and len(frames) == 700
    assert ess(adaptive.proposal) > 1.5 * ess(proposal) and min(accepted) > 0.05
    scores = chain_z(torch.as_tensor(frames), target.observables())
    assert max(map(abs, scores.values())) < SIGMAS, scores
    with pytest.raises(InputError, match="adaptation is over"):
        adaptive.adapt()
