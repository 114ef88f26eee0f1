"""Reads what openmmtools' multistate samplers (replica exchange, parallel tempering, SAMS) have stored.

A storage file of a user's own sampler holds everything that a free energy needs: the thermodynamic states with their
Systems and parameters (temperatures, alchemical lambdas, restraints), the positions of the replicas, which state each
of them was in, and the reduced energies of every replica in every state.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import unit

from openmm_regflow.errors import CorruptFileError, InputError, InsufficientDataError


@dataclass(frozen=True)
class MultistateRun:
    """A stored run, starting points (iteration 0) left out.

    Attributes:
        storage: NetCDF file.
        states: index of the thermodynamic state in which each replica moved, int `(n_iterations, n_replicas)`.
        energies: reduced potentials of every replica in every state [kT], `(n_iterations, n_replicas, n_states)`.
        stored: iterations (from 0) whose positions were kept, int `(n_frames,)`: all if every particle is among
            openmmtools' ``analysis_particle_indices``, otherwise those of its ``checkpoint_interval``.
        positions: [nm], float32 `(n_frames, n_replicas, n_atoms, 3)`.
    """

    storage: Path
    states: np.ndarray
    energies: np.ndarray
    stored: np.ndarray
    positions: np.ndarray

    @cached_property
    def thermodynamic_states(self) -> list[Any]:
        """openmmtools' thermodynamic states, in order.

        Raises:
            CorruptFileError: they cannot be read, or their classes are not importable.
        """
        from openmmtools.multistate import MultiStateReporter

        try:
            reporter = MultiStateReporter(str(self.storage), open_mode="r")
            try:
                return list(reporter.read_thermodynamic_states()[0])
            finally:
                reporter.close()
        except Exception as error:  # yaml, netCDF4 and openmmtools raise unrelated types
            raise CorruptFileError(
                f"the thermodynamic states of {self.storage} cannot be read ({type(error).__name__}: {error}); import "
                "the module that defines them first, or write the file again"
            ) from error

    def _state(self, index: int) -> Any:
        count = len(self.thermodynamic_states)
        if not -count <= index < count:
            raise InputError(f"{self.storage} has {count} states, 0 to {count - 1}; there is no state {index}")
        state = self.thermodynamic_states[index]
        if state.pressure is not None:
            raise InputError(
                f"state {index} of {self.storage} is at constant pressure; changing volumes are not covered, "
                "sample at constant volume"
            )
        return state

    def system(self, index: int) -> openmm.System:
        """The System of one state, its global parameters (lambdas, strengths) set as defaults.

        Raises:
            InputError: no such state, or one at constant pressure.
        """
        return self._state(index).get_system(remove_thermostat=True)

    def temperature(self, index: int) -> float:
        """Temperature of one state [K]."""
        return float(self._state(index).temperature.value_in_unit(unit.kelvin))

    def frames(self, index: int, burn_in: int = 0, stride: int = 1) -> np.ndarray:
        """Positions of the replica that moved in a state, in time, `(n, n_atoms, 3)` [nm].

        Args:
            index: of the state; negative counts from the last.
            burn_in: iterations left out at the start.
            stride: keep every so many of the stored frames.

        Raises:
            InputError: no such state.
            InsufficientDataError: fewer than two frames are left.
        """
        self._state(index)
        wanted = index % len(self.thermodynamic_states)
        keep = np.flatnonzero(self.stored >= burn_in)[::stride]
        here = self.states[self.stored[keep]] == wanted
        found = self.positions[keep][here]
        if len(found) < 2:
            raise InsufficientDataError(
                f"{len(found)} stored frames of state {index} in {self.storage} after {burn_in} iterations; run "
                "longer, or store positions at every iteration (analysis_particle_indices=range(n_atoms))"
            )
        return found


def load_multistate(storage: str | Path) -> MultistateRun:
    """Reads the storage file of an openmmtools multistate sampler, finished or not.

    Args:
        storage: NetCDF file of the ``MultiStateReporter``; its checkpoint file has to lie beside it where not all
            particles are analysis particles.

    Raises:
        InputError: no such file.
        CorruptFileError: not the storage of a multistate sampler, or damaged.
        InsufficientDataError: nothing but the starting points is stored.
    """
    storage = Path(storage)
    if not storage.is_file():
        raise InputError(f"no storage file at {storage}; give the NetCDF file of openmmtools' MultiStateReporter")
    import netCDF4

    try:
        with netCDF4.Dataset(str(storage)) as file:
            file.set_auto_mask(False)
            last = int(file.variables["last_iteration"][0])
            states = np.array(file.variables["states"][1 : last + 1]).astype(np.int64)
            energies = np.array(file.variables["energies"][1 : last + 1]).astype(np.float64)
            every, interval = _analysis_positions(file), int(file.CheckpointInterval)
            frames = None if every is None else _rows(file, every, last)
        if frames is None:
            beside = storage.with_name(f"{storage.stem}_checkpoint{storage.suffix}")
            with netCDF4.Dataset(str(beside)) as file:
                file.set_auto_mask(False)
                frames = _rows(file, interval, last)
    except (OSError, KeyError, RuntimeError, IndexError, AttributeError, ValueError) as error:
        raise CorruptFileError(
            f"{storage} (or its checkpoint file) is no storage of a multistate sampler, or damaged ({error})"
        ) from error
    if last < 1:
        raise InsufficientDataError(f"{storage} holds the starting points alone; run the sampler first")
    return MultistateRun(storage, states, energies, *frames)


def _analysis_positions(file: Any) -> int | None:
    """Iterations between the positions in the analysis file, or None if it does not hold those of all particles."""
    if "positions" not in file.variables:
        return None
    indices = np.array(file.variables["analysis_particle_indices"][:])
    n_atoms = file.variables["positions"].shape[2]
    return int(getattr(file, "PositionInterval", 1)) if np.array_equal(indices, np.arange(n_atoms)) else None


def _rows(file: Any, interval: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Iterations counted from the first after the starting points, and their positions [nm]."""
    iterations = np.arange(interval, last + 1, interval)
    variable = file.variables["positions"]
    rows = iterations if variable.shape[0] > last else iterations // interval
    return iterations - 1, np.array(variable[rows]).astype(np.float32)
