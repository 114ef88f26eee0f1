"""``NCMCFlowMove``: a flow proposal in solvent, with the solvent given time to make room.

Nonequilibrium candidate Monte Carlo (Nilmeier, Crooks, Minh and Chodera, PNAS 108, E1009 (2011)): the subset is driven
from its conformation to the one that the flow proposes, in small steps between which the surroundings relax by
dynamics; the total work decides.
"""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor

from openmm_regflow.device import openmm_properties
from openmm_regflow.errors import CorruptFileError, InputError, UnsupportedForceError
from openmm_regflow.moves.flow_move import FlowMove, box_of, check_atom_count, numbers_in
from openmm_regflow.proposals import SubsetProposal
from openmm_regflow.refusals import virtual_sites
from openmm_regflow.sampling import KernelInfo, redrawn, system_masses
from openmm_regflow.units import thermal_energy, time_step, to_float

_SETTINGS = ("n_steps", "steps_per_drive", "timestep", "collision_rate")


class NCMCFlowMove(FlowMove):
    """A flow move of an atom subset along a path, its surroundings relaxing, for openmmtools samplers.

    The flow proposes the subset's internal coordinates. The subset is led there straight in bonds, angles and torsions
    (the shorter way round), in the frame that three of its atoms keep, while Langevin dynamics move everything else.
    What the subset's own energy does on the way is of no account, since work that depends on the subset alone adds up
    to the difference of its ends; what costs acceptance is the friction of the surroundings.

    Exactness. The path from x to y is the path from y to x walked backwards, the dynamics are palindromic (splitting
    ``O V R V O``, as many steps before the first drive as after the last) and start from fresh velocities, so the ratio
    of path probabilities is ``exp(-W/kT)`` with the work W of the drives and the shadow work of the dynamics, and

        ``log alpha = log q(x) - log q(y) - W/kT``.

    After an acceptance all velocities are drawn anew: those at the end of the protocol had a part in the decision.
    After a rejection the old positions and velocities stay; the old velocities had none.

    The box does not change during a move, so states of constant pressure are covered; bonds of fixed length in the
    subset are, if the flow holds them fixed (their length is the same all along the path).

    Args:
        proposal: of the subset that is switched. Its potential is not used.
        n_steps: dynamics steps of a whole protocol, a multiple of ``steps_per_drive`` and at least twice that.
        timestep: [ps or Quantity]; the surroundings alone move, so rigid water allows 0.002 and more.
        collision_rate: [1/ps or Quantity].
        pool_size: see :class:`FlowMove`.
        steps_per_drive: dynamics steps between two drives. Each drive costs one more evaluation of the energy.
        flow_path: see :class:`FlowMove`.
        seed: see :class:`FlowMove`.

    Attributes:
        timestep: a Quantity, as is ``collision_rate``: openmmtools' samplers count the time of every move that has one.
        last_work: what the log acceptance ratio of the latest move was made of, ``{"density", "protocol", "shadow"}``
            [kT], minus their sum: ``log q(y) - log q(x)``, the work of the drives (the change of the subset's own
            energy included), and the integrator's. NaN after a protocol that blew up.

    Raises:
        InputError: not a subset proposal, or a number of steps that does not fit ``steps_per_drive``.
    """

    __module__ = "openmm_regflow.moves"

    def __init__(
        self,
        proposal: SubsetProposal,
        n_steps: int = 2500,
        timestep: Any = 0.002,
        collision_rate: Any = 1.0,
        pool_size: int = 256,
        *,
        steps_per_drive: int = 5,
        flow_path: str | Path | None = None,
        seed: int | None = None,
    ) -> None:
        if proposal.atom_subset is None:
            raise InputError("NCMCFlowMove switches a part of a System; give it a SubsetProposal")
        if n_steps != int(n_steps) or steps_per_drive < 1 or n_steps < 2 * steps_per_drive or n_steps % steps_per_drive:
            raise InputError(
                f"{n_steps} steps cannot be split into two or more blocks of {steps_per_drive}; choose n_steps as a "
                "multiple of steps_per_drive"
            )
        super().__init__(proposal, 1, pool_size, flow_path=flow_path, energy="context", seed=seed)
        self.n_steps, self.steps_per_drive = int(n_steps), steps_per_drive
        self.timestep = time_step(timestep) * unit.picosecond
        self.collision_rate = to_float(collision_rate, "rate") / unit.picosecond
        if not self.collision_rate > 0.0 / unit.picosecond:
            raise InputError(f"collision_rate is {self.collision_rate}; a positive one is needed")
        self.last_work = _unknown_work()
        self._switched: Any = None

    def apply(self, thermodynamic_state: Any, sampler_state: Any, context_cache: Any = None) -> None:
        """One switching protocol at a thermodynamic state.

        Raises:
            UnsupportedForceError: virtual sites, or constraints there that the flow does not hold fixed.
            InputError: a flow file that is gone.
        """
        step = self._loaded(thermodynamic_state)
        check_atom_count(sampler_state, step.proposal)
        energy, system = self._energy(thermodynamic_state, sampler_state, context_cache)
        positions = numbers_in(sampler_state.positions, unit.nanometer)
        box = box_of(thermodynamic_state, sampler_state)
        positions = step.proposal.make_whole(positions, box)
        context = self._context(thermodynamic_state, context_cache)
        if box is not None:
            context.setPeriodicBoxVectors(*box)
        # Compatible states need not share them, as they need not share their temperature.
        for name, value in getattr(energy, "parameters", {}).items():
            if name in context.getParameters():
                context.setParameter(name, value)
        new, log_ratio = self._protocol(context, positions, energy, thermodynamic_state)
        if self._decide(log_ratio):
            velocities = self._drawn_velocities(context, system_masses(system), thermodynamic_state)
            velocities = step.proposal.project_velocities(velocities, new)
            sampler_state.positions = unit.Quantity(new, unit.nanometer)
            sampler_state.velocities = unit.Quantity(velocities, unit.nanometer / unit.picosecond)

    def __getstate__(self, **kwargs: Any) -> dict[str, Any]:
        numbers = {
            "timestep": to_float(self.timestep, "time"), "collision_rate": to_float(self.collision_rate, "rate")
        }  # fmt: skip
        settings = {name: getattr(self, name) for name in _SETTINGS} | numbers
        return super().__getstate__(**kwargs) | {"ncmc": settings}

    def __setstate__(self, serialization: dict[str, Any]) -> None:
        super().__setstate__(serialization)
        settings = serialization.get("ncmc", {})
        if missing := sorted(set(_SETTINGS) - set(settings)):
            raise CorruptFileError(f"a stored NCMCFlowMove lacks {', '.join(missing)}; the storage file is damaged")
        for name in _SETTINGS:
            setattr(self, name, settings[name])
        self.timestep *= unit.picosecond
        self.collision_rate /= unit.picosecond
        self.last_work, self._switched = _unknown_work(), None

    def _decide(self, log_ratio: float) -> bool:
        """Metropolis decision; anything that is not a number is a counted rejection."""
        step = self._step
        draw = float(torch.rand(1, generator=step.generator, dtype=torch.float64))  # type: ignore[union-attr]
        possible = math.isfinite(log_ratio)
        accepted = possible and (log_ratio >= 0 or draw < math.exp(log_ratio))
        log_weight = torch.tensor([[log_ratio if possible else -math.inf]], dtype=torch.float64)
        flags = torch.tensor([accepted]), torch.tensor([0 if accepted else -1])
        outside = torch.tensor([False])
        info = KernelInfo(*flags, log_weight.squeeze(0).exp().clamp(max=1), log_weight, outside)
        self._statistics.update(info, torch.zeros(1))  # the ratio is by the current state as it is
        return accepted

    def _protocol(
        self, context: openmm.Context, positions: np.ndarray, energy: Any, state: Any
    ) -> tuple[np.ndarray, float]:
        """Propose and drive there: final positions, at which the Context is left, and the log acceptance ratio."""
        kT, integrator = thermal_energy(state.temperature), context.getIntegrator()
        self.last_work = _unknown_work()
        try:
            x = torch.as_tensor(np.array(positions))[None]
            path, density = self._proposed(x)
            context.setPositions(positions)
            integrator.reset()
            self._drawn_velocities(context, system_masses(context.getSystem()), state)
            # Zero, but for rounding between two Contexts; at both ends the state's own decides.
            log_ratio = float(energy(x)) - _energy_of(context) / kT
            integrator.step(self.steps_per_drive)
            new, subset = _positions_of(context), self._step.proposal.atom_subset  # type: ignore[union-attr]
            for conformation in path.numpy():
                new[subset] = conformation
                context.setPositions(new)
                integrator.step(self.steps_per_drive)
                new = _positions_of(context)
            self.last_work = {
                "density": density,
                "protocol": float(integrator.get_protocol_work(dimensionless=True)),
                "shadow": float(integrator.get_shadow_work(dimensionless=True)),
            }
            log_ratio += _energy_of(context) / kT - float(energy(torch.as_tensor(new)[None]))
            return new, log_ratio - sum(self.last_work.values())
        except openmm.OpenMMException:  # a protocol that blew up: NaN coordinates
            return positions, math.nan

    def _proposed(self, x: Tensor) -> tuple[Tensor, float]:
        """Conformations of the subset on the way to a fresh proposal, and ``log q(y) - log q(x)``."""
        step: Any = self._step
        proposal: SubsetProposal = step.proposal
        drawn = step.pool.take(1, energies=False)
        n_drives = self.n_steps // self.steps_per_drive - 1
        share = torch.linspace(0, 1, n_drives + 1, dtype=torch.float64, device=proposal.device)[1:]
        x = proposal.as_tensor(x)
        own, proposed = x[0, proposal.atom_subset], drawn.positions[0].double()
        path = proposal.flow.coordinates.between(own, proposed, share)
        return proposal.in_frame(path, x).cpu(), float(drawn.log_q[0] - proposal.log_q(x)[0])

    def _drawn_velocities(self, context: openmm.Context, masses: np.ndarray, state: Any) -> np.ndarray:
        """Maxwell-Boltzmann velocities `(n_atoms, 3)` [nm/ps] without components along the Context's constraints.

        The Context is left with them.
        """
        temperature, speed = state.temperature.value_in_unit(unit.kelvin), unit.nanometer / unit.picosecond
        drawn = redrawn(None, masses, None, temperature, self._step.generator)  # type: ignore[union-attr]
        context.setVelocities(drawn)
        context.applyVelocityConstraints(1e-8)
        kept = context.getState(getVelocities=True).getVelocities(asNumpy=True).value_in_unit(speed)
        return np.array(kept)

    def _context(self, thermodynamic_state: Any, context_cache: Any) -> openmm.Context:
        """The Context of this state in which the subset stands still, built on first use."""
        from openmmtools import cache, integrators

        if self._switched is None or not self._switched[0].is_state_compatible(thermodynamic_state):
            system = thermodynamic_state.get_system(remove_thermostat=True, remove_barostat=True)
            sites = virtual_sites(system)
            if sites:
                raise UnsupportedForceError(
                    f"the System has {len(sites)} virtual sites (four-point water has them); the switching integrator "
                    "takes forces before it has moved them, so that the work is not that of the dynamics; use water "
                    "without them, or FlowMove on the subset"
                )
            frozen = frozen_system(system, self._step.proposal.atom_subset)  # type: ignore[union-attr, arg-type]
            contexts = cache.global_context_cache if context_cache is None else context_cache
            integrator = integrators.ExternalPerturbationLangevinIntegrator(
                splitting="O V R V O",
                temperature=thermodynamic_state.temperature,
                collision_rate=self.collision_rate,
                timestep=self.timestep,
                measure_shadow_work=True,
            )
            chosen: tuple[Any, ...] = ()
            if contexts.platform is not None:
                own = getattr(contexts, "_platform_properties", None) or {}  # as the state's other Contexts have them
                chosen = contexts.platform, openmm_properties(contexts.platform.getName(), self.device) | own
            context = openmm.Context(frozen, integrator, *chosen)
            self._switched = (copy.deepcopy(thermodynamic_state), context, integrator)
        self._switched[2].setTemperature(thermodynamic_state.temperature)  # which compatible states need not share
        return self._switched[1]


