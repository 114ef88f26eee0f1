"""Batched potential energies and forces of OpenMM Systems.

`TorchPotential` turns a System into one differentiable torch function; `OpenMMPotential` evaluates any System
on any platform, optionally over several processes. Both take positions ``(n, n_atoms, 3)`` [nm] and return
energies ``(n,)`` [kJ/mol].
"""

from openmm_regflow.potentials.base import Potential
from openmm_regflow.potentials.openmm_potential import (
    OpenMMPotential,
    cpu_platform,
    parameters_of,
    platform_names,
    small_platform,
)
from openmm_regflow.potentials.torch_potential import TorchPotential

__all__ = [
    "OpenMMPotential",
    "Potential",
    "TorchPotential",
    "cpu_platform",
    "parameters_of",
    "platform_names",
    "small_platform",
]
