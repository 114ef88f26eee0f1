"""Trajectories in every format, damaged ones, and frames that cannot be the molecule."""

import copy
import warnings
from itertools import pairwise

import mdtraj
import numpy as np
import openmm
import pytest
from openmm import app, unit
from openmm.app.internal.unitcell import computePeriodicBoxVectors
from test_systems import noisy_frames

from openmm_regflow import flows, metrics
from openmm_regflow.bonds import bonds_of
from openmm_regflow.errors import CorruptFileError, InputError
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.proposals import FlowProposal
from openmm_regflow.simulate import export_hdf5
from openmm_regflow.systems import MolecularSystem, load_system
from openmm_regflow.trajectories import (
    bond_temperature,
    check_bond_lengths,
    check_box,
    load_trajectory,
    warn_of_temperature,
)


@pytest.fixture(scope="module")
def dipeptide():
    return load_system("alanine-dipeptide")


@pytest.fixture(scope="module")
def frames(dipeptide):
    return dipeptide.reference("test")[::100]


# --- files ---


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9])
def test_truncated_file(tmp_path, dipeptide, keep):
    path = export_hdf5(noisy_frames(dipeptide, 200), dipeptide.topology, tmp_path / "a.h5")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CorruptFileError, match=r"a.h5"):
        load_trajectory(path, dipeptide.topology)


def test_other_files(tmp_path, dipeptide):
    with pytest.raises(InputError, match=r"no trajectory at"):
        load_trajectory(tmp_path / "absent.h5", dipeptide.topology)
    (tmp_path / "text.h5").write_text("not HDF5 at all")
    with pytest.raises(CorruptFileError, match=r"text.h5"):
        load_trajectory(tmp_path / "text.h5", dipeptide.topology)


def test_trajectory_of_another_molecule(tmp_path, dipeptide):
    other = load_system("alanine-tetrapeptide")
    path = export_hdf5(noisy_frames(other, 3), other.topology, tmp_path / "a.h5")
    with pytest.raises(InputError, match=r"42 atoms, the system 22"):
        load_trajectory(path, dipeptide.topology)
    mdtraj.load(str(path)).save_dcd(str(tmp_path / "a.dcd"))
    with pytest.raises(InputError, match=r"a.dcd does not have the 22 atoms of the system"):
        load_trajectory(tmp_path / "a.dcd", dipeptide.topology)


def test_trajectory_in_another_atom_order(tmp_path, dipeptide):
    topology = app.Topology()
    residue = topology.addResidue("ALA", topology.addChain())
    for atom in reversed(list(dipeptide.topology.atoms())):
        topology.addAtom(atom.name, atom.element, residue)
    path = export_hdf5(noisy_frames(dipeptide, 3), topology, tmp_path / "a.h5")
    with pytest.raises(InputError, match=r"atom 0 is H, in the system it is C"):
        load_trajectory(path, dipeptide.topology)


def test_one_frame_and_nan(tmp_path, dipeptide):
    frames = noisy_frames(dipeptide, 2)
    path = export_hdf5(frames[:1], dipeptide.topology, tmp_path / "one.h5")
    with pytest.raises(InputError, match=r"1 frame"):
        load_trajectory(path, dipeptide.topology)
    frames[1, 3, 2] = np.nan
    with mdtraj.formats.HDF5TrajectoryFile(str(tmp_path / "nan.h5"), "w") as file:
        file.topology = mdtraj.Topology.from_openmm(dipeptide.topology)
        file.write(frames)
    with pytest.raises(CorruptFileError, match=r"not finite"):
        load_trajectory(tmp_path / "nan.h5", dipeptide.topology)


def test_empty_trajectory(tmp_path, dipeptide):
    with mdtraj.formats.HDF5TrajectoryFile(str(tmp_path / "empty.h5"), "w") as file:
        file.topology = mdtraj.Topology.from_openmm(dipeptide.topology)
    with pytest.raises((InputError, CorruptFileError), match=r"empty.h5"):
        load_trajectory(tmp_path / "empty.h5", dipeptide.topology)


