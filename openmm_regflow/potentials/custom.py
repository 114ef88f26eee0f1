"""Custom bonded and external forces: an expression over internal coordinates of fixed groups of atoms."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import openmm
import torch
from torch import Tensor

from openmm_regflow.errors import InputError, UnsupportedForceError
from openmm_regflow.potentials.base import Geometry, Incidence, Term, Vector, column, displace, force_label, refuse
from openmm_regflow.potentials.bonded import (
    bond_angle,
    bond_length,
    displacement,
    md,
    refuse_periodic,
    torsion_components,
)
from openmm_regflow.potentials.expressions import Program, Table, parse, variables
from openmm_regflow.potentials.tabulated import table


def global_parameters(force: Any) -> dict[str, float]:
    """Names and defaults of the global parameters of one custom force."""
    count = range(force.getNumGlobalParameters())
    return {force.getGlobalParameterName(k): force.getGlobalParameterDefaultValue(k) for k in count}


def tables(force: Any) -> dict[str, Table]:
    """The tabulated functions of one custom force by name."""
    count = range(force.getNumTabulatedFunctions())
    return {force.getTabulatedFunctionName(k): table(force.getTabulatedFunction(k)) for k in count}


def program(
    force: openmm.Force, text: str, static: Iterable[str], dynamic: Iterable[str], functions: Mapping[str, Table]
) -> Program:
    """An expression of a force, translated; what it cannot translate is named together with the force.

    Raises:
        UnsupportedForceError: the expression uses something that is not covered.
    """
    try:
        return Program(text, list(static), list(dynamic), functions)
    except InputError as error:
        raise UnsupportedForceError(
            f"{force_label(force)} is not covered by TorchPotential ({error}); use OpenMMPotential(system) instead"
        ) from error


def parameter_columns(names: Sequence[str], rows: Sequence[Sequence[float]]) -> dict[str, Tensor]:
    """Parameters by name, each `(rows, 1)`."""
    values = np.array([[md(v) for v in row] for row in rows], dtype=np.float64).reshape(len(rows), len(names))
    return {name: column(values[:, k]) for k, name in enumerate(names)}


def static_values(parameters: Mapping[str, float]) -> dict[str, Tensor]:
    """Global parameters as float64 tensors `(1, 1)`."""
    return {name: torch.full((1, 1), value, dtype=torch.float64) for name, value in parameters.items()}


def numbered(prefix: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors under the names prefix0, prefix1, ..."""
    return {f"{prefix}{k}": value for k, value in enumerate(tensors)}


def in_order(prefix: str, constants: Mapping[str, Tensor], count: int) -> list[Tensor]:
    """The tensors which `numbered` stored."""
    return [constants[f"{prefix}{k}"] for k in range(count)]


def summed(value: Tensor | float, geometry: Geometry, n_rows: int) -> Tensor:
    """Sum of one value per row `(n_blocks, lanes)`; a value without rows or lanes counts for each."""
    zero = geometry.zeros()
    if not isinstance(value, Tensor):
        return zero + value * n_rows
    if value.ndim == 2:  # parameters only, `(rows, 1)`
        return zero + value.expand(n_rows, 1).sum()
    return value.expand(value.shape[0], n_rows, value.shape[-1]).sum(-2)


