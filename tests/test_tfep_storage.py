"""States from a real openmmtools sampler: temperatures, alchemical ends, a restraint, each against quadrature."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import openmm
import pytest
from openmm import unit
from openmmtools import alchemy, cache, forces, mcmc, multistate, states, testsystems

from openmm_regflow import tfep
from openmm_regflow.errors import CorruptFileError, InputError, InsufficientDataError
from openmm_regflow.simulate import MultistateRun, load_multistate
from openmm_regflow.units import thermal_energy

#: (temperature [K], electrostatics, sterics, restraint)
ROWS = [(300, 1.0, 1.0, 0.0), (360, 1.0, 1.0, 0.0), (300, 0.0, 1.0, 0.0), (300, 0.0, 0.0, 0.0), (300, 1.0, 1.0, 1.0)]
BURN_IN = 10


class Restraint(states.GlobalParameterState):
    """The parameter of openmmtools' restraint forces."""

    lambda_restraints = states.GlobalParameterState.GlobalParameter("lambda_restraints", standard_value=1.0)


def pair():
    """Two opposite charges with Lennard-Jones spheres on a soft spring, their alchemical form, and a restraint."""
    system, nonbonded = openmm.System(), openmm.NonbondedForce()
    spring = openmm.CustomBondForce("0.5*300*(r-0.45)^2")
    spring.addBond(0, 1, [])
    for charge in (0.15, -0.15):
        system.addParticle(20.0)
        nonbonded.addParticle(charge, 0.3, 0.8)
    system.addForce(nonbonded)
    system.addForce(spring)
    # Decoupled and annihilated are the same with one alchemical particle.
    alchemical = alchemy.AbsoluteAlchemicalFactory().create_alchemical_system(
        system, alchemy.AlchemicalRegion(alchemical_atoms=[0])
    )
    restraint = forces.HarmonicRestraintBondForce(
        spring_constant=300 * unit.kilojoule_per_mole / unit.nanometer**2, restrained_atom_index1=0,
        restrained_atom_index2=1,
    )  # fmt: skip
    alchemical.addForce(restraint)
    return alchemical


