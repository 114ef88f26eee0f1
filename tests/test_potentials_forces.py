"""TorchPotential force by force: options of every force against OpenMM's Reference platform, and boundary cases."""

import threading

import numpy as np
import openmm
import pytest
import torch

from openmm_regflow.errors import InputError, UnsupportedForceError
from openmm_regflow.potentials import OpenMMPotential, TorchPotential
from openmm_regflow.refusals import has_global_parameters

ENERGY_RTOL, ENERGY_ATOL, FORCE_RTOL = 1e-9, 1e-6, 1e-7
N_ATOMS = 9


def empty_system(n=N_ATOMS):
    system = openmm.System()
    for _ in range(n):
        system.addParticle(12.0)
    return system


def conformations(n=N_ATOMS, seed=7):
    """Random clouds, from loose to clashing."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.uniform(-s, s, size=(4, n, 3)) for s in (0.8, 0.4, 0.15)])


def with_force(force, n=N_ATOMS):
    system = empty_system(n)
    system.addForce(force)
    return system


def check(system, x=None, parameters=None):
    x = conformations(system.getNumParticles()) if x is None else x
    reference, potential = OpenMMPotential(system, platform="Reference"), TorchPotential(system)
    for name, value in (parameters or {}).items():
        reference.set_parameter(name, value)
        potential.set_parameter(name, value)
    energy, forces = reference.energy_and_forces(x)
    got, got_forces = potential.energy_and_forces(x)
    torch.testing.assert_close(got, energy, rtol=ENERGY_RTOL, atol=ENERGY_ATOL)
    scale = forces.abs().amax((1, 2), keepdim=True).clamp(min=1.0)
    assert ((got_forces - forces).abs() / scale).max() <= FORCE_RTOL
    assert torch.isfinite(energy).any()
    return energy


def nonbonded(method=openmm.NonbondedForce.NoCutoff):
    rng = np.random.default_rng(11)
    force = openmm.NonbondedForce()
    for _ in range(N_ATOMS):
        force.addParticle(rng.normal(), rng.uniform(0.1, 0.3), rng.uniform(0.1, 1.0))
    for i, j in ((0, 1), (1, 2), (0, 2)):
        force.addException(i, j, 0.0, 0.1, 0.0)
    force.addException(4, 2, 0.4, 0.25, 0.7)
    force.setNonbondedMethod(method)
    force.setCutoffDistance(0.7)
    return force


def gbsa(method=openmm.GBSAOBCForce.NoCutoff):
    rng = np.random.default_rng(12)
    force = openmm.GBSAOBCForce()
    for _ in range(N_ATOMS):
        force.addParticle(rng.normal(), rng.uniform(0.1, 0.2), rng.uniform(0.6, 0.95))
    force.setNonbondedMethod(method)
    force.setCutoffDistance(0.6)
    return force


def test_nonbonded_without_cutoff():
    check(with_force(nonbonded()))


@pytest.mark.parametrize("switch", [None, 0.5])
def test_nonbonded_with_cutoff(switch):
    force = nonbonded(openmm.NonbondedForce.CutoffNonPeriodic)
    force.setReactionFieldDielectric(40.0)
    if switch is not None:
        force.setUseSwitchingFunction(True)
        force.setSwitchingDistance(switch)
    check(with_force(force))


@pytest.mark.parametrize("value", [None, 0.0, 0.6])
def test_nonbonded_parameter_offsets(value):
    force = nonbonded()
    force.addGlobalParameter("lam", 1.0)
    force.addGlobalParameter("mu", 0.3)
    force.addParticleParameterOffset("lam", 3, 0.5, 0.05, 0.2)
    force.addParticleParameterOffset("mu", 3, -0.2, 0.0, 0.1)
    force.addExceptionParameterOffset("lam", 0, 0.3, 0.1, 0.4)
    check(with_force(force), parameters={} if value is None else {"lam": value})


@pytest.mark.parametrize("method", [0, 1], ids=["NoCutoff", "CutoffNonPeriodic"])
def test_gbsa_obc(method):
    force = gbsa(method)
    force.setSolventDielectric(60.0)
    force.setSoluteDielectric(2.0)
    force.setSurfaceAreaEnergy(1.7)
    check(with_force(force))


def test_gbsa_of_one_atom():
    force = openmm.GBSAOBCForce()
    force.addParticle(1.0, 0.15, 0.8)
    check(with_force(force, 1), np.zeros((2, 1, 3)))


def test_an_engulfed_atom():
    """A small atom well inside the scaled sphere of a large one: the third branch of the descreening integral."""
    force = openmm.GBSAOBCForce()
    force.addParticle(0.5, 0.08, 0.8)
    force.addParticle(-0.5, 0.30, 0.95)
    check(with_force(force, 2), np.array([[[0, 0, 0], [0.02 * k, 0, 0]] for k in range(1, 20)], dtype=float))


def test_ryckaert_bellemans_torsion():
    force = openmm.RBTorsionForce()
    force.addTorsion(0, 1, 2, 3, 1.1, -2.0, 0.3, 4.0, -0.5, 0.9)
    force.addTorsion(3, 2, 5, 4, 0, 0, 0, 0, 0, 0)
    force.addTorsion(4, 6, 7, 8, 2.0, 0, 0, 0, 0, 0)
    check(with_force(force))


def test_periodic_torsion_with_shared_atoms_and_any_phase():
    force = openmm.PeriodicTorsionForce()
    for n, phase, k in ((1, 0.0, 3.0), (2, 1.234, -2.0), (6, np.pi, 0.7), (3, -0.4, 5.0)):
        force.addTorsion(0, 1, 2, 3, n, phase, k)
    force.addTorsion(5, 4, 7, 8, 2, 0.3, 1.5)
    check(with_force(force))


def test_cmap():
    rng = np.random.default_rng(5)
    force = openmm.CMAPTorsionForce()
    for size in (24, 7):
        force.addMap(size, rng.normal(size=size * size))
    force.addTorsion(0, 0, 1, 2, 3, 1, 2, 3, 4)
    force.addTorsion(1, 4, 5, 6, 7, 5, 6, 7, 8)
    force.addTorsion(0, 8, 7, 6, 5, 4, 3, 2, 1)
    check(with_force(force))


def test_harmonic_bond_and_angle():
    bond, angle = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    bond.addBond(0, 1, 0.1, 1e5)
    bond.addBond(2, 1, 0.2, 3e4)
    angle.addAngle(0, 1, 2, 1.9, 400.0)
    angle.addAngle(4, 2, 7, np.pi, 100.0)
    system = with_force(bond)
    system.addForce(angle)
    check(system)


def custom_bond():
    force = openmm.CustomBondForce("D*(1-exp(-a*(r-r0)))^2 + lam*r")
    for name in ("D", "a", "r0"):
        force.addPerBondParameter(name)
    force.addGlobalParameter("lam", 0.8)
    force.addBond(0, 1, [100.0, 20.0, 0.1])
    force.addBond(3, 5, [50.0, 10.0, 0.2])
    return force


def custom_angle():
    force = openmm.CustomAngleForce("k*(cos(theta)-c0)^2 + select(step(theta-1), theta, 1)")
    force.addPerAngleParameter("k")
    force.addPerAngleParameter("c0")
    force.addAngle(0, 1, 2, [10.0, -0.3])
    force.addAngle(8, 3, 2, [7.0, 0.5])
    return force


def custom_torsion():
    force = openmm.CustomTorsionForce("k*min(d, 2*pi-d)^2; d=abs(theta-t0); pi=3.141592653589793")
    force.addPerTorsionParameter("k")
    force.addPerTorsionParameter("t0")
    force.addTorsion(0, 1, 2, 3, [10.0, -2.9])
    force.addTorsion(5, 1, 7, 3, [3.0, 1.5])
    return force


def custom_external():
    force = openmm.CustomExternalForce("k*((x-x0)^2+y^2)+g*z")
    force.addPerParticleParameter("k")
    force.addPerParticleParameter("x0")
    force.addGlobalParameter("g", -9.8)
    force.addParticle(4, [3.0, 0.1])
    force.addParticle(0, [1.0, -0.3])
    return force


def custom_compound():
    text = "k*(distance(p1,p3)-d0)^2*f(distance(p1,p2)) + angle(p1,p2,p4)*dihedral(p4,p3,p2,p1) + x1*y4 - z2"
    force = openmm.CustomCompoundBondForce(4, text)
    force.addPerBondParameter("k")
    force.addPerBondParameter("d0")
    force.addTabulatedFunction("f", openmm.Continuous1DFunction(np.linspace(0, 3, 12) ** 2, 0.0, 2.5))
    force.addBond([0, 4, 2, 7], [5.0, 0.3])
    force.addBond([1, 8, 3, 5], [2.0, 0.6])
    return force


def custom_nonbonded(groups=(), cutoff=None, switch=None):
    text = "4*eps*((s/r)^12-(s/r)^6)*lam + (asym1+asym2)*exp(-r) + q; s=0.5*(sig1+sig2); eps=sqrt(eps1*eps2); q=q1*q2/r"
    force = openmm.CustomNonbondedForce(text)
    rng = np.random.default_rng(9)
    for name in ("sig", "eps", "asym"):
        force.addPerParticleParameter(name)
    force.addGlobalParameter("lam", 0.8)
    force.addComputedValue("q", "sig*eps+lam")
    for _ in range(N_ATOMS):
        force.addParticle([rng.uniform(0.1, 0.3), rng.uniform(0, 1), rng.normal()])
    for i, j in ((0, 1), (5, 2)):
        force.addExclusion(i, j)
    for group in groups:
        force.addInteractionGroup(*group)
    if cutoff is not None:
        force.setNonbondedMethod(openmm.CustomNonbondedForce.CutoffNonPeriodic)
        force.setCutoffDistance(cutoff)
        force.setUseSwitchingFunction(switch is not None)
        force.setSwitchingDistance(switch or 0.0)
    return force


def custom_gb(method=0):
    """All three kinds of pair term, a chain of computed values, positions, a table and exclusions."""
    force = openmm.CustomGBForce()
    force.addPerParticleParameter("q")
    force.addPerParticleParameter("a")
    force.addGlobalParameter("lam", 0.8)
    force.addTabulatedFunction("f", openmm.Continuous1DFunction(np.cos(np.linspace(0, 3, 9)), 0.0, 3.0))
    pair, free, single = (
        openmm.CustomGBForce.ParticlePair,
        openmm.CustomGBForce.ParticlePairNoExclusions,
        openmm.CustomGBForce.SingleParticle,
    )
    force.addComputedValue("I", "a1*q2^2*exp(-r/a2)*f(r)", free if method else pair)
    force.addComputedValue("B", "1/(1+I^2)+a", single)
    force.addEnergyTerm("lam*q^2/B + 0.1*x*B + y^2*z", single)
    force.addEnergyTerm("q1*q2*a1*a2/sqrt(r^2+B1*B2*exp(-r^2/(4*B1*B2)))", free)
    force.addEnergyTerm("(I1*B2+I2*B1)*r", pair)
    rng = np.random.default_rng(4)
    for _ in range(N_ATOMS):
        force.addParticle([rng.normal(), rng.uniform(0.1, 0.4)])
    force.addExclusion(0, 3)
    force.addExclusion(6, 2)
    force.setNonbondedMethod(method)
    force.setCutoffDistance(0.7)
    return force


_BOTH = {0, 1, 2, 5}
CUSTOM = {
    "bond": custom_bond,
    "angle": custom_angle,
    "torsion": custom_torsion,
    "external": custom_external,
    "compound": custom_compound,
    "nonbonded": custom_nonbonded,
    "nonbonded-cutoff": lambda: custom_nonbonded(cutoff=0.6),
    "nonbonded-switch": lambda: custom_nonbonded(cutoff=0.6, switch=0.4),
    "nonbonded-groups": lambda: custom_nonbonded(groups=[(_BOTH, {5, 2, 7}), ({8}, {1, 2}), ({8}, {1})]),
    "gb": custom_gb,
    "gb-cutoff": lambda: custom_gb(1),
}


@pytest.mark.parametrize("name", sorted(CUSTOM))
def test_custom_forces(name):
    check(with_force(CUSTOM[name]()))


@pytest.mark.parametrize("name", ["bond", "external", "nonbonded", "gb"])
def test_global_parameters_of_custom_forces(name):
    parameter = {"bond": "lam", "external": "g", "nonbonded": "lam", "gb": "lam"}[name]
    before = check(with_force(CUSTOM[name]()))
    after = check(with_force(CUSTOM[name]()), parameters={parameter: 0.123})
    assert not torch.allclose(before, after)


def test_an_exclusion_left_out_would_be_seen():
    """Planted error: the same force without its exclusions has another energy."""
    one, other = custom_nonbonded(), custom_nonbonded()
    for k, (i, j) in enumerate(((3, 4), (6, 7))):
        other.setExclusionParticles(k, i, j)
    x = conformations()
    assert not torch.allclose(TorchPotential(with_force(one))(x), TorchPotential(with_force(other))(x))


def everything():
    system = empty_system()
    for force in (nonbonded(), gbsa(), *(make() for make in CUSTOM.values())):
        system.addForce(force)
    return system


def test_all_forces_in_one_system():
    """Pair tables are shared: the order of the forces must not matter."""
    check(everything())


def test_force_groups():
    system = everything()
    for k, force in enumerate(system.getForces()):
        force.setForceGroup(k % 3)
    x = conformations()
    total = TorchPotential(system)(x)
    parts = [TorchPotential(system, groups=[k]) for k in range(3)]
    for k, part in enumerate(parts):
        expected = OpenMMPotential(system, platform="Reference", groups=[k])(x)
        torch.testing.assert_close(part(x), expected, rtol=ENERGY_RTOL, atol=ENERGY_ATOL)
    torch.testing.assert_close(sum(part(x) for part in parts), total)


def test_forces_are_the_derivative_of_the_energy_twice_over():
    x = torch.tensor(conformations()[:2], requires_grad=True)
    potential = TorchPotential(everything())
    assert torch.autograd.gradcheck(potential, x, atol=1e-3, rtol=1e-5, fast_mode=True)
    y = torch.tensor(conformations()[:1], requires_grad=True)
    light = TorchPotential(with_force(gbsa()))
    assert torch.autograd.gradgradcheck(light, y, atol=1e-3, rtol=1e-5, fast_mode=True)


def test_neutral_forces_add_nothing():
    system = with_force(nonbonded())
    x = conformations()
    before = TorchPotential(system)(x)
    system.addForce(openmm.CMMotionRemover())
    system.addForce(openmm.AndersenThermostat(300, 1))
    system.addForce(openmm.MonteCarloBarostat(1, 300))
    system.addForce(openmm.MonteCarloAnisotropicBarostat((1, 1, 1), 300))
    system.addForce(openmm.MonteCarloFlexibleBarostat(1, 300))
    system.addForce(openmm.MonteCarloMembraneBarostat(1, 0, 300, 0, 0))
    torch.testing.assert_close(TorchPotential(system)(x), before, rtol=0, atol=0)


def test_constraints_are_reported():
    system = with_force(nonbonded())
    system.addConstraint(0, 1, 0.1)
    assert TorchPotential(system).constraints == OpenMMPotential(system).constraints == 1


def unsupported():
    pme = nonbonded(openmm.NonbondedForce.PME)
    periodic = openmm.HarmonicBondForce()
    periodic.addBond(0, 1, 0.1, 1.0)
    periodic.setUsesPeriodicBoundaryConditions(True)
    distance = openmm.CustomExternalForce("periodicdistance(x,y,z,0,0,0)")
    distance.addParticle(0, [])
    named = openmm.RMSDForce(np.zeros((N_ATOMS, 3)))
    named.setName("restraint")
    return {
        r"NonbondedForce.*PME": pme,
        r"HarmonicBondForce.*periodic": periodic,
        r"CustomExternalForce.*periodic": distance,
        r"RMSDForce 'restraint'": named,
        r"CustomCVForce": openmm.CustomCVForce("1"),
        r"CustomNonbondedForce.*CutoffPeriodic": _periodic(custom_nonbonded()),
        r"CustomGBForce.*CutoffPeriodic": _periodic(custom_gb()),
        r"GBSAOBCForce.*CutoffPeriodic": _periodic(gbsa()),
    }


def _periodic(force):
    force.setNonbondedMethod(2)
    return force


@pytest.mark.parametrize("pattern", sorted(unsupported()))
def test_unsupported_forces_are_named(pattern):
    with pytest.raises(UnsupportedForceError, match=rf"{pattern}.*OpenMMPotential"):
        TorchPotential(with_force(unsupported()[pattern]))


def test_virtual_sites_are_refused():
    system = with_force(nonbonded())
    system.setVirtualSite(2, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    with pytest.raises(UnsupportedForceError, match=r"particle 2 is a virtual site.*OpenMMPotential"):
        TorchPotential(system)


def test_unknown_parameter_is_named():
    for potential in (TorchPotential(everything()), OpenMMPotential(everything())):
        with pytest.raises(InputError, match=r"'nope'.*\['g', 'lam'\]"):
            potential.set_parameter("nope", 1.0)
        for wrong in (float("nan"), "a", None):
            with pytest.raises(InputError, match="number"):
                potential.set_parameter(next(iter(potential.parameters)), wrong)


def singular_geometries():
    """Coincident atoms, straight angles, collinear torsions, non-finite and absurd coordinates."""
    base = conformations()[0]
    coincident, straight, far, nan = base.copy(), base.copy(), base.copy(), base.copy()
    coincident[1] = coincident[0]
    straight[:5] = np.arange(5)[:, None] * np.array([0.1, 0.0, 0.0])
    everything_at_once = np.zeros_like(base)
    far[3] = 1e200
    nan[2, 1] = np.nan
    return np.stack([base, coincident, straight, everything_at_once, far, nan, np.inf * np.ones_like(base)])


def bonded_system():
    system = empty_system()
    bond, angle, torsion = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce(), openmm.PeriodicTorsionForce()
    for k in range(N_ATOMS - 1):
        bond.addBond(k, k + 1, 0.1, 1000.0)
    for k in range(N_ATOMS - 2):
        angle.addAngle(k, k + 1, k + 2, 2.0, 100.0)
    for k in range(N_ATOMS - 3):
        torsion.addTorsion(k, k + 1, k + 2, k + 3, 2, 0.1, 5.0)
    for force in (bond, angle, torsion):
        system.addForce(force)
    return system


SINGULAR = {
    "bonded": bonded_system,
    "angles-only": lambda: without_torsions(bonded_system()),
    "nonbonded": lambda: with_force(nonbonded()),
    "gbsa": lambda: with_force(gbsa()),
    "everything": everything,
}


def without_torsions(system):
    system.removeForce(2)
    return system


@pytest.mark.parametrize("name", sorted(SINGULAR))
def test_singular_geometries_are_finite_or_infinite_never_nan(name, dtype):
    potential = TorchPotential(SINGULAR[name](), dtype=dtype)
    x = torch.tensor(singular_geometries())
    energy, forces = potential.energy_and_forces(x)
    assert not torch.isnan(energy).any() and not torch.isneginf(energy).any()
    assert torch.isfinite(forces).all()
    assert torch.isfinite(energy[0])
    assert torch.isinf(energy[5:]).all() and (forces[5:] == 0).all()
    y = x.clone().requires_grad_(True)
    value = potential(y)
    finite = torch.isfinite(value)
    (gradient,) = torch.autograd.grad(value[finite].sum(), y, create_graph=True)
    assert torch.isfinite(gradient).all()
    (second,) = torch.autograd.grad((gradient**2).sum(), y)
    assert torch.isfinite(second[finite.nonzero()[:, 0]]).all()


def test_straight_angle_is_finite():
    """The energy of a straight angle is an ordinary number, and so are both its derivatives."""
    system = empty_system(3)
    angle = openmm.HarmonicAngleForce()
    angle.addAngle(0, 1, 2, 2.0, 100.0)
    system.addForce(angle)
    x = torch.tensor([[[-0.1, 0, 0], [0, 0, 0], [0.1, 0, 0]]], dtype=torch.float64, requires_grad=True)
    energy = TorchPotential(system)(x)
    np.testing.assert_allclose(energy.item(), 50.0 * (np.pi - 2.0) ** 2, rtol=1e-12)
    (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert torch.isfinite(gradient).all() and torch.isfinite(second).all()


# ------------------------------------------------------------------------------ where a mistake would stay unseen


def external(text):
    force = openmm.CustomExternalForce(text)
    for i in range(N_ATOMS):
        force.addParticle(i, [])
    return force


def compound(text):
    force = openmm.CustomCompoundBondForce(2, text)
    force.addBond([0, 1], [])
    return force


@pytest.mark.parametrize(
    "force", [external("5*z^2"), external("3"), compound("(z1-z2)^2")], ids=["a wall", "a constant", "heights"]
)
def test_expressions_that_leave_coordinates_out_have_forces(force):
    system = with_force(force)
    check(system)
    x = torch.tensor(conformations(), requires_grad=True)
    energy = TorchPotential(system)(x)
    (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    expected = -OpenMMPotential(system, "Reference").energy_and_forces(x)[1]
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
    assert torch.isfinite(torch.autograd.grad(gradient.square().sum() + 0 * x.sum(), x)[0]).all()


@pytest.mark.parametrize("text", ["sqrt(0.4-r)", "(1-(r/0.4)^2)^1.5", "(0.4-r)^2.5"])
@pytest.mark.parametrize("kind", ["nonbonded", "gb"])
def test_expressions_that_end_at_the_cutoff(kind, text):
    """Beyond it they are not defined, and must not spoil the forces of a frame that OpenMM evaluates."""
    if kind == "nonbonded":
        force = openmm.CustomNonbondedForce(text)
        method = openmm.CustomNonbondedForce.CutoffNonPeriodic
    else:
        force = openmm.CustomGBForce()
        force.addComputedValue("b", text, openmm.CustomGBForce.ParticlePairNoExclusions)
        force.addEnergyTerm("b^2", openmm.CustomGBForce.SingleParticle)
        method = openmm.CustomGBForce.CutoffNonPeriodic
    force.setNonbondedMethod(method)
    force.setCutoffDistance(0.4)
    for _ in range(N_ATOMS):
        force.addParticle([])
    energy = check(with_force(force))
    assert torch.isfinite(energy).all()


def test_direct_space_left_out_is_refused():
    force = nonbonded()
    force.setIncludeDirectSpace(False)
    with pytest.raises(UnsupportedForceError, match="direct space"):
        TorchPotential(with_force(force))


def test_a_force_in_python_is_refused_and_named():
    force = openmm.PythonForce(lambda state: (0.0, np.zeros((N_ATOMS, 3))))
    with pytest.raises(UnsupportedForceError, match="PythonForce"):
        TorchPotential(with_force(force))


def test_systems_that_no_context_takes_are_refused():
    system = empty_system()
    for default in (1.0, 2.0):
        force = openmm.CustomBondForce("k*r^2")
        force.addGlobalParameter("k", default)
        force.addBond(0, 1, [])
        system.addForce(force)
    for kind in (TorchPotential, OpenMMPotential):
        with pytest.raises(InputError, match="different defaults"):
            kind(system)
    torsion, bond, short = openmm.PeriodicTorsionForce(), openmm.HarmonicBondForce(), openmm.NonbondedForce()
    torsion.addTorsion(0, 1, 2, 3, -2, 0.0, 1.0)
    bond.addBond(0, N_ATOMS, 0.1, 100.0)
    short.addParticle(0.0, 0.3, 0.5)  # the other atoms forgotten
    groups, bare = openmm.CustomNonbondedForce("r"), openmm.CustomBondForce("k*r")
    for _ in range(N_ATOMS):
        groups.addParticle([])
    groups.addInteractionGroup([0, N_ATOMS + 1], [2])
    bare.addPerBondParameter("k")
    bare.addBond(0, 1, [])
    words = {"periodicity must be positive": torsion, "particle index for a bond: 9": bond, "as many particles": short,
             "not present in system": groups, "cannot write": bare}  # fmt: skip
    for text, force in words.items():
        with pytest.raises(InputError, match=text):
            TorchPotential(with_force(force))
    bond = openmm.HarmonicBondForce()
    bond.addBond(0, N_ATOMS, 0.1, 100.0)
    bond.setForceGroup(3)
    assert (TorchPotential(with_force(bond), groups=[0])(conformations()) == 0).all()  # it has no part


def test_parameters_of_forces_within_forces():
    """A Context has them, so that they can be set, and so that energies are not taken for those of the System alone."""
    spring = openmm.CustomBondForce("k*r")
    spring.addGlobalParameter("k", 2.0)
    spring.addBond(0, 1, [])
    variable, transfer = openmm.CustomCVForce("g*a"), openmm.ATMForce("u0")
    variable.addGlobalParameter("g", 1.0)
    variable.addCollectiveVariable("a", openmm.XmlSerializer.clone(spring))
    transfer.addForce(openmm.XmlSerializer.clone(spring))
    for _ in range(N_ATOMS):
        transfer.addParticle(openmm.Vec3(0, 0, 0))
    python = openmm.PythonForce(python_spring, {"k": 2.0})
    x = conformations()[:3]
    reach = np.linalg.norm(x[:, 0] - x[:, 1], axis=1)
    for force in (variable, transfer, python):
        system = with_force(force)
        assert has_global_parameters(system)
        potential = OpenMMPotential(system, platform="Reference")
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
        assert potential.parameters == dict(context.getParameters())
        for k in (2.0, 3.0):
            potential.set_parameter("k", k)
            assert potential(x).numpy() == pytest.approx(k * reach, rel=1e-9)
    assert not has_global_parameters(with_force(nonbonded()))


def python_spring(state):
    """k times the distance of the first two atoms."""
    x, k = state.getPositions(asNumpy=True)._value, state.getParameters()["k"]
    d = x[0] - x[1]
    forces = np.zeros(x.shape)
    forces[0] = -k * d / np.linalg.norm(d)
    forces[1] = -forces[0]
    return k * float(np.linalg.norm(d)), forces


def test_offsets_that_platforms_read_differently_are_refused():
    force = nonbonded()
    force.addGlobalParameter("a", 0.5)
    for _ in range(2):
        force.addParticleParameterOffset("a", 0, 0.1, 0.0, 0.0)
    with pytest.raises(UnsupportedForceError, match="particle 0 of the NonbondedForce has two offsets"):
        TorchPotential(with_force(force))


def test_a_depth_below_zero_by_an_offset_is_no_number():
    """As in OpenMM, which takes the root of each particle's."""
    force = nonbonded()
    force.addGlobalParameter("a", 0.0)
    for atom in (3, 5):
        force.addParticleParameterOffset("a", atom, 0.0, 0.0, 1.0)
    system, x = with_force(force), conformations()[:2]
    torch_own, openmm_own = TorchPotential(system), OpenMMPotential(system, platform="Reference")
    assert torch.isfinite(torch_own(x)).all()
    for potential in (torch_own, openmm_own):
        potential.set_parameter("a", -2.0)
        assert torch.isinf(potential(x)).all()