def test_beads_without_elements_are_read_back(tmp_path):
    topology = app.Topology()
    residue = topology.addResidue("BEA", topology.addChain())
    beads = [topology.addAtom(f"B{k}", None, residue) for k in range(6)]
    for a, b in pairwise(beads):
        topology.addBond(a, b)
    frames = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)
    export_hdf5(frames, topology, tmp_path / "frames.h5")
    assert np.array_equal(load_trajectory(tmp_path / "frames.h5", topology), frames)


@pytest.mark.parametrize("name", ["a.h5", "a.dcd", "a.nc", "a.trr"])
def test_formats_of_full_precision(dipeptide, frames, tmp_path, name):
    mdtraj.Trajectory(frames, mdtraj.Topology.from_openmm(dipeptide.topology)).save(str(tmp_path / name))
    found = dipeptide.load_trajectory(tmp_path / name, stride=3)
    # DCD and NetCDF are in angstrom, in single precision.
    np.testing.assert_allclose(found, frames[::3], rtol=3e-7, atol=1e-7)
    assert found.dtype == np.float32
    if not name.endswith(".h5"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
        with pytest.raises((CorruptFileError, InputError), match=name):
            dipeptide.load_trajectory(tmp_path / name)
        other = load_system("alanine-tripeptide")
        mdtraj.Trajectory(frames, mdtraj.Topology.from_openmm(dipeptide.topology)).save(str(tmp_path / name))
        with pytest.raises(InputError, match="33 atoms"):
            other.load_trajectory(tmp_path / name)


def test_rounded_positions_are_refused(dipeptide, frames, tmp_path):
    mdtraj.Trajectory(frames, mdtraj.Topology.from_openmm(dipeptide.topology)).save(str(tmp_path / "a.xtc"))
    for name in ("a.xtc", "a.pdb", "a.xyz"):
        mdtraj.Trajectory(frames, mdtraj.Topology.from_openmm(dipeptide.topology)).save(str(tmp_path / name))
        with pytest.raises(InputError, match="rounds positions"):
            dipeptide.load_trajectory(tmp_path / name)
    (tmp_path / "a.xtc").rename(tmp_path / "a.DCD")
    with pytest.raises(InputError, match=r"stride is 2\.5"):
        dipeptide.load_trajectory(tmp_path / "a.DCD", stride=2.5)


# --- frames that cannot be the molecule ---


def test_bonds_of_a_system(dipeptide):
    """Those of the topology; constraints in place of bonds where there are any."""
    found = bonds_of(dipeptide.system)
    drawn = {tuple(sorted((a.index, b.index))) for a, b in dipeptide.topology.bonds()}
    assert {tuple(sorted(pair)) for pair in found.pairs.tolist()} == drawn
    assert np.isfinite(found.stiffness).all()
    rigid = bonds_of(load_system("alanine-dipeptide", constraints="HBonds").system)
    assert len(rigid.pairs) == len(found.pairs) and np.isinf(rigid.stiffness).sum() == 12


@pytest.mark.parametrize("constraints", ["None", "HBonds"])
@pytest.mark.parametrize("name", ["alanine-dipeptide", "alanine-tripeptide", "alanine-tetrapeptide"])
def test_frames_of_dynamics_are_taken(name, constraints):
    """Those of unconstrained dynamics for a constrained System, too."""
    molecule = load_system(name, constraints=constraints)
    assert len(molecule.load_trajectory(molecule.reference_path("test"))) > 1000


def test_frames_of_hot_replicas_are_taken(dipeptide):
    """A harmonic bond at 1000 K exceeds 100 kT of 300 K in one of exp(30) cases."""
    context = openmm.Context(
        dipeptide.system, openmm.LangevinMiddleIntegrator(1000, 1, 0.001), openmm.Platform.getPlatform("Reference")
    )
    context.setPositions(dipeptide.positions)
    hot = []
    for _ in range(100):
        context.getIntegrator().step(50)
        hot.append(context.getState(positions=True).getPositions(asNumpy=True)._value)
    check_bond_lengths(np.array(hot), dipeptide.system, 300.0, "hot frames")


def test_frames_of_another_temperature_are_noticed(dipeptide, frames, tmp_path):
    """Stiff bonds are a thermometer: right for frames of 300 K, and of Langevin dynamics at 500 K it shows 500 K."""
    x = dipeptide.reference("test")
    assert bond_temperature(x, dipeptide.system) == pytest.approx(300.0, rel=0.05)
    assert bond_temperature(x[:50], dipeptide.system) is None  # too few to say
    halves, frozen = copy.deepcopy(dipeptide.system), copy.deepcopy(dipeptide.system)
    (bonds,) = (f for f in halves.getForces() if isinstance(f, openmm.HarmonicBondForce))
    for k in range(bonds.getNumBonds()):
        i, j, length, stiffness = bonds.getBondParameters(k)
        bonds.setBondParameters(k, i, j, length, stiffness / 2)
    halves.addForce(copy.deepcopy(bonds))  # one bond in two forces
    assert bond_temperature(x, halves) == pytest.approx(bond_temperature(x, dipeptide.system))
    still = x.copy()
    for atom in range(14):
        frozen.setParticleMass(atom, 0.0)
    still[:, :14] = x[0, :14]
    assert bond_temperature(still[:, :], frozen) != pytest.approx(0.0, abs=50)  # by the bonds that may move
    with pytest.warns(UserWarning, match="do not spread: frames of dynamics with constraints"):
        warn_of_temperature(np.repeat(x[:1], 200, axis=0), dipeptide.system, 300.0, "these")
    constrained = load_system("alanine-dipeptide", constraints="AllBonds")
    assert bond_temperature(x, constrained.system) is None
    integrator = openmm.LangevinMiddleIntegrator(500, 20, 0.0005)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(dipeptide.system, integrator, openmm.Platform.getPlatform("Reference"))
    context.setPositions(dipeptide.positions)
    integrator.step(2000)
    hot = []
    for _ in range(300):
        integrator.step(40)
        hot.append(context.getState(positions=True).getPositions(asNumpy=True)._value)
    assert bond_temperature(np.array(hot), dipeptide.system) == pytest.approx(500.0, rel=0.1)
    topology = mdtraj.Topology.from_openmm(dipeptide.topology)
    mdtraj.Trajectory(np.array(hot), topology).save(str(tmp_path / "hot.dcd"))
    with pytest.warns(UserWarning, match=r"hot.dcd spread as at \d{3} K, and the system is at 300 K"):
        dipeptide.load_trajectory(tmp_path / "hot.dcd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_system("alanine-dipeptide", temperature=500.0).load_trajectory(tmp_path / "hot.dcd")
        dipeptide.reference("train")


def test_a_box_may_be_written_in_another_way(dipeptide, frames, tmp_path):
    """A truncated octahedron by AMBER's angles is that of OpenMM's reduced vectors; another size is another box."""
    system = copy.deepcopy(dipeptide.system)
    for force in system.getForces():
        if isinstance(force, openmm.NonbondedForce):
            force.setNonbondedMethod(force.CutoffPeriodic)
    angles = [109.4712206] * 3
    system.setDefaultPeriodicBoxVectors(*computePeriodicBoxVectors(4.0, 4.0, 4.0, *np.radians(angles)))
    topology = mdtraj.Topology.from_openmm(dipeptide.topology)
    for edge in (4.0, 4.1):
        cells = np.full((len(frames), 3), edge), np.tile(angles, (len(frames), 1))
        made = mdtraj.Trajectory(frames, topology, unitcell_lengths=cells[0], unitcell_angles=cells[1])
        made.save_netcdf(str(tmp_path / f"{edge}.nc"))
    check_box(tmp_path / "4.0.nc", dipeptide.topology, system)
    check_box(tmp_path / "4.1.nc", dipeptide.topology, dipeptide.system)  # not periodic: whatever the file says
    with pytest.raises(InputError, match="lies in a box of"):
        check_box(tmp_path / "4.1.nc", dipeptide.topology, system)


def planted(kind, x):
    """Frames with one of the mistakes that users make."""
    x = x.copy()
    if kind == "angstrom":
        return 10 * x
    if kind == "in micrometers, nearly":
        return x / 10
    if kind == "broken":
        x[37, :9] += np.array([2.0, 0.0, 0.0])
    elif kind == "reversed":
        return x[:, ::-1]
    elif kind == "swapped":  # a methyl carbon and one of its hydrogens
        x[:, [0, 1]] = x[:, [1, 0]]
    return x


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("angstrom", "100 of 100 frames.*angstrom"),
        ("in micrometers, nearly", "100 of 100 frames.*nanometers"),
        ("broken", "1 of 100 frames.*first frame 37.*whole"),
        ("reversed", "100 of 100 frames.*order"),
        ("swapped", "100 of 100 frames.*order"),
    ],
)
@pytest.mark.parametrize("constraints", ["None", "HBonds"])
def test_frames_that_cannot_be_the_molecule(frames, tmp_path, kind, message, constraints):
    molecule = load_system("alanine-dipeptide", constraints=constraints)
    check_bond_lengths(frames, molecule.system, 300.0, "frames")
    with pytest.raises(InputError, match=message):
        check_bond_lengths(planted(kind, frames), molecule.system, 300.0, "frames")
    topology = mdtraj.Topology.from_openmm(molecule.topology)
    mdtraj.Trajectory(planted(kind, frames), topology).save(str(tmp_path / "a.dcd"))
    with pytest.raises(InputError, match=r"a.dcd: .*cannot be this molecule"):
        molecule.load_trajectory(tmp_path / "a.dcd")


