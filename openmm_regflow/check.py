"""What the tests of this package run on its own molecules, run on yours: a table of findings and a verdict.

The kernel test needs no reference data and no converged chain. Draws ``x`` of the flow carry weights
``w = exp(-u(x)) / q(x)``; a flow step takes ``x`` to ``x'``, and hybrid Monte Carlo in an OpenMM Context, which knows
nothing of the flow, takes ``x'`` to ``x''``. Two kernels that both leave ``exp(-u)`` in the right measure invariant
give ``E[w (f(x') - f(x))] = E[w (f(x'') - f(x'))] = 0`` for every function f and every flow, however poor (the
joint-distribution idea of Geweke, JASA 99, 799 (2004), with weights instead of draws from the target). A wrong
density, measure, energy or acceptance makes the dynamics move the weighted means of bonds, angles, torsions or energy.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import openmm
import torch
from openmm import unit
from scipy import stats
from torch import Tensor

from openmm_regflow import reweighting
from openmm_regflow.constraints import Constraints, fixed_bonds
from openmm_regflow.coordinates import build_zmatrix, topology_tables
from openmm_regflow.coordinates.internal import bond_angle_torsion
from openmm_regflow.errors import IncompatibleFlowError, InputError, RegflowError, UnsupportedForceError
from openmm_regflow.potentials import OpenMMPotential, TorchPotential
from openmm_regflow.proposals import FlowProposal, ProposalBatch
from openmm_regflow.refusals import UNSUPPORTED, check_flow, has_global_parameters
from openmm_regflow.sampling import proposal_log_weights, run_chain
from openmm_regflow.systems import MolecularSystem
from openmm_regflow.units import GAS_CONSTANT

#: Probability that a correct flow and kernel fail the kernel test, over all observables together.
FALSE_ALARM = 1e-3
#: Fewer effective configurations than this decide nothing.
FEWEST_EFFECTIVE = 30
#: Flow steps before, and hybrid Monte Carlo trajectories after, in the kernel test; dynamics steps of a trajectory.
N_FLOW_STEPS, N_TRAJECTORIES, N_LEAPS = 4, 5, 15

_BAROSTATS = (
    "MonteCarloBarostat", "MonteCarloAnisotropicBarostat", "MonteCarloMembraneBarostat", "MonteCarloFlexibleBarostat",
)  # fmt: skip
Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        name: what was looked at.
        result: what was found, in words and figures.
        passed: False for a failure; None where nothing can fail, or nothing could be decided.
    """

    name: str
    result: str
    passed: bool | None


@dataclass(frozen=True)
class CheckReport:
    """All findings about one flow and one molecule."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(f.passed is not False for f in self.findings)

    @property
    def verdict(self) -> str:
        """One sentence."""
        failed = [f.name for f in self.findings if f.passed is False]
        if failed:
            return f"FAILED: {', '.join(failed)}; do not use this flow with this System before that is resolved"
        if self.findings[-1].passed is None:
            return f"nothing failed, but the kernel test decided nothing: {self.findings[-1].result}"
        return "passed: flow moves of this flow sample this System exactly, as far as these tests can see"

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, result, ok / FAILED / -) of every finding."""
        words = {True: "ok", False: "FAILED", None: "-"}
        return [(f.name, f.result, words[f.passed]) for f in self.findings]

    def to_dict(self) -> dict[str, Any]:
        """Findings and verdict for JSON."""
        return {"passed": self.passed, "verdict": self.verdict, "findings": [asdict(f) for f in self.findings]}


