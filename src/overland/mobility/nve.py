"""What the three NVE machines share: their record and how it changes. Pure."""

from __future__ import annotations

from typing import Literal

import msgspec

from overland.mobility.messages import Do, Failed, NveEvent, Say
from overland.model.cluster import Record, Vm
from overland.model.handover import Memory, MovingPort, Options, Storage, Transfer

Stage = Literal[
    "arming",
    "armed",
    "checkpointing",
    "resting",
    "mirroring",
    "sending",
    "stopping",
    "stopped",
    "awaiting",
    "whole",
    "activating",
    "active",
    "returning",
    "returned",
    "closing",
    "closed",
]


class Part(Record, frozen=True, kw_only=True):
    """One NVE's part in one move. `nve` is its own name, `other` the NVE at the tunnel's far end.

    `failure`: the step that failed and why, said until the coordinator turns the move back.
    `disks_uri` is empty where no disk goes along.
    Instants are CLOCK_REALTIME ns, 0 while they have not come. `pace`: of the memory stream,
    bytes/s, 0 for no limit. `drained`: the VM took all that its ring had. `flowing`: what waited
    goes on into the tunnel, and all that comes. `turned`: the last Steer said back. `checkpoints`:
    how many were taken. `keep`: the newest of them outlives the move.
    The shell keeps it on disk, so that a restarted daemon goes on from here.
    """

    move: str
    nve: str
    role: Literal["old", "new", "peer"]
    vm: Vm | None
    ports: tuple[MovingPort, ...]
    options: Options = Options()
    stage: Stage = "arming"
    uri: str = ""
    keep_uri: str = ""
    checkpoints: int = 0
    keep: bool = False
    disks_uri: str = ""
    pace: int = 0
    held_ns: int = 0
    stop_ns: int = 0
    drained: bool = False
    flowing: bool = False
    rescued: int = 0
    received_ns: int = 0
    steered_ns: int = 0
    turned: bool = False
    resumed_ns: int = 0
    held: int = 0
    retired: bool = False
    version: int = 0
    failure: tuple[str, str] | None = None
    memory: Memory = Memory()
    storage: Storage = Storage()


PartStep = tuple[Part, tuple[Do, ...]]
__all__ = [
    "RESTARTED",
    "NveEvent",
    "Part",
    "PartStep",
    "Stage",
    "failed",
    "failure_of",
    "memory_of",
    "to",
]


RESTARTED = "its NVE was restarted"


def to(part: Part, stage: Stage, *effects: Do) -> PartStep:
    """Enter `stage` and want `effects`, in this order."""
    return msgspec.structs.replace(part, stage=stage), effects


def failed(part: Part, step: str, why: str) -> PartStep:
    """Tell the coordinator that `step` failed, now and whenever its connection is back."""
    part = msgspec.structs.replace(part, failure=(step, why))
    return part, failure_of(part)


def failure_of(part: Part) -> tuple[Do, ...]:
    """The report of a failure that stands."""
    if part.failure is None:
        return ()
    step, why = part.failure
    return (Say(report=Failed(move=part.move, nve=part.nve, step=step, why=why)),)


def memory_of(transfer: Transfer) -> Memory:
    """The part of a transfer that people see."""
    return Memory(
        total_bytes=transfer.total_bytes,
        sent_bytes=transfer.sent_bytes,
        resent_bytes=transfer.resent_bytes,
        remaining_bytes=transfer.remaining_bytes,
        rounds=transfer.passes,
        bandwidth_bytes_per_s=transfer.bandwidth_bytes_per_s,
        dirty_bytes_per_s=transfer.dirty_bytes_per_s,
    )
