"""What each NVE is told, and what nobody is told who need not know."""

from __future__ import annotations

import pytest

from overland.model.cluster import Endpoint, Host, Interface, Network, Vm, VmState
from overland.nva.cluster import Cluster
from overland.nva.mapping import vn_intent, vn_intents
from overland.nva.rules import action_refused, network_blockers

BLUE = Network(name="blue", vni=42, ipv4="10.0.0.0/24", ipv6="fd00::/64")
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
    now = cluster()
    assert set(vn_intents(now, "h1")) == {"blue"}
    assert set(vn_intents(now, "h2")) == {"blue"}
    assert set(vn_intents(now, "h3")) == {"red"}


@pytest.mark.req("R-52")
@pytest.mark.parametrize(("network", "outer"), [(BLUE, "192.0.2.1"), (RED, "2001:db8::1")])
def test_inner_and_outer_family_are_independent(network: Network, outer: str) -> None:
    intent = vn_intent(cluster(), network, "h1")
    assert intent is not None
    assert intent.local == outer


@pytest.mark.req("R-48")
@pytest.mark.parametrize(
    ("state", "tsi", "mapped"),
    [
        ("preparing", "activated", True),
        ("running", "activated", True),
        ("paused", "activated", True),
        ("migrating", "activated", True),
        ("suspended", "associated", False),
        ("shutdown", "associated", False),
        ("crashed", "associated", False),
    ],
)
def test_the_state_of_a_vm_is_the_state_of_its_interfaces(
    state: VmState, tsi: str, mapped: bool
) -> None:
    """Requirements 3.3: who is at rest hears nothing and is not to be heard."""
    now = cluster(state)
    here, there = vn_intent(now, BLUE, "h1"), vn_intent(now, BLUE, "h2")
    assert here is not None
    assert there is not None
    assert [each.state for each in here.tsis] == [tsi]
    assert bool(there.remotes) is mapped


@pytest.mark.req("R-48")
@pytest.mark.parametrize(
    ("action", "allowed"),
    [
        ("start", {"shutdown", "crashed"}),
        ("pause", {"running"}),
        ("resume", {"paused", "suspended"}),
        ("suspend", {"running", "paused"}),
        ("stop", {"running", "paused", "suspended", "crashed", "preparing"}),
    ],
)
def test_each_action_has_its_states(action: str, allowed: set[str]) -> None:
    states: tuple[VmState, ...] = (
        *("shutdown", "running", "paused", "suspended", "migrating", "crashed"),
        *("preparing", "blocked"),
    )
    found = {state for state in states if action_refused(cluster(state).vms["web"], action) is None}
    assert found == allowed


@pytest.mark.req("R-08")
@pytest.mark.parametrize("kind", ["l3", "ila"])
def test_host_routes_are_refused_and_not_half_there(kind: str) -> None:
    """R-08: until L3 networks are built, asking for one is refused by name."""
    wish = Network(name="routed", vni=50, kind=kind)  # type: ignore[arg-type]
    assert "unsupported_kind" in {each.code for each in network_blockers(cluster(), wish)}
