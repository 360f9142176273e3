"""May this wish come true, and why not? Pure: all blockers at once, each with its remedy."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterator

import msgspec

from overland.mobility.coordinator import keeper
from overland.model.cluster import (
    SLOTS,
    Endpoint,
    Host,
    Interface,
    Network,
    Refused,
    Vm,
    VmState,
)
from overland.model.forecast import Forecast
from overland.model.handover import Handover, Options, is_up
from overland.model.ila import identifier, tenants
from overland.model.names import (
    GATEWAY_MAC,
    OVERHEAD_BYTES,
    default_mac,
    parse_address,
    parse_mac,
    parse_name,
    parse_prefix,
    parse_vni,
)
from overland.model.receipt import timestamp
from overland.nva.cluster import AT_REST, Cluster, Tsi
from overland.nva.eligibility import eligibility_blockers
from overland.nva.identifiers import identifier_blockers, identifiers, ila_network_blockers
from overland.nva.mapping import gateways, underlay_address

RESERVE_MIB = 32
"""What QEMU itself needs beside a guest's memory, in MiB."""


def _no(code: str, what: str, why: str, hint: str = "") -> Refused:
    return Refused(code=code, what=what, why=why, hint=hint)


def _unknown(kind: str, name: str) -> Refused:
    return _no(
        f"unknown_{kind}",
        f"{kind} {name}",
        "there is no such " + kind,
        f"`overland {'vm' if kind == 'vm' else kind} list` shows all",
    )


def network_blockers(cluster: Cluster, wish: Network) -> Iterator[Refused]:
    """Why network `wish` cannot be made."""
    what = f"network {wish.name}"
    for check in (
        lambda: parse_name(wish.name, "network"),
        lambda: parse_vni(wish.vni),
        lambda: parse_prefix(wish.ipv4, 4) if wish.ipv4 else None,
        lambda: parse_prefix(wish.ipv6, 6) if wish.ipv6 else None,
    ):
        try:
            check()
        except ValueError as error:
            yield _no("malformed", what, str(error))
    if wish.kind == "ila":
        yield from ila_network_blockers(cluster, wish)
    if wish.kind == "l3":
        yield from _no_room_for_a_gateway(wish)
    if not 1280 <= wish.mtu <= 65000:
        yield _no("malformed", what, f"MTU {wish.mtu}: use 1280 to 65000")
    if wish.name in cluster.networks:
        yield _no("exists", what, "the name is taken", "choose another name")
    for other in cluster.networks.values():
        if other.vni == wish.vni and other.name != wish.name:
            hint = "choose another VNI"
            yield _no("vni_taken", what, f"VNI {wish.vni} belongs to network {other.name}", hint)
    for host in cluster.hosts.values():
        yield from _too_small(host, wish)


def _no_room_for_a_gateway(wish: Network) -> Iterator[Refused]:
    """A routed VN needs a subnet, and in each one the gateway's address and another."""
    what = f"network {wish.name}"
    subnets = [subnet for subnet in (wish.ipv4, wish.ipv6) if subnet]
    if not subnets:
        hint = "give --ipv4, --ipv6 or both"
        yield _no("no_subnet", what, "a routed network needs a subnet for its gateway", hint)
    for subnet in subnets:
        with contextlib.suppress(ValueError):  # it was named as malformed already
            if ipaddress.ip_network(subnet).num_addresses < 4:
                why = f"{subnet} has no room for a gateway and tenants"
                yield _no("malformed", what, why, "use a /30, a /126 or larger")


def _too_small(host: Host, network: Network) -> Iterator[Refused]:
    if network.kind == "ila" and host.locator is None:
        return  # it has no part in the VN
    overhead = 0 if network.kind == "ila" else OVERHEAD_BYTES[network.underlay]
    need = network.mtu + overhead
    if host.underlay_mtu < need:
        yield _no(
            "mtu_too_small",
            f"network {network.name}",
            f"host {host.name} has an underlay MTU of {host.underlay_mtu}, {need} is needed",
            f"raise it, or use --mtu {host.underlay_mtu - overhead}",
        )


