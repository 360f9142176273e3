"""What a VN of kind `ila` needs, and who may have which identifier in it. Pure.

All these VNs are one domain: each has a SIR prefix of its own, and an identifier is given out once
in all of them, for it is all that tells tenants apart behind one locator (requirements.md 4.1).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from overland.model.cluster import Interface, Network, Refused
from overland.model.ila import identifier, identifier_fault, parse_half
from overland.nva.cluster import Cluster, Tsi


def ila_network_blockers(cluster: Cluster, wish: Network) -> Iterator[Refused]:
    """Why `wish` cannot be a VN of kind `ila`: what IPv6 needs, and what others have already."""
    what = f"network {wish.name}"
    if wish.ipv4:
        why = "identifier-locator addressing is for IPv6 only"
        yield Refused(code="ipv6_only", what=what, why=why, hint="leave --ipv4 out, or --kind l3")
    if wish.ipv6 is None:
        why = "a network of kind ila needs the IPv6 prefix of its tenants"
        yield Refused(code="no_subnet", what=what, why=why, hint="give --ipv6 PREFIX/64")
        return
    try:
        parse_half(wish.ipv6, "subnet")
    except ValueError as error:
        yield Refused(code="malformed", what=what, why=str(error), hint="give --ipv6 PREFIX/64")
        return
    mine = ipaddress.IPv6Network(wish.ipv6)
    for other in cluster.networks.values():
        if other.kind == "ila" and other.ipv6 and mine == ipaddress.IPv6Network(other.ipv6):
            why = f"{wish.ipv6} belongs to network {other.name}, and the underlay sees both"
            yield Refused(code="subnet_taken", what=what, why=why, hint="choose another prefix")
    for host in cluster.hosts.values():
        if host.locator and mine == ipaddress.IPv6Network(host.locator):
            why = f"{wish.ipv6} is the locator of host {host.name}"
            yield Refused(code="subnet_taken", what=what, why=why, hint="choose another prefix")


def identifier_blockers(
    cluster: Cluster, owner: str, network: Network, interface: Interface
) -> Iterator[Refused]:
    """Why `interface` cannot have its address: the form, or somebody has the identifier."""
    if interface.ipv6 is None:
        return
    fault = identifier_fault(interface.ipv6)
    if fault is not None:
        why, hint = fault
        yield Refused(code="bad_identifier", what=owner, why=why, hint=hint)
        return
    holder = identifiers(cluster).get(identifier(interface.ipv6))
    if holder is None or (holder.owner, holder.interface.mac) == (owner, interface.mac):
        return
    if holder.interface.network != network.name:  # in the same one the address is named as taken
        whose = f"{holder.owner} in network {holder.interface.network}"
        why = f"{interface.ipv6}: its identifier belongs to {whose}"
        yield Refused(code="address_taken", what=owner, why=why, hint="choose another")


def identifiers(cluster: Cluster) -> dict[int, Tsi]:
    """Who has which identifier, in all VNs of kind `ila`."""
    networks = {each.name for each in cluster.networks.values() if each.kind == "ila"}
    return {
        identifier(tsi.interface.ipv6): tsi
        for tsi in cluster.tsis()
        if tsi.interface.ipv6 and tsi.interface.network in networks
    }
