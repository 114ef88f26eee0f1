"""Slopes of the target: the gradient of its log-density by a flow's features, from the forces on the atoms.

What path gradients compare with the flow's own (``objectives.path_gradient``).
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from openmm_regflow.coordinates import CoordinateMap
from openmm_regflow.errors import InputError

#: Rows at a time: their intermediates stay in a core's cache on a CPU.
CPU_PART, DEVICE_PART = 2048, 65_536


@runtime_checkable
class Differentiable(Protocol):
    """A reduced potential that also has a gradient, e.g. ``ensemble.ReducedPotential``."""

    def __call__(self, x: Tensor) -> Tensor:
        """Positions `(n, n_atoms, 3)` [nm] -> `(n,)` [kT], +inf where impossible."""

    def with_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Positions `(n, n_atoms, 3)` [nm] -> `(n,)` [kT], and its gradient `(n, n_atoms, 3)` [kT/nm]."""


def differentiable(reduced_potential: Callable[[Tensor], Tensor]) -> Differentiable:
    """The same potential, known to have a gradient.

    Raises:
        InputError: it has none.
    """
    if not isinstance(reduced_potential, Differentiable):
        raise InputError("the path gradient needs forces; pass ensemble.ReducedPotential, or set path to 0")
    return reduced_potential


@torch.no_grad()
def slopes(coordinates: CoordinateMap, x: Tensor, potential: Differentiable) -> tuple[Tensor, ...]:
    """Features, and how the target's log-density changes with them, ``grad_y [-u(x(y)) + log|det dx/dy|]``.

    Features may leave out how a molecule lies, so that the potential is asked for where they put it, with the labels of
    interchangeable atoms as they were. The density of rigid-body coordinates among the features is in it.

    Args:
        coordinates: positions -> features.
        x: `(n, n_atoms, 3)` [nm].
        potential: of the target.

    Returns:
        features `(n, dim)`, their log|det dy/dx| `(n,)`, reduced potential `(n,)` [kT], slopes `(n, dim)`; not finite
        where positions are not.
    """
    size = CPU_PART if x.device.type == "cpu" else DEVICE_PART
    parts = [_slopes(coordinates, part, potential) for part in x.split(size)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _slopes(coordinates: CoordinateMap, x: Tensor, potential: Differentiable) -> tuple[Tensor, ...]:
    y, log_volume = coordinates.to_features(x)
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        placed, log_det = coordinates.to_positions(y)
        placed = coordinates.turned(placed, coordinates.turns(x))
        u, gradient = potential.with_gradient(placed.detach())
        log_p = -(gradient * placed).sum((1, 2)) + log_det + coordinates.frame_log_density(placed)
        (slope,) = torch.autograd.grad(log_p.sum(), y)
    return y.detach(), log_volume, u, slope
