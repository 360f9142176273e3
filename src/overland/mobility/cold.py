"""The NVA's machine of one cold move: `step(record, event, now) -> (record, effects)`. Pure.

Record, phases, acknowledgements and shell are those of a hot move (`coordinator`); what they have
in common is in `saga`. No frame waits anywhere and nothing is tunnelled: the address is in transit.

    planned --the new NVE awaits it--> staged --all others drop and count--> paused
      --the old NVE does too; VM stopped, saved, carried--> equal --compare-and-set--> committed
      --woken--> running -> converging --active again at all subscribers--> drained --> closed

A VM at rest takes the same way: there is nothing to mark, to stop or to wake. An NVE keeps no part
of a cold move (ADR 0015): every order says all, and `_outstanding` is a function of the record.
"""

from __future__ import annotations

from typing import assert_never

import msgspec

from overland.mobility.messages import (
    Abort,
    Acknowledged,
    Ask,
    Associate,
    Back,
    Checkpointed,
    Closed,
    ColdEffect,
    ColdOrder,
    Commit,
    CommitRefused,
    Committed,
    CoordinatorEvent,
    Count,
    Crashed,
    Digested,
    DropCopy,
    DropState,
    Failed,
    Flowing,
    GivenBack,
    GiveState,
    Lost,
    Prepared,
    Progress,
    Publish,
    Received,
    Restored,
    Return,
    Running,
    Serve,
    Served,
    Start,
    Steered,
    Stopped,
    Suspend,
    Tick,
    WakeUp,
)
from overland.mobility.saga import (
    CLOSE_LIMIT_S,
    PREPARE_LIMIT_S,
    close_reason,
    end,
    enter,
    involved,
    merge,
    names,
    unserved,
)
from overland.model.cluster import VmState, left_at, moved_disks
from overland.model.handover import (
    ENDED,
    Acknowledgement,
    Handover,
    Memory,
    committed,
    has_state,
    is_up,
)

WAKE_LIMIT_S = 30.0
"""After so long without a word from the new NVE the outcome is unknown, and it is asked again."""


Step = tuple[Handover, tuple[ColdEffect, ...]]


def step(  # noqa: C901 - one row of the state table per event, nothing else
    record: Handover, event: CoordinatorEvent, now_s: float, now_ns: int
) -> Step:
    """Return the next record and what to do, given `event` (clocks as in `coordinator.step`)."""
    if record.phase in ENDED:
        return record, ()
    match event:
        # First those that come most often; else in the order of a move.
        case Tick():
            return _tick(record, now_s, now_ns)
        case Acknowledged():
            return _acknowledged(record, event, now_s, now_ns)
        case Closed():
            return _closed(record, event, now_ns)
        case Start():
            return _start(record, now_s, now_ns)
        case Back(nve=nve):
            return _back(record, nve)
        case Prepared():
            return _prepared(record, event, now_s, now_ns)
        case Stopped():
            return _stopped(record, event)
        case Received():
            return _received(record, event, now_ns)
        case Committed():
            return _committed(record, event, now_s, now_ns)
        case Served(nve=nve):
            return _served(record, nve, now_s, now_ns)
        case Running(at_ns=at_ns):
            return _woken(msgspec.structs.replace(record, resume_ns=at_ns), now_s, now_ns)
        case Crashed(nve=nve, why=why, gone=gone):
            why = f"the VM does not run on at {nve}: {why}"
            return _asleep(record, why, now_s, now_ns, "crashed" if gone else "suspended")
        case Failed(nve=nve, step=what, why=why):
            return _failed(record, f"{nve}: {what}: {why}", now_s, now_ns)
        case CommitRefused(why=why):
            return _abort(record, why, now_s, now_ns) if record.phase == "equal" else (record, ())
        case Abort(why=why):
            return _abort(record, why, now_s, now_ns)
        case Lost(nve=nve, dead=dead):
            return _lost(record, nve, now_s, now_ns, dead=dead)
        case Restored(nve=nve) | GivenBack(nve=nve):
            return _turned_back(record, nve, now_s, now_ns)
        case Progress() | Flowing() | Steered() | Digested() | Checkpointed():
            return record, ()
        case _:
            assert_never(event)


