"""Pools: samples of a flow, with frames of the target among them, and their weights; made by all ranks together."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import logsumexp
from torch import Tensor

from openmm_regflow import ranks, reweighting
from openmm_regflow.errors import InputError
from openmm_regflow.flows import Flow
from openmm_regflow.frames import Indicator, Mover, memberships
from openmm_regflow.slopes import differentiable, slopes

#: What random numbers are for, after a seed and the number of a pool; smaller numbers are purposes of training.
SAMPLES, MOVES, LABELS = 1001, 1002, 1003


@dataclass
class Pool:
    """Samples of a density ``r``, the flow's own or a mixture with the target, and their weights ``p / r``.

    What is trained for may be lifted where the samples are in a watched set: ``p exp(lift)``.

    Attributes:
        y: features `(n, dim)` in the flow's precision, not finite where positions are not.
        log_volume: log|det dy/dx| `(n,)`.
        log_q: log-density of the flow at the positions `(n,)`.
        log_r: log-density of the pool at the positions `(n,)`.
        log_p_over_r: log-weights of the target `(n,)`, -inf where there is none.
        members: whether each sample is in each of k watched sets `(k, n)`, bool.
        n_frames: how many of the samples, the last ones, are of the target.
        lift: logarithm of what the target is multiplied by in a watched set.
        slope: gradient of log p by the features `(n, dim)`, in the flow's precision; None where nobody asked.
    """

    y: Tensor
    log_volume: Tensor
    log_q: Tensor
    log_r: Tensor
    log_p_over_r: np.ndarray
    members: np.ndarray
    n_frames: int = 0
    lift: float = 0.0
    slope: Tensor | None = None

    @property
    def log_w(self) -> np.ndarray:
        """Log-weights `(n,)` of what is trained for."""
        return self.log_p_over_r + self.lift * self.members.any(0)

    def log_ratio(self) -> np.ndarray:
        """log p/q `(n,)` of what is trained for, normalised by the weights; -inf where there is none."""
        log_w = self.log_w
        log_mean = float(logsumexp(log_w)) - math.log(len(log_w))
        log_p = log_w + self.log_r.cpu().numpy() - log_mean
        return np.where(np.isfinite(log_w), log_p - self.log_q.cpu().numpy(), -np.inf)

    def divergence(self) -> tuple[float, float]:
        """KL(p || q) = E_p[log p/q] [nat] of what is trained for, with its standard error.

        The error is that of independent samples by the delta method, that of the normalisation in it: with t the
        weights of the target (their sum is one, which is how `log_normalisation` chose the normalisation), a the lift,
        l = log p/q, g = a (l - KL - 1) / sum(t a), and m frames,

            d KL = sum over samples of t (g - c), less its mean over the samples of the same source,
            c = (1 + sum g t (1 - m t)) / sum t (1 - m t).

        Frames that remember each other make it larger than it says.
        """
        w = reweighting.normalised_weights(self.log_w)
        log_ratio = np.where(w > 0, self.log_ratio(), 0.0)
        value = float(np.sum(w * log_ratio))
        t = reweighting.normalised_weights(self.log_p_over_r)
        n_own = len(t) - self.n_frames
        # 1 - m t = n q / ((n + m) r), without a difference of what is nearly equal
        slope = t * np.exp(math.log(n_own / len(t)) + (self.log_q - self.log_r).cpu().numpy())
        slope[t == 0] = 0.0
        lift = np.exp(self.lift * self.members.any(0))
        g = lift / np.sum(t * lift) * (log_ratio - value - 1.0)
        influence = t * (g - (1.0 + np.sum(g * slope)) / np.sum(slope))
        parts = influence[:n_own], influence[n_own:]
        return value, math.sqrt(sum(len(part) * float(part.var()) for part in parts if len(part)))


def draw(
    flow: Flow,
    n: int,
    reduced_potential: Callable[[Tensor], Tensor],
    watch: Sequence[Indicator] = (),
    seed: Sequence[int] = (0,),
    sloped: bool = False,
) -> Pool:
    """Samples of the flow with their weights.

    Args:
        flow: what is sampled.
        n: samples, and energies.
        reduced_potential: positions `(n, n_atoms, 3)` [nm] -> `(n,)` [kT], +inf where impossible.
        watch: indicator functions of sets of conformations.
        seed: numbers that the random ones depend on, and on nothing else.
        sloped: with the slopes of log p, for which the potential has to be ``slopes.Differentiable``.

    Raises:
        InputError: no sample has a finite weight.
    """

    def part(j: int, rows: slice) -> tuple[Tensor, ...]:
        generator = ranks.stream(*seed, SAMPLES, j, device=flow.device)
        x, log_q = flow.sample(rows.stop - rows.start, generator)
        u, *described = _described(flow, x, reduced_potential, watch, sloped)
        log_w = -u.to(log_q) + flow.frame_log_density(x) - log_q
        return *described, log_q, log_w.double()

    y, log_volume, members, slope, log_q, weights = ranks.current().by_parts(n, part)
    log_w = weights.cpu().numpy()
    log_w[~np.isfinite(log_w)] = -np.inf
    if not np.isfinite(log_w).any():
        raise InputError("no sample of the pool has a finite weight; train the flow longer before refining it")
    return Pool(y, log_volume, log_q, log_q, log_w, members.T.numpy(), slope=slope if sloped else None)


def _described(
    flow: Flow, x: Tensor, reduced_potential: Callable[[Tensor], Tensor], watch: Sequence[Indicator], sloped: bool
) -> tuple[Tensor, ...]:
    """What pools hold of positions.

    Returns:
        reduced potential `(n,)`, features `(n, dim)`, their log|det dy/dx| `(n,)`, membership in each set `(n, k)`,
        and the gradient of log p by the features `(n, dim)`, or `(n, 0)`.
    """
    members = torch.as_tensor(memberships(x, watch).T.copy())
    if sloped:
        y, log_volume, u, slope = slopes(flow.coordinates, x, differentiable(reduced_potential))
    else:
        y, log_volume = flow.coordinates.features_of(x)
        u, slope = reduced_potential(x), y.new_zeros(len(x), 0)
    return u, y.to(flow.dtype), log_volume, members, slope.to(flow.dtype)


def log_normalisation(log_p: np.ndarray, log_q: np.ndarray, n: int, m: int) -> float:
    """log of the integral of an unnormalised density p, from n samples of a density q and m of p together.

    The root Z of ``sum_i p_i / (n q_i + m p_i / Z) = Z`` over all samples: Bennett's acceptance ratio, bridge sampling
    (Bennett 1976; Meng & Wong 1996). The mean of p/q over the samples of q alone is what a few of them say as long as
    q is poor.

    Args:
        log_p: `(n + m,)` of all samples, -inf where impossible.
        log_q: `(n + m,)`.
        n: samples of q.
        m: samples of p.

    Raises:
        InputError: nothing but the samples of p is possible.
    """
    possible = np.isfinite(log_p) & np.isfinite(log_q)
    log_p, log_q = log_p[possible], log_q[possible]

    def excess(log_z: float) -> float:
        share = log_p - log_z - np.logaddexp(math.log(n) + log_q, math.log(m) + log_p - log_z)
        return float(logsumexp(share))

    if len(log_p) <= m:
        raise InputError("no sample of the flow is possible, so that nothing says how the target is normalised")
    difference = log_p - log_q
    lowest = float(difference.min()) + math.log((len(log_p) - m) / n) - 1.0  # there the sum is above one
    return float(brentq(excess, lowest, float(difference.max()) + 1.0, xtol=1e-9))


class Anchors:
    """Frames of the target as the defensive part of a pool (Hesterberg 1995; balance heuristic of Veach & Guibas 1995).

    A pool of n flow samples alone cannot show where the flow has too little density: it hardly goes there. With m
    frames of the target among them the pool has the density ``(n q + m p) / (n + m)``, its weights are at most
    ``(n + m) / m``, and a basin that the frames visited cannot be forgotten. The target's normalisation, which ``p``
    needs, comes from both (`log_normalisation`).

    Args:
        data: frames of the target `(k, n_atoms, 3)` [nm].
        reduced_potential: positions `(n, n_atoms, 3)` [nm] -> `(n,)` [kT].
        n: anchors; more than the frames if they move, then by repetition.
        mover: a Markov kernel of the target.
        n_moves: calls of it before each pool.
        seed: of the order in which frames are taken, and of moves and labels.
        sloped: pools get the slopes of log p, too; every pool then takes an energy, and forces, of every anchor.

    Attributes:
        x: positions `(m, n_atoms, 3)` [nm].
        n_energies: that it took to place them in the beginning.
    """

    def __init__(
        self,
        data: Tensor,
        reduced_potential: Callable[[Tensor], Tensor],
        n: int,
        mover: Mover | None = None,
        n_moves: int = 0,
        seed: int = 0,
        sloped: bool = False,
    ) -> None:
        self._rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).to(data.device)
        self._potential, self._mover, self._n_moves, self._seed = reduced_potential, mover, n_moves, seed
        self._data, self._n = data, n if mover and n_moves else min(n, len(data))
        self._sloped = sloped
        self._take(0)
        self.n_energies = 0 if sloped else len(self.x)

    def place(self, x: Tensor) -> None:
        """Put the anchors at `x` `(m, n_atoms, 3)` [nm]."""
        self.x = x
        if not self._sloped:  # they come with slopes, which depend on how a molecule lies in the pool
            (self._u,) = ranks.current().by_parts(len(x), lambda j, rows: (self._potential(x[rows]),))

    def _take(self, turn: int) -> None:
        """Place frames in the order of `_rows`, round and round: copies that will move may be more than the frames."""
        places = torch.arange(turn * self._n, (turn + 1) * self._n, device=self._rows.device) % len(self._rows)
        self.place(self._data[self._rows[places]].double())

    def renew(self, k: int) -> int:
        """Other anchors for pool ``k``: moved within the target, or the next of the frames; the energies it takes."""
        if self._mover is not None and self._n_moves:
            return self._move(k, self._mover)
        if k == 0 or len(self._data) <= self._n:
            return len(self.x) if self._sloped else 0
        self._take(k)
        return len(self.x)

    def _move(self, k: int, mover: Mover) -> int:
        peers, spent = ranks.current(), 0

        def part(j: int, rows: slice) -> tuple[Tensor, ...]:
            nonlocal spent
            generator, x = ranks.stream(self._seed, k, MOVES, j), self.x[rows]
            for _ in range(self._n_moves):
                x, energies = mover(x, generator)
                spent += energies
            return (x,)

        (x,) = peers.by_parts(len(self.x), part)
        self.place(x)
        return sum(peers.gather(spent)) + len(x)

    def mix(self, flow: Flow, pool: Pool, k: int, watch: Sequence[Indicator] = ()) -> Pool:
        """Pool ``k`` with the anchors in it, behind its own samples."""
        frames = flow.coordinates.augment(self.x, ranks.stream(self._seed, k, LABELS)).to(flow.device)

        def part(j: int, rows: slice) -> tuple[Tensor, ...]:
            x = frames[rows]
            known = (lambda _: self._u[rows]) if not self._sloped else self._potential
            return *_described(flow, x, known, watch, self._sloped), flow.log_prob(x).to(pool.log_q)

        u, y, log_volume, members, slope, log_q = ranks.current().by_parts(len(frames), part)
        n, m, both = len(pool.log_q), len(frames), torch.cat([pool.log_q, log_q])
        log_p_own = pool.log_p_over_r + pool.log_q.cpu().numpy()
        log_p_frames = (-u.to(log_q) + flow.frame_log_density(frames).to(log_q)).cpu().numpy()
        log_p = np.concatenate([log_p_own, log_p_frames])
        log_p = log_p - log_normalisation(log_p, both.cpu().numpy(), n, m)
        log_r = np.logaddexp(math.log(n) + both.cpu().numpy(), math.log(m) + log_p) - math.log(n + m)
        log_w = log_p - log_r
        log_w[~np.isfinite(log_w)] = -np.inf
        return Pool(
            torch.cat([pool.y, y]),
            torch.cat([pool.log_volume, log_volume]),
            both,
            torch.as_tensor(log_r).to(both),
            log_w,
            np.concatenate([pool.members, members.T.numpy()], axis=1),
            m,
            slope=torch.cat([pool.slope, slope]) if pool.slope is not None else None,
        )
