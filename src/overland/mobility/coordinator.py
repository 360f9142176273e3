"""The NVA's machine of one hot move: `step(record, event, now) -> (record, effects)`.

Pure: no I/O, no clock. The shell journals the new record before it performs an effect, so after a
crash `Start` finds the record and repeats what the present phase waits for, as `Back` does for one
NVE whose connection is back; every order may be repeated. The state table is in spec/handover.md
and tests/core walk all of it.

    planned --prepared by new, old, peers--> staged -> precopy --old stopped--> paused
      --new copy whole--> equal --compare-and-set--> committed --resumed--> running
      -> converging --all subscribers acknowledged or fenced--> drained --guard--> closed

Before `committed` every failure leads to `aborting` and the VM runs on at the old host; from
`committed` on there is no way but forward.
"""

from __future__ import annotations

from typing import assert_never

import msgspec

from overland.mobility.messages import (
    Abort,
    Acknowledged,
    Activate,
    AnyOrder,
    Back,
    Checkpointed,
    Close,
    Closed,
    Commit,
    CommitRefused,
    Committed,
    CoordinatorEffect,
    CoordinatorEvent,
    Crashed,
    Digest,
    Digested,
    Failed,
    Flowing,
    Force,
    GiveBack,
    GivenBack,
    Lost,
    Prepared,
    PrepareNew,
    PrepareOld,
    PreparePeer,
    Progress,
    Received,
    Restore,
    Restored,
    Retire,
    Running,
    Send,
    Serve,
    Served,
    Start,
    Steer,
    Steered,
    Stopped,
    Tell,
    Tick,
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
    tell,
    unserved,
)
from overland.model.cluster import left_at
from overland.model.handover import ENDED, Acknowledgement, Handover, committed

STOPPED_LIMIT_S = 5.0
"""From STOP to the commit: the age bound of what is held at the new NVE (R-39)."""

GIVE_BACK_LIMIT_S = 1.0
"""How long an abort waits for the new NVE to send back what it holds."""


_COMES_TO_CLOSE = (Prepared, Received, Stopped, Steered, Running, GivenBack, Restored)
"""What an NVE says when it has come to where it may close."""

Step = tuple[Handover, tuple[CoordinatorEffect, ...]]


def step(  # noqa: C901 - one row of the state table per event, nothing else
    record: Handover, event: CoordinatorEvent, now_s: float, now_ns: int
) -> Step:
    """Return the next record and what to do, given `event`.

    `now_s` is a monotonic clock for deadlines, `now_ns` CLOCK_REALTIME for the receipt. An event
    that does not belong to the present phase changes nothing: late and repeated messages are
    normal.
    """
    if record.phase in ENDED:
        return record, ()
    if record.closing and isinstance(event, _COMES_TO_CLOSE):
        # It may not have been there when it was told.
        again = (tell(event.nve, close_order(record, event.nve)),)
        return record, _outstanding(record, event.nve) if event.nve in record.waiting else again
    match event:
        # First those that come most often; else in the order of a move.
        case Tick():
            return _tick(record, now_s, now_ns)
        case Closed():
            return _closed(record, event, now_ns)
        case Progress(memory=memory, storage=storage):
            return msgspec.structs.replace(record, memory=memory, storage=storage), ()
        case Steered(nve=nve, at_ns=at_ns):
            return _steered(record, nve, at_ns, now_s, now_ns)
        case Acknowledged(nve=nve, at_ns=at_ns):
            seen = Acknowledgement(nve=nve, at_ns=at_ns)
            if committed(record.phase) and nve not in names(record.acknowledged):
                record = msgspec.structs.replace(record, acknowledged=(*record.acknowledged, seen))
            return _converge(record, now_s, now_ns)
        case Start():
            return _start(record, now_s, now_ns)
        case Back(nve=nve):
            return _back(record, nve)
        case Prepared():
            return _prepared(record, event, now_s, now_ns)
        case Failed() | Abort() | CommitRefused() | Lost():
            return _failing(record, event, now_s, now_ns)
        case Checkpointed():
            return _checkpointed(record, event, now_s)
        case Flowing(held_ns=held_ns):
            return _flowing(record, held_ns)
        case Stopped():
            return _stopped(record, event, now_s, now_ns)
        case Received(at_ns=at_ns):
            return _received(record, at_ns, now_ns)
        case Digested():
            return _digested(record, event, now_ns, now_s)
        case Committed():
            return _committed(record, event, now_s, now_ns)
        case Served(nve=nve):
            return _served(record, nve)
        case Running():
            return _running(record, event, now_s, now_ns)
        case Crashed(nve=nve, why=why):
            return _crashed(record, f"the VM ended on {nve} after the commit: {why}", now_s, now_ns)
        case GivenBack(nve=nve) | Restored(nve=nve) if record.phase != "aborting":
            # A former NVA turned the move back and could not write that down (HO-49).
            return _abort(record, f"{nve} has turned back already", now_s, now_ns)
        case GivenBack(nve=nve):
            return _given_back(record, nve, now_s, now_ns)
        case Restored():
            return _restored(record, now_s, now_ns)
        case _:
            assert_never(event)


