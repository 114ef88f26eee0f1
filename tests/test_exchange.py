"""Flow moves in replica exchange: openmmtools with a built ladder, and OpenMM's own sampler."""

import math
import random

import numpy as np
import openmm
import pytest
import torch
from analytic_molecules import TEMPERATURE, Chain
from openmm import app, unit
from openmmtools import cache, mcmc
from openmmtools.multistate import (
    MultiStateReporter,
    MultiStateSampler,
    ParallelTemperingSampler,
    ReplicaExchangeSampler,
)
from test_moves import COORDINATES, MOLECULE, forget, make_flow, make_move
from test_sampling import SIGMAS, chain_z, generator, internal_proposal, make_simulation

from openmm_regflow import flows
from openmm_regflow.errors import InputError
from openmm_regflow.metrics import integrated_autocorrelation_time
from openmm_regflow.moves import FlowMove, exchange_acceptance, learned_replica_exchange, temperature_ladder
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.proposals import FlowProposal
from openmm_regflow.sampling import FlowReplicaExchange

TORSIONS = {k: v for k, v in MOLECULE.observables().items() if "torsion" in k}


pytestmark = pytest.mark.usefixtures("reference_platform")


@pytest.fixture
def flow_path(tmp_path):
    path = tmp_path / "flow.safetensors"
    make_flow(temperature=TEMPERATURE).save(path)
    return path


@pytest.mark.parametrize(("ratio", "heat_capacity"), [(1.1, 30.0), (1.3, 30.0), (1.2, 120.0)])
def test_predicted_acceptance(ratio, heat_capacity):
    """Swaps between Gaussian energies with variance C (kT)^2, C such that the means fit detailed balance exactly."""
    g, n = generator(), 200_000
    difference = 1 - 1 / ratio  # of inverse temperatures, the colder one 1
    spread = math.sqrt(heat_capacity * difference**2 * (1 + ratio**2))
    log_ratio = -(spread**2) / 2 + spread * torch.randn(n, generator=g, dtype=torch.float64)
    probability = log_ratio.exp().clamp(max=1)
    error = probability.std() / math.sqrt(n)
    assert abs(probability.mean() - exchange_acceptance(ratio, heat_capacity)) < SIGMAS * error


def test_predicted_acceptance_against_exact_energies_of_two_temperatures():
    """3N - 6 = 6 nearly harmonic degrees of freedom: the prediction is on the safe side of the truth."""
    u, g = TorchPotential(MOLECULE.system), generator()
    beta = [1 / Chain(4, t).kT for t in (300.0, 600.0)]
    energies = [u(Chain(4, t).sample(20_000, g)) for t in (300.0, 600.0)]
    probability = ((beta[0] - beta[1]) * (energies[0] - energies[1])).exp().clamp(max=1)
    predicted = exchange_acceptance(2.0, (3 * 4 - 6) / 2)
    error = probability.std() / math.sqrt(len(probability))
    assert predicted > 0.2
    assert predicted - SIGMAS * error < probability.mean() < 1


def test_ladder():
    ladder = temperature_ladder(300 * unit.kelvin, 1000, n_atoms=22, acceptance=0.3)
    np.testing.assert_allclose(ladder[1:] / ladder[:-1], (1000 / 300) ** (1 / (len(ladder) - 1)))
    assert ladder[0] == pytest.approx(300) and ladder[-1] == pytest.approx(1000)
    fewer = (1000 / 300) ** (1 / (len(ladder) - 2))
    assert exchange_acceptance(ladder[1] / ladder[0], 30) >= 0.3 > exchange_acceptance(fewer, 30)
    assert len(temperature_ladder(300, 1000, 5)) == 5
    assert len(temperature_ladder(300, 310, heat_capacity=1.0)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((300, 200, 3), "above the minimum"),
        ((300, 400, 1), "at least 2"),
        ((300, 400), "n_atoms"),
        ((0, 400, 3), "above zero"),
    ],
)
def test_bad_ladders(arguments, message):
    with pytest.raises(InputError, match=message):
        temperature_ladder(*arguments)
    with pytest.raises(InputError, match="between 0 and 1"):
        temperature_ladder(300, 400, n_atoms=5, acceptance=1.5)
    for capacity in (-5.0, math.nan, math.inf):
        with pytest.raises(InputError, match="heat_capacity"):
            temperature_ladder(300, 400, heat_capacity=capacity)
    with pytest.raises(InputError, match="whole number"):
        temperature_ladder(300, 400, 2.5)


