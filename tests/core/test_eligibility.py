"""Who may be moved, who knows that, and what stands against it (R-19, R-20, R-23 to R-28, R-62)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

from overland.api.rest import DeclareWish
from overland.config import NvaConfig
from overland.model.cluster import (
    Endpoint,
    Gateway,
    Host,
    Interface,
    Leg,
    Network,
    Refused,
    Vm,
    VmState,
)
from overland.model.eligibility import Declaration, Eligibility, Registration, Signed, Statement
from overland.model.forecast import Forecast
from overland.model.handover import Options
from overland.model.receipt import receipt
from overland.nva.authority import Authority, Blocked
from overland.nva.cluster import Cluster
from overland.nva.eligibility import FRESH_S, kept_by, statement_blockers
from overland.nva.placement import drain_plan
from overland.nva.policy import pair
from overland.nva.rules import cold_blockers, move_blockers, warm_blockers
from overland.nva.ways_out import all_settled
from overland.store.memory import MemoryStore
from overland.wire import tls
from overland.wire.seal import Forged, Sealer, opened, stated
from tests.core.test_ticket import TICKET

Kind = Literal["l2", "l3"]
FAR = "198.51.100.1"
S = 10**9
NOW_NS = 10**18
SIGNED = Signed(statement=b"", signature=b"", certificate=b"")


def cluster(kind: Kind = "l2", state: VmState = "running") -> Cluster:
    """web, owned by alice, in red on h1; p3 in red on h3; nothing of red on h2."""
    found = Cluster()
    found.networks["red"] = Network(
        name="red", vni=77, kind=kind, ipv4="10.42.0.0/24", ipv6="fd42::/64"
    )
    for n in (1, 2, 3):
        found.hosts[f"h{n}"] = Host(
            name=f"h{n}",
            underlay_ipv4=f"203.0.113.{n}",
            underlay_mtu=9000,
            memory_total_mib=4096,
            accelerator="tcg",
            ready=True,
        )
    web = Interface(network="red", mac="02:00:00:00:00:01", ipv4="10.42.0.50", ipv6="fd42::50")
    found.vms["web"] = Vm(name="web", owner="alice", host="h1", state=state, interfaces=(web,))
    p3 = Interface(network="red", mac="02:00:00:00:01:03", ipv4="10.42.0.3")
    found.endpoints["p3"] = Endpoint(name="p3", host="h3", namespace="p3", interface=p3)
    return found


def says(now: Cluster, **what: Any) -> None:
    known = now.eligibilities.get("web", Eligibility(vm="web"))
    declaration = msgspec.structs.replace(known.declaration, **what)
    now.eligibilities["web"] = msgspec.structs.replace(known, declaration=declaration)


def registered(now: Cluster) -> None:
    known = now.eligibilities.get("web", Eligibility(vm="web"))
    registration = Registration(origin="owner:alice", at_ns=5 * S, signed=SIGNED)
    now.eligibilities["web"] = msgspec.structs.replace(known, registration=registration)


def codes(now: Cluster, to: str = "h2") -> list[str]:
    return [each.code for each in move_blockers(now, "web", to)]


def whys(now: Cluster, code: str) -> list[str]:
    return [each.why for each in move_blockers(now, "web", "h2") if each.code == code]


def without_underlay(now: Cluster, host: str) -> None:
    now.hosts[host] = msgspec.structs.replace(now.hosts[host], underlay_ipv4=None)


# ------------------------------------------------------------ what is covered


@pytest.mark.req("R-23")
@pytest.mark.req("R-26")
@pytest.mark.parametrize("kind", ["l2", "l3"])
def test_what_an_abstraction_covers_may_move_whoever_owns_it(kind: Kind) -> None:
    """R-23: nobody has to know its applications: neither kind of VN changes what they see."""
    assert codes(cluster(kind)) == []


@pytest.mark.req("R-26")
@pytest.mark.parametrize("kind", ["l2", "l3"])
@pytest.mark.parametrize("end", ["h1", "h2"])
def test_an_address_that_is_not_covered_at_both_ends_blocks_the_move(kind: Kind, end: str) -> None:
    """R-26: the refusal names it, at the old NVE and at the new."""
    now = cluster(kind)
    without_underlay(now, end)
    (why,) = whys(now, "address_not_covered")
    assert why == (
        "its address 10.42.0.50 and fd42::50 in network red would not stay: "
        f"host {end} has no ipv4 underlay address"
    )


@pytest.mark.req("R-26")
def test_an_interface_in_no_overlay_blocks_the_move_of_all_the_others() -> None:
    now = cluster()
    stray = Interface(network="gone", mac="02:00:00:00:00:02", ipv4="192.0.2.9")
    vm = now.vms["web"]
    now.vms["web"] = msgspec.structs.replace(vm, interfaces=(*vm.interfaces, stray))
    (why,) = whys(now, "address_not_covered")
    assert why == "its address 192.0.2.9 in network gone would not stay: it is in no network"


@pytest.mark.req("R-22")
@pytest.mark.req("R-23")
def test_a_kind_of_network_that_nobody_has_built_covers_nothing() -> None:
    now = cluster()
    now.networks["red"] = msgspec.structs.replace(now.networks["red"], kind="hip")
    assert "nothing keeps addresses in networks of kind hip" in whys(now, "address_not_covered")[0]


@pytest.mark.req("R-20")
@pytest.mark.parametrize("kind", ["l2", "l3"])
def test_the_peer_that_would_lose_the_vm_is_named(kind: Kind) -> None:
    """R-20: take away the one NVE that can reach a peer: refused before anything moves."""
    now = cluster(kind)
    without_underlay(now, "h3")
    (why,) = whys(now, "peer_not_covered")
    assert why == "its peer p3 (10.42.0.3) would lose it: host h3 has no ipv4 underlay address"
    now.hosts["h3"] = msgspec.structs.replace(now.hosts["h3"], dead=True)
    assert whys(now, "peer_not_covered") == [], "who is dead loses nothing"


@pytest.mark.req("R-20")
def test_many_peers_behind_one_nve_are_one_reason() -> None:
    now = cluster()
    without_underlay(now, "h3")
    for n in range(4, 12):
        face = msgspec.structs.replace(
            now.endpoints["p3"].interface, mac=f"02:00:00:00:01:{n:02}", ipv4=f"10.42.0.{n}"
        )
        now.endpoints[f"p{n}"] = msgspec.structs.replace(
            now.endpoints["p3"], name=f"p{n}", interface=face
        )
    (why,) = whys(now, "peer_not_covered")
    assert why.startswith("its peer p3 (10.42.0.3), peer p4 (10.42.0.4), ")
    assert " and 4 more would lose it: " in why


# ------------------------------------------------------------ correspondents outside


def with_gateway(now: Cluster, network: str = "red", host: str = "h3") -> None:
    leg = Leg(bridge="out0", mac="02:00:00:00:09:02", ipv4="192.0.2.2/24", via_ipv4="192.0.2.1")
    inside = Interface(network=network, mac="02:00:00:00:09:01", ipv4="10.42.0.2")
    made = Gateway(network=network, host=host, interface=inside, leg=leg)
    now.gateways[made.key] = made
    now.ways_out |= {key: way for key, way in all_settled(now).items() if way}


@pytest.mark.req("R-19")
@pytest.mark.parametrize("kind", ["l2", "l3"])
def test_a_correspondent_outside_needs_a_gateway_that_can_be_told(kind: Kind) -> None:
    """R-19: else the move is refused and names him, or flagged, as was configured for this VM."""
    now = cluster(kind)
    says(now, outside=(FAR, "2001:db8:51::/48", "10.42.0.0/25"))
    assert [why.split(" is outside")[0] for why in whys(now, "outside_not_covered")] == [
        f"its correspondent {FAR}",
        "its correspondent 2001:db8:51::/48",
    ]
    says(now, uncovered="flag")
    assert codes(now) == []


@pytest.mark.req("R-19")
def test_a_gateway_stands_for_the_families_that_it_has_while_its_nve_is_there() -> None:
    now = cluster("l3")
    says(now, outside=(FAR, "2001:db8:51::1"))
    with_gateway(now)
    assert kept_by(now, now.vms["web"], FAR) == "gateway of network red on host h3"
    assert len(whys(now, "outside_not_covered")) == 1
    now.hosts["h3"] = msgspec.structs.replace(now.hosts["h3"], ready=False, dead=True)
    assert len(whys(now, "outside_not_covered")) == 2


@pytest.mark.req("R-19")
def test_a_correspondent_may_come_in_by_any_gateway_so_all_must_be_told() -> None:
    """R-19: which one it is is settled outside. A dead one lets nobody in."""
    now = cluster("l3")
    says(now, outside=(FAR,))
    with_gateway(now)
    with_gateway(now, host="h2")
    assert kept_by(now, now.vms["web"], FAR) == "gateway of network red on host h3", "it keeps it"
    now.hosts["h2"] = msgspec.structs.replace(now.hosts["h2"], ready=False)
    assert len(whys(now, "outside_not_covered")) == 1
    now.hosts["h2"] = msgspec.structs.replace(now.hosts["h2"], dead=True)
    assert whys(now, "outside_not_covered") == []


@pytest.mark.req("R-19")
@pytest.mark.req("N-15")
def test_a_network_that_may_be_talked_to_is_not_outside() -> None:
    now = cluster("l3")
    brown = Network(name="brown", vni=78, kind="l3", ipv4="10.43.0.0/24")
    now.networks["brown"] = brown
    says(now, outside=("10.43.0.7",))
    assert codes(now) == ["outside_not_covered"]
    policy = pair("red", "brown", 1)
    now.policies[policy.key] = policy
    assert codes(now) == []


def test_several_gateways_stand_each_for_its_own_network_and_none_moves_along() -> None:
    """6-14: in two networks with a gateway each, on two hosts, a move changes neither of them."""
    now = cluster("l3")
    with_gateway(now)
    amber = msgspec.structs.replace(
        now.networks["red"], name="amber", vni=79, ipv4="10.99.0.0/24", ipv6=None
    )
    now.networks["amber"] = amber
    with_gateway(now, "amber", "h2")
    before = dict(now.gateways)
    for host in ("h2", "h3", "h1"):
        now.vms["web"] = msgspec.structs.replace(now.vms["web"], host=host)
        assert kept_by(now, now.vms["web"], FAR) == "gateway of network red on host h3"
        assert now.gateways == before


@pytest.mark.parametrize("state", ["shutdown", "crashed"])
def test_a_vm_that_is_off_has_no_correspondents(state: VmState) -> None:
    now = cluster(state=state)
    says(now, outside=(FAR,))
    assert [each.code for each in cold_blockers(now, "web", "h2")] == []


# ------------------------------------------------------------ what an owner registers


@pytest.mark.req("R-25")
def test_who_is_registered_may_lose_peers_but_not_its_own_address() -> None:
    """R-25: its applications handle that; an ordinary move gives it no other address."""
    now = cluster()
    says(now, outside=(FAR,))
    without_underlay(now, "h3")
    assert set(codes(now)) == {"peer_not_covered", "outside_not_covered"}
    registered(now)
    assert codes(now) == []
    without_underlay(now, "h2")
    assert codes(now) == ["address_not_covered"]


@pytest.mark.req("R-24")
def test_no_configuration_speaks_for_more_than_one_vm() -> None:
    """R-24: there is no such key, no such wish, and no statement of every VM."""
    keys = {name for name in NvaConfig.__struct_fields__ if "eligib" in name or "address" in name}
    assert keys == {"wire_address"}
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.convert({"store": "s", "wire_address": "w", "movable": True}, NvaConfig)
    assert set(DeclareWish.__struct_fields__) == {"outside", "uncovered", "latency"}
    now = cluster()
    for everyone in ("*", "", "red"):
        statement = Statement(vm=everyone, handles_address_change=True, at_ns=NOW_NS)
        found = [e.code for e in statement_blockers(now, "web", "alice", statement, NOW_NS)]
        assert found == ["not_this_vm"]
    other = msgspec.structs.replace(now.vms["web"], name="other")
    now.vms["other"] = other
    registered(now)
    says(now, outside=(FAR,))
    now.eligibilities["other"] = Eligibility(vm="other", declaration=Declaration(outside=(FAR,)))
    assert codes(now) == []
    assert [e.code for e in move_blockers(now, "other", "h2")] == ["outside_not_covered"]


@pytest.mark.req("R-25")
def test_a_statement_is_good_from_its_owner_now_and_once() -> None:
    now = cluster()

    def found(owner: str = "alice", at_ns: int = NOW_NS, name: str = "web") -> list[str]:
        said = Statement(vm=name, handles_address_change=True, at_ns=at_ns)
        return [each.code for each in statement_blockers(now, name, owner, said, NOW_NS)]

    assert found() == []
    assert found(name="nil") == ["unknown_vm"]
    assert found("bob") == ["not_its_owner"]
    assert found(at_ns=NOW_NS - (FRESH_S + 1) * S) == ["statement_stale"]
    assert found(at_ns=NOW_NS + (FRESH_S + 1) * S) == ["statement_stale"]
    now.eligibilities["web"] = Eligibility(vm="web", heard_ns=NOW_NS)
    assert found() == ["statement_repeated"]
    now.vms["web"] = msgspec.structs.replace(now.vms["web"], owner="")
    assert found(at_ns=NOW_NS + 1) == ["no_owner"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The owners' authority with alice, the domain's with the NVA, and a stranger's."""
    path = tmp_path_factory.mktemp("owners")
    for domain in ("owners", "domain", "strangers"):
        tls.create_authority(path / domain)
    tls.issue(path / "owners", "alice", "owner:alice", [])
    tls.issue(path / "owners", "h1", "nve:h1", [])
    tls.issue(path / "domain", "nva", "nva", [])
    tls.issue(path / "strangers", "alice", "owner:alice", [])
    return path


