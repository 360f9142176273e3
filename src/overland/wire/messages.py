"""Every message between an NVE and the NVA (spec/wire.md). msgpack maps with a `type` field.

Versioning: `protocol` in Hello and Welcome. A receiver ignores fields it does not know and answers
a message it does not know with Unsupported; a field is never given another meaning.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from overland.mobility.messages import AnyOrder, AnyReport, ColdOrder, DiskOrder
from overland.model.cluster import Disk, DiskState, Export, Host, Mapping, Vm
from overland.model.forecast import Gauge
from overland.model.nve import VnChange, VnIntent

PROTOCOL = 1


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of messages."""


# ------------------------------------------------------------ NVE -> NVA


class Hello(Message, frozen=True, kw_only=True, tag=True):
    """First on a connection: who is here, and which revision of each VN it has in its kernel.

    `vms`: the copies of VMs on this host and their states; `moves`: those it has a part in.
    """

    protocol: int
    host: Host
    known: dict[str, int]
    vms: dict[str, str]
    moves: tuple[str, ...] = ()


class Ack(Message, frozen=True, kw_only=True, tag=True):
    """The kernel has VN `network` as pushed with `revision`; `versions` by VM in it."""

    network: str
    revision: int
    versions: dict[str, int] = {}
    failures: tuple[str, ...] = ()


class VmReport(Message, frozen=True, kw_only=True, tag=True):
    """What the hypervisor says of a VM."""

    vm: str
    state: str
    reason: str | None = None


class Unplugged(Message, frozen=True, kw_only=True, tag=True):
    """A VM here has no device any more for its interface in `slot`: its guest has let go of it."""

    vm: str
    slot: int


class MoveReport(Message, frozen=True, kw_only=True, tag=True):
    """A handover report (spec/handover.md)."""

    report: AnyReport


class VmAnswer(Message, frozen=True, kw_only=True, tag=True):
    """A VmOrder was carried out, or why not.

    `at_ns`: the instant from which a VM was recovered, by its old host's clock.
    """

    id: int
    failure: str | None = None
    gauge: Gauge | None = None
    at_ns: int = 0


class HostAnswer(Message, frozen=True, kw_only=True, tag=True):
    """To a HostQuestion with the same `id`: does that host's kernel answer?"""

    id: int
    answers: bool


class FilesAnswer(Message, frozen=True, kw_only=True, tag=True):
    """To a FilesQuestion with the same `id`: which of the files this host cannot read."""

    id: int
    missing: tuple[str, ...]


class DisksAnswer(Message, frozen=True, kw_only=True, tag=True):
    """To a DisksQuestion with the same `id`: what is there of each disk, in order."""

    id: int
    states: tuple[DiskState, ...]


class ExporterAnswer(Message, frozen=True, kw_only=True, tag=True):
    """To an ExporterQuestion with the same `id`: why this host offers no images; None: it can."""

    id: int
    failure: str | None = None


class ReachAnswer(Message, frozen=True, kw_only=True, tag=True):
    """To a ReachQuestion with the same `id`: why that is not reached; None: it is."""

    id: int
    failure: str | None = None


class Served(Message, frozen=True, kw_only=True, tag=True):
    """The images of Serve `revision` are offered as it says, and no others, or why not."""

    revision: int
    failures: tuple[str, ...] = ()


class Resync(Message, frozen=True, kw_only=True, tag=True):
    """An update of VN `network` did not fit what is here: push the whole."""

    network: str


class Query(Message, frozen=True, kw_only=True, tag=True):
    """Pull on a miss: where is `mac` (or `address`) in VN `network`? (N-05)"""

    id: int
    network: str
    mac: str | None = None
    address: str | None = None


# ------------------------------------------------------------ NVA -> NVE


class Welcome(Message, frozen=True, kw_only=True, tag=True):
    """The NVE is known; it counts as alive until `lease_s` after its connection is lost."""

    protocol: int
    lease_s: float


class VnPush(Message, frozen=True, kw_only=True, tag=True):
    """VN `network` as this NVE must have it. Complete: what is not in it is not there (N-21).

    `versions` are those of the VMs in it, so that an Ack says which commits the kernel has.
    """

    network: str
    revision: int
    intent: VnIntent | None
    versions: dict[str, int]


