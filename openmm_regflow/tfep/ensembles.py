"""The thermodynamic state of an OpenMM System: its potential and, with constraints, their metric term."""

from typing import Any

import openmm
import torch
from torch import Tensor

from openmm_regflow.constraints import Constraints
from openmm_regflow.errors import InputError, UnsupportedForceError
from openmm_regflow.potentials import OpenMMPotential, Potential, TorchPotential, cpu_platform
from openmm_regflow.refusals import barostats_of
from openmm_regflow.tfep.pipeline import Basin, State
from openmm_regflow.units import thermal_energy

#: Relative deviation from a constrained length that dynamics (1e-5 by default) and float32 frames stay below.
ON_SURFACE = 1e-3


def potential_of(system: openmm.System, device: torch.device | str = "cpu") -> Potential:
    """The batched torch potential on a device, or OpenMM's own where a force has no torch form.

    On the CPU no GPU platform of OpenMM is tried either.
    """
    try:
        return TorchPotential(system, device=device)
    except UnsupportedForceError:
        return OpenMMPotential(system, cpu_platform(system) if torch.device(device).type == "cpu" else None)


class ConstrainedEnergy:
    """``U(x) - kT log sqrt(det Z(x))`` [kJ/mol]: minus kT times the log-density of constrained dynamics.

    The density is on the constraint surface, in the internal coordinates that are left with their usual volume element
    (:mod:`openmm_regflow.constraints`; Sprik & Ciccotti 1998, equation 9). A map has to keep the constrained lengths:
    fit it in ``coordinates_for(..., fixed=fixed_bonds(system))``.

    Args:
        system: with constraints.
        temperature: [K].
        potential: of the same System.
    """

    def __init__(self, system: openmm.System, temperature: Any, potential: Potential) -> None:
        self.potential, self.metric, self.kt = potential, Constraints.of(system), thermal_energy(temperature)

    @property
    def fixed_bonds(self) -> tuple[tuple[int, int, float], ...]:
        """Constraints ``(i, j, length [nm])``."""
        return self.metric.bonds

    def __call__(self, x: Any) -> Tensor:
        """Energies `(n,)` of positions `(n, n_atoms, 3)` [nm].

        Raises:
            InputError: positions off the constraint surface.
        """
        positions = torch.as_tensor(x)
        self._check(positions)
        u = torch.as_tensor(self.potential(positions))
        return u - self.kt * self.metric.log_metric(positions).to(u)

    def _check(self, x: Tensor) -> None:
        first, second = (torch.tensor([bond[k] for bond in self.fixed_bonds], device=x.device) for k in (0, 1))
        length = torch.tensor([bond[2] for bond in self.fixed_bonds], device=x.device)
        off = ((x[:, first] - x[:, second]).norm(dim=-1) / length - 1.0).abs()
        worst = float(off.detach().nan_to_num(0.0).max()) if len(x) else 0.0
        if worst > ON_SURFACE:
            raise InputError(
                f"a constrained bond is off its length by {worst:.1%}; samples must come from constrained dynamics, "
                "and maps be fitted in coordinates_for(..., fixed=constraints.fixed_bonds(system))"
            )


def state_of(
    system: openmm.System, temperature: Any, basin: Basin | None = None, device: torch.device | str = "cpu"
) -> State:
    """The state that dynamics of a System sample at one temperature.

    Args:
        system: non-periodic where a map is learned.
        temperature: [K or Quantity].
        basin: indicator, or None for the whole space.
        device: of the energies.

    Returns:
        A :class:`State`; its potential carries the metric term of the constraints, if there are any.

    Raises:
        InputError: a System with a barostat: changing volumes are not covered.
    """
    barostats = barostats_of(system)
    if barostats:
        raise InputError(
            f"the System has a {barostats[0]}, and changing volumes are not covered; sample at constant volume and "
            "remove it"
        )
    potential = potential_of(system, device)
    if not system.getNumConstraints():
        return State(potential, temperature, basin)
    return State(ConstrainedEnergy(system, temperature, potential), temperature, basin)
