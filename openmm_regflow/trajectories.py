"""Trajectories from files, and whether their frames can be those of a molecule."""

import ctypes
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit

from openmm_regflow.bonds import Bonds, bonds_of
from openmm_regflow.elements import symbol
from openmm_regflow.errors import CorruptFileError, InputError, first_line
from openmm_regflow.units import thermal_energy

_HDF5 = (".h5", ".hdf5")
_ROUNDED = (".xtc", ".tng", ".gro", ".pdb", ".gz", ".xyz", ".mdcrd", ".crd")
#: A bond has this much energy [kT] in one of exp(100) frames.
_IMPOSSIBLE = 100.0
#: As far as a stiff bond gets with that: frames of unconstrained dynamics may serve a constrained System.
_LOOSE = 0.3
#: [kJ/mol/nm²] Softer terms are restraints or Urey-Bradley terms, and no bonds.
_STIFF = 5e4
_ROWS = 10_000
#: Fewer stiff bonds than this do not make a thermometer; its relative error that is taken for noise; frames enough.
FEWEST_BONDS = 4
_OFF_TEMPERATURE = 0.2
#: Bonds that have less than this part of their thermal energy are constrained.
_RIGID = 0.01
_ENOUGH = 2000
#: Relative difference at which two boxes count as one; trajectories store them in single precision.
_SAME_BOX = 1e-4


def load_trajectory(path: Path | str, topology: app.Topology, *, stride: int = 1) -> np.ndarray:
    """Positions from a trajectory in a format of full precision that mdtraj reads, checked against a topology.

    Args:
        path: HDF5 in mdtraj's format, which also says which atoms it holds (:func:`openmm_regflow.simulate.export_hdf5`
            writes it), or DCD, NetCDF and others.
        topology: the molecule that it has to show, atom for atom.
        stride: take every so-many-th frame.

    Returns:
        Positions [nm], float32 `(n_frames, n_atoms, 3)`.

    Raises:
        InputError: no such file, a format that rounds positions, another molecule, fewer than two frames, or a stride
            below one.
        CorruptFileError: truncated or damaged file, or positions that are not finite.
    """
    path = Path(path)
    if stride < 1 or stride != int(stride):
        raise InputError(f"stride is {stride}; take every frame (1), or every so-many-th")
    if not path.is_file():
        raise InputError(f"no trajectory at {path}; check the path")
    if path.suffix.lower() in _ROUNDED:
        raise InputError(
            f"{path} is of a format that rounds positions, which moves energies by kT; give HDF5, DCD or NetCDF"
        )
    if path.suffix.lower() in _HDF5:
        frames = _read_hdf5(path, topology)[::stride]
    else:
        frames = _read_other(path, topology, stride)
    if len(frames) < 2:
        thinned = "" if stride == 1 else f" at a stride of {stride}"
        raise InputError(f"{path} holds {len(frames)} frame(s){thinned}; at least two are needed")
    if not np.isfinite(frames).all():
        raise CorruptFileError(f"{path} holds positions that are not finite; simulate it again")
    return np.ascontiguousarray(frames, dtype=np.float32)


def _read_hdf5(path: Path, topology: app.Topology) -> np.ndarray:
    """Frames of an HDF5 file, whose atoms have to be those of the topology."""
    from mdtraj.formats import HDF5TrajectoryFile

    try:
        with HDF5TrajectoryFile(str(path), "r") as file:
            elements = [symbol(atom) for atom in file.topology.atoms]
            frames = file.read(atom_indices=None).coordinates
    except ImportError as error:
        raise InputError(f"{path} cannot be read: mdtraj needs PyTables, which cannot be imported") from error
    except Exception as error:  # h5py, tables and mdtraj raise a dozen unrelated types on damaged files
        raise CorruptFileError(
            f"{path} is not a readable HDF5 trajectory ({type(error).__name__}); copy or simulate it again"
        ) from error
    check_molecule(elements, [symbol(atom) for atom in topology.atoms()], str(path))
    return np.empty((0, len(elements), 3)) if frames is None else frames


def _read_other(path: Path, topology: app.Topology, stride: int) -> np.ndarray:
    """Frames of a file that names no atoms."""
    import mdtraj

    if path.suffix.lower() == ".dcd":
        _check_length(path)
    try:
        with _quiet_reader():
            trajectory = mdtraj.load(str(path), top=mdtraj.Topology.from_openmm(topology), stride=stride)
    except ValueError as error:
        raise InputError(
            f"{path} does not have the {topology.getNumAtoms()} atoms of the system; give data of this molecule"
        ) from error
    except Exception as error:  # mdtraj's readers raise a dozen unrelated types on damaged files
        if "no loader" in str(error):  # suffixes in capitals, too
            raise InputError(f"{path} has no suffix of a trajectory; name it .h5, .dcd or .nc as what it is") from error
        if (path.parent / "trajectory.h5").is_file() and path.suffix.lower() == ".nc":
            remedy = "if it is the storage of a sampler, give the trajectory.h5 beside it"
        else:
            remedy = "copy it again, or convert it (mdconvert)"
        raise CorruptFileError(
            f"{path} cannot be read as a trajectory ({type(error).__name__}: {first_line(error)}); {remedy}"
        ) from error
    return np.asarray(trajectory.xyz)


