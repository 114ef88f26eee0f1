"""What parallel tempering has sampled: free energies of torsion basins with errors, mixing, and a flattening bias."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import openmm
from scipy.special import logsumexp

from openmm_regflow import metrics
from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.reweighting import Estimate
from openmm_regflow.simulate.tempering import TemperingRun
from openmm_regflow.systems import MolecularSystem
from openmm_regflow.units import GAS_CONSTANT


@dataclass(frozen=True)
class TemperingAnalysis:
    """How well one or several runs have sampled one torsion.

    Attributes:
        delta_f: free energy of the basin phi > 0 above phi < 0 [kT] from the frames at the lowest temperature.
        delta_f_core: the same with 0 < phi < 2 rad against the rest.
        delta_f_mbar: as ``delta_f``, from all temperatures by MBAR.
        delta_f_core_mbar: as ``delta_f_core``, from all temperatures by MBAR.
        acceptance: per run, accepted swaps between neighbouring temperatures.
        round_trips: per run, passages lowest to highest and back, summed over replicas.
        inefficiency: per run, statistical inefficiency of cos phi at the lowest temperature [iterations].
        visits: per run, entries into 0 < phi < 2 rad, summed over replicas followed through temperatures.
    """

    delta_f: Estimate
    delta_f_core: Estimate
    delta_f_mbar: Estimate
    delta_f_core_mbar: Estimate
    acceptance: list[list[float]]
    round_trips: list[int]
    inefficiency: list[float]
    visits: list[int]


def torsion_bias(phi: np.ndarray, amplitudes: np.ndarray) -> np.ndarray:
    """Bias ``sum_n a_n (1 + cos(n phi - b_n))`` [kJ/mol] of a torsion [rad], of the shape of ``phi``.

    Args:
        phi: [rad].
        amplitudes: rows (a_n >= 0 [kJ/mol], b_n [rad]) for n = 1, 2, ..., `(order, 2)`.
    """
    return sum(a * (1.0 + np.cos(n * phi - b)) for n, (a, b) in enumerate(amplitudes, start=1))


def flattening_bias(
    phi: np.ndarray,
    temperature: float,
    weights: np.ndarray | None = None,
    order: int = 6,
    depth: float = 8.0,
    n_bins: int = 60,
) -> np.ndarray:
    """The bias that makes a torsion's distribution about uniform, from samples without one.

    A Fourier series is fitted to minus the free energy profile, bins that were not reached counting as ``depth``. The
    bias need not be exact: :func:`analyse` removes it again.

    Args:
        phi: samples of the torsion [rad], of any shape.
        temperature: at which they were drawn [K].
        weights: of the samples, of the shape of ``phi``; equal for None.
        order: of the series.
        depth: largest free energy that is flattened [kT].
        n_bins: of the profile.

    Returns:
        Amplitudes for :func:`torsion_bias`, `(order, 2)`.

    Raises:
        InsufficientDataError: no samples.
    """
    if not np.size(phi):
        raise InsufficientDataError("there are no samples of the torsion to flatten; give some")
    population, edges = np.histogram(phi, bins=n_bins, range=(-np.pi, np.pi), weights=weights)
    profile = np.minimum(-np.log(np.maximum(population, 1e-300) / population.max()), depth)
    centres, n = 0.5 * (edges[1:] + edges[:-1]), np.arange(1, order + 1)
    cosines = -2.0 * np.cos(np.outer(n, centres)) @ profile / n_bins
    sines = -2.0 * np.sin(np.outer(n, centres)) @ profile / n_bins
    kt = GAS_CONSTANT * temperature
    return np.stack([kt * np.hypot(cosines, sines), np.arctan2(sines, cosines)], axis=1)


def with_torsion_bias(molecule: MolecularSystem, torsion: np.ndarray, amplitudes: np.ndarray) -> MolecularSystem:
    """The molecule with :func:`torsion_bias` added to its System, for a run that crosses barriers more often.

    Args:
        molecule: the unbiased one; left as it is.
        torsion: atom indices, `(4,)`.
        amplitudes: `(order, 2)`.
    """
    system = copy.deepcopy(molecule.system)
    force = openmm.PeriodicTorsionForce()
    for n, (a, b) in enumerate(amplitudes, start=1):
        force.addTorsion(*map(int, torsion), n, float(b), float(a))
    system.addForce(force)
    return replace(molecule, name=f"{molecule.name} (biased)", system=system)


def analyse(
    runs: Sequence[TemperingRun], torsion: np.ndarray, bias: np.ndarray | None = None
) -> TemperingAnalysis:
    """Free energies of the phi basins with errors, and the mixing of replicas.

    Errors come from long blocks of the estimator's influence function, because it has two time scales: swaps carry a
    basin's replica up and down within a few iterations, while the replica itself stays in the basin for hundreds.
    Autocorrelation estimates that stop at the first scale were 1.4 times too small on alanine dipeptide.

    Args:
        runs: independent runs of one ladder, after their burn-in.
        torsion: atom indices of phi, `(4,)`.
        bias: amplitudes of the bias under which the runs were made; estimates are for the molecule without it.

    Raises:
        InsufficientDataError: a basin that was never visited at the lowest temperature.
        InputError: runs of different ladders.
    """
    if not runs or any(not np.array_equal(run.temperatures, runs[0].temperatures) for run in runs):
        raise InputError("runs of different temperatures cannot be pooled; analyse them one by one")
    phis = [_torsion_series(run, torsion) for run in runs]
    ladder = _mbar(runs)
    weights = [w[0] / ladder[0].sum() for w in _by_run(ladder, runs)]
    lowest = [(run.states == 0) / sum(len(r.states) for r in runs) for run in runs]
    if bias is not None:
        kt = GAS_CONSTANT * runs[0].temperatures[0]
        factors = [np.exp(torsion_bias(phi, bias) / kt) for phi in phis]
        weights, lowest = ([w * f for w, f in zip(side, factors)] for side in (weights, lowest))
    positive = [metrics.in_range(phi, metrics.PHI_POSITIVE) for phi in phis]
    core = [metrics.in_range(phi, metrics.PHI_POSITIVE_CORE) for phi in phis]
    return TemperingAnalysis(
        delta_f=_basin_estimate(positive, lowest),
        delta_f_core=_basin_estimate(core, lowest),
        delta_f_mbar=_basin_estimate(positive, weights, _by_run(ladder, runs)),
        delta_f_core_mbar=_basin_estimate(core, weights, _by_run(ladder, runs)),
        acceptance=[run.acceptance.tolist() for run in runs],
        round_trips=[round_trips(run) for run in runs],
        inefficiency=[
            metrics.integrated_autocorrelation_time(np.cos(run.at_temperature(phi))) for run, phi in zip(runs, phis)
        ],
        visits=[int((np.diff(inside.astype(int), axis=0) == 1).sum()) for inside in core],
    )


def _torsion_series(run: TemperingRun, torsion: np.ndarray) -> np.ndarray:
    """Torsion [rad] of every replica in time, `(n_iterations, n_replicas)`."""
    flat = run.positions.reshape(-1, *run.positions.shape[2:])
    return metrics.dihedrals(flat, np.reshape(torsion, (1, 4))).reshape(run.states.shape)


#: Blocks of all runs together from which errors are estimated; an error of an error of about 1/sqrt(2 * 24).
_N_BLOCKS = 24


def _basin_estimate(
    inside: list[np.ndarray], weights: list[np.ndarray], ladder: list[np.ndarray] | None = None
) -> Estimate:
    """-log(W_inside / W_outside) [kT] of correlated runs, with the error from block averages.

    The influence of iteration i on the logarithm is ``b_i / W_inside - a_i / W_outside`` with the weights b_i and a_i
    that the iteration adds to both sums, and what it does to both through the free energies of the ladder. Its sums
    over long blocks are about independent, so the sum of their squares is the variance (Flyvbjerg & Petersen 1989).
    Sums of one run need not vanish: differences between runs count. Where runs are a dozen or more, each is one block;
    of few, blocks have to be longer than the slowest mode, which no error sees that is as long as the runs.

    Args:
        inside: per run, whether a sample is in the basin, `(n_iterations, n_replicas)`.
        weights: of the samples, alike.
        ladder: what `_mbar` found, per run `(n_states, n_iterations, n_replicas)`, where the weights rest on it.
    """
    b = [(w * s).sum(axis=1) for w, s in zip(weights, inside)]
    a = [(w * ~s).sum(axis=1) for w, s in zip(weights, inside)]
    total_b, total_a = sum(x.sum() for x in b), sum(x.sum() for x in a)
    if total_b == 0 or total_a == 0:
        raise InsufficientDataError("a basin was never visited at the lowest temperature; run longer or hotter")
    influence = [x / total_b - y / total_a for x, y in zip(b, a)]
    if ladder is not None:
        shares = [w * np.where(s, 1 / total_b, -1 / total_a) for w, s in zip(weights, inside)]
        influence = [direct + more for direct, more in zip(influence, _through_ladder(ladder, shares))]
    n = sum(len(x) for x in b)
    many = len(influence) >= _N_BLOCKS // 2  # then each is a block: halves of a run know of each other
    blocks: list[float] = []
    for each in influence:
        n_blocks = 1 if many else max(2, round(_N_BLOCKS * len(each) / n))
        blocks += [part.sum() for part in np.array_split(each, n_blocks)]
    variance = np.square(blocks).sum() * len(blocks) / (len(blocks) - 1)
    return Estimate(float(np.log(total_a / total_b)), float(np.sqrt(variance)), n)


def _through_ladder(ladder: list[np.ndarray], shares: list[np.ndarray]) -> list[np.ndarray]:
    """Influence of every iteration on ``sum_n s_n`` by way of the free energies f that MBAR found, `(n_iterations,)`.

    Weights W_kn solve ``G_k = sum_n W_kn = 1``. One iteration more, one sample of every state, changes G by
    ``sum_n W_kn - 1 / N``, so f by ``-A^+`` times that with ``A = dG/df = 1 - N W W^T``, and the sum of shares
    proportional to a row of W by ``-N sum_n s_n W_kn`` for each of them (what f_k does to that row itself cancels,
    as the shares sum to zero).
    """
    n = sum(w.shape[1] for w in ladder)
    a = np.eye(len(ladder[0])) - n * sum(np.einsum("kij,lij->kl", w, w) for w in ladder)
    by_f = -n * sum(np.einsum("kij,ij->k", w, s) for w, s in zip(ladder, shares))
    through = -by_f @ np.linalg.pinv(a, rcond=1e-10)
    return [through @ (w.sum(2) - 1 / n) for w in ladder]


def mbar_weights(runs: Sequence[TemperingRun], tolerance: float = 1e-9, max_iterations: int = 1000) -> list[np.ndarray]:
    """Weights in the lowest state of the samples of all states, summing to one over all runs.

    MBAR (Shirts & Chodera 2008, eqs. 11 and 13) with the reduced energies of the ladder's states, by self-consistent
    iteration.

    Args:
        runs: runs of one ladder.
        tolerance: largest change of a reduced free energy at which to stop [kT].
        max_iterations: before giving up.

    Returns:
        Per run `(n_iterations, n_replicas)`.

    Raises:
        InsufficientDataError: temperatures whose energies hardly overlap, so that the iteration does not converge.
    """
    w_kn = _mbar(runs, tolerance, max_iterations)
    return [w[0] for w in _by_run(w_kn / w_kn[0].sum(), runs)]


def _mbar(runs: Sequence[TemperingRun], tolerance: float = 1e-9, max_iterations: int = 1000) -> np.ndarray:
    """Weights of all samples in every state `(n_states, n)`, each row summing to one; see `mbar_weights`."""
    u_kn = np.concatenate([run.reduced_energies.reshape(len(run.temperatures), -1) for run in runs], axis=1)
    u_kn -= u_kn.min()
    log_n = np.log(sum(len(run.states) for run in runs))  # the same number of samples in every state
    f_k = np.zeros(len(u_kn))
    for _ in range(max_iterations):
        log_mixture_n = logsumexp(log_n + f_k[:, None] - u_kn, axis=0)
        f_new = -logsumexp(-u_kn - log_mixture_n, axis=1)
        f_new -= f_new[0]
        change, f_k = np.abs(f_new - f_k).max(), f_new
        if change < tolerance:
            break
    else:
        raise InsufficientDataError(f"MBAR changes by {change:.1e} kT after {max_iterations} steps; use more replicas")
    log_w_kn = -u_kn - log_mixture_n
    return np.exp(log_w_kn - logsumexp(log_w_kn, axis=1, keepdims=True))


def _by_run(w_kn: np.ndarray, runs: Sequence[TemperingRun]) -> list[np.ndarray]:
    """Columns of all samples, per run `(n_states, n_iterations, n_replicas)`."""
    bounds = np.cumsum([run.energies.size for run in runs])[:-1]
    return [w.reshape(-1, *run.states.shape) for w, run in zip(np.split(w_kn, bounds, axis=1), runs)]


def round_trips(run: TemperingRun) -> int:
    """Passages from the lowest temperature to the highest and back, summed over replicas."""
    count = 0
    top = len(run.temperatures) - 1
    for states in run.states.T:
        ends = states[(states == 0) | (states == top)]
        first = np.append(np.flatnonzero(ends == 0), len(ends))[0]  # before it, half a trip at most
        count += int(np.count_nonzero(np.diff(ends[first:]) < 0))
    return count
