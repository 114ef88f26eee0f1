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
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import brentq
from scipy.special import logsumexp
from torch import Tensor

from openmm_regflow import reweighting
from openmm_regflow.errors import IncompatibleFlowError, InputError
from openmm_regflow.files import digest, read_safetensors, write_safetensors
from openmm_regflow.flows import Flow, origin
from openmm_regflow.frames import Indicator, Mover, memberships, rare_frames
from openmm_regflow.graphs import Gradients
from openmm_regflow.objectives import GeneralisedKLLoss
from openmm_regflow.training import Batch, Batches, adamw, average_into, cosine, pack_optimizer, unpack_optimizer

CHECKPOINT_KIND = "openmm_regflow.refinement"
CHECKPOINT_VERSION = 3
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
    precision: Literal["float32", "mixed"] = Field(
        "float32", description="mixed: gradients by products in bfloat16, on CPUs that gain by it"
    )
    tolerance: float = Field(0.9, gt=0, le=1, description="undo a round if exp(-KL) is below this part of the best")
    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class Round:
    """One pool of fresh samples, before it was trained on.

    Attributes:
        energies: evaluations so far.
        ess: Kish fraction of the pool.
        ess_truncated: without the top 0.2 % of weights.
        divergence: KL(p || q) [nat], from the pool and its anchors; what a round is judged by.
        divergence_error: its standard error [nat].
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
        self.flow, self.config = flow, config
        self.live = copy.deepcopy(flow.bijection)
        self.optimizer = adamw(self.live, config.learning_rate, weight_decay=0.0)
        self.gradients = Gradients(GeneralisedKLLoss(flow.prior).of, self.live, config.precision)
        self.steps = 0

    def go_back(self, weights: dict[str, Tensor]) -> None:
        """Put the flow, and what is trained, to these weights; the optimiser keeps its moments."""
        self.flow.bijection.load_state_dict(weights)
        self.live.load_state_dict(weights)

    def learn(self, pool: "_Pool", k: int, factor: float) -> None:
        """One pass over pool k, each sample seen once, at ``factor`` times its learning rate."""
        c, flow = self.config, self.flow
        fine = torch.isfinite(pool.x).flatten(1).all(1) & torch.isfinite(pool.log_r)
        power = c.tail if k >= c.tail_after * c.rounds else 0.0
        tilt = power * pool.log_ratio() if power else 0.0  # 0 times the -inf of an impossible sample is no number
        weights = truncate(pool.log_w + tilt, c.clip_top)
        w = torch.as_tensor(weights, dtype=flow.dtype, device=pool.x.device)[fine]
        y, log_det = flow.coordinates.features_of(pool.x[fine])
        log_r_y = (pool.log_r[fine] - log_det).to(flow.dtype)  # density of the features, as the loss compares it
        batches = Batches((y.to(flow.dtype), log_r_y, w), min(c.batch_size, len(y)), c.seed + k)
        self.live.train()
        for step in range(batches.per_epoch):
            turn = (k + step / batches.per_epoch) / c.rounds
            rate = factor * c.learning_rate * cosine(turn, c.final_rate) * min(1.0, (self.steps + 1) / WARMUP)
            self._step(batches(step, torch.Generator()), rate)

    def _step(self, batch: Batch, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.gradients(batch)
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
        progress: called after every round.

    Returns:
        a record of every pool, the last one judging the last training.

    Raises:
        InputError: no sample of the first pool has a finite weight.
        IncompatibleFlowError: a checkpoint of other settings, or of a refinement of another flow or with other frames.
    """
    path = None if checkpoint is None else Path(checkpoint)
    made_of = _made_of(flow, data) if path else {}
    learner = _Learner(flow, config)
    watch = watch or []
    lift = _lift(watch, data, config.rare_share)
    state = _Progress.load(path, learner, made_of) if path and path.exists() else _Progress(made_of)
    anchors = _Anchors(data, reduced_potential, config, mover) if data is not None and config.anchors else None
    if anchors and state.anchors is not None:
        anchors.place(state.anchors.to(anchors.x))
    energies = state.records[-1].energies if state.records else len(anchors.x) if anchors else 0
    for k in range(len(state.records), config.rounds + 1):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + k)
        energies += config.pool + (anchors.renew(k, generator) if anchors else 0)
        x, log_q = flow.sample(config.pool, _on(flow.device, generator))
        log_w = _log_weights(flow, x, log_q, reduced_potential)
        mixed = anchors.mix(flow, x, log_q, log_w, generator) if anchors else _Pool(x, log_q, log_q, log_w)
        members = memberships(mixed.x, watch)
        mixed.log_w = mixed.log_w + lift * members.any(0)
        record = _judge(mixed, log_w, members[:, : config.pool], energies)
        margin = max(-math.log(config.tolerance), 3 * record.divergence_error)
        undone = record.divergence > state.best_divergence + margin
        state.records.append(replace(record, undone=undone))
        if progress:
            figures = {"ESS": record.ess, "truncated": record.ess_truncated, "KL": record.divergence}
            progress(k, config.rounds, figures | {"factor": state.factor})
        if undone:
            learner.go_back(state.best)
            state.factor *= 0.5
        elif record.divergence < state.best_divergence:
            state.best = {n: v.clone() for n, v in flow.bijection.state_dict().items()}
            state.best_divergence = record.divergence
        if k < config.rounds and not undone:
            learner.learn(mixed, k, state.factor)
        if path:
            state.anchors = anchors.x if anchors and config.anchor_moves else None
            state.save(path, learner)
    flow.bijection.load_state_dict(state.best)
    flow.bijection.eval()
    return state.records


