"""Maps learned from samples of the two states: RegFlow regression on optimal-transport or reflow pairs, refined if
wished.

The regression needs no energies. Reflow pairs are ends of the paths of a teacher trained by flow matching between the
two ensembles. The refinement minimises the two-sided variational bound: the mean forward work is
at least delta_f and the mean reverse work at least -delta_f, with equality for a perfect map (Wirnsberger et al.
2020, arXiv 2002.04913, section III); it needs potentials that torch can differentiate.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmm_regflow import flows
from openmm_regflow.bijections import Bijection
from openmm_regflow.coordinates import CoordinateMap
from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.objectives import FlowMatchingLoss, RegFlowLoss
from openmm_regflow.targets import MAX_EXACT, Pairs, minibatch_coupling, optimal_transport_pairs
from openmm_regflow.teachers import VectorField, integrate
from openmm_regflow.tfep.pipeline import AffineMap, CoordinatesMap, State, _tensor
from openmm_regflow.training import Batches, TrainConfig, train
from openmm_regflow.units import thermal_energy

#: Fewest samples of either state from which a map is trained.
MIN_SAMPLES = 20


@dataclass(frozen=True)
class WorkLoss:
    """Mean forward plus mean reverse work [kT], an upper bound of zero width for a perfect map.

    Attributes:
        coordinates: features <-> positions.
        state_a: start; its potential must be differentiable.
        state_b: end; likewise.
        cap: energies above it [kT] enter by their logarithm, so that one clash does not drown a batch.
    """

    coordinates: CoordinateMap
    state_a: State
    state_b: State
    cap: float = 1e3

    def __call__(
        self, bijection: Bijection, batch: tuple[Tensor, ...], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch of features (of A, of B), both `(n, dim)`."""
        y, forward = bijection(batch[0])
        x, reverse = bijection.inverse(batch[1])
        parts = {
            "forward": (self._reduced(self.state_b, y) - forward).mean(),
            "reverse": (self._reduced(self.state_a, x) - reverse).mean(),
        }
        return torch.stack(list(parts.values())).sum(), parts

    def _reduced(self, state: State, features: Tensor) -> Tensor:
        """Energy less the volume element of the coordinates [kT], `(n,)`; rows outside the chart are left out."""
        positions, log_volume = self.coordinates.to_positions(features.double())
        fine = torch.isfinite(positions).flatten(1).all(1)
        if not bool(fine.any()):
            raise InsufficientDataError("the map carries a whole batch outside the coordinates; train it longer first")
        u = torch.as_tensor(state.potential(positions[fine])).to(log_volume) / thermal_energy(state.temperature)
        u = torch.where(u > self.cap, self.cap + torch.log1p((u - self.cap).clamp_min(0.0)), u)
        return u[torch.isfinite(u)].mean() - log_volume[fine].mean()


def _matched(n: int, features: Tensor, generator: torch.Generator) -> Tensor:
    """``n`` rows, all different where there are enough, otherwise with repeats."""
    rows = torch.randperm(len(features), generator=generator)
    if len(features) < n:
        extra = torch.randint(len(features), (n - len(features),), generator=generator)
        rows = torch.cat([rows, extra])
    return features[rows[:n]]


def transport_pairs(a: Tensor, b: Tensor, circular: Tensor, coupling: str) -> Pairs:
    """Regression targets for features `(n, dim)` of A, from as many of B.

    Args:
        a: features of A.
        b: features of B.
        circular: `(dim,)` bool.
        coupling: ``full``: the exact optimal-transport coupling over all features. ``torsional``: the exact coupling
            over the circular features (soft torsions) alone, and for the others the Gaussian optimal-transport map.
            In many dimensions a full coupling of few samples pairs the stiff coordinates at random, and regression on
            it shrinks them towards their mean; their distributions are nearly Gaussian, so that the affine map is
            the better target.

    Raises:
        InputError: unknown coupling.
        InsufficientDataError: fewer samples than stiff features.
    """
    if coupling not in ("full", "torsional"):
        raise InputError(f"coupling is {coupling!r}; choose 'full', 'torsional', 'aligned' or 'reflow'")
    if coupling == "full" or not bool(circular.any()) or bool(circular.all()):
        return optimal_transport_pairs(a, b, circular)
    pairs = optimal_transport_pairs(a[:, circular], b[:, circular], circular[circular])
    y = torch.empty_like(a)
    y[:, circular] = pairs.y
    stiff = a[:, ~circular].double()
    y[:, ~circular] = AffineMap.fit(stiff, b[:, ~circular]).forward(stiff)[0].to(y.dtype)
    return Pairs(a, y)


