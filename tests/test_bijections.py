"""One conformance suite over every bijection and architecture: inverses, Jacobians against autodiff, gradients."""

import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openmm_regflow.bijections import (
    AffineCoupling,
    Composition,
    SplineCoupling,
    Within,
    fused,
    rational_quadratic,
    spline,
    wrap,
)
from openmm_regflow.compiling import WithFallback
from openmm_regflow.errors import InputError
from openmm_regflow.networks import MLP, ResidualMLP, TokenTransformer

CIRCULAR = torch.tensor([False] * 7 + [True] * 4)
MASK = torch.tensor([True, False] * 5 + [True])


def perturbed(module, scale=0.1, seed=0):
    """Random weights everywhere: the factories start at the identity, which would hide errors."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g))
    return module.double()


REGISTRY = {
    "affine-mlp": lambda: AffineCoupling(MASK, CIRCULAR, partial(MLP, hidden=16)),
    "affine-residual": lambda: AffineCoupling(MASK, CIRCULAR, partial(ResidualMLP, hidden=16)),
    "affine-transformer": lambda: AffineCoupling(MASK, CIRCULAR, partial(TokenTransformer, token_size=3, hidden=16)),
    "spline": lambda: SplineCoupling(MASK, CIRCULAR, partial(ResidualMLP, hidden=16)),
    "spline-fewer-line-bins": lambda: SplineCoupling(MASK, CIRCULAR, partial(ResidualMLP, hidden=16), line_bins=3),
    "spline-no-line-bins": lambda: SplineCoupling(MASK, CIRCULAR, partial(ResidualMLP, hidden=16), line_bins=0),
    "spline-harmonics": lambda: SplineCoupling(MASK, CIRCULAR, partial(ResidualMLP, hidden=16), harmonics=3),
    "within": lambda: Within(
        CIRCULAR, SplineCoupling(MASK[CIRCULAR], CIRCULAR[CIRCULAR], partial(ResidualMLP, hidden=16))
    ),
    "spline-all-linear": lambda: SplineCoupling(MASK, torch.zeros(11, dtype=torch.bool), partial(MLP, hidden=16)),
    "spline-all-circular": lambda: SplineCoupling(MASK, torch.ones(11, dtype=torch.bool), partial(MLP, hidden=16)),
    "composition": lambda: Composition(
        [SplineCoupling(m, CIRCULAR, partial(ResidualMLP, hidden=16)) for m in (MASK, ~MASK, MASK)]
    ),
}


def circles_of(module):
    return getattr(module, "circles", CIRCULAR)


@pytest.fixture(params=sorted(REGISTRY))
def bijection(request):
    torch.manual_seed(0)  # of the factories' own initial weights
    module = perturbed(REGISTRY[request.param]())
    circular = {"spline-all-linear": torch.zeros(11), "spline-all-circular": torch.ones(11)}.get(
        request.param, CIRCULAR
    )
    return module, circular.bool()


def points(n, circular, scale=1.5, seed=1):
    g = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(n, 11, generator=g, dtype=torch.float64)
    return torch.where(circular, wrap(3 * z), z)


@pytest.mark.parametrize("scale", [1.0, 2.5], ids=["bulk", "tails"])
def test_inverse_float64(bijection, scale):
    module, circular = bijection
    z = points(500, circular, scale)
    y, log_det = module(z)
    back, log_det_back = module.inverse(y)
    assert wrap_where(back - z, circular).abs().max() < 1e-10
    assert (log_det + log_det_back).abs().max() < 1e-9


def conditioned_error(seed, dtype=torch.float64):
    """Largest error of a steep map's inverse on its tails, in units of what rounding its value must cost there."""
    torch.manual_seed(seed)
    module = perturbed(REGISTRY["composition"]())
    z = points(500, CIRCULAR, 2.5)
    with torch.no_grad():
        y = module(z)[0]
        errors = wrap_where(module.inverse(y.to(dtype))[0].double() - z, CIRCULAR).abs().amax(1)
    k = int(errors.argmax())
    jacobian = torch.autograd.functional.jacobian(lambda v: module(v[None])[0][0], z[k])
    condition = torch.linalg.norm(torch.linalg.inv(jacobian), 2) * y[k].norm()
    return float(errors[k] / (torch.finfo(torch.float64).eps * condition))


