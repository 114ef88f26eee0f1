"""Parallel tempering on real openmmtools samplers, its export, and its analysis against exact answers."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mdtraj
import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_regflow import metrics, simulate
from openmm_regflow.constraints import fixed_bonds
from openmm_regflow.errors import CorruptFileError, InputError, InsufficientDataError
from openmm_regflow.fingerprints import compare_fingerprints
from openmm_regflow.ladders import temperature_ladder
from openmm_regflow.simulate import (
    BatchedSettings,
    TemperingRun,
    TemperingSettings,
    analyse,
    analysis,
    batched_tempering,
    export,
    export_hdf5,
    export_reference,
    flattening_bias,
    load_run,
    mbar_weights,
    parallel_tempering,
    round_trips,
    target_frames,
    tempering,
    torsion_bias,
    with_hydrogen_mass,
    with_torsion_bias,
)
from openmm_regflow.systems import MolecularSystem, load_system, load_trajectory
from openmm_regflow.toys import harmonic_well
from openmm_regflow.units import GAS_CONSTANT

SHORT = {
    "n_replicas": 3,
    "n_iterations": 6,
    "steps_per_iteration": 20,
    "scramble_steps": 50,
    "seed": 5,
}


@pytest.fixture(scope="module")
def dipeptide():
    return load_system("alanine-dipeptide")


@pytest.fixture(scope="module")
def short_run(dipeptide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    parallel_tempering(dipeptide, folder, TemperingSettings.create(**SHORT))
    return folder


# --- settings ---


@pytest.mark.parametrize(
    "values, message",
    [
        ({"n_replica": 3}, "n_replica.*known keys"),
        ({"timestep": 0.0}, "timestep"),
        ({"max_temperature": float("nan")}, "max_temperature"),
        ({"hydrogen_mass": float("inf")}, "hydrogen_mass"),
        ({"n_replicas": 1}, "n_replicas"),
        ({"seed": -1}, "seed"),
        ({"platform": "Refrence"}, "Refrence.*Reference"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(InputError, match=message) as caught:
        TemperingSettings.create(**values)
    assert "\n" not in str(caught.value)


def test_atoms_that_constraints_hold_keep_their_mass():
    """It shapes the ensemble of constrained dynamics."""
    rigid = load_system("alanine-dipeptide", constraints="HBonds").system
    assert fixed_bonds(rigid) and with_hydrogen_mass(rigid, 4.0).getParticleMass(1) == rigid.getParticleMass(1)


def test_only_hydrogens_get_heavier(dipeptide):
    heavy = with_hydrogen_mass(dipeptide.system, 4.0)
    for atom in dipeptide.topology.atoms():
        before, after = (s.getParticleMass(atom.index)._value for s in (dipeptide.system, heavy))
        assert after == (4.0 if atom.element.symbol == "H" else before)


# --- running ---


def test_run_holds_every_iteration(short_run, dipeptide):
    run = load_run(short_run)
    assert run.positions.shape == (6, 3, 22, 3)
    assert np.array_equal(np.sort(run.states, axis=1), np.tile(np.arange(3), (6, 1)))
    context = openmm.Context(dipeptide.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    for x, energy in zip(run.positions.reshape(-1, 22, 3), run.energies.ravel()):
        context.setPositions(x.astype(float))
        state = context.getState(energy=True, forces=True)
        # Stored positions are float32: the energy moves by the force times their rounding.
        rounding = np.abs(x) * np.finfo(np.float32).eps
        slack = float((np.abs(state.getForces(asNumpy=True)._value) * rounding).sum())
        assert abs(state.getPotentialEnergy()._value - energy) < slack


def test_record(short_run, dipeptide):
    record = simulate.read_record(short_run / simulate.RECORD)
    assert record["system"] == "alanine-dipeptide"
    assert record["settings"] == TemperingSettings.create(**SHORT).model_dump()
    assert record["fingerprint"]["sha256"] == dipeptide.fingerprint["sha256"]


def test_one_seed_one_trajectory(short_run, dipeptide, tmp_path):
    parallel_tempering(dipeptide, tmp_path / "same", TemperingSettings.create(**SHORT))
    parallel_tempering(dipeptide, tmp_path / "other", TemperingSettings.create(**{**SHORT, "seed": 6}))
    first, same, other = load_run(short_run), load_run(tmp_path / "same"), load_run(tmp_path / "other")
    assert np.array_equal(first.positions, same.positions)
    assert np.array_equal(first.states, same.states)
    assert not np.array_equal(first.positions[0], other.positions[0])


class Stop:
    """A progress callback that interrupts, as Ctrl-C does, once ``after`` iterations are done."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.calls: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.calls.append((done, total))
        if done >= self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("interval", [1, 6])