def carries(record: Handover) -> bool:
    """Tell whether there is anything to carry: a state, or disks that go along."""
    return has_state(record.vm) or bool(moved_disks(record.vm))


def _start(record: Handover, now_s: float, now_ns: int) -> Step:
    """Begin; or, after a restart of the NVA, turn back before the commit and go on after it."""
    if record.phase == "planned" and not record.waiting:
        waiting = frozenset({record.new_nve})
        record = msgspec.structs.replace(
            record, waiting=waiting, deadline_s=now_s + PREPARE_LIMIT_S
        )
        return record, _outstanding(record)
    if not committed(record.phase) and record.phase != "aborting":
        return _abort(record, "the NVA was restarted", now_s, now_ns)
    record = msgspec.structs.replace(record, deadline_s=now_s + _limit_s(record))
    return record, (Publish(), *_serve(record), *_outstanding(record))


def _limit_s(record: Handover) -> float:
    return WAKE_LIMIT_S if record.phase == "committed" else CLOSE_LIMIT_S


def _outstanding(record: Handover, nve: str | None = None) -> tuple[Ask, ...]:
    """What has still to be done in the present phase, by `nve` or by anybody.

    Every order may be repeated: the NVE looks whether it is done (HO-20, HO-40).
    """
    wanted = _wanted(record)
    return tuple(Ask(nve=each, order=order) for each, order in wanted if nve in (None, each))


def _wanted(record: Handover) -> tuple[tuple[str, ColdOrder], ...]:
    old, new = record.old_nve, record.new_nve
    move, vm, ports = record.id, record.vm, record.ports
    associate = (new, Associate(move=move, vm=vm, ports=ports))
    awaited = () if not carries(record) or _offered(record) else (associate,)
    match record.phase:
        case "planned":
            return (associate,)
        case "staged":
            return awaited
        case "paused" if not _saved(record):
            suspend = (old, Suspend(move=move, vm=vm, ports=ports))
            return (*awaited, suspend) if old in names(record.marked) else awaited
        case "paused" if awaited:
            return awaited
        case "paused":
            uris = {"uri": record.uri, "disks_uri": record.disks_uri}
            return ((old, GiveState(move=move, vm=vm, ports=ports, **uris)),)
        case "committed" if unserved(record):
            return ()
        case "committed":
            version = record.version
            return ((new, WakeUp(move=move, vm=vm, ports=ports, version=version)),)
        case "aborting" if not record.closing:
            back = Return(move=move, vm=vm, ports=ports)
            drop = DropCopy(move=move, vm=vm, ports=ports)
            both: tuple[tuple[str, ColdOrder], ...] = ((old, back), (new, drop))
            return tuple(each for each in both if each[0] in record.waiting)
        case "aborting" | "drained":
            return tuple((nve, _last(record, nve)) for nve in sorted(record.waiting))
        case _:
            return ()


def _last(record: Handover, nve: str) -> ColdOrder:
    """What closes the move at `nve`."""
    move, vm, ports = record.id, record.vm, record.ports
    if record.phase == "drained" and nve == record.old_nve and record.resume_ns:
        # Only of a state that has come to its end is the old one of no use (HO-43).
        return DropState(move=move, vm=vm, ports=ports, version=record.version)
    return Count(move=move, vm=vm, ports=ports)


def _back(record: Handover, nve: str) -> Step:
    """An NVE is there (again), and takes its part in what is left."""
    if nve in record.fenced:
        fenced = tuple(each for each in record.fenced if each != nve)
        waits = record.closing
        if record.lost and nve == record.old_nve and not record.closing:
            # It is back before the end, and so may the VM be.
            record = msgspec.structs.replace(record, lost=False, restored=False)
            waits = True
        waiting = record.waiting | {nve} if waits else record.waiting
        record = msgspec.structs.replace(record, fenced=fenced, waiting=waiting)
    if record.phase in ("staged", "paused") and nve == record.new_nve:
        # Nobody listens at the old URIs any more, if its daemon was restarted.
        record = msgspec.structs.replace(record, uri="", disks_uri="")
    return record, _outstanding(record, nve)


def _offered(record: Handover) -> bool:
    """The new NVE has said where to give what is carried."""
    return bool(record.uri or record.disks_uri)


