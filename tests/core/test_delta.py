"""Rendering and diffing: the right state, reached without a hole."""

from __future__ import annotations

import itertools
from typing import Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overland.model.cluster import Leg
from overland.model.names import GATEWAY_MAC
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
    NveIntent,
    Op,
    Passage,
    RemoteIntent,
    RouterNeighbour,
    TsiIntent,
    TunnelEntry,
    VnIntent,
    WayOut,
)
from overland.nve.delta import delta
from overland.nve.moving import Moving, settle
from overland.nve.render import render

MACS = [f"02:00:00:00:00:0{n}" for n in range(1, 6)]


def tsi(mac: str, state: str, way: str = "10.0.0.9") -> TsiIntent:
    return TsiIntent(
        owner=mac,
        index=0,
        kind="tap",
        mac=mac,
        ipv4=f"10.0.0.{mac[-1]}",
        ipv6=f"fd00::2000:0:0:{mac[-1]}",
        state="activated" if state == "activated" else "associated",
        ways_out=(way,),
    )


def remote(mac: str, nve: str, version: int = 1) -> RemoteIntent:
    return RemoteIntent(mac=mac, ipv6=f"fd00::2000:0:0:{mac[-1]}", nve=nve, version=version)


GATEWAYS = ("10.0.0.1/24", "fd00::1/64")
LEG = Leg(bridge="out0", mac="02:00:00:00:01:01", ipv4="192.0.2.2/24", via_ipv4="192.0.2.1")
WAY = TsiIntent(
    owner="gateway/h1",
    index=0,
    kind="gateway",
    mac="02:00:00:00:01:00",
    ipv4="10.0.0.9",
    ipv6="fd00::9",
    state="activated",
    leg=LEG,
)
FAR = RemoteIntent(
    mac=WAY.mac, ipv4=WAY.ipv4, ipv6=WAY.ipv6, nve="192.0.2.2", version=1, outside=("ipv4",)
)
OTHER = RemoteIntent(
    mac="02:00:00:00:02:00",
    ipv4="10.0.0.8",
    ipv6="fd00::8",
    nve="192.0.2.3",
    version=1,
    outside=("ipv4", "ipv6"),
)


def intent(
    tsis: list[TsiIntent],
    remotes: list[RemoteIntent],
    members: list[str],
    gateways: tuple[str, ...] = (),
    ways: tuple[TsiIntent | RemoteIntent, ...] = (),
    ila: bool = False,
) -> NveIntent:
    if ila:
        gateways = GATEWAYS[1:]
    if gateways:
        tsis = [*tsis, *(way for way in ways if isinstance(way, TsiIntent))]
        remotes = [*remotes, *(way for way in ways if isinstance(way, RemoteIntent))]
    vn = VnIntent(
        network="blue",
        vni=42,
        mtu=1500,
        underlay="ipv4",
        local="192.0.2.1",
        ila=ila,
        gateways=gateways,
        members=tuple(members),
        tsis=tuple(tsis),
        remotes=tuple(remotes),
    )
    return NveIntent(vns=(vn,))


intents = st.builds(
    intent,
    st.lists(
        st.builds(
            tsi,
            st.sampled_from(MACS[:3]),
            st.sampled_from(["activated", "associated"]),
            st.sampled_from(["10.0.0.9", "10.0.0.8", "fd00::8"]),
        ),
        unique_by=lambda each: each.mac,
    ),
    st.lists(
        st.builds(remote, st.sampled_from(MACS), st.sampled_from(["192.0.2.2", "192.0.2.3"])),
        unique_by=lambda each: each.mac,
    ),
    st.lists(st.sampled_from(["192.0.2.2", "192.0.2.3"]), unique=True),
    st.sampled_from([(), GATEWAYS]),
    st.sampled_from([(), (WAY,), (FAR,), (OTHER,), (WAY, OTHER), (FAR, OTHER)]),
    st.booleans(),
)


def facts(state: KernelState) -> set[Fact]:
    return {
        *state.links,
        *state.bridge_entries,
        *state.tunnel_entries,
        *state.locator_entries,
        *state.identifier_entries,
        *state.neighbours,
        *state.router_neighbours,
        *state.host_routes,
        *state.default_routes,
        *state.ways_out,
        *state.passages,
        *state.muted,
        *state.in_transit,
    }


