"""An NVE whose disk is full: it takes no part that it could not find again (HO-36)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from overland.mobility import messages as m
from overland.mobility.nve import Part
from overland.nve.handovers import Handovers
from overland.nve.journal import Kept, PartJournal
from overland.nve.moving import Moving
from overland.ports import GateCounters
from tests.core.moves import NEW, PORT, VM
from tests.lab.disk import SmallDisk, unmount_below


class Full(PartJournal):
    """A journal on a disk with room for so many parts, and not a byte more."""

    def __init__(self, folder: Path, room: int = 0) -> None:
        super().__init__(folder)
        self._room = room

    def keep(self, kept: Kept) -> None:
        if self._room > 0:
            self._room -= 1
            super().keep(kept)
            return
        raise OSError(28, "No space left on device")


class Copy:
    """A hypervisor with one copy of the VM."""

    def __init__(self, state: str) -> None:
        self.is_now: str | None = state

    async def state(self, vm: str) -> str | None:
        return self.is_now

    async def stop(self, vm: str) -> None:
        self.is_now = None

    async def received(self, vm: str, timeout_s: float) -> int:
        await asyncio.Event().wait()  # nothing more of it comes
        return 0


class Anything:
    """A path or a ground on which everything succeeds."""

    def __getattr__(self, name: str) -> Any:
        async def done(*_: object, **__: object) -> Any:
            return GateCounters() if name == "count_port" else 0

        return (lambda _: None) if name in ("moving", "drop") else done


class Ground(Anything):
    """Writes down what is said to be moving."""

    def __init__(self, moving: list[frozenset[Moving]]) -> None:
        self._moving = moving

    def moving(self, entries: frozenset[Moving]) -> None:
        self._moving.append(entries)


def handovers(
    journal: PartJournal, copy: Copy, said: list[m.AnyReport], on: Anything | None = None
) -> Handovers:
    path, ground = cast("Any", Anything()), cast("Any", on or Anything())
    return Handovers(
        *(NEW, cast("Any", copy), path, path, ground),
        *(said.append, 10, journal, lambda _: ""),
    )


@pytest.mark.req("R-14")
async def test_a_part_that_cannot_be_written_is_not_begun(tmp_path: Path) -> None:
    said: list[m.AnyReport] = []
    nve = handovers(Full(tmp_path), Copy("incoming"), said)
    nve.order(m.PrepareNew(move="m1", vm=VM, version=1, ports=(PORT,)))
    assert said == [m.Failed(move="m1", nve=NEW, step="journal", why="No space left on device")]
    assert nve.open_moves() == ()


@pytest.mark.req("R-14")
async def test_a_former_moves_entries_move_no_more_although_the_next_part_cannot_be_written(
    tmp_path: Path,
) -> None:
    said: list[m.AnyReport] = []
    moving: list[frozenset[Moving]] = []
    nve = handovers(Full(tmp_path, room=1), Copy("running"), said, Ground(moving))
    nve.order(m.PreparePeer(move="m1", version=1, ports=(PORT,)))
    assert [each.port for each in moving[-1]] == [PORT.port]
    nve.order(m.PreparePeer(move="m2", version=2, ports=(PORT,)))
    assert m.Failed(move="m2", nve=NEW, step="journal", why="No space left on device") in said
    assert moving[-1] == frozenset()


@pytest.mark.req("R-14")
@pytest.mark.parametrize(("state", "left"), [("running", "running"), ("incoming", None)])
async def test_a_new_nve_leaves_a_copy_that_runs_alone(
    tmp_path: Path, state: str, left: str | None
) -> None:
    """Its part is from before the activation: the disk was full when that was to be written."""
    journal, copy, said = PartJournal(tmp_path), Copy(state), list[m.AnyReport]()
    part = Part(move="m1", nve=NEW, role="new", vm=VM, ports=(PORT,), stage="awaiting")
    journal.keep(Kept(part=msgspec.structs.replace(part, uri="tcp:x:1"), base_version=1))
    nve = handovers(journal, copy, said)
    await nve.resume()
    nve.order(m.Close(move="m1"))
    async with asyncio.timeout(10):
        while not any(isinstance(each, m.Closed) for each in said):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert copy.is_now == left


@pytest.mark.root
def test_a_part_that_was_not_written_leaves_nothing_and_keeps_what_was(tmp_path: Path) -> None:
    """Seen in the chaos runs: an empty file for each move that a full disk had met."""
    disk = SmallDisk(tmp_path / "small")
    disk.mount()
    try:
        journal = PartJournal(tmp_path / "small" / "moves")
        part = Part(move="m1", nve=NEW, role="new", vm=VM, ports=(PORT,), stage="arming")
        journal.keep(Kept(part=part, base_version=1))
        disk.fill()
        with pytest.raises(OSError, match="No space left"):
            journal.keep(Kept(part=msgspec.structs.replace(part, stage="whole"), base_version=1))
        assert [each.part.stage for each in journal.load()] == ["arming"]
        journal.forget("m1")
        assert list((tmp_path / "small" / "moves").iterdir()) == []
    finally:
        unmount_below(tmp_path)
