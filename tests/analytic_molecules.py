"""Molecules whose Boltzmann distribution is known exactly, an exact sampler for them, and a Gaussian flow."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import openmm
import torch
from openmm import app, unit
from torch import nn

from openmm_regflow.rigid import random_rotations
from openmm_regflow.units import GAS_CONSTANT

TEMPERATURE = 300.0
KT = GAS_CONSTANT * TEMPERATURE
#: (k [kJ/mol], periodicity, phase): three wells of unequal depth and width, so a skewed, multimodal torsion.
TORSION = ((2.5, 1, 0.9), (3.0, 2, 2.2), (2.0, 3, -0.4))
BOND_LENGTH, ANGLE = 0.15, 1.9
MASSES = (12.0, 16.0, 2.0, 30.0)


class Chain:
    """A chain of three or four atoms with soft bonds and angles and, for four, a torsion; all independent.

    Bonds are distributed as ``b^2 exp(-k (b - b0)^2 / 2kT)``, angles as ``sin(t) exp(...)``, the torsion as
    ``exp(-U/kT)``: one-dimensional integrals give every expectation.
    """

    def __init__(self, n_atoms=4, temperature=TEMPERATURE, bond_width=0.025, angle_width=0.25):
        self.n_atoms, self.temperature = n_atoms, temperature
        kT = self.kT = GAS_CONSTANT * temperature
        bond_k, angle_k = KT / bond_width**2, KT / angle_width**2
        self.system = chain_system(n_atoms, bond_k, angle_k)
        self.topology = chain_topology(n_atoms)
        self.bond = Grid(1e-3, 0.5, lambda b: 2 * np.log(b) - bond_k * (b - BOND_LENGTH) ** 2 / 2 / kT)
        self.angle = Grid(
            1e-3, math.pi - 1e-3, lambda t: np.log(np.sin(t)) - angle_k * (t - ANGLE) ** 2 / 2 / kT
        )
        self.torsion = Grid(-math.pi, math.pi, lambda p: -torsion_energy(p) / kT)

    def sample(self, n, generator):
        """Exact configurations `(n, n_atoms, 3)` with uniform orientation and a centre spread over a nanometre."""
        b = torch.stack([self.bond.sample(n, generator) for _ in range(3)], 1)
        t = torch.stack([self.angle.sample(n, generator) for _ in range(2)], 1)
        shape = place(b, t, self.torsion.sample(n, generator))[:, : self.n_atoms]
        centre = torch.randn(n, 1, 3, generator=generator, dtype=torch.float64)
        return shape @ random_rotations(n, generator).transpose(1, 2) + centre

    def observables(self):
        """name -> (function of positions, exact expectation)."""
        found = {
            "bond 0-1": (lambda x: distance(x, 0, 1), self.bond.mean(lambda b: b)),
            "bond 1-2 squared": (lambda x: distance(x, 1, 2) ** 2, self.bond.mean(lambda b: b**2)),
            "bond 1-2 cubed": (lambda x: distance(x, 1, 2) ** 3, self.bond.mean(lambda b: b**3)),
            "angle": (lambda x: bend(x, 0, 1, 2), self.angle.mean(lambda t: t)),
            "angle squared": (lambda x: bend(x, 0, 1, 2) ** 2, self.angle.mean(lambda t: t**2)),
        }
        return found | (self._torsion_observables() if self.n_atoms == 4 else {})

    def _torsion_observables(self):
        found = {
            "cos torsion": (lambda x: dihedral(x).cos(), self.torsion.mean(np.cos)),
            "sin torsion": (lambda x: dihedral(x).sin(), self.torsion.mean(np.sin)),
            "cos 2 torsion": (lambda x: (2 * dihedral(x)).cos(), self.torsion.mean(lambda p: np.cos(2 * p))),
        }
        for k, (low, high) in enumerate(BASINS):
            found[f"basin {k}"] = (
                lambda x, low=low, high=high: ((dihedral(x) >= low) & (dihedral(x) < high)).double(),
                self.torsion.mean(lambda p, low=low, high=high: (p >= low) & (p < high)),
            )
        return found


def chain_system(n_atoms, bond_k, angle_k):
    system = openmm.System()
    bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    for i in range(n_atoms):
        system.addParticle(MASSES[i])
    for i in range(n_atoms - 1):
        bonds.addBond(i, i + 1, BOND_LENGTH, bond_k)
    for i in range(n_atoms - 2):
        angles.addAngle(i, i + 1, i + 2, ANGLE, angle_k)
    system.addForce(bonds)
    system.addForce(angles)
    if n_atoms == 4:
        torsions = openmm.PeriodicTorsionForce()
        for k, n, phase in TORSION:
            torsions.addTorsion(0, 1, 2, 3, n, phase, k)
        system.addForce(torsions)
    return system


class SolvatedChain:
    """A chain of four atoms and a loosely attached fifth, with the chain's atoms in another order.

    The fifth sits on a zero-length spring from the chain's first atom, so the chain's own distribution is that of
    :class:`Chain` and the spring's is Gaussian; but any change of the first atom's place changes the energy.
    """

    subset = (2, 0, 4, 1)
    solvent = 3
    spring = KT / 0.1**2

    def __init__(self, box=None):
        self.chain = Chain(4)
        self.system = openmm.System()
        order = {atom: place for place, atom in enumerate(self.subset)}
        for atom in range(5):
            self.system.addParticle(MASSES[order[atom]] if atom in order else 18.0)
        bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
        torsions = openmm.PeriodicTorsionForce()
        s, (bond, angle, _) = self.subset, self.chain.system.getForces()
        for k in range(3):
            bonds.addBond(s[k], s[k + 1], *bond.getBondParameters(k)[2:])
        for k in range(2):
            angles.addAngle(s[k], s[k + 1], s[k + 2], *angle.getAngleParameters(k)[3:])
        for k, n, phase in TORSION:
            torsions.addTorsion(*s, n, phase, k)
        bonds.addBond(s[0], self.solvent, 0.0, self.spring)
        for force in (bonds, angles, torsions):
            force.setUsesPeriodicBoundaryConditions(box is not None)
            self.system.addForce(force)
        if box is not None:
            self.system.setDefaultPeriodicBoxVectors(*np.asarray(box))

    def sample(self, n, generator):
        chain = self.chain.sample(n, generator)
        noise = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        x = torch.empty(n, 5, 3, dtype=torch.float64)
        x[:, list(self.subset)] = chain
        x[:, self.solvent] = chain[:, 0] + math.sqrt(KT / self.spring) * noise
        return x

    def observables(self):
        found = {
            name: (lambda x, function=function: function(x[..., list(self.subset), :]), exact)
            for name, (function, exact) in self.chain.observables().items()
        }
        found["spring"] = (lambda x: distance(x, self.solvent, self.subset[0]) ** 2, 3 * KT / self.spring)
        found["spring along bond"] = (self._along, 0.0)
        return found

    def _along(self, x):
        first, second, third = x[..., self.subset[0], :], x[..., self.subset[1], :], x[..., self.solvent, :]
        return ((third - first) * (second - first)).sum(-1)


class MethylChain:
    """22 atoms with a known distribution: a chain of 19 of unequal masses, ending in a methyl of unlike hydrogens.

    Bonds, angles and the torsions of the chain are independent. The first hydrogen's torsion has the three unequal
    wells of :class:`Chain`, so no symmetry of the rotor is left; the others keep about 120 degrees from it.
    """

    n_atoms, n_chain = 22, 19
    #: The chain's torsions have this share of the energy of the first hydrogen's.
    share = 0.2
    tie = 20.0 * KT

    def __init__(self, bond_width=0.02, angle_width=0.2):
        self.temperature, self.kT = TEMPERATURE, KT
        bond_k, angle_k = KT / bond_width**2, KT / angle_width**2
        self.topology, self.system = self._topology(), openmm.System()
        for i in range(self.n_atoms):
            self.system.addParticle(1.008 if i >= self.n_chain else (12.0, 16.0, 14.0, 30.0)[i % 4])
        self._add_forces(bond_k, angle_k)
        self.bond = Grid(1e-3, 0.5, lambda b: 2 * np.log(b) - bond_k * (b - BOND_LENGTH) ** 2 / 2 / KT)
        self.angle = Grid(1e-3, math.pi - 1e-3, lambda t: np.log(np.sin(t)) - angle_k * (t - ANGLE) ** 2 / 2 / KT)
        self.weak = Grid(-math.pi, math.pi, lambda p: -self.share * torsion_energy(p) / KT)
        self.torsion = Grid(-math.pi, math.pi, lambda p: -torsion_energy(p) / KT)
        self.apart = Grid(-math.pi, math.pi, lambda p: self.tie * np.cos(p) / KT)

    def references(self, atom):
        """Atoms that an atom's bond, angle and torsion refer to."""
        last = min(atom, self.n_chain)
        return last - 1, last - 2, last - 3

    def _topology(self):
        topology = app.Topology()
        residue = topology.addResidue("CHN", topology.addChain())
        elements = ["C"] * self.n_chain + ["H"] * 3
        atoms = [topology.addAtom(f"{e}{i}", app.Element.getBySymbol(e), residue) for i, e in enumerate(elements)]
        for i in range(1, self.n_atoms):
            topology.addBond(atoms[self.references(i)[0]], atoms[i])
        return topology

    def _add_forces(self, bond_k, angle_k):
        bonds, angles, torsions = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce(), openmm.PeriodicTorsionForce()
        tie = openmm.CustomCompoundBondForce(
            5, "-tie*cos(dihedral(p2,p3,p4,p5)-dihedral(p1,p3,p4,p5)-turn)"
        )
        for name in ("tie", "turn"):
            tie.addPerBondParameter(name)
        for i in range(1, self.n_atoms):
            c, e, f = self.references(i)
            bonds.addBond(c, i, BOND_LENGTH, bond_k)
            if i > 1:
                angles.addAngle(e, c, i, ANGLE, angle_k)
            for k, n, phase in TORSION if 2 < i <= self.n_chain else ():
                torsions.addTorsion(f, e, c, i, n, phase, k * (1.0 if i == self.n_chain else self.share))
            if i > self.n_chain:
                turn = 2 * math.pi / 3 * (1 if i == self.n_chain + 1 else -1)
                tie.addBond([self.n_chain, i, c, e, f], [self.tie, turn])
        for force in (bonds, angles, torsions, tie):
            self.system.addForce(force)

    def sample(self, n, generator):
        """Exact configurations `(n, 22, 3)`, by placing one atom after the other."""
        x = torch.zeros(n, self.n_atoms, 3, dtype=torch.float64)
        x[:, 1, 0] = self.bond.sample(n, generator)
        b, t = self.bond.sample(n, generator), self.angle.sample(n, generator)
        x[:, 2] = x[:, 1] + b[:, None] * torch.stack([-t.cos(), t.sin(), torch.zeros_like(t)], 1)
        first = self.torsion.sample(n, generator)
        for i in range(3, self.n_atoms):
            tau = first if i >= self.n_chain else self.weak.sample(n, generator)
            if i > self.n_chain:
                turn = 2 * math.pi / 3 * (1 if i == self.n_chain + 1 else -1)
                tau = first + turn + self.apart.sample(n, generator)
            c, e, f = (x[:, k] for k in self.references(i))
            x[:, i] = attach(c, e, f, self.bond.sample(n, generator), self.angle.sample(n, generator), tau)
        centre = torch.randn(n, 1, 3, generator=generator, dtype=torch.float64)
        return x @ random_rotations(n, generator).transpose(1, 2) + centre

    def observables(self):
        """name -> (function of positions, exact expectation)."""
        hydrogen = [16, 17, 18, 19]
        found = {
            "bond 4-5": (lambda x: distance(x, 4, 5), self.bond.mean(lambda b: b)),
            "bond of a hydrogen": (lambda x: distance(x, 18, 20), self.bond.mean(lambda b: b)),
            "angle": (lambda x: bend(x, 9, 10, 11), self.angle.mean(lambda t: t)),
            "cos weak": (lambda x: dihedral(x[..., 5:9, :]).cos(), self.weak.mean(np.cos)),
            "cos hydrogen": (lambda x: dihedral(x[..., hydrogen, :]).cos(), self.torsion.mean(np.cos)),
            "sin hydrogen": (lambda x: dihedral(x[..., hydrogen, :]).sin(), self.torsion.mean(np.sin)),
        }
        for k, (low, high) in enumerate(BASINS):
            found[f"hydrogen basin {k}"] = (
                lambda x, low=low, high=high: in_range(dihedral(x[..., hydrogen, :]), low, high),
                self.torsion.mean(lambda p, low=low, high=high: (p >= low) & (p < high)),
            )
        return found


