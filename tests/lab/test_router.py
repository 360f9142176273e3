"""Routers on the real kernel, without a VM: applied, read back, taken over, repaired, removed."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from pyroute2 import AsyncIPRoute

from overland.dataplane.gates import Gates
from overland.dataplane.gateway import Gateways
from overland.dataplane.ila import Ila
from overland.dataplane.linux import LinuxKernel
from overland.dataplane.namespace import inside, path_of
from overland.dataplane.nftables import Nftables
from overland.dataplane.router import Entry, Routers
from overland.dataplane.tap import TapTable
from overland.model.nve import KernelState, NveIntent, RemoteIntent, TsiIntent, VnIntent
from overland.nve.delta import delta
from overland.nve.render import render

pytestmark = [pytest.mark.root]
NAMESPACE = "ovrouter-test"
ROUTER = f"{NAMESPACE}-r42"


def run(line: str) -> str:
    return subprocess.run(line.split(), capture_output=True, text=True, check=True).stdout


def names() -> set[str]:
    return {path.name for path in Path("/run/netns").glob(f"{NAMESPACE}-r*")}


@pytest.fixture
def namespace() -> Iterator[None]:
    for name in (NAMESPACE, *names()):
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    run(f"ip netns add {NAMESPACE}")
    try:
        with inside(path_of(NAMESPACE)):
            yield
    finally:
        for name in (NAMESPACE, *names()):
            run(f"ip netns del {name}")


@pytest.fixture
async def kernel(namespace: None) -> AsyncIterator[LinuxKernel]:
    async with AsyncIPRoute() as ip:
        with contextlib.closing(Nftables()) as nft, contextlib.closing(TapTable()) as taps:
            yield make(ip, nft, taps)


def make(ip: AsyncIPRoute, nft: Nftables, taps: TapTable) -> LinuxKernel:
    nft.ensure()
    routers, gateways = Routers(ip, NAMESPACE), Gateways(ip, NAMESPACE)
    return LinuxKernel(ip, nft, Gates(ip), taps, routers, gateways, Ila(ip), 100)


def routed(tenants: int) -> NveIntent:
    here = TsiIntent(
        owner="web",
        index=0,
        kind="tap",
        mac="02:00:00:00:ff:01",
        ipv4="10.42.200.1",
        ipv6="fd42::200:1",
        state="activated",
    )
    there = tuple(
        RemoteIntent(
            mac=f"02:00:00:00:{n >> 8:02x}:{n & 255:02x}",
            ipv4=f"10.42.{1 + (n >> 8)}.{n & 255}",
            ipv6=f"fd42::1:{n:x}",
            nve="192.0.2.2",
            version=1,
        )
        for n in range(1, tenants + 1)
    )
    vn = VnIntent(
        network="blue",
        vni=42,
        mtu=1400,
        underlay="ipv4",
        local="192.0.2.1",
        gateways=("10.42.0.1/16", "fd42::1/64"),
        members=("192.0.2.2",),
        tsis=(here,),
        remotes=there,
    )
    return NveIntent(vns=(vn,))


async def made_so(kernel: LinuxKernel, desired: KernelState) -> None:
    """One round of the agent; nothing is left to do after it."""
    assert await kernel.apply(delta(desired, await kernel.snapshot())) == []
    assert delta(desired, await kernel.snapshot()) == ()


@pytest.mark.req("R-08")
async def test_what_is_applied_is_what_is_read_back(kernel: LinuxKernel) -> None:
    """300 tenants of two families, then fewer, then none; a router that is not wanted is gone."""
    await made_so(kernel, render(routed(300)))
    assert len((await kernel.snapshot()).host_routes) == 602
    await made_so(kernel, render(routed(3)))
    await made_so(kernel, KernelState())
    assert names() == set()
    assert "ovr42" not in run("ip -o link")


async def test_a_restarted_daemon_finds_all_as_wanted(kernel: LinuxKernel) -> None:
    desired = render(routed(3))
    await made_so(kernel, desired)
    before = Path(path_of(ROUTER)).stat().st_ino
    async with AsyncIPRoute() as ip:
        with contextlib.closing(Nftables()) as nft, contextlib.closing(TapTable()) as taps:
            heir = make(ip, nft, taps)
            await Routers(ip, NAMESPACE).sweep()
            assert delta(desired, await heir.snapshot()) == ()
    assert Path(path_of(ROUTER)).stat().st_ino == before


@pytest.mark.parametrize(
    "damage",
    [
        f"ip netns del {ROUTER}",
        "ip link del ovr42",
        f"ip -n {ROUTER} route del 10.42.200.1",
        f"ip -n {ROUTER} -6 route flush dev gw proto static",
        f"ip -n {ROUTER} neigh replace 10.42.200.1 lladdr 02:00:00:00:00:99 nud permanent dev gw",
        "bridge link set dev ovx42 bcast_flood on",
        "nft flush set bridge overland routed",
    ],
)
async def test_a_router_that_was_damaged_is_repaired(kernel: LinuxKernel, damage: str) -> None:
    desired = render(routed(3))
    await made_so(kernel, desired)
    run(damage)
    await made_so(kernel, desired)
    assert "mtu 65000" in run(f"ip -n {ROUTER} link show gw")
    assert "inet6 fd42::1/128" in run(f"ip -n {ROUTER} addr show gw")


async def test_what_a_crash_left_is_swept_and_nothing_else(kernel: LinuxKernel) -> None:
    await made_so(kernel, render(routed(1)))
    run(f"ip netns add {NAMESPACE}-r43")
    run(f"ip netns add {NAMESPACE}-rest")
    async with AsyncIPRoute() as ip:
        await Routers(ip, NAMESPACE).sweep()
    assert names() == {ROUTER, f"{NAMESPACE}-rest"}


async def test_a_router_gives_nobody_a_shorter_way(kernel: LinuxKernel) -> None:
    """All packets leave by the device they came by: redirects of both families are impossible."""
    await made_so(kernel, render(routed(1)))
    with inside(path_of(ROUTER)):
        for device in ("all", "gw"):
            knob = Path(f"/proc/sys/net/ipv4/conf/{device}/send_redirects")
            assert knob.read_text() == "0\n"
    assert "fe80" not in run(f"ip -n {ROUTER} addr show gw")


async def test_a_port_that_comes_or_goes_takes_no_neighbour_away(kernel: LinuxKernel) -> None:
    """A bridge without an address of its own has its lowest port's, and forgets all with it."""
    (vn,) = routed(2).vns
    desired = render(NveIntent(vns=(msgspec.structs.replace(vn, gateways=()),)))
    await made_so(kernel, desired)
    run("ip link add low address 00:00:00:00:00:02 type veth peer name high")
    run("ip link set low master ovb42")
    assert delta(desired, await kernel.snapshot()) == ()


