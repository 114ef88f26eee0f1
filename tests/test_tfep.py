"""Targeted free energies against exact results: estimators, maps, basins, errors, planted mistakes."""

import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pymbar
import pytest
import torch
from analytic_molecules import TEMPERATURE, MethylChain, dihedral
from analytic_molecules import Chain as FreeChain
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import lfilter

from openmm_regflow import tfep
from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.flows import coordinates_for
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.tfep import bennett, multistate, sides
from openmm_regflow.units import thermal_energy

KT = thermal_energy(300.0)


def gaussian_works(rng, n, m, delta_f=2.0, sigma=1.5, rho=0.0):
    """Works that obey the fluctuation theorem exactly: normal with mean +-delta_f + sigma^2/2; AR(1) if rho > 0."""
    sides = []
    for size, sign in ((n, 1), (m, -1)):
        noise = rng.standard_normal(size)
        if rho:
            for i in range(1, size):
                noise[i] = rho * noise[i - 1] + math.sqrt(1 - rho**2) * noise[i]
        sides.append(sign * delta_f + sigma**2 / 2 + sigma * noise)
    return sides


# ---------------------------------------------------------------------------------------------- estimators


def test_bar_equals_pymbar_and_overlap_equals_pymbar():
    w_f, w_r = gaussian_works(np.random.default_rng(0), 700, 300)
    result = tfep.estimate(w_f, w_r, correlated=False)
    reference = pymbar.bar(w_f, w_r)
    assert result.delta_f == pytest.approx(reference["Delta_f"], abs=1e-9)
    assert result.pymbar_error == pytest.approx(reference["dDelta_f"], rel=1e-6)
    assert result.overlap == pytest.approx(pymbar.bar_overlap(w_f, w_r), rel=1e-6)
    assert bennett.bar_root(w_f, w_r) == pytest.approx(reference["Delta_f"], abs=1e-9)


finite_works = st.lists(st.floats(-40, 40), min_size=2, max_size=30).map(np.array)


@given(finite_works, finite_works, st.floats(-100, 100))
def test_bar_shifts_with_the_works_and_changes_sign_with_the_direction(w_f, w_r, shift):
    root = bennett.bar_root(w_f, w_r)
    # The balance is flat where the works do not overlap: its slope there is exp(-gap), and rounding moves the root.
    tolerance = 1e-8 * (1 + 1 / max(bennett.bar_overlap(w_f, w_r, root), 1e-6))
    assert bennett.bar_root(w_f + shift, w_r - shift) == pytest.approx(root + shift, abs=tolerance)
    assert bennett.bar_root(w_r, w_f) == pytest.approx(-root, abs=tolerance)


@given(finite_works, finite_works)
def test_overlap_lies_between_zero_and_one(w_f, w_r):
    assert -1e-12 <= bennett.bar_overlap(w_f, w_r, bennett.bar_root(w_f, w_r)) <= 1 + 1e-12


