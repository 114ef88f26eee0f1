"""One conformance suite over whole flows: every architecture, all coordinates, weights as training leaves them.

Inverse errors and Jacobians on data and in the tails, in float64 and float32; shipped flows; flows too steep for it.
"""

import copy
import warnings

import pytest
import torch

from openmm_regflow import flows
from openmm_regflow.bijections import AffineCoupling, wrap
from openmm_regflow.coordinates import InternalMap
from openmm_regflow.flows import INVERSE_ERROR, TAILS, Flow
from openmm_regflow.networks import TokenTransformer
from openmm_regflow.systems import available_systems, load_system, systems_folder

SMALL = {"n_layers": 8, "hidden": 32, "depth": 1}
ARCHITECTURES = ["real_nvp", "res_nvp", "spline", "jet"]


@pytest.fixture(scope="module")
def frames():
    mol = load_system("alanine-dipeptide")
    return mol, torch.as_tensor(mol.reference("train")[:2000]).double()


def trained_like(flow, seed=0):
    """Weights far from the identity that the factories start from; heads spread as those of the shipped flows are."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in flow.bijection.parts:
            for name, p in layer.network.named_parameters():
                if name.startswith("head"):
                    p.add_(0.2 / p.shape[-1] ** 0.5 * torch.randn(p.shape, generator=g))
                else:
                    p.add_(0.05 * torch.randn(p.shape, generator=g))
    return flow


@pytest.fixture(scope="module", params=["internal", "cartesian"])
def coordinates(request, frames):
    return flows.coordinates_for(frames[0].topology, frames[1], request.param)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def flow(request, coordinates):
    return trained_like(getattr(flows, request.param)(coordinates, **SMALL))


@pytest.fixture(scope="module")
def features(coordinates, frames):
    """Features `(400, dim)` of frames that are turned and shifted as the coordinates' measure assumes."""
    return coordinates.to_features(coordinates.augment(frames[1][:400], torch.Generator().manual_seed(1)))[0]


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return [tensor for member in members for tensor in tensors_in(member)]


def test_every_tensor_follows_to_another_device(flow):
    """Parameters and buffers do; a tensor kept otherwise would stay on the CPU, or travel in every call."""
    flow.log_prob(flow.sample(3, torch.Generator().manual_seed(0))[0])  # what is made on first use is there
    registered = ("_parameters", "_buffers", "_modules")
    left = [
        f"{name}.{attribute}"
        for name, module in flow.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in registered and tensors_in(value)
    ]
    assert not left
    moved = copy.deepcopy(flow).to("meta")
    assert all(tensor.is_meta for tensor in (*moved.parameters(), *moved.buffers()))
    assert moved.state_dict().keys() == flow.state_dict().keys()
    assert not any("level" in name for name in flow.state_dict())  # files stay as they were


def latents(flow, n, spread, dtype=torch.float64):
    z = flow.prior.sample(n, torch.Generator().manual_seed(2), dtype)
    return torch.where(flow.prior.circular, z, spread * z)


def off(flow, a, b):
    return float(torch.where(flow.prior.circular, wrap(a - b), a - b).abs().max())


def test_coordinates_have_circles_and_rotors(frames):
    internal = flows.coordinates_for(frames[0].topology, frames[1], "internal")
    assert isinstance(internal, InternalMap) and internal.rotors and int(internal.circular.sum()) == 5


def test_weights_are_those_of_no_identity(flow, features):
    """What follows would hold of the identity; these maps stretch, and by different amounts at different points."""
    with torch.no_grad():
        z, log_det = flow.bijection.inverse(features)
    assert off(flow, z, features) > 1.0 and float(log_det.std()) > 0.3


@pytest.mark.parametrize("spread", [1.0, TAILS], ids=["bulk", "tails"])
def test_inverse_in_float64(flow, features, spread):
    exact = copy.deepcopy(flow).requires_grad_(False)
    exact.bijection.double()
    z = latents(flow, 400, spread)
    (y, forward), (u, inverse) = exact.bijection(z), exact.bijection.inverse(spread * features)
    back, log_det = exact.bijection.inverse(y)
    assert off(flow, back, z) < 1e-10 and float((forward + log_det).abs().max()) < 1e-9
    again, log_det = exact.bijection(u)
    wide = torch.where(flow.prior.circular, wrap(spread * features), spread * features)
    assert off(flow, again, wide) < 1e-10 and float((inverse + log_det).abs().max()) < 1e-9


@pytest.mark.parametrize("spread", [1.0, TAILS], ids=["bulk", "tails"])
def test_inverse_in_float32(flow, features, spread):
    """Float32 weights, as flows sample and take densities: latents and data there and back, in batches of two sizes."""
    assert flow.dtype == torch.float32
    assert flow.inverse_error(features, spread, torch.Generator().manual_seed(3)) < INVERSE_ERROR


