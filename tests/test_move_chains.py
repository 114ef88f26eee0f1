"""Long chains of FlowMove on targets with known answers, alone and mixed; the same tests see every planted error."""

import math

import numpy as np
import openmm
import pytest
import torch
from analytic_molecules import (
    TEMPERATURE,
    Chain,
    GaussianFlow,
    MethylChain,
    SolvatedChain,
    Well,
    bend,
    dihedral,
    distance,
)
from openmm import unit
from openmmtools import cache, mcmc, states
from scipy import stats
from test_moves import OtherStatesEnergy, sampler_state, thermodynamic_state, tilted_state
from test_sampling import (
    SIGMAS,
    EnergyOnly,
    MissingJacobian,
    OtherState,
    WrongSign,
    chain_z,
    generator,
    ks_p_value,
    velocity_correlation,
)

from openmm_regflow import flows
from openmm_regflow.coordinates.cartesian import random_rotations
from openmm_regflow.moves import FlowMove
from openmm_regflow.potentials import OpenMMPotential, TorchPotential
from openmm_regflow.proposals import FlowProposal, SubsetProposal
from openmm_regflow.sampling import system_masses
from openmm_regflow.units import GAS_CONSTANT

#: Chance that a right chain fails one figure.
FALSE_ALARM = 1e-5


pytestmark = pytest.mark.usefixtures("reference_platform")


def internal_flow(target, data=None):
    """Not trained at all: stiff coordinates whitened, torsions uniform."""
    x = target.sample(2000, generator(1)) if data is None else data
    return flows.spline(flows.coordinates_for(target.topology, x), n_layers=2, hidden=16).double()


def cartesian_flow(target, n_steps=250):
    """Trained for seconds: without any training hardly a draw would be a molecule."""
    g = generator(1)
    shapes = target.sample(10_000, g)
    shapes = shapes - shapes.mean(1, keepdim=True)
    flow = flows.real_nvp(flows.coordinates_for(None, shapes, "cartesian"), n_layers=6, hidden=32).double()
    optimiser = torch.optim.Adam(flow.parameters(), 3e-3)
    for _ in range(n_steps):
        x = shapes[torch.randint(len(shapes), (256,), generator=g)] @ random_rotations(256, g)
        x = x + flow.com_std * torch.randn(256, 1, 3, generator=g, dtype=torch.float64)
        loss = -flow._log_prob(x).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return flow.requires_grad_(False)


class Case:
    """A target, a poor flow of it, and what to compare: names of grids with the coordinate that each describes."""

    def __init__(self, name):
        self.name = name
        self.kind, self.options = FlowProposal, {}
        self.target, self.flow, self.histograms = getattr(self, f"_{name}")()

    def _well(self):
        """One atom; skewed double well and exponential wall, fixed frame."""
        flow = GaussianFlow(torch.tensor([[0.05, -0.1, 0.02]]), torch.diag(torch.tensor([0.2, 0.2, 0.12])) ** 2)
        return Well(), flow, {"x": lambda r: r[:, 0, 0], "y": lambda r: r[:, 0, 1]}

    def _cartesian(self):
        """Three atoms of unequal mass on a CartesianMap."""
        target = Chain(3, bond_width=0.04, angle_width=0.5)
        histograms = {"bond": lambda r: distance(r, 0, 1), "angle": lambda r: bend(r, 0, 1, 2)}
        return target, cartesian_flow(target), histograms

    def _internal(self):
        """Four atoms of unequal mass on an InternalMap; wide bonds, so that their volume element matters."""
        target = Chain(4, bond_width=0.04, angle_width=0.4)
        histograms = {"bond": lambda r: distance(r, 0, 1), "angle": lambda r: bend(r, 0, 1, 2), "torsion": dihedral}
        return target, internal_flow(target), histograms

    def _methyl(self):
        """22 atoms on an InternalMap with a rotor whose symmetry the target does not have."""
        target = MethylChain()
        return target, internal_flow(target), {
            "torsion": lambda r: dihedral(r[:, [16, 17, 18, 19]]),
            "weak": lambda r: dihedral(r[:, 5:9]),
            "bond": lambda r: distance(r, 18, 20),
        }

    def _subset(self):
        """A part of five atoms. The frame holds the atom that the fifth one hangs on, so the part's own distribution
        is that of :class:`Chain` wherever the fifth atom is."""
        target = SolvatedChain()
        target.n_atoms, target.topology = 5, target.chain.topology
        self.kind, self.options = SubsetProposal, {"atom_subset": target.subset, "frame_atoms": (0, 1, 2)}
        part, chain = list(target.subset), target.chain
        target.torsion, target.angle = chain.torsion, chain.angle
        flow = internal_flow(chain)
        return target, flow, {"torsion": lambda r: dihedral(r[:, part]), "angle": lambda r: bend(r[:, part], 0, 1, 2)}

    def proposal(self, kind=None, potential=OpenMMPotential):
        options = (self.target.system, "Reference") if potential is OpenMMPotential else (self.target.system,)
        return (kind or self.kind)(self.flow, potential(*options), TEMPERATURE, **self.options)

    def state(self):
        return states.ThermodynamicState(self.target.system, TEMPERATURE * unit.kelvin)


