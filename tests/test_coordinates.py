"""Coordinate maps: inverses, measures against autodiff, labels of interchangeable atoms."""

import math

import pytest
import torch
from openmm import app

from openmm_regflow import flows
from openmm_regflow.coordinates import CartesianMap, InternalMap, build_zmatrix, topology_tables
from openmm_regflow.errors import InputError
from openmm_regflow.rigid import random_rotations
from openmm_regflow.systems import load_system

PEPTIDES = ["alanine-dipeptide", "alanine-tripeptide", "alanine-tetrapeptide"]


def thermal(x0, n, seed=0, width=0.003):
    """Conformations around a structure: every atom displaced by a few thousandths of a nm."""
    g = torch.Generator().manual_seed(seed)
    return torch.as_tensor(x0) + width * torch.randn(n, *x0.shape, generator=g, dtype=torch.float64)


def distances(x):
    return (x[:, :, None] - x[:, None]).norm(dim=-1)


@pytest.fixture(scope="module", params=PEPTIDES)
def molecule(request):
    mol = load_system(request.param)
    zmatrix = build_zmatrix(*topology_tables(mol.topology))
    x = thermal(mol.positions, 400)
    return mol, InternalMap.fit(zmatrix, x), x


def test_features_in_parts_are_the_same(molecule):
    _, coordinates, x = molecule
    many = x.repeat(6, 1, 1)[:2345]
    for whole, parts in zip(coordinates.to_features(many), coordinates.features_of(many)):
        assert len(parts) == 2345 and (parts - whole).abs().max() < 1e-12


def test_zmatrix_covers_every_atom_once(molecule):
    mol, coordinates, _ = molecule
    z = coordinates.zmatrix
    placed = list(z.seed)
    for atom, *references in z.rows:
        assert atom not in placed and set(references) <= set(placed) and len(set(references)) == 3
        placed.append(atom)
    assert sorted(placed) == list(range(mol.topology.getNumAtoms()))
    assert coordinates.dim == 3 * mol.topology.getNumAtoms() - 6


def test_internal_round_trip(molecule):
    _, coordinates, x = molecule
    y, log_det = coordinates.to_features(x)
    back, log_det_back = coordinates.to_positions(y)
    # The rebuilt molecule sits in its own frame: compare all distances, of the canonical labelling.
    canonical = coordinates.canonical(x)
    assert distances(back).sub(distances(canonical)).abs().max() < 1e-10
    assert (log_det + log_det_back).abs().max() < 1e-9
    assert (coordinates.to_features(back)[0] - y).abs().max() < 1e-8


def test_internal_features_ignore_the_frame(molecule):
    _, coordinates, x = molecule
    g = torch.Generator().manual_seed(1)
    moved = x @ random_rotations(len(x), g).transpose(1, 2) + torch.randn(len(x), 1, 3, generator=g).double()
    a, b = coordinates.to_features(x), coordinates.to_features(moved)
    assert (a[0] - b[0]).abs().max() < 1e-8 and (a[1] - b[1]).abs().max() < 1e-9


def test_stiff_features_are_white(molecule):
    _, coordinates, x = molecule
    y = coordinates.to_features(x)[0][:, : coordinates.n_stiff]
    assert y.mean(0).abs().max() < 1e-6
    assert (torch.cov(y.T) - torch.eye(y.shape[1])).abs().max() < 1e-6


def test_volume_element_against_autodiff(molecule):
    """The full 3N x 3N Jacobian of (features, translation, rotation) has the determinant that the map reports."""
    _, coordinates, x = molecule
    y, _ = coordinates.to_features(x[:2])
    middle = coordinates.zmatrix.seed[1]
    log_multiplicity = sum(math.log(len(r.atoms)) for r in coordinates.rotors)
    for row in y:
        jacobian = torch.autograd.functional.jacobian(lambda v: coordinates.to_positions(v[None])[0][0].flatten(), row)
        positions, log_det = coordinates.to_positions(row[None])
        about = positions[0] - positions[0, middle]
        shifts = torch.eye(3, dtype=torch.float64).repeat(coordinates.n_atoms, 1)
        turns = torch.stack(
            [torch.linalg.cross(axis.expand_as(about), about).flatten() for axis in torch.eye(3).double()]
        )
        full = torch.cat([jacobian, shifts, turns.T], dim=1)
        # Each rotor's feature is m times its torsion; the m labellings, drawn uniformly, make up for it.
        assert torch.linalg.slogdet(full)[1] == pytest.approx(float(log_det) - log_multiplicity, abs=1e-8)


