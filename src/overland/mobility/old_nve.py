"""The machine of the NVE that gives the VM up.

    arming -> armed (-> mirroring) -> sending -> stopping -> stopped -> closing -> closed
                 any before Retire --Restore--> returning -> returned -> closing -> closed
    warm:    armed -> checkpointing -> resting -> checkpointing -> ... -> sending, as above

In a warm move the new host gets so many whole checkpoints of the running VM first, one an interval.

From the gate's hold on, a frame for the VM waits here. Hold comes before STOP, so that QEMU takes
and delivers all it has read: what it keeps inside when it stops would be lost. Once the VM has
emptied its ring, what waits goes into the tunnel, then the kernel redirects, and everybody steers:
all of that while the VM still runs, the end of its memory's copy held up as long. What it does not
empty in time is rescued after STOP, ahead of the rest.

Disks that go along are copied first, while memory waits; from then on each write goes to both
hosts. After STOP they are brought to an end before the rest of memory is sent, so that a copy that
is whole has its disks as well.
"""

from __future__ import annotations

import msgspec

from overland.mobility.convergence import STOPPED, converged, first_pace, leash, pace
from overland.mobility.messages import (
    ArmPorts,
    AwaitDrained,
    AwaitInterval,
    AwaitStop,
    BeginMirror,
    BeginSend,
    Broken,
    CancelSend,
    Checkpointed,
    CheckpointSeen,
    CleanUp,
    Close,
    Closed,
    Digest,
    Digested,
    Do,
    Done,
    EndMirror,
    FinishSend,
    Flowing,
    Force,
    Forget,
    HoldPorts,
    MakeTunnel,
    MirrorSeen,
    MuteBroadcast,
    NveEvent,
    Pace,
    Prepared,
    Progress,
    ProvePath,
    Reconnected,
    ReleaseInto,
    RemoveDisks,
    Restore,
    Restored,
    Resumed,
    ResumeVm,
    Retire,
    Say,
    Send,
    SendRest,
    SteerHere,
    StopCopy,
    Stopped,
    TakeCheckpoint,
    TakeDigest,
    TransferSeen,
    WatchMirror,
    WatchTransfer,
)
from overland.mobility.nve import (
    RESTARTED,
    Part,
    PartStep,
    Stage,
    failed,
    failure_of,
    memory_of,
    to,
)
from overland.model.cluster import moved_disks
from overland.model.handover import Checkpoint, Packets

DRAIN_LIMIT_S = 1.0
"""How long the VM may take to empty its tap's ring before it is stopped and the rest rescued."""

PROGRESS_PART = 1 / 16
"""The part of memory after which progress is news; hundreds of reports a second cost the VM CPU."""


def begin(part: Part) -> PartStep:
    """Arm: nothing that a tenant could notice changes. First what a crash may have left goes."""
    return to(part, "arming", Forget(), MakeTunnel(to="new"), ArmPorts(), ProvePath(to="new"))


