"""A Z-matrix from bonds alone, with one proper torsion per rotatable bond and interchangeable groups found.

Atoms on one centre take their torsion relative to the first atom placed there (a sibling), so that only one
torsion per rotatable bond is soft; all others are stiff.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

from openmm_regflow.elements import symbol
from openmm_regflow.errors import InputError


@dataclass(frozen=True)
class Rotor:
    """Three hydrogens on one centre (CH3, NH3+) that a turn about the bond to that centre interchanges.

    Other groups that look alike are left as they are: in a carboxylate, force fields' improper torsions
    depend on the order of the atoms and tell the two oxygens apart (by up to 1 kT in the tripeptide).

    Attributes:
        atoms: in the order of rising torsion; the first one carries the soft torsion of the Z-matrix, the
            others refer to it.
    """

    atoms: tuple[int, ...]


@dataclass(frozen=True)
class ZMatrix:
    """Placement order and references of every atom.

    Attributes:
        seed: three bonded atoms (a, b, c), b bonded to both; they define the molecule's frame.
        rows: (atom, bonded to, angle with, torsion with), each placed after its references.
        siblings: positions in `rows` whose torsion refers to an atom on the same centre.
        rotors: groups of interchangeable atoms.
    """

    seed: tuple[int, int, int]
    rows: tuple[tuple[int, int, int, int], ...]
    siblings: frozenset[int]
    rotors: tuple[Rotor, ...]

    @property
    def bonds(self) -> list[tuple[int, int]]:
        """(atom, bonded to) in the order of placement, those of the seed first."""
        first, middle, last = self.seed
        return [(first, middle), (last, middle), *((row[0], row[1]) for row in self.rows)]

    @property
    def n_atoms(self) -> int:
        """Number of atoms placed."""
        return len(self.rows) + 3


def topology_tables(topology: Any) -> tuple[list[str], list[tuple[int, int]]]:
    """Element symbols and bonds of an ``openmm.app.Topology`` (or anything with its atoms() and bonds())."""
    elements = [symbol(atom) for atom in topology.atoms()]
    bonds = [(bond[0].index, bond[1].index) for bond in topology.bonds()]
    return elements, bonds


def build_zmatrix(elements: list[str], bonds: list[tuple[int, int]]) -> ZMatrix:
    """Z-matrix of one connected molecule of at least four atoms.

    Args:
        elements: element symbol of every atom.
        bonds: pairs of atom indices.

    Raises:
        InputError: fewer than four atoms, no bonds, or more than one molecule.
    """
    neighbours = _neighbours(len(elements), bonds)
    heavy = [i for i, e in enumerate(elements) if e != "H"]
    seed = _seed(neighbours, heavy, elements)
    order, parent = _placement(neighbours, elements, seed)
    reference = {seed[0]: seed[1], seed[2]: seed[1], seed[1]: seed[0]}
    children: dict[int, list[int]] = {}
    rows: list[tuple[int, int, int, int]] = []
    siblings: set[int] = set()
    for atom in order:
        centre = parent[atom]
        axis = reference[centre]
        elder = children.setdefault(centre, [seed[2]] if centre == seed[1] else [])
        if elder:
            siblings.add(len(rows))
            rows.append((atom, centre, axis, elder[0]))
        else:
            rows.append((atom, centre, axis, _beyond(axis, centre, reference, seed)))
        elder.append(atom)
        reference[atom] = centre
    return ZMatrix(seed, tuple(rows), frozenset(siblings), _rotors(elements, neighbours, rows, siblings))


def _neighbours(n_atoms: int, bonds: list[tuple[int, int]]) -> list[list[int]]:
    table: list[list[int]] = [[] for _ in range(n_atoms)]
    for a, b in bonds:
        table[a].append(b)
        table[b].append(a)
    if n_atoms < 4:
        raise InputError(
            f"internal coordinates need at least 4 atoms, this molecule has {n_atoms}; use Cartesian ones "
            '(coordinates = "cartesian")'
        )
    reached = set(_distances(table, 0))
    if len(reached) != n_atoms:
        lost = min(set(range(n_atoms)) - reached)
        raise InputError(
            f"atom {lost} is not bonded to the molecule of atom 0; internal coordinates cover one connected molecule "
            '(check the bonds of the topology, which a PDB file has as CONECT records; or coordinates = "cartesian")'
        )
    return [sorted(row) for row in table]


def _distances(neighbours: list[list[int]], start: int) -> dict[int, int]:
    seen = {start: 0}
    queue = deque([start])
    while queue:
        atom = queue.popleft()
        for other in neighbours[atom]:
            if other not in seen:
                seen[other] = seen[atom] + 1
                queue.append(other)
    return seen


def _seed(neighbours: list[list[int]], heavy: list[int], elements: list[str]) -> tuple[int, int, int]:
    """The middle of the molecule: errors of placement then grow over the shortest distances."""
    candidates = [i for i in heavy if len(neighbours[i]) >= 2] or [i for i, n in enumerate(neighbours) if len(n) >= 2]

    def centrality(atom: int) -> tuple[int, int, int]:
        distance = _distances(neighbours, atom)
        n_heavy = sum(elements[j] != "H" for j in neighbours[atom])
        return (-(n_heavy >= 2), sum(distance.values()), atom)

    middle = min(candidates, key=centrality)
    # The two ends of the seed carry the longest branches, so that the proper torsions are those of the chain.
    sizes = {j: _branch(neighbours, middle, j) for j in neighbours[middle]}
    first, second = sorted(neighbours[middle], key=lambda j: (elements[j] == "H", -sizes[j], j))[:2]
    return first, middle, second


def _branch(neighbours: list[list[int]], origin: int, start: int) -> int:
    seen, queue = {origin, start}, deque([start])
    while queue:
        for other in neighbours[queue.popleft()]:
            if other not in seen:
                seen.add(other)
                queue.append(other)
    return len(seen)


def _placement(
    neighbours: list[list[int]], elements: list[str], seed: tuple[int, int, int]
) -> tuple[list[int], dict[int, int]]:
    parent: dict[int, int] = {}
    placed, order = set(seed), []
    queue = deque(seed)
    while queue:
        atom = queue.popleft()
        fresh = [j for j in neighbours[atom] if j not in placed]
        # Heavy and branching atoms first: the proper torsion of a bond is then that of the chain (phi, psi, chi).
        for j in sorted(fresh, key=lambda j: (elements[j] == "H", -_branch(neighbours, atom, j), j)):
            placed.add(j)
            parent[j] = atom
            order.append(j)
            queue.append(j)
    return order, parent


def _beyond(axis: int, centre: int, reference: dict[int, int], seed: tuple[int, int, int]) -> int:
    """The atom behind the axis: the axis's own reference, or the other end of the seed."""
    if axis == seed[1]:
        return seed[2] if centre == seed[0] else seed[0]
    return reference[axis]


def _rotors(
    elements: list[str], neighbours: list[list[int]], rows: list[tuple[int, int, int, int]], siblings: set[int]
) -> tuple[Rotor, ...]:
    by_axis: dict[tuple[int, int], list[int]] = {}
    for atom, centre, axis, _ in rows:
        by_axis.setdefault((centre, axis), []).append(atom)
    proper = {row[0] for k, row in enumerate(rows) if k not in siblings}
    rotors = []
    for (centre, _), atoms in by_axis.items():
        hydrogens = len(atoms) == 3 and all(elements[a] == "H" for a in atoms)
        if hydrogens and len(neighbours[centre]) == 4 and atoms[0] in proper:
            rotors.append(Rotor(tuple(atoms)))
    return tuple(rotors)
