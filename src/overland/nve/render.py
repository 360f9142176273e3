"""Intent into kernel terms. Pure: the same intent always gives the same state."""

from __future__ import annotations

from collections.abc import Iterator

from overland.model.names import bridge_name, mark, port_name, vxlan_name
from overland.model.nve import (
    FLOOD,
    BridgeEntry,
    Fact,
    InTransit,
    KernelState,
    Link,
    Muted,
    Neighbour,
    NveIntent,
    TsiIntent,
    TunnelEntry,
    VnIntent,
)


def render(intent: NveIntent) -> KernelState:
    """Return the kernel state that makes `intent` true."""
    facts = [fact for vn in intent.vns for fact in _vn(vn)]
    return KernelState(
        links=frozenset(f for f in facts if isinstance(f, Link)),
        bridge_entries=frozenset(f for f in facts if isinstance(f, BridgeEntry)),
        tunnel_entries=frozenset(f for f in facts if isinstance(f, TunnelEntry)),
        neighbours=frozenset(f for f in facts if isinstance(f, Neighbour)),
        muted=frozenset(f for f in facts if isinstance(f, Muted)),
        in_transit=frozenset(f for f in facts if isinstance(f, InTransit)),
    )


def _vn(vn: VnIntent) -> Iterator[Fact]:
    bridge, vxlan = bridge_name(vn.vni), vxlan_name(vn.vni)
    yield Link(name=bridge, kind="bridge", alias=mark("bridge", vn.network), mtu=vn.mtu)
    yield Link(
        name=vxlan,
        kind="vxlan",
        alias=mark("vxlan", vn.network),
        mtu=vn.mtu,
        master=bridge,
        vni=vn.vni,
        local=vn.local,
    )
    for member in vn.members:
        yield TunnelEntry(device=vxlan, mac=FLOOD, remote=member)
    here = {tsi.mac for tsi in vn.tsis if tsi.state == "activated"}
    for tsi in vn.tsis:
        yield _port(vn, tsi, bridge)
        if tsi.state == "activated":
            yield BridgeEntry(bridge=bridge, mac=tsi.mac, port=port_name(tsi.owner, tsi.index))
            yield from _neighbours(bridge, tsi.mac, tsi.ipv4, tsi.ipv6)
        else:
            yield Muted(port=port_name(tsi.owner, tsi.index))
    for remote in vn.remotes:
        # A TSI that is only associated here still lives behind the other NVE.
        if remote.mac not in here:
            yield TunnelEntry(device=vxlan, mac=remote.mac, remote=remote.nve)
            yield BridgeEntry(bridge=bridge, mac=remote.mac, port=vxlan)
            yield from _neighbours(bridge, remote.mac, remote.ipv4, remote.ipv6)
    yield from _in_transit(vn)


def _in_transit(vn: VnIntent) -> Iterator[InTransit]:
    """At every port of the VN: its tenants' own, and the one by which other NVEs come in."""
    macs = {tsi.mac for tsi in vn.tsis if tsi.in_transit}
    macs |= {remote.mac for remote in vn.remotes if remote.in_transit}
    ports = [vxlan_name(vn.vni), *(port_name(tsi.owner, tsi.index) for tsi in vn.tsis)]
    for mac in macs:
        for port in ports:
            yield InTransit(port=port, mac=mac)


def _neighbours(bridge: str, mac: str, ipv4: str | None, ipv6: str | None) -> Iterator[Neighbour]:
    for address in (ipv4, ipv6):
        if address:
            yield Neighbour(bridge=bridge, address=address, mac=mac)


def _port(vn: VnIntent, tsi: TsiIntent, bridge: str) -> Link:
    name = port_name(tsi.owner, tsi.index)
    who = f"{tsi.owner}/{tsi.index}"
    if tsi.kind == "tap":
        return Link(name=name, kind="tap", alias=mark("port", who), mtu=vn.mtu, master=bridge)
    ipv4 = f"{tsi.ipv4}/{vn.ipv4_prefix}" if tsi.ipv4 else None
    ipv6 = f"{tsi.ipv6}/{vn.ipv6_prefix}" if tsi.ipv6 else None
    return Link(
        name=name,
        kind="veth",
        alias=mark("port", f"{who} {tsi.namespace} {tsi.mac} {ipv4 or '-'} {ipv6 or '-'}"),
        mtu=vn.mtu,
        master=bridge,
        namespace=tsi.namespace,
        peer_mac=tsi.mac,
        peer_ipv4=ipv4,
        peer_ipv6=ipv6,
    )
