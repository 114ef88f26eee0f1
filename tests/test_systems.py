"""Named systems, a user's own files, fingerprints, reference files, analytic toys."""

import copy
import subprocess
import sys
import zipfile
from pathlib import Path

import mdtraj
import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from openmmtools import testsystems

from openmm_regflow import metrics, systems
from openmm_regflow.errors import InputError
from openmm_regflow.fingerprints import compare_fingerprints, fingerprint
from openmm_regflow.flows import Flow
from openmm_regflow.refusals import check_flow
from openmm_regflow.simulate import export_hdf5, with_hydrogen_mass
from openmm_regflow.systems import (
    available_systems,
    load_system,
)
from openmm_regflow.toys import harmonic_well, skewed_double_well
from openmm_regflow.units import thermal_energy

EXPECTED = {
    # atoms, temperature [K], residues with phi and psi, nonbonded method of the NonbondedForce
    "alanine-dipeptide": (22, 300.0, 1, 1, openmm.NonbondedForce.NoCutoff),
    "alanine-tripeptide": (33, 310.0, 2, 2, openmm.NonbondedForce.CutoffNonPeriodic),
    "alanine-tetrapeptide": (42, 300.0, 3, 3, openmm.NonbondedForce.NoCutoff),
    "alanine-hexapeptide": (62, 300.0, 5, 5, openmm.NonbondedForce.NoCutoff),
}


@pytest.fixture(scope="module")
def dipeptide():
    return load_system("alanine-dipeptide")


def forces_of(system: openmm.System) -> dict:
    return {type(force).__name__: force for force in system.getForces()}


def test_available_systems():
    assert set(EXPECTED) <= set(available_systems())


@pytest.mark.parametrize("name", EXPECTED)
def test_named_system(name):
    n_atoms, temperature, n_phi, n_psi, method = EXPECTED[name]
    molecule = load_system(name)
    assert molecule.name == name
    assert molecule.n_atoms == n_atoms == molecule.topology.getNumAtoms()
    assert molecule.temperature == temperature
    assert molecule.positions.shape == (n_atoms, 3)
    assert molecule.positions.dtype == np.float64
    assert molecule.system.getNumConstraints() == 0
    assert not molecule.system.usesPeriodicBoundaryConditions()
    forces = forces_of(molecule.system)
    assert forces["NonbondedForce"].getNonbondedMethod() == method
    assert "CMMotionRemover" not in forces
    assert molecule.torsions("phi").shape == (n_phi, 4)
    assert molecule.torsions("psi").shape == (n_psi, 4)
    masses = [molecule.system.getParticleMass(a.index)._value for a in molecule.topology.atoms()]
    elements = [a.element.mass._value for a in molecule.topology.atoms()]
    np.testing.assert_allclose(masses, elements, atol=0.01)  # force fields round masses to 0.01 dalton


