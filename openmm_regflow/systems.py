"""Molecular systems: the named peptides, a user's own files, what of them is asked for by name.

A system is a folder with a ``system.toml`` (see :class:`SystemConfig`) and a structure, and possibly reference
trajectories in ``reference/{train,validation,test}.h5``. The named ones travel with the package.
"""

import re
import tomllib
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openmm
from openmm import app, unit
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from openmm_regflow import metrics
from openmm_regflow.bonds import bonded_pairs
from openmm_regflow.elements import symbol
from openmm_regflow.errors import InputError, complaints, warn_once
from openmm_regflow.fingerprints import fingerprint
from openmm_regflow.trajectories import check_bond_lengths, load_trajectory, warn_of_temperature
from openmm_regflow.units import temperature_kelvin, to_float

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
#: Keys of a system that say how its force field is applied.
OF_FORCE_FIELD = ("constraints", "nonbonded_method", "nonbonded_cutoff")
#: [dalton] Between hydrogens, heavier ones as well, and other atoms.
_HYDROGEN = 5.0
#: [nm] Longest bond between atoms of which none, one or both are hydrogens; longest side of a ring of three.
_LONGEST, _THREE_RING = (0.25, 0.18, 0.1), 0.2


class SystemConfig(BaseModel):
    """Contents of ``system.toml``; unknown keys are refused.

    Attributes:
        name: name of the system; the folder's name where absent.
        description: one line for people.
        structure: PDB file, relative to the folder.
        force_field: OpenMM force-field files, built in or relative to the folder. Either this or ``system_xml``.
        system_xml: a serialised ``openmm.System``, relative to the folder.
        temperature: [K].
        nonbonded_method: name of an ``openmm.app`` nonbonded method (with ``force_field`` only).
        nonbonded_cutoff: [nm], for methods with a cutoff.
        constraints: name of an ``openmm.app`` constraint choice, or ``None``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = None
    description: str = ""
    structure: str = "structure.pdb"
    force_field: tuple[str, ...] = ()
    system_xml: str | None = None
    temperature: float = Field(gt=0, allow_inf_nan=False)
    nonbonded_method: Literal["NoCutoff", "CutoffNonPeriodic", "CutoffPeriodic", "PME", "Ewald", "LJPME"] = "NoCutoff"
    nonbonded_cutoff: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    constraints: Literal["None", "HBonds", "AllBonds", "HAngles"] = "None"

    @model_validator(mode="after")
    def _one_source(self) -> "SystemConfig":
        if bool(self.force_field) == (self.system_xml is not None):
            raise ValueError("give either force_field (a list of files) or system_xml (one file)")
        idle = [key for key in OF_FORCE_FIELD if key in self.model_fields_set]
        if self.system_xml is not None and idle:
            raise ValueError(f"{' and '.join(idle)}: only with force_field; a serialised System has its own")
        if self.nonbonded_method == "NoCutoff" and "nonbonded_cutoff" in idle:
            raise ValueError('nonbonded_cutoff: does nothing with nonbonded_method = "NoCutoff"; choose another')
        return self


@dataclass(frozen=True)
class MolecularSystem:
    """A molecule with everything needed to evaluate it at one temperature.

    Attributes:
        name: name of the system.
        topology: atoms and bonds.
        system: the ``openmm.System``; shared, so copy it before changing it.
        positions: starting structure [nm], float64 `(n_atoms, 3)`.
        temperature: [K].
        folder: where ``system.toml`` or the structure lies; None for a system made in memory.
        description: one line for people.
    """

    name: str
    topology: app.Topology
    system: openmm.System
    positions: np.ndarray
    temperature: float
    folder: Path | None = None
    description: str = ""

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return self.system.getNumParticles()

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """:func:`fingerprint` of the System."""
        return fingerprint(self.system)

    def torsions(self, kind: Literal["phi", "psi", "omega"]) -> np.ndarray:
        """Atom indices of the backbone torsions of a kind, in chain order, int `(k, 4)`.

        Raises:
            InputError: another kind.
        """
        return backbone_torsions(self.topology, kind)

    @cached_property
    def backbone_residues(self) -> np.ndarray:
        """Atom indices of phi and psi of every residue that has both, in chain order, int `(k, 2, 4)`.

        The first residue of a chain with free ends has a psi and no phi, the last a phi and no psi.
        """
        after = {tuple(row[:3]): row for row in self.torsions("psi").tolist()}  # by N, CA, C
        rows = [(row, after[tuple(row[1:])]) for row in self.torsions("phi").tolist() if tuple(row[1:]) in after]
        return np.array(rows, dtype=np.int64).reshape(-1, 2, 4)

    @cached_property
    def chiral_centres(self) -> np.ndarray:
        """Atom indices (CA, N, C, CB) of every residue that has them, int `(k, 4)`.

        Of a residue that is D in the structure N and C are exchanged, so that in every row
        :func:`openmm_regflow.metrics.wrong_chirality` tells what is unlike the structure.
        """
        names = [{atom.name: atom.index for atom in residue.atoms()} for residue in self.topology.residues()]
        rows = [[at[name] for name in ("CA", "N", "C", "CB")] for at in names if {"CA", "N", "C", "CB"} <= set(at)]
        centres = np.array(rows, dtype=np.int64).reshape(-1, 4)
        mirrored = metrics.chiral_volumes(self.positions[None], centres)[0] < 0
        return np.where(mirrored[:, None], centres[:, [0, 2, 1, 3]], centres)

    def reference_path(self, split: Split) -> Path:
        """Path of the reference trajectory of a split, whether or not it exists.

        Raises:
            InputError: an unknown split, or a system without a folder.
        """
        if split not in SPLITS:
            raise InputError(f"unknown reference split {split!r} of {self.name}; choose one of {', '.join(SPLITS)}")
        if self.folder is None:
            raise InputError(f"{self.name} has no folder, so no reference data; save it as a folder with system.toml")
        return self.folder / "reference" / f"{split}.h5"

    def reference(self, split: Split) -> np.ndarray:
        """Reference positions at ``temperature`` [nm], float32 `(n_frames, n_atoms, 3)`.

        Raises:
            InputError: unknown split, no such file, another molecule, or fewer than two frames.
            CorruptFileError: truncated or damaged file.
        """
        path = self.reference_path(split)
        if not path.is_file():
            raise InputError(
                f"{self.name} has no {split} reference at {path}; give a trajectory of `openmm-regflow simulate "
                f"{self.folder}` as {'--validation' if split == 'validation' else '--data'}, or put it there"
            )
        return self.load_trajectory(path)

    def load_trajectory(self, path: Path | str, *, stride: int = 1) -> np.ndarray:
        """Frames of this molecule from a file, float32 `(n_frames, n_atoms, 3)` [nm].

        Warns where their bonds show another temperature (see :func:`openmm_regflow.trajectories.bond_temperature`).

        Args:
            path: HDF5, DCD, NetCDF; see :func:`openmm_regflow.trajectories.load_trajectory`.
            stride: take every so-many-th frame.

        Raises:
            InputError: no such file, a format that rounds positions, another molecule, frames that cannot be this
                molecule (see :func:`openmm_regflow.trajectories.check_bond_lengths`), or fewer than two.
            CorruptFileError: truncated or damaged file, or positions that are not finite.
        """
        frames = load_trajectory(path, self.topology, stride=stride)
        check_bond_lengths(frames, self.system, self.temperature, str(path))
        warn_of_temperature(frames, self.system, self.temperature, str(path))
        return frames


_TORSION_ATOMS = {
    # kind: (name, offset of the residue) of the four atoms; caps name their methyl carbon differently
    "phi": (("C", -1), ("N", 0), ("CA", 0), ("C", 0)),
    "psi": (("N", 0), ("CA", 0), ("C", 0), ("N", 1)),
    "omega": (("CA", -1), ("C", -1), ("N", 0), ("CA", 0)),
}
_ALPHA_CARBON = {"ACE": "CH3", "NME": "C"}


def backbone_torsions(topology: app.Topology, kind: Literal["phi", "psi", "omega"]) -> np.ndarray:
    """Atom indices of the backbone torsions of a kind, in chain order, int `(k, 4)`.

    ``omega`` of residue i is the peptide bond before it and includes those of the caps ACE and NME.

    Raises:
        InputError: another kind.
    """
    if kind not in _TORSION_ATOMS:
        raise InputError(f"unknown torsion {kind!r}; choose one of {', '.join(_TORSION_ATOMS)}")
    found = []
    for chain in topology.chains():
        residues = list(chain.residues())
        names = [{_backbone_name(residue, atom): atom.index for atom in residue.atoms()} for residue in residues]
        for i in range(len(residues)):
            if kind != "omega" and not {"CB", "CB1", "HA2"} & names[i].keys():  # CB1: of two, as in AIB
                continue  # a cap: its N-C bond is no backbone torsion
            around = [names[i + step] if 0 <= i + step < len(names) else {} for _, step in _TORSION_ATOMS[kind]]
            row = [at.get(atom) for at, (atom, _) in zip(around, _TORSION_ATOMS[kind])]
            if None not in row:
                found.append(row)
    return np.array(found, dtype=np.int64).reshape(-1, 4)


def select_atoms(topology: app.Topology, selection: str) -> list[int]:
    """Atom indices of a selection: mdtraj's language, or numbers from 0 and ranges such as ``4,0-2,7`` in their order.

    Raises:
        InputError: neither of the two, or nothing selected.
    """
    if re.fullmatch(r"[\d\s,-]+", selection):
        parts = [part.strip() for part in selection.split(",") if part.strip()]
        if bad := [part for part in parts if not re.fullmatch(r"\d+(\s*-\s*\d+)?", part)]:
            raise InputError(f"{bad[0]!r} in {selection!r} is no number or range of atoms; try '0-21' or '4,0-2,7'")
        spans = [[int(end) for end in part.split("-")] for part in parts]
        atoms = [i for span in spans for i in range(span[0], span[-1] + 1)]
    else:
        import mdtraj

        try:
            atoms = [int(i) for i in mdtraj.Topology.from_openmm(topology).select(selection)]
        except Exception as error:  # its parser has errors of many kinds
            raise InputError(f"{selection!r} is no selection of atoms: {error}; try 'protein' or '0-21'") from error
    if not atoms:
        raise InputError(f"{selection!r} selects no atom; try 'protein', 'resname ALA' or '0-21'")
    return atoms


def _backbone_name(residue: Any, atom: Any) -> str:
    """Name of an atom with the caps' methyl carbons called CA."""
    return "CA" if _ALPHA_CARBON.get(residue.name) == atom.name else atom.name


