"""FlowMove in openmmtools' samplers: exact, stored without weights, and found again after a restart."""

import copy
import gc
import math
import shutil
import warnings

import numpy as np
import openmm
import pytest
import torch
import yaml
from analytic_molecules import TEMPERATURE, Chain, chain_topology, dihedral, z_scores
from openmm import unit
from openmmtools import cache, mcmc, states
from openmmtools.multistate import (
    MultiStateReporter,
    MultiStateSampler,
    ParallelTemperingSampler,
    ReplicaExchangeSampler,
    SAMSSampler,
)
from openmmtools.utils import deserialize, serialize
from test_sampling import SIGMAS, chain_z, generator, heights, in_a_field, velocity_correlation

from openmm_regflow import Flow, flows, moves
from openmm_regflow.errors import CorruptFileError, IncompatibleFlowError, InputError, UnsupportedForceError
from openmm_regflow.fingerprints import fingerprint
from openmm_regflow.moves import FlowMove, registry
from openmm_regflow.potentials import OpenMMPotential, TorchPotential
from openmm_regflow.proposals import FlowProposal
from openmm_regflow.sampling import FlowStatistics, system_masses
from openmm_regflow.units import GAS_CONSTANT

MOLECULE = Chain(4)
COORDINATES = flows.coordinates_for(chain_topology(4), MOLECULE.sample(2000, generator(1)))


pytestmark = pytest.mark.usefixtures("reference_platform")


def make_flow(seed=0, **metadata):
    flow = flows.spline(COORDINATES, n_layers=2, hidden=16, seed=seed).double()
    flow.metadata = flows.FlowMetadata(**metadata)
    return flow


@pytest.fixture(autouse=True)
def no_other_moves():
    """Moves of earlier tests that wait for the garbage collector would be copies of those with the same flow."""
    forget()


@pytest.fixture
def flow_path(tmp_path):
    path = tmp_path / "flow.safetensors"
    make_flow(fingerprint=fingerprint(MOLECULE.system), temperature=TEMPERATURE).save(path)
    return path


def make_proposal(flow_path, potential=None, **options):
    potential = TorchPotential(MOLECULE.system) if potential is None else potential
    return FlowProposal(flows.Flow.load(flow_path), potential, TEMPERATURE, **options)


def make_move(flow_path, n_proposals=1, **options):
    return FlowMove(make_proposal(flow_path), n_proposals, flow_path=flow_path, seed=3, **options)


def thermodynamic_state(temperature=TEMPERATURE, system=None):
    return states.ThermodynamicState(MOLECULE.system if system is None else system, temperature * unit.kelvin)


def sampler_state(seed=4):
    return states.SamplerState(MOLECULE.sample(1, generator(seed))[0].numpy() * unit.nanometer)


def langevin(n_steps=10):
    return mcmc.LangevinDynamicsMove(
        timestep=2.0 * unit.femtosecond, collision_rate=5.0 / unit.picosecond, n_steps=n_steps
    )


def positions(state):
    return state.positions.value_in_unit(unit.nanometer)


def test_it_is_a_move(flow_path):
    assert isinstance(make_move(flow_path), mcmc.MCMCMove)


def test_one_line_more_in_an_mcmc_sampler(flow_path):
    move = make_move(flow_path, 4)
    sampler = mcmc.MCMCSampler(thermodynamic_state(), sampler_state(), mcmc.SequenceMove([langevin(), move]))
    frames = []
    for _ in range(800):
        sampler.run(1)
        frames.append(positions(sampler.sampler_state))
    observables = {k: v for k, v in MOLECULE.observables().items() if "torsion" in k or "basin" in k}
    scores = chain_z(torch.as_tensor(np.array(frames)), observables)
    assert max(map(abs, scores.values())) < SIGMAS, scores
    statistics = sampler.move.statistics[1]
    assert statistics["n_proposed"] == 800 and statistics["n_proposals"] == 3200
    assert move.n_accepted == statistics["n_accepted"] > 300
    assert 0.2 < statistics["effective_sample_size"] < 1 and math.isfinite(statistics["mean_log_weight"])


def one_step(move, state, n, molecule=MOLECULE, seed=9):
    """One move from each of ``n`` exact configurations: an exact move leaves them exact."""
    start = molecule.sample(n, generator(seed)).numpy()
    moved = []
    for x in start:
        frame = states.SamplerState(x * unit.nanometer)
        move.apply(state, frame)
        moved.append(positions(frame).copy())
    return torch.as_tensor(np.array(moved))