@dataclass
class _Pool:
    """Samples of a density ``r``, the flow's own or a mixture with it, and their weights ``p / r``.

    Attributes:
        x: positions `(n, n_atoms, 3)` [nm].
        log_q: log-density of the flow `(n,)`.
        log_r: log-density of the pool `(n,)`.
        log_w: log-weights `(n,)`, -inf where there is none.
    """

    x: Tensor
    log_q: Tensor
    log_r: Tensor
    log_w: np.ndarray

    def log_ratio(self) -> np.ndarray:
        """log p/q `(n,)`, ``p/q = (p/r) (r/q)``, where p is normalised by the weights; -inf where there is none."""
        log_p = self.log_w + self.log_r.cpu().numpy() - _log_mean(self.log_w)
        return np.where(np.isfinite(self.log_w), log_p - self.log_q.cpu().numpy(), -np.inf)

    def divergence(self) -> tuple[float, float]:
        """KL(p || q) = E_p[log p/q] [nat], with its error."""
        fine = np.isfinite(self.log_w)
        w = reweighting.normalised_weights(self.log_w[fine])
        log_ratio = self.log_ratio()[fine]
        value = float(np.sum(w * log_ratio))
        return value, float(np.sqrt(np.sum((w * (log_ratio - value)) ** 2)))


def _log_mean(log_w: np.ndarray) -> float:
    return float(logsumexp(log_w)) - math.log(len(log_w))


def log_normalisation(log_p: np.ndarray, log_q: np.ndarray, n: int, m: int) -> float:
    """log of the integral of an unnormalised density p, from n samples of a density q and m of p together.

    The root Z of ``sum_i p_i / (n q_i + m p_i / Z) = Z`` over all samples: Bennett's acceptance ratio, bridge sampling
    (Bennett 1976; Meng & Wong 1996). The mean of p/q over the samples of q alone is what a few of them say as long as
    q is poor.

    Args:
        log_p: `(n + m,)` of all samples, -inf where impossible.
        log_q: `(n + m,)`.
        n: samples of q.
        m: samples of p.
    """
    possible = np.isfinite(log_p) & np.isfinite(log_q)
    log_p, log_q = log_p[possible], log_q[possible]

    def excess(log_z: float) -> float:
        share = log_p - log_z - np.logaddexp(math.log(n) + log_q, math.log(m) + log_p - log_z)
        return float(logsumexp(share))

    middle = float(np.median(log_p - log_q))
    return float(brentq(excess, middle - 700.0, middle + 700.0, xtol=1e-9))


def _on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """The generator, or on a GPU one of its own: millions of normal numbers take a CPU longer than a GPU their flow."""
    if device.type == "cpu":
        return generator
    return torch.Generator(device).manual_seed(generator.initial_seed())