class ExpressionTerm(Term):
    """A custom force with one expression per group of atoms.

    Args:
        force: the OpenMM force.
        n_atoms: particles of the System.
        atoms: `(rows, k)` atoms of each group.
        names: names of the parameters of a group.
        values: parameters of each group.
        functions: tabulated functions.
    """

    #: Names of the coordinates an expression of this force may use, given the expression.
    coordinates: Callable[[str, int], list[str]] = staticmethod(lambda text, k: [])

    def __init__(
        self,
        force: Any,
        n_atoms: int,
        atoms: np.ndarray,
        names: Sequence[str],
        values: Sequence[Sequence[float]],
        functions: Mapping[str, Table] | None = None,
    ) -> None:
        super().__init__(force)
        refuse_periodic(force)
        self.parameters = global_parameters(force)
        self._n_rows = len(atoms)
        self._values = parameter_columns(names, values)
        text = force.getEnergyFunction()
        dynamic = self._set_coordinates(text, atoms, n_atoms)
        static = [name for name in [*names, *self.parameters] if name not in dynamic]
        self._program = program(force, text, static, dynamic, functions or {})

    def _set_coordinates(self, text: str, atoms: np.ndarray, n_atoms: int) -> list[str]:
        """Prepare what `_coordinates` needs; the names it provides."""
        raise NotImplementedError

    def _coordinates(self, x: Vector) -> dict[str, Tensor]:
        """Coordinates by name, each `(n_blocks, rows, lanes)`."""
        raise NotImplementedError

    def constants(self, parameters: Mapping[str, float]) -> dict[str, Tensor]:
        """Sub-expressions of parameters."""
        return numbered("c", self._program.fold(static_values(parameters) | self._values))

    def energy(self, geometry: Geometry, constants: Mapping[str, Tensor]) -> Tensor:
        """Energies `(n_blocks, lanes)` [kJ/mol]."""
        if self._n_rows == 0:
            return geometry.zeros()
        coefficients = in_order("c", constants, self._program.n_slots)
        return summed(self._program.run(self._coordinates(geometry.x), coefficients), geometry, self._n_rows)


class CustomBondTerm(ExpressionTerm):
    """CustomBondForce: an expression of the distance r."""

    def __init__(self, force: openmm.CustomBondForce, n_atoms: int) -> None:
        rows = [force.getBondParameters(b) for b in range(force.getNumBonds())]
        names = [force.getPerBondParameterName(k) for k in range(force.getNumPerBondParameters())]
        atoms = np.array([row[:2] for row in rows], dtype=np.int64).reshape(-1, 2)
        super().__init__(force, n_atoms, atoms, names, [row[2] for row in rows])

    def _set_coordinates(self, text: str, atoms: np.ndarray, n_atoms: int) -> list[str]:
        self._d = displacement(atoms[:, 0], atoms[:, 1], n_atoms)
        return ["r"]

    def _coordinates(self, x: Vector) -> dict[str, Tensor]:
        return {"r": bond_length(displace(self._d, x))}


class CustomAngleTerm(ExpressionTerm):
    """CustomAngleForce: an expression of the angle theta."""

    def __init__(self, force: openmm.CustomAngleForce, n_atoms: int) -> None:
        rows = [force.getAngleParameters(a) for a in range(force.getNumAngles())]
        names = [force.getPerAngleParameterName(k) for k in range(force.getNumPerAngleParameters())]
        atoms = np.array([row[:3] for row in rows], dtype=np.int64).reshape(-1, 3)
        super().__init__(force, n_atoms, atoms, names, [row[3] for row in rows])

    def _set_coordinates(self, text: str, atoms: np.ndarray, n_atoms: int) -> list[str]:
        self._a = displacement(atoms[:, 0], atoms[:, 1], n_atoms)
        self._b = displacement(atoms[:, 2], atoms[:, 1], n_atoms)
        return ["theta"]

    def _coordinates(self, x: Vector) -> dict[str, Tensor]:
        return {"theta": bond_angle(displace(self._a, x), displace(self._b, x))}


class CustomTorsionTerm(ExpressionTerm):
    """CustomTorsionForce: an expression of the torsion theta in (-pi, pi]."""

    def __init__(self, force: openmm.CustomTorsionForce, n_atoms: int) -> None:
        rows = [force.getTorsionParameters(t) for t in range(force.getNumTorsions())]
        names = [force.getPerTorsionParameterName(k) for k in range(force.getNumPerTorsionParameters())]
        atoms = np.array([row[:4] for row in rows], dtype=np.int64).reshape(-1, 4)
        super().__init__(force, n_atoms, atoms, names, [row[4] for row in rows])

    def _set_coordinates(self, text: str, atoms: np.ndarray, n_atoms: int) -> list[str]:
        self._bonds = [displacement(atoms[:, k + 1], atoms[:, k], n_atoms) for k in range(3)]
        return ["theta"]

    def _coordinates(self, x: Vector) -> dict[str, Tensor]:
        return {"theta": torsion_angle(*(displace(bond, x) for bond in self._bonds))}


