"""Where a molecule is and how it lies: what states say of it, and what maps may do with it.

``exp(-u)`` of a molecule in free space has no distribution of its centre, so samples have whichever their dynamics gave
them. Nothing of that may enter a free energy, and no check of overlap would see it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_regflow.coordinates import random_rotations
from openmm_regflow.errors import InputError
from openmm_regflow.proposals import rotate

#: [nm] A molecule is moved by a little, which a weak field shows, and beyond the flat bottom of a restraint.
_SHIFTS = (0.3, 10.0)
_N_SAMPLES = 8


@dataclass(frozen=True)
class Placement:
    """Whether a state's energy depends on the place and on the orientation of the whole molecule."""

    place: bool
    orientation: bool


def placement_of(state: Any, x: Tensor) -> Placement:
    """Find out from samples of the state, moved and turned as a whole.

    Args:
        state: with ``reduced(x) -> (n,)`` [kT].
        x: `(n, n_atoms, 3)` [nm]; rows of other shapes are never turned.
    """
    with torch.no_grad():
        before = state.reduced(x)

        def changes(moved: Tensor, tolerance: float) -> bool:
            after = state.reduced(moved)
            with np.errstate(invalid="ignore"):
                return bool((np.abs(after - before) > tolerance * (1 + np.abs(before)))[np.isfinite(before)].any())

        # Round-off of single precision: 1e-7 of 10 nm changes a stiff bond's energy by 1e-3 kT.
        place = any(changes(x + shift, 1e-5 if shift < 1 else 1e-3) for shift in _SHIFTS)
        if x.dim() != 3 or x.shape[2] != 3:
            return Placement(place, False)
        centre = x.mean(1, keepdim=True)
        generator = torch.Generator(device=x.device).manual_seed(0)
        turned = rotate(x - centre, random_rotations(len(x), generator, device=x.device)) + centre
        return Placement(place, changes(turned, 1e-5))


def check_placement(maps: Sequence[Any], start: Tensor, states: Sequence[Any], samples: Sequence[Tensor]) -> None:
    """Refuse states and maps whose works depend on where the samples happen to lie.

    Args:
        maps: from the first state or a common frame.
        start: `(n, n_atoms, 3)` [nm] samples where the maps start.
        states: at least two, with ``reduced(x) -> (n,)`` [kT].
        samples: `(n, n_atoms, 3)` [nm] of each state.

    Raises:
        InputError: one state holds the molecule in its place and another does not, so that their free energies differ
            by the logarithm of a volume that nothing gives; a state knows place or orientation, and a map forgets
            them; or no state holds the molecule, and a map changes how its centre is spread.
    """
    found = [placement_of(state, x[:_N_SAMPLES]) for state, x in zip(states, samples)]
    if len({each.place for each in found}) > 1:
        held, free = (next(k for k, each in enumerate(found) if each.place is wanted) for wanted in (True, False))
        raise InputError(
            f"the energy of state {_name(held, len(states))} changes when the whole molecule is moved, that of state "
            f"{_name(free, len(states))} does not: they differ by the volume that the free molecule has, which no "
            "sample decides; restrain atoms to each other rather than to a place, or hold both states"
        )
    for one in maps:
        if any(each.place or each.orientation for each in found):
            _refuse_forgetting(one, start[:_N_SAMPLES])
        if not found[0].place:
            _refuse_free_centre(one, start[:_N_SAMPLES])


def _name(k: int, n: int) -> str:
    """As users know the state."""
    return "AB"[k] if n == 2 else str(k)


def _refuse_forgetting(one: Any, x: Tensor) -> None:
    """Refuse a map that does not lead back to the same place: it is no bijection of what the energy depends on.

    Raises:
        InputError: the way back ends elsewhere, as from coordinates without a frame.
    """
    with torch.no_grad():
        there, _ = one.forward(x)
        back, _ = one.inverse(there)
    off = (back.to(x) - x).reshape(len(x), -1).abs().amax(1)
    off = off[torch.isfinite(off)]
    if (off > 1e-3).any():
        raise InputError(
            "a state's energy changes when the whole molecule is moved or turned, and the map forgets where it was and "
            "how it lay (there and back, atoms are displaced by "
            f"{float(off.max()):.2g} nm); use Cartesian coordinates (kind='cartesian') or the identity map"
        )


def _refuse_free_centre(one: Any, x: Tensor, shift: float = _SHIFTS[0]) -> None:
    """Refuse a map that changes how the centre of a free molecule is spread.

    A map that neither carries the centre along nor leaves it out turns a difference of these spreads into a free
    energy: 3 log(s_A / s_B).

    Raises:
        InputError: the map does not move with the molecule.
    """
    with torch.no_grad():
        moved = (one.forward(x + shift)[0] - one.forward(x)[0]).double().reshape(len(x), -1, 3).mean(1)
    moved = moved[torch.isfinite(moved).all(1)]
    along, fixed = (moved - target for target in (shift, 0.0))
    tolerance = 1e-4 * shift
    if len(moved) and along.abs().max() > tolerance and fixed.abs().max() > tolerance:
        raise InputError(
            "the map changes the centre of a free molecule, whose spread no energy decides; use internal coordinates "
            "(coordinates_for(topology, positions, kind='internal')), or a map that carries the centre along"
        )