def _start(record: Handover, now_s: float, now_ns: int) -> Step:
    """Begin, or go on after a restart of the NVA: with fresh deadlines, as if all came back.

    But not from a stopped VM to the commit: the NVA that was killed may have turned the move back
    and could not write that down. Then the VM runs at the old host, and a commit made two (HO-68).
    """
    if record.phase in ("paused", "equal"):
        return _abort(record, "the NVA was restarted while the VM was stopped", now_s, now_ns)
    if record.phase == "planned" and not record.waiting:
        record = msgspec.structs.replace(record, waiting=frozenset(involved(record)))
    record = msgspec.structs.replace(record, deadline_s=now_s + _limit_s(record))
    effects: list[CoordinatorEffect] = []
    for nve in involved(record):
        effects.extend(_outstanding(record, nve))
    return record, tuple(effects)


def _limit_s(record: Handover) -> float:
    """How long the present phase may last, in seconds."""
    match record.phase:
        case "planned":
            return PREPARE_LIMIT_S
        case "precopy":
            return record.options.timeout_s
        case "aborting" if not record.closing:
            return GIVE_BACK_LIMIT_S
        case "drained" if not record.closing:
            return record.options.drain_guard_ms / 1000
        case "drained" | "aborting":
            return CLOSE_LIMIT_S
        case _:
            return STOPPED_LIMIT_S


def _back(record: Handover, nve: str) -> Step:
    """An NVE is there (again): it is no longer fenced, and takes its part in what is left."""
    if nve in record.fenced:
        fenced = tuple(each for each in record.fenced if each != nve)
        waiting = record.waiting | {nve} if record.closing else record.waiting
        lost = record.lost and (nve != record.old_nve or record.restored)
        record = msgspec.structs.replace(record, fenced=fenced, waiting=waiting, lost=lost)
    return record, _outstanding(record, nve)


def _outstanding(record: Handover, nve: str) -> tuple[CoordinatorEffect, ...]:
    """What `nve` has still to do in the present phase: said again when its connection is back.

    Every order may be repeated, so nobody has to know whether the first one arrived (HO-20).
    """
    move = record.id
    match record.phase:
        case "planned" if nve in record.waiting:
            prepared = record.new_nve not in record.waiting
            ready = prepared or nve == record.new_nve
            return (_prepare(record, nve),) if ready else ()
        case "precopy" if nve == record.old_nve:
            return (_send(record),)
        case "precopy" if record.held_ns:
            return _steer_again(record, nve)
        case "paused" | "equal":
            return _steer_again(record, nve) + _digest_again(record, nve)
        case "committed" if nve == record.new_nve:
            return (_activate(record),)
        case "committed" | "running" | "converging" if nve == record.old_nve:
            return (tell(nve, Retire(move=move, version=record.version)),)
        case "drained" | "aborting" if record.closing and nve in record.waiting:
            return tuple(each for each in _close_orders(record) if each.nve == nve)
        case "aborting" if nve in record.waiting:
            return (tell(nve, _way_back(record, nve)),)
        case _:
            return ()


