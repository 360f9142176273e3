"""Plays this NVE's part in every open move: orders become events, effects become port calls.

One machine per move (`overland.mobility`), one queue of effects per machine. An effect is
performed when the one before it is done; the few that only wait (for a transfer, a copy, a peer's
answer) run beside the queue, so that an order to turn back never stands in line behind them.
When an effect fails the rest of its queue is void: the machine decides what comes next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol, assert_never

import msgspec

from overland.mobility import messages as m
from overland.mobility import new_nve, old_nve, peer_nve
from overland.mobility.nve import Part, PartStep
from overland.model.cluster import moved_disks, seen_from
from overland.model.handover import Memory, MovingPort, Packets, Storage
from overland.model.names import bridge_name
from overland.model.ticket import Seal, Ticket, ticket_refusal
from overland.nve.journal import Kept, PartJournal
from overland.nve.moving import Moving
from overland.ports import HandoverPath, Hypervisor, Images, PortFailure, Tunnel

WATCH_S = 0.01
"""How often a running transfer is looked at."""

MIRROR_WATCH_S = 0.1
"""How often the disks that go along are looked at."""

STEER_LIMIT_S = 3.0
TURN_LIMIT_S = 5.0
PROBE_LIMIT_S = 3.0
PLUG_LIMIT_S = 3.0
COPY_LIMIT_S = 3600.0
CHECKPOINT_DRAIN_S = 0.1
"""How long frames wait at most for the VM to take what came before, at each checkpoint."""

ENDED_KEPT = 1000
"""How many ended moves are remembered, to tell a late order from a new one (HO-23)."""


log = logging.getLogger(__name__)

_NOTHING_HERE: dict[type[m.Order], type[m.Closed | m.GivenBack | m.Restored]] = {
    m.Close: m.Closed,
    m.GiveBack: m.GivenBack,
    m.Restore: m.Restored,
}
_BESIDE = (
    m.WatchTransfer,
    m.WatchMirror,
    m.AwaitStop,
    m.AwaitCopy,
    m.TakeCheckpoint,
    m.AwaitInterval,
)
_MACHINES = {"old": old_nve, "new": new_nve, "peer": peer_nve}


class Ground(Protocol):
    """What a handover needs of the agent beside it."""

    def moving(self, entries: frozenset[Moving]) -> None:
        """Leave these to the handover until told otherwise; then reconcile."""
        ...

    async def ready(self, port: str) -> None:
        """Wait until `port` is in the kernel; KernelFailure when it does not come."""
        ...

    async def unmute(self, ports: list[str]) -> None:
        """Let frames from `ports` in, now."""
        ...

    async def announce(self, port: MovingPort) -> None:
        """Send gratuitous ARP, unsolicited NA and RARP for the moved interface."""
        ...


class Handovers:
    """All open parts of this NVE. `say` sends a report to the coordinator, in order.

    `opened` reads a sealed ticket, or says why it is not from the NVA.
    """

    def __init__(
        self,
        nve: str,
        hypervisor: Hypervisor,
        images: Images,
        path: HandoverPath,
        ground: Ground,
        say: Callable[[m.AnyReport], None],
        hold_frames: int,
        journal: PartJournal,
        opened: Callable[[Seal | None], Ticket | str],
    ) -> None:
        self._nve = nve
        self._opened = opened
        self._journal = journal
        self._hypervisor = hypervisor
        self._images = images
        self._path = path
        self._ground = ground
        self._say = say
        self._hold_frames = hold_frames
        self._running: dict[str, _Running] = {}
        self._ended: deque[str] = deque(maxlen=ENDED_KEPT)

    def open_moves(self) -> tuple[str, ...]:
        """The moves in which this NVE has a part."""
        return tuple(sorted(self._running))

    def parts(self) -> list[Part]:
        """The parts that a former daemon left in the journal."""
        return [kept.part for kept in self._journal.load()]

    async def resume(self) -> None:
        """After a restart: go on with every part in the journal, and sweep what belongs to none."""
        kept_parts = self._journal.load()
        ports = [port for kept in kept_parts for port in kept.part.ports]
        await self._path.sweep(frozenset(ports))
        for kept in kept_parts:
            self._running[kept.part.move] = _Running(self, kept.part, kept.base_version)
        self._publish()
        for running in list(self._running.values()):
            running.event(m.Resumed())

    def reconnected(self) -> None:
        """The NVA is there again: say again what stands."""
        for running in list(self._running.values()):
            running.event(m.Reconnected())

    def order(self, order: m.AnyOrder) -> None:
        """Take one order; the answer comes as a report."""
        running = self._running.get(order.move)
        match order:
            case m.PrepareNew() | m.PrepareOld() | m.PreparePeer():
                if order.move in self._ended:
                    self._say(m.Closed(move=order.move, nve=self._nve))
                elif running is None:
                    self._begin(order)
            case m.Close() | m.GiveBack() | m.Restore() if running is None:
                # Its prepare order may still wait for the kernel, and must not begin it any more.
                self._ended.append(order.move)
                self._say(_NOTHING_HERE[type(order)](move=order.move, nve=self._nve))
            case m.Retire() if order.move in self._ended:
                self._say(m.Closed(move=order.move, nve=self._nve))  # which was not heard
            case m.Activate() | m.Retire() if running is not None:
                self._with_ticket(running, order)
            case _ if running is not None:
                running.event(order)
            case _:
                why = "this NVE has no part in the move"
                self._say(m.Failed(move=order.move, nve=self._nve, step="order", why=why))

    async def turned(self, versions: dict[str, int]) -> None:
        """Wait until no part of a peer is behind the mappings `versions` (by MAC), HO-28."""
        for running in list(self._running.values()):
            if running.behind(versions):
                await running.turn()

    def _with_ticket(self, running: _Running, order: m.Activate | m.Retire) -> None:
        """A copy runs, or ends, with the NVA's ticket for this very move only (HO-27)."""
        ticket, part = self._opened(order.seal), running.part
        why = (
            ticket
            if isinstance(ticket, str)
            else ticket_refusal(
                ticket,
                move=order.move,
                vm=part.vm.name if part.vm is not None else "",
                ports=part.ports,
                nve=self._nve,
                base_version=running.base_version,
                now_ns=time.time_ns(),
            )
        )
        if why is None:
            running.event(order)
        else:
            log.warning("move %s: %s refused: %s", order.move, type(order).__name__, why)
            self._say(m.Failed(move=order.move, nve=self._nve, step="ticket", why=why))

    def vm_died(self, vm: str, why: str) -> None:
        """Tell the machines that QEMU itself reported the end of `vm`."""
        for running in list(self._running.values()):
            if running.part.vm is not None and running.part.vm.name == vm:
                running.event(m.Broken(effect="vm", why=why))

    def _begin(self, order: m.PrepareNew | m.PrepareOld | m.PreparePeer) -> None:
        match order:
            case (
                m.PrepareNew(vm=vm, ports=ports, options=options)
                | m.PrepareOld(vm=vm, ports=ports, options=options)
            ):
                part = Part(
                    move=order.move,
                    nve=self._nve,
                    role="new" if isinstance(order, m.PrepareNew) else "old",
                    vm=vm,
                    ports=ports,
                    options=options,
                )
            case m.PreparePeer(ports=ports):
                part = Part(move=order.move, nve=self._nve, role="peer", vm=None, ports=ports)
            case _:
                assert_never(order)
        self._forget_former(part)
        running = _Running(self, part, order.version)
        why = self._keep(running)
        if why is not None:
            # A daemon that is killed must find its part, or nobody can activate the copy (HO-36).
            self._publish()  # a former move's entries are no longer moving
            self._say(m.Failed(move=order.move, nve=self._nve, step="journal", why=why))
            return
        self._running[order.move] = running
        self._publish()
        running.take(_MACHINES[part.role].begin(part))

    def _forget_former(self, part: Part) -> None:
        """The NVA opens one move of a VM at a time: a part in a former one is a straggler's."""
        ports = {port.port for port in part.ports}
        for move, running in list(self._running.items()):
            if ports & {port.port for port in running.part.ports}:
                log.warning("move %s has begun: the part in move %s is void", part.move, move)
                running.void()
                self._running.pop(move)
                self._journal.forget(move)

    def _publish(self) -> None:
        self._ground.moving(
            frozenset(
                Moving(
                    role=running.part.role,
                    mac=port.mac,
                    port=port.port,
                    device=port.device,
                    bridge=bridge_name(port.vni),
                    version=running.base_version,
                )
                for running in self._running.values()
                for port in running.part.ports
            )
        )

    def _keep(self, running: _Running) -> str | None:
        """Why the part could not be written; the move can go on from what was written before."""
        try:
            self._journal.keep(Kept(part=running.part, base_version=running.base_version))
        except OSError as error:
            why = error.strerror or str(error)
            log.warning("part of move %s not written: %s", running.part.move, why)
            return why
        return None

    def _closed(self, move: str) -> None:
        self._running.pop(move, None)
        self._ended.append(move)
        self._journal.forget(move)
        self._publish()

    async def _perform(self, running: _Running, effect: m.Do) -> m.NveEvent:
        """Perform one effect; the answer is its event."""
        performer = _Performer(
            running,
            self._hypervisor,
            self._images,
            self._path,
            self._ground,
            self._hold_frames,
        )
        try:
            return await performer.perform(effect)
        except PortFailure as failure:
            back = isinstance(effect, m.SteerHere) and effect.back
            return m.Broken(effect=type(effect).__name__, why=str(failure), back=back)


