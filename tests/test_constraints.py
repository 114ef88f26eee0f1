"""Constrained bonds: the metric term, flows that hold bonds fixed, and chains that agree with constrained dynamics."""

import copy
import itertools
import math

import numpy as np
import openmm
import pytest
import torch
from analytic_molecules import (
    BOND_LENGTH,
    KT,
    MASSES,
    TEMPERATURE,
    bend,
    chain_topology,
    dihedral,
    distance,
    place,
)
from openmm import app, unit
from openmmtools import states

from openmm_regflow import flows
from openmm_regflow.check import HybridMonteCarlo, jacobian_log_determinant, kernel_test, run_checks
from openmm_regflow.cli import main
from openmm_regflow.constraints import Constraints, fixed_bonds
from openmm_regflow.ensemble import ReducedPotential
from openmm_regflow.errors import IncompatibleFlowError, InputError, UnsupportedForceError
from openmm_regflow.metrics import integrated_autocorrelation_time
from openmm_regflow.moves import FlowMove, NCMCFlowMove
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.proposals import FlowProposal, SubsetProposal
from openmm_regflow.recipes import RunConfig, print_config
from openmm_regflow.rigid import random_rotations
from openmm_regflow.sampling import FlowSimulation, run_chain
from openmm_regflow.systems import MolecularSystem, load_system
from openmm_regflow.units import GAS_CONSTANT

SIGMAS = 4.5
#: Energy of a bend ``LINEAR cos + QUADRATIC cos^2`` [kJ/mol]: two wells of unequal depth, smooth at 0 and 180 degrees.
LINEAR, QUADRATIC = 0.8 * KT, -2.0 * KT


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rod_system(order=(0, 1, 2, 3), n_atoms=4, mass=18.0):
    """Three rigid rods through four atoms of a System, free but for their two bends."""
    system = openmm.System()
    bends = openmm.CustomAngleForce("linear*cos(theta) + quadratic*cos(theta)^2")
    bends.addPerAngleParameter("linear")
    bends.addPerAngleParameter("quadratic")
    for atom in range(n_atoms):
        system.addParticle(MASSES[order.index(atom)] if atom in order else mass)
    for k in range(2):
        bends.addAngle(*order[k : k + 3], [LINEAR, QUADRATIC])
    for i, j in itertools.pairwise(order):
        system.addConstraint(i, j, BOND_LENGTH)
    system.addForce(bends)
    return system


