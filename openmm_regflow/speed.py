"""Energies, samples and densities per second of a molecule on this machine."""

import time
from collections.abc import Callable
from typing import Any

import torch

from openmm_regflow import flows
from openmm_regflow.device import synchronize
from openmm_regflow.potentials import OpenMMPotential, TorchPotential, cpu_platform
from openmm_regflow.systems import MolecularSystem


def speed_table(molecule: MolecularSystem, n: int, device: torch.device, seed: int) -> list[tuple[str, str]]:
    """Energies, samples and densities per second on this machine."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.as_tensor(molecule.positions) + 0.003 * torch.randn(n, molecule.n_atoms, 3, generator=generator).double()
    rows: list[tuple[str, str]] = []

    def measure(name: str, call: Callable[[], Any], work: int) -> None:
        call()
        times = []
        for _ in range(3):
            synchronize(device)
            began = time.perf_counter()
            call()
            synchronize(device)
            times.append(time.perf_counter() - began)
        rows.append((name, f"{work / min(times):,.0f}"))

    few = x[: min(n, 2000)]
    slow = OpenMMPotential(molecule.system, cpu_platform(molecule.system) if device.type == "cpu" else None)
    measure("energies, OpenMMPotential", lambda: slow(few), len(few))
    quick = TorchPotential(molecule.system, dtype=torch.float32, device=device)
    measure("energies, TorchPotential float32", lambda: quick(x.float().to(device)), n)
    measure("energies and forces, TorchPotential float32", lambda: quick.energy_and_forces(x.float().to(device)), n)
    coordinates = flows.coordinates_for(molecule.topology, x)
    for factory in (flows.real_nvp, flows.res_nvp, flows.spline, flows.jet):
        flow = factory(coordinates).to(device)
        measure(f"samples with log q, {factory.__name__}", lambda flow=flow: flow.sample(n), n)  # type: ignore[misc]
        measure(f"densities, {factory.__name__}", lambda flow=flow: flow.log_prob(x.to(device)), n)  # type: ignore[misc]
    return rows
