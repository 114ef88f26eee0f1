"""The paper's table on this machine: architectures x ways of training, with one budget of seconds for every run.

Rehman et al. 2025, arXiv 2506.01158, tables 1 to 4, in Cartesian coordinates. A run's budget covers everything that it
trains on: teacher, pairs and student. Each finished run is one JSON file; runs that are there are not run again.
"""

import csv
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from openmm_regflow import evaluation, flows, metrics, plots, recipes, targets
from openmm_regflow.coordinates import CoordinateMap
from openmm_regflow.errors import IncompatibleFlowError, InputError, RegflowError
from openmm_regflow.flows import Flow
from openmm_regflow.objectives import FlowMatchingLoss, LikelihoodLoss, RegFlowLoss
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.systems import MolecularSystem, load_system
from openmm_regflow.teachers import VectorField, integrate
from openmm_regflow.training import Batches, TrainConfig, train
from openmm_regflow.units import thermal_energy

#: Regularisers of the RegFlow loss, one at a time (section 4.2; weights as published, or ours where none was).
REGULARISERS: dict[str, dict[str, float]] = {
    "none": {},
    "log-det": {"log_det": 1e-5},
    "forward-backward": {"forward_backward": 1e-6},
    "target-noise": {"target_noise": 0.01},
}
#: Parts of a reflow run's budget: teacher, pairs; the student has the rest. Of an OT run's: the transport.
TEACHER_SHARE, PAIRS_SHARE, TRANSPORT_SHARE = 0.4, 0.2, 0.25
#: A transport of 4,000 points took about 8 s on one core, of n points (n / 4,000)^2.3 times that.
TRANSPORT_POINTS, TRANSPORT_SECONDS, TRANSPORT_POWER = 4000, 8.0, 2.3
LIKELIHOODS = 200_000
#: Energies above this [kT] are clashes: counted, and cut to it in E-W1, which one of them would otherwise decide.
ABSURD = 1e6
Rows = list[tuple[str, ...]]
#: (name of the run, runs done, runs in total)
Report = Callable[[str, int, int], None]