class RodChain:
    """Four atoms on three rigid rods; the third is light, so that the metric matters.

    Both bends are coupled by the metric term alone: ``p(t1, t2) = sin t1 sin t2 sqrt(det Z(t1, t2)) exp(-u)`` with the
    tridiagonal Z written out below, integrated on a grid; the torsion is uniform.
    """

    n_atoms = 4

    def __init__(self, temperature=TEMPERATURE, metric=True):
        self.temperature, self.kT = temperature, GAS_CONSTANT * temperature
        self.system = rod_system()
        self.topology = chain_topology(4)
        n = 1000
        self.t = t = (np.arange(n) + 0.5) * math.pi / n
        bends = np.log(np.sin(t)) - (LINEAR * np.cos(t) + QUADRATIC * np.cos(t) ** 2) / self.kT
        log_p = bends[:, None] + bends
        if metric:
            log_p = log_p + 0.5 * np.log(self.determinant(t[:, None], t))
        self.p = np.exp(log_p - log_p.max())
        self.p /= self.p.sum()

    @staticmethod
    def determinant(t1, t2):
        w = [1 / m for m in MASSES]
        diagonal = (w[0] + w[1]) * (w[1] + w[2]) * (w[2] + w[3])
        return diagonal - (np.cos(t1) * w[1]) ** 2 * (w[2] + w[3]) - (np.cos(t2) * w[2]) ** 2 * (w[0] + w[1])

    def mean(self, f):
        return float((self.p * f(self.t[:, None], self.t)).sum())

    def sample(self, n, g):
        cells = torch.multinomial(torch.as_tensor(self.p.flatten()), n, replacement=True, generator=g)
        t = torch.as_tensor(self.t)[torch.stack([cells // len(self.t), cells % len(self.t)], 1)]
        t = t + (self.t[1] - self.t[0]) * (torch.rand(n, 2, generator=g, dtype=torch.float64) - 0.5)
        bonds = torch.full((n, 3), BOND_LENGTH, dtype=torch.float64)
        torsion = 2 * math.pi * torch.rand(n, generator=g, dtype=torch.float64)
        shape = place(bonds, t, torsion)
        centre = torch.randn(n, 1, 3, generator=g, dtype=torch.float64)
        return shape @ random_rotations(n, g).transpose(1, 2) + centre

    def observables(self):
        """name -> (function of positions, exact expectation)."""
        return {
            "bend 1": (lambda x: bend(x, 0, 1, 2), self.mean(lambda a, b: a + 0 * b)),
            "bend 2": (lambda x: bend(x, 1, 2, 3), self.mean(lambda a, b: b + 0 * a)),
            "cos^2 bend 1": (lambda x: bend(x, 0, 1, 2).cos() ** 2, self.mean(lambda a, b: np.cos(a) ** 2 + 0 * b)),
            "cos^2 bend 2": (lambda x: bend(x, 1, 2, 3).cos() ** 2, self.mean(lambda a, b: np.cos(b) ** 2 + 0 * a)),
            "product": (lambda x: bend(x, 0, 1, 2) * bend(x, 1, 2, 3), self.mean(lambda a, b: a * b)),
            "cos torsion": (lambda x: dihedral(x).cos(), 0.0),
            "sin torsion": (lambda x: dihedral(x).sin(), 0.0),
        }

    def molecule(self):
        x = self.sample(1, generator(9))[0].numpy()
        return MolecularSystem("rods", self.topology, self.system, x, self.temperature)


RODS = RodChain()


def rod_flow(seed=0):
    """A poor flow on the two bends and the torsion."""
    data = RODS.sample(2000, generator(1))
    coordinates = flows.coordinates_for(RODS.topology, data, fixed=fixed_bonds(RODS.system))
    return flows.spline(coordinates, n_layers=2, hidden=16, seed=seed).double()


class NoMetric(FlowProposal):
    """The metric term left out: the planted error."""

    def _log_metric(self, x):
        return 0.0


class WrongSignMetric(FlowProposal):
    """The metric term with the sign of a free energy that is to be removed."""

    def _log_metric(self, x):
        return -super()._log_metric(x)


class MetricAsEnergy(FlowProposal):
    """Divided by the metric once more, as if dynamics sampled the unconstrained conditional ensemble."""

    def _log_metric(self, x):
        return 2 * super()._log_metric(x)


def proposal(kind=FlowProposal, flow=None, system=None, temperature=TEMPERATURE):
    return kind(flow or rod_flow(), TorchPotential(system or RODS.system), temperature, allow_mismatch=True)


def scores(positions, observables):
    """(mean - exact) / standard error for independent configurations."""
    found = {}
    for name, (function, exact) in observables.items():
        values = function(positions)
        found[name] = float((values.mean() - exact) / (values.std() / math.sqrt(len(values))))
    return found


def series_scores(x, observables):
    """The same for one correlated chain, by its integrated autocorrelation time."""
    found = {}
    for name, (function, exact) in observables.items():
        values = function(x).numpy()
        error = values.std() * math.sqrt(integrated_autocorrelation_time(values) / len(values))
        found[name] = float((values.mean() - exact) / error)
    return found


# The metric term


def hydrogen_bonded(name="alanine-dipeptide"):
    return load_system(name, constraints="HBonds")


@pytest.mark.parametrize("choice", ["HBonds", "AllBonds"])
def test_density_and_metric_against_the_mass_weighted_volume(choice):
    """exp(log_det) sqrt(det Z) is the volume of the constraint surface in mass-weighted coordinates, by autodiff."""
    mol = load_system("alanine-dipeptide", constraints=choice)
    x = torch.as_tensor(mol.positions) + 0.003 * torch.randn(400, 22, 3, generator=generator(), dtype=torch.float64)
    coordinates = flows.coordinates_for(mol.topology, x, fixed=fixed_bonds(mol.system))
    assert coordinates.dim == 60 - mol.system.getNumConstraints()
    flow = flows.real_nvp(coordinates, n_layers=2, hidden=8).double()
    constraints = Constraints.of(mol.system)
    z = flow.prior.sample(3, generator(1), torch.float64) * 0.3
    with torch.no_grad():
        reported = flow.forward(z)[1]
    found = torch.stack([jacobian_log_determinant(flow, row, constraints) for row in z])
    torch.testing.assert_close(found, reported, rtol=0, atol=1e-7)


def test_determinant_of_a_triatomic():
    """The textbook trimer: sqrt(det Z) = sqrt(4 - cos^2) / m for equal masses."""
    system = openmm.System()
    for _ in range(3):
        system.addParticle(5.0)
    system.addConstraint(1, 0, 0.1)
    system.addConstraint(1, 2, 0.2)
    theta = torch.linspace(0.1, 3.0, 7, dtype=torch.float64)
    x = torch.zeros(7, 3, 3, dtype=torch.float64)
    x[:, 0, 0] = 0.1
    x[:, 2] = 0.2 * torch.stack([theta.cos(), theta.sin(), 0 * theta], 1)
    expected = 0.5 * torch.log(4 - theta.cos() ** 2) - math.log(5.0)
    torch.testing.assert_close(Constraints.of(system).log_metric(x), expected)
    system.addParticle(1.0)
    system.addParticle(1.0)
    system.addConstraint(3, 4, 0.1)  # another cluster, of another size: a constant
    torch.testing.assert_close(
        Constraints.of(system).log_metric(torch.cat([x, torch.rand(7, 2, 3).double()], 1)),
        expected + 0.5 * math.log(2.0),
    )


def test_determinant_of_rods_and_its_projection():
    x = RODS.sample(50, generator(2))
    t1, t2 = bend(x, 0, 1, 2).numpy(), bend(x, 1, 2, 3).numpy()
    constraints = Constraints.of(RODS.system)
    np.testing.assert_allclose(constraints.log_metric(x).numpy(), 0.5 * np.log(RODS.determinant(t1, t2)), rtol=1e-10)
    v = torch.randn(4, 3, generator=generator(3), dtype=torch.float64).numpy()
    projected = constraints.project(v, x[0].numpy())
    for i, j, _ in constraints.bonds:
        assert abs(((projected[i] - projected[j]) * (x[0, i] - x[0, j]).numpy()).sum()) < 1e-13
    np.testing.assert_allclose(constraints.project(projected, x[0].numpy()), projected, atol=1e-13)
    # OpenMM's own projection moves along the same directions, but iterates and stops early.
    context = _simulation(RODS.system).context
    context.setPositions(x[0].numpy())
    context.setVelocities(v)
    context.applyVelocityConstraints(1e-12)
    theirs = context.getState(getVelocities=True).getVelocities(asNumpy=True)._value
    assert np.abs(theirs - v).max() > 0.1
    np.testing.assert_allclose(constraints.project(theirs, x[0].numpy()), projected, atol=1e-12)


def test_constrained_dynamics_sample_the_density_with_the_metric():
    """The oracle itself: hybrid Monte Carlo by OpenMM leaves exact draws exact, and moves draws without the metric."""
    wrong = RodChain(metric=False)
    for target, right in ((RODS, True), (wrong, False)):
        engine = HybridMonteCarlo(RODS.system, TEMPERATURE, timestep=0.01, seed=4)
        start = target.sample(3000, generator(4))
        end = []
        for x in start.numpy():
            for _ in range(4):
                x = engine.trajectory(x, 12)
            end.append(torch.as_tensor(x))
        found = scores(torch.stack(end), target.observables())
        largest = max(map(abs, found.values()))
        assert (largest < SIGMAS) if right else (largest > 2 * SIGMAS), found


# Flows that hold bonds fixed


def test_samples_have_their_bonds():
    flow = rod_flow()
    x, _ = flow.sample(500, generator(5))
    x = x[torch.isfinite(x).flatten(1).all(1)]
    assert len(x) > 200
    for i in range(3):
        # Rounding is magnified where a bend is nearly straight.
        assert (distance(x, i, i + 1) - BOND_LENGTH).abs().max() < 1e-8 * BOND_LENGTH
    assert flow.fixed_bonds == tuple(fixed_bonds(RODS.system)) and flow.dim == 3


def test_flow_file_keeps_the_fixed_bonds(tmp_path):
    flow = rod_flow()
    flow.save(tmp_path / "flow.safetensors")
    again = flows.Flow.load(tmp_path / "flow.safetensors")
    assert again.fixed_bonds == flow.fixed_bonds
    x, log_q = flow.sample(50, generator(6))
    inside = torch.isfinite(x).flatten(1).all(1)
    x, log_q = x[inside], log_q[inside]
    torch.testing.assert_close(again.log_prob(x), log_q, rtol=0, atol=1e-9)
    assert "fixed" not in flows.coordinates_for(RODS.topology, loose_rods()).config()


def loose_rods():
    """Positions of the molecule without its constraints."""
    x = RODS.sample(200, generator())
    return x + 0.002 * torch.randn(x.shape, generator=generator(1), dtype=x.dtype)


def test_methyl_rotors_with_fixed_bonds():
    """Interchangeable hydrogens at fixed length: labels, features and their inverse as without constraints."""
    mol = hydrogen_bonded()
    x = torch.as_tensor(mol.reference("train")[:2000]).double()
    coordinates = flows.coordinates_for(mol.topology, x, fixed=fixed_bonds(mol.system))
    assert len(coordinates.rotors) == 3 and coordinates.dim == 48
    y, log_det = coordinates.to_features(x)
    back, log_det_back = coordinates.to_positions(y)
    assert (coordinates.to_features(back)[0] - y).abs().max() < 1e-8
    assert (log_det + log_det_back).abs().max() < 1e-9
    relabelled = coordinates.relabel(back, generator(1))
    assert (coordinates.to_features(relabelled)[0] - y).abs().max() < 1e-8


@pytest.mark.parametrize("lengths", [(0.105, 0.109, 0.113), (0.109, 0.109, None)])
def test_hydrogens_at_unlike_lengths_are_not_interchanged(lengths):
    """A turn of their labels would put two thirds of the samples off their constraints."""
    mol = hydrogen_bonded()
    x = torch.as_tensor(mol.reference("train")[:2000]).double()
    free = flows.coordinates_for(mol.topology, x + 0.002 * torch.randn(x.shape, generator=generator(), dtype=x.dtype))
    hydrogens = free.rotors[0].atoms
    centre = next(row[1] for row in free.zmatrix.rows if row[0] == hydrogens[0])
    fixed = [(centre, h, length) for h, length in zip(hydrogens, lengths) if length]
    data = x + 0.002 * torch.randn(x.shape, generator=generator(), dtype=x.dtype)
    coordinates = flows.coordinates_for(mol.topology, data, fixed=fixed)
    assert len(coordinates.rotors) == len(free.rotors) - 1
    samples, _ = flows.spline(coordinates, n_layers=2, hidden=8).sample(200, generator())
    for i, j, length in fixed:
        assert ((samples[:, i] - samples[:, j]).norm(dim=1) - length).abs().max() < 1e-6


def test_bad_fixed_bonds_are_refused():
    data = RODS.sample(200, generator())
    with pytest.raises(InputError, match="no bond of the Z-matrix"):
        flows.coordinates_for(RODS.topology, data, fixed=[(0, 2, 0.2)])
    with pytest.raises(InputError, match="positive"):
        flows.coordinates_for(RODS.topology, data, fixed=[(0, 1, 0.0)])
    with pytest.raises(InputError, match="internal"):
        flows.coordinates_for(RODS.topology, data, "cartesian", fixed=fixed_bonds(RODS.system))


def changed(change):
    system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(RODS.system))
    change(system)
    return system


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.setConstraintParameters(1, 1, 2, 0.151), UnsupportedForceError, "atoms 1 and 2 at 0.151"),
        (lambda s: s.addConstraint(0, 2, 0.2), UnsupportedForceError, "constraints=None"),
        (lambda s: s.removeConstraint(0), IncompatibleFlowError, "atoms 0 and 1"),
    ],
)
def test_other_constraints_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        proposal(system=changed(change))


