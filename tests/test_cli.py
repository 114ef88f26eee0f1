"""The command line as a user meets it: help, good runs, one line for every kind of bad input, Ctrl-C."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mdtraj
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from openmm_regflow import __version__, flows, outputs
from openmm_regflow.chains import run_chain
from openmm_regflow.cli import app, main
from openmm_regflow.errors import InputError
from openmm_regflow.files import write_safetensors
from openmm_regflow.flows import FlowMetadata
from openmm_regflow.moves import FlowMove
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.proposals import FlowProposal
from openmm_regflow.recipes import RunConfig, print_config
from openmm_regflow.simulate import export_hdf5
from openmm_regflow.systems import load_system
from openmm_regflow.teachers import VectorField, save_teacher

COMMANDS = [
    "systems", "simulate", "pairs", "train", "refine", "mix", "sample", "evaluate", "check", "mcmc", "tfep",
    "benchmark", "doctor", "demo",
]  # fmt: skip


def run(capsys, *arguments):
    """(exit code, standard output, standard error) of a command."""
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def refused(capsys, *arguments):
    """The one line that a bad command prints."""
    code, _, err = run(capsys, *arguments)
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def small_config(steps=20):
    train = {"steps": steps, "batch_size": 64, "warmup": 5, "checkpoint_every": 10}
    return RunConfig.model_validate(
        {
            "flow": {"n_layers": 2, "hidden": 16},
            "teacher": {"hidden": 16, "depth": 1, "train": train},
            "pairs": {"n": 512, "n_steps": 2},
            "regression": {"train": train},
            "likelihood": {"train": train},
        }
    )


@pytest.fixture(scope="module")
def molecule():
    return load_system("alanine-dipeptide")


@pytest.fixture(scope="module")
def flow_file(molecule, tmp_path_factory):
    """A poor but real flow: whitened internal coordinates with the identity as bijection."""
    x = torch.as_tensor(molecule.reference("train")[:2000])
    flow = flows.spline(flows.coordinates_for(molecule.topology, x), n_layers=2, hidden=8)
    flow.metadata = FlowMetadata(molecule.name, molecule.fingerprint, molecule.temperature)
    path = tmp_path_factory.mktemp("flow") / "flow.safetensors"
    flow.save(path)
    return path


def test_every_command_has_help_with_an_example(capsys):
    assert sorted(c.name or c.callback.__name__ for c in app.registered_commands) == sorted(COMMANDS)
    for command in COMMANDS:
        code, out, _ = run(capsys, command, "--help")
        assert code == 0 and f"Example: openmm-regflow {command}" in " ".join(out.split())


SCRIPTS = ["examples/coupling_layouts.py", "examples/jacobian_gap.py"]
SCRIPTS += ["systems/make_reference.py", "systems/write_cards.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_have_help(script, tmp_path):
    """And take it for no folder and no name."""
    program = [sys.executable, Path(__file__).parents[1] / script, "--help"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and not list(tmp_path.iterdir())


def test_systems(capsys):
    code, out, _ = run(capsys, "systems")
    assert code == 0
    for name, atoms in (("dipeptide", 22), ("tripeptide", 33), ("tetrapeptide", 42), ("hexapeptide", 62)):
        assert f"alanine-{name}" in out and str(atoms) in out


def test_print_config_round_trip(capsys, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(print_config(small_config()))
    code, out, _ = run(capsys, "train", "--config", path, "--print-config")
    assert code == 0 and out == path.read_text()


@pytest.mark.gpu
def test_evaluate_on_the_gpu_gives_the_figures_of_the_cpu(capsys, tmp_path, molecule):
    found = {}
    for device in ("cpu", "cuda"):
        options = ("-n", 4000, "--device", device, "-o", tmp_path / device)
        code, _, err = run(capsys, "evaluate", molecule.folder / "flow.safetensors", *options)
        assert code == 0, err
        found[device] = json.loads((tmp_path / device / "metrics.json").read_text())
    # Other random numbers of the same flow: its ESS is far above the noise of 4000 samples.
    assert found["cuda"]["ess"] == pytest.approx(found["cpu"]["ess"], abs=0.1)


def test_train_pairs_sample_mcmc_tfep_evaluate(capsys, tmp_path):
    """One flow through every command."""
    config = tmp_path / "run.toml"
    config.write_text(print_config(small_config()))
    code, _, err = run(capsys, "train", "alanine-dipeptide", "--config", config, "-o", tmp_path / "train")
    assert code == 0, err
    flow = tmp_path / "train" / "flow.safetensors"
    teacher = tmp_path / "train" / "teacher.safetensors"
    code, out, _ = run(capsys, "pairs", teacher, "-n", 300, "--n-steps", 2, "-o", tmp_path / "pairs")
    assert code == 0 and "300 pairs of 60 dimensions" in out
    code, out, _ = run(capsys, "sample", flow, "-n", 500, "--equilibrium", 20, "-o", tmp_path / "sample")
    assert code == 0 and "ESS" in out and "wrote 20 different frames without weights" in out
    trajectory = mdtraj.load(tmp_path / "sample" / "samples.dcd", top=tmp_path / "sample" / "samples.pdb")
    table = np.load(tmp_path / "sample" / "samples.npz")
    assert trajectory.n_frames == table["in_trajectory"].sum() and len(table["log_q"]) == 500
    chosen = mdtraj.load(tmp_path / "sample" / "equilibrium.dcd", top=tmp_path / "sample" / "equilibrium.pdb")
    rows = [int(np.flatnonzero((trajectory.xyz == frame).all((1, 2)))[0]) for frame in chosen.xyz]
    assert sorted(set(rows)) == rows and len(rows) == 20
    weights = table["log_weights"][table["in_trajectory"]]
    assert weights[rows].mean() > np.mean(weights[np.isfinite(weights)])
    code, out, _ = run(capsys, "mcmc", flow, "--iterations", 10, "--md-steps", 10, "-o", tmp_path / "mcmc")
    assert code == 0
    assert json.loads((tmp_path / "mcmc" / "statistics.json").read_text())["n_proposed"] == 10
    assert mdtraj.load(tmp_path / "mcmc" / "chain.dcd", top=tmp_path / "mcmc" / "chain.pdb").n_frames == 10
    code, out, _ = run(capsys, "tfep", flow, "-n", 3000, "-o", tmp_path / "tfep")
    assert code == 0 and "kT" in out
    assert json.loads((tmp_path / "tfep" / "tfep.json").read_text())["uncertainty"] > 0
    code, out, err = run(capsys, "evaluate", flow, "-n", 1000, "-o", tmp_path / "evaluate")
    assert [line.split(":")[0] for line in err.splitlines()] == ["samples", "figures", "plots"]  # what took its time
    assert code == 0 and 0 < json.loads((tmp_path / "evaluate" / "metrics.json").read_text())["ess"] <= 1
    assert (tmp_path / "evaluate" / "ramachandran.png").stat().st_size > 10_000
    annealed = ("--refine-samples", 3, "-n", 1000, "-o")
    code, out, _ = run(capsys, "evaluate", flow, *annealed, tmp_path / "annealed")
    found = json.loads((tmp_path / "annealed" / "metrics.json").read_text())
    assert code == 0 and "energies per effective sample" in out
    assert found["ess"] > found["annealed"]["ess_before"] and found["annealed"]["energies"] > 16_000
    code, out, _ = run(capsys, "sample", flow, *annealed, tmp_path / "annealed-samples")
    assert code == 0 and "ESS before and after" in out
    assert "log_q" not in np.load(tmp_path / "annealed-samples" / "samples.npz")


def test_tfep_of_a_states_file(capsys, molecule, tmp_path):
    """Two halves of the shipped validation run at one temperature: a difference of zero within its error."""
    topology = mdtraj.Topology.from_openmm(molecule.topology)
    frames = molecule.reference("validation")
    for name, part in (("a", frames[::2]), ("b", frames[1::2])):
        mdtraj.Trajectory(part, topology).save_dcd(str(tmp_path / f"{name}.dcd"))
    state = '[{0}]\nsystem = "alanine-dipeptide"\ntrajectory = "{0}.dcd"\n'
    path = tmp_path / "states.toml"
    path.write_text('map = "identity"\nn_resamples = 20\n' + state.format("a") + state.format("b"))
    code, _, err = run(capsys, "tfep", path, "-o", tmp_path / "out")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "tfep.json").read_text())["result"]["delta_f"] == pytest.approx(0, abs=1e-9)
    path.write_text('maps = "identity"\n' + state.format("a") + state.format("b"))
    assert "maps" in refused(capsys, "tfep", path, "-o", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_refine(capsys, flow_file, tmp_path):
    command = ["refine", flow_file, "--rounds", 1, "--pool", 2100, "-o", tmp_path / "refined"]
    code, out, err = run(capsys, *command)
    assert code == 0, err
    record = json.loads((tmp_path / "refined" / "refinement.json").read_text())
    assert [r["energies"] for r in record] == [12_100, 14_200] and 0 < record[0]["divergence_error"] < 0.2
    first, best = record[0]["divergence"], min(r["divergence"] for r in record)
    assert f"KL {first:.3f} -> {best:.3f} nat, 14,200 energies" in out
    refined = flows.Flow.load(tmp_path / "refined" / "flow.safetensors")
    assert refined.metadata.training["energies"] == 14_200 and refined.metadata.temperature == 300.0
    assert refined.metadata.training["inverse_error"] < 1e-4


def test_refine_by_the_path_on_the_frames_of_a_run(capsys, flow_file, tmp_path):
    target, frames = flows.Flow.load(flow_file).metadata.target, tmp_path / "frames.safetensors"
    x = torch.as_tensor(load_system("alanine-dipeptide").reference("train")[:300])
    header = {"format": "openmm_regflow.frames", "format_version": 1, "made of": {"target": target}, "energies": 0}
    write_safetensors(frames, {"x": x}, header)
    command = ["refine", flow_file, "--rounds", 1, "--pool", 2100, "--anchors", 200, "--path", 0.9, "--data", frames]
    code, _, err = run(capsys, *command, "-o", tmp_path / "refined")
    assert code == 0, err
    record = json.loads((tmp_path / "refined" / "refinement.json").read_text())
    assert [r["energies"] for r in record] == [2300, 4600]  # of every anchor anew: with forces
    write_safetensors(frames, {"x": x}, header | {"made of": {"target": target | {"temperature": 310.0}}})
    assert "another System or temperature" in refused(capsys, *command, "-o", tmp_path / "other")


def test_seed_decides(capsys, flow_file, tmp_path):
    drawn = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(capsys, "sample", flow_file, "-n", 50, "--seed", seed, "-o", tmp_path / name)
        drawn.append(np.load(tmp_path / name / "samples.npz")["log_q"])
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


def test_seed_decides_the_flow_moves_of_a_chain(capsys, shipped, tmp_path):
    """Without dynamics, whose noise OpenMM seeds by itself."""
    command = ["mcmc", shipped, "--iterations", 3, "--md-steps", 0]
    frames = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(capsys, *command, "--seed", seed, "-o", tmp_path / name)[0] == 0
        frames.append(mdtraj.load(tmp_path / name / "chain.dcd", top=tmp_path / name / "chain.pdb").xyz)
    assert np.array_equal(frames[0], frames[1]) and not np.array_equal(frames[0], frames[2])


def test_simulate_resumes(capsys, tmp_path):
    short = ["simulate", "alanine-dipeptide", "--steps", 10, "--replicas", 2, "--max-temperature", 350, "-o", tmp_path]
    assert run(capsys, *short, "--iterations", 4, "--burn-in", 1)[0] == 0
    code, out, err = run(capsys, *short, "--iterations", 8, "--burn-in", 1)
    assert code == 0, err
    assert mdtraj.load(tmp_path / "trajectory.h5").n_frames == 7 and "acceptance" in out
    code, out, _ = run(capsys, *short, "--iterations", 2, "--burn-in", 1)
    assert code == 0 and "8 iterations already" in " ".join(out.split())
    assert mdtraj.load(tmp_path / "trajectory.h5").n_frames == 7


def test_simulate_says_what_it_left_out(capsys, tmp_path):
    short = ["simulate", "alanine-dipeptide", "--steps", 10, "--replicas", 2, "--max-temperature", 350, "-o", tmp_path]
    code, out, _ = run(capsys, *short, "--iterations", 6)
    said = " ".join(out.split())
    assert code == 0 and "a burn-in of 100 is more than half of the 6 iterations; 3 are left out" in said
    assert f"wrote 3 frames to {tmp_path / 'trajectory.h5'}, the first 3 of 6" in said
    _, out, _ = run(capsys, *short, "--iterations", 6, "--burn-in", 2)
    assert "more than half" not in out and "wrote 4 frames" in out


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--timestep", 2, "did you mean 0.002"), ("--replicas", 1, "--replicas"), ("--iterations", 0, "--iterations")],
)
def test_options_of_simulate_are_named_as_given(capsys, tmp_path, option, value, words):
    code, _, err = run(capsys, "simulate", "alanine-dipeptide", option, value, "-o", tmp_path / "out")
    assert code == 2 and words in err and not (tmp_path / "out").exists()


def test_dynamics_that_explode_end_in_a_line(capsys, tmp_path):
    hot = ["--timestep", 0.01, "--max-temperature", 1e9, "--steps", 50, "--replicas", 2, "--iterations", 4]
    assert "the dynamics exploded" in refused(capsys, "simulate", "alanine-dipeptide", *hot, "-o", tmp_path)


def test_version(capsys):
    code, out, _ = run(capsys, "--version")
    assert code == 0 and out.strip() == __version__


def test_held_out_frames_have_to_be_others(capsys, molecule, tmp_path):
    """Else nothing would tell when a flow learns its frames by heart."""
    frames = molecule.reference("train")[:400]
    export_hdf5(frames[:300], molecule.topology, tmp_path / "a.h5")
    export_hdf5(frames[299:], molecule.topology, tmp_path / "b.h5")
    err = refused(capsys, "train", "alanine-dipeptide", "--data", tmp_path / "a.h5", "--validation", tmp_path / "b.h5",
                  "-o", tmp_path / "out")  # fmt: skip
    assert "1 of 101 validation frames are training frames" in err


def test_warnings_come_without_lines_of_code():
    """In a process of its own: tests hear warnings in another way."""
    code = (
        "import warnings\n"
        "from openmm_regflow.cli.shell import app, command\n"
        "@command\n"
        "def trouble():\n"
        "    warnings.warn('the first\\n  and the second', stacklevel=1)\n"
        "app(['trouble'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "warning: the first and the second\n"


def test_readers_of_trajectories_are_quiet(molecule, tmp_path):
    """mdtraj's reader of DCD files prints by itself, from C."""
    x = mdtraj.Trajectory(molecule.reference("test")[:10], mdtraj.Topology.from_openmm(molecule.topology))
    x.save_dcd(str(tmp_path / "few.dcd"))
    code = (
        "import sys; from openmm_regflow import load_system; from openmm_regflow.cli.shell import given_frames; "
        "print(given_frames(load_system('alanine-dipeptide'), sys.argv[1], 'test').shape)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "few.dcd")], capture_output=True, text=True)
    assert done.stdout == "(10, 22, 3)\n", done.stderr


def test_simulate_keeps_to_its_own_folder(capsys, tmp_path):
    """Neither another process's, nor one that holds other things."""
    import fcntl

    short = ["simulate", "alanine-dipeptide", "--steps", 10, "--replicas", 2, "--iterations", 4, "--scramble", 2]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("")
    assert "holds other things" in refused(capsys, *short, "-o", tmp_path / "notes")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "run.json").write_text('{"command": "train", "settings": {}, "finished": true}')
    assert "holds other things" in refused(capsys, *short, "-o", tmp_path / "train")
    (tmp_path / "busy").mkdir()
    handle = os.open(tmp_path / "busy", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert "another process is at work" in refused(capsys, *short, "-o", tmp_path / "busy")
    os.close(handle)
    assert run(capsys, *short, "-o", tmp_path / "busy")[0] == 0


def test_simulate_batched(capsys, tmp_path):
    command = ["simulate", "alanine-dipeptide", "--engine", "batched", "--copies", 2, "--replicas", 2, "--steps", 2]
    command += ["--iterations", 3, "--burn-in", 1, "--scramble", 5, "-o", tmp_path / "run"]
    code, out, err = run(capsys, *command)
    assert code == 0, err
    assert mdtraj.load(tmp_path / "run" / "trajectory.h5").n_frames == 4 and "acceptance" in out
    assert "known: openmmtools, batched" in refused(capsys, *command[:3], "gromacs", "-o", tmp_path / "other")


def test_unknown_system(capsys, flow_file, tmp_path):
    assert "alanine-dipeptide" in refused(capsys, "train", "unobtainium", "-o", tmp_path / "x")
    assert "alanine-dipeptide" in refused(capsys, "sample", flow_file, "--system", "nope", "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_missing_and_corrupted_flow(capsys, flow_file, tmp_path):
    assert "no file" in refused(capsys, "sample", tmp_path / "none.safetensors", "-o", tmp_path / "x")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(flow_file.read_bytes()[:-100])
    assert "damaged" in refused(capsys, "sample", broken, "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_flow_of_another_system(capsys, flow_file, tmp_path):
    line = refused(capsys, "sample", flow_file, "--system", "alanine-tetrapeptide", "-o", tmp_path / "x")
    assert "22" in line and "42" in line


def test_trajectory_of_another_molecule(capsys, tmp_path):
    other = load_system("alanine-tetrapeptide")
    frame = mdtraj.Trajectory(other.positions[None].astype(np.float32), mdtraj.Topology.from_openmm(other.topology))
    path = tmp_path / "other.h5"
    frame.save_hdf5(str(path))
    line = refused(capsys, "train", "alanine-dipeptide", "--data", path, "-o", tmp_path / "x")
    assert "42" in line and "22" in line and not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def shipped(molecule):
    return molecule.folder / "flow.safetensors"


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_teacher(path, VectorField(torch.tensor([True, False, False]), "mlp", 16, 2))
    return path


@pytest.fixture(scope="module")
def states_file(molecule, tmp_path_factory):
    """Two halves of a trajectory at one temperature, and a map that is learned between them."""
    folder = tmp_path_factory.mktemp("states")
    topology = mdtraj.Topology.from_openmm(molecule.topology)
    frames = molecule.reference("validation")[:400]
    state = '[{0}]\nsystem = "alanine-dipeptide"\ntrajectory = "{0}.dcd"\n'
    for name, part in (("a", frames[::2]), ("b", frames[1::2])):
        mdtraj.Trajectory(part, topology).save_dcd(str(folder / f"{name}.dcd"))
    path, short = folder / "states.toml", "[train]\nsteps = 20\nbatch_size = 64\n"
    path.write_text('map = "learned"\nfolds = 2\nn_resamples = 20\n' + state.format("a") + state.format("b") + short)
    return path


#: Every command with a device: small arguments (files by the names of their fixtures), and what it writes.
SHORT = ["--steps", 5, "--replicas", 2, "--max-temperature", 350, "--iterations", 3, "--burn-in", 1, "--scramble", 5]
DEVICE_COMMANDS = {
    "mcmc": (["mcmc", "shipped", "--iterations", 3, "--md-steps", 5], "chain.dcd"),
    "pairs": (["pairs", "teacher_file", "-n", 50, "--n-steps", 2], None),
    "simulate": (["simulate", "alanine-dipeptide", *SHORT], "trajectory.h5"),
    "simulate, batched": (
        ["simulate", "alanine-dipeptide", "--engine", "batched", "--copies", 2, *SHORT], "trajectory.h5"
    ),
    "tfep": (["tfep", "states_file"], "tfep.json"),
    "sample": (["sample", "flow_file", "-n", 50], "samples.npz"),
    "check": (["check", "alanine-dipeptide", "flow_file", "-n", 60], ""),
}  # fmt: skip


def test_a_report_does_not_replace_what_the_command_reads(flow_file, tmp_path, capsys):
    before = flow_file.read_bytes()
    for target, words in ((flow_file, "what the command reads"), (tmp_path, "is a folder")):
        code, _, err = run(capsys, "check", "alanine-dipeptide", flow_file, "-n", 60, "-o", target)
        assert code == 2 and words in " ".join(err.split())
    assert flow_file.read_bytes() == before


def outcome(request, capsys, name, folder, *device):
    """Exit code and result of a command of the table: what it printed, arrays, or the JSON that it wrote."""
    arguments, written = DEVICE_COMMANDS[name]
    files = ("flow_file", "teacher_file", "states_file", "shipped")
    arguments = [request.getfixturevalue(a) if a in files else a for a in arguments]
    target = folder / "report.json" if written == "" else folder
    code, _, err = run(capsys, *arguments, "-o", target, *device)
    if written == "":
        return code, json.loads(target.read_text()) if target.is_file() else err
    if written is None:
        shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
        return code, np.concatenate([shard["y"] for shard in shards]) if shards else err
    path = folder / written
    if not path.is_file():
        return code, err
    if path.suffix == ".json":
        return code, json.loads(path.read_text())["result"]["delta_f"]
    if path.suffix == ".npz":
        return code, np.load(path)["log_q"]
    topology = {"top": path.with_suffix(".pdb")} if path.suffix == ".dcd" else {}
    return code, mdtraj.load(path, **topology).xyz


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("name", list(DEVICE_COMMANDS))
def test_the_device_flag_of_every_command(name, request, capsys, tmp_path):
    """The CPU is the default, "auto" takes it where there is no GPU, and a GPU that is not there is one line."""
    found = []
    for flag in ((), ("--device", "cpu"), ("--device", "auto")):
        folder = tmp_path / (flag[-1] if flag else "default")
        folder.mkdir()
        found.append(outcome(request, capsys, name, folder, *flag))
    assert all(code in (0, 1) for code, _ in found), found  # `check` finds fault with a poor flow: 1
    for _, result in found[1:]:
        np.testing.assert_equal(result, found[0][1])
    (tmp_path / "none").mkdir()
    code, err = outcome(request, capsys, name, tmp_path / "none", "--device", "cuda")
    assert code == 2 and err.startswith("error: no CUDA device") and err.count("\n") == 1
    assert not list((tmp_path / "none").iterdir())


@pytest.mark.parametrize("limit", [{"n_iterations": 0}, {"n_iterations": -3}, {"seconds": 0.0}, {"seconds": math.nan}])
def test_chains_without_an_end_are_refused(limit):
    """Zero iterations were never reached."""
    with pytest.raises(InputError, match=next(iter(limit))):
        run_chain(load_system("alanine-dipeptide"), n_md_steps=1, progress=stop_soon, **limit)


def stop_soon(done, total, figures):
    raise RuntimeError("the chain has begun")


def test_statistics_of_a_chain_leave_out_its_set_up():
    molecule = load_system("alanine-dipeptide")
    proposal = FlowProposal(
        flows.Flow.load(molecule.folder / "flow.safetensors"), TorchPotential(molecule.system), molecule.temperature
    )
    trace = run_chain(molecule, FlowMove(proposal, seed=2), n_iterations=5, n_md_steps=2, seed=2)
    assert trace.statistics["n_proposed"] == trace.statistics["n_proposals"] == len(trace.accepted) == 5
    assert trace.statistics["n_accepted"] == trace.accepted.sum() > 0


def test_a_chain_follows_from_its_seed():
    """Dynamics, velocities and decisions alike; `test_the_device_flag_of_every_command` has the flow moves, too."""
    molecule = load_system("alanine-dipeptide")
    a, b, c = (run_chain(molecule, n_iterations=3, n_md_steps=20, seed=s).positions for s in (5, 5, 6))
    assert np.array_equal(a, b) and not np.allclose(a[0], c[0], atol=1e-4)


def test_what_a_command_reads_is_not_replaced_by_it(capsys, flow_file, tmp_path):
    """`sample runs/flow/flow.safetensors --output runs/flow --overwrite` deleted the flow and its training."""
    folder = tmp_path / "flow"
    folder.mkdir()
    shutil.copy(flow_file, folder / "flow.safetensors")
    (folder / "run.json").write_text(json.dumps({"command": "train", "settings": {}, "finished": True}))
    line = refused(capsys, "sample", folder / "flow.safetensors", "-n", 20, "-o", folder, "--overwrite")
    assert "holds what `train` made" in line and (folder / "flow.safetensors").is_file()
    (folder / "run.json").write_text(json.dumps({"command": "sample", "settings": {}, "finished": True}))
    line = refused(capsys, "sample", folder / "flow.safetensors", "-n", 20, "-o", folder, "--overwrite")
    assert "lies in the folder for the results" in line and (folder / "flow.safetensors").is_file()
    simulated = tmp_path / "simulated"
    simulated.mkdir()
    (simulated / "run.json").write_text(json.dumps({"n_iterations": 5}))
    (simulated / "tempering.nc").write_text("hours")
    assert "not replaced" in refused(capsys, "sample", flow_file, "-n", 20, "-o", simulated, "--overwrite")
    assert (simulated / "tempering.nc").is_file()


def test_a_run_is_known_by_its_files_however_they_are_spelled(capsys, flow_file, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert run(capsys, "sample", flow_file, "-n", 20, "-o", output)[0] == 0
    record = json.loads((output / "run.json").read_text())
    assert record["settings"]["flow"] == str(Path(flow_file).resolve())
    (output / "run.json").write_text(json.dumps(record | {"finished": False}))
    monkeypatch.chdir(Path(flow_file).parent)
    relative = Path(flow_file).name
    line = refused(capsys, "sample", relative, "-n", 30, "-o", output)
    assert "other settings (n)" in line and "--overwrite" not in line and (output / "samples.dcd").is_file()
    assert run(capsys, "sample", relative, "-n", 20, "-o", output)[0] == 0


def test_output_of_another_encoding_is_no_end(flow_file, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "openmm_regflow", "sample", flow_file, "-n", "200", "-o", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0 and b"ESS" in done.stdout and b"?" in done.stdout


def test_workers_do_not_share_a_gpu(capsys, teacher_file, tmp_path, monkeypatch):
    monkeypatch.setattr("openmm_regflow.device.resolve_device", lambda name: torch.device("cuda"))
    line = refused(capsys, "pairs", teacher_file, "-n", 50, "--workers", 2, "--device", "auto", "-o", tmp_path / "x")
    assert "2 workers" in line and "--device cpu" in line and not (tmp_path / "x").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(DEVICE_COMMANDS))
def test_every_command_on_a_gpu(name, request, capsys, tmp_path):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    code, result = outcome(request, capsys, name, tmp_path, "--device", "cuda")
    assert code in ((0, 1) if name == "check" else (0,)) and not isinstance(result, str), result
    if name != "simulate":  # whose GPU is OpenMM's
        assert torch.cuda.max_memory_allocated() > before  # its tensors were there


@pytest.mark.gpu
def test_openmm_follows_the_device_by_the_platforms_name():
    import openmm

    from openmm_regflow.cli import shell

    name = f"cuda:{torch.cuda.device_count() - 1}"
    assert shell.use_platform(name) == "CUDA" and torch.cuda.current_device() == torch.cuda.device_count() - 1
    platform = openmm.Platform.getPlatformByName("CUDA")
    context = openmm.Context(load_system("alanine-dipeptide").system, openmm.VerletIntegrator(0.001), platform)
    assert platform.getPropertyValue(context, "Precision") == "mixed"
    assert platform.getPropertyValue(context, "DeviceIndex") == name.partition(":")[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("command", ["train", "demo"])
def test_cuda_where_there_is_none(capsys, command, tmp_path):
    assert "--device cpu" in refused(capsys, command, "--device", "cuda", "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_output_folders(capsys, flow_file, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    assert "--output" in refused(capsys, "sample", flow_file, "-n", 10, "-o", tmp_path / "full")
    assert "--output" in refused(capsys, "sample", flow_file, "-n", 10, "--overwrite", "-o", tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"
    assert "--output" in refused(capsys, "sample", flow_file, "-n", 10, "-o", tmp_path / "full" / "thesis.txt" / "x")
    again = ["sample", flow_file, "-n", 10, "-o", tmp_path / "run"]
    assert run(capsys, *again)[0] == 0
    assert "--overwrite" in refused(capsys, *again)
    assert run(capsys, *again, "--overwrite")[0] == 0


def test_a_torn_record_of_a_run_is_named(capsys, flow_file, tmp_path):
    (tmp_path / "run.json").write_text("")
    assert "run.json is damaged" in refused(capsys, "sample", flow_file, "-n", 10, "-o", tmp_path)


def test_bad_configuration(capsys, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[flow]\nn_layers = 0\n")
    assert "flow.n_layers" in refused(capsys, "train", "--config", path, "-o", tmp_path / "x")


def test_values_out_of_range(capsys, flow_file, teacher_file, tmp_path):
    output = ("-o", tmp_path / "x")
    assert "rounds: " in refused(capsys, "refine", flow_file, "--rounds", 0, *output)
    assert "tail: " in refused(capsys, "refine", flow_file, "--tail", 1.5, *output)
    assert "n_steps is 0" in refused(capsys, "pairs", teacher_file, "--n-steps", 0, *output)
    for command in (["pairs", teacher_file, "--seed"], ["train", "--seed"], ["benchmark", "--threads"]):
        code, _, err = run(capsys, *command, -1, *output)
        assert code == 2 and f"'{command[-1]}'" in err and "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_unknown_option_is_a_usage_error(capsys):
    code, _, err = run(capsys, "train", "--stepz", "3")
    assert code == 2 and "--stepz" in err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["mcmc", "flow_file", "--iterations", 10**6], "begins anew"),
        (["pairs", "teacher_file", "-n", 10**8], "goes on from what it wrote last"),
    ],
)
def test_an_interrupted_command_says_what_a_second_run_does(command, words, request, capsys, tmp_path):
    arguments = [request.getfixturevalue(a) if str(a).endswith("_file") else a for a in command]
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)  # raises KeyboardInterrupt, as Ctrl-C does
    try:
        signal.setitimer(signal.ITIMER_REAL, 5.0)
        code, _, err = run(capsys, *arguments, "-o", tmp_path / "x")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert code == 130 and f"interrupted; the same command {words}" in err


@pytest.mark.parametrize("word", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_training_and_a_second_run_that_continues(word, capsys, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(print_config(small_config(steps=400)))
    command = ["train", "alanine-dipeptide", "--config", str(config), "-o", str(tmp_path / "run")]
    program = [sys.executable, "-c", "from openmm_regflow.cli import main; main()", *command]
    process = subprocess.Popen(
        program,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job inherits it ignored
    )
    checkpoint = tmp_path / "run" / "work" / "teacher-checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(word)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"goes on from what it wrote last" in err and b"Traceback" not in err
    assert not (tmp_path / "run" / "flow.safetensors").exists()
    assert not list(Path(tmp_path / "run").rglob("*.part"))
    before = checkpoint.stat().st_size
    code, _, err = run(capsys, *command)
    assert code == 0, err
    assert before and (tmp_path / "run" / "flow.safetensors").exists()
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history["teacher"]["step"][-1] == 400


def test_an_interrupted_run_does_not_go_on_for_another_temperature(capsys, molecule, flow_file, tmp_path):
    """The folder of the system is edited between two runs of one command."""
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("structure.pdb", "system.toml"):
        shutil.copy(molecule.folder / name, mine / name)
    (mine / "reference").symlink_to(molecule.folder / "reference")
    config = tmp_path / "run.toml"
    config.write_text(print_config(small_config().model_copy(update={"objective": "mle"})))
    nameless = flows.Flow.load(flow_file)
    nameless.metadata = FlowMetadata()  # one that says what it is for is refused by that
    nameless.save(tmp_path / "nameless.safetensors")
    commands = (
        ["train", mine, "--config", config],
        ["refine", tmp_path / "nameless.safetensors", "--system", mine, "--rounds", 1, "--pool", 500, "--anchors", 0],
    )
    text = (mine / "system.toml").read_text()
    for name, *options in commands:
        (mine / "system.toml").write_text(text)
        output = tmp_path / name
        assert run(capsys, name, *options, "-o", output)[0] == 0
        marker = output / "run.json"
        marker.write_text(marker.read_text().replace('"finished": true', '"finished": false'))
        (mine / "system.toml").write_text(text.replace("temperature = 300", "temperature = 600"))
        assert "of other settings (" in refused(capsys, name, *options, "-o", output)


def test_a_folder_that_another_process_writes_is_refused(capsys, flow_file, tmp_path):
    """The command itself holds it from beginning to end, and lets go of it."""
    import fcntl

    output, command = tmp_path / "samples", ["sample", flow_file, "-n", 100]
    assert run(capsys, *command, "-o", output)[0] == 0
    handle = os.open(output, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the command has let go of it
    before = (output / "run.json").read_bytes()
    assert "another process is at work" in refused(capsys, *command, "-o", output, "--overwrite")
    assert (output / "run.json").read_bytes() == before
    os.close(handle)
    held, working = [], outputs.drawn

    def beneath(*arguments, **options):
        handle = os.open(output, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
        held.append(True)
        return working(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "drawn", beneath)
        assert run(capsys, *command, "-o", output, "--overwrite")[0] == 0
    assert held


def test_a_refused_run_leaves_a_folder_that_the_mended_one_may_have(capsys, tmp_path):
    """The message says what to change; the same command with that change must not be refused for it."""
    many, few = small_config(), small_config()
    config, output = tmp_path / "run.toml", tmp_path / "train"
    section = {"train": many.likelihood.train.model_copy(update={"batch_size": 10**6})}
    many = many.model_copy(update={"objective": "mle", "likelihood": many.likelihood.model_copy(update=section)})
    config.write_text(print_config(many))
    assert "smaller batch" in refused(capsys, "train", "--config", config, "-o", output)
    assert (output / "run.json").is_file()
    config.write_text(print_config(few.model_copy(update={"objective": "mle"})))
    code, _, err = run(capsys, "train", "--config", config, "-o", output)
    assert code == 0, err


def test_a_flow_of_another_molecule_names_the_option(capsys, tmp_path):
    flow = load_system("alanine-tripeptide").folder / "flow.safetensors"
    err = refused(capsys, "sample", flow, "-n", 10, "--system", "alanine-dipeptide", "-o", tmp_path / "out")
    assert "is a flow of alanine-tripeptide, and --system is alanine-dipeptide" in err


def test_a_flow_names_its_system(capsys, tmp_path):
    flow = load_system("alanine-tripeptide").folder / "flow.safetensors"
    code, out, err = run(capsys, "sample", flow, "-n", 10, "-o", tmp_path / "out")
    assert code == 0, err
    assert "% of 10 samples" in out and "±" not in out and "only 10 samples" in out
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["system"] == "alanine-tripeptide"
    loaded = flows.Flow.load(flow)
    for name, word in ((None, "names no system"), ("my-peptide", "no shipped system")):
        loaded.metadata = dataclasses.replace(loaded.metadata, system=name)
        loaded.save(tmp_path / "flow.safetensors")
        err = refused(capsys, "sample", tmp_path / "flow.safetensors", "-n", 10, "-o", tmp_path / "x")
        assert word in err and "--system" in err


def test_import_is_silent_and_help_is_light():
    code = "import sys, openmm_regflow; print([m for m in ('torch', 'openmm', 'openmmtools') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]" and done.stderr == ""
    code = (
        "import atexit, sys; from openmm_regflow.cli import main; "
        "heavy = {'torch', 'openmm', 'openmmtools', 'matplotlib'}; "
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr)); main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "train" in done.stdout and done.stderr.strip() == "[]"
