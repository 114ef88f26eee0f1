"""Replica exchange of many ladders at once on a batched potential, where that outruns one Context at a time.

All replicas of all ladders are one batch of a :class:`~openmm_regflow.potentials.TorchPotential`. A ladder rises in
temperature and, if wanted, in the strength of a bias that lowers barriers; its lowest state is the unbiased target.
The integrator is OpenMM's LangevinMiddle (Zhang et al., J. Phys. Chem. A 123, 6056, 2019), swaps are between
neighbours with velocities rescaled (Sugita & Okamoto, Chem. Phys. Lett. 314, 141, 1999, equation 11).
"""

import os
import time
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit
from pydantic import Field
from torch import Tensor

from openmm_regflow.errors import CorruptFileError, InputError, InsufficientDataError
from openmm_regflow.files import write_json
from openmm_regflow.fingerprints import compare_fingerprints, fingerprint
from openmm_regflow.graphs import Replayed
from openmm_regflow.ladders import temperature_ladder
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.simulate.tempering import (
    CHUNKS,
    RECORD,
    START,
    STORAGE,
    Progress,
    Settings,
    TemperingRun,
    is_free,
    no_progress,
    read_record,
    with_hydrogen_mass,
    writable_folder,
)
from openmm_regflow.systems import MolecularSystem
from openmm_regflow.units import GAS_CONSTANT

#: Iterations, and seconds, after which they are written: what an interruption loses at most.
CHUNK, CHUNK_SECONDS = 50, 60.0
#: What an iteration starts from, by its names in a file.
NOW = ("x", "v", "last_states")


class BatchedSettings(Settings):
    """Settings of batched replica exchange; unknown keys are refused.

    Attributes:
        n_copies: independent ladders.
        n_replicas: states of a ladder; temperatures are geometric, the bias grows in equal steps from 0 to 1.
        max_temperature: of the highest state [K].
        n_iterations: iterations (dynamics of all replicas, then swaps).
        steps_per_iteration: time steps between swaps.
        timestep: [ps].
        collision_rate: [1/ps].
        hydrogen_mass: mass of hydrogen while sampling [dalton]; None keeps the System's.
        scramble_steps: steps of all replicas in the highest state before the run, to part the starting points.
        compile: run the potential through ``torch.compile``.
        device: of the potential, the dynamics and their random numbers.
        seed: seeds everything random.
    """

    n_copies: int = Field(default=32, ge=1)
    n_replicas: int = Field(default=4, ge=2)
    max_temperature: float = Field(default=500.0, gt=0, allow_inf_nan=False)
    n_iterations: int = Field(default=1000, ge=1)
    steps_per_iteration: int = Field(default=500, ge=1)
    timestep: float = Field(default=0.003, gt=0, allow_inf_nan=False)
    collision_rate: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    hydrogen_mass: float | None = Field(default=4.0, gt=0, allow_inf_nan=False)
    scramble_steps: int = Field(default=20_000, ge=0)
    compile: bool = True
    device: str = "cpu"
    seed: int = Field(default=0, ge=0, lt=2**31 - 1)


