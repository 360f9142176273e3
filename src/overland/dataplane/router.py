"""Routers of routed VNs: a network namespace each, before one port of the VN's bridge.

A packet goes in and out by the same device, `gw`: from the tenant to the gateway's MAC address, and
on to the MAC address of the tenant it is for, which the bridge finds, here or behind another NVE.
So a move changes nothing in here. Tables of two tenants cannot meet, for no device is in both.

What no route of the VN is for goes out, if the VN has gateways: after the main table, which has no
default route, rules lead each tenant that is here to the table of his own gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import logging
from collections.abc import Sequence

import msgspec
from pyroute2 import AsyncIPRoute

from overland.dataplane import passage
from overland.dataplane.devices import delete, exists, pair_into
from overland.dataplane.namespace import NETNS, batch, run, set_knobs, shown, sweep
from overland.model.names import GATEWAY_MAC, router_name, router_namespace, way_out_table
from overland.model.nve import (
    DefaultRoute,
    HostRoute,
    Link,
    Op,
    OpFailure,
    Passage,
    RouterNeighbour,
    WayOut,
)
from overland.ports import KernelFailure

INNER = passage.INNER
ICMP_INTERVAL_MS = 100
"""At most one ICMP error to the same tenant in this time (Packet Too Big is never withheld)."""

log = logging.getLogger(__name__)

Entry = HostRoute | DefaultRoute | RouterNeighbour | WayOut
_SHOW = (
    f"route show table all dev {INNER} proto static",  # of all tables, or IPv4 alone is shown
    f"neigh show dev {INNER} nud permanent",
    "link show type veth",
)
_KNOBS = {
    "ipv4/ip_forward": 1,
    "ipv6/conf/all/forwarding": 1,
    "ipv4/icmp_ratelimit": ICMP_INTERVAL_MS,
    "ipv6/icmp/ratelimit": ICMP_INTERVAL_MS,
    **{
        f"ipv4/conf/{device}/{knob}": 0
        for device in ("all", "default", INNER)
        # Packets leave by the device they came by: no redirect may offer a shorter way.
        for knob in ("send_redirects", "accept_redirects", "accept_source_route")
    },
    # Strict: who has no host route here is nobody, and fills no neighbour table (RFC 3704).
    f"ipv4/conf/{INNER}/rp_filter": 1,
    f"ipv6/conf/{INNER}/accept_ra": 0,
    f"ipv6/conf/{INNER}/accept_redirects": 0,
    # Without a link-local address there is nothing an IPv6 redirect could come from (RFC 4861 8.2).
    f"ipv6/conf/{INNER}/addr_gen_mode": 1,
}
_ABSENT = ("No such process", "No such file", "Cannot find device", "Cannot open network namespace")
_DONE = {"put": ("File exists",), "remove": _ABSENT}
"""Why `ip` refuses what is so already. Only rules can be there: all else is replaced."""

_MAIN = 254
_ANYBODY = {"-4": "0.0.0.0/0", "-6": "::/0"}
_OF_ONE, _OF_ALL = 40_000, 40_001
"""Priorities of rules, behind the main table's (32,766), so only what leaves the VN meets them."""


def from_alias(alias: str) -> tuple[str, ...]:
    """The gateway's addresses as the mark tells: `overland router NETWORK GATEWAY...`."""
    return tuple(alias.split()[3:])


class _Route(msgspec.Struct):
    dst: str
    gateway: str = ""
    table: str = "main"
    metrics: list[dict[str, int]] = []


class _Neigh(msgspec.Struct):
    dst: str
    lladdr: str = ""


class _Rule(msgspec.Struct):
    priority: int
    src: str
    table: str = ""