def torsion_angle(b1: Vector, b2: Vector, b3: Vector) -> Tensor:
    """Torsion in (-pi, pi] of three successive bonds; NaN for collinear atoms."""
    c, s = torsion_components(b1, b2, b3)
    return torch.atan2(s, c)


class CustomExternalTerm(ExpressionTerm):
    """CustomExternalForce: an expression of the position x, y, z of single atoms."""

    def __init__(self, force: openmm.CustomExternalForce, n_atoms: int) -> None:
        rows = [force.getParticleParameters(i) for i in range(force.getNumParticles())]
        names = [force.getPerParticleParameterName(k) for k in range(force.getNumPerParticleParameters())]
        atoms = np.array([row[0] for row in rows], dtype=np.int64).reshape(-1, 1)
        super().__init__(force, n_atoms, atoms, names, [row[1] for row in rows])

    def _set_coordinates(self, text: str, atoms: np.ndarray, n_atoms: int) -> list[str]:
        self._atoms = Incidence(atoms, n_atoms)
        return ["x", "y", "z"]

    def _coordinates(self, x: Vector) -> dict[str, Tensor]:
        return dict(zip("xyz", displace(self._atoms, x)))


_POINTS = {"distance": 2, "angle": 3, "dihedral": 4}


class CustomCompoundBondTerm(ExpressionTerm):
    """CustomCompoundBondForce: an expression of positions, distances, angles and dihedrals of p1, p2, ..."""

    def __init__(self, force: openmm.CustomCompoundBondForce, n_atoms: int) -> None:
        rows = [force.getBondParameters(b) for b in range(force.getNumBonds())]
        names = [force.getPerBondParameterName(k) for k in range(force.getNumPerBondParameters())]
        atoms = np.array([row[0] for row in rows], dtype=np.int64).reshape(-1, force.getNumParticlesPerBond())
        super().__init__(force, n_atoms, atoms, names, [row[1] for row in rows], tables(force))

    def _set_coordinates(self, text: str, atoms: np.ndarray, n_atoms: int) -> list[str]:
        used = self._used_names(text)
        points = {f"p{k + 1}": atoms[:, k] for k in range(atoms.shape[1])}
        self._columns = [Incidence(atoms[:, k], n_atoms) for k in range(atoms.shape[1])]
        self._positions = [(name, "xyz".index(name[0]), int(name[1:]) - 1) for name in used if name[0] in "xyz"]
        self._measures: list[tuple[str, list[Incidence]]] = []
        for name in used:
            kind, _, rest = name.partition("(")
            if rest:
                group = [points[p] for p in self._checked(kind, rest[:-1].split(","), points)]
                self._measures.append((name, _measure_matrices(kind, group, n_atoms)))
        self._moved = [matrix for _, matrices in self._measures for matrix in matrices]
        return used

    def _used_names(self, text: str) -> list[str]:
        """Coordinates that the expression uses: x1, y1, ... and calls such as distance(p1,p2)."""
        try:
            names = variables(parse(text, [*tables(self.force)]))
        except InputError as error:
            raise refuse(self.force, f"its expression ({error})") from error
        per_point = {f"{c}{k + 1}" for c in "xyz" for k in range(self.force.getNumParticlesPerBond())}
        return sorted(name for name in names if name in per_point or "(" in name)

    def _checked(self, kind: str, names: list[str], points: Mapping[str, np.ndarray]) -> list[str]:
        if len(names) != _POINTS[kind] or not set(names) <= set(points):
            raise refuse(self.force, f"{kind}({','.join(names)})")
        return names

    def _coordinates(self, x: Vector) -> dict[str, Tensor]:
        found = {name: self._columns[point](x[axis]) for name, axis, point in self._positions}
        for name, matrices in self._measures:
            vectors = [displace(matrix, x) for matrix in matrices]
            measure: Callable[..., Tensor] = (bond_length, bond_angle, torsion_angle)[len(vectors) - 1]
            found[name] = measure(*vectors)
        return found


def _measure_matrices(kind: str, points: list[np.ndarray], n_atoms: int) -> list[Incidence]:
    """Displacements from which a distance, an angle or a dihedral follows."""
    if kind == "angle":
        return [displacement(points[0], points[1], n_atoms), displacement(points[2], points[1], n_atoms)]
    return [displacement(b, a, n_atoms) for a, b in pairwise(points)]
