"""Proposals: measure, energies, refusals."""

import math
from types import SimpleNamespace

import numpy as np
import openmm
import pytest
import torch
from analytic_molecules import TEMPERATURE, Chain, GaussianFlow, Well, cartesian_gaussian, openmm_energy, z_scores
from openmm import unit

from openmm_regflow import flows
from openmm_regflow.errors import IncompatibleFlowError, InputError, UnsupportedForceError
from openmm_regflow.fingerprints import fingerprint
from openmm_regflow.potentials import OpenMMPotential, TorchPotential
from openmm_regflow.proposals import ABSURD_ENERGY, FlowProposal, ProposalBatch
from openmm_regflow.refusals import check_supported
from openmm_regflow.sampling import FlowStep
from openmm_regflow.systems import load_system
from openmm_regflow.units import thermal_energy


@pytest.fixture(scope="module")
def molecule():
    return Chain(3, bond_width=0.04, angle_width=0.5)


@pytest.fixture(scope="module")
def proposal(molecule):
    return FlowProposal(cartesian_gaussian(molecule), TorchPotential(molecule.system), TEMPERATURE)


def internal_flow(molecule, **options):
    data = molecule.sample(2000, torch.Generator().manual_seed(1))
    return flows.spline(flows.coordinates_for(molecule.topology, data), n_layers=2, hidden=16, **options)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_sample_agrees_with_log_q_and_energies(proposal, molecule):
    batch = proposal.sample(50, generator())
    assert batch.positions.shape == (50, 3, 3)
    torch.testing.assert_close(proposal.log_q(batch.positions), batch.log_q)
    energies = openmm_energy(molecule.system, batch.positions)
    np.testing.assert_allclose(batch.u * thermal_energy(TEMPERATURE), energies, rtol=1e-9)
    torch.testing.assert_close(batch.log_weights, -batch.u - batch.log_q)


def test_quantities_keep_their_unit(proposal, molecule):
    """Angstrom are not nanometres, in densities, energies and steps."""
    x = molecule.sample(5, generator())
    given = unit.Quantity(10.0 * x.numpy(), unit.angstrom)
    torch.testing.assert_close(proposal.log_q(given), proposal.log_q(x))
    torch.testing.assert_close(proposal.reduced_potential(given), proposal.reduced_potential(x))
    steps = [FlowStep(proposal, generator=generator(1)) for _ in range(2)]
    plain = [steps[0](x[0].numpy(), 350.0) for _ in range(20)]
    other = [steps[1](unit.Quantity(10.0 * x[0].numpy(), unit.angstrom), 350.0 * unit.kelvin) for _ in range(20)]
    assert any(new is not None for new in plain)
    for a, b in zip(plain, other):
        assert (a is None) == (b is None) and (a is None or np.allclose(a, b))


def test_chunks_change_nothing(molecule):
    flow, potential = cartesian_gaussian(molecule), TorchPotential(molecule.system)
    whole = FlowProposal(flow, potential, TEMPERATURE).evaluate(molecule.sample(25, generator()))
    parts = FlowProposal(flow, potential, TEMPERATURE, chunk_size=7).evaluate(molecule.sample(25, generator()))
    torch.testing.assert_close(parts.log_q, whole.log_q)
    torch.testing.assert_close(parts.u, whole.u)


def test_same_seed_same_samples(proposal):
    a, b = proposal.sample(9, generator(3)), proposal.sample(9, generator(3))
    assert torch.equal(a.positions, b.positions) and torch.equal(a.log_q, b.log_q)


@pytest.mark.parametrize("coordinates", ["cartesian", "internal"])
def test_importance_weights_recover_exact_expectations(coordinates):
    """-u - log q is the whole weight: self-normalised averages agree with quadrature for both measures."""
    molecule = Chain(3, bond_width=0.04, angle_width=0.5)
    flow = cartesian_gaussian(molecule) if coordinates == "cartesian" else internal_flow(Chain()).double()
    molecule = molecule if coordinates == "cartesian" else Chain()
    batch = FlowProposal(flow, TorchPotential(molecule.system), TEMPERATURE).sample(40000, generator())
    weights = torch.softmax(batch.log_weights, 0)
    for name, (function, exact) in molecule.observables().items():
        values = function(batch.positions)
        mean = (weights * values).sum()
        error = ((weights * (values - mean)) ** 2).sum().sqrt()  # delta method
        assert abs(mean - exact) < 4.5 * error, name


