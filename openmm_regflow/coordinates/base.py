"""The face of a coordinate map: positions [nm] to the vector a flow works on, with the exact measure."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: Rows of `CoordinateMap.features_of` at a time.
CPU_PART, DEVICE_PART = 1024, 65536


class CoordinateMap(nn.Module):
    """Maps positions `(n, n_atoms, 3)` [nm] to features `(n, dim)` and back.

    A log-determinant here relates the density of the features to the density that ``exp(-u(x))`` is written
    in; what that density leaves out (the rigid-body motion) is returned by `frame_log_density`.

    Attributes:
        circular: `(dim,)` bool, True where a feature is an angle in [-pi, pi).
        rotation_invariant: True if turning or shifting the molecule does not change the features.
        com_std: standard deviation of the centre of geometry [nm], 0 if the features do not carry it.
        held: True if features hold place and orientation of a molecule that forces keep where it is.
    """

    circular: Tensor
    n_atoms: int
    rotation_invariant: bool
    com_std: float

    @property
    def held(self) -> bool:
        """False but for Cartesian features of molecules in external fields."""
        return False

    @property
    def dim(self) -> int:
        """Number of features."""
        return int(self.circular.numel())

    def to_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Positions `(n, n_atoms, 3)` [nm] -> features `(n, dim)`, log|det dy/dx| `(n,)`."""
        raise TypeError(f"{type(self).__name__} does not define to_features")

    @torch.no_grad()
    def features_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`to_features` of any number of rows, without gradients, in parts whose intermediates stay in a core's cache.

        All at once, a quarter of a million frames take four times as long.
        """
        parts = [self.to_features(part) for part in x.split(CPU_PART if x.device.type == "cpu" else DEVICE_PART)]
        return torch.cat([y for y, _ in parts]), torch.cat([log_det for _, log_det in parts])

    def to_positions(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(n, dim)` -> positions `(n, n_atoms, 3)` [nm], log|det dx/dy| `(n,)`."""
        raise TypeError(f"{type(self).__name__} does not define to_positions")

    def covers(self, x: Tensor) -> Tensor:
        """Whether positions have a place in these coordinates at all `(n,)`; default: all."""
        return torch.ones(len(x), dtype=torch.bool, device=x.device)

    def frame_log_density(self, x: Tensor) -> Tensor:
        """Log-density `(n,)` of the rigid-body coordinates that the features carry; zeros if none."""
        return x.new_zeros(x.shape[0])

    def relabel(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw the labels of interchangeable atoms uniformly; the identity where there are none."""
        return x

    def random_turns(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Labels `(n, n_groups)` drawn uniformly, on the generator's device; see `turned`."""
        return torch.zeros(n, 0, dtype=torch.long)

    def turns(self, x: Tensor) -> Tensor:
        """Labels of interchangeable atoms that features leave out `(n, n_groups)`; `(n, 0)` where there are none."""
        return torch.zeros(len(x), 0, dtype=torch.long, device=x.device)

    def turned(self, x: Tensor, turns: Tensor) -> Tensor:
        """Positions from `to_positions` with labels `(n, n_groups)`; the inverse of leaving them out."""
        return x

    def augment(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Training positions with rigid-body motion as the flow's measure assumes it; default: none."""
        return x

    def refresh(self) -> None:
        """Recompute what follows from fitted tensors after they were loaded; default: nothing."""

    def config(self) -> Mapping[str, Any]:
        """JSON-ready constructor arguments, without the fitted tensors."""
        raise TypeError(f"{type(self).__name__} does not define config")
