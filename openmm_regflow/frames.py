"""More frames of the same ensemble: a short Markov chain from every frame of a trajectory.

A few thousand frames know the slow coordinates, the basins and their populations. They do not know the density of a
hundred fast ones, and a flow learns them by heart. A kernel that leaves the ensemble invariant draws the fast
coordinates anew at the price of some tens of energies a frame; the slow ones stay as the trajectory had them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from openmm_regflow import ranks
from openmm_regflow.errors import CorruptFileError, InputError, warn_once
from openmm_regflow.files import digest, read_safetensors, write_safetensors

#: A Markov kernel that leaves the target invariant: chains `(n, n_atoms, 3)` [nm] -> their next state, and the energies
#: that it took.
Mover = Callable[[Tensor, torch.Generator], tuple[Tensor, int]]
#: Indicator function of a set of conformations: positions `(n, n_atoms, 3)` [nm] -> `(n,)`.
Indicator = Callable[[Tensor], Tensor]
KIND = "openmm_regflow.frames"
#: Seconds after which unfinished chains are written: what an interruption loses at most.
KEEP_SECONDS = 10.0
#: What the random numbers are for, in their seed.
COPIES = 1004


class FramesConfig(BaseModel):
    """Settings of `more_frames` and `lifted`; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    copies: int = Field(1, ge=1, description="frames for each one of the trajectory, itself included; 1: none are made")
    moves: int = Field(2, ge=1, description="Monte Carlo trajectories between two copies of a frame")
    rare_share: float = Field(
        0.0, ge=0, lt=1, description="leave out frames until the watched sets hold this share; not in the refinement"
    )
    seed: int = Field(0, ge=0)


def memberships(x: Tensor, sets: Sequence[Indicator]) -> np.ndarray:
    """Whether each conformation `(n, n_atoms, 3)` [nm] is in each of k sets, `(k, n)` bool."""
    found = [indicator(x).cpu().numpy().astype(bool) for indicator in sets]
    return np.stack(found) if found else np.zeros((0, len(x)), dtype=bool)


def rare_frames(x: Tensor, sets: Sequence[Indicator] | None) -> np.ndarray:
    """Whether each frame `(n, n_atoms, 3)` [nm] is in any of the sets that a share is wanted for, `(n,)` bool.

    Raises:
        InputError: there are no sets, or no frame in them.
    """
    if not sets:
        raise InputError("rare_share needs watched sets (of peptides the rare half circle of a phi); set it to 0")
    rare = np.asarray(memberships(x, sets).any(0))
    if not rare.any():
        raise InputError("none of the frames is in a watched set, so nothing says how rare it is; set rare_share to 0")
    return rare


def lifted(x: Tensor, sets: Sequence[Indicator] | None, share: float, seed: int = 0) -> Tensor:
    """The frames without some of those outside of the sets, so that the sets hold ``share``; all, if they hold it.

    A flow that learns from them has more samples where few frames of the ensemble are, and smaller weights there.

    Args:
        x: `(n, n_atoms, 3)` [nm].
        sets: indicator functions.
        share: wanted; 0 leaves everything as it is.
        seed: of the choice among frames outside.

    Raises:
        InputError: a share is wanted, and there are no sets or no frame in them.
    """
    if not share:
        return x
    rare = rare_frames(x, sets)
    if rare.mean() >= share:
        held = f"the watched sets hold {rare.mean():.2f} of these frames"
        warn_once(f"rare_share = {share:g} changes nothing: {held}", f"rare_share = {share:g}")
        return x
    others = np.flatnonzero(~rare)
    n_others = round(rare.sum() * (1 - share) / share)
    kept = np.random.default_rng(seed).choice(others, min(n_others, len(others)), replace=False)
    return x[torch.as_tensor(np.sort(np.concatenate([np.flatnonzero(rare), kept])), device=x.device)]


