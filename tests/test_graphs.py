"""Recordings of a GPU's work: the same numbers as without, whatever changes between two calls."""

import copy
import pickle
import warnings

import pytest
import torch

from openmm_regflow import Flow, TorchPotential, flows, load_system
from openmm_regflow.bijections import fused
from openmm_regflow.graphs import Gradients, Replayed
from openmm_regflow.objectives import GeneralisedKLLoss, LikelihoodLoss
from openmm_regflow.simulate import BatchedSettings
from openmm_regflow.simulate.batched import _Ladder
from openmm_regflow.training import TrainConfig, train

MOLECULE = load_system("alanine-dipeptide")


def small_flow(device="cpu", **keywords):
    x = torch.as_tensor(MOLECULE.reference("train")[:1000])
    coordinates = flows.coordinates_for(MOLECULE.topology, x)
    flow = flows.spline(coordinates, n_layers=2, hidden=16, seed=3, **keywords)
    y = coordinates.to_features(x.double())[0].float()
    return flow.to(device), y.to(device)


def kl_batch(flow, y):
    return y, -y.square().sum(1) / 2, torch.rand(len(y), generator=torch.Generator().manual_seed(1)).to(y)


def gradients_of(flow):
    return [None if p.grad is None else p.grad.clone() for p in flow.bijection.parameters()]


def test_on_a_cpu_a_function_is_itself():
    calls = []

    def doubled(x):
        calls.append(len(x))
        return (2 * x,)

    replayed = Replayed(doubled, "doubling")
    for n in (3, 3, 5):
        assert torch.equal(replayed(torch.ones(n))[0], 2 * torch.ones(n))
    assert calls == [3, 3, 5] and replayed.recordings == 0


def test_gradients_are_those_of_autograd_and_not_added_up():
    flow, y = small_flow()
    loss = GeneralisedKLLoss(flow.prior)
    gradients = Gradients(loss.of, flow.bijection)
    for part in y[:512].split(256):
        batch = kl_batch(flow, part)
        figures = gradients(batch)
        found = gradients_of(flow)
        flow.zero_grad(set_to_none=True)
        total, parts = loss.of(flow.bijection, batch)
        total.backward()
        expected = [total.item(), parts["kl"].item()]
        assert figures.tolist() == expected and gradients.names == ("kl",)
        assert all(torch.equal(a, b) for a, b in zip(found, gradients_of(flow)))


def test_copies_of_a_flow_have_recordings_of_their_own():
    """A copy that drew from its original's recording would have its weights."""
    flow, _ = small_flow()
    other = copy.deepcopy(flow)
    assert other._drawn.function.__self__ is other and other._judged.function.__self__ is other
    with torch.no_grad():
        for p in other.bijection.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    read = pickle.loads(pickle.dumps(other))
    draws = [f.sample(50, torch.Generator().manual_seed(0))[1] for f in (flow, other, read)]
    assert torch.equal(draws[1], draws[2]) and not torch.allclose(draws[0], draws[1])


@pytest.mark.gpu
@pytest.mark.parametrize("path", [0.0, 0.5])
@pytest.mark.parametrize("kernels", [False, True])
def test_recorded_steps_have_the_gradients_of_plain_ones(kernels, path):
    flow, y = small_flow("cuda", torsion_layers=2)
    flow.fuse(kernels)
    loss = GeneralisedKLLoss(flow.prior, path)
    recorded = Gradients(loss.of, flow.bijection)
    plain = Gradients(loss.of, flow.bijection, record=False)
    sizes = (256, 256, 200, 256)
    for k, size in enumerate(sizes):  # other values, another size, and weights that changed in between
        batch = kl_batch(flow, y[100 * k : 100 * k + size])
        batch += (torch.randn(batch[0].shape).to(batch[0]),) if path else ()
        figures = recorded(batch).clone()
        found = gradients_of(flow)
        expected = plain(batch)
        assert torch.allclose(figures, expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(found, gradients_of(flow), strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()) + 1e-7)
        with torch.no_grad():
            for p in flow.bijection.parameters():
                p.add_(0.01 * p.grad)
    assert recorded._replayed.recordings == 2 and not recorded._replayed.failed
    assert "cuda" not in fused._VALUE.failed | fused._DERIVATIVE.failed