@pytest.mark.parametrize("n_proposals", [1, 4, 64])
@pytest.mark.parametrize("energy", ["auto", "context"])
def test_moves_alone_leave_the_exact_distribution_invariant(flow_path, n_proposals, energy):
    move = make_move(flow_path, n_proposals, energy=energy, pool_size=5000)
    frames = one_step(move, thermodynamic_state(), 400)
    assert move.n_accepted > 0.3 * move.n_proposed
    scores = z_scores(frames, MOLECULE.observables())
    assert max(map(abs, scores.values())) < SIGMAS, scores


HOT = 900.0


def hot_molecule():
    """The same System at another temperature."""
    hot = Chain(4, HOT)
    assert fingerprint(hot.system) == fingerprint(MOLECULE.system)
    return hot


def test_a_hotter_state_is_sampled_at_its_own_temperature(flow_path):
    hot = hot_molecule()
    move = make_move(flow_path, 16, pool_size=5000)
    frames = one_step(move, thermodynamic_state(HOT), 700, hot)
    scores = z_scores(frames, hot.observables())
    assert max(map(abs, scores.values())) < SIGMAS, scores
    cold = z_scores(frames, MOLECULE.observables())
    assert max(map(abs, cold.values())) > 2 * SIGMAS


class OtherStatesEnergy(FlowMove):
    """The planted error: the energy of the proposal's state decides, whatever the state is."""

    def _energy(self, thermodynamic_state, sampler_state, context_cache):
        return lambda x: self._step.proposal.reduced_potential(x), MOLECULE.system


def test_the_energy_of_another_state_is_seen(flow_path):
    hot = hot_molecule()
    move = OtherStatesEnergy(make_proposal(flow_path), 16, pool_size=5000, seed=3)
    scores = z_scores(one_step(move, thermodynamic_state(HOT), 700, hot), hot.observables())
    assert max(map(abs, scores.values())) > 2 * SIGMAS


def tilted_state(strength):
    """A compound state whose torsion is tilted by a global parameter."""

    class TiltState(states.GlobalParameterState):
        tilt = states.GlobalParameterState.GlobalParameter("tilt", standard_value=0.0)

    system = Chain(4).system
    force = openmm.CustomTorsionForce("tilt*cos(theta)")
    force.addGlobalParameter("tilt", 0.0)
    force.addTorsion(0, 1, 2, 3, [])
    system.addForce(force)
    tilt = TiltState.from_system(system)
    compound = states.CompoundThermodynamicState(thermodynamic_state(system=system), [tilt])
    compound.tilt = strength
    return compound


def test_a_state_with_other_parameters_is_sampled_with_its_own_energy(flow_path):
    move = make_move(flow_path, 4, pool_size=5000)
    weight = np.exp(-4.0 * np.cos(MOLECULE.torsion.x) / (GAS_CONSTANT * TEMPERATURE))
    norm = MOLECULE.torsion.mean(lambda p: weight)
    exact = MOLECULE.torsion.mean(lambda p: weight * np.cos(p)) / norm
    state, frame, values = tilted_state(4.0), sampler_state(), []
    for _ in range(1200):
        move.apply(state, frame)
        values.append(positions(frame).copy())
    frames = torch.as_tensor(np.array(values))
    assert abs(chain_z(frames, {"cos": (lambda x: dihedral(x).cos(), exact)})["cos"]) < SIGMAS
    untilted = MOLECULE.torsion.mean(np.cos)
    assert abs(chain_z(frames, {"cos": (lambda x: dihedral(x).cos(), untilted)})["cos"]) > 2 * SIGMAS


def test_velocities_energy_and_frame_after_a_move(flow_path):
    move = make_move(flow_path)
    state, frame = thermodynamic_state(), sampler_state()
    context, _ = cache.global_context_cache.get_context(state)
    masses = system_masses(MOLECULE.system)
    scale = np.sqrt(masses / (GAS_CONSTANT * TEMPERATURE))[:, None]
    frame.apply_to_context(context)
    context.setVelocitiesToTemperature(TEMPERATURE, 1)
    frame.velocities = context.getState(getVelocities=True).getVelocities(asNumpy=True)
    box, pairs = frame.box_vectors, []
    potential = OpenMMPotential(MOLECULE.system, "Reference")
    for _ in range(300):
        before, x = frame.velocities._value.copy(), positions(frame).copy()
        move.apply(state, frame)
        if (positions(frame) == x).all():
            np.testing.assert_array_equal(frame.velocities._value, before)
            continue
        pairs.append(((before * scale).flatten(), (frame.velocities._value * scale).flatten()))
        np.testing.assert_allclose(masses @ positions(frame), masses @ x, rtol=0, atol=1e-12)
        frame.apply_to_context(context)
        energy = context.getState(getEnergy=True).getPotentialEnergy()._value
        assert energy == pytest.approx(float(potential(positions(frame)[None])), rel=1e-9)
    assert len(pairs) == move.n_accepted > 50
    assert abs(velocity_correlation(np.array(pairs))) < SIGMAS
    assert frame.box_vectors == box