def test_a_system_without_bonds_says_nothing():
    system = openmm.System()
    for _ in range(3):
        system.addParticle(1.0)
    check_bond_lengths(np.random.default_rng(0).normal(size=(5, 3, 3)), system, 300.0, "frames")


def test_soft_terms_and_bonds_across_a_box_are_no_bonds(dipeptide, frames):
    """A restraint between two atoms, a pin of length zero, and bonds to the nearest image."""
    system = copy.deepcopy(dipeptide.system)
    soft, periodic = openmm.HarmonicBondForce(), openmm.HarmonicBondForce()
    soft.addBond(0, 20, 5.0, 4000.0)
    soft.addBond(1, 21, 0.0, 1e6)
    periodic.addBond(0, 20, 0.1, 3e5)
    periodic.setUsesPeriodicBoundaryConditions(True)
    for force in (soft, periodic):
        system.addForce(force)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_bond_lengths(frames, system, 300.0, "frames")
        with pytest.raises(InputError, match="angstrom"):
            check_bond_lengths(10 * frames, system, 300.0, "frames")


def test_strides(dipeptide, frames, tmp_path):
    for name in ("a.h5", "a.dcd"):
        mdtraj.Trajectory(frames, mdtraj.Topology.from_openmm(dipeptide.topology)).save(str(tmp_path / name))
        for stride in (0, -1):
            with pytest.raises(InputError, match=f"stride is {stride}"):
                dipeptide.load_trajectory(tmp_path / name, stride=stride)
        with pytest.raises(InputError, match=r"1 frame.*at a stride of 100"):
            dipeptide.load_trajectory(tmp_path / name, stride=100)


