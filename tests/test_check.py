"""The checks of a user's molecule: a good flow passes, and every planted error is seen by the line that is for it."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import openmm
import pytest
import torch
from analytic_molecules import (
    TEMPERATURE,
    Chain,
    GaussianFlow,
    SolvatedChain,
    Well,
    cartesian_gaussian,
    chain_topology,
)
from openmm import app, unit
from test_constraints import rod_flow, solvated, solvated_sample
from test_sampling import EnergyOnly, MissingJacobian, OtherState, WrongSign

from openmm_regflow import flows
from openmm_regflow.bonds import bonds_of
from openmm_regflow.check import HybridMonteCarlo, kernel_test, largest_score, run_checks, system_findings, thinned
from openmm_regflow.check import findings as check_findings
from openmm_regflow.check import kernel as check_kernel
from openmm_regflow.cli import main
from openmm_regflow.errors import InputError
from openmm_regflow.flows import FlowMetadata
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.proposals import FlowProposal, ProposalBatch, SubsetProposal
from openmm_regflow.systems import MolecularSystem, load_system, select_atoms

TARGET = Chain(4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def molecule(target=TARGET, topology=None):
    """An analytic molecule as a user's own."""
    x = target.sample(1, generator(2))[0].numpy()
    return MolecularSystem("chain", topology or chain_topology(len(x)), target.system, x, TEMPERATURE)


def spline(target=TARGET):
    data = target.sample(2000, generator(1))
    return flows.spline(flows.coordinates_for(chain_topology(data.shape[1]), data), n_layers=2, hidden=16)


def finding(report, name):
    return next(f for f in report.findings if f.name == name)


def failed(report):
    return {f.name for f in report.findings if f.passed is False}


def test_a_good_flow_passes_everything():
    report = run_checks(spline(), molecule(), n=4000)
    assert report.passed and report.verdict.startswith("passed"), report.rows()
    assert all(f.passed is True for f in report.findings)
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True


def test_a_structure_in_a_line_says_nothing_of_a_flow():
    """As acetonitrile is built: no ensemble has it, and everything but the round trip of it can be tested."""
    straight = np.array([[0.0, 0, 0], [0.1, 0, 0], [0.2, 0, 0], [0.25, 0.1, 0]])
    report = run_checks(spline(), replace(molecule(), positions=straight), n=2000)
    words = finding(report, "round trip")
    assert words.passed and "atoms 2-1-0 lie in a line" in words.result, report.rows()


def test_a_flow_of_a_held_molecule_fails_where_nothing_holds_one():
    coordinates = flows.coordinates_for(None, TARGET.sample(2000, generator(1)), "cartesian", held=True)
    report = run_checks(flows.real_nvp(coordinates, n_layers=2), molecule(), n=100)
    assert finding(report, "frame").passed is False and finding(report, "kernel").passed is None


def test_flows_on_cartesian_coordinates_pass():
    """Free and in an external field, where the frame counts."""
    target = Chain(3, bond_width=0.04, angle_width=0.5)
    proposal = FlowProposal(cartesian_gaussian(target), TorchPotential(target.system), TEMPERATURE)
    assert kernel_test(proposal, molecule(target), 4000).passed is True
    well, flow = Well(), GaussianFlow(torch.tensor([[0.05, -0.1, 0.02]]), torch.diag(torch.full((3,), 0.04)))
    proposal = FlowProposal(flow, TorchPotential(well.system), TEMPERATURE)
    assert kernel_test(proposal, molecule(well), 4000).passed is True
    cartesian = flows.real_nvp(flows.coordinates_for(None, TARGET.sample(2000, generator(1)), "cartesian"), n_layers=2)
    report = run_checks(cartesian, molecule(), n=2000)
    assert finding(report, "log-determinant").passed and finding(report, "round trip").passed


@pytest.mark.parametrize("planted", [WrongSign, MissingJacobian, EnergyOnly, OtherState])
def test_kernel_test_sees_planted_errors(planted):
    """Each one is invisible to a round trip; the dynamics know nothing of the flow and give it away."""
    assert kernel_test(FlowProposal(spline(), TorchPotential(TARGET.system), TEMPERATURE), molecule(), 4000).passed
    found = kernel_test(planted(spline(), TorchPotential(TARGET.system), TEMPERATURE), molecule(), 4000)
    assert found.passed is False, found