def _prepare(record: Handover, nve: str) -> Tell:
    move, version, ports, options = record.id, record.version, record.ports, record.options
    if nve == record.new_nve:
        new = PrepareNew(move=move, vm=record.vm, version=version, ports=ports, options=options)
        return tell(nve, new)
    if nve == record.old_nve:
        old = PrepareOld(move=move, vm=record.vm, version=version, ports=ports, options=options)
        return tell(nve, old)
    return tell(nve, PreparePeer(move=move, version=version, ports=ports))


def _send(record: Handover) -> Tell:
    send = Send(
        move=record.id, uri=record.uri, keep_uri=record.keep_uri, disks_uri=record.disks_uri
    )
    return tell(record.old_nve, send)


def _checkpointed(record: Handover, event: Checkpointed, now_s: float) -> Step:
    """The newest point of recovery; the time limit counts from it, and their number is limited."""
    if record.phase != "precopy":
        return record, ()
    checkpoints = record.checkpoints.taken(event.checkpoint)
    deadline_s = now_s + record.options.interval_s + record.options.timeout_s
    return msgspec.structs.replace(record, checkpoints=checkpoints, deadline_s=deadline_s), ()


def recoverable(record: Handover) -> bool:
    """Tell whether the newest checkpoint on the new host is all that there is of the VM."""
    aborted = record.phase in ("aborting", "aborted")
    return aborted and record.lost and record.checkpoints.count > 0


def keeper(record: Handover) -> str | None:
    """The host that keeps a state from which the VM of an ended move can be recovered, if need be.

    After a warm move whose old host was lost: the new one, with the newest checkpoint. After a cold
    one whose VM did not wake, or perhaps woke and is gone: the old one, with what it saved.
    """
    if record.mode != "cold":
        return record.new_nve if recoverable(record) else None
    carried = record.memory.total_bytes or record.storage.total_bytes
    slept = record.outcome == "moved" and carried and not record.resume_ns
    return record.old_nve if slept else None


def _steer_again(record: Handover, nve: str) -> tuple[Tell, ...]:
    steered = names(record.steered)
    first = nve == record.new_nve and nve not in steered
    peer = nve in record.peers and nve not in steered and record.new_nve in steered
    return (tell(nve, Steer(move=record.id)),) if first or peer else ()


def _digest_again(record: Handover, nve: str) -> tuple[Tell, ...]:
    asked = record.phase == "equal" and record.options.verify
    ends = {record.old_nve: record.digest_old, record.new_nve: record.digest_new}
    missing = asked and nve in ends and not ends[nve]
    return (tell(nve, Digest(move=record.id)),) if missing else ()


def _way_back(record: Handover, nve: str) -> AnyOrder:
    if record.restored:
        return Steer(move=record.id, back=True)
    return GiveBack(move=record.id) if nve == record.new_nve else Restore(move=record.id)


def _failing(
    record: Handover,
    event: Failed | Abort | CommitRefused | Lost,
    now_s: float,
    now_ns: int,
) -> Step:
    match event:
        case Failed(nve=nve, step=step_name, why=why) if committed(record.phase):
            # Only forward: the order is repeated with the next tick, and the receipt says why.
            return msgspec.structs.replace(record, reason=f"{nve}: {step_name}: {why}"), ()
        case Failed(nve=nve, step=step_name, why=why):
            if step_name == "steer" and record.phase == "aborting":
                return _steered(record, nve, now_ns, now_s, now_ns)
            if step_name == "steer" and nve == record.new_nve:
                # It has turned all the same; only the proof of order is missing.
                return _steered(record, nve, now_ns, now_s, now_ns)
            if step_name == "steer":
                # Order at one peer is not proved; the commit's push still moves it over.
                return record, ()
            return _abort(record, f"{nve}: {step_name}: {why}", now_s, now_ns)
        case Abort(why=why):
            return _abort(record, why, now_s, now_ns)
        case CommitRefused(why=why):
            return _abort(record, why, now_s, now_ns) if record.phase == "equal" else (record, ())
        case Lost(nve=nve, dead=dead):
            return _lost(record, nve, now_s, now_ns, dead=dead)
        case _:
            assert_never(event)