def test_inverse_of_steep_maps_is_as_exact_as_their_condition_allows():
    """Of 150 random compositions four exceed 1e-10 (the worst, 1e-8, has an inverse Jacobian of norm 1e7)."""
    assert max(conditioned_error(seed) for seed in (5, 40, 54, 73, *range(10))) < 10
    assert conditioned_error(0, torch.float32) > 1e3  # a value that is rounded more coarsely is seen


def test_inverse_float32(bijection):
    module, circular = bijection
    z = points(500, circular).float()
    y, _ = module.float()(z)
    assert wrap_where(module.inverse(y)[0] - z, circular).abs().max() < 1e-4


def test_log_det_against_autodiff(bijection):
    module, circular = bijection
    for z in points(5, circular):
        jacobian = torch.autograd.functional.jacobian(lambda v: module(v[None])[0][0], z)
        assert torch.linalg.slogdet(jacobian)[1] == pytest.approx(float(module(z[None])[1]), abs=1e-9)
        inverse = torch.autograd.functional.jacobian(lambda v: module.inverse(v[None])[0][0], z)
        assert torch.linalg.slogdet(inverse)[1] == pytest.approx(float(module.inverse(z[None])[1]), abs=1e-9)


def test_every_parameter_gets_a_gradient(bijection):
    module, circular = bijection
    value, log_det = module(points(200, circular))
    (value.square().sum() + log_det.sum()).backward()
    dead = [n for n, p in module.named_parameters() if p.grad is None or not bool(torch.isfinite(p.grad).all())]
    assert not dead


def test_angles_stay_angles(bijection):
    module, circular = bijection
    y, _ = module(points(500, circular))
    assert (y[:, circular].abs() <= math.pi + 1e-12).all()


def test_circles_have_no_seam():
    """Value and log-determinant agree at both sides of -pi/pi, also when the angle is given out of range."""
    module = perturbed(REGISTRY["spline"]())
    z = points(50, CIRCULAR)
    turned = z + 2 * math.pi * CIRCULAR.double()
    (a, da), (b, db) = module(z), module(turned)
    assert wrap_where(a - b, CIRCULAR).abs().max() < 1e-9 and (da - db).abs().max() < 1e-9
    z[:, 10] = math.pi - 1e-9
    other = z.clone()
    other[:, 10] = -math.pi + 1e-9
    (a, da), (b, db) = module(z), module(other)
    assert wrap_where(a - b, CIRCULAR).abs().max() < 1e-6 and (da - db).abs().max() < 1e-6


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("one", [spline, fused.spline], ids=["plain", "fused"])
def test_the_slope_at_the_seam_is_that_beside_it(one, inverse):
    """Exactly at -pi and pi, where automatic derivatives of a wrong branch agree with its wrong value."""
    g = torch.Generator().manual_seed(0)
    raw, ends = torch.randn(17, 5, 4, generator=g).double(), torch.randn(5, 4, generator=g).double()
    around = (-math.pi, -math.pi + 1e-9, math.pi - 1e-9, math.pi)
    angles = torch.tensor(around, dtype=torch.float64).expand(5, 4)
    raw, ends = raw[..., :1].expand(-1, -1, 4), ends[:, :1].expand(-1, 4)  # one map, four points
    with torch.compiler.set_stance("force_eager"):
        _, log_slope = one(raw, ends, angles, math.pi, inverse)
    assert (log_slope - log_slope[:, :1]).abs().max() < 1e-6
    assert log_slope.abs().min() > 1e-2  # the identity would have zero


def wrap_where(delta, circular):
    return torch.where(circular, wrap(delta), delta)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(0, 10_000), st.floats(0.1, 6.0))
def test_spline_is_monotone_and_inverts(n_bins, seed, spread):
    from openmm_regflow.bijections.splines import bins, slopes

    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    widths, heights = bins(spread * draw(n_bins, 1)), bins(spread * draw(n_bins, 1))
    derivatives = slopes(spread * draw(n_bins + 1, 1))
    u = torch.linspace(0, 1, 301, dtype=torch.float64)
    knots = [t.expand(-1, 301) for t in (widths, heights, derivatives)]
    v, log_slope = rational_quadratic(u, *knots)
    assert v[0] == pytest.approx(0, abs=1e-12) and v[-1] == pytest.approx(1, abs=1e-12)
    assert (v.diff() > 0).all() and torch.isfinite(log_slope).all()
    back, log_slope_back = rational_quadratic(v, *knots, inverse=True)
    # The inverse magnifies rounding by the inverse slope.
    assert ((back - u).abs() <= 1e-13 * (1 + (-log_slope).exp())).all()
    assert (log_slope + log_slope_back).abs().max() < 1e-6


