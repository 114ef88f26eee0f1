"""Mixtures of flows: one density, one file, exact in weights and in chains; planted errors are seen."""

import copy
import json
import math
import shutil

import pytest
import torch
from analytic_molecules import TEMPERATURE, Chain, cartesian_gaussian, chain_topology, z_scores
from openmm import unit

from openmm_regflow import flows, load_flow
from openmm_regflow.check import run_checks
from openmm_regflow.cli import main
from openmm_regflow.errors import CorruptFileError, IncompatibleFlowError, InputError
from openmm_regflow.fingerprints import fingerprint
from openmm_regflow.flows import Flow, FlowMetadata
from openmm_regflow.mixtures import FlowMixture, fitted_shares
from openmm_regflow.moves import FlowMove
from openmm_regflow.moves.registry import own_file
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.proposals import FlowProposal
from openmm_regflow.sampling import annealed_samples, fit_mixture, run_chain
from openmm_regflow.systems import MolecularSystem, load_system

TARGET = Chain(4)
#: Standard errors: 1e-5 two-sided probability per figure.
SIGMAS = 4.5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def part(seed, scale=0.15, kind="internal", target=TARGET):
    """A flow of the chain whose weights are random: a poor proposal, and another one for each seed."""
    coordinates = flows.coordinates_for(target.topology, target.sample(2000, generator(1)), kind)
    flow = flows.spline(coordinates, n_layers=2, hidden=16).double()
    with torch.no_grad():
        for p in flow.bijection.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator(seed), dtype=p.dtype))
    flow.metadata = FlowMetadata("chain", fingerprint(target.system), TEMPERATURE, {"seed": seed})
    return flow.eval()


@pytest.fixture(scope="module", params=["internal", "cartesian"])
def mixture(request):
    return FlowMixture([part(seed, kind=request.param) for seed in (1, 2, 3)], [0.5, 0.2, 0.3])


@pytest.fixture(scope="module")
def proposal():
    return FlowProposal(FlowMixture([part(1), part(2)], [0.7, 0.3]), TorchPotential(TARGET.system), TEMPERATURE)


def test_the_density_is_the_sum_of_the_parts(mixture):
    """Of a sample as drawn and as looked up, and by hand."""
    x, drawn = mixture.sample(500, generator())
    there = torch.isfinite(x).flatten(1).all(1)
    assert torch.isfinite(drawn).all()  # a row that is no configuration has a density as those of one flow have
    by_hand = sum(s * flow.log_prob(x[there]).exp() for s, flow in zip((0.5, 0.2, 0.3), mixture.parts)).log()
    torch.testing.assert_close(drawn[there], by_hand, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mixture.log_prob(x[there]), by_hand, rtol=1e-12, atol=1e-12)
    assert there.sum() > 450


def share_scores(mixture, n=20_000):
    """z of E_q[q_k / q] = 1 for every part: ratios of densities are at most 1 / s_k, so the error is known."""
    x, log_q = mixture.sample(n, generator(5))
    there = torch.isfinite(x).flatten(1).all(1)
    ratios = torch.zeros(len(mixture.parts), n, dtype=torch.float64)
    ratios[:, there] = (mixture.log_probs(x[there]) - log_q[there]).exp()
    return (ratios.mean(1) - 1) / (ratios.std(1) / math.sqrt(n))


def test_samples_follow_the_density(mixture):
    assert share_scores(mixture).abs().max() < SIGMAS


def test_samples_of_other_shares_are_seen(mixture):
    wrong = FlowMixture([*mixture.parts], [0.5, 0.2, 0.3])
    draw = wrong.sample

    def equal(n, g):
        wrong.shares.fill_(1 / 3)
        x, _ = draw(n, g)
        wrong.shares.copy_(mixture.shares)
        return x, wrong.log_prob(x.nan_to_num())

    wrong.sample = equal
    assert share_scores(wrong).abs().max() > 2 * SIGMAS


