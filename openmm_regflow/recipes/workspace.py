"""One run: its folder with checkpoints, the clock of its stages, and what comes out."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from openmm_regflow import ranks
from openmm_regflow.errors import IncompatibleFlowError
from openmm_regflow.files import read_json, write_json
from openmm_regflow.flows import Flow
from openmm_regflow.recipes.config import RunConfig
from openmm_regflow.refinement import Round
from openmm_regflow.teachers import VectorField
from openmm_regflow.training import History, Stage, TrainConfig, train


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


class Workspace:
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
