"""What states must have in common before works between them mean anything: constraints, masses, place, orientation.

``exp(-u)`` of a molecule in free space has no distribution of its centre, so samples have whichever their dynamics gave
them. Nothing of that may enter a free energy, and no check of overlap would see it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openmm_regflow.bonds import n_molecules
from openmm_regflow.errors import InputError
from openmm_regflow.rigid import N_TRIED, SHIFTS, Placement, placement
from openmm_regflow.trajectories import box_vectors, edges, same_lattice

#: Relative difference at which the lengths of a constraint, or masses, in two Systems count as one.
SAME = 1e-9
#: [nm] Beyond the second, rounding in single precision is more than what is looked for.
_SHIFTS = SHIFTS[:2]
#: [kT] per root of the number of atoms, and relative to the energy: what rounding in single precision stays below.
_ROUNDING = {0.0: (2e-4, 1e-5), 0.3: (2e-4, 1e-5), 10.0: (5e-3, 1e-3)}
#: [kT] What the mesh and the box of PME make of moving and turning a small molecule.
_MESH = 0.03


def placement_of(state: Any, x: Tensor) -> Placement | None:
    """Whether more than 0.03 kT of a state's energy depend on place and orientation of the whole molecule.

    Args:
        state: with ``reduced(x) -> (n,)`` [kT].
        x: `(n, n_atoms, 3)` [nm] samples of it; rows of other shapes are moved by one number and never turned.

    Returns:
        what was found; None where no sample has a finite energy.
    """

    def allowed(shift: float, u: Tensor) -> Tensor:
        own, relative = _ROUNDING[shift]
        return _MESH + own * x.shape[1] ** 0.5 + relative * u.abs()

    return placement(lambda moved: torch.as_tensor(state.reduced(moved)), x[:N_TRIED], allowed, _SHIFTS)


def check_states(maps: Sequence[Any], start: Tensor, states: Sequence[Any], samples: Sequence[Tensor]) -> None:
    """Refuse states and maps whose works would be no free energy, or depend on where the samples happen to lie.

    Args:
        maps: from the first state or a common frame.
        start: `(n, n_atoms, 3)` [nm] samples where the maps start.
        states: at least two, with ``reduced(x) -> (n,)`` [kT].
        samples: `(n, n_atoms, 3)` [nm] of each state.

    Raises:
        InputError: the states differ in their constraints or in the masses behind them, in which atoms are frozen, or,
            unless all atoms are of one molecule, in their boxes; one holds the molecule in its
            place and another does not, so that their free energies differ by the logarithm of a volume that nothing
            gives; a state knows place or orientation, and a map forgets them; a map stretches or scatters frozen atoms;
            or no state holds the molecule, and a map changes how its centre is spread.
    """
    for state in states[1:]:
        _refuse_other_frozen(states[0], state)
        _refuse_other_box(states[0], state)
        shared_bonds(states[0], state)
    if frozen := sorted(_frozen(states[0].potential) or ()):
        for one in maps:
            _refuse_moving_frozen(one, start[:N_TRIED], frozen)
    found = [placement_of(state, x) for state, x in zip(states, samples)]
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return  # works say which sample has no energy
    if len({each.place for each in known}) > 1:
        held, free = (next(k for k, each in enumerate(known) if each.place is wanted) for wanted in (True, False))
        raise InputError(
            f"the energy of state {_name(held, len(states))} changes when the whole molecule is moved, that of state "
            f"{_name(free, len(states))} does not: they differ by the volume that the free molecule has, which no "
            "sample decides; restrain atoms to each other rather than to a place, or hold both states"
        )
    for one in maps:
        if any(each.counts for each in known):
            _refuse_forgetting(one, start[:N_TRIED])
        if not known[0].place:
            _refuse_free_centre(one, start[:N_TRIED])


def shared_bonds(state_a: Any, state_b: Any) -> list[tuple[int, int, float]]:
    """Constraints ``(i, j, length [nm])`` of both states, for the coordinates of a map between them.

    Args:
        state_a: its potential may have ``fixed_bonds``, and then ``metric.masses``
            (:class:`~openmm_regflow.tfep.ConstrainedEnergy`).
        state_b: alike.

    Raises:
        InputError: constraints differ, and a free energy between different constraint surfaces depends on the unit of
            length; or masses behind them do, which shape the ensemble of constrained dynamics.
    """
    potentials = [state_a.potential, state_b.potential]
    a, b = ({(min(i, j), max(i, j)): d for i, j, d in getattr(p, "fixed_bonds", ())} for p in potentials)
    differing = sorted(set(a) ^ set(b)) + [k for k in set(a) & set(b) if abs(a[k] - b[k]) > SAME * a[k]]
    if differing:
        raise InputError(
            f"the states differ in {len(differing)} constraints (atoms {differing[0][0]} and {differing[0][1]} are the "
            "first); build both Systems with the same constraints and lengths, or with constraints=None"
        )
    if a:
        masses = [p.metric.masses for p in potentials]
        for i in sorted({i for pair in a for i in pair}):
            if not math.isclose(masses[0][i], masses[1][i], rel_tol=SAME):
                raise InputError(
                    f"the states differ in the mass of atom {i}, which a constraint holds ({masses[0][i]:g} and "
                    f"{masses[1][i]:g} dalton), and masses shape the ensemble of constrained dynamics: the difference "
                    "would be no configurational free energy; build both Systems with the same masses"
                )
    return [(i, j, d) for (i, j), d in a.items()]


def _system(potential: Any) -> Any:
    """The System of a potential, None where it knows none."""
    system = getattr(getattr(potential, "potential", potential), "system", None)
    return system if hasattr(system, "getParticleMass") else None


def _frozen(potential: Any) -> set[int] | None:
    """Particles without mass, which dynamics leave where they are; None where a potential knows no System."""
    system = _system(potential)
    if system is None:
        return None
    massless = (i for i in range(system.getNumParticles()) if system.getParticleMass(i)._value == 0)
    return {i for i in massless if not system.isVirtualSite(i)}


def _refuse_other_frozen(state_a: Any, state_b: Any) -> None:
    """Refuse a state in which atoms are frozen that move in the other: their ensembles have different dimensions.

    Raises:
        InputError: naming the first.
    """
    a, b = _frozen(state_a.potential), _frozen(state_b.potential)
    if a is not None and b is not None and a != b:
        raise InputError(
            f"atom {min(a ^ b)} has no mass in one of the states, so that it stands still there, and moves in the "
            "other; such ensembles have no free energy difference; freeze the same atoms in both"
        )


def _refuse_other_box(state_a: Any, state_b: Any) -> None:
    """Refuse periodic states in boxes of other sizes or shapes: N particles each have a volume to themselves.

    Raises:
        InputError: with both boxes. That of a single molecule is no volume which it has.
    """
    systems = [_system(state.potential) for state in (state_a, state_b)]
    if not all(system is not None and system.usesPeriodicBoundaryConditions() for system in systems):
        return
    a, b = (box_vectors(system) for system in systems)
    if not same_lattice(a, b) and n_molecules(systems[0]) > 1:
        raise InputError(
            f"the states lie in other boxes, of {edges(a)} and {edges(b)} nm: their free energies differ by the "
            "logarithm of a volume for every molecule, which no map of positions gives; simulate both in one box"
        )


def _refuse_moving_frozen(one: Any, x: Tensor, frozen: list[int], shift: float = 1e-3) -> None:
    """Refuse a map whose log-determinant counts atoms that stand still.

    Raises:
        InputError: their places depend on the other atoms, or do not move along with them by the same length.
    """
    with torch.no_grad():
        there = one.forward(x)[0].double()
        step = torch.zeros_like(x)
        step[:, frozen] = shift * torch.randn(len(frozen), 3, generator=torch.Generator().manual_seed(0)).to(x)
        moved = one.forward(x + step)[0].double() - there
    scattered = (there - x)[:, frozen] - (there - x)[:1, frozen]
    stretched = (moved - step)[:, frozen]
    fine = torch.isfinite(there).flatten(1).all(1) & torch.isfinite(moved).flatten(1).all(1)
    if len(fine) and fine[0] and max(float(t[fine].abs().max()) for t in (scattered, stretched)) > 0.01 * shift:
        raise InputError(
            f"the map scatters or stretches the frozen atoms ({len(frozen)}, from {frozen[0]} on), and its "
            "log-determinant counts what they do not do; take a map of the atoms that move"
        )


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


def _refuse_free_centre(one: Any, x: Tensor, shift: float = SHIFTS[0]) -> None:
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
