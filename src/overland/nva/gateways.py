"""May routed VN `network` have this way to the physical network, and why not? Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from itertools import product

import msgspec

from overland.model.cluster import Gateway, Interface, Leg, Network, Refused
from overland.model.names import default_mac
from overland.nva.cluster import Cluster
from overland.nva.mapping import underlay_address
from overland.nva.rules import completed, host_blockers, interface_blockers
from overland.nva.subnets import outside_of, overlap, subnets
from overland.nva.ways_out import tenants


def chosen(cluster: Cluster, network: str, host: str, leg: Leg) -> Gateway:
    """The gateway with its place in the VN, and MAC addresses of its own on both sides."""
    name = f"gateway/{network}/{host}"
    inside = Interface(network=network, mac=default_mac(name, 0))
    return Gateway(
        network=network,
        host=host,
        interface=completed(cluster, name, 0, inside),
        leg=msgspec.structs.replace(leg, mac=default_mac(name, 1)),
    )


def gateway_blockers(cluster: Cluster, wish: Gateway) -> Iterator[Refused]:
    """Why gateway `wish` cannot be made."""
    what = f"gateway of network {wish.network}"
    yield from host_blockers(cluster, wish.host)
    yield from interface_blockers(cluster, wish.owner, (wish.interface,))
    network = cluster.networks.get(wish.network)
    if network is None:
        return
    if network.kind != "l3":
        why = f"network {network.name} is {network.kind}: only one of kind l3 has a gateway"
        hint = "`overland network create --kind l3`"
        yield Refused(code="not_routed", what=what, why=why, hint=hint)
    if wish.key in cluster.gateways:
        hint = f"`overland network gateway remove {wish.network} --host {wish.host}` first"
        yield Refused(code="exists", what=what, why=f"host {wish.host} has one", hint=hint)
    host = cluster.hosts.get(wish.host)
    if host is not None and underlay_address(host, network) is None:
        why = f"host {host.name} has no {network.underlay} underlay address"
        yield Refused(code="no_underlay", what=what, why=why)
    if not wish.leg.bridge:
        why = "no bridge of the physical network is named"
        yield Refused(code="malformed", what=what, why=why, hint="--bridge NAME")
    malformed = list(_malformed(what, network, wish.leg))
    yield from malformed or _overlaps(cluster, what, network, wish)


def known_gateway(cluster: Cluster, network: str, host: str | None = None) -> Iterator[Refused]:
    """Whether `network` has a gateway at all, or on `host`."""
    if not any(each.host == (host or each.host) for each in cluster.gateways_of(network)):
        what, hint = f"gateway of network {network}", "`overland network gateway list` shows all"
        why = f"host {host} has none" if host else "there is none"
        yield Refused(code="unknown_gateway", what=what, why=why, hint=hint)


def removal_blockers(cluster: Cluster, network: str, host: str) -> Iterator[Refused]:
    """Why the gateway of `network` on `host` cannot be taken away now."""
    what = f"gateway of network {network}"
    yield from known_gateway(cluster, network, host)
    for move in cluster.moves.values():
        if any(port.network == network for port in move.ports):
            why = f"migration {move.id} needs what it holds"
            yield Refused(code="move_in_progress", what=what, why=why, hint="wait for it")


def assignment_blockers(
    cluster: Cluster, network: str, host: str, names: Iterable[str]
) -> Iterator[Refused]:
    """Why these tenants of `network` cannot go out by its gateway on `host`."""
    yield from known_gateway(cluster, network, host)
    if cluster.is_dead(host):
        hint = "choose another gateway"
        yield Refused(code="host_dead", what=f"host {host}", why="it is dead", hint=hint)
    there = tenants(cluster, network)
    for name in names:
        if name not in there:
            hint = f"`overland network gateway tenants {network}` shows all"
            why = f"it is no tenant of network {network}"
            yield Refused(code="unknown_tenant", what=f"tenant {name}", why=why, hint=hint)


def _malformed(what: str, network: Network, leg: Leg) -> Iterator[Refused]:
    """One of both families at least, each whole, and of a family that the VN has."""
    for family, mine, via, subnet in (
        (4, leg.ipv4, leg.via_ipv4, network.ipv4),
        (6, leg.ipv6, leg.via_ipv6, network.ipv6),
    ):
        if not mine and not via:
            continue
        option = f"--ipv{family} ADDRESS/LENGTH --via-ipv{family} ADDRESS"
        if not mine or not via:
            why = "its own address and the next router's belong together"
            yield Refused(code="malformed", what=what, why=why, hint=option)
            continue
        if subnet is None:
            why = f"network {network.name} has no IPv{family} subnet"
            yield Refused(code="no_subnet", what=what, why=why, hint="leave that family out")
        why = _no_leg(family, mine, via)
        if why:
            yield Refused(code="malformed", what=what, why=why, hint=option)
    if not leg.ipv4 and not leg.ipv6:
        why = "it has no address in the physical network"
        hint = "give --ipv4 and --via-ipv4, --ipv6 and --via-ipv6, or all"
        yield Refused(code="no_address", what=what, why=why, hint=hint)


def _no_leg(family: int, mine: str, via: str) -> str:
    """What is wrong with an address in the physical network; empty when nothing is."""
    try:
        own, to = ipaddress.ip_interface(mine), ipaddress.ip_address(via)
    except ValueError as error:
        return str(error)
    if (own.version, to.version) != (family, family):
        return f"{mine} and {via} are not both IPv{family}"
    if to not in own.network or to == own.ip:
        return f"{via} is no neighbour of {mine}"
    return ""


def _overlaps(cluster: Cluster, what: str, network: Network, wish: Gateway) -> Iterator[Refused]:
    """The outside must be elsewhere, and must know by the address which VN is meant."""
    inside, outside = subnets(network), outside_of(wish.leg)
    reached = [s for name in cluster.near((network.name,)) for s in subnets(cluster.networks[name])]
    for mine, theirs in product(reached, outside):
        if overlap(mine, theirs):
            why = (
                f"{theirs} of the physical network overlaps {mine} of the VN or one it may talk to"
            )
            yield Refused(code="overlap", what=what, why=why, hint="use other addresses")
    for other in cluster.gateways.values():
        places = outside_of(other.leg)
        for address in _addresses(wish.leg):
            if address in _addresses(other.leg) and other.key != wish.key:
                why = f"{address} belongs to the gateway of network {other.network} on {other.host}"
                yield Refused(code="address_taken", what=what, why=why, hint="choose another")
        if other.network == network.name:
            continue
        if not any(overlap(mine, theirs) for mine, theirs in product(outside, places)):
            continue
        for mine, theirs in product(inside, subnets(cluster.networks[other.network])):
            if overlap(mine, theirs):
                why = f"{mine} overlaps {theirs} of network {other.network} on the same outside"
                remove = f"overland network gateway remove {other.network} --host {other.host}"
                hint = f"`{remove}`, or another outside"
                yield Refused(code="overlap", what=what, why=why, hint=hint)


def _addresses(leg: Leg) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    return [ipaddress.ip_interface(each).ip for each in (leg.ipv4, leg.ipv6) if each]
