"""What each NVE is told, and what nobody is told who need not know."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overland.model.cluster import Endpoint, Host, Interface, Network, Vm, VmState
from overland.model.names import GATEWAY_MAC
from overland.model.nve import VnChange, changed
from overland.nva.cluster import Cluster
from overland.nva.mapping import VnView
from overland.nva.rules import (
    action_refused,
    cold_blockers,
    interface_blockers,
    move_blockers,
    network_blockers,
)

BLUE = Network(name="blue", vni=42, ipv4="10.0.0.0/24", ipv6="fd00::/64")
GREY = Network(name="grey", vni=50, kind="l3", ipv4="10.0.0.0/24", ipv6="fd00::/64", mtu=1400)
RED = Network(name="red", vni=43, underlay="ipv6")


def cluster(state: VmState = "running") -> Cluster:
    """blue: web on h1, p2 on h2; red: p3 on h3."""
    found = Cluster()
    found.networks |= {"blue": BLUE, "red": RED}
    for n in (1, 2, 3):
        found.hosts[f"h{n}"] = Host(
            name=f"h{n}", underlay_ipv4=f"192.0.2.{n}", underlay_ipv6=f"2001:db8::{n}", ready=True
        )
    web = Interface(network="blue", mac="02:00:00:00:00:01", ipv4="10.0.0.5", ipv6="fd00::5")
    found.vms["web"] = Vm(name="web", host="h1", state=state, interfaces=(web,), version=4)
    for name, host, network in (("p2", "h2", "blue"), ("p3", "h3", "red")):
        face = Interface(network=network, mac=f"02:00:00:00:01:0{host[1]}")
        found.endpoints[name] = Endpoint(name=name, host=host, namespace=name, interface=face)
    return found


@pytest.mark.req("R-44")
def test_an_nve_without_a_subscription_is_told_nothing() -> None:
    blue, red = VnView(cluster(), BLUE), VnView(cluster(), RED)
    assert [blue.includes(host) for host in ("h1", "h2", "h3")] == [True, True, False]
    assert [red.includes(host) for host in ("h1", "h2", "h3")] == [False, False, True]


@pytest.mark.req("R-52")
@pytest.mark.parametrize(("network", "outer"), [(BLUE, "192.0.2.1"), (RED, "2001:db8::3")])
def test_inner_and_outer_family_are_independent(network: Network, outer: str) -> None:
    host = "h1" if network is BLUE else "h3"
    assert VnView(cluster(), network).intent(host).local == outer


@pytest.mark.req("N-11")
def test_what_a_dead_nve_had_mapped_vanishes_and_comes_back() -> None:
    now = cluster()
    alive = VnView(now, BLUE)
    now.hosts["h1"] = msgspec.structs.replace(now.hosts["h1"], ready=False, dead=True)
    dead = VnView(now, BLUE)
    assert [each.mac for each in alive.intent("h2").remotes] == ["02:00:00:00:00:01"]
    assert not dead.intent("h2").remotes
    assert not dead.intent("h2").members
    assert dead.change("h2", alive) == VnChange(members=(), gone=("02:00:00:00:00:01",))
    back = alive.change("h2", dead)
    assert back is not None
    assert changed(dead.intent("h2"), back) == alive.intent("h2")


places = st.dictionaries(
    st.integers(1, 9), st.tuples(st.sampled_from(["h1", "h2", "h3"]), st.integers(1, 3)), max_size=6
)


@pytest.mark.req("N-20")
@given(places, places, st.sets(st.sampled_from(["h2", "h3"])), st.sampled_from(["h1", "h2", "h3"]))
def test_what_has_changed_and_the_whole_come_to_the_same(
    before: dict[int, tuple[str, int]],
    after: dict[int, tuple[str, int]],
    dead: set[str],
    host: str,
) -> None:
    """An NVE that hears every update has what one has that is told the whole."""
    first, second = VnView(_domain(before, set()), BLUE), VnView(_domain(after, dead), BLUE)
    change = second.change(host, first) if second.includes(host) else None
    if change is not None:
        assert changed(first.intent(host), change) == second.intent(host)
    if first.includes(host):
        assert first.change(host, first) == VnChange()


def _domain(vms: dict[int, tuple[str, int]], dead: set[str]) -> Cluster:
    found = cluster()
    found.vms.clear()
    for n, (host, version) in vms.items():
        face = Interface(network="blue", mac=f"02:00:00:00:02:0{n}")
        found.vms[f"v{n}"] = Vm(
            name=f"v{n}", host=host, state="running", interfaces=(face,), version=version
        )
    for name in dead:
        found.hosts[name] = msgspec.structs.replace(found.hosts[name], dead=True)
    return found


@pytest.mark.req("R-32")
@pytest.mark.parametrize("host", ["h1", "h2"])
def test_without_a_mechanism_that_pauses_only_cold_moves_are_left(host: str) -> None:
    """R-32: the capability names the mechanism, the guest's pause by QEMU."""
    now = cluster()
    assert now.hosts[host].pauses_by == "guest pause by QEMU"
    codes = {each.code for each in move_blockers(now, "web", "h2")}
    now.hosts[host] = msgspec.structs.replace(now.hosts[host], pauses_by="")
    assert {each.code for each in move_blockers(now, "web", "h2")} - codes == {"cold_only"}
    assert "cold_only" not in {each.code for each in cold_blockers(now, "web", "h2")}


