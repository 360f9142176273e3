"""Which routed VNs may talk with each other, who is told, and who takes part in a move (N-15)."""

from __future__ import annotations

import msgspec
import pytest

from overland.model.cluster import Endpoint, Host, Interface, Leg, Network, Policy, Vm
from overland.nva.cluster import Cluster
from overland.nva.gateways import chosen, gateway_blockers
from overland.nva.mapping import VnView
from overland.nva.policy import allow_blockers, known_blockers, pair
from overland.nva.rules import move_blockers, network_in_use
from tests.core.moves import planned

RED = Network(name="red", vni=77, kind="l3", ipv4="10.42.0.0/24", ipv6="fd42::/64")
BROWN = Network(name="brown", vni=78, kind="l3", ipv4="10.43.0.0/24", ipv6="fd43::/64")
GREEN = Network(name="green", vni=79, kind="l3", ipv4="10.44.0.0/24")


def cluster(*allowed: tuple[str, str]) -> Cluster:
    """red: web on h1; brown: b2 on h2; green: g3 on h3; h4 has no tenant."""
    found = Cluster()
    found.networks |= {each.name: each for each in (RED, BROWN, GREEN)}
    for n in (1, 2, 3, 4):
        found.hosts[f"h{n}"] = Host(
            name=f"h{n}",
            underlay_ipv4=f"203.0.113.{n}",
            memory_total_mib=4096,
            accelerator="tcg",
            ready=True,
        )
    web = Interface(network="red", mac="02:00:00:00:00:01", ipv4="10.42.0.50", ipv6="fd42::50")
    found.vms["web"] = Vm(name="web", host="h1", state="running", interfaces=(web,))
    for name, host, network in (("b2", "h2", "brown"), ("g3", "h3", "green")):
        face = Interface(network=network, mac=f"02:00:00:00:01:0{host[1]}")
        found.endpoints[name] = Endpoint(name=name, host=host, namespace=name, interface=face)
    for one, other in allowed:
        policy = pair(one, other, 1)
        found.policies[policy.key] = policy
    return found


def codes(now: Cluster, one: str = "red", other: str = "brown") -> list[str]:
    return [each.code for each in allow_blockers(now, pair(one, other, 1))]


def test_a_pair_is_one_whichever_is_named_first() -> None:
    assert pair("red", "brown", 1) == pair("brown", "red", 1)
    assert pair("red", "brown", 1).networks == ("brown", "red")
    made = pair("red", "brown", 5)
    assert msgspec.json.decode(msgspec.json.encode(made), type=Policy) == made


@pytest.mark.req("N-15")
def test_the_default_is_that_nobody_hears_of_another_network() -> None:
    now = cluster()
    assert now.places("red") == {"h1"}
    assert VnView(now, RED).intent("h1").allowed == ()


@pytest.mark.req("N-15")
@pytest.mark.req("R-44")
def test_hosts_of_both_networks_have_both_and_of_a_third_neither() -> None:
    """R-44: only those whose tenants may talk are told. It does not go on from pair to pair."""
    now = cluster(("red", "brown"), ("brown", "green"))
    assert now.places("red") == {"h1", "h2"}
    assert now.places("brown") == {"h1", "h2", "h3"}
    assert now.near({"red"}) == {"red", "brown"}
    assert VnView(now, RED).intent("h2").allowed == (78,)
    assert VnView(now, BROWN).intent("h1").allowed == (77, 79)
    assert [each.mac for each in VnView(now, RED).intent("h2").remotes] == ["02:00:00:00:00:01"]


def test_a_change_of_policy_is_told_as_a_whole() -> None:
    before, after = VnView(cluster(), RED), VnView(cluster(("red", "brown")), RED)
    assert after.change("h1", before) is None
    assert before.change("h1", after) is None
    assert after.change("h1", after) is not None


