"""Coupling layers: a part of the vector is transformed, element by element, given the rest.

Dinh et al. 2017 (RealNVP), Durkan et al. 2019 (rational-quadratic splines), Rezende et al. 2020 (circles).

Inside a coupling the samples run along the last axis: what the conditioner gives for one parameter of one element is a
contiguous row.

The conditioner works in the precision of its weights, everything else in that of the vector. A flow with float32
weights that is given float64 vectors has its matrix products in float32 and yet an inverse without float32's rounding:
both directions see the same parameters.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from openmm_regflow.bijections import fused
from openmm_regflow.bijections.base import Bijection
from openmm_regflow.bijections.splines import spline
from openmm_regflow.errors import InputError
from openmm_regflow.networks import Conditioner

#: Largest |log scale| of one affine step; tanh-bounded so that no layer can explode.
MAX_LOG_SCALE = 2.0


def wrap(angle: Tensor) -> Tensor:
    """Angles [rad] folded into [-pi, pi)."""
    if not angle.numel():
        return angle
    return torch.remainder(angle + math.pi, 2.0 * math.pi) - math.pi


def bounded_log_scale(raw: Tensor) -> Tensor:
    """A log-scale in (-MAX_LOG_SCALE, MAX_LOG_SCALE), the identity near zero: ``m tanh(raw / m)``."""
    # tanh(x) = 2 sigmoid(2 x) - 1, whose kernel is five times as quick
    return 2.0 * MAX_LOG_SCALE * torch.sigmoid(raw * (2.0 / MAX_LOG_SCALE)) - MAX_LOG_SCALE


class Coupling(Bijection):
    """What all couplings share: the split, the embedding of circles, the merge.

    Args:
        mask: `(dim,)` bool, True where the element is transformed.
        circular: `(dim,)` bool, True where the element is an angle in [-pi, pi).
        per_line: parameters of a transformed linear element: rows of each of the tensors that `parameters_for` returns.
        per_circle: the same for a circular element.
        network: builds the conditioner from (features in, features out).
        harmonics: an untouched angle is given to the conditioner as its cosine and sine, and those of its multiples up
            to this one.

    Raises:
        InputError: the mask transforms nothing or everything.
    """

    order: Tensor
    unsort: Tensor

    def __init__(
        self,
        mask: Tensor,
        circular: Tensor,
        per_line: tuple[int, ...],
        per_circle: tuple[int, ...],
        network: Callable[[int, int], Conditioner],
        harmonics: int = 1,
    ) -> None:
        super().__init__()
        if not bool(mask.any()) or bool(mask.all()):
            raise InputError(
                f"a coupling mask of {int(mask.sum())} among {mask.numel()} elements leaves nothing to transform or "
                "nothing to condition on; couplings need at least two elements"
            )
        # Each kind is one slice of the sorted vector.
        kinds = (mask & ~circular, mask & circular, ~mask & ~circular, ~mask & circular)
        order = torch.cat([torch.nonzero(kind)[:, 0] for kind in kinds])
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("unsort", torch.argsort(order), persistent=False)
        self.parts = [int(kind.sum()) for kind in kinds]
        n_linear, n_circular, kept_linear, kept_circular = self.parts
        self.shapes = [(k, n_linear) for k in per_line] + [(k, n_circular) for k in per_circle]
        self.sizes = [rows * elements for rows, elements in self.shapes]
        self.harmonics = harmonics
        self.network = network(kept_linear + 2 * harmonics * kept_circular, sum(self.sizes))

    @property
    def moved(self) -> Tensor:
        """Which elements are transformed, lines before circles."""
        return self.order[: self.parts[0] + self.parts[1]]

    def split(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Sort `z` `(n, dim)`, and ask the conditioner.

        Returns:
            transformed lines and circles, all untouched elements, each `(elements, n)`; and parameters
            `(rows, elements, n)`, lines first.
        """
        v = z.T.index_select(0, self.order)
        linear, circular, kept_linear, angles = v.split(self.parts)
        features = kept_linear
        if len(angles):
            multiples = angles if self.harmonics == 1 else torch.cat([k * angles for k in range(1, self.harmonics + 1)])
            features = torch.cat([kept_linear, multiples.cos(), multiples.sin()])
        parts = self.network.columns(features.T.to(self.network.dtype), self.sizes)
        parameters = [part.reshape(*shape, v.shape[1]) for part, shape in zip(parts, self.shapes)]
        return linear, circular, v[len(linear) + len(circular) :], parameters

    def merge(self, linear: Tensor, circular: Tensor, kept: Tensor) -> Tensor:
        """Put transformed and untouched elements, each `(elements, n)`, back into their order, `(n, dim)`."""
        return torch.cat([linear, circular, kept]).index_select(0, self.unsort).T