def test_the_context_energy_and_the_potential_take_the_same_decisions(flow_path):
    outcomes = []
    for energy in ("auto", "context"):
        move, frame = make_move(flow_path, 3, energy=energy), sampler_state()
        for _ in range(50):
            move.apply(thermodynamic_state(), frame)
        outcomes.append((positions(frame), move.n_accepted))
    np.testing.assert_allclose(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1] == outcomes[1][1]


def test_copies_share_the_pool_and_never_repeat_a_draw(flow_path):
    move = make_move(flow_path, pool_size=10)
    copies = [move, copy.deepcopy(move), copy.deepcopy(mcmc.SequenceMove([langevin(), move])).move_list[1]]
    state, seen = thermodynamic_state(), set()
    for turn in range(40):
        frame = sampler_state(seed=turn)
        copies[turn % 3].apply(state, frame)
        seen.add(float(frame.positions[0, 0]._value))
    assert len(seen) == 40
    assert len({id(each._step.pool) for each in copies}) == 1
    assert [each.n_proposed for each in copies] == [14, 13, 13]


def forget():
    """What a new process knows: nothing."""
    registry._SHARED.clear()
    registry._RELINKED.clear()


def test_the_stored_dictionary_is_small_plain_and_complete(flow_path):
    move = make_move(flow_path, 3, pool_size=77)
    move.apply(thermodynamic_state(), sampler_state())
    text = yaml.safe_dump(serialize(move))
    assert len(text) < 2000 and str(flow_path) in text and move.flow_sha256 in text
    forget()
    back = deserialize(yaml.safe_load(text))
    assert type(back) is FlowMove and back.statistics == pytest.approx(move.statistics, nan_ok=True)
    assert back.n_proposals == 3 and back.flow_path == str(flow_path)
    back.apply(thermodynamic_state(), sampler_state())
    assert back.n_proposed == 2 and back._step.pool.size == 77


def test_a_restored_move_gives_the_same_chain_as_a_live_one(flow_path):
    def run(move):
        frame = sampler_state()
        for _ in range(30):
            move.apply(thermodynamic_state(), frame)
        return positions(frame)

    stored = serialize(make_move(flow_path))
    live = run(make_move(flow_path))
    forget()
    np.testing.assert_allclose(run(deserialize(stored)), live)


def test_a_seeded_move_does_not_repeat_itself_after_restarts(flow_path):
    """Also where the copy that is applied first has never been applied before (a state that SAMS had not visited)."""
    move, drawn = make_move(flow_path), []
    for _ in range(4):
        unused = copy.deepcopy(move)
        move.apply(thermodynamic_state(), sampler_state())
        drawn.append(move._step.pool._batch.positions[0])
        stored = serialize(unused)
        forget()
        move = deserialize(stored)
    assert len(torch.stack(drawn).unique(dim=0)) == 4


def fingerprinted(flow_path, tmp_path):
    """The flow with the record of the System that it was trained for."""
    flow = flows.Flow.load(flow_path)
    flow.metadata = flows.FlowMetadata("chain", fingerprint(MOLECULE.system), TEMPERATURE)
    flow.save(tmp_path / "known.safetensors")
    return FlowProposal(flow, TorchPotential(MOLECULE.system), TEMPERATURE), tmp_path / "known.safetensors"


def test_a_biased_state_goes_on_after_a_restart(flow_path, tmp_path):
    """A force beside those of the flow's System is the state's affair, live and restored alike."""
    proposal, path = fingerprinted(flow_path, tmp_path)
    move = FlowMove(proposal, flow_path=path, seed=1)
    move.apply(tilted_state(4.0), sampler_state())
    stored = serialize(move)
    forget()
    back = deserialize(stored)
    back.apply(tilted_state(4.0), sampler_state())
    assert back.n_proposed == 2


def test_a_flow_of_another_system_is_refused_live(flow_path, tmp_path):
    proposal, path = fingerprinted(flow_path, tmp_path)
    stiff = Chain(4, bond_width=0.01)
    with pytest.raises(IncompatibleFlowError, match="HarmonicBondForce"):
        FlowMove(proposal, flow_path=path).apply(thermodynamic_state(system=stiff.system), sampler_state())
    accepting = FlowProposal(proposal.flow, proposal.potential, TEMPERATURE, allow_mismatch=True)
    FlowMove(accepting, flow_path=path).apply(thermodynamic_state(system=stiff.system), sampler_state())


def samplers():
    yield MultiStateSampler, {}
    yield ReplicaExchangeSampler, {}
    yield ParallelTemperingSampler, {}
    yield SAMSSampler, {}


