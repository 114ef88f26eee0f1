"""How far samples of a molecule are from a reference: energies, torsions, chirality, basins, correlation
times.

Everything is a function of arrays and knows nothing of flows or force fields. Angles are in radians in (-pi,
pi], positions in nm, energies reduced (kT). Weighted versions take log-weights as in
:mod:`openmm_regflow.reweighting`; without them the samples count equally.

The two Wasserstein figures follow the definitions in use for Boltzmann generators: E-W in kT, between all samples;
T-W2 in radians, between at most 10,000 of either side. Neither is zero for two finite samples of one
distribution: quote the figure of a second reference sample beside them.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.reweighting import (
    Estimate,
    Seed,
    as_generator,
    bootstrap_error,
    bootstrap_samples,
    check_log_weights,
    normalised_weights,
    population_delta_f,
    resample,
    to_numpy,
)

#: Samples on either side of T-W2 unless the caller says otherwise.
MAX_POINTS = 10_000
#: Stretches of a reference whose means give its share of the error of a distance.
STRETCHES = 20
#: phi < 0 and phi > 0, the two basins of a peptide's phi [rad].
PHI_NEGATIVE, PHI_POSITIVE = (-math.pi, 0.0), (0.0, math.pi)
#: The positive basin without the stretch next to pi, which belongs to the beta region [rad].
PHI_POSITIVE_CORE = (0.0, 2.0)
#: Cores for counting crossings [rad]: away from the barrier at 0, and from pi, next to which the beta region is.
CORE_NEGATIVE, CORE_POSITIVE = (-math.pi, -0.3), (0.3, 2.0)


def _array_module(values: Any) -> Any:
    """torch for tensors, numpy for the rest."""
    if hasattr(values, "detach"):
        import torch

        return torch
    return np


def wrap(angles: Any) -> Any:
    """Angles [rad] brought into (-pi, pi]; array or tensor."""
    return math.pi - (math.pi - angles) % (2 * math.pi)


def _index_rows(rows: Any, width: int, n_atoms: int, name: str) -> np.ndarray:
    index = to_numpy(rows).astype(np.int64).reshape(-1, width)
    if index.size and (index.min() < 0 or index.max() >= n_atoms):
        raise InputError(f"{name} name atoms {index.min()} to {index.max()}; there are {n_atoms} atoms")
    return index


def _check_positions(positions: Any) -> Any:
    x = positions if hasattr(positions, "detach") else np.asarray(positions)
    if x.ndim == 2:
        x = x[None]
    if x.ndim != 3 or x.shape[-1] != 3:
        raise InputError(f"positions have shape {tuple(x.shape)}; (n, n_atoms, 3) is needed")
    return x


def dihedrals(positions: Any, quadruples: Any) -> Any:
    """Torsion angles by the IUPAC sign convention (cis is 0, clockwise seen along the middle bond is
    positive).

    Args:
        positions: `(n, n_atoms, 3)` or `(n_atoms, 3)` [any length unit], array or tensor (differentiable).
        quadruples: `(k, 4)` atom indices.

    Returns:
        `(n, k)` [rad] in (-pi, pi], of the kind of ``positions``.

    Raises:
        InputError: wrong shape or an index out of range.
    """
    x = _check_positions(positions)
    xp = _array_module(x)
    i, j, k, l = _index_rows(quadruples, 4, x.shape[1], "quadruples").T
    axis = x[:, k] - x[:, j]
    # Normals of the planes (i, j, k) and (j, k, l); the sine is measured along the middle bond.
    normal_1 = xp.linalg.cross(x[:, j] - x[:, i], axis)
    normal_2 = xp.linalg.cross(axis, x[:, l] - x[:, k])
    sine = (xp.linalg.cross(normal_1, normal_2) * axis).sum(-1) / (axis**2).sum(-1) ** 0.5
    angle = xp.arctan2(sine, (normal_1 * normal_2).sum(-1))
    # arctan2 gives -pi for a negative zero.
    return xp.where(angle <= -math.pi, angle + 2 * math.pi, angle)


def chiral_volumes(positions: Any, centres: Any) -> Any:
    """Signed volumes ``(N - CA) . [(C - CA) x (CB - CA)]`` `(n, k)` [length^3]; positive for L amino acids.

    Args:
        positions: `(n, n_atoms, 3)`.
        centres: `(k, 4)` indices of CA, N, C, CB.
    """
    x = _check_positions(positions)
    ca, n, c, cb = _index_rows(centres, 4, x.shape[1], "centres").T
    origin = x[:, ca]
    return ((x[:, n] - origin) * _array_module(x).linalg.cross(x[:, c] - origin, x[:, cb] - origin)).sum(-1)


def wrong_chirality(positions: Any, centres: Any) -> np.ndarray:
    """Whether any of the centres is not L, `(n,)` booleans; NaN positions count as wrong.

    Args:
        positions: `(n, n_atoms, 3)`.
        centres: `(k, 4)` indices of CA, N, C, CB; of CA, C, N, CB where a residue is to be D
            (``MolecularSystem.chiral_centres`` follows the structure).
    """
    right: np.ndarray = np.all(to_numpy(chiral_volumes(positions, centres)) > 0, axis=1)
    return ~right


def fraction_error(fraction: float, n: int) -> float:
    """Standard error of a fraction of `n` independent samples, as if one more had and one more had not.

    (Laplace's estimate: that none of n samples is wrong does not make the fraction certain.)
    """
    p = (fraction * n + 1.0) / (n + 2.0)
    return math.sqrt(p * (1.0 - p) / n)


def wrong_chirality_fraction(positions: Any, centres: Any, log_weights: Any | None = None) -> float:
    """Fraction (of the samples, or of the weight) with at least one alpha carbon that is not L.

    Args:
        positions: `(n, n_atoms, 3)`.
        centres: `(k, 4)` indices of CA, N, C, CB.
        log_weights: `(n,)` or None.
    """
    wrong = wrong_chirality(positions, centres)
    return float(_weights(log_weights, len(wrong)) @ wrong)


def _weights(log_weights: Any | None, n: int) -> np.ndarray:
    """Normalised weights `(n,)`, equal if no log-weights are given."""
    if n == 0:
        raise InsufficientDataError("no samples were given; at least one is needed")
    if log_weights is None:
        return np.full(n, 1.0 / n)
    w_n = normalised_weights(log_weights)
    if w_n.size != n:
        raise InputError(f"{w_n.size} log_weights for {n} samples; give one per sample")
    return w_n


def _with_weight(values: np.ndarray, w_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The samples that have weight, and their weights."""
    used = w_n > 0
    return values[used], w_n[used] / w_n[used].sum()


def _thinned(
    values: np.ndarray, log_weights: Any | None, n_max: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The samples that have weight, and their weights; if there are more than ``n_max`` samples, as many drawn anew.

    By their weights: a draw regardless of them loses half of those that hold all of it.
    """
    w_n = _weights(log_weights, len(values))
    if len(values) <= n_max:
        return _with_weight(values, w_n)
    index = rng.choice(len(values), n_max, replace=False) if log_weights is None else resample(log_weights, n_max, rng)
    return values[np.sort(index)], np.full(n_max, 1.0 / n_max)  # in their order: a reference is a chain


def wasserstein_1d(
    x: np.ndarray, y: np.ndarray, x_weights: np.ndarray, y_weights: np.ndarray, order: float = 1.0
) -> float:
    """Exact Wasserstein distance of two weighted samples on the line.

    The optimal plan is monotone, so ``W_p^p = integral |F^-1(t) - G^-1(t)|^p dt`` over t in [0, 1], a sum
    over the merged steps of the two weighted quantile functions (Villani 2003, theorem 2.18).

    Args:
        x: `(n,)` finite values.
        y: `(m,)` finite values.
        x_weights: `(n,)`, summing to one.
        y_weights: `(m,)`, summing to one.
        order: p >= 1.
    """
    i, j = np.argsort(x), np.argsort(y)
    # Rounding takes cumulative sums past 1 before the end, where the quantile functions have no step left.
    t_x, t_y = (np.minimum(np.cumsum(w), 1.0) for w in (x_weights[i], y_weights[j]))
    t_x[-1] = t_y[-1] = 1.0
    t = np.union1d(t_x, t_y)
    step = np.diff(t, prepend=0.0)
    gap = np.abs(x[i][np.searchsorted(t_x, t)] - y[j][np.searchsorted(t_y, t)])
    return float((step @ gap**order) ** (1.0 / order))


def energy_wasserstein(
    u: Any,
    u_reference: Any,
    *,
    order: float = 1.0,
    log_weights: Any | None = None,
) -> float:
    """Wasserstein distance between energies: E-W1 (``order=1``) or E-W2 (``order=2``) [kT], of all samples.

    Arguments and errors as of :func:`energy_distance`, without the error.
    """
    return energy_distance(u, u_reference, order=order, log_weights=log_weights)[0]


def energy_distance(
    u: Any,
    u_reference: Any,
    *,
    order: float = 1.0,
    log_weights: Any | None = None,
) -> tuple[float, float]:
    """E-W1 (``order=1``) or E-W2 (``order=2``) [kT] of all samples, and its standard error.

    The error is that of the means of the potentials that solve the transport's dual problem (del Barrio & Loubes 2019,
    "Central limit theorems for empirical transportation cost"): of the samples as independent ones, of the reference as
    a chain in order of time, by the means of twenty stretches. Where both sides are equal it is up to a third too
    large. It says nothing of the bias that makes a distance of finite samples too large.

    Args:
        u: `(n,)` reduced energies of the samples [kT].
        u_reference: `(m,)` reduced energies of the reference [kT].
        order: 1 or 2.
        log_weights: `(n,)` log-weights of the samples, or None.

    Returns:
        The distance and its error [kT]; both inf if a sample of positive weight has infinite energy. The error is NaN
        with fewer than forty frames of reference.

    Raises:
        InputError: NaN energies, or an infinite reference energy.
        InsufficientDataError: an empty side.
    """
    u_n, u_m = (to_numpy(a).astype(np.float64).ravel() for a in (u, u_reference))
    if np.isnan(u_n).any() or not np.isfinite(u_m).all():
        raise InputError("energies hold NaN, or the reference holds infinity; leave such frames out first")
    u_n, w_n = _with_weight(u_n, _weights(log_weights, u_n.size))
    if not np.isfinite(u_n).all():
        return math.inf, math.inf
    w_m = _weights(None, u_m.size)
    value = wasserstein_1d(u_n, u_m, w_n, w_m, order)
    mine, theirs = _potential(u_n, u_m, w_n, w_m, order), _potential(u_m, u_n, w_m, w_n, order)
    return value, _distance_error(value, order, _squared_error(mine, w_n), theirs)


def _potential(x: np.ndarray, y: np.ndarray, x_weights: np.ndarray, y_weights: np.ndarray, order: float) -> np.ndarray:
    """Kantorovich potential `(n,)` at x of the transport to y on the line; its slope is that of the cost.

    ``d phi/dx = p |x - T(x)|^(p-1) sign(x - T(x))`` with the monotone map T (Villani 2003, section 2.2).
    """
    i, j = np.argsort(x), np.argsort(y)
    middle = np.cumsum(x_weights[i]) - 0.5 * x_weights[i]
    image = y[j][np.minimum(np.searchsorted(np.cumsum(y_weights[j]), middle), len(y) - 1)]
    gap = x[i] - image
    slope = order * np.abs(gap) ** (order - 1.0) * np.sign(gap)
    steps = 0.5 * (slope[1:] + slope[:-1]) * np.diff(x[i])
    potential = np.empty(len(x))
    potential[i] = np.concatenate([[0.0], np.cumsum(steps)])
    return potential


def _squared_error(potential: np.ndarray, w_n: np.ndarray) -> float:
    """Of the weighted mean of a potential (Owen, "Monte Carlo theory", equation 9.9)."""
    return float(np.square(w_n) @ np.square(potential - w_n @ potential))


def _distance_error(value: float, order: float, squared: float, reference_potential: np.ndarray) -> float:
    """Error of a distance from the squared error of the samples' side and the potential along the reference."""
    if len(reference_potential) < 2 * STRETCHES:
        return math.nan
    means = [part.mean() for part in np.array_split(reference_potential, STRETCHES)]
    error = math.sqrt(squared + np.var(means, ddof=1) / STRETCHES)
    return error / (order * value ** (order - 1.0)) if value else 0.0


def torus_cost(angles: np.ndarray, angles_reference: np.ndarray) -> np.ndarray:
    """Squared wrapped differences summed over the angles: cost matrix `(n, m)` [rad^2]."""
    cost = np.zeros((len(angles), len(angles_reference)))
    for a, b in zip(angles.T, angles_reference.T):
        cost += np.square(wrap(a[:, None] - b[None, :]))
    return cost


def torus_wasserstein(
    angles: Any,
    angles_reference: Any,
    *,
    log_weights: Any | None = None,
    n_max: int = MAX_POINTS,
    generator: Seed = None,
) -> float:
    """T-W2: square root of the exact optimal-transport cost between two sets of torsion vectors [rad].

    Arguments and errors as of :func:`torus_distance`, without the error.
    """
    return torus_distance(angles, angles_reference, log_weights=log_weights, n_max=n_max, generator=generator)[0]


def torus_distance(
    angles: Any,
    angles_reference: Any,
    *,
    log_weights: Any | None = None,
    n_max: int = MAX_POINTS,
    generator: Seed = None,
) -> tuple[float, float]:
    """T-W2 [rad] and its standard error: square root of the exact optimal-transport cost between two sets of torsions.

    The cost is the squared wrapped difference summed over all angles (every backbone phi and psi). Solved
    exactly by POT's network simplex. Memory is about 40 bytes per pair of points (4 GB at the default 10,000
    points a side), time grows a little faster than the number of pairs (on one core 2 to 4 s for 2000 points, 10 s
    for 4000); lower ``n_max`` where that is too much, and compare only figures of equal ``n_max``: the
    finite-sample floor depends on it.

    The error is that of the dual solution's means, as in :func:`energy_distance`.

    Args:
        angles: `(n, k)` [rad].
        angles_reference: `(m, k)` [rad].
        log_weights: `(n,)` of the samples, or None.
        n_max: points on either side; larger samples are thinned at random, in proportion to their weights.
        generator: NumPy generator or seed of the thinning.

    Returns:
        The distance and its error for so many points [rad]; the error is NaN with fewer than forty of reference.

    Raises:
        InputError: shapes differ or angles are not finite.
        InsufficientDataError: an empty side.
    """
    import ot

    rng = as_generator(generator)
    a_nk, b_mk = (to_numpy(a).astype(np.float64) for a in (angles, angles_reference))
    if a_nk.ndim != 2 or b_mk.ndim != 2 or a_nk.shape[1] != b_mk.shape[1]:
        raise InputError(f"angles {a_nk.shape} and reference {b_mk.shape} must be (n, k) and (m, k)")
    if not (np.isfinite(a_nk).all() and np.isfinite(b_mk).all()):
        raise InputError("angles hold NaN or infinity; leave such frames out first")
    drawn = log_weights is not None and len(a_nk) > n_max
    a_nk, w_n = _thinned(a_nk, log_weights, n_max, rng)
    b_mk, w_m = _thinned(b_mk, None, n_max, rng)
    cost, duals = ot.emd2(w_n, w_m, torus_cost(a_nk, b_mk), numItermax=1_000_000_000, log=True)
    value = math.sqrt(max(0.0, float(cost)))
    squared = _squared_error(duals["u"], w_n)
    if drawn:  # by weights that are themselves worth so many samples
        worth = 1.0 / np.square(normalised_weights(log_weights)).sum()
        squared *= 1.0 + n_max / worth
    return value, _distance_error(value, 2.0, squared, duals["v"])


def _finite_angles(angle: Any) -> np.ndarray:
    """Angles `(n,)` [rad] as float64.

    Raises:
        InputError: NaN or infinite ones, which have no bin.
    """
    values = to_numpy(angle).astype(np.float64).ravel()
    if bad := int((~np.isfinite(values)).sum()):
        raise InputError(f"{bad} of {values.size} angles are NaN or infinite; leave those samples out")
    return values


def ramachandran(
    phi: Any, psi: Any, *, bins: int = 72, log_weights: Any | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Density over (phi, psi) on the full torus.

    Args:
        phi: `(n,)` [rad].
        psi: `(n,)` [rad].
        bins: along either axis.
        log_weights: `(n,)` or None.

    Returns:
        `(bins, bins)` density [1/rad^2], first axis phi, and the `(bins + 1,)` edges [rad] of both axes.
    """
    phi_n, psi_n = (_finite_angles(a) for a in (phi, psi))
    edges = np.linspace(-math.pi, math.pi, bins + 1)
    w_n = _weights(log_weights, phi_n.size)
    density, _, _ = np.histogram2d(wrap(phi_n), wrap(psi_n), bins=(edges, edges), weights=w_n)
    return density / (edges[1] - edges[0]) ** 2, edges


@dataclass(frozen=True)
class Profile:
    """Free energy along one angle.

    Attributes:
        centres: `(bins,)` [rad].
        free_energy: `(bins,)` [kT], ``-log p`` of the density shifted to a minimum of 0; inf in empty bins.
        error: `(bins,)` [kT], one standard error of ``-log p``; inf where a bin is empty in some resamples.
    """

    centres: np.ndarray
    free_energy: np.ndarray
    error: np.ndarray


def free_energy_profile(
    angle: Any,
    *,
    bins: int = 72,
    log_weights: Any | None = None,
    block: int = 1,
    n_resamples: int = 200,
    generator: Seed = None,
) -> Profile:
    """Free energy along an angle with a block-bootstrap error band.

    Args:
        angle: `(n,)` [rad].
        bins: number of bins over (-pi, pi].
        log_weights: `(n,)` or None.
        block: block length of the bootstrap [samples]; for a chain, several autocorrelation times.
        n_resamples: bootstrap replicas.
        generator: NumPy generator or seed.
    """
    edges = np.linspace(-math.pi, math.pi, bins + 1)
    phi_n = wrap(_finite_angles(angle))
    bin_n = np.clip(np.searchsorted(edges, phi_n, side="left") - 1, 0, bins - 1)
    w_n = _weights(log_weights, phi_n.size)

    def populations(index: np.ndarray, weight: np.ndarray) -> np.ndarray:
        counts = np.bincount(index, weight, minlength=bins)
        return counts / max(counts.sum(), np.finfo(float).tiny)

    replicas = bootstrap_samples(populations, bin_n, w_n, n_resamples=n_resamples, block=block, generator=generator)
    with np.errstate(divide="ignore", invalid="ignore"):
        free = -np.log(populations(bin_n, w_n))
        spread = np.log(replicas).std(axis=0, ddof=1)
    error = np.where((replicas > 0).all(axis=0), spread, np.inf)
    return Profile(0.5 * (edges[1:] + edges[:-1]), free - free.min(), error)


def in_range(angle: Any, bounds: tuple[float, float]) -> np.ndarray:
    """Whether an angle [rad] lies in the half-open arc (low, high], which may run through pi.

    Args:
        angle: array of any shape [rad].
        bounds: (low, high) [rad]; for an arc through pi give high < low.
    """
    low, high = (float(wrap(b)) if abs(b) > math.pi else float(b) for b in bounds)
    phi = wrap(to_numpy(angle).astype(np.float64))
    if low < high:
        return (phi > low) & (phi <= high)
    return (phi > low) | (phi <= high)


def basin_delta_f(
    phi: Any,
    *,
    log_weights: Any | None = None,
    basin_a: tuple[float, float] = PHI_NEGATIVE,
    basin_b: tuple[float, float] = PHI_POSITIVE,
    block: int = 1,
    n_resamples: int = 200,
    generator: Seed = None,
) -> Estimate:
    """Free energy of basin B above basin A from (weighted) populations, ``-log(W_B / W_A)`` [kT].

    Args:
        phi: `(n,)` [rad].
        log_weights: `(n,)` or None.
        basin_a: arc (low, high] [rad].
        basin_b: arc (low, high] [rad].
        block: 1 for independent samples (delta-method error); for a chain the block length of the bootstrap
            [samples], several autocorrelation times of the basin indicator.
        n_resamples: bootstrap replicas.
        generator: NumPy generator or seed.

    Raises:
        InsufficientDataError: a basin without samples.
    """
    a_n, b_n = in_range(to_numpy(phi).ravel(), basin_a), in_range(to_numpy(phi).ravel(), basin_b)
    estimate = population_delta_f(a_n, b_n, log_weights)
    if block <= 1:
        return estimate
    log_w_n = np.zeros(a_n.shape) if log_weights is None else check_log_weights(log_weights)
    error = bootstrap_error(
        lambda a, b, lw: population_delta_f(a, b, lw).value,
        a_n,
        b_n,
        log_w_n,
        n_resamples=n_resamples,
        block=block,
        generator=generator,
    )
    return Estimate(estimate.value, error, estimate.n, estimate.ess)


def count_crossings(
    phi: Any,
    core_a: tuple[float, float] = CORE_NEGATIVE,
    core_b: tuple[float, float] = CORE_POSITIVE,
) -> int:
    """Number of times that a chain passes from one core to the other.

    Between the cores the last one visited counts, so that jitter on a boundary, or round pi, is no crossing.

    Args:
        phi: `(n,)` [rad] in order of time.
        core_a: arc (low, high] [rad].
        core_b: arc (low, high] [rad].
    """
    phi_n = to_numpy(phi).ravel()
    label_n = in_range(phi_n, core_b).astype(int) - in_range(phi_n, core_a).astype(int)
    visited = label_n[label_n != 0]
    return int(np.count_nonzero(np.diff(visited)))


def integrated_autocorrelation_time(values: Any) -> float:
    """Statistical inefficiency ``1 + 2 sum rho(t)`` [samples]: how many samples are worth one independent
    one.

    Computed by arviz-stats as n / ESS with Geyer's initial monotone sequence (Vehtari et al. 2021, section
    3).

    Args:
        values: `(n,)` one chain, or `(n_chains, n)`.

    Returns:
        At least 1/log10(n) (antithetic chains are below 1); n for a chain that never moves.

    Raises:
        InsufficientDataError: fewer than four samples.
        InputError: non-finite values.
    """
    from arviz_stats.base import array_stats

    chains = np.atleast_2d(to_numpy(values).astype(np.float64))
    if chains.shape[-1] < 4:
        raise InsufficientDataError(f"{chains.shape[-1]} samples per chain; a correlation time needs at least 4")
    if not np.isfinite(chains).all():
        raise InputError("the chain holds NaN or infinity; leave such samples out first")
    if np.ptp(chains) == 0:
        return float(chains.size)
    ess = float(array_stats.ess(chains, chain_axis=0, draw_axis=1, method="mean"))
    return chains.size / max(ess, 1.0)


def block_length(values: Any, multiple: float = 5.0) -> int:
    """Block length [samples] for the block bootstrap of a chain: ``multiple`` correlation times, n/10 at
    most.

    Args:
        values: `(n,)` one chain.
        multiple: of the integrated autocorrelation time.
    """
    n = to_numpy(values).size
    return max(1, min(math.ceil(multiple * integrated_autocorrelation_time(values)), n // 10))
