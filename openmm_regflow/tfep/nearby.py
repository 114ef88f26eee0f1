"""Maps between states that resemble each other: two temperatures, two force fields, a restraint on and off.

A coupling of samples carries too much noise here: in sixty dimensions the statistical error of a learned affine map is
larger than the change. The map is therefore built to be the identity wherever the samples say nothing:

* torsions stay, or with energies move by a small circular spline flow that starts at the identity;
* every stiff feature is scaled and shifted about its mean for the given torsions, with scales and shifts shrunk
  towards a common scale and no shift by as much as they scatter from sampling alone (empirical Bayes: Efron & Morris
  1973, J. Am. Stat. Assoc. 68, 117).

With energies all of this is then trained, the shifts as functions of the torsions. The loss is the spread of the works
in both directions, which vanishes for a perfect map together with its gradient's noise (log-variance divergence:
Richter et al. 2020, arXiv 2010.10436). The mean work of the variational bound has no such property, and overfits a few
thousand samples within a hundred steps.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from openmm_regflow.bijections import Bijection, Composition
from openmm_regflow.bijections.couplings import SplineCoupling
from openmm_regflow.coordinates import CoordinateMap
from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.networks import MLP
from openmm_regflow.tfep.learned import MIN_SAMPLES
from openmm_regflow.tfep.pipeline import CoordinatesMap, State, _tensor
from openmm_regflow.training import Batches, TrainConfig, train
from openmm_regflow.units import thermal_energy

#: Harmonics of each torsion in the conditional means of the stiff features.
HARMONICS = 3
#: Step of the torsional part of a shift relative to that of its constant part, as it has ten times the coefficients.
DRIFT_STEP = 0.1
#: Training with energies: short, as the map starts at the identity.
TRAINING: dict[str, Any] = {
    "steps": 200, "batch_size": 256, "learning_rate": 3e-3, "ema": 0.95, "warmup": 5, "weight_decay": 0.0,
    "validate_every": 25, "patience": 8,
}  # fmt: skip


def harmonics(t: Tensor) -> Tensor:
    """1, cos(n t) and sin(n t) of each torsion, `(n, 1 + 2 * HARMONICS * k)` from `(n, k)` [rad]."""
    waves = [f(n * t) for n in range(1, HARMONICS + 1) for f in (torch.cos, torch.sin)]
    return torch.cat([torch.ones_like(t[:, :1]), *waves], dim=1)


def shrinkage(value_n: Tensor, variance_n: Tensor) -> Tensor:
    """Weights `(n,)` of noisy values against zero: tau^2 / (tau^2 + variance), tau^2 their spread beyond the noise."""
    tau = (value_n.square() - variance_n).mean().clamp_min(0.0)
    return tau / (tau + variance_n)


class NearbyMap(Bijection):
    """Features near the identity: torsions by a flow, stiff features by a scale and shift about their torsional mean.

    ``t' = T(t)``, ``s' = mu(t') + shift + drift(t') + scale (s - mu(t))`` with one mu for both states, so that log|det|
    is log|det T| + sum(log scale). The drift starts at zero.

    Args:
        circular: `(dim,)` bool.
        mean: `(1 + 2 * HARMONICS * n_circular, n_stiff)` coefficients of mu.
        log_scale: `(n_stiff,)`.
        shift: `(n_stiff,)`.
        torsions: bijection of `(n, n_circular)`, or None for the identity.
    """

    circular: Tensor
    mean: Tensor

    def __init__(
        self, circular: Tensor, mean: Tensor, log_scale: Tensor, shift: Tensor, torsions: Bijection | None
    ) -> None:
        super().__init__()
        self.register_buffer("circular", circular)
        self.register_buffer("mean", mean)
        self.log_scale, self.shift = nn.Parameter(log_scale), nn.Parameter(shift)
        self.drift = nn.Parameter(torch.zeros_like(mean))
        self.torsions = torsions

    @classmethod
    def fit(cls, circular: Tensor, a: Tensor, b: Tensor, torsions: Bijection | None = None) -> "NearbyMap":
        """From features `(n, dim)` of A and `(m, dim)` of B; no energies."""
        a, b = a.double(), b.double()
        stiff, both = ~circular, torch.cat([a, b])
        design = harmonics(both[:, circular])
        ridge = torch.eye(design.shape[1]).to(design)
        mean = torch.linalg.solve(design.T @ design + ridge, design.T @ both[:, stiff])
        rests = [v[:, stiff] - harmonics(v[:, circular]) @ mean for v in (a, b)]
        var_a, var_b = (r.var(0) for r in rests)
        log_scale = 0.5 * (var_b / var_a).log()
        noise = torch.full_like(log_scale, 0.5 / len(a) + 0.5 / len(b))  # of a Gaussian's log standard deviation
        common = log_scale.mean()
        log_scale = common + shrinkage(log_scale - common, noise) * (log_scale - common)
        shift = rests[1].mean(0) - rests[0].mean(0)
        shift = shrinkage(shift, var_a / len(a) + var_b / len(b)) * shift
        return cls(circular, mean.float(), log_scale.float(), shift.float(), torsions)

    def _torsions(self, t: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.torsions is None:
            return t, t.new_zeros(len(t))
        return self.torsions.inverse(t) if inverse else self.torsions(t)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """A to B."""
        t, log_det = self._torsions(z[:, self.circular], False)
        waves = harmonics(t)
        rest = z[:, ~self.circular] - harmonics(z[:, self.circular]) @ self.mean
        rest = rest * self.log_scale.exp() + self.shift + DRIFT_STEP * (waves @ self.drift)
        return self._joined(z, t, rest), log_det + self.log_scale.sum()

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """B to A."""
        t, log_det = self._torsions(y[:, self.circular], True)
        waves = harmonics(y[:, self.circular])
        rest = y[:, ~self.circular] - waves @ self.mean - self.shift - DRIFT_STEP * (waves @ self.drift)
        return self._joined(y, t, rest * (-self.log_scale).exp()), log_det - self.log_scale.sum()

    def _joined(self, like: Tensor, t: Tensor, rest: Tensor) -> Tensor:
        out = torch.empty_like(like)
        out[:, self.circular] = t
        out[:, ~self.circular] = rest + harmonics(t) @ self.mean
        return out


def torsion_flow(n: int, n_layers: int = 4, hidden: int = 16, n_bins: int = 8) -> Bijection | None:
    """Circular spline couplings of ``n`` angles that start at the identity; None where there are fewer than two."""
    if n < 2:
        return None
    circle, place = torch.ones(n, dtype=torch.bool), torch.arange(n)
    network = partial(MLP, hidden=hidden, depth=1)
    return Composition([SplineCoupling((place + k) % 2 == 0, circle, network, n_bins) for k in range(n_layers)])


@dataclass(frozen=True)
class WorkSpread:
    """Spread of forward and of reverse works [kT^2] about their medians, quadratic up to ``delta``, then linear.

    Attributes:
        coordinates: features <-> positions.
        state_a: start; its potential must be differentiable.
        state_b: end; likewise.
        delta: [kT].
    """

    coordinates: CoordinateMap
    state_a: State
    state_b: State
    delta: float = 2.0

    def __call__(
        self, bijection: Bijection, batch: tuple[Tensor, ...], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch of features of A, of B `(n, dim)`, and of their own reduced energies `(n,)` [kT]."""
        y, forward = bijection(batch[0])
        x, reverse = bijection.inverse(batch[1])
        w_f = self.reduced(self.state_b, y) - forward - batch[2]
        w_r = self.reduced(self.state_a, x) - reverse - batch[3]
        parts = {"forward": self._spread(w_f), "reverse": self._spread(w_r)}
        return torch.stack(list(parts.values())).sum(), parts

    def reduced(self, state: State, features: Tensor) -> Tensor:
        """Reduced energy less the volume element of the coordinates [kT], `(n,)`; NaN outside the chart."""
        positions, log_volume = self.coordinates.to_positions(features.double())
        fine = torch.isfinite(positions).flatten(1).all(1)
        u = torch.full_like(log_volume, math.nan)
        u[fine] = torch.as_tensor(state.potential(positions[fine])).to(u) / thermal_energy(state.temperature)
        return u - log_volume

    def _spread(self, works: Tensor) -> Tensor:
        fine = works[torch.isfinite(works)]
        if len(fine) < 2:
            raise InsufficientDataError("the map carries a whole batch outside the coordinates")
        away = fine - fine.median().detach()
        return 2.0 * nn.functional.huber_loss(away, torch.zeros_like(away), delta=self.delta)


