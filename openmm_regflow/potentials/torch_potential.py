"""An `openmm.System` compiled into one batched, differentiable torch function."""

from collections.abc import Callable, Iterable
from typing import Any

import openmm
import torch
from torch import Tensor

from openmm_regflow.errors import InputError, UnsupportedForceError, first_line
from openmm_regflow.potentials.base import (
    LARGEST_COORDINATE,
    Geometry,
    PairTable,
    Term,
    Vector,
    check_positions,
    force_label,
    parameter_value,
)
from openmm_regflow.potentials.bonded import (
    AngleTerm,
    BondTerm,
    CMAPTerm,
    PeriodicTorsionTerm,
    RBTorsionTerm,
    displacement,
)
from openmm_regflow.potentials.compiled import BlockFunction, CompiledBlocks
from openmm_regflow.potentials.custom import (
    CustomAngleTerm,
    CustomBondTerm,
    CustomCompoundBondTerm,
    CustomExternalTerm,
    CustomTorsionTerm,
)
from openmm_regflow.potentials.custom_pair import CustomGBTerm, CustomNonbondedTerm
from openmm_regflow.potentials.implicit import GBSAOBCTerm
from openmm_regflow.potentials.nonbonded import NonbondedTerm
from openmm_regflow.potentials.openmm_potential import check_groups, context_parameters

_BONDED: dict[type, Callable[..., Term]] = {
    openmm.HarmonicBondForce: BondTerm,
    openmm.HarmonicAngleForce: AngleTerm,
    openmm.PeriodicTorsionForce: PeriodicTorsionTerm,
    openmm.RBTorsionForce: RBTorsionTerm,
    openmm.CMAPTorsionForce: CMAPTerm,
    openmm.CustomBondForce: CustomBondTerm,
    openmm.CustomAngleForce: CustomAngleTerm,
    openmm.CustomTorsionForce: CustomTorsionTerm,
    openmm.CustomExternalForce: CustomExternalTerm,
    openmm.CustomCompoundBondForce: CustomCompoundBondTerm,
}
_PAIRWISE: dict[type, Callable[..., Term]] = {
    openmm.NonbondedForce: NonbondedTerm,
    openmm.CustomNonbondedForce: CustomNonbondedTerm,
    openmm.GBSAOBCForce: GBSAOBCTerm,
    openmm.CustomGBForce: CustomGBTerm,
}
#: Forces that add nothing to the energy.
_NEUTRAL = (
    openmm.CMMotionRemover,
    openmm.MonteCarloBarostat,
    openmm.MonteCarloAnisotropicBarostat,
    openmm.MonteCarloMembraneBarostat,
    openmm.MonteCarloFlexibleBarostat,
    openmm.AndersenThermostat,
)

Constants = list[dict[str, Tensor]]

#: Pairs times configurations of one chunk on a CPU: about as much as keeps the intermediates in its caches.
_CHUNK_ENTRIES = 120_000
#: Arrays of that size that are alive at once in forces of CustomGBForce, the most of all terms (counted).
_ARRAYS_AT_ONCE = 81


