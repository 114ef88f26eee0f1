"""The mathematics of generalised works: Bennett's equation, overlap, exponential averages, the Crooks slope.

Functions of plain arrays, without errors or checks; :mod:`openmm_regflow.tfep.estimators` adds both.
"""

import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logsumexp

from openmm_regflow.errors import InsufficientDataError


def bar_root(
    w_f: np.ndarray,
    w_r: np.ndarray,
    count_f: np.ndarray | None = None,
    count_r: np.ndarray | None = None,
    start: float | None = None,
) -> float:
    """Solution of Bennett's equation for works that may be infinite and carry bootstrap counts.

    With ``m = log(n_F / n_R)`` and the Fermi function ``s(x) = 1/(1 + exp(x))`` the equation is
    ``sum_F s(m + w_F - delta_f) = sum_R s(-m + w_R + delta_f)`` (Bennett 1976; Shirts et al. 2003, equation
    8). The left side rises and the right side falls with delta_f, so that the root is unique. An infinite
    work adds nothing to its sum but stays in the number of samples.

    Args:
        w_f: `(n,)` forward works [kT].
        w_r: `(m,)` reverse works [kT].
        count_f: `(n,)` multiplicities, or None for one each.
        count_r: `(m,)`.
        start: first guess for Newton's method [kT].

    Raises:
        InsufficientDataError: one side has no finite work.
    """
    c_f = np.ones(w_f.size) if count_f is None else count_f
    c_r = np.ones(w_r.size) if count_r is None else count_r
    m = math.log(c_f.sum() / c_r.sum())
    use_f, use_r = np.isfinite(w_f) & (c_f > 0), np.isfinite(w_r) & (c_r > 0)
    if not (use_f.any() and use_r.any()):
        raise InsufficientDataError("no finite work on one side; the two states do not overlap under this map")
    x_f, x_r = m + w_f[use_f], -m + w_r[use_r]
    log_c_f, log_c_r = np.log(c_f[use_f]), np.log(c_r[use_r])

    def balance(d: float) -> float:
        return float(logsumexp(log_c_f - np.logaddexp(0, x_f - d)) - logsumexp(log_c_r - np.logaddexp(0, x_r + d)))

    if start is not None:
        root = _newton(x_f, x_r, c_f[use_f], c_r[use_r], start)
        if root is not None:
            return root
    low = min(x_f.min(), -x_r.max()) - 50.0 - math.log(w_f.size + w_r.size)
    high = max(x_f.max(), -x_r.min()) + 50.0 + math.log(w_f.size + w_r.size)
    return float(brentq(balance, low, high, xtol=1e-12, rtol=1e-14, maxiter=500))


def _newton(x_f: np.ndarray, x_r: np.ndarray, c_f: np.ndarray, c_r: np.ndarray, d: float) -> float | None:
    """Newton's method on the logarithm of the balance; None where it does not converge at once."""
    for _ in range(12):
        p_f, p_r = expit(d - x_f), expit(-d - x_r)
        s_f, s_r = c_f @ p_f, c_r @ p_r
        if s_f <= 0 or s_r <= 0:
            return None
        slope = (c_f @ (p_f * (1 - p_f))) / s_f + (c_r @ (p_r * (1 - p_r))) / s_r
        if not slope > 1e-12:
            return None
        step = (math.log(s_r) - math.log(s_f)) / slope
        if abs(step) > 5:
            return None
        d += step
        if abs(step) < 1e-10:
            return float(d)
    return None


def bar_overlap(w_f: np.ndarray, w_r: np.ndarray, delta_f: float) -> float:
    """Overlap of two states, ``(1/n_F + 1/n_R) sum p (1 - p)``, 0 to 1.

    p is the probability that a sample belongs to A, given its work. For two states this is 1 minus the second
    eigenvalue of pymbar's overlap matrix O: its trace is 2 - O_12 - O_21, and its first eigenvalue is 1.
    """
    m = math.log(w_f.size / w_r.size)
    p = np.concatenate([expit(delta_f - m - w_f), expit(delta_f - m + w_r)])
    return float((1 / w_f.size + 1 / w_r.size) * (p * (1 - p)).sum())


def exponential_average(w_n: np.ndarray, count_n: np.ndarray | None = None) -> float:
    """``-log(mean(exp(-w)))`` [kT] of works that may be infinite (Zwanzig 1954; Jarzynski 1997)."""
    c_n = np.ones(w_n.size) if count_n is None else count_n
    if not np.isfinite(w_n[c_n > 0]).any():
        raise InsufficientDataError("no finite work; the map never reaches the other state")
    return -float(logsumexp(-w_n, b=c_n) - math.log(c_n.sum()))


def reached(w_n: np.ndarray, count_n: np.ndarray | None = None) -> float:
    """Log of the fraction of samples whose work is finite."""
    c_n = np.ones(w_n.size) if count_n is None else count_n
    fraction = c_n[np.isfinite(w_n)].sum() / c_n.sum()
    if fraction == 0:
        raise InsufficientDataError("no finite work on the opposite side; the states do not overlap under this map")
    return math.log(fraction)


def one_sided(
    w_n: np.ndarray, opposite: np.ndarray | None, count_n: np.ndarray | None = None, count_o: np.ndarray | None = None
) -> float:
    """Exponential average corrected for the part of the other state that the map does not reach.

    Only pairs inside both supports, x in S = {x in A: M(x) in B}, have finite works, so that

        E_A[exp(-w_F)] = integral_{M(S)} exp(-u_B) / Z_A = (Z_B / Z_A) P_B(w_R finite).

    The bare average is off by log P_B(w_R finite), which the opposite works estimate.

    Args:
        w_n: `(n,)` works of this side.
        opposite: `(m,)` works of the other side, or None (the map is then taken to reach everything).
        count_n: bootstrap counts of ``w_n``.
        count_o: bootstrap counts of ``opposite``.
    """
    value = exponential_average(w_n, count_n)
    return value if opposite is None else value + reached(opposite, count_o)


def crooks_slope(
    w_f: np.ndarray, w_r: np.ndarray, delta_f: float, inefficiency: float = 1.0
) -> tuple[float, float] | None:
    """Slope b of ``log p_F(w)/p_R(-w) = b w + a`` by logistic regression, with its standard error.

    Works that satisfy the fluctuation theorem have b = 1. A wrong sign in a work or a log-determinant, a map
    whose inverse is not its inverse, samples that are not in equilibrium, and evaluation on training samples
    all move it. None where forward and reverse works do not mix enough for a fit.
    """
    f, r = w_f[np.isfinite(w_f)], w_r[np.isfinite(w_r)]
    x = np.clip(np.concatenate([f, -r]) - delta_f, -50.0, 50.0)
    forward = np.concatenate([np.ones(f.size), np.zeros(r.size)])
    theta = np.array([math.log(f.size / r.size), 1.0])
    design = np.stack([np.ones(x.size), x], axis=1)
    for _ in range(50):
        p = expit(design @ theta)
        information = (design * (p * (1 - p))[:, None]).T @ design
        if np.linalg.cond(information) > 1e10:
            return None
        step = np.linalg.solve(information, design.T @ (forward - p))
        theta = theta + step
        if np.abs(step).max() < 1e-9:
            error = math.sqrt(np.linalg.inv(information)[1, 1] * inefficiency)
            return float(theta[1]), error
        if np.abs(theta).max() > 100:
            return None
    return None