def test_other_masses_and_unknown_masses_are_refused():
    heavier = changed(lambda s: s.setParticleMass(2, 4.0))
    simulation = app.Simulation(RODS.topology, heavier, openmm.VerletIntegrator(0.001))
    with pytest.raises(IncompatibleFlowError, match="masses"):
        FlowSimulation(simulation, proposal())
    with pytest.raises(InputError, match="masses"):
        FlowProposal(rod_flow(), lambda x: x.sum((1, 2)), TEMPERATURE)
    with pytest.raises(UnsupportedForceError, match="train a flow with these bonds fixed"):
        free = flows.spline(flows.coordinates_for(RODS.topology, loose_rods()), n_layers=2)
        proposal(flow=free)


# Chains


def invariance(kind, n_proposals, temperature=TEMPERATURE, n=20000):
    """Scores after two steps from exact draws, and the share of chains that moved."""
    g = generator(7)
    target = RodChain(temperature)
    chain = run_chain(
        proposal(kind, temperature=temperature), target.sample(n, g), 2, generator=g, n_proposals=n_proposals,
        pool_size=100_000,
    )  # fmt: skip
    return chain.statistics.acceptance_rate, scores(chain.positions[-1], target.observables())


@pytest.mark.parametrize("n_proposals", [1, 4, 64])
def test_kernels_leave_the_constrained_ensemble_invariant(n_proposals):
    acceptance, found = invariance(FlowProposal, n_proposals, n=20000 if n_proposals < 64 else 4000)
    assert acceptance > 0.2 and max(map(abs, found.values())) < SIGMAS, found


