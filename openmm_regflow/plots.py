"""Figures for reports: matplotlib without a display, colours that survive colour blindness and grey printing.

Every function takes arrays, returns a :class:`matplotlib.figure.Figure` and touches no global matplotlib state;
:func:`save` writes it, :func:`to_png` gives its bytes. Angles come in radians and are drawn in degrees; energies are
in kT. matplotlib is imported on first use.
"""

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np

from openmm_regflow import metrics
from openmm_regflow.errors import InputError
from openmm_regflow.reweighting import check_log_weights, effective_sample_size, to_numpy

#: Okabe-Ito colours: reference, flow, reweighted, and three more.
REFERENCE, FLOW, REWEIGHTED, GREEN, PURPLE, SKY = "#222222", "#D55E00", "#0072B2", "#009E73", "#AA4499", "#56B4E9"
CYCLE = (REWEIGHTED, FLOW, GREEN, PURPLE, SKY, REFERENCE)

_STYLE: Any = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def _styled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a plotting function under the house style, leaving the caller's settings alone."""

    @wraps(function)
    def plot(*arguments: Any, **keywords: Any) -> Any:
        with _style():
            return function(*arguments, **keywords)

    return plot


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **keywords: Any) -> tuple[Any, Any]:
    """A figure outside pyplot (nothing to close, no display) and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **keywords)


def to_png(figure: Any) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save(figure: Any, path: str | Path) -> Path:
    """Write a figure; the suffix chooses the format (png, pdf, svg). Returns the path.

    Raises:
        InputError: the folder cannot be written or the format is unknown.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _style():
            figure.savefig(target)
    except (OSError, ValueError) as error:
        raise InputError(f"figure {target} cannot be written: {error}; choose another folder or .png") from error
    return target


def _degree_axis(axis: Any, which: str, label: str) -> None:
    getattr(axis, f"set_{which}lim")(-180, 180)
    getattr(axis, f"set_{which}ticks")([-180, -90, 0, 90, 180])
    getattr(axis, f"set_{which}label")(f"{label} [°]")


@_styled
def ramachandran(
    panels: Mapping[str, tuple[Any, Any] | tuple[Any, Any, Any]],
    *,
    bins: int = 72,
    title: str = "",
    ceiling: float = 12.0,
) -> Any:
    """Free energy over (phi, psi) side by side on one colour scale (logarithmic in the density).

    Args:
        panels: name -> (phi, psi) or (phi, psi, log_weights), `(n,)` [rad].
        bins: along either axis.
        title: above all panels.
        ceiling: upper end of the colour scale [kT].
    """
    from matplotlib.ticker import MaxNLocator

    maps = {}
    for name, data in panels.items():
        density, edges = metrics.ramachandran(data[0], data[1], bins=bins, log_weights=(*data, None)[2])
        with np.errstate(divide="ignore"):
            maps[name] = -np.log(density)
    lowest = min(m.min() for m in maps.values())
    # Rarer places stay white, as unvisited ones do.
    top = min(max(m[np.isfinite(m)].max() for m in maps.values()) - lowest, ceiling)
    figure, axes = _figure(3.1 * len(maps) + 0.9, 3.4, 1, len(maps), sharex=True, sharey=True, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.12)
    for axis, (name, free) in zip(axes[0], maps.items()):
        image = axis.pcolormesh(
            np.degrees(edges), np.degrees(edges), np.ma.masked_greater(free.T - lowest, top), cmap="viridis_r", vmin=0,
            vmax=top, rasterized=True,
        )  # fmt: skip
        axis.set_title(name)
        axis.set_aspect("equal")
        axis.axvline(0, color="0.6", linewidth=0.6)
        axis.axhline(0, color="0.6", linewidth=0.6)
        _degree_axis(axis, "x", "φ")
        _degree_axis(axis, "y", "ψ")
        axis.label_outer()
    bar = figure.colorbar(image, ax=axes[0], shrink=0.85, ticks=MaxNLocator(6))
    bar.set_label("free energy −ln p [kT]")
    if title:
        figure.suptitle(title)
    return figure