def network_in_use(cluster: Cluster, name: str) -> Iterator[Refused]:
    """Why network `name` cannot be deleted."""
    if name not in cluster.networks:
        yield _unknown("network", name)
    for tsi in cluster.tsis():
        if tsi.interface.network == name:
            hint = f"delete {tsi.owner} first"
            if tsi.kind == "gateway":
                hint = f"`overland network gateway remove {name} --host {tsi.host}`"
            yield _no("in_use", f"network {name}", f"{tsi.owner} is attached", hint)
    for policy in cluster.policies.values():
        if name in policy.networks:
            why = f"{' and '.join(policy.networks)} may talk with each other"
            hint = f"`overland network deny {' '.join(policy.networks)}`"
            yield _no("in_use", f"network {name}", why, hint)


def host_blockers(cluster: Cluster, name: str) -> Iterator[Refused]:
    """Why nothing can be placed on host `name`."""
    host = cluster.hosts.get(name)
    if host is None:
        yield _unknown("host", name)
        return
    if not host.ready:
        hint = "start its NVE daemon, or choose another host"
        yield _no("host_not_ready", f"host {name}", "its NVE does not answer", hint)
    if host.drained:
        yield _no(
            "host_drained", f"host {name}", "it is drained", f"`overland host undrain {name}`"
        )
    for why in host.blockers:
        yield _no("host_blocked", f"host {name}", why)


def completed(cluster: Cluster, owner: str, index: int, wish: Interface) -> Interface:
    """Return `wish` with what was left open chosen: MAC from the name, first free addresses."""
    network = cluster.networks.get(wish.network)
    mac = wish.mac or default_mac(owner, index)
    wish = written(wish)
    if network is None:
        return Interface(network=wish.network, mac=mac, ipv4=wish.ipv4, ipv6=wish.ipv6)
    return Interface(
        network=wish.network,
        mac=mac,
        ipv4=wish.ipv4 or _free(cluster, network, network.ipv4),
        ipv6=wish.ipv6 or _free(cluster, network, network.ipv6),
    )


def written(wish: Interface) -> Interface:
    """Return `wish` with its addresses as kernels write them, or they never have what is wanted.

    What is no address stays as it is, to be refused.
    """
    return msgspec.structs.replace(wish, ipv4=_address(wish.ipv4), ipv6=_address(wish.ipv6))


def _address(text: str | None) -> str | None:
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(text)) if text else None
    return text


def _free(cluster: Cluster, network: Network, subnet: str | None) -> str | None:
    if subnet is None:
        return None
    taken = {
        address
        for tsi in cluster.tsis()
        if tsi.interface.network == network.name
        for address in tsi.addresses
    }
    if network.kind == "ila":
        known = identifiers(cluster)
        return next(each for each in tenants(subnet) if identifier(each) not in known)
    hosts = iter(ipaddress.ip_network(subnet).hosts())
    next(hosts)  # the first is the gateway's
    return next((str(address) for address in hosts if str(address) not in taken), None)


def interface_blockers(
    cluster: Cluster, owner: str, interfaces: tuple[Interface, ...]
) -> Iterator[Refused]:
    """Why `owner` cannot have these interfaces."""
    for interface in interfaces:
        network = cluster.networks.get(interface.network)
        if network is None:
            yield _unknown("network", interface.network)
            continue
        yield from _address_blockers(cluster, owner, network, interface)


def _address_blockers(
    cluster: Cluster, owner: str, network: Network, interface: Interface
) -> Iterator[Refused]:
    try:
        parse_mac(interface.mac)
        for address, family, subnet in (
            (interface.ipv4, 4, network.ipv4),
            (interface.ipv6, 6, network.ipv6),
        ):
            if address is None:
                continue
            parse_address(address, family)
            if subnet is None and network.kind != "l2":
                why = f"{address}: network {network.name} has no IPv{family} subnet"
                yield _no("address_outside", owner, why, "leave it out")
            if subnet and ipaddress.ip_address(address) not in ipaddress.ip_network(subnet):
                why = f"{address} is outside {subnet}"
                yield _no("address_outside", owner, why, f"choose one inside {subnet}")
    except ValueError as error:
        yield _no("malformed", owner, str(error))
        return
    if network.kind != "l2":
        yield from _routed_blockers(owner, network, interface)
    if network.kind == "ila":
        yield from identifier_blockers(cluster, owner, network, interface)
    for tsi in cluster.tsis():
        itself = (tsi.owner, tsi.interface.mac) == (owner, interface.mac)
        if tsi.interface.network != network.name or itself:
            continue
        theirs = {tsi.interface.mac, *tsi.addresses}
        for mine in (interface.mac, interface.ipv4, interface.ipv6):
            if mine in theirs:
                yield _no(
                    "address_taken", owner, f"{mine} belongs to {tsi.owner}", _until(tsi, mine)
                )


