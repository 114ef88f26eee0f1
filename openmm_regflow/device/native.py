"""The native way: positions between an OpenMM Context on a GPU and torch without the host.

A small C++ helper (native.cpp) is compiled on demand against the headers of OpenMM's wheel. It knows how OpenMM 8.6.1
holds positions, so it is used with that version alone, and only after a self-test against `getState` on the Context at
hand. It has passed its tests on OpenCL (by way of the host) and on CUDA (an H200).
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sysconfig
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmm_regflow.errors import RegflowError

SOURCE = Path(__file__).with_name("native.cpp")
#: Versions of OpenMM whose headers and layout the helper was written for.
VERSIONS = ("8.6.1",)


class Unavailable(RegflowError):
    """The native way cannot be used; the message says why."""


class Layout(NamedTuple):
    """How a Context holds its positions.

    Attributes:
        order: `(n_atoms,)` the atom in each slot.
        cells: `(n_atoms, 3)` boxes by which each slot was moved.
        box: `(3, 3)` periodic box vectors [nm].
    """

    order: Tensor
    cells: Tensor
    box: Tensor


def unpack(posq: Tensor, correction: Tensor | None, layout: Layout) -> Tensor:
    """Positions `(n_atoms, 3)` [nm], float64, in the order of the System.

    Args:
        posq: `(padded, 4)` x, y, z [nm] and a charge.
        correction: `(padded, 4)` float32, what single precision left out; None in single and double precision.
        layout: of the same moment.
    """
    n = len(layout.order)
    x = posq[:n, :3].double()
    if correction is not None:
        x = x + correction[:n, :3].double()
    x = x - layout.cells.double() @ layout.box
    return torch.empty_like(x).index_copy_(0, layout.order, x)


def pack(positions: Tensor, posq: Tensor, correction: Tensor | None, layout: Layout) -> None:
    """The inverse of `unpack`, in place and without moves by boxes; charges and padding stay."""
    n = len(layout.order)
    x = positions.double()[layout.order]
    posq[:n, :3] = x.to(posq.dtype)
    if correction is not None:
        correction[:n, :3] = (x - posq[:n, :3].double()).to(correction.dtype)


class Native:
    """Reads and writes the positions of Contexts on one kind of platform.

    Args:
        platform: "CUDA", or "OpenCL" by way of the host.

    Raises:
        Unavailable: no compiler, no headers, another version of OpenMM, or a helper that cannot be loaded.
    """

    def __init__(self, platform: str = "CUDA") -> None:
        self.platform = platform
        self.library = load(platform)

    def describe(self, context: Any) -> tuple[int, int, torch.dtype, bool, int]:
        """Atoms, padded atoms, type of posq, whether there are corrections, index of the device."""
        numbers = (ctypes.c_int * 5)()
        self._call("describe", context, numbers)
        dtype = torch.float64 if numbers[2] == 8 else torch.float32
        return numbers[0], numbers[1], dtype, bool(numbers[3]), numbers[4]

    def read(self, context: Any, device: torch.device) -> Tensor:
        """Positions `(n_atoms, 3)` [nm], float64 on the device."""
        return unpack(*self._fetch(context, device))

    def write(self, context: Any, positions: Tensor) -> None:
        """Set positions `(n_atoms, 3)` [nm] of a Context that has some already."""
        posq, correction, layout = self._fetch(context, positions.device)
        pack(positions.detach(), posq, correction, layout)
        if positions.device.type == "cuda":
            torch.cuda.synchronize(positions.device)
        self._call("write", context, *_pointers(posq, correction))

    def _fetch(self, context: Any, device: torch.device) -> tuple[Tensor, Tensor | None, Layout]:
        n, padded, dtype, corrected, _ = self.describe(context)
        posq = torch.empty(padded, 4, dtype=dtype, device=device)
        correction = torch.empty(padded, 4, dtype=torch.float32, device=device) if corrected else None
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # nobody else may still use this memory
        self._call("read", context, *_pointers(posq, correction))
        return posq, correction, self._layout(context, n, device)

    def _layout(self, context: Any, n: int, device: torch.device) -> Layout:
        order, cells = torch.empty(n, dtype=torch.int32), torch.empty(n, 3, dtype=torch.int32)
        box = torch.empty(3, 3, dtype=torch.float64)
        self._call("layout", context, *(ctypes.c_void_p(t.data_ptr()) for t in (order, cells, box)))
        return Layout(order.long().to(device), cells.to(device), box.to(device))

    def _call(self, name: str, context: Any, *arguments: Any) -> None:
        function = getattr(self.library, f"regflow_{name}")
        if function(ctypes.c_void_p(int(context.this)), *arguments):
            raise Unavailable(self.library.regflow_error().decode())


def _pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]


def load(platform: str) -> ctypes.CDLL:
    """The helper for a platform, compiled if this machine has not done so before; tried once in a process.

    Raises:
        Unavailable: see `Native`; the same reason every time.
    """
    library = _attempt(platform)
    if isinstance(library, str):
        raise Unavailable(library)
    return library


@cache
def _attempt(platform: str) -> ctypes.CDLL | str:
    """The helper, or why it cannot be had: a compiler that fails takes seconds, and would for every Context."""
    try:
        return _load(platform)
    except Unavailable as error:
        return str(error)


def _load(platform: str) -> ctypes.CDLL:
    if platform not in ("CUDA", "OpenCL"):
        raise Unavailable(f"the platform {platform} holds its positions on the host")
    try:
        found = version("openmm")
    except PackageNotFoundError:
        raise Unavailable("OpenMM was not installed as a package, so its headers are unknown") from None
    if found not in VERSIONS:
        raise Unavailable(f"the helper is written for OpenMM {', '.join(VERSIONS)}; {found} is installed")
    try:
        library = ctypes.CDLL(str(build(platform, found)))
    except OSError as error:
        raise Unavailable(f"the helper cannot be loaded: {error}") from error
    library.regflow_error.restype = ctypes.c_char_p
    return library


def build(platform: str, openmm_version: str) -> Path:
    """Path of the compiled helper in the user's cache.

    Raises:
        Unavailable: no compiler, no headers, or a compiler that fails.
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise Unavailable("no C++ compiler was found (variable CXX)")
    folder = openmm_folder()
    includes = [folder / "include", folder / "include" / "openmm" / platform.lower(), *toolkit_headers(platform)]
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-w", *(["-DREGFLOW_OPENCL"] if platform == "OpenCL" else [])]
    libraries = [folder / "lib", folder / "lib" / "plugins"]
    flags += [*(f"-I{i}" for i in includes), *(f"-L{p}" for p in libraries), *(f"-Wl,-rpath,{p}" for p in libraries)]
    key = hashlib.sha256(repr((SOURCE.read_text(), openmm_version, compiler, flags)).encode()).hexdigest()[:16]
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openmm_regflow"
    target = cached / f"native-{platform.lower()}-{key}.so"
    if not target.is_file():
        try:
            cached.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(f"{cached} cannot be written: {error}") from error
        temporary = target.with_suffix(f".{os.getpid()}")
        linked = ["-lOpenMM", f"-lOpenMM{platform}", "-ldl"]
        command = [compiler, *flags, str(SOURCE), *linked, "-o", str(temporary)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["the compiler gave no reason"]
            raise Unavailable(f"the helper cannot be compiled: {lines[0]}")
        temporary.replace(target)
    return target


def openmm_folder() -> Path:
    """Where OpenMM's wheel keeps ``include`` and ``lib``.

    Raises:
        Unavailable: not there.
    """
    spec = find_spec("openmm")
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parents[1] / "OpenMM.libs"
        if (folder / "include" / "openmm" / "cuda").is_dir():
            return folder
    raise Unavailable("this installation of OpenMM has no headers (its wheels from PyPI have them)")


def toolkit_headers(platform: str) -> list[Path]:
    """Folders that may hold the headers of the CUDA toolkit (or, in CPATH, of OpenCL)."""
    if platform != "CUDA":
        return []
    homes = [Path(home) / "include" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    packages = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/include"))
    return [path for path in (*homes, *packages) if path.is_dir()]
