"""Flows over a part of a System: frame and surroundings kept, exact for any number of proposals."""

import numpy as np
import openmm
import pytest
import torch
from analytic_molecules import KT, TEMPERATURE, SolvatedChain, cartesian_gaussian, chain_topology, z_scores
from openmm import unit
from openmmtools import mcmc, states
from openmmtools.utils import deserialize, serialize
from scipy import stats
from test_moves import COORDINATES, forget
from test_sampling import SIGMAS, chain_z, generator

from openmm_regflow import flows
from openmm_regflow.errors import IncompatibleFlowError, InputError, UnsupportedForceError
from openmm_regflow.fingerprints import fingerprint
from openmm_regflow.metrics import integrated_autocorrelation_time
from openmm_regflow.moves import FlowMove
from openmm_regflow.potentials import OpenMMPotential, TorchPotential
from openmm_regflow.proposals import SubsetProposal, local_frame
from openmm_regflow.refusals import check_subset_supported
from openmm_regflow.sampling import FlowSimulation, FlowStep, KernelInfo, run_chain

MOLECULE = SolvatedChain()


pytestmark = pytest.mark.usefixtures("reference_platform")


def make_flow():
    return flows.spline(COORDINATES, n_layers=2, hidden=16).double()


def make_proposal(kind=SubsetProposal, potential=None, **options):
    options = {"frame_atoms": (1, 2, 3)} | options
    potential = TorchPotential(MOLECULE.system) if potential is None else potential
    return kind(make_flow(), potential, TEMPERATURE, MOLECULE.subset, **options)


def one_step(step, n, molecule=MOLECULE):
    start = molecule.sample(n, generator(5)).numpy()
    moved = [(x, step(x)) for x in start]
    return torch.as_tensor(np.array([x if new is None else new for x, new in moved])), moved


@pytest.mark.parametrize(
    ("n_proposals", "frame_atoms"), [(1, (1, 2, 3)), (4, (1, 2, 3)), (4, (0, 1, 2)), (4, (3, 0, 2)), (64, (1, 2, 3))]
)
def test_a_subset_step_leaves_the_exact_distribution_invariant(n_proposals, frame_atoms):
    step = FlowStep(make_proposal(frame_atoms=frame_atoms), n_proposals, 5000, generator())
    frames, _ = one_step(step, 300 if n_proposals == 64 else 600)
    assert step.statistics.acceptance_rate > 0.15
    scores = z_scores(frames, MOLECULE.observables())
    assert max(map(abs, scores.values())) < SIGMAS, scores


class MissingVolume(SubsetProposal):
    """The planted error: a density on bare internal coordinates, without bond lengths squared."""

    @staticmethod
    def volume(x):
        return 2 * sum(torch.log((x[:, k + 1] - x[:, k]).norm(dim=1)) for k in range(3))

    def _draw(self, n, g):
        positions, log_q = super()._draw(n, g)
        return positions, log_q + self.volume(positions)

    def _log_q(self, positions):
        return super()._log_q(positions) + self.volume(positions[:, self.atom_subset])


class ForgottenSurroundings(SubsetProposal):
    """The planted error: the proposals' energies ignore where the rest of the System is."""

    def in_place(self, drawn, current):
        whole = super().in_place(drawn, current)
        if len(drawn) > 1 or drawn.shape[1] == 4:
            whole[:, MOLECULE.solvent] = whole[:, MOLECULE.subset[0]]
        return whole


@pytest.mark.parametrize("planted", [MissingVolume, ForgottenSurroundings])
def test_planted_errors_are_seen(planted):
    step = FlowStep(make_proposal(planted), 8, 20_000, generator())
    frames, _ = one_step(step, 2500 if planted is MissingVolume else 300)
    assert max(map(abs, z_scores(frames, MOLECULE.observables()).values())) > 2 * SIGMAS