@pytest.mark.parametrize("kind", [NoMetric, WrongSignMetric, MetricAsEnergy])
@pytest.mark.parametrize("n_proposals", [1, 4])
def test_a_wrong_metric_is_seen(kind, n_proposals):
    _, found = invariance(kind, n_proposals)
    assert max(map(abs, found.values())) > 2 * SIGMAS, found


def test_the_metric_does_not_scale_with_temperature():
    """A pool drawn at 300 K used at 450 K: energies scale, the metric does not."""
    g = generator(8)
    hot = RodChain(450.0)
    simulation = flow_simulation(proposal(), 450.0, g)
    x = hot.sample(2000, g).numpy()
    moved = [simulation.step(frame, 450.0) for frame in x]
    moved = torch.stack([torch.as_tensor(frame if new is None else new) for frame, new in zip(x, moved)])
    assert max(map(abs, scores(moved, hot.observables()).values())) < SIGMAS


def flow_simulation(prop, temperature, g, seed=1):
    integrator = openmm.LangevinMiddleIntegrator(temperature, 2.0, 0.004)
    integrator.setRandomNumberSeed(seed)
    integrator.setConstraintTolerance(1e-8)
    reference = openmm.Platform.getPlatformByName("Reference")
    simulation = app.Simulation(RODS.topology, RODS.system, integrator, reference)
    simulation.context.setPositions(RODS.sample(1, g)[0].numpy())
    simulation.context.setVelocitiesToTemperature(temperature, seed)
    return FlowSimulation(simulation, prop, n_proposals=2, pool_size=4096, seed=3)


