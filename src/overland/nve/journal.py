"""This NVE's parts in open moves, on disk: what a restarted daemon goes on from.

A part is written before its effects are performed. The file need not outlive the host: with the
host the VM is gone as well, and nothing is left to hand over.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from overland.mobility.nve import Part
from overland.model.cluster import Record

log = logging.getLogger(__name__)


class Kept(Record, frozen=True, kw_only=True):
    """A part and the version its move began with."""

    part: Part
    base_version: int


class PartJournal:
    """One JSON file per open move in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, kept: Kept) -> None:
        """Write or replace; a reader sees the former file or this one. OSError: disk full."""
        path = self._path(kept.part.move)
        fresh = path.with_suffix(".new")
        try:
            fresh.write_bytes(msgspec.json.encode(kept))
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        fresh.replace(path)

    def forget(self, move: str) -> None:
        """Content with absence."""
        self._path(move).unlink(missing_ok=True)

    def load(self) -> list[Kept]:
        """All parts; one that cannot be read is reported and left to the NVA's repair."""
        found = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=Kept))
            except (OSError, msgspec.DecodeError) as error:
                log.warning("part %s cannot be read: %s", path.name, error)
        return found

    def _path(self, move: str) -> Path:
        return self._folder / f"{move}.json"
