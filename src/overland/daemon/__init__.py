"""Where parts are joined into the two daemons, and nowhere else."""

from __future__ import annotations

import contextlib
import os

NICE = -15


def run_first() -> None:
    """Ask for the processor ahead of the guests: in a move their stop waits for our answers."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