def systems_folder() -> Path:
    """Folder of the named systems: inside an installed package, or beside it in a source checkout.

    Raises:
        InputError: neither exists.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "_systems", package.parent / "systems"):
        if folder.is_dir():
            return folder
    raise InputError(f"no named systems beside {package}; reinstall openmm-regflow")


def available_systems() -> list[str]:
    """Names that :func:`load_system` knows, sorted."""
    return sorted(path.parent.name for path in systems_folder().glob("*/system.toml"))


def load_system(
    source: str | Path,
    *,
    force_field: str | tuple[str, ...] | list[str] | None = None,
    system_xml: str | Path | None = None,
    temperature: Any = None,
    nonbonded_method: str | None = None,
    nonbonded_cutoff: Any = None,
    constraints: str | None = None,
) -> MolecularSystem:
    """Loads a named system, a user's folder, or a user's PDB with a force field or a serialised System.

    Args:
        source: a name from :func:`available_systems`, a folder with ``system.toml``, or a PDB file.
        force_field: OpenMM force-field file or files, for a PDB.
        system_xml: serialised ``openmm.System``, for a PDB.
        temperature: [K or Quantity]; needed for a PDB, overrides ``system.toml`` otherwise.
        nonbonded_method: see :class:`SystemConfig`.
        nonbonded_cutoff: [nm or Quantity].
        constraints: see :class:`SystemConfig`.

    Returns:
        The system.

    Raises:
        InputError: unknown name (the message lists the known ones), missing or malformed file, unknown key.

    Example:
        >>> load_system("alanine-dipeptide").n_atoms
        22
    """
    files = (force_field,) if isinstance(force_field, str) else tuple(force_field or ())
    overrides = {
        "force_field": files or None,
        "system_xml": None if system_xml is None else str(Path(system_xml).resolve()),
        "temperature": None if temperature is None else temperature_kelvin(temperature),
        "nonbonded_method": nonbonded_method,
        "nonbonded_cutoff": None if nonbonded_cutoff is None else to_float(nonbonded_cutoff, "length"),
        "constraints": constraints,
    }
    given = {key: value for key, value in overrides.items() if value is not None}
    path = _locate(source)
    if path.is_dir():
        return _build(_read_config(path, given), path)
    if "temperature" not in given:
        raise InputError(f"{path} is a bare structure; give temperature= [K] and force_field= or system_xml=")
    return _build(_validate({"structure": path.name, "name": path.stem, **given}, str(path)), path.parent)


def _locate(source: str | Path) -> Path:
    """Folder with a system.toml, or structure file, that ``source`` names."""
    path = Path(source)
    if isinstance(source, str) and source in available_systems():
        shipped = systems_folder() / source
        if (path / "system.toml").is_file() and not path.samefile(shipped):
            warn_once(f"{source!r} is the shipped system; give ./{source} for the folder of that name that is here")
        return shipped
    if path.is_dir():
        if not (path / "system.toml").is_file():
            raise InputError(f"{path} has no system.toml; write one with structure, force_field and temperature")
        return path
    if path.is_file():
        return path
    raise InputError(
        f"unknown system {str(source)!r}: neither a known name ({', '.join(available_systems())}) "
        "nor an existing folder or PDB file"
    )


def _read_config(folder: Path, overrides: dict[str, Any]) -> SystemConfig:
    """``system.toml`` of a folder with keyword overrides applied."""
    file = folder / "system.toml"
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid TOML: {error}") from error
    for key, other in (("force_field", "system_xml"), ("system_xml", "force_field")):
        if key in overrides:
            values.pop(other, None)
    if "system_xml" in overrides:
        for key in OF_FORCE_FIELD:
            values.pop(key, None)
    return _validate({"name": folder.resolve().name, **values, **overrides}, str(file))


def _validate(values: dict[str, Any], place: str) -> SystemConfig:
    """A checked configuration; pydantic's report becomes one line."""
    try:
        return SystemConfig(**values)
    except ValidationError as error:
        known = ", ".join(SystemConfig.model_fields)
        raise InputError(f"{place}: {complaints(error, 'file')}; known keys: {known}") from error