def positions_of(context):
    return np.array(context.getState(getPositions=True).getPositions(asNumpy=True)._value)


def test_mixed_chain_and_long_constrained_dynamics_agree():
    """Both against the exact answer and against each other; without the metric the flow chain is off."""
    flow_chain = flow_simulation(proposal(), TEMPERATURE, generator(10))
    frames = []
    for _ in range(4000):
        flow_chain.run(1, 10)
        frames.append(positions_of(flow_chain.simulation.context))
    assert flow_chain.statistics.acceptance_rate > 0.2
    mixed = torch.as_tensor(np.array(frames))
    dynamics = flow_simulation(proposal(), TEMPERATURE, generator(11), seed=2).simulation
    frames = []
    for _ in range(6000):
        dynamics.step(25)
        frames.append(positions_of(dynamics.context))
    long = torch.as_tensor(np.array(frames))
    assert max(map(abs, series_scores(mixed, RODS.observables()).values())) < SIGMAS
    assert max(map(abs, series_scores(long, RODS.observables()).values())) < SIGMAS
    for name, (function, _) in RODS.observables().items():
        a, b = function(mixed).numpy(), function(long).numpy()
        variance = sum(v.var() * integrated_autocorrelation_time(v) / len(v) for v in (a, b))
        assert abs(a.mean() - b.mean()) < SIGMAS * math.sqrt(variance), name
    without = RodChain(metric=False).observables()
    assert max(map(abs, series_scores(long, without).values())) > 2 * SIGMAS
    assert max(map(abs, series_scores(mixed, without).values())) > 2 * SIGMAS


