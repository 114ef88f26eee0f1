"""Teachers: straight paths, an ODE with exact log-determinants, a density that the ODE really has."""

import math

import pytest
import torch

from openmm_regflow.bijections import wrap
from openmm_regflow.errors import InputError
from openmm_regflow.rigid import random_rotations
from openmm_regflow.teachers import VectorField, divergence, integrate, interpolate

CIRCULAR = torch.tensor([False, False, False, True, True])


def field_of(kind, seed=0):
    field = VectorField(CIRCULAR, kind=kind, hidden=16, depth=1, seed=seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in field.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=g))
    return field.double()


@pytest.fixture(params=["mlp", "transformer"])
def field(request):
    return field_of(request.param)


def start(n, seed=0):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n_steps", [0, -1])
def test_no_steps_are_refused(n_steps):
    with pytest.raises(InputError, match=f"n_steps is {n_steps}"):
        integrate(field_of("mlp"), start(3), n_steps=n_steps)


def test_paths_are_straight_and_short():
    x0, x1 = 2 * start(100, 1), 2 * start(100, 2)
    x0, x1 = (torch.where(CIRCULAR, wrap(x), x) for x in (x0, x1))
    t = torch.rand(100, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    point, velocity = interpolate(x0, x1, t, CIRCULAR)
    assert (velocity[:, CIRCULAR].abs() <= math.pi).all()
    end = point + (1 - t[:, None]) * velocity
    assert torch.where(CIRCULAR, wrap(end - x1), end - x1).abs().max() < 1e-12


def test_field_is_periodic(field):
    x, t = start(20), torch.full((20,), 0.3, dtype=torch.float64)
    turned = x + 2 * math.pi * CIRCULAR.double()
    assert (field(t, x) - field(t, turned)).abs().max() < 1e-12


def test_divergence_against_autodiff(field):
    x, t = start(4), torch.full((4,), 0.6, dtype=torch.float64)
    _, total = divergence(field, t, x, None)
    for k in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda v, k=k: field(t[k : k + 1], v[None])[0], x[k])
        assert float(total[k]) == pytest.approx(float(jacobian.trace()), abs=1e-12)


def test_hutchinson_is_unbiased(field):
    x = start(1).repeat(4000, 1)
    t = torch.full((4000,), 0.5, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    probe = torch.randint(0, 2, x.shape, generator=g).double() * 2 - 1
    _, estimate = divergence(field, t, x, probe)
    _, exact = divergence(field, t[:1], x[:1], None)
    assert abs(float(estimate.mean() - exact)) < 4 * float(estimate.std()) / math.sqrt(4000)


def test_ode_inverts_and_its_log_det_is_that_of_the_map(field):
    x = start(3)
    y, log_det = integrate(field, x, n_steps=40, method="rk4", log_det="exact")
    back, log_det_back = integrate(field, y, n_steps=40, method="rk4", log_det="exact", reverse=True)
    delta = back - x
    assert torch.where(CIRCULAR, wrap(delta), delta).abs().max() < 1e-5
    assert (log_det + log_det_back).abs().max() < 1e-5
    step = 1e-5
    for k in range(3):
        rows = []
        for i in range(5):
            shift = torch.zeros(1, 5, dtype=torch.float64)
            shift[0, i] = step
            up, _ = integrate(field, x[k : k + 1] + shift, n_steps=40, method="rk4")
            down, _ = integrate(field, x[k : k + 1] - shift, n_steps=40, method="rk4")
            rows.append(torch.where(CIRCULAR, wrap(up - down), up - down)[0] / (2 * step))
        assert float(torch.linalg.slogdet(torch.stack(rows))[1]) == pytest.approx(float(log_det[k]), abs=1e-5)


def test_adaptive_and_fixed_steps_agree(field):
    x = start(50)
    a, _ = integrate(field, x, method="dopri5", tolerance=1e-9)
    b, _ = integrate(field, x, n_steps=60, method="rk4")
    assert torch.where(CIRCULAR, wrap(a - b), a - b).abs().max() < 1e-6


def test_bad_choices():
    with pytest.raises(InputError, match="known: mlp"):
        VectorField(CIRCULAR, kind="cnn")
    with pytest.raises(InputError, match="log_det"):
        integrate(field_of("mlp"), start(2), log_det="maybe")


def equivariant():
    field = VectorField(torch.zeros(15, dtype=torch.bool), "equivariant", hidden=16, depth=2).double()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in field.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=g))
    return field


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fixed_steps_are_as_many_as_asked_for(dtype, reverse):
    """1 / 49 and 1 / 61 times their number are a little less than one in one precision or the other."""

    class Counted(torch.nn.Module):
        circular, calls = torch.zeros(2, dtype=torch.bool), 0

        def forward(self, t, x):
            self.calls += 1
            return torch.ones_like(x)

    for n_steps in (1, 7, 49, 61, 109):
        field = Counted()
        end, _ = integrate(field, torch.zeros(3, 2, dtype=dtype), n_steps=n_steps, method="euler", reverse=reverse)
        assert field.calls == n_steps
        torch.testing.assert_close(end, torch.full_like(end, -1.0 if reverse else 1.0))


def test_equivariant_field_turns_with_the_molecule_and_knows_its_mirror_image():
    field = equivariant()
    x = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.rand(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    turn = random_rotations(1, torch.Generator().manual_seed(3))[0]
    velocity = field(t, x.flatten(1)).view(6, 5, 3)
    assert (field(t, (x @ turn.T).flatten(1)).view(6, 5, 3) - velocity @ turn.T).abs().max() < 1e-12
    mirror = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    assert (field(t, (x * mirror).flatten(1)).view(6, 5, 3) - velocity * mirror).abs().max() > 1e-3


def test_equivariant_divergence_and_invariant_density():
    field = equivariant()
    x = torch.randn(2, 15, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.full((2,), 0.6, dtype=torch.float64)
    _, total = divergence(field, t, x, None)
    for k in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda v, k=k: field(t[k : k + 1], v[None])[0], x[k])
        assert float(total[k]) == pytest.approx(float(jacobian.trace()), abs=1e-11)
    turned = (x.view(2, 5, 3) @ random_rotations(2, torch.Generator().manual_seed(3)).transpose(1, 2)).flatten(1)
    (_, a), (_, b) = (integrate(field, v, n_steps=4, log_det="exact") for v in (x, turned))
    assert (a - b).abs().max() < 1e-11


def test_equivariant_field_needs_atoms():
    with pytest.raises(InputError, match="cartesian"):
        VectorField(CIRCULAR, "equivariant")
