"""A flow, a potential and a temperature joined into proposals: ``(positions, log q, reduced potential)``.

This is where the learning and the physics columns meet first. Everything downstream (reweighting, Markov
chains, free energies) takes its densities and energies from one :class:`FlowProposal`, so that there is one
place that says which measure ``log_q`` refers to and which configurations count as impossible.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor

from openmm_regflow.constraints import Constraints
from openmm_regflow.errors import IncompatibleFlowError, InputError, UnsupportedForceError
from openmm_regflow.files import digest
from openmm_regflow.potentials import OpenMMPotential, TorchPotential
from openmm_regflow.refusals import (
    check_atoms,
    check_bonded,
    check_flow,
    check_labels,
    check_subset,
    check_subset_supported,
    check_supported,
    external_forces,
    fixed_bonds_of,
    has_global_parameters,
)
from openmm_regflow.rigid import placement, random_rotations, rotate
from openmm_regflow.units import temperature_kelvin, thermal_energy

#: Reduced energies this far above the best of their batch [kT] count as impossible.
ABSURD_ENERGY = 1e6

#: What a free frame asks of the energy of a state.
NOT_FREE = (
    "the flow step covers biases of the molecule's shape alone: take the external field or the restraint to a place "
    "away, or build the proposal's potential from that System, with a Cartesian flow"
)

Frame = Literal["free", "fixed"]
EnergyFunction = Callable[[Tensor], Tensor]


class ProposalBatch(NamedTuple):
    """Configurations with what a Metropolis or importance weight needs; leading axes are arbitrary.

    Attributes:
        positions: `(..., n_atoms, 3)` [nm].
        log_q: proposal log-density `(...,)` [nat], float64, relative to the measure that ``exp(-u)`` lives
            on.
        u: reduced potential `(...,)` [kT], float64; ``+inf`` where it is not finite or absurd.
    """

    positions: Tensor
    log_q: Tensor
    u: Tensor

    @property
    def log_weights(self) -> Tensor:
        """Importance log-weights ``-u - log_q`` `(...,)`, up to the constant ``log Z``."""
        return -self.u - self.log_q

    def scaled(self, ratio: float) -> "ProposalBatch":
        """The same draws with ``u`` multiplied by ``ratio``: another temperature of the same System."""
        return self._replace(u=self.u * ratio)

    def rows(self, index: Any) -> "ProposalBatch":
        """The rows chosen by ``index`` along the leading axis."""
        return ProposalBatch(self.positions[index], self.log_q[index], self.u[index])


class FlowProposal:
    """A flow as a proposal generator for one System at one temperature.

    Measure: the Boltzmann factor ``exp(-u(x))`` of a molecule in free space does not depend on its frame (centre and
    orientation), a Cartesian flow's density does. ``log_q`` is therefore always

        ``log_q(x) = flow.log_prob(x) - flow.frame_log_density(x)``

    where ``frame_log_density`` is the log-density of the frame in the flow's own measure (the Gaussian on the
    centre for a Cartesian flow, zero for internal coordinates). ``-u - log_q`` is then the full log-weight.
    With ``frame="fixed"`` (a System in an external field, whose Boltzmann factor fixes the frame itself)
    ``log_q`` is ``flow.log_prob`` alone.

    A System with constrained bonds samples ``sqrt(det Z) exp(-u)`` on its constraint surface
    (:mod:`openmm_regflow.constraints`). It needs a flow with these bonds fixed; the measure that ``exp(-u)`` lives on
    then holds ``sqrt(det Z)``, so ``log_q`` is lower by ``log sqrt(det Z)``. As a part of the measure and not of the
    energy it does not scale with temperature.

    Args:
        flow: an ``openmm_regflow.Flow`` or any object with its ``sample``, ``log_prob``,
            ``frame_log_density``.
        potential: energies [kJ/mol] of a batch `(n, n_atoms, 3)` [nm] -> `(n,)`: ``TorchPotential``,
            ``OpenMMPotential`` or any callable. One and the same potential is used for proposals and for
            current states, so a chain built on this object samples exactly that potential.
        temperature: [K or Quantity].
        allow_mismatch: accept a flow that was trained for another System or temperature. Results stay exact,
            they only get noisier; atom counts must agree all the same.
        frame: ``"free"`` or ``"fixed"``; by default found out by moving and turning a few samples.
        chunk_size: rows per call of the flow and of the potential; bounds the memory of large batches.
        extra_forces: accept a System with further forces (a bias, a restraint) beside those that the flow was trained
            for.

    Attributes:
        n_impossible: how many energies so far were not finite or absurd.
        constraints: bonds of constrained length among the flow's atoms; None where it fixes none.

    Raises:
        IncompatibleFlowError: the flow belongs to another System, atom count or temperature.
        UnsupportedForceError: the System has constraints that the flow does not fix, virtual sites, particles without
            mass or a periodic box.
        InputError: a temperature that is not positive, an unknown ``frame``, or a flow with fixed bonds and a potential
            without a System, whose masses would be needed.
    """

    def __init__(
        self,
        flow: Any,
        potential: EnergyFunction,
        temperature: Any,
        *,
        allow_mismatch: bool = False,
        frame: Literal["auto", "free", "fixed"] = "auto",
        chunk_size: int = 8192,
        extra_forces: bool = False,
    ) -> None:
        if frame not in ("auto", "free", "fixed"):
            raise InputError(f"frame is {frame!r}; choose 'auto', 'free' or 'fixed'")
        if chunk_size < 1:
            raise InputError(f"chunk_size is {chunk_size}; at least one row per call is needed")
        self.flow, self.potential = flow, potential
        self.temperature = temperature_kelvin(temperature)
        self.kT = thermal_energy(self.temperature)
        self.allow_mismatch, self.extra_forces = allow_mismatch, extra_forces
        self.chunk_size = chunk_size
        self.n_impossible = 0
        self._frame = frame
        self._check()

    def _check(self) -> None:
        """Refuse what this kind of proposal does not cover."""
        if self.system is not None:
            self.check_system(self.system)
        check_atoms(self.flow, self.potential)
        if not self.allow_mismatch:
            check_flow(self.flow, self.system, self.temperature, self.extra_forces)
            if self.system is not None:
                check_order(self.flow, self.system)
        self._set_constraints()

    def _set_constraints(self) -> None:
        """Constraints and masses behind the flow's bonds of fixed length."""
        self.constraints: Constraints | None = None
        if fixed_bonds_of(self.flow):
            if self.system is None:
                raise InputError(
                    "the flow has bonds of fixed length, whose ensemble depends on the masses; give a potential with a "
                    "System (OpenMMPotential or TorchPotential)"
                )
            self.constraints = Constraints.of(self.system, self.atom_subset)

    def check_system(self, system: openmm.System) -> None:
        """Refuse a System that proposals of this kind cannot move; see :func:`check_supported`."""
        check_supported(system, self.flow)
        self._check_masses(system)

    def check_state_system(self, system: openmm.System) -> None:
        """Refuse the System of a state whose own energy decides: as :meth:`check_system`, and the flow must fit.

        Further forces, such as a bias, are expected there; but none on the places of atoms, where the frame is free.

        Raises:
            InputError: a CustomExternalForce, which the proposal's own energy does not have.
        """
        self.check_system(system)
        if not self.allow_mismatch:
            check_flow(self.flow, system, self.temperature, extra_forces=True)
        if external_forces(system) and self.frame == "free":
            raise InputError(f"the state's System has a CustomExternalForce; {NOT_FREE}")

    def check_state_energy(self, energy: EnergyFunction, positions: Tensor, dtype: torch.dtype) -> bool:
        """Refuse an energy of a state that rigid motions change, where the proposal takes its frame as free.

        Args:
            energy: reduced energies [kT] of `(n, n_atoms, 3)` [nm] -> `(n,)`.
            positions: `(n, n_atoms, 3)` [nm].
            dtype: in which the energies are computed.

        Returns:
            Whether the positions have a finite energy, so that they could tell.

        Raises:
            InputError: the energy changes.
        """
        if self.frame == "fixed":
            return True
        counts = _frame_counts(energy, positions.double(), dtype)
        if counts:
            raise InputError(f"the state's energy changes when the molecule moves as a whole; {NOT_FREE}")
        return counts is not None

    def _check_masses(self, system: openmm.System) -> None:
        """Refuse a System whose constrained ensemble differs from the proposal's own by its masses."""
        own: Constraints | None = getattr(self, "constraints", None)
        if own is not None and not np.allclose(own.masses, Constraints.of(system, self.atom_subset).masses, rtol=1e-9):
            raise IncompatibleFlowError(
                "masses differ from those of the proposal's System, and with constraints they shape the ensemble; "
                "build the proposal's potential from this System"
            )

    @property
    def system(self) -> openmm.System | None:
        """The potential's System; None for a plain callable."""
        return getattr(self.potential, "system", None)

    @property
    def covers_system(self) -> bool:
        """Whether the potential is the whole energy of its System, with nothing that a Context could change.

        False for a plain callable, for a subset of force groups and for forces with global parameters.
        """
        if self.system is None or has_global_parameters(self.system):
            return False
        return getattr(self.potential, "groups", None) is None and getattr(self.potential, "_groups", -1) == -1

    @property
    def n_atoms(self) -> int:
        """Number of atoms of the configurations that are proposed."""
        return int(self.flow.n_atoms)

    @property
    def atom_subset(self) -> list[int] | None:
        """Indices of the atoms that the flow moves; None for all of them."""
        return None

    @property
    def frame_atoms(self) -> list[int] | None:
        """Places in ``atom_subset`` of the atoms that fix the frame; None where there is no subset."""
        return None

    @property
    def stream(self) -> list[int]:
        """What tells the random numbers of a seed from those of other proposals: flow, atoms, temperature.

        A chain of two that drew alike would propose what its state already depends on, and have another target.
        """
        weights = digest(self.flow.state_dict()) if hasattr(self.flow, "state_dict") else type(self.flow).__qualname__
        what = json.dumps([self.temperature, self.atom_subset, self.frame_atoms, weights])
        return [int(digit, 16) for digit in hashlib.sha256(what.encode()).hexdigest()[:16]]

    @property
    def device(self) -> torch.device:
        """Device on which the flow draws its samples."""
        return torch.device(getattr(self.flow, "device", "cpu"))

    @cached_property
    def frame(self) -> Frame:
        """``"free"`` where rigid motions leave the energy unchanged, else ``"fixed"``."""
        frame = self._frame if self._frame != "auto" else _find_frame(self)
        if frame == "free" and getattr(getattr(self.flow, "coordinates", None), "held", False):
            raise IncompatibleFlowError(
                "the flow was trained for a molecule that forces hold in its place, and nothing holds this one; train "
                "a flow for this System"
            )
        if frame == "fixed" and self.flow.rotation_invariant:
            raise UnsupportedForceError(
                "the energy changes when the molecule moves as a whole, but a flow on internal coordinates "
                "has no density for the frame; train a Cartesian flow or remove the external force"
            )
        return frame

    def with_flow(self, flow: Any) -> "FlowProposal":
        """This proposal with another flow of the same kind, checked like the first one."""
        other = copy.copy(self)
        other.flow = flow
        for known in ("_bonds", "frame"):
            other.__dict__.pop(known, None)
        other._check()
        return other

    def draw(self, n: int, generator: torch.Generator | None = None) -> ProposalBatch:
        """The draws of :meth:`sample` without their energies: ``u`` is NaN. For targets with an energy of their own."""
        if n < 1:
            raise InputError(f"{n} samples were asked for; at least one is needed")
        chunks = [self._draw(size, generator) for size in chunk_sizes(n, self.chunk_size)]
        positions, log_q = (torch.cat(parts) for parts in zip(*chunks))
        return ProposalBatch(positions, log_q, torch.full_like(log_q, torch.nan))

    def sample(self, n: int, generator: torch.Generator | None = None) -> ProposalBatch:
        """Draw ``n`` independent configurations from the flow.

        Args:
            n: how many.
            generator: random state on the flow's device; None uses torch's global one.

        Returns:
            Batch with leading axis `(n,)`, positions in the flow's dtype.

        Raises:
            InputError: ``n`` is below one.
        """
        return self.with_energies(self.draw(n, generator))

    def with_energies(self, batch: ProposalBatch) -> ProposalBatch:
        """Draws `(n, ...)` with their reduced potential."""
        return batch._replace(u=self.reduced_potential(batch.positions))

    def log_q(self, positions: Any) -> Tensor:
        """Proposal log-density in the measure of ``exp(-u)`` (see the class), float64 `(n,)`.

        Args:
            positions: `(n, n_atoms, 3)` [nm], tensor or array. For a free molecule and a flow that is not
                rotation invariant, redraw the frame first (:meth:`redraw_frame`).
        """
        positions = self.as_tensor(positions)
        return self._chunked(self._log_q, positions)

    def reduced_potential(self, positions: Any) -> Tensor:
        """Energies over kT, float64 `(n,)`; not finite or over 1e6 kT above the batch's best becomes
        ``+inf``.

        The cut changes no probability: a weight of ``exp(-1e6)`` is zero in float64.

        Args:
            positions: `(n, n_atoms, 3)` [nm], tensor or array.
        """
        positions = self.as_tensor(positions)
        return self.without_absurd(self._chunked(self._energies, positions))

    def evaluate(self, positions: Any) -> ProposalBatch:
        """``log_q`` and ``u`` of given configurations `(n, n_atoms, 3)` [nm] as a batch."""
        positions = self.as_tensor(positions)
        return ProposalBatch(positions, self.log_q(positions), self.reduced_potential(positions))

    def check_labels(self, positions: Any, what: str = "the positions") -> None:
        """Refuse positions `(n, n_atoms, 3)` [nm] whose methyl hydrogens go round the other way than the flow's.

        Raises:
            InputError: more than half of them.
        """
        positions = self.as_tensor(positions)
        subset = self.atom_subset
        check_labels(self.flow, positions if subset is None else positions[:, subset], what)

    def redraw_frame(self, positions: Any, generator: torch.Generator | None = None) -> Tensor:
        """Centre and orientation drawn anew from the flow's own frame distribution, shapes unchanged.

        A free molecule's target is ``exp(-u(shape))`` times this distribution (Gaussian centre, uniform
        orientation), so replacing the frame by an independent draw leaves the target invariant. Nothing
        happens for a flow on internal coordinates or in a fixed frame.

        Args:
            positions: `(n, n_atoms, 3)` [nm].
            generator: random state (on its own device); None uses torch's global one.

        Returns:
            Positions of the same shape, float64 [nm].
        """
        positions = self.as_tensor(positions)
        if self.frame == "fixed" or self.flow.rotation_invariant:
            return positions.double()
        device = generator.device if generator is not None else positions.device
        centre = torch.randn(len(positions), 1, 3, generator=generator, device=device, dtype=torch.float64)
        rotations = random_rotations(len(positions), generator, device=device)
        turned = rotate(positions.double(), rotations)
        centre = float(self.flow.com_std) * centre.to(turned)
        return turned - turned.mean(1, keepdim=True) + centre

    def in_place(self, drawn: Tensor, current: Tensor) -> Tensor:
        """Draws `(n, ...)` as whole configurations `(n, n_atoms, 3)` beside a current one `(1, n_atoms, 3)`."""
        return drawn.double()

    def make_whole(self, positions: np.ndarray, box: np.ndarray | None) -> np.ndarray:
        """Positions `(n_atoms, 3)` [nm] with the moved molecule not split by a box `(3, 3)` [nm]."""
        return positions

    def project_velocities(self, velocities: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Velocities `(n_atoms, 3)` [nm/ps] without components along the constraints of the moved atoms."""
        if self.constraints is None:
            return velocities
        atoms = slice(None) if self.atom_subset is None else self.atom_subset
        projected = np.array(velocities)
        projected[atoms] = self.constraints.project(velocities[atoms], positions[atoms])
        return projected

    def as_tensor(self, positions: Any) -> Tensor:
        """Positions [nm or Quantity] as a tensor `(n, n_atoms, 3)` on the flow's device, dtype kept.

        Raises:
            InputError: another shape.
        """
        if unit.is_quantity(positions):
            positions = np.asarray(positions.value_in_unit(unit.nanometer))
        tensor = positions if isinstance(positions, Tensor) else torch.as_tensor(np.asarray(positions))
        if tensor.ndim != 3 or tensor.shape[1:] != (self.n_atoms, 3):
            raise InputError(f"positions have shape {tuple(tensor.shape)}; (n, {self.n_atoms}, 3) in nm is needed")
        return tensor.to(self.device)

    def _draw(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Positions and ``log_q`` of one chunk of samples."""
        with torch.no_grad():
            positions, log_prob = self.flow.sample(n, generator=generator)
            log_q = log_prob.double() - self.frame_log_density(positions) - self._log_metric(positions)
        return positions, log_q

    def _log_q(self, positions: Tensor) -> Tensor:
        """``log_q`` of one chunk."""
        x = positions.double()
        with torch.no_grad():
            return self.flow.log_prob(x).double() - self.frame_log_density(x) - self._log_metric(x)

    def _log_metric(self, x: Tensor) -> Tensor | float:
        """``log sqrt(det Z)`` of the flow's atoms `(n, ...)`; 0 without constraints."""
        return 0.0 if self.constraints is None else self.constraints.log_metric(x.double())

    def frame_log_density(self, x: Tensor) -> Tensor:
        """What ``flow.log_prob`` holds for the frame and ``exp(-u)`` does not, float64 `(n,)`."""
        if self.frame == "fixed":
            return torch.zeros(len(x), dtype=torch.float64, device=x.device)
        return self.flow.frame_log_density(x).double()

    def _energies(self, positions: Tensor) -> Tensor:
        """Reduced energies of one chunk; rows with non-finite positions never reach the potential."""
        u = torch.full((len(positions),), torch.inf, dtype=torch.float64, device=positions.device)
        valid = torch.isfinite(positions).flatten(1).all(1)
        if valid.any():
            with torch.no_grad():
                energies = torch.as_tensor(self.potential(positions[valid].double()))
            u[valid] = energies.to(u.device, torch.float64) / self.kT
        return u

    def without_absurd(self, u: Tensor) -> Tensor:
        """``+inf`` for every energy that is NaN, infinite or absurd; the one place that decides this."""
        finite = torch.isfinite(u)
        best = u[finite].min() if finite.any() else torch.zeros((), dtype=u.dtype, device=u.device)
        possible = finite & (u - best <= ABSURD_ENERGY)
        self.n_impossible += int((~possible).sum())
        return torch.where(possible, u, torch.inf)

    def _chunked(self, function: EnergyFunction, positions: Tensor) -> Tensor:
        """``function`` over chunks of rows."""
        return torch.cat([function(chunk) for chunk in positions.split(self.chunk_size)])


class SubsetProposal(FlowProposal):
    """A flow over some atoms of a larger System: a peptide or ligand in solvent, a loop.

    The subset keeps the frame (position and orientation) that three of its atoms define in the current state, and
    everything else stays where it is; the flow proposes the subset's internal coordinates. Cartesian volume splits
    into the invariant volume of that frame times ``flow``'s measure on the internal coordinates, whichever three atoms
    define the frame. At a fixed frame and environment the log-weight is therefore ``-u(x) - flow.log_prob(x_subset)``.
    The frame depends on one configuration alone (it is no superposition of two), so any number of proposals is exact.

    A periodic box and constant pressure are covered, since the move changes neither; virtual sites are, as long as none
    touches the subset; constraints are where both or none of their atoms are in the subset, and the flow fixes them
    (their metric term is that of the subset's own constraints, as no others share an atom with them).

    Args:
        flow: on internal coordinates of the subset, in the order of ``atom_subset``.
        potential: of the whole System, or of any System with it; ``FlowMove`` and ``FlowSimulation`` use the Context's
            own energy where the box can change.
        temperature: [K or Quantity].
        atom_subset: indices of the subset in the System, in the flow's atom order.
        frame_atoms: three places in ``atom_subset``, not on a line; by default the first three of the flow's Z-matrix.
        allow_mismatch: accept a flow that was trained at another temperature.
        chunk_size: rows per call.

    Raises:
        InputError: indices that repeat, are out of range or of the wrong number.
        UnsupportedForceError: virtual sites within the subset, or constraints there that the flow does not fix.
        IncompatibleFlowError: a Cartesian flow, or one trained at another temperature.
    """

    def __init__(
        self,
        flow: Any,
        potential: EnergyFunction,
        temperature: Any,
        atom_subset: Sequence[int],
        *,
        frame_atoms: Sequence[int] | None = None,
        allow_mismatch: bool = False,
        chunk_size: int = 8192,
    ) -> None:
        self._subset = [int(i) for i in atom_subset]
        self._frame_atoms = [int(i) for i in (_seed_atoms(flow) if frame_atoms is None else frame_atoms)]
        super().__init__(
            flow, potential, temperature, allow_mismatch=allow_mismatch, frame="fixed", chunk_size=chunk_size
        )

    def _check(self) -> None:
        n_atoms = getattr(self.potential, "n_atoms", None)
        if n_atoms is None:
            raise InputError("the potential has no n_atoms; use TorchPotential or OpenMMPotential of the whole System")
        check_subset(self._subset, n_atoms, self.flow.n_atoms)
        if len(set(self._frame_atoms)) != 3 or not set(self._frame_atoms) <= set(range(len(self._subset))):
            raise InputError(f"frame_atoms {self._frame_atoms} are not three places among {len(self._subset)} atoms")
        if not self.flow.rotation_invariant:
            raise IncompatibleFlowError("a subset moves in its internal coordinates; train a flow on kind='internal'")
        if self.system is not None:
            self.check_system(self.system)
        if not self.allow_mismatch:
            check_flow(self.flow, None, self.temperature)
            if self.system is not None:
                check_bonded(self.system, self._bonds)
        self._set_constraints()

    def check_state_system(self, system: openmm.System) -> None:
        """As :meth:`check_system`; the flow's own System says nothing about the surroundings."""
        self.check_system(system)

    def check_system(self, system: openmm.System) -> None:
        """Refuse virtual sites that touch the subset, and constraints that do and are not fixed in the flow."""
        check_subset_supported(system, self._subset, self.flow)
        self._check_masses(system)

    @cached_property
    def frame(self) -> Frame:
        """The subset's frame is that of the current state."""
        return "fixed"

    @property
    def n_atoms(self) -> int:
        """Number of atoms of the whole System."""
        return int(self.potential.n_atoms)  # type: ignore[attr-defined]

    @property
    def atom_subset(self) -> list[int]:
        """Indices of the atoms that the flow moves."""
        return list(self._subset)

    @property
    def frame_atoms(self) -> list[int]:
        """Places in ``atom_subset`` of the atoms that fix the frame."""
        return list(self._frame_atoms)

    def in_place(self, drawn: Tensor, current: Tensor) -> Tensor:
        """Draws `(n, n_subset, 3)` in the frame of the current configuration, all other atoms as they are."""
        whole = current.double().repeat(len(drawn), 1, 1)
        whole[:, self._subset] = self.in_frame(drawn, current)
        return whole

    def in_frame(self, drawn: Tensor, current: Tensor) -> Tensor:
        """Draws `(n, n_subset, 3)` put into the frame of the current configuration `(1, n_atoms, 3)` [nm]."""
        origin, axes = local_frame(current[:, self._subset][:, self._frame_atoms].double())
        drawn_origin, drawn_axes = local_frame(drawn[:, self._frame_atoms].double())
        return ((drawn.double() - drawn_origin) @ drawn_axes.transpose(1, 2)) @ axes + origin

    def make_whole(self, positions: np.ndarray, box: np.ndarray | None) -> np.ndarray:
        """Every atom of the subset at its image next to the atom that it is bonded to.

        Next to one and the same atom would break a molecule that is wider than half the box.
        """
        if box is None:
            return positions
        whole = np.array(positions)
        for atom, partner in self._bonds:
            delta = whole[atom] - whole[partner]
            for k in (2, 1, 0):  # OpenMM's reduced triclinic vectors: remove the last one first
                delta -= np.round(delta[k] / box[k, k]) * box[k]
            whole[atom] = whole[partner] + delta
        return whole

    @cached_property
    def _bonds(self) -> list[tuple[int, int]]:
        """(atom, bonded to) in the order of the flow's Z-matrix, in the numbering of the System."""
        return bonds_of_subset(self.flow, self._subset)

    def _draw(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Subset positions and their density."""
        with torch.no_grad():
            positions, log_prob = self.flow.sample(n, generator=generator)
            log_q = log_prob.double() - self._log_metric(positions)
        return positions, log_q

    def with_energies(self, batch: ProposalBatch) -> ProposalBatch:
        """NaN, as drawn: the energy is known only beside a current configuration, see :meth:`in_place`."""
        return batch._replace(u=torch.full_like(batch.log_q, torch.nan))

    def _log_q(self, positions: Tensor) -> Tensor:
        x = positions[:, self._subset].double()
        with torch.no_grad():
            return self.flow.log_prob(x).double() - self._log_metric(x)


def bonds_of_subset(flow: Any, subset: Sequence[int]) -> list[tuple[int, int]]:
    """(atom, bonded to) in the order of a flow's Z-matrix, in the numbering of the System; none without a Z-matrix."""
    zmatrix = getattr(getattr(flow, "coordinates", None), "zmatrix", None)
    if zmatrix is None:
        return []
    return [(subset[a], subset[b]) for a, b in zmatrix.bonds]


def check_order(flow: Any, system: openmm.System) -> None:
    """Refuse a System whose atoms are in another order than a flow's, where no fingerprint has proved it.

    Raises:
        IncompatibleFlowError: see :func:`openmm_regflow.refusals.check_bonded`.
    """
    if getattr(getattr(flow, "metadata", None), "fingerprint", None) is None:
        check_bonded(system, bonds_of_subset(flow, range(flow.n_atoms)), "the System")


def local_frame(three: Tensor) -> tuple[Tensor, Tensor]:
    """Origin `(n, 1, 3)` and orthonormal axes `(n, 3, 3)`, as rows, of three atoms `(n, 3, 3)`."""
    first = torch.nn.functional.normalize(three[:, 1] - three[:, 0], dim=1)
    normal = torch.nn.functional.normalize(torch.linalg.cross(first, three[:, 2] - three[:, 0]), dim=1)
    return three[:, :1], torch.stack([first, torch.linalg.cross(normal, first), normal], 1)


def _seed_atoms(flow: Any) -> tuple[int, ...]:
    """The three atoms that a flow's Z-matrix starts from, else the first three."""
    zmatrix = getattr(getattr(flow, "coordinates", None), "zmatrix", None)
    return (0, 1, 2) if zmatrix is None else tuple(zmatrix.seed)


def chunk_sizes(n: int, chunk: int) -> list[int]:
    """``n`` split into chunks."""
    return [chunk] * (n // chunk) + ([n % chunk] if n % chunk else [])


def _find_frame(proposal: FlowProposal) -> Frame:
    """Decide whether rigid motions change the energy, from its forces and a few samples of the flow moved and turned.

    A force on places decides alone: it may be zero where the samples lie, or small beside their clashes.
    """
    judge = copy.copy(proposal)
    judge.potential = potential = _in_float64(proposal.potential)
    if proposal.system is not None:
        mask, groups = getattr(potential, "_groups", -1), getattr(potential, "groups", None)
        numbers = [force.getForceGroup() for force in external_forces(proposal.system)]
        if any(mask >> k & 1 and (groups is None or k in groups) for k in numbers):
            return "fixed"
    generator = torch.Generator(device=proposal.device).manual_seed(0)
    with torch.no_grad():
        x = proposal.flow.sample(16, generator=generator)[0].double()
    # A callable of the user's may compute in single precision, whatever it returns, and a PythonForce, too.
    own = proposal.system is not None and any("Python" in type(f).__name__ for f in proposal.system.getForces())
    exact = isinstance(potential, OpenMMPotential) and not own
    dtype = getattr(potential, "dtype", torch.float64 if exact else torch.float32)
    return "fixed" if _frame_counts(judge._energies, x, dtype) else "free"


def _in_float64(potential: EnergyFunction) -> EnergyFunction:
    """The same energies in double precision where the package knows how; any other callable as it is."""
    if isinstance(potential, OpenMMPotential):
        return potential.on_platform("Reference")
    if not isinstance(potential, TorchPotential) or potential.dtype == torch.float64:
        return potential
    exact = TorchPotential(potential.system, groups=potential.groups)
    for name, value in potential.parameters.items():
        exact.set_parameter(name, value)
    return exact


def _frame_counts(energy: EnergyFunction, x: Tensor, dtype: torch.dtype) -> bool | None:
    """Whether configurations have another energy once moved and turned as a whole; None where no energy is finite.

    Args:
        energy: reduced energies [kT] of `(n, n_atoms, 3)` [nm] -> `(n,)`.
        x: `(n, n_atoms, 3)` [nm].
        dtype: in which the energies are computed.
    """

    def rounding(shift: float, u: Tensor) -> Tensor:
        # Grows with places, energies and, as terms cancel, the molecule; half the digits leave room for clashes.
        return torch.finfo(dtype).eps ** 0.5 * max(1.0, shift) * (x.shape[1] + u.abs())

    found = placement(energy, x, rounding)
    return None if found is None else found.counts
