"""The way out of a routed VN: who may have one, and who is told."""

from __future__ import annotations

import msgspec
import pytest

from overland.model.cluster import Gateway, Host, Interface, Leg, Network, Vm
from overland.model.names import GATEWAY_MAC
from overland.nva.cluster import Cluster
from overland.nva.gateways import chosen, gateway_blockers, removal_blockers
from overland.nva.mapping import VnView
from overland.nva.rules import move_blockers, network_in_use
from tests.core.moves import planned

RED = Network(name="red", vni=77, kind="l3", ipv4="10.42.0.0/24", ipv6="fd42::/64")
LEG = Leg(
    bridge="out0",
    ipv4="192.0.2.2/24",
    via_ipv4="192.0.2.1",
    ipv6="2001:db8:2::2/64",
    via_ipv6="2001:db8:2::1",
)


def cluster() -> Cluster:
    """Routed red with web on h1; h3 has no tenant."""
    found = Cluster()
    found.networks["red"] = RED
    for n in (1, 2, 3):
        found.hosts[f"h{n}"] = Host(
            name=f"h{n}",
            underlay_ipv4=f"203.0.113.{n}",
            memory_total_mib=4096,
            accelerator="tcg",
            ready=True,
        )
    web = Interface(network="red", mac="02:00:00:00:00:01", ipv4="10.42.0.50", ipv6="fd42::50")
    found.vms["web"] = Vm(name="web", host="h1", state="running", interfaces=(web,))
    return found


def codes(now: Cluster, network: str = "red", host: str = "h3", leg: Leg = LEG) -> list[str]:
    return [each.code for each in gateway_blockers(now, chosen(now, network, host, leg))]


def other(leg: Leg = LEG, **changes: str | None) -> Leg:
    return msgspec.structs.replace(leg, **changes)


@pytest.mark.req("R-19")
def test_a_gateway_is_a_tenant_with_a_leg() -> None:
    """It has addresses of the VN, and MAC addresses that no router and no other gateway has."""
    now = cluster()
    made = chosen(now, "red", "h3", LEG)
    assert (made.interface.ipv4, made.interface.ipv6) == ("10.42.0.2", "fd42::2")
    elsewhere = chosen(now, "red", "h2", LEG)
    macs = {made.interface.mac, made.leg.mac, elsewhere.interface.mac, elsewhere.leg.mac}
    assert len(macs | {GATEWAY_MAC}) == 5
    assert all(int(mac[:2], 16) & 3 == 2 for mac in macs), "locally administered, unicast"
    assert chosen(now, "red", "h3", LEG) == made
    assert codes(now) == []


@pytest.mark.parametrize(
    ("leg", "expected"),
    [
        (LEG, []),
        (other(ipv6=None, via_ipv6=None), []),
        (other(ipv4=None, via_ipv4=None, ipv6=None, via_ipv6=None), ["no_address"]),
        (other(via_ipv4=None), ["malformed"]),
        (other(ipv6=None), ["malformed"]),
        (other(ipv4="192.0.2.300/24"), ["malformed"]),
        (other(ipv4="2001:db8:2::3/64"), ["malformed"]),
        (other(via_ipv4="192.0.3.1"), ["malformed"]),
        (other(via_ipv4="192.0.2.2"), ["malformed"]),
        (other(ipv4="10.42.0.9/16", via_ipv4="10.42.1.1"), ["overlap"]),
        (other(bridge=""), ["malformed"]),
    ],
)
def test_a_leg_stands_in_a_subnet_outside_beside_its_next_router(
    leg: Leg, expected: list[str]
) -> None:
    assert codes(cluster(), leg=leg) == expected


def test_unknown_places_and_other_kinds_are_refused() -> None:
    now = cluster()
    assert codes(now, host="h9") == ["unknown_host"]
    assert codes(now, network="blue") == ["unknown_network"]
    now.networks["blue"] = Network(name="blue", vni=42, ipv4="10.0.0.0/24", ipv6="fd00::/64")
    assert codes(now, network="blue") == ["not_routed"]
    now.networks["red"] = msgspec.structs.replace(RED, ipv6=None)
    assert codes(now) == ["no_subnet"]
    now.hosts["h3"] = msgspec.structs.replace(now.hosts["h3"], ready=False)
    assert codes(now, leg=other(ipv6=None, via_ipv6=None)) == ["host_not_ready"]


