"""The command line: a thin shell over the package. Bad input gives one line and exit code 2, Ctrl-C gives 130."""

import functools
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from openmm_regflow.errors import InputError, RegflowError

app = typer.Typer(
    name="openmm-regflow",
    help="Normalizing flows trained by regression (RegFlow) as proposal generators for OpenMM.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Seed = Annotated[int, typer.Option("--seed", help="Seed of every random number.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, or auto.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the results of a finished run in the folder.")]
System = Annotated[str, typer.Option("--system", help="Name of a system or path of a system folder.")]
FlowFile = Annotated[Path, typer.Argument(help="A flow file (.safetensors).")]

RUN_FILE = "run.json"


def main(arguments: list[str] | None = None) -> None:
    """Entry point.

    Args:
        arguments: default ``sys.argv[1:]``.

    Raises:
        SystemExit: always; 0 for success, 2 for bad input, 130 for Ctrl-C.
    """
    # Dependencies announce themselves through logging when they are imported; errors still show.
    for name in ("pymbar", "openmmtools.multistate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    app(args=arguments, prog_name="openmm-regflow")


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose errors become one line and an exit code."""

    @functools.wraps(function)
    def guarded(*arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except RegflowError as error:
            _fail(f"error: {' '.join(str(error).split())}", 2)
        except OSError as error:
            _fail(f"error: {error}; check the path, its permissions and the free space", 2)
        except KeyboardInterrupt:
            _fail("interrupted; the same command continues where it stopped", 130)

    return app.command()(guarded)


def _fail(line: str, code: int) -> None:
    print(line, file=sys.stderr)
    raise typer.Exit(code)


@contextmanager
def bars() -> Iterator[Callable[[str, int], Callable[[int, int, dict[str, float]], None]]]:
    """Progress bars with figures, rate and remaining time; on a pipe, a line now and then."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def open_bar(name: str, total: int) -> Callable[[int, int, dict[str, float]], None]:
            task = progress.add_task(name, total=total, figures="")
            last = [time.monotonic()]

            def update(done: int, total: int, figures: dict[str, float]) -> None:
                text = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
                progress.update(task, completed=done, total=total, figures=text)
                if not console.is_terminal and (done == total or time.monotonic() - last[0] > 20):
                    console.print(f"{name}: {done}/{total}  {text}", highlight=False)
                    last[0] = time.monotonic()

            return update

        yield open_bar


def prepare_output(folder: Path, command: str, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the output folder, or continue the interrupted run of the same settings in it.

    Raises:
        InputError: not writable, or holding something else.
    """
    marker = folder / RUN_FILE
    wanted = {"command": command, "settings": settings}
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not marker.is_file())):
        raise InputError(f"{folder} exists and holds other things; choose an empty or new folder with --output")
    if marker.is_file():
        found = json.loads(marker.read_text())
        if found.get("finished") and not overwrite:
            raise InputError(f"{folder} holds a finished run; choose another --output or give --overwrite")
        same = {k: found.get(k) for k in wanted} == wanted
        if not same and not overwrite:
            raise InputError(f"{folder} holds a run of other settings; choose another --output or give --overwrite")
        if found.get("finished") or not same:
            _clear(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps(wanted | {"finished": False}, indent=1))
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error}; choose a writable --output") from error


def _clear(folder: Path) -> None:
    import shutil

    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def finish_output(folder: Path) -> None:
    """Mark the run in the folder as finished."""
    marker = folder / RUN_FILE
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"finished": True}, indent=1))


def open_proposal(flow_file: Path, system: str, device: str, allow_mismatch: bool = False) -> tuple[Any, Any, Any]:
    """(flow, molecule, proposal) for a flow file and a system."""
    from openmm_regflow.device import resolve_device
    from openmm_regflow.flows import Flow
    from openmm_regflow.potentials import OpenMMPotential, TorchPotential
    from openmm_regflow.proposals import FlowProposal
    from openmm_regflow.systems import load_system

    where = resolve_device(device)
    flow = Flow.load(flow_file, where)
    molecule = load_system(system)
    on_gpu = where.type == "cuda"
    potential = TorchPotential(molecule.system, device=where) if on_gpu else OpenMMPotential(molecule.system)
    return flow, molecule, FlowProposal(flow, potential, molecule.temperature, allow_mismatch=allow_mismatch)


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
def simulate(
    system: Annotated[str, typer.Argument(help="Name of a system or path of a system folder.")],
    output: Output = Path("runs/simulate"),
    iterations: Annotated[int, typer.Option(help="Swap attempts (and frames at the target temperature).")] = 1000,
    steps: Annotated[int, typer.Option(help="Langevin steps between swaps.")] = 500,
    timestep: Annotated[float, typer.Option(help="[ps], with hydrogens of 4 dalton.")] = 0.002,
    replicas: Annotated[int, typer.Option(help="Temperatures of the ladder.")] = 6,
    max_temperature: Annotated[float, typer.Option(help="Highest temperature [K].")] = 700.0,
    engine: Annotated[str, typer.Option(help="openmmtools, or batched (many ladders in torch).")] = "openmmtools",
    copies: Annotated[int, typer.Option(help="Independent ladders of the batched engine.")] = 32,
    scramble: Annotated[int, typer.Option(help="Steps at the highest state that part the starting points.")] = 20_000,
    frames: Annotated[int | None, typer.Option(help="Most frames to export, evenly spaced.")] = None,
    burn_in: Annotated[int, typer.Option(help="Iterations left out of the export.")] = 100,
    seed: Seed = 0,
) -> None:
    """Reference data: parallel tempering, resumable, exported to float32 HDF5.

    Example: openmm-regflow simulate alanine-dipeptide --iterations 10000 --output runs/aldp
    """
    import numpy as np

    from openmm_regflow import simulate as engines
    from openmm_regflow.systems import load_system

    mol = load_system(system)
    values: dict[str, Any] = {
        "n_iterations": iterations,
        "steps_per_iteration": steps,
        "timestep": timestep,
        "n_replicas": replicas,
        "max_temperature": max_temperature,
        "scramble_steps": scramble,
        "seed": seed,
    }
    with bars() as bar:
        update = bar("tempering", iterations)

        def progress(done: int, total: int) -> None:
            update(done, total, {})

        if engine == "batched":
            many = engines.BatchedSettings.create(**values, n_copies=copies)
            engines.batched_tempering(mol, output, many, progress=progress)
        elif engine == "openmmtools":
            one = engines.TemperingSettings.create(**values)
            engines.parallel_tempering(mol, output, one, resume=True, progress=progress)
        else:
            raise InputError(f"unknown engine {engine!r}; known: openmmtools, batched")
    runs = [run.after(min(burn_in, len(run.positions) // 2)) for run in engines.load_runs(output)]
    positions = np.concatenate([engines.target_frames(run) for run in runs])
    path = engines.export_hdf5(engines.thin(positions, frames), mol.topology, output / "trajectory.h5")
    print(f"acceptance between neighbours: {', '.join(f'{a:.2f}' for a in runs[0].acceptance)}")
    phi = mol.torsions("phi")
    if len(phi):
        print(f"F(phi > 0) - F(phi < 0) at {mol.temperature:g} K: {_delta_f(runs, phi[0])}")
    print(f"wrote {path}")


def _delta_f(runs: Any, phi: Any) -> str:
    """The free energy of the phi > 0 basin in words; that it was not visited is a result, not a failure."""
    from openmm_regflow.errors import InsufficientDataError
    from openmm_regflow.simulate import analyse

    try:
        return f"{analyse(runs, phi).delta_f} kT"
    except InsufficientDataError as error:
        return f"unknown; {error}"


@command
def train(
    system: Annotated[str, typer.Argument(help="Name of a system or path of a system folder.")] = "alanine-dipeptide",
    output: Output = Path("runs/train"),
    config: Annotated[Path | None, typer.Option(help="TOML configuration; default: built-in settings.")] = None,
    data: Annotated[Path | None, typer.Option(help="Training trajectory; default: the system's own.")] = None,
    validation: Annotated[Path | None, typer.Option(help="Held-out trajectory; default: the system's own.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the configuration and stop.")] = False,
    seed: Annotated[int | None, typer.Option(help="Overrides the seeds of the configuration.")] = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Train a flow: teacher, pairs, regression, likelihood phase. Interrupted runs continue.

    Several processes: torchrun --standalone --nproc-per-node 4 -m openmm_regflow train ... shares every batch.

    Example: openmm-regflow train alanine-dipeptide --output runs/aldp-flow
    """
    from openmm_regflow import recipes

    settings = recipes.load_config(config) if config else recipes.RunConfig()
    settings = recipes.with_seed(settings, seed) if seed is not None else settings
    if print_config:
        print(recipes.print_config(settings), end="")
        return
    from openmm_regflow import ranks

    with ranks.job() as peers:
        _train(system, output, settings, data, validation, device, overwrite, peers.main)


def _train(
    system: str,
    output: Path,
    settings: Any,
    data: Path | None,
    validation: Path | None,
    device: str,
    overwrite: bool,
    writes: bool,
) -> None:
    """`train` on one rank; one of them writes and prints."""
    import torch

    from openmm_regflow import recipes
    from openmm_regflow.constraints import fixed_bonds
    from openmm_regflow.device import resolve_device
    from openmm_regflow.ensemble import frame_mover, phi_positive, training_potential
    from openmm_regflow.flows import FlowMetadata
    from openmm_regflow.systems import load_system, load_trajectory
    from openmm_regflow.training import write_history

    where = resolve_device(device)
    mol = load_system(system)
    moves = settings.refinement.enabled and settings.refinement.anchor_moves
    frames = load_trajectory(data, mol.topology) if data else mol.reference("train")
    held_out = load_trajectory(validation, mol.topology) if validation else mol.reference("validation")
    described = {"system": system, "config": settings.model_dump(), "data": str(data), "validation": str(validation)}
    if writes:
        prepare_output(output, "train", described, overwrite)
    provenance = {"config": settings.model_dump(), "data": str(data or f"{mol.name}: train"), "frames": len(frames)}
    metadata = FlowMetadata(mol.name, mol.fingerprint, mol.temperature, provenance)
    with bars() as bar:
        result = recipes.fit(
            mol.topology,
            torch.as_tensor(frames),
            torch.as_tensor(held_out),
            settings,
            metadata=metadata,
            folder=output / "work",
            stage=bar,
            device=where,
            reduced_potential=training_potential(mol, where, settings.compile) if settings.refinement.enabled else None,
            mover=frame_mover(mol, where, settings.compile) if moves else None,
            watch=[phi_positive(mol)] if len(mol.torsions("phi")) else None,
            fixed=fixed_bonds(mol.system),
        )
    if not writes:
        return
    result.flow.save(output / "flow.safetensors")
    result.save_phases(output / "phases")
    if result.field is not None:
        recipes.save_teacher(output / "teacher.safetensors", result.field)
    write_history(output / "history.json", result.histories)
    (output / "refinement.json").write_text(json.dumps([record.to_dict() for record in result.rounds], indent=1))
    for record in result.rounds:
        print(f"refinement: {record.energies:,} energies  ESS {record.ess:.2%}  truncated {record.ess_truncated:.2%}")
    finish_output(output)
    print("  ".join(f"{k} {v:.0f} s" for k, v in result.seconds.items()))
    print(f"wrote {output / 'flow.safetensors'}")


@command
def refine(
    flow: FlowFile,
    output: Output = Path("runs/refine"),
    system: System = "alanine-dipeptide",
    rounds: Annotated[int, typer.Option(help="Pools.")] = 10,
    pool: Annotated[int, typer.Option(help="Flow samples, and energies, per round.")] = 100_000,
    learning_rate: Annotated[float, typer.Option(help="Of each round.")] = 4e-4,
    anchors: Annotated[int, typer.Option(help="Training frames mixed into every pool.")] = 10_000,
    anchor_moves: Annotated[int, typer.Option(help="Monte Carlo trajectories of every frame before each pool.")] = 0,
    compile: Annotated[bool, typer.Option("--compile", help="Fused splines, compiled float32 energies.")] = False,
    data: Annotated[Path | None, typer.Option(help="Training trajectory; default: the system's own.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Refine a flow on energies: forward KL on its own reweighted samples and on training frames; resumable.

    Example: openmm-regflow refine runs/flow/flow.safetensors --rounds 10 --output runs/refined
    """
    import dataclasses

    import torch

    from openmm_regflow.ensemble import frame_mover, phi_positive, training_potential
    from openmm_regflow.refinement import RefineConfig
    from openmm_regflow.refinement import refine as run
    from openmm_regflow.systems import load_trajectory

    opened, mol, _ = open_proposal(flow, system, device)
    config = RefineConfig(
        enabled=True, rounds=rounds, pool=pool, learning_rate=learning_rate, anchors=anchors, anchor_moves=anchor_moves,
        seed=seed,
    )  # fmt: skip
    frames = load_trajectory(data, mol.topology) if data else mol.reference("train")
    described = {"flow": str(flow), "system": system, "data": str(data), "compile": compile}
    described |= {"config": config.model_dump()}
    prepare_output(output, "refine", described, overwrite)
    with bars() as bar:
        records = run(
            opened.fuse(compile),
            training_potential(mol, opened.device, compile),
            config,
            data=torch.as_tensor(frames, device=opened.device),
            mover=frame_mover(mol, opened.device, compile) if anchor_moves else None,
            watch=[phi_positive(mol)] if len(mol.torsions("phi")) else None,
            checkpoint=output / "refinement-checkpoint.safetensors",
            progress=bar("refinement", rounds),
        )
    before = opened.metadata.training
    energies = before.get("energies", 0) + records[-1].energies
    refined = {"refinement of": str(flow), "refinement": config.model_dump(), "energies": energies}
    if "refinement" in before:
        refined["refined before"] = [*before.get("refined before", []), before["refinement"]]
    opened.metadata = dataclasses.replace(opened.metadata, training=before | refined)
    opened.save(output / "flow.safetensors")
    (output / "refinement.json").write_text(json.dumps([record.to_dict() for record in records], indent=1))
    finish_output(output)
    best = min(record.divergence for record in records)
    print(f"KL {records[0].divergence:.3f} -> {best:.3f} nat, {energies:,} energies in all")
    print(f"wrote {output / 'flow.safetensors'}")


@command
def pairs(
    teacher: Annotated[Path, typer.Argument(help="A teacher file (.safetensors) written by train.")],
    output: Output = Path("runs/pairs"),
    n: Annotated[int, typer.Option("-n", help="Pairs.")] = 100_000,
    n_steps: Annotated[int, typer.Option(help="ODE steps.")] = 10,
    method: Annotated[str, typer.Option(help="ODE method of torchdiffeq.")] = "midpoint",
    log_det: Annotated[str, typer.Option(help="none, exact or hutchinson.")] = "none",
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
    seed: Seed = 0,
) -> None:
    """Reflow pairs from a teacher, in resumable shards.

    Example: openmm-regflow pairs runs/aldp-flow/teacher.safetensors -n 1000000 --output runs/pairs
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from openmm_regflow.recipes import load_teacher
    from openmm_regflow.targets import reflow_pairs

    field = load_teacher(teacher)
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


@command
def sample(
    flow: FlowFile,
    output: Output = Path("runs/sample"),
    system: System = "alanine-dipeptide",
    n: Annotated[int, typer.Option("-n", help="Samples.")] = 10_000,
    seed: Seed = 0,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Samples with log-densities, energies and weights: a DCD trajectory and an .npz.

    Example: openmm-regflow sample systems/alanine-dipeptide/flow.safetensors -n 10000 --output runs/samples
    """
    import torch

    from openmm_regflow import reweighting
    from openmm_regflow.demo import write_batch

    _, mol, proposal = open_proposal(flow, system, device)
    prepare_output(output, "sample", {"flow": str(flow), "system": system, "n": n, "seed": seed}, overwrite)
    batch = proposal.sample(n, torch.Generator(device=proposal.device).manual_seed(seed))
    kept = write_batch(output, batch, mol)
    finish_output(output)
    print(f"ESS {100 * reweighting.effective_sample_size(batch.log_weights.cpu()):.3g} % of {n:,} samples")
    print(reweighting.verdict(batch.log_weights.cpu()))
    print(f"wrote {kept:,} frames to {output / 'samples.dcd'}")


@command
def evaluate(
    flow: FlowFile,
    output: Output = Path("runs/evaluate"),
    system: System = "alanine-dipeptide",
    n: Annotated[int, typer.Option("-n", help="Samples.")] = 20_000,
    seed: Seed = 0,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """ESS, E-W1, T-W2, chirality, delta F against the system's test set: a table, plots and metrics.json.

    Example: openmm-regflow evaluate systems/alanine-dipeptide/flow.safetensors --output runs/evaluate
    """
    from openmm_regflow.demo import evaluate_flow

    _, mol, proposal = open_proposal(flow, system, device)
    prepare_output(output, "evaluate", {"flow": str(flow), "system": system, "n": n, "seed": seed}, overwrite)
    figures = evaluate_flow(proposal, mol, output, n, seed)
    finish_output(output)
    show_table(f"{mol.name}: {n:,} samples", [("figure", "value"), *figures.rows()])


def show_table(title: str, rows: list[tuple[str, ...]]) -> None:
    """Print rows as a table; the first row is the header."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for header in rows[0]:
        table.add_column(Text(header))  # as Text: a unit in brackets is no markup
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    Console(width=max(100, Console().width)).print(table)


@command
def check(
    system: Annotated[str, typer.Argument(help="Name of a system or path of a system folder.")],
    flow: FlowFile,
    n: Annotated[int, typer.Option("-n", help="Flow samples for the kernel test.")] = 2000,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the findings.")] = None,
    seed: Seed = 0,
) -> None:
    """Is this flow exact on this System? Round trip, log-determinant, energies, what the System has, the kernel.

    Prints a table and a verdict; exit code 1 if something fails.

    Example: openmm-regflow check my-system/ runs/my-flow/flow.safetensors
    """
    from openmm_regflow.check import run_checks
    from openmm_regflow.flows import Flow
    from openmm_regflow.systems import load_system

    molecule = load_system(system)
    loaded = Flow.load(flow)
    with bars() as bar:
        report = run_checks(loaded, molecule, n=n, seed=seed, progress=bar("kernel", n))
    show_table(f"{flow} on {molecule.name}", [("what", "found", ""), *report.rows()])
    print(report.verdict)
    if output:
        output.write_text(json.dumps(report.to_dict(), indent=1))
    if not report.passed:
        raise typer.Exit(1)


@command
def mcmc(
    flow: FlowFile,
    output: Output = Path("runs/mcmc"),
    system: System = "alanine-dipeptide",
    iterations: Annotated[int, typer.Option(help="Iterations of dynamics and flow move.")] = 1000,
    md_steps: Annotated[int, typer.Option(help="Langevin steps per iteration.")] = 250,
    n_proposals: Annotated[int, typer.Option(help="1: Metropolis-Hastings; more: i-SIR.")] = 1,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """An openmmtools chain of Langevin dynamics and flow moves: a DCD trajectory and statistics.

    Example: openmm-regflow mcmc systems/alanine-dipeptide/flow.safetensors --iterations 1000 --output runs/mcmc
    """
    from openmm_regflow.chains import run_chain, write_trajectory
    from openmm_regflow.moves import FlowMove

    _, mol, proposal = open_proposal(flow, system, "cpu")
    settings = {"flow": str(flow), "system": system, "iterations": iterations, "md_steps": md_steps, "seed": seed}
    prepare_output(output, "mcmc", settings | {"n_proposals": n_proposals}, overwrite)
    with bars() as bar:
        trace = run_chain(
            mol,
            FlowMove(proposal, n_proposals=n_proposals),
            n_iterations=iterations,
            n_md_steps=md_steps,
            seed=seed,
            progress=bar("chain", iterations),
        )
    write_trajectory(output / "chain.dcd", trace.positions, mol.topology)
    (output / "statistics.json").write_text(json.dumps(trace.statistics, indent=1))
    finish_output(output)
    print("  ".join(f"{k} {v:.4g}" for k, v in trace.statistics.items()))
    print(f"wrote {output / 'chain.dcd'}")


@command
def tfep(
    source: Annotated[Path, typer.Argument(help="A states file (.toml), or a flow file (.safetensors).")],
    output: Output = Path("runs/tfep"),
    system: System = "alanine-dipeptide",
    n: Annotated[int, typer.Option("-n", help="Flow samples.")] = 20_000,
    seed: Annotated[int | None, typer.Option(help="Seed; default the states file's, or 0.")] = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Free energy difference by targeted perturbation, with pymbar.

    Of the two states that a TOML file describes, with their trajectories; or, given a flow, of the basins phi > 0 and
    phi < 0 of its system.

    Example: openmm-regflow tfep states.toml --output runs/tfep
    """
    if source.suffix == ".toml":
        from openmm_regflow.tfep import load_states, run_states

        config = load_states(source)
        config = config if seed is None else config.model_copy(update={"seed": seed})
        prepare_output(output, "tfep", config.model_dump(mode="json"), overwrite)
        result = run_states(config, source.parent, output)
    else:
        import torch

        from openmm_regflow.demo import basin_tfep

        seed = seed or 0
        _, mol, proposal = open_proposal(source, system, device)
        prepare_output(output, "tfep", {"flow": str(source), "system": system, "n": n, "seed": seed}, overwrite)
        batch = proposal.sample(n, torch.Generator(device=proposal.device).manual_seed(seed))
        result = basin_tfep(batch, proposal, mol, seed)
        (output / "tfep.json").write_text(json.dumps(result.to_dict(), indent=1))
    finish_output(output)
    print(result)
    print(f"without a map: {'no overlap' if result.plain is None else result.plain}")
    print(result.verdict)


@command
def benchmark(
    what: Annotated[str, typer.Argument(help="speed, or paper: the table of the RegFlow paper.")] = "speed",
    system: Annotated[str, typer.Option("--system", help="Name or folder; paper: several, with commas.")] = (
        "alanine-dipeptide"
    ),
    n: Annotated[int | None, typer.Option("-n", help="Samples; default 4096 for speed, 10000 for paper.")] = None,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="speed: JSON file; paper: folder.")] = None,
    seconds: Annotated[float, typer.Option(help="paper: training time of each run, teacher and pairs included.")] = 600,
    seeds: Annotated[int, typer.Option(help="paper: runs of each row.")] = 3,
    ablations: Annotated[bool, typer.Option("--ablations", help="paper: regularisers and numbers of pairs.")] = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="paper: any setting, e.g. hidden=64.")] = None,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Speed on this machine: energies per second of each potential, samples and densities per second of each flow.

    With "paper": architectures x ways of training, each run with the same budget; finished runs are not run again.

    Example: openmm-regflow benchmark --system alanine-dipeptide

    Example: openmm-regflow benchmark paper --seconds 60 --seeds 3 --output runs/paper
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    if what == "paper":
        given = {"systems": system.split(","), "seconds": seconds, "seeds": seeds, "ablations": ablations}
        _paper(output or Path("runs/paper"), given | ({"n": n} if n else {}), settings or [], device)
        return
    if what != "speed":
        raise InputError(f"unknown benchmark {what!r}; known: speed, paper")
    from openmm_regflow.demo import speed_table
    from openmm_regflow.device import resolve_device
    from openmm_regflow.systems import load_system

    n = n or 4096
    rows = speed_table(load_system(system), n, resolve_device(device), seed)
    show_table(f"{system}, {n} samples, {torch.get_num_threads()} threads, {device}", [("what", "per second"), *rows])
    if output:
        output.write_text(json.dumps(dict(rows), indent=1))


def _paper(output: Path, given: dict[str, Any], settings: list[str], device: str) -> None:
    from openmm_regflow.device import resolve_device
    from openmm_regflow.paper import load_config, run_table

    config = load_config(given, settings)
    with bars() as bar:
        progress: list[Any] = []

        def report(name: str, done: int, total: int) -> None:
            progress[:] = progress or [bar("runs", total)]
            progress[0](done, total, {})
            if name:
                print(f"{name} ({done + 1} of {total})", flush=True)

        rows = run_table(output, config, device=resolve_device(device), report=report)
    show_table(f"{config.seconds:g} s of training per run", rows)
    print(f"wrote {output / 'table.md'} and {output / 'table.csv'}")


@command
def doctor() -> None:
    """What to send with a bug report: versions, platforms, devices, and whether results agree; exit code 1 if not.

    Example: openmm-regflow doctor
    """
    from openmm_regflow.doctor import platform_rows, version_rows

    show_table("Versions and devices", [("what", "found"), *version_rows()])
    rows, fine = platform_rows()
    show_table("OpenMM platforms on alanine dipeptide, positions by way of the host", rows)
    if not fine:
        _fail("error: a platform disagrees with the batched potential; choose another with platform=...", 1)


@command
def demo(
    output: Output = Path("demo"),
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Use the shipped flow; under 90 s.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """The whole job on alanine dipeptide: train, sample, reweight, move a chain, a free energy, a report.

    Example: openmm-regflow demo --pretrained --output demo
    """
    from openmm_regflow.demo import Monitor, run_demo
    from openmm_regflow.device import resolve_device

    resolve_device(device)
    prepare_output(output, "demo", {"pretrained": pretrained, "seed": seed}, overwrite)
    began = time.monotonic()
    with bars() as bar:
        monitor = Monitor(say=lambda text: print(text, flush=True), bar=bar)
        result = run_demo(output, pretrained=pretrained, seed=seed, device=device, monitor=monitor)
    finish_output(output)
    for title, rows in result.tables:
        show_table(title, rows)
    for name, verdict in result.verdicts.items():
        print(f"{name}: {verdict}")
    print(f"report: {output / 'report.html'}  ({time.monotonic() - began:.0f} s)")