def _saved(record: Handover) -> bool:
    """Nothing of the VM has to be saved any more: what is to be carried lies on the old disk."""
    return not is_up(record.vm) or bool(record.memory.total_bytes)


def _prepared(record: Handover, event: Prepared, now_s: float, now_ns: int) -> Step:
    if event.nve != record.new_nve or record.phase not in ("planned", "staged", "paused"):
        return record, ()
    begins = record.phase == "planned"
    record = msgspec.structs.replace(record, uri=event.uri, disks_uri=event.disks_uri)
    return _staged(record, now_s, now_ns) if begins else (record, _outstanding(record))


def _staged(record: Handover, now_s: float, now_ns: int) -> Step:
    record = msgspec.structs.replace(
        enter(record, "staged", now_ns), waiting=_others(record), deadline_s=now_s + PREPARE_LIMIT_S
    )
    if is_up(record.vm):
        return record, (Publish(),)
    record = _pausing(record, now_s, now_ns)
    if carries(record):
        return record, _outstanding(record)
    return _equal(record, now_ns)


def _others(record: Handover) -> frozenset[str]:
    """All that drop before the old NVE does."""
    return frozenset(involved(record)) - {record.old_nve}


def _pausing(record: Handover, now_s: float, now_ns: int) -> Handover:
    return msgspec.structs.replace(
        enter(record, "paused", now_ns),
        waiting=frozenset({record.old_nve}),
        deadline_s=now_s + record.options.timeout_s,
    )


def _acknowledged(record: Handover, event: Acknowledged, now_s: float, now_ns: int) -> Step:
    nve = event.nve
    seen = Acknowledgement(nve=nve, at_ns=event.at_ns)
    if committed(record.phase) and event.marking == "none":
        if nve not in names(record.acknowledged) and record.phase == "converging":
            record = msgspec.structs.replace(record, acknowledged=(*record.acknowledged, seen))
        return _converge(record, now_s, now_ns)
    first = nve not in names(record.marked) and nve in involved(record)
    if not first or event.marking == "none" or record.phase not in ("staged", "paused"):
        return record, ()
    if nve == record.old_nve and event.marking != "all":
        return record, ()  # it delivers until all others drop
    record = msgspec.structs.replace(record, marked=(*record.marked, seen))
    if record.phase == "staged" and _others(record) <= names(record.marked):
        return _pausing(record, now_s, now_ns), (Publish(),)
    return record, _outstanding(record) if nve == record.old_nve else ()


def _stopped(record: Handover, event: Stopped) -> Step:
    if record.phase != "paused" or record.old_nve not in names(record.marked):
        return record, ()
    if record.memory.total_bytes:
        # It was asked twice, and the second time in place of what it has to do now (HO-53).
        return record, _outstanding(record, event.nve)
    record = msgspec.structs.replace(record, stop_ns=event.stop_ns, memory=event.memory)
    return record, _outstanding(record)


def _received(record: Handover, event: Received, now_ns: int) -> Step:
    if record.phase != "paused" or not (_offered(record) and _saved(record)):
        return record, ()
    size = event.state_bytes
    memory = Memory(total_bytes=size, sent_bytes=size)
    record = msgspec.structs.replace(
        record, equal_ns=event.at_ns, memory=memory, storage=event.storage
    )
    return _equal(record, now_ns)


def _equal(record: Handover, now_ns: int) -> Step:
    record = enter(record, "equal", now_ns)
    commit = Commit(vm=record.vm.name, expected_version=record.version, new_nve=record.new_nve)
    return record, (commit,)


def _committed(record: Handover, event: Committed, now_s: float, now_ns: int) -> Step:
    """The new NVE hears of the commit before it wakes the VM: its interfaces are in use then."""
    if record.phase != "equal":
        return record, ()
    record = msgspec.structs.replace(
        enter(record, "committed", now_ns),
        version=event.version,
        commit_ns=event.at_ns,
        waiting=frozenset({record.new_nve}),
        deadline_s=now_s + WAKE_LIMIT_S,
    )
    if carries(record) or unserved(record):
        return record, (Publish(), *_serve(record), *_outstanding(record))
    return _woken(record, now_s, now_ns)


def _serve(record: Handover) -> tuple[Serve, ...]:
    """Images that stay are the new host's before the VM wakes there (HO-70)."""
    return (Serve(),) if record.phase == "committed" and unserved(record) else ()