def test_redraw_frame_keeps_the_shape_and_forgets_the_frame(proposal, molecule):
    x = molecule.sample(20000, generator())
    y = proposal.redraw_frame(x + 7.0, generator(1))
    torch.testing.assert_close(torch.cdist(y, y), torch.cdist(x, x), atol=1e-7, rtol=0)
    torch.testing.assert_close(torch.det(y - y.mean(1, keepdim=True)), torch.det(x - x.mean(1, keepdim=True)))
    arm = (y[:, 1] - y[:, 0]) / (y[:, 1] - y[:, 0]).norm(dim=1, keepdim=True)
    centre = y.mean(1) / proposal.flow.com_std
    # A uniform direction has component mean 0 and mean square 1/3; the centre is a standard Gaussian.
    oracle = {"arm": (lambda v: v[:, 0], 0.0), "arm squared": (lambda v: v[:, 2] ** 2, 1 / 3)}
    assert max(map(abs, z_scores(arm, oracle).values())) < 4.5
    oracle = {"centre": (lambda v: v[:, 1], 0.0), "centre squared": (lambda v: v[:, 0] ** 2, 1.0)}
    assert max(map(abs, z_scores(centre, oracle).values())) < 4.5


def test_internal_flow_keeps_its_frame_and_density():
    molecule = Chain()
    proposal = FlowProposal(internal_flow(molecule).double(), TorchPotential(molecule.system), TEMPERATURE)
    x = molecule.sample(10, generator())
    assert proposal.frame == "free"
    torch.testing.assert_close(proposal.redraw_frame(x, generator()), x)
    torch.testing.assert_close(proposal.log_q(x), proposal.log_q(x.flip(0) + 0.5).flip(0))


def test_frame_is_found_out(proposal):
    well = Well()
    flow = GaussianFlow(torch.zeros(1, 3), 0.04 * torch.eye(3))
    fixed = FlowProposal(flow, well, TEMPERATURE)
    assert proposal.frame == "free" and fixed.frame == "fixed"
    x = well.sample(4, generator())
    torch.testing.assert_close(fixed.redraw_frame(x, generator()), x)
    torch.testing.assert_close(fixed.log_q(x), flow.log_prob(x))


@pytest.mark.parametrize("side", ["x", "-x", "y", "-y", "z", "-z"])
def test_a_wall_far_away_is_found_whatever_force_makes_it(side, molecule):
    """A force that is not known for it by its type, felt on one side alone and beyond a few nanometres."""
    system = openmm.XmlSerializer.clone(molecule.system)
    wall = openmm.CustomCompoundBondForce(1, f"1000*max(0, {side}1-5)^2")
    wall.addBond([0], [])
    system.addForce(wall)
    flow = cartesian_gaussian(molecule)
    assert FlowProposal(flow, OpenMMPotential(system), TEMPERATURE).frame == "fixed"
    assert FlowProposal(flow, OpenMMPotential(molecule.system), TEMPERATURE).frame == "free"


def test_a_flow_of_a_held_molecule_is_refused_where_nothing_holds_one(molecule):
    x = molecule.sample(1000, generator())
    flow = flows.real_nvp(flows.coordinates_for(None, x, "cartesian", held=True), n_layers=2, hidden=8)
    with pytest.raises(IncompatibleFlowError, match="nothing holds this one"):
        FlowProposal(flow, TorchPotential(molecule.system), TEMPERATURE).sample(2)
    free = FlowProposal(cartesian_gaussian(molecule), TorchPotential(molecule.system), TEMPERATURE)
    assert free.frame == "free"
    with pytest.raises(IncompatibleFlowError, match="nothing holds this one"):
        free.with_flow(flow).sample(2)


def test_internal_flow_in_an_external_field_is_refused():
    molecule = Chain()
    force = openmm.CustomExternalForce("100*x^2")
    force.addParticle(0, [])
    molecule.system.addForce(force)
    with pytest.raises(UnsupportedForceError, match="Cartesian"):
        FlowProposal(internal_flow(molecule), OpenMMPotential(molecule.system), TEMPERATURE).sample(2)


