"""What the commands write for a molecule of the user's own: no backbone, no reference data in its folder."""

import json

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from openmmtools import testsystems

from openmm_regflow import flows, metrics, outputs
from openmm_regflow.cli import main
from openmm_regflow.errors import InputError
from openmm_regflow.evaluation import rotatable_torsions
from openmm_regflow.flows import Flow, FlowMetadata
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.proposals import FlowProposal
from openmm_regflow.simulate import export_hdf5
from openmm_regflow.systems import load_system


@pytest.fixture(scope="module")
def toluene(tmp_path_factory):
    """A system folder without reference data, and frames of a short simulation."""
    made = testsystems.TolueneVacuum(constraints=None)
    folder = tmp_path_factory.mktemp("toluene") / "toluene"
    folder.mkdir()
    with open(folder / "structure.pdb", "w") as file:
        app.PDBFile.writeFile(made.topology, made.positions, file)
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(made.system))
    (folder / "system.toml").write_text('system_xml = "system.xml"\ntemperature = 300.0\n')
    integrator = openmm.LangevinMiddleIntegrator(300, 5, 0.001)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(made.system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(made.positions)
    frames = []
    for _ in range(120):
        integrator.step(20)
        state = context.getState(getPositions=True)
        frames.append(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
    return load_system(folder), np.array(frames, dtype=np.float32)


@pytest.fixture(scope="module")
def proposal(toluene):
    molecule, frames = toluene
    flow = flows.spline(flows.coordinates_for(molecule.topology, torch.as_tensor(frames)), n_layers=2, hidden=8)
    flow.metadata = FlowMetadata(molecule.name, molecule.fingerprint, molecule.temperature)
    return FlowProposal(flow, TorchPotential(molecule.system), molecule.temperature)


def test_a_molecule_without_a_backbone_is_evaluated(toluene, proposal, tmp_path):
    molecule, frames = toluene
    assert not len(molecule.torsions("phi"))
    rows = outputs.write_evaluation(proposal, molecule, frames, tmp_path, 300, seed=0)
    assert any("ESS" in row[0] for row in rows)
    plots = {path.stem for path in tmp_path.glob("*.png")}
    assert plots == {"energies", "weights"}
    assert 0 < json.loads((tmp_path / "metrics.json").read_text())["ess"] <= 1


def test_every_bond_that_turns_is_looked_at(toluene):
    """Of the ring five bonds, of which the sixth follows; of the dipeptide the two peptide bonds beside phi and psi."""
    rows = rotatable_torsions(toluene[0].topology)
    elements = [a.element.symbol for a in toluene[0].topology.atoms()]
    assert all(elements[i] == "C" for row in rows for i in row[1:3]) and 4 <= len(rows) <= 6
    dipeptide = load_system("alanine-dipeptide")
    known = [*dipeptide.torsions("phi"), *dipeptide.torsions("psi")]
    own = rotatable_torsions(dipeptide.topology, but=known)
    omega = metrics.dihedrals(dipeptide.positions[None], own)[0]
    assert len(own) == 2 and (np.abs(omega) > np.radians(150)).all()
    assert len(rotatable_torsions(dipeptide.topology)) == 4
    water = testsystems.WaterBox(box_edge=1.0 * unit.nanometer, cutoff=0.4 * unit.nanometer)
    assert len(rotatable_torsions(water.topology)) == 0  # several molecules


def test_both_free_energies_of_the_reference_have_the_blocks_of_a_slow_mode(monkeypatch, tmp_path):
    """The band of the plot is as wide as the table's error says: one rule of blocks for both."""
    molecule = load_system("alanine-dipeptide")
    reference, seen = molecule.reference("test")[:4000], []
    plain = metrics.free_energy_profile

    def recorded(*arguments, **keywords):
        seen.append(keywords.get("block"))
        return plain(*arguments, **keywords)

    monkeypatch.setattr(metrics, "free_energy_profile", recorded)
    proposal = FlowProposal(Flow.load(molecule.folder / "flow.safetensors"), TorchPotential(molecule.system), 300.0)
    batch = proposal.sample(500, torch.Generator().manual_seed(0))
    outputs.draw_samples(tmp_path, molecule, batch, reference, proposal)
    assert seen[0] == 4000 // 20


def test_basins_of_phi_need_a_phi(toluene, proposal):
    molecule, frames = toluene
    batch = proposal.sample(100, torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="no backbone phi"):
        outputs.basin_tfep(batch, proposal, molecule, frames, seed=0)


def test_evaluate_takes_a_test_trajectory_and_says_before_sampling_that_it_needs_one(
    toluene, proposal, tmp_path, capsys
):
    molecule, frames = toluene
    flow, test = tmp_path / "flow.safetensors", tmp_path / "test.h5"
    proposal.flow.save(flow)
    export_hdf5(frames, molecule.topology, test)
    call = ["evaluate", str(flow), "--system", str(molecule.folder), "-n", "300", "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        main(call)
    assert end.value.code == 2
    assert "no test reference" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as end:
        main([*call, "--data", str(test)])
    assert end.value.code == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["n"] == 300