def key(fact: Fact) -> object:  # noqa: C901 - one row for each kind of fact
    match fact:
        case Link(name=name):
            return name
        case BridgeEntry(bridge=bridge, mac=mac):
            return (bridge, mac)
        case TunnelEntry(device=device, mac=mac, remote=remote):
            return (device, mac, remote if mac == FLOOD else "")
        case LocatorEntry(device=device, mac=mac):
            return ("locator", device, mac)
        case IdentifierEntry(address=address, local=local):
            return ("identifier", address, local)
        case Neighbour(bridge=bridge, address=address):
            return (bridge, address)
        case RouterNeighbour(router=router, address=address):
            return ("router neighbour", router, address)
        case HostRoute(router=router, address=address):
            return ("route", router, address)
        case DefaultRoute(router=router, table=table, via=via):
            return ("default route", router, table, ":" in via)
        case WayOut(router=router, source=source, via=via):
            return ("way out", router, source, via)
        case Passage(router=router, other=other):
            return ("passage", router, other)
        case Muted(port=port):
            return ("muted", port)
        case InTransit(port=port, mac=mac):
            return ("in transit", port, mac)


def perform(state: set[Fact], ops: tuple[Op, ...]) -> set[Fact]:
    """A kernel in which putting a fact replaces what stands in its place."""
    table = {key(fact): fact for fact in state}
    for op in ops:
        if op.verb == "put":
            table[key(op.fact)] = op.fact
        elif table.get(key(op.fact)) == op.fact:
            del table[key(op.fact)]
    return set(table.values())


@given(intents, intents)
def test_the_ops_lead_from_any_state_to_any_other(before: NveIntent, after: NveIntent) -> None:
    actual, desired = render(before), render(after)
    assert perform(facts(actual), delta(desired, actual)) == facts(desired)
    assert delta(desired, desired) == ()


@given(intents, intents)
def test_a_mac_that_stays_reachable_is_reachable_at_every_step(
    before: NveIntent, after: NveIntent
) -> None:
    actual, desired = render(before), render(after)
    kept = {e.mac for e in actual.bridge_entries} & {e.mac for e in desired.bridge_entries}
    state = facts(actual)
    for op in delta(desired, actual):
        state = perform(state, (op,))
        assert kept <= {e.mac for e in state if isinstance(e, BridgeEntry)}


def test_what_is_only_associated_is_mute_and_still_found_at_the_other_nve() -> None:
    mac = MACS[0]
    state = render(intent([tsi(mac, "associated")], [remote(mac, "192.0.2.2")], ["192.0.2.2"]))
    assert [e.port for e in state.bridge_entries if e.mac == mac] == ["ovx42"]
    assert len(state.muted) == 1


@pytest.mark.req("R-07")
def test_forwarding_entries_know_no_protocol() -> None:
    """What carries a frame is its MAC: IPv4, IPv6 and anything else go the same way."""
    bare = RemoteIntent(mac=MACS[0], nve="192.0.2.2", version=1)
    state = render(intent([], [bare], ["192.0.2.2"]))
    assert {e.mac for e in state.bridge_entries} == {MACS[0]}
    assert state.neighbours == frozenset()


def test_a_port_is_mute_before_it_exists() -> None:
    ops = delta(render(intent([tsi(MACS[0], "associated")], [], [])), KernelState())
    kinds = [type(op.fact) for op in ops]
    assert kinds.index(Muted) < kinds.index(Link)


@pytest.mark.parametrize(("role", "version", "kept"), [("peer", 1, True), ("peer", 2, False)])
def test_the_loop_leaves_a_moving_mac_alone_until_the_commit(
    role: str, version: int, kept: bool
) -> None:
    mac = MACS[0]
    wanted = intent([], [remote(mac, "192.0.2.2", version)], [])
    steered = render(intent([], [remote(mac, "192.0.2.3")], []))
    moving = Moving(role="peer", mac=mac, port="ovt1", device="ovx42", bridge="ovb42", version=1)
    settled = settle(render(wanted), steered, wanted, frozenset({moving}))
    remotes = {e.remote for e in settled.tunnel_entries if e.mac == mac}
    assert remotes == ({"192.0.2.3"} if kept else {"192.0.2.2"})