def test_rotors_of_alanine_dipeptide_are_its_three_methyls():
    mol = load_system("alanine-dipeptide")
    zmatrix = build_zmatrix(*topology_tables(mol.topology))
    names = [a.name for a in mol.topology.atoms()]
    assert sorted(len(r.atoms) for r in zmatrix.rotors) == [3, 3, 3]
    assert all(names[a].startswith("H") for r in zmatrix.rotors for a in r.atoms)


def test_relabelling_leaves_features_and_covers_all_labels(molecule):
    _, coordinates, x = molecule
    g = torch.Generator().manual_seed(2)
    again = coordinates.relabel(x, g)
    assert (coordinates.to_features(again)[0] - coordinates.to_features(x)[0]).abs().max() < 1e-8
    for rotor in coordinates.rotors:
        first = x[:, rotor.atoms[0]]
        where = torch.stack([(again[:, a] == first).all(-1) for a in rotor.atoms]).double().mean(1)
        m = len(rotor.atoms)
        standard_error = math.sqrt((1 / m) * (1 - 1 / m) / len(x))
        assert (where - 1 / m).abs().max() < 4 * standard_error


def test_labels_that_were_left_out_come_back(molecule):
    _, coordinates, x = molecule
    again = coordinates.relabel(x, torch.Generator().manual_seed(4))
    turns = coordinates.turns(again)
    assert turns.shape == (len(x), len(coordinates.rotors)) and bool(turns.any())
    assert not coordinates.turns(coordinates.canonical(again)).any()
    back = coordinates.turned(coordinates.to_positions(coordinates.to_features(again)[0])[0], turns)
    assert distances(back).sub(distances(again)).abs().max() < 1e-10


def test_relabelling_is_a_symmetry_of_the_energy(molecule):
    import openmm

    mol, coordinates, x = molecule
    context = openmm.Context(mol.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))

    def energy(frame):
        context.setPositions(frame.numpy())
        return context.getState(getEnergy=True).getPotentialEnergy()._value

    again = coordinates.relabel(x[:8], torch.Generator().manual_seed(3))
    assert not torch.equal(again, x[:8])
    for a, b in zip(again, x[:8]):
        assert energy(a) == pytest.approx(energy(b), abs=1e-6)


def test_outside_the_chart_is_nan():
    mol = load_system("alanine-dipeptide")
    coordinates = InternalMap.fit(build_zmatrix(*topology_tables(mol.topology)), thermal(mol.positions, 400))
    y = torch.zeros(3, coordinates.dim, dtype=torch.float64)
    y[1, 0] = -1e4
    x, _ = coordinates.to_positions(y)
    assert torch.isfinite(x[[0, 2]]).all() and torch.isnan(x[1]).all()


def test_relabelled_samples_keep_their_density():
    """However far hydrogens of a rotor stray: what one labelling covers, all do, and the rest has no density."""
    mol = load_system("alanine-dipeptide")
    x = torch.as_tensor(mol.reference("train")[:2000]).double()
    flow = flows.spline(flows.coordinates_for(mol.topology, x), n_layers=2, hidden=8).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    with torch.no_grad():
        samples, log_q = flow.sample(4000, generator)
        there = torch.isfinite(samples).flatten(1).all(1)
        again = flow.log_prob(flow.coordinates.relabel(samples[there], generator))
        assert bool(flow.covers(samples[there]).all())
        assert (again - log_q[there]).abs().max() < 1e-6
        swapped = x[:50].clone()
        first, second = flow.coordinates.rotors[0].atoms[:2]
        swapped[:, [first, second]] = x[:50][:, [second, first]]
        assert bool((flow.log_prob(swapped) == -torch.inf).all()) and not bool(flow.covers(swapped).any())


