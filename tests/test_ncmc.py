"""NCMC flow moves: exact in a small bath with an exact sampler."""

import copy
import math

import numpy as np
import openmm
import pytest
import torch
from analytic_molecules import KT, MASSES, TEMPERATURE, Chain, distance
from openmm import unit
from openmmtools import cache, mcmc, multistate, states, testsystems
from openmmtools.utils import deserialize, serialize
from test_moves import COORDINATES, forget
from test_sampling import SIGMAS, generator

from openmm_regflow import flows
from openmm_regflow.device import openmm_properties
from openmm_regflow.errors import CorruptFileError, IncompatibleFlowError, InputError, UnsupportedForceError
from openmm_regflow.moves import NCMCFlowMove
from openmm_regflow.moves.ncmc import frozen_system
from openmm_regflow.potentials import OpenMMPotential
from openmm_regflow.proposals import SubsetProposal

N_SOLVENT, EPSILON, SIGMA = 3, 0.6, 0.25
SPREAD = {"chain": 0.05, "solvent": 0.18}
MASSES_ALL = np.array([*MASSES, *[18.0] * N_SOLVENT])


class Bath:
    """A chain of four charged atoms among Lennard-Jones ions, all held near the origin.

    Without the interaction between chain and bath, and within the bath, everything is independent and can be drawn
    exactly; rejection with the interaction energy, bounded below, draws from the full distribution.
    """

    subset = (0, 1, 2, 3)

    def __init__(self):
        self.chain = Chain(4)
        self.n_atoms = 4 + N_SOLVENT
        self.system = openmm.System()
        for mass in (*MASSES, *[18.0] * N_SOLVENT):
            self.system.addParticle(mass)
        for force in self.chain.system.getForces():
            self.system.addForce(openmm.XmlSerializer.clone(force))
        self.system.addForce(self._nonbonded())
        holder = openmm.CustomExternalForce("k*(x^2+y^2+z^2)/2")
        holder.addPerParticleParameter("k")
        holder.addParticle(0, [KT / SPREAD["chain"] ** 2])
        for i in range(N_SOLVENT):
            holder.addParticle(4 + i, [KT / SPREAD["solvent"] ** 2])
        self.system.addForce(holder)

    def _nonbonded(self):
        force = openmm.NonbondedForce()
        force.setNonbondedMethod(openmm.NonbondedForce.NoCutoff)
        for charge in (0.15, -0.15, 0.15, -0.15):
            force.addParticle(charge, SIGMA, EPSILON)
        for i in range(N_SOLVENT):
            force.addParticle(0.05 if i % 2 else -0.05, SIGMA, EPSILON)
        for i in range(4):
            for j in range(i):
                force.addException(i, j, 0.0, 1.0, 0.0)
        for i in range(4, self.n_atoms):
            for j in range(4, i):
                force.addException(i, j, 0.0, 1.0, 0.0)
        return force

    def interaction(self, x):
        """Between chain and bath [kJ/mol]."""
        r = torch.cdist(x[:, :4], x[:, 4:])
        charge = torch.tensor([0.15, -0.15, 0.15, -0.15])[:, None] * torch.tensor([-0.05, 0.05, -0.05])
        s6 = (SIGMA / r) ** 6
        return (4 * EPSILON * (s6**2 - s6) + 138.93545764438198 * charge / r).sum((1, 2))

    def sample(self, n, g, bound=-5.0):
        kept, total = [], 0
        while total < n:
            m = 400_000
            chain = self.chain.sample(m, g)
            chain = chain - chain[:, :1] + SPREAD["chain"] * torch.randn(m, 1, 3, generator=g, dtype=torch.float64)
            bath = SPREAD["solvent"] * torch.randn(m, N_SOLVENT, 3, generator=g, dtype=torch.float64)
            x = torch.cat([chain, bath], 1)
            log_p = bound - self.interaction(x) / KT
            if float(log_p.max()) > 0:
                raise RuntimeError("the bound of the rejection sampler is too high")
            kept.append(x[torch.rand(m, generator=g, dtype=torch.float64).log() < log_p])
            total += len(kept[-1])
        return torch.cat(kept)[:n]

    def observables(self):
        chain = {k: v[0] for k, v in self.chain.observables().items()}
        return chain | {
            "nearest": lambda x: torch.cdist(x[:, :4], x[:, 4:]).flatten(1).min(1).values,
            "contact": lambda x: distance(x, 3, 4),
            "interaction": lambda x: self.interaction(x).clamp(max=50.0),
        }


BATH = Bath()


pytestmark = pytest.mark.usefixtures("reference_platform")


