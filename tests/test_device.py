"""The device flag, and positions between a Context and torch: every way on every platform that is here."""

import json
from importlib.metadata import version

import openmm
import pytest
import torch
from openmm import app, unit
from openmmtools import integrators

from openmm_regflow import OpenMMPotential, device, doctor, errors
from openmm_regflow.cli import main, shell
from openmm_regflow.device import (
    choose_way,
    host,
    memory_line,
    openmm_properties,
    read_positions,
    resolve_device,
    self_test,
    write_positions,
)
from openmm_regflow.device.choice import failure_of
from openmm_regflow.device.native import Layout, Native, Unavailable, pack, unpack
from openmm_regflow.errors import InputError
from openmm_regflow.potentials import cpu_platform
from openmm_regflow.systems import load_system
from openmm_regflow.tfep.ensembles import potential_of

PLATFORMS = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
CHOICES = {"CUDA": ("single", "mixed", "double"), "OpenCL": ("single", "mixed", "double")}
PRECISIONS = [(platform, precision) for platform in PLATFORMS for precision in CHOICES.get(platform, (None,))]
#: Largest difference of a position of about 1 nm after it went there and back [nm].
ROUNDING = {"single": 2e-7, "mixed": 1e-13, "double": 0.0, None: 0.0}


def test_names():
    assert resolve_device("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() and failure_of(torch.device("cuda")) is None else "cpu"
    assert resolve_device("auto").type == expected


def test_a_device_that_fails_is_found_out():
    assert failure_of(torch.device("cpu")) is None
    assert "meta" in failure_of(torch.device("meta"))  # a device that computes nothing


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_auto_goes_on_on_the_cpu_with_one_warning_where_the_gpu_does_not_work(monkeypatch):
    """A GPU that is listed and that this torch has no kernels for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(RuntimeWarning, match="the GPU does not work .*CUDA.* going on on the CPU") as caught:
        assert resolve_device("auto") == torch.device("cpu")
    assert len(caught) == 1


@pytest.mark.gpu
def test_a_numbered_gpu_becomes_the_current_one():
    before = torch.cuda.current_device()
    try:
        for index in reversed(range(torch.cuda.device_count())):
            resolve_device(f"cuda:{index}")
            assert torch.cuda.current_device() == index
            assert openmm_properties("CUDA")["DeviceIndex"] == str(index)
            assert resolve_device("cuda") == torch.device("cuda") and torch.ones(1, device="cuda").device.index == index
    finally:
        torch.cuda.set_device(before)
    assert failure_of(torch.device("cuda")) is None and resolve_device("auto").type == "cuda"


@pytest.mark.parametrize("name", ["gpu", "", "mps"])
def test_bad_names(name):
    with pytest.raises(InputError, match="cpu"):
        resolve_device(name)


def test_a_gpu_that_is_not_there():
    with pytest.raises(InputError, match="CUDA device"):
        resolve_device("cuda:99")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_the_line_says_why_there_is_none(capsys):
    with pytest.raises(InputError, match="a build for CPUs"):
        resolve_device("cuda")
    with pytest.raises(SystemExit) as exit_:
        main(["benchmark", "--device", "cuda"])
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and err.startswith("error: no CUDA device") and err.count("\n") == 1


def test_lines_for_a_gpu_that_fails():
    assert "--device auto" in memory_line(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert "doctor" in memory_line(RuntimeError("CUDA error: no kernel image is available for execution\nmore"))
    assert memory_line(RuntimeError("shapes cannot be multiplied")) is None and memory_line(ValueError("CUDA")) is None


#: Words of OpenMM 8, and what the line must name.
OPENMM_TROUBLES = [
    ("Error creating array savedForces: CUDA_ERROR_OUT_OF_MEMORY (2) at CudaArray.cpp:76", "out of memory"),
    ("Error creating context: CUDA_ERROR_OUT_OF_MEMORY (2)\nat CudaContext.cpp:140", "out of memory"),
    ("No compatible CUDA device is available", "cannot use the GPU"),
    ("Error initializing CUDA: CUDA_ERROR_NO_DEVICE (100) at CudaContext.cpp:92", "CUDA_ERROR_NO_DEVICE"),
    ("Error loading CUDA module: CUDA_ERROR_UNSUPPORTED_PTX_VERSION (222)", "UNSUPPORTED_PTX"),
    ("Illegal value for DeviceIndex: 7", "DeviceIndex: 7"),
]


@pytest.mark.parametrize(("words", "named"), OPENMM_TROUBLES)
def test_lines_for_a_gpu_that_openmm_cannot_use(words, named):
    line = memory_line(openmm.OpenMMException(words))
    assert named in line and "--device cpu" in line and "\n" not in line


def test_a_platform_that_is_not_installed_names_the_package():
    with pytest.raises(openmm.OpenMMException) as caught:
        openmm.Platform.getPlatformByName("Abacus")
    line = memory_line(caught.value)
    assert "no platform Abacus" in line and "openmm-regflow[cuda" in line
    assert memory_line(openmm.OpenMMException("Particle coordinate is NaN")) is None


@pytest.mark.parametrize(("name", "code"), [("auto", 0), ("cpu", 2)])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), openmm.OpenMMException(OPENMM_TROUBLES[0][0])])
def test_out_of_memory_goes_on_on_the_cpu_if_asked(error, name, code, capsys, monkeypatch):
    from openmm_regflow import speed

    tried = []

    def speed_table(*arguments):
        tried.append(arguments)
        if len(tried) == 1:
            raise error
        return [("energies", "1")]

    monkeypatch.setattr(speed, "speed_table", speed_table)
    with pytest.raises(SystemExit) as exit_:
        main(["benchmark", "--device", name])
    assert exit_.value.code == code and len(tried) == (2 if name == "auto" else 1)
    err = capsys.readouterr().err
    assert "out of memory" in err and err.count("\n") == 1


def test_an_error_that_is_no_gpus_stays_an_error(monkeypatch):
    from openmm_regflow import speed

    def speed_table(*arguments):
        raise openmm.OpenMMException("Called getState() on a Context before setting positions")

    monkeypatch.setattr(speed, "speed_table", speed_table)
    with pytest.raises(openmm.OpenMMException, match="before setting"):
        main(["benchmark"])


@pytest.mark.skipif("CUDA" in PLATFORMS, reason="this OpenMM has its CUDA platform")
def test_a_gpu_of_torch_alone_is_refused_or_left_to_torch(capsys, monkeypatch):
    """torch sees a GPU and OpenMM was installed without its plugin, as pip does unless told otherwise."""
    monkeypatch.setattr(device, "resolve_device", lambda name: torch.device("cuda"))
    with pytest.raises(InputError, match=r"no platform CUDA here: pip install 'openmm-regflow\[cuda"):
        shell.use_platform("cuda")
    assert shell.use_platform("auto") is None
    assert "OpenMM has no platform CUDA here: its part goes on on the CPU" in capsys.readouterr().err


def test_no_gpu_is_used_where_the_cpu_was_asked_for():
    systems = {name: load_system(name).system for name in ("alanine-dipeptide", "alanine-tripeptide")}
    assert shell.use_platform("cpu") is None
    chosen = [cpu_platform(system) for system in systems.values()]
    without_torch_form = openmm.XmlSerializer.clone(systems["alanine-dipeptide"])
    without_torch_form.addForce(openmm.RMSDForce(load_system("alanine-dipeptide").positions, [0, 1, 2]))
    by_openmm = potential_of(without_torch_form, "cpu")
    assert by_openmm.options["platform"] == ("CPU" if set(PLATFORMS) & {"CUDA", "HIP", "OpenCL"} else None)
    if set(PLATFORMS) & {"CUDA", "HIP", "OpenCL"}:
        assert chosen == ["Reference", "CPU"]
    else:
        assert chosen == [None, None]  # the probe chooses, and has no GPU to choose


def test_precision_and_device_of_openmm():
    assert openmm_properties("Reference") == openmm_properties("CPU") == {}
    assert openmm_properties("OpenCL") == {"Precision": "mixed"}
    assert openmm_properties("CUDA", "cuda:1")["Precision"] == "mixed"
    assert ("DeviceIndex" in openmm_properties("CUDA", "cuda:1")) == torch.cuda.is_available()
    x = load_system("alanine-dipeptide").positions[None]
    for name in PLATFORMS:
        engine = OpenMMPotential(load_system("alanine-dipeptide").system, name).engine(x)
        assert engine.properties.get("Precision") == ("mixed" if name in ("CUDA", "OpenCL", "HIP") else None)


@pytest.mark.parametrize("properties", [None, {"Threads": "1"}])
def test_the_cache_of_openmmtools_gets_its_platform_and_properties_back(properties):
    from openmmtools import cache

    from openmm_regflow.chains import context_platform

    contexts = cache.global_context_cache
    contexts.empty()
    before = contexts.platform, contexts._platform_properties
    contexts.set_platform(openmm.Platform.getPlatformByName("CPU"), properties)
    try:
        with context_platform("Reference"):  # which has no property Threads
            assert contexts.platform.getName() == "Reference" and contexts._platform_properties is None
        assert contexts.platform.getName() == "CPU" and contexts._platform_properties == properties
    finally:
        contexts.set_platform(*before)


@pytest.mark.gpu
def test_contexts_made_inside_are_in_mixed_precision_on_the_device_of_the_flow():
    from openmmtools import cache, states

    from openmm_regflow.chains import context_platform
    from openmm_regflow.check.kernel import HybridMonteCarlo
    from openmm_regflow.simulate.tempering import _platform

    mol = load_system("alanine-dipeptide")
    last = torch.cuda.device_count() - 1
    with context_platform("CUDA", f"cuda:{last}"):
        state = states.ThermodynamicState(mol.system, 300 * unit.kelvin)
        context, _ = cache.global_context_cache.get_context(state, openmm.VerletIntegrator(0.001))
        assert chosen(context) == ("mixed", str(last))
    context = openmm.Context(mol.system, openmm.VerletIntegrator(0.001), *_platform("CUDA"))
    assert chosen(context) == ("mixed", str(torch.cuda.current_device()))
    engine = HybridMonteCarlo(mol.system, 300.0, platform="CUDA")
    assert chosen(engine._context) == ("mixed", str(torch.cuda.current_device()))


def chosen(context):
    return tuple(context.getPlatform().getPropertyValue(context, name) for name in ("Precision", "DeviceIndex"))


def context_of(system, name, precision=None):
    properties = {} if precision is None else {"Precision": precision}
    platform = openmm.Platform.getPlatformByName(name)
    return openmm.Context(system, openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.002), platform, properties)


def argon(n=100, edge=2.5):
    """Particles in a periodic box; after some steps OpenMM's GPU platforms reorder them and fold them into the box."""
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors(*(edge * torch.eye(3)).tolist())
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    force.setCutoffDistance(1.0)
    for _ in range(n):
        system.addParticle(40.0)
        force.addParticle(0.0, 0.34, 1.0)
    system.addForce(force)
    grid = torch.arange(5, dtype=torch.float64) * 0.45
    sites = torch.cartesian_prod(grid, grid, grid)
    return system, sites[torch.randperm(len(sites), generator=torch.Generator().manual_seed(0))[:n]]


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_positions_there_and_back_on_every_platform(name, precision):
    molecule = load_system("alanine-dipeptide")
    context = context_of(molecule.system, name, precision)
    x = torch.as_tensor(molecule.positions)
    write_positions(context, x)
    found = read_positions(context)
    assert found.dtype == torch.float64 and found.shape == (22, 3)
    assert float((found - x).abs().max()) <= ROUNDING[precision]
    context.setVelocitiesToTemperature(300.0, 1)
    before = context.getState(velocities=True).getVelocities(asNumpy=True)._value
    write_positions(context, (x + 0.01).float())
    assert float((read_positions(context) - (x + 0.01).float()).abs().max()) <= ROUNDING[precision]
    assert (before == context.getState(velocities=True).getVelocities(asNumpy=True)._value).all()


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_positions_in_a_periodic_box_are_not_folded(name, precision):
    system, x = argon()
    context = context_of(system, name, precision)
    far = x + torch.tensor([7.0, -9.0, 13.0])
    write_positions(context, far)
    assert float((read_positions(context) - far).abs().max()) <= 10 * ROUNDING[precision] + 1e-12
    context.setVelocitiesToTemperature(300.0, 1)
    context.getIntegrator().step(300)
    state = context.getState(positions=True, enforcePeriodicBox=False).getPositions(asNumpy=True)
    assert torch.equal(read_positions(context), torch.as_tensor(state.value_in_unit(unit.nanometer)))
    assert (read_positions(context) - far).abs().max() < 1.5  # diffused, not moved by a box
    context.setPeriodicBoxVectors(*(3.0 * torch.eye(3)).tolist())
    write_positions(context, far)
    assert float(context.getState().getPeriodicBoxVectors(asNumpy=True)._value[0, 0]) == 3.0


@pytest.fixture(scope="module")
def context():
    molecule = load_system("alanine-dipeptide")
    context = context_of(molecule.system, "Reference")
    context.setPositions(molecule.positions)
    return context


@pytest.mark.parametrize("bad", [torch.zeros(21, 3), torch.zeros(1, 22, 3), torch.full((22, 3), torch.nan)])
def test_bad_positions_leave_the_context_alone(context, bad):
    before = read_positions(context)
    with pytest.raises(InputError):
        write_positions(context, bad)
    assert torch.equal(read_positions(context), before)


def test_the_host_carries_what_is_not_on_a_gpu(context):
    transfer = choose_way(context)
    assert transfer.way == "host" and "CUDA" in transfer.reason and transfer is choose_way(context, "cpu")
    with pytest.raises(Unavailable, match="Reference"):
        read_positions(context, way="native")


class Turned:
    """A way that mixes up the atoms: consistent with itself, wrong for everybody else."""

    def __init__(self, reads=True, writes=True):
        self.reads, self.writes = reads, writes

    def read(self, context, where):
        x = host.read(context, where)
        return x.flip(0) if self.reads else x

    def write(self, context, positions):
        host.write(context, positions.flip(0) if self.writes else positions)


@pytest.mark.parametrize(("way", "words"), [(Turned(), "reads"), (Turned(reads=False), "writes")])
def test_the_self_test_finds_a_wrong_order_and_leaves_the_context_alone(context, way, words):
    before = read_positions(context)
    self_test(host, context, torch.device("cpu"))
    with pytest.raises(Unavailable, match=words):
        self_test(way, context, torch.device("cpu"))
    assert torch.equal(read_positions(context), before)


@pytest.mark.parametrize("corrected", [False, True])
def test_layout_with_order_padding_cells_and_corrections(corrected):
    g = torch.Generator().manual_seed(0)
    n, padded = 7, 32
    x = torch.randn(n, 3, generator=g, dtype=torch.float64)
    order, cells = torch.randperm(n, generator=g), torch.randint(-3, 4, (n, 3), generator=g)
    box = torch.tensor([[2.0, 0.0, 0.0], [0.5, 2.0, 0.0], [0.1, -0.3, 2.0]], dtype=torch.float64)
    posq = torch.randn(padded, 4, generator=g, dtype=torch.float32)
    correction = torch.zeros(padded, 4) if corrected else None
    kept = posq.clone()
    pack(x, posq, correction, Layout(order, 0 * cells, box))
    assert torch.equal(posq[:, 3], kept[:, 3]) and torch.equal(posq[n:], kept[n:])
    found = unpack(posq, correction, Layout(order, 0 * cells, box))
    assert float((found - x).abs().max()) < (1e-13 if corrected else 1e-6)
    folded = posq.clone()
    folded[:n, :3] += (cells.double() @ box).float()
    assert float((unpack(folded, correction, Layout(order, cells, box)) - x).abs().max()) < 2e-6


def native(platform):
    try:
        return Native(platform)
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.skipif("OpenCL" not in PLATFORMS, reason="no OpenCL platform")
@pytest.mark.parametrize("precision", ["single", "mixed", "double"])
def test_the_native_layout_on_opencl(precision):
    """The helper that CUDA would use, on a real Context with padding, a new order of atoms and cells."""
    helper, where = native("OpenCL"), torch.device("cpu")
    system, x = argon()
    moving = context_of(system, "OpenCL", precision)
    write_positions(moving, x + torch.tensor([7.0, -9.0, 13.0]))
    moving.setVelocitiesToTemperature(300.0, 1)
    moving.getIntegrator().step(600)
    n, padded, dtype, corrected, _ = helper.describe(moving)
    assert n == 100 and padded > n and corrected == (precision == "mixed")
    assert dtype == (torch.float64 if precision == "double" else torch.float32)
    layout = helper._layout(moving, n, where)
    assert bool(layout.cells.any()) and not torch.equal(layout.order, torch.arange(n))
    self_test(helper, moving, where)
    helper.write(moving, x)
    energy = moving.getState(energy=True).getPotentialEnergy()
    moving.setPositions(x.numpy())
    assert abs(energy / moving.getState(energy=True).getPotentialEnergy() - 1) < 1e-5


def test_a_helper_that_cannot_be_compiled_is_tried_once_and_says_why_every_time(tmp_path, monkeypatch):
    from openmm_regflow.device import native as way

    compiler, calls = tmp_path / "c++", tmp_path / "calls"
    compiler.write_text(f"#!/bin/sh\necho one >> {calls}\necho 'native.cpp:1: error: no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(way, "VERSIONS", (version("openmm"),))
    monkeypatch.setattr(way, "openmm_folder", lambda: tmp_path)  # headers are looked for by the compiler
    way._attempt.cache_clear()
    try:
        for _ in range(3):
            with pytest.raises(Unavailable, match=r"cannot be compiled: native.cpp:1: error: no such header"):
                Native()
        assert calls.read_text() == "one\n"
    finally:
        way._attempt.cache_clear()


@pytest.mark.gpu
def test_the_first_positions_of_a_context_can_come_from_the_gpu():
    molecule = load_system("alanine-dipeptide")
    context = context_of(molecule.system, "CUDA", "mixed")
    x = torch.as_tensor(molecule.positions, device="cuda")
    write_positions(context, x)
    assert float((read_positions(context, "cuda") - x).abs().max()) <= ROUNDING["mixed"]
    transfer = choose_way(context, "cuda")
    assert transfer is choose_way(context, f"cuda:{torch.cuda.current_device()}") and transfer.reason
    assert context.getState(energy=True).getPotentialEnergy()._value < 0


KEEPERS = {  # integrators that keep the forces of the last step
    "NoseHoover": lambda: openmm.NoseHooverIntegrator(300.0, 1.0, 0.002),
    "Custom": lambda: integrators.VelocityVerletIntegrator(2 * unit.femtosecond),
}


def check_that_kept_forces_are_forgotten(platform, device, keeper):
    """One step after new positions: the same velocities, whichever way the positions came."""
    helper = native(platform)
    system, x = argon()
    shift = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # Bumps that change the forces: half a step with old ones would show.
    x = x + 0.02 * shift
    ends = []
    for way in (host, helper):
        engine = openmm.Platform.getPlatformByName(platform)
        context = openmm.Context(system, KEEPERS[keeper](), engine, {"Precision": "mixed"})
        context.setPositions((x + 0.03 * shift.roll(1, 0)).numpy())
        context.setVelocitiesToTemperature(300.0, 1)
        context.getIntegrator().step(5)  # the first one sorts the atoms, after which forces are never kept
        way.write(context, x.to(device))  # and new velocities would be a notice of their own
        context.getIntegrator().step(1)
        ends.append(torch.as_tensor(context.getState(velocities=True).getVelocities(asNumpy=True)._value))
    assert float((ends[0] - ends[1]).abs().max()) < 1e-5


@pytest.mark.skipif("OpenCL" not in PLATFORMS, reason="no OpenCL platform")
@pytest.mark.parametrize("keeper", KEEPERS)
def test_integrators_forget_the_forces_of_old_positions_on_opencl(keeper):
    check_that_kept_forces_are_forgotten("OpenCL", "cpu", keeper)


@pytest.mark.gpu
@pytest.mark.parametrize("keeper", KEEPERS)
def test_integrators_forget_the_forces_of_old_positions_on_the_gpu(keeper):
    check_that_kept_forces_are_forgotten("CUDA", "cuda", keeper)


def test_doctor_finds_agreement_and_notices_its_absence(capsys, monkeypatch):
    with pytest.raises(SystemExit) as exit_:
        main(["doctor"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and "Reference" in out and "agrees" in out and openmm.version.short_version in out
    assert "bandwidth" in out and "host" in out and "float32" in out
    assert "CUDA of torch" in out and "NVIDIA driver" in out and "OpenMM plugins that failed to load" in out
    monkeypatch.setattr(doctor, "_energy", lambda context: 0.0)
    with pytest.raises(SystemExit) as exit_:
        main(["doctor"])
    assert exit_.value.code == 1 and "DISAGREES" in capsys.readouterr().out


def test_doctor_notices_a_device_that_disagrees_and_writes_what_it_shows(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "-o", str(tmp_path / "a.json")])
    found = json.loads((tmp_path / "a.json").read_text())
    assert exit_.value.code == 0 and found["agrees"] and found["versions"]["torch"] == torch.__version__
    assert {row["precision"] for row in found["torch"]} == {"float64", "float32"}
    assert {row["platform"] for row in found["positions"]} <= set(PLATFORMS)
    true = doctor._energy_at
    monkeypatch.setattr(doctor, "_energy_at", lambda context, x: true(context, x) + 1e-6)  # seen in float64 alone
    rows, fine = doctor.torch_rows()
    assert not fine and [row[-1] for row in rows[1:3]] == ["DISAGREES: do not use it", "agrees"]
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "-o", str(tmp_path / "b.json")])
    assert exit_.value.code == 1 and "TorchPotential disagrees" in capsys.readouterr().err
    assert not json.loads((tmp_path / "b.json").read_text())["agrees"]


def test_why_positions_travel_as_they_do():
    rows, _ = doctor.transfer_rows(100)
    assert rows[0][5] == "why this way" and len(rows) > 1
    assert all(row[5] == "the tensor or the Context is not on a CUDA device" for row in rows[1:] if row[1] == "cpu")


def test_plugins_of_one_cause_are_named_together():
    words = "Error loading library /somewhere/libOpenMM{}.so: libcuda.so.1: cannot open shared object file"
    shown = doctor.plugin_failures([words.format("CUDA"), words.format("RPMDCUDA")])
    assert shown == "libOpenMMCUDA, libOpenMMRPMDCUDA: libcuda.so.1: cannot open shared object file"
    assert doctor.plugin_failures([]) == "none"


def test_the_driver_is_asked_for_its_version(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.driver_version() is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Driver Version     : 580.95.05'\necho 'CUDA Version       : 13.0'\n")
    program.chmod(0o755)
    assert doctor.driver_version() == "580.95.05, for CUDA up to 13.0"
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not talk to the driver'\nexit 9\n")
    assert doctor.driver_version() is None


@pytest.mark.gpu
def test_doctor_finds_agreement_on_the_gpu():
    rows, fine = doctor.torch_rows()
    assert fine and {row[0] for row in rows[1:]} >= {"cpu", "cuda:0"} and doctor.driver_version()
    assert all(row[-1] == "agrees" for row in rows[1:])


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


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["single", "mixed", "double"])
@pytest.mark.parametrize("way", ["host", "native"])
def test_positions_on_the_gpu(precision, way):
    if way == "native":
        native("CUDA")
    system, x = argon()
    moving = context_of(system, "CUDA", precision)
    moving.setPositions(x.numpy())
    moving.setVelocitiesToTemperature(300.0, 1)
    moving.getIntegrator().step(600)
    there = read_positions(moving, "cuda", way)
    assert there.is_cuda
    assert float((there.cpu() - read_positions(moving, "cpu", "host")).abs().max()) < 1e-9
    write_positions(moving, x.cuda(), way)
    assert float((read_positions(moving, "cpu", "host") - x).abs().max()) <= 10 * ROUNDING[precision] + 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_host_takes_positions_of_a_gpu_to_any_platform(dtype):
    """One page-locked buffer serves many Contexts and calls; what a Context was given stays with it."""
    molecule = load_system("alanine-dipeptide")
    contexts = [context_of(molecule.system, "Reference") for _ in range(3)]
    x = torch.as_tensor(molecule.positions, dtype=dtype, device="cuda")
    read = []
    for k, one in enumerate(contexts):
        write_positions(one, x + k)
        read.append(read_positions(one, "cuda"))
    for k, one in enumerate(contexts):
        assert torch.equal(read[k], (x + k).double()) and torch.equal(read_positions(one), (x + k).double().cpu())


@pytest.mark.gpu
def test_the_context_is_on_the_device_of_torch_in_mixed_precision():
    mol = load_system("alanine-dipeptide")
    engine = OpenMMPotential(mol.system, "CUDA").engine(mol.positions[None])
    assert engine.properties == {"Precision": "mixed", "DeviceIndex": str(torch.cuda.current_device())}
    assert torch.isfinite(OpenMMPotential(mol.system, "CUDA")(torch.as_tensor(mol.positions[None]))).all()


@pytest.mark.gpu
def test_a_pool_of_proposals_never_leaves_the_gpu():
    from openmm_regflow import Flow, FlowProposal, TorchPotential

    mol = load_system("alanine-dipeptide")
    flow = Flow.load(mol.folder / "flow.safetensors", "cuda")
    potential = TorchPotential(mol.system, dtype=torch.float32, device="cuda")
    batch = FlowProposal(flow, potential, mol.temperature).sample(10_000)
    assert all(t.is_cuda for t in batch)


@pytest.mark.gpu
def test_everything_on_the_second_gpu():
    """Flow, energies, Context and positions on cuda:1, while torch's current device is another."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    from openmm_regflow import Flow, FlowProposal, TorchPotential
    from openmm_regflow.sampling import FlowSimulation

    mol, where = load_system("alanine-dipeptide"), torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    flow = Flow.load(mol.folder / "flow.safetensors", where)
    proposal = FlowProposal(flow, TorchPotential(mol.system, device=where), mol.temperature)
    batch = proposal.sample(1000, torch.Generator(where).manual_seed(0))
    assert all(part.device == where for part in batch)
    integrator = openmm.LangevinMiddleIntegrator(mol.temperature, 1.0, 0.001)
    platform, properties = openmm.Platform.getPlatformByName("CUDA"), openmm_properties("CUDA", where)
    simulation = app.Simulation(mol.topology, mol.system, integrator, platform, properties)
    simulation.context.setPositions(mol.positions)
    assert chosen(simulation.context) == ("mixed", "1")
    mixed = FlowSimulation(simulation, proposal, 8, 1000, seed=1)
    mixed.run(20, 10)
    assert mixed.statistics.n_accepted > 0 and mixed._read().device == where
    assert "on CUDA device 1" in choose_way(simulation.context, "cuda:0").reason


@pytest.mark.gpu
def test_every_phase_trains_on_the_gpu():
    from openmm_regflow import TorchPotential, load_system, recipes
    from openmm_regflow.units import thermal_energy

    mol = load_system("alanine-dipeptide")
    x = torch.as_tensor(mol.reference("train")[:600]).double()
    short = {"steps": 3, "batch_size": 64, "warmup": 1}
    config = recipes.RunConfig.model_validate(
        {
            "flow": {"n_layers": 2, "hidden": 16}, "teacher": {"hidden": 16, "depth": 1, "train": short},
            "pairs": {"n": 256, "n_steps": 2}, "regression": {"train": short}, "likelihood": {"train": short},
            "refinement": {"enabled": True, "rounds": 1, "pool": 500, "anchors": 100},
        }
    )  # fmt: skip
    u = TorchPotential(mol.system, dtype=torch.float64, device="cuda")
    kt = thermal_energy(mol.temperature)
    result = recipes.fit(mol.topology, x[:500], x[500:], config, device="cuda", reduced_potential=lambda x: u(x) / kt)
    assert result.flow.device.type == "cuda" and set(result.phases) == {"regression", "likelihood", "refinement"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["real_nvp", "res_nvp", "spline", "jet"])
def test_flows_are_made_of_coordinates_on_the_gpu(name):
    from openmm_regflow import flows, load_system

    mol = load_system("alanine-dipeptide")
    coordinates = flows.coordinates_for(mol.topology, torch.as_tensor(mol.reference("train")[:600])).to("cuda")
    flow = getattr(flows, name)(coordinates, n_layers=2, hidden=16).to("cuda")
    x, log_q = flow.sample(100, torch.Generator(device="cuda").manual_seed(0))
    assert x.is_cuda and float((flow.log_prob(x) - log_q).abs().nan_to_num().max()) < 1e-2


@pytest.mark.gpu
def test_a_real_lack_of_memory_is_one_line():
    total = torch.cuda.get_device_properties(0).total_memory
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(2 * total, dtype=torch.uint8, device="cuda")
    assert "out of memory" in memory_line(caught.value)


@pytest.mark.gpu
def test_one_warning_where_the_helper_cannot_be_built(monkeypatch):
    from openmm_regflow.device import native as way

    mol = load_system("alanine-dipeptide")
    way._attempt.cache_clear()
    errors._SAID.clear()
    monkeypatch.setattr(way, "VERSIONS", ("0.0",))
    contexts = [context_of(mol.system, "CUDA", "mixed") for _ in range(2)]
    with pytest.warns(RuntimeWarning, match="by way of the host") as caught:
        for one in contexts:
            one.setPositions(mol.positions)
            assert read_positions(one, "cuda").is_cuda and choose_way(one, "cuda").way == "host"
    assert len(caught) == 1
    way._attempt.cache_clear()