@pytest.mark.parametrize("kind", [kind for kind, _ in samplers()])
def test_run_stop_from_storage_extend(flow_path, tmp_path, kind):
    storage = str(tmp_path / "run.nc")
    reporter = MultiStateReporter(storage, checkpoint_interval=1)
    sampler = kind(mcmc_moves=mcmc.SequenceMove([langevin(), make_move(flow_path, 2)]), number_of_iterations=4)
    sampler.online_analysis_interval = None
    if kind is ParallelTemperingSampler:
        sampler.create(thermodynamic_state(), [sampler_state()], reporter, min_temperature=300 * unit.kelvin,
                       max_temperature=450 * unit.kelvin, n_temperatures=3)  # fmt: skip
    else:
        ladder = [thermodynamic_state(t) for t in (300.0, 370.0, 450.0)]
        n_replicas = 1 if kind is SAMSSampler else 3
        sampler.create(ladder, [sampler_state(i) for i in range(n_replicas)], reporter)
    sampler.run(3)
    counted = total(sampler)
    hashes = {move.move_list[1].flow_sha256 for move in sampler.mcmc_moves}
    assert counted == 3 * sampler.n_replicas
    del sampler
    forget()
    cache.global_context_cache.empty()

    resumed = kind.from_storage(MultiStateReporter(storage, open_mode="r+"))
    assert type(resumed) is kind and total(resumed) == counted and resumed.iteration == 3
    assert {move.move_list[1].flow_sha256 for move in resumed.mcmc_moves} == hashes
    resumed.extend(2)
    assert resumed.iteration == 5 and total(resumed) == 5 * resumed.n_replicas
    for state in resumed.sampler_states:
        assert np.isfinite(positions(state)).all()
    assert flow_path.stat().st_size > 10_000 > stored_size(storage)


def total(sampler):
    return sum(move.move_list[1].n_proposed for move in sampler.mcmc_moves)


def stored_size(storage):
    """Characters that one stored move takes."""
    reporter = MultiStateReporter(storage, open_mode="r")
    size = max(len(yaml.safe_dump(serialize(move.move_list[1]))) for move in reporter.read_mcmc_moves())
    reporter.close()
    return size


def test_replica_exchange_reproduces_the_cold_torsion(flow_path, tmp_path):
    move = mcmc.SequenceMove([langevin(5), make_move(flow_path, 2)])
    sampler = ReplicaExchangeSampler(mcmc_moves=move, number_of_iterations=150)
    sampler.online_analysis_interval = None
    ladder = [thermodynamic_state(t) for t in (300.0, 450.0)]
    np.random.seed(1)
    storage = MultiStateReporter(str(tmp_path / "re.nc"), checkpoint_interval=1)
    sampler.create(ladder, [sampler_state(1), sampler_state(2)], storage)
    frames = []
    for _ in range(150):
        sampler.run(1)
        cold = list(sampler._replica_thermodynamic_states).index(0)
        frames.append(positions(sampler.sampler_states[cold]).copy())
    observables = {k: v for k, v in MOLECULE.observables().items() if "torsion" in k}
    scores = chain_z(torch.as_tensor(np.array(frames)), observables)
    assert max(map(abs, scores.values())) < SIGMAS, scores


def test_weighted_move(flow_path):
    np.random.seed(0)
    move = mcmc.WeightedMove([(langevin(), 0.5), (make_move(flow_path), 0.5)])
    sampler = mcmc.MCMCSampler(thermodynamic_state(), sampler_state(), move)
    sampler.run(40)
    assert 5 < move.statistics[1]["n_proposed"] < 35
    again = copy.deepcopy(move)
    assert again.statistics[1] == move.statistics[1]


def stored_sampler(kind, move, storage, n_iterations=6):
    """A created multistate sampler over three temperatures."""
    np.random.seed(2)
    sampler = kind(mcmc_moves=move, number_of_iterations=n_iterations, online_analysis_interval=None)
    starts = [sampler_state(i) for i in range(1 if kind is SAMSSampler else 3)]
    ladder = [thermodynamic_state(t) for t in (300.0, 370.0, 450.0)]
    sampler.create(ladder, starts, MultiStateReporter(str(storage), checkpoint_interval=1))
    return sampler


