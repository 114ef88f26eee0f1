"""Sample metrics against mdtraj, SciPy and exact values."""

import math

import mdtraj
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.signal import lfilter
from scipy.stats import wasserstein_distance

from openmm_regflow import metrics
from openmm_regflow.errors import InputError, InsufficientDataError

QUADRUPLES = np.array([[0, 1, 2, 3], [3, 0, 4, 1], [5, 4, 2, 1]])


def random_positions(n=200, n_atoms=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, n_atoms, 3))


def from_internal(phi):
    """Four atoms with torsion ``phi``: unit bonds at right angles."""
    return np.array([[[1, 0, 0], [0, 0, 0], [0, 0, 1], [math.cos(p), math.sin(p), 1]] for p in phi], dtype=float)


def test_dihedrals_equal_mdtraj():
    x = random_positions()
    trajectory = mdtraj.Trajectory(x, None)
    expected = mdtraj.compute_dihedrals(trajectory, QUADRUPLES, opt=False)
    # mdtraj keeps float32 positions and sums: its error grows as a plane's normal vanishes, hence the median.
    difference = metrics.wrap(metrics.dihedrals(x.astype(np.float32).astype(np.float64), QUADRUPLES) - expected)
    assert np.abs(difference).max() < 2e-4
    assert np.median(np.abs(difference)) < 10 * np.finfo(np.float32).eps


@given(st.lists(st.floats(-math.pi, math.pi), min_size=1, max_size=20))
def test_dihedral_of_a_built_molecule(angles):
    # Looking along the middle bond (towards +z) the far atom turned by +phi is turned clockwise: positive.
    phi = np.asarray(angles)
    found = metrics.dihedrals(from_internal(phi), [[0, 1, 2, 3]])[:, 0]
    assert (found > -math.pi).all() and (found <= math.pi).all()
    assert np.abs(metrics.wrap(found - phi)).max() < 1e-14 * 10


def test_trans_is_plus_pi_never_minus_pi():
    for zero in (0.0, -0.0):
        x = np.array([[[1, zero, 0], [0, 0, 0], [0, 0, 1], [-1, zero, 1]]])
        assert metrics.dihedrals(x, [[0, 1, 2, 3]])[0, 0] == math.pi


def test_tensor_dihedrals_equal_array_dihedrals_and_have_gradients():
    x = random_positions()
    tensor = torch.tensor(x, requires_grad=True)
    angles = metrics.dihedrals(tensor, QUADRUPLES)
    assert np.abs(angles.detach().numpy() - metrics.dihedrals(x, QUADRUPLES)).max() < 1e-12
    angles.sum().backward()
    assert torch.isfinite(tensor.grad).all() and tensor.grad.abs().sum() > 0


def test_mirror_images_change_the_sign_of_torsions_and_chirality():
    x = random_positions()
    mirrored = x * np.array([1, 1, -1])
    assert np.abs(metrics.dihedrals(x, QUADRUPLES) + metrics.dihedrals(mirrored, QUADRUPLES)).max() < 1e-12
    centres = [[0, 1, 2, 3]]
    assert np.array_equal(metrics.wrong_chirality(x, centres), ~metrics.wrong_chirality(mirrored, centres))


def l_alanine(n=1):
    """CA, N, C, CB of an L residue by the CORN rule: seen from H, CO - R - N runs clockwise."""
    ca = np.zeros(3)
    # H points to +z (the observer); clockwise seen from +z is a falling polar angle.
    polar = {"C": 0.0, "CB": -2 * math.pi / 3, "N": -4 * math.pi / 3}
    atom = {k: np.array([math.cos(a), math.sin(a), -0.35]) for k, a in polar.items()}
    return np.tile(np.stack([ca, atom["N"], atom["C"], atom["CB"]])[None], (n, 1, 1))