class _Running:
    """One machine at work. Its record is changed by `take` only."""

    def __init__(self, owner: Handovers, part: Part, base_version: int) -> None:
        self.part = part
        self.base_version = base_version
        self.detoured_before: dict[str, int] = {}
        self._owner = owner
        self._queue: deque[m.Do] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._beside: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    def behind(self, versions: dict[str, int]) -> bool:
        newer = any(versions.get(port.mac, 0) > self.base_version for port in self.part.ports)
        return newer and peer_nve.behind(self.part)

    async def turn(self) -> None:
        """Steer now, as soon as it can, and return when that is done."""
        try:
            async with asyncio.timeout(TURN_LIMIT_S):
                while peer_nve.behind(self.part):
                    self._changed.clear()
                    if self.part.stage == "armed":
                        self.event(m.Steer(move=self.part.move))
                    await self._changed.wait()
        except TimeoutError:
            log.warning("move %s: not turned within %g s", self.part.move, TURN_LIMIT_S)

    def event(self, event: m.NveEvent) -> None:
        step = _MACHINES[self.part.role].step(self.part, event)
        turns_back = isinstance(event, m.GiveBack | m.Restore | m.Close | m.Resumed)
        if isinstance(event, m.Broken) or (turns_back and step[0].stage != self.part.stage):
            self._queue.clear()
        self.take(step)

    def void(self) -> None:
        """Do nothing any more."""
        self._queue.clear()
        for task in (*self._beside, *((self._worker,) if self._worker else ())):
            task.cancel()

    def take(self, step: PartStep) -> None:
        before = self.part
        self.part, effects = step
        self._changed.set()
        if _lasting(self.part) != _lasting(before) or self.part.stage == "arming":
            self._owner._keep(self)  # noqa: SLF001 - one class in two
        for effect in effects:
            if isinstance(effect, m.Say):
                self._owner._say(effect.report)  # noqa: SLF001 - one class in two
            elif isinstance(effect, _BESIDE):
                task = asyncio.create_task(self._watch(effect))
                self._beside.add(task)
                task.add_done_callback(self._beside.discard)
            else:
                self._queue.append(effect)
        if self.part.stage == "closed":
            self._owner._closed(self.part.move)  # noqa: SLF001
        elif self._queue and self._worker is None:
            self._worker = asyncio.create_task(self._work())

    async def _work(self) -> None:
        try:
            while self._queue:
                await self._one(self._queue.popleft())
        finally:
            self._worker = None

    async def _watch(self, effect: m.Do) -> None:
        """Wait beside the queue; a failure is no news once the machine has gone on without it."""
        stage = self.part.stage
        event = await self._owner._perform(self, effect)  # noqa: SLF001
        if not (isinstance(event, m.Broken) and self.part.stage != stage):
            self.event(event)

    async def _one(self, effect: m.Do) -> None:
        self.event(await self._owner._perform(self, effect))  # noqa: SLF001