def in_range(values, low, high):
    return ((values >= low) & (values < high)).double()


def attach(c, e, f, b, t, tau):
    """A fourth atom `(n, 3)`: bond ``b`` to c, angle ``t`` with e, torsion ``tau`` with f (OpenMM's sign)."""
    axis = torch.nn.functional.normalize(c - e, dim=1)
    normal = torch.nn.functional.normalize(torch.linalg.cross(e - f, axis), dim=1)
    across = torch.linalg.cross(normal, axis)
    reach = (b * t.sin())[:, None]
    return c - (b * t.cos())[:, None] * axis + reach * (tau.cos()[:, None] * across + tau.sin()[:, None] * normal)


BASINS = ((-math.pi, -1.0), (-1.0, 1.2), (1.2, math.pi))


class Grid:
    """A one-dimensional density on a grid, normalised by the trapezoidal rule."""

    def __init__(self, low, high, log_density):
        self.x = x = np.linspace(low, high, 8001)
        log_p = log_density(x)
        self.p = np.exp(log_p - log_p.max())
        self.p /= np.trapezoid(self.p, x)
        steps = (self.p[1:] + self.p[:-1]) / 2 * np.diff(x)
        self.cdf = np.concatenate([[0.0], np.cumsum(steps)])

    def mean(self, f):
        return float(np.trapezoid(self.p * f(self.x), self.x))

    def sample(self, n, generator):
        uniform = torch.rand(n, generator=generator, dtype=torch.float64).numpy()
        return torch.as_tensor(np.interp(uniform, self.cdf, self.x))


