"""A clock of its own for one process, which can be set while it runs, as a bad time server would.

Only CLOCK_REALTIME is set; CLOCK_MONOTONIC and sleeping go on. libfaketime does not do: it makes an
absolute sleep on CLOCK_MONOTONIC, which is Python's `time.sleep`, fail with EINVAL.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

HOUR_S = 3600
_SOURCE = Path(__file__).with_name("clock.c")


class Clock:
    """`file` says by how many seconds the clock is wrong; the process looks each time."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._library = file.with_suffix(".so")
        file.write_bytes(bytes(8))
        build = ["gcc", "-O2", "-Wall", "-shared", "-fPIC", "-o", str(self._library), str(_SOURCE)]
        subprocess.run(build, check=True)

    def step(self, seconds: int) -> None:
        """From now on the clock is `seconds` ahead of the machine's, or behind it."""
        with self._file.open("r+b", buffering=0) as file:
            file.write(struct.pack("=q", seconds))

    @property
    def environment(self) -> dict[str, str]:
        """What a process must be started with to go by this clock."""
        return {"LD_PRELOAD": str(self._library), "CLOCK_FILE": str(self._file)}
