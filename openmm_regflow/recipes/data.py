"""What stages learn from: frames that are fit for them, as batches of features."""

from collections.abc import Sequence

import torch
from torch import Tensor

from openmm_regflow import ranks
from openmm_regflow.coordinates import CoordinateMap
from openmm_regflow.errors import InputError
from openmm_regflow.frames import Indicator, lifted, rare_frames
from openmm_regflow.recipes.config import RunConfig
from openmm_regflow.slopes import Differentiable, slopes
from openmm_regflow.targets import MAX_EXACT
from openmm_regflow.training import Batch, Batches, TrainConfig

#: What random numbers are for, after a seed; `pools` and `frames` have the purposes before.
ORIENTATIONS = 1005
#: Validation frames below which nothing can be told; fewer are taken where the user has no more.
LEAST_VALIDATION = 50


def check_data(
    x_train: Tensor, x_validation: Tensor, config: RunConfig, watch: Sequence[Indicator] | None = None
) -> None:
    """Refuse data that would stop a later stage, before the first one begins.

    Args:
        x_train: `(n, n_atoms, 3)` [nm].
        x_validation: `(m, n_atoms, 3)` [nm].
        config: all settings.
        watch: indicator functions of the sets that ``rare_share`` speaks of.

    Raises:
        InputError: shapes, NaN, nothing to say how rare the watched sets are, fewer samples than a batch of one of the
            stages, or more frames than exact transport takes.
    """
    for name, x in (("training", x_train), ("validation", x_validation)):
        n_atoms = x_train.shape[1] if x_train.ndim > 1 else "n_atoms"
        if x.ndim != 3 or x.shape[1:] != (n_atoms, 3) or not len(x):
            raise InputError(f"{name} frames have shape {tuple(x.shape)}; (n, {n_atoms}, 3) in nm is needed")
        if not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x).flatten(1).all(1)).nonzero()[0])
            raise InputError(f"{name} frame {bad} holds a NaN or infinite position; remove it before training")
    source, regression = config.pairs.source, config.objective == "regflow"
    share, seed = config.frames.rare_share, config.frames.seed
    left = len(lifted(x_train, watch, share, seed))
    few = len(lifted(x_validation, watch, share, seed))
    if few < LEAST_VALIDATION <= len(x_validation):
        raise InputError(
            f"frames.rare_share = {share} leaves {few} of {len(x_validation)} validation frames, too few to judge by; "
            "lower it"
        )
    if config.refinement.enabled and config.refinement.rare_share:
        rare_frames(x_train, watch)
    n_frames = left * config.frames.copies
    if regression and source == "ot" and min(config.pairs.n, n_frames) > MAX_EXACT:
        raise InputError(
            f"exact transport of {min(config.pairs.n, n_frames):,} frames holds a matrix of that many squared; set "
            f'pairs.n to {MAX_EXACT:,} or fewer, or pairs.source = "hierarchical"'
        )
    pairs = config.pairs.n if source == "reflow" else min(config.pairs.n, n_frames)
    pairs -= int(config.regression.held_out * pairs)
    stages = {
        "teacher": (regression and source in ("reflow", "stream") and not config.pairs.folder, n_frames),
        "regression": (regression and source != "stream", pairs),
        "likelihood": (config.likelihood.enabled or not regression, n_frames),
    }
    for name, (needed, n) in stages.items():
        size = getattr(config, name).train.batch_size
        if needed and n < size:
            raise InputError(
                f"{n} samples are fewer than one batch of {name} ({size}); give more or a smaller batch_size"
            )


def features(coordinates: CoordinateMap, x: Tensor, generator: torch.Generator) -> Tensor:
    """Features `(n, dim)` in float32, on the map's device, of positions in a fresh frame."""
    x = x.to(coordinates.circular.device, torch.float64)
    return coordinates.features_of(coordinates.augment(x, generator))[0].float()


def data_batches(coordinates: CoordinateMap, x: Tensor, config: TrainConfig) -> Batches:
    """Batches of features; where the frame matters, it is drawn anew for every batch."""
    if coordinates.rotation_invariant:
        return Batches((features(coordinates, x, torch.Generator()),), config.batch_size, config.seed)

    def augment(batch: Batch, generator: torch.Generator) -> Batch:
        return (features(coordinates, batch[0], generator),)

    return Batches((x,), config.batch_size, config.seed, augment)


def sloped_batches(coordinates: CoordinateMap, x: Tensor, config: TrainConfig, potential: Differentiable) -> Batches:
    """Batches of features and of the slopes of log p, in float32; in one frame, where that matters."""
    x = coordinates.augment(x.to(coordinates.circular.device, torch.float64), ranks.stream(config.seed, ORIENTATIONS))
    y, _, _, slope = ranks.current().by_parts(len(x), lambda j, rows: slopes(coordinates, x[rows], potential))
    return Batches((y.float(), slope.float()), config.batch_size, config.seed)
