"""More frames of the same ensemble: a short Markov chain from every frame of a trajectory.

A few thousand frames know the slow coordinates, the basins and their populations. They do not know the density of a
hundred fast ones, and a flow learns them by heart. A kernel that leaves the ensemble invariant draws the fast
coordinates anew at the price of some tens of energies a frame; the slow ones stay as the trajectory had them.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from openmm_regflow.errors import CorruptFileError
from openmm_regflow.flows import digest, read_safetensors, write_safetensors

#: A Markov kernel that leaves the target invariant: chains `(n, n_atoms, 3)` [nm] -> their next state, and the energies
#: that it took.
Mover = Callable[[Tensor, torch.Generator], tuple[Tensor, int]]
KIND = "openmm_regflow.frames"


class FramesConfig(BaseModel):
    """Settings of `more_frames`; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    copies: int = Field(1, ge=1, description="frames for each one of the trajectory, itself included; 1: none are made")
    moves: int = Field(2, ge=1, description="Monte Carlo trajectories between two copies of a frame")
    seed: int = 0


def more_frames(
    x: Tensor,
    mover: Mover,
    config: FramesConfig,
    path: str | Path | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> tuple[Tensor, int]:
    """The frames, and ``copies - 1`` times as many that Markov chains from them have visited.

    The chains start in the ensemble if the frames are drawn from it, so that no burn-in is needed; copies of one frame
    share its slow coordinates and are no independent samples of them.

    Args:
        x: `(n, n_atoms, 3)` [nm], from the target of ``mover``.
        mover: a Markov kernel of the target.
        config: settings.
        path: file that keeps the result; frames made earlier from the same `x` and settings are read instead.
        progress: called after every copy.

    Returns:
        frames `(copies n, n_atoms, 3)` [nm] in the dtype of `x`, and the energies that they took.

    Raises:
        CorruptFileError: ``path`` holds something else.
    """
    made_of = {"frames": digest({"x": x}), "config": config.model_dump()}
    if path is not None and Path(path).exists():
        header, tensors = read_safetensors(Path(path), KIND, 1)
        if header["made of"] != made_of:
            raise CorruptFileError(f"{path} holds frames of another trajectory or of other settings; remove it")
        return tensors["x"], header["energies"]
    generator = torch.Generator().manual_seed(config.seed)
    now, copies, energies = x, [x], 0
    for k in range(1, config.copies):
        for _ in range(config.moves):
            now, spent = mover(now, generator)
            energies += spent
        copies.append(now)
        if progress:
            progress(k, config.copies - 1, {"energies": energies})
    frames = torch.cat(copies)
    if path is not None:
        header = {"format": KIND, "format_version": 1, "made of": made_of, "energies": energies}
        write_safetensors(Path(path), {"x": frames.cpu().contiguous()}, header)
    return frames, energies