@_styled
def energies(
    reference: Any, flow: Any, log_weights: Any | None = None, *, bins: int = 80, title: str = "Potential energy"
) -> Any:
    """Histograms of reduced energies of reference, flow and reweighted flow.

    The axis covers the reference and the bulk of the flow; the share of flow samples beyond it is written out.

    Args:
        reference: `(m,)` [kT].
        flow: `(n,)` [kT], may hold infinities.
        log_weights: `(n,)`, or None to leave the reweighted histogram out.
        bins: number of bins.
        title: of the panel.
    """
    u_ref, u = (to_numpy(v).astype(np.float64).ravel() for v in (reference, flow))
    finite = u[np.isfinite(u)]
    spread = np.ptp(u_ref)
    high = min(max(u_ref.max(), np.quantile(finite, 0.95)) if finite.size else u_ref.max(), u_ref.max() + 2 * spread)
    edges = np.linspace(u_ref.min() - 0.1 * spread, high + 0.05 * spread, bins + 1)
    figure, axis = _figure(5.6, 3.4)
    axis.hist(u_ref, edges, density=True, color="0.8", label="reference (MD)")
    _step(axis, u, edges, np.full(u.size, 1 / u.size), FLOW, "flow", "--")
    if log_weights is not None:
        w = np.exp(check_log_weights(log_weights) - check_log_weights(log_weights).max())
        _step(axis, u, edges, w / w.sum(), REWEIGHTED, "flow, reweighted", "-")
    beyond = 1 - np.mean((u >= edges[0]) & (u <= edges[-1]))
    if beyond > 0.001:
        axis.text(0.98, 0.62, f"{100 * beyond:.1f} % of flow\nsamples off scale", transform=axis.transAxes,
                  ha="right", va="top", fontsize=8.5, color=FLOW)  # fmt: skip
    axis.set(xlabel="reduced energy u [kT]", ylabel="density [1/kT]", title=title, ylim=(0, None))
    axis.legend(loc="upper right")
    return figure


def _step(axis: Any, u: np.ndarray, edges: np.ndarray, weights: np.ndarray, colour: str, label: str, line: str) -> None:
    """A histogram as steps, normalised to the whole sample, also what lies off the axis."""
    heights, _ = np.histogram(u, edges, weights=weights)
    axis.stairs(heights / np.diff(edges), edges, color=colour, label=label, linestyle=line, linewidth=1.6)


@_styled
def weights(log_weights: Any, *, bins: int = 80, title: str = "Importance weights") -> Any:
    """Histogram of log-weights relative to their mean weight, beside the share of weight carried by the largest.

    Args:
        log_weights: `(n,)`; zero weights are counted in the legend.
        bins: number of bins.
        title: above both panels.
    """
    log_w_n = check_log_weights(log_weights)
    finite = log_w_n[np.isfinite(log_w_n)]
    relative = finite - (np.log(np.mean(np.exp(finite - finite.max()))) + finite.max())
    figure, (left, right) = _figure(7.4, 3.3, 1, 2)
    # Weights below exp(-30) of the largest change no estimate; they would only stretch the axis.
    low = max(relative.min(), relative.max() - 30.0)
    left.hist(relative, np.linspace(low, relative.max() + 1e-9, bins), color=REWEIGHTED, alpha=0.85)
    left.set(xlabel="log-weight relative to the mean weight", ylabel="samples", yscale="log")
    hidden = log_w_n.size - int((relative >= low).sum())
    if hidden:
        left.set_title(f"not shown: {100 * hidden / log_w_n.size:.2g} % with negligible weight", fontsize=9)
    share = np.cumsum(np.sort(np.exp(finite - finite.max()))[::-1])
    fraction = np.arange(1, finite.size + 1) / log_w_n.size
    right.plot(fraction, share / share[-1], color=REWEIGHTED)
    right.plot(fraction, fraction * log_w_n.size / finite.size, color="0.5", linestyle=":", linewidth=1.2)
    right.text(0.03, 0.92, "dotted: equal weights", transform=right.transAxes, fontsize=8.5, color="0.35")
    right.set(xscale="log", xlabel="fraction of samples, largest weights first", ylabel="share of the weight")
    right.set(ylim=(0, 1.02), xlim=(1 / log_w_n.size, 1))
    ess = effective_sample_size(log_w_n)
    figure.suptitle(f"{title}: ESS {100 * ess:.3g} % of {log_w_n.size}")
    return figure


