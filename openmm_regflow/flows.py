"""Normalizing flows: a prior, a bijection and a coordinate map behind one type; named architectures; one file.

A flow file is safetensors: weights as tensors, everything else as JSON in the header. Loading runs no code.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openmm_regflow._version import __version__
from openmm_regflow.bijections import AffineCoupling, Bijection, Composition, SplineCoupling, Within, wrap
from openmm_regflow.coordinates import CartesianMap, CoordinateMap, InternalMap, build_zmatrix, topology_tables
from openmm_regflow.errors import CorruptFileError, InputError
from openmm_regflow.files import digest, read_safetensors, restored, rounded, write_safetensors
from openmm_regflow.graphs import Replayed
from openmm_regflow.networks import MLP, Conditioner, ResidualMLP, TokenTransformer
from openmm_regflow.priors import Prior

KIND = "openmm_regflow.flow"
#: 2: the outputs of a conditioner lie element by element in parts (splines, shifts, scales), lines before circles.
#: 3: the same with rounded weights; files of format 2 whose weights are float16 are older than that.
FORMAT_VERSION, ROUNDED_VERSION = 2, 3
#: Samples per pass inside `Flow.sample` and `Flow.log_prob`, which bounds memory at any n: on a CPU few enough for the
#: caches, on other devices enough to fill them, as far as `DEVICE_BYTES` allow.
CPU_CHUNK, DEVICE_CHUNK = 4096, 65536
#: What a pass may take on a GPU. Fixed and not a share of what is free: the draws of a seed depend on the chunks.
DEVICE_BYTES = 4 << 30
#: Batches up to this size are so quick on a GPU that telling it of each kernel takes longer.
RECORDED_ROWS = 16384
#: Largest inverse error of a flow that is kept in float32, see `Flow.secure`.
INVERSE_ERROR = 1e-4
#: Latents this many times as wide as the prior's are its tails.
TAILS = 2.5


@dataclass(frozen=True)
class FlowMetadata:
    """What a flow was made for; travels in the flow file.

    Attributes:
        system: name of the molecule.
        fingerprint: of the System (see ``fingerprints.fingerprint``); None if trained without one.
        temperature: [K]; None if unknown.
        training: provenance: data, configuration, seeds, figures.
    """

    system: str | None = None
    fingerprint: dict[str, Any] | None = None
    temperature: float | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> dict[str, Any]:
        """What decides the density that is learned: digest of the System's energy function and temperature [K]."""
        return {"system": (self.fingerprint or {}).get("sha256"), "temperature": self.temperature}


