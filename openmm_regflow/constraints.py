"""Bonds of constrained length: which there are, the metric term of their ensemble, velocities along them.

What constrained dynamics sample. Let ``sigma_k(x) = |r_i - r_j| - d_k = 0`` be the constraints and

    ``Z_kl(x) = sum_a (1/m_a) grad_a sigma_k . grad_a sigma_l``

The canonical distribution of a constrained system has its momenta in the tangent space of the constraint surface, with
kinetic energy ``p^T G(q)^-1 p / 2`` in any coordinates q on it, where ``G_ij = sum_a m_a (d r_a/d q_i).(d r_a/d q_j)``.
Integrating them out leaves ``sqrt(det G) exp(-u) dq``: the surface's own volume in mass-weighted coordinates. By the
coarea formula that volume is ``sqrt(det Z) prod_k delta(sigma_k) dx``, since Z is the Gram matrix of the constraint
gradients in mass-weighted coordinates. So constrained dynamics sample

    ``sqrt(det Z(x)) exp(-u(x)) prod_k delta(sigma_k(x)) dx``

(Fixman, PNAS 71, 3050 (1974); Ciccotti and Ryckaert, Comput. Phys. Rep. 4, 345 (1986); Sprik and Ciccotti, J. Chem.
Phys. 109, 7737 (1998), eq. 9). With the bonds among the internal coordinates, ``delta(sigma) dx`` is the usual volume
element ``prod b^2 sin(theta)`` on the remaining ones at the fixed lengths: this is what a flow on them has its density
in, and ``log_metric`` below is all that is added. For bonds ``Z_kk = 1/m_i + 1/m_j``; two bonds that share atom a have
``Z_kl = cos(angle between them) / m_a``; all others 0. For a chain of three equal atoms with both bonds fixed the bend
is distributed as ``sin(theta) sqrt(1 - cos(theta)^2 / 4)``, the textbook result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor


def fixed_bonds(system: openmm.System) -> list[tuple[int, int, float]]:
    """Constraints of a System as ``(i, j, length [nm])``, for ``flows.coordinates_for(..., fixed=...)``."""
    found = []
    for k in range(system.getNumConstraints()):
        i, j, length = system.getConstraintParameters(k)
        found.append((int(i), int(j), float(length.value_in_unit(unit.nanometer))))
    return found


@dataclass(frozen=True)
class Constraints:
    """Distance constraints among some atoms, with these atoms' masses.

    Attributes:
        bonds: ``(i, j, length [nm])``, in the numbering of these atoms.
        masses: [dalton], one for each of these atoms.
    """

    bonds: tuple[tuple[int, int, float], ...]
    masses: tuple[float, ...]

    @classmethod
    def of(cls, system: openmm.System, atoms: Sequence[int] | None = None) -> "Constraints":
        """Constraints of a System between some of its atoms (default: all), numbered as in ``atoms``."""
        atoms = range(system.getNumParticles()) if atoms is None else atoms
        place = {atom: k for k, atom in enumerate(atoms)}
        bonds = ((place[i], place[j], d) for i, j, d in fixed_bonds(system) if i in place and j in place)
        masses = (system.getParticleMass(i).value_in_unit(unit.dalton) for i in atoms)
        return cls(tuple(bonds), tuple(masses))

    def __len__(self) -> int:
        return len(self.bonds)

    @cached_property
    def _inverse_masses(self) -> Tensor:
        masses = torch.tensor(self.masses, dtype=torch.float64)
        return torch.where(masses > 0, 1.0 / masses.clamp_min(1e-300), 0.0)

    @cached_property
    def _clusters(self) -> list[Tensor]:
        """Constraints that hang together through shared atoms: index tensors `(n_clusters, size)` by size."""
        cluster = list(range(len(self.bonds)))
        owner: dict[int, int] = {}
        for k, (i, j, _) in enumerate(self.bonds):
            for atom in (i, j):
                other = cluster[owner.setdefault(atom, k)]
                cluster = [cluster[k] if c == other else c for c in cluster]
        members: dict[int, list[int]] = {}
        for k, c in enumerate(cluster):
            members.setdefault(c, []).append(k)
        sizes = sorted({len(m) for m in members.values()})
        return [torch.tensor([m for m in members.values() if len(m) == size]) for size in sizes]

    def matrix(self, x: Tensor, members: Tensor) -> Tensor:
        """Z of clusters of constraints.

        Args:
            x: `(n, n_atoms, 3)` [nm].
            members: indices of constraints `(c, s)`.

        Returns:
            `(n, c, s, s)` [1/dalton].
        """
        ends = torch.tensor([b[:2] for b in self.bonds], device=x.device)[members]  # (c, s, 2)
        along = torch.nn.functional.normalize(x[:, ends[..., 0]] - x[:, ends[..., 1]], dim=-1)
        # Gradient of a length: +e at its first atom, -e at its second.
        sign = torch.tensor([1.0, -1.0], dtype=x.dtype, device=x.device)
        same = ends[:, :, None, :, None] == ends[:, None, :, None, :]  # (c, s, s, 2, 2)
        inverse = self._inverse_masses.to(x)[ends][:, :, None, :, None]
        coupling = (same * inverse * sign[:, None] * sign).sum((-1, -2))
        return coupling * (along @ along.transpose(-1, -2))

    def log_metric(self, x: Tensor) -> Tensor:
        """``log sqrt(det Z)`` `(n,)` of positions `(n, n_atoms, 3)` [nm]; Z in 1/dalton. Zero without constraints."""
        total = x.new_zeros(len(x))
        for members in self._clusters:
            total = total + 0.5 * torch.linalg.slogdet(self.matrix(x, members))[1].sum(1)
        return total

    def project(self, velocities: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Velocities without their components along the constraints.

        ``v - M^-1 J^T Z^-1 J v`` with J the gradients of the lengths is the projection orthogonal in the mass metric,
        which turns a Maxwell-Boltzmann draw of free atoms into one of the constrained system.

        Args:
            velocities: `(n_atoms, 3)` [nm/ps].
            x: `(n_atoms, 3)` [nm].
        """
        v = np.array(velocities)
        position = torch.as_tensor(np.asarray(x))[None]
        inverse = self._inverse_masses.numpy()
        for members in self._clusters:
            z = self.matrix(position, members)[0].numpy()
            for group, block in zip(members.numpy(), z):
                ends = np.array([self.bonds[k][:2] for k in group])
                along = x[ends[:, 0]] - x[ends[:, 1]]
                along = along / np.linalg.norm(along, axis=1, keepdims=True)
                speed = (along * (v[ends[:, 0]] - v[ends[:, 1]])).sum(1)
                push = np.linalg.solve(block, speed)[:, None] * along
                np.subtract.at(v, ends[:, 0], inverse[ends[:, 0], None] * push)
                np.add.at(v, ends[:, 1], inverse[ends[:, 1], None] * push)
        return v
