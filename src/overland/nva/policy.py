"""May the tenants of two routed VNs talk with each other, and why not? Pure (N-15)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from overland.model.cluster import Network, Policy, Refused
from overland.nva.cluster import Cluster
from overland.nva.mapping import underlay_address
from overland.nva.subnets import outside_of, overlap, subnets


def pair(one: str, other: str, at_ns: int) -> Policy:
    """The policy of these two, whichever is named first."""
    first, second = sorted((one, other))
    return Policy(networks=(first, second), at_ns=at_ns)


def known_blockers(cluster: Cluster, policy: Policy) -> Iterator[Refused]:
    """Why there can be no policy of these two at all, neither yes nor no."""
    for name in policy.networks:
        if name not in cluster.networks:
            hint = "`overland network list` shows all"
            why = "there is no such network"
            yield Refused(code="unknown_network", what=f"network {name}", why=why, hint=hint)
    if policy.networks[0] == policy.networks[1]:
        why = "tenants of one network are always allowed to talk"
        yield Refused(code="same_network", what=_what(policy), why=why, hint="name two networks")


def allow_blockers(cluster: Cluster, policy: Policy) -> Iterator[Refused]:
    """Why these two cannot be joined."""
    unknown = tuple(known_blockers(cluster, policy))
    if unknown:
        yield from unknown
        return
    one, other = (cluster.networks[name] for name in policy.networks)
    for network in (one, other):
        if network.kind != "l3":
            why = f"network {network.name} is {network.kind}: only routed networks have routers"
            hint = "`overland network create --kind l3`"
            yield Refused(code="not_routed", what=_what(policy), why=why, hint=hint)
    if not ((one.ipv4 and other.ipv4) or (one.ipv6 and other.ipv6)):
        why = "one has only IPv4, the other only IPv6"
        yield Refused(code="no_common_family", what=_what(policy), why=why)
    yield from _meet(cluster, policy, one, other)
    yield from _meet(cluster, policy, other, one)
    yield from _cannot_carry(cluster, policy)


def _meet(cluster: Cluster, policy: Policy, one: Network, other: Network) -> Iterator[Refused]:
    """What the router of `one` would have to tell apart: all that it has a way to."""
    reached = [
        (f"network {name}", subnet)
        for name in sorted(cluster.near((one.name,)) - {other.name})
        for subnet in subnets(cluster.networks[name])
        if name != one.name or one.name < other.name  # of the two themselves it is said once
    ]
    outside = {p for gateway in cluster.gateways_of(one.name) for p in outside_of(gateway.leg)}
    reached += [(f"the outside of {one.name}", place) for place in sorted(outside, key=str)]
    for (whose, there), subnet in product(reached, subnets(other)):
        if overlap(there, subnet):
            why = f"{subnet} of network {other.name} overlaps {there} of {whose}"
            hint = "an address must name one tenant: use other subnets"
            yield Refused(code="overlap", what=_what(policy), why=why, hint=hint)


def _cannot_carry(cluster: Cluster, policy: Policy) -> Iterator[Refused]:
    """Hosts of one network's tenants on which the other could not be."""
    places = set().union(*(cluster.places(name) for name in policy.networks))
    for place, name in product(sorted(places), policy.networks):
        host, network = cluster.hosts.get(place), cluster.networks[name]
        if host is not None and underlay_address(host, network) is None:
            why = f"host {place} has no {network.underlay} underlay address for network {name}"
            yield Refused(code="no_underlay", what=_what(policy), why=why)


def _what(policy: Policy) -> str:
    return f"networks {' and '.join(policy.networks)}"
