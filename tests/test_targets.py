"""Targets: the exact transport, reproducible pairs, shards that resume and torn shards that are noticed."""

import copy
import itertools
import json
import math
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from openmm_regflow.bijections import wrap
from openmm_regflow.errors import CorruptFileError, DivergenceError, IncompatibleFlowError, InputError
from openmm_regflow.files import read_safetensors, write_safetensors
from openmm_regflow.priors import Prior
from openmm_regflow.rigid import random_rotations
from openmm_regflow.targets import (
    MAX_EXACT,
    Pairs,
    PairStore,
    StreamedPairs,
    aligned_coupling,
    check_pairs,
    hierarchical_transport_pairs,
    load_pairs,
    minibatch_coupling,
    optimal_transport_pairs,
    reflow_chunk,
    reflow_pairs,
    transport_cost,
)
from openmm_regflow.teachers import VectorField, integrate

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
    for solve in (optimal_transport_pairs, hierarchical_transport_pairs):
        with pytest.raises(InputError, match="no points"):
            solve(cloud(0, 0), cloud(0, 1), CIRCULAR)
    with pytest.raises(InputError, match="at most 2048 branches"):
        hierarchical_transport_pairs(cloud(5000, 0), cloud(5000, 1), CIRCULAR, branches=3000)


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


@pytest.mark.parametrize("log_det", ["exact", "hutchinson"])
def test_log_determinants_by_threads(teacher, log_det):
    """torch has one level of forward derivatives for all threads; a thread that leaves it takes it from the others."""
    settings = {"shard_size": 16, "n_steps": 4, "seed": 5, "log_det": log_det}
    plain = reflow_pairs(teacher, 512, **settings)
    with ThreadPoolExecutor(4) as pool:
        threaded = reflow_pairs(teacher, 512, **settings, executor=pool)
    assert torch.equal(plain.y, threaded.y) and torch.equal(plain.log_det, threaded.log_det)
    assert torch.equal(plain.log_det, reflow_pairs(teacher, 512, **settings).log_det)


@pytest.mark.parametrize("damage", [{"n": "x"}, {"shard_size": None}, {"shard_size": 0}])
def test_a_manifest_of_nonsense_is_named(teacher, tmp_path, damage):
    reflow_pairs(teacher, 64, shard_size=64, n_steps=2, folder=tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | damage))
    with pytest.raises(CorruptFileError, match="make the pairs again"):
        load_pairs(tmp_path)


def test_pairs_from_spawned_processes(teacher, tmp_path):
    """A real pool of two processes that share nothing: shard k is what it is anywhere."""
    plain = reflow_pairs(teacher, 150, shard_size=64, n_steps=4, seed=5, log_det="exact")
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        spawned = reflow_pairs(
            teacher, 150, shard_size=64, n_steps=4, seed=5, log_det="exact", executor=pool, folder=tmp_path
        )
    for key in ("z", "y", "log_det"):
        assert torch.equal(getattr(plain, key), getattr(spawned, key))
    assert len(list(tmp_path.glob("pairs-*.safetensors"))) == 3


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


def test_pairs_carry_the_log_determinant_of_their_map(teacher):
    """Against the determinant of finite differences of the map itself, in float64; Hutchinson's is right on average."""
    field = copy.deepcopy(teacher).double()
    pairs = reflow_chunk(field, 5, seed=1, n_steps=60, log_det="exact")
    h = 1e-5
    for z, log_det in zip(pairs.z, pairs.log_det):
        steps = torch.cat([z + h * torch.eye(3).double(), z - h * torch.eye(3).double()])
        ends = integrate(field, steps, n_steps=60)[0]
        delta = ends[:3] - ends[3:]
        jacobian = torch.where(CIRCULAR, wrap(delta), delta) / (2 * h)
        # The log-determinant of the ODE and that of its midpoint steps differ by their order, 1/60^2.
        assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(float(log_det), abs=2e-3)
    assert pairs.log_det.abs().max() > 0.05
    exact, rough = (reflow_chunk(field, 2000, 2, n_steps=8, log_det=kind) for kind in ("exact", "hutchinson"))
    assert torch.allclose(exact.y, rough.y)
    difference = rough.log_det - exact.log_det
    assert float(difference.std()) > 0 and abs(float(difference.mean())) < 4 * float(difference.std()) / 2000**0.5


def test_log_determinants_change_no_pair(teacher):
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


def test_pairs_say_where_they_come_from(teacher, tmp_path):
    """The manifest carries it from the teacher to the reader; what differs is named, what is unknown is let through."""
    prior = Prior(CIRCULAR)
    own = {"system": "s", "coordinates": "c", "prior": "p", "name": "alanine"}
    teacher.origin = dict(own)
    try:
        made = reflow_pairs(teacher, 128, shard_size=64, n_steps=2, folder=tmp_path / "a")
        found = load_pairs(tmp_path / "a")
        assert dict(made.origin) == dict(found.origin) == own and torch.equal(made.y, found.y)
        assert json.loads((tmp_path / "a" / "manifest.json").read_text())["origin"] == own
        check_pairs(found, prior, own)
        for key, word in (("system", "another system"), ("coordinates", "another coordinates"),
                          ("prior", "another prior")):  # fmt: skip
            with pytest.raises(IncompatibleFlowError, match=word):
                check_pairs(found, prior, own | {key: "x"})
        check_pairs(found, prior, {"name": "other"})
        check_pairs(Pairs(found.z, found.y), prior, own | {"system": "x"})
        teacher.origin = own | {"prior": "q"}
        with pytest.raises(IncompatibleFlowError, match="origin"):
            reflow_pairs(teacher, 128, shard_size=64, n_steps=2, folder=tmp_path / "a")
    finally:
        teacher.origin = {}