def signed(folder: Path, by: str, vm: str = "web", at_ns: int = NOW_NS) -> Signed:
    sealer = Sealer(folder / f"{by}.crt", folder / f"{by}.key")
    return sealer.sign(Statement(vm=vm, handles_address_change=True, at_ns=at_ns))


@pytest.mark.req("R-25")
def test_a_registration_is_authenticated_by_the_owners_certificate(folder: Path) -> None:
    ca = folder / "owners" / "ca.crt"
    good = signed(folder, "owners/alice")
    owner, statement = stated(good, ca)
    assert (owner, statement.vm, statement.handles_address_change) == ("alice", "web", True)
    other = msgspec.json.encode(msgspec.structs.replace(statement, vm="other"))
    for bad, why in (
        (signed(folder, "strangers/alice"), "not signed with a certificate of the owners'"),
        (signed(folder, "domain/nva"), "not signed with a certificate of the owners'"),
        (signed(folder, "owners/h1"), "is not an owner's"),
        (msgspec.structs.replace(good, statement=other), "not signed with"),
        (msgspec.structs.replace(good, certificate=b"x"), "not signed with"),
    ):
        with pytest.raises(Forged, match=why):
            stated(bad, ca)


@pytest.mark.req("R-58")
def test_an_owners_certificate_makes_no_tickets(folder: Path) -> None:
    sealer = Sealer(folder / "owners/alice.crt", folder / "owners/alice.key")
    with pytest.raises(Forged, match="not signed by the NVA"):
        opened(sealer.seal(TICKET), folder / "owners" / "ca.crt")


