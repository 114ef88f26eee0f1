"""OpenMMPotential: platforms, executors, dead workers, exact keys, bad rows."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch

from openmm_regflow.errors import InputError
from openmm_regflow.potentials import OpenMMPotential
from openmm_regflow.potentials import openmm_potential as module


def chain(n=6, k=1000.0):
    """A small chain with bonds and charges."""
    system = openmm.System()
    bond, force = openmm.HarmonicBondForce(), openmm.NonbondedForce()
    for i in range(n):
        system.addParticle(1.0)
        force.addParticle((-1) ** i * 0.2, 0.1, 0.3)
        if i:
            bond.addBond(i - 1, i, 0.1, k)
    system.addForce(bond)
    system.addForce(force)
    return system


def positions(n=40, n_atoms=6):
    return np.random.default_rng(3).uniform(-0.5, 0.5, size=(n, n_atoms, 3))


@pytest.fixture(scope="module")
def expected():
    return OpenMMPotential(chain(), platform="Reference").energy_and_forces(positions())


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        yield executor


def assert_same(result, expected):
    for mine, reference in zip(result, expected):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-9)


def test_float64_on_the_cpu(expected):
    energy, forces = expected
    assert energy.dtype == forces.dtype == torch.float64 and energy.device.type == "cpu"
    assert energy.shape == (40,) and forces.shape == (40, 6, 3)


def test_spawned_processes_of_the_user(pool, expected):
    assert_same(OpenMMPotential(chain(), "Reference", pool).energy_and_forces(positions()), expected)


def test_threads(expected):
    with ThreadPoolExecutor(1) as executor:
        assert_same(OpenMMPotential(chain(), "Reference", executor).energy_and_forces(positions()), expected)


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_threads_do_not_share_a_context(platform):
    """A Context holds one configuration at a time; threads that shared one returned each other's energies."""
    x = positions(2000)
    alone = OpenMMPotential(chain(), platform)(x)
    with ThreadPoolExecutor(4) as executor:
        together = OpenMMPotential(chain(), platform, executor)(x)
    # The CPU platform adds in single precision and in any order.
    tolerance = 0.0 if platform == "Reference" else 1e-4
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=10 * tolerance)


def test_a_forked_worker_builds_its_own_context():
    """One that came along with the fork would wait for threads that did not."""
    code = """
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import numpy as np, sys
sys.path.insert(0, {tests!r})
from test_potentials_openmm import chain, positions
from openmm_regflow.potentials import OpenMMPotential
warnings.simplefilter("ignore")
x = positions(20)
here = OpenMMPotential(chain(), "CPU")(x)
with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
    there = OpenMMPotential(chain(), "CPU", pool)(x)
print(float((here - there).abs().max()) < 1e-2)
"""
    code = code.format(tests=str(Path(__file__).parent))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.split()[-1] == "True", result.stderr


def test_a_batch_without_a_finite_row_does_not_choose_the_platform():
    module._FASTEST.clear()
    potential = OpenMMPotential(chain())
    assert potential(positions(0)).shape == (0,)
    assert torch.isinf(potential(np.full((3, 6, 3), np.nan))).all()
    assert not module._FASTEST
    potential(positions(1))
    assert len(module._FASTEST) == 1
    module._FASTEST.clear()


def test_a_worker_that_dies_costs_a_warning_only(expected):
    with OpenMMPotential(chain(), "Reference", 1) as potential:
        assert_same(potential.energy_and_forces(positions()), expected)
        (pid,) = potential._executor._processes
        os.kill(pid, signal.SIGKILL)
        with pytest.warns(UserWarning, match="lost with a worker"):
            assert_same(potential.energy_and_forces(positions()), expected)
        assert_same(potential.energy_and_forces(positions()), expected)


def test_a_dead_pool_of_the_user_is_replaced_by_this_process(expected):
    executor = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    potential = OpenMMPotential(chain(), "Reference", executor)
    potential(positions())
    os.kill(next(iter(executor._processes)), signal.SIGKILL)
    with pytest.warns(UserWarning, match="lost with a worker"):
        assert_same(potential.energy_and_forces(positions()), expected)
    executor.shutdown()


def test_contexts_are_keyed_by_the_exact_system():
    """Systems that print alike but differ in the last bit of one number have their own Contexts."""
    x = positions(1)
    one = OpenMMPotential(chain(), "Reference")
    other = OpenMMPotential(chain(k=np.nextafter(1000.0, 2000.0)), "Reference")
    assert one.engine(x).key != other.engine(x).key
    assert one.engine(x).key == OpenMMPotential(chain(), "Reference").engine(x).key
    assert one(x) != other(x)


def test_positions_that_print_alike_are_evaluated_apart():
    x = positions(1)
    y = x.copy()
    y[0, 0, 0] += 1e-9
    potential = OpenMMPotential(chain(), "Reference")
    first, second = potential(x), potential(y)
    assert first != second
    assert potential(x) == first