@pytest.fixture(scope="module")
def exact():
    """Exact configurations: the first ones start the moves, the others are the reference."""
    return BATH.sample(6000, generator(3))


def make_proposal(kind=SubsetProposal):
    flow = flows.spline(COORDINATES, n_layers=2, hidden=16).double()
    return kind(flow, OpenMMPotential(BATH.system, "Reference"), TEMPERATURE, BATH.subset)


def state():
    return states.ThermodynamicState(BATH.system, TEMPERATURE * unit.kelvin)


def after_one_move(move, start):
    moved = []
    for x in start.numpy():
        frame = states.SamplerState(x * unit.nanometer)
        move.apply(state(), frame)
        moved.append(frame.positions._value.copy())
    return torch.as_tensor(np.array(moved))


def z_scores(moved, reference):
    """Difference of two independent sample means over its standard error."""
    scores = {}
    for name, function in BATH.observables().items():
        a, b = function(moved), function(reference)
        scores[name] = float((a.mean() - b.mean()) / (a.var() / len(a) + b.var() / len(b)).sqrt())
    return scores


def test_the_bath_is_what_openmm_says(exact):
    """The oracle: interaction plus the independent parts is the System's energy."""
    x = exact[:5]
    energies = OpenMMPotential(BATH.system, "Reference")(x) - OpenMMPotential(BATH.chain.system, "Reference")(x[:, :4])
    held = (x[:, 0] ** 2).sum(1) / SPREAD["chain"] ** 2 + (x[:, 4:] ** 2).sum((1, 2)) / SPREAD["solvent"] ** 2
    torch.testing.assert_close(energies, BATH.interaction(x) + KT / 2 * held, rtol=1e-7, atol=1e-6)


def make_move(kind=NCMCFlowMove, n_steps=2, **options):
    return kind(
        make_proposal(), n_steps, pool_size=2000, **{"steps_per_drive": 1, "timestep": 0.001, "seed": 1} | options
    )


@pytest.mark.parametrize(("n_steps", "steps_per_drive"), [(2, 1), (6, 2), pytest.param(40, 1, marks=pytest.mark.slow)])
def test_a_move_leaves_the_exact_distribution_invariant(exact, n_steps, steps_per_drive):
    move = make_move(n_steps=n_steps, steps_per_drive=steps_per_drive)
    moved = after_one_move(move, exact[:400])
    assert move.n_accepted > 50
    scores = z_scores(moved, exact[400:])
    assert max(map(abs, scores.values())) < SIGMAS, scores


def test_the_work_is_reported_in_parts(exact):
    """Densities, drives and shadow work add up to the log acceptance ratio."""
    ratios = []

    class Recorded(NCMCFlowMove):
        def _decide(self, log_ratio):
            ratios.append((log_ratio, sum(self.last_work.values())))
            return super()._decide(log_ratio)

    after_one_move(make_move(Recorded, 10, steps_per_drive=2), exact[:5])
    for log_ratio, work in ratios:
        assert log_ratio == pytest.approx(-work, rel=1e-6, abs=1e-3)


class WrongSign(NCMCFlowMove):
    """The planted error: log q enters with the wrong sign."""

    def _proposed(self, x):
        path, density = super()._proposed(x)
        return path, -density


class NoWork(NCMCFlowMove):
    """The planted error: the work of the drives is forgotten."""

    def _context(self, thermodynamic_state, context_cache):
        context = super()._context(thermodynamic_state, context_cache)
        self._switched[2].get_protocol_work = lambda dimensionless: 0.0
        return context


def log_ratios(kind, exact, n_steps, n, **options):
    """Log acceptance ratios of moves from equilibrium."""
    ratios = []

    class Recorded(kind):
        def _decide(self, log_ratio):
            ratios.append(log_ratio)
            return super()._decide(log_ratio)

    after_one_move(make_move(Recorded, n_steps, **options), exact[:n])
    return torch.tensor(ratios)


def fluctuation_z(kind, exact, n_steps, n=400, **options):
    """Crooks' theorem for a protocol that is its own reverse, as a z-score.

    With L the log acceptance ratio from equilibrium, ``p(L) = p(-L) exp(-L)``, so ``exp(L)`` where L < 0 and ``-1``
    where L > 0 average to zero together (both bounded by one).
    """
    ratio = log_ratios(kind, exact, n_steps, n, **options)
    values = torch.where(ratio < 0, ratio.exp(), -1.0)
    return float(values.mean() / (values.std() / math.sqrt(n)))


