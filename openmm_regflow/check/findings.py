"""Every check but the kernel's: flow against System, map against autodiff, energies against a Context."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor

from openmm_regflow.check.kernel import (
    FEWEST_EFFECTIVE,
    Progress,
    kernel_test,
    new_context,
    whole_positions,
)
from openmm_regflow.check.report import CheckReport, Finding
from openmm_regflow.constraints import Constraints
from openmm_regflow.errors import IncompatibleFlowError, InputError, RegflowError, UnsupportedForceError
from openmm_regflow.potentials import OpenMMPotential, TorchPotential, small_platform
from openmm_regflow.proposals import FlowProposal, SubsetProposal, bonds_of_subset, check_order
from openmm_regflow.refusals import (
    UNSUPPORTED,
    barostats_of,
    check_bonded,
    check_flow,
    check_subset,
    has_global_parameters,
    unsupported_in,
)
from openmm_regflow.systems import MolecularSystem


def run_checks(
    flow: Any,
    molecule: MolecularSystem,
    *,
    n: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
    atom_subset: Sequence[int] | None = None,
    platform: str | None = None,
) -> CheckReport:
    """All checks of a flow on a molecule, or on a part of a System.

    Args:
        flow: an ``openmm_regflow.Flow`` or ``FlowMixture``, on any device; it draws and is evaluated there.
        molecule: System, topology, positions and temperature.
        n: flow samples for the kernel test.
        seed: of every random number.
        progress: called with (trajectories done, in total, figures) during the kernel test.
        atom_subset: indices of the atoms that the flow moves, in the flow's order; None for all.
        platform: OpenMM platform of energies and dynamics; default Reference for small molecules, else the fastest.

    Returns:
        The findings; failures are in there, not raised.

    Raises:
        InputError: too few samples, or indices that are no subset of the System's atoms.
    """
    if n < FEWEST_EFFECTIVE:
        raise InputError(f"n is {n}; at least {FEWEST_EFFECTIVE} samples are needed")
    subset = None if atom_subset is None else [int(i) for i in atom_subset]
    if subset is not None:
        check_subset(subset, molecule.system.getNumParticles(), len(subset))
    findings = [_identity(flow, molecule, subset), *system_findings(molecule.system, flow, subset)]
    if flow.n_atoms != (molecule.n_atoms if subset is None else len(subset)):
        return CheckReport(tuple(findings))
    allowed, own = CheckReport(tuple(findings)).passed, np.asarray(molecule.positions)
    if allowed:
        potential = OpenMMPotential(molecule.system, platform or small_platform(molecule.system))
        proposal = _proposal(flow, potential, molecule.temperature, subset)
        own = whole_positions(proposal, molecule)[0].numpy()
    exact = copy.deepcopy(flow).cpu().double()
    for k, part in enumerate(parts := list(getattr(exact, "parts", [exact])), start=1):  # of a mixture, or the flow
        for finding in (_round_trip(part, own, seed, subset), _log_determinant(part, molecule.system, seed, subset)):
            findings.append(finding if len(parts) == 1 else replace(finding, name=f"{finding.name}, part {k}"))
    findings.append(_stored_precision(flow, exact, seed))
    if allowed:
        frame = _frame(proposal)
        if frame.passed:
            findings.append(_energies(proposal, molecule, seed))
        findings.append(frame)
    if CheckReport(tuple(findings)).passed:
        findings.append(kernel_test(proposal, molecule, n, seed, progress))
    else:
        findings.append(Finding("kernel", "not run after the failures above", None))
    return CheckReport(tuple(findings))


def _proposal(flow: Any, potential: Any, temperature: float, subset: Sequence[int] | None) -> FlowProposal:
    """A proposal for the whole System or a subset of it; a flow of another System was a finding already."""
    if subset is None:
        return FlowProposal(flow, potential, temperature, allow_mismatch=True)
    return SubsetProposal(flow, potential, temperature, subset, allow_mismatch=True)


def _frame(proposal: FlowProposal) -> Finding:
    """How centre and orientation are treated."""
    if proposal.atom_subset is not None:
        return Finding("frame", "that of three atoms of the subset, as it is in the current state", True)
    words = {
        "free": "rigid motion leaves the energy unchanged: the frame is redrawn, then restored",
        "fixed": "an external field fixes the frame: the flow's density counts as it is",
    }
    try:
        return Finding("frame", words[proposal.frame], True)
    except (UnsupportedForceError, IncompatibleFlowError) as error:
        return Finding("frame", str(error), False)


def _identity(flow: Any, molecule: MolecularSystem, subset: Sequence[int] | None) -> Finding:
    """Atoms, System and temperature against the flow's own record; of a subset, its bonds and the temperature."""
    n_atoms, where = (molecule.n_atoms, "System") if subset is None else (len(subset), "subset")
    if flow.n_atoms != n_atoms:
        return Finding("belongs together", f"the flow has {flow.n_atoms} atoms, the {where} {n_atoms}", False)
    if subset is not None and not flow.rotation_invariant:
        words = "a subset moves in its internal coordinates; train a flow on kind='internal'"
        return Finding("belongs together", words, False)
    try:
        check_flow(flow, None if subset else molecule.system, molecule.temperature)
        if subset is not None:
            check_bonded(molecule.system, bonds_of_subset(flow, subset))
        else:
            check_order(flow, molecule.system)
    except IncompatibleFlowError as error:
        return Finding("belongs together", str(error), False)
    if subset is not None:
        words = f"atoms and bonds of the subset agree ({n_atoms} of {molecule.n_atoms} atoms"
        return Finding("belongs together", f"{words}, {molecule.temperature:g} K)", True)
    recorded = getattr(flow.metadata, "fingerprint", None) is not None
    words = "System and temperature are those of the training" if recorded else "the flow names no System; atoms agree"
    return Finding("belongs together", f"{words} ({n_atoms} atoms, {molecule.temperature:g} K)", True)