class PaperConfig(BaseModel):
    """Settings of the table; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    systems: tuple[str, ...] = ("alanine-dipeptide",)
    architectures: tuple[Literal["real_nvp", "res_nvp", "spline", "jet"], ...] = ("res_nvp", "spline", "jet")
    methods: tuple[Literal["mle", "regflow-ot", "regflow-reflow"], ...] = ("mle", "regflow-ot", "regflow-reflow")
    teacher: bool = Field(True, description="the CNF itself is a row")
    seeds: int = Field(3, ge=1)
    seconds: float = Field(600.0, gt=0, description="training time of each run, teacher and pairs included")
    n_layers: int = Field(8, ge=1)
    hidden: int = Field(128, ge=4, description="jet takes half of it")
    depth: int = Field(1, ge=1)
    teacher_kind: Literal["mlp", "transformer", "equivariant"] = "mlp"
    teacher_hidden: int = Field(256, ge=1)
    teacher_depth: int = Field(3, ge=1)
    ode_steps: int = Field(10, ge=1, description="midpoint steps of the teacher")
    batch_size: int = Field(256, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    n: int = Field(10_000, ge=100, description="samples of the evaluation")
    n_teacher: int = Field(500, ge=100, description="teacher samples with exact log-densities")
    torsion_points: int = Field(2000, ge=10, description="on either side of T-W2")
    ablations: bool = Field(False, description="regularisers, and number of pairs, for the spline")
    pair_numbers: tuple[int, ...] = (10_000, 100_000, 1_000_000)


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
        first = error.errors()[0]
        known = ", ".join(PaperConfig.model_fields)
        raise InputError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}; settings: {known}") from error


@dataclass(frozen=True)
class Cell:
    """One run: a row of the table with one seed.

    Attributes:
        system: named system.
        architecture: of the student; "cnf" for the teacher alone.
        method: "mle", "regflow-ot", "regflow-reflow" or "flow-matching".
        variant: of an ablation: a key of `REGULARISERS`, or "pairs-<n>"; empty in the main table.
        seed: of weights, batches and samples.
    """

    system: str
    architecture: str
    method: str
    variant: str
    seed: int

    @property
    def row(self) -> tuple[str, str, str, str]:
        """What the runs of other seeds share."""
        return self.system, self.architecture, self.method, self.variant

    @property
    def name(self) -> str:
        """File name without its suffix."""
        return "-".join(filter(None, (*self.row, f"seed{self.seed}")))

    @property
    def n_pairs(self) -> int | None:
        """Number of pairs that the ablation asks for; None: as many as the budget allows."""
        return int(self.variant.removeprefix("pairs-")) if self.variant.startswith("pairs-") else None

    @property
    def regularisers(self) -> dict[str, float]:
        """Weights of the RegFlow loss."""
        return REGULARISERS.get(self.variant, REGULARISERS["forward-backward"])


def cells(config: PaperConfig) -> Iterator[Cell]:
    """Every run of the table, seed by seed, so that an interrupted table has whole columns first."""
    for seed in range(config.seeds):
        for system in config.systems:
            if config.teacher:
                yield Cell(system, "cnf", "flow-matching", "", seed)
            for architecture in config.architectures:
                for method in config.methods:
                    yield Cell(system, architecture, method, "", seed)
            if config.ablations:
                for variant in (*REGULARISERS, *(f"pairs-{n}" for n in config.pair_numbers)):
                    yield Cell(system, "spline", "regflow-reflow", variant, seed)


@dataclass
class Trained:
    """What a run trained, and its cost.

    Attributes:
        sampler: with ``sample`` and ``frame_log_density``.
        seconds: wall-clock by part [s].
        n_pairs: pairs that the student saw.
    """

    sampler: Any
    seconds: dict[str, float] = field(default_factory=dict)
    n_pairs: int = 0


class TeacherSampler:
    """A CNF behind the two calls of a flow that the evaluation needs.

    Args:
        teacher: trained vector field.
        coordinates: positions <-> features.
        n_steps: midpoint steps.
    """

    def __init__(self, teacher: VectorField, coordinates: CoordinateMap, n_steps: int) -> None:
        self.teacher, self.coordinates, self.n_steps = teacher, coordinates, n_steps

    def sample(self, n: int, generator: torch.Generator | None = None, log_q: bool = True) -> tuple[Tensor, Tensor]:
        """Positions `(n, n_atoms, 3)` [nm] and exact log-density `(n,)`; zeros for that unless `log_q`."""
        z = self.teacher.prior.sample(n, generator, next(self.teacher.parameters()).dtype)
        kind: Any = "exact" if log_q else "none"
        parts = [integrate(self.teacher, some, n_steps=self.n_steps, log_det=kind) for some in z.split(2048)]
        x, log_volume = self.coordinates.to_positions(torch.cat([y for y, _ in parts]).double())
        log_det = torch.cat([d for _, d in parts]).double()
        return x, (self.teacher.prior.log_prob(z).double() - log_det - log_volume) * float(log_q)

    def frame_log_density(self, x: Tensor) -> Tensor:
        """Log-density `(n,)` of the centre."""
        return self.coordinates.frame_log_density(x)


def run_cell(cell: Cell, config: PaperConfig, device: torch.device | str = "cpu") -> tuple[dict[str, Any], Any]:
    """Train and evaluate one run.

    Args:
        cell: which.
        config: budget and sizes.
        device: of networks and energies.

    Returns:
        figures for the JSON file; a Ramachandran plot, or None. A run that fails says so in "failed".
    """
    molecule = load_system(cell.system)
    record: dict[str, Any] = {"cell": vars(cell), "config": settings(config), "device": str(device)}
    try:
        trained = train_cell(cell, config, molecule, torch.device(device))
        record |= {"seconds": trained.seconds, "training_seconds": sum(trained.seconds.values())}
        record |= {"n_pairs": trained.n_pairs}
        figures, drawing = evaluate_cell(trained.sampler, cell, config, molecule, torch.device(device))
        return record | figures, drawing
    except RegflowError as error:
        return record | {"failed": str(error)}, None


def settings(config: PaperConfig) -> dict[str, Any]:
    """What two runs of one table must have in common; more seeds or systems may come later."""
    widening = {"systems", "architectures", "methods", "teacher", "seeds", "ablations", "pair_numbers"}
    return json.loads(config.model_dump_json(exclude=widening))


def train_cell(cell: Cell, config: PaperConfig, molecule: MolecularSystem, device: torch.device) -> Trained:
    """Train one run within its budget.

    Raises:
        RegflowError: bad data, or a training that diverges.
    """
    x, held_out = (torch.as_tensor(molecule.reference(split)) for split in ("train", "validation"))
    coordinates = flows.coordinates_for(molecule.topology, x, "cartesian")
    if cell.architecture == "cnf":
        teacher, seconds = _teacher(coordinates.to(device), x, cell, config, config.seconds)
        return Trained(TeacherSampler(teacher, coordinates, config.ode_steps), {"teacher": seconds})
    hidden = config.hidden // 2 if cell.architecture == "jet" else config.hidden
    student = recipes.FlowConfig.model_validate(
        {
            "name": cell.architecture, "n_layers": config.n_layers, "hidden": hidden, "depth": config.depth,
            "seed": cell.seed,
        }
    )  # fmt: skip
    flow = flows.build(coordinates, student.architecture()).to(device)
    if cell.method == "mle":
        return Trained(flow, {"student": _likelihood(flow, x, held_out, cell, config)})
    costs: dict[str, float] = {}
    if cell.method == "regflow-reflow":
        share = TEACHER_SHARE * config.seconds
        teacher, costs["teacher"] = _teacher(flow.coordinates, x, cell, config, share)
        pairs, costs["pairs"] = _reflow(teacher, cell, config)
    else:
        pairs, costs["pairs"] = _transport(flow, x, cell, config)
    # An ablation over pairs gives the student what it has in the main table, whatever the pairs have cost.
    spent = (TEACHER_SHARE + PAIRS_SHARE) * config.seconds if cell.n_pairs else sum(costs.values())
    schedule = _schedule(cell, config, max(config.seconds - spent, 0.1 * config.seconds))
    batches = Batches((pairs.z, pairs.y), config.batch_size, cell.seed, device=device)
    loss = RegFlowLoss(flow.prior.circular, **cell.regularisers)
    costs["student"] = train(flow.bijection, loss, batches, schedule).seconds
    return Trained(flow, costs, len(pairs))


def _schedule(cell: Cell, config: PaperConfig, seconds: float) -> TrainConfig:
    return TrainConfig(
        steps=10**9, seconds=seconds, schedule="seconds", batch_size=config.batch_size, seed=cell.seed,
        learning_rate=config.learning_rate, validate_every=250, checkpoint_every=10**6,
    )  # fmt: skip


def _teacher(
    coordinates: CoordinateMap, x: Tensor, cell: Cell, config: PaperConfig, seconds: float
) -> tuple[VectorField, float]:
    circular = coordinates.circular
    teacher = VectorField(
        circular.cpu(), config.teacher_kind, config.teacher_hidden, config.teacher_depth, cell.seed
    ).to(circular.device)
    schedule = _schedule(cell, config, seconds)
    batches = recipes.data_batches(coordinates, x, schedule)
    return teacher, train(teacher, FlowMatchingLoss(teacher.prior), batches, schedule).seconds


def _likelihood(flow: Flow, x: Tensor, held_out: Tensor, cell: Cell, config: PaperConfig) -> float:
    y = recipes.features(flow.coordinates, held_out[:2000], torch.Generator().manual_seed(cell.seed))
    loss = LikelihoodLoss(flow.prior)
    schedule = _schedule(cell, config, config.seconds)
    batches = recipes.data_batches(flow.coordinates, x, schedule)
    judge = lambda module: float(loss(module, (y,), torch.Generator())[0])  # noqa: E731
    return train(flow.bijection, loss, batches, schedule, validation=judge).seconds


def _reflow(teacher: VectorField, cell: Cell, config: PaperConfig) -> tuple[targets.Pairs, float]:
    """As many pairs as the share of the budget allows, or the number that the ablation asks for."""
    began = time.monotonic()
    if cell.n_pairs is not None:
        pairs = targets.reflow_pairs(teacher, cell.n_pairs, seed=cell.seed, n_steps=config.ode_steps)
        return pairs, time.monotonic() - began
    parts: list[targets.Pairs] = []
    while not parts or time.monotonic() - began < PAIRS_SHARE * config.seconds:
        seed = targets.shard_seed(cell.seed, len(parts))
        parts.append(targets.reflow_chunk(teacher, max(1024, config.batch_size), seed, n_steps=config.ode_steps))
    return targets.concatenate(parts), time.monotonic() - began


def _transport(flow: Flow, x: Tensor, cell: Cell, config: PaperConfig) -> tuple[targets.Pairs, float]:
    """Exact transport of as many frames as fit into the share of the budget, by the measured law of its cost."""
    began, generator = time.monotonic(), torch.Generator().manual_seed(cell.seed)
    share = TRANSPORT_SHARE * config.seconds / TRANSPORT_SECONDS
    n = min(len(x), targets.MAX_EXACT, max(config.batch_size, int(TRANSPORT_POINTS * share ** (1 / TRANSPORT_POWER))))
    some = x[torch.randperm(len(x), generator=generator)[:n]]
    y = recipes.features(flow.coordinates, some, generator).cpu()
    z = flow.prior.sample(n, generator).cpu()
    return targets.optimal_transport_pairs(z, y, flow.prior.circular.cpu()), time.monotonic() - began


def evaluate_cell(
    sampler: Any, cell: Cell, config: PaperConfig, molecule: MolecularSystem, device: torch.device
) -> tuple[dict[str, Any], Any]:
    """Figures of one trained run, and its Ramachandran plot (reference, samples, reweighted).

    The teacher's weights need exact divergences and are judged on fewer samples than its energies and torsions.
    """
    potential = TorchPotential(molecule.system, dtype=torch.float64, device=device)
    generator = torch.Generator().manual_seed(cell.seed)
    reference = molecule.reference("test")
    teacher = isinstance(sampler, TeacherSampler)
    n = config.n_teacher if teacher else config.n
    drawn = evaluation.draw(sampler, potential, molecule.temperature, n, generator)
    figures = _evaluate(drawn, molecule, potential, reference, config)
    if teacher:
        x, _ = sampler.sample(config.n, generator, log_q=False)
        u = potential(x).cpu().numpy() / thermal_energy(molecule.temperature)
        even = evaluation.FlowSamples(x.cpu().numpy(), -u, u, np.zeros(len(u)))
        plain = _evaluate(even, molecule, potential, reference, config)
        names = ("e_w1", "median_excess", "clashes", "t_w2", "wrong_chirality", "delta_f_phi", "n_finite")
        figures |= {k: plain[k] for k in names}
    figures |= {"n_weights": n, "n_plain": config.n, **_round_trip(sampler, generator), **_speed(sampler, n)}
    return figures, _ramachandran(drawn, reference, molecule) if cell.seed == 0 else None


@np.errstate(divide="ignore", invalid="ignore")  # the Pareto fit of weights that one sample carries
def _evaluate(
    drawn: evaluation.FlowSamples,
    molecule: MolecularSystem,
    potential: TorchPotential,
    reference: np.ndarray,
    config: PaperConfig,
) -> dict[str, Any]:
    u_reference = potential(torch.as_tensor(reference)).cpu().numpy() / thermal_energy(molecule.temperature)
    frame = drawn.log_weights + drawn.u + drawn.log_q
    figures = evaluation.evaluate(
        drawn.positions,
        drawn.log_q,
        drawn.u,
        reference,
        u_reference,
        phi=molecule.torsions("phi"),
        psi=molecule.torsions("psi"),
        centres=molecule.chiral_centres,
        frame_log_density=np.where(np.isfinite(frame), frame, 0.0),
        n_torsion_points=config.torsion_points,
        generator=0,
    ).to_dict()
    clash = ~(drawn.u < ABSURD)
    u = np.where(clash, ABSURD, drawn.u)
    return figures | {
        "e_w1": metrics.energy_wasserstein(u, u_reference),
        "median_excess": float(np.median(u) - np.median(u_reference)),
        "clashes": float(clash.mean()),
    }


def _round_trip(sampler: Any, generator: torch.Generator, n: int = 1000) -> dict[str, float]:
    """Root mean square and largest error of ``f^-1(f(z)) - z`` per dimension, in the precision of the training."""
    with torch.no_grad():
        if isinstance(sampler, TeacherSampler):
            z = sampler.teacher.prior.sample(n, generator)
            y, _ = integrate(sampler.teacher, z, n_steps=sampler.n_steps)
            back, _ = integrate(sampler.teacher, y, n_steps=sampler.n_steps, reverse=True)
        else:
            z = sampler.prior.sample(n, generator, sampler.dtype)
            back, _ = sampler.bijection.inverse(sampler.bijection(z)[0])
    error = (back - z).double()
    return {"round_trip_rms": float(error.square().mean().sqrt()), "round_trip_max": float(error.abs().max())}


def _speed(sampler: Any, n: int) -> dict[str, float]:
    """Seconds for 200,000 samples with likelihoods, scaled from `n`."""
    n = min(n, LIKELIHOODS)
    began = time.monotonic()
    sampler.sample(n, torch.Generator().manual_seed(1))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"seconds_200k": (time.monotonic() - began) * LIKELIHOODS / n, "seconds_200k_measured_on": n}


def _ramachandran(drawn: evaluation.FlowSamples, reference: np.ndarray, molecule: MolecularSystem) -> Any:
    finite = np.isfinite(drawn.positions).all(axis=(1, 2))
    phi, psi = (molecule.torsions(kind)[:1] for kind in ("phi", "psi"))
    a, r = ([metrics.dihedrals(x, rows)[:, 0] for rows in (phi, psi)] for x in (drawn.positions[finite], reference))
    return plots.ramachandran(
        {"reference": (r[0], r[1]), "samples": (a[0], a[1]), "reweighted": (a[0], a[1], drawn.log_weights[finite])}
    )


def run_table(
    folder: Path, config: PaperConfig, *, device: torch.device | str = "cpu", report: Report | None = None
) -> Rows:
    """Every run that is not yet in the folder, then the table of all: ``table.csv`` and ``table.md``.

    Args:
        folder: one JSON (and for seed 0 a Ramachandran plot) per finished run.
        config: budget and sizes.
        device: of networks and energies.
        report: called before each run and at the end.

    Returns:
        the table of every run in the folder, its first row the header.

    Raises:
        InputError: an unknown system, or one without reference data.
        IncompatibleFlowError: the folder holds runs of other settings.
    """
    wanted = list(cells(config))
    for name in config.systems:
        for split in ("train", "validation", "test"):
            load_system(name).reference(split)
    folder.mkdir(parents=True, exist_ok=True)
    records = {cell: _finished(folder, cell, config) for cell in wanted}
    for done, cell in enumerate(wanted):
        if report:
            report(cell.name, done, len(wanted))
        if records[cell] is None:
            record, drawing = run_cell(cell, config, device)
            if drawing is not None:
                plots.save(drawing, folder / f"{cell.name}.png")
            part = folder / f"{cell.name}.json.part"
            part.write_text(json.dumps(record, indent=1))
            part.replace(folder / f"{cell.name}.json")
            records[cell] = record
            write_table(folder, table(_all_finished(folder)), config)
    if report:
        report("", len(wanted), len(wanted))
    rows = table(_all_finished(folder))
    write_table(folder, rows, config)
    return rows


def _all_finished(folder: Path) -> list[dict[str, Any]]:
    """Every run in the folder, those of earlier calls too: more seeds for one system, more systems for one seed."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*-seed*.json"))]
    return sorted(records, key=lambda record: [str(v) for v in record["cell"].values()])


