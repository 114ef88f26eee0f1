"""Flow steps: many chains on tensors, or one molecule with its frame, and what belongs to an accepted move."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor

from openmm_regflow.device import choose_way, write_positions
from openmm_regflow.errors import InputError
from openmm_regflow.proposals import FlowProposal, ProposalBatch
from openmm_regflow.rigid import random_rotations, rotate
from openmm_regflow.sampling.kernels import FlowStatistics, ProposalPool, flow_kernel, state_log_weight
from openmm_regflow.units import GAS_CONSTANT, positions_nm, temperature_kelvin

#: Reduced potential [kT] of a batch `(n, n_atoms, 3)` [nm] -> `(n,)`.
ReducedPotential = Callable[[Tensor], Tensor]
Orientation = Literal["random", "aligned"]
#: Energies of states that a step remembers to have tested, the last ones: those of a replica exchange.
MOST_TESTED = 64


@dataclass
class ChainResult:
    """A finished chain.

    Attributes:
        positions: kept configurations `(n_kept, n_chains, n_atoms, 3)` [nm], in the flow's frame.
        u: their reduced potentials `(n_kept, n_chains)` [kT].
        accepted: whether each step moved, bool `(n_steps, n_chains)`.
        statistics: totals over all steps.
    """

    positions: Tensor
    u: Tensor
    accepted: Tensor
    statistics: FlowStatistics = field(default_factory=FlowStatistics)


LocalKernel = Callable[[Tensor, torch.Generator], Tensor]


def run_chain(
    proposal: FlowProposal,
    positions: Any,
    n_steps: int,
    *,
    generator: torch.Generator,
    n_proposals: int = 1,
    local_kernel: LocalKernel | None = None,
    thin: int = 1,
    pool_size: int = 4096,
) -> ChainResult:
    """Many independent chains of flow steps, optionally with a local kernel before each.

    Args:
        proposal: flow, potential and temperature.
        positions: starting configurations `(n_chains, n_atoms, 3)` [nm].
        n_steps: flow steps per chain.
        generator: random state on the flow's device; draws, frames and decisions all come from it.
        n_proposals: 1 for independence Metropolis-Hastings, more for i-SIR.
        local_kernel: ``(positions, generator) -> positions``, a kernel that leaves ``exp(-u)`` invariant
            (dynamics, random-walk Metropolis).
        thin: keep every ``thin``-th step.
        pool_size: proposals drawn at a time.

    Returns:
        The chains after every ``thin`` steps.

    Raises:
        InputError: numbers below one, ``thin`` above ``n_steps``, positions that are not finite, or a proposal for a
            subset of atoms.
    """
    if n_proposals < 1 or n_steps < 1 or thin < 1:
        raise InputError(f"n_proposals={n_proposals}, n_steps={n_steps}, thin={thin}; each must be at least 1")
    if thin > n_steps:
        raise InputError(f"thin={thin} keeps none of {n_steps} steps; choose a smaller one")
    if proposal.atom_subset is not None:
        raise InputError(
            "run_chain covers whole molecules; the moves of a subset depend on its surroundings: use FlowStep, "
            "FlowMove or FlowSimulation"
        )
    start = proposal.as_tensor(positions).double()
    if not bool(torch.isfinite(start).all()):
        raise InputError("a starting configuration holds NaN or infinite positions; no chain leads away from there")
    pool = ProposalPool(proposal, pool_size, generator)
    state = proposal.evaluate(proposal.redraw_frame(start, generator))
    redraw = proposal.frame == "free" and not proposal.flow.rotation_invariant
    statistics, kept, accepted = FlowStatistics(), [], []
    for step in range(1, n_steps + 1):
        if local_kernel is not None:
            moved = local_kernel(state.positions, generator)
            state = proposal.evaluate(proposal.redraw_frame(moved, generator))
        elif redraw:
            turned = proposal.redraw_frame(state.positions, generator)
            state = ProposalBatch(turned, proposal.log_q(turned), state.u)
        drawn = pool.take(len(state.u) * n_proposals)
        batch = ProposalBatch(*(part.reshape(len(state.u), n_proposals, *part.shape[1:]) for part in drawn))
        state, info = flow_kernel(state, batch, generator)
        statistics.update(info)
        accepted.append(info.accepted)
        if step % thin == 0:
            kept.append(state)
    positions, _, u = (torch.stack(parts) for parts in zip(*kept))
    return ChainResult(positions, u, torch.stack(accepted), statistics)


class FlowStep:
    """Exact flow steps for one molecule: pool, auxiliary frame, kernel, placement and statistics in one.

    Args:
        proposal: flow, potential and temperature.
        n_proposals: 1 for independence Metropolis-Hastings, more for i-SIR.
        pool_size: proposals drawn at a time.
        generator: random state on the CPU.
        orientation: how an accepted free molecule is put back: turned at random, or superposed on the old one
            (both exact, the second is easier to look at).
        pool: a pool shared with other steps.

    Raises:
        InputError: fewer than one proposal, or an unknown orientation.
    """

    def __init__(
        self,
        proposal: FlowProposal,
        n_proposals: int = 1,
        pool_size: int = 256,
        generator: torch.Generator | None = None,
        orientation: Orientation = "random",
        pool: ProposalPool | None = None,
    ) -> None:
        if n_proposals < 1:
            raise InputError(f"n_proposals is {n_proposals}; at least one proposal per move is needed")
        if orientation not in ("random", "aligned"):
            raise InputError(f"orientation is {orientation!r}; choose 'random' or 'aligned'")
        self.proposal, self.n_proposals, self.orientation = proposal, n_proposals, orientation
        self.generator = generator if generator is not None else seeded_generator(None)
        self.pool = pool if pool is not None else new_pool(proposal, pool_size, self.generator)
        self.statistics = FlowStatistics()
        self._tested: deque[ReducedPotential] = deque(maxlen=MOST_TESTED)

    def __call__(
        self, positions: Any, temperature: Any = None, energy: ReducedPotential | None = None
    ) -> np.ndarray | None:
        """One flow step.

        Args:
            positions: current configuration `(n_atoms, 3)` [nm or Quantity].
            temperature: of the target [K or Quantity]; by default the proposal's. The pool's energies are scaled.
            energy: reduced potential of the target, used for the current state and the proposals alike; by
                default the proposal's potential. Give an equal one at every step: another is tested again.

        Returns:
            The new positions `(n_atoms, 3)` [nm], or None after a rejection.
        """
        new = self.propose(torch.as_tensor(positions_nm(positions)), temperature, energy)
        return None if new is None else new.cpu().numpy()

    def propose(
        self, positions: Tensor, temperature: Any = None, energy: ReducedPotential | None = None
    ) -> Tensor | None:
        """One flow step whose positions stay on the flow's device.

        Args:
            positions: current configuration `(n_atoms, 3)` [nm], on any device.
            temperature: as in a call.
            energy: as in a call.

        Returns:
            The new positions `(n_atoms, 3)` [nm] on the flow's device, or None after a rejection.

        Raises:
            InputError: an energy that changes when the molecule moves as a whole, in a free frame, or a state for whose
                numbering of hydrogens the flow has no place (tested once).
        """
        proposal = self.proposal
        current = proposal.as_tensor(positions[None])
        if not self.statistics.n_proposed:
            proposal.check_labels(current, "the state's positions")
        # Contexts compute in single precision, as other energies may.
        if energy is not None and energy not in self._tested:
            self._test(energy, current)
        framed = proposal.redraw_frame(current, self.generator)
        self.pool.heed(getattr(proposal.potential, "parameters", {}))
        drawn = self.pool.take(self.n_proposals, energies=energy is None)
        batch = drawn._replace(positions=proposal.in_place(drawn.positions, current))
        if energy is not None:
            u, batch = energy(current), batch._replace(u=energy(batch.positions).to(batch.u))
        else:
            ratio = 1.0 if temperature is None else proposal.temperature / temperature_kelvin(temperature)
            if proposal.atom_subset is not None:  # energies depend on the surroundings: none in the pool
                batch = batch._replace(u=proposal.reduced_potential(batch.positions))
            u, batch = proposal.reduced_potential(current) * ratio, batch.scaled(ratio)
        state = ProposalBatch(framed, proposal.log_q(framed), u.to(batch.u))
        new, info = flow_kernel(state, ProposalBatch(*(part.unsqueeze(0) for part in batch)), self.generator)
        self.statistics.update(info, None if proposal.atom_subset is None else state_log_weight(state))
        return self._place(new.positions[0], current[0]) if bool(info.accepted) else None

    def _test(self, energy: ReducedPotential, current: Tensor) -> None:
        """Refuse an energy that changes when the molecule moves as a whole; once for each that could tell."""
        if self.proposal.check_state_energy(energy, current, torch.float32):
            self._tested.append(energy)

    def _place(self, new: Tensor, old: Tensor) -> Tensor:
        """An accepted configuration in the place of the old one."""
        if self.proposal.frame == "fixed":
            return new
        return put_back(new, old, self.generator, self.masses, self.orientation)

    @cached_property
    def masses(self) -> np.ndarray | None:
        """Masses [dalton] of the proposal's System; asking OpenMM takes longer than the rest of an accepted step."""
        return None if self.proposal.system is None else system_masses(self.proposal.system)


