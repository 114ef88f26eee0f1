"""Parallel tempering through openmmtools: settings, seeds, running, resuming, reading back.

The sampling System carries heavier hydrogens, so that a larger time step is stable. Masses do not enter the
distribution of positions (except those that constraints hold, which are left as they are), and positions are all that
is kept: mass is added, none is taken from the heavy atoms.

openmmtools draws from NumPy's global random state and from Numba's; both, and the integrator, are seeded here from
one seed. Two runs of one seed agree bit for bit on the Reference platform, if nothing resumes them in between.

The sampler is that of Chodera & Shirts (J. Chem. Phys. 135, 194110, 2011), the integrator's splitting that of
Leimkuhler & Matthews (Appl. Math. Res. Express 2013, 34), the engine OpenMM (PLoS Comput. Biol. 13, e1005659, 2017).
"""

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import openmm
import torch
from openmm import unit
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from openmm_regflow.constraints import fixed_bonds
from openmm_regflow.device import openmm_properties
from openmm_regflow.errors import CorruptFileError, InputError, InsufficientDataError, complaints, first_line
from openmm_regflow.files import read_json, write_json
from openmm_regflow.fingerprints import compare_fingerprints, fingerprint
from openmm_regflow.ladders import temperature_ladder
from openmm_regflow.potentials import platform_names
from openmm_regflow.rigid import Placement, placement
from openmm_regflow.systems import MolecularSystem
from openmm_regflow.units import GAS_CONSTANT, time_step, to_float

#: Called as ``progress(done, total)`` in iterations.
Progress = Callable[[int, int], None]

STORAGE = "tempering.nc"
RECORD = "run.json"
#: Names of what the batched engine writes.
CHUNKS, START = "chunk-*.npz", "start.npz"


def no_progress(done: int, total: int) -> None:
    """Reports nothing."""


#: Settings that may be Quantities, and of what.
_KINDS = {"max_temperature": "temperature", "collision_rate": "rate", "hydrogen_mass": "mass"}


class Settings(BaseModel):
    """Settings of a simulation; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, values: Any) -> Any:
        """Numbers of Quantities, and a time step that is one."""
        if not isinstance(values, dict):
            return values
        found = {k: to_float(v, _KINDS[k]) for k, v in values.items() if k in _KINDS and unit.is_quantity(v)}
        return values | found | ({"timestep": time_step(values["timestep"])} if "timestep" in values else {})

    @classmethod
    def create(cls, **values: Any) -> Self:
        """Settings from keyword arguments.

        Raises:
            InputError: a value out of range or an unknown key; pydantic's report in one line.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            known = ", ".join(cls.model_fields)
            raise InputError(f"tempering: {complaints(error)}; known keys: {known}") from error


class TemperingSettings(Settings):
    """Settings of a parallel tempering run; unknown keys are refused.

    Attributes:
        max_temperature: hottest replica [K]; the coldest is at the temperature of the system.
        n_replicas: number of temperatures, spaced geometrically.
        n_iterations: number of iterations (dynamics of all replicas, then swaps).
        steps_per_iteration: time steps of each replica between swaps.
        timestep: [ps].
        collision_rate: [1/ps].
        hydrogen_mass: mass of hydrogen while sampling [dalton]; None keeps the System's.
        scramble_steps: steps of each replica at ``max_temperature`` before the run, to part the starting points.
        checkpoint_interval: iterations between points from which a run continues; what follows the last one is
            simulated again. Each costs twice the storage of the positions of an iteration, and hardly any time. A run
            keeps the interval that it began with.
        platform: OpenMM platform name; on a GPU in mixed precision. None lets OpenMM choose, precision and device too.
        seed: seeds everything random.
    """

    max_temperature: float = Field(default=700.0, gt=0, allow_inf_nan=False)
    n_replicas: int = Field(default=6, ge=2)
    n_iterations: int = Field(default=1000, ge=1)
    steps_per_iteration: int = Field(default=500, ge=1)
    timestep: float = Field(default=0.002, gt=0, allow_inf_nan=False)
    collision_rate: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    hydrogen_mass: float | None = Field(default=4.0, gt=0, allow_inf_nan=False)
    scramble_steps: int = Field(default=20_000, ge=0)
    checkpoint_interval: int = Field(default=1, ge=1)
    platform: str | None = "Reference"
    seed: int = Field(default=0, ge=0, lt=2**31 - 1)

    @model_validator(mode="before")
    @classmethod
    def _known_platform(cls, values: Any) -> Any:
        name = values.get("platform") if isinstance(values, dict) else None
        names = platform_names()
        if name is not None and name not in names:
            raise ValueError(f"platform {name!r} is not among {', '.join(names)}")
        return values


