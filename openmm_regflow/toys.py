"""Analytic toys: Systems in external wells whose distribution and free energies are known exactly."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
import torch

from openmm_regflow.errors import InputError
from openmm_regflow.units import temperature_kelvin, thermal_energy, to_float


@dataclass(frozen=True)
class AnalyticSystem:
    """Independent coordinates in external wells: an ``openmm.System`` whose distribution is known exactly.

    Every coordinate sits in a harmonic well, except that of atom 0 along x where ``barrier`` is positive: there
    ``U(x) = barrier (s^2 - 1)^2 + skew s`` with ``s = (x - centre_x) / width``.

    Attributes:
        system: the ``openmm.System`` (``CustomExternalForce`` terms, carbon masses).
        spring: harmonic constant [kJ/mol/nm^2] of the harmonic coordinates.
        centre: minimum of the harmonic wells [nm], `(n_atoms, 3)`.
        temperature: [K] of ``sample`` and, by default, of the free energies.
        barrier: [kJ/mol]; 0 for a plain harmonic well.
        skew: [kJ/mol], lifts the right well and lowers the left one by about this much.
        width: half the distance between the two wells [nm].
    """

    system: openmm.System
    spring: float
    centre: np.ndarray
    temperature: float
    barrier: float = 0.0
    skew: float = 0.0
    width: float = 1.0

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return len(self.centre)

    @property
    def _n_harmonic(self) -> int:
        return 3 * self.n_atoms - (self.barrier > 0)

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """Potential energy [kJ/mol], `(n,)`, of positions `(n, n_atoms, 3)` [nm]; differentiable."""
        displacement = x - torch.as_tensor(self.centre, dtype=x.dtype, device=x.device)
        harmonic = 0.5 * self.spring * displacement.square()
        if not self.barrier:
            return harmonic.sum(dim=(1, 2))
        s = displacement[:, 0, 0] / self.width
        well = self.barrier * (s.square() - 1.0).square() + self.skew * s
        return harmonic.sum(dim=(1, 2)) - harmonic[:, 0, 0] + well

    def log_z(self, temperature: Any = None) -> float:
        """Log of the configurational integral over all coordinates [nm]; the reduced free energy is minus this.

        Args:
            temperature: [K or Quantity]; None for the system's own.
        """
        kt = thermal_energy(self.temperature if temperature is None else temperature)
        harmonic = 0.5 * self._n_harmonic * math.log(2.0 * math.pi * kt / self.spring)
        return harmonic + (math.log(sum(self._well_integrals(kt))) if self.barrier else 0.0)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Exact log-density [1/nm^(3 n_atoms)], `(n,)`, at the system's temperature."""
        return -self.energy(x) / thermal_energy(self.temperature) - self.log_z()

    def delta_f(self, temperature: Any = None) -> float:
        """Free energy of the right well (x > centre) above the left one [kT], exact by quadrature.

        Raises:
            InputError: the system has a single well.
        """
        if not self.barrier:
            raise InputError("a harmonic well has no second basin; use skewed_double_well")
        left, right = self._well_integrals(thermal_energy(self.temperature if temperature is None else temperature))
        return math.log(left / right)

    def _well_integrals(self, kt: float) -> tuple[float, float]:
        """Integrals of exp(-U/kT) over x [nm] left and right of the barrier."""
        grid, density = self._well_density(kt)
        middle = len(grid) // 2
        return (
            float(np.trapezoid(density[: middle + 1], grid[: middle + 1])),
            float(np.trapezoid(density[middle:], grid[middle:])),
        )

    def _well_density(self, kt: float, n: int = 100_001) -> tuple[np.ndarray, np.ndarray]:
        """Grid in x - centre [nm] out to 60 kT above the barrier, and exp(-U/kT) on it."""
        top = (self.barrier + self.skew + 60.0 * kt) / self.barrier
        reach = math.sqrt(1.0 + math.sqrt(top) + self.skew / self.barrier)
        s = np.linspace(-reach, reach, n)
        return s * self.width, np.exp(-(self.barrier * (s**2 - 1.0) ** 2 + self.skew * s) / kt)

    def sample(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Independent, exact samples [nm], float64 `(n, n_atoms, 3)`.

        The double well is drawn by inverting its cumulative distribution, tabulated on 1e5 points.
        """
        kt = thermal_energy(self.temperature)
        noise = torch.randn(n, self.n_atoms, 3, dtype=torch.float64, generator=generator)
        x = math.sqrt(kt / self.spring) * noise
        if self.barrier:
            grid, density = self._well_density(kt)
            cumulative = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
            uniform = torch.rand(n, dtype=torch.float64, generator=generator).numpy()
            x[:, 0, 0] = torch.as_tensor(np.interp(uniform * cumulative[-1], cumulative, grid))
        return x + torch.as_tensor(self.centre)


def harmonic_well(
    n_atoms: int = 1, spring: float = 1000.0, centre: np.ndarray | None = None, temperature: Any = 300.0
) -> AnalyticSystem:
    """Independent atoms in isotropic harmonic wells, ``U = spring/2 |x - centre|^2``.

    Args:
        n_atoms: number of atoms.
        spring: [kJ/mol/nm^2].
        centre: minima [nm], `(n_atoms, 3)`; zeros by default.
        temperature: [K or Quantity].

    Raises:
        InputError: a size, constant or temperature that is not positive.
    """
    return _analytic(n_atoms, spring, centre, temperature)


def skewed_double_well(
    n_atoms: int = 1,
    barrier: float = 10.0,
    skew: float = 2.0,
    width: float = 0.1,
    spring: float = 1000.0,
    temperature: Any = 300.0,
) -> AnalyticSystem:
    """A skewed double well for x of atom 0, harmonic wells for all other coordinates.

    Args:
        n_atoms: number of atoms.
        barrier: height above the wells without the skew [kJ/mol].
        skew: [kJ/mol], at least 0 and below the barrier; the left well is the deeper one.
        width: half the distance between the wells [nm].
        spring: of the harmonic coordinates [kJ/mol/nm^2].
        temperature: [K or Quantity].

    Raises:
        InputError: a value out of range.
    """
    barrier, skew, width = to_float(barrier, "energy"), to_float(skew, "energy"), to_float(width, "length")
    if barrier <= 0 or width <= 0 or not 0 <= skew < barrier:
        raise InputError(f"barrier {barrier}, width {width}, skew {skew}: barrier, width > 0 and 0 <= skew < barrier")
    return _analytic(n_atoms, spring, None, temperature, barrier=barrier, skew=skew, width=width)


def _analytic(
    n_atoms: int, spring: float, centre: np.ndarray | None, temperature: Any, **well: float
) -> AnalyticSystem:
    """Checks the shared arguments and builds the ``openmm.System``."""
    if n_atoms < 1 or spring <= 0:
        raise InputError(f"n_atoms {n_atoms} and spring {spring} must be positive")
    centre = np.zeros((n_atoms, 3)) if centre is None else np.asarray(centre, dtype=np.float64)
    if centre.shape != (n_atoms, 3):
        raise InputError(f"centre has shape {centre.shape}; ({n_atoms}, 3) in nm is needed")
    system = openmm.System()
    for _ in range(n_atoms):
        system.addParticle(12.0)
    for axis, name in enumerate("xyz"):
        force = openmm.CustomExternalForce(f"0.5*k*({name}-c)^2")
        force.addGlobalParameter("k", spring)
        force.addPerParticleParameter("c")
        for atom in range(1 if well and axis == 0 else 0, n_atoms):
            force.addParticle(atom, [centre[atom, axis]])
        system.addForce(force)
    if well:
        force = openmm.CustomExternalForce("barrier*(s^2-1)^2+skew*s; s=x/width")
        for name, value in well.items():
            force.addGlobalParameter(name, value)
        force.addParticle(0, [])
        system.addForce(force)
    return AnalyticSystem(system, spring, centre, temperature_kelvin(temperature), **well)
