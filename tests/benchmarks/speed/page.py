"""The tables of docs/speed.md, written between markers, and its bar chart; the words around them are the author's."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from openmm_regflow import plots

Rows = Iterable[Iterable[str]]


def write(found: dict[str, Any], page: Path, chart: Path) -> None:
    """Replace every table of the page whose part has been measured."""
    text = page.read_text()
    for name, table in TABLES.items():
        part = PARTS_OF.get(name, name)
        if part == "conditions" or part in found:
            text = between(text, name, table(found if part == "conditions" else found[part]))
    page.write_text(text)
    if "pipeline" in found:
        plots.save(bar_chart(found["pipeline"]), chart)


def between(text: str, name: str, content: str) -> str:
    """The text with what stands between the markers of a table replaced.

    Raises:
        KeyError: no such markers.
    """
    pattern = re.compile(rf"(<!-- {re.escape(name)}: begin -->\n).*?(<!-- {re.escape(name)}: end -->)", re.DOTALL)
    if not pattern.search(text):
        raise KeyError(f"the page has no markers for {name!r}")
    return pattern.sub(lambda found: found[1] + content + found[2], text)


def markdown(header: Iterable[str], rows: Rows) -> str:
    """A Markdown table."""
    lines = [list(header), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: float) -> str:
    """Three digits, with separators."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def conditions(found: dict[str, Any]) -> str:
    """Where, when, with what; parts that were measured at another time say so."""
    first = next(iter(found.values()))["conditions"]
    of_all: dict[str, set[str]] = {}  # a part knows the versions of what was installed when it ran
    for part in found.values():
        for name, v in part["conditions"]["versions"].items():
            of_all.setdefault(name, set()).add(v)
    versions = ", ".join(f"{name} {' and '.join(sorted(v))}" for name, v in of_all.items())
    loads = [part["conditions"]["load average at the start"] for part in found.values()]
    commits = sorted({part["conditions"]["commit"] for part in found.values()})
    minutes = sum(part["wall seconds of this part"] for part in found.values()) / 60
    return (
        f"{first['processor']} ({first['vector instructions']}), {first['cores']} cores, no GPU; {versions}; "
        f"{first['date']}, commit {', '.join(commits)}. Load average while it ran: {min(loads):g} to {max(loads):g} "
        f"({minutes:.0f} minutes in all).\n"
    )


def architectures(found: dict[str, Any]) -> str:
    """One table for each architecture."""
    parts = []
    for architecture, rows in found["per second"].items():
        floor = rows["matrix products alone"]
        works = list(floor)
        lines = [
            [name, *(f"{rate[w]:,.0f} ({rate[w] / floor[w]:.2f})" for w in works)]
            for name, rate in sorted(rows.items(), key=lambda item: -item[1][works[0]])
        ]
        parts.append(markdown([f"**{architecture}**", *works], lines))
    return "\n".join(parts)


def two_threads(found: dict[str, Any]) -> str:
    """Samples per second of wall-clock."""
    rows = found["per second"]["spline"]
    floor = rows["matrix products alone"]["sample"]
    lines = [[name, f"{r['sample']:,.0f} ({r['sample'] / floor:.2f})"] for name, r in rows.items()]
    return markdown(["spline, two threads", "samples with log-density per second of wall-clock"], lines)


def likelihoods(found: dict[str, Any]) -> str:
    """Seconds for 200,000 samples."""
    rows = [[f"shipped spline, {way}", "all", f"{s:.2f}", ""] for way, s in found["shipped"].items()]
    for kind, times in found["architectures"].items():
        rows += [[f"{name}, {kind}", "scaled", f"{s:.2f}", ""] for name, s in times.items()]
    cnf, spline = found["cnf"], found["shipped"]["eager, 1 thread"]
    for name in ("dopri5", "10 midpoint steps"):
        detail = f"scaled from {cnf['samples']}, {cnf[name]['evaluations']:.0f} evaluations, {cnf['dtype']}"
        rows.append([f"CNF, {name}", detail, number(cnf[name]["seconds"]), number(cnf[name]["seconds"] / spline)])
    published = ", ".join(f"{k} {v:,g}" for k, v in found["published"].items())
    trip = found["round trip"]
    return (
        markdown(["flow", "how", "seconds", "times the shipped spline, eager, 1 thread"], rows)
        + f"\nThe shipped spline inverts itself to {trip['rms']:.1e} (rms; {trip['largest']:.1e} at most) of a "
        f"standard deviation; that is the tolerance of dopri5. Published, on an accelerator that is not "
        f"named: {published} s.\n"
    )


def training(found: dict[str, Any]) -> str:
    """Steps per second."""
    rows = found["steps per second"]
    works = list(dict.fromkeys(w for row in rows.values() for w in row))
    lines = [[name, *(f"{row[w]:.1f}" if w in row else "" for w in works)] for name, row in rows.items()]
    return markdown([f"steps of {found['batch']} per second", *works], lines)


def energies(found: dict[str, Any]) -> str:
    """Rates and ratios of the potentials."""
    lines = []
    for system, row in ((k, v) for k, v in found.items() if isinstance(v, dict) and "OpenMM" in v):
        engine = row["OpenMM"]
        for kind, rate in row["TorchPotential"].items():
            other = "steps" if kind.endswith("forces") else "energies"
            against = f"{engine[other]:,.0f} {other} ({engine['platform']})"
            lines.append([system, kind, f"{rate['per second']:,.0f}", against, f"{rate['ratio']:.1f}"])
    return markdown(["system", "what", "per second", "OpenMM", "ratio"], lines)