def test_rows_are_independent(proposal):
    """Parts change from row to row as coins do: a pool is handed out in order to a Markov chain."""
    x, _ = proposal.flow.sample(20_000, generator(2))
    first = proposal.flow.log_probs(x[torch.isfinite(x).flatten(1).all(1)])
    v = torch.softmax(first, 0)[0]
    v = v - v.mean()
    correlation = float((v[1:] * v[:-1]).mean() / v.square().mean())
    assert abs(correlation) < SIGMAS / math.sqrt(len(v))
    ordered = v.sort()[0]  # as rows of one part after the other would be
    assert float((ordered[1:] * ordered[:-1]).mean() / v.square().mean()) > 0.5


def test_weights_recover_exact_expectations(proposal):
    batch = proposal.sample(40_000, generator())
    weights = torch.softmax(batch.log_weights, 0)
    for name, (function, exact) in TARGET.observables().items():
        values = torch.where(weights > 0, function(batch.positions), 0.0)
        mean = (weights * values).sum()
        error = ((weights * (values - mean)) ** 2).sum().sqrt()
        assert abs(mean - exact) < SIGMAS * error, name


class FirstPart(FlowProposal):
    """log q is that of the first part, whichever part has drawn."""

    def sample(self, n, generator=None):
        batch = super().sample(n, generator)
        return batch._replace(log_q=self.log_q(batch.positions.nan_to_num(0.1)))

    def log_q(self, positions):
        return self.flow.parts[0].log_prob(positions)


@pytest.mark.parametrize("n_proposals", [1, 4])
@pytest.mark.parametrize("kind", [FlowProposal, FirstPart])
def test_chains_stay_exact(kind, n_proposals):
    g, n = generator(3), 20_000
    exact = kind(FlowMixture([part(1, 0.1), part(2, 0.1)]), TorchPotential(TARGET.system), TEMPERATURE)
    chain = run_chain(exact, TARGET.sample(n, g), 2, generator=g, n_proposals=n_proposals, pool_size=40_000)
    score = max(map(abs, z_scores(chain.positions[-1], TARGET.observables()).values()))
    assert chain.statistics.acceptance_rate > 0.1
    assert score < SIGMAS if kind is FlowProposal else score > 2 * SIGMAS


def test_weights_are_bounded_by_those_of_the_parts(proposal):
    """p/q is at most 1/s_k times the weight of part k."""
    batch = proposal.sample(2000, generator(4))
    x = batch.positions[torch.isfinite(batch.u)]
    log_w = proposal.evaluate(x).log_weights
    for share, flow in zip(proposal.flow.shares, proposal.flow.parts):
        assert bool((log_w <= proposal.with_flow(flow).evaluate(x).log_weights - share.log() + 1e-9).all())


def test_shares_of_a_known_mixture_are_found():
    """The target is itself 0.2 q_1 + 0.8 q_2; errors from the spread over ten sets of draws."""
    parts = [part(1), part(2)]
    target, equal = FlowMixture(parts, [0.2, 0.8]), FlowMixture(parts)
    found = []
    for seed in range(10):
        x = equal.sample(1000, generator(seed))[0]
        x = x[torch.isfinite(x).flatten(1).all(1)]
        found.append(fitted_shares(equal.log_probs(x), -target.log_prob(x))[0])
    found = torch.stack(found)
    assert abs(found.mean() - 0.2) < SIGMAS * found.std() / math.sqrt(10)
    assert found.std() < 0.05  # unweighted draws would say 0.5


