"""TorchPotential against OpenMM's Reference platform, force by force and for whole systems."""

import ast
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from openmm_regflow.errors import InputError, UnsupportedForceError
from openmm_regflow.potentials import OpenMMPotential, Potential, TorchPotential
from openmm_regflow.potentials.compiled import _SYMBOLIC_BLOCKS, _symbolic
from openmm_regflow.systems import load_system

ENERGY_RTOL, ENERGY_ATOL, FORCE_RTOL = 1e-9, 1e-6, 1e-7


def peptide(method=app.NoCutoff, files=("amber99sbildn.xml", "amber99_obc.xml")):
    """Alanine dipeptide with the topology of openmmtools and a force field of OpenMM."""
    from openmmtools import testsystems

    source = testsystems.AlanineDipeptideVacuum(constraints=None)
    system = app.ForceField(*files).createSystem(source.topology, nonbondedMethod=method, constraints=None)
    return system, source.positions.value_in_unit(unit.nanometer)


def perturbed(positions, scales=(0.002, 0.02, 0.08), n=4, seed=0):
    """Conformations from relaxed to clashing, `(n * len(scales), n_atoms, 3)`."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(len(scales), n, *positions.shape)) * np.reshape(scales, (-1, 1, 1, 1))
    return (positions + noise).reshape(-1, *positions.shape)


def check_parity(system, x, **kwargs):
    """Energies and forces of the two potentials agree to the stated tolerances."""
    energy, forces = OpenMMPotential(system, platform="Reference").energy_and_forces(x)
    got, got_forces = TorchPotential(system, **kwargs).energy_and_forces(x)
    torch.testing.assert_close(got, energy, rtol=ENERGY_RTOL, atol=ENERGY_ATOL)
    scale = forces.abs().amax((1, 2), keepdim=True).clamp(min=1.0)
    assert ((got_forces - forces).abs() / scale).max() <= FORCE_RTOL
    return got, got_forces


def test_alanine_dipeptide():
    system, positions = peptide()
    check_parity(system, perturbed(positions))


def test_every_force_of_alanine_dipeptide_alone():
    system, positions = peptide()
    for i, force in enumerate(system.getForces()):
        force.setForceGroup(i)
    x = perturbed(positions)
    for i in range(system.getNumForces()):
        expected = OpenMMPotential(system, platform="Reference", groups=[i])(x)
        got = TorchPotential(system, groups=[i])(x)
        torch.testing.assert_close(got, expected, rtol=ENERGY_RTOL, atol=ENERGY_ATOL)


def test_both_satisfy_the_protocol():
    system, _ = peptide()
    assert isinstance(TorchPotential(system), Potential)
    assert isinstance(OpenMMPotential(system), Potential)


def test_wrong_shape_names_the_remedy():
    system, positions = peptide()
    for potential in (TorchPotential(system), OpenMMPotential(system)):
        with pytest.raises(InputError, match=r"add a batch axis"):
            potential(positions)
        with pytest.raises(InputError, match=r"\(n, 22, 3\)"):
            potential(np.zeros((2, 21, 3)))


def test_periodic_electrostatics_are_refused():
    system, _ = peptide(files=("amber99sbildn.xml",))
    force = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    force.setNonbondedMethod(openmm.NonbondedForce.PME)
    with pytest.raises(UnsupportedForceError, match=r"NonbondedForce.*PME.*OpenMMPotential"):
        TorchPotential(system)


def test_float32_error_against_float64():
    """Rounding stays within 32 ulp of the sum of the absolute energies of the single forces."""
    system, positions = peptide()
    x = perturbed(positions, scales=(0.002, 0.01))
    exact = TorchPotential(system)
    for i, force in enumerate(system.getForces()):
        force.setForceGroup(i)
    parts = [TorchPotential(system, groups=[i])(x).abs() for i in range(system.getNumForces())]
    got = TorchPotential(system, dtype=torch.float32)(x)
    assert got.dtype == torch.float32
    bound = 32 * torch.finfo(torch.float32).eps * sum(parts)
    assert ((got.double() - exact(x)).abs() <= bound).all()


def test_chunks_shrink_where_memory_does_not_suffice():
    """A GPU's memory may be taken by others after the potential was made; one row that does not fit is an error."""

    class Cramped(TorchPotential):
        room, calls = 30, 0

        def _evaluate_chunk(self, x, forces):
            self.calls += 1
            if len(x) > self.room:
                raise torch.OutOfMemoryError("planted")
            return super()._evaluate_chunk(x, forces)

    molecule = load_system("alanine-dipeptide")
    x = torch.as_tensor(molecule.reference("test")[:200]).double()
    cramped, plain = Cramped(molecule.system), TorchPotential(molecule.system)
    for ours, theirs in zip(cramped.energy_and_forces(x), plain.energy_and_forces(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-9)
    before = cramped.calls
    cramped(x)
    assert cramped.calls - before == math.ceil(200 / cramped._chunk) and cramped._chunk <= 30
    cramped.room = 10
    with pytest.raises(torch.OutOfMemoryError):
        cramped(x)


def test_chunks_and_batch_sizes_do_not_change_the_result():
    system, positions = peptide()
    x = perturbed(positions, scales=(0.01,), n=37)
    potential = TorchPotential(system)
    energy, forces = potential.energy_and_forces(x)
    potential._chunk = 5
    again, forces_again = potential.energy_and_forces(x)
    torch.testing.assert_close(again, energy, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(forces_again, forces, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(potential(x[:1]), energy[:1], rtol=1e-12, atol=1e-10)
    empty, no_forces = potential.energy_and_forces(x[:0])
    assert empty.shape == (0,) and no_forces.shape == (0, 22, 3) and potential(x[:0]).shape == (0,)


def test_works_inside_inference_mode_and_on_arrays_and_quantities():
    system, positions = peptide()
    potential = TorchPotential(system)
    expected = potential(positions[None])
    with torch.inference_mode():
        energy, _ = potential.energy_and_forces(torch.tensor(positions)[None])
    torch.testing.assert_close(energy, expected)
    angstrom = unit.Quantity(positions[None] * 10, unit.angstrom)
    torch.testing.assert_close(potential(angstrom), expected)


def test_a_changed_system_does_not_reach_a_potential():
    system, positions = peptide()
    potential, other = TorchPotential(system), OpenMMPotential(system, platform="Reference")
    before = potential(positions[None])
    system.getForce(0).setBondParameters(0, 0, 1, 0.3, 1e6)
    torch.testing.assert_close(potential(positions[None]), before, rtol=0, atol=0)
    torch.testing.assert_close(other(positions[None]), before, rtol=ENERGY_RTOL, atol=ENERGY_ATOL)


def test_pickled_copy_keeps_options_and_parameters():
    system, positions = peptide()
    force = openmm.CustomBondForce("k*r")
    force.addGlobalParameter("k", 1.0)
    force.addBond(0, 5, [])
    system.addForce(force)
    for potential in (TorchPotential(system, dtype=torch.float32), OpenMMPotential(system, platform="Reference")):
        potential.set_parameter("k", 30.0)
        copy = pickle.loads(pickle.dumps(potential))
        torch.testing.assert_close(copy(positions[None]), potential(positions[None]), rtol=0, atol=0)


def test_gradient_of_the_loss_of_a_batch_with_a_bad_row():
    system, positions = peptide()
    x = torch.tensor(np.stack([positions, positions]))
    x[1, 3] = x[1, 4]
    for potential in (TorchPotential(system), OpenMMPotential(system, platform="Reference")):
        y = x.clone().requires_grad_(True)
        energy = potential(y)
        assert torch.isfinite(energy[0]) and torch.isinf(energy[1])
        (gradient,) = torch.autograd.grad(energy[torch.isfinite(energy)].sum(), y)
        expected = -TorchPotential(system).energy_and_forces(x)[1][0]
        torch.testing.assert_close(gradient[0], expected, rtol=1e-7, atol=1e-5)
        assert (gradient[1] == 0).all()


def test_unsupported_dtype_is_refused():
    with pytest.raises(InputError, match="float16"):
        TorchPotential(peptide()[0], dtype=torch.float16)


def run_python(code, **environment):
    """A fresh interpreter: its standard error and output."""
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


_SMALL_SYSTEM = """
import sys, time, warnings, logging
import numpy as np, openmm, torch
from openmm_regflow.potentials import TorchPotential
torch.set_num_threads(1)
system = openmm.System()
force, bond = openmm.NonbondedForce(), openmm.HarmonicBondForce()
for k in range(5):
    system.addParticle(1.0)
    force.addParticle((-1) ** k * 0.3, 0.2, 0.5)
bond.addBond(0, 1, 0.1, 1000.0)
force.addException(0, 1, 0, 1, 0)
system.addForce(force)
system.addForce(bond)
x = np.random.default_rng(0).uniform(-0.5, 0.5, size=(100, 5, 3))
exact = TorchPotential(system)
potential = TorchPotential(system, compile=True)
"""


@pytest.mark.slow
def test_compiled_once_for_all_batch_sizes(tmp_path):
    code = _SMALL_SYSTEM + """
from torch._dynamo.utils import counters
potential._chunk = 64
for n in (40, 1, 2, 16, 17, 33, 64, 100):
    energy, forces = potential.energy_and_forces(x[:n])
    expected, expected_forces = exact.energy_and_forces(x[:n])
    torch.testing.assert_close(energy, expected, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(forces, expected_forces, rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(potential(x[:n]), expected, rtol=1e-12, atol=1e-9)
assert not potential._functions[True].failed
print(counters["stats"]["unique_graphs"], counters["inductor"]["fxgraph_cache_hit"])
"""
    first, _ = run_python(code, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert first.split() == ["2", "0"]  # one graph for energies, one for forces
    second, _ = run_python(code, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert second.split()[0] == "2" and int(second.split()[1]) >= 1  # taken from the cache of the first process


def test_recording_takes_no_memory_and_gives_the_code_of_real_coordinates():
    """The stand-ins have the device of the coordinates; one of a GPU can be made where there is none."""
    potential = TorchPotential(load_system("alanine-dipeptide").system, dtype=torch.float32)
    record = make_fx(lambda x, c: potential._block_energy(x, c), tracing_mode="symbolic", _allow_non_fake_inputs=True)
    with torch.no_grad():
        real = tuple(torch.empty(_SYMBOLIC_BLOCKS, 22, 16) for _ in range(3))
        assert record(_symbolic(real), potential._constants).code == record(real, potential._constants).code
    with FakeTensorMode():
        there = tuple(torch.empty(2, 22, 128, dtype=torch.float64, device="cuda") for _ in range(3))
    for c in _symbolic(there):
        assert isinstance(c, FakeTensor) and c.device.type == "cuda" and c.dtype == torch.float64
        assert not isinstance(c.shape[0], int) and int(c.shape[1]) == 22 and int(c.shape[2]) == 128


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["alanine-dipeptide", "alanine-hexapeptide"])
def test_compiled_energies_on_the_gpu(name):
    """The energies and forces of the plain functions on the CPU, in little memory."""
    molecule = load_system(name)
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(300, molecule.n_atoms, 3, generator=g, dtype=torch.float64)
    x = torch.as_tensor(molecule.positions) + 0.002 * noise
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    potential = TorchPotential(molecule.system, device="cuda", compile=True)
    energy, forces = potential.energy_and_forces(x.cuda())
    assert energy.is_cuda and potential._functions[True].worked
    expected, expected_forces = TorchPotential(molecule.system).energy_and_forces(x)
    torch.testing.assert_close(energy.cpu(), expected, rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(forces.cpu(), expected_forces, rtol=1e-7, atol=1e-4)
    assert torch.cuda.max_memory_allocated() - before < 500 << 20  # stand-ins of such a size took a gigabyte


def test_without_a_compiler_one_warning_and_the_same_energies(tmp_path):
    code = _SMALL_SYSTEM + """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        torch.testing.assert_close(potential(x), exact(x))
print([str(w.message) for w in caught if "could not compile energies" in str(w.message)])
"""
    output, _ = run_python(code, TORCHINDUCTOR_CACHE_DIR=str(tmp_path), CXX="/nonexistent/compiler")
    messages = ast.literal_eval(output)
    assert len(messages) == 1 and "running eagerly" in messages[0]
