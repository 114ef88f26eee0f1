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

import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import expit, logsumexp

from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.reweighting import Seed, as_generator, effective_sample_size, to_numpy
from openmm_regflow.tfep.bennett import bar_overlap, bar_root, crooks_slope, one_sided
from openmm_regflow.tfep.results import TargetedFreeEnergy, kelvin, verdict_one_sided, verdict_two_sided
from openmm_regflow.tfep.sides import (
    CLIP,
    NO_OVERLAP,
    PERFECT_SPREAD,
    Side,
    bootstrap,
    check_resamples,
    check_works,
    load_pymbar,
    make_side,
    quiet,
    second_law,
    spread,
)

#: [kT] A step of BAR's equation from its solution that is rounding.
SOLVED = 1e-6
METHODS = ("bar", "mbar", "exp", "exp_reverse", "cumulant")


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
            # One step from the solution that is known, and the error there: its own search fails near 0, and where the
            # solution is an end of the bracket, as for a state that is a part of the other.
            result = pymbar.bar(f - root, r + root, DeltaF=0.0, iterated_solution=False)
            step = float(result["Delta_f"])
            return root + step, float(result["dDelta_f"]) if abs(step) < SOLVED else math.inf
        u_kn = np.zeros((2, f.size + r.size))
        u_kn[1, : f.size], u_kn[0, f.size :] = f, r
        mbar = pymbar.MBAR(u_kn, [f.size, r.size], initial_f_k=np.array([0.0, root]))
        result = mbar.compute_free_energy_differences()
        return float(result["Delta_f"][0, 1]), float(result["dDelta_f"][0, 1])


def _asymptotic(w_f: np.ndarray, w_r: np.ndarray, root: float, method: str) -> tuple[float, float]:
    """As :func:`_pymbar_bar`, with an infinite error where pymbar fails, and where nothing overlaps."""
    pymbar = load_pymbar()
    if bar_overlap(w_f, w_r, root) < NO_OVERLAP:  # Bennett's variance is then that of a few samples, and small
        return root, math.inf
    try:
        value, error = _pymbar_bar(w_f, w_r, root, method)
    except (pymbar.utils.ParameterError, pymbar.utils.ConvergenceError, pymbar.utils.BoundsError, FloatingPointError):
        return root, math.inf
    if not (math.isfinite(value) and math.isfinite(error)):  # variances that underflow
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
    sides = ("A", f_kn[best], r_kn[best]), ("B", r_kn[best], f_kn[best])
    frozen = [name for name, own, other in sides if _is_constant(own) and not _is_constant(other[np.isfinite(other)])]
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
        temperature: [K or Quantity], for printing in kJ/mol and kcal/mol; None if the states differ in theirs.
        correlated: the samples are in order of time and may be correlated: statistical inefficiencies are
        measured
            (pymbar.timeseries) and bootstrap blocks sized by them. False for independent samples.
        n_resamples: bootstrap replicas.
        generator: NumPy generator or seed of the bootstrap.

    Returns:
        The result. Its value uses every sample; its error is the larger of pymbar's on decorrelated samples
        and of the block bootstrap's on all.

    Raises:
        InputError: unknown method, a missing direction, NaN or -inf works, contradictory constant works, fewer than two
            replicas.
        InsufficientDataError: one sample, or no finite work on a side that is needed.
    """
    where = kelvin(temperature)
    check_resamples(n_resamples)
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
        return _perfect_result(constant, f_kn, r_kn, method, where)
    if method in ("bar", "mbar"):
        result = _two_sided(f_kn, r_kn, method, correlated, n_resamples, generator)  # type: ignore[arg-type]
    elif method == "cumulant":
        result = _cumulant(f_kn, correlated)  # type: ignore[arg-type]
    else:
        own, other, sign = (f_kn, r_kn, 1) if method == "exp" else (r_kn, f_kn, -1)
        result = _one_sided(own, other, sign, correlated, n_resamples, generator)  # type: ignore[arg-type]
    return replace(result, temperature=where)


def _perfect_result(
    value: float, f_kn: np.ndarray | None, r_kn: np.ndarray | None, method: str, temperature: float | None
) -> TargetedFreeEnergy:
    n_f, n_r = (0 if w is None else w.shape[1] for w in (f_kn, r_kn))
    words = "reliable: all works are equal, the map is perfect and the error zero"
    if not (n_f and n_r):  # as it is where A is a part of B, or for one frame, repeated
        words = "use with care: all works are equal; one direction cannot tell if all of the other state is reached"
    return TargetedFreeEnergy(
        delta_f=value, uncertainty=0.0, method=method, overlap=1.0 if n_f and n_r else None, ess=1.0, n_forward=n_f,
        n_reverse=n_r, n_independent=(float(n_f), float(n_r)), pymbar_error=0.0, bootstrap_error=0.0,
        forward=value if n_f else None, reverse=value if n_r else None, temperature=temperature,
        verdict=words,
    )  # fmt: skip


def convergence(forward: Any, reverse: Any, fractions: Any = None, *, n_resamples: int = 50) -> dict[str, np.ndarray]:
    """BAR and both exponential averages from growing parts of the data, for a convergence (hysteresis) plot.

    Args:
        forward: `(n,)` forward works [kT], or `(n_maps, n)`.
        reverse: `(m,)` reverse works [kT], or `(n_maps, m)`.
        fractions: of the samples, taken from the start; ten equal steps by default.
        n_resamples: bootstrap replicas of each error.

    Returns:
        ``fraction``, ``bar``, ``bar_error``, ``exp``, ``exp_error``, ``exp_reverse``, ``exp_reverse_error``:
        arrays of equal length [kT]; NaN where a part of the data says nothing: no finite works, or one frame of each
        side, repeated.

    Raises:
        InputError: works that `estimate` refuses as a whole.
    """
    for works, name in ((forward, "forward"), (reverse, "reverse")):
        with suppress(InsufficientDataError):  # what there is too little of leaves gaps
            check_works(works, name)
    check_resamples(n_resamples)
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
            except (InsufficientDataError, InputError):
                row += [math.nan, math.nan]
        rows.append(row)
    names = ("fraction", "bar", "bar_error", "exp", "exp_error", "exp_reverse", "exp_reverse_error")
    return dict(zip(names, np.array(rows).T))