@pytest.mark.parametrize("name", EXPECTED)
def test_structures_are_relaxed_l_peptides_with_trans_bonds(name):
    molecule = load_system(name)
    rows = [{atom.name: atom.index for atom in residue.atoms()} for residue in molecule.topology.residues()]
    rows = [[at[name] for name in ("CA", "N", "C", "CB")] for at in rows if "CB" in at]
    assert len(rows) >= EXPECTED[name][2] and np.array_equal(molecule.chiral_centres, rows)
    assert (metrics.chiral_volumes(molecule.positions[None], rows) > 0).all()
    omega = metrics.dihedrals(molecule.positions, molecule.torsions("omega"))
    assert np.all(np.abs(omega) > np.radians(150))
    context = openmm.Context(molecule.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(molecule.positions)
    before = context.getState(energy=True).getPotentialEnergy()._value
    openmm.LocalEnergyMinimizer.minimize(context, 0.1)
    after = context.getState(energy=True).getPotentialEnergy()._value
    # A PDB file rounds to 1e-4 nm: a harmonic dof of stiffness k costs k/2 (1e-4)^2/12, k below 1e6 kJ/mol/nm^2.
    assert before - after < 3 * molecule.n_atoms * 0.5 * 1e6 * 1e-8 / 12 * 3


@pytest.mark.parametrize("kind, size", [("phi", 1), ("psi", 1), ("omega", 2)])
def test_torsions_agree_with_mdtraj(dipeptide, kind, size):
    trajectory = mdtraj.Trajectory(dipeptide.positions[None], mdtraj.Topology.from_openmm(dipeptide.topology))
    rows = dipeptide.torsions(kind)
    assert rows.shape == (size, 4)
    if kind != "omega":  # mdtraj takes only residues with CA for omega, and so leaves out both caps
        expected, _ = getattr(mdtraj, f"compute_{kind}")(trajectory)
        assert np.array_equal(rows, expected)


@pytest.mark.parametrize(
    ("name", "n"), [("alanine-dipeptide", 1), ("alanine-tripeptide", 1), ("alanine-hexapeptide", 5)]
)
def test_residues_with_both_torsions(name, n):
    """The tripeptide has free ends: its first psi and its last phi are of residues that lack the other."""
    molecule = load_system(name)
    both, residues = molecule.backbone_residues, [atom.residue.index for atom in molecule.topology.atoms()]
    assert both.shape == (n, 2, 4) and np.array_equal(both[:, 0, 1:], both[:, 1, :3])
    for phi, psi in both:
        assert len({residues[i] for i in (*phi[1:], *psi[:3])}) == 1
        assert phi.tolist() in molecule.torsions("phi").tolist() and psi.tolist() in molecule.torsions("psi").tolist()
    whole = name != "alanine-tripeptide"
    assert (len(molecule.torsions("phi")) == len(molecule.torsions("psi")) == n) is whole


def test_unknown_torsion(dipeptide):
    with pytest.raises(InputError, match=r"chi.*phi"):
        dipeptide.torsions("chi")


def write_folder(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "structure.pdb").write_text((systems.systems_folder() / "alanine-dipeptide/structure.pdb").read_text())
    (folder / "system.toml").write_text(text)
    return folder


FORCE_FIELD = 'force_field = ["amber99sbildn.xml", "amber99_obc.xml"]\n'


def test_own_folder_is_the_same_system(tmp_path, dipeptide):
    folder = write_folder(tmp_path / "mine", FORCE_FIELD + "temperature = 310\n")
    molecule = load_system(folder)
    assert (molecule.name, molecule.temperature) == ("mine", 310.0)
    assert compare_fingerprints(dipeptide.fingerprint, molecule.fingerprint, masses=True) == []
    assert load_system(str(folder), temperature=350 * unit.kelvin).temperature == 350.0


def test_pdb_with_force_field_or_system_xml(tmp_path, dipeptide):
    pdb = write_folder(tmp_path / "mine", "") / "structure.pdb"
    from_force_field = load_system(pdb, force_field=["amber99sbildn.xml", "amber99_obc.xml"], temperature=300)
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(dipeptide.system))
    from_xml = load_system(pdb, system_xml=tmp_path / "system.xml", temperature=300 * unit.kelvin)
    for molecule in (from_force_field, from_xml):
        assert molecule.name == "structure"
        assert molecule.fingerprint["sha256"] == dipeptide.fingerprint["sha256"]
        assert molecule.positions.shape == (22, 3)
    with pytest.raises(InputError, match=r"temperature="):
        load_system(pdb, force_field=["amber99sbildn.xml"])


def test_folder_with_system_xml(tmp_path, dipeptide):
    folder = write_folder(tmp_path / "xml", 'system_xml = "system.xml"\ntemperature = 300.0\n')
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(dipeptide.system))
    assert load_system(folder).fingerprint["sha256"] == dipeptide.fingerprint["sha256"]


