"""Free energies of several states at once, by MBAR."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.special import logsumexp

from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.reweighting import Seed, as_generator, to_numpy
from openmm_regflow.tfep.bennett import bar_root
from openmm_regflow.tfep.results import INDEPENDENT_CARE, INDEPENDENT_LIMIT, OVERLAP_CARE, OVERLAP_LIMIT
from openmm_regflow.tfep.sides import CLIP, NO_OVERLAP, check_resamples, load_pymbar, quiet


@dataclass(frozen=True)
class MultistateFreeEnergy:
    """Free energies of several states relative to the first.

    Attributes:
        delta_f: `(n_states,)` [kT], first entry 0.
        uncertainty: `(n_states,)` [kT], the larger of pymbar's and the bootstrap's.
        uncertainties: `(n_states, n_states)` [kT], alike, of ``delta_f[j] - delta_f[i]``.
        overlap: `(n_states, n_states)` overlap matrix.
        verdict: in words.
    """

    delta_f: np.ndarray
    uncertainty: np.ndarray
    uncertainties: np.ndarray
    overlap: np.ndarray
    verdict: str


def estimate_states(u_kn: Any, n_k: Any, *, n_resamples: int = 50, generator: Seed = None) -> MultistateFreeEnergy:
    """MBAR over several (mapped) states (Shirts & Chodera 2008; Paliwal & Shirts 2013 for mapped ones).

    Sample n from state k has ``u_kn[k, n]`` its own reduced potential and ``u_kn[l, n]`` the mapped one
    ``u_l(M_kl(x)) - log|det J_kl(x)|``, for maps that are consistent: ``M_kl`` after ``M_jk`` equals
    ``M_jl``.

    Args:
        u_kn: `(n_states, n)` reduced potentials [kT] of independent samples, grouped by state; +inf is legal.
        n_k: `(n_states,)` samples per state; none for a state that others reach.
        n_resamples: bootstrap replicas, resampled within each state.
        generator: NumPy generator or seed.

    Raises:
        InputError: shapes that do not fit, NaN or -inf, fewer than two replicas.
        InsufficientDataError: a state with one sample, or none that has a finite energy in it; or no sample at all.
    """
    check_resamples(n_resamples)
    u, counts = to_numpy(u_kn).astype(np.float64), to_numpy(n_k).astype(np.int64)
    if u.ndim != 2 or counts.shape != (len(u),) or counts.sum() != u.shape[1]:
        raise InputError(f"u_kn {u.shape} does not fit n_k {counts.tolist()}; columns must be the samples by state")
    if np.isnan(u).any() or (u == -np.inf).any():
        raise InputError("u_kn holds NaN or -inf; an unusable mapped energy counts as +inf")
    if (counts == 1).any() or not counts.any():
        raise InsufficientDataError(f"n_k is {counts.tolist()}; a state needs no samples at all, or at least two")
    owners = np.repeat(np.arange(counts.size), counts)
    bad = int((~np.isfinite(u[owners, np.arange(u.shape[1])])).sum())
    if bad:
        raise InputError(f"{bad} samples have an infinite energy in their own state; filter the trajectories first")
    if not (reached := np.isfinite(u).any(axis=1)).all():
        raise InsufficientDataError(
            f"state {int(np.argmin(reached))} has no samples, and those of the others have no finite energy in it; "
            "give samples of it, or a map that leads there"
        )
    offset = _neighbour_free_energies(u, owners)
    for _ in range(counts.size + 1):
        clipped = _relative(u, offset)
        rest, errors, matrix = mbar_solution(clipped, counts)
        value = offset + rest
        if np.ptp(rest) < CLIP:  # further away, clipping may have decided it
            break
        offset = value
    sampled = counts > 0
    gap = weakest_link(matrix[np.ix_(sampled, sampled)])
    if gap < NO_OVERLAP:  # nothing connects the samples, and what errors would rest on is rounding
        error = np.where(np.eye(len(errors), dtype=bool), 0.0, np.inf)
    else:
        error = np.maximum(errors, _spread(clipped, owners, rest, n_resamples, as_generator(generator)))
    few = math.floor(min(counts[sampled].min(), _reach(clipped, counts, rest)[~sampled].min(initial=np.inf)))
    words = "use with care" if gap < OVERLAP_CARE or few < INDEPENDENT_CARE else "reliable"
    words = "do not trust" if gap < OVERLAP_LIMIT or few < INDEPENDENT_LIMIT else words
    verdict = f"{words}: overlap {gap:.2g}, {counts.tolist()} samples"
    verdict += "" if sampled.all() else f", worth {few} or more in every state"
    return MultistateFreeEnergy(value, error[0], error, matrix, verdict)


def _spread(
    u_kn: np.ndarray, owners: np.ndarray, f_k: np.ndarray, n_resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Standard deviations of all differences `(n_states, n_states)` over bootstrap replicas, drawn state by state."""
    counts, replicas = np.bincount(owners, minlength=len(u_kn)), []
    for _ in range(n_resamples):
        index = np.concatenate([rng.choice(np.flatnonzero(owners == k), counts[k]) for k in range(counts.size)])
        replicas.append(_mbar_values(u_kn[:, index], counts, f_k))
    values = np.array(replicas)
    return np.std(values[:, None, :] - values[:, :, None], axis=0, ddof=1)


def mixture_log_weights(u_kn: np.ndarray, n_k: np.ndarray, f_k: np.ndarray) -> np.ndarray:
    """Log-weights `(n_states, n)` of samples of the mixture of all states in each of them; weights add up to one."""
    log_w = f_k[:, None] - u_kn
    return log_w - logsumexp(log_w, axis=0, b=n_k[:, None])


def _reach(u_kn: np.ndarray, n_k: np.ndarray, f_k: np.ndarray) -> np.ndarray:
    """How many independent samples of each state all samples together are worth: Kish's number of its weights."""
    log_w = mixture_log_weights(u_kn, n_k, f_k)
    return np.exp(2 * logsumexp(log_w, axis=1) - logsumexp(2 * log_w, axis=1))


def weakest_link(overlap: np.ndarray) -> float:
    """Overlap of the two parts of a set of states that overlap least, over the best chain of links between states.

    A link is ``O_ij + O_ji``, which for two states is one less the second eigenvalue. That eigenvalue says how quickly
    samples would spread over a whole ladder, and falls with the square of its length however good each step is.

    Args:
        overlap: `(n_states, n_states)`, rows adding up to one.
    """
    if len(overlap) < 2:
        return 1.0
    links = overlap + overlap.T
    tree = minimum_spanning_tree(np.triu(3.0 - links, 1))  # lengths of one and more: 0 would be no link
    return float(3.0 - tree.data.max())


def _neighbour_free_energies(u_kn: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """First estimates `(n_states,)` [kT] of free energies relative to state 0.

    By BAR from each sampled state to the next; of states without samples from the nearest that has some.
    """
    sampled, f_k = np.unique(owners), np.zeros(len(u_kn))
    for k, following in pairwise(sampled):
        here, there, step = owners == k, owners == following, u_kn[following] - u_kn[k]
        try:
            f_k[following] = f_k[k] + bar_root(step[here], -step[there])
        except InsufficientDataError:
            f_k[following] = f_k[k]
    for k in set(range(len(u_kn))) - set(sampled):
        near = sampled[np.abs(sampled - k).argmin()]
        step = (u_kn[k] - u_kn[near])[owners == near]
        value = math.log(len(step)) - float(logsumexp(-step))
        f_k[k] = f_k[near] + (value if math.isfinite(value) else 0.0)
    return f_k - f_k[0]


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