@pytest.mark.req("R-08")
@pytest.mark.req("R-22")
def test_a_move_changes_no_route_and_no_neighbour_of_any_router() -> None:
    """R-08: host routes say that a tenant is, not where; the same on the old, new and peer NVE."""
    mac, others = MACS[0], ["192.0.2.2", "192.0.2.3"]
    away = [remote(mac, nve) for nve in others]
    tenant = msgspec.structs.replace(tsi(mac, "activated"), ipv4=None, ipv6=away[0].ipv6)
    old, new, peer = (
        render(intent(tsis, remotes, others, GATEWAYS))
        for tsis, remotes in (([tenant], []), ([], away[:1]), ([], away[1:]))
    )
    for before, after in itertools.permutations((old, new, peer), 2):
        touched = {type(op.fact) for op in delta(after, before)}
        assert not touched & {RouterNeighbour, HostRoute}
    assert {route.address for route in new.host_routes} == {away[0].ipv6}


def test_an_ila_vn_has_places_where_others_have_tunnels() -> None:
    """Same bridge, same router, same entries in both; the port to the other NVEs is another."""
    mine, theirs = tsi(MACS[0], "associated"), remote(MACS[1], "2001:db8:a:2::1")
    tunnelled = render(intent([mine], [theirs], ["192.0.2.2"], GATEWAYS[1:]))
    state = render(intent([mine], [theirs], ["192.0.2.2"], ila=True))
    assert {(link.kind, link.routed) for link in state.links} == {
        ("bridge", False),
        ("router", False),
        ("ila", True),
        ("tap", True),
    }
    assert state.tunnel_entries == frozenset()
    assert state.locator_entries == {
        LocatorEntry(device="ovi42", mac=MACS[1], address=theirs.ipv6 or "", remote=theirs.nve)
    }
    assert state.identifier_entries == {
        IdentifierEntry(device="ovi42", mac=MACS[0], address=mine.ipv6 or "", local="192.0.2.1")
    }, "also of what is only associated: a move brings it"
    assert state.host_routes == tunnelled.host_routes
    assert state.router_neighbours == tunnelled.router_neighbours


@pytest.mark.parametrize("role", ["old", "new", "peer"])
def test_the_loop_leaves_a_moving_identifier_alone(role: Literal["old", "new", "peer"]) -> None:
    """The old NVE takes in late packets until the close, the new one early ones from the first."""
    mac, far = MACS[0], "2001:db8:a:2::1"
    here = render(intent([tsi(mac, "activated")], [], [], ila=True))
    wanted = intent([], [remote(mac, far)], [], ila=True)
    if role == "new":
        wanted = intent([tsi(mac, "associated")], [remote(mac, far)], [], ila=True)
        here = render(intent([], [remote(mac, far)], [], ila=True))
    moving = Moving(role=role, mac=mac, port="ovt1", device="ovi42", bridge="ovb42", version=1)
    settled = settle(render(wanted), here, wanted, frozenset({moving}))
    assert settled.locator_entries == here.locator_entries
    if role != "peer":
        assert [each.mac for each in settled.identifier_entries] == [mac]


@given(intents, intents)
def test_a_router_never_has_a_route_without_its_neighbour(
    before: NveIntent, after: NveIntent
) -> None:
    """It would ask the VN for a MAC address, and nobody is to be asked."""
    actual, desired = render(before), render(after)
    state = facts(actual)
    for op in delta(desired, actual):
        state = perform(state, (op,))
        routes = {(e.router, e.address) for e in state if isinstance(e, HostRoute)}
        assert routes <= {(e.router, e.address) for e in state if isinstance(e, RouterNeighbour)}