def test_frame_and_surroundings_stay():
    step = FlowStep(make_proposal(), 4, 500, generator())
    _, moved = one_step(step, 40)
    accepted = [(x, new) for x, new in moved if new is not None]
    assert len(accepted) > 5
    for x, new in accepted:
        np.testing.assert_array_equal(new[MOLECULE.solvent], x[MOLECULE.solvent])
        frames = [local_frame(torch.as_tensor(y[list(MOLECULE.subset)][[1, 2, 3]])[None]) for y in (x, new)]
        torch.testing.assert_close(frames[0][0], frames[1][0])
        torch.testing.assert_close(frames[0][1], frames[1][1])


def test_draws_of_a_subset_have_no_energy_and_no_weights():
    """Zeros would have been taken for energies."""
    proposal = make_proposal()
    batch = proposal.sample(20, generator())
    assert batch.u.isnan().all() and batch.log_weights.isnan().all() and batch.log_q.isfinite().all()
    with pytest.raises(InputError, match="whole molecules"):
        run_chain(proposal, MOLECULE.sample(4, generator()), 5, generator=generator())


def test_the_density_does_not_depend_on_frame_or_surroundings():
    proposal = make_proposal()
    x = MOLECULE.sample(5, generator())
    y = x.flip(2) * torch.tensor([1.0, 1.0, -1.0]) + 3.0  # a rotation and a shift
    y[:, MOLECULE.solvent] = 0.0
    torch.testing.assert_close(proposal.log_q(y), proposal.log_q(x))


@pytest.mark.parametrize("pressure", [None, 1.0])
def test_in_a_box_with_openmmtools(tmp_path, pressure):
    """A molecule across the boundary of a triclinic box, constant volume or pressure, through storage and back."""
    box = [[1.6, 0, 0], [0.3, 1.7, 0], [-0.4, 0.5, 1.8]]
    molecule = SolvatedChain(box)
    if pressure is not None:
        molecule.system.addForce(openmm.MonteCarloBarostat(pressure, TEMPERATURE, 0))
    path = tmp_path / "flow.safetensors"
    flow = make_flow()
    flow.save(path)
    proposal = SubsetProposal(flow, OpenMMPotential(molecule.system), TEMPERATURE, molecule.subset)
    pressure = None if pressure is None else pressure * unit.bar
    state = states.ThermodynamicState(molecule.system, TEMPERATURE * unit.kelvin, pressure)
    move = FlowMove(proposal, 4, 5000, flow_path=path, seed=1)
    sampled, boxes = [], unit.Quantity(np.array(box), unit.nanometer)
    for k, x in enumerate(molecule.sample(700, generator(2)).numpy()):
        if k == 300:
            stored = serialize(move)
            forget()
            move = deserialize(stored)
        wrapped = x - np.array([[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0], [-1, 0, 1]]) @ np.array(box)
        frame = states.SamplerState(wrapped * unit.nanometer, box_vectors=boxes)
        move.apply(state, frame)
        x = proposal.make_whole(frame.positions._value, np.array(box))
        lattice = np.array(box)
        delta = x[molecule.solvent] - x[molecule.subset[0]]
        for axis in (2, 1, 0):
            delta -= np.round(delta[axis] / lattice[axis, axis]) * lattice[axis]
        x[molecule.solvent] = x[molecule.subset[0]] + delta
        sampled.append(x)
    assert move.n_accepted > 200
    scores = z_scores(torch.as_tensor(np.array(sampled)), molecule.observables())
    assert max(map(abs, scores.values())) < SIGMAS, scores