def test_interrupted_run_resumes_and_keeps_its_prefix(dipeptide, tmp_path, interval):
    settings = TemperingSettings.create(**{**SHORT, "n_iterations": 24, "checkpoint_interval": interval})
    with pytest.raises(KeyboardInterrupt):
        parallel_tempering(dipeptide, tmp_path, settings, progress=Stop(after=20))
    prefix = load_run(tmp_path)
    assert len(prefix.states) == 20
    progress = Stop(after=1000)
    parallel_tempering(dipeptide, tmp_path, settings, resume=True, progress=progress)
    run = load_run(tmp_path)
    assert len(run.states) == 24
    kept = 20 // interval * interval  # up to the last checkpoint before the interruption
    assert progress.calls[0] == (kept, 24) and progress.calls[-1] == (24, 24)
    np.testing.assert_array_equal(run.positions[:kept], prefix.positions[:kept])


def test_a_killed_process_loses_nothing_that_it_has_written(dipeptide, tmp_path):
    """Not even a checkpoint at the end, as after Ctrl-C."""
    code = (
        "import os, sys; from openmm_regflow.simulate import *; from openmm_regflow.systems import load_system\n"
        "settings = TemperingSettings.create(**eval(sys.argv[2]))\n"
        "def stop(done, total): done >= 20 and os._exit(9)\n"
        "parallel_tempering(load_system('alanine-dipeptide'), sys.argv[1], settings, progress=stop)"
    )
    values = {**SHORT, "n_iterations": 24}
    done = subprocess.run([sys.executable, "-c", code, tmp_path, repr(values)], capture_output=True, timeout=300)
    assert done.returncode == 9, done.stderr
    progress = Stop(after=1000)
    parallel_tempering(dipeptide, tmp_path, TemperingSettings.create(**values), resume=True, progress=progress)
    assert progress.calls[0] == (20, 24) and len(load_run(tmp_path).states) == 24


def test_a_run_keeps_the_checkpoints_that_it_began_with(dipeptide, tmp_path):
    """As those of a run of an earlier version."""
    parallel_tempering(dipeptide, tmp_path, TemperingSettings.create(**{**SHORT, "checkpoint_interval": 4}))
    first, progress = load_run(tmp_path), Stop(after=1000)
    longer = TemperingSettings.create(**{**SHORT, "n_iterations": 9})
    parallel_tempering(dipeptide, tmp_path, longer, resume=True, progress=progress)
    assert progress.calls[0] == (4, 9)
    np.testing.assert_array_equal(load_run(tmp_path).positions[:4], first.positions[:4])


@pytest.mark.parametrize("interval", [1, 100])
def test_a_finished_run_is_left_as_it_is(dipeptide, tmp_path, interval):
    """Asked for again or for less; 100: it has no checkpoint but that of its beginning."""
    settings = TemperingSettings.create(**{**SHORT, "checkpoint_interval": interval})
    parallel_tempering(dipeptide, tmp_path, settings)
    first = (tmp_path / simulate.STORAGE).read_bytes()
    for n in (6, 3):
        progress = Stop(after=1000)
        parallel_tempering(
            dipeptide, tmp_path, settings.model_copy(update={"n_iterations": n}), resume=True, progress=progress
        )
        assert (tmp_path / simulate.STORAGE).read_bytes() == first and progress.calls == [(n, n)]


def test_finished_run_extends(dipeptide, tmp_path):
    parallel_tempering(dipeptide, tmp_path, TemperingSettings.create(**SHORT))
    first = load_run(tmp_path)
    longer, progress = TemperingSettings.create(**{**SHORT, "n_iterations": 9}), Stop(after=1000)
    parallel_tempering(dipeptide, tmp_path, longer, resume=True, progress=progress)
    run = load_run(tmp_path)
    assert len(run.states) == 9 and progress.calls[0] == (6, 9)
    np.testing.assert_array_equal(run.positions[:6], first.positions)