def test_l_is_right_and_d_is_wrong():
    x = np.concatenate([l_alanine(3), -l_alanine(1)])
    centres = [[0, 1, 2, 3]]
    assert list(metrics.wrong_chirality(x, centres)) == [False, False, False, True]
    assert metrics.wrong_chirality_fraction(x, centres) == 0.25
    assert metrics.wrong_chirality_fraction(x, centres, [0, 0, 0, -np.inf]) == 0.0
    x[0, 0, 0] = np.nan
    assert metrics.wrong_chirality_fraction(x, centres) == 0.5
    assert metrics.wrong_chirality_fraction(x, np.zeros((0, 4))) == 0.0


@pytest.mark.parametrize("positions", [np.zeros((3, 4)), np.zeros((2, 3, 4, 3)), np.zeros((2, 6, 2))])
def test_wrong_shapes_are_refused(positions):
    with pytest.raises(InputError):
        metrics.dihedrals(positions, QUADRUPLES)


def test_atoms_out_of_range_are_refused():
    with pytest.raises(InputError, match="quadruples"):
        metrics.dihedrals(random_positions(n_atoms=5), QUADRUPLES)


@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=30),
    st.lists(st.floats(-50, 50), min_size=1, max_size=30),
    st.integers(0, 10_000),
)
@settings(max_examples=60)
def test_first_order_distance_equals_scipy(u, v, seed):
    log_w = np.random.default_rng(seed).normal(size=len(u))
    ours = metrics.energy_wasserstein(u, v, log_weights=log_w)
    assert ours == pytest.approx(wasserstein_distance(u, v, np.exp(log_w)), abs=1e-11)


@pytest.mark.parametrize("n", [1043, 3000, 9999])
def test_weights_whose_sum_is_rounded_past_one(n):
    rng = np.random.default_rng(n)
    u, v = rng.gamma(20.0, size=n), rng.gamma(20.0, size=1043)
    log_w = np.append(rng.normal(0, 6, n - 40), np.full(40, -60.0))
    for order in (1, 2):
        assert math.isfinite(metrics.energy_wasserstein(u, v, order=order, log_weights=log_w))
    ours = metrics.energy_wasserstein(u, v, log_weights=log_w)
    assert ours == pytest.approx(wasserstein_distance(u, v, np.exp(log_w)), rel=1e-9)


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=8), st.integers(0, 10_000))
@settings(max_examples=60)
def test_second_order_distance_equals_the_best_assignment(u, seed):
    v = np.random.default_rng(seed).normal(size=len(u))
    cost = np.square(np.subtract.outer(np.asarray(u), v))
    best = math.sqrt(cost[linear_sum_assignment(cost)].mean())
    assert metrics.energy_wasserstein(u, v, order=2) == pytest.approx(best, abs=1e-9)


def test_a_shift_moves_energies_by_itself():
    u = np.random.default_rng(0).gamma(10.0, size=5000)
    for order in (1, 2):
        assert metrics.energy_wasserstein(u + 3.5, u, order=order) == pytest.approx(3.5, rel=1e-12)


def test_reweighting_removes_the_energy_distance():
    rng = np.random.default_rng(1)
    x, reference = 1.4 * rng.standard_normal((2, 20_000))
    reference /= 1.4
    log_w = -0.5 * x**2 + 0.5 * (x / 1.4) ** 2
    plain = metrics.energy_wasserstein(0.5 * x**2, 0.5 * reference**2)
    weighted = metrics.energy_wasserstein(0.5 * x**2, 0.5 * reference**2, log_weights=log_w)
    assert plain == pytest.approx(0.5 * (1.4**2 - 1), rel=0.1)
    assert weighted < 0.1 * plain


def test_infinite_energies():
    assert metrics.energy_wasserstein([1.0, np.inf], [1.0, 2.0]) == math.inf
    weighted = metrics.energy_wasserstein([1.0, np.inf], [1.0, 2.0], log_weights=[0.0, -np.inf])
    assert weighted == pytest.approx(0.5)
    for u, v in (([np.nan], [1.0]), ([1.0], [np.inf])):
        with pytest.raises(InputError):
            metrics.energy_wasserstein(u, v)
    with pytest.raises(InsufficientDataError):
        metrics.energy_wasserstein([], [1.0])


