"""Intent into kernel terms. Pure: the same intent always gives the same state."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from ipaddress import ip_interface
from itertools import product
from typing import Literal

from overland.model.cluster import Family
from overland.model.names import (
    GATEWAY_MAC,
    ROUTER_MTU_BYTES,
    bridge_name,
    gateway_name,
    ila_name,
    leg_name,
    mark,
    port_name,
    router_name,
    vxlan_name,
    way_out_table,
)
from overland.model.nve import (
    FLOOD,
    BridgeEntry,
    DefaultRoute,
    Fact,
    HostRoute,
    IdentifierEntry,
    InTransit,
    KernelState,
    Link,
    LocatorEntry,
    Muted,
    Neighbour,
    NveIntent,
    Passage,
    RemoteIntent,
    RouterNeighbour,
    TsiIntent,
    TunnelEntry,
    VnIntent,
    WayOut,
)


def render(intent: NveIntent) -> KernelState:
    """Return the kernel state that makes `intent` true."""
    facts = [fact for vn in intent.vns for fact in _vn(vn)]
    facts += _passages(intent)
    return KernelState(
        links=frozenset(f for f in facts if isinstance(f, Link)),
        bridge_entries=frozenset(f for f in facts if isinstance(f, BridgeEntry)),
        tunnel_entries=frozenset(f for f in facts if isinstance(f, TunnelEntry)),
        locator_entries=frozenset(f for f in facts if isinstance(f, LocatorEntry)),
        identifier_entries=frozenset(f for f in facts if isinstance(f, IdentifierEntry)),
        neighbours=frozenset(f for f in facts if isinstance(f, Neighbour)),
        router_neighbours=frozenset(f for f in facts if isinstance(f, RouterNeighbour)),
        host_routes=frozenset(f for f in facts if isinstance(f, HostRoute)),
        default_routes=frozenset(f for f in facts if isinstance(f, DefaultRoute)),
        ways_out=frozenset(f for f in facts if isinstance(f, WayOut)),
        passages=frozenset(f for f in facts if isinstance(f, Passage)),
        muted=frozenset(f for f in facts if isinstance(f, Muted)),
        in_transit=frozenset(f for f in facts if isinstance(f, InTransit)),
    )


def _vn(vn: VnIntent) -> Iterator[Fact]:
    bridge, device = bridge_name(vn.vni), _device(vn)
    routed = bool(vn.gateways)
    yield Link(name=bridge, kind="bridge", alias=mark("bridge", vn.network), mtu=vn.mtu)
    yield _carrier(vn, bridge)
    yield from _router(vn, bridge) if routed else _broadcast(vn, device)
    here = {tsi.mac for tsi in vn.tsis if tsi.state == "activated"}
    for tsi in vn.tsis:
        yield _port(vn, tsi, bridge)
        yield from _leg(vn, tsi)
        if vn.ila and tsi.ipv6:
            yield IdentifierEntry(device=device, mac=tsi.mac, address=tsi.ipv6, local=vn.local)
        if tsi.state == "activated":
            yield BridgeEntry(bridge=bridge, mac=tsi.mac, port=_name(vn, tsi))
            yield from _known(vn, tsi)
        else:
            yield Muted(port=_name(vn, tsi))
    for remote in vn.remotes:
        # A TSI that is only associated here still lives behind the other NVE.
        if remote.mac not in here:
            yield from _place(vn, remote)
            yield BridgeEntry(bridge=bridge, mac=remote.mac, port=device)
            yield from _known(vn, remote)
    yield from _in_transit(vn)
    yield from _ways_out(vn)


def _device(vn: VnIntent) -> str:
    """The port of the VN behind which all other NVEs are."""
    return ila_name(vn.vni) if vn.ila else vxlan_name(vn.vni)


def _carrier(vn: VnIntent, bridge: str) -> Link:
    inside: tuple[str, ...] = (vn.network,)
    if vn.ila:
        prefixes = (str(ipaddress.ip_interface(gateway).network) for gateway in vn.gateways)
        inside = (vn.network, vn.local, *prefixes)
    kind: Literal["ila", "vxlan"] = "ila" if vn.ila else "vxlan"
    return Link(
        name=_device(vn),
        kind=kind,
        alias=mark(kind, " ".join(inside)),
        mtu=vn.mtu,
        master=bridge,
        vni=vn.vni,
        local=vn.local,
        routed=bool(vn.gateways),
        gateways=inside[2:],
    )


def _place(vn: VnIntent, remote: RemoteIntent) -> Iterator[Fact]:
    device = _device(vn)
    if not vn.ila:
        yield TunnelEntry(device=device, mac=remote.mac, remote=remote.nve)
    elif remote.ipv6:
        yield LocatorEntry(device=device, mac=remote.mac, address=remote.ipv6, remote=remote.nve)


def _in_transit(vn: VnIntent) -> Iterator[InTransit]:
    """At every port of the VN: its tenants' own, the router's, and where other NVEs come in."""
    macs = {tsi.mac for tsi in vn.tsis if tsi.in_transit}
    macs |= {remote.mac for remote in vn.remotes if remote.in_transit}
    ports = [_device(vn), *(_name(vn, tsi) for tsi in vn.tsis)]
    if vn.gateways:
        ports.append(router_name(vn.vni))
    for mac in macs:
        for port in ports:
            yield InTransit(port=port, mac=mac)


def _broadcast(vn: VnIntent, device: str) -> Iterator[Fact]:
    for member in vn.members:
        yield TunnelEntry(device=device, mac=FLOOD, remote=member)


def _router(vn: VnIntent, bridge: str) -> Iterator[Fact]:
    router = router_name(vn.vni)
    yield Link(
        name=router,
        kind="router",
        alias=mark("router", " ".join((vn.network, *vn.gateways))),
        mtu=ROUTER_MTU_BYTES,
        master=bridge,
        gateways=vn.gateways,
    )
    yield BridgeEntry(bridge=bridge, mac=GATEWAY_MAC, port=router)


def _passages(intent: NveIntent) -> Iterator[Passage]:
    """Where both VNs say so; a pair that is no longer allowed ends with the first of the two."""
    vns = {vn.vni: vn for vn in intent.vns}
    for vn in intent.vns:
        for other in (vns[vni] for vni in vn.allowed if vni > vn.vni and vni in vns):
            pairs = [pair for pair in product(vn.gateways, other.gateways) if _same_family(*pair)]
            if vn.vni in other.allowed and pairs:
                yield Passage(
                    router=router_name(vn.vni),
                    other=router_name(other.vni),
                    near=tuple(mine for mine, _ in pairs),
                    far=tuple(theirs for _, theirs in pairs),
                )


def _same_family(one: str, other: str) -> bool:
    return ip_interface(one).version == ip_interface(other).version


def _known(vn: VnIntent, tenant: TsiIntent | RemoteIntent) -> Iterator[Fact]:
    """What answers or finds the tenant's addresses: the bridge, or the router in its place."""
    for address in filter(None, (tenant.ipv4, tenant.ipv6, *tenant.beside)):
        if vn.gateways:
            router = router_name(vn.vni)
            yield RouterNeighbour(router=router, address=address, mac=tenant.mac)
            yield HostRoute(router=router, address=address, mtu=vn.mtu)
        else:
            yield Neighbour(bridge=bridge_name(vn.vni), address=address, mac=tenant.mac)