@given(intents, intents)
def test_a_way_out_never_leads_to_nobody(before: NveIntent, after: NveIntent) -> None:
    actual, desired = render(before), render(after)
    state = facts(actual)
    for op in delta(desired, actual):
        state = perform(state, (op,))
        ways = {(e.router, e.via) for e in state if isinstance(e, DefaultRoute)}
        assert ways <= {(e.router, e.address) for e in state if isinstance(e, HostRoute)}
        assert ways >= {(e.router, e.via) for e in state if isinstance(e, WayOut)}


@given(intents, intents)
def test_whoever_keeps_a_way_out_has_one_at_every_step(before: NveIntent, after: NveIntent) -> None:
    """Also while he changes it: the new one is there before the old one goes."""
    actual, desired = render(before), render(after)
    kept = {(e.router, e.source) for e in actual.ways_out}
    kept &= {(e.router, e.source) for e in desired.ways_out}
    state = facts(actual)
    for op in delta(desired, actual):
        state = perform(state, (op,))
        assert kept <= {(e.router, e.source) for e in state if isinstance(e, WayOut)}


@pytest.mark.req("R-19")
def test_every_router_of_a_vn_has_the_same_way_out() -> None:
    """R-19: the gateway is a tenant among others; the routes are equal, at its own NVE too."""
    mac = MACS[0]
    here = render(intent([tsi(mac, "activated")], [], [], GATEWAYS, (WAY,)))
    there = render(intent([tsi(mac, "activated")], [], [], GATEWAYS, (FAR,)))
    without = render(intent([tsi(mac, "activated")], [], [], GATEWAYS))
    assert (here.default_routes, here.ways_out) == (there.default_routes, there.ways_out)
    assert {each.via for each in here.default_routes} == {"10.0.0.9"}, "no leg, no way in IPv6"
    assert here.host_routes == there.host_routes
    assert here.router_neighbours == there.router_neighbours
    assert (without.default_routes, without.ways_out) == (frozenset(), frozenset())
    assert {(e.name, e.kind, e.master) for e in here.links - without.links} == {
        ("ovg42", "gateway", "ovb42"),
        ("ovl42", "leg", "out0"),
    }
    assert BridgeEntry(bridge="ovb42", mac=WAY.mac, port="ovg42") in here.bridge_entries
    assert BridgeEntry(bridge="ovb42", mac=WAY.mac, port="ovx42") in there.bridge_entries


def test_each_tenant_goes_out_by_his_own_gateway_where_he_is_and_where_he_comes() -> None:
    """6-14: a table for each gateway; rules for who is here or about to be, and for the router."""
    here = [tsi(MACS[0], "activated"), tsi(MACS[1], "associated", "10.0.0.8")]
    state = render(intent(here, [remote(MACS[2], "192.0.2.2")], [], GATEWAYS, (FAR, OTHER)))
    assert {e.via for e in state.default_routes} == {"10.0.0.8", "10.0.0.9", "fd00::8"}
    assert len({(":" in e.via, e.table) for e in state.default_routes}) == 3
    assert {(e.source, e.via) for e in state.ways_out} == {
        ("10.0.0.1", "10.0.0.9"),
        ("10.0.0.2", "10.0.0.8"),
        ("0.0.0.0/0", "10.0.0.8"),
        ("::/0", "fd00::8"),
    }


def test_an_address_of_before_goes_out_by_the_same_gateway_as_the_new_one() -> None:
    """6-14: also while a move that changes the address keeps both (ADR 0028)."""
    both = msgspec.structs.replace(tsi(MACS[0], "activated"), beside=("10.0.0.77", "fd00::77"))
    state = render(intent([both], [], [], GATEWAYS, (FAR, OTHER)))
    own = {(e.source, e.via) for e in state.ways_out if "/" not in e.source}
    assert own == {("10.0.0.1", "10.0.0.9"), ("10.0.0.77", "10.0.0.9")}


def test_who_has_lost_his_gateway_goes_out_by_another_and_not_by_none() -> None:
    """Until the NVA has given him one."""
    state = render(intent([tsi(MACS[0], "activated")], [], [], GATEWAYS, (OTHER,)))
    assert {(e.source, e.via) for e in state.ways_out} == {
        ("0.0.0.0/0", "10.0.0.8"),
        ("::/0", "fd00::8"),
    }


