"""CustomNonbondedForce and CustomGBForce: expressions over pairs of atoms."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import openmm
import torch
from torch import Tensor

from openmm_regflow.potentials.base import Geometry, Incidence, PairTable, Take, Term, refuse
from openmm_regflow.potentials.bonded import md
from openmm_regflow.potentials.custom import (
    global_parameters,
    in_order,
    numbered,
    parameter_columns,
    program,
    static_values,
    summed,
    tables,
)
from openmm_regflow.potentials.expressions import Program
from openmm_regflow.potentials.nonbonded import all_pairs, ordered, switching_function, without


def _cutoff(force: Any) -> float | None:
    """Cutoff [nm], None without one."""
    if force.getNonbondedMethod() > 1:
        raise refuse(force, "the periodic nonbonded method CutoffPeriodic")
    return md(force.getCutoffDistance()) if force.getNonbondedMethod() == 1 else None


def _exclusions(force: Any) -> set[tuple[int, int]]:
    return {ordered(*force.getExclusionParticles(k)) for k in range(force.getNumExclusions())}


def _particle_columns(force: Any) -> dict[str, Tensor]:
    """Parameters of the particles by name, each `(n_atoms, 1)`."""
    names = [force.getPerParticleParameterName(k) for k in range(force.getNumPerParticleParameters())]
    return parameter_columns(names, [force.getParticleParameters(i) for i in range(force.getNumParticles())])


def _both(values: Mapping[str, Tensor], atoms: np.ndarray) -> dict[str, Tensor]:
    """Values per atom `(n_atoms, 1)` as values per pair, with 1 and 2 appended to their names."""
    return {f"{name}{side + 1}": value[atoms[:, side]] for name, value in values.items() for side in range(2)}


def _suffixed(names: Any) -> list[str]:
    return [f"{name}{side}" for name in names for side in (1, 2)]


class CustomNonbondedTerm(Term):
    """CustomNonbondedForce, NoCutoff or CutoffNonPeriodic."""

    def __init__(self, force: openmm.CustomNonbondedForce, pairs: PairTable) -> None:
        super().__init__(force)
        self._cutoff = _cutoff(force)
        switched = self._cutoff is not None and force.getUseSwitchingFunction()
        self._switch = md(force.getSwitchingDistance()) if switched else None
        self.parameters = global_parameters(force)
        self._particles = _particle_columns(force)
        functions = tables(force)
        own = [*self._particles, *self.parameters]
        self._computed = [
            (name, program(force, text, own, [], functions))
            for name, text in map(force.getComputedValueParameters, range(force.getNumComputedValues()))
        ]
        names = [*self._particles, *(name for name, _ in self._computed)]
        static = [*_suffixed(names), *self.parameters]
        self._program = program(force, force.getEnergyFunction(), static, ["r"], functions)
        self._atoms = _interacting_pairs(force)
        self._rows = pairs.rows(self._atoms)

    def finalise(self, pairs: PairTable) -> None:
        """Index the pairs of this force."""
        self._take = Take(self._rows, len(pairs))

    def constants(self, parameters: Mapping[str, float]) -> dict[str, Tensor]:
        """Sub-expressions of the parameters of each pair."""
        shared = static_values(parameters)
        values = dict(self._particles)
        for name, value in self._computed:
            coefficients = value.fold(shared | self._particles)
            result = torch.as_tensor(value.run({}, coefficients), dtype=torch.float64)
            values[name] = result.expand(self.force.getNumParticles(), 1)
        return numbered("c", self._program.fold(shared | _both(values, self._atoms)))

    def energy(self, geometry: Geometry, constants: Mapping[str, Tensor]) -> Tensor:
        """Energies `(n_blocks, lanes)` [kJ/mol]."""
        if self._take.length == 0:
            return geometry.zeros()
        r = self._take(geometry.r)
        value = self._program.run({"r": _gated(r, self._cutoff)}, in_order("c", constants, self._program.n_slots))
        value = value + torch.zeros_like(r)
        if self._switch is not None and self._cutoff is not None:
            value = value * switching_function(r, self._switch, self._cutoff)
        return summed(_within(value, r, self._cutoff), geometry, self._take.length)


def _gated(r: Tensor, cutoff: float | None) -> Tensor:
    """Distances for an expression: beyond the cutoff, where it need not be defined, those of some pair within.

    `_within` drops the value there, but zero times the infinite derivative of a root is NaN.
    """
    return r if cutoff is None else torch.where(r > cutoff, torch.full_like(r, 0.5 * cutoff), r)


def _within(value: Tensor, r: Tensor, cutoff: float | None) -> Tensor:
    """Zero beyond the cutoff; NaN distances stay NaN."""
    return value if cutoff is None else torch.where(r > cutoff, torch.zeros_like(value), value)


def _interacting_pairs(force: openmm.CustomNonbondedForce) -> np.ndarray:
    """Pairs `(k, 2)` that interact, in the order in which particles 1 and 2 enter the expression."""
    excluded = _exclusions(force)
    if force.getNumInteractionGroups() == 0:
        return without(all_pairs(force.getNumParticles()), excluded)
    found = []
    for first, second in map(force.getInteractionGroupParameters, range(force.getNumInteractionGroups())):
        both = set(first) & set(second)
        for i, j in product(first, second):
            twice = i > j and i in both and j in both
            if i != j and ordered(i, j) not in excluded and not twice:
                found.append((i, j))
    return np.array(found, dtype=np.int64).reshape(-1, 2)


class _PairSet:
    """Pairs of one kind in a CustomGBForce: as atoms, as rows of the pair table, as a map to atoms.

    Args:
        atoms: `(rows, 2)` first and second atom.
        pairs: the pair table.
        n_atoms: particles of the System.
    """

    def __init__(self, atoms: np.ndarray, pairs: PairTable, n_atoms: int) -> None:
        self.atoms = atoms
        self._n_atoms = n_atoms
        self._rows = pairs.rows(atoms)
        self.ends = Incidence(atoms[:, 0], n_atoms), Incidence(atoms[:, 1], n_atoms)
        self._regular = len(atoms) == n_atoms * (n_atoms - 1) > 0

    def finalise(self, pairs: PairTable) -> None:
        self._take = Take(self._rows, len(pairs))

    def to(self, dtype: torch.dtype, device: torch.device) -> None:
        for item in (*self.ends, self._take):
            item.to(dtype, device)

    def r(self, geometry: Geometry) -> Tensor:
        """Distances `(n_blocks, rows, lanes)`."""
        return self._take(geometry.r)

    def sum_over_second(self, value: Tensor) -> Tensor:
        """Sum per first atom `(n_blocks, n_atoms, lanes)`."""
        if len(self.atoms) == 0:
            return value.new_zeros((value.shape[0], self._n_atoms, value.shape[-1]))
        if self._regular:  # rows are ordered by first atom
            return value.unflatten(-2, (self._n_atoms, -1)).sum(-2)
        return self.ends[0].transpose(value)


class CustomGBTerm(Term):
    """CustomGBForce, NoCutoff or CutoffNonPeriodic: computed values per atom, then energies per atom and pair."""

    def __init__(self, force: openmm.CustomGBForce, pairs: PairTable) -> None:
        super().__init__(force)
        self._cutoff = _cutoff(force)
        self._n_atoms = force.getNumParticles()
        self.parameters = global_parameters(force)
        self._particles = _particle_columns(force)
        self._functions = tables(force)
        self._sets: dict[tuple[bool, bool], _PairSet] = {}
        self._pairs = pairs
        computed = [force.getComputedValueParameters(k) for k in range(force.getNumComputedValues())]
        energies = [force.getEnergyTermParameters(k) for k in range(force.getNumEnergyTerms())]
        self._names = [name for name, _, _ in computed]
        self._values = [
            self._stage(text, kind, self._names[:k], directed=True) for k, (_, text, kind) in enumerate(computed)
        ]
        self._energies = [self._stage(text, kind, self._names, directed=False) for text, kind in energies]

    def _stage(
        self, text: str, kind: int, earlier: list[str], directed: bool
    ) -> tuple[Program, tuple[bool, bool] | None]:
        """Program and pair set (None: per atom) of a computed value (``directed``) or an energy term."""
        if kind == openmm.CustomGBForce.SingleParticle:
            names = [*self._particles, *self.parameters]
            return program(self.force, text, names, [*earlier, "x", "y", "z"], self._functions), None
        names = [*_suffixed(self._particles), *self.parameters]
        key = (kind == openmm.CustomGBForce.ParticlePair, directed)
        if key not in self._sets:
            self._sets[key] = _PairSet(self._pair_atoms(*key), self._pairs, self._n_atoms)
        return program(self.force, text, names, [*_suffixed(earlier), "r"], self._functions), key

    def _pair_atoms(self, exclude: bool, directed: bool) -> np.ndarray:
        """Pairs, without the excluded ones on demand; each in both directions on demand, ordered by first atom."""
        atoms = all_pairs(self._n_atoms)
        if exclude:
            atoms = without(atoms, _exclusions(self.force))
        if not directed:
            return atoms
        both = np.concatenate([atoms, atoms[:, ::-1]])
        return both[np.lexsort((both[:, 1], both[:, 0]))]

    def finalise(self, pairs: PairTable) -> None:
        """Index the pairs of each set."""
        for pair_set in self._sets.values():
            pair_set.finalise(pairs)

    def to(self, dtype: torch.dtype, device: torch.device) -> None:
        """Move the index tables in place."""
        for pair_set in self._sets.values():
            pair_set.to(dtype, device)

    def constants(self, parameters: Mapping[str, float]) -> dict[str, Tensor]:
        """Sub-expressions of parameters of every computed value and energy term."""
        shared = static_values(parameters)
        result: dict[str, Tensor] = {}
        for prefix, stages in (("v", self._values), ("e", self._energies)):
            for k, (stage, key) in enumerate(stages):
                own = self._particles if key is None else _both(self._particles, self._sets[key].atoms)
                result |= numbered(f"{prefix}{k}_", stage.fold(shared | own))
        return result

    def energy(self, geometry: Geometry, constants: Mapping[str, Tensor]) -> Tensor:
        """Energies `(n_blocks, lanes)` [kJ/mol]."""
        values: dict[str, Tensor] = {}
        for k, (stage, key) in enumerate(self._values):
            value = self._run(f"v{k}_", stage, key, geometry, values, constants)
            values[self._names[k]] = value if key is None else self._sets[key].sum_over_second(value)
        total = geometry.zeros()
        for k, (stage, key) in enumerate(self._energies):
            total = total + self._run(f"e{k}_", stage, key, geometry, values, constants).sum(-2)
        return total

    def _run(
        self,
        prefix: str,
        stage: Program,
        key: tuple[bool, bool] | None,
        geometry: Geometry,
        values: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
    ) -> Tensor:
        """Value per atom or per pair `(n_blocks, rows, lanes)`, zero beyond the cutoff."""
        coefficients = in_order(prefix, constants, stage.n_slots)
        if key is None:
            dynamic = dict(values) | dict(zip("xyz", geometry.x))
            return stage.run(dynamic, coefficients) + torch.zeros_like(geometry.x[0])
        pair_set = self._sets[key]
        if len(pair_set.atoms) == 0:
            return geometry.x[0].narrow(-2, 0, 0)
        r = pair_set.r(geometry)
        dynamic = {"r": _gated(r, self._cutoff)} | {
            f"{name}{side + 1}": pair_set.ends[side](value)
            for name, value in values.items()
            for side in range(2)
            if f"{name}{side + 1}" in stage.uses
        }
        return _within(stage.run(dynamic, coefficients) + torch.zeros_like(r), r, self._cutoff)
