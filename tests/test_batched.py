"""Batched replica exchange on a molecule whose torsion has an exact distribution, and its files."""

import json
from itertools import pairwise

import numpy as np
import openmm
import pytest
from openmm import app
from scipy.integrate import quad

from openmm_regflow import metrics
from openmm_regflow.errors import CorruptFileError, InputError, InsufficientDataError
from openmm_regflow.simulate import (
    BatchedSettings,
    TemperingSettings,
    analyse,
    batched,
    batched_tempering,
    load_batched,
    load_runs,
    mbar_weights,
    parallel_tempering,
    torsion_bias,
    torsion_bias_system,
)
from openmm_regflow.systems import MolecularSystem, load_system
from openmm_regflow.units import GAS_CONSTANT

QUADRUPLE = np.arange(4)
BIAS = np.array([[4.0, 0.3], [2.0, -1.0]])
TEMPERATURE = 300.0
SHORT = {
    "n_copies": 2, "n_replicas": 3, "n_iterations": 6, "steps_per_iteration": 5, "timestep": 0.001,
    "scramble_steps": 10, "hydrogen_mass": None, "compile": False, "seed": 3,
}  # fmt: skip


def butane_like(constraints: bool = False) -> MolecularSystem:
    """Four atoms with stiff bonds and angles and one torsion: phi is distributed as exp(-V(phi)/kT)."""
    system = openmm.System()
    for _ in range(4):
        system.addParticle(12.0)
    bonds, angles, torsion = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce(), openmm.PeriodicTorsionForce()
    for i in range(3):
        bonds.addBond(i, i + 1, 0.15, 2e5)
    for i in range(2):
        angles.addAngle(i, i + 1, i + 2, 1.9, 400.0)
    torsion.addTorsion(*range(4), 1, 0.7, 2.0)
    torsion.addTorsion(*range(4), 3, 0.0, 3.0)
    for force in (bonds, angles, torsion):
        system.addForce(force)
    if constraints:
        system.addConstraint(0, 1, 0.15)
    topology = app.Topology()
    residue = topology.addResidue("BUT", topology.addChain())
    atoms = [topology.addAtom(f"C{i}", app.element.carbon, residue) for i in range(4)]
    for a, b in pairwise(atoms):
        topology.addBond(a, b)
    positions = np.array([[0.0, 0.14, 0.0], [0.0, 0.0, 0.0], [0.15, 0.0, 0.0], [0.2, 0.1, 0.1]])
    return MolecularSystem("butane-like", topology, system, positions, TEMPERATURE)


def torsion_energy(phi):
    return 2.0 * (1.0 + np.cos(phi - 0.7)) + 3.0 * (1.0 + np.cos(3.0 * phi))


def exact_delta_f() -> float:
    """F(phi > 0) - F(phi < 0) [kT]."""
    kt = GAS_CONSTANT * TEMPERATURE
    inside, outside = (
        quad(lambda phi: np.exp(-torsion_energy(phi) / kt), *bounds)[0] for bounds in ((0.0, np.pi), (-np.pi, 0.0))
    )
    return float(np.log(outside / inside))


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def long_run(request, tmp_path_factory):
    """Ladders of temperature and bias, and the same ladders without the swaps' velocity rescaling."""
    folder = tmp_path_factory.mktemp("batched") / "run"
    settings = BatchedSettings.create(
        **SHORT | {"n_copies": 48, "n_iterations": 160, "steps_per_iteration": 40, "scramble_steps": 500,
                   "max_temperature": 420.0, "timestep": 0.002, "collision_rate": 5.0, "device": request.param}
    )  # fmt: skip
    batched_tempering(butane_like(), folder, settings, bias=torsion_bias_system(4, [(QUADRUPLE, BIAS)]))
    return load_batched(folder)


