"""Kernels, chains and the loop around openmm.app.Simulation: exact, and seen to fail when an error is planted."""

import copy
import csv
import math

import numpy as np
import openmm
import pytest
import torch
from analytic_molecules import (
    TEMPERATURE,
    Chain,
    GaussianFlow,
    Well,
    cartesian_gaussian,
    chain_topology,
    dihedral,
    z_scores,
)
from openmm import app, unit
from scipy import stats
from scipy.special import ndtri_exp

from openmm_regflow import flows
from openmm_regflow.device import openmm_properties
from openmm_regflow.errors import IncompatibleFlowError, InputError, InsufficientDataError, UnsupportedForceError
from openmm_regflow.fingerprints import fingerprint
from openmm_regflow.metrics import integrated_autocorrelation_time
from openmm_regflow.potentials import OpenMMPotential, TorchPotential
from openmm_regflow.proposals import FlowProposal, ProposalBatch
from openmm_regflow.sampling import (
    FlowReporter,
    FlowSimulation,
    FlowStatistics,
    FlowStep,
    ProposalPool,
    alternate,
    context_potential,
    flow_kernel,
    independence_metropolis_hastings,
    iterated_sir,
    maxwell_boltzmann,
    put_back,
    run_chain,
    state_log_weight,
    system_masses,
)
from openmm_regflow.sampling.steps import _context_energy
from openmm_regflow.units import GAS_CONSTANT

#: Standard errors: 1e-5 two-sided probability per figure.
SIGMAS = 4.5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Case:
    """A target with known answers, an exact sampler and a poor flow."""

    def __init__(self, name):
        if name == "well":
            self.target = Well()
            flow = GaussianFlow(torch.tensor([[0.05, -0.1, 0.02]]), torch.diag(torch.tensor([0.2, 0.2, 0.12])) ** 2)
            self.arguments = (flow, self.target, TEMPERATURE)
        elif name == "cartesian":
            self.target = Chain(3, bond_width=0.04, angle_width=0.5)
            self.arguments = (cartesian_gaussian(self.target), TorchPotential(self.target.system), TEMPERATURE)
        else:
            self.target = Chain(4)
            data = self.target.sample(2000, generator(1))
            flow = flows.spline(flows.coordinates_for(self.target.topology, data), n_layers=2, hidden=16)
            self.arguments = (flow.double(), TorchPotential(self.target.system), TEMPERATURE)


CASES = {name: Case(name) for name in ("well", "cartesian", "internal")}


class WrongSign(FlowProposal):
    """log q enters the weight with the wrong sign."""

    def sample(self, n, generator=None):
        batch = super().sample(n, generator)
        return batch._replace(log_q=-batch.log_q)

    def log_q(self, positions):
        return -super().log_q(positions)


class MissingJacobian(FlowProposal):
    """log q misses the volume element of an internal or curved coordinate: here bond length squared."""

    @staticmethod
    def volume(x):
        return 2 * torch.log((x[:, 1] - x[:, 0]).norm(dim=1)) if x.shape[1] > 1 else 3 * x[:, 0, 0]

    def sample(self, n, generator=None):
        batch = super().sample(n, generator)
        return batch._replace(log_q=batch.log_q + self.volume(batch.positions))

    def log_q(self, positions):
        return super().log_q(positions) + self.volume(positions)


class EnergyOnly(FlowProposal):
    """Acceptance on the energy alone, as a Metropolis move for symmetric proposals would."""

    def sample(self, n, generator=None):
        batch = super().sample(n, generator)
        return batch._replace(log_q=torch.zeros_like(batch.log_q))

    def log_q(self, positions):
        return torch.zeros_like(super().log_q(positions))


class OtherState(FlowProposal):
    """Proposals carry the energy of another state (450 K), current states their own."""

    def sample(self, n, generator=None):
        return super().sample(n, generator).scaled(TEMPERATURE / 450.0)


PLANTED = [WrongSign, MissingJacobian, EnergyOnly, OtherState]


def invariance(case, n_proposals, kind=FlowProposal, n=20000, seed=0):
    """z-scores after two steps from an exact sample: an exact kernel leaves it exact (independent chains)."""
    g = generator(seed)
    start = case.target.sample(n, g)
    chain = run_chain(kind(*case.arguments), start, 2, generator=g, n_proposals=n_proposals, pool_size=100_000)
    return chain, z_scores(chain.positions[-1], case.target.observables())


@pytest.mark.parametrize("n_proposals", [1, 4, 64])
@pytest.mark.parametrize("name", list(CASES))
def test_kernels_leave_the_exact_distribution_invariant(name, n_proposals):
    chain, scores = invariance(CASES[name], n_proposals, n=20000 if n_proposals < 64 else 4000)
    assert chain.statistics.acceptance_rate > 0.2  # a chain that stays put would pass for nothing
    assert chain.statistics.effective_sample_size < 0.6  # and the flow is a poor one
    assert max(map(abs, scores.values())) < SIGMAS, scores


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("n_proposals", [1, 4])
def test_planted_errors_are_seen(name, planted, n_proposals):
    _, scores = invariance(CASES[name], n_proposals, planted)
    assert max(map(abs, scores.values())) > 2 * SIGMAS, scores


