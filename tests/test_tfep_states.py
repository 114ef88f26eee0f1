"""Two states from files, with real OpenMM trajectories of alanine dipeptide."""

import json
import math
import warnings

import mdtraj
import numpy as np
import openmm
import pytest
import torch
from openmmtools import testsystems
from pydantic import ValidationError

from openmm_regflow import tfep
from openmm_regflow.cli import main
from openmm_regflow.errors import CorruptFileError, InputError, InsufficientDataError
from openmm_regflow.flows import Flow
from openmm_regflow.potentials import TorchPotential
from openmm_regflow.simulate import load_runs
from openmm_regflow.systems import load_system
from openmm_regflow.tfep import states as file_states
from openmm_regflow.units import thermal_energy

MOLECULE = load_system("alanine-dipeptide")


def dynamics(temperature, n_frames, seed):
    integrator = openmm.LangevinMiddleIntegrator(temperature, 10.0, 0.001)
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(MOLECULE.system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(MOLECULE.positions)
    context.setVelocitiesToTemperature(temperature, seed)
    integrator.step(1000)
    frames = []
    for _ in range(n_frames):
        integrator.step(50)
        frames.append(context.getState(getPositions=True).getPositions(asNumpy=True)._value)
    return np.array(frames)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Trajectories at 300 K (HDF5) and at 330 K (DCD)."""
    path = tmp_path_factory.mktemp("states")
    topology = mdtraj.Topology.from_openmm(MOLECULE.topology)
    for temperature, name in ((300.0, "cold.h5"), (330.0, "hot.dcd")):
        mdtraj.Trajectory(dynamics(temperature, 400, int(temperature)), topology).save(str(path / name))
    return path


def states(folder, **changes):
    a = {"system": "alanine-dipeptide", "trajectory": "cold.h5", "temperature": 300.0, **changes.pop("a", {})}
    b = {"system": "alanine-dipeptide", "trajectory": "hot.dcd", "temperature": 330.0, **changes.pop("b", {})}
    return tfep.StatesConfig.model_validate({"a": a, "b": b, "map": "identity", "n_resamples": 50, **changes})


def test_two_temperatures_from_files_equal_the_call_on_arrays(folder, tmp_path):
    result = tfep.run_states(states(folder), folder, tmp_path)
    u = TorchPotential(MOLECULE.system)
    x, y = (mdtraj.load(str(folder / n), top=mdtraj.Topology.from_openmm(MOLECULE.topology)).xyz
            for n in ("cold.h5", "hot.dcd"))  # fmt: skip
    direct = tfep.free_energy_difference(
        tfep.IdentityMap(), tfep.State(u, 300.0), tfep.State(u, 330.0), x, y, trained_on=None, n_resamples=50,
        generator=0, compare_plain=False,
    )  # fmt: skip
    assert result.delta_f == pytest.approx(direct.delta_f, abs=1e-9)
    # Between temperatures d(delta_f)/d(beta) = <U>: bounded by the mean energies at either end.
    kt = [8.31446261815324e-3 * t for t in (300.0, 330.0)]
    step = 1 / kt[1] - 1 / kt[0]
    ends = [float(u(v).mean()) * step for v in (x, y)]
    errors = 5 * max(float(u(v).std()) for v in (x, y)) * abs(step) / math.sqrt(min(result.n_independent))
    assert min(ends) - errors < result.delta_f < max(ends) + errors
    written = json.loads((tmp_path / "tfep.json").read_text())
    assert written["result"]["delta_f"] == result.delta_f
    assert {p.name for p in tmp_path.iterdir()} == {"tfep.json", "works.npz", "works.png", "convergence.png"}


def test_basin_filters_frames_and_an_empty_one_is_named(folder, tmp_path):
    phi = MOLECULE.torsions("phi")[0].tolist()
    negative = {"basin": {"torsion": phi, "range": [-180.0, 0.0]}}
    result = tfep.run_states(states(folder, a=negative, b=negative), folder, tmp_path)
    assert result.n_forward <= 400
    nowhere = {"basin": {"torsion": phi, "range": [5.0, 6.0]}}
    with pytest.raises(InsufficientDataError, match="basin"):
        tfep.run_states(states(folder, a=nowhere), folder, tmp_path)


def test_a_basin_that_drops_most_frames_of_its_trajectory_is_named(folder):
    phi = MOLECULE.torsions("phi")[0].tolist()
    assert phi == [4, 6, 8, 10]  # what docs/tfep.md writes
    angles = np.degrees(mdtraj.compute_dihedrals(mdtraj.load(str(folder / "cold.h5")), [phi])[:, 0])

    def opened(share):
        low, high = np.quantile(angles, [0.0, share])
        config = states(folder, a={"basin": {"torsion": phi, "range": [low - 1e-3, high + 1e-3]}})
        return len(file_states.open_state(config.a, folder, folder)[1])

    with pytest.warns(UserWarning, match=r"frames of cold.h5 .* check the torsion") as said:
        kept = opened(0.25)
    assert str(said[0].message).startswith(f"{400 - kept} of 400 ") and "\n" not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert opened(0.75) > 200


def test_the_command_compares_with_no_map_where_there_is_one(folder, tmp_path, capsys):
    """A short nearby map between two temperatures; disjoint basins, which plain perturbation cannot connect; a flow."""
    file, phi = folder / "states.toml", MOLECULE.torsions("phi")[0].tolist()
    x = mdtraj.load(str(folder / "cold.h5"))
    middle = float(np.degrees(np.median(mdtraj.compute_dihedrals(x, [phi])[:, 0])))
    side = '[{}]\nsystem = "alanine-dipeptide"\ntrajectory = "cold.h5"\n{}\n'
    ranges = ([-180.0, middle], [middle, 180.0])
    halves = [f"basin = {{ torsion = {phi}, range = {both} }}" for both in ranges]

    def said(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["tfep", *map(str, arguments), "--output", str(tmp_path / "out"), "--overwrite"])
        captured = capsys.readouterr()
        assert end.value.code == 0, captured.err
        plain = [line for line in captured.out.splitlines() if line.startswith("without a map: ")]
        assert ("folds: 2/2" in captured.err) == bool(plain)
        return plain

    def said_of_states(kind, settings, sides):
        file.write_text(f'map = "{kind}"\n{settings}\n' + "".join(side.format(*s) for s in zip("ab", sides)))
        return said(file)

    quick = "folds = 2\nn_resamples = 2\ntrain.steps = 4"
    (line,) = said_of_states("nearby", quick, ("", "temperature = 310.0"))
    assert "delta_f" in line
    assert said_of_states("learned", quick + "\nmax_pairs = 100", halves) == ["without a map: no overlap"]
    assert said_of_states("identity", "", ("", "")) == []
    assert said(MOLECULE.folder / "flow.safetensors", "-n", 1000) == []


def test_states_that_are_simulated(tmp_path):
    """The same short run twice: made the first time, read the second, with zero difference between equal states."""
    ladder = {"n_copies": 2, "n_replicas": 2, "max_temperature": 400.0, "n_iterations": 14, "steps_per_iteration": 5,
              "scramble_steps": 20, "compile": False}  # fmt: skip
    side = {"system": "alanine-dipeptide", "simulate": ladder, "burn_in": 2}
    config = tfep.StatesConfig.model_validate({"a": side, "b": side, "map": "identity", "n_resamples": 10})
    first = tfep.run_states(config, tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "run-a" / "run.json").is_file()
    assert (first.n_forward, first.delta_f) == (24, 0.0)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("run-*/chunk-*")}
    assert tfep.run_states(config, tmp_path, tmp_path / "out").delta_f == 0.0
    assert before == {p: p.stat().st_mtime_ns for p in before} and before
    # With common random numbers two runs stay together, and errors would be too small by up to the root of two.
    noise = [np.concatenate([run.positions for run in load_runs(tmp_path / "out" / f"run-{name}")]) for name in "ab"]
    assert np.abs(noise[0] - noise[1]).max() > 0.01
    ladder = [{"system": "alanine-dipeptide", "simulate": {"seed": seed}} for seed in (3, 3)]
    with pytest.raises(ValidationError, match="both have seed 3"):
        tfep.StatesConfig.model_validate(dict(zip("ab", ladder)))
    wrong = config.model_copy(update={"a": config.a.model_copy(update={"simulate": {"speed": 3}})})
    with pytest.raises(InputError, match="speed"):
        tfep.run_states(wrong, tmp_path, tmp_path / "other")


def test_exactly_one_source_of_samples():
    for sources in ({}, {"trajectory": "a.h5", "storage": "b.nc"}):
        with pytest.raises(ValueError, match="give one of"):
            tfep.StatesConfig.model_validate({"a": {"system": "x", **sources}, "b": {"system": "x"}})


def test_burn_in_leaves_out_frames_of_a_trajectory(folder, tmp_path):
    config = states(folder, a={"burn_in": 10, "stride": 4}, b={"burn_in": 150})
    result = tfep.run_states(config, folder, tmp_path)
    assert (result.n_forward, result.n_reverse) == (97, 250)
    x, y = (mdtraj.load(str(folder / n), top=mdtraj.Topology.from_openmm(MOLECULE.topology)).xyz
            for n in ("cold.h5", "hot.dcd"))  # fmt: skip
    u = TorchPotential(MOLECULE.system)
    direct = tfep.works(tfep.IdentityMap(), tfep.State(u, 300.0), tfep.State(u, 330.0), x[12::4], y[150:])
    written = np.load(tmp_path / "works.npz")
    np.testing.assert_allclose(written["forward"], direct.forward, atol=1e-9)
    np.testing.assert_allclose(written["reverse"], direct.reverse, atol=1e-9)


def test_training_and_seed_reach_a_nearby_map(folder):
    read = [file_states.open_state(c, folder, folder) for c in (states(folder).a, states(folder).b)]
    frames = [torch.as_tensor(x, dtype=torch.float64) for _, x, _ in read]

    def forward(seed=0, **train):
        train = {"steps": 4, "batch_size": 100, "warmup": 0, "learning_rate": 3e-4, "validate_every": 1} | train
        config = states(folder, map="nearby", folds=2, n_resamples=2, train=train, seed=seed)
        return file_states._solve(config, MOLECULE, read[0][0], read[1][0], *frames)[1].forward

    first = forward()
    assert not np.array_equal(forward(seed=1), first)
    assert not np.array_equal(forward(learning_rate=1e-4), first)
    kept = states(folder, map="nearby", train={"steps": 3}).train
    assert (kept.steps, kept.patience) == (3, 8)
    assert states(folder, map="nearby").train.steps == 200 and states(folder, map="learned").train.steps == 2000


def test_settings_without_effect_are_refused(folder):
    for changes, words in (
        ({"a": {"state": 2}}, "state"),
        ({"map": "nearby", "coupling": "full"}, "coupling needs"),
        ({"map": "nearby", "architecture": "jet"}, "architecture needs"),
        ({"map": "identity", "target_noise": 0.1}, "target_noise needs"),
    ):
        with pytest.raises(ValueError, match=words):
            states(folder, **changes)


@pytest.mark.slow
def test_learned_map_between_temperatures_agrees_with_plain_perturbation(folder, tmp_path):
    config = states(
        folder, map="learned", folds=2, max_pairs=200, architecture="real_nvp",
        train={"steps": 200, "batch_size": 100, "learning_rate": 1e-3, "ema": 0.98},
    )  # fmt: skip
    result = tfep.run_states(config, folder, tmp_path)
    assert result.plain is not None
    error = math.hypot(result.uncertainty, result.plain.uncertainty)
    assert result.verdict.startswith("do not trust") or abs(result.delta_f - result.plain.delta_f) < 4 * error


@pytest.mark.slow
def test_nearby_map_between_temperatures_agrees_with_plain_perturbation(folder, tmp_path):
    result = tfep.run_states(states(folder, map="nearby", folds=2), folder, tmp_path)
    assert result.plain is not None and math.isfinite(result.plain.uncertainty)
    assert abs(result.delta_f - result.plain.delta_f) < 4 * math.hypot(result.uncertainty, result.plain.uncertainty)


def test_two_force_fields_through_the_shipped_flow():
    """Against MBAR over intermediate states, recorded in docs/tfep.md: -3.2204 +- 0.0102 kT."""
    other = load_system(MOLECULE.folder, force_field=["amber14-all.xml", "implicit/obc2.xml"])
    flow = Flow.load(MOLECULE.folder / "flow.safetensors")
    x, log_q = flow.sample(10_000, torch.Generator().manual_seed(1))
    u = [TorchPotential(m.system)(x) / thermal_energy(300.0) for m in (MOLECULE, other)]
    result = tfep.states_through_flow(log_q, *u, generator=0)
    assert abs(result.delta_f + 3.2204) < 4 * math.hypot(result.uncertainty, 0.0102)
    assert result.uncertainty < 0.02 and result.verdict.startswith("reliable")
    # The planted error: energies of one force field in both places give nothing but zero.
    assert abs(tfep.states_through_flow(log_q, u[0], u[0]).delta_f + 3.2204) > 50 * result.uncertainty


def test_toml_is_validated(tmp_path):
    good = '[a]\nsystem="x"\ntrajectory="a.h5"\n[b]\nsystem="x"\ntrajectory="b.h5"\n'
    file = tmp_path / "states.toml"
    file.write_text(good)
    assert tfep.load_states(file).folds == 5
    for text, words in ((good + "speed = 3\n", "speed"), ("[a", "not TOML"), ("folds = 1\n" + good, "folds"),
                        ('map = "identity"\nrefine = true\n' + good, "refine"),
                        ('map = "identity"\nfolds = 9\n' + good, "folds needs map = 'learned' or 'nearby'"),
                        ('map = "identity"\ncoordinates = "cartesian"\n' + good, "coordinates needs"),
                        (good.replace('trajectory="a.h5"', 'storage="a.nc"\nforce_field=["amber14-all.xml"]'),
                         "force_field is of no effect")):  # fmt: skip
        file.write_text(text)
        with pytest.raises(InputError, match=words):
            tfep.load_states(file)
    inner = "[a.basin]\ntorsion = [4, 6, 8, 10]\nrange = [0, 180]\nturn = 1\n"
    for text, known in ((good + inner, "torsion, range"), (good.replace("[a]", "[a]\nfold = 1"), "trajectory, storage"),
                        ("fold = 1\n" + good, "folds, gap")):  # fmt: skip
        file.write_text(text)
        with pytest.raises(InputError, match=f"known keys: .*{known}"):
            tfep.load_states(file)
    for torsion in ("4, 4, 8, 10", "-1, 4, 8, 10"):
        side = f"basin = {{ torsion = [{torsion}], range = [0, 180] }}\n[b]"
        file.write_text(good.replace("[b]", side))
        with pytest.raises(InputError, match="four different atoms"):
            tfep.load_states(file)
    with pytest.raises(InputError, match="cannot be read"):
        tfep.load_states(tmp_path / "missing.toml")


def test_options_of_a_flow_are_not_taken_for_states(folder, tmp_path, capsys):
    for given in (["-n", "5"], ["--system", "alanine-dipeptide"], ["--data", "x.h5"]):
        with pytest.raises(SystemExit) as end:
            main(["tfep", str(folder / "states.toml"), *given, "--output", str(tmp_path / "out")])
        assert end.value.code == 2
        assert f"{given[0]}" in capsys.readouterr().err


def test_frames_of_another_volume_are_refused(tmp_path):
    """A barostat in the System; boxes that change, or that are not the System's; their own box is taken."""
    fluid = testsystems.LennardJonesFluid(nparticles=20, reduced_density=0.05)
    folder, edge = tmp_path, float(fluid.system.getDefaultPeriodicBoxVectors()[0][0]._value)
    x = fluid.positions._value + 0.01 * np.random.default_rng(0).normal(size=(40, 20, 3))
    topology = mdtraj.Topology.from_openmm(fluid.topology)

    def described(name, edges, barostat=False):
        system = openmm.XmlSerializer.clone(fluid.system)
        if barostat:
            system.addForce(openmm.MonteCarloBarostat(1.0, 120.0))
        (folder / f"{name}.xml").write_text(openmm.XmlSerializer.serialize(system))
        angles = np.full((40, 3), 90.0)
        boxes = {"unitcell_lengths": np.broadcast_to(np.asarray(edges)[:, None], (40, 3)), "unitcell_angles": angles}
        trajectory = mdtraj.Trajectory(x, topology, **boxes)
        trajectory.save_dcd(str(folder / f"{name}.dcd"))
        trajectory[0].save_pdb(str(folder / f"{name}.pdb"))
        side = {"system": f"{name}.pdb", "system_xml": f"{name}.xml", "trajectory": f"{name}.dcd", "temperature": 120.0}
        return file_states.StateConfig.model_validate(side)

    bare = described("bare", np.full(40, edge))
    mdtraj.Trajectory(x, topology).save_dcd(str(folder / "bare.dcd"))
    with pytest.warns(UserWarning, match="holds no boxes"):
        file_states.open_state(bare, folder, folder / "run")
    constant = np.full(40, edge)
    state, frames, _ = file_states.open_state(described("own", constant), folder, folder / "run")
    assert np.isfinite(state.reduced(torch.as_tensor(frames))).all()
    changing = np.linspace(edge, 1.02 * edge, 40)
    for name, edges in (("changing", changing), ("other", 1.02 * constant)):
        with pytest.raises(InputError, match=f"lies in a box of .* the System's is one of {edge:.4g}"):
            file_states.open_state(described(name, edges), folder, folder / "run")
    with pytest.raises(InputError, match="MonteCarloBarostat"):
        file_states.open_state(described("pressed", constant, barostat=True), folder, folder / "run")


def test_unusable_trajectories_are_refused(folder, tmp_path):
    (folder / "rounded.xtc").write_bytes(b"")
    (folder / "torn.dcd").write_bytes((folder / "hot.dcd").read_bytes()[:100])
    small = mdtraj.load(str(folder / "cold.h5")).atom_slice(range(5))
    small.save(str(folder / "small.dcd"))
    for name, error, words in (
        ("missing.dcd", InputError, "no trajectory"),
        ("rounded.xtc", InputError, "rounds"),
        ("torn.dcd", CorruptFileError, "cannot be read"),
        ("small.dcd", InputError, "atoms"),
    ):
        with pytest.raises(error, match=words):
            tfep.run_states(states(folder, a={"trajectory": name}), folder, tmp_path / "out")
    with pytest.raises(InputError, match="atoms"):
        tfep.run_states(states(folder, b={"system": "alanine-tripeptide"}), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