def test_free_energy_is_exact_within_its_error(long_run):
    runs = [run.after(20) for run in long_run]
    result = analyse(runs, QUADRUPLE)
    assert abs(exact_delta_f()) > 0.5  # not symmetric
    for estimate in (result.delta_f, result.delta_f_mbar):
        assert estimate.error < 0.15
        assert abs(estimate.value - exact_delta_f()) < 4.0 * estimate.error
    assert all(0.2 < a < 1.0 for a in result.acceptance[0])
    assert sum(result.round_trips) > 100


def test_forgetting_the_bias_fails(long_run):
    """The planted error: weights as if the upper states had no bias."""
    runs = [run.after(20) for run in long_run]
    forgotten = analyse([run.__class__(**vars(run) | {"bias": None}) for run in runs], QUADRUPLE).delta_f_mbar
    assert abs(forgotten.value - exact_delta_f()) > 4.0 * forgotten.error


def test_every_state_has_its_own_distribution(long_run):
    """Mean torsion energy of each state against quadrature; swaps that leave velocities as they are fail here."""
    runs = [run.after(20) for run in long_run]
    scale = np.linspace(0.0, 1.0, 3)
    for k, temperature in enumerate(runs[0].temperatures):
        kt = GAS_CONSTANT * temperature

        def density(phi, kt=kt, s=scale[k]):
            return np.exp(-(torsion_energy(phi) + s * torsion_bias(phi, BIAS)) / kt)

        norm = quad(density, -np.pi, np.pi)[0]
        exact = quad(lambda phi: torsion_energy(phi) * density(phi), -np.pi, np.pi)[0] / norm
        phi = [metrics.dihedrals(run.at_temperature(run.positions, k), QUADRUPLE[None])[:, 0] for run in runs]
        means = np.array([torsion_energy(p).mean() for p in phi])  # ladders are independent
        error = means.std(ddof=1) / len(means) ** 0.5
        assert abs(means.mean() - exact) < 4.0 * error
        # Bonds and angles: five stiff modes of kT/2 each, up to their anharmonicity (Jacobian), well below an error.
        stiff = [run.at_temperature(run.energies, k).mean() - m for run, m in zip(runs, means)]
        assert abs(np.mean(stiff) / (2.5 * kt) - 1.0) < 4.0 * np.std(stiff) / len(stiff) ** 0.5 / (2.5 * kt) + 0.01


