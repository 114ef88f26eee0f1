"""Regression targets: pairs (latent, features) from optimal transport or from a teacher, in memory or on disk.

Rehman et al. 2025, arXiv 2506.01158, section 4 (OT and reflow targets).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_regflow import ranks
from openmm_regflow.bijections import wrap
from openmm_regflow.coordinates import align, rotated_squared_distances
from openmm_regflow.errors import CorruptFileError, DivergenceError, IncompatibleFlowError, InputError
from openmm_regflow.files import digest, read_json, read_safetensors, write_json, write_safetensors
from openmm_regflow.priors import Prior
from openmm_regflow.teachers import VectorField, check_integration, integrate

FORMAT_VERSION = 1
DAMAGED = "delete the folder and make the pairs again"
#: Full-batch OT takes 40 bytes for each of n x n entries (costs, plan, network simplex), measured as the peak at 5,000
#: and 10,000 points: 16 GB at 20,000.
MAX_EXACT = 20_000
#: Pairs of the subsample whose clusters split a hierarchical transport.
CLUSTERED = 2048


@dataclass(frozen=True)
class Pairs:
    """Matched samples of the prior and of the target.

    Attributes:
        z: `(n, dim)` latent.
        y: `(n, dim)` features.
        log_det: `(n,)` of the teacher's map z -> y, or None.
        origin: what z and y mean, see ``flows.origin``; empty if unknown.
    """

    z: Tensor
    y: Tensor
    log_det: Tensor | None = None
    origin: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.z.shape[0]

    def digest(self) -> str:
        """SHA-256 of the numbers."""
        return digest({"z": self.z, "y": self.y} | ({} if self.log_det is None else {"log_det": self.log_det}))


def check_pairs(pairs: Pairs, prior: Prior, origin: Mapping[str, str] | None = None) -> None:
    """Refuse pairs of another system, of other coordinates or of another prior, before a flow is trained on them.

    Pairs that say where they come from are compared by that, all by their dimension and their latents. Over samples z
    of the prior itself, -log p(z) has the prior's entropy as its mean and half a unit of variance for each of k linear
    dimensions (it is half a chi-squared number), with a kurtosis of 3 + 12/k; latents of another prior are off by many
    standard errors in the one or the other.

    Args:
        pairs: to be trained on.
        prior: of the flow.
        origin: of the flow, see ``flows.origin``.

    Raises:
        IncompatibleFlowError: another system, other coordinates or another prior; another dimension, angles outside
            [-pi, pi], or latents that are not from `prior`.
    """
    mine, theirs = origin or {}, pairs.origin
    known = [key for key in ("system", "coordinates", "prior") if key in mine.keys() & theirs]
    other = [key for key in known if mine[key] != theirs[key]]
    if other:
        raise IncompatibleFlowError(
            f"the pairs were made for another {' and another '.join(other)} ({theirs.get('name', 'unnamed')}) than "
            f"this flow ({mine.get('name', 'unnamed')}); use a teacher of the same system, training frames and settings"
        )
    dim, n = prior.circular.numel(), len(pairs)
    if pairs.z.shape[1:] != (dim,) or pairs.y.shape[1:] != (dim,):
        raise IncompatibleFlowError(
            f"the pairs have {tuple(pairs.z.shape[1:])} and {tuple(pairs.y.shape[1:])} dimensions, the flow {dim}; "
            "they belong to another system or other coordinates"
        )
    z = pairs.z.to(prior.circular.device, torch.float64)
    if bool((z[:, prior.circular].abs() > np.pi + 1e-5).any()):
        raise IncompatibleFlowError("latent angles of the pairs leave [-pi, pi]; they belong to other coordinates")
    k = int((~prior.circular).sum())
    if k == 0 or n < 100:
        return
    log_p, variance = prior.log_prob(z), 0.5 * k
    off_mean = float(log_p.mean() + prior.entropy()) / (variance / n) ** 0.5
    off_variance = float(log_p.var() / variance - 1.0) / ((2.0 + 12.0 / k) / n) ** 0.5
    if max(abs(off_mean), abs(off_variance)) > 8.0 + 1e-3 * n**0.5:
        raise IncompatibleFlowError(
            f"the latents of the pairs are not from the {prior.kind} prior of this flow (mean and variance of their "
            f"log-density are off by {off_mean:.0f} and {off_variance:.0f} standard errors); make the pairs with its "
            "own prior"
        )


def optimal_transport_pairs(
    z: Tensor,
    y: Tensor,
    circular: Tensor,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    max_iterations: int = 10_000_000,
) -> Pairs:
    """The exact full-batch optimal-transport coupling of n latents with n data points, once, offline.

    The cost is squared Euclidean, with the shorter way round on circles. Memory is 40 n^2 bytes, time about O(n^3).
    With `groups` the features are Cartesian, the cost is that after the best rotation of y about its centre (Klein et
    al. 2023, arXiv 2306.15030, section 4), and matched y come back rotated, their identical atoms relabelled.

    Args:
        z: `(n, dim)` latent samples.
        y: `(n, dim)` features of the data.
        circular: `(dim,)` bool.
        groups: identical atoms (``coordinates.identical_atoms``; an empty list rotates only); None: no alignment.
        max_iterations: of the network simplex (``ot.emd``).

    Raises:
        InputError: unequal numbers, NaN, more than 20,000 points, or angles among features to be rotated.
    """
    _check_points(z, y)
    if len(z) > MAX_EXACT:
        raise InputError(
            f"{len(z)} points exceed the {MAX_EXACT} that exact transport can hold; subsample, use "
            "hierarchical_transport_pairs, or reflow"
        )
    if groups is None:
        order = _assign(transport_cost(z, y, circular), np.ones(len(z)), max_iterations)
        return Pairs(z, y[order])
    if bool(circular.any()):
        raise InputError("only Cartesian features can be rotated, and these hold angles; leave the alignment out")
    a, b = (x.view(len(x), -1, 3) for x in (z, y))
    order = _assign(rotated_squared_distances(a, b).cpu().numpy(), np.ones(len(z)), max_iterations)
    return Pairs(z, align(a, b[order], groups).flatten(1))


def hierarchical_transport_pairs(
    z: Tensor, y: Tensor, circular: Tensor, *, block: int = 4096, branches: int = 8, seed: int = 0
) -> Pairs:
    """A near-optimal coupling of any number of points: split both sides into matching parts, then exact transport.

    A random subsample is coupled exactly and its pairs are clustered; the two centres of a cluster are a pair of
    anchors, and every point goes to an anchor of its side by an exact transport onto equal capacities. Parts of at
    most `block` points are coupled exactly. Like the exact coupling the result is one to one, and its cost lies above
    the optimum; the idea is that of hierarchical refinement (Halmos et al. 2025, arXiv 2503.03025). Memory is
    O(block^2 + n branches), time about O(n block^2).

    Args:
        z: `(n, dim)` latent samples.
        y: `(n, dim)` features of the data.
        circular: `(dim,)` bool.
        block: largest exact problem; the larger, the nearer to the optimum.
        branches: parts per split.
        seed: of subsamples and clusters.

    Raises:
        InputError: unequal numbers, NaN, or a block above 20,000.
    """
    _check_points(z, y)
    if not 2 <= branches <= block <= MAX_EXACT or branches > CLUSTERED:
        raise InputError(
            f"branches is {branches}, block {block}; 2 <= branches <= block <= {MAX_EXACT} is needed, and at most "
            f"{CLUSTERED} branches"
        )
    if len(z) <= block:
        return optimal_transport_pairs(z, y, circular)
    rng = np.random.default_rng(seed)
    some_z, some_y = (torch.as_tensor(rng.choice(len(z), min(block, CLUSTERED), replace=False)) for _ in range(2))
    sample = optimal_transport_pairs(z[some_z], y[some_y], circular)
    anchors = _centres(torch.cat([sample.z, sample.y], 1), circular.repeat(2), branches, rng).split(z.shape[1], 1)
    room = np.bincount(np.arange(len(z)) % branches).astype(float)
    parts = [_assign(transport_cost(x, c, circular), room) for x, c in zip((z, y), anchors)]
    matched = torch.empty_like(y)
    for k in range(branches):
        rows, columns = ((part == k).nonzero().flatten() for part in parts)
        matched[rows] = hierarchical_transport_pairs(
            z[rows], y[columns], circular, block=block, branches=branches, seed=shard_seed(seed, k)
        ).y
    return Pairs(z, matched)


def _check_points(z: Tensor, y: Tensor) -> None:
    if z.shape != y.shape or z.ndim != 2:
        raise InputError(f"latents {tuple(z.shape)} and features {tuple(y.shape)} must have one shape (n, dim)")
    if not len(z):
        raise InputError("there are no points to be matched; give at least one latent and its feature vector")
    if not bool(torch.isfinite(z).all() & torch.isfinite(y).all()):
        raise InputError("the points to be matched hold NaN or infinite values; remove those rows first")


def _assign(cost: np.ndarray, room: np.ndarray, max_iterations: int = 10_000_000) -> Tensor:
    """The column of each row `(n,)` in the exact transport of n units onto columns with `room` `(m,)` whole units."""
    import ot

    plan, log = ot.emd(np.ones(len(cost)), room, cost, numItermax=max_iterations, log=True)
    if log["warning"] is not None:
        raise InputError(f"the transport solver stopped early: {log['warning']}; raise max_iterations")
    return torch.as_tensor(plan.argmax(axis=1))


def _centres(points: Tensor, circular: Tensor, n: int, rng: np.random.Generator, rounds: int = 10) -> Tensor:
    """Centres `(n, dim)` of clusters by Lloyd's algorithm, means taken the shorter way round on circles."""
    centres = points[torch.as_tensor(rng.choice(len(points), n, replace=False))].clone()
    for _ in range(rounds):
        nearest = torch.as_tensor(transport_cost(points, centres, circular).argmin(axis=1))
        for k in range(n):
            away = points[nearest == k] - centres[k]
            if len(away):
                centres[k] += torch.where(circular, wrap(away), away).mean(0)
    return torch.where(circular, wrap(centres), centres)


