"""What every command shares: errors as one line, progress bars, output folders, tables."""

import functools
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openmm_regflow._version import __version__
from openmm_regflow.allocation import keep_freed_memory
from openmm_regflow.errors import InputError, RegflowError, complaints

if TYPE_CHECKING:
    import numpy as np

    from openmm_regflow.systems import MolecularSystem, Split

app = typer.Typer(
    name="openmm-regflow",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """Normalizing flows trained by regression (RegFlow) as proposal generators for OpenMM."""


Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of every random number.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, or auto.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the results of a finished run in the folder.")]
System = Annotated[
    str | None,
    typer.Option("--system", help="Name of a system or path of a system folder; default: the one the flow names."),
]
FlowFile = Annotated[Path, typer.Argument(help="A flow file (.safetensors), or that of a mixture.")]

RUN_FILE = "run.json"


def one_of_several() -> bool:
    """Whether this process is one of a ``torchrun`` job (as `ranks.job` sees it, without the import of torch)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose errors become one line and an exit code."""

    @functools.wraps(function)
    def guarded(*arguments: Any, **options: Any) -> None:
        keep_freed_memory()
        formerly, warnings.formatwarning = warnings.formatwarning, _warning_line
        try:
            function(*arguments, **options)
        except RegflowError as error:
            fail(f"error: {' '.join(str(error).split())}", 2)
        except OSError as error:
            fail(f"error: {error}; check the path, its permissions and the free space", 2)
        except KeyboardInterrupt as interrupt:
            fail(f"interrupted; the same command {str(interrupt) or 'begins anew'}", 130)
        except Exception as error:  # torch and OpenMM name the troubles of a GPU by text alone
            from pydantic import ValidationError

            from openmm_regflow.device import memory_line

            if isinstance(error, ValidationError):
                fail(f"error: {complaints(error)}", 2)
            if _exploded(error):
                fail("error: the dynamics exploded; take a shorter time step, or start from a lower energy", 2)
            line = memory_line(error)
            if line is None:
                raise
            if options.get("device") != "auto" or one_of_several():  # the others wait for this one
                fail(f"error: {line}", 2)
            print(f"{line.split(';')[0]}: going on on the CPU", file=sys.stderr)
            guarded(*arguments, **options | {"device": "cpu"})
        finally:
            warnings.formatwarning = formerly

    return app.command()(guarded)


def _warning_line(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
    """A warning as users of the command line read it: without the line of code that gave it."""
    return f"warning: {' '.join(str(message).split())}\n"


def _exploded(error: Exception) -> bool:
    """Whether OpenMM or openmmtools (SimulationNaNError and its kin) met a number that is none."""
    return "NaN" in type(error).__name__ or "coordinate is NaN" in str(error)


@contextmanager
def resumable(kept: bool = True) -> Iterator[None]:
    """A command, or a part of one, that goes on from what it has ``kept`` in its folder: says so when interrupted."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("goes on from what it wrote last" if kept else "begins anew") from interrupt


def fail(line: str, code: int) -> None:
    """Print one line to standard error and end with an exit code."""
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
                    console.print(f"{name}: {done}/{total}  {text}", highlight=False, soft_wrap=True)
                    last[0] = time.monotonic()

            return update

        yield open_bar


def report_of(output: Path | None, *inputs: Path) -> None:
    """Refuse a file for a report, before anything is computed, that is a folder or what the command reads.

    Raises:
        InputError: naming it.
    """
    if output is None:
        return
    if output.is_dir():
        raise InputError(f"{output} is a folder; --output names the JSON file that is to be written")
    if any(output.exists() and path.exists() and output.samefile(path) for path in inputs):
        raise InputError(f"{output} is what the command reads; --output would replace it, name another file")


@contextmanager
def output_of(folder: Path, command: str, settings: dict[str, Any], overwrite: bool) -> Iterator[None]:
    """The folder of one run: made, or that of an interrupted run of the same settings; finished when the block ends.

    A run that was refused before it computed anything leaves a folder that any other may have. Two processes never
    write one folder. Paths among the settings are those of the same files, however they are spelled. What is replaced
    was made by the same command and holds nothing that this one reads.

    Raises:
        InputError: not writable, holding something else, a run of another command or of other settings, or what is to
            be read; or written by another process.
        CorruptFileError: what a run left there is damaged.
    """
    from openmm_regflow.files import read_json, write_json

    marker = folder / RUN_FILE
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not marker.is_file())):
        raise InputError(f"{folder} exists and holds other things; choose an empty or new folder with --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error}; choose a writable --output") from error
    with locked(folder):
        _prepare(folder, {"command": command, "settings": _located(settings)}, overwrite)
        yield
        write_json(marker, read_json(marker, "give the command again") | {"finished": True})


@contextmanager
def extendable(folder: Path) -> Iterator[None]:
    """The folder of a simulation, which may always go on: made, or that of an earlier one; held while the block runs.

    Raises:
        InputError: not writable, holding something else, or written by another process.
        CorruptFileError: what a run left there is damaged.
    """
    from openmm_regflow.files import read_json
    from openmm_regflow.simulate import writable_folder

    record = writable_folder(folder) / RUN_FILE
    other = any(folder.iterdir()) and not record.is_file()
    if other or (record.is_file() and "command" in read_json(record, "choose another --output")):
        raise InputError(f"{folder} exists and holds other things; choose an empty or new folder with --output")
    with locked(folder):
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuse a folder that another process holds; the system lets go of it when a process ends, however it ends.

    Raises:
        InputError: another process is at work there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise InputError(f"another process is at work in {folder}; wait for it, or choose another --output") from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a child process may hold the handle, too
        os.close(handle)


def _located(settings: Any) -> Any:
    """Settings whose paths are absolute."""
    if isinstance(settings, dict):
        return {name: _located(value) for name, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [_located(value) for value in settings]
    return str(Path(settings).resolve()) if isinstance(settings, str) and Path(settings).exists() else settings


def _strings(settings: Any) -> Iterator[str]:
    if isinstance(settings, dict | list):
        for value in settings.values() if isinstance(settings, dict) else settings:
            yield from _strings(value)
    elif isinstance(settings, str):
        yield settings


def _prepare(folder: Path, wanted: dict[str, Any], overwrite: bool) -> None:
    """Begin a run in its folder, or go on with it."""
    from openmm_regflow.files import read_json, write_json

    marker = folder / RUN_FILE
    if marker.is_file():
        found = read_json(marker, "remove the folder or choose another --output")
        if found.get("finished") and not overwrite:
            raise InputError(f"{folder} holds a finished run; choose another --output or give --overwrite")
        differing = _differing(_located({k: found.get(k) for k in wanted}), wanted)
        if differing and not overwrite and _begun(folder):
            raise InputError(
                f"{folder} holds a run that is not finished, of other settings ({', '.join(differing)}); choose "
                "another --output, or go on with that run by its own settings"
            )
        if found.get("finished") or differing:
            if _begun(folder) and found.get("command") != wanted["command"]:
                made = f"`{found['command']}`" if found.get("command") else "another command"
                raise InputError(f"{folder} holds what {made} made, which is not replaced; choose another --output")
            inside = [text for text in _strings(wanted) if Path(text).resolve().is_relative_to(folder.resolve())]
            if any(Path(text).exists() for text in inside):
                raise InputError(f"{inside[0]} lies in the folder for the results; choose another --output")
            _clear(folder)
    write_json(marker, wanted | {"finished": False})


def _differing(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of the settings that two runs do not share; that of a section where it holds settings of its own."""
    if not isinstance(found.get("settings"), dict) or found["command"] != wanted["command"]:
        return ["command"]
    one, other = found["settings"], wanted["settings"]
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def _begun(folder: Path) -> bool:
    """Whether a folder holds more than what says which run it is of."""
    return any(path.is_file() and path.name not in (RUN_FILE, "config.json") for path in folder.rglob("*"))


def _clear(folder: Path) -> None:
    import shutil

    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def use_platform(device: str) -> str | None:
    """OpenMM's platform beside the torch device: CUDA on a GPU, on the same one and in mixed precision by default.

    Returns:
        None on the CPU, where the right platform depends on the System; and for "auto" where OpenMM has none for CUDA,
        which is said.

    Raises:
        InputError: a GPU was asked for that OpenMM cannot use.
    """
    import openmm

    from openmm_regflow.device import memory_line, openmm_properties, resolve_device

    where = resolve_device(device)
    if where.type != "cuda":
        return None
    try:
        platform = openmm.Platform.getPlatformByName("CUDA")
    except openmm.OpenMMException as error:
        line = memory_line(error) or str(error)
        if device != "auto":
            raise InputError(line) from error
        print(f"{line.split(':')[0]}: its part goes on on the CPU", file=sys.stderr)
        return None
    # As defaults of the platform: openmmtools and others make Contexts by its name alone.
    for name, value in openmm_properties("CUDA", where).items():
        platform.setPropertyDefaultValue(name, value)
    return "CUDA"


def platform_of_dynamics(device: str, system: Any) -> str:
    """OpenMM's platform for dynamics of a System: that of the GPU, or the faster one of CPUs."""
    from openmm_regflow.potentials import small_platform

    return use_platform(device) or small_platform(system) or "CPU"


def given_frames(molecule: "MolecularSystem", data: Path | None, split: "Split") -> "np.ndarray":
    """Frames `(m, n_atoms, 3)` [nm] of the trajectory that was given, or of the system's own split."""
    return molecule.load_trajectory(data) if data else molecule.reference(split)


def open_proposal(flow_file: Path, system: str | None, device: str) -> tuple[str, Any, Any]:
    """(system, molecule, proposal) for a flow file and a system; flow and energies on the device.

    Without a system it is the one that the flow names; it must be the very one in either case.
    """
    from openmm_regflow.device import resolve_device
    from openmm_regflow.errors import IncompatibleFlowError, InputError
    from openmm_regflow.mixtures import load_flow
    from openmm_regflow.proposals import FlowProposal
    from openmm_regflow.systems import load_system

    flow = load_flow(flow_file, resolve_device(device))
    name = system or flow.metadata.system
    if name is None:
        raise InputError(f"{flow_file} names no system; give --system")
    try:
        molecule = load_system(name)
    except InputError as error:
        if system is not None:
            raise
        raise InputError(
            f"{flow_file} is a flow of {flow.metadata.system}, which is no shipped system; give its folder by --system"
        ) from error
    potential = _potential(molecule.system, device)
    try:
        proposal = FlowProposal(flow, potential, molecule.temperature)
    except IncompatibleFlowError as error:
        if flow.metadata.system in (None, molecule.name):
            raise
        raise IncompatibleFlowError(
            f"{flow_file} is a flow of {flow.metadata.system}, and --system is {system}; give its own system ({error})"
        ) from error
    return name, molecule, proposal


def _potential(system: Any, device: str) -> Any:
    """Energies on the device: in torch on a GPU, by OpenMM on the CPU and for forces that have no torch form."""
    from openmm_regflow.device import resolve_device
    from openmm_regflow.errors import UnsupportedForceError
    from openmm_regflow.potentials import OpenMMPotential, TorchPotential, cpu_platform

    where = resolve_device(device)
    if where.type == "cpu":
        return OpenMMPotential(system, cpu_platform(system))
    try:
        return TorchPotential(system, device=where)
    except UnsupportedForceError:
        return OpenMMPotential(system, use_platform(device))


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
