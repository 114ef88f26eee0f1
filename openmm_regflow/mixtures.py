"""Several flows of one molecule as one proposal density, and one file."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openmm_regflow._version import __version__
from openmm_regflow.errors import CorruptFileError, IncompatibleFlowError, InputError
from openmm_regflow.files import digest, kind_of, read_safetensors, write_safetensors
from openmm_regflow.flows import Flow, FlowMetadata

KIND = "openmm_regflow.mixture"
FORMAT_VERSION = 1
#: Steps of `fitted_shares` at most, and the change of a share at which it stops.
MAX_STEPS, SHARE_TOLERANCE = 2000, 1e-6


class FlowMixture(nn.Module):
    """The density ``q(x) = sum_k s_k q_k(x)`` of several flows of one molecule.

    Where one flow has too little density another, trained with another seed, may not: a weight ``p/q`` is at most
    ``1/s_k`` times that of part k, so the holes that make the largest weights remain only where all parts share
    them (defensive importance sampling: Hesterberg, Technometrics 37, 185 (1995); Owen and Zhou, J. Am. Stat. Assoc.
    95, 135 (2000)). A draw comes from one part and is judged by all of them: as many passes as there are parts.

    It has a flow's ``sample`` and ``log_prob``, and stands for one in proposals, moves, reweighting and free energies.
    It is no bijection: what needs latents (training, refinement, annealing) takes one flow.

    Args:
        flows: the parts, of one System and temperature and in the same kind of coordinates.
        shares: of the parts, positive; normalised here. Default: equal.

    Attributes:
        shares: `(n_parts,)` float64, of sum one.
        path: of the file that it was last loaded from or saved to; None before.

    Raises:
        InputError: fewer than two flows, a mixture among them, one flow twice, or shares that are not positive.
        IncompatibleFlowError: flows of different Systems or temperatures, or densities of different measures.
    """

    shares: Tensor

    def __init__(self, flows: Sequence[Flow], shares: Sequence[float] | None = None) -> None:
        super().__init__()
        if len(flows) < 2 or not all(isinstance(flow, Flow) for flow in flows):
            raise InputError("a mixture is made of two flows or more; of a mixture, give its parts")
        given = [1.0] * len(flows) if shares is None else [float(s) for s in shares]
        if len(given) != len(flows) or not all(0 < s < math.inf for s in given):
            raise InputError(f"shares are {given}; {len(flows)} positive numbers are needed, one for each flow")
        for pair in itertools.combinations(flows, 2):
            _check_alike(*pair)
        self.parts = nn.ModuleList(flows)
        weights = torch.tensor(given, dtype=torch.float64)
        # Shares of a file stay as they are to the last bit: moves know a flow by its weights.
        self.register_buffer("shares", weights if abs(sum(given) - 1) < 1e-12 else weights / weights.sum())
        self.path: Path | None = None

    @property
    def _flows(self) -> list[Flow]:
        return [part for part in self.parts if isinstance(part, Flow)]

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return self._flows[0].n_atoms

    @property
    def rotation_invariant(self) -> bool:
        """True if the density does not change under rotation and translation."""
        return self._flows[0].rotation_invariant

    @property
    def com_std(self) -> float:
        """Standard deviation of the centre of geometry [nm]; 0 for internal coordinates."""
        return self._flows[0].com_std

    @property
    def fixed_bonds(self) -> tuple[tuple[int, int, float], ...]:
        """Bonds of constrained length that every sample has: ``(i, j, length [nm])``."""
        return self._flows[0].fixed_bonds

    @property
    def coordinates(self) -> Any:
        """The coordinate map of the first part: how its atoms are bonded and in which order they are placed."""
        return self._flows[0].coordinates

    @property
    def metadata(self) -> FlowMetadata:
        """System and temperature are those of all parts; ``training`` lists theirs."""
        parts = [{"share": float(s), "training": f.metadata.training} for s, f in zip(self.shares, self._flows)]
        known = next((f.metadata for f in self._flows if f.metadata.fingerprint is not None), self._flows[0].metadata)
        return replace(known, training={"mixture of": parts})

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights, of the least precise part."""
        return torch.float32 if any(f.dtype == torch.float32 for f in self._flows) else torch.float64

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._flows[0].device

    def fuse(self, fused: bool = True) -> "FlowMixture":
        """As :meth:`Flow.fuse`, of all parts."""
        for flow in self._flows:
            flow.fuse(fused)
        return self

    def log_probs(self, x: Tensor) -> Tensor:
        """Log-density of each part `(n_parts, n)`, float64, of positions `(n, n_atoms, 3)` [nm]; no gradient."""
        return torch.stack([flow.log_prob(x).double() for flow in self._flows])

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density `(n,)`, float64, of positions `(n, n_atoms, 3)` [nm]; no gradient."""
        return self._mixed(self.log_probs(torch.as_tensor(x)))

    def _mixed(self, log_probs: Tensor) -> Tensor:
        return torch.logsumexp(log_probs + self.shares.log()[:, None], 0)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw independent positions `(n, n_atoms, 3)` [nm] with their log-density `(n,)`, float64.

        Rows that fall outside the coordinates' domain are NaN; they count as samples of zero weight.
        """
        if n < 1:
            raise InputError(f"n is {n}; at least one sample is needed")
        # A part for each row, not so many rows for each part: rows of a pool are independent draws in a Markov chain.
        device = generator.device if generator is not None else self.device
        chosen = torch.multinomial(self.shares.to(device), n, replacement=True, generator=generator).to(self.device)
        x = torch.full((n, self.n_atoms, 3), torch.nan, dtype=torch.float64, device=self.device)
        log_q = x.new_full((n,), torch.nan)
        for k, flow in enumerate(self._flows):
            rows = (chosen == k).nonzero()[:, 0]
            if len(rows):
                drawn = flow.sample(self._size(len(rows)), generator)
                x[rows], own = (t[: len(rows)].double() for t in drawn)
                there = torch.isfinite(x[rows]).flatten(1).all(1)  # for other rows the other parts have no density
                log_probs = own.new_full((len(self._flows), len(rows)), -torch.inf)
                log_probs[k] = own
                for j in {*range(len(self._flows))} - {k} if bool(there.any()) else ():
                    log_probs[j, there] = self._judged(self._flows[j], x[rows[there]])
                log_q[rows] = self._mixed(log_probs)
        return x, log_q

    def _size(self, n: int) -> int:
        """Rows in which a part works: on a GPU powers of two, as sizes that change in every call are recorded anew."""
        return n if self.device.type == "cpu" else 1 << (n - 1).bit_length()

    def _judged(self, flow: Flow, x: Tensor) -> Tensor:
        """A part's log-density `(n,)` of positions `(n, n_atoms, 3)`, the last of them repeated up to `_size`."""
        more = self._size(len(x)) - len(x)
        return flow.log_prob(torch.cat([x, x[-1:].expand(more, -1, -1)]))[: len(x)].double()

    def covers(self, x: Tensor) -> Tensor:
        """Whether positions `(n, n_atoms, 3)` [nm] have a place in the coordinates of the parts `(n,)`."""
        return self._flows[0].covers(x)

    def frame_log_density(self, x: Tensor) -> Tensor:
        """Log-density `(n,)` of the rigid-body coordinates that `log_prob` carries and ``exp(-u)`` does not."""
        return self._flows[0].frame_log_density(x)

    def save(self, path: str | Path, *, bits: Literal[8, 16, 32] = 32) -> None:
        """Write the parts and their shares to one file, as :meth:`Flow.save` writes one flow.

        Args:
            path: of the file.
            bits: of a weight in the file, see :meth:`Flow.save`.
        """
        packed = [flow.packed(bits) for flow in self._flows]
        header = {
            "format": KIND,
            "format_version": FORMAT_VERSION,
            "package_version": __version__,
            "shares": self.shares.tolist(),
            "parts": [header for header, _ in packed],
        }
        tensors = {f"{k}.{name}": v for k, (_, part) in enumerate(packed) for name, v in part.items()}
        write_safetensors(Path(path), tensors, header)
        self.path = Path(path).absolute()

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "FlowMixture":
        """Read a mixture's file; no code in it is run.

        Raises:
            InputError: no such file, or an unknown device.
            CorruptFileError: truncated, damaged, or not a mixture of this package.
        """
        header, tensors = read_safetensors(Path(path), KIND, FORMAT_VERSION)
        try:
            parts = [
                Flow.unpacked(part, {n.split(".", 1)[1]: v for n, v in tensors.items() if n.startswith(f"{k}.")}, path)
                for k, part in enumerate(header["parts"])
            ]
            mixture = cls(parts, header["shares"])
        except (KeyError, TypeError, InputError) as error:
            raise CorruptFileError(f"{path} does not describe a mixture of this package: {error}") from error
        mixture.path = Path(path).absolute()
        return mixture.to(device).eval()


