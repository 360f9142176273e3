"""The machine of the NVE that gives the VM up.

    arming -> armed -> sending -> stopping -> stopped -> closing -> closed
                 any before Retire --Restore--> returning -> returned -> closing -> closed

From the gate's hold on, a frame for the VM waits here; after STOP, what the old tap still had goes
ahead, then what waited, then the kernel redirects. Hold comes before STOP, so that QEMU has taken
and delivered all it has read: what it keeps inside when it stops would be lost.
"""

from __future__ import annotations

import msgspec

from overland.mobility.convergence import converged
from overland.mobility.messages import (
    ArmPorts,
    AwaitDrained,
    BeginSend,
    Broken,
    CancelSend,
    CleanUp,
    Close,
    Closed,
    Digest,
    Digested,
    Done,
    Failed,
    FinishSend,
    Force,
    HoldPorts,
    MakeTunnel,
    MuteBroadcast,
    NveEvent,
    Prepared,
    Progress,
    ProvePath,
    ReleaseInto,
    Restore,
    Restored,
    ResumeVm,
    Retire,
    Say,
    Send,
    SteerHere,
    StopCopy,
    Stopped,
    TakeDigest,
    TransferSeen,
    WatchTransfer,
)
from overland.mobility.nve import Part, PartStep, memory_of, to

DRAIN_LIMIT_S = 0.05
"""How long the VM may take to empty its tap's ring before it is stopped and the rest rescued."""


def begin(part: Part) -> PartStep:
    """Arm: nothing that a tenant could notice changes."""
    return to(part, "arming", MakeTunnel(to="new"), ArmPorts(), ProvePath(to="new"))


def step(part: Part, event: NveEvent) -> PartStep:  # noqa: C901 - one row per transition
    """Return the next part and the effects wanted; an event out of place changes nothing."""
    match part.stage, event:
        case "arming", Done(effect="ProvePath"):
            return to(part, "armed", Say(report=Prepared(move=part.move, nve=part.nve)))
        case "armed", Send(uri=uri):
            part = msgspec.structs.replace(part, uri=uri)
            return to(part, "sending", BeginSend(uri=uri), WatchTransfer())
        case "sending", TransferSeen():
            return _seen(part, event)
        case "sending", Force():
            return _stop(part)
        case "stopping" | "stopped", Done():
            return _stopping(part, event)
        case "stopped", Digest():
            return part, (TakeDigest(),)
        case "stopped", Retire(version=version):
            part = msgspec.structs.replace(part, retired=True, version=version)
            return part, (MuteBroadcast(),)
        case "closing", Done(effect="CleanUp", packets=packets) if part.retired:
            closed = Closed(move=part.move, nve=part.nve, packets=packets, memory=part.memory)
            return part, (Say(report=closed),)
        case "closing", Done(effect="StopCopy") | Broken(effect="StopCopy"):
            return to(part, "closed")
        case "closing", Done(effect="CleanUp", packets=packets):
            said = Closed(move=part.move, nve=part.nve, packets=packets, memory=part.memory)
            return to(part, "closed", Say(report=said))
        case _, Restore() if not part.retired and part.stage not in ("closing", "closed"):
            return _restore(part)
        case "returning", Done(effect="ResumeVm") | Broken():
            # A VM that cannot run any more has crashed: the agent reports that as its state.
            return to(part, "returned", Say(report=Restored(move=part.move, nve=part.nve)))
        case "arming" | "armed" | "sending" | "stopping", Broken(effect=effect, why=why):
            failed = Failed(move=part.move, nve=part.nve, step=effect, why=why)
            return part, (Say(report=failed),)
        case "armed" | "stopped" | "returned", Close():
            if not part.retired:
                return to(part, "closing", CleanUp())
            # Nobody sends here any more but our own tenants: they turn before the tunnel goes.
            turn = SteerHere(back=False, local=True)
            return to(part, "closing", turn, CleanUp(), StopCopy())
        case _:
            return part, ()


def _seen(part: Part, event: TransferSeen) -> PartStep:
    transfer = event.transfer
    part = msgspec.structs.replace(part, memory=memory_of(transfer))
    if transfer.status in ("failed", "cancelled"):
        why = transfer.error or f"the transfer was {transfer.status}"
        return part, (Say(report=Failed(move=part.move, nve=part.nve, step="send", why=why)),)
    if converged(transfer, part.options):
        return _stop(part)
    progress = Progress(move=part.move, nve=part.nve, memory=part.memory)
    return part, (Say(report=progress), WatchTransfer())


def _stop(part: Part) -> PartStep:
    return to(
        part,
        "stopping",
        HoldPorts(),
        AwaitDrained(timeout_s=DRAIN_LIMIT_S),
        FinishSend(),
        ReleaseInto(tunnel=True),
    )


def _stopping(part: Part, event: Done) -> PartStep:
    match event.effect:
        case "HoldPorts":
            return msgspec.structs.replace(part, held_ns=event.number), ()
        case "FinishSend":
            return msgspec.structs.replace(part, stop_ns=event.number), ()
        case "ReleaseInto":
            said = Stopped(
                move=part.move,
                nve=part.nve,
                held_ns=part.held_ns,
                stop_ns=part.stop_ns,
                rescued=event.number,
                memory=part.memory,
            )
            return to(part, "stopped", Say(report=said))
        case "TakeDigest":
            said_digest = Digested(move=part.move, nve=part.nve, sha256=event.text)
            return part, (Say(report=said_digest),)
        case _:
            return part, ()


def _restore(part: Part) -> PartStep:
    """Cancel; frames come home in order: what the new NVE gave back is in the tap already."""
    if part.stage in ("returned", "returning"):
        again = Say(report=Restored(move=part.move, nve=part.nve))
        return (part, (again,)) if part.stage == "returned" else (part, ())
    if part.stage in ("arming", "armed"):
        return to(part, "returned", Say(report=Restored(move=part.move, nve=part.nve)))
    if part.held_ns == 0:
        return to(part, "returning", CancelSend(), ResumeVm())
    return to(
        part,
        "returning",
        CancelSend(),
        HoldPorts(),
        SteerHere(back=True, local=True),
        ReleaseInto(tunnel=False),
        ResumeVm(),
    )