def run_checks(
    flow: Any, molecule: MolecularSystem, *, n: int = 2000, seed: int = 0, progress: Progress | None = None
) -> CheckReport:
    """All checks of a flow on a molecule.

    Args:
        flow: an ``openmm_regflow.Flow``.
        molecule: System, topology, positions and temperature.
        n: flow samples for the kernel test.
        seed: of every random number.
        progress: called with (trajectories done, in total, figures) during the kernel test.

    Returns:
        The findings; failures are in there, not raised.

    Raises:
        InputError: too few samples.
    """
    if n < FEWEST_EFFECTIVE:
        raise InputError(f"n is {n}; at least {FEWEST_EFFECTIVE} samples are needed")
    findings = [_identity(flow, molecule), *system_findings(molecule.system, flow)]
    if flow.n_atoms != molecule.system.getNumParticles():
        return CheckReport(tuple(findings))
    exact = copy.deepcopy(flow).cpu().double()
    findings.append(_round_trip(exact, molecule, seed))
    findings.append(_log_determinant(exact, molecule.system, seed))
    findings.append(_stored_precision(flow, exact, seed))
    findings.append(_energies(flow, molecule, seed))
    if CheckReport(tuple(findings)).passed:
        potential = OpenMMPotential(molecule.system, _small_platform(molecule.system))
        proposal = FlowProposal(flow, potential, molecule.temperature)
        findings.append(_frame(proposal))
    if CheckReport(tuple(findings)).passed:
        findings.append(kernel_test(proposal, molecule, n, seed, progress))
    else:
        findings.append(Finding("kernel", "not run after the failures above", None))
    return CheckReport(tuple(findings))


def _frame(proposal: FlowProposal) -> Finding:
    """How centre and orientation are treated."""
    words = {
        "free": "rigid motion leaves the energy unchanged: the frame is redrawn, then restored",
        "fixed": "an external field fixes the frame: the flow's density counts as it is",
    }
    try:
        return Finding("frame", words[proposal.frame], True)
    except UnsupportedForceError as error:
        return Finding("frame", str(error), False)


def _identity(flow: Any, molecule: MolecularSystem) -> Finding:
    """Atoms, System and temperature against the flow's own record."""
    n_atoms = molecule.system.getNumParticles()
    if flow.n_atoms != n_atoms:
        return Finding("belongs together", f"the flow has {flow.n_atoms} atoms, the System {n_atoms}", False)
    try:
        check_flow(flow, molecule.system, molecule.temperature)
    except IncompatibleFlowError as error:
        return Finding("belongs together", str(error), False)
    recorded = getattr(flow.metadata, "fingerprint", None) is not None
    words = "System and temperature are those of the training" if recorded else "the flow names no System; atoms agree"
    return Finding("belongs together", f"{words} ({n_atoms} atoms, {molecule.temperature:g} K)", True)


def system_findings(system: openmm.System, flow: Any = None) -> list[Finding]:
    """What a System has that a flow move must either handle or refuse.

    Args:
        system: any.
        flow: its bonds of fixed length decide which constraints are handled.

    Returns:
        One finding for each of constraints, virtual sites, particles without mass, periodic box, barostat,
        centre-of-mass removal, thermostat and Context parameters.
    """
    findings = []
    for name, count, check in UNSUPPORTED:
        found = count(system)
        try:
            check(system, flow)
            words = f"{found}: handled: fixed in the flow, metric term of the constrained ensemble included"
            findings.append(Finding(name, words if found else "none", True))
        except RegflowError as error:
            findings.append(Finding(name, f"{found}: refused: {error}", False))
    kinds = [type(force).__name__ for force in system.getForces()]
    barostats = [kind for kind in kinds if kind in _BAROSTATS]
    words = f"{', '.join(barostats)}: refused; remove it, whole-molecule flow moves are for constant volume"
    findings.append(Finding("barostat", words if barostats else "none", not barostats))
    for name, present, words in (
        ("CMMotionRemover", "CMMotionRemover" in kinds, "handled: acts on velocities; shapes are not affected"),
        ("thermostat", "AndersenThermostat" in kinds, "handled: acts on velocities, which an accepted move redraws"),
        ("Context parameters", has_global_parameters(system), "handled: the Context's own energy decides"),
    ):
        findings.append(Finding(name, words if present else "none", True))
    return findings