def load_flow(path: str | Path, device: str | torch.device = "cpu") -> Flow | FlowMixture:
    """Read the file of a flow or of a mixture of flows; no code in it is run.

    Raises:
        InputError: no such file, or an unknown device.
        CorruptFileError: truncated, damaged, or neither of these.
    """
    kind: type[Flow] | type[FlowMixture] = FlowMixture if kind_of(Path(path)) == KIND else Flow
    return kind.load(path, device)


def one_flow(flow: Any, what: str) -> Flow:
    """The flow, if it is one, where latents are needed.

    Args:
        flow: or a mixture.
        what: needs them.

    Raises:
        InputError: a mixture.
    """
    if isinstance(flow, FlowMixture):
        raise InputError(f"{what} needs one flow, with its latents, and this is a mixture; give its parts one by one")
    return flow


def _difference(a: Any, b: Any) -> str:
    """Two values that differ, where they are short enough for a message."""
    return f": {a} and {b}" if len(f"{a}{b}") < 80 else ""


def fitted_shares(log_q: Tensor, u: Tensor) -> Tensor:
    """The shares `(n_parts,)` of least KL(p || q), from equally many draws of every part.

    Draws count as ones of the equal mixture, reweighted to the target; the divergence is convex in the shares, and
    expectation maximisation lowers it in every step (Cappe et al., Stat. Comput. 18, 447 (2008)).

    Args:
        log_q: `(n_parts, n)` log-density of every part at every draw, float64.
        u: `(n,)` reduced energies of the draws, finite.
    """
    weights = torch.softmax(-u - torch.logsumexp(log_q, 0), 0)
    shares = torch.full((len(log_q),), 1 / len(log_q), dtype=torch.float64, device=log_q.device)
    for _ in range(MAX_STEPS):
        held = torch.softmax(log_q + shares.log()[:, None], 0)  # the part of the density at each draw that is k's
        before, shares = shares, (held * weights).sum(1)
        if float((shares - before).abs().max()) < SHARE_TOLERANCE:
            break
    return shares


