"""The Kernel port on Linux: read back what is ours, apply one op after the other.

Devices are known as ours by their ifalias, entries by standing on our devices. Forwarding entries
are static and replaced in one step; the kernel learns nothing by itself on our devices, because
the NVA knows. Devices of handovers (tunnels, hold queues) are theirs, not the reconcile loop's.
"""

from __future__ import annotations

import errno
import itertools
import socket
from collections.abc import Sequence
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from overland.dataplane import endpoint, gateway, ila, router
from overland.dataplane.devices import answer_only, interface_index, silence
from overland.dataplane.gates import Gates
from overland.dataplane.gateway import Gateways
from overland.dataplane.ila import Ila
from overland.dataplane.nftables import Nftables
from overland.dataplane.router import Routers
from overland.dataplane.tap import TapTable
from overland.model.names import default_mac, is_ours, vni_of
from overland.model.nve import (
    FLOOD,
    BridgeEntry,
    DefaultRoute,
    HostRoute,
    IdentifierEntry,
    InTransit,
    KernelState,
    Link,
    LocatorEntry,
    Muted,
    Neighbour,
    Op,
    OpFailure,
    Passage,
    RouterNeighbour,
    TunnelEntry,
    WayOut,
)
from overland.ports import KernelFailure

VXLAN_PORT = 4789
_KINDS = {"bridge": "bridge", "vxlan": "vxlan", "ifb": "ila", "tun": "tap", "veth": "veth"}
_OURS = ("bridge", "vxlan", "ila", "router", "gateway", "leg", "port")
_CARRIERS = ("vxlan", "ila")
"""Behind these ports of a bridge are the other NVEs."""

_BY_MARK = ("router", "gateway", "leg")
"""To the kernel they are veth pairs like an endpoint's."""

_TENANTS = ("tap", "veth", "gateway")
_NTF_SELF, _NTF_MASTER = 0x02, 0x04
_NUD_NOARP, _NUD_PERMANENT = 0x40, 0x80
_ALREADY, _ABSENT = {errno.EEXIST}, {errno.ENOENT, errno.ENODEV, errno.ESRCH}


