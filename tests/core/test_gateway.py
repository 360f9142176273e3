"""The ways out of a routed VN: who may have one, who is told, and who goes out by which."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from overland.model.cluster import Endpoint, Gateway, Host, Interface, Leg, Network, Vm
from overland.model.names import GATEWAY_MAC
from overland.nva.authority import Authority, Blocked
from overland.nva.cluster import Cluster
from overland.nva.gateways import chosen, gateway_blockers, removal_blockers
from overland.nva.mapping import VnView
from overland.nva.rules import move_blockers, network_in_use
from overland.ports import Delete, Expect, Put, StoreFailure
from overland.store.memory import MemoryStore
from tests.core.moves import planned

RED = Network(name="red", vni=77, kind="l3", ipv4="10.42.0.0/24", ipv6="fd42::/64", mtu=1400)
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


def test_a_network_has_one_gateway_on_a_host_and_is_not_deleted_under_it() -> None:
    now, remove = with_gateway(), "`overland network gateway remove red --host h3`"
    leg = other(ipv4="192.0.2.3/24", ipv6="2001:db8:2::3/64")
    (refusal,) = gateway_blockers(now, chosen(now, "red", "h3", leg))
    assert (refusal.code, refusal.hint) == ("exists", f"{remove} first")
    assert codes(now, host="h2") == ["address_taken", "address_taken"]
    assert codes(now, host="h2", leg=leg) == []
    now.vms.clear()
    (refusal,) = network_in_use(now, "red")
    assert refusal.hint == remove
    assert list(removal_blockers(now, "red", "h3")) == []
    assert [each.code for each in removal_blockers(now, "red", "h2")] == ["unknown_gateway"]
    assert [each.code for each in removal_blockers(now, "blue", "h3")] == ["unknown_gateway"]


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
    made = chosen(now, "red", "h3", LEG)
    now.gateways[made.key] = made
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
    assert (here.kind, here.leg) == ("gateway", now.gateways["red/h3"].leg)
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
    assert [each.code for each in removal_blockers(now, "red", "h3")] == ["move_in_progress"]


def test_what_was_stored_is_what_is_read() -> None:
    made = with_gateway().gateways["red/h3"]
    assert msgspec.json.decode(msgspec.json.encode(made), type=Gateway) == made


# ------------------------------------------------------------ several


SECOND = other(ipv4="192.0.2.3/24", ipv6="2001:db8:2::3/64")
NAMES = [f"p{n}" for n in range(1, 41)]


async def domain(store: MemoryStore, tenants: int = len(NAMES)) -> Authority:
    """Routed red with many endpoints and no gateway."""
    authority = Authority(store, lambda _: None)
    await authority.load()
    authority.cluster.networks |= cluster().networks
    authority.cluster.hosts |= cluster().hosts
    for name in NAMES[:tenants]:
        face = Interface(network="red", mac="")
        await authority.create_endpoint(
            Endpoint(name=name, host="h1", namespace=name, interface=face)
        )
    return authority


def used(authority: Authority) -> dict[str, str]:
    """Each tenant's gateway, the same one in both families."""
    found = authority.gateway_tenants("red")
    assert all(each["ipv4"] == each["ipv6"] for each in found)
    return {str(each["tenant"]): str(each["ipv4"]) for each in found}


def users(authority: Authority, host: str) -> set[str]:
    return {name for name, at in used(authority).items() if at == host}


async def died(authority: Authority, host: str, *, dead: bool = True) -> None:
    authority.host_changed(host, dead=dead, ready=not dead)
    await authority.keep_host(host)


@pytest.mark.req("R-19")
async def test_a_second_gateway_takes_nobody_from_the_first_and_its_share_of_who_comes() -> None:
    authority = await domain(MemoryStore(), tenants=20)
    await authority.create_gateway("red", "h3", LEG)
    assert users(authority, "h3") == set(NAMES[:20])
    await authority.create_gateway("red", "h2", SECOND)
    assert users(authority, "h3") == set(NAMES[:20])
    for name in NAMES[20:]:
        face = Interface(network="red", mac="")
        await authority.create_endpoint(
            Endpoint(name=name, host="h1", namespace=name, interface=face)
        )
    assert users(authority, "h3") > set(NAMES[:20])
    assert users(authority, "h2")
    await authority.spread_gateways("red")
    assert 10 < len(users(authority, "h2")) < 30, "evenly, as chance has it"


