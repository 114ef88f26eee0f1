"""One call from samples of a flow to every figure that is reported about it.

:func:`evaluate` works on arrays; :func:`evaluate_flow` draws them. Both give an :class:`Evaluation`, whose
``to_dict`` is what goes into ``metrics.json``. A plain figure describes the flow's own samples, a reweighted one the
same samples after importance sampling, which is what a user of the flow gets.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from openmm_regflow import metrics, reweighting
from openmm_regflow.coordinates import build_zmatrix, topology_tables
from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.proposals import FlowProposal
from openmm_regflow.reweighting import Estimate, Seed, as_generator, to_numpy
from openmm_regflow.units import positions_nm

#: A free energy whose error is above this [kT] is no figure.
LARGEST_ERROR = 1.0
#: Parts of a circle [degrees] that `missing_basins` looks at: of phi and psi, and of other torsions.
_HALVES = {"> 0": (0, 180), "< 0": (-180, 0)}
_THIRDS = {"from 0 to 120°": (0, 120), "from 120 to 240°": (120, 240), "from -120 to 0°": (-120, 0)}


@dataclass(frozen=True)
class Evaluation:
    """Figures of merit of a flow on one molecule; None where a figure is not defined or has too few data.

    Attributes:
        n: number of samples.
        n_finite: samples with a finite energy.
        ess: Kish fraction of the weights.
        ess_error: its standard error, see :func:`openmm_regflow.reweighting.effective_sample_size_error`.
        ess_truncated: Kish fraction without the largest 0.2 % of the weights (biased; for comparison).
        ess_truncated_error: its bootstrap standard error.
        k_hat: Pareto shape of the weights' tail.
        e_w1: Wasserstein-1 distance of energies from the reference [kT], of samples with a finite energy; the others
            are counted by ``n_finite``.
        e_w1_reweighted: the same after importance sampling.
        e_w2: Wasserstein-2 distance of energies [kT].
        e_w2_reweighted: the same after importance sampling.
        e_w1_error, e_w1_reweighted_error, e_w2_error, e_w2_reweighted_error: their standard errors, the reference's
            share included (`metrics.energy_distance`).
        t_w2: Wasserstein-2 distance of backbone torsions [rad].
        t_w2_reweighted: the same after importance sampling.
        t_w2_floor: the same between the first and the second half of the reference: about what a perfect sampler would
            score, or a little more, since either half has its share of slow modes.
        t_w2_points: points on either side of those three.
        t_w2_error, t_w2_reweighted_error: standard errors of the first two for so many points.
        wrong_chirality: fraction of samples with a residue that is the mirror image of the structure's.
        wrong_chirality_reweighted: its share of the weight.
        wrong_chirality_error, wrong_chirality_reweighted_error: their standard errors.
        delta_f_phi: (value, standard error) [kT] of phi > 0 above phi < 0, plain.
        delta_f_phi_reweighted: after importance sampling.
        delta_f_phi_reference: in the reference samples, taken as one chain in order of time (block bootstrap).
        clip_bias: mean energy of the reweighted samples without the largest 0.2 % of the weights less that with them
            [kT]: what such clipping, which no other figure here uses but ``ess_truncated``, would do to an observable.
        missing: basins (phi or psi of one residue in a half circle, another torsion in a third of it) that the
            reference has and the samples lack.
        verdict: on the weights, in words, and on missing basins.
    """

    n: int
    n_finite: int
    ess: float
    ess_error: float
    ess_truncated: float
    ess_truncated_error: float
    k_hat: float | None
    e_w1: float
    e_w1_reweighted: float
    e_w2: float
    e_w2_reweighted: float
    e_w1_error: float | None
    e_w1_reweighted_error: float | None
    e_w2_error: float | None
    e_w2_reweighted_error: float | None
    t_w2: float | None
    t_w2_reweighted: float | None
    t_w2_floor: float | None
    t_w2_points: int | None
    t_w2_error: float | None
    t_w2_reweighted_error: float | None
    wrong_chirality: float | None
    wrong_chirality_reweighted: float | None
    wrong_chirality_error: float | None
    wrong_chirality_reweighted_error: float | None
    delta_f_phi: tuple[float, float] | None
    delta_f_phi_reweighted: tuple[float, float] | None
    delta_f_phi_reference: tuple[float, float] | None
    clip_bias: float | None
    missing: tuple[str, ...]
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; infinite ones become None."""
        return {k: _jsonable(v) for k, v in asdict(self).items()}

    def rows(self) -> list[tuple[str, str]]:
        """(name, value with error and unit) pairs for a printed table.

        What does not apply to the molecule is left out; a figure for which there are too few data is a dash.
        """
        rows = [
            ("samples (finite energy)", f"{self.n} ({self.n_finite})"),
            ("ESS", f"{100 * self.ess:.3g} ± {100 * self.ess_error:.2g} %"),
            ("ESS, top 0.2 % dropped", f"{100 * self.ess_truncated:.3g} ± {100 * self.ess_truncated_error:.2g} %"),
            ("Pareto k-hat", _number(self.k_hat)),
            ("E-W1 plain (finite only) / reweighted [kT]", self._both("e_w1")),
            ("E-W2 plain (finite only) / reweighted [kT]", self._both("e_w2")),
        ]
        if self.t_w2 is not None:
            figures = f"{self._both('t_w2')} / {_number(self.t_w2_floor)}"
            if self.t_w2_floor is not None and self.t_w2_floor > 2 * self.t_w2:
                figures += " (the halves of the reference differ by more: it has not converged)"
            rows.append((f"T-W2 plain / reweighted / floor [rad, {self.t_w2_points} points]", figures))
        if self.wrong_chirality is not None:
            error = 100 * (self.wrong_chirality_error or 0.0)
            rows.append(("wrong chirality", f"{100 * self.wrong_chirality:.3g} ± {error:.2g} %"))
        values = (self.delta_f_phi, self.delta_f_phi_reweighted, self.delta_f_phi_reference)
        if any(values):
            for words, value in zip(("plain", "reweighted", "reference"), values, strict=True):
                figures = f"{value[0]:.2f} ± {value[1]:.2f}" if value else "– (one of the sides has too few samples)"
                rows.append((f"F(φ>0) − F(φ<0), {words} [kT]", figures))
        rows.append(("mean energy with the top 0.2 % clipped, less without [kT]", _number(self.clip_bias)))
        return [*rows, ("verdict", self.verdict)]

    def _both(self, name: str) -> str:
        """A figure of the samples and that of the reweighted ones, each with its error."""
        pairs = ((getattr(self, key), getattr(self, f"{key}_error")) for key in (name, f"{name}_reweighted"))
        return " / ".join(_number(value) + (f" ± {error:.2g}" if error is not None else "") for value, error in pairs)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def log_weights(u: Any, log_q: Any, frame_log_density: Any | None = None) -> np.ndarray:
    """Log-weights ``-u + log f - log q`` `(n,)`; -inf where the energy is infinite or no number.

    Args:
        u: `(n,)` reduced energies [kT].
        log_q: `(n,)` log-density of the flow.
        frame_log_density: `(n,)` log f, the density of rigid-body coordinates that log q carries and exp(-u) does
            not (zero for internal coordinates), or None.

    Raises:
        InputError: lengths differ, or log_q is not a number where the energy is finite.
    """
    u_n, q_n = (to_numpy(v).astype(np.float64).ravel() for v in (u, log_q))
    f_n = np.zeros_like(u_n) if frame_log_density is None else to_numpy(frame_log_density).astype(np.float64).ravel()
    if not u_n.shape == q_n.shape == f_n.shape:
        raise InputError(f"u {u_n.shape}, log_q {q_n.shape} and frame_log_density {f_n.shape} differ in length")
    usable = np.isfinite(u_n)
    if not np.isfinite((f_n - q_n)[usable]).all():
        raise InputError("log_q is NaN or infinite for samples of finite energy; check the flow's weights")
    result = np.full(u_n.shape, -np.inf)
    result[usable] = (f_n - q_n - u_n)[usable]
    return result