def test_atoms_beyond_all_measure_have_no_energy_on_any_platform():
    system, x = with_force(nonbonded()), conformations()[:3]
    x[1, 4, 0] = 1e12
    for potential in (TorchPotential(system), *(OpenMMPotential(system, platform=p) for p in ("Reference", "CPU"))):
        assert torch.isfinite(potential(x)).tolist() == [True, False, True]


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e6])
def test_torsions_in_single_precision_at_any_scale(scale):
    """A torsion knows no lengths; those to the eighth power leave single precision."""
    force = openmm.PeriodicTorsionForce()
    force.addTorsion(0, 1, 2, 3, 2, 0.4, 3.0)
    x = torch.as_tensor(conformations()[:4])
    system = with_force(force)
    exact = TorchPotential(system)
    energy, forces = TorchPotential(system, dtype=torch.float32).energy_and_forces(scale * x.float())
    assert energy.double().numpy() == pytest.approx(exact(x).numpy(), abs=1e-4)
    own = exact.energy_and_forces(scale * x)[1]
    assert (forces - own).abs().max() < 1e-3 * own.abs().max()


@pytest.mark.slow
def test_the_first_calls_of_two_threads_are_compiled():
    force = openmm.HarmonicBondForce()
    force.addBond(0, 1, 0.1, 100.0)
    system, x, found = with_force(force), conformations(), []
    potential, plain = TorchPotential(system, compile=True), TorchPotential(system).energy_and_forces(x)[1]
    start = threading.Barrier(2)

    def work():
        start.wait()
        found.append(potential.energy_and_forces(x)[1])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(forces, plain) for forces in found) and len(found) == 2
    assert not potential._functions[True].failed