def test_nothing_is_printed():
    code = (
        "import numpy as np; from openmm_regflow import tfep; g = np.random.default_rng(0);"
        "[tfep.estimate(g.normal(2, 1, 99), g.normal(-1, 1, 99), method=m) for m in ('bar', 'mbar')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr == ""


def test_newton_and_bracketing_find_the_same_root_with_counts():
    rng = np.random.default_rng(1)
    w_f, w_r = gaussian_works(rng, 400, 500)
    counts = rng.multinomial(400, np.full(400, 1 / 400)).astype(float), rng.multinomial(500, np.full(500, 1 / 500))
    repeated = bennett.bar_root(np.repeat(w_f, counts[0].astype(int)), np.repeat(w_r, counts[1]))
    assert bennett.bar_root(w_f, w_r, counts[0], counts[1].astype(float)) == pytest.approx(repeated, abs=1e-9)
    fast = bennett.bar_root(w_f, w_r, counts[0], counts[1].astype(float), start=2.0)
    assert fast == pytest.approx(repeated, abs=1e-8)


@pytest.mark.parametrize("method", ["bar", "mbar", "exp", "exp_reverse", "cumulant"])
def test_every_estimator_finds_delta_f(method):
    w_f, w_r = gaussian_works(np.random.default_rng(2), 4000, 4000, delta_f=-3.7, sigma=1.0)
    result = tfep.estimate(w_f, w_r, method=method)
    assert result.method == method
    assert abs(result.delta_f + 3.7) < 4 * result.uncertainty
    assert 0 < result.uncertainty < 0.1
    assert result.verdict.startswith("diagnostic only" if method == "cumulant" else "reliable")


@pytest.mark.parametrize("flip", [(-1, 1), (1, -1), (-1, -1)])
def test_a_wrong_sign_is_noticed(flip):
    w_f, w_r = gaussian_works(np.random.default_rng(3), 1000, 1000)
    wrong = tfep.estimate(flip[0] * w_f, flip[1] * w_r)
    assert wrong.verdict.startswith("do not trust")
    assert abs(wrong.delta_f - 2.0) > 4 * wrong.uncertainty
    assert tfep.estimate(w_f, w_r).verdict.startswith("reliable")


def test_crooks_slope_is_one_and_notices_scaled_works():
    rng = np.random.default_rng(4)
    slopes = []
    for _ in range(100):
        w_f, w_r = gaussian_works(rng, 1000, 500)
        slope, error = tfep.crooks_slope(w_f, w_r, 2.0)
        slopes.append((slope - 1) / error)
    assert abs(np.mean(slopes)) < 4 / math.sqrt(100)
    assert abs(np.std(slopes) - 1) < 4 / math.sqrt(200)
    slope, error = tfep.crooks_slope(1.5 * w_f, 1.5 * w_r, 3.0)
    assert slope + 5 * error < 1


def test_perfect_map_has_no_error_and_says_so():
    for method in ("bar", "mbar", "exp", "exp_reverse"):
        result = tfep.estimate(np.full(7, 1.25), np.full(5, -1.25), method=method)
        assert (result.delta_f, result.uncertainty) == (1.25, 0.0)
        assert "perfect" in result.verdict
    with pytest.raises(InputError, match="sign"):
        tfep.estimate(np.full(7, 1.25), np.full(5, 1.25))


def test_equal_works_of_one_direction_do_not_say_what_they_reach():
    """A is the part x > 0.5 of B: all forward works are zero, the reverse ones zero or infinite."""
    reverse = np.where(np.random.default_rng(0).standard_normal(2000) > 0.5, 0.0, np.inf)
    assert tfep.estimate(np.zeros(2000), method="exp").verdict.startswith("use with care")
    both = tfep.estimate(np.zeros(2000), reverse, generator=0)
    exact = math.log(0.5 * math.erfc(0.5 / math.sqrt(2)))
    assert abs(both.delta_f + exact) < 4 * both.uncertainty or abs(both.delta_f - exact) < 4 * both.uncertainty
    assert both.verdict.startswith("reliable")


def test_states_of_two_temperatures_have_no_difference_in_kilojoules():
    """f = F / kT of each at its own kT: f_B - f_A is no energy. A harmonic state and one 50 kJ/mol higher, hotter."""
    hot = 330.0
    a = tfep.State(lambda x: x.flatten(1).square().sum(1), 300.0)
    b = tfep.State(lambda x: x.flatten(1).square().sum(1) + 50.0, hot)
    kt_a, kt_b = (thermal_energy(t) for t in (300.0, hot))
    rng = np.random.default_rng(1)
    x, y = (math.sqrt(kt / 2) * rng.standard_normal((500, 1, 3)) for kt in (kt_a, kt_b))
    result = tfep.free_energy_difference(tfep.IdentityMap(), a, b, x, y, trained_on=None, generator=0)
    exact = 50 / kt_b - 1.5 * math.log(kt_b / kt_a)
    assert abs(result.delta_f - exact) < 4 * result.uncertainty
    assert "kJ/mol" not in str(result) and "two temperatures" in str(result) and "kJ/mol" not in result.to_dict()
    with pytest.raises(InputError, match="differ in temperature"):
        result.in_units("kJ/mol")
    assert result.in_units("kT") == (result.delta_f, result.uncertainty)


def test_a_slow_mode_under_fast_noise_is_in_the_error():
    """A twenty-fifth of the variance remembers 300 samples; pymbar's own sum stops before it."""
    rng, scores, n, memory = np.random.default_rng(2), [], 10_000, 1 - 1 / 300
    for _ in range(100):
        slow = lfilter([math.sqrt(1 - memory**2)], [1, -memory], rng.standard_normal(n + 3000))[3000:]
        series = 0.2 * slow + math.sqrt(0.96) * rng.standard_normal(n)
        own = pymbar.timeseries.statistical_inefficiency(series)
        both = sides.statistical_inefficiency(series), own
        scores.append([series.mean() / math.sqrt(series.var() * g / n) for g in both])
    mended, planted = np.std(scores, axis=0)
    assert mended < 1.6 < planted, (mended, planted)  # not all of it: ten stretches know the slow mode roughly
    free = [sides.statistical_inefficiency(rng.standard_normal(500)) for _ in range(300)]
    assert sum(g > 2 for g in free) <= 3  # the level is one in a thousand; four of 300 have a chance of 3e-4


def test_reverse_work_is_minus_the_forward_work_of_the_same_path():
    a, b, perfect, _, x, _ = wells(3)
    map_ab = tfep.AffineMap(perfect.mean_a, perfect.mean_b + 0.4, 1.3 * perfect.matrix)
    y = map_ab.forward(torch.tensor(x))[0]
    there = tfep.works(map_ab, a, b, x, y)
    by_hand = b.reduced(y) - a.reduced(torch.tensor(x)) - float(torch.linalg.slogdet(map_ab.matrix)[1])
    assert np.abs(there.forward + there.reverse).max() < 1e-9
    assert np.abs(there.forward - by_hand).max() < 1e-9


def test_infinite_works_count_in_n():
    """A quarter of A maps outside B; the exact delta_f then has no log(3/4) in it."""
    rng = np.random.default_rng(5)
    w_f, w_r = gaussian_works(rng, 4000, 3000, delta_f=1.0)
    # Adding a region of A outside the support of the map multiplies Z_A by 4/3: delta_f grows by log(4/3).
    w_f = np.concatenate([w_f, np.full(w_f.size // 3, np.inf)])
    exact = 1.0 + math.log(w_f.size / 4000)
    for method in ("bar", "mbar", "exp", "exp_reverse"):
        result = tfep.estimate(w_f, w_r, method=method, correlated=False)
        assert abs(result.delta_f - exact) < 4 * result.uncertainty, method
    naive = -bennett.exponential_average(w_r)
    # The last result is the corrected reverse average; the bare one is off by the log of the fraction reached.
    assert naive == pytest.approx(result.delta_f - math.log(4 / 3), abs=1e-3)
    assert abs(naive - exact) > 4 * result.uncertainty


def test_huge_finite_works_do_not_break_pymbar():
    w_f, w_r = gaussian_works(np.random.default_rng(6), 1000, 1000)
    w_f = np.append(w_f, [1e5, 1e8])
    result = tfep.estimate(w_f, w_r)
    assert abs(result.delta_f - 2) < 4 * result.uncertainty
    assert math.isfinite(result.uncertainty)


@pytest.mark.parametrize("n_states", [2, 24])
def test_a_long_ladder_is_judged_by_its_weakest_link(n_states):
    """Unit Gaussians one apart: neighbours overlap by 0.4, whatever the length of the ladder."""
    rng = np.random.default_rng(3)
    shifts, n = np.arange(n_states, dtype=float), 200
    x = np.concatenate([rng.standard_normal(n) + shift for shift in shifts])
    good = tfep.estimate_states(0.5 * (x - shifts[:, None]) ** 2, [n] * n_states, generator=0)
    assert good.verdict.startswith("reliable"), good.verdict
    if n_states == 2:
        assert multistate.weakest_link(good.overlap) == pytest.approx(1 - np.sort(np.linalg.eigvals(good.overlap))[-2])
    shifts[n_states // 2 :] += 6.0  # one gap
    x = np.concatenate([rng.standard_normal(n) + shift for shift in shifts])
    bad = tfep.estimate_states(0.5 * (x - shifts[:, None]) ** 2, [n] * n_states, generator=0)
    assert bad.verdict.startswith("do not trust"), bad.verdict


@pytest.mark.parametrize(("sigma", "delta_f"), [(0.01, 0.0), (0.3, 0.0), (1.0, 0.01)])
def test_errors_near_a_difference_of_zero(sigma, delta_f):
    """pymbar's own search ends there in BoundsError for up to four of five data sets, which became infinite errors."""
    for seed in range(10):
        works = gaussian_works(np.random.default_rng(seed), 400, 300, sigma=sigma, delta_f=delta_f)
        bar, mbar = (tfep.estimate(*works, method=method, n_resamples=2, generator=0) for method in ("bar", "mbar"))
        assert bar.pymbar_error == pytest.approx(mbar.pymbar_error, rel=0.01) and bar.verdict.startswith("reliable")


def test_a_state_that_is_a_part_of_the_other_has_an_error():
    """Forward works 0 or infinite, reverse ones all 0: the solution is an end of pymbar's bracket."""
    rng, found = np.random.default_rng(0), []
    for _ in range(50):
        inside = rng.random(600) < 0.3
        found.append(tfep.estimate(np.where(inside, 0.0, np.inf), np.zeros(400), n_resamples=20, generator=0))
    scores = np.array([(r.delta_f + math.log(0.3)) / r.uncertainty for r in found])
    assert abs(scores.mean()) < 4 / math.sqrt(50) and 0.6 < scores.std() < 1.4
    assert all(r.verdict.startswith("reliable") for r in found)


def test_a_state_that_no_sample_reaches_has_no_free_energy():
    """It had one of 3000 kT, without error and reliable."""
    u_kn = np.stack([np.zeros(2000), np.full(2000, np.inf)])
    with pytest.raises(InsufficientDataError, match="state 1 has no samples"):
        tfep.estimate_states(u_kn, [2000, 0])
    middle = np.stack([np.zeros(200), np.full(200, np.inf), np.zeros(200)])
    with pytest.raises(InsufficientDataError, match="state 1"):
        tfep.estimate_states(middle, [100, 0, 100])


def test_no_overlap_is_never_a_confident_number():
    w_f, w_r = gaussian_works(np.random.default_rng(7), 500, 500, sigma=30.0)
    result = tfep.estimate(w_f, w_r)
    assert result.verdict.startswith("do not trust")
    far = tfep.estimate(w_f + 1e5, w_r + 1e5)
    assert far.verdict.startswith("do not trust") and far.uncertainty == math.inf


@pytest.mark.parametrize("bad", [[1.0, np.nan], [1.0, -np.inf], np.zeros((2, 2, 2))])
def test_bad_works_are_refused(bad):
    with pytest.raises(InputError):
        tfep.estimate(bad, [1.0, 2.0])


def test_too_few_works_are_refused():
    with pytest.raises(InsufficientDataError, match="at least two"):
        tfep.estimate([1.0], [1.0, 2.0])
    with pytest.raises(InsufficientDataError, match="infinite"):
        tfep.estimate([np.inf, np.inf], [1.0, 2.0])


def test_unknown_method_and_missing_direction_are_refused():
    with pytest.raises(InputError, match="choose one of"):
        tfep.estimate([1.0, 2.0], [1.0, 2.0], method="ti")
    with pytest.raises(InputError, match="needs"):
        tfep.estimate([1.0, 2.0])
    with pytest.raises(InputError, match="cumulant"):
        tfep.estimate([1.0, np.inf], method="cumulant")


def test_fully_correlated_works_get_a_loud_verdict():
    steps = np.random.default_rng(8).standard_normal((2, 400)).cumsum(axis=1) * 0.05
    assert tfep.estimate(steps[0] + 1, steps[1] + 1).verdict.startswith("do not trust")


def test_one_line_with_three_units():
    w_f, w_r = gaussian_works(np.random.default_rng(9), 500, 500)
    result = tfep.estimate(w_f, w_r, temperature=310.0)
    line = str(result)
    assert "\n" not in line and all(u in line for u in (" kT", " kJ/mol", " kcal/mol", "310 K"))
    assert result.in_units("kJ/mol")[0] == pytest.approx(result.delta_f * thermal_energy(310.0))
    assert result.to_dict()["verdict"] == result.verdict
    with pytest.raises(InputError):
        result.in_units("eV")


def test_global_state_of_numpy_is_left_alone():
    np.random.seed(5)
    state, errors = np.random.get_state()[1].copy(), np.geterr()
    w_f, w_r = gaussian_works(np.random.default_rng(10), 200, 200)
    for method in ("bar", "mbar"):
        tfep.estimate(w_f, w_r, method=method)
    assert np.array_equal(np.random.get_state()[1], state)
    assert np.geterr() == errors


def test_several_maps_combine_and_a_useless_one_does_no_harm():
    rng = np.random.default_rng(11)
    good_f, good_r = gaussian_works(rng, 2000, 2000, sigma=1.0)
    bad_f, bad_r = gaussian_works(rng, 2000, 2000, sigma=9.0)
    single = tfep.estimate(good_f, good_r)
    pooled = tfep.estimate(np.stack([good_f, bad_f]), np.stack([good_r, bad_r]))
    assert abs(pooled.delta_f - 2) < 4 * pooled.uncertainty
    # The weights come from 200 replicas, which leaves the error uncertain by one part in twenty.
    assert pooled.uncertainty < single.uncertainty * (1 + 4 / math.sqrt(400))
    lost = np.full(2000, np.inf)
    assert tfep.estimate(np.stack([good_f, lost]), np.stack([good_r, lost])).delta_f == single.delta_f
    with pytest.raises(InputError, match="both directions"):
        tfep.estimate(np.stack([good_f, bad_f]), good_r)


def test_a_map_that_fails_in_a_replica_leaves_the_error_of_the_others():
    """One finite work either way: some bootstrap replicas of this map have none."""
    good_f, good_r = gaussian_works(np.random.default_rng(16), 300, 300, delta_f=3.0, sigma=1.0)
    bad_f, bad_r = np.full(300, np.inf), np.full(300, np.inf)
    bad_f[3], bad_r[5] = 3.0, -3.0
    single = tfep.estimate(good_f, good_r, correlated=False, generator=0)
    both = tfep.estimate(np.stack([good_f, bad_f]), np.stack([good_r, bad_r]), correlated=False, generator=0)
    assert both.delta_f == single.delta_f and both.verdict.startswith("reliable")
    assert both.bootstrap_error == pytest.approx(single.bootstrap_error, rel=1e-9)


def test_duplicated_maps_do_not_shrink_the_error():
    w_f, w_r = gaussian_works(np.random.default_rng(12), 1000, 1000)
    single = tfep.estimate(w_f, w_r, correlated=False, n_resamples=400)
    twice = tfep.estimate(np.stack([w_f, w_f]), np.stack([w_r, w_r]), correlated=False, n_resamples=400)
    assert twice.delta_f == pytest.approx(single.delta_f, abs=1e-9)
    assert twice.uncertainty > single.uncertainty * (1 - 4 / math.sqrt(800))


def test_mbar_over_three_mapped_states():
    rng = np.random.default_rng(13)
    scales = np.array([1.0, 1.5, 2.5])
    n_k = np.array([600, 400, 500])
    # Normal states of these widths; the maps rescale exactly, but shift by 0.3 widths too much per state.
    z = rng.standard_normal(n_k.sum())
    owners = np.repeat(np.arange(3), n_k)
    u_kn = np.stack([0.5 * (z - 0.3 * (owners - k)) ** 2 - math.log(s) for k, s in enumerate(scales)])
    result = tfep.estimate_states(u_kn, n_k, generator=1)
    exact = -np.log(scales / scales[0])
    assert result.delta_f[0] == 0
    assert (np.abs(result.delta_f - exact)[1:] < 4 * result.uncertainty[1:]).all()
    assert result.verdict.startswith("reliable")
    with pytest.raises(InsufficientDataError):
        tfep.estimate_states(u_kn[:2, :3], [2, 1])
    with pytest.raises(InputError):
        tfep.estimate_states(u_kn, [1, 2, 3])
    with pytest.raises(InputError, match="two replicas"):
        tfep.estimate_states(u_kn, n_k, n_resamples=1)


def temperature_ladder_energies(rng, n):
    """A solvated box at four temperatures: normal energies of 1e5 kJ/mol, mean U(T) rising by the heat capacity."""
    kelvin, capacity, ground = np.array([300.0, 310.0, 320.0, 330.0]), 3000.0, -1e5
    kt = thermal_energy(kelvin[0]) * kelvin / kelvin[0]
    gas = kt[0] / kelvin[0]
    means = ground + capacity * gas * (kelvin - kelvin[0])
    energies = np.concatenate([rng.normal(m, math.sqrt(capacity) * k, n) for m, k in zip(means, kt)])
    # d(beta F)/d beta = U, with U a function of 1/beta: ground - C kT0 and C log beta.
    exact = (ground - capacity * kt[0]) * (1 / kt - 1 / kt[0]) + capacity * np.log(kt[0] / kt)
    return energies / kt[:, None], exact


def test_free_energies_of_a_thousand_kt_are_found():
    """Energies of different states count from different zeros: two force fields, or temperatures of a solvated box."""
    rng, n = np.random.default_rng(15), 400
    x = rng.standard_normal(2 * n)
    apart = tfep.estimate_states(np.stack([x**2 / 2, x**2 / 2 + 2000.0]), [n, n], generator=0)
    np.testing.assert_allclose(apart.delta_f, [0.0, 2000.0], atol=1e-6)
    u_kn, exact = temperature_ladder_energies(rng, n)
    found = tfep.estimate_states(u_kn, [n] * 4, generator=0)
    assert np.abs(exact[1:]).min() > 1000
    assert (np.abs(found.delta_f - exact)[1:] < 4 * found.uncertainty[1:]).all() and found.uncertainty.max() < 1.0
    # States in another order, so that neighbours hardly overlap.
    order = np.array([0, 3, 1, 2])
    columns = np.concatenate([np.arange(n) + k * n for k in order])
    shuffled = tfep.estimate_states(u_kn[order][:, columns], [n] * 4, generator=0)
    np.testing.assert_allclose(shuffled.delta_f, found.delta_f[order], atol=1e-5)


def test_states_without_samples_and_errors_of_any_difference():
    """Springs (1, 2, 4) sampled at the ends: the middle is reached from there, as pymbar has it."""
    rng, strengths, n_k = np.random.default_rng(0), np.array([1.0, 2.0, 4.0]), [4000, 0, 4000]
    x = np.concatenate([rng.standard_normal(n) / math.sqrt(k) for n, k in zip(n_k, strengths, strict=True)])
    result = tfep.estimate_states(0.5 * strengths[:, None] * x**2, n_k, generator=0)
    expected = 0.5 * np.log(strengths)
    assert (np.abs(result.delta_f - expected)[1:] < 4 * result.uncertainty[1:]).all()
    assert np.array_equal(result.uncertainties[0], result.uncertainty)
    assert result.uncertainties == pytest.approx(result.uncertainties.T) and not result.uncertainties.diagonal().any()
    assert 0 < result.uncertainties[1, 2] < result.uncertainty[2]  # 1 and 2 are nearer to each other than 0 and 2
    own = pymbar.MBAR(0.5 * strengths[:, None] * x**2, n_k).compute_free_energy_differences()["dDelta_f"]
    assert (result.uncertainties >= own * (1 - 1e-6)).all() and (result.uncertainties < 1.5 * own + 1e-12).all()
    assert result.verdict.startswith("reliable") and "worth 4000 or more" in result.verdict


def test_states_that_no_sample_reaches_are_not_trusted():
    """Far from all samples, one or two of them carry everything, and the overlap matrix does not show it."""
    x = np.random.default_rng(0).standard_normal(2000)
    far = tfep.estimate_states(np.array([x**2 / 2, (x - 8) ** 2 / 2]), [2000, 0], generator=0)
    assert far.verdict.startswith("do not trust")
    ends = np.concatenate([x, 12 + np.random.default_rng(1).standard_normal(2000)])
    bridged = tfep.estimate_states(0.5 * (ends - [[0.0], [6.0], [12.0]]) ** 2, [2000, 0, 2000], generator=0)
    assert bridged.verdict.startswith("do not trust") and np.isinf(bridged.uncertainty[2])  # by a state without samples
    with pytest.raises(InsufficientDataError, match="no samples at all"):
        tfep.estimate_states(np.zeros((3, 0)), [0, 0, 0])


def test_a_part_of_the_data_that_says_nothing_leaves_a_gap():
    """A chain that begins with one frame, repeated, has works without a spread at first."""
    rng = np.random.default_rng(0)
    works = [np.concatenate([np.full(4, side.mean() + shift), side[4:]]) for side, shift in
             ((rng.normal(1.0, 1.0, 40), 0.5), (rng.normal(0.0, 1.0, 40), -0.2))]  # fmt: skip
    one_way = tfep.convergence(works[0], np.full(40, math.inf), [1.0], n_resamples=10)
    assert np.isnan([one_way[key][0] for key in ("bar", "exp", "exp_reverse")]).all()
    table = tfep.convergence(*works, n_resamples=10)
    assert np.isnan(table["bar"][0]) and np.isfinite(table["bar"][1:]).all()
    with pytest.raises(InputError, match="NaN"):
        tfep.convergence(np.array([math.nan, 1.0]), works[1])
    for call in (tfep.convergence, tfep.estimate):
        with pytest.raises(InputError, match="two replicas"):
            call(*works, n_resamples=1)


def test_convergence_closes_on_the_answer():
    w_f, w_r = gaussian_works(np.random.default_rng(14), 2000, 2000)
    table = tfep.convergence(w_f, w_r, [0.1, 0.5, 1.0])
    assert np.array_equal(table["fraction"], [0.1, 0.5, 1.0])
    assert table["bar_error"][-1] < table["bar_error"][0]
    assert abs(table["bar"][-1] - 2) < 4 * table["bar_error"][-1]


# ---------------------------------------------------------------------------------------------- calibration


def check_calibration(results, exact):
    z = np.array([(r.delta_f - exact) / r.uncertainty for r in results])
    coverage = np.mean(np.abs(z) < 1.96)
    assert abs(z.mean()) < 0.15
    assert 0.85 < z.std(ddof=1) < 1.2
    assert 0.92 <= coverage <= 0.98
    return z


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 0.8])
@pytest.mark.parametrize("method", ["bar", "mbar", "exp", "exp_reverse"])
def test_errors_are_calibrated(method, rho):
    rng = np.random.default_rng(100)
    n = 800 if rho == 0 else 6000
    results = [
        tfep.estimate(*gaussian_works(rng, n, n // 2, sigma=1.0, rho=rho), method=method, n_resamples=100)
        for _ in range(400)
    ]
    check_calibration(results, 2.0)


@pytest.mark.slow
def test_ignored_correlation_is_not_calibrated():
    rng = np.random.default_rng(101)
    results = [
        tfep.estimate(*gaussian_works(rng, 2000, 2000, rho=0.8), correlated=False, n_resamples=50) for _ in range(100)
    ]
    assert np.std([(r.delta_f - 2.0) / r.uncertainty for r in results]) > 2


# ---------------------------------------------------------------------------------------------- analytic maps


def wells(dim, seed=0):
    """Unit well at the origin and a well of other widths elsewhere; potentials in kJ/mol, exact map, exact delta_f."""
    rng = np.random.default_rng(seed)
    k = torch.tensor(rng.uniform(0.5, 4.0, dim))
    centre = torch.tensor(rng.normal(0, 2, dim))

    def first(x):
        return KT * 0.5 * (x**2).sum(-1)

    def second(x):
        return KT * (0.5 * (k * (x - centre) ** 2).sum(-1) + 0.7)

    exact = 0.5 * float(torch.log(k).sum()) + 0.7
    perfect = tfep.AffineMap(torch.zeros(dim, dtype=torch.float64), centre, torch.diag(k**-0.5))
    sample_a = rng.standard_normal((600, dim))
    sample_b = centre.numpy() + rng.standard_normal((500, dim)) / np.sqrt(k.numpy())
    return tfep.State(first), tfep.State(second), perfect, exact, sample_a, sample_b


@pytest.mark.parametrize("dim", [1, 3, 66])
def test_perfect_map_between_wells_has_zero_variance(dim):
    a, b, perfect, exact, x, y = wells(dim)
    result = tfep.free_energy_difference(perfect, a, b, x, y, trained_on=None, compare_plain=False)
    assert result.delta_f == pytest.approx(exact, abs=1e-9 * dim)
    assert result.uncertainty == 0


@pytest.mark.parametrize("dim", [1, 3, 66])
def test_imperfect_map_between_wells_agrees_within_its_error(dim):
    a, b, perfect, exact, x, y = wells(dim)
    imperfect = tfep.AffineMap(
        perfect.mean_a, perfect.mean_b + 0.4 / math.sqrt(dim), perfect.matrix * math.exp(0.3 / math.sqrt(dim))
    )
    result = tfep.free_energy_difference(imperfect, a, b, x, y, trained_on=None)
    assert 0 < result.uncertainty < 0.2
    assert abs(result.delta_f - exact) < 4 * result.uncertainty
    assert result.verdict.startswith("reliable")
    assert result.plain is None or result.plain.uncertainty > result.uncertainty


class WrongSign(tfep.AffineMap):
    """An affine map that reports the log-determinants with the wrong sign."""

    def forward(self, x):
        y, log_det = super().forward(x)
        return y, -log_det

    def inverse(self, y):
        x, log_det = super().inverse(y)
        return x, -log_det


def test_planted_sign_of_the_log_determinant_is_caught():
    a, b, perfect, exact, x, y = wells(3)
    wrong = WrongSign(perfect.mean_a, perfect.mean_b, perfect.matrix)
    result = tfep.free_energy_difference(wrong, a, b, x, y, trained_on=None, compare_plain=False)
    assert abs(result.delta_f - exact) == pytest.approx(2 * abs(perfect.log_det), rel=1e-9)


def test_perfect_map_of_a_rotated_coupled_gaussian_has_zero_variance():
    rng = np.random.default_rng(21)
    c_a, c_b = (torch.as_tensor(m @ m.T + np.eye(6)) for m in rng.standard_normal((2, 6, 6)))
    means = torch.as_tensor(rng.standard_normal((2, 6)))

    def root(c):
        values, vectors = torch.linalg.eigh(c)
        return vectors @ torch.diag(values.sqrt()) @ vectors.T

    half = root(c_a)
    exact = tfep.AffineMap(*means, torch.linalg.inv(half) @ root(half @ c_b @ half) @ torch.linalg.inv(half))
    states = [
        tfep.State(lambda x, m=m, p=p: KT * 0.5 * ((x - m) @ p * (x - m)).sum(1))
        for m, p in zip(means, (torch.linalg.inv(c) for c in (c_a, c_b)))
    ]
    x, y = (rng.multivariate_normal(m, c, 300) for m, c in zip(means.numpy(), (c_a.numpy(), c_b.numpy())))
    result = tfep.free_energy_difference(exact, *states, x, y, trained_on=None, compare_plain=False)
    truth = 0.5 * float(torch.logdet(c_a) - torch.logdet(c_b))
    assert result.delta_f == pytest.approx(truth, abs=1e-6) and result.uncertainty == 0.0


def test_rotated_coupled_gaussian_by_a_fitted_map_and_by_cross_fitting():
    rng = np.random.default_rng(20)
    dim = 4
    rotation = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    covariance = rotation @ np.diag([0.2, 0.7, 1.5, 3.0]) @ rotation.T
    precision, mean = torch.tensor(np.linalg.inv(covariance)), torch.tensor([2.0, -1.0, 0.5, 3.0])
    a = tfep.State(lambda x: KT * 0.5 * (x**2).sum(-1))
    b = tfep.State(lambda x: KT * 0.5 * torch.einsum("ni,ij,nj->n", x - mean, precision, x - mean))
    exact = -0.5 * math.log(np.linalg.det(covariance))
    x, y = rng.standard_normal((3000, dim)), rng.multivariate_normal(mean.numpy(), covariance, 3000)
    (x_train, x_test), (y_train, y_test) = tfep.split(x, 0.1), tfep.split(y, 0.1)
    fitted = tfep.AffineMap.fit(x_train, y_train)
    held_out = tfep.free_energy_difference(fitted, a, b, x_test, y_test, trained_on=(x_train, y_train))
    crossed = tfep.cross_fit(tfep.AffineMap.fit, a, b, x, y, folds=5)
    for result in (held_out, crossed):
        assert abs(result.delta_f - exact) < 4 * result.uncertainty
        assert result.verdict.startswith("reliable")
        assert result.plain is not None and result.plain.uncertainty > 3 * result.uncertainty
    assert crossed.n_forward == 3000


def test_training_samples_are_refused():
    a, b, perfect, _, x, y = wells(2)
    with pytest.raises(InputError, match="also trained"):
        tfep.free_energy_difference(perfect, a, b, x, y, trained_on=(x[:10], y[:0]))
    with pytest.raises(TypeError):
        tfep.free_energy_difference(perfect, a, b, x, y)


def test_evaluation_on_training_samples_is_biased():
    """With a map that memorises its few training samples the works of those samples are optimistic."""
    a, b, _, _, x, y = wells(8)
    small = tfep.AffineMap.fit(x[:12], y[:12])
    memorised = tfep.works(small, a, b, x[:12], y[:12])
    fresh = tfep.works(small, a, b, x[12:], y[12:])
    assert memorised.forward.mean() + memorised.reverse.mean() < 0.5 * (fresh.forward.mean() + fresh.reverse.mean())


@pytest.mark.parametrize("folds", [1, 500])
def test_unusable_folds_are_refused(folds):
    a, b, _, _, x, y = wells(2)
    with pytest.raises((InputError, InsufficientDataError)):
        tfep.cross_fit(tfep.AffineMap.fit, a, b, x, y, folds=folds)


def test_several_maps_through_the_pipeline():
    a, b, perfect, exact, x, y = wells(3)
    maps = [tfep.AffineMap(perfect.mean_a, perfect.mean_b + s, perfect.matrix) for s in (-0.3, 0.3)]
    result = tfep.free_energy_difference(maps, a, b, x, y, trained_on=None, compare_plain=False)
    assert abs(result.delta_f - exact) < 4 * result.uncertainty


# ---------------------------------------------------------------------------------------------- basins


class SkewedDoubleWell:
    """u(x) = 4 (x^2 - 1)^2 + x + 0.3 x^3 [kT] in one dimension, by quadrature."""

    def __init__(self):
        self.grid = np.linspace(-3.5, 3.5, 200_001)
        self.density = np.exp(-self.u(self.grid))

    @staticmethod
    def u(x):
        return 4 * (x**2 - 1) ** 2 + x + 0.3 * x**3

    def delta_f(self):
        left, right = (self.density[s].sum() for s in (self.grid <= 0, self.grid > 0))
        return -math.log(right / left)

    def sample(self, n, rng, side):
        density = np.where((self.grid > 0) == (side > 0), self.density, 0.0)
        return np.interp(rng.random(n), np.cumsum(density) / density.sum(), self.grid)


WELL = SkewedDoubleWell()


def basin_states():
    def potential(x):
        return KT * WELL.u(x[:, 0])

    return tfep.State(potential, 300.0, lambda x: x[:, 0] <= 0), tfep.State(potential, 300.0, lambda x: x[:, 0] > 0)


def test_oracle_normalises():
    coarse = np.linspace(-3.5, 3.5, 2001)
    weight = np.exp(-WELL.u(coarse))
    assert -math.log(weight[coarse > 0].sum() / weight[coarse <= 0].sum()) == pytest.approx(WELL.delta_f(), abs=2e-3)


def basin_samples():
    rng = np.random.default_rng(30)
    return WELL.sample(4000, rng, -1)[:, None], WELL.sample(3000, rng, 1)[:, None]


class Quantiles:
    """Left well to right well, each point to the one of the same quantile: a perfect map, by quadrature."""

    def __init__(self):
        halves = [np.where((WELL.grid > 0) == right, WELL.density, 0.0) for right in (False, True)]
        self.left, self.right = (np.cumsum(h) / h.sum() for h in halves)
        self.mass = [h.sum() for h in halves]

    def _carry(self, x, source, target, ratio):
        there = np.interp(np.interp(x[:, 0], WELL.grid, source), target, WELL.grid)
        log_det = math.log(ratio) - WELL.u(x[:, 0].numpy()) + WELL.u(there)
        return torch.as_tensor(there)[:, None], torch.as_tensor(log_det)

    def forward(self, x):
        return self._carry(x, self.left, self.right, self.mass[1] / self.mass[0])

    def inverse(self, y):
        return self._carry(y, self.right, self.left, self.mass[0] / self.mass[1])


def test_perfect_map_of_a_skewed_double_well_has_zero_variance():
    """The log-determinant is that of the map itself, by differences; works are then constant to the grid's accuracy."""
    a, b = basin_states()
    x, y = (v[np.abs(v[:, 0]) > 0.2] for v in basin_samples())  # away from the rim, where a quantile has no slope
    one = Quantiles()
    step = 1e-4
    near = (one.forward(torch.as_tensor(x + s * step))[0][:, 0] for s in (1, -1))
    slope = torch.log((next(near) - next(near)) / (2 * step))
    assert (slope - one.forward(torch.as_tensor(x))[1]).abs().median() < 1e-3
    result = tfep.free_energy_difference(one, a, b, x, y, trained_on=None, compare_plain=False)
    assert result.delta_f == pytest.approx(WELL.delta_f(), abs=1e-6) and result.uncertainty == 0.0


def stretched(factor):
    """Left well to right well, too wide: some samples of A overshoot to the left and stay in A."""
    return tfep.AffineMap(torch.full((1,), -1.1), torch.full((1,), 0.85), torch.full((1, 1), factor))


@pytest.mark.parametrize("method", ["bar", "mbar", "exp"])
def test_basins_of_a_skewed_double_well_by_a_map_that_leaves_them(method):
    x, y = basin_samples()
    works = tfep.works(stretched(3.0), *basin_states(), x, y)
    assert 0 < np.isinf(works.forward).sum() < 1000
    result = tfep.free_energy_difference(stretched(3.0), *basin_states(), x, y, trained_on=None, method=method)
    assert abs(result.delta_f - WELL.delta_f()) < 4 * result.uncertainty
    assert result.plain is None


def test_a_one_sided_average_that_misses_its_tail_says_so():
    """The reverse of a threefold stretch never visits the flanks of A: off by six errors, and flagged."""
    result = tfep.free_energy_difference(
        stretched(3.0), *basin_states(), *basin_samples(), trained_on=None, method="exp_reverse"
    )
    assert abs(result.delta_f - WELL.delta_f()) > 4 * result.uncertainty
    assert result.verdict.startswith("do not trust")
    both = tfep.free_energy_difference(stretched(3.0), *basin_states(), *basin_samples(), trained_on=None)
    assert abs(both.delta_f - WELL.delta_f()) < 4 * both.uncertainty


def test_samples_outside_their_basin_and_mismatched_atoms_are_refused():
    identity = tfep.IdentityMap()
    with pytest.raises(InputError, match="outside"):
        tfep.works(identity, *basin_states(), [[0.5], [-0.5]], [[0.5]])
    with pytest.raises(InputError, match="match"):
        tfep.works(identity, *basin_states(), [[-0.5]], [[0.5, 0.1]])
    with pytest.raises(InsufficientDataError, match="state B"):
        tfep.works(identity, *basin_states(), [[-0.5]], np.zeros((0, 1)))


class Mixture:
    """A two-component normal density: a flow that knows both wells, but with the wrong shares and widths."""

    def __init__(self, share=0.4, width=0.3):
        self.share, self.width = share, width

    def sample(self, n, rng):
        centre = np.where(rng.random(n) < self.share, 0.9, -1.1)
        return centre + self.width * rng.standard_normal(n)

    def log_prob(self, x):
        right, left = (-0.5 * ((x - c) / self.width) ** 2 for c in (0.9, -1.1))
        norm = math.log(self.width * math.sqrt(2 * math.pi))
        return np.logaddexp(math.log(self.share) + right, math.log(1 - self.share) + left) - norm


def through_the_flow(rng, n=3000, n_a=700, n_b=100, **planted):
    flow = Mixture()
    x, a, b = flow.sample(n, rng), WELL.sample(n_a, rng, -1), WELL.sample(n_b, rng, 1)
    arrays = {
        "log_q": flow.log_prob(x), "u": WELL.u(x), "in_a": x <= 0, "in_b": x > 0, "log_q_a": flow.log_prob(a),
        "u_a": WELL.u(a), "log_q_b": flow.log_prob(b), "u_b": WELL.u(b),
    }  # fmt: skip
    return tfep.basin_free_energy(**arrays, n_resamples=100, **planted), arrays


def test_the_number_of_held_out_samples_in_each_basin_does_not_enter():
    for n_a, n_b in ((50, 2000), (2000, 50)):
        result, _ = through_the_flow(np.random.default_rng(31), n_a=n_a, n_b=n_b)
        assert abs(result.delta_f - WELL.delta_f()) < 4 * result.uncertainty
        assert result.uncertainty < 0.15


def test_three_estimates_through_the_flow_agree():
    result, _ = through_the_flow(np.random.default_rng(32), 20_000, 5000, 5000)
    for value in (result.delta_f, result.forward, result.reverse):
        # The exponential averages have a few times the error of BAR.
        assert abs(value - WELL.delta_f()) < 10 * result.uncertainty
    assert result.overlap > 0.5 and result.verdict.startswith("reliable")


def test_pairwise_bar_is_three_state_mbar():
    _, d = through_the_flow(np.random.default_rng(33), 800, 300, 200)
    x_u = np.concatenate([d["u"], d["u_a"], d["u_b"]])
    log_q = np.concatenate([d["log_q"], d["log_q_a"], d["log_q_b"]])
    in_a = np.concatenate([d["in_a"], np.ones(300, bool), np.zeros(200, bool)])
    in_b = np.concatenate([d["in_b"], np.zeros(300, bool), np.ones(200, bool)])
    u_kn = np.stack([-log_q, np.where(in_a, x_u, 500.0), np.where(in_b, x_u, 500.0)])
    mbar = pymbar.MBAR(u_kn, [800, 300, 200]).compute_free_energy_differences()
    result = tfep.basin_free_energy(**d, correlated=False, n_resamples=100)
    assert result.delta_f == pytest.approx(mbar["Delta_f"][1, 2], abs=1e-6)
    assert result.pymbar_error == pytest.approx(mbar["dDelta_f"][1, 2], rel=1e-4)


@pytest.mark.parametrize("names", [("log_q", "log_q_a", "log_q_b"), ("u", "u_a", "u_b"), ("log_q",), ("log_q_b",)])
def test_a_wrong_sign_in_the_arrays_is_noticed(names):
    right, d = through_the_flow(np.random.default_rng(37), 10_000, 4000, 4000)
    assert right.verdict.startswith("reliable")
    wrong = tfep.basin_free_energy(**{**d, **{k: -d[k] for k in names}}, n_resamples=100)
    assert wrong.verdict.startswith("do not trust")


def test_dropping_flow_samples_outside_the_basins_is_the_mistake_it_is_said_to_be():
    """With a gap between the basins the flow samples there must count."""
    _, d = through_the_flow(np.random.default_rng(34), 20_000, 2000, 2000)
    full = tfep.flow_works(d["log_q"], d["u"], d["log_q_a"], d["u_a"], d["in_a"])
    exact = -math.log(WELL.density[WELL.grid <= 0].sum() * (WELL.grid[1] - WELL.grid[0]))
    right = tfep.estimate(full.forward, full.reverse)
    wrong = tfep.estimate(full.forward[d["in_a"]], full.reverse)
    assert abs(right.delta_f - exact) < 4 * right.uncertainty
    assert wrong.delta_f - exact == pytest.approx(math.log(d["in_a"].mean()), abs=4 * wrong.uncertainty)


def test_two_flows_through_their_priors():
    rng = np.random.default_rng(35)
    sides = []
    for side, width in ((-1, 0.25), (1, 0.3)):
        centre = 0.95 * side
        x, y = centre + width * rng.standard_normal(3000), WELL.sample(2000, rng, side)

        def log_q(v, centre=centre, width=width):
            return -0.5 * ((v - centre) / width) ** 2 - math.log(width * math.sqrt(2 * math.pi))

        sides.append(tfep.flow_works(log_q(x), WELL.u(x), log_q(y), WELL.u(y), (x > 0) == (side > 0)))
    result = tfep.through_prior(*sides)
    assert abs(result.delta_f - WELL.delta_f()) < 4 * result.uncertainty
    assert result.uncertainty < 0.1 and result.verdict.startswith("reliable")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"in_b": np.zeros(800, bool)}, InsufficientDataError, "basin B"),
        ({"in_b": np.ones(800, bool)}, InputError, "disjoint"),
        ({"in_a": np.zeros(5, bool)}, InputError, "indicators"),
        ({"u_a": np.full(300, np.inf)}, InputError, "held-out"),
        ({"log_q_a": np.zeros(3)}, InputError, "one of each"),
        ({"log_q": np.full(800, np.nan)}, InputError, "finite"),
        ({"u_a": np.zeros(0), "log_q_a": np.zeros(0)}, InsufficientDataError, "basin A"),
    ],
)
def test_bad_arrays_for_the_flow_are_refused(change, error, words):
    _, d = through_the_flow(np.random.default_rng(36), 800, 300, 200)
    with pytest.raises(error, match=words):
        tfep.basin_free_energy(**{**d, **change})


@pytest.mark.slow
def test_basin_free_energy_is_calibrated():
    rng = np.random.default_rng(102)
    check_calibration([through_the_flow(rng)[0] for _ in range(400)], WELL.delta_f())


def test_several_states_by_mapped_mbar():
    """Three wells in five dimensions: perfect maps leave no error, imperfect ones agree within theirs."""
    rng, widths = np.random.default_rng(70), np.array([1.0, 0.5, 1.6])
    centres = 3.0 * rng.standard_normal((3, 5))
    states, samples = [], []
    for width, centre in zip(widths, torch.as_tensor(centres)):
        states.append(tfep.State(lambda x, w=width, c=centre: KT * 0.5 * ((x - c) ** 2).sum(-1) / w**2))
        samples.append(centre.numpy() + width * rng.standard_normal((400, 5)))
    exact = -5 * np.log(widths / widths[0])

    def to_each(error):
        origin = torch.zeros(5, dtype=torch.float64)
        return [
            tfep.AffineMap(origin, torch.as_tensor(c) + error, (1 + error) * w * torch.eye(5, dtype=torch.float64))
            for w, c in zip(widths, centres)
        ]

    perfect = tfep.estimate_states(*tfep.mapped_energies(to_each(0.0), states, samples), generator=0)
    np.testing.assert_allclose(perfect.delta_f, exact, atol=1e-7)
    found = tfep.estimate_states(*tfep.mapped_energies(to_each(0.1), states, samples), generator=0)
    assert (np.abs(found.delta_f - exact) < 4 * found.uncertainty + 1e-12).all()
    assert (found.uncertainty[1:] > 1e-3).all() and found.verdict.startswith("reliable")
    # The planted error: a Jacobian left out.
    u_kn, n_k = tfep.mapped_energies(to_each(0.1), states, samples)
    wrong = tfep.estimate_states(u_kn + 5 * np.log(1.1 * widths)[:, None], n_k, generator=0)
    assert (np.abs(wrong.delta_f - exact) > 20 * wrong.uncertainty)[1:].all()
    with pytest.raises(InputError, match="one of each"):
        tfep.mapped_energies(to_each(0.0)[:2], states, samples)


def test_a_map_remembers_what_it_was_trained_on():
    a, b, _, _, x, y = wells(3)
    fitted = tfep.AffineMap.fit(x[:300], y[:300])
    with pytest.raises(InputError, match="also trained the map"):
        tfep.free_energy_difference(fitted, a, b, x[200:], y[300:], trained_on=None)
    tfep.free_energy_difference(fitted, a, b, x[300:], y[300:], trained_on=None)


# ---------------------------------------------------------------------------------------------- loud, not confident


def test_a_cartesian_map_of_a_free_molecule_is_refused():
    """The spread of its centre, which no energy decides, would enter as 3 log(s_A / s_B)."""
    a, b = (FreeChain(3, bond_width=w, angle_width=0.4) for w in (0.03, 0.04))
    g = torch.Generator().manual_seed(0)
    x, y = (c.sample(400, g) for c in (a, b))
    states = [tfep.State(TorchPotential(c.system), TEMPERATURE) for c in (a, b)]
    fitted = tfep.AffineMap.fit(x[:200], y[:200])
    with pytest.raises(InputError, match="centre of a free molecule"):
        tfep.works(fitted, *states, x[200:], y[200:])

    class Stretch:
        """About the centre, which goes along."""

        def forward(self, v):
            c = v.mean(1, keepdim=True)
            return c + 1.1 * (v - c), torch.full((len(v),), 6 * math.log(1.1), dtype=torch.float64)

        def inverse(self, v):
            c = v.mean(1, keepdim=True)
            return c + (v - c) / 1.1, torch.full((len(v),), -6 * math.log(1.1), dtype=torch.float64)

    tfep.works(Stretch(), *states, x, y)


@pytest.mark.parametrize("shape", [(500, 1), (500, 3), ()])
def test_a_potential_has_one_energy_for_each_configuration(shape):
    """One column is the same thing; anything else would be broadcast into nonsense."""
    a, b, perfect, exact, x, y = wells(3)
    column = shape == (500, 1)
    odd = tfep.State(lambda v: b.potential(v).reshape(-1, 1) if column else torch.zeros(shape), b.temperature)
    if column:
        result = tfep.free_energy_difference(perfect, a, odd, x, y, trained_on=None)
        assert result.delta_f == pytest.approx(exact, abs=1e-6)
    else:
        with pytest.raises(InputError, match="one energy"):
            tfep.free_energy_difference(perfect, a, odd, x[:500], y[:500], trained_on=None)


@pytest.mark.parametrize("apart", [360.0, 400.0, 500.0, 700.0, 800.0])
@pytest.mark.parametrize("method", ["bar", "mbar"])
def test_hopeless_overlap_is_a_verdict_at_any_distance(apart, method):
    rng = np.random.default_rng(60)
    w_f, w_r = apart + rng.standard_normal(300), apart + rng.standard_normal(200)
    result = tfep.estimate(w_f, w_r, method=method, n_resamples=20)
    assert result.verdict.startswith("do not trust")


def test_one_perfect_map_among_several_is_enough():
    w_f, w_r = gaussian_works(np.random.default_rng(61), 300, 300)
    result = tfep.estimate(np.stack([np.full(300, 2.0), w_f]), np.stack([np.full(300, -2.0), w_r]))
    assert result.delta_f == 2.0 and result.uncertainty == 0.0
    with pytest.raises(InputError, match="should agree"):
        tfep.estimate(np.stack([np.full(9, 2.0), np.full(9, 2.5)]), np.stack([np.full(9, -2.0), np.full(9, -2.5)]))


def test_a_frozen_side_is_not_trusted():
    w_f, w_r = gaussian_works(np.random.default_rng(62), 500, 500)
    assert tfep.estimate(np.full(500, 2.0), w_r).verdict.startswith("do not trust")
    assert tfep.estimate(w_f, np.full(500, -2.0)).verdict.startswith("do not trust")


def test_one_direction_cannot_tell_what_it_does_not_reach():
    w_f, w_r = gaussian_works(np.random.default_rng(63), 5000, 5000, sigma=0.5)
    assert tfep.estimate(w_f, w_r, method="exp").verdict.startswith("reliable")
    assert tfep.estimate(w_f, method="exp").verdict.startswith("use with care")
    half = np.where(np.arange(5000) % 2 == 0, np.inf, w_f)
    assert tfep.estimate(half, method="exp").verdict.startswith("do not trust")


def test_one_work_that_carries_the_average_is_named():
    """k-hat looks at the tail as a whole; the work that left it holds the error bar."""
    w_f, w_r = gaussian_works(np.random.default_rng(63), 5000, 5000, sigma=0.5)
    w_f[7] = -np.log(8 * np.sqrt(np.sum(np.exp(-2 * w_f)) / 8))
    found = tfep.estimate(w_f, w_r, method="exp").verdict
    assert found.startswith("use with care") and "one work holds 89 %" in found


def test_frames_that_are_there_twice_do_not_cross_fit():
    a, b, _, _, x, y = wells(3)
    with pytest.raises(InputError, match=r"also trained the map.*give every frame once"):
        tfep.cross_fit(tfep.AffineMap.fit, a, b, np.tile(x[:50], (4, 1)), y, folds=4)


def test_rejected_moves_cross_fit():
    """Repeats of the frame before, some across what would be the edge of a fold."""
    a, b, _, exact, x, y = wells(3)
    chain = np.repeat(x, np.random.default_rng(71).geometric(0.4, len(x)), axis=0)
    edges = np.linspace(0, len(chain), 8).astype(int)[1:-1]
    assert (chain[edges] == chain[edges - 1]).all(1).any()
    trained = []

    def fit(u, v):
        trained.append(len(u))
        return tfep.AffineMap.fit(u, v)

    result = tfep.cross_fit(fit, a, b, chain, y, folds=7, generator=0)
    assert result.n_forward == len(chain) and len(trained) == 7
    assert max(abs(n - 6 / 7 * len(chain)) for n in trained) < 20
    assert abs(result.delta_f - exact) < 4 * result.uncertainty
    with pytest.raises(InsufficientDataError, match="fewer or run longer"):
        tfep.cross_fit(fit, a, b, np.repeat(x[:5], 40, axis=0), y, folds=7)


def test_few_or_impossible_samples_of_several_states():
    u_kn = np.random.default_rng(64).standard_normal((3, 6))
    assert tfep.estimate_states(u_kn, [2, 2, 2]).verdict.startswith("do not trust")
    u_kn[:, 1] = np.inf
    with pytest.raises(InputError, match="own state"):
        tfep.estimate_states(u_kn, [2, 2, 2])


def test_convergence_of_several_maps_runs_along_the_samples():
    pairs = [gaussian_works(np.random.default_rng(65 + k), 400, 300) for k in range(2)]
    w_f, w_r = (np.stack(column) for column in zip(*pairs))
    table = tfep.convergence(w_f, w_r, [1.0], n_resamples=20)
    assert table["bar"][0] == pytest.approx(tfep.estimate(w_f, w_r, n_resamples=20).delta_f, abs=0.05)


def several_maps(rng, n, rho=0.0):
    """Works of the same samples under two maps of different quality."""
    pairs = [gaussian_works(rng, n, n, sigma=s, rho=rho) for s in (1.2, 0.6)]
    return (np.stack(column) for column in zip(*pairs))


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_bar_over_several_maps_is_calibrated(rho):
    rng = np.random.default_rng(67)
    n = 500 if rho == 0 else 4000
    check_calibration([tfep.estimate(*several_maps(rng, n, rho), n_resamples=100) for _ in range(300)], 2.0)


@pytest.mark.slow
def test_several_states_are_calibrated():
    """Gaussians of three widths in the frame of the first: z of the last free energy."""
    rng, widths, exact = np.random.default_rng(68), np.array([1.0, 1.3, 1.6]), -np.log(1.6)
    results = []
    for _ in range(300):
        x = np.concatenate([w * rng.standard_normal(200) for w in widths])
        found = tfep.estimate_states(0.5 * (x / widths[:, None]) ** 2, [200] * 3, generator=rng)
        results.append(SimpleNamespace(delta_f=found.delta_f[2], uncertainty=found.uncertainty[2]))
    check_calibration(results, exact)


@pytest.mark.slow
def test_two_flows_are_calibrated():
    """Two wells, each through a flow that is too wide; held-out samples independent."""
    rng, results = np.random.default_rng(69), []
    for _ in range(400):
        sides = []
        for width in (0.5, 0.8):
            z, y = 1.3 * width * rng.standard_normal(600), width * rng.standard_normal(300)
            log_q = [-0.5 * (v / (1.3 * width)) ** 2 - math.log(1.3 * width * math.sqrt(2 * math.pi)) for v in (z, y)]
            u = [0.5 * (v / width) ** 2 for v in (z, y)]
            sides.append(tfep.flow_works(log_q[0], u[0], log_q[1], u[1]))
        results.append(tfep.through_prior(*sides, correlated=False, n_resamples=60))
    check_calibration(results, -math.log(0.8 / 0.5))


@pytest.mark.slow
def test_exponential_averages_over_several_maps_are_calibrated():
    rng, results = np.random.default_rng(66), []
    for _ in range(400):
        base = rng.standard_normal(800)
        maps = [sigma * (0.8 * base + 0.6 * rng.standard_normal(800)) for sigma in (1.0, 0.7)]
        works = np.stack([2.0 + sigma**2 / 2 + w for sigma, w in zip((1.0, 0.7), maps)])
        results.append(tfep.estimate(works, method="exp", n_resamples=100))
    check_calibration(results, 2.0)


def two_wells_from_one_flow(rng, n=2000, k_a=1.6, k_b=1.8):
    """Two harmonic states in three dimensions on samples of a wider Gaussian; delta_f = 3/2 ln(k_b / k_a)."""
    x = rng.standard_normal((n, 3))
    r2 = (x**2).sum(1)
    return {"log_q": -0.5 * r2 - 1.5 * math.log(2 * math.pi), "u_a": 0.5 * k_a * r2, "u_b": 0.5 * k_b * r2}


TWO_WELLS = 1.5 * math.log(1.8 / 1.6)


def test_states_through_one_flow():
    """Right within its error, which is smaller than that of two flows would be; the sign is seen."""
    d = two_wells_from_one_flow(np.random.default_rng(40))
    result = tfep.states_through_flow(**d, generator=0)
    assert abs(result.delta_f - TWO_WELLS) < 4 * result.uncertainty
    assert abs(-result.delta_f - TWO_WELLS) > 20 * result.uncertainty
    assert result.verdict.startswith("reliable") and result.overlap is None
    apart = [tfep.states_through_flow(d["log_q"], -d["log_q"], d[u]).uncertainty for u in ("u_a", "u_b")]
    assert result.uncertainty < 0.5 * math.hypot(*apart)
    # Impossible samples count in n; moving both energies by a constant moves nothing.
    cut = {k: np.where(np.arange(2000) % 2 == 0, np.inf, v) if k != "log_q" else v for k, v in d.items()}
    half = tfep.states_through_flow(**cut)
    assert abs(half.delta_f - TWO_WELLS) < 4 * half.uncertainty
    moved = tfep.states_through_flow(d["log_q"], d["u_a"] + 700, d["u_b"] + 700, generator=0)
    assert moved.delta_f == pytest.approx(result.delta_f, abs=1e-9)
    assert moved.uncertainty == pytest.approx(result.uncertainty, rel=1e-6)


def test_states_through_a_flow_that_misses_one_are_not_trusted():
    """B is far narrower than the flow: a handful of samples carries all of its weight."""
    d = two_wells_from_one_flow(np.random.default_rng(41), n=500, k_b=4000.0)
    assert tfep.states_through_flow(**d).verdict.startswith("do not trust")
    with pytest.raises(InsufficientDataError, match="finite"):
        tfep.states_through_flow(d["log_q"], d["u_a"], np.full(500, np.inf))
    with pytest.raises(InputError, match="one of each"):
        tfep.states_through_flow(d["log_q"], d["u_a"], d["u_b"][:9])


@pytest.mark.slow
def test_states_through_one_flow_are_calibrated():
    """And would not be with the errors of two independent flows: their z-scores spread too little."""
    rng, results, apart = np.random.default_rng(42), [], []
    for _ in range(400):
        d = two_wells_from_one_flow(rng, 500)
        results.append(tfep.states_through_flow(**d, n_resamples=100))
        each = (tfep.states_through_flow(d["log_q"], -d["log_q"], d[u], n_resamples=50) for u in ("u_a", "u_b"))
        apart.append(math.hypot(*(r.uncertainty for r in each)))
    check_calibration(results, TWO_WELLS)
    assert np.std([(r.delta_f - TWO_WELLS) / e for r, e in zip(results, apart)]) < 0.6


def test_cross_fitting_several_maps_keeps_the_best():
    """A map that learned nothing beside one that learned everything: the error is that of the second."""
    a, b, perfect, exact, x, y = wells(3)

    def fit(u, v):
        return [tfep.AffineMap(perfect.mean_a, perfect.mean_b + 0.8, perfect.matrix), tfep.AffineMap.fit(u, v)]

    both = tfep.cross_fit(fit, a, b, x, y, folds=4, generator=0)
    good = tfep.cross_fit(tfep.AffineMap.fit, a, b, x, y, folds=4, generator=0)
    assert abs(both.delta_f - exact) < 4 * both.uncertainty
    # 200 replicas leave an error uncertain by one part in twenty.
    assert both.uncertainty < good.uncertainty * (1 + 4 / math.sqrt(400))
    assert both.n_forward == len(x)


@pytest.mark.slow
def test_cross_fitting_is_calibrated():
    rng = np.random.default_rng(103)
    results = []
    for _ in range(200):
        x, y = WELL.sample(400, rng, -1)[:, None], WELL.sample(300, rng, 1)[:, None]
        results.append(tfep.cross_fit(tfep.AffineMap.fit, *basin_states(), x, y, folds=4, n_resamples=60))
    check_calibration(results, WELL.delta_f())


# ---------------------------------------------------------------------------------------------- frames


class Chain:
    """Bond lengths (and angle) of a di- or triatomic, with or without the volume element b^2 (b1^2 b2^2 sin theta)."""

    def __init__(self, with_jacobian=True):
        self.with_jacobian = with_jacobian

    @staticmethod
    def internal(x):
        """Bonds from atom 1 (or 0 in a diatomic), then the angle at it."""
        hub = 1 if x.shape[1] == 3 else 0
        arms = [x[:, i] - x[:, hub] for i in range(x.shape[1]) if i != hub]
        bonds = [torch.linalg.vector_norm(arm, dim=-1) for arm in arms]
        if len(arms) == 1:
            return torch.stack(bonds, dim=1)
        cosine = (arms[0] * arms[1]).sum(-1) / (bonds[0] * bonds[1])
        return torch.stack([*bonds, torch.arccos(cosine)], dim=1)

    def log_volume(self, z):
        if not self.with_jacobian:
            return z.new_zeros(len(z))
        volume = 2 * torch.log(z[:, : min(2, z.shape[1])]).sum(1)
        return volume if z.shape[1] == 1 else volume + torch.log(torch.sin(z[:, 2]))

    def to_features(self, x):
        z = self.internal(x)
        return z, -self.log_volume(z)

    def to_positions(self, z):
        zero = torch.zeros_like(z[:, 0])
        first = torch.stack([z[:, 0], zero, zero], dim=1)
        hub = torch.zeros_like(first)
        if z.shape[1] == 1:
            return torch.stack([hub, first], dim=1), self.log_volume(z)
        second = z[:, 1:2] * torch.stack([torch.cos(z[:, 2]), torch.sin(z[:, 2]), zero], dim=1)
        return torch.stack([first, hub, second], dim=1), self.log_volume(z)


class ShiftBond:
    """Adds a constant to the first bond."""

    def __init__(self, shift):
        self.shift = shift

    def _move(self, z, shift):
        return torch.cat([z[:, :1] + shift, z[:, 1:]], dim=1), z.new_zeros(len(z))

    def forward(self, z):
        return self._move(z, self.shift)

    def inverse(self, z):
        return self._move(z, -self.shift)


STIFF, SHORT, LONG = 4e4, 0.1, 0.2


def molecule(n_atoms, bond, n, rng):
    """Exact samples in full 3-D, at random places and orientations, and the potential [kJ/mol]."""
    grid = np.linspace(0.02, 0.4, 100_001)

    def draw(density):
        return np.interp(rng.random(n), np.cumsum(density) / density.sum(), grid)

    columns = [draw(grid**2 * np.exp(-0.5 * STIFF * (grid - bond) ** 2 / KT))]
    if n_atoms == 3:
        columns.append(draw(grid**2 * np.exp(-0.5 * STIFF * (grid - 0.15) ** 2 / KT)))
        theta = np.linspace(1e-3, math.pi - 1e-3, 100_001)
        density = np.sin(theta) * np.exp(-0.5 * 200 * (theta - 1.9) ** 2 / KT)
        columns.append(np.interp(rng.random(n), np.cumsum(density) / density.sum(), theta))
    x, _ = Chain().to_positions(torch.tensor(np.stack(columns, axis=1)))
    turns = torch.linalg.qr(torch.tensor(rng.normal(size=(n, 3, 3))))[0]
    turns = turns * torch.sign(torch.linalg.det(turns))[:, None, None]
    x = x @ turns + torch.tensor(rng.normal(size=(n, 1, 3)))

    def potential(positions):
        z = Chain.internal(positions)
        u = 0.5 * STIFF * (z[:, 0] - bond) ** 2
        if n_atoms == 3:
            u = u + 0.5 * STIFF * (z[:, 1] - 0.15) ** 2 + 0.5 * 200 * (z[:, 2] - 1.9) ** 2
        return u

    return x, tfep.State(potential), (grid**2 * np.exp(-0.5 * STIFF * (grid - bond) ** 2 / KT)).sum()


@pytest.mark.parametrize("n_atoms", [2, 3])
def test_stretching_a_bond_in_three_dimensions(n_atoms):
    rng = np.random.default_rng(40)
    x, a, z_a = molecule(n_atoms, SHORT, 2000, rng)
    y, b, z_b = molecule(n_atoms, LONG, 2000, rng)
    exact = -math.log(z_b / z_a)
    stretch = ShiftBond(LONG - SHORT)
    right = tfep.free_energy_difference(
        tfep.CoordinatesMap(Chain(), stretch), a, b, x, y, trained_on=None, compare_plain=False
    )
    assert abs(right.delta_f - exact) < 4 * right.uncertainty
    assert right.verdict.startswith("reliable")
    # Without the volume element delta_f is off by 2 log(b'/b): a factor of four in the population.
    wrong = tfep.free_energy_difference(
        tfep.CoordinatesMap(Chain(with_jacobian=False), stretch), a, b, x, y, trained_on=None, compare_plain=False
    )
    assert wrong.delta_f - exact == pytest.approx(2 * math.log(LONG / SHORT), abs=0.02)
    assert abs(wrong.delta_f - exact) > 10 * wrong.uncertainty


class MoveAtom:
    """Cartesian form of the same stretch: atom 0 moves along its bond to atom 1, everything else stays."""

    def __init__(self, shift):
        self.shift = shift

    def _move(self, x, shift):
        arm = x[:, 0] - x[:, 1]
        b = torch.linalg.vector_norm(arm, dim=-1, keepdim=True)
        moved = x[:, 1] + arm * (b + shift) / b
        return torch.cat([moved[:, None], x[:, 1:]], dim=1), 2 * torch.log((b[:, 0] + shift) / b[:, 0])

    def forward(self, x):
        return self._move(x, self.shift)

    def inverse(self, x):
        return self._move(x, -self.shift)


def test_cartesian_stretch_has_the_determinant_of_autodiff_and_the_same_answer():
    rng = np.random.default_rng(41)
    x, a, z_a = molecule(3, SHORT, 1500, rng)
    y, b, z_b = molecule(3, LONG, 1500, rng)
    stretch = MoveAtom(LONG - SHORT)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: stretch.forward(v.reshape(1, 3, 3))[0].ravel(), x[0].ravel()
    )
    assert stretch.forward(x[:1])[1].item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-10)
    result = tfep.free_energy_difference(stretch, a, b, x, y, trained_on=None, compare_plain=False)
    internal = tfep.works(tfep.CoordinatesMap(Chain(), ShiftBond(LONG - SHORT)), a, b, x, y)
    assert abs(result.delta_f + math.log(z_b / z_a)) < 4 * result.uncertainty
    assert np.abs(tfep.works(stretch, a, b, x, y).forward - internal.forward).max() < 1e-6