def test_kernel_test_sees_a_kernel_that_is_wrong(monkeypatch):
    """Steps that accept too much leave another distribution, though every density is right."""
    original = check_kernel.run_chain

    def too_often(proposal, positions, n_steps, **options):
        options["n_proposals"] = 1
        chain = original(proposal, positions, n_steps, **options)
        fresh = proposal.sample(len(positions), options["generator"]).positions.double()
        return chain.__class__(fresh[None], chain.u, chain.accepted, chain.statistics)

    monkeypatch.setattr(check_kernel, "run_chain", too_often)
    proposal = FlowProposal(spline(), TorchPotential(TARGET.system), TEMPERATURE)
    assert kernel_test(proposal, molecule(), 4000).passed is False


def test_what_the_flow_moved_is_what_it_accepted(monkeypatch):
    """Of a Cartesian flow steps redraw the frame of every configuration, whether anything is accepted or not."""
    target = Chain(3, bond_width=0.04, angle_width=0.5)
    proposal = FlowProposal(cartesian_gaussian(target), TorchPotential(target.system), TEMPERATURE)
    assert " 0 % moved" not in kernel_test(proposal, molecule(target), 2000).result
    original = check_kernel.run_chain

    def idle(*arguments, **options):
        chain = original(*arguments, **options)
        return replace(chain, accepted=torch.zeros_like(chain.accepted))

    monkeypatch.setattr(check_kernel, "run_chain", idle)
    assert " 0 % moved" in kernel_test(proposal, molecule(target), 2000).result


def test_a_wrong_volume_element_is_seen(monkeypatch):
    """Consistent in both directions, so only the Jacobian can tell."""
    flow = spline()
    monkeypatch.setattr(type(flow.coordinates), "_log_volume", lambda self, raw: raw[:, 0] * 0.0)
    report = run_checks(flow, molecule(), n=1000)
    assert failed(report) == {"log-determinant"} and "FAILED" in report.verdict
    assert finding(report, "kernel").passed is None


class Drifting(flows.Flow):
    """Says another density when it draws than when it is asked."""

    def _sample(self, n, generator):
        x, log_q = super()._sample(n, generator)
        return x, log_q + 0.1 * torch.randn(n, generator=generator, dtype=log_q.dtype)


def test_a_density_that_depends_on_the_way_is_seen():
    flow = spline()
    flow.__class__ = Drifting
    assert failed(run_checks(flow, molecule(), n=1000)) == {"log q drawn = looked up"}


def test_an_inverse_that_is_none_is_seen(monkeypatch):
    flow = spline()
    original = flows.Flow.inverse

    def shifted(self, x):
        z, log_det = original(self, x)
        return z + 1e-4, log_det

    monkeypatch.setattr(flows.Flow, "inverse", shifted)
    assert "round trip" in failed(run_checks(flow, molecule(), n=1000))


def test_another_energy_is_seen(monkeypatch):
    class Doubled(TorchPotential):
        def __call__(self, x):
            return 1.01 * super().__call__(x)

    monkeypatch.setattr(check_findings, "TorchPotential", Doubled)
    assert failed(run_checks(spline(), molecule(), n=1000)) == {"energies = Context's"}


def test_another_system_or_temperature_is_seen():
    flow = spline()
    flow.metadata = FlowMetadata("chain", molecule().fingerprint, 350.0)
    report = run_checks(flow, molecule(), n=1000)
    assert failed(report) == {"belongs together"} and "350 K" in finding(report, "belongs together").result
    report = run_checks(spline(Chain(4)), molecule(Chain(3)), n=1000)
    assert failed(report) == {"belongs together"}
    with pytest.raises(InputError, match="at least 30"):
        run_checks(flow, molecule(), n=5)


def test_too_few_effective_samples_decide_nothing():
    report = run_checks(spline(), molecule(), n=30)
    assert finding(report, "kernel").passed is None and "give more" in report.verdict