# --- structures ---


def in_order(molecule, order, path, bonds=True):
    """The structure as a PDB file with its atoms in another order."""
    topology, atoms = app.Topology(), list(molecule.topology.atoms())
    residue, new = topology.addResidue("LIG", topology.addChain()), {}
    for i in order:
        new[i] = topology.addAtom(f"{atoms[i].element.symbol}{i}", atoms[i].element, residue)
    for a, b in molecule.topology.bonds() if bonds else ():
        topology.addBond(new[a.index], new[b.index])
    with open(path, "w") as file:
        app.PDBFile.writeFile(topology, molecule.positions[list(order)] * unit.nanometer, file)
    return path


@pytest.mark.parametrize("constraints", ["None", "HBonds", "HAngles"])
def test_a_structure_in_another_order_than_the_system_is_refused(dipeptide, tmp_path, constraints):
    molecule = load_system("alanine-dipeptide", constraints=constraints)
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(molecule.system))

    def load(order, **options):
        pdb = in_order(molecule, order, tmp_path / "structure.pdb", **options)
        return load_system(pdb, system_xml=tmp_path / "system.xml", temperature=300)

    same = list(range(22))
    assert load(same).n_atoms == 22
    for order in (same[::-1], [1, 0, *same[2:]], [*same[:8], 9, 8, *same[10:]], same[1:] + same[:1]):
        with pytest.raises(InputError, match="different orders of atoms"):
            load(order)
    load([1, 0, *same[2:]], bonds=False)  # a file without bonds has no order