def with_hydrogen_mass(system: openmm.System, mass: float | None) -> openmm.System:
    """Copy of a System whose hydrogens (0 < mass < 1.5 dalton) weigh ``mass`` [dalton].

    Those that a constraint holds keep their mass, on which the ensemble of constrained dynamics depends.
    """
    heavier, held = copy.deepcopy(system), {i for bond in fixed_bonds(system) for i in bond[:2]}
    for index in range(system.getNumParticles() if mass is not None else 0):
        if index not in held and 0 < system.getParticleMass(index).value_in_unit(unit.dalton) < 1.5:
            heavier.setParticleMass(index, mass)
    return heavier


def parallel_tempering(
    molecule: MolecularSystem,
    output: str | Path,
    settings: TemperingSettings | None = None,
    *,
    resume: bool = False,
    progress: Progress = no_progress,
) -> Path:
    """Runs, resumes or extends parallel tempering with openmmtools' sampler.

    Args:
        molecule: the system; its temperature is the lowest of the ladder.
        output: folder for the storage file and its record; made if absent.
        settings: see :class:`TemperingSettings`. On resuming, only ``n_iterations`` may differ; a run that has as many
            is left as it is.
        resume: continue the run in ``output``; without one there, start it.
        progress: called after every few iterations.

    Returns:
        The storage file, NetCDF.

    Raises:
        InputError: unwritable folder, a run already there, or one with other settings, engine or System.
        CorruptFileError: a storage file that cannot be resumed.
    """
    settings = settings or TemperingSettings()
    temperature_ladder(molecule.temperature, settings.max_temperature, settings.n_replicas)
    folder = writable_folder(Path(output))
    storage = folder / STORAGE
    if storage.exists() and not resume:
        raise InputError(f"{folder} already holds a run; resume it or choose another output folder")
    if any(folder.glob(CHUNKS)) or (folder / START).exists():
        raise InputError(f"{folder} holds a run of the batched engine; go on with it, or choose another folder")
    _quiet()
    if storage.exists():
        settings = _as_begun(folder / RECORD, molecule, settings)
        if _stored_iterations(storage) >= settings.n_iterations:
            progress(settings.n_iterations, settings.n_iterations)
            return storage
        sampler = _reopen(storage, settings)
    else:
        _write_record(folder / RECORD, molecule, settings)
        sampler = _start(molecule, storage, settings)
    _advance(sampler, settings, progress)
    return storage


def writable_folder(folder: Path) -> Path:
    """The folder, made if absent and checked by writing a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"output folder {folder} is not writable ({error.strerror}); choose another") from error
    return folder


def _record(molecule: MolecularSystem, settings: TemperingSettings) -> dict[str, Any]:
    """What a run is a run of."""
    ladder = temperature_ladder(molecule.temperature, settings.max_temperature, settings.n_replicas)
    return {
        "system": molecule.name,
        "fingerprint": molecule.fingerprint,
        "temperatures": ladder.tolist(),
        "settings": settings.model_dump(),
        "versions": {"openmm": openmm.version.version, "openmmtools": _openmmtools_version()},
    }


def _openmmtools_version() -> str:
    from importlib.metadata import version

    return version("openmmtools")


def _write_record(path: Path, molecule: MolecularSystem, settings: TemperingSettings) -> None:
    write_json(path, _record(molecule, settings))


def read_record(path: str | Path) -> dict[str, Any]:
    """The record of a run: system, fingerprint, temperatures [K], settings, versions.

    Raises:
        InputError: absent.
        CorruptFileError: damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no record of a run at {path}; give the output folder of a simulation")
    return read_json(path, "start the run again in a new folder")


def _as_begun(path: Path, molecule: MolecularSystem, settings: TemperingSettings) -> TemperingSettings:
    """Refuses to continue another run; the settings with the checkpoints of this one."""
    then, now = read_record(path), _record(molecule, settings)
    lines = compare_fingerprints(
        then["fingerprint"], fingerprint(molecule.system, like=then["fingerprint"]), masses=True
    )
    for key, value in now["settings"].items():
        if key not in ("n_iterations", "checkpoint_interval") and then["settings"].get(key) != value:
            lines.append(f"{key} was {then['settings'].get(key)}, is {value}")
    if then["temperatures"] != now["temperatures"]:
        lines.append(f"temperatures were {then['temperatures']}, are {now['temperatures']}")
    if lines:
        raise InputError(f"{path.parent} holds another run ({'; '.join(lines)}); use its settings or another folder")
    return settings.model_copy(update={"checkpoint_interval": then["settings"]["checkpoint_interval"]})


