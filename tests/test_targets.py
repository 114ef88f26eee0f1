"""Targets: the exact transport, reproducible pairs, shards that resume and torn shards that are noticed."""

import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from openmm_regflow.bijections import wrap
from openmm_regflow.coordinates import random_rotations
from openmm_regflow.errors import DivergenceError, IncompatibleFlowError, InputError
from openmm_regflow.flows import Prior
from openmm_regflow.targets import (
    MAX_EXACT,
    Pairs,
    StreamedPairs,
    check_pairs,
    hierarchical_transport_pairs,
    minibatch_coupling,
    optimal_transport_pairs,
    reflow_chunk,
    reflow_pairs,
    transport_cost,
)
from openmm_regflow.teachers import VectorField

CIRCULAR = torch.tensor([False, False, True])


def cloud(n, seed):
    return Prior(CIRCULAR).sample(n, torch.Generator().manual_seed(seed), torch.float64)


@pytest.fixture(scope="module")
def teacher():
    field = VectorField(CIRCULAR, hidden=16, depth=1)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in field.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    return field


def cost(z, y):
    delta = z - y
    return float(torch.where(CIRCULAR, wrap(delta), delta).square().sum())


def test_transport_is_the_best_of_all_permutations():
    z, y = cloud(6, 0), cloud(6, 1)
    pairs = optimal_transport_pairs(z, y, CIRCULAR)
    best = min(cost(z, y[list(order)]) for order in itertools.permutations(range(6)))
    assert cost(pairs.z, pairs.y) == pytest.approx(best, rel=1e-12)
    assert sorted(pairs.y[:, 0].tolist()) == sorted(y[:, 0].tolist())


def test_transport_goes_the_short_way_round():
    z = torch.tensor([[0.0, 0.0, math.pi - 0.1], [0.0, 0.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.0, -math.pi + 0.1]], dtype=torch.float64)
    pairs = optimal_transport_pairs(z, y, CIRCULAR)
    assert torch.equal(pairs.y, y[[1, 0]])
    assert transport_cost(z, y, CIRCULAR)[0, 1] == pytest.approx(0.04)


def test_transport_refuses():
    with pytest.raises(InputError, match="one shape"):
        optimal_transport_pairs(cloud(5, 0), cloud(6, 0), CIRCULAR)
    with pytest.raises(InputError, match="exceed"):
        optimal_transport_pairs(torch.zeros(MAX_EXACT + 1, 3), torch.zeros(MAX_EXACT + 1, 3), CIRCULAR)
    bad = cloud(5, 0)
    bad[2, 1] = math.nan
    with pytest.raises(InputError, match="NaN"):
        optimal_transport_pairs(bad, cloud(5, 1), CIRCULAR)


def test_minibatch_coupling_shortens_the_way():
    z, y = cloud(64, 2), cloud(64, 3)
    matched = minibatch_coupling(CIRCULAR)(z, y)
    assert cost(matched, y) < cost(z, y)
    assert sorted(matched[:, 0].tolist()) == sorted(z[:, 0].tolist())


def test_pairs_do_not_depend_on_executor_or_folder(teacher, tmp_path):
    plain = reflow_pairs(teacher, 300, shard_size=64, n_steps=4, seed=5)
    with ThreadPoolExecutor(2) as pool:
        threaded = reflow_pairs(teacher, 300, shard_size=64, n_steps=4, seed=5, executor=pool)
    stored = reflow_pairs(teacher, 300, shard_size=64, n_steps=4, seed=5, folder=tmp_path)
    assert len(plain) == 300
    assert torch.equal(plain.y, threaded.y) and torch.equal(plain.y, stored.y) and torch.equal(plain.z, stored.z)
    assert len(torch.unique(plain.z[:, 0])) == 300


def test_pairs_resume_and_torn_shards_are_made_again(teacher, tmp_path):
    first = reflow_pairs(teacher, 300, shard_size=64, n_steps=4, folder=tmp_path)
    shards = sorted(tmp_path.glob("pairs-*.safetensors"))
    assert len(shards) == 5
    untouched = shards[0].stat().st_mtime_ns
    shards[1].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-7])
    raw = bytearray(shards[3].read_bytes())
    raw[-3] ^= 0x10
    shards[3].write_bytes(raw)
    made = []
    again = reflow_pairs(teacher, 300, shard_size=64, n_steps=4, folder=tmp_path, progress=lambda d, t: made.append(d))
    assert torch.equal(first.z, again.z) and torch.equal(first.y, again.y)
    assert len(made) == 3 and shards[0].stat().st_mtime_ns == untouched


