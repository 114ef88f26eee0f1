"""A map learned by regression on optimal-transport pairs, on a system with an exact answer."""

import math

import pytest
import torch

from openmm_regflow import tfep
from openmm_regflow.coordinates import CartesianMap
from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.flows import coordinates_for
from openmm_regflow.objectives import wrapped_difference
from openmm_regflow.rigid import random_rotations
from openmm_regflow.systems import load_system
from openmm_regflow.targets import optimal_transport_pairs
from openmm_regflow.tfep.learned import aligned_pairs, reflow_between, transport_pairs
from openmm_regflow.toys import harmonic_well, skewed_double_well
from openmm_regflow.training import TrainConfig


def basins(n, seed=1):
    well = skewed_double_well(barrier=12.0, skew=3.0)
    x = well.sample(n, torch.Generator().manual_seed(seed))
    a = tfep.State(well.energy, well.temperature, lambda x: x[:, 0, 0] <= 0)
    b = tfep.State(well.energy, well.temperature, lambda x: x[:, 0, 0] > 0)
    return well, a, b, x[x[:, 0, 0] <= 0], x[x[:, 0, 0] > 0]


def learn(samples, n_steps, **keywords):
    """A small map from the first half of each set, and its result on the second halves."""
    _, a, b, left, right = samples
    (left_train, left_test), (right_train, right_test) = tfep.split(left), tfep.split(right)
    learned = tfep.fit_map(
        CartesianMap(1, scale=0.05), left_train, right_train, n_layers=4, hidden=16, max_pairs=400,
        config=TrainConfig(steps=n_steps, batch_size=128, learning_rate=3e-3, ema=0.98), **keywords,
    )  # fmt: skip
    result = tfep.free_energy_difference(
        learned, a, b, left_test, right_test, trained_on=(left_train, right_train), compare_plain=False
    )
    return learned, result, left_test


@pytest.mark.parametrize("coupling", ["torsional", "reflow"])
def test_learned_map_finds_delta_f(coupling):
    samples = basins(3000)
    learned, result, x = learn(samples, 150, architecture="real_nvp", coupling=coupling)
    assert abs(result.delta_f - samples[0].delta_f()) < 4 * result.uncertainty
    assert not result.verdict.startswith("do not trust")
    y, log_det = learned.forward(x)
    back, reverse = learned.inverse(y)
    assert (back - x).abs().max() < 1e-7 and (log_det + reverse).abs().max() < 1e-6


def test_reflow_pairs_join_the_two_ensembles():
    """Ends of the teacher's paths are distributed as the other state's samples; pairs on a circle go the short way."""
    g = torch.Generator().manual_seed(0)
    circular = torch.tensor([False, True])
    a = torch.randn(1000, 2, generator=g) * torch.tensor([0.5, 0.3]) + torch.tensor([0.0, 2.8])
    b = torch.randn(1000, 2, generator=g) * torch.tensor([1.0, 0.3]) + torch.tensor([1.0, -2.8])
    a, b = (torch.stack([v[:, 0], torch.remainder(v[:, 1] + math.pi, 2 * math.pi) - math.pi], 1) for v in (a, b))
    config = TrainConfig(steps=400, batch_size=256, learning_rate=3e-3, ema=0.98)
    pairs = reflow_between(a, b, circular, config, hidden=32, depth=2)
    ends, starts = pairs.y[:1000], pairs.z[1000:]
    for found, wanted in ((ends, b), (starts, a)):
        # Means of 1000 samples on either side, 4 standard errors, and a tenth of a width for a short training.
        tolerance = (4 * math.sqrt(2 / 1000) + 0.1) * wanted[:, 0].std()
        assert abs(found[:, 0].mean() - wanted[:, 0].mean()) < tolerance
        assert found[:, 0].std() == pytest.approx(float(wanted[:, 0].std()), rel=4 * math.sqrt(1 / 1000) + 0.1)
        assert torch.exp(1j * found[:, 1]).mean().angle() == pytest.approx(
            float(torch.exp(1j * wanted[:, 1]).mean().angle()), abs=(4 * math.sqrt(2 / 1000) + 0.1) * 0.3
        )
    along = torch.remainder(pairs.y[:, 1] - pairs.z[:, 1] + math.pi, 2 * math.pi) - math.pi
    assert along.mean() == pytest.approx(2 * math.pi - 5.6, abs=0.1)
    assert torch.corrcoef(torch.stack([pairs.z[:1000, 0], ends[:, 0]]))[0, 1] > 0.95  # a map, nearly monotone


@pytest.mark.slow
def test_refinement_raises_the_overlap():
    samples = basins(4000)
    refined = TrainConfig(steps=200, batch_size=128, learning_rate=1e-3, ema=0.98)
    _, plain, _ = learn(samples, 250)
    _, better, _ = learn(samples, 250, refine=samples[1:3], refine_config=refined)
    for result in (plain, better):
        assert abs(result.delta_f - samples[0].delta_f()) < 4 * result.uncertainty
    assert better.overlap > plain.overlap