def _quiet() -> None:
    """Silences openmmtools' warning about its own interface; errors still show."""
    for name in ("openmmtools.multistate", "pymbar"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _integrator(temperature: float, settings: TemperingSettings, stream: int) -> openmm.Integrator:
    """A seeded Langevin (BAOAB) integrator; another stream of random numbers after every resume."""
    seeds = np.random.SeedSequence([settings.seed, stream]).generate_state(1)
    integrator = openmm.LangevinMiddleIntegrator(temperature, settings.collision_rate, settings.timestep)
    integrator.setRandomNumberSeed(int(seeds[0] % (2**31 - 2)) + 1)  # zero would mean a seed from the clock
    return integrator


def _seed_globals(seed: int, stream: int) -> None:
    """Seeds the global generators that openmmtools draws swaps from: NumPy's and Numba's."""
    from numba import njit

    value = int(np.random.SeedSequence([seed, stream, 1]).generate_state(1)[0])
    np.random.seed(value)
    njit(_seed_numba)(value)


def _seed_numba(value: int) -> None:
    np.random.seed(value)


def _platform(name: str) -> tuple[openmm.Platform, dict[str, str]]:
    """A platform with its properties: on a GPU mixed precision, and torch's current device."""
    return openmm.Platform.getPlatform(name), openmm_properties(name)


def _attach_cache(sampler: Any, state: Any, integrator: openmm.Integrator, platform: str | None) -> None:
    """One Context for dynamics and energies, made before openmmtools makes an unseeded one for energies."""
    from openmmtools.cache import ContextCache

    chosen, properties = (None, None) if platform is None else _platform(platform)
    cache = ContextCache(capacity=None, time_to_live=None, platform=chosen, platform_properties=properties or None)
    cache.get_context(state, integrator)
    sampler.energy_context_cache = sampler.sampler_context_cache = cache


@lru_cache(maxsize=1)
def _sampler_class() -> type[Any]:
    """openmmtools' parallel tempering with velocities rescaled on every swap (made here: its import is slow).

    openmmtools leaves velocities at the temperature that a replica came from. The swap is then no longer reversible:
    kinetic energy flows down the ladder, and the coldest replica is sampled too hot. Scaling by sqrt(T_new / T_old)
    restores detailed balance (Sugita & Okamoto 1999, eq. 11).
    """
    from openmmtools import multistate

    class RescalingSampler(multistate.ParallelTemperingSampler):
        def _mix_replicas(self) -> np.ndarray:
            before = np.array(self._replica_thermodynamic_states)
            after = super()._mix_replicas()
            kelvin = np.array([s.temperature.value_in_unit(unit.kelvin) for s in self._thermodynamic_states])
            for replica in np.flatnonzero(before != np.asarray(after)):
                state = self._sampler_states[replica]
                state.velocities = state.velocities * np.sqrt(kelvin[after[replica]] / kelvin[before[replica]])
            return after

    return RescalingSampler


def _start(molecule: MolecularSystem, storage: Path, settings: TemperingSettings) -> Any:
    """A new sampler with every replica at its own starting point."""
    from openmmtools import mcmc, multistate, states

    if molecule.system.usesPeriodicBoundaryConditions():
        raise InputError(
            f"{molecule.name} has a periodic box, and these runs are of molecules without one; use openmmtools, "
            "and learn from the part that the flow is to move"
        )
    system = with_hydrogen_mass(molecule.system, settings.hydrogen_mass)
    ladder = temperature_ladder(molecule.temperature, settings.max_temperature, settings.n_replicas)
    starts = [
        states.SamplerState(x * unit.nanometer, velocities=v * unit.nanometer / unit.picosecond)
        for x, v in _starting_points(molecule, system, ladder, settings)
    ]
    state = states.ThermodynamicState(system, molecule.temperature * unit.kelvin)
    integrator = _integrator(molecule.temperature, settings, stream=0)
    sampler = _sampler_class()(
        mcmc_moves=mcmc.IntegratorMove(integrator, settings.steps_per_iteration),
        number_of_iterations=settings.n_iterations,
        online_analysis_interval=None,
        replica_mixing_scheme="swap-all",
    )
    sampler._have_displayed_citations_before = True  # they go to standard output; the module docstring has them
    reporter = multistate.MultiStateReporter(
        str(storage),
        checkpoint_interval=settings.checkpoint_interval,
        analysis_particle_indices=range(molecule.n_atoms),
    )
    sampler.create(state, starts, reporter, temperatures=list(ladder * unit.kelvin), n_temperatures=len(ladder))
    _seed_globals(settings.seed, 0)
    _attach_cache(sampler, state, integrator, settings.platform)
    return sampler


def _starting_points(
    molecule: MolecularSystem, system: openmm.System, ladder: np.ndarray, settings: TemperingSettings
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Positions [nm] and velocities [nm/ps] for each replica, parted by dynamics at the highest temperature."""
    integrator = _integrator(settings.max_temperature, settings, stream=2**31)
    chosen = () if settings.platform is None else _platform(settings.platform)
    try:
        context = openmm.Context(system, integrator, *chosen)
    except openmm.OpenMMException as error:
        raise InputError(f"OpenMM makes no Context of {molecule.name}: {first_line(error)}") from error
    context.setPositions(molecule.positions)
    openmm.LocalEnergyMinimizer.minimize(context, 10.0)
    points = []
    for replica, temperature in enumerate(ladder):
        context.setVelocitiesToTemperature(settings.max_temperature, settings.seed + replica + 1)
        integrator.step(settings.scramble_steps)
        positions = context.getState(positions=True).getPositions(asNumpy=True)
        context.setVelocitiesToTemperature(temperature, settings.seed + replica + 1)
        velocities = context.getState(velocities=True).getVelocities(asNumpy=True)
        points.append((np.array(positions._value), np.array(velocities._value)))
    return points


@contextlib.contextmanager
def _reading(storage: Path) -> Iterator[None]:
    """Name a storage file that cannot be read; netCDF4, yaml and openmmtools raise unrelated types."""
    try:
        yield
    except Exception as error:
        raise CorruptFileError(
            f"{storage} cannot be resumed ({type(error).__name__}: {error}); start again in another folder"
        ) from error


def _stored_iterations(storage: Path) -> int:
    """How many iterations a storage file holds."""
    import netCDF4

    with _reading(storage), netCDF4.Dataset(str(storage)) as file:
        return int(file.variables["last_iteration"][0])


def _reopen(storage: Path, settings: TemperingSettings) -> Any:
    """The sampler of an existing storage file, at its last checkpoint."""
    from openmmtools import multistate

    with _reading(storage):
        sampler = _sampler_class().from_storage(
            multistate.MultiStateReporter(str(storage), checkpoint_interval=settings.checkpoint_interval)
        )
    stream = sampler.iteration + 1
    state = sampler._thermodynamic_states[0]
    for move in sampler._mcmc_moves:
        move.integrator.setRandomNumberSeed(_integrator(300.0, settings, stream).getRandomNumberSeed())
    _seed_globals(settings.seed, stream)
    _attach_cache(sampler, state, copy.deepcopy(sampler._mcmc_moves[0].integrator), settings.platform)
    return sampler


def _advance(sampler: Any, settings: TemperingSettings, progress: Progress, chunk: int = 20) -> None:
    """Runs up to the wanted number of iterations, reporting every ``chunk``."""
    total = settings.n_iterations
    progress(min(sampler.iteration, total), total)
    try:
        while sampler.iteration < total:
            sampler.extend(min(chunk, total - sampler.iteration))
            progress(sampler.iteration, total)
    finally:
        sampler._reporter.close()


@dataclass(frozen=True)
class TemperingRun:
    """What a storage file holds, iteration 0 (the starting points) left out.

    Attributes:
        positions: [nm], float32 `(n_iterations, n_replicas, n_atoms, 3)`.
        states: index into ``temperatures`` of each replica, int `(n_iterations, n_replicas)`.
        energies: potential energies [kJ/mol], `(n_iterations, n_replicas)`.
        temperatures: [K], `(n_replicas,)`, ascending.
        acceptance: fraction of accepted swaps between neighbouring temperatures, `(n_replicas - 1,)`.
        bias: full-strength bias energies [kJ/mol], `(n_iterations, n_replicas)`, where the ladder also rises from no
            bias to all of it in equal steps; ``energies`` are without it.
    """

    positions: np.ndarray
    states: np.ndarray
    energies: np.ndarray
    temperatures: np.ndarray
    acceptance: np.ndarray
    bias: np.ndarray | None = None

    @property
    def reduced_energies(self) -> np.ndarray:
        """``u_k`` of every sample in every state of the ladder [kT], `(n_states, n_iterations, n_replicas)`."""
        scale = np.linspace(0.0, 1.0, len(self.temperatures))[:, None, None]
        total = self.energies[None] if self.bias is None else self.energies + scale * self.bias
        return total / (GAS_CONSTANT * self.temperatures[:, None, None])

    def at_temperature(self, values: np.ndarray, index: int = 0) -> np.ndarray:
        """Rows of a `(n_iterations, n_replicas, ...)` array at one temperature, in time, `(n_iterations, ...)`."""
        return values[np.arange(len(values)), np.argmax(self.states == index, axis=1)]

    def after(self, burn_in: int) -> "TemperingRun":
        """The run without its first ``burn_in`` iterations.

        Raises:
            InputError: a negative number.
            InsufficientDataError: fewer than two iterations would remain.
        """
        if burn_in < 0:
            raise InputError(f"burn_in is {burn_in}; give how many iterations to leave out, 0 or more")
        if len(self.states) - burn_in < 2:
            raise InsufficientDataError(
                f"{len(self.states)} iterations less {burn_in} of burn-in leave fewer than two; run longer"
            )
        return replace(
            self,
            positions=self.positions[burn_in:],
            states=self.states[burn_in:],
            energies=self.energies[burn_in:],
            bias=None if self.bias is None else self.bias[burn_in:],
        )


def is_free(system: openmm.System, positions: np.ndarray) -> bool:
    """Whether no energy decides where the molecule is, so that its centre may be put anywhere.

    Args:
        system: of the molecule, or of a bias.
        positions: `(n_atoms, 3)` [nm].
    """
    found = placement_in(system, positions[None])
    return found is not None and not found.place


def placement_in(system: openmm.System, frames: np.ndarray) -> Placement | None:
    """Whether more than some hundredths of a kJ/mol depend on place and orientation of the whole molecule.

    Args:
        system: of the molecule, or of a bias.
        frames: `(n, n_atoms, 3)` [nm].

    Returns:
        what was found; None where no frame has a finite energy.
    """
    # What a force in single precision makes of ten nanometres (a PythonForce) holds no molecule.
    return placement(
        reference_energies(system),
        torch.as_tensor(np.asarray(frames, dtype=np.float64)),
        lambda shift, energies: 0.02 * max(1.0, shift) + 1e-6 * energies.abs(),
    )


def reference_energies(system: openmm.System) -> Callable[[torch.Tensor], torch.Tensor]:
    """Energies [kJ/mol] `(n,)` of `(n, n_atoms, 3)` [nm], one by one on OpenMM's Reference platform."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))

    def energies(x: torch.Tensor) -> torch.Tensor:
        found = []
        for frame in x.numpy():
            context.setPositions(frame)
            found.append(context.getState(energy=True).getPotentialEnergy()._value)
        return torch.as_tensor(found, dtype=torch.float64)

    return energies


def load_run(output: str | Path) -> TemperingRun:
    """Reads a run, finished or not, from its output folder.

    Raises:
        InputError: no run there.
        CorruptFileError: unreadable storage.
    """
    import netCDF4

    storage = Path(output) / STORAGE
    record = read_record(Path(output) / RECORD)
    if "temperatures" not in record:
        raise InputError(f"{output} is the folder of another command than simulate; give that of a simulation")
    temperatures = np.array(record["temperatures"])
    if not storage.is_file():
        raise InputError(f"no run at {storage}; start one with `openmm-regflow simulate`")
    try:
        with netCDF4.Dataset(str(storage)) as file:
            file.set_auto_mask(False)
            last = int(file.variables["last_iteration"][0]) + 1
            values = {
                name: np.array(file.variables[name][1:last])
                for name in ("positions", "states", "energies", "accepted", "proposed")
            }
    except (OSError, KeyError, RuntimeError, IndexError) as error:
        raise CorruptFileError(
            f"{storage} is damaged or still being written ({error}); wait for the run, or simulate again elsewhere"
        ) from error
    pairs = np.arange(len(temperatures) - 1)
    accepted, proposed = (values[key].sum(axis=0)[pairs, pairs + 1] for key in ("accepted", "proposed"))
    return TemperingRun(
        positions=values["positions"].astype(np.float32),
        states=values["states"].astype(np.int64),
        energies=values["energies"][:, :, 0] * GAS_CONSTANT * temperatures[0],
        temperatures=temperatures,
        acceptance=accepted / np.maximum(proposed, 1),
    )