def test_recorded_energies_are_those_of_the_positions(long_run):
    molecule, run = butane_like(), long_run[0]
    context = openmm.Context(molecule.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    for iteration in (0, 80, -1):
        x = run.positions[iteration, 1].astype(np.float64)
        context.setPositions(x)
        energy = context.getState(energy=True).getPotentialEnergy()._value
        # float32 positions and sums: bond terms of k r dr with r of about 0.15 nm to 1e-7 relative.
        assert run.energies[iteration, 1] == pytest.approx(energy, abs=0.02)
        phi = metrics.dihedrals(x[None], QUADRUPLE[None])[0, 0]
        assert run.bias[iteration, 1] == pytest.approx(torsion_bias(phi, BIAS), abs=1e-3)


def test_weights_of_a_ladder_without_bias_are_those_of_temperatures(long_run):
    plain = [run.__class__(**vars(run) | {"bias": np.zeros_like(run.energies)}) for run in long_run[:3]]
    none = [run.__class__(**vars(run) | {"bias": None}) for run in plain]
    for a, b in zip(mbar_weights(plain), mbar_weights(none)):
        np.testing.assert_allclose(a, b, rtol=1e-10)


def test_a_molecule_in_an_external_field_stays_there(tmp_path):
    """Springs of all atoms to one point hold their centre like a spring of four times the constant."""
    molecule, spring, place = butane_like(), 500.0, np.array([1.0, 0.0, -0.5])
    field = openmm.CustomExternalForce("0.5*k*((x-1)^2+y^2+(z+0.5)^2)")
    field.addGlobalParameter("k", spring)
    for i in range(4):
        field.addParticle(i, [])
    molecule.system.addForce(field)
    settings = BatchedSettings.create(
        **SHORT | {"n_copies": 24, "n_replicas": 2, "n_iterations": 30, "steps_per_iteration": 40,
                   "scramble_steps": 300, "max_temperature": 350.0, "timestep": 0.002, "collision_rate": 5.0}
    )  # fmt: skip
    batched_tempering(molecule, tmp_path, settings)
    away = [run.at_temperature(run.positions).mean(1) - place for run in load_runs(tmp_path, 5)]
    for found, exact in ((away, 0.0), (np.square(away), GAS_CONSTANT * TEMPERATURE / (4 * spring))):
        means = np.mean(found, axis=1)  # of the ladders, which are independent
        assert (np.abs(means.mean(0) - exact) < 4.0 * means.std(0, ddof=1) / len(means) ** 0.5).all()


def test_resumed_run_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr(batched, "CHUNK", 2)
    molecule = butane_like()
    settings = BatchedSettings.create(**SHORT)
    whole = batched_tempering(molecule, tmp_path / "whole", settings)
    batched_tempering(molecule, tmp_path / "parts", settings.model_copy(update={"n_iterations": 4}))
    parts = batched_tempering(molecule, tmp_path / "parts", settings)
    assert len(whole) == len(parts) == 3
    torn = parts[1]
    torn.write_bytes(torn.read_bytes()[:200])
    again = batched_tempering(molecule, tmp_path / "parts", settings)
    assert sorted(p.name for p in (tmp_path / "parts").glob("*.torn")) == ["chunk-0000002.torn", "chunk-0000004.torn"]
    for a, b in zip(whole, again):
        with np.load(a) as left, np.load(b) as right:
            assert all(np.array_equal(left[k], right[k]) for k in left.files)
    runs = load_runs(tmp_path / "parts", burn_in=2)
    assert len(runs) == 2 and runs[0].positions.shape == (4, 3, 4, 3)


def test_an_interruption_costs_no_scrambling_and_a_minute_at_most(tmp_path, monkeypatch):
    molecule, settings = butane_like(), BatchedSettings.create(**SHORT)
    (whole,) = batched_tempering(molecule, tmp_path / "whole", settings)

    def stopping(at):
        def progress(done, total):
            if done == at:
                raise KeyboardInterrupt

        return progress

    monkeypatch.setattr(batched, "CHUNK_SECONDS", 0.0)
    for at in (0, 3):
        with pytest.raises(KeyboardInterrupt):
            batched_tempering(molecule, tmp_path / "parts", settings, progress=stopping(at))
        monkeypatch.setattr(batched, "_scrambled", None)  # once is enough
    with pytest.raises(InputError, match=r"seed was 3, is 4"):
        batched_tempering(molecule, tmp_path / "parts", settings.model_copy(update={"seed": 4}))
    with pytest.raises(InputError, match="of the batched engine"):
        parallel_tempering(molecule, tmp_path / "parts", TemperingSettings())
    (tmp_path / "parts" / "start.npz").write_bytes(b"")  # no longer needed
    parts = batched_tempering(molecule, tmp_path / "parts", settings)
    assert [path.name for path in parts] == [f"chunk-{k:07d}.npz" for k in range(6)]
    with np.load(whole) as left:
        columns = [[np.load(path)[name] for path in parts] for name in ("positions", "states", "energies")]
        for name, rows in zip(("positions", "states", "energies"), columns):
            assert np.array_equal(left[name], np.concatenate(rows))


def test_damaged_starting_points_are_made_again(tmp_path):
    molecule, settings = butane_like(), BatchedSettings.create(**SHORT)
    for name, damaged in (("a", b""), ("b", b"x" * 300)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "start.npz").write_bytes(damaged)
        (tmp_path / name / "run.json").write_text(json.dumps(batched._record(molecule, None, settings)))
        (chunk,) = batched_tempering(molecule, tmp_path / name, settings)
        (whole,) = batched_tempering(molecule, tmp_path / f"{name}-whole", settings)
        with np.load(chunk) as left, np.load(whole) as right:
            assert np.array_equal(left["positions"], right["positions"])


def test_a_chunk_that_cannot_be_gone_on_from_stays_as_it_is(tmp_path):
    molecule, settings = butane_like(), BatchedSettings.create(**SHORT)
    (chunk,) = batched_tempering(molecule, tmp_path, settings)
    with np.load(chunk) as file:
        np.savez(chunk, **{name: file[name] for name in file.files if name != "v"})
    before = chunk.read_bytes()
    with pytest.raises(CorruptFileError, match="remove it"):
        batched_tempering(molecule, tmp_path, settings.model_copy(update={"n_iterations": 8}))
    assert chunk.read_bytes() == before


def test_another_seed_is_another_run(tmp_path):
    molecule = butane_like()
    drawn = []
    for seed in (1, 2):
        batched_tempering(molecule, tmp_path / str(seed), BatchedSettings.create(**SHORT | {"seed": seed}))
        drawn.append(load_batched(tmp_path / str(seed))[0].positions)
    assert not np.array_equal(*drawn)


def test_other_settings_or_system_are_refused(tmp_path):
    molecule = butane_like()
    settings = BatchedSettings.create(**SHORT)
    batched_tempering(molecule, tmp_path, settings)
    with pytest.raises(InputError, match=r"timestep was 0\.001, is 0\.002"):
        batched_tempering(molecule, tmp_path, settings.model_copy(update={"timestep": 0.002}))
    with pytest.raises(InputError, match="another bias"):
        batched_tempering(molecule, tmp_path, settings, bias=torsion_bias_system(4, [(QUADRUPLE, BIAS)]))
    with pytest.raises(InputError, match="another run"):
        batched_tempering(load_system("alanine-dipeptide"), tmp_path, settings)


@pytest.mark.parametrize(
    ("molecule", "changes", "message"),
    [
        (butane_like(constraints=True), {}, "constraints=None"),
        (butane_like(), {"timestep": 0.1, "scramble_steps": 500}, "smaller"),
        (butane_like(), {"max_temperature": 200.0}, "raise it"),
    ],
)
def test_bad_input(tmp_path, molecule, changes, message):
    with pytest.raises(InputError, match=message):
        # As it is: no settings that are made as they should be have a time step that blows up a chain of four.
        batched_tempering(molecule, tmp_path, BatchedSettings.create(**SHORT).model_copy(update=changes))


def test_bad_settings_are_named():
    with pytest.raises(InputError, match="n_copies"):
        BatchedSettings.create(n_copies=0)
    with pytest.raises(InputError, match="known keys"):
        BatchedSettings.create(copies=3)


def test_reading_removes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(batched, "CHUNK", 2)
    chunks = batched_tempering(butane_like(), tmp_path, BatchedSettings.create(**SHORT))
    away = chunks[1].rename(tmp_path / "elsewhere")
    there = sorted(tmp_path.iterdir())
    assert len(load_batched(tmp_path)[0].states) == 2
    assert sorted(tmp_path.iterdir()) == there
    away.rename(chunks[1])
    assert len(load_batched(tmp_path)[0].states) == 6
    whole = chunks[0].read_bytes()
    for damaged in (b"", whole[:200], whole[:-30], b"x" * 300):
        chunks[0].write_bytes(damaged)
        with pytest.raises(InsufficientDataError):
            load_batched(tmp_path)
    chunks[0].unlink()
    chunks[0].mkdir()  # a failure of the operating system says nothing of the chunk
    with pytest.raises(InputError, match="cannot be read"):
        load_batched(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        batched_tempering(butane_like(), tmp_path, BatchedSettings.create(**SHORT))
    assert all(path.exists() for path in chunks)


def test_a_folder_without_a_finished_part(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"engine": "batched", "temperatures": [300.0, 400.0]}))
    with pytest.raises(InsufficientDataError, match="wait"):
        load_runs(tmp_path)
