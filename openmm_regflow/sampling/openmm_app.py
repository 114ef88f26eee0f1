"""Flow steps for those who drive ``openmm.app`` themselves: Simulation, Reporter, OpenMM's own replica exchange."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from openmm import app, unit
from torch import Tensor

from openmm_regflow.device import read_positions, write_positions
from openmm_regflow.errors import InputError
from openmm_regflow.fingerprints import fingerprint
from openmm_regflow.proposals import FlowProposal
from openmm_regflow.ranks import seed_of
from openmm_regflow.refusals import has_global_parameters
from openmm_regflow.sampling.kernels import FlowStatistics
from openmm_regflow.sampling.steps import (
    FlowStep,
    Orientation,
    context_potential,
    new_pool,
    redrawn,
    seeded_generator,
    system_masses,
    travels_directly,
)
from openmm_regflow.units import GAS_CONSTANT, temperature_kelvin

#: Masks of force groups that leave none out.
ALL_GROUPS = (-1, 0xFFFFFFFF)
#: By how much [kJ/mol], and by which part, one energy in single precision may be off.
SAME_ENERGY, ROUNDING = 0.1, 1e-5


class FlowSimulation:
    """Flow steps between the dynamics of an ``openmm.app.Simulation``.

    Each flow step targets the Simulation's own temperature. Energies come from the proposal's potential where
    its System is that of the Simulation, from the Simulation's Context otherwise. Box, parameters, time and
    step count stay untouched; velocities are redrawn after an acceptance.

    Args:
        simulation: positions set; any integrator with a temperature (else the proposal's temperature is
            taken).
        proposal: flow, potential and temperature.
        n_proposals: 1 for independence Metropolis-Hastings, more for i-SIR.
        pool_size: proposals drawn at a time.
        seed: None for a random one.
        orientation: see :class:`FlowStep`.

    Raises:
        UnsupportedForceError: virtual sites, a periodic box, or constraints that the flow does not hold fixed.
        IncompatibleFlowError: the flow belongs to another System (further forces, such as a bias, do not matter).
        InputError: the flow generates another number of atoms, or the energy changes when the molecule moves as a
            whole, which the proposal's own does not (an external field, a restraint to a place).
    """

    def __init__(
        self,
        simulation: app.Simulation,
        proposal: FlowProposal,
        n_proposals: int = 1,
        pool_size: int = 256,
        seed: int | None = None,
        orientation: Orientation = "random",
    ) -> None:
        proposal.check_state_system(simulation.system)
        if simulation.system.getNumParticles() != proposal.n_atoms:
            raise InputError(
                f"the Simulation has {simulation.system.getNumParticles()} atoms, the proposal "
                f"{proposal.n_atoms}; use the flow of this molecule"
            )
        self.simulation = simulation
        self.step = FlowStep(proposal, n_proposals, pool_size, seeded_generator(seed), orientation)
        self._seed, self._begun = seed, False
        self._masses = system_masses(simulation.system)
        self._direct = travels_directly(proposal.device, simulation.context)
        self._same_energy = (
            proposal.covers_system
            and not simulation.system.usesPeriodicBoundaryConditions()
            and not has_global_parameters(simulation.system)
            and simulation.integrator.getIntegrationForceGroups() in ALL_GROUPS
        )

    @property
    def statistics(self) -> FlowStatistics:
        """Totals of the flow steps."""
        return self.step.statistics

    @property
    def temperature(self) -> float:
        """Temperature of the dynamics [K]: the integrator's, the thermostat's, else the proposal's."""
        integrator = self.simulation.integrator
        if isinstance(integrator, openmm.CompoundIntegrator):
            integrator = integrator.getIntegrator(integrator.getCurrentIntegrator())
        if hasattr(integrator, "getTemperature"):
            return temperature_kelvin(integrator.getTemperature())
        if isinstance(integrator, openmm.CustomIntegrator):
            count = integrator.getNumGlobalVariables()
            found = {name: k for k, name in enumerate(map(integrator.getGlobalVariableName, range(count)))}
            if "temperature" in found:
                return float(integrator.getGlobalVariable(found["temperature"]))
            if "kT" in found:
                return float(integrator.getGlobalVariable(found["kT"])) / GAS_CONSTANT
        parameters = dict(self.simulation.context.getParameters())
        thermostat = parameters.get(openmm.AndersenThermostat.Temperature(), self.step.proposal.temperature)
        return temperature_kelvin(thermostat)

    def begin(self, stage: int | None = None) -> None:
        """Make sure, before steps are taken, of what may have changed since the last ones.

        The seed is that of a stretch of dynamics: one that goes on from a checkpoint proposes anew. And forces whose
        parameters were changed in the Context have energies that are only the Context's.

        Args:
            stage: how far the run is; by default the Context's count of steps, which checkpoints bring back.
        """
        if not self._begun and self._seed is not None:
            stage = self.simulation.context.getStepCount() if stage is None else stage
            self.step.generator.manual_seed(seed_of(self._seed, *self.step.proposal.stream, stage))
            self.step.pool = new_pool(self.step.proposal, self.step.pool.size, self.step.generator)
        self._begun = True
        self._same_energy = self._same_energy and self._is_own_system() and self._agrees()

    def _is_own_system(self) -> bool:
        """Whether the System reads as the proposal's does; `updateParametersInContext` brings what it holds."""
        return fingerprint(self.step.proposal.system)["sha256"] == fingerprint(self.simulation.system)["sha256"]

    def _agrees(self) -> bool:
        """Whether the Context has the energy of the proposal's potential where it is; where neither is finite, yes."""
        context, proposal = self.simulation.context, self.step.proposal
        if proposal.atom_subset is not None:
            return True
        own = float(proposal.potential(proposal.as_tensor(self._read()[None])))
        there = context.getState(getEnergy=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        difference = abs(own - there)
        return not np.isfinite(difference) or difference < SAME_ENERGY + ROUNDING * abs(there)

    def flow_step(self, temperature: float | None = None) -> bool:
        """One flow step on the Simulation's Context, at its temperature or another [K]; True if it was accepted."""
        if not self._begun:
            self.begin()
        context, temperature = self.simulation.context, self.temperature if temperature is None else temperature
        positions = self._read()
        energy = None if self._same_energy else context_potential(context, GAS_CONSTANT * temperature)
        new = self.step.propose(positions, temperature, energy)
        if new is not None:
            self._write(new)
            self._redraw_velocities(temperature)
        elif not self._same_energy:
            self._write(positions)
        return new is not None

    def _read(self) -> Tensor:
        """The Context's positions `(n_atoms, 3)` [nm], on the flow's device where they need not see the host."""
        context, proposal = self.simulation.context, self.step.proposal
        if self._direct:
            return read_positions(context, proposal.device)
        state = context.getState(getPositions=True)
        positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        return torch.as_tensor(proposal.make_whole(positions, self._box(state)))

    def _write(self, positions: Tensor) -> None:
        """Positions `(n_atoms, 3)` [nm] into the Context."""
        if self._direct:
            write_positions(self.simulation.context, positions)
        else:
            self.simulation.context.setPositions(positions.cpu().numpy())

    def _box(self, state: openmm.State) -> np.ndarray | None:
        """Box vectors as rows [nm], None without a box."""
        if not self.simulation.system.usesPeriodicBoundaryConditions():
            return None
        return np.asarray(state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(unit.nanometer))

    def _redraw_velocities(self, temperature: float) -> None:
        """Maxwell-Boltzmann velocities for the atoms that moved."""
        context, moved = self.simulation.context, self.step.proposal.atom_subset
        if moved is None and self.step.proposal.constraints is None:  # nothing of the old state is needed
            context.setVelocities(redrawn(None, self._masses, None, temperature, self.step.generator))
            return
        state = context.getState(getPositions=True, getVelocities=True)
        velocities = state.getVelocities(asNumpy=True).value_in_unit(unit.nanometer / unit.picosecond)
        velocities = redrawn(velocities, self._masses, moved, temperature, self.step.generator)
        positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        context.setVelocities(self.step.proposal.project_velocities(velocities, positions))

    def run(self, n_iterations: int, n_md_steps: int) -> FlowStatistics:
        """``n_iterations`` times: ``n_md_steps`` of dynamics (reporters included), then one flow step.

        Returns:
            The totals so far.
        """
        self.begin()
        for _ in range(n_iterations):
            self.simulation.step(n_md_steps)
            self.flow_step()
        return self.statistics


def alternate(
    simulation: app.Simulation, proposal: FlowProposal, n_md_steps: int, n_iterations: int, **options: Any
) -> FlowStatistics:
    """Dynamics and flow steps in turn: :meth:`FlowSimulation.run` as one call.

    Args:
        simulation: an ``openmm.app.Simulation`` with positions.
        proposal: flow, potential and temperature.
        n_md_steps: dynamics steps before each flow step.
        n_iterations: how many rounds.
        options: further arguments of :class:`FlowSimulation`.
    """
    return FlowSimulation(simulation, proposal, **options).run(n_iterations, n_md_steps)


class FlowReporter:
    """An ``openmm.app`` reporter of the flow steps: one CSV line per interval, from the first flow step on.

    Columns: step, then the entries of :meth:`FlowStatistics.as_dict`.

    Args:
        path: file to write; an existing one is replaced.
        interval: dynamics steps between lines.
        flow_simulation: whose statistics are reported.
    """

    def __init__(self, path: str | Path, interval: int, flow_simulation: FlowSimulation) -> None:
        if interval < 1:
            raise InputError(f"interval is {interval}; a line every so many steps needs at least 1")
        self._interval, self._source = interval, flow_simulation
        self._file = Path(path).open("w", newline="")  # noqa: SIM115  (open until close())
        self._writer = csv.writer(self._file)
        self._writer.writerow(["step", *self._source.statistics.as_dict()])

    def describeNextReport(self, simulation: app.Simulation) -> dict[str, Any]:
        """OpenMM's question: when next, and with what."""
        steps = self._interval - simulation.currentStep % self._interval
        return {"steps": steps, "periodic": None, "include": []}

    def report(self, simulation: app.Simulation, state: openmm.State) -> None:
        """Write one line, once there was a flow step: before it, means and rates are no numbers."""
        if self._source.statistics.n_proposed:
            self._writer.writerow([simulation.currentStep, *self._source.statistics.as_dict().values()])
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class FlowReplicaExchange(getattr(app, "ReplicaExchangeSampler", object)):  # type: ignore[misc]
    """OpenMM's own ``ReplicaExchangeSampler`` (8.6 and newer) with a flow step after the dynamics of each replica.

    Each flow step targets the state that the replica is in: its temperature, and its Context parameters where states
    differ in them. Everything else, exchanges and reporters included, is OpenMM's.

    Args:
        states: as ``openmm.app.ReplicaExchangeSampler`` takes them.
        simulation: positions set.
        stepsPerIteration: dynamics steps per replica and iteration.
        proposal: flow, potential and temperature.
        flow_states: indices of the states with flow steps, negative ones from the end; all by default. ``[-1]``
            gives the last (hottest) one a reservoir of independent configurations.
        n_proposals: 1 for independence Metropolis-Hastings, more for i-SIR.
        pool_size: proposals drawn at a time.
        seed: of the flow steps; None for a random one.
        options: further arguments of ``openmm.app.ReplicaExchangeSampler``.

    Attributes:
        statistics: of the flow steps in each state.

    Raises:
        InputError: an OpenMM without ``ReplicaExchangeSampler``, states that differ in force groups, or an index that
            is no state.
        UnsupportedForceError: virtual sites, a periodic box, or constraints that the flow does not hold fixed.
    """

    def __init__(
        self,
        states: list[dict[str, Any]],
        simulation: app.Simulation,
        stepsPerIteration: int,
        proposal: FlowProposal,
        *,
        flow_states: Iterable[int] | None = None,
        n_proposals: int = 1,
        pool_size: int = 256,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        if not hasattr(app, "ReplicaExchangeSampler"):
            raise InputError(
                f"OpenMM {openmm.__version__} has no ReplicaExchangeSampler; install 8.6 or newer, or use FlowMove "
                "in openmmtools' ReplicaExchangeSampler"
            )
        if any("groups" in state for state in states):
            raise InputError("states that choose force groups are not covered; let them differ in Context parameters")
        chosen = range(len(states)) if flow_states is None else list(flow_states)
        if any(not -len(states) <= index < len(states) for index in chosen):
            raise InputError(f"flow_states {list(chosen)} name no states; there are {len(states)}")
        super().__init__(states, simulation, stepsPerIteration, **options)
        self._flow = FlowSimulation(simulation, proposal, n_proposals, pool_size, seed)
        self._flow_states = {index % len(states) for index in chosen}
        self.statistics = [FlowStatistics() for _ in states]

    def simulateReplica(self, index: int, steps: int | None = None) -> None:
        """Dynamics of one replica, then a flow step in its state."""
        super().simulateReplica(index, steps)
        state = self.replicaStateIndex[index]
        if state not in self._flow_states:
            return
        self._flow.step.statistics = self.statistics[state]
        if not self._flow._begun:
            self._flow.begin(getattr(self, "currentIteration", 0))
        own = self.states[state].get("temperature")
        self._flow.flow_step(None if own is None else temperature_kelvin(own))
        self.replicaConformation[index] = self.simulation.context.getState(
            positions=True, velocities=True, parameters=True, integratorParameters=True
        )