def more_frames(
    x: Tensor,
    mover: Mover,
    config: FramesConfig,
    path: str | Path | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    target: Mapping[str, Any] | None = None,
) -> tuple[Tensor, int]:
    """The frames, and ``copies - 1`` times as many that Markov chains from them have visited.

    The chains start in the ensemble if the frames are drawn from it, so that no burn-in is needed; copies of one frame
    share its slow coordinates and are no independent samples of them. Under ``torchrun`` each rank moves a part of the
    chains; every rank gets all frames, rank 0 alone reports and writes them.

    Args:
        x: `(n, n_atoms, 3)` [nm], from the target of ``mover``.
        mover: a Markov kernel of the target.
        config: settings.
        path: file that keeps the result; frames made earlier from the same `x`, settings and target are read instead,
            and unfinished chains, kept beside it, go on as they would have.
        progress: called after every copy of a part of the chains, with copies done, copies in total, and energies.
        target: what ``mover`` leaves invariant, as ``FlowMetadata.target`` has it; None if nobody says.

    Returns:
        frames `(copies n, n_atoms, 3)` [nm] in the dtype of `x`, and the energies that they took.

    Raises:
        CorruptFileError: ``path`` holds something else.
    """
    made_of = {"frames": digest({"x": x}), "config": config.model_dump(exclude={"rare_share"})}
    made_of |= {"target": dict(target)} if target else {}
    peers, unfinished = ranks.current(), _Unfinished(path, made_of)
    kept = peers.first(lambda: _kept(path, made_of) if path is not None else None)
    if kept is not None:
        unfinished.forget(len(x))
        return kept
    spent, n_own, total = 0, len(peers.mine(len(x))), config.copies - 1

    def chains(j: int, rows: slice) -> tuple[Tensor, ...]:
        nonlocal spent
        generator = ranks.stream(config.seed, 0, COPIES, j)
        copies, before = unfinished.take_up(j, x[rows], generator)
        for k in range(len(copies), config.copies):
            now = copies[-1]
            for _ in range(config.moves):
                now, energies = mover(now, generator)
                before += energies
            copies.append(now)
            unfinished.keep(j, copies, generator, before, len(copies) == config.copies and len(ranks.parts(len(x))) > 1)
            if progress and peers.main:
                progress((j * total + k) // n_own, total, {"energies": (spent + before) * peers.size})
        spent += before
        return (torch.stack(copies, dim=1),)

    (histories,) = peers.by_parts(len(x), chains)
    frames, energies = histories.transpose(0, 1).flatten(0, 1), sum(peers.gather(spent))
    if path is not None:
        header = {"format": KIND, "format_version": 1, "made of": made_of, "energies": energies}
        # What the others have kept is theirs until this is written.
        peers.first(lambda: write_safetensors(Path(path), {"x": frames.cpu().contiguous()}, header))
    unfinished.forget(len(x))
    return frames, energies


class _Unfinished:
    """Files for the chains of each part, beside that of all frames; nothing is kept where that has no path."""

    def __init__(self, path: str | Path | None, made_of: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.made_of, self.written = made_of, time.monotonic()

    def _of(self, part: int) -> Path:
        assert self.path is not None
        return self.path.with_suffix(f".part-{part:02d}")

    def take_up(self, part: int, x: Tensor, generator: torch.Generator) -> tuple[list[Tensor], int]:
        """Copies so far, from `x` `(n, n_atoms, 3)` on, and their energies; the generator goes on from there."""
        if self.path is None:
            return [x], 0
        try:
            header, tensors = read_safetensors(self._of(part), KIND, 1)
        except (InputError, CorruptFileError):  # none, or a torn one
            return [x], 0
        if header["made of"] != self.made_of:
            return [x], 0
        generator.set_state(tensors["generator"])
        return list(tensors["x"].to(x)), header["energies"]

    def keep(
        self, part: int, copies: list[Tensor], generator: torch.Generator, energies: int, finished: bool
    ) -> None:
        """Write the chains of a part that is finished, or if anything was written some seconds ago."""
        if self.path is None or not (finished or time.monotonic() - self.written >= KEEP_SECONDS):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = {"format": KIND, "format_version": 1, "made of": self.made_of, "energies": energies}
        tensors = {"x": torch.stack(copies).cpu(), "generator": generator.get_state()}
        write_safetensors(self._of(part), tensors, header)
        self.written = time.monotonic()

    def forget(self, n: int) -> None:
        """All frames, of n chains, are written."""
        if self.path is not None:
            for part in range(len(ranks.parts(n))):
                self._of(part).unlink(missing_ok=True)


def frames_of_run(path: str | Path, target: Mapping[str, Any]) -> Tensor:
    """The frames `(n, n_atoms, 3)` [nm] that a training run made and kept (``work/frames.safetensors``).

    Args:
        path: of the file.
        target: what they are wanted for, as ``FlowMetadata.target`` has it.

    Raises:
        InputError: no such file, or frames of another target.
        CorruptFileError: ``path`` holds something else.
    """
    if not Path(path).is_file():
        raise InputError(f"no frames at {path}; check the path")
    header, tensors = read_safetensors(Path(path), KIND, 1)
    if header["made of"].get("target") != dict(target):
        raise InputError(f"{path} holds frames of another System or temperature; give those of this one")
    return tensors["x"]


def _kept(path: str | Path, made_of: Mapping[str, Any]) -> tuple[Tensor, int] | None:
    """Frames that were made earlier, and the energies that they took."""
    if not Path(path).exists():
        return None
    header, tensors = read_safetensors(Path(path), KIND, 1)
    if header["made of"] != made_of:
        raise CorruptFileError(f"{path} holds frames of another trajectory, target or of other settings; remove it")
    return tensors["x"], header["energies"]