def test_fitted_shares_are_the_best():
    """The condition of the optimum: E_p[q_k / q] is 1 for every part with a share, and not above 1 for any other."""
    proposals = [FlowProposal(part(seed), TorchPotential(TARGET.system), TEMPERATURE) for seed in (1, 2, 3)]
    mixture, batches = fit_mixture(proposals, 2000, generator(6))
    x, u = torch.cat([b.positions for b in batches]), torch.cat([b.u for b in batches])
    x, u = x[torch.isfinite(u)], u[torch.isfinite(u)]
    log_q = mixture.log_probs(x)
    weights = torch.softmax(-u - log_q.logsumexp(0), 0)
    slopes = ((log_q - mixture.log_prob(x)).exp() * weights).sum(1)
    assert slopes.max() < 1.001 and slopes[mixture.shares > 0.01].min() > 0.999
    equal = (FlowMixture([*mixture.parts]).log_probs(x) - math.log(3)).logsumexp(0)
    assert (weights * mixture.log_prob(x)).sum() > (weights * equal).sum()


@pytest.mark.parametrize("bits", [32, 8])
def test_one_file(tmp_path, bits):
    parts = [part(1), part(2)]
    for flow in parts:
        flow.bijection.float()
    mixture = FlowMixture(parts, [0.9, 0.1])
    path = tmp_path / "mixture.safetensors"
    mixture.save(path, bits=bits)
    again = load_flow(path)
    assert isinstance(again, FlowMixture) and again.path == path and again.shares.tolist() == [0.9, 0.1]
    assert again.metadata.target == part(1).metadata.target
    assert [p["training"] for p in again.metadata.training["mixture of"]] == [{"seed": 1}, {"seed": 2}]
    x = TARGET.sample(50, generator())
    saved = mixture if bits == 32 else FlowMixture([loaded(tmp_path, p, bits) for p in mixture.parts], [0.9, 0.1])
    torch.testing.assert_close(again.log_prob(x), saved.log_prob(x), rtol=0, atol=1e-12)
    with pytest.raises(CorruptFileError, match="mixture"):
        Flow.load(path)
    part(1).save(tmp_path / "flow.safetensors")
    assert isinstance(load_flow(tmp_path / "flow.safetensors"), Flow)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptFileError, match="damaged"):
        load_flow(path)
    with pytest.raises(InputError, match="no file"):
        load_flow(tmp_path / "nowhere")


def loaded(folder, flow, bits):
    flow.save(folder / "one.safetensors", bits=bits)
    return Flow.load(folder / "one.safetensors")


def test_a_move_is_stored_by_the_file(tmp_path):
    """A copied and a restored move have the mixture's own file, and its draws."""
    from openmmtools import states
    from openmmtools.utils import deserialize, serialize

    path = tmp_path / "mixture.safetensors"
    FlowMixture([part(1, 0.05), part(2, 0.05)]).save(path)
    move = FlowMove(FlowProposal(load_flow(path), TorchPotential(TARGET.system), TEMPERATURE), seed=1)
    assert copy.deepcopy(move).flow_path == str(path)
    stored = serialize(move)
    assert len(json.dumps(stored, default=str)) < 10_000  # a path and no weights
    del move
    restored = deserialize(dict(stored))
    state = states.SamplerState(TARGET.sample(1, generator())[0].numpy() * unit.nanometer)
    for _ in range(100):
        restored.apply(states.ThermodynamicState(TARGET.system, TEMPERATURE * unit.kelvin), state)
    assert restored.n_proposed == 100 and restored.n_accepted > 0


def test_the_checks_look_at_every_part():
    x = TARGET.sample(1, generator(2))[0].numpy()
    molecule = MolecularSystem("chain", chain_topology(4), TARGET.system, x, TEMPERATURE)
    good = FlowMixture([part(1, 0.05), part(2, 0.05)])
    report = run_checks(good, molecule, n=1000)
    assert report.passed and {"round trip, part 1", "round trip, part 2"} <= {f.name for f in report.findings}
    second = good.parts[1]
    forward = second.forward
    second.forward = lambda z: (forward(z)[0], forward(z)[1] + 0.01)
    failed = {f.name for f in run_checks(good, molecule, n=1000).findings if f.passed is False}
    assert "log-determinant, part 2" in failed and "log-determinant, part 1" not in failed


def other_system(flow):
    flow.metadata = FlowMetadata("chain", fingerprint(Chain(4, bond_width=0.03).system), TEMPERATURE)
    return flow