def test_a_folder_of_other_pairs_is_refused(teacher, tmp_path):
    reflow_pairs(teacher, 64, shard_size=64, n_steps=4, folder=tmp_path)
    with pytest.raises(IncompatibleFlowError, match="n_steps"):
        reflow_pairs(teacher, 64, shard_size=64, n_steps=5, folder=tmp_path)
    other = VectorField(CIRCULAR, hidden=16, depth=1, seed=9)
    with pytest.raises(IncompatibleFlowError, match="teacher"):
        reflow_pairs(other, 64, shard_size=64, n_steps=4, folder=tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["n_steps"] == 4


def test_pairs_carry_the_log_determinant(teacher):
    pairs = reflow_chunk(teacher, 20, seed=1, n_steps=8, log_det="exact")
    again = reflow_chunk(teacher, 20, seed=1, n_steps=8)
    assert torch.allclose(pairs.y, again.y, atol=1e-6) and again.log_det is None
    assert pairs.log_det is not None and pairs.log_det.shape == (20,)


def test_stream_never_repeats_and_knows_its_place(teacher):
    source, other = (StreamedPairs(teacher, 16, n_steps=2, log_det="hutchinson") for _ in range(2))
    batches = [source(k, torch.Generator()) for k in range(5)]
    z = torch.cat([b[0] for b in batches])
    assert z.shape == (80, 3) and len(torch.unique(z[:, 0])) == 80
    assert all(torch.equal(a, b) for a, b in zip(other(3, torch.Generator()), batches[3], strict=True))


def test_pairs_of_another_system_or_prior_are_refused(teacher):
    prior = Prior(CIRCULAR)
    fine = reflow_chunk(teacher, 500, seed=1, n_steps=2)
    check_pairs(fine, prior)
    with pytest.raises(IncompatibleFlowError, match="another system"):
        check_pairs(fine, Prior(torch.zeros(6, dtype=torch.bool)))
    with pytest.raises(IncompatibleFlowError, match="leave"):
        check_pairs(Pairs(4 * fine.z, fine.y), prior)
    lines = Prior(torch.zeros(6, dtype=torch.bool))
    factor = torch.tensor([[1.0, 0.0], [0.9, 0.4]])
    chain = Prior(lines.circular, factor)
    z, w = (p.sample(500, torch.Generator().manual_seed(2)) for p in (lines, chain))
    check_pairs(Pairs(z, z), lines)
    check_pairs(Pairs(w, z), chain)
    with pytest.raises(IncompatibleFlowError, match="normal prior"):
        check_pairs(Pairs(w, z), lines)
    with pytest.raises(IncompatibleFlowError, match="harmonic prior"):
        check_pairs(Pairs(z, w), chain)


def test_stream_gives_up_on_a_teacher_that_blows_up(teacher):
    broken = VectorField(CIRCULAR, hidden=16, depth=1)
    with torch.no_grad():
        broken.network.head.bias.fill_(math.nan)
    with pytest.raises(DivergenceError, match="train it longer"):
        StreamedPairs(broken, 4, n_steps=1)(0, torch.Generator())


@pytest.mark.parametrize("seed", [0, 1])
def test_hierarchical_transport_is_one_to_one_and_near_the_optimum(seed):
    """Between a random coupling (0) and the optimum (1) it lies at 0.9 or above, with eight blocks and two levels."""
    z, y = cloud(1200, 20 + seed), cloud(1200, 40 + seed) * 1.3
    y[:, 0] += 2.0 * (y[:, 1] > 0.5)
    best = cost(z, optimal_transport_pairs(z, y, CIRCULAR).y)
    for block in (300, 150):
        pairs = hierarchical_transport_pairs(z, y, CIRCULAR, block=block, branches=4, seed=seed)
        assert sorted(pairs.y[:, 0].tolist()) == sorted(y[:, 0].tolist())
        reached = cost(z, pairs.y)
        assert best <= reached + 1e-9 and (cost(z, y) - reached) / (cost(z, y) - best) > 0.9
    small = hierarchical_transport_pairs(z[:100], y[:100], CIRCULAR)
    assert torch.equal(small.y, optimal_transport_pairs(z[:100], y[:100], CIRCULAR).y)
    with pytest.raises(InputError, match="branches"):
        hierarchical_transport_pairs(z, y, CIRCULAR, block=MAX_EXACT + 1)


def test_aligned_transport_undoes_rotations():
    """Latents that are turned and shuffled data: their coupling costs nothing."""
    g = torch.Generator().manual_seed(0)
    y = torch.randn(40, 5, 3, generator=g, dtype=torch.float64)
    z = y @ random_rotations(40, g).transpose(1, 2)
    z = (z - z.mean(1, keepdim=True) + y.mean(1, keepdim=True))[torch.randperm(40, generator=g)]
    lines = torch.zeros(15, dtype=torch.bool)
    pairs = optimal_transport_pairs(z.flatten(1), y.flatten(1), lines, groups=[])
    assert (pairs.z - pairs.y).abs().max() < 1e-7
    with pytest.raises(InputError, match="angles"):
        optimal_transport_pairs(cloud(5, 0), cloud(5, 1), CIRCULAR, groups=[])


@pytest.mark.parametrize("n", [0, -3])
def test_no_pairs(teacher, n):
    with pytest.raises(InputError, match="at least 1"):
        reflow_pairs(teacher, n)
