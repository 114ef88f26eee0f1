"""This machine: ``benchmark``, ``doctor``, ``demo``."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from openmm_regflow.cli.shell import (
    Device,
    Output,
    Overwrite,
    Seed,
    bars,
    command,
    fail,
    output_of,
    report_of,
    resumable,
    show_table,
)
from openmm_regflow.errors import InputError

#: Of the paper's table, on the screen.
PAPER_COLUMNS = ("seeds", "E-W1 [kT]", "T-W2 [rad]", "ESS [%]")


@command
def benchmark(
    what: Annotated[str, typer.Argument(help="speed, or paper: the table of the RegFlow paper.")] = "speed",
    system: Annotated[str, typer.Option("--system", help="Name or folder; paper: several, with commas.")] = (
        "alanine-dipeptide"
    ),
    n: Annotated[int | None, typer.Option("-n", help="Samples; default 4096 for speed, 10000 for paper.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="Torch threads; 0: its own default.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="speed: JSON file; paper: folder.")] = None,
    seconds: Annotated[
        str, typer.Option(help="paper: training time of each run, teacher and pairs included; several with commas.")
    ] = "600",
    seeds: Annotated[int, typer.Option(help="paper: runs of each row.")] = 3,
    ablations: Annotated[str, typer.Option(help="paper: regularisers, pairs, or both with a comma.")] = "",
    settings: Annotated[list[str] | None, typer.Option("--set", help="paper: any setting, e.g. hidden=64.")] = None,
    device: Device = "cpu",
    seed: Annotated[
        int | None, typer.Option(min=0, help="speed: seed of every random number; the runs of paper have 0, 1, ...")
    ] = None,
) -> None:
    """Speed on this machine: energies per second of each potential, samples and densities per second of each flow.

    With "paper": architectures x ways of training, each run with the same budget; finished runs are not run again.

    Example: openmm-regflow benchmark --system alanine-dipeptide

    Example: openmm-regflow benchmark paper --seconds 60,240 --seeds 3 --output runs/paper
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    if what == "paper":
        if seed is not None:
            raise InputError("the runs of the paper's table have the seeds 0, 1, ...; say how many with --seeds")
        given = {"systems": system.split(","), "seconds": seconds.split(","), "seeds": seeds}
        given |= {"ablations": ablations.split(",") if ablations else []}
        _paper(output or Path("runs/paper"), given | ({"n": n} if n else {}), settings or [], device)
        return
    if what != "speed":
        raise InputError(f"unknown benchmark {what!r}; known: speed, paper")
    from openmm_regflow.device import resolve_device
    from openmm_regflow.files import write_json
    from openmm_regflow.speed import speed_table
    from openmm_regflow.systems import load_system

    report_of(output)
    n = n or 4096
    rows = speed_table(load_system(system), n, resolve_device(device), seed or 0)
    show_table(f"{system}, {n} samples, {torch.get_num_threads()} threads, {device}", [("what", "per second"), *rows])
    if output:
        write_json(output, dict(rows))


@resumable()
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
    # What identifies a run in one column, and the figures that fit beside it; the files have all.
    shown = [rows[0].index(header) for header in PAPER_COLUMNS]
    narrow = [(" ".join(filter(None, row[:5])), *(row[k] for k in shown)) for row in rows[1:]]
    show_table("One budget of training for every run", [("run, budget [s]", *PAPER_COLUMNS), *narrow])
    print(f"every figure: {output / 'table.md'} and {output / 'table.csv'}")


@command
def doctor(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the same tables.")] = None,
) -> None:
    """What to send with a bug report: versions, platforms, devices, and whether results agree; exit code 1 if not.

    Example: openmm-regflow doctor --output doctor.json
    """
    from openmm_regflow.doctor import platform_rows, torch_rows, transfer_rows, version_rows
    from openmm_regflow.files import write_json

    report_of(output)
    versions = [("what", "found"), *version_rows()]
    show_table("Versions and devices", versions)
    rows, fine = platform_rows()
    show_table("OpenMM platforms on alanine dipeptide", rows)
    devices, same = torch_rows()
    show_table("TorchPotential against OpenMM's Reference platform, alanine dipeptide", devices)
    ways, unchanged = transfer_rows()
    show_table("Positions between an OpenMM Context and torch", ways)
    if output:
        tables = {"platforms": rows, "torch": devices, "positions": ways}
        record: dict[str, Any] = {name: [dict(zip(t[0], row)) for row in t[1:]] for name, t in tables.items()}
        found = {"versions": {row[0]: row[1] for row in versions[1:]}, "agrees": fine and same and unchanged}
        write_json(output, found | record)
    if not unchanged:
        fail("error: positions come back changed; use way='host', and send this output with a bug report", 1)
    if not same:
        fail("error: TorchPotential disagrees with OpenMM on a device; use another, and send this output", 1)
    if not fine:
        fail("error: a platform disagrees with the batched potential; choose another with platform=...", 1)


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
    began = time.monotonic()
    settings = {"pretrained": pretrained, "seed": seed}
    with output_of(output, "demo", settings, overwrite), resumable(not pretrained), bars() as bar:
        monitor = Monitor(say=lambda text: print(text, flush=True), bar=bar)
        result = run_demo(output, pretrained=pretrained, seed=seed, device=device, monitor=monitor)
    for title, rows in result.tables:
        show_table(title, rows)
    for name, verdict in result.verdicts.items():
        print(f"{name}: {verdict}")
    print(f"report: {output / 'report.html'}  ({time.monotonic() - began:.0f} s)")