def test_a_refusal_of_the_batched_engine_leaves_the_folder_to_the_other(tmp_path):
    rigid = load_system("alanine-dipeptide", constraints="HBonds")
    with pytest.raises(InputError, match="batched dynamics have no constraints"):
        batched_tempering(rigid, tmp_path, BatchedSettings.create(n_copies=2, n_replicas=2))
    parallel_tempering(rigid, tmp_path, TemperingSettings.create(**SHORT), resume=True)
    assert len(load_run(tmp_path).states) == 6


def test_the_other_engines_run_is_not_gone_on_with(dipeptide, tmp_path):
    values = {"n_copies": 2, "n_replicas": 2, "n_iterations": 2, "steps_per_iteration": 2, "scramble_steps": 2}
    batched_tempering(dipeptide, tmp_path, BatchedSettings.create(**values))
    with pytest.raises(InputError, match="batched engine"):
        parallel_tempering(dipeptide, tmp_path, TemperingSettings.create(**SHORT), resume=True)


def test_existing_run_is_not_overwritten(short_run, dipeptide):
    with pytest.raises(InputError, match=r"already holds a run; resume"):
        parallel_tempering(dipeptide, short_run, TemperingSettings.create(**SHORT))


def test_another_run_is_not_continued(short_run, dipeptide):
    with pytest.raises(InputError, match=r"seed was 5, is 6"):
        parallel_tempering(dipeptide, short_run, TemperingSettings.create(**{**SHORT, "seed": 6}), resume=True)
    other = load_system("alanine-tetrapeptide")
    with pytest.raises(InputError, match=r"22 atoms expected, 42 found"):
        parallel_tempering(other, short_run, TemperingSettings.create(**SHORT), resume=True)


def test_unwritable_output(dipeptide, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"not writable"):
        parallel_tempering(dipeptide, tmp_path / "file" / "run", TemperingSettings.create(**SHORT))


def test_damaged_run(short_run, dipeptide, tmp_path):
    with pytest.raises(InputError, match=r"no record"):
        load_run(tmp_path)
    (tmp_path / simulate.RECORD).write_text((short_run / simulate.RECORD).read_text())
    with pytest.raises(InputError, match=r"no run at"):
        load_run(tmp_path)
    content = (short_run / simulate.STORAGE).read_bytes()
    (tmp_path / simulate.STORAGE).write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptFileError, match=r"damaged"):
        load_run(tmp_path)
    with pytest.raises(CorruptFileError, match=r"cannot be resumed"):
        parallel_tempering(dipeptide, tmp_path, TemperingSettings.create(**SHORT), resume=True)
    (tmp_path / simulate.RECORD).write_text("{")
    with pytest.raises(CorruptFileError, match=r"damaged"):
        load_run(tmp_path)


def toy_molecule(n_atoms: int, spring: float) -> MolecularSystem:
    toy = harmonic_well(n_atoms=n_atoms, spring=spring)
    topology = app.Topology()
    residue = topology.addResidue("TOY", topology.addChain())
    for number in range(n_atoms):
        topology.addAtom(f"C{number}", app.Element.getBySymbol("C"), residue)
    return MolecularSystem("toy", topology, toy.system, np.zeros((n_atoms, 3)), toy.temperature)


@pytest.mark.parametrize("rescaled", [True, False], ids=["rescaled", "stale velocities"])
def test_energies_at_every_temperature_are_exact(tmp_path, monkeypatch, rescaled):
    """Harmonic atoms: U has mean 3n/2 kT at each temperature. openmmtools' own sampler, which keeps velocities over
    swaps, has to fail here."""
    from openmmtools.multistate import ParallelTemperingSampler

    if not rescaled:
        monkeypatch.setattr(tempering, "_sampler_class", lambda: ParallelTemperingSampler)
    settings = TemperingSettings.create(
        max_temperature=600.0, n_replicas=3, n_iterations=500, steps_per_iteration=100, scramble_steps=500, seed=1
    )
    parallel_tempering(toy_molecule(4, 1000.0), tmp_path, settings)
    run = load_run(tmp_path).after(20)
    deviations = []
    for index, temperature in enumerate(run.temperatures):
        u = run.at_temperature(run.energies, index) / (GAS_CONSTANT * temperature)
        error = np.sqrt(6.0 / len(u) * max(1.0, metrics.integrated_autocorrelation_time(u)))
        deviations.append(abs(u.mean() - 6.0) / error)
    assert (max(deviations) < 4.0) == rescaled, deviations


# --- export ---