def test_too_few_samples_and_mismatched_atoms_are_refused():
    _, _, _, left, right = basins(400)
    with pytest.raises(InsufficientDataError, match="at least 20"):
        tfep.fit_map(CartesianMap(1), left, right[:5])
    with pytest.raises(InputError, match="atoms"):
        tfep.fit_map(CartesianMap(2), left, right)


def test_torsional_coupling_keeps_the_widths_of_stiff_features():
    """Regression targets have the moments of B in stiff directions and the distribution of B in torsions."""
    rng = torch.Generator().manual_seed(3)
    circular = torch.tensor([False] * 6 + [True])
    a, b = torch.randn((2, 400, 7), generator=rng)
    b[:, :6] = 0.5 * b[:, :6] + 1.0
    a[:, 6], b[:, 6] = 0.3 * a[:, 6] - 1.0, 0.3 * b[:, 6] + 1.5
    pairs = transport_pairs(a, b, circular, "torsional")
    assert torch.equal(pairs.z, a)
    assert torch.equal(pairs.y[:, 6].sort().values, b[:, 6].sort().values)
    assert (pairs.y[:, :6].mean(0) - b[:, :6].mean(0)).abs().max() < 1e-5
    assert (torch.cov(pairs.y[:, :6].T) - torch.cov(b[:, :6].T)).abs().max() < 1e-5
    # The full coupling has the marginals of B too, but its targets hardly depend on where they came from.
    full = transport_pairs(a, b, circular, "full")

    def explained(y):
        return float(1 - (y[:, :6] - torch.cat([a, torch.ones(400, 1)], 1) @ torch.linalg.lstsq(
            torch.cat([a, torch.ones(400, 1)], 1), y[:, :6]).solution).var() / y[:, :6].var())  # fmt: skip

    assert explained(pairs.y) > 0.999 > 0.95 > explained(full.y)
    with pytest.raises(InputError, match="coupling"):
        transport_pairs(a, b, circular, "partial")


def test_rows_outside_the_chart_count_as_infinite_works():
    well = harmonic_well(2)
    state = tfep.State(well.energy, well.temperature)

    class Chart:
        """Leaves everything in place, except that a negative first coordinate is outside."""

        def to_features(self, x):
            return x.flatten(1), x.new_zeros(len(x))

        def to_positions(self, z):
            x = torch.where(z[:, :1] < 0, torch.nan, z)
            return x.reshape(-1, 2, 3), z.new_zeros(len(z))

    x = well.sample(200, torch.Generator().manual_seed(0))
    works = tfep.works(tfep.CoordinatesMap(Chart(), tfep.IdentityMap()), state, state, x, x)
    outside = (x[:, 0, 0] < 0).numpy()
    assert (works.forward[outside] == float("inf")).all() and (works.forward[~outside] == 0).all()


def test_aligned_coupling_sees_shapes_and_not_frames():
    """Frames turned, moved and shuffled find themselves again; by plain distances they do not."""
    mol = load_system("alanine-dipeptide")
    x = torch.as_tensor(mol.reference("validation")[::60]).double()
    g = torch.Generator().manual_seed(0)
    turned = x @ random_rotations(len(x), g).transpose(1, 2) + torch.randn(len(x), 1, 3, generator=g)
    shuffled = turned[torch.randperm(len(x), generator=g)]
    coordinates = coordinates_for(mol.topology, torch.as_tensor(mol.reference("train")))
    pairs = aligned_pairs(coordinates, x, shuffled)
    assert wrapped_difference(pairs.y, pairs.z, coordinates.circular).abs().max() < 1e-3
    lines = torch.zeros(66, dtype=torch.bool)
    plain = optimal_transport_pairs(x.flatten(1), shuffled.flatten(1), lines)
    features = coordinates.to_features(plain.y.view(x.shape))[0].float()
    assert wrapped_difference(features, pairs.z, coordinates.circular).abs().max() > 1.0


def test_a_map_from_aligned_pairs():
    mol = load_system("alanine-dipeptide")
    x = torch.as_tensor(mol.reference("train")[:200]).double()
    coordinates = coordinates_for(mol.topology, x)
    config = TrainConfig(steps=3, batch_size=50)
    learned = tfep.fit_map(coordinates, x[:100], x[100:], coupling="aligned", n_layers=2, hidden=8, config=config)
    y, log_det = learned.forward(x[:5])
    _, reverse = learned.inverse(y)
    fine = torch.isfinite(y).flatten(1).all(1)
    assert fine.any() and (log_det + reverse)[fine].abs().max() < 1e-6
