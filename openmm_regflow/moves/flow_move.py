"""``FlowMove``: independence Metropolis-Hastings and i-SIR with flow proposals, as an openmmtools ``MCMCMove``."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import openmm
import torch
from openmm import unit

from openmm_regflow.errors import CorruptFileError, IncompatibleFlowError, InputError, UnsupportedForceError
from openmm_regflow.moves.registry import Description, Shared, describe, find, living, register, steps_so_far
from openmm_regflow.proposals import FlowProposal
from openmm_regflow.sampling import (
    FlowStatistics,
    FlowStep,
    Orientation,
    ReducedPotential,
    context_potential,
    redrawn,
    system_masses,
)
from openmm_regflow.units import thermal_energy

#: Layout of the stored dictionary; raised when entries change their meaning.
FORMAT_VERSION = 1
#: Sections of that dictionary and the entries that each must have.
_LAYOUT = {
    "proposal": tuple(name for name in Description.__dataclass_fields__ if name != "identity"),
    "settings": ("n_proposals", "orientation", "energy"),
    "statistics": tuple(FlowStatistics.__dataclass_fields__),
}


class FlowMove:
    """An exact flow move for openmmtools samplers.

    openmmtools recognises moves by their ``apply`` method (``isinstance(move, MCMCMove)`` is true), so importing this
    class does not import openmmtools.

    Exactness: one and the same energy stands on both sides of the accept step. It is the proposal's potential where
    that is the state's whole energy (same System, no global parameters; other temperatures scale the pool), and the
    Context's own energy in every other case or with ``energy="context"``. The state's frame is handled as
    :mod:`openmm_regflow.sampling` says; after an acceptance the velocities are drawn from Maxwell-Boltzmann at the
    state's temperature, after a rejection nothing changes. A NaN proposal is a counted rejection.

    Copies (one per thermodynamic state) share flow, potential, pool and random state within a process, so no draw is
    used twice. Stored are the path and SHA-256 of the flow file, the settings and the statistics.

    Args:
        proposal: flow, potential and temperature.
        n_proposals: 1 for independence Metropolis-Hastings, more for iterated sampling-importance-resampling.
        pool_size: proposals drawn in one batch and handed out one by one.
        flow_path: file of the flow; needed for anything that is stored or copied, that is, for every multistate
            sampler. By default the file that the flow was loaded from or saved to, as long as it holds these weights.
        orientation: ``"random"`` or ``"aligned"``: how an accepted molecule is put back.
        energy: ``"auto"``, or ``"context"`` for the Context's energy in any case.
        seed: of flow draws and decisions; None takes one from NumPy's global state, which openmmtools uses too, so
            that every move draws its own. With one seed, moves with other flows, atoms or temperatures draw
            independently; moves that share all of these draw alike, so give each its own seed.

    Raises:
        InputError: bad numbers, or no file at ``flow_path``.
        IncompatibleFlowError: ``flow_path`` holds another flow.

    Example:
        >>> langevin = mcmc.LangevinDynamicsMove(n_steps=500)                        # doctest: +SKIP
        >>> move = mcmc.SequenceMove([langevin, FlowMove(proposal, flow_path=path)])  # doctest: +SKIP
    """

    # Storage files name this public module, wherever in the package the code lies.
    __module__ = "openmm_regflow.moves"

    def __init__(
        self,
        proposal: FlowProposal,
        n_proposals: int = 1,
        pool_size: int = 256,
        *,
        flow_path: str | Path | None = None,
        orientation: Orientation = "random",
        energy: Literal["auto", "context"] = "auto",
        seed: int | None = None,
    ) -> None:
        if energy not in ("auto", "context"):
            raise InputError(f"energy is {energy!r}; choose 'auto' or 'context'")
        self.n_proposals, self.orientation, self.energy = n_proposals, orientation, energy
        self._statistics = FlowStatistics()
        self._description = describe(proposal, pool_size, flow_path, seed)
        self._step: FlowStep | None = None
        self._reference: Any = None
        self._checked: Any = None
        self._n_steps = 0
        self._shared: Shared | None = None
        self._bind(register(self._description, proposal))

    def apply(self, thermodynamic_state: Any, sampler_state: Any, context_cache: Any = None) -> None:
        """One flow step at a thermodynamic state.

        Args:
            thermodynamic_state: openmmtools ``ThermodynamicState`` or compound state; not changed. Constant pressure
                and a box need a :class:`openmm_regflow.proposals.SubsetProposal`.
            sampler_state: openmmtools ``SamplerState``; positions and velocities change after an acceptance. Plain
                numbers in it are nm and nm/ps, as for openmmtools' own dynamics.
            context_cache: openmmtools ``ContextCache``; the global one by default. Used for Context energies alone.

        Raises:
            UnsupportedForceError: constant pressure or a periodic box (except for a subset), virtual sites, or
                constraints that the flow does not hold fixed.
            IncompatibleFlowError: another number of atoms, or a flow of another System.
            InputError: the flow file of a restored move is gone, or the state's energy changes when the molecule moves
                as a whole, which the proposal's own does not (an external field, a restraint to a place).
        """
        step = self._loaded(thermodynamic_state)
        if step.proposal.atom_subset is None:
            _refuse(thermodynamic_state)
        check_atom_count(sampler_state, step.proposal)
        temperature = thermodynamic_state.temperature.value_in_unit(unit.kelvin)
        energy, system = self._energy(thermodynamic_state, sampler_state, context_cache)
        positions = numbers_in(sampler_state.positions, unit.nanometer)
        positions = step.proposal.make_whole(positions, box_of(thermodynamic_state, sampler_state))
        new = step(positions, temperature, energy)
        if new is not None:
            self._accept(sampler_state, new, system, temperature)

    def _accept(self, sampler_state: Any, new: np.ndarray, system: openmm.System, temperature: float) -> None:
        """New positions, and fresh velocities for the atoms that moved."""
        step, speed = self._step, unit.nanometer / unit.picosecond
        old = None if sampler_state.velocities is None else numbers_in(sampler_state.velocities, speed)
        subset = step.proposal.atom_subset  # type: ignore[union-attr]
        own = system is step.proposal.system  # type: ignore[union-attr]
        masses = step.masses if own else system_masses(system)  # type: ignore[union-attr]
        velocities = redrawn(old, masses, subset, temperature, step.generator)  # type: ignore[union-attr, arg-type]
        velocities = step.proposal.project_velocities(velocities, new)  # type: ignore[union-attr]
        sampler_state.positions = unit.Quantity(new, unit.nanometer)
        sampler_state.velocities = unit.Quantity(velocities, speed)

    @property
    def flow_path(self) -> str | None:
        """Absolute path of the flow file, None for a flow that was never saved."""
        return self._description.flow_path

    @property
    def flow_sha256(self) -> str:
        """SHA-256 of the flow file."""
        return self._description.flow_sha256

    @property
    def device(self) -> torch.device:
        """Device of the flow; of a restored move before its first step, the one that it was stored with."""
        return torch.device(self._description.device) if self._step is None else self._step.proposal.device

    @property
    def n_proposed(self) -> int:
        """Moves attempted."""
        return self._statistics.n_proposed

    @n_proposed.setter
    def n_proposed(self, value: int) -> None:
        self._statistics.n_proposed = int(value)

    @property
    def n_accepted(self) -> int:
        """Moves that changed the state."""
        return self._statistics.n_accepted

    @n_accepted.setter
    def n_accepted(self, value: int) -> None:
        self._statistics.n_accepted = int(value)

    @property
    def fraction_accepted(self) -> float:
        """Accepted over attempted moves; NaN before the first."""
        return self._statistics.acceptance_rate

    def reset_statistics(self) -> None:
        """Start all totals from zero, as openmmtools' own moves do."""
        self.statistics = FlowStatistics().as_dict()

    @property
    def statistics(self) -> dict[str, float]:
        """Totals in openmmtools' style: ``n_proposed``, ``n_accepted``, proposals, log-weights, ESS so far."""
        return self._statistics.as_dict()

    @statistics.setter
    def statistics(self, value: dict[str, float]) -> None:
        self._statistics = FlowStatistics.from_dict(value)
        if self._step is not None:
            self._step.statistics = self._statistics

    def __getstate__(self, **kwargs: Any) -> dict[str, Any]:
        if self._description.flow_path is None:
            raise InputError(
                "this FlowMove is being copied or stored, but its flow was never saved; call flow.save(path) and "
                "give FlowMove(..., flow_path=path)"
            )
        settings = {name: getattr(self, name) for name in _LAYOUT["settings"]}
        return {
            "format_version": FORMAT_VERSION,
            "proposal": dict(vars(self._description)),
            # Under MPI rank 0 stores, and may not have made a step of its own; totals come from all ranks.
            "n_steps": max(steps_so_far(self._description, self._n_steps), self.n_proposed),
            "settings": settings,
            "statistics": self.statistics,
        }

    def __setstate__(self, serialization: dict[str, Any]) -> None:
        # openmmtools turns a KeyError here into a warning and goes on with half a move; so every entry is checked.
        for section, needed in _LAYOUT.items():
            if missing := sorted(set(needed) - set(serialization.get(section, ()))):
                raise CorruptFileError(
                    f"a stored FlowMove lacks {', '.join(missing)} in {section}; the storage file is damaged"
                )
        if serialization.get("format_version", 0) > FORMAT_VERSION:
            raise CorruptFileError(
                f"a stored FlowMove has format {serialization['format_version']}, newer than {FORMAT_VERSION}; "
                "update openmm_regflow"
            )
        known = Description.__dataclass_fields__
        self._description = Description(**{k: v for k, v in serialization["proposal"].items() if k in known})
        for name in _LAYOUT["settings"]:
            setattr(self, name, serialization["settings"][name])
        self._statistics = FlowStatistics.from_dict(serialization["statistics"])
        self._n_steps = int(serialization.get("n_steps", 0))
        self._step, self._reference, self._checked = None, None, None
        self._shared = living(self._description)  # held from now on: the move that was copied may go

    def __str__(self) -> str:
        return f"FlowMove(n_proposals={self.n_proposals}, flow_path={self.flow_path!r})"

    def _bind(self, shared: Shared) -> None:
        """Use what the copies share, with this copy's own statistics."""
        self._shared = shared
        size = self._description.pool_size
        self._step = FlowStep(
            shared.proposal, self.n_proposals, size, shared.generator, self.orientation, shared.pool
        )
        self._step.statistics = self._statistics

    def _loaded(self, thermodynamic_state: Any) -> FlowStep:
        """The step that is about to be taken, with the flow loaded on first use after a restart."""
        if self._step is None:
            system = thermodynamic_state.get_system(remove_thermostat=True, remove_barostat=True)
            self._description, shared = find(self._description, system, self._n_steps)
            self._bind(shared)
        if self._shared is not None:
            self._shared.n_steps += 1
        return self._step  # type: ignore[return-value]

    def _energy(
        self, thermodynamic_state: Any, sampler_state: Any, context_cache: Any
    ) -> tuple[ReducedPotential | None, openmm.System]:
        """Which energy decides (None: the proposal's own), and the System whose masses count."""
        proposal = self._step.proposal  # type: ignore[union-attr]
        if self.energy == "auto" and self._is_reference(thermodynamic_state, proposal):
            return None, proposal.system
        from openmmtools import cache

        contexts = cache.global_context_cache if context_cache is None else context_cache
        context, _ = contexts.get_context(thermodynamic_state)
        if context is not self._checked:
            proposal.check_state_system(context.getSystem())
            self._checked = context
        sampler_state.apply_to_context(context, ignore_velocities=True)
        if (box := box_of(thermodynamic_state, sampler_state)) is not None:  # one without would find another's
            context.setPeriodicBoxVectors(*box)
        return context_potential(context, thermal_energy(thermodynamic_state.temperature)), context.getSystem()

    def _is_reference(self, thermodynamic_state: Any, proposal: FlowProposal) -> bool:
        """Whether the proposal's potential is the whole energy of this state."""
        from openmmtools import states

        if not proposal.covers_system or thermodynamic_state.is_periodic:
            return False
        if isinstance(thermodynamic_state, states.CompoundThermodynamicState):
            return False
        if self._reference is None:
            self._reference = states.ThermodynamicState(proposal.system, proposal.temperature * unit.kelvin)
        return bool(self._reference.is_state_compatible(thermodynamic_state))


