"""What a proposal may not cover, and the words of each refusal: Systems, flows of other Systems, other atoms."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import openmm
from openmm import unit

from openmm_regflow.bonds import bonded_pairs
from openmm_regflow.constraints import fixed_bonds
from openmm_regflow.errors import IncompatibleFlowError, InputError, UnsupportedForceError
from openmm_regflow.fingerprints import compare_fingerprints, fingerprint
from openmm_regflow.potentials import parameters_of

#: Relative difference of a constraint's length and the flow's fixed bond that counts as equal (nine digits).
LENGTH_TOLERANCE = 1e-9
BAROSTATS = (
    "MonteCarloBarostat", "MonteCarloAnisotropicBarostat", "MonteCarloMembraneBarostat", "MonteCarloFlexibleBarostat",
)  # fmt: skip
#: Name of something that a System may have, how many it has, and the check that refuses it.
Feature = tuple[str, Callable[[openmm.System], int], Callable[[openmm.System, Any], None]]


def barostats_of(system: openmm.System) -> list[str]:
    """Names of the forces that change a System's volume."""
    return [force.__class__.__name__ for force in system.getForces() if force.__class__.__name__ in BAROSTATS]


def check_labels(flow: Any, x: Any, what: str) -> None:
    """Refuse positions for which a flow has no place: their interchangeable hydrogens go round the other way.

    Args:
        flow: or a mixture.
        x: tensor `(n, n_atoms, 3)` [nm], of one numbering.
        what: they are, for the message.

    Raises:
        InputError: more than half of them.
    """
    if hasattr(flow, "covers") and not bool(flow.covers(x).double().mean() > 0.5):
        raise InputError(
            f"{what} have hydrogens of a methyl numbered the other way round than the frames that trained the flow; "
            "exchange two of their labels"
        )


def check_subset(subset: Sequence[int], n_atoms: int, n_flow: int) -> None:
    """Refuse indices that are no subset of a System's atoms, or another number than the flow's.

    Raises:
        InputError: naming the numbers.
    """
    if len(set(subset)) != len(subset) or min(subset, default=-1) < 0 or max(subset) >= n_atoms:
        raise InputError(f"atom_subset {list(subset)} is empty, repeats atoms or leaves the System's {n_atoms} atoms")
    if len(subset) != n_flow:
        raise InputError(f"atom_subset has {len(subset)} atoms, the flow generates {n_flow}")


def check_bonded(system: openmm.System, bonds: Sequence[tuple[int, int]], where: str = "atom_subset") -> None:
    """Refuse atoms in another order than the flow's: bonds of its Z-matrix that the System does not have.

    Masses would not tell: a methyl carbon whose mass went to its hydrogens is lighter than they are.

    Args:
        system: the System; one without bonds and constraints among these atoms says nothing.
        bonds: pairs of atoms, in the numbering of the System.
        where: what has these atoms, for the message.

    Raises:
        IncompatibleFlowError: naming the first pair.
    """
    atoms, own = {i for bond in bonds for i in bond}, set(map(frozenset, bonds))
    known = {pair for pair in bonded_pairs(system) if pair <= atoms}
    # Bonds that lie in a neural network are not seen: of atoms with none, nothing is known.
    seen = set().union(*known)
    wrong = [bond for bond in bonds if frozenset(bond) not in known and seen.issuperset(bond)]
    if wrong and known - own:
        raise IncompatibleFlowError(
            f"atoms {wrong[0][0]} and {wrong[0][1]} of {where} stand where the flow has a bond, and the System has "
            "none there; give the atoms in the order of the flow's training, or in Python pass allow_mismatch=True"
        )


def check_subset_supported(system: openmm.System, subset: Sequence[int], flow: Any = None) -> None:
    """Refuse constraints and virtual sites that involve atoms of a subset; others do not matter to its move.

    Args:
        system: the whole System.
        subset: indices of its atoms that the flow moves.
        flow: whose bonds of fixed length are allowed, and needed, as constraints; in the numbering of the subset.

    Raises:
        UnsupportedForceError: with the atoms and the remedy; also for atoms without mass.
        IncompatibleFlowError: a bond that is fixed in the flow is not constrained in the System.
    """
    for _, _, check in unsupported_in(subset):
        check(system, flow)