def dynamics():
    return mcmc.LangevinDynamicsMove(
        timestep=2.0 * unit.femtosecond, collision_rate=5.0 / unit.picosecond, n_steps=10
    )


def counts(sampler):
    """Flow moves attempted in each state, zero where there is none."""
    sequences = [getattr(move, "move_list", None) for move in sampler.mcmc_moves]
    return [0 if moves is None else moves[1].n_proposed for moves in sequences]


def test_flow_in_the_hottest_state_alone(flow_path, tmp_path):
    np.random.seed(3)
    storage = MultiStateReporter(str(tmp_path / "hot.nc"), checkpoint_interval=1)
    ladder = temperature_ladder(TEMPERATURE, 450, 3)
    sampler = learned_replica_exchange(
        MOLECULE.system, ladder, {-1: make_move(flow_path, 4)}, MOLECULE.sample(3, generator()).numpy(), storage,
        dynamics=dynamics(), number_of_iterations=100, online_analysis_interval=None,
    )  # fmt: skip
    frames = []
    for _ in range(100):
        sampler.run(1)
        cold = list(sampler._replica_thermodynamic_states).index(0)
        frames.append(sampler.sampler_states[cold].positions._value.copy())
    assert counts(sampler) == [0, 0, 100]
    scores = chain_z(torch.as_tensor(np.array(frames)), TORSIONS)
    assert max(map(abs, scores.values())) < SIGMAS, scores
    swaps = sampler._n_accepted_matrix.sum()
    assert swaps > 0


def test_flow_in_every_state_and_another_sampler(flow_path, tmp_path):
    sampler = learned_replica_exchange(
        MOLECULE.system, [300, 350 * unit.kelvin], make_move(flow_path), MOLECULE.sample(1, generator())[0].numpy(),
        tmp_path / "every.nc", dynamics=dynamics(), sampler_class=MultiStateSampler, online_analysis_interval=None,
    )  # fmt: skip
    sampler.run(1)
    assert type(sampler) is MultiStateSampler
    assert counts(sampler) == [1, 1]
    with pytest.raises(InputError, match="state 5"):
        learned_replica_exchange(MOLECULE.system, [300, 350], {5: make_move(flow_path)}, np.zeros((4, 3)), "x.nc")
    with pytest.raises(InputError, match="one per state"):
        learned_replica_exchange(MOLECULE.system, [300, 350], {}, np.zeros((3, 4, 3)), "x.nc")
    for temperatures, moves, shape, words in (
        ([], {}, (4, 3), "no temperatures"),
        ([300, 350], {}, (5, 3), "5 atoms"),
        ([300, 350], {0.5: None}, (4, 3), r"0\.5"),
    ):
        with pytest.raises(InputError, match=words):
            learned_replica_exchange(MOLECULE.system, temperatures, moves, np.zeros(shape), "x.nc")
    forget()


HOT = 450.0