async def test_a_move_is_no_reason_to_change_the_gateway() -> None:
    """6-14: the tenant is told of the same address in the VN at each of its hosts."""
    authority = await domain(MemoryStore())
    await authority.create_gateway("red", "h3", LEG)
    await authority.create_gateway("red", "h2", SECOND)
    await authority.spread_gateways("red")
    now, seen = authority.cluster, set()
    now.vms |= cluster().vms
    for host in ("h1", "h2", "h3"):
        now.vms["web"] = msgspec.structs.replace(now.vms["web"], host=host)
        tsis = VnView(now, RED).intent(host).tsis
        seen |= {tsi.ways_out for tsi in tsis if tsi.owner == "web"}
    ((ipv4, ipv6),) = seen
    inside = now.gateways[f"red/{used(authority)['web']}"].interface
    assert (ipv4, ipv6) == (inside.ipv4, inside.ipv6)


@pytest.mark.parametrize("how", ["removed", "dead"])
async def test_who_loses_his_gateway_takes_another_and_stays_there(how: str) -> None:
    """Nobody else changes; and a host that is back, or a gateway made again, takes nobody back."""
    authority = await domain(MemoryStore())
    for host, leg in (("h1", other(ipv4="192.0.2.9/24", ipv6=None, via_ipv6=None)), ("h3", LEG)):
        await authority.create_gateway("red", host, leg)
    await authority.delete_gateway("red", "h1")
    await authority.create_gateway("red", "h2", SECOND)
    await authority.spread_gateways("red")
    before = used(authority)
    lost = users(authority, "h2")
    assert lost
    if how == "dead":
        await died(authority, "h2")
    else:
        await authority.delete_gateway("red", "h2")
    assert users(authority, "h3") == set(before)
    if how == "dead":
        await died(authority, "h2", dead=False)
    else:
        await authority.create_gateway("red", "h2", SECOND)
    assert users(authority, "h3") == set(before)
    await authority.spread_gateways("red")
    assert used(authority) == before


async def test_a_gateway_is_left_by_all_before_it_is_taken_away() -> None:
    """Until then it takes what is on its way. The last one is left by nobody."""
    authority = await domain(MemoryStore())
    await authority.create_gateway("red", "h3", LEG)
    await authority.create_gateway("red", "h2", SECOND)
    await authority.spread_gateways("red")
    before = VnView(authority.cluster, RED)
    await authority.leave_gateway("red", "h2")
    assert users(authority, "h3") == set(NAMES)
    assert len(authority.cluster.gateways) == 2
    after = VnView(authority.cluster, RED)
    assert not after.same_tenants("h1", before), "it has to be waited for"
    assert after.same_tenants("h2", before), "it has no tenant, and is told nothing"
    await authority.keep_host("h1")  # it is there, so whoever comes now may choose it
    assert users(authority, "h3") == set(NAMES)
    await authority.delete_gateway("red", "h2")
    await authority.leave_gateway("red", "h3")
    assert users(authority, "h3") == set(NAMES)
    with pytest.raises(Blocked):
        await authority.leave_gateway("red", "h2")


async def test_a_host_whose_nve_is_away_keeps_its_tenants() -> None:
    """ADR 0011: its kernel forwards as it was told last."""
    authority = await domain(MemoryStore())
    await authority.create_gateway("red", "h3", LEG)
    await authority.create_gateway("red", "h2", SECOND)
    await authority.spread_gateways("red")
    before = used(authority)
    authority.host_changed("h2", ready=False)
    await authority.keep_host("h2")
    assert used(authority) == before


async def test_when_all_are_dead_nobody_changes() -> None:
    """There is nobody to go to; the first that is back takes all."""
    authority = await domain(MemoryStore())
    await authority.create_gateway("red", "h3", LEG)
    await authority.create_gateway("red", "h2", SECOND)
    await died(authority, "h2")
    before = used(authority)
    await died(authority, "h3")
    assert used(authority).keys() == before.keys()
    await died(authority, "h2", dead=False)
    assert users(authority, "h2") == set(before)


async def test_an_operator_may_give_a_tenant_another_gateway() -> None:
    """Which he keeps; not one that is not there, nor is dead, nor to somebody who is not there."""
    authority = await domain(MemoryStore())
    await authority.create_gateway("red", "h3", LEG)
    await authority.create_gateway("red", "h2", SECOND)
    await authority.assign_gateway("red", "h2", ("p1", "p2"))
    assert users(authority, "h2") == {"p1", "p2"}
    with pytest.raises(Blocked) as refused:
        await authority.assign_gateway("red", "h1", ("p1", "nil"))
    assert [e.code for e in refused.value.refusals] == ["unknown_gateway", "unknown_tenant"]
    await died(authority, "h2")
    with pytest.raises(Blocked) as refused:
        await authority.assign_gateway("red", "h2", ("p1",))
    assert [e.code for e in refused.value.refusals] == ["host_dead"]
    for wish in (authority.spread_gateways("blue"), authority.delete_gateway("blue", "h3")):
        with pytest.raises(Blocked) as refused:
            await wish
        assert [e.code for e in refused.value.refusals] == ["unknown_gateway"]