REFUSED = {
    "Systems or temperatures": (lambda: part(1), lambda: other_system(part(2))),
    "kinds of coordinates": (lambda: part(1), lambda: part(2, kind="cartesian")),
    "numbers of atoms": (
        lambda: cartesian_flow(Chain(3, bond_width=0.04, angle_width=0.5)),
        lambda: part(2, kind="cartesian"),
    ),
}


def cartesian_flow(target):
    return part(1, kind="cartesian", target=target)


def test_every_pair_is_compared():
    """Also where the first flow names no System."""
    unknown = part(3)
    unknown.metadata = FlowMetadata()
    assert FlowMixture([unknown, part(1)]).metadata.target == part(1).metadata.target
    with pytest.raises(IncompatibleFlowError, match="Systems or temperatures"):
        FlowMixture([unknown, part(1), other_system(part(2))])


@pytest.mark.parametrize("words", list(REFUSED))
def test_flows_of_different_measures_are_refused(words):
    first, second = REFUSED[words]
    with pytest.raises(IncompatibleFlowError, match=words):
        FlowMixture([first(), second()])


def test_methyls_of_another_sense_are_refused():
    """Their labels would be left out of one density and not of the other."""
    mol = load_system("alanine-dipeptide")
    x = torch.as_tensor(mol.positions) + 0.003 * torch.randn(500, 22, 3, generator=generator(), dtype=torch.float64)
    ours = flows.spline(flows.coordinates_for(mol.topology, x), n_layers=2, hidden=8)
    mirror = torch.tensor([-1.0, 1.0, 1.0])
    mirrored = flows.spline(flows.coordinates_for(mol.topology, x * mirror), n_layers=2, hidden=8)
    FlowMixture([ours, flows.spline(flows.coordinates_for(mol.topology, x), n_layers=3, hidden=8)])
    with pytest.raises(IncompatibleFlowError, match="interchangeable"):
        FlowMixture([ours, mirrored])


def test_another_spread_of_the_centre_is_another_density_of_the_same_measure():
    """Cartesian flows of two trajectories differ in it; weights are exact all the same."""
    target = Chain(3, bond_width=0.04, angle_width=0.5)
    parts = [cartesian_flow(target), part(2, 0.02, "cartesian", target)]
    parts[1].coordinates.com_std *= 1.3
    mixed = FlowProposal(FlowMixture(parts), TorchPotential(target.system), TEMPERATURE)
    batch = mixed.sample(40_000, generator())
    weights = torch.softmax(batch.log_weights, 0)
    for name, (function, exact) in target.observables().items():
        values = torch.where(weights > 0, function(batch.positions), 0.0)
        mean = (weights * values).sum()
        assert abs(mean - exact) < SIGMAS * ((weights * (values - mean)) ** 2).sum().sqrt(), name


class InPowersOfTwo(FlowMixture):
    """Rows as on a GPU."""

    def _size(self, n):
        return 1 << (n - 1).bit_length()