@pytest.mark.req("R-48")
@pytest.mark.parametrize(
    ("state", "tsi", "mapped"),
    [
        ("preparing", "associated", False),
        ("running", "activated", True),
        ("paused", "activated", True),
        ("migrating", "activated", True),
        ("suspending", "activated", True),
        ("resuming", "activated", True),
        ("suspended", "associated", False),
        ("shutdown", "init", False),
        ("crashed", "associated", False),
    ],
)
def test_the_state_of_a_vm_is_the_state_of_its_interfaces(
    state: VmState, tsi: str, mapped: bool
) -> None:
    """Requirements 3.3: who is at rest hears nothing and is not to be heard."""
    view = VnView(cluster(state), BLUE)
    here, there = view.own("h1", "web"), view.intent("h2")
    assert [each.state for each in here] == ([] if tsi == "init" else [tsi])
    assert bool(there.remotes) is mapped


@pytest.mark.req("R-48")
@pytest.mark.parametrize(
    ("action", "allowed"),
    [
        ("start", {"shutdown", "crashed"}),
        ("pause", {"running"}),
        ("resume", {"paused", "suspended"}),
        ("suspend", {"running", "paused"}),
        (
            "stop",
            {"running", "paused", "suspended", "crashed", "preparing", "suspending", "resuming"},
        ),
    ],
)
def test_each_action_has_its_states(action: str, allowed: set[str]) -> None:
    states: tuple[VmState, ...] = (
        *("shutdown", "running", "paused", "suspended", "migrating", "crashed"),
        *("preparing", "suspending", "resuming", "blocked"),
    )
    found = {state for state in states if action_refused(cluster(state).vms["web"], action) is None}
    assert found == allowed


@pytest.mark.parametrize(
    ("ipv4", "ipv6", "codes"),
    [
        ("10.0.0.0/24", None, []),
        (None, "fd00::/64", []),
        ("10.0.0.0/30", "fd00::/126", []),
        (None, None, ["no_subnet"]),
        ("10.0.0.0/31", "fd00::/127", ["malformed", "malformed"]),
        ("10.0.0.1/24", None, ["malformed"]),
    ],
)
def test_a_routed_network_needs_a_subnet_with_room(
    ipv4: str | None, ipv6: str | None, codes: list[str]
) -> None:
    """Its subnets may overlap with those of other tenants: blue has the same here."""
    wish = msgspec.structs.replace(GREY, ipv4=ipv4, ipv6=ipv6)
    assert [each.code for each in network_blockers(cluster(), wish)] == codes


@pytest.mark.parametrize(
    ("given", "codes"),
    [
        ({"ipv4": "10.0.0.5"}, []),
        ({"ipv6": "fd00::5"}, []),
        ({"ipv4": "10.0.0.1"}, ["address_taken"]),
        ({"ipv4": "10.0.0.5", "ipv6": "fd00::1"}, ["address_taken"]),
        ({"ipv4": "10.0.0.5", "mac": GATEWAY_MAC}, ["address_taken"]),
        ({}, ["no_address"]),
    ],
)
def test_what_is_the_routers_is_no_tenants(given: dict[str, str], codes: list[str]) -> None:
    now = cluster()
    now.networks["grey"] = GREY
    face = Interface(network="grey", mac=given.get("mac", "02:00:00:00:00:09"))
    face = msgspec.structs.replace(face, ipv4=given.get("ipv4"), ipv6=given.get("ipv6"))
    assert [each.code for each in interface_blockers(now, "x", (face,))] == codes


def test_an_address_of_a_family_without_a_gateway_is_refused() -> None:
    now = cluster()
    now.networks["grey"] = msgspec.structs.replace(GREY, ipv6=None)
    face = Interface(network="grey", mac="02:00:00:00:00:09", ipv4="10.0.0.5", ipv6="fd00::5")
    assert [e.code for e in interface_blockers(now, "x", (face,))] == ["address_outside"]


@pytest.mark.req("R-08")
@pytest.mark.req("R-50")
def test_the_gateway_is_the_same_on_every_nve() -> None:
    now = cluster()
    now.networks["blue"] = msgspec.structs.replace(BLUE, kind="l3")
    view = VnView(now, now.networks["blue"])
    for host in ("h1", "h2"):
        assert view.intent(host).gateways == ("10.0.0.1/24", "fd00::1/64")
    assert VnView(cluster(), BLUE).intent("h1").gateways == ()


@pytest.mark.req("R-42")
def test_no_move_begins_while_a_peer_cannot_be_told() -> None:
    """Its tenants would send to the old host with the tunnel gone; a dead host sends nothing."""
    now = cluster()
    now.hosts["h4"] = msgspec.structs.replace(now.hosts["h3"], name="h4")

    def codes() -> set[str]:
        return {each.code for each in move_blockers(now, "web", "h4")}

    assert "peer_not_ready" not in codes()
    now.hosts["h2"] = msgspec.structs.replace(now.hosts["h2"], ready=False)
    assert "peer_not_ready" in codes()
    now.hosts["h2"] = msgspec.structs.replace(now.hosts["h2"], dead=True)
    assert "peer_not_ready" not in codes()
    now.hosts["h3"] = msgspec.structs.replace(now.hosts["h3"], ready=False)
    assert "peer_not_ready" not in codes(), "h3 has nothing in the VM's network"