def transport_cost(z: Tensor, y: Tensor, circular: Tensor) -> np.ndarray:
    """Squared distances `(n, m)` between rows of `z` and `y`, wrapped on circles."""
    a, b = z.double(), y.double()
    linear = torch.cdist(a[:, ~circular], b[:, ~circular]).square()
    for i in circular.nonzero().flatten():
        linear += wrap(a[:, i, None] - b[None, :, i]).square()
    return linear.cpu().numpy()


def reflow_chunk(
    field: VectorField, n: int, seed: int, n_steps: int = 20, method: str = "midpoint", log_det: Any = "none"
) -> Pairs:
    """`n` pairs from the teacher's ODE: a pure function of its seed, so that any worker can make any shard.

    Args:
        field: the teacher.
        n: number of pairs.
        seed: of the latents.
        n_steps: ODE steps.
        method: ODE method (see ``teachers.integrate``).
        log_det: "none", "exact" or "hutchinson".
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = next(field.parameters()).dtype
    z = field.prior.sample(n, generator, dtype)
    ends = [
        integrate(field, part, n_steps=n_steps, method=method, log_det=log_det, generator=generator)
        for part in z.split(8192)
    ]
    y = torch.cat([e for e, _ in ends]).cpu()
    total = torch.cat([d for _, d in ends]).cpu()
    fine = torch.isfinite(y).all(1) & torch.isfinite(total)
    return Pairs(z.cpu()[fine], y[fine], None if log_det == "none" else total[fine])


def reflow_pairs(
    field: VectorField,
    n: int,
    *,
    seed: int = 0,
    n_steps: int = 20,
    method: str = "midpoint",
    log_det: Any = "none",
    shard_size: int = 16_384,
    folder: str | Path | None = None,
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pairs:
    """Reflow pairs: latents carried by the teacher; in memory, or sharded on disk and resumable.

    Shard k is a function of (seed, k) alone: the result does not depend on the executor, and a run that was
    stopped makes the missing shards only. A torn shard is noticed by its checksum and made again. Under ``torchrun``
    rank r makes the shards k = r, r + size, ... and every rank gets all pairs; the folder may be shared or not. With a
    larger n a folder grows: the last shard is made anew if it was not full, and others are added. Pairs that the ODE
    could not carry are left out.

    Args:
        field: the teacher.
        n: number of pairs.
        seed: of the whole set.
        n_steps: ODE steps.
        method: ODE method.
        log_det: "none", "exact" or "hutchinson": the teacher's log-determinant with each pair.
        shard_size: pairs per shard.
        folder: where shards and the manifest go; None keeps everything in memory.
        executor: any ``concurrent.futures.Executor``.
        progress: called with (pairs done, pairs in total).

    Raises:
        InputError: n < 1, n_steps < 1, seed < 0, an unknown word, or a folder that cannot be written.
        IncompatibleFlowError: the folder holds pairs of another configuration, or more of them.
    """
    if n < 1 or shard_size < 1 or seed < 0:
        raise InputError(f"n is {n}, shard_size {shard_size}, seed {seed}; at least 1, 1 and 0 are needed")
    check_integration(method, log_det, n_steps)
    peers = ranks.current()
    sizes = shard_sizes(n, shard_size)
    make = partial(reflow_chunk, field, n_steps=n_steps, method=method, log_det=log_det)
    store = None
    if folder is not None:
        settings = {"seed": seed, "n_steps": n_steps, "method": method, "log_det": log_det, "shard_size": shard_size}
        settings |= {"teacher": _weights_digest(field), "origin": field.origin}
        if peers.main:
            PairStore(Path(folder), settings, n)
        peers.gather(None)  # the others find the manifest, or make one on a disk of their own
        store = PairStore(Path(folder), settings, n)
    parts, todo = {}, []
    for k in range(peers.rank, len(sizes), peers.size):
        found = store.read(k, sizes[k]) if store else None
        if found is not None:
            parts[k] = found
        else:
            todo.append(k)
    run = executor.map if executor else map
    seeds = [shard_seed(seed, k) for k in todo]
    for k, pairs in zip(todo, run(make, [sizes[k] for k in todo], seeds)):
        if store:
            store.write(k, pairs, sizes[k])
        parts[k] = pairs
        if progress and peers.main:
            progress(min(n, peers.size * sum(len(p) for p in parts.values())), n)
    everyones = {k: part for others in peers.gather(parts) for k, part in others.items()}
    return replace(concatenate([everyones[k] for k in sorted(everyones)]), origin=field.origin)


def shard_sizes(n: int, shard_size: int) -> list[int]:
    """Pairs of each shard of a set of n."""
    return [min(shard_size, n - start) for start in range(0, n, shard_size)]


def shard_seed(seed: int, shard: int) -> int:
    """A seed for shard `shard` of the set `seed`, independent of every other."""
    return ranks.seed_of(seed, shard)


def concatenate(parts: list[Pairs]) -> Pairs:
    """One set of pairs from several."""
    log_dets = [p.log_det for p in parts if p.log_det is not None]
    return Pairs(
        torch.cat([p.z for p in parts]),
        torch.cat([p.y for p in parts]),
        torch.cat(log_dets) if len(log_dets) == len(parts) else None,
    )


class StreamedPairs:
    """Batches of fresh reflow pairs during training, none seen twice; batch k is a function of (seed, k).

    A data source for ``training.train``. Under ``torchrun`` each rank integrates every `size`-th batch and all get all.

    Args:
        field: the teacher.
        batch_size: pairs per batch.
        seed: of the stream.
        n_steps: ODE steps.
        method: ODE method.
        log_det: "none", "exact" or "hutchinson".
    """

    def __init__(
        self,
        field: VectorField,
        batch_size: int,
        *,
        seed: int = 0,
        n_steps: int = 20,
        method: str = "midpoint",
        log_det: Any = "none",
    ) -> None:
        self.field, self.batch_size, self.seed = field, batch_size, seed
        self.make = partial(reflow_chunk, field, n_steps=n_steps, method=method, log_det=log_det)
        self._first, self._ready = -1, list[tuple[Tensor, ...]]()

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The batch of step `step`: latents, features and, if asked for, log-determinants."""
        peers = ranks.current()
        first = step - step % peers.size
        if first != self._first:
            self._first, self._ready = first, peers.gather(self._make(first + peers.rank))
        return tuple(t.to(self.field.circular.device) for t in self._ready[step - first])

    def _make(self, step: int) -> tuple[Tensor, ...]:
        # Rows that the ODE could not carry are missing from a chunk; more are made in their place.
        parts: list[Pairs] = []
        while (n := self.batch_size - sum(len(p) for p in parts)) > 0:
            if len(parts) > 100:
                raise DivergenceError("the teacher's ODE does not stay finite; train it longer or take more steps")
            parts.append(self.make(n, shard_seed(self.seed, step * 128 + len(parts))))
        pairs = concatenate(parts)
        return (pairs.z, pairs.y) if pairs.log_det is None else (pairs.z, pairs.y, pairs.log_det)