@pytest.mark.parametrize("pressure", [None, 1.0])
def test_a_state_without_box_vectors_has_the_systems_own(pressure):
    """As openmmtools' dynamics take it; not the box that a state before it left in the Context."""
    box = np.diag([1.1, 1.2, 1.3])
    molecule = SolvatedChain(box)
    if pressure is not None:
        molecule.system.addForce(openmm.MonteCarloBarostat(pressure, TEMPERATURE, 0))
    pressure = None if pressure is None else pressure * unit.bar
    state = states.ThermodynamicState(molecule.system, TEMPERATURE * unit.kelvin, pressure)
    proposal = SubsetProposal(make_flow(), OpenMMPotential(molecule.system), TEMPERATURE, molecule.subset)
    ends = []
    for vectors in (box, None):
        move = FlowMove(proposal, 4, 5000, seed=1)
        for x in molecule.sample(40, generator(2)).numpy():
            x[molecule.solvent, 0] += 0.8  # nearer to an image in one box, too far away for any move in the other
            wide = states.SamplerState(x * unit.nanometer, box_vectors=2 * box * unit.nanometer)
            move.apply(state, wide)
            given = None if vectors is None else vectors * unit.nanometer
            frame = states.SamplerState(x * unit.nanometer, box_vectors=given)
            move.apply(state, frame)
            ends.append(frame.positions._value.copy())
        assert move.n_accepted > 10
    np.testing.assert_allclose(ends[:40], ends[40:], atol=1e-9)


def test_statistics_say_nothing_about_the_surroundings():
    """Log-weights of a subset hold the energy of everything else: the mean is that of ratios, and there is no ESS."""
    means = []
    for offset in (0.0, 1e4):
        system = openmm.XmlSerializer.clone(MOLECULE.system)
        bath = openmm.CustomExternalForce(f"{offset}")  # of atoms that the flow does not move
        bath.addParticle(MOLECULE.solvent, [])
        system.addForce(bath)
        step = FlowStep(make_proposal(potential=OpenMMPotential(system, "Reference")), 1, 500, generator())
        one_step(step, 100)
        assert np.isnan(step.statistics.effective_sample_size)
        means.append(step.statistics.mean_log_weight)
        flags = [torch.tensor([value]) for value in (False, -1, 0.0)]
        info = KernelInfo(*flags, torch.tensor([[offset]]), torch.tensor([True]))
        step.statistics.update(info, torch.tensor([np.inf]))  # from where the flow has no density
        assert step.statistics.mean_log_weight == pytest.approx(means[-1] * 100 / 101)
    assert means[0] == pytest.approx(means[1], abs=1e-6) and abs(means[0]) < 100


class Gas(SolvatedChain):
    """The chain with its fifth atom, and 20 atoms that see nothing, in a box under pressure: an ideal gas of molecules.

    The chain's own distribution is as ever; with N molecules the volume's is ``V^N exp(-P V / kT)``.
    """

    n_gas = 20
    pressure = 30.0  # bar

    def __init__(self):
        super().__init__()
        unseen = openmm.NonbondedForce()
        unseen.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
        unseen.setCutoffDistance(0.1)
        for i in range(5 + self.n_gas):
            if i >= 5:
                self.system.addParticle(18.0)
            unseen.addParticle(0.0, 0.1, 0.0)
        self.system.addForce(unseen)
        bar = 0.06022140857  # kJ/mol/nm^3
        self.rate = self.pressure * bar / KT
        self.volume = stats.gamma(self.n_gas + 2, scale=1 / self.rate)
        self.box = self.volume.mean() ** (1 / 3) * np.eye(3)
        self.system.setDefaultPeriodicBoxVectors(*self.box)

    def start(self, g):
        gas = self.box[0, 0] * torch.rand(self.n_gas, 3, generator=g, dtype=torch.float64)
        return torch.cat([self.sample(1, g)[0], gas]).numpy()


class ScalesTheBox(FlowMove):
    """The planted error: an accepted move changes the volume."""

    def _accept(self, sampler_state, new, system, temperature):
        super()._accept(sampler_state, new, system, temperature)
        sampler_state.box_vectors = 1.1 * sampler_state.box_vectors


