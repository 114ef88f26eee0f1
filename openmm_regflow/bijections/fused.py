"""Rational-quadratic splines as two kernels, value and derivative, each one pass over memory once compiled.

The same map as `splines.spline`. Everything is written element by element, bins unrolled, so that ``torch.compile``
makes one vectorised loop of it; run eagerly it is slow. The derivative is written out: recorded automatically it
becomes a kernel several times larger. The inverse needs no derivative of its own: where y = f(x),
dx = (dy - df) / f'(x).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from openmm_regflow.bijections.splines import MIN_BIN, MIN_SLOPE, SLOPE_OFFSET
from openmm_regflow.compiling import WithFallback

Rows = list[Tensor]
#: Operations that the compiler may put into one loop on a CPU. Its default of 64 cuts the derivative in two, with 32
#: arrays written and read in between: four times the time. GPUs keep the default, since a thread has few registers.
FUSED: dict[str, Any] = {"max_fusion_size": 1024}


def spline(raw: Tensor, ends: Tensor, v: Tensor, half: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """`splines.spline` with ``(...)`` = `(m, n)`; once differentiable.

    Args:
        raw: `(3K - 1, m, n)`.
        ends: `(m, n)`.
        v: `(m, n)`.
        half: half-width of the domain.
        inverse: evaluate the inverse map.

    Returns:
        value and log-derivative, both `(m, n)`.
    """
    return _Spline.apply(raw, ends, v, half, inverse)


def usable(v: Tensor) -> bool:
    """Whether `v` `(m, n)` is worth a kernel: lengths of one would be compiled anew, and a compiler is needed."""
    return min(v.shape) > 1 and v.device.type not in _VALUE.failed | _DERIVATIVE.failed


class _Spline(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, raw: Tensor, ends: Tensor, v: Tensor, half: float, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        value, log_slope = _VALUE(raw, ends, v, half, inverse)
        ctx.save_for_backward(raw, ends, value if inverse else v)
        ctx.half, ctx.inverse = half, inverse
        return value, log_slope

    @staticmethod
    def backward(ctx: Any, g_value: Tensor, g_log_slope: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; what came out would silently count as a constant
            raise RuntimeError("fused splines have no second derivative; call flow.fuse(False) first")
        raw, ends, x = ctx.saved_tensors
        # That of a sum over elements is one row for all of them; as an array it makes the kernel one plain loop.
        g_value, g_log_slope = g_value.contiguous(), g_log_slope.contiguous()
        g_raw, g_ends, g_v = _DERIVATIVE(raw, ends, x, g_value, g_log_slope, ctx.half, ctx.inverse)
        return g_raw, g_ends, g_v, None, None


def _value(raw: Tensor, ends: Tensor, v: Tensor, half: float, inverse: bool) -> tuple[Tensor, Tensor]:
    u = _unit(v, half)
    widths, heights, knots, _ = _unpack(raw, ends)
    first, second = (heights, widths) if inverse else (widths, heights)
    (start, at, size, other), (left, right), _ = _bin(first, second, knots, u)
    x0, y0, w, h = (at, start, other, size) if inverse else (start, at, size, other)
    # Knots in the precision of the parameters, what lies between them in that of the vector.
    w, h, d0, d1 = (t.to(v.dtype) for t in (w, h, _slope(left), _slope(right)))
    s = h / w
    curvature = d0 + d1 - 2.0 * s
    if inverse:
        dy = u - y0
        a, b, c = h * (s - d0) + dy * curvature, h * d0 - dy * curvature, -s * dy
        xi = (2.0 * c / (-b - (b * b - 4.0 * a * c).clamp_min(0.0).sqrt())).clamp(0.0, 1.0)
    else:
        xi = ((u - x0) / w).clamp(0.0, 1.0)
    rest = 1.0 - xi
    q = xi * rest
    below = s + curvature * q
    log_slope = (s * s * (d1 * xi * xi + 2.0 * s * q + d0 * rest * rest) / (below * below)).log()
    value = x0 + xi * w if inverse else y0 + h * (s * xi * xi + d0 * q) / below
    outside = v.abs() > half
    return (
        torch.where(outside, v, (2.0 * value - 1.0) * half),
        torch.where(outside, torch.zeros_like(v), -log_slope if inverse else log_slope),
    )


def _derivative(
    raw: Tensor, ends: Tensor, x: Tensor, g_value: Tensor, g_log_slope: Tensor, half: float, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of raw, ends and v from those of value and log-derivative; ``x`` lies on the side of the widths."""
    widths, heights, knots, shares = _unpack(raw, ends)
    (x0, _, w, h), (left, right), passed = _bin(widths, heights, knots, _unit(x, half))
    w, h, d0, d1 = (t.to(x.dtype) for t in (w, h, _slope(left), _slope(right)))
    s = h / w
    curvature = d0 + d1 - 2.0 * s
    xi = ((_unit(x, half) - x0) / w).clamp(0.0, 1.0)
    rest = 1.0 - xi
    q, tilt = xi * rest, 1.0 - 2.0 * xi
    # value = y0 + h above / below, slope = s^2 top / below^2
    above, below = s * xi * xi + d0 * q, s + curvature * q
    top = d1 * xi * xi + 2.0 * s * q + d0 * rest * rest
    i_below, i_top, i_w = 1.0 / below, 1.0 / top, 1.0 / w
    log_slope_xi = 2.0 * (d1 * xi + s * tilt - d0 * rest) * i_top - 2.0 * curvature * tilt * i_below
    outside = x.abs() > half
    none = torch.zeros_like(x)
    g, g_log = torch.where(outside, none, g_value * (2.0 * half)), torch.where(outside, none, g_log_slope)
    slope = s * s * top * i_below * i_below
    if inverse:  # of the map whose inverse this is, at the same point
        g_log = -g_log
        g = -(g + g_log * log_slope_xi * i_w) / slope
    at_xi = g * slope * w + g_log * log_slope_xi
    g_h = g * h * i_below * i_below
    at_s = g_h * (xi * xi * below - above * (1.0 - 2.0 * q)) + g_log * 2.0 * (
        1.0 / s + q * i_top - (1.0 - 2.0 * q) * i_below
    )
    at_d0 = g_h * q * (below - above) + g_log * (rest * rest * i_top - 2.0 * q * i_below)
    at_d1 = -g_h * above * q + g_log * (xi * xi * i_top - 2.0 * q * i_below)
    of_widths = _shared(shares[0], passed, before=-at_xi * i_w, at=-(at_s * s + at_xi * xi) * i_w)
    of_heights = _shared(shares[1], passed, before=g, at=g * above * i_below + at_s * i_w)
    rises = (torch.sigmoid(raw_slope + SLOPE_OFFSET) for raw_slope in (left, right))
    of_knots = _at_knots(passed, *(at * rise for at, rise in zip((at_d0, at_d1), rises)))
    g_v = (-g if inverse else at_xi * i_w) / (2.0 * half)
    g_raw = torch.stack([*of_widths, *of_heights, *of_knots[1:-1]])
    return g_raw, of_knots[0] + of_knots[-1], torch.where(outside, g_value, g_v)


