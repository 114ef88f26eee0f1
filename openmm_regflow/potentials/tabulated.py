"""OpenMM's tabulated functions (discrete and spline, one to three dimensions) and the patches of CMAP in torch."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import openmm
import torch
from torch import Tensor

from openmm_regflow.errors import UnsupportedForceError
from openmm_regflow.potentials.expressions import Table

#: Coefficients of the cubic on [0, 1] with values and slopes (f0, f1, f0', f1') at its ends.
_HERMITE = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [-3, 3, -2, -1], [2, -2, 1, 1]], dtype=np.float64)


def slopes(values: np.ndarray, axis: int, periodic: bool) -> np.ndarray:
    """Derivatives per grid step, at the grid points, of cubic splines along one axis (periodic or natural).

    Args:
        values: samples; for a periodic axis the last one repeats the first.
        axis: axis of the splines.
        periodic: periodic or natural boundary conditions.
    """
    from scipy.interpolate import CubicSpline

    knots = np.arange(values.shape[axis])
    if len(knots) == 2 and not periodic:
        return np.repeat(np.diff(values, axis=axis), 2, axis)
    return CubicSpline(knots, values, axis, bc_type="periodic" if periodic else "natural")(knots, 1)


def patches(values: np.ndarray, periodic: bool) -> np.ndarray:
    """Polynomial coefficients of the cubic spline interpolation in every grid cell.

    Derivatives at the grid points, mixed ones included, come from one-dimensional splines along each axis in turn,
    as in OpenMM; a cell is then the tensor product of Hermite cubics.

    Args:
        values: samples on a grid of d dimensions; for a periodic function the last repeats the first.
        periodic: boundary conditions of the splines.

    Returns:
        `(cells, 4, ..., 4)`, cells in C order, powers 0..3 of the position in the cell, in [0, 1], per dimension.
    """
    dims = values.ndim
    corners = np.empty([n - 1 for n in values.shape] + [4] * dims)
    for derivative in product((0, 1), repeat=dims):
        field = values
        for axis in range(dims):
            field = slopes(field, axis, periodic) if derivative[axis] else field
        for corner in product((0, 1), repeat=dims):
            cells: Any = tuple(slice(c, c + n - 1) for c, n in zip(corner, values.shape))
            place: Any = (..., *(2 * d + c for d, c in zip(derivative, corner)))
            corners[place] = field[cells]
    for axis in range(dims):
        corners = np.moveaxis(np.tensordot(corners, _HERMITE, axes=([dims + axis], [1])), -1, dims + axis)
    return corners.reshape(-1, *[4] * dims)


def evaluate_patches(coefficients: Tensor, cell: Tensor, positions: Sequence[Tensor]) -> Tensor:
    """Values of the polynomials of ``cell`` at ``positions`` within it.

    Args:
        coefficients: `(cells, 4, ..., 4)`.
        cell: integer cell numbers, any shape.
        positions: one tensor in [0, 1] of that shape per dimension.
    """
    value = coefficients[cell]
    for position in reversed(positions):
        x = position.reshape(position.shape + (1,) * (value.ndim - position.ndim - 1))
        a, b, c, d = value.unbind(-1)
        value = a + x * (b + x * (c + x * d))
    return value


class _Spline:
    """Continuous1D, 2D or 3DFunction: cubic spline inside the grid, zero outside."""

    def __init__(self, values: np.ndarray, limits: Sequence[tuple[float, float]], periodic: bool) -> None:
        self._limits, self._cells, self._periodic = limits, [n - 1 for n in values.shape], periodic
        self._coefficients = torch.as_tensor(patches(values, periodic))

    def __call__(self, *args: Tensor) -> Tensor:
        args = torch.broadcast_tensors(*args)
        number, inside = torch.zeros_like(args[0], dtype=torch.int64), torch.ones_like(args[0]) > 0
        positions: list[Tensor] = []
        for x, (low, high), cells in zip(args, self._limits, self._cells):
            if self._periodic:
                x = low + torch.remainder(x - low, high - low)
            else:
                inside = inside & ~((x < low) | (x > high))  # true for NaN, which must stay NaN
            scaled = (x - low) * (cells / (high - low))
            index = torch.nan_to_num(scaled.detach(), nan=0.0).clamp(0, cells - 1).long()
            number, positions = number * cells + index, [*positions, scaled - index]
        coefficients = self._coefficients.to(args[0].device, args[0].dtype)
        return torch.where(inside, evaluate_patches(coefficients, number, positions), torch.zeros_like(args[0]))


class _Discrete:
    """Discrete1D, 2D or 3DFunction: the value at the nearest integers; outside the table it is NaN."""

    def __init__(self, values: np.ndarray) -> None:
        self._shape = values.shape
        self._values = torch.as_tensor(values.reshape(-1))

    def __call__(self, *args: Tensor) -> Tensor:
        args = torch.broadcast_tensors(*args)
        number, inside = torch.zeros_like(args[0], dtype=torch.int64), torch.ones_like(args[0]) > 0
        for x, size in zip(args, self._shape):
            index = torch.floor(x.detach() + 0.5)  # halves upwards, as OpenMM rounds
            inside = inside & (index >= 0) & (index < size)
            number = number * size + torch.nan_to_num(index, nan=0.0).clamp(0, size - 1).long()
        values = self._values.to(args[0].device, args[0].dtype)[number]
        return torch.where(inside, values, torch.full_like(values, torch.nan))


def table(function: openmm.TabulatedFunction) -> Table:
    """A tabulated function of OpenMM as a function of tensors.

    Raises:
        UnsupportedForceError: a kind of table that is not covered.
    """
    kind, parameters = type(function).__name__, function.getFunctionParameters()
    if kind == "Continuous1DFunction":
        values, *limits = parameters
        return _Spline(np.array(values), [tuple(limits)], function.getPeriodic())
    if kind in ("Continuous2DFunction", "Continuous3DFunction"):
        dims = int(kind[10])
        shape, values, limits = parameters[:dims], parameters[dims], parameters[dims + 1 :]
        grid = np.array(values).reshape(shape[::-1]).T
        return _Spline(grid, list(zip(limits[::2], limits[1::2])), function.getPeriodic())
    if kind == "Discrete1DFunction":
        return _Discrete(np.array(parameters[0] if len(np.shape(parameters)) > 1 else parameters))
    if kind in ("Discrete2DFunction", "Discrete3DFunction"):
        return _Discrete(np.array(parameters[-1]).reshape(parameters[:-1][::-1]).T)
    raise UnsupportedForceError(f"the tabulated function {kind} is not covered by TorchPotential; use OpenMMPotential")
