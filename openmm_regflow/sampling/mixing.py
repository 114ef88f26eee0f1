"""Shares of several flows in one proposal, fitted to their own draws."""

from collections.abc import Sequence

import torch

from openmm_regflow.errors import InputError
from openmm_regflow.mixtures import FlowMixture, fitted_shares
from openmm_regflow.proposals import FlowProposal, ProposalBatch

#: A part with less adds nothing.
LEAST_SHARE = 1e-3


def fit_mixture(
    proposals: Sequence[FlowProposal], n: int, generator: torch.Generator | None = None
) -> tuple[FlowMixture, list[ProposalBatch]]:
    """The mixture of least KL(p || q) of several flows, on ``n`` draws of each.

    A few parameters on thousands of draws: what it is worth on fresh samples is hardly less, but judge it there.

    Args:
        proposals: of one target; their flows become the parts.
        n: draws, and energies, of every part.
        generator: random state on the flows' device; None uses torch's global one.

    Returns:
        The mixture, and the draws of every part.

    Raises:
        InputError: fewer than two proposals, a mixture among them, no draw of a finite energy, or a flow that adds
            nothing to the others.
        IncompatibleFlowError: flows of different targets or measures.
    """
    flows = [proposal.flow for proposal in proposals]
    mixture = FlowMixture(flows)  # refuses what cannot be mixed before anything is drawn
    batches = [proposal.sample(n, generator) for proposal in proposals]
    x, u = torch.cat([b.positions for b in batches]), torch.cat([b.u for b in batches])
    there = torch.isfinite(u)
    if not bool(there.any()):
        raise InputError("no draw of these flows has a finite energy; train them further, or look at them by `check`")
    log_q = torch.stack([proposal.log_q(x[there]) for proposal in proposals])
    shares = fitted_shares(log_q, u[there])
    if float(shares.min()) < LEAST_SHARE:
        k = int(shares.argmin())
        raise InputError(
            f"flow {k + 1} of {len(flows)} has a share of {shares[k]:.1g}: it adds nothing to the others and costs "
            "a pass for every sample; leave it out"
        )
    mixture.shares.copy_(shares)
    return mixture, batches