@pytest.mark.parametrize("kind", [SAMSSampler, ReplicaExchangeSampler])
def test_weighted_moves_through_storage(flow_path, tmp_path, kind):
    """Two flow moves and dynamics chosen at random: run, stop, from_storage, extend, every counter as it was."""
    pair = [FlowMove(make_proposal(flow_path), n, flow_path=flow_path, seed=n) for n in (1, 8)]
    move = mcmc.WeightedMove([(langevin(), 0.2), (pair[0], 0.4), (pair[1], 0.4)])
    sampler = stored_sampler(kind, move, tmp_path / "run.nc")
    sampler.run(5)
    before = [each.statistics for each in sampler.mcmc_moves]
    assert sum(s["n_proposed"] for each in before for s in each[1:]) > 0
    del sampler
    forget()
    cache.global_context_cache.empty()
    resumed = kind.from_storage(MultiStateReporter(str(tmp_path / "run.nc"), open_mode="r+"))
    for each, old in zip(resumed.mcmc_moves, before, strict=True):
        assert type(each) is mcmc.WeightedMove and [m.n_proposals for m, _ in each.move_set[1:]] == [1, 8]
        for new, known in zip(each.statistics[1:], old[1:], strict=True):
            assert new == pytest.approx(known, nan_ok=True)
    resumed.extend(20)
    after = [each.statistics for each in resumed.mcmc_moves]
    grown = [a["n_proposed"] - b["n_proposed"] for x, y in zip(after, before) for a, b in zip(x[1:], y[1:])]
    assert min(grown) >= 0 and 0 < sum(grown) < 20 * resumed.n_replicas
    for each in after:
        assert each[1]["n_proposals"] == each[1]["n_proposed"] and each[2]["n_proposals"] == 8 * each[2]["n_proposed"]


def test_counters_can_be_set_as_those_of_openmmtools(flow_path):
    """MetropolizedMove and GHMCMove have plain attributes and, the latter, reset_statistics."""
    move = make_move(flow_path)
    move.apply(thermodynamic_state(), sampler_state())
    assert math.isnan(make_move(flow_path).fraction_accepted) and move.fraction_accepted in (0.0, 1.0)
    move.n_accepted, move.n_proposed = 3, 4
    assert (move.fraction_accepted, move.statistics["n_proposed"]) == (0.75, 4)
    move.apply(thermodynamic_state(), sampler_state())
    assert move.n_proposed == 5
    move.reset_statistics()
    assert move.n_accepted == move.n_proposed == move.statistics["n_proposals"] == 0
    move.apply(thermodynamic_state(), sampler_state())
    assert move.n_proposed == 1


def potentials():
    tilted = tilted_state(0.0).system
    return [
        TorchPotential(MOLECULE.system, torch.float32, groups=[0, 2]),
        TorchPotential(MOLECULE.system, compile=True),
        OpenMMPotential(MOLECULE.system, "Reference"),
        OpenMMPotential(MOLECULE.system, "CPU", properties={"Threads": "1"}, groups=range(3), executor=2),
        OpenMMPotential(tilted, "Reference"),
    ]


@pytest.mark.parametrize("which", range(5))
def test_a_restored_move_has_the_same_potential(flow_path, which):
    """Platform, its properties, precision, compilation, force groups, processes and parameters."""
    potential = potentials()[which]
    for name in potential.parameters:
        potential.set_parameter(name, 3.0)
    system = potential.system
    move = FlowMove(make_proposal(flow_path, potential, allow_mismatch=True), flow_path=flow_path, seed=1)
    stored = yaml.safe_load(yaml.safe_dump(serialize(move)))
    forget()
    restored = deserialize(stored)._loaded(thermodynamic_state(system=system)).proposal.potential
    assert type(restored) is type(potential) and restored.options == potential.options
    assert restored.parameters == potential.parameters and len(restored.parameters) == (1 if which == 4 else 0)
    if which not in (1, 3):  # compiling takes a minute, and processes take seconds to start
        x = MOLECULE.sample(3, generator())
        torch.testing.assert_close(restored(x), potential(x))
    for each in (restored, potential):
        if isinstance(each, OpenMMPotential):
            each.close()


def test_a_platform_that_is_not_here_is_replaced_with_a_warning(flow_path):
    stored = serialize(FlowMove(make_proposal(flow_path, OpenMMPotential(MOLECULE.system, "CPU")), seed=1))
    stored["proposal"]["potential"]["platform"] = "Abacus"
    forget()
    with pytest.warns(UserWarning, match="Abacus platform, which is not here"):
        deserialize(stored).apply(thermodynamic_state(), sampler_state())


