"""The machine of an NVE whose tenants talk to the moved VM.

    arming -> armed --Steer--> active --Close--> closing -> closed

It never learns of a commit here: the committed mapping comes by the NVA's push like any other, and
that push, acknowledged, is what ends the tunnel. Steering early only spares the detour.
"""

from __future__ import annotations

from overland.mobility.messages import (
    ArmPeers,
    Broken,
    CleanUp,
    Close,
    Closed,
    Done,
    Failed,
    NveEvent,
    Prepared,
    ProvePath,
    Say,
    Steer,
    Steered,
    SteerHere,
)
from overland.mobility.nve import Part, PartStep, to


def begin(part: Part) -> PartStep:
    """Pre-place the mapping and prove that a frame gets to the new NVE."""
    return to(part, "arming", ArmPeers(), ProvePath(to="new"))


def step(part: Part, event: NveEvent) -> PartStep:
    """Return the next part and the effects wanted; an event out of place changes nothing."""
    match part.stage, event:
        case "arming", Done(effect="ProvePath"):
            return to(part, "armed", Say(report=Prepared(move=part.move, nve=part.nve)))
        case "armed" | "active", Steer(back=back):
            return to(part, "active", SteerHere(back=back, local=False))
        case "active", Done(effect="SteerHere", number=at_ns):
            return part, (Say(report=Steered(move=part.move, nve=part.nve, at_ns=at_ns)),)
        case _, Broken(effect="SteerHere", why=why):
            return part, (Say(report=Failed(move=part.move, nve=part.nve, step="steer", why=why)),)
        case "arming", Broken(effect=effect, why=why):
            return part, (Say(report=Failed(move=part.move, nve=part.nve, step=effect, why=why)),)
        case "arming" | "armed" | "active", Close():
            return to(part, "closing", CleanUp())
        case "closing", Done(effect="CleanUp", packets=packets):
            closed = Closed(move=part.move, nve=part.nve, packets=packets)
            return to(part, "closed", Say(report=closed))
        case _:
            return part, ()
