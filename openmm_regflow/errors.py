"""Every exception this package raises on bad input: one base class, each naming value, place and remedy."""


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
