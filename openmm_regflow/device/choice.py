"""Which torch device, and which OpenMM device and precision go with it."""

import re
import warnings

import torch

from openmm_regflow.errors import InputError, first_line

KNOWN = "known: cpu, cuda, cuda:N, auto"
#: OpenMM platforms that take a device and a precision.
GPU_PLATFORMS = ("CUDA", "HIP", "OpenCL")
#: What OpenMM says when a GPU, its driver or its compiler is at fault, and not the System or its positions.
GPU_TROUBLE = "CUDA|OpenCL|HIP|[Nn]o compatible|[Cc]reating [Cc]ontext|DeviceIndex"


def resolve_device(name: str = "cpu") -> torch.device:
    """The torch device for a name given by the user.

    Args:
        name: "cpu", "cuda", "cuda:1", ...; "auto" takes a GPU where there is one that works and the CPU otherwise, with
            a warning where there is one that does not. A GPU with a number becomes torch's current one, which is where
            the Contexts of this process go (`openmm_properties`).

    Raises:
        InputError: an unknown name, or a GPU that is not there; the line says why torch sees none.
    """
    if name == "auto":
        return _working(torch.device("cuda")) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}; {KNOWN}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported; {KNOWN}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"no CUDA device was found by torch: {why_no_gpu()}. Use --device cpu, or --device auto to choose by itself"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"there is no {name}; {torch.cuda.device_count()} CUDA device(s) were found")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _working(device: torch.device) -> torch.device:
    """The device, or the CPU with a warning where it fails a small computation."""
    reason = failure_of(device)
    if reason is None:
        return device
    warnings.warn(f"the GPU does not work ({reason}): going on on the CPU", RuntimeWarning, stacklevel=3)
    return torch.device("cpu")


def failure_of(device: torch.device) -> str | None:
    """What goes wrong in a small computation on a device, as one line; None where it works.

    A driver may list a GPU whose kernels this torch was not built for, or whose memory others hold.
    """
    try:
        found, expected = _small_computation(device), _small_computation(torch.device("cpu"))
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return None if abs(found / expected - 1) < 1e-6 else f"it computes {found} where {expected} is right"


def _small_computation(device: torch.device) -> float:
    """A matrix product (a library's) and elementwise kernels (torch's own)."""
    x = torch.arange(64.0, dtype=torch.float64, device=device).view(8, 8) / 64
    return float((x @ x + x.exp()).sum())


def why_no_gpu() -> str:
    """Why torch sees no GPU, as far as it knows."""
    built_for = torch.version.cuda
    if built_for is None:
        return f"torch {torch.__version__} is a build for CPUs; install one for CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the first line names the driver, or that there is none
        return f"torch is built for CUDA {built_for}, and {first_line(error)}"
    return f"torch is built for CUDA {built_for} and the driver lists no device (see CUDA_VISIBLE_DEVICES)"


def openmm_properties(platform: str, device: torch.device | str | None = None) -> dict[str, str]:
    """Properties of an OpenMM platform that go with a torch device: the same GPU, mixed precision.

    OpenMM and torch count GPUs alike (both by the driver, both under CUDA_VISIBLE_DEVICES). Mixed precision keeps
    positions to 1e-8 nm, single precision rounds an energy by more than a Metropolis step should see.

    Args:
        platform: name of the platform; Reference and CPU have no such properties.
        device: torch device; None for torch's current one.
    """
    if platform not in GPU_PLATFORMS:
        return {}
    properties = {"Precision": "mixed"}
    if platform == "CUDA" and torch.cuda.is_available():
        index = None if device is None else torch.device(device).index
        properties["DeviceIndex"] = str(torch.cuda.current_device() if index is None else index)
    return properties


def openmm_remedy() -> str:
    """How to install OpenMM's CUDA platform for the CUDA that this torch was built for."""
    major = (torch.version.cuda or "12").split(".")[0]
    return f"pip install 'openmm-regflow[cuda{major}]' (the same as openmm[cuda{major}])"


def synchronize(device: torch.device | str) -> None:
    """Wait until a GPU has done what it was given, for a clock to be read; other devices have done it already."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def memory_line(error: BaseException) -> str | None:
    """One line for a GPU that is out of memory, missing, or does not fit torch's or OpenMM's CUDA; else None."""
    # By its name: this module serves the learning side, too, which never imports OpenMM.
    of_openmm = type(error).__name__ == "OpenMMException"
    text, first = " ".join(str(error).split()), str(error).strip().partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError) or (of_openmm and re.search("OUT_OF_MEMORY|out of memory", text)):
        return (
            "the GPU is out of memory; take fewer samples at a time (-n, batch_size, pool), or --device cpu, or "
            "--device auto to go on there"
        )
    if isinstance(error, RuntimeError) and "CUDA" in first:
        return f"the GPU failed: {first.rstrip('.')}; see openmm-regflow doctor, or take --device cpu"
    if not of_openmm:
        return None
    if missing := re.search(r"no registered Platform called \"?(\w+)", text):
        return (
            f"OpenMM has no platform {missing[1]} here: {openmm_remedy()}, or take --device cpu; openmm-regflow doctor "
            "says which plugins failed to load"
        )
    if re.search(GPU_TROUBLE, text):
        return f"OpenMM cannot use the GPU: {text.rstrip('.')}; see openmm-regflow doctor, or take --device cpu"
    return None