def test_rotors_with_a_gap_of_half_a_turn_are_outside():
    """Up to there features come back, whichever atom is called the first; beyond, the mean of the rotor would jump."""
    mol = load_system("alanine-dipeptide")
    x = torch.as_tensor(mol.reference("train")[:500]).double()
    coordinates = InternalMap.fit(build_zmatrix(*topology_tables(mol.topology)), x)
    _, second, _ = coordinates._rotor_raw[0][0]
    column = int(coordinates.unorder[second])
    mean = float(coordinates.origin[column])
    for deviation, inside in ((0.45, True), (0.55, False), (-0.45, True), (-0.55, False)):
        delta = torch.zeros(coordinates.n_stiff, dtype=torch.float64)
        delta[column] = -deviation * mean  # 0.5: half a turn from the third; -0.5: from the first
        y = torch.zeros(1, coordinates.dim, dtype=torch.float64)
        y[0, : coordinates.n_stiff] = coordinates.unwhitening @ delta
        positions, _ = coordinates.to_positions(y)
        assert bool(torch.isfinite(positions).all()) == inside
        if inside:
            assert (coordinates.to_features(positions)[0] - y).abs().max() < 1e-6


def test_cartesian_measure():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 7, 3, generator=g, dtype=torch.float64) * 0.2 + 0.3
    coordinates = CartesianMap.fit(x)
    y, log_det = coordinates.to_features(x)
    back, log_det_back = coordinates.to_positions(y)
    assert (back - x).abs().max() < 1e-12 and (log_det + log_det_back).abs().max() < 1e-12
    jacobian = torch.autograd.functional.jacobian(lambda v: coordinates.to_features(v[None])[0][0], x[0])
    assert torch.linalg.slogdet(jacobian.reshape(21, 21))[1] == pytest.approx(float(log_det[0]), abs=1e-9)
    normal = torch.distributions.Normal(torch.zeros(3).double(), coordinates.com_std)
    expected = normal.log_prob(x.mean(1)).sum(-1)
    assert (coordinates.frame_log_density(x) - expected).abs().max() < 1e-9


def test_augmentation_gives_a_uniform_frame():
    g = torch.Generator().manual_seed(4)
    coordinates = CartesianMap(4, scale=0.2)
    x = torch.randn(1, 4, 3, generator=g, dtype=torch.float64).expand(20000, -1, -1)
    moved = coordinates.augment(x, g)
    assert distances(moved).sub(distances(x)).abs().max() < 1e-9
    centre = moved.mean(1)
    assert centre.std(0).sub(coordinates.com_std).abs().max() < 4 * coordinates.com_std / math.sqrt(2 * 20000)
    direction = moved[:, 0] - centre
    direction = direction / direction.norm(dim=-1, keepdim=True)
    # A uniform direction has mean zero and variance 1/3 in each component.
    assert direction.mean(0).abs().max() < 4 * math.sqrt(1 / 3 / 20000)


@pytest.mark.parametrize(
    ("elements", "bonds", "words"),
    [
        (["C", "H", "H"], [(0, 1), (0, 2)], "at least 4 atoms"),
        (["C", "C", "C", "C", "C"], [(0, 1), (1, 2), (2, 3)], "atom 4 is not bonded"),
    ],
)
def test_bad_molecules(elements, bonds, words):
    with pytest.raises(InputError, match=words):
        build_zmatrix(elements, bonds)


def test_bad_data():
    mol = load_system("alanine-dipeptide")
    zmatrix = build_zmatrix(*topology_tables(mol.topology))
    x = thermal(mol.positions, 400)
    with pytest.raises(InputError, match="10 frames"):
        InternalMap.fit(zmatrix, x[:10])
    with pytest.raises(InputError, match="21"):
        InternalMap.fit(zmatrix, x[:, :21])
    x[3, 2, 1] = float("nan")
    with pytest.raises(InputError, match="frame 3"):
        InternalMap.fit(zmatrix, x)


def test_topology_of_a_plain_pdb():
    mol = load_system("alanine-dipeptide")
    assert isinstance(mol.topology, app.Topology)
    elements, bonds = topology_tables(mol.topology)
    assert len(elements) == 22 and len(bonds) == 21


def test_torsions_follow_the_usual_sign():
    import mdtraj

    x = torch.randn(50, 4, 3, generator=torch.Generator().manual_seed(0))
    expected = mdtraj.compute_dihedrals(mdtraj.Trajectory(x.numpy(), None), [[0, 1, 2, 3]], periodic=False)[:, 0]
    from openmm_regflow.coordinates.internal import bond_angle_torsion

    tau = bond_angle_torsion(x.permute(2, 1, 0), torch.tensor([[0, 1, 2, 3]]))[2][0]
    assert (tau - torch.as_tensor(expected)).abs().max() < 1e-5


