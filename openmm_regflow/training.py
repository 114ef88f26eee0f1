"""One training loop for students and teachers: AdamW, warm-up and cosine, EMA, validation, checkpoints, rollback.

The batch and the noise of step k are functions of (seed, k): a run that was stopped and resumed follows the
same loss curve bit for bit on the same machine. Under ``torchrun`` every rank takes its slice of that batch and
gradients are averaged, so that any number of ranks gives the result of one, up to the rounding of sums.
"""

import copy
import csv
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from openmm_regflow import ranks
from openmm_regflow.errors import DivergenceError, IncompatibleFlowError, InputError
from openmm_regflow.files import read_safetensors, write_json, write_safetensors
from openmm_regflow.graphs import Gradients
from openmm_regflow.objectives import Loss, SplitLoss, describe

Batch = tuple[Tensor, ...]
#: (steps done, steps in total, figures of the last step)
Progress = Callable[[int, int, dict[str, float]], None]
#: (name of the stage, steps in total) -> progress callback of that stage
Stage = Callable[[str, int], Progress]
CHECKPOINT_VERSION = 1
#: Losses that differ by less than this are equal, where an explosion is concerned.
LEAST_LEVEL = 1e-2
CHECKPOINT_KIND = "openmm_regflow.checkpoint"


class TrainConfig(BaseModel):
    """Settings of one training run; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(2000, ge=1, description="optimiser steps")
    seconds: float | None = Field(None, gt=0, description="stop after this many seconds of training, if sooner")
    batch_size: int = Field(512, ge=1, description="samples per step, over all processes")
    learning_rate: float = Field(5e-4, gt=0)
    final_rate: float = Field(0.01, ge=0, le=1, description="last learning rate, as a fraction of the first")
    warmup: int = Field(50, ge=0, description="steps of linear warm-up")
    schedule: Literal["steps", "seconds"] = Field(
        "steps",
        description="what the cosine follows; with seconds a resumed run is not bit for bit the same, and steps "
        "have to be more than there is time for",
    )
    weight_decay: float = Field(0.01, ge=0)
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the exponential moving average of the weights")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    validate_every: int = Field(100, ge=1)
    patience: int | None = Field(None, ge=1, description="stop after this many validations without improvement")
    checkpoint_every: int = Field(500, ge=1)
    precision: Literal["float32", "mixed", "bfloat16"] = Field(
        "float32",
        description="mixed: gradients by products in bfloat16, values in float32, on CPUs that gain by it; "
        "bfloat16: values too, for teachers only, quicker on GPUs",
    )
    max_rollbacks: int = Field(3, ge=0, description="divergences survived by rolling back and halving the rate")
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _clock(self) -> "TrainConfig":
        if self.schedule == "seconds" and self.seconds is None:
            raise ValueError('schedule = "seconds" needs seconds; give the number or follow the steps')
        return self


@dataclass
class History:
    """What a run did.

    Attributes:
        step: steps at which the loss was recorded.
        loss: mean training loss since the record before.
        samples_per_second: training samples per second since the record before, validation left out.
        validation_step: steps at which validation ran.
        validation: validation loss of the averaged weights.
        seconds: training time, resumed parts included [s].
        rollbacks: divergences survived.
        stopped: why the run ended: "steps", "seconds" or "patience".
    """

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    samples_per_second: list[float] = field(default_factory=list)
    validation_step: list[int] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    seconds: float = 0.0
    rollbacks: int = 0
    stopped: str = "steps"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


class Batches:
    """Batches of tensors of equal length, shuffled anew every epoch; batch k is a function of (seed, k).

    Args:
        tensors: first axis is the sample.
        batch_size: samples per batch.
        seed: of the shuffles.
        augment: applied to each batch, e.g. a random orientation.
        device: where the batches go, while the tensors stay where they are; None: where the tensors are.

    Raises:
        InputError: fewer samples than one batch, unequal lengths, or NaN.
    """

    def __init__(
        self,
        tensors: Batch,
        batch_size: int,
        seed: int = 0,
        augment: Callable[[Batch, torch.Generator], Batch] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        n = len(tensors[0])
        if any(len(t) != n for t in tensors):
            raise InputError(f"tensors of lengths {[len(t) for t in tensors]} are not samples of one set")
        if n < batch_size:
            raise InputError(f"{n} samples are fewer than one batch of {batch_size}; give more data or a smaller batch")
        for tensor in tensors:
            if not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor.reshape(n, -1)).all(1)).nonzero()[0])
                raise InputError(f"sample {bad} holds a NaN or infinite value; remove it before training")
        self.tensors, self.batch_size, self.seed, self.augment = tensors, batch_size, seed, augment
        self.device = None if device is None else torch.device(device)
        self.per_epoch = n // batch_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __call__(self, step: int, generator: torch.Generator) -> Batch:
        """The batch of step `step`."""
        epoch, k = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._order = torch.randperm(len(self.tensors[0]), generator=ranks.stream(self.seed, epoch, 1))
            self._epoch = epoch
        index = self._order[k * self.batch_size : (k + 1) * self.batch_size]
        batch = tuple(t[index] for t in self.tensors)
        batch = self.augment(batch, generator) if self.augment else batch
        return batch if self.device is None else tuple(t.to(self.device) for t in batch)


def train(
    module: nn.Module,
    loss: Loss,
    batches: Callable[[int, torch.Generator], Batch],
    config: TrainConfig,
    *,
    validation: Callable[[nn.Module], float] | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> History:
    """Minimise `loss` over `module`; it ends holding the averaged weights (the best validated ones, if any).

    Args:
        module: a bijection or a vector field, trained in place.
        loss: from ``objectives``, or any function (module, batch, generator) -> (loss, parts). Under ``torchrun`` a
            plain function draws its noise for its slice, and the result is that of one process in distribution only.
        batches: (step, generator) -> batch, e.g. `Batches`.
        config: settings.
        validation: averaged module -> number to be minimised; enables `patience` and keeps the best weights.
        checkpoint: file to write to and, if it exists, to resume from; the loss curve goes to a .csv beside it.
        progress: called after every step, on rank 0.
        clock: what ``config.seconds`` counts, e.g. ``time.process_time`` on a core that other work shares.

    Raises:
        InputError: a batch that the ranks cannot split evenly.
        DivergenceError: NaN or an exploding loss that rolling back did not cure.
        IncompatibleFlowError: a checkpoint of another configuration, loss or network.
    """
    run = _Run(module, loss, batches, config, validation, Path(checkpoint) if checkpoint else None)
    run.resume()
    if run.is_over():
        run.finish()
        return run.history
    if validation and run.step == 0:
        run.begin()
    began = clock() - run.history.seconds
    while run.step < config.steps:
        figures = run.advance()
        run.history.seconds = run.ranks.share(clock() - began) if config.seconds else clock() - began
        if progress and run.ranks.main:
            progress(run.step, config.steps, figures)
        if run.history.stopped == "patience":
            break
        if config.seconds is not None and run.history.seconds >= config.seconds:
            run.history.stopped = "seconds"
            break
    run.finish()
    return run.history


class _Run:
    """State of one training run; `train` is its only user."""

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        batches: Callable[[int, torch.Generator], Batch],
        config: TrainConfig,
        validation: Callable[[nn.Module], float] | None,
        checkpoint: Path | None,
    ) -> None:
        self.module, self.loss, self.batches, self.config = module, loss, batches, config
        self.validation, self.checkpoint = validation, checkpoint
        self.ranks = ranks.current()
        self.averaged = copy.deepcopy(module)
        self.optimizer = adamw(module, config.learning_rate, config.weight_decay)
        self.noise = torch.Generator()
        self.gradients = Gradients(self._loss, module, config.precision, record=isinstance(loss, SplitLoss))
        self.history = History()
        self.step = 0
        self.rate_factor = 1.0
        self.typical, self.spread = math.inf, 0.0
        self.stale = 0
        self.recent: list[float] = []
        self.since, self.drawn = time.monotonic(), 0
        self.best: dict[str, Tensor] | None = None
        self.snapshot = self._state()

    def begin(self) -> None:
        """Judge the module as it is, so that a phase which only makes things worse is undone, rolled back or not."""
        self.validate()
        self.snapshot = self._state()

    def rate(self) -> float:
        """Learning rate of the current step: linear warm-up, then a cosine down to `final_rate`."""
        c = self.config
        if self.step < c.warmup:
            return c.learning_rate * (self.step + 1) / c.warmup
        turn = (self.step - c.warmup) / max(1, c.steps - c.warmup)
        if c.schedule == "seconds" and c.seconds is not None:
            turn = self.history.seconds / c.seconds
        return c.learning_rate * cosine(turn, c.final_rate)

    def advance(self) -> dict[str, float]:
        """One optimiser step with everything that hangs on it."""
        generator = ranks.stream(self.config.seed, self.step, 0)
        self.module.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate_factor * self.rate()
        batch = self.batches(self.step, generator)
        self.drawn += len(batch[0])
        figures = self.gradients(self._own(batch, generator))
        self.ranks.mean_([figures])
        value, *parts = figures.tolist()
        if not self._sane(value):
            return self._roll_back(value)
        self.ranks.mean_([p.grad for p in self.module.parameters() if p.grad is not None])
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip)
        if not bool(torch.isfinite(norm)):
            return self._roll_back(math.nan)
        self.optimizer.step()
        self._average()
        self.step += 1
        self.recent.append(value)
        speed = self.drawn / max(time.monotonic() - self.since, 1e-9)
        self._periodic(speed)
        return {"loss": value, **dict(zip(self.gradients.names, parts)), "samples/s": speed}

    def _own(self, batch: Batch, generator: torch.Generator) -> Batch:
        """This rank's slice of a batch; the noise of a loss that can be split was drawn for the whole."""
        if isinstance(self.loss, SplitLoss):
            return self.ranks.slice(self.loss.draw(batch, generator), self.loss.every)
        alone = self.ranks.size == 1
        self.noise = generator if alone else ranks.stream(self.config.seed, self.step, 2 + self.ranks.rank)
        return self.ranks.slice(batch)

    def _loss(self, module: nn.Module, drawn: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if isinstance(self.loss, SplitLoss):
            return self.loss.of(module, drawn)
        return self.loss(module, drawn, self.noise)

    def _sane(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        level, spread = self.typical, self.spread
        if math.isinf(level) and self.recent:  # the first few steps are judged by those before them
            level, spread = float(np.median(self.recent)), float(np.std(self.recent))
        # Twenty typical magnitudes above the running level, or twenty of its own fluctuations where it is about zero,
        # is no fluctuation of a batch mean.
        return value - level < 20.0 * max(abs(level), spread, LEAST_LEVEL)

    def _average(self) -> None:
        # The usual bias correction: early averages forget faster.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        average_into(self.averaged, self.module, decay)

    def _periodic(self, speed: float) -> None:
        c = self.config
        last = self.step == c.steps
        if self.step % 20 == 0 or last:
            self.history.step.append(self.step)
            self.history.loss.append(float(np.mean(self.recent)))
            self.history.samples_per_second.append(speed)
            self.typical, self.spread, self.recent = self.history.loss[-1], float(np.std(self.recent)), []
        if self.validation and (self.step % c.validate_every == 0 or last):
            self.validate()
        if self.step % c.checkpoint_every == 0 or last:
            self.snapshot = self._state()
            self._write()
        if self.step % 20 == 0 or last:
            self.since, self.drawn = time.monotonic(), 0

    def validate(self) -> None:
        """Validation loss of the averaged weights; the best ones are kept."""
        self.averaged.eval()
        with torch.no_grad():
            value = float(self.validation(self.averaged)) if self.ranks.main else math.nan  # type: ignore[misc]
        value = self.ranks.share(value)
        known = [v for v in self.history.validation if math.isfinite(v)]
        improved = math.isfinite(value) and value < min(known, default=math.inf)
        self.history.validation_step.append(self.step)
        self.history.validation.append(value)
        self.stale = 0 if improved else self.stale + 1
        if improved:
            self.best = {k: v.detach().clone() for k, v in self.averaged.state_dict().items()}
        if self.config.patience is not None and self.stale >= self.config.patience:
            self.history.stopped = "patience"

    def _roll_back(self, value: float) -> dict[str, float]:
        self.history.rollbacks += 1
        if self.history.rollbacks > self.config.max_rollbacks:
            raise DivergenceError(
                f"the loss became {value} at step {self.step} after {self.config.max_rollbacks} rollbacks; lower "
                f"learning_rate (now {self.config.learning_rate}) or check the data for outliers"
            )
        rollbacks, seconds = self.history.rollbacks, self.history.seconds
        self._restore(self.snapshot)
        self.history.rollbacks, self.history.seconds = rollbacks, seconds
        self.rate_factor = 0.5**rollbacks  # the snapshot has that of the rollback before
        warnings.warn(
            f"the loss became {value:.3g} and training went back to step {self.step} at {self.rate_factor:g} of the "
            "learning rate",
            stacklevel=4,
        )
        return {"loss": value, "rollbacks": float(rollbacks)}

    def _state(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "module": self.module.state_dict(),
                "averaged": self.averaged.state_dict(),
                "best": self.best,
                "optimizer": self.optimizer.state_dict(),
                "plain": {
                    "step": self.step, "rate_factor": self.rate_factor, "typical": self.typical,
                    "spread": self.spread, "stale": self.stale,
                    "recent": self.recent, "history": self.history.to_dict(),
                },
            }
        )  # fmt: skip

    def _restore(self, state: dict[str, Any]) -> None:
        state = copy.deepcopy(state)
        self.module.load_state_dict(state["module"])
        self.averaged.load_state_dict(state["averaged"])
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        plain = state["plain"]
        self.step, self.stale, self.recent = plain["step"], plain["stale"], plain["recent"]
        self.rate_factor, self.typical = plain["rate_factor"], plain["typical"]
        self.spread = plain.get("spread", 0.0)
        self.history = History(**plain["history"])

    def _write(self) -> None:
        if self.checkpoint is None or not self.ranks.main:
            return
        state = self.snapshot
        tensors = {f"module/{k}": v for k, v in state["module"].items()}
        tensors |= {f"averaged/{k}": v for k, v in state["averaged"].items()}
        tensors |= {f"best/{k}": v for k, v in (state["best"] or {}).items()}
        tensors |= pack_optimizer(state["optimizer"])
        header = {
            "format": CHECKPOINT_KIND, "format_version": CHECKPOINT_VERSION,
            "config": self.config.model_dump(), "loss": describe(self.loss), "plain": state["plain"],
        }  # fmt: skip
        write_safetensors(
            self.checkpoint, {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, header
        )
        write_log(self.checkpoint.with_suffix(".csv"), self.history)

    def resume(self) -> None:
        """Continue from the checkpoint file, if there is one; all ranks from what rank 0 has.

        Raises:
            IncompatibleFlowError: it was written by a run of other settings or another network.
        """
        self.ranks.first(self._read)
        if self.ranks.size > 1:
            self.snapshot = self.ranks.share(self._state())
            self._restore(self.snapshot)

    def _read(self) -> None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        header, tensors = read_safetensors(self.checkpoint, CHECKPOINT_KIND, CHECKPOINT_VERSION)
        # A setting that an older version did not have stands at its default.
        mine, other = self.config.model_dump(), TrainConfig().model_dump() | header["config"]
        differing = [k for k in mine if k not in ("steps", "seconds") and mine[k] != other.get(k)]
        if differing or mine["steps"] != other.get("steps"):
            names = ", ".join(differing or ["steps"])
            raise IncompatibleFlowError(
                f"{self.checkpoint} was written with other settings ({names}); use those settings or another file"
            )
        mine, other = describe(self.loss), header.get("loss", describe(self.loss))
        differing = sorted(k for k in {*mine, *other} if mine.get(k) != other.get(k))
        if differing:
            raise IncompatibleFlowError(
                f"{self.checkpoint} was written with another loss ({', '.join(differing)}); use that or another file"
            )

        def group(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        state = {
            "module": group("module/"), "averaged": group("averaged/"), "best": group("best/") or None,
            "optimizer": unpack_optimizer(self.optimizer, tensors), "plain": header["plain"],
        }  # fmt: skip
        try:
            self._restore(state)
        except RuntimeError as error:
            raise IncompatibleFlowError(f"{self.checkpoint} belongs to another network: {error}") from error
        self.snapshot = state

    def is_over(self) -> bool:
        """Whether the checkpoint is that of a run which had stopped by itself; more seconds let it go on."""
        if self.history.stopped == "seconds":
            given = self.config.seconds
            if given is None or self.history.seconds < given:
                self.history.stopped = "steps"
        return self.history.stopped != "steps"

    def finish(self) -> None:
        """Leave the averaged weights (the best validated ones) in the module."""
        if self.validation and self.step not in self.history.validation_step:
            stale, stopped = self.stale, self.history.stopped
            self.validate()
            # Patience counts what the schedule validates: a run that gets more seconds goes on as if it had had them.
            self.stale, self.history.stopped = min(stale, self.stale), stopped
        if self.history.stopped != "steps":
            self.snapshot = self._state()
            self._write()
        self.module.load_state_dict(self.best if self.best is not None else self.averaged.state_dict())
        self.module.eval()


def cosine(turn: float, final: float) -> float:
    """From 1 at the start of a run to ``final`` at its end, ``turn`` being the part of it that is over."""
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, turn)))


