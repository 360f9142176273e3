"""The NVA's machine of a disk that moves alone: `step(record, event, now) -> (record, effects)`.

Pure. Record, journal, shell and receipt are those of a move of a VM; what they have in common is in
`saga`. Here the VM stays: its version is not raised, nobody's mapping changes, and there is no
tunnel (R-54). The old NVE is that of the host with the image, the new one the VM's own.

    planned -> precopy --copied, each write goes to both--> paused --VM stands, both are equal-->
      equal --compare-and-set: the record names the new image--> committed --the VM runs on with
      it--> running -> drained --nobody is offered the old image any more, which goes--> closed

Before `committed` every failure leads to `aborting`: the VM runs on with the old image, the new one
goes. An NVE keeps no part of it: an order says all, and is content with finding it done.
"""

from __future__ import annotations

import msgspec

from overland.mobility.messages import (
    Abort,
    Back,
    Closed,
    Commit,
    CommitRefused,
    Committed,
    CoordinatorEvent,
    CopyDisk,
    Crashed,
    DiskEffect,
    DropImage,
    Failed,
    KeepDisk,
    LeaveDisk,
    Lost,
    Progress,
    Received,
    Restored,
    Running,
    Serve,
    Served,
    SettleDisk,
    Start,
    Stopped,
    Task,
    Tick,
)
from overland.mobility.saga import CLOSE_LIMIT_S, end, enter
from overland.model.handover import ENDED, Handover, Phase, committed

SETTLE_LIMIT_S = 10.0
"""How long the VM may stand until its new image is its own."""

Step = tuple[Handover, tuple[DiskEffect, ...]]


def step(  # noqa: C901 - one row of the state table per event, nothing else
    record: Handover, event: CoordinatorEvent, now_s: float, now_ns: int
) -> Step:
    """Return the next record and what to do, given `event` (clocks as in `coordinator.step`)."""
    if record.phase in ENDED:
        return record, ()
    match event:
        case Start():
            return _start(record, now_s, now_ns)
        case Back(nve=nve):
            return record, _outstanding(record, nve)
        case Progress(storage=storage) if record.phase == "precopy":
            return msgspec.structs.replace(record, storage=storage), ()
        case Received(storage=storage) if record.phase == "precopy":
            record = msgspec.structs.replace(record, storage=storage)
            return _enter(record, "paused", now_s, now_ns)
        case Stopped(stop_ns=stop_ns) if record.phase == "paused":
            record = msgspec.structs.replace(record, stop_ns=stop_ns, equal_ns=now_ns)
            record = enter(record, "equal", now_ns)
            vm, to = record.vm, record.new_nve
            return record, (Commit(vm=vm.name, expected_version=vm.version, new_nve=to),)
        case Committed(at_ns=at_ns) if record.phase == "equal":
            record = msgspec.structs.replace(record, commit_ns=at_ns)
            return _enter(record, "committed", now_s, now_ns)
        case Running(at_ns=at_ns) if record.phase == "committed":
            record = msgspec.structs.replace(record, resume_ns=at_ns, outcome="open")
            return _drained(record, now_s, now_ns)
        case Crashed(why=why) if record.phase == "committed":
            return _gone(record, why, now_s, now_ns)
        case Served(nve=nve) if record.phase == "drained" and nve == record.old_nve:
            record = msgspec.structs.replace(record, served=frozenset({nve}))
            return record, _outstanding(record)
        case Closed(nve=nve) if record.phase == "drained" and nve == record.old_nve:
            return end(record, now_ns), ()
        case Restored() if record.phase == "aborting":
            return end(record, now_ns), ()
        case Failed(nve=nve, step=what, why=why):
            return _failing(record, f"{nve}: {what}: {why}", now_s, now_ns)
        case CommitRefused(why=why) if record.phase == "equal":
            return _abort(record, why, now_s, now_ns)
        case Abort(why=why):
            return _abort(record, why, now_s, now_ns)
        case Lost(nve=nve, dead=dead):
            return _lost(record, nve, now_s, now_ns, dead=dead)
        case Tick() if now_s >= record.deadline_s:
            return _late(record, now_s, now_ns)
        case _:
            return record, ()