@pytest.mark.parametrize("mask", [torch.ones(4), torch.zeros(4)])
def test_a_mask_that_moves_everything_or_nothing_is_refused(mask):
    with pytest.raises(InputError, match="mask"):
        AffineCoupling(mask.bool(), torch.zeros(4, dtype=torch.bool), MLP)


def test_without_bins_lines_are_shifted_and_scaled_alone():
    """Each moved line is an affine function of its own latent; a spline is none."""
    for name, affine in (("spline-no-line-bins", True), ("spline", False)):
        module, z = perturbed(REGISTRY[name]()), points(1, CIRCULAR).repeat(3, 1)
        lines = (MASK & ~CIRCULAR).nonzero()[:, 0]
        z[:, lines] += torch.linspace(-1, 1, 3)[:, None]
        bend = module(z)[0][:, lines].diff(n=2, dim=0).abs().max()
        assert (bend < 1e-12) == affine


def test_conditioners_see_multiples_of_torsions():
    """With a network that is one matrix, shifts of lines are harmonics of a kept torsion up to the order asked for."""

    class Matrix(MLP):
        def __init__(self, n_in, n_out):
            super().__init__(n_in, n_out, zero_init=False)
            self.head = torch.nn.Linear(n_in, n_out)

        def hidden(self, x):
            return x

    turned = int((~MASK & CIRCULAR).nonzero()[0])
    line = int((MASK & ~CIRCULAR).nonzero()[0])
    z = torch.zeros(64, 11, dtype=torch.float64)
    z[:, turned] = torch.arange(64, dtype=torch.float64) * (2 * math.pi / 64)
    for order in (1, 3):
        module = perturbed(SplineCoupling(MASK, CIRCULAR, Matrix, line_bins=0, harmonics=order))
        powers = torch.fft.rfft(module(z)[0][:, line]).abs()
        assert (powers[1 : order + 1] > 1e-3).all() and powers[order + 1 :].max() < 1e-9


def test_within_sees_only_what_it_moves():
    module, z = perturbed(REGISTRY["within"]()), points(2, CIRCULAR)
    z[1] = torch.where(CIRCULAR, z[0], z[1])
    y, log_det = module(z)
    assert torch.equal(y[:, ~CIRCULAR], z[:, ~CIRCULAR]) and (y[0] != z[0])[CIRCULAR].any()
    assert torch.equal(y[0][CIRCULAR], y[1][CIRCULAR]) and log_det[0] == log_det[1] != 0


def fused_and_plain(inverse, n_bins=6, seed=0, device="cpu"):
    """Value, log-derivative and gradients by the kernels and by the plain functions, inside and outside the domain."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    raw, ends, v = 1.5 * draw(3 * n_bins - 1, 7, 50), draw(7, 50), 3.0 * draw(7, 50)
    weights = draw(2, 7, 50)
    found = []
    for one in (fused.spline, spline):
        inputs = [t.to(device, copy=True).requires_grad_() for t in (raw, ends, v)]
        value, log_slope = one(*inputs, 4.0, inverse)
        weights = weights.to(device)
        loss = (weights[0] * value + weights[1] * log_slope).sum()
        found.append((value, log_slope, *torch.autograd.grad(loss, inputs)))
    return found


@pytest.mark.parametrize("inverse", [False, True])
def test_fused_splines_are_the_same_map(inverse):
    """The derivatives that are written out agree with autograd's; a wrong one is off by far more than rounding."""
    with torch.compiler.set_stance("force_eager"):  # the arithmetic is tested here, the compiler below
        found = fused_and_plain(inverse)
    for ours, plain in zip(*found):
        assert (ours - plain).abs().max() < 1e-9 * (1 + plain.abs().max())


@pytest.mark.parametrize("one", [spline, fused.spline], ids=["plain", "fused"])
def test_vectors_in_float64_beside_parameters_in_float32(one):
    """The way back is exact to float64, and gradients have the precision of what they belong to."""
    g = torch.Generator().manual_seed(0)
    raw, ends = torch.randn(17, 7, 300, generator=g), torch.randn(7, 300, generator=g)
    v = torch.empty(7, 300, dtype=torch.float64).uniform_(-4.9, 4.9, generator=g)
    inputs = [t.requires_grad_() for t in (raw, ends, v)]
    with torch.compiler.set_stance("force_eager"):
        value, log_slope = one(*inputs, 5.0, False)
        back, log_slope_back = one(raw, ends, value, 5.0, True)
        gradients = torch.autograd.grad(value.sum() + log_slope.sum(), inputs)
    # Rounding of a unit is magnified by the inverse slope; in float32 it would be 1e-7 instead of 1e-15.
    assert ((back - v).abs() <= 1e-12 * (1 + (-log_slope).exp())).all()
    assert (log_slope + log_slope_back).abs().max() < 1e-9
    assert [t.dtype for t in gradients] == [torch.float32, torch.float32, torch.float64]


