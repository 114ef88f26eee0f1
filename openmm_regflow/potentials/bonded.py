"""Bonded forces: harmonic bonds and angles, periodic and Ryckaert-Bellemans torsions, CMAP."""

from collections.abc import Mapping

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor

from openmm_regflow.potentials.base import (
    Geometry,
    Incidence,
    Term,
    Vector,
    column,
    cross,
    displace,
    dot,
    refuse,
    safe_sqrt,
    squared_norm,
)
from openmm_regflow.potentials.tabulated import evaluate_patches, patches

_MD = unit.md_unit_system


def md(value: object) -> float:
    """A number in MD units from a Quantity or a plain number."""
    return value.value_in_unit_system(_MD) if unit.is_quantity(value) else value  # type: ignore[attr-defined,return-value]


def refuse_periodic(force: openmm.Force) -> None:
    """Raise where a force measures distances across periodic images."""
    if force.usesPeriodicBoundaryConditions():
        raise refuse(force, "a periodic boundary condition")


def displacement(first: np.ndarray, second: np.ndarray, n_atoms: int) -> Incidence:
    """The matrix of displacements x[first] - x[second]."""
    signs = np.tile([1.0, -1.0], (len(first), 1))
    return Incidence(np.stack([first, second], axis=1), n_atoms, signs)


def bond_length(d: Vector) -> Tensor:
    """Length `(n_blocks, rows, lanes)` of displacements; the derivative at zero is zero."""
    return safe_sqrt(squared_norm(d))


def bond_angle(a: Vector, b: Vector) -> Tensor:
    """Angle in [0, pi] between displacements from the vertex.

    At 0 and pi the derivative is zero. With an atom on the vertex the angle is undefined, and NaN as in OpenMM.
    """
    cross2, inner = squared_norm(cross(a, b)), dot(a, b)
    scale = torch.rsqrt(cross2 + inner * inner)
    return torch.atan2(safe_sqrt(cross2) * scale, inner * scale)


