"""Every door the roles need to the outside, and how each may fail. One page.

A port is small and level-based: the caller states what should be. Adapters live in `dataplane`,
`hypervisor`, `store` and `wire`; a fake stands beside each under the same contract suite.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

from overland.model.cluster import GUEST_PAUSE, Disk, DiskState, Record, Vm
from overland.model.forecast import Gauge
from overland.model.handover import Checkpoint, MovingPort, Storage
from overland.model.handover import Transfer as Transfer
from overland.model.nve import KernelState, Op, OpFailure


class PortFailure(Exception):
    """The outside did not do what it was asked. The text is one line for a person."""


class KernelFailure(PortFailure):
    """Netlink, nftables, BPF or a tap refused."""


class HypervisorFailure(PortFailure):
    """QEMU is missing, died, or refused."""


class StoreFailure(PortFailure):
    """The store cannot be read or written (corrupt file, full disk)."""


class StoreUnsure(StoreFailure):
    """The store fell silent on a commit: whether it is written is not known."""


class Conflict(PortFailure):
    """A compare-and-set met another revision than expected. Nothing was written."""


# ---------------------------------------------------------------- kernel, steady state


class Kernel(Protocol):
    """One host's kernel. Only the agent's reconcile loop calls it."""

    async def snapshot(self) -> KernelState:
        """Read back everything that carries our mark."""
        ...

    async def apply(self, ops: Sequence[Op]) -> list[OpFailure]:
        """Perform `ops` in order; an op that fails does not stop the others."""
        ...

    async def dropped_in_transit(self, bridge: str, mac: str) -> dict[str, int]:
        """Frames to `mac` dropped since it was marked, by the port they came from; taken once."""
        ...


# ---------------------------------------------------------------- kernel, handover


class GateCounters(Record, frozen=True, kw_only=True):
    """What passed one gate since it was armed. Times are CLOCK_REALTIME in ns, 0 if never.

    `redirected`: sent into the tunnel (old NVE), or come out of it (new NVE). `detoured`: of those
    sent in, the ones that another NVE had sent; this host's own tenants make no detour by it.
    `dropped`: copies of broadcasts that another path delivers. `overflowed`: the hold queue was
    full. `ring_full`: the port's own ring was full since the port was made. `first_passed_ns`: of
    the first unicast frame. `first_local_ns`: of the first one redirected that makes no detour.
    """

    passed: int = 0
    held: int = 0
    redirected: int = 0
    dropped: int = 0
    overflowed: int = 0
    ring_full: int = 0
    detoured: int = 0
    last_detoured_ns: int = 0
    first_passed_ns: int = 0
    first_local_ns: int = 0


class Tunnel(Record, frozen=True, kw_only=True):
    """The handover tunnel of one TSI between the old and the new NVE.

    A point-to-point VXLAN device on its own UDP port; `number` is its identifier (24 bits). In an
    ILA VN nothing is encapsulated: then `address` is the tenant's, and `mac`.
    """

    number: int
    local: str
    remote: str
    mtu: int
    mac: str = ""
    address: str | None = None


class HandoverPath(Protocol):
    """The moving parts of the data path of one host during a handover.

    A *gate* stands at the egress of a port (all frames to that TSI, whatever their origin) or of
    a VXLAN device (frames of this host's tenants to one MAC behind another NVE). It is in one of
    these modes: pass; hold (frames wait in a bounded queue, in order); flow (released: once the
    queue is empty frames go straight to the target, decided in the kernel, so order is kept).
    """

    async def open_tunnel(self, port: str, tunnel: Tunnel, *, home: bool) -> None:
        """Make the tunnel; what comes out of it goes to `port` and nowhere else.

        With `home` (old NVE) past its gate, else (new NVE) it waits there like all other frames.
        """
        ...

    async def close_tunnel(self, port: str, tunnel: Tunnel) -> None:
        """Remove the tunnel and the gate's memory of it; content with absence."""
        ...

    async def arm_port(self, port: str, device: str, frames: int) -> None:
        """Make the hold queue of `port`'s gate, for at most `frames`. Changes no path.

        `device` is the VN's VXLAN device: what came in by it and is redirected makes a detour.
        """
        ...

    async def quiet_port(self, port: str) -> None:
        """Before the new copy starts: hold all that comes, and put a plug into `port`'s ring.

        A hypervisor reads the first frame that it finds at once, although its VM does not run, and
        spoils it; then it reads nothing more until RESUME. That first frame is our plug.
        """
        ...

    async def open_port(self, port: str, timeout_s: float) -> None:
        """Once the plug is gone: let frames wait in `port`'s ring, in order, until RESUME.

        Unicast, and broadcast from the tunnel: the VN's own copy is dropped until
        `admit_broadcast`. KernelFailure when the plug was not taken in time.
        """
        ...

    async def admit_broadcast(self, port: str) -> None:
        """From now on the VN's own copies of broadcast are taken (new NVE at its activation)."""
        ...

    async def hold_port(self, port: str) -> int:
        """From now on frames to `port` wait. Returns the instant (CLOCK_REALTIME ns)."""
        ...

    async def port_drained(self, port: str, timeout_s: float) -> bool:
        """Wait until the running VM has taken every frame that `port`'s ring had, under a hold.

        Taken, not only read: a frame that its hypervisor read but cannot place yet stands before a
        plug of ours in the ring, and the plug has to go as well. False at the timeout.
        """
        ...

    async def release_port(self, port: str, to: Tunnel | None) -> int:
        """Send on what `port`'s queue still has (rescue), then what waits, then let frames flow.

        Into the tunnel, or with None to `port` itself (an abort; then nothing is rescued).
        Only with the VM stopped. Returns the number of rescued frames.
        """
        ...

    async def mute_broadcast(self, port: str) -> None:
        """Stop sending copies of broadcast and multicast into the tunnel (old NVE at commit)."""
        ...

    async def arm_peer(self, device: str, mac: str, frames: int) -> None:
        """Make the hold queue for frames leaving `device` (VXLAN) to `mac`. Changes no path."""
        ...

    async def steer(
        self, device: str, mac: str, remote: str, port: str | None, timeout_s: float
    ) -> float:
        """Turn frames to `mac` to NVE `remote`, in order; returns the round trip in seconds.

        Holds them, sends a marker down the old path, waits for the NVE at its end to answer,
        changes the entry, releases. With `port` they go to that local port instead (the new NVE
        itself). When no answer comes within `timeout_s` it goes on without: then order is
        not proved, and KernelFailure is raised after the release.
        """
        ...

    async def turn(self, device: str, mac: str, port: str, remote: str | None) -> None:
        """The old NVE's own tenants: frames to `mac` leave by `device` to NVE `remote`.

        With None they go to local `port` again. Both ways lead over the same underlay, so order
        needs no marker.
        """
        ...

    async def disarm_peer(self, device: str, mac: str) -> None:
        """Remove the gate's entry and queue; content with absence."""
        ...

    async def disarm_port(self, port: str) -> None:
        """Gate back to pass, queue removed; content with absence."""
        ...

    async def cross(self, device: str, remote: str, timeout_s: float) -> float:
        """Send a probe frame through `device` to NVE `remote`; its answer's round trip, seconds.

        KernelFailure when none comes: the path is not ready.
        """
        ...

    async def sweep(self, ports: frozenset[MovingPort]) -> None:
        """Remove the tunnels and queues of moves, but for those of `ports`."""
        ...

    async def count_port(self, port: str) -> GateCounters: ...

    async def count_peer(self, device: str, mac: str) -> GateCounters: ...

    async def count_tunnel(self, tunnel: Tunnel) -> tuple[int, int]:
        """Frames sent into and received from the tunnel device on this host."""
        ...


# ---------------------------------------------------------------- hypervisor


class HypervisorFacts(Record, frozen=True, kw_only=True):
    """What this host's hypervisor can do. `notice` is one line for the operator, or empty.

    `pauses_by` as in `Host`: what lets a VM pause and move meanwhile (R-32).
    """

    version: str
    accelerator: Literal["kvm", "tcg"]
    machine_types: tuple[str, ...]
    cpu_models: tuple[str, ...]
    pauses_by: str = GUEST_PAUSE
    notice: str = ""


RunState = Literal["running", "paused", "incoming", "sent", "stopped", "crashed"]


class Unplugged(Record, frozen=True, kw_only=True):
    """A guest has let go of the interface in `slot`: its device is gone."""

    slot: int


class Hypervisor(Protocol):
    """The VMs of one host. Ports (taps) exist before `start` and `receive`."""

    async def facts(self) -> HypervisorFacts:
        """Raise HypervisorFailure with the reason when nothing can run here."""
        ...

    async def start(self, vm: Vm, ports: Sequence[str]) -> None: ...

    async def receive(self, vm: Vm, ports: Sequence[str], listen: str) -> str:
        """Start a paused copy that waits for state; returns the URI to send it to.

        It never runs by itself: only `resume` makes it run.
        """
        ...

    async def gauge(self, vm: str) -> Gauge:
        """Measure how fast a running VM writes memory; takes about a second."""
        ...

    async def send(self, vm: str, uri: str, bytes_per_s: int) -> None:
        """Begin to send; the VM keeps running until `finish`, or until nothing is left to send."""
        ...

    async def keep_checkpoints(self, vm: str, listen: str) -> str:
        """Take checkpoints of `vm` at underlay address `listen`; the URI to send them to.

        Only whole ones are kept, each in place of the one before.
        """
        ...

    async def refuse_checkpoints(self, vm: str) -> None:
        """Take no more; what is whole stays. Content with absence."""
        ...

    async def drop_checkpoint(self, vm: str) -> None:
        """Take no more, and forget what was taken. Content with absence."""
        ...

    async def checkpoint(
        self, vm: str, uri: str, bytes_per_s: int, still: AbstractAsyncContextManager[None]
    ) -> Checkpoint:
        """Send the running VM's whole state of one instant to `uri`; it is whole there on return.

        `still` is entered before the VM is stopped for that instant, and left when it runs again.
        HypervisorFailure when it is not, or when `cancel` was called meanwhile: the VM runs on.
        """
        ...

    async def recover(self, vm: Vm, ports: Sequence[str]) -> int:
        """Run the newest checkpoint that was taken here; the instant it holds (CLOCK_REALTIME ns).

        It stays until the VM runs.
        """
        ...

    async def transfer(self, vm: str) -> Transfer: ...

    async def progressed(self, vm: str, passes: int, timeout_s: float) -> None:
        """Return when more than `passes` rounds over memory were begun, or at the timeout."""
        ...

    async def pace(self, vm: str, bytes_per_s: int, leash_bytes: int | None) -> None:
        """Send at most so fast from now on, until `finish`; 0 is no limit.

        With a leash: of a transfer that would end the VM's run by itself, no more than so many
        bytes after the last look (`transfer`), until the next call.
        """
        ...

    async def finish(self, vm: str) -> None:
        """Let the VM be stopped and the transfer complete, as fast as the network takes it."""
        ...

    async def stopped(self, vm: str) -> int:
        """Wait until the VM has stopped. Returns the STOP event's time (CLOCK_REALTIME ns)."""
        ...

    async def received(self, vm: str, timeout_s: float) -> int:
        """Wait until the incoming copy is whole. Returns the instant (CLOCK_REALTIME ns)."""
        ...

    async def cancel(self, vm: str) -> None:
        """Give up sending memory and disks. The VM stays as it is: running, or stopped."""
        ...

    async def attach_disks(self, vm: Vm) -> None:
        """Give a copy that was received its disks that other hosts have; content with its having.

        Before it runs, and only once they are offered to this host. HypervisorFailure when one is
        not reached.
        """
        ...

    async def copy_disk(self, vm: Vm, bytes_per_s: int) -> None:
        """Begin to copy the disk that moves alone from where it is into its image here.

        Each write goes to both; 0 is no limit. Content with being at it.
        """
        ...

    async def copied(self, vm: Vm) -> Storage:
        """How far that is. HypervisorFailure when it cannot go on."""
        ...

    async def settle_disk(self, vm: Vm) -> int:
        """Stop the VM, with both images the same; the instant (CLOCK_REALTIME ns). May be repeated.

        What the VM writes goes to the former image still, should it run on.
        """
        ...

    async def keep_disk(self, vm: Vm) -> int:
        """Run the VM on with the image here in place of the other; the instant. May be repeated."""
        ...

    async def leave_disk(self, vm: Vm) -> None:
        """Give it up wherever it stands before `keep_disk`: the VM runs on with the other image."""
        ...

    async def offer_disks(self, vm: Vm, listen: str) -> str:
        """Let the old host write the images of a copy that waits; the URI to write them at."""
        ...

    async def withdraw_disks(self, vm: str) -> None:
        """Nobody else writes the images any more; content when nobody could."""
        ...

    async def begin_mirror(self, vm: Vm, uri: str, bytes_per_s: int) -> None:
        """Begin to copy the disks that go along to `uri`; each write goes to both from now on."""
        ...

    async def mirrored(self, vm: str) -> Storage:
        """How far that is. HypervisorFailure when it cannot go on (full, cut off, stalled)."""
        ...

    async def end_mirror(self, vm: str) -> None:
        """With the VM stopped by a transfer: the new images become equal, flushed, and let go."""
        ...

    async def send_rest(self, vm: str) -> None:
        """After `end_mirror`: send what of memory waited for it."""
        ...

    async def resume(self, vm: str) -> int:
        """Run it. Returns the RESUME event's time (CLOCK_REALTIME ns)."""
        ...

    async def pause(self, vm: str) -> int: ...

    async def suspend(self, vm: str) -> int:
        """Save the VM's whole state on this host and end its process; content with its being so.

        Returns the STOP event's time (CLOCK_REALTIME ns), 0 when it was suspended already.
        """
        ...

    async def wake(self, vm: Vm, ports: Sequence[str]) -> int:
        """Run a suspended VM on from its saved state (one that was paused stays paused).

        Content with its being so. Returns the instant (CLOCK_REALTIME ns).
        """
        ...

    async def back_to(self, vm: Vm, ports: Sequence[str]) -> None:
        """Undo `suspend`, wherever it stands: the VM is as `vm` says again."""
        ...

    async def saved_bytes(self, vm: str) -> int:
        """Size of the VM's saved state on this host; 0 when there is none."""
        ...

    async def saved(self) -> list[str]:
        """Names of the VMs that have a saved state here, and no process."""
        ...

    async def take_state(self, move: str, listen: str) -> str:
        """Wait at underlay address `listen` for the state that `move` brings; the URI to give to.

        It is nobody's until `keep_state`: what was taken for a move is known by its name.
        """
        ...

    async def keep_state(self, vm: str, move: str) -> None:
        """What `move` has brought is the saved state of `vm` here; content with its being so.

        HypervisorFailure when there is neither a state nor a process of it.
        """
        ...

    async def drop_taken(self, move: str) -> None:
        """What `move` has brought goes; content with absence."""
        ...

    def taken(self) -> list[str]:
        """The moves whose states were taken here and are nobody's yet."""
        ...

    async def give_state(self, vm: str, uri: str) -> int:
        """Send a suspended VM's state to `uri`; bytes sent, once it is on the other host's disk."""
        ...

    async def stop(self, vm: str) -> None:
        """End the process, and drop a saved state; content with absence."""
        ...

    async def state(self, vm: str) -> RunState | None:
        """None when no copy of it is here."""
        ...

    async def digest(self, vm: str) -> str:
        """SHA-256 of the whole guest memory of a stopped copy (R-09)."""
        ...

    async def fit(self, vm: Vm, ports: Sequence[str]) -> None:
        """Plug the interfaces of a VM that is up into it, but for those that are being removed.

        Content with its being so. HypervisorFailure when it did not come to that: then what was to
        be added is not there at all, and what was to be removed is as before. It may still go, when
        the guest, which has to let go of it, does so later (`events`).
        """
        ...

    async def plugged(self, vm: str) -> frozenset[int]:
        """The slots of the interfaces that a VM that is up has."""
        ...

    def events(self) -> AsyncIterator[tuple[str, RunState | Unplugged]]:
        """(VM, new state, or what is gone of it) as the hypervisor itself reports it."""
        ...

    async def names(self) -> list[str]:
        """Names of the VMs with a process here."""
        ...


class Images(Protocol):
    """The disk images of one host."""

    async def look(self, disks: Sequence[Disk]) -> tuple[DiskState, ...]:
        """What is there of each, in order."""
        ...

    def keep(self, vm: str) -> None:
        """What was made for `vm` here is its own from now on."""
        ...

    def drop(self, vm: str) -> None:
        """Remove what was made for `vm` here and not kept; content with absence."""
        ...

    async def make_for(self, move: str, disks: Sequence[Disk]) -> None:
        """Make empty images for `move`; nobody's until `keep_taken`. May be repeated."""
        ...

    async def take(self, move: str, disks: Sequence[Disk], listen: str) -> list[str]:
        """Wait at underlay address `listen` for the images that `move` brings; URIs, in order.

        They are nobody's until `keep_taken`. Where something is already, nothing is taken.
        """
        ...

    async def give(self, disk: Disk, uri: str) -> int:
        """Send the image of a VM at rest; bytes, once it is on the other host's disk."""
        ...

    async def keep_taken(self, move: str, disks: Sequence[Disk]) -> None:
        """What `move` has brought is the VM's own; content with its being so.

        HypervisorFailure when one of `disks` is not here any more.
        """
        ...

    async def drop_taken(self, move: str, disks: Sequence[Disk]) -> None:
        """What `move` has brought goes, and nobody waits for `disks`; content with absence."""
        ...

    def taken(self) -> list[str]:
        """The moves whose images were taken here and are nobody's yet."""
        ...

    async def settle(self, disks: Sequence[Disk]) -> None:
        """Return when what was written to the images would outlast a crash of this host."""
        ...

    def remove(self, disks: Sequence[Disk]) -> None:
        """Remove the images; content with absence."""
        ...

    async def digest(self, disk: Disk) -> str:
        """SHA-256 of what a guest sees in the image (R-56)."""
        ...


# ---------------------------------------------------------------- store


class Entry(Record, frozen=True, kw_only=True):
    """One stored value. `revision` is that of its last change; 0 stands for absence."""

    key: str
    value: bytes
    revision: int


class Put(Record, frozen=True, kw_only=True, tag=True):
    key: str
    value: bytes
    lease: str | None = None


class Delete(Record, frozen=True, kw_only=True, tag=True):
    key: str


class Expect(Record, frozen=True, kw_only=True):
    """`key` must be at `revision` (0: must not exist)."""

    key: str
    revision: int


class Change(Record, frozen=True, kw_only=True):
    """What a watch reports; `value` is None for a deletion."""

    key: str
    value: bytes | None
    revision: int


class Ledger(Protocol):
    """What the authority needs of a store: read everything, then write."""

    async def list(self, prefix: str) -> tuple[list[Entry], int]:
        """All entries below `prefix` in key order, and the store's revision."""
        ...

    async def commit(self, expects: Sequence[Expect], writes: Sequence[Put | Delete]) -> int:
        """All writes or none; durable on return. Returns the new revision; raises Conflict."""
        ...


class Store(Ledger, Protocol):
    """Keys in order, one revision number for the whole store, raised by each transaction."""

    async def get(self, key: str) -> Entry | None: ...

    def watch(self, prefix: str, after: int) -> AsyncIterator[Change]:
        """Every change below `prefix` later than revision `after`, in order, then live ones."""
        ...

    async def grant(self, lease: str, ttl_s: float) -> None:
        """Make or renew a lease; keys put with it vanish when it is not renewed in time."""
        ...

    async def revoke(self, lease: str) -> None: ...

    async def close(self) -> None: ...
