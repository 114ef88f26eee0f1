"""Frames at the target temperature, written as float32 HDF5 in mdtraj's format, and a system's reference folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from openmm import app

from openmm_regflow import metrics
from openmm_regflow.errors import InputError, InsufficientDataError
from openmm_regflow.files import write_json
from openmm_regflow.fingerprints import compare_fingerprints, fingerprint
from openmm_regflow.reweighting import Estimate
from openmm_regflow.simulate.analysis import TemperingAnalysis, analyse
from openmm_regflow.simulate.batched import load_batched
from openmm_regflow.simulate.tempering import RECORD, TemperingRun, is_free, load_run, read_record, writable_folder
from openmm_regflow.systems import MolecularSystem, Split


def target_frames(run: TemperingRun, max_frames: int | None = None, *, centre: bool = True) -> np.ndarray:
    """Frames at the lowest temperature, centred, without repeats of an unmoved frame, evenly thinned.

    Centring (mean position to the origin) keeps float32 precise however far the molecule has diffused.

    Args:
        run: the run, after its burn-in.
        max_frames: keep at most this many.
        centre: False for a molecule in an external field, see :func:`is_free`.

    Returns:
        Positions [nm], float32 `(n_frames, n_atoms, 3)`, in time.
    """
    frames = run.at_temperature(run.positions).astype(np.float64)
    moved = np.concatenate([[True], np.any(frames[1:] != frames[:-1], axis=(1, 2))])
    frames = frames[moved]
    frames = thin(frames, max_frames)
    return (frames - frames.mean(axis=1, keepdims=True) if centre else frames).astype(np.float32)


def thin(frames: np.ndarray, max_frames: int | None) -> np.ndarray:
    """At most ``max_frames`` of the frames, evenly spaced; all for None."""
    if max_frames is None or len(frames) <= max_frames:
        return frames
    return frames[np.linspace(0, len(frames) - 1, max_frames).round().astype(int)]


def export_hdf5(positions: np.ndarray, topology: app.Topology, path: str | Path) -> Path:
    """Writes a trajectory in mdtraj's HDF5 format, float32, compressed; whole or not at all.

    Args:
        positions: [nm], `(n_frames, n_atoms, 3)`.
        topology: of the same atoms.
        path: file to write or replace.

    Raises:
        InputError: no frames, another number of atoms, positions not finite, a folder that is not writable, a full
            disk.
    """
    path = Path(path)
    expected = (topology.getNumAtoms(), 3)
    if positions.ndim != 3 or len(positions) == 0 or positions.shape[1:] != expected:
        raise InputError(
            f"positions of shape {positions.shape} do not fit {path.name}; (n > 0, {expected[0]}, 3) is needed"
        )
    if not np.isfinite(positions).all():
        raise InputError(f"positions for {path.name} hold NaN or infinity; leave such frames out first")
    writable_folder(path.parent)
    partial = path.with_name(f".{path.stem}.partial.h5")
    try:
        _write_and_verify(positions.astype(np.float32), topology, partial)
        partial.replace(path)
    except ImportError as error:
        raise InputError(f"{path} could not be written: mdtraj needs PyTables, which cannot be imported") from error
    except Exception as error:  # PyTables, HDF5 and the operating system raise unrelated types on a full disk
        raise InputError(f"{path} could not be written ({error}); is the disk full? Free some space") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _write_and_verify(positions: np.ndarray, topology: app.Topology, path: Path) -> None:
    """Writes an HDF5 trajectory and reads it back: HDF5 loses a failed flush when it closes a file."""
    import mdtraj
    from mdtraj.formats import HDF5TrajectoryFile

    with HDF5TrajectoryFile(str(path), "w", force_overwrite=True) as file:
        file.topology = mdtraj.Topology.from_openmm(topology)
        file.write(positions)
    with HDF5TrajectoryFile(str(path), "r") as file:
        if not np.array_equal(file.read().coordinates, positions):
            raise OSError("what was written does not read back")


def export_reference(
    molecule: MolecularSystem,
    outputs: Mapping[Split, Sequence[str | Path]],
    *,
    burn_in: int = 100,
    max_frames: int | Mapping[Split, int] | None = None,
    folder: str | Path | None = None,
) -> dict[str, Any]:
    """Turns independent runs into a system's reference: a trajectory per split and ``reference.json``.

    Frames of the wrong chirality are left out; they and frames with a cis peptide bond are counted in the record.

    Args:
        molecule: the system that was simulated.
        outputs: split -> output folders of its runs; no run may serve two splits.
        burn_in: iterations left out at the start of each run.
        max_frames: at most this many frames per split, or for each split by name, evenly spaced in time.
        folder: system folder to write to; None for the molecule's own.

    Returns:
        What ``reference.json`` holds: per split the settings of its runs, frames and mixing, and, where the molecule
        has a phi torsion, the free energy ``delta_f_phi`` of phi > 0 above phi < 0 [kT] (first phi), from all runs
        together; null with a reason where a basin was never visited. The same of further phi torsions under ``basins``.

    Raises:
        InputError: no folder to write to, a run of another System, a run given twice, or no runs.
        InsufficientDataError: a run that is not longer than its burn-in.
    """
    target = Path(folder) if folder is not None else molecule.folder
    paths = [Path(path).resolve() for split in outputs.values() for path in split]
    if target is None or not paths or not all(outputs.values()):
        raise InputError(f"{molecule.name}: give at least one run per split, and a folder to write its reference to")
    if len(set(paths)) < len(paths):
        raise InputError(f"{molecule.name}: a run is given twice; splits have to be independent")
    for path in paths:
        _check_system(molecule, path)
    if len({json.dumps(_how(path), sort_keys=True) for path in paths}) < len(paths):
        raise InputError(f"{molecule.name}: two runs have all settings in common, seed included: they are one run")
    by_folder = {split: [load_runs(path, burn_in) for path in of_split] for split, of_split in outputs.items()}
    runs = {split: [run for of_folder in of_split for run in of_folder] for split, of_split in by_folder.items()}
    record: dict[str, Any] = {"system": molecule.name, "temperature": molecule.temperature, "burn_in": burn_in}
    record |= _describe(molecule, [run for of_split in runs.values() for run in of_split])
    record["splits"] = {}
    for split, of_split in runs.items():
        limit = max_frames.get(split) if isinstance(max_frames, Mapping) else max_frames
        frames, counts = checked_frames(molecule, of_split, limit)
        export_hdf5(frames, molecule.topology, target / "reference" / f"{split}.h5")
        made = [_made(Path(path), of_folder) for path, of_folder in zip(outputs[split], by_folder[split])]
        record["splits"][split] = {**counts, **_describe(molecule, of_split), "runs": made}
    write_json(target / "reference.json", record)
    return record


def load_runs(output: str | Path, burn_in: int = 0) -> list[TemperingRun]:
    """The ladders of a run of either engine, without their first ``burn_in`` iterations.

    Raises:
        InputError: no run there.
        InsufficientDataError: a run that is not longer than its burn-in.
    """
    batched = read_record(Path(output) / RECORD).get("engine") == "batched"
    return [run.after(burn_in) for run in (load_batched(output) if batched else [load_run(output)])]


def _made(output: Path, runs: list[TemperingRun]) -> dict[str, Any]:
    """How the runs of one folder were made."""
    record = read_record(output / RECORD)
    made = {key: record[key] for key in ("settings", "temperatures", "versions")}
    engine = {"engine": record.get("engine", "openmmtools"), "ladders": len(runs)}
    return {"used_iterations": len(runs[0].states), **engine, **made}


def _how(output: Path) -> dict[str, Any]:
    """What decides a run, up to its length."""
    record = read_record(output / RECORD)
    settings = {k: v for k, v in record["settings"].items() if k != "n_iterations"}
    return {"engine": record.get("engine"), "temperatures": record["temperatures"], "settings": settings}


def _check_system(molecule: MolecularSystem, output: Path) -> None:
    """Refuses the run of another System, or at another temperature."""
    record = read_record(output / RECORD)
    stored, lowest = record["fingerprint"], record["temperatures"][0]
    if abs(lowest - molecule.temperature) > 1e-6 * molecule.temperature:
        raise InputError(f"{output} is a run at {lowest:g} K, and {molecule.name} is at {molecule.temperature:g} K")
    lines = compare_fingerprints(fingerprint(molecule.system, like=stored), stored)
    if lines:
        raise InputError(f"{output} is a run of another System ({'; '.join(lines)}); give one of {molecule.name}")


def checked_frames(
    molecule: MolecularSystem, runs: Sequence[TemperingRun], max_frames: int | None
) -> tuple[np.ndarray, dict[str, int]]:
    """Frames of the right chirality at the lowest temperature of runs, and what was found among all of them.

    Args:
        molecule: the system that was simulated.
        runs: after their burn-in.
        max_frames: keep at most this many, evenly thinned.

    Returns:
        Positions [nm], float32 `(n_frames, n_atoms, 3)`, and counts for the record.
    """
    free = is_free(molecule.system, molecule.positions)
    frames = np.concatenate([target_frames(run, centre=free) for run in runs])
    wrong = metrics.wrong_chirality(frames, molecule.chiral_centres)
    frames = thin(frames[~wrong], max_frames)
    omega = metrics.dihedrals(frames, molecule.torsions("omega"))
    cis = np.any(np.abs(omega) < np.pi / 2, axis=1)
    return frames, {"frames": len(frames), "wrong_chirality_dropped": int(wrong.sum()), "cis_frames": int(cis.sum())}


_DEFINITIONS = {
    "delta_f": "F(phi > 0) - F(phi < 0) [kT], frames at the target temperature",
    "delta_f_core": "F(0 < phi < 2 rad) - F(elsewhere) [kT], frames at the target temperature",
    "delta_f_mbar": "F(phi > 0) - F(phi < 0) [kT], all temperatures by MBAR",
    "delta_f_core_mbar": "F(0 < phi < 2 rad) - F(elsewhere) [kT], all temperatures by MBAR",
}


def _describe(molecule: MolecularSystem, runs: list[TemperingRun]) -> dict[str, Any]:
    """:func:`analysis_record` of the first phi, those of the others under "basins"; empty without a phi."""
    records = []
    for torsion in molecule.torsions("phi"):
        try:
            records.append(analysis_record(analyse(runs, torsion)))
        except InsufficientDataError as error:
            records.append({"delta_f_phi": None, "delta_f_phi_missing": str(error)})
    if not records:
        return {}
    return records[0] | ({"basins": records[1:]} if len(records) > 1 else {})


def analysis_record(analysis: TemperingAnalysis) -> dict[str, Any]:
    """A :class:`TemperingAnalysis` for JSON: ``delta_f`` spelt ``delta_f_phi``, counts summed and rates averaged."""
    result: dict[str, Any] = {}
    for name, value in vars(analysis).items():
        if isinstance(value, Estimate):
            entry = {"value": round(value.value, 4), "error": round(value.error, 4), "definition": _DEFINITIONS[name]}
            result[name.replace("delta_f", "delta_f_phi")] = entry
        elif name in ("round_trips", "visits"):
            result[name] = int(np.sum(value))
        else:
            result[name] = np.round(np.mean(value, axis=0), 4).tolist()
    return result
