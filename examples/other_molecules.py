"""Molecules that nothing here was made for: from a residue's name to a flow, by the commands that a user has.

    python examples/other_molecules.py runs/others [PRO SER VAL PHE] [--iterations 2000]

Each Ace-X-Nme is alanine dipeptide with another side chain (PDBFixer), in the same force field and implicit solvent:
a ring (PRO), a hydroxyl that turns (SER), a branched chain (VAL), an aromatic ring (PHE). Three runs of parallel
tempering make its frames (training, validation, test), one file of settings (other_molecules.toml), the same for all,
its flow. Every step is a command of `openmm-regflow`, printed before it runs; what is finished is not run again. The
table goes to FOLDER/table.json and to the screen.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import openmm
from openmm import app
from pdbfixer import PDBFixer

import openmm_regflow as rf
from openmm_regflow.systems import load_system

SYSTEM = """\
name = "{name}"
description = "Ace-{residue}-Nme, implicit solvent"
structure = "structure.pdb"
force_field = ["amber99sbildn.xml", "amber99_obc.xml"]
temperature = 300.0
nonbonded_method = "NoCutoff"
"""
SETTINGS = Path(__file__).with_suffix(".toml")
#: Runs of parallel tempering: their seeds, and their length as a share of the training run's.
RUNS = {"train": (1, 1.0), "validation": (2, 0.3), "test": (3, 0.5)}


def write_molecule(residue: str, folder: Path) -> None:
    """Ace-X-Nme as a system folder, minimised."""
    alanine = load_system("alanine-dipeptide").folder / "structure.pdb"
    fixer = PDBFixer(filename=str(alanine))
    chain = next(fixer.topology.chains())
    number = next(r.id for r in chain.residues() if r.name == "ALA")
    fixer.applyMutations([f"ALA-{number}-{residue}"], chain.id)
    fixer.findMissingResidues()
    fixer.findMissingAtoms()
    fixer.addMissingAtoms(seed=1)
    modeller = app.Modeller(fixer.topology, fixer.positions)
    modeller.delete([a for a in modeller.topology.atoms() if a.element is app.element.hydrogen])
    modeller.addHydrogens(app.ForceField("amber99sbildn.xml"), pH=7.0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "system.toml").write_text(SYSTEM.format(name=f"ace-{residue.lower()}-nme", residue=residue.title()))
    pdb = folder / "structure.pdb"
    with pdb.open("w") as file:
        app.PDBFile.writeFile(modeller.topology, modeller.positions, file)
    molecule = load_system(folder)
    context = openmm.Context(molecule.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    context.setPositions(molecule.positions)
    openmm.LocalEnergyMinimizer.minimize(context, 0.1)
    with pdb.open("w") as file:
        app.PDBFile.writeFile(molecule.topology, context.getState(positions=True).getPositions(), file)


def command(*words: object, done: Path) -> None:
    """Run a command of the package, unless what it makes is there."""
    if done.exists():
        return
    line = [str(word) for word in words]
    print("$ openmm-regflow", *line, flush=True)
    subprocess.run([sys.executable, "-m", "openmm_regflow", *line], check=True)


def study(residue: str, folder: Path, iterations: int) -> dict[str, object]:
    """All commands for one molecule; its row of the table."""
    system = folder / "system"
    if not (system / "structure.pdb").exists():
        write_molecule(residue, system)
    data = {}
    for name, (seed, share) in RUNS.items():
        output = folder / name
        data[name] = output / "trajectory.h5"
        length = ("--iterations", round(share * iterations), "--seed", seed)
        command("simulate", system, *length, "--output", output, done=data[name])
    flow = folder / "flow"
    given = ("--config", SETTINGS, "--data", data["train"], "--validation", data["validation"])
    command("train", system, *given, "--output", flow, done=flow / "flow.safetensors")
    test = ("--system", system, "--data", data["test"])
    stages = {"before refinement": flow / "phases" / "likelihood.safetensors", "refined": flow / "flow.safetensors"}
    found = {}
    for name, file in stages.items():
        output = folder / f"figures of {name}"
        command("evaluate", file, "-n", 100_000, *test, "--output", output, done=output / "metrics.json")
        found[name] = json.loads((output / "metrics.json").read_text())
    training = rf.Flow.load(stages["refined"]).metadata.training
    seconds = sum(training["seconds"].values())
    n_atoms = load_system(system).n_atoms
    return {"atoms": n_atoms, "energies": training["energies"], "minutes": seconds / 60} | found


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("residues", nargs="*", default=["PRO", "SER", "VAL", "PHE"])
    parser.add_argument("--iterations", type=int, default=2000, help="of parallel tempering, for training frames")
    options = parser.parse_args()
    table = {}
    for residue in options.residues:
        table[residue] = study(residue, options.folder / residue.lower(), options.iterations)
        (options.folder / "table.json").write_text(json.dumps(table, indent=1))
    print("| Ace-X-Nme | atoms | before refinement | refined | without the top 0.2 % | k-hat | energies | minutes |")
    print("|---|---|---|---|---|---|---|---|")
    for residue, row in table.items():
        first, last = row["before refinement"], row["refined"]
        print(
            f"| {residue.title()} | {row['atoms']} | {100 * first['ess']:.1f} ± {100 * first['ess_error']:.1f} % "
            f"| {100 * last['ess']:.1f} ± {100 * last['ess_error']:.1f} % | {100 * last['ess_truncated']:.1f} % "
            f"| {last['k_hat']:.2f} | {row['energies'] / 1e6:.1f} million | {row['minutes']:.0f} |"
        )


if __name__ == "__main__":
    main()
