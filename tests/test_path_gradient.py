"""Path gradients and the slopes that they compare, on targets whose density is known: other flows."""

import copy

import numpy as np
import pytest
import torch

from openmm_regflow import flows, pools, recipes
from openmm_regflow.constraints import fixed_bonds
from openmm_regflow.ensemble import ReducedPotential
from openmm_regflow.errors import InputError
from openmm_regflow.objectives import GeneralisedKLLoss, LikelihoodLoss, path_gradient
from openmm_regflow.refinement import RefineConfig, _Learner, refine, truncate
from openmm_regflow.slopes import slopes
from openmm_regflow.systems import load_system


class FlowPotential:
    """Reduced potential whose Boltzmann density is that of a flow."""

    def __init__(self, flow):
        self.flow = flow

    def __call__(self, x):
        return self.flow.frame_log_density(x) - self.flow.log_prob(x)

    def with_gradient(self, x):
        with torch.enable_grad():
            x = x.detach().double().requires_grad_()
            u = self.flow.frame_log_density(x) - self.flow._density(x)[0]
            (gradient,) = torch.autograd.grad(u.sum(), x)
        return u.detach(), gradient


def shaken(flow, scale, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in flow.bijection.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g).to(p))
    return flow


def coordinates_of(kind, constraints=None):
    mol = load_system("alanine-dipeptide", constraints=constraints)
    x = torch.as_tensor(mol.reference("train")[:500]).double()
    return mol, x, flows.coordinates_for(mol.topology, x, kind, fixed_bonds(mol.system))


def pair(kind="internal"):
    """A target, and a flow that is off by four nat, in float64."""
    _, _, coordinates = coordinates_of(kind)
    target = shaken(flows.spline(coordinates, n_layers=2, hidden=8).double(), 0.05)
    return target, shaken(flows.spline(coordinates, n_layers=2, hidden=8).double(), 0.07, seed=2)


