"""Free energy differences from arrays of generalised works, with errors that can be trusted.

Conventions. State A has reduced potential u_A and configurational integral Z_A = integral exp(-u_A), state B
likewise; ``delta_f = f_B - f_A = -log(Z_B / Z_A)`` in kT. An invertible map M carries A towards B. Its works
are

    forward, x ~ A:   w_F(x) = u_B(M(x)) - u_A(x) - log|det J_M(x)|
    reverse, y ~ B:   w_R(y) = u_A(M^-1(y)) - u_B(y) - log|det J_M^-1(y)| = -w_F(M^-1(y))

(Jarzynski 2002, equation 6; Hahn & Then 2009). Their distributions obey p_F(w) / p_R(-w) = exp(w - delta_f),
so every estimator for nonequilibrium works applies. A work of +inf is legal: the map left the other state's
support.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.special import expit, logsumexp

from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.reweighting import (
    LARGEST_SHARE,
    Seed,
    as_generator,
    block_indices,
    effective_sample_size,
    largest_share,
    pareto_k,
    to_numpy,
)
from openmm_regflow.tfep.bennett import bar_overlap, bar_root, crooks_slope, one_sided
from openmm_regflow.units import KJ_PER_KCAL, temperature_kelvin, thermal_energy

METHODS = ("bar", "mbar", "exp", "exp_reverse", "cumulant")
#: Works that spread by less than this [kT] come from a perfect map: they all equal delta_f.
PERFECT_SPREAD = 1e-6
#: Overlap below which BAR and MBAR are not to be trusted (Klimovich, Shirts & Mobley 2015), and with care.
OVERLAP_LIMIT, OVERLAP_CARE = 0.03, 0.1
#: Fewer independent samples than this on either side make any error bar meaningless; below the second, doubtful.
INDEPENDENT_LIMIT, INDEPENDENT_CARE = 20, 50
#: exp(-CLIP) relative to the Fermi function's scale is nothing in float64; pymbar overflows beyond 700.
CLIP = 200.0


@dataclass(frozen=True)
class TargetedFreeEnergy:
    """A free energy difference, its error, and how far to believe both.

    Attributes:
        delta_f: f_B - f_A [kT].
        uncertainty: one standard error [kT]: the larger of pymbar's and the bootstrap's.
        method: estimator.
        overlap: of forward and reverse works, 0 to 1 (1 minus the second eigenvalue of the overlap matrix); None for
            one-sided estimators.
        ess: Kish fraction of exp(-w), the smaller of the sides used.
        n_forward: number of forward works.
        n_reverse: number of reverse works.
        n_independent: decorrelated samples on the (forward, reverse) side.
        pymbar_error: [kT] on decorrelated samples.
        bootstrap_error: [kT] by blocks over all samples.
        forward: delta_f by forward exponential averaging [kT], or None.
        reverse: delta_f by reverse exponential averaging [kT], or None.
        crooks_slope: slope of log p_F(w)/p_R(-w) against w with its error; exactly 1 for consistent works.
        verdict: in words; starts with ``reliable``, ``use with care``, ``do not trust`` or ``diagnostic only``.
        temperature: [K], for kJ/mol and kcal/mol.
        plain: the same estimate with the identity map, or None.
    """

    delta_f: float
    uncertainty: float
    method: str
    overlap: float | None
    ess: float
    n_forward: int
    n_reverse: int
    n_independent: tuple[float, float]
    pymbar_error: float
    bootstrap_error: float
    forward: float | None = None
    reverse: float | None = None
    crooks_slope: tuple[float, float] | None = None
    verdict: str = ""
    temperature: float = 300.0
    plain: "TargetedFreeEnergy | None" = field(default=None, repr=False)

    def in_units(self, unit: str) -> tuple[float, float]:
        """Value and standard error in ``kT``, ``kJ/mol`` or ``kcal/mol``.

        Raises:
            InputError: any other unit.
        """
        kt = thermal_energy(self.temperature)
        factors = {"kT": 1.0, "kJ/mol": kt, "kcal/mol": kt / KJ_PER_KCAL}
        if unit not in factors:
            raise InputError(f"unit is {unit!r}; choose one of {', '.join(factors)}")
        return self.delta_f * factors[unit], self.uncertainty * factors[unit]

    def __str__(self) -> str:
        pairs = [(*self.in_units(u), u) for u in ("kT", "kJ/mol", "kcal/mol")]
        values = " = ".join(f"{value:.3f} ± {error:.3f} {u}" for value, error, u in pairs)
        return f"delta_f = {values} at {self.temperature:g} K ({self.method}; {self.verdict})"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings for JSON (infinite values become None)."""
        out = {k: _plain_value(getattr(self, k)) for k in self.__dataclass_fields__ if k != "plain"}
        out |= {name: [_plain_value(v) for v in self.in_units(name)] for name in ("kJ/mol", "kcal/mol")}
        out["plain"] = self.plain.to_dict() if self.plain is not None else None
        return out


