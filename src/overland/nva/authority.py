"""The use cases: read, apply the rules, compare-and-set. The only writer of the domain's records.

The cluster in memory is what the store holds: a record changes here only after its transaction.
Observers hear which VNs changed, and push them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec

from overland.mobility.coordinator import recoverable
from overland.model.cluster import (
    Endpoint,
    Gateway,
    Host,
    Interface,
    Leg,
    Network,
    Refused,
    Vm,
    VmState,
)
from overland.model.forecast import Forecast
from overland.model.handover import ENDED, Handover, MovingPort, Options, PhaseAt, is_up
from overland.model.names import ila_name, port_name, vxlan_name
from overland.nva import rules
from overland.nva.cluster import Cluster
from overland.nva.gateways import chosen, gateway_blockers, removal_blockers
from overland.nva.mapping import underlay_address
from overland.nva.placement import Placement, drain_plan
from overland.ports import Conflict, Delete, Expect, Ledger, Put, StoreFailure

Kept = Network | Host | Vm | Endpoint | Gateway | Handover
T = TypeVar("T", Network, Host, Vm, Endpoint, Gateway, Handover)


class Blocked(Exception):
    """A wish was refused; `refusals` holds every reason."""

    def __init__(self, refusals: Iterable[Refused]) -> None:
        self.refusals = tuple(refusals)
        super().__init__("; ".join(f"{each.what}: {each.why}" for each in self.refusals))


def _stop_if(refusals: Iterable[Refused]) -> None:
    found = tuple(refusals)
    if found:
        raise Blocked(found)


def _state_after(record: Handover, vm: Vm) -> VmState:
    """The state of a VM whose move has ended; what its NVE has said meanwhile stands."""
    if vm.state != "migrating":
        return vm.state
    return record.ends_as if record.outcome == "moved" else record.vm.state


class Authority:
    """One domain's records. Call `load` first."""

    def __init__(self, store: Ledger, changed: Callable[[frozenset[str]], None]) -> None:
        self._store = store
        self._changed = changed
        self._revisions: dict[str, int] = {}
        self._lock = asyncio.Lock()
        self.cluster = Cluster()
        self.ended_moves: dict[str, Handover] = {}
        self._kept_hosts: dict[str, Host] = {}

    async def load(self) -> None:
        """Read everything; StoreFailure when a record cannot be understood."""
        await self._load("network/", Network, self.cluster.networks)
        await self._load("host/", Host, self.cluster.hosts)
        await self._load("vm/", Vm, self.cluster.vms)
        await self._load("endpoint/", Endpoint, self.cluster.endpoints)
        await self._load("gateway/", Gateway, self.cluster.gateways)
        moves: dict[str, Handover] = {}
        await self._load("move/", Handover, moves)
        for name, move in moves.items():
            (self.ended_moves if move.phase in ENDED else self.cluster.moves)[name] = move

    async def _load(self, prefix: str, kind: type[T], into: dict[str, T]) -> None:
        entries, _ = await self._store.list(prefix)
        for entry in entries:
            try:
                into[entry.key.removeprefix(prefix)] = msgspec.json.decode(entry.value, type=kind)
            except msgspec.DecodeError as error:
                raise StoreFailure(f"record {entry.key}: {error}") from None
            self._revisions[entry.key] = entry.revision

    async def _write(self, puts: dict[str, Kept], deletes: tuple[str, ...] = ()) -> None:
        expects = [
            Expect(key=key, revision=self._revisions.get(key, 0)) for key in (*puts, *deletes)
        ]
        writes: list[Put | Delete] = [
            Put(key=key, value=msgspec.json.encode(value)) for key, value in puts.items()
        ]
        writes += [Delete(key=key) for key in deletes]
        revision = await self._store.commit(expects, writes)
        for key in puts:
            self._revisions[key] = revision
        for key in deletes:
            self._revisions.pop(key, None)

    # ------------------------------------------------------------ networks

    async def create_network(self, wish: Network) -> Network:
        if wish.kind == "ila":  # which has no outer header: its locators are of this family
            wish = msgspec.structs.replace(wish, underlay="ipv6")
        async with self._lock:
            _stop_if(rules.network_blockers(self.cluster, wish))
            await self._write({f"network/{wish.name}": wish})
            self.cluster.networks[wish.name] = wish
        return wish

    async def delete_network(self, name: str) -> None:
        async with self._lock:
            _stop_if(rules.network_in_use(self.cluster, name))
            await self._write({}, (f"network/{name}",))
            del self.cluster.networks[name]

    async def create_gateway(self, network: str, host: str, leg: Leg) -> Gateway:
        """Record the way out of `network`, its addresses in the VN chosen; Blocked if refused."""
        async with self._lock:
            gateway = chosen(self.cluster, network, host, leg)
            _stop_if(gateway_blockers(self.cluster, gateway))
            await self._write({f"gateway/{network}": gateway})
            self.cluster.gateways[network] = gateway
        self._changed(frozenset({network}))
        return gateway

    async def delete_gateway(self, network: str) -> None:
        """From now on nothing outside is reached from `network`."""
        async with self._lock:
            _stop_if(removal_blockers(self.cluster, network))
            await self._write({}, (f"gateway/{network}",))
            del self.cluster.gateways[network]
        self._changed(frozenset({network}))

    # ------------------------------------------------------------ hosts

    def host_seen(self, host: Host) -> bool:
        """An NVE holds its lease and says this of its host; tells whether that moves mappings."""
        before = self.cluster.hosts.get(host.name)
        if before is not None:
            host = msgspec.structs.replace(host, drained=before.drained, answers=before.answers)
        self.cluster.hosts[host.name] = msgspec.structs.replace(
            host, ready=True, connected_ns=time.time_ns()
        )
        return (
            before is None
            or before.dead
            or (before.underlay_ipv4, before.underlay_ipv6, before.locator)
            != (host.underlay_ipv4, host.underlay_ipv6, host.locator)
        )

    def host_changed(self, name: str, **facts: int) -> None:
        """Note what was found out about host `name` since; content with absence."""
        host = self.cluster.hosts.get(name)
        if host is not None:
            self.cluster.hosts[name] = msgspec.structs.replace(host, **facts)

    def drain_plan(self, name: str) -> tuple[Placement, ...]:
        """Where each VM of host `name` would go; Blocked when one has nowhere to go."""
        if name not in self.cluster.hosts:
            _stop_if(rules.host_blockers(self.cluster, name))
        plan, refused = drain_plan(self.cluster, name)
        _stop_if(refused)
        return plan

    async def drain(self, name: str, *, drained: bool) -> None:
        """From now on nothing is placed on host `name` (or again)."""
        if name not in self.cluster.hosts:
            _stop_if(rules.host_blockers(self.cluster, name))
        self.host_changed(name, drained=drained)
        await self.keep_host(name)

    async def keep_host(self, name: str) -> None:
        """Write what is known of host `name`, so that a restarted NVA knows where its tenants are.

        Not whether its NVE is there: that is found out anew.
        """
        async with self._lock:
            host = msgspec.structs.replace(self.cluster.hosts[name], ready=False, connected_ns=0)
            if self._kept_hosts.get(name) != host:
                await self._write({f"host/{name}": host})
                self._kept_hosts[name] = host

    # ------------------------------------------------------------ machines

    async def create_vm(self, wish: Vm) -> Vm:
        """Record a VM with open addresses chosen; it is not started here."""
        async with self._lock:
            vm = self.completed(wish)
            await self._write({f"vm/{vm.name}": vm})
            self.cluster.vms[vm.name] = vm
        self._changed(frozenset(each.network for each in vm.interfaces))
        return vm

    def completed(self, wish: Vm) -> Vm:
        """`wish` with everything chosen that it leaves open; Blocked when it may not be."""
        vm = self._chosen(wish)
        _stop_if(rules.vm_blockers(self.cluster, vm))
        return vm

    def _chosen(self, wish: Vm) -> Vm:
        chosen: list[Interface] = []
        for index, interface in enumerate(wish.interfaces):
            chosen.append(rules.completed(self.cluster, wish.name, index, interface))
        host = self.cluster.hosts.get(wish.host)
        machine = wish.machine or (host.machine_types[0] if host and host.machine_types else "")
        cpu = wish.cpu or (host.cpu_models[0] if host and host.cpu_models else "")
        return msgspec.structs.replace(wish, interfaces=tuple(chosen), machine=machine, cpu=cpu)

    async def delete_vm(self, name: str) -> None:
        async with self._lock:
            vm = self._vm(name)
            if vm.move is not None:
                _stop_if([Refused(code="move_in_progress", what=f"vm {name}", why="it is moving")])
            await self._write({}, (f"vm/{name}",))
            del self.cluster.vms[name]
        self._changed(frozenset(each.network for each in vm.interfaces))

    async def change_addresses(self, name: str, network: str, changes: dict[str, str | None]) -> Vm:
        """Give the VM's interface in `network` other addresses; the version is raised (H-04).

        Mapping, neighbours and filters follow from the record. Blocked with every reason.
        """
        async with self._lock:
            vm = self._vm(name)
            faces = {each.network: each for each in vm.interfaces}
            before = faces.get(network, Interface(network=network, mac=""))
            wish = rules.written(msgspec.structs.replace(before, **changes))
            _stop_if(rules.address_blockers(self.cluster, name, wish))
            interfaces = tuple(wish if each == before else each for each in vm.interfaces)
            vm = msgspec.structs.replace(vm, interfaces=interfaces, version=vm.version + 1)
            await self._write({f"vm/{name}": vm})
            self.cluster.vms[name] = vm
        self._changed(frozenset({network}))
        return vm

    async def vm_state(self, name: str, state: str, reason: str | None = None) -> None:
        """Record what the NVE saw of a VM."""
        async with self._lock:
            vm = self.cluster.vms.get(name)
            if vm is None or (vm.state, vm.reason) == (state, reason):
                return
            changed = msgspec.convert(
                {**msgspec.to_builtins(vm), "state": state, "reason": reason}, Vm
            )
            await self._write({f"vm/{name}": changed})
            self.cluster.vms[name] = changed
        self._changed(frozenset(each.network for each in vm.interfaces))

    def _vm(self, name: str) -> Vm:
        vm = self.cluster.vms.get(name)
        if vm is None:
            raise Blocked(
                [
                    Refused(
                        code="unknown_vm",
                        what=f"vm {name}",
                        why="there is no such vm",
                        hint="`overland vm list` shows all",
                    )
                ]
            )
        return vm

    def vm(self, name: str) -> Vm:
        """The record of VM `name`; Blocked when there is none."""
        return self._vm(name)

    async def create_endpoint(self, wish: Endpoint) -> Endpoint:
        async with self._lock:
            interface = rules.completed(self.cluster, wish.name, 0, wish.interface)
            endpoint = msgspec.structs.replace(wish, interface=interface)
            _stop_if(rules.endpoint_blockers(self.cluster, endpoint))
            await self._write({f"endpoint/{endpoint.name}": endpoint})
            self.cluster.endpoints[endpoint.name] = endpoint
        self._changed(frozenset({interface.network}))
        return endpoint

    async def delete_endpoint(self, name: str) -> None:
        async with self._lock:
            endpoint = self.cluster.endpoints.get(name)
            if endpoint is None:
                raise Blocked(
                    [
                        Refused(
                            code="unknown_endpoint",
                            what=f"endpoint {name}",
                            why="there is no such endpoint",
                        )
                    ]
                )
            await self._write({}, (f"endpoint/{name}",))
            del self.cluster.endpoints[name]
        self._changed(frozenset({endpoint.interface.network}))

    # ------------------------------------------------------------ moves

    def move_blockers(self, name: str, to: str, *, cold: bool = False) -> tuple[Refused, ...]:
        """Everything that stands against moving `name` to `to` now."""
        blockers = rules.cold_blockers if cold else rules.move_blockers
        return tuple(blockers(self.cluster, name, to))

    def live_blockers(self, name: str, to: str, options: Options) -> tuple[Refused, ...]:
        """Everything that stands against moving a running VM, hot or, with checkpoints, warm."""
        if options.warm:
            return tuple(rules.warm_blockers(self.cluster, name, to, options))
        return self.move_blockers(name, to)

    def recovery_point(self, name: str) -> Handover | None:
        """The warm move whose newest checkpoint is all that there is of VM `name`."""
        vm = self.cluster.vms.get(name)
        ended = (each for each in self.ended_moves.values() if each.vm.name == name)
        last = max(ended, key=lambda each: each.phases[0].at_ns, default=None)
        if vm is None or last is None or not recoverable(last):
            return None
        untouched = (vm.host, vm.version) == (last.old_nve, last.version)
        begun = (vm.host, vm.version) == (last.new_nve, last.version + 1)
        return last if untouched or (begun and vm.state in ("preparing", "crashed")) else None

    async def no_recovery(self, name: str) -> str | None:
        """VM `name` needs its checkpoint no more; the host that has one, if there is any."""
        async with self._lock:
            point = self.recovery_point(name)
            if point is None:
                return None
            point = msgspec.structs.replace(point, lost=False)
            await self._write({f"move/{point.id}": point})
            self.ended_moves[point.id] = point
        return point.new_nve

    async def recover(self, name: str, *, fenced: bool) -> Vm:
        """Give VM `name` to the host of its newest checkpoint, under a new version; Blocked if not.

        One compare-and-set, before anything runs there: a former copy that comes back is stopped.
        """
        async with self._lock:
            point, vm = self.recovery_point(name), self._vm(name)
            _stop_if(rules.recover_blockers(self.cluster, name, point, fenced=fenced))
            assert point is not None
            vm = msgspec.structs.replace(
                vm, host=point.new_nve, version=point.version + 1, state="preparing"
            )
            await self._write({f"vm/{name}": vm})
            self.cluster.vms[name] = vm
        self._changed(frozenset(each.network for each in vm.interfaces))
        return vm

    async def begin_move(
        self,
        move_id: str,
        name: str,
        to: str,
        options: Options,
        forecast: Forecast | None = None,
        *,
        cold: bool = False,
    ) -> Handover:
        """Journal a new move; Blocked with every reason when it may not begin."""
        async with self._lock:
            _stop_if(
                self.move_blockers(name, to, cold=True)
                if cold
                else self.live_blockers(name, to, options)
            )
            vm = self._vm(name)
            record = msgspec.structs.replace(
                self._planned(move_id, vm, to, options),
                mode="warm" if options.warm else "hot",
                forecast=forecast,
            )
            moving = msgspec.structs.replace(vm, move=move_id)
            if cold:
                up = is_up(vm)
                peers = record.peers if up else ()
                record = msgspec.structs.replace(record, mode="cold", peers=peers, ends_as=vm.state)
                moving = msgspec.structs.replace(moving, state="migrating" if up else vm.state)
            await self._write({f"move/{move_id}": record, f"vm/{name}": moving})
            self.cluster.vms[name] = moving
            self.cluster.moves[move_id] = record
        self._changed(frozenset(port.network for port in record.ports))
        return record

    def _planned(self, move_id: str, vm: Vm, to: str, options: Options) -> Handover:
        ports = tuple(
            self._moving_port(vm, index, interface, to)
            for index, interface in enumerate(vm.interfaces)
        )
        places = set().union(*(self.cluster.places(port.network) for port in ports))
        return Handover(
            id=move_id,
            vm=vm,
            old_nve=vm.host,
            new_nve=to,
            peers=tuple(
                sorted(
                    name
                    for name in places - {vm.host, to}
                    if name in self.cluster.hosts and not self.cluster.hosts[name].dead
                )
            ),
            ports=ports,
            options=options,
            version=vm.version,
            phases=(PhaseAt(phase="planned", at_ns=time.time_ns()),),
        )

    def _moving_port(self, vm: Vm, index: int, interface: Interface, to: str) -> MovingPort:
        network = self.cluster.networks[interface.network]
        old = underlay_address(self.cluster.hosts[vm.host], network)
        new = underlay_address(self.cluster.hosts[to], network)
        assert old is not None
        assert new is not None
        return MovingPort(
            network=network.name,
            vni=network.vni,
            device=(ila_name if network.kind == "ila" else vxlan_name)(network.vni),
            port=port_name(vm.name, index),
            mac=interface.mac,
            ipv4=interface.ipv4,
            ipv6=interface.ipv6,
            underlay=network.underlay,
            mtu=network.mtu,
            old=old,
            new=new,
            tunnel=self._tunnel_number(index),
            routed=network.kind != "l2",
            ila=network.kind == "ila",
        )

    def _tunnel_number(self, index: int) -> int:
        used = {port.tunnel for move in self.cluster.moves.values() for port in move.ports}
        free = (number for number in range(1, 2**24) if number not in used)
        for _ in range(index):
            next(free)
        return next(free)

    async def journal(self, record: Handover) -> None:
        """Durable on return. With an ended move the VM is free again."""
        async with self._lock:
            puts: dict[str, Kept] = {f"move/{record.id}": record}
            vm = self.cluster.vms.get(record.vm.name)
            ended = record.phase in ENDED
            if ended and vm is not None and vm.move == record.id:
                vm = msgspec.structs.replace(vm, move=None, state=_state_after(record, vm))
                puts[f"vm/{vm.name}"] = vm
            await self._write(puts)
            self._note_move(record)
            if vm is not None:
                self.cluster.vms[vm.name] = vm
        if ended:
            self._changed(frozenset(port.network for port in record.ports))

    def _note_move(self, record: Handover) -> None:
        if record.phase in ENDED:
            self.cluster.moves.pop(record.id, None)
            self.ended_moves[record.id] = record
        else:
            self.cluster.moves[record.id] = record

    async def commit(self, record: Handover) -> None:
        """The point of no return: version, place and journal in one compare-and-set (HO-3).

        Nobody is told here: between this and the VM's first step every millisecond counts.
        """
        async with self._lock:
            vm = self.cluster.vms.get(record.vm.name)
            if vm is None or vm.version != record.version - 1 or vm.move != record.id:
                raise Conflict(f"vm {record.vm.name} is not at version {record.version - 1}")
            state = vm.state if record.mode == "cold" else "running"
            vm = msgspec.structs.replace(
                vm, version=record.version, host=record.new_nve, state=state
            )
            if record.phase in ENDED:  # at rest: with the commit all is done
                vm = msgspec.structs.replace(vm, move=None, state=_state_after(record, vm))
            await self._write({f"move/{record.id}": record, f"vm/{vm.name}": vm})
            self.cluster.vms[vm.name] = vm
            self._note_move(record)

    def publish(self, record: Handover) -> None:
        """Tell the subscribers of a committed move's VNs."""
        self._changed(frozenset(port.network for port in record.ports))

    async def open_moves(self) -> list[Handover]:
        return list(self.cluster.moves.values())

    def move(self, move_id: str) -> Handover | None:
        return self.cluster.moves.get(move_id) or self.ended_moves.get(move_id)