class Routers:
    """The routers of one NVE; `prefix` keeps their namespaces apart from other NVEs' ones."""

    def __init__(self, ip: AsyncIPRoute, prefix: str) -> None:
        self._ip = ip
        self._prefix = prefix
        self.passages = passage.Passages(prefix)

    async def make(self, link: Link) -> None:
        """Make the namespace, the pair and what is inside; the port is not in the bridge yet."""
        namespace = router_namespace(self._prefix, link.name)
        if exists(link.name) and (NETNS / namespace).exists():
            return
        await self.remove(link.name)  # one without the other is the rest of a crash
        await run("netns", "add", namespace)
        await pair_into(self._ip, link, namespace, INNER, GATEWAY_MAC)

    async def set_up(self, link: Link) -> None:
        """Give the router behind `link` its addresses and manners; may be repeated."""
        namespace = router_namespace(self._prefix, link.name)
        set_knobs(namespace, _KNOBS)
        lines = ["link set lo up", f"link set {INNER} mtu {link.mtu} up"]
        for gateway in link.gateways:
            subnet = ipaddress.ip_interface(gateway)
            lines.append(f"addr replace {subnet.ip} dev {INNER} nodad")
            # An address nobody has may be in transit: silence, as on a wire (R-33, 6-3).
            lines.append(f"route replace blackhole {subnet.network} proto boot")
        for why in (await batch(namespace, lines)).values():
            raise KernelFailure(f"router {namespace}: {why}")

    async def remove(self, name: str) -> None:
        """Take the router behind port `name` away; content with absence."""
        await delete(self._ip, name)
        with contextlib.suppress(KernelFailure):
            await run("netns", "del", router_namespace(self._prefix, name))

    async def sweep(self) -> None:
        """Remove the namespaces of ours that have lost their port: the rest of a crash."""
        begin = router_namespace(self._prefix, router_name(0)).removesuffix("0")
        await sweep(begin, router_name)

    # ------------------------------------------------------------ entries

    async def entries(self, names: Sequence[str]) -> dict[str, list[Entry | Passage]]:
        """What is inside the routers behind the ports `names`, of those that can be entered."""
        found = await asyncio.gather(*map(self._inside, names))
        return {name: each for name, each in zip(names, found, strict=True) if each is not None}

    async def _inside(self, name: str) -> list[Entry | Passage] | None:
        namespace = router_namespace(self._prefix, name)
        try:
            routes, neighbours, devices = await shown(namespace, _SHOW)
            entries = [_route(name, r) for r in msgspec.json.decode(routes, type=list[_Route])]
            ways = [each for each in entries if isinstance(each, DefaultRoute)]
            rules = await _rules(namespace, ways)
        except KernelFailure:
            return None
        return [
            *entries,
            *rules,
            *(
                RouterNeighbour(router=name, address=each.dst, mac=each.lladdr)
                for each in msgspec.json.decode(neighbours, type=list[_Neigh])
            ),
            *passage.read(msgspec.json.decode(devices, type=list[passage.Seen])),
        ]

    async def apply(self, ops: Sequence[Op]) -> list[OpFailure]:
        """Perform ops on entries, in order, those of one router in one process."""
        failures = []
        by_router: dict[str, list[Op]] = {}
        for op in ops:
            assert isinstance(op.fact, Entry)
            by_router.setdefault(op.fact.router, []).append(op)
        for name, mine in by_router.items():
            namespace = router_namespace(self._prefix, name)
            for options, each in itertools.groupby(mine, _options):
                failures += await _apply(namespace, list(each), options)
        return failures


async def _apply(namespace: str, ops: list[Op], options: tuple[str, ...]) -> list[OpFailure]:
    failed = await batch(namespace, [_line(op) for op in ops], *options)
    return [
        OpFailure(op=ops[at], why=why)
        for at, why in failed.items()
        if not any(each in why for each in _DONE[ops[at].verb])
    ]


async def _rules(namespace: str, ways: list[DefaultRoute]) -> list[WayOut]:
    """Who goes out by which of `ways`; a rule to anywhere else leads nowhere, and is no matter.

    So a router without gateways need not be asked.
    """
    found = []
    for family in ("-4", "-6"):
        vias = {str(each.table): each for each in ways if (":" in each.via) == (family == "-6")}
        if not vias:
            continue
        (rules,) = await shown(namespace, ["rule show"], family)
        for rule in msgspec.json.decode(rules, type=list[_Rule]):
            if rule.priority in (_OF_ONE, _OF_ALL) and rule.table in vias:
                way = vias[rule.table]
                source = _ANYBODY[family] if rule.src == "all" else rule.src
                found.append(WayOut(router=way.router, source=source, via=way.via))
    return found


def _options(op: Op) -> tuple[str, ...]:
    """Of rules, unlike routes, `ip` does not see by itself of which family they are."""
    if isinstance(op.fact, WayOut):
        return ("-6",) if ":" in op.fact.via else ("-4",)
    return ()


def _route(router: str, route: _Route) -> HostRoute | DefaultRoute:
    if route.dst == "default":
        table = _MAIN if route.table == "main" else int(route.table)
        return DefaultRoute(router=router, via=route.gateway, mtu=_mtu(route), table=table)
    return HostRoute(router=router, address=route.dst, mtu=_mtu(route))


def _mtu(route: _Route) -> int:
    return next((each["mtu"] for each in route.metrics if "mtu" in each), 0)


def _line(op: Op) -> str:
    verb = "replace" if op.verb == "put" else "del"
    match op.fact:
        case RouterNeighbour(address=address, mac=mac):
            return f"neigh {verb} {address} lladdr {mac} nud permanent dev {INNER}"
        case HostRoute(address=address, mtu=mtu):
            return f"route {verb} {address} dev {INNER} proto static mtu {mtu}"
        case DefaultRoute(via=via, mtu=mtu, table=table):
            where = f"dev {INNER} table {table}"
            return f"route {verb} default via {via} {where} proto static mtu {mtu}"
        case WayOut(source=source, via=via):
            verb = "add" if op.verb == "put" else "del"
            of = _OF_ALL if source in _ANYBODY.values() else _OF_ONE
            return f"rule {verb} from {source} lookup {way_out_table(via)} pref {of}"
        case _:
            raise AssertionError(op)