def _served(record: Handover, nve: str, now_s: float, now_ns: int) -> Step:
    if record.phase != "committed" or nve not in unserved(record):
        return record, ()
    record = msgspec.structs.replace(record, served=record.served | {nve})
    if unserved(record) or carries(record):
        return record, _outstanding(record)
    return _woken(record, now_s, now_ns)


def _asleep(
    record: Handover, why: str, now_s: float, now_ns: int, ends_as: VmState = "suspended"
) -> Step:
    """The move ends with the VM suspended: its state at the new host, and the old one, stay.

    Without a state there it has crashed: perhaps it ran, so the old state is nobody's to wake.
    """
    if record.phase != "committed":
        return record, ()
    why = f"{why}; {record.old_nve} keeps the state and the disks that it had"
    ends_as = ends_as if has_state(record.vm) else record.vm.state
    return _woken(msgspec.structs.replace(record, reason=why, ends_as=ends_as), now_s, now_ns)


def _woken(record: Handover, now_s: float, now_ns: int) -> Step:
    if record.phase != "committed":
        return record, ()
    record = enter(enter(record, "running", now_ns), "converging", now_ns)
    record = msgspec.structs.replace(record, outcome="open", waiting=frozenset())
    record, effects = _converge(record, now_s, now_ns)
    return record, (Publish(), *effects)


def _converge(record: Handover, now_s: float, now_ns: int) -> Step:
    """The marking ends by this criterion and no other: never by silence, never by a timer."""
    if record.phase != "converging":
        return record, ()
    holders = set(involved(record)) if is_up(record.vm) else set()
    if holders - names(record.acknowledged) - set(record.fenced):
        return record, ()
    reason = close_reason(record) if holders else "nothing was in flight"
    record = msgspec.structs.replace(enter(record, "drained", now_ns), close_reason=reason)
    return _close(record, now_s, now_ns)


def _close(record: Handover, now_s: float, now_ns: int) -> Step:
    """Everybody counts and forgets; of a VM at rest only what was carried has to go."""
    all_of_them = frozenset(involved(record)) if is_up(record.vm) else frozenset[str]()
    if record.phase == "drained" and carries(record):
        all_of_them |= {record.old_nve}
    record = msgspec.structs.replace(
        record,
        closing=True,
        waiting=all_of_them - set(record.fenced),
        deadline_s=now_s + CLOSE_LIMIT_S,
    )
    return (record, _outstanding(record)) if record.waiting else (end(record, now_ns), ())


def _closed(record: Handover, event: Closed, now_ns: int) -> Step:
    if not record.closing or event.nve not in record.waiting:
        return record, ()
    packets = merge(record.packets, event.packets)
    waiting = record.waiting - {event.nve}
    record = msgspec.structs.replace(record, waiting=waiting, packets=packets)
    return (record, ()) if waiting else (end(record, now_ns), ())


def _failed(record: Handover, why: str, now_s: float, now_ns: int) -> Step:
    if committed(record.phase) or record.phase == "aborting":
        # The order is repeated with the next tick, and the receipt says why.
        return msgspec.structs.replace(record, reason=why), ()
    return _abort(record, why, now_s, now_ns)


def _abort(record: Handover, why: str, now_s: float, now_ns: int) -> Step:
    """Go back. Refused after the commit: then the move only goes forward."""
    if committed(record.phase) or record.phase == "aborting":
        return record, ()
    up = is_up(record.vm)
    waiting = frozenset({record.new_nve}) - set(record.fenced)
    record = msgspec.structs.replace(
        enter(record, "aborting", now_ns),
        reason=why,
        restored=not up,
        waiting=waiting | ({record.old_nve} if up else frozenset()),
        deadline_s=now_s + CLOSE_LIMIT_S,
    )
    if not record.waiting:
        return _close(record, now_s, now_ns)
    return record, _outstanding(record)


def _turned_back(record: Handover, nve: str, now_s: float, now_ns: int) -> Step:
    if record.phase != "aborting" or record.closing or nve not in record.waiting:
        return record, ()
    effects: tuple[Publish, ...] = ()
    record = msgspec.structs.replace(record, waiting=record.waiting - {nve})
    if nve == record.old_nve:
        record = msgspec.structs.replace(record, restored=True, outcome="open")
        effects = (Publish(),)  # what it says is in every kernel before the count is asked for
    if record.waiting:
        return record, effects
    record, more = _close(record, now_s, now_ns)
    return record, (*effects, *more)