def _prepared(record: Handover, event: Prepared, now_s: float, now_ns: int) -> Step:
    if record.phase == "precopy" and event.nve == record.old_nve:
        # Restarted with a full disk it has begun anew: it has to be told again (HO-65).
        return record, (_send(record),)
    if record.phase != "planned" or event.nve not in record.waiting:
        return record, ()
    record = msgspec.structs.replace(
        record,
        waiting=record.waiting - {event.nve},
        uri=event.uri or record.uri,
        keep_uri=event.keep_uri or record.keep_uri,
        disks_uri=event.disks_uri or record.disks_uri,
    )
    if event.nve == record.new_nve:
        return record, tuple(_prepare(record, nve) for nve in (record.old_nve, *record.peers))
    if record.waiting:
        return record, ()
    record = enter(enter(record, "staged", now_ns), "precopy", now_ns)
    record = msgspec.structs.replace(record, deadline_s=now_s + record.options.timeout_s)
    return record, (_send(record),)


def _flowing(record: Handover, held_ns: int) -> Step:
    """The old NVE redirects: steering need not wait for the VM's stop.

    The new NVE first: until its own tables lead to the port, nobody may send there directly.
    """
    if record.phase != "precopy" or record.held_ns:
        return record, ()
    record = msgspec.structs.replace(record, held_ns=held_ns)
    return record, (tell(record.new_nve, Steer(move=record.id)),)


def _stopped(record: Handover, event: Stopped, now_s: float, now_ns: int) -> Step:
    if record.phase != "precopy":
        return record, ()
    told = bool(record.held_ns)
    record = msgspec.structs.replace(
        enter(record, "paused", now_ns),
        held_ns=event.held_ns,
        stop_ns=event.stop_ns,
        memory=event.memory,
        deadline_s=now_s + STOPPED_LIMIT_S,
    )
    if not told:
        return record, (tell(record.new_nve, Steer(move=record.id)),)
    return _equal_if_ready(record, now_ns)


def _received(record: Handover, at_ns: int, now_ns: int) -> Step:
    if record.phase not in ("precopy", "paused") or record.equal_ns:
        return record, ()
    return _equal_if_ready(msgspec.structs.replace(record, equal_ns=at_ns), now_ns)


def _equal_if_ready(record: Handover, now_ns: int) -> Step:
    """The copy is whole and the new NVE's own tables lead to it: only then may others be told."""
    ready = record.phase == "paused" and record.equal_ns
    if ready and record.new_nve in names(record.steered):
        return _equal(record, now_ns)
    return record, ()


def _equal(record: Handover, now_ns: int) -> Step:
    record = enter(record, "equal", now_ns)
    if record.options.verify:
        ask = Digest(move=record.id)
        return record, (tell(record.old_nve, ask), tell(record.new_nve, ask))
    return record, (_commit(record),)


def _commit(record: Handover) -> Commit:
    return Commit(vm=record.vm.name, expected_version=record.version, new_nve=record.new_nve)


def _digested(record: Handover, event: Digested, now_ns: int, now_s: float) -> Step:
    if record.phase != "equal":
        return record, ()
    field = "digest_old" if event.nve == record.old_nve else "digest_new"
    record = msgspec.structs.replace(record, **{field: event.sha256})
    if not (record.digest_old and record.digest_new):
        return record, ()
    if record.digest_old != record.digest_new:
        return _abort(record, "memory or a disk differs between old and new host", now_s, now_ns)
    return record, (_commit(record),)