@_styled
def free_energy_profiles(profiles: Mapping[str, Any], *, label: str = "φ", title: str = "", top: float = 12.0) -> Any:
    """Free energy along an angle with bands of one standard error.

    Args:
        profiles: name -> :class:`openmm_regflow.metrics.Profile`; the first is drawn as the reference. Bins
            without a finite error are left out.
        label: of the angle.
        title: of the panel.
        top: upper end of the axis [kT].
    """
    figure, axis = _figure(5.6, 3.6)
    colours = (REFERENCE, FLOW, REWEIGHTED, GREEN, PURPLE, SKY)
    for i, (name, profile) in enumerate(profiles.items()):
        # Bins that some resamples leave empty hold a handful of samples: no error, so no line.
        known = np.isfinite(profile.error)
        x, f, error = np.degrees(profile.centres), *(np.where(known, v, np.nan) for v in
                                                     (profile.free_energy, profile.error))  # fmt: skip
        colour = colours[i % len(colours)]
        axis.fill_between(x, f - error, f + error, color=colour, alpha=0.22, linewidth=0)
        axis.plot(x, f, color=colour, label=name, linestyle=("-", "--", "-")[i % 3])
    axis.axvline(0, color="0.7", linewidth=0.7)
    axis.set(ylabel="free energy [kT]", ylim=(-0.3, top), title=title)
    _degree_axis(axis, "x", label)
    axis.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none")
    return figure


@_styled
def training_curves(
    stages: Mapping[str, Mapping[str, tuple[Any, Any]]], x_labels: Mapping[str, str] | None = None
) -> Any:
    """Losses against steps, one panel for each stage of a training: their units differ.

    Args:
        stages: name of the stage -> name of the curve -> (steps, values), `(n,)` each.
        x_labels: name of the stage -> what its curves run over, where that is not steps.
    """
    figure, axes = _figure(3.1 * len(stages), 2.9, 1, max(1, len(stages)), squeeze=False)
    for axis, (stage, curves) in zip(axes[0], stages.items()):
        values = [np.zeros(0)]
        for colour, (name, (steps, losses)) in zip(_cycle(len(curves)), curves.items()):
            y = to_numpy(losses).astype(float)
            values.append(y[np.isfinite(y)])
            axis.plot(to_numpy(steps), y, color=colour, label=name)
        every = np.concatenate(values)
        if every.size and every.min() > 0 and every.max() > 5 * every.min():
            axis.set_yscale("log")
        axis.set(xlabel=(x_labels or {}).get(stage, "step"), title=stage)
        axis.legend()
    axes[0, 0].set_ylabel("loss")
    return figure


def _cycle(n: int) -> list[str]:
    return [CYCLE[i % len(CYCLE)] for i in range(n)]