def system_findings(
    system: openmm.System, flow: Any = None, atom_subset: Sequence[int] | None = None
) -> list[Finding]:
    """What a System has that a flow move must either handle or refuse.

    Args:
        system: any.
        flow: its bonds of fixed length decide which constraints are handled.
        atom_subset: atoms that the flow moves; None for all.

    Returns:
        One finding for each of constraints, virtual sites, particles without mass, periodic box, barostat,
        centre-of-mass removal, thermostat and Context parameters.
    """
    findings = []
    for name, count, check in UNSUPPORTED if atom_subset is None else unsupported_in(atom_subset):
        found = count(system)
        try:
            check(system, flow)
            words = f"{found}: handled: fixed in the flow, metric term of the constrained ensemble included"
            findings.append(Finding(name, words if found else "none", True))
        except RegflowError as error:
            findings.append(Finding(name, f"{found}: refused: {error}", False))
    kinds = [type(force).__name__ for force in system.getForces()]
    barostats = barostats_of(system)
    if atom_subset is None:
        words = f"{', '.join(barostats)}: refused; remove it, whole-molecule flow moves are for constant volume"
        findings.append(Finding("barostat", words if barostats else "none", not barostats))
    else:
        words = "handled: the move keeps the box, and makes the subset whole along its bonds"
        findings.append(Finding("periodic box", words if system.usesPeriodicBoundaryConditions() else "none", True))
        words = f"{', '.join(barostats)}: handled: the move keeps the volume"
        findings.append(Finding("barostat", words if barostats else "none", True))
    for name, present, words in (
        ("CMMotionRemover", "CMMotionRemover" in kinds, "handled: acts on velocities; shapes are not affected"),
        ("thermostat", "AndersenThermostat" in kinds, "handled: acts on velocities, which an accepted move redraws"),
        ("Context parameters", has_global_parameters(system), "handled: the Context's own energy decides"),
    ):
        findings.append(Finding(name, words if present else "none", True))
    return findings


class _Rule(NamedTuple):
    """A worst error in units of what rounding explains: half the digits of the floating-point type."""

    worst: float
    size: float

    @classmethod
    def of(cls, error: Tensor, scale: Tensor, dtype: torch.dtype = torch.float64) -> "_Rule":
        allowed = torch.finfo(dtype).eps ** 0.5 * (1 + scale.abs().double())
        ratio = (error.abs().double() / allowed).nan_to_num(nan=math.inf)
        return cls(float(ratio.max()), float(error.abs().max()))

    @property
    def passed(self) -> bool:
        return self.worst <= 1.0


def _latents(flow: Any, n: int, seed: int) -> Tensor:
    """Latent points `(m, dim)`, float64, whose configurations exist."""
    z = flow.prior.sample(4 * n, torch.Generator().manual_seed(seed), torch.float64)
    with torch.no_grad():
        inside = torch.isfinite(flow.forward(z)[0]).flatten(1).all(1)
    return z[inside][:n]


