"""Trajectories from files, and whether their frames can be those of a molecule."""

from pathlib import Path

import numpy as np
import openmm
from openmm import app

from openmm_regflow.bonds import Bonds, bonds_of
from openmm_regflow.elements import symbol
from openmm_regflow.errors import CorruptFileError, InputError
from openmm_regflow.units import thermal_energy

_HDF5 = (".h5", ".hdf5")
_ROUNDED = (".xtc", ".tng", ".gro")
#: A bond has this much energy [kT] in one of exp(100) frames.
_IMPOSSIBLE = 100.0
#: As far as a stiff bond gets with that: frames of unconstrained dynamics may serve a constrained System.
_LOOSE = 0.3
#: [kJ/mol/nm²] Softer terms are restraints or Urey-Bradley terms, and no bonds.
_STIFF = 5e4
_ROWS = 10_000


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
    if stride < 1:
        raise InputError(f"stride is {stride}; take every frame (1), or every so-many-th")
    if not path.is_file():
        raise InputError(f"no trajectory at {path}; check the path")
    if path.suffix.lower() in _ROUNDED:
        raise InputError(
            f"{path} rounds positions to 1e-3 nm, which moves energies by many kT; give HDF5, DCD or NetCDF"
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

    try:
        trajectory = mdtraj.load(str(path), top=mdtraj.Topology.from_openmm(topology), stride=stride)
    except ValueError as error:
        raise InputError(f"{path} does not fit a molecule of {topology.getNumAtoms()} atoms: {error}") from error
    except Exception as error:  # mdtraj's readers raise a dozen unrelated types on damaged files
        raise CorruptFileError(
            f"{path} cannot be read as a trajectory ({type(error).__name__}); copy it again"
        ) from error
    return np.asarray(trajectory.xyz)


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


def _remedy(ratio: float) -> str:
    """What to do about bonds that are off, by their typical length in units of their own."""
    if 8 < ratio < 12:
        return "lengths are ten times too long: angstrom, where nanometers are needed"
    if 0.08 < ratio < 0.12:
        return "lengths are a tenth of what they should be; positions have to be in nanometers"
    if 0.8 < ratio < 1.25:
        return "make molecules whole before (mdtraj's image_molecules or make_molecules_whole), and check atom order"
    return "give atoms in the order of the System's particles"