# ------------------------------------------------------------ the record, and a move's grounds


async def domain(kind: Kind = "l2") -> Authority:
    authority = Authority(MemoryStore(), lambda _: None)
    found = cluster(kind)
    authority.cluster.networks |= found.networks
    authority.cluster.hosts |= found.hosts
    authority.cluster.endpoints |= found.endpoints
    await authority.create_vm(found.vms["web"])
    return authority


def statement(at_ns: int, *, handles: bool = True) -> Statement:
    return Statement(vm="web", handles_address_change=handles, at_ns=at_ns)


async def states(authority: Authority, said: Statement, owner: str = "alice") -> None:
    await authority.state("web", owner, said, SIGNED)


@pytest.mark.req("R-25")
@pytest.mark.req("R-28")
async def test_a_registration_can_be_revoked_by_its_owner_and_by_the_operator() -> None:
    """R-28: who, and when; nothing that was signed before is good again."""
    authority = await domain()
    now_ns = time.time_ns()
    await states(authority, statement(now_ns))
    registered_by = authority.eligibility("web")["registered"]
    assert registered_by["origin"] == "owner:alice"
    with pytest.raises(Blocked, match="heard before"):
        await states(authority, statement(now_ns))
    await states(authority, statement(now_ns + 1, handles=False))
    shown = authority.eligibility("web")
    assert (shown["registered"], shown["revoked"]["origin"]) == (None, "owner:alice")
    await states(authority, statement(time.time_ns()))
    await authority.revoke("web", "operator")
    shown = authority.eligibility("web")
    assert (shown["registered"], shown["revoked"]["origin"]) == (None, "operator")
    with pytest.raises(Blocked, match="not registered"):
        await authority.revoke("web", "operator")


