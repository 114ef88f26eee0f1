"""GBSAOBCForce: the generalised Born model of Onufriev, Bashford and Case with a surface-area term.

Onufriev, Bashford, Case, Proteins 55, 383 (2004), model II; Born radii by pairwise descreening after Hawkins,
Cramer, Truhlar, Chem. Phys. Lett. 246, 122 (1995); surface term after Schaefer, Bartels, Karplus, J. Mol. Biol.
284, 835 (1998), eq. 5, as in OpenMM.
"""

from collections.abc import Mapping

import numpy as np
import openmm
import torch
from torch import Tensor

from openmm_regflow.potentials.base import Geometry, Incidence, PairTable, Term, column, refuse
from openmm_regflow.potentials.bonded import md
from openmm_regflow.potentials.nonbonded import COULOMB, all_pairs, directed_rows

_OFFSET = 0.009  # dielectric offset [nm]
_PROBE = 0.14  # probe radius of the surface term [nm]
_ALPHA, _BETA, _GAMMA = 1.0, 0.8, 4.85  # OBC model II


class GBSAOBCTerm(Term):
    """GBSAOBCForce, NoCutoff or CutoffNonPeriodic."""

    def __init__(self, force: openmm.GBSAOBCForce, pairs: PairTable) -> None:
        super().__init__(force)
        if force.getNonbondedMethod() > 1:
            raise refuse(force, "the periodic nonbonded method CutoffPeriodic")
        self._cutoff = md(force.getCutoffDistance()) if force.getNonbondedMethod() == 1 else None
        self._n_atoms = force.getNumParticles()
        pairs.rows(all_pairs(self._n_atoms))

    def finalise(self, pairs: PairTable) -> None:
        """Index the atoms of each pair and the pair of each (atom, other atom).

        Every pair was registered, so the rows of this term are the table's own, in its order.
        """
        self._atoms = pairs.pairs()
        self._first, self._second = (Incidence(atoms, self._n_atoms) for atoms in self._atoms.T)
        self._directed = Incidence(directed_rows(self._atoms, self._n_atoms)[1], len(pairs))

    def constants(self, parameters: Mapping[str, float]) -> dict[str, Tensor]:
        """Radii per atom and per directed pair, and products of charges per pair."""
        force, n = self.force, self._n_atoms
        rows = np.array([[md(v) for v in force.getParticleParameters(i)] for i in range(n)]).reshape(-1, 3)
        charge, radius, scale = rows.T
        factor = COULOMB * (1.0 / force.getSoluteDielectric() - 1.0 / force.getSolventDielectric())
        inner = radius - _OFFSET
        first, second = self._atoms.T
        other = directed_rows(self._atoms, n)[0]
        return {
            "inner": column(inner),
            "inverse_radius": column(1.0 / radius),
            "inner_of_atom": column(np.repeat(inner, n - 1)),
            "scaled_other": column((inner * scale)[other]),
            "self_energy": column(-0.5 * factor * charge**2),
            "pair_energy": column(-factor * charge[first] * charge[second]),
            "surface": column(4 * np.pi * md(force.getSurfaceAreaEnergy()) * (radius + _PROBE) ** 2 * radius**6),
        }

    def energy(self, geometry: Geometry, constants: Mapping[str, Tensor]) -> Tensor:
        """Energies `(n_blocks, lanes)` [kJ/mol]."""
        inverse_born = self._inverse_born_radii(geometry, constants)
        single = inverse_born * constants["self_energy"] + inverse_born**6 * constants["surface"]
        if len(self._atoms) == 0:
            return single.sum(-2)
        product = self._first(inverse_born) * self._second(inverse_born)
        r2 = geometry.r2
        # 1 / f with f^2 = r^2 + B_i B_j exp(-r^2 / 4 B_i B_j)
        inverse_f = torch.rsqrt(r2 + torch.exp(-0.25 * r2 * product) / product)
        pair = constants["pair_energy"] * inverse_f
        if self._cutoff is not None:
            shifted = constants["pair_energy"] * (inverse_f - 1.0 / self._cutoff)
            pair = torch.where(r2 <= self._cutoff**2, shifted, torch.zeros_like(pair))
        return single.sum(-2) + pair.sum(-2)

    def _inverse_born_radii(self, geometry: Geometry, constants: Mapping[str, Tensor]) -> Tensor:
        """Inverse Born radii `(n_blocks, n_atoms, lanes)` [1/nm]."""
        inner = constants["inner"]
        if len(self._atoms) == 0:
            return torch.zeros_like(geometry.x[0]) + 1.0 / inner
        r, inv_r = self._directed(geometry.r), self._directed(geometry.inv_r)
        screening = _descreening(r, inv_r, constants["inner_of_atom"], constants["scaled_other"])
        if self._cutoff is not None:
            screening = torch.where(r <= self._cutoff, screening, torch.zeros_like(screening))
        integral = screening.unflatten(-2, (self._n_atoms, -1)).sum(-2)
        psi = 0.5 * inner * integral
        rescaled = torch.tanh(psi * (_ALPHA - psi * (_BETA - psi * _GAMMA)))
        return 1.0 / inner - rescaled * constants["inverse_radius"]


def _descreening(r: Tensor, inv_r: Tensor, inner: Tensor, scaled: Tensor) -> Tensor:
    """Twice the integral of 1/r^4 over the part of the scaled sphere ``scaled`` that lies outside ``inner`` [1/nm].

    Hawkins, Cramer, Truhlar (1995), eqs. 5-9, with the case of an atom engulfed by its neighbour.
    """
    upper, gap = r + scaled, r - scaled
    inverse_lower = 1.0 / torch.maximum(inner, gap.abs())
    inverse_upper = 1.0 / upper
    slab = (inverse_lower - inverse_upper) * (
        1.0 - 0.25 * (r - scaled * scaled * inv_r) * (inverse_lower + inverse_upper)
    )
    value = slab + 0.5 * inv_r * torch.log(inverse_upper / inverse_lower)
    engulfed = torch.where(inner < -gap, 2.0 * (1.0 / inner - inverse_lower), torch.zeros_like(value))
    return torch.where(inner < upper, value + engulfed, torch.zeros_like(value))
