"""Energy-based refinement: forward KL on the flow's own reweighted samples, with a trust region set by the ESS.

A pool of flow samples, weighted by the target, is a sample of the target: lowering KL(p || q) on it has, unlike
reverse KL, no reward for dropping a mode (e.g. Mueller et al. 2019, arXiv 1808.03856). Its weakness is weight
concentration. Here the loss has a control variate that vanishes at the optimum (``objectives.GeneralisedKLLoss``),
training frames are mixed into the pool as a defensive part, so that no weight is large where they were, weights are
truncated at sqrt(n) times their mean (Ionides 2008), every sample is used once, one optimiser goes through all pools
(new moments would shake the weights at the start of each), and a round that raises the divergence, as a fresh pool
shows it, is undone. Where a Markov kernel of the target is given, the frames move before
every pool, so that these are not learnt by heart either.

KL(p || q) counts a spot where q is a thousand times too low by the logarithm of that, the ESS by the thousand. With
``tail`` = a the weights get a factor (p/q)^a, which is the gradient of the alpha-divergence E_q[(p/q)^(1 + a)]; with
a = 1 that is the variance of the weights (alpha = 2 of Midgley et al. 2023, arXiv 2208.01893).
"""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from openmm_regflow import ranks, reweighting
from openmm_regflow.errors import IncompatibleFlowError, InputError, InsufficientDataError, warn_once
from openmm_regflow.files import digest, read_safetensors, write_safetensors
from openmm_regflow.flows import Flow, origin
from openmm_regflow.frames import Indicator, Mover, rare_frames
from openmm_regflow.graphs import Gradients
from openmm_regflow.mixtures import one_flow
from openmm_regflow.objectives import GeneralisedKLLoss, score
from openmm_regflow.pools import Anchors, Pool, draw
from openmm_regflow.slopes import CPU_PART, DEVICE_PART, differentiable
from openmm_regflow.training import Batch, Batches, adamw, average_into, cosine, pack_optimizer, unpack_optimizer

CHECKPOINT_KIND = "openmm_regflow.refinement"
CHECKPOINT_VERSION = 3
#: Key of a flow's metadata: how many refinements it has had.
REFINEMENTS = "refinements"
#: Steps of linear warm-up, once: the optimiser's moments are then those of the pools.
WARMUP = 30


