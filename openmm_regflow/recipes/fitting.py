"""From positions to a trained flow in one call."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmm_regflow import flows
from openmm_regflow.coordinates import CoordinateMap
from openmm_regflow.errors import InputError, warn_once
from openmm_regflow.files import digest
from openmm_regflow.flows import FlowMetadata
from openmm_regflow.frames import Indicator, Mover, lifted
from openmm_regflow.recipes import stages
from openmm_regflow.recipes.config import RunConfig, check_config, needs_energies, needs_mover
from openmm_regflow.recipes.data import check_data, features
from openmm_regflow.recipes.workspace import FitResult, Workspace
from openmm_regflow.slopes import differentiable
from openmm_regflow.targets import Pairs
from openmm_regflow.training import Stage


def fit(
    topology: Any,
    x_train: Tensor,
    x_validation: Tensor,
    config: RunConfig,
    *,
    metadata: FlowMetadata | None = None,
    folder: str | Path | None = None,
    stage: Stage | None = None,
    device: torch.device | str = "cpu",
    reduced_potential: Callable[[Tensor], Tensor] | None = None,
    mover: Mover | None = None,
    watch: list[Indicator] | None = None,
    fixed: Sequence[tuple[int, int, float]] = (),
    held: bool = False,
) -> FitResult:
    """Train a flow on positions.

    Under ``torchrun`` all ranks call it alike: they share the batches of every phase, the pairs of the teacher, the
    frames and pools; exact transport and validation run on rank 0. Every rank gets the result; rank 0 alone writes.

    Args:
        topology: with atoms() and bonds(), e.g. ``openmm.app.Topology``.
        x_train: `(n, n_atoms, 3)` [nm], tensor or array.
        x_validation: `(m, n_atoms, 3)` [nm], from independent runs; picks the teacher's best weights and stops the
            likelihood phase.
        config: all settings.
        metadata: goes into the flow.
        folder: checkpoints and pairs; a second call with the same folder, configuration, frames and target continues.
        stage: makes the progress callback of each stage.
        device: where the networks train; the result stays there.
        reduced_potential: positions `(n, n_atoms, 3)` [nm] -> `(n,)` [kT]; needed if refinement is enabled.
        mover: Markov kernel of the target, needed if ``frames.copies`` is above one (`more_frames`) or
            ``refinement.anchor_moves`` is not zero (`refine`).
        watch: indicator functions whose weighted populations the refinement reports, so that a lost mode is seen, and
            of which ``rare_share`` speaks.
        fixed: ``(i, j, length [nm])`` of bonds of constrained length, see ``constraints.fixed_bonds``.
        held: forces hold the molecule in its place, so that its frames are not turned (``ensemble.is_held``).

    Raises:
        InputError: bad data, or a refinement without a potential.
        IncompatibleFlowError: `folder` holds a run of another configuration, on other frames, or for another target.
        CorruptFileError: a file in `folder` is damaged.
    """
    x_train, x_validation = torch.as_tensor(x_train), torch.as_tensor(x_validation)
    check_config(config, held)
    _check_physics(config, reduced_potential, mover)
    check_data(x_train, x_validation, config, watch)
    coordinates = flows.coordinates_for(topology, x_train, config.coordinates, fixed, held)
    covered = _covered(coordinates, x_train, "training")
    if len(covered) < len(x_train):
        x_train = covered
        coordinates = flows.coordinates_for(topology, x_train, config.coordinates, fixed, held)
    x_validation = _covered(coordinates, x_validation, "validation")
    flow = stages.new_student(coordinates, x_train, config.flow, metadata).to(device).fuse(config.compile)
    result = FitResult(flow, None)
    # Before frames are made, which takes energies: what others made may not fit, and settings of a network neither.
    source = stages.source_of_pairs(flow, config)
    made_of = {"frames": digest({"train": x_train, "validation": x_validation}), **flow.metadata.target}
    if isinstance(source, Pairs):
        made_of["pairs"] = source.digest()
    work = Workspace(Path(folder) if folder else None, config, stage, made_of)
    if mover is not None and config.frames.copies > 1:
        x_train = stages.copied_frames(x_train.to(device), mover, config.frames, work, result)
    share, seed = config.frames.rare_share, config.frames.seed
    x, held_out = lifted(x_train, watch, share, seed), lifted(x_validation, watch, share, seed)
    if config.objective == "regflow":
        batches, judging = stages.pair_batches(flow, source, topology, x, held_out, config, work, result)
        stages.regress(flow, batches, judging, config.regression, work, result)
    if config.likelihood.enabled or config.objective == "mle":
        stages.maximise_likelihood(flow, x, held_out, config.likelihood, work, result, reduced_potential)
    if config.refinement.enabled and reduced_potential is not None:
        stages.refine_student(flow, x_train, config.refinement, reduced_potential, mover, watch, work, result)
    y = features(flow.coordinates, x_validation[:1000], torch.Generator().manual_seed(config.flow.seed))
    result.inverse_error = flow.secure(y, config.flow.seed)
    flow.metadata = dataclasses.replace(flow.metadata, training=flow.metadata.training | result.costs())
    flow.eval()
    return result


def _covered(coordinates: CoordinateMap, x: Tensor, what: str) -> Tensor:
    """The frames that have a place in the coordinates; a few without one would outweigh all others.

    Raises:
        InputError: they are half of the frames and more, so that it is the labels and not the frames that differ.
    """
    covers = coordinates.covers(x)
    n_outside = int((~covers).sum())
    if 2 * n_outside >= len(x):
        raise InputError(
            f"the {what} frames have hydrogens of a methyl numbered the other way round than the training frames; "
            "exchange two labels in one of them"
        )
    if n_outside:
        warn_once(
            f"{n_outside} of {len(x)} {what} frames have hydrogens of a methyl numbered the other way round than the "
            "others; they are left out"
        )
    return x[covers]


def _check_physics(
    config: RunConfig, reduced_potential: Callable[[Tensor], Tensor] | None, mover: Mover | None
) -> None:
    """Refuse a configuration that asks for energies, slopes or moves which were not given."""
    if needs_energies(config):
        if reduced_potential is None:
            raise InputError(
                "refinement is enabled, or likelihood.path above 0, but no potential was given; pass reduced_potential"
            )
        if max(config.refinement.path, config.likelihood.path):
            differentiable(reduced_potential)
    if needs_mover(config) and mover is None:
        raise InputError(
            "frames.copies is above 1 or refinement.anchor_moves above 0, but no kernel was given; pass mover"
        )
