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
    AwaitCopy,
    Broken,
    CleanUp,
    Close,
    Closed,
    Digest,
    Digested,
    Done,
    Failed,
    GiveBack,
    GivenBack,
    HoldPorts,
    MakeTunnel,
    NveEvent,
    OpenPorts,
    Prepared,
    QuietPorts,
    ReceiveCopy,
    Received,
    ReleaseInto,
    ResumeVm,
    Running,
    Say,
    Steer,
    Steered,
    SteerHere,
    StopCopy,
    TakeDigest,
    Unmute,
)
from overland.mobility.nve import Part, PartStep, to


def begin(part: Part) -> PartStep:
    """Make the place: port, tunnel, gates, and an empty paused copy."""
    return to(
        part,
        "arming",
        ArmPorts(),
        QuietPorts(),
        MakeTunnel(to="old"),
        ArmPeers(),
        ReceiveCopy(),
        OpenPorts(),
    )


def step(part: Part, event: NveEvent) -> PartStep:  # noqa: C901 - one row per transition
    """Return the next part and the effects wanted; an event out of place changes nothing."""
    match part.stage, event:
        case "arming", Done(effect="ReceiveCopy", text=uri):
            return msgspec.structs.replace(part, uri=uri), ()
        case "arming", Done(effect="OpenPorts"):
            said = Prepared(move=part.move, nve=part.nve, uri=part.uri)
            return to(part, "awaiting", Say(report=said), AwaitCopy())
        case "awaiting", Done(effect="AwaitCopy", number=at_ns):
            whole = Received(move=part.move, nve=part.nve, at_ns=at_ns)
            return to(part, "whole", Say(report=whole))
        case "awaiting" | "whole", Steer(back=False):
            return part, (SteerHere(back=False, local=True),)
        case _, Done(effect="SteerHere", number=at_ns):
            return part, (Say(report=Steered(move=part.move, nve=part.nve, at_ns=at_ns)),)
        case "whole", Digest():
            return part, (TakeDigest(),)
        case "whole", Done(effect="TakeDigest", text=sha256):
            return part, (Say(report=Digested(move=part.move, nve=part.nve, sha256=sha256)),)
        case "whole", Activate(version=version):
            part = msgspec.structs.replace(part, version=version)
            return to(part, "activating", Unmute(), ResumeVm(), Announce())
        case "activating", Done(effect="ResumeVm", number=at_ns, packets=packets):
            ran = Running(move=part.move, nve=part.nve, at_ns=at_ns, held=packets.held)
            return to(part, "active", Say(report=ran))
        case "active" | "returned", Close():
            return to(part, "closing", CleanUp())
        case "closing", Done(effect="CleanUp", packets=packets):
            closed = Closed(move=part.move, nve=part.nve, packets=packets)
            return to(part, "closed", Say(report=closed))
        case "arming" | "awaiting" | "whole", GiveBack():
            return to(part, "returning", StopCopy(), HoldPorts(), ReleaseInto(tunnel=True))
        case "returning", Done(effect="ReleaseInto") | Broken(effect="ReleaseInto"):
            return to(part, "returned", Say(report=GivenBack(move=part.move, nve=part.nve)))
        case "returned", GiveBack():
            return part, (Say(report=GivenBack(move=part.move, nve=part.nve)),)
        case _, Broken(effect="SteerHere", why=why):
            return part, (Say(report=Failed(move=part.move, nve=part.nve, step="steer", why=why)),)
        case "arming" | "awaiting" | "whole" | "activating", Broken(effect=effect, why=why):
            return part, (Say(report=Failed(move=part.move, nve=part.nve, step=effect, why=why)),)
        case _:
            return part, ()
