"""The machine of an NVE whose tenants talk to the moved VM.

    arming -> armed --Steer--> active --Close--> closing -> closed

It never learns of a commit here: the committed mapping comes by the NVA's push like any other, and
that push, acknowledged, is what ends the tunnel. But before it may take effect the part must have
turned, in order, behind its marker (HO-28): who has not been told to by then is `behind`.
"""

from __future__ import annotations

import msgspec

from overland.mobility.messages import (
    ArmPeers,
    Broken,
    CleanUp,
    Close,
    Closed,
    Do,
    Done,
    Forget,
    NveEvent,
    Prepared,
    ProvePath,
    Reconnected,
    Resumed,
    Say,
    Steer,
    Steered,
    SteerHere,
)
from overland.mobility.nve import Part, PartStep, failed, failure_of, to


def begin(part: Part) -> PartStep:
    """Pre-place the mapping and prove that a frame gets to the new NVE."""
    return to(part, "arming", Forget(), ArmPeers(), ProvePath(to="new"))


def behind(part: Part) -> bool:
    """Tell whether a committed mapping must wait for this part's turn to the new NVE."""
    turning = part.stage in ("arming", "armed", "active")
    return part.role == "peer" and turning and not part.steered_ns and part.failure is None


def step(part: Part, event: NveEvent) -> PartStep:  # noqa: C901 - one row per transition
    """Return the next part and the effects wanted; an event out of place changes nothing."""
    match part.stage, event:
        case "arming", Done(effect="ProvePath"):
            part = msgspec.structs.replace(part, stage="armed")
            return part, _said(part)
        case "arming", Done():
            return part, ()  # the next effect follows by itself
        case "armed" | "active", Steer(back=back):
            part = msgspec.structs.replace(part, turned=back, steered_ns=0, failure=None)
            return to(part, "active", SteerHere(back=back, local=False))
        case "active", Broken(effect="SteerHere", back=back) if back != part.turned:
            # The turn that was ordered since stood behind it, and went with it.
            return part, (SteerHere(back=part.turned, local=False),)
        case "active", Broken(effect="ArmPeers", why=why):
            return failed(part, "steer", why)
        case "active", Done(effect="SteerHere", number=at_ns, back=back) if back == part.turned:
            part = msgspec.structs.replace(part, steered_ns=at_ns)
            return part, _said(part)
        case "closing", Broken(effect=effect) if effect != "CleanUp":
            return part, (CleanUp(),)
        case "closing", Broken():
            # What could not be removed is swept when the daemon starts again.
            return to(part, "closed", Say(report=Closed(move=part.move, nve=part.nve)))
        case "active", Broken(effect="SteerHere", why=why):
            # It has turned all the same; only the proof of order is missing.
            return failed(part, "steer", why)
        case "arming", Broken(effect=effect, why=why):
            return failed(part, effect, why)
        case "arming" | "armed" | "active", Close():
            return to(part, "closing", CleanUp())
        case "closing", Done(effect="CleanUp", packets=packets):
            closed = Closed(move=part.move, nve=part.nve, packets=packets)
            return to(part, "closed", Say(report=closed))
        case _, Reconnected():
            return part, _said(part)
        case _, Resumed():
            return _resumed(part)
        case _:
            return part, ()


def _said(part: Part) -> tuple[Do, ...]:
    """The report that `part` stands for; the coordinator may hear it any number of times."""
    match part.stage:
        case "armed":
            return (Say(report=Prepared(move=part.move, nve=part.nve)),)
        case "active" if part.steered_ns:
            steered = Steered(move=part.move, nve=part.nve, at_ns=part.steered_ns)
            return (Say(report=steered),)
        case "arming" | "active":
            return failure_of(part)
        case _:
            return ()


def _resumed(part: Part) -> PartStep:
    """Take back what only the daemon held: the queue's reader, the socket that answers."""
    match part.stage:
        case "arming":
            return begin(part)
        case "armed":
            return part, (ArmPeers(), *_said(part))
        case "active":
            return part, (ArmPeers(), SteerHere(back=part.turned, local=False))
        case "closing":
            return part, (CleanUp(),)
        case _:
            return part, ()