def _ways_out(vn: VnIntent) -> Iterator[DefaultRoute | WayOut]:
    """A table for each gateway, and to it whoever is here and goes out by it.

    Who is not here sends nothing through this router. Where he goes who has no way of his own is
    for the router itself, which tells correspondents outside what it could not deliver.
    """
    router = router_name(vn.vni)
    families: tuple[tuple[Family, str], ...] = (("ipv4", "0.0.0.0/0"), ("ipv6", "::/0"))
    for family, anybody in families:
        vias = sorted(_gateways(vn, family), key=ipaddress.ip_address)
        for via in vias:
            yield DefaultRoute(router=router, via=via, mtu=vn.mtu, table=way_out_table(via))
        for via in vias[:1]:
            yield WayOut(router=router, source=anybody, via=via)
        for tsi, via in product(vn.tsis, vias):
            if via in tsi.ways_out:
                for source in _sources(tsi, family):
                    yield WayOut(router=router, source=source, via=via)


def _sources(tsi: TsiIntent, family: Family) -> Iterator[str]:
    """The addresses of `family` from which the tenant may send."""
    version = 4 if family == "ipv4" else 6
    for address in filter(None, (tsi.ipv4, tsi.ipv6, *tsi.beside)):
        if ipaddress.ip_address(address).version == version:
            yield address