def test_two_potentials_with_parameters_share_a_context_without_mixing():
    system = chain()
    force = openmm.CustomBondForce("k*r^2")
    force.addGlobalParameter("k", 1.0)
    force.addBond(0, 3, [])
    system.addForce(force)
    x = positions(3)
    one, other = OpenMMPotential(system, "Reference"), OpenMMPotential(system, "Reference")
    before = other(x)
    one.set_parameter("k", 100.0)
    changed = one(x)
    assert (changed != before).all()
    torch.testing.assert_close(other(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_bad_rows_are_infinite_and_counted(bad, expected):
    x = positions()
    x[7, 2, 1] = bad
    x[9, 1] = x[9, 0] = 0.25
    potential = OpenMMPotential(chain(), "Reference")
    energy, forces = potential.energy_and_forces(x)
    assert torch.isinf(energy[[7, 9]]).all() and (energy[[7, 9]] > 0).all() and (forces[[7, 9]] == 0).all()
    assert potential.non_finite == 2
    good = [k for k in range(40) if k not in (7, 9)]
    assert_same((energy[good], forces[good]), (expected[0][good], expected[1][good]))


def test_empty_batch():
    energy, forces = OpenMMPotential(chain()).energy_and_forces(np.empty((0, 6, 3)))
    assert energy.shape == (0,) and forces.shape == (0, 6, 3)


def test_the_platform_named_is_the_one_used():
    x = positions(2)
    for name in ("Reference", "CPU"):
        potential = OpenMMPotential(chain(), platform=name)
        potential(x)
        assert potential.engine(x).context().getPlatform().getName() == name


def test_an_unknown_platform_is_refused():
    with pytest.raises(InputError, match=r"'Abacus'.*Reference"):
        OpenMMPotential(chain(), platform="Abacus")


def test_the_fastest_platform_is_probed_once():
    module._FASTEST.clear()
    x = positions(4)
    potential = OpenMMPotential(chain())
    platform = potential.engine(x).platform
    key = potential.engine(x).digest, frozenset()
    assert list(module._FASTEST) == [key]
    module._FASTEST[key] = ("CPU", {"Threads": "1"})  # would be lost by a second probe
    assert OpenMMPotential(chain()).engine(x).platform == "CPU"
    assert platform in ("Reference", "CPU")
    module._FASTEST.clear()


def test_virtual_sites_are_placed_anew():
    system = chain()
    system.setParticleMass(5, 0.0)
    system.setVirtualSite(5, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    x = positions(3)
    y = x.copy()
    y[:, 5] = 0.0
    potential = OpenMMPotential(system, "Reference")
    torch.testing.assert_close(potential(x), potential(y), rtol=0, atol=0)


def test_gradient_is_minus_the_force(expected):
    x = torch.tensor(positions(), requires_grad=True)
    OpenMMPotential(chain(), "Reference")(x).sum().backward()
    torch.testing.assert_close(x.grad, -expected[1])


def test_contexts_are_let_go():
    """One for each System and thread would stay for the life of the process."""

    def own():
        return [place for place in module._CONTEXTS if place[0] == os.getpid()]

    x = positions(1)
    for k in range(module._MAX_CONTEXTS + 5):
        OpenMMPotential(chain(k=1000.0 + k), "Reference")(x)
    assert len(own()) == module._MAX_CONTEXTS
    last = OpenMMPotential(chain(k=1000.0 + k), "Reference")
    with ThreadPoolExecutor(2) as threads, OpenMMPotential(chain(k=1000.0 + k), "Reference", threads) as potential:
        expected = potential(positions())
    assert len(own()) < module._MAX_CONTEXTS and not any(key.startswith(last._digest) for _, _, key in own())
    torch.testing.assert_close(last(positions()), expected)
    used = own()[-1]
    for k in range(module._MAX_CONTEXTS - 1):
        last(x)
        OpenMMPotential(chain(k=3000.0 + k), "Reference")(x)
    assert used in own()  # the one in use stays


def test_properties_without_a_platform_choose_among_those_that_have_them(expected):
    found = OpenMMPotential(chain(), properties={"Threads": "1"})(positions())
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-3)  # the CPU platform's, in single precision
    with pytest.raises(InputError, match="no platform has the properties"):
        OpenMMPotential(chain(), properties={"Nonsense": "1"})(positions())


def test_virtual_sites_have_no_gradient_of_their_own():
    """They are placed anew from their atoms, whose gradients hold their forces already."""
    system = openmm.System()
    for mass in (10.0, 10.0, 10.0, 10.0, 0.0):
        system.addParticle(mass)
    site = 4
    system.setVirtualSite(site, openmm.TwoParticleAverageSite(1, 2, 0.3, 0.7))
    bond = openmm.HarmonicBondForce()
    for i, j in ((0, 1), (1, 2), (2, 3), (site, 3), (site, 0)):
        bond.addBond(i, j, 0.2, 500.0)
    system.addForce(bond)
    potential = OpenMMPotential(system, "Reference")
    x = torch.as_tensor(positions(1, 5)).requires_grad_()
    (gradient,) = torch.autograd.grad(potential(x).sum(), x)
    step, expected = 1e-6, torch.zeros_like(gradient)
    for k in range(15):
        ends = x.detach().clone().repeat(2, 1, 1).view(2, 15)
        ends[0, k] += step
        ends[1, k] -= step
        up, down = potential(ends.view(2, 5, 3))
        expected.view(-1)[k] = (up - down) / (2 * step)
    assert torch.allclose(gradient, expected, atol=1e-3 * float(expected.abs().max()))
    assert (gradient[0, site] == 0).all()
