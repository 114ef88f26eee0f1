"""Molecular systems: the named peptides, a user's own files, fingerprints, and analytic toys with exact answers.

A system is a folder with a ``system.toml`` (see :class:`SystemConfig`) and a structure, and possibly reference
trajectories in ``reference/{train,validation,test}.h5``. The named ones travel with the package.
"""

import hashlib
import math
import re
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openmm
import torch
from openmm import app, unit
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from openmm_regflow.errors import CorruptFileError, InputError
from openmm_regflow.units import temperature_kelvin, thermal_energy, to_float

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

#: Forces that change neither the potential energy nor the distribution of positions.
_NOT_ENERGIES = ("CMMotionRemover", "AndersenThermostat")
#: Attributes of a serialised System that change no energy, and those of a force that say what it is called.
_NOT_PARAMETERS, _NAMES = {"forceGroup", "version"}, {"name", "type"}
#: Fingerprints of version 1 left out the names and types of everything, those of parameters, functions, computed values
#: and particles too, so that energies which differ by them alone had one fingerprint.
FINGERPRINT_VERSION = 2


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
    def chiral_centres(self) -> np.ndarray:
        """Atom indices (CA, N, C, CB) of every residue that has them, int `(k, 4)`."""
        names = [{atom.name: atom.index for atom in residue.atoms()} for residue in self.topology.residues()]
        rows = [[at[name] for name in ("CA", "N", "C", "CB")] for at in names if {"CA", "N", "C", "CB"} <= set(at)]
        return np.array(rows, dtype=np.int64).reshape(-1, 4)

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
        return load_trajectory(path, self.topology)


def load_trajectory(path: Path | str, topology: app.Topology) -> np.ndarray:
    """Positions from an HDF5 trajectory in mdtraj's format, checked against a topology.

    Args:
        path: file written by mdtraj or by :func:`openmm_regflow.simulate.export_hdf5`.
        topology: the molecule that it has to show, atom for atom.

    Returns:
        Positions [nm], float32 `(n_frames, n_atoms, 3)`.

    Raises:
        InputError: no such file, another molecule, fewer than two frames, or no PyTables.
        CorruptFileError: truncated or damaged file, or positions that are not finite.
    """
    from mdtraj.formats import HDF5TrajectoryFile

    path = Path(path)
    if not path.is_file():
        raise InputError(f"no trajectory at {path}; check the path")
    try:
        with HDF5TrajectoryFile(str(path), "r") as file:
            elements = [atom.element.symbol for atom in file.topology.atoms]
            frames = file.read(atom_indices=None).coordinates
    except ImportError as error:
        raise InputError(f"{path} cannot be read: mdtraj needs PyTables, which cannot be imported") from error
    except Exception as error:  # h5py, tables and mdtraj raise a dozen unrelated types on damaged files
        raise CorruptFileError(
            f"{path} is not a readable HDF5 trajectory ({type(error).__name__}); copy or simulate it again"
        ) from error
    expected = [atom.element.symbol for atom in topology.atoms()]
    check_molecule(elements, expected, str(path))
    if frames is None or len(frames) < 2:
        raise InputError(f"{path} holds {0 if frames is None else len(frames)} frame(s); at least two are needed")
    if not np.isfinite(frames).all():
        raise CorruptFileError(f"{path} holds positions that are not finite; simulate it again")
    return np.ascontiguousarray(frames, dtype=np.float32)


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
            if kind != "omega" and "CB" not in names[i] and "HA2" not in names[i]:
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
    force_field: tuple[str, ...] | list[str] | None = None,
    system_xml: str | Path | None = None,
    temperature: Any = None,
    nonbonded_method: str | None = None,
    nonbonded_cutoff: Any = None,
    constraints: str | None = None,
) -> MolecularSystem:
    """Loads a named system, a user's folder, or a user's PDB with a force field or a serialised System.

    Args:
        source: a name from :func:`available_systems`, a folder with ``system.toml``, or a PDB file.
        force_field: OpenMM force-field files, for a PDB.
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
    overrides = {
        "force_field": tuple(force_field) if force_field else None,
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
        return systems_folder() / source
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
        values = tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid TOML: {error}") from error
    for key, other in (("force_field", "system_xml"), ("system_xml", "force_field")):
        if key in overrides:
            values.pop(other, None)
    return _validate({"name": folder.resolve().name, **values, **overrides}, str(file))


def _validate(values: dict[str, Any], place: str) -> SystemConfig:
    """A checked configuration; pydantic's report becomes one line."""
    try:
        return SystemConfig(**values)
    except ValidationError as error:
        parts = [f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()]
        raise InputError(f"{place}: {'; '.join(parts)}; known keys: {', '.join(SystemConfig.model_fields)}") from error


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
        system = openmm.XmlSerializer.deserialize(path.read_text())
    except Exception as error:  # SWIG raises a bare Exception or OpenMMException
        raise InputError(f"{path} is not a serialised System: {error}") from error
    if not isinstance(system, openmm.System):
        raise InputError(f"{path} holds a {type(system).__name__}, not an openmm.System")
    if system.getNumParticles() != n_atoms:
        raise InputError(
            f"{path} has {system.getNumParticles()} particles, the structure {n_atoms}; give a matching pair"
        )
    return system


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