@pytest.mark.req("N-15")
def test_who_may_talk_with_the_vm_is_a_peer_of_its_move_also_when_denied_meanwhile() -> None:
    """A peer whose NVE is away blocks the move; one that was denied in it keeps its part in it."""
    now = cluster(("red", "brown"))
    assert "peer_not_ready" not in {each.code for each in move_blockers(now, "web", "h3")}
    now.hosts["h2"] = msgspec.structs.replace(now.hosts["h2"], ready=False)
    deaf = [each for each in move_blockers(now, "web", "h3") if each.code == "peer_not_ready"]
    assert [each.what for each in deaf] == ["host h2"]
    move = planned()
    port = msgspec.structs.replace(move.ports[0], network="red")
    now.moves[move.id] = msgspec.structs.replace(
        move, ports=(port,), old_nve="h1", new_nve="h3", peers=("h2",)
    )
    assert now.places("brown") == {"h1", "h2", "h3"}, "the new host needs the way already"
    now.policies.clear()
    assert now.places("red") == {"h1", "h2", "h3"}
    assert VnView(now, RED).intent("h2").allowed == ()
    now.moves.clear()
    assert now.places("red") == {"h1"}


def test_a_new_host_must_be_able_to_carry_both() -> None:
    now = cluster(("red", "brown"))
    now.networks["brown"] = msgspec.structs.replace(BROWN, underlay="ipv6")
    found = [each for each in move_blockers(now, "web", "h3") if each.code == "peer_not_covered"]
    assert [each.why for each in found] == [
        "its peer b2 (02:00:00:00:01:02) would lose it: host h2 has no ipv6 underlay address",
        "its peers in network brown would lose it: host h3 has no ipv6 underlay address",
    ]


@pytest.mark.req("N-15")
def test_overlapping_subnets_are_refused_also_those_of_a_third() -> None:
    """An address must name one tenant in each router."""
    now = cluster()
    assert codes(now) == []
    now.networks["brown"] = msgspec.structs.replace(BROWN, ipv4="10.42.0.128/25")
    (refusal,) = allow_blockers(now, pair("red", "brown", 1))
    assert refusal.code == "overlap"
    assert "10.42.0.128/25" in refusal.why
    assert "10.42.0.0/24" in refusal.why
    now = cluster(("brown", "green"))
    now.networks["green"] = msgspec.structs.replace(GREEN, ipv4="10.42.0.0/16")
    assert codes(now) == ["overlap"], "brown's router would have both"


def test_an_outside_must_not_look_like_the_other_network() -> None:
    """Whichever came first, the policy or the gateway."""
    leg = Leg(bridge="out0", ipv4="10.43.0.9/24", via_ipv4="10.43.0.1")
    now = cluster()
    made = chosen(now, "red", "h3", leg)
    now.gateways[made.key] = made
    assert codes(now) == ["overlap"]
    now = cluster(("red", "brown"))
    assert [e.code for e in gateway_blockers(now, chosen(now, "red", "h3", leg))] == ["overlap"]


def test_what_cannot_be_joined_is_refused_with_every_reason() -> None:
    now = cluster()
    assert codes(now, "red", "red") == ["same_network"]
    assert codes(now, "red", "grey") == ["unknown_network"]
    assert [e.code for e in known_blockers(now, pair("grey", "grey", 1))] == [
        "unknown_network",
        "unknown_network",
        "same_network",
    ]
    now.networks["brown"] = msgspec.structs.replace(BROWN, kind="l2", ipv4=None)
    now.networks["red"] = msgspec.structs.replace(RED, ipv6=None, underlay="ipv6")
    assert set(codes(now)) == {"not_routed", "no_common_family", "no_underlay"}


def test_a_network_is_not_deleted_under_a_policy() -> None:
    now = cluster(("red", "brown"))
    now.vms.clear()
    (refusal,) = network_in_use(now, "red")
    assert (refusal.code, refusal.hint) == ("in_use", "`overland network deny brown red`")