def test_a_plain_simulation_stays_on_the_constraints():
    """After an accepted move: bonds at their length, velocities along the surface and at the right temperature."""
    flow_chain = flow_simulation(proposal(), TEMPERATURE, generator(12))
    context, kinetic = flow_chain.simulation.context, []
    while len(kinetic) < 800:
        flow_chain.simulation.step(1)
        if not flow_chain.flow_step():
            continue
        state = context.getState(getPositions=True, getVelocities=True, getEnergy=True)
        x, v = (np.array(a._value) for a in (state.getPositions(asNumpy=True), state.getVelocities(asNumpy=True)))
        for i in range(3):
            along = x[i] - x[i + 1]
            assert np.linalg.norm(along) == pytest.approx(BOND_LENGTH, rel=1e-7)
            assert abs((v[i] - v[i + 1]) @ along) < 1e-8
        kinetic.append(state.getKineticEnergy()._value / (GAS_CONSTANT * TEMPERATURE))
    # 12 - 3 degrees of freedom, independent draws: a Gamma distribution of mean and variance 9/2.
    assert abs(np.mean(kinetic) - 4.5) < SIGMAS * math.sqrt(4.5 / len(kinetic))


def test_openmmtools_sampler_with_constraints(tmp_path):
    """FlowMove and Langevin dynamics in an MCMCSampler, restored from its stored form, with exact bends."""
    from openmmtools import cache, mcmc, states

    flow = rod_flow()
    flow.save(tmp_path / "flow.safetensors")
    np.random.seed(5)
    move = FlowMove(proposal(flow=flow), 4, flow_path=tmp_path / "flow.safetensors", seed=1)
    move = copy.deepcopy(move)
    langevin = mcmc.LangevinDynamicsMove(timestep=4 * unit.femtosecond, n_steps=5, collision_rate=2 / unit.picosecond)
    state = states.ThermodynamicState(RODS.system, TEMPERATURE * unit.kelvin)
    start = states.SamplerState(RODS.sample(1, generator(13))[0].numpy() * unit.nanometer)
    before = cache.global_context_cache.platform
    cache.global_context_cache.empty()
    cache.global_context_cache.platform = openmm.Platform.getPlatformByName("Reference")
    try:
        sampler = mcmc.MCMCSampler(state, start, mcmc.SequenceMove([langevin, move]))
        frames = []
        for _ in range(1500):
            sampler.run(1)
            frames.append(np.array(sampler.sampler_state.positions._value))
    finally:
        cache.global_context_cache.empty()
        cache.global_context_cache.platform = before
    assert sampler.move.move_list[1].n_accepted > 300
    assert max(map(abs, series_scores(torch.as_tensor(np.array(frames)), RODS.observables()).values())) < SIGMAS


# A subset, nonequilibrium moves, and the check of a user's molecule


def solvated():
    """The rods in another atom order, their first atom on a spring to a fifth one, which is tied to a sixth."""
    order = (2, 0, 4, 1)
    system = rod_system(order, 6)
    spring = openmm.HarmonicBondForce()
    spring.addBond(order[0], 3, 0.0, KT / 0.1**2)
    system.addForce(spring)
    system.addConstraint(3, 5, 0.1)
    return system, order


def solvated_sample(order, n, g):
    x = torch.empty(n, 6, 3, dtype=torch.float64)
    x[:, list(order)] = RODS.sample(n, g)
    x[:, 3] = x[:, order[0]] + 0.1 * torch.randn(n, 3, generator=g, dtype=torch.float64)
    turn = torch.nn.functional.normalize(torch.randn(n, 3, generator=g, dtype=torch.float64), dim=1)
    x[:, 5] = x[:, 3] + 0.1 * turn
    return x


def test_a_constrained_subset_among_other_constraints():
    system, order = solvated()
    prop = SubsetProposal(rod_flow(), TorchPotential(system), TEMPERATURE, order)
    g = generator(14)
    simulation_step = FlowSimulation(_simulation(system), prop, 2, 4096, seed=2).step
    x = solvated_sample(order, 3000, g).numpy()
    moved = [simulation_step(frame) for frame in x]
    assert np.mean([new is not None for new in moved]) > 0.2
    after = torch.stack([torch.as_tensor(frame if new is None else new) for frame, new in zip(x, moved)])
    assert max(map(abs, scores(after[:, list(order)], RODS.observables()).values())) < SIGMAS
    v = prop.project_velocities(np.ones((6, 3)) + np.arange(18).reshape(6, 3), x[0])
    assert (v[[3, 5]] == (np.ones((6, 3)) + np.arange(18).reshape(6, 3))[[3, 5]]).all()
    system.addConstraint(order[0], 3, 0.2)
    with pytest.raises(UnsupportedForceError, match="subset"):
        SubsetProposal(rod_flow(), TorchPotential(system), TEMPERATURE, order)


