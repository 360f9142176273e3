"""The physical network of a lab: one namespace with a router, and a correspondent behind it.

Documentation addresses (RFC 5737, RFC 3849), the same in every lab: namespaces keep them apart.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping

from overland.dataplane.namespace import set_knobs
from overland.lab.lab import NETNS, LabFailure, ip
from overland.lab.topology import endpoint_namespace

NAME = "outside"
BRIDGE = "out0"
ROUTER = {"ipv4": "192.0.2.1/24", "ipv6": "2001:db8:2::1/64"}
CORRESPONDENT = {"ipv4": "198.51.100.1", "ipv6": "2001:db8:51::1"}
_LAN = "lan"


def reach(lab: str, host: str) -> None:
    """Give host `host` of the lab the bridge `out0`, which leads outside. May be repeated."""
    inside, outside = f"ovl-{lab}-{host}", endpoint_namespace(lab, NAME)
    if not (NETNS / inside).exists():
        raise LabFailure(f"there is no host {host}")
    if not (NETNS / outside).exists():
        _make(outside)
    try:
        ip(f"link show {BRIDGE}", namespace=inside)
    except LabFailure:
        ip(
            f"link add {BRIDGE} type bridge",
            f"link add out-{host} type veth peer name {host} netns {outside}",
            f"link set out-{host} master {BRIDGE} up",
            f"link set {BRIDGE} up",
            namespace=inside,
        )
        ip(f"link set {host} master {_LAN} up", namespace=outside)


def _make(namespace: str) -> None:
    ip(f"netns add {namespace}")
    set_knobs(namespace, {"ipv4/fib_multipath_use_neigh": 1})  # IPv6 does so by itself
    ip(
        "link set lo up",
        f"link add {_LAN} type bridge",
        f"link set {_LAN} up",
        *(f"addr add {each} dev {_LAN} nodad" for each in ROUTER.values()),
        *(f"addr add {each} dev lo" for each in CORRESPONDENT.values()),
        namespace=namespace,
    )


def free_leg(taken: Iterable[str | None], families: Iterable[str]) -> dict[str, str]:
    """A gateway's leg there: the first addresses that none of `taken` is."""
    leg = {"bridge": BRIDGE}
    used = {each.partition("/")[0] for each in taken if each}
    for family in families:
        router = ipaddress.ip_interface(ROUTER[family])
        free = (router.ip + n for n in range(1, 200) if str(router.ip + n) not in used)
        leg[family] = f"{next(free)}/{router.network.prefixlen}"
        leg[f"via_{family}"] = str(router.ip)
    return leg


def route(lab: str, subnets: Mapping[str, Iterable[str]]) -> None:
    """Let the router outside share what is for each subnet among the gateways beside it.

    By both ends' addresses; those that do not answer are left out.
    """
    for subnet, gateways in subnets.items():
        hops = " ".join(f"nexthop via {gateway}" for gateway in gateways)
        ip(f"route replace {subnet} {hops}", namespace=endpoint_namespace(lab, NAME))