def unsupported_in(subset: Sequence[int]) -> tuple[Feature, ...]:
    """What a proposal for a subset may not cover, in the form of :data:`UNSUPPORTED`."""
    members = set(subset)

    def frozen(system: openmm.System) -> list[int]:
        return sorted(members & set(_frozen_atoms(system)))

    def touching(system: openmm.System) -> list[tuple[int, int, float]]:
        return [(i, j, d) for i, j, d in fixed_bonds(system) if members & {i, j}]

    def refuse_frozen(system: openmm.System, flow: Any = None) -> None:
        if atoms := frozen(system):
            raise UnsupportedForceError(
                f"atom {atoms[0]} of the subset has no mass, so dynamics keep it in place and the flow would move it; "
                "give it its mass and hold it with a restraint"
            )

    def refuse_constraints(system: openmm.System, flow: Any = None) -> None:
        held = [(subset[i], subset[j], d) for i, j, d in fixed_bonds_of(flow)]
        check_constraints(touching(system), held, "subset")

    def refuse_sites(system: openmm.System, flow: Any = None) -> None:
        if sites := _sites_of(system, members):
            raise UnsupportedForceError(
                f"virtual site {sites[0]} belongs to the subset; choose a subset without virtual sites"
            )

    return (
        ("constraints", lambda system: len(touching(system)), refuse_constraints),
        ("virtual sites", lambda system: len(_sites_of(system, members)), refuse_sites),
        ("particles without mass", lambda system: len(frozen(system)), refuse_frozen),
    )


def _sites_of(system: openmm.System, members: set[int]) -> list[int]:
    """Virtual sites that are in a set of atoms or depend on one of them."""
    sites = []
    for site in virtual_sites(system):
        virtual = system.getVirtualSite(site)
        if members & {site, *(virtual.getParticle(k) for k in range(virtual.getNumParticles()))}:
            sites.append(site)
    return sites


def check_supported(system: openmm.System, flow: Any = None) -> None:
    """Refuse Systems whose measure or boundary the flow's density does not cover.

    Args:
        system: the System.
        flow: whose bonds of fixed length are allowed, and needed, as constraints.

    Raises:
        UnsupportedForceError: constraints that the flow does not fix, virtual sites, particles without mass or
            periodic boundary conditions, each with its remedy.
        IncompatibleFlowError: a bond that is fixed in the flow is not constrained in the System.
    """
    for _, _, check in UNSUPPORTED:
        check(system, flow)


def check_particles(system: openmm.System) -> None:
    """Refuse particles whose positions have no density of their own.

    Raises:
        UnsupportedForceError: virtual sites, or particles without mass.
    """
    _refuse_virtual_sites(system)
    _refuse_frozen_atoms(system)


def check_constraints(
    found: Sequence[tuple[int, int, float]], fixed: Sequence[tuple[int, int, float]], where: str = "System"
) -> None:
    """Refuse constraints ``(i, j, length [nm])`` that are not exactly the bonds that a flow holds fixed.

    Raises:
        UnsupportedForceError: a constraint that the flow does not fix, or fixes at another length.
        IncompatibleFlowError: a bond that is fixed in the flow is not constrained in the System.
    """
    held = {frozenset((i, j)): d for i, j, d in fixed}
    loose = [(i, j, d) for i, j, d in found if abs(held.get(frozenset((i, j)), math.inf) - d) > LENGTH_TOLERANCE * d]
    if loose:
        i, j, d = loose[0]
        raise UnsupportedForceError(
            f"the {where} has {len(found)} constraints, {len(loose)} of which the flow's density does not cover "
            f"(first: atoms {i} and {j} at {d:g} nm); train a flow with these bonds fixed (coordinates_for(..., "
            "fixed=constraints.fixed_bonds(system))), or build the System with constraints=None (rigidWater=True may "
            "stay outside a subset) and use a time step of 1 fs"
        )
    constrained = {frozenset((i, j)) for i, j, _ in found}
    free = [tuple(sorted(bond)) for bond in held if bond not in constrained]
    if free:
        raise IncompatibleFlowError(
            f"the flow holds the bond between atoms {free[0][0]} and {free[0][1]} at fixed length, but the System has "
            "no constraint there; build it with the constraints of the flow's training, or train a flow without"
        )


def _refuse_constraints(system: openmm.System, flow: Any = None) -> None:
    check_constraints(fixed_bonds(system), fixed_bonds_of(flow))