async def test_a_network_may_change_its_kind(kernel: LinuxKernel) -> None:
    """One was deleted and another made with its VNI while the daemon was away."""
    (vn,) = routed(2).vns
    flat = NveIntent(vns=(msgspec.structs.replace(vn, gateways=()),))
    for intent in (flat, routed(2), flat):
        await made_so(kernel, render(intent))


WAYS = {"10.42.0.2": "fd42::2", "10.42.0.3": "fd42::3"}
FAR = {4: "198.51.100.1", 6: "2001:db8:51::1"}


def leaving(tenants: int, ways: tuple[str, ...] = tuple(WAYS)) -> NveIntent:
    """Routed blue with gateways elsewhere, and tenants here that go out by the last of them."""
    (vn,) = routed(0).vns
    (web,) = vn.tsis
    many = tuple(
        msgspec.structs.replace(
            web,
            owner=f"t{n}",
            mac=f"02:00:00:01:{n >> 8:02x}:{n & 255:02x}",
            ipv4=f"10.42.{1 + (n >> 8)}.{n & 255}",
            ipv6=f"fd42::1:{n:x}",
            ways_out=(ways[-1], WAYS[ways[-1]]) if ways else (),
        )
        for n in range(tenants)
    )
    gateways = tuple(
        RemoteIntent(
            mac=f"02:00:00:00:ee:0{n}",
            ipv4=way,
            ipv6=WAYS[way],
            nve="192.0.2.2",
            version=1,
            outside=("ipv4", "ipv6"),
        )
        for n, way in enumerate(ways)
    )
    return NveIntent(vns=(msgspec.structs.replace(vn, tsis=(web, *many), remotes=gateways),))


def way_of(to: str, source: str) -> str:
    """The next router for a packet that has come in; empty when it goes to nobody but `to`."""
    command = f"ip -n {ROUTER} -j route get {to} from {source} iif gw"
    found = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if found.returncode:
        return "none"
    (route,) = json.loads(found.stdout)
    return str(route.get("gateway", ""))


