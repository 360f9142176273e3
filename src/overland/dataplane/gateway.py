"""Gateways of routed VNs: a namespace each, between a port of the VN and one of the outside.

In the VN it is a tenant that forwards: what it gets there it sends out by its leg, and what comes
from outside it hands to the VN's router. It knows subnets and no tenants, so a move changes nothing
in here. What is inside is written into the outer ends' aliases, and made anew when it is other.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
from typing import Any

from pyroute2 import AsyncIPRoute

from overland.dataplane.devices import delete, mtu_of, pair_into
from overland.dataplane.endpoint import INNER
from overland.dataplane.namespace import NETNS, batch, run, set_knobs, sweep
from overland.model.names import GATEWAY_MAC, gateway_name, gateway_namespace
from overland.model.nve import Link
from overland.ports import KernelFailure

LEG = "leg"
_KNOBS = {
    "ipv4/ip_forward": 1,
    "ipv6/conf/all/forwarding": 1,
    **{
        f"ipv4/conf/{device}/{knob}": 0
        for device in ("all", "default")
        for knob in ("send_redirects", "accept_redirects", "accept_source_route")
    },
    # Strict: nobody outside has a tenant's address, and no tenant one from outside (RFC 3704).
    "ipv4/conf/default/rp_filter": 1,
    "ipv6/conf/default/accept_ra": 0,
    "ipv6/conf/default/accept_redirects": 0,
    # The kernel asks for a next router from the link-local address, which is used at once.
    "ipv6/conf/default/accept_dad": 0,
    "ipv4/conf/default/arp_notify": 1,
    "ipv6/conf/default/ndisc_notify": 1,
}

_INTO_VN = 100
_RULES = tuple(
    (f"-{family}", *f"rule add iif {LEG} {what}".split())
    for family in (4, 6)
    for what in (f"pref {_INTO_VN} lookup {_INTO_VN}", f"pref {_INTO_VN + 1} unreachable")
)
"""From outside there is a way into the VN and to nowhere else: it is no transit, and no loop."""

log = logging.getLogger(__name__)


def from_alias(alias: str) -> dict[str, Any]:
    """Either inner end as its mark tells.

    `overland gateway OWNER/INDEX - MAC IPV4 IPV6 ROUTER...`, `overland leg NETWORK MAC IPV4 IPV6
    VIA...`.
    """
    words = alias.split()
    mac, ipv4, ipv6, *gateways = words[4 if words[1] == "gateway" else 3 :]
    return {
        "peer_mac": mac,
        "peer_ipv4": ipv4 if ipv4 != "-" else None,
        "peer_ipv6": ipv6 if ipv6 != "-" else None,
        "gateways": tuple(gateways),
    }


class Gateways:
    """The gateways of one NVE; `prefix` keeps their namespaces apart from other NVEs' ones."""

    def __init__(self, ip: AsyncIPRoute, prefix: str) -> None:
        self._ip = ip
        self._prefix = prefix

    async def make(self, link: Link) -> None:
        """Make the port in the VN or the leg, with its inner end; the other is left as it is."""
        namespace = gateway_namespace(self._prefix, link.name)
        outside_mtu = mtu_of(link.master) if link.kind == "leg" and link.master else 0
        if not (NETNS / namespace).exists():
            await _make_namespace(namespace)
        inner = LEG if link.kind == "leg" else INNER
        await delete(self._ip, link.name)
        assert link.peer_mac is not None
        await pair_into(self._ip, link, namespace, inner, link.peer_mac)
        lines = _leg_lines(link, outside_mtu) if link.kind == "leg" else _port_lines(link)
        for why in (await batch(namespace, lines)).values():
            raise KernelFailure(f"gateway {namespace}: {why}")

    async def announce(self, leg: Link) -> None:
        """Tell the neighbours outside: the addresses may have been at another host before."""
        # The same address again: the kernel says by ARP and ND where it is (arp_notify).
        line = f"link set {LEG} address {leg.peer_mac}"
        await batch(gateway_namespace(self._prefix, leg.name), [line])

    async def remove(self, port: str) -> None:
        """Take the gateway behind bridge port `port` away; content with absence."""
        await delete(self._ip, port)
        with contextlib.suppress(KernelFailure):
            await run("netns", "del", gateway_namespace(self._prefix, port))

    async def sweep(self) -> None:
        """Remove the namespaces of ours that have lost their port: the rest of a crash."""
        begin = gateway_namespace(self._prefix, gateway_name(0)).removesuffix("0")
        await sweep(begin, gateway_name)


async def _make_namespace(namespace: str) -> None:
    """A namespace with its manners, before there is a device that could be without them."""
    await run("netns", "add", namespace)
    try:
        set_knobs(namespace, _KNOBS)
        for rule in _RULES:
            await run("-n", namespace, *rule)
    except (OSError, KernelFailure):
        await run("netns", "del", namespace)
        raise


def _addresses(link: Link) -> list[str]:
    return [each for each in (link.peer_ipv4, link.peer_ipv6) if each]


def _port_lines(link: Link) -> list[str]:
    """The VN's subnets are behind its router, whose MAC address nobody has to be asked for."""
    lines = ["link set lo up", f"link set {INNER} up"]
    lines += [f"addr replace {each} dev {INNER} nodad" for each in _addresses(link)]
    for gateway in link.gateways:
        router = ipaddress.ip_interface(gateway)
        lines += [
            f"neigh replace {router.ip} lladdr {GATEWAY_MAC} nud permanent dev {INNER}",
            f"route replace {router.ip} dev {INNER}",
            *(
                f"route replace {router.network} via {router.ip} dev {INNER} table {table}"
                for table in ("main", _INTO_VN)
            ),
        ]
    return lines


def _leg_lines(link: Link, mtu: int) -> list[str]:
    """Whatever comes is taken in; what is let out is as large as the outside's bridge carries."""
    lines = [f"link set {LEG} up"]
    for each in _addresses(link):
        own = ipaddress.ip_interface(each)
        lines += [
            f"addr replace {own} dev {LEG} nodad noprefixroute",
            f"route replace {own.network} dev {LEG} mtu {mtu}",
        ]
    lines += [f"route replace default via {via} dev {LEG} mtu {mtu}" for via in link.gateways]
    return lines