def _check_length(path: Path) -> None:
    """Refuse a DCD file that ends before the frames that it announces; mdtraj reads what there is.

    Raises:
        CorruptFileError: with both numbers.
    """
    from mdtraj.formats import DCDTrajectoryFile

    with open(path, "rb") as file:
        head = file.read(12)
    order = next((order for order in "<>" if head[:4] == struct.pack(f"{order}i", 84)), None)
    if len(head) < 12 or head[4:8] != b"CORD" or order is None:
        return  # mdtraj says what it thinks of it
    (announced,) = struct.unpack(f"{order}i", head[8:])
    there = announced
    with _quiet_reader(), suppress(Exception), DCDTrajectoryFile(str(path)) as file:
        there = len(file)
    if there < announced:
        raise CorruptFileError(
            f"{path} announces {announced} frames and ends after {there}; copy it again, or cut it there (mdconvert)"
        )


def check_box(path: Path | str, topology: app.Topology, system: openmm.System) -> None:
    """Refuse frames whose periodic box changes, or is not that of the System in which they will get energies.

    Without a periodic System nothing is refused; a file without boxes, which cannot tell, is warned of.

    Args:
        path: trajectory, of a format that :func:`load_trajectory` takes.
        topology: of its atoms.
        system: whose default box vectors its energies will have.

    Raises:
        InputError: another box.
    """
    if not system.usesPeriodicBoundaryConditions():
        return
    import mdtraj

    own = box_vectors(system)
    known = {} if Path(path).suffix.lower() in _HDF5 else {"top": mdtraj.Topology.from_openmm(topology)}
    with _quiet_reader():
        parts = list(mdtraj.iterload(str(path), chunk=_ROWS, atom_indices=[0], **known))
    if any(part.unitcell_lengths is None for part in parts):
        warnings.warn(
            f"{path} holds no boxes, so that nothing tells whether its frames have that of the System", stacklevel=2
        )
        return
    cells = np.concatenate([np.hstack([part.unitcell_lengths, part.unitcell_angles]) for part in parts])
    for cell in np.unique(cells.astype(float), axis=0):
        found = _vectors(cell)
        if not same_lattice(found, own):
            raise InputError(
                f"a frame of {path} lies in a box of {edges(found)} nm, the System's is one of {edges(own)}; "
                "volumes that change are not covered, and for frames of constant volume "
                "system.setDefaultPeriodicBoxVectors has to give the System their box"
            )


def box_vectors(system: openmm.System) -> np.ndarray:
    """Default box vectors `(3, 3)` [nm] of a System."""
    return np.array([v.value_in_unit(unit.nanometer) for v in system.getDefaultPeriodicBoxVectors()])


def _vectors(cell: np.ndarray) -> np.ndarray:
    """Box vectors `(3, 3)` [nm] as OpenMM has them, from lengths [nm] and angles [degrees]."""
    from openmm.app.internal.unitcell import computePeriodicBoxVectors

    vectors = computePeriodicBoxVectors(*cell[:3], *np.radians(cell[3:]))
    return np.array(vectors.value_in_unit(unit.nanometer))