def test_thinning_is_reproducible_and_bounded():
    angles = 0.3 * np.random.default_rng(2).normal(size=(2000, 1))
    first, second = (metrics.torus_wasserstein(angles, angles + 1, n_max=200, generator=7) for _ in range(2))
    assert first == second
    # Two thinned samples of 200: the distance is off by a few standard errors of a mean.
    assert abs(first - 1) < 5 * 0.3 * math.sqrt(2 / 200)


def test_samples_that_hold_the_weight_are_not_thinned_away():
    rng = np.random.default_rng(8)
    u, log_w = rng.normal(size=30_000), np.full(30_000, -1e4)
    log_w[7], log_w[11] = 0.0, math.log(3.0)
    assert metrics.energy_wasserstein(u + 100, [100.0], log_weights=log_w) == pytest.approx(
        0.25 * abs(u[7]) + 0.75 * abs(u[11]), rel=1e-9
    )
    angles = 0.1 * u[:, None]
    found = metrics.torus_wasserstein(angles, [[0.0]], log_weights=log_w, n_max=100, generator=0)
    assert found == pytest.approx(0.1 * math.sqrt(0.25 * u[7] ** 2 + 0.75 * u[11] ** 2), rel=1e-9)


def test_torsion_distance_of_a_rotated_sample_and_of_a_permuted_one():
    angles = np.random.default_rng(3).uniform(-math.pi, math.pi, (300, 2))
    assert metrics.torus_wasserstein(angles, angles[::-1]) < 1e-7
    # A concentrated cloud moved across the seam at pi travels the short way.
    cloud = 0.1 * np.random.default_rng(4).standard_normal((200, 2)) + math.pi
    moved = metrics.wrap(cloud + np.array([0.3, 0.4]))
    assert metrics.torus_wasserstein(metrics.wrap(cloud), moved) == pytest.approx(0.5, rel=1e-9)


def test_torsion_distance_equals_the_best_assignment():
    rng = np.random.default_rng(5)
    a, b = rng.uniform(-math.pi, math.pi, (2, 60, 4))
    cost = metrics.torus_cost(a, b)
    brute = np.square(np.angle(np.exp(1j * (a[:, None] - b[None])))).sum(-1)
    assert np.abs(cost - brute).max() < 1e-12
    best = math.sqrt(brute[linear_sum_assignment(brute)].mean())
    assert metrics.torus_wasserstein(a, b) == pytest.approx(best, rel=1e-9)


def test_torsion_distance_with_weights_and_bad_input():
    a = np.array([[0.0], [1.0]])
    assert metrics.torus_wasserstein(a, [[0.0]], log_weights=[0.0, -np.inf]) == 0.0
    assert metrics.torus_wasserstein(a, [[0.0]]) == pytest.approx(math.sqrt(0.5))
    with pytest.raises(InputError):
        metrics.torus_wasserstein(a, [[0.0, 0.0]])
    with pytest.raises(InputError):
        metrics.torus_wasserstein(a, [[np.nan]])


def test_ramachandran_density_integrates_to_one():
    rng = np.random.default_rng(6)
    phi, psi = rng.uniform(-math.pi, math.pi, (2, 1000))
    density, edges = metrics.ramachandran(phi, psi, bins=36, log_weights=rng.normal(size=1000))
    assert density.sum() * (edges[1] - edges[0]) ** 2 == pytest.approx(1, rel=1e-12)
    density, _ = metrics.ramachandran([1.0], [-2.0], bins=4)
    assert density[2, 0] > 0 and np.count_nonzero(density) == 1


def test_profile_recovers_the_potential_within_its_band():
    rng = np.random.default_rng(7)
    phi = rng.vonmises(0.5, 1.5, 40_000)
    log_w = -0.8 * np.cos(phi - 0.5)
    profile = metrics.free_energy_profile(phi, bins=24, log_weights=log_w, generator=1)
    # Bin averages of the reweighted density exp(0.7 cos(phi - 0.5)).
    fine = np.linspace(-math.pi, math.pi, 24 * 200 + 1)
    fine = 0.5 * (fine[1:] + fine[:-1])
    exact = -np.log(np.exp(0.7 * np.cos(fine - 0.5)).reshape(24, 200).mean(axis=1))
    z = (profile.free_energy - profile.free_energy.mean() - exact + exact.mean()) / profile.error
    assert np.square(z).sum() < 24 + 5 * math.sqrt(48)
    assert profile.free_energy.min() == 0


