"""From positions to a trained flow in one call: teacher, pairs, regression, likelihood phase, refinement.

The configuration is one TOML file; unknown keys are refused and every default can be printed.
"""

import dataclasses
import json
import math
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from openmm_regflow import flows, ranks
from openmm_regflow.coordinates import CartesianMap, CoordinateMap, identical_atoms
from openmm_regflow.errors import IncompatibleFlowError, InputError
from openmm_regflow.files import digest, read_json, read_safetensors, write_json, write_safetensors
from openmm_regflow.flows import Flow, FlowMetadata
from openmm_regflow.frames import FramesConfig, Indicator, Mover, lifted, more_frames, rare_frames
from openmm_regflow.objectives import (
    QUARTER,
    FlowMatchingLoss,
    LikelihoodLoss,
    RegFlowLoss,
    SplitLoss,
    rows_of_path,
)
from openmm_regflow.refinement import RefineConfig, Round, refine
from openmm_regflow.slopes import Differentiable, differentiable, slopes
from openmm_regflow.targets import (
    MAX_EXACT,
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
from openmm_regflow.teachers import LogDet, Method, VectorField, field_from_architecture
from openmm_regflow.training import Batch, Batches, History, Progress, TrainConfig, train

#: (name of the stage, steps in total) -> progress callback of that stage
Stage = Callable[[str, int], Progress]
#: What random numbers are for, after a seed; `pools` and `frames` have the purposes before.
ORIENTATIONS = 1005
#: Validation frames below which nothing can be told; fewer are taken where the user has no more.
LEAST_VALIDATION = 50
#: In TOML, which has no null: a setting without a value.
UNSET = "none"
TEACHER_KIND = "openmm_regflow.teacher"
TORSION_KEYS = ("torsion_layers", "torsion_hidden", "torsion_depth", "torsions_alone")
SPLINE_KEYS = ("n_bins", "line_bins", "bound", "harmonics", *TORSION_KEYS)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults(cls, given: Any) -> Any:
        """A table that sets one key of a section leaves the others at that section's own defaults."""
        if not isinstance(given, dict):
            return given
        merged = dict(given)
        for name, info in cls.model_fields.items():
            if isinstance(info.default, BaseModel) and isinstance(merged.get(name), dict):
                merged[name] = info.default.model_dump(exclude_unset=True) | merged[name]
        return merged


class FlowConfig(_Section):
    """The student's architecture."""

    name: Literal["real_nvp", "res_nvp", "spline", "jet"] = "spline"
    n_layers: int = Field(8, ge=1)
    hidden: int = Field(128, ge=1)
    depth: int = Field(1, ge=1)
    n_bins: int = Field(8, ge=2, description="spline only")
    line_bins: int | None = Field(
        None, ge=0, description='spline only: bins of linear features, 0: shift and scale; "none": see torsion_layers'
    )
    bound: float = Field(5.0, gt=0, description="spline only")
    torsion_layers: int | None = Field(
        None,
        ge=0,
        description='spline, internal only: couplings of torsions alone; the n_layers then move the rest; "none": as '
        "many, and no bins for lines, where there are two torsions and two lines, else 0, and n_bins for lines",
    )
    torsion_hidden: int | None = Field(None, ge=1, description='width of their conditioners; "none": hidden')
    torsion_depth: int | None = Field(None, ge=1, description='residual blocks of their conditioners; "none": depth')
    torsions_alone: bool = Field(True, description="couplings of torsions see no latents of lines")
    harmonics: int = Field(3, ge=1, description="spline only: multiples of a torsion that conditioners see")
    prior: Literal["normal", "harmonic"] = Field(
        "normal", description="harmonic: covariance of the data; cartesian only"
    )
    seed: int = Field(0, ge=0)

    def architecture(self, circular: Tensor) -> dict[str, Any]:
        """As ``flows.build`` takes it, for features `(dim,)` of which these are circles."""
        keys = self.model_dump(exclude={"prior"})
        if self.name != "spline":
            return {k: v for k, v in keys.items() if k not in SPLINE_KEYS}
        if self.torsion_layers is None:
            keys["torsion_layers"] = self.n_layers if min(circular.sum(), (~circular).sum()) >= 2 else 0
            if keys["torsion_layers"] and self.line_bins is None:
                keys["line_bins"] = 0
        return keys


class TeacherConfig(_Section):
    """The CNF teacher and its flow matching; its best weights on held-out data are kept."""

    kind: Literal["mlp", "transformer", "equivariant"] = Field("mlp", description="equivariant: cartesian only")
    hidden: int = Field(256, ge=1)
    depth: int = Field(3, ge=1)
    seed: int = Field(0, ge=0)
    couple: bool = Field(False, description="minibatch optimal-transport coupling")
    align: bool = Field(False, description="cartesian only: turn each latent towards its frame; shorter paths")
    train: TrainConfig = TrainConfig(steps=5000, learning_rate=1e-3)


class PairsConfig(_Section):
    """Where the regression targets come from."""

    source: Literal["reflow", "stream", "ot", "hierarchical"] = Field(
        "reflow", description="stream: fresh reflow pairs in every step; hierarchical: transport beyond 20,000 frames"
    )
    n: int = Field(50_000, ge=1, description="pairs; for ot at most the number of training frames; unused by stream")
    align: bool = Field(False, description="ot only, cartesian only: turn and relabel each frame towards its latent")
    n_steps: int = Field(10, ge=1, description="ODE steps")
    method: Method = Field("midpoint", description="euler, midpoint, rk4: n_steps of one length; others: adaptive")
    log_det: LogDet = "none"
    folder: str | None = Field(None, description="reflow only: pairs that `openmm-regflow pairs` has made, no teacher")
    seed: int = Field(1, ge=0)


class RegressionConfig(_Section):
    """RegFlow and its regularisers."""

    log_det: float = Field(0.0, ge=0)
    forward_backward: float = Field(1e-6, ge=0)
    target_noise: float = Field(0.0, ge=0)
    held_out: float = Field(0.0, ge=0, le=0.5, description="part of the pairs for validation and train.patience")
    train: TrainConfig = TrainConfig(steps=2000, learning_rate=1e-3)


class LikelihoodConfig(_Section):
    """The short likelihood phase; steps after the best validation are undone."""

    enabled: bool = True
    noise: float = Field(0.0, ge=0, description="noise on the features, in their standard deviations")
    path: float = Field(0.0, ge=0, le=1, description="share of the path gradient; needs an energy with forces a frame")
    train: TrainConfig = TrainConfig(steps=500, learning_rate=2e-4, ema=0.99, validate_every=25, patience=6, warmup=20)


class RunConfig(_Section):
    """All settings of one training run."""

    coordinates: Literal["internal", "cartesian"] = "internal"
    objective: Literal["regflow", "mle"] = Field("regflow", description="mle skips teacher, pairs and regression")
    compile: bool = Field(False, description="fused spline kernels: a minute to compile, then faster steps")
    frames: FramesConfig = FramesConfig()
    flow: FlowConfig = FlowConfig()
    teacher: TeacherConfig = TeacherConfig()
    pairs: PairsConfig = PairsConfig()
    regression: RegressionConfig = RegressionConfig()
    likelihood: LikelihoodConfig = LikelihoodConfig()
    refinement: RefineConfig = RefineConfig()


def load_config(path: str | Path) -> RunConfig:
    """Read a TOML run configuration.

    Raises:
        InputError: missing file, bad TOML, unknown key or value out of range, each named.
    """
    try:
        with open(path, "rb") as handle:
            return RunConfig.model_validate(_without_words(RunConfig, tomllib.load(handle)))
    except FileNotFoundError as error:
        raise InputError(
            f"no configuration file {path}; `openmm-regflow train --print-config` shows a complete one"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise InputError(
            f"{path}: {place}: {first['msg']}; `openmm-regflow train --print-config` shows all keys"
        ) from error


def _without_words(model: type[BaseModel], table: dict[str, Any]) -> dict[str, Any]:
    """A table whose settings without a value, "none" in TOML, are None."""

    def value(key: str, given: Any) -> Any:
        info = model.model_fields.get(key)
        if info is None:
            return given
        if isinstance(given, dict) and isinstance(info.default, BaseModel):
            return _without_words(type(info.default), given)
        return None if given == UNSET and type(None) in get_args(info.annotation) else given

    return {key: value(key, given) for key, given in table.items()}


def print_config(config: RunConfig) -> str:
    """The configuration as TOML that `load_config` reads back; a setting without a value is "none"."""

    def toml(value: Any) -> str:
        if value in (math.inf, -math.inf):
            return str(value)
        return json.dumps(UNSET if value is None else value, ensure_ascii=False).replace("\x7f", "\\u007f")

    def lines(table: dict[str, Any], prefix: str) -> list[str]:
        plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
        out = [f"{k} = {toml(v)}" for k, v in plain.items()]
        for key, value in table.items():
            if isinstance(value, dict):
                name = f"{prefix}{key}"
                out += ["", f"[{name}]", *lines(value, f"{name}.")]
        return out

    return "\n".join(lines(config.model_dump(), "")) + "\n"


@dataclass
class FitResult:
    """What `fit` returns.

    Attributes:
        flow: the trained student.
        field: the teacher, None without one.
        histories: loss curves by stage.
        seconds: wall-clock by stage [s].
        phases: student's bijection (state dict) at the end of each phase.
        rounds: pools of the refinement.
        frame_energies: energies that frames took: more of them, and their forces for the likelihood phase.
        inverse_error: largest error of going there and back, see ``Flow.secure``.
    """

    flow: Flow
    field: VectorField | None
    histories: dict[str, History] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    phases: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    rounds: list[Round] = dataclasses.field(default_factory=list)
    frame_energies: int = 0
    inverse_error: float = float("nan")

    def costs(self) -> dict[str, Any]:
        """Wall-clock by stage [s], energies in all and those that made frames, and how exact the inverse came out."""
        energies = self.frame_energies + (self.rounds[-1].energies if self.rounds else 0)
        counted = {"energies": energies, "frame energies": self.frame_energies}
        return {"seconds": self.seconds, **counted, "inverse_error": self.inverse_error}

    def save_phases(self, folder: Path) -> None:
        """Write the student as it was after each phase to ``folder/<phase>.safetensors``."""
        final = {k: v.clone() for k, v in self.flow.bijection.state_dict().items()}
        for name, state in self.phases.items():
            self.flow.bijection.load_state_dict(state)
            self.flow.save(folder / f"{name}.safetensors")
        self.flow.bijection.load_state_dict(final)

    def note_phase(self, name: str) -> None:
        """Keep a copy of the student as it is now."""
        self.phases[name] = {k: v.detach().clone() for k, v in self.flow.bijection.state_dict().items()}


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
    if needs_energies(config) and reduced_potential is None:
        raise InputError(
            "refinement is enabled, or likelihood.path above 0, but no potential was given; pass reduced_potential"
        )
    if needs_energies(config) and max(config.refinement.path, config.likelihood.path):
        differentiable(reduced_potential)  # type: ignore[arg-type]
    if needs_mover(config) and mover is None:
        raise InputError(
            "frames.copies is above 1 or refinement.anchor_moves above 0, but no kernel was given; pass mover"
        )
    x_train, x_validation = torch.as_tensor(x_train), torch.as_tensor(x_validation)
    check_config(config, held)
    check_data(x_train, x_validation, config, watch)
    coordinates = flows.coordinates_for(topology, x_train, config.coordinates, fixed, held)
    if not bool(coordinates.covers(x_validation).double().mean() > 0.5):
        raise InputError(
            "the validation frames have hydrogens of a methyl numbered the other way round than the training frames; "
            "exchange two labels in one of them"
        )
    flow = _student(coordinates, x_train, config.flow, metadata).to(device).fuse(config.compile)
    result = FitResult(flow, None)
    made_of = {"frames": digest({"train": x_train, "validation": x_validation}), **flow.metadata.target}
    # Before frames are made, which takes energies: what others made may not fit, and settings of a network neither.
    source: Pairs | VectorField | None = None
    if config.objective == "regflow" and config.pairs.folder is not None:
        source = _given_pairs(flow, config.pairs)
        log_det = {} if source.log_det is None else {"log_det": source.log_det}
        made_of["pairs"] = digest({"z": source.z, "y": source.y} | log_det)
    elif config.objective == "regflow" and config.pairs.source in ("reflow", "stream"):
        source = _new_teacher(flow, config.teacher)
    work = _Workspace(Path(folder) if folder else None, config, stage, made_of)
    if mover is not None and config.frames.copies > 1:
        x_train = _more_frames(x_train.to(device), mover, config.frames, work, result)
    share, seed = config.frames.rare_share, config.frames.seed
    x, held_out = lifted(x_train, watch, share, seed), lifted(x_validation, watch, share, seed)
    if config.objective == "regflow":
        batches, judging = _pair_batches(flow, source, topology, x, held_out, config, work, result)
        _regression(flow, batches, judging, config.regression, work, result)
    if config.likelihood.enabled or config.objective == "mle":
        _likelihood(flow, x, held_out, config.likelihood, work, result, reduced_potential)
    if config.refinement.enabled and reduced_potential is not None:
        progress = work.stage("refinement", config.refinement.rounds) if work.stage else None
        checkpoint = work.folder / "refinement-checkpoint.safetensors" if work.folder else None
        keywords: dict[str, Any] = {"data": x_train.to(device), "mover": mover, "watch": watch}
        keywords |= {"checkpoint": checkpoint, "progress": progress}
        with work.clock("refinement", result):
            result.rounds = refine(flow, reduced_potential, config.refinement, **keywords)
        result.note_phase("refinement")
    y = features(flow.coordinates, x_validation[:1000], torch.Generator().manual_seed(config.flow.seed))
    result.inverse_error = flow.secure(y, config.flow.seed)
    flow.metadata = dataclasses.replace(flow.metadata, training=flow.metadata.training | result.costs())
    flow.eval()
    return result


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


class _Workspace:
    """Checkpoint paths and progress of one `fit`; ``made_of`` says what beside the configuration it is a fit of."""

    def __init__(self, folder: Path | None, config: RunConfig, stage: Stage | None, made_of: dict[str, Any]) -> None:
        self.main = ranks.current().main
        self.folder, self.stage = folder, stage if self.main else None
        if folder is not None:
            ranks.current().first(lambda: self._claim(folder, config, made_of))

    @staticmethod
    def _claim(folder: Path, config: RunConfig, made_of: dict[str, Any]) -> None:
        """Begin a run in its folder, or make sure that the folder's own is this one."""
        path = folder / "config.json"
        if not path.exists():
            write_json(path, {"config": config.model_dump(mode="json")} | made_of)
        found = read_json(path, "choose another folder")
        try:
            same = RunConfig.model_validate(found.get("config")) == config
        except ValidationError as error:
            raise IncompatibleFlowError(
                f"{folder} holds a run of another version of this package; choose another folder"
            ) from error
        if not same:
            raise IncompatibleFlowError(f"{folder} holds a run of another configuration; choose another folder")
        differing = " and ".join(name for name, value in made_of.items() if found.get(name, value) != value)
        if differing:
            raise IncompatibleFlowError(f"{folder} holds a run that differs in its {differing}; choose another folder")

    @contextmanager
    def clock(self, name: str, result: FitResult) -> Iterator[None]:
        """Add the time of a block, and that of its earlier, interrupted runs in this folder, to the result."""
        path = self.folder / "seconds.json" if self.folder else None
        remedy = "remove it; the run then counts its seconds from now on"
        known = read_json(path, remedy) if path and self.main and path.exists() else {}
        began = time.monotonic()
        try:
            yield
        finally:
            result.seconds[name] = known.get(name, 0.0) + time.monotonic() - began
            if path and self.main:
                write_json(path, known | {name: result.seconds[name]})

    def run(
        self,
        name: str,
        module: nn.Module,
        loss: Any,
        batches: Any,
        config: TrainConfig,
        result: FitResult,
        validation: Callable[[nn.Module], float] | None = None,
    ) -> None:
        """Train one stage and note its history."""
        progress = self.stage(name, config.steps) if self.stage else None
        path = self.folder / f"{name}-checkpoint.safetensors" if self.folder else None
        history = train(module, loss, batches, config, validation=validation, checkpoint=path, progress=progress)
        result.histories[name] = history
        result.seconds[name] = history.seconds


def needs_energies(config: RunConfig) -> bool:
    """Whether a run asks for energies of its own, beside those that move frames."""
    judged = config.likelihood.enabled or config.objective == "mle"
    return config.refinement.enabled or bool(judged and config.likelihood.path)


def needs_mover(config: RunConfig) -> bool:
    """Whether a run moves frames within the target, which takes energies with forces."""
    return config.frames.copies > 1 or bool(config.refinement.enabled and config.refinement.anchor_moves)


def check_config(config: RunConfig, held: bool = False) -> None:
    """Refuse settings that contradict each other, before anything is computed.

    Args:
        config: all settings.
        held: forces hold the molecule in its place.

    Raises:
        InputError: a choice for free molecules where forces hold it, or for Cartesian coordinates in internal ones,
            alignment without exact transport, or another setting that the source of the pairs would leave without
            effect.
    """
    wants = {
        'flow.prior = "harmonic"': config.flow.prior == "harmonic",
        'teacher.kind = "equivariant"': config.teacher.kind == "equivariant",
        "teacher.align = true": config.teacher.align,
        "pairs.align = true": config.pairs.align,
    }
    for name, wanted in wants.items():
        if wanted and config.coordinates != "cartesian":
            raise InputError(f'{name} needs coordinates = "cartesian"; internal coordinates have no orientation')
        if wanted and held:
            raise InputError(f"{name} is for free molecules, and forces hold this one in its place; leave it out")
    if config.pairs.align and config.pairs.source != "ot":
        raise InputError(f'pairs.align = true needs pairs.source = "ot", not "{config.pairs.source}"')
    if config.teacher.align and config.teacher.couple:
        raise InputError("teacher.align and teacher.couple are two ways of coupling a batch; choose one")
    if config.pairs.folder is not None and config.pairs.source != "reflow":
        raise InputError(f'pairs.folder needs pairs.source = "reflow", not "{config.pairs.source}"')
    if config.pairs.log_det != "none" and config.pairs.source in ("ot", "hierarchical"):
        raise InputError(
            f'pairs.log_det = "{config.pairs.log_det}" is of a teacher, and pairs.source = "{config.pairs.source}" has '
            "none; leave it out (regression.log_det then draws the log-determinants towards zero)"
        )
    if config.regression.held_out and config.pairs.source == "stream":
        raise InputError('regression.held_out needs pairs that are kept; leave it out with pairs.source = "stream"')
    if config.regression.train.patience is not None and not config.regression.held_out:
        raise InputError("regression.train.patience needs pairs to judge by; set regression.held_out, without a stream")
    if config.likelihood.path and config.likelihood.noise:
        raise InputError("likelihood.noise moves frames from where their forces are; leave it out with likelihood.path")
    peers, r = ranks.current(), config.refinement
    if r.enabled:
        peers.check_batch(r.batch_size, rows_of_path(r.path), "refinement.batch_size")
    every = {"regression": QUARTER if config.regression.forward_backward else 1}
    every["likelihood"] = rows_of_path(config.likelihood.path)
    for name in ("teacher", "regression", "likelihood"):
        section = getattr(config, name).train
        peers.check_batch(section.batch_size, every.get(name, 1), f"{name}.train.batch_size")
        if section.precision == "bfloat16" and name != "teacher":
            raise InputError(
                f'{name}.train.precision = "bfloat16" would break the inverse of the flow; only the '
                'teacher can have it, take "mixed"'
            )


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


def _more_frames(x: Tensor, mover: Mover, config: FramesConfig, work: _Workspace, result: FitResult) -> Tensor:
    progress = work.stage("frames", config.copies - 1) if work.stage else None
    path = work.folder / "frames.safetensors" if work.folder else None
    with work.clock("frames", result):
        frames, result.frame_energies = more_frames(x, mover, config, path, progress, result.flow.metadata.target)
    return frames.cpu()


def _student(coordinates: CoordinateMap, x: Tensor, config: FlowConfig, metadata: FlowMetadata | None) -> Flow:
    harmonic = config.prior == "harmonic" and isinstance(coordinates, CartesianMap)
    factor = flows.harmonic_factor(coordinates, x) if harmonic else None  # type: ignore[arg-type]
    return flows.build(coordinates, config.architecture(coordinates.circular), metadata, factor)


def _given_pairs(flow: Flow, c: PairsConfig) -> Pairs:
    """The pairs of ``pairs.folder``, if they are of this flow."""
    assert c.folder is not None
    pairs = load_pairs(c.folder, c.n)
    if c.log_det != "none" and pairs.log_det is None:
        raise InputError(f'{c.folder} holds pairs without log-determinants; set pairs.log_det = "none"')
    check_pairs(pairs, flow.prior, flows.origin(flow))
    return pairs


def _new_teacher(flow: Flow, t: TeacherConfig) -> VectorField:
    """A teacher that knows nothing yet."""
    circular = flow.prior.circular.cpu()
    factor = None if flow.prior.factor is None else flow.prior.factor.cpu()
    teacher = VectorField(circular, t.kind, t.hidden, t.depth, t.seed, factor).to(flow.device)
    teacher.origin = flows.origin(flow)
    return teacher


def _pair_batches(
    flow: Flow,
    source: Pairs | VectorField | None,
    topology: Any,
    x: Tensor,
    held_out: Tensor,
    config: RunConfig,
    work: _Workspace,
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
    teacher: VectorField, flow: Flow, x: Tensor, held_out: Tensor, config: RunConfig, work: _Workspace,
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


def _teacher_pairs(teacher: VectorField, c: PairsConfig, work: _Workspace, result: FitResult) -> Pairs:
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


def _regression(
    flow: Flow, batches: Any, held: Batch | None, config: RegressionConfig, work: _Workspace, result: FitResult
) -> None:
    loss = RegFlowLoss(flow.prior.circular, **config.model_dump(exclude={"train", "held_out"}))
    clean = dataclasses.replace(loss, target_noise=0.0)

    validate = partial(_held_out_loss, clean, held=held) if held else None
    work.run("regression", flow.bijection, loss, batches, config.train, result, validate)
    result.note_phase("regression")


def _likelihood(
    flow: Flow,
    x: Tensor,
    held_out: Tensor,
    config: LikelihoodConfig,
    work: _Workspace,
    result: FitResult,
    reduced_potential: Callable[[Tensor], Tensor] | None,
) -> None:
    y = features(flow.coordinates, held_out, torch.Generator().manual_seed(config.train.seed))
    validate = partial(_held_out_loss, LikelihoodLoss(flow.prior), held=(y,))
    loss = LikelihoodLoss(flow.prior, config.noise, config.path)
    if config.path and reduced_potential is not None:
        batches = _sloped_batches(flow.coordinates, x, config.train, differentiable(reduced_potential))
        result.frame_energies += len(x)
    else:
        batches = data_batches(flow.coordinates, x, config.train)
    work.run("likelihood", flow.bijection, loss, batches, config.train, result, validate)
    result.note_phase("likelihood")


def _sloped_batches(coordinates: CoordinateMap, x: Tensor, config: TrainConfig, potential: Differentiable) -> Batches:
    """Batches of features and of the slopes of log p, in float32; in one frame, where that matters."""
    x = coordinates.augment(x.to(coordinates.circular.device, torch.float64), ranks.stream(config.seed, ORIENTATIONS))
    y, _, _, slope = ranks.current().by_parts(len(x), lambda j, rows: slopes(coordinates, x[rows], potential))
    return Batches((y.float(), slope.float()), config.batch_size, config.seed)


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    """The same configuration with every seed derived from `seed`."""
    table = config.model_dump()
    table["flow"]["seed"] = table["teacher"]["seed"] = seed
    table["pairs"]["seed"] = seed + 1
    for section in ("teacher", "regression", "likelihood"):
        table[section]["train"]["seed"] = seed
    table["refinement"]["seed"] = table["frames"]["seed"] = seed
    return RunConfig.model_validate(table)


def save_teacher(path: str | Path, teacher: VectorField) -> None:
    """Write a teacher as safetensors."""
    header = {"format": TEACHER_KIND, "format_version": 1, "architecture": teacher.architecture}
    header["origin"] = teacher.origin
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in teacher.state_dict().items()}
    write_safetensors(Path(path), tensors | {"circular": teacher.circular.cpu()}, header)


def load_teacher(path: str | Path, device: str | torch.device = "cpu") -> VectorField:
    """Read a teacher.

    Raises:
        InputError: no such file.
        CorruptFileError: damaged, or no teacher of this package.
    """
    header, tensors = read_safetensors(Path(path), TEACHER_KIND, 1)
    teacher = field_from_architecture(tensors.pop("circular"), header["architecture"], tensors.get("prior.factor"))
    teacher.load_state_dict(tensors)
    teacher.origin = header.get("origin", {})
    return teacher.to(device).eval()
