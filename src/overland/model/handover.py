"""The record of one move: what was asked, how far it is, what happened when.

The NVA's coordinator is its only writer. It is journalled before each effect, so it is also all
that a restarted NVA needs to go on (spec/handover.md).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from overland.model.cluster import Family, Record, Vm

Phase = Literal[
    "planned",
    "staged",
    "precopy",
    "paused",
    "equal",
    "committed",
    "running",
    "converging",
    "drained",
    "closed",
    "aborting",
    "aborted",
]

FORWARD: tuple[Phase, ...] = (
    "planned",
    "staged",
    "precopy",
    "paused",
    "equal",
    "committed",
    "running",
    "converging",
    "drained",
    "closed",
)
"""The one order of a move that succeeds (R-45)."""

ENDED: frozenset[Phase] = frozenset({"closed", "aborted"})

LEGAL: dict[Phase, frozenset[Phase]] = {
    "planned": frozenset({"staged", "aborting"}),
    "staged": frozenset({"precopy", "aborting"}),
    "precopy": frozenset({"paused", "aborting"}),
    "paused": frozenset({"equal", "aborting"}),
    "equal": frozenset({"committed", "aborting"}),
    "committed": frozenset({"running"}),
    "running": frozenset({"converging"}),
    "converging": frozenset({"drained"}),
    "drained": frozenset({"closed"}),
    "closed": frozenset(),
    "aborting": frozenset({"aborted"}),
    "aborted": frozenset(),
}
"""Legal transitions (R-45, R-46). After `committed` there is no way back."""

PacketAction = Literal["deliver", "hold", "redirect", "drop"]

OLD_NVE_ACTION: dict[Phase, PacketAction] = {
    "planned": "deliver",
    "staged": "deliver",
    "precopy": "deliver",
    "paused": "redirect",
    "equal": "redirect",
    "committed": "redirect",
    "running": "redirect",
    "converging": "redirect",
    "drained": "redirect",
    "closed": "drop",
    "aborting": "hold",
    "aborted": "deliver",
}
"""What the old NVE does with a frame for the moved VM in a hot move: one table (R-35, 6-3).

`redirect` begins with a hold until what the old tap still had has gone ahead, so that order is
kept. `drop` is counted. In an L2 VN the NVE never sends ICMP, in any phase (R-36).
"""


_COMMITTED = frozenset(FORWARD[FORWARD.index("committed") :])


def committed(phase: Phase) -> bool:
    """Tell whether the point of no return has been passed: from here a move only goes forward."""
    return phase in _COMMITTED


class MovingPort(Record, frozen=True, kw_only=True):
    """One interface (TSI) of the moved VM, with all that each NVE needs to know of it.

    `port` is the tap's name, the same on both hosts; `device` the VN's VXLAN device. Addresses
    `old` and `new` are underlay addresses. `tunnel` is the handover tunnel's identifier.
    """

    network: str
    vni: int
    device: str
    port: str
    mac: str
    ipv4: str | None = None
    ipv6: str | None = None
    underlay: Family
    mtu: int
    old: str
    new: str
    tunnel: int


DiskChoice = Literal["declared", "shared", "moved", "left"]
"""What a move does with the VM's disks: as each is declared, or all of them the same."""


class Options(Record, frozen=True, kw_only=True):
    """What the operator may set for one move."""

    max_downtime_ms: float = 300.0
    bandwidth_bytes_per_s: int | None = None
    timeout_s: float = 300.0
    timeout_action: Literal["abort", "pause"] = "abort"
    verify: bool = False
    drain_guard_ms: float = 2.0
    storage: DiskChoice = "declared"


class PhaseAt(Record, frozen=True, kw_only=True):
    """`at_ns` is CLOCK_REALTIME at the NVA when `phase` was entered."""

    phase: Phase
    at_ns: int


class Acknowledgement(Record, frozen=True, kw_only=True):
    """A subscriber has the committed mapping in its kernel since `at_ns`."""

    nve: str
    at_ns: int


class Packets(Record, frozen=True, kw_only=True):
    """Frames by what happened to them. `late`: redirected after the commit (R-16)."""

    held: int = 0
    rescued: int = 0
    redirected: int = 0
    late: int = 0
    dropped: dict[str, int] = msgspec.field(default_factory=dict)
    last_redirected_ns: int = 0
    first_direct_ns: int = 0


class Memory(Record, frozen=True, kw_only=True):
    """Bytes of memory sent in all, those sent again, and the rounds over it."""

    total_bytes: int = 0
    sent_bytes: int = 0
    resent_bytes: int = 0
    remaining_bytes: int = 0
    rounds: int = 0
    bandwidth_bytes_per_s: float = 0.0
    dirty_bytes_per_s: float = 0.0


class Storage(Record, frozen=True, kw_only=True):
    """Bytes of the disks that go along: in all, copied so far, and those copied again.

    `ready`: old and new are the same and stay so, because each write goes to both.
    """

    total_bytes: int = 0
    sent_bytes: int = 0
    resent_bytes: int = 0
    ready: bool = False


class Transfer(Record, frozen=True, kw_only=True):
    """Progress of a running memory transfer. `passes` counts the rounds over memory.

    `countdown_bytes`: not 0 where the hypervisor stops the VM by itself at the end of the first
    round; then the last so many bytes of memory take as long as the pace says. `waiting`: the VM
    has been stopped, and the rest is sent once its disks are done.
    """

    status: Literal["setup", "active", "waiting", "completed", "failed", "cancelled"]
    total_bytes: int = 0
    sent_bytes: int = 0
    remaining_bytes: int = 0
    resent_bytes: int = 0
    passes: int = 0
    bandwidth_bytes_per_s: float = 0.0
    dirty_bytes_per_s: float = 0.0
    countdown_bytes: int = 0
    error: str = ""


class Handover(Record, frozen=True, kw_only=True):
    """One move of one VM. Instants are CLOCK_REALTIME ns, 0 while they have not come.

    `held_ns`: the old VM stopped receiving (gate closed). `stop_ns`, `resume_ns`: QEMU's events.
    `equal_ns`: the new copy is whole, both are stopped (R-09). `waiting` names the NVEs whose
    answer the present phase needs. `restored`: an abort has the VM back at the old host. `closing`:
    everybody was told to clean up. `deadline_s` is compared with Tick.
    """

    id: str
    vm: Vm
    mode: Literal["hot", "cold"] = "hot"
    old_nve: str
    new_nve: str
    peers: tuple[str, ...] = ()
    ports: tuple[MovingPort, ...]
    options: Options = Options()
    phase: Phase = "planned"
    phases: tuple[PhaseAt, ...] = ()
    version: int
    waiting: frozenset[str] = frozenset()
    uri: str = ""
    disks_uri: str = ""
    held_ns: int = 0
    stop_ns: int = 0
    equal_ns: int = 0
    commit_ns: int = 0
    resume_ns: int = 0
    closed_ns: int = 0
    steered: tuple[Acknowledgement, ...] = ()
    acknowledged: tuple[Acknowledgement, ...] = ()
    fenced: tuple[str, ...] = ()
    restored: bool = False
    closing: bool = False
    deadline_s: float = 0.0
    outcome: Literal["open", "moved", "aborted", "unknown"] = "open"
    reason: str | None = None
    close_reason: str | None = None
    memory: Memory = Memory()
    storage: Storage = Storage()
    packets: Packets = Packets()
    digest_old: str = ""
    digest_new: str = ""