def with_features(*features):
    """A chain of four with things in its System that matter to a flow move."""
    system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(TARGET.system))
    if "periodic" in features:
        force = openmm.NonbondedForce()
        force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
        for _ in range(4):
            force.addParticle(0, 1, 0)
        system.addForce(force)
    if "virtual" in features:
        system.setParticleMass(3, 0)
        system.setVirtualSite(3, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    if "frozen" in features:
        system.setParticleMass(3, 0)
    if "constraint" in features:
        system.addConstraint(0, 2, 0.2)
    if "parameter" in features:
        bias = openmm.CustomBondForce("strength*r^2")
        bias.addGlobalParameter("strength", 5.0)
        bias.addBond(0, 3, [])
        system.addForce(bias)
    added = {
        "barostat": openmm.MonteCarloBarostat(1.0, 300.0),
        "motion": openmm.CMMotionRemover(),
        "thermostat": openmm.AndersenThermostat(300.0, 1.0),
    }
    for name, force in added.items():
        if name in features:
            system.addForce(force)
    return system


@pytest.mark.parametrize(
    ("feature", "name", "word"),
    [
        ("constraint", "constraints", "refused"),
        ("virtual", "virtual sites", "refused"),
        ("frozen", "particles without mass", "refused"),
        ("periodic", "periodic box", "refused"),
        ("barostat", "barostat", "MonteCarloBarostat: refused"),
        ("motion", "CMMotionRemover", "handled"),
        ("thermostat", "thermostat", "handled"),
        ("parameter", "Context parameters", "handled"),
    ],
)
def test_what_a_system_has_is_found(feature, name, word):
    findings = {f.name: f for f in system_findings(with_features(feature))}
    assert word in findings[name].result and findings[name].passed is ("refused" not in word)
    others = [f for key, f in findings.items() if key != name and not (feature == "periodic" and key == "barostat")]
    assert all(f.result == "none" for f in others), others


def test_handled_features_pass_the_kernel_test():
    target = Chain(4)
    target.system = with_features("motion", "thermostat", "parameter")
    report = run_checks(spline(), molecule(target), n=4000)
    assert report.passed, report.rows()


def test_a_refused_system_fails_the_check():
    target = Chain(4)
    target.system = with_features("periodic", "constraint")
    report = run_checks(spline(), molecule(target), n=1000)
    assert failed(report) >= {"constraints", "periodic box"} and finding(report, "kernel").passed is None


@pytest.mark.parametrize(
    "force",
    [None, openmm.CMMotionRemover(), openmm.AndersenThermostat(TEMPERATURE, 10.0)],
    ids=["plain", "motion", "thermostat"],
)
def test_hybrid_monte_carlo_samples_a_known_target(force):
    """Independent short chains from exact draws stay exact, at a step where energy is badly conserved.

    What changes velocities between the two energies of the Metropolis test would let it accept such steps.
    """
    target = Chain(4)
    if force is not None:
        target.system.addForce(copy.deepcopy(force))
    engine = HybridMonteCarlo(target.system, TEMPERATURE, timestep=0.02, seed=3)
    start = target.sample(1500, generator(4))
    end = torch.stack([torch.as_tensor(engine.trajectory(x, 8)) for x in start.numpy()])
    assert 0.2 < engine.n_accepted / engine.n_proposed < 0.95
    for name, (function, exact) in target.observables().items():
        values = function(end)
        assert abs(values.mean() - exact) < 4.5 * values.std() / math.sqrt(len(values)), name


def test_thinning_keeps_weighted_means():
    """Russian roulette: unbiased for weights over many orders of magnitude, and about as many rows as asked for."""
    n, g = 200_000, generator(5)
    x = torch.randn(n, generator=g, dtype=torch.float64)
    batch = ProposalBatch(x[:, None, None].expand(-1, 1, 3), torch.zeros(n).double(), -1.5 * x)  # weights exp(1.5 x)
    batch.u[0] = torch.inf
    rows, log_w = thinned(batch, 5000, g)
    assert abs(len(rows) - 5000) < 4.5 * math.sqrt(5000) and 0 not in rows
    products = torch.as_tensor(log_w).exp() * (x[rows] - 1.5)  # E[exp(1.5 x) (x - 1.5)] = 0 for a normal x
    assert abs(products.sum()) < 4.5 * products.square().sum().sqrt()
    assert largest_score((x[rows, None] - 1.5).numpy(), torch.as_tensor(log_w).exp().numpy()) < 4.5


def surrounded(box=None, system=None):
    """A chain of four among five atoms, in another order, as a user's own."""
    target = SolvatedChain(box)
    x = target.sample(1, generator(2))[0].numpy()
    return target, MolecularSystem("part", chain_topology(5), system or target.system, x, TEMPERATURE)


BOX = [[1.6, 0, 0], [0.3, 1.7, 0], [-0.4, 0.5, 1.8]]


@pytest.mark.parametrize("box", [None, BOX])
def test_a_good_flow_over_a_part_passes(box):
    """Also where the box cuts the molecule, and a barostat is there."""
    target, whole = surrounded(box)
    if box is not None:
        whole.system.addForce(openmm.MonteCarloBarostat(1.0, TEMPERATURE))
        whole.positions[target.subset[0]] += np.array(BOX)[0]
    report = run_checks(spline(), whole, n=1500, atom_subset=target.subset)
    assert report.passed and report.verdict.startswith("passed"), report.rows()
    assert "subset" in finding(report, "belongs together").result
    if box is not None:
        assert all("handled" in finding(report, name).result for name in ("periodic box", "barostat"))


class PlantedSubset(SubsetProposal):
    """A subset's proposal whose log q can be wrong."""

    def _draw(self, n, g):
        positions, log_q = super()._draw(n, g)
        return positions, self.wrong(positions, log_q)

    def _log_q(self, positions):
        return self.wrong(positions[:, self.atom_subset], super()._log_q(positions))


class SubsetWrongSign(PlantedSubset):
    def wrong(self, x, log_q):
        return -log_q


class SubsetMissingVolume(PlantedSubset):
    def wrong(self, x, log_q):
        return log_q + 2 * sum(torch.log((x[:, k + 1] - x[:, k]).norm(dim=1)) for k in range(3))


class SubsetOtherState(SubsetProposal):
    """Batches of proposals with the energies of 450 K, single states with their own."""

    def reduced_potential(self, x):
        u = super().reduced_potential(x)
        return u if len(u) == 1 else u * TEMPERATURE / 450


@pytest.mark.parametrize("kind", [SubsetProposal, SubsetWrongSign, SubsetMissingVolume, SubsetOtherState])
def test_kernel_test_of_a_part_sees_planted_errors(kind):
    target, whole = surrounded()
    proposal = kind(spline(), TorchPotential(whole.system), TEMPERATURE, target.subset)
    found = kernel_test(proposal, whole, 5000 if kind is SubsetMissingVolume else 2000)
    assert found.passed is (kind is SubsetProposal), found


def test_a_part_with_constraints_of_its_own_passes():
    """Bonds at fixed length within the subset, two of them at an atom of the frame, and others elsewhere."""
    system, order = solvated()
    x = solvated_sample(order, 1, generator(3))[0].numpy()
    whole = MolecularSystem("rods", chain_topology(6), system, x, TEMPERATURE)
    report = run_checks(rod_flow(), whole, n=1500, atom_subset=order)
    assert report.passed and all(f.passed for f in report.findings), report.rows()
    assert finding(report, "constraints").result.startswith("3: handled")


@pytest.mark.parametrize(
    ("subset", "name", "word"),
    [
        ((0, 1, 2), "belongs together", "the flow has 4 atoms, the subset 3"),
        ((0, 2, 4, 1), "belongs together", "order of the flow"),
    ],
)
def test_a_wrong_part_is_seen(subset, name, word):
    report = run_checks(spline(), surrounded()[1], n=1000, atom_subset=subset)
    assert name in failed(report) and word in finding(report, name).result, report.rows()


def test_hydrogens_that_go_round_the_other_way_are_named():
    """Interchangeable atoms may be turned on, but two of them exchanged leave the flow's coordinates."""
    whole = load_system("alanine-dipeptide")
    flow = flows.Flow.load(whole.folder / "flow.safetensors")
    order = list(range(whole.n_atoms))
    order[12:15] = 13, 14, 12
    assert finding(run_checks(flow, whole, n=30, atom_subset=order), "round trip").passed
    order[1:3], order[19:22] = (2, 1), (21, 20, 19)
    found = finding(run_checks(flow, whole, n=30, atom_subset=order), "round trip")
    assert found.passed is False and "hydrogens [2, 3, 1] and [21, 19, 20] go" in found.result
    assert "matched_atoms" in found.result
    found = finding(run_checks(flow, replace(whole, positions=whole.positions[order]), n=30), "round trip")
    assert "hydrogens [1, 3, 2] and [19, 21, 20] go" in found.result and found.result.endswith("in the structure")


def test_what_touches_a_part_is_found():
    target, whole = surrounded()
    whole.system.addConstraint(target.subset[0], target.subset[2], 0.2)
    whole.system.addParticle(0.0)
    whole.system.setVirtualSite(5, openmm.TwoParticleAverageSite(target.subset[0], 3, 0.5, 0.5))
    found = {f.name: f for f in system_findings(whole.system, spline(), target.subset)}
    assert found["constraints"].result.startswith("1: refused") and not found["constraints"].passed
    assert found["virtual sites"].result.startswith("1: refused") and not found["virtual sites"].passed
    with pytest.raises(InputError, match="repeats"):
        run_checks(spline(), surrounded()[1], atom_subset=(0, 0, 1, 2))
    cartesian = flows.real_nvp(flows.coordinates_for(None, TARGET.sample(200, generator()), "cartesian"), n_layers=2)
    report = run_checks(cartesian, surrounded()[1], n=1000, atom_subset=target.subset)
    assert "internal" in finding(report, "belongs together").result


def test_selections():
    topology = chain_topology(5)
    assert select_atoms(topology, "2, 0,4,1") == [2, 0, 4, 1]
    assert select_atoms(topology, "3-4,0-1") == [3, 4, 0, 1]
    assert select_atoms(topology, "index 1 to 3") == [1, 2, 3]
    for bad, message in (("index > 9", "selects no atom"), ("nonsense of words", "no selection"), ("3-1", "no atom"),
                         ("2-", "'2-' in"), ("-", "'-' in"), ("0,1--3", "'1--3' in"), ("1 2", "'1 2' in")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            select_atoms(topology, bad)


def write_folder(folder, whole):
    topology = chain_topology(whole.n_atoms)
    topology._bonds.clear()
    atoms = list(topology.atoms())
    for i, j in bonds_of(whole.system).pairs.tolist():
        topology.addBond(atoms[i], atoms[j])
    with open(folder / "structure.pdb", "w") as file:
        app.PDBFile.writeFile(topology, whole.positions * unit.nanometer, file)
    (folder / "system.toml").write_text(f'system_xml = "system.xml"\ntemperature = {TEMPERATURE}\n')
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(whole.system))


def test_command_line_for_a_part(capsys, tmp_path):
    target, whole = surrounded()
    write_folder(tmp_path, whole)
    flow = tmp_path / "flow.safetensors"
    spline().save(flow)
    code, out, _ = run(capsys, "check", tmp_path, flow, "--atoms", ",".join(map(str, target.subset)))
    assert code == 0 and "4 of 5 atoms" in " ".join(out.split())
    code, out, _ = run(capsys, "check", tmp_path, flow, "--atoms", "index 0 to 2")
    assert code == 1 and "FAILED: belongs together" in out
    code, _, err = run(capsys, "check", tmp_path, flow, "--atoms", "index > 99")
    assert code == 2 and err.count("\n") == 1


def test_command_line(capsys, tmp_path):
    """A user's own folder: exit code 0 and a table, 1 and FAILED, 2 and one line."""
    write_folder(tmp_path, molecule())
    flow = tmp_path / "flow.safetensors"
    spline().save(flow)
    json_file = tmp_path / "findings.json"
    assert run(capsys, "check", tmp_path, flow, "-o", json_file)[0] == 0
    assert json.loads(json_file.read_text())["passed"]
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(with_features("constraint")))
    code, out, _ = run(capsys, "check", tmp_path, flow)
    assert code == 1 and "FAILED: constraints" in out and "constraints=None" in " ".join(out.split())
    code, _, err = run(capsys, "check", tmp_path / "nowhere", flow)
    assert code == 2 and err.count("\n") == 1


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err
