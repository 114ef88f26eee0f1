"""Works of one direction: their checks, their correlation, their bootstrap; pymbar without its noise."""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.reweighting import Seed, as_generator, block_indices, to_numpy

#: exp(-CLIP) relative to the Fermi function's scale is nothing in float64; pymbar overflows beyond 700.
CLIP = 200.0
#: Overlap that is rounding.
NO_OVERLAP = 1e-9
#: Works that spread by less than this [kT] come from a perfect map: they all equal delta_f.
PERFECT_SPREAD = 1e-6
#: Stretches of a series whose means are compared, and by how much their variance exceeds that of independent ones in
#: one of a thousand series of independent samples (99.9 % quantile of chi-squared with nine degrees of freedom, by 9).
STRETCHES, SCATTER = 10, 3.1


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


def check_resamples(n: int) -> None:
    """Refuse a bootstrap that has no spread.

    Raises:
        InputError: fewer than two replicas.
    """
    if n < 2:
        raise InputError(f"n_resamples is {n}; a spread needs at least two replicas, better 50")


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
        """Block length of the bootstrap; 1 for independent samples.

        Three inefficiencies, or a twentieth of the series, since a slow mode under fast noise is longer than the
        inefficiency; at least ten blocks.
        """
        if self.inefficiency < 1.2:
            return 1
        return max(1, min(max(math.ceil(3 * self.inefficiency), self.n // 20), self.n // 10))

    def counts(self, rng: np.random.Generator) -> np.ndarray:
        """Bootstrap multiplicities `(n,)` of the samples."""
        return np.bincount(block_indices(self.n, self.block, rng), minlength=self.n).astype(np.float64)

    def decorrelated(self) -> np.ndarray:
        """Works of an independent subset of the samples, `(n_maps, k)`."""
        stride = load_pymbar().timeseries.subsample_correlated_data(np.arange(self.n), g=self.inefficiency)
        return self.works[:, stride]


def statistical_inefficiency(series_n: np.ndarray) -> float:
    """Samples per independent sample of a series; 1 for a constant series.

    pymbar's, which adds up autocorrelations until the first that drowns in noise, and so misses a slow mode under fast
    noise (a rare basin that shifts a work a little). Means of ten stretches do not; theirs is taken where it is larger
    and those of independent samples would hardly scatter so much (`SCATTER`).
    """
    largest = np.abs(series_n).max()
    if np.ptp(series_n) <= 1e-12 * largest:
        return 1.0
    pymbar = load_pymbar()
    with quiet():
        try:
            # The quadratic cost is cut for long series by pymbar's widening lags, which errs on the safe side.
            fast = series_n.size > 50_000
            inefficiency = float(pymbar.timeseries.statistical_inefficiency(series_n / largest, fast=fast))
        except pymbar.utils.ParameterError:  # a variance that underflows: one sample is all that counts
            return 1.0
    by_stretches = _stretches(series_n / largest)
    return max(inefficiency, by_stretches) if by_stretches > SCATTER else inefficiency


def _stretches(series_n: np.ndarray) -> float:
    """Samples per independent sample by the scatter of the means of `STRETCHES` stretches of a series (batch means)."""
    size = series_n.size // STRETCHES
    if size < 2:
        return 1.0
    means = series_n[: size * STRETCHES].reshape(STRETCHES, size).mean(1)
    return float(size * means.var(ddof=1) / series_n.var())


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