def _judge(pool: _Pool, log_w: np.ndarray, members: np.ndarray, energies: int) -> Round:
    """The record of a pool; ESS and populations are those of the flow's own samples, `members` `(k, n)` theirs."""
    w = reweighting.normalised_weights(log_w)
    divergence, error = pool.divergence()
    return Round(
        energies=energies,
        ess=reweighting.effective_sample_size(log_w),
        ess_truncated=reweighting.truncated_effective_sample_size(log_w),
        divergence=divergence,
        divergence_error=error,
        occupied=tuple(float(w[member].sum()) for member in members),
        undone=False,
    )


class _Anchors:
    """Frames of the target as the defensive part of a pool (Hesterberg 1995; balance heuristic of Veach & Guibas 1995).

    A pool of n flow samples alone cannot show where the flow has too little density: it hardly goes there. With m
    frames of the target among them the pool has the density ``(n q + m p) / (n + m)``, its weights are at most
    ``(n + m) / m``, and a basin that the frames visited cannot be forgotten. The target's normalisation, which ``p``
    needs, comes from both (`log_normalisation`).
    """

    def __init__(
        self,
        data: Tensor,
        reduced_potential: Callable[[Tensor], Tensor],
        config: RefineConfig,
        mover: Mover | None = None,
    ) -> None:
        self._rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed)).to(data.device)
        self._potential, self._mover, self._n_moves = reduced_potential, mover, config.anchor_moves if mover else 0
        self._data, self._n = data, config.anchors if self._n_moves else min(config.anchors, len(data))
        self._take(0)

    def place(self, x: Tensor) -> None:
        """Put the anchors at `x` `(m, n_atoms, 3)` [nm]."""
        self.x = x
        self.u = torch.cat([self._potential(part) for part in x.split(4096)])

    def _take(self, turn: int) -> None:
        """Place frames in the order of `_rows`, round and round: copies that will move may be more than the frames."""
        places = torch.arange(turn * self._n, (turn + 1) * self._n, device=self._rows.device) % len(self._rows)
        self.place(self._data[self._rows[places]].double())

    def renew(self, k: int, generator: torch.Generator) -> int:
        """Other anchors for pool ``k``: moved within the target, or the next of the frames; the energies it took."""
        if self._mover is not None and self._n_moves:
            return self._move(self._mover, generator)
        if k == 0 or len(self._data) <= self._n:
            return 0
        self._take(k)
        return len(self.x)

    def _move(self, mover: Mover, generator: torch.Generator) -> int:
        x, total = self.x, 0
        for _ in range(self._n_moves):
            x, energies = mover(x, generator)
            total += energies
        self.place(x)
        return total + len(x)

    def mix(self, flow: Flow, x: Tensor, log_q: Tensor, log_w: np.ndarray, generator: torch.Generator) -> _Pool:
        """The pool with the anchors in it."""
        frames = flow.coordinates.augment(self.x, generator).to(x)
        log_p_m = (-self.u.to(log_q) + flow.frame_log_density(frames)).cpu().numpy()
        both = torch.cat([log_q, flow.log_prob(frames).to(log_q)])
        n, m = len(x), len(frames)
        log_p = np.concatenate([log_w + log_q.cpu().numpy(), log_p_m])
        log_p = log_p - log_normalisation(log_p, both.cpu().numpy(), n, m)
        log_r = np.logaddexp(math.log(n) + both.cpu().numpy(), math.log(m) + log_p) - math.log(n + m)
        log_ratio = log_p - log_r
        log_ratio[~np.isfinite(log_ratio)] = -np.inf
        return _Pool(torch.cat([x, frames]), both, torch.as_tensor(log_r).to(both), log_ratio)


def _log_weights(flow: Flow, x: Tensor, log_q: Tensor, reduced_potential: Callable[[Tensor], Tensor]) -> np.ndarray:
    u = reduced_potential(x).to(log_q)
    log_w = (-u + flow.frame_log_density(x) - log_q).cpu().double().numpy()
    log_w[~np.isfinite(log_w)] = -np.inf
    if not np.isfinite(log_w).any():
        raise InputError("no sample of the pool has a finite weight; train the flow longer before refining it")
    return log_w


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
    return max(0.0, math.log(share / (1 - share)) - math.log(held / (1 - held))) if held < 1 else 0.0