@pytest.mark.parametrize("missing", ["cuda:99", "abacus"])
def test_a_device_that_is_not_here_is_replaced_with_a_warning(flow_path, missing):
    """Stored beside a GPU, gone on without: flow and potential on the CPU, and the same chain as one stored there."""
    ends = []
    for device in ("cpu", missing):
        stored = serialize(FlowMove(make_proposal(flow_path, TorchPotential(MOLECULE.system)), seed=1))
        stored["proposal"]["device"] = stored["proposal"]["potential"]["device"] = device
        stored["proposal"]["identity"] = device
        forget()
        move, frame = deserialize(stored), sampler_state()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(5):
                move.apply(thermodynamic_state(), frame)
        said = [str(w.message) for w in caught if "which is not here" in str(w.message)]
        assert len(said) == (0 if device == "cpu" else 2) and all(f"device {missing}" in line for line in said)
        assert move.device.type == move._step.proposal.potential.device.type == "cpu" and move.n_accepted > 0
        ends.append(frame.positions.value_in_unit(unit.nanometer))
    np.testing.assert_array_equal(*ends)


@pytest.mark.gpu
def test_a_move_with_a_pool_of_ten_thousand_stays_on_the_gpu(flow_path):
    """Draws, densities and energies; a stored and restored move, too."""
    flow = Flow.load(flow_path, "cuda")
    proposal = FlowProposal(flow, TorchPotential(MOLECULE.system, device="cuda"), TEMPERATURE)
    move = FlowMove(proposal, pool_size=10_000, flow_path=flow_path, seed=1)
    stored = serialize(move)
    move.apply(thermodynamic_state(), sampler_state())
    pool = move._step.pool._batch
    assert len(pool.u) == 10_000 and all(part.is_cuda for part in pool) and bool(torch.isfinite(pool.u).any())
    for _ in range(20):
        move.apply(thermodynamic_state(), sampler_state())
    assert move.n_accepted > 0 and move._step.pool._batch is pool and move.device.type == "cuda"
    forget()
    del move
    restored = deserialize(stored)
    restored.apply(thermodynamic_state(), sampler_state())
    assert all(part.is_cuda for part in restored._step.pool._batch) and restored.device.type == "cuda"


def drawn(move, n=3):
    return move._step.pool.take(n).positions


def test_moves_draw_apart(flow_path, tmp_path):
    """By default, and with one seed for different flows; one seed for equal moves is one stream, as documented."""
    np.random.seed(0)
    unseeded = [FlowMove(make_proposal(flow_path)) for _ in range(2)]
    assert not torch.equal(*(drawn(move) for move in unseeded))
    make_flow(seed=1).save(tmp_path / "other.safetensors")
    files = (flow_path, tmp_path / "other.safetensors")
    first, second, again = (FlowMove(make_proposal(path), seed=3) for path in (*files, flow_path))
    assert not torch.equal(drawn(first), drawn(second))
    unsaved = [FlowProposal(make_flow(seed), TorchPotential(MOLECULE.system), TEMPERATURE) for seed in (0, 1)]
    states = [FlowMove(proposal, seed=3)._shared.generator.get_state() for proposal in unsaved]
    assert not torch.equal(*states)
    torch.testing.assert_close(drawn(first), drawn(again, 6)[3:])


def test_copies_find_their_own_move_among_equal_ones(flow_path):
    """Live and restored: two moves of one flow with one seed keep a pool each, and copies use their own move's."""
    pair = [FlowMove(make_proposal(flow_path), n) for n in (1, 4)]
    copies = copy.deepcopy(pair)
    for each in copies:
        each.apply(thermodynamic_state(), sampler_state())
    for original, copied in zip(pair, copies):
        assert copied._step.pool is original._step.pool
    stored = [serialize(move) for move in (*pair, *copies)]
    forget()
    back = [deserialize(one) for one in stored]
    for move in back:
        move.apply(thermodynamic_state(), sampler_state())
    pools = [move._step.pool for move in back]
    assert pools[0] is pools[2] and pools[1] is pools[3] and pools[0] is not pools[1]
    assert not torch.equal(drawn(back[0]), drawn(back[1]))


def test_copies_outlive_their_move(flow_path):
    """They keep the live potential, also one that no file could describe; without any copy nothing is kept."""
    forget()

    def potential(x):
        return TorchPotential(MOLECULE.system)(x)

    move = mcmc.SequenceMove([FlowMove(make_proposal(flow_path, potential, frame="free"))])
    copied = copy.deepcopy(move)
    del move
    gc.collect()
    assert len(registry._SHARED) == 1
    copied.apply(thermodynamic_state(), sampler_state())
    assert copied.move_list[0]._step.proposal.potential is potential
    del copied
    gc.collect()
    assert len(registry._SHARED) == 0