def _gateways(vn: VnIntent, family: Family) -> Iterator[str]:
    """The addresses in the VN of those that lead outside in `family`, here and elsewhere."""
    found = [_address(tsi, family) for tsi in vn.tsis if tsi.leg and family in tsi.leg.families()]
    found += [_address(remote, family) for remote in vn.remotes if family in remote.outside]
    yield from filter(None, found)


def _address(tenant: TsiIntent | RemoteIntent, family: Family) -> str | None:
    return tenant.ipv4 if family == "ipv4" else tenant.ipv6


def _name(vn: VnIntent, tsi: TsiIntent) -> str:
    return gateway_name(vn.vni) if tsi.leg else port_name(tsi.owner, tsi.index)


def _leg(vn: VnIntent, tsi: TsiIntent) -> Iterator[Link]:
    """The gateway's port in the physical network, which owes this VN no MTU."""
    leg = tsi.leg
    if leg is None:
        return
    via = tuple(filter(None, (leg.via_ipv4, leg.via_ipv6)))
    inside = (vn.network, leg.mac, leg.ipv4 or "-", leg.ipv6 or "-", *via)
    yield Link(
        name=leg_name(vn.vni),
        kind="leg",
        alias=mark("leg", " ".join(inside)),
        mtu=ROUTER_MTU_BYTES,
        master=leg.bridge,
        gateways=via,
        peer_mac=leg.mac,
        peer_ipv4=leg.ipv4,
        peer_ipv6=leg.ipv6,
    )


def _port(vn: VnIntent, tsi: TsiIntent, bridge: str) -> Link:
    name = _name(vn, tsi)
    who = f"{tsi.owner}/{tsi.index}"
    routed = bool(vn.gateways)
    if tsi.kind == "tap":
        alias = mark("port", who)
        return Link(name=name, kind="tap", alias=alias, mtu=vn.mtu, master=bridge, routed=routed)
    ipv4 = f"{tsi.ipv4}/{32 if routed else vn.ipv4_prefix}" if tsi.ipv4 else None
    ipv6 = f"{tsi.ipv6}/{128 if routed else vn.ipv6_prefix}" if tsi.ipv6 else None
    # A gateway is told the subnets too: elsewhere is not behind the router, but behind its leg.
    gateways = vn.gateways if tsi.leg else tuple(each.partition("/")[0] for each in vn.gateways)
    inside = (tsi.namespace or "-", tsi.mac, ipv4 or "-", ipv6 or "-", *gateways)
    return Link(
        name=name,
        kind="gateway" if tsi.leg else "veth",
        alias=mark("gateway" if tsi.leg else "port", " ".join((who, *inside))),
        mtu=vn.mtu,
        master=bridge,
        routed=routed,
        gateways=gateways,
        namespace=tsi.namespace,
        peer_mac=tsi.mac,
        peer_ipv4=ipv4,
        peer_ipv6=ipv6,
    )