def _until(tsi: Tsi, address: str) -> str:
    """What to do instead; an address that is only kept is free later."""
    for each in tsi.interface.former:
        if each.address == address:
            return f"choose another, or wait: {tsi.owner} keeps it until {timestamp(each.until_ns)}"
    return "choose another"


def _routed_blockers(owner: str, network: Network, interface: Interface) -> Iterator[Refused]:
    """What the router of a routed VN has for itself, and what it needs to find a tenant."""
    addresses = [address for address in (interface.ipv4, interface.ipv6) if address]
    if not addresses:
        why = f"network {network.name} is routed: without an address nobody finds it"
        yield _no("no_address", owner, why, "no address is free in its subnets: delete something")
    own = {GATEWAY_MAC, *(gateway.partition("/")[0] for gateway in gateways(network))}
    for mine in (interface.mac, *addresses):
        if mine in own:
            yield _no("address_taken", owner, f"{mine} is the gateway's", "choose another")


def _names_taken(cluster: Cluster, name: str, kind: str) -> Iterator[Refused]:
    try:
        parse_name(name, kind)
    except ValueError as error:
        yield _no("malformed", f"{kind} {name}", str(error))
    if name in cluster.vms or name in cluster.endpoints:
        yield _no("exists", f"{kind} {name}", "the name is taken", "choose another name")


def vm_blockers(cluster: Cluster, wish: Vm) -> Iterator[Refused]:
    """Why VM `wish` cannot be made on its host."""
    yield from _names_taken(cluster, wish.name, "vm")
    try:
        parse_name(wish.owner or "nobody", "owner")
    except ValueError as error:
        yield _no("malformed", f"vm {wish.name}", str(error))
    yield from host_blockers(cluster, wish.host)
    yield from too_many(wish.name, len(wish.interfaces))
    yield from interface_blockers(cluster, wish.name, wish.interfaces)
    if wish.memory_mib < 16:
        yield _no("malformed", f"vm {wish.name}", f"{wish.memory_mib} MiB of memory is too little")
    if wish.host in cluster.hosts:
        yield from _fits(cluster, cluster.hosts[wish.host], wish)
        yield from reach(cluster, cluster.hosts[wish.host], wish.interfaces)


def too_many(name: str, count: int) -> Iterator[Refused]:
    """Why VM `name` cannot have `count` interfaces."""
    if count > SLOTS:
        why = f"it would have {count} interfaces, and has room for {SLOTS}"
        yield _no("no_slot", f"vm {name}", why, "remove another first")


def address_blockers(
    cluster: Cluster, name: str, wish: Interface, point: Handover | None
) -> Iterator[Refused]:
    """Why VM `name` cannot have the addresses of `wish` on the interface that it has there.

    `point`: the move that has left a state of it elsewhere, which is known by the VM's version.
    """
    vm = cluster.vms.get(name)
    if vm is None:
        yield _unknown("vm", name)
        return
    yield from already_moving(vm)
    yield from changing(vm)
    if point is not None:
        yield to_be_recovered(vm, keeper(point))
    if not any(each.network == wish.network for each in vm.interfaces):
        why = f"it has no interface in network {wish.network}"
        yield _no("unknown_interface", f"vm {name}", why, f"`overland vm show {name}`")
    else:
        yield from interface_blockers(cluster, name, (wish,))


