"""Flows: densities that normalise, samples that follow them, files that survive or are refused."""

import json
import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from openmm_regflow import files, flows, priors
from openmm_regflow.bijections import wrap
from openmm_regflow.coordinates import CartesianMap, InternalMap, build_zmatrix, topology_tables
from openmm_regflow.errors import CorruptFileError, InputError
from openmm_regflow.flows import Flow, FlowMetadata
from openmm_regflow.networks import ResidualMLP
from openmm_regflow.systems import load_system

SMALL = {"n_layers": 4, "hidden": 16, "depth": 1}


@pytest.fixture(scope="module")
def data():
    mol = load_system("alanine-dipeptide")
    g = torch.Generator().manual_seed(0)
    x = torch.as_tensor(mol.positions) + 0.003 * torch.randn(500, 22, 3, generator=g, dtype=torch.float64)
    return mol, x


def internal(data):
    mol, x = data
    return InternalMap.fit(build_zmatrix(*topology_tables(mol.topology)), x)


def stirred(flow, scale=0.05, seed=3):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in flow.bijection.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g))
    return flow


KINDS = [(name, kind) for name in ("real_nvp", "res_nvp", "spline", "jet") for kind in ("internal", "cartesian")]


@pytest.fixture(params=["real_nvp", "res_nvp", "spline", "jet"])
def factory(request):
    return getattr(flows, request.param)


@pytest.fixture(params=[*KINDS, ("torsions first", "internal")], ids="-".join)
def flow(request, data):
    name, kind = request.param
    coordinates = internal(data) if kind == "internal" else CartesianMap.fit(data[1])
    factory = partial(flows.spline, torsion_layers=4, harmonics=2) if name == "torsions first" else getattr(flows, name)
    return stirred(factory(coordinates, **SMALL))


def test_sample_and_log_prob_agree(flow):
    """log q of a sample is the same, drawn or asked for; a random relabelling does not change it."""
    flow.bijection.double()
    x, log_q = flow.sample(200, torch.Generator().manual_seed(1))
    assert x.shape == (200, 22, 3) and log_q.shape == (200,)
    fine = torch.isfinite(x).flatten(1).all(1)
    assert fine.double().mean() > 0.9
    assert (flow.log_prob(x[fine]) - log_q[fine]).abs().max() < 1e-6


def test_forward_and_inverse_are_one_map(flow):
    flow.bijection.double()
    z = flow.prior.sample(100, torch.Generator().manual_seed(2), torch.float64)
    x, log_det = flow(z)
    fine = torch.isfinite(x).flatten(1).all(1)
    back, log_det_back = flow.inverse(x[fine])
    delta = back - z[fine]
    assert torch.where(flow.prior.circular, wrap(delta), delta).abs().max() < 1e-8
    assert (log_det[fine] + log_det_back).abs().max() < 1e-7


