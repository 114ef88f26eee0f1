"""Distances between conformations after the best rotation, and relabelling of identical atoms.

Rotating a conformation, or exchanging atoms that the force field cannot tell apart, changes neither its energy nor its
place in the target; it shortens the way from a latent to it. Ends of planar groups are left as they are: improper
torsions depend on the order of their atoms and tell the two oxygens of a carboxylate apart (by up to 1 kT).
"""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from openmm_regflow.elements import symbol

#: Rows of the distance matrix at a time; bounds memory at any n.
CHUNK = 256


def identical_atoms(topology: Any) -> list[list[int]]:
    """Groups of atoms of one element whose only neighbour is the same atom, e.g. the hydrogens of a methyl group.

    None of three that a planar centre may have (carboxylates, amides).

    Args:
        topology: an ``openmm.app.Topology``, or anything with its atoms() and bonds().
    """
    atoms = list(topology.atoms())
    neighbours: dict[int, set[int]] = {a.index: set() for a in atoms}
    for bond in topology.bonds():
        i, j = bond[0].index, bond[1].index
        neighbours[i].add(j)
        neighbours[j].add(i)
    groups: dict[tuple[int, str], list[int]] = {}
    for atom in atoms:
        centres = neighbours[atom.index]
        if len(centres) == 1 and len(neighbours[min(centres)]) != 3:
            groups.setdefault((min(centres), symbol(atom)), []).append(atom.index)
    return [group for group in groups.values() if len(group) > 1]


def rotated_squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Least squared distances `(n, m)` between conformations over proper rotations of `b` about its centre.

    The best overlap is ``s1 + s2 ± s3`` of the singular values of the 3 x 3 correlation, the largest root of
    ``x^4 - 2 S x^2 - 8 D x + (S^2 - 4 Q)`` with S the sum of squares, D the determinant and Q the sum of products of
    squares (Theobald 2005, doi 10.1107/S0108767305015266); Newton's method from above, where it is monotone.

    Args:
        a: `(n, n_atoms, 3)`.
        b: `(m, n_atoms, 3)`.
    """
    a, b = a.double(), b.double()
    result = torch.cdist(a.mean(1), b.mean(1)).square_().mul_(a.shape[1])
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    norms_a, norms_b = (x.square().sum((1, 2)) for x in (a, b))
    # Part by part into the one matrix: at 20,000 points each further one would take 3.2 GB.
    for part, norm, rows in zip(a.split(CHUNK), norms_a.split(CHUNK), result.split(CHUNK)):
        rows += norm[:, None] + norms_b - 2 * _best_overlap(part, b)
    return result.clamp_min_(0.0)


def _best_overlap(a: Tensor, b: Tensor) -> Tensor:
    n, m = len(a), len(b)
    h = (a.transpose(1, 2).reshape(3 * n, -1) @ b.transpose(1, 2).reshape(3 * m, -1).T).view(n, 3, m, 3)
    h = h.transpose(1, 2)
    square = h.transpose(-1, -2) @ h
    s, fourth = square.diagonal(dim1=-2, dim2=-1).sum(-1), square.square().sum((-1, -2))
    d, rest = torch.linalg.det(h), 2 * fourth - s * s  # S^2 - 4 Q = 2 tr(M^2) - S^2
    root = (3 * s).sqrt()
    for _ in range(30):
        slope = 4 * root**3 - 4 * s * root - 8 * d
        step = (root**4 - 2 * s * root * root - 8 * d * root + rest) / slope
        root = root - torch.where(slope > 0, step, 0.0)
    return root


def best_rotations(a: Tensor, b: Tensor) -> Tensor:
    """Proper rotations `(n, 3, 3)` R of `b` on `a`, both centred: least ``|a - b R^T|^2`` (Kabsch 1976)."""
    u, _, v = torch.linalg.svd(a.transpose(1, 2) @ b)
    sign = torch.ones(len(a), 3, dtype=a.dtype, device=a.device)
    sign[:, 2] = torch.linalg.det(u @ v).sign()
    return (u * sign[:, None]) @ v


def align(a: Tensor, b: Tensor, groups: Sequence[Sequence[int]] = (), rounds: int = 3) -> Tensor:
    """`b` rotated about its centres and its identical atoms relabelled, so as to be near `a`; in turns, `rounds` times.

    Every step lowers the distance or leaves it.

    Args:
        a: `(n, n_atoms, 3)`.
        b: `(n, n_atoms, 3)`.
        groups: indices of atoms that may be exchanged, at most four to a group are looked at in all orders.
        rounds: turns of rotation and relabelling.

    Returns:
        `(n, n_atoms, 3)`; the centre of every conformation stays.
    """
    centre = b.mean(1, keepdim=True)
    target, moved = a - a.mean(1, keepdim=True), b - centre
    for _ in range(rounds):
        moved = moved @ best_rotations(target, moved).transpose(1, 2)
        for group in groups:
            moved = _relabel(target, moved, list(group))
    return moved @ best_rotations(target, moved).transpose(1, 2) + centre


def _relabel(target: Tensor, moved: Tensor, group: list[int]) -> Tensor:
    # Above four atoms the first four of a group: 24 orders at most.
    some = group[:4]
    orders = torch.tensor(list(permutations(some)), device=moved.device)
    cost = (target[:, None, some] - moved[:, orders]).square().sum((-1, -2))
    result = moved.clone()
    result[:, some] = moved.gather(1, orders[cost.argmin(1)][:, :, None].expand(-1, -1, 3))
    return result
