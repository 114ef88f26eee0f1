"""Losses against their definitions."""

import math

import pytest
import torch
from torch import nn

from openmm_regflow.bijections import Bijection, Linear
from openmm_regflow.flows import Prior
from openmm_regflow.objectives import FlowMatchingLoss, LikelihoodLoss, RegFlowLoss, describe

LINES = torch.zeros(3, dtype=torch.bool)


class Loose(Bijection):
    """y = 2 z, with an inverse that is off by a constant: the forward-backward error is known."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, z):
        return self.scale * z, torch.full((len(z),), 3 * math.log(2.0))

    def inverse(self, y):
        return y / self.scale + 0.1, torch.full((len(y),), -3 * math.log(2.0))


def batch(n=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 3, generator=g)
    return z, 2 * z + 0.5


def test_regression_and_regularisers_add_up():
    loss = RegFlowLoss(LINES, log_det=0.1, forward_backward=0.01)
    total, parts = loss(Loose(), batch(), torch.Generator())
    assert float(parts["regression"]) == pytest.approx(0.25, rel=1e-5)
    assert float(parts["log_det"]) == pytest.approx(0.1 * (3 * math.log(2)) ** 2, rel=1e-5)
    assert float(parts["forward_backward"]) == pytest.approx(0.01 * 3 * 0.01, rel=1e-4)
    assert float(total) == pytest.approx(sum(float(p) for p in parts.values()), rel=1e-6)


def test_regularisers_can_be_switched_off():
    _, parts = RegFlowLoss(LINES)(Loose(), batch(), torch.Generator())
    assert set(parts) == {"regression"}


def test_teachers_log_determinant_is_the_target_where_given():
    z, y = batch()
    _, parts = RegFlowLoss(LINES, log_det=1.0)(Loose(), (z, y, torch.full((len(z),), 2.0)), torch.Generator())
    assert float(parts["log_det"]) == pytest.approx((3 * math.log(2) - 2.0) ** 2, rel=1e-5)


def test_target_noise_adds_its_variance():
    z, y = batch(100_000)
    quiet = float(RegFlowLoss(LINES)(Loose(), (z, y), torch.Generator())[0])
    noisy = float(RegFlowLoss(LINES, target_noise=0.3)(Loose(), (z, y), torch.Generator().manual_seed(1))[0])
    # The sum of (0.5 + 0.3 e)^2 over 3e5 numbers: variance 4 0.25 0.09 + 2 0.3^4 each.
    assert noisy - quiet == pytest.approx(0.09, abs=4 * math.sqrt((0.09 + 2 * 0.3**4) / 3e5))


def test_differences_wrap_on_circles():
    circles = torch.ones(3, dtype=torch.bool)
    identity = Linear(torch.zeros(3), torch.eye(3))
    z = torch.full((4, 3), math.pi - 0.01)
    y = torch.full((4, 3), -math.pi + 0.01)
    assert float(RegFlowLoss(circles)(identity, (z, y), torch.Generator())[0]) == pytest.approx(0.0004, rel=1e-3)


def test_likelihood_of_a_gaussian():
    flow = Linear(torch.full((3,), 0.5), 2 * torch.eye(3))
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


def test_describe_is_json_ready():
    assert describe(RegFlowLoss(LINES, log_det=0.1)) == {
        "loss": "RegFlowLoss",
        "log_det": 0.1,
        "forward_backward": 0.0,
        "target_noise": 0.0,
    }