def _steered(record: Handover, nve: str, at_ns: int, now_s: float, now_ns: int) -> Step:
    if record.phase == "aborting":
        turning = record.restored and not record.closing and nve in record.waiting
        return _turned_back(record, nve, now_s) if turning else (record, ())
    if nve in names(record.steered) or not record.held_ns:
        return record, ()
    seen = Acknowledgement(nve=nve, at_ns=at_ns)
    record = msgspec.structs.replace(record, steered=(*record.steered, seen))
    if nve != record.new_nve:
        return record, ()
    others = _steer_others(record)
    record, effects = _equal_if_ready(record, now_ns)
    return record, others + effects


def _steer_others(record: Handover) -> tuple[CoordinatorEffect, ...]:
    steer = Steer(move=record.id)
    return tuple(tell(nve, steer) for nve in record.peers)


def _committed(record: Handover, event: Committed, now_s: float, now_ns: int) -> Step:
    if record.phase != "equal":
        return record, ()
    record = msgspec.structs.replace(
        enter(record, "committed", now_ns),
        version=event.version,
        commit_ns=event.at_ns,
        deadline_s=now_s + STOPPED_LIMIT_S,
    )
    retire = tell(record.old_nve, Retire(move=record.id, version=event.version))
    return record, (_activate(record), retire)


def _activate(record: Handover) -> Tell | Serve:
    """The VM may run, once no former host of it can write the images that stay (HO-70)."""
    if unserved(record):
        return Serve()
    return tell(record.new_nve, Activate(move=record.id, version=record.version))


def _served(record: Handover, nve: str) -> Step:
    if record.phase != "committed" or nve not in unserved(record):
        return record, ()
    record = msgspec.structs.replace(record, served=record.served | {nve})
    return record, () if unserved(record) else (_activate(record),)


def _running(record: Handover, event: Running, now_s: float, now_ns: int) -> Step:
    if record.phase != "committed":
        return record, ()
    record = enter(enter(record, "running", now_ns), "converging", now_ns)
    record = msgspec.structs.replace(
        record,
        resume_ns=event.at_ns,
        reason=None,
        outcome="open",
        packets=msgspec.structs.replace(record.packets, held=event.held),
    )
    return _converge(record, now_s, now_ns)


def _crashed(record: Handover, why: str, now_s: float, now_ns: int) -> Step:
    """The move ends as it would: the address leads to the new host, whatever became of the VM."""
    if record.phase != "committed":
        return record, ()
    record = enter(enter(record, "running", now_ns), "converging", now_ns)
    record = msgspec.structs.replace(record, reason=why, outcome="open")
    return _converge(record, now_s, now_ns)


def _converge(record: Handover, now_s: float, now_ns: int) -> Step:
    """The tunnel ends by this criterion and no other (R-42): never by silence, never by a timer."""
    if record.phase != "converging":
        return record, ()
    missing = set(involved(record)) - names(record.acknowledged) - set(record.fenced)
    if missing:
        return record, ()
    record = msgspec.structs.replace(
        enter(record, "drained", now_ns),
        close_reason=close_reason(record),
        waiting=frozenset(),
        deadline_s=now_s + record.options.drain_guard_ms / 1000,
    )
    return record, ()


def _close_orders(record: Handover) -> tuple[Tell, ...]:
    """The new NVE keeps its end of the tunnel until the old one has turned its own tenants.

    An old NVE that was away may not have heard that it is retired: it is told once more.
    """
    orders: list[Tell] = []
    if record.phase == "drained" and record.old_nve in record.waiting:
        orders.append(tell(record.old_nve, Retire(move=record.id, version=record.version)))
    if record.lost and record.old_nve in record.waiting:
        # It is back all the same, and has never heard that the move was aborted.
        orders.append(tell(record.old_nve, Restore(move=record.id)))
    closing = sorted(record.waiting - _keeps_its_end(record))
    return (*orders, *(tell(nve, close_order(record, nve)) for nve in closing))


def close_order(record: Handover, nve: str) -> Close:
    """What NVE `nve` is told last; of a lost VM the new host keeps the checkpoint."""
    return Close(move=record.id, keep=nve == record.new_nve and recoverable(record))


