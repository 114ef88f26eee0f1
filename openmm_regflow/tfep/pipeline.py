"""From positions, potentials and a map to works, and from works to a result.

A map is any object with ``forward(x) -> (y, log_det)`` and ``inverse(y) -> (x, log_det)``, tensors `(n,
...)` and `(n,)`; a flow between two ensembles is one. A potential is any callable that takes positions `(n,
n_atoms, 3)` [nm] and returns energies `(n,)` [kJ/mol]. A basin is a callable from positions to booleans
`(n,)`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from openmm_regflow import metrics
from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.reweighting import Seed, to_numpy
from openmm_regflow.rigid import N_TRIED
from openmm_regflow.tfep.compatibility import check_states
from openmm_regflow.tfep.estimators import estimate
from openmm_regflow.tfep.results import TargetedFreeEnergy
from openmm_regflow.units import temperature_kelvin, thermal_energy

#: Variance, in units of the mean one, below which a coordinate stands still: rounding of positions is more.
NULL = 1e-13
#: Standard errors between the results with and without a map, of the same samples, that are no chance.
DISAGREEMENT = 6.0

Energy = Callable[[Any], Any]
Basin = Callable[[Any], Any]


class InvertibleMap(Protocol):
    """What a map has to offer; log-determinants are those of the map of positions in their own measure."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A to B: mapped positions and ``log|det dM/dx|``."""

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """B to A: mapped positions and ``log|det dM^-1/dy|``."""


class IdentityMap:
    """Leaves everything in place: plain free energy perturbation."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``x`` and zeros."""
        return x, x.new_zeros(len(x))

    inverse = forward


