"""Drives every open move: load, step, journal, perform.

One task owns all of a move's events, in order. A record is journalled before its effects are
performed; the commit is one transaction that raises the VM's version and journals the move as
committed together, so that no crash can separate the two.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from overland.mobility import alone, cold, coordinator, saga
from overland.mobility import messages as m
from overland.model.cluster import Vm, VmState
from overland.model.handover import ENDED, Handover, Marking, committed, marking
from overland.nva.mapping import VnView
from overland.ports import Conflict, StoreFailure

log = logging.getLogger(__name__)

RETRY_S = 1.0
TICK_S = 0.25
"""Longest time between two looks at a deadline; a nearer deadline is met when it comes."""


Effects = tuple[m.CoordinatorEffect | m.ColdEffect | m.DiskEffect, ...]
Told = m.AnyOrder | m.ColdOrder
Step = tuple[Handover, Effects]


class Records(Protocol):
    """Where moves are kept."""

    async def journal(self, record: Handover) -> None:
        """Durable on return. With an ended move the VM is free again."""
        ...

    async def commit(self, record: Handover) -> None:
        """Journal `record`, give its VM `record.version` on the new NVE: all or nothing.

        Raises Conflict when the VM is not at `record.version - 1` any more.
        """
        ...

    def publish(self, record: Handover) -> None:
        """Tell the subscribers where the VM of a committed move is."""
        ...

    async def open_moves(self) -> list[Handover]: ...


class Handovers:
    """All open moves of the domain. `serve` has these hosts offer their images as records say."""

    def __init__(
        self,
        records: Records,
        tell: Callable[[str, Told | m.DiskOrder], None],
        changed: Callable[[Handover], None],
        serve: Callable[[frozenset[str]], None],
    ) -> None:
        self._records = records
        self._tell = tell
        self._changed = changed
        self._serve = serve
        self._open: dict[str, _Move] = {}

    async def recover(self) -> None:
        """Go on with every move that was open when the NVA stopped."""
        for record in await self._records.open_moves():
            if record.phase not in ENDED:
                self.begin(record)

    def begin(self, record: Handover) -> None:
        """Start or continue a journalled move."""
        move = _Move(record, self._records, self._tell, self._changed, self._serve)
        self._open[record.id] = move
        move.post(m.Start())
        task = asyncio.create_task(move.run())
        task.add_done_callback(lambda _: self._open.pop(record.id, None))

    def report(self, report: m.AnyReport) -> bool:
        """Take a report; False when its move is not open."""
        return self._post(report.move, report)

    def acknowledged(self, nve: str, vm: str, version: int) -> None:
        """NVE `nve` has `vm`'s mappings of at least `version` in its kernel."""
        for move in self._open.values():
            record = move.record
            hot = record.mode in ("hot", "warm")  # of a cold one the marking counts as well
            if hot and record.vm.name == vm and record.commit_ns and version >= record.version:
                move.post(m.Acknowledged(nve=nve, at_ns=time.time_ns()))

    def in_kernel(
        self, nve: str, view: Callable[[str], VnView | None], has_part: Callable[[str], bool]
    ) -> None:
        """NVE `nve` has acknowledged: what of the VMs in cold moves is in its kernel?

        `view` is a VN as it is known to be there; `has_part` tells whether it is to be there at
        all. An interface in another VN may be behind, or not be there yet.
        """
        for move in self._open.values():
            found = marked_at(move.record, view, has_part)
            if found is not None:
                move.post(m.Acknowledged(nve=nve, at_ns=time.time_ns(), marking=found))

    def served(self, nve: str) -> None:
        """NVE `nve` offers its images as the records say now: in a committed move, as that says."""
        for move in self._open.values():
            if move.record.commit_ns and nve in saga.serving(move.record):
                move.post(m.Served(nve=nve))

    def lost(self, nve: str, *, dead: bool) -> None:
        """The lease of NVE `nve` has ended; `dead`: nobody hears its host either."""
        for move in self._open.values():
            move.post(m.Lost(nve=nve, dead=dead))

    def back(self, nve: str) -> None:
        """NVE `nve` is connected (again)."""
        for move in self._open.values():
            move.post(m.Back(nve=nve))

    def abort(self, move: str, why: str) -> bool:
        """Ask for an abort; False when there is no such open move."""
        return self._post(move, m.Abort(why=why))

    def record(self, move: str) -> Handover | None:
        found = self._open.get(move)
        return found.record if found else None

    def _post(self, move: str, event: m.CoordinatorEvent) -> bool:
        found = self._open.get(move)
        if found is None:
            return False
        found.post(event)
        return True


