"""Training on the chain's own samples, as a stage that ends before production begins.

A kernel that is retrained on the states it produced is no Markov kernel any more, and averages over such a chain can
be biased. So adaptation is a stage of its own: sample, retrain, repeat; then freeze; then produce.
"""

import copy
import hashlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from openmm_regflow.errors import InputError, RegflowError
from openmm_regflow.proposals import FlowProposal

#: Runs a chain with a proposal and returns configurations `(n, n_atoms, 3)` [nm].
Sample = Callable[[FlowProposal], np.ndarray]
#: ``(flow, configurations) -> flow``: the same object trained further, or a new one.
Retrain = Callable[[Any, np.ndarray], Any]


class AdaptiveFlow:
    """Sample, retrain, freeze, sample; nothing retrains the flow once it is frozen.

    Args:
        proposal: with the flow to start from. The flow is copied; the caller's stays as it is.
        sample: runs a chain of any kind (``run_chain``, ``FlowSimulation``, an openmmtools sampler).
        retrain: trains the flow on all configurations of the adaptation so far.

    Attributes:
        stage: ``"adapting"`` or ``"frozen"``.
        adaptation: configurations of the adaptation, one array per round; for training, never for averages.

    Example:
        >>> adaptive = AdaptiveFlow(proposal, sample, retrain)  # doctest: +SKIP
        >>> adaptive.adapt(3)                                   # doctest: +SKIP
        >>> frames = adaptive.freeze().produce()                # doctest: +SKIP
    """

    def __init__(self, proposal: FlowProposal, sample: Sample, retrain: Retrain) -> None:
        self._sample, self._retrain = sample, retrain
        self._proposal = proposal.with_flow(copy.deepcopy(proposal.flow))
        self.adaptation: list[np.ndarray] = []
        self._digest: str | None = None

    @property
    def stage(self) -> Literal["adapting", "frozen"]:
        """Where this object stands."""
        return "adapting" if self._digest is None else "frozen"

    @property
    def proposal(self) -> FlowProposal:
        """The proposal with the present flow.

        Raises:
            RegflowError: the flow was changed after it had been frozen.
        """
        if self._digest is not None and self._digest != weights_digest(self._proposal.flow):
            raise RegflowError(
                "the flow was changed after freeze(), so what follows would not be one Markov chain; start again with "
                "a new AdaptiveFlow from this flow and discard the samples since"
            )
        return self._proposal

    def adapt(self, n_rounds: int = 1) -> "AdaptiveFlow":
        """``n_rounds`` times: sample with the present flow, then retrain on everything sampled so far.

        Raises:
            InputError: after :meth:`freeze`, or fewer than one round.
        """
        if self.stage == "frozen":
            raise InputError("the flow is frozen: adaptation is over; start a new AdaptiveFlow to adapt again")
        if n_rounds < 1:
            raise InputError(f"n_rounds is {n_rounds}; at least one round is needed")
        for _ in range(n_rounds):
            self.adaptation.append(np.asarray(self._sample(self._proposal)))
            flow = self._retrain(self._proposal.flow, np.concatenate(self.adaptation))
            self._proposal = self._proposal.with_flow(flow)
        return self

    def freeze(self) -> "AdaptiveFlow":
        """End the adaptation for good: an own copy of the flow, without gradients, guarded by its hash.

        Raises:
            RegflowError: it was frozen before, and the flow was changed since.
        """
        if self.stage == "frozen":
            _ = self.proposal  # checks the hash
            return self
        flow = copy.deepcopy(self._proposal.flow)
        flow.requires_grad_(False)
        self._proposal = self._proposal.with_flow(flow)
        self._digest = weights_digest(flow)
        return self

    def produce(self) -> np.ndarray:
        """Sample with the frozen flow, for averages.

        Raises:
            InputError: before :meth:`freeze`.
            RegflowError: the flow was changed after it had been frozen, or during the run.
        """
        if self.stage == "adapting":
            raise InputError("call freeze() first: samples of a flow that still adapts are not for averages")
        frames = np.asarray(self._sample(self.proposal))
        _ = self.proposal  # checks again: nothing may have changed during the run
        return frames


def weights_digest(flow: torch.nn.Module) -> str:
    """SHA-256 over the names and values of all weights and buffers of a flow."""
    sha = hashlib.sha256()
    for name, value in sorted(flow.state_dict().items()):
        sha.update(name.encode())
        sha.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
