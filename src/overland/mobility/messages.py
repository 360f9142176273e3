"""Everything the handover machines say and hear.

Orders go from the coordinator to an NVE, reports come back, events are what the machines see,
effects what they want done. All are values; the same structs travel on the wire (spec/wire.md).
"""

from __future__ import annotations

from overland.model.cluster import Record, Vm
from overland.model.handover import (
    Checkpoint,
    Marking,
    Memory,
    MovingPort,
    Options,
    Packets,
    Storage,
    Transfer,
)
from overland.model.ticket import Seal

# ------------------------------------------------------------ orders: coordinator -> NVE


class Order(Record, frozen=True, kw_only=True, tag=True):
    """Base of orders. `move` names the handover; a repeated order has the same effect once."""

    move: str


class PrepareNew(Order, frozen=True, kw_only=True, tag=True):
    """To the new NVE: make tap, tunnel and an empty paused copy; answer Prepared with its URI."""

    vm: Vm
    version: int
    ports: tuple[MovingPort, ...]
    options: Options = Options()


class PrepareOld(Order, frozen=True, kw_only=True, tag=True):
    """To the old NVE: make the tunnel, arm the gates, prove the path to the new NVE."""

    vm: Vm
    version: int
    ports: tuple[MovingPort, ...]
    options: Options


class PreparePeer(Order, frozen=True, kw_only=True, tag=True):
    """To a peer NVE: pre-place the new mapping, arm the gates, prove the path to the new NVE."""

    version: int
    ports: tuple[MovingPort, ...]


class Send(Order, frozen=True, kw_only=True, tag=True):
    """To the old NVE: begin to copy memory to `uri`; stop and hold when it has converged.

    Before that, in a warm move, the checkpoints that were asked for, to `keep_uri`; else the disks
    that go along, if there are any, to `disks_uri`.
    """

    uri: str
    keep_uri: str = ""
    disks_uri: str = ""


class Force(Order, frozen=True, kw_only=True, tag=True):
    """To the old NVE: stop the VM now, converged or not (`--timeout-action pause`)."""


class Steer(Order, frozen=True, kw_only=True, tag=True):
    """To any NVE of the move: turn the VM's frames to the new NVE (or `back`), in order."""

    back: bool = False


class Digest(Order, frozen=True, kw_only=True, tag=True):
    """To both NVEs at equality, when asked to verify: report the SHA-256 of guest memory."""


class Activate(Order, frozen=True, kw_only=True, tag=True):
    """To the new NVE, only after the commit: let the VM in and run it under `version`."""

    version: int
    seal: Seal | None = None


class Retire(Order, frozen=True, kw_only=True, tag=True):
    """To the old NVE, only after the commit: never run this copy again."""

    version: int
    seal: Seal | None = None


class GiveBack(Order, frozen=True, kw_only=True, tag=True):
    """To the new NVE in an abort: drop the copy, send every held frame back through the tunnel."""


class Restore(Order, frozen=True, kw_only=True, tag=True):
    """To the old NVE in an abort: cancel, deliver what came back, run the VM here again."""


class Close(Order, frozen=True, kw_only=True, tag=True):
    """To every NVE of a move: remove what the move made; answer Closed with the counts.

    With `keep` the newest checkpoint stays: the old host is lost, and it is all there is of the VM.
    """

    keep: bool = False


AnyOrder = (
    PrepareNew
    | PrepareOld
    | PreparePeer
    | Send
    | Force
    | Steer
    | Digest
    | Activate
    | Retire
    | GiveBack
    | Restore
    | Close
)


# ------------------------------------------------------------ orders of a cold move


class Cold(Order, frozen=True, kw_only=True, tag=True):
    """Base: the NVE keeps no part of a cold move, so an order says all. Repeated, it is a question.

    `vm` is the VM as it was before the move; its state is the one it has to come back to.
    """

    vm: Vm
    ports: tuple[MovingPort, ...]


