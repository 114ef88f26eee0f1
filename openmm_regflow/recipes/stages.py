"""The stages of a run: more frames, a student, its pairs by whichever way, regression, likelihood, refinement."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from openmm_regflow import flows, priors, ranks
from openmm_regflow.coordinates import CartesianMap, CoordinateMap, identical_atoms
from openmm_regflow.errors import InputError
from openmm_regflow.flows import Flow, FlowMetadata
from openmm_regflow.frames import FramesConfig, Indicator, Mover, more_frames
from openmm_regflow.objectives import FlowMatchingLoss, LikelihoodLoss, RegFlowLoss, SplitLoss
from openmm_regflow.recipes.config import (
    FlowConfig,
    LikelihoodConfig,
    PairsConfig,
    RegressionConfig,
    RunConfig,
    TeacherConfig,
)
from openmm_regflow.recipes.data import data_batches, features, sloped_batches
from openmm_regflow.recipes.workspace import FitResult, Workspace
from openmm_regflow.refinement import RefineConfig, refine
from openmm_regflow.slopes import differentiable
from openmm_regflow.targets import (
    Pairs,
    StreamedPairs,
    aligned_coupling,
    check_pairs,
    hierarchical_transport_pairs,
    load_pairs,
    minibatch_coupling,
    optimal_transport_pairs,
    reflow_pairs,
)
from openmm_regflow.teachers import VectorField
from openmm_regflow.training import Batch, Batches


def copied_frames(x: Tensor, mover: Mover, config: FramesConfig, work: Workspace, result: FitResult) -> Tensor:
    """Training frames and their copies, `(n * copies, n_atoms, 3)` [nm] on the CPU."""
    progress = work.stage("frames", config.copies - 1) if work.stage else None
    path = work.folder / "frames.safetensors" if work.folder else None
    with work.clock("frames", result):
        frames, result.frame_energies = more_frames(x, mover, config, path, progress, result.flow.metadata.target)
    return frames.cpu()


def new_student(coordinates: CoordinateMap, x: Tensor, config: FlowConfig, metadata: FlowMetadata | None) -> Flow:
    """A flow that knows nothing yet, on coordinates that fit the frames `(n, n_atoms, 3)` [nm]."""
    harmonic = config.prior == "harmonic" and isinstance(coordinates, CartesianMap)
    factor = priors.harmonic_factor(coordinates, x) if harmonic else None  # type: ignore[arg-type]
    return flows.build(coordinates, config.architecture(coordinates.circular), metadata, factor)


def source_of_pairs(flow: Flow, config: RunConfig) -> Pairs | VectorField | None:
    """What the regression's pairs come from: they are given, or a teacher that knows nothing yet; None: transport."""
    if config.objective != "regflow" or config.pairs.source not in ("reflow", "stream"):
        return None
    folder = config.pairs.folder
    return _new_teacher(flow, config.teacher) if folder is None else _given_pairs(flow, folder, config.pairs)


def _given_pairs(flow: Flow, folder: str, c: PairsConfig) -> Pairs:
    """The pairs of a folder, if they are of this flow."""
    pairs = load_pairs(folder, c.n)
    if c.log_det != "none" and pairs.log_det is None:
        raise InputError(f'{folder} holds pairs without log-determinants; set pairs.log_det = "none"')
    check_pairs(pairs, flow.prior, flows.origin(flow))
    return pairs


def _new_teacher(flow: Flow, t: TeacherConfig) -> VectorField:
    """A teacher that knows nothing yet."""
    circular = flow.prior.circular.cpu()
    factor = None if flow.prior.factor is None else flow.prior.factor.cpu()
    teacher = VectorField(circular, t.kind, t.hidden, t.depth, t.seed, factor).to(flow.device)
    teacher.origin = flows.origin(flow)
    return teacher


def pair_batches(
    flow: Flow,
    source: Pairs | VectorField | None,
    topology: Any,
    x: Tensor,
    held_out: Tensor,
    config: RunConfig,
    work: Workspace,
    result: FitResult,
) -> tuple[Batches | StreamedPairs, Batch | None]:
    """Where the regression gets its batches, and the pairs that are held out from it.

    They are given, or come from a teacher that is trained here, or (None) from transport.
    """
    c, train_config = config.pairs, config.regression.train
    if isinstance(source, Pairs):
        pairs = source
    elif source is None:
        pairs = _transport_pairs(flow, topology, x, c, result)
    else:
        teacher = _taught(source, flow, x, held_out, config, work, result)
        if c.source == "stream":
            keywords: dict[str, Any] = {"seed": c.seed, "n_steps": c.n_steps, "method": c.method, "log_det": c.log_det}
            return StreamedPairs(teacher, train_config.batch_size, **keywords), None
        pairs = _teacher_pairs(teacher, c, work, result)
    check_pairs(pairs, flow.prior, flows.origin(flow))
    tensors = (pairs.z, pairs.y) if pairs.log_det is None else (pairs.z, pairs.y, pairs.log_det)
    n = len(pairs) - int(config.regression.held_out * len(pairs))
    held = tuple(t[n:].to(flow.device) for t in tensors) if n < len(pairs) else None
    kept = tuple(t[:n] for t in tensors)
    return Batches(kept, train_config.batch_size, train_config.seed, device=flow.device), held


