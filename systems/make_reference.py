"""Makes the reference data of the shipped systems.

Usage: ``python systems/make_reference.py {trajectories,free-energy} [runs]`` for alanine dipeptide, and
``python systems/make_reference.py alanine-tetrapeptide [runs]`` (or another name of ``PEPTIDES``) for a longer one.

``trajectories``: four runs of parallel tempering (train, validation, and two for test), about five CPU hours.
``free-energy``: two runs under a bias that flattens phi, for a sharper free energy of its basins, about thirty CPU
minutes; it reads the shipped trajectories.
Runs that were stopped continue when the command is given again. A run can be made alone, beside others:
``python systems/make_reference.py free-energy runs aldp-biased-5005``.

Longer peptides: batched replica exchange of many ladders whose upper states are hotter and have every phi flattened by
the bias found for alanine dipeptide. The lowest state is the unbiased target and gives the frames.

``python systems/make_reference.py ladders [runs] [name] [device]`` makes the frames of a name of ``LADDERS`` on a GPU:
one run of hundreds of ladders, of which some give the training frames, others those for validation and test.

``python systems/make_reference.py step-bias [runs] [name]`` compares energies under the time step and hydrogen mass of
these runs with energies under 1 fs and physical masses, and records the difference.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import openmm

from openmm_regflow import metrics
from openmm_regflow.files import write_json
from openmm_regflow.reweighting import Estimate
from openmm_regflow.simulate import (
    BatchedSettings,
    TemperingRun,
    TemperingSettings,
    analyse,
    analysis_record,
    batched_tempering,
    checked_frames,
    export_hdf5,
    export_reference,
    flattening_bias,
    load_run,
    load_runs,
    parallel_tempering,
    target_frames,
    torsion_bias_system,
    with_torsion_bias,
)
from openmm_regflow.systems import MolecularSystem, load_system
from openmm_regflow.units import GAS_CONSTANT

BURN_IN = 100
LADDER = {"max_temperature": 700.0, "n_replicas": 5, "steps_per_iteration": 500, "timestep": 0.003}
BIASED_LADDER = {**LADDER, "max_temperature": 458.2575694955841, "n_replicas": 3}
#: folder -> (split, iterations, seed)
RUNS = {
    "aldp-train": ("train", 10_200, 1001),
    "aldp-validation": ("validation", 2_200, 2002),
    "aldp-test": ("test", 7_680, 3003),
    "aldp-test2": ("test", 5_460, 4004),
}
#: folder -> (iterations, seed)
BIASED_RUNS = {"aldp-biased-5005": (8_000, 5005), "aldp-biased-6006": (8_000, 6006)}
#: name -> split -> (iterations, seed)
PEPTIDES = {
    "alanine-tripeptide": {"train": (500, 31), "validation": (200, 32), "test": (450, 33)},
    "alanine-tetrapeptide": {"train": (650, 41), "validation": (350, 42), "test": (400, 43)},
    "alanine-hexapeptide": {"train": (400, 61), "validation": (150, 62), "test": (400, 63)},
}
PEPTIDE_LADDER = {"n_copies": 24, "n_replicas": 4, "max_temperature": 450.0, "scramble_steps": 50_000}
#: name -> settings, ladders and most frames of each split. A GPU moves a thousand replicas as quickly as one. The one
#: run so far left out 100 of 200 iterations; in the first quarter of the rest phi > 0 still was a third too frequent.
LADDERS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, int]]]] = {
    "alanine-hexapeptide": (
        {"n_copies": 384, "n_replicas": 4, "max_temperature": 450.0, "n_iterations": 250, "scramble_steps": 30_000},
        {"train": (304, 16_000), "validation": (16, 1000), "test": (64, 4000)},
    ),
}
LADDERS_BURN_IN = 150
PEPTIDE_FRAMES = {"train": 6000, "validation": 1000, "test": 4000}
ESTIMATES = ("delta_f_phi", "delta_f_phi_core", "delta_f_phi_mbar", "delta_f_phi_core_mbar")
MIXING = ("acceptance", "round_trips", "inefficiency", "visits")


def finished(molecule: MolecularSystem, folder: Path, settings: TemperingSettings) -> TemperingRun:
    """The run in ``folder``, made or continued if it is shorter than its settings ask for."""
    if not folder.exists() or len(load_run(folder).states) < settings.n_iterations:
        parallel_tempering(molecule, folder, settings, resume=True)
    return load_run(folder).after(BURN_IN)


def trajectories(output: Path) -> None:
    """Runs what is missing and writes the reference folder and ``reference.json``."""
    molecule = load_system("alanine-dipeptide")
    outputs: dict[str, list[Path]] = {}
    for name, (split, n, seed) in RUNS.items():
        finished(molecule, output / name, TemperingSettings.create(**LADDER, n_iterations=n, seed=seed))
        outputs.setdefault(split, []).append(output / name)
    export_reference(molecule, outputs, burn_in=BURN_IN, max_frames=10_000)


def dipeptide_bias() -> np.ndarray:
    """The bias that flattens phi of alanine dipeptide, from its shipped frames."""
    molecule = load_system("alanine-dipeptide")
    frames = np.concatenate([molecule.reference(split) for split in ("train", "validation", "test")])
    return flattening_bias(metrics.dihedrals(frames, molecule.torsions("phi")[:1]), molecule.temperature)


def with_flat_phi(name: str) -> tuple[MolecularSystem, openmm.System]:
    """A peptide, and the bias that flattens each of its phi as that of alanine dipeptide."""
    molecule, amplitudes = load_system(name), dipeptide_bias()
    return molecule, torsion_bias_system(molecule.n_atoms, [(phi, amplitudes) for phi in molecule.torsions("phi")])


def peptide(name: str, output: Path, only: str | None = None) -> None:
    """Runs what is missing (one split alone if named) and writes the reference folder and ``reference.json``."""
    molecule, bias = with_flat_phi(name)
    wanted = {split: run for split, run in PEPTIDES[name].items() if only in (None, split)}
    for split, (n, seed) in wanted.items():
        settings = BatchedSettings.create(**PEPTIDE_LADDER, n_iterations=n, seed=seed)
        batched_tempering(molecule, output / f"{name}-{split}", settings, bias=bias)
    if only is None:
        outputs = {split: [output / f"{name}-{split}"] for split in wanted}
        export_reference(molecule, outputs, burn_in=BURN_IN, max_frames=PEPTIDE_FRAMES)


def ladders(name: str, output: Path, device: str) -> None:
    """One run of many ladders; its frames go into the reference folder, populations of every phi > 0 to the screen.

    Ladders never exchange replicas with each other, so those of one split know nothing of another's.
    """
    molecule, bias = with_flat_phi(name)
    given, parts = LADDERS[name]
    settings = BatchedSettings.create(**given, device=device, seed=64)
    batched_tempering(molecule, output / f"{name}-ladders", settings, bias=bias)
    runs = load_runs(output / f"{name}-ladders", LADDERS_BURN_IN)
    for split, (n, most) in parts.items():
        own, runs = runs[:n], runs[n:]
        phi = [metrics.dihedrals(target_frames(run), molecule.torsions("phi")) for run in own]
        shares = np.array([(angles > 0).mean(0) for angles in phi])
        error = shares.std(0, ddof=1) / np.sqrt(n)
        print(f"{split}: share with phi > 0", shares.mean(0).round(4), "+-", error.round(4))
        frames, _ = checked_frames(molecule, own, most)
        export_hdf5(frames, molecule.topology, molecule.folder / "reference" / f"{split}.h5")


def step_bias(name: str, output: Path) -> None:
    """Mean energy [kT] under the runs' time step and masses less that under 1 fs and physical masses, recorded."""
    molecule = load_system(name)
    kt = GAS_CONSTANT * molecule.temperature
    common = {"n_copies": 64, "n_replicas": 2, "max_temperature": 1.1 * molecule.temperature, "n_iterations": 100}
    means: list[np.ndarray] = []
    for label, timestep, mass, steps in (("fine", 0.001, None, 300), ("used", 0.003, 4.0, 100)):
        dynamics = {"timestep": timestep, "hydrogen_mass": mass, "steps_per_iteration": steps}
        settings = BatchedSettings.create(**common, **dynamics, scramble_steps=66 * steps, seed=7)
        folder = output / f"{name}-step-{label}"
        batched_tempering(molecule, folder, settings)
        means.append(np.array([run.at_temperature(run.energies).mean() / kt for run in load_runs(folder, burn_in=20)]))
    error = float(np.sqrt(sum(m.var(ddof=1) / len(m) for m in means)))  # ladders are independent
    found = {"value": round(float(means[1].mean() - means[0].mean()), 4), "error": round(error, 4)}
    path = molecule.folder / "reference.json"
    definition = "mean energy [kT] with 3 fs and hydrogens of 4 dalton less that with 1 fs and physical masses"
    record = json.loads(path.read_text()) | {"step_bias": {**found, "definition": definition}}
    write_json(path, record)
    print(name, found)


