"""What the paper's table consists of: its settings, and one cell for every run."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from openmm_regflow.errors import InputError, complaints
from openmm_regflow.networks import HEADS

#: Regularisers of the RegFlow loss, one at a time (section 4.2; weights as published, or ours where none was).
REGULARISERS: dict[str, dict[str, float]] = {
    "none": {},
    "log-det": {"log_det": 1e-5},
    "forward-backward": {"forward_backward": 1e-6},
    "target-noise": {"target_noise": 0.01},
}
#: Settings of which a folder may hold several values: they say which runs there are, not how one is made.
WIDENING = {
    "systems", "architectures", "methods", "teacher", "seeds", "seconds", "ablations", "pair_numbers",
}  # fmt: skip


class PaperConfig(BaseModel):
    """Settings of the table; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    systems: tuple[str, ...] = ("alanine-dipeptide",)
    architectures: tuple[Literal["real_nvp", "res_nvp", "spline", "jet"], ...] = ("res_nvp", "spline", "jet")
    methods: tuple[Literal["mle", "regflow-ot", "regflow-reflow"], ...] = ("mle", "regflow-ot", "regflow-reflow")
    teacher: bool = Field(True, description="the CNF itself is a row")
    seeds: int = Field(3, ge=1)
    seconds: tuple[float, ...] = Field(
        (600.0,), min_length=1, description="budgets: training time of each run, teacher and pairs included"
    )
    prior: Literal["normal", "harmonic"] = Field("harmonic", description="of teachers and of flows by regression")
    mle_prior: Literal["normal", "harmonic"] = Field("normal", description="of flows by maximum likelihood")
    align: bool = Field(True, description="teacher: turn each latent towards its frame")
    n_layers: int = Field(8, ge=1)
    hidden: int = Field(128, ge=4, description="jet takes half of it")
    depth: int = Field(1, ge=1)
    teacher_kind: Literal["mlp", "transformer", "equivariant"] = "mlp"
    teacher_hidden: int = Field(256, ge=1)
    teacher_depth: int = Field(3, ge=1)
    ode_steps: int = Field(10, ge=1, description="midpoint steps of the teacher")
    batch_size: int = Field(256, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    teacher_rate: float = Field(3e-3, gt=0, description="learning rate of the teacher")
    n: int = Field(10_000, ge=100, description="samples of the evaluation")
    n_teacher: int = Field(500, ge=100, description="teacher samples with exact log-densities")
    torsion_points: int = Field(2000, ge=10, description="on either side of T-W2")
    ablations: tuple[Literal["regularisers", "pairs"], ...] = Field((), description="of the spline by reflow")
    pair_numbers: tuple[int, ...] = (10_000, 100_000, 1_000_000)

    @model_validator(mode="after")
    def _fit_each_other(self) -> "PaperConfig":
        """What a run would find out after its teacher was trained."""
        if "jet" in self.architectures and (self.hidden // 2) % HEADS:
            raise ValueError(f"hidden = {self.hidden}: jet takes half of it, which {HEADS} heads have to divide")
        if self.teacher_kind == "transformer" and self.teacher_hidden % HEADS:
            raise ValueError(f"teacher_hidden = {self.teacher_hidden}: {HEADS} attention heads have to divide it")
        if self.ablations and min(self.pair_numbers, default=self.batch_size) < self.batch_size:
            raise ValueError(f"pair_numbers {list(self.pair_numbers)}: each has to fill a batch of {self.batch_size}")
        return self

    @field_validator("seconds", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        return (given,) if isinstance(given, int | float) else given

    @field_validator("seconds")
    @classmethod
    def _positive(cls, given: tuple[float, ...]) -> tuple[float, ...]:
        if min(given) <= 0:
            raise ValueError("budgets must be positive")
        return tuple(sorted(given))


def load_config(given: dict[str, Any], settings: list[str]) -> PaperConfig:
    """A configuration from values and from lines ``key=value`` (value as JSON or a bare word).

    Raises:
        InputError: an unknown key or a value out of range, named.
    """
    table = dict(given)
    for line in settings:
        key, _, value = line.partition("=")
        try:
            table[key.strip()] = json.loads(value)
        except ValueError:
            table[key.strip()] = value.strip()
    try:
        return PaperConfig.model_validate(table)
    except ValidationError as error:
        raise InputError(f"{complaints(error)}; settings: {', '.join(PaperConfig.model_fields)}") from error


@dataclass(frozen=True)
class Cell:
    """One run: a row of the table with one seed.

    Attributes:
        system: named system.
        architecture: of the student; "cnf" for the teacher alone.
        method: "mle", "regflow-ot", "regflow-reflow" or "flow-matching".
        variant: of an ablation: a key of `REGULARISERS`, or "pairs-<n>"; empty in the main table.
        seconds: budget.
        seed: of weights, batches and samples.
    """

    system: str
    architecture: str
    method: str
    variant: str
    seconds: float
    seed: int

    @property
    def row(self) -> tuple[str, str, str, str, str]:
        """What the runs of other seeds share, in words."""
        return self.system, self.architecture, self.method, self.variant, f"{self.seconds:g}"

    @property
    def name(self) -> str:
        """File name without its suffix."""
        words = (self.system, self.architecture, self.method, self.variant)
        return "-".join(filter(None, (*words, f"{self.seconds:g}s", f"seed{self.seed}")))

    @property
    def n_pairs(self) -> int | None:
        """Number of pairs that the ablation asks for; None: as many as the budget allows."""
        return int(self.variant.removeprefix("pairs-")) if self.variant.startswith("pairs-") else None

    @property
    def regularisers(self) -> dict[str, float]:
        """Weights of the RegFlow loss."""
        return REGULARISERS.get(self.variant, REGULARISERS["forward-backward"])


def cells(config: PaperConfig) -> Iterator[Cell]:
    """Every run of the table, seed by seed and budget by budget: an interrupted table has whole columns first."""
    variants = [*REGULARISERS] * ("regularisers" in config.ablations)
    variants += [f"pairs-{n}" for n in config.pair_numbers] * ("pairs" in config.ablations)
    for seed in range(config.seeds):
        for seconds in config.seconds:
            for system in config.systems:
                if config.teacher:
                    yield Cell(system, "cnf", "flow-matching", "", seconds, seed)
                for architecture in config.architectures:
                    for method in config.methods:
                        yield Cell(system, architecture, method, "", seconds, seed)
                for variant in variants:
                    yield Cell(system, "spline", "regflow-reflow", variant, seconds, seed)


def settings(config: PaperConfig) -> dict[str, Any]:
    """What two runs of one table must have in common; more seeds, budgets or systems may come later."""
    return json.loads(config.model_dump_json(exclude=WIDENING))