def _round_trip(
    flow: Any, positions: np.ndarray, seed: int, subset: Sequence[int] | None = None, n: int = 200
) -> Finding:
    """Latent -> positions -> latent from draws of the prior and from a structure `(n_atoms, 3)`, in float64."""
    z = _latents(flow, n, seed)
    if not len(z):
        return Finding("round trip", "no draw of the flow is a configuration", False)
    structure = torch.as_tensor(positions if subset is None else positions[subset])[None].double()
    with torch.no_grad():
        z = torch.cat([flow.inverse(structure)[0], z])
        x, log_det = flow.forward(z)
        left_out = ""
        if not bool(torch.isfinite(z[0]).all() and torch.isfinite(x[0]).all()):
            line = _in_a_line(flow, structure, subset)
            if not line:
                words = "the molecule's own structure lies outside the flow's coordinates"
                return Finding("round trip", words + _turned_round(flow, structure, x[1:], subset), False)
            left_out = f"; left out: the structure, whose atoms {line} lie in a line, where torsions are undefined"
            z, x, log_det = z[1:], x[1:], log_det[1:]
        again, log_det_back = flow.inverse(x)
    turn = torch.where(flow.prior.circular, 2 * math.pi, math.inf)
    error = torch.minimum((again - z).abs(), (turn - (again - z).abs()).abs())
    trip, closing = _Rule.of(error, z), _Rule.of(log_det + log_det_back, log_det)
    words = f"latent {trip.size:.1e}, log-determinant {closing.size:.1e} nat over {len(z)} points in float64{left_out}"
    return Finding("round trip", words, trip.passed and closing.passed)


def _in_a_line(flow: Any, structure: Tensor, subset: Sequence[int] | None) -> str:
    """The first three atoms in a line among those whose angle is a coordinate; "" where there are none.

    No ensemble has them exactly there; a drawn or a minimised structure may.
    """
    zmatrix = getattr(flow.coordinates, "zmatrix", None)
    if zmatrix is None:
        return ""
    for atoms in (zmatrix.seed, *(row[:3] for row in zmatrix.rows), *(row[1:] for row in zmatrix.rows)):
        first, middle, last = (structure[0, atom] for atom in atoms)
        a, b = first - middle, last - middle
        if float(torch.linalg.cross(a, b).norm()) < 1e-6 * float(a.norm() * b.norm()):
            return "-".join(str(atom if subset is None else subset[atom]) for atom in atoms)
    return ""


def _turned_round(flow: Any, structure: Tensor, drawn: Tensor, subset: Sequence[int] | None) -> str:
    """The groups of three interchangeable hydrogens that go round the other way than in draws, and the remedy."""
    rotors = getattr(flow.coordinates, "rotors", ())
    bonded_to = {row[0]: row[1] for row in flow.coordinates.zmatrix.rows} if rotors else {}

    def sense(x: Tensor, atoms: tuple[int, ...]) -> Tensor:
        return torch.linalg.det(x[:, list(atoms)] - x[:, [bonded_to[atoms[0]]]]).sign().median()

    wrong = [r.atoms for r in rotors if sense(structure, r.atoms) != sense(drawn, r.atoms)]
    if not wrong:
        return ""
    groups = " and ".join(str([a if subset is None else subset[a] for a in atoms]) for atoms in wrong)
    places = "--atoms (atom_subset), as matched_atoms in examples/ncmc_explicit.py does"
    where = "the structure" if subset is None else places
    return f": hydrogens {groups} go round the other way than the flow's; exchange two of each group in {where}"


def _log_determinant(
    flow: Any, system: openmm.System, seed: int, subset: Sequence[int] | None = None, n: int = 3
) -> Finding:
    """The flow's log-determinant against the Jacobian that autodiff finds, with the rigid motion added."""
    z = _latents(flow, n, seed + 1)
    if not len(z):
        return Finding("log-determinant", "no draw of the flow is a configuration", False)
    with torch.no_grad():
        reported = flow.forward(z)[1]
    constraints = Constraints.of(system, subset) if getattr(flow, "fixed_bonds", ()) else None
    found = torch.stack([jacobian_log_determinant(flow, row, constraints) for row in z])
    rule = _Rule.of(found - reported, reported)
    words = f"differs from autodiff by {rule.size:.1e} nat over {len(z)} points in float64"
    return Finding("log-determinant", words, rule.passed)


