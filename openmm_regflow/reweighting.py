"""Importance weights of independent samples: expectations, effective sample size, tail diagnostics, free
energies.

Everything is a function of arrays. A log-weight is ``log_w_n = log p~(x_n) - log q(x_n)`` with the target's
log-density ``log p~`` known up to a constant (for a Boltzmann distribution ``-u``) and samples ``x_n ~ q``.
The estimators are those of self-normalised importance sampling (SNIS; Owen, *Monte Carlo theory, methods and
examples*, chapter 9), with ``w_n`` short for ``exp(log_w_n)``.

A log-weight of ``-inf`` (a sample of infinite energy) is a legal zero weight: the sample still counts in
``n``. NaN and ``+inf`` are refused with :class:`~openmm_regflow.errors.InputError`; weights that are all
zero raise :class:`~openmm_regflow.errors.InsufficientDataError`. Torch tensors are accepted wherever arrays
are. All standard errors take the samples as independent; for a Markov chain use the block bootstrap.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from openmm_regflow.errors import InputError, InsufficientDataError

#: Fewer weights than this cannot be given a Pareto tail (five tail points out of a fifth of the sample).
MIN_PARETO_SAMPLES = 25
#: Fewer effective samples than this are one weight and some company.
FEWEST_EFFECTIVE = 3.0
#: Above this shape the variance of the weights is judged infinite (Vehtari et al. 2024, section 3).
PARETO_K_LIMIT = 0.7
#: Above this part of the sum of squared weights one sample decides what error bars there are.
LARGEST_SHARE = 0.25
#: Effective samples of what is called reliable.
ENOUGH_EFFECTIVE = 400
#: Below this number of steps a chain that never stuck has shown little.
FEWEST_STEPS = 100
#: Part of the bootstrap replicas that must have enough data for their spread to be an error.
USABLE = 0.95

Seed = np.random.Generator | int | None


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error.

    Attributes:
        value: the estimate, a float or an array.
        error: one standard error, of the same shape.
        n: number of samples behind it.
        ess: Kish fraction of the weights behind it, in (0, 1].
    """

    value: Any
    error: Any
    n: int
    ess: float = 1.0

    def __str__(self) -> str:
        if np.ndim(self.value):
            return f"{self.value} ± {self.error} (n = {self.n}, ESS {self.ess:.3g})"
        return f"{self.value:.4g} ± {self.error:.2g} (n = {self.n}, ESS {self.ess:.3g})"


