"""A molecule moved and turned as a whole, and whether its energy notices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: [nm] A molecule is moved by a little, which a weak field shows, and beyond the flat bottom of a restraint.
SHIFTS = (0.3, 10.0, 30.0)
#: Directions of the shifts: a wall, a plane or a tube is felt in one of them.
WAYS = torch.cat([torch.eye(3), -torch.eye(3)]).double()
#: Samples that are enough: one in each direction.
N_TRIED = len(WAYS)
#: An energy beyond this may stop being a number by rounding alone.
_ABSURD = 1e6


@dataclass(frozen=True)
class Placement:
    """Whether an energy depends on place and orientation of the whole molecule."""

    place: bool
    orientation: bool

    @property
    def counts(self) -> bool:
        """Whether it depends on either."""
        return self.place or self.orientation


def placement(
    energy: Callable[[Tensor], Tensor],
    x: Tensor,
    allowed: Callable[[float, Tensor], Tensor],
    shifts: Sequence[float] = SHIFTS,
) -> Placement | None:
    """Find out from samples, each moved another way, near and far, and turned.

    Args:
        energy: `(n, n_atoms, 3)` [nm] -> `(n,)`, not finite where impossible. Asked once, with the samples themselves
            last, so that a Context is left at one of them.
        x: `(n, n_atoms, 3)` [nm]; rows of other shapes are moved by one number and never turned.
        allowed: change of an energy that counts as none, `(n,)`, given the shift [nm] (0: turned) and the energies.
        shifts: [nm].

    Returns:
        what was found; None where no sample has a finite energy.
    """
    molecular = x.dim() == 3 and x.shape[2] == 3
    rows = torch.arange(max(N_TRIED, len(x)), device=x.device)
    x = x[rows % len(x)]
    ways = WAYS.to(x)[rows % N_TRIED, None, :] if molecular else 1.0
    moved = {shift: x + shift * ways for shift in shifts}
    if molecular:
        centre, generator = x.mean(1, keepdim=True), torch.Generator().manual_seed(0)
        moved[0.0] = rotate(x - centre, random_rotations(len(x), generator)) + centre
    with torch.no_grad():
        *after, before = energy(torch.cat([*moved.values(), x])).double().split(len(x))
    here = torch.isfinite(before)
    if not here.any():
        return None

    def changes(shift: float, now: Tensor) -> bool:
        known = here & (torch.isfinite(now) | (before.abs() < _ABSURD))
        return bool((~((now - before).abs() <= allowed(shift, before)) & known).any())

    found = {shift: changes(shift, now) for shift, now in zip(moved, after)}
    return Placement(any(found[shift] for shift in shifts), found.get(0.0, False))


def rotate(positions: Tensor, rotations: Tensor) -> Tensor:
    """Positions `(n, n_atoms, 3)` turned about the origin by `(n, 3, 3)`."""
    return positions @ rotations.to(positions).transpose(1, 2)


def random_rotations(
    n: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float64, device: Any = "cpu"
) -> Tensor:
    """Rotation matrices `(n, 3, 3)`, uniform on SO(3), from normalised Gaussian quaternions."""
    q = torch.randn(n, 4, generator=generator, dtype=dtype, device=device)
    w, x, y, z = (q / q.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, dim=-1).view(n, 3, 3)