class RefineConfig(BaseModel):
    """Settings of the refinement; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = Field(False, description="needs energies in training")
    rounds: int = Field(5, ge=1)
    pool: int = Field(50_000, ge=100, description="flow samples, and energies, per round")
    batch_size: int = Field(1024, ge=1)
    learning_rate: float = Field(4e-4, gt=0, description="of the first round; halved by every round that is undone")
    final_rate: float = Field(0.05, ge=0, le=1, description="of the last round, as a fraction; between, a cosine")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    ema: float = Field(0.98, ge=0, lt=1)
    anchors: int = Field(10_000, ge=0, description="frames mixed into every pool, each time others; they bound weights")
    anchor_moves: int = Field(0, ge=0, description="Monte Carlo trajectories of every anchor before each pool")
    clip_top: float = Field(0.0, ge=0, lt=1, description="fraction of the largest weights cut to the next ones")
    rare_share: float = Field(
        0.0, ge=0, lt=1, description="of the target that is trained for, at least this share in the watched sets"
    )
    tail: float = Field(
        0.0, ge=0, lt=1, description="power of p/q in the weights: 0 lowers KL(p || q), near 1 the weights' variance"
    )
    tail_after: float = Field(0.0, ge=0, lt=1, description="share of the rounds after which tail begins")
    path: float = Field(
        0.0, ge=0, le=1, description="share of the path gradient, by forces: fewer rounds, each twice as long"
    )
    precision: Literal["float32", "mixed"] = Field(
        "float32", description="mixed: gradients by products in bfloat16, on CPUs that gain by it"
    )
    tolerance: float = Field(0.9, gt=0, le=1, description="undo a round if exp(-KL) is below this part of the best")
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _effective(self) -> "RefineConfig":
        if self.anchor_moves and not self.anchors:
            raise ValueError("anchor_moves are of anchors, and these are 0; leave them out")
        if self.tail_after and not self.tail:
            raise ValueError("tail_after says when tail begins, and that is 0; leave it out")
        return self


@dataclass(frozen=True)
class Round:
    """One pool of fresh samples, before it was trained on.

    Attributes:
        energies: evaluations so far.
        ess: Kish fraction of the pool.
        ess_truncated: without the top 0.2 % of weights.
        divergence: KL(p || q) [nat], from the pool and its anchors; what a round is judged by.
        divergence_error: its standard error [nat], that of the target's normalisation in it.
        occupied: weighted fraction in each watched set.
        undone: the training before this pool made it worse and was undone.
    """

    energies: int
    ess: float
    ess_truncated: float
    divergence: float
    divergence_error: float
    occupied: tuple[float, ...]
    undone: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def truncate(log_weights: np.ndarray, top: float = 0.0) -> np.ndarray:
    """Weights `(n,)` of mean one, cut at sqrt(n) times their mean (Ionides 2008, equation 3) or lower.

    Args:
        log_weights: `(n,)`.
        top: fraction of the largest weights that are lowered to the largest of the rest.
    """
    w = reweighting.normalised_weights(log_weights)
    w = np.minimum(w, w.mean() * np.sqrt(len(w)))
    if top:
        w = np.minimum(w, np.quantile(w, 1.0 - top))
    return w / w.mean()


class _Learner:
    """The weights that are trained, their optimiser, and the average that pools are drawn from (the flow's own)."""

    def __init__(self, flow: Flow, config: RefineConfig) -> None:
        self.flow, self.config, self.peers = flow, config, ranks.current()
        self.live = copy.deepcopy(flow.bijection)
        self.optimizer = adamw(self.live, config.learning_rate, weight_decay=0.0)
        self.loss = GeneralisedKLLoss(flow.prior, config.path)
        self.gradients = Gradients(self.loss.of, self.live, config.precision)
        self.steps = 0

    def go_back(self, weights: dict[str, Tensor]) -> None:
        """Put the flow, and what is trained, to these weights; the optimiser keeps its moments."""
        self.flow.bijection.load_state_dict(weights)
        self.live.load_state_dict(weights)

    def learn(self, pool: Pool, k: int, factor: float) -> None:
        """One pass over pool k, each sample seen once, at ``factor`` times its learning rate."""
        c, flow = self.config, self.flow
        fine = torch.isfinite(pool.y).all(1) & torch.isfinite(pool.log_r) & torch.isfinite(pool.log_volume)
        if pool.slope is not None:
            fine &= torch.isfinite(pool.slope).all(1)
        power = c.tail if k >= c.tail_after * c.rounds else 0.0
        tilt = power * pool.log_ratio() if power else 0.0  # 0 times the -inf of an impossible sample is no number
        weights = truncate(pool.log_w + tilt, c.clip_top)
        w = torch.as_tensor(weights, dtype=flow.dtype, device=pool.y.device)[fine]
        # Density of the features, as the loss compares it.
        log_r_y = (pool.log_r - pool.log_volume)[fine].to(flow.dtype)
        data: Batch = (pool.y[fine], log_r_y, w)
        if pool.slope is not None:
            data += (self._tilted(pool.slope[fine], data[0], power),)
        size = min(c.batch_size, len(w))
        size -= size % self.peers.unit(self.loss.every)
        if not size:
            return
        batches = Batches(data, size, c.seed + k)
        self.live.train()
        for step in range(batches.per_epoch):
            turn = (k + step / batches.per_epoch) / c.rounds
            rate = factor * c.learning_rate * cosine(turn, c.final_rate) * min(1.0, (self.steps + 1) / WARMUP)
            self._step(batches(step, torch.Generator()), rate)

    def _tilted(self, slope: Tensor, y: Tensor, power: float) -> Tensor:
        """Slopes of ``p (p/q)^power``, q being the flow that drew the samples, from those of p, `(n, dim)`."""
        if not power:
            return slope

        def own(j: int, rows: slice) -> tuple[Tensor, ...]:
            pieces = y[rows].split(CPU_PART if y.device.type == "cpu" else DEVICE_PART)
            return (torch.cat([score(self.flow.bijection, self.flow.prior, piece)[0] for piece in pieces]),)

        (found,) = self.peers.by_parts(len(y), own)
        return (1.0 + power) * slope - power * found

    def _step(self, batch: Batch, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.gradients(self.peers.slice(batch, self.loss.every))
        self.peers.mean_([p.grad for p in self.live.parameters() if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(self.live.parameters(), self.config.clip)
        if bool(torch.isfinite(norm)):  # a batch that overflows teaches nothing; the next pool judges the rest
            self.optimizer.step()
        self.steps += 1
        average_into(self.flow.bijection, self.live, self.config.ema)


@dataclass
class _Progress:
    """Where a refinement stands: what a checkpoint holds beside the learner.

    Attributes:
        made_of: what the refinement began with, which a resumed one must begin with, too.
    """

    made_of: dict[str, Any]
    factor: float = 1.0
    best: dict[str, Tensor] = field(default_factory=dict)
    best_divergence: float = math.inf
    records: list[Round] = field(default_factory=list)
    anchors: Tensor | None = None

    def save(self, path: Path, learner: _Learner) -> None:
        """Write everything that the next round depends on."""
        tensors = {f"now.{k}": v for k, v in learner.flow.bijection.state_dict().items()}
        tensors |= {f"live.{k}": v for k, v in learner.live.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()} | pack_optimizer(learner.optimizer.state_dict())
        tensors |= {} if self.anchors is None else {"anchors": self.anchors}
        header = {
            "format": CHECKPOINT_KIND,
            "format_version": CHECKPOINT_VERSION,
            "config": learner.config.model_dump(),
            "made of": self.made_of,
            "factor": self.factor,
            "steps": learner.steps,
            "best_divergence": self.best_divergence,
            "records": [r.to_dict() for r in self.records],
        }
        write_safetensors(path, {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, header)

    @classmethod
    def load(cls, path: Path, learner: _Learner, made_of: dict[str, Any]) -> "_Progress":
        """Continue from a checkpoint; the flow gets the weights that it had."""
        header, tensors = read_safetensors(path, CHECKPOINT_KIND, CHECKPOINT_VERSION)
        if header["config"] != learner.config.model_dump():
            raise IncompatibleFlowError(f"{path} is a refinement with other settings; choose another folder")
        others = [name for name, value in made_of.items() if header["made of"].get(name) != value]
        if others:
            raise IncompatibleFlowError(
                f"{path} is a refinement that began with other {' and '.join(others)}; choose another folder"
            )
        learner.flow.bijection.load_state_dict(_named(tensors, "now."))
        learner.live.load_state_dict(_named(tensors, "live."))
        learner.optimizer.load_state_dict(unpack_optimizer(learner.optimizer, tensors))
        learner.steps = header["steps"]
        records = [Round(**{**r, "occupied": tuple(r["occupied"])}) for r in header["records"]]
        best = {k: v.to(learner.flow.device) for k, v in _named(tensors, "best.").items()}
        return cls(made_of, header["factor"], best, header["best_divergence"], records, tensors.get("anchors"))


def _shared(state: _Progress, learner: _Learner) -> _Progress:
    """Progress and learner of rank 0, on every rank."""
    peers = learner.peers
    if peers.size == 1:
        return state
    modules: tuple[Any, ...] = learner.flow.bijection, learner.live, learner.optimizer
    known, learner.steps, *weights = peers.share((vars(state), learner.steps, *(m.state_dict() for m in modules)))
    for module, values in zip(modules, weights, strict=True):
        module.load_state_dict(values)
    known["best"] = {k: v.to(learner.flow.device) for k, v in known["best"].items()}
    return _Progress(**known)


def _made_of(flow: Flow, data: Tensor | None) -> dict[str, Any]:
    """What a refinement begins with, JSON-ready: digests of weights and frames, what the flow is of, temperature."""
    return {
        "weights": digest(flow.bijection.state_dict()),
        "frames": None if data is None else digest({"x": data}),
        "coordinates or system": origin(flow),
        "temperature": flow.metadata.temperature,
    }


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def refine(
    flow: Flow,
    reduced_potential: Callable[[Tensor], Tensor],
    config: RefineConfig,
    *,
    data: Tensor | None = None,
    mover: Mover | None = None,
    watch: list[Indicator] | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> list[Round]:
    """Refine a flow in place; it ends with the weights of the best pool.

    Under ``torchrun`` all ranks call it alike: they share the samples and energies of every pool, the moves of frames
    and every batch, with the result of one process, up to the rounding of sums (and to the energies that each one's
    ``mover`` takes for its tuning). Rank 0 alone writes and reports.

    Args:
        flow: trained; its ESS should be a per cent or more, since every round lives on reweighted samples.
        reduced_potential: positions `(n, n_atoms, 3)` [nm] -> `(n,)` [kT], +inf where impossible.
        config: settings.
        data: frames of the target `(m, n_atoms, 3)` [nm], of which ``config.anchors`` are mixed into every pool.
        mover: a Markov kernel of the target; called ``config.anchor_moves`` times on all anchors before each pool. More
            anchors than frames are then made by repeating frames.
        watch: indicator functions on positions; their weighted populations are reported for every pool, so that a
            lost mode is seen; conformations in any of them get ``config.rare_share``.
        checkpoint: file to write after every round and, if it exists, to continue from.
        progress: called after every round, on rank 0.

    Returns:
        a record of every pool, the last one judging the last training.

    Raises:
        InputError: no sample of a pool has a finite weight, or a batch that the ranks cannot split evenly.
        IncompatibleFlowError: a checkpoint of other settings, or of a refinement of another flow or with other frames.
    """
    peers = ranks.current()
    flow = one_flow(flow, "refinement")
    learner, watch = _Learner(flow, config), watch or []
    peers.check_batch(config.batch_size, learner.loss.every)
    if config.path:
        differentiable(reduced_potential)
    path = Path(checkpoint) if checkpoint is not None and peers.main else None
    made_of = _made_of(flow, data) if path else {}
    # A second refinement with the same seed sees other samples: this flow has learned those of the first. (Not by the
    # weights, which several processes round otherwise than one.)
    known = flow.metadata.training
    seed = ranks.seed_of(config.seed, known.get(REFINEMENTS, 0))
    lift = _lift(watch, data, config.rare_share)
    state = _Progress(made_of)

    def take_up() -> None:
        nonlocal state
        if path and path.exists():
            state = _Progress.load(path, learner, made_of)

    peers.first(take_up)
    state = _shared(state, learner)
    anchors, sloped = None, config.path > 0
    if data is not None and config.anchors:
        anchors = Anchors(data, reduced_potential, config.anchors, mover, config.anchor_moves, seed, sloped)
    if anchors and state.anchors is not None:
        anchors.place(state.anchors.to(anchors.x))
    energies = state.records[-1].energies if state.records else anchors.n_energies if anchors else 0
    for k in range(len(state.records), config.rounds + 1):
        energies += config.pool + (anchors.renew(k) if anchors else 0)
        own = draw(flow, config.pool, reduced_potential, watch, (seed, k), sloped)
        pool = replace(anchors.mix(flow, own, k, watch) if anchors else own, lift=lift)
        record = peers.share(_judge(pool, own, energies))
        margin = max(-math.log(config.tolerance), 3 * record.divergence_error)
        undone = record.divergence > state.best_divergence + margin
        state.records.append(replace(record, undone=undone))
        if progress and peers.main:
            figures = {"ESS": record.ess, "truncated": record.ess_truncated, "KL": record.divergence}
            progress(k, config.rounds, figures | {"factor": state.factor})
        if undone:
            learner.go_back(state.best)
            state.factor *= 0.5
        elif record.divergence < state.best_divergence:
            state.best = {n: v.clone() for n, v in flow.bijection.state_dict().items()}
            state.best_divergence = record.divergence
        if k < config.rounds and not undone:
            learner.learn(pool, k, state.factor)
        if path:
            state.anchors = anchors.x if anchors and config.anchor_moves else None
            state.save(path, learner)
    flow.bijection.load_state_dict(state.best)
    flow.bijection.eval()
    flow.metadata = replace(flow.metadata, training=known | {REFINEMENTS: known.get(REFINEMENTS, 0) + 1})
    return state.records


def _judge(pool: Pool, own: Pool, energies: int) -> Round:
    """The record of a pool with its anchors; ESS and populations are those of the flow's own samples."""
    w = reweighting.normalised_weights(own.log_p_over_r)
    divergence, error = pool.divergence()
    try:
        truncated = reweighting.truncated_effective_sample_size(own.log_p_over_r)
    except InsufficientDataError:  # no more than those few have a weight
        truncated = 0.0
    return Round(
        energies=energies,
        ess=reweighting.effective_sample_size(own.log_p_over_r),
        ess_truncated=truncated,
        divergence=divergence,
        divergence_error=error,
        occupied=tuple(float(w[member].sum()) for member in own.members),
        undone=False,
    )


def _lift(watch: list[Indicator], data: Tensor | None, share: float) -> float:
    """What is added to the log-weights in the watched sets so that these hold `share` of the target, or as before.

    Raises:
        InputError: a share is wanted, and no frames, no watched sets or none of the frames in them.
    """
    if not share:
        return 0.0
    if data is None:
        raise InputError("rare_share needs frames; set it to 0")
    held = float(rare_frames(data, watch).mean())
    if held >= share:
        warn_once(f"refinement.rare_share = {share:g} changes nothing: the watched sets hold {held:.2f} of the frames")
    return max(0.0, math.log(share / (1 - share)) - math.log(held / (1 - held))) if held < 1 else 0.0
