"""The paper's table: runs that are missing, means over seeds with errors, plots of the trend with the budget."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_regflow import plots
from openmm_regflow.errors import IncompatibleFlowError, warn_once
from openmm_regflow.files import read_json, write_json, write_text
from openmm_regflow.paper.design import Cell, PaperConfig, cells, settings
from openmm_regflow.paper.runs import ABSURD, run_cell, target_of
from openmm_regflow.systems import MolecularSystem, load_system

Rows = list[tuple[str, ...]]
DAMAGED = "remove it, and the run is made again"
#: (name of the run, runs done, runs in total)
Report = Callable[[str, int, int], None]


def run_table(
    folder: Path, config: PaperConfig, *, device: torch.device | str = "cpu", report: Report | None = None
) -> Rows:
    """Every run that is not yet in the folder, then the table of all: ``table.csv`` and ``table.md``, and plots.

    Args:
        folder: one JSON (and for seed 0 a Ramachandran plot) per finished run; several budgets may lie in it.
        config: budget and sizes.
        device: of networks and energies.
        report: called before each run and at the end.

    Returns:
        the table of every run in the folder, its first row the header.

    Raises:
        InputError: an unknown system, or one without reference data.
        IncompatibleFlowError: the folder holds runs of other settings, of another System of that name, or of a GPU
            where these are of a CPU.
    """
    wanted = list(cells(config))
    molecules = {name: load_system(name) for name in config.systems}
    for molecule in molecules.values():
        for split in ("train", "validation", "test"):
            molecule.reference(split)
    folder.mkdir(parents=True, exist_ok=True)
    records = {cell: _finished(folder, cell, config, molecules[cell.system], device) for cell in wanted}
    for done, cell in enumerate(wanted):
        if report:
            report(cell.name, done, len(wanted))
        if records[cell] is None:
            record, drawing = run_cell(cell, config, device)
            if drawing is not None:
                plots.save(drawing, folder / f"{cell.name}.png")
            write_json(folder / f"{cell.name}.json", record)
            records[cell] = record
            if "failed" in record:
                warn_once(f"{cell.name} failed: {record['failed']}")
            write_table(folder, _all_finished(folder), config)
    if report:
        report("", len(wanted), len(wanted))
    return render(folder, config)


def render(folder: Path, config: PaperConfig) -> Rows:
    """Table and plots of every run in the folder, whatever the configuration asks for."""
    records = _all_finished(folder)
    rows = write_table(folder, records, config)
    for system in sorted({record["cell"]["system"] for record in records}):
        drawing = plot_trends(records, system)
        if drawing is not None:
            plots.save(drawing, folder / f"{system}-trends.png")
    return rows


def _all_finished(folder: Path) -> list[dict[str, Any]]:
    """Every run in the folder, those of earlier calls too: more seeds for one system, more systems for one seed."""
    records = [read_json(path, DAMAGED) for path in sorted(folder.glob("*-seed*.json"))]
    keys = ("system", "architecture", "method", "variant", "seconds", "seed")
    return sorted(records, key=lambda record: [record["cell"][key] for key in keys])


def _finished(
    folder: Path, cell: Cell, config: PaperConfig, molecule: MolecularSystem, device: torch.device | str
) -> dict[str, Any] | None:
    path = folder / f"{cell.name}.json"
    if not path.is_file():
        return None
    record = read_json(path, DAMAGED)
    differing = [k for k, v in settings(config).items() if record["config"].get(k) != v]
    target = target_of(molecule)  # a record of an earlier version does not name it
    differing += [k for k, v in target.items() if record.get("target", target)[k] != v]
    # Seconds are those of a processor on a CPU and of the clock on a GPU: no row may hold both.
    differing += ["type of device"] * (torch.device(record["device"]).type != torch.device(device).type)
    if differing:
        raise IncompatibleFlowError(f"{path} was run with another {', '.join(differing)}; choose another --output")
    return record


#: header -> (key of the record, parts of nested records joined by dots; factor)
COLUMNS: dict[str, tuple[str, float]] = {
    "E-W1 [kT]": ("e_w1", 1.0),
    "E-W1 reweighted [kT]": ("e_w1_reweighted", 1.0),
    "T-W2 [rad]": ("t_w2", 1.0),
    "T-W2 reweighted [rad]": ("t_w2_reweighted", 1.0),
    "ESS [%]": ("ess", 100.0),
    "ESS without top 0.2 % [%]": ("ess_truncated", 100.0),
    "n of weights": ("n_weights", 1.0),
    "median u above reference [kT]": ("median_excess", 1.0),
    "clashes [%]": ("clashes", 100.0),
    "wrong chirality [%]": ("wrong_chirality", 100.0),
    "ΔF(φ) [kT]": ("delta_f_phi", 1.0),
    "ΔF(φ) reweighted [kT]": ("delta_f_phi_reweighted", 1.0),
    "ΔF(φ) reference [kT]": ("delta_f_phi_reference", 1.0),
    "own teacher: E-W1 [kT]": ("teacher.e_w1", 1.0),
    "own teacher: T-W2 [rad]": ("teacher.t_w2", 1.0),
    "own teacher: ESS [%]": ("teacher.ess", 100.0),
    "own teacher: ΔF(φ) [kT]": ("teacher.delta_f_phi", 1.0),
    "own teacher: ΔF(φ) reweighted [kT]": ("teacher.delta_f_phi_reweighted", 1.0),
    "round trip rms": ("round_trip_rms", 1.0),
    "round trip max": ("round_trip_max", 1.0),
    "bits": ("bits", 1.0),
    "pairs": ("n_pairs", 1.0),
    "training [s]": ("training_seconds", 1.0),
    "200k likelihoods [s] (scaled)": ("seconds_200k", 1.0),
}


#: What stands in ``table.md``; ``table.csv`` has every column.
SHORT = (
    "system", "architecture", "method", "variant", "budget [s]", "seeds", "E-W1 [kT]", "T-W2 [rad]", "clashes [%]",
    "wrong chirality [%]", "ESS [%]", "ESS without top 0.2 % [%]", "n of weights", "ΔF(φ) [kT]",
    "ΔF(φ) reweighted [kT]", "own teacher: E-W1 [kT]", "own teacher: T-W2 [rad]", "own teacher: ΔF(φ) [kT]",
    "own teacher: ΔF(φ) reweighted [kT]", "round trip max", "bits", "pairs", "training [s]",
    "200k likelihoods [s] (scaled)",
)  # fmt: skip


def table(records: list[dict[str, Any]]) -> Rows:
    """Means over seeds with their standard errors; "–" where a figure is not defined, failures counted.

    A figure that some of the seeds lack (a free energy of a basin that they lost) has their number beside it: it is a
    mean over those that did well. Of a single seed the error is that of the figure itself, where it has one.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(Cell(**record["cell"]).row, []).append(record)
    rows: Rows = [("system", "architecture", "method", "variant", "budget [s]", "seeds", *COLUMNS)]
    for key, runs in groups.items():
        done = [r for r in runs if "failed" not in r]
        failed = len(runs) - len(done)
        seeds = f"{len(runs)}" + (f" ({failed} failed)" if failed else "")
        rows.append((*key, seeds, *(_cell(done, *column) for column in COLUMNS.values())))
    return rows