@pytest.mark.req("R-25")
async def test_what_was_said_of_a_vm_is_not_true_of_the_next_one_of_that_name() -> None:
    authority = await domain()
    before_ns = time.time_ns()
    await states(authority, statement(before_ns))
    await authority.declare("web", "operator", outside=(FAR,), latency="fixed")
    vm = authority.vm("web")
    await authority.delete_vm("web")
    await authority.create_vm(vm)
    shown = authority.eligibility("web")
    assert (shown["registered"], shown["outside"], shown["latency"]) == (None, [], "any")
    with pytest.raises(Blocked, match="heard before"):
        await states(authority, statement(before_ns + 1))


@pytest.mark.req("R-28")
async def test_the_record_outlives_the_nva() -> None:
    store = MemoryStore()
    authority = Authority(store, lambda _: None)
    found = cluster()
    authority.cluster.networks |= found.networks
    authority.cluster.hosts |= found.hosts
    await authority.create_vm(found.vms["web"])
    await authority.declare("web", "operator", outside=(FAR,), uncovered="flag")
    after = Authority(store, lambda _: None)
    await after.load()
    assert after.cluster.eligibilities == authority.cluster.eligibilities


@pytest.mark.req("R-28")
@pytest.mark.parametrize("kind", ["l2", "l3"])
@pytest.mark.parametrize("mode", ["hot", "warm", "cold"])
async def test_every_move_that_begins_says_on_what_grounds(kind: Kind, mode: str) -> None:
    """R-28: basis, origin and date are journalled with the move and in its receipt."""
    authority = await domain(kind)
    await authority.vm_state("web", "running")
    options = Options(checkpoints=2 if mode == "warm" else 0)
    record = await authority.begin_move("m1", "web", "h2", options, cold=mode == "cold")
    said = receipt(record)["eligibility"]
    assert (said["basis"], said["origin"], said["flags"]) == (
        "covered",
        f"NVA: {kind} network red",
        [],
    )
    assert record.grounds is not None
    assert record.grounds.at_ns > 0