def new_pool(proposal: FlowProposal, size: int, generator: torch.Generator) -> ProposalPool:
    """A pool with its own generator on the flow's device, seeded from ``generator``."""
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    return ProposalPool(proposal, size, torch.Generator(device=proposal.device).manual_seed(seed))


def seeded_generator(seed: int | None) -> torch.Generator:
    """A CPU generator from a seed, or from the operating system's entropy where it is None."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def put_back(
    new: Tensor,
    old: Tensor,
    generator: torch.Generator,
    masses: np.ndarray | None = None,
    orientation: Orientation = "random",
) -> Tensor:
    """A new shape at the old centre of mass, with a uniformly random orientation or superposed on the old
    shape.

    Args:
        new: `(n_atoms, 3)` [nm].
        old: `(n_atoms, 3)` [nm].
        generator: random state for the orientation.
        masses: [dalton] `(n_atoms,)`; equal by default.
        orientation: ``"random"`` or ``"aligned"``.
    """
    weights = torch.as_tensor(np.ones(len(old)) if masses is None else masses).to(old)
    weights = (weights / weights.sum()).unsqueeze(1)
    centre = (weights * old).sum(0)
    shape = new - (weights * new).sum(0)
    if orientation == "random":
        turn = random_rotations(1, generator, device=generator.device)
    else:
        turn = _superposition(shape, old - centre, weights).unsqueeze(0)
    return rotate(shape.unsqueeze(0), turn)[0] + centre


def _superposition(mobile: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Rotation that superposes centred ``mobile`` on centred ``target`` (Kabsch, Acta Cryst. A 32, 922
    (1976))."""
    left, _, right = torch.linalg.svd((weights * target).T @ mobile)
    proper = torch.ones(3, dtype=mobile.dtype, device=mobile.device)
    proper[2] = torch.det(left) * torch.det(right)
    return left @ torch.diag(proper) @ right