def _start(record: Handover, now_s: float, now_ns: int) -> Step:
    """Begin; after a restart of the NVA copying goes on, and a VM that stands runs on."""
    if record.phase == "planned":
        return _enter(record, "precopy", now_s, now_ns)
    if record.phase in ("paused", "equal"):
        return _abort(record, "the NVA was restarted while the VM was stopped", now_s, now_ns)
    record = msgspec.structs.replace(record, deadline_s=now_s + _limit_s(record))
    return record, _outstanding(record)


def _enter(record: Handover, phase: Phase, now_s: float, now_ns: int) -> Step:
    record = enter(record, phase, now_ns)
    record = msgspec.structs.replace(record, deadline_s=now_s + _limit_s(record))
    return record, _outstanding(record)


def _limit_s(record: Handover) -> float:
    match record.phase:
        case "precopy":
            return record.options.timeout_s
        case "paused" | "equal" | "committed":
            return SETTLE_LIMIT_S
        case _:
            return CLOSE_LIMIT_S


def _outstanding(record: Handover, nve: str | None = None) -> tuple[DiskEffect, ...]:
    """What has still to be done in the present phase, by `nve` or by anybody; may be repeated."""
    old, new, move, vm = record.old_nve, record.new_nve, record.id, record.vm
    limit = record.options.bandwidth_bytes_per_s or 0
    wanted: dict[str, tuple[str, DiskEffect]] = {
        "precopy": (new, Task(nve=new, order=CopyDisk(move=move, vm=vm, bytes_per_s=limit))),
        "paused": (new, Task(nve=new, order=SettleDisk(move=move, vm=vm))),
        "committed": (new, Task(nve=new, order=KeepDisk(move=move, vm=vm))),
        "aborting": (new, Task(nve=new, order=LeaveDisk(move=move, vm=vm))),
    }
    drop = Task(nve=old, order=DropImage(move=move, vm=vm))
    wanted["drained"] = (old, drop if record.served else Serve())
    who, effect = wanted.get(record.phase, ("", Serve()))
    return (effect,) if who and nve in (None, who) else ()


def _failing(record: Handover, why: str, now_s: float, now_ns: int) -> Step:
    if committed(record.phase) or record.phase == "aborting":
        # The order is repeated with the next tick, and the receipt says why.
        return msgspec.structs.replace(record, reason=why), ()
    return _abort(record, why, now_s, now_ns)


def _abort(record: Handover, why: str, now_s: float, now_ns: int) -> Step:
    """Go back. Refused after the commit: then it only goes forward."""
    if committed(record.phase) or record.phase == "aborting":
        return record, ()
    return _enter(msgspec.structs.replace(record, reason=why), "aborting", now_s, now_ns)


def _lost(record: Handover, nve: str, now_s: float, now_ns: int, *, dead: bool) -> Step:
    """Both hosts are needed before the commit; afterwards nobody waits for the dead."""
    if nve not in (record.old_nve, record.new_nve):
        return record, ()
    if record.phase == "aborting" and dead and nve == record.new_nve:
        return end(record, now_ns), ()
    if record.phase == "committed" and dead and nve == record.new_nve:
        return _gone(record, f"host {nve} is dead", now_s, now_ns)
    if record.phase == "drained" and dead and nve == record.old_nve:
        why = f"host {nve} is dead, and keeps its image"
        return end(msgspec.structs.replace(record, reason=why), now_ns), ()
    return _abort(record, f"{nve} is unreachable", now_s, now_ns)


def _gone(record: Handover, why: str, now_s: float, now_ns: int) -> Step:
    """The VM does not run on; its new image is whole, and its own."""
    return _drained(msgspec.structs.replace(record, reason=why), now_s, now_ns)


def _drained(record: Handover, now_s: float, now_ns: int) -> Step:
    """That it closes is written before the former image goes: it is not offered by then."""
    record = msgspec.structs.replace(enter(record, "running", now_ns), closing=True)
    return _enter(record, "drained", now_s, now_ns)


def _late(record: Handover, now_s: float, now_ns: int) -> Step:
    """A deadline before the commit turns back; later, and on the way back, it is asked again."""
    match record.phase:
        case "precopy":
            why = f"the disk was not copied within {record.options.timeout_s:g} s"
            return _abort(record, why, now_s, now_ns)
        case "paused" | "equal":
            return _abort(record, "the disk was not settled in time", now_s, now_ns)
        case _:
            record = msgspec.structs.replace(record, served=frozenset())
            return _start(record, now_s, now_ns)
