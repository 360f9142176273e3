"""The ops that turn one kernel state into another, in an order that never opens a hole. Pure.

Adding comes before removing, what others stand on comes first and goes last, and a port is muted
before it exists and unmuted after its paths do. An entry that changes is one `put`: the kernel
replaces it in one step.
"""

from __future__ import annotations

from collections.abc import Hashable

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
    Op,
    Passage,
    RouterNeighbour,
    TunnelEntry,
    WayOut,
)

_LINK_ORDER = {
    "bridge": 0,
    "vxlan": 1,
    "ila": 1,
    "router": 2,
    "tap": 3,
    "veth": 3,
    "gateway": 3,
    "leg": 4,
}


def delta(desired: KernelState, actual: KernelState) -> tuple[Op, ...]:
    """Return the ops from `actual` to `desired`; empty when they are equal."""
    wanted, there = _facts(desired), _facts(actual)
    kept = {_slot(fact) for fact in wanted}
    puts = [Op(verb="put", fact=fact) for fact in wanted - there]
    removes = [Op(verb="remove", fact=fact) for fact in there - wanted if _slot(fact) not in kept]
    return (*sorted(puts, key=_put_order), *sorted(removes, key=_remove_order))


def _facts(state: KernelState) -> frozenset[Fact]:
    return (
        frozenset[Fact](state.links)
        | state.bridge_entries
        | state.tunnel_entries
        | state.locator_entries
        | state.identifier_entries
        | state.neighbours
        | state.router_neighbours
        | state.host_routes
        | state.default_routes
        | state.ways_out
        | state.passages
        | state.muted
        | state.in_transit
    )


def _slot(fact: Fact) -> Hashable:  # noqa: C901 - one row for each kind of fact
    """Two facts with the same slot cannot both be: putting one replaces the other."""
    match fact:
        case Link(name=name):
            return ("link", name)
        case BridgeEntry(bridge=bridge, mac=mac):
            return ("bridge", bridge, mac)
        case TunnelEntry(device=device, mac=mac, remote=remote) if mac == FLOOD:
            return ("flood", device, remote)
        case TunnelEntry(device=device, mac=mac) | LocatorEntry(device=device, mac=mac):
            return ("tunnel", device, mac)
        case IdentifierEntry(address=address, local=local):
            return ("identifier", address, local)
        case Neighbour(bridge=bridge, address=address):
            return ("neighbour", bridge, address)
        case RouterNeighbour(router=router, address=address):
            return ("router neighbour", router, address)
        case HostRoute(router=router, address=address):
            return ("route", router, address)
        case DefaultRoute(router=router, via=via, table=table):
            return ("default route", router, via, table)
        case WayOut(router=router, source=source, via=via):
            return ("way out", router, source, via)
        case Passage(router=router, other=other):
            return ("passage", router, other)
        case Muted(port=port):
            return ("muted", port)
        case InTransit(port=port, mac=mac):
            return ("in transit", port, mac)
        case _:
            raise AssertionError(fact)


def _put_order(op: Op) -> tuple[int, int, str]:  # noqa: C901 - one row for each kind of fact
    match op.fact:
        case Muted(port=port):
            return (0, 0, port)
        case InTransit(port=port, mac=mac):
            return (0, 1, port + mac)
        case Link(kind=kind, name=name):
            return (1, _LINK_ORDER[kind], name)
        case TunnelEntry(device=device, mac=mac) | LocatorEntry(device=device, mac=mac):
            return (2, 0, device + mac)
        case IdentifierEntry(device=device, mac=mac):
            return (2, 1, device + mac)
        case BridgeEntry(bridge=bridge, mac=mac):
            return (3, 0, bridge + mac)
        case Neighbour(bridge=bridge, address=address):
            return (4, 0, bridge + address)
        case RouterNeighbour(router=router, address=address):
            return (5, 0, router + address)
        case HostRoute(router=router, address=address):
            return (6, 0, router + address)
        case DefaultRoute(router=router, via=via):
            return (7, 0, router + via)
        case WayOut(router=router, source=source):
            return (8, int(":" in source), router + source)
        case Passage(router=router, other=other):
            return (9, 0, router + other)
        case _:
            raise AssertionError(op)


def _remove_order(op: Op) -> tuple[int, int, str]:  # noqa: C901 - one row for each kind of fact
    match op.fact:
        case Muted(port=port):
            return (0, 0, port)
        case WayOut(router=router, source=source):
            return (0, 1 + int(":" in source), router + source)
        case DefaultRoute(router=router, via=via):
            return (0, 3, router + via)
        case Passage(router=router, other=other):
            return (0, 4, router + other)
        case HostRoute(router=router, address=address):
            return (1, 0, router + address)
        case RouterNeighbour(router=router, address=address):
            return (2, 0, router + address)
        case Neighbour(bridge=bridge, address=address):
            return (3, 0, bridge + address)
        case BridgeEntry(bridge=bridge, mac=mac):
            return (4, 0, bridge + mac)
        case TunnelEntry(device=device, mac=mac) | LocatorEntry(device=device, mac=mac):
            return (5, 0, device + mac)
        case IdentifierEntry(device=device, mac=mac):
            return (5, 1, device + mac)
        case Link(kind=kind, name=name):
            return (6, -_LINK_ORDER[kind], name)
        case InTransit(port=port, mac=mac):
            return (7, 0, port + mac)
        case _:
            raise AssertionError(op)
