"""Memory that is kept: fewer page faults, in a process of its own."""

import platform
import subprocess
import sys

import pytest

from openmm_regflow.allocation import keep_freed_memory
from openmm_regflow.errors import InputError

PROGRAM = """
import resource, sys
import numpy as np
from openmm_regflow.allocation import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory(200)
def use():
    for size in (3, 5, 7):
        arrays = [np.ones(size << 17) for _ in range(2)]
for _ in range(3):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again_without_page_faults():
    """Ten times 30 MB are 76,800 pages of 4 kB; a kernel may map larger ones, but not none."""
    given_back = faults("given back")
    assert given_back > 100
    assert faults("kept") < 0.05 * given_back


@pytest.mark.parametrize("megabytes", [0, -1, 2048])
def test_an_amount_out_of_range_is_refused(megabytes):
    with pytest.raises(InputError, match="megabytes"):
        keep_freed_memory(megabytes)
