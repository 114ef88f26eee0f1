"""States that hold a molecule in its place, or turn it, and maps that forget where it was."""

import copy
import math
from dataclasses import replace

import numpy as np
import openmm
import pytest
import torch
from analytic_molecules import TEMPERATURE, Chain, distance
from openmm import app, unit
from openmmtools import testsystems

from openmm_regflow import tfep
from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.flows import coordinates_for
from openmm_regflow.potentials import OpenMMPotential, TorchPotential
from openmm_regflow.rigid import Placement
from openmm_regflow.systems import load_system
from openmm_regflow.tfep.compatibility import placement_of
from openmm_regflow.units import thermal_energy

KT = thermal_energy(TEMPERATURE)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def chain_with(*expressions, atoms=(1,)):
    """A state of the free chain with an external force on each of some atoms."""
    system = Chain(4).system
    for expression, atom in zip(expressions, atoms, strict=True):
        force = openmm.CustomExternalForce(expression)
        force.addParticle(atom, [])
        system.addForce(force)
    return tfep.State(TorchPotential(system), TEMPERATURE)


FREE = chain_with(atoms=())
WEAK, STRONG = chain_with("5*(x^2+y^2+z^2)"), chain_with("20*(x^2+y^2+z^2)")
FLAT = chain_with("1000*max(0, sqrt(x^2+y^2+z^2)-6)^2")
FIELD = chain_with("-8*x", "8*x", atoms=(0, 1))
WALLS = [chain_with(f"1000*max(0, {side}-6)^2") for side in ("x", "-x", "z", "-z")]
PLANE, TUBE = chain_with("500*(x-y)^2"), chain_with("500*((x-y)^2+(y-z)^2)")


def samples(n=64, seed=0):
    """Near the origin, where a flat bottom is flat."""
    x = Chain(4).sample(n, generator(seed))
    return x - x.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("state", "place", "orientation"),
    [
        (FREE, False, False), (WEAK, True, False), (FLAT, True, False), (FIELD, False, True),
        *((wall, True, False) for wall in WALLS), (PLANE, True, True), (TUBE, True, True),
    ],
    ids=["free", "restraint", "flat bottom", "field", "x wall", "-x wall", "z wall", "-z wall", "plane", "tube"],
)
def test_what_an_energy_says_of_place_and_orientation(state, place, orientation):
    """A molecule whose centre is that of a restraint may turn about it."""
    assert placement_of(state, samples(8)) == Placement(place, orientation)


@pytest.mark.parametrize("kind", ["float32", "CPU"])
def test_single_precision_holds_no_molecule_in_its_place(kind):
    """Rounding is no restraint, at ten nanometres and where the terms of an energy cancel."""
    molecule = load_system("alanine-tetrapeptide")
    rounded = {"dtype": torch.float32} if kind == "float32" else {"platform": kind}
    potential = (TorchPotential if kind == "float32" else OpenMMPotential)(molecule.system, **rounded)
    state, exact = tfep.State(potential, 300.0), TorchPotential(molecule.system)
    frames = torch.as_tensor(molecule.reference("test")).double()
    nearest = exact(frames).abs().argsort()[:60]  # energies about zero
    for rows in (*nearest.split(6), *torch.arange(0, 3600, 60).split(6)):
        assert placement_of(state, frames[rows]) == Placement(False, False)
    x = frames[nearest[:16]]
    coordinates = coordinates_for(molecule.topology, frames[:2000], "internal")
    for one in (tfep.IdentityMap(), tfep.CoordinatesMap(coordinates, tfep.IdentityMap())):
        tfep.works(one, state, state, x, frames[::200])


@pytest.mark.parametrize("box", [2.5, 4.0])
def test_a_mesh_holds_no_molecule_in_its_place(box):
    """PME changes an energy by thousandths of kT where a molecule is moved, and by hundredths where it is turned."""
    molecule = load_system("alanine-dipeptide")
    topology = copy.deepcopy(molecule.topology)
    topology.setPeriodicBoxVectors(np.eye(3) * box * unit.nanometer)
    system = app.ForceField("amber99sbildn.xml").createSystem(topology, nonbondedMethod=app.PME)
    state, x = tfep.State(OpenMMPotential(system, "Reference"), 300.0), torch.as_tensor(molecule.reference("test"))
    assert placement_of(state, x[:6].double()) == Placement(False, False)
    coordinates = coordinates_for(molecule.topology, x[:1000], "internal")
    works = tfep.works(tfep.CoordinatesMap(coordinates, tfep.IdentityMap()), state, state, x[:20], x[-20:])
    assert np.abs(np.concatenate([works.forward, works.reverse])).max() < 0.05


