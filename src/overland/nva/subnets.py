"""Subnets of VNs and of the physical network, and whether they meet. Pure."""

from __future__ import annotations

import ipaddress

from overland.model.cluster import Leg, Network

Subnet = ipaddress.IPv4Network | ipaddress.IPv6Network


def subnets(network: Network) -> list[Subnet]:
    """Those of a VN, of both families."""
    return [ipaddress.ip_network(each) for each in (network.ipv4, network.ipv6) if each]


def outside_of(leg: Leg) -> list[Subnet]:
    """The subnets of the physical network in which a gateway stands."""
    return [ipaddress.ip_interface(each).network for each in (leg.ipv4, leg.ipv6) if each]


def overlap(one: Subnet, other: Subnet) -> bool:
    """Tell whether an address may be in both; not when they are of two families."""
    if isinstance(one, ipaddress.IPv4Network):
        return isinstance(other, ipaddress.IPv4Network) and one.overlaps(other)
    return isinstance(other, ipaddress.IPv6Network) and one.overlaps(other)


def within(one: Subnet, other: Subnet) -> bool:
    """Tell whether all of `one` is in `other`; not when they are of two families."""
    if isinstance(one, ipaddress.IPv4Network):
        return isinstance(other, ipaddress.IPv4Network) and one.subnet_of(other)
    return isinstance(other, ipaddress.IPv6Network) and one.subnet_of(other)
