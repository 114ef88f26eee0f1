"""Every exception this package raises on bad input: one base class, each naming value, place and remedy.

Beside them, warnings of what goes on more slowly than it could: once for each reason in a process.
"""

import warnings
from typing import Any

_SAID: set[str] = set()


class RegflowError(Exception):
    """Base class of all errors raised by openmm_regflow; the command line turns it into exit code 2."""


class InputError(RegflowError, ValueError):
    """A value given by the user is missing, malformed or of the wrong shape."""


class UnsupportedForceError(RegflowError):
    """A System holds a force or feature that this part of the package does not evaluate."""


class IncompatibleFlowError(RegflowError):
    """A flow (or pairs, or a checkpoint) belongs to another System, atom order or temperature."""


class CorruptFileError(RegflowError):
    """A file is truncated, damaged or not of the expected format."""


class DivergenceError(RegflowError):
    """Training produced NaN or an exploding loss and could not recover by rolling back."""


class InsufficientDataError(RegflowError):
    """Too few, too correlated or too one-sided samples for the estimate that was asked for."""


def first_line(error: BaseException) -> str:
    """What an error of another library says in its first line, without a full stop; its name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def complaints(error: Any, whole: str = "settings") -> str:
    """What pydantic has against values, in one line: where and why, of each.

    Args:
        error: a ``pydantic.ValidationError``.
        whole: name of the place of what concerns no single value.
    """
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or whole}: {e['msg']}" for e in error.errors())


def warn_once(text: str, reason: str | None = None, stacklevel: int = 3) -> None:
    """Give a RuntimeWarning unless the same reason has been given in this process.

    Args:
        text: of the warning.
        reason: what counts as the same; the text, if not given.
        stacklevel: as in ``warnings.warn``, counted from here.
    """
    reason = text if reason is None else reason
    if reason not in _SAID:
        _SAID.add(reason)
        warnings.warn(text, RuntimeWarning, stacklevel=stacklevel)