def test_samples_outside_their_basin_are_named_before_anything_else():
    x = samples()
    nowhere = tfep.State(WEAK.potential, TEMPERATURE, basin=lambda x: np.zeros(len(x), dtype=bool))
    assert placement_of(nowhere, x) is None
    with pytest.raises(InputError, match="lie outside its basin"):
        tfep.works(tfep.IdentityMap(), nowhere, STRONG, x, x)


@pytest.mark.parametrize("held", [WEAK, FLAT, WALLS[1]], ids=["restraint", "flat bottom", "wall"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_free_state_and_one_held_in_its_place_have_no_difference(held, turned):
    """The number would follow wherever the frames happen to lie."""
    states = (held, FREE) if turned else (FREE, held)
    with pytest.raises(InputError, match=f"state {'A' if turned else 'B'} changes when the whole molecule is moved"):
        tfep.works(tfep.IdentityMap(), *states, samples(), samples(seed=1))
    x = [samples(), samples(seed=1)]
    with pytest.raises(InputError, match="changes when the whole molecule is moved"):
        tfep.mapped_energies([tfep.IdentityMap()] * 2, states, x)


def dipeptide(frozen=(), constraints=None):
    molecule = testsystems.AlanineDipeptideVacuum(constraints=constraints)
    for atom in frozen:
        molecule.system.setParticleMass(atom, 0.0)
    return molecule


def test_atoms_frozen_in_one_state_alone_are_refused():
    """Their ensembles have different dimensions, and no check of overlap would see it."""
    free, frozen = (tfep.state_of(dipeptide(atoms).system, TEMPERATURE) for atoms in ((), (4, 6, 8)))
    x = torch.as_tensor(dipeptide().positions._value) + 0.001 * torch.randn(40, 22, 3, generator=generator())
    with pytest.raises(InputError, match="atom 4 has no mass"):
        tfep.works(tfep.IdentityMap(), free, frozen, x, x)
    assert tfep.works(tfep.IdentityMap(), frozen, frozen, x, x).forward == pytest.approx(0.0, abs=1e-9)
    x = torch.as_tensor(dipeptide().positions._value) + 0.001 * torch.randn(200, 22, 3, generator=generator())
    coordinates_for(dipeptide().topology, x)
    x[:, [4, 6, 8]] = x[0, [4, 6, 8]].clone()  # bonds and the angle between frozen atoms do not vary
    with pytest.raises(InputError, match="does not vary"):
        coordinates_for(dipeptide().topology, x)


def test_a_metric_term_of_another_temperature_is_refused():
    """It is a number of kT in the energy: scaled by a wrong kT it would move delta_f, and nothing would show it."""
    state = tfep.state_of(dipeptide(constraints=app.HBonds).system, 300.0)
    with pytest.raises(InputError, match="at 300 K, and the state is at 330 K"):
        replace(state, temperature=330.0)
    assert tfep.State(state.potential, 300.0 * unit.kelvin).potential is state.potential
    plain = tfep.state_of(dipeptide().system, 300.0)
    assert replace(plain, temperature=330.0).temperature == 330.0


def internal_map(x):
    coordinates = coordinates_for(Chain(4).topology, x, "internal")
    return tfep.CoordinatesMap(coordinates, tfep.IdentityMap())


@pytest.mark.parametrize("states", [(WEAK, STRONG), (FREE, FIELD)], ids=["restraints", "field"])
def test_a_map_without_a_frame_is_refused_where_the_frame_counts(states):
    x, y = samples(), samples(seed=1)
    with pytest.raises(InputError, match="forgets where it was"):
        tfep.works(internal_map(x), *states, x, y)
    tfep.works(tfep.IdentityMap(), *states, x, y)
    tfep.works(internal_map(x), FREE, FREE, x, y)
    with pytest.raises(InputError, match="forgets where it was"):
        tfep.mapped_energies([tfep.IdentityMap(), internal_map(x)], states, [x, y])


def in_the_field(n, seed):
    """Exact samples of the chain in the field, by rejection: its energy is -8 (x0 - x1), at least -8 b."""
    x = Chain(4).sample(40 * n, generator(seed))
    gain = 8 * (x[:, 0, 0] - x[:, 1, 0]) / KT
    return x[torch.rand(len(x), generator=generator(seed + 1), dtype=torch.float64) < (gain - 8 * 0.3 / KT).exp()][:n]


def test_a_field_that_turns_a_molecule_has_a_free_energy():
    """-ln <sinh(f b / kT) / (f b / kT)> over the bond, where the frames of the free molecule lie in all directions."""
    exact = -math.log(Chain(4).bond.mean(lambda b: np.sinh(8 * b / KT) / (8 * b / KT)))
    x, y = Chain(4).sample(4000, generator(2)), in_the_field(4000, 3)
    assert len(y) == 4000 and float(distance(y, 0, 1).max()) < 0.3
    found = tfep.free_energy_difference(tfep.IdentityMap(), FREE, FIELD, x, y, trained_on=None, generator=0)
    assert abs(found.delta_f - exact) < 4 * found.uncertainty
    # The planted error: frames of the free molecule that all lie along the field.
    bond = x[:, :1] - x[:, 1:2]
    aligned = x.clone()
    aligned[:, 0, :] = x[:, 1, :] + bond[:, 0].norm(dim=1, keepdim=True) * torch.tensor([1.0, 0.0, 0.0]).double()
    wrong = tfep.works(tfep.IdentityMap(), FREE, FIELD, aligned, y)
    one_sided = -math.log(np.exp(-wrong.forward).mean())
    assert abs(one_sided - exact) > 20 * found.uncertainty


def gas(edge, bonded=False):
    """Twenty Lennard-Jones particles in a cube; as beads of one molecule, if ``bonded``."""
    system, nonbonded, bonds = openmm.System(), openmm.NonbondedForce(), openmm.HarmonicBondForce()
    nonbonded.setNonbondedMethod(nonbonded.CutoffPeriodic)
    for k in range(20):
        system.addParticle(40.0)
        nonbonded.addParticle(0.0, 0.34, 1.0)
        if bonded and k:
            bonds.addBond(k - 1, k, 0.4, 5000.0)
    system.addForce(nonbonded)
    system.addForce(bonds)
    system.setDefaultPeriodicBoxVectors(*np.diag([edge] * 3))
    return tfep.state_of(system, TEMPERATURE)


def test_states_in_boxes_of_other_sizes_are_refused():
    """Of twice the volume: 13.8 kT off, and an identity map that looked reliable; one molecule has no such volume."""
    lattice = 0.8 * np.stack(np.meshgrid(*[range(5)] * 3), -1).reshape(-1, 3)[:20]
    x = lattice + 0.02 * np.random.default_rng(0).standard_normal((50, 20, 3))
    a, b = gas(4.0), gas(4.0 * 2 ** (1 / 3))
    with pytest.raises(InputError, match=r"boxes, of 4 x 4 x 4 and 5\.04 x 5\.04 x 5\.04 nm"):
        tfep.works(tfep.IdentityMap(), a, b, x, x)
    assert np.isfinite(tfep.works(tfep.IdentityMap(), a, gas(4.0), x, x).forward).all()
    chain = 0.4 * np.arange(20)[:, None] * np.array([1.0, 0, 0]) / 4 + 0.01 * x
    together = [gas(edge, bonded=True) for edge in (4.0, 5.0)]
    assert np.isfinite(tfep.works(tfep.IdentityMap(), *together, chain, chain).forward).all()


def springs(k, n_frozen):
    """Three particles on springs to the origin, and some without mass."""
    system, force = openmm.System(), openmm.CustomExternalForce(f"{k / 2}*(x^2+y^2+z^2)")
    for particle in range(3):
        system.addParticle(40.0)
        force.addParticle(particle, [])
    for _ in range(n_frozen):
        system.addParticle(0.0)
    system.addForce(force)
    return tfep.state_of(system, TEMPERATURE)


def sprung(k, n_frozen, place, n=2000, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, 3 + n_frozen, 3)) * math.sqrt(KT / k)
    x[:, 3:] = np.array([place, 0.1, 0.0])
    return x


@pytest.mark.parametrize("n_frozen", [0, 2])
def test_a_fitted_map_does_not_count_frozen_atoms(n_frozen):
    """Each was worth 2 kT, by the ridge on a variance of nothing."""
    exact = 4.5 * math.log(250 / 1000)
    a, b = springs(1000.0, n_frozen), springs(250.0, n_frozen)
    x, y = sprung(1000.0, n_frozen, 0.3), sprung(250.0, n_frozen, 0.4, seed=1)
    result = tfep.cross_fit(tfep.AffineMap.fit, a, b, x, y, folds=4, generator=0)
    assert abs(result.delta_f - exact) < 4 * result.uncertainty < 0.1 and "reliable" in result.verdict
    stretch = torch.eye(9 + 3 * n_frozen).double()
    stretch[9:, 9:] *= 1.5
    mean = torch.as_tensor(x).reshape(len(x), -1).mean(0)
    if n_frozen:
        with pytest.raises(InputError, match=r"stretches the frozen atoms \(2, from 3 on\)"):
            tfep.works(tfep.AffineMap(mean, mean, stretch), a, b, x, y)


def test_coordinates_that_stand_still_fit_no_covariance():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((100, 4)), rng.standard_normal((100, 4))
    with pytest.raises(InputError, match="coordinate 2 stands still in the samples of one state"):
        tfep.AffineMap.fit(x * [1, 1, 0, 1], y)
    with pytest.raises(InsufficientDataError, match="1 and 1 samples"):
        tfep.AffineMap.fit(x[:1], y[:1])
    y[:, 3] = y[:, 0] + y[:, 1]
    with pytest.raises(InputError, match="a combination of coordinates does not vary"):
        tfep.AffineMap.fit(x, y)


@pytest.mark.parametrize("shape", ["(n, 1)", "angle", "(n, n)"])
def test_a_basin_says_yes_or_no_for_each_configuration(shape):
    """Columns were broadcast against energies, and read as so many maps."""
    angle = {"(n, 1)": lambda x: x[:, :1, 0] > 0, "angle": lambda x: x[:, 0, 0], "(n, n)": lambda x: x[:, 0] > 0}[shape]
    a, b = springs(100.0, 0), replace(springs(100.0, 0), basin=lambda x: angle(np.asarray(x)))
    x = sprung(100.0, 0, 0.0, n=300)
    y = x[x[:, 0, 0] > 0]
    if shape == "(n, 1)":
        found = tfep.works(tfep.IdentityMap(), a, b, x, y)
        assert found.forward.shape == (300,) and np.array_equal(np.isfinite(found.forward), x[:, 0, 0] > 0)
    else:
        with pytest.raises(InputError, match="one boolean each"):
            tfep.works(tfep.IdentityMap(), a, b, x, y)


def test_samples_that_trained_a_map_give_no_mapped_energies():
    """1.5 kT off in thirty dimensions, and reliable: no Crooks check looks at several states."""
    a, b = springs(100.0, 0), springs(300.0, 0)
    x, y = sprung(100.0, 0, 0.0, n=80), sprung(300.0, 0, 0.0, n=80, seed=1)
    maps = [tfep.IdentityMap(), tfep.AffineMap.fit(x, y)]
    with pytest.raises(InputError, match="80 samples of state 0 also trained the map"):
        tfep.mapped_energies(maps, [a, b], [x, y])
    u_kn, n_k = tfep.mapped_energies(maps, [a, b], [sprung(100.0, 0, 0, 90, 2), sprung(300.0, 0, 0, 70, 3)])
    assert u_kn.shape == (2, 160) and n_k.tolist() == [90, 70]


def test_a_map_that_the_same_samples_contradict_is_not_trusted():
    """Half of a Jacobian forgotten, both ways alike, which no fluctuation theorem of its works would show."""
    a, b = springs(100.0, 0), springs(110.0, 0)
    x, y = sprung(100.0, 0, 0.0), sprung(110.0, 0, 0.0, seed=1)
    wrong = tfep.AffineMap.fit(sprung(100.0, 0, 0.0, seed=2), sprung(110.0, 0, 0.0, seed=3))
    right = tfep.free_energy_difference(wrong, a, b, x, y, trained_on=None, generator=0)
    assert right.verdict.startswith("reliable") and abs(right.delta_f - 4.5 * math.log(1.1)) < 4 * right.uncertainty
    wrong.log_det *= 0.5
    result = tfep.free_energy_difference(wrong, a, b, x, y, trained_on=None, generator=0)
    assert "without a map the same samples say" in result.verdict and result.verdict.startswith("do not trust")

def test_samples_that_trained_a_map_are_two_sets():
    a, x = springs(100.0, 0), sprung(100.0, 0, 0.0, n=20)
    for nothing in ((), (x,)):
        with pytest.raises(InputError, match="or None if none did"):
            tfep.free_energy_difference(tfep.IdentityMap(), a, a, x, x, trained_on=nothing)
