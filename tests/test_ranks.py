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
from torch import multiprocessing

from openmm_regflow import ranks
from openmm_regflow.bijections import Composition, SplineCoupling
from openmm_regflow.errors import InputError
from openmm_regflow.flows import Prior
from openmm_regflow.networks import ResidualMLP
from openmm_regflow.objectives import FlowMatchingLoss, RegFlowLoss
from openmm_regflow.recipes import RunConfig, print_config
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


def test_one_process_is_a_job_of_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with ranks.job() as peers:
        assert peers.main and peers.size == 1
        assert peers.share("word") == "word" and peers.gather(3) == [3]
        batch = (torch.arange(5),)
        assert peers.slice(batch) is batch
    with pytest.raises(InputError, match="change batch_size"):
        ranks.Ranks(0, 2).slice(batch)
    assert ranks.Ranks(1, 2).slice((torch.arange(6),))[0].tolist() == [3, 4, 5]


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
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m"]
    command = ["openmm_regflow", "train", "--config", str(folder / "run.toml"), "-o", str(output), "--device", device]
    done = subprocess.run(program + command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert (output / "flow.safetensors").is_file() and not list(output.rglob("*.part"))
    return json.loads((output / "history.json").read_text())
