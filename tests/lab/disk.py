"""A small disk of its own for one folder of a lab, which can be filled and freed again."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SIZE = "256m"
"""An NVE keeps 12 MiB of firmware beside what little it writes, and a VM's memory to compare it."""


class SmallDisk:
    """A tmpfs at `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ballast = folder / "ballast"

    def mount(self) -> None:
        """What the folder had is on the small disk afterwards. Nobody may write meanwhile."""
        self._folder.mkdir(parents=True, exist_ok=True)
        aside = self._folder.with_suffix(".aside")
        shutil.copytree(self._folder, aside)
        _run("mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(self._folder))
        shutil.copytree(aside, self._folder, dirs_exist_ok=True)
        shutil.rmtree(aside)

    def fill(self, but_bytes: int = 0) -> None:
        """Take the last byte, whoever else writes meanwhile; or leave `but_bytes`."""
        size = 1 << 20
        with self._ballast.open("ab", buffering=0) as file:
            while size:
                try:
                    file.write(bytes(size))
                except OSError:
                    size //= 2
            file.truncate(max(0, file.tell() - but_bytes))

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)


def unmount_below(folder: Path) -> None:
    """Remove all small disks in `folder`, whoever still has files there."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in mounts:
        if mount.startswith(f"{folder}/"):
            _run("umount", "--lazy", mount)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