def test_log_det_against_autodiff(flow, features):
    """The whole map to positions in Cartesian coordinates; to features otherwise (positions: tests of coordinates)."""
    exact = copy.deepcopy(flow)
    exact.bijection.double()
    cartesian = not flow.rotation_invariant
    whole = exact.forward if cartesian else exact.bijection

    def vector(v):
        return whole(v[None])[0].flatten()

    for z in torch.cat([latents(flow, 2, 1.0), latents(flow, 2, TAILS), exact.bijection.inverse(features[:2])[0]]):
        jacobian = torch.autograd.functional.jacobian(vector, z, vectorize=True)
        log_det = whole(z[None])[1]
        assert float(torch.linalg.slogdet(jacobian)[1] - log_det) == pytest.approx(0.0, abs=1e-9)


def test_samples_carry_their_density(flow):
    """log q of a sample, drawn or asked for, in float32 weights: both see the same map."""
    x, log_q = flow.sample(300, torch.Generator().manual_seed(1))
    fine = torch.isfinite(x).flatten(1).all(1)
    assert float(fine.double().mean()) > 0.5
    assert float((flow.log_prob(x[fine]) - log_q[fine]).abs().max()) < 1e-4


SHIPPED = [n for n in available_systems() if (systems_folder() / n / "flow.safetensors").is_file()]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_flows_invert(name):
    """Float32 weights, on held-out frames and on latents, in the bulk and in the tails."""
    mol = load_system(name)
    flow = Flow.load(mol.folder / "flow.safetensors")
    y, _ = flow.coordinates.to_features(torch.as_tensor(mol.reference("validation")[:1000]).double())
    assert flow.dtype == torch.float32
    for spread in (1.0, TAILS):
        assert flow.inverse_error(y, spread, torch.Generator().manual_seed(0)) < INVERSE_ERROR
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flow.secure(y) < INVERSE_ERROR and flow.dtype == torch.float32


def test_a_steep_flow_goes_over_to_float64(frames, tmp_path):
    """Couplings that each contract by e^2 and depend steeply on one another: in float32 the inverse is off."""
    coordinates = flows.coordinates_for(frames[0].topology, frames[1], "cartesian")
    steep = trained_like(flows.res_nvp(coordinates, **SMALL))
    with torch.no_grad():
        for layer in steep.bijection.parts:
            n = len(layer.moved)
            layer.network.head.bias[n:] -= 2.0
            layer.network.head.weight *= 10.0
    y = coordinates.to_features(coordinates.augment(frames[1][:300], torch.Generator().manual_seed(1)))[0]
    with pytest.warns(UserWarning, match="kept in float64"):
        error = steep.secure(y)
    assert steep.dtype == torch.float64 and error < INVERSE_ERROR
    steep.save(tmp_path / "steep.safetensors")
    again = Flow.load(tmp_path / "steep.safetensors")
    assert again.dtype == torch.float64
    (x, log_q), (other, log_p) = (f.sample(20, torch.Generator().manual_seed(0)) for f in (steep, again))
    assert torch.equal(x, other) and torch.equal(log_q, log_p)


@pytest.mark.parametrize("name", ["alanine-dipeptide", "alanine-tripeptide"])
def test_tokens_of_jet_are_atoms(name):
    """Cartesian couplings of jet, with even and odd numbers of atoms: a token for every atom that is kept or moved.

    Without attention between tokens, the embedding of a token moves its own atom alone.
    """
    mol = load_system(name)
    coordinates = flows.coordinates_for(mol.topology, torch.as_tensor(mol.positions)[None].double(), "cartesian")
    flow = trained_like(flows.jet(coordinates, n_layers=2, hidden=8, depth=1))
    for layer in flow.bijection.parts:
        assert isinstance(layer, AffineCoupling) and isinstance(layer.network, TokenTransformer)
        moved = layer.moved.view(-1, 3)
        assert torch.equal(moved, moved[:, :1] + torch.arange(3)) and bool((moved[:, 0] % 3 == 0).all())
        assert layer.network.n_asked == len(moved) and layer.network.n_known == mol.n_atoms - len(moved)
        with torch.no_grad():
            for block in layer.network.blocks:
                block.out.weight.zero_()
            z = flow.prior.sample(5, torch.Generator().manual_seed(0))
            before, _ = layer(z)
            layer.network.asked[1, 0] += 1.0  # one component: a norm takes a shift of all away
            changed = (layer(z)[0] != before).any(0).nonzero().flatten()
        assert changed.tolist() == moved[1].tolist()


def test_outputs_of_jet_lie_with_their_elements_on_circles_too(frames):
    """Internal coordinates: shift and scale of one line come from one token, which has three elements."""
    coordinates = flows.coordinates_for(frames[0].topology, frames[1], "internal")
    layer = trained_like(flows.jet(coordinates, n_layers=2, hidden=8, depth=1)).bijection.parts[0]
    moved = layer.moved
    with torch.no_grad():
        for block in layer.network.blocks:
            block.out.weight.zero_()
        z = latents(flows.jet(coordinates, n_layers=2, hidden=8, depth=1), 5, 1.0)
        before, _ = layer(z)
        for token in (0, layer.network.n_asked - 1):
            layer.network.asked[token, 0] += 1.0
            after, _ = layer(z)
            changed = (after != before).any(0).nonzero().flatten()
            assert changed.tolist() == sorted(moved[3 * token : 3 * token + 3].tolist())
            before = after