def mean(runs: list[dict[str, Any]], key: str, factor: float = 1.0) -> tuple[float | None, float | None]:
    """Mean over runs and its standard error; of one run its own error; None where there is none.

    What all runs share, a figure of the reference or a setting, has its own error too: no seed had a part in it.
    """
    found = [pair for run in runs if (pair := _value(run, key)) is not None]
    if not found:
        return None, None
    values = [factor * value for value, _ in found]
    if len(set(values)) > 1:
        return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
    error = found[0][1]
    return values[0], None if error is None else factor * error


def _value(run: dict[str, Any], key: str) -> tuple[float, float | None] | None:
    """A figure of a run and its own error, which stands beside it or under the name with _error."""
    *folders, name = key.split(".")
    for folder in folders:
        run = run.get(folder) or {}
    value = run.get(name)
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return float(value[0]), float(value[1])
    error = run.get(f"{name}_error")
    return float(value), None if error is None else float(error)


def _cell(runs: list[dict[str, Any]], key: str, factor: float = 1.0) -> str:
    """Mean of a figure, and how many of the runs have it, if not all."""
    n = sum(_value(run, key) is not None for run in runs)
    return _words(*mean(runs, key, factor)) + (f" ({n} of {len(runs)})" if 0 < n < len(runs) else "")


