"""Alignment against a brute-force oracle and the symmetries it must have."""

import torch
from openmm import app

from openmm_regflow.coordinates import align, identical_atoms, rotated_squared_distances
from openmm_regflow.coordinates.alignment import best_rotations
from openmm_regflow.rigid import random_rotations
from openmm_regflow.systems import load_system


def conformations(n, seed):
    return torch.randn(n, 7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_distances_are_those_after_the_best_rotation():
    """All pairs by Newton's method against Kabsch's rotation, mirror images (a negative determinant) included."""
    a, b = conformations(30, 0), conformations(20, 1)
    b[10:] = a[:10] * torch.tensor([1.0, 1.0, -1.0])
    found = rotated_squared_distances(a, b)
    left, right = (x.flatten(0, 1) for x in (a[:, None].expand(-1, 20, -1, -1), b[None].expand(30, -1, -1, -1)))
    exact = (left - align(left, right)).square().sum((1, 2)).view(30, 20)
    assert (found - exact).abs().max() < 1e-8


def test_rotations_are_proper_and_no_other_is_better():
    a, b = (x - x.mean(1, keepdim=True) for x in (conformations(50, 2), conformations(50, 3)))
    r = best_rotations(a, b)
    assert (torch.linalg.det(r) - 1).abs().max() < 1e-12
    best = (a - b @ r.transpose(1, 2)).square().sum((1, 2))
    g = torch.Generator().manual_seed(4)
    for _ in range(20):
        other = random_rotations(50, g)
        assert ((a - b @ other.transpose(1, 2)).square().sum((1, 2)) >= best - 1e-12).all()


def test_labels_only_help():
    a, b = conformations(50, 5), conformations(50, 6)
    plain, relabelled = align(a, b), align(a, b, [[0, 1, 2], [4, 5]])
    assert ((a - relabelled).square().sum((1, 2)) <= (a - plain).square().sum((1, 2)) + 1e-9).all()
    # The same points under other names.
    assert (torch.cdist(relabelled, relabelled).sum((1, 2)) - torch.cdist(b, b).sum((1, 2))).abs().max() < 1e-9
    assert (relabelled.mean(1) - b.mean(1)).abs().max() < 1e-12


def test_a_turned_and_relabelled_molecule_comes_back():
    mol = load_system("alanine-dipeptide")
    groups = identical_atoms(mol.topology)
    x = torch.as_tensor(mol.positions).expand(20, -1, -1)
    y = x @ random_rotations(20, torch.Generator().manual_seed(7)).transpose(1, 2)
    for group in groups:
        y[:, group] = y[:, group[1:] + group[:1]]
    y = y - y.mean(1, keepdim=True) + x.mean(1, keepdim=True)
    assert (align(x, y) - x).abs().max() > 0.05 and (align(x, y, groups) - x).abs().max() < 1e-9


def test_identical_atoms_of_alanine_dipeptide():
    """Three methyl groups; nothing else hangs on one atom alone."""
    mol = load_system("alanine-dipeptide")
    groups = identical_atoms(mol.topology)
    names = [a.name for a in mol.topology.atoms()]
    assert [len(g) for g in groups] == [3, 3, 3] and all(names[i].startswith("H") for g in groups for i in g)


def test_beads_without_an_element_may_be_alike():
    topology = app.Topology()
    residue = topology.addResidue("BEA", topology.addChain())
    centre, *ends = (topology.addAtom(name, None, residue) for name in "ABC")
    for end in ends:
        topology.addBond(centre, end)
    assert identical_atoms(topology) == [[1, 2]]
