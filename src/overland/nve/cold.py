"""Carries out this host's orders of cold moves.

The NVE keeps no part of a cold move: what stands is what the hypervisor has on this host, a process
or a saved state, and each order is content with being done already (ADR 0015). `ColdSteps` is what
an order comes to, `ColdMoves` when: one order of a move is under way at a time, and the next one
takes its place, so that an order to turn back never waits for a state that is being carried.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, assert_never

from overland.mobility import messages as m
from overland.model.cluster import Vm, moved_disks, seen_from
from overland.model.handover import Memory, Packets, Storage, has_state, is_up
from overland.model.names import bridge_name
from overland.model.ticket import Seal, Ticket, ticket_refusal
from overland.ports import Hypervisor, HypervisorFailure, Images, PortFailure

log = logging.getLogger(__name__)

REMEMBERED = 1000
"""Moves of which an NVE knows that they end; of an older one no order is under way any more."""


class Ground(Protocol):
    """What a cold move needs of the agent beside it."""

    async def ready(self, port: str) -> None:
        """Wait until `port` is in the kernel; KernelFailure when it does not come."""
        ...

    async def dropped_in_transit(self, bridge: str, mac: str) -> dict[str, int]:
        """Frames to `mac` dropped since it was marked, by port; taken once."""
        ...


class ColdSteps:
    """`address`: where states are taken. `opened` as in `nve.handovers`. `now_ns`: CLOCK_REALTIME.

    `seen` is told what became of a VM here: its state, None when nothing of it is left.
    """

    def __init__(
        self,
        nve: str,
        address: str,
        hypervisor: Hypervisor,
        images: Images,
        ground: Ground,
        opened: Callable[[Seal | None], Ticket | str],
        seen: Callable[[str, str | None], None],
        now_ns: Callable[[], int],
    ) -> None:
        self._nve = nve
        self._address = address
        self._hypervisor = hypervisor
        self._images = images
        self._ground = ground
        self._opened = opened
        self._seen = seen
        self._now_ns = now_ns
        self._ending: deque[str] = deque(maxlen=REMEMBERED)

    def still(self, order: m.ColdOrder) -> bool:
        """Whether `order` is to be carried out: not after one that ends its move here (HO-69).

        A restarted daemon need not remember: late orders end with the connection.
        """
        if isinstance(order, m.Associate | m.Suspend | m.GiveState):
            return order.move not in self._ending
        if order.move not in self._ending:
            self._ending.append(order.move)
        return True

    async def carry_out(self, order: m.ColdOrder) -> m.AnyReport:
        """Do what `order` says, unless it is done already; what it came to, good or bad."""
        try:
            return await self._report(order)
        except PortFailure as failure:
            return self._failed(order, type(order).__name__, str(failure))

    def _failed(self, order: m.ColdOrder, step: str, why: str) -> m.Failed:
        return m.Failed(move=order.move, nve=self._nve, step=step, why=why)

    async def _report(self, order: m.ColdOrder) -> m.AnyReport:
        move, nve = order.move, self._nve
        match order:
            case m.Associate():
                await self._associate(order)
                return await self._await(order)
            case m.Suspend():
                return await self._suspend(order)
            case m.GiveState():
                return await self._give(order)
            case m.WakeUp() | m.DropState():
                why = self._refusal(order)
                if why is not None:
                    log.warning("move %s: %s refused: %s", move, type(order).__name__, why)
                    return self._failed(order, "ticket", why)
                return await (self._wake if isinstance(order, m.WakeUp) else self._drop)(order)
            case m.Return():
                await self._return(order)
                return m.Restored(move=move, nve=nve)
            case m.DropCopy():
                await self._drop_taken(order)
                return m.GivenBack(move=move, nve=nve)
            case m.Count():
                return await self._count(order)
            case _:
                assert_never(order)

    def _refusal(self, order: m.WakeUp | m.DropState) -> str | None:
        """A copy runs, or ends, with the NVA's ticket for this very move only (HO-27)."""
        ticket = self._opened(order.seal)
        if isinstance(ticket, str):
            return ticket
        return ticket_refusal(
            ticket,
            move=order.move,
            vm=order.vm.name,
            ports=order.ports,
            nve=self._nve,
            base_version=order.vm.version,
            now_ns=self._now_ns(),
        )

    async def _associate(self, order: m.Associate) -> None:
        name = order.vm.name
        here = await self._hypervisor.state(name)
        if here in ("running", "paused"):
            raise HypervisorFailure(f"a copy of {name} runs here")
        if here is not None or not may_be_last(order.vm, self._nve):
            await self._hypervisor.stop(name)  # what a former stay or move left
        for port in order.ports:
            await self._ground.ready(port.port)

    async def _suspend(self, order: m.Suspend) -> m.Stopped:
        stop_ns = await self._hypervisor.suspend(order.vm.name)
        self._seen(order.vm.name, "suspended")
        size = await self._hypervisor.saved_bytes(order.vm.name)
        memory = Memory(total_bytes=size, remaining_bytes=size)
        move, nve = order.move, self._nve
        return m.Stopped(move=move, nve=nve, held_ns=0, stop_ns=stop_ns, memory=memory)

    async def _await(self, order: m.Associate) -> m.Prepared:
        """From now on what is carried may come."""
        move, vm, uri = order.move, order.vm, ""
        if has_state(vm):
            uri = await self._hypervisor.take_state(move, self._address)
        disks = await self._images.take(move, moved_disks(vm), self._address)
        return m.Prepared(move=move, nve=self._nve, uri=uri, disks_uri=" ".join(disks))

    async def _give(self, order: m.GiveState) -> m.Received:
        """The disks as they are once nobody writes them any more."""
        state = sent = 0
        if order.uri:
            state = await self._hypervisor.give_state(order.vm.name, order.uri)
        for disk, uri in zip(moved_disks(order.vm), order.disks_uri.split(), strict=True):
            sent += await self._images.give(disk, uri)
        return m.Received(
            move=order.move,
            nve=self._nve,
            at_ns=self._now_ns(),
            state_bytes=state,
            storage=Storage(total_bytes=sent, sent_bytes=sent),
        )

    async def _wake(self, order: m.WakeUp | m.DropState) -> m.Running | m.Crashed:
        """Its interfaces are activated: the push that says so came before (HO-22)."""
        try:
            await self._images.keep_taken(order.move, moved_disks(order.vm))
        except PortFailure as failure:
            return m.Crashed(move=order.move, nve=self._nve, why=str(failure))
        try:
            if has_state(order.vm):
                await self._hypervisor.keep_state(order.vm.name, order.move)
                self._seen(order.vm.name, "suspended")
        except PortFailure as failure:
            return m.Crashed(move=order.move, nve=self._nve, why=str(failure), gone=True)
        try:
            at_ns = self._now_ns()
            if is_up(order.vm):
                for port in order.ports:
                    await self._ground.ready(port.port)
                ports = [port.port for port in order.ports]
                vm = seen_from(order.vm, self._nve, order.version)
                at_ns = await self._hypervisor.wake(vm, ports)
                self._seen(order.vm.name, order.vm.state)
        except PortFailure as failure:
            return m.Crashed(move=order.move, nve=self._nve, why=str(failure))
        return m.Running(move=order.move, nve=self._nve, at_ns=at_ns, held=0)

    async def _drop(self, order: m.WakeUp | m.DropState) -> m.Closed:
        await self._hypervisor.stop(order.vm.name)
        self._images.remove(moved_disks(order.vm))
        self._seen(order.vm.name, None)
        return await self._count(order)

    async def _return(self, order: m.Return) -> None:
        for port in order.ports:
            await self._ground.ready(port.port)
        name = order.vm.name
        here = await self._hypervisor.state(name) or await self._hypervisor.saved_bytes(name)
        if here:  # else it has crashed meanwhile, which has been said
            vm = seen_from(order.vm, self._nve)
            await self._hypervisor.back_to(vm, [port.port for port in order.ports])
            self._seen(name, order.vm.state)

    async def _drop_taken(self, order: m.ColdOrder) -> None:
        """What was taken for the move and has not become the VM's own."""
        await self._hypervisor.drop_taken(order.move)
        await self._images.drop_taken(order.move, moved_disks(order.vm))

    async def _count(self, order: m.ColdOrder) -> m.Closed:
        """At the old NVE what other NVEs sent came although they had said that they drop."""
        old = self._nve == order.vm.host
        dropped = residual = 0
        for port in order.ports:
            found = await self._ground.dropped_in_transit(bridge_name(port.vni), port.mac)
            late = found.pop(port.device, 0) if old else 0
            residual += late
            dropped += sum(found.values())
        packets = Packets(dropped={"in_transit": dropped}, residual=residual)
        return m.Closed(move=order.move, nve=self._nve, packets=packets)