def aligned_pairs(coordinates: CoordinateMap, x_a: Tensor, x_b: Tensor) -> Pairs:
    """Regression targets by the exact optimal-transport coupling of frames, over the squared distances of their atoms
    after superposition (Klein et al. 2023, arXiv 2306.15030, section 4).

    Args:
        coordinates: features <-> positions.
        x_a: frames of A `(n, n_atoms, 3)` [nm].
        x_b: as many of B.

    Returns:
        Features of A and of the frames of B that they go to, `(n, dim)` each.
    """
    a, b = ((x - x.mean(1, keepdim=True)).flatten(1) for x in (x_a, x_b))
    coupled = optimal_transport_pairs(a, b, torch.zeros(a.shape[1], dtype=torch.bool), groups=[])
    z, y = (coordinates.to_features(v.view(x_a.shape))[0].float() for v in (coupled.z, coupled.y))
    return Pairs(z, y)


def reflow_between(
    a: Tensor, b: Tensor, circular: Tensor, config: TrainConfig, *, hidden: int = 128, depth: int = 3, n_steps: int = 20
) -> Pairs:
    """Pairs of features at both ends of the paths of a teacher between two ensembles, from samples of either.

    The teacher is trained by flow matching with minibatch optimal-transport coupling, so its paths are nearly straight;
    its map is deterministic, and regression on it does not shrink the stiff coordinates.

    Args:
        a: features of A `(n, dim)`.
        b: features of B `(m, dim)`.
        circular: `(dim,)` bool.
        config: training of the teacher.
        hidden: width of its residual MLP.
        depth: its blocks.
        n_steps: midpoint steps of the ODE.

    Returns:
        ``n + m`` pairs (of A, of B).

    Raises:
        DivergenceError: training did not recover.
    """
    teacher = VectorField(circular.cpu(), "mlp", hidden, depth, config.seed).to(circular.device)
    generator = torch.Generator().manual_seed(config.seed)
    n = max(len(a), len(b))
    data = _matched(n, a, generator), _matched(n, b, generator)
    loss: Any = FlowMatchingLoss(teacher.prior, minibatch_coupling(circular))
    train(teacher, loss, Batches(data, min(config.batch_size, n), config.seed), config)
    with torch.no_grad():
        ends = integrate(teacher.eval(), a, n_steps=n_steps)[0]
        starts = integrate(teacher, b, n_steps=n_steps, reverse=True)[0]
    return Pairs(torch.cat([a, starts]), torch.cat([ends, b]))


