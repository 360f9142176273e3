"""Records and events from which the tests of the handover machines are made."""

from __future__ import annotations

from typing import get_args

import msgspec

from overland.mobility import messages as m
from overland.mobility.coordinator import step
from overland.model.cluster import Disk, Interface, Vm
from overland.model.handover import (
    Checkpoint,
    Handover,
    Memory,
    MovingPort,
    Options,
    Phase,
    PhaseAt,
)

OLD, NEW, PEER = "h1", "h2", "h3"

PORT = MovingPort(
    network="blue",
    vni=42,
    device="ovx42",
    port="ovt1",
    mac="02:00:00:00:00:01",
    ipv4="10.0.0.5",
    underlay="ipv4",
    mtu=1500,
    old="192.0.2.1",
    new="192.0.2.2",
    tunnel=7,
)

VM = Vm(
    name="web",
    host=OLD,
    state="running",
    interfaces=(Interface(network="blue", mac=PORT.mac, ipv4=PORT.ipv4),),
)

WITH_DISK = msgspec.structs.replace(VM, disks=(Disk(path="data", kind="moved", size_bytes=100),))
"""The same with a disk that goes along."""


LEAVING = msgspec.structs.replace(
    VM, disks=(Disk(path="data", kind="left", size_bytes=100, at=OLD, uri="nbd://192.0.2.1:10809"),)
)
"""The same with one that stays at the old host."""


def planned(vm: Vm = VM) -> Handover:
    """A move as the authority journals it first."""
    return Handover(
        id="m1",
        vm=vm,
        old_nve=OLD,
        new_nve=NEW,
        peers=(PEER,),
        ports=(PORT,),
        version=1,
        phases=(PhaseAt(phase="planned", at_ns=1),),
    )


CHECKPOINT = Checkpoint(at_ns=5, kept_ns=8, sent_bytes=100, pause_ms=2.0)


def warm() -> Handover:
    """A warm move of two checkpoints, as the authority journals it first."""
    return msgspec.structs.replace(planned(), mode="warm", options=Options(checkpoints=2))


_TO_PHASE: dict[Phase, tuple[m.CoordinatorEvent, ...]] = {
    "planned": (m.Start(),),
    "precopy": (
        m.Prepared(move="m1", nve=NEW, uri="tcp:x:1"),
        m.Prepared(move="m1", nve=OLD),
        m.Prepared(move="m1", nve=PEER),
    ),
    "paused": (m.Stopped(move="m1", nve=OLD, held_ns=10, stop_ns=20, memory=Memory()),),
    "equal": (
        m.Steered(move="m1", nve=NEW, at_ns=25),
        m.Received(move="m1", nve=NEW, at_ns=30),
    ),
    "committed": (m.Committed(version=2, at_ns=40),),
    "converging": (m.Running(move="m1", nve=NEW, at_ns=50, held=3),),
    "drained": tuple(m.Acknowledged(nve=nve, at_ns=60) for nve in (OLD, NEW, PEER)),
}


def in_phase(phase: Phase) -> Handover:
    """The record of a move that has come to `phase` the straight way."""
    record = planned()
    if phase == "aborting":
        record, _ = step(in_phase("paused"), m.Abort(why="test"), 0.0, 1)
        return record
    if phase == "aborted":
        return msgspec.structs.replace(planned(), phase="aborted", outcome="aborted")
    if phase == "closed":
        return msgspec.structs.replace(in_phase("drained"), phase="closed", outcome="moved")
    for _target, events in _TO_PHASE.items():
        for event in events:
            record, _ = step(record, event, 0.0, 1)
        if record.phase == phase:
            return record
    raise AssertionError(f"no straight way to {phase}")


def every_event() -> list[m.CoordinatorEvent]:
    """One event of each kind and, where it matters, from each NVE."""
    events: list[m.CoordinatorEvent] = [
        m.Start(),
        m.Prepared(move="m1", nve=OLD),
        m.Checkpointed(move="m1", nve=OLD, checkpoint=CHECKPOINT),
        m.Progress(move="m1", nve=OLD, memory=Memory(rounds=2)),
        m.Flowing(move="m1", nve=OLD, held_ns=10),
        m.Stopped(move="m1", nve=OLD, held_ns=10, stop_ns=20, memory=Memory()),
        m.Received(move="m1", nve=NEW, at_ns=30),
        m.Steered(move="m1", nve=PEER, at_ns=25),
        m.Digested(move="m1", nve=NEW, sha256="00"),
        m.Running(move="m1", nve=NEW, at_ns=50, held=3),
        m.Crashed(move="m1", nve=NEW, why="died"),
        m.GivenBack(move="m1", nve=NEW),
        m.Restored(move="m1", nve=OLD),
        m.Closed(move="m1", nve=PEER),
        m.Failed(move="m1", nve=NEW, step="vm", why="died"),
        m.Committed(version=2, at_ns=40),
        m.CommitRefused(why="version"),
        m.Acknowledged(nve=PEER, at_ns=60),
        m.Served(nve=OLD),
        m.Lost(nve=PEER),
        m.Back(nve=OLD),
        m.Abort(why="operator"),
        m.Tick(),
    ]
    named = {type(event) for event in events}
    assert named == set(get_args(m.CoordinatorEvent)), "a kind of event is missing here"
    return events