def _keeps_its_end(record: Handover) -> frozenset[str]:
    """The new NVE as long as the old one has not closed (HO-18)."""
    waits = record.phase == "drained" and record.old_nve in record.waiting
    return frozenset({record.new_nve}) & record.waiting if waits else frozenset()


def _closed(record: Handover, event: Closed, now_ns: int) -> Step:
    if not record.closing or event.nve not in record.waiting:
        return record, ()
    record = msgspec.structs.replace(
        record,
        waiting=record.waiting - {event.nve},
        packets=merge(record.packets, event.packets),
        storage=event.storage if event.nve == record.old_nve else record.storage,
    )
    moved = record.phase == "drained"
    if moved and event.nve == record.old_nve and record.new_nve in record.waiting:
        return record, (tell(record.new_nve, Close(move=record.id)),)
    if record.waiting:
        return record, ()
    return end(record, now_ns), ()


def _abort(record: Handover, why: str, now_s: float, now_ns: int) -> Step:
    """Go back. Refused after the commit: then the move only goes forward."""
    if committed(record.phase) or record.phase == "aborting":
        return record, ()
    record = msgspec.structs.replace(
        enter(record, "aborting", now_ns),
        reason=why,
        deadline_s=now_s + GIVE_BACK_LIMIT_S,
        waiting=frozenset({record.new_nve}),
    )
    if record.new_nve in record.fenced:
        # It never had leave to run: there is nothing to wait for.
        return _restore(record, now_s, now_ns)
    return record, (tell(record.new_nve, GiveBack(move=record.id)),)


def _given_back(record: Handover, nve: str, now_s: float, now_ns: int) -> Step:
    if record.restored or nve != record.new_nve:
        return record, ()
    return _restore(record, now_s, now_ns)


def _restore(record: Handover, now_s: float, now_ns: int) -> Step:
    if record.lost:
        return _restored(record, now_s, now_ns)
    record = msgspec.structs.replace(
        record, waiting=frozenset({record.old_nve}), deadline_s=now_s + CLOSE_LIMIT_S
    )
    return record, (tell(record.old_nve, Restore(move=record.id)),)


def _restored(record: Handover, now_s: float, now_ns: int) -> Step:
    """The VM runs at the old host: peers that were steered turn back before anything goes."""
    if record.restored:
        return record, ()
    record = msgspec.structs.replace(
        record,
        restored=True,
        waiting=_told_to_steer(record) - set(record.fenced),
        deadline_s=now_s + GIVE_BACK_LIMIT_S,
    )
    if not record.waiting:
        return _close(record, now_s)
    back = Steer(move=record.id, back=True)
    return record, tuple(tell(peer, back) for peer in sorted(record.waiting))


def _told_to_steer(record: Handover) -> frozenset[str]:
    """Peers that may have turned to the new NVE, whether they could say so or not."""
    told = record.new_nve in names(record.steered)
    return frozenset(record.peers) if told else frozenset()


def _turned_back(record: Handover, nve: str, now_s: float) -> Step:
    record = msgspec.structs.replace(record, waiting=record.waiting - {nve})
    return (record, ()) if record.waiting else _close(record, now_s)


def _close(record: Handover, now_s: float) -> Step:
    """Everybody cleans up; their counts complete the receipt."""
    record = msgspec.structs.replace(
        record,
        closing=True,
        waiting=frozenset(involved(record)) - set(record.fenced),
        deadline_s=now_s + CLOSE_LIMIT_S,
    )
    return record, _close_orders(record)