def test_rows_that_fill_up_a_size_change_nothing(mixture):
    padded = InPowersOfTwo([*mixture.parts], [0.5, 0.2, 0.3])
    assert share_scores(padded).abs().max() < SIGMAS
    x, drawn = padded.sample(300, generator())
    there = torch.isfinite(x).flatten(1).all(1)
    torch.testing.assert_close(drawn[there], mixture.log_prob(x[there]), rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
def test_draws_and_densities_on_the_gpu(tmp_path):
    """Densities are those of the CPU, drawn and looked up, told or recorded; sizes that change do not matter."""
    FlowMixture([part(1, 0.05), part(2, 0.05)], [0.7, 0.3]).save(tmp_path / "mixture.safetensors")
    there, here = (load_flow(tmp_path / "mixture.safetensors", device) for device in ("cuda", "cpu"))
    for n in (1, 64, *6 * [1000]):
        x, log_q = there.sample(n, torch.Generator(device="cuda").manual_seed(n))
        kept = torch.isfinite(x).flatten(1).all(1)
        assert x.device.type == "cuda" and len(x) == n
        torch.testing.assert_close(log_q[kept].cpu(), here.log_prob(x[kept].cpu()), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(there.log_prob(x[kept]), log_q[kept], rtol=1e-9, atol=1e-9)
    assert all(flow._drawn.recordings and flow._judged.recordings for flow in there.parts)


def test_a_saved_mixture_is_its_own_file(tmp_path):
    """Shares that another normalisation would change in the last bit."""
    for k, shares in enumerate(torch.rand(12, 3, generator=generator(8), dtype=torch.float64).tolist()):
        mixture = FlowMixture([part(1), part(2), part(3)], shares)
        mixture.save(tmp_path / f"{k}.safetensors")
        assert own_file(mixture) == tmp_path / f"{k}.safetensors"


def test_a_flow_that_adds_nothing_is_named():
    ruined = part(5, 1.0)
    proposals = [FlowProposal(flow, TorchPotential(TARGET.system), TEMPERATURE) for flow in (part(1, 0.02), ruined)]
    with pytest.raises(InputError, match=r"flow 2 of 2 .* adds nothing"):
        fit_mixture(proposals, 500, generator())


def test_refusals(proposal):
    with pytest.raises(InputError, match="the same"):
        FlowMixture([part(1), part(2), part(1)])
    for bad in ([part(1)], [part(1), proposal.flow], [part(1), cartesian_gaussian(TARGET)]):
        with pytest.raises(InputError, match="two flows"):
            FlowMixture(bad)
    for shares in ([1.0], [0.5, 0.0], [0.5, math.nan], [2.0, -1.0]):
        with pytest.raises(InputError, match="positive"):
            FlowMixture([part(1), part(2)], shares)
    with pytest.raises(InputError, match="at least one"):
        proposal.flow.sample(0)
    with pytest.raises(InputError, match="this is a mixture"):
        annealed_samples(proposal, 10)
    with pytest.raises(InputError, match="give its parts"):
        fit_mixture([proposal, proposal], 10)


def test_the_command(tmp_path, capsys):
    """Two flows of the dipeptide into one file that the other commands take, `refine` apart."""
    shipped = load_system("alanine-dipeptide").folder / "flow.safetensors"
    other = Flow.load(shipped)
    with torch.no_grad():
        for p in other.bijection.parameters():
            p.add_(0.2 * p.abs().mean() * torch.randn(p.shape, generator=generator(7)))
    other.save(tmp_path / "other.safetensors")
    out = tmp_path / "mixture"
    arguments = ["mix", str(shipped), str(tmp_path / "other.safetensors"), "-n", "500", "--output", str(out)]
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    printed = capsys.readouterr().out
    mixture = load_flow(out / "flow.safetensors")
    assert mixture.shares[0] > 0.5 and f"{mixture.shares[0]:.3f}" in printed and "mixture" in printed
    for command in ("sample", "check"):
        end = ["-n", "500", "--output", str(tmp_path / command)]
        start = ["check", "alanine-dipeptide"] if command == "check" else [command]
        with pytest.raises(SystemExit, match="0"):
            main([*start, str(out / "flow.safetensors"), *end])
    shutil.copy(tmp_path / "other.safetensors", out / "other.safetensors")
    with pytest.raises(SystemExit, match="2"):  # before anything is deleted
        main(["mix", str(out / "other.safetensors"), str(shipped), "--output", str(out), "--overwrite"])
    assert "lies in the folder" in capsys.readouterr().err and (out / "flow.safetensors").is_file()
    with pytest.raises(SystemExit, match="2"):
        main(["refine", str(out / "flow.safetensors"), "--output", str(tmp_path / "refined")])
    assert "this is a mixture" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--overwrite", "--share", "0.25", "--share", "0.75"])
    assert load_flow(out / "flow.safetensors").shares.tolist() == [0.25, 0.75]