@pytest.mark.req("R-19")
@pytest.mark.req("R-28")
async def test_what_was_not_covered_is_flagged_in_the_receipt() -> None:
    """By the operator's wish, or because of what the owner has registered."""
    authority = await domain()
    await authority.vm_state("web", "running")
    await authority.declare("web", "operator", outside=(FAR,))
    with pytest.raises(Blocked, match=FAR):
        await authority.begin_move("m1", "web", "h2", Options())
    await states(authority, statement(time.time_ns()))
    record = await authority.begin_move("m1", "web", "h2", Options())
    assert record.grounds is not None
    assert (record.grounds.basis, record.grounds.origin) == ("registered", "owner:alice")
    ended = msgspec.structs.replace(record, phase="aborted", outcome="aborted")
    await authority.journal(ended)
    await authority.revoke("web", "operator")
    await authority.declare("web", "operator", uncovered="flag")
    record = await authority.begin_move("m2", "web", "h2", Options())
    assert record.grounds is not None
    assert record.grounds.basis == "covered"
    assert [FAR in flag for flag in record.grounds.flags] == [True]


async def test_what_is_no_address_is_no_correspondent() -> None:
    authority = await domain()
    with pytest.raises(Blocked, match=r"example\.org"):
        await authority.declare("web", "operator", outside=("example.org",))
    with pytest.raises(Blocked, match="no such vm"):
        await authority.declare("nil", "operator", latency="fixed")


# ------------------------------------------------------------ latency classes