class _Rule(NamedTuple):
    """A worst error in units of what rounding explains: half the digits of the floating-point type."""

    worst: float
    size: float

    @classmethod
    def of(cls, error: Tensor, scale: Tensor, dtype: torch.dtype = torch.float64) -> "_Rule":
        allowed = torch.finfo(dtype).eps ** 0.5 * (1 + scale.abs().double())
        ratio = (error.abs().double() / allowed).nan_to_num(nan=math.inf)
        return cls(float(ratio.max()), float(error.abs().max()))

    @property
    def passed(self) -> bool:
        return self.worst <= 1.0


def _latents(flow: Any, n: int, seed: int) -> Tensor:
    """Latent points `(m, dim)`, float64, whose configurations exist."""
    z = flow.prior.sample(4 * n, torch.Generator().manual_seed(seed), torch.float64)
    with torch.no_grad():
        inside = torch.isfinite(flow.forward(z)[0]).flatten(1).all(1)
    return z[inside][:n]


def _round_trip(flow: Any, molecule: MolecularSystem, seed: int, n: int = 200) -> Finding:
    """Latent -> positions -> latent from draws of the prior and from the molecule's own structure, in float64."""
    z = _latents(flow, n, seed)
    if not len(z):
        return Finding("round trip", "no draw of the flow is a configuration", False)
    with torch.no_grad():
        own = flow.inverse(torch.as_tensor(molecule.positions)[None].double())[0]
        if not bool(torch.isfinite(own).all()):
            return Finding("round trip", "the molecule's own structure lies outside the flow's coordinates", False)
        z = torch.cat([own, z])
        x, log_det = flow.forward(z)
        again, log_det_back = flow.inverse(x)
    turn = torch.where(flow.prior.circular, 2 * math.pi, math.inf)
    error = torch.minimum((again - z).abs(), (turn - (again - z).abs()).abs())
    trip, closing = _Rule.of(error, z), _Rule.of(log_det + log_det_back, log_det)
    words = f"latent {trip.size:.1e}, log-determinant {closing.size:.1e} nat over {len(z)} points in float64"
    return Finding("round trip", words, trip.passed and closing.passed)


def _log_determinant(flow: Any, system: openmm.System, seed: int, n: int = 3) -> Finding:
    """The flow's log-determinant against the Jacobian that autodiff finds, with the rigid motion added."""
    z = _latents(flow, n, seed + 1)
    if not len(z):
        return Finding("log-determinant", "no draw of the flow is a configuration", False)
    with torch.no_grad():
        reported = flow.forward(z)[1]
    constraints = Constraints.of(system) if getattr(flow, "fixed_bonds", ()) else None
    found = torch.stack([jacobian_log_determinant(flow, row, constraints) for row in z])
    rule = _Rule.of(found - reported, reported)
    words = f"differs from autodiff by {rule.size:.1e} nat over {len(z)} points in float64"
    return Finding("log-determinant", words, rule.passed)


def jacobian_log_determinant(flow: Any, z: Tensor, constraints: Constraints | None = None) -> Tensor:
    """Log-determinant of a flow at one latent point by autodiff, in the measure that ``log_prob`` is written in.

    For a flow on internal coordinates the columns for translation and rotation complete the Jacobian J; the factor by
    which a rotor's feature turns faster than its torsion is made up for by the labels of its atoms. With bonds of fixed
    length J has fewer columns than rows, and ``det(J^T M J) / det M`` is the squared volume of the constraint surface
    in mass-weighted coordinates, that is ``exp(2 log_det) det Z`` (:mod:`openmm_regflow.constraints`).

    Args:
        flow: in float64.
        z: `(dim,)`.
        constraints: of the System, where the flow has bonds of fixed length.
    """
    jacobian = torch.autograd.functional.jacobian(lambda v: flow.forward(v[None])[0][0].flatten(), z)
    if not flow.rotation_invariant:
        return torch.linalg.slogdet(jacobian)[1]
    with torch.no_grad():
        x = flow.forward(z[None])[0]
    axes = torch.eye(3, dtype=torch.float64)
    shifts = axes.repeat(flow.n_atoms, 1)
    turns = torch.stack([torch.linalg.cross(axis.expand_as(x[0]), x[0]).flatten() for axis in axes], 1)
    full = torch.cat([jacobian, shifts, turns], 1)
    labels = getattr(flow.coordinates, "multiplicity", torch.ones(1)).double().log().sum()
    if constraints is None:
        return torch.linalg.slogdet(full)[1] + labels
    masses = torch.tensor(constraints.masses, dtype=torch.float64).repeat_interleave(3)
    # By QR and not by J^T M J, which would square the condition number.
    volume = torch.linalg.qr(masses.sqrt()[:, None] * full)[1].diagonal().abs().log().sum()
    return volume - 0.5 * masses.log().sum() - constraints.log_metric(x)[0] + labels