def _transport_pairs(flow: Flow, topology: Any, x: Tensor, c: PairsConfig, result: FitResult) -> Pairs:
    began = time.monotonic()
    generator = torch.Generator().manual_seed(c.seed)
    y = features(flow.coordinates, x, generator).cpu()
    y = y[torch.randperm(len(y), generator=generator)[: c.n]]
    circular = flow.prior.circular.cpu()
    z = flow.prior.sample(len(y), generator).cpu()
    peers, pairs = ranks.current(), None
    if peers.main and c.source == "hierarchical":
        pairs = hierarchical_transport_pairs(z, y, circular, seed=c.seed)
    elif peers.main:
        pairs = optimal_transport_pairs(z, y, circular, groups=identical_atoms(topology) if c.align else None)
    pairs = peers.share(pairs)
    result.seconds["pairs"] = time.monotonic() - began
    return pairs


def _taught(
    teacher: VectorField, flow: Flow, x: Tensor, held_out: Tensor, config: RunConfig, work: Workspace,
    result: FitResult,
) -> VectorField:  # fmt: skip
    """The teacher after its training by flow matching."""
    t = config.teacher
    couple = aligned_coupling if t.align else minibatch_coupling(flow.prior.circular) if t.couple else None
    loss = FlowMatchingLoss(flow.prior, couple)
    # A teacher that learns its frames by heart has a rugged map, which no student can follow.
    y = features(flow.coordinates, held_out, torch.Generator().manual_seed(t.seed))
    judge = _judgement(loss, y, t.seed, t.train.batch_size)
    work.run("teacher", teacher, loss, data_batches(flow.coordinates, x, t.train), t.train, result, judge)
    result.field = teacher
    return teacher


def _teacher_pairs(teacher: VectorField, c: PairsConfig, work: Workspace, result: FitResult) -> Pairs:
    progress = work.stage("pairs", c.n) if work.stage else None
    with work.clock("pairs", result):
        pairs = reflow_pairs(
            teacher,
            c.n,
            seed=c.seed,
            n_steps=c.n_steps,
            method=c.method,
            log_det=c.log_det,
            folder=work.folder / "pairs" if work.folder else None,
            progress=(lambda done, total: progress(done, total, {})) if progress else None,
        )
    return pairs


def _judgement(loss: Any, y: Tensor, seed: int, batch_size: int, n: int = 10_000) -> Callable[[nn.Module], float]:
    """A loss on held-out features `(m, dim)`, over about ``n`` draws of noise that stay the same, in training batches:
    a coupling of a batch depends on its size.
    """

    def judge(module: nn.Module) -> float:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(y), (max(1, n // batch_size), batch_size), generator=generator).to(y.device)
        return float(sum(loss(module, (y[some],), generator)[0] for some in rows)) / len(rows)

    return judge


def _held_out_loss(loss: SplitLoss, module: nn.Module, held: Batch, size: int = 2048) -> float:
    """A loss on everything held out, nothing drawn: the mean over parts, whose intermediate results fit into memory."""
    parts = zip(*(t.split(size) for t in held))
    return sum(len(part[0]) * float(loss.of(module, part)[0]) for part in parts) / len(held[0])


def regress(
    flow: Flow, batches: Any, held: Batch | None, config: RegressionConfig, work: Workspace, result: FitResult
) -> None:
    """Regression on pairs, judged by those held out without noise on their targets."""
    loss = RegFlowLoss(flow.prior.circular, **config.model_dump(exclude={"train", "held_out"}))
    clean = dataclasses.replace(loss, target_noise=0.0)

    validate = partial(_held_out_loss, clean, held=held) if held else None
    work.run("regression", flow.bijection, loss, batches, config.train, result, validate)
    result.note_phase("regression")


def maximise_likelihood(
    flow: Flow,
    x: Tensor,
    held_out: Tensor,
    config: LikelihoodConfig,
    work: Workspace,
    result: FitResult,
    reduced_potential: Callable[[Tensor], Tensor] | None,
) -> None:
    """Likelihood of the frames, stopped and undone by that of the held-out ones."""
    y = features(flow.coordinates, held_out, torch.Generator().manual_seed(config.train.seed))
    validate = partial(_held_out_loss, LikelihoodLoss(flow.prior), held=(y,))
    loss = LikelihoodLoss(flow.prior, config.noise, config.path)
    if config.path and reduced_potential is not None:
        batches = sloped_batches(flow.coordinates, x, config.train, differentiable(reduced_potential))
        result.frame_energies += len(x)
    else:
        batches = data_batches(flow.coordinates, x, config.train)
    work.run("likelihood", flow.bijection, loss, batches, config.train, result, validate)
    result.note_phase("likelihood")


def refine_student(
    flow: Flow,
    x: Tensor,
    config: RefineConfig,
    reduced_potential: Callable[[Tensor], Tensor],
    mover: Mover | None,
    watch: list[Indicator] | None,
    work: Workspace,
    result: FitResult,
) -> None:
    """Refinement by energies; the frames `(n, n_atoms, 3)` [nm] are its anchors."""
    progress = work.stage("refinement", config.rounds) if work.stage else None
    checkpoint = work.folder / "refinement-checkpoint.safetensors" if work.folder else None
    keywords: dict[str, Any] = {"data": x.to(flow.device), "mover": mover, "watch": watch}
    keywords |= {"checkpoint": checkpoint, "progress": progress}
    with work.clock("refinement", result):
        result.rounds = refine(flow, reduced_potential, config, **keywords)
    result.note_phase("refinement")
