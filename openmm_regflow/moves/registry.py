"""One flow, pool and random state per process for all the copies of a move.

openmmtools deep-copies a move for every thermodynamic state and writes all of them as YAML at every iteration. A move
therefore carries a description (path and SHA-256 of the flow file, settings), never weights; what the copies share
lives here, is found by that description, and is rebuilt from the file in a new process.
"""

import contextlib
import hashlib
import json
import uuid
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch

from openmm_regflow.device import resolve_device
from openmm_regflow.errors import CorruptFileError, IncompatibleFlowError, InputError, UnsupportedForceError
from openmm_regflow.flows import Flow
from openmm_regflow.mixtures import FlowMixture, load_flow
from openmm_regflow.potentials import OpenMMPotential, TorchPotential, platform_names
from openmm_regflow.proposals import FlowProposal, SubsetProposal
from openmm_regflow.sampling import ProposalPool, new_pool


@dataclass(frozen=True)
class Description:
    """What a storage file says about a proposal; plain values only.

    Attributes:
        flow_path: of the flow file; None for a flow that was never saved.
        flow_sha256: of that file's bytes, or a process-wide label for an unsaved flow.
        temperature: [K] of the proposal.
        potential: ``{"kind": "torch" | "openmm" | "custom", ...options}``.
        allow_mismatch: see :class:`openmm_regflow.proposals.FlowProposal`.
        frame: ``"auto"``, ``"free"`` or ``"fixed"``.
        chunk_size: rows per call of flow and potential.
        device: of the flow.
        pool_size: proposals drawn at a time.
        seed: of the shared random state; None to take one from NumPy's global state, as openmmtools does.
        atom_subset: atoms that a :class:`openmm_regflow.proposals.SubsetProposal` moves; None for all.
        frame_atoms: its frame atoms.
        identity: of the move that was constructed, random; its copies have it too, live and restored, and no other
            move has. So two moves never share a pool or random state, however alike they are.
    """

    flow_path: str | None
    flow_sha256: str
    temperature: float
    potential: dict[str, Any]
    allow_mismatch: bool
    frame: str
    chunk_size: int
    device: str
    pool_size: int
    seed: int | None
    atom_subset: list[int] | None
    frame_atoms: list[int] | None
    identity: str = ""

    @property
    def key(self) -> str:
        """Equal for the copies of one move; the flow counts by its contents, not by its path."""
        return json.dumps({**vars(self), "flow_path": None}, sort_keys=True)


@dataclass
class Shared:
    """What all copies of a move in this process use.

    Attributes:
        proposal: flow, potential and temperature.
        pool: its draws.
        generator: of draws and decisions.
        n_steps: flow steps of all copies so far, those before a restart included.
    """

    proposal: FlowProposal
    pool: ProposalPool
    generator: torch.Generator
    n_steps: int = 0


#: As long as a move or a copy of it is alive; each one holds its own.
_SHARED: weakref.WeakValueDictionary[str, Shared] = weakref.WeakValueDictionary()
_RELINKED: dict[str, tuple[str, bool]] = {}


def relink(old_path: str | Path, new_path: str | Path, *, allow_changed: bool = False) -> None:
    """Tell moves restored from storage where their flow file is now.

    Call it before continuing a stored run; the next storage written holds the new path.

    Args:
        old_path: as the storage file (and the error) names it.
        new_path: where the file is.
        allow_changed: accept other contents, such as a flow trained further. The chain stays exact; the log-weight
            statistics then mix two flows.

    Raises:
        InputError: no file at ``new_path``.
    """
    if not Path(new_path).is_file():
        raise InputError(f"no flow file at {new_path}; give the path where it is now")
    _RELINKED[str(Path(old_path).absolute())] = (str(Path(new_path).absolute()), allow_changed)