def pipeline(found: dict[str, Any]) -> str:
    """Effective samples per second and microseconds by part."""
    parts = list(found["rows"][0]["microseconds"])
    lines = [
        [r["system"], named(r), *(f"{r['microseconds'][p]:.3g}" for p in parts), f"{r['whole']:.3g}",
         f"{100 * r['ESS']:.1f} %", f"{r['effective samples']:,.0f}"]
        for r in found["rows"]
    ]  # fmt: skip
    header = ["system", "way", *(f"{p} [µs]" for p in parts), "whole [µs]", "ESS", "effective per second"]
    return markdown(header, lines) + beside(found)


def named(row: dict[str, Any]) -> str:
    """The way of a row of the pipeline, with OpenMM's platform where it computed the energies."""
    return f"{row['way']} ({row['platform']})" if "platform" in row else row["way"]


def bar_chart(found: dict[str, Any]) -> Any:
    """Where the time of the pipeline goes."""
    bars = {f"{r['system'].removeprefix('alanine-')}, {named(r)}": r["microseconds"] for r in found["rows"]}
    return plots.stacked(bars, label="CPU time per sample [µs]", title="Reweighting with the shipped flows, one thread")


def growth(found: dict[str, Any]) -> str:
    """Time and memory by number of atoms."""
    times, memory = list(found["rows"][0]["microseconds"]), list(found["rows"][0]["kilobytes"])
    lines = [
        [str(r["atoms"]), *(number(r["microseconds"][t]) for t in times), *(number(r["kilobytes"][m]) for m in memory)]
        for r in found["rows"]
    ]
    e = found["exponents"]
    fitted = [*(e["microseconds"][t] for t in times), *(e["kilobytes"][m] for m in memory)]
    lines.append(["*exponent*", *("–" if value is None else f"{value:.2f}" for value in fitted)])
    return markdown(["atoms", *(f"{t} [µs]" for t in times), *(f"{m} [kB]" for m in memory)], lines) + beside(found)


def beside(found: dict[str, Any]) -> str:
    """Says so where other jobs ran on the machine when a part began."""
    load = found["conditions"]["load average at the start"]
    return f"\nOther jobs ran beside it: load average {load:g} when it began.\n" if load >= 0.5 else ""


def batches(found: dict[str, Any]) -> str:
    """Time by size of the batch, and the million."""
    rows = found["batches"]
    parts = list(rows["1"])
    text = markdown(["batch", *(f"{p} [µs per sample]" for p in parts)],
                    ([f"{int(n):,}", *(number(row[p]) for p in parts)] for n, row in rows.items()))  # fmt: skip
    if m := found.get("million"):
        text += (
            f"\n{m['n']:,} samples with densities, energies and weights in one call (fused, compiled): "
            f"{m['seconds']:.0f} s of CPU time, {m['peak bytes'] / 1e9:.2f} GB at the peak, of which the result is "
            f"{m['bytes of the result'] / 1e9:.2f} GB.\n"
        )
    return text


def allocation(found: dict[str, Any]) -> str:
    """Time by size of the batch, freed memory given back or kept."""
    rows = found["microseconds"]
    lines = [
        [architecture, way, *(number(v) for v in rows[way][architecture].values())]
        for architecture in next(iter(rows.values()))
        for way in rows
    ]
    sizes = next(iter(next(iter(rows.values())).values()))
    return markdown(["density [µs per sample]", "freed memory", *(f"batch {int(n):,}" for n in sizes)], lines)


def processes(found: dict[str, Any]) -> str:
    """Two processes against one."""
    lines = [
        [name, *(number(v) for v in rates.values()), f"{found['ratio'][name]:.2f}"]
        for name, rates in found["per second"].items()
    ]
    return markdown(["per second of wall-clock", "one process", "two", "ratio"], lines) + (
        f"\nOther work had the cores, too: load average {found['load average']:g}.\n"
    )


def limits(found: dict[str, Any]) -> str:
    """Shares of the time by kind of operation."""
    rows = {k: v for k, v in found.items() if isinstance(v, dict) and "milliseconds" in v}
    kinds = [k for k in next(iter(rows.values())) if k != "milliseconds"]
    lines = [[name, f"{r['milliseconds']:.3g}", *(f"{100 * r[k]:.0f} %" for k in kinds)] for name, r in rows.items()]
    return markdown(["what", "ms", *kinds], lines)


def startup(found: dict[str, Any]) -> str:
    """Seconds until the first line is through."""
    rows = {k: v for k, v in found.items() if isinstance(v, dict) and "seconds" in v}
    return markdown(
        ["command", "seconds", "CPU seconds", "prints nothing of its own"],
        ([f"`{name}`" if ("import" in name and "," not in name) or "--" in name else name, f"{r['seconds']:.2f}",
          f"{r['CPU seconds']:.2f}", "yes" if r["silent"] else "NO"] for name, r in rows.items()),
    ) + beside(found)  # fmt: skip


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "conditions": conditions,
    "architectures": architectures,
    "two threads": two_threads,
    "likelihoods": likelihoods,
    "training": training,
    "energies": energies,
    "pipeline": pipeline,
    "growth": growth,
    "allocation": allocation,
    "batches": batches,
    "processes": processes,
    "limits": limits,
    "startup": startup,
}
#: Tables that are made from a part of another name.
PARTS_OF = {"batches": "growth"}
