"""What this machine offers and whether its parts agree: versions, platforms, devices, transfer of positions."""

import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import openmm
import torch

from openmm_regflow._version import __version__
from openmm_regflow.device import (
    choose_way,
    openmm_properties,
    read_positions,
    why_no_gpu,
    write_positions,
)
from openmm_regflow.device.choice import openmm_remedy
from openmm_regflow.potentials import TorchPotential, platform_names
from openmm_regflow.products import onednn_is_quicker, rounding
from openmm_regflow.systems import load_system

Rows = list[tuple[str, ...]]
PACKAGES = ("openmm", "openmmtools", "torch", "numpy", "mdtraj", "pymbar", "POT", "torchdiffeq", "safetensors")
#: Largest differences [kJ/mol] between two ways to an energy that count as agreement, by precision: rounding of the
#: sum of absolute energies of alanine dipeptide, about 2e3 kJ/mol, with a margin of ten.
AGREEMENT = {"double": 2e3 * 1e-14, "mixed": 2e3 * 1e-5, "single": 2e3 * 1e-5}
#: The same for `TorchPotential` on any device: a GPU has other exponentials and another order of its sums.
TORCH_AGREEMENT = {torch.float64: 2e3 * 1e-12, torch.float32: 2e3 * 1e-5}


def seconds_per_call(call: Callable[[], Any], budget: float = 0.1) -> float:
    """Shortest wall-clock time of a call [s] among as many as fit into ``budget`` [s], after one to warm up."""
    call()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < budget:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def version_rows() -> Rows:
    """(package, version), with what else decides how fast things run."""
    rows: Rows = [("openmm_regflow", __version__), ("Python", f"{platform.python_version()}, {platform.platform()}")]
    for name in PACKAGES:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, "missing"))
    rows.append(("OpenMM library", openmm.Platform.getOpenMMVersion()))
    names = platform_names()
    lacking = torch.cuda.is_available() and "CUDA" not in names
    rows.append(("OpenMM platforms", ", ".join(names) + (f"; no CUDA: {openmm_remedy()}" if lacking else "")))
    rows.append(("OpenMM plugins that failed to load", plugin_failures(openmm.Platform.getPluginLoadFailures())))
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    rows.append(("C++ compiler for compile=True", "found" if compiler else "missing; everything runs eagerly"))
    rows.append(("torch threads", str(torch.get_num_threads())))
    rows.append(("CUDA of torch", torch.version.cuda or "none: a build for CPUs"))
    rows.append(("NVIDIA driver", driver_version() or "none found"))
    if torch.cuda.is_available():
        devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        rows.append(("CUDA devices seen by torch", devices))
    else:
        rows.append(("CUDA devices seen by torch", f"none: {why_no_gpu()}"))
    rows.append(("products of float32 matrices on the CPU", "oneDNN" if onednn_is_quicker() else "torch's default"))
    gradients = {"oneDNN": "bfloat16", "AMX": "bfloat16 (AMX)", None: "float32: this processor would gain nothing"}
    rows.append(('gradients by precision = "mixed" on the CPU', gradients[rounding()]))
    return rows


def plugin_failures(messages: Iterable[str]) -> str:
    """OpenMM's words on plugins that it could not load, without their folders, those of one cause together."""
    causes: dict[str, list[str]] = {}
    for message in messages:
        path, _, cause = _one_line(message).removeprefix("Error loading library ").partition(": ")
        causes.setdefault(cause, []).append(Path(path).stem)
    return "; ".join(f"{', '.join(names)}: {cause}" for cause, names in causes.items()) or "none"