class LinuxKernel:
    """One network namespace's kernel."""

    def __init__(
        self,
        ip: AsyncIPRoute,
        nft: Nftables,
        gates: Gates,
        taps: TapTable,
        routers: Routers,
        gateways: Gateways,
        ila: Ila,
        queue_frames: int,
    ) -> None:
        self._ip = ip
        self._nft = nft
        self._gates = gates
        self._taps = taps
        self._routers = routers
        self._gateways = gateways
        self._ila = ila
        self._queue_frames = queue_frames

    # ------------------------------------------------------------ reading back

    async def snapshot(self) -> KernelState:
        found, names = await _links(self._ip, self._nft.routed())
        links = [link for link in found if self._whole(link)]
        bridges = {link.name for link in links if link.kind == "bridge"}
        vxlans = {link.name for link in links if link.kind == "vxlan"}
        bridge_entries, tunnel_entries = await self._entries(names, bridges, vxlans)
        translating = {link.name for link in links if link.kind == "ila"}
        entered = list(self._ila.entries(translating))
        inside = await self._routers.entries([e.name for e in links if e.kind == "router"])
        # A port whose router cannot be entered is as good as gone, with all that leads to it.
        lost = {link.name for link in links if link.kind == "router"} - inside.keys()
        routed = [entry for entries in inside.values() for entry in entries]
        return KernelState(
            links=frozenset(link for link in links if link.name not in lost),
            bridge_entries=frozenset(e for e in bridge_entries if e.port not in lost),
            tunnel_entries=frozenset(tunnel_entries),
            locator_entries=frozenset(e for e in entered if isinstance(e, LocatorEntry)),
            identifier_entries=frozenset(e for e in entered if isinstance(e, IdentifierEntry)),
            neighbours=frozenset(await self._neighbours(names, bridges)),
            router_neighbours=frozenset(e for e in routed if isinstance(e, RouterNeighbour)),
            host_routes=frozenset(e for e in routed if isinstance(e, HostRoute)),
            default_routes=frozenset(e for e in routed if isinstance(e, DefaultRoute)),
            ways_out=frozenset(e for e in routed if isinstance(e, WayOut)),
            passages=frozenset(e for e in routed if isinstance(e, Passage)),
            muted=frozenset(Muted(port=port) for port in self._nft.muted()),
            in_transit=frozenset(
                InTransit(port=port, mac=mac) for port, mac in self._nft.in_transit()
            ),
        )

    def _whole(self, link: Link) -> bool:
        """Not the rest of a crash, which is made again."""
        return link.kind != "ila" or self._ila.has(link.name)

    async def _entries(
        self, names: dict[int, str], bridges: set[str], vxlans: set[str]
    ) -> tuple[list[BridgeEntry], list[TunnelEntry]]:
        at_bridge, at_vxlan = [], []
        async for message in await self._ip.fdb("dump"):
            device = names.get(message["ifindex"], "")
            mac = message.get_attr("NDA_LLADDR")
            bridge = names.get(message.get_attr("NDA_MASTER") or 0)
            if bridge in bridges and message["state"] & _NUD_NOARP:
                at_bridge.append(BridgeEntry(bridge=bridge, mac=mac, port=device))
            elif device in vxlans and message.get_attr("NDA_DST"):
                remote = message.get_attr("NDA_DST")
                at_vxlan.append(TunnelEntry(device=device, mac=mac, remote=remote))
        return at_bridge, at_vxlan

    async def _neighbours(self, names: dict[int, str], bridges: set[str]) -> list[Neighbour]:
        found = []
        for family in (socket.AF_INET, socket.AF_INET6):
            async for message in await self._ip.get_neighbours(family=family):
                device = names.get(message["ifindex"], "")
                if device in bridges and message["state"] & _NUD_PERMANENT:
                    address = message.get_attr("NDA_DST")
                    mac = message.get_attr("NDA_LLADDR")
                    found.append(Neighbour(bridge=device, address=address, mac=mac))
        return found

    async def dropped_in_transit(self, bridge: str, mac: str) -> dict[str, int]:
        # Asked for by a move while the agent may be reading: one socket answers one dump at a time.
        async with AsyncIPRoute() as ip:
            links, _ = await _links(ip, set())
        ports = [link.name for link in links if link.master == bridge]
        return {port: self._nft.take_count(port, mac) for port in ports}

    # ------------------------------------------------------------ applying

    async def apply(self, ops: Sequence[Op]) -> list[OpFailure]:
        failures = []
        for routers, run in itertools.groupby(ops, lambda op: isinstance(op.fact, router.Entry)):
            if routers:
                failures += await self._routers.apply(list(run))
            else:
                failures += [failure for op in run if (failure := await self._one(op))]
        return failures

    async def _one(self, op: Op) -> OpFailure | None:
        try:
            if op.verb == "put":
                await self._put(op)
            else:
                await self._remove(op)
        except (NetlinkError, KernelFailure, OSError) as error:
            return OpFailure(op=op, why=str(error))
        return None

    async def _put(self, op: Op) -> None:
        match op.fact:
            case Link() as link:
                await self._put_link(link)
            case BridgeEntry(mac=mac, port=port):
                await self._fdb("replace", port, mac, flags=_NTF_MASTER, state=_NUD_NOARP)
            case TunnelEntry(device=device, mac=mac, remote=remote):
                verb = "append" if mac == FLOOD else "replace"
                await self._fdb(
                    verb, device, mac, dst=remote, flags=_NTF_SELF, state=_NUD_PERMANENT
                )
            case LocatorEntry() | IdentifierEntry() as entry:
                self._ila.put(entry)
            case Neighbour(bridge=bridge, address=address, mac=mac):
                await self._ip.neigh(
                    "replace",
                    ifindex=interface_index(bridge),
                    dst=address,
                    lladdr=mac,
                    state=_NUD_PERMANENT,
                )
            case Passage() as passage:
                await self._routers.passages.make(passage)
            case Muted(port=port):
                self._nft.mute(port)
            case InTransit(port=port, mac=mac):
                self._nft.drop(port, mac)
            case _:
                raise AssertionError(op)

    async def _remove(self, op: Op) -> None:
        try:
            await self._really_remove(op)
        except NetlinkError as error:
            if error.code not in _ABSENT:
                raise

    async def _really_remove(self, op: Op) -> None:
        match op.fact:
            case Link(kind="router", name=name):
                await self._routers.remove(name)
            case Link(name=name):
                index = interface_index(name)
                self._nft.unroute(name)
                self._taps.forget(name)
                self._gates.forget(index)
                if op.fact.kind == "gateway":
                    await self._gateways.remove(name)
                elif op.fact.kind == "ila":
                    await self._ila.remove(name)
                else:
                    await self._ip.link("del", index=index)
            case BridgeEntry(mac=mac, port=port):
                await self._fdb("del", port, mac, flags=_NTF_MASTER)
            case TunnelEntry(device=device, mac=mac, remote=remote):
                await self._fdb("del", device, mac, dst=remote, flags=_NTF_SELF)
            case LocatorEntry() | IdentifierEntry() as entry:
                self._ila.take(entry)
            case Neighbour(bridge=bridge, address=address):
                await self._ip.neigh("del", ifindex=interface_index(bridge), dst=address)
            case Passage() as passage:
                await self._routers.passages.remove(passage)
            case Muted(port=port):
                self._nft.unmute(port)
            case InTransit(port=port, mac=mac):
                self._nft.pass_again(port, mac)
            case _:
                raise AssertionError(op)

    async def _fdb(self, verb: str, device: str, mac: str, **more: Any) -> None:
        try:
            await self._ip.fdb(verb, ifindex=interface_index(device), lladdr=mac, **more)
        except NetlinkError as error:
            if not (verb == "append" and error.code in _ALREADY):
                raise

    async def _put_link(self, link: Link) -> None:
        try:
            await self._make(link)
        except NetlinkError as error:
            if error.code not in _ALREADY:
                raise
        if link.kind == "bridge":
            answer_only(link.name)
        else:
            silence(link.name)
        if link.kind == "router":
            await self._routers.set_up(link)
        index = interface_index(link.name)
        wanted: dict[str, Any] = {"ifalias": link.alias, "mtu": link.mtu}
        if link.kind == "bridge":
            # Else it takes its lowest port's, and forgets all neighbours when that comes or goes.
            wanted["address"] = default_mac(link.name, 0)
        if link.master is not None:
            wanted["master"] = interface_index(link.master)
        await self._ip.link("set", index=index, **wanted)
        if link.kind in _TENANTS:
            (self._nft.route if link.routed else self._nft.unroute)(link.name)
            await self._gates.ensure(link.name, "port")
        elif link.kind in _CARRIERS:
            await self._gates.ensure(link.name, "peer")
        if link.kind not in ("bridge", "leg"):  # the outside's bridge has manners of its own
            await self._ip.brport("set", index=index, learning=0, **_manners(link))
        await self._ip.link("set", index=index, state="up")
        if link.kind == "leg":
            await self._gateways.announce(link)
        if link.kind == "ila":
            self._ila.enter(link)

    async def _make(self, link: Link) -> None:
        match link.kind:
            case "bridge":
                await self._ip.link(
                    "add",
                    ifname=link.name,
                    kind="bridge",
                    br_stp_state=0,
                    br_mcast_snooping=0,
                    br_ageing_time=30000,
                )
            case "vxlan":
                assert link.vni is not None
                assert link.local is not None
                family = "6" if ":" in link.local else ""
                await self._ip.link(
                    "add",
                    ifname=link.name,
                    kind="vxlan",
                    vxlan_id=link.vni,
                    vxlan_port=VXLAN_PORT,
                    vxlan_learning=False,
                    vxlan_ttl=64,
                    **{f"vxlan_local{family}": link.local},
                )
            case "ila":
                await self._ila.make(link)
            case "router":
                await self._routers.make(link)
            case "tap":
                self._taps.make(link.name, self._queue_frames)
            case "veth":
                await endpoint.make(self._ip, link)
            case "gateway" | "leg":
                await self._gateways.make(link)