@pytest.mark.parametrize("kind", ["internal", "cartesian"])
def test_slopes_of_a_flow_are_its_own(kind):
    target, _ = pair(kind)
    x, _ = target.sample(200, torch.Generator().manual_seed(0))
    y, _, u, found = slopes(target.coordinates, x, FlowPotential(target))
    y = y.requires_grad_()
    z, log_det = target.bijection.inverse(y)
    (expected,) = torch.autograd.grad((target.prior.log_prob(z) + log_det).sum(), y)
    assert torch.allclose(u, FlowPotential(target)(x), atol=1e-8)
    assert torch.allclose(found, expected, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("constraints", [None, "AllBonds"])
def test_slopes_of_a_molecule_are_differences(constraints):
    """Along single features, from frames with any labels of hydrogens; with constraints, of the metric, too."""
    mol, x, coordinates = coordinates_of("internal", constraints)
    x, potential = coordinates.to_positions(coordinates.to_features(x[:4])[0])[0], ReducedPotential(mol)
    x = coordinates.relabel(x, torch.Generator().manual_seed(0))
    y, _, u, found = slopes(coordinates, x, potential)
    assert torch.allclose(u, potential(x), atol=1e-6)

    def log_p(y):
        placed, log_det = coordinates.to_positions(y)
        return log_det - potential(placed)

    step = 1e-5
    for k in range(coordinates.dim):
        ahead, behind = y.clone(), y.clone()
        ahead[:, k] += step
        behind[:, k] -= step
        expected = (log_p(ahead) - log_p(behind)) / (2 * step)
        assert torch.allclose(found[:, k], expected, rtol=1e-4, atol=1e-4)


def directional(flow, loss, batches, direction):
    """Gradient of a loss along one direction of the weights, for each batch."""
    out = []
    for batch in batches:
        flow.zero_grad(set_to_none=True)
        loss.of(flow.bijection, batch)[0].backward()
        out.append(sum(float((p.grad * d).sum()) for p, d in zip(flow.bijection.parameters(), direction, strict=True)))
    return np.array(out)


@pytest.mark.parametrize("planted", [False, True])
def test_the_path_gradient_is_that_of_the_likelihood_on_average(planted):
    """... within four standard errors, and not with slopes of another target."""
    target, flow = pair()
    x, _ = target.sample(12_800, torch.Generator().manual_seed(5))
    y, _, _, slope = slopes(target.coordinates, x, FlowPotential(target))
    if planted:
        slope = 2 * slope
    g = torch.Generator().manual_seed(6)
    direction = [torch.randn(p.shape, generator=g).to(p) for p in flow.bijection.parameters()]
    batches = list(zip(y.split(200), slope.split(200), strict=True))
    losses = [LikelihoodLoss(flow.prior, path=share) for share in (0.0, 1.0)]
    plain, path = (directional(flow, loss, batches, direction) for loss in losses)
    difference = path - plain
    off = abs(difference.mean()) / (difference.std() / len(batches) ** 0.5)
    assert (off > 4) if planted else (off < 4)
    # and the gradient is there to be seen
    assert abs(plain.mean()) > 4 * plain.std() / len(batches) ** 0.5 or planted
    assert path.std() < plain.std() or planted


def test_a_flow_that_is_the_target_has_no_path_gradient():
    """Sample by sample, where the plain gradient is noise."""
    target, _ = pair()
    x, _ = target.sample(300, torch.Generator().manual_seed(0))
    y, _, _, slope = slopes(target.coordinates, x, FlowPotential(target))
    norms = []
    for path in (0.0, 1.0):
        target.zero_grad(set_to_none=True)
        LikelihoodLoss(target.prior, path=path).of(target.bijection, (y, slope))[0].backward()
        norms.append(max(float(p.grad.abs().max()) for p in target.bijection.parameters()))
    assert norms[1] < 1e-6 * norms[0]


def test_a_share_of_the_path_is_a_share_of_its_gradient():
    target, flow = pair()
    x, log_q0 = target.sample(300, torch.Generator().manual_seed(0))
    y, _, _, slope = slopes(target.coordinates, x, FlowPotential(target))
    w = torch.rand(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = y, log_q0 - target.coordinates.features_of(x)[1], w, slope

    def gradient(path, rows=batch):
        flow.zero_grad(set_to_none=True)
        total, parts = GeneralisedKLLoss(flow.prior, path).of(flow.bijection, rows)
        total.backward()
        assert total.item() == pytest.approx(parts["kl"].item(), rel=1e-12)  # what is shown is the divergence
        return torch.cat([p.grad.reshape(-1) for p in flow.bijection.parameters()]), total.item()

    (plain, _), (path, shown), (mixed, _) = gradient(0.0, tuple(t[::4] for t in batch)), gradient(1.0), gradient(0.3)
    assert torch.allclose(mixed, 0.7 * plain + 0.3 * path, atol=1e-9 * float(path.abs().max()))
    assert shown == pytest.approx(gradient(0.0)[1], rel=1e-12)  # of all rows
    flow.zero_grad(set_to_none=True)
    pull, log_q = path_gradient(flow.bijection, flow.prior, y, slope, w)
    pull.backward()
    alone = torch.cat([p.grad.reshape(-1) for p in flow.bijection.parameters()])
    assert torch.allclose(alone, path, atol=1e-9 * float(path.abs().max()))
    z, log_det = flow.bijection.inverse(y)
    assert torch.allclose(log_q, flow.prior.log_prob(z) + log_det)


@pytest.mark.parametrize("tail", [0.0, 0.5, 0.9])
def test_the_path_follows_the_tail(tail):
    """Towards p (p/q)^tail as the weights do: as long as the plain gradient that it stands for, not 1/(1 + tail) of it.

    Along the plain gradient of another pool, whose noise has nothing to do with this one's.
    """
    flow = pair()[1]
    target = shaken(copy.deepcopy(flow), 0.007, seed=3)  # weights without a heavy tail, of which means are means
    learner = _Learner(flow, RefineConfig(batch_size=500))

    def data(n, seed):
        pool = pools.draw(flow, n, FlowPotential(target), seed=(seed,), sloped=True)
        w = torch.as_tensor(truncate(pool.log_w + tail * pool.log_ratio()))
        return pool.y, pool.log_r - pool.log_volume, w, learner._tilted(pool.slope, pool.y, tail)

    far = GeneralisedKLLoss(flow.prior).of(flow.bijection, data(10_000, 2))[0]
    direction = torch.autograd.grad(far, list(flow.bijection.parameters()))
    rows = data(20_000, 1)
    batches = [tuple(t[k::100] for t in rows) for k in range(100)]
    plain, path = (directional(flow, GeneralisedKLLoss(flow.prior, share), batches, direction) for share in (0.0, 1.0))
    error = (path - plain).std() / len(batches) ** 0.5
    assert abs((path - plain).mean()) < 4 * error
    assert tail == 0 or plain.mean() * (1 - 1 / (1 + tail)) > 6 * error  # what was too short would be seen


SETTINGS = {"rounds": 3, "pool": 4000, "batch_size": 200, "learning_rate": 3e-3, "ema": 0.9, "anchors": 1000}


def test_refinement_by_the_path_gets_further(tmp_path):
    """In as many samples; every frame of every pool is asked for its forces, and an interruption changes nothing."""
    target, _ = pair()
    data, _ = target.sample(3000, torch.Generator().manual_seed(3))
    records = {}
    for path in (0.0, 0.9):
        flow = pair()[1]
        records[path] = refine(flow, FlowPotential(target), RefineConfig(**SETTINGS, path=path), data=data)
    assert [r.energies for r in records[0.9]] == [5000 * (k + 1) for k in range(4)]
    assert records[0.9][-1].divergence < 0.7 * records[0.0][-1].divergence < records[0.0][0].divergence

    def stop(k, total, figures):
        if k == 2:
            raise KeyboardInterrupt

    settings, checkpoint = RefineConfig(**SETTINGS, path=0.9), tmp_path / "refinement.safetensors"
    with pytest.raises(KeyboardInterrupt):
        refine(pair()[1], FlowPotential(target), settings, data=data, checkpoint=checkpoint, progress=stop)
    assert refine(pair()[1], FlowPotential(target), settings, data=data, checkpoint=checkpoint) == records[0.9]


def test_a_pool_has_the_slopes_of_its_samples_and_frames():
    target, flow = pair()
    data, _ = target.sample(300, torch.Generator().manual_seed(3))
    own = pools.draw(flow, 500, FlowPotential(target), seed=(1,), sloped=True)
    pool = pools.Anchors(data, FlowPotential(target), 200, sloped=True).mix(flow, own, 0)
    y = pool.y.clone().requires_grad_()
    z, log_det = target.bijection.inverse(y)
    (expected,) = torch.autograd.grad((target.prior.log_prob(z) + log_det).sum(), y)
    assert pool.slope.shape == (700, flow.dim)
    assert torch.allclose(pool.slope, expected, atol=1e-6 * float(expected.abs().max()))
    assert pools.draw(flow, 500, FlowPotential(target), seed=(1,)).slope is None


@pytest.mark.parametrize("coordinates", ["internal", "cartesian"])
def test_the_likelihood_phase_by_the_path_counts_its_energies(coordinates):
    mol, x, _ = coordinates_of("internal")
    train = {"steps": 30, "batch_size": 64, "warmup": 5, "learning_rate": 1e-3}
    settings = recipes.RunConfig.model_validate(
        {
            "coordinates": coordinates,
            "objective": "mle",
            "flow": {"n_layers": 2, "hidden": 16},
            "likelihood": {"train": train, "path": 0.8},
        }
    )
    with pytest.raises(InputError, match="pass reduced_potential"):
        recipes.fit(mol.topology, x[:400], x[400:], settings)
    with pytest.raises(InputError, match="needs forces"):
        recipes.fit(mol.topology, x[:400], x[400:], settings, reduced_potential=lambda x: x.sum((1, 2)))
    result = recipes.fit(mol.topology, x[:400], x[400:], settings, reduced_potential=ReducedPotential(mol))
    assert result.costs()["energies"] == 400
    curve = result.histories["likelihood"].validation
    assert curve[-1] < curve[0]
