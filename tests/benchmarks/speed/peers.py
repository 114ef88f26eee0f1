"""Flows of equal size by this package and by others: eight couplings of 66 dimensions, conditioners of two times 256.

A contestant is (module, sample, density): `sample(n)` draws with log-densities, `density(y)` is the log-density of
given data, `module` holds what a training step differentiates (None where torch has nothing to differentiate). The
other libraries' conditioners have ReLU where this package has SiLU, which costs eight times as much: there is a row for
this package's couplings with theirs. bgflow's affine coupling has a network
for shifts and another one for scales; its splines live on the unit cube, and their kernel is that of nflows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from openmm_regflow.bijections import AffineCoupling, Composition, SplineCoupling
from openmm_regflow.flows import alternating_masks
from openmm_regflow.networks import MLP, ResidualMLP, TokenTransformer
from openmm_regflow.priors import Prior
from openmm_regflow.products import linear

DIM, LAYERS, HIDDEN, BINS, BATCH, BOUND = 66, 8, 256, 8, 1024, 5.0
TOKEN_WIDTH = 64
Contestant = tuple[nn.Module | None, Callable[[int], Any], Callable[[torch.Tensor], Any]]


class ReluMLP(MLP):
    """The conditioner that the other libraries have."""

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.body[::2]:
            x = nn.functional.relu(linear(x, layer.weight, layer.bias), inplace=not torch.is_grad_enabled())
        return x


def ours(architecture: str = "spline", compiled: bool = False, relu: bool = False) -> Contestant:
    """This package's couplings; `compiled` fuses the splines (``Flow.fuse``), `relu` exchanges the activation."""
    lines = torch.zeros(DIM, dtype=torch.bool)
    masks = alternating_masks(lines, LAYERS, 0)
    network = {
        "real_nvp": partial(ReluMLP if relu else MLP, hidden=HIDDEN, depth=2),
        "res_nvp": partial(ResidualMLP, hidden=HIDDEN, depth=2),
        "spline": partial(MLP, hidden=HIDDEN, depth=2),
        "jet": partial(TokenTransformer, token_size=3, hidden=TOKEN_WIDTH, depth=2),
    }[architecture]
    if architecture == "jet":  # whole atoms are the tokens
        masks = [m[: DIM // 3].repeat_interleave(3) for m in masks]
    if architecture == "spline":
        flow = Composition([SplineCoupling(m, lines, network, BINS, BOUND) for m in masks])
        for layer in flow.parts:
            layer.compiled = compiled
    else:
        flow = Composition([AffineCoupling(m, lines, network) for m in masks])
    prior = Prior(lines)

    def sample(n: int) -> Any:
        z = prior.sample(n)
        y, log_det = flow(z)
        return y, prior.log_prob(z) - log_det

    def density(y: torch.Tensor) -> Any:
        z, log_det = flow.inverse(y)
        return prior.log_prob(z) + log_det

    return flow, sample, density


def products(architecture: str, by_torch: bool = False) -> Contestant:
    """The matrix products of our conditioners alone, biases included: what no flow of this size can undercut.

    They are made as the package makes them, or `by_torch`, which means MKL on a CPU.
    """
    multiply = nn.functional.linear if by_torch else linear
    flow, _, _ = ours(architecture)
    steps: list[Callable[[], Any]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, given, out: steps.append(_repeat(layer, given[0], multiply)))
        for layer in flow.modules()
        if isinstance(layer, nn.Linear)
    ]
    for coupling in flow.parts:
        kept = DIM - len(coupling.moved)
        coupling.network(torch.randn(BATCH, kept))
        if architecture == "jet":
            steps += _attention(2 * coupling.network.n_known) * len(coupling.network.blocks)
    for hook in hooks:
        hook.remove()

    def run(_: Any) -> torch.Tensor:
        return torch.stack([step().sum() for step in steps]).sum() if torch.is_grad_enabled() else _each(steps)

    return flow, run, run


def _repeat(layer: nn.Module, given: torch.Tensor, multiply: Callable[..., Any]) -> Callable[[], torch.Tensor]:
    """A layer's product on numbers like those it was given."""
    x = torch.randn_like(given, requires_grad=True)
    return lambda: multiply(x, layer.weight, layer.bias)


def _attention(tokens: int, heads: int = 4) -> list[Callable[[], torch.Tensor]]:
    """The two batched products of one attention block."""
    q = torch.randn(BATCH, heads, tokens, TOKEN_WIDTH // heads, requires_grad=True)
    k = torch.randn(BATCH, heads, TOKEN_WIDTH // heads, tokens, requires_grad=True)
    mixing = torch.randn(BATCH, heads, tokens, tokens, requires_grad=True)
    return [lambda: q @ k, lambda: mixing @ q]


def _each(steps: list[Callable[[], torch.Tensor]]) -> torch.Tensor:
    for step in steps:
        out = step()
    return out


class Plain(nn.Sequential):
    """A network that ignores the context which nflows gives it."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(
            nn.Linear(n_in, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, n_out)
        )

    def forward(self, x: torch.Tensor, context: Any = None) -> torch.Tensor:
        return super().forward(x)


def zuko(architecture: str) -> Contestant:
    """zuko: masked autoregressive flows in two passes, which are couplings."""
    import zuko as library

    made = {"features": DIM, "transforms": LAYERS, "hidden_features": (HIDDEN, HIDDEN), "passes": 2}
    if architecture == "spline":
        flow = library.flows.NSF(bins=BINS, **made)
    elif architecture == "real_nvp":
        flow = library.flows.MAF(**made)
    else:
        flow = library.flows.MAF(residual=True, **made | {"hidden_features": (HIDDEN,) * 4})
    return flow, lambda n: flow().rsample_and_log_prob((n,)), lambda y: flow().log_prob(y)


def nflows(architecture: str) -> Contestant:
    """nflows: affine or spline couplings."""
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import (
        AffineCouplingTransform,
        CompositeTransform,
        PiecewiseRationalQuadraticCouplingTransform,
    )

    network = partial(ResidualNet, hidden_features=HIDDEN, num_blocks=2) if architecture == "res_nvp" else Plain
    masks = [m.int() for m in alternating_masks(torch.zeros(DIM, dtype=torch.bool), LAYERS, 0)]
    if architecture == "spline":
        kind = partial(PiecewiseRationalQuadraticCouplingTransform, num_bins=BINS, tails="linear", tail_bound=BOUND)
    else:
        kind = AffineCouplingTransform
    flow = Flow(CompositeTransform([kind(m, network) for m in masks]), StandardNormal([DIM]))
    return flow, flow.sample_and_log_prob, flow.log_prob


def normflows(architecture: str) -> Contestant:
    """normflows: affine or spline couplings; the conditioner of its splines is one residual block."""
    import normflows as library

    layers: list[Any] = []
    for k in range(LAYERS):
        if architecture == "spline":
            layer = library.flows.CoupledRationalQuadraticSpline
            layers.append(layer(DIM, 1, HIDDEN, num_bins=BINS, tail_bound=BOUND, reverse_mask=bool(k % 2)))
        else:
            network = library.nets.MLP([DIM // 2, HIDDEN, HIDDEN, DIM], init_zeros=True)
            layers += [library.flows.AffineCouplingBlock(network), library.flows.Permute(DIM, mode="swap")]
    flow = library.NormalizingFlow(library.distributions.DiagGaussian(DIM, trainable=False), layers)
    return flow, flow.sample, flow.log_prob


def bgflow(architecture: str) -> Contestant:
    """bgflow (from its repository; not on a package index): couplings of two halves."""
    import bgflow as library

    half, spline = DIM // 2, architecture == "spline"
    layers: list[Any] = [library.SplitFlow(half)]
    for _ in range(LAYERS):
        if spline:
            transformer = library.ConditionalSplineTransformer(Plain(half, half * (3 * BINS + 1)))
        else:
            transformer = library.AffineTransformer(Plain(half, half), Plain(half, half))
        layers += [library.CouplingFlow(transformer), library.SwapFlow()]
    flow = library.SequentialFlow([*layers, library.MergeFlow(half)])
    normal = Prior(torch.zeros(DIM, dtype=torch.bool))

    def prior(n: int) -> torch.Tensor:
        return torch.rand(n, DIM) if spline else normal.sample(n)

    def log_prior(z: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(z)) if spline else normal.log_prob(z)

    def sample(n: int) -> Any:
        z = prior(n)
        y, log_det = flow(z)
        return y, log_prior(z) - log_det[:, 0]

    def density(y: torch.Tensor) -> Any:
        z, log_det = flow(y.sigmoid() if spline else y, inverse=True)  # any data inside the cube will do
        return log_prior(z) + log_det[:, 0]

    return flow, sample, density


def flowjax(architecture: str) -> Contestant:
    """flowjax: couplings, compiled by jax; the training step is jax's own, so no torch module."""
    import equinox
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow

    spline = RationalQuadraticSpline(knots=BINS, interval=BOUND) if architecture == "spline" else None
    flows = {
        forward: coupling_flow(
            jax.random.key(0), base_dist=Normal(jnp.zeros(DIM)), transformer=spline, flow_layers=LAYERS,
            nn_width=HIDDEN, nn_depth=2, invert=not forward,
        )
        for forward in (True, False)
    }  # fmt: skip
    draw = equinox.filter_jit(lambda flow, key, n: flow.sample_and_log_prob(key, (n,)))
    score = equinox.filter_jit(lambda flow, y: flow.log_prob(y))
    slope = equinox.filter_jit(equinox.filter_grad(lambda flow, y: -flow.log_prob(y).mean()))
    key, held = jax.random.key(1), {}

    def sample(n: int) -> Any:
        return jax.block_until_ready(draw(flows[True], key, n))

    def density(y: torch.Tensor) -> Any:
        given = held.setdefault(len(y), jnp.asarray(np.asarray(y.detach())))
        if torch.is_grad_enabled():  # asked by a training step
            return jax.block_until_ready(equinox.filter(slope(flows[False], given), equinox.is_array))
        return jax.block_until_ready(score(flows[False], given))

    return None, sample, density


CONTESTANTS: dict[str, Callable[[str], Contestant]] = {
    "this package": ours,
    "this package, fused": partial(ours, compiled=True),
    "this package, mixed": ours,  # in training only: `architectures.calls_of`
    "this package, fused, mixed": partial(ours, compiled=True),
    "this package, ReLU": partial(ours, relu=True),
    "matrix products alone": products,
    "the same by torch's default": partial(products, by_torch=True),
    "nflows": nflows,
    "zuko": zuko,
    "normflows": normflows,
    "bgflow": bgflow,
    "flowjax": flowjax,
}
OWN = ("this package", "this package, mixed", "matrix products alone", "the same by torch's default")
#: Which libraries have an architecture; nobody else has transformers in couplings.
ENTRIES = {
    "real_nvp": tuple(name for name in CONTESTANTS if "fused" not in name),
    "res_nvp": (*OWN, "nflows", "zuko"),
    "spline": tuple(name for name in CONTESTANTS if name not in ("this package, ReLU", "this package, mixed")),
    "jet": OWN,
}


def installed(name: str, architecture: str) -> Contestant | None:
    """A contestant, or None where its library is missing."""
    try:
        return CONTESTANTS[name](architecture)
    except ImportError:
        return None