@pytest.mark.parametrize("constraints", [None, app.HBonds])
def test_a_ligand_without_conect_records_has_the_bonds_of_its_system(tmp_path, constraints):
    """All of them and no other: not the ends of angles that constraints or Urey-Bradley terms join, nor a restraint."""
    made = testsystems.TolueneVacuum(constraints=constraints)
    bonds = {frozenset((a.index, b.index)) for a, b in made.topology.bonds()}
    extra = openmm.HarmonicBondForce()
    neighbours = {k: [min(p - {k}) for p in bonds if k in p] for k in range(15)}
    extra.addBond(*neighbours[0][:2], 0.25, 1000.0)  # as a Urey-Bradley term
    x = made.positions.value_in_unit(unit.nanometer)
    far = int(np.linalg.norm(x - x[0], axis=1).argmax())
    extra.addBond(0, far, 0.5, 100.0)
    made.system.addForce(extra)
    near = openmm.CustomBondForce("k/r^12")  # as force fields with a LennardJonesForce write 1-4 terms
    near.addGlobalParameter("k", 1e-8)
    graph = {k: {i for p in bonds if k in p for i in p - {k}} for k in range(15)}
    for i in range(15):
        two = {k for j in graph[i] for k in graph[j]}
        for j in {k for m in two for k in graph[m]} - two - graph[i] - {i}:
            if i < j:
                near.addBond(i, j, [])
    assert near.getNumBonds() > 10
    made.system.addForce(near)
    made.system.addConstraint(*neighbours[0][1:3], 0.25)
    with open(tmp_path / "structure.pdb", "w") as file:
        app.PDBFile.writeFile(made.topology, made.positions, file)
    lines = (tmp_path / "structure.pdb").read_text().splitlines(keepends=True)
    (tmp_path / "structure.pdb").write_text("".join(line for line in lines if not line.startswith("CONECT")))
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(made.system))
    (tmp_path / "system.toml").write_text('system_xml = "system.xml"\ntemperature = 300.0\n')
    with pytest.warns(UserWarning, match="no bonds .CONECT records. of TOL"):
        mol = load_system(tmp_path)
    assert {frozenset((a.index, b.index)) for a, b in mol.topology.bonds()} == bonds


@pytest.mark.parametrize(
    "text, message",
    [
        (FORCE_FIELD + "temperature = 300\ntemprature = 1", "temprature.*known keys"),
        (FORCE_FIELD + "temperature = 0", "temperature: .*greater than 0"),
        (FORCE_FIELD + "temperature = -3", "temperature"),
        (FORCE_FIELD + "temperature = nan", "temperature"),
        (FORCE_FIELD, "temperature: Field required"),
        ("temperature = 300", "either force_field"),
        (FORCE_FIELD + 'temperature = 300\nsystem_xml = "a.xml"', "either force_field"),
        (FORCE_FIELD + 'temperature = 300\nnonbonded_method = "Ewlad"', "nonbonded_method"),
        (FORCE_FIELD + 'temperature = 300\nstructure = "absent.pdb"', "no structure at .*absent.pdb"),
        ('force_field = ["no-such.xml"]\ntemperature = 300', "no-such.xml"),
        ('force_field = ["tip3p.xml"]\ntemperature = 300', "does not fit"),
        ('system_xml = "absent.xml"\ntemperature = 300', "no serialised System at .*absent.xml"),
        ('system_xml = "structure.pdb"\ntemperature = 300', "not a serialised System"),
        ("temperature = = 3", "not valid TOML"),
    ],
)
def test_bad_system_toml(tmp_path, text, message):
    folder = write_folder(tmp_path / "bad", text)
    with pytest.raises(InputError, match=message) as caught:
        load_system(folder)
    assert "\n" not in str(caught.value).split("does not fit")[0]


def test_unknown_system_lists_what_exists():
    with pytest.raises(InputError, match=r"alanine-dipetide.*alanine-dipeptide.*alanine-hexapeptide"):
        load_system("alanine-dipetide")


def test_folder_without_toml_and_system_of_other_size(tmp_path, dipeptide):
    with pytest.raises(InputError, match=r"no system.toml"):
        load_system(tmp_path)
    folder = write_folder(tmp_path / "xml", 'system_xml = "system.xml"\ntemperature = 300.0\n')
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(load_system("alanine-tetrapeptide").system))
    with pytest.raises(InputError, match=r"42 particles, the structure 22"):
        load_system(folder)


def test_unreadable_pdb(tmp_path):
    folder = write_folder(tmp_path / "pdb", FORCE_FIELD + "temperature = 300\n")
    (folder / "structure.pdb").write_text("ATOM      1  CH3 ACE A   1      -0.053   x.054   0.047\n")
    with pytest.raises(InputError, match=r"not a readable PDB"):
        load_system(folder)


