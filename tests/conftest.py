"""Shared fixtures: real systems, dtype and device flags."""

import pytest
import torch

# Test tensors are small: a second thread only waits, and on a busy machine both wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="torch device for the device-agnostic tests")


def pytest_collection_modifyitems(items):
    """Tests with the marker gpu are skipped where torch has none to run them on."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch has no CUDA device"))


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
