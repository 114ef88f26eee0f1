"""The command line: a thin shell over the package. Bad input gives one line and exit code 2, Ctrl-C gives 130."""

import logging
import signal
import threading

from openmm_regflow.cli import data, learning, results, workbench  # noqa: F401 (each registers its commands)
from openmm_regflow.cli.shell import app

__all__ = ["app", "main"]


def main(arguments: list[str] | None = None) -> None:
    """Entry point.

    Args:
        arguments: default ``sys.argv[1:]``.

    Raises:
        SystemExit: always; 0 for success, 2 for bad input, 130 for Ctrl-C and for SIGTERM.
    """
    if threading.current_thread() is threading.main_thread():
        # What a queue sends when the time is up, and `kill` to a job in the background, which does not hear Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Dependencies announce themselves through logging when they are imported; errors still show.
    for name in ("pymbar", "openmmtools.multistate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    app(args=arguments, prog_name="openmm-regflow")