def expected(stop_ms: float) -> Forecast:
    return Forecast(
        sent_bytes=1,
        rest_bytes=1,
        copy_ms=1.0,
        stop_ms=stop_ms,
        rounds=1,
        dirty_bytes_per_s=0.0,
        rate_bytes_per_s=1.0,
        rate_from="assumed",
        converges=True,
    )


@pytest.mark.req("R-62")
@pytest.mark.parametrize("mode", ["hot", "warm", "cold", "at rest", "drain"])
def test_a_fixed_vm_is_not_moved_in_any_way(mode: str) -> None:
    """R-62: the class can veto any move."""
    now = cluster(state="shutdown" if mode == "at rest" else "running")
    says(now, latency="fixed")
    if mode == "drain":
        _, refused = drain_plan(now, "h1")
        assert "its latency class is fixed" in refused[0].why
        return
    ways: dict[str, Callable[[], Iterator[Refused]]] = {
        "hot": lambda: move_blockers(now, "web", "h2"),
        "warm": lambda: warm_blockers(now, "web", "h2", Options(checkpoints=1)),
        "cold": lambda: cold_blockers(now, "web", "h2"),
        "at rest": lambda: cold_blockers(now, "web", "h2"),
    }
    assert [each.code for each in ways[mode]()] == ["latency_class"]


@pytest.mark.req("R-62")
@pytest.mark.parametrize(
    ("latency", "stop_ms", "vetoed"),
    [
        ("any", None, False),
        ("any", 9000.0, False),
        ("interactive", 900.0, False),
        ("interactive", 1100.0, True),
        ("realtime", 90.0, False),
        ("realtime", 900.0, True),
        ("realtime", None, True),
    ],
)
async def test_a_class_bears_so_much_and_what_nobody_knows_is_too_much(
    latency: str, stop_ms: float | None, vetoed: bool
) -> None:
    authority = await domain()
    await authority.vm_state("web", "running")
    await authority.declare("web", "operator", latency=latency)
    forecast = expected(stop_ms) if stop_ms is not None else None
    if vetoed:
        with pytest.raises(Blocked, match=f"latency class {latency} bears"):
            await authority.begin_move("m1", "web", "h2", Options(), forecast)
        assert authority.vm("web").move is None
    else:
        await authority.begin_move("m1", "web", "h2", Options(), forecast)


@pytest.mark.req("R-62")
async def test_a_cold_move_is_taken_to_last_as_long_as_the_longest_before() -> None:
    """R-62: the record has the outage by mode. A VM at rest has none."""
    authority = await domain()
    await authority.vm_state("web", "running")
    await authority.declare("web", "operator", latency="interactive")
    assert [e.code for e in authority.cold_blockers("web", "h2", Options())] == ["latency_class"]
    await authority.vm_state("web", "shutdown")
    assert authority.cold_blockers("web", "h2", Options()) == ()
    await authority.vm_state("web", "running")
    await authority.declare("web", "operator", latency="any")
    record = await authority.begin_move("m1", "web", "h2", Options(), cold=True)
    ms = 10**6
    phases = [
        msgspec.structs.replace(record.phases[0], phase=phase, at_ns=at_ns)
        for phase, at_ns in (("planned", 1), ("staged", 100 * ms), ("drained", 814 * ms))
    ]
    ended = msgspec.structs.replace(record, phase="closed", outcome="moved", phases=tuple(phases))
    await authority.journal(ended)
    await authority.declare("web", "operator", latency="interactive")
    assert authority.eligibility("web")["outage_ms"] == {"cold": 714.0}
    assert authority.cold_blockers("web", "h2", Options()) == ()
    await authority.declare("web", "operator", latency="realtime")
    assert [e.code for e in authority.cold_blockers("web", "h2", Options())] == ["latency_class"]


@pytest.mark.req("R-23")
def test_all_reasons_come_at_once() -> None:
    """The gate is before anything moves, and says everything that a dry run would have to say."""
    now = cluster()
    says(now, outside=(FAR,), latency="fixed")
    without_underlay(now, "h2")
    without_underlay(now, "h3")
    assert codes(now) == [
        "latency_class",
        "address_not_covered",
        "peer_not_covered",
        "outside_not_covered",
    ]