def test_profile_marks_empty_bins():
    profile = metrics.free_energy_profile([0.1, 0.2, 0.3], bins=4)
    assert np.isinf(profile.free_energy).sum() == 3
    assert np.isinf(profile.error[[0, 1, 3]]).all()


def test_ranges_through_the_seam():
    angles = np.array([-3.1, -0.1, 0.0, 0.1, 3.1, math.pi])
    assert list(metrics.in_range(angles, metrics.PHI_NEGATIVE)) == [True, True, True, False, False, False]
    assert list(metrics.in_range(angles, metrics.PHI_POSITIVE)) == [False, False, False, True, True, True]
    assert list(metrics.in_range(angles, (3.0, -3.0))) == [True, False, False, False, True, True]


def telegraph(n, p_up, p_down, rng):
    """Two-state chain at phi = -1 and +1."""
    state, phi = 0, np.empty(n)
    for i, r in enumerate(rng.random(n)):
        if r < (p_up if state == 0 else p_down):
            state = 1 - state
        phi[i] = 2 * state - 1
    return phi


def test_basin_delta_f_of_a_chain_is_calibrated_by_blocks():
    rng, p_up, p_down = np.random.default_rng(8), 0.02, 0.08
    exact = -math.log(p_up / p_down)
    z_block, z_naive = [], []
    for _ in range(60):
        phi = telegraph(6000, p_up, p_down, rng)
        blocked = metrics.basin_delta_f(phi, block=300, generator=0)
        z_block.append((blocked.value - exact) / blocked.error)
        z_naive.append((blocked.value - exact) / metrics.basin_delta_f(phi).error)
    # Twenty blocks give each error a relative spread of 1/sqrt(40), next to that of 60 repeats. Blocks of
    # 300 cut off the correlation (time 1/(p_up + p_down) = 10) at their ends, and lose that share of the
    # variance.
    assert abs(np.std(z_block) - 1) < 4 * math.sqrt(1 / 120 + 1 / (40 * 60)) + 10 / 300
    assert np.std(z_naive) > 2
    assert abs(np.mean(z_block)) < 4 / math.sqrt(60)


def test_crossings_ignore_jitter_at_the_seam_and_on_the_barrier():
    assert metrics.count_crossings([-1, 3.1, -3.1, 3.1, -1]) == 0
    assert metrics.count_crossings([-1, 0.2, -0.2, 0.2, -1]) == 0
    assert metrics.count_crossings([-1, 1, 1, -1, 1]) == 3
    assert metrics.count_crossings([-1.0, -1.2]) == 0
    phi = telegraph(2000, 0.1, 0.1, np.random.default_rng(9))
    assert metrics.count_crossings(phi) == np.count_nonzero(np.diff(phi))


def test_autocorrelation_time_of_an_autoregressive_chain():
    rng, rho, n = np.random.default_rng(10), 0.8, 40_000
    x = np.empty(n)
    x[0] = 0
    for i, noise in enumerate(rng.standard_normal(n - 1)):
        x[i + 1] = rho * x[i] + noise
    exact = (1 + rho) / (1 - rho)
    # The windowed estimate has a relative variance of about 2 (2 window + 1)/n, the window being six times
    # tau.
    assert abs(metrics.integrated_autocorrelation_time(x) / exact - 1) < 4 * math.sqrt(4 * 6 * exact / n)
    assert metrics.block_length(x) == pytest.approx(5 * exact, rel=0.5)
    assert metrics.integrated_autocorrelation_time(rng.standard_normal(n)) == pytest.approx(1, abs=0.1)