def torsion_energy(phi):
    return sum(k * (1 + np.cos(n * phi - phase)) for k, n, phase in TORSION)


def place(b, t, phi):
    """Positions `(n, 4, 3)` from three bonds, two angles and a torsion (the sign convention of OpenMM)."""
    zero = torch.zeros_like(phi)
    a1 = torch.stack([b[:, 0], zero, zero], 1)
    a2 = a1 + b[:, 1:2] * torch.stack([-t[:, 0].cos(), t[:, 0].sin(), zero], 1)
    axis = (a2 - a1) / b[:, 1:2]
    normal = torch.linalg.cross(a1, axis)
    normal = normal / normal.norm(dim=1, keepdim=True)
    m = torch.linalg.cross(normal, axis)
    c, s = (t[:, 1].sin() * phi.cos())[:, None], (t[:, 1].sin() * phi.sin())[:, None]
    a3 = a2 + b[:, 2:3] * (-t[:, 1].cos()[:, None] * axis + c * m + s * normal)
    return torch.stack([torch.zeros_like(a1), a1, a2, a3], 1)


def distance(x, i, j):
    return (x[..., i, :] - x[..., j, :]).norm(dim=-1)


def bend(x, i, j, k):
    a, b = x[..., i, :] - x[..., j, :], x[..., k, :] - x[..., j, :]
    return torch.arccos(((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).clamp(-1, 1))


def dihedral(x):
    b0, b1, b2 = (x[..., i + 1, :] - x[..., i, :] for i in range(3))
    n1, n2 = torch.linalg.cross(b0, b1), torch.linalg.cross(b1, b2)
    y = (torch.linalg.cross(n1, n2) * b1).sum(-1) / b1.norm(dim=-1)
    return torch.atan2(y, (n1 * n2).sum(-1))


def chain_topology(n):
    topology = app.Topology()
    residue = topology.addResidue("CHN", topology.addChain())
    atoms = [topology.addAtom(f"C{i}", app.Element.getBySymbol("C"), residue) for i in range(n)]
    for a, b in itertools.pairwise(atoms):
        topology.addBond(a, b)
    return topology


class Well:
    """One atom in a skewed double well along x, an exponential wall along y and a harmonic z; not free to move."""

    n_atoms = 1

    def __init__(self, temperature=TEMPERATURE, mass=20.0):
        self.kT = GAS_CONSTANT * temperature
        self.system = openmm.System()
        self.system.addParticle(mass)
        force = openmm.CustomExternalForce("3000*(x^2-0.04)^2 + 8*x + 2.5*(exp(10*y)-10*y) + 125*z^2")
        force.addParticle(0, [])
        self.system.addForce(force)
        self.x = Grid(-0.8, 0.8, lambda x: -(3000 * (x**2 - 0.04) ** 2 + 8 * x) / self.kT)
        self.y = Grid(-2.0, 0.6, lambda y: -2.5 * (np.exp(10 * y) - 10 * y) / self.kT)
        self.z = Grid(-1.0, 1.0, lambda z: -125 * z**2 / self.kT)

    def __call__(self, x):
        x, y, z = torch.as_tensor(x)[:, 0].unbind(1)
        return 3000 * (x**2 - 0.04) ** 2 + 8 * x + 2.5 * (torch.exp(10 * y) - 10 * y) + 125 * z**2

    def sample(self, n, generator):
        return torch.stack([grid.sample(n, generator) for grid in (self.x, self.y, self.z)], 1).unsqueeze(1)

    def observables(self):
        return {
            "x": (lambda r: r[..., 0, 0], self.x.mean(lambda x: x)),
            "x squared": (lambda r: r[..., 0, 0] ** 2, self.x.mean(lambda x: x**2)),
            "left basin": (lambda r: (r[..., 0, 0] < 0).double(), self.x.mean(lambda x: x < 0)),
            "y": (lambda r: r[..., 0, 1], self.y.mean(lambda y: y)),
            "y squared": (lambda r: r[..., 0, 1] ** 2, self.y.mean(lambda y: y**2)),
            "y cubed": (lambda r: r[..., 0, 1] ** 3, self.y.mean(lambda y: y**3)),
            "z squared": (lambda r: r[..., 0, 2] ** 2, self.z.mean(lambda z: z**2)),
        }


@dataclass(frozen=True)
class Metadata:
    fingerprint: dict | None = None
    temperature: float | None = None


class GaussianFlow(nn.Module):
    """A Gaussian over all Cartesian coordinates, ``x = mean + L z``: a flow with an exact density, and a poor one."""

    rotation_invariant = False

    def __init__(self, mean, covariance, com_std=0.1, metadata=None):
        super().__init__()
        self.n_atoms = len(mean)
        self.com_std = com_std
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float64).flatten())
        self.register_buffer("scale", torch.linalg.cholesky(torch.as_tensor(covariance, dtype=torch.float64)))
        self.metadata = metadata or Metadata()

    device = torch.device("cpu")
    dtype = torch.float64

    def sample(self, n, generator=None):
        z = torch.randn(n, len(self.mean), generator=generator, dtype=torch.float64)
        x = self.mean + z @ self.scale.T
        return x.reshape(n, self.n_atoms, 3), self._log_density(z)

    def log_prob(self, x):
        delta = x.flatten(1).double() - self.mean
        return self._log_density(torch.linalg.solve_triangular(self.scale, delta.T, upper=False).T)

    def frame_log_density(self, x):
        return -0.5 * (x.mean(1) ** 2).sum(1) / self.com_std**2 - 3 * math.log(self.com_std * math.sqrt(2 * math.pi))

    def _log_density(self, z):
        return -0.5 * (z**2).sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi) - self.scale.diagonal().log().sum()