def evaluate(
    positions: Any,
    log_q: Any,
    u: Any,
    reference_positions: Any,
    reference_u: Any,
    *,
    phi: Any = (),
    psi: Any = (),
    torsions: Any = (),
    centres: Any = (),
    frame_log_density: Any | None = None,
    n_torsion_points: int = metrics.MAX_POINTS,
    n_resamples: int = 200,
    generator: Seed = None,
) -> Evaluation:
    """All figures from arrays.

    Args:
        positions: `(n, n_atoms, 3)` [nm or Quantity] samples of the flow; NaN rows count as failures.
        log_q: `(n,)` their log-density.
        u: `(n,)` their reduced energy [kT]; +inf is legal.
        reference_positions: `(m, n_atoms, 3)` equilibrium samples that did not train the flow.
        reference_u: `(m,)` their reduced energy [kT].
        phi: `(k, 4)` atom indices of backbone phi torsions; none for a molecule without a backbone.
        psi: `(k', 4)` likewise.
        torsions: `(k'', 4)` of other torsions, in which missing basins are looked for (:func:`rotatable_torsions`).
        centres: `(c, 4)` indices of CA, N, C, CB of chiral residues.
        frame_log_density: see :func:`log_weights`.
        n_torsion_points: points on either side of T-W2 (memory grows with its square; see
            :func:`openmm_regflow.metrics.torus_wasserstein`).
        n_resamples: bootstrap replicas of the ESS.
        generator: NumPy generator or seed of bootstrap and thinning.

    Raises:
        InputError: shapes that do not fit, non-finite reference.
        InsufficientDataError: no sample of finite energy.
    """
    rng = as_generator(generator)
    x, x_ref = positions_nm(to_numpy_if_tensor(positions)), positions_nm(to_numpy_if_tensor(reference_positions))
    u_n, u_ref = (to_numpy(v).astype(np.float64).ravel() for v in (u, reference_u))
    log_w_n = log_weights(u_n, log_q, frame_log_density)
    if len(x) != log_w_n.size or len(x_ref) != u_ref.size:
        raise InputError(f"{len(x)} positions for {log_w_n.size} energies, {len(x_ref)} for {u_ref.size} in reference")
    reweighting.check_log_weights(log_w_n)
    figures = {
        **_weight_figures(log_w_n, n_resamples, rng),
        **_energy_figures(u_n, u_ref, log_w_n),
        **_torsion_figures(x, x_ref, log_w_n, phi, psi, n_torsion_points, rng),
        **_chirality_figures(x, log_w_n, centres),
        **_basin_figures(x, x_ref, log_w_n, phi),
        "clip_bias": _clip_bias(u_n, log_w_n),
    }
    basins = list(_basins(x, x_ref, phi, psi, torsions))  # seconds of many samples: once for both
    undrawn = _lacking(basins)
    w_n = reweighting.normalised_weights(log_w_n)[np.isfinite(x).all(axis=(1, 2))]
    lacking = undrawn or _lacking(basins, weights=w_n)
    verdict = reweighting.verdict(log_w_n)
    if not any(len(rows) for rows in (phi, psi, torsions)):
        verdict += "; no torsions were compared with the reference's, so a missing basin would not be seen"
    if lacking:
        who = "the samples lack" if undrawn else "the samples, as they are weighted, lack"
        verdict = f"do not trust: {who} {', '.join(lacking)} of the reference; by weights alone: {verdict}"
    n_finite = int(np.isfinite(u_n).sum())
    return Evaluation(n=len(x), n_finite=n_finite, missing=lacking, verdict=verdict, **figures)