def endpoint_blockers(cluster: Cluster, wish: Endpoint) -> Iterator[Refused]:
    """Why endpoint `wish` cannot be made on its host."""
    yield from _names_taken(cluster, wish.name, "endpoint")
    yield from host_blockers(cluster, wish.host)
    yield from interface_blockers(cluster, wish.name, (wish.interface,))
    if wish.host in cluster.hosts:
        yield from reach(cluster, cluster.hosts[wish.host], (wish.interface,))


def free_memory_mib(cluster: Cluster, host: Host) -> int:
    """What VMs, also those on their way, leave of the host's memory, in MiB; may be negative."""
    used = sum(
        each.memory_mib + RESERVE_MIB for each in cluster.vms.values() if each.host == host.name
    )
    used += sum(
        move.vm.memory_mib + RESERVE_MIB
        for move in cluster.moves.values()
        if move.new_nve == host.name != move.vm.host
    )
    return host.memory_total_mib - used


def _fits(cluster: Cluster, host: Host, vm: Vm) -> Iterator[Refused]:
    free = free_memory_mib(cluster, host)
    if vm.memory_mib + RESERVE_MIB > free:
        yield _no(
            "not_enough_memory",
            f"host {host.name}",
            f"{vm.memory_mib + RESERVE_MIB} MiB are needed, {max(0, free)} MiB are free",
            "choose another host, or move something away first",
        )


def no_underlay(host: Host, network: Network) -> Refused:
    """Nothing of `network` can be on `host`, for want of an address there."""
    what = f"network {network.name}"
    if network.kind == "ila":
        hint = "give it one (`locator` in its NVE's configuration)"
        return _no("no_locator", what, f"host {host.name} has no locator", hint)
    return _no("no_underlay", what, f"host {host.name} has no {network.underlay} underlay address")


def reach(cluster: Cluster, host: Host, interfaces: tuple[Interface, ...]) -> Iterator[Refused]:
    """What keeps a VN of these interfaces, or one it may talk with (N-15), from being on `host`."""
    for network in _near(cluster, interfaces):
        if underlay_address(host, network) is None:
            yield no_underlay(host, network)
        yield from _too_small(host, network)


def _near(cluster: Cluster, interfaces: tuple[Interface, ...]) -> list[Network]:
    names = cluster.near(each.network for each in interfaces)
    return [cluster.networks[name] for name in sorted(names & cluster.networks.keys())]


def move_blockers(cluster: Cluster, name: str, to: str) -> Iterator[Refused]:
    """Why VM `name` cannot move hot to host `to` now (checked before anything moves)."""
    yield from _any_move_blockers(cluster, name, to)
    vm = cluster.vms.get(name)
    if vm is None:
        return
    what = f"vm {name}"
    yield from away(cluster, vm.host)
    yield from already_moving(vm)
    if vm.state != "running" and vm.move is None:
        why = f"it is {vm.state}; a hot move needs a running VM"
        yield _no("not_running", what, why, f"`overland vm start {name}`")
    yield from _deaf_peers(cluster, vm, to)
    host, old = cluster.hosts.get(to), cluster.hosts.get(vm.host)
    for each in filter(None, (old, host)):
        if not each.pauses_by:
            why = f"the hypervisor of host {each.name} cannot pause a VM and move it meanwhile"
            yield _no("cold_only", what, why, "use --cold")
    if host is not None and vm.host != to:
        yield from _compatible(old, host, vm)


def away(cluster: Cluster, host: str) -> Iterator[Refused]:
    """Why nothing can be done to what is on `host`, if its NVE does not answer."""
    blockers = host_blockers(cluster, host)
    yield from (refusal for refusal in blockers if refusal.code == "host_not_ready")


def already_moving(vm: Vm) -> Iterator[Refused]:
    """Why nothing else can be done with a VM that moves."""
    if vm.move is not None:
        hint = f"wait for it, or `overland migration abort {vm.move}`"
        yield _no("move_in_progress", f"vm {vm.name}", f"migration {vm.move} moves it", hint)