@pytest.mark.parametrize("n_proposals", [1, 4, 64])
@pytest.mark.parametrize("name", list(CASES))
def test_chains_forget_a_bad_start(name, n_proposals):
    """From one configuration to the exact moments; errors from the spread of independent chains."""
    case = CASES[name]
    proposal = FlowProposal(*case.arguments)
    g = generator(3)
    start = case.target.sample(1, g).expand(400, -1, -1)
    steps = {1: 240, 4: 80, 64: 12}[n_proposals]
    chain = run_chain(proposal, start, steps, generator=g, n_proposals=n_proposals, pool_size=50_000)
    kept = chain.positions[steps // 3 :]
    for label, (function, exact) in case.target.observables().items():
        means = function(kept).mean(0)
        assert abs(means.mean() - exact) < SIGMAS * means.std() / math.sqrt(len(means)), label
        assert means.std() > 0, label


def test_one_step_histogram_of_a_skewed_target():
    """Kolmogorov-Smirnov of independent chains against the exact distribution function."""
    case = CASES["well"]
    chain, _ = invariance(case, 4, n=5000, seed=8)
    for axis, grid in ((0, case.target.x), (1, case.target.y)):
        values = chain.positions[-1][:, 0, axis].numpy()
        result = stats.kstest(values, lambda v, grid=grid: np.interp(v, grid.x, grid.cdf))
        assert result.pvalue > 1e-5


def ks_p_value(values, grid):
    """Kolmogorov-Smirnov p-value of correlated chains `(n, n_chains)`, with the effective number of the slowest of the
    indicators that the statistic is made of."""
    deciles = np.interp(np.linspace(0.1, 0.9, 9), grid.cdf, grid.x)
    indicators = [(values < x).double().T.numpy() for x in deciles]
    n_effective = min(v.size / integrated_autocorrelation_time(v) for v in indicators)
    distance_ = stats.kstest(values.flatten().numpy(), lambda v: np.interp(v, grid.x, grid.cdf)).statistic
    return stats.kstwobign.sf(distance_ * math.sqrt(n_effective)), n_effective


@pytest.mark.parametrize("n_proposals", [1, 4, 64])
@pytest.mark.parametrize("name", ["well", "internal"])
def test_histograms_of_correlated_chains(name, n_proposals):
    """All steps of a few chains, with their own effective sample size; the same chains with an error planted fail."""
    case, n_steps = CASES[name], {1: 3000, 4: 1200, 64: 150}[n_proposals]
    # The poor flow is uniform in the torsion, so a missing density would not show there; another energy does.
    planted = EnergyOnly if name == "well" else OtherState
    for kind in (FlowProposal, planted):
        g = generator(12)
        start = case.target.sample(8, g)
        options = {"generator": g, "n_proposals": n_proposals, "pool_size": 20_000}
        x = run_chain(kind(*case.arguments), start, n_steps, **options).positions
        values, grid = (x[..., 0, 0], case.target.x) if name == "well" else (dihedral(x), case.target.torsion)
        p_value, n_effective = ks_p_value(values, grid)
        if kind is FlowProposal:
            assert p_value > 1e-5 and n_effective > 300, (p_value, n_effective)
        else:
            assert p_value < 1e-5, (p_value, n_effective)


def test_geweke_joint_distribution():
    """Successive-conditional against marginal-conditional draws of (width, x): Geweke, JASA 99, 799 (2004).

    x given its width is a skewed Gumbel-type variable scaled by it; the width is redrawn by an exact Gibbs step
    between flow steps, so an error in the kernel shows in the marginal of the width as well.
    """
    assert joint_test(1.0) < SIGMAS
    assert joint_test(-1.0) > 2 * SIGMAS


def joint_test(sign, n_chains=12000, n_steps=20):
    g = generator(11)
    widths = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def energies(x, k):
        scaled = x / widths[k]
        return torch.exp(scaled) - scaled + torch.log(widths[k])

    k = torch.randint(3, (n_chains,), generator=g)
    gamma = torch.distributions.Gamma(torch.ones((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        x = widths[k] * torch.log(gamma.sample((n_chains,)))  # exp(-(e^s - s)) is the density of log Gamma(1)
    spread = 3.0
    for _ in range(n_steps):
        y = spread * torch.randn(n_chains, 2, generator=g, dtype=torch.float64)
        log_q = sign * -0.5 * (y / spread) ** 2
        state = ProposalBatch(x.reshape(-1, 1, 1), sign * -0.5 * (x / spread) ** 2, energies(x, k))
        batch = ProposalBatch(y[..., None, None], log_q, energies(y, k.unsqueeze(1)))
        x = iterated_sir(state, batch, g)[0].positions.reshape(-1)
        every = torch.stack([energies(x, torch.full_like(k, i)) for i in range(3)], 1)
        k = torch.multinomial(torch.softmax(-every, 1), 1, generator=g).squeeze(1)
    counts = torch.bincount(k, minlength=3).double()
    # The marginal of the width is uniform; the chains are independent.
    return float(((counts - n_chains / 3).abs() / math.sqrt(n_chains * 2 / 9)).max())


def batch_of(u, log_q, shape=(1, 1)):
    u = torch.as_tensor(u, dtype=torch.float64)
    return ProposalBatch(torch.zeros(*u.shape, *shape), torch.as_tensor(log_q, dtype=torch.float64).expand(u.shape), u)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["u", "log_q", "positions"])
@pytest.mark.parametrize("n_proposals", [1, 3])
def test_non_finite_proposals_are_rejected(bad, part, n_proposals):
    state = batch_of([0.0] * 50, 0.0)
    batch = batch_of([[-5.0] * n_proposals] * 50, 0.0)
    batch = batch._replace(**{part: torch.full_like(getattr(batch, part), bad)})
    new, info = flow_kernel(state, batch, generator())
    assert not info.accepted.any() and torch.isneginf(info.log_weights).all()
    assert (info.acceptance == 0).all() and torch.equal(new.u, state.u)
    totals = FlowStatistics()
    totals.update(info)
    assert totals.n_impossible == totals.n_proposals == 50 * n_proposals
    assert math.isnan(totals.mean_log_weight) and math.isnan(totals.effective_sample_size)


@pytest.mark.parametrize("n_proposals", [1, 3])
def test_an_impossible_start_is_left_at_once(n_proposals):
    state = batch_of([math.inf, math.nan], 0.0)
    new, info = flow_kernel(state, batch_of([[1e5] * n_proposals] * 2, 0.0), generator())
    assert info.accepted.all() and (new.u == 1e5).all()
    _, info = flow_kernel(state, batch_of([[math.inf] * n_proposals] * 2, 0.0), generator())
    assert not info.accepted.any()


@pytest.mark.parametrize("n_proposals", [1, 3])
@pytest.mark.parametrize("log_q", [-math.inf, math.nan])
def test_a_state_without_flow_density_is_never_left_and_counted(n_proposals, log_q):
    """No proposal leads back to it, so leaving it would break detailed balance."""
    state = batch_of([0.0] * 20, log_q)
    assert torch.isposinf(state_log_weight(state)).all()
    _, info = flow_kernel(state, batch_of([[-50.0] * n_proposals] * 20, 0.0), generator())
    assert not info.accepted.any() and info.outside.all()
    totals = FlowStatistics()
    totals.update(info)
    assert totals.n_outside == 20


def test_acceptance_follows_the_formula():
    """log alpha = -u(y) + u(x) + log q(x) - log q(y), against the observed frequency."""
    n = 40000
    state, batch = batch_of([1.0] * n, 0.3), batch_of([1.9] * n, -0.2)
    _, info = independence_metropolis_hastings(state, batch, generator())
    expected = math.exp(-1.9 + 1.0 + 0.3 + 0.2)
    assert info.acceptance[0] == pytest.approx(expected)
    assert abs(info.accepted.double().mean() - expected) < SIGMAS * math.sqrt(expected * (1 - expected) / n)


def test_iterated_sir_chooses_by_weight():
    n = 40000
    state = batch_of([0.0] * n, 0.0)
    _, info = iterated_sir(state, batch_of([[0.0, 1.0, math.inf, -0.5]] * n, 0.0), generator())
    weights = np.exp([0.0, 0.0, -1.0, -math.inf, 0.5])
    expected = n * weights / weights.sum()
    counts = np.bincount(info.choice.numpy() + 1, minlength=5)
    assert counts[3] == 0
    chi_squared = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_squared < stats.chi2.isf(1e-5, 3)


def test_pool_hands_out_every_draw_once():
    proposal = FlowProposal(*CASES["cartesian"].arguments)
    pool = ProposalPool(proposal, 10, generator(4))
    drawn = torch.cat([pool.take(n).positions for n in (3, 4, 6, 1, 25)])
    assert len(drawn) == 39 and len(torch.unique(drawn.flatten(1), dim=0)) == 39
    again = ProposalPool(proposal, 10, generator(4))
    torch.testing.assert_close(again.take(10).positions, drawn[:10])


def test_an_empty_reservoir_says_so():
    pool = ProposalPool(None, batch=FlowProposal(*CASES["well"].arguments).sample(5, generator()))
    assert len(pool.take(4).u) == 4 and len(pool) == 1
    with pytest.raises(InsufficientDataError, match="pool is empty"):
        pool.take(2)
    with pytest.raises(InputError, match="pool_size"):
        ProposalPool(None, 0)


def test_statistics_of_known_weights():
    totals = FlowStatistics()
    batch = batch_of([[-math.log(1.0), -math.log(3.0)]], 0.0)
    for _ in range(2):
        totals.update(iterated_sir(batch_of([0.0], 0.0), batch, generator())[1])
    assert totals.n_proposals == 4 and totals.n_proposed == 2
    assert totals.mean_log_weight == pytest.approx(math.log(3) / 2)
    assert totals.effective_sample_size == pytest.approx(8**2 / 20 / 4)
    assert FlowStatistics.from_dict(totals.as_dict()) == totals


def test_put_back_keeps_shape_and_centre():
    x = Chain(4).sample(2, generator())
    masses = np.array([1.0, 5.0, 2.0, 9.0])
    for orientation in ("random", "aligned"):
        y = put_back(x[1], x[0], generator(), masses, orientation)
        torch.testing.assert_close(torch.cdist(y, y), torch.cdist(x[1], x[1]), atol=1e-7, rtol=0)
        torch.testing.assert_close(torch.as_tensor(masses) @ y, torch.as_tensor(masses) @ x[0])
    aligned = put_back(x[0] + 2.0, x[0], generator(), masses, "aligned")
    torch.testing.assert_close(aligned, x[0])


def test_maxwell_boltzmann_velocities():
    masses = np.array([1.0, 12.0, 0.0])
    v = np.stack([maxwell_boltzmann(masses, 350.0, generator(s)) for s in range(3000)])
    assert (v[:, 2] == 0).all()
    scaled = (v[:, :2] ** 2 * masses[:2, None] / (GAS_CONSTANT * 350.0)).sum()
    assert stats.chi2.isf(1 - 1e-5, 18000) < scaled < stats.chi2.isf(1e-5, 18000)


def make_simulation(molecule, temperature=TEMPERATURE, system=None, seed=1, positions=None):
    integrator = openmm.LangevinMiddleIntegrator(temperature, 5.0, 0.002)
    integrator.setRandomNumberSeed(seed)
    reference = openmm.Platform.getPlatformByName("Reference")
    topology = chain_topology(molecule.n_atoms)
    simulation = app.Simulation(topology, molecule.system if system is None else system, integrator, reference)
    x = molecule.sample(1, generator(seed))[0] if positions is None else positions
    simulation.context.setPositions(x.numpy())
    simulation.context.setVelocitiesToTemperature(temperature, seed)
    return simulation


def internal_proposal():
    return FlowProposal(*CASES["internal"].arguments)


def recorded(simulation, run, n):
    frames = []
    for _ in range(n):
        run()
        state = simulation.context.getState(getPositions=True)
        frames.append(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
    return torch.as_tensor(np.array(frames))


def chain_z(frames, observables):
    """z-scores of one correlated chain, errors from its own effective sample size.

    The error is a guess from the same few samples, so the deviation is a Student t of n_effective - 1 degrees of
    freedom; returned is the normal deviate that is as improbable.
    """
    from pymbar.timeseries import statistical_inefficiency

    scores = {}
    for name, (function, exact) in observables.items():
        values = function(frames).numpy()
        n_effective = len(values) / statistical_inefficiency(values)
        deviation = (values.mean() - exact) / (values.std() / math.sqrt(n_effective))
        tail = stats.t.logsf(abs(deviation), max(n_effective - 1, 1.0))
        scores[name] = math.copysign(-ndtri_exp(tail), deviation)
    return scores


@pytest.mark.parametrize("n_proposals", [1, 4])
def test_simulation_with_flow_steps_reproduces_basins_and_torsion(n_proposals):
    """A mixed chain: dynamics and flow steps. Torsion observables: the time step's error sits in the bonds."""
    molecule = CASES["internal"].target
    simulation = make_simulation(molecule)
    mixed = FlowSimulation(simulation, internal_proposal(), n_proposals, pool_size=1000, seed=2)
    frames = recorded(simulation, lambda: mixed.run(1, 10), 1500)
    scores = chain_z(frames, {k: v for k, v in molecule.observables().items() if "torsion" in k or "basin" in k})
    assert mixed.statistics.acceptance_rate > 0.3
    assert max(map(abs, scores.values())) < SIGMAS, scores


def test_simulation_at_another_temperature_rescales_the_pool():
    """The flow of 300 K drives a 450 K Simulation: the target is the Simulation's."""
    molecule = Chain(4, temperature=450.0)
    molecule.system = CASES["internal"].target.system
    bond_k, angle_k = GAS_CONSTANT * 300 / 0.025**2, GAS_CONSTANT * 300 / 0.25**2
    molecule = Chain(4, 450.0, math.sqrt(GAS_CONSTANT * 300 / bond_k), math.sqrt(GAS_CONSTANT * 300 / angle_k))
    step = FlowStep(internal_proposal(), 4, pool_size=10_000, generator=generator(1))
    x = molecule.sample(1500, generator(9))
    moved = []
    for frame in x.numpy():
        new = step(frame, temperature=450.0)
        moved.append(frame if new is None else new)
    scores = z_scores(torch.as_tensor(np.array(moved)), molecule.observables())
    assert step.statistics.acceptance_rate > 0.2
    assert max(map(abs, scores.values())) < SIGMAS, scores


def test_velocities_are_redrawn_after_acceptance_and_kept_after_rejection():
    simulation = make_simulation(CASES["internal"].target)
    moved = velocity_pairs(FlowSimulation(simulation, internal_proposal(), seed=2))
    assert abs(velocity_correlation(moved)) < SIGMAS
    n = 12 * len(moved)
    assert stats.chi2.isf(1 - 1e-5, n) < (moved[:, 1] ** 2).sum() < stats.chi2.isf(1e-5, n)


class StaleVelocities(FlowSimulation):
    """The planted error: velocities survive an acceptance."""

    def flow_step(self):
        velocities = self.simulation.context.getState(getVelocities=True).getVelocities()
        accepted = super().flow_step()
        self.simulation.context.setVelocities(velocities)
        return accepted


def test_stale_velocities_are_seen():
    simulation = make_simulation(CASES["internal"].target)
    moved = velocity_pairs(StaleVelocities(simulation, internal_proposal(), seed=2))
    assert abs(velocity_correlation(moved)) > 2 * SIGMAS


def velocity_pairs(mixed, n=400):
    """Velocities in thermal units before and after accepted steps `(n_accepted, 2, 12)`; rejected ones unchanged."""
    context = mixed.simulation.context
    scale = np.sqrt(system_masses(mixed.simulation.system) / (GAS_CONSTANT * TEMPERATURE))[:, None]

    def velocities():
        state = context.getState(getVelocities=True)
        return (state.getVelocities(asNumpy=True)._value * scale).flatten()

    pairs = []
    for _ in range(n):
        mixed.simulation.step(5)
        before = velocities()
        if mixed.flow_step():
            pairs.append((before, velocities()))
        else:
            np.testing.assert_array_equal(velocities(), before)
    assert len(pairs) > 50
    return np.array(pairs)


def velocity_correlation(pairs):
    """z-score of the product of old and new velocity components."""
    product = pairs[:, 0] * pairs[:, 1]
    return product.mean() / (product.std() / math.sqrt(product.size))


def test_context_is_left_as_it_should_be():
    """Parameters, box, time and step count untouched; energy that of the new positions; rejection changes nothing."""
    molecule = Chain(4)
    extra = openmm.CustomBondForce("lambda*100*(r-0.4)^2")
    extra.addGlobalParameter("lambda", 0.0)
    extra.addBond(0, 3, [])
    molecule.system.addForce(extra)
    simulation = make_simulation(molecule)
    simulation.context.setParameter("lambda", 0.25)
    box = simulation.context.getState().getPeriodicBoxVectors()
    mixed = FlowSimulation(simulation, internal_proposal(), seed=2)
    outcomes = set()
    for _ in range(40):
        before = simulation.context.getState(getPositions=True).getPositions(asNumpy=True)._value
        accepted = mixed.flow_step()
        after = simulation.context.getState(getPositions=True).getPositions(asNumpy=True)._value
        assert bool((before != after).any()) == accepted
        outcomes.add(accepted)
    assert outcomes == {True, False}
    assert simulation.context.getParameter("lambda") == 0.25
    assert simulation.context.getState().getPeriodicBoxVectors() == box
    assert simulation.currentStep == 0 and simulation.context.getState().getTime()._value == 0


@pytest.mark.parametrize("within", [False, True])
def test_a_context_with_parameters_is_sampled_with_its_own_energy(within):
    """A restraint switched on by a Context parameter after the first flow step, which the proposal does not know.

    The parameter is also the Context's where the force is one of a CustomCVForce.
    """
    molecule = Chain(4)
    extra = openmm.CustomTorsionForce("lambda*cos(theta)")
    extra.addGlobalParameter("lambda", 0.0)
    extra.addTorsion(0, 1, 2, 3, [])
    if within:
        variable = openmm.CustomCVForce("tilt")
        variable.addCollectiveVariable("tilt", extra)
        extra = variable
    molecule.system.addForce(extra)
    simulation = make_simulation(molecule)
    proposal = FlowProposal(internal_proposal().flow, OpenMMPotential(molecule.system, "Reference"), TEMPERATURE)
    mixed = FlowSimulation(simulation, proposal, 8, seed=2)
    mixed.flow_step()
    simulation.context.setParameter("lambda", 4.0)
    frames = recorded(simulation, lambda: [mixed.flow_step() for _ in range(2)], 1500)  # no run that begins anew
    grid = molecule.torsion
    tilt = np.exp(-4.0 * np.cos(grid.x) / (GAS_CONSTANT * TEMPERATURE))
    normalisation = grid.mean(lambda p: tilt)
    exact = {
        "cos": (lambda x: dihedral(x).cos(), grid.mean(lambda p: tilt * np.cos(p)) / normalisation),
        "sin": (lambda x: dihedral(x).sin(), grid.mean(lambda p: tilt * np.sin(p)) / normalisation),
    }
    assert max(map(abs, chain_z(frames, exact).values())) < SIGMAS
    untilted = {"cos": (exact["cos"][0], grid.mean(np.cos))}
    assert abs(chain_z(frames, untilted)["cos"]) > 2 * SIGMAS


def with_parameter(value):
    """A Simulation whose Context has an energy of its own."""
    molecule = Chain(4)
    extra = openmm.CustomBondForce("lambda*100*(r-0.4)^2")
    extra.addGlobalParameter("lambda", value)
    extra.addBond(0, 3, [])
    molecule.system.addForce(extra)
    return make_simulation(molecule)


@pytest.mark.parametrize("own_energy", [False, True])
def test_positions_that_travel_as_tensors_give_the_same_chain(own_energy):
    """What a flow on a GPU does with the Context, here with both on the CPU: the same numbers bit for bit."""
    ends = []
    for direct in (False, True):
        simulation = with_parameter(0.2) if own_energy else make_simulation(CASES["internal"].target)
        mixed = FlowSimulation(simulation, internal_proposal(), 2, 50, seed=2)
        assert mixed._direct is False and mixed._same_energy is not own_energy
        mixed._direct = direct
        mixed.run(30, 3)
        assert 0 < mixed.statistics.n_accepted < 30
        state = simulation.context.getState(positions=True, velocities=True)
        ends.append([state.getPositions(asNumpy=True)._value, state.getVelocities(asNumpy=True)._value])
    np.testing.assert_array_equal(*ends)


def test_energies_of_a_context_from_tensors():
    molecule = CASES["internal"].target
    context = make_simulation(molecule).context
    x = molecule.sample(3, generator(4))
    x[1, 2, 0] = torch.nan
    kT = GAS_CONSTANT * TEMPERATURE
    one_by_one = torch.tensor([_context_energy(context, row) / kT for row in x], dtype=x.dtype)
    together = context_potential(context, kT)(x)
    assert bool(one_by_one[1].isnan()) and bool(torch.isfinite(one_by_one[[0, 2]]).all())
    torch.testing.assert_close(one_by_one, together, rtol=1e-15, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("own_energy", [False, True])
def test_flow_steps_between_a_flow_and_a_context_on_the_gpu(own_energy):
    """Positions never leave the GPU, and the Context is left with the new ones."""
    flow, _, temperature = CASES["internal"].arguments
    molecule = CASES["internal"].target
    system = with_parameter(0.2).system if own_energy else molecule.system
    integrator = openmm.LangevinMiddleIntegrator(temperature, 1.0, 0.002)
    topology, platform = chain_topology(4), openmm.Platform.getPlatformByName("CUDA")
    simulation = app.Simulation(topology, system, integrator, platform, openmm_properties("CUDA"))
    simulation.context.setPositions(molecule.sample(1, generator())[0].numpy())
    there = copy.deepcopy(flow).to("cuda")
    proposal = FlowProposal(there, TorchPotential(molecule.system, device="cuda"), temperature)
    mixed = FlowSimulation(simulation, proposal, 2, 200, seed=2)
    assert mixed._direct and mixed._read().is_cuda
    outcomes = []
    for _ in range(60):
        simulation.step(5)
        before = mixed._read()
        new = mixed.flow_step()
        outcomes.append(new)
        assert new == bool((mixed._read() - before).abs().max() > 1e-6)
    assert set(outcomes) == {True, False}
    found = [new for _ in range(40) if (new := mixed.step.propose(mixed._read())) is not None]
    assert found and all(new.is_cuda for new in found)
    x = molecule.sample(4, generator(1))
    u = context_potential(simulation.context, proposal.kT)
    torch.testing.assert_close(u(x), u(x.cuda()), rtol=1e-4, atol=1e-3)


def test_alternate_and_reporter(tmp_path):
    simulation = make_simulation(CASES["internal"].target)
    mixed = FlowSimulation(simulation, internal_proposal(), seed=2)
    with pytest.raises(InputError, match="interval is 0"):
        FlowReporter(tmp_path / "flow.csv", 0, mixed)
    reporter = FlowReporter(tmp_path / "flow.csv", 10, mixed)
    simulation.reporters.append(reporter)
    simulation.step(10)  # no flow step yet, and no line
    mixed.run(6, 5)
    simulation.reporters.clear()
    reporter.close()
    rows = list(csv.DictReader((tmp_path / "flow.csv").open()))
    assert [int(row["step"]) for row in rows] == [20, 30, 40]
    assert [int(row["n_proposed"]) for row in rows] == [1, 3, 5]
    totals = alternate(simulation, internal_proposal(), 5, 4, n_proposals=3, seed=1)
    assert totals.n_proposed == 4 and totals.n_proposals == 12
    assert simulation.currentStep == 60


def test_nan_proposals_never_end_a_run():
    def potential(x):
        return torch.full((len(x),), torch.nan)

    molecule = CASES["internal"].target
    proposal = FlowProposal(CASES["internal"].arguments[0], potential, TEMPERATURE, frame="free")
    step = FlowStep(proposal, 3, generator=generator())
    assert step(molecule.sample(1, generator())[0].numpy()) is None
    assert step.statistics.n_impossible == 3


@pytest.mark.parametrize("orientation", ["random", "aligned"])
def test_same_seed_same_chain(orientation):
    results = []
    for _ in range(2):
        step = FlowStep(internal_proposal(), 2, 50, generator(5), orientation)
        x = CASES["internal"].target.sample(1, generator(3))[0].numpy()
        for _ in range(20):
            new = step(x)
            x = x if new is None else new
        results.append(x)
    np.testing.assert_array_equal(*results)


def test_refusals(tmp_path):
    molecule = CASES["internal"].target
    constrained = Chain(4).system
    constrained.addConstraint(0, 1, 0.15)
    with pytest.raises(UnsupportedForceError, match="constraints"):
        FlowSimulation(make_simulation(molecule, system=constrained), internal_proposal())
    small = Chain(3)
    with pytest.raises(InputError, match="3 atoms"):
        FlowSimulation(make_simulation(small), internal_proposal())
    with pytest.raises(InputError, match="at least one proposal"):
        FlowStep(internal_proposal(), 0)
    with pytest.raises(InputError, match="orientation"):
        FlowStep(internal_proposal(), 1, orientation="upright")
    with pytest.raises(InputError, match="at least 1"):
        run_chain(internal_proposal(), molecule.sample(1, generator()), 0, generator=generator())
    with pytest.raises(InputError, match="keeps none"):
        run_chain(internal_proposal(), molecule.sample(1, generator()), 2, thin=3, generator=generator())


def test_potential_on_another_platform_gives_the_same_decisions():
    """Energies from OpenMM and from torch agree to rounding, so equal seeds give equal chains."""
    chains = []
    flow, potential, temperature = CASES["internal"].arguments
    for energy in (potential, OpenMMPotential(CASES["internal"].target.system)):
        proposal = FlowProposal(flow, energy, temperature)
        start = CASES["internal"].target.sample(5, generator(1))
        chains.append(run_chain(proposal, start, 10, generator=generator(2), pool_size=64).positions)
    torch.testing.assert_close(*chains)


def test_local_kernel_between_flow_steps():
    """Random-walk Metropolis moves of the whole configuration between flow steps, in the laboratory frame."""
    case = CASES["cartesian"]
    proposal = FlowProposal(*case.arguments)

    def walk(x, g):
        y = x + 0.01 * torch.randn(x.shape, generator=g, dtype=torch.float64)
        log_alpha = proposal.reduced_potential(x) - proposal.reduced_potential(y)
        accepted = torch.rand(len(x), generator=g, dtype=torch.float64).log() < log_alpha
        return torch.where(accepted[:, None, None], y, x) + 3.0

    g = generator(6)
    start = case.target.sample(10_000, g)
    chain = run_chain(proposal, start, 3, generator=g, local_kernel=walk, pool_size=30_000)
    scores = z_scores(chain.positions[-1], case.target.observables())
    assert chain.statistics.acceptance_rate > 0.2
    assert max(map(abs, scores.values())) < SIGMAS, scores


def in_a_field(strength=7.0):
    """The molecule with a uniform field that turns it without moving it; an internal flow has no density for that."""
    molecule = Chain(4)
    field = openmm.CustomExternalForce("a*x")
    field.addPerParticleParameter("a")
    field.addParticle(0, [strength])
    field.addParticle(3, [-strength])
    molecule.system.addForce(field)
    return molecule


def heights(parameter=0.0):
    """The same field as a force that does not show it; switched on by a Context parameter."""
    molecule = Chain(4)
    field = openmm.CustomCompoundBondForce(2, "heights*(x1-x2)")
    field.addGlobalParameter("heights", parameter)
    field.addBond([0, 3], [])
    molecule.system.addForce(field)
    return molecule


def test_an_external_field_beside_a_free_frame_is_refused():
    """The proposal knows nothing of it: its frame is free, and an accepted molecule would be turned at random."""
    with pytest.raises(InputError, match=r"CustomExternalForce; .* biases of the molecule's shape"):
        FlowSimulation(make_simulation(in_a_field()), internal_proposal())
    simulation = make_simulation(heights())
    mixed = FlowSimulation(simulation, internal_proposal())
    mixed.run(2, 2)  # off
    simulation.context.setParameter("heights", 7.0)
    with pytest.raises(InputError, match="as a whole"):
        mixed.flow_step()


def test_a_state_without_finite_energy_is_tested_at_the_next_step():
    step, x = FlowStep(internal_proposal()), CASES["internal"].target.sample(1, generator())[0]
    fields = {"nowhere": lambda x: torch.full((len(x),), torch.inf), "field": lambda x: x[:, 0, 0]}
    current = "nowhere"

    def energy(x):
        return fields[current](x)

    step(x, energy=energy)
    current = "field"
    with pytest.raises(InputError, match="as a whole"):
        step(x, energy=energy)


def test_a_simulation_of_another_system_than_the_flows_is_refused():
    flow, potential, temperature = CASES["internal"].arguments
    flow = copy.deepcopy(flow)
    flow.metadata = flows.FlowMetadata(fingerprint=fingerprint(potential.system), temperature=temperature)
    proposal = FlowProposal(flow, potential, temperature)
    with pytest.raises(IncompatibleFlowError, match="HarmonicBondForce"):
        FlowSimulation(make_simulation(Chain(4, bond_width=0.01)), proposal)
    FlowSimulation(make_simulation(heights()), proposal)


def watched_chain():
    """A chain with a strong torsion in a group that only is watched, and its Simulation with group 0 alone."""
    molecule = Chain(4)
    system = copy.deepcopy(molecule.system)
    watched = openmm.CustomTorsionForce("50*cos(theta)")
    watched.addTorsion(0, 1, 2, 3, [])
    watched.setForceGroup(5)
    system.addForce(watched)
    simulation = make_simulation(molecule, system=system)
    simulation.integrator.setIntegrationForceGroups({0})
    return molecule, simulation


def test_a_force_that_only_is_watched_does_not_count():
    molecule, simulation = watched_chain()
    mixed = FlowSimulation(simulation, internal_proposal(), seed=2)
    x = molecule.sample(5, generator(3))
    kt = GAS_CONSTANT * TEMPERATURE
    found = context_potential(simulation.context, kt)(x)
    assert not mixed._same_energy
    assert torch.allclose(found, TorchPotential(molecule.system)(x) / kt, atol=1e-6)
    assert (found - TorchPotential(simulation.system)(x) / kt).abs().max() > 1


def test_every_kind_of_dynamics_has_its_temperature():
    molecule = Chain(4)

    def simulated(integrator, *forces):
        system = copy.deepcopy(molecule.system)
        for force in forces:
            system.addForce(force)
        reference = openmm.Platform.getPlatformByName("Reference")
        simulation = app.Simulation(chain_topology(4), system, integrator, reference)
        simulation.context.setPositions(molecule.sample(1, generator())[0].numpy())
        mixed = FlowSimulation(simulation, internal_proposal(), seed=2)
        mixed.run(1, 1)
        return mixed.temperature

    own = internal_proposal().temperature
    assert simulated(openmm.VerletIntegrator(0.001)) == pytest.approx(own)
    assert simulated(openmm.VerletIntegrator(0.001), openmm.AndersenThermostat(450.0, 1.0)) == pytest.approx(450.0)
    assert simulated(openmm.MTSLangevinIntegrator(410.0, 1.0, 0.001, [(0, 1)])) == pytest.approx(410.0)
    custom = openmm.CustomIntegrator(0.001)
    custom.addGlobalVariable("temperature", 390.0)
    assert simulated(custom) == pytest.approx(390.0)
    both = openmm.CompoundIntegrator()
    both.addIntegrator(openmm.LangevinMiddleIntegrator(370.0, 1.0, 0.001))
    assert simulated(both) == pytest.approx(370.0)


def test_forces_that_were_changed_in_the_context_are_seen():
    molecule = Chain(4)
    simulation = make_simulation(molecule)
    mixed = FlowSimulation(simulation, internal_proposal(), seed=2)
    mixed.run(1, 1)
    assert mixed._same_energy
    force = next(f for f in simulation.system.getForces() if isinstance(f, openmm.HarmonicBondForce))
    for k in range(force.getNumBonds()):
        i, j, length, strength = force.getBondParameters(k)
        force.setBondParameters(k, i, j, 1.2 * length, strength)
    force.updateParametersInContext(simulation.context)
    mixed.run(1, 1)
    assert not mixed._same_energy


def test_forces_that_were_changed_where_they_do_not_act_are_seen():
    """A flat-bottomed restraint, tightened while the torsion is in its flat part: the energy there says nothing."""
    molecule = Chain(4)
    flat = openmm.CustomTorsionForce("k*max(0, -cos(theta))^2")
    flat.addPerTorsionParameter("k")
    flat.addTorsion(0, 1, 2, 3, [0.0])
    molecule.system.addForce(flat)
    simulation = make_simulation(molecule)
    x = molecule.sample(2000, generator())
    simulation.context.setPositions(x[int(dihedral(x).cos().argmax())].numpy())
    potential = OpenMMPotential(copy.deepcopy(simulation.system), "Reference")
    mixed = FlowSimulation(simulation, FlowProposal(internal_proposal().flow, potential, TEMPERATURE), seed=2)
    mixed.begin()
    assert mixed._same_energy
    force = next(f for f in simulation.system.getForces() if isinstance(f, openmm.CustomTorsionForce))
    force.setTorsionParameters(0, 0, 1, 2, 3, [50.0])
    force.updateParametersInContext(simulation.context)
    assert mixed._agrees()  # which was all that was asked
    mixed.begin()
    assert not mixed._same_energy


def test_flows_with_one_seed_draw_apart():
    """Two FlowSimulations on one Simulation: a proposal that the state already depends on has another target."""
    flows_of = [copy.deepcopy(internal_proposal().flow) for _ in range(2)]
    with torch.no_grad():
        next(flows_of[1].bijection.parameters()).add_(0.1)
    simulation, potential = make_simulation(Chain(4)), internal_proposal().potential
    states = []
    for flow in (*flows_of, flows_of[0]):
        mixed = FlowSimulation(simulation, FlowProposal(flow, potential, TEMPERATURE), seed=2)
        mixed.begin()
        states.append(mixed.step.generator.get_state())
    assert not torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_steps_that_share_a_pool_heed_its_parameters():
    """Each of two steps at a value of its own: energies of the other's would decide."""
    molecule = Chain(4)
    tilt = openmm.CustomTorsionForce("lam*20*(1+cos(theta))")
    tilt.addGlobalParameter("lam", 0.0)
    tilt.addTorsion(0, 1, 2, 3, [])
    molecule.system.addForce(tilt)
    potential = OpenMMPotential(molecule.system, "Reference")
    proposal = FlowProposal(internal_proposal().flow, potential, TEMPERATURE)
    pool = ProposalPool(proposal, 50, generator(1))
    steps = [FlowStep(proposal, 4, generator=generator(2), pool=pool) for _ in range(2)]
    x = molecule.sample(1, generator())[0].numpy()
    for _ in range(2):
        for value, step in enumerate(steps):
            potential.set_parameter("lam", float(value))
            step(x)
            left = pool._batch.rows(slice(pool._next, None))
            torch.testing.assert_close(left.u, proposal.reduced_potential(left.positions))


def test_a_seed_is_that_of_one_stretch_of_dynamics():
    """A run that goes on from a checkpoint proposes anew; the same stretch proposes the same."""
    drawn = []
    for count in (0, 0, 700):
        simulation = make_simulation(Chain(4))
        simulation.context.setStepCount(count)
        mixed = FlowSimulation(simulation, internal_proposal(), pool_size=20, seed=2)
        mixed.begin()
        drawn.append(mixed.step.pool.take(20).positions)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_pool_energies_are_those_of_the_potential_as_it_is():
    molecule = Chain(4)
    system = copy.deepcopy(molecule.system)
    bias = openmm.CustomTorsionForce("h*cos(theta)")
    bias.addGlobalParameter("h", 0.0)
    bias.addTorsion(0, 1, 2, 3, [])
    system.addForce(bias)
    potential = TorchPotential(system)
    flow = CASES["internal"].arguments[0]
    step = FlowStep(FlowProposal(flow, potential, TEMPERATURE, allow_mismatch=True), 1, 50, generator())
    x = molecule.sample(1, generator())[0]
    step(x)
    potential.set_parameter("h", 6.0)
    step(x)
    left = step.pool.take(20)
    assert torch.allclose(left.u, potential(left.positions) / (GAS_CONSTANT * TEMPERATURE), atol=1e-9)


def test_a_callable_in_single_precision_has_no_field():
    """Rounding of an energy is no force on where the molecule is."""
    flow, potential, temperature = CASES["cartesian"].arguments
    single = TorchPotential(potential.system, dtype=torch.float32)
    plain = FlowProposal(flow, lambda x: single(x.float()), temperature, allow_mismatch=True)
    assert plain.frame == "free"