def _stored_precision(flow: Any, exact: Any, seed: int, n: int = 1000) -> Finding:
    """log q as drawn against log q of the same configuration looked up again, in the flow's own precision."""
    x, drawn = flow.sample(n, torch.Generator(device=flow.device).manual_seed(seed + 2))
    valid = torch.isfinite(x).flatten(1).all(1)
    if not bool(valid.any()):
        return Finding("log q drawn = looked up", "no sample of the flow is a configuration", False)
    looked_up = flow.log_prob(x[valid].double())
    error = (drawn[valid].double() - looked_up.double()).abs()
    # One configuration in a hundred may sit where the map is steep; a wrong density is wrong everywhere.
    most = torch.quantile(error, 0.99)
    rule = _Rule.of(most, drawn[valid].double().abs().mean(), flow.dtype)
    words = f"differ by {float(error.median()):.1e} nat (median), {float(error.max()):.1e} (most) in {flow.dtype}"
    return Finding("log q drawn = looked up", words.replace("torch.", ""), rule.passed)


def _energies(flow: Any, molecule: MolecularSystem, seed: int, n: int = 100) -> Finding:
    """Energies of both potentials against a Context of the System on the Reference platform."""
    x = flow.sample(n, torch.Generator(device=flow.device).manual_seed(seed + 3))[0].double().cpu()
    x = torch.cat([torch.as_tensor(molecule.positions)[None].double(), x[torch.isfinite(x).flatten(1).all(1)]])
    context = _context(molecule.system, openmm.VerletIntegrator(0.001), "Reference")
    expected = torch.tensor([_energy(context, frame) for frame in x.numpy()], dtype=torch.float64)
    platform = _small_platform(molecule.system)
    potentials: dict[str, Any] = {"OpenMMPotential": OpenMMPotential(molecule.system, platform)}
    words = []
    try:
        potentials["TorchPotential"] = TorchPotential(molecule.system)
    except UnsupportedForceError as error:
        words.append(f"TorchPotential does not cover it ({error})")
    passed = True
    for name, potential in potentials.items():
        with torch.no_grad():
            energies = potential(x).double().cpu()
        finite = torch.isfinite(expected) & torch.isfinite(energies)
        # Platforms compute in single precision at best; a term that is missing or counted twice shows all the same.
        rule = _Rule.of((energies - expected)[finite], expected[finite], torch.float32)
        words.append(f"{name} {rule.size / (1 + float(expected[finite].abs().max())):.1e}")
        passed &= rule.passed and bool(finite[0])
    return Finding("energies = Context's", f"worst difference over largest energy: {', '.join(words)}", passed)


def _context(
    system: openmm.System, integrator: openmm.Integrator, platform: str, properties: dict[str, str] | None = None
) -> openmm.Context:
    return openmm.Context(system, integrator, openmm.Platform.getPlatformByName(platform), properties or {})


def _energy(context: openmm.Context, x: np.ndarray) -> float:
    """Potential energy [kJ/mol]."""
    context.setPositions(x)
    return float(context.getState(getEnergy=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))