def _weights_digest(field: VectorField) -> str:
    sha = hashlib.sha256()
    for value in field.state_dict().values():
        sha.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


class PairStore:
    """A folder of safetensors shards with a manifest.

    Args:
        folder: created if it does not exist.
        settings: JSON-ready; a folder made with other settings is refused.
        n: pairs that were asked for; a folder can grow.

    Raises:
        InputError: the folder cannot be written.
        CorruptFileError: the manifest is damaged.
        IncompatibleFlowError: the manifest differs; the message names the difference.
    """

    KIND = "openmm_regflow.pairs"

    def __init__(self, folder: Path, settings: dict[str, Any], n: int) -> None:
        self.folder = folder
        self.settings = settings
        manifest = folder / "manifest.json"
        found = read_json(manifest, DAMAGED) if manifest.exists() else settings
        held = found.get("n", 0)  # not in the manifest of an earlier version
        found = {k: v for k, v in found.items() if k != "n"}
        if found != settings:
            keys = [k for k in {*found, *settings} if found.get(k) != settings.get(k)]
            raise IncompatibleFlowError(
                f"{folder} holds pairs with another {', '.join(sorted(keys))}; choose another folder"
            )
        if n < held:
            raise IncompatibleFlowError(f"{folder} holds {held} pairs, more than {n}; choose another folder")
        if n > held:
            write_json(manifest, settings | {"n": n})

    def path(self, shard: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"pairs-{shard:06d}.safetensors"

    def write(self, shard: int, pairs: Pairs, size: int) -> None:
        """Write a shard, of which `size` pairs were asked for, atomically."""
        tensors = {"z": pairs.z, "y": pairs.y}
        if pairs.log_det is not None:
            tensors["log_det"] = pairs.log_det
        header = {"format": self.KIND, "format_version": FORMAT_VERSION, **self.settings, "size": size}
        write_safetensors(self.path(shard), tensors, header)

    def read(self, shard: int, size: int | None = None) -> Pairs | None:
        """A shard, or None if it is missing, torn, or was made for another number of pairs than `size`."""
        try:
            header, tensors = read_safetensors(self.path(shard), self.KIND, FORMAT_VERSION)
        except (InputError, CorruptFileError):
            return None
        # A shard of an earlier version does not say what it was made for, and is sure to be whole if it is full.
        if size not in (None, header.get("size", len(tensors["z"]))):
            return None
        return Pairs(tensors["z"], tensors["y"], tensors.get("log_det"))


def aligned_coupling(z: Tensor, y: Tensor) -> Tensor:
    """Latents `(n, 3 n_atoms)` turned about their centres towards the Cartesian features `(n, 3 n_atoms)` of a batch.

    Where data have a uniform orientation and the prior has no direction, turned latents are samples of the prior
    still; paths are shorter and orientations do not blur the velocity (Klein et al. 2023, arXiv 2306.15030).
    """
    a, b = (x.view(len(x), -1, 3) for x in (y, z))
    return align(a, b, rounds=0).flatten(1)


def load_pairs(folder: str | Path, n: int | None = None) -> Pairs:
    """Pairs that `reflow_pairs` (or ``openmm-regflow pairs``) left in a folder.

    Args:
        folder: with a manifest and shards.
        n: so many of them, the first ones; None for all.

    Raises:
        InputError: no such folder, no pairs in it, or fewer than `n` were made.
        CorruptFileError: a shard that is missing or torn, or a damaged manifest.
    """
    manifest = Path(folder) / "manifest.json"
    if not manifest.is_file():
        raise InputError(f"{folder} holds no pairs (no manifest.json); make them with `openmm-regflow pairs`")
    settings = read_json(manifest, DAMAGED)
    held = settings.pop("n", 0)
    size = settings.get("shard_size")
    if not all(type(number) is int and number >= least for number, least in ((held, 0), (size, 1))):
        raise CorruptFileError(f"{manifest} says n = {held!r} and shard_size = {size!r}; {DAMAGED}")
    store = PairStore(Path(folder), settings, held)
    shards = [int(path.stem.split("-")[1]) for path in Path(folder).glob("pairs-*.safetensors")]
    if not shards:
        raise InputError(f"{folder} holds no pairs yet; make them with `openmm-regflow pairs`")
    sizes = shard_sizes(held, settings["shard_size"]) if held else [None] * (max(shards) + 1)
    parts: list[Pairs] = []
    for k, size in enumerate(sizes):
        if n is not None and sum(map(len, parts)) >= n:
            break
        found = store.read(k, size)
        if found is None:
            raise CorruptFileError(f"{store.path(k)} is missing or torn; the command that made the pairs mends it")
        parts.append(found)
    pairs = concatenate(parts)
    if n is not None and n > (held or len(pairs)):
        raise InputError(f"{folder} holds {len(pairs)} pairs, {n} are wanted; make more, or ask for fewer (pairs.n)")
    first = slice(0, n)
    log_det = None if pairs.log_det is None else pairs.log_det[first]
    return Pairs(pairs.z[first], pairs.y[first], log_det, settings.get("origin", {}))


def minibatch_coupling(circular: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Reorders the latents of a batch to the optimal-transport matching with its data (arXiv 2302.00482).

    Args:
        circular: `(dim,)` bool.
    """

    def couple(z: Tensor, y: Tensor) -> Tensor:
        matched = optimal_transport_pairs(y, z, circular)
        return matched.y

    return couple