def describe(
    proposal: FlowProposal, pool_size: int, flow_path: str | Path | None, seed: int | None
) -> Description:
    """The description of a live proposal, by default with the flow's own file.

    Raises:
        InputError: no file at ``flow_path``.
        IncompatibleFlowError: the file holds another flow than the proposal.
    """
    if flow_path is None:
        flow_path = own_file(proposal.flow)
    else:
        _check_same(proposal.flow, Path(flow_path))
    return Description(
        flow_path=None if flow_path is None else str(Path(flow_path).absolute()),
        flow_sha256=f"unsaved-{id(proposal)}" if flow_path is None else file_sha256(Path(flow_path)),
        temperature=proposal.temperature,
        potential=_describe_potential(proposal.potential),
        allow_mismatch=proposal.allow_mismatch,
        frame=proposal.frame,
        chunk_size=proposal.chunk_size,
        device=str(proposal.device),
        pool_size=pool_size,
        seed=seed,
        atom_subset=proposal.atom_subset,
        frame_atoms=proposal.frame_atoms,
        identity=uuid.uuid4().hex[:16],
    )


def register(description: Description, proposal: FlowProposal, n_steps: int = 0) -> Shared:
    """Make a live proposal what copies with this description use; starts a fresh pool and random state.

    Args:
        description: of the proposal.
        proposal: live.
        n_steps: flow steps before a restart; a random state that had begun at the seed again would repeat them.
    """
    generator = torch.Generator().manual_seed(_seed(description, proposal, n_steps))
    shared = Shared(proposal, new_pool(proposal, description.pool_size, generator), generator, n_steps)
    _SHARED[description.key] = shared
    return shared


def find(description: Description, system: openmm.System, n_steps: int = 0) -> tuple[Description, Shared]:
    """What a description stands for in this process, loaded from the flow file on first use.

    Args:
        description: from a live or a restored move.
        system: of the state that the move is applied to; the potential of a restored proposal is built for it.
        n_steps: flow steps before the restart, see :func:`register`.

    Returns:
        The description, with path and hash of a relinked file, and what it stands for.

    Raises:
        InputError: the flow file is gone, or the state's energy fixes the frame of the molecule, which was free.
        IncompatibleFlowError: the flow file has changed, or belongs to another System.
    """
    if (shared := living(description)) is not None:
        return description, shared
    description = _located(description)
    if (shared := living(description)) is None:
        flow = load_flow(str(description.flow_path), device=_device(description.device))
        shared = register(description, _build_proposal(description, flow, system), n_steps)
    return description, shared


def living(description: Description) -> Shared | None:
    """What a description stands for, if a move with it is alive in this process."""
    return _SHARED.get(description.key)


def steps_so_far(description: Description, before: int) -> int:
    """Flow steps of all copies in this process and before it, for storage: ``before`` where none was taken here."""
    shared = living(description)
    return before if shared is None else shared.n_steps


def _located(description: Description) -> Description:
    """The description with a flow file that exists and has the right contents."""
    stored = str(description.flow_path)
    path, allow_changed = _RELINKED.get(stored, (stored, False))
    if not Path(path).is_file():
        raise InputError(
            f"the flow file {path} of this FlowMove is gone; if it was moved, call "
            f"openmm_regflow.moves.relink({stored!r}, new_path) and open the storage again (from_storage)"
        )
    sha256 = file_sha256(Path(path))
    if sha256 != description.flow_sha256 and not allow_changed:
        raise IncompatibleFlowError(
            f"the flow file {path} has changed since it was stored (SHA-256 {sha256[:12]}, stored "
            f"{description.flow_sha256[:12]}); put the old one back, or call openmm_regflow.moves.relink({stored!r}, "
            "new_path), with allow_changed=True if another flow is meant"
        )
    return Description(**{**vars(description), "flow_path": path, "flow_sha256": sha256})


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def own_file(flow: Any) -> Path | None:
    """The file that a flow was loaded from or saved to; None where it is gone or the flow has changed since."""
    path: Path | None = getattr(flow, "path", None)
    if path is None or not path.is_file():
        return None
    try:
        stored = load_flow(path)
    except CorruptFileError:
        return None
    return path if _same_weights(stored, flow) and stored.metadata == flow.metadata else None


def _same_weights(stored: Any, flow: Any) -> bool:
    """Whether two flows have the same weights."""
    a, b = stored.state_dict(), flow.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name].cpu()) for name in a)