class Flow(nn.Module):
    """A normalizing flow over molecular conformations.

    ``log_prob`` is the density of the coordinate map's measure: on R^{3N} for Cartesian features, on the
    3N - 6 internal coordinates (less the bonds of fixed length) with their volume element for internal ones. Either
    way the log-weight is
    ``-u(x) + frame_log_density(x) - log_prob(x)``.

    Args:
        coordinates: positions <-> features.
        bijection: latent <-> features.
        architecture: JSON-ready description from which `load` rebuilds the bijection.
        metadata: what the flow was made for.
        factor: of a harmonic prior, see `Prior`.

    Attributes:
        path: of the file that it was last loaded from or saved to; None before.
    """

    def __init__(
        self,
        coordinates: CoordinateMap,
        bijection: Bijection,
        architecture: Mapping[str, Any],
        metadata: FlowMetadata | None = None,
        factor: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.coordinates = coordinates
        self.bijection = bijection
        self.prior = Prior(coordinates.circular.clone(), factor)
        self.architecture = dict(architecture)
        self.metadata = metadata or FlowMetadata()
        self.path: Path | None = None
        self._drawn = Replayed(self._draw, "sampling", patience=2)
        self._judged = Replayed(self._density, "densities", patience=2)

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return self.coordinates.n_atoms

    @property
    def dim(self) -> int:
        """Number of latent dimensions."""
        return self.coordinates.dim

    @property
    def rotation_invariant(self) -> bool:
        """True if the density does not change under rotation and translation."""
        return self.coordinates.rotation_invariant

    @property
    def com_std(self) -> float:
        """Standard deviation of the centre of geometry [nm]; 0 for internal coordinates."""
        return self.coordinates.com_std

    @property
    def fixed_bonds(self) -> tuple[tuple[int, int, float], ...]:
        """Bonds of constrained length that every sample has: ``(i, j, length [nm])``."""
        return tuple(getattr(self.coordinates, "fixed_bonds", ()))

    def fuse(self, fused: bool = True) -> "Flow":
        """Evaluate splines by kernels made by ``torch.compile``, or no longer; no part of the flow's file.

        The first batches take about a minute (a C++ compiler is needed; without one a warning, and all stays as it
        was); afterwards training and sampling are faster, see docs/training.md.
        """
        for module in self.bijection.modules():
            if isinstance(module, SplineCoupling):
                module.compiled = fused
        for replayed in (self._drawn, self._judged):
            replayed.forget()
        return self

    def covers(self, x: Tensor) -> Tensor:
        """Whether positions `(n, n_atoms, 3)` [nm] have a place in the coordinates `(n,)`: hydrogens numbered alike."""
        return self.coordinates.covers(x)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next(self.bijection.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.prior.circular.device  # a walk through all modules takes longer than a Markov chain's bookkeeping

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latent `(n, dim)` -> positions `(n, n_atoms, 3)` [nm], log|det dx/dz| `(n,)`."""
        y, log_det = self.bijection(z)
        x, log_volume = self.coordinates.to_positions(y)
        return x, log_det + log_volume

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Positions `(n, n_atoms, 3)` [nm] -> latent `(n, dim)`, log|det dz/dx| `(n,)`.

        Raises:
            InputError: positions of another shape.
        """
        if x.ndim != 3 or tuple(x.shape[1:]) != (self.n_atoms, 3):
            raise InputError(f"positions have shape {tuple(x.shape)}; this flow needs (n, {self.n_atoms}, 3) in nm")
        y, log_volume = self.coordinates.to_features(x)
        z, log_det = self.bijection.inverse(y)
        return z, log_det + log_volume

    @property
    def _chunk(self) -> int:
        if self.device.type == "cpu":
            return CPU_CHUNK
        return max(1, min(DEVICE_CHUNK, DEVICE_BYTES // (self.dtype.itemsize * self._floats_per_sample)))

    @cached_property
    def _floats_per_sample(self) -> int:
        conditioners = (module for module in self.bijection.modules() if isinstance(module, Conditioner))
        return max((conditioner.floats_per_sample for conditioner in conditioners), default=0) or 1

    def _log_prob(self, x: Tensor) -> Tensor:
        # Features in float64: the map is cheap, and a float32 bond is a tenth of its thermal width off.
        return self._by(self._judged, x.to(self.device, torch.float64))[0]

    def _density(self, x: Tensor) -> tuple[Tensor, ...]:
        z, log_det = self.inverse(x)
        return (self.prior.log_prob(z) + log_det,)

    def _draw(self, z: Tensor) -> tuple[Tensor, ...]:
        y, log_det = self.bijection(z)
        x, log_volume = self.coordinates.to_positions(y)
        return x, self.prior.log_prob(z) - log_det - log_volume

    def _by(self, replayed: Replayed, given: Tensor) -> tuple[Tensor, ...]:
        """Batches that a GPU has done before it was told of them come from a recording."""
        if given.device.type != "cuda" or len(given) > RECORDED_ROWS:
            return replayed.function(given)
        # Where the weights lie: a recording reads them there.
        places = tuple(t.data_ptr() for t in (*self.parameters(), *self.buffers()))
        # Places of an inference mode could not be written to outside it.
        with torch.inference_mode(False), torch.no_grad():
            return tuple(t.clone() for t in replayed(given, state=places))

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density `(n,)` of positions `(n, n_atoms, 3)` [nm]; no gradient (train through `bijection`)."""
        return torch.cat([self._log_prob(part) for part in torch.as_tensor(x).split(self._chunk)])

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw positions `(n, n_atoms, 3)` [nm] with their log-density `(n,)`.

        Rows that fall outside the coordinates' domain are NaN; they count as samples of zero weight.
        """
        if n < 1:
            raise InputError(f"n is {n}; at least one sample is needed")
        parts = [self._sample(min(self._chunk, n - i), generator) for i in range(0, n, self._chunk)]
        return torch.cat([x for x, _ in parts]), torch.cat([q for _, q in parts])

    def _sample(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        x, log_q = self._by(self._drawn, self.prior.sample(n, generator, self.dtype).double())
        return self.coordinates.relabel(x, generator), log_q

    @torch.no_grad()
    def inverse_error(self, y: Tensor, spread: float = 1.0, generator: torch.Generator | None = None) -> float:
        """Largest error of going there and back: features `(n, dim)` as data, and as many latents.

        An error of rounding by eps comes back multiplied by the condition of the map: trained maps differ by orders of
        magnitude in that.

        Args:
            y: features `(n, dim)`, e.g. of held-out data.
            spread: width of the latents in units of the prior's on lines; see `TAILS`.
            generator: of the latents.
        """
        z = self.prior.sample(len(y), generator, self.dtype).double()
        z, y = torch.where(self.prior.circular, z, spread * z), y.to(z)
        there, back, circular = self.bijection, self.bijection.inverse, self.prior.circular
        errors = round_trip(there, back, z, circular), round_trip(back, there, y, circular)
        return max(float(error.abs().max()) for error in errors)

    def secure(self, y: Tensor, seed: int = 0) -> float:
        """Go over to float64, with a warning, if the inverse in float32 is off by more than `INVERSE_ERROR`.

        Args:
            y: features `(n, dim)` of data.
            seed: of latents, half of them in the tails.

        Returns:
            the largest error in the precision that was chosen.
        """
        error = self._worst_error(y, seed)
        if self.dtype == torch.float32 and not error <= INVERSE_ERROR:
            warnings.warn(
                f"the map is so steep that its inverse in float32 is off by {error:.1e}; the flow is kept in float64, "
                "about twice as slow. More pairs, or regression.forward_backward and likelihood, make it gentler.",
                stacklevel=2,
            )
            self.bijection.double()
            error = self._worst_error(y, seed)
        return error

    def _worst_error(self, y: Tensor, seed: int) -> float:
        return max(self.inverse_error(y, s, torch.Generator().manual_seed(seed)) for s in (1.0, TAILS))

    def frame_log_density(self, x: Tensor) -> Tensor:
        """Log-density `(n,)` of the rigid-body coordinates that `log_prob` carries and ``exp(-u)`` does not."""
        return self.coordinates.frame_log_density(x)

    def save(self, path: str | Path, *, bits: Literal[8, 16, 32] = 32) -> None:
        """Write the flow file (safetensors with a JSON header), atomically.

        Args:
            path: of the file.
            bits: of a weight in the file. 16 (float16) and 8 (integers, and a scale for each row of a matrix) make it
                half and a quarter the size: another flow, as exact as this one, read in float32. Weights move by at
                most a part in 2,000 of themselves, or in 250 of the largest of their row; evaluate what it cost.

        Raises:
            InputError: the folder cannot be written, other ``bits``, or weights too large to be rounded or in float64.
        """
        header, tensors = self.packed(bits)
        write_safetensors(Path(path), tensors, header)
        self.path = Path(path).absolute()

    def packed(self, bits: Literal[8, 16, 32] = 32) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors of the flow's file; arguments and errors as in `save`."""
        if bits not in (8, 16, 32):
            raise InputError(f"weights are kept in 8, 16 or 32 bits, not in {bits}")
        header = {
            "format": KIND,
            "format_version": FORMAT_VERSION if bits == 32 else ROUNDED_VERSION,
            "package_version": __version__,
            "architecture": self.architecture,
            "coordinates": dict(self.coordinates.config()),
            "metadata": asdict(self.metadata),
        }
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in self.state_dict().items()}
        if bits != 32:
            if self.dtype != torch.float32:
                kept = str(self.dtype).removeprefix("torch.")
                raise InputError(f"a flow in {kept} is too steep for weights of {bits} bits; save it with bits=32")
            weights = {k: tensors.pop(k) for k in list(tensors) if k.startswith("bijection.")}
            tensors |= rounded(weights, bits)
        return header, tensors

    @classmethod
    def unpacked(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str | Path) -> "Flow":
        """The flow that `packed` described, in a file at ``path``.

        Raises:
            CorruptFileError: no description of a flow of this package.
        """
        tensors = restored(tensors)
        try:
            coordinates = coordinates_from_config(header["coordinates"])
            factor = tensors.get("prior.factor")
            flow = build(coordinates, header["architecture"], FlowMetadata(**header["metadata"]), factor)
            weight = next(v for k, v in tensors.items() if k.startswith("bijection."))
            flow.bijection.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
            flow.load_state_dict(tensors)
        except (KeyError, TypeError, RuntimeError, StopIteration) as error:
            raise CorruptFileError(f"{path} does not describe a flow of this package: {error}") from error
        coordinates.refresh()
        return flow.eval()

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "Flow":
        """Read a flow file; no code in it is run.

        Raises:
            InputError: no such file, or an unknown device.
            CorruptFileError: truncated, damaged, or not a flow file of this package.
        """
        flow = cls.unpacked(*read_safetensors(Path(path), KIND, FORMAT_VERSION, ROUNDED_VERSION), path)
        flow.path = Path(path).absolute()
        return flow.to(device)


def round_trip(
    there: Callable[[Tensor], tuple[Tensor, Tensor]],
    back: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    circular: Tensor,
) -> Tensor:
    """``back(there(start)) - start`` `(n, dim)`, the shorter way round on circles.

    Products of matrices round in ways that depend on the batch, so the way back goes in parts.

    Args:
        there: a map that returns value and log-determinant.
        back: its inverse.
        start: `(n, dim)`.
        circular: `(dim,)` bool.
    """
    end = torch.cat([back(part)[0] for part in there(start)[0].split(len(start) // 3 + 1)])
    return torch.where(circular, wrap(end - start), end - start)


def origin(flow: Flow) -> dict[str, str]:
    """What latents and features of this flow mean: digests of its system, coordinates and prior, and the system's name.

    Fitted numbers count to six digits of the largest of their tensor, so that the same fit on another machine is the
    same.
    """

    def sha(plain: Any, tensors: Mapping[str, Tensor]) -> str:
        rounded = {k: (1e6 * v.double() / max(float(v.abs().max()), 1e-300)).round().long() for k, v in tensors.items()}
        scales = {k: f"{float(v.abs().max()):.5e}" for k, v in tensors.items()}
        return hashlib.sha256((json.dumps([plain, scales], sort_keys=True) + digest(rounded)).encode()).hexdigest()

    def fitted(module: nn.Module) -> dict[str, Tensor]:
        return {k: v for k, v in module.state_dict().items() if v.numel()}

    config = dict(flow.coordinates.config())
    lengths = {k: torch.tensor(config.pop(k)) for k in ("scale", "com_std", "place") if k in config}
    found = {
        "coordinates": sha(config, fitted(flow.coordinates) | lengths),
        "prior": sha([flow.prior.kind, flow.prior.circular.tolist()], fitted(flow.prior)),
    }
    if flow.metadata.fingerprint is not None:
        # Without the version: of most Systems the fingerprint is otherwise what it was in an earlier one.
        plain = {k: v for k, v in flow.metadata.fingerprint.items() if k != "version"}
        found["system"] = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return found | ({"name": flow.metadata.system} if flow.metadata.system else {})


def coordinates_from_config(config: Mapping[str, Any]) -> CoordinateMap:
    """A coordinate map from what its ``config()`` returned (fitted tensors come with the state dict)."""
    if config["kind"] == "cartesian":
        return CartesianMap(config["n_atoms"], config["scale"], config["com_std"], config.get("place"))
    if config["kind"] == "internal":
        return InternalMap.from_config(config)
    raise InputError(f"unknown coordinates {config['kind']!r}; known: cartesian, internal")


def coordinates_for(
    topology: Any,
    data: Any,
    kind: str = "internal",
    fixed: Sequence[tuple[int, int, float]] = (),
    held: bool = False,
) -> CoordinateMap:
    """Coordinates for a molecule, fitted to data.

    Args:
        topology: an ``openmm.app.Topology``, or anything with its atoms() and bonds(); Cartesian ones do without.
        data: positions `(n, n_atoms, 3)` [nm], tensor or array.
        kind: "internal" or "cartesian".
        fixed: ``(i, j, length [nm])`` of bonds of constrained length, see ``constraints.fixed_bonds``; internal only.
        held: forces hold the molecule in its place (``ensemble.is_held``); Cartesian only.

    Raises:
        InputError: unknown coordinates, data that do not fit, or fixed bonds or a place that the coordinates cannot
            hold.
    """
    data = torch.as_tensor(data)
    n_atoms = sum(1 for _ in topology.atoms()) if topology is not None else data.shape[1] if data.ndim > 1 else 0
    if data.ndim != 3 or not n_atoms or tuple(data.shape[1:]) != (n_atoms, 3):
        raise InputError(f"positions have shape {tuple(data.shape)}; (n, {n_atoms}, 3) in nm fit this molecule")
    if fixed and n_atoms < 4:
        raise InputError(
            f"{n_atoms} atoms with {len(fixed)} bonds at fixed length are not covered: internal coordinates need four "
            "atoms, Cartesian ones free bonds; build the System with constraints=None"
        )
    if kind == "internal" and held:
        raise InputError(
            "forces hold the molecule in its place, and internal coordinates know no place; set coordinates to "
            '"cartesian", or remove the external force'
        )
    if kind == "cartesian" and fixed:
        raise InputError(f"Cartesian coordinates cannot hold {len(fixed)} bonds at fixed length; use kind='internal'")
    if kind == "cartesian":
        return CartesianMap.fit(data, held)
    if kind == "internal":
        return InternalMap.fit(build_zmatrix(*topology_tables(topology)), data, fixed=fixed)
    raise InputError(f"unknown coordinates {kind!r}; known: cartesian, internal")


def alternating_masks(circular: Tensor, n_layers: int, seed: int, torsion_layers: int = 0) -> list[Tensor]:
    """Coupling masks in complementary pairs, lines and circles each split into random halves.

    Args:
        circular: `(dim,)` bool.
        n_layers: number of masks; of masks for lines, where torsions have their own.
        seed: of the halves.
        torsion_layers: masks that come before them, for circles alone.

    Raises:
        InputError: fewer than two elements, or of a kind that gets couplings of its own.
    """
    dim = circular.numel()
    if dim < 2:
        raise InputError(f"{dim}-dimensional data cannot be split by a coupling; at least 2 dimensions are needed")
    generator = torch.Generator().manual_seed(seed)
    if not torsion_layers:
        return _halves(circular, n_layers, generator, (~circular, circular))
    n_circles = int(circular.sum())
    if min(n_circles, dim - n_circles) < 2:
        raise InputError(
            f"torsion_layers need two circles and two lines; of {dim} features {n_circles} are circles, set it to 0"
        )
    torsions = _halves(circular, torsion_layers, generator, (circular,))
    return torsions + _halves(circular, n_layers, generator, (~circular,))


def _halves(
    circular: Tensor, n_layers: int, generator: torch.Generator, kinds: tuple[Tensor, ...]
) -> list[Tensor]:
    """`n_layers` masks, every second one the rest of the one before among these kinds of elements."""
    if n_layers == 1:
        raise InputError("a single coupling leaves half of the features as they were drawn; give 2 or more of a kind")
    dim = circular.numel()
    taken = torch.stack(kinds).any(0)
    masks: list[Tensor] = []
    for layer in range(n_layers):
        if layer % 2:
            masks.append(taken & ~masks[-1])
            continue
        mask = torch.zeros(dim, dtype=torch.bool)
        for k, kind in enumerate(kinds):
            members = kind.nonzero().flatten()
            members = members[torch.randperm(members.numel(), generator=generator)]
            # An odd kind gives its extra element to alternating sides, so that neither half is ever empty.
            mask[members[: (members.numel() + (k + layer // 2) % 2) // 2]] = True
        if not bool(mask.any()) or bool(mask.all()):
            mask = torch.arange(dim) % 2 == 0
        masks.append(mask)
    return masks


def build(
    coordinates: CoordinateMap,
    architecture: Mapping[str, Any],
    metadata: FlowMetadata | None = None,
    factor: Tensor | None = None,
) -> Flow:
    """A flow from its architecture description; the named factories below are the usual way in.

    Args:
        coordinates: from `coordinates_for`.
        architecture: name and sizes, see the factories.
        metadata: goes into the flow.
        factor: of a harmonic prior, from `harmonic_factor`; None for independent features.

    Raises:
        InputError: an unknown architecture or a size that is not positive.
    """
    a = dict(architecture)
    for key in ("n_layers", "hidden", "depth"):
        if a[key] < 1:
            raise InputError(f"{key} is {a[key]}; it must be at least 1")
    networks: dict[str, type[Conditioner]] = {
        "real_nvp": MLP, "res_nvp": ResidualMLP, "spline": ResidualMLP, "jet": TokenTransformer,
    }  # fmt: skip
    if a["name"] not in networks:
        raise InputError(f"unknown architecture {a['name']!r}; known: {', '.join(networks)}")
    network: Callable[..., Conditioner] = partial(networks[a["name"]], hidden=a["hidden"], depth=a["depth"])
    of_torsions = partial(network, **{k: a[f"torsion_{k}"] for k in ("hidden", "depth") if a.get(f"torsion_{k}")})
    circular = coordinates.circular.cpu()  # layers are made on the CPU, and moved as a whole
    masks = _masks(coordinates, a)
    first = a.get("torsion_layers", 0)
    layers: list[Bijection] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(a["seed"])
        if first and a.get("torsions_alone", False):
            torsions = [_coupling(a, mask[circular], circular[circular], of_torsions) for mask in masks[:first]]
            layers.append(Within(circular, Composition(torsions)))
        else:
            layers += [_coupling(a, mask, circular, of_torsions) for mask in masks[:first]]
        layers += [_coupling(a, mask, circular, network) for mask in masks[first:]]
    return Flow(coordinates, Composition(layers), a, metadata, factor)


def _coupling(
    a: Mapping[str, Any], mask: Tensor, circular: Tensor, network: Callable[..., Conditioner]
) -> Bijection:
    """One layer of an architecture description."""
    if a["name"] == "spline":
        sizes = a["n_bins"], a["bound"], a.get("line_bins"), a.get("harmonics", 1)
        return SplineCoupling(mask, circular, network, *sizes)
    if a["name"] == "jet":
        places = AffineCoupling.places(mask, circular)
        return AffineCoupling(mask, circular, partial(network, token_size=3, places=places))
    return AffineCoupling(mask, circular, network)


def _masks(coordinates: CoordinateMap, a: Mapping[str, Any]) -> list[Tensor]:
    if a["name"] == "jet" and isinstance(coordinates, CartesianMap):
        # Whole atoms are the tokens.
        per_atom = alternating_masks(torch.zeros(coordinates.n_atoms, dtype=torch.bool), a["n_layers"], a["seed"])
        return [m.repeat_interleave(3) for m in per_atom]
    return alternating_masks(coordinates.circular.cpu(), a["n_layers"], a["seed"], a.get("torsion_layers", 0))


def real_nvp(
    coordinates: CoordinateMap, *, n_layers: int = 8, hidden: int = 128, depth: int = 2, seed: int = 0
) -> Flow:
    """Affine couplings with MLP conditioners (Dinh et al. 2017, arXiv 1605.08803).

    Args:
        coordinates: from `coordinates_for`.
        n_layers: number of couplings.
        hidden: width of the conditioners.
        depth: hidden layers of each.
        seed: of masks and initial weights.
    """
    return build(
        coordinates, {"name": "real_nvp", "n_layers": n_layers, "hidden": hidden, "depth": depth, "seed": seed}
    )


def res_nvp(coordinates: CoordinateMap, *, n_layers: int = 8, hidden: int = 128, depth: int = 2, seed: int = 0) -> Flow:
    """Affine couplings with residual conditioners (Res-NVP of Rehman et al. 2025, arXiv 2506.01158).

    Args:
        coordinates: from `coordinates_for`.
        n_layers: number of couplings.
        hidden: width of the residual stream.
        depth: residual blocks of each conditioner.
        seed: of masks and initial weights.
    """
    return build(coordinates, {"name": "res_nvp", "n_layers": n_layers, "hidden": hidden, "depth": depth, "seed": seed})


def spline(
    coordinates: CoordinateMap,
    *,
    n_layers: int = 8,
    hidden: int = 128,
    depth: int = 2,
    n_bins: int = 8,
    line_bins: int | None = None,
    bound: float = 5.0,
    torsion_layers: int = 0,
    torsion_hidden: int | None = None,
    torsion_depth: int | None = None,
    torsions_alone: bool = True,
    harmonics: int = 1,
    seed: int = 0,
) -> Flow:
    """Rational-quadratic spline couplings, circular on torsions (NSF; arXiv 1906.04032 and 2002.02428).

    Args:
        coordinates: from `coordinates_for`.
        n_layers: number of couplings.
        hidden: width of the residual conditioners.
        depth: residual blocks of each.
        n_bins: spline bins.
        line_bins: spline bins of linear features, where they need fewer than angles do; None for as many, 0 for a shift
            and a scale alone.
        bound: half-width of the spline's domain in units of the feature's standard deviation.
        torsion_layers: couplings that come first and move torsions alone; the n_layers others then move lines alone, so
            that stiff coordinates see every torsion. 0: each coupling moves half of both.
        torsion_hidden: width of the conditioners of those couplings, which have less to say; None for ``hidden``.
        torsion_depth: residual blocks of each; None for ``depth``.
        torsions_alone: those couplings see torsions alone, so that their density is a factor of the flow's; otherwise
            they see the latents of the lines, too.
        harmonics: conditioners see each torsion as cosines and sines of its multiples up to this one.
        seed: of masks and initial weights.
    """
    architecture = {
        "name": "spline", "n_layers": n_layers, "hidden": hidden, "depth": depth, "n_bins": n_bins,
        "line_bins": line_bins, "bound": bound, "torsion_layers": torsion_layers,
        "torsion_hidden": torsion_hidden, "torsion_depth": torsion_depth,
        "torsions_alone": torsions_alone, "harmonics": harmonics, "seed": seed,
    }  # fmt: skip
    return build(coordinates, architecture)


def jet(coordinates: CoordinateMap, *, n_layers: int = 8, hidden: int = 64, depth: int = 2, seed: int = 0) -> Flow:
    """Affine couplings over atom tokens with transformer conditioners (Kolesnikov et al. 2024, arXiv 2412.15129).

    Args:
        coordinates: from `coordinates_for`.
        n_layers: number of couplings.
        hidden: token width, a multiple of 4.
        depth: transformer blocks of each conditioner.
        seed: of masks and initial weights.
    """
    return build(coordinates, {"name": "jet", "n_layers": n_layers, "hidden": hidden, "depth": depth, "seed": seed})
