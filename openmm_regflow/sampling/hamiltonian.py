"""Hamiltonian (hybrid) Monte Carlo of many chains at once on a batched potential.

Duane et al., Phys. Lett. B 195, 216 (1987): fresh momenta, a leapfrog trajectory, one Metropolis decision. It leaves
``exp(-u)`` invariant whatever the time step and the masses are; both decide the acceptance alone.
"""

from typing import Any

import torch
from torch import Tensor

from openmm_regflow.errors import InputError
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.units import temperature_kelvin, thermal_energy

#: Hydrogens of this mass [dalton] allow larger steps.
HYDROGEN_MASS = 4.0
#: Acceptance that `HamiltonianMonteCarlo.tune` aims at, above the optimum of very many dimensions (0.65; Beskos et al.,
#: Bernoulli 19, 1501 (2013)).
ACCEPTANCE = 0.8


def varied(step: float, generator: torch.Generator | None, device: torch.device | str = "cpu") -> float:
    """A leapfrog step within a fifth of the given one, the same for all chains.

    Trajectories of one length come back to where they began in some modes.
    """
    return step * (0.8 + 0.4 * float(torch.rand((), generator=generator, device=device)))


def correction(acceptance: float, trial: int) -> float:
    """Factor on a step whose acceptance should be `ACCEPTANCE`; it changes less from trial to trial."""
    return 2.0 ** (max(-1.0, 3.0 * (acceptance - ACCEPTANCE)) / (1 + trial / 4))


class HamiltonianMonteCarlo:
    """A local kernel for chains `(n, n_atoms, 3)`: one trajectory and one decision for each.

    Args:
        potential: batched energies and forces; its dtype is that of the trajectories.
        temperature: [K or Quantity].
        masses: `(n_atoms,)` [dalton], of the fictitious dynamics.
        timestep: of the leapfrog [ps]; see :meth:`tune`.
        n_steps: leapfrog steps of a trajectory.

    Attributes:
        timestep: [ps].
        n_energies: energies (with forces) evaluated so far.
        acceptance: fraction accepted by the last call.

    Raises:
        InputError: constraints, or a mass, time step or number of steps that is not positive.
    """

    def __init__(
        self,
        potential: TorchPotential,
        temperature: Any,
        masses: Any,
        timestep: float = 0.002,
        n_steps: int = 20,
    ) -> None:
        mass = torch.as_tensor(masses, dtype=potential.dtype, device=potential.device).reshape(-1, 1)
        if potential.constraints:
            raise InputError(
                f"the System has {potential.constraints} constraints, which these trajectories do not keep; make it "
                "with constraints=None"
            )
        if not bool((mass > 0).all()) or timestep <= 0 or n_steps < 1:
            raise InputError(f"masses, timestep ({timestep} ps) and n_steps ({n_steps}) must all be positive")
        self.potential, self.mass = potential, mass
        self.kt = thermal_energy(temperature_kelvin(temperature))
        self.timestep, self.n_steps = timestep, n_steps
        self.n_energies, self.acceptance = 0, 0.0

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The next state of every chain, in the dtype of `x` [nm]."""
        start = x.to(self.mass)
        there = generator.device
        dt = varied(self.timestep, generator, there)
        noise = torch.randn(start.shape, generator=generator, dtype=start.dtype, device=there).to(start.device)
        v = (self.kt / self.mass).sqrt() * noise
        u, force = self.potential.energy_and_forces(start)
        before = self._total(u, v)
        end = start
        for _ in range(self.n_steps):
            v = v + 0.5 * dt * force / self.mass
            end = end + dt * v
            u, force = self.potential.energy_and_forces(end)
            v = v + 0.5 * dt * force / self.mass
        self.n_energies += len(x) * (self.n_steps + 1)
        log_alpha = (before - self._total(u, v)) / self.kt
        threshold = torch.rand(len(x), generator=generator, dtype=torch.float64, device=there).to(start.device).log()
        accepted = threshold < log_alpha  # False where the end is not a number
        self.acceptance = float(accepted.double().mean())
        return torch.where(accepted[:, None, None], end.to(x), x)

    def tune(self, x: Tensor, generator: torch.Generator, n_trials: int = 12) -> float:
        """Set the time step for the acceptance to be about `ACCEPTANCE` on chains at `x`, which stay where they are.

        Tuning looks at the chains, so it comes before sampling, never during it.

        Returns:
            the time step [ps].
        """
        for trial in range(n_trials):
            self(x, generator)
            self.timestep *= correction(self.acceptance, trial)
        return self.timestep

    def _total(self, u: Tensor, v: Tensor) -> Tensor:
        """Total energies `(n,)` [kJ/mol] in float64."""
        return u.double() + 0.5 * (self.mass * v * v).double().sum((1, 2))