def fit_nearby_map(
    coordinates: CoordinateMap,
    positions_a: Any,
    positions_b: Any,
    states: tuple[State, State] | None = None,
    *,
    config: TrainConfig | None = None,
) -> CoordinatesMap:
    """A map between states that resemble each other, from few samples.

    Args:
        coordinates: internal coordinates fitted to samples of both states.
        positions_a: `(n, n_atoms, 3)` [nm or Quantity] training samples of A.
        positions_b: `(m, n_atoms, 3)` training samples of B.
        states: (state_a, state_b) with differentiable potentials, to train the map; None for scales and constant
            shifts of the stiff coordinates alone, which need no energies.
        config: of that training, in which a fifth of the samples validates; `TRAINING` by default.

    Returns:
        The map, in evaluation mode. Evaluate it on samples that are not among the ones given here.

    Raises:
        InputError: mismatched atoms.
        InsufficientDataError: fewer than 20 samples of a state.
        DivergenceError: training did not recover.
    """
    x_a, x_b = _tensor(positions_a), _tensor(positions_b)
    if min(len(x_a), len(x_b)) < MIN_SAMPLES:
        raise InsufficientDataError(f"{len(x_a)} and {len(x_b)} samples; a map needs at least {MIN_SAMPLES} of each")
    if x_a.shape[1:] != x_b.shape[1:] or x_a.shape[1] != coordinates.n_atoms:
        raise InputError(f"positions {tuple(x_a.shape)}, {tuple(x_b.shape)} do not fit {coordinates.n_atoms} atoms")
    config = config or TrainConfig.model_validate(TRAINING)
    a, b = (coordinates.features_of(x)[0].float() for x in (x_a, x_b))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        torsions = torsion_flow(int(coordinates.circular.sum())) if states is not None else None
    bijection = NearbyMap.fit(coordinates.circular, a, b, torsions).to(a.device)
    if states is not None:
        _train(bijection, WorkSpread(coordinates, *states), a, b, config)
    return CoordinatesMap(coordinates, bijection.double().eval(), (positions_a, positions_b))


def _train(bijection: NearbyMap, loss: WorkSpread, a: Tensor, b: Tensor, config: TrainConfig) -> None:
    """Trains the whole map; the last fifth of the samples, which are in order of time, validates."""
    n = min(len(a), len(b))
    with torch.no_grad():
        columns = [a[:n], b[:n], loss.reduced(loss.state_a, a[:n]), loss.reduced(loss.state_b, b[:n])]
    cut = n - max(2, n // 5)
    held = tuple(v[cut:] for v in columns)
    generator = torch.Generator().manual_seed(config.seed)

    def validation(module: Any) -> float:
        with torch.no_grad():
            return float(loss(module, held, generator)[0])

    batches = Batches(tuple(v[:cut] for v in columns), min(config.batch_size, cut), config.seed)
    train(bijection, loss, batches, config, validation=validation)
