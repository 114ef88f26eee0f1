"""Reference data and regression pairs: ``systems``, ``simulate``, ``pairs``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from openmm_regflow.cli.shell import (
    Device,
    Output,
    Seed,
    bars,
    command,
    extendable,
    platform_of_dynamics,
    resumable,
    show_table,
)
from openmm_regflow.errors import InputError


@command
def systems() -> None:
    """List the named systems.

    Example: openmm-regflow systems
    """
    from openmm_regflow.systems import available_systems, load_system

    rows: list[tuple[str, ...]] = [("name", "atoms", "temperature [K]", "reference frames", "shipped flow")]
    for name in available_systems():
        mol = load_system(name)
        splits = [s for s in ("train", "validation", "test") if mol.reference_path(s).is_file()]
        shipped = bool(mol.folder and (mol.folder / "flow.safetensors").is_file())
        row = (name, str(mol.n_atoms), f"{mol.temperature:g}", ", ".join(splits) or "-", "yes" if shipped else "-")
        rows.append(row)
    show_table("Named systems", rows)


@command
@resumable()
def simulate(
    system: Annotated[str, typer.Argument(help="Name of a system or path of a system folder.")],
    output: Output = Path("runs/simulate"),
    iterations: Annotated[int, typer.Option(min=1, help="Swap attempts, and frames at the target temperature.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Langevin steps between swaps.")] = 500,
    timestep: Annotated[float, typer.Option(help="[ps], with hydrogens of 4 dalton.")] = 0.002,
    replicas: Annotated[int, typer.Option(min=2, help="Temperatures of the ladder.")] = 6,
    max_temperature: Annotated[float, typer.Option(help="Highest temperature [K].")] = 700.0,
    engine: Annotated[str, typer.Option(help="openmmtools, or batched (many ladders in torch).")] = "openmmtools",
    copies: Annotated[int, typer.Option(min=1, help="Independent ladders of the batched engine.")] = 32,
    scramble: Annotated[
        int, typer.Option(min=0, help="Steps at the highest state that part the starting points.")
    ] = 20_000,
    frames: Annotated[int | None, typer.Option(min=1, help="Most frames to export, evenly spaced.")] = None,
    burn_in: Annotated[
        int, typer.Option(min=0, help="Iterations left out of the export, but at most half of them.")
    ] = 100,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Reference data: parallel tempering, exported to float32 HDF5.

    The same command again goes on with a run that was interrupted, or lengthens one that has fewer iterations.
    On a GPU the replicas of openmmtools run on OpenMM's CUDA platform, those of the batched engine in torch.

    Example: openmm-regflow simulate alanine-dipeptide --iterations 10000 --output runs/aldp
    """
    import numpy as np

    from openmm_regflow import simulate as engines
    from openmm_regflow.device import resolve_device
    from openmm_regflow.systems import load_system
    from openmm_regflow.units import time_step

    if engine not in ("openmmtools", "batched"):
        raise InputError(f"unknown engine {engine!r}; known: openmmtools, batched")
    where: dict[str, Any] = {"device": str(resolve_device(device))}
    timestep = time_step(timestep)
    mol = load_system(system)
    if engine == "openmmtools":
        where = {"platform": platform_of_dynamics(device, mol.system)}
    values: dict[str, Any] = {
        "n_iterations": iterations,
        "steps_per_iteration": steps,
        "timestep": timestep,
        "n_replicas": replicas,
        "max_temperature": max_temperature,
        "scramble_steps": scramble,
        "seed": seed,
    } | where
    with extendable(output):
        _run_engine(mol, output, values | ({"n_copies": copies} if engine == "batched" else {}))
        runs = engines.load_runs(output)
        n = len(runs[0].positions)
        left_out = min(burn_in, n // 2)
        runs = [run.after(left_out) for run in runs]
        free = engines.is_free(mol.system, mol.positions)
        positions = np.concatenate([engines.target_frames(run, centre=free) for run in runs])
        kept = engines.thin(positions, frames)
        path = engines.export_hdf5(kept, mol.topology, output / "trajectory.h5")
    if n > iterations:
        print(f"the run in {output} has {n} iterations already; all of them are used")
    print(f"acceptance between neighbours: {', '.join(f'{a:.2f}' for a in runs[0].acceptance)}")
    phi = mol.torsions("phi")
    if len(phi):
        print(f"F(phi > 0) - F(phi < 0) at {mol.temperature:g} K: {_delta_f(runs, phi[0])}")
    if left_out < burn_in:
        print(f"a burn-in of {burn_in} is more than half of the {n} iterations; {left_out} are left out")
    print(f"wrote {len(kept):,} frames to {path}, the first {left_out} of {n} iterations left out")


def _run_engine(mol: Any, output: Path, values: dict[str, Any]) -> None:
    """Parallel tempering by the batched engine, if there are copies of the ladder, or by openmmtools."""
    from openmm_regflow import simulate as engines

    with bars() as bar:
        update = bar("tempering", values["n_iterations"])

        def progress(done: int, total: int) -> None:
            update(done, total, {})

        if "n_copies" in values:
            engines.batched_tempering(mol, output, engines.BatchedSettings.create(**values), progress=progress)
        else:
            one = engines.TemperingSettings.create(**values)
            engines.parallel_tempering(mol, output, one, resume=True, progress=progress)


def _delta_f(runs: Any, phi: Any) -> str:
    """The free energy of the phi > 0 basin in words; that it was not visited is a result, not a failure."""
    from openmm_regflow.errors import InsufficientDataError
    from openmm_regflow.simulate import analyse

    try:
        return f"{analyse(runs, phi).delta_f} kT"
    except InsufficientDataError as error:
        return f"unknown; {error}"


@command
@resumable()
def pairs(
    teacher: Annotated[Path, typer.Argument(help="A teacher file (.safetensors) written by train.")],
    output: Output = Path("runs/pairs"),
    n: Annotated[int, typer.Option("-n", help="Pairs.")] = 100_000,
    n_steps: Annotated[int, typer.Option(help="ODE steps.")] = 10,
    method: Annotated[str, typer.Option(help="ODE method of torchdiffeq.")] = "midpoint",
    log_det: Annotated[str, typer.Option(help="none, exact or hutchinson.")] = "none",
    workers: Annotated[int, typer.Option(min=1, help="Processes on the CPU.")] = 1,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Reflow pairs from a teacher, in resumable shards.

    Example: openmm-regflow pairs runs/aldp-flow/teacher.safetensors -n 1000000 --output runs/pairs
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from openmm_regflow.device import resolve_device
    from openmm_regflow.targets import reflow_pairs
    from openmm_regflow.teachers import load_teacher

    where = resolve_device(device)
    if workers > 1 and where.type == "cuda":
        raise InputError(f"{workers} workers would share one GPU; leave --workers out, or take --device cpu")
    field = load_teacher(teacher, where)
    executor = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else None
    with bars() as bar:
        progress = bar("pairs", n)
        made = reflow_pairs(
            field,
            n,
            seed=seed,
            n_steps=n_steps,
            method=method,
            log_det=log_det,
            folder=output,
            executor=executor,
            progress=lambda done, total: progress(done, total, {}),
        )
    print(f"{len(made):,} pairs of {made.z.shape[1]} dimensions in {output}")