_CASES = {}


def case(name):
    if name not in _CASES:
        _CASES[name] = Case(name)
    return _CASES[name]


def chain(case, move, n, thermodynamic=None):
    """Positions after each of ``n`` moves from one exact configuration `(n, n_atoms, 3)`."""
    np.random.seed(7)
    start = states.SamplerState(case.target.sample(1, generator(6))[0].numpy() * unit.nanometer)
    sampler = mcmc.MCMCSampler(thermodynamic or case.state(), start, move)
    frames = []
    for _ in range(n):
        sampler.run(1)
        frames.append(sampler.sampler_state.positions.value_in_unit(unit.nanometer))
    return torch.as_tensor(np.array(frames))


def figures(case, x, conditional=False):
    """Worst |z| over the moments and basins, and the smallest KS p-value, both with the chain's own effective size."""
    observables = case.target.observables()
    if conditional:  # the part alone moves: nothing about its surroundings
        observables = {k: v for k, v in observables.items() if not k.startswith("spring")}
    z = max(map(abs, chain_z(x, observables).values()))
    p_values, sizes = zip(*(
        ks_p_value(coordinate(x)[:, None], getattr(case.target, grid)) for grid, coordinate in case.histograms.items()
    ))
    return z, min(p_values), min(sizes)


LENGTHS = {1: 3000, 4: 700, 64: 300}


@pytest.mark.parametrize("n_proposals", list(LENGTHS))
@pytest.mark.parametrize("name", ["well", "cartesian", "internal", "methyl", "subset"])
def test_chains_of_flow_moves_alone(name, n_proposals):
    """Moments, basins and histograms of skewed and multimodal targets, from 1 atom to 22, on every coordinate map."""
    target = case(name)
    move = FlowMove(target.proposal(), n_proposals, 4096, seed=1)
    z, p_value, n_effective = figures(target, chain(target, move, LENGTHS[n_proposals]), name == "subset")
    assert z < SIGMAS and p_value > FALSE_ALARM, (z, p_value)
    ess = move.statistics["effective_sample_size"]
    poor = math.isnan(ess) if name == "subset" else ess < 0.7  # weights of different surroundings have none
    assert n_effective > 20 and poor, (n_effective, move.statistics)


def metropolised(n_steps=5):
    """Dynamics that are exact at any time step."""
    return mcmc.GHMCMove(timestep=3.0 * unit.femtosecond, collision_rate=5.0 / unit.picosecond, n_steps=n_steps)


def langevin(n_steps=10):
    """At a time step whose error is far below the chain's own."""
    return mcmc.LangevinDynamicsMove(
        timestep=1.0 * unit.femtosecond, collision_rate=5.0 / unit.picosecond, n_steps=n_steps
    )


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("well", langevin), ("cartesian", metropolised), ("internal", metropolised), ("internal", langevin),
        ("methyl", metropolised), ("subset", metropolised), ("subset", langevin),
    ],
)  # fmt: skip
def test_mixed_chains(name, other):
    """With Langevin dynamics and with openmmtools' Metropolised dynamics; where a part moves, now all atoms count."""
    target = case(name)
    move = FlowMove(target.proposal(), 4, 4096, seed=2)
    x = chain(target, mcmc.SequenceMove([other(), move]), 700)
    z, p_value, n_effective = figures(target, x)
    assert z < SIGMAS and p_value > FALSE_ALARM and n_effective > 20, (z, p_value, n_effective)