def system_masses(system: openmm.System) -> np.ndarray:
    """Particle masses [dalton] `(n_atoms,)`."""
    masses = [system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(system.getNumParticles())]
    return np.array(masses)


def maxwell_boltzmann(masses: np.ndarray, temperature: float, generator: torch.Generator) -> np.ndarray:
    """Velocities [nm/ps] `(n_atoms, 3)` at ``temperature`` [K]; massless particles rest."""
    inverse = np.divide(1.0, masses, out=np.zeros_like(masses), where=masses > 0)
    normal = torch.randn(len(masses), 3, generator=generator, dtype=torch.float64, device=generator.device)
    return normal.cpu().numpy() * np.sqrt(GAS_CONSTANT * temperature * inverse)[:, None]


def redrawn(
    velocities: np.ndarray | None,
    masses: np.ndarray,
    subset: Sequence[int] | None,
    temperature: float,
    generator: torch.Generator,
) -> np.ndarray:
    """Velocities with those of a subset (None: all atoms) drawn from Maxwell-Boltzmann, the others kept [nm/ps]."""
    fresh = maxwell_boltzmann(masses, temperature, generator)
    if subset is None or velocities is None:
        return fresh
    kept = np.array(velocities)
    kept[list(subset)] = fresh[list(subset)]
    return kept


@dataclass(frozen=True)
class ContextPotential:
    """The Context's own energy as a reduced potential; overwrites the Context's positions.

    Equal ones are the same function, so that `FlowStep` tests it once for each set of the Context's parameters.

    Attributes:
        context: any platform, with positions; its parameters and box stay as they are.
        kT: [kJ/mol].
        parameters: of the Context when this was made.
    """

    context: openmm.Context
    kT: float
    parameters: dict[str, float]

    def __call__(self, positions: Tensor) -> Tensor:
        """Reduced energies `(n,)` of `(n, n_atoms, 3)` [nm]."""
        context, device = self.context, positions.device
        direct = travels_directly(device, context) and choose_way(context, device).way == "native"
        # By the host, one copy of all is quicker than one of each.
        configurations = positions if direct else positions.cpu().numpy()
        energies = [_context_energy(context, x) / self.kT for x in configurations]
        return torch.tensor(energies, dtype=torch.float64)


def context_potential(context: openmm.Context, kT: float) -> ContextPotential:
    """The energy of a Context with the parameters that it has now, at kT [kJ/mol]."""
    return ContextPotential(context, kT, dict(context.getParameters()))


def travels_directly(device: torch.device, context: openmm.Context) -> bool:
    """Whether positions may go between a Context and a device as they are: a GPU's, with no box to honour."""
    return device.type == "cuda" and not context.getSystem().usesPeriodicBoundaryConditions()


def _context_energy(context: openmm.Context, positions: np.ndarray | Tensor) -> float:
    """Potential energy [kJ/mol]; NaN where OpenMM refuses the configuration."""
    finite = torch.isfinite(positions).all() if isinstance(positions, Tensor) else np.isfinite(positions).all()
    if not bool(finite):
        return math.nan
    try:
        if isinstance(positions, Tensor):
            write_positions(context, positions)
        else:
            context.setPositions(positions)
        groups = context.getIntegrator().getIntegrationForceGroups()  # a force that only is watched moves nothing
        energy = context.getState(getEnergy=True, groups=groups).getPotentialEnergy()
    except openmm.OpenMMException:
        return math.nan
    return float(energy.value_in_unit(unit.kilojoule_per_mole))
