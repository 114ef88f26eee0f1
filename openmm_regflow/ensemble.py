"""What training asks of a molecule's Boltzmann ensemble: its reduced potential, a kernel that moves frames, a watch."""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from openmm_regflow import metrics
from openmm_regflow.constraints import Constraints
from openmm_regflow.errors import InputError
from openmm_regflow.frames import Mover
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.refusals import check_particles
from openmm_regflow.rigid import N_TRIED, SHIFTS, WAYS
from openmm_regflow.sampling import HamiltonianMonteCarlo, system_masses
from openmm_regflow.sampling.hamiltonian import HYDROGEN_MASS
from openmm_regflow.simulate.tempering import placement_in, reference_energies, with_hydrogen_mass
from openmm_regflow.systems import MolecularSystem
from openmm_regflow.units import thermal_energy

#: [kT] A molecule is held where its energy rises by this much, thirty nanometres away in every direction.
HOLDS = 10.0
#: Frames that a kernel's time step is tuned on.
TUNED_ON = 200
#: A half circle of a phi with at most this share of the ensemble is rare.
RARE = 0.25


class ReducedPotential:
    """Batched reduced potential [kT] of a molecule at its own temperature, for refinement.

    With constraints it holds the metric term of their ensemble, so that ``-u - flow.log_prob`` is the log-weight.

    Args:
        molecule: System and temperature.
        device: of the energies.
        compile: through ``torch.compile`` in float32 (energies to about 1e-4 kT), else eager in float64.
    """

    def __init__(self, molecule: MolecularSystem, device: torch.device | str = "cpu", compile: bool = False) -> None:
        self._potential = _potential(molecule, device, compile)
        self._kt, self._constraints = thermal_energy(molecule.temperature), Constraints.of(molecule.system)

    def __call__(self, x: Tensor) -> Tensor:
        """Positions `(n, n_atoms, 3)` [nm] -> `(n,)` [kT], +inf where impossible."""
        energy = self._potential(x.to(self._potential.dtype))
        return energy.double() / self._kt - self._constraints.log_metric(x.double())

    def with_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Positions `(n, n_atoms, 3)` [nm] -> `(n,)` [kT], and its gradient `(n, n_atoms, 3)` [kT/nm]."""
        energy, force = self._potential.energy_and_forces(x.to(self._potential.dtype))
        u, gradient = energy.double() / self._kt, -force.double() / self._kt
        if len(self._constraints):
            with torch.enable_grad():
                x = x.detach().double().requires_grad_()
                metric = self._constraints.log_metric(x)
                (slope,) = torch.autograd.grad(metric.sum(), x)
            u, gradient = u - metric.detach(), gradient - slope
        return u, gradient


def check_trainable(molecule: MolecularSystem) -> None:
    """Refuse, before anything is trained, what no flow can be of; warn of what its proposals will not cover.

    Raises:
        UnsupportedForceError: virtual sites, or particles without mass.
    """
    check_particles(molecule.system)
    if molecule.system.usesPeriodicBoundaryConditions():
        warnings.warn(
            "the System is periodic: a flow of it can move a part of a box (SubsetProposal), but not a whole "
            "System; for that build it with nonbondedMethod=NoCutoff or CutoffNonPeriodic",
            stacklevel=2,
        )


def is_held(molecule: MolecularSystem, frames: np.ndarray | Tensor) -> bool:
    """Whether forces hold a molecule in its place, so that a flow has to learn place and orientation.

    In a periodic box a flow serves as a part, whose frame is that of its surroundings: False.

    Args:
        molecule: its System and temperature.
        frames: of its ensemble `(n, n_atoms, 3)` [nm]; some are looked at.

    Raises:
        InputError: no frame has a finite energy, or the place has no distribution: a field turns or pushes the molecule
            and nothing holds it from every side.
    """
    system = molecule.system
    if system.usesPeriodicBoundaryConditions():
        return False
    rows = np.linspace(0, len(frames) - 1, min(N_TRIED, len(frames))).astype(int)
    x = torch.as_tensor(frames)[rows].cpu().double()
    found = placement_in(system, x.numpy())
    if found is None:
        raise InputError("none of the frames has a finite energy; give frames of this System, in nm")
    if not found.counts:
        return False
    energies = reference_energies(system)
    here = energies(x)
    rise = torch.stack([energies(x + max(SHIFTS) * way) - here for way in WAYS])[:, torch.isfinite(here)]
    if not found.place or not bool((rise > HOLDS * thermal_energy(molecule.temperature)).all()):
        raise InputError(
            "a field turns or pushes the molecule, and nothing holds it from every side, so that its place has no "
            "distribution; restrain its centre, or remove the field"
        )
    return True


def frame_mover(
    molecule: MolecularSystem, frames: Tensor, device: torch.device | str = "cpu", compile: bool = False
) -> Mover:
    """Hamiltonian Monte Carlo of a molecule at its own temperature.

    Its time step is tuned on the given frames before the first move, in every process alike: a run that is interrupted
    goes on with the same moves, at the price of tuning once more.

    Args:
        molecule: System and temperature.
        frames: of the ensemble `(n, n_atoms, 3)` [nm]; the first two hundred are looked at.
        device: of the energies.
        compile: through ``torch.compile``, in float32.

    Raises:
        InputError: a System with constraints.
    """
    masses = system_masses(with_hydrogen_mass(molecule.system, HYDROGEN_MASS))
    kernel = HamiltonianMonteCarlo(_potential(molecule, device, compile), molecule.temperature, masses)

    def move(x: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
        before = kernel.n_energies
        if not before:
            kernel.tune(frames[:TUNED_ON].to(device), torch.Generator().manual_seed(0))
        moved = torch.cat([kernel(part, generator) for part in x.split(4096)])
        return moved, kernel.n_energies - before

    return move


def rare_phi(molecule: MolecularSystem, frames: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """Indicators of the rare half circle of every phi that has one, for positions `(n, n_atoms, 3)` [nm].

    phi > 0 of an L residue, phi < 0 of a D one; none of a glycine, which is at home in both.

    Args:
        molecule: its phi torsions.
        frames: of the ensemble `(n, n_atoms, 3)` [nm], which say what is rare: at most `RARE` of them.
    """

    def indicator(quadruple: np.ndarray, sign: int) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.as_tensor(sign * metrics.dihedrals(x.cpu().numpy(), quadruple)[:, 0] > 0)

    rows = [row[None] for row in molecule.torsions("phi")]
    positive = [float((metrics.dihedrals(frames.cpu().numpy(), row) > 0).mean()) for row in rows]
    return [indicator(row, 1 if p <= 0.5 else -1) for row, p in zip(rows, positive) if min(p, 1 - p) <= RARE]


def _potential(molecule: MolecularSystem, device: torch.device | str, compile: bool) -> TorchPotential:
    dtype = torch.float32 if compile else torch.float64
    return TorchPotential(molecule.system, dtype=dtype, device=device, compile=compile)
