"""Several processes give what one gives: a real job of two, over gloo, on tiny modules."""

import csv
import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import multiprocessing

from openmm_regflow import flows, ranks
from openmm_regflow.bijections import Composition, SplineCoupling
from openmm_regflow.coordinates import CartesianMap
from openmm_regflow.errors import InputError
from openmm_regflow.frames import FramesConfig, more_frames
from openmm_regflow.networks import ResidualMLP
from openmm_regflow.objectives import FlowMatchingLoss, RegFlowLoss
from openmm_regflow.priors import Prior
from openmm_regflow.recipes import RunConfig, print_config
from openmm_regflow.refinement import RefineConfig, refine
from openmm_regflow.systems import load_system
from openmm_regflow.targets import minibatch_coupling, reflow_pairs
from openmm_regflow.teachers import VectorField
from openmm_regflow.training import Batches, TrainConfig, train

CIRCULAR = torch.tensor([False, False, True])
CONFIG = TrainConfig(steps=12, batch_size=16, checkpoint_every=5, validate_every=4, warmup=2, learning_rate=1e-2)


def points(n, seed):
    return Prior(CIRCULAR).sample(n, torch.Generator().manual_seed(seed), torch.float64)


def student():
    mask = torch.tensor([True, False, True])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Composition(
            [SplineCoupling(m, CIRCULAR, partial(ResidualMLP, hidden=8, depth=1)) for m in (mask, ~mask)]
        ).double()


def any_flow():
    return flows.real_nvp(CartesianMap(2), n_layers=2, hidden=4)


def teacher():
    return VectorField(CIRCULAR, hidden=8, depth=1).double()


def job(folder):
    """Every phase that ranks share; what comes out is the same on each of them."""
    loss = RegFlowLoss(CIRCULAR, log_det=1e-2, forward_backward=1e-3, target_noise=0.1)
    f, heard = student(), []
    history = train(
        f,
        loss,
        Batches((points(64, 1), points(64, 2), torch.linspace(0, 1, 64).double()), 16),
        CONFIG,
        validation=lambda m: float(m(points(8, 3))[0].square().mean()),
        checkpoint=folder / "student.safetensors",
        progress=lambda step, total, figures: heard.append(figures),
    )
    field = teacher()
    matching = FlowMatchingLoss(Prior(CIRCULAR), minibatch_coupling(CIRCULAR))
    train(field, matching, Batches((points(64, 4),), 16), CONFIG, checkpoint=folder / "teacher.safetensors")
    pairs = reflow_pairs(field, 100, shard_size=16, n_steps=2, folder=folder / "pairs", log_det="hutchinson")
    return {
        "weights": [p.detach() for p in (*f.parameters(), *field.parameters())],
        "curve": torch.tensor([*history.loss, *history.validation], dtype=torch.float64),
        "pairs": [pairs.z, pairs.y, pairs.log_det],
        "heard": len(heard),
    }


def work(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    result = job(folder)
    with pytest.raises(InputError, match="cannot be split evenly over 2"):
        train(student(), RegFlowLoss(CIRCULAR), Batches((points(9, 1), points(9, 2)), 9), CONFIG)
    # Nine rows each are not the rows 0, 4, ... of eighteen.
    eighteen = Batches((points(18, 1), points(18, 2)), 18)
    with pytest.raises(InputError, match=r"batch_size is 18.*a multiple of 8"):
        train(student(), RegFlowLoss(CIRCULAR, forward_backward=1e-3), eighteen, CONFIG)
    with pytest.raises(InputError, match=r"batch_size is 18.*a multiple of 8"):
        refine(any_flow(), None, RefineConfig(batch_size=18, path=0.5))
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path):
    (tmp_path / "two").mkdir()
    alone = job(tmp_path / "one")
    multiprocessing.spawn(work, (2, tmp_path / "two"), nprocs=2)
    results = [torch.load(tmp_path / "two" / f"{rank}.pt") for rank in range(2)]
    for result in results:
        assert (result["curve"] - alone["curve"]).abs().max() < 1e-12
        for key in ("weights", "pairs"):
            assert all((a - b).abs().max() < 1e-11 for a, b in zip(alone[key], result[key], strict=True))
    assert [r["heard"] for r in results] == [CONFIG.steps, 0]
    # One process takes up what two have left.
    again = job(tmp_path / "two")
    assert again["heard"] == 0 and all(torch.equal(a, b) for a, b in zip(again["pairs"], results[0]["pairs"]))


