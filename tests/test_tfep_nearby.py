"""Maps between states that resemble each other, on a distribution with angles and an exact answer."""

import math

import numpy as np
import pytest
import torch
from scipy.special import ive

from openmm_regflow import tfep
from openmm_regflow.coordinates import CoordinateMap
from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.tfep.nearby import shrinkage, torsion_flow
from openmm_regflow.units import thermal_energy

KT = thermal_energy(300.0)


class Plain(CoordinateMap):
    """Two atoms whose six numbers are four lines and two circles."""

    n_atoms = 2

    def __init__(self):
        super().__init__()
        self.register_buffer("circular", torch.tensor([False] * 4 + [True] * 2))

    def to_features(self, x):
        return x.flatten(1), x.new_zeros(len(x))

    def to_positions(self, z):
        return z.reshape(-1, 2, 3), z.new_zeros(len(z))


def ends(n, seed=0):
    """Lines coupled to the angles, wider and shifted in B; angles that prefer other places in B."""
    rng = np.random.default_rng(seed)
    kappa, width, shift = (2.0, 3.0), (1.0, 1.1), (0.0, 0.3)

    def potential(k):
        def energy(x):
            z = torch.as_tensor(x).flatten(1)
            rest = z[:, :4] - torch.cos(z[:, 4:5])
            rest = torch.cat([rest[:, :1] - shift[k], rest[:, 1:]], dim=1)
            return KT * (0.5 * (rest / width[k]).square().sum(1) - kappa[k] * torch.cos(z[:, 4:] - 0.5 * k).sum(1))

        return energy

    samples = []
    for k in (0, 1):
        angles = (rng.vonmises(0.5 * k, kappa[k], (n, 2)) + math.pi) % (2 * math.pi) - math.pi
        lines = width[k] * rng.standard_normal((n, 4)) + np.cos(angles[:, :1])
        lines[:, 0] += shift[k]
        samples.append(np.concatenate([lines, angles], axis=1).reshape(n, 2, 3))
    log_i0 = [math.log(ive(0, k)) + k for k in kappa]
    exact = -4 * math.log(width[1] / width[0]) - 2 * (log_i0[1] - log_i0[0])
    return tfep.State(potential(0)), tfep.State(potential(1)), *samples, exact


def test_value_inverse_and_log_determinant_agree_with_autodiff():
    _, _, x, y, _ = ends(200)
    torch.manual_seed(1)
    torsions = torsion_flow(2)
    for parameter in torsions.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    a, b = (torch.tensor(v).flatten(1) for v in (x, y))
    bijection = tfep.NearbyMap.fit(Plain().circular, a, b, torsions).double()
    torch.nn.init.normal_(bijection.drift)
    moved, log_det = bijection(a[:5])
    back, reverse = bijection.inverse(moved)
    assert (back - a[:5]).abs().max() < 1e-9 and (log_det + reverse).abs().max() < 1e-9
    for row, expected in zip(a[:5], log_det):
        jacobian = torch.autograd.functional.jacobian(lambda v: bijection(v[None])[0][0], row)
        assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(expected.item(), abs=1e-9)


def test_stiff_features_alone_need_no_energies_and_shrink_the_error():
    a, b, x, y, exact = ends(1500)
    result = tfep.cross_fit(lambda u, v: tfep.fit_nearby_map(Plain(), u, v), a, b, x, y, folds=3, generator=0)
    assert abs(result.delta_f - exact) < 4 * result.uncertainty
    assert result.verdict.startswith("reliable") and result.uncertainty < result.plain.uncertainty


@pytest.mark.slow
def test_torsions_that_move_shrink_it_further():
    a, b, x, y, exact = ends(1500)
    results = [
        tfep.cross_fit(lambda u, v, s=s: tfep.fit_nearby_map(Plain(), u, v, s), a, b, x, y, folds=2, generator=0)
        for s in (None, (a, b))
    ]
    assert all(abs(r.delta_f - exact) < 4 * r.uncertainty for r in results)
    assert results[1].uncertainty < results[0].uncertainty
    assert results[1].overlap > results[0].overlap


def test_noise_is_shrunk_away_and_a_change_is_not():
    rng = torch.Generator().manual_seed(2)
    variance = torch.full((2000,), 0.01)
    noise = 0.1 * torch.randn(2000, generator=rng)
    # tau^2 of pure noise is zero within 4 standard errors of a variance, sqrt(2 / n) of 0.01.
    assert shrinkage(noise, variance).max() < 4 * math.sqrt(2 / 2000) / (1 + 4 * math.sqrt(2 / 2000))
    assert shrinkage(noise + 1.0, variance).min() > 0.98


def test_too_few_samples_and_mismatched_atoms_are_refused():
    _, _, x, y, _ = ends(30)
    with pytest.raises(InsufficientDataError, match="at least 20"):
        tfep.fit_nearby_map(Plain(), x[:5], y)
    with pytest.raises(InputError, match="atoms"):
        tfep.fit_nearby_map(Plain(), x, y[:, :1])