def check_atom_count(sampler_state: Any, proposal: FlowProposal) -> None:
    """Refuse a configuration of another number of atoms.

    Raises:
        IncompatibleFlowError: naming both numbers.
    """
    if sampler_state.n_particles != proposal.n_atoms:
        raise IncompatibleFlowError(
            f"the sampler state has {sampler_state.n_particles} atoms, the proposal is for {proposal.n_atoms}; use the "
            "flow, and the subset, of this System"
        )


def box_of(thermodynamic_state: Any, sampler_state: Any) -> np.ndarray | None:
    """Box vectors `(3, 3)` [nm] of a configuration, the System's own where it has none; None without a box."""
    if not thermodynamic_state.is_periodic:
        return None
    vectors = sampler_state.box_vectors
    if vectors is None:  # the System's own are a list of Quantities
        return np.array([v.value_in_unit(unit.nanometer) for v in thermodynamic_state.default_box_vectors])
    return numbers_in(vectors, unit.nanometer)


def numbers_in(quantity: Any, of: unit.Unit) -> np.ndarray:
    """Numbers of a Quantity in a unit of OpenMM's own (nm, nm/ps).

    A ``SamplerState`` keeps plain numbers as a Quantity without dimension, which its Contexts take in these units.
    """
    return np.asarray(quantity.value_in_unit(unit.dimensionless if quantity.unit.is_dimensionless() else of))


def _refuse(thermodynamic_state: Any) -> None:
    """Refuse ensembles that the move does not cover.

    Raises:
        UnsupportedForceError: constant pressure or a periodic box, with the remedy.
    """
    if thermodynamic_state.pressure is not None:
        raise UnsupportedForceError(
            f"the state is at constant pressure ({thermodynamic_state.pressure}); flow moves cover constant volume "
            "without a box: use a ThermodynamicState without pressure"
        )
    if thermodynamic_state.is_periodic:
        raise UnsupportedForceError(
            "the state's System is periodic; build it with nonbondedMethod=NoCutoff or CutoffNonPeriodic"
        )