def _words(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


#: Panels of the plots of metrics against the budget: key of the record -> label of the axis, logarithmic
TRENDS = {
    "e_w1": ("E-W1 [kT]", True),
    "t_w2": ("T-W2 [rad]", False),
    "clashes": ("clashes", False),
    "ess_truncated": ("ESS without top 0.2 %", True),
}


def plot_trends(records: list[dict[str, Any]], system: str) -> Any:
    """Metrics of one system against the budget, one line for each architecture and method; the ablations left out.

    Returns:
        a matplotlib figure, or None with fewer than two budgets.
    """
    mine = [r for r in records if r["cell"]["system"] == system and not r["cell"]["variant"]]
    budgets = sorted({r["cell"]["seconds"] for r in mine})
    if len(budgets) < 2:
        return None
    lines = sorted({(r["cell"]["architecture"], r["cell"]["method"]) for r in mine})
    panels = {}
    for key, (label, logarithmic) in TRENDS.items():
        curves = {f"{a} {m}": _curve(mine, (a, m), budgets, key) for a, m in lines}
        panels[label] = (curves, logarithmic)
    return plots.trends(panels, label="budget [s]", title=system)


def _curve(
    records: list[dict[str, Any]], line: tuple[str, str], budgets: list[float], key: str
) -> list[tuple[float, float, float]]:
    """(budget, mean, error) where there are figures."""
    points = []
    for budget in budgets:
        runs = [
            r for r in records
            if (r["cell"]["architecture"], r["cell"]["method"]) == line and r["cell"]["seconds"] == budget
        ]  # fmt: skip
        value, error = mean(runs, key)
        if value is not None:
            points.append((budget, value, error or 0.0))
    return points


def equal_times(records: list[dict[str, Any]], key: str = "e_w1") -> Rows:
    """How long regression takes to what maximum likelihood of the same architecture reached at its best.

    Between two budgets the figure is taken as a power of the time. A curve that is there at its first budget, or at
    none, gives a bound.

    Args:
        records: runs of several budgets; ablations are left out.
        key: figure that is to become small.

    Returns:
        rows, the first one the header; none without likelihood or with a single budget.
    """
    label = next(header for header, (name, _) in COLUMNS.items() if name == key)
    curves: dict[tuple[str, str], dict[str, list[tuple[float, float, float]]]] = {}
    mine = [r for r in records if not r["cell"]["variant"]]
    budgets = sorted({r["cell"]["seconds"] for r in mine})
    for system, architecture, method in sorted({tuple(Cell(**r["cell"]).row[:3]) for r in mine}):
        runs = [r for r in mine if r["cell"]["system"] == system]
        points = _curve(runs, (architecture, method), budgets, key)
        curves.setdefault((system, architecture), {})[method] = points
    rows: Rows = []
    for (system, architecture), found in curves.items():
        likelihood = found.pop("mle", [])
        if len(budgets) < 2 or not likelihood:
            continue
        best, value, _ = min(likelihood, key=lambda point: point[1])
        for method, points in found.items():
            if not points:  # all its runs failed
                continue
            bound, seconds = _reached(points, value)
            words = (f"{bound}{seconds:.3g}", f"{bound}{100 * seconds / best:.3g} %")
            rows.append((system, architecture, f"{value:.4g}", f"{best:g}", method, *words))
    header = ("system", "architecture", f"{label} of MLE", "after [s]", "by", "after [s]", "of the time of MLE")
    return [header, *rows] if rows else []


def _reached(points: list[tuple[float, float, float]], value: float) -> tuple[str, float]:
    """("", "≤ " or "> ", seconds) at which a curve of (seconds, figure, error) is at the value or below."""
    below = [k for k, (_, figure, _) in enumerate(points) if figure <= value]
    if not below:
        return "> ", points[-1][0]
    if not below[0]:
        return "≤ ", points[0][0]
    (t0, f0, _), (t1, f1, _) = points[below[0] - 1 : below[0] + 1]
    return "", t0 * (t1 / t0) ** (math.log(f0 / value) / math.log(f0 / f1))


def write_table(folder: Path, records: list[dict[str, Any]], config: PaperConfig) -> Rows:
    """Write ``table.csv`` with every column, whose rows it returns, and ``table.md`` with the main ones, explained."""
    rows = table(records)
    with open(folder / "table.csv", "w", newline="") as handle:
        csv.writer(handle).writerows(rows)
    kept = [k for k, header in enumerate(rows[0]) if header in SHORT]
    lines = _markdown([tuple(row[k] for k in kept) for row in rows])
    notes = (
        "Cartesian coordinates. The budget is the training time of a run, teacher and pairs included (a fixed number "
        "of pairs takes what it takes), in seconds of processor time on a CPU. Mean ± standard error over seeds; of a "
        "single seed the error of the figure itself, where it has one. Weighted figures are from `n of weights` "
        f"samples, the others from {config.n}; T-W2 between {config.torsion_points} points. Clashes are samples above "
        f"{ABSURD:g} kT; E-W1 takes them as {ABSURD:g} kT. `bits`: precision in which a flow is kept, 64 where its map "
        "is too steep for 32. The time for 200k likelihoods is measured on `n of weights` samples and scaled."
    )
    if times := equal_times(records):
        heading = "Training time to the E-W1 that maximum likelihood of the same architecture reached at its best:"
        notes = "\n".join([notes, "", heading, "", *_markdown(times)])
    write_text(folder / "table.md", "\n".join([*lines, "", notes, ""]))
    return rows


def _markdown(rows: Rows) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]
