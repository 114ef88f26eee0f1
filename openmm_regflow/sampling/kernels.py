"""Markov kernels as pure functions, the pool of proposals and running statistics."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.proposals import FlowProposal, ProposalBatch


class KernelInfo(NamedTuple):
    """What a kernel did.

    Attributes:
        accepted: whether the state changed, bool `(n_chains,)`.
        choice: index of the chosen proposal, -1 where the chain stayed, int64 `(n_chains,)`.
        acceptance: probability of leaving the state, float64 `(n_chains,)`.
        log_weights: log-weights of the proposals, ``-inf`` where impossible, float64 `(n_chains,
            n_proposals)`.
        outside: whether the current state lies where the flow has no density, bool `(n_chains,)`.
    """

    accepted: Tensor
    choice: Tensor
    acceptance: Tensor
    log_weights: Tensor
    outside: Tensor


def proposal_log_weights(batch: ProposalBatch) -> Tensor:
    """Log-weights of proposals; NaN or infinite in any part becomes ``-inf``, that is, a certain rejection.

    This and :func:`state_log_weight` are the only places where non-finite numbers turn into decisions. Both
    exclude the same set (configurations whose log-weight is not a number), so a kernel restricted to the
    complement stays reversible.
    """
    log_w = batch.log_weights.double()
    valid = torch.isfinite(log_w) & torch.isfinite(batch.positions).flatten(-2).all(-1)
    return torch.where(valid, log_w, -torch.inf)


def state_log_weight(state: ProposalBatch) -> Tensor:
    """Log-weight of current states: ``-inf`` for an impossible energy (left at once), ``+inf`` (never left)
    where the flow has no density or its log-density is not a number, because no proposal could ever lead
    back."""
    impossible = torch.isfinite(state.log_q) & ~torch.isfinite(state.u)
    log_w = torch.where(torch.isfinite(state.log_weights), state.log_weights, torch.inf)
    return torch.where(impossible, -torch.inf, log_w).double()


def independence_metropolis_hastings(
    state: ProposalBatch, proposal_batch: ProposalBatch, generator: torch.Generator
) -> tuple[ProposalBatch, KernelInfo]:
    """One independence Metropolis-Hastings step per chain.

    Accepts with ``log alpha = -u(y) + u(x) + log q(x) - log q(y)`` (Tierney, Ann. Statist. 22, 1701 (1994),
    sec. 2.3).

    Args:
        state: current states `(n_chains, ...)` with their ``log_q`` and ``u``.
        proposal_batch: one independent draw from the flow per chain `(n_chains, ...)`.
        generator: random state, on its own device.

    Returns:
        The new state and what happened.
    """
    log_wy, log_wx = proposal_log_weights(proposal_batch), state_log_weight(state)
    # A chain in an impossible state (-inf) accepts anything possible and nothing else.
    log_alpha = torch.where(torch.isneginf(log_wy), -torch.inf, log_wy - log_wx).clamp(max=0)
    accepted = torch.log(_uniform(len(log_wy), generator, log_wy.device)) < log_alpha
    choice = torch.where(accepted, 0, -1)
    candidates = ProposalBatch(*(part.unsqueeze(1) for part in proposal_batch))
    info = KernelInfo(accepted, choice, log_alpha.exp(), log_wy.unsqueeze(1), torch.isposinf(log_wx))
    return _chosen(state, candidates, choice), info


def iterated_sir(
    state: ProposalBatch, proposal_batch: ProposalBatch, generator: torch.Generator
) -> tuple[ProposalBatch, KernelInfo]:
    """One step of iterated sampling-importance-resampling per chain, exact for any number of proposals.

    Chooses among the current state and ``n_proposals`` fresh draws with probability proportional to their
    weights ``exp(-u) / q`` (Andrieu, Doucet and Holenstein, J. R. Stat. Soc. B 72, 269 (2010), sec. 4.1;
    i-SIR of Andrieu, Lee and Vihola, Bernoulli 24, 842 (2018)).

    Args:
        state: current states `(n_chains, ...)`.
        proposal_batch: independent draws `(n_chains, n_proposals, ...)`.
        generator: random state, on its own device.

    Returns:
        The new state and what happened.
    """
    log_wy, log_wx = proposal_log_weights(proposal_batch), state_log_weight(state)
    stuck = torch.isposinf(log_wx) | (torch.isneginf(log_wx) & torch.isneginf(log_wy).all(1))
    log_w = torch.cat([torch.where(stuck, 0.0, log_wx).unsqueeze(1), log_wy], 1)
    cumulative = torch.softmax(log_w, 1).cumsum(1)
    threshold = _uniform(len(log_w), generator, log_w.device) * cumulative[:, -1]
    choice = torch.searchsorted(cumulative, threshold.unsqueeze(1), right=True).squeeze(1) - 1
    choice = torch.where(stuck, -1, choice.clamp(max=log_wy.shape[1] - 1))
    leaving = torch.where(stuck, 0.0, 1 - cumulative[:, 0] / cumulative[:, -1])
    info = KernelInfo(choice >= 0, choice, leaving, log_wy, torch.isposinf(log_wx))
    return _chosen(state, proposal_batch, choice), info


def flow_kernel(
    state: ProposalBatch, proposal_batch: ProposalBatch, generator: torch.Generator
) -> tuple[ProposalBatch, KernelInfo]:
    """Metropolis-Hastings for one proposal per chain, i-SIR for more; ``proposal_batch`` is `(n_chains, n,
    ...)`."""
    if proposal_batch.u.shape[1] == 1:
        return independence_metropolis_hastings(state, proposal_batch.rows((slice(None), 0)), generator)
    return iterated_sir(state, proposal_batch, generator)


def _uniform(n: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Uniform float64 numbers in [0, 1) `(n,)` from a generator on any device."""
    return torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device).to(device)


