"""Memory that stays with the process between two uses, instead of being given back and taken again page by page.

glibc's allocator maps blocks of a few hundred kilobytes and more freshly from the kernel, and gives the end of its heap
back whenever 128 kB of it are free. The arrays of a flow are such blocks: at some sizes of the batch a third of
the time goes into page faults, and which sizes these are depends on what the process did before.
"""

import ctypes
import platform

from openmm_regflow.errors import InputError

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
#: Largest block that glibc takes from its heap [bytes]; more than this is refused.
_LARGEST_BLOCK = 32 << 20


def keep_freed_memory(megabytes: int = 512) -> bool:
    """Let glibc's allocator keep up to so much freed memory, for the rest of the process.

    A setting of the whole process: the package makes it in the processes of its commands, and leaves others alone.
    Call it once at the start of a script that works with flows on a CPU.

    Args:
        megabytes: freed memory at the end of the heap beyond this goes back to the kernel; 1 to 2047.

    Returns:
        whether it could be set; False where the C library is another one.

    Raises:
        InputError: megabytes out of range.
    """
    if not 1 <= megabytes <= 2047:
        raise InputError(f"megabytes is {megabytes}; 1 to 2047 can be kept")
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    settings = {
        _MMAP_THRESHOLD: _LARGEST_BLOCK,
        _TRIM_THRESHOLD: megabytes << 20,
        _TOP_PAD: min(64, megabytes) << 20,
    }
    return all(library.mallopt(key, value) for key, value in settings.items())
