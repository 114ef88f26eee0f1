"""The processes of one ``torchrun`` job: who am I, sums over all, one word for all; alone, everything is the identity.

Every rank runs the same program. What is random is drawn alike on every rank and then sliced, or by parts that do not
depend on the number of ranks, so that any number of them gives the result of one process, up to the rounding of sums.
"""

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from openmm_regflow.errors import InputError, RegflowError

#: A rank may wait for another's transport plan or validation; only a dead one stays away for a day.
TIMEOUT = datetime.timedelta(days=1)
Rows = slice
#: Parts of many rows that ranks share: few rows in a part are slow on a GPU, few parts leave ranks without one.
MOST_PARTS, LEAST_ROWS = 32, 2048


def seed_of(*numbers: int) -> int:
    """A seed that depends on these numbers (>= 0) alone; zeros at the end say nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def stream(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on these numbers (>= 0) alone: a seed, a step, a purpose, a part.

    Zeros at the end say nothing: let no purpose be zero where others have more numbers.
    """
    return torch.Generator(device).manual_seed(seed_of(*numbers))


def parts(n: int) -> list[Rows]:
    """How n rows are cut into parts with random numbers of their own: alike for any number of ranks."""
    count = 1
    while 2 * count <= min(MOST_PARTS, n // LEAST_ROWS):
        count *= 2
    return [Rows(j * n // count, (j + 1) * n // count) for j in range(count)]


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

    def unit(self, every: int = 1) -> int:
        """What the size of a batch must be a multiple of, where a loss takes every so-many-th row for a part of it."""
        return self.size * every if self.size > 1 else 1

    def check_batch(self, n: int, every: int = 1, name: str = "batch_size") -> None:
        """Refuse a batch whose slices would not give together what it gives as a whole.

        Raises:
            InputError: naming the setting.
        """
        if n % self.unit(every):
            raise InputError(
                f"{name} is {n}, which cannot be split evenly over {self.size} processes; make it a multiple of "
                f"{self.unit(every)}, or change their number"
            )

    def slice(self, batch: tuple[Tensor, ...], every: int = 1) -> tuple[Tensor, ...]:
        """This rank's rows of a batch that every rank has in full.

        Raises:
            InputError: the rows cannot be split evenly; ``every``: see `unit`.
        """
        n = len(batch[0])
        self.check_batch(n, every)
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
        """Rank 0's value, on every rank; tensors that the others get, in dicts and lists, too, are on the CPU."""
        if self.size == 1:
            return value
        box = [_on_cpu(value) if self.main else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def first(self, function: Callable[[], Any]) -> Any:
        """What rank 0 gets from a function, on every rank; if it is refused there, all are.

        Raises:
            RegflowError, OSError: as the function on rank 0.
        """
        if self.size == 1:
            return function()
        value, refusal = None, None
        if self.main:
            try:
                value = function()
            except (RegflowError, OSError) as error:
                refusal = error
        value, refusal = self.share((value, refusal))
        if refusal is not None:
            raise refusal
        return value

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in order, on every rank."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box


    def mine(self, n: int) -> list[tuple[int, Rows]]:
        """The parts of n rows that this rank makes: their numbers and rows; none if there are more ranks than parts."""
        cut = parts(n)
        # Rounded up: rank 0, which reports, has some.
        begin, end = (-(-r * len(cut) // self.size) for r in (self.rank, self.rank + 1))
        return list(enumerate(cut))[begin:end]

    def by_parts(self, n: int, make: Callable[[int, Rows], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What all ranks make of n rows, in order, on every rank.

        Args:
            n: rows.
            make: number and rows of a part -> tensors with those rows; random numbers by `stream` with that number.
        """
        made = [make(j, rows) for j, rows in self.mine(n)]
        return self.join(tuple(torch.cat(columns) for columns in zip(*made, strict=True)))

    def join(self, own: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The rows of all ranks in their order, on every rank; a rank without any gives an empty tuple."""
        if self.size == 1:
            return own
        described = self.gather([(t.shape, t.dtype, t.device.type) for t in own])
        columns: list[list[Tensor]] = [[] for _ in max(described, key=len)]
        for source, kinds in enumerate(described):
            for k, (shape, dtype, device) in enumerate(kinds):
                here = source == self.rank
                rows = own[k].contiguous() if here else torch.empty(shape, dtype=dtype, device=device)
                if rows.numel():
                    dist.broadcast(rows.view(-1).view(torch.uint8), src=source)
                columns[k].append(rows)
        return tuple(torch.cat(column) for column in columns)


def _on_cpu(value: Any) -> Any:
    """Tensors within dicts, lists and tuples on the CPU: unpickled, all would go to the GPU that they came from."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {k: _on_cpu(v) for k, v in value.items()}
    return type(value)(map(_on_cpu, value)) if type(value) in (list, tuple) else value


def current() -> Ranks:
    """The ranks of the running job; one rank where there is none."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


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