def test_a_chain_that_never_moves_counts_once():
    assert metrics.integrated_autocorrelation_time(np.ones(50)) == 50
    with pytest.raises(InsufficientDataError):
        metrics.integrated_autocorrelation_time([1.0, 2.0])
    with pytest.raises(InputError):
        metrics.integrated_autocorrelation_time([1.0, np.nan, 2.0, 3.0, 1.0])


def chain(m, rng, correlation=10.0, columns=1):
    """Normal numbers `(m, columns)` with so long an exponential correlation."""
    a = math.exp(-1 / correlation)
    noise = math.sqrt(1 - a * a) * rng.normal(size=(m, columns))
    noise[0] /= math.sqrt(1 - a * a)
    return lfilter([1.0], [1.0, -a], noise, axis=0)


def energies_apart(shift, order, weighted, shuffled, rng):
    x, reference = rng.normal(size=2000) + shift, chain(2000, rng)[:, 0]
    log_w = -shift * x if weighted else None
    return metrics.energy_distance(
        x, rng.permutation(reference) if shuffled else reference, order=order, log_weights=log_w
    )


def torsions_apart(shift, order, weighted, shuffled, rng):
    x, reference = metrics.wrap(rng.normal(size=(2000, 2)) + shift), metrics.wrap(chain(2000, rng, columns=2))
    log_w = -0.4 * x.sum(1) if weighted else None
    return metrics.torus_distance(
        x, rng.permutation(reference) if shuffled else reference, log_weights=log_w, n_max=400, generator=rng
    )


@pytest.mark.parametrize(
    ("distance", "shift", "order", "weighted"),
    [
        pytest.param(energies_apart, 2.0, 1, False, id="E-W1"),
        pytest.param(energies_apart, 0.3, 1, False, id="E-W1, near"),
        pytest.param(energies_apart, 2.0, 2, False, id="E-W2"),
        pytest.param(energies_apart, 0.5, 1, True, id="E-W1, equal once reweighted"),
        pytest.param(torsions_apart, 1.0, 2, False, id="T-W2"),
        pytest.param(torsions_apart, 1.0, 2, True, id="T-W2, reweighted"),
    ],
)
def test_errors_of_distances_are_their_spread(distance, shift, order, weighted):
    """Over a hundred repetitions: errors squared against the variance of the values, which is known to 14 %.

    Stretches of a hundred frames miss a tenth of the variance of a chain that remembers ten; where both sides are equal
    the error is up to a third too large. The planted mistake: frames of a chain taken as independent ones.
    """
    n, found = 100, {}
    for shuffled in (False, True):
        values, errors = np.transpose(
            [distance(shift, order, weighted, shuffled, np.random.default_rng([5, k])) for k in range(n)]
        )
        found[shuffled] = (errors**2).mean() / values.var(ddof=1)
    spread = 4 * math.sqrt(2 / (n - 1))
    equal = 1.33**2 if distance is energies_apart and weighted else 1.0
    assert 0.8 * (1 - spread) < found[False] < equal * (1 + spread)
    assert found[True] < 0.65 * found[False]


def test_errors_need_frames_and_finite_energies():
    value, error = metrics.energy_distance([1.0, 2.0], np.arange(39.0))
    assert math.isfinite(value) and math.isnan(error)
    assert metrics.energy_distance([1.0, math.inf], np.arange(50.0)) == (math.inf, math.inf)
    assert metrics.energy_distance(np.full(50, 3.0), np.full(50, 3.0)) == (0.0, 0.0)
    angles = metrics.wrap(np.random.default_rng(0).normal(size=(60, 2)))
    value, error = metrics.torus_distance(angles, angles)  # whose dual solution need not be constant
    assert value < 1e-6 and math.isfinite(error)


def test_errors_of_fractions():
    rng = np.random.default_rng(1)
    found = rng.binomial(400, 0.1, size=2000) / 400
    assert math.sqrt(np.mean([metrics.fraction_error(f, 400) ** 2 for f in found])) == pytest.approx(
        found.std(), rel=4 / math.sqrt(2 * 2000)
    )
    assert metrics.fraction_error(0.0, 10_000) == pytest.approx(1e-4, rel=1e-3)  # none wrong is not none ever
