"""Which accelerator works here: seen, not assumed.

A host may show /dev/kvm and still be unable to run a guest on it. So a 512-byte guest is booted
under KVM; only when it says its word in time is KVM used, otherwise emulation with a notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from pathlib import Path

TRIAL_S = 4.0
_WORD = b"K"
# 16-bit: mov dx, 0xe9; mov al, 'K'; out dx, al; hlt; jmp $
_SECTOR = bytes.fromhex("bae900b04beef4ebfe").ljust(510, b"\0") + b"\x55\xaa"

NOTICE = "KVM does not run a guest here: VMs are emulated (TCG), slower but complete"


_SEEN = Path("/run/overland")
"""What was seen holds until the host boots again, so a restarted daemon need not look again."""


async def accelerator(binary: str) -> str:
    """Return `kvm` when a guest was seen to boot under it since the host booted, else `tcg`."""
    if not Path("/dev/kvm").exists():
        return "tcg"
    found = shutil.which(binary) or binary
    note = _SEEN / f"accelerator-{found.replace('/', '-')}-{Path(found).stat().st_mtime_ns}"
    with contextlib.suppress(OSError):
        return note.read_text()
    seen = await _tried(binary)
    with contextlib.suppress(OSError):
        _SEEN.mkdir(exist_ok=True)
        note.write_text(seen)
    return seen


async def _tried(binary: str) -> str:
    with tempfile.TemporaryDirectory(prefix="overland-kvm-") as folder:
        disk, out = Path(folder, "disk"), Path(folder, "out")
        disk.write_bytes(_SECTOR)
        process = await asyncio.create_subprocess_exec(
            binary,
            *("-M", "pc", "-accel", "kvm", "-cpu", "host", "-m", "16", "-nodefaults"),
            *("-display", "none", "-drive", f"file={disk},format=raw,if=ide"),
            *("-debugcon", f"file:{out}"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TRIAL_S):
                    while process.returncode is None:
                        if out.exists() and out.read_bytes().endswith(_WORD):
                            return "kvm"
                        await asyncio.sleep(0.05)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    return "tcg"