def _check_same(flow: Any, path: Path) -> None:
    """Refuse a file that holds other weights than the live flow."""
    if not path.is_file():
        raise InputError(f"no flow file at {path}; write it first with flow.save({str(path)!r})")
    if not _same_weights(load_flow(path), flow):
        raise IncompatibleFlowError(f"{path} holds another flow than the proposal; call flow.save({str(path)!r}) again")


def _describe_potential(potential: Any) -> dict[str, Any]:
    """Kind and options of a potential, enough to build it for a System again."""
    if not isinstance(potential, TorchPotential | OpenMMPotential):
        return {"kind": "custom"}
    kind = "torch" if isinstance(potential, TorchPotential) else "openmm"
    return {"kind": kind, "parameters": dict(potential.parameters), **potential.options}


def _build_potential(description: dict[str, Any], system: openmm.System) -> Any:
    """A potential for a System, with the options that it had. A custom callable comes back as OpenMM's own energy.

    So does a torch potential if the state has forces beside those of the live proposal's System (a bias) that torch
    does not cover: the Context's energy decides there anyway.
    """
    options = {k: v for k, v in description.items() if k not in ("kind", "parameters")}
    potential: Any = None
    if description["kind"] == "torch":
        with contextlib.suppress(UnsupportedForceError):
            options |= {"dtype": getattr(torch, options["dtype"]), "device": _device(options.get("device", "cpu"))}
            potential = TorchPotential(system, **options)
    elif description["kind"] == "openmm":
        potential = OpenMMPotential(system, **_available(options))
    potential = OpenMMPotential(system) if potential is None else potential
    for name, value in description.get("parameters", {}).items():
        if name in potential.parameters:
            potential.set_parameter(name, value)
    return potential


def _device(stored: str) -> torch.device:
    """A stored device, or the CPU where this machine lacks it, which is said."""
    try:
        return resolve_device(stored)
    except InputError as error:
        warnings.warn(
            f"a stored flow move was on the device {stored}, which is not here; it goes on on the CPU ({error})",
            stacklevel=1,  # flow and potential of one move say it once
        )
        return torch.device("cpu")


def _available(options: dict[str, Any]) -> dict[str, Any]:
    """Options of an OpenMMPotential without a platform that this machine lacks, which is said."""
    known = platform_names()
    if options.get("platform") in (None, *known):
        return options
    warnings.warn(
        f"a stored flow move had its energies from OpenMM's {options['platform']} platform, which is not here; the "
        f"fastest of {', '.join(known)} is taken",
        stacklevel=2,
    )
    return options | {"platform": None, "properties": {}}


def _build_proposal(description: Description, flow: Flow | FlowMixture, system: openmm.System) -> FlowProposal:
    """The proposal of a description for a System."""
    potential = _build_potential(description.potential, system)
    options: dict[str, Any] = {"allow_mismatch": description.allow_mismatch, "chunk_size": description.chunk_size}
    if description.atom_subset is None:
        options |= {"frame": description.frame, "extra_forces": True}
        proposal = FlowProposal(flow, potential, description.temperature, **options)
        if description.frame == "free":  # that was the System of the live proposal
            x = proposal.draw(16, torch.Generator(device=proposal.device).manual_seed(0)).positions
            proposal.check_state_system(system)
            proposal.check_state_energy(proposal.reduced_potential, x, torch.float32)
        return proposal
    options["frame_atoms"] = description.frame_atoms
    return SubsetProposal(flow, potential, description.temperature, description.atom_subset, **options)


def _seed(description: Description, proposal: FlowProposal, n_steps: int) -> int:
    """The seed of this MPI rank and run, from the user's or from NumPy's global state (what openmmtools users set).

    Ranks run the same program, but each draws for its own replicas: with one seed they would all propose the same. A
    run that goes on after a restart would propose again what it has proposed before.
    """
    import mpiplus

    communicator = mpiplus.get_mpicomm()
    rank = 0 if communicator is None else communicator.rank
    seed = description.seed
    entropy = np.random.randint(0, 2**31 - 1, size=2).tolist() if seed is None else [seed % 2**64, *proposal.stream]
    entropy += [rank, n_steps]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
