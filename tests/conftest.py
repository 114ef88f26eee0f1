"""Shared fixtures: real systems, dtype and device flags."""

import pytest
import torch

# Test tensors are small: a second thread only waits, and on a busy machine both wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="torch device for the device-agnostic tests")


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param


@pytest.fixture
def reference_platform():
    """openmmtools' Contexts on the Reference platform, none left over from test to test."""
    import openmm
    from openmmtools import cache

    cache.global_context_cache.empty()
    cache.global_context_cache.platform = openmm.Platform.getPlatformByName("Reference")
    yield
    cache.global_context_cache.empty()