class _Ladder:
    """Reduced energies of every state, and forces for replicas that stand in different states."""

    def __init__(self, molecule: MolecularSystem, bias: openmm.System | None, settings: BatchedSettings) -> None:
        self.mass = _masses(molecule.system, settings).to(settings.device)
        self.timestep, self.damp = settings.timestep, float(np.exp(-settings.collision_rate * settings.timestep))
        self._step = Replayed(self._langevin, "steps of Langevin dynamics")
        kelvin = temperature_ladder(molecule.temperature, settings.max_temperature, settings.n_replicas)
        options: dict[str, Any] = {"dtype": torch.float32, "device": settings.device, "compile": settings.compile}
        self.potential = TorchPotential(molecule.system, **options)
        self.bias = None if bias is None else TorchPotential(bias, **options)
        self.kt = torch.as_tensor(GAS_CONSTANT * kelvin, dtype=torch.float32, device=settings.device)
        scale = np.linspace(0.0, 1.0, settings.n_replicas) if bias is not None else np.zeros(settings.n_replicas)
        self.scale = torch.as_tensor(scale, dtype=torch.float32, device=settings.device)
        systems = [molecule.system] if bias is None else [molecule.system, bias]
        self.free = all(is_free(system, molecule.positions) for system in systems)

    def centred(self, x: Tensor) -> Tensor:
        """Positions `(n, n_atoms, 3)` about their centre, for float32 to be precise, unless a field holds them."""
        return x - x.mean(1, keepdim=True) if self.free else x

    def energies_and_forces(self, x: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Molecule's energy and the full-strength bias [kJ/mol] `(n,)`, and the force [kJ/mol/nm] of each state."""
        u, force = self.potential.energy_and_forces(x)
        if self.bias is None:
            return u, torch.zeros_like(u), force
        b, force_b = self.bias.energy_and_forces(x)
        return u, b, force + self.scale[states, None, None] * force_b

    def dynamics(
        self, x: Tensor, v: Tensor, states: Tensor, n_steps: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Langevin steps of all replicas, as OpenMM's LangevinMiddleIntegrator: kick, half drift, friction, half drift.

        Args:
            x: positions `(n, n_atoms, 3)` [nm].
            v: velocities `(n, n_atoms, 3)` [nm/ps].
            states: `(n,)`.
            n_steps: how many.
            generator: on the device of x.
        """
        spread = ((1.0 - self.damp**2) * self.kt[states][:, None, None] / self.mass).sqrt()
        for _ in range(n_steps):
            noise = spread * torch.randn(v.shape, generator=generator, device=v.device)
            x, v = self._step(x, v, states, noise)
        return x.clone(), v.clone()

    def _langevin(self, x: Tensor, v: Tensor, states: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        _, _, force = self.energies_and_forces(x, states)
        v = v + self.timestep * force / self.mass
        x = x + 0.5 * self.timestep * v
        v = self.damp * v + noise
        return x + 0.5 * self.timestep * v, v

    def swap(self, states: Tensor, u: Tensor, b: Tensor, parity: int, generator: torch.Generator) -> Tensor:
        """States `(n_copies, n_replicas)` after attempted swaps of neighbours k, k+1 with k of one parity."""
        where = states.argsort(1)  # replica in each state
        low = torch.arange(parity, states.shape[1] - 1, 2, device=states.device)
        if not len(low):
            return states
        i, j = where[:, low], where[:, low + 1]
        (u_i, u_j), (b_i, b_j) = ((v.gather(1, i), v.gather(1, j)) for v in (u, b))
        beta, rise = 1.0 / self.kt, self.scale / self.kt
        # log alpha = u_k(x_i) + u_l(x_j) - u_k(x_j) - u_l(x_i), with u_k(x) = beta_k (U + scale_k B)
        log_alpha = (beta[low] - beta[low + 1]) * (u_i - u_j) + (rise[low] - rise[low + 1]) * (b_i - b_j)
        drawn = torch.rand(log_alpha.shape, generator=generator, device=log_alpha.device)
        accepted = drawn.log() < log_alpha
        after = states.clone()
        after.scatter_(1, i, torch.where(accepted, low + 1, low))
        after.scatter_(1, j, torch.where(accepted, low, low + 1))
        return after


def batched_tempering(
    molecule: MolecularSystem,
    output: str | Path,
    settings: BatchedSettings | None = None,
    *,
    bias: openmm.System | None = None,
    progress: Progress = no_progress,
) -> list[Path]:
    """Runs, resumes or extends batched replica exchange.

    Args:
        molecule: the system; its temperature is the lowest of the ladders.
        output: folder for the chunks of the run and its record; a run that is there is continued, from its first gap or
            damaged chunk on, where what follows is set aside (``.torn``).
        settings: see :class:`BatchedSettings`; on resuming, only ``n_iterations`` may differ.
        bias: a System of the same particles whose forces are the full-strength bias, see :func:`torsion_bias_system`.
        progress: called after every iteration.

    Returns:
        The files of the run, in time.

    Raises:
        InputError: unwritable folder, a run of another System or of other settings, or dynamics that blow up.
        CorruptFileError: the last chunk does not say from where to go on.
    """
    settings = settings or BatchedSettings()
    folder = writable_folder(Path(output))
    ladder = _Ladder(molecule, bias, settings)
    _check(folder / RECORD, molecule, bias, settings)
    chunks, others = _sound_chunks(folder)
    for path in others:  # simulated again; nothing is lost if they were only out of reach
        path.replace(path.with_suffix(".torn"))
    last = chunks[-1] if chunks else folder / START
    now = _read_now(last)
    if now is None and chunks:
        raise CorruptFileError(f"{last} is damaged; remove it, and its iterations are simulated again")
    if now is None:
        now = tuple(_now(*_scrambled(molecule, ladder, settings)).values())
        _write(last, dict(zip(NOW, now)))
    x, v, states = (torch.as_tensor(part).to(settings.device) for part in now)
    done = sum(_length(path) for path in chunks)
    progress(min(done, settings.n_iterations), settings.n_iterations)
    while done < settings.n_iterations:
        rows: list[tuple[np.ndarray, ...]] = []
        begun = time.monotonic()
        for iteration in range(done, min(done + CHUNK, settings.n_iterations)):
            generator = _generator(settings.seed, iteration + 1, settings.device)
            x, v, states, row = _iterate(ladder, x, v, states, settings, generator)
            rows.append(row)
            progress(iteration + 1, settings.n_iterations)
            if time.monotonic() - begun >= CHUNK_SECONDS:
                break
        path = folder / f"chunk-{done:07d}.npz"
        names = ("positions", "states", "energies", "bias", "swapped")
        columns = {name: np.stack(column) for name, column in zip(names, zip(*rows))}
        _write(path, columns | _now(x, v, states))
        chunks.append(path)
        done += len(rows)
    return chunks


def _now(x: Tensor, v: Tensor, states: Tensor) -> dict[str, np.ndarray]:
    """The arrays of `NOW`."""
    return dict(zip(NOW, (part.cpu().numpy() for part in (x, v, states))))


def _read_now(path: Path) -> tuple[np.ndarray, ...] | None:
    """The arrays of `NOW` in a file; None if it is not there or not whole."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return tuple(file[name] for name in NOW)
    except (FileNotFoundError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError):
        return None


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to a file that is whole or not there."""
    partial = path.with_suffix(".part")
    with open(partial, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _iterate(
    ladder: _Ladder,
    x: Tensor,
    v: Tensor,
    states: Tensor,
    settings: BatchedSettings,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, tuple[np.ndarray, ...]]:
    """Dynamics, then swaps; also what is kept: positions, states before the swaps, energies, bias, swaps accepted."""
    shape = states.shape
    x, v = ladder.dynamics(x, v, states.reshape(-1), settings.steps_per_iteration, generator)
    x = ladder.centred(x)
    u, b, _ = ladder.energies_and_forces(x, states.reshape(-1))
    if not torch.isfinite(u).all():
        raise InputError(f"dynamics blew up at a time step of {settings.timestep} ps; choose a smaller one")
    u, b = u.reshape(shape), b.reshape(shape)
    after, swapped = states, torch.zeros(shape[1] - 1)
    for attempt in range(2 * (shape[1] - 1)):
        before = after
        after = ladder.swap(before, u, b, attempt % 2, generator)
        moved = (after > before).cpu()
        swapped += torch.bincount(before.cpu()[moved], minlength=shape[1] - 1)[: shape[1] - 1]
    v = v * (ladder.kt[after] / ladder.kt[states]).sqrt().reshape(-1, 1, 1)
    row = (x.reshape(*shape, -1, 3), states.to(torch.int16), u, b, swapped)
    return x, v, after, tuple(part.cpu().numpy().copy() for part in row)


def _scrambled(
    molecule: MolecularSystem, ladder: _Ladder, settings: BatchedSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, velocities and states after dynamics of all replicas in the highest state."""
    integrator = openmm.VerletIntegrator(0.001)
    context = openmm.Context(molecule.system, integrator, openmm.Platform.getPlatform("Reference"))
    context.setPositions(molecule.positions)
    openmm.LocalEnergyMinimizer.minimize(context, 10.0)
    start = torch.as_tensor(context.getState(positions=True).getPositions(asNumpy=True)._value, dtype=torch.float32)
    generator = _generator(settings.seed, 0, settings.device)
    n, top = settings.n_copies * settings.n_replicas, settings.n_replicas - 1
    x = start.to(settings.device).repeat(n, 1, 1)
    states = torch.full((n,), top, device=settings.device)
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    v = (ladder.kt[top] / ladder.mass).sqrt() * noise
    x, v = ladder.dynamics(x, v, states, settings.scramble_steps, generator)
    if not torch.isfinite(x).all():
        raise InputError(f"dynamics blew up at a time step of {settings.timestep} ps; choose a smaller one")
    states = torch.arange(settings.n_replicas, device=x.device).repeat(settings.n_copies, 1)
    v = v * (ladder.kt[states] / ladder.kt[top]).sqrt().reshape(-1, 1, 1)
    return ladder.centred(x), v, states


def torsion_bias_system(n_atoms: int, biases: list[tuple[np.ndarray, np.ndarray]]) -> openmm.System:
    """A System of nothing but torsion biases, of the form of :func:`~openmm_regflow.simulate.torsion_bias`.

    Args:
        n_atoms: particles of the molecule.
        biases: per torsion its atom indices `(4,)` and amplitudes `(order, 2)`.
    """
    system = openmm.System()
    for _ in range(n_atoms):
        system.addParticle(1.0)
    force = openmm.PeriodicTorsionForce()
    for torsion, amplitudes in biases:
        for n, (a, b) in enumerate(amplitudes, start=1):
            force.addTorsion(*map(int, torsion), n, float(b), float(a))
    system.addForce(force)
    return system


def load_batched(output: str | Path) -> list[TemperingRun]:
    """Reads batched replica exchange, one run per ladder, finished or not, up to its first gap or damaged chunk.

    Raises:
        InputError: no run there, or a file that cannot be read.
        InsufficientDataError: not one chunk has been written yet.
    """
    folder = Path(output)
    record = read_record(folder / RECORD)
    chunks, _ = _sound_chunks(folder)
    if not chunks:
        raise InsufficientDataError(f"{folder} holds no finished part of a run yet; wait for its first iterations")
    parts: dict[str, list[np.ndarray]] = {k: [] for k in ("positions", "states", "energies", "bias", "swapped")}
    for path in chunks:
        with np.load(path, allow_pickle=False) as file:
            for name, column in parts.items():
                column.append(file[name])
    whole = {name: np.concatenate(column) for name, column in parts.items()}
    n_copies, n_replicas = whole["states"].shape[1:]
    attempts = len(whole["states"]) * n_copies * (n_replicas - 1)
    return [
        TemperingRun(
            positions=whole["positions"][:, c],
            states=whole["states"][:, c].astype(np.int64),
            energies=whole["energies"][:, c].astype(np.float64),
            temperatures=np.array(record["temperatures"]),
            acceptance=whole["swapped"].sum(0) / attempts,
            bias=whole["bias"][:, c].astype(np.float64) if record["bias"] else None,
        )
        for c in range(n_copies)
    ]


def _record(molecule: MolecularSystem, bias: openmm.System | None, settings: BatchedSettings) -> dict[str, Any]:
    ladder = temperature_ladder(molecule.temperature, settings.max_temperature, settings.n_replicas)
    return {
        "system": molecule.name,
        "engine": "batched",
        "fingerprint": molecule.fingerprint,
        "temperatures": ladder.tolist(),
        "bias": None if bias is None else openmm.XmlSerializer.serialize(bias),
        "settings": settings.model_dump(),
        "versions": {"openmm": openmm.version.version, "torch": torch.__version__},
    }


def _check(path: Path, molecule: MolecularSystem, bias: openmm.System | None, settings: BatchedSettings) -> None:
    """Writes the record of a new run; refuses to continue another one."""
    now = _record(molecule, bias, settings)
    begun = any(path.parent.glob(CHUNKS)) or any((path.parent / name).exists() for name in (START, STORAGE))
    if not (path.exists() and begun):
        write_json(path, now)
        return
    then = read_record(path)
    lines = compare_fingerprints(
        then["fingerprint"], fingerprint(molecule.system, like=then["fingerprint"]), masses=True
    )
    for key in ("engine", "temperatures", "bias"):
        if then.get(key) != now[key]:
            lines.append(f"another {key}")
    for key, value in now["settings"].items():
        if key != "n_iterations" and then["settings"].get(key) != value:
            lines.append(f"{key} was {then['settings'].get(key)}, is {value}")
    if lines:
        raise InputError(f"{path.parent} holds another run ({'; '.join(lines)}); use its settings or another folder")


def _sound_chunks(folder: Path) -> tuple[list[Path], list[Path]]:
    """Chunks in time, without gaps; and those from a gap or a torn one on."""
    found = sorted(folder.glob(CHUNKS))
    done = 0
    for position, path in enumerate(found):
        try:
            n = _length(path) if int(path.stem.removeprefix("chunk-")) == done else 0
        except CorruptFileError:
            n = 0
        if n == 0:
            return found[:position], found[position:]
        done += n
    return found, []


def _length(path: Path) -> int:
    """Iterations in a chunk.

    Raises:
        InputError: the operating system does not let it be read.
        CorruptFileError: it is no whole chunk.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return len(file["swapped"])
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); check its permissions and the disk") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise CorruptFileError(f"{path} is damaged ({error}); it has to be simulated again") from error


def _masses(system: openmm.System, settings: BatchedSettings) -> Tensor:
    """Masses [dalton], `(n_atoms, 1)`.

    Raises:
        InputError: constraints, or particles without mass.
    """
    if system.getNumConstraints():
        raise InputError(
            f"batched dynamics have no constraints and the System has {system.getNumConstraints()}; "
            "make it with constraints=None, or use parallel_tempering"
        )
    heavier = with_hydrogen_mass(system, settings.hydrogen_mass)
    mass = [heavier.getParticleMass(i).value_in_unit(unit.dalton) for i in range(system.getNumParticles())]
    if min(mass) <= 0:
        raise InputError("a particle has no mass; batched dynamics cannot hold particles still")
    return torch.tensor(mass, dtype=torch.float32)[:, None]


def _generator(seed: int, stream: int, device: str) -> torch.Generator:
    """Random numbers of one iteration, drawn on the device of the dynamics: other numbers on a GPU than on a CPU."""
    value = int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(value % 2**63)