def _finished(folder: Path, cell: Cell, config: PaperConfig) -> dict[str, Any] | None:
    path = folder / f"{cell.name}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    differing = [k for k, v in settings(config).items() if record["config"].get(k) != v]
    if differing:
        raise IncompatibleFlowError(f"{path} was run with another {', '.join(differing)}; choose another --output")
    return record


#: header -> (key of the record, factor)
COLUMNS: dict[str, tuple[str, float]] = {
    "E-W1 [kT]": ("e_w1", 1.0),
    "E-W1 reweighted [kT]": ("e_w1_reweighted", 1.0),
    "T-W2 [rad]": ("t_w2", 1.0),
    "T-W2 reweighted [rad]": ("t_w2_reweighted", 1.0),
    "ESS [%]": ("ess", 100.0),
    "ESS without top 0.2 % [%]": ("ess_truncated", 100.0),
    "n of weights": ("n_weights", 1.0),
    "median u above reference [kT]": ("median_excess", 1.0),
    "clashes [%]": ("clashes", 100.0),
    "wrong chirality [%]": ("wrong_chirality", 100.0),
    "ΔF(φ) reweighted [kT]": ("delta_f_phi_reweighted", 1.0),
    "round trip rms": ("round_trip_rms", 1.0),
    "pairs": ("n_pairs", 1.0),
    "training [s]": ("training_seconds", 1.0),
    "200k likelihoods [s] (scaled)": ("seconds_200k", 1.0),
}


