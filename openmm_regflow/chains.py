"""openmmtools chains run for a number of iterations or for a wall-clock time, with what one looks at afterwards."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openmm import Platform, app, unit

from openmm_regflow.device import openmm_properties
from openmm_regflow.errors import InputError
from openmm_regflow.potentials import platform_names
from openmm_regflow.systems import MolecularSystem


@dataclass
class ChainTrace:
    """Record of one chain.

    Attributes:
        positions: `(n, n_atoms, 3)` [nm] float32, after every iteration.
        seconds: `(n,)` wall-clock at which each iteration ended [s].
        md_steps: Langevin steps in all.
        statistics: of the flow move over these iterations, empty for plain dynamics.
        accepted: `(n,)` whether the flow move of each iteration was accepted; empty for plain dynamics.
    """

    positions: np.ndarray
    seconds: np.ndarray
    md_steps: int
    statistics: dict[str, float] = field(default_factory=dict)
    accepted: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))


def run_chain(
    molecule: MolecularSystem,
    flow_move: Any | None = None,
    *,
    n_iterations: int | None = None,
    seconds: float | None = None,
    n_md_steps: int = 250,
    timestep: float = 0.001,
    collision_rate: float = 1.0,
    platform: str = "Reference",
    seed: int = 0,
    positions: np.ndarray | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> ChainTrace:
    """Langevin dynamics, alternating with a flow move if one is given, in an openmmtools ``MCMCSampler``.

    The random numbers of openmmtools are NumPy's global ones; they are seeded here, and so is the dynamics' noise.

    Args:
        molecule: its System and temperature define the target.
        flow_move: a ``FlowMove``, whose statistics start from zero; None for dynamics alone.
        n_iterations: stop after so many.
        seconds: or after so much wall-clock [s].
        n_md_steps: Langevin steps per iteration.
        timestep: [ps].
        collision_rate: [1/ps].
        platform: OpenMM platform; Reference is the fastest CPU platform for small molecules with native GB.
        seed: of NumPy's global generator and of OpenMM's integrator.
        positions: start `(n_atoms, 3)` [nm]; default the molecule's own.
        progress: called with (iterations or whole seconds done, in total, figures).

    Raises:
        InputError: neither or both limits given, or one that is not positive.
    """
    if (n_iterations is None) == (seconds is None):
        raise InputError("give either n_iterations or seconds")
    if n_iterations is not None and n_iterations < 1:
        raise InputError(f"n_iterations is {n_iterations}; at least 1 is needed")
    if seconds is not None and not seconds > 0:
        raise InputError(f"seconds is {seconds:g}; a chain needs a time above zero")
    from openmmtools import mcmc, states

    np.random.seed(seed % 2**32)
    langevin = _seeded_langevin(
        seed,
        timestep=timestep * unit.picoseconds,
        collision_rate=collision_rate / unit.picoseconds,
        n_steps=n_md_steps,
    )
    move = mcmc.SequenceMove([langevin, flow_move]) if flow_move is not None else langevin
    thermodynamic_state = states.ThermodynamicState(molecule.system, molecule.temperature * unit.kelvin)
    start = molecule.positions if positions is None else positions
    sampler_state = states.SamplerState(np.asarray(start, dtype=np.float64) * unit.nanometers)
    with context_platform(platform, getattr(flow_move, "device", None)):
        sampler = mcmc.MCMCSampler(thermodynamic_state, sampler_state, move)
        sampler.run(1)  # makes the Contexts: set-up is not sampling
        if flow_move is not None:
            flow_move.reset_statistics()
        frames, stamps, totals = _loop(sampler, n_iterations, seconds, progress, flow_move)
    statistics = dict(flow_move.statistics) if flow_move is not None else {}
    accepted = np.diff(totals, prepend=0) > 0 if flow_move is not None else np.zeros(0, dtype=bool)
    n_steps = n_md_steps * len(frames)
    return ChainTrace(np.asarray(frames, dtype=np.float32), np.asarray(stamps), n_steps, statistics, accepted)


def _seeded_langevin(seed: int, **options: Any) -> Any:
    """openmmtools' Langevin move, whose own integrator takes its seed from the clock."""
    from openmmtools import mcmc

    class SeededLangevinMove(mcmc.LangevinDynamicsMove):
        def _get_integrator(self, thermodynamic_state: Any) -> Any:
            integrator = super()._get_integrator(thermodynamic_state)
            integrator.setRandomNumberSeed(1 + seed % (2**31 - 1))  # zero would be the clock again
            return integrator

    return SeededLangevinMove(**options)


def _accepted_by(move: Any | None) -> int:
    """Accepted moves so far, of a move that counts them."""
    return int(getattr(move, "statistics", {}).get("n_accepted", 0))


def _loop(
    sampler: Any,
    n_iterations: int | None,
    seconds: float | None,
    progress: Callable[[int, int, dict[str, float]], None] | None,
    flow_move: Any | None,
) -> tuple[list[np.ndarray], list[float], list[int]]:
    frames: list[np.ndarray] = []
    stamps: list[float] = []
    totals: list[int] = []
    began = time.monotonic()
    while True:
        sampler.run(1)
        totals.append(_accepted_by(flow_move))
        frames.append(sampler.sampler_state.positions.value_in_unit(unit.nanometers))
        stamps.append(time.monotonic() - began)
        done, total = (int(stamps[-1]), int(seconds or 0)) if n_iterations is None else (len(frames), n_iterations)
        if progress:
            progress(min(done, total), total, {})
        if len(frames) >= (n_iterations or math.inf) or stamps[-1] >= (seconds or math.inf):
            return frames, stamps, totals


@contextmanager
def context_platform(name: str, device: torch.device | str | None = None) -> Iterator[None]:
    """openmmtools' global Context cache on one platform, restored and emptied afterwards.

    Args:
        name: of the platform; GPU platforms compute in mixed precision.
        device: whose GPU a CUDA Context takes; torch's current one by default.

    Raises:
        InputError: a platform that is not there.
    """
    from openmmtools import cache

    known = platform_names()
    if name not in known:
        raise InputError(f"no platform {name!r}; this OpenMM has {', '.join(known)}")
    contexts = cache.global_context_cache
    before = contexts.platform, contexts._platform_properties  # the setter of the platform alone would keep the latter
    contexts.empty()
    contexts.set_platform(Platform.getPlatformByName(name), openmm_properties(name, device) or None)
    try:
        yield
    finally:
        contexts.empty()
        contexts.set_platform(*before)


def write_trajectory(path: str | Path, positions: np.ndarray, topology: app.Topology) -> int:
    """Write finite frames as a DCD, with a PDB of the topology beside it; mdtraj and VMD open both.

    Args:
        path: of the DCD; the PDB has the same stem.
        positions: `(n, n_atoms, 3)` [nm].
        topology: of the molecule.

    Returns:
        number of frames written.
    """
    import mdtraj

    frames = np.asarray(positions, dtype=np.float32)
    frames = frames[np.isfinite(frames).all(axis=(1, 2))]
    trajectory = mdtraj.Trajectory(frames, mdtraj.Topology.from_openmm(topology))
    trajectory.save_dcd(str(path))
    if len(frames):
        trajectory[0].save_pdb(str(Path(path).with_suffix(".pdb")))
    return len(frames)