def same_lattice(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two boxes are one, written in two ways: each vector of one a sum of whole vectors of the other."""
    ratio = one @ np.linalg.inv(other)
    whole = np.round(ratio)
    return bool(np.abs(ratio - whole).max() < _SAME_BOX and round(abs(np.linalg.det(whole))) == 1)


def edges(box: np.ndarray) -> str:
    """A rectangular box by its lengths, another by its vectors."""
    if np.allclose(box, np.diag(np.diag(box)), atol=1e-6):
        return " x ".join(f"{edge:.4g}" for edge in np.diag(box))
    return str(np.round(box, 4).tolist())


@contextmanager
def _quiet_reader() -> Iterator[None]:
    """Within, what C code prints to standard output is dropped: mdtraj's reader of DCD files greets with every file."""
    try:
        kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
        flush = ctypes.CDLL(None).fflush
    except (OSError, TypeError):  # no standard output, or a system that names its C library in another way
        yield
        return
    if sys.stdout is not None:
        sys.stdout.flush()
    flush(None)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def check_molecule(elements: list[str], expected: list[str], place: str) -> None:
    """Refuses atoms of another molecule.

    Args:
        elements: element symbols found at ``place``.
        expected: element symbols of the system.
        place: what to name in the message.

    Raises:
        InputError: another number or order of atoms.
    """
    if len(elements) != len(expected):
        raise InputError(f"{place} holds {len(elements)} atoms, the system {len(expected)}; give data of this molecule")
    for index, (found, wanted) in enumerate(zip(elements, expected, strict=True)):
        if found != wanted:
            raise InputError(
                f"{place}: atom {index} is {found}, in the system it is {wanted}; "
                "give data of this molecule in its atom order"
            )


def check_bond_lengths(positions: np.ndarray, system: openmm.System, temperature: float, place: str) -> None:
    """Refuse frames that cannot be this molecule: in other units, broken across a box, atoms in another order.

    A System with neither stiff harmonic bonds nor constraints says nothing, and nothing is refused.

    Args:
        positions: [nm] `(n_frames, n_atoms, 3)`.
        system: of the molecule.
        temperature: [K].
        place: what to name in the message.

    Raises:
        InputError: a bond has more than 100 kT, or a constraint is off by three tenths of its length.
    """
    bonds = bonds_of(system)
    stiff = (bonds.stiffness > _STIFF) & (bonds.lengths > 0)
    if not stiff.any():
        return
    bonds = Bonds(*(column[stiff] for column in bonds))
    reach = np.sqrt(2 * _IMPOSSIBLE * thermal_energy(temperature) / bonds.stiffness)
    allowed = np.where(np.isinf(bonds.stiffness), _LOOSE * bonds.lengths, reach)
    n_wrong, first, ratios = 0, None, []
    for start in range(0, len(positions), _ROWS):
        x = np.asarray(positions[start : start + _ROWS], dtype=np.float64)
        found = np.linalg.norm(x[:, bonds.pairs[:, 0]] - x[:, bonds.pairs[:, 1]], axis=2)
        wrong = np.abs(found - bonds.lengths) > allowed
        ratios.append(np.median(found / bonds.lengths))
        n_wrong += int(wrong.any(1).sum())
        if first is None and wrong.any():
            frame, bond = np.argwhere(wrong)[0]
            first = (start + int(frame), *map(int, bonds.pairs[bond]), found[frame, bond], bonds.lengths[bond])
    if first is not None:
        ratio = float(np.median(ratios))
        raise InputError(
            f"{place}: {n_wrong} of {len(positions)} frames cannot be this molecule; first frame {first[0]}, where the "
            f"bonded atoms {first[1]} and {first[2]} are {first[3]:.3g} nm apart and belong {first[4]:.3g} nm apart; "
            + _remedy(ratio)
        )


def bond_temperature(positions: np.ndarray, system: openmm.System) -> float | None:
    """Temperature [K] that the spread of stiff bonds shows: ``k var(d) / R``, the median over them.

    Equipartition in a harmonic bond, which little else bends: within three per cent for the peptides of this package.

    Args:
        positions: [nm] `(n_frames, n_atoms, 3)`.
        system: of the molecule.

    Returns:
        None with fewer than `FEWEST_BONDS` harmonic bonds that no constraint holds, or fewer than a hundred frames.
    """
    bonds = bonds_of(system)
    pairs, same = np.unique(np.sort(bonds.pairs, axis=1), axis=0, return_inverse=True)
    stiffness = np.bincount(same.ravel(), bonds.stiffness, len(pairs))  # a bond may be in several forces
    still = np.array([system.getParticleMass(i)._value == 0 for i in range(system.getNumParticles())], dtype=bool)
    used = (stiffness > _STIFF) & np.isfinite(stiffness) & ~still[pairs].all(axis=1)
    if used.sum() < FEWEST_BONDS or len(positions) < 100:
        return None
    some = np.asarray(positions)[:: max(1, len(positions) // _ENOUGH)]
    first, second = (some[:, pairs[used, k]].astype(np.float64) for k in (0, 1))
    variance = np.linalg.norm(first - second, axis=2).var(axis=0)
    return float(np.median(stiffness[used] * variance) / thermal_energy(1.0))


def warn_of_temperature(positions: np.ndarray, system: openmm.System, temperature: float, place: str) -> None:
    """Warn of frames whose stiff bonds show another temperature than that of the system (`bond_temperature`).

    Args:
        positions: [nm] `(n_frames, n_atoms, 3)`.
        system: of the molecule.
        temperature: [K].
        place: what to name in the message.
    """
    found = bond_temperature(positions, system)
    if found is not None and found < _RIGID * temperature:
        warnings.warn(
            f"the bonds in {place} do not spread: frames of dynamics with constraints, which the system has not; load "
            "it with the same constraints, or sample without them",
            stacklevel=3,
        )
    elif found is not None and abs(found / temperature - 1) > _OFF_TEMPERATURE:
        warnings.warn(
            f"the bonds in {place} spread as at {found:.0f} K, and the system is at {temperature:g} K: frames of "
            "another temperature or force field, or of too long a time step; a flow learns what it is shown",
            stacklevel=3,
        )


def _remedy(ratio: float) -> str:
    """What to do about bonds that are off, by their typical length in units of their own."""
    if 8 < ratio < 12:
        return "lengths are ten times too long: angstrom, where nanometers are needed"
    if 0.08 < ratio < 0.12:
        return "lengths are a tenth of what they should be; positions have to be in nanometers"
    if 0.8 < ratio < 1.25:
        return "make molecules whole before (mdtraj's image_molecules or make_molecules_whole), and check atom order"
    return "give atoms in the order of the System's particles"