def _chosen(state: ProposalBatch, candidates: ProposalBatch, choice: Tensor) -> ProposalBatch:
    """Candidate ``choice`` of each chain, the old state where it is -1."""
    rows = torch.arange(len(choice), device=choice.device)
    moved = choice >= 0
    new = candidates.rows((rows, choice.clamp(min=0)))
    mask = moved.reshape(-1, 1, 1)
    return ProposalBatch(
        torch.where(mask, new.positions.to(state.positions), state.positions),
        torch.where(moved, new.log_q, state.log_q),
        torch.where(moved, new.u, state.u),
    )


class ProposalPool:
    """Pre-drawn proposals, each handed out once: amortises one large batch over many small moves.

    Energies are evaluated for a whole batch when the first draw is taken with its energy, and never for draws that are
    taken without.

    Args:
        proposal: where fresh draws come from; None for a fixed reservoir.
        size: how many are drawn at a time.
        generator: random state for the draws, on the flow's device.
        batch: draws to start with.

    Raises:
        InputError: a size below one.
    """

    def __init__(
        self,
        proposal: FlowProposal | None,
        size: int = 256,
        generator: torch.Generator | None = None,
        batch: ProposalBatch | None = None,
    ) -> None:
        if size < 1:
            raise InputError(f"pool_size is {size}; at least one proposal has to be drawn at a time")
        self.proposal, self.size, self.generator = proposal, size, generator
        self._batch, self._next = batch, 0
        self._has_energies = batch is not None
        self._parameters = dict(getattr(getattr(proposal, "potential", None), "parameters", {}))

    def __len__(self) -> int:
        """Draws left before the next refill."""
        return 0 if self._batch is None else len(self._batch.u) - self._next

    def take(self, n: int, energies: bool = True) -> ProposalBatch:
        """The next ``n`` draws, never to be handed out again.

        Args:
            n: how many.
            energies: False for a target whose own energy is evaluated anyway: ``u`` may be NaN.

        Raises:
            InsufficientDataError: a fixed reservoir has fewer than ``n`` left.
        """
        parts: list[ProposalBatch] = []
        while (missing := n - sum(len(part.u) for part in parts)) > 0:
            batch = self._batch if len(self) and self._batch is not None else self._refill(missing, energies)
            if energies and not self._has_energies:
                batch = self._evaluate(batch)
            parts.append(batch.rows(slice(self._next, self._next + missing)))
            self._next += len(parts[-1].u)
        return ProposalBatch(*(torch.cat(columns) for columns in zip(*parts)))

    def heed(self, parameters: Mapping[str, float]) -> None:
        """Have energies computed anew, when asked for, if those of what is left are of other parameters than these."""
        if parameters != self._parameters:
            self._parameters = dict(parameters)
            self._has_energies = self._has_energies and self.proposal is None  # a fixed reservoir has no others

    def _evaluate(self, batch: ProposalBatch) -> ProposalBatch:
        """Energies of the draws that are left of a batch; the others are gone."""
        left = self.proposal.with_energies(batch.rows(slice(self._next, None)))  # type: ignore[union-attr]
        self._batch, self._next, self._has_energies = left, 0, True
        return left

    def _refill(self, at_least: int, energies: bool) -> ProposalBatch:
        """Draw the next batch."""
        if self.proposal is None:
            raise InsufficientDataError(
                f"the pool is empty, {at_least} more proposals are needed; give it a FlowProposal to draw from"
            )
        draw = self.proposal.sample if energies else self.proposal.draw
        self._batch, self._next, self._has_energies = draw(max(self.size, at_least), self.generator), 0, energies
        return self._batch