def _lasting(part: Part) -> Part:
    """What of a part a restarted daemon goes on from.

    Not what changes every few milliseconds; nor how far the stop has come, from which there is only
    the way back (`old_nve`), and in which every write to the disk would be time the VM is deaf.
    """
    part = msgspec.structs.replace(part, memory=Memory(), storage=Storage())
    if part.stage != "stopping":
        return part
    return msgspec.structs.replace(
        part, held_ns=0, drained=False, flowing=False, rescued=0, stop_ns=0
    )


class _Performer:
    """How each effect is done with the ports."""

    def __init__(
        self,
        running: _Running,
        hypervisor: Hypervisor,
        images: Images,
        path: HandoverPath,
        ground: Ground,
        hold_frames: int,
    ) -> None:
        self._running = running
        self._part = running.part
        self._hypervisor = hypervisor
        self._images = images
        self._path = path
        self._ground = ground
        self._hold_frames = hold_frames

    async def perform(self, effect: m.Do) -> m.NveEvent:
        name = type(effect).__name__
        method: Callable[[m.Do], Awaitable[m.NveEvent | None]] = getattr(self, f"_{name}")
        return await method(effect) or m.Done(effect=name)

    @property
    def _vm(self) -> str:
        assert self._part.vm is not None
        return self._part.vm.name

    def _tunnel(self, port: MovingPort) -> Tunnel:
        new = self._part.role == "new"
        return Tunnel(
            number=port.tunnel,
            local=port.new if new else port.old,
            remote=port.old if new else port.new,
            mtu=port.mtu,
            mac=port.mac,
            address=port.ipv6 if port.ila else None,
        )

    async def _MakeTunnel(self, _: m.Do) -> None:
        for port in self._part.ports:
            home = self._part.role == "old"
            await self._path.open_tunnel(port.port, self._tunnel(port), home=home)

    async def _QuietPorts(self, _: m.Do) -> None:
        for port in self._part.ports:
            await self._path.quiet_port(port.port)

    async def _ArmPorts(self, _: m.Do) -> None:
        for port in self._part.ports:
            await self._ground.ready(port.port)
            await self._path.arm_port(port.port, port.device, self._hold_frames)

    async def _ArmPeers(self, _: m.Do) -> None:
        for port in self._part.ports:
            await self._path.arm_peer(port.device, port.mac, self._hold_frames)

    async def _ProvePath(self, _: m.Do) -> None:
        for port in self._part.ports:
            await self._path.cross(port.device, port.new, PROBE_LIMIT_S)

    async def _ReceiveCopy(self, _: m.Do) -> m.Done:
        vm = seen_from(self._part.vm, self._part.nve)
        uri = await self._hypervisor.receive(
            vm, [port.port for port in self._part.ports], self._part.ports[0].new
        )
        return m.Done(effect="ReceiveCopy", text=uri)

    async def _KeepCheckpoints(self, _: m.Do) -> m.Done:
        uri = await self._hypervisor.keep_checkpoints(self._vm, self._part.ports[0].new)
        return m.Done(effect="KeepCheckpoints", text=uri)

    async def _RefuseCheckpoints(self, _: m.Do) -> None:
        await self._hypervisor.refuse_checkpoints(self._vm)

    async def _TakeCheckpoint(self, effect: m.Do) -> m.CheckpointSeen:
        assert isinstance(effect, m.TakeCheckpoint)
        bytes_per_s = self._part.options.bandwidth_bytes_per_s or 0
        taken = await self._hypervisor.checkpoint(
            self._vm, effect.uri, bytes_per_s, self._nothing_comes()
        )
        return m.CheckpointSeen(checkpoint=taken)

    @contextlib.asynccontextmanager
    async def _nothing_comes(self) -> AsyncIterator[None]:
        """Frames wait at the gate, and the VM has what came before (HO-31)."""
        try:
            for port in self._part.ports:
                await self._path.hold_port(port.port)
            await self._drained(CHECKPOINT_DRAIN_S)
            yield
        finally:
            for port in self._part.ports:
                await self._path.release_port(port.port, None)

    async def _AwaitInterval(self, effect: m.Do) -> None:
        assert isinstance(effect, m.AwaitInterval)
        await asyncio.sleep(max(0.0, (effect.until_ns - _now_ns()) / 1e9))

    async def _AwaitCopy(self, _: m.Do) -> m.Done:
        at_ns = await self._hypervisor.received(self._vm, COPY_LIMIT_S)
        return m.Done(effect="AwaitCopy", number=at_ns)

    async def _OfferDisks(self, _: m.Do) -> m.Done:
        assert self._part.vm is not None
        uri = await self._hypervisor.offer_disks(self._part.vm, self._part.ports[0].new)
        return m.Done(effect="OfferDisks", text=uri)

    async def _WithdrawDisks(self, _: m.Do) -> None:
        await self._hypervisor.withdraw_disks(self._vm)
        await self._images.settle(moved_disks(self._part.vm))

    async def _KeepDisks(self, _: m.Do) -> None:
        self._images.keep(self._vm)

    async def _AttachDisks(self, _: m.Do) -> None:
        vm = seen_from(self._part.vm, self._part.nve, self._part.version)
        await self._hypervisor.attach_disks(vm)

    async def _RemoveDisks(self, _: m.Do) -> None:
        self._images.remove(moved_disks(self._part.vm))

    async def _BeginMirror(self, effect: m.Do) -> None:
        assert isinstance(effect, m.BeginMirror)
        assert self._part.vm is not None
        await self._hypervisor.begin_mirror(self._part.vm, effect.uri, effect.bytes_per_s)

    async def _WatchMirror(self, _: m.Do) -> m.MirrorSeen:
        await asyncio.sleep(MIRROR_WATCH_S)
        return m.MirrorSeen(storage=await self._hypervisor.mirrored(self._vm))

    async def _EndMirror(self, _: m.Do) -> None:
        await self._hypervisor.end_mirror(self._vm)

    async def _SendRest(self, _: m.Do) -> None:
        await self._hypervisor.send_rest(self._vm)

    async def _BeginSend(self, effect: m.Do) -> None:
        assert isinstance(effect, m.BeginSend)
        await self._hypervisor.send(self._vm, effect.uri, effect.bytes_per_s)

    async def _WatchTransfer(self, _: m.Do) -> m.TransferSeen:
        passes = self._part.memory.rounds
        await self._hypervisor.progressed(self._vm, passes, WATCH_S)
        return m.TransferSeen(transfer=await self._hypervisor.transfer(self._vm))

    async def _Pace(self, effect: m.Do) -> None:
        assert isinstance(effect, m.Pace)
        await self._hypervisor.pace(self._vm, effect.bytes_per_s, effect.leash_bytes)

    async def _HoldPorts(self, _: m.Do) -> m.Done:
        at_ns = 0
        for port in self._part.ports:
            at_ns = await self._path.hold_port(port.port)
        return m.Done(effect="HoldPorts", number=at_ns)

    async def _AwaitDrained(self, effect: m.Do) -> m.Done:
        assert isinstance(effect, m.AwaitDrained)
        drained = asyncio.create_task(self._drained(effect.timeout_s))
        stopped = asyncio.create_task(self._hypervisor.stopped(self._vm))
        await asyncio.wait((drained, stopped), return_when=asyncio.FIRST_COMPLETED)
        if drained.done():
            stopped.cancel()
            return m.Done(effect="AwaitDrained", number=int(await drained))
        drained.cancel()
        await stopped
        return m.Done(effect="AwaitDrained", number=0)  # nobody empties the ring any more

    async def _drained(self, timeout_s: float) -> bool:
        return all([await self._path.port_drained(p.port, timeout_s) for p in self._part.ports])

    async def _FinishSend(self, _: m.Do) -> None:
        await self._hypervisor.finish(self._vm)

    async def _AwaitStop(self, _: m.Do) -> m.Done:
        return m.Done(effect="AwaitStop", number=await self._hypervisor.stopped(self._vm))

    async def _ReleaseInto(self, effect: m.Do) -> m.Done:
        assert isinstance(effect, m.ReleaseInto)
        rescued = 0
        for port in self._part.ports:
            tunnel = self._tunnel(port) if effect.tunnel else None
            rescued += await self._path.release_port(port.port, tunnel)
        return m.Done(effect="ReleaseInto", number=rescued)

    async def _SteerHere(self, effect: m.Do) -> m.Done:
        assert isinstance(effect, m.SteerHere)
        for port in self._part.ports:
            if self._part.role == "old":
                remote = None if effect.back else port.new
                await self._path.turn(port.device, port.mac, port.port, remote)
                continue
            await self._path.steer(
                port.device,
                port.mac,
                port.old if effect.back else port.new,
                port.port if effect.local else None,
                STEER_LIMIT_S,
            )
        return m.Done(effect="SteerHere", number=_now_ns(), back=effect.back)

    async def _TakeDigest(self, _: m.Do) -> m.Done:
        digests = [await self._hypervisor.digest(self._vm)]
        digests += [await self._images.digest(each) for each in moved_disks(self._part.vm)]
        return m.Done(effect="TakeDigest", text=" ".join(digests))

    async def _Unmute(self, _: m.Do) -> None:
        for port in self._part.ports:
            await self._path.admit_broadcast(port.port)
        await self._ground.unmute([port.port for port in self._part.ports])

    async def _OpenPorts(self, _: m.Do) -> None:
        for port in self._part.ports:
            await self._path.open_port(port.port, PLUG_LIMIT_S)

    async def _ResumeVm(self, _: m.Do) -> m.NveEvent:
        held = 0
        if self._part.role == "new" and self._vm not in await self._hypervisor.names():
            return m.Broken(effect="vm", why="QEMU ended")
        if self._part.role == "new":
            for port in self._part.ports:
                waiting = await self._path.count_port(port.port)
                held += waiting.passed + waiting.redirected
        at_ns = await self._hypervisor.resume(self._vm)
        return m.Done(effect="ResumeVm", number=at_ns, packets=Packets(held=held))

    async def _Announce(self, _: m.Do) -> None:
        for port in self._part.ports:
            if not port.routed:
                await self._ground.announce(port)

    async def _MuteBroadcast(self, _: m.Do) -> None:
        for port in self._part.ports:
            so_far = (await self._path.count_port(port.port)).detoured
            self._running.detoured_before[port.port] = so_far
            await self._path.mute_broadcast(port.port)

    async def _CancelSend(self, _: m.Do) -> None:
        await self._hypervisor.cancel(self._vm)

    async def _DropStale(self, _: m.Do) -> m.NveEvent | None:
        if await self._hypervisor.state(self._vm) in ("running", "paused"):
            return m.Broken(effect="DropStale", why=f"a copy of {self._vm} runs here")
        await self._end_copy()
        return None

    async def _StopCopy(self, _: m.Do) -> None:
        new = self._part.role == "new"
        if new and await self._hypervisor.state(self._vm) == "running":
            # It was activated, and the part on disk is from before that (HO-36).
            log.warning("the copy of %s runs: it is left alone", self._vm)
            return
        await self._end_copy()

    async def _end_copy(self) -> None:
        await self._hypervisor.stop(self._vm)
        if self._part.role == "new":
            self._images.drop(self._vm)  # what was made for the copy goes with it

    async def _CleanUp(self, effect: m.Do) -> m.Done:
        assert isinstance(effect, m.CleanUp)
        if self._part.keep_uri and self._part.role == "new":
            await self._hypervisor.refuse_checkpoints(self._vm)
            if not effect.keep:
                await self._hypervisor.drop_checkpoint(self._vm)
        packets = Packets()
        for port in self._part.ports:
            packets = await self._count(port, packets)
            await self._remove(port)
        return m.Done(effect="CleanUp", packets=packets)

    async def _Forget(self, _: m.Do) -> None:
        for port in self._part.ports:
            await self._remove(port)

    async def _remove(self, port: MovingPort) -> None:
        if self._part.role != "peer":
            await self._path.close_tunnel(port.port, self._tunnel(port))
            await self._path.disarm_port(port.port)
        if self._part.role != "old":
            await self._path.disarm_peer(port.device, port.mac)

    async def _count(self, port: MovingPort, so_far: Packets) -> Packets:
        """Add this NVE's own counts for one interface: each frame is counted at one NVE."""
        if self._part.role == "peer":
            return so_far
        gate = await self._path.count_port(port.port)
        dropped = dict(so_far.dropped)
        for cause, count in (("hold_full", gate.overflowed), ("ring_full", gate.ring_full)):
            if count:
                dropped[cause] = dropped.get(cause, 0) + count
        if self._part.role == "new":
            return msgspec.structs.replace(
                so_far, dropped=dropped, first_direct_ns=gate.first_passed_ns
            )
        before = self._running.detoured_before.get(port.port)
        late = gate.detoured - before if before is not None else 0
        return msgspec.structs.replace(
            so_far,
            dropped=dropped,
            redirected=so_far.redirected + gate.redirected,
            late=so_far.late + late,
            last_redirected_ns=max(so_far.last_redirected_ns, gate.last_detoured_ns),
            first_direct_ns=gate.first_local_ns,
        )


def _now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_REALTIME)
