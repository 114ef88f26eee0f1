"""What a System says of its bonds: which atoms, how long, how stiff."""

from typing import NamedTuple

import numpy as np
import openmm
from openmm import unit
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from openmm_regflow.constraints import fixed_bonds

_STIFFNESS = unit.kilojoule_per_mole / unit.nanometer**2


class Bonds(NamedTuple):
    """Bonds with a length.

    Attributes:
        pairs: atoms, `(k, 2)`.
        lengths: [nm] `(k,)`.
        stiffness: [kJ/mol/nm²] `(k,)`; inf for a constraint.
    """

    pairs: np.ndarray
    lengths: np.ndarray
    stiffness: np.ndarray


def bonds_of(system: openmm.System) -> Bonds:
    """Harmonic bonds and constraints of a System.

    Urey-Bradley terms and restraints that are harmonic bonds as well are among them; bonds to the nearest image across
    a periodic box are not.
    """
    rows = [(i, j, length, np.inf) for i, j, length in fixed_bonds(system)]
    held = {frozenset(row[:2]) for row in rows}
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce) and not force.usesPeriodicBoundaryConditions():
            for index in range(force.getNumBonds()):
                i, j, length, k = force.getBondParameters(index)
                if frozenset((i, j)) not in held:
                    rows.append((i, j, length.value_in_unit(unit.nanometer), k.value_in_unit(_STIFFNESS)))
    table = np.array(rows, dtype=np.float64).reshape(-1, 4)
    return Bonds(table[:, :2].astype(np.int64), table[:, 2], table[:, 3])


def bonded_pairs(system: openmm.System) -> dict[frozenset[int], bool]:
    """Pairs of atoms that any bond of a System joins, whatever its form, and whether a constraint does.

    A bond that lies in a neural network or a Python force is not seen.
    """
    found: dict[frozenset[int], bool] = {}
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce | openmm.CustomBondForce):
            found |= {frozenset(force.getBondParameters(k)[:2]): False for k in range(force.getNumBonds())}
        elif isinstance(force, openmm.CustomCompoundBondForce) and force.getNumParticlesPerBond() == 2:
            found |= {frozenset(force.getBondParameters(k)[0]): False for k in range(force.getNumBonds())}
    return found | {frozenset((i, j)): True for i, j, _ in fixed_bonds(system)}


def n_molecules(system: openmm.System) -> int:
    """How many sets of atoms a System has that bonds join; virtual sites belong to the atoms that place them."""
    pairs = [tuple(pair) for pair in bonded_pairs(system)]
    for i in range(system.getNumParticles()):
        if system.isVirtualSite(i):
            pairs.append((i, system.getVirtualSite(i).getParticle(0)))
    n, table = system.getNumParticles(), np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return int(connected_components(coo_array((np.ones(len(table)), tuple(table.T)), shape=(n, n)), directed=False)[0])