def test_flow_moves_of_different_sizes_chosen_at_random():
    """Two flow moves and dynamics in a WeightedMove."""
    target = case("internal")
    kinds = [FlowMove(target.proposal(), n, 4096, seed=3) for n in (1, 16)]
    np.random.seed(3)
    move = mcmc.WeightedMove([(kinds[0], 0.4), (kinds[1], 0.4), (metropolised(), 0.2)])
    z, p_value, _ = figures(target, chain(target, move, 1200))
    assert all(300 < kind.n_proposed < 700 for kind in kinds)
    assert z < SIGMAS and p_value > FALSE_ALARM, (z, p_value)


@pytest.mark.parametrize("n_proposals", [1, 4])
@pytest.mark.parametrize("name", ["well", "internal"])
@pytest.mark.parametrize("planted", [WrongSign, MissingJacobian, EnergyOnly, OtherState])
def test_planted_errors_make_the_chain_test_fail(name, planted, n_proposals):
    """log q with the wrong sign, without the volume element, left out; the energy of another state."""
    target = case(name)
    move = FlowMove(target.proposal(planted), n_proposals, 4096, seed=1)
    z, p_value, _ = figures(target, chain(target, move, LENGTHS[n_proposals]))
    assert z > SIGMAS or p_value < FALSE_ALARM, (z, p_value)


@pytest.mark.parametrize("planted", [False, True])
def test_the_energy_of_another_state_makes_the_chain_test_fail(planted):
    """A state at twice the temperature: sampled at its own, unless the energy of the proposal's state decides."""
    target = case("internal")
    hot = Case("internal")
    hot.target = Chain(4, 2 * TEMPERATURE, bond_width=0.04, angle_width=0.4)  # widths are those at 300 K
    hot.target.system = target.target.system
    move = (OtherStatesEnergy if planted else FlowMove)(target.proposal(), 16, 4096, seed=3)
    state = states.ThermodynamicState(target.target.system, 2 * TEMPERATURE * unit.kelvin)
    z, p_value, _ = figures(hot, chain(hot, move, 600, state))
    assert bool(z > SIGMAS or p_value < FALSE_ALARM) is planted, (z, p_value)


class StaleVelocities(FlowMove):
    """The planted error: velocities survive an acceptance."""

    def _accept(self, sampler_state, new, system, temperature):
        kept = sampler_state.velocities
        super()._accept(sampler_state, new, system, temperature)
        sampler_state.velocities = kept


def velocity_figures(kind, n=300):
    """Correlation of old and new velocities in a Context as z-score, and the KS p-value of the new ones against
    Maxwell-Boltzmann (velocities in thermal units are normal and independent)."""
    target = case("internal")
    move, state = kind(target.proposal(), 4, 4096, seed=5), target.state()
    frame = states.SamplerState(target.target.sample(1, generator(4))[0].numpy() * unit.nanometer)
    context, _ = cache.global_context_cache.get_context(state)
    scale = np.sqrt(system_masses(target.target.system) / (GAS_CONSTANT * TEMPERATURE))[:, None]

    def velocities():
        frame.apply_to_context(context)
        return (context.getState(getVelocities=True).getVelocities(asNumpy=True)._value * scale).flatten()

    # Far from equilibrium, so that old velocities show in the distribution as well.
    start = 3.0 * torch.randn(4, 3, generator=generator(8)).numpy() / scale
    frame.velocities = unit.Quantity(start, unit.nanometer / unit.picosecond)
    pairs = []
    for _ in range(n):
        before, accepted = velocities(), move.n_accepted
        move.apply(state, frame)
        if move.n_accepted > accepted:
            pairs.append((before, velocities()))
        else:
            np.testing.assert_array_equal(velocities(), before)
    pairs = np.array(pairs)
    assert len(pairs) > 50
    return abs(velocity_correlation(pairs)), stats.kstest(pairs[:, 1].flatten(), "norm").pvalue


def test_velocities_are_redrawn_from_maxwell_boltzmann():
    z, p_value = velocity_figures(FlowMove)
    assert z < SIGMAS and p_value > FALSE_ALARM, (z, p_value)


def test_stale_velocities_make_the_velocity_test_fail():
    z, p_value = velocity_figures(StaleVelocities)
    assert z > SIGMAS or p_value < FALSE_ALARM, (z, p_value)