Stateless = m.ColdOrder | m.DiskOrder
"""An order that says all: the NVE keeps no part of what it belongs to."""


class Steps(Protocol):
    """What such orders come to."""

    def still(self, order: Any) -> bool:
        """Whether `order` is to be carried out, or comes late."""
        ...

    async def carry_out(self, order: Any) -> m.AnyReport:
        """Do what `order` says, unless it is done already."""
        ...


class ColdMoves:
    """One order at a time of each move, or disk's move; `say` is told what it came to."""

    def __init__(self, steps: Steps, say: Callable[[m.AnyReport], None]) -> None:
        self._steps = steps
        self._say = say
        self._at_work: dict[str, tuple[Stateless, asyncio.Task[None]]] = {}

    def order(self, order: Stateless) -> None:
        """Begin `order`; its answer comes as a report. One that is under way goes on."""
        if not self._steps.still(order):
            return
        before = self._at_work.get(order.move)
        if before is not None:
            former, task = before
            if type(former) is type(order) and not task.done():
                return
            task.cancel()
        task = asyncio.create_task(self._carry_out(order, before[1] if before else None))
        self._at_work[order.move] = (order, task)
        task.add_done_callback(lambda done: self._done(order.move, done))

    def _done(self, move: str, task: asyncio.Task[None]) -> None:
        if self._at_work.get(move, (None, None))[1] is task:
            del self._at_work[move]

    async def _carry_out(self, order: Stateless, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait({before})
        self._say(await self._steps.carry_out(order))


def may_be_last(vm: Vm, nve: str) -> bool:
    """Whether a state of `vm` at `nve`, where it is not, may be the only good one (HO-43).

    So it is of a VM that did not wake after its move: the old state goes when the VM is up.
    """
    return vm.state == "suspended" and vm.host != nve
