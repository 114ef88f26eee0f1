"""Part 4: energies and forces per second, against OpenMM's fastest platform in the same run."""

from typing import Any

import numpy as np
import openmm
import torch

from openmm_regflow import OpenMMPotential, TorchPotential, load_system
from speed.clock import race

PEPTIDES = ("alanine-dipeptide", "alanine-hexapeptide")
KINDS = ("compiled energies", "eager energies", "compiled forces")


def frames(molecule: Any, n: int = 2048) -> torch.Tensor:
    """Positions `(n, n_atoms, 3)` [nm], float32: the structure with noise of 3 pm."""
    noise = np.random.default_rng(0).normal(size=(n, *molecule.positions.shape))
    return torch.tensor(molecule.positions + 0.003 * noise, dtype=torch.float32)


def openmm_rates(molecule: Any, seconds: float = 0.5) -> dict[str, Any]:
    """The fastest platform, its energies and its Langevin steps per second of process time."""
    potential, x = OpenMMPotential(molecule.system), frames(molecule)
    engine = potential.engine(x.double().numpy())
    integrator = openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.0005)
    platform = openmm.Platform.getPlatformByName(engine.platform)
    context = openmm.Context(molecule.system, integrator, platform, engine.properties)
    context.setPositions(molecule.positions)
    context.setVelocitiesToTemperature(300.0, 1)
    best = race({"energies": lambda: potential(x[:200]), "steps": lambda: integrator.step(200)}, seconds)
    return {"platform": engine.platform, **{name: 200 / took for name, took in best.items()}}


def torch_rate(molecule: Any, kind: str, seconds: float = 0.5) -> float:
    """Configurations per second of process time of `TorchPotential` in float32."""
    x = frames(molecule)
    potential = TorchPotential(molecule.system, dtype=torch.float32, compile=kind.startswith("compiled"))
    function = potential.energy_and_forces if kind.endswith("forces") else potential
    return len(x) / race({kind: lambda: function(x)}, seconds)[kind]


def measure(seconds: float = 0.5) -> dict[str, Any]:
    """Rates of both engines and their ratio, one thread."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in PEPTIDES:
        molecule = load_system(name)
        engine = openmm_rates(molecule, seconds)
        rows = {}
        for kind in KINDS:
            rate = torch_rate(molecule, kind, seconds)
            against = engine["steps" if kind.endswith("forces") else "energies"]
            rows[kind] = {"per second": rate, "ratio": rate / against}
        found[name] = {"OpenMM": engine, "TorchPotential": rows}
    return found