def _unit(v: Tensor, half: float) -> Tensor:
    return ((v / half + 1.0) / 2.0).clamp(0.0, 1.0)


def _slope(raw: Tensor) -> Tensor:
    # softplus, in the form that the compiler vectorises
    raw = raw + SLOPE_OFFSET
    return MIN_SLOPE + raw.clamp_min(0.0) + torch.log1p(torch.exp(-raw.abs()))


def _unpack(raw: Tensor, ends: Tensor) -> tuple[Rows, Rows, Rows, tuple[Rows, Rows]]:
    """Widths, heights, raw derivatives of all knots, and the softmax shares behind widths and heights."""
    rows = raw.unbind(0)
    k = (len(rows) + 1) // 3
    shares = _softmax(rows[:k]), _softmax(rows[k : 2 * k])
    widths, heights = ([MIN_BIN / k + (1.0 - MIN_BIN) * p for p in share] for share in shares)
    return widths, heights, [ends, *rows[2 * k :], ends], shares


def _softmax(rows: Sequence[Tensor]) -> Rows:
    largest = rows[0]
    for row in rows[1:]:
        largest = torch.maximum(largest, row)
    powers = [(row - largest).exp() for row in rows]
    total = powers[0]
    for power in powers[1:]:
        total = total + power
    return [power / total for power in powers]


def _bin(first: Rows, second: Rows, knots: Rows, u: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor], Rows]:
    """The bin of ``first`` that holds u: its start, start in ``second``, sizes; raw derivatives; u >= each knot."""
    start = at = edge = other = torch.zeros_like(u)
    size, size_other, left, right = first[0], second[0], knots[0], knots[1]
    passed = []
    for k in range(1, len(first)):
        edge, other = edge + first[k - 1], other + second[k - 1]
        beyond = u >= edge
        passed.append(beyond)
        start, at = torch.where(beyond, edge, start), torch.where(beyond, other, at)
        size, size_other = torch.where(beyond, first[k], size), torch.where(beyond, second[k], size_other)
        left, right = torch.where(beyond, knots[k], left), torch.where(beyond, knots[k + 1], right)
    return (start, at, size, size_other), (left, right), passed


def _shared(shares: Rows, passed: Rows, before: Tensor, at: Tensor) -> Rows:
    """Gradient of the raw sizes from that of a bin's start (all sizes before it) and of its own size."""
    none = torch.zeros_like(at)
    rows = []
    for k in range(len(shares)):
        row = at if k == 0 else torch.where(passed[k - 1], at, none)
        rows.append(row if k == len(passed) else torch.where(passed[k], before, row))
    mean = shares[0] * rows[0]
    for share, row in zip(shares[1:], rows[1:]):
        mean = mean + share * row
    return [(1.0 - MIN_BIN) * share * (row - mean) for share, row in zip(shares, rows)]


def _at_knots(passed: Rows, left: Tensor, right: Tensor) -> Rows:
    """Gradient of every knot from those of the two ends of the bin."""
    none, n_bins = torch.zeros_like(left), len(passed) + 1

    def in_bin(k: int, value: Tensor) -> Tensor:
        value = value if k == 0 else torch.where(passed[k - 1], value, none)
        return value if k == n_bins - 1 else torch.where(passed[k], none, value)

    inner = [in_bin(k, left) + in_bin(k - 1, right) for k in range(1, n_bins)]
    return [in_bin(0, left), *inner, in_bin(n_bins - 1, right)]


class _Compiled(WithFallback):
    """One of the kernels, compiled for any size."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function, "splines")
        self.compiled: dict[str, Callable[..., Any]] = {}

    def quick(self, *arguments: Any) -> Any:
        """The compiled kernel of the device of the arguments."""
        device = arguments[0].device.type
        if device not in self.compiled:  # not before: importing the compiler takes as long as the rest of torch
            options = FUSED if device == "cpu" else None
            self.compiled[device] = torch.compile(self.plain, dynamic=True, fullgraph=True, options=options)
        # One variant for each number of bins, direction and type; torch's default stops at eight.
        with torch._dynamo.config.patch(recompile_limit=64):
            return self.compiled[device](*arguments)


_VALUE, _DERIVATIVE = _Compiled(_value), _Compiled(_derivative)