def fingerprint(system: openmm.System, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What decides whether two Systems share one energy function, in a form that fits JSON.

    Numbers are rounded to nine digits, so that the last bit of a parsed parameter does not matter; names, force
    groups and centre-of-mass removal do not matter either. Masses are listed but left out of ``sha256``: they do
    not change the distribution of positions, and hydrogen mass repartitioning has to stay possible.

    Args:
        system: any.
        like: a stored fingerprint, in whose version this one is made so that the two can be compared; None: the newest.

    Returns:
        ``version``, absent from the first; ``n_atoms``; ``masses`` [dalton]; ``forces``: one
        ``{"type", "terms", "sha256"}`` per force (constraints, virtual sites and a periodic box count as forces),
        sorted; ``sha256`` over atoms and forces.

    Raises:
        InputError: ``like`` is of a version that this package does not know.
    """
    version = FINGERPRINT_VERSION if like is None else like.get("version", 1)
    if version not in (1, FINGERPRINT_VERSION):
        raise InputError(f"the stored fingerprint of a System has version {version}; update the package to compare it")
    root = ElementTree.fromstring(openmm.XmlSerializer.serialize(system))
    masses = [system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(system.getNumParticles())]
    parts = {part.tag: part for part in root}
    nodes = [(node.attrib["type"], node) for node in parts["Forces"] if node.attrib["type"] not in _NOT_ENERGIES]
    if len(parts["Constraints"]):
        nodes.append(("Constraints", parts["Constraints"]))
    if any(len(node) for node in parts["Particles"]):
        nodes.append(("VirtualSites", parts["Particles"]))
    if system.usesPeriodicBoundaryConditions():
        nodes.append(("PeriodicBox", parts["PeriodicBoxVectors"]))
    forces = sorted((_describe(kind, node, version) for kind, node in nodes), key=lambda f: (f["type"], f["sha256"]))
    digest = hashlib.sha256(repr((len(masses), [(f["type"], f["sha256"]) for f in forces])).encode()).hexdigest()
    found = {"n_atoms": len(masses), "masses": masses, "forces": forces, "sha256": digest}
    return found if version == 1 else {"version": version} | found


def _describe(kind: str, node: ElementTree.Element, version: int) -> dict[str, Any]:
    """Type, number of terms and hash of one serialised force."""
    terms = max((len(child) for child in node), default=0) if kind not in ("Constraints", "PeriodicBox") else len(node)
    return {"type": kind, "terms": terms, "sha256": hashlib.sha256(_canonical(node, version).encode()).hexdigest()}


def _canonical(node: ElementTree.Element, version: int) -> str:
    """Text of an XML element with sorted attributes and rounded numbers, without what does not change an energy."""
    drop = _NOT_PARAMETERS | ({"mass"} if node.tag == "Particle" else set())
    drop |= _NAMES if node.tag == "Force" or version == 1 else set()
    attributes = [f"{key}={_rounded(value)}" for key, value in sorted(node.items()) if key not in drop]
    return f"<{node.tag} {' '.join(attributes)}>{''.join(_canonical(child, version) for child in node)}</>"


def _rounded(text: str) -> str:
    """Nine significant digits of a number, anything else as it is."""
    try:
        return f"{float(text) + 0.0:.9g}"
    except ValueError:
        return text


def compare_fingerprints(
    a: dict[str, Any], b: dict[str, Any], *, masses: bool = False, extra_forces: bool = False
) -> list[str]:
    """Differences between two fingerprints of one version in words; empty where the energies are the same.

    Args:
        a: the one that is expected.
        b: the one that is there.
        masses: report differing masses as well; they do not change the distribution of positions.
        extra_forces: forces of `b` beside those of `a`, such as a bias, are no difference.

    Returns:
        One line per difference.
    """
    lines = []
    if a["n_atoms"] != b["n_atoms"]:
        lines.append(f"{a['n_atoms']} atoms expected, {b['n_atoms']} found")
    if extra_forces:
        known = {(force["type"], force["sha256"]) for force in a["forces"]}
        missing = known - {(force["type"], force["sha256"]) for force in b["forces"]}
        if not missing:
            b = {**b, "forces": a["forces"]}
    types_a, types_b = (Counter(force["type"] for force in f["forces"]) for f in (a, b))
    lines += [f"{kind} is missing" for kind in sorted((types_a - types_b).elements())]
    lines += [f"{kind} is not expected" for kind in sorted((types_b - types_a).elements())]
    for kind in sorted(types_a & types_b):
        lines += _compare_forces(kind, a, b) if types_a[kind] == types_b[kind] else []
    if masses and a["n_atoms"] == b["n_atoms"]:
        moved = [i for i, (m, n) in enumerate(zip(a["masses"], b["masses"])) if not np.isclose(m, n, rtol=1e-9)]
        lines += [f"masses of {len(moved)} atoms differ, first atom {moved[0]}"] if moved else []
    return lines


def _compare_forces(kind: str, a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Differences between equally many forces of one type."""
    hashes_a, hashes_b = ({f["sha256"]: f["terms"] for f in side["forces"] if f["type"] == kind} for side in (a, b))
    if set(hashes_a) == set(hashes_b):
        return []
    terms_a, terms_b = (sorted(n for h, n in x.items() if h not in y) for x, y in
                        ((hashes_a, hashes_b), (hashes_b, hashes_a)))
    if terms_a != terms_b:
        return [f"{kind}: {terms_a} terms expected, {terms_b} found"]
    return [f"{kind}: parameters or atom order differ"]


@dataclass(frozen=True)
class AnalyticSystem:
    """Independent coordinates in external wells: an ``openmm.System`` whose distribution is known exactly.

    Every coordinate sits in a harmonic well, except that of atom 0 along x where ``barrier`` is positive: there
    ``U(x) = barrier (s^2 - 1)^2 + skew s`` with ``s = (x - centre_x) / width``.

    Attributes:
        system: the ``openmm.System`` (``CustomExternalForce`` terms, carbon masses).
        spring: harmonic constant [kJ/mol/nm^2] of the harmonic coordinates.
        centre: minimum of the harmonic wells [nm], `(n_atoms, 3)`.
        temperature: [K] of ``sample`` and, by default, of the free energies.
        barrier: [kJ/mol]; 0 for a plain harmonic well.
        skew: [kJ/mol], lifts the right well and lowers the left one by about this much.
        width: half the distance between the two wells [nm].
    """

    system: openmm.System
    spring: float
    centre: np.ndarray
    temperature: float
    barrier: float = 0.0
    skew: float = 0.0
    width: float = 1.0

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return len(self.centre)

    @property
    def _n_harmonic(self) -> int:
        return 3 * self.n_atoms - (self.barrier > 0)

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """Potential energy [kJ/mol], `(n,)`, of positions `(n, n_atoms, 3)` [nm]; differentiable."""
        displacement = x - torch.as_tensor(self.centre, dtype=x.dtype, device=x.device)
        harmonic = 0.5 * self.spring * displacement.square()
        if not self.barrier:
            return harmonic.sum(dim=(1, 2))
        s = displacement[:, 0, 0] / self.width
        well = self.barrier * (s.square() - 1.0).square() + self.skew * s
        return harmonic.sum(dim=(1, 2)) - harmonic[:, 0, 0] + well

    def log_z(self, temperature: Any = None) -> float:
        """Log of the configurational integral over all coordinates [nm]; the reduced free energy is minus this.

        Args:
            temperature: [K or Quantity]; None for the system's own.
        """
        kt = thermal_energy(self.temperature if temperature is None else temperature)
        harmonic = 0.5 * self._n_harmonic * math.log(2.0 * math.pi * kt / self.spring)
        return harmonic + (math.log(sum(self._well_integrals(kt))) if self.barrier else 0.0)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Exact log-density [1/nm^(3 n_atoms)], `(n,)`, at the system's temperature."""
        return -self.energy(x) / thermal_energy(self.temperature) - self.log_z()

    def delta_f(self, temperature: Any = None) -> float:
        """Free energy of the right well (x > centre) above the left one [kT], exact by quadrature.

        Raises:
            InputError: the system has a single well.
        """
        if not self.barrier:
            raise InputError("a harmonic well has no second basin; use skewed_double_well")
        left, right = self._well_integrals(thermal_energy(self.temperature if temperature is None else temperature))
        return math.log(left / right)

    def _well_integrals(self, kt: float) -> tuple[float, float]:
        """Integrals of exp(-U/kT) over x [nm] left and right of the barrier."""
        grid, density = self._well_density(kt)
        middle = len(grid) // 2
        return (
            float(np.trapezoid(density[: middle + 1], grid[: middle + 1])),
            float(np.trapezoid(density[middle:], grid[middle:])),
        )

    def _well_density(self, kt: float, n: int = 100_001) -> tuple[np.ndarray, np.ndarray]:
        """Grid in x - centre [nm] out to 60 kT above the barrier, and exp(-U/kT) on it."""
        top = (self.barrier + self.skew + 60.0 * kt) / self.barrier
        reach = math.sqrt(1.0 + math.sqrt(top) + self.skew / self.barrier)
        s = np.linspace(-reach, reach, n)
        return s * self.width, np.exp(-(self.barrier * (s**2 - 1.0) ** 2 + self.skew * s) / kt)

    def sample(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Independent, exact samples [nm], float64 `(n, n_atoms, 3)`.

        The double well is drawn by inverting its cumulative distribution, tabulated on 1e5 points.
        """
        kt = thermal_energy(self.temperature)
        noise = torch.randn(n, self.n_atoms, 3, dtype=torch.float64, generator=generator)
        x = math.sqrt(kt / self.spring) * noise
        if self.barrier:
            grid, density = self._well_density(kt)
            cumulative = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
            uniform = torch.rand(n, dtype=torch.float64, generator=generator).numpy()
            x[:, 0, 0] = torch.as_tensor(np.interp(uniform * cumulative[-1], cumulative, grid))
        return x + torch.as_tensor(self.centre)


def harmonic_well(
    n_atoms: int = 1, spring: float = 1000.0, centre: np.ndarray | None = None, temperature: Any = 300.0
) -> AnalyticSystem:
    """Independent atoms in isotropic harmonic wells, ``U = spring/2 |x - centre|^2``.

    Args:
        n_atoms: number of atoms.
        spring: [kJ/mol/nm^2].
        centre: minima [nm], `(n_atoms, 3)`; zeros by default.
        temperature: [K or Quantity].

    Raises:
        InputError: a size, constant or temperature that is not positive.
    """
    return _analytic(n_atoms, spring, centre, temperature)


def skewed_double_well(
    n_atoms: int = 1,
    barrier: float = 10.0,
    skew: float = 2.0,
    width: float = 0.1,
    spring: float = 1000.0,
    temperature: Any = 300.0,
) -> AnalyticSystem:
    """A skewed double well for x of atom 0, harmonic wells for all other coordinates.

    Args:
        n_atoms: number of atoms.
        barrier: height above the wells without the skew [kJ/mol].
        skew: [kJ/mol], at least 0 and below the barrier; the left well is the deeper one.
        width: half the distance between the wells [nm].
        spring: of the harmonic coordinates [kJ/mol/nm^2].
        temperature: [K or Quantity].

    Raises:
        InputError: a value out of range.
    """
    barrier, skew, width = to_float(barrier, "energy"), to_float(skew, "energy"), to_float(width, "length")
    if barrier <= 0 or width <= 0 or not 0 <= skew < barrier:
        raise InputError(f"barrier {barrier}, width {width}, skew {skew}: barrier, width > 0 and 0 <= skew < barrier")
    return _analytic(n_atoms, spring, None, temperature, barrier=barrier, skew=skew, width=width)


def _analytic(
    n_atoms: int, spring: float, centre: np.ndarray | None, temperature: Any, **well: float
) -> AnalyticSystem:
    """Checks the shared arguments and builds the ``openmm.System``."""
    if n_atoms < 1 or spring <= 0:
        raise InputError(f"n_atoms {n_atoms} and spring {spring} must be positive")
    centre = np.zeros((n_atoms, 3)) if centre is None else np.asarray(centre, dtype=np.float64)
    if centre.shape != (n_atoms, 3):
        raise InputError(f"centre has shape {centre.shape}; ({n_atoms}, 3) in nm is needed")
    system = openmm.System()
    for _ in range(n_atoms):
        system.addParticle(12.0)
    for axis, name in enumerate("xyz"):
        force = openmm.CustomExternalForce(f"0.5*k*({name}-c)^2")
        force.addGlobalParameter("k", spring)
        force.addPerParticleParameter("c")
        for atom in range(1 if well and axis == 0 else 0, n_atoms):
            force.addParticle(atom, [centre[atom, axis]])
        system.addForce(force)
    if well:
        force = openmm.CustomExternalForce("barrier*(s^2-1)^2+skew*s; s=x/width")
        for name, value in well.items():
            force.addGlobalParameter(name, value)
        force.addParticle(0, [])
        system.addForce(force)
    return AnalyticSystem(system, spring, centre, temperature_kelvin(temperature), **well)