def test_a_constrained_subset_is_driven_among_other_constraints(reference_platform):
    system, order = solvated()
    prop = SubsetProposal(rod_flow(), TorchPotential(system), TEMPERATURE, order)
    move = NCMCFlowMove(prop, 4, 0.002, steps_per_drive=1, pool_size=1024, seed=3)
    state, after = states.ThermodynamicState(system, TEMPERATURE * unit.kelvin), []
    for x in solvated_sample(order, 600, generator(15)).numpy():
        frame = states.SamplerState(x * unit.nanometer)
        move.apply(state, frame)
        after.append(torch.as_tensor(np.array(frame.positions._value)))
    assert move.n_accepted > 100
    found = scores(torch.stack(after)[:, list(order)], RODS.observables())
    assert max(map(abs, found.values())) < SIGMAS, found


def _simulation(system):
    topology = chain_topology(system.getNumParticles())
    reference = openmm.Platform.getPlatformByName("Reference")
    return app.Simulation(topology, system, openmm.VerletIntegrator(0.001), reference)


def test_the_check_of_a_constrained_molecule():
    report = run_checks(rod_flow(), RODS.molecule(), n=4000)
    assert report.passed, report.rows()
    assert "handled" in next(f for f in report.findings if f.name == "constraints").result
    found = kernel_test(proposal(NoMetric), RODS.molecule(), 16_000)  # 4,000 move the means by 3.3 standard errors
    assert found.passed is False, found


def test_the_check_of_alanine_dipeptide_with_constrained_hydrogens():
    """A peptide as openmmtools makes it by default."""
    mol = hydrogen_bonded()
    x = torch.as_tensor(mol.reference("train")[:2000]).double()
    flow = flows.spline(flows.coordinates_for(mol.topology, x, fixed=fixed_bonds(mol.system)), n_layers=2, hidden=16)
    report = run_checks(flow, mol, n=20_000)
    assert all(f.passed for f in report.findings), report.rows()


def test_training_from_the_command_line(capsys, tmp_path):
    """A folder that says HBonds: trained, saved and checked without another word."""
    source = load_system("alanine-dipeptide").folder
    (tmp_path / "structure.pdb").write_bytes((source / "structure.pdb").read_bytes())
    text = (source / "system.toml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("constraints", "name"))]
    (tmp_path / "system.toml").write_text("\n".join([*lines, 'constraints = "HBonds"']))
    train = {"steps": 20, "batch_size": 64, "warmup": 5, "checkpoint_every": 10}
    config = RunConfig.model_validate(
        {"objective": "mle", "flow": {"n_layers": 2, "hidden": 16}, "likelihood": {"train": train}}
    )
    (tmp_path / "run.toml").write_text(print_config(config))
    data = [str(source / "reference" / f"{split}.h5") for split in ("train", "validation")]
    command = ["train", str(tmp_path), "--config", str(tmp_path / "run.toml")]
    command += ["--data", data[0], "--validation", data[1]]
    assert exit_code(*command, "-o", str(tmp_path / "out")) == 0
    flow = flows.Flow.load(tmp_path / "out" / "flow.safetensors")
    assert len(flow.fixed_bonds) == 12 and flow.metadata.training["config"]["objective"] == "mle"
    assert exit_code("check", str(tmp_path), str(tmp_path / "out" / "flow.safetensors"), "-n", "300") == 0
    assert "12: handled" in capsys.readouterr().out


def exit_code(*arguments):
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    return exit_.value.code


def test_refinement_potential_holds_the_metric():
    mol = load_system("alanine-dipeptide", constraints="AllBonds")
    x = torch.as_tensor(mol.reference("test")[:20]).double()
    metric = Constraints.of(mol.system).log_metric(x)
    expected = TorchPotential(mol.system)(x) / (GAS_CONSTANT * mol.temperature) - metric
    torch.testing.assert_close(ReducedPotential(mol, torch.device("cpu"))(x), expected)
    assert metric.std() > 0.01