class AffineCoupling(Coupling):
    """``y = z exp(s) + t`` on linear elements, a rotation ``y = z + t`` on circular ones.

    Args:
        mask: `(dim,)` bool, True where transformed.
        circular: `(dim,)` bool.
        network: builds the conditioner from (features in, features out).
    """

    def __init__(self, mask: Tensor, circular: Tensor, network: Callable[[int, int], Conditioner]) -> None:
        super().__init__(mask, circular, (1, 1), (1,), network)

    @staticmethod
    def places(mask: Tensor, circular: Tensor) -> list[tuple[int, int]]:
        """Which transformed element each parameter belongs to, lines before circles, and which of its own it is.

        For conditioners that work element by element: shifts of lines, their scales, rotations of circles.
        """
        n, m = int((mask & ~circular).sum()), int((mask & circular).sum())
        return [*((i, 0) for i in range(n)), *((i, 1) for i in range(n)), *((n + i, 0) for i in range(m))]

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Noise to data."""
        linear, circular, kept, ((shift,), (raw_scale,), (turn,)) = self.split(z)
        log_scale = bounded_log_scale(raw_scale).to(z.dtype)
        merged = self.merge(linear * log_scale.exp() + shift, wrap(circular + turn), kept)
        return merged, log_scale.sum(0)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise."""
        linear, circular, kept, ((shift,), (raw_scale,), (turn,)) = self.split(y)
        minus = -bounded_log_scale(raw_scale).to(y.dtype)
        return self.merge((linear - shift) * minus.exp(), wrap(circular - turn), kept), minus.sum(0)


class SplineCoupling(Coupling):
    """Rational-quadratic spline, then a conditional shift (and, on linear elements, a scale).

    Linear elements: spline on [-bound, bound], identity outside, then ``exp(s) · + t``. Circular elements: a
    periodic spline on [-pi, pi), then a rotation. The affine step lets conditional means move without
    spending bins on them.

    Args:
        mask: `(dim,)` bool, True where transformed.
        circular: `(dim,)` bool.
        network: builds the conditioner from (features in, features out).
        n_bins: spline bins K of circular elements, and of linear ones unless `line_bins` says otherwise.
        bound: half-width of the spline's domain on linear elements, in units of the (whitened) coordinate.
        line_bins: spline bins of linear elements; 0 for the shift and the scale alone.
        harmonics: of untouched angles, see `Coupling`.

    Attributes:
        compiled: evaluate splines by `fused.spline` (``Flow.fuse``); no part of the flow's description.
    """

    def __init__(
        self,
        mask: Tensor,
        circular: Tensor,
        network: Callable[[int, int], Conditioner],
        n_bins: int = 8,
        bound: float = 5.0,
        line_bins: int | None = None,
        harmonics: int = 1,
    ) -> None:
        # K widths, K heights, K - 1 inner derivatives; then a shift and a log-scale on lines, where the ends have slope
        # one to meet the identity outside, or a shift and the derivative at the seam on circles.
        on_lines, on_circles = (
            (max(3 * k - 1, 0), 1, 1) for k in (n_bins if line_bins is None else line_bins, n_bins)
        )
        super().__init__(mask, circular, on_lines, on_circles, network, harmonics)
        self.bound = bound
        self.compiled = False

    def _spline(self, raw: Tensor, ends: Tensor, v: Tensor, half: float, inverse: bool) -> tuple[Tensor, Tensor]:
        if not v.numel():  # no element of this kind
            return v, v
        if not raw.numel():  # no bins
            return v, torch.zeros_like(v)
        one = fused.spline if self.compiled and fused.usable(v) else spline
        return one(raw, ends, v, half, inverse)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Noise to data."""
        linear, circular, kept, (lines, (shift,), (raw_scale,), circles, (turn,), (seam,)) = self.split(z)
        log_scale = bounded_log_scale(raw_scale).to(z.dtype)
        x, log_slope = self._spline(lines, torch.zeros_like(log_scale), linear, self.bound, False)
        angle, log_turn = self._spline(circles, seam, wrap(circular), math.pi, False)
        merged = self.merge(x * log_scale.exp() + shift, wrap(angle + turn), kept)
        return merged, (log_slope + log_scale).sum(0) + log_turn.sum(0)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise."""
        linear, circular, kept, (lines, (shift,), (raw_scale,), circles, (turn,), (seam,)) = self.split(y)
        log_scale = bounded_log_scale(raw_scale).to(y.dtype)
        x = (linear - shift) * (-log_scale).exp()
        x, log_slope = self._spline(lines, torch.zeros_like(log_scale), x, self.bound, True)
        angle, log_turn = self._spline(circles, seam, wrap(circular - turn), math.pi, True)
        return self.merge(x, angle, kept), (log_slope - log_scale).sum(0) + log_turn.sum(0)
