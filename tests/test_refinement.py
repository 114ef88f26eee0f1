"""Refinement on a target whose density is known: another flow."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openmm_regflow import flows, pools, reweighting
from openmm_regflow.errors import IncompatibleFlowError, InputError
from openmm_regflow.refinement import RefineConfig, refine, truncate
from openmm_regflow.systems import load_system


@pytest.fixture(scope="module")
def coordinates():
    mol = load_system("alanine-dipeptide")
    g = torch.Generator().manual_seed(0)
    x = torch.as_tensor(mol.positions) + 0.003 * torch.randn(500, 22, 3, generator=g, dtype=torch.float64)
    return flows.coordinates_for(mol.topology, x)


def pair(coordinates):
    """A flow to be refined, and the reduced potential whose Boltzmann density is that of another flow."""
    target = flows.spline(coordinates, n_layers=2, hidden=8)
    flow = flows.spline(coordinates, n_layers=2, hidden=8, seed=1)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in flow.bijection.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return flow, lambda x: -target.log_prob(x)


def config(rate, rounds=3):
    return RefineConfig(rounds=rounds, pool=4000, batch_size=200, learning_rate=rate, ema=0.9)


def stopped_and_resumed(coordinates, path, settings, **keywords):
    """A refinement that is interrupted at the third pool and taken up by another process's flow; flow and records."""

    def stop(k, total, figures):
        if k == 2:
            raise KeyboardInterrupt

    again, potential = pair(coordinates)
    with pytest.raises(KeyboardInterrupt):
        refine(again, potential, settings, checkpoint=path, progress=stop, **keywords)
    fresh, potential = pair(coordinates)
    return fresh, refine(fresh, potential, settings, checkpoint=path, **keywords)


def same_weights(a, b):
    return all(torch.equal(v, w) for v, w in zip(a.bijection.state_dict().values(), b.bijection.state_dict().values()))


def test_ess_grows_and_populations_are_watched(coordinates):
    flow, potential = pair(coordinates)
    records = refine(flow, potential, config(3e-3), watch=[lambda x: torch.ones(len(x), dtype=torch.bool)])
    assert records[-1].ess > records[0].ess + 0.1
    assert [r.energies for r in records] == [4000, 8000, 12000, 16000]
    assert all(r.occupied[0] == pytest.approx(1.0) for r in records)


def test_a_round_that_makes_it_worse_is_undone(coordinates):
    flow, potential = pair(coordinates)
    before = {k: v.clone() for k, v in flow.bijection.state_dict().items()}
    records = refine(flow, potential, config(1.0, rounds=1))
    assert records[1].undone
    assert all(torch.equal(v, before[k]) for k, v in flow.bijection.state_dict().items())


def test_a_refinement_that_was_stopped_goes_on_as_if_it_had_not(coordinates, tmp_path):
    flow, potential = pair(coordinates)
    whole = refine(flow, potential, config(3e-3))
    path = tmp_path / "refinement.safetensors"
    fresh, records = stopped_and_resumed(coordinates, path, config(3e-3))
    assert records == whole and same_weights(flow, fresh)
    with pytest.raises(IncompatibleFlowError, match="other settings"):
        refine(fresh, potential, config(1e-3), checkpoint=path)
    moved, _ = pair(coordinates)
    next(moved.bijection.parameters()).data.add_(1e-3)
    with pytest.raises(IncompatibleFlowError, match="other weights"):
        refine(moved, potential, config(3e-3), checkpoint=path)
    other, _ = pair(coordinates)
    other.metadata = flows.FlowMetadata(temperature=600.0)
    with pytest.raises(IncompatibleFlowError, match="other temperature"):
        refine(other, potential, config(3e-3), checkpoint=path)
    with pytest.raises(IncompatibleFlowError, match="other frames"):
        refine(pair(coordinates)[0], potential, config(3e-3), data=flow.sample(10)[0], checkpoint=path)