def test_compiled_kernels_serve_every_number_of_samples():
    """One compilation for all batch sizes, and the values of the plain flow; a single sample goes the plain way."""
    module = perturbed(REGISTRY["spline"]()).float()
    z = points(300, CIRCULAR).float()
    with torch.no_grad():
        expected = module(z)
        module.compiled = True
        for n in (300, 17, 2, 1):
            for ours, plain in zip(module(z[:n]), expected):
                assert (ours - plain[:n]).abs().max() < 1e-4
    assert "cpu" in fused._VALUE.worked - fused._VALUE.failed


def test_a_device_that_cannot_compile_leaves_the_others_alone():
    """One function on two devices, of which one has no compiler: a warning and the plain function, there alone."""

    class Doubling(WithFallback):
        def quick(self, *arguments):
            if arguments[0].device.type == "meta":
                raise RuntimeError(f"no compiler for {self.name}")
            return 2 * arguments[0]

    for order in (("cpu", "meta", "cpu"), ("meta", "cpu", "meta")):
        double = Doubling(lambda x: x + x, f"doubling, {order[0]} first")
        with pytest.warns(RuntimeWarning, match="running eagerly") as caught:
            assert [double(torch.ones(2, device=device)).device.type for device in order] == list(order)
        assert len(caught) == 1 and double.worked == {"cpu"} and double.failed == {"meta"}


@pytest.mark.gpu
@pytest.mark.parametrize("inverse", [False, True])
def test_compiled_kernels_on_the_gpu_are_the_same_map(inverse):
    for ours, plain in zip(*fused_and_plain(inverse, device="cuda")):
        assert ours.is_cuda and (ours - plain).abs().max() < 1e-9 * (1 + plain.abs().max())
    assert "cuda" in fused._VALUE.worked & fused._DERIVATIVE.worked  # compiled, not plain after a warning


@pytest.mark.gpu
def test_a_fused_spline_flow_on_the_gpu_goes_there_and_back():
    module = perturbed(REGISTRY["spline"]()).float().to("cuda")
    z = points(300, CIRCULAR).float().to("cuda")
    with torch.no_grad():
        expected = module(z)
        module.compiled = True
        y, log_det = module(z)
        back, log_det_back = module.inverse(y)
    assert all((ours - plain).abs().max() < 1e-4 for ours, plain in zip((y, log_det), expected))
    assert y.is_cuda and (log_det + log_det_back).abs().max() < 1e-3
    assert wrap_where(back - z, CIRCULAR.to("cuda")).abs().max() < 1e-3


def test_kernels_refuse_a_second_derivative():
    """They are once differentiable; asking for more is an error, never a wrong number."""
    v = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    with torch.compiler.set_stance("force_eager"):
        value, _ = fused.spline(torch.randn(8, 3, 4, dtype=torch.float64), torch.zeros_like(v), v, 2.0, False)
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(value.sum(), v, create_graph=True)


def test_without_a_compiler_a_warning_and_the_same_splines(tmp_path):
    code = """
import torch, warnings
from openmm_regflow.bijections import fused, spline
v = torch.linspace(-3, 3, 40).view(4, 10).requires_grad_()
raw, ends = torch.randn(11, 4, 10), torch.zeros(4, 10)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        for inverse in (False, True):
            value, log_slope = fused.spline(raw, ends, v, 2.0, inverse)
            expected = spline(raw, ends, v, 2.0, inverse)
            torch.testing.assert_close((value, log_slope), expected, rtol=1e-4, atol=1e-4)
            gradients = [torch.autograd.grad(a.sum() + b.sum(), v)[0] for a, b in ((value, log_slope), expected)]
            torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
print(fused.usable(v), [str(w.message) for w in caught if "could not compile" in str(w.message)])
"""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CXX": "/nonexistent/compiler"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("False") and result.stdout.count("running eagerly") == 1