@pytest.mark.parametrize("temperature", [0, -1 * unit.kelvin, float("nan"), 1 * unit.nanometer])
def test_absurd_temperature(temperature):
    with pytest.raises(InputError, match=r"temperature"):
        load_system("alanine-dipeptide", temperature=temperature)


# --- reference files ---


def noisy_frames(molecule, n: int) -> np.ndarray:
    noise = np.random.default_rng(0).normal(scale=0.001, size=(n, molecule.n_atoms, 3))
    return (molecule.positions + noise).astype(np.float32)


def test_reference_comes_back_bit_for_bit(tmp_path, dipeptide):
    folder = write_folder(tmp_path / "mine", FORCE_FIELD + "temperature = 300\n")
    frames = noisy_frames(dipeptide, 5)
    export_hdf5(frames, dipeptide.topology, folder / "reference/train.h5")
    loaded = load_system(folder).reference("train")
    assert loaded.dtype == np.float32
    assert np.array_equal(loaded, frames)
    assert np.array_equal(mdtraj.load(folder / "reference/train.h5").xyz, frames)


def test_missing_split_and_unknown_split(tmp_path):
    molecule = load_system(write_folder(tmp_path / "mine", FORCE_FIELD + "temperature = 300\n"))
    with pytest.raises(InputError, match=r"no test reference.*simulate"):
        molecule.reference("test")
    with pytest.raises(InputError, match=r"trian.*train, validation, test"):
        molecule.reference("trian")


# --- fingerprints ---


def test_fingerprint_ignores_what_leaves_energies_alone(dipeptide):
    system = copy.deepcopy(dipeptide.system)
    system.addForce(openmm.CMMotionRemover())
    for number, force in enumerate(system.getForces()):
        force.setForceGroup(number)
        force.setName(f"renamed {number}")
    heavy = with_hydrogen_mass(system, 4.0)
    assert fingerprint(heavy)["sha256"] == dipeptide.fingerprint["sha256"]
    assert compare_fingerprints(dipeptide.fingerprint, fingerprint(heavy)) == []
    assert "masses of 12 atoms" in compare_fingerprints(dipeptide.fingerprint, fingerprint(heavy), masses=True)[0]
    again = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    assert fingerprint(again) == fingerprint(system)


def change_charge(system):
    force = forces_of(system)["NonbondedForce"]
    charge, sigma, epsilon = force.getParticleParameters(3)
    force.setParticleParameters(3, charge * 1.001, sigma, epsilon)


def swap_bond_atoms(system):
    force = forces_of(system)["HarmonicBondForce"]
    a, b, length, k = force.getBondParameters(0)
    force.setBondParameters(0, a, b + 1, length, k)


def drop_solvent(system):
    system.removeForce(next(i for i, f in enumerate(system.getForces()) if isinstance(f, openmm.GBSAOBCForce)))


def add_force(system):
    system.addForce(openmm.CustomExternalForce("x"))


def constrain(system):
    system.addConstraint(0, 1, 0.1)


def add_bond(system):
    forces_of(system)["HarmonicBondForce"].addBond(0, 7, 0.1, 10.0)


@pytest.mark.parametrize(
    "change, message",
    [
        (change_charge, "NonbondedForce: parameters or atom order differ"),
        (swap_bond_atoms, "HarmonicBondForce: parameters or atom order differ"),
        (drop_solvent, "GBSAOBCForce is missing"),
        (add_force, "CustomExternalForce is not expected"),
        (constrain, "Constraints is not expected"),
        (add_bond, r"HarmonicBondForce: \[21\] terms expected, \[22\] found"),
    ],
)
def test_fingerprint_names_the_difference(dipeptide, change, message):
    system = copy.deepcopy(dipeptide.system)
    change(system)
    other = fingerprint(system)
    assert other["sha256"] != dipeptide.fingerprint["sha256"]
    lines = compare_fingerprints(dipeptide.fingerprint, other)
    assert len(lines) == 1
    import re

    assert re.search(message, lines[0])


def with_parameters(*names):
    force = openmm.CustomExternalForce("a*x^2 + b*y^2")
    for name, value in zip(names, (1.0, 50.0)):
        force.addGlobalParameter(name, value)
    force.addParticle(0, [])
    return force