def step(part: Part, event: NveEvent) -> PartStep:  # noqa: C901 - one row per transition
    """Return the next part and the effects wanted; an event out of place changes nothing."""
    match part.stage, event:
        case "arming", Done(effect="ProvePath"):
            part = msgspec.structs.replace(part, stage="armed")
            return part, _said(part)
        case "arming", Done():
            return part, ()  # the next effect follows by itself
        case "armed", Send(uri=uri, keep_uri=keep_uri, disks_uri=disks_uri):
            part = msgspec.structs.replace(part, uri=uri, keep_uri=keep_uri, disks_uri=disks_uri)
            return _mirror(part) if disks_uri else _next_checkpoint(part)
        case "checkpointing", CheckpointSeen(checkpoint=checkpoint):
            return _checkpointed(part, checkpoint)
        case "resting", Done(effect="AwaitInterval"):
            return _next_checkpoint(part)
        case "checkpointing" | "resting", Force():
            # The time is up: no more checkpoints, and as soon as may be the last delta.
            options = msgspec.structs.replace(part.options, checkpoints=0)
            return msgspec.structs.replace(part, options=options), ()
        case "mirroring" | "sending", MirrorSeen():
            return _mirrored(part, event)
        case "mirroring", Broken(effect=effect, why=why) if effect != "vm":
            return _mirror_failed(part, effect, why)
        case "sending", Broken(effect="WatchMirror" as effect, why=why):
            return _mirror_failed(part, effect, why)
        case "sending", TransferSeen():
            return _seen(part, event)
        case "sending", Force():
            return _stop(part, late=False)
        case "stopping" | "stopped", Done():
            return _stopping(part, event)
        case "stopped", Digest():
            return part, (TakeDigest(),)
        case "stopped", Retire(version=version) if not part.retired:
            part = msgspec.structs.replace(part, retired=True, version=version)
            return part, (MuteBroadcast(),)
        case (
            "arming" | "armed" | "checkpointing" | "resting" | "mirroring" | "sending" | "stopping",
            Retire(version=version),
        ):
            # Committed, so it had stopped: what says so could not be written (HO-47).
            part = msgspec.structs.replace(part, retired=True, version=version, failure=None)
            return to(part, "stopped", *_REDIRECTING, MuteBroadcast())
        case "stopped", Broken(effect=effect, why=why) if effect != "vm" and not part.retired:
            return failed(part, effect, why)
        case "stopped", Broken(effect="MakeTunnel" | "ArmPorts"):
            return part, (ReleaseInto(tunnel=True),)
        case "closing", Broken(effect=effect) if effect not in ("CleanUp", "StopCopy"):
            stop = (StopCopy(),) if part.retired else ()
            return part, (CleanUp(), *stop)
        case "closing", Done(effect="CleanUp", packets=packets) if part.retired:
            return part, (_closed(part, packets),)
        case "closing", Done(effect="StopCopy") | Broken(effect="StopCopy"):
            return to(part, "closed")
        case "closing", Broken(effect="CleanUp") if part.retired:
            # What could not be removed is swept when the daemon starts again.
            return part, (Say(report=Closed(move=part.move, nve=part.nve)), StopCopy())
        case "closing", Broken(effect="CleanUp"):
            return to(part, "closed", Say(report=Closed(move=part.move, nve=part.nve)))
        case "closing", Done(effect="CleanUp", packets=packets):
            return to(part, "closed", _closed(part, packets))
        case _, Restore() if not part.retired and part.stage not in ("closing", "closed"):
            return _restore(part)
        case "returning", Broken(effect=effect) if effect not in ("ResumeVm", "vm"):
            # The VM runs on whatever else fails; what waits goes to it as far as it can.
            rest = (ReleaseInto(tunnel=False),) if effect != "ReleaseInto" else ()
            return part, (*rest, ResumeVm())
        case "returning", Done(effect="ResumeVm") | Broken():
            # A VM that cannot run any more has crashed: the agent reports that as its state.
            part = msgspec.structs.replace(part, stage="returned")
            return part, _said(part)
        case (
            "arming" | "armed" | "checkpointing" | "resting" | "mirroring" | "sending" | "stopping",
            Broken(effect=effect, why=why),
        ):
            return failed(part, effect, why)
        case "checkpointing" | "resting", Close():
            # It was given up, and has not heard that all is over; the VM runs all the time.
            return to(part, "closing", CancelSend(), CleanUp())
        case "arming" | "armed" | "stopped" | "returned", Close():
            return _close(part)
        case _, Reconnected():
            return part, _said(part)
        case _, Resumed():
            return _resumed(part)
        case _:
            return part, ()


def _next_checkpoint(part: Part) -> PartStep:
    """Another one, or, when all that were asked for are taken, the memory as in a hot move."""
    if part.checkpoints < part.options.checkpoints:
        return to(part, "checkpointing", TakeCheckpoint(uri=part.keep_uri))
    return _send(part)


