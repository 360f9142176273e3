"""The machine of the NVE that takes the VM.

    arming -> awaiting -> whole --Activate--> activating -> active -> closing -> closed
         any before Activate --GiveBack--> returning -> returned -> closing -> closed

The new copy is paused from birth; `Activate`, which the coordinator sends only after the commit,
is the only order that makes it run. What arrives before waits in the tap's own ring, in order, and
is there when the VM opens its eyes: nothing is replayed, so nothing can be replayed wrongly, and
between RESUME and the first frame there is no work of ours.
"""

from __future__ import annotations

import msgspec

from overland.mobility.messages import (
    Activate,
    Announce,
    ArmPeers,
    ArmPorts,
    AttachDisks,
    AwaitCopy,
    Broken,
    CleanUp,
    Close,
    Closed,
    Crashed,
    Digest,
    Digested,
    Do,
    Done,
    DropStale,
    Failed,
    Forget,
    GiveBack,
    GivenBack,
    HoldPorts,
    KeepCheckpoints,
    KeepDisks,
    MakeTunnel,
    NveEvent,
    OfferDisks,
    OpenPorts,
    Prepared,
    QuietPorts,
    ReceiveCopy,
    Received,
    Reconnected,
    RefuseCheckpoints,
    ReleaseInto,
    Resumed,
    ResumeVm,
    Running,
    Say,
    Steer,
    Steered,
    SteerHere,
    StopCopy,
    TakeDigest,
    Unmute,
    WithdrawDisks,
)
from overland.mobility.nve import RESTARTED, Part, PartStep, failed, failure_of, to
from overland.model.cluster import left_at, moved_disks


def begin(part: Part) -> PartStep:
    """Make the place: port, tunnel, gates, and an empty paused copy.

    First what a crash may have left goes; a copy that runs here is no leftover (HO-23).
    """
    offer = (OfferDisks(),) if moved_disks(part.vm) else ()
    return to(
        part,
        "arming",
        DropStale(),
        Forget(),
        ArmPorts(),
        QuietPorts(),
        MakeTunnel(to="old"),
        ArmPeers(),
        *((KeepCheckpoints(),) if part.options.warm else ()),
        ReceiveCopy(),
        *offer,
        OpenPorts(),
    )


def step(part: Part, event: NveEvent) -> PartStep:  # noqa: C901 - one row per transition
    """Return the next part and the effects wanted; an event out of place changes nothing."""
    match part.stage, event:
        case "arming", Done(effect="KeepCheckpoints", text=keep_uri) if part.options.warm:
            return msgspec.structs.replace(part, keep_uri=keep_uri), ()
        case "arming", Done(effect="ReceiveCopy", text=uri):
            return msgspec.structs.replace(part, uri=uri), ()
        case "arming", Done(effect="OfferDisks", text=uri) if moved_disks(part.vm):
            return msgspec.structs.replace(part, disks_uri=uri), ()
        case "arming", Done(effect="OpenPorts"):
            part = msgspec.structs.replace(part, stage="awaiting")
            return part, (*_said(part), AwaitCopy())
        case "arming", Done():
            return part, ()  # the next effect follows by itself
        case "awaiting", Done(effect="AwaitCopy", number=at_ns):
            part = msgspec.structs.replace(part, received_ns=at_ns)
            return (part, (WithdrawDisks(),)) if part.disks_uri else _whole(part)
        case "awaiting", Done(effect="WithdrawDisks") if part.received_ns:
            return _whole(part)
        case "awaiting" | "whole", Steer(back=False):
            return part, (_STEER,)
        case "awaiting" | "whole" | "activating" | "active", Done(effect="SteerHere", number=at_ns):
            part = msgspec.structs.replace(part, steered_ns=part.steered_ns or at_ns)
            return part, (_steered(part),)
        case "whole", Digest():
            return part, (TakeDigest(),)
        case "whole", Done(effect="TakeDigest", text=sha256):
            return part, (Say(report=Digested(move=part.move, nve=part.nve, sha256=sha256)),)
        case "arming" | "awaiting", Activate(version=version):
            # It had come further than its disk had room to say, and was restarted (HO-58). It has
            # steered, or there would be no commit; perhaps nobody is left to answer its marker.
            part = msgspec.structs.replace(part, version=version, failure=None)
            return to(part, "activating", *_AGAIN, *_run(part))
        case "whole" | "activating", Activate(version=version):
            part = msgspec.structs.replace(part, version=version)
            return to(part, "activating", *_run(part))
        case "activating", Done(effect="ResumeVm", number=at_ns, packets=packets):
            part = msgspec.structs.replace(
                part, stage="active", resumed_ns=at_ns, held=packets.held
            )
            return part, _said(part)
        case "activating", Broken(effect="vm", why=why):
            part = msgspec.structs.replace(part, stage="active", failure=("vm", why))
            return part, _said(part)
        case "active" | "returned", Close(keep=keep):
            return to(msgspec.structs.replace(part, keep=keep), "closing", CleanUp(keep=keep))
        case "arming" | "awaiting" | "whole", Close(keep=keep):
            # The move was aborted without us; only Activate could have made this copy run.
            part = msgspec.structs.replace(part, keep=keep)
            return to(part, "closing", *_own_copy(part), *_GIVE_BACK, CleanUp(keep=keep))
        case "closing", Broken(effect=effect) if effect != "CleanUp":
            rest = () if part.version else _stood_behind(part, effect)
            return part, (*rest, CleanUp(keep=part.keep))
        case "closing", Broken():
            # What could not be removed is swept when the daemon starts again.
            return to(part, "closed", Say(report=Closed(move=part.move, nve=part.nve)))
        case "closing", Done(effect="CleanUp", packets=packets):
            closed = Closed(move=part.move, nve=part.nve, packets=packets)
            return to(part, "closed", Say(report=closed))
        case "arming" | "awaiting" | "whole", GiveBack():
            return to(part, "returning", *_own_copy(part), *_GIVE_BACK)
        case "returning", Broken(effect=effect) if effect not in _GIVING_BACK:
            # What waits goes back whatever becomes of the copy.
            return part, _stood_behind(part, effect)
        case "returning", Done(effect="ReleaseInto") | Broken():
            part = msgspec.structs.replace(part, stage="returned")
            return part, _said(part)
        case "returned", GiveBack():
            return part, _said(part)
        case "awaiting" | "whole" | "activating" | "active", Broken(effect="SteerHere", why=why):
            said = Say(report=Failed(move=part.move, nve=part.nve, step="steer", why=why))
            # What stood in line behind the turn went with its failure: above all the VM's own step.
            return part, (said, *(_run(part) if part.stage == "activating" else ()))
        case "arming" | "awaiting" | "whole" | "activating", Broken(effect=effect, why=why):
            return failed(part, effect, why)
        case _, Reconnected():
            return part, _said(part)
        case _, Resumed():
            return _resumed(part)
        case _:
            return part, ()