def test_target_frames_follow_the_temperature_and_drop_repeats():
    rng = np.random.default_rng(0)
    positions = rng.normal(size=(6, 2, 3, 3)).astype(np.float32)
    states = np.array([[0, 1], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1]])
    positions[2, 1] = positions[1, 1]  # the frame at the lowest temperature did not move
    run = TemperingRun(positions, states, np.zeros((6, 2)), np.array([300.0, 400.0]), np.zeros(1))
    frames = target_frames(run)
    expected = positions[[0, 1, 3, 4, 5], [0, 1, 0, 0, 0]].astype(np.float64)
    expected -= expected.mean(axis=1, keepdims=True)
    assert np.array_equal(frames, expected.astype(np.float32))
    assert len(target_frames(run, max_frames=3)) == 3
    with pytest.raises(InsufficientDataError, match=r"fewer than two"):
        run.after(5)


def test_export_reads_in_mdtraj(dipeptide, tmp_path):
    frames = np.repeat(dipeptide.positions[None], 4, axis=0)
    path = export_hdf5(frames, dipeptide.topology, tmp_path / "new" / "a.h5")
    trajectory = mdtraj.load(path)
    assert trajectory.topology.n_atoms == 22
    assert np.array_equal(trajectory.xyz, frames.astype(np.float32))
    assert [file.name for file in path.parent.iterdir()] == ["a.h5"]


FULL_DISK = """
import resource, signal, sys
import numpy as np
from openmm_regflow.errors import InputError
from openmm_regflow.simulate import export_hdf5
from openmm_regflow.systems import load_system

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails like one on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
molecule = load_system("alanine-dipeptide")
frames = np.random.default_rng(0).normal(size=(2000, 22, 3))
try:
    export_hdf5(frames, molecule.topology, sys.argv[1])
except InputError as error:
    print(error)
"""