def _checkpointed(part: Part, checkpoint: Checkpoint) -> PartStep:
    """Intervals count from checkpoint to checkpoint; after the last one nothing is waited for."""
    part = msgspec.structs.replace(part, checkpoints=part.checkpoints + 1)
    said = Say(report=Checkpointed(move=part.move, nve=part.nve, checkpoint=checkpoint))
    if part.checkpoints < part.options.checkpoints:
        next_ns = checkpoint.at_ns + int(part.options.interval_s * 1e9)
        return to(part, "resting", said, AwaitInterval(until_ns=next_ns))
    part, effects = _next_checkpoint(part)
    return part, (said, *effects)


def _mirror(part: Part) -> PartStep:
    limit = part.options.bandwidth_bytes_per_s or 0
    begin = BeginMirror(uri=part.disks_uri, bytes_per_s=limit)
    return to(part, "mirroring", begin, WatchMirror())


def _send(part: Part) -> PartStep:
    first = first_pace(part.options)
    part = msgspec.structs.replace(part, pace=first)
    return to(part, "sending", BeginSend(uri=part.uri, bytes_per_s=first), WatchTransfer())


def _mirrored(part: Part, event: MirrorSeen) -> PartStep:
    """Memory follows once the disks are equal; that they can be written is watched to the end."""
    storage, told = event.storage, part.storage
    now = msgspec.structs.replace(part, storage=storage)
    if part.stage == "mirroring" and storage.ready:
        now, effects = _send(now)
        return now, (*effects, WatchMirror())
    if storage.sent_bytes - told.sent_bytes < storage.total_bytes * PROGRESS_PART:
        return part, (WatchMirror(),)
    progress = Progress(move=part.move, nve=part.nve, memory=part.memory, storage=storage)
    return now, (Say(report=progress), WatchMirror())


def _mirror_failed(part: Part, effect: str, why: str) -> PartStep:
    """The VM's own writes must not wait for a host that does not take them: given up at once."""
    part, said = failed(part, effect, why)
    return to(part, "stopping", CancelSend(), *said)


def _seen(part: Part, event: TransferSeen) -> PartStep:
    transfer, told = event.transfer, part.memory
    part = msgspec.structs.replace(part, memory=memory_of(transfer))
    if transfer.status in ("failed", "cancelled"):
        why = transfer.error or f"the transfer was {transfer.status}"
        return failed(part, "send", why)
    if converged(transfer, part.options):
        return _stop(part, late=transfer.status in STOPPED)
    watch: tuple[Do, ...] = (WatchTransfer(),)
    if transfer.status == "active":
        rate, more = pace(transfer, part.options), leash(transfer)
        if rate != part.pace or more is not None:
            part = msgspec.structs.replace(part, pace=rate)
            watch = (Pace(bytes_per_s=rate, leash_bytes=more), *watch)
    step_bytes = transfer.total_bytes * PROGRESS_PART
    if transfer.passes == told.rounds and transfer.sent_bytes - told.sent_bytes < step_bytes:
        return msgspec.structs.replace(part, memory=told), watch
    progress = Progress(move=part.move, nve=part.nve, memory=part.memory, storage=part.storage)
    return part, (Say(report=progress), *watch)


def _stop(part: Part, *, late: bool) -> PartStep:
    """With `late` the VM has stopped already: nobody empties its ring any more."""
    if late:
        return to(part, "stopping", HoldPorts(), AwaitStop())
    drain = AwaitDrained(timeout_s=DRAIN_LIMIT_S)
    return to(part, "stopping", HoldPorts(), drain)


def _stopping(part: Part, event: Done) -> PartStep:
    match event.effect:
        case "HoldPorts":
            return msgspec.structs.replace(part, held_ns=event.number), ()
        case "AwaitDrained":
            # A ring that is not empty may be read by us once the VM stands still, not before.
            part = msgspec.structs.replace(part, drained=bool(event.number))
            release = (ReleaseInto(tunnel=True),) if part.drained else ()
            return part, (FinishSend(), *release, AwaitStop())
        case "AwaitStop":
            rest = (EndMirror(), SendRest()) if part.disks_uri and not part.stop_ns else ()
            part = msgspec.structs.replace(part, stop_ns=event.number)
            part, said = _progressed(part)
            release = () if part.drained else (ReleaseInto(tunnel=True),)
            return part, (*said, *rest, *release)
        case "ReleaseInto":
            rescued = part.rescued + event.number
            return _progressed(msgspec.structs.replace(part, flowing=True, rescued=rescued))
        case "TakeDigest":
            said_digest = Digested(move=part.move, nve=part.nve, sha256=event.text)
            return part, (Say(report=said_digest),)
        case _:
            return part, ()


