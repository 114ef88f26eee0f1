"""One run of the paper's table: training within a budget, and all figures of what was trained."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_regflow import evaluation, flows, metrics, plots, priors, recipes, reweighting, targets
from openmm_regflow.coordinates import CoordinateMap
from openmm_regflow.device import synchronize
from openmm_regflow.errors import RegflowError
from openmm_regflow.flows import Flow, FlowMetadata
from openmm_regflow.objectives import FlowMatchingLoss, LikelihoodLoss, RegFlowLoss
from openmm_regflow.paper.design import Cell, PaperConfig, settings
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.systems import MolecularSystem, load_system
from openmm_regflow.teachers import VectorField, integrate
from openmm_regflow.training import Batches, TrainConfig, train
from openmm_regflow.units import thermal_energy

#: Parts of a reflow run's budget: teacher, pairs; the student has the rest. Of an OT run's: the transport.
TEACHER_SHARE, PAIRS_SHARE, TRANSPORT_SHARE = 0.4, 0.2, 0.25
#: A transport of 4,000 points took about 8 s on one core, of n points (n / 4,000)^2.3 times that.
TRANSPORT_POINTS, TRANSPORT_SECONDS, TRANSPORT_POWER = 4000, 8.0, 2.3
LIKELIHOODS = 200_000
#: Samples that the teacher's ODE carries at once.
TEACHER_CHUNK = 2048
#: Figures of a student's own teacher that are kept beside the student's.
OF_TEACHER = (
    "e_w1", "e_w1_error", "t_w2", "t_w2_error", "ess", "ess_error", "ess_truncated", "clashes", "clashes_error",
    "wrong_chirality", "wrong_chirality_error", "delta_f_phi", "delta_f_phi_reweighted", "n_weights",
)  # fmt: skip
#: Energies above this [kT] are clashes: counted, and cut to it in E-W1, which one of them would otherwise decide.
ABSURD = 1e6


@dataclass
class Trained:
    """What a run trained, and its cost.

    Attributes:
        sampler: a flow, as far as a proposal needs one.
        seconds: time by part, see `clock_of` [s].
        n_pairs: pairs that the student saw.
        teacher: of the student, if it had one.
    """

    sampler: Any
    seconds: dict[str, float] = field(default_factory=dict)
    n_pairs: int = 0
    teacher: "TeacherSampler | None" = None


def clock_of(device: torch.device) -> Callable[[], float]:
    """What budgets count: process time on a CPU, which other work on the machine may share; else wall-clock."""
    return time.process_time if device.type == "cpu" else time.monotonic


class TeacherSampler:
    """A CNF behind the calls of a flow that draws and weights need.

    Args:
        teacher: trained vector field.
        coordinates: positions <-> features.
        n_steps: midpoint steps.
    """

    def __init__(self, teacher: VectorField, coordinates: CoordinateMap, n_steps: int) -> None:
        self.teacher, self.coordinates, self.n_steps = teacher, coordinates, n_steps
        self.n_atoms, self.rotation_invariant = coordinates.n_atoms, coordinates.rotation_invariant
        self.device = coordinates.circular.device

    def sample(self, n: int, generator: torch.Generator | None = None, log_q: bool = True) -> tuple[Tensor, Tensor]:
        """Positions `(n, n_atoms, 3)` [nm] and exact log-density `(n,)`; zeros for that unless `log_q`."""
        z = self.teacher.prior.sample(n, generator, next(self.teacher.parameters()).dtype)
        kind: Any = "exact" if log_q else "none"
        parts = [integrate(self.teacher, some, n_steps=self.n_steps, log_det=kind) for some in z.split(TEACHER_CHUNK)]
        x, log_volume = self.coordinates.to_positions(torch.cat([y for y, _ in parts]).double())
        log_det = torch.cat([d for _, d in parts]).double()
        return x, (self.teacher.prior.log_prob(z).double() - log_det - log_volume) * float(log_q)

    def frame_log_density(self, x: Tensor) -> Tensor:
        """Log-density `(n,)` of the centre."""
        return self.coordinates.frame_log_density(x)


def target_of(molecule: MolecularSystem) -> dict[str, Any]:
    """What a run of a system of this name was a run of."""
    return FlowMetadata(molecule.name, molecule.fingerprint, molecule.temperature).target


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
    record["target"] = target_of(molecule)
    try:
        trained = train_cell(cell, config, molecule, torch.device(device))
        record |= {"seconds": trained.seconds, "training_seconds": sum(trained.seconds.values())}
        record |= {"n_pairs": trained.n_pairs}
        figures, drawing = evaluate_cell(trained.sampler, cell, config, molecule, torch.device(device))
        if trained.teacher is not None:
            own, _ = evaluate_cell(trained.teacher, cell, config, molecule, torch.device(device))
            figures["teacher"] = {k: own[k] for k in OF_TEACHER}
        return record | figures, drawing
    except RegflowError as error:
        return record | {"failed": str(error)}, None


def train_cell(cell: Cell, config: PaperConfig, molecule: MolecularSystem, device: torch.device) -> Trained:
    """Train one run within its budget.

    Raises:
        RegflowError: bad data, or a training that diverges.
    """
    x, held_out = (torch.as_tensor(molecule.reference(split)) for split in ("train", "validation"))
    coordinates = flows.coordinates_for(molecule.topology, x, "cartesian")
    if cell.architecture == "cnf":
        teacher, seconds = _teacher(coordinates.to(device), x, cell, config, cell.seconds)
        return Trained(TeacherSampler(teacher, coordinates, config.ode_steps), {"teacher": seconds})
    hidden = config.hidden // 2 if cell.architecture == "jet" else config.hidden
    student = recipes.FlowConfig.model_validate(
        {
            "name": cell.architecture, "n_layers": config.n_layers, "hidden": hidden, "depth": config.depth,
            "seed": cell.seed,
        }
    )  # fmt: skip
    kind = config.mle_prior if cell.method == "mle" else config.prior
    architecture = student.architecture(coordinates.circular)
    flow = flows.build(coordinates, architecture, None, _factor(coordinates, x, kind)).to(device)
    if cell.method == "mle":
        trained = Trained(flow, {"student": _likelihood(flow, x, held_out, cell, config)})
    else:
        trained = _regression(flow, x, cell, config)
    flow.secure(recipes.features(flow.coordinates, held_out[:500], torch.Generator().manual_seed(cell.seed)), cell.seed)
    return trained


def _regression(flow: Flow, x: Tensor, cell: Cell, config: PaperConfig) -> Trained:
    """RegFlow with what is left of the budget after teacher and pairs."""
    costs: dict[str, float] = {}
    own = None
    if cell.method == "regflow-reflow":
        teacher, costs["teacher"] = _teacher(flow.coordinates, x, cell, config, TEACHER_SHARE * cell.seconds)
        pairs, costs["pairs"] = _reflow(teacher, cell, config)
        own = TeacherSampler(teacher, flow.coordinates, config.ode_steps)
    else:
        pairs, costs["pairs"] = _transport(flow, x, cell, config)
    # An ablation over pairs gives the student what it has in the main table, whatever the pairs have cost.
    spent = (TEACHER_SHARE + PAIRS_SHARE) * cell.seconds if cell.n_pairs else sum(costs.values())
    schedule = _schedule(cell, config, max(cell.seconds - spent, 0.1 * cell.seconds), config.learning_rate)
    batches = Batches((pairs.z, pairs.y), config.batch_size, cell.seed, device=flow.device)
    loss = RegFlowLoss(flow.prior.circular, **cell.regularisers)
    costs["student"] = train(flow.bijection, loss, batches, schedule, clock=clock_of(flow.device)).seconds
    return Trained(flow, costs, len(pairs), own)


def _factor(coordinates: CoordinateMap, x: Tensor, kind: str) -> Tensor | None:
    return priors.harmonic_factor(coordinates, x) if kind == "harmonic" else None  # type: ignore[arg-type]


def _schedule(cell: Cell, config: PaperConfig, seconds: float, rate: float) -> TrainConfig:
    return TrainConfig(
        steps=10**9, seconds=seconds, schedule="seconds", batch_size=config.batch_size, seed=cell.seed,
        learning_rate=rate, validate_every=250, checkpoint_every=10**6,
    )  # fmt: skip


def _teacher(
    coordinates: CoordinateMap, x: Tensor, cell: Cell, config: PaperConfig, seconds: float
) -> tuple[VectorField, float]:
    circular = coordinates.circular
    factor = _factor(coordinates, x, config.prior)
    teacher = VectorField(
        circular.cpu(), config.teacher_kind, config.teacher_hidden, config.teacher_depth, cell.seed, factor
    ).to(circular.device)
    schedule = _schedule(cell, config, seconds, config.teacher_rate)
    batches = recipes.data_batches(coordinates, x, schedule)
    loss = FlowMatchingLoss(teacher.prior, targets.aligned_coupling if config.align else None)
    return teacher, train(teacher, loss, batches, schedule, clock=clock_of(circular.device)).seconds


def _likelihood(flow: Flow, x: Tensor, held_out: Tensor, cell: Cell, config: PaperConfig) -> float:
    y = recipes.features(flow.coordinates, held_out[:2000], torch.Generator().manual_seed(cell.seed))
    loss = LikelihoodLoss(flow.prior)
    schedule = _schedule(cell, config, cell.seconds, config.learning_rate)
    batches = recipes.data_batches(flow.coordinates, x, schedule)
    judge = lambda module: float(loss(module, (y,), torch.Generator())[0])  # noqa: E731
    return train(flow.bijection, loss, batches, schedule, validation=judge, clock=clock_of(flow.device)).seconds


def _reflow(teacher: VectorField, cell: Cell, config: PaperConfig) -> tuple[targets.Pairs, float]:
    """As many pairs as the share of the budget allows, or the number that the ablation asks for."""
    clock = clock_of(teacher.circular.device)
    began = clock()
    if cell.n_pairs is not None:
        pairs = targets.reflow_pairs(teacher, cell.n_pairs, seed=cell.seed, n_steps=config.ode_steps)
        return pairs, clock() - began
    parts: list[targets.Pairs] = []
    while not parts or clock() - began < PAIRS_SHARE * cell.seconds:
        seed = targets.shard_seed(cell.seed, len(parts))
        parts.append(targets.reflow_chunk(teacher, max(1024, config.batch_size), seed, n_steps=config.ode_steps))
    return targets.concatenate(parts), clock() - began


def _transport(flow: Flow, x: Tensor, cell: Cell, config: PaperConfig) -> tuple[targets.Pairs, float]:
    """Exact transport of as many frames as fit into the share of the budget, by the measured law of its cost."""
    clock, generator = clock_of(flow.device), torch.Generator().manual_seed(cell.seed)
    began = clock()
    share = TRANSPORT_SHARE * cell.seconds / TRANSPORT_SECONDS
    n = min(len(x), targets.MAX_EXACT, max(config.batch_size, int(TRANSPORT_POINTS * share ** (1 / TRANSPORT_POWER))))
    some = x[torch.randperm(len(x), generator=generator)[:n]]
    y = recipes.features(flow.coordinates, some, generator).cpu()
    z = flow.prior.sample(n, generator).cpu()
    return targets.optimal_transport_pairs(z, y, flow.prior.circular.cpu()), clock() - began


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
        figures |= {k: plain[k] for name in names for k in (name, f"{name}_error") if k in plain}
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
    figures = evaluation.evaluate(
        drawn.positions,
        drawn.log_q,
        drawn.u,
        reference,
        u_reference,
        phi=molecule.torsions("phi"),
        psi=molecule.torsions("psi"),
        centres=molecule.chiral_centres,
        n_torsion_points=config.torsion_points,
        generator=0,
    ).to_dict()
    clash = ~(drawn.u < ABSURD)
    u, clashes = np.where(clash, ABSURD, drawn.u), float(clash.mean())
    figures |= dict(zip(("e_w1", "e_w1_error"), metrics.energy_distance(u, u_reference)))
    figures |= {"clashes": clashes, "clashes_error": metrics.fraction_error(clashes, len(u))}
    figures["median_excess"] = float(np.median(u) - np.median(u_reference))
    figures["median_excess_error"] = math.hypot(
        *(reweighting.bootstrap_error(np.median, v, generator=0) for v in (u, u_reference))
    )
    return figures


def _round_trip(sampler: Any, generator: torch.Generator, n: int = 1000) -> dict[str, float]:
    """Root mean square and largest error of ``f^-1(f(z)) - z`` per dimension, as the flow is kept (`Flow.secure`)."""
    there: Any
    if isinstance(sampler, TeacherSampler):
        there = partial(integrate, sampler.teacher, n_steps=sampler.n_steps)
        z, back = sampler.teacher.prior.sample(n, generator), partial(there, reverse=True)
    else:
        there, back = sampler.bijection, sampler.bijection.inverse
        z = sampler.prior.sample(n, generator, sampler.dtype).double()
    with torch.no_grad():
        error = flows.round_trip(there, back, z, sampler.coordinates.circular).double()
    bits = 64 if getattr(sampler, "dtype", None) == torch.float64 else 32
    found = {"round_trip_rms": float(error.square().mean().sqrt()), "round_trip_max": float(error.abs().max())}
    return found | {"bits": bits}


def _speed(sampler: Any, n: int) -> dict[str, float]:
    """Seconds for 200,000 samples with likelihoods, scaled from `n`; on a GPU, where few take as long, from more."""
    n = min(n, LIKELIHOODS)
    device = sampler.coordinates.circular.device
    if device.type == "cuda":
        n = TEACHER_CHUNK if isinstance(sampler, TeacherSampler) else LIKELIHOODS
        sampler.sample(n, torch.Generator().manual_seed(1))  # memory is taken once
    clock = clock_of(device)
    synchronize(device)
    began = clock()
    sampler.sample(n, torch.Generator().manual_seed(1))
    synchronize(device)
    return {"seconds_200k": (clock() - began) * LIKELIHOODS / n, "seconds_200k_measured_on": n}


def _ramachandran(drawn: evaluation.FlowSamples, reference: np.ndarray, molecule: MolecularSystem) -> Any:
    finite = np.isfinite(drawn.positions).all(axis=(1, 2))
    both = molecule.backbone_residues[0]
    a, r = (metrics.dihedrals(x, both).T for x in (drawn.positions[finite], reference))
    return plots.ramachandran(
        {"reference": (r[0], r[1]), "samples": (a[0], a[1]), "reweighted": (a[0], a[1], drawn.log_weights[finite])}
    )