@pytest.mark.parametrize("kind", [FlowMove, ScalesTheBox])
def test_with_an_active_barostat(kind):
    """Constant pressure: no flow move changes the volume; volume and torsion have their exact distributions."""
    gas = Gas()
    assert gas.system.getNumParticles() == 25
    state = states.ThermodynamicState(gas.system, TEMPERATURE * unit.kelvin, gas.pressure * unit.bar)
    proposal = SubsetProposal(make_flow(), OpenMMPotential(gas.system, "Reference"), TEMPERATURE, gas.subset)
    move = kind(proposal, 4, 2000, seed=3)
    langevin = mcmc.LangevinDynamicsMove(
        timestep=2 * unit.femtosecond, collision_rate=5 / unit.picosecond, n_steps=5
    )
    np.random.seed(2)
    frame = states.SamplerState(gas.start(generator(4)) * unit.nanometer, box_vectors=gas.box * unit.nanometer)
    volumes, frames, changed = [], [], 0
    barostat = mcmc.MonteCarloBarostatMove(n_attempts=5)
    for _ in range(600):
        for each in (langevin, barostat):
            each.apply(state, frame)
        before = np.array(frame.box_vectors.value_in_unit(unit.nanometer))
        move.apply(state, frame)
        after = np.array(frame.box_vectors.value_in_unit(unit.nanometer))
        changed += int((after != before).any())
        volumes.append(np.linalg.det(after))
        frames.append(proposal.make_whole(frame.positions.value_in_unit(unit.nanometer), after)[list(gas.subset)])
    assert move.n_accepted > 100 and np.std(volumes) > 0
    volumes = np.array(volumes)
    n_effective = len(volumes) / integrated_autocorrelation_time(volumes)
    p_value = stats.kstwobign.sf(stats.kstest(volumes, gas.volume.cdf).statistic * np.sqrt(n_effective))
    if kind is ScalesTheBox:
        assert changed > 100 and p_value < 1e-5
        return
    assert changed == 0 and p_value > 1e-5 and n_effective > 30, (p_value, n_effective)
    torsions = {k: v for k, v in gas.chain.observables().items() if "torsion" in k or "basin" in k}
    scores = chain_z(torch.as_tensor(np.array(frames)), torsions)
    assert max(map(abs, scores.values())) < SIGMAS, scores


def test_a_molecule_wider_than_half_the_box_is_made_whole():
    """Along its bonds; next to one and the same atom would break it."""
    proposal, box = make_proposal(), 0.4 * np.eye(3)
    x = MOLECULE.sample(50, generator(8)).numpy()
    chain = np.array(MOLECULE.subset)
    assert (np.linalg.norm(x[:, chain[3]] - x[:, chain[0]], axis=1) > 0.2).mean() > 0.5  # half of the box
    for frame in x:
        whole = proposal.make_whole(frame - 0.4 * np.floor(frame / 0.4), box)
        apart = np.linalg.norm(np.diff(whole[chain], axis=0), axis=1)
        np.testing.assert_allclose(apart, np.linalg.norm(np.diff(frame[chain], axis=0), axis=1), atol=1e-12)


def test_only_the_subset_gets_new_velocities():
    move, state = FlowMove(make_proposal(), 4), states.ThermodynamicState(MOLECULE.system, TEMPERATURE * unit.kelvin)
    frame = states.SamplerState(MOLECULE.sample(1, generator())[0].numpy() * unit.nanometer)
    frame.velocities = unit.Quantity(np.ones((5, 3)), unit.nanometer / unit.picosecond)
    while move.n_accepted == 0:
        move.apply(state, frame)
    kept = (frame.velocities._value == 1).all(1)
    assert kept.tolist() == [atom == MOLECULE.solvent for atom in range(5)]


