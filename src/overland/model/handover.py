"""The record of one move: what was asked, how far it is, what happened when.

The NVA's coordinator is its only writer. It is journalled before each effect, so it is also all
that a restarted NVA needs to go on (spec/handover.md).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from overland.model.cluster import Family, Record, Vm, VmState
from overland.model.eligibility import Grounds
from overland.model.forecast import Forecast
from overland.model.readdress import NewAddresses, Readdress

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

COLD_LEGAL: dict[Phase, frozenset[Phase]] = {
    phase: frozenset({"paused", "aborting"}) if phase == "staged" else following
    for phase, following in LEGAL.items()
    if phase != "precopy"
}
"""Of a cold move: the same without `precopy`; nothing is copied while its VM runs."""

ALONE_LEGAL: dict[Phase, frozenset[Phase]] = {
    "planned": frozenset({"precopy", "aborting"}),
    "precopy": frozenset({"paused", "aborting"}),
    "paused": frozenset({"equal", "aborting"}),
    "equal": frozenset({"committed", "aborting"}),
    "committed": frozenset({"running"}),
    "running": frozenset({"drained"}),
    "drained": frozenset({"closed"}),
    "closed": frozenset(),
    "aborting": frozenset({"aborted"}),
    "aborted": frozenset(),
}
"""Of a disk that moves alone: there is nothing to stage, and no mapping to converge (R-54)."""

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


COLD_OLD_NVE_ACTION: dict[Phase, PacketAction] = {
    "planned": "deliver",
    "staged": "deliver",
    "paused": "drop",
    "equal": "drop",
    "committed": "drop",
    "running": "drop",
    "converging": "drop",
    "drained": "drop",
    "closed": "drop",
    "aborting": "drop",
    "aborted": "deliver",
}
"""The same for a cold move of a VM that is up (R-35, 6-3); one at rest has no frames.

`drop` is counted: the address is in transit. The other NVEs drop from `staged` on, at their own
ports, so nothing comes here any more when the VM stops, and nobody has to be sent on (R-33).
"""

Marking = Literal["none", "others", "all"]
"""Where the address of a VM in a cold move is in transit: nowhere, at the other NVEs, everywhere.

The old NVE is last: what they launched before they knew is still delivered to the running VM.
"""


_COMMITTED = frozenset(FORWARD[FORWARD.index("committed") :])


def committed(phase: Phase) -> bool:
    """Tell whether the point of no return has been passed: from here a move only goes forward."""
    return phase in _COMMITTED


class MovingPort(Record, frozen=True, kw_only=True):
    """One interface (TSI) of the moved VM, with all that each NVE needs to know of it.

    `port` is the tap's name, the same on both hosts; `device` the VN's VXLAN device. Addresses
    `old` and `new` are underlay addresses. `tunnel` is the handover tunnel's identifier. `routed`:
    the VN is no broadcast domain, so there is nobody to announce the interface to. `ila`: packets
    to `ipv6` are translated, in the tunnel as well. `beside`: addresses as valid as the two.
    """

    network: str
    vni: int
    device: str
    port: str
    mac: str
    ipv4: str | None = None
    ipv6: str | None = None
    beside: tuple[str, ...] = ()
    underlay: Family
    mtu: int
    old: str
    new: str
    tunnel: int
    routed: bool = False
    ila: bool = False


DiskChoice = Literal["declared", "shared", "moved", "left"]
"""What a move does with the VM's disks: as each is declared, or all of them the same."""


KEEP_OLD_S = 30.0
"""How long a VM's former addresses stay valid after a move that has changed them."""


class Options(Record, frozen=True, kw_only=True):
    """What the operator may set for one move.

    `checkpoints` of a warm move are taken, one every `interval_s`, before it goes on as hot (R-11).
    `addresses` are given to the VM in place of those that it has, which stay valid for
    `keep_old_s` after the move; no move does so unless this says it (ADR 0028).
    """

    max_downtime_ms: float = 300.0
    bandwidth_bytes_per_s: int | None = None
    timeout_s: float = 300.0
    timeout_action: Literal["abort", "pause"] = "abort"
    verify: bool = False
    drain_guard_ms: float = 2.0
    storage: DiskChoice = "declared"
    checkpoints: int = 0
    interval_s: float = 1.0
    addresses: tuple[NewAddresses, ...] = ()
    keep_old_s: float = KEEP_OLD_S

    @property
    def warm(self) -> bool:
        """Whether checkpoints are taken first."""
        return self.checkpoints > 0

    @property
    def mode(self) -> Literal["hot", "warm"]:
        """How a running VM moves with these options, unless it moves cold."""
        return "warm" if self.warm else "hot"


class PhaseAt(Record, frozen=True, kw_only=True):
    """`at_ns` is CLOCK_REALTIME at the NVA when `phase` was entered."""

    phase: Phase
    at_ns: int


class Acknowledgement(Record, frozen=True, kw_only=True):
    """A subscriber has the committed mapping in its kernel since `at_ns`."""

    nve: str
    at_ns: int


class Checkpoint(Record, frozen=True, kw_only=True):
    """The whole state of a running VM at `at_ns`, whole on the new host at `kept_ns`.

    Instants are CLOCK_REALTIME ns at the old host. `pause_ms`: how long the VM stood for it.
    """

    at_ns: int
    kept_ns: int
    sent_bytes: int
    pause_ms: float