def test_the_flow_knows_its_file(flow_path, tmp_path):
    """Loaded or saved, it need not be named again; changed since, it is an unsaved flow."""
    move = FlowMove(make_proposal(flow_path))
    assert move.flow_path == str(flow_path) and copy.deepcopy(move).flow_sha256 == move.flow_sha256
    flow = make_flow()
    flow.save(tmp_path / "saved.safetensors")
    proposal = FlowProposal(flow, TorchPotential(MOLECULE.system), TEMPERATURE)
    assert FlowMove(proposal).flow_path == str(tmp_path / "saved.safetensors")
    with torch.no_grad():
        next(flow.parameters()).add_(0.1)
    assert FlowMove(proposal).flow_path is None
    (tmp_path / "saved.safetensors").write_bytes(b"")
    assert FlowMove(proposal).flow_path is None


def test_moved_flow_file(flow_path, tmp_path):
    stored = serialize(make_move(flow_path))
    forget()
    elsewhere = tmp_path / "elsewhere.safetensors"
    shutil.move(flow_path, elsewhere)
    move = deserialize(dict(stored))
    with pytest.raises(InputError, match="relink"):
        move.apply(thermodynamic_state(), sampler_state())
    moves.relink(flow_path, elsewhere)
    move.apply(thermodynamic_state(), sampler_state())
    assert move.flow_path == str(elsewhere) and move.n_proposed == 1
    with pytest.raises(InputError, match="no flow file"):
        moves.relink(flow_path, tmp_path / "nowhere")


def test_changed_flow_file(flow_path):
    move = make_move(flow_path)
    stored = serialize(move)
    forget()
    make_flow(seed=1).save(flow_path)
    restored = deserialize(dict(stored))
    with pytest.raises(IncompatibleFlowError, match="has changed"):
        restored.apply(thermodynamic_state(), sampler_state())
    moves.relink(flow_path, flow_path, allow_changed=True)
    restored.apply(thermodynamic_state(), sampler_state())
    assert restored.flow_sha256 != move.flow_sha256


def test_truncated_flow_file(flow_path):
    stored = serialize(make_move(flow_path))
    forget()
    flow_path.write_bytes(flow_path.read_bytes()[:500])
    moves.relink(flow_path, flow_path, allow_changed=True)
    with pytest.raises(CorruptFileError):
        deserialize(dict(stored)).apply(thermodynamic_state(), sampler_state())


def test_a_restored_move_refuses_another_system(flow_path):
    stored = serialize(make_move(flow_path))
    forget()
    stiff = Chain(4, bond_width=0.01)
    with pytest.raises(IncompatibleFlowError, match="HarmonicBondForce"):
        deserialize(dict(stored)).apply(thermodynamic_state(system=stiff.system), sampler_state())


def test_an_unsaved_flow_moves_but_is_not_stored():
    proposal = FlowProposal(make_flow(), TorchPotential(MOLECULE.system), TEMPERATURE)
    move = FlowMove(proposal)
    move.apply(thermodynamic_state(), sampler_state())
    assert move.n_proposed == 1 and move.flow_path is None
    for copied in (lambda: copy.deepcopy(move), lambda: serialize(mcmc.SequenceMove([move]))):
        with pytest.raises(InputError, match=r"flow.save\(path\)"):
            copied()


def test_the_file_has_to_hold_the_flow_in_use(flow_path, tmp_path):
    proposal = FlowProposal(make_flow(seed=1), TorchPotential(MOLECULE.system), TEMPERATURE)
    with pytest.raises(IncompatibleFlowError, match="another flow"):
        FlowMove(proposal, flow_path=flow_path)
    with pytest.raises(InputError, match="no flow file"):
        FlowMove(proposal, flow_path=tmp_path / "nothing")


@pytest.mark.parametrize(
    ("section", "lost"), [("proposal", "flow_path"), ("statistics", "n_accepted"), ("settings", "n_proposals")]
)
def test_a_damaged_storage_is_no_half_a_move(flow_path, section, lost):
    stored = serialize(make_move(flow_path))
    stored[section].pop(lost)
    with pytest.raises(CorruptFileError, match="lacks"):
        deserialize(stored)
    newer = serialize(make_move(flow_path)) | {"format_version": 99}
    with pytest.raises(CorruptFileError, match="newer"):
        deserialize(newer)


def refused_states():
    water = Chain(4).system
    water.setDefaultPeriodicBoxVectors(*(np.eye(3) * 3.0))
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    force.setCutoffDistance(1.0)
    for _ in range(4):
        force.addParticle(0.0, 0.1, 0.0)
    water.addForce(force)
    npt = states.ThermodynamicState(water, 300 * unit.kelvin, 1 * unit.atmosphere)
    nvt = states.ThermodynamicState(water, 300 * unit.kelvin)
    constrained = Chain(4).system
    constrained.addConstraint(0, 1, 0.15)
    return [
        (npt, "constant pressure"),
        (nvt, "NoCutoff"),
        (states.ThermodynamicState(constrained, 300 * unit.kelvin), "constraints=None"),
    ]


