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
from openmm_regflow.trajectories import box_vectors

#: Relative difference at which two boxes count as one; openmmtools stores their vectors in single precision.
SAME_BOX = 1e-5


@dataclass(frozen=True)
class MultistateRun:
    """A stored run, starting points (iteration 0) left out.

    Attributes:
        storage: NetCDF file.
        states: index of the thermodynamic state in which each replica moved, int `(n_iterations, n_replicas)`.
        energies: reduced potentials of every replica in every state [kT], `(n_iterations, n_replicas, n_states)`; NaN
            where a sampler with ``locality`` has not computed one.
        stored: iterations (from 0) whose positions were kept, int `(n_frames,)`: all if every particle is among
            openmmtools' ``analysis_particle_indices``, otherwise those of its ``checkpoint_interval``.
        positions: [nm], float32 `(n_frames, n_replicas, n_atoms, 3)`.
        boxes: vectors of the periodic boxes [nm], `(n_frames, n_replicas, 3, 3)`; None without.
    """

    storage: Path
    states: np.ndarray
    energies: np.ndarray
    stored: np.ndarray
    positions: np.ndarray
    boxes: np.ndarray | None = None

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
        """The System of one state in the box of the run, its global parameters (lambdas, strengths) set as defaults.

        Raises:
            InputError: no such state, one at constant pressure, or a box that changed.
        """
        system = self._state(index).get_system(remove_thermostat=True)
        if self.boxes is not None and len(self.boxes) and system.usesPeriodicBoundaryConditions():
            first = self.boxes[0, 0].astype(float)
            if not np.allclose(self.boxes, first, rtol=SAME_BOX, atol=SAME_BOX):
                raise InputError(
                    f"the replicas of {self.storage} had boxes of several sizes; changing volumes are not covered, "
                    "start all of them with the same box vectors"
                )
            # Replicas may have started in another box than that of the System (after equilibration at a pressure).
            if not np.allclose(box_vectors(system), first, rtol=SAME_BOX, atol=SAME_BOX):
                system.setDefaultPeriodicBoxVectors(*(openmm.Vec3(*row) for row in first))
        return system

    def temperature(self, index: int) -> float:
        """Temperature of one state [K]."""
        return float(self._state(index).temperature.value_in_unit(unit.kelvin))

    def frames(self, index: int, burn_in: int = 0, stride: int = 1) -> np.ndarray:
        """Positions of the replica that moved in a state, in time, `(n, n_atoms, 3)` [nm].

        Where several replicas may be in one state at a time, one replica after another: correlation times are then
        those of a trajectory.

        Args:
            index: of the state; negative counts from the last.
            burn_in: iterations left out at the start.
            stride: keep every so many of the stored frames.

        Raises:
            InputError: no such state.
            InsufficientDataError: fewer than two frames are left.
        """
        found = self.positions[self.rows(index, burn_in, stride)]
        if len(found) < 2:
            raise InsufficientDataError(
                f"{len(found)} stored frames of state {index} in {self.storage} after {burn_in} iterations; run "
                "longer, or store positions at every iteration (analysis_particle_indices=range(n_atoms))"
            )
        return found

    def rows(self, index: int, burn_in: int = 0, stride: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Which stored frames (of ``stored``) and replicas `frames` takes, two arrays `(n,)`.

        Raises:
            InputError: no such state, a negative burn-in, or a stride below one.
        """
        if burn_in < 0 or stride < 1:
            raise InputError(f"burn_in is {burn_in} and stride {stride}; at least 0 and 1 are needed")
        self._state(index)
        wanted = index % len(self.thermodynamic_states)
        keep = np.flatnonzero(self.stored >= burn_in)[::stride]
        here = self.states[self.stored[keep]] == wanted
        if len(here) and here.sum(1).max() > 1:
            replica, time = np.nonzero(here.T)
        else:
            time, replica = np.nonzero(here)
        return keep[time], replica


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
            if "neighborhoods" in file.variables:
                energies[np.array(file.variables["neighborhoods"][1 : last + 1]) == 0] = np.nan
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
    interval = int(getattr(file, "PositionInterval", 1))
    return interval if interval > 0 and np.array_equal(indices, np.arange(n_atoms)) else None


def _rows(file: Any, interval: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Iterations counted from the first after the starting points, their positions and their boxes [nm]."""
    iterations = np.arange(interval, last + 1, interval)
    variables = file.variables
    rows = iterations if variables["positions"].shape[0] > last else iterations // interval
    boxes = np.array(variables["box_vectors"][rows]) if "box_vectors" in variables else None
    return iterations - 1, np.array(variables["positions"][rows]).astype(np.float32), boxes