@pytest.mark.parametrize("kind", [ReplicaExchangeSampler, ParallelTemperingSampler])
def test_a_cold_and_a_hot_flow(flow_path, tmp_path, kind):
    """Two flows, each made for its own temperature, at the ends of a ladder: both ends have their exact torsion."""
    hot = Chain(4, HOT)
    hot.system = MOLECULE.system
    torch.manual_seed(0)
    flow = flows.spline(COORDINATES, n_layers=2, hidden=16, seed=4).double()
    flow.metadata = flows.FlowMetadata(temperature=HOT)
    flow.save(tmp_path / "hot.safetensors")
    proposal = FlowProposal(flow, TorchPotential(MOLECULE.system), HOT)
    ends = {0: make_move(flow_path, 4), -1: FlowMove(proposal, 4, seed=3)}
    sampler = learned_replica_exchange(
        MOLECULE.system, temperature_ladder(TEMPERATURE, HOT, 3), ends, MOLECULE.sample(3, generator()).numpy(),
        MultiStateReporter(str(tmp_path / "ends.nc"), checkpoint_interval=1), dynamics=dynamics(), sampler_class=kind,
        number_of_iterations=150, online_analysis_interval=None,
    )  # fmt: skip
    assert type(sampler) is kind
    np.random.seed(5)
    frames = {0: [], 2: []}
    for _ in range(150):
        sampler.run(1)
        for state, kept in frames.items():
            replica = list(sampler._replica_thermodynamic_states).index(state)
            kept.append(sampler.sampler_states[replica].positions._value.copy())
    assert counts(sampler) == [150, 0, 150]
    files = [sampler.mcmc_moves[state].move_list[1].flow_sha256 for state in frames]
    assert files[0] != files[1] and sampler._n_accepted_matrix.sum() > 0
    for (_, kept), target in zip(frames.items(), (MOLECULE, hot)):
        torsions = {k: v for k, v in target.observables().items() if "torsion" in k}
        scores = chain_z(torch.as_tensor(np.array(kept)), torsions)
        assert max(map(abs, scores.values())) < SIGMAS, scores


def own_exchange(temperatures, seed=1, **options):
    simulation = make_simulation(MOLECULE, seed=seed)
    states = [{"temperature": t * unit.kelvin} for t in temperatures]
    return FlowReplicaExchange(states, simulation, 10, internal_proposal(), seed=seed, **options)


@pytest.mark.parametrize("flow_states", [None, [-1]])
def test_openmm_replica_exchange_reproduces_the_cold_torsion(flow_states):
    random.seed(2)
    sampler = own_exchange((300.0, 450.0), flow_states=flow_states, n_proposals=4, pool_size=4000)
    frames = []

    def report(sampler):
        cold = sampler.replicaStateIndex.index(0)
        frames.append(sampler.replicaConformation[cold].getPositions(asNumpy=True)._value)

    sampler.reporters.append(report)
    sampler.simulate(500)
    scores = chain_z(torch.as_tensor(np.array(frames)), TORSIONS)
    assert max(map(abs, scores.values())) < SIGMAS, scores
    assert [total.n_proposed for total in sampler.statistics] == ([500, 500] if flow_states is None else [0, 500])


def test_openmm_replica_exchange_with_context_parameters():
    """Two states that differ in a global parameter: each flow step uses its own state's energy."""
    molecule = Chain(4)
    force = openmm.CustomTorsionForce("tilt*cos(theta)")
    force.addGlobalParameter("tilt", 0.0)
    force.addTorsion(0, 1, 2, 3, [])
    molecule.system.addForce(force)
    simulation = make_simulation(molecule)
    states = [{"temperature": 300 * unit.kelvin, "tilt": value} for value in (0.0, 4.0)]
    sampler = FlowReplicaExchange(states, simulation, 10, internal_proposal(), n_proposals=4, pool_size=4000, seed=1)
    frames = []

    def report(sampler):
        tilted = sampler.replicaStateIndex.index(1)
        frames.append(sampler.replicaConformation[tilted].getPositions(asNumpy=True)._value)

    sampler.reporters.append(report)
    sampler.simulate(400)
    grid = molecule.torsion
    weight = np.exp(-4.0 * np.cos(grid.x) / molecule.kT)
    exact = grid.mean(lambda p: weight * np.cos(p)) / grid.mean(lambda p: weight)
    cosine = TORSIONS["cos torsion"][0]
    assert abs(chain_z(torch.as_tensor(np.array(frames)), {"cos": (cosine, exact)})["cos"]) < SIGMAS
    assert abs(chain_z(torch.as_tensor(np.array(frames)), {"cos": TORSIONS["cos torsion"]})["cos"]) > SIGMAS