def refining(folder, stop=None, astray=0.0):
    """Frames and a refinement, with a target that is another flow and a kernel that draws from it."""
    ranks.LEAST_ROWS = 512
    mol = load_system("alanine-dipeptide")
    g = torch.Generator().manual_seed(0)
    x = torch.as_tensor(mol.positions) + 0.003 * torch.randn(500, 22, 3, generator=g, dtype=torch.float64)
    coordinates, heard = flows.coordinates_for(mol.topology, x), []
    target, flow = (flows.spline(coordinates, n_layers=2, hidden=8, seed=seed) for seed in (0, 1))
    with torch.no_grad():
        for f in (target, flow):
            f.bijection.double()
            for p in f.bijection.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=g, dtype=p.dtype))
        for p in flow.bijection.parameters():
            p.add_(astray)

    def mover(x, generator):
        return target.sample(len(x), generator)[0], 7 * len(x)

    starts, _ = target.sample(1100, torch.Generator().manual_seed(2))
    data, spent = more_frames(starts, mover, FramesConfig(copies=3), folder / "frames.safetensors")

    def report(k, total, figures):
        heard.append(k)
        if k == stop:
            raise KeyboardInterrupt

    settings = {"rounds": 2, "pool": 2100, "batch_size": 192, "learning_rate": 3e-3, "anchors": 1050, "anchor_moves": 1}
    records = refine(
        flow,
        lambda x: -target.log_prob(x),
        RefineConfig(**settings),
        data=data,
        mover=mover,
        watch=[lambda x: (x[:, 4] - x[:, 14]).norm(dim=-1) > 0.4],
        checkpoint=folder / "refinement.safetensors",
        progress=report,
    )
    figures = [[r.energies, r.ess, r.divergence, *r.occupied] for r in records]
    return {
        "weights": [p.detach() for p in flow.bijection.parameters()],
        "figures": torch.tensor(figures, dtype=torch.float64),
        "frames": data,
        "spent": spent,
        "heard": heard,
    }