def _lost(record: Handover, nve: str, now_s: float, now_ns: int, *, dead: bool) -> Step:
    """As in a hot move: before the commit the way back, after it only the dead are not waited for.

    An old NVE that is to have the VM back is waited for until it is dead: only it knows.
    """
    turns_back = is_up(record.vm) and not committed(record.phase) and not record.restored
    if dead and nve == record.old_nve and turns_back:
        return _old_host_dead(record, now_s, now_ns)
    if nve not in _needed(record) or nve in record.fenced:
        return record, ()
    if dead and nve == record.new_nve and record.phase == "committed":
        record = msgspec.structs.replace(record, fenced=(*record.fenced, nve))
        return _asleep(record, f"host {nve} is dead, and the VM with it", now_s, now_ns)
    if committed(record.phase) and not record.closing and not dead:
        away = f"{nve} is away: the address stays in transit there until its NVE is back"
        return msgspec.structs.replace(record, reason=away), ()
    if record.phase == "aborting" and nve == record.old_nve and not record.restored:
        return record, ()
    record = msgspec.structs.replace(record, fenced=(*record.fenced, nve))
    if record.phase == "converging":
        return _converge(record, now_s, now_ns)
    if record.phase in ("aborting", "drained"):
        return _give_up_waiting(record, frozenset({nve}), now_s, now_ns)
    if committed(record.phase):
        return record, ()
    return _abort(record, f"{nve} is unreachable", now_s, now_ns)


def _old_host_dead(record: Handover, now_s: float, now_ns: int) -> Step:
    """Nobody turns anything back: the move ends, and what is left of the VM that host will say."""
    nve, why = record.old_nve, f"host {record.old_nve} is dead, and the VM with it"
    effects: tuple[ColdEffect, ...] = ()
    if record.phase != "aborting":
        record, effects = _abort(record, why, now_s, now_ns)
    else:
        record = msgspec.structs.replace(record, reason=f"{record.reason}; {why}")
    fenced = tuple(dict.fromkeys((*record.fenced, nve)))
    record = msgspec.structs.replace(
        record, fenced=fenced, restored=True, lost=True, outcome="open"
    )
    effects = tuple(e for e in effects if not (isinstance(e, Ask) and e.nve == nve))
    record, more = _give_up_waiting(record, frozenset({nve}), now_s, now_ns)
    return record, (*effects, Publish(), *more)


def _needed(record: Handover) -> frozenset[str]:
    """A VM at rest of which nothing is carried needs nothing of its old host: it may be dead."""
    images = frozenset[str]() if committed(record.phase) else left_at(record.vm)
    if carries(record):
        return images.union(involved(record))
    return images | {record.new_nve}


def _give_up_waiting(record: Handover, nves: frozenset[str], now_s: float, now_ns: int) -> Step:
    record = msgspec.structs.replace(record, waiting=record.waiting - nves)
    if record.waiting:
        return record, ()
    return (end(record, now_ns), ()) if record.closing else _close(record, now_s, now_ns)


def _tick(record: Handover, now_s: float, now_ns: int) -> Step:
    """A deadline turns a move back, or asks again; it never ends the marking."""
    if now_s < record.deadline_s:
        return record, ()
    match record.phase:
        case "planned" | "staged":
            silent = ", ".join(sorted(record.waiting - names(record.marked)))
            return _abort(record, f"no answer from {silent} in time", now_s, now_ns)
        case "paused" | "equal":
            why = f"its state was not carried within {record.options.timeout_s:g} s"
            return _abort(record, why, now_s, now_ns)
        case "committed":
            return _start(msgspec.structs.replace(record, outcome="unknown"), now_s, now_ns)
        case "aborting" if not record.closing and record.old_nve in record.waiting:
            return _start(msgspec.structs.replace(record, outcome="unknown"), now_s, now_ns)
        case "drained" | "aborting":
            return _give_up_waiting(record, record.waiting, now_s, now_ns)
        case _:
            return record, ()
