"""Parts in every stage of the three NVE machines, and the events that an NVE machine may see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import msgspec

from overland.mobility import messages as m
from overland.mobility.nve import Part, PartStep, Stage
from overland.model.handover import Options, Storage, Transfer
from tests.core.conversation import MACHINES
from tests.core.moves import CHECKPOINT, LEAVING, NEW, OLD, PEER, PORT, VM, WITH_DISK

Role = Literal["old", "new", "peer"]
NAMES: dict[Role, str] = {"old": OLD, "new": NEW, "peer": PEER}

GOING_ON = m.TransferSeen(transfer=Transfer(status="active", passes=1))
CONVERGED = m.TransferSeen(transfer=Transfer(status="active", passes=2, bandwidth_bytes_per_s=1e9))
TORN = m.TransferSeen(transfer=Transfer(status="failed", error="torn"))

SEEN = m.CheckpointSeen(checkpoint=CHECKPOINT)
COPYING = m.MirrorSeen(storage=Storage(total_bytes=100, sent_bytes=50))
COPIED = m.MirrorSeen(storage=Storage(total_bytes=100, sent_bytes=100, ready=True))

SEND = m.Send(move="m1", uri="tcp:x:1", keep_uri="checkpoint:x|1|00")
SEND_DISKS = m.Send(move="m1", uri="tcp:x:1", disks_uri="nbd://x:2")
STEER = m.Steer(move="m1")
BACK = m.Steer(move="m1", back=True)
ACTIVATE = m.Activate(move="m1", version=2)
RETIRE = m.Retire(move="m1", version=2)
GIVE_BACK = m.GiveBack(move="m1")
RESTORE = m.Restore(move="m1")
CLOSE = m.Close(move="m1")
CLOSE_AND_KEEP = m.Close(move="m1", keep=True)

ORDERS: dict[str, m.AnyOrder] = {
    "PrepareNew": m.PrepareNew(move="m1", vm=VM, version=1, ports=(PORT,)),
    "PrepareOld": m.PrepareOld(move="m1", vm=VM, version=1, ports=(PORT,), options=Options()),
    "PreparePeer": m.PreparePeer(move="m1", version=1, ports=(PORT,)),
    "Send": SEND,
    "Send with disks": SEND_DISKS,
    "Force": m.Force(move="m1"),
    "Steer": STEER,
    "Steer back": BACK,
    "Digest": m.Digest(move="m1"),
    "Activate": ACTIVATE,
    "Retire": RETIRE,
    "GiveBack": GIVE_BACK,
    "Restore": RESTORE,
    "Close": CLOSE,
    "Close and keep": CLOSE_AND_KEEP,
}

EFFECTS: dict[Role, tuple[str, ...]] = {
    "old": (
        *("Forget", "MakeTunnel", "ArmPorts", "ProvePath", "BeginSend", "WatchTransfer", "Pace"),
        *("TakeCheckpoint", "AwaitInterval"),
        *("HoldPorts", "AwaitDrained", "FinishSend", "ReleaseInto", "AwaitStop", "TakeDigest"),
        *("MuteBroadcast", "CancelSend", "SteerHere", "ResumeVm", "CleanUp", "StopCopy"),
        *("BeginMirror", "WatchMirror", "EndMirror", "SendRest", "RemoveDisks"),
    ),
    "new": (
        *("DropStale", "Forget", "ArmPorts", "QuietPorts", "MakeTunnel", "ArmPeers"),
        *("KeepCheckpoints", "RefuseCheckpoints"),
        *("ReceiveCopy", "OpenPorts", "AwaitCopy", "SteerHere", "TakeDigest", "Unmute"),
        *("ResumeVm", "Announce", "HoldPorts", "ReleaseInto", "CleanUp", "StopCopy"),
        *("OfferDisks", "WithdrawDisks", "KeepDisks", "AttachDisks"),
    ),
    "peer": ("Forget", "ArmPeers", "ProvePath", "SteerHere", "CleanUp"),
}
"""What each role wants done, reports apart."""


def done(effect: str, number: int = 25) -> m.Done:
    return m.Done(effect=effect, number=number, text="tcp:x:1")


def every_event(role: Role) -> dict[str, m.NveEvent]:
    """One event of each kind by its name, and one Done and one Broken for each effect of `role`."""
    events: dict[str, m.NveEvent] = {**ORDERS}
    events |= {"TransferSeen going on": GOING_ON, "TransferSeen converged": CONVERGED}
    events |= {"TransferSeen failed": TORN}
    events["CheckpointSeen"] = SEEN
    events |= {"MirrorSeen going on": COPYING, "MirrorSeen ready": COPIED}
    for effect in EFFECTS[role]:
        # Another result than on the way here, so that a result that is written again is seen.
        events[f"Done: {effect}"] = done(effect, 26)
    if role == "old":
        events["Done: AwaitDrained in vain"] = done("AwaitDrained", 0)
    for effect in (*EFFECTS[role], *(() if role == "peer" else ("vm",))):
        events[f"Broken: {effect}"] = m.Broken(effect=effect, why="injected")
    if role == "peer":
        events["Done: SteerHere back"] = msgspec.structs.replace(done("SteerHere", 26), back=True)
        events["Broken: SteerHere back"] = m.Broken(effect="SteerHere", why="injected", back=True)
    events |= {"Reconnected": m.Reconnected(), "Resumed": m.Resumed()}
    named = {type(event) for event in events.values()}
    assert named == set(get_args(m.NveEvent)), "a kind of event is missing here"
    return events


@dataclass(frozen=True)
class Underway:
    """A part and, in order, the effects that it wanted and that are not done yet."""

    part: Part
    effects: tuple[m.Do, ...]

    def hears(self, *events: m.NveEvent) -> Underway:
        """Take events as an NVE does: a failure, and an order that turns, void what waits."""
        now = self
        for event in events:
            now = now._hears(event)
        return now

    def _hears(self, event: m.NveEvent) -> Underway:
        part, wanted = step(self.part, event)
        turns = isinstance(event, m.GiveBack | m.Restore | m.Close | m.Resumed)
        void = isinstance(event, m.Broken) or (turns and part.stage != self.part.stage)
        pending = () if void else self.effects
        if isinstance(event, m.CheckpointSeen):
            pending = tuple(each for each in pending if not isinstance(each, m.TakeCheckpoint))
        return Underway(part, pending + _unsaid(wanted))

    def restarted(self) -> Underway:
        """The daemon comes back: it has its part, and has forgotten what was under way."""
        return Underway(self.part, ()).hears(m.Resumed())

    def does(self, *names: str) -> Underway:
        """The next effects are done: these."""
        now = self
        for name in names:
            result = done(name)
            now = now.finds(msgspec.structs.replace(result, back=now.turns_back()))
        return now

    def turns_back(self) -> bool:
        """Tell whether the next effect is a turn back."""
        first = self.effects[0] if self.effects else None
        return isinstance(first, m.SteerHere) and first.back

    def finds(self, result: m.Done) -> Underway:
        """The next effect is done, with this result."""
        first, *rest = self.effects
        assert type(first).__name__ == result.effect
        return Underway(self.part, tuple(rest)).hears(result)

    def waits_for(self, effect: str) -> bool:
        """Tell whether an effect of that name is under way."""
        return effect in {type(each).__name__ for each in self.effects}

    def until(self, stage: Stage, broken: str = "") -> Underway:
        """Effects are done until the part is in `stage`; the one named `broken` fails."""
        now = self
        while now.part.stage != stage:
            assert now.effects, f"{now.part.stage} is left with nothing to do"
            name = type(now.effects[0]).__name__
            now = (
                now.hears(m.Broken(effect=name, why="injected", back=now.turns_back()))
                if name == broken
                else now.does(name)
            )
        return now


def step(part: Part, event: m.NveEvent) -> PartStep:
    """What the machine of the part's role answers."""
    taken: PartStep = MACHINES[part.role].step(part, event)
    return taken