def _build(config: SystemConfig, folder: Path) -> MolecularSystem:
    """Reads the structure and makes the System."""
    structure = folder / config.structure
    if not structure.is_file():
        raise InputError(f"no structure at {structure}; set `structure` to a PDB file")
    try:
        pdb = app.PDBFile(str(structure))
        positions = np.array(pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer), dtype=np.float64)
    except Exception as error:  # OpenMM's reader raises ValueError, IndexError or KeyError on malformed lines
        raise InputError(f"{structure} is not a readable PDB file: {error}") from error
    if config.system_xml is not None:
        system = _system_from_xml(folder / config.system_xml, len(positions))
        _check_order(system, pdb.topology, f"{structure} and {folder / config.system_xml}")
        _add_bonds(system, pdb.topology, positions, structure)
    else:
        system = _system_from_force_field(config, folder, pdb.topology)
    name = config.name or folder.resolve().name
    return MolecularSystem(
        name, pdb.topology, system, positions, config.temperature, folder.resolve(), config.description
    )


def _system_from_xml(path: Path, n_atoms: int) -> openmm.System:
    """A serialised System with the right number of particles."""
    if not path.is_file():
        raise InputError(f"no serialised System at {path}; write one with openmm.XmlSerializer.serialize")
    try:
        system = openmm.XmlSerializer.deserialize(path.read_text(encoding="utf-8"))
    except Exception as error:  # SWIG raises a bare Exception or OpenMMException
        raise InputError(f"{path} is not a serialised System: {error}") from error
    if not isinstance(system, openmm.System):
        raise InputError(f"{path} holds a {type(system).__name__}, not an openmm.System")
    if system.getNumParticles() != n_atoms:
        raise InputError(
            f"{path} has {system.getNumParticles()} particles, the structure {n_atoms}; give a matching pair"
        )
    return system