def to_numpy(values: Any) -> np.ndarray:
    """``values`` (array-like or torch tensor on any device) as a NumPy array of unchanged dtype."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values)


def as_generator(generator: Seed) -> np.random.Generator:
    """A NumPy generator from a generator, a seed, or None (seed 0, so that results repeat)."""
    if isinstance(generator, np.random.Generator):
        return generator
    return np.random.default_rng(0 if generator is None else generator)


def check_log_weights(log_weights: Any) -> np.ndarray:
    """Validated log-weights as a float64 array `(n,)`.

    Raises:
        InputError: not one-dimensional, NaN or +inf among them.
        InsufficientDataError: none at all, or every weight is zero.
    """
    log_w_n = to_numpy(log_weights).astype(np.float64)
    if log_w_n.ndim != 1:
        raise InputError(
            f"log_weights have shape {log_w_n.shape}; one log-weight per sample, shape (n,), is needed"
        )
    bad = np.isnan(log_w_n) | (log_w_n == np.inf)
    if bad.any():
        raise InputError(
            f"{int(bad.sum())} of {log_w_n.size} log_weights are NaN or +inf, "
            f"the first at index {int(bad.argmax())}; "
            "give samples without a usable energy a log-weight of -inf"
        )
    if not np.isfinite(log_w_n).any():
        raise InsufficientDataError(
            f"all {log_w_n.size} log_weights are -inf: no sample has a finite energy; "
            "check the flow and the potential"
        )
    return log_w_n


def log_sum_exp(values: np.ndarray, axis: int | None = None) -> Any:
    """Stable ``log(sum(exp(values)))`` along ``axis``; -inf where everything is -inf."""
    top = np.max(values, axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        total = np.log(np.sum(np.exp(values - top), axis=axis, keepdims=True)) + top
    return total.item() if axis is None else np.squeeze(total, axis=axis)


def normalised_weights(log_weights: Any) -> np.ndarray:
    """Weights `(n,)` that sum to one.

    Raises:
        InputError: NaN or +inf log-weights.
        InsufficientDataError: all weights are zero.
    """
    log_w_n = check_log_weights(log_weights)
    w_n = np.exp(log_w_n - log_w_n.max())
    return w_n / w_n.sum()


def effective_sample_size(log_weights: Any) -> float:
    """Kish effective sample size as a fraction in (0, 1]: ``(sum w)^2 / (n sum w^2)``.

    Args:
        log_weights: `(n,)`, known up to a common constant; -inf is a zero weight.

    Returns:
        1 for equal weights, 1/n when one sample carries all the weight (Kish 1965; Liu 2001, section 2.5.3).
    """
    w_n = normalised_weights(log_weights)
    # Rounding can push n equal weights a few ulp above 1.
    return float(min(1.0, 1.0 / (w_n.size * np.square(w_n).sum())))


def drop_top(log_weights: Any, top: float = 0.002) -> np.ndarray:
    """The log-weights without the fraction ``top`` of the largest ones (rounded up), in their old order.

    This biases every estimate: it serves the comparison with codes that truncate, never an observable.

    Raises:
        InputError: ``top`` outside [0, 1) or nothing would be left.
    """
    log_w_n = check_log_weights(log_weights)
    return log_w_n[rows_without_top(log_w_n, top)]


def rows_without_top(log_weights: Any, top: float = 0.002) -> np.ndarray:
    """Indices, in order, of what `drop_top` keeps."""
    log_w_n = check_log_weights(log_weights)
    if not 0.0 <= top < 1.0:
        raise InputError(f"top is {top}; the fraction of weights to drop lies in [0, 1)")
    # The small offset keeps 0.002 * 10000 at 20 whatever the rounding of the product.
    n_drop = math.ceil(top * log_w_n.size - 1e-9)
    if n_drop >= log_w_n.size:
        raise InsufficientDataError(
            f"dropping {n_drop} of {log_w_n.size} weights leaves none; give more samples"
        )
    keep = np.argsort(log_w_n, kind="stable")[: log_w_n.size - n_drop]
    return np.sort(keep)


def truncated_effective_sample_size(log_weights: Any, top: float = 0.002) -> float:
    """Kish fraction after the largest ``top`` of the weights has been dropped (biased; for comparison only).

    Several published Boltzmann generators report this figure, with 0.2 % dropped, as "ESS".

    Args:
        log_weights: `(n,)`.
        top: fraction of samples dropped, rounded up to whole samples.
    """
    return effective_sample_size(drop_top(log_weights, top))


def block_indices(n: int, block: int, rng: np.random.Generator) -> np.ndarray:
    """Indices `(n,)` of one circular block-bootstrap resample with blocks of ``block`` consecutive samples.

    Blocks start anywhere and wrap round the end, so that every sample is equally likely (Politis & Romano
    1992).
    """
    if block <= 1:
        return rng.integers(0, n, n)
    starts = rng.integers(0, n, -(-n // block))
    return ((starts[:, None] + np.arange(block)) % n).ravel()[:n]


def bootstrap_samples(
    statistic: Callable[..., Any],
    *arrays: Any,
    n_resamples: int = 200,
    block: int = 1,
    generator: Seed = None,
) -> np.ndarray:
    """Bootstrap replicas of ``statistic(*arrays)``, rows of all arrays resampled together.

    Args:
        statistic: function of the arrays, returning a float or an array.
        *arrays: arrays that share their first axis `(n, ...)`.
        n_resamples: number of replicas.
        block: length of the circular blocks; 1 for independent samples.
        generator: NumPy generator or seed.

    Returns:
        `(n_resamples, ...)`; replicas on which the statistic has too few data are NaN.

    Raises:
        InputError: arrays of unequal length, fewer than two resamples.
    """
    rows = [to_numpy(a) for a in arrays]
    n = len(rows[0])
    if any(len(a) != n for a in rows):
        raise InputError(
            f"arrays of {[len(a) for a in rows]} samples cannot be resampled together; give equal lengths"
        )
    if n_resamples < 2:
        raise InputError(f"n_resamples is {n_resamples}; at least 2 are needed for an error")
    rng = as_generator(generator)
    replicas = []
    for _ in range(n_resamples):
        index = block_indices(n, block, rng)
        try:
            replicas.append(np.asarray(statistic(*(a[index] for a in rows)), dtype=np.float64))
        except InsufficientDataError:
            replicas.append(np.asarray(np.nan))
    shape = max((r.shape for r in replicas), key=len)
    return np.stack([np.broadcast_to(r, shape) for r in replicas])


def bootstrap_error(
    statistic: Callable[..., Any],
    *arrays: Any,
    n_resamples: int = 200,
    block: int = 1,
    generator: Seed = None,
) -> Any:
    """Standard error of ``statistic(*arrays)``: the spread of its bootstrap replicas (Efron 1979).

    Arguments as in :func:`bootstrap_samples`. Replicas with too few data are left out, if they are few: those without
    the rare event are the ones that say how uncertain it is.

    Raises:
        InsufficientDataError: more than a twentieth of the replicas have too few data, or fewer than two are usable.
    """
    replicas = bootstrap_samples(
        statistic, *arrays, n_resamples=n_resamples, block=block, generator=generator
    )
    usable = np.isfinite(replicas.reshape(len(replicas), -1)).all(axis=1)
    if usable.sum() < max(2, USABLE * n_resamples):
        raise InsufficientDataError(
            f"only {int(usable.sum())} of {n_resamples} bootstrap replicas have enough data, so that their spread is "
            "no error; add samples"
        )
    error = replicas[usable].std(axis=0, ddof=1)
    return float(error) if error.ndim == 0 else error


def effective_sample_size_error(log_weights: Any, n_resamples: int = 2000, generator: Seed = None) -> float:
    """Standard error of the Kish fraction, by a bootstrap with a smooth tail.

    Weights that were seen, resampled, forget that larger ones exist, and the Kish fraction rests on those: for tails
    that are worth the name their spread is half of what it should be. So the largest min(n/5, 3 sqrt(n)) of a replica
    are drawn from a generalised Pareto distribution, fitted to the largest observed as in PSIS, and the sums of the
    others from their normal distribution. Where the largest weight lies beyond the fit, drawing from the observed ones
    spreads more, and the larger error counts. For light tails both are the plain bootstrap's. (For skewed weights
    the fraction itself is biased upwards, which no error bar tells.)

    Args:
        log_weights: `(n,)`.
        n_resamples: replicas; a few with very large weights decide, so that it takes many.
        generator: NumPy generator or seed.

    Returns:
        the error, a fraction.

    Raises:
        InsufficientDataError: fewer than 25 positive weights.
    """
    from scipy.stats import genpareto

    rng, log_w_n = as_generator(generator), np.sort(check_log_weights(log_weights))
    n, n_positive = log_w_n.size, int(np.isfinite(log_w_n).sum())
    if n_positive < MIN_PARETO_SAMPLES:
        raise InsufficientDataError(
            f"{n_positive} positive weights; at least {MIN_PARETO_SAMPLES} are needed to fit a Pareto tail"
        )
    w_n = np.exp(log_w_n - log_w_n[-1])
    n_tail = _tail_size(n_positive)
    body, threshold, excess = w_n[:-n_tail], w_n[-n_tail - 1], w_n[-n_tail:] - w_n[-n_tail - 1]
    if np.ptp(excess) < 1e-12:  # weights that are equal there have no tail
        return bootstrap_error(effective_sample_size, log_w_n, n_resamples=n_resamples, generator=rng)
    shape, _, scale = genpareto.fit(excess, floc=0.0)
    powers = np.stack([body, np.square(body)])
    sizes = rng.binomial(n, n_tail / n, n_resamples)
    noise = rng.multivariate_normal([0.0, 0.0], np.cov(powers), n_resamples, method="eigh")
    bulk = (n - sizes)[:, None] * powers.mean(1) + np.sqrt(n - sizes)[:, None] * noise
    replica = np.repeat(np.arange(n_resamples), sizes)

    def spread(tails: np.ndarray) -> float:
        first, second = (b + np.bincount(replica, tails**k, n_resamples) for k, b in ((1, bulk[:, 0]), (2, bulk[:, 1])))
        some = second > 0  # a replica may have drawn none of a few weights
        return float(np.minimum(1.0, np.square(first[some]) / (n * second[some])).std(ddof=1))

    fitted = threshold + genpareto.rvs(shape, scale=scale, size=sizes.sum(), random_state=rng)
    return max(spread(fitted), spread(threshold + rng.choice(excess, sizes.sum())))


def _check_values(values: Any, w_n: np.ndarray) -> np.ndarray:
    """Values `(n, ...)` as float64, zeroed where the weight is zero; weighted ones must be finite."""
    f_n = to_numpy(values).astype(np.float64)
    if f_n.shape[:1] != w_n.shape:
        raise InputError(
            f"values have shape {f_n.shape} but there are {w_n.size} log_weights; give one value per weight"
        )
    used = (w_n > 0).reshape(-1, *[1] * (f_n.ndim - 1))
    if not np.isfinite(np.where(used, f_n, 0.0)).all():
        raise InputError(
            "values hold NaN or infinity where the weight is positive; give such samples weight -inf"
        )
    return np.where(used, f_n, 0.0)


def expectation(
    values: Any, log_weights: Any, *, error: str = "delta", n_resamples: int = 200, generator: Seed = None
) -> Estimate:
    """Self-normalised importance-sampling mean ``sum w f / sum w`` with its standard error.

    Args:
        values: `(n,)` or `(n, ...)`, the observable of each sample; ignored where the weight is zero.
        log_weights: `(n,)`.
        error: ``"delta"``: ``sqrt(sum w~^2 (f - mean)^2)`` with normalised weights w~ (Owen, equation 9.9);
            ``"bootstrap"``: spread of resampled estimates.
        n_resamples: bootstrap replicas.
        generator: NumPy generator or seed of the bootstrap.

    Raises:
        InputError: mismatched lengths, non-finite values of positive weight, unknown ``error``.
    """
    w_n = normalised_weights(log_weights)
    f_n = _check_values(values, w_n)
    mean: Any = np.tensordot(w_n, f_n, axes=1)
    if error == "delta":
        spread: Any = np.sqrt(np.tensordot(np.square(w_n), np.square(f_n - mean), axes=1))
    elif error == "bootstrap":
        log_w_n = check_log_weights(log_weights)
        spread = bootstrap_error(
            lambda f, lw: np.tensordot(normalised_weights(lw), f, axes=1),
            f_n,
            log_w_n,
            n_resamples=n_resamples,
            generator=generator,
        )
    else:
        raise InputError(f"error is {error!r}; choose 'delta' or 'bootstrap'")
    if np.ndim(mean) == 0:
        mean, spread = float(mean), float(spread)
    return Estimate(mean, spread, w_n.size, effective_sample_size(log_weights))


def log_mean_exp(log_weights: Any) -> Estimate:
    """Log of the mean weight: the log-ratio of normalising constants ``log Z_target / Z_proposal``.

    The error follows from the delta method: ``var(mean w) / (mean w)^2 = (1/ESS - 1)/n`` with the Kish
    fraction ESS. It needs absolute log-weights (no constant dropped), and samples of zero weight included.
    """
    log_w_n = check_log_weights(log_weights)
    ess = effective_sample_size(log_w_n)
    value = log_sum_exp(log_w_n) - math.log(log_w_n.size)
    return Estimate(float(value), math.sqrt(max(0.0, 1.0 / ess - 1.0) / log_w_n.size), log_w_n.size, ess)


def free_energy(log_weights: Any) -> Estimate:
    """Reduced free energy ``-log(Z_target / Z_proposal)`` [kT]; of the target if q is normalised."""
    log_z = log_mean_exp(log_weights)
    return Estimate(-log_z.value, log_z.error, log_z.n, log_z.ess)


def population_delta_f(in_a: Any, in_b: Any, log_weights: Any | None = None) -> Estimate:
    """Free energy difference of two sets of configurations from their weighted populations.

    ``delta_f = f_B - f_A = -log(W_B / W_A)`` with ``W_S = sum_{n in S} w_n``. Error by the delta method: the
    influence of sample n on log W_B - log W_A is ``w_n (1_B(n)/W_B - 1_A(n)/W_A)``, and the squares are
    summed.

    Args:
        in_a: `(n,)` booleans, sample lies in A.
        in_b: `(n,)` booleans, sample lies in B.
        log_weights: `(n,)`; None for equal weights.

    Returns:
        delta_f [kT] with one standard error [kT], for independent samples.

    Raises:
        InputError: shapes differ.
        InsufficientDataError: no weight in A or in B.
    """
    a_n, b_n = to_numpy(in_a).astype(bool), to_numpy(in_b).astype(bool)
    log_w_n = np.zeros(a_n.shape) if log_weights is None else check_log_weights(log_weights)
    if not a_n.shape == b_n.shape == log_w_n.shape:
        raise InputError(
            f"in_a {a_n.shape}, in_b {b_n.shape} and log_weights {log_w_n.shape} must have one shape (n,)"
        )
    w_n = normalised_weights(log_w_n)
    weight_a, weight_b = w_n[a_n].sum(), w_n[b_n].sum()
    if weight_a == 0 or weight_b == 0:
        raise InsufficientDataError(
            f"{int(a_n.sum())} samples in A weigh {weight_a:.3g}, {int(b_n.sum())} in B {weight_b:.3g}; "
            "both basins need samples of positive weight"
        )
    influence_n = w_n * (b_n / weight_b - a_n / weight_a)
    error = float(np.sqrt(np.square(influence_n).sum()))
    return Estimate(float(np.log(weight_a / weight_b)), error, w_n.size, effective_sample_size(log_w_n))


def pareto_smooth(log_weights: Any) -> tuple[np.ndarray, float]:
    """Pareto-smoothed, normalised log-weights `(n,)` and the tail shape k-hat (Vehtari et al. 2024, PSIS).

    The largest weights are replaced by the quantiles of a generalised Pareto distribution fitted to them by
    arviz-stats. k-hat below 0.5: finite variance; up to 0.7: usable; above: the estimate rests on a few
    samples.

    Equal weights have no tail: they come back equal, with k-hat 0. Zero weights stay zero and do not enter
    the fit.

    Raises:
        InsufficientDataError: fewer than 25 positive weights.
    """
    log_w_n = check_log_weights(log_weights)
    positive = np.isfinite(log_w_n)
    used = log_w_n[positive]
    if used.size < MIN_PARETO_SAMPLES:
        raise InsufficientDataError(
            f"{used.size} positive weights; at least {MIN_PARETO_SAMPLES} are needed to fit a Pareto tail"
        )
    smooth, k_hat = _fit_pareto(used - used.max())
    result = np.full(log_w_n.shape, -np.inf)
    result[positive] = smooth - log_sum_exp(smooth)
    return result, k_hat


def _tail_size(n: int) -> int:
    """How many of n positive weights are the tail."""
    return max(5, int(min(n / 5, 3 * math.sqrt(n))))


def _fit_pareto(log_w_n: np.ndarray) -> tuple[np.ndarray, float]:
    """Smoothed log-weights and k-hat of finite log-weights whose maximum is 0."""
    from arviz_stats.base import array_stats

    # The fit works on the largest weights, min(n/5, 3 sqrt(n)) of them; without a spread there it is
    # undefined.
    n_tail = _tail_size(log_w_n.size)
    tail = np.sort(log_w_n)[-n_tail - 1 :]
    if np.ptp(tail) < 1e-12 or np.ptp(tail[1:]) == 0:
        return log_w_n, 0.0
    # arviz takes log-likelihoods, the negative of the log-ratios.
    smooth, k_hat = array_stats.psislw(-log_w_n)
    # Where one weight outweighs the rest of the tail, the fit is to the rest and finds nothing wrong with it.
    alone = effective_sample_size(log_w_n) * log_w_n.size < FEWEST_EFFECTIVE
    return np.asarray(smooth), math.inf if alone and k_hat < PARETO_K_LIMIT else float(k_hat)


def pareto_k(log_weights: Any) -> float:
    """Tail shape k-hat of the weights; see :func:`pareto_smooth`."""
    return pareto_smooth(log_weights)[1]


def resample(log_weights: Any, n: int, generator: Seed = None) -> np.ndarray:
    """Indices `(n,)` drawn in proportion to the weights by systematic resampling (Kitagawa 1996).

    The number of copies of each sample differs from its expectation by less than one.
    """
    cumulative_n = np.cumsum(normalised_weights(log_weights))
    points = (np.arange(n) + as_generator(generator).random()) / n
    # The clip keeps a point in (last cumulative sum, 1) that rounding left uncovered.
    return np.minimum(np.searchsorted(cumulative_n, points, side="right"), cumulative_n.size - 1)


def accept(log_weights: Any, n: int, generator: Seed = None) -> tuple[np.ndarray, float]:
    """Different samples that need no weights any more: each is kept with probability ``min(1, w / c)``.

    Rejection (von Neumann 1951) at the c of which ``n`` are expected, all decided by one random number, so that it is
    ``n`` (systematic sampling, in an order drawn for it; Madow 1949). Where c is below the largest weight, what weights
    have above it is lost; fewer samples lose less.

    Args:
        log_weights: `(N,)`.
        n: how many to keep.
        generator: NumPy generator or seed.

    Returns:
        ``(rows, cut)``: indices `(n,)`, ascending, none twice, and the part of all weight above c, in [0, 1); at zero
        the rows are a sample of the target, as far as the largest of these weights is the largest that there is.

    Raises:
        InputError: n below one.
        InsufficientDataError: fewer than n samples have a weight.
    """
    w = normalised_weights(log_weights)
    if n < 1:
        raise InputError(f"n = {n} samples to keep; at least one is needed")
    if (positive := int(np.count_nonzero(w))) < n:
        raise InsufficientDataError(f"{positive} of {len(w)} samples have a weight, so {n} cannot be kept; draw more")
    largest = np.sort(w)[::-1][:n]
    # With the k largest kept for certain, the rest shares n - k places at c = rest / (n - k).
    rest = 1.0 - np.append(0.0, np.cumsum(largest)[:-1])
    c = rest / (n - np.arange(n))
    c = c[np.argmax(largest <= c)] if (largest <= c).any() else largest[-1]
    kept = np.minimum(1.0, w / c)
    rng = as_generator(generator)
    order = rng.permutation(len(w))
    # Rounding must neither take one away nor add one: the last sum is n.
    passed = np.cumsum(kept[order])
    passed = np.floor(np.append(0.0, passed * (n / passed[-1])) + rng.random()).astype(np.int64)
    passed[-1] = passed[0] + n
    rows = np.sort(order[np.diff(passed) > 0])
    return rows, float(np.maximum(w - c, 0.0).sum())


def largest_share(log_weights: Any) -> float:
    """What the largest weight holds of the sum of squared weights ``max w^2 / sum w^2``, in (0, 1].

    Kish's ESS and every standard error rest on that sum. The fit behind k-hat looks at the whole tail and does not see
    one sample that has left it.

    Args:
        log_weights: `(n,)`.
    """
    w = normalised_weights(log_weights)
    return float(w.max() ** 2 / np.sum(w**2))


def verdict(log_weights: Any) -> str:
    """What these weights can be used for, in one line of words with k-hat, ESS and n.

    Args:
        log_weights: `(n,)`.

    Returns:
        A sentence that starts with ``reliable``, ``use with care`` or ``do not trust``.
    """
    log_w_n = check_log_weights(log_weights)
    ess, n = effective_sample_size(log_w_n), log_w_n.size
    try:
        k_hat = pareto_k(log_w_n)
    except InsufficientDataError:
        positive = int(np.isfinite(log_w_n).sum())
        many = f"{n} samples" if positive == n else f"{positive} of {n} weights are positive"
        return f"do not trust: only {many}, too few to judge the tail"
    figures = f"k-hat {k_hat:.2f}, ESS {100 * ess:.3g} % of n = {n} ({ess * n:.0f} effective samples)"
    # k-hat from n samples is itself limited: 1 - 1/log10(n) is the sample-size-specific threshold.
    limit = min(PARETO_K_LIMIT, 1.0 - 1.0 / math.log10(max(n, 11)))
    if k_hat > limit:
        return f"do not trust: {figures}; heavy tail, a few samples decide"
    if ess * n < 100:
        return f"do not trust: {figures}; draw more samples or improve the flow"
    share = largest_share(log_w_n)
    if share > LARGEST_SHARE:
        return (
            f"use with care: {figures}; one sample holds {100 * share:.0f} % of the sum of squared weights, on which "
            "this ESS and all error bars rest"
        )
    if k_hat > 0.5 or ess * n < ENOUGH_EFFECTIVE:
        return f"use with care: {figures}"
    return f"reliable: {figures}"


def longest_stretch(accepted: Any) -> int:
    """Length of the longest run of False in `(n,)`: the longest that a chain has held one state."""
    edges = np.flatnonzero(np.concatenate([[True], np.asarray(accepted, dtype=bool).ravel(), [True]]))
    return int(np.diff(edges).max() - 1)


def chain_verdict(accepted: Any) -> str:
    """What the acceptances of an independence chain say about it, in one line of words.

    States that were held for l_k of n steps are worth ``n^2 / sum l_k^2`` independent samples: each is a draw of
    the flow, weighted by its holding time (Kish). A state of very large weight is left by hardly any proposal. If
    rejections were independent, the longest run of them among n steps of rejection rate r would be about ``log(n (1
    - r)) / log(1 / r)`` (Erdos & Renyi 1970).

    Args:
        accepted: `(n,)` bool, whether each step moved.
    """
    moved = np.asarray(accepted, dtype=bool).ravel()
    n, rate = moved.size, float(moved.mean()) if moved.size else 0.0
    if not n or not rate:
        return f"do not trust: none of {n} flow moves was accepted"
    longest = longest_stretch(moved)
    expected = max(1.0, math.log(max(n * rate, math.e)) / -math.log1p(-min(rate, 1.0 - 1e-12)))
    held = np.diff(np.flatnonzero(np.concatenate([[True], moved[1:], [True]])))
    worth = float(n**2 / np.square(held).sum())
    figures = (
        f"{100 * rate:.3g} % of n = {n} accepted, worth about {worth:.0f} independent samples, longest stuck stretch "
        f"{longest} (about {expected:.0f} expected)"
    )
    if longest > n / (10 if n >= FEWEST_STEPS else 2):  # in few steps two rejections in a row are a tenth
        return f"do not trust: {figures}; one state was held for too much of the chain"
    if longest > 10 * expected:
        return f"use with care: {figures}; a state of large weight was hardly left"
    if n < FEWEST_STEPS:
        return f"use with care: {figures}; only {n} steps, too few to meet a state of large weight"
    if worth < ENOUGH_EFFECTIVE:
        return f"use with care: {figures}"
    return f"reliable: {figures}"
