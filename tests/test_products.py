"""Products by oneDNN are torch's own: values, all derivatives, and only where they are asked for."""

import pytest
import torch

from openmm_regflow import products
from openmm_regflow.networks import ResidualMLP
from openmm_regflow.teachers import VectorField, divergence


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def way(request, monkeypatch):
    """Both ways on any processor: oneDNN multiplies correctly everywhere, it is only slower on some."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    torch.manual_seed(0)
    monkeypatch.setattr(products, "onednn_is_quicker", lambda: request.param)
    monkeypatch.setattr(products, "LEAST_WORK", 1)
    return request.param


def numbers(n=300, n_in=70, n_out=50):
    g = torch.Generator().manual_seed(0)
    draw = (torch.randn(shape, generator=g) for shape in ((n, n_in), (n_out, n_in), (n_out,)))
    return [t.requires_grad_() for t in draw]


def transposed(x, weight, bias):
    return products.columns(x, weight, bias).T


def activated(x, weight, bias):
    return products.linear(x, weight, bias, silu=True)


def plainly_activated(x, weight, bias):
    return torch.nn.functional.silu(torch.nn.functional.linear(x, weight, bias))


#: A way of ours beside torch's own.
PAIRS = [
    pytest.param(products.linear, torch.nn.functional.linear, id="linear"),
    pytest.param(transposed, torch.nn.functional.linear, id="transposed"),
    pytest.param(activated, plainly_activated, id="activated"),
]


def largest_difference(a, b):
    return max(float(((p - q).abs().max() / (1.0 + q.abs().max())).detach()) for p, q in zip(a, b))


@pytest.mark.parametrize(("function", "plain"), PAIRS)
def test_value_and_derivatives(way, function, plain):
    inputs = numbers()
    ours, theirs = (f(*inputs) for f in (function, plain))
    assert largest_difference([ours], [theirs]) < 1e-4
    seed = torch.randn_like(theirs)
    first = [torch.autograd.grad((y.sin() * seed).sum(), inputs, create_graph=True) for y in (ours, theirs)]
    assert largest_difference(*first) < 1e-4
    second = [torch.autograd.grad(sum(g.square().sum() for g in grads), inputs) for grads in first]
    assert largest_difference(*second) < 1e-3


@pytest.mark.parametrize(("function", "plain"), PAIRS)
def test_without_derivatives(way, function, plain):
    """What may then take oneDNN's own call, activation and all, is the same."""
    inputs = numbers()
    with torch.no_grad():
        quick = function(*inputs)
    assert largest_difference([quick], [plain(*inputs)]) < 1e-5


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize(("function", "plain"), PAIRS)
def test_forwards_derivative_and_batches_of_calls(way, function, plain, recording):
    x, weight, bias = (t.detach() for t in numbers())
    tangents = tuple(torch.randn_like(t) for t in (x, weight, bias))
    both = function, plain
    with torch.set_grad_enabled(recording):
        assert largest_difference(*([torch.func.jvp(f, (x, weight, bias), tangents)[1]] for f in both)) < 1e-4
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangents[0])
            found = ([torch.autograd.forward_ad.unpack_dual(f(dual, weight, bias)).tangent] for f in both)
            assert largest_difference(*found) < 1e-4
    many = torch.stack([x, 2 * x])
    assert largest_difference(*([torch.func.vmap(lambda u, f=f: f(u, weight, bias))(many)] for f in both)) < 1e-4


def test_leading_axes_and_rows_that_do_not_lie_side_by_side(way):
    x, weight, bias = (t.detach() for t in numbers())
    cube = x.view(30, 10, 70)
    assert largest_difference(
        [products.linear(cube, weight, bias)], [torch.nn.functional.linear(cube, weight, bias)]
    ) < 1e-4
    skewed = x.T.contiguous().T
    assert largest_difference([products.linear(skewed, weight)], [skewed @ weight.T]) < 1e-4
    one = [torch.randn(1, 70), torch.randn(5, 70), torch.randn(5)]
    assert products.columns(*one).shape == (5, 1)


def test_networks_and_divergences_do_not_depend_on_the_way(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    network = ResidualMLP(20, 60, hidden=64, depth=2, zero_init=False)
    field = VectorField(torch.arange(6) > 3, hidden=32, depth=1)
    torch.nn.init.normal_(field.network.head.weight)
    x, t = torch.randn(200, 20), torch.rand(200)
    found = []
    for quick in (True, False):
        monkeypatch.setattr(products, "onednn_is_quicker", lambda quick=quick: quick)
        monkeypatch.setattr(products, "LEAST_WORK", 1)
        network.zero_grad()
        y = network(x)
        parts = network.columns(x, [40, 20])
        y.square().mean().backward()
        exact = divergence(field, t, x[:, :6], None)
        found.append([y, *parts, *(p.grad.clone() for p in network.parameters()), *exact])
    assert largest_difference(*found) < 1e-4


def test_what_stays_with_torch(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_quicker", lambda: True)
    large, weight = torch.randn(1024, 64), torch.randn(64, 64)
    assert products._worth_it(large, weight, 1024)
    assert not products._worth_it(large[:4], weight, 4)
    assert not products._worth_it(large.double(), weight.double(), 1024)
    with torch.autocast("cpu", torch.bfloat16):
        assert not products._worth_it(large, weight, 1024)
        assert products.linear(large, weight).dtype == torch.bfloat16


WAYS = ["oneDNN"] * torch.cpu._is_avx512_bf16_supported() + ["AMX"] * torch.cpu._is_amx_tile_supported()


@pytest.mark.skipif(not WAYS, reason="this processor does not multiply bfloat16")
@pytest.mark.parametrize("way", WAYS)
def test_coarse_gradients_are_gradients(monkeypatch, way):
    """Values are untouched and gradients off by thousandths; outside, and where oneDNN is differentiated twice, not."""
    monkeypatch.setattr(products, "onednn_is_quicker", lambda: way == "oneDNN")
    monkeypatch.setattr(products, "rounding", lambda: way)
    torch.manual_seed(0)
    network = ResidualMLP(40, 300, hidden=64, depth=2, zero_init=False)
    x, target = torch.randn(2, 1000, 300)
    weights = list(network.parameters())

    def gradient(coarse, rows=slice(None), twice=False):
        loss = (torch.cat(network.columns(x[rows, :40], [100, 200])).T - target[rows]).square().mean()
        with products.coarse_gradients(coarse):
            found = torch.autograd.grad(loss, weights, create_graph=twice)
        return loss.detach(), torch.cat([g.flatten() for g in found]).detach()

    (value, exact), (same, coarse) = gradient(False), gradient(True)
    assert torch.equal(value, same)
    error = float((coarse - exact).norm() / exact.norm())
    assert 1e-5 < error < 0.01, error  # eight bits of mantissa in each factor
    halves = [gradient(False, rows)[1] for rows in (slice(0, 500), slice(500, 1000))]
    assert error < 0.05 * float((halves[0] - halves[1]).norm() / exact.norm())  # what one batch differs from another
    if way == "oneDNN":
        assert float((gradient(True, twice=True)[1] - exact).norm() / exact.norm()) < 1e-5
    with pytest.raises(RuntimeError), products.coarse_gradients():
        raise RuntimeError
    assert float((gradient(False)[1] - exact).norm()) == 0.0  # and outside it is off again
