"""What one NVE must do, what its kernel holds, and the steps between the two.

`NveIntent` comes from the NVA. `render` turns it into a desired `KernelState`; the kernel is read
back as an actual `KernelState`; `delta` gives the ops that turn the second into the first.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from overland.model.cluster import Family, Leg, Record

FLOOD = "00:00:00:00:00:00"
"""The VXLAN entry that stands for everybody: broadcast, unknown unicast and multicast."""


class TsiIntent(Record, frozen=True, kw_only=True):
    """One tenant system interface on this NVE (RFC 8394 states; requirements.md 3.3).

    `associated`: everything is in place but nothing from it is let in. `activated`: in use.
    `index` counts the interfaces of one owner. `namespace` is set for an endpoint only.
    `in_transit`: what is sent to it here is dropped and counted (R-33). `leg` is set for a gateway
    only. `ways_out` are the addresses in the VN of the gateways by which this tenant goes out, one
    of each family at most. `beside`: addresses as valid as the two (ADR 0028).
    """

    owner: str
    index: int
    kind: Literal["tap", "veth", "gateway"]
    mac: str
    ipv4: str | None = None
    ipv6: str | None = None
    beside: tuple[str, ...] = ()
    state: Literal["associated", "activated"]
    namespace: str | None = None
    in_transit: bool = False
    leg: Leg | None = None
    ways_out: tuple[str, ...] = ()


class RemoteIntent(Record, frozen=True, kw_only=True):
    """A tenant address behind another NVE; `nve` is that NVE's underlay address.

    `outside`: the families in which it is a gateway, a way to everything that is not in the VN.
    `beside`: addresses as valid as the two (ADR 0028).
    """

    mac: str
    ipv4: str | None = None
    ipv6: str | None = None
    beside: tuple[str, ...] = ()
    nve: str
    version: int
    in_transit: bool = False
    outside: tuple[Family, ...] = ()


class VnIntent(Record, frozen=True, kw_only=True):
    """One VN on this NVE. `members` are underlay addresses of the other NVEs in it (N-08).

    `ila`: packets are translated, not encapsulated; then `local`, `members` and each remote's
    `nve` are the NVEs' own addresses in their locators.

    `gateways` are the addresses of the router of a routed VN with the prefix length of its subnet
    (10.42.0.1/24), the same on every NVE; a VN without any is a broadcast domain. `allowed` are
    the VNIs of routed VNs whose tenants its own may talk with.
    """

    network: str
    vni: int
    mtu: int
    underlay: Family
    local: str
    ila: bool = False
    gateways: tuple[str, ...] = ()
    allowed: tuple[int, ...] = ()
    ipv4_prefix: int = 24
    ipv6_prefix: int = 64
    members: tuple[str, ...] = ()
    tsis: tuple[TsiIntent, ...] = ()
    remotes: tuple[RemoteIntent, ...] = ()


class VnChange(Record, frozen=True, kw_only=True):
    """What is other in one VN on one NVE than it was: None means as before.

    `remotes` are new or changed, `gone` the MACs that are no longer behind another NVE.
    """

    members: tuple[str, ...] | None = None
    tsis: tuple[TsiIntent, ...] | None = None
    remotes: tuple[RemoteIntent, ...] = ()
    gone: tuple[str, ...] = ()


def changed(before: VnIntent, change: VnChange) -> VnIntent:
    """The VN after `change`; remotes in the order of their MACs."""
    remotes = before.remotes
    if change.remotes or change.gone:
        by_mac = {remote.mac: remote for remote in remotes}
        for mac in change.gone:
            by_mac.pop(mac, None)
        by_mac |= {remote.mac: remote for remote in change.remotes}
        remotes = tuple(by_mac[mac] for mac in sorted(by_mac))
    return msgspec.structs.replace(
        before,
        members=before.members if change.members is None else change.members,
        tsis=before.tsis if change.tsis is None else change.tsis,
        remotes=remotes,
    )


class NveIntent(Record, frozen=True, kw_only=True):
    """All that one NVE must do."""

    vns: tuple[VnIntent, ...] = ()


class Link(Record, frozen=True, kw_only=True):
    """A network device of ours. Attributes a kind does not have stay None.

    `kind`: bridge, vxlan, ila, router, tap, veth, gateway, leg. `alias` carries our mark. Of kind
    `ila` is the port by which frames leave a VN untunnelled; its `gateways` is the SIR prefix.
    `namespace`/`peer_*` describe the inner end of an endpoint's or gateway's veth. A router is the
    bridge port before a namespace of its own; `gateways` are the addresses in there. A gateway is
    the port before another one, and its leg, whose `gateways` are the next routers, leads out of
    that. `routed`: the port speaks with the router only (of a VXLAN device: it carries no
    broadcast).
    """

    name: str
    kind: Literal["bridge", "vxlan", "ila", "router", "tap", "veth", "gateway", "leg"]
    alias: str
    mtu: int
    master: str | None = None
    mac: str | None = None
    routed: bool = False
    gateways: tuple[str, ...] = ()
    vni: int | None = None
    local: str | None = None
    namespace: str | None = None
    peer_ipv4: str | None = None
    peer_ipv6: str | None = None
    peer_mac: str | None = None


class BridgeEntry(Record, frozen=True, kw_only=True):
    """A static bridge FDB entry: frames to `mac` leave `bridge` by `port`."""

    bridge: str
    mac: str
    port: str


class TunnelEntry(Record, frozen=True, kw_only=True):
    """A static VXLAN FDB entry: frames to `mac` go to NVE `remote`; all zeros is flooding."""

    device: str
    mac: str
    remote: str


class LocatorEntry(Record, frozen=True, kw_only=True):
    """Frames leaving ILA `device` for `mac` go to tenant `address` in the locator of `remote`."""

    device: str
    mac: str
    address: str
    remote: str


class IdentifierEntry(Record, frozen=True, kw_only=True):
    """What comes to tenant `address` in the locator of `local` enters the VN of `device`."""

    device: str
    mac: str
    address: str
    local: str


class Neighbour(Record, frozen=True, kw_only=True):
    """A permanent neighbour on a bridge, from which the kernel answers ARP and ND (N-25)."""

    bridge: str
    address: str
    mac: str


class RouterNeighbour(Record, frozen=True, kw_only=True):
    """A permanent neighbour in the router behind `router`: nobody has to be asked for `address`."""

    router: str
    address: str
    mac: str


class HostRoute(Record, frozen=True, kw_only=True):
    """A route to one tenant `address` in the router behind `router`: /32 or /128.

    It is the same on every NVE, wherever the tenant is: places are the bridge's business. A packet
    above `mtu` bytes is answered with Packet Too Big (RFC 1191, RFC 8201).
    """

    router: str
    address: str
    mtu: int


class DefaultRoute(Record, frozen=True, kw_only=True):
    """In the router behind `router`, `table` leads what is not in the VN to a gateway, `via`."""

    router: str
    via: str
    mtu: int
    table: int


class WayOut(Record, frozen=True, kw_only=True):
    """In the router behind `router`, what `source` sends out of the VN goes to gateway `via`.

    `source` is a tenant's address, or everybody (0.0.0.0/0 or ::/0): whoever has no way of his own.
    """

    router: str
    source: str
    via: str


class Passage(Record, frozen=True, kw_only=True):
    """The way between the routers behind `router` and `other`, of two VNs, here on this NVE (N-15).

    `near` are the gateways' addresses of the first, with the prefix lengths of their subnets, and
    `far` those of the other, of the same families in the same order. Nothing passes but from one
    of these subnets to the other. `router` has the lower VNI.
    """

    router: str
    other: str
    near: tuple[str, ...]
    far: tuple[str, ...]


class Muted(Record, frozen=True, kw_only=True):
    """A port from which nothing may come in: associated, not activated."""

    port: str


class InTransit(Record, frozen=True, kw_only=True):
    """Frames to `mac` that enter the VN by `port` are dropped and counted: it is on its way."""

    port: str
    mac: str


Fact = (
    Link
    | BridgeEntry
    | TunnelEntry
    | LocatorEntry
    | IdentifierEntry
    | Neighbour
    | RouterNeighbour
    | HostRoute
    | DefaultRoute
    | WayOut
    | Passage
    | Muted
    | InTransit
)


class KernelState(Record, frozen=True, kw_only=True):
    """Everything of ours in one kernel, desired or actual. Order has no meaning."""

    links: frozenset[Link] = frozenset()
    bridge_entries: frozenset[BridgeEntry] = frozenset()
    tunnel_entries: frozenset[TunnelEntry] = frozenset()
    locator_entries: frozenset[LocatorEntry] = frozenset()
    identifier_entries: frozenset[IdentifierEntry] = frozenset()
    neighbours: frozenset[Neighbour] = frozenset()
    router_neighbours: frozenset[RouterNeighbour] = frozenset()
    host_routes: frozenset[HostRoute] = frozenset()
    default_routes: frozenset[DefaultRoute] = frozenset()
    ways_out: frozenset[WayOut] = frozenset()
    passages: frozenset[Passage] = frozenset()
    muted: frozenset[Muted] = frozenset()
    in_transit: frozenset[InTransit] = frozenset()


class Op(Record, frozen=True, kw_only=True):
    """One change to the kernel. `put` creates or replaces; `remove` is content with absence."""

    verb: Literal["put", "remove"]
    fact: Fact


class OpFailure(Record, frozen=True, kw_only=True):
    """An op that the kernel refused, with its reason."""

    op: Op
    why: str
