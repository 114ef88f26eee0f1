"""What TorchPotential covers: the table of docs/potentials.md, made and checked here.

    python tests/test_potentials_table.py        # write the table anew
"""

import inspect
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from openmm import app, unit

from openmm_regflow.errors import UnsupportedForceError
from openmm_regflow.potentials import OpenMMPotential, TorchPotential
from openmm_regflow.systems import load_system

DOCUMENT = Path(__file__).parents[1] / "docs" / "potentials.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
ENERGY_RTOL, ENERGY_ATOL, FORCE_RTOL = 1e-9, 1e-6, 1e-7
PEPTIDES = ["alanine-dipeptide", "alanine-tripeptide", "alanine-tetrapeptide", "alanine-hexapeptide"]
FORCE_FIELDS = {name: f"{name}{'-all' if name in ('amber14', 'amber19') else ''}.xml"
                for name in ("amber99sbildn", "amber14", "amber19", "charmm36")}  # fmt: skip
SOLVENTS = {"vacuum": [], **{m.upper(): [f"implicit/{m}.xml"] for m in ("hct", "obc1", "obc2", "gbn", "gbn2")}}
#: More atoms than this and a batch of conformations takes minutes.
LARGEST = 1000


def verdict(system, positions):
    """``passes``, or what was raised; a disagreement is an assertion error."""
    rng = np.random.default_rng(1)
    x = np.concatenate([positions + rng.normal(size=(2, *positions.shape)) * s for s in (0.002, 0.02, 0.08)])
    try:
        potential = TorchPotential(system)
    except UnsupportedForceError as error:
        return f"raises: {str(error).split(' is ')[0]}"
    energy, forces = OpenMMPotential(system, platform="Reference").energy_and_forces(x)
    got, got_forces = potential.energy_and_forces(x)
    torch.testing.assert_close(got, energy, rtol=ENERGY_RTOL, atol=ENERGY_ATOL)
    scale = forces.abs().amax((1, 2), keepdim=True).clamp(min=1.0)
    assert ((got_forces - forces).abs() / scale).max() <= FORCE_RTOL
    return "passes"


def peptide_rows(peptides=PEPTIDES):
    rows = ["| peptide | force field | " + " | ".join(SOLVENTS) + " |", "|---" * (2 + len(SOLVENTS)) + "|"]
    for peptide in peptides:
        molecule = load_system(peptide)
        for name, file in FORCE_FIELDS.items():
            cells = [peptide_cell(molecule, [file, *extra]) for extra in SOLVENTS.values()]
            rows.append(f"| {peptide} | {name} | " + " | ".join(cells) + " |")
    return rows


@lru_cache
def force_field(*files):
    return app.ForceField(*files)


def peptide_cell(molecule, files):
    try:
        system = force_field(*files).createSystem(molecule.topology, constraints=None)
    except Exception as error:  # ForceField raises plain Exception for a residue without a unique template
        return "two templates" if "Multiple" in str(error) else "no template"
    return verdict(system, molecule.positions)


def subclasses(parent):
    for child in parent.__subclasses__():
        yield child
        yield from subclasses(child)


def rows_of_testsystems():
    from openmmtools import testsystems

    rows = ["| openmmtools.testsystems | particles | verdict |", "|---|---|---|"]
    for cls in sorted(set(subclasses(testsystems.TestSystem)), key=lambda c: c.__name__):
        keywords = {"constraints": None} if "constraints" in inspect.signature(cls.__init__).parameters else {}
        try:
            built = cls(**keywords)
        except Exception:  # data files or packages that this installation lacks
            continue
        n_atoms = built.system.getNumParticles()
        if built.system.usesPeriodicBoundaryConditions() or n_atoms > LARGEST:
            continue
        positions = np.asarray(built.positions.value_in_unit(unit.nanometer))
        rows.append(f"| {cls.__name__} | {n_atoms} | {verdict(built.system, positions)} |")
    return rows


def table():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return "\n".join([*peptide_rows(), "", *rows_of_testsystems()])


@pytest.mark.slow
def test_documented_table_is_what_this_installation_does():
    text = DOCUMENT.read_text()
    documented = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert documented == table()


@pytest.mark.parametrize("peptide", ["alanine-dipeptide", "alanine-tripeptide"])
@pytest.mark.parametrize("files", [["amber14-all.xml", "implicit/gbn2.xml"], ["amber19-all.xml", "implicit/obc1.xml"]])
def test_two_of_the_table_in_every_run(peptide, files):
    assert peptide_cell(load_system(peptide), files) == "passes"


def test_charmm_with_its_maps_in_every_run():
    assert peptide_cell(load_system("alanine-tripeptide"), ["charmm36.xml"]) == "passes"


def test_the_systems_of_this_package():
    for peptide in PEPTIDES[:2]:
        molecule = load_system(peptide)
        assert verdict(molecule.system, molecule.positions) == "passes"


if __name__ == "__main__":
    head, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(f"{head}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")
