"""One device for torch and OpenMM: its choice from one flag, and positions between a Context and torch.

Two ways stand behind `read_positions` and `write_positions`: ``host``, which always works, and ``native``, a device to
device copy for a Context on CUDA (see native.py). OpenMM keeps a CUDA context of its own and its Python interface
offers no device pointers, so the native way needs a compiled helper; where that cannot be had, or its self-test fails,
there is one warning and the host carries the positions.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from openmm_regflow.device import host
from openmm_regflow.device.choice import (
    memory_line,
    openmm_properties,
    resolve_device,
    synchronize,
    why_no_gpu,
)
from openmm_regflow.device.native import Native, Unavailable
from openmm_regflow.errors import InputError, warn_once

__all__ = [
    "Transfer",
    "choose_way",
    "memory_line",
    "openmm_properties",
    "read_positions",
    "resolve_device",
    "self_test",
    "synchronize",
    "why_no_gpu",
    "write_positions",
]

Way = Literal["auto", "host", "native"]
#: Two readings of the same positions differ by no more than this [nm]: both add up the same floats.
SAME = 1e-9


class _Carrier(Protocol):
    """Something that reads and writes the positions of a Context."""

    def read(self, context: Any, device: torch.device) -> Tensor: ...

    def write(self, context: Any, positions: Tensor) -> None: ...


@dataclass
class Transfer:
    """How the positions of one Context travel.

    Attributes:
        way: "host" or "native".
        reason: why this way, in words: what speaks against the native one, or for it.
        microseconds: time of a reading by each way that was measured.
        carrier: does it.
    """

    way: str
    reason: str
    microseconds: dict[str, float] = field(default_factory=dict)
    carrier: Any = field(default=host, repr=False)


_CHOSEN: WeakKeyDictionary[Any, dict[torch.device, Transfer]] = WeakKeyDictionary()


def read_positions(context: Any, device: torch.device | str = "cpu", way: Way = "auto") -> Tensor:
    """Positions of an ``openmm.Context`` as a tensor on any device; molecules are not moved by the box.

    Args:
        context: of any platform.
        device: where the tensor goes.
        way: "auto" takes the quicker one of those that pass the self-test, see `choose_way`.

    Returns:
        `(n_atoms, 3)` [nm], float64.
    """
    where = torch.device(device)
    return _carrier(context, where, way).read(context, where)


def write_positions(context: Any, positions: Tensor, way: Way = "auto") -> None:
    """Put positions from any device into an ``openmm.Context``; velocities and box stay as they are.

    Args:
        context: of any platform.
        positions: `(n_atoms, 3)` [nm].
        way: as in `read_positions`.

    Raises:
        InputError: another shape, or NaN.
    """
    expected = (context.getSystem().getNumParticles(), 3)
    if tuple(positions.shape) != expected:
        raise InputError(f"positions of shape {tuple(positions.shape)} do not fit the Context; {expected} is needed")
    if not bool(torch.isfinite(positions).all()):
        raise InputError("positions hold NaN or infinity; a Context cannot take them")
    _carrier(context, positions.device, way).write(context, positions)


def choose_way(context: Any, device: torch.device | str = "cpu") -> Transfer:
    """How positions travel between a Context and a device; found out once for each.

    The native way comes into question where the tensor is on a GPU and the Context on the CUDA platform. There it must
    read what ``getState`` reads, write what ``getState`` then returns, and be quicker than the host; a failure gives
    one warning.
    """
    where = torch.device(device)
    if where == torch.device("cuda") and torch.cuda.is_available():
        where = torch.device("cuda", torch.cuda.current_device())  # which may be another one later
    known = _CHOSEN.setdefault(context, {})
    if where not in known:
        known[where] = _choose(context, where)
    return known[where]


def self_test(carrier: _Carrier, context: Any, device: torch.device) -> None:
    """Compare a way with ``getState`` on this Context; its positions are the same afterwards.

    Raises:
        Unavailable: they differ.
    """
    before = host.read(context, device)
    difference = float((carrier.read(context, device) - before).abs().max())
    if not difference <= SAME:
        raise Unavailable(f"it reads positions that are {difference:.1e} nm off")
    # An atom's own shift: a wrong order would show.
    moved = before + 1e-3 * torch.arange(before.numel(), device=device).view_as(before) / before.numel() + 1e-4
    try:
        host.write(context, moved)
        expected = host.read(context, device)  # as far as the platform's precision goes, corrections and all
        host.write(context, before)
        carrier.write(context, moved)
        difference = float((host.read(context, device) - expected).abs().max())
    finally:
        host.write(context, before)
    if not difference <= SAME:
        raise Unavailable(f"it writes positions that are {difference:.1e} nm off")


def _carrier(context: Any, device: torch.device, way: Way) -> _Carrier:
    if way == "host":
        return host
    if way == "native":
        if context.getPlatform().getName() == "CUDA" and device.type != "cuda":
            raise InputError(f"the native way goes to the GPU of the Context; the tensor is on {device}")
        return Native(context.getPlatform().getName())
    return choose_way(context, device).carrier


def _choose(context: Any, device: torch.device) -> Transfer:
    if device.type != "cuda" or context.getPlatform().getName() != "CUDA":
        return Transfer("host", "the tensor or the Context is not on a CUDA device")
    try:
        native = Native()
        index = native.describe(context)[-1]
        if index != device.index:
            raise Unavailable(f"the Context is on CUDA device {index}, the tensor on {device}")
        self_test(native, context, device)
    except Unavailable as error:
        warn_once(f"positions travel by way of the host: {error}", stacklevel=4)
        return Transfer("host", str(error))
    ways: dict[str, Any] = {"host": host, "native": native}
    times = {name: _microseconds(partial(way.read, context, device), device) for name, way in ways.items()}
    if times["native"] < times["host"]:
        return Transfer("native", f"it passed its test and is quicker ({_compared(times)})", times, native)
    return Transfer("host", f"the host is quicker ({_compared(times)})", times)


def _compared(times: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f} µs" for name, value in times.items())


def _microseconds(call: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """Shortest time of a call [µs]; readings end with the device idle."""
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 1e6 * best
