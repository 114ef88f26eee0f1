"""The way by the host: OpenMM's own State, one copy to the tensor's device. It always works."""

from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Page-locked buffers by shape: a GPU reads and writes them without a second copy.
_PINNED: dict[tuple[int, ...], Tensor] = {}
_IN_USE = Lock()


def read(context: Any, device: torch.device) -> Tensor:
    """Positions `(n_atoms, 3)` [nm], float64 on the device, as `getState` gives them (no periodic wrapping)."""
    positions = context.getState(positions=True).getPositions(asNumpy=True)
    values = torch.from_numpy(np.ascontiguousarray(positions._value, dtype=np.float64))
    if device.type == "cpu":
        return values
    with _IN_USE:  # one buffer serves all threads, and the next call
        return _staging(values.shape).copy_(values).to(device)


def write(context: Any, positions: Tensor) -> None:
    """Set positions `(n_atoms, 3)` [nm] from any device."""
    if positions.device.type == "cpu":
        context.setPositions(positions.detach().double().numpy())
        return
    with _IN_USE:
        context.setPositions(_staging(positions.shape).copy_(positions.detach()).numpy())  # OpenMM keeps a copy


def _staging(shape: torch.Size) -> Tensor:
    """The buffer for a shape, float64; to be used under the lock."""
    key = tuple(shape)
    if key not in _PINNED:
        _PINNED[key] = torch.empty(key, dtype=torch.float64).pin_memory()
    return _PINNED[key]