def test_frame_without_any_finite_energy_follows_the_forces():
    system = Well().system
    hopeless = SimpleNamespace(system=system, n_atoms=1)

    class Infinite:
        n_atoms, system = 1, hopeless.system

        def __call__(self, x):
            return torch.full((len(x),), torch.inf)

    flow = GaussianFlow(torch.zeros(1, 3), torch.eye(3))
    assert FlowProposal(flow, Infinite(), TEMPERATURE).frame == "fixed"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e9 * thermal_energy(TEMPERATURE)])
def test_impossible_energies_become_infinite_and_are_counted(bad):
    def potential(x):
        return torch.where(x[:, 0, 0] > 0, bad, x[:, 0, 1] ** 2)

    flow = GaussianFlow(torch.zeros(1, 3), torch.eye(3))
    proposal = FlowProposal(flow, potential, TEMPERATURE, frame="fixed")
    batch = proposal.sample(100, generator())
    wrong = batch.positions[:, 0, 0] > 0
    assert torch.isposinf(batch.u[wrong]).all() and torch.isfinite(batch.u[~wrong]).all()
    assert proposal.n_impossible == int(wrong.sum()) > 0


def test_absurd_is_relative_to_the_best():
    flow = GaussianFlow(torch.zeros(1, 3), torch.eye(3))
    shifted = FlowProposal(flow, lambda x: x[:, 0, 0] + 1e12, TEMPERATURE, frame="fixed")
    assert torch.isfinite(shifted.sample(20, generator()).u).all()
    assert ABSURD_ENERGY == 1e6


def test_non_finite_positions_never_reach_the_potential():
    def potential(x):
        if not torch.isfinite(x).all():
            raise RuntimeError("a non-finite position")
        return x[:, 0, 0] ** 2

    proposal = FlowProposal(GaussianFlow(torch.zeros(1, 3), torch.eye(3)), potential, TEMPERATURE, frame="fixed")
    x = torch.zeros(3, 1, 3)
    x[1, 0, 2] = torch.nan
    assert torch.isinf(proposal.reduced_potential(x)).tolist() == [False, True, False]
    assert torch.isinf(proposal.reduced_potential(x[1:2])).all()


def flow_for(molecule, *, system=None, temperature=None):
    flow = cartesian_gaussian(molecule)
    flow.metadata = flows.FlowMetadata(
        fingerprint=None if system is None else fingerprint(system), temperature=temperature
    )
    return flow


@pytest.mark.parametrize(
    ("made_for", "difference"),
    [
        ({"system": Chain(3, angle_width=0.3).system}, "HarmonicAngleForce"),
        ({"system": Chain(4).system}, "4 atoms expected, 3 found"),
        ({"temperature": 400.0}, "trained at 400 K, used at 300 K"),
    ],
)
def test_a_flow_of_another_state_is_refused_and_the_difference_named(molecule, made_for, difference):
    flow, potential = flow_for(molecule, **made_for), TorchPotential(molecule.system)
    with pytest.raises(IncompatibleFlowError, match=difference):
        FlowProposal(flow, potential, TEMPERATURE)
    assert FlowProposal(flow, potential, TEMPERATURE, allow_mismatch=True).sample(2).u.shape == (2,)


def test_the_right_flow_is_taken(molecule):
    flow = flow_for(molecule, system=molecule.system, temperature=TEMPERATURE)
    FlowProposal(flow, TorchPotential(molecule.system), TEMPERATURE * openmm.unit.kelvin)


def test_atom_counts_must_agree_whatever_the_options(molecule):
    with pytest.raises(IncompatibleFlowError, match="3 atoms, the potential has 4"):
        FlowProposal(cartesian_gaussian(molecule), TorchPotential(Chain(4).system), 300, allow_mismatch=True)


def constrained():
    system = Chain(3).system
    system.addConstraint(0, 1, 0.15)
    return system


def virtual():
    system = Chain(3).system
    system.addParticle(0.0)
    system.setVirtualSite(3, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    return system


def periodic():
    system = Chain(3).system
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.PME)
    for _ in range(3):
        force.addParticle(0.0, 0.1, 0.0)
    system.addForce(force)
    return system


@pytest.mark.parametrize(
    ("build", "message"), [(constrained, "constraints=None"), (virtual, "virtual site"), (periodic, "NoCutoff")]
)
def test_systems_that_are_not_covered_are_refused_with_a_remedy(build, message):
    with pytest.raises(UnsupportedForceError, match=message):
        check_supported(build())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "above zero"),
        ({"temperature": 300.0, "frame": "loose"}, "'auto', 'free' or 'fixed'"),
        ({"temperature": 300.0, "chunk_size": 0}, "at least one"),
    ],
)
def test_bad_arguments(molecule, arguments, message):
    with pytest.raises(InputError, match=message):
        FlowProposal(cartesian_gaussian(molecule), TorchPotential(molecule.system), **arguments)