class Associate(Cold, frozen=True, kw_only=True, tag=True):
    """To the new NVE: ports in place, no copy of the VM here, and wait for what is carried.

    That is the saved state, if there is to be one, and the disks that go along. Answer Prepared
    with the URIs to give them to: `disks_uri` has them in order, a space between two.
    """


class Suspend(Cold, frozen=True, kw_only=True, tag=True):
    """To the old NVE: stop the VM and save its state; answer Stopped once that is whole."""


class GiveState(Cold, frozen=True, kw_only=True, tag=True):
    """To the old NVE: send the saved state to `uri`, the disks that go along to `disks_uri`.

    Answer Received once all of it is on the other host's disk.
    """

    uri: str
    disks_uri: str = ""


class WakeUp(Cold, frozen=True, kw_only=True, tag=True):
    """To the new NVE, only after the commit: what was taken is the VM's; run it on from its state.

    A VM that was paused stays so, one at rest sleeps on; answer Running, or Crashed.
    """

    version: int
    seal: Seal | None = None


class DropState(Cold, frozen=True, kw_only=True, tag=True):
    """To the old NVE at the end, after the commit: what was carried goes, then as Count."""

    version: int
    seal: Seal | None = None


class Return(Cold, frozen=True, kw_only=True, tag=True):
    """To the old NVE in an abort: the VM as it was, from its saved state if it must."""


class DropCopy(Cold, frozen=True, kw_only=True, tag=True):
    """To the new NVE in an abort: what was taken for this move goes; answer GivenBack."""


class Count(Cold, frozen=True, kw_only=True, tag=True):
    """To every NVE at the end: answer Closed with what was dropped while in transit."""


ColdOrder = Associate | Suspend | GiveState | WakeUp | DropState | Return | DropCopy | Count


# ------------------------------------------------------------ orders of a disk that moves alone


class DiskTask(Order, frozen=True, kw_only=True, tag=True):
    """Base: as of a cold move, an order says all, and repeated it is a question.

    `vm` is the VM as it was before; its disk of kind `moved` is the one.
    """

    vm: Vm


class CopyDisk(DiskTask, frozen=True, kw_only=True, tag=True):
    """To the VM's NVE: copy the disk into an image here; answer Received once both are equal.

    At most `bytes_per_s`, 0 is no limit. Each write of the VM goes to both meanwhile.
    """

    bytes_per_s: int = 0


class SettleDisk(DiskTask, frozen=True, kw_only=True, tag=True):
    """To the VM's NVE: stop the VM, with both images the same and flushed; answer Stopped."""


class KeepDisk(DiskTask, frozen=True, kw_only=True, tag=True):
    """To the VM's NVE after the commit: the VM runs on with the image here; answer Running."""


class LeaveDisk(DiskTask, frozen=True, kw_only=True, tag=True):
    """To the VM's NVE in an abort: the VM runs on with the former image; answer Restored."""


class DropImage(DiskTask, frozen=True, kw_only=True, tag=True):
    """To the NVE that has the former image, at the end: it goes; answer Closed."""


DiskOrder = CopyDisk | SettleDisk | KeepDisk | LeaveDisk | DropImage


# ------------------------------------------------------------ reports: NVE -> coordinator


class Report(Record, frozen=True, kw_only=True, tag=True):
    """Base of reports."""

    move: str
    nve: str


class Prepared(Report, frozen=True, kw_only=True, tag=True):
    """All is in place. From the new NVE: where memory goes, and the disks that go along."""

    uri: str = ""
    keep_uri: str = ""
    disks_uri: str = ""


class Checkpointed(Report, frozen=True, kw_only=True, tag=True):
    """One more checkpoint is whole on the new host."""

    checkpoint: Checkpoint


class Progress(Report, frozen=True, kw_only=True, tag=True):
    memory: Memory
    storage: Storage = Storage()


class Flowing(Report, frozen=True, kw_only=True, tag=True):
    """The VM hears nothing more since `held_ns`; what comes for it goes into the tunnel."""

    held_ns: int