class HybridMonteCarlo:
    """Hybrid Monte Carlo in a Context: leaves ``exp(-u)``, and the constrained ensemble, invariant without a flow.

    Velocity Verlet with RATTLE (Andersen, J. Comput. Phys. 52, 24 (1983)) is reversible and preserves the volume of the
    constrained phase space, so the Metropolis test on the total energy (Duane et al., Phys. Lett. B 195, 216 (1987))
    makes any time step exact.

    Args:
        system: without a barostat.
        temperature: [K].
        timestep: [ps].
        platform: of OpenMM.
        properties: of the platform.
        seed: of velocities and decisions.

    Attributes:
        n_accepted: trajectories accepted.
        n_proposed: trajectories run.
    """

    def __init__(
        self,
        system: openmm.System,
        temperature: float,
        timestep: float = 0.001,
        platform: str = "Reference",
        properties: dict[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        self._integrator = openmm.CustomIntegrator(timestep)
        for name in ("kick", "drift"):
            self._integrator.addPerDofVariable(name, 0)
        self._add_steps()
        self._integrator.setConstraintTolerance(1e-10)
        self._context = _context(copy.deepcopy(system), self._integrator, platform, properties)
        self.temperature, self.kT = temperature, GAS_CONSTANT * temperature
        self._rng = np.random.default_rng(seed)
        self.n_accepted, self.n_proposed = 0, 0

    def _add_steps(self) -> None:
        """Velocity Verlet; positions and velocities obey the constraints after every step."""
        integrator = self._integrator
        integrator.addUpdateContextState()
        integrator.addComputePerDof("v", "v + 0.5*dt*f/m")
        integrator.addComputePerDof("x", "x + dt*v")
        integrator.addComputePerDof("drift", "x")
        integrator.addConstrainPositions()
        integrator.addComputePerDof("v", "v + 0.5*dt*f/m + (x - drift)/dt")
        integrator.addConstrainVelocities()

    @property
    def timestep(self) -> float:
        """[ps]."""
        return float(self._integrator.getStepSize().value_in_unit(unit.picosecond))

    def trajectory(self, x: np.ndarray, n_steps: int) -> np.ndarray:
        """One trajectory from `(n_atoms, 3)` [nm] and its Metropolis decision: the new positions, or the old ones."""
        self.n_proposed += 1
        self._context.setPositions(x)
        self._context.setVelocitiesToTemperature(self.temperature, int(self._rng.integers(1, 2**31 - 1)))
        self._context.applyVelocityConstraints(1e-10)
        before = self._total_energy()
        try:
            self._integrator.step(n_steps)
            change = (self._total_energy() - before) / self.kT
        except openmm.OpenMMException:  # a clash that blew up
            return x
        if not math.log(max(self._rng.random(), 1e-300)) < -change:
            return x
        self.n_accepted += 1
        return np.array(self._context.getState(getPositions=True).getPositions(asNumpy=True)._value)

    def find_timestep(self, x: np.ndarray, n_steps: int, n_trajectories: int = 20) -> None:
        """Halve the time step until more than half of the trajectories from ``x`` are accepted."""
        while True:
            self.n_accepted, self.n_proposed, here = 0, 0, np.array(x)
            for _ in range(n_trajectories):
                here = self.trajectory(here, n_steps)
            if 2 * self.n_accepted > n_trajectories or self.timestep < 1e-5:
                self.n_accepted, self.n_proposed = 0, 0
                return
            self._integrator.setStepSize(self.timestep / 2)

    def _total_energy(self) -> float:
        state = self._context.getState(getEnergy=True)
        energy = state.getPotentialEnergy() + state.getKineticEnergy()
        return float(energy.value_in_unit(unit.kilojoule_per_mole))


def kernel_test(
    proposal: FlowProposal, molecule: MolecularSystem, n: int, seed: int = 0, progress: Progress | None = None
) -> Finding:
    """Weighted flow draws through flow steps and hybrid Monte Carlo: no weighted mean may move (see the module).

    Args:
        proposal: of the flow on the molecule's whole System.
        molecule: whose System and topology are used.
        n: flow draws.
        seed: of every random number.
        progress: called with (configurations done, in total, figures).
    """
    generator = torch.Generator(device=proposal.device).manual_seed(seed)
    batch = proposal.sample(n, generator)
    every = proposal_log_weights(batch).cpu()
    if not bool(torch.isfinite(every).any()):
        return Finding("kernel", "no sample of the flow has a finite weight", None)
    ess = reweighting.effective_sample_size(every)
    # Rows beyond a few times the effective number cost dynamics and decide nothing.
    n_keep = max(FEWEST_EFFECTIVE, min(n // 4, int(4 * ess * n)))
    rows, log_w = thinned(batch, n_keep, generator)
    weights = np.exp(log_w - log_w.max())
    n_effective = float(weights.sum() ** 2 / (weights**2).sum())
    if n_effective < FEWEST_EFFECTIVE:
        words = f"undecided: only {n_effective:.0f} of {n} samples count (ESS {100 * ess:.2g} %); give more with -n"
        return Finding("kernel", words, None)
    stages = [batch.positions[rows].double(), *_moved(proposal, batch.positions[rows], generator)]
    observed = _observables(molecule, proposal)
    engine = _engine(proposal, molecule, seed)
    engine.find_timestep(molecule.positions, N_LEAPS)
    relaxed = list(_relaxed(engine, stages[-1].cpu().numpy(), progress))
    stages.append(torch.as_tensor(np.array(relaxed)))
    values = [observed(x.cpu(), proposal.reduced_potential(x).cpu()) for x in stages]
    changes = {"flow": values[-2] - values[0], "dynamics": values[-1] - values[-2]}
    acceptance = float((stages[-2].cpu() != stages[0].cpu()).flatten(1).any(1).double().mean())
    return _judged(changes, weights, n_effective, acceptance, engine)


def _judged(
    changes: dict[str, Tensor], weights: np.ndarray, n_effective: float, moved: float, engine: HybridMonteCarlo
) -> Finding:
    """The largest weighted mean change in standard errors, against what chance gives over all observables."""
    worst = {name: largest_score(change.numpy(), weights) for name, change in changes.items()}
    n_tests = sum(change.shape[1] for change in changes.values())
    limit = float(stats.t.isf(FALSE_ALARM / 2 / n_tests, n_effective - 1))
    words = (
        f"means move by at most {worst['flow']:.1f} (flow steps) and {worst['dynamics']:.1f} (dynamics) standard "
        f"errors, {limit:.1f} allowed; {n_effective:.0f} effective samples, {100 * moved:.0f} % moved by the flow, "
        f"{100 * engine.n_accepted / engine.n_proposed:.0f} % of trajectories accepted"
    )
    return Finding("kernel", words, max(worst.values()) <= limit)


def thinned(batch: ProposalBatch, n_keep: int, generator: torch.Generator) -> tuple[Tensor, np.ndarray]:
    """Rows of a batch that are worth work, with log-weights that keep every weighted mean unbiased.

    A row of weight w below a threshold c is kept with probability w/c and then weighs c (Russian roulette).

    Args:
        batch: `(n, ...)`, at least one row possible.
        n_keep: rows to expect.
        generator: random state on the batch's device.

    Returns:
        Indices `(k,)` and log-weights `(k,)`.
    """
    log_w = proposal_log_weights(batch).cpu().numpy()
    low, high = log_w.max() - 700.0, log_w.max()
    for _ in range(60):
        middle = (low + high) / 2
        expected = np.exp(np.minimum(log_w - middle, 0)).sum()
        low, high = (middle, high) if expected > n_keep else (low, middle)
    draw = torch.rand(len(log_w), generator=generator, dtype=torch.float64, device=generator.device).cpu().numpy()
    kept = np.flatnonzero(np.log(np.maximum(draw, 1e-300)) < np.minimum(log_w - high, 0))
    return torch.as_tensor(kept), np.maximum(log_w[kept], high)


def largest_score(changes: np.ndarray, weights: np.ndarray) -> float:
    """Largest |weighted mean change| over its standard error.

    Args:
        changes: `(n, n_observables)`, rows independent.
        weights: `(n,)`.
    """
    products = weights[:, None] * changes
    error = np.sqrt((products**2).sum(0))
    return float(np.max(np.divide(np.abs(products.sum(0)), error, out=np.zeros_like(error), where=error > 0)))


def _moved(proposal: FlowProposal, positions: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Positions after Metropolis-Hastings steps and then i-SIR steps."""
    half = N_FLOW_STEPS // 2
    stages = []
    for n_proposals in (1, 8):
        chain = run_chain(proposal, positions, half, generator=generator, n_proposals=n_proposals, thin=half)
        positions = chain.positions[-1]
        stages.append(positions.double())
    return stages[-1:]


def _relaxed(engine: HybridMonteCarlo, positions: np.ndarray, progress: Progress | None) -> Iterator[np.ndarray]:
    """Each configuration after a few trajectories of dynamics."""
    for done, x in enumerate(positions, 1):
        for _ in range(N_TRAJECTORIES):
            x = engine.trajectory(x, N_LEAPS)
        if progress:
            progress(done, len(positions), {})
        yield x


def _small_platform(system: openmm.System) -> str | None:
    """Reference for small molecules, where it is the fastest, except for CustomGBForce; None for the others."""
    slow = any(isinstance(force, openmm.CustomGBForce) for force in system.getForces())
    return None if slow or system.getNumParticles() > 100 else "Reference"


def _engine(proposal: FlowProposal, molecule: MolecularSystem, seed: int) -> "HybridMonteCarlo":
    """Dynamics on the platform of the proposal's potential."""
    platform, properties = _small_platform(molecule.system) or "CPU", {}
    if isinstance(proposal.potential, OpenMMPotential):
        chosen = proposal.potential.engine(molecule.positions[None])
        platform, properties = chosen.platform, chosen.properties
    return HybridMonteCarlo(molecule.system, proposal.temperature, 0.008, platform, properties, seed)


def _observables(molecule: MolecularSystem, proposal: FlowProposal) -> Callable[[Tensor, Tensor], Tensor]:
    """Reduced energy, bonds, angles, sines and cosines of torsions `(n, k)`; distances where there is no Z-matrix;
    in a fixed frame the centre too.

    Bonds of constrained length are left out: there is nothing to see but the tolerance of the constraints.
    """
    zmatrix = getattr(getattr(proposal.flow, "coordinates", None), "zmatrix", None)
    try:
        zmatrix = zmatrix or build_zmatrix(*topology_tables(molecule.topology))
        rows, (a, b, c) = torch.tensor(zmatrix.rows, dtype=torch.long).view(-1, 4), zmatrix.seed
        pairs = [(a, b), (b, c), (a, c)]
    except InputError:
        rows = torch.empty(0, 4, dtype=torch.long)
        pairs = [(i, j) for i in range(proposal.n_atoms) for j in range(i)][:100]
    fixed = {frozenset(bond[:2]) for bond in fixed_bonds(molecule.system)}
    free = [k for k, row in enumerate(rows.tolist()) if frozenset(row[:2]) not in fixed]
    pairs = [pair for pair in pairs if frozenset(pair) not in fixed]

    def observables(x: Tensor, u: Tensor) -> Tensor:
        columns = [u[:, None], *((x[:, i] - x[:, j]).norm(dim=1, keepdim=True) for i, j in pairs)]
        if len(rows):
            b, theta, tau = bond_angle_torsion(x.permute(2, 1, 0), rows)
            columns += [b[free].T, theta.T, tau.cos().T, tau.sin().T]
        if proposal.frame == "fixed":
            columns.append(x.mean(1))
        return torch.cat(columns, 1)

    return observables
