"""What the commands write for a molecule of the user's own: no backbone, no reference data in its folder."""

import json
import math
from types import SimpleNamespace

import numpy as np
import openmm
import pytest
import torch
from analytic_molecules import TEMPERATURE, Chain, dihedral
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
from openmm_regflow.units import thermal_energy


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


class CentredFlow:
    """Exact shapes of a chain of four, uniform orientation; the centre of one basin is learnt off by 0.8 widths."""

    n_atoms, rotation_invariant, com_std, fixed_bonds = 4, False, 0.1, ()
    device, dtype = torch.device("cpu"), torch.float64
    coordinates = SimpleNamespace(held=False)

    def __init__(self):
        self.chain = Chain(4)
        self.potential = TorchPotential(self.chain.system)

    def centre(self, x):
        off = torch.zeros(len(x), 3, dtype=torch.float64)
        off[:, 0] = 0.8 * self.com_std * (dihedral(x) > 0)
        return off

    def of_centre(self, c):
        return -0.5 * (c / self.com_std).square().sum(1) - 3 * math.log(self.com_std * math.sqrt(2 * math.pi))

    def frame_log_density(self, x):
        return self.of_centre(x.mean(1))

    def log_prob(self, x):
        return -self.potential(x) / thermal_energy(TEMPERATURE) + self.of_centre(x.mean(1) - self.centre(x))

    def sample(self, n, generator=None):
        x = self.chain.sample(n, generator)
        centre = self.centre(x) + self.com_std * torch.randn(n, 3, generator=generator, dtype=torch.float64)
        x = x - x.mean(1, keepdim=True) + centre[:, None]
        return x, self.log_prob(x)


@pytest.mark.parametrize("place", [0.0, 0.3])
def test_where_held_out_frames_happen_to_lie_is_no_part_of_a_free_energy(place):
    """Frames at the origin were 3, and within a nanometre of it 12 standard errors off, and the latter reliable."""
    flow = CentredFlow()
    proposal = FlowProposal(flow, flow.potential, TEMPERATURE)
    molecule = SimpleNamespace(name="chain", torsions=lambda kind: np.array([[0, 1, 2, 3]]), temperature=TEMPERATURE)
    generator = torch.Generator().manual_seed(0)
    batch = proposal.sample(20_000, generator)
    x = flow.chain.sample(4000, generator)
    x = x - x.mean(1, keepdim=True) + place * torch.randn(len(x), 1, 3, generator=generator)
    inside = flow.chain.torsion.mean(lambda phi: phi > 0)
    result = outputs.basin_tfep(batch, proposal, molecule, x.numpy(), 0)
    assert abs(result.delta_f + math.log(inside / (1 - inside))) < 4 * result.uncertainty < 0.1
    assert result.verdict.startswith("reliable")
