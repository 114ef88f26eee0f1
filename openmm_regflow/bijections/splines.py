"""Monotone rational-quadratic splines on the unit interval: pure functions, no parameters of their own.

Gregory & Delbourgo 1982; as a flow: Durkan et al. 2019, arXiv 1906.04032, equations 4 and 6–8; on circles:
Rezende et al. 2020, arXiv 2002.02428.

Bins run along the first axis: every step is then one pass over contiguous elements (a softmax over a short last
axis alone took a third of a training step).
"""

import math

import torch
from torch import Tensor

#: Smallest bin, as a fraction of an even bin: keeps every slope and its inverse representable in float32.
MIN_BIN = 5e-2
#: Smallest knot derivative.
MIN_SLOPE = 1e-2
SLOPE_OFFSET = math.log(math.expm1(1.0 - MIN_SLOPE))


def bins(raw: Tensor) -> Tensor:
    """Positive bin sizes that sum to one, from unconstrained numbers; zeros give even bins.

    Args:
        raw: `(K, ...)`.

    Returns:
        `(K, ...)`.
    """
    return MIN_BIN / raw.shape[0] + (1.0 - MIN_BIN) * torch.softmax(raw, dim=0)


def slopes(raw: Tensor) -> Tensor:
    """Positive knot derivatives from unconstrained numbers; zero gives slope one."""
    return MIN_SLOPE + torch.nn.functional.softplus(raw + SLOPE_OFFSET)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(0, index).squeeze(0)


def rational_quadratic(
    u: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Evaluate the spline, or its inverse, and the log-derivative of what was evaluated.

    Args:
        u: `(...)` in [0, 1]; values outside are evaluated at the nearest end.
        widths: `(K, ...)` bin widths that sum to one.
        heights: `(K, ...)` bin heights that sum to one.
        derivatives: `(K + 1, ...)` positive knot derivatives.
        inverse: evaluate the inverse map.

    Returns:
        value `(...)` in [0, 1] and log-derivative `(...)`.
    """
    u = u.clamp(0.0, 1.0)
    right = torch.cumsum(heights if inverse else widths, dim=0)
    index = (u >= right[:-1]).sum(0, keepdim=True)
    other = torch.cumsum(widths if inverse else heights, dim=0)
    # Knots in the precision of the parameters, what lies between them in that of u.
    w, h = _pick(widths, index), _pick(heights, index)
    x0 = (_pick(other if inverse else right, index) - w).to(u.dtype)
    y0 = (_pick(right if inverse else other, index) - h).to(u.dtype)
    w, h = w.to(u.dtype), h.to(u.dtype)
    d0, d1 = (_pick(derivatives, i).to(u.dtype) for i in (index, index + 1))
    s = h / w
    curvature = d0 + d1 - 2.0 * s
    if inverse:
        # The root of the quadratic that lies in the bin, in the form without cancellation (paper, eq. 6-8).
        dy = u - y0
        a = h * (s - d0) + dy * curvature
        b = h * d0 - dy * curvature
        c = -s * dy
        root = (b * b - 4.0 * a * c).clamp_min(0.0).sqrt()
        xi = (2.0 * c / (-b - root)).clamp(0.0, 1.0)
        value = xi * w + x0
    else:
        xi = ((u - x0) / w).clamp(0.0, 1.0)
    between = xi * (1.0 - xi)
    denominator = s + curvature * between
    if not inverse:
        value = y0 + h * (s * xi * xi + d0 * between) / denominator
    slope = s * s * (d1 * xi * xi + 2.0 * s * between + d0 * (1.0 - xi) * (1.0 - xi)) / (denominator * denominator)
    log_slope = slope.log()
    return value, -log_slope if inverse else log_slope


def spline(raw: Tensor, ends: Tensor, v: Tensor, half: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """The spline on [-half, half] and the log-derivative of what was evaluated; the identity outside.

    Args:
        raw: `(3K - 1, ...)` unconstrained widths, heights and inner derivatives.
        ends: `(...)` unconstrained derivative at both ends; zero for slope one.
        v: `(...)` where to evaluate.
        half: half-width of the domain.
        inverse: evaluate the inverse map.

    Returns:
        value and log-derivative, both `(...)`.
    """
    k = (raw.shape[0] + 1) // 3
    widths, heights, inner = raw.split([k, k, k - 1])
    end = slopes(ends)[None]
    knots = bins(widths), bins(heights), torch.cat([end, slopes(inner), end])
    value, log_slope = rational_quadratic((v / half + 1.0) / 2.0, *knots, inverse=inverse)
    outside = v.abs() > half
    return (
        torch.where(outside, v, (2.0 * value - 1.0) * half),
        torch.where(outside, torch.zeros_like(v), log_slope),
    )