def test_pairs_of_a_folder(teacher, tmp_path):
    """As many as asked for; a missing shard, an empty folder and no folder are refused."""
    made = reflow_pairs(teacher, 300, shard_size=64, n_steps=2, folder=tmp_path / "a", log_det="hutchinson")
    some = load_pairs(tmp_path / "a", 100)
    for key in ("z", "y", "log_det"):
        assert torch.equal(getattr(some, key), getattr(made, key)[:100])
    assert len(load_pairs(tmp_path / "a")) == len(load_pairs(tmp_path / "a", 300)) == 300
    with pytest.raises(InputError, match="holds 300 pairs, 301 are wanted"):
        load_pairs(tmp_path / "a", 301)
    (tmp_path / "a" / "pairs-000002.safetensors").unlink()
    assert len(load_pairs(tmp_path / "a", 128)) == 128
    with pytest.raises(CorruptFileError, match="000002"):
        load_pairs(tmp_path / "a")
    for path in (tmp_path / "a").glob("pairs*"):
        path.unlink()
    with pytest.raises(InputError, match="no pairs yet"):
        load_pairs(tmp_path / "a")
    with pytest.raises(InputError, match="manifest"):
        load_pairs(tmp_path / "b")


def test_a_folder_grows_and_knows_how_many_pairs_it_holds(teacher, tmp_path):
    """As if all had been asked for at once; a missing end is noticed as any other shard is."""
    whole = reflow_pairs(teacher, 64, shard_size=16, n_steps=2)
    assert len(reflow_pairs(teacher, 20, shard_size=16, n_steps=2, folder=tmp_path)) == 20
    made = []
    grown = reflow_pairs(
        teacher, 64, shard_size=16, n_steps=2, folder=tmp_path, progress=lambda done, total: made.append(done)
    )
    assert torch.equal(grown.y, whole.y) and torch.equal(load_pairs(tmp_path, 64).y, whole.y)
    assert len(made) == 3  # the first shard was full
    with pytest.raises(IncompatibleFlowError, match="holds 64 pairs, more than 20"):
        reflow_pairs(teacher, 20, shard_size=16, n_steps=2, folder=tmp_path)
    (tmp_path / "pairs-000003.safetensors").unlink()
    with pytest.raises(CorruptFileError, match=r"000003\.safetensors is missing"):
        load_pairs(tmp_path)


def test_pairs_of_an_earlier_version(teacher, tmp_path):
    """Without numbers in the manifest and in the shards: read as they are, and only full shards are taken for whole."""
    whole = reflow_pairs(teacher, 40, shard_size=16, n_steps=2, folder=tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest.pop("n") == 40
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for path in tmp_path.glob("pairs-*.safetensors"):
        header, tensors = read_safetensors(path, PairStore.KIND, 1)
        del header["size"]
        write_safetensors(path, tensors, header)
    assert torch.equal(load_pairs(tmp_path, 40).y, whole.y)
    with pytest.raises(InputError, match="holds 40 pairs, 50 are wanted"):
        load_pairs(tmp_path, 50)
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    made = []
    options = {"shard_size": 16, "n_steps": 2, "folder": tmp_path, "progress": lambda done, total: made.append(done)}
    assert torch.equal(reflow_pairs(teacher, 40, **options).y, whole.y) and not made
    assert len(reflow_pairs(teacher, 48, **options)) == 48 and len(made) == 1


def test_latents_turned_towards_frames_are_samples_of_the_prior_still():
    """Shorter ways; shape and centre of every latent kept, and for data without a direction no direction either."""
    g = torch.Generator().manual_seed(0)
    prior = Prior(torch.zeros(12, dtype=torch.bool), torch.linalg.cholesky(torch.eye(4) + 0.5).double())
    z = prior.sample(4000, g, torch.float64)
    frames = torch.randn(1, 4, 3, generator=g, dtype=torch.float64).expand(4000, -1, -1)
    y = (frames @ random_rotations(4000, g).transpose(1, 2)).flatten(1)
    turned = aligned_coupling(z, y)
    assert (turned - y).square().sum() < 0.8 * (z - y).square().sum()
    for x in (z, turned):
        gram = x.view(-1, 4, 3) @ x.view(-1, 4, 3).transpose(1, 2)
        apart, before = (torch.cdist(v.view(-1, 4, 3), v.view(-1, 4, 3)) for v in (x, z))
        assert (apart - before).abs().max() < 1e-7
        assert (x.view(-1, 4, 3).mean(1) - z.view(-1, 4, 3).mean(1)).abs().max() < 1e-12
        # Each component of an atom has the prior's variance: a mean of 4,000 squares of Gaussians.
        variance = x.square().mean(0).view(4, 3)
        assert ((variance / gram.mean(0).diagonal()[:, None] * 3 - 1).abs() < 5 * (2 / 4000) ** 0.5).all()


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


def test_unknown_words_are_refused_before_a_folder_is_made(teacher, tmp_path):
    with pytest.raises(InputError, match="method is 'midpont'; known: euler, midpoint, rk4, bosh3, dopri5, dopri8"):
        reflow_pairs(teacher, 10, method="midpont", folder=tmp_path / "a")
    with pytest.raises(InputError, match="log_det"):
        reflow_pairs(teacher, 10, log_det="maybe", folder=tmp_path / "a")
    with pytest.raises(InputError, match="n_steps is 0"):
        reflow_pairs(teacher, 10, n_steps=0, folder=tmp_path / "a")
    with pytest.raises(InputError, match="seed -1"):
        reflow_pairs(teacher, 10, seed=-1, folder=tmp_path / "a")
    assert not (tmp_path / "a").exists()