class TorchPotential:
    """Energies and forces of an `openmm.System` for whole batches, as a differentiable torch function.

    Args:
        system: the System; it is copied, later changes to it have no effect.
        dtype: `torch.float64` or `torch.float32`.
        device: where the tables live and the work is done.
        compile: run through `torch.compile`; falls back to eager, with one warning, without a C++ compiler.
        groups: force groups to include; all of them by default.

    Attributes:
        system: the copy of the System.
        n_atoms: its number of particles.
        constraints: its number of constraints, which play no part in the energy.
        parameters: current values of the global parameters; see `set_parameter`.

    Raises:
        UnsupportedForceError: a force or feature is not covered; nothing is ever left out in silence. (Nor are two
            offsets of one parameter on one particle or exception, which OpenMM's platforms read differently.)
        InputError: another dtype, a force group outside 0 to 31, or a System that no Context takes.
    """

    def __init__(
        self,
        system: openmm.System,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        compile: bool = False,
        groups: Iterable[int] | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise InputError(f"dtype is {dtype}; TorchPotential works in torch.float64 or torch.float32")
        self.dtype, self.device = dtype, torch.device(device)
        self.n_atoms, self.constraints = system.getNumParticles(), system.getNumConstraints()
        self.groups = None if groups is None else check_groups(groups)
        _refuse_uncovered(system, self.groups)  # before the copy: a force in Python may have none
        self.system = _copied(system)
        self.parameters = context_parameters(self.system)
        _refuse_impossible(self.system, self.groups)
        pairs = PairTable(self.n_atoms)
        self._terms = _build_terms(self.system, self.groups, pairs)
        first, second = pairs.pairs().T
        self._differences = displacement(first, second, self.n_atoms) if len(pairs) else None
        for term in self._terms:
            term.finalise(pairs)
            term.to(self.dtype, self.device)
        if self._differences is not None:
            self._differences.to(self.dtype, self.device)
        self._refresh()
        self._compiled = compile
        self._set_functions(len(pairs))

    def set_parameter(self, name: str, value: Any) -> None:
        """Set a global parameter (as `Context.setParameter` does); compiled code stays valid.

        Raises:
            InputError: no force of this System has a parameter of that name, or no finite value.
        """
        if name not in self.parameters:
            raise InputError(f"no global parameter {name!r}; this System has {sorted(self.parameters)}")
        self.parameters[name] = parameter_value(name, value)
        self._refresh()

    def _set_functions(self, n_pairs: int) -> None:
        """The functions of energy alone (False) and with gradient (True), and the sizes of a chunk and a lane."""
        functions: dict[bool, BlockFunction] = {
            # Plain functions: the recorder counts the arguments of a bound method wrongly.
            False: lambda x, constants: self._block_energy(x, constants),
            True: lambda x, constants: self._block_gradient(x, constants),
        }
        names = {False: "energies", True: "forces"}
        self._functions = (
            {k: CompiledBlocks(f, names[k]) for k, f in functions.items()} if self._compiled else functions
        )
        self._lanes = 16 if self.device.type == "cpu" else 128
        budget = _CHUNK_ENTRIES if self.device.type == "cpu" else self._device_budget()
        fitting = budget // max(n_pairs, 4 * self.n_atoms, 1)
        self._chunk = max(2, fitting // self._lanes) * self._lanes if self._compiled else max(1, fitting)

    def _device_budget(self) -> int:
        """Pairs times configurations that fit into half of the device's free memory."""
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 8 << 30
        return int(0.5 * free / (_ARRAYS_AT_ONCE * torch.finfo(self.dtype).bits / 8))

    def _refresh(self) -> None:
        self._constants = [
            {name: value.to(self.device, self.dtype) for name, value in term.constants(self.parameters).items()}
            for term in self._terms
        ]

    def _block_energy(self, x: Vector, constants: Constants) -> tuple[Tensor]:
        """Energies `(n_blocks, lanes)` of coordinates `(n_blocks, n_atoms, lanes)`; may hold NaN."""
        geometry = Geometry(x, self._differences)
        total = geometry.zeros()
        for term, values in zip(self._terms, constants):
            total = total + term.energy(geometry, values)
        return (total,)

    def _block_gradient(self, x: Vector, constants: Constants) -> tuple[Tensor, ...]:
        """Energies and their derivatives by x, y and z."""
        with torch.enable_grad():
            x = tuple(c.detach().requires_grad_(True) for c in x)
            (energy,) = self._block_energy(x, constants)
            if not energy.requires_grad:  # no force at all
                return energy, *(torch.zeros_like(c) for c in x)
            # Forces may depend on some coordinates alone, such as a wall in z.
            gradient = torch.autograd.grad(energy.sum(), x, allow_unused=True, materialize_grads=True)
        return energy.detach(), *gradient

    def _evaluate(self, x: Tensor, forces: bool) -> tuple[Tensor, Tensor | None]:
        """Energies and, on demand, forces, chunk by chunk, outside any recording of gradients."""
        with torch.inference_mode(False), torch.no_grad():
            x = x.detach()
            if len(x) == 0:
                return x[:, 0, 0].clone(), x.clone()
            parts: list[tuple[Tensor, Tensor]] = []
            while (done := sum(len(energy) for energy, _ in parts)) < len(x):
                if (part := self._fitting(x[done : done + self._chunk], forces)) is not None:
                    parts.append(part)
            energy = torch.cat([part[0] for part in parts])
            force = torch.cat([part[1] for part in parts]) if forces else None
        return energy, force

    def _fitting(self, x: Tensor, forces: bool) -> tuple[Tensor, Tensor] | None:
        """A chunk's energies and forces; None, and chunks of half the size from now on, if memory does not suffice.

        What was free when the potential was made, others may have taken since.
        """
        try:
            return self._evaluate_chunk(x, forces)
        except torch.OutOfMemoryError:
            recording = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            if recording or len(x) <= self._lanes:
                raise
        blocks = max(1, min(len(x), self._chunk) // self._lanes // 2)
        self._chunk = blocks * self._lanes
        return None

    def _evaluate_chunk(self, x: Tensor, forces: bool) -> tuple[Tensor, Tensor]:
        n = len(x)
        coordinates = to_blocks(x, self._lanes if self._compiled else n, 2 if self._compiled else 1)
        function = self._functions[forces]
        energy, *gradient = function(coordinates, self._constants)
        energy = energy.reshape(-1)[:n]
        # NaN positions compare false. Squares of absurd ones overflow, and not always to an infinite energy.
        energy = torch.where((x.abs() <= LARGEST_COORDINATE).all(-1).all(-1), energy, torch.inf)
        if not forces:
            return torch.where(torch.isfinite(energy), energy, torch.inf), x
        force = -torch.stack(gradient).permute(1, 3, 2, 0).reshape(-1, self.n_atoms, 3)[:n]
        valid = torch.isfinite(energy) & torch.isfinite(force).all(-1).all(-1)
        return torch.where(valid, energy, torch.inf), torch.where(valid[:, None, None], force, 0.0)

    def __call__(self, x: Any) -> Tensor:
        """Potential energies; +inf where they are not finite.

        Args:
            x: `(n, n_atoms, 3)` positions [nm]: tensor, array or Quantity.

        Returns:
            `(n,)` [kJ/mol], differentiable any number of times in ``x`` where that is a tensor which requires a
            gradient; rows with energy +inf have gradient zero.

        Raises:
            InputError: the shape does not fit the System.
        """
        x = check_positions(x, self.n_atoms).to(self.device, self.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            return _Energy.apply(x, self)
        return self._evaluate(x, False)[0]

    def energy_and_forces(self, x: Any) -> tuple[Tensor, Tensor]:
        """Energies and forces; where the energy is +inf the forces are zero.

        Args:
            x: `(n, n_atoms, 3)` positions [nm].

        Returns:
            `(n,)` [kJ/mol] and `(n, n_atoms, 3)` [kJ/mol/nm], without gradient.

        Raises:
            InputError: the shape does not fit the System.
        """
        energy, forces = self._evaluate(check_positions(x, self.n_atoms).to(self.device, self.dtype), True)
        return energy, forces  # type: ignore[return-value]

    def differentiable_energy(self, x: Tensor) -> Tensor:
        """Energies `(n,)` of `(n, n_atoms, 3)` by plain torch operations; may hold NaN. Used for higher derivatives."""
        energy = self._block_energy(x.permute(2, 1, 0)[:, None].unbind(0), self._constants)[0][0]
        return energy + 0.0 * x.sum((1, 2))  # a constant energy too has a derivative: zero

    @property
    def options(self) -> dict[str, Any]:
        """Arguments beside the System, as plain values: what a file needs to build the same potential again."""
        groups = None if self.groups is None else sorted(self.groups)
        dtype = str(self.dtype).removeprefix("torch.")
        return {"dtype": dtype, "device": str(self.device), "compile": self._compiled, "groups": groups}

    def __getstate__(self) -> dict[str, Any]:
        """The System as XML and the options: tables and compiled code are rebuilt where they are needed."""
        options = self.options | {"dtype": self.dtype}
        return {"xml": openmm.XmlSerializer.serialize(self.system), "options": options, "set": self.parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        TorchPotential.__init__(self, openmm.XmlSerializer.deserialize(state["xml"]), **state["options"])
        self.parameters |= state["set"]
        self._refresh()


class _Energy(torch.autograd.Function):
    """Energies whose first derivative comes from the fast forces; a second one is built on plain operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, potential: TorchPotential) -> Tensor:
        energy, forces = potential._evaluate(x, True)
        ctx.save_for_backward(x, energy, forces)
        ctx.potential = potential
        return energy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, energy, forces = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return -grads[0][:, None, None] * forces, None
        # Rows without a finite energy take no part: their NaN would spread through products with zero.
        valid = torch.isfinite(energy).nonzero()[:, 0]
        energy = ctx.potential.differentiable_energy(x[valid])
        (gradient,) = torch.autograd.grad(energy, x, grads[0][valid], create_graph=True)
        return gradient, None


def to_blocks(x: Tensor, lanes: int, minimum: int) -> Vector:
    """Positions `(n, n_atoms, 3)` as coordinates `(n_blocks, n_atoms, lanes)`, padded with copies of the last frame."""
    n_blocks = max(minimum, -(-len(x) // lanes))
    missing = n_blocks * lanes - len(x)
    if missing:
        x = torch.cat([x, x[-1:].expand(missing, -1, -1)])
    blocks = x.reshape(n_blocks, lanes, x.shape[1], 3).permute(3, 0, 2, 1)
    return blocks.clone(memory_format=torch.contiguous_format).unbind(0)


def _counts(force: openmm.Force, groups: frozenset[int] | None) -> bool:
    """Whether a force has a part in the energy."""
    return not isinstance(force, _NEUTRAL) and (groups is None or force.getForceGroup() in groups)


def _refuse_uncovered(system: openmm.System, groups: frozenset[int] | None) -> None:
    for i in range(system.getNumParticles()):
        if system.isVirtualSite(i):
            raise UnsupportedForceError(
                f"particle {i} is a virtual site, which TorchPotential does not cover; use OpenMMPotential(system)"
            )
    for force in system.getForces():
        if _counts(force, groups) and type(force) not in _BONDED and type(force) not in _PAIRWISE:
            raise UnsupportedForceError(
                f"{force_label(force)} is not covered by TorchPotential; use OpenMMPotential(system) instead"
            )


def _copied(system: openmm.System) -> openmm.System:
    try:
        return openmm.XmlSerializer.clone(system)
    except openmm.OpenMMException as error:  # as of a bond without its parameters
        raise InputError(f"OpenMM cannot write this System: {first_line(error)}") from error


def _refuse_impossible(system: openmm.System, groups: frozenset[int] | None) -> None:
    """Refuse what OpenMM refuses: particles without parameters, indices beyond the last, lengths below zero.

    Raises:
        InputError: in OpenMM's words.
    """
    own = openmm.XmlSerializer.clone(system)
    for k in reversed(range(own.getNumForces())):
        if not _counts(own.getForce(k), groups):
            own.removeForce(k)
    for k in reversed(range(own.getNumConstraints())):  # they have no energy, and their own rules
        own.removeConstraint(k)
    try:
        openmm.Context(own, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    except openmm.OpenMMException as error:
        raise InputError(f"OpenMM makes no Context of this System: {first_line(error)}") from error


def _build_terms(system: openmm.System, groups: frozenset[int] | None, pairs: PairTable) -> list[Term]:
    terms = []
    for force in sorted((f for f in system.getForces() if _counts(f, groups)), key=_registration_order):
        if type(force) in _PAIRWISE:
            terms.append(_PAIRWISE[type(force)](force, pairs))
        elif not _is_empty(force):
            terms.append(_BONDED[type(force)](force, system.getNumParticles()))
    return terms


def _is_empty(force: Any) -> bool:
    """Whether a bonded or external force holds no groups of atoms at all."""
    counters = ("getNumBonds", "getNumAngles", "getNumTorsions", "getNumParticles")
    return next(getattr(force, name)() for name in counters if hasattr(force, name)) == 0


def _registration_order(force: openmm.Force) -> int:
    """Forces with exclusions register their pairs before those that look at all pairs; see `PairTable`."""
    return list(_PAIRWISE).index(type(force)) if type(force) in _PAIRWISE else -1