def fixed_bonds_of(flow: Any) -> tuple[tuple[int, int, float], ...]:
    """Bonds of fixed length of a flow; none for objects that do not know of them."""
    return tuple(getattr(flow, "fixed_bonds", ()))


def virtual_sites(system: openmm.System) -> list[int]:
    """Indices of the particles whose positions follow from others."""
    return [i for i in range(system.getNumParticles()) if system.isVirtualSite(i)]


def _refuse_virtual_sites(system: openmm.System, flow: Any = None) -> None:
    if sites := virtual_sites(system):
        raise UnsupportedForceError(
            f"atom {sites[0]} is a virtual site, whose position is not a degree of freedom; "
            "use a model without virtual sites"
        )


def _frozen_atoms(system: openmm.System) -> list[int]:
    masses = ((i, system.getParticleMass(i).value_in_unit(unit.dalton)) for i in range(system.getNumParticles()))
    return [i for i, mass in masses if mass == 0 and not system.isVirtualSite(i)]


def _refuse_frozen_atoms(system: openmm.System, flow: Any = None) -> None:
    if frozen := _frozen_atoms(system):
        raise UnsupportedForceError(
            f"atom {frozen[0]} has no mass, so dynamics keep it in place and a flow would move it; give it its mass "
            "and hold it with a restraint, or leave it out of the flow with a SubsetProposal"
        )


def _refuse_periodic(system: openmm.System, flow: Any = None) -> None:
    if system.usesPeriodicBoundaryConditions():
        raise UnsupportedForceError(
            "the System is periodic; build it with nonbondedMethod=NoCutoff or CutoffNonPeriodic"
        )


#: What a whole-molecule proposal may not cover.
UNSUPPORTED: tuple[Feature, ...] = (
    ("constraints", lambda system: system.getNumConstraints(), _refuse_constraints),
    ("virtual sites", lambda system: len(virtual_sites(system)), _refuse_virtual_sites),
    ("particles without mass", lambda system: len(_frozen_atoms(system)), _refuse_frozen_atoms),
    ("periodic box", lambda system: int(system.usesPeriodicBoundaryConditions()), _refuse_periodic),
)


def external_forces(system: openmm.System) -> list[openmm.CustomExternalForce]:
    """Forces on where atoms are and not on how they lie to each other, which make the frame of a molecule count."""
    forces = system.getForces()
    return [force for force in forces if isinstance(force, openmm.CustomExternalForce) and force.getNumParticles()]


def has_global_parameters(system: openmm.System) -> bool:
    """Whether a Context can change this System's energies through parameters."""
    return any(map(parameters_of, system.getForces()))


def check_flow(
    flow: Any, system: openmm.System | None, temperature: float, extra_forces: bool = False
) -> None:
    """Refuse a flow that was trained for another System or temperature.

    Args:
        flow: its ``metadata`` may carry ``fingerprint`` and ``temperature`` [K]; what is missing is not
            compared.
        system: the System that energies come from, or None if unknown.
        temperature: [K].
        extra_forces: further forces in the System, beside those of the flow's, are no difference.

    Raises:
        IncompatibleFlowError: naming every difference.
    """
    metadata = getattr(flow, "metadata", None)
    expected, trained_at = getattr(metadata, "fingerprint", None), getattr(metadata, "temperature", None)
    differences = []
    if expected is not None and system is not None:
        differences += compare_fingerprints(expected, fingerprint(system, like=expected), extra_forces=extra_forces)
    if trained_at is not None and abs(trained_at - temperature) > 1e-6 * temperature:
        differences.append(f"trained at {trained_at:g} K, used at {temperature:g} K")
    if differences:
        raise IncompatibleFlowError(
            f"the flow belongs to another System or temperature ({'; '.join(differences)}); train one for "
            "this System, or in Python pass allow_mismatch=True to use it as it is"
        )


def check_atoms(flow: Any, potential: Any) -> None:
    """Refuse different atom counts; no option overrides this."""
    n_potential = getattr(potential, "n_atoms", flow.n_atoms)
    if n_potential != flow.n_atoms:
        raise IncompatibleFlowError(
            f"the flow generates {flow.n_atoms} atoms, the potential has {n_potential}; "
            "use the flow of this molecule"
        )