def refine_in(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    torch.save(refining(folder, astray=0.1 * rank), folder / f"{rank}.pt")
    with pytest.raises(InputError, match="multiple of 3"):
        refine(any_flow(), None, RefineConfig(batch_size=100))
    dist.destroy_process_group()


def test_three_processes_refine_as_one_does(tmp_path, monkeypatch):
    """They take up what one has left; rank 0 alone has its weights, and one of the three has no part of the frames."""
    monkeypatch.setattr(ranks, "LEAST_ROWS", ranks.LEAST_ROWS)
    for name in ("one", "three"):
        (tmp_path / name).mkdir()
    alone = refining(tmp_path / "one")
    assert len(ranks.parts(1100)) == len(ranks.parts(1050)) == 2 and len(ranks.parts(2100)) == 4
    with pytest.raises(KeyboardInterrupt):
        refining(tmp_path / "three", stop=1)
    (tmp_path / "three" / "frames.safetensors").unlink()  # they make these anew
    multiprocessing.spawn(refine_in, (3, tmp_path / "three"), nprocs=3)
    results = [torch.load(tmp_path / "three" / f"{rank}.pt") for rank in range(3)]
    for result in results:
        assert torch.equal(result["frames"], alone["frames"]) and result["spent"] == alone["spent"] == 2 * 2 * 7 * 1100
        assert (result["figures"] / alone["figures"] - 1).abs().max() < 1e-9
        assert all((a - b).abs().max() < 1e-9 for a, b in zip(alone["weights"], result["weights"], strict=True))
    assert alone["heard"] == [0, 1, 2] and [r["heard"] for r in results] == [[1, 2], [], []]
    # One process takes up what three have left.
    again = refining(tmp_path / "three")
    assert again["heard"] == [] and torch.equal(again["figures"], results[0]["figures"])
    assert all(torch.equal(a, b) for a, b in zip(again["weights"], results[0]["weights"], strict=True))


def test_one_process_is_a_job_of_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with ranks.job() as peers:
        assert peers.main and peers.size == 1
        assert peers.share("word") == "word" and peers.gather(3) == [3]
        batch = (torch.arange(5),)
        assert peers.slice(batch) is batch and peers.join(batch) is batch
    with pytest.raises(InputError, match="multiple of 2, or change their number"):
        ranks.Ranks(0, 2).slice(batch)
    assert ranks.Ranks(1, 2).slice((torch.arange(6),))[0].tolist() == [3, 4, 5]


@given(n=st.integers(1, 300_000), size=st.integers(1, 40))
def test_every_row_belongs_to_one_part_of_one_rank(n, size):
    given_out = [part for rank in range(size) for part in ranks.Ranks(rank, size).mine(n)]
    assert [j for j, _ in given_out] == list(range(len(ranks.parts(n))))
    assert [row for _, rows in given_out for row in (rows.start, rows.stop)][1:-1:2] == [
        rows.start for _, rows in given_out[1:]
    ]
    assert given_out[0][1].start == 0 and given_out[-1][1].stop == n
    assert all(rows.start < rows.stop for _, rows in given_out)


def test_log_beside_the_checkpoint(tmp_path):
    job(tmp_path)
    with open(tmp_path / "student.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [int(r["step"]) for r in rows if r["validation"]] == [0, 4, 8, 12]
    assert float(rows[-1]["loss"]) > 0 and float(rows[-1]["samples_per_second"]) > 0


@pytest.mark.slow
def test_train_command_under_torchrun(tmp_path):
    """One process and two give the same flow; rank 0 alone writes and prints."""
    one, two = (trained_by(n, tmp_path, "cpu", {"OMP_NUM_THREADS": "1"}) for n in (1, 2))
    for stage in ("teacher", "regression", "likelihood"):
        assert one[stage]["loss"] == pytest.approx(two[stage]["loss"], rel=1e-3)
    flow, options = tmp_path / "1" / "flow.safetensors", ["--pool", "2048", "--rounds", "2", "--anchors", "100"]
    for n in (1, 2):
        done = run(n, ["refine", str(flow), "-o", str(tmp_path / f"refined-{n}"), *options], {"OMP_NUM_THREADS": "1"})
        assert done.stdout.count("wrote ") == 1
    alone, both = (json.loads((tmp_path / f"refined-{n}" / "refinement.json").read_text()) for n in (1, 2))
    assert [r["divergence"] for r in alone] == pytest.approx([r["divergence"] for r in both], rel=1e-3)


@pytest.mark.gpu
def test_two_processes_share_one_gpu(tmp_path):
    """NCCL refuses two ranks on one GPU: gloo carries the sums, and both give what one gives."""
    visible = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    one, two = (trained_by(n, tmp_path, "cuda", visible) for n in (1, 2))
    for stage in ("teacher", "regression", "likelihood"):
        assert one[stage]["loss"] == pytest.approx(two[stage]["loss"], rel=1e-2)


def trained_by(n, folder, device, environment):
    """History of ``openmm-regflow train`` by n processes under torchrun."""
    short = {"steps": 10, "batch_size": 64, "warmup": 2, "checkpoint_every": 5}
    settings = RunConfig.model_validate(
        {
            "flow": {"n_layers": 2, "hidden": 8},
            "teacher": {"hidden": 8, "depth": 1, "train": short},
            "pairs": {"n": 512, "n_steps": 2},
            "regression": {"train": short},
            "likelihood": {"train": short},
            "refinement": {"enabled": True, "rounds": 1, "pool": 500, "batch_size": 100},
        }
    )
    (folder / "run.toml").write_text(print_config(settings))
    output = folder / str(n)
    command = ["train", "--config", str(folder / "run.toml"), "-o", str(output), "--device", device]
    done = run(n, command, environment)
    assert done.stdout.count("wrote ") == 1
    assert (output / "flow.safetensors").is_file() and not list(output.rglob("*.part"))
    return json.loads((output / "history.json").read_text())


def run(n, command, environment):
    """A command of the package by n processes under torchrun."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m"]
    program += ["openmm_regflow", *command]
    done = subprocess.run(program, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done