def with_morse_bonds(system, which, restraint=False):
    """The System with some of its bonds (by rank) as a CustomBondForce, and a soft restraint as a harmonic bond."""
    system = copy.deepcopy(system)
    (harmonic,) = (f for f in system.getForces() if isinstance(f, openmm.HarmonicBondForce))
    morse, kept = openmm.CustomBondForce("400*(1-exp(-a*(r-r0)))^2"), openmm.HarmonicBondForce()
    for name in ("a", "r0"):
        morse.addPerBondParameter(name)
    for index in range(harmonic.getNumBonds()):
        i, j, length, k = harmonic.getBondParameters(index)
        if index in which:
            morse.addBond(i, j, [(k._value / 800.0) ** 0.5, length])
        else:
            kept.addBond(i, j, length, k)
    if restraint:
        kept.addBond(0, 20, 0.8, 500.0)
    system.removeForce(force_index(system, harmonic))
    system.addForce(morse)
    system.addForce(kept)
    return system


def without_bond(system, index):
    """The System without one of the bonds of its first harmonic force."""
    system = copy.deepcopy(system)
    place = force_index(system, openmm.HarmonicBondForce())
    old, new = system.getForce(place), openmm.HarmonicBondForce()
    for k in range(old.getNumBonds()):
        if k != index:
            new.addBond(*old.getBondParameters(k))
    system.removeForce(place)
    system.addForce(new)
    return system


def force_index(system, force):
    return next(k for k, f in enumerate(system.getForces()) if isinstance(f, type(force)))


@pytest.mark.parametrize(
    ("which", "restraint"),
    [({3}, False), (set(range(21)), False), (set(range(21)), True)],
    ids=["one", "all", "restrained"],
)
def test_bonds_of_other_forms_are_bonds(dipeptide, tmp_path, which, restraint):
    """A structure and a flow belong to a System whose bonds are not all harmonic."""
    system = with_morse_bonds(dipeptide.system, which, restraint)
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    order = list(range(22))
    pdb = in_order(dipeptide, order, tmp_path / "structure.pdb")
    molecule = load_system(pdb, system_xml=tmp_path / "system.xml", temperature=300)
    coordinates = flows.coordinates_for(dipeptide.topology, dipeptide.reference("test")[:1000])
    flow = flows.spline(coordinates, n_layers=2, hidden=8)
    FlowProposal(flow, TorchPotential(molecule.system), 300.0)
    with pytest.raises(InputError, match="different orders of atoms"):
        wrong = in_order(dipeptide, [1, 0, *order[2:]], tmp_path / "wrong.pdb")
        load_system(wrong, system_xml=tmp_path / "system.xml", temperature=300)