def test_a_second_refinement_sees_other_samples(coordinates, monkeypatch):
    """With the same seed: those of the first are learned, and would judge the flow too kindly."""
    seen, drawn = [], pools.draw

    def noted(*arguments, **keywords):
        pool = drawn(*arguments, **keywords)
        seen.append(pool)
        return pool

    monkeypatch.setattr("openmm_regflow.refinement.draw", noted)
    flow, potential = pair(coordinates)
    refine(flow, potential, config(1e-9, rounds=1))
    refine(flow, potential, config(1e-9, rounds=1))
    refine(pair(coordinates)[0], potential, config(1e-9, rounds=1))
    rounded, _ = pair(coordinates)
    with torch.no_grad():
        next(rounded.bijection.parameters()).add_(1e-7)  # as another number of processes leaves it
    refine(rounded, potential, config(1e-9, rounds=1))
    first, _, second, _, again, _, nearly, _ = (pool.y for pool in seen)
    assert torch.equal(first, again)
    assert (first - second).abs().min(1).values.median() > 1e-3
    assert 0 < (first - nearly).abs().max() < 1e-3
    assert flow.metadata.training["refinements"] == 2


def test_a_pool_with_hardly_a_possible_sample_goes_on(coordinates):
    flow, potential = pair(coordinates)
    data, _ = flow.sample(500, torch.Generator().manual_seed(0))

    def walled(x):
        impossible = torch.arange(len(x)) >= 4
        return torch.where(impossible, math.inf, potential(x)) if len(x) == 2000 else potential(x)

    settings = config(1e-9, rounds=1).model_copy(update={"pool": 2000, "anchors": 500})
    records = refine(flow, walled, settings, data=data)
    assert [r.ess_truncated for r in records] == [0.0, 0.0] and all(r.ess > 0 for r in records)


def test_anchors_give_the_divergence_and_bounded_weights(coordinates):
    """KL(p || q) from a mixed pool against its mean over fresh samples of the target."""
    target = flows.spline(coordinates, n_layers=2, hidden=8)
    flow, potential = pair(coordinates)
    data, _ = target.sample(3000, torch.Generator().manual_seed(5))
    fresh, log_p = target.sample(20_000, torch.Generator().manual_seed(6))
    ratio = (log_p - flow.log_prob(fresh)).numpy()
    records = refine(flow, potential, config(1e-9, rounds=1), data=data)
    error = ratio.std() * (1 / len(ratio) + 1 / 3000) ** 0.5
    assert ratio.mean() > 10 * error
    assert all(abs(r.divergence - ratio.mean()) < 4 * error for r in records)
    assert records[0].energies == 7000
    own = pools.draw(flow, 4000, potential, seed=(7,))
    pool = pools.Anchors(data, potential, 1000).mix(flow, own, 0)
    assert len(pool.y) == len(pool.log_r) == 5000 and pool.log_w.max() <= np.log(5.0) + 1e-6
    # The mean weight is one, up to the error of the pool and that of the normalisation.
    w, plain = np.exp(pool.log_w), np.exp(own.log_w - own.log_w.max())
    error = (w.var() / len(w) + plain.var() / plain.mean() ** 2 / len(plain)) ** 0.5
    assert abs(w.mean() - 1.0) < 4 * error


@pytest.mark.parametrize(("n", "n_frames", "lift"), [(30, 1000, 0.0), (150, 250, 2.0)])
def test_the_error_of_the_divergence_is_its_spread(n, n_frames, lift, coordinates):
    """Over independent pools; where samples are few beside frames, most of it is that of the normalisation."""
    target = flows.spline(coordinates, n_layers=2, hidden=8)
    flow, potential = pair(coordinates)
    g, repeats, found = torch.Generator().manual_seed(2), 120, []
    with torch.no_grad():
        for p in flow.bijection.parameters():
            p.add_(0.04 * torch.randn(p.shape, generator=g))
    column = int(coordinates.circular.nonzero()[0])

    def inside(x):
        return (coordinates.to_features(x)[0][:, column] - 0.5).abs() < 0.4

    for k in range(repeats):
        frames, _ = target.sample(n_frames, torch.Generator().manual_seed(k))
        own = pools.draw(flow, n, potential, [inside], (1, k))
        pool = pools.Anchors(frames, potential, n_frames).mix(flow, own, k, [inside])
        pool.lift = lift
        value, error = pool.divergence()
        pool.lift = 0.0
        unlifted = pool.divergence()[1]
        pool.lift = lift
        w = reweighting.normalised_weights(pool.log_w)
        as_if_known = np.sqrt(np.sum((w * (pool.log_ratio() - value)) ** 2))
        found.append((value, error, unlifted if lift else as_if_known))
    values, errors, planted = np.array(found).T
    slack = 4 * (2 * repeats) ** -0.5 + 0.05  # the delta method leaves out terms of higher order
    assert abs(np.sqrt(np.mean(errors**2)) / values.std() - 1) < slack
    # Planted: the normalisation taken as known, or the lift forgotten.
    assert abs(np.sqrt(np.mean(planted**2)) / values.std() - 1) > slack