def test_the_seed_decides(flow):
    a, b, c = (flow.sample(20, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_prior_normalises():
    prior = priors.Prior(torch.tensor([False, True]))
    z = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    grid = torch.stack([z, torch.zeros_like(z)], dim=1)
    line = torch.trapezoid(prior.log_prob(grid).exp(), z)
    assert float(line) * 2 * math.pi == pytest.approx(1.0, abs=1e-9)


def test_harmonic_prior_is_the_gaussian_of_the_data(data):
    """Against torch's own multivariate normal; pair distances and the centre have the data's mean squares."""
    coordinates = CartesianMap.fit(data[1])
    factor = priors.harmonic_factor(coordinates, data[1])
    prior = priors.Prior(coordinates.circular, factor)
    z = prior.sample(20_000, torch.Generator().manual_seed(0), torch.float64)
    atoms = z.view(-1, 22, 3)
    oracle = torch.distributions.MultivariateNormal(torch.zeros(22).double(), scale_tril=factor)
    exact = oracle.log_prob(atoms[:50].transpose(1, 2)).sum(1)
    assert (prior.log_prob(z[:50]) - exact).abs().max() < 1e-8
    x = data[1] / coordinates.scale
    drawn, real = (torch.cdist(v, v).square().mean(0) for v in (atoms[:5000], x.double()))
    # A squared distance of three Gaussian components has the relative standard deviation sqrt(2/3).
    assert ((drawn - real).abs() <= 5 * (2 / 3 / 5000) ** 0.5 * real + 1e-9).all()
    assert float(atoms.mean(1).std()) == pytest.approx(coordinates.com_std / coordinates.scale, rel=0.02)


def test_flow_with_a_harmonic_prior_travels(data, tmp_path):
    coordinates = CartesianMap.fit(data[1])
    architecture = {"name": "spline", "n_bins": 8, "bound": 5.0, "seed": 0, **SMALL}
    flow = stirred(flows.build(coordinates, architecture, None, priors.harmonic_factor(coordinates, data[1])))
    flow.save(tmp_path / "a.safetensors")
    again = Flow.load(tmp_path / "a.safetensors")
    (x, log_q), (y, log_p) = (f.sample(50, torch.Generator().manual_seed(5)) for f in (flow, again))
    assert again.prior.kind == "harmonic" and torch.equal(x, y) and torch.equal(log_q, log_p)
    again.bijection.double()
    x, log_q = again.sample(50, torch.Generator().manual_seed(5))
    assert (again.log_prob(x) - log_q).abs().max() < 1e-6


def test_round_trip_through_a_file(flow, tmp_path):
    flow = Flow(
        flow.coordinates, flow.bijection, flow.architecture, FlowMetadata("x", {"n_atoms": 22}, 300.0, {"a": 1})
    )
    flow.save(tmp_path / "a.safetensors")
    again = Flow.load(tmp_path / "a.safetensors")
    x, log_q = flow.sample(50, torch.Generator().manual_seed(5))
    y, log_p = again.sample(50, torch.Generator().manual_seed(5))
    assert torch.equal(x.nan_to_num(), y.nan_to_num()) and torch.equal(log_q, log_p)
    assert again.metadata == flow.metadata
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(("bits", "size"), [(16, 0.6), (8, 0.4)])
def test_weights_in_fewer_bits(bits, size, data, tmp_path):
    """A smaller file holds a flow near this one, whose density is that of its own samples; rounded again, the same."""
    flow = stirred(flows.spline(internal(data), **SMALL | {"hidden": 64}))
    flow.save(tmp_path / "whole.safetensors")
    flow.save(tmp_path / "small.safetensors", bits=bits)
    again = Flow.load(tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size < size * (tmp_path / "whole.safetensors").stat().st_size
    assert again.dtype == torch.float32 and flow.bijection.state_dict().keys() == again.bijection.state_dict().keys()
    for name, weight in again.bijection.named_parameters():
        original = flow.bijection.get_parameter(name)
        assert not torch.equal(weight, original)
        if bits == 8 and weight.ndim == 2:  # half a step, of which the largest of a row has 127
            step = original.abs().amax(1, keepdim=True) * (1 + 2**-11) / 127
            assert bool(((weight - original).abs() <= 0.5001 * step).all())
        else:
            assert torch.equal(weight, original.half().float())
    x, log_q = again.sample(200, torch.Generator().manual_seed(0))
    assert (again.log_prob(x) - log_q).abs().max() < 1e-3
    again.save(tmp_path / "again.safetensors", bits=bits)
    once_more = Flow.load(tmp_path / "again.safetensors")
    assert torch.equal(x, once_more.sample(200, torch.Generator().manual_seed(0))[0])


@pytest.mark.parametrize("bits", [16, 8])
def test_weights_that_cannot_be_rounded(bits, data, tmp_path):
    flow = flows.spline(internal(data), **SMALL)
    with torch.no_grad():
        flow.bijection.parts[0].network.head.bias.fill_(1e6)
    with pytest.raises(InputError, match="65504"):
        flow.save(tmp_path / "large.safetensors", bits=bits)
    flow.bijection.double()
    with pytest.raises(InputError, match="float64"):
        flow.save(tmp_path / "large.safetensors", bits=bits)
    with pytest.raises(InputError, match="not in 4"):
        flow.save(tmp_path / "large.safetensors", bits=4)
    assert not (tmp_path / "large.safetensors").exists()


def test_a_row_of_zeros_stays_zero():
    weights = {"a": torch.zeros(2, 3), "b": torch.tensor([[0.0, 0.0], [1.0, -3.0]])}
    assert all(torch.allclose(files.restored(files.rounded(weights, 8))[k], v, atol=0.02) for k, v in weights.items())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "other", "newer"])
def test_damaged_files_are_refused(damage, data, tmp_path):
    path = tmp_path / "flow.safetensors"
    flow = flows.spline(internal(data), **SMALL)
    flow.save(path)
    raw = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "flipped":
        raw[-5] ^= 0xFF
        path.write_bytes(raw)
    elif damage == "text":
        path.write_text("not a flow")
    else:
        from openmm_regflow.files import write_safetensors

        header = {"format": "something", "format_version": 1}
        if damage == "newer":
            header = {"format": "openmm_regflow.flow", "format_version": 99}
        write_safetensors(path, dict(flow.state_dict()), header)
    with pytest.raises(CorruptFileError, match=r"flow\.safetensors"):
        Flow.load(path)


def test_files_hold_no_pickle(data, tmp_path):
    path = tmp_path / "flow.safetensors"
    flows.spline(internal(data), **SMALL).save(path)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8 : 8 + size])["__metadata__"]["regflow"]