class Stopped(Report, frozen=True, kw_only=True, tag=True):
    """The VM is stopped since `stop_ns`; what waited since `held_ns` flows into the tunnel."""

    held_ns: int
    stop_ns: int
    memory: Memory


class Received(Report, frozen=True, kw_only=True, tag=True):
    """The new copy is whole and paused since `at_ns`.

    Of a cold move: `state_bytes` of a saved state and the disks of `storage` were carried.
    """

    at_ns: int
    state_bytes: int = 0
    storage: Storage = Storage()


class Steered(Report, frozen=True, kw_only=True, tag=True):
    at_ns: int


class Digested(Report, frozen=True, kw_only=True, tag=True):
    sha256: str


class Running(Report, frozen=True, kw_only=True, tag=True):
    """The new copy runs since `at_ns`; `held` frames waited for it."""

    at_ns: int
    held: int


class Crashed(Report, frozen=True, kw_only=True, tag=True):
    """The VM's process ended at the new NVE after the commit: the VM's failure, not the move's.

    `gone`: not even a state is left there, so the VM may have run on and have ended since.
    """

    why: str
    gone: bool = False


class GivenBack(Report, frozen=True, kw_only=True, tag=True):
    pass


class Restored(Report, frozen=True, kw_only=True, tag=True):
    """The VM is on the old host as it was before the move."""


class Closed(Report, frozen=True, kw_only=True, tag=True):
    packets: Packets = Packets()
    memory: Memory = Memory()
    storage: Storage = Storage()


class Failed(Report, frozen=True, kw_only=True, tag=True):
    """An order could not be carried out."""

    step: str
    why: str


AnyReport = (
    Prepared
    | Checkpointed
    | Progress
    | Flowing
    | Stopped
    | Received
    | Steered
    | Digested
    | Running
    | Crashed
    | GivenBack
    | Restored
    | Closed
    | Failed
)


# ------------------------------------------------------------ events at the NVA


class Start(Record, frozen=True, kw_only=True, tag=True):
    """Begin, or go on after a restart of the NVA."""


class Committed(Record, frozen=True, kw_only=True, tag=True):
    """The compare-and-set succeeded: `version` governs since `at_ns`."""

    version: int
    at_ns: int


class CommitRefused(Record, frozen=True, kw_only=True, tag=True):
    """The compare-and-set met another version: somebody else moved or changed the VM."""

    why: str


class Acknowledged(Record, frozen=True, kw_only=True, tag=True):
    """NVE `nve` has the mappings in its kernel: the committed ones, or as `marking` says.

    The marking is that of the revision which the NVE acknowledged (spec/wire.md).
    """

    nve: str
    at_ns: int
    marking: Marking = "none"


class Served(Record, frozen=True, kw_only=True, tag=True):
    """NVE `nve` offers the images on its host as the records say now, and no others to anybody."""

    nve: str


class Back(Record, frozen=True, kw_only=True, tag=True):
    """NVE `nve` is connected (again): what it was told before may not have arrived."""

    nve: str


class Lost(Record, frozen=True, kw_only=True, tag=True):
    """The lease of NVE `nve` has ended; `dead`: its host does not answer anybody either.

    Where a host lives its kernel forwards as it was told last: after the commit it is waited for.
    """

    nve: str
    dead: bool = False


class Abort(Record, frozen=True, kw_only=True, tag=True):
    why: str


class Tick(Record, frozen=True, kw_only=True, tag=True):
    pass


CoordinatorEvent = (
    AnyReport
    | Start
    | Back
    | Committed
    | CommitRefused
    | Acknowledged
    | Served
    | Lost
    | Abort
    | Tick
)


class Tell(Record, frozen=True, kw_only=True, tag=True):
    """Effect: send `order` to `nve`."""

    nve: str
    order: AnyOrder


class Commit(Record, frozen=True, kw_only=True, tag=True):
    """Effect: raise the VM's version and change its host, one compare-and-set."""

    vm: str
    expected_version: int
    new_nve: str


class Ask(Record, frozen=True, kw_only=True, tag=True):
    """Effect of a cold move: have `nve` carry out `order`, if it has not yet."""

    nve: str
    order: ColdOrder