def torsion_components(b1: Vector, b2: Vector, b3: Vector) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the torsion of three successive bonds x1-x0, x2-x1, x3-x2 (IUPAC sign).

    Collinear atoms give NaN, as they do in OpenMM: the torsion is undefined.
    """
    m, n = cross(b1, b2), cross(b2, b3)
    c, s = dot(m, n), dot(b1, n) * bond_length(b2)
    size = torch.maximum(c.abs(), s.abs()).detach()  # lengths to the fourth: squares may leave single precision
    c, s = c / size, s / size
    scale = torch.rsqrt(c * c + s * s)
    return c * scale, s * scale


class BondTerm(Term):
    """HarmonicBondForce: k/2 (r - r0)^2."""

    def __init__(self, force: openmm.HarmonicBondForce, n_atoms: int) -> None:
        super().__init__(force)
        refuse_periodic(force)
        rows = [force.getBondParameters(b) for b in range(force.getNumBonds())]
        atoms = np.array([row[:2] for row in rows], dtype=np.int64).reshape(-1, 2)
        self._d = displacement(atoms[:, 0], atoms[:, 1], n_atoms)
        self._length = column([md(row[2]) for row in rows])
        self._half_k = column([0.5 * md(row[3]) for row in rows])

    def constants(self, parameters: Mapping[str, float]) -> dict[str, Tensor]:
        """Equilibrium lengths and half the force constants."""
        return {"length": self._length, "half_k": self._half_k}

    def energy(self, geometry: Geometry, constants: Mapping[str, Tensor]) -> Tensor:
        """Energies `(n_blocks, lanes)` [kJ/mol]."""
        delta = bond_length(displace(self._d, geometry.x)) - constants["length"]
        return (constants["half_k"] * delta * delta).sum(-2)


class AngleTerm(Term):
    """HarmonicAngleForce: k/2 (theta - theta0)^2."""

    def __init__(self, force: openmm.HarmonicAngleForce, n_atoms: int) -> None:
        super().__init__(force)
        refuse_periodic(force)
        rows = [force.getAngleParameters(a) for a in range(force.getNumAngles())]
        atoms = np.array([row[:3] for row in rows], dtype=np.int64).reshape(-1, 3)
        self._a = displacement(atoms[:, 0], atoms[:, 1], n_atoms)
        self._b = displacement(atoms[:, 2], atoms[:, 1], n_atoms)
        self._angle = column([md(row[3]) for row in rows])
        self._half_k = column([0.5 * md(row[4]) for row in rows])

    def constants(self, parameters: Mapping[str, float]) -> dict[str, Tensor]:
        """Equilibrium angles and half the force constants."""
        return {"angle": self._angle, "half_k": self._half_k}

    def energy(self, geometry: Geometry, constants: Mapping[str, Tensor]) -> Tensor:
        """Energies `(n_blocks, lanes)` [kJ/mol]."""
        delta = bond_angle(displace(self._a, geometry.x), displace(self._b, geometry.x)) - constants["angle"]
        return (constants["half_k"] * delta * delta).sum(-2)


class _Torsions(Term):
    """Base of the torsion terms: a Fourier series per distinct quadruple of atoms.

    sum_n a_n cos(n phi) + b_n sin(n phi), n = 0..n_max, evaluated by the addition theorem from cos(phi) and
    sin(phi), which follow from the positions without any inverse or direct trigonometric function.
    """

    def _set_series(self, series: dict[tuple[int, ...], np.ndarray], n_atoms: int) -> None:
        atoms = np.array(list(series), dtype=np.int64).reshape(-1, 4)
        self._bonds = [displacement(atoms[:, k + 1], atoms[:, k], n_atoms) for k in range(3)]
        table = np.array(list(series.values())).reshape(len(atoms), 2, -1)
        self._series = torch.as_tensor(table).permute(1, 2, 0)[..., None].contiguous()

    def constants(self, parameters: Mapping[str, float]) -> dict[str, Tensor]:
        """Fourier coefficients `(2, n_max + 1, rows, 1)`."""
        return {"series": self._series}

    def energy(self, geometry: Geometry, constants: Mapping[str, Tensor]) -> Tensor:
        """Energies `(n_blocks, lanes)` [kJ/mol]."""
        c, s = torsion_components(*(displace(bond, geometry.x) for bond in self._bonds))
        cosines, sines = constants["series"].unbind(0)
        total = cosines[0] + cosines[1] * c + sines[1] * s
        cn, sn = c, s
        for n in range(2, len(cosines)):
            cn, sn = cn * c - sn * s, sn * c + cn * s
            total = total + cosines[n] * cn + sines[n] * sn
        return total.sum(-2)


class PeriodicTorsionTerm(_Torsions):
    """PeriodicTorsionForce: k (1 + cos(n phi - phi0))."""

    def __init__(self, force: openmm.PeriodicTorsionForce, n_atoms: int) -> None:
        super().__init__(force)
        refuse_periodic(force)
        rows = [force.getTorsionParameters(t) for t in range(force.getNumTorsions())]
        order = max([1] + [row[4] for row in rows])
        series: dict[tuple[int, ...], np.ndarray] = {}
        for *atoms, n, phase, k in rows:
            table = series.setdefault(tuple(atoms), np.zeros((2, order + 1)))
            table[0, 0] += md(k)
            table[:, n] += md(k) * np.array([np.cos(md(phase)), np.sin(md(phase))])
        self._set_series(series, n_atoms)


class RBTorsionTerm(_Torsions):
    """RBTorsionForce: sum_n c_n cos^n(phi - pi), n = 0..5."""

    def __init__(self, force: openmm.RBTorsionForce, n_atoms: int) -> None:
        super().__init__(force)
        refuse_periodic(force)
        series: dict[tuple[int, ...], np.ndarray] = {}
        for t in range(force.getNumTorsions()):
            *atoms, c0, c1, c2, c3, c4, c5 = force.getTorsionParameters(t)
            powers = np.array([md(c) * (-1) ** n for n, c in enumerate((c0, c1, c2, c3, c4, c5))])
            table = series.setdefault(tuple(atoms), np.zeros((2, 6)))
            chebyshev = np.polynomial.chebyshev.poly2cheb(powers)
            table[0, : len(chebyshev)] += chebyshev
        self._set_series(series, n_atoms)


class CMAPTerm(Term):
    """CMAPTorsionForce: a periodic bicubic patchwork over two torsions.

    Mackerell, Feig, Brooks, J. Comput. Chem. 25, 1400 (2004).
    """

    def __init__(self, force: openmm.CMAPTorsionForce, n_atoms: int) -> None:
        super().__init__(force)
        refuse_periodic(force)
        rows = [force.getTorsionParameters(t) for t in range(force.getNumTorsions())]
        atoms = np.array([row[1:] for row in rows], dtype=np.int64).reshape(-1, 2, 4)
        self._bonds = [
            [displacement(atoms[:, t, k + 1], atoms[:, t, k], n_atoms) for k in range(3)] for t in range(2)
        ]
        maps = [_closed_grid(*force.getMapParameters(m)) for m in range(force.getNumMaps())]
        self._patches = [patches(grid, periodic=True) for grid in maps]
        sizes = np.array([len(grid) - 1 for grid in maps])
        starts = np.concatenate([[0], np.cumsum(sizes**2)[:-1]]).astype(np.int64)
        used = np.array([row[0] for row in rows], dtype=np.int64)
        self._size = torch.as_tensor(sizes[used]).reshape(-1, 1)
        self._start = torch.as_tensor(starts[used]).reshape(-1, 1)

    def to(self, dtype: torch.dtype, device: torch.device) -> None:
        """Move the index tables in place."""
        for bond in self._bonds[0] + self._bonds[1]:
            bond.to(dtype, device)
        self._size, self._start = self._size.to(device), self._start.to(device)

    def constants(self, parameters: Mapping[str, float]) -> dict[str, Tensor]:
        """Patch coefficients `(patches, 4, 4)` of all maps."""
        return {"patches": torch.as_tensor(np.concatenate(self._patches))}

    def energy(self, geometry: Geometry, constants: Mapping[str, Tensor]) -> Tensor:
        """Energies `(n_blocks, lanes)` [kJ/mol]."""
        (i, a), (j, b) = (self._cell(geometry.x, t) for t in range(2))
        patch = self._start + i * self._size + j
        return evaluate_patches(constants["patches"], patch, (a, b)).sum(-2)

    def _cell(self, x: Vector, which: int) -> tuple[Tensor, Tensor]:
        """Grid cell and position within it, in [0, 1), of one of the two torsions."""
        c, s = torsion_components(*(displace(bond, x) for bond in self._bonds[which]))
        scaled = torch.remainder(torch.atan2(s, c), 2 * torch.pi) * self._size / (2 * torch.pi)
        # A NaN angle (collinear atoms) has no cell; any cell does, since its energy becomes +inf.
        cell = torch.nan_to_num(scaled.detach(), nan=0.0).long()
        cell = torch.minimum(cell.clamp(min=0), self._size - 1)
        return cell, scaled - cell


def _closed_grid(size: int, energy: object) -> np.ndarray:
    """Energies `(size + 1, size + 1)` by first and second angle, the first row and column repeated at the end."""
    grid = np.asarray(md(energy), dtype=np.float64).reshape(size, size).T
    return np.pad(grid, (0, 1), mode="wrap")