def changing(vm: Vm) -> Iterator[Refused]:
    """Why nothing else can be done with a VM whose interfaces are being changed."""
    for each in vm.interfaces:
        if each.change is not None:
            how = "plugged in" if each.change == "adding" else "unplugged"
            why = f"its interface in network {each.network} is being {how}"
            hint = f"wait a moment; while host {vm.host} is away, start its NVE daemon"
            yield _no("interface_change_in_progress", f"vm {vm.name}", why, hint)


def to_be_recovered(vm: Vm, kept: str | None) -> Refused:
    """Nothing may change by which the state of `vm` that host `kept` keeps is known to be its."""
    why = f"it is not known to run, and {kept} keeps a state of it"
    hint = f"`overland vm recover {vm.name}` or `start`"
    return _no("to_be_recovered", f"vm {vm.name}", why, hint)


MIN_INTERVAL_S = 0.1
"""Between checkpoints; the VM stands still for some milliseconds at each."""


def warm_blockers(cluster: Cluster, name: str, to: str, options: Options) -> Iterator[Refused]:
    """Why VM `name` cannot move warm to host `to`: as hot, and what checkpoints need."""
    yield from move_blockers(cluster, name, to)
    what = f"vm {name}"
    if options.checkpoints < 1 or options.interval_s < MIN_INTERVAL_S:
        why = f"at least one checkpoint, at intervals of at least {MIN_INTERVAL_S * 1000:.0f} ms"
        yield _no("malformed", what, why, "--checkpoints 3 --interval 1s")
    vm = cluster.vms.get(name)
    if vm is not None and vm.disks:
        why = (
            "it has a disk, and a checkpoint holds memory only: the two would not be of one instant"
        )
        yield _no("disk_not_in_checkpoint", what, why, "move it hot")


def recover_blockers(
    cluster: Cluster, name: str, point: Handover | None, *, fenced: bool
) -> Iterator[Refused]:
    """Why VM `name` cannot be run from what move `point` has left with its `keeper`.

    Never while its former copy may run (R-14): it has crashed, its host is dead, or somebody says
    that it is off.
    """
    vm = cluster.vms.get(name)
    if vm is None:
        yield _unknown("vm", name)
        return
    what, host = f"vm {name}", cluster.hosts.get(vm.host)
    kept = keeper(point) if point is not None else None
    gone = vm.state == "crashed" or vm.host == kept
    if host is not None and host.ready and not gone:
        hint = f"`overland vm stop {name}`, or move it"
        yield _no("old_copy_may_run", what, f"host {vm.host} is there, and may run it", hint)
    elif host is not None and not host.dead and not fenced and not gone:
        why = f"host {vm.host} is away, but not known to be dead"
        yield _no("old_copy_may_run", what, why, "make sure that it is off, then `--fenced`")
    if vm.move is not None:
        hint = f"wait for it, or `overland migration repair {vm.move}`"
        yield _no("move_in_progress", what, f"migration {vm.move} has not ended", hint)
    elif point is None:
        why = "no move has left a checkpoint or a saved state of it on another host"
        yield _no("no_checkpoint", what, why, f"`overland vm start {name}` once its host is back")
    if kept is None:
        return
    yield from (
        refusal for refusal in host_blockers(cluster, kept) if refusal.code != "host_drained"
    )
    new = cluster.hosts.get(kept)
    if new is not None and vm.host != kept:
        yield from _fits(cluster, new, vm)
        yield from reach(cluster, new, vm.interfaces)


def forecast_blockers(name: str, forecast: Forecast, options: Options) -> Iterator[Refused]:
    """Why a move with that forecast would not come to its end as the operator wishes it.

    Who says `--timeout-action pause` wants it all the same.
    """
    if options.timeout_action == "pause":
        return
    what = f"vm {name}"
    if not forecast.converges:
        hint = (
            f"`--timeout-action pause` stops it in any case; `--max-downtime "
            f"{forecast.stop_ms / 1000:.1f}s`, or more `--bandwidth`, lets it be equal"
        )
        yield _no("not_converging", what, forecast.note, hint)
    elif forecast.copy_ms > options.timeout_s * 1000:
        why = (
            f"its memory takes about {forecast.copy_ms / 1000:.0f} s at "
            f"{forecast.rate_bytes_per_s / 2**20:.0f} MiB/s, --timeout is {options.timeout_s:g} s"
        )
        yield _no("too_slow", what, why, "a longer `--timeout`, or more `--bandwidth`")


