"""The processes of one ``torchrun`` job: who am I, sums over all, one word for all; alone, everything is the identity.

Every rank runs the same program. What is random is drawn alike on every rank and then sliced, so that a job of any
number of ranks gives the result of one process, up to the rounding of sums.
"""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from openmm_regflow.errors import InputError

#: A rank may wait for another's transport plan or validation; only a dead one stays away for a day.
TIMEOUT = datetime.timedelta(days=1)
_alone: ContextVar[bool] = ContextVar("alone", default=False)


@dataclass(frozen=True)
class Ranks:
    """Place of this process among its peers.

    Attributes:
        rank: of this process, 0 for the one that writes and speaks.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """True on the rank that writes files and prints."""
        return self.rank == 0

    def slice(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """This rank's rows of a batch that every rank has in full.

        Raises:
            InputError: the rows cannot be split evenly.
        """
        n = len(batch[0])
        if n % self.size:
            raise InputError(
                f"a batch of {n} cannot be split evenly over {self.size} processes; change batch_size or their number"
            )
        rows = slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)
        return tuple(t[rows] for t in batch) if self.size > 1 else batch

    def mean_(self, tensors: list[Tensor]) -> None:
        """Replace tensors of one dtype by their means over all ranks, in place."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(part.view_as(tensor))

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value if self.main else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in order, on every rank."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box


def current() -> Ranks:
    """The ranks of the running job; one rank where there is none."""
    if not _alone.get() and dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


@contextmanager
def alone() -> Iterator[None]:
    """A part of the program that this rank runs for itself: `current` is one rank inside."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextmanager
def job() -> Iterator[Ranks]:
    """Join the job that ``torchrun`` started (gloo on CPUs, NCCL between GPUs); nothing to join without it.

    On GPUs each process takes the one of its ``LOCAL_RANK``, as the device "cuda".
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield current()
        return
    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    if on_gpus:
        # NCCL refuses two ranks on one GPU; gloo does not.
        on_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=TIMEOUT)
    try:
        yield current()
    finally:
        dist.destroy_process_group()