def test_bonds_that_no_force_shows_are_no_mistake(dipeptide, tmp_path):
    """As of a neural network, beside a restraint."""
    system = copy.deepcopy(dipeptide.system)
    system.removeForce(force_index(system, openmm.HarmonicBondForce()))
    restraint = openmm.HarmonicBondForce()
    restraint.addBond(0, 20, 0.8, 500.0)
    system.addForce(restraint)
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    pdb = in_order(dipeptide, range(22), tmp_path / "structure.pdb")
    molecule = load_system(pdb, system_xml=tmp_path / "system.xml", temperature=300)
    coordinates = flows.coordinates_for(dipeptide.topology, dipeptide.reference("test")[:1000])
    FlowProposal(flows.spline(coordinates, n_layers=2, hidden=8), TorchPotential(molecule.system), 300.0)


@pytest.mark.parametrize("masses", ["heavy hydrogens", "as they are"])
@pytest.mark.parametrize("urey_bradley", [False, True])
def test_ends_of_angles_and_heavy_hydrogens_are_no_other_order(dipeptide, tmp_path, masses, urey_bradley):
    """Also where a bond is left out, as of an alchemical region."""
    system = copy.deepcopy(dipeptide.system)
    if masses == "heavy hydrogens":
        for a, b in dipeptide.topology.bonds():
            heavy, light = (a, b) if b.element is app.element.hydrogen else (b, a)
            if light.element is app.element.hydrogen:
                system.setParticleMass(light.index, 4.0)
                system.setParticleMass(heavy.index, system.getParticleMass(heavy.index)._value - 2.992)
        assert min(system.getParticleMass(i)._value for i in range(22)) < 4.0
    if urey_bradley:
        terms = openmm.HarmonicBondForce()
        terms.addBond(0, 2, 0.18, 2e4)
        terms.addBond(0, 3, 0.18, 2e4)
        system.addForce(terms)
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(without_bond(system, 5)))
    pdb = in_order(dipeptide, range(22), tmp_path / "structure.pdb")
    load_system(pdb, system_xml=tmp_path / "system.xml", temperature=300)


# --- chirality ---


def mirrored(molecule):
    """The molecule with every residue D."""
    return MolecularSystem("d", molecule.topology, molecule.system, molecule.positions * [1, 1, -1], 300.0)


def test_a_d_residue_is_right_where_the_structure_has_it(dipeptide, frames):
    mirror = mirrored(dipeptide)
    assert not metrics.wrong_chirality(frames, dipeptide.chiral_centres).any()
    assert not metrics.wrong_chirality(frames * [1, 1, -1], mirror.chiral_centres).any()
    assert metrics.wrong_chirality(frames, mirror.chiral_centres).all()
    assert metrics.wrong_chirality(frames * [1, 1, -1], dipeptide.chiral_centres).all()


def test_a_file_that_ends_before_what_it_announces(dipeptide, frames, tmp_path):
    """mdtraj reads what there is and prints a warning, which nobody sees."""
    path = tmp_path / "whole.dcd"
    mdtraj.Trajectory(frames[:90], mdtraj.Topology.from_openmm(dipeptide.topology)).save_dcd(str(path))
    assert len(load_trajectory(path, dipeptide.topology)) == 90
    content = path.read_bytes()
    (tmp_path / "CUT.DCD").write_bytes(content[: len(content) // 2 + 37])
    with pytest.raises(CorruptFileError, match="announces 90 frames and ends after 44"):
        load_trajectory(tmp_path / "CUT.DCD", dipeptide.topology)
    (tmp_path / "stored.nc").write_bytes(b"CDF")
    (tmp_path / "trajectory.h5").touch()
    with pytest.raises(CorruptFileError, match=r"give the trajectory\.h5 beside it"):
        load_trajectory(tmp_path / "stored.nc", dipeptide.topology)