def test_the_normalisation_is_found_where_most_samples_clash():
    """Energies thousands of kT too high, against samples of two normal densities alone; nothing possible is refused."""
    g = np.random.default_rng(0)
    x = np.concatenate([g.normal(0.0, 1.5, 20_000), g.normal(0.0, 1.0, 10_000)])
    log_p, log_q = 7.0 - x**2 / 2, -(x**2) / 4.5 - np.log(1.5 * np.sqrt(2 * np.pi))
    exact = 7.0 + 0.5 * np.log(2 * np.pi)
    assert pools.log_normalisation(log_p, log_q, 20_000, 10_000) == pytest.approx(exact, abs=0.05)
    clashes = np.concatenate([np.full(40_000, -5000.0), log_p])
    found = pools.log_normalisation(clashes, np.concatenate([np.zeros(40_000), log_q]), 60_000, 10_000)
    assert found == pytest.approx(exact - np.log(3), abs=0.05)  # of what a third of the samples is drawn from
    with pytest.raises(InputError, match="no sample of the flow is possible"):
        pools.log_normalisation(log_p[20_000:], log_q[20_000:], 20_000, 10_000)


def test_anchors_move_and_a_stopped_refinement_takes_them_up_again(coordinates, tmp_path):
    """With a kernel that is exact for the target, fresh draws."""
    target = flows.spline(coordinates, n_layers=2, hidden=8)
    data, _ = target.sample(300, torch.Generator().manual_seed(5))
    settings = config(3e-3).model_copy(update={"pool": 2000, "anchors": 600, "anchor_moves": 2})
    seen = []

    def mover(x, generator):
        seen.append(x)
        return target.sample(len(x), generator)[0], 7 * len(x)

    flow, potential = pair(coordinates)
    whole = refine(flow, potential, settings, data=data, mover=mover)
    assert len(seen[0]) == 600 and not torch.equal(seen[0], seen[2])  # more anchors than frames, moved twice a pool
    assert [r.energies for r in whole] == [600 + k * (2000 + 2 * 7 * 600 + 600) for k in (1, 2, 3, 4)]
    options = {"data": data, "mover": mover}
    fresh, records = stopped_and_resumed(coordinates, tmp_path / "refinement.safetensors", settings, **options)
    assert records == whole and same_weights(flow, fresh)


def test_anchors_take_turns(coordinates, tmp_path):
    """Where there are more frames than anchors, every pool gets others; a stopped refinement goes on with its own."""
    target = flows.spline(coordinates, n_layers=2, hidden=8)
    data, _ = target.sample(1000, torch.Generator().manual_seed(5))
    settings = config(3e-3).model_copy(update={"anchors": 400})
    flow, potential = pair(coordinates)
    anchors, seen = pools.Anchors(data, potential, settings.anchors), []
    for k in range(5):
        assert anchors.renew(k) == (400 if k else 0)
        seen.append(anchors.x)
    rows = torch.cat(seen)
    assert len(torch.unique(rows.flatten(1), dim=0)) == 1000  # two rounds of all frames
    whole = refine(flow, potential, settings, data=data)
    assert [r.energies for r in whole] == [400 + 4000 + k * 4400 for k in range(4)]
    fresh, records = stopped_and_resumed(coordinates, tmp_path / "refinement.safetensors", settings, data=data)
    assert records == whole and same_weights(flow, fresh)


def test_a_rare_set_gets_its_share(coordinates):
    """The flow's own samples come to it as often as asked; weighted, they hold what the target holds."""
    target = flows.spline(coordinates, n_layers=2, hidden=8)
    data, _ = target.sample(4000, torch.Generator().manual_seed(5))
    column = int(coordinates.circular.nonzero()[0])

    def inside(x):
        return (coordinates.to_features(x)[0][:, column] - 0.5).abs() < 0.2

    held = float(inside(data).double().mean())
    assert 0.01 < held < 0.15
    found = {}
    for share in (0.0, 0.4):
        flow, potential = pair(coordinates)
        settings = config(1e-2, rounds=12).model_copy(update={"rare_share": share, "anchors": 1000})
        records = refine(flow, potential, settings, data=data, watch=[inside])
        x, log_q = flow.sample(20_000, torch.Generator().manual_seed(6))
        found[share] = float(inside(x).double().mean())
        w = torch.softmax(-potential(x).double() - log_q.double(), 0)
        error = float((w.square() * (inside(x).double() - held).square()).sum().sqrt())
        assert abs(float(w[inside(x)].sum()) - held) < 4 * (error + (held / len(data)) ** 0.5)
        assert not records[-1].undone
    assert abs(found[0.0] - held) < 0.03
    assert found[0.4] > 0.25