@pytest.mark.parametrize("family", [4, 6])
async def test_each_tenant_leaves_the_vn_by_his_own_gateway(
    kernel: LinuxKernel, family: int
) -> None:
    """6-14. What stays in the VN, or comes in from outside, asks for no gateway."""
    first, second = ((v4, v6)[family == 6] for v4, v6 in WAYS.items())
    web, other, nobody = (
        {4: "10.42.200.1", 6: "fd42::200:1"}[family],
        {4: "10.42.1.0", 6: "fd42::1:0"}[family],
        {4: "10.42.9.9", 6: "fd42::9:9"}[family],
    )
    await made_so(kernel, render(leaving(1)))
    assert way_of(FAR[family], other) == second
    assert way_of(FAR[family], web) == first, "who has none goes by whichever"
    assert (way_of(other, web), way_of(web, FAR[family]), way_of(other, FAR[family])) == ("",) * 3
    assert way_of(nobody, web) == "none"
    await made_so(kernel, render(leaving(1, tuple(WAYS)[:1])))
    assert way_of(FAR[family], other) == first
    await made_so(kernel, render(leaving(1, ())))
    assert way_of(FAR[family], other) == "none"
    rules = run(f"ip -n {ROUTER} -{family} rule")
    assert len(rules.splitlines()) == {4: 3, 6: 2}[family], "the kernel's own"


@pytest.mark.parametrize(
    "damage",
    [
        f"ip -n {ROUTER} rule del pref 40000 from 10.42.1.0",
        f"ip -n {ROUTER} -6 rule del pref 40001",
        f"ip -n {ROUTER} -6 rule add pref 40000 from fd42::1:1 lookup 2147483650",
        f"ip -n {ROUTER} route del default via 10.42.0.3 table 2318008323",
    ],
)
async def test_a_way_out_that_was_damaged_is_repaired(kernel: LinuxKernel, damage: str) -> None:
    desired = render(leaving(1))
    await made_so(kernel, desired)
    run(damage)
    await made_so(kernel, desired)
    assert way_of(FAR[4], "10.42.1.0") == "10.42.0.3"


async def test_a_default_route_from_before_gives_way_without_a_hole(kernel: LinuxKernel) -> None:
    """One gateway was all that a VN could have, and the main table led to it."""
    desired = render(leaving(1))
    await made_so(kernel, desired)
    run(f"ip -n {ROUTER} route add default via 10.42.0.2 dev gw proto static mtu 1400")
    assert way_of(FAR[4], "10.42.1.0") == "10.42.0.2"
    await made_so(kernel, desired)
    assert way_of(FAR[4], "10.42.1.0") == "10.42.0.3"


async def test_what_is_told_twice_is_done_once(kernel: LinuxKernel) -> None:
    """A rule that another round has made meanwhile is no failure."""
    ops = [op for op in delta(render(leaving(2)), KernelState()) if op.verb == "put"]
    assert await kernel.apply(ops) == []
    entries = [op for op in ops if isinstance(op.fact, Entry)]
    assert await kernel.apply(entries) == []
    assert delta(render(leaving(2)), await kernel.snapshot()) == ()


def two(*allowed: int) -> NveIntent:
    """blue (42) as above, and brown (43), which talks with the VNs `allowed`."""
    (blue,) = routed(1).vns
    brown = msgspec.structs.replace(
        blue,
        network="brown",
        vni=43,
        gateways=("10.43.0.1/16", "fd43::1/64"),
        tsis=(),
        remotes=(
            RemoteIntent(
                mac="02:00:00:00:ee:01",
                ipv4="10.43.200.1",
                ipv6="fd43::200:1",
                nve="192.0.2.2",
                version=1,
            ),
        ),
        allowed=allowed,
    )
    return NveIntent(vns=(msgspec.structs.replace(blue, allowed=(43,)), brown))


def inner(namespace: str) -> str:
    tables = run(f"ip netns exec {namespace} nft list tables")
    return run(f"ip -n {namespace} route") + run(f"ip -n {namespace} -6 route") + tables


@pytest.mark.req("N-15")
async def test_a_passage_comes_with_the_policy_and_goes_with_it(kernel: LinuxKernel) -> None:
    """Both routers have the other's subnets, or neither has; what is left of one is made whole."""
    brown = f"{NAMESPACE}-r43"
    await made_so(kernel, render(two()))
    closed = inner(ROUTER), inner(brown)
    await made_so(kernel, render(two(42)))
    assert "10.43.0.0/16 via 10.43.0.1 dev to43" in inner(ROUTER)
    assert "fd43::/64 via fd43::1 dev to43" in inner(ROUTER)
    assert "10.42.0.0/16 via 10.42.0.1 dev to42" in inner(brown)
    run(f"ip -n {brown} link del to42")
    assert (await kernel.snapshot()).passages == frozenset()
    await made_so(kernel, render(two(42)))
    assert "10.42.0.0/16 via 10.42.0.1 dev to42" in inner(brown)
    await made_so(kernel, render(two()))
    assert (inner(ROUTER), inner(brown)) == closed
    await made_so(kernel, render(two(42)))
    await made_so(kernel, KernelState())
    assert names() == set()