def cold_blockers(cluster: Cluster, name: str, to: str) -> Iterator[Refused]:
    """Why VM `name` cannot be moved cold to host `to` now."""
    yield from _any_move_blockers(cluster, name, to)
    vm = cluster.vms.get(name)
    if vm is None:
        return
    yield from already_moving(vm)
    if not is_up(vm) and vm.state not in AT_REST and vm.move is None:
        why = f"it is {vm.state}; a cold move needs a VM that is up or at rest"
        yield _no("wrong_state", f"vm {name}", why, "wait a moment")
    if is_up(vm):
        yield from _deaf_peers(cluster, vm, to)
    carries = is_up(vm) or vm.state == "suspended"
    if carries:
        yield from away(cluster, vm.host)
    host, old = cluster.hosts.get(to), cluster.hosts.get(vm.host)
    if host is not None and vm.host != to:
        # A saved state runs on only where it could have run before.
        yield from _compatible(old if carries else None, host, vm)


def _any_move_blockers(cluster: Cluster, name: str, to: str) -> Iterator[Refused]:
    """Why VM `name` cannot be on host `to`, in whatever way it would come there."""
    vm, host = cluster.vms.get(name), cluster.hosts.get(to)
    if vm is None:
        yield _unknown("vm", name)
        yield from host_blockers(cluster, to) if host is None else ()
        return
    yield from host_blockers(cluster, to)
    yield from changing(vm)
    if vm.host == to:
        yield _no("same_host", f"vm {name}", f"it is on host {to} already", "choose another host")
    elif host is not None:
        yield from _fits(cluster, host, vm)
        for network in _near(cluster, vm.interfaces):
            yield from _too_small(host, network)
    yield from eligibility_blockers(cluster, vm, to)


def _deaf_peers(cluster: Cluster, vm: Vm, to: str) -> Iterator[Refused]:
    """Hosts whose tenants would go on sending to the old host: nobody can tell their NVE."""
    places = set().union(*(cluster.places(each.network) for each in vm.interfaces))
    for name in sorted(places - {vm.host, to}):
        host = cluster.hosts.get(name)
        if host is not None and not host.ready and not host.dead:
            why = "it has tenants or a gateway of the VM's network, and its NVE does not answer"
            yield _no("peer_not_ready", f"host {name}", why, "start its NVE daemon")


def _compatible(old: Host | None, new: Host, vm: Vm) -> Iterator[Refused]:
    """What of the machine host `new` lacks; `old` is where its present state comes from."""
    what = f"vm {vm.name}"
    if vm.machine and vm.machine not in new.machine_types:
        why = f"host {new.name} does not know machine type {vm.machine}"
        yield _no("machine_unknown", what, why, f"upgrade QEMU on {new.name}")
    if vm.cpu and vm.cpu not in new.cpu_models:
        yield _no("cpu_unknown", what, f"host {new.name} does not offer CPU model {vm.cpu}")
    if old is not None and old.accelerator != new.accelerator:
        why = f"it runs under {old.accelerator}, host {new.name} offers {new.accelerator}"
        yield _no("accelerator_differs", what, why)


_FROM: dict[str, tuple[VmState, ...]] = {
    "start": ("shutdown", "crashed"),
    "pause": ("running",),
    "resume": ("paused", "suspended"),
    "suspend": ("running", "paused"),
    "stop": (
        *("running", "paused", "suspended", "crashed"),
        *("preparing", "suspending", "resuming"),
    ),
}
"""From which states an operator may ask for what (R-48)."""


def action_refused(vm: Vm, action: str) -> Refused | None:
    """Why `action` is not for a VM in this state; None when it is."""
    if vm.state in _FROM[action]:
        return next(changing(vm), None) if action == "suspend" else None
    why = f"it is {vm.state}; {action} needs {' or '.join(_FROM[action])}"
    return _no("wrong_state", f"vm {vm.name}", why)
