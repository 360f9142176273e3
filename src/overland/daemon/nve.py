"""The NVE daemon: kernel, hypervisor, handovers and the link to the NVA in one loop."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from pyroute2 import AsyncIPRoute

from overland.config import NveConfig
from overland.daemon import run_first
from overland.dataplane.announce import announce
from overland.dataplane.gates import Gates
from overland.dataplane.gateway import Gateways
from overland.dataplane.handover import LinuxHandoverPath
from overland.dataplane.hold import Injectors
from overland.dataplane.ila import Ila
from overland.dataplane.linux import LinuxKernel
from overland.dataplane.nftables import Nftables
from overland.dataplane.preflight import (
    blockers,
    kernel_blockers,
    underlay_device,
    underlay_mtu,
)
from overland.dataplane.reach import answers
from overland.dataplane.router import Routers
from overland.dataplane.tap import TapTable
from overland.hypervisor.exporter import RETRY_S, Exporter, not_reached
from overland.hypervisor.images import Images
from overland.hypervisor.mirror import credentials
from overland.hypervisor.qemu import QemuHypervisor
from overland.mobility.messages import (
    AnyOrder,
    AnyReport,
    ColdOrder,
    DiskOrder,
    PrepareNew,
    PrepareOld,
    PreparePeer,
)
from overland.model.cluster import Host, Vm, numbered, ports_of
from overland.model.names import port_name
from overland.model.nve import NveIntent, VnIntent, changed
from overland.model.ticket import Seal, Ticket
from overland.nve.agent import Agent
from overland.nve.alone import DiskSteps
from overland.nve.cold import ColdMoves, ColdSteps, may_be_last
from overland.nve.handovers import Handovers
from overland.nve.journal import PartJournal
from overland.nve.revisions import Revisions
from overland.ports import PortFailure, Unplugged
from overland.wire import messages as w
from overland.wire import tls
from overland.wire.client import WireClient
from overland.wire.seal import Forged, opened

log = logging.getLogger(__name__)

_Turn = w.VnPush | w.VnUpdate | w.Complete | w.VmOrder | AnyOrder | ColdOrder
_Order = AnyOrder | ColdOrder | DiskOrder


class Nve:
    """One host's edge."""

    def __init__(self, config: NveConfig, ip: AsyncIPRoute) -> None:
        self._config = config
        taps = TapTable()
        gates = Gates(ip)
        nft = Nftables()
        nft.ensure()
        injectors = Injectors()
        self._routers = Routers(ip, config.namespace_prefix)
        self._gateways = Gateways(ip, config.namespace_prefix)
        self._ila = Ila(ip)
        self._taps = taps
        run_dir = Path(config.run_dir)
        self._images = Images(Path(config.disk_dir or run_dir / "disks"), run_dir / "images")
        pems = (config.tls.ca, config.tls.certificate, config.tls.key)
        tls_dir = credentials(run_dir / "tls", *map(Path, pems))
        self._hypervisor = QemuHypervisor(run_dir, taps, self._images, tls_dir, config.qemu)
        address = config.underlay_ipv4 or config.underlay_ipv6 or ""
        self._exporter = Exporter(
            run_dir / ".exporter", self._images, tls_dir, address, config.storage_port
        )
        self._serving = 0
        self._agent = Agent(
            LinuxKernel(
                *(ip, nft, gates, taps, self._routers, self._gateways, self._ila),
                config.hold_frames,
            ),
            lambda port: announce(port, injectors.into(port.device, mark=0), taps.fd(port.port)),
        )
        self._handovers = Handovers(
            config.host,
            self._hypervisor,
            self._images,
            LinuxHandoverPath(ip, gates, taps, injectors, self._ila),
            self._agent,
            self._say,
            config.hold_frames,
            PartJournal(run_dir / "moves"),
            self._opened,
        )
        cold_steps = ColdSteps(
            config.host,
            address,
            self._hypervisor,
            self._images,
            self._agent,
            self._opened,
            self._saw,
            time.time_ns,
        )
        self._cold = ColdMoves(cold_steps, self._say)
        disk_steps = DiskSteps(config.host, self._hypervisor, self._images, time.time_ns)
        self._alone = ColdMoves(disk_steps, self._say)
        self._host = Host(name=config.host)
        self._vns: dict[str, VnIntent] = {}
        self._revisions = Revisions()
        self._states: dict[str, str] = {}
        self._turns: asyncio.Queue[_Turn] = asyncio.Queue()
        self._tasks: set[asyncio.Task[Any]] = set()
        context = tls.context(
            Path(config.tls.ca), Path(config.tls.certificate), Path(config.tls.key), server=False
        )
        self._link = WireClient(config.nva, context, self._hello, self._heard)

    async def run(self) -> None:
        if self._config.locator is not None:
            device = await underlay_device(self._config.underlay_ipv6)
            await self._ila.start(self._config.locator, device)
        for name in await self._hypervisor.find():
            self._states[name] = await self._hypervisor.state(name) or "crashed"
        self._states |= dict.fromkeys(await self._hypervisor.saved(), "suspended")
        for part in self._handovers.parts():
            if part.vm is not None and part.vm.name in self._states:
                for port in part.ports:
                    self._adopt(part.vm.name, port.port)
        await self._exporter.find()
        await self._handovers.resume()
        await self._routers.sweep()
        await self._gateways.sweep()
        self._host = await self._facts()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._agent.run())
            group.create_task(self._apply())
            group.create_task(self._watch())
            group.create_task(self._exporter.keep())
            group.create_task(self._link.run())

    async def _facts(self) -> Host:
        config = self._config
        host = Host(
            name=config.host,
            underlay_ipv4=config.underlay_ipv4,
            underlay_ipv6=config.underlay_ipv6,
            locator=config.locator,
            storage_port=config.storage_port,
            underlay_mtu=await underlay_mtu(config.underlay_ipv4 or config.underlay_ipv6),
            memory_total_mib=config.memory_mib or _memory_mib(),
            blockers=(*blockers(), *await kernel_blockers()),
        )
        try:
            facts = await self._hypervisor.facts()
        except PortFailure as failure:
            return msgspec.structs.replace(host, blockers=(*host.blockers, str(failure)))
        if facts.notice:
            log.warning("%s", facts.notice)
        return msgspec.structs.replace(
            host,
            accelerator=facts.accelerator,
            hypervisor_version=facts.version,
            pauses_by=facts.pauses_by,
            machine_types=facts.machine_types,
            cpu_models=facts.cpu_models,
        )

    # ------------------------------------------------------------ the link

    def _hello(self) -> w.Hello:
        return w.Hello(
            protocol=w.PROTOCOL,
            host=self._host,
            known=dict(self._revisions.newest),
            vms=dict(self._states),
            moves=tuple(
                sorted(
                    {
                        *self._handovers.open_moves(),
                        *self._hypervisor.taken(),
                        *self._images.taken(),
                    }
                )
            ),
        )

    def _opened(self, seal: Seal | None) -> Ticket | str:
        try:
            return opened(seal, Path(self._config.tls.ca))
        except Forged as forged:
            return str(forged)

    def _say(self, report: AnyReport) -> None:
        self._link.send(w.MoveReport(report=report))

    def _heard(self, message: w.FromNva) -> None:
        match message:
            case (
                w.VnPush(network=network, revision=revision)
                | w.VnUpdate(network=network, revision=revision)
            ):
                self._revisions.heard(network, revision)
                self._turns.put_nowait(message)
            case w.Complete():
                self._turns.put_nowait(message)
            case w.MoveOrder(order=order):
                self._ordered(order)
            case w.VmOrder():
                self._turns.put_nowait(message)
            case w.HostQuestion(id=number, address=address):
                self._later(self._look(number, address))
            case w.FilesQuestion(id=number, paths=paths):
                missing = tuple(path for path in paths if not os.access(path, os.R_OK))
                self._link.send(w.FilesAnswer(id=number, missing=missing))
            case w.DisksQuestion() | w.ExporterQuestion() | w.ReachQuestion():
                self._later(self._disks(message))
            case w.Serve():
                self._serving = message.revision
                self._later(self._serve(message))
            case w.Unsupported(why=why):
                log.warning("NVA does not understand: %s", why)
            case w.Welcome():
                self._revisions.connected()
                self._handovers.reconnected()
            case w.Answer():
                pass

    def _ordered(self, order: _Order) -> None:
        """What stands on a push that was sent before waits until the kernel has that (HO-22)."""
        if isinstance(order, DiskOrder):
            self._alone.order(order)
        elif isinstance(order, PrepareNew | PrepareOld | PreparePeer | ColdOrder):
            self._turns.put_nowait(order)
        else:
            self._handovers.order(order)

    async def _look(self, number: int, address: str) -> None:
        self._link.send(w.HostAnswer(id=number, answers=await answers(address)))

    async def _disks(
        self, question: w.DisksQuestion | w.ExporterQuestion | w.ReachQuestion
    ) -> None:
        match question:
            case w.DisksQuestion(id=number, disks=disks):
                states = await self._images.look(disks)
                self._link.send(w.DisksAnswer(id=number, states=states))
            case w.ExporterQuestion(id=number):
                why = await self._no_exporter()
                self._link.send(w.ExporterAnswer(id=number, failure=why))
            case w.ReachQuestion(id=number, uri=uri):
                self._link.send(w.ReachAnswer(id=number, failure=await not_reached(uri)))

    async def _no_exporter(self) -> str | None:
        try:
            await self._exporter.ready()
        except PortFailure as failure:
            return str(failure)
        return None

    async def _serve(self, order: w.Serve) -> None:
        """Until it is done, or something else is wanted: of what fails the NVA hears at once."""
        while self._serving == order.revision:
            failures = await self._exporter.serve(order.exports)
            self._link.send(w.Served(revision=order.revision, failures=failures))
            if not failures:
                return
            await asyncio.sleep(RETRY_S)

    def _later(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _apply(self) -> None:
        """Bring each push into the kernel, then acknowledge it (HO-12)."""
        while True:
            push = await self._turns.get()
            if isinstance(push, w.VmOrder):
                self._later(self._vm_order(push))
                continue
            if isinstance(push, w.Complete):
                self._agent.complete()
                continue
            if isinstance(push, ColdOrder):
                self._cold.order(push)
                continue
            if not isinstance(push, w.VnPush | w.VnUpdate):
                self._handovers.order(push)
                continue
            if not self._news(push):
                continue
            pushed = self._pushed(push)
            if pushed is None:
                self._vns.pop(push.network, None)
            else:
                self._vns[push.network] = pushed
            await self._adopt_all(pushed)
            if pushed is not None:
                await self._handovers.turned({each.mac: each.version for each in pushed.remotes})
            intent = NveIntent(vns=tuple(self._vns[name] for name in sorted(self._vns)))
            try:
                failures = tuple(failure.why for failure in await self._agent.want(intent))
            except PortFailure as failure:
                failures = (str(failure),)
            self._revisions.applied(push.network, push.revision, held=pushed is not None)
            self._link.send(
                w.Ack(
                    network=push.network,
                    revision=push.revision,
                    versions=push.versions,
                    failures=failures,
                )
            )

    def _news(self, push: w.VnPush | w.VnUpdate) -> bool:
        """An update changes one revision and no other; else the whole is asked for."""
        base = push.base if isinstance(push, w.VnUpdate) else None
        judgement = self._revisions.judge(push.network, push.revision, base)
        if judgement == "ask":
            self._link.send(w.Resync(network=push.network))
        return judgement == "take"

    def _pushed(self, push: w.VnPush | w.VnUpdate) -> VnIntent | None:
        if isinstance(push, w.VnPush):
            return push.intent
        return changed(self._vns[push.network], push.change)

    async def _adopt_all(self, intent: VnIntent | None) -> None:
        """After a restart: take back a descriptor of each tap that a living VM has.

        Not of one that is associated only: it has it not yet, or nobody needs it before it has.
        """
        living = await self._hypervisor.names()
        for tsi in intent.tsis if intent is not None else ():
            if tsi.owner in living and tsi.kind == "tap" and tsi.state == "activated":
                self._adopt(tsi.owner, port_name(tsi.owner, tsi.index))

    def _adopt(self, vm: str, port: str) -> None:
        try:
            self._hypervisor.adopt(vm, port)
        except PortFailure as failure:
            log.warning("%s", failure)

    # ------------------------------------------------------------ VMs

    async def _vm_order(self, order: w.VmOrder) -> None:
        try:
            answer = await self._carried_out(order)
        except PortFailure as error:
            answer = w.VmAnswer(id=order.id, failure=str(error))
        self._link.send(answer)
        state = self._states.get(order.vm.name)
        if state in ("running", "paused", "suspended"):
            # The NVA that asked may not be there any more to hear the answer.
            self._link.send(w.VmReport(vm=order.vm.name, state=state))

    async def _carried_out(self, order: w.VmOrder) -> w.VmAnswer:
        name = order.vm.name
        match order.action:
            case "gauge":
                return w.VmAnswer(id=order.id, gauge=await self._hypervisor.gauge(name))
            case "look":
                await self._look_at(order.vm)
                return w.VmAnswer(id=order.id)
            case "forget":
                await self._hypervisor.drop_checkpoint(name)
                return w.VmAnswer(id=order.id)
            case "fit":
                await self._hypervisor.fit(order.vm, await self._ports_of(order.vm))
                return w.VmAnswer(id=order.id)
            case "recover":
                ports = await self._ports_of(order.vm)
                at_ns = await self._hypervisor.recover(order.vm, ports)
                self._states[name] = "running"
                return w.VmAnswer(id=order.id, at_ns=at_ns)
            case action:
                await self._vm_do(action, order.vm)
                return w.VmAnswer(id=order.id)

    async def _look_at(self, vm: Vm) -> None:
        """What there is of a VM, from its process or, without one, from its files."""
        name, state = vm.name, await self._hypervisor.state(vm.name)
        if state is None:
            self._saw(name, "suspended" if await self._hypervisor.saved_bytes(name) else None)
        elif state in ("running", "paused"):
            self._saw(name, state)
            there = await self._hypervisor.plugged(name)
            for slot in {slot for slot, each in numbered(vm) if not each.change} - there:
                self._link.send(w.Unplugged(vm=name, slot=slot))
        if state is None and name not in self._states:
            self._link.send(w.VmReport(vm=name, state="crashed", reason="it is not there"))

    async def _ports_of(self, vm: Vm) -> list[str]:
        """The VM's ports, once the kernel has them."""
        ports = ports_of(vm)
        for port in ports:
            await self._agent.ready(port)
        return ports

    async def _vm_do(self, action: str, vm: Vm) -> None:
        old = action == "stop" and may_be_last(vm, self._config.host)
        if old and await self._hypervisor.state(vm.name) is None:
            log.warning("the old state of VM %s stays until the VM is up elsewhere", vm.name)
            return
        ports = ports_of(vm)
        does: dict[str, Callable[[], Awaitable[Any]]] = {
            "start": lambda: self._hypervisor.start(vm, ports),
            "pause": lambda: self._hypervisor.pause(vm.name),
            "suspend": lambda: self._hypervisor.suspend(vm.name),
            "wake": lambda: self._hypervisor.wake(vm, ports),
            "resume": lambda: self._hypervisor.resume(vm.name),
            "stop": lambda: self._hypervisor.stop(vm.name),
        }
        if action in ("start", "wake"):
            for port in ports:
                await self._agent.ready(port)
        await does[action]()
        states = {"start": "running", "wake": "running", "resume": "running"}
        states |= {"pause": "paused", "suspend": "suspended"}
        self._saw(vm.name, states.get(action))

    def _saw(self, vm: str, state: str | None) -> None:
        """What this host has of a VM now, for the next Hello."""
        if state is not None:
            self._states[vm] = state
        else:
            self._states.pop(vm, None)

    async def _watch(self) -> None:
        """Tell what the hypervisor itself says of its VMs."""
        async for name, state in self._hypervisor.events():
            if isinstance(state, Unplugged):
                self._link.send(w.Unplugged(vm=name, slot=state.slot))
                continue
            self._states[name] = state
            if state == "crashed":
                self._handovers.vm_died(name, "QEMU ended")
                self._states.pop(name, None)
                # Whether this copy was the VM is for the NVA to say: the record tells where it is.
                self._link.send(w.VmReport(vm=name, state=state, reason="QEMU ended"))


async def run_nve(config: NveConfig) -> None:
    """Run until killed. PortFailure when this host cannot be an NVE at all."""
    run_first()
    async with AsyncIPRoute() as ip:
        await Nve(config, ip).run()


def _memory_mib() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