_STEER = SteerHere(back=False, local=True)
_RUN: tuple[Do, ...] = (Unmute(), ResumeVm(), Announce())
_GIVE_BACK: tuple[Do, ...] = (
    MakeTunnel(to="old"),
    ArmPorts(),
    HoldPorts(),
    ReleaseInto(tunnel=True),
)
_AGAIN: tuple[Do, ...] = (
    MakeTunnel(to="old"),
    ArmPorts(),
    ReleaseInto(tunnel=False),
    ArmPeers(),
)
"""What a daemon that was killed has left in the kernel, taken back."""

_GIVING_BACK = {type(effect).__name__ for effect in _GIVE_BACK}


_ENDING_THE_COPY = {"StopCopy", "DropStale", "RefuseCheckpoints"}


def _stood_behind(part: Part, effect: str) -> tuple[Do, ...]:
    """What of the way back stood in line behind `effect`, and went with its failure.

    Behind a turn that was under way when the order to give back came, that is all of it (HO-46).
    """
    if effect in _GIVING_BACK:
        return ()
    return _GIVE_BACK if effect in _ENDING_THE_COPY else (*_own_copy(part), *_GIVE_BACK)


def _run(part: Part) -> tuple[Do, ...]:
    """From here on the images are the VM's, whatever becomes of this copy."""
    keep = (KeepDisks(),) if moved_disks(part.vm) else ()
    away = part.vm is not None and left_at(part.vm) - {part.nve}
    attach = (AttachDisks(),) if away else ()
    return (*keep, *attach, *_RUN)


def _whole(part: Part) -> PartStep:
    part = msgspec.structs.replace(part, stage="whole")
    return part, _said(part)


def _own_copy(part: Part) -> tuple[Do, ...]:
    """Ends the copy that this part received, or was about to, unless it was activated.

    And its checkpoints: the old host may not have heard that nobody wants them any more (R-11).
    """
    if part.version:
        return ()
    refuse: tuple[Do, ...] = (RefuseCheckpoints(),) if part.keep_uri else ()
    return (StopCopy() if part.uri else DropStale(), *refuse)


def _steered(part: Part) -> Say:
    return Say(report=Steered(move=part.move, nve=part.nve, at_ns=part.steered_ns))


def _said(part: Part) -> tuple[Do, ...]:
    """The reports that `part` stands for; the coordinator may hear them any number of times.

    A failure is said alone: what came before it would let the coordinator commit.
    """
    move, nve = part.move, part.nve
    steered = (_steered(part),) if part.steered_ns else ()
    match part.stage:
        case "awaiting" | "whole" if part.failure is not None:
            return failure_of(part)
        case "awaiting":
            prepared = Prepared(
                move=move, nve=nve, uri=part.uri, keep_uri=part.keep_uri, disks_uri=part.disks_uri
            )
            return (Say(report=prepared), *steered)
        case "whole":
            received = Say(report=Received(move=move, nve=nve, at_ns=part.received_ns))
            return (received, *steered)
        case "active" if part.failure is not None and not part.resumed_ns:
            return (Say(report=Crashed(move=move, nve=nve, why=part.failure[1])),)
        case "active":
            ran = Running(move=move, nve=nve, at_ns=part.resumed_ns, held=part.held)
            return (Say(report=ran),)
        case "returned":
            return (Say(report=GivenBack(move=move, nve=nve)),)
        case "returning" | "closing":
            return ()
        case _:
            return failure_of(part)


def _resumed(part: Part) -> PartStep:
    """Take back what only the daemon held: readers of queues, sockets that answer."""
    steer = (_STEER,) if part.steered_ns else ()
    again = (*_AGAIN, *steer)
    match part.stage:
        case "arming":
            return failed(part, "prepare", RESTARTED)
        case "awaiting":
            return part, (*again, AwaitCopy())
        case "whole" | "active":
            return part, (*again, *_said(part))
        case "activating":
            # First of all the VM: perhaps nobody is left to answer a marker.
            return part, (*_AGAIN, *_run(part), *steer)
        case "returning":
            return part, (*_own_copy(part), *_GIVE_BACK)
        case "closing":
            back = () if part.version else _GIVE_BACK
            return part, (*_own_copy(part), *back, CleanUp(keep=part.keep))
        case _:
            return part, _said(part)
