"""Coupling layers: a part of the vector is transformed, element by element, given the rest.

Dinh et al. 2017 (RealNVP), Durkan et al. 2019 (rational-quadratic splines), Rezende et al. 2020 (circles).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from openmm_regflow.bijections.base import Bijection
from openmm_regflow.bijections.splines import bins, rational_quadratic, slopes
from openmm_regflow.errors import InputError

#: Bin widths `(K, n, moved)`, bin heights likewise, knot derivatives `(K + 1, n, moved)`.
Knots = tuple[Tensor, Tensor, Tensor]
#: Largest |log scale| of one affine step; tanh-bounded so that no layer can explode.
MAX_LOG_SCALE = 2.0


def wrap(angle: Tensor) -> Tensor:
    """Angles [rad] folded into [-pi, pi)."""
    return torch.remainder(angle + math.pi, 2.0 * math.pi) - math.pi


def bounded_log_scale(raw: Tensor) -> Tensor:
    """A log-scale in (-MAX_LOG_SCALE, MAX_LOG_SCALE), the identity near zero."""
    return MAX_LOG_SCALE * torch.tanh(raw / MAX_LOG_SCALE)


class Coupling(Bijection):
    """What all couplings share: the split, the embedding of circles, the merge.

    Args:
        mask: `(dim,)` bool, True where the element is transformed.
        circular: `(dim,)` bool, True where the element is an angle in [-pi, pi).
        n_parameters: parameters per transformed element.
        network: builds the conditioner from (features in, features out).

    Raises:
        InputError: the mask transforms nothing or everything.
    """

    moved_linear: Tensor
    moved_circular: Tensor
    kept_linear: Tensor
    kept_circular: Tensor
    moved: Tensor
    unsort: Tensor
    kept: Tensor

    def __init__(
        self, mask: Tensor, circular: Tensor, n_parameters: int, network: Callable[[int, int], nn.Module]
    ) -> None:
        super().__init__()
        if not bool(mask.any()) or bool(mask.all()):
            raise InputError(
                f"a coupling mask of {int(mask.sum())} among {mask.numel()} elements leaves nothing to transform or "
                "nothing to condition on; couplings need at least two elements"
            )
        everything = torch.arange(mask.numel())
        # Linear elements first, circular ones last: each kind is then one slice.
        self.register_buffer("moved_linear", everything[mask & ~circular], persistent=False)
        self.register_buffer("moved_circular", everything[mask & circular], persistent=False)
        self.register_buffer("kept_linear", everything[~mask & ~circular], persistent=False)
        self.register_buffer("kept_circular", everything[~mask & circular], persistent=False)
        self.register_buffer("moved", everything[mask], persistent=False)
        order = torch.cat([self.moved_linear, self.moved_circular, everything[~mask]])
        self.register_buffer("unsort", torch.argsort(order), persistent=False)
        self.register_buffer("kept", everything[~mask], persistent=False)
        self.n_linear = int((mask & ~circular).sum())
        self.n_circular = int((mask & circular).sum())
        self.n_parameters = n_parameters
        n_in = self.kept_linear.numel() + 2 * self.kept_circular.numel()
        self.network = network(n_in, (self.n_linear + self.n_circular) * n_parameters)

    def parameters_for(self, v: Tensor) -> Tensor:
        """Conditioner output `(n_parameters, n, moved)` for vectors `(n, dim)`."""
        angles = v[:, self.kept_circular]
        features = torch.cat([v[:, self.kept_linear], angles.cos(), angles.sin()], dim=-1)
        return self.network(features).view(v.shape[0], self.n_parameters, -1).transpose(0, 1)

    def merge(self, linear: Tensor, circular: Tensor, v: Tensor) -> Tensor:
        """Put transformed elements and the untouched ones of `v` back into their order."""
        return torch.cat([linear, circular, v[:, self.kept]], dim=-1)[:, self.unsort]


class AffineCoupling(Coupling):
    """``y = z exp(s) + t`` on linear elements, a rotation ``y = z + t`` on circular ones.

    Args:
        mask: `(dim,)` bool, True where transformed.
        circular: `(dim,)` bool.
        network: builds the conditioner from (features in, features out).
    """

    def __init__(self, mask: Tensor, circular: Tensor, network: Callable[[int, int], nn.Module]) -> None:
        super().__init__(mask, circular, 2, network)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Noise to data."""
        p = self.parameters_for(z)
        shift, log_scale = p[0], bounded_log_scale(p[1, :, : self.n_linear])
        linear = z[:, self.moved_linear] * log_scale.exp() + shift[:, : self.n_linear]
        circular = wrap(z[:, self.moved_circular] + shift[:, self.n_linear :])
        return self.merge(linear, circular, z), log_scale.sum(-1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise."""
        p = self.parameters_for(y)
        shift, log_scale = p[0], bounded_log_scale(p[1, :, : self.n_linear])
        linear = (y[:, self.moved_linear] - shift[:, : self.n_linear]) * (-log_scale).exp()
        circular = wrap(y[:, self.moved_circular] - shift[:, self.n_linear :])
        return self.merge(linear, circular, y), -log_scale.sum(-1)


class SplineCoupling(Coupling):
    """Rational-quadratic spline, then a conditional shift (and, on linear elements, a scale).

    Linear elements: spline on [-bound, bound], identity outside, then ``exp(s) · + t``. Circular elements: a
    periodic spline on [-pi, pi), then a rotation. The affine step lets conditional means move without
    spending bins on them.

    Args:
        mask: `(dim,)` bool, True where transformed.
        circular: `(dim,)` bool.
        network: builds the conditioner from (features in, features out).
        n_bins: spline bins K.
        bound: half-width of the spline's domain on linear elements, in units of the (whitened) coordinate.
    """

    def __init__(
        self,
        mask: Tensor,
        circular: Tensor,
        network: Callable[[int, int], nn.Module],
        n_bins: int = 8,
        bound: float = 5.0,
    ) -> None:
        # K widths, K heights, K derivatives on circles; K - 1 inner derivatives and a log-scale on lines; a shift.
        super().__init__(mask, circular, 3 * n_bins + 1, network)
        self.n_bins = n_bins
        self.bound = bound

    def parameters_of(self, v: Tensor) -> tuple[Knots, Tensor, Tensor]:
        """Knots of the spline, shift `(n, moved)` and log-scale `(n, linear)`."""
        # One split of one contiguous array: its backward is one concatenation, where a slice would fill zeros.
        k = self.n_bins
        widths, heights, first, inner, shift = self.parameters_for(v).contiguous().split([k, k, 1, k - 1, 1])
        # On a line the ends have slope one, to meet the identity outside, and their place holds a log-scale; on a
        # circle the two ends are one knot.
        log_scale, end = first.split([self.n_linear, self.n_circular], dim=2)
        ends = torch.cat([torch.ones_like(log_scale), slopes(end)], dim=2)
        derivatives = torch.cat([ends, slopes(inner), ends])
        knots = bins(widths), bins(heights), derivatives
        return knots, shift.squeeze(0), bounded_log_scale(log_scale.squeeze(0))

    def spline(self, v: Tensor, knots: Knots, inverse: bool) -> tuple[Tensor, Tensor]:
        """The spline alone on moved elements `(n, moved)`, with its log-derivative `(n, moved)`."""
        # Made in the precision of v: a pi rounded to float32 would leave a seam on every circle.
        half = torch.cat([v.new_full((self.n_linear,), self.bound), v.new_full((self.n_circular,), math.pi)])
        value, log_slope = rational_quadratic((v / half + 1.0) / 2.0, *knots, inverse=inverse)
        value = (2.0 * value - 1.0) * half
        outside = v.abs() >= half
        return torch.where(outside, v, value), torch.where(outside, torch.zeros_like(v), log_slope)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Noise to data."""
        knots, shift, log_scale = self.parameters_of(z)
        moved = torch.cat([z[:, self.moved_linear], wrap(z[:, self.moved_circular])], dim=-1)
        value, log_slope = self.spline(moved, knots, inverse=False)
        linear = value[:, : self.n_linear] * log_scale.exp() + shift[:, : self.n_linear]
        circular = wrap(value[:, self.n_linear :] + shift[:, self.n_linear :])
        return self.merge(linear, circular, z), log_slope.sum(-1) + log_scale.sum(-1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise."""
        knots, shift, log_scale = self.parameters_of(y)
        linear = (y[:, self.moved_linear] - shift[:, : self.n_linear]) * (-log_scale).exp()
        circular = wrap(y[:, self.moved_circular] - shift[:, self.n_linear :])
        value, log_slope = self.spline(torch.cat([linear, circular], dim=-1), knots, inverse=True)
        merged = self.merge(value[:, : self.n_linear], value[:, self.n_linear :], y)
        return merged, log_slope.sum(-1) - log_scale.sum(-1)