def _unsaid(effects: tuple[m.Do, ...]) -> tuple[m.Do, ...]:
    watches = m.Say | m.WatchTransfer | m.WatchMirror
    return tuple(effect for effect in effects if not isinstance(effect, watches))


def begun(role: Role, checkpoints: int = 0, *, disks: bool = False, left: bool = False) -> Underway:
    """The part as its NVE begins it; with `disks` one goes along, with `left` one stays."""
    vm = None if role == "peer" else WITH_DISK if disks else LEAVING if left else VM
    # With a limit of the operator's, so that the old NVE has a pace to change.
    options = Options(bandwidth_bytes_per_s=1 << 30, checkpoints=checkpoints)
    part = Part(move="m1", nve=NAMES[role], role=role, vm=vm, ports=(PORT,), options=options)
    part, effects = MACHINES[role].begin(part)
    return Underway(part, _unsaid(effects))


def old_ways() -> dict[str, Underway]:
    """The old NVE by column. `ring left`: the VM did not empty its ring, and stands. `disks`: some
    go along."""
    armed = begun("old").until("armed")
    checkpointing = begun("old", checkpoints=2).until("armed").hears(SEND)
    sending = armed.hears(SEND)
    stopping = sending.does("BeginSend").hears(CONVERGED)
    flowing = stopping.does("HoldPorts", "AwaitDrained", "FinishSend", "ReleaseInto")
    ring_left = stopping.does("HoldPorts").finds(done("AwaitDrained", 0))
    ring_left = ring_left.does("FinishSend", "AwaitStop")
    stopped = flowing.until("stopped")
    retired = stopped.hears(RETIRE)
    returning = stopped.hears(RESTORE)
    closing = returning.until("returned").hears(CLOSE)
    mirroring = begun("old", disks=True).until("armed").hears(SEND_DISKS)
    sending_too = mirroring.does("BeginMirror").hears(COPIED)
    stopping_too = sending_too.does("BeginSend").hears(CONVERGED)
    return {
        "arming": begun("old"),
        "armed": armed,
        "checkpointing": checkpointing,
        "resting": checkpointing.hears(SEEN),
        "mirroring, disks": mirroring,
        "sending": sending,
        "sending, disks": sending_too,
        "stopping": stopping,
        "stopping, flowing": flowing,
        "stopping, ring left": ring_left,
        "stopping, disks": stopping_too,
        "stopped": stopped,
        "stopped, retired": retired,
        "stopped, retired, disks": stopping_too.until("stopped").hears(RETIRE),
        "returning": returning,
        "returned": returning.until("returned"),
        "closing": closing,
        "closing, retired": retired.hears(CLOSE),
        "closed": closing.until("closed"),
    }


