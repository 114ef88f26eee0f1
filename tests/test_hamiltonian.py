"""Hamiltonian Monte Carlo: invariant on a molecule with known answers, and seen to fail when an error is planted."""

import pytest
import torch
from analytic_molecules import KT, MASSES, TEMPERATURE, Chain, z_scores

import openmm_regflow as rf
from openmm_regflow.ensemble import ReducedPotential, frame_mover
from openmm_regflow.errors import InputError
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.sampling import HamiltonianMonteCarlo

#: Standard errors: 1e-5 two-sided probability per figure.
SIGMAS = 4.5
CHAIN = Chain(4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def kernel(cls=HamiltonianMonteCarlo, timestep=0.02, n_steps=5, **options):
    return cls(TorchPotential(CHAIN.system), TEMPERATURE, MASSES, timestep, n_steps, **options)


class NeverRejects(HamiltonianMonteCarlo):
    """Plain dynamics: the error of the time step stays in."""

    def _total(self, u, v):
        return torch.zeros_like(u, dtype=torch.float64)


class ForgetsMomenta(HamiltonianMonteCarlo):
    """Potential energy alone decides."""

    def _total(self, u, v):
        return u.double()


def worst(cls, n=10_000, n_trajectories=12):
    """Largest z-score of all observables of independent chains, begun in equilibrium."""
    g, step = generator(1), kernel(cls)
    x = CHAIN.sample(n, g)
    for _ in range(n_trajectories):
        x = step(x, g)
    scores = z_scores(x, CHAIN.observables())
    return max(abs(z) for z in scores.values()), step


def test_equilibrium_stays():
    z, step = worst(HamiltonianMonteCarlo)
    assert z < SIGMAS
    assert 0.3 < step.acceptance < 0.95  # the time step is large enough for rejections to matter
    assert step.n_energies == 10_000 * 12 * 6


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_equilibrium_stays_on_the_gpu(device):
    """With random numbers of the GPU, and with those of a generator on the CPU."""
    g = torch.Generator(device).manual_seed(1)
    step = HamiltonianMonteCarlo(TorchPotential(CHAIN.system, device="cuda"), TEMPERATURE, MASSES, 0.02, 5)
    x = CHAIN.sample(10_000, generator(1)).cuda()
    for _ in range(12):
        x = step(x, g)
    assert x.is_cuda and 0.3 < step.acceptance < 0.95
    assert max(abs(z) for z in z_scores(x.cpu(), CHAIN.observables()).values()) < SIGMAS


@pytest.mark.parametrize("planted", [NeverRejects, ForgetsMomenta])
def test_a_planted_error_is_seen(planted):
    assert worst(planted)[0] > 2 * SIGMAS


def test_equilibrium_is_reached():
    """From one and the same conformation to every moment and basin."""
    g, step = generator(2), kernel()
    x = CHAIN.sample(1, g).repeat(2000, 1, 1)
    for _ in range(300):
        x = step(x, g)
    assert max(abs(z) for z in z_scores(x, CHAIN.observables()).values()) < SIGMAS


def test_a_trajectory_that_blows_up_is_a_rejection():
    step = kernel(timestep=5.0)
    x = CHAIN.sample(50, generator(3))
    assert torch.equal(step(x, generator(4)), x) and step.acceptance == 0.0


def test_tuning_finds_the_acceptance_and_moves_nothing():
    g, step = generator(5), kernel(timestep=0.002)
    x = CHAIN.sample(500, g)
    before = x.clone()
    step.tune(x, g)
    assert torch.equal(x, before)
    rates = []
    for _ in range(10):
        step(x, g)
        rates.append(step.acceptance)
    # Ten binomial means of 500, and a time step that varies by a fifth.
    assert abs(sum(rates) / 10 - 0.8) < 0.12


def test_frames_of_a_peptide_keep_their_energy():
    """The kernel that training uses: mean energy of the reference before and after, with the error of the change."""
    mol = rf.load_system("alanine-dipeptide")
    x = torch.as_tensor(mol.reference("test")[::20]).double()
    potential, mover = ReducedPotential(mol), frame_mover(mol, x)
    moved, n_energies = mover(x, generator(6))
    change = (potential(moved) - potential(x)).numpy()
    assert n_energies > len(x)
    assert abs(change.mean()) < SIGMAS * change.std() / len(x) ** 0.5
    assert change.std() > 1.0  # [kT]: they did move


def test_a_kernel_made_anew_goes_on_with_the_same_moves():
    """As after an interruption: the time step depends on the frames given, not on where the chains are by then."""
    mol = rf.load_system("alanine-dipeptide")
    x = torch.as_tensor(mol.reference("test")[:20]).double()
    whole, g = frame_mover(mol, x), generator(7)
    first, _ = whole(x, g)
    second, _ = whole(first, g)
    g = generator(7)
    again, _ = frame_mover(mol, x)(x, g)
    resumed, _ = frame_mover(mol, x)(again, g)
    assert torch.equal(resumed, second) and not torch.equal(second, first)


def test_constraints_and_bad_settings_are_refused():
    constrained = CHAIN.system.__copy__()
    constrained.addConstraint(0, 1, 0.15)
    with pytest.raises(InputError, match="1 constraints"):
        HamiltonianMonteCarlo(TorchPotential(constrained), TEMPERATURE, MASSES)
    for options in ({"timestep": 0.0}, {"n_steps": 0}):
        with pytest.raises(InputError, match="positive"):
            kernel(**options)
    with pytest.raises(InputError, match="positive"):
        HamiltonianMonteCarlo(TorchPotential(CHAIN.system), TEMPERATURE, (0.0, *MASSES[1:]))
    assert pytest.approx(KT) == kernel().kt
