"""What is asked of a molecule before anything is trained."""

import numpy as np
import openmm
import pytest
import torch
from analytic_molecules import TEMPERATURE, Chain, chain_topology
from openmm import app, unit

from openmm_regflow import ensemble, flows, metrics, simulate
from openmm_regflow.cli import main
from openmm_regflow.errors import InputError, UnsupportedForceError
from openmm_regflow.systems import MolecularSystem, load_system


def molecule(field=None, atoms=(0,)):
    """Four atoms, some of them in a field."""
    chain = Chain(4)
    if field:
        force = openmm.CustomExternalForce(field)
        for atom in atoms:
            force.addParticle(atom, [])
        chain.system.addForce(force)
    x = chain.sample(1, None)[0].numpy()
    return MolecularSystem("chain", chain_topology(4), chain.system, x, TEMPERATURE)


def test_what_is_rare_is_told_by_the_frames():
    """phi > 0 of an L residue, phi < 0 of its mirror image, and neither of a torsion that is at home in both."""
    mol = load_system("alanine-tetrapeptide")
    frames = torch.as_tensor(mol.reference("validation"))
    rows = mol.torsions("phi")
    positive = [float((metrics.dihedrals(frames.numpy(), row[None]) > 0).mean()) for row in rows]
    found = ensemble.rare_phi(mol, frames)
    assert [float(inside(frames).double().mean()) for inside in found] == positive and max(positive) < 0.25
    mirrored = frames * torch.tensor([-1.0, 1.0, 1.0])
    found = ensemble.rare_phi(mol, mirrored)
    assert [float(inside(mirrored).double().mean()) for inside in found] == pytest.approx(positive)
    assert ensemble.rare_phi(mol, torch.cat([frames, mirrored])) == []


@pytest.mark.parametrize(
    ("field", "held"),
    [
        (None, False),
        ("5*(x^2+y^2+z^2)", True),
        ("1000*max(0, sqrt(x^2+y^2+z^2)-6)^2", True),
        ("1000*max(0, sqrt(x^2+y^2+z^2)-20)^2", True),
    ],
)
def test_whether_forces_hold_a_molecule(field, held):
    mol = molecule(field)
    frames = np.stack([mol.positions, np.zeros_like(mol.positions)])  # one of them nonsense, as a template may be
    assert ensemble.is_held(mol, frames) is held


@pytest.mark.parametrize("field", ["500*z^2", "8*x", "1000*max(0, x-5)^2", "1000*max(0, 5-x)^2"])
def test_a_place_without_a_distribution_is_refused(field):
    """A plane, a slope, walls on one side."""
    mol = molecule(field)
    with pytest.raises(InputError, match="restrain its centre"):
        ensemble.is_held(mol, mol.positions[None])


def test_frames_that_no_energy_is_of_are_refused():
    mol = molecule("5*x^2")
    with pytest.raises(InputError, match="none of the frames has a finite energy"):
        ensemble.is_held(mol, np.full((3, 4, 3), np.nan))


def test_a_field_that_turns_a_molecule_without_a_place_is_refused():
    chain = Chain(4)
    for atom, expression in ((0, "8*x"), (1, "-8*x")):  # a dipole in a field
        force = openmm.CustomExternalForce(expression)
        force.addParticle(atom, [])
        chain.system.addForce(force)
    x = chain.sample(1, None)[0].numpy()
    with pytest.raises(InputError, match="restrain its centre"):
        ensemble.is_held(MolecularSystem("chain", chain_topology(4), chain.system, x, TEMPERATURE), x[None])


def test_what_no_flow_can_be_of_is_refused():
    plain = molecule()
    ensemble.check_trainable(plain)
    plain.system.setParticleMass(2, 0.0)
    with pytest.raises(UnsupportedForceError, match="has no mass"):
        ensemble.check_trainable(plain)
    plain.system.setVirtualSite(2, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    with pytest.raises(UnsupportedForceError, match="virtual site"):
        ensemble.check_trainable(plain)


def test_of_a_periodic_system_only_a_part_can_be_moved():
    plain = molecule()
    plain.system.setDefaultPeriodicBoxVectors(*(3.0 * openmm.Vec3(*row) for row in ((1, 0, 0), (0, 1, 0), (0, 0, 1))))
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(force.CutoffPeriodic)
    for _ in range(4):
        force.addParticle(0.0, 0.1, 0.0)
    plain.system.addForce(force)
    with pytest.warns(UserWarning, match="can move a part of a box"):
        ensemble.check_trainable(plain)
    assert not ensemble.is_held(plain, plain.positions[None])


def test_train_and_refine_of_a_held_molecule(tmp_path, capsys):
    """Frames stay in their place; a flow that takes the molecule as free is not refined there."""
    mol, folder = molecule("250*((x-0.5)^2+y^2+z^2)", range(4)), tmp_path / "held"
    folder.mkdir()
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(mol.system))
    (folder / "system.toml").write_text('system_xml = "system.xml"\ntemperature = 300.0\n')
    with open(folder / "structure.pdb", "w") as handle:
        app.PDBFile.writeFile(mol.topology, mol.positions * unit.nanometer, handle)
    integrator = openmm.LangevinMiddleIntegrator(300, 5, 0.001)
    context = openmm.Context(mol.system, integrator, openmm.Platform.getPlatform("Reference"))
    context.setPositions(mol.positions)
    frames = []
    for _ in range(600):
        integrator.step(20)
        frames.append(context.getState(positions=True).getPositions(asNumpy=True)._value)
    frames = np.array(frames, dtype=np.float32)[100:]
    for name, rows in (("a", slice(0, 400)), ("b", slice(400, None))):
        simulate.export_hdf5(frames[rows], mol.topology, folder / f"{name}.h5")
    config = tmp_path / "run.toml"
    short = "train = {steps = 20, batch_size = 64, warmup = 2}"
    config.write_text(
        f'coordinates = "cartesian"\nobjective = "mle"\n[flow]\nn_layers = 2\nhidden = 8\n[likelihood]\n{short}\n'
    )

    def run(*words):
        with pytest.raises(SystemExit) as done:
            main(list(map(str, words)))
        return done.value.code, "".join(capsys.readouterr())

    data = ("--data", folder / "a.h5", "--validation", folder / "b.h5")
    code, said = run("train", folder, "--config", config, *data, "-o", tmp_path / "flow")
    assert code == 0, said
    flow = flows.Flow.load(tmp_path / "flow" / "flow.safetensors")
    assert flow.coordinates.place == pytest.approx(frames[:400].mean((0, 1)), abs=1e-5)
    free = flows.real_nvp(flows.coordinates_for(mol.topology, frames[:400], "cartesian"), n_layers=2, hidden=8)
    free.metadata = flow.metadata
    free.save(tmp_path / "free.safetensors")
    options = ("--system", folder, "--data", folder / "a.h5", "--rounds", 1, "--pool", 500, "--anchors", 100)
    code, said = run("refine", tmp_path / "free.safetensors", *options, "-o", tmp_path / "refined")
    assert code == 2 and "takes it as free" in said
    code, said = run("refine", tmp_path / "flow" / "flow.safetensors", *options, "-o", tmp_path / "refined")
    assert code == 0, said
    config.write_text(config.read_text().replace("cartesian", "internal"))
    code, said = run("train", folder, "--config", config, *data, "-o", tmp_path / "internal")
    assert code == 2 and "hold the molecule in its place" in said
