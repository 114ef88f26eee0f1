"""Losses against their definitions."""

import json
import math

import pytest
import torch
from torch import nn

from openmm_regflow.bijections import Bijection, Composition
from openmm_regflow.objectives import FlowMatchingLoss, LikelihoodLoss, RegFlowLoss, describe
from openmm_regflow.priors import Prior
from openmm_regflow.targets import aligned_coupling, minibatch_coupling

LINES = torch.zeros(3, dtype=torch.bool)


class Loose(Bijection):
    """y = 2 z, with an inverse that is off by a constant: the forward-backward error is known."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, z):
        return self.scale * z, torch.full((len(z),), z.shape[1] * math.log(2.0))

    def inverse(self, y):
        return y / self.scale + 0.1, torch.full((len(y),), -y.shape[1] * math.log(2.0))


def batch(n=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 3, generator=g)
    return z, 2 * z + 0.5


def test_regression_and_regularisers_add_up():
    loss = RegFlowLoss(LINES, log_det=0.1, forward_backward=0.01)
    total, parts = loss(Loose(), batch(), torch.Generator())
    assert float(parts["regression"]) == pytest.approx(0.25, rel=1e-5)
    assert float(parts["log_det"]) == pytest.approx(0.1 * (3 * math.log(2)) ** 2 / 3, rel=1e-5)
    assert float(parts["forward_backward"]) == pytest.approx(0.01 * 0.01, rel=1e-4)
    assert float(total) == pytest.approx(sum(float(p) for p in parts.values()), rel=1e-6)


@pytest.mark.parametrize("dim", [3, 60])
def test_weights_are_those_of_the_published_sum(dim):
    """Loss times dim is equation 5, whatever the dimension is: |f(z) - y|^2 + weighted regularisers."""
    z, lines = torch.randn(400, dim, generator=torch.Generator().manual_seed(0)), torch.zeros(dim, dtype=torch.bool)
    loss, _ = RegFlowLoss(lines, log_det=0.1, forward_backward=0.01)(Loose(), (z, 2 * z + 0.5), torch.Generator())
    published = dim * 0.25 + 0.1 * (dim * math.log(2)) ** 2 + 0.01 * dim * 0.01
    assert dim * float(loss) == pytest.approx(published, rel=1e-4)


def test_regularisers_can_be_switched_off():
    _, parts = RegFlowLoss(LINES)(Loose(), batch(), torch.Generator())
    assert set(parts) == {"regression"}


def test_teachers_log_determinant_is_the_target_where_given():
    z, y = batch()
    _, parts = RegFlowLoss(LINES, log_det=1.0)(Loose(), (z, y, torch.full((len(z),), 2.0)), torch.Generator())
    assert float(parts["log_det"]) == pytest.approx((3 * math.log(2) - 2.0) ** 2 / 3, rel=1e-5)


def test_target_noise_adds_its_variance():
    z, y = batch(100_000)
    quiet = float(RegFlowLoss(LINES)(Loose(), (z, y), torch.Generator())[0])
    noisy = float(RegFlowLoss(LINES, target_noise=0.3)(Loose(), (z, y), torch.Generator().manual_seed(1))[0])
    # The sum of (0.5 + 0.3 e)^2 over 3e5 numbers: variance 4 0.25 0.09 + 2 0.3^4 each.
    assert noisy - quiet == pytest.approx(0.09, abs=4 * math.sqrt((0.09 + 2 * 0.3**4) / 3e5))


def test_differences_wrap_on_circles():
    circles = torch.ones(3, dtype=torch.bool)
    identity = Composition([])
    z = torch.full((4, 3), math.pi - 0.01)
    y = torch.full((4, 3), -math.pi + 0.01)
    assert float(RegFlowLoss(circles)(identity, (z, y), torch.Generator())[0]) == pytest.approx(0.0004, rel=1e-3)


def test_forward_backward_error_wraps_on_circles():
    """An inverse that comes back by whole turns has no error on circles, and all of it on lines."""

    class Turned(Composition):
        def inverse(self, y):
            z, log_det = super().inverse(y)
            return z + 2 * math.pi, log_det

    turned = Turned([])
    for circular, error in ((torch.ones(3).bool(), 0.0), (LINES, 4 * math.pi**2)):
        _, parts = RegFlowLoss(circular, forward_backward=1.0)(turned, batch(), torch.Generator())
        assert float(parts["forward_backward"]) == pytest.approx(error, abs=1e-9, rel=1e-4)


class Wide(Bijection):
    """y = mean + 2 z."""

    def __init__(self, mean):
        super().__init__()
        self.mean = mean

    def inverse(self, y):
        return (y - self.mean) / 2, torch.full((len(y),), -y.shape[1] * math.log(2.0))


def test_noise_of_the_likelihood():
    """Features with noise of 0.8 have the likelihood of a wider Gaussian: (4 + 0.64) / (2 x 4) for each dimension."""
    flow = Wide(0.0)
    y = batch(200_000)[1] - 0.5
    losses = (LikelihoodLoss(Prior(LINES), noise) for noise in (0.0, 0.8))
    plain, noisy = (float(loss(flow, (y,), torch.Generator().manual_seed(1))[0]) for loss in losses)
    # The noise adds e y / 4 + e^2 / 8 for e of variance 0.64: variance 0.64 * 4 / 16 + 2 * 0.64^2 / 64 a dimension.
    assert noisy - plain == pytest.approx(3 * 0.64 / 8, abs=4 * math.sqrt(3 * (0.16 + 0.0128) / 200_000))


def test_likelihood_of_a_gaussian():
    flow = Wide(0.5)
    y = batch(200_000)[1]
    nll, _ = LikelihoodLoss(Prior(LINES))(flow, (y,), torch.Generator())
    exact = 3 * (0.5 * math.log(2 * math.pi * math.e) + math.log(2.0))
    # The variance of log q of a 3-dimensional Gaussian is 3/2.
    assert float(nll) == pytest.approx(exact, abs=4 * math.sqrt(1.5 / 200_000))


def test_flow_matching_of_a_known_field():
    """Prior to a point mass at c: the best field at (t, x) is (c - x) / (1 - t), and its loss is zero."""

    class Best(nn.Module):
        def forward(self, t, x):
            return (1.0 - x) / (1 - t)[:, None].clamp_min(1e-6)

    loss = FlowMatchingLoss(Prior(LINES))
    value, _ = loss(Best(), (torch.ones(2000, 3),), torch.Generator().manual_seed(0))
    assert float(value) < 1e-4
    worse, _ = loss(nn.Module.__call__.__get__(Zero()), (torch.ones(2000, 3),), torch.Generator().manual_seed(0))
    assert float(worse) > 1.5


class Zero(nn.Module):
    def forward(self, t, x):
        return torch.zeros_like(x)


def test_describe_names_everything_that_changes_a_loss():
    prior, chain = Prior(LINES), Prior(LINES, torch.eye(1))
    losses = [
        FlowMatchingLoss(prior), FlowMatchingLoss(chain), FlowMatchingLoss(prior, aligned_coupling),
        FlowMatchingLoss(prior, minibatch_coupling(LINES)), LikelihoodLoss(prior), LikelihoodLoss(prior, 0.1),
        RegFlowLoss(LINES), RegFlowLoss(LINES, target_noise=0.1), batch,
    ]  # fmt: skip
    assert len({json.dumps(describe(loss), sort_keys=True) for loss in losses}) == len(losses)


def test_describe_is_json_ready():
    assert describe(RegFlowLoss(LINES, log_det=0.1)) == {
        "loss": "RegFlowLoss",
        "log_det": 0.1,
        "forward_backward": 0.0,
        "target_noise": 0.0,
    }