def test_parameters_and_energy_after_an_accepted_move():
    """A state with a Context parameter: the parameter stays, the energy is that of the new positions with it."""
    target, state = case("internal"), tilted_state(4.0)
    move, frame = FlowMove(target.proposal(), 8, seed=1), sampler_state()
    context, _ = cache.global_context_cache.get_context(state)
    while move.n_accepted < 5:
        move.apply(state, frame)
        assert state.tilt == context.getParameter("tilt") == 4.0
    frame.apply_to_context(context)
    energy = context.getState(getEnergy=True).getPotentialEnergy()._value
    cosine = float(dihedral(torch.as_tensor(frame.positions._value)).cos())
    plain = float(OpenMMPotential(Chain(4).system, "Reference")(frame.positions._value[None]))
    assert energy == pytest.approx(plain + 4.0 * cosine, rel=1e-9)
    assert frame.box_vectors is None


def test_box_after_an_accepted_move():
    """A part of a periodic System in another box than the System's default one."""
    molecule = SolvatedChain([[1.6, 0, 0], [0.3, 1.7, 0], [-0.4, 0.5, 1.8]])
    proposal = SubsetProposal(
        case("subset").flow, OpenMMPotential(molecule.system, "Reference"), TEMPERATURE, molecule.subset
    )
    move, state = FlowMove(proposal, 8, seed=1), states.ThermodynamicState(molecule.system, TEMPERATURE * unit.kelvin)
    box = np.array([[1.7, 0, 0], [0.2, 1.8, 0], [-0.3, 0.4, 1.9]])
    frame = states.SamplerState(
        molecule.sample(1, generator(3))[0].numpy() * unit.nanometer, box_vectors=box * unit.nanometer
    )
    context, _ = cache.global_context_cache.get_context(state)
    while move.n_accepted < 5:
        move.apply(state, frame)
        for vectors in (frame.box_vectors, context.getState().getPeriodicBoxVectors(asNumpy=True)):
            np.testing.assert_array_equal(np.asarray(vectors._value), box)
    frame.apply_to_context(context)
    energy = context.getState(getEnergy=True).getPotentialEnergy()._value
    assert energy == pytest.approx(float(energy_in(molecule.system, box, frame.positions._value)), rel=1e-9)


def energy_in(system, box, x):
    """[kJ/mol], in a Context of its own."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPeriodicBoxVectors(*box)
    context.setPositions(x)
    return context.getState(getEnergy=True).getPotentialEnergy()._value


class Counting(TorchPotential):
    """Counts the configurations that it is asked for."""

    n_evaluated = 0

    def __call__(self, x):
        self.n_evaluated += len(x)
        return super().__call__(x)


def test_no_energy_is_evaluated_in_vain():
    """The pool's energies are evaluated where they decide and nowhere else, one batch and one current state a time."""
    target = case("internal")
    counting = Counting(target.target.system)
    proposal = FlowProposal(target.flow, counting, TEMPERATURE, frame="free")
    by_context = FlowMove(proposal, 4, pool_size=100, energy="context", seed=1)
    plain = FlowMove(proposal, 4, pool_size=100, seed=1)
    state, frame = target.state(), states.SamplerState(target.target.sample(1, generator())[0].numpy() * unit.nanometer)
    for _ in range(30):  # 120 draws
        by_context.apply(state, frame)
    assert counting.n_evaluated == 0
    for _ in range(30):
        plain.apply(state, frame)
    assert counting.n_evaluated == 200 + 30
    pool = plain._step.pool
    left, before = len(pool), counting.n_evaluated
    pool.take(left, energies=False)
    pool.take(1, energies=False)
    assert counting.n_evaluated == before
    batch = pool.take(3)
    assert counting.n_evaluated == before + 99 and len(pool) == 96
    torch.testing.assert_close(batch.u, proposal.reduced_potential(batch.positions))


def test_thermodynamic_states_share_one_evaluation():
    """Two temperatures of one System draw from one pool, its energies rescaled."""
    counting = Counting(Chain(4).system)
    proposal = FlowProposal(case("internal").flow, counting, TEMPERATURE, frame="free")
    move, frame = FlowMove(proposal, 4, pool_size=100, seed=1), sampler_state()
    for k in range(20):
        move.apply(thermodynamic_state(300.0 + 50 * (k % 2)), frame)
    assert counting.n_evaluated == 100 + 20