@pytest.mark.parametrize("n_steps", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_acceptance_ratios_obey_the_fluctuation_theorem(exact, n_steps):
    assert abs(fluctuation_z(NCMCFlowMove, exact, n_steps)) < SIGMAS


@pytest.mark.parametrize("kind", [WrongSign, NoWork])
def test_a_wrong_density_or_forgotten_work_is_seen(exact, kind):
    assert abs(fluctuation_z(kind, exact, 2)) > SIGMAS


def test_the_subset_stands_still_while_the_surroundings_move(exact):
    frozen = frozen_system(BATH.system, list(BATH.subset))
    same = OpenMMPotential(frozen, "Reference")(exact[:20]) - OpenMMPotential(BATH.system, "Reference")(exact[:20])
    torch.testing.assert_close(same, torch.zeros(20, dtype=torch.float64), atol=1e-9, rtol=0)
    ends = []

    class Recorded(NCMCFlowMove):
        def _proposed(self, x):
            path, density = super()._proposed(x)
            ends.append(path[-1])
            return path, density

        def _decide(self, log_ratio):
            here = self._switched[1].getState(getPositions=True).getPositions(asNumpy=True)._value
            ends.append(torch.as_tensor(np.array(here)))
            return super()._decide(log_ratio)

    after_one_move(make_move(Recorded, 20, steps_per_drive=5), exact[:3])
    for start, (goal, end) in zip(exact, zip(ends[::2], ends[1::2])):
        torch.testing.assert_close(end[:4], goal)
        assert bool((end[4:] != start[4:]).all())


def test_a_box_of_water_loses_what_would_disturb_the_switch():
    """No constraint within the subset, none lost elsewhere, no CMMotionRemover; the energy is untouched."""
    box = testsystems.AlanineDipeptideExplicit()
    frozen = frozen_system(box.system, list(range(22)))
    assert not any(isinstance(force, openmm.CMMotionRemover) for force in frozen.getForces())
    assert box.system.getNumConstraints() - frozen.getNumConstraints() == 12  # bonds to hydrogen
    assert box.system.getParticleMass(0)._value > 0  # a copy
    x = torch.as_tensor(box.positions.value_in_unit(unit.nanometer)).repeat(2, 1, 1)
    x[1, :22] += 0.02 * torch.randn(22, 3, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(
        OpenMMPotential(frozen, "CPU")(x), OpenMMPotential(box.system, "CPU")(x), rtol=1e-6, atol=0
    )


def test_constant_pressure_is_covered(exact):
    """A box with a barostat: the volume stays through the move."""
    system = copy.deepcopy(BATH.system)
    nonbonded = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    nonbonded.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    nonbonded.setCutoffDistance(1.0)
    system.setDefaultPeriodicBoxVectors(*(3.0 * np.eye(3)))
    proposal = SubsetProposal(make_proposal().flow, OpenMMPotential(system, "Reference"), TEMPERATURE, BATH.subset)
    move = NCMCFlowMove(proposal, 4, steps_per_drive=1, timestep=0.001, seed=1)
    pressed = states.ThermodynamicState(system, TEMPERATURE * unit.kelvin, 1 * unit.bar)
    frame = states.SamplerState(exact[0].numpy() * unit.nanometer, box_vectors=2.9 * np.eye(3) * unit.nanometer)
    for _ in range(20):
        move.apply(pressed, frame)
    assert move.n_accepted > 0
    np.testing.assert_allclose(frame.box_vectors.value_in_unit(unit.nanometer), 2.9 * np.eye(3))


def test_velocities_that_took_part_in_the_decision_are_thrown_away(exact):
    """After an acceptance all velocities are fresh; after a rejection the old ones stay."""
    ends, speed = [], unit.nanometer / unit.picosecond

    class Recorded(NCMCFlowMove):
        def _decide(self, log_ratio):
            ends.append(np.array(self._switched[1].getState(getVelocities=True).getVelocities(asNumpy=True)._value))
            return super()._decide(log_ratio)

    move, energies = make_move(Recorded), []
    for x in exact[:150].numpy():
        frame = states.SamplerState(x * unit.nanometer, np.full_like(x, 9.0) * speed)
        before = move.n_accepted
        move.apply(state(), frame)
        v = frame.velocities.value_in_unit(speed)
        if move.n_accepted == before:
            assert (v == 9.0).all()
        else:
            assert not np.isclose(v, ends[-1]).any()
            energies.append(0.5 * (MASSES_ALL[:, None] * v**2).sum() / KT)
    # Kinetic energies have the mean 3N/2 and the variance 3N/2.
    mean = 1.5 * BATH.n_atoms
    assert len(energies) > 20
    assert abs(np.mean(energies) - mean) < SIGMAS * (mean / len(energies)) ** 0.5


def test_the_temperature_is_that_of_the_state(exact):
    """Compatible states share the frozen Context, not its temperature; a state that changes is noticed."""
    move, frame = make_move(), states.SamplerState(exact[0].numpy() * unit.nanometer)
    warm = state()
    move.apply(warm, frame)
    context = move._switched[1]
    warm.temperature = 600 * unit.kelvin
    move.apply(warm, frame)
    assert move._switched[1] is context
    assert move._switched[2].getTemperature().value_in_unit(unit.kelvin) == pytest.approx(600)


def test_the_frozen_context_is_like_those_of_the_cache(exact):
    """Platform and properties are the user's, given to openmmtools' cache."""
    processors = openmm.Platform.getPlatformByName("CPU")
    contexts = cache.ContextCache(platform=processors, platform_properties={"Threads": "1"})
    move, frame = make_move(), states.SamplerState(exact[0].numpy() * unit.nanometer)
    move.apply(state(), frame, contexts)
    context = move._switched[1]
    assert context.getPlatform().getName() == "CPU" and processors.getPropertyValue(context, "Threads") == "1"


@pytest.mark.gpu
def test_switching_with_a_flow_and_contexts_on_the_gpu(exact):
    """As on the CPU, exact samples stay exact; the frozen Context is in mixed precision."""
    platform = openmm.Platform.getPlatformByName("CUDA")
    contexts = cache.ContextCache(platform=platform, platform_properties=openmm_properties("CUDA"))
    flow = copy.deepcopy(make_proposal().flow).to("cuda")
    proposal = SubsetProposal(flow, OpenMMPotential(BATH.system, "CUDA"), TEMPERATURE, BATH.subset)
    move = NCMCFlowMove(proposal, 6, 0.001, pool_size=2000, steps_per_drive=2, seed=1)
    moved = []
    for x in exact[:400].numpy():
        frame = states.SamplerState(x * unit.nanometer)
        move.apply(state(), frame, contexts)
        moved.append(frame.positions.value_in_unit(unit.nanometer))
    context = move._switched[1]
    assert platform.getPropertyValue(context, "Precision") == "mixed" and move.device.type == "cuda"
    assert move.n_accepted > 50
    scores = z_scores(torch.as_tensor(np.array(moved)), exact[400:])
    assert max(map(abs, scores.values())) < SIGMAS, scores


def test_wrong_atom_count():
    with pytest.raises(IncompatibleFlowError, match="5 atoms"):
        make_move().apply(state(), states.SamplerState(np.zeros((5, 3)) * unit.nanometer))


def test_storage_and_statistics(tmp_path, exact):
    path = tmp_path / "flow.safetensors"
    proposal = make_proposal()
    proposal.flow.save(path)
    move = NCMCFlowMove(proposal, 10, 0.001, steps_per_drive=2, flow_path=path, seed=1)
    after_one_move(move, exact[:5])
    stored = serialize(move)
    forget()
    back = deserialize(stored)
    assert type(back) is NCMCFlowMove and back.n_steps == 10 and back.n_proposed == 5
    assert back.steps_per_drive == 2 and back.timestep == 0.001 * unit.picosecond
    after_one_move(back, exact[:5])
    assert back.n_proposed == 10
    damaged = serialize(back)
    damaged["ncmc"].pop("timestep")
    with pytest.raises(CorruptFileError, match="lacks timestep"):
        deserialize(damaged)


def test_a_protocol_that_blows_up_is_a_counted_rejection(exact):
    move = make_move(n_steps=4)
    move.timestep = 1e200 * unit.picosecond
    moved = after_one_move(move, exact[:5])
    assert torch.equal(moved, exact[:5])
    assert move.n_accepted == 0 and move.n_proposed == 5
    assert not all(math.isfinite(part) for part in move.last_work.values())


def test_refusals():
    for n_steps, steps_per_drive in ((7, 2), (5, 5), (10, 0)):
        with pytest.raises(InputError, match="steps_per_drive"):
            NCMCFlowMove(make_proposal(), n_steps, steps_per_drive=steps_per_drive)
    from openmm_regflow.proposals import FlowProposal

    flow = flows.spline(COORDINATES, n_layers=2, hidden=16)
    with pytest.raises(InputError, match="SubsetProposal"):
        NCMCFlowMove(FlowProposal(flow, OpenMMPotential(Chain(4).system), TEMPERATURE))


@pytest.mark.parametrize("kind", ["ReplicaExchangeSampler", "MultiStateSampler", "SAMSSampler"])
def test_openmmtools_samplers_take_the_move(kind, tmp_path, exact):
    """Alone and after dynamics, stored, opened again and continued; its time counts as that of any dynamics."""
    sampler_class = getattr(multistate, kind)
    proposal = make_proposal()
    proposal.flow.save(tmp_path / "flow.safetensors")
    switch = NCMCFlowMove(proposal, 4, 0.001, steps_per_drive=1, seed=1)
    langevin = mcmc.LangevinDynamicsMove(1 * unit.femtosecond, 5 / unit.picosecond, 2)
    sampler = sampler_class(mcmc_moves=[switch, mcmc.SequenceMove([langevin, switch])], number_of_iterations=4)
    ladder = [states.ThermodynamicState(BATH.system, t * unit.kelvin) for t in (TEMPERATURE, 320)]
    starts = [states.SamplerState(x * unit.nanometer) for x in exact[:2].numpy()]
    storage = str(tmp_path / "run.nc")
    reporter = multistate.MultiStateReporter(storage, checkpoint_interval=1)
    sampler.create(ladder, starts[:1] if kind == "SAMSSampler" else starts, reporter)
    sampler.run(2)
    reporter.close()
    del sampler, switch
    forget()
    again = sampler_class.from_storage(multistate.MultiStateReporter(storage, checkpoint_interval=1))
    again.run()
    assert again.iteration == 4
    assert sum(move.n_proposed for move in moves_of(again)) == (4 if kind == "SAMSSampler" else 8)


def moves_of(sampler):
    """The flow moves of all states."""
    return [getattr(move, "move_list", [move])[-1] for move in sampler.mcmc_moves]


def test_parameters_of_the_state_hold_in_the_switch(exact):
    """One move in states of one System that differ in a parameter: the surroundings relax in the state's own energy."""

    class ShiftState(states.GlobalParameterState):
        shift = states.GlobalParameterState.GlobalParameter("shift", standard_value=0.0)

    system = copy.deepcopy(BATH.system)
    pull = openmm.CustomExternalForce("500*(x-shift)^2")
    pull.addGlobalParameter("shift", 0.0)
    for atom in range(4, BATH.n_atoms):
        pull.addParticle(atom, [])
    system.addForce(pull)
    ratios = []

    class Recorded(NCMCFlowMove):
        def _decide(self, log_ratio):
            ratios.append((log_ratio, -sum(self.last_work.values())))
            return super()._decide(log_ratio)

    proposal = SubsetProposal(make_proposal().flow, OpenMMPotential(system, "Reference"), TEMPERATURE, BATH.subset)
    move = Recorded(proposal, 10, 0.001, steps_per_drive=1, seed=1)
    for shift in (0.0, 0.3, 0.1):
        plain = states.ThermodynamicState(system, TEMPERATURE * unit.kelvin)
        own = states.CompoundThermodynamicState(plain, [ShiftState(shift=shift)])
        for x in exact[:5].numpy():
            move.apply(own, states.SamplerState(x * unit.nanometer))
    assert len(ratios) == 15
    np.testing.assert_allclose(*zip(*ratios), atol=1e-6)  # nothing is left for the ends to make up for


def test_weights_of_different_surroundings_are_not_compared(exact):
    move = make_move()
    after_one_move(move, exact[:50])
    assert math.isnan(move.statistics["effective_sample_size"]) and math.isfinite(move.statistics["mean_log_weight"])


def test_virtual_sites_are_refused(exact):
    """Four-point water: the integrator takes forces before it has moved the sites."""
    system = copy.deepcopy(BATH.system)
    site = system.addParticle(0.0)
    system.setVirtualSite(site, openmm.TwoParticleAverageSite(4, 5, 0.5, 0.5))
    for force in system.getForces():
        if isinstance(force, openmm.NonbondedForce):
            force.addParticle(0.0, 1.0, 0.0)
    proposal = SubsetProposal(make_proposal().flow, OpenMMPotential(system, "Reference"), TEMPERATURE, BATH.subset)
    move = NCMCFlowMove(proposal, 4, steps_per_drive=1, timestep=0.001, seed=1)
    x = np.concatenate([exact[0].numpy(), exact[0, 4:6].mean(0, keepdim=True).numpy()])
    here = states.ThermodynamicState(system, TEMPERATURE * unit.kelvin)
    with pytest.raises(UnsupportedForceError, match="1 virtual sites"):
        move.apply(here, states.SamplerState(x * unit.nanometer))
    with pytest.raises(InputError, match="collision_rate"):
        NCMCFlowMove(make_proposal(), 4, steps_per_drive=1, collision_rate=-1.0)
