"""The NVA daemon: store, authority, handovers, the NVEs' wire and the REST API in one loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
import uvloop

from overland.api.rest import GatewayWish, create_app
from overland.api.standby import standing_by
from overland.config import Dns, NvaConfig
from overland.daemon import run_first
from overland.dataplane.namespace import inside
from overland.mobility import saga
from overland.mobility.coordinator import close_order, recoverable
from overland.mobility.forecast import forecast, seen_before
from overland.mobility.messages import (
    Activate,
    AnyReport,
    Closed,
    Crashed,
    DiskOrder,
    DropState,
    Failed,
    Progress,
    Restored,
    Retire,
    WakeUp,
)
from overland.model.cluster import (
    Disk,
    DiskState,
    Gateway,
    Interface,
    Mapping,
    Policy,
    Refused,
    Vm,
    left_at,
)
from overland.model.eligibility import Signed
from overland.model.forecast import Forecast
from overland.model.handover import ENDED, DiskChoice, Handover, Options
from overland.model.nve import TsiIntent
from overland.model.readdress import Readdress
from overland.model.receipt import receipt, timestamp
from overland.model.ticket import ticket_of
from overland.nva import rules, storage
from overland.nva.authority import Authority, Blocked
from overland.nva.cluster import AT_REST
from overland.nva.eligibility import longest_outage_ms
from overland.nva.former import FormerAddresses
from overland.nva.handovers import (
    RETRY_S,
    Handovers,
    Told,
    drop_kept,
    farewells,
    last_disk_orders,
    last_orders,
    state_since,
    turn_back,
)
from overland.nva.interfaces import named
from overland.nva.leadership import Leader, Leadership
from overland.nva.liveness import Liveness
from overland.nva.mapping import VnView
from overland.nva.plugging import Plugging
from overland.nva.pushes import Pushes, Update, Whole
from overland.ports import Conflict, PortFailure, StoreFailure
from overland.store.etcd import EtcdStore
from overland.store.sqlite import SqliteStore
from overland.wire import dns as names
from overland.wire import messages as w
from overland.wire import tls
from overland.wire.seal import Forged, Sealer, stated
from overland.wire.server import WireServer

_STATE_MEANWHILE = {"start": "preparing", "wake": "resuming", "suspend": "suspending"}
_STATE_AFTER = {
    "start": "running",
    "resume": "running",
    "wake": "running",
    "pause": "paused",
    "suspend": "suspended",
    "stop": "shutdown",
}
VM_ORDER_LIMIT_S = 60.0
ASSOCIATE_LIMIT_S = 10.0
FIT_LIMIT_S = 25.0
REPAIR_LIMIT_S = 3.0
RECOVER_LIMIT_S = 15.0
NEGATIVE_100MS = 20
MEMBERS_DELAY_S = 0.1
ANSWER_LIMIT_S = 3.0
GAUGE_LIMIT_S = 4.0
REACH_LIMIT_S = 5.0

log = logging.getLogger(__name__)


_Question = (
    w.HostQuestion
    | w.FilesQuestion
    | w.DisksQuestion
    | w.ExporterQuestion
    | w.ReachQuestion
    | w.VmOrder
)


class Domain:
    """One NVA: hears the NVEs, pushes to them, and serves the API's wishes."""

    def __init__(self, config: NvaConfig) -> None:
        self._config = config
        self._leadership = _leadership(config)
        ledger = self._leadership or SqliteStore(Path(config.store))
        self.authority = Authority(ledger, self._networks_changed)
        self._wire = WireServer(self)
        self._sealer: Sealer | None = None
        self.handovers = Handovers(self.authority, self._tell, self._move_changed, self._serve)
        self._serving: dict[str, w.Serve] = {}
        self._served: set[str] = set()
        self._plugging = Plugging(self.authority, self)
        self._former = FormerAddresses(self.authority.give_up)
        self._naming = asyncio.Lock()
        self._pushes = Pushes(time.time_ns())
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._liveness = Liveness(self._others, self._ask, self._found)
        self._acks = asyncio.Condition()
        self._leases: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._move_events: dict[str, asyncio.Condition] = {}
        self._latest: dict[str, Handover] = {}
        self._members_due: asyncio.TimerHandle | None = None
        self._complete = False
        self._began = False
        self._api: uvicorn.Server | None = None

    async def run(self) -> str:
        """Serve until `stop`; returns why, when this NVA may not be the active one any more."""
        run_first()
        api = _api_socket(self._config)
        app = create_app(self)
        if self._leadership is None:
            await self._begin()
        else:
            app = standing_by(app, self._is_active, self._leader_api)
        self._api = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        serving = asyncio.create_task(self._api.serve(sockets=[api]))
        leading = asyncio.create_task(self._lead())
        await asyncio.wait({serving, leading}, return_when=asyncio.FIRST_COMPLETED)
        why = leading.result() if leading.done() else ""
        if serving.done():
            serving.result()
        for task in (serving, leading):
            task.cancel()
        await self._end()
        return why

    async def _begin(self) -> None:
        """Read the records, hear the NVEs, go on with the open moves."""
        config = self._config
        await self.authority.load()
        certificate, key = Path(config.tls.certificate), Path(config.tls.key)
        context = tls.context(Path(config.tls.ca), certificate, key, server=True)
        self._sealer = Sealer(certificate, key)
        try:
            await self._wire.listen(config.wire_address, config.wire_port, context)
        except OSError as error:
            at = f"{config.wire_address}:{config.wire_port}"
            raise PortFailure(f"cannot listen on {at}: {error.strerror}") from None
        asyncio.get_running_loop().call_later(config.lease_s, self._first_lease_ended)
        await self.handovers.recover()
        for vm in self.authority.cluster.vms.values():
            self._former.look(vm)
        for record in self.authority.left_addresses():
            self._name_follows(record.id)
        self._began = True

    async def _lead(self) -> str:
        """Stand by, be the active one, and return why that has ended (N-10)."""
        leadership = self._leadership
        if leadership is None:  # with a store of its own there is nobody to lose it to
            never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            return await never
        await leadership.win()
        log.warning("this NVA is the active one")
        keeping = asyncio.create_task(leadership.keep())
        try:
            await self._begin()
            return await keeping
        except StoreFailure as failure:
            return str(failure)
        finally:
            keeping.cancel()

    def _is_active(self) -> bool:
        return self._began and self._leadership is not None and self._leadership.leads()

    def _leader_api(self) -> str | None:
        """None also while this NVA itself is on its way to be the active one."""
        seen = self._leadership.seen if self._leadership is not None else None
        return seen.api if seen is not None and seen.name != _name(self._config) else None

    async def _end(self) -> None:
        self._wire.close()
        self._liveness.close()
        self._former.close()
        for timer in self._leases.values():
            timer.cancel()
        if self._leadership is not None:
            await self._leadership.close()

    def stop(self) -> None:
        """Let `run` return; the NVEs go on with what they have."""
        if self._api is not None:
            self._api.should_exit = True

    def _later(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------ what NVEs say

    def connected(self, host: str, hello: w.Hello) -> None:
        timer = self._leases.pop(host, None)
        if timer is not None:
            timer.cancel()
        self._wire.send(host, w.Welcome(protocol=w.PROTOCOL, lease_s=self._config.lease_s))
        self._pushes.has(host, hello.known)
        if self.authority.host_seen(hello.host):
            self._members_changed()
        if not self._complete and self._expected() <= self.authority.cluster.hosts.keys():
            self._is_complete()
        for network in {*self.authority.cluster.networks, *hello.known}:
            self._push(host, network, self._view(network), again=True)
        if self._complete:
            self._wire.send(host, w.Complete())
        self._serve({host})
        answers = self.authority.cluster.hosts[host].answers
        self._liveness.connected(host, answers=answers)
        self._later(self._keep_host(host))
        self.handovers.back(host)
        self._plugging.back(host)
        for move in hello.moves:
            self._settle(host, move)
        self._compare(host, hello.vms, hello.moves)
        for record in self.authority.to_turn_back(host):
            self._tell(host, turn_back(record))

    def _expected(self) -> set[str]:
        """The hosts that must be heard of before what is known of a network is all of it."""
        return {tsi.host for tsi in self.authority.cluster.tsis()}

    def _is_complete(self) -> None:
        """After a start: all hosts have been heard, or those that have not are dead (N-21).

        Until then nothing is pushed, and the NVEs forward with what they have (6-10).
        """
        if not self._complete:
            self._complete = True
            self._networks_changed(frozenset(self.authority.cluster.networks))
            for host in sorted(self._wire.hosts()):
                self._wire.send(host, w.Complete())

    def _first_lease_ended(self) -> None:
        """Whoever was there before the restart and has not come back by now is away."""
        self._is_complete()
        for host in self.authority.cluster.hosts.keys() - self._wire.hosts():
            self._lease_ended(host)

    def _settle(self, host: str, move_id: str) -> None:
        """An NVE still has a part in a move that has ended: tell it how (HO-21).

        A copy that was recovered elsewhere meanwhile is ended before its move is settled (HO-35).
        """
        record = self.authority.move(move_id)
        if self.handovers.record(move_id) is not None or record is None:
            return
        vm = self.authority.cluster.vms.get(record.vm.name)
        lost = recoverable(record) and host == record.old_nve
        if lost and vm is not None and vm.host != host:
            self._later(self._settle_after_stop(host, record, vm))
        else:
            self._tell_how_it_ended(host, record)

    async def _settle_after_stop(self, host: str, record: Handover, vm: Vm) -> None:
        log.warning("NVE %s has an old copy of VM %s: it is stopped", host, vm.name)
        try:
            await self._order("stop", vm, host)
        except Blocked as blocked:
            log.warning("move %s is not settled at %s: %s", record.id, host, blocked)
            return
        self._tell_how_it_ended(host, record)

    def _tell_how_it_ended(self, host: str, record: Handover) -> None:
        if record.mode == "storage":
            for task in last_disk_orders(record, host):
                self._tell(host, task)
            return
        vm = self.authority.cluster.vms.get(record.vm.name)
        for order in last_orders(record, host, vm):
            self._tell(host, order)

    def _ended_report(self, host: str, report: AnyReport) -> None:
        """A straggler has come to where it may close."""
        record = self.authority.move(report.move)
        if record is None:
            return
        if record.mode == "cold":
            self._straggled(host, record, report)
            return
        if record.mode == "storage":
            self._look_at(record.vm.name)  # what it said at its return was not listened to
            return
        if isinstance(report, Closed | Failed | Progress):
            return
        if record.lost and host == record.old_nve and not isinstance(report, Restored):
            return  # it has been told to restore, and closes after that
        self._tell(host, close_order(record, host))
        if isinstance(report, Restored):
            self._look_at(record.vm.name)  # an NVE without a part says so too

    def _straggled(self, host: str, record: Handover, report: AnyReport) -> None:
        """After the end of a cold move, what came of its VM at an NVE that had been given up."""
        state = state_since(record, self.authority.cluster.vms.get(record.vm.name), host, report)
        if isinstance(report, Restored) and host == record.old_nve:
            self._later(self._turned_back(record))
        if state is not None:
            reason = report.why if isinstance(report, Crashed) else None
            self._later(self._note_state(record.vm.name, state, reason))

    async def _turned_back(self, record: Handover) -> None:
        try:
            await self.authority.turned_back(record.id)
        except StoreFailure as failure:
            # It is told once more when it comes back the next time, which does no harm.
            log.error("move %s: %s", record.id, failure)

    async def _forget_kept(self, name: str) -> None:
        """The VM runs, or is gone for good: what another host kept of it is dropped."""
        point = await self.authority.no_recovery(name)
        if point is not None and point.mode == "cold":
            self._tell(point.old_nve, drop_kept(point))
        elif point is not None:
            vm = self.authority.vm(name)
            order = w.VmOrder(id=next(self._numbers), action="forget", vm=vm)
            self._wire.send(point.new_nve, order)

    def _compare(self, host: str, copies: dict[str, str], moves: tuple[str, ...]) -> None:
        """What an NVE has against the records: the record's version decides (R-14).

        Not of VMs whose moves it has still to be told the end of. A copy on the record's own host
        is the VM, whatever the record says of its state: an NVA that was restarted may not have
        heard that an order was carried out.
        """
        parts = [record for each in moves if (record := self.authority.move(each)) is not None]
        moving = {record.vm.name for record in parts}
        for vm in self.authority.cluster.vms.values():
            if vm.move is not None or vm.name in moving:
                continue
            if vm.host == host and (vm.state not in AT_REST or vm.name in copies):
                state = copies.get(vm.name, "crashed")
                self._later(self._note_state(vm.name, state, "seen at connection"))
            elif vm.host != host and vm.name in copies:
                log.warning("NVE %s has an old copy of VM %s: it is stopped", host, vm.name)
                self._wire.send(host, w.VmOrder(id=next(self._numbers), action="stop", vm=vm))

    def disconnected(self, host: str) -> None:
        self.authority.host_changed(host, connected_ns=0)
        loop = asyncio.get_running_loop()
        self._leases[host] = loop.call_later(self._config.lease_s, self._lease_ended, host)

    def _lease_ended(self, host: str) -> None:
        log.warning("NVE %s: lease ended", host)
        self.authority.host_changed(host, ready=False)
        self.handovers.lost(host, dead=False)
        answers = self.authority.cluster.hosts[host].answers
        self._liveness.lost(host, answers=answers)

    def _others(self, host: str) -> list[str]:
        return sorted(self._wire.hosts() - {host})

    async def _ask(self, asker: str, host: str) -> bool | None:
        """Whether `asker` hears the kernel of `host`; None when it does not say."""
        record = self.authority.cluster.hosts[host]
        address = record.underlay_ipv4 or record.underlay_ipv6 or ""
        heard: bool | None = await self._asks(
            asker, w.HostQuestion(id=next(self._numbers), address=address)
        )
        return heard

    async def _asks(
        self,
        host: str,
        question: _Question,
        limit_s: float = ANSWER_LIMIT_S,
    ) -> Any:
        """The answer of NVE `host`; None when there is none in time."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[question.id] = answer
        self._wire.send(host, question)
        try:
            async with asyncio.timeout(limit_s):
                return await answer
        except TimeoutError:
            return None
        finally:
            self._answers.pop(question.id, None)

    def _found(self, host: str, fact: str) -> None:
        """What others say of a host: that it `answers`, or is `dead`."""
        self.authority.host_changed(host, **{fact: True})
        self._later(self._keep_host(host))
        if fact == "dead":
            self.handovers.lost(host, dead=True)
            self._networks_changed(frozenset(self.authority.cluster.networks))

    def heard(self, host: str, message: w.FromNve) -> None:
        match message:
            case w.Ack():
                self._acknowledged(host, message)
            case w.MoveReport(report=report):
                if not self.handovers.report(report):
                    self._ended_report(host, report)
            case w.VmAnswer(id=number) | w.ExporterAnswer(id=number) | w.ReachAnswer(id=number):
                self._answered(number, message)
            case w.VmReport() | w.Unplugged():
                self._seen(host, message)
            case (
                w.HostAnswer(id=number, answers=result)
                | w.FilesAnswer(id=number, missing=result)
                | w.DisksAnswer(id=number, states=result)
            ):
                self._answered(number, result)
            case w.Served():
                self._is_served(host, message)
            case w.Resync() | w.Query():
                self._asked(host, message)
            case w.Unsupported(why=why):
                log.warning("NVE %s does not understand: %s", host, why)
            case w.Hello():
                pass

    def _seen(self, host: str, message: w.VmReport | w.Unplugged) -> None:
        """What an NVE saw of a VM, which is of account if it is on its host."""
        vm = self.authority.cluster.vms.get(message.vm)
        if vm is None or vm.host != host:
            return
        if isinstance(message, w.Unplugged):
            self._later(self._let_go(vm.name, host, message.slot))
        else:
            self._later(self._note_state(vm.name, message.state, message.reason))

    async def _note_state(self, name: str, state: str, reason: str | None) -> None:
        """Record what an NVE saw of a VM, as soon as the store takes it: nobody says it again."""
        while True:
            try:
                await self.authority.vm_state(name, state, reason)
                if self.authority.is_alive(name, state):
                    await self._forget_kept(name)
                return
            except StoreFailure as failure:
                log.error("VM %s is %s: %s", name, state, failure)
                await asyncio.sleep(RETRY_S)

    async def _let_go(self, name: str, host: str, slot: int) -> None:
        try:
            await self.authority.let_go(name, host, slot)
        except StoreFailure as failure:
            # The record keeps it: the VM has it again from its next start or move on.
            log.error("VM %s has no interface in slot %d any more: %s", name, slot, failure)

    def _look_at(self, name: str) -> None:
        """Ask what there is of VM `name` on its host; a VmReport says it.

        Not of one that is off: that nothing is there is no crash.
        """
        vm = self.authority.cluster.vms.get(name)
        if vm is not None and vm.state != "shutdown":
            self._wire.send(vm.host, w.VmOrder(id=next(self._numbers), action="look", vm=vm))

    def _answered(self, number: int, result: Any) -> None:
        waiting = self._answers.pop(number, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(result)

    def _asked(self, host: str, message: w.Resync | w.Query) -> None:
        if isinstance(message, w.Query):
            self._answer(host, message)
        else:
            self._pushes.void(host, message.network)
            self._push(host, message.network, self._view(message.network))

    def _answer(self, host: str, query: w.Query) -> None:
        for tsi in self.authority.cluster.tsis():
            face = tsi.interface
            if face.network == query.network and (
                query.mac == face.mac
                or (query.address is not None and query.address in tsi.addresses)
            ):
                found = Mapping(
                    network=face.network,
                    owner=tsi.owner,
                    mac=face.mac,
                    ipv4=face.ipv4,
                    ipv6=face.ipv6,
                    beside=tsi.beside,
                    nve=tsi.host,
                    version=tsi.version,
                )
                self._wire.send(host, w.Answer(id=query.id, mapping=found, lifetime_100ms=0xFFFF))
                return
        self._wire.send(host, w.Answer(id=query.id, mapping=None, lifetime_100ms=NEGATIVE_100MS))

    # ------------------------------------------------------------ what NVEs are told

    def _serve(self, hosts: Iterable[str]) -> None:
        """Have `hosts` offer their images as the records say now, whatever they were told."""
        for host in sorted(hosts):
            exports = storage.exports(self.authority.cluster, host)
            serve = w.Serve(revision=next(self._numbers), exports=exports)
            self._serving[host] = serve
            self._served.discard(host)
            self._wire.send(host, serve)

    def _exports_changed(self) -> None:
        """Tell those whose images are to be offered to others than they were."""
        for host in self._wire.hosts() & self._serving.keys():
            exports = storage.exports(self.authority.cluster, host)
            if exports != self._serving[host].exports:
                self._serve({host})

    def _is_served(self, host: str, said: w.Served) -> None:
        """What was said of an older Serve is no news."""
        for failure in said.failures:
            log.warning("NVE %s: %s", host, failure)
        serve = self._serving.get(host)
        if serve is None or said.revision != serve.revision or said.failures:
            return
        self._served.add(host)
        self._later(_notify(self._acks))
        self.handovers.served(host)

    async def _until_served(self, hosts: frozenset[str]) -> None:
        """Return when `hosts` offer their images as the records say; Blocked when they do not."""
        try:
            async with asyncio.timeout(ASSOCIATE_LIMIT_S), self._acks:
                await self._acks.wait_for(lambda: hosts <= self._served)
        except TimeoutError:
            silent = ", ".join(sorted(hosts - self._served))
            why = "it has a disk, and does not say who may write it"
            raise Blocked([_refused("host_not_ready", f"host {silent}", why)]) from None

    def _networks_changed(self, networks: frozenset[str]) -> None:
        self._exports_changed()
        for network in sorted(networks):
            view = self._view(network)
            for host in sorted(self._wire.hosts()):
                self._push(host, network, view)

    async def _keep_host(self, host: str) -> None:
        try:
            await self.authority.keep_host(host)
        except (Conflict, StoreFailure) as failure:
            # It is known all the same, until this NVA is restarted.
            log.warning("host %s not written: %s", host, failure)

    def _members_changed(self) -> None:
        """Tell everybody soon: when all NVEs come at once, not everybody of each of them."""
        if self._members_due is None:
            loop = asyncio.get_running_loop()
            self._members_due = loop.call_later(MEMBERS_DELAY_S, self._tell_members)

    def _tell_members(self) -> None:
        self._members_due = None
        self._networks_changed(frozenset(self.authority.cluster.networks))

    def _view(self, network: str) -> VnView | None:
        """None when there is no such network (any more)."""
        record = self.authority.cluster.networks.get(network)
        return VnView(self.authority.cluster, record) if record is not None else None

    def _push(self, host: str, network: str, view: VnView | None, *, again: bool = False) -> None:
        """Tell `host` what is news to it of `network`, if it has a part in it (R-44)."""
        if not self._complete:
            return
        match self._pushes.news(host, network, view, again=again):
            case Whole(revision=revision, intent=intent, versions=versions):
                push = w.VnPush(
                    network=network, revision=revision, intent=intent, versions=versions
                )
                self._wire.send(host, push)
            case Update(base=base, revision=revision, change=change, versions=versions):
                update = w.VnUpdate(
                    network=network, base=base, revision=revision, change=change, versions=versions
                )
                self._wire.send(host, update)
            case None:
                pass

    def _acknowledged(self, host: str, ack: w.Ack) -> None:
        for failure in ack.failures:
            log.warning("NVE %s: %s: %s", host, ack.network, failure)
        if ack.failures:
            self._pushes.void(host, ack.network)
        else:
            self._pushes.acknowledged(host, ack.network, ack.revision)
            for vm, version in ack.versions.items():
                self.handovers.acknowledged(host, vm, version)
            self._later(_notify(self._acks))
            self.handovers.in_kernel(
                host,
                lambda network: self._pushes.in_kernel(host, network),
                lambda network: host in self.authority.cluster.places(network),
            )

    def _tell(self, nve: str, order: Told | DiskOrder) -> None:
        if isinstance(order, Activate | Retire | WakeUp | DropState):
            record = self.handovers.record(order.move) or self.authority.move(order.move)
            assert record is not None and self._sealer is not None  # noqa: PT018 - not a test
            ticket = ticket_of(record, order.version, time.time_ns())
            order = msgspec.structs.replace(order, seal=self._sealer.seal(ticket))
        if not self._wire.send(nve, w.MoveOrder(order=order)):
            log.warning("NVE %s is away: %s not sent", nve, type(order).__name__)

    # ------------------------------------------------------------ VMs

    async def _order(
        self, action: str, vm: Vm, host: str = "", limit_s: float = VM_ORDER_LIMIT_S
    ) -> w.VmAnswer:
        """Have the VM's host, or `host`, do it; Blocked when it is away, fails or is silent."""
        host = host or vm.host
        if host not in self._wire.hosts():
            raise Blocked([_refused("host_not_ready", f"host {host}", "its NVE is away")])
        vm = storage.with_ways(self.authority.cluster, vm, host)
        wish = {"id": next(self._numbers), "action": action, "vm": vm}
        answer: w.VmAnswer | None = await self._asks(
            host, msgspec.convert(wish, w.VmOrder), limit_s
        )
        if answer is None:
            why = f"no answer within {limit_s:g} s"
            raise Blocked([_refused("failed", f"vm {vm.name}", why)])
        if answer.failure is not None:
            raise Blocked([_refused("failed", f"vm {vm.name}", answer.failure)])
        return answer

    async def create_vm(self, wish: Vm) -> Vm:
        """Record it, start it; nothing stays when it cannot start."""
        await self._stop_if_no_disks(self.authority.completed(wish))
        vm = await self.authority.create_vm(wish)
        try:
            await self._associated(vm)
            await self._order("start", vm)
        except Blocked:
            await self.authority.delete_vm(vm.name)
            raise
        await self.authority.vm_state(vm.name, "running")
        return await self._in_use(vm.name)

    async def vm_action(self, name: str, action: str) -> Vm:
        vm = self.authority.vm(name)
        self._stop_if_moving(vm)
        refused = rules.action_refused(vm, action)
        if refused is not None:
            raise Blocked([refused])
        if action == "resume" and vm.state == "suspended":
            action = "wake"
        if action in _STATE_MEANWHILE:
            await self.authority.vm_state(name, _STATE_MEANWHILE[action])
        try:
            if action in ("start", "wake"):
                await self._associated(vm)
            await self._order(action, vm)
        except Blocked:
            await self.authority.vm_state(name, vm.state, vm.reason)
            raise
        if action in ("start", "wake"):
            await self._forget_kept(name)  # it has begun anew, or run on
        await self.authority.vm_state(name, _STATE_AFTER[action])
        return await self._in_use(name)

    async def _in_use(self, name: str) -> Vm:
        """The VM, once its NVE lets its interfaces be used, or does not in time; it is done."""
        vm = self.authority.vm(name)
        if self.is_connected(vm.host) and not await self.is_associated(vm):
            log.warning("VM %s: its NVE does not say that its interfaces are in use", name)
        return vm

    async def change_addresses(self, name: str, network: str, changes: dict[str, str | None]) -> Vm:
        """Other addresses for a VM's interface; returns when its own NVE has them."""
        vm = await self.authority.change_addresses(name, network, changes)
        if vm.host in self._wire.hosts():
            await self._associated(vm)
        return vm

    async def add_interface(self, name: str, wish: Interface) -> Vm:
        """One more interface for a VM; returns when it has it, and its NVE lets it be used."""
        vm = await self.authority.add_interface(name, wish)
        mac = vm.interfaces[-1].mac
        why = await self._plugging.carried_out(vm)
        vm = self.authority.vm(name)
        if not any(each.mac == mac and each.change is None for each in vm.interfaces):
            raise Blocked([_refused("failed", f"vm {name}", why or f"it is {vm.state} now")])
        return await self._in_use(name)

    async def remove_interface(self, name: str, which: str) -> Vm:
        """One interface less; returns when the VM does not have it any more."""
        vm = await self.authority.remove_interface(name, which)
        why = await self._plugging.carried_out(vm)
        vm = self.authority.vm(name)
        left = named(vm, which)
        if left:
            whole = "it is as it was; should the guest let go of it later, it is removed then"
            hint = f"`overland vm show {name}`" if left[0].change else whole
            raise Blocked([Refused(code="failed", what=f"vm {name}", why=why, hint=hint)])
        return vm

    def is_connected(self, host: str) -> bool:
        """Whether NVE `host` can be told something now."""
        return host in self._wire.hosts()

    async def fit(self, vm: Vm) -> str | None:
        """Have the VM's own NVE make its devices as `vm` says; why not, None without an answer."""
        order = w.VmOrder(id=next(self._numbers), action="fit", vm=vm)
        answer: w.VmAnswer | None = await self._asks(vm.host, order, FIT_LIMIT_S)
        return (answer.failure or "") if answer is not None else None

    async def is_associated(self, vm: Vm) -> bool:
        """Whether the VM's own NVE comes to have its interfaces as they are recorded, in time."""
        return await self._in_kernel(vm.host, {each.network for each in vm.interfaces}, vm.name)

    async def _associated(self, vm: Vm) -> None:
        """Return when the VM's own NVE has its interfaces in the kernel, and says so.

        A VM does not run before (requirements.md 3.3): Blocked when that does not come true.
        """
        if not await self.is_associated(vm):
            why = f"its interfaces were not associated within {ASSOCIATE_LIMIT_S:g} s"
            raise Blocked([_refused("failed", f"vm {vm.name}", why)])

    async def _in_kernel(self, host: str, networks: set[str], owner: str) -> bool:
        """Whether NVE `host` comes to have what `owner` has there in its kernel, in time."""

        def own(view: VnView | None) -> tuple[TsiIntent, ...]:
            return view.own(host, owner) if view is not None else ()

        def there() -> bool:
            has = self._pushes.in_kernel
            return all(own(has(host, name)) == own(self._view(name)) for name in networks)

        try:
            async with asyncio.timeout(ASSOCIATE_LIMIT_S), self._acks:
                await self._acks.wait_for(there)
        except TimeoutError:
            return False
        return True

    async def create_gateway(self, wish: GatewayWish) -> Gateway:
        """Record it, and return when its NVE has it; nothing stays when that does not come true."""
        gateway = await self.authority.create_gateway(wish.network, wish.host, wish.leg)
        if not await self._in_kernel(gateway.host, {gateway.network}, gateway.owner):
            await self.authority.delete_gateway(gateway.network, gateway.host)
            what, why = (
                f"gateway of network {gateway.network}",
                f"host {gateway.host} cannot make it",
            )
            hint = f"is there a bridge {gateway.leg.bridge}? The log of its NVE has the reason"
            raise Blocked([Refused(code="failed", what=what, why=why, hint=hint)])
        return gateway

    async def delete_gateway(self, network: str, host: str) -> None:
        """Take it away once nobody goes out by it any more, so that nothing on its way is lost."""
        await self.authority.leave_gateway(network, host)
        with contextlib.suppress(TimeoutError):  # nobody waits longer for an NVE that is away
            async with asyncio.timeout(ASSOCIATE_LIMIT_S), self._acks:
                await self._acks.wait_for(lambda: self._all_have_their_tenants(network))
        await self.authority.delete_gateway(network, host)

    def _all_have_their_tenants(self, network: str) -> bool:
        """Whether each NVE that is connected has its own in its kernel, with their ways out."""
        view = self._view(network)
        if view is None:
            return True
        hosts = (host for host in self._wire.hosts() if view.includes(host))
        known = ((host, self._pushes.in_kernel(host, network)) for host in hosts)
        return all(has is not None and view.same_tenants(host, has) for host, has in known)

    async def _stop_if_no_disks(self, vm: Vm) -> None:
        if vm.disks:
            blockers = tuple(storage.start_blockers(vm, await self._disks(vm.host, vm.disks)))
            if blockers:
                raise Blocked(blockers)

    async def _disks(self, host: str, disks: tuple[Disk, ...]) -> tuple[DiskState, ...]:
        """What `host` has of `disks`; Blocked when its NVE does not say."""
        states = None
        if host in self._wire.hosts():
            states = await self._asks(host, w.DisksQuestion(id=next(self._numbers), disks=disks))
        if states is None:
            raise Blocked([_refused("host_not_ready", f"host {host}", "its NVE does not answer")])
        answered: tuple[DiskState, ...] = states
        return answered

    async def allow(self, one: str, other: str) -> tuple[Policy, list[str]]:
        """Let tenants of two VNs talk; the hosts that do not have it in their kernels in time."""
        policy = await self.authority.allow(one, other)
        return policy, await self._agreed(policy, set())

    async def deny(self, one: str, other: str) -> tuple[Policy, list[str]]:
        """End that; the hosts on which they may still talk after some time."""
        before = self._joined((one, other))
        policy = await self.authority.deny(one, other)
        return policy, await self._agreed(policy, before)

    def _joined(self, networks: tuple[str, str]) -> set[str]:
        return set().union(*(self.authority.cluster.places(network) for network in networks))

    async def _agreed(self, policy: Policy, before: set[str]) -> list[str]:
        """Wait until all hosts of two VNs, and those that were, have what is allowed now."""

        def missing() -> list[str]:
            cluster = self.authority.cluster
            living = {
                host for host in before | self._joined(policy.networks) if host in cluster.hosts
            }
            return sorted(
                host
                for host in living
                if not cluster.hosts[host].dead
                and not all(self._has_allowed(host, network) for network in policy.networks)
            )

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ASSOCIATE_LIMIT_S), self._acks:
                await self._acks.wait_for(lambda: not set(missing()) & self._wire.hosts())
        return missing()

    def _has_allowed(self, host: str, network: str) -> bool:
        has, view = self._pushes.in_kernel(host, network), self._view(network)
        if host not in self._wire.hosts() or view is None:
            return False
        return has.allowed == view.allowed if has is not None else not view.includes(host)

    async def state(self, name: str, signed: Signed) -> None:
        """Hear what the owner of VM `name` has signed; Blocked when it is not believed (R-25)."""
        what, ca = f"vm {name}", self._config.owners_ca
        if ca is None:
            why = "this domain knows no owners: its NVA has no `owners_ca`"
            raise Blocked([_refused("no_owners", what, why)])
        try:
            owner, statement = stated(signed, Path(ca))
        except Forged as forged:
            raise Blocked([_refused("not_authenticated", what, str(forged))]) from None
        await self.authority.state(name, owner, statement, signed)

    def _stop_if_moving(self, vm: Vm) -> None:
        if vm.move is not None:
            raise Blocked([_refused("move_in_progress", f"vm {vm.name}", "it is moving")])

    async def delete_vm(self, name: str) -> None:
        vm = self.authority.vm(name)
        if vm.move is None and vm.host in self._wire.hosts():
            await self._order("stop", vm)
        await self._forget_kept(name)
        await self.authority.delete_vm(name)

    # ------------------------------------------------------------ moves

    async def cold_blockers(self, name: str, to: str, options: Options) -> tuple[Refused, ...]:
        """What stands against moving a VM cold; its files are looked for on the new host."""
        found = self.authority.cold_blockers(name, to, options)
        vm = self.authority.cluster.vms.get(name)
        if found or vm is None:
            return found
        paths = tuple(filter(None, (vm.boot.kernel, vm.boot.initrd)))
        missing = await self._asks(to, w.FilesQuestion(id=next(self._numbers), paths=paths))
        if missing is None:
            return (_refused("host_not_ready", f"host {to}", "its NVE does not answer"),)
        _, against = await self._with_disks(vm, to, options.storage)
        return (
            *(
                _refused("file_missing", f"host {to}", f"{path} cannot be read there")
                for path in missing
            ),
            *against,
        )

    async def forecast(
        self, name: str, to: str, options: Options
    ) -> tuple[Forecast | None, tuple[Refused, ...]]:
        """What a hot move would cost, and what stands against it; a VM is gauged for a second.

        No forecast when something stands against it anyway, or its NVE does not answer.
        """
        blockers = await self.live_blockers(name, to, options)
        if blockers:
            return None, blockers
        options = self._as_borne(name, options)
        found = await self._gauged(self.authority.vm(name), to, options)
        against = self.authority.latency_blockers(name, options.mode, found)
        if found is not None:
            against += tuple(rules.forecast_blockers(name, found, options))
        return found, against

    async def _gauged(self, vm: Vm, to: str, options: Options) -> Forecast | None:
        """None when its NVE does not say how the VM is."""
        try:
            gauge = (await self._order("gauge", vm, limit_s=GAUGE_LIMIT_S)).gauge
        except Blocked as blocked:
            log.warning("vm %s: no forecast: %s", vm.name, blocked)
            return None
        if gauge is None:
            return None
        measured, filled = seen_before(self.authority.ended_moves.values(), vm, to)
        return forecast(gauge, options, measured_bytes_per_s=measured, filled=filled)

    async def migrate(self, name: str, to: str, options: Options, *, cold: bool = False) -> str:
        expected: Forecast | None = None
        blockers: tuple[Refused, ...] = ()
        options = self._as_borne(name, options)
        if cold:
            blockers = await self.cold_blockers(name, to, options)
        elif self._emulated(name):
            blockers = await self.live_blockers(name, to, options)
        else:
            expected, blockers = await self.forecast(name, to, options)
        if blockers:
            raise Blocked(blockers)
        disks, blockers = await self._with_disks(self.authority.vm(name), to, options.storage)
        if blockers:
            raise Blocked(blockers)
        move_id = uuid.uuid4().hex[:12]
        record = await self.authority.begin_move(
            move_id, name, to, options, expected, cold=cold, disks=disks
        )
        self.handovers.begin(record)
        return record.id

    async def disk_blockers(self, name: str, path: str, to: str) -> tuple[Vm, tuple[Refused, ...]]:
        """The VM as in the record of a move of its disk `path` alone, and what is against that."""
        found = tuple(storage.alone_blockers(self.authority.cluster, name, path, to))
        if found:
            raise Blocked(found)
        vm = self.authority.vm(name)
        here = await self._in_place(vm)
        moving = storage.alone(vm, path, here)
        there = await self._disks(to, vm.disks)
        return moving, tuple(storage.room_blockers(moving, here, there))

    async def move_disk(self, name: str, path: str, to: str, options: Options) -> str:
        """Bring a disk that stayed behind to its VM, which goes on; the id of that move (R-54)."""
        moving, blockers = await self.disk_blockers(name, path, to)
        if blockers:
            raise Blocked(blockers)
        record = await self.authority.begin_disk_move(uuid.uuid4().hex[:12], moving, options)
        self.handovers.begin(record)
        return record.id

    async def live_blockers(self, name: str, to: str, options: Options) -> tuple[Refused, ...]:
        """What stands against moving a running VM; its disks are looked at on both hosts."""
        found = self.authority.live_blockers(name, to, options)
        if found:
            return found
        return (await self._with_disks(self.authority.vm(name), to, options.storage))[1]

    async def _with_disks(
        self, vm: Vm, to: str, choice: DiskChoice
    ) -> tuple[tuple[Disk, ...], tuple[Refused, ...]]:
        """The disks of `vm` as they move to host `to`, and what stands against it (R-55)."""
        if not vm.disks:
            return (), ()
        cluster = self.authority.cluster
        there = await self._disks(to, vm.disks)
        # Of what both hosts share, a host that is gone has nothing to say: the new one sees it.
        away = vm.host not in self._wire.hosts() and storage.all_shared(vm, choice)
        here = there if away else await self._in_place(vm)
        moving = storage.chosen(vm, choice, here)
        ways = {host: await self._way(host, to) for host in sorted(left_at(moving) - {to})}
        blockers = tuple(storage.move_blockers(cluster, moving, to, here, there, ways))
        return storage.with_ways(cluster, moving, to).disks, blockers

    async def _in_place(self, vm: Vm) -> tuple[DiskState, ...]:
        """What there is of each disk where its image is; Blocked when somebody does not say."""
        places = sorted({storage.place(vm, disk) for disk in vm.disks})
        states = {host: await self._disks(host, vm.disks) for host in places}
        return tuple(states[storage.place(vm, disk)][index] for index, disk in enumerate(vm.disks))

    async def _way(self, exporter: str, to: str) -> str:
        """Why host `to` would not reach images that `exporter` offers; empty when it would."""
        number = next(self._numbers)
        ready: w.ExporterAnswer | None
        ready = await self._asks(exporter, w.ExporterQuestion(id=number))
        if ready is None or ready.failure is not None:
            return (ready and ready.failure) or "its NVE does not answer"
        hosts = self.authority.cluster.hosts
        where = storage.uri(hosts[exporter], hosts[to])
        number = next(self._numbers)
        reached: w.ReachAnswer | None
        reached = await self._asks(to, w.ReachQuestion(id=number, uri=where), REACH_LIMIT_S)
        if reached is None:
            return f"host {to} does not say whether it reaches {where}"
        return reached.failure or ""

    def _emulated(self, name: str) -> bool:
        """Under emulation a copy always ends (ADR 0006): it need not wait to be gauged.

        But for a VM whose latency class asks how long it will stop (R-62).
        """
        vm = self.authority.cluster.vms.get(name)
        host = self.authority.cluster.hosts.get(vm.host) if vm is not None else None
        borne = longest_outage_ms(self.authority.cluster, name)
        return host is not None and host.accelerator == "tcg" and borne is None

    def _as_borne(self, name: str, options: Options) -> Options:
        """No longer a stop than the VM's latency class bears."""
        borne_ms = longest_outage_ms(self.authority.cluster, name)
        if borne_ms is None or borne_ms >= options.max_downtime_ms:
            return options
        return msgspec.structs.replace(options, max_downtime_ms=borne_ms)

    async def recover(self, name: str, *, fenced: bool) -> dict[str, Any]:
        """Run a VM whose host is lost from what another keeps of it; how old that is (R-12)."""
        vm = self.authority.vm(name)
        host = self.authority.cluster.hosts.get(vm.host)
        if vm.move is not None and host is not None and not host.ready and (host.dead or fenced):
            # Nobody restores what was there: its move ends, and leaves the checkpoint.
            self.handovers.lost(vm.host, dead=True)
            await self._ended(vm.move, RECOVER_LIMIT_S)
        vm = await self.authority.recover(name, fenced=fenced)
        point = self.authority.recovery_point(name)
        assert point is not None
        cold = point.mode == "cold"
        try:
            await self._until_served(left_at(point.vm) & self._wire.hosts())
            at_ns = (await self._order("wake" if cold else "recover", vm)).at_ns
        except Blocked as blocked:
            await self.authority.vm_state(name, "crashed", f"not recovered: {blocked}")
            raise
        if cold:
            at_ns = point.stop_ns or point.phases[0].at_ns
        age_ms = round((time.time_ns() - at_ns) / 1e6, 3)
        what = "the state that it was suspended with" if cold else "a checkpoint"
        await self.authority.vm_state(name, "running", f"from {what}, {age_ms:.0f} ms old")
        return {
            "vm": name,
            "host": vm.host,
            "version": vm.version,
            "recovery_point": timestamp(at_ns),
            "age_ms": age_ms,
        }

    def find_move(self, move_id: str) -> Handover | None:
        return self._latest.get(move_id) or self.authority.move(move_id)

    async def repair(self, move_id: str | None) -> list[dict[str, str]]:
        """Ask again for all that open moves wait for; what was done for each, in words."""
        wanted = [move_id] if move_id else sorted(self.authority.cluster.moves)
        return [await self._repair(each) for each in wanted]

    async def _repair(self, move_id: str) -> dict[str, str]:
        record = self.find_move(move_id)
        assert record is not None
        if record.phase in ENDED:
            return {"id": move_id, "vm": record.vm.name, "did": f"nothing: {record.outcome}"}
        involved = saga.involved(record)
        away = sorted(set(involved) - self._wire.hosts())
        for host in involved:
            self.handovers.back(host)
        ended = await self._ended(move_id, REPAIR_LIMIT_S)
        did = f"asked {', '.join(involved)} again"
        if ended is not None:
            did += f"; the move has ended: {ended.outcome}"
        elif away:
            did += f"; it waits for {', '.join(away)}: start the NVE there"
        else:
            did += f"; the move goes on in phase {record.phase}"
        return {"id": move_id, "vm": record.vm.name, "did": did}

    async def _ended(self, move_id: str, limit_s: float) -> Handover | None:
        """The record once the move has ended; None when it has not in time."""
        try:
            async with asyncio.timeout(limit_s):
                async for _ in self.follow(move_id):
                    pass
        except TimeoutError:
            return None
        return self.find_move(move_id)

    def abort(self, move_id: str) -> bool:
        return self.handovers.abort(move_id, "aborted by the operator")

    def _move_changed(self, record: Handover) -> None:
        self._latest[record.id] = record
        condition = self._move_events.get(record.id)
        if condition is not None:
            self._later(_notify(condition))
        if record.phase in ENDED:
            self._latest.pop(record.id, None)
            vm = self.authority.cluster.vms.get(record.vm.name)
            for nve, order in farewells(record, vm):
                self._tell(nve, order)
            # What its NVE said of it when it came back in mid-move was not listened to.
            self._look_at(record.vm.name)
            if vm is not None:
                self._former.look(vm)
            self._name_follows(record.id)

    def _name_follows(self, move_id: str) -> None:
        """After a move that has changed addresses: nobody waits for that (R-27).

        Also after a restart, as long as the old ones are kept: it may not have been done.
        """
        config, record = self._config.dns, self.authority.ended_moves[move_id]
        changed = record.readdress if record.outcome == "moved" else None
        if config is not None and changed is not None and not changed.dns:
            self._later(self._update_name(config, record.vm.name, move_id, changed))

    async def _update_name(self, config: Dns, vm: str, move_id: str, changed: Readdress) -> None:
        """One after the other, so that the last move has the last word."""
        async with self._naming:
            try:
                said = await names.follow(config, vm, changed.changes)
            except names.NameFailure as failure:
                said = f"not updated: {failure}"
                log.warning("vm %s: %s", vm, said)
            try:
                await self.authority.note_name(move_id, said)
            except StoreFailure as failure:
                log.warning("vm %s: %s; not written: %s", vm, said, failure)

    async def follow(self, move_id: str) -> AsyncIterator[dict[str, Any]]:
        """Every state of a move until it has ended."""
        condition = self._move_events.setdefault(move_id, asyncio.Condition())
        seen: Handover | None = None
        while True:
            record = self.find_move(move_id)
            if record is None:
                return
            if record is not seen:
                seen = record
                yield receipt(record) | {"progress": msgspec.to_builtins(record.memory)}
            if record.phase in ENDED:
                self._move_events.pop(move_id, None)
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5), condition:
                    await condition.wait()


