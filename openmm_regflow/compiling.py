"""Functions that `torch.compile` makes quicker, and that run as they are, after one warning, where it cannot."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from openmm_regflow.errors import first_line, warn_once

#: Held during a first call: torch records and compiles in one thread at a time, and fails in the others.
_FIRST = threading.RLock()
#: What compilation takes, by device.
NEEDS = {
    "cpu": "It takes a C++ compiler on the path (or in the variable CXX).",
    "cuda": "It takes Triton, which comes with torch for CUDA, and a GPU that it knows.",
}


class WithFallback:
    """A plain function and the compiled one in its place; a subclass says how to compile and call it in `quick`.

    If compilation fails, for example for want of a C++ compiler, one warning is given and the plain function runs from
    then on. Once compiled code has worked, its errors are errors of the input and are raised. Each type of device has
    a compiler of its own, which works or does not.

    Args:
        plain: the function; its first argument is a tensor, or a sequence of them.
        name: what it computes, for the warning.

    Attributes:
        failed: types of device for which it could not be compiled.
        worked: types of device on which compiled code has run.
    """

    def __init__(self, plain: Callable[..., Any], name: str) -> None:
        self.plain, self.name = plain, name
        self.failed: set[str] = set()
        self.worked: set[str] = set()

    def quick(self, *arguments: Any) -> Any:
        """Compile on the first call, and run the compiled code."""
        raise NotImplementedError

    def __call__(self, *arguments: Any) -> Any:
        """The function's value."""
        first = arguments[0]
        device = (first if isinstance(first, Tensor) else first[0]).device.type
        if device in self.worked | self.failed:
            return self._value(device, *arguments)
        with _FIRST:
            return self._value(device, *arguments)

    def _value(self, device: str, *arguments: Any) -> Any:
        if device not in self.failed:
            try:
                result = self.quick(*arguments)
                self.worked.add(device)
                return result
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                # The chain raises many kinds of error (missing compiler, failed compiler, unsupported operation); the
                # plain function below decides whether the input itself was at fault.
                if device in self.worked:
                    raise
                self.failed.add(device)
                self._warn(error, device)
        return self.plain(*arguments)

    def _warn(self, error: Exception, device: str) -> None:
        reason = first_line(error)
        # A missing compiler is said once, not for every function.
        warn_once(
            f"could not compile {self.name} ({reason}); running eagerly, several times slower. {NEEDS.get(device, '')}",
            reason,
            stacklevel=4,
        )