def free_energy(output: Path, only: str | None = None) -> None:
    """Runs what is missing under the flattening bias and combines its free energy with that of the trajectories."""
    molecule = load_system("alanine-dipeptide")
    phi = molecule.torsions("phi")[0]
    bias = dipeptide_bias()
    biased = with_torsion_bias(molecule, phi, bias)
    wanted = {name: run for name, run in BIASED_RUNS.items() if only in (None, name)}
    runs = [
        finished(biased, output / name, TemperingSettings.create(**BIASED_LADDER, n_iterations=n, seed=seed))
        for name, (n, seed) in wanted.items()
    ]
    analysis = analyse(runs, phi, bias)
    print(json.dumps(analysis_record(analysis), indent=1))
    if only is not None:
        return
    path = molecule.folder / "reference.json"
    record = json.loads(path.read_text())
    if "unbiased" not in record:
        record["unbiased"] = {key: record.pop(key) for key in ESTIMATES + MIXING}
    made = {"ladder": BIASED_LADDER, "runs": BIASED_RUNS}
    record["biased"] = {**analysis_record(analysis), "bias": bias.round(6).tolist(), **made}
    for suffix, basins in (("", "phi > 0) - F(phi < 0)"), ("_core", "0 < phi < 2 rad) - F(elsewhere)")):
        plain = record["unbiased"][f"delta_f_phi{suffix}_mbar"]
        parts = [getattr(analysis, f"delta_f{suffix}_mbar"), Estimate(plain["value"], plain["error"], 0)]
        record[f"delta_f_phi{suffix}"] = combined(parts, f"F({basins} [kT], MBAR; unbiased and biased runs combined")
    write_json(path, record)
    print(json.dumps({key: record[key] for key in ("delta_f_phi", "delta_f_phi_core")}, indent=1))