def turned(x, topology, axis, angle):
    """Positions `(n, n_atoms, 3)` with all that lies beyond a bond turned about it by an angle [rad]."""
    table = {frozenset((bond[0].index, bond[1].index)) for bond in topology.bonds()} - {frozenset(axis)}
    beyond = {axis[1]}
    for _ in table:  # as many rounds as the longest way could need
        beyond |= {atom for bond in table if bond & beyond for atom in bond}
    columns = sorted(beyond)
    origin = x[:, axis[1], None]
    u = torch.nn.functional.normalize(x[:, axis[1], None] - x[:, axis[0], None], dim=-1)
    arm = x[:, columns] - origin
    u = u.expand_as(arm)
    along = (arm * u).sum(-1, keepdim=True) * u
    result = x.clone()
    result[:, columns] = origin + along + (arm - along) * math.cos(angle) + torch.linalg.cross(u, arm) * math.sin(angle)
    return result


@pytest.fixture(scope="module")
def backbone():
    """Alanine dipeptide near one structure, and its bond N-CA."""
    mol = load_system("alanine-dipeptide")
    n, ca = (
        next(a.index for a in mol.topology.atoms() if a.residue.name == "ALA" and a.name == k) for k in ("N", "CA")
    )
    return mol.topology, thermal(mol.positions, 500), (n, ca)


def test_a_rare_second_minimum_makes_a_torsion_a_circle(backbone):
    """Two frames in a hundred on the other side: the spread is that of a stiff torsion, the distribution is not."""
    topology, x, axis = backbone
    zmatrix = build_zmatrix(*topology_tables(topology))
    plain = InternalMap.fit(zmatrix, x)
    rare = torch.cat([turned(x[:10], topology, axis, 2.4), x[10:]])
    (row,) = set(InternalMap.fit(zmatrix, rare).soft) - set(plain.soft)
    assert set(zmatrix.rows[row][1:3]) == set(axis)
    bent = torch.cat([turned(x[:10], topology, axis, 1.2), x[10:]])  # within a quarter turn
    assert InternalMap.fit(zmatrix, bent).soft == plain.soft


@pytest.mark.parametrize(("angle", "shorter"), [(2.4, 2.4), (3.6, 3.6 - 2 * math.pi)])
def test_the_way_between_two_conformations(backbone, angle, shorter):
    """Its ends are the two, the way back is the way there, and torsions go the shorter way round."""
    topology, x, axis = backbone
    coordinates = InternalMap.fit(build_zmatrix(*topology_tables(topology)), x)
    a, b = x[0], turned(x[:1], topology, axis, angle)[0]
    share = torch.linspace(0, 1, 9, dtype=torch.float64)
    way = coordinates.between(a, b, share)
    assert (distances(way[[0, -1]]) - distances(torch.stack([a, b]))).abs().max() < 1e-10
    assert (distances(way) - distances(coordinates.between(b, a, 1 - share))).abs().max() < 1e-10
    expected = torch.cat([turned(x[:1], topology, axis, float(s) * shorter) for s in share])
    assert (distances(way) - distances(expected)).abs().max() < 1e-10


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_methyls_whose_labels_differ_between_frames_are_named(share):
    """Two structures that were prepared apart: `Modeller.addHydrogens` numbers a methyl's atoms either way round."""
    mol = load_system("alanine-dipeptide")
    x = torch.as_tensor(mol.reference("train")[:600]).double()
    zmatrix = build_zmatrix(*topology_tables(mol.topology))
    whole = InternalMap.fit(zmatrix, x)
    rotor = whole.rotors[0]
    mixed = x.clone()
    first, second = rotor.atoms[:2]
    odd = slice(0, int(share * len(x)))
    mixed[odd, first], mixed[odd, second] = x[odd, second], x[odd, first]
    with pytest.raises(InputError, match="go round one way"):
        InternalMap.fit(zmatrix, mixed)
    assert whole.covers(x).all() and not whole.covers(mixed)[odd].any() and whole.covers(mixed[odd.stop :]).all()