def rotatable_torsions(topology: Any, but: Any = ()) -> np.ndarray:
    """One torsion `(k, 4)` for every bond of a molecule about which it can turn, rings included, methyls left out.

    Args:
        topology: an ``openmm.app.Topology``, or anything with its atoms() and bonds().
        but: torsions `(m, 4)` whose bonds are left out.

    Returns:
        none of several molecules, or of fewer than four atoms.
    """
    elements, bonds = topology_tables(topology)
    try:
        zmatrix = build_zmatrix(elements, bonds)
    except InputError:
        return np.zeros((0, 4), dtype=np.int64)
    turned = {rotor.atoms[0] for rotor in zmatrix.rotors}
    known = {frozenset(map(int, row[1:3])) for row in but}
    rows: dict[frozenset[int], tuple[int, int, int, int]] = {}
    for k, row in enumerate(zmatrix.rows):
        bond = frozenset(row[1:3])
        if k not in zmatrix.siblings and row[0] not in turned and bond not in known:
            rows.setdefault(bond, row)
    return np.array(list(rows.values()), dtype=np.int64).reshape(-1, 4)


def missing_basins(
    x: Any, x_ref: Any, phi: Any, psi: Any, torsions: Any = (), factor: float = 10.0
) -> tuple[str, ...]:
    """Parts of the circle of single torsions that hold ``factor`` times less of the samples than of the reference.

    Of phi and psi half circles, of other torsions thirds (the rotamers about a single bond). The ends of a group of
    equal atoms (a phenyl, a carboxylate) are told apart: a flip that the reference alone has seen is named, too.

    Weights cannot make up for a basin in which there are no samples, nor tell that it is missing. A basin counts if the
    reference has a hundred frames in it and its share would give ten samples or more: fewer than a tenth of these then
    have a probability below 1e-3 by chance.

    Args:
        x: `(n, n_atoms, 3)` [nm]; NaN rows are left out.
        x_ref: `(m, n_atoms, 3)` [nm].
        phi: `(k, 4)` atom indices.
        psi: `(k', 4)` atom indices.
        torsions: `(k'', 4)` atom indices of others, named by their atoms, which are counted from 0.
        factor: how much too few.

    Returns:
        of each its name, such as phi2, where the residues with a phi or psi are counted from 1, and what is there.
    """
    return _lacking(_basins(x, x_ref, phi, psi, torsions), factor)


