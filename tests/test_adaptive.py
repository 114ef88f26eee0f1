"""Adaptation is a stage that ends: nothing retrains a flow that production uses."""

import numpy as np
import pytest
import torch
from analytic_molecules import TEMPERATURE, GaussianFlow, Well, z_scores
from test_sampling import SIGMAS, generator

from openmm_regflow.errors import IncompatibleFlowError, InputError, RegflowError
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