def test_a_state_that_tells_the_hydrogens_of_a_methyl_apart():
    """Features leave labels out, and maps of positions have to keep them."""
    target, strength, kt = MethylChain(), 3.0, thermal_energy(TEMPERATURE)
    coordinates = coordinates_for(target.topology, target.sample(2000, torch.Generator().manual_seed(0)))
    assert len(coordinates.rotors) == 1
    energy = TorchPotential(target.system)

    def bias(x):
        return strength * (1 + torch.cos(dihedral(x[:, [16, 17, 18, 19]]) - 0.5))

    a, b = tfep.State(energy, TEMPERATURE), tfep.State(lambda x: energy(x) + kt * bias(x), TEMPERATURE)
    exact = -math.log(target.torsion.mean(lambda p: np.exp(-strength * (1 + np.cos(p - 0.5)))))
    x, pool = (target.sample(n, torch.Generator().manual_seed(s)) for n, s in ((1500, 1), (20_000, 2)))
    y = pool[np.random.default_rng(44).random(len(pool)) < torch.exp(-bias(pool)).numpy()][:1500]
    works = tfep.works(tfep.CoordinatesMap(coordinates, tfep.IdentityMap()), a, b, x, y)
    inside = np.isfinite(works.forward)  # of the chart: no hydrogen has passed another
    assert inside.mean() > 0.99
    np.testing.assert_allclose(works.forward[inside], bias(x)[inside], atol=1e-6)
    result = tfep.estimate(works.forward, works.reverse, correlated=False, generator=0)
    assert abs(result.delta_f - exact) < 4 * result.uncertainty and exact > 5 * result.uncertainty
    # A map that moves everything brings all atoms back to their places.
    shift = torch.full((coordinates.dim,), 0.2, dtype=torch.float64)
    moving = tfep.CoordinatesMap(coordinates, tfep.AffineMap(0 * shift, shift, torch.eye(len(shift)).double()))
    x = x[inside]
    there, log_det = moving.forward(x)
    inside = torch.isfinite(there).flatten(1).all(1)
    back, log_det_back = moving.inverse(there[inside])
    assert inside.double().mean() > 0.9 and (log_det[inside] + log_det_back).abs().max() < 1e-9
    assert (torch.cdist(back, back) - torch.cdist(x, x)[inside]).abs().max() < 1e-6


def test_two_temperatures():
    """A d-dimensional harmonic oscillator: delta_f = -(d/2) log(T_B/T_A)."""
    rng = np.random.default_rng(42)
    hot, cold = 450.0, 300.0

    def potential(x):
        return 0.5 * KT * (x**2).sum(-1)

    a, b = tfep.State(potential, cold), tfep.State(potential, hot)
    x, y = rng.standard_normal((2000, 6)), math.sqrt(hot / cold) * rng.standard_normal((2000, 6))
    result = tfep.free_energy_difference(tfep.IdentityMap(), a, b, x, y, trained_on=None)
    assert abs(result.delta_f + 3 * math.log(hot / cold)) < 4 * result.uncertainty


def test_torsion_basins_of_positions():
    x = np.array([[[1, 0, 0], [0, 0, 0], [0, 0, 1], [math.cos(p), math.sin(p), 1]] for p in (-1.0, 1.0, 2.5)])
    inside = tfep.torsion_basin([0, 1, 2, 3], (0.0, 2.0))
    assert list(inside(torch.tensor(x))) == [False, True, False]