def _unknown_work() -> dict[str, float]:
    return dict.fromkeys(("density", "protocol", "shadow"), math.nan)


def _energy_of(context: openmm.Context) -> float:
    """Potential energy [kJ/mol] of a Context as it is."""
    return float(context.getState(getEnergy=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))


def _positions_of(context: openmm.Context) -> np.ndarray:
    """Positions `(n_atoms, 3)` [nm] of a Context, a copy."""
    positions = context.getState(getPositions=True).getPositions(asNumpy=True)
    return np.array(positions.value_in_unit(unit.nanometer))


def frozen_system(system: openmm.System, subset: list[int]) -> openmm.System:
    """A copy of the System in which a subset stands still: without mass and without constraints of its own.

    A CMMotionRemover is left out, since no work accounts for its changes of velocities.
    """
    frozen = copy.deepcopy(system)
    moved = set(subset)
    for k in reversed(range(frozen.getNumConstraints())):
        i, j, _ = frozen.getConstraintParameters(k)
        if i in moved and j in moved:
            frozen.removeConstraint(k)
    for atom in moved:
        frozen.setParticleMass(atom, 0.0)
    for k in reversed(range(frozen.getNumForces())):
        if isinstance(frozen.getForce(k), openmm.CMMotionRemover):
            frozen.removeForce(k)
    return frozen