def _manners(link: Link) -> dict[str, int]:
    """What the bridge may do at a port: flood to it, answer ARP and ND for it, join it to others.

    In a routed VN what goes to many goes to the router, and what goes to nobody known nowhere.
    """
    many = int(not link.routed)
    return {
        "neigh_suppress": int(link.kind == "vxlan" and not link.routed),
        "unicast_flood": int(not link.routed and link.kind != "router"),
        "mcast_flood": many,
        "bcast_flood": many,
        "isolated": int(link.routed and link.kind not in _CARRIERS),
    }


def _is_routed(name: str, kind: str, port: Any, routed: set[str]) -> bool:
    """Tell whether all is so that a port speaks with the router only."""
    if port is None or kind not in (*_CARRIERS, *_TENANTS):
        return False
    flags = ("UNICAST_FLOOD", "MCAST_FLOOD", "BCAST_FLOOD")
    closed = not any(port.get_attr(f"IFLA_BRPORT_{flag}") for flag in flags)
    apart = bool(port.get_attr("IFLA_BRPORT_ISOLATED")) and name in routed
    return closed and (apart or kind in _CARRIERS)


async def _links(ip: AsyncIPRoute, routed: set[str]) -> tuple[list[Link], dict[int, str]]:
    messages = [message async for message in await ip.get_links()]
    names = {message["index"]: message.get_attr("IFLA_IFNAME") for message in messages}
    links = [_read_link(message, names, routed) for message in messages]
    return [link for link in links if link is not None], names


def _read_link(message: Any, names: dict[int, str], routed: set[str]) -> Link | None:
    alias = message.get_attr("IFLA_IFALIAS")
    info = message.get_attr("IFLA_LINKINFO")
    found = _KINDS.get(info.get_attr("IFLA_INFO_KIND")) if info is not None else None
    if not is_ours(alias) or found is None or alias.split()[1] not in _OURS:
        return None
    mark = alias.split()[1]
    kind = mark if mark in _BY_MARK else found
    name = message.get_attr("IFLA_IFNAME")
    fields: dict[str, Any] = {
        "name": name,
        "kind": kind,
        "alias": alias,
        "mtu": message.get_attr("IFLA_MTU"),
        "master": names.get(message.get_attr("IFLA_MASTER") or 0),
        "routed": _is_routed(name, kind, info.get_attr("IFLA_INFO_SLAVE_DATA"), routed),
    }
    if kind == "vxlan":
        data = info.get_attr("IFLA_INFO_DATA")
        fields["vni"] = data.get_attr("IFLA_VXLAN_ID")
        fields["local"] = data.get_attr("IFLA_VXLAN_LOCAL") or data.get_attr("IFLA_VXLAN_LOCAL6")
    if kind == "ila":
        fields |= ila.from_alias(alias) | {"vni": vni_of(name)}
    if kind == "veth":
        fields |= endpoint.from_alias(alias)
    if kind in ("gateway", "leg"):
        fields |= gateway.from_alias(alias)
    if kind == "router":
        fields["gateways"] = router.from_alias(alias)
    return Link(**fields)
