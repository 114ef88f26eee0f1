"""Builds every ``<name>/structure.pdb`` here: ideal internal coordinates, hydrogens, minimisation in its System.

Run with ``python systems/build_structures.py``. Heavy atoms come from standard peptide bond lengths, angles and
torsions (beta-region backbone, trans peptide bonds, L residues); ``Modeller.addHydrogens`` places the hydrogens.
"""

from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit

from openmm_regflow.systems import load_system

SEQUENCES = {
    "alanine-dipeptide": ("ACE", "ALA", "NME"),
    "alanine-tripeptide": ("ALA", "ALA", "ALA"),
    "alanine-tetrapeptide": ("ACE", "ALA", "ALA", "ALA", "NME"),
    "alanine-hexapeptide": ("ACE", "ALA", "ALA", "ALA", "ALA", "ALA", "NME"),
}
PHI, PSI, OMEGA = -80.0, 150.0, 180.0


def place(a: np.ndarray, b: np.ndarray, c: np.ndarray, bond: float, angle: float, torsion: float) -> np.ndarray:
    """The point d with distance cd = ``bond`` [nm], angle bcd and dihedral abcd [degrees], shape `(3,)`."""
    angle, torsion = np.radians([angle, torsion])
    e1 = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, e1)
    normal /= np.linalg.norm(normal)
    e2 = np.cross(normal, e1)
    return c + bond * (
        -np.cos(angle) * e1 + np.sin(angle) * (np.cos(torsion) * e2 + np.sin(torsion) * normal)
    )


def first_residue(name: str) -> dict[str, np.ndarray]:
    """Heavy atoms of residue 0 (``ACE`` or an uncapped ``ALA``), name -> position [nm]."""
    if name == "ACE":
        ch3, c = np.zeros(3), np.array([0.152, 0.0, 0.0])
        return {"CH3": ch3, "C": c, "O": c + 0.123 * np.array([0.5, np.sqrt(0.75), 0.0])}
    n, ca = np.zeros(3), np.array([0.1458, 0.0, 0.0])
    c = ca + 0.152 * np.array([0.36, 0.933, 0.0])
    atoms = {"N": n, "CA": ca, "C": c}
    atoms["CB"] = place(c, n, ca, 0.153, 110.0, -122.5)
    atoms["O"] = place(n, ca, c, 0.123, 120.5, PSI + 180.0)
    return atoms


def next_residue(name: str, before: dict[str, np.ndarray], last: bool) -> dict[str, np.ndarray]:
    """Heavy atoms of the residue that follows ``before``, name -> position [nm]."""
    if "N" in before:
        n = place(before["N"], before["CA"], before["C"], 0.1335, 116.6, PSI)
        alpha = before["CA"]
    else:
        n = place(before["O"], before["CH3"], before["C"], 0.1335, 116.6, 180.0)
        alpha = before["CH3"]
    ca = place(alpha, before["C"], n, 0.1458, 121.7, OMEGA)
    if name == "NME":
        return {"N": n, "C": ca}
    c = place(before["C"], n, ca, 0.152, 111.0, PHI)
    atoms = {"N": n, "CA": ca, "C": c}
    atoms["CB"] = place(before["C"], n, ca, 0.153, 110.0, PHI - 122.5)
    atoms["O"] = place(n, ca, c, 0.123, 120.5, PSI + 180.0)
    if last:
        atoms["OXT"] = place(n, ca, c, 0.125, 117.0, PSI)
    return atoms


def heavy_atoms(sequence: tuple[str, ...]) -> tuple[app.Topology, np.ndarray]:
    """Topology and positions [nm] of the heavy atoms of a peptide."""
    topology = app.Topology()
    chain = topology.addChain("A")
    positions, atoms = [], {}
    for number, name in enumerate(sequence):
        atoms = first_residue(name) if number == 0 else next_residue(name, atoms, number == len(sequence) - 1)
        residue = topology.addResidue(name, chain)
        for atom, position in atoms.items():
            topology.addAtom(atom, app.Element.getBySymbol(atom[0]), residue)
            positions.append(position)
    topology.createStandardBonds()
    return topology, np.array(positions)


def is_left_handed(topology: app.Topology, positions: np.ndarray) -> bool:
    """Whether every alanine is an L residue: (N-CA) x (C-CA) . (CB-CA) > 0."""
    for residue in topology.residues():
        at = {atom.name: positions[atom.index] for atom in residue.atoms()}
        if "CB" in at and np.linalg.det([at["N"] - at["CA"], at["C"] - at["CA"], at["CB"] - at["CA"]]) <= 0:
            return False
    return True


def build(folder: Path, sequence: tuple[str, ...]) -> None:
    """Writes ``folder/structure.pdb``, minimised in the System that ``folder/system.toml`` describes."""
    pdb = folder / "structure.pdb"
    topology, positions = heavy_atoms(sequence)
    modeller = app.Modeller(topology, positions * unit.nanometer)
    modeller.addHydrogens(app.ForceField("amber14-all.xml"), pH=7.0, platform=openmm.Platform.getPlatform("Reference"))
    with pdb.open("w") as file:
        app.PDBFile.writeFile(modeller.topology, modeller.positions, file)
    molecule = load_system(folder)
    context = openmm.Context(molecule.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(molecule.positions)
    openmm.LocalEnergyMinimizer.minimize(context, 0.1)
    state = context.getState(positions=True, energy=True)
    with pdb.open("w") as file:
        app.PDBFile.writeFile(molecule.topology, state.getPositions(), file)
    minimised = state.getPositions(asNumpy=True)._value
    if not is_left_handed(molecule.topology, minimised):
        raise SystemExit(f"{folder.name}: a residue is not L after minimisation")
    print(folder.name, molecule.system.getNumParticles(), "atoms,", state.getPotentialEnergy())


if __name__ == "__main__":
    for name, residues in SEQUENCES.items():
        build(Path(__file__).parent / name, residues)