class Task(Record, frozen=True, kw_only=True, tag=True):
    """Effect of a disk's move: have `nve` carry out `order`, if it has not yet."""

    nve: str
    order: DiskOrder


class Publish(Record, frozen=True, kw_only=True, tag=True):
    """Effect: tell the subscribers of the VM's networks what the journalled record now means."""


class Serve(Record, frozen=True, kw_only=True, tag=True):
    """Effect: have the hosts with images that stay offer them as the records say now."""


CoordinatorEffect = Tell | Commit | Serve
ColdEffect = Ask | Commit | Publish | Serve
DiskEffect = Task | Commit | Serve

# ------------------------------------------------------------ effects and answers at an NVE


class Do(Record, frozen=True, kw_only=True, tag=True):
    """Base of effects of the NVE machines; performed one after the other."""


class MakeTunnel(Do, frozen=True, kw_only=True, tag=True):
    to: str


class Forget(Do, frozen=True, kw_only=True, tag=True):
    """Remove what a former move's crash may have left of tunnel, queues and gate entries."""


class DropStale(Do, frozen=True, kw_only=True, tag=True):
    """End a stopped copy that a former move left here; one that runs makes this fail."""


class ArmPorts(Do, frozen=True, kw_only=True, tag=True):
    pass


class QuietPorts(Do, frozen=True, kw_only=True, tag=True):
    """Nothing gets into the new port's ring but a plug for the copy that is about to start."""


class ReceiveCopy(Do, frozen=True, kw_only=True, tag=True):
    pass


class KeepCheckpoints(Do, frozen=True, kw_only=True, tag=True):
    """Take checkpoints from now on, each in place of the one before; Done's text is their URI."""


class RefuseCheckpoints(Do, frozen=True, kw_only=True, tag=True):
    """Take no more, not even the one on its way; what is whole stays."""


class ArmPeers(Do, frozen=True, kw_only=True, tag=True):
    pass


class ProvePath(Do, frozen=True, kw_only=True, tag=True):
    """Send a probe frame to the NVE at the other end and wait for its answer."""

    to: str


class BeginSend(Do, frozen=True, kw_only=True, tag=True):
    """Begin to send memory to `uri`, at most so fast until a Pace says otherwise."""

    uri: str
    bytes_per_s: int


class TakeCheckpoint(Do, frozen=True, kw_only=True, tag=True):
    """Send a checkpoint of the running VM to `uri`; answered by CheckpointSeen."""

    uri: str


class AwaitInterval(Do, frozen=True, kw_only=True, tag=True):
    """Wait until CLOCK_REALTIME is `until_ns`."""

    until_ns: int


class BeginMirror(Do, frozen=True, kw_only=True, tag=True):
    """Begin to copy the disks that go along to `uri`; from then on each write goes to both."""

    uri: str
    bytes_per_s: int


class WatchMirror(Do, frozen=True, kw_only=True, tag=True):
    """Look at the disks a moment later; answered by MirrorSeen."""


class EndMirror(Do, frozen=True, kw_only=True, tag=True):
    """With the VM stopped: the new images are brought up to the old ones, flushed, let go."""


class SendRest(Do, frozen=True, kw_only=True, tag=True):
    """Send what of memory was kept until the disks were done."""


class OfferDisks(Do, frozen=True, kw_only=True, tag=True):
    """Let the old NVE write the new copy's images; Done's text says where."""


class WithdrawDisks(Do, frozen=True, kw_only=True, tag=True):
    """Nobody else writes the images any more, and they are on this host's disk."""


class KeepDisks(Do, frozen=True, kw_only=True, tag=True):
    """The move is committed: the images made for the copy are the VM's."""


class AttachDisks(Do, frozen=True, kw_only=True, tag=True):
    """The move is committed: the disks that stay are reached where they are, under its version."""


class RemoveDisks(Do, frozen=True, kw_only=True, tag=True):
    """The VM runs elsewhere with its disks: the images here go."""