class _Move:
    """One open move and its queue of events."""

    def __init__(
        self,
        record: Handover,
        records: Records,
        tell: Callable[[str, Told | m.DiskOrder], None],
        changed: Callable[[Handover], None],
        serve: Callable[[frozenset[str]], None],
    ) -> None:
        self.record = record
        self._records = records
        self._tell = tell
        self._changed = changed
        self._serve = serve
        self._events: asyncio.Queue[m.CoordinatorEvent] = asyncio.Queue()
        self._published = False
        self._ticked_s = time.monotonic()

    def post(self, event: m.CoordinatorEvent) -> None:
        self._events.put_nowait(event)

    async def run(self) -> None:
        while self.record.phase not in ENDED:
            await self._handle(await self._next())

    async def _next(self) -> m.CoordinatorEvent:
        now_s = time.monotonic()
        left_s = self.record.deadline_s - now_s
        if left_s <= 0 and now_s - self._ticked_s >= TICK_S:
            # However much is reported meanwhile: a deadline that has passed is looked at.
            self._ticked_s = now_s
            return m.Tick()
        wait_s = left_s if 0 < left_s < TICK_S else TICK_S
        try:
            async with asyncio.timeout(wait_s):
                return await self._events.get()
        except TimeoutError:
            self._ticked_s = time.monotonic()
            return m.Tick()

    async def _handle(self, event: m.CoordinatorEvent) -> None:
        before = self.record
        after, effects = _step(before, event)
        commits = any(isinstance(effect, m.Commit) for effect in effects)
        news = after.phase != before.phase or after.checkpoints != before.checkpoints
        if not commits and (effects or news):
            # The commit journals by itself; what only informs is not worth a disk write.
            after, effects = await self._journalled(before, after, effects)
        self.record = after
        self._perform(effects)
        if commits:
            await self._commit()
        else:
            self._publish()
        if self.record is not before:
            self._changed(self.record)

    async def _journalled(self, before: Handover, after: Handover, effects: Effects) -> Step:
        """Write `after`; when that is not possible a move that may still turn back does so.

        On the way back, and after the commit, it goes on without: there the next write tells all.
        Three records are written however long it takes: the last one, which sets the VM free; that
        of a committed move with which everybody is told to close (HO-48); and one that changes the
        marking of a cold move: subscribers hear what is written, and perhaps nothing more comes.
        """
        while True:
            try:
                await self._records.journal(after)
                return after, effects
            except StoreFailure as failure:
                log.error("move %s: %s", after.id, failure)
                decided = committed(after.phase) or after.phase == "aborting"
                marked = decided and marking(after) != marking(before)
                if after.phase in ENDED or marked or begins_to_close(before, after):
                    await asyncio.sleep(RETRY_S)
                elif decided:
                    return after, effects
                else:
                    abort = m.Abort(why=str(failure))
                    return _step(before, abort)

    def _publish(self) -> None:
        """Subscribers hear of the commit right after the new NVE has had time for its part.

        They have been steered already; their work must not stand in the way of the VM's first
        step. So: with the first event after the commit, at the latest the next tick.
        """
        hot = self.record.mode in ("hot", "warm")  # the others say themselves when they are told
        if hot and committed(self.record.phase) and not self._published:
            self._published = True
            self._records.publish(self.record)

    def _perform(self, effects: Effects) -> None:
        """In this order; the commit is made by the caller."""
        for effect in effects:
            match effect:
                case (
                    m.Tell(nve=nve, order=order)
                    | m.Ask(nve=nve, order=order)
                    | m.Task(nve=nve, order=order)
                ):
                    self._tell(nve, order)
                case m.Publish():
                    self._records.publish(self.record)
                case m.Serve():
                    self._serve(saga.serving(self.record))
                case m.Commit():
                    pass

    async def _commit(self) -> None:
        """One compare-and-set: the point of no return."""
        won = m.Committed(version=self.record.version + 1, at_ns=time.time_ns())
        after, effects = _step(self.record, won)
        try:
            await self._records.commit(after)
        except (Conflict, StoreFailure) as failure:
            await self._handle(m.CommitRefused(why=str(failure)))
            return
        self.record = after
        self._perform(effects)


def _step(record: Handover, event: m.CoordinatorEvent) -> Step:
    """The machine of the move's mode; all else is the same for all."""
    machine = {"cold": cold.step, "storage": alone.step}.get(record.mode, coordinator.step)
    after, effects = machine(record, event, time.monotonic(), time.time_ns())
    return after, effects