def test_parameters_of_forces_without_a_part_are_known():
    """A Context knows them too: of an empty force, and of one whose group is left out."""
    empty, other = openmm.CustomBondForce("k*r^2"), openmm.CustomBondForce("m*r^2")
    empty.addGlobalParameter("k", 1.0)
    other.addGlobalParameter("m", 2.0)
    other.addBond(0, 1, [])
    other.setForceGroup(3)
    system = with_force(empty)
    system.addForce(other)
    potential = TorchPotential(system, groups=[0])
    assert potential.parameters == OpenMMPotential(system).parameters == {"k": 1.0, "m": 2.0}
    potential.set_parameter("m", 5.0)
    assert (potential(conformations()) == 0).all()


def test_groups_and_executors_are_checked():
    for kind in (TorchPotential, OpenMMPotential):
        with pytest.raises(InputError, match="group 40"):
            kind(empty_system(), groups=[40])
    with pytest.raises(InputError, match="Executor"):
        OpenMMPotential(empty_system(), executor=[4])


def test_a_table_of_a_constant_keeps_the_precision():
    force = openmm.CustomCompoundBondForce(2, "f(1, x1)")
    values = np.linspace(0.0, 1.0, 16)
    force.addTabulatedFunction("f", openmm.Continuous2DFunction(4, 4, values, -2.0, 2.0, -2.0, 2.0))
    force.addBond([0, 1], [])
    system = with_force(force)
    energy = TorchPotential(system, dtype=torch.float32)(conformations())
    assert energy.dtype == torch.float32
    check(system)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives_near_a_straight_angle_are_finite(dtype):
    force = openmm.HarmonicAngleForce()
    force.addAngle(0, 1, 2, 2.0, 100.0)
    potential = TorchPotential(with_force(force, 3), dtype=dtype)
    for off in (0.0, 1e-20, 1e-16, 1e-12, 1e-8):
        x = torch.tensor([[[0, 0, 0], [0.1, 0, 0], [0.2, off, 0]]], dtype=dtype, requires_grad=True)
        energy = potential(x).sum()
        (gradient,) = torch.autograd.grad(energy, x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        assert all(torch.isfinite(t).all() for t in (energy, gradient, second))