def exchange(path, rows, n, particles):
    """Replica exchange of openmmtools over some rows, written to ``path``."""
    system = pair()
    points = [
        states.CompoundThermodynamicState(
            states.ThermodynamicState(system, kelvin * unit.kelvin),
            [
                alchemy.AlchemicalState(lambda_electrostatics=charges, lambda_sterics=spheres),
                Restraint(lambda_restraints=restraint),
            ],
        )
        for kelvin, charges, spheres, restraint in rows
    ]
    integrator = openmm.LangevinMiddleIntegrator(300, 5.0, 0.01)
    integrator.setRandomNumberSeed(1)
    sampler = multistate.ReplicaExchangeSampler(
        mcmc_moves=mcmc.IntegratorMove(integrator, 200, reassign_velocities=True), number_of_iterations=n,
        online_analysis_interval=None,
    )  # fmt: skip
    sampler._have_displayed_citations_before = True
    reporter = multistate.MultiStateReporter(str(path), checkpoint_interval=5, analysis_particle_indices=particles)
    np.random.seed(3)
    sampler.create(points, states.SamplerState(np.array([[0, 0, 0], [0.4, 0, 0]]) * unit.nanometer), reporter)
    contexts = cache.ContextCache(capacity=None, time_to_live=None, platform=openmm.Platform.getPlatform("Reference"))
    contexts.get_context(points[0], integrator)
    sampler.energy_context_cache = sampler.sampler_context_cache = contexts
    sampler.run()
    reporter.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Short runs: positions at every iteration, and at checkpoints only."""
    folder = tmp_path_factory.mktemp("storage")
    for name, particles in (("dense.nc", [0, 1]), ("sparse.nc", ())):
        exchange(folder / name, [ROWS[0], ROWS[3], ROWS[4]], 15, particles)
    return folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """A run that is long enough for free energies."""
    return exchange(tmp_path_factory.mktemp("long") / "exchange.nc", ROWS, 150 + BURN_IN, [0, 1])


def exact(run):
    """Free energies of all states relative to the first: -log of the integral of r^2 exp(-u(r)), by OpenMM."""
    grid = np.linspace(0.15, 1.4, 400)
    f = []
    for index in range(len(ROWS)):
        context = openmm.Context(
            run.system(index), openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference")
        )
        u = []
        for r in grid:
            context.setPositions([[0, 0, 0], [r, 0, 0]])
            u.append(context.getState(energy=True).getPotentialEnergy()._value)
        f.append(-math.log(np.sum(grid**2 * np.exp(-np.array(u) / thermal_energy(run.temperature(index))))))
    return np.array(f) - f[0]


@pytest.mark.slow
def test_mbar_over_all_states_agrees_with_quadrature(storage):
    run = load_multistate(storage)
    result = tfep.storage_reference(run, burn_in=BURN_IN, generator=1)
    assert (np.abs(result.delta_f - exact(run))[1:] < 4 * result.uncertainty[1:]).all()
    assert result.uncertainty.max() < 0.2
    assert result.verdict.startswith("reliable")


@pytest.mark.slow
@pytest.mark.parametrize(("index", "name"), [(1, "hot"), (2, "charges off"), (3, "spheres off"), (4, "restrained")])
def test_ends_from_storage_agree_with_quadrature(storage, index, name):
    run = load_multistate(storage)
    (a, x), (b, y) = (tfep.state_from_storage(run, k, burn_in=BURN_IN) for k in (0, index))
    assert b.temperature == ROWS[index][0]
    result = tfep.free_energy_difference(tfep.IdentityMap(), a, b, x, y, trained_on=None, generator=1)
    assert abs(result.delta_f - exact(run)[index]) < 4 * result.uncertainty, name


def test_potentials_are_those_that_the_sampler_stored(folder):
    for name in ("dense.nc", "sparse.nc"):
        run = load_multistate(folder / name)
        assert list(run.stored) == (list(range(15)) if name == "dense.nc" else [4, 9, 14])
        for index in range(3):
            state, x = tfep.state_from_storage(run, index)
            stored = run.energies[run.stored, :, index][run.states[run.stored] == index]
            # Positions are stored in single precision.
            assert np.abs(state.reduced(x) - stored).max() < 1e-3


def test_negative_indices_burn_in_and_stride(folder):
    run = load_multistate(folder / "dense.nc")
    assert np.array_equal(run.frames(-1), run.frames(2))
    assert len(run.frames(0, burn_in=5, stride=2)) == 5


def test_bad_storage_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="no storage"):
        load_multistate(tmp_path / "missing.nc")
    (tmp_path / "torn.nc").write_bytes((folder / "dense.nc").read_bytes()[:2000])
    with pytest.raises(CorruptFileError):
        load_multistate(tmp_path / "torn.nc")
    shutil.copy(folder / "sparse.nc", tmp_path / "alone.nc")
    with pytest.raises(CorruptFileError, match="checkpoint"):
        load_multistate(tmp_path / "alone.nc")
    run = load_multistate(folder / "dense.nc")
    with pytest.raises(InputError, match="3 states"):
        tfep.state_from_storage(run, 3)
    with pytest.raises(InsufficientDataError, match="stored frames"):
        tfep.state_from_storage(run, 0, burn_in=10_000)
    with pytest.raises(InsufficientDataError, match="at least ten"):
        tfep.storage_reference(run, burn_in=10_000)


def sampled(path, points, start, kind=multistate.ReplicaExchangeSampler, reporting=None, n=12, **settings):
    """A short run of any sampler of openmmtools on Reference."""
    move = mcmc.LangevinDynamicsMove(timestep=2 * unit.femtosecond, n_steps=20, reassign_velocities=True)
    sampler = kind(mcmc_moves=move, number_of_iterations=n, online_analysis_interval=None, **settings)
    sampler._have_displayed_citations_before = True
    n_atoms = points[0].n_particles
    keywords = {"checkpoint_interval": 4, "analysis_particle_indices": range(n_atoms)} | (reporting or {})
    reporter = multistate.MultiStateReporter(str(path), **keywords)
    sampler.create(points, start, reporter)
    contexts = cache.ContextCache(capacity=None, time_to_live=None, platform=openmm.Platform.getPlatform("Reference"))
    sampler.energy_context_cache = sampler.sampler_context_cache = contexts
    sampler.run()
    reporter.close()
    return load_multistate(path)


def springs(strengths):
    """One particle on springs [kJ/mol/nm^2]."""
    points = []
    for strength in strengths:
        system, force = openmm.System(), openmm.CustomExternalForce(f"{strength / 2}*(x^2+y^2+z^2)")
        system.addParticle(40.0)
        force.addParticle(0, [])
        system.addForce(force)
        points.append(states.ThermodynamicState(system, 300 * unit.kelvin))
    return points, states.SamplerState(np.zeros((1, 3)) * unit.nanometer)


def test_energies_that_a_sampler_has_not_computed_are_no_zeros(tmp_path):
    """openmmtools stores zeros for states that are no neighbours, where ``locality`` leaves them out."""
    points, start = springs([100, 200, 400, 800])
    run = sampled(tmp_path / "local.nc", points, [start] * 4, multistate.MultiStateSampler, locality=1)
    assert np.isnan(run.energies).any()
    with pytest.raises(InputError, match="locality"):
        tfep.storage_reference(run)
    state, x = tfep.state_from_storage(run, 2)
    assert np.isfinite(state.reduced(x)).all()


def test_positions_that_only_the_checkpoint_has(tmp_path):
    points, start = springs([100, 200])
    run = sampled(tmp_path / "none.nc", points, start, reporting={"position_interval": 0})
    assert list(run.stored) == [3, 7, 11]
    assert len(tfep.state_from_storage(run, 0)[1]) == 3


@pytest.fixture(scope="module")
def squeezed(tmp_path_factory):
    """A Lennard-Jones fluid at constant volume in another box than that of its System, as after equilibration."""
    fluid = testsystems.LennardJonesFluid(nparticles=64, reduced_density=0.2)
    box = [v * 0.9 for v in fluid.system.getDefaultPeriodicBoxVectors()]
    points = [states.ThermodynamicState(fluid.system, kelvin * unit.kelvin) for kelvin in (120, 130)]
    start = states.SamplerState(fluid.positions * 0.9, box_vectors=box)
    return sampled(tmp_path_factory.mktemp("box") / "squeezed.nc", points, start)


def test_states_have_the_box_of_the_run(squeezed):
    for index in (0, 1):
        state, x = tfep.state_from_storage(squeezed, index)
        stored = squeezed.energies[squeezed.stored, :, index][squeezed.states[squeezed.stored] == index]
        assert np.abs(state.reduced(x) - stored).max() < 1e-3
    boxes = squeezed.boxes.copy()
    boxes[5] *= 1.01
    with pytest.raises(InputError, match="boxes of several sizes"):
        tfep.state_from_storage(replace(squeezed, boxes=boxes), 0)
    default = np.array([v._value for v in squeezed.thermodynamic_states[0].system.getDefaultPeriodicBoxVectors()])
    with pytest.raises(InputError, match="off by up to"):  # what one gets by the System's own box
        tfep.state_from_storage(replace(squeezed, boxes=np.broadcast_to(default, boxes.shape)), 0)


def test_walkers_of_one_state_come_one_after_another():
    """Correlation times are then those of a trajectory; a walker that changes its state leaves what it saw in each."""
    positions = np.arange(4)[:, None] + 10.0 * np.arange(3)  # 4 iterations, 3 replicas
    here = np.array([[0, 0, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0]])
    run = MultistateRun(Path("x"), here, np.zeros((4, 3, 2)), np.arange(4), positions[..., None, None])
    run.__dict__["thermodynamic_states"] = springs([100, 200])[0]
    assert run.frames(0).ravel().tolist() == [0, 1, 2, 10, 12, 13, 21, 23]
    assert run.frames(1).ravel().tolist() == [20, 11, 22, 3]  # one at a time: in time
    with pytest.raises(InputError, match="no state 2"):
        run.frames(2)


def test_the_error_of_the_reference_sees_a_slow_mode_under_a_bath():
    """Harmonic states along a slow coordinate, and 60 degrees of freedom more that all states share."""
    strengths, tau, n, bath = np.array([1.0, 2.0, 4.0]), 25, 1000, 60
    decay, scores = math.exp(-1 / tau), []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((n, 3))
        for i in range(1, n):
            x[i] = decay * x[i - 1] + math.sqrt(1 - decay**2) * x[i]
        u = 0.5 * strengths * (x / np.sqrt(strengths))[:, :, None] ** 2 + 0.5 * rng.chisquare(bath, (n, 3))[:, :, None]
        run = MultistateRun(Path("x"), np.tile(np.arange(3), (n, 1)), u, np.arange(n), np.zeros((n, 3, 1, 3)))
        result = tfep.storage_reference(run, n_resamples=20, generator=seed)
        scores.append((result.delta_f[1] - 0.5 * math.log(2)) / result.uncertainty[1])
    error = 1 / math.sqrt(2 * len(scores))  # of the spread of normal scores
    assert abs(np.std(scores) - 1) < 4 * error  # thinned by the total energy: 4.0


@pytest.mark.parametrize(("offset", "refused"), [(0.0, False), (5.0, True)])
def test_an_offset_that_a_large_energy_hides_is_seen_between_states(offset, refused):
    """Energies of 100,000 kT, as of five thousand waters: 5 kT are half of what rounding may do to them."""
    kt = thermal_energy(300.0)
    points = []
    for k in (100, 200):
        system, force = openmm.System(), openmm.CustomExternalForce(f"{k / 2}*(x^2+y^2+z^2)-2.5e5/2")
        for particle in range(2):
            system.addParticle(40.0)
            force.addParticle(particle, [])
        system.addForce(force)
        points.append(states.ThermodynamicState(system, 300 * unit.kelvin))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 2, 2, 3)) * np.sqrt(kt / np.array([100, 200]))[None, :, None, None]
    u = [(k / 2 * (x**2).sum((-1, -2)) - 2.5e5) / kt for k in (100, 200)]
    energies = np.stack([u[0], u[1] + offset], -1)
    run = MultistateRun(Path("x"), np.tile([0, 1], (50, 1)), energies, np.arange(50), x.astype(np.float32))
    run.__dict__["thermodynamic_states"] = points
    for index in (0, 1):
        if refused:
            with pytest.raises(InputError, match="differences to those of another state"):
                tfep.state_from_storage(run, index)
        else:
            assert len(tfep.state_from_storage(run, index)[1]) == 50
    with pytest.raises(InputError, match="burn_in is -20"):
        tfep.storage_reference(run, burn_in=-20)
    with pytest.raises(InputError, match="burn_in is -1"):
        run.frames(0, -1)