async def test_a_family_is_left_by_the_gateways_that_have_it() -> None:
    authority = await domain(MemoryStore())
    await authority.create_gateway("red", "h3", LEG)
    only4 = other(SECOND, ipv6=None, via_ipv6=None)
    await authority.create_gateway("red", "h2", only4)
    await authority.assign_gateway("red", "h2", ("p1",))
    (p1,) = (each for each in authority.gateway_tenants("red") if each["tenant"] == "p1")
    assert p1 == {"tenant": "p1", "ipv4": "h2", "ipv6": "h3"}
    view = VnView(authority.cluster, RED).intent("h1")
    (tsi,) = (each for each in view.tsis if each.owner == "p1")
    faces = [authority.cluster.gateways[f"red/{host}"].interface for host in ("h2", "h3")]
    assert tsi.ways_out == (faces[0].ipv4, faces[1].ipv6)


@pytest.mark.parametrize("forgets", [True, False])
async def test_a_restarted_nva_knows_who_goes_out_by_which(forgets: bool) -> None:
    """Also when it went down after a host had died and before that was written."""
    store = MemoryStore()
    authority = await domain(store)
    await authority.create_gateway("red", "h3", LEG)
    await authority.create_gateway("red", "h2", SECOND)
    await authority.assign_gateway("red", "h2", ("p1", "p2"))
    before = used(authority)
    if not forgets:
        await died(authority, "h2")
    heir = Authority(store, lambda _: None)
    await heir.load()
    heir.cluster.networks |= cluster().networks
    assert used(heir) == (before if forgets else dict.fromkeys(before, "h3"))
    heir.cluster.hosts |= cluster().hosts
    await died(heir, "h2")
    assert users(heir, "h3") == set(before)


class Full(MemoryStore):
    """A store that can be full."""

    full = False

    async def commit(self, expects: Sequence[Expect], writes: Sequence[Put | Delete]) -> int:
        if self.full:
            raise StoreFailure("no space left")
        return await super().commit(expects, writes)


async def test_with_a_full_store_everybody_stays_where_the_records_have_him() -> None:
    """What could not be written is not so, and is found again with the next news of any host."""
    store = Full()
    authority = await domain(store)
    await authority.create_gateway("red", "h3", LEG)
    await authority.create_gateway("red", "h2", SECOND)
    await authority.spread_gateways("red")
    before = used(authority)
    store.full = True
    for wish in (
        died(authority, "h2"),
        authority.delete_gateway("red", "h3"),
        authority.assign_gateway("red", "h3", tuple(NAMES)),
        authority.spread_gateways("red"),
    ):
        with pytest.raises(StoreFailure):
            await wish
        assert used(authority) == before
        assert len(authority.cluster.gateways) == 2
    store.full = False
    await authority.keep_host("h1")
    assert users(authority, "h3") == set(before)


async def test_nothing_is_left_of_tenants_and_gateways_that_are_gone() -> None:
    """One that comes later under the same name is another."""
    store = MemoryStore()
    authority = await domain(store)
    await authority.create_gateway("red", "h3", LEG)
    await authority.create_gateway("red", "h2", SECOND)
    kept = authority.cluster.ways_out["red/ipv4"].kept
    gone = next(iter(kept))
    await authority.delete_endpoint(gone)
    assert gone not in authority.cluster.ways_out["red/ipv4"].kept
    assert gone not in authority.cluster.ways_out["red/ipv6"].kept
    await authority.delete_gateway("red", "h3")
    await authority.delete_gateway("red", "h2")
    assert authority.cluster.ways_out == {}
    for prefix in ("way_out/", "gateway/"):
        assert (await store.list(prefix))[0] == []


async def test_a_record_from_before_there_could_be_several_is_understood() -> None:
    store = MemoryStore()
    made = with_gateway().gateways["red/h3"]
    put = Put(key="gateway/red", value=msgspec.json.encode(made))
    await store.commit([Expect(key="gateway/red", revision=0)], [put])
    authority = await domain(store)
    assert authority.cluster.gateways == {"red/h3": made}
    assert [each.key for each in (await store.list("gateway/"))[0]] == ["gateway/red/h3"]
    await authority.keep_host("h3")
    assert set(used(authority).values()) == {"h3"}
