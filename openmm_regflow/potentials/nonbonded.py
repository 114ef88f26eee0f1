"""NonbondedForce without periodicity: Coulomb and Lennard-Jones, all pairs or a cutoff with reaction field."""

from collections.abc import Mapping

import numpy as np
import openmm
import torch
from torch import Tensor

from openmm_regflow.errors import UnsupportedForceError
from openmm_regflow.potentials.base import Geometry, PairTable, Take, Term, column, refuse
from openmm_regflow.potentials.bonded import md

#: Coulomb constant 1 / (4 pi eps0) [kJ/mol nm/e^2], the value of OpenMM's kernels.
COULOMB = 138.93545764438198


def all_pairs(n_atoms: int) -> np.ndarray:
    """Every unordered pair of distinct atoms `(n_pairs, 2)`, first index the smaller."""
    return np.stack(np.triu_indices(n_atoms, 1), axis=1)


def without(pairs: np.ndarray, excluded: set[tuple[int, int]]) -> np.ndarray:
    """``pairs`` `(k, 2)` (ordered within each pair) less those in ``excluded``."""
    if not excluded:
        return pairs
    removed = np.array(sorted(excluded), dtype=np.int64)
    stride = 1 + max(pairs.max(initial=0), removed.max())
    return pairs[~np.isin(pairs @ [stride, 1], removed @ [stride, 1])]


def ordered(i: int, j: int) -> tuple[int, int]:
    """The pair with its smaller index first."""
    return (i, j) if i < j else (j, i)


def directed_rows(pairs: np.ndarray, n_atoms: int) -> tuple[np.ndarray, np.ndarray]:
    """For each atom in turn, every other atom and the row of that pair in ``pairs`` `(n_pairs, 2)`.

    Returns:
        others and rows, each `(n_atoms * (n_atoms - 1),)`, ordered by atom.
    """
    row = np.zeros((n_atoms, n_atoms), dtype=np.int64)
    row[pairs[:, 0], pairs[:, 1]] = row[pairs[:, 1], pairs[:, 0]] = np.arange(len(pairs))
    atom, other = np.nonzero(~np.eye(n_atoms, dtype=bool))
    return other, row[atom, other]


def switching_function(r: Tensor, start: float, cutoff: float) -> Tensor:
    """OpenMM's quintic switch: 1 below ``start`` [nm], 0 from ``cutoff`` [nm] on, two continuous derivatives."""
    s = ((r - start) / (cutoff - start)).clamp(0.0, 1.0)
    return 1.0 - s * s * s * (10.0 - s * (15.0 - 6.0 * s))


