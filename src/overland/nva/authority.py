"""The use cases: read, apply the rules, compare-and-set. The only writer of the domain's records.

The cluster in memory is what the store holds: a record changes here only after its transaction.
Observers hear which VNs changed, and push them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec

from overland.mobility.coordinator import keeper
from overland.model.cluster import (
    Disk,
    Endpoint,
    Gateway,
    Host,
    Interface,
    Leg,
    Network,
    Policy,
    Refused,
    Vm,
    VmState,
    WaysOut,
    moved_disks,
    numbered,
)
from overland.model.eligibility import (
    Declaration,
    Eligibility,
    Registration,
    Revocation,
    Signed,
    Statement,
)
from overland.model.forecast import Forecast
from overland.model.handover import ENDED, Handover, MovingPort, Options, PhaseAt, is_up
from overland.model.names import ila_name, port_name, vxlan_name
from overland.model.readdress import (
    Readdress,
    beside,
    former_of,
    keeping,
    readdressed,
    settled,
    without_former,
)
from overland.nva import eligibility, interfaces, rules, storage, ways_out
from overland.nva.cluster import Cluster
from overland.nva.gateways import (
    assignment_blockers,
    chosen,
    gateway_blockers,
    known_gateway,
    removal_blockers,
)
from overland.nva.mapping import underlay_address
from overland.nva.placement import Placement, drain_plan
from overland.nva.policy import allow_blockers, known_blockers, pair
from overland.nva.readdress import planned, readdress_blockers
from overland.ports import Conflict, Delete, Expect, Ledger, Put, StoreFailure

Kept = Network | Host | Vm | Endpoint | Gateway | WaysOut | Policy | Eligibility | Handover
_encode = msgspec.json.Encoder().encode
T = TypeVar("T", Network, Host, Vm, Endpoint, Gateway, WaysOut, Policy, Eligibility, Handover)


class Blocked(Exception):
    """A wish was refused; `refusals` holds every reason."""

    def __init__(self, refusals: Iterable[Refused]) -> None:
        self.refusals = tuple(refusals)
        super().__init__("; ".join(f"{each.what}: {each.why}" for each in self.refusals))


IN_USE_AGAIN = "it is in use again"


def _moves(records: dict[str, Handover]) -> dict[str, Kept]:
    """As they are written."""
    return {f"move/{name}": record for name, record in records.items()}


def _readdress(record: Handover, **what: Any) -> Handover:
    """The record of a move that changes addresses, with more that is known of that."""
    assert record.readdress is not None
    readdress = msgspec.structs.replace(record.readdress, **what)
    return msgspec.structs.replace(record, readdress=readdress)


def _ended(record: Handover) -> Handover:
    """The record of an ended move: from now on the time runs for which old addresses are kept."""
    if record.readdress is None or record.outcome != "moved":
        return record
    return _readdress(record, until_ns=time.time_ns() + round(record.readdress.keep_s * 10**9))


def _after_move(record: Handover, vm: Vm) -> Vm:
    """The VM once its move has ended: free again, in its state, with its addresses (ADR 0028)."""
    vm = msgspec.structs.replace(vm, move=None, state=_state_after(record, vm))
    if record.readdress is None or record.outcome != "moved":
        return vm
    return keeping(vm, record.readdress, record.id)


def _stop_if(refusals: Iterable[Refused]) -> None:
    found = tuple(refusals)
    if found:
        raise Blocked(found)


def _state_after(record: Handover, vm: Vm) -> VmState:
    """The state of a VM whose move has ended; what its NVE has said meanwhile stands."""
    if vm.state != "migrating":
        return vm.state
    return record.ends_as if record.outcome == "moved" else record.vm.state


def _committed(record: Handover, vm: Vm) -> Vm:
    """The VM once `record` is committed: elsewhere, under another version, or with a disk of its
    own again."""
    if record.mode == "storage":
        return msgspec.structs.replace(vm, disks=storage.brought(vm, record))
    state = vm.state if record.mode == "cold" else "running"
    disks = storage.after_move(vm, record)
    vm = msgspec.structs.replace(
        vm, version=record.version, host=record.new_nve, state=state, disks=disks
    )
    if record.readdress is not None:
        vm = readdressed(vm, record.readdress)
    return _after_move(record, vm) if record.phase in ENDED else vm


def _networks(vm: Vm) -> frozenset[str]:
    return frozenset(each.network for each in vm.interfaces)


def _revoked(known: Eligibility, origin: str, now_ns: int) -> Eligibility:
    """Without a registration; what was signed until now is of no account any more."""
    return msgspec.structs.replace(
        known,
        registration=None,
        revocation=Revocation(origin=origin, at_ns=now_ns),
        heard_ns=max(known.heard_ns, now_ns),
    )


def _forgotten(known: Eligibility, origin: str, now_ns: int) -> Eligibility:
    """Of a VM that is gone: nothing that was said of it is true of another."""
    return msgspec.structs.replace(_revoked(known, origin, now_ns), declaration=Declaration())


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
        for name, vm in self.cluster.vms.items():
            # A record from before VMs had disks names the image that it boots from and no other.
            self.cluster.vms[name] = storage.with_boot_disk(vm)
        await self._load("endpoint/", Endpoint, self.cluster.endpoints)
        await self._load("gateway/", Gateway, self.cluster.gateways)
        await self._key_gateways()
        await self._load("way_out/", WaysOut, self.cluster.ways_out)
        await self._load("policy/", Policy, self.cluster.policies)
        await self._load("eligibility/", Eligibility, self.cluster.eligibilities)
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

    async def _key_gateways(self) -> None:
        """A record from before a network could have several gateways has the network's key."""
        for key in [key for key in self.cluster.gateways if "/" not in key]:
            gateway = self.cluster.gateways.pop(key)
            await self._write({f"gateway/{gateway.key}": gateway}, (f"gateway/{key}",))
            self.cluster.gateways[gateway.key] = gateway

    async def _write(self, puts: dict[str, Kept], deletes: tuple[str, ...] = ()) -> None:
        expects = [
            Expect(key=key, revision=self._revisions.get(key, 0)) for key in (*puts, *deletes)
        ]
        writes: list[Put | Delete] = [
            Put(key=key, value=_encode(value)) for key, value in puts.items()
        ]
        writes += [Delete(key=key) for key in deletes]
        revision = await self._store.commit(expects, writes)
        for key in puts:
            self._revisions[key] = revision
        for key in deletes:
            self._revisions.pop(key, None)

    async def _write_ways(
        self, ways: ways_out.Changes, puts: dict[str, Kept], deletes: tuple[str, ...] = ()
    ) -> None:
        """Who goes out by which gateway changes in one transaction with the reason for it."""
        every: dict[str, Kept] = {f"way_out/{key}": way for key, way in ways.items() if way}
        gone = (f"way_out/{key}" for key, way in ways.items() if way is None)
        await self._write(puts | every, (*deletes, *gone))
        for key, way in ways.items():
            if way is None:
                del self.cluster.ways_out[key]
            else:
                self.cluster.ways_out[key] = way

    def _news(self, networks: frozenset[str]) -> None:
        """What has changed in these may be news to NVEs of those they may talk with, too."""
        self._changed(self.cluster.near(networks))

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
        """Record a way out of `network`, its addresses in the VN chosen; Blocked if refused.

        Tenants that have one keep it.
        """
        async with self._lock:
            gateway = chosen(self.cluster, network, host, leg)
            _stop_if(gateway_blockers(self.cluster, gateway))
            after = (*self.cluster.gateways_of(network), gateway)
            ways = ways_out.settled(self.cluster, network, after)
            await self._write_ways(ways, {f"gateway/{gateway.key}": gateway})
            self.cluster.gateways[gateway.key] = gateway
        self._news(frozenset({network}))
        return gateway

    async def leave_gateway(self, network: str, host: str) -> None:
        """From now on nobody goes out of `network` by its gateway on `host`, if it has others."""
        async with self._lock:
            _stop_if(removal_blockers(self.cluster, network, host))
            await self._write_ways(ways_out.left(self.cluster, network, host), {})
        self._news(frozenset({network}))

    async def delete_gateway(self, network: str, host: str) -> None:
        """From now on `network` is left by its other gateways, or not at all."""
        async with self._lock:
            _stop_if(removal_blockers(self.cluster, network, host))
            after = (each for each in self.cluster.gateways_of(network) if each.host != host)
            ways = ways_out.settled(self.cluster, network, after)
            key = f"{network}/{host}"
            await self._write_ways(ways, {}, (f"gateway/{key}",))
            del self.cluster.gateways[key]
        self._news(frozenset({network}))

    async def assign_gateway(self, network: str, host: str, tenants: tuple[str, ...]) -> None:
        """From now on `tenants` go out by the gateway on `host`; Blocked with every reason."""
        async with self._lock:
            _stop_if(assignment_blockers(self.cluster, network, host, tenants))
            ways = ways_out.assigned(self.cluster, network, host, tenants)
            await self._write_ways(ways, {})
        self._news(frozenset({network}))

    async def spread_gateways(self, network: str) -> None:
        """From now on its gateways share the tenants of `network`; Blocked if it has none."""
        async with self._lock:
            _stop_if(known_gateway(self.cluster, network))
            await self._write_ways(ways_out.spread(self.cluster, network), {})
        self._news(frozenset({network}))

    def gateway_tenants(self, network: str) -> list[dict[str, str | None]]:
        """By which gateway, named by its host, each tenant of `network` goes out in each family."""
        _stop_if(known_gateway(self.cluster, network))
        return ways_out.shown(self.cluster, network)

    async def allow(self, one: str, other: str) -> Policy:
        """From now on tenants of these two VNs may talk; content with being told again."""
        async with self._lock:
            policy = pair(one, other, time.time_ns())
            _stop_if(allow_blockers(self.cluster, policy))
            if policy.key in self.cluster.policies:
                return self.cluster.policies[policy.key]
            await self._write({f"policy/{policy.key}": policy})
            self.cluster.policies[policy.key] = policy
        self._news(frozenset(policy.networks))
        return policy

    async def deny(self, one: str, other: str) -> Policy:
        """From now on they may not, as by default; content with absence."""
        async with self._lock:
            policy = pair(one, other, time.time_ns())
            _stop_if(known_blockers(self.cluster, policy))
            if policy.key not in self.cluster.policies:
                return policy
            await self._write({}, (f"policy/{policy.key}",))
            del self.cluster.policies[policy.key]
        self._news(frozenset(policy.networks))
        return policy

    # ------------------------------------------------------------ hosts

    def host_seen(self, host: Host) -> bool:
        """An NVE holds its lease and says this of its host; tells whether that moves mappings."""
        before = self.cluster.hosts.get(host.name)
        known = host if before is None else before
        self.cluster.hosts[host.name] = msgspec.structs.replace(
            host,
            drained=known.drained,
            answers=known.answers,
            ready=True,
            connected_ns=time.time_ns(),
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
        _stop_if((*storage.drain_blockers(self.cluster, name), *refused))
        return plan

    async def drain(self, name: str, *, drained: bool) -> None:
        """From now on nothing is placed on host `name` (or again)."""
        if name not in self.cluster.hosts:
            _stop_if(rules.host_blockers(self.cluster, name))
        self.host_changed(name, drained=drained)
        await self.keep_host(name)

    async def keep_host(self, name: str) -> None:
        """Write what is known of host `name`, so that a restarted NVA knows where its tenants are.

        Not whether its NVE is there: that is found out anew. With one that is dead, or no longer,
        gateways are lost or won.
        """
        async with self._lock:
            host = msgspec.structs.replace(self.cluster.hosts[name], ready=False, connected_ns=0)
            ways = ways_out.all_settled(self.cluster)
            if ways or self._kept_hosts.get(name) != host:
                await self._write_ways(ways, {f"host/{name}": host})
                self._kept_hosts[name] = host
        if ways:
            self._news(frozenset(key.partition("/")[0] for key in ways))

    # ------------------------------------------------------------ machines

    async def create_vm(self, wish: Vm) -> Vm:
        """Record a VM with open addresses chosen; it is not started here."""
        async with self._lock:
            vm = self.completed(wish)
            await self._write({f"vm/{vm.name}": vm})
            self.cluster.vms[vm.name] = vm
        self._news(_networks(vm))
        return vm

    def completed(self, wish: Vm) -> Vm:
        """`wish` with everything chosen that it leaves open; Blocked when it may not be."""
        vm = storage.with_boot_disk(self._chosen(wish))
        _stop_if((*rules.vm_blockers(self.cluster, vm), *storage.wish_blockers(self.cluster, vm)))
        return vm

    def _chosen(self, wish: Vm) -> Vm:
        chosen: list[Interface] = []
        for index, interface in enumerate(wish.interfaces):
            face = rules.completed(self.cluster, wish.name, index, interface)
            chosen.append(msgspec.structs.replace(face, slot=index))
        host = self.cluster.hosts.get(wish.host)
        machine = wish.machine or (host.machine_types[0] if host and host.machine_types else "")
        cpu = wish.cpu or (host.cpu_models[0] if host and host.cpu_models else "")
        return msgspec.structs.replace(wish, interfaces=tuple(chosen), machine=machine, cpu=cpu)

    async def delete_vm(self, name: str) -> None:
        async with self._lock:
            vm = self._vm(name)
            if vm.move is not None:
                _stop_if([Refused(code="move_in_progress", what=f"vm {name}", why="it is moving")])
            puts: dict[str, Kept] = {}
            known = self.cluster.eligibilities.get(name)
            if known is not None:  # a VM that comes under its name later is another one
                known = _forgotten(known, "NVA: the VM was deleted", time.time_ns())
                puts[f"eligibility/{name}"] = known
            ways = ways_out.without(self.cluster, name)
            given_up = self._given_up(vm, None, "the VM was deleted")
            await self._write_ways(ways, puts | _moves(given_up), (f"vm/{name}",))
            del self.cluster.vms[name]
            self.ended_moves |= given_up
            if known is not None:
                self.cluster.eligibilities[name] = known
        self._news(_networks(vm))

    async def change_addresses(self, name: str, network: str, changes: dict[str, str | None]) -> Vm:
        """Give the VM's interface in `network` other addresses; the version is raised (H-04).

        Mapping, neighbours and filters follow from the record. Blocked with every reason.
        """
        async with self._lock:
            vm = self._vm(name)
            faces = {each.network: each for each in vm.interfaces}
            before = faces.get(network, Interface(network=network, mac=""))
            wish = rules.written(msgspec.structs.replace(before, **changes))
            point = self.recovery_point(name)
            _stop_if(rules.address_blockers(self.cluster, name, wish, point))
            face = settled(wish)
            now = tuple(face if each == before else each for each in vm.interfaces)
            after = msgspec.structs.replace(vm, interfaces=now, version=vm.version + 1)
            return await self._with_interfaces(vm, after, IN_USE_AGAIN)

    async def add_interface(self, name: str, wish: Interface) -> Vm:
        """Give VM `name` one more interface; Blocked with every reason.

        Of a VM that is up it is `adding` until `end_change`.
        """
        async with self._lock:
            vm = self._vm(name)
            wish = interfaces.completed(self.cluster, vm, wish)
            point = self.recovery_point(name)
            _stop_if(interfaces.add_blockers(self.cluster, vm, wish, point))
            return await self._with_interfaces(vm, interfaces.added(vm, wish))

    async def remove_interface(self, name: str, which: str) -> Vm:
        """Take its interface in network, or with MAC, `which` from VM `name`; Blocked if refused.

        Of a VM that is up it is `removing` until `end_change`.
        """
        async with self._lock:
            vm = self._vm(name)
            point = self.recovery_point(name)
            _stop_if(interfaces.remove_blockers(self.cluster, vm, which, point))
            return await self._with_interfaces(vm, interfaces.removed(vm, which))

    async def end_change(self, vm: Vm, *, done: bool) -> None:
        """The interface that `vm` was about to get or to lose is as meant, or as if never meant.

        Content with `vm` being of the past.
        """
        async with self._lock:
            now = self.cluster.vms.get(vm.name)
            if now is not None and now.version == vm.version:
                await self._with_interfaces(now, interfaces.ended(now, done=done))

    async def let_go(self, name: str, host: str, slot: int) -> None:
        """The guest of VM `name` on `host` has let go of an interface by itself, or late."""
        async with self._lock:
            vm = self.cluster.vms.get(name)
            left = interfaces.without(vm, slot) if vm is not None and vm.host == host else None
            if vm is not None and left is not None:
                await self._with_interfaces(vm, left)

    async def _with_interfaces(
        self, before: Vm, vm: Vm, because: str = "its interface was removed"
    ) -> Vm:
        given_up = self._given_up(before, vm, because)
        await self._write({f"vm/{vm.name}": vm} | _moves(given_up))
        self.cluster.vms[vm.name] = vm
        self.ended_moves |= given_up
        self._news(_networks(before) | _networks(vm))
        return vm

    # ------------------------------------------------------------ addresses of a former move

    async def give_up(self, move_id: str) -> bool:
        """The time is over for which a VM keeps the addresses that move `move_id` has changed.

        From now on they are nobody's. False: not yet, for the VM moves, and its addresses with it.
        The version stays: it orders places, and the VM is where it was.
        """
        async with self._lock:
            record = self.ended_moves.get(move_id)
            vm = self.cluster.vms.get(record.vm.name) if record is not None else None
            if vm is None or move_id not in former_of(vm):
                return True
            if vm.move is not None:
                return False
            after = without_former(vm, move_id)
            given_up = self._given_up(vm, after, "its time was over")
            await self._write({f"vm/{vm.name}": after} | _moves(given_up))
            self.cluster.vms[vm.name] = after
            self.ended_moves |= given_up
        self._news(frozenset(each.network for each in vm.interfaces))
        return True

    def _given_up(self, before: Vm, after: Vm | None, because: str) -> dict[str, Handover]:
        """The records of the moves whose old addresses are the VM's before, and not after."""
        return {
            each: _readdress(self.ended_moves[each], ended_ns=time.time_ns(), ended_because=because)
            for each in former_of(before) - former_of(after)
            if each in self.ended_moves
        }

    def left_addresses(self) -> list[Handover]:
        """The ended moves whose old addresses a VM has still, in the order in which they began."""
        every = (former_of(vm) for vm in self.cluster.vms.values())
        moves = [self.ended_moves[move] for move in frozenset().union(*every)]
        return sorted(moves, key=lambda record: record.phases[0].at_ns)

    async def note_name(self, move_id: str, said: str) -> None:
        """What became of the name of a VM whose addresses the ended move `move_id` has changed."""
        async with self._lock:
            record = _readdress(self.ended_moves[move_id], dns=said)
            await self._write({f"move/{move_id}": record})
            self.ended_moves[move_id] = record

    async def vm_state(self, name: str, state: str, reason: str | None = None) -> None:
        """Record what the NVE saw of a VM."""
        async with self._lock:
            vm = self.cluster.vms.get(name)
            if vm is None or (vm.state, vm.reason) == (state, reason):
                return
            seen = msgspec.convert(state, VmState)
            changed = msgspec.structs.replace(vm, state=seen, reason=reason)
            changed = interfaces.at_rest(changed, state)
            await self._write({f"vm/{name}": changed})
            self.cluster.vms[name] = changed
        self._news(_networks(vm))

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

    def find_vm(self, name: str) -> Vm | None:
        """The record of VM `name`, if there is one."""
        return self.cluster.vms.get(name)

    def vms_on(self, host: str) -> list[Vm]:
        """The VMs whose records say that they are on `host`."""
        return [vm for vm in self.cluster.vms.values() if vm.host == host]

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
        self._news(frozenset({interface.network}))
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
            await self._write_ways(ways_out.without(self.cluster, name), {}, (f"endpoint/{name}",))
            del self.cluster.endpoints[name]
        self._news(frozenset({endpoint.interface.network}))

    # ------------------------------------------------------------ who may be moved

    async def declare(self, name: str, origin: str, **what: Any) -> None:
        """Note what `origin` says of VM `name`, whatever of a Declaration; Blocked when wrong."""
        async with self._lock:
            self._vm(name)
            _stop_if(eligibility.declaration_blockers(name, what.get("outside", ())))
            known = eligibility.record_of(self.cluster, name)
            said = {**msgspec.to_builtins(known.declaration), **what}
            said |= {"origin": origin, "at_ns": time.time_ns()}
            declaration = msgspec.convert(said, Declaration)
            await self._keep_known(msgspec.structs.replace(known, declaration=declaration))

    async def state(self, name: str, owner: str, statement: Statement, signed: Signed) -> None:
        """Register VM `name`, or end that, as `owner` has signed it; Blocked when not believed."""
        async with self._lock:
            now_ns = time.time_ns()
            _stop_if(eligibility.statement_blockers(self.cluster, name, owner, statement, now_ns))
            known = eligibility.record_of(self.cluster, name)
            known = msgspec.structs.replace(known, heard_ns=statement.at_ns)
            origin = f"owner:{owner}"
            if statement.handles_address_change:
                registration = Registration(origin=origin, at_ns=now_ns, signed=signed)
                known = msgspec.structs.replace(known, registration=registration, revocation=None)
            else:
                known = _revoked(known, origin, now_ns)
            await self._keep_known(known)

    async def revoke(self, name: str, origin: str) -> None:
        """End the registration of VM `name`: that needs no proof, for it makes nothing possible."""
        async with self._lock:
            self._vm(name)
            known = eligibility.record_of(self.cluster, name)
            if known.registration is None:
                why, hint = "it is not registered", f"`overland vm eligibility show {name}`"
                refusal = Refused(code="not_registered", what=f"vm {name}", why=why, hint=hint)
                raise Blocked([refusal])
            await self._keep_known(_revoked(known, origin, time.time_ns()))

    async def _keep_known(self, known: Eligibility) -> None:
        await self._write({f"eligibility/{known.vm}": known})
        self.cluster.eligibilities[known.vm] = known

    def eligibility(self, name: str) -> dict[str, Any]:
        """All that is known of whether VM `name` may be moved; Blocked when there is none."""
        return eligibility.shown(self.cluster, self._vm(name), self.ended_moves.values())

    def flags(self, name: str, to: str, options: Options) -> tuple[str, ...]:
        """What a move of VM `name` to `to` would not cover, and would be carried out for all that.

        Of a move that nothing stands against.
        """
        vm = self._vm(name)
        readdress = planned(vm, options)
        return eligibility.grounds(self.cluster, vm, to, readdress, time.time_ns()).flags

    def latency_blockers(
        self, name: str, mode: str, forecast: Forecast | None
    ) -> tuple[Refused, ...]:
        """Whether the latency class of VM `name` bears such a move (R-62).

        A cold one is taken to be as long as the longest that the VM has had.
        """
        vm = self._vm(name)
        seen = eligibility.outages_ms(self.ended_moves.values(), name)
        hot_ms = forecast.stop_ms if forecast is not None else None
        expected_ms = seen.get("cold") if mode == "cold" else hot_ms
        return tuple(eligibility.latency_blockers(self.cluster, vm, expected_ms, mode))

    # ------------------------------------------------------------ moves

    def cold_blockers(self, name: str, to: str, options: Options) -> tuple[Refused, ...]:
        """Everything that stands against moving `name` cold to `to` now."""
        found = tuple(rules.cold_blockers(self.cluster, name, to))
        if name in self.cluster.vms:
            found += self.latency_blockers(name, "cold", None)
        return (*found, *readdress_blockers(self.cluster, name, options))

    def live_blockers(self, name: str, to: str, options: Options) -> tuple[Refused, ...]:
        """Everything that stands against moving a running VM, hot or, with checkpoints, warm."""
        found = (
            rules.warm_blockers(self.cluster, name, to, options)
            if options.warm
            else rules.move_blockers(self.cluster, name, to)
        )
        return (*found, *readdress_blockers(self.cluster, name, options))

    def recovery_point(self, name: str) -> Handover | None:
        """The ended move that has left a state of VM `name` with its `keeper`, but not the VM."""
        vm, last = self.cluster.vms.get(name), self._last_move(name)
        kept = keeper(last) if last is not None else None
        if vm is None or last is None or kept is None:
            return None
        left = last.new_nve if last.mode == "cold" else last.old_nve
        untouched = (vm.host, vm.version) == (left, last.version)
        begun = (vm.host, vm.version) == (kept, last.version + 1)
        return last if untouched or (begun and vm.state in ("preparing", "crashed")) else None

    def to_turn_back(self, host: str) -> tuple[Handover, ...]:
        """Cold moves that ended without their old NVE `host`, which may still have the VM."""
        return tuple(
            record
            for record in self.ended_moves.values()
            if record.mode == "cold" and record.lost and record.old_nve == host
            if (vm := self.cluster.vms.get(record.vm.name)) is not None
            if (vm.host, vm.version, vm.move) == (host, record.version, None)
        )

    def _last_move(self, name: str) -> Handover | None:
        ended = (each for each in self.ended_moves.values() if each.vm.name == name)
        return max(ended, key=lambda each: each.phases[0].at_ns, default=None)

    async def turned_back(self, move_id: str) -> None:
        """The old NVE of a cold move was heard at last: what is left of the VM is as before."""
        async with self._lock:
            record = self.ended_moves[move_id]
            if record.mode == "cold" and record.lost:
                record = msgspec.structs.replace(record, lost=False)
                await self._write({f"move/{move_id}": record})
                self.ended_moves[move_id] = record

    def is_alive(self, name: str, state: str) -> bool:
        """Tell whether VM `name`, seen in `state`, needs no more what another host keeps of it.

        A VM that is paused in the middle of a warm move has still to be run again.
        """
        point = self.recovery_point(name)
        cold = point is not None and point.mode == "cold"
        return state == "running" or (cold and state == "paused")

    async def no_recovery(self, name: str) -> Handover | None:
        """VM `name` needs no recovery any more; the move whose `keeper` may drop what it has."""
        async with self._lock:
            point = self.recovery_point(name)
            if point is None:
                return None
            since = {"resume_ns": time.time_ns()} if point.mode == "cold" else {"lost": False}
            after = msgspec.structs.replace(point, **since)
            await self._write({f"move/{point.id}": after})
            self.ended_moves[point.id] = after
        return point

    async def recover(self, name: str, *, fenced: bool) -> Vm:
        """Give VM `name` to the host of its newest checkpoint, under a new version; Blocked if not.

        One compare-and-set, before anything runs there: a former copy that comes back is stopped.
        """
        async with self._lock:
            point, vm = self.recovery_point(name), self._vm(name)
            _stop_if(rules.recover_blockers(self.cluster, name, point, fenced=fenced))
            assert point is not None
            host, version = keeper(point), point.version + 1
            assert host is not None
            vm = msgspec.structs.replace(
                vm,
                host=host,
                version=version,
                state="preparing",
                disks=storage.settled(vm.disks, host, version),
            )
            await self._write({f"vm/{name}": vm})
            self.cluster.vms[name] = vm
        self._news(_networks(vm))
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
        disks: tuple[Disk, ...] = (),
    ) -> Handover:
        """Journal a new move; Blocked with every reason when it may not begin.

        `disks` are the VM's, each of the kind that counts for this move.
        """
        async with self._lock:
            blockers = self.cold_blockers if cold else self.live_blockers
            _stop_if(blockers(name, to, options))
            vm = self._vm(name)
            if not cold:
                _stop_if(self.latency_blockers(name, options.mode, forecast))
            record = self._planned(move_id, msgspec.structs.replace(vm, disks=disks), to, options)
            now_ns = time.time_ns()
            record = msgspec.structs.replace(
                record,
                mode=options.mode,
                forecast=forecast,
                grounds=eligibility.grounds(self.cluster, vm, to, record.readdress, now_ns),
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
        self._news(frozenset(port.network for port in record.ports))
        return record

    async def begin_disk_move(self, move_id: str, moving: Vm, options: Options) -> Handover:
        """Journal the move of one disk alone (of kind moved in `moving`); Blocked if it may not be.

        The VM is not moved meanwhile, nor anything else done to it.
        """
        async with self._lock:
            [disk] = moved_disks(moving)
            to = moving.host
            _stop_if(storage.alone_blockers(self.cluster, moving.name, disk.path, to))
            vm = self._vm(moving.name)
            record = Handover(
                id=move_id,
                vm=msgspec.structs.replace(vm, disks=moving.disks),
                mode="storage",
                old_nve=disk.at,
                new_nve=to,
                ports=(),
                options=options,
                version=vm.version,
                phases=(PhaseAt(phase="planned", at_ns=time.time_ns()),),
            )
            vm = msgspec.structs.replace(vm, move=move_id)
            await self._write({f"move/{move_id}": record, f"vm/{vm.name}": vm})
            self.cluster.vms[vm.name] = vm
            self.cluster.moves[move_id] = record
        return record

    def _planned(self, move_id: str, vm: Vm, to: str, options: Options) -> Handover:
        readdress = planned(vm, options)
        ports = tuple(
            self._moving_port(vm, slot, interface, to, self._tunnel_number(place), readdress)
            for place, (slot, interface) in enumerate(numbered(vm))
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
            readdress=readdress,
            version=vm.version,
            phases=(PhaseAt(phase="planned", at_ns=time.time_ns()),),
        )

    def _moving_port(
        self,
        vm: Vm,
        slot: int,
        interface: Interface,
        to: str,
        tunnel: int,
        readdress: Readdress | None,
    ) -> MovingPort:
        network = self.cluster.networks[interface.network]
        old = underlay_address(self.cluster.hosts[vm.host], network)
        new = underlay_address(self.cluster.hosts[to], network)
        assert old is not None
        assert new is not None
        return MovingPort(
            network=network.name,
            vni=network.vni,
            device=(ila_name if network.kind == "ila" else vxlan_name)(network.vni),
            port=port_name(vm.name, slot),
            mac=interface.mac,
            ipv4=interface.ipv4,
            ipv6=interface.ipv6,
            beside=beside(interface, readdress),
            underlay=network.underlay,
            mtu=network.mtu,
            old=old,
            new=new,
            tunnel=tunnel,
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
            vm = self.cluster.vms.get(record.vm.name)
            ended = record.phase in ENDED
            if ended:
                record = _ended(record)
            puts: dict[str, Kept] = {f"move/{record.id}": record}
            if ended and vm is not None and vm.move == record.id:
                vm = _after_move(record, vm)
                puts[f"vm/{vm.name}"] = vm
            await self._write(puts)
            self._note_move(record)
            if vm is not None:
                self.cluster.vms[vm.name] = vm
        if ended:
            self._news(frozenset(port.network for port in record.ports))

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
            before = record.version if record.mode == "storage" else record.version - 1
            if vm is None or vm.version != before or vm.move != record.id:
                raise Conflict(f"vm {record.vm.name} is not at version {before}")
            if record.phase in ENDED:  # at rest: with the commit all is done
                record = _ended(record)
            after = _committed(record, vm)
            given_up = self._given_up(vm, after, IN_USE_AGAIN)
            puts: dict[str, Kept] = {f"move/{record.id}": record, f"vm/{vm.name}": after}
            await self._write(puts | _moves(given_up))
            self.cluster.vms[vm.name] = after
            self._note_move(record)
            self.ended_moves |= given_up

    def publish(self, record: Handover) -> None:
        """Tell the subscribers of a committed move's VNs."""
        self._news(frozenset(port.network for port in record.ports))

    async def open_moves(self) -> list[Handover]:
        return list(self.cluster.moves.values())

    def move(self, move_id: str) -> Handover | None:
        return self.cluster.moves.get(move_id) or self.ended_moves.get(move_id)