def test_openmm_replica_exchange_refusals():
    with pytest.raises(InputError, match="name no states"):
        own_exchange((300.0, 400.0), flow_states=[2])
    simulation = make_simulation(MOLECULE)
    with pytest.raises(InputError, match="force groups"):
        FlowReplicaExchange([{"groups": {0}}, {"groups": {1}}], simulation, 10, internal_proposal())
    assert isinstance(own_exchange((300.0, 400.0)), app.ReplicaExchangeSampler)


def oscillators():
    """Ten particles in harmonic wells: a mean energy of 15 kT."""
    system, well = openmm.System(), openmm.CustomExternalForce("500*(x^2+y^2+z^2)")
    for k in range(10):
        system.addParticle(12.0)
        well.addParticle(k, [])
    system.addForce(well)
    return system


def ladder_of_oscillators(storage, dynamics=None, **options):
    np.random.seed(0)
    return learned_replica_exchange(
        oscillators(), [300.0, 400.0], {}, 0.05 * np.random.normal(size=(10, 3)), str(storage), dynamics=dynamics,
        online_analysis_interval=None, **options,
    )  # fmt: skip


def test_exchanges_do_not_heat_the_coldest_state(tmp_path):
    """Velocities kept from the temperature that a replica came from heat it by 0.8 of its 15 kT."""
    move = mcmc.LangevinDynamicsMove(
        timestep=8.0 * unit.femtosecond, collision_rate=1.0 / unit.picosecond, n_steps=60
    )
    sampler, energies = ladder_of_oscillators(tmp_path / "heat.nc", move, number_of_iterations=1500), []
    assert not move.reassign_velocities  # a copy is used
    for _ in range(1500):
        sampler.run(1)
        energies.append(sampler._energy_thermodynamic_states[list(sampler._replica_thermodynamic_states).index(0), 0])
    u = np.array(energies[50:])
    error = u.std() * math.sqrt(integrated_autocorrelation_time(u) / len(u))
    assert abs(u.mean() - 15.0) < SIGMAS * error


def test_runs_go_as_far_as_they_are_told_to(tmp_path):
    """openmmtools' own limit of one iteration is not the default; the one that is stored, and one given, count."""
    sampler = ladder_of_oscillators(tmp_path / "four.nc", dynamics())
    sampler.run(4)
    assert sampler.iteration == 4
    back = ReplicaExchangeSampler.from_storage(str(tmp_path / "four.nc"))
    assert back.number_of_iterations == math.inf
    sampler = ladder_of_oscillators(tmp_path / "two.nc", dynamics(), number_of_iterations=2)
    sampler.run(4)
    assert sampler.iteration == 2


def test_dynamics_within_other_moves_draw_velocities_too(tmp_path):
    inner = mcmc.WeightedMove([(mcmc.SequenceMove([dynamics(), dynamics()]), 1.0)])
    sampler = ladder_of_oscillators(tmp_path / "nested.nc", inner)
    for move in sampler.mcmc_moves:
        assert [part.reassign_velocities for part in move.move_set[0][0].move_list] == [True, True]


def test_default_dynamics_follow_the_seed_and_are_stored(tmp_path):
    ends = []
    for name in ("a.nc", "b.nc"):
        cache.global_context_cache.empty()
        sampler = ladder_of_oscillators(tmp_path / name, replica_mixing_scheme="swap-neighbors")
        sampler.run(2)
        assert len(cache.global_context_cache) == 2  # of dynamics and of energies: a new seed makes no new Context
        ends.append([state.positions._value for state in sampler.sampler_states])
    np.testing.assert_array_equal(*ends)
    back = ReplicaExchangeSampler.from_storage(str(tmp_path / "b.nc"))
    assert all(move.reassign_velocities for move in back.mcmc_moves)
    back.extend(1)
    assert back.iteration == 1  # from the checkpoint at 0
