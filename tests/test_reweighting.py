"""Importance weights against exact Gaussian and discrete results."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openmm_regflow import metrics
from openmm_regflow import reweighting as rw
from openmm_regflow.errors import InputError, InsufficientDataError

finite = st.floats(-300, 300, allow_nan=False)
log_weight_lists = st.lists(st.one_of(finite, st.just(-math.inf)), min_size=1, max_size=60).filter(
    lambda values: any(math.isfinite(v) for v in values)
)


@given(log_weight_lists)
def test_effective_sample_size_is_between_one_and_n(values):
    ess = rw.effective_sample_size(values)
    rounding = 4 * len(values) * np.finfo(float).eps
    assert 1 - rounding <= len(values) * ess <= len(values)


@given(log_weight_lists, st.floats(-1000, 1000))
def test_effective_sample_size_ignores_a_shift(values, shift):
    # The shifted sum is rounded at the size of the shift, and exp passes that error on.
    tolerance = 8 * np.finfo(float).eps * (1 + abs(shift) + 300)
    shifted = np.asarray(values) + shift
    assert rw.effective_sample_size(shifted) == pytest.approx(rw.effective_sample_size(values), rel=tolerance)


@given(st.integers(2, 500), st.data())
def test_degenerate_weights_give_one_over_n(n, data):
    log_w_n = np.full(n, -np.inf)
    log_w_n[data.draw(st.integers(0, n - 1))] = 17.0
    assert rw.effective_sample_size(log_w_n) == pytest.approx(1 / n, rel=1e-14)


def test_equal_weights_are_fully_effective():
    assert rw.effective_sample_size(np.full(1000, -3.3)) == pytest.approx(1, rel=1e-13)
    assert rw.truncated_effective_sample_size(np.full(1000, -3.3)) == pytest.approx(1, rel=1e-13)


@given(st.lists(finite, min_size=30, max_size=200))
@settings(max_examples=50)
def test_dropping_the_top_leaves_the_smaller_weights_in_order(values):
    kept = rw.drop_top(values, 0.1)
    assert len(kept) == len(values) - math.ceil(0.1 * len(values) - 1e-9)
    assert sorted(kept) == sorted(values)[: len(kept)]


def test_truncation_drops_twenty_of_ten_thousand():
    log_w_n = np.zeros(10_000)
    log_w_n[:20] = 9.0
    assert rw.truncated_effective_sample_size(log_w_n) == pytest.approx(1, rel=1e-13)
    log_w_n[20] = 9.0
    assert rw.truncated_effective_sample_size(log_w_n) < 0.1
    assert rw.truncated_effective_sample_size(log_w_n, top=0.0) == rw.effective_sample_size(log_w_n)


@pytest.mark.parametrize("bad", [[0.0, np.nan], [np.inf, 0.0], [[0.0, 1.0]], 3.0])
def test_unusable_weights_are_refused(bad):
    with pytest.raises(InputError):
        rw.effective_sample_size(bad)


@pytest.mark.parametrize("empty", [[], [-np.inf, -np.inf]])
def test_no_weight_at_all_is_insufficient(empty):
    with pytest.raises(InsufficientDataError):
        rw.normalised_weights(empty)


def test_tensors_are_accepted():
    log_w = torch.tensor([0.1, 0.4, -math.inf], dtype=torch.float32, requires_grad=True)
    assert rw.effective_sample_size(log_w) == rw.effective_sample_size(log_w.detach().numpy())


def gaussian_weights(n, rng, scale=1.3, mean=0.4):
    """Samples of N(0, scale^2) and their absolute log-weights towards exp(-(x - mean)^2/2)."""
    x_n = scale * rng.standard_normal(n)
    log_q_n = -0.5 * (x_n / scale) ** 2 - math.log(scale * math.sqrt(2 * math.pi))
    return x_n, -0.5 * (x_n - mean) ** 2 - log_q_n


def z_scores(estimates, exact):
    return np.array([(e.value - exact) / e.error for e in estimates])


def test_expectation_and_free_energy_are_calibrated():
    rng = np.random.default_rng(1)
    draws = [gaussian_weights(1500, rng) for _ in range(400)]
    for z in (
        z_scores([rw.expectation(x, lw) for x, lw in draws], 0.4),
        z_scores([rw.free_energy(lw) for _, lw in draws], -0.5 * math.log(2 * math.pi)),
    ):
        # Standard errors of the mean and of the spread of 400 unit normals: 0.05 and 0.035; four of each.
        assert abs(z.mean()) < 4 / math.sqrt(400)
        assert abs(z.std(ddof=1) - 1) < 4 / math.sqrt(800)


def test_a_dropped_constant_shows_in_the_free_energy():
    x_n, log_w_n = gaussian_weights(2000, np.random.default_rng(2))
    wrong = rw.free_energy(log_w_n + 0.5)
    assert abs(wrong.value + 0.5 * math.log(2 * math.pi)) > 5 * wrong.error
    assert rw.expectation(x_n, log_w_n + 0.5).value == pytest.approx(
        rw.expectation(x_n, log_w_n).value, rel=1e-12
    )


def test_replicas_without_the_rare_event_are_not_left_out_in_silence():
    """Four excursions among two thousand frames: their number is uncertain by a half, its logarithm more."""

    def log_share(rare):
        if not rare.any():
            raise InsufficientDataError("none")
        return math.log(rare.mean())

    series = np.zeros(2000, dtype=bool)
    series[100:140] = True
    with pytest.raises(InsufficientDataError, match="bootstrap replicas have enough data"):
        rw.bootstrap_error(log_share, series, block=100, generator=0)
    series[[300, 500, 700, 900, 1100, 1300]] = True
    assert rw.bootstrap_error(log_share, series, block=100, generator=0) > 0.3


def test_delta_and_bootstrap_errors_agree():
    x_n, log_w_n = gaussian_weights(4000, np.random.default_rng(3))
    delta = rw.expectation(x_n, log_w_n).error
    bootstrap = rw.expectation(x_n, log_w_n, error="bootstrap", n_resamples=400, generator=5).error
    assert abs(bootstrap / delta - 1) < 4 / math.sqrt(2 * 400)
    with pytest.raises(InputError, match="bootstrap"):
        rw.expectation(x_n, log_w_n, error="jackknife")


def test_expectation_of_vectors_and_of_values_without_weight():
    values = np.array([[1.0, 2.0], [3.0, 6.0], [np.nan, np.inf]])
    result = rw.expectation(values, [0.0, 0.0, -np.inf])
    assert np.array_equal(result.value, [2.0, 4.0])
    assert np.allclose(result.error, np.sqrt(0.5) * np.array([1.0, 2.0]), rtol=1e-14)
    with pytest.raises(InputError, match="NaN"):
        rw.expectation(values, [0.0, 0.0, 0.0])
    with pytest.raises(InputError, match="one value per weight"):
        rw.expectation(values[:2], [0.0, 0.0, 0.0])


def test_population_delta_f_is_calibrated_with_and_without_weights():
    rng = np.random.default_rng(4)
    plain, weighted = [], []
    for _ in range(300):
        x_n, log_w_n = gaussian_weights(2000, rng)
        weighted.append(rw.population_delta_f(x_n < 0, x_n > 0, log_w_n))
        y_n = rng.standard_normal(2000) + 0.4
        plain.append(rw.population_delta_f(y_n < 0, y_n > 0))
    below = 0.5 * math.erfc(0.4 / math.sqrt(2))
    exact = -math.log((1 - below) / below)
    for z in (z_scores(plain, exact), z_scores(weighted, exact)):
        assert abs(z.mean()) < 4 / math.sqrt(300)
        assert abs(z.std(ddof=1) - 1) < 4 / math.sqrt(600)


def test_an_empty_basin_is_insufficient():
    with pytest.raises(InsufficientDataError, match="both basins"):
        rw.population_delta_f([True, True], [False, False])


def test_bootstrap_blocks_recover_the_error_of_a_correlated_mean():
    rng, n, rho = np.random.default_rng(6), 20_000, 0.9
    noise = rng.standard_normal(n)
    x_n = np.empty(n)
    x_n[0] = noise[0] / math.sqrt(1 - rho**2)
    for i in range(1, n):
        x_n[i] = rho * x_n[i - 1] + noise[i]
    exact = math.sqrt((1 + rho) / (1 - rho) / (1 - rho**2) / n)
    blocked = rw.bootstrap_error(np.mean, x_n, n_resamples=400, block=400, generator=0)
    # Spread from 400 replicas and from the 50 blocks themselves.
    assert abs(blocked / exact - 1) < 4 * math.sqrt(1 / 800 + 1 / 100)
    assert rw.bootstrap_error(np.mean, x_n, n_resamples=400, generator=0) < 0.5 * exact


def test_bootstrap_refuses_unequal_arrays_and_single_resamples():
    with pytest.raises(InputError, match="equal lengths"):
        rw.bootstrap_error(np.mean, np.zeros(3), np.zeros(4))
    with pytest.raises(InputError, match="at least 2"):
        rw.bootstrap_error(np.mean, np.zeros(3), n_resamples=1)


def pareto_log_weights(shape, n, seed):
    """Weights whose tail is exactly generalised Pareto of the given shape."""
    return -shape * np.log(np.random.default_rng(seed).random(n))


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_pareto_shape_is_recovered(shape):
    n, repeats = 20_000, 20
    k = np.array([rw.pareto_k(pareto_log_weights(shape, n, s)) for s in range(repeats)])
    # A shape fitted by maximum likelihood to m tail points has standard error (1 + k)/sqrt(m); the fit's
    # prior (ten points at 0.5) shifts it by up to |0.5 - k| 10/(m + 10).
    m = 3 * math.sqrt(n)
    prior = abs(0.5 - shape) * 10 / (m + 10)
    assert abs(k.mean() - shape) < 4 * (1 + shape) / math.sqrt(m * repeats) + prior


def test_smoothed_weights_are_normalised_and_keep_the_body():
    log_w_n = pareto_log_weights(0.6, 5000, 1)
    smooth, _ = rw.pareto_smooth(np.append(log_w_n, -np.inf))
    assert np.exp(smooth).sum() == pytest.approx(1, rel=1e-12)
    assert smooth[-1] == -np.inf
    body = np.argsort(log_w_n)[:4000]
    assert np.ptp(smooth[body] - log_w_n[body]) < 1e-12


def test_equal_and_too_few_weights():
    assert rw.pareto_k(np.zeros(100)) == 0.0
    with pytest.raises(InsufficientDataError, match="25"):
        rw.pareto_k(np.zeros(24))


@pytest.mark.parametrize(
    ("log_weights", "words"),
    [
        (np.random.default_rng(0).normal(0, 0.3, 5000), "reliable"),
        (np.random.default_rng(0).normal(0, 4.0, 5000), "do not trust"),
        (np.random.default_rng(0).normal(0, 0.3, 60), "do not trust"),
        (np.random.default_rng(0).normal(0, 0.3, 300), "use with care"),
        (np.zeros(10), "do not trust"),
    ],
)
def test_verdict_in_words(log_weights, words):
    assert rw.verdict(log_weights).startswith(words)
    assert str(log_weights.size) in rw.verdict(log_weights)


def test_verdict_sees_one_sample_that_outweighs_a_good_tail():
    """As a flow of alanine tetrapeptide had it: an ESS of 38 % but for one sample, 2 % with it; k-hat saw nothing."""
    log_w_n = np.random.default_rng(0).normal(0, 1.0, 100_000)
    assert rw.verdict(log_w_n).startswith("reliable") and rw.largest_share(log_w_n) < 0.05
    log_w_n[7] = np.log(20 * np.sqrt(np.sum(np.exp(2 * log_w_n)) / 20))
    assert rw.largest_share(log_w_n) == pytest.approx(20 / 21, rel=1e-3)
    assert rw.pareto_k(log_w_n) < 0.5
    assert rw.verdict(log_w_n).startswith("use with care") and "one sample holds 95 %" in rw.verdict(log_w_n)


def test_systematic_resampling_copies_within_one():
    rng = np.random.default_rng(8)
    log_w_n = rng.normal(0, 2, 300)
    counts = np.bincount(rw.resample(log_w_n, 1000, 3), minlength=300)
    assert counts.sum() == 1000
    assert np.abs(counts - 1000 * rw.normalised_weights(log_w_n)).max() < 1 + 1e-9


def test_accepted_rows_are_a_sample_of_the_target():
    """Mean and variance of what rejection leaves at c = max w; all rows alike, or the heaviest, would fail."""
    rng, n = np.random.default_rng(9), 4000
    scores, plain = [], []
    for _ in range(50):
        x_n, log_w_n = gaussian_weights(8000, rng)
        rows, cut = rw.accept(log_w_n, n, rng)
        assert cut == 0 and len(np.unique(rows)) == n
        x = x_n[rows] - 0.4
        scores.append([x.mean() * math.sqrt(n), (np.square(x).mean() - 1) * math.sqrt(n / 2)])
        plain.append((np.square(x_n[:n] - 0.4).mean() - 1) * math.sqrt(n / 2))
    scores = np.array(scores)
    assert (np.abs(scores.mean(0)) < 4 / math.sqrt(50)).all()
    # One random number decides about all: the spread is at most that of independent rows.
    assert (scores.std(0) < 1 + 4 / math.sqrt(100)).all()
    assert np.mean(plain) > 4


def test_accepted_rows_are_kept_in_proportion_to_weights_up_to_the_cut():
    rng = np.random.default_rng(10)
    log_w_n, repeats = rng.normal(0, 2, 200), 4000
    w = rw.normalised_weights(log_w_n)
    counts = np.zeros(200)
    for _ in range(repeats):
        rows, cut = rw.accept(log_w_n, 60, rng)
        assert len(rows) == 60
        counts[rows] += 1
    kept = counts / repeats
    c = np.median((w / kept)[(kept < 1) & (kept > 0.3)])
    assert cut == pytest.approx(np.maximum(w - c, 0).sum(), rel=0.01) and cut > 0.1
    expected = np.minimum(1, w / c)
    error = np.sqrt(expected * (1 - expected) / repeats)
    assert (np.abs(kept - expected) < 5 * error + 0.01 * expected + 1e-12).all()


def test_acceptance_at_its_ends():
    assert rw.accept([0.0, 0.0, -np.inf, 0.0], 3)[0].tolist() == [0, 1, 3]
    assert rw.accept([0.0, -800.0], 1)[0].tolist() == [0]
    rows, cut = rw.accept([0.0, np.log(3.0)], 2)
    assert rows.tolist() == [0, 1] and cut == pytest.approx(0.5)
    with pytest.raises(InsufficientDataError, match="3 of 4 samples have a weight"):
        rw.accept([0.0, 0.0, -np.inf, 0.0], 4)
    with pytest.raises(InputError, match="at least one"):
        rw.accept([0.0], 0)


def test_estimate_prints_its_error():
    assert str(rw.Estimate(1.23456, 0.0211, 100, 0.5)) == "1.235 ± 0.021 (n = 100, ESS 0.5)"


def longest_by_hand(accepted):
    best = now = 0
    for moved in accepted:
        now = 0 if moved else now + 1
        best = max(best, now)
    return best


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_longest_stretch_is_that_of_counting(accepted):
    assert rw.longest_stretch(accepted) == longest_by_hand(accepted)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.95])
def test_a_chain_that_mixes_is_reliable_and_one_that_sticks_is_not(rate):
    accepted = np.random.default_rng(3).random(20_000) < rate
    assert rw.chain_verdict(accepted).startswith("reliable")
    accepted[5000 : 5000 + int(30 * 10 / rate)] = False  # far longer than chance allows, still short of a tenth
    words = rw.chain_verdict(accepted)
    assert words.startswith("do not trust" if rate == 0.05 else "use with care") and "stuck stretch" in words
    accepted[5000:8000] = False
    assert rw.chain_verdict(accepted).startswith("do not trust")
    assert rw.chain_verdict(np.zeros(10, bool)).startswith("do not trust")


def test_a_short_chain_is_not_reliable():
    accepted = np.tile([True, False], 500)
    assert rw.chain_verdict(accepted).startswith("reliable") and "about 500 independent" in rw.chain_verdict(accepted)
    assert rw.chain_verdict(accepted[:100]).startswith("use with care")
    # held for 20 steps every time: 50 states of 1,000 steps
    words = rw.chain_verdict(np.arange(1000) % 20 == 0)
    assert words.startswith("use with care") and "about 50 independent" in words
    words = rw.chain_verdict(accepted[:20])
    assert words.startswith("use with care") and "only 20 steps" in words
    words = rw.chain_verdict([True, False, False, True, False] * 2)  # two rejections in a row are no stuck chain
    assert words.startswith("use with care") and "only 10 steps" in words
    assert rw.chain_verdict([True, *[False] * 9]).startswith("do not trust")


@pytest.mark.parametrize("outlier", [3.0, 5.0])
def test_an_ess_that_one_weight_makes_has_the_error_of_that(outlier):
    """Whether a weight that occurs once in n samples is among them decides: a fitted tail alone did not see it."""
    n, rng, found, quoted = 3000, np.random.default_rng(1), [], []
    for _ in range(300):
        log_w = 0.2 * rng.standard_normal(n)
        log_w[: rng.poisson(1.0)] = outlier
        found.append(rw.effective_sample_size(log_w))
        quoted.append(rw.effective_sample_size_error(log_w, n_resamples=300, generator=rng))
    there = np.array(quoted)[np.array(found) < 0.95 * max(found)]  # those that have seen it
    assert np.median(there) == pytest.approx(np.std(found), rel=0.35)
    assert rw.effective_sample_size_error(np.append(np.zeros(n - 1), outlier)) > 0.05


def test_angles_and_estimates_of_many():
    with pytest.raises(InputError, match="2 of 4 angles"):
        metrics.free_energy_profile([0.1, np.nan, np.inf, 0.2])
    assert "n = 5" in str(rw.expectation(np.random.default_rng(0).random((5, 2)), np.zeros(5)))


def test_the_verdict_of_few_weights_says_how_few():
    assert rw.verdict(np.zeros(10)).startswith("do not trust: only 10 samples")
    log_weights = np.full(1000, -np.inf)
    log_weights[:10] = 0.0
    assert rw.verdict(log_weights).startswith("do not trust: only 10 of 1000 weights are positive")


# --- the error of the ESS ---


def pareto(n, rng, k=0.3):
    """Weights with the tail of a Pareto distribution of shape k: ESS (1 - 2k) / (1 - k)^2."""
    return -k * np.log(rng.random(n))


def lognormal(n, rng, sigma=0.3):
    """A tail so light that nothing is to be done about it: ESS exp(-sigma^2)."""
    return sigma * rng.standard_normal(n)


@pytest.mark.parametrize(
    ("draw", "exact", "plain_is_enough"),
    [(pareto, 0.4 / 0.7**2, False), (lognormal, math.exp(-0.09), True)],
    ids=["pareto", "lognormal"],
)
def test_the_error_of_the_ess_is_its_spread(draw, exact, plain_is_enough):
    """Over 150 sets of 1,000 weights. The plain bootstrap, planted, knows no larger weights than those it has seen."""
    rng = np.random.default_rng(3)
    sets = [draw(1000, rng) for _ in range(150)]
    found = np.array([rw.effective_sample_size(w) for w in sets])
    smooth = np.array([rw.effective_sample_size_error(w, generator=rng) for w in sets])
    plain = np.array([rw.bootstrap_error(rw.effective_sample_size, w, n_resamples=100, generator=rng) for w in sets])
    spread, tolerance = found.std(ddof=1), 4 / math.sqrt(2 * len(sets))  # four standard errors of a spread
    assert abs(smooth.mean() / spread - 1) < tolerance
    assert bool(abs(plain.mean() / spread - 1) < tolerance) == plain_is_enough
    covered, plainly = (np.mean(np.abs(found - exact) < 1.96 * error) for error in (smooth, plain))
    assert covered > 0.95 - 4 * math.sqrt(0.05 * 0.95 / len(sets)) if plain_is_enough else covered > plainly


def test_the_error_of_the_ess_where_there_is_no_tail():
    assert rw.effective_sample_size_error(np.zeros(100)) == 0.0
    half = np.where(np.arange(1000) < 500, 0.0, -np.inf)  # a fraction of equal weights: binomial
    assert rw.effective_sample_size_error(half) == pytest.approx(math.sqrt(0.25 / 1000), rel=0.2)
    with pytest.raises(InsufficientDataError, match="24 positive weights"):
        rw.effective_sample_size_error(np.where(np.arange(1000) < 24, 0.0, -np.inf))
    one = rw.effective_sample_size_error(lognormal(1000, np.random.default_rng(0)), generator=1)
    assert one == rw.effective_sample_size_error(lognormal(1000, np.random.default_rng(0)), generator=1)