def _check_order(system: openmm.System, topology: app.Topology, files: str) -> None:
    """Refuse a structure whose atoms are in another order than the System's particles.

    Then the structure has bonds that the System lacks, and the System has about as many that the structure lacks, or
    masses that do not go with its elements. One alone is no sign of it: a PDB file without CONECT records lacks bonds,
    a System whose bonds lie in a neural network lacks them (and may have a restraint), and masses may be anybody's
    choice.

    Raises:
        InputError: naming a bond.
    """
    known, drawn = bonded_pairs(system), {frozenset((a.index, b.index)) for a, b in topology.bonds()}
    masses = [system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(system.getNumParticles())]
    missing = [pair for pair in drawn - known.keys() if all(masses[i] > 0 for i in pair)]
    if not known or not missing:
        return
    neighbours: list[set[int]] = [set() for _ in masses]
    for i, j in map(tuple, drawn):
        neighbours[i].add(j)
        neighbours[j].add(i)
    # The ends of an angle (constrained, or of a Urey-Bradley term) are no bond where the angle's own bonds are known.
    ends = {
        pair for pair in known.keys() - drawn
        if any(all(frozenset((i, k)) in known for i in pair) for k in set.intersection(*(neighbours[i] for i in pair)))
    }  # fmt: skip
    surplus = known.keys() - drawn - ends
    atoms = list(topology.atoms())
    hydrogens = [masses[i] for i, atom in enumerate(atoms) if symbol(atom) == "H"]
    repartitioned = any(1.1 < mass < _HYDROGEN for mass in hydrogens)
    misplaced = [i for i, atom in enumerate(atoms) if masses[i] and (symbol(atom) == "H") != (masses[i] < _HYDROGEN)]
    if 2 * len(surplus) >= len(missing) or (misplaced and not repartitioned):
        i, j = (f"{k} ({symbol(atoms[k])})" for k in min(map(sorted, missing)))
        raise InputError(
            f"{files} are in different orders of atoms: the structure has a bond between atoms {i} and {j}, the System "
            "has none there; write the PDB file from the topology that the System was made of"
        )