def driver_version() -> str | None:
    """Version of the NVIDIA driver, and the newest CUDA that it runs where it says so; None where there is none."""
    if program := shutil.which("nvidia-smi"):
        try:
            asked = subprocess.run([program, "-q"], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        said = dict(line.split(":", 1) for line in asked.stdout.splitlines() if ":" in line)
        found = {key.strip(): value.strip() for key, value in said.items()}
        if driver := found.get("Driver Version"):
            return f"{driver}, for CUDA up to {found['CUDA Version']}" if "CUDA Version" in found else driver
    return None


def platform_rows() -> tuple[Rows, bool]:
    """Each OpenMM platform beside the batched potential on alanine dipeptide; False if two of them disagree.

    A row is (platform, precision, energies per second, difference from `TorchPotential` in float64 [kJ/mol], verdict).
    """
    molecule = load_system("alanine-dipeptide")
    expected = float(TorchPotential(molecule.system)(torch.as_tensor(molecule.positions)[None]))
    rows: Rows = [("platform", "precision", "energies per second", "difference [kJ/mol]", "verdict")]
    fine = True
    for index in range(openmm.Platform.getNumPlatforms()):
        engine = openmm.Platform.getPlatform(index)
        try:
            context = _context(molecule.system, engine)
        except openmm.OpenMMException as error:
            rows.append((engine.getName(), "", "", "", f"cannot run: {_one_line(error)}"))
            continue
        write_positions(context, torch.as_tensor(molecule.positions))
        difference = abs(_energy(context) - expected)
        rate = 1.0 / seconds_per_call(lambda: _energy(context))  # noqa: B023
        back = (read_positions(context) - torch.as_tensor(molecule.positions)).abs().max()
        precision = _precision(engine, context)
        agrees = difference <= AGREEMENT[precision] and float(back) < 1e-6
        fine &= agrees
        verdict = "agrees" if agrees else "DISAGREES: do not use it"
        rows.append((engine.getName(), precision, f"{rate:,.0f}", f"{difference:.1e}", verdict))
    return rows, fine


def transfer_rows(n_large: int = 50_000) -> tuple[Rows, bool]:
    """How positions travel between every platform and every torch device; False where they come back changed.

    A row is (platform, device, way, latency, bandwidth, why, verdict): time there and back of three atoms [µs], and
    float64 bytes per second of ``n_large`` atoms, both directions counted.
    """
    rows: Rows = [("platform", "torch device", "way", "latency [µs]", "bandwidth [MB/s]", "why this way", "verdict")]
    devices = _devices()
    fine = True
    for index in range(openmm.Platform.getNumPlatforms()):
        engine = openmm.Platform.getPlatform(index)
        for device in devices:
            try:
                small, large = (_context(_particles(n), engine, device) for n in (3, n_large))
            except openmm.OpenMMException:  # said in the table of platforms
                continue
            try:
                row, same = _transfer(small, large, device)
            except RuntimeError as error:  # of a GPU: the others are looked at all the same
                row, same = ("", "", "", "", f"cannot run: {_one_line(error)}"), True
            rows.append((engine.getName(), device, *row))
            fine &= same
    return rows, fine


def _transfer(small: openmm.Context, large: openmm.Context, device: str) -> tuple[tuple[str, ...], bool]:
    """(way, latency, bandwidth, why, verdict) between two Contexts of one platform and a device; False: changed."""
    n = large.getSystem().getNumParticles()
    x = torch.rand(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    write_positions(large, x)
    write_positions(small, x[:3])
    same = float((read_positions(large, device) - x).abs().max()) < 1e-6
    transfer = choose_way(large, device)
    latency, long = (seconds_per_call(partial(_there_and_back, c, device)) for c in (small, large))
    bandwidth = f"{2 * x.numel() * 8 / long / 1e6:,.0f}"
    verdict = "agrees" if same else "COMES BACK CHANGED: do not use it"
    return (transfer.way, f"{1e6 * latency:.0f}", bandwidth, transfer.reason, verdict), same


def torch_rows(n: int = 4096, n_compared: int = 32) -> tuple[Rows, bool]:
    """`TorchPotential` on every torch device against OpenMM's Reference platform; False if one disagrees.

    A row is (device, precision, configurations of alanine dipeptide per second in batches of ``n``, largest difference
    [kJ/mol] of ``n_compared`` of them, verdict).
    """
    molecule = load_system("alanine-dipeptide")
    noise = torch.randn(n, molecule.n_atoms, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.as_tensor(molecule.positions) + 0.003 * noise
    context = _context(molecule.system, openmm.Platform.getPlatformByName("Reference"))
    expected = torch.tensor([_energy_at(context, frame) for frame in x[:n_compared]], dtype=torch.float64)
    rows: Rows = [("torch device", "precision", "energies per second", "difference [kJ/mol]", "verdict")]
    fine = True
    for device in _devices():
        for dtype, allowed in TORCH_AGREEMENT.items():
            name = str(dtype).removeprefix("torch.")
            try:
                potential, there = TorchPotential(molecule.system, dtype=dtype, device=device), x.to(device)
                difference = float((potential(there)[:n_compared].cpu().double() - expected).abs().max())
                # The sum comes back to the host, so that a GPU has done its work when the clock stops.
                rate = n / seconds_per_call(lambda: float(potential(there).sum()))  # noqa: B023
            except RuntimeError as error:
                rows.append((device, name, "", "", f"cannot run: {_one_line(error)}"))
                continue
            verdict = "agrees" if difference <= allowed else "DISAGREES: do not use it"
            rows.append((device, name, f"{rate:,.0f}", f"{difference:.1e}", verdict))
            fine &= difference <= allowed
    return rows, fine


def _there_and_back(context: openmm.Context, device: str) -> None:
    write_positions(context, read_positions(context, device))


def _particles(n: int) -> openmm.System:
    """Particles without forces."""
    system = openmm.System()
    for _ in range(n):
        system.addParticle(12.0)
    return system


def _context(system: openmm.System, engine: openmm.Platform, device: str | None = None) -> openmm.Context:
    """A Context in the precision, and on the device, that this package would choose."""
    on_gpu = None if device in (None, "cpu") else device
    properties = openmm_properties(engine.getName(), on_gpu)
    return openmm.Context(system, openmm.VerletIntegrator(0.001), engine, properties)


def _devices() -> list[str]:
    """Every torch device of this machine."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _energy_at(context: openmm.Context, positions: torch.Tensor) -> float:
    write_positions(context, positions)
    return _energy(context)


def _energy(context: openmm.Context) -> float:
    return context.getState(energy=True).getPotentialEnergy()._value


def _precision(engine: openmm.Platform, context: openmm.Context) -> str:
    if "Precision" in engine.getPropertyNames():
        return engine.getPropertyValue(context, "Precision")
    return "double" if engine.getName() == "Reference" else "single"