def table(records: list[dict[str, Any]]) -> Rows:
    """Means over seeds with their standard errors; "–" where a figure is not defined, failures counted."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        c = record["cell"]
        groups.setdefault((c["system"], c["architecture"], c["method"], c["variant"]), []).append(record)
    rows: Rows = [("system", "architecture", "method", "variant", "seeds", *COLUMNS)]
    for key, runs in groups.items():
        failed = sum("failed" in r for r in runs)
        seeds = f"{len(runs)}" + (f" ({failed} failed)" if failed else "")
        rows.append((*key, seeds, *(_mean(runs, *column) for column in COLUMNS.values())))
    return rows


def _mean(runs: list[dict[str, Any]], key: str, factor: float) -> str:
    values = [r.get(key) for r in runs]
    numbers = [factor * float(v[0] if isinstance(v, list | tuple) else v) for v in values if v is not None]
    if not numbers:
        return "–"
    mean = float(np.mean(numbers))
    if len(numbers) < 2:
        return f"{mean:.4g}"
    return f"{mean:.4g} ± {np.std(numbers, ddof=1) / math.sqrt(len(numbers)):.2g}"


def write_table(folder: Path, rows: Rows, config: PaperConfig) -> None:
    """Write ``table.csv`` and ``table.md`` with what the figures mean."""
    with open(folder / "table.csv", "w", newline="") as handle:
        csv.writer(handle).writerows(rows)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    notes = (
        f"Cartesian coordinates; {config.seconds:g} s of training per run, teacher and pairs included (a fixed number "
        "of pairs takes what it takes). Mean ± standard error over seeds. Weighted figures are from `n of weights` "
        f"samples, the others from {config.n}; T-W2 between {config.torsion_points} points. Clashes are samples above "
        f"{ABSURD:g} kT; E-W1 takes them as {ABSURD:g} kT. The time for 200k likelihoods is measured on `n of weights` "
        "samples and scaled."
    )
    (folder / "table.md").write_text("\n".join([*lines, "", notes, ""]))