def run_nva(config: NvaConfig) -> None:
    """Run until killed."""
    uvloop.run(_run(config))


async def _run(config: NvaConfig) -> None:
    why = await Domain(config).run()
    if why:
        # A standby from here on. Nothing that this process knew or began may act any more, and none
        # of its connections may stay: what is certain about that is a new program.
        log.warning("this NVA is not the active one any more: %s", why)
        os.execv(sys.executable, sys.orig_argv)


def _name(config: NvaConfig) -> str:
    """One of a kind: no two processes can wait for the NVEs there."""
    return f"{config.wire_address}:{config.wire_port}"


def _leadership(config: NvaConfig) -> Leadership | None:
    """None with a store that nobody else uses."""
    if config.etcd is None:
        return None
    trust = config.store_tls
    context = None
    if trust is not None:
        pair = Path(trust.certificate), Path(trust.key)
        context = tls.context(Path(trust.ca), *pair, server=False)
    api = config.api_url or f"http://{config.api_listen}"
    return Leadership(EtcdStore(config.etcd, context), Leader(name=_name(config), api=api))


async def _notify(condition: asyncio.Condition) -> None:
    async with condition:
        condition.notify_all()


def _refused(code: str, what: str, why: str) -> Refused:
    return Refused(code=code, what=what, why=why)


def _api_socket(config: NvaConfig) -> socket.socket:
    address, _, port = config.api_listen.rpartition(":")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with inside(config.api_namespace):
        sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((address.strip("[]"), int(port)))
    except OSError as error:
        sock.close()
        raise PortFailure(f"cannot listen on {config.api_listen}: {error.strerror}") from None
    return sock