@pytest.mark.parametrize(("state", "message"), refused_states())
def test_states_that_are_not_covered_are_refused(flow_path, state, message):
    with pytest.raises(UnsupportedForceError, match=message):
        make_move(flow_path).apply(state, sampler_state())


def test_wrong_atom_count(flow_path):
    frame = states.SamplerState(np.zeros((5, 3)) * unit.nanometer)
    with pytest.raises(IncompatibleFlowError, match="5 atoms"):
        make_move(flow_path).apply(thermodynamic_state(), frame)


@pytest.mark.parametrize("energy", ["auto", "context"])
def test_plain_numbers_are_nanometers(flow_path, energy):
    """As openmmtools' own dynamics take them, also where the flow move comes first."""
    x, v = MOLECULE.sample(1, generator(4))[0].numpy(), np.full((4, 3), 0.1)
    ends = []
    speed = unit.nanometer / unit.picosecond
    for frame in (states.SamplerState(x, v), states.SamplerState(10 * x * unit.angstrom, v * speed)):
        move = make_move(flow_path, 4, energy=energy)
        for _ in range(10):
            move.apply(thermodynamic_state(), frame)
        assert move.n_accepted > 0
        ends.append((positions(frame), frame.velocities.value_in_unit(speed)))
    np.testing.assert_allclose(*(x for x, _ in ends), rtol=1e-9)
    np.testing.assert_array_equal(*(v for _, v in ends))


def test_nan_proposals_are_counted_rejections(flow_path):
    flow = flows.Flow.load(flow_path)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.fill_(torch.nan)
    proposal = FlowProposal(flow, TorchPotential(MOLECULE.system), TEMPERATURE)
    move, frame = FlowMove(proposal, 4), sampler_state()
    before = positions(frame).copy()
    for _ in range(3):
        move.apply(thermodynamic_state(), frame)
    np.testing.assert_array_equal(positions(frame), before)
    assert move.statistics["n_impossible"] == move.statistics["n_proposals"] == 12
    assert move.n_proposed == 3 and move.n_accepted == 0


def test_bad_arguments(flow_path):
    with pytest.raises(InputError, match="energy"):
        make_move(flow_path, energy="best")
    with pytest.raises(InputError, match="at least one proposal"):
        make_move(flow_path, 0)
    with pytest.raises(InputError, match="pool_size"):
        make_move(flow_path, pool_size=0)


def test_seeds(flow_path):
    """Without a seed, NumPy's global state decides, as everywhere in openmmtools."""

    def run():
        np.random.seed(12)
        move, frame = FlowMove(make_proposal(flow_path), flow_path=flow_path), sampler_state()
        for _ in range(10):
            move.apply(thermodynamic_state(), frame)
        return positions(frame)

    np.testing.assert_array_equal(run(), run())


def test_statistics_setter(flow_path):
    move = make_move(flow_path)
    move.apply(thermodynamic_state(), sampler_state())
    kept = move.statistics
    move.statistics = FlowStatistics().as_dict()
    assert move.n_proposed == 0
    move.statistics = kept
    move.apply(thermodynamic_state(), sampler_state())
    assert move.n_proposed == 2


@pytest.mark.parametrize("build", [in_a_field, lambda: heights(7.0)])
@pytest.mark.parametrize("energy", ["auto", "context"])
def test_an_external_field_is_refused_live_and_restored(flow_path, build, energy):
    """The frame that is stored is that of the live proposal's System, not that of the state's."""
    state = thermodynamic_state(system=build().system)
    move = make_move(flow_path, energy=energy)
    stored = serialize(move)
    with pytest.raises(InputError, match="biases of the molecule's shape"):
        move.apply(state, sampler_state())
    forget()
    with pytest.raises(InputError, match="biases of the molecule's shape"):
        deserialize(stored).apply(state, sampler_state())


def test_a_field_that_a_parameter_switches_on_is_refused(flow_path):
    """The Context is the same, its energy is not."""

    class HeightState(states.GlobalParameterState):
        heights = states.GlobalParameterState.GlobalParameter("heights", standard_value=0.0)

    system = heights().system
    state = states.CompoundThermodynamicState(thermodynamic_state(system=system), [HeightState.from_system(system)])
    move, frame = make_move(flow_path), sampler_state()
    move.apply(state, frame)
    state.heights = 7.0
    with pytest.raises(InputError, match="as a whole"):
        move.apply(state, frame)


def test_steps_of_other_ranks_are_counted_in_what_is_stored(flow_path):
    """Rank 0 stores the move; totals reach it from all ranks, its own steps may be none."""
    move = make_move(flow_path)
    move.n_proposed = 10
    assert move.__getstate__()["n_steps"] >= 10
