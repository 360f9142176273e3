"""Networks of kind ila: what they need, who may have which identifier, and who is told."""

from __future__ import annotations

import msgspec
import pytest

from overland.model.cluster import Endpoint, Host, Interface, Network, Vm
from overland.model.ila import own_address
from overland.nva.cluster import Cluster
from overland.nva.gateways import chosen, gateway_blockers
from overland.nva.mapping import VnView
from overland.nva.rules import (
    completed,
    endpoint_blockers,
    interface_blockers,
    move_blockers,
    network_blockers,
)
from tests.core.test_gateway import LEG

JADE = Network(name="jade", vni=60, kind="ila", ipv6="2001:db8:100::/64")
ONYX = Network(name="onyx", vni=61, kind="ila", ipv6="2001:db8:200::/64")
WEB = "2001:db8:100:0:2000::5"


def cluster() -> Cluster:
    """jade: web on h1, p2 on h2; h3 has no locator."""
    found = Cluster()
    found.networks |= {"jade": JADE, "onyx": ONYX}
    for n in (1, 2, 3):
        found.hosts[f"h{n}"] = Host(
            name=f"h{n}",
            underlay_ipv6=f"fd00::{n}",
            locator=f"2001:db8:a:{n}::/64" if n < 3 else None,
            memory_total_mib=4096,
            accelerator="tcg",
            ready=True,
        )
    web = Interface(network="jade", mac="02:00:00:00:00:01", ipv6=WEB)
    found.vms["web"] = Vm(name="web", host="h1", state="running", interfaces=(web,))
    face = Interface(network="jade", mac="02:00:00:00:00:02", ipv6="2001:db8:100:0:2000::6")
    found.endpoints["p2"] = Endpoint(name="p2", host="h2", namespace="p2", interface=face)
    return found


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({}, []),
        ({"mtu": 1500}, []),
        ({"mtu": 1501}, ["mtu_too_small", "mtu_too_small"]),
        ({"ipv6": None}, ["no_subnet"]),
        ({"ipv6": "2001:db8:300::/48"}, ["malformed"]),
        ({"ipv4": "10.0.0.0/24"}, ["ipv6_only"]),
        ({"ipv6": "2001:db8:100::/64"}, ["subnet_taken"]),
        ({"ipv6": "2001:db8:a:2::/64"}, ["subnet_taken"]),
    ],
)
def test_a_network_is_a_prefix_of_its_own_and_costs_no_header(
    changes: dict[str, str], codes: list[str]
) -> None:
    """A host without a locator has no part in it, so its MTU is nobody's concern."""
    wish = Network(name="opal", vni=62, kind="ila", ipv6="2001:db8:300::/64")
    wish = msgspec.structs.replace(wish, **changes)
    assert [each.code for each in network_blockers(cluster(), wish)] == codes


@pytest.mark.parametrize(
    ("network", "address", "codes"),
    [
        ("jade", "2001:db8:100:0:2000::7", []),
        ("jade", "2001:db8:100::7", ["bad_identifier"]),
        ("jade", "2001:db8:100:0:3000::7", ["bad_identifier"]),
        ("jade", "2001:db8:100:0:2000::", ["bad_identifier"]),
        ("jade", "2001:db8:100:0:2000::ffff", ["bad_identifier"]),
        ("jade", WEB, ["address_taken"]),
        ("onyx", "2001:db8:200:0:2000::5", ["address_taken"]),
        ("onyx", "2001:db8:100:0:2000::9", ["address_outside"]),
        ("jade", "2001:db8:100::1", ["address_taken", "bad_identifier"]),
    ],
)
def test_an_identifier_comes_back_from_the_wire_and_is_given_out_once(
    network: str, address: str, codes: list[str]
) -> None:
    face = Interface(network=network, mac="02:00:00:00:00:09", ipv6=address)
    found = interface_blockers(cluster(), "new", (face,))
    assert [each.code for each in found] == codes


def test_who_names_no_address_gets_an_identifier_that_nobody_has() -> None:
    now = cluster()
    given = [completed(now, "a", 0, Interface(network=n, mac="")).ipv6 for n in ("jade", "onyx")]
    assert given == ["2001:db8:100:0:2000::1", "2001:db8:200:0:2000::1"]
    now.networks["onyx"] = ONYX
    now.vms["web"] = msgspec.structs.replace(
        now.vms["web"],
        interfaces=(Interface(network="jade", mac="02:00:00:00:00:01", ipv6=given[0]),),
    )
    assert completed(now, "a", 0, Interface(network="onyx", mac="")).ipv6 == (
        "2001:db8:200:0:2000::2"
    )


def test_an_address_is_kept_as_kernels_write_it() -> None:
    """Else what is read back would never be what is wanted."""
    wish = Interface(network="jade", mac="", ipv6="2001:DB8:100:0:2000:0:0:07")
    assert completed(cluster(), "a", 0, wish).ipv6 == "2001:db8:100:0:2000::7"
    nonsense = Interface(network="jade", mac="", ipv6="here")
    assert completed(cluster(), "a", 0, nonsense).ipv6 == "here"


def test_an_nve_is_known_by_its_address_in_its_locator() -> None:
    view = VnView(cluster(), JADE)
    told = view.intent("h1")
    assert told.ila
    assert told.local == own_address("2001:db8:a:1::/64") == "2001:db8:a:1::1"
    assert told.members == ("2001:db8:a:2::1",)
    assert [each.nve for each in told.remotes] == ["2001:db8:a:2::1"]
    assert told.gateways == ("2001:db8:100::1/64",)


@pytest.mark.req("R-20")
def test_a_host_without_a_locator_is_refused_by_name() -> None:
    """R-20: the node on the path is checked before anything moves."""
    now = cluster()
    found = [each.why for each in move_blockers(now, "web", "h3")]
    assert any("host h3 has no locator" in why for why in found)
    assert not any("locator" in each.why for each in move_blockers(now, "web", "h2"))
    face = Interface(network="jade", mac="02:00:00:00:00:09", ipv6="2001:db8:100:0:2000::9")
    wish = Endpoint(name="p3", host="h3", namespace="p3", interface=face)
    assert [each.code for each in endpoint_blockers(now, wish)] == ["no_locator"]


def test_a_gateway_to_the_outside_is_refused() -> None:
    """It would need the destination twice: the outside's, and the gateway's own."""
    now = cluster()
    found = gateway_blockers(now, chosen(now, "jade", "h1", LEG))
    assert "not_routed" in [each.code for each in found]