def adamw(module: nn.Module, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all parameters of a module, each in one pass over memory where torch has a kernel for it."""
    fused = all(p.device.type in ("cpu", "cuda") for p in module.parameters())
    return torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=weight_decay, fused=fused or None)


@torch.no_grad()
def average_into(averaged: nn.Module, module: nn.Module, decay: float) -> None:
    """One step of the exponential moving average of a module's weights, in place."""
    old: list[Tensor] = [*averaged.parameters()]
    torch._foreach_lerp_(old, [p.detach() for p in module.parameters()], 1.0 - decay)


def pack_optimizer(state: dict[str, Any]) -> dict[str, Tensor]:
    """Moments and step counts of an optimiser's state dict as named tensors, for a checkpoint."""
    slots = state["state"].items()
    return {f"optimizer/{index}/{k}": torch.as_tensor(v) for index, slot in slots for k, v in slot.items()}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The state dict that `pack_optimizer` packed, among the tensors of a checkpoint."""
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/")
            slots.setdefault(int(index), {})[name] = value
    return optimizer.state_dict() | {"state": slots}


def write_log(path: str | Path, history: History) -> None:
    """Write a loss curve as CSV: step, loss, samples per second, validation loss (empty where none was made)."""
    validation = dict(zip(history.validation_step, history.validation))
    loss = dict(zip(history.step, history.loss))
    # From the end: a checkpoint of an older version has no speeds in its first part.
    speed = dict(zip(reversed(history.step), (f"{s:.1f}" for s in reversed(history.samples_per_second))))
    with open(path, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["step", "loss", "samples_per_second", "validation"])
        for step in sorted({*loss, *validation}):
            writer.writerow([step, *(column.get(step, "") for column in (loss, speed, validation))])


def write_history(path: str | Path, histories: dict[str, History]) -> None:
    """Write named training histories as JSON."""
    write_json(path, {k: h.to_dict() for k, h in histories.items()})