def new_ways() -> dict[str, Underway]:
    """The new NVE by column. `failed`: its VM died before the commit; `crashed`: after it. `disks`:
    some come along. `left`: some stay elsewhere."""
    awaiting = begun("new").until("awaiting")
    steered = awaiting.hears(STEER)
    whole = steered.until("whole").does("SteerHere")
    activating = whole.hears(ACTIVATE)
    returning = whole.hears(GIVE_BACK)
    warm = begun("new", checkpoints=2).until("awaiting")
    died = m.Broken(effect="vm", why="died")
    awaiting_too = begun("new", disks=True).until("awaiting")
    whole_too = awaiting_too.hears(STEER).until("whole")
    leaving = begun("new", left=True).until("awaiting").hears(STEER).until("whole")
    return {
        "arming": begun("new"),
        "arming, disks": begun("new", disks=True),
        "awaiting": awaiting,
        "awaiting, warm": warm,
        "awaiting, disks": awaiting_too,
        "whole": whole,
        "whole, disks": whole_too,
        "whole, failed": whole.hears(died),
        "activating": activating,
        "activating, disks": whole_too.hears(ACTIVATE),
        "activating, left": leaving.hears(ACTIVATE),
        "active": activating.until("active"),
        "active, crashed": activating.hears(died),
        "returning": returning,
        "returned": returning.until("returned"),
        "closing": awaiting.hears(CLOSE),
        "closing, keeping": warm.hears(GIVE_BACK).until("returned").hears(CLOSE_AND_KEEP),
        "closing, activated": activating.until("active").hears(CLOSE),
        "closed": awaiting.hears(CLOSE).until("closed"),
    }


def peer_ways() -> dict[str, Underway]:
    """The peer NVE by column. `steered`: its frames go to the new NVE."""
    armed = begun("peer").until("armed")
    steering = armed.hears(STEER)
    closing = steering.does("SteerHere").hears(CLOSE)
    return {
        "arming": begun("peer"),
        "armed": armed,
        "active": steering,
        "active, steered": steering.does("SteerHere"),
        "active, turned back": steering.hears(BACK),
        "closing": closing,
        "closed": closing.until("closed"),
    }


WAYS: dict[Role, dict[str, Underway]] = {
    "old": old_ways(),
    "new": new_ways(),
    "peer": peer_ways(),
}
"""A part in every stage, reached by real steps. After the comma: what else matters there."""