def fit_map(
    coordinates: CoordinateMap,
    positions_a: Any,
    positions_b: Any,
    *,
    coupling: str = "torsional",
    architecture: str = "spline",
    n_layers: int = 6,
    hidden: int = 64,
    max_pairs: int = 3000,
    config: TrainConfig | None = None,
    forward_backward: float = 1e-5,
    target_noise: float = 0.0,
    refine: tuple[State, State] | None = None,
    refine_config: TrainConfig | None = None,
    teacher_config: TrainConfig | None = None,
) -> CoordinatesMap:
    """Train a map A -> B by regression on pairs of their samples (RegFlow with OT or reflow targets).

    Args:
        coordinates: features <-> positions, fitted to samples of both states.
        positions_a: `(n, n_atoms, 3)` [nm or Quantity] training samples of A.
        positions_b: `(m, n_atoms, 3)` training samples of B.
        coupling: ``torsional`` or ``full``, exact optimal transport, see :func:`transport_pairs` (the same for
            coordinates without torsions); ``aligned``, the same by superposed atoms, see :func:`aligned_pairs`; or
            ``reflow``, see :func:`reflow_between`.
        architecture: ``spline``, ``real_nvp``, ``res_nvp`` or ``jet``.
        n_layers: couplings.
        hidden: width of the conditioners.
        max_pairs: size of the coupling (memory and time grow faster than its square); a state with fewer samples
            is repeated, with ``target_noise`` to blur the repeats.
        config: of the regression; a short run by default.
        forward_backward: weight of the self-consistency term.
        target_noise: standard deviation of noise added to the targets [features].
        refine: (state_a, state_b) with differentiable potentials, to go on with the variational bound.
        refine_config: of that phase.
        teacher_config: training of the teacher of ``reflow``; ``config`` by default.

    Returns:
        The map, in evaluation mode. Evaluate it on samples that are not among the ones given here.

    Raises:
        InputError: mismatched atoms, an unknown architecture or coupling.
        InsufficientDataError: fewer than 20 samples of a state.
        DivergenceError: training did not recover.
    """
    x_a, x_b = _tensor(positions_a), _tensor(positions_b)
    if min(len(x_a), len(x_b)) < MIN_SAMPLES:
        raise InsufficientDataError(f"{len(x_a)} and {len(x_b)} samples; a map needs at least {MIN_SAMPLES} of each")
    if x_a.shape[1:] != x_b.shape[1:] or x_a.shape[1] != coordinates.n_atoms:
        raise InputError(f"positions {tuple(x_a.shape)}, {tuple(x_b.shape)} do not fit {coordinates.n_atoms} atoms")
    config = config or TrainConfig.model_validate({"steps": 2000, "batch_size": 256, "learning_rate": 2e-3})
    size = {"name": architecture, "n_layers": n_layers, "hidden": hidden, "depth": 2, "seed": config.seed}
    if architecture == "spline":
        size |= {"n_bins": 8, "bound": 6.0}
    bijection = flows.build(coordinates, size).bijection.to(coordinates.circular.device)
    a, b = (coordinates.features_of(x)[0].float() for x in (x_a, x_b))
    generator = torch.Generator().manual_seed(config.seed)
    if coupling == "reflow":
        pairs = reflow_between(a, b, coordinates.circular, teacher_config or config)
    else:
        n = min(max(len(a), len(b)), max_pairs, MAX_EXACT)
        rows = [_matched(n, torch.arange(len(v)), generator) for v in (a, b)]
        if coupling == "aligned":
            pairs = aligned_pairs(coordinates, x_a[rows[0]], x_b[rows[1]])
        else:
            pairs = transport_pairs(a[rows[0]], b[rows[1]], coordinates.circular, coupling)
    loss: Any = RegFlowLoss(coordinates.circular, forward_backward=forward_backward, target_noise=target_noise)
    train(bijection, loss, Batches((pairs.z, pairs.y), min(config.batch_size, len(pairs.z)), config.seed), config)
    if refine is not None:
        _refine(bijection, coordinates, a, b, refine, refine_config or config)
    # Trained in float32, evaluated in float64: inverse and log-determinant then agree to rounding.
    return CoordinatesMap(coordinates, bijection.double().eval(), (positions_a, positions_b))


def _refine(
    bijection: Bijection, coordinates: CoordinateMap, a: Tensor, b: Tensor, states: tuple[State, State],
    config: TrainConfig,
) -> None:  # fmt: skip
    """The variational phase; a fifth of the samples validates, and steps after the best validation are undone.

    With few samples of one state the bound is soon fulfilled on those alone, and worse everywhere else.
    """
    generator = torch.Generator().manual_seed(config.seed + 1)
    (a, a_held), (b, b_held) = (_held_out(v, generator) for v in (a, b))
    n = max(len(a), len(b))
    data = _matched(n, a, generator), _matched(n, b, generator)
    loss: Any = WorkLoss(coordinates, *states)

    def validation(module: Any) -> float:
        with torch.no_grad():
            return float(loss(module, (a_held, b_held), generator)[0])

    train(bijection, loss, Batches(data, min(config.batch_size, n), config.seed), config, validation=validation)


def _held_out(features: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four fifths and one fifth of the rows, at random; at most 1000 validate."""
    rows = torch.randperm(len(features), generator=generator)
    n = max(1, min(len(features) // 5, 1000))
    return features[rows[n:]], features[rows[:n]]
