"""The kernel test: weighted draws of the flow through flow steps, and then through dynamics that know nothing of it.

The kernel test needs no reference data and no converged chain. Draws ``x`` of the flow carry weights
``w = exp(-u(x)) / q(x)``; a flow step takes ``x`` to ``x'``, and hybrid Monte Carlo in an OpenMM Context, which knows
nothing of the flow, takes ``x'`` to ``x''``. Two kernels that both leave ``exp(-u)`` in the right measure invariant
give ``E[w (f(x') - f(x))] = E[w (f(x'') - f(x'))] = 0`` for every function f and every flow, however poor (the
joint-distribution idea of Geweke, JASA 99, 799 (2004), with weights instead of draws from the target). A wrong
density, measure, energy or acceptance makes the dynamics move the weighted means of bonds, angles, torsions or energy.

For a flow over a part of the System the target is the subset's distribution beside its surroundings and in its frame as
they are in the molecule's own structure. The dynamics then hold the surroundings and the three atoms of the frame.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import openmm
import torch
from openmm import unit
from scipy import stats
from torch import Tensor

from openmm_regflow import reweighting
from openmm_regflow.check.report import Finding
from openmm_regflow.constraints import Constraints, fixed_bonds
from openmm_regflow.coordinates import build_zmatrix, topology_tables
from openmm_regflow.coordinates.internal import bond_angle_torsion
from openmm_regflow.device import openmm_properties
from openmm_regflow.errors import InputError
from openmm_regflow.potentials import OpenMMPotential, small_platform
from openmm_regflow.proposals import FlowProposal, ProposalBatch
from openmm_regflow.sampling import FlowStep, proposal_log_weights, run_chain
from openmm_regflow.systems import MolecularSystem
from openmm_regflow.units import GAS_CONSTANT

#: Probability that a correct flow and kernel fail the kernel test, over all observables together.
FALSE_ALARM = 1e-3
#: Fewer effective configurations than this decide nothing.
FEWEST_EFFECTIVE = 30
#: Flow steps before, and hybrid Monte Carlo trajectories after, in the kernel test; dynamics steps of a trajectory.
N_FLOW_STEPS, N_TRAJECTORIES, N_LEAPS = 4, 5, 15

#: Mass [dalton] of an atom that hardly moves.
_HEAVY = 1e10
Progress = Callable[[int, int, dict[str, float]], None]


class HybridMonteCarlo:
    """Hybrid Monte Carlo in a Context: leaves ``exp(-u)``, and the constrained ensemble, invariant without a flow.

    Velocity Verlet with RATTLE (Andersen, J. Comput. Phys. 52, 24 (1983)) is reversible and preserves the volume of the
    constrained phase space, so the Metropolis test on the total energy (Duane et al., Phys. Lett. B 195, 216 (1987))
    makes any time step exact.

    Args:
        system: of which barostats, thermostats and a CMMotionRemover do nothing.
        temperature: [K].
        timestep: [ps].
        platform: of OpenMM.
        properties: of the platform, beside those that this package chooses.
        seed: of velocities and decisions.
        log_density: of a configuration `(n_atoms, 3)`, beside ``-u`` and what the dynamics know.

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
        log_density: Callable[[np.ndarray], float] | None = None,
    ) -> None:
        self._log_density = log_density or (lambda x: 0.0)
        self._integrator = openmm.CustomIntegrator(timestep)
        for name in ("kick", "drift"):
            self._integrator.addPerDofVariable(name, 0)
        self._add_steps()
        self._integrator.setConstraintTolerance(1e-10)
        self._context = new_context(copy.deepcopy(system), self._integrator, platform, properties)
        self.temperature, self.kT = temperature, GAS_CONSTANT * temperature
        self._rng = np.random.default_rng(seed)
        self.n_accepted, self.n_proposed = 0, 0

    def _add_steps(self) -> None:
        """Velocity Verlet; positions and velocities obey the constraints after every step.

        Without ``addUpdateContextState``: what a CMMotionRemover, a thermostat or a barostat does is no dynamics, and
        the Metropolis test would take its changes of energy for errors of the integrator.
        """
        integrator = self._integrator
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
        end = np.array(self._context.getState(getPositions=True).getPositions(asNumpy=True)._value)
        change += self._log_density(x) - self._log_density(end)
        if not math.log(max(self._rng.random(), 1e-300)) < -change:
            return x
        self.n_accepted += 1
        return end

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
    own = whole_positions(proposal, molecule)
    batch = proposal.sample(n, generator)
    if proposal.atom_subset is not None:
        placed = proposal.in_place(batch.positions, own.to(proposal.device))
        batch = ProposalBatch(placed, batch.log_q, proposal.reduced_potential(placed))
    every = proposal_log_weights(batch).cpu()
    if not bool(torch.isfinite(every).any()):
        return Finding("kernel", "no sample of the flow has a finite weight", None)
    ess = reweighting.effective_sample_size(every)
    # Rows beyond a few times the effective number cost dynamics and decide nothing.
    n_keep = max(FEWEST_EFFECTIVE, min(n // 4, int(4 * ess * n)))
    rows, log_w = thinned(batch, n_keep, generator)
    weights = np.exp(log_w - log_w.max())
    n_effective = len(log_w) * reweighting.effective_sample_size(log_w)
    if n_effective < FEWEST_EFFECTIVE:
        words = f"undecided: only {n_effective:.0f} of {n} samples count (ESS {100 * ess:.2g} %); give more with -n"
        return Finding("kernel", words, None)
    after, moved = _moved(proposal, batch.positions[rows], generator)
    stages = [batch.positions[rows].double(), after]
    observed = _observables(molecule, proposal)
    engine = _engine(proposal, molecule, seed)
    engine.find_timestep(own[0].numpy(), N_LEAPS)
    relaxed = list(_relaxed(engine, stages[-1].cpu().numpy(), progress))
    stages.append(torch.as_tensor(np.array(relaxed)))
    values = [observed(x.cpu(), proposal.reduced_potential(x).cpu()) for x in stages]
    changes = {"flow": values[-2] - values[0], "dynamics": values[-1] - values[-2]}
    return _judged(changes, weights, n_effective, moved, engine)


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


def _moved(proposal: FlowProposal, positions: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """Positions after Metropolis-Hastings steps and then i-SIR steps, and the part that any of them changed."""
    half, changed = N_FLOW_STEPS // 2, np.zeros(len(positions), dtype=bool)
    for n_proposals in (1, 8):
        if proposal.atom_subset is not None:
            step = FlowStep(proposal, n_proposals, 4096, generator)
            stepped = [_stepped(step, x, half) for x in positions.cpu()]
            positions = torch.stack([x for x, _ in stepped])
            changed |= np.array([moved for _, moved in stepped])
            continue
        chain = run_chain(proposal, positions, half, generator=generator, n_proposals=n_proposals, thin=half)
        positions = chain.positions[-1]
        changed |= chain.accepted.any(0).cpu().numpy()
    return positions.double(), float(changed.mean())


def _stepped(step: FlowStep, x: Tensor, n_steps: int) -> tuple[Tensor, bool]:
    """A configuration `(n_atoms, 3)` after steps of a subset's flow, and whether any was accepted."""
    moved = False
    for _ in range(n_steps):
        new = step(x.numpy())
        if new is not None:
            x, moved = torch.as_tensor(new), True
    return x, moved


def _relaxed(engine: HybridMonteCarlo, positions: np.ndarray, progress: Progress | None) -> Iterator[np.ndarray]:
    """Each configuration after a few trajectories of dynamics."""
    for done, x in enumerate(positions, 1):
        for _ in range(N_TRAJECTORIES):
            x = engine.trajectory(x, N_LEAPS)
        if progress:
            progress(done, len(positions), {})
        yield x


def _engine(proposal: FlowProposal, molecule: MolecularSystem, seed: int) -> "HybridMonteCarlo":
    """Dynamics on the platform of the proposal's potential."""
    platform, properties = small_platform(molecule.system) or "CPU", {}
    if isinstance(proposal.potential, OpenMMPotential):
        chosen = proposal.potential.engine(molecule.positions[None])
        platform, properties = chosen.platform, chosen.properties
    system, log_density = molecule.system, None
    if proposal.atom_subset is not None:
        system = _held(system, proposal)
        log_density = _metric_correction(molecule.system, system, proposal.atom_subset)
    return HybridMonteCarlo(system, proposal.temperature, 0.008, platform, properties, seed, log_density)


def _held(system: openmm.System, proposal: FlowProposal) -> openmm.System:
    """A System in which a subset's surroundings and the atoms of its frame stay where they are.

    OpenMM holds atoms without mass, but takes no constraint of one; the frame's atoms in constraints become heavy.
    """
    held, subset = copy.deepcopy(system), list(proposal.atom_subset or ())
    frame = {subset[k] for k in proposal.frame_atoms or ()}
    inside = [bond for bond in fixed_bonds(system) if {*bond[:2]} <= set(subset)]
    constrained = {atom for bond in inside for atom in bond[:2]}
    for atom in range(system.getNumParticles()):
        if atom in frame or atom not in subset:
            held.setParticleMass(atom, _HEAVY if atom in frame & constrained else 0.0)
    for k in reversed(range(held.getNumConstraints())):
        if not {*held.getConstraintParameters(k)[:2]} <= set(subset):
            held.removeConstraint(k)
    return held


def _metric_correction(
    system: openmm.System, held: openmm.System, subset: Sequence[int]
) -> Callable[[np.ndarray], float] | None:
    """Log-ratio of the metric terms with the real masses and with those of the held System; None if both are one."""
    real, changed = Constraints.of(system, subset), Constraints.of(held, subset)
    if not len(real):
        return None

    def log_ratio(x: np.ndarray) -> float:
        position = torch.as_tensor(x[list(subset)])[None]
        return float(real.log_metric(position) - changed.log_metric(position))

    return log_ratio


def _observables(molecule: MolecularSystem, proposal: FlowProposal) -> Callable[[Tensor, Tensor], Tensor]:
    """Reduced energy, bonds, angles, sines and cosines of torsions `(n, k)`; distances where there is no Z-matrix;
    in a fixed frame the centre too.

    Bonds of constrained length are left out: there is nothing to see but the tolerance of the constraints.
    """
    zmatrix = getattr(getattr(proposal.flow, "coordinates", None), "zmatrix", None)
    atoms = list(range(proposal.n_atoms)) if proposal.atom_subset is None else proposal.atom_subset
    place = {atom: k for k, atom in enumerate(atoms)}
    try:
        zmatrix = zmatrix or build_zmatrix(*topology_tables(molecule.topology))
        rows, (a, b, c) = torch.tensor(zmatrix.rows, dtype=torch.long).view(-1, 4), zmatrix.seed
        pairs = [(a, b), (b, c), (a, c)]
    except InputError:
        rows = torch.empty(0, 4, dtype=torch.long)
        pairs = [(i, j) for i in range(proposal.n_atoms) for j in range(i)][:100]
    fixed = {frozenset(place.get(atom, -1) for atom in bond[:2]) for bond in fixed_bonds(molecule.system)}
    free = [k for k, row in enumerate(rows.tolist()) if frozenset(row[:2]) not in fixed]
    pairs = [pair for pair in pairs if frozenset(pair) not in fixed]

    def observables(x: Tensor, u: Tensor) -> Tensor:
        x = x[:, atoms]
        columns = [u[:, None], *((x[:, i] - x[:, j]).norm(dim=1, keepdim=True) for i, j in pairs)]
        if len(rows):
            b, theta, tau = bond_angle_torsion(x.permute(2, 1, 0), rows)
            columns += [b[free].T, theta.T, tau.cos().T, tau.sin().T]
        if proposal.frame == "fixed" and proposal.atom_subset is None:
            columns.append(x.mean(1))
        return torch.cat(columns, 1)

    return observables


def whole_positions(proposal: FlowProposal, molecule: MolecularSystem) -> Tensor:
    """The molecule's own structure `(1, n_atoms, 3)`, float64 on the CPU, a subset not split by the box."""
    box = None
    if molecule.system.usesPeriodicBoundaryConditions():
        vectors = molecule.system.getDefaultPeriodicBoxVectors()
        box = np.array([vector.value_in_unit(unit.nanometer) for vector in vectors])
    return torch.as_tensor(proposal.make_whole(np.asarray(molecule.positions, dtype=np.float64), box))[None]


def new_context(
    system: openmm.System, integrator: openmm.Integrator, platform: str, properties: dict[str, str] | None = None
) -> openmm.Context:
    """A Context on a platform by its name; on a GPU in mixed precision unless said otherwise."""
    chosen = openmm_properties(platform) | (properties or {})
    return openmm.Context(system, integrator, openmm.Platform.getPlatformByName(platform), chosen)