def _progressed(part: Part) -> PartStep:
    """Stopped means both: the VM stands still, and what waited for it has gone ahead."""
    stage: Stage = "stopped" if part.stop_ns and part.flowing else part.stage
    part = msgspec.structs.replace(part, stage=stage)
    return part, _said(part)


def _stopped(part: Part) -> Say:
    return Say(
        report=Stopped(
            move=part.move,
            nve=part.nve,
            held_ns=part.held_ns,
            stop_ns=part.stop_ns,
            memory=part.memory,
        )
    )


def _closed(part: Part, packets: Packets) -> Say:
    packets = msgspec.structs.replace(packets, rescued=part.rescued)
    closed = Closed(
        move=part.move,
        nve=part.nve,
        packets=packets,
        memory=part.memory,
        storage=part.storage,
    )
    return Say(report=closed)


def _restore(part: Part) -> PartStep:
    """Cancel; frames come home in order: what the new NVE gave back is in the tap already."""
    match part.stage:
        case "returning":
            return part, ()
        case "returned":
            return part, _said(part)
        case "arming" | "armed" | "checkpointing" | "resting" | "mirroring" | "sending":
            # Of a restarted daemon whose disk was full the stage may be one of long ago: the VM may
            # have been stopped since. One that runs does not notice.
            return to(part, "returning", CancelSend(), ResumeVm())
        case _:
            return to(part, "returning", *_HOME)


_REDIRECTING: tuple[Do, ...] = (MakeTunnel(to="new"), ArmPorts(), ReleaseInto(tunnel=True))
_HOME: tuple[Do, ...] = (
    ArmPorts(),
    CancelSend(),
    HoldPorts(),
    SteerHere(back=True, local=True),
    ReleaseInto(tunnel=False),
    ResumeVm(),
)


def _close(part: Part) -> PartStep:
    if not part.retired:
        return to(part, "closing", CleanUp())
    # Nobody sends here any more but our own tenants: they turn before the tunnel goes.
    turn = SteerHere(back=False, local=True)
    remove = (RemoveDisks(),) if moved_disks(part.vm) else ()
    return to(part, "closing", turn, *remove, CleanUp(), StopCopy())


def _said(part: Part) -> tuple[Do, ...]:
    """The report that `part` stands for; the coordinator may hear it any number of times."""
    match part.stage:
        case "armed":
            return (Say(report=Prepared(move=part.move, nve=part.nve)),)
        case "stopped" if part.failure is not None and not part.retired:
            return failure_of(part)
        case "stopped":
            return (_stopped(part),)
        case "returned":
            return (Say(report=Restored(move=part.move, nve=part.nve)),)
        case "returning" | "closing":
            return ()
        case "stopping" if part.flowing and part.failure is None:
            return (Say(report=Flowing(move=part.move, nve=part.nve, held_ns=part.held_ns)),)
        case _:
            return failure_of(part)


def _resumed(part: Part) -> PartStep:
    """Take back what only the daemon held: readers of queues, sockets that answer."""
    again = (MakeTunnel(to="new"), ArmPorts())
    match part.stage:
        case "arming":
            return begin(part)
        case "armed":
            return part, (*again, *_said(part))
        case "checkpointing" | "resting" | "mirroring" | "sending" | "stopping":
            # How far the stop went is not known; the way back is safe from anywhere.
            part, said = failed(part, "stop", RESTARTED)
            return to(part, "stopping", *again, *said)
        case "stopped":
            mute = (MuteBroadcast(),) if part.retired else ()
            return part, (*_REDIRECTING, *mute)
        case "returning":
            return to(part, "returning", *_HOME)
        case "closing":
            return _close(part)
        case _:
            return part, _said(part)