class NonbondedTerm(Term):
    """NonbondedForce, NoCutoff or CutoffNonPeriodic."""

    _exception_atoms: np.ndarray
    _exceptions: np.ndarray
    _active: np.ndarray

    def __init__(self, force: openmm.NonbondedForce, pairs: PairTable) -> None:
        super().__init__(force)
        self._check_method(force)
        self.parameters = {
            force.getGlobalParameterName(k): force.getGlobalParameterDefaultValue(k)
            for k in range(force.getNumGlobalParameters())
        }
        self._read_particles(force)
        self._read_exceptions(force)
        excluded = {ordered(*row) for row in self._exception_atoms.tolist()}
        self._atoms = without(all_pairs(force.getNumParticles()), excluded)
        self._exception_atoms = self._exception_atoms[self._active]
        self._exceptions = self._exceptions[self._active]
        self._rows = pairs.rows(self._atoms), pairs.rows(self._exception_atoms)

    def _check_method(self, force: openmm.NonbondedForce) -> None:
        names = ("NoCutoff", "CutoffNonPeriodic", "CutoffPeriodic", "Ewald", "PME", "LJPME")
        method = force.getNonbondedMethod()
        if method > 1:
            raise refuse(force, f"the periodic nonbonded method {names[method]}")
        if not force.getIncludeDirectSpace():
            raise refuse(force, "leaving out the direct space")
        self._cutoff = md(force.getCutoffDistance()) if method == 1 else None
        switched = self._cutoff is not None and force.getUseSwitchingFunction()
        self._switch = md(force.getSwitchingDistance()) if switched else None
        self._dielectric = force.getReactionFieldDielectric()

    def _read_particles(self, force: openmm.NonbondedForce) -> None:
        rows = [force.getParticleParameters(i) for i in range(force.getNumParticles())]
        self._particles = np.array([[md(v) for v in row] for row in rows]).reshape(-1, 3)
        offsets = range(force.getNumParticleParameterOffsets())
        self._particle_offsets = [force.getParticleParameterOffset(k) for k in offsets]
        _refuse_repeated(self._particle_offsets, "particle")

    def _read_exceptions(self, force: openmm.NonbondedForce) -> None:
        rows = [force.getExceptionParameters(k) for k in range(force.getNumExceptions())]
        self._exception_atoms = np.array([row[:2] for row in rows], dtype=np.int64).reshape(-1, 2)
        self._exceptions = np.array([[md(v) for v in row[2:]] for row in rows]).reshape(-1, 3)
        offsets = range(force.getNumExceptionParameterOffsets())
        self._exception_offsets = [force.getExceptionParameterOffset(k) for k in offsets]
        _refuse_repeated(self._exception_offsets, "exception")
        self._active = (self._exceptions[:, 0] != 0) | (self._exceptions[:, 2] != 0)
        self._active[[entry[1] for entry in self._exception_offsets]] = True
        renumbered = np.cumsum(self._active) - 1
        self._exception_offsets = [(e[0], int(renumbered[e[1]]), *e[2:]) for e in self._exception_offsets]

    def finalise(self, pairs: PairTable) -> None:
        """Index the regular pairs and the exceptions; without a cutoff they are one list."""
        groups = self._rows if self._cutoff is not None else (np.concatenate(self._rows),)
        self._takes = [Take(rows, len(pairs)) for rows in groups]

    def constants(self, parameters: Mapping[str, float]) -> dict[str, Tensor]:
        """Products of charges and Lennard-Jones coefficients of every pair, after all offsets."""
        particles = _with_offsets(self._particles, self._particle_offsets, parameters)
        exceptions = _with_offsets(self._exceptions, self._exception_offsets, parameters)
        a, b = particles[self._atoms[:, 0]], particles[self._atoms[:, 1]]
        with np.errstate(invalid="ignore"):  # a depth below zero, by an offset: no number, as in OpenMM
            root = np.sqrt(particles[:, 2])[self._atoms]
        regular = np.stack([a[:, 0] * b[:, 0], 0.5 * (a[:, 1] + b[:, 1]), root[:, 0] * root[:, 1]], axis=1)
        groups = [regular, exceptions] if self._cutoff is not None else [np.concatenate([regular, exceptions])]
        return {
            f"{name}{k}": value
            for k, group in enumerate(groups)
            for name, value in _pair_coefficients(group).items()
        }

    def energy(self, geometry: Geometry, constants: Mapping[str, Tensor]) -> Tensor:
        """Energies `(n_blocks, lanes)` [kJ/mol]."""
        total = geometry.zeros()
        for k, take in enumerate(self._takes):
            if take.length == 0:
                continue
            qq, c6, c12 = (constants[f"{name}{k}"] for name in ("qq", "six", "twelve"))
            inv_r = take(geometry.inv_r)
            if k == 0 and self._cutoff is not None:
                pair = self._truncated(take(geometry.r2), inv_r, (qq, c6, c12), self._cutoff)
            else:
                inv_r6 = (inv_r * inv_r) ** 3
                pair = qq * inv_r + inv_r6 * (c12 * inv_r6 - c6)
            total = total + pair.sum(-2)
        return total

    def _truncated(self, r2: Tensor, inv_r: Tensor, coefficients: tuple[Tensor, ...], rc: float) -> Tensor:
        """Pair energies with cutoff: reaction field for charges, optional switch for Lennard-Jones."""
        (qq, c6, c12), eps = coefficients, self._dielectric
        k_rf = (eps - 1.0) / (2.0 * eps + 1.0) / rc**3
        c_rf = 3.0 * eps / (2.0 * eps + 1.0) / rc
        inv_r6 = (inv_r * inv_r) ** 3
        dispersion = inv_r6 * (c12 * inv_r6 - c6)
        if self._switch is not None:
            dispersion = dispersion * switching_function(r2 * inv_r, self._switch, rc)
        value = dispersion + qq * (inv_r + k_rf * r2 - c_rf)
        return torch.where(r2 <= rc * rc, value, torch.zeros_like(value))


def _refuse_repeated(offsets: list, kind: str) -> None:
    """Refuse two offsets of one parameter in one place: Reference takes the last of them, other platforms the sum."""
    seen: set[tuple[str, int]] = set()
    for name, row, *_ in offsets:
        if (name, row) in seen:
            raise UnsupportedForceError(
                f"{kind} {row} of the NonbondedForce has two offsets of the parameter {name!r}, which OpenMM's "
                "platforms read differently; give it one, their sum"
            )
        seen.add((name, row))


def _with_offsets(values: np.ndarray, offsets: list, parameters: Mapping[str, float]) -> np.ndarray:
    """Charge, sigma, epsilon `(rows, 3)` plus ``scale * parameter`` for each offset."""
    result = values.copy()
    for name, row, *scales in offsets:
        result[row] += parameters[name] * np.array([md(scale) for scale in scales])
    return result


def _pair_coefficients(rows: np.ndarray) -> dict[str, Tensor]:
    """Coulomb and Lennard-Jones coefficients from charge product, sigma, epsilon `(pairs, 3)`."""
    six = 4.0 * rows[:, 2] * rows[:, 1] ** 6
    return {
        "qq": column(COULOMB * rows[:, 0]),
        "six": column(six),
        "twelve": column(six * rows[:, 1] ** 6),
    }