PAUSES_KEPT = 1000
"""Of so many checkpoints, the last ones, the pauses are kept."""


class Checkpoints(Record, frozen=True, kw_only=True):
    """What a warm move has taken so far. `at_ns` is the newest one's, the point of recovery, and
    `kept_ns` when it was whole.

    `worst_age_ms`: how old the newest one ever was before the next was whole.
    """

    count: int = 0
    at_ns: int = 0
    kept_ns: int = 0
    sent_bytes: int = 0
    worst_age_ms: float = 0.0
    pauses_ms: tuple[float, ...] = ()

    def taken(self, checkpoint: Checkpoint) -> Checkpoints:
        """One more; one that was told of already changes nothing."""
        if checkpoint.at_ns <= self.at_ns:
            return self
        age_ms = (checkpoint.kept_ns - self.at_ns) / 1e6 if self.at_ns else 0.0
        return Checkpoints(
            count=self.count + 1,
            at_ns=checkpoint.at_ns,
            kept_ns=checkpoint.kept_ns,
            sent_bytes=self.sent_bytes + checkpoint.sent_bytes,
            worst_age_ms=max(self.worst_age_ms, age_ms),
            pauses_ms=(*self.pauses_ms, checkpoint.pause_ms)[-PAUSES_KEPT:],
        )


class Packets(Record, frozen=True, kw_only=True):
    """Frames by what happened to them. `late`: redirected after the commit (R-16).

    `residual`: came to the old NVE of a cold move although all others had said that they drop.
    """

    held: int = 0
    rescued: int = 0
    redirected: int = 0
    late: int = 0
    residual: int = 0
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
    """One move of one VM, or, in mode `storage`, of one of its disks alone. Instants are
    CLOCK_REALTIME ns, 0 while they have not come. `held_ns`: the old VM stopped receiving (gate
    closed). `stop_ns`, `resume_ns`: QEMU's events. `equal_ns`: the new copy is whole, both are
    stopped (R-09). `marked`: who has the address in transit in its kernel. `ends_as`: the state of
    the VM after a cold move. `waiting` names the NVEs whose answer the present phase needs.
    `served`: who has said since the commit that it offers the images that stay there to the new
    host. `forecast`: what was expected before. `grounds`: why it could begin, and who knew that.
    `restored`: an abort has the VM back at the old host. `lost`: the old host is dead, or fenced by
    hand, so nobody restores anything. `closing`: everybody was told to clean up; `unclosed`: who
    was given up before he said that he has. `readdress`: what it changes of the VM's addresses;
    None of nearly all moves. `deadline_s` is compared with Tick. `uri` takes the memory, `keep_uri`
    the checkpoints of a warm move.
    """

    id: str
    vm: Vm
    mode: Literal["hot", "warm", "cold", "storage"] = "hot"
    old_nve: str
    new_nve: str
    peers: tuple[str, ...] = ()
    ports: tuple[MovingPort, ...]
    options: Options = Options()
    forecast: Forecast | None = None
    grounds: Grounds | None = None
    readdress: Readdress | None = None
    phase: Phase = "planned"
    phases: tuple[PhaseAt, ...] = ()
    version: int
    waiting: frozenset[str] = frozenset()
    uri: str = ""
    keep_uri: str = ""
    checkpoints: Checkpoints = Checkpoints()
    disks_uri: str = ""
    held_ns: int = 0
    stop_ns: int = 0
    equal_ns: int = 0
    commit_ns: int = 0
    resume_ns: int = 0
    closed_ns: int = 0
    marked: tuple[Acknowledgement, ...] = ()
    ends_as: VmState = "running"
    served: frozenset[str] = frozenset()
    steered: tuple[Acknowledgement, ...] = ()
    acknowledged: tuple[Acknowledgement, ...] = ()
    fenced: tuple[str, ...] = ()
    restored: bool = False
    lost: bool = False
    closing: bool = False
    unclosed: frozenset[str] = frozenset()
    deadline_s: float = 0.0
    outcome: Literal["open", "moved", "aborted", "unknown"] = "open"
    reason: str | None = None
    close_reason: str | None = None
    memory: Memory = Memory()
    storage: Storage = Storage()
    packets: Packets = Packets()
    digest_old: str = ""
    digest_new: str = ""


def is_up(vm: Vm) -> bool:
    """Tell whether the VM's addresses are in use: it runs, or is paused and will run on."""
    return vm.state in ("running", "paused")


def has_state(vm: Vm) -> bool:
    """Tell whether there is a state of the VM that it can run on from: it is up, or suspended."""
    return is_up(vm) or vm.state == "suspended"


def marking(record: Handover) -> Marking:
    """Where the moved VM's address is in transit now; a function of the journalled record only."""
    if record.mode != "cold" or not is_up(record.vm) or record.restored:
        return "none"
    match record.phase:
        case "staged":
            return "others"
        case "paused" | "equal" | "committed":
            return "all"
        case "aborting":
            entered = {each.phase for each in record.phases}
            return "all" if "paused" in entered else "none"
        case _:
            return "none"
