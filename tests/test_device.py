"""The device flag, and positions between a Context and torch."""

import openmm
import pytest
import torch

from openmm_regflow import doctor
from openmm_regflow.cli import main
from openmm_regflow.device import read_positions, resolve_device, write_positions
from openmm_regflow.errors import InputError
from openmm_regflow.systems import load_system


def test_names():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "", "mps"])
def test_bad_names(name):
    with pytest.raises(InputError, match="cpu"):
        resolve_device(name)


def test_a_gpu_that_is_not_there():
    with pytest.raises(InputError, match="CUDA device"):
        resolve_device("cuda:99")


@pytest.fixture(scope="module")
def context():
    molecule = load_system("alanine-dipeptide")
    integrator = openmm.VerletIntegrator(0.001)
    context = openmm.Context(molecule.system, integrator, openmm.Platform.getPlatform("Reference"))
    context.setPositions(molecule.positions)
    return context


def test_positions_there_and_back(context):
    x = read_positions(context)
    assert x.dtype == torch.float64 and x.shape == (22, 3)
    context.setVelocitiesToTemperature(300.0, 1)
    before = context.getState(velocities=True).getVelocities(asNumpy=True)._value
    write_positions(context, x + 0.01)
    assert torch.equal(read_positions(context), x + 0.01)
    after = context.getState(velocities=True).getVelocities(asNumpy=True)._value
    assert (before == after).all()


@pytest.mark.parametrize("bad", [torch.zeros(21, 3), torch.zeros(1, 22, 3), torch.full((22, 3), torch.nan)])
def test_bad_positions_leave_the_context_alone(context, bad):
    before = read_positions(context)
    with pytest.raises(InputError):
        write_positions(context, bad)
    assert torch.equal(read_positions(context), before)


def test_doctor_finds_agreement_and_notices_its_absence(capsys, monkeypatch):
    with pytest.raises(SystemExit) as exit_:
        main(["doctor"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and "Reference" in out and "agrees" in out and openmm.version.short_version in out
    monkeypatch.setattr(doctor, "_energy", lambda context: 0.0)
    with pytest.raises(SystemExit) as exit_:
        main(["doctor"])
    assert exit_.value.code == 1 and "DISAGREES" in capsys.readouterr().out


@pytest.mark.gpu
def test_flow_and_energies_on_the_gpu_agree_with_the_cpu():
    from openmm_regflow import TorchPotential, flows, load_system

    mol = load_system("alanine-dipeptide")
    g = torch.Generator().manual_seed(0)
    x = torch.as_tensor(mol.positions) + 0.003 * torch.randn(500, 22, 3, generator=g, dtype=torch.float64)
    flow = flows.spline(flows.coordinates_for(mol.topology, x), n_layers=2, hidden=16)
    here = flow.log_prob(x)
    there = flow.to("cuda").log_prob(x.cuda()).cpu()
    assert (here - there).abs().max() < 1e-3
    u, v = (TorchPotential(mol.system, dtype=torch.float64, device=d) for d in ("cpu", "cuda"))
    assert (u(x) - v(x.cuda()).cpu()).abs().max() < 1e-6
