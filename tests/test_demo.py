"""The demo on a small budget: every file, figures that belong together, no result without its run."""

import json

import mdtraj
import numpy as np
import pytest
import torch

from openmm_regflow import flows
from openmm_regflow.demo import demo_config, run_demo
from openmm_regflow.errors import IncompatibleFlowError
from openmm_regflow.flows import Flow
from openmm_regflow.recipes import RunConfig
from openmm_regflow.speed import speed_table
from openmm_regflow.systems import load_system

PLOTS = ["ramachandran", "energies", "weights", "free_energy_phi", "training", "phi_time"]


def short_config():
    table = demo_config().model_dump()
    table["frames"]["copies"] = 2
    table["teacher"]["train"]["steps"] = 100
    table["pairs"]["n"] = 2048
    table["regression"]["train"]["steps"] = table["likelihood"]["train"]["steps"] = 30
    table["refinement"].update(rounds=1, pool=2000, batch_size=200)
    return RunConfig.model_validate(table)


@pytest.mark.gpu
def test_the_speed_table_waits_for_the_gpu():
    """Rates that the GPU's own clock confirms; one that counts launches alone is many times too high."""
    molecule, n = load_system("alanine-dipeptide"), 20_000
    rates = dict(speed_table(molecule, n, torch.device("cuda"), 0))
    x = torch.as_tensor(molecule.positions) + 0.003 * torch.randn(n, molecule.n_atoms, 3, dtype=torch.float64)
    flow = flows.jet(flows.coordinates_for(molecule.topology, x)).to("cuda")
    x, best = x.cuda(), float("inf")
    for _ in range(4):
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        ends[0].record()
        flow.log_prob(x)
        ends[1].record()
        torch.cuda.synchronize()
        best = min(best, ends[0].elapsed_time(ends[1]) / 1000)
    assert float(rates["densities, jet"].replace(",", "")) < 1.5 * n / best


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    result = run_demo(folder, config=short_config(), n_samples=2000, chain_seconds=3.0)
    return folder, result


def test_every_file_is_there(demo):
    folder, _ = demo
    for name in PLOTS:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(PLOTS)
    assert "http://" not in page and "https://" not in page and "<script" not in page


def test_the_flow_file_gives_the_samples_again(demo):
    import torch

    folder, _ = demo
    flow = Flow.load(folder / "flow.safetensors")
    _, log_q = flow.sample(2000, torch.Generator().manual_seed(0))
    assert np.allclose(np.load(folder / "samples.npz")["log_q"], log_q.numpy(), atol=1e-9)


@pytest.mark.parametrize("name", ["samples", "chain_flow", "chain_md"])
def test_trajectories_open(demo, name):
    folder, _ = demo
    trajectory = mdtraj.load(folder / f"{name}.dcd", top=folder / f"{name}.pdb")
    assert trajectory.n_atoms == 22 and trajectory.n_frames > 0 and np.isfinite(trajectory.xyz).all()


def test_figures_follow_from_the_files(demo):
    from openmm_regflow import reweighting

    folder, result = demo
    figures = json.loads((folder / "metrics.json").read_text())
    weights = np.load(folder / "samples.npz")["log_weights"]
    assert figures["evaluation"]["ess"] == pytest.approx(reweighting.effective_sample_size(weights), rel=1e-6)
    assert figures["tfep"]["uncertainty"] > 0 and figures["chains"]["flow_move"]["n_proposed"] > 0
    assert result.verdicts["samples"] and result.verdicts["free energy"]
    page = (folder / "report.html").read_text()
    assert result.verdicts["samples"] in page.replace("&#39;", "'")


def test_an_interrupted_training_in_the_folder_is_of_one_configuration(demo):
    folder, _ = demo
    with pytest.raises(IncompatibleFlowError, match="another configuration"):
        run_demo(folder, config=demo_config(seed=3), n_samples=100, chain_seconds=1.0)