def marked_at(
    record: Handover, view: Callable[[str], VnView | None], has_part: Callable[[str], bool]
) -> Marking | None:
    """How a cold move's VM is marked in the kernel of an NVE, in all its VNs alike; else None.

    `view` is a VN as it is known to be in that kernel; `has_part`: whether it is to be there.
    """
    networks = [port.network for port in record.ports]
    views = [found for network in networks if (found := view(network)) is not None]
    name = record.vm.name
    current = all(each.versions.get(name, 0) >= record.version for each in views)
    current = current and not any(view(each) is None and has_part(each) for each in networks)
    markings = {each.markings.get(name, "none") for each in views}
    return markings.pop() if record.mode == "cold" and current and len(markings) == 1 else None


def turn_back(record: Handover) -> m.Return:
    """What the old NVE of a cold move is told that was given up for dead, and is back (HO-56)."""
    return m.Return(move=record.id, vm=record.vm, ports=record.ports)


def drop_kept(record: Handover) -> m.DropState:
    """What the old NVE of a cold move is told once its VM, which had not woken, is up (HO-43)."""
    version = record.version
    return m.DropState(move=record.id, vm=record.vm, ports=record.ports, version=version)


def farewells(record: Handover, vm: Vm | None) -> tuple[tuple[str, Told], ...]:
    """What is said once a move has ended, to NVEs that may have missed the end (HO-57, HO-59).

    Of a hot move to those who were given up, or have not said that they closed. Of a cold one to
    the new NVE, unless it has said that the VM is as it must be, and to an old one that was given
    up. Those who are away are told when they come back.
    """
    if record.phase not in ENDED or record.mode == "storage":
        return ()
    if record.mode != "cold":
        silent = sorted(record.unclosed.union(record.fenced))
        return tuple((nve, each) for nve in silent for each in last_orders(record, nve, vm))
    old = ((record.old_nve, turn_back(record)),) if record.lost else ()
    if record.resume_ns:
        return old
    return (*old, (record.new_nve, _last_order_cold(record, record.new_nve, vm)))


def _last_order_cold(record: Handover, nve: str, vm: Vm | None) -> m.ColdOrder:
    """What an NVE is told that may have still what it took for a cold move.

    That is the VM, if the new NVE did not hear of the commit before it was given up: the VM does
    there at last what it was moved to do (HO-52). Else it is of no use.
    """
    move, ports = record.id, record.ports
    now = vm and (vm.host, vm.version, vm.state, vm.move)
    waits = now == (nve, record.version, record.ends_as, None) and not record.resume_ns
    if waits and record.outcome == "moved" and nve == record.new_nve:
        return m.WakeUp(move=move, vm=record.vm, ports=ports, version=record.version)
    return m.DropCopy(move=move, vm=record.vm, ports=ports)


def last_disk_orders(record: Handover, nve: str) -> tuple[m.DiskOrder, ...]:
    """What NVE `nve` is told that may have an image of a disk's move still which is nobody's."""
    if nve != record.new_nve:
        return ()
    order = m.KeepDisk if record.outcome == "moved" else m.LeaveDisk
    return (order(move=record.id, vm=record.vm),)


def state_since(record: Handover, vm: Vm | None, nve: str, report: m.AnyReport) -> VmState | None:
    """The VM's state by what NVE `nve` says after the end of a cold move; None: it says nothing."""
    if vm is None or vm.move is not None or (vm.host, vm.version) != (nve, record.version):
        return None
    match report:
        case m.Restored() if nve == record.old_nve and record.lost and vm.state != "crashed":
            return record.vm.state
        case m.Running() if nve == record.new_nve:
            return record.vm.state
        case m.Crashed(gone=True) if nve == record.new_nve:
            return "crashed"
        case _:
            return None


def begins_to_close(before: Handover, after: Handover) -> bool:
    """Tell whether the NVEs of a committed move are about to forget their parts (HO-48).

    A restarted NVA that went on from an earlier record would wait for answers that nobody can give.
    """
    return committed(after.phase) and after.closing and not before.closing


def last_orders(record: Handover, nve: str, vm: Vm | None) -> tuple[Told, ...]:
    """What NVE `nve` is told that still has a part in a move which has ended as `record` says.

    What takes time there is answered by a report, and that by Close. `vm` is the VM as it is now.
    """
    if record.mode == "cold":
        return (_last_order_cold(record, nve, vm),)
    move, version, close = record.id, record.version, coordinator.close_order(record, nve)
    moved = record.outcome == "moved"
    if nve == record.old_nve:
        return (m.Retire(move=move, version=version), close) if moved else (m.Restore(move=move),)
    if nve == record.new_nve:
        return (m.Activate(move=move, version=version) if moved else m.GiveBack(move=move), close)
    return (close,)