@pytest.mark.gpu
def test_training_by_recordings_follows_the_loss_curve_of_plain_training():
    curves = []
    for recorded in (True, False):
        flow, y = small_flow("cuda")
        loss = LikelihoodLoss(flow.prior)
        one = loss if recorded else (lambda module, batch, generator, loss=loss: loss(module, batch, generator))
        config = TrainConfig(steps=60, batch_size=256, learning_rate=1e-3)
        curves.append(train(flow.bijection, one, lambda step, generator, y=y: (y[:256],), config).loss)
    assert curves[0] == pytest.approx(curves[1], rel=1e-3) and curves[0][-1] < curves[0][0]


@pytest.mark.gpu
def test_what_cannot_be_recorded_runs_as_it_is():
    def scaled(x):
        return (x / x.max().item(),)

    replayed = Replayed(scaled, "scaling")
    with pytest.warns(RuntimeWarning, match="could not record scaling"):
        first = replayed(torch.arange(4.0, device="cuda"))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = replayed(torch.arange(5.0, device="cuda"))[0]
    assert first.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1]) and float(second[-1]) == 1.0 and replayed.failed
    assert bool(torch.isfinite(torch.randn(4, device="cuda")).all())  # the GPU goes on


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", [False, True])
def test_recorded_samples_and_densities_follow_the_weights(kernels):
    flow, _ = small_flow("cuda")
    flow.fuse(kernels)
    n = 300

    def same():
        """Recorded, and computed row by row of another size, which is not."""
        for _ in range(4):
            x, log_q = flow.sample(n, torch.Generator("cuda").manual_seed(5))
        again = flow.log_prob(x)
        for _ in range(3):
            assert torch.allclose(flow.log_prob(x), again, atol=1e-4)
        assert torch.allclose(again, log_q, atol=1e-3)
        parts = torch.cat([flow.log_prob(part) for part in x.split(n - 1)])
        assert torch.allclose(parts, log_q, atol=1e-3)
        return log_q

    with torch.inference_mode():
        inside = same()
    assert "cuda" not in fused._VALUE.failed
    first = same()
    assert torch.equal(first, inside)
    assert flow._drawn.recordings == 1 and not flow._drawn.failed
    assert flow._judged.recordings == 1 and not flow._judged.failed
    with torch.no_grad():
        for p in flow.bijection.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(p))
    second = same()
    assert not torch.allclose(first, second, atol=1e-2)
    x = flow.sample(n)[0]
    before = flow.log_prob(x)
    flow.double()  # its weights move
    assert torch.allclose(flow.log_prob(x), before, atol=1e-2)
    same()


@pytest.mark.gpu
def test_dynamics_of_a_ladder_are_recorded():
    settings = BatchedSettings.create(n_copies=8, n_replicas=2, device="cuda", compile=False)
    ladder = _Ladder(MOLECULE, None, settings)
    x = torch.as_tensor(MOLECULE.positions, dtype=torch.float32, device="cuda").repeat(16, 1, 1)
    states = torch.arange(2, device="cuda").repeat(8)
    ends = []
    for recorded in (True, False):
        ladder._step.failed = not recorded
        ends.append(ladder.dynamics(x, torch.zeros_like(x), states, 20, torch.Generator("cuda").manual_seed(1)))
    assert ladder._step.recordings == 1
    # Sums on a GPU are not in one order; twenty steps do not yet blow that up.
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(*ends))


@pytest.mark.gpu
def test_energies_are_recorded_with_their_flow():
    """A pool's flow and energies after one another: neither overwrites the other's memory."""
    flow = Flow.load(MOLECULE.folder / "flow.safetensors", "cuda")
    potential = TorchPotential(MOLECULE.system, device="cuda")
    pools = [flow.sample(1000, torch.Generator("cuda").manual_seed(k % 3)) for k in range(9)]
    energies = [potential(x) for x, _ in pools]
    for k in range(3):
        for j in (k + 3, k + 6):
            assert torch.allclose(pools[k][1], pools[j][1], atol=1e-3)
            assert torch.allclose(energies[k], energies[j], rtol=1e-4, atol=0.1)
