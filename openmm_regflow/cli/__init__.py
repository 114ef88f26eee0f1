"""The command line: a thin shell over the package. Bad input gives one line and exit code 2, Ctrl-C gives 130."""

import io
import logging
import signal
import sys
import threading
from typing import Any, NoReturn

from openmm_regflow.cli import data, learning, results, workbench  # noqa: F401 (each registers its commands)
from openmm_regflow.cli.shell import app, one_of_several

__all__ = ["app", "main"]


def main(arguments: list[str] | None = None) -> None:
    """Entry point.

    Args:
        arguments: default ``sys.argv[1:]``.

    Raises:
        SystemExit: always; 0 for success, 2 for bad input, 130 for Ctrl-C and for SIGTERM.
    """
    # Dependencies announce themselves through logging when they are imported; errors still show.
    for name in ("pymbar", "openmmtools.multistate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A phi or a plus-minus must not end a command whose output goes to a file or terminal of another encoding.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # What a queue sends when the time is up, and `kill` to a job in the background, which does not hear Ctrl-C. One of
    # several ranks may be waiting for another, where Python hears nothing: they end as they would.
    listening = not one_of_several() and threading.current_thread() is threading.main_thread()
    former = signal.signal(signal.SIGTERM, _interrupt) if listening else None
    try:
        app(args=arguments, prog_name="openmm-regflow")
    finally:
        if listening:
            signal.signal(signal.SIGTERM, former)


def _interrupt(number: int, frame: Any) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second one must not disturb what ends the first
    raise KeyboardInterrupt
