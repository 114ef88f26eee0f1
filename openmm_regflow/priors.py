"""Where a flow starts: a normal or a harmonic prior on lines, a uniform one on circles."""

import math

import torch
from torch import Tensor, nn

from openmm_regflow.coordinates import CartesianMap


class Prior(nn.Module):
    """Standard normal on lines, uniform on circles; or a harmonic chain of atoms, normal with their covariance.

    Args:
        circular: `(dim,)` bool.
        factor: `(n_atoms, n_atoms)` lower triangle L of a harmonic prior on Cartesian features: each of the three
            components is N(0, L L^T) over the atoms (as in Stärk et al. 2024, arXiv 2310.05764, section 3.2); None
            for independent features.
    """

    circular: Tensor
    factor: Tensor | None

    def __init__(self, circular: Tensor, factor: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("circular", circular, persistent=False)
        self.register_buffer("factor", factor)
        n_circular = int(circular.sum())
        n_linear = circular.numel() - n_circular
        self.log_norm = -0.5 * n_linear * math.log(2 * math.pi) - n_circular * math.log(2 * math.pi)

    @property
    def kind(self) -> str:
        """ "normal" or "harmonic"."""
        return "normal" if self.factor is None else "harmonic"

    def sample(self, n: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw `(n, dim)` with the generator's device, delivered on the prior's own."""
        device = generator.device if generator is not None else self.circular.device
        shape = (n, self.circular.numel())
        z = torch.randn(shape, generator=generator, dtype=dtype, device=device)
        angle = (2 * torch.rand(shape, generator=generator, dtype=dtype, device=device) - 1) * math.pi
        z = torch.where(self.circular, angle.to(self.circular.device), z.to(self.circular.device))
        return z if self.factor is None else (self.factor.to(dtype) @ z.view(n, -1, 3)).flatten(1)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density `(n,)` of `(n, dim)`."""
        if self.factor is None:
            return torch.where(self.circular, 0.0, -0.5 * z * z).sum(-1) + self.log_norm
        factor = self.factor.to(z.dtype)
        white = torch.linalg.solve_triangular(factor, z.reshape(z.shape[0], -1, 3), upper=False)
        return -0.5 * white.square().sum((1, 2)) - 3 * factor.diagonal().log().sum() + self.log_norm

    def entropy(self) -> float:
        """Differential entropy, ``-E log p(z)``."""
        spread = 0.0 if self.factor is None else 3 * float(self.factor.diagonal().log().sum())
        return 0.5 * int((~self.circular).sum()) - self.log_norm + spread


def harmonic_factor(coordinates: CartesianMap, x: Tensor) -> Tensor:
    """Factor `(n_atoms, n_atoms)`, float64, of the harmonic prior with the covariance of a molecule's features.

    Over all orientations the features of data are isotropic: ``C = <x_i . x_j> / 3`` about the centre, plus the
    variance of the centre. Such a prior has the mean square distance of every pair of atoms right.

    Args:
        coordinates: the map that makes the features.
        x: `(n, n_atoms, 3)` [nm].
    """
    centred = (x - x.mean(1, keepdim=True)).double()
    inner = torch.einsum("nia,nja->ij", centred, centred) / (3 * len(x))
    covariance = inner + coordinates.com_std**2
    # A hundredth of a picometre keeps rigid arrangements of atoms (fewer frames than atoms) positive definite.
    ridge = 1e-10 * torch.eye(len(covariance), dtype=torch.float64, device=x.device)
    return torch.linalg.cholesky(covariance + ridge) / coordinates.scale