@dataclass
class FlowStatistics:
    """Running totals of flow steps, in plain numbers so that they can be stored and added up.

    Attributes:
        n_proposed: flow steps attempted.
        n_accepted: flow steps that changed the state.
        n_proposals: configurations proposed (``n_proposed`` times the number per step).
        n_impossible: proposals with a NaN, infinite or absurd energy or density; each one a rejection.
        n_outside: steps that started where the flow has no density, which no flow step can leave.
        sum_log_weight: sum over the possible proposals [nat]; of a subset's or switched ones the logarithms of what
            they weigh by the current state, as the surroundings of others are others.
        log_sum_weight: log of the sum of weights; ``-inf`` where they cannot be compared (a subset).
        log_sum_weight_squared: log of the sum of squared weights.
    """

    n_proposed: int = 0
    n_accepted: int = 0
    n_proposals: int = 0
    n_impossible: int = 0
    n_outside: int = 0
    sum_log_weight: float = 0.0
    log_sum_weight: float = -math.inf
    log_sum_weight_squared: float = -math.inf

    def update(self, info: KernelInfo, own: Tensor | None = None) -> None:
        """Add one kernel call.

        Args:
            info: of the call.
            own: log-weights of the current states `(n_chains,)`, where those of proposals hold the energy of
                surroundings that change from call to call: then only the differences mean something, and there is no
                effective sample size. Of a state without a finite one the difference counts as zero.
        """
        log_w = info.log_weights.cpu().numpy()  # a few numbers: NumPy is several times faster
        if own is not None:
            here = own.cpu().numpy()[:, None]
            ratio = log_w - np.nan_to_num(here, posinf=0, neginf=0)
            log_w = np.where(np.isfinite(here) | np.isneginf(log_w), ratio, 0.0)
        log_w = log_w.ravel()
        possible = log_w[np.isfinite(log_w)]
        self.n_proposed += len(info.accepted)
        self.n_accepted += int(info.accepted.sum())
        self.n_proposals += len(log_w)
        self.n_outside += int(info.outside.sum())
        self.n_impossible += len(log_w) - len(possible)
        if len(possible):
            self.sum_log_weight += float(possible.sum())
        if len(possible) and own is None:
            self.log_sum_weight = float(np.logaddexp.reduce(possible, initial=self.log_sum_weight))
            squared = float(np.logaddexp.reduce(2 * possible, initial=self.log_sum_weight_squared))
            self.log_sum_weight_squared = squared

    @property
    def acceptance_rate(self) -> float:
        """Accepted over attempted steps; NaN before the first."""
        return self.n_accepted / self.n_proposed if self.n_proposed else math.nan

    @property
    def mean_log_weight(self) -> float:
        """Mean log-weight of the possible proposals [nat], of a subset by the current states; NaN before the first."""
        possible = self.n_proposals - self.n_impossible
        return self.sum_log_weight / possible if possible else math.nan

    @property
    def effective_sample_size(self) -> float:
        """Kish effective sample size of all proposals so far, as a fraction; NaN before the first, and for subsets."""
        if not self.n_proposals or math.isinf(self.log_sum_weight):
            return math.nan
        return math.exp(2 * self.log_sum_weight - self.log_sum_weight_squared) / self.n_proposals

    def as_dict(self) -> dict[str, float]:
        """Totals and what derives from them."""
        derived = ("acceptance_rate", "mean_log_weight", "effective_sample_size")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FlowStatistics":
        """Totals from :meth:`as_dict`; derived entries are ignored, missing ones start afresh."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