class AffineMap:
    """``y = mean_b + T (x - mean_a)``: the optimal-transport map between two Gaussians.

    ``T = C_a^-1/2 (C_a^1/2 C_b C_a^1/2)^1/2 C_a^-1/2`` (Peyré & Cuturi 2019, remark 2.31). Exact where both
    states are Gaussian in these coordinates; a baseline elsewhere. Molecules in Cartesian coordinates drift
    and turn, so fit it to internal coordinates (:class:`CoordinatesMap`) or to restrained systems. It is no bijection
    of a circle: a torsion that goes all the way round must be left as it is (:func:`openmm_regflow.tfep.fit_map` does).

    Args:
        mean_a: `(d,)`.
        mean_b: `(d,)`.
        matrix: `(d, d)` symmetric positive definite T.

    Attributes:
        trained_on: samples (of A, of B) that it was fitted to, None for given moments.
    """

    trained_on: tuple[Any, Any] | None = None

    def __init__(self, mean_a: Tensor, mean_b: Tensor, matrix: Tensor) -> None:
        self.mean_a, self.mean_b, self.matrix = mean_a, mean_b, matrix
        self.log_det = float(torch.linalg.slogdet(matrix)[1])

    @classmethod
    def fit(cls, a: Any, b: Any, ridge: float = 1e-9) -> "AffineMap":
        """Moments of samples `(n, ...)` of A and `(m, ...)` of B; ``ridge`` is added to relative variances.

        What stands still in both (frozen atoms) is shifted from its place in A to that in B, and not stretched.

        Raises:
            InputError: a coordinate stands still in one state alone, or a combination of moving ones does in either.
            InsufficientDataError: fewer samples than dimensions on either side.
        """
        x, y = (_tensor(v).reshape(len(v), -1) for v in (a, b))
        still, still_b = ((v - v[:1]).square().mean(0) <= NULL * (v - v[:1]).square().mean() for v in (x, y))
        if len(x) and len(y) and bool((still != still_b).any()):
            raise InputError(
                f"coordinate {int((still != still_b).nonzero()[0])} stands still in the samples of one state and moves "
                "in those of the other; no map between them has a Jacobian"
            )
        moving = (~still).nonzero().flatten()
        if min(len(x), len(y)) <= len(moving) or not len(moving):
            raise InsufficientDataError(
                f"{len(x)} and {len(y)} samples cannot fix a covariance in {len(moving)} dimensions; give more"
            )
        c_a, c_b = (torch.atleast_2d(torch.cov(v[:, moving].T)) for v in (x, y))
        if any(bool(torch.linalg.eigvalsh(c)[:1] <= NULL * c.diagonal().mean()) for c in (c_a, c_b)):
            raise InputError(
                "a combination of coordinates does not vary over the samples of a state, and the Jacobian of no map "
                "follows from them; use coordinates that are free to move"
            )
        c_a, c_b = (c + ridge * c.diagonal().mean() * torch.eye(len(c)).to(c) for c in (c_a, c_b))
        root, inverse = _power(c_a, 0.5), _power(c_a, -0.5)
        matrix = torch.eye(x.shape[1]).to(x)
        matrix[moving[:, None], moving] = inverse @ _power(root @ c_b @ root, 0.5) @ inverse
        fitted = cls(x.mean(0), y.mean(0), matrix)
        fitted.trained_on = (a, b)
        return fitted

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A to B."""
        flat = x.reshape(len(x), -1)
        y = self.mean_b.to(x) + (flat - self.mean_a.to(x)) @ self.matrix.to(x)
        return y.reshape(x.shape), x.new_full((len(x),), self.log_det)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """B to A."""
        flat = y.reshape(len(y), -1) - self.mean_b.to(y)
        x = self.mean_a.to(y) + torch.linalg.solve(self.matrix.to(y), flat.T).T
        return x.reshape(y.shape), y.new_full((len(y),), -self.log_det)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(torch.finfo(matrix.dtype).tiny) ** exponent) @ vectors.T


class CoordinatesMap:
    """A map of features, carried to positions together with the Jacobians of the coordinates.

    Features without a molecule-fixed frame of their own (bonds, angles, torsions) need the volume element of
    the coordinates on both sides: ``log_det = log|dz/dx| + log|det inner| + log|dx'/dz'|``. Leaving it out
    biases delta_f: for one bond stretched from b to b' by 2 log(b'/b).

    Features that leave out the labels of interchangeable atoms (methyl rotors) are no bijection of positions: what is
    mapped keeps the labels that it came with, as a state may tell the atoms apart.

    Args:
        coordinates: object with ``to_features(x) -> (z, log_det)`` and ``to_positions(z) -> (x, log_det)``, and, if
            its features leave out labels, ``turns(x)`` and ``turned(x, turns)`` of
            :class:`~openmm_regflow.coordinates.CoordinateMap`.
        inner: invertible map of features `(n, dim)`.
        trained_on: positions (of A, of B) that trained it, which `free_energy_difference` then refuses to evaluate.
    """

    def __init__(
        self, coordinates: Any, inner: InvertibleMap, trained_on: tuple[Any, Any] | None = None
    ) -> None:
        self.coordinates, self.inner, self.trained_on = coordinates, inner, trained_on

    def _carry(self, x: Tensor, step: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        z, to_features = self.coordinates.to_features(x)
        moved, inside = step(z.to(self._dtype(z)))
        y, to_positions = self.coordinates.to_positions(moved.to(z.dtype))
        if hasattr(self.coordinates, "turns"):
            y = self.coordinates.turned(y, self.coordinates.turns(x))
        return y, to_features + inside.to(z.dtype) + to_positions

    def _dtype(self, z: Tensor) -> torch.dtype:
        """Of the inner map's weights, or of the features where it has none."""
        if isinstance(self.inner, torch.nn.Module):
            return next((p.dtype for p in self.inner.parameters()), z.dtype)
        return z.dtype

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A to B."""
        return self._carry(x, self.inner.forward)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """B to A."""
        return self._carry(y, self.inner.inverse)


def torsion_basin(quadruple: Any, bounds: tuple[float, float]) -> Basin:
    """Indicator of one torsion lying in the arc (low, high] [rad], e.g. ``(0, pi)`` for phi > 0.

    Args:
        quadruple: four atom indices.
        bounds: (low, high) [rad]; high < low for an arc through pi.

    Raises:
        InputError: bounds that are no angles in radians.
    """
    if not max(map(abs, bounds)) <= 2 * math.pi:
        raise InputError(f"bounds {tuple(bounds)} are no angles in radians; convert degrees by numpy.radians")

    def inside(positions: Any) -> np.ndarray:
        return metrics.in_range(metrics.dihedrals(positions, np.asarray(quadruple)[None])[:, 0], bounds)

    return inside


def _tensor(positions: Any) -> Tensor:
    from openmm import unit

    if unit.is_quantity(positions):
        positions = positions.value_in_unit(unit.nanometer)
    return torch.as_tensor(positions).detach().to(torch.float64)


@dataclass(frozen=True)
class State:
    """A thermodynamic state: potential, temperature and, if it is one basin of several, its indicator.

    Attributes:
        potential: callable, `(n, n_atoms, 3)` [nm] -> `(n,)` [kJ/mol].
        temperature: [K or Quantity].
        basin: callable, positions -> booleans `(n,)`, or None for the whole space.

    Raises:
        InputError: the potential is that of constrained dynamics (:class:`~openmm_regflow.tfep.ConstrainedEnergy`) at
            another temperature.
    """

    potential: Energy
    temperature: Any = 300.0
    basin: Basin | None = None

    def __post_init__(self) -> None:
        own = thermal_energy(self.temperature)
        kt = self.potential.kt if hasattr(self.potential, "metric") and hasattr(self.potential, "kt") else None
        if kt is not None and not math.isclose(kt, own, rel_tol=1e-9):
            raise InputError(
                f"the potential carries the metric term of constrained dynamics at {kt / thermal_energy(1.0):g} K, and "
                f"the state is at {own / thermal_energy(1.0):g} K; make it by tfep.state_of(system, temperature)"
            )

    def reduced(self, x: Tensor) -> np.ndarray:
        """Reduced energies `(n,)` [kT]; +inf outside the basin and for energies that are not a number.

        Raises:
            InputError: the potential does not return one energy, or the basin not one boolean, for each configuration.
        """
        energies = torch.as_tensor(self.potential(x)).detach().cpu().to(torch.float64)
        if energies.shape != (len(x),) and energies.shape != (len(x), 1):
            raise InputError(
                f"the potential returned an array of shape {tuple(energies.shape)} for {len(x)} configurations; one "
                "energy [kJ/mol] each is needed"
            )
        u = energies.reshape(-1).numpy() / thermal_energy(self.temperature)
        u = np.where(np.isnan(u), np.inf, u)
        if self.basin is not None:
            u = np.where(self._inside(x), u, np.inf)
        return u

    def _inside(self, x: Tensor) -> np.ndarray:
        """Whether each configuration lies in the basin, bool `(n,)`."""
        inside = to_numpy(self.basin(x))  # type: ignore[misc]
        if inside.shape not in ((len(x),), (len(x), 1)) or inside.dtype != bool:
            raise InputError(
                f"the basin returned {inside.dtype} of shape {inside.shape} for {len(x)} configurations; one boolean "
                "each is needed"
            )
        return inside.reshape(-1)


@dataclass(frozen=True)
class Works:
    """Generalised works in both directions [kT]; +inf where the map left the other state.

    Attributes:
        forward: `(n,)` or `(n_maps, n)`.
        reverse: `(m,)` or `(n_maps, m)`.
    """

    forward: np.ndarray
    reverse: np.ndarray


def _one_way(
    step: Callable[[Tensor], tuple[Tensor, Tensor]], own: State, other: State, x: Tensor, name: str, batch_size: int
) -> np.ndarray:
    """Works ``u_other(step(x)) - u_own(x) - log_det`` `(n,)` of one direction."""
    if len(x) == 0:
        raise InsufficientDataError(f"no samples of state {name}; both states need samples")
    works = []
    for batch in x.split(batch_size):
        with torch.no_grad():
            u_own = own.reduced(batch)
            y, log_det = step(batch)
            if log_det.shape != (len(batch),):
                raise InputError(
                    f"the map returned a log-determinant of shape {tuple(log_det.shape)} for {len(batch)} "
                    "configurations; one each is needed"
                )
            usable = torch.isfinite(y).reshape(len(y), -1).all(dim=1) & torch.isfinite(log_det)
            # Rows that the map could not handle are evaluated at the old place and then counted as infinite.
            safe = torch.where(usable.reshape(-1, *[1] * (y.dim() - 1)), y, batch.to(y))
            w = other.reduced(safe) - u_own - torch.where(usable, log_det, 0.0).cpu().numpy()
        if not np.isfinite(u_own).all():
            raise InputError(
                f"{int((~np.isfinite(u_own)).sum())} samples of state {name} have an infinite energy there or lie "
                "outside its basin; filter the trajectory first"
            )
        works.append(np.where(usable.cpu().numpy(), w, np.inf))
    return np.concatenate(works)


def works(
    maps: Any, state_a: State, state_b: State, positions_a: Any, positions_b: Any, *, batch_size: int = 1000
) -> Works:
    """Generalised works of a map, or of several.

    Args:
        maps: one invertible map, or a sequence of them (multimap).
        state_a: where the maps start.
        state_b: where they lead.
        positions_a: `(n, n_atoms, 3)` [nm or Quantity] samples of A, in order of time.
        positions_b: `(m, n_atoms, 3)` samples of B.
        batch_size: samples evaluated at once.

    Returns:
        Works `(n,)` and `(m,)`; `(n_maps, n)` and `(n_maps, m)` for a sequence of maps.

    Raises:
        InputError: mismatched atoms, a sample of infinite energy in (or outside the basin of) its own state, or works
            that would be no free energy
            (:func:`openmm_regflow.tfep.compatibility.check_states`).
        InsufficientDataError: no samples, or no map.
    """
    x_a, x_b = _tensor(positions_a), _tensor(positions_b)
    if x_a.shape[1:] != x_b.shape[1:]:
        raise InputError(f"samples of A have shape {tuple(x_a.shape)}, of B {tuple(x_b.shape)}; atoms must match")
    several = list(maps) if isinstance(maps, Sequence) else [maps]
    if not several:
        raise InsufficientDataError("an empty list of maps connects nothing; give at least one")
    if len(x_a) and len(x_b):
        check_states(several, x_a, (state_a, state_b), (x_a, x_b))
    forward = np.stack([_one_way(m.forward, state_a, state_b, x_a, "A", batch_size) for m in several])
    reverse = np.stack([_one_way(m.inverse, state_b, state_a, x_b, "B", batch_size) for m in several])
    return Works(forward, reverse) if isinstance(maps, Sequence) else Works(forward[0], reverse[0])


def _row_keys(positions: Any, dtype: torch.dtype) -> set[bytes]:
    return {row.tobytes() for row in _tensor(positions).to("cpu", dtype).numpy()}


def check_disjoint(
    positions: Any,
    trained_on: Any,
    name: str,
    dtype: torch.dtype = torch.float32,
    remedy: str = "evaluate on held-out samples, or use cross_fit to lose none",
) -> None:
    """Refuses evaluation samples that also trained the map.

    Args:
        positions: `(n, ...)` for evaluation.
        trained_on: `(m, ...)`.
        name: of the state.
        dtype: in which rows are compared; that of files, unless both come from one array.
        remedy: of the message.

    Raises:
        InputError: at least one row is in both sets.
    """
    shared = len(_row_keys(positions, dtype) & _row_keys(trained_on, dtype))
    if shared:
        raise InputError(f"{shared} samples of state {name} also trained the map, which biases delta_f; {remedy}")


def mapped_energies(
    maps: Sequence[InvertibleMap], states: Sequence[State], positions: Sequence[Any], *, batch_size: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """What `estimate_states` needs, from states that maps carry into each other (Paliwal & Shirts 2013).

    Every state k has a map M_k to it from a common frame (the first state's own, if its map is the identity). In that
    frame it has the reduced potential ``u_k(M_k(z)) - log|det J_k(z)|``, so that consistent maps are nothing but a
    change of variables, and MBAR applies as it is.

    Args:
        maps: one invertible map for each state.
        states: the states.
        positions: samples `(n_k, n_atoms, 3)` [nm or Quantity] of each state, independent, none of which trained a map.
        batch_size: samples evaluated at once.

    Returns:
        ``u_kn`` `(n_states, n)` [kT] of all samples, grouped by state, and ``n_k`` `(n_states,)`.

    Raises:
        InputError: unequal numbers of maps, states and samples, samples that trained a map (as far as the map knows:
            ``map.trained_on``), or works that would be no free energy
            (:func:`openmm_regflow.tfep.compatibility.check_states`).
    """
    if not len(maps) == len(states) == len(positions):
        raise InputError(
            f"{len(maps)} maps, {len(states)} states and {len(positions)} sets of samples; one of each is needed"
        )
    samples = [_tensor(x) for x in positions]
    for known in (each for one in maps for each in getattr(one, "trained_on", None) or ()):
        for k, x in enumerate(positions):
            check_disjoint(x, known, str(k), remedy="evaluate on held-out samples")
    columns = []
    with torch.no_grad():
        if samples and all(map(len, samples)):
            check_states(maps, maps[0].inverse(samples[0][:N_TRIED])[0], states, samples)
        for own, x in zip(maps, samples):
            for batch in x.split(batch_size):
                z, _ = own.inverse(batch)
                columns.append(np.stack([_in_frame(m, s, z) for m, s in zip(maps, states)]))
    return np.concatenate(columns, axis=1), np.array([len(x) for x in samples])


def _in_frame(one: InvertibleMap, state: State, z: Tensor) -> np.ndarray:
    """``u(M(z)) - log|det J(z)|`` `(n,)`; +inf where the map has no value."""
    x, log_det = one.forward(z)
    usable = torch.isfinite(x).reshape(len(x), -1).all(1) & torch.isfinite(log_det)
    u = state.reduced(torch.where(usable.reshape(-1, *[1] * (x.dim() - 1)), x, z.to(x)))
    return np.where(usable.cpu().numpy(), u - torch.where(usable, log_det, 0.0).cpu().numpy(), np.inf)


def free_energy_difference(
    maps: Any,
    state_a: State,
    state_b: State,
    positions_a: Any,
    positions_b: Any,
    *,
    trained_on: tuple[Any, Any] | None,
    method: str = "bar",
    compare_plain: bool = True,
    batch_size: int = 1000,
    n_resamples: int = 200,
    generator: Seed = None,
) -> TargetedFreeEnergy:
    """delta_f of two states by a map, with the identity map (plain FEP) on the same samples beside it.

    Args:
        maps: one invertible map, or a sequence (multimap).
        state_a: start.
        state_b: end.
        positions_a: `(n, n_atoms, 3)` [nm or Quantity] held-out samples of A in order of time.
        positions_b: `(m, n_atoms, 3)` held-out samples of B.
        trained_on: the samples (of A, of B) that trained the map, to make sure that none is evaluated; None for a map
            that was not trained on data. There is no default on purpose. What a map itself says of its training
            (``map.trained_on``) counts as well.
        method: see :func:`openmm_regflow.tfep.estimate`.
        compare_plain: attach the identity map's result as ``.plain`` (None where it has no overlap at all).
        batch_size: samples evaluated at once.
        n_resamples: bootstrap replicas.
        generator: NumPy generator or seed.

    Raises:
        InputError: training samples among the evaluated ones, mismatched atoms, samples outside their basin.
        InsufficientDataError: no overlap or no samples.
    """
    several = list(maps) if isinstance(maps, Sequence) else [maps]
    for known in (trained_on, *(getattr(one, "trained_on", None) for one in several)):
        if known is not None:
            if len(known) != 2:
                raise InputError("trained_on is (samples of A, samples of B) that trained the map, or None if none did")
            check_disjoint(positions_a, known[0], "A")
            check_disjoint(positions_b, known[1], "B")
    mapped = works(maps, state_a, state_b, positions_a, positions_b, batch_size=batch_size)
    return result_of(
        mapped, state_a, state_b, positions_a, positions_b, method=method, compare_plain=compare_plain,
        batch_size=batch_size, n_resamples=n_resamples, generator=generator,
    )  # fmt: skip


def split(positions: Any, fraction: float = 0.5, gap: int = 0) -> tuple[Any, Any]:
    """Training and evaluation parts of a trajectory: its first ``fraction``, and what follows after ``gap``
    frames.

    Two stretches of time, not a random choice: neighbouring frames are nearly the same configuration.

    Args:
        positions: `(n, n_atoms, 3)`.
        fraction: share that trains.
        gap: frames dropped between the two, about one correlation time.

    Raises:
        InsufficientDataError: a part would be empty.
    """
    cut = int(fraction * len(positions))
    if cut < 1 or cut + gap >= len(positions):
        raise InsufficientDataError(f"{len(positions)} frames cannot be split at {fraction} with a gap of {gap}")
    return positions[:cut], positions[cut + gap :]


def _folds(x: Tensor, k: int, gap: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training, held-out) frame numbers of ``k`` contiguous folds; ``gap`` frames beside a fold train nothing.

    A frame and its repeats (rejected moves) lie in one fold.
    """
    n, index = len(x), np.arange(len(x))
    moved = (x[1:] != x[:-1]).reshape(n - 1, -1).any(1).cpu().numpy()
    starts = np.concatenate([[0], index[1:][moved], [n]])
    edges = starts[np.searchsorted(starts, np.linspace(0, n, k + 1).astype(int))]
    if not np.diff(edges).all():
        raise InsufficientDataError(f"{n} frames, of which {1 + moved.sum()} differ from the one before, are too few "
                                    f"for {k} folds; take fewer or run longer")  # fmt: skip
    return [(index[(index < low - gap) | (index >= high + gap)], index[low:high]) for low, high in pairwise(edges)]


def cross_fit(
    fit: Callable[[Tensor, Tensor], InvertibleMap | Sequence[InvertibleMap]],
    state_a: State,
    state_b: State,
    positions_a: Any,
    positions_b: Any,
    *,
    folds: int = 5,
    gap: int = 0,
    method: str = "bar",
    batch_size: int = 1000,
    n_resamples: int = 200,
    generator: Seed = None,
) -> TargetedFreeEnergy:
    """delta_f from all samples, each evaluated with a map that it did not train.

    K maps are fitted, each without one contiguous fold of A and of B, and evaluated on that fold. Given its
    map, every fold's works obey p_F(w)/p_R(-w) = exp(w - delta_f) with one and the same delta_f, so the
    pooled works do too if forward and reverse shares of the folds agree, and Bennett's equation applies to
    the pool.

    Args:
        fit: function of training samples (of A, of B), tensors, that returns an invertible map, or a sequence of
            them (multimap): then one that fits badly does no harm beside one that fits well.
        state_a: start.
        state_b: end.
        positions_a: `(n, n_atoms, 3)` [nm or Quantity] in order of time.
        positions_b: `(m, n_atoms, 3)`.
        folds: number of folds K, at least 2.
        gap: frames beside a held-out fold that train nothing (about one correlation time).
        method: see :func:`openmm_regflow.tfep.estimate`.
        batch_size: samples evaluated at once.
        n_resamples: bootstrap replicas.
        generator: NumPy generator or seed.

    Raises:
        InputError: fewer than two folds, or a frame that comes back in another fold; repeats of the frame before, as
            of rejected moves, are legal.
        InsufficientDataError: fewer samples than folds, or no overlap.
    """
    mapped = cross_fit_works(
        fit, state_a, state_b, positions_a, positions_b, folds=folds, gap=gap, batch_size=batch_size
    )
    return result_of(
        mapped, state_a, state_b, positions_a, positions_b,
        method=method, batch_size=batch_size, n_resamples=n_resamples, generator=generator,
    )  # fmt: skip


def cross_fit_works(
    fit: Callable[[Tensor, Tensor], InvertibleMap | Sequence[InvertibleMap]],
    state_a: State,
    state_b: State,
    positions_a: Any,
    positions_b: Any,
    *,
    folds: int = 5,
    gap: int = 0,
    batch_size: int = 1000,
) -> Works:
    """Works of every sample under a map that it did not train, in order of time; see :func:`cross_fit`."""
    x_a, x_b = _tensor(positions_a), _tensor(positions_b)
    if folds < 2:
        raise InputError(f"folds is {folds}; cross-fitting needs at least 2")
    if min(len(x_a), len(x_b)) < 2 * folds:
        raise InsufficientDataError(f"{len(x_a)} and {len(x_b)} samples are too few for {folds} folds")
    parts = []
    for (train_a, test_a), (train_b, test_b) in zip(_folds(x_a, folds, gap), _folds(x_b, folds, gap)):
        for x, train, test, name in ((x_a, train_a, test_a, "A"), (x_b, train_b, test_b, "B")):
            check_disjoint(x[test], x[train], name, x.dtype, "give every frame once")
        fitted = fit(x_a[train_a], x_b[train_b])
        parts.append(works(fitted, state_a, state_b, x_a[test_a], x_b[test_b], batch_size=batch_size))
    return Works(*(np.concatenate([getattr(p, side) for p in parts], axis=-1) for side in ("forward", "reverse")))


def common_temperature(state_a: State, state_b: State) -> float | None:
    """Temperature [K] of two states; None if they differ in it: their f then differ by no free energy in kJ/mol."""
    own, other = temperature_kelvin(state_a.temperature), temperature_kelvin(state_b.temperature)
    return own if math.isclose(own, other, rel_tol=1e-9) else None


def result_of(
    mapped: Works,
    state_a: State,
    state_b: State,
    positions_a: Any,
    positions_b: Any,
    *,
    method: str = "bar",
    compare_plain: bool = True,
    batch_size: int = 1000,
    n_resamples: int = 200,
    generator: Seed = None,
) -> TargetedFreeEnergy:
    """The estimate from works, with plain perturbation on the same samples beside it: `free_energy_difference`."""
    keywords: dict[str, Any] = {
        "method": method, "temperature": common_temperature(state_a, state_b), "n_resamples": n_resamples,
        "generator": generator,
    }  # fmt: skip
    result = estimate(mapped.forward, mapped.reverse, **keywords)
    if not compare_plain:
        return result
    try:
        same = works(IdentityMap(), state_a, state_b, positions_a, positions_b, batch_size=batch_size)
        plain = estimate(same.forward, same.reverse, **keywords)
    except InsufficientDataError:
        return result
    return replace(result, plain=plain, verdict=_beside(result, plain))


def _beside(result: TargetedFreeEnergy, plain: TargetedFreeEnergy) -> str:
    """The verdict on a map's result beside that of the identity map, which has no Jacobian that could be wrong."""
    off, error = abs(result.delta_f - plain.delta_f), math.hypot(result.uncertainty, plain.uncertainty)
    if off > DISAGREEMENT * error and all(each.verdict.startswith("reliable") for each in (result, plain)):
        return (
            f"do not trust: without a map the same samples say {plain.delta_f:.4g} ± {plain.uncertainty:.2g} kT, "
            f"{off / error:.0f} standard errors away; check the map's log-determinant"
        )
    return result.verdict