class VnUpdate(Message, frozen=True, kw_only=True, tag=True):
    """What changed in VN `network` since revision `base`, which this NVE has in its kernel.

    `versions` are those that are news to it. An NVE that does not have `base` answers Resync.
    """

    network: str
    base: int
    revision: int
    change: VnChange
    versions: dict[str, int]


class Complete(Message, frozen=True, kw_only=True, tag=True):
    """Every VN of this NVE has been pushed since its Hello: of others it has nothing (N-21)."""


class MoveOrder(Message, frozen=True, kw_only=True, tag=True):
    """A handover order (spec/handover.md)."""

    order: AnyOrder | ColdOrder | DiskOrder


class VmOrder(Message, frozen=True, kw_only=True, tag=True):
    """Do something to a VM; answered by VmAnswer with the same `id`.

    `suspend` saves its state on the host and ends it, `wake` runs it on from there. `gauge`
    measures how fast it writes memory, `recover` runs the newest checkpoint that was taken
    here, `forget` drops it. `look` has its state reported, and changes nothing. `fit` plugs the
    interfaces of a VM that is up into it or out of it, as `vm` has them.
    """

    id: int
    action: Literal[
        "start",
        "pause",
        "resume",
        "suspend",
        "wake",
        "stop",
        "gauge",
        "recover",
        "forget",
        "look",
        "fit",
    ]
    vm: Vm


class HostQuestion(Message, frozen=True, kw_only=True, tag=True):
    """Does the kernel of the host at underlay `address` answer? (N-11) Answered by HostAnswer."""

    id: int
    address: str


class FilesQuestion(Message, frozen=True, kw_only=True, tag=True):
    """Can this host read the files at `paths`? (R-55) Answered by FilesAnswer."""

    id: int
    paths: tuple[str, ...]


class DisksQuestion(Message, frozen=True, kw_only=True, tag=True):
    """What does this host have of these disks, and room for? (R-55) Answered by DisksAnswer."""

    id: int
    disks: tuple[Disk, ...]


class ExporterQuestion(Message, frozen=True, kw_only=True, tag=True):
    """Can this host offer images to others? It gets ready to. Answered by ExporterAnswer."""

    id: int


class ReachQuestion(Message, frozen=True, kw_only=True, tag=True):
    """Does this host reach images that are offered at `uri`? (R-55) Answered by ReachAnswer."""

    id: int
    uri: str


class Serve(Message, frozen=True, kw_only=True, tag=True):
    """The images that this host offers from now on; what is not here is offered to nobody.

    Whoever writes one that goes is cut off, and what it has begun is done, before another may.
    Answered by Served with the same `revision`.
    """

    revision: int
    exports: tuple[Export, ...]


class Answer(Message, frozen=True, kw_only=True, tag=True):
    """To a Query. Without a mapping it is a negative answer (N-18) for `lifetime_100ms`.

    An address that appears later is pushed to whoever is in the VN, which withdraws the negative.
    """

    id: int
    mapping: Mapping | None
    lifetime_100ms: int


class Unsupported(Message, frozen=True, kw_only=True, tag=True):
    """Either way: the message could not be understood."""

    why: str


FromNve = (
    Hello
    | Ack
    | VmReport
    | Unplugged
    | MoveReport
    | VmAnswer
    | HostAnswer
    | FilesAnswer
    | DisksAnswer
    | ExporterAnswer
    | ReachAnswer
    | Served
    | Resync
    | Query
    | Unsupported
)
FromNva = (
    Welcome
    | Complete
    | VnPush
    | VnUpdate
    | MoveOrder
    | VmOrder
    | HostQuestion
    | FilesQuestion
    | DisksQuestion
    | ExporterQuestion
    | ReachQuestion
    | Serve
    | Answer
    | Unsupported
)

encode = msgspec.msgpack.Encoder().encode
decode_from_nve = msgspec.msgpack.Decoder(FromNve).decode
decode_from_nva = msgspec.msgpack.Decoder(FromNva).decode