@_styled
def chains(
    series: Mapping[str, Any],
    *,
    time_step: float | Mapping[str, float] = 1.0,
    unit: str = "iteration",
    label: str = "φ",
    title: str = "",
    max_points: int = 20_000,
) -> Any:
    """An angle against time for several chains, one panel each, with the number of barrier crossings.

    Args:
        series: name -> angle `(n,)` [rad] in order of time.
        time_step: time between entries, in ``unit``; by name where chains differ in it.
        unit: of the time axis.
        label: of the angle.
        title: above all panels.
        max_points: longer chains are thinned for drawing (crossings are counted on all points).
    """
    figure, axes = _figure(7.4, 1.0 + 1.45 * len(series), len(series), 1, sharex=True, squeeze=False)
    for colour, axis, (name, angle) in zip(_cycle(len(series)), axes[:, 0], series.items()):
        phi = to_numpy(angle).astype(float).ravel()
        stride = max(1, math.ceil(phi.size / max_points))
        step = time_step[name] if isinstance(time_step, Mapping) else time_step
        axis.plot(step * np.arange(phi.size)[::stride], np.degrees(phi[::stride]), ".", color=colour,
                  markersize=2.2, rasterized=True)  # fmt: skip
        crossings = metrics.count_crossings(phi)
        axis.set_title(f"{name}: {crossings} crossing{'' if crossings == 1 else 's'}", loc="left", fontsize=9.5)
        axis.axhline(0, color="0.6", linewidth=0.7)
        _degree_axis(axis, "y", label)
        axis.margins(x=0)
    axes[-1, 0].set_xlabel(f"time [{unit}]" if unit != "iteration" else "iteration")
    if title:
        figure.suptitle(title)
    return figure


@_styled
def convergence(table: Mapping[str, Any], *, exact: tuple[float, float] | None = None, title: str = "") -> Any:
    """Free energy estimates from growing parts of the data: BAR between the two one-sided averages.

    Forward and reverse averages that approach each other from two sides (hysteresis) show too little overlap.

    Args:
        table: from :func:`openmm_regflow.tfep.convergence`.
        exact: (value, standard error) [kT] of a reference, drawn as a band.
        title: of the panel.
    """
    figure, axis = _figure(5.6, 3.6)
    x = 100 * to_numpy(table["fraction"])
    if exact is not None:
        axis.axhspan(exact[0] - exact[1], exact[0] + exact[1], color="0.85", label="reference")
        axis.axhline(exact[0], color="0.55", linewidth=1)
    styles = (("exp", FLOW, "^", "forward average"), ("exp_reverse", REWEIGHTED, "v", "reverse average"),
              ("bar", REFERENCE, "o", "BAR"))  # fmt: skip
    for offset, (name, colour, marker, words) in zip((-0.6, 0.6, 0.0), styles):
        error = np.where(np.isfinite(table[f"{name}_error"]), table[f"{name}_error"], 0.0)
        axis.errorbar(x + offset, table[name], error, color=colour, marker=marker, markersize=4.5, capsize=2,
                      linewidth=1.2, label=words)  # fmt: skip
    axis.set(xlabel="share of the samples [%]", ylabel="ΔF [kT]", title=title, xlim=(0, 104))
    axis.legend()
    return figure