class WatchTransfer(Do, frozen=True, kw_only=True, tag=True):
    """Look at the transfer a moment later; answered by TransferSeen."""


class Pace(Do, frozen=True, kw_only=True, tag=True):
    """Send memory at most so fast from now on, and no more than `leash_bytes` until the next."""

    bytes_per_s: int
    leash_bytes: int | None = None


class HoldPorts(Do, frozen=True, kw_only=True, tag=True):
    pass


class AwaitDrained(Do, frozen=True, kw_only=True, tag=True):
    """Let the VM take what is in its tap's ring; Done's number is 1 when it has, 0 at timeout."""

    timeout_s: float


class FinishSend(Do, frozen=True, kw_only=True, tag=True):
    """Let the VM be stopped and the rest of memory be sent; AwaitStop tells when it stands."""


class AwaitStop(Do, frozen=True, kw_only=True, tag=True):
    pass


class ReleaseInto(Do, frozen=True, kw_only=True, tag=True):
    """Rescue, send what waits, then let flow: into the tunnel, or home (this host's port)."""

    tunnel: bool


class AwaitCopy(Do, frozen=True, kw_only=True, tag=True):
    pass


class SteerHere(Do, frozen=True, kw_only=True, tag=True):
    back: bool
    local: bool


class TakeDigest(Do, frozen=True, kw_only=True, tag=True):
    pass


class Unmute(Do, frozen=True, kw_only=True, tag=True):
    """The TSI is activated: the VM is heard, and hears the VN's broadcasts directly."""


class OpenPorts(Do, frozen=True, kw_only=True, tag=True):
    """The plug is taken: what comes for the VM waits in its port's ring, in order, till RESUME."""


class ResumeVm(Do, frozen=True, kw_only=True, tag=True):
    pass


class Announce(Do, frozen=True, kw_only=True, tag=True):
    """Gratuitous ARP, unsolicited NA to all nodes, RARP: a courtesy (6-8)."""


class MuteBroadcast(Do, frozen=True, kw_only=True, tag=True):
    pass


class CancelSend(Do, frozen=True, kw_only=True, tag=True):
    """Give up sending memory, and the disks that go along."""


class StopCopy(Do, frozen=True, kw_only=True, tag=True):
    """End this host's QEMU of the VM."""


class CleanUp(Do, frozen=True, kw_only=True, tag=True):
    """Count, then remove tunnel, queues and gate entries; the agent takes the ports back.

    A checkpoint goes as well, but with `keep`.
    """

    keep: bool = False


class Say(Do, frozen=True, kw_only=True, tag=True):
    """Report to the coordinator."""

    report: AnyReport


class TransferSeen(Record, frozen=True, kw_only=True, tag=True):
    transfer: Transfer


class CheckpointSeen(Record, frozen=True, kw_only=True, tag=True):
    checkpoint: Checkpoint


class MirrorSeen(Record, frozen=True, kw_only=True, tag=True):
    storage: Storage


class Done(Record, frozen=True, kw_only=True, tag=True):
    """An effect was performed. `number` and `text` carry its result, where it has one.

    `back` is SteerHere's own: the turn that was made need not be the last that was ordered.
    """

    effect: str
    number: int = 0
    text: str = ""
    back: bool = False
    packets: Packets = Packets()


class Broken(Record, frozen=True, kw_only=True, tag=True):
    """An effect failed, or the VM did (`effect` is then `vm`). `back` as in Done."""

    effect: str
    why: str
    back: bool = False


class Reconnected(Record, frozen=True, kw_only=True, tag=True):
    """The NVA is there again: what was last reported may not have arrived."""


class Resumed(Record, frozen=True, kw_only=True, tag=True):
    """The daemon was restarted and has read its part from its journal.

    Of the last stage any effect may have been done, or half of it; kernel and hypervisor went on.
    """


NveEvent = (
    AnyOrder | TransferSeen | CheckpointSeen | MirrorSeen | Done | Broken | Reconnected | Resumed
)
