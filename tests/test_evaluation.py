"""Evaluation of an analytic flow whose figures are known."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from test_constraints import RODS, rod_flow

from openmm_regflow import evaluation, metrics, reweighting
from openmm_regflow.constraints import Constraints
from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.units import thermal_energy

TEMPERATURE = 300.0
KT = thermal_energy(TEMPERATURE)
#: N, CA, C, CB and two more atoms: one torsion, one chiral centre, by construction.
FRAME = torch.tensor(
    [[0.0, 0, 0], [1, 0, 0], [1.4, 1.2, 0], [1.5, -0.6, 1.0], [0.4, 1.9, 0.5], [2.5, 1.4, -0.5]]
).double()
PHI, PSI, CENTRES = [[4, 0, 1, 2]], [[0, 1, 2, 5]], [[1, 0, 2, 3]]
WIDTH = 0.1


class GaussianFlow:
    """Independent normals about fixed places: a Cartesian flow with an exact density."""

    n_atoms, rotation_invariant = len(FRAME), False

    def __init__(self, width):
        self.width = width

    def log_prob(self, x):
        z = ((x - FRAME) / self.width).flatten(1)
        return -0.5 * (z**2).sum(1) - z.shape[1] * (math.log(self.width) + 0.5 * math.log(2 * math.pi))

    def sample(self, n, generator=None):
        x = FRAME + self.width * torch.randn((n, *FRAME.shape), generator=generator, dtype=torch.float64)
        return x, self.log_prob(x)

    def frame_log_density(self, x):
        return x.new_zeros(len(x))


def potential(x):
    return KT * 0.5 * (((torch.as_tensor(x) - FRAME) / WIDTH) ** 2).flatten(1).sum(1)


def torsion_frames(angles):
    """Frames `(n, 6, 3)` whose two torsions are the given angles `(n, 2)`."""
    x = np.repeat(FRAME.numpy()[None], len(angles), axis=0)
    for end, (a, b, c), angle in zip((4, 5), ((2, 1, 0), (0, 1, 2)), angles.T):
        along = FRAME[c] - FRAME[b]
        along = (along / along.norm()).numpy()
        normal = np.cross((FRAME[b] - FRAME[a]).numpy(), along)
        normal /= np.linalg.norm(normal)
        across = np.cross(normal, along)
        turned = np.cos(angle)[:, None] * across + np.sin(angle)[:, None] * normal
        x[:, end] = FRAME[c].numpy() + 0.3 * along + 0.9 * turned
    return x


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def evaluate(width, n=4000, **keywords):
    reference, _ = GaussianFlow(WIDTH).sample(3000, generator(1))
    options = {"phi": PHI, "psi": PSI, "centres": CENTRES, "n_torsion_points": 300, **keywords}
    return evaluation.evaluate_flow(
        GaussianFlow(width), potential, TEMPERATURE, reference, n=n, sample_generator=generator(2), **options
    )


def test_a_perfect_flow():
    result = evaluate(WIDTH)
    assert result.ess == pytest.approx(1, abs=1e-9) and result.ess_truncated == pytest.approx(1, abs=1e-9)
    # Energies of both samples have mean 9 and variance 9 [kT]; W1 of two samples is a few standard errors of a mean.
    assert result.e_w1 < 4 * 3 * math.sqrt(1 / 4000 + 1 / 3000)
    assert result.e_w1 <= result.e_w2
    assert result.t_w2 < 1.5 * result.t_w2_floor
    assert result.k_hat < 0.5 and result.verdict.startswith("reliable")
    assert result.n == result.n_finite == 4000


def test_the_floor_of_the_torsions_is_that_of_a_reference_that_remembers():
    """What an exact sampler scores against frames of an AR(1) process with a memory of twenty."""
    rng, scores = np.random.default_rng(0), []
    for _ in range(12):
        angles = np.zeros((800, 2))
        for i in range(1, 800):
            angles[i] = 0.95 * angles[i - 1] + math.sqrt(1 - 0.95**2) * rng.standard_normal(2)
        exact = rng.standard_normal((400, 2))
        x_ref, x = torsion_frames(angles), torsion_frames(exact)
        figures = evaluation._torsion_figures(x, x_ref, np.zeros(400), PHI, PSI, 400, rng)
        interleaved = metrics.torus_wasserstein(angles[::2], angles[1::2], generator=rng)
        scores.append((figures["t_w2"], figures["t_w2_floor"], interleaved))
    exact, floor, planted = np.mean(scores, axis=0)
    assert floor > 0.8 * exact and planted < 0.7 * exact


def test_a_flow_that_is_too_wide_has_the_exact_effective_sample_size():
    scale = 1.15
    result = evaluate(scale * WIDTH, n=20_000)
    # Kish fraction of normals in d = 18 dimensions: (E w)^2/E w^2 = [sqrt(2 s^2 - 1)/s^2]^d.
    exact = (math.sqrt(2 * scale**2 - 1) / scale**2) ** 18
    assert abs(result.ess - exact) < 4 * result.ess_error
    assert result.ess_truncated > result.ess
    # E[u] grows from 9 to 9 s^2 kT, and reweighting takes it back.
    exact = 9 * (scale**2 - 1)
    assert result.e_w1 == pytest.approx(exact, abs=4 * result.e_w1_error)
    # Variances of the two means; the shares differ a little, since the map between the two stretches the energies.
    assert result.e_w1_error == pytest.approx(3 * math.sqrt(scale**4 / 20_000 + 1 / 3000), rel=0.6)
    assert f"± {result.e_w1_error:.2g}" in dict(result.rows())["E-W1 plain (finite only) / reweighted [kT]"]
    assert 0 < result.t_w2_error < result.t_w2 and result.t_w2_reweighted_error > 0
    assert result.e_w1_reweighted < 0.2 * result.e_w1
    assert result.e_w2_reweighted < result.e_w2


def test_basins_chirality_and_failures_are_counted():
    x, log_q = GaussianFlow(WIDTH).sample(1000, generator(3))
    u = potential(x) / KT
    x[:100] = FRAME - 2 * (FRAME - FRAME[1]) + 0 * x[:100]
    x[100:110] = math.nan
    u[100:110] = math.inf
    reference, _ = GaussianFlow(WIDTH).sample(500, generator(4))
    result = evaluation.evaluate(
        x, log_q, u, reference, potential(reference) / KT, phi=PHI, psi=PSI, centres=CENTRES, n_torsion_points=200
    )
    assert result.wrong_chirality >= 0.11
    assert result.wrong_chirality_error == pytest.approx(math.sqrt(0.11 * 0.89 / 1000), rel=0.1)
    assert result.wrong_chirality_reweighted_error >= 0
    right = evaluate(WIDTH, n=1000, centres=[[1, 2, 0, 3]])  # none is wrong: one in a thousand might have been
    assert right.wrong_chirality_reweighted < 2e-3 and right.wrong_chirality_reweighted_error > 5e-4
    fine = np.isfinite(u)
    exact = metrics.energy_wasserstein(u[fine], potential(reference) / KT)
    assert result.n_finite == 990 and result.e_w1 == pytest.approx(exact) and math.isfinite(result.e_w1_reweighted)
    assert json.loads(json.dumps(result.to_dict()))["n_finite"] == 990


def test_molecules_without_a_backbone_give_none():
    result = evaluate(WIDTH, phi=(), psi=(), centres=())
    assert result.t_w2 is result.delta_f_phi is result.wrong_chirality is None
    assert "T-W2" not in dict(result.rows())
    assert dict(result.rows())["verdict"] == result.verdict
    assert not any("φ" in name for name, _ in result.rows())


def test_a_figure_without_data_is_a_dash_and_a_reference_that_has_not_converged_is_named():
    result = evaluate(WIDTH, n=1000)
    rows = dict(result.rows())
    assert rows["F(φ>0) − F(φ<0), reference [kT]"].count("±") == 1
    assert not any("converged" in text for text in rows.values())
    poor = dict(dataclasses.replace(result, delta_f_phi_reference=None, t_w2_floor=9.0).rows())
    assert poor["F(φ>0) − F(φ<0), reference [kT]"].startswith("– (one of the sides")
    assert any("has not converged" in text for name, text in poor.items() if name.startswith("T-W2"))


def test_weights_of_few_of_many_samples_give_every_figure():
    """More samples than a distance of torsions takes, one of which holds all the weight."""
    rng = np.random.default_rng(7)
    x, reference = rng.normal(size=(20_000, 4, 3)), rng.normal(size=(100, 4, 3))
    u = 1e5 * rng.gamma(5.0, 1.0, size=len(x))
    result = evaluation.evaluate(
        x, np.zeros(len(x)), u, reference, np.zeros(100), phi=[[0, 1, 2, 3]], n_resamples=5, n_torsion_points=50,
        generator=0,
    )  # fmt: skip
    assert result.e_w1_reweighted == pytest.approx(u.min(), rel=1e-6)
    assert result.e_w1 == pytest.approx(u.mean(), rel=1e-6)
    assert math.isfinite(result.t_w2_reweighted)


def test_delta_f_is_none_when_a_basin_is_empty():
    result = evaluate(0.001)
    assert result.delta_f_phi is None


def test_frame_density_enters_the_weights_with_a_plus():
    u, log_q, frame = np.array([1.0, 2.0, np.inf]), np.array([-1.0, -3.0, np.nan]), np.array([0.5, 0.0, 0.0])
    assert list(evaluation.log_weights(u, log_q, frame)) == [0.5, 1.0, -np.inf]
    with pytest.raises(InputError, match="log_q"):
        evaluation.log_weights(np.zeros(2), np.array([0.0, np.nan]))
    with pytest.raises(InputError, match="length"):
        evaluation.log_weights(np.zeros(2), np.zeros(3))


def test_weights_of_a_flow_with_fixed_bonds_hold_the_metric():
    """Against the weights written out; the metric term spreads by as much as any other error would."""
    flow, rods = rod_flow(), TorchPotential(RODS.system)
    drawn = evaluation.draw(flow, rods, TEMPERATURE, 400, generator(5))
    there = np.isfinite(drawn.positions).all((1, 2))
    x = torch.as_tensor(drawn.positions[there])
    metric = Constraints.of(RODS.system).log_metric(x)
    exact = metric - rods(x) / KT - flow.log_prob(x)
    assert metric.std() > 0.05
    np.testing.assert_allclose(drawn.log_weights[there], exact.detach(), atol=1e-6)
    result = evaluation.evaluate_flow(
        flow, rods, TEMPERATURE, RODS.sample(300, generator(6)), n=400, sample_generator=generator(5)
    )
    assert result.ess == pytest.approx(reweighting.effective_sample_size(drawn.log_weights))


def test_absurd_energies_are_not_finite_here_either():
    """As in every other way of weighing samples: a weight of exp(-1e6) is none."""

    def clashing(x):
        return torch.where(x[:, 0, 0] > 0, 1e9, potential(x))

    drawn = evaluation.draw(GaussianFlow(WIDTH), clashing, TEMPERATURE, 100, generator(1))
    np.testing.assert_array_equal(np.isinf(drawn.u), drawn.positions[:, 0, 0] > 0)


def test_no_finite_energy_is_insufficient():
    reference, _ = GaussianFlow(WIDTH).sample(50, generator(4))
    with pytest.raises(InsufficientDataError):
        evaluation.evaluate(reference, np.zeros(50), np.full(50, np.inf), reference, np.zeros(50))
    with pytest.raises(InputError, match="positions"):
        evaluation.evaluate(reference[:10], np.zeros(50), np.zeros(50), reference, np.zeros(50))


def test_error_of_replica_exchange_frames_covers_their_slow_mode():
    """Uncorrelated frames whose basin population drifts: the correlation time sees nothing, the blocks must."""
    g = np.random.default_rng(5)
    n, spell, z = 4000, 100, []
    for _ in range(100):
        population = np.repeat(g.choice([0.02, 0.10], n // spell), spell)
        angle = np.where(g.random(n) < population, 1.0, -1.0)
        estimate = metrics.basin_delta_f(angle, block=evaluation.reference_block(angle), generator=g)
        z.append((estimate.value - math.log(0.94 / 0.06)) / estimate.error)
    # With 20 blocks z is Student's t, sd sqrt(19/17) = 1.06, known to 7 % from 100 repeats: four standard errors.
    assert np.std(z) == pytest.approx(1.06, abs=0.3)


def test_a_missing_basin_is_named_and_a_rare_one_is_not():
    """Torsions by construction: psi turned to the other side in a part of the reference."""
    reference, _ = GaussianFlow(0.01).sample(3000, generator(1))
    other = reference.clone()
    other[:, 5, 2] *= -1  # the last atom to the other side of the plane of the three before it
    sides = [np.sign(metrics.dihedrals(x.numpy(), np.array(PSI))[:, 0]).mean() for x in (reference, other)]
    assert abs(sides[0]) == 1 and sides[1] == -sides[0]
    samples, _ = GaussianFlow(0.01).sample(5000, generator(2))

    def missing(n_other, n=5000):
        mixed = np.concatenate([reference[: 3000 - n_other], other[:n_other]])
        return evaluation.missing_basins(samples[:n].numpy(), mixed, PHI, PSI)

    assert missing(0) == () and missing(60) == ()  # too few in the reference to say
    (words,) = missing(300)
    assert words.startswith("psi1") and "0 % for 10 %" in words
    assert missing(300, n=50) == ()  # too few samples to say
    some = np.concatenate([samples[:4900], other[:100].numpy()])
    assert evaluation.missing_basins(some, np.concatenate([reference, other[:300]]), PHI, PSI) == ()


def butanes(angles):
    """Positions `(n, 4, 3)` of chains of four atoms with torsions [degrees]."""
    phi = np.radians(angles)
    x = np.zeros((len(phi), 4, 3))
    x[:, 0], x[:, 2, 0] = (0.0, 1.0, 0.0), 1.0
    x[:, 3] = np.stack([np.ones_like(phi), np.cos(phi), np.sin(phi)], 1)
    return x


def test_a_basin_that_its_weights_take_away_is_named():
    """Samples beside a basin, whose weights are next to nothing: drawn, and yet missing."""
    rng = np.random.default_rng(2)
    wells = rng.choice([60, 180, -60], 3000, p=[0.1, 0.5, 0.4]) + 10 * rng.standard_normal(3000)
    x, zeros = butanes(wells), np.zeros(3000)
    log_q = np.where(np.abs(wells - 60) < 60, 12.0, 0.0)
    result = evaluation.evaluate(x, log_q, zeros, x, zeros, torsions=[[0, 1, 2, 3]], n_resamples=5, generator=0)
    assert len(result.missing) == 1
    assert result.verdict.startswith("do not trust: the samples, as they are weighted, lack")
    mild = evaluation.evaluate(x, log_q / 12, zeros, x, zeros, torsions=[[0, 1, 2, 3]], n_resamples=5, generator=0)
    assert mild.missing == () and mild.verdict.startswith("reliable")


@pytest.mark.parametrize("lost", [60, 180, -60])
def test_a_missing_rotamer_is_named(lost):
    """Of any torsion that is given, each of the three; without one the verdict says that nothing was compared."""
    rng = np.random.default_rng(2)
    wells = rng.choice([60, 180, -60], 3000) + 10 * rng.standard_normal(3000)
    kept = wells[np.abs((wells - lost + 180) % 360 - 180) > 60]
    reference, samples = butanes(wells), butanes(kept)
    found = metrics.dihedrals(samples, np.array([[0, 1, 2, 3]]))[:, 0]
    np.testing.assert_allclose(np.cos(found), np.cos(np.radians(kept)))
    energies = (np.zeros(len(kept)), np.zeros(len(kept)), reference, np.zeros(3000))
    result = evaluation.evaluate(samples, *energies, torsions=[[0, 1, 2, 3]], n_resamples=5, generator=0)
    (words,) = result.missing
    assert words.startswith("torsion 0-1-2-3 from") and str(lost + 60) in words
    assert result.verdict.startswith("do not trust: the samples lack torsion")
    whole = evaluation.evaluate(reference, *[np.zeros(3000)] * 2, *energies[2:], torsions=[[0, 1, 2, 3]], generator=0)
    assert whole.missing == () and whole.verdict.startswith("reliable")
    blind = evaluation.evaluate(samples, *energies, n_resamples=5, generator=0)
    assert blind.missing == () and "no torsions were compared" in blind.verdict


def test_few_samples_with_weight_lose_no_other_figure():
    """Fifteen of 10,000 have a finite energy: without the top 0.2 % nothing is left, and the rest is still told."""
    rng = np.random.default_rng(3)
    x, u = butanes(rng.uniform(-180, 180, 10_000)), np.full(10_000, np.inf)
    u[:15] = rng.normal(size=15)
    result = evaluation.evaluate(x, np.zeros(10_000), u, x[:500], np.zeros(500), phi=[[0, 1, 2, 3]], generator=0)
    assert result.ess_truncated == 0.0 and 0 < result.ess < 0.0015 and result.n_finite == 15
    assert math.isfinite(result.e_w1) and any("0 ±" in value for _, value in result.rows())


def test_missing_basins_are_named_by_residue():
    """A chain with free ends has its first psi in a residue without phi."""
    x, reference = np.zeros((5000, 8, 3)), np.zeros((3000, 8, 3))
    psi, phi = [[0, 1, 2, 3], [3, 4, 5, 6]], [[2, 3, 4, 5]]  # N CA C N, and C N CA C

    def place(frames, angles):
        frames[:, 0] = [1, 0, 0]
        frames[:, 2] = [0, 0, 1]
        frames[:, 3] = np.stack([np.cos(angles), np.sin(angles), np.ones_like(angles)], -1)
        frames[:, 4], frames[:, 5], frames[:, 6] = [2, 1, 3], [1, 3, 2], [4, 4, 1]
        return frames

    rng = np.random.default_rng(0)
    mine, theirs = place(x, np.full(5000, 1.0)), place(reference, rng.choice([1.0, -1.0], 3000))
    words = evaluation.missing_basins(mine, theirs, phi, psi)
    assert words[0].startswith("psi1 < 0")
    words = evaluation.missing_basins(mine, theirs, psi[:1], phi)  # the same torsion as the phi of the residue before
    assert words[0].startswith("phi1 < 0")


def test_a_missing_basin_is_in_the_verdict():
    reference, _ = GaussianFlow(WIDTH).sample(3000, generator(1))
    reference[:1500, 5, 2] *= -1
    x, log_q = GaussianFlow(0.5 * WIDTH).sample(2000, generator(2))
    u = potential(x) / KT
    options = {"psi": PSI, "n_torsion_points": 100, "generator": 0}
    found = evaluation.evaluate(x, log_q, u, reference, potential(reference) / KT, **options)
    assert found.missing and found.verdict.startswith("do not trust: the samples lack psi1")


def test_bias_of_clipping_is_that_of_leaving_weights_out():
    """Equal weights but for one in a thousand samples, of high energy, that carries half of all weight."""
    u, log_w = np.zeros(10_000), np.zeros(10_000)
    u[:10], log_w[:10] = 8.0, math.log(999.0)
    share = 10 * 999 / (10 * 999 + 9990)
    assert evaluation._clip_bias(u, log_w) == pytest.approx(-8.0 * share)
    assert evaluation._clip_bias(u[:100], log_w[:100]) is None
