"""Free energies between constrained Systems: maps keep the bonds, works carry the metric term."""

import math
import warnings

import numpy as np
import openmm
import pytest
import torch
from analytic_molecules import BOND_LENGTH, KT, TEMPERATURE, chain_topology, place
from openmm import unit
from test_tfep_states import MOLECULE, states

from openmm_regflow import flows, tfep
from openmm_regflow.constraints import fixed_bonds
from openmm_regflow.errors import InputError
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.rigid import random_rotations
from openmm_regflow.training import TrainConfig


class Rods:
    """Four atoms on three rigid rods with harmonic bends: ``p(t1, t2) = sin t1 sin t2 sqrt(det Z) exp(-u)``, Z written
    out here; the torsion is uniform."""

    def __init__(self, t0, k, masses, length=BOND_LENGTH):
        self.system = openmm.System()
        for mass in masses:
            self.system.addParticle(mass)
        bends = openmm.HarmonicAngleForce()
        for i in (0, 1):
            bends.addAngle(i, i + 1, i + 2, t0, k)
        self.system.addForce(bends)
        for i in range(3):
            self.system.addConstraint(i, i + 1, length)
        n, w = 1000, [1 / m for m in masses]
        self.t = t = (np.arange(n) + 0.5) * math.pi / n
        weight = np.sin(t) * np.exp(-k * (t - t0) ** 2 / (2 * KT))
        ends, squares = (w[0] + w[1], w[2] + w[3]), np.cos(t) ** 2
        determinant = ends[0] * (w[1] + w[2]) * ends[1]
        determinant = determinant - squares[:, None] * w[1] ** 2 * ends[1] - squares * w[2] ** 2 * ends[0]
        self.p = weight[:, None] * weight * np.sqrt(determinant)

    def free_energy(self):
        return -math.log(self.p.sum() * (self.t[1] - self.t[0]) ** 2)

    def sample(self, n, seed):
        g = torch.Generator().manual_seed(seed)
        cells = torch.multinomial(torch.as_tensor(self.p.flatten()), n, replacement=True, generator=g)
        t = torch.as_tensor(self.t)[torch.stack([cells // len(self.t), cells % len(self.t)], 1)]
        t = t + (self.t[1] - self.t[0]) * (torch.rand(n, 2, generator=g, dtype=torch.float64) - 0.5)
        torsion = 2 * math.pi * torch.rand(n, generator=g, dtype=torch.float64)
        shape = place(torch.full((n, 3), BOND_LENGTH, dtype=torch.float64), t, torsion)
        return shape @ random_rotations(n, g).transpose(1, 2)


#: Light atoms in the middle, where det Z depends on the bends most.
MASSES = (12.0, 1.0, 1.5, 30.0)
A, B = Rods(1.6, 60.0, MASSES), Rods(2.5, 25.0, MASSES)


def mapped(state_a, state_b, fixed):
    x, y = A.sample(8000, 1), B.sample(8000, 2)
    coordinates = flows.coordinates_for(chain_topology(4), torch.cat([x[:4000], y[:4000]]), fixed=fixed)
    features = [coordinates.to_features(v[:4000])[0] for v in (x, y)]
    circular = coordinates.circular
    features = [torch.where(circular, 0.0, f) for f in features]  # an affine map is none of a circle
    affine = tfep.AffineMap.fit(*features)
    matrix = torch.where(circular[:, None] | circular, torch.diag(circular.double()), affine.matrix)
    carried = tfep.CoordinatesMap(coordinates, tfep.AffineMap(affine.mean_a, affine.mean_b, matrix))
    held_out = x[4000:], y[4000:]
    return tfep.free_energy_difference(
        carried, state_a, state_b, *held_out, trained_on=(x[:4000], y[:4000]), generator=0
    )


def test_a_bend_between_rods_against_quadrature():
    state_a, state_b = (tfep.state_of(s.system, TEMPERATURE) for s in (A, B))
    result = mapped(state_a, state_b, tfep.shared_bonds(state_a, state_b))
    exact = B.free_energy() - A.free_energy()
    assert abs(result.delta_f - exact) < 4 * result.uncertainty
    assert result.uncertainty < 0.03 and result.overlap > 0.8

    # The planted error: no metric term.
    wrong = mapped(*(tfep.State(TorchPotential(s.system), TEMPERATURE) for s in (A, B)), fixed_bonds(A.system))
    assert abs(wrong.delta_f - exact) > 10 * wrong.uncertainty


def test_a_nearby_map_between_rods_trains_without_a_warning():
    state_a, state_b = (tfep.state_of(s.system, TEMPERATURE) for s in (A, B))
    x, y = A.sample(100, 1), B.sample(100, 2)
    coordinates = flows.coordinates_for(chain_topology(4), torch.cat([x, y]), fixed=tfep.shared_bonds(state_a, state_b))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = TrainConfig(steps=3, batch_size=64)
        carried = tfep.fit_nearby_map(coordinates, x, y, (state_a, state_b), config=config)
    assert (carried.forward(x)[0] - x).abs().max() > 1e-3


def test_a_map_that_moves_constrained_bonds_is_refused():
    x = A.sample(100, 3)
    state = tfep.state_of(A.system, TEMPERATURE)
    soft = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    coordinates = flows.coordinates_for(chain_topology(4), soft)
    loose = tfep.CoordinatesMap(coordinates, tfep.AffineMap(torch.zeros(6), torch.full((6,), 0.3), torch.eye(6)))
    with pytest.raises(InputError, match="constrained bond is off"):
        tfep.works(loose, state, state, x, x)


def test_states_with_other_constraints_are_refused():
    longer, free = Rods(1.6, 60.0, MASSES, 1.01 * BOND_LENGTH), openmm.System()
    for _ in range(4):
        free.addParticle(1.0)
    ends = [tfep.state_of(s, TEMPERATURE) for s in (A.system, longer.system, free)]
    for other in ends[1:]:
        with pytest.raises(InputError, match="differ in 3 constraints"):
            tfep.shared_bonds(ends[0], other)


def test_states_with_other_masses_behind_constraints_are_refused():
    """det Z is of the masses: equal energies would differ by log sqrt(det Z_B / det Z_A), which is no free energy."""
    other = tfep.state_of(Rods(1.6, 60.0, (12.0, 4.0, 1.5, 30.0)).system, TEMPERATURE)
    state, x = tfep.state_of(A.system, TEMPERATURE), A.sample(100, 3)
    for refused in (
        lambda: tfep.works(tfep.IdentityMap(), state, other, x, x),
        lambda: tfep.mapped_energies([tfep.IdentityMap()] * 2, [state, other], [x, x]),
    ):
        with pytest.raises(InputError, match=r"mass of atom 1.*\(1 and 4 dalton\)"):
            refused()


def test_files_of_a_molecule_with_constrained_hydrogens(tmp_path):
    """Learned map and identity map give the same answer between temperatures, and the map keeps the bonds."""
    forcefield = openmm.app.ForceField("amber99sbildn.xml", "amber99_obc.xml")
    system = forcefield.createSystem(MOLECULE.topology, constraints=openmm.app.HBonds)
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    import mdtraj

    topology = mdtraj.Topology.from_openmm(MOLECULE.topology)
    for temperature, name in ((300.0, "cold.h5"), (330.0, "hot.dcd")):
        integrator = openmm.LangevinMiddleIntegrator(temperature, 10.0, 0.002)
        integrator.setRandomNumberSeed(int(temperature))
        context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
        context.setPositions(MOLECULE.positions)
        context.applyConstraints(1e-6)
        integrator.step(1000)
        frames = []
        for _ in range(300):
            integrator.step(50)
            frames.append(context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer))
        mdtraj.Trajectory(np.array(frames), topology).save(str(tmp_path / name))
    source = {"system": str(MOLECULE.folder / "structure.pdb"), "system_xml": "system.xml"}
    training = {"steps": 30, "batch_size": 64, "learning_rate": 1e-3}
    config = states(tmp_path, a=source, b=source, map="learned", folds=2, train=training)
    result = tfep.run_states(config, tmp_path, tmp_path / "out")
    assert result.plain is not None and result.n_forward == 300
    assert abs(result.delta_f - result.plain.delta_f) < 4 * math.hypot(result.uncertainty, result.plain.uncertainty)
