"""The one face of every bijection: value and log-determinant together, in both directions."""

import torch
from torch import Tensor, nn


class Bijection(nn.Module):
    """An invertible map of `(n, dim)` vectors; subclasses give both directions with their log-determinants."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Noise to data: `(n, dim)` -> value `(n, dim)`, log|det dy/dz| `(n,)`."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise: `(n, dim)` -> value `(n, dim)`, log|det dz/dy| `(n,)`."""
        raise TypeError(f"{type(self).__name__} does not define inverse")


class Composition(Bijection):
    """Bijections applied one after another.

    Args:
        parts: in the order noise -> data.
    """

    def __init__(self, parts: list[Bijection]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Noise to data; the log-determinants add."""
        total = z.new_zeros(z.shape[0])
        for part in self.parts:
            z, log_det = part(z)
            total = total + log_det
        return z, total

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise; the log-determinants add."""
        total = y.new_zeros(y.shape[0])
        for part in reversed(self.parts):
            y, log_det = part.inverse(y)  # type: ignore[operator]
            total = total + log_det
        return y, total


class Within(Bijection):
    """A bijection of some elements, which sees these alone; the others pass unchanged.

    Args:
        where: `(dim,)` bool, True where an element is given to `inside`.
        inside: of as many elements as `where` names.
    """

    index: Tensor

    def __init__(self, where: Tensor, inside: Bijection) -> None:
        super().__init__()
        self.register_buffer("index", torch.nonzero(where)[:, 0], persistent=False)
        self.inside = inside

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Noise to data."""
        y, log_det = self.inside(z.index_select(1, self.index))
        return z.index_copy(1, self.index, y), log_det

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise."""
        z, log_det = self.inside.inverse(y.index_select(1, self.index))
        return y.index_copy(1, self.index, z), log_det
