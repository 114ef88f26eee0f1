"""Choice of the torch device from one flag, and positions between an OpenMM Context and torch."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_regflow.errors import InputError


def resolve_device(name: str = "cpu") -> torch.device:
    """The torch device for a name given by the user.

    Args:
        name: "cpu", "cuda", "cuda:1", ...; "auto" takes a GPU where there is one and the CPU otherwise.

    Raises:
        InputError: an unknown name, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}; known: cpu, cuda, cuda:N, auto") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported; known: cpu, cuda, cuda:N, auto")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device was found by torch; use --device cpu, or --device auto to choose by itself")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"there is no {name}; {torch.cuda.device_count()} CUDA device(s) were found")
    return device


def read_positions(context: Any, device: torch.device | str = "cpu") -> Tensor:
    """Positions of an ``openmm.Context`` as a tensor on any device, by way of the host.

    OpenMM keeps a CUDA context of its own and its Python interface offers no device pointers, so one copy through the
    host is the way that always works.

    Args:
        context: of any platform.
        device: where the tensor goes.

    Returns:
        `(n_atoms, 3)` [nm], float64.
    """
    positions = context.getState(positions=True).getPositions(asNumpy=True)
    return torch.as_tensor(np.asarray(positions._value, dtype=np.float64)).to(device)


def write_positions(context: Any, positions: Tensor) -> None:
    """Put positions from any device into an ``openmm.Context``; velocities and box stay as they are.

    Args:
        context: of any platform.
        positions: `(n_atoms, 3)` [nm].

    Raises:
        InputError: another shape, or NaN.
    """
    expected = (context.getSystem().getNumParticles(), 3)
    if tuple(positions.shape) != expected:
        raise InputError(f"positions of shape {tuple(positions.shape)} do not fit the Context; {expected} is needed")
    values = positions.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(values).all()):
        raise InputError("positions hold NaN or infinity; a Context cannot take them")
    context.setPositions(values.numpy())