def with_exclusions(kind):
    force = openmm.CustomGBForce()
    force.addComputedValue("I", "1", kind)
    force.addEnergyTerm("I^2", openmm.CustomGBForce.SingleParticle)
    for _ in range(3):
        force.addParticle([])
    force.addExclusion(0, 1)
    return force


def with_functions(*names):
    force = openmm.CustomCompoundBondForce(2, "f(distance(p1, p2)) + 2*g(distance(p1, p2))")
    for name, values in zip(names, ([0.0, 1.0], [0.0, 7.0])):
        force.addTabulatedFunction(name, openmm.Continuous1DFunction(values, 0.0, 1.0))
    force.addBond([0, 1], [])
    return force


def with_types(*types):
    force = openmm.CustomManyParticleForce(3, "distance(p1, p2)")
    for kind in types:
        force.addParticle([], kind)
    force.setTypeFilter(0, [1])
    force.setTypeFilter(1, [0])
    force.setTypeFilter(2, [0])
    return force


#: Two forces that differ by a name or a type inside of them, and the energies are not the same.
NAMES = {
    "global parameters": (lambda: with_parameters("a", "b"), lambda: with_parameters("b", "a")),
    "computed values": (
        lambda: with_exclusions(openmm.CustomGBForce.ParticlePair),
        lambda: with_exclusions(openmm.CustomGBForce.ParticlePairNoExclusions),
    ),
    "functions": (lambda: with_functions("f", "g"), lambda: with_functions("g", "f")),
    "types of particles": (lambda: with_types(0, 0, 1), lambda: with_types(1, 0, 0)),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_inside_of_a_force_are_part_of_its_fingerprint(name):
    found, energies = [], []
    for make in NAMES[name]:
        system = openmm.System()
        for _ in range(3):
            system.addParticle(12.0)
        system.addForce(make())
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
        context.setPositions([[0.1, 0.3, 0.0], [0.6, 0.2, 0.1], [0.3, 0.9, 0.4]])
        energies.append(context.getState(energy=True).getPotentialEnergy()._value)
        found.append(fingerprint(system))
        system.getForce(0).setName("renamed")
        assert fingerprint(system) == found[-1]
    assert energies[0] != pytest.approx(energies[1])
    assert found[0]["sha256"] != found[1]["sha256"] and len(compare_fingerprints(*found)) == 1


@pytest.mark.parametrize("name", ["alanine-dipeptide", "alanine-tripeptide", "alanine-tetrapeptide"])
def test_fingerprints_of_the_first_version_in_shipped_flows(name):
    """Those of flows that are shipped belong to their Systems still, and to no others."""
    molecule = load_system(name)
    stored = Flow.load(molecule.folder / "flow.safetensors").metadata.fingerprint
    assert compare_fingerprints(stored, fingerprint(molecule.system, like=stored)) == []
    check_flow(Flow.load(molecule.folder / "flow.safetensors"), molecule.system, molecule.temperature)
    other = copy.deepcopy(molecule.system)
    change_charge(other)
    assert len(compare_fingerprints(stored, fingerprint(other, like=stored))) == 1
    assert molecule.fingerprint["version"] == 2
    with pytest.raises(InputError, match="version 3; update"):
        fingerprint(molecule.system, like={"version": 3})


def test_fingerprints_of_two_molecules():
    lines = compare_fingerprints(
        load_system("alanine-dipeptide").fingerprint, load_system("alanine-tripeptide").fingerprint
    )
    assert lines[0] == "22 atoms expected, 33 found"
    assert "GBSAOBCForce is missing" in lines
    assert "CustomGBForce is not expected" in lines


# --- analytic systems ---

TOYS = {
    "harmonic": lambda: harmonic_well(n_atoms=2, spring=800.0, centre=np.array([[0.1, 0, 0], [0, 0.3, -0.2]])),
    "skewed": lambda: skewed_double_well(n_atoms=2, barrier=8.0, skew=3.0, width=0.12, temperature=320.0),
}


@pytest.mark.parametrize("name", TOYS)
def test_toy_energy_is_that_of_its_system(name):
    toy = TOYS[name]()
    context = openmm.Context(toy.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    x = toy.sample(5, torch.Generator().manual_seed(0))
    for row, energy in zip(x, toy.energy(x)):
        context.setPositions(row.numpy())
        found = context.getState(energy=True).getPotentialEnergy()._value
        # Two orders of summation of at most six terms of a few kJ/mol.
        assert found == pytest.approx(float(energy), rel=16 * np.finfo(np.float64).eps)


@pytest.mark.parametrize("name", TOYS)
def test_toy_density_normalises(name):
    """E_q[p/q] = 1 for a Gaussian q wider than p: the oracle itself has to be right."""
    toy = TOYS[name]()
    generator = torch.Generator().manual_seed(1)
    n = 200_000
    centre = torch.as_tensor(toy.centre)
    scale = torch.full(centre.shape, 1.2 * (thermal_energy(toy.temperature) / toy.spring) ** 0.5, dtype=torch.float64)
    if toy.barrier:
        scale[0, 0] = 1.5 * toy.width
    normal = torch.distributions.Normal(centre, scale)
    x = centre + scale * torch.randn(n, *centre.shape, dtype=torch.float64, generator=generator)
    ratio = (toy.log_prob(x) - normal.log_prob(x).sum(dim=(1, 2))).exp()
    assert abs(float(ratio.mean()) - 1.0) < 4.0 * float(ratio.std()) / n**0.5


@pytest.mark.parametrize("planted", [0.0, 0.02])
def test_toy_samples_follow_the_density(planted):
    """Moments of exact samples against quadrature, within 4 standard errors; a planted 2 % of the width shows."""
    toy = TOYS["skewed"]()
    n = 100_000
    x = toy.sample(n, torch.Generator().manual_seed(2)) + planted * toy.width
    kt = thermal_energy(toy.temperature)
    grid = np.linspace(-0.5, 0.5, 20_001)
    s = grid / toy.width
    density = np.exp(-(toy.barrier * (s**2 - 1) ** 2 + toy.skew * s) / kt)
    wrong = False
    for power in (1, 2, 3):
        exact = np.sum(grid**power * density) / np.sum(density)
        values = x[:, 0, 0] ** power
        wrong |= abs(float(values.mean()) - exact) > 4.0 * float(values.std()) / n**0.5
    assert wrong == (planted > 0)


def test_delta_f_of_the_wells_is_what_sampling_counts():
    toy = TOYS["skewed"]()
    x = toy.sample(100_000, torch.Generator().manual_seed(3))[:, 0, 0]
    estimate = metrics.basin_delta_f(x.numpy(), basin_a=(-3.0, 0.0), basin_b=(0.0, 3.0))
    assert abs(estimate.value - toy.delta_f()) < 4.0 * estimate.error
    assert toy.delta_f() > 10.0 * estimate.error  # skewed, so that a wrong sign cannot pass


def test_log_z_of_a_harmonic_well_and_its_temperature():
    toy = harmonic_well(n_atoms=3, spring=500.0, temperature=300 * unit.kelvin)
    # log Z = (3n/2) log(2 pi kT / k), so doubling T adds (9/2) log 2.
    assert toy.log_z(600.0) - toy.log_z() == pytest.approx(4.5 * np.log(2.0), rel=1e-12)
    energies = toy.energy(toy.sample(50_000, torch.Generator().manual_seed(4))) / thermal_energy(300.0)
    # Mean 9/2 kT, variance 9/2 (kT)^2.
    assert abs(float(energies.mean()) - 4.5) < 4.0 * (4.5 / 50_000) ** 0.5


def test_toys_are_reproducible_and_reject_nonsense():
    toy = TOYS["skewed"]()
    one, two = (toy.sample(3, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)
    for arguments in ({"barrier": 0.0}, {"skew": -1.0}, {"skew": 20.0}, {"temperature": 0}, {"n_atoms": 0}):
        with pytest.raises(InputError):
            skewed_double_well(**arguments)
    with pytest.raises(InputError, match=r"second basin"):
        harmonic_well().delta_f()
    with pytest.raises(InputError, match=r"centre has shape"):
        harmonic_well(n_atoms=2, centre=np.zeros((1, 3)))


# --- the wheel ---


@pytest.mark.slow
def test_wheel_carries_the_systems(tmp_path):
    root = Path(__file__).parents[1]
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run([*pip, str(root)], check=True, cwd=tmp_path)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    code = (
        "import openmm_regflow.systems as s; m = s.load_system('alanine-dipeptide');"
        "print(s.systems_folder(), m.n_atoms, len(m.reference('train')))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    folder, atoms, frames = result.stdout.split()
    assert Path(folder) == tmp_path / "site/openmm_regflow/_systems"
    assert (atoms, int(frames) >= 10_000) == ("22", True)


@pytest.mark.parametrize(
    "idle", [{"constraints": "HBonds"}, {"nonbonded_method": "CutoffNonPeriodic"}, {"nonbonded_cutoff": 0.5}]
)
def test_what_a_serialised_system_cannot_heed_is_refused(dipeptide, tmp_path, idle):
    """It has its own constraints and cutoffs: asking for others in silence would be another ensemble."""
    path = tmp_path / "system.xml"
    path.write_text(openmm.XmlSerializer.serialize(dipeptide.system))
    with pytest.raises(InputError, match=f"{next(iter(idle))}: only with force_field"):
        load_system(dipeptide.folder / "structure.pdb", system_xml=path, temperature=300, **idle)
    whole = load_system(dipeptide.folder, system_xml=path)  # the folder's own keys were for its force field
    assert whole.system.getNumParticles() == 22


def test_a_cutoff_that_does_nothing_is_refused():
    with pytest.raises(InputError, match="nonbonded_cutoff: does nothing"):
        load_system("alanine-dipeptide", nonbonded_cutoff=0.4)


def test_equal_forces_are_counted(dipeptide):
    """A restraint that is there twice pulls twice."""

    def with_restraints(*strengths):
        system = copy.deepcopy(dipeptide.system)
        for strength in strengths:
            force = openmm.HarmonicBondForce()
            force.addBond(0, 10, 0.5, strength)
            system.addForce(force)
        return fingerprint(system)

    assert compare_fingerprints(with_restraints(1.0, 1.0, 2.0), with_restraints(1.0, 2.0, 2.0))
    assert compare_fingerprints(with_restraints(1.0, 1.0), with_restraints(1.0), extra_forces=True)
    assert not compare_fingerprints(with_restraints(1.0, 1.0), with_restraints(1.0, 1.0, 3.0), extra_forces=True)


def test_a_folder_with_the_name_of_a_shipped_system(tmp_path, monkeypatch):
    """The shipped one is meant, which is said; a path names the other."""
    own = tmp_path / "alanine-dipeptide"
    own.mkdir()
    text = (systems.systems_folder() / "alanine-dipeptide" / "system.toml").read_text()
    (own / "system.toml").write_text(text.replace("temperature = 300.0", "temperature = 333.0"))
    (own / "structure.pdb").write_bytes((systems.systems_folder() / "alanine-dipeptide" / "structure.pdb").read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.warns(RuntimeWarning, match=r"give \./alanine-dipeptide for the folder"):
        assert load_system("alanine-dipeptide").temperature == 300.0
    assert load_system("./alanine-dipeptide").temperature == load_system(Path("alanine-dipeptide")).temperature == 333.0


def test_one_force_field_may_be_a_string():
    structure = systems.systems_folder() / "alanine-dipeptide" / "structure.pdb"
    one = load_system(structure, force_field="amber14-all.xml", temperature=300)
    assert one.fingerprint == load_system(structure, force_field=["amber14-all.xml"], temperature=300).fingerprint


def test_residues_with_two_methyls_on_their_alpha_carbon_have_a_backbone():
    """AIB names them CB1 and CB2; a cap has neither."""
    topology = app.Topology()
    chain = topology.addChain()
    for name, side in (("ACE", None), ("ALA", "CB"), ("AIB", "CB1"), ("ALA", "CB")):
        residue = topology.addResidue(name, chain)
        for atom in ("N", "CA", "C", *filter(None, [side])) if side else ("CH3", "C"):
            topology.addAtom(atom, app.element.carbon, residue)
    assert len(systems.backbone_torsions(topology, "phi")) == 3 and len(systems.backbone_torsions(topology, "psi")) == 2
