"""What one training run is told: sections with their defaults, and what contradicts what."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from openmm_regflow import ranks
from openmm_regflow.errors import InputError
from openmm_regflow.frames import FramesConfig
from openmm_regflow.objectives import QUARTER, rows_of_path
from openmm_regflow.refinement import RefineConfig
from openmm_regflow.teachers import LogDet, Method
from openmm_regflow.training import TrainConfig

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
    n_layers: int = Field(8, ge=2, description="couplings; each moves half of the features")
    hidden: int = Field(128, ge=1, description="width of conditioners")
    depth: int = Field(1, ge=1, description="hidden layers, residual or transformer blocks of a conditioner")
    n_bins: int = Field(8, ge=2, description="spline only: bins of circles, and of lines where line_bins says nothing")
    line_bins: int | None = Field(
        None, ge=0, description='spline only: bins of linear features, 0: shift and scale; "none": see torsion_layers'
    )
    bound: float = Field(5.0, gt=0, description="spline only: lines are bent within +-bound")
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

    @model_validator(mode="after")
    def _effective(self) -> "FlowConfig":
        fields = type(self).model_fields
        if self.name != "spline":
            idle = [key for key in SPLINE_KEYS if getattr(self, key) != fields[key].default]
            if idle:
                raise ValueError(f'{idle[0]} is for name = "spline" and does nothing in "{self.name}"; leave it out')
        if self.line_bins == 1:
            raise ValueError("line_bins = 1 is a spline that changes nothing; take 2 or more, or 0 for shift and scale")
        if self.torsion_layers == 1:
            raise ValueError("torsion_layers = 1 would move half of the torsions alone; take 2 or more, or 0")
        if self.torsion_layers == 0 and (self.torsion_hidden or self.torsion_depth):
            raise ValueError("torsion_hidden and torsion_depth are of torsion_layers, and these are 0; leave them out")
        return self

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
    hidden: int = Field(256, ge=1, description="width")
    depth: int = Field(3, ge=1, description="blocks")
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
    """RegFlow and its regularisers, whose weights are those of equation 5, in features of unit variance."""

    log_det: float = Field(
        0.0, ge=0, description="weight of squared errors of log-determinants, or without pairs.log_det of their squares"
    )
    forward_backward: float = Field(1e-6, ge=0, description="weight of squared errors of going there and back")
    target_noise: float = Field(0.0, ge=0, description="noise on targets, in standard deviations of features")
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


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    """The same configuration with every seed derived from `seed`."""
    table = config.model_dump()
    table["flow"]["seed"] = table["teacher"]["seed"] = seed
    table["pairs"]["seed"] = seed + 1
    for section in ("teacher", "regression", "likelihood"):
        table[section]["train"]["seed"] = seed
    table["refinement"]["seed"] = table["frames"]["seed"] = seed
    return RunConfig.model_validate(table)


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
            alignment without exact transport, or another setting that the objective or the source of the pairs would
            leave without effect.
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
    no_teacher = config.pairs.source in ("ot", "hierarchical") or config.pairs.folder is not None
    if no_teacher and (config.teacher.couple or config.teacher.align):
        raise InputError("teacher.couple and teacher.align are of a teacher, and these pairs need none; leave them out")
    _check_targets(config)
    if config.pairs.log_det != "none" and config.pairs.source in ("ot", "hierarchical"):
        raise InputError(
            f'pairs.log_det = "{config.pairs.log_det}" is of a teacher, and pairs.source = "{config.pairs.source}" has '
            "none; leave it out (regression.log_det then draws the log-determinants towards zero)"
        )
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


def _check_targets(config: RunConfig) -> None:
    """Refuse settings of pairs and regression that would have no effect."""
    pairs, regression = config.pairs, config.regression
    if config.objective == "mle":
        if not config.likelihood.enabled:
            raise InputError('objective = "mle" is the likelihood phase alone; leave likelihood.enabled at true')
        if pairs.folder or regression.held_out:
            raise InputError('objective = "mle" has no pairs; leave pairs.folder and regression.held_out out')
    taught = pairs.source in ("reflow", "stream") and not pairs.folder
    if pairs.log_det != "none" and not regression.log_det and taught and config.objective == "regflow":
        raise InputError(
            f'pairs.log_det = "{pairs.log_det}" takes time and is used by nothing; set regression.log_det, its weight'
        )
    if regression.held_out and pairs.source == "stream":
        raise InputError('regression.held_out needs pairs that are kept; leave it out with pairs.source = "stream"')
    if regression.held_out and not pairs.folder and int(regression.held_out * pairs.n) == 0:
        raise InputError(f"regression.held_out = {regression.held_out:g} of {pairs.n} pairs is none; make it larger")
    if regression.train.patience is not None and not regression.held_out:
        raise InputError("regression.train.patience needs pairs to judge by; set regression.held_out, without a stream")