def _check_alike(first: Flow, other: Flow) -> None:
    """Refuse two flows whose densities do not live on the same measure, or that learned different targets."""

    def rotors(flow: Flow) -> list[tuple[int, ...]]:
        """Their atoms as they go round, from the lowest number on."""
        groups = [rotor.atoms for rotor in getattr(flow.coordinates, "rotors", ())]
        return sorted(g[g.index(min(g)) :] + g[: g.index(min(g))] for g in groups)

    def bonds(flow: Flow) -> set[frozenset[int]]:
        zmatrix = getattr(flow.coordinates, "zmatrix", None)
        return set() if zmatrix is None else set(map(frozenset, zmatrix.bonds))

    for what, a, b in (
        ("numbers of atoms", first.n_atoms, other.n_atoms),
        ("kinds of coordinates", first.rotation_invariant, other.rotation_invariant),
        ("places in space", first.coordinates.held, other.coordinates.held),
        ("interchangeable atoms, or of another sense of theirs,", rotors(first), rotors(other)),
        ("bonds between atoms", bonds(first), bonds(other)),
        ("bonds of fixed length", sorted(first.fixed_bonds), sorted(other.fixed_bonds)),
        ("devices", first.device, other.device),
    ):
        if a != b:
            raise IncompatibleFlowError(f"flows of different {what} make no mixture{_difference(a, b)}")
    if digest(first.state_dict()) == digest(other.state_dict()):
        raise InputError("two of the flows are the same; a mixture of them costs twice as much and is no better")
    ours, theirs = first.metadata.target, other.metadata.target
    if any(a is not None and b is not None and a != b for a, b in zip(ours.values(), theirs.values())):
        raise IncompatibleFlowError(
            "flows of different Systems or temperatures make no mixture; give flows of one target"
        )