def _basins(
    x: Any, x_ref: Any, phi: Any, psi: Any, torsions: Any
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name of every part of a circle, and which samples (NaN rows left out) and which frames are in it, bool."""
    alpha = {"phi": 2, "psi": 1}  # place of the alpha carbon, which says the residue
    listed = [(kind, int(row[alpha[kind]])) for kind, rows in (("phi", phi), ("psi", psi)) for row in np.asarray(rows)]
    residues = sorted({atom for _, atom in listed})
    names = [f"{kind}{residues.index(atom) + 1}" for kind, atom in listed]
    there = np.isfinite(x).all(axis=(1, 2))
    others = np.asarray(torsions, dtype=np.int64).reshape(-1, 4)
    for rows, words, parts in (
        (_torsion_rows(phi, psi), names, _HALVES),
        (others, ["torsion " + "-".join(map(str, row)) for row in others], _THIRDS),
    ):
        for row, name in zip(rows, words, strict=True):
            angles = [np.degrees(metrics.dihedrals(positions, row[None]))[:, 0] for positions in (x, x_ref)]
            mine, theirs = angles[0][there], angles[1]
            for where, (low, high) in parts.items():
                yield f"{name} {where}", (mine - low) % 360 < high - low, (theirs - low) % 360 < high - low


def _lacking(
    basins: Iterable[tuple[str, np.ndarray, np.ndarray]], factor: float = 10.0, weights: np.ndarray | None = None
) -> tuple[str, ...]:
    """What `missing_basins` returns; with weights that sum to one it is their shares and effective samples that count.

    A basin may be drawn, and yet not as the target has it there.
    """
    found: list[str] = []
    for name, mine, theirs in basins:
        if not len(mine):
            return ()
        had = mine.mean() if weights is None else weights @ mine
        share, n = theirs.mean(), len(mine) if weights is None else 1.0 / np.square(weights).sum()
        if share * len(theirs) >= 100 and share * n >= 10 and had * factor < share:
            found.append(f"{name} (has {100 * had:.2g} % for {100 * share:.2g} %)")
    return tuple(found)


def _clip_bias(u_n: np.ndarray, log_w_n: np.ndarray) -> float | None:
    """Reweighted mean energy without the largest 0.2 % of the weights less that with them [kT]; None of under 500."""
    if len(log_w_n) < 500:
        return None
    kept = reweighting.rows_without_top(log_w_n)
    clipped = _or_none(lambda: reweighting.expectation(u_n[kept], log_w_n[kept]).value)
    return None if clipped is None else float(clipped - reweighting.expectation(u_n, log_w_n).value)


def to_numpy_if_tensor(positions: Any) -> Any:
    """Tensors as arrays; everything else, Quantities included, unchanged."""
    return to_numpy(positions) if hasattr(positions, "detach") else positions


def _weight_figures(log_w_n: np.ndarray, n_resamples: int, rng: np.random.Generator) -> dict[str, Any]:
    whole, cut = reweighting.effective_sample_size, reweighting.truncated_effective_sample_size
    errors: dict[str, Callable[[], float]] = {
        "ess": lambda: reweighting.effective_sample_size_error(log_w_n, generator=rng),
        "ess_truncated": lambda: reweighting.bootstrap_error(cut, log_w_n, n_resamples=n_resamples, generator=rng),
    }
    # Where no more than the top 0.2 % have any weight, nothing is left without them.
    figures: dict[str, Any] = {"ess": whole(log_w_n), "ess_truncated": _or_none(lambda: cut(log_w_n)) or 0.0}
    for name, error in errors.items():
        found = _or_none(error)
        figures[f"{name}_error"] = math.inf if found is None else found
    return {**figures, "k_hat": _or_none(lambda: reweighting.pareto_k(log_w_n))}


def _or_none(figure: Callable[[], Any]) -> Any:
    """The figure, or None where there are too few data for it."""
    try:
        return figure()
    except InsufficientDataError:
        return None


def _energy_figures(u_n: np.ndarray, u_ref: np.ndarray, log_w_n: np.ndarray) -> dict[str, float | None]:
    # One atom on another makes any distance infinite: such samples are counted, and the rest is measured.
    finite = np.isfinite(u_n)
    u_n, log_w_n = u_n[finite], log_w_n[finite]
    figures: dict[str, float | None] = {}
    for order in (1, 2):
        for suffix, weights in (("", None), ("_reweighted", log_w_n)):
            found = (math.inf, math.inf)
            if len(u_n):
                found = metrics.energy_distance(u_n, u_ref, order=order, log_weights=weights)
            figures |= _with_error(f"e_w{order}{suffix}", found)
    return figures


def _with_error(name: str, found: tuple[float, float]) -> dict[str, float | None]:
    value, error = found
    return {name: value, f"{name}_error": error if math.isfinite(error) else None}


def _torsion_figures(
    x: np.ndarray, x_ref: np.ndarray, log_w_n: np.ndarray, phi: Any, psi: Any, n_max: int, rng: np.random.Generator
) -> dict[str, Any]:
    names = ("t_w2", "t_w2_error", "t_w2_reweighted", "t_w2_reweighted_error", "t_w2_floor", "t_w2_points")
    rows = _torsion_rows(phi, psi)
    there = np.isfinite(x).all(axis=(1, 2))
    points = min(n_max, int(there.sum()), len(x_ref) // 2)
    if not len(rows) or points < 1:
        return dict.fromkeys(names)
    angles, reference = metrics.dihedrals(x[there], rows), metrics.dihedrals(x_ref, rows)
    keywords: dict[str, Any] = {"n_max": points, "generator": rng}
    return {
        **_with_error("t_w2", metrics.torus_distance(angles, reference, **keywords)),
        **_with_error(
            "t_w2_reweighted", metrics.torus_distance(angles, reference, log_weights=log_w_n[there], **keywords)
        ),
        # Two halves that follow each other: neighbours in time, shared out, would look alike whatever the trajectory.
        "t_w2_floor": metrics.torus_wasserstein(*np.array_split(reference, 2), **keywords),
        "t_w2_points": points,
    }


def _torsion_rows(phi: Any, psi: Any) -> np.ndarray:
    return np.concatenate([np.asarray(a, dtype=np.int64).reshape(-1, 4) for a in (phi, psi)])


def _chirality_figures(x: np.ndarray, log_w_n: np.ndarray, centres: Any) -> dict[str, float | None]:
    rows = np.asarray(centres, dtype=np.int64).reshape(-1, 4)
    names = ("wrong_chirality", "wrong_chirality_error", "wrong_chirality_reweighted")
    if not len(rows):
        return dict.fromkeys((*names, "wrong_chirality_reweighted_error"))
    wrong = metrics.wrong_chirality(x, rows)
    fraction, weighted = float(wrong.mean()), reweighting.expectation(wrong, log_w_n)
    # That none of a hundred is wrong does not make it certain, however they are weighted.
    effective = max(1, int(reweighting.effective_sample_size(log_w_n) * len(wrong)))
    weighted_error = max(float(weighted.error), metrics.fraction_error(float(weighted.value), effective))
    return {
        **dict(zip(names, (fraction, metrics.fraction_error(fraction, len(wrong)), float(weighted.value)))),
        "wrong_chirality_reweighted_error": weighted_error,
    }


def _basin_figures(x: np.ndarray, x_ref: np.ndarray, log_w_n: np.ndarray, phi: Any) -> dict[str, Any]:
    """delta_f of the first phi torsion."""
    names = ("delta_f_phi", "delta_f_phi_reweighted", "delta_f_phi_reference")
    rows = np.asarray(phi, dtype=np.int64).reshape(-1, 4)[:1]
    if not len(rows):
        return dict.fromkeys(names)
    there = np.isfinite(x).all(axis=(1, 2))
    angle, reference = metrics.dihedrals(x[there], rows)[:, 0], metrics.dihedrals(x_ref, rows)[:, 0]
    calls = (
        lambda: metrics.basin_delta_f(angle),
        lambda: metrics.basin_delta_f(angle, log_weights=log_w_n[there]),
        lambda: metrics.basin_delta_f(reference, block=reference_block(reference)),
    )
    found = {name: _or_none(call) for name, call in zip(names, calls)}
    # An error above 1 kT is that of one or two samples in a basin, whatever the value says.
    return {name: _pair(e) if e is not None and e.error < LARGEST_ERROR else None for name, e in found.items()}


def reference_block(angle: np.ndarray) -> int:
    """Length of a bootstrap block of reference frames with torsions `(n,)` [rad], a twentieth of them at least.

    In replica exchange the number of replicas beyond a barrier changes far more slowly than the lowest state forgets
    which of them it holds, so its correlation time alone is too short.
    """
    if len(angle) < 4:  # too few for a correlation time
        return 1
    return max(metrics.block_length(np.where(angle > 0, 1.0, 0.0)), len(angle) // 20)


def _pair(estimate: Estimate | None) -> tuple[float, float] | None:
    return None if estimate is None else (float(estimate.value), float(estimate.error))


@dataclass(frozen=True)
class FlowSamples:
    """Samples of a flow with everything that evaluation and plots need, as float64 arrays.

    Attributes:
        positions: `(n, n_atoms, 3)` [nm].
        log_q: `(n,)` in the measure of ``exp(-u)``, that is, without frame and with the metric of constraints.
        u: `(n,)` reduced energies [kT]; +inf where not finite or absurd.
        log_weights: `(n,)` ``-u - log_q``.
    """

    positions: np.ndarray
    log_q: np.ndarray
    u: np.ndarray
    log_weights: np.ndarray


def draw(
    flow: Any, potential: Callable[[Any], Any], temperature: Any, n: int, generator: Any | None = None
) -> FlowSamples:
    """Sample a flow and weigh the samples, as :class:`openmm_regflow.proposals.FlowProposal` does.

    Args:
        flow: a flow that a proposal takes; one of another System or temperature is accepted.
        potential: `(n, n_atoms, 3)` [nm] -> `(n,)` [kJ/mol].
        temperature: [K or Quantity].
        n: number of samples.
        generator: torch generator of the samples.
    """
    return _drawn(FlowProposal(flow, potential, temperature, allow_mismatch=True), n, generator)


def _drawn(proposal: FlowProposal, n: int, generator: Any | None) -> FlowSamples:
    batch = proposal.sample(n, generator)
    x, log_q, u = (to_numpy(part).astype(np.float64) for part in batch)
    return FlowSamples(x, log_q, u, log_weights(u, log_q))


def evaluate_flow(
    flow: Any,
    potential: Callable[[Any], Any],
    temperature: Any,
    reference_positions: Any,
    *,
    n: int = 10_000,
    sample_generator: Any | None = None,
    **keywords: Any,
) -> Evaluation:
    """Draw ``n`` samples from a flow and evaluate them; other arguments as in :func:`evaluate`.

    Args:
        flow: a flow that a proposal takes; one of another System or temperature is accepted.
        potential: `(n, n_atoms, 3)` [nm] -> `(n,)` [kJ/mol].
        temperature: [K or Quantity].
        reference_positions: `(m, n_atoms, 3)` [nm] held-out equilibrium samples.
        n: number of samples.
        sample_generator: torch generator of the samples.
        **keywords: passed to :func:`evaluate`.
    """
    proposal = FlowProposal(flow, potential, temperature, allow_mismatch=True)
    samples = _drawn(proposal, n, sample_generator)
    x_ref = positions_nm(to_numpy_if_tensor(reference_positions))
    u_ref = proposal.reduced_potential(x_ref)
    return evaluate(samples.positions, samples.log_q, samples.u, x_ref, u_ref, **keywords)