def test_a_network_has_one_gateway_and_is_not_deleted_under_it() -> None:
    now = with_gateway()
    (refusal,) = gateway_blockers(now, chosen(now, "red", "h2", LEG))
    assert (refusal.code, refusal.hint) == ("exists", "`overland network gateway remove red` first")
    now.vms.clear()
    (refusal,) = network_in_use(now, "red")
    assert refusal.hint == "`overland network gateway remove red`"
    assert list(removal_blockers(now, "red")) == []
    assert [each.code for each in removal_blockers(now, "blue")] == ["unknown_gateway"]


def test_outside_must_be_able_to_tell_two_networks_apart() -> None:
    """By the gateway's address, and by the tenants' ones where the outside is the same."""
    now = with_gateway()
    rival = msgspec.structs.replace(RED, name="rival", vni=78, ipv6=None)
    amber = msgspec.structs.replace(RED, name="amber", vni=79, ipv4="10.99.0.0/24", ipv6=None)
    now.networks |= {"rival": rival, "amber": amber}
    leg = other(ipv4="192.0.2.3/24", ipv6=None, via_ipv6=None)
    assert codes(now, "amber", leg=leg) == []
    assert codes(now, "amber", leg=other(leg, ipv4="192.0.2.2/24")) == ["address_taken"]
    assert codes(now, "rival", leg=leg) == ["overlap"]
    elsewhere = other(leg, ipv4="198.51.100.2/24", via_ipv4="198.51.100.1")
    assert codes(now, "rival", leg=elsewhere) == []


def with_gateway() -> Cluster:
    now = cluster()
    now.gateways["red"] = chosen(now, "red", "h3", LEG)
    return now


@pytest.mark.req("R-19")
@pytest.mark.req("R-44")
def test_the_gateways_nve_is_told_of_moves_without_a_tenant_of_its_own() -> None:
    """R-19: it holds the mapping like any peer; R-44: without a gateway h3 hears nothing."""
    assert cluster().places("red") == {"h1"}
    now = with_gateway()
    assert now.places("red") == {"h1", "h3"}
    view = VnView(now, RED)
    (here,) = view.intent("h3").tsis
    assert (here.kind, here.leg) == ("gateway", now.gateways["red"].leg)
    assert [each.mac for each in view.intent("h3").remotes] == ["02:00:00:00:00:01"]
    (there,) = view.intent("h1").remotes
    assert (there.mac, there.nve, there.outside) == (here.mac, "203.0.113.3", ("ipv4", "ipv6"))


@pytest.mark.req("R-19")
def test_no_move_begins_while_the_gateway_cannot_be_told() -> None:
    now = with_gateway()

    def found() -> set[str]:
        return {each.code for each in move_blockers(now, "web", "h2")}

    assert "peer_not_ready" not in found()
    now.hosts["h3"] = msgspec.structs.replace(now.hosts["h3"], ready=False)
    assert "peer_not_ready" in found()


def test_a_move_never_changes_the_gateway_and_none_goes_under_it() -> None:
    """6-14: wherever the VM is, the way out is the same one."""
    now = with_gateway()
    seen = set()
    for host in ("h1", "h2", "h3"):
        now.vms["web"] = msgspec.structs.replace(now.vms["web"], host=host)
        (way,) = (each for each in now.tsis() if each.kind == "gateway")
        seen.add((way.host, way.interface))
    assert len(seen) == 1
    move = planned()
    port = msgspec.structs.replace(move.ports[0], network="red")
    now.moves[move.id] = msgspec.structs.replace(move, ports=(port,))
    assert [each.code for each in removal_blockers(now, "red")] == ["move_in_progress"]


def test_what_was_stored_is_what_is_read() -> None:
    made = with_gateway().gateways["red"]
    assert msgspec.json.decode(msgspec.json.encode(made), type=Gateway) == made
