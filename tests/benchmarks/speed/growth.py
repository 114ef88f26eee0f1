"""Part 6: time and memory per sample as molecules and batches grow, and one million samples in bounded memory.

Molecules are alanine peptides Ace-Ala(n)-Nme and the shipped tripeptide, 22 to 202 atoms, each in its System with
implicit solvent. Flows are untrained splines of one size (8 couplings, 128 units, 8 and 4 bins) on internal
coordinates.
"""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch

from openmm_regflow import Flow, FlowProposal, OpenMMPotential, TorchPotential, flows, load_system, reweighting
from speed.clock import ROOT, exponent, once, peak_memory, race
from speed.energies import frames

SYSTEMS = ("alanine-dipeptide", "alanine-tripeptide", "alanine-tetrapeptide", "alanine-hexapeptide")
#: Ace-Ala(19)-Nme; 12 + 10 n atoms.
LONG = ("ACE", *("ALA",) * 19, "NME")
BATCHES = (1, 10, 100, 1000, 10_000, 100_000)
SIZE = 1024
#: Weights are so small that memory, which the kernel counts in pages, shows only in a million of them.
MANY_WEIGHTS = 1_000_000


def long_peptide() -> Any:
    """A peptide of 202 atoms, built like the shipped ones and in the System of alanine hexapeptide."""
    path = ROOT / "systems" / "build_structures.py"
    spec = importlib.util.spec_from_file_location("build_structures", path)
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "alanine-200"
        place.mkdir()
        (place / "system.toml").write_text((ROOT / "systems" / "alanine-hexapeptide" / "system.toml").read_text())
        builder.build(place, LONG)
        return load_system(place)


def measure(seconds: float = 0.3, million: int = 1_000_000) -> dict[str, Any]:
    """Seconds and bytes per sample by number of atoms and by size of the batch; exponents; one million samples."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    molecules = [*(load_system(name) for name in SYSTEMS), long_peptide()]
    rows = [of_molecule(molecule, seconds) for molecule in molecules]
    atoms = [row["atoms"] for row in rows]
    fitted = {
        what: {part: slope(atoms, [row[what][part] for row in rows]) for part in rows[0][what]}
        for what in ("microseconds", "kilobytes")
    }
    found = {"batch": SIZE, "rows": rows, "exponents": fitted, "batches": batches(seconds)}
    return found | ({"million": many(million)} if million else {})


def slope(atoms: list[int], values: list[float]) -> float | None:
    """The exponent of a power law; None where a value is zero (memory below one page)."""
    return exponent(atoms, values) if min(values) > 0 else None


def of_molecule(molecule: Any, seconds: float) -> dict[str, Any]:
    """One row: flow, energies in torch (eager, float32), in OpenMM, and weights."""
    x = frames(molecule, SIZE)
    coordinates = flows.coordinates_for(molecule.topology, frames(molecule, 2 * SIZE).double())
    flow = flows.spline(coordinates, n_layers=8, hidden=128, depth=1, line_bins=4)
    torch_potential = TorchPotential(molecule.system, dtype=torch.float32)
    # One platform for all sizes: the fastest one changes between 33 and 62 atoms.
    engine = OpenMMPotential(molecule.system, "CPU", properties={"Threads": "1"})
    log_w = torch.randn(SIZE)
    calls = {
        "flow": lambda: flow.sample(SIZE),
        "energies, torch": lambda: torch_potential(x),
        "energies, OpenMM": lambda: engine(x[:32]),
        "weights": lambda: reweighting.effective_sample_size(log_w),
    }
    times = race(calls, seconds)
    sizes = {"energies, OpenMM": 32}
    # Far more samples than one chunk would show the size of the chunk; these are within one.
    many_log_w = torch.randn(MANY_WEIGHTS)
    calls |= {
        "energies, OpenMM": lambda: engine(x),
        "weights": lambda: reweighting.effective_sample_size(many_log_w),
    }
    memory = {name: peak_memory(call) for name, call in calls.items()}
    return {
        "atoms": molecule.n_atoms,
        "microseconds": {name: 1e6 * took / sizes.get(name, SIZE) for name, took in times.items()},
        "kilobytes": {k: used / (MANY_WEIGHTS if k == "weights" else SIZE) / 1024 for k, used in memory.items()},
    }


def batches(seconds: float) -> dict[str, dict[str, float]]:
    """Microseconds per sample of alanine dipeptide by size of the batch."""
    molecule = load_system("alanine-dipeptide")
    flow, potential = Flow.load(molecule.folder / "flow.safetensors"), TorchPotential(molecule.system, torch.float32)
    found: dict[str, dict[str, float]] = {}
    for n in BATCHES:
        x = frames(molecule, n)
        calls = {"flow": lambda n=n: flow.sample(n), "energies, torch": lambda x=x: potential(x)}
        # The largest batches last seconds: once is enough.
        times = race(calls, seconds) if n <= 10_000 else {name: once(call) for name, call in calls.items()}
        found[str(n)] = {name: 1e6 * took / n for name, took in times.items()}
    return found


def many(n: int) -> dict[str, float]:
    """Samples, densities, energies and weights of n conformations of alanine dipeptide in one call."""
    molecule = load_system("alanine-dipeptide")
    flow = Flow.load(molecule.folder / "flow.safetensors").fuse()
    potential = TorchPotential(molecule.system, dtype=torch.float32, compile=True)
    proposal = FlowProposal(flow, potential, molecule.temperature)
    proposal.sample(10_000)  # compiles
    held: list[Any] = []
    seconds: list[float] = []

    def run() -> None:
        seconds.append(once(lambda: held.append(proposal.sample(n))))

    peak = peak_memory(run)
    result = sum(t.numel() * t.element_size() for t in held[0])
    ess = reweighting.effective_sample_size(held[0].log_weights)
    return {"n": n, "seconds": seconds[0], "peak bytes": peak, "bytes of the result": float(result), "ESS": ess}