def test_a_default_route_of_the_main_table_is_taken_away() -> None:
    """As it was while a VN could have one gateway only."""
    desired = render(intent([tsi(MACS[0], "activated")], [], [], GATEWAYS, (FAR,)))
    (route,) = desired.default_routes
    old = msgspec.structs.replace(route, table=254)
    former = msgspec.structs.replace(desired, default_routes=frozenset({old}), ways_out=frozenset())
    ops = delta(desired, former)
    assert ops[-1] == Op(verb="remove", fact=old)
    assert {op.verb for op in ops[:-1]} == {"put"}


def test_a_gateway_stands_in_both_places_or_in_none() -> None:
    """Its port is there before its leg, and goes after it, with the namespace between them."""
    with_it = render(intent([], [], [], GATEWAYS, (WAY,)))
    without = render(intent([], [], [], GATEWAYS))

    def order(desired: KernelState, actual: KernelState) -> list[str]:
        ops = delta(desired, actual)
        return [op.fact.name for op in ops if isinstance(op.fact, Link)]

    assert order(with_it, without) == ["ovg42", "ovl42"]
    assert order(without, with_it) == ["ovl42", "ovg42"]


def test_a_routed_vn_is_no_broadcast_domain() -> None:
    """Nothing stands for everybody; the bridge answers nobody, the router does."""
    there = remote(MACS[1], "192.0.2.2")
    state = render(intent([tsi(MACS[0], "activated")], [there], ["192.0.2.2"], GATEWAYS))
    assert FLOOD not in {entry.mac for entry in state.tunnel_entries}
    assert state.neighbours == frozenset()
    assert {(link.kind, link.routed) for link in state.links} == {
        ("bridge", False),
        ("router", False),
        ("vxlan", True),
        ("tap", True),
    }
    assert BridgeEntry(bridge="ovb42", mac=GATEWAY_MAC, port="ovr42") in state.bridge_entries


def pair(allowed: tuple[int, ...], back: tuple[int, ...], far: tuple[str, ...]) -> NveIntent:
    """VNs 42 and 43 on one NVE, and what each says of whom its tenants may talk with."""
    (one,) = intent([tsi(MACS[0], "activated")], [], [], GATEWAYS).vns
    other = msgspec.structs.replace(
        one, network="other", vni=43, gateways=far, tsis=(), allowed=back
    )
    return NveIntent(vns=(msgspec.structs.replace(one, allowed=allowed), other))


FAR_GATEWAYS = ("fd43::1/64", "10.43.0.1/24")


@pytest.mark.req("N-15")
@pytest.mark.parametrize(
    ("allowed", "back", "far", "expected"),
    [
        ((43,), (42,), FAR_GATEWAYS, [GATEWAYS]),
        ((43,), (42,), FAR_GATEWAYS[:1], [GATEWAYS[1:]]),
        ((43,), (), FAR_GATEWAYS, []),
        ((), (42,), FAR_GATEWAYS, []),
        ((), (), FAR_GATEWAYS, []),
        ((44,), (44,), FAR_GATEWAYS, []),
    ],
)
def test_two_routers_are_joined_when_both_vns_say_so_in_the_families_of_both(
    allowed: tuple[int, ...],
    back: tuple[int, ...],
    far: tuple[str, ...],
    expected: list[tuple[str, ...]],
) -> None:
    """N-15: a NVE that has heard only half of a denial, or of a policy, has no way."""
    found = render(pair(allowed, back, far)).passages
    assert [each.near for each in found] == expected
    for each in found:
        assert (each.router, each.other) == ("ovr42", "ovr43")
        assert [":" in near for near in each.near] == [":" in there for there in each.far]


@pytest.mark.req("N-15")
def test_a_passage_is_the_last_to_come_and_goes_before_what_it_leads_to() -> None:
    joined, apart = render(pair((43,), (42,), FAR_GATEWAYS)), render(pair((), (), FAR_GATEWAYS))
    empty = KernelState()
    assert isinstance(delta(joined, empty)[-1].fact, Passage)
    assert [op.fact for op in delta(apart, joined)] == list(joined.passages)
    order = [type(op.fact) for op in delta(empty, joined)]
    assert order.index(Passage) < order.index(Link)