def cartesian_gaussian(molecule, com_std=0.1):
    """A poor Cartesian flow of a free molecule: one Gaussian, off centre and of unequal width along x, y and z, so
    that its density changes when the molecule is turned."""
    generator = torch.Generator().manual_seed(5)
    x = molecule.sample(20000, generator)
    x = x - x.mean(1, keepdim=True) + com_std * torch.randn(len(x), 1, 3, generator=generator, dtype=torch.float64)
    uneven = torch.tensor([1.3, 1.0, 1.1]).repeat(molecule.n_atoms).double()
    covariance = torch.cov(x.flatten(1).T) * uneven[:, None] * uneven
    offset = torch.linspace(-0.02, 0.03, 3 * molecule.n_atoms, dtype=torch.float64).reshape(-1, 3)
    return GaussianFlow(offset, covariance, com_std)


def z_scores(positions, observables):
    """(sample mean - exact) / standard error for independent configurations `(n, n_atoms, 3)`."""
    scores = {}
    for name, (function, exact) in observables.items():
        values = function(positions)
        scores[name] = float((values.mean() - exact) / (values.std() / math.sqrt(len(values))))
    return scores


def openmm_energy(system, positions):
    """Energies [kJ/mol] on the Reference platform, one configuration at a time."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    energies = []
    for x in positions:
        context.setPositions(np.asarray(x))
        energies.append(context.getState(getEnergy=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))
    return np.array(energies)
