"""The one face of every bijection: value and log-determinant together, in both directions."""

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
