"""The last megabytes of every memory copy under emulation, put there to be recognised.

QEMU sends memory block by block, the largest first, and under emulation stops the VM at the end of
the one round (ADR 0006). Pages of zeros cost next to nothing, so nobody can tell from how much is
left how long it will take. Hence the firmware is made longer, at its front, which no guest looks
at: it is the second block, its pages are never zero, and when no more than it is left, the rest of
the round takes exactly as long as the pace says.
"""

from __future__ import annotations

import random
from pathlib import Path

from overland.ports import HypervisorFailure

COUNTDOWN_BYTES = 12 << 20
_FIRMWARE = "bios-256k.bin"


def long_firmware(folders: list[str], path: Path) -> Path:
    """Write QEMU's own firmware from one of `folders`, made longer, to `path`; returns it.

    The same on every host. HypervisorFailure when there is no firmware, or no room.
    """
    for folder in folders:
        found = Path(folder) / _FIRMWARE
        if found.exists():
            front = random.Random(COUNTDOWN_BYTES).randbytes(COUNTDOWN_BYTES)
            try:
                path.write_bytes(front + found.read_bytes())
            except OSError as error:
                raise HypervisorFailure(f"{path}: {error.strerror}") from None
            return path
    raise HypervisorFailure(f"QEMU's firmware {_FIRMWARE} is not installed")