def test_a_tail_that_the_flow_cannot_follow_is_covered(coordinates):
    """A second bump, 3.5 standard deviations out: for a lower variance of the weights a higher KL(p || q) is paid."""
    target = flows.real_nvp(coordinates, n_layers=2, hidden=8)
    column, shift, share = int((~coordinates.circular).nonzero()[0]), 3.5, torch.tensor(0.05)

    def log_p(x):
        y = coordinates.to_features(x)[0][:, column]
        bump = share.log() + shift * y - shift**2 / 2
        return target.log_prob(x) + torch.logaddexp((1 - share).log(), bump)

    def draw(n, seed):
        g = torch.Generator().manual_seed(seed)
        y = target.prior.sample(n, g).double()
        y[:, column] += shift * (torch.rand(n, generator=g) < share)
        return coordinates.to_positions(y)[0]

    data, fresh, ratios = draw(4000, 5), draw(20_000, 6), {}
    for tail in (0.0, 0.5):
        flow = flows.real_nvp(coordinates, n_layers=2, hidden=8)
        settings = config(1e-2, rounds=12).model_copy(update={"anchors": 1000, "tail": tail})
        refine(flow, lambda x: -log_p(x), settings, data=data)
        ratios[tail] = (log_p(fresh) - flow.log_prob(fresh)).detach().double().numpy()
    more = np.exp(ratios[0.0]) - np.exp(ratios[0.5])  # E_p[p/q] = 1 / ESS
    assert more.mean() > 3 * more.std() / len(more) ** 0.5
    assert ratios[0.0].mean() < ratios[0.5].mean()


def test_the_tail_begins_after_its_share_of_the_rounds(coordinates):
    found = []
    for choice in ({}, {"tail": 0.5, "tail_after": 0.5}, {"tail": 0.5}):
        flow, potential = pair(coordinates)
        records = refine(flow, potential, config(3e-3, rounds=4).model_copy(update=choice))
        found.append([record.divergence for record in records])
    without, late, always = found
    assert late[:3] == without[:3] != always[:3]  # pool k is judged before it is learned from
    assert late[3] != without[3]


@pytest.mark.parametrize("tail", [0.0, 0.5])
def test_impossible_samples_have_no_weight(tail, coordinates):
    flow, potential = pair(coordinates)
    column = int((~coordinates.circular).nonzero()[0])

    def walled(x):
        beyond = coordinates.to_features(x)[0][:, column] > 1.5
        return torch.where(beyond, torch.inf, potential(x))

    records = refine(flow, walled, config(3e-3, rounds=2).model_copy(update={"tail": tail}))
    assert records[-1].divergence < records[0].divergence


def test_a_share_of_nothing_is_refused(coordinates):
    flow, potential = pair(coordinates)
    settings = config(1e-3).model_copy(update={"rare_share": 0.2})
    data, _ = flow.sample(100, torch.Generator().manual_seed(5))
    with pytest.raises(InputError, match="watched sets"):
        refine(flow, potential, settings, data=data)
    with pytest.raises(InputError, match="none of the frames"):
        refine(flow, potential, settings, data=data, watch=[lambda x: torch.zeros(len(x), dtype=torch.bool)])


def test_hopeless_pool(coordinates):
    flow, _ = pair(coordinates)
    with pytest.raises(InputError, match="finite weight"):
        refine(flow, lambda x: torch.full((len(x),), torch.inf), config(1e-3))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-300, 300), min_size=2, max_size=200))
def test_truncated_weights_are_weights(values):
    w = truncate(np.asarray(values))
    assert w.mean() == pytest.approx(1.0) and (w >= 0).all() and w.max() <= len(w) * (1 + 1e-12)


def test_truncation_bounds_the_largest_weight():
    log_w = np.zeros(10_000)
    log_w[0] = 8.0
    rest = 9999 / (np.exp(8.0) + 9999)
    assert truncate(log_w)[0] == pytest.approx(10_000 * 0.01 / (0.01 + rest), rel=1e-9)
