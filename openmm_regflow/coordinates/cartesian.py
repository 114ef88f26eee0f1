"""Cartesian features: all 3N coordinates, scaled, with noise on the centre so that the density is regular."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from openmm_regflow.coordinates.base import CoordinateMap
from openmm_regflow.errors import InputError
from openmm_regflow.rigid import random_rotations


class CartesianMap(CoordinateMap):
    """Features ``y = x / scale`` on R^{3N}; the centre of geometry is N(0, com_std^2) and the orientation uniform.

    The target on R^{3N} is ``exp(-u(x)) N(centre; 0, com_std^2)``, its orientation uniform; the log-weight of a
    sample is ``-u(x) + frame_log_density(x) - log q(x)``. Mean-free data alone would make the density singular
    (as in equivariant flows, Klein et al. 2023, arXiv 2306.15030).

    Of a molecule that forces hold in its place, place and orientation are part of what is learned: features are
    ``y = (x - place) / scale``, the target is ``exp(-u(x))`` itself, and no frame is drawn anew.

    Args:
        n_atoms: number of atoms.
        scale: one length [nm] that gives the features unit variance.
        com_std: standard deviation of each component of the centre [nm]; says nothing with a `place`.
        place: where a molecule is held: the mean of its centre [nm]; None for a free molecule.

    Raises:
        InputError: a length that is not positive.
    """

    rotation_invariant = False
    origin: Tensor

    def __init__(
        self,
        n_atoms: int,
        scale: float = 0.2,
        com_std: float | None = None,
        place: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        com_std = scale / math.sqrt(n_atoms) if com_std is None else com_std
        if scale <= 0 or com_std <= 0:
            raise InputError(f"scale {scale} nm and com_std {com_std} nm must be positive")
        self.n_atoms = n_atoms
        self.scale = float(scale)
        self.com_std = float(com_std)
        self.place = None if place is None else tuple(map(float, place))
        origin = torch.tensor(place or (0.0, 0.0, 0.0), dtype=torch.float64)
        self.register_buffer("origin", origin, persistent=False)
        self.register_buffer("circular", torch.zeros(3 * n_atoms, dtype=torch.bool), persistent=False)
        self.log_det = -3 * n_atoms * math.log(self.scale)

    @classmethod
    def fit(cls, x: Tensor, held: bool = False) -> "CartesianMap":
        """Scale from data `(n, n_atoms, 3)` [nm]: the root mean square coordinate about the centre, or the place.

        Args:
            x: positions.
            held: forces hold the molecule in its place.

        Raises:
            InputError: a single particle that nothing holds, which has no shape to learn.
        """
        if not held and x.shape[1] < 2:
            raise InputError("one particle that nothing holds in its place has nothing to learn")
        place = x.double().mean(dim=(0, 1)) if held else None
        centred = x - (x.mean(dim=1, keepdim=True) if place is None else place.to(x))
        scale = float(centred.double().pow(2).mean().sqrt())
        return cls(x.shape[1], scale=scale, place=None if place is None else place.tolist())

    @property
    def held(self) -> bool:
        """Whether features hold place and orientation of a molecule that forces keep where it is."""
        return self.place is not None


    def to_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Positions `(n, n_atoms, 3)` [nm] -> features `(n, 3 n_atoms)`, log-determinant `(n,)`."""
        x = x - self.origin.to(x) if self.held else x
        return x.flatten(1) / self.scale, x.new_full((x.shape[0],), self.log_det)

    def to_positions(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(n, 3 n_atoms)` -> positions `(n, n_atoms, 3)` [nm], log-determinant `(n,)`."""
        x = (y * self.scale).view(-1, self.n_atoms, 3)
        return x + self.origin.to(x) if self.held else x, y.new_full((y.shape[0],), -self.log_det)

    def frame_log_density(self, x: Tensor) -> Tensor:
        """Log-density `(n,)` of the centre of geometry, N(0, com_std^2) in each of three components; 0 if held."""
        if self.held:
            return x.new_zeros(x.shape[0])
        centre = x.mean(dim=1)
        norm = 3 * math.log(self.com_std * math.sqrt(2 * math.pi))
        return -0.5 * centre.pow(2).sum(-1) / self.com_std**2 - norm

    def augment(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The same conformations with a fresh uniform orientation and a fresh centre; unchanged if held."""
        if self.held:
            return x
        n = x.shape[0]
        device = generator.device if generator is not None else x.device
        rotation = random_rotations(n, generator, x.dtype, device).to(x.device)
        centre = self.com_std * torch.randn(n, 1, 3, generator=generator, dtype=x.dtype, device=device)
        return (x - x.mean(dim=1, keepdim=True)) @ rotation.transpose(1, 2) + centre.to(x.device)

    def config(self) -> Mapping[str, Any]:
        """JSON-ready constructor arguments."""
        plain = {"kind": "cartesian", "n_atoms": self.n_atoms, "scale": self.scale, "com_std": self.com_std}
        return plain if self.place is None else plain | {"place": list(self.place)}