def combined(estimates: list[Estimate], definition: str) -> dict[str, float | str]:
    """Mean of independent estimates weighted by their inverse variances.

    Where they scatter more than their errors say, the error grows by that factor (Birge ratio; PDG 2024, 5.2.2).
    """
    w = np.array([e.error**-2.0 for e in estimates])
    values = np.array([e.value for e in estimates])
    mean = float(np.sum(w * values) / w.sum())
    ratio = max(1.0, float(np.sqrt(np.sum(w * (values - mean) ** 2) / (len(values) - 1))))
    return {"value": round(mean, 4), "error": round(float(ratio * w.sum() ** -0.5), 4), "definition": definition}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ["trajectories", "free-energy", "ladders", "step-bias", *PEPTIDES]
    parser.add_argument("stage", nargs="?", default=stages[0], choices=stages, metavar="stage", help=", ".join(stages))
    parser.add_argument("runs", nargs="?", type=Path, default="runs", help="folder of the runs; default: runs")
    parser.add_argument("part", nargs="?", help="one run of it alone, or the name that ladders and step-bias are of")
    parser.add_argument("device", nargs="?", default="cuda", help="of ladders; default: cuda")
    options = parser.parse_args()
    stage, folder, part = options.stage, options.runs, options.part
    if stage == "free-energy":
        free_energy(folder, part)
    elif stage == "trajectories":
        trajectories(folder)
    elif stage == "ladders":
        ladders(part or "alanine-hexapeptide", folder, options.device)
    elif stage == "step-bias":
        step_bias(part or "alanine-dipeptide", folder)
    else:
        peptide(stage, folder, part)
