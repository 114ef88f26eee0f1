"""Functions that `torch.compile` makes quicker, and that run as they are, after one warning, where it cannot."""

import threading
from collections.abc import Callable
from typing import Any

import torch

from openmm_regflow.errors import first_line, warn_once

#: Held during a first call: torch records and compiles in one thread at a time, and fails in the others.
_FIRST = threading.RLock()


class WithFallback:
    """A plain function and the compiled one in its place; a subclass says how to compile and call it in `quick`.

    If compilation fails, for example for want of a C++ compiler, one warning is given and the plain function runs from
    then on. Once compiled code has worked, its errors are errors of the input and are raised.

    Args:
        plain: the function.
        name: what it computes, for the warning.

    Attributes:
        failed: it could not be compiled.
        worked: compiled code has run.
    """

    def __init__(self, plain: Callable[..., Any], name: str) -> None:
        self.plain, self.name = plain, name
        self.failed = self.worked = False

    def quick(self, *arguments: Any) -> Any:
        """Compile on the first call, and run the compiled code."""
        raise NotImplementedError

    def __call__(self, *arguments: Any) -> Any:
        """The function's value."""
        if self.worked or self.failed:
            return self._value(*arguments)
        with _FIRST:
            return self._value(*arguments)

    def _value(self, *arguments: Any) -> Any:
        if not self.failed:
            try:
                result = self.quick(*arguments)
                self.worked = True
                return result
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                # The chain raises many kinds of error (missing compiler, failed compiler, unsupported operation); the
                # plain function below decides whether the input itself was at fault.
                if self.worked:
                    raise
                self.failed = True
                self._warn(error)
        return self.plain(*arguments)

    def _warn(self, error: Exception) -> None:
        reason = first_line(error)
        # A missing compiler is said once, not for every function.
        warn_once(
            f"could not compile {self.name} ({reason}); running eagerly, several times slower. It takes a C++ compiler "
            "on the path (or in the variable CXX).",
            reason,
            stacklevel=4,
        )