@_styled
def trends(
    panels: Mapping[str, tuple[Mapping[str, Sequence[tuple[float, float, float]]], bool]],
    *,
    label: str,
    title: str = "",
) -> Any:
    """Figures against one quantity, a panel each, with error bars.

    Args:
        panels: label of the vertical axis -> (name of a line -> points (x, value, error)), logarithmic or not.
        label: of the horizontal, logarithmic axis.
        title: above all panels.
    """
    rows = -(-len(panels) // 2)
    figure, axes = _figure(9.0, 3.2 * rows, rows, 2, squeeze=False, sharex=True)
    for axis, (name, (lines, logarithmic)) in zip(axes.flat, panels.items()):
        for k, (words, points) in enumerate(lines.items()):
            if points:
                x, value, error = np.asarray(points, dtype=float).T
                # five colours, then other dashes: twenty lines that differ
                look = {"color": CYCLE[k % 5], "linestyle": ("-", "--", ":", "-.")[k // 5 % 4]}
                axis.errorbar(x, value, error, **look, marker="o", markersize=4, capsize=2, label=words)
        axis.set(xscale="log", ylabel=name, **({"yscale": "log"} if logarithmic else {}))
    for axis in axes[-1]:
        axis.set_xlabel(label)
    named = axes.flat[0].get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=4, fontsize=7, handlelength=4)
    figure.suptitle(title)
    return figure


@_styled
def work_distributions(forward: Any, reverse: Any, delta_f: float, *, bins: int = 60, title: str = "") -> Any:
    """Distributions of forward works and of negated reverse works; they cross at delta_f.

    Args:
        forward: `(n,)` [kT].
        reverse: `(m,)` [kT].
        delta_f: where they should cross [kT].
        bins: number of bins.
        title: of the panel.
    """
    w_f, w_r = to_numpy(forward).ravel(), -to_numpy(reverse).ravel()
    both = np.concatenate([w_f[np.isfinite(w_f)], w_r[np.isfinite(w_r)]])
    low, high = np.quantile(both, [0.002, 0.998])
    edges = np.linspace(min(low, delta_f) - 0.5, max(high, delta_f) + 0.5, bins + 1)
    figure, axis = _figure(5.6, 3.4)
    _step(axis, w_f, edges, np.full(w_f.size, 1 / w_f.size), FLOW, "forward, w", "-")
    _step(axis, w_r, edges, np.full(w_r.size, 1 / w_r.size), REWEIGHTED, "reverse, −w", "--")
    axis.axvline(delta_f, color=REFERENCE, linewidth=1.2, linestyle=":", label=f"ΔF = {delta_f:.2f} kT")
    axis.set(xlabel="generalised work [kT]", ylabel="density [1/kT]", title=title, ylim=(0, None))
    axis.legend()
    return figure


@_styled
def bars(
    values: Mapping[str, tuple[float, float]], *, ylabel: str, title: str = "", band: Sequence[float] | None = None
) -> Any:
    """Values with error bars beside each other, e.g. delta_f by several methods.

    Args:
        values: name -> (value, standard error).
        ylabel: quantity and unit.
        title: of the panel.
        band: (low, high) of a published range, shaded.
    """
    figure, axis = _figure(max(4.2, 1.2 * len(values) + 1.4), 3.5)
    if band is not None:
        axis.axhspan(band[0], band[1], color="0.88")
    for i, (colour, (value, error)) in enumerate(zip(_cycle(len(values)), values.values())):
        axis.errorbar([i], [value], [error], color=colour, marker="o", markersize=6, capsize=4, linewidth=1.6)
        axis.annotate(f"{value:.2f} ± {error:.2f}", (i, value + error), (0, 5), textcoords="offset points", ha="center",
                      fontsize=8.5)  # fmt: skip
    axis.set_xticks(range(len(values)), [name.replace(" ", "\n", 1) for name in values])
    axis.set(ylabel=ylabel, title=title, xlim=(-0.6, len(values) - 0.4))
    axis.margins(y=0.2)
    return figure


@_styled
def stacked(values: Mapping[str, Mapping[str, float]], *, label: str, title: str = "") -> Any:
    """Horizontal bars, each made of parts: where the time of several runs goes.

    Args:
        values: name of the bar -> name of the part -> its length; every bar has the parts of the first.
        label: of the axis, with its unit.
        title: of the panel.
    """
    parts = list(next(iter(values.values())))
    figure, axis = _figure(7.4, 1.1 + 0.42 * len(values))
    start = np.zeros(len(values))
    for colour, part in zip(_cycle(len(parts)), parts):
        length = np.array([bar[part] for bar in values.values()])
        axis.barh(range(len(values)), length, left=start, color=colour, label=part, height=0.66)
        start += length
    for place, total in enumerate(start):
        axis.annotate(f"{total:.3g}", (total, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    axis.set_yticks(range(len(values)), list(values))
    axis.invert_yaxis()
    axis.set(xlabel=label, title=title, xlim=(0, 1.1 * start.max()))
    figure.legend(ncols=len(parts), loc="outside lower center", fontsize=8.5)
    return figure