def test_full_disk_leaves_the_old_file(dipeptide, tmp_path):
    frames = np.repeat(dipeptide.positions[None], 4, axis=0)
    path = export_hdf5(frames, dipeptide.topology, tmp_path / "a.h5")
    root = str(Path(simulate.__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert "could not be written" in result.stdout, result.stderr
    assert len(mdtraj.load(path)) == 4
    assert [file.name for file in tmp_path.iterdir()] == ["a.h5"]


def test_export_refuses_bad_frames(dipeptide, tmp_path):
    frames = np.repeat(dipeptide.positions[None], 4, axis=0)
    with pytest.raises(InputError, match=r"\(4, 21, 3\)"):
        export_hdf5(frames[:, :21], dipeptide.topology, tmp_path / "a.h5")
    with pytest.raises(InputError, match=r"\(0, 22, 3\)"):
        export_hdf5(frames[:0], dipeptide.topology, tmp_path / "a.h5")
    frames[0, 0, 0] = np.inf
    with pytest.raises(InputError, match="infinity"):
        export_hdf5(frames, dipeptide.topology, tmp_path / "a.h5")


def test_export_reference(short_run, dipeptide, tmp_path):
    record = export_reference(dipeptide, {"train": [short_run]}, burn_in=2, folder=tmp_path)
    assert record == json.loads((tmp_path / "reference.json").read_text())
    assert record["delta_f_phi"] is None and "never visited" in record["delta_f_phi_missing"]
    train = record["splits"]["train"]
    assert (train["frames"], train["runs"][0]["used_iterations"], train["cis_frames"]) == (4, 4, 0)
    assert train["runs"][0]["settings"]["seed"] == SHORT["seed"]
    frames = load_trajectory(tmp_path / "reference" / "train.h5", dipeptide.topology)
    assert np.array_equal(frames, target_frames(load_run(short_run).after(2)))


def test_export_reference_refuses(short_run, dipeptide, tmp_path):
    with pytest.raises(InputError, match="run of another System"):
        export_reference(load_system("alanine-tetrapeptide"), {"train": [short_run]}, folder=tmp_path)
    for outputs in ({}, {"train": []}):
        with pytest.raises(InputError, match="at least one run"):
            export_reference(dipeptide, outputs, folder=tmp_path)
    with pytest.raises(InputError, match="given twice"):
        export_reference(dipeptide, {"train": [short_run], "test": [short_run]}, folder=tmp_path)
    with pytest.raises(InsufficientDataError, match="fewer than two"):
        export_reference(dipeptide, {"train": [short_run]}, burn_in=5, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_export_reference_refuses_other_temperatures_and_copies(short_run, dipeptide, tmp_path):
    """Frames of 300 K as those of 450 K; and one run as training and test frames, copied or made twice."""
    with pytest.raises(InputError, match="a run at 300 K, and alanine-dipeptide is at 450 K"):
        export_reference(load_system("alanine-dipeptide", temperature=450.0), {"train": [short_run]}, folder=tmp_path)
    shutil.copytree(short_run, tmp_path / "again")
    with pytest.raises(InputError, match="they are one run"):
        export_reference(dipeptide, {"train": [short_run], "test": [tmp_path / "again"]}, folder=tmp_path)
    with pytest.raises(InputError, match="burn_in is -1"):
        simulate.load_runs(short_run, -1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"command": "train"}')
    with pytest.raises(InputError, match="another command"):
        simulate.load_run(tmp_path / "other")


def test_boxes_are_refused_before_anything_is_simulated(dipeptide, tmp_path):
    boxed = replace(dipeptide, system=copy.deepcopy(dipeptide.system))
    for force in boxed.system.getForces():
        if hasattr(force, "getNonbondedMethod"):
            force.setNonbondedMethod(2)  # CutoffPeriodic
    boxed.system.setDefaultPeriodicBoxVectors(*(np.eye(3) * 4.0))
    assert boxed.system.usesPeriodicBoundaryConditions()
    with pytest.raises(InputError, match="periodic box"):
        parallel_tempering(boxed, tmp_path / "run", TemperingSettings.create(**SHORT))


def test_frames_of_the_wrong_chirality_are_dropped_and_counted(short_run, dipeptide, tmp_path):
    run = load_run(short_run)
    mirrored = TemperingRun(run.positions * [-1, 1, 1], run.states, run.energies, run.temperatures, run.acceptance)
    frames, counts = export.checked_frames(dipeptide, [mirrored], None)
    assert (len(frames), counts["wrong_chirality_dropped"]) == (0, 6)


def held(molecule, energy):
    """The molecule with its first atom in a field."""
    system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(molecule.system))
    field = openmm.CustomExternalForce(energy)
    field.addParticle(0, [])
    system.addForce(field)
    return replace(molecule, system=system)


def test_only_free_molecules_are_centred(short_run, dipeptide):
    assert simulate.is_free(dipeptide.system, dipeptide.positions)
    flat = held(dipeptide, "100*step(r-2)*(r-2)^2; r=sqrt(x^2+y^2+z^2)")
    wide = held(dipeptide, "100*step(r-20)*(r-20)^2; r=sqrt(x^2+y^2+z^2)")
    spring = held(dipeptide, "100*(x-1)^2")
    walls = [held(dipeptide, f"1000*max(0, {side}-6)^2") for side in ("x", "-x", "y", "-y", "z", "-z")]
    assert not any(simulate.is_free(m.system, m.positions) for m in (flat, wide, spring, *walls))
    run = load_run(short_run)
    moved = replace(run, positions=run.positions - run.positions.mean(2, keepdims=True) + np.float32(1.0))
    for molecule, centre in ((dipeptide, 0.0), (flat, 1.0), (spring, 1.0)):
        frames, _ = export.checked_frames(molecule, [moved], None)
        np.testing.assert_allclose(frames.mean(1), centre, atol=1e-5)


# --- analysis: a torsion with a known density at every temperature ---

TEMPERATURES = np.array([300.0, 400.0, 500.0])


def torsion_energy(phi):
    """A skewed potential [kJ/mol]."""
    return 4.0 * np.cos(phi) - 3.5 * np.sin(phi) + 2.0 * np.cos(2 * phi)


def exact_delta_f(low: float, high: float) -> float:
    phi = np.linspace(-np.pi, np.pi, 200_001)
    density = np.exp(-torsion_energy(phi) / (GAS_CONSTANT * TEMPERATURES[0]))
    inside = (phi > low) & (phi <= high)
    return float(np.log(density[~inside].sum() / density[inside].sum()))


def torsion_run(n: int, seed: int, repeat: int = 1, energy=torsion_energy) -> TemperingRun:
    """Exact draws of the torsion at each temperature; every draw kept for ``repeat`` iterations."""
    rng = np.random.default_rng(seed)
    grid = np.linspace(-np.pi, np.pi, 20_001)
    phi = np.empty((n, len(TEMPERATURES)))
    for k, temperature in enumerate(TEMPERATURES):
        cumulative = np.cumsum(np.exp(-energy(grid) / (GAS_CONSTANT * temperature)))
        phi[:, k] = np.interp(rng.random(n) * cumulative[-1], cumulative, grid)
    phi = np.repeat(phi, repeat, axis=0)
    positions = np.zeros((*phi.shape, 4, 3))
    positions[..., 0, :] = [1, 0, 0]
    positions[..., 2, :] = [0, 0, 1]
    positions[..., 3, :] = np.stack([np.cos(phi), np.sin(phi), np.ones_like(phi)], axis=-1)
    states = np.tile(np.arange(len(TEMPERATURES)), (len(phi), 1))
    return TemperingRun(positions, states, energy(phi), TEMPERATURES, np.zeros(2))


QUADRUPLE = np.arange(4)


def test_delta_f_is_exact_within_its_error():
    """z-scores over independent repeats have mean 0 and variance 1, for all four estimates."""
    n_repeats = 50
    exact = {"": exact_delta_f(0.0, np.pi), "_core": exact_delta_f(0.0, 2.0)}
    assert abs(exact[""]) > 0.5 and exact["_core"] - exact[""] > 0.1  # neither symmetric nor alike
    z = {f"delta_f{core}{mbar}": [] for core in exact for mbar in ("", "_mbar")}
    errors = {name: [] for name in z}
    for seed in range(n_repeats):
        result = analyse([torsion_run(400, 2 * seed), torsion_run(300, 2 * seed + 1)], QUADRUPLE)
        for name, values in z.items():
            estimate = getattr(result, name)
            values.append((estimate.value - exact["_core" if "core" in name else ""]) / estimate.error)
            errors[name].append(estimate.error)
    for values in z.values():
        assert abs(np.mean(values)) < 4.0 / n_repeats**0.5
        # Variance of z: that of the estimate over that of an error from 24 blocks.
        assert abs(np.var(values) - 1.0) < 4.0 * (2.0 / n_repeats + 2.0 / 24) ** 0.5
    assert np.mean(errors["delta_f_mbar"]) < 0.95 * np.mean(errors["delta_f"])  # MBAR uses all temperatures


def test_error_counts_correlated_frames_once():
    """Every frame kept four times: same value, same error, four times the statistical inefficiency."""
    n, repeat = 24 * 200, 4  # a multiple of the number of blocks, so that both have the same frames in a block
    independent = analyse([torsion_run(n, 1)], QUADRUPLE)
    repeated = analyse([torsion_run(n, 1, repeat)], QUADRUPLE)
    assert repeated.delta_f.value == pytest.approx(independent.delta_f.value, abs=1e-12)
    assert repeated.delta_f.error == pytest.approx(independent.delta_f.error, abs=1e-12)
    # An inefficiency g summed over about 2g lags has the relative error sqrt(2 (2 * 2g + 1) / n) (Sokal 1997, 3.19).
    error = (2.0 * (4.0 * repeat + 1.0) / (n * repeat)) ** 0.5
    assert abs(repeated.inefficiency[0] / repeat - 1.0) < 4.0 * error


def slow_and_fast_run(n: int, rng: np.random.Generator) -> TemperingRun:
    """A replica that stays in a basin for 50 iterations on average, seen at the lowest temperature every other time."""
    inside = np.cumsum(rng.random(n) < 0.02) % 2 == rng.integers(2)
    present = rng.random(n) < 0.5
    states = np.where(present[:, None], [[0, 1]], [[1, 0]])
    phi = np.stack([np.where(inside, 1.0, -1.0), np.full(n, -1.0)], axis=1)
    positions = torsion_run(1, 0).positions[:, :2].repeat(n, axis=0)
    positions[..., 3, 0], positions[..., 3, 1] = np.cos(phi), np.sin(phi)
    return TemperingRun(positions, states, np.zeros((n, 2)), TEMPERATURES[:2], np.zeros(1))


def test_error_sees_the_slow_time_scale():
    """Spread of the estimate over repeats equals its error where swaps hide slow dynamics."""
    n_repeats = 60
    rng = np.random.default_rng(0)
    z = []
    for _ in range(n_repeats):
        delta_f = analyse([slow_and_fast_run(16_000, rng)], QUADRUPLE).delta_f
        z.append((delta_f.value - np.log(3.0)) / delta_f.error)  # a quarter of the frames is inside
    assert abs(np.mean(z)) < 4.0 / n_repeats**0.5
    # Variance of z: that of the estimate over that of an error from 24 blocks.
    assert abs(np.var(z) - 1.0) < 4.0 * (2.0 / n_repeats + 2.0 / 24) ** 0.5


def test_mbar_recovers_the_mean_energy():
    """<U> at the lowest temperature from hot samples alone would be wrong; MBAR's weights have to correct it."""
    run = torsion_run(20_000, 3)
    (w,) = mbar_weights([run])
    assert w.sum() == pytest.approx(1.0)
    grid = np.linspace(-np.pi, np.pi, 200_001)
    density = np.exp(-torsion_energy(grid) / (GAS_CONSTANT * TEMPERATURES[0]))
    exact = np.sum(torsion_energy(grid) * density) / np.sum(density)
    mean = (w * run.energies).sum()
    error = np.sqrt((w**2 * (run.energies - mean) ** 2).sum())
    assert abs(mean - exact) < 4 * error
    assert abs(run.energies.mean() - exact) > 4 * error  # unweighted, it fails


def hot_basin_run(n: int, rng: np.random.Generator) -> TemperingRun:
    """Independent draws of twenty degrees of freedom with a basin 40 kJ/mol up, which heat fills."""
    temperatures = temperature_ladder(300.0, 500.0, 4)
    kt = GAS_CONSTANT * temperatures
    ratio = np.exp(13.0 - 40.0 / kt)
    inside = rng.random((n, 4)) < ratio / (1.0 + ratio)
    energies = kt * rng.gamma(10.0, 1.0, (n, 4)) + 40.0 * inside
    phi = np.where(inside, 1.0, -1.0)
    positions = torsion_run(1, 0).positions[:, :1].repeat(n, axis=0).repeat(4, axis=1)
    positions[..., 3, 0], positions[..., 3, 1] = np.cos(phi), np.sin(phi)
    return TemperingRun(positions, np.tile(np.arange(4), (n, 1)), energies, temperatures, np.zeros(3))


def test_errors_of_mbar_know_that_free_energies_of_the_ladder_are_estimates():
    n_repeats, rng, free, fixed = 200, np.random.default_rng(5), [], []
    for _ in range(n_repeats):
        run = hot_basin_run(400, rng)
        free.append(analyse([run], QUADRUPLE).delta_f_mbar)
        inside = metrics.in_range(analysis._torsion_series(run, QUADRUPLE), metrics.PHI_POSITIVE)
        fixed.append(analysis._basin_estimate([inside], mbar_weights([run])))  # planted: as if they were known
    values = np.array([e.value for e in free])
    exact, scatter = 40.0 / (GAS_CONSTANT * 300.0) - 13.0, values.std(ddof=1)
    assert abs(values.mean() - exact) < 4 * scatter / n_repeats**0.5
    ratios = [np.sqrt(np.mean([e.error**2 for e in which])) / scatter for which in (free, fixed)]
    tolerance = 4 / (2 * n_repeats) ** 0.5  # four standard errors of a scatter
    assert abs(ratios[0] - 1) < tolerance < abs(ratios[1] - 1)


@pytest.mark.parametrize("n_ladders", [12, 32])
def test_ladders_that_never_cross_are_one_sample_each(n_ladders):
    """The error is that of counting ladders; blocks of half a ladder, as they were, make it too small by root two."""
    rng, n_repeats, share = np.random.default_rng(3), 300, 0.4
    values, errors, halves = [], [], []
    for _ in range(n_repeats):
        inside = [np.full((40, 1), rng.random() < share) for _ in range(n_ladders)]
        if not 0 < sum(s[0, 0] for s in inside) < n_ladders:
            continue
        estimate = analysis._basin_estimate(inside, [np.ones((40, 1))] * n_ladders)
        values.append(estimate.value)
        errors.append(estimate.error)
        halves.append(estimate.error / 2**0.5)
    scatter = np.std(values, ddof=1)
    # beyond scatter itself: the delta method at 12 ladders, whose logarithm is skewed
    tolerance = 4 / (2 * n_repeats) ** 0.5
    assert abs(np.sqrt(np.mean(np.square(errors))) / scatter - 1) < tolerance
    assert abs(np.sqrt(np.mean(np.square(halves))) / scatter - 1) > tolerance


def test_bias_is_removed_again():
    """Draws under the bias give the unbiased answer; without telling the analysis, they must not."""
    amplitudes = np.array([[3.0, 0.5], [2.0, -1.0]])
    n_repeats = 30
    z = []
    for seed in range(n_repeats):
        run = torsion_run(800, seed, energy=lambda phi: torsion_energy(phi) + torsion_bias(phi, amplitudes))
        result = analyse([run], QUADRUPLE, bias=amplitudes)
        z += [(e.value - exact_delta_f(0.0, np.pi)) / e.error for e in (result.delta_f, result.delta_f_mbar)]
    assert abs(np.mean(z)) < 4.0 / n_repeats**0.5
    assert abs(np.var(z) - 1.0) < 4.0 * (2.0 / n_repeats + 2.0 / 24) ** 0.5
    forgotten = analyse([run], QUADRUPLE).delta_f
    assert abs(forgotten.value - exact_delta_f(0.0, np.pi)) > 4.0 * forgotten.error


def test_flattening_bias_flattens():
    with pytest.raises(InsufficientDataError, match="no samples"):
        flattening_bias(np.zeros(0), 300.0)
    run = torsion_run(20_000, 1)
    phi = metrics.dihedrals(run.positions.reshape(-1, 4, 3), QUADRUPLE[None])
    bias = flattening_bias(phi, float(run.temperatures[0]), mbar_weights([run])[0].reshape(phi.shape))
    phi = np.linspace(-np.pi, np.pi, 361)
    before, after = torsion_energy(phi), torsion_energy(phi) + torsion_bias(phi, bias)
    assert np.ptp(after) < 0.2 * np.ptp(before)
    assert np.all(bias[:, 0] >= 0)


def test_biased_system_has_the_bias_as_its_only_difference(dipeptide):
    amplitudes = np.array([[3.0, 0.5], [2.0, -1.0], [0.7, 2.0]])
    torsion = dipeptide.torsions("phi")[0]
    biased = with_torsion_bias(dipeptide, torsion, amplitudes)
    energies = []
    for molecule in (dipeptide, biased):
        context = openmm.Context(
            molecule.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference")
        )
        context.setPositions(dipeptide.positions)
        energies.append(context.getState(energy=True).getPotentialEnergy()._value)
    expected = torsion_bias(metrics.dihedrals(dipeptide.positions, torsion[None])[0, 0], amplitudes)
    # The energies are sums of a few hundred terms below 1e3 kJ/mol.
    assert energies[1] - energies[0] == pytest.approx(expected, abs=1e3 * 300 * np.finfo(np.float64).eps)
    assert compare_fingerprints(dipeptide.fingerprint, biased.fingerprint) == ["PeriodicTorsionForce is not expected"]


def test_basin_never_visited_and_mixed_ladders():
    run = torsion_run(50, 4)
    run.positions[..., 3, 1] = -np.abs(run.positions[..., 3, 1])
    with pytest.raises(InsufficientDataError, match="never visited"):
        analyse([run], QUADRUPLE)
    other = TemperingRun(run.positions, run.states, run.energies, TEMPERATURES + 1.0, run.acceptance)
    with pytest.raises(InputError, match="cannot be pooled"):
        analyse([run, other], QUADRUPLE)


def test_round_trips():
    states = np.array([[0, 2, 1], [1, 2, 0], [2, 1, 0], [1, 2, 0], [0, 2, 1], [2, 0, 1], [0, 1, 2]])
    run = TemperingRun(np.zeros((7, 3, 1, 3)), states, np.zeros((7, 3)), TEMPERATURES, np.zeros(2))
    # Replica 0: 0 -> 2 -> 0 twice; replica 1: 2 -> 0, half a trip; replica 2: 0 -> 2, half a trip.
    assert round_trips(run) == 2


def test_running_prints_nothing(dipeptide, tmp_path, capfd):
    parallel_tempering(dipeptide, tmp_path, TemperingSettings.create(**SHORT))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [BatchedSettings, TemperingSettings])
def test_settings_take_quantities_and_no_femtoseconds(kind):
    given = {"max_temperature": 450 * unit.kelvin, "timestep": 2 * unit.femtoseconds, "hydrogen_mass": 3 * unit.dalton}
    found = kind.create(**given, collision_rate=2 / unit.picosecond)
    assert (found.max_temperature, found.timestep, found.hydrogen_mass, found.collision_rate) == (450, 0.002, 3, 2)
    for wrong, words in ((2.0, "did you mean 0.002"), (0, "no step"), (2 * unit.kelvin, "not a time")):
        with pytest.raises(InputError, match=words):
            kind.create(timestep=wrong)