def test_mixed_with_dynamics_in_a_simulation():
    from openmm import app

    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 5.0, 0.002)
    integrator.setRandomNumberSeed(1)
    topology = chain_topology(5)
    simulation = app.Simulation(topology, MOLECULE.system, integrator, openmm.Platform.getPlatformByName("Reference"))
    simulation.context.setPositions(MOLECULE.sample(1, generator())[0].numpy())
    mixed = FlowSimulation(simulation, make_proposal(), 4, 2000, seed=2)
    frames = []
    for _ in range(1200):
        mixed.run(1, 10)
        frames.append(simulation.context.getState(getPositions=True).getPositions(asNumpy=True)._value)
    observables = {k: v for k, v in MOLECULE.observables().items() if "torsion" in k or "basin" in k}
    scores = chain_z(torch.as_tensor(np.array(frames)), observables)
    assert max(map(abs, scores.values())) < SIGMAS, scores


def test_constraints_and_virtual_sites_elsewhere_do_not_matter():
    system = SolvatedChain().system
    system.addParticle(1.0)
    system.addConstraint(3, 5, 0.1)
    check_subset_supported(system, MOLECULE.subset)
    system.addConstraint(2, 0, 0.15)
    with pytest.raises(UnsupportedForceError, match="atoms 2 and 0"):
        check_subset_supported(system, MOLECULE.subset)
    with_site = SolvatedChain().system
    with_site.addParticle(0.0)
    with_site.setVirtualSite(5, openmm.TwoParticleAverageSite(0, 3, 0.5, 0.5))
    with pytest.raises(UnsupportedForceError, match="virtual site 5"):
        check_subset_supported(with_site, MOLECULE.subset)


@pytest.mark.parametrize(
    ("subset", "options", "message"),
    [
        ((0, 1, 2), {}, "3 atoms, the flow generates 4"),
        ((0, 1, 1, 2), {}, "repeats"),
        ((0, 1, 2, 9), {}, "5 atoms"),
        ((0, 1, 2, 4), {"frame_atoms": (0, 1, 1)}, "three places"),
    ],
)
def test_bad_subsets(subset, options, message):
    with pytest.raises(InputError, match=message):
        SubsetProposal(make_flow(), TorchPotential(MOLECULE.system), TEMPERATURE, subset, **options)


def test_an_atom_without_mass_in_the_subset_is_refused():
    system = openmm.XmlSerializer.clone(MOLECULE.system)
    system.setParticleMass(MOLECULE.subset[1], 0.0)
    with pytest.raises(UnsupportedForceError, match="no mass"):
        make_proposal(potential=TorchPotential(system))


def test_hydrogens_in_other_places_than_the_flows_are_noticed():
    flow = make_flow()
    flow.metadata = flows.FlowMetadata("chain", {**fingerprint(MOLECULE.chain.system)}, TEMPERATURE)
    good = SubsetProposal(flow, TorchPotential(MOLECULE.system), TEMPERATURE, MOLECULE.subset)
    assert good.atom_subset == list(MOLECULE.subset)
    a, b, c, d = MOLECULE.subset
    with pytest.raises(IncompatibleFlowError, match="order of the flow"):
        SubsetProposal(flow, TorchPotential(MOLECULE.system), TEMPERATURE, (a, b, d, c))


def test_other_refusals():
    with pytest.raises(IncompatibleFlowError, match="internal"):
        SubsetProposal(cartesian_gaussian(MOLECULE.chain), TorchPotential(MOLECULE.system), 300, MOLECULE.subset)
    with pytest.raises(InputError, match="n_atoms"):
        SubsetProposal(make_flow(), lambda x: x[:, 0, 0], 300, MOLECULE.subset)
    flow = make_flow()
    flow.metadata = flows.FlowMetadata(temperature=350.0)
    with pytest.raises(IncompatibleFlowError, match="350 K"):
        SubsetProposal(flow, TorchPotential(MOLECULE.system), 300, MOLECULE.subset)
    assert mcmc.SequenceMove([FlowMove(make_proposal())]).statistics[0]["n_proposed"] == 0