def test_bad_shapes(proposal):
    with pytest.raises(InputError, match=r"\(n, 3, 3\)"):
        proposal.log_q(np.zeros((4, 2, 3)))
    with pytest.raises(InputError, match="at least one"):
        proposal.sample(0)


def test_batch_scaling_and_rows():
    batch = ProposalBatch(torch.zeros(3, 1, 3), torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0]))
    assert batch.scaled(0.5).u.tolist() == [1.5, 2.0, 2.5]
    assert batch.rows(slice(1, 3)).log_q.tolist() == [1.0, 2.0]


def test_rounding_of_a_single_precision_platform_is_no_external_field():
    """Energies of a turned tripeptide differ in their seventh digit on the CPU platform; its frame is free."""
    molecule = load_system("alanine-tripeptide")
    noise = torch.randn(400, 33, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.as_tensor(molecule.positions) + 0.003 * noise
    flow = flows.spline(flows.coordinates_for(molecule.topology, x), n_layers=2, hidden=16)
    potential = OpenMMPotential(molecule.system, "CPU", properties={"Threads": "1"})
    assert FlowProposal(flow, potential, molecule.temperature).frame == "free"
    assert potential.on_platform("Reference").parameters == potential.parameters


def untrained_dipeptide():
    """A Cartesian flow and a copy of the System."""
    molecule = load_system("alanine-dipeptide")
    data = torch.as_tensor(molecule.positions) + 0.003 * torch.randn(400, 22, 3, generator=generator()).double()
    flow = flows.real_nvp(flows.coordinates_for(molecule.topology, data, "cartesian"))
    return flow, openmm.XmlSerializer.clone(molecule.system)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("expression", ["25*(x^2+y^2+z^2)", "1000*max(0, sqrt(x^2+y^2+z^2)-20)^2"])
def test_a_restraint_is_found_beside_clashes_and_where_it_is_zero(dtype, expression):
    """An untrained flow puts atoms on each other: a weak field is nothing beside energies of 1e6 kT in float32."""
    flow, system = untrained_dipeptide()
    field = openmm.CustomExternalForce(expression)
    field.setForceGroup(7)
    field.addParticle(8, [])
    system.addForce(field)
    assert FlowProposal(flow, TorchPotential(system, dtype), TEMPERATURE).frame == "fixed"
    assert FlowProposal(flow, TorchPotential(system, dtype, groups=[0]), TEMPERATURE).frame == "free"
    assert FlowProposal(flow, OpenMMPotential(system, "CPU", groups=[0]), TEMPERATURE).frame == "free"


def test_a_field_in_another_force_is_found_in_double_precision():
    """Clashes of some 1e5 kT in float32 would hide it."""
    flow, system = untrained_dipeptide()
    force = openmm.CustomCompoundBondForce(2, "field*(x1-x2)")
    force.addGlobalParameter("field", 0.0)
    force.addBond([1, 21], [])
    system.addForce(force)
    potential = TorchPotential(system, torch.float32)
    assert FlowProposal(flow, potential, TEMPERATURE).frame == "free"
    potential.set_parameter("field", 7.0)
    assert FlowProposal(flow, potential, TEMPERATURE).frame == "fixed"


def test_hydrogens_numbered_the_other_way_round_have_no_place_in_a_flow():
    """openmmtools numbers those of its alanine dipeptide so: moves were never accepted, and refinement did nothing."""
    molecule = load_system("alanine-dipeptide")
    flow = flows.Flow.load(molecule.folder / "flow.safetensors")
    proposal = FlowProposal(flow, TorchPotential(molecule.system), molecule.temperature)
    x = torch.as_tensor(molecule.reference("test")[:50]).double()
    order = list(range(22))
    order[12], order[13] = order[13], order[12]
    proposal.check_labels(x)
    with pytest.raises(InputError, match="the frames have hydrogens of a methyl numbered the other way round"):
        proposal.check_labels(x[:, order], "the frames")
    with pytest.raises(InputError, match="the state's positions have hydrogens"):
        FlowStep(proposal)(x[0, order].numpy())