def _lost(record: Handover, nve: str, now_s: float, now_ns: int, *, dead: bool) -> Step:
    """A dead NVE is fenced: nobody waits for it. A move that needs one that is away goes back.

    After the commit one that is only away keeps the tunnel open (6-2): its tenants still use it.
    """
    if dead and nve == record.old_nve and not committed(record.phase) and not record.lost:
        # The copy there is gone with its host, or somebody has made sure that it does not run.
        fenced = tuple(dict.fromkeys((*record.fenced, nve)))
        if record.phase == "aborting":
            record = msgspec.structs.replace(record, fenced=fenced)
        record = msgspec.structs.replace(record, lost=True)
        if record.phase == "aborting" and not record.restored and nve in record.waiting:
            why = f"{record.reason}; {nve} is dead"
            return _restored(msgspec.structs.replace(record, reason=why), now_s, now_ns)
    if nve in left_at(record.vm) and nve not in involved(record):
        return _disk_lost(record, nve, now_s, now_ns)
    if nve not in involved(record) or nve in record.fenced:
        return record, ()
    if committed(record.phase) and not record.closing and not dead:
        away = f"{nve} is away: the tunnel stays open until its NVE is back"
        return msgspec.structs.replace(record, reason=away), ()
    record = msgspec.structs.replace(record, fenced=(*record.fenced, nve))
    if record.phase == "converging":
        return _converge(record, now_s, now_ns)
    if record.waiting and (record.closing or record.phase == "aborting"):
        return _give_up_waiting(record, frozenset({nve}), now_s, now_ns)
    if committed(record.phase):
        return record, ()
    return _abort(record, f"{nve} is unreachable", now_s, now_ns)


def _disk_lost(record: Handover, nve: str, now_s: float, now_ns: int) -> Step:
    """A third host has an image: without it the move goes back, after the commit the VM waits."""
    if not committed(record.phase):
        return _abort(record, f"{nve} is unreachable, and has a disk of the VM", now_s, now_ns)
    if nve not in unserved(record):
        return record, ()
    why = f"{nve} is away: it has a disk, and the VM waits for it"
    return msgspec.structs.replace(record, reason=why), ()


def _give_up_waiting(record: Handover, nves: frozenset[str], now_s: float, now_ns: int) -> Step:
    if record.phase == "aborting" and not record.restored:
        # Only the old NVE knows whether the VM runs: ask until it says so.
        unknown = record.old_nve in record.waiting
        outcome = "unknown" if unknown else record.outcome
        return _restore(msgspec.structs.replace(record, outcome=outcome), now_s, now_ns)
    unheard = _keeps_its_end(record)
    if record.closing:
        silent = record.waiting & (nves - unheard)
        record = msgspec.structs.replace(record, unclosed=record.unclosed | silent)
    record = msgspec.structs.replace(record, waiting=record.waiting - (nves - unheard))
    if unheard and not _keeps_its_end(record):
        record = msgspec.structs.replace(record, deadline_s=now_s + CLOSE_LIMIT_S)
        return record, _close_orders(record)
    if record.waiting:
        return record, ()
    return (end(record, now_ns), ()) if record.closing else _close(record, now_s)


def _tick(record: Handover, now_s: float, now_ns: int) -> Step:
    if now_s < record.deadline_s:
        return record, ()
    match record.phase:
        case "planned":
            silent = ", ".join(sorted(record.waiting))
            return _abort(record, f"no answer from {silent} in time", now_s, now_ns)
        case "precopy" if record.options.timeout_action == "pause":
            record = msgspec.structs.replace(record, deadline_s=now_s + PREPARE_LIMIT_S)
            return record, (tell(record.old_nve, Force(move=record.id)),)
        case "precopy":
            why = f"memory did not converge within {record.options.timeout_s:g} s"
            return _abort(record, why, now_s, now_ns)
        case "paused" | "equal":
            return _abort(record, "the new copy was not whole in time", now_s, now_ns)
        case "committed":
            # The new NVE has not said that the VM runs: until it does nobody knows.
            return _start(msgspec.structs.replace(record, outcome="unknown"), now_s, now_ns)
        case "drained" if not record.closing:
            # The guard has passed: what was launched into the tunnel has come out of it.
            return _close(record, now_s)
        case "drained" | "aborting":
            return _give_up_waiting(record, record.waiting, now_s, now_ns)
        case _:
            return record, ()