def _add_bonds(system: openmm.System, topology: app.Topology, positions: np.ndarray, structure: Path) -> None:
    """Give residues without a single bond those of the System: PDB files of ligands often lack CONECT records."""
    bound = {atom.residue for bond in topology.bonds() for atom in bond}
    atoms = list(topology.atoms())
    bare = {a.index for a in atoms if a.residue not in bound and sum(1 for _ in a.residue.atoms()) > 1}

    def apart(i: int, j: int) -> float:
        return float(np.linalg.norm(positions[i] - positions[j]))

    def near(i: int, j: int) -> bool:
        """Closer than restraints and 1-4 terms, which stand among the bonds of a System."""
        return apart(i, j) < _LONGEST[(symbol(atoms[i]) == "H") + (symbol(atoms[j]) == "H")]

    known = {pair for pair in bonded_pairs(system) if pair <= bare and near(*pair)}
    neighbours: dict[int, set[int]] = {i: set() for i in bare}
    for i, j in map(tuple, known):
        neighbours[i].add(j)
        neighbours[j].add(i)

    def is_bond(i: int, j: int) -> bool:
        """Not the ends of an angle, which constraints and Urey-Bradley terms join; but the side of a ring of three."""
        side = apart(i, j) < _THREE_RING and "H" not in (symbol(atoms[i]), symbol(atoms[j]))
        return side or all(apart(i, j) < max(apart(i, k), apart(k, j)) for k in neighbours[i] & neighbours[j])

    found = sorted(pair for pair in map(sorted, known) if is_bond(*pair))
    for i, j in found:
        topology.addBond(atoms[i], atoms[j])
    if found:
        names = sorted({atoms[i].residue.name for i, _ in found})
        warnings.warn(
            f"{structure} has no bonds (CONECT records) of {', '.join(names)}; those of the System are taken",
            stacklevel=2,
        )


def _system_from_force_field(config: SystemConfig, folder: Path, topology: app.Topology) -> openmm.System:
    """A System from force-field files; nothing is constrained unless asked, no mass is moved."""
    files = [str(folder / name) if (folder / name).is_file() else name for name in config.force_field]
    constraints = None if config.constraints == "None" else getattr(app, config.constraints)
    try:
        return app.ForceField(*files).createSystem(
            topology,
            nonbondedMethod=getattr(app, config.nonbonded_method),
            nonbondedCutoff=config.nonbonded_cutoff * unit.nanometer,
            constraints=constraints,
            rigidWater=constraints is not None,
            removeCMMotion=False,
        )
    except Exception as error:  # missing files, unmatched residues and wrong options raise different types
        raise InputError(f"force field {', '.join(config.force_field)} does not fit {folder}: {error}") from error