def jacobian_log_determinant(flow: Any, z: Tensor, constraints: Constraints | None = None) -> Tensor:
    """Log-determinant of a flow at one latent point by autodiff, in the measure that ``log_prob`` is written in.

    For a flow on internal coordinates the columns for translation and rotation complete the Jacobian J; the factor by
    which a rotor's feature turns faster than its torsion is made up for by the labels of its atoms. With bonds of fixed
    length J has fewer columns than rows, and ``det(J^T M J) / det M`` is the squared volume of the constraint surface
    in mass-weighted coordinates, that is ``exp(2 log_det) det Z`` (:mod:`openmm_regflow.constraints`).

    Args:
        flow: in float64.
        z: `(dim,)`.
        constraints: of the System, where the flow has bonds of fixed length.
    """
    jacobian = torch.autograd.functional.jacobian(lambda v: flow.forward(v[None])[0][0].flatten(), z)
    if not flow.rotation_invariant:
        return torch.linalg.slogdet(jacobian)[1]
    with torch.no_grad():
        x = flow.forward(z[None])[0]
    axes = torch.eye(3, dtype=torch.float64)
    shifts = axes.repeat(flow.n_atoms, 1)
    turns = torch.stack([torch.linalg.cross(axis.expand_as(x[0]), x[0]).flatten() for axis in axes], 1)
    full = torch.cat([jacobian, shifts, turns], 1)
    labels = getattr(flow.coordinates, "multiplicity", torch.ones(1)).double().log().sum()
    if constraints is None:
        return torch.linalg.slogdet(full)[1] + labels
    masses = torch.tensor(constraints.masses, dtype=torch.float64).repeat_interleave(3)
    # By QR and not by J^T M J, which would square the condition number.
    volume = torch.linalg.qr(masses.sqrt()[:, None] * full)[1].diagonal().abs().log().sum()
    return volume - 0.5 * masses.log().sum() - constraints.log_metric(x)[0] + labels


def _stored_precision(flow: Any, exact: Any, seed: int, n: int = 1000) -> Finding:
    """log q as drawn against log q of the same configuration looked up again, in the flow's own precision."""
    x, drawn = flow.sample(n, torch.Generator(device=flow.device).manual_seed(seed + 2))
    valid = torch.isfinite(x).flatten(1).all(1)
    if not bool(valid.any()):
        return Finding("log q drawn = looked up", "no sample of the flow is a configuration", False)
    looked_up = flow.log_prob(x[valid].double())
    error = (drawn[valid].double() - looked_up.double()).abs()
    # One configuration in a hundred may sit where the map is steep; a wrong density is wrong everywhere.
    most = torch.quantile(error, 0.99)
    rule = _Rule.of(most, drawn[valid].double().abs().mean(), flow.dtype)
    words = f"differ by {float(error.median()):.1e} nat (median), {float(error.max()):.1e} (most) in {flow.dtype}"
    return Finding("log q drawn = looked up", words.replace("torch.", ""), rule.passed)


def _energies(proposal: FlowProposal, molecule: MolecularSystem, seed: int) -> Finding:
    """Energies of both potentials against a Context of the System on the Reference platform."""
    n = min(100, max(5, 20_000 // molecule.n_atoms))  # Ewald sums of a box take that platform a second
    own = whole_positions(proposal, molecule)
    drawn = proposal.draw(n, torch.Generator(device=proposal.device).manual_seed(seed + 3)).positions
    x = proposal.in_place(drawn, own.to(proposal.device)).cpu()
    x = torch.cat([own, x[torch.isfinite(x).flatten(1).all(1)]])
    context = new_context(molecule.system, openmm.VerletIntegrator(0.001), "Reference")
    expected = torch.tensor([_energy(context, frame) for frame in x.numpy()], dtype=torch.float64)
    potentials: dict[str, Any] = {"OpenMMPotential": proposal.potential}
    words = []
    try:
        potentials["TorchPotential"] = TorchPotential(molecule.system, device=proposal.device)
    except UnsupportedForceError as error:
        words.append(f"TorchPotential does not cover it ({error})")
    passed = True
    for name, potential in potentials.items():
        with torch.no_grad():
            energies = potential(x).double().cpu()
        finite = torch.isfinite(expected) & torch.isfinite(energies)
        # Platforms compute in single precision at best; a term that is missing or counted twice shows all the same.
        rule = _Rule.of((energies - expected)[finite], expected[finite], torch.float32)
        words.append(f"{name} {rule.size / (1 + float(expected[finite].abs().max())):.1e}")
        passed &= rule.passed and bool(finite[0])
    return Finding("energies = Context's", f"worst difference over largest energy: {', '.join(words)}", passed)


def _energy(context: openmm.Context, x: np.ndarray) -> float:
    """Potential energy [kJ/mol]."""
    context.setPositions(x)
    return float(context.getState(getEnergy=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))