def test_missing_file_and_unwritable_folder(data, tmp_path):
    with pytest.raises(InputError, match="no file"):
        Flow.load(tmp_path / "none.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        flows.spline(internal(data), **SMALL).save(tmp_path / "file" / "flow.safetensors")


def test_wrong_atoms(flow):
    with pytest.raises(InputError, match="22"):
        flow.log_prob(torch.zeros(3, 21, 3))


@pytest.mark.parametrize("key", ["n_layers", "hidden", "depth"])
def test_bad_sizes(key, data):
    with pytest.raises(InputError, match=key):
        flows.spline(CartesianMap.fit(data[1]), **(SMALL | {key: 0}))


@pytest.mark.parametrize("shape", [(5,), (5, 22), (5, 21, 3), (5, 22, 2)])
@pytest.mark.parametrize("kind", ["internal", "cartesian"])
def test_data_of_other_shapes_are_refused(data, kind, shape):
    with pytest.raises(InputError, match="positions have shape"):
        flows.coordinates_for(data[0].topology, torch.zeros(shape), kind)
    with pytest.raises(InputError, match="positions have shape"):
        flows.coordinates_for(None, torch.zeros(5), "cartesian")


def test_one_dimension_is_refused():
    with pytest.raises(InputError, match="1-dimensional"):
        flows.alternating_masks(torch.tensor([False]), 4, 0)


@pytest.mark.parametrize("alone", [True, False])
def test_torsions_first(data, alone):
    """The first couplings move every torsion and nothing else, the others every line; lines then see all torsions."""
    sizes = {"torsion_layers": 6, "torsions_alone": alone, "torsion_hidden": 12, "torsion_depth": 2}
    flow = stirred(flows.spline(internal(data), **SMALL, **sizes), scale=0.3)
    networks = [m for m in flow.bijection.modules() if isinstance(m, ResidualMLP)]
    assert [(n.head.in_features, len(n.blocks)) for n in networks] == 6 * [(12, 2)] + 4 * [(16, 1)]
    circular = flow.coordinates.circular
    masks = flows.alternating_masks(circular, 4, 0, torsion_layers=6)
    assert len(masks) == 10 and len(flow.bijection.parts) == (5 if alone else 10)
    for k, mask in enumerate(masks):
        assert mask.any() and not (mask & ((~circular) if k < 6 else circular)).any()
        assert k % 2 == 0 or torch.equal(mask | masks[k - 1], circular if k < 6 else ~circular)
    assert not torch.equal(masks[0], masks[2]) and not torch.equal(masks[6], masks[8])
    flow.bijection.double()
    z = flow.prior.sample(1, torch.Generator().manual_seed(2), torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow.bijection(v)[0].sum(0), z)[:, 0]
    assert (jacobian[~circular][:, circular] != 0).all()
    assert bool((jacobian[circular][:, ~circular] == 0).all()) == alone  # whether they see the lines' latents
    with pytest.raises(InputError, match="of 66 features 0 are circles"):
        flows.spline(CartesianMap.fit(data[1]), **SMALL, torsion_layers=2)


def test_descriptions_of_older_flows_mean_what_they_meant(data):
    """Their torsions saw the lines, as cosine and sine alone."""
    new = flows.spline(internal(data), **SMALL, torsion_layers=2, torsions_alone=False)
    old = {k: v for k, v in new.architecture.items() if k not in ("torsions_alone", "harmonics")}
    built = flows.build(new.coordinates, old)
    assert built.bijection.state_dict().keys() == new.bijection.state_dict().keys()
    alone = flows.spline(internal(data), **SMALL, torsion_layers=2)
    assert built.bijection.state_dict().keys() != alone.bijection.state_dict().keys()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("hidden", [16, 64])
def test_the_memory_of_a_sample_is_foreseen(data, factory, hidden):
    """Of every architecture, attention included: what is foreseen is the largest intermediate a few times over."""
    flow = factory(internal(data), n_layers=2, hidden=hidden, depth=1)
    x = data[1][:50]
    with LargestTensor() as seen:
        flow.log_prob(x)
    largest = seen.elements / len(x)
    assert largest <= flow._floats_per_sample <= 20 * largest


def test_chunks_on_a_gpu_are_what_its_memory_takes(data, monkeypatch):
    """Chosen by the device's kind and the architecture alone; a CPU's stay as they were."""
    spline, jet = (make(internal(data), **SMALL) for make in (flows.spline, flows.jet))
    assert spline._chunk == jet._chunk == flows.CPU_CHUNK
    there = [flow.to("meta") for flow in (spline, jet)]  # a device with no memory at all, which is not the CPU
    assert there[0]._chunk == flows.DEVICE_CHUNK
    for budget in (flows.DEVICE_BYTES, 10 << 20, 1):
        monkeypatch.setattr(flows, "DEVICE_BYTES", budget)
        needed = there[1]._chunk * there[1]._floats_per_sample * there[1].dtype.itemsize
        assert there[1]._chunk == 1 or (needed <= budget and there[1]._chunk <= flows.DEVICE_CHUNK)
    assert there[1]._chunk == 1


@pytest.mark.gpu
def test_a_jet_of_a_hexapeptide_draws_many_samples_in_the_memory_foreseen():
    mol = load_system("alanine-hexapeptide")
    noise = torch.randn(600, mol.n_atoms, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coordinates = flows.coordinates_for(mol.topology, torch.as_tensor(mol.positions) + 0.003 * noise)
    flow = flows.jet(coordinates).to("cuda")
    assert flow._chunk < flows.DEVICE_CHUNK
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    x, log_q = flow.sample(2 * flow._chunk + 1, torch.Generator("cuda").manual_seed(0))
    assert x.is_cuda and len(log_q) == 2 * flow._chunk + 1
    assert torch.cuda.max_memory_allocated() - before < 3 * flows.DEVICE_BYTES


def test_chunks_change_nothing(data, monkeypatch):
    """Any number of samples takes the memory of one chunk, and gives what its chunks give one by one."""
    flow = stirred(flows.spline(internal(data), **SMALL))
    flow.bijection.double()
    whole = flow.log_prob(data[1][:25])
    monkeypatch.setattr(flows, "CPU_CHUNK", 7)
    seen = []
    flow.bijection.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    assert (flow.log_prob(data[1][:25]) - whole).abs().max() < 1e-9
    x, log_q = flow.sample(25, torch.Generator().manual_seed(1))
    assert seen[-4:] == [7, 7, 7, 4]
    one_by_one = torch.Generator().manual_seed(1)
    parts = [flow.sample(n, one_by_one) for n in (7, 7, 7, 4)]
    assert torch.equal(x, torch.cat([p[0] for p in parts])) and torch.equal(log_q, torch.cat([p[1] for p in parts]))