def _plain_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain_value(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def load_pymbar() -> Any:
    """pymbar without its import banners."""
    loggers = [logging.getLogger(name) for name in ("pymbar.timeseries", "pymbar.mbar_solvers", "pymbar")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        import pymbar
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
    return pymbar


@contextmanager
def quiet() -> Iterator[None]:
    """pymbar changes numpy's global error state and global random state, and logs at length: undo all three."""
    state = np.random.get_state()
    logger = logging.getLogger("pymbar")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with np.errstate(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        np.random.set_state(state)


def check_works(works: Any, name: str) -> np.ndarray:
    """Works as float64 `(n_maps, n)`.

    Raises:
        InputError: NaN or -inf, or more than two axes.
        InsufficientDataError: fewer than two samples, or none of them finite.
    """
    w_kn = np.atleast_2d(to_numpy(works).astype(np.float64))
    if w_kn.ndim != 2:
        raise InputError(f"{name} works have shape {w_kn.shape}; (n,) or (n_maps, n) is needed")
    bad = np.isnan(w_kn) | (w_kn == -np.inf)
    if bad.any():
        raise InputError(
            f"{int(bad.sum())} of {w_kn.size} {name} works are NaN or -inf; a sample must have a finite energy in its "
            "own state, and an unusable mapped energy counts as +inf"
        )
    if w_kn.shape[1] < 2:
        raise InsufficientDataError(f"{w_kn.shape[1]} {name} sample(s); an error bar needs at least two, better 100")
    if not np.isfinite(w_kn).any():
        raise InsufficientDataError(
            f"all {w_kn.shape[1]} {name} works are infinite: the map never reaches the other state; train it on "
            "samples of both states"
        )
    return w_kn


@dataclass(frozen=True)
class Side:
    """Works of one direction with their correlation.

    Attributes:
        works: `(n_maps, n)` [kT].
        inefficiency: samples per independent sample.
    """

    works: np.ndarray
    inefficiency: float

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.works.shape[1]

    @property
    def n_independent(self) -> float:
        """Number of independent samples."""
        return self.n / self.inefficiency

    @property
    def block(self) -> int:
        """Block length of the bootstrap: three inefficiencies, at least ten blocks; 1 for independent samples."""
        if self.inefficiency < 1.2:
            return 1
        return max(1, min(math.ceil(3 * self.inefficiency), self.n // 10))

    def counts(self, rng: np.random.Generator) -> np.ndarray:
        """Bootstrap multiplicities `(n,)` of the samples."""
        return np.bincount(block_indices(self.n, self.block, rng), minlength=self.n).astype(np.float64)

    def decorrelated(self) -> np.ndarray:
        """Works of an independent subset of the samples, `(n_maps, k)`."""
        stride = load_pymbar().timeseries.subsample_correlated_data(np.arange(self.n), g=self.inefficiency)
        return self.works[:, stride]


def statistical_inefficiency(series_n: np.ndarray) -> float:
    """Samples per independent sample of a series, by pymbar; 1 for a constant series."""
    largest = np.abs(series_n).max()
    if np.ptp(series_n) <= 1e-12 * largest:
        return 1.0
    pymbar = load_pymbar()
    with quiet():
        try:
            # The quadratic cost is cut for long series by pymbar's widening lags, which errs on the safe side.
            return float(pymbar.timeseries.statistical_inefficiency(series_n / largest, fast=series_n.size > 50_000))
        except pymbar.utils.ParameterError:  # a variance that underflows: one sample is all that counts
            return 1.0


def make_side(w_kn: np.ndarray, influence_kn: np.ndarray, correlated: bool) -> Side:
    """A side whose correlation is that of the estimator's own influence function, averaged over the maps."""
    return Side(w_kn, statistical_inefficiency(influence_kn.mean(axis=0)) if correlated else 1.0)


def bootstrap(statistic: Callable[..., float], sides: list[Side], n_resamples: int, generator: Seed) -> np.ndarray:
    """Replicas `(n_resamples,)` of ``statistic(*counts of each side)``; NaN where a replica has too few data."""
    rng = as_generator(generator)
    replicas = np.full(n_resamples, np.nan)
    for i in range(n_resamples):
        try:
            replicas[i] = statistic(*(side.counts(rng) for side in sides))
        except InsufficientDataError:
            continue
    return replicas


def spread(replicas: np.ndarray) -> float:
    """Standard deviation of the finite replicas; inf if under half of them are finite."""
    usable = replicas[np.isfinite(replicas)]
    return float(usable.std(ddof=1)) if usable.size >= max(2, replicas.size // 2) else math.inf


def verdict_two_sided(result: TargetedFreeEnergy, dissipation: float) -> str:
    """Words for BAR and MBAR; ``dissipation`` is the z-score of mean w_F + mean w_R below zero."""
    overlap, independent = result.overlap or 0.0, min(result.n_independent)
    figures = f"overlap {overlap:.2g}, {independent:.0f} independent samples"
    if dissipation < -4:
        return (
            f"do not trust: the works break the second law (mean forward + mean reverse is {dissipation:.0f} standard "
            "errors below zero); check the sign of the works and of the log-determinants"
        )
    if result.crooks_slope is not None and abs(result.crooks_slope[0] - 1) > 5 * result.crooks_slope[1]:
        b, e = result.crooks_slope
        return (
            f"do not trust: forward and reverse works are inconsistent (Crooks slope {b:.2f} ± {e:.2f}, should be 1); "
            "check signs, log-determinants, equilibration, and that no sample trained the map"
        )
    if independent < INDEPENDENT_LIMIT:
        return f"do not trust: {figures}; run longer or give less correlated samples"
    if overlap < OVERLAP_LIMIT or not math.isfinite(result.uncertainty):
        return f"do not trust: {figures}; the map does not connect the states, train it further"
    if overlap < OVERLAP_CARE or independent < INDEPENDENT_CARE or result.uncertainty > 1.0:
        return f"use with care: {figures}"
    return f"reliable: {figures}"


def verdict_one_sided(result: TargetedFreeEnergy, works: np.ndarray, covered: bool = True) -> str:
    """Words for exponential averages: the tail of exp(-w) decides.

    Args:
        result: of which the works are.
        works: `(n,)` [kT].
        covered: the opposite works said how much of the other state is reached, or the samples reach all of it.
    """
    effective = result.ess * min(n for n in result.n_independent if n > 0)
    figures = f"ESS {100 * result.ess:.3g} %, {effective:.0f} effective samples"
    try:
        k_hat = pareto_k(-works)
        figures += f", k-hat {k_hat:.2f}"
    except InsufficientDataError:
        return f"do not trust: {figures}; too few finite works to judge the tail"
    if effective < INDEPENDENT_LIMIT or k_hat > 0.7:
        return f"do not trust: {figures}; one-sided averages of such works are biased, use BAR with both directions"
    if not covered and not np.isfinite(works).all():
        return f"do not trust: {figures}; some samples leave the other state, and one direction cannot tell how much " \
            "of it the others reach"
    if not covered:
        return f"use with care: {figures}; one direction cannot tell whether all of the other state is reached"
    share = largest_share(-works)
    if share > LARGEST_SHARE:
        return f"use with care: {figures}; one work holds {100 * share:.0f} % of the sum of squared weights, on " \
            "which this error bar rests"
    if effective < 100 or k_hat > 0.5:
        return f"use with care: {figures}"
    return f"reliable: {figures}"


def _is_constant(w_n: np.ndarray) -> bool:
    return bool(np.isfinite(w_n).all() and np.ptp(w_n) <= PERFECT_SPREAD)


def _perfect(forward: np.ndarray | None, reverse: np.ndarray | None) -> float | None:
    """delta_f of the maps whose works are constant, None where there is no such map.

    Raises:
        InputError: constant forward works that contradict constant reverse works.
    """
    sides = [w for w in (forward, reverse) if w is not None]
    perfect = np.all([[_is_constant(w_n) for w_n in w] for w in sides], axis=0)
    if not perfect.any():
        return None
    values = [sign * w[perfect].mean(1) for w, sign in ((forward, 1), (reverse, -1)) if w is not None]
    if np.ptp(values) > 2 * PERFECT_SPREAD:
        raise InputError(
            f"the works of perfect maps say delta_f = {', '.join(f'{v:.6g}' for v in np.unique(values))}, forward and "
            "reverse, and should agree; check the sign of the works and of the log-determinants"
        )
    return float(np.mean(values))


def _ess(*works: np.ndarray | None) -> float:
    return min(effective_sample_size(-w) for w in works if w is not None)


def _pymbar_bar(w_f: np.ndarray, w_r: np.ndarray, root: float, method: str) -> tuple[float, float]:
    """delta_f and its asymptotic error by pymbar's BAR or two-state MBAR.

    Works further than ``CLIP`` from the Fermi function's step are moved there: they change no sum in float64,
    and pymbar turns infinite or very large ones into a free energy of 0 with error 0.
    """
    pymbar = load_pymbar()
    m = math.log(w_f.size / w_r.size)
    f = np.clip(w_f, root - m - CLIP, root - m + CLIP)
    r = np.clip(w_r, -root + m - CLIP, -root + m + CLIP)
    with quiet():
        if method == "bar":
            result = pymbar.bar(f, r, DeltaF=root, method="bisection", relative_tolerance=1e-12)
            return float(result["Delta_f"]), float(result["dDelta_f"])
        u_kn = np.zeros((2, f.size + r.size))
        u_kn[1, : f.size], u_kn[0, f.size :] = f, r
        mbar = pymbar.MBAR(u_kn, [f.size, r.size], initial_f_k=np.array([0.0, root]))
        result = mbar.compute_free_energy_differences()
        return float(result["Delta_f"][0, 1]), float(result["dDelta_f"][0, 1])


def _asymptotic(w_f: np.ndarray, w_r: np.ndarray, root: float, method: str) -> tuple[float, float]:
    """As :func:`_pymbar_bar`, with pymbar's failures and its confident zero turned into an infinite error."""
    pymbar = load_pymbar()
    try:
        value, error = _pymbar_bar(w_f, w_r, root, method)
    except (pymbar.utils.ParameterError, pymbar.utils.ConvergenceError, pymbar.utils.BoundsError, FloatingPointError):
        return root, math.inf
    # pymbar answers hopeless overlap by 0 with error 0, and underflowing variances by NaN.
    if not (math.isfinite(value) and math.isfinite(error)) or (value == 0.0 and error == 0.0):
        return root, math.inf
    return value, error


def _two_sided(
    f_kn: np.ndarray, r_kn: np.ndarray, method: str, correlated: bool, n_resamples: int, generator: Seed
) -> TargetedFreeEnergy:
    f_kn, r_kn = _connected(f_kn, r_kn)
    roots = np.array([bar_root(f, r) for f, r in zip(f_kn, r_kn)])
    m = math.log(f_kn.shape[1] / r_kn.shape[1])
    # The influence of a sample on BAR is its Fermi function, and so is what its correlation must be measured on.
    side_f = make_side(f_kn, expit(roots[:, None] - m - f_kn), correlated)
    side_r = make_side(r_kn, expit(-roots[:, None] + m - r_kn), correlated)
    replicas = _map_replicas(side_f, side_r, roots, n_resamples, generator)
    share = _combination(replicas)
    used = share != 0  # one that fails in a replica says nothing of the others' error
    f_kn, r_kn, roots, share, replicas = f_kn[used], r_kn[used], roots[used], share[used], replicas[:, used]
    side_f, side_r = replace(side_f, works=f_kn), replace(side_r, works=r_kn)
    values = np.array([_asymptotic(f, r, root, method)[0] for f, r, root in zip(f_kn, r_kn, roots)])
    asymptotic = _decorrelated_error(side_f, side_r, roots, method, share, replicas)
    errors = asymptotic, spread(replicas @ share)
    overlaps = np.array([bar_overlap(f, r, root) for f, r, root in zip(f_kn, r_kn, roots)])
    best, delta_f = int(np.argmax(overlaps)), float(share @ values)
    result = TargetedFreeEnergy(
        delta_f=delta_f, uncertainty=max(errors), method=method, overlap=float(overlaps[best]),
        ess=_ess(f_kn[best], r_kn[best]), n_forward=side_f.n, n_reverse=side_r.n,
        n_independent=(side_f.n_independent, side_r.n_independent), pymbar_error=errors[0], bootstrap_error=errors[1],
        forward=one_sided(f_kn[best], r_kn[best]), reverse=-one_sided(r_kn[best], f_kn[best]),
        crooks_slope=crooks_slope(f_kn[best], r_kn[best], delta_f, max(side_f.inefficiency, side_r.inefficiency)),
    )  # fmt: skip
    frozen = [name for name, w in (("A", f_kn), ("B", r_kn)) if _is_constant(w[best])]
    if frozen:  # beside works that vary: the same configuration again and again
        words = f"do not trust: all works of the samples of {frozen[0]} are equal; is it one frame, repeated?"
        return replace(result, verdict=words)
    return replace(result, verdict=verdict_two_sided(result, second_law(side_f, side_r)))


def _connected(f_kn: np.ndarray, r_kn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The maps that have finite works in both directions."""
    use = np.isfinite(f_kn).any(axis=1) & np.isfinite(r_kn).any(axis=1)
    if not use.any():
        raise InsufficientDataError("no map has finite works in both directions; the two states do not overlap")
    return f_kn[use], r_kn[use]


def _map_replicas(side_f: Side, side_r: Side, roots: np.ndarray, n_resamples: int, generator: Seed) -> np.ndarray:
    """Bootstrap replicas `(n_resamples, n_maps)` of BAR: a sample is resampled with its works under all maps."""
    rng = as_generator(generator)
    replicas = np.full((n_resamples, roots.size), np.nan)
    for i in range(n_resamples):
        counts = side_f.counts(rng), side_r.counts(rng)
        for k, root in enumerate(roots):
            try:
                replicas[i, k] = bar_root(side_f.works[k], side_r.works[k], *counts, start=root)
            except InsufficientDataError:
                continue
    return replicas


def _combination(replicas: np.ndarray) -> np.ndarray:
    """Weights `(n_maps,)` of least variance for estimates of one number: ``C^-1 1 / (1^T C^-1 1)``.

    C is the bootstrap covariance. A map that fails in some replicas is left out unless all do; one per cent on the
    diagonal keeps maps that do the same thing apart.
    """
    if replicas.shape[1] == 1:
        return np.ones(1)
    usable = np.isfinite(replicas).all(axis=0)
    if not usable.any():
        usable = np.isfinite(replicas).sum(axis=0) == np.isfinite(replicas).sum(axis=0).max()
    columns = replicas[np.isfinite(replicas[:, usable]).all(axis=1)][:, usable]
    covariance = np.atleast_2d(np.cov(columns.T))
    covariance = covariance + 0.01 * np.diag(np.diag(covariance)) + PERFECT_SPREAD**2 * np.eye(len(covariance))
    raw = np.linalg.solve(covariance, np.ones(len(covariance)))
    share = np.zeros(replicas.shape[1])
    share[usable] = raw / raw.sum()
    return share


def _decorrelated_error(
    side_f: Side, side_r: Side, roots: np.ndarray, method: str, share: np.ndarray, replicas: np.ndarray
) -> float:
    """pymbar's error on independent samples; over several maps combined with the bootstrap's correlations."""
    errors = []
    for f, r, root in zip(side_f.decorrelated(), side_r.decorrelated(), roots):
        enough = np.isfinite(f).any() and np.isfinite(r).any()
        errors.append(_asymptotic(f, r, bar_root(f, r) if enough else root, method)[1])
    weighted = share * np.array(errors)
    if weighted.size == 1 or not np.isfinite(weighted).all():
        return float(np.abs(weighted).sum())
    correlation = np.corrcoef(replicas[np.isfinite(replicas).all(axis=1)].T)
    return math.sqrt(max(0.0, float(weighted @ correlation @ weighted)))


def second_law(side_f: Side, side_r: Side) -> float:
    """z-score of mean w_F + mean w_R over finite works, a sum of two relative entropies and so never negative.

    The finite works are those of the two states restricted to what the map connects; the restriction shifts w_F
    and w_R by opposite constants, which the sum does not see.
    """
    total, variance = 0.0, 0.0
    for side in (side_f, side_r):
        finite = side.works[np.isfinite(side.works)]
        total += finite.mean()
        # Maps share their samples: their works count once.
        variance += finite.var() * side.inefficiency * len(side.works) / finite.size
    return float(total / max(math.sqrt(variance), PERFECT_SPREAD))


def most_inconsistent(slopes: Sequence[tuple[float, float] | None]) -> tuple[float, float] | None:
    """The Crooks slope furthest from 1 in units of its error, of those that could be fitted."""
    known = [slope for slope in slopes if slope is not None]
    return max(known, key=lambda slope: abs(slope[0] - 1) / slope[1], default=None)


def _one_sided(
    w_kn: np.ndarray, opposite: np.ndarray | None, sign: int, correlated: bool, n_resamples: int, generator: Seed
) -> TargetedFreeEnergy:
    w_n = w_kn.ravel()
    o_n = None if opposite is None else opposite.ravel()
    side = make_side(w_kn, np.exp(-(w_kn - w_kn.min())), correlated)
    sides = [side]
    if opposite is not None:
        sides.append(make_side(opposite, np.isfinite(opposite).astype(float), correlated))
    replicas = bootstrap(lambda *counts: _one_sided_value(w_n, o_n, counts, len(w_kn)), sides, n_resamples, generator)
    with quiet():
        # Maps share their samples: exp(-w) of a sample is its mean over them.
        joint = -logsumexp(-side.decorrelated(), axis=0) + math.log(len(w_kn))
        pymbar_error = float(load_pymbar().exp(joint)["dDelta_f"])
    delta_f = sign * one_sided(w_n, o_n)
    own, other = (side.n, side.n_independent), (0, 0.0) if o_n is None else (sides[1].n, sides[1].n_independent)
    front, back = (own, other) if sign > 0 else (other, own)
    result = TargetedFreeEnergy(
        delta_f=delta_f, uncertainty=max(pymbar_error, spread(replicas)), method="exp" if sign > 0 else "exp_reverse",
        overlap=None, ess=_ess(w_n), n_forward=front[0], n_reverse=back[0], n_independent=(front[1], back[1]),
        pymbar_error=pymbar_error, bootstrap_error=spread(replicas), forward=delta_f if sign > 0 else None,
        reverse=delta_f if sign < 0 else None,
    )  # fmt: skip
    return replace(result, verdict=verdict_one_sided(result, w_n, covered=opposite is not None))


def _one_sided_value(w_n: np.ndarray, o_n: np.ndarray | None, counts: tuple[np.ndarray, ...], n_maps: int) -> float:
    tiled = [np.tile(count_n, n_maps) for count_n in counts]
    return one_sided(w_n, o_n, tiled[0], tiled[1] if o_n is not None else None)


def _cumulant(w_kn: np.ndarray, correlated: bool) -> TargetedFreeEnergy:
    """Second-order cumulant expansion, exact for Gaussian works alone."""
    if not np.isfinite(w_kn).all():
        raise InputError("the cumulant expansion needs finite works; use 'bar'")
    side = make_side(w_kn, w_kn, correlated)
    with quiet():
        value = float(load_pymbar().exp_gauss(w_kn.ravel())["Delta_f"])
        error = float(load_pymbar().exp_gauss(side.decorrelated().ravel())["dDelta_f"])
    return TargetedFreeEnergy(
        delta_f=value, uncertainty=error, method="cumulant", overlap=None, ess=_ess(w_kn.ravel()), n_forward=side.n,
        n_reverse=0, n_independent=(side.n_independent, 0.0), pymbar_error=error, bootstrap_error=math.nan,
        verdict="diagnostic only: the second-order cumulant expansion holds for Gaussian works alone",
    )  # fmt: skip


def estimate(
    forward: Any | None = None,
    reverse: Any | None = None,
    *,
    method: str = "bar",
    temperature: Any = 300.0,
    correlated: bool = True,
    n_resamples: int = 200,
    generator: Seed = None,
) -> TargetedFreeEnergy:
    """Free energy difference from generalised works.

    Args:
        forward: `(n,)` works of samples of A [kT]; or `(n_maps, n)`, the works of every sample under several
        maps
            (multimap, Rizzi et al. 2023). Every map obeys the fluctuation theorem with one delta_f; BAR is solved
            per map and the values are combined with the weights of least variance from a joint bootstrap.
            Exponential averages run over all maps.
        reverse: `(m,)` or `(n_maps, m)` works of samples of B [kT].
        method: ``bar`` or ``mbar`` (both directions; the same estimator for two states, two implementations),
            ``exp`` (forward), ``exp_reverse``, or ``cumulant`` (a labelled diagnostic). Where the opposite
            works are given too, exponential averages are corrected for unreached parts of the other state.
        temperature: [K or Quantity], for printing in kJ/mol and kcal/mol.
        correlated: the samples are in order of time and may be correlated: statistical inefficiencies are
        measured
            (pymbar.timeseries) and bootstrap blocks sized by them. False for independent samples.
        n_resamples: bootstrap replicas.
        generator: NumPy generator or seed of the bootstrap.

    Returns:
        The result. Its value uses every sample; its error is the larger of pymbar's on decorrelated samples
        and of the block bootstrap's on all.

    Raises:
        InputError: unknown method, a missing direction, NaN or -inf works, contradictory constant works.
        InsufficientDataError: one sample, or no finite work on a side that is needed.
    """
    kelvin = temperature_kelvin(temperature)
    if method not in METHODS:
        raise InputError(f"method is {method!r}; choose one of {', '.join(METHODS)}")
    needed = {"exp": (forward,), "cumulant": (forward,), "exp_reverse": (reverse,)}.get(method, (forward, reverse))
    if any(w is None for w in needed):
        raise InputError(f"method {method!r} needs {'forward and reverse works' if len(needed) == 2 else 'its works'}")
    f_kn = None if forward is None else check_works(forward, "forward")
    r_kn = None if reverse is None else check_works(reverse, "reverse")
    if f_kn is not None and r_kn is not None and len(f_kn) != len(r_kn):
        raise InputError(f"{len(f_kn)} maps forward and {len(r_kn)} in reverse; every map needs both directions")
    constant = _perfect(f_kn, r_kn)
    if constant is not None:
        return _perfect_result(constant, f_kn, r_kn, method, kelvin)
    if method in ("bar", "mbar"):
        result = _two_sided(f_kn, r_kn, method, correlated, n_resamples, generator)  # type: ignore[arg-type]
    elif method == "cumulant":
        result = _cumulant(f_kn, correlated)  # type: ignore[arg-type]
    else:
        own, other, sign = (f_kn, r_kn, 1) if method == "exp" else (r_kn, f_kn, -1)
        result = _one_sided(own, other, sign, correlated, n_resamples, generator)  # type: ignore[arg-type]
    return replace(result, temperature=kelvin)


def _perfect_result(
    value: float, f_kn: np.ndarray | None, r_kn: np.ndarray | None, method: str, kelvin: float
) -> TargetedFreeEnergy:
    n_f, n_r = (0 if w is None else w.shape[1] for w in (f_kn, r_kn))
    return TargetedFreeEnergy(
        delta_f=value, uncertainty=0.0, method=method, overlap=1.0 if n_f and n_r else None, ess=1.0, n_forward=n_f,
        n_reverse=n_r, n_independent=(float(n_f), float(n_r)), pymbar_error=0.0, bootstrap_error=0.0,
        forward=value if n_f else None, reverse=value if n_r else None, temperature=kelvin,
        verdict="reliable: all works are equal, the map is perfect and the error zero",
    )  # fmt: skip


@dataclass(frozen=True)
class MultistateFreeEnergy:
    """Free energies of several states relative to the first.

    Attributes:
        delta_f: `(n_states,)` [kT], first entry 0.
        uncertainty: `(n_states,)` [kT], the larger of pymbar's and the bootstrap's.
        overlap: `(n_states, n_states)` overlap matrix.
        verdict: in words.
    """

    delta_f: np.ndarray
    uncertainty: np.ndarray
    overlap: np.ndarray
    verdict: str


def estimate_states(u_kn: Any, n_k: Any, *, n_resamples: int = 50, generator: Seed = None) -> MultistateFreeEnergy:
    """MBAR over several (mapped) states (Shirts & Chodera 2008; Paliwal & Shirts 2013 for mapped ones).

    Sample n from state k has ``u_kn[k, n]`` its own reduced potential and ``u_kn[l, n]`` the mapped one
    ``u_l(M_kl(x)) - log|det J_kl(x)|``, for maps that are consistent: ``M_kl`` after ``M_jk`` equals
    ``M_jl``.

    Args:
        u_kn: `(n_states, n)` reduced potentials [kT] of independent samples, grouped by state; +inf is legal.
        n_k: `(n_states,)` samples per state.
        n_resamples: bootstrap replicas, resampled within each state.
        generator: NumPy generator or seed.

    Raises:
        InputError: shapes that do not fit, NaN or -inf.
        InsufficientDataError: a state without two samples.
    """
    u, counts = to_numpy(u_kn).astype(np.float64), to_numpy(n_k).astype(np.int64)
    if u.ndim != 2 or counts.shape != (len(u),) or counts.sum() != u.shape[1]:
        raise InputError(f"u_kn {u.shape} does not fit n_k {counts.tolist()}; columns must be the samples by state")
    if np.isnan(u).any() or (u == -np.inf).any():
        raise InputError("u_kn holds NaN or -inf; an unusable mapped energy counts as +inf")
    if counts.min() < 2:
        raise InsufficientDataError(f"n_k is {counts.tolist()}; every state needs at least two samples")
    owners = np.repeat(np.arange(counts.size), counts)
    bad = int((~np.isfinite(u[owners, np.arange(u.shape[1])])).sum())
    if bad:
        raise InputError(f"{bad} samples have an infinite energy in their own state; filter the trajectories first")
    offset = _neighbour_free_energies(u, owners)
    for _ in range(counts.size + 1):
        clipped = _relative(u, offset)
        rest, errors, matrix = mbar_solution(clipped, counts)
        value = offset + rest
        if np.ptp(rest) < CLIP:  # further away, clipping may have decided it
            break
        offset = value
    rng, replicas = as_generator(generator), []
    for _ in range(n_resamples):
        index = np.concatenate([rng.choice(np.flatnonzero(owners == k), counts[k]) for k in range(counts.size)])
        replicas.append(_mbar_values(clipped[:, index], counts, rest))
    error = np.maximum(errors[0], np.std(replicas, axis=0, ddof=1))
    eigenvalue = np.sort(np.linalg.eigvals(matrix).real)[-2] if counts.size > 1 else 0.0
    gap = float(1 - eigenvalue)
    few = counts.min()
    words = "use with care" if gap < OVERLAP_CARE or few < INDEPENDENT_CARE else "reliable"
    words = "do not trust" if gap < OVERLAP_LIMIT or few < INDEPENDENT_LIMIT else words
    return MultistateFreeEnergy(value, error, matrix, f"{words}: overlap {gap:.2g}, {counts.tolist()} samples")


def _neighbour_free_energies(u_kn: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """First estimates `(n_states,)` [kT] of free energies relative to state 0, from each state to the next by BAR."""
    steps = []
    for k, (low, high) in enumerate(pairwise(u_kn)):
        here, there = owners == k, owners == k + 1
        try:
            steps.append(bar_root(high[here] - low[here], low[there] - high[there]))
        except InsufficientDataError:
            steps.append(0.0)
    return np.cumsum([0.0, *steps])


def _relative(u_kn: np.ndarray, f_k: np.ndarray) -> np.ndarray:
    """Energies less free energies, each sample's lowest at 0, the highest clipped: exp of these is nothing (`CLIP`)."""
    u_kn = u_kn - f_k[:, None]
    return np.minimum(u_kn - u_kn.min(axis=0), 5 * CLIP)


def mbar_solution(
    u_kn: np.ndarray, n_k: np.ndarray, start: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """pymbar's free energies relative to state 0, the matrix of errors of all differences, the overlap matrix."""
    with quiet():
        mbar = load_pymbar().MBAR(u_kn, n_k, initial_f_k=start)
        result = mbar.compute_free_energy_differences()
        return result["Delta_f"][0], np.nan_to_num(result["dDelta_f"], nan=np.inf), mbar.compute_overlap()["matrix"]


def _mbar_values(u_kn: np.ndarray, n_k: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Free energies relative to state 0 alone."""
    with quiet():
        f_k = np.asarray(load_pymbar().MBAR(u_kn, n_k, initial_f_k=start).f_k)
    return f_k - f_k[0]


def convergence(forward: Any, reverse: Any, fractions: Any = None, *, n_resamples: int = 50) -> dict[str, np.ndarray]:
    """BAR and both exponential averages from growing parts of the data, for a convergence (hysteresis) plot.

    Args:
        forward: `(n,)` forward works [kT], or `(n_maps, n)`.
        reverse: `(m,)` reverse works [kT], or `(n_maps, m)`.
        fractions: of the samples, taken from the start; ten equal steps by default.
        n_resamples: bootstrap replicas of each error.

    Returns:
        ``fraction``, ``bar``, ``bar_error``, ``exp``, ``exp_error``, ``exp_reverse``, ``exp_reverse_error``:
        arrays of equal length [kT]; NaN where a part of the data has no finite works.
    """
    w_f, w_r = to_numpy(forward), to_numpy(reverse)
    parts = np.linspace(0.1, 1.0, 10) if fractions is None else np.asarray(fractions, dtype=float)
    rows = []
    for part in parts:
        pair = tuple(w[..., : max(2, int(part * w.shape[-1]))] for w in (w_f, w_r))
        row = [part]
        for method in ("bar", "exp", "exp_reverse"):
            try:
                result = estimate(*pair, method=method, n_resamples=n_resamples)
                row += [result.delta_f, result.uncertainty]
            except InsufficientDataError:
                row += [math.nan, math.nan]
        rows.append(row)
    names = ("fraction", "bar", "bar_error", "exp", "exp_error", "exp_reverse", "exp_reverse_error")
    return dict(zip(names, np.array(rows).T))
