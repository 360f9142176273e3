"""Correspondents outside a routed network, on the real kernel, while the VM moves."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from overland.dataplane.namespace import path_of
from tests.lab.chaos import Lab
from tests.lab.command import ok, run, within
from tests.lab.talk import Talk

LAB = "ovout"
VM = {4: "10.42.0.50", 6: "fd42::50"}
ROUTER = {4: "10.42.0.1", 6: "fd42::1"}
LEG = {4: "192.0.2.2", 6: "2001:db8:2::2"}
FAR = {4: "198.51.100.1", 6: "2001:db8:51::1"}
OUTSIDE = f"ovl-{LAB}-e-outside"
GATEWAY = f"ovl-{LAB}-h2-g77"
pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(180)]

at = within


def guest(command: str) -> str:
    return str(ok("lab", "guest", "web", "--name", LAB, "--", command))


def migrated(to: str) -> Any:
    receipt = ok("vm", "migrate", "web", "--to", to, "-o", "json")
    assert receipt["outcome"] == "moved"
    return receipt


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """red has its gateway on h2, where it has no tenant; amber has none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        run("lab", "down", "--name", LAB)
        ok("lab", "up", "--name", LAB)
        try:
            red = ("--ipv4", "10.42.0.0/24", "--ipv6", "fd42::/64", "--kind", "l3")
            amber = ("--ipv4", "10.99.0.0/24", "--ipv6", "fd99::/64", "--kind", "l3")
            ok("network", "create", "red", "--vni", "77", "--mtu", "1400", *red)
            ok("network", "create", "amber", "--vni", "79", *amber)
            ok("lab", "outside", "red", "--host", "h2", "--name", LAB)
            ok("lab", "endpoint", "add", "a1", "--host", "h1", "--network", "amber", "--lab", LAB)
            face = f"red,ipv4={VM[4]},ipv6={VM[6]}"
            ok("vm", "create", "web", "--host", "h1", "--network", face)
            guest("true")
            yield
        finally:
            run("lab", "down", "--name", LAB)
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert f"ovl-{LAB}-" not in left


@pytest.mark.req("R-19")
@pytest.mark.parametrize("family", [4, 6])
def test_without_a_gateway_there_is_no_outside(lab: None, family: int) -> None:
    """R-19: nobody outside can be left behind by a move; the router says that there is no way."""
    for peer in (FAR[family], LEG[family]):
        sent = at(f"ovl-{LAB}-e-a1", "ping", "-c1", "-W2", peer)
        assert sent.returncode == 1
        assert f"From {ROUTER[family].replace('42', '99')}" in sent.stdout


@pytest.mark.req("R-19")
def test_the_gateways_nve_holds_the_mapping_and_is_told_of_every_move(lab: None) -> None:
    """R-19: as a peer of the move, and without a tenant of its own in the network."""
    mac = ok("vm", "show", "web", "-o", "json")["interfaces"][0]["mac"]
    host = ok("vm", "show", "web", "-o", "json")["host"]
    assert host == "h1"
    for to in ("h3", "h1"):
        receipt = migrated(to)
        assert receipt["tunnel_close_reason"] == "all peers acknowledged"
        peers = receipt["peers"]
        assert (peers["subscribed"], peers["acknowledged"]) == (2, 2)
        known = at(f"ovl-{LAB}-h2", "bridge", "fdb", "show", "dev", "ovx77").stdout
        assert f"{mac} dst 10.200.0.{to[1]}" in known


@pytest.mark.req("N-23")
@pytest.mark.parametrize("family", [4, 6])
def test_the_way_out_is_router_gateway_outside(lab: None, family: int) -> None:
    assert hops(family) == [ROUTER[family], inside("h2")[family], FAR[family]]


@pytest.mark.parametrize("family", [4, 6])
def test_who_sends_too_much_from_outside_is_told_by_the_gateway(lab: None, family: int) -> None:
    big = at(OUTSIDE, "ping", "-c1", "-W2", "-M", "do", "-s", "1440", VM[family])
    assert f"From {LEG[family]}" in big.stdout
    assert "1400" in big.stdout
    largest = str(1400 - {4: 28, 6: 48}[family])
    assert at(OUTSIDE, "ping", "-c1", "-W2", "-M", "do", "-s", largest, VM[family]).returncode == 0


@pytest.mark.req("R-33")
@pytest.mark.parametrize("family", [4, 6])
def test_an_address_of_nobody_is_silence_outside_too(lab: None, family: int) -> None:
    sent = at(OUTSIDE, "ping", "-c1", "-W1", VM[family].replace("50", "77"))
    assert sent.returncode == 1
    assert "From" not in sent.stdout


@pytest.mark.parametrize("family", [4, 6])
def test_the_gateway_is_no_way_between_places_outside(lab: None, family: int) -> None:
    """Who sends it what is not the VN's is told so, and no packet goes to and fro."""
    elsewhere = {4: "203.0.113.9", 6: "2001:db8:99::9"}[family]
    at(OUTSIDE, "ip", "route", "add", elsewhere, "via", LEG[family])
    sent = at(OUTSIDE, "ping", "-c1", "-W2", elsewhere)
    assert re.search(rf"From {LEG[family]} .*([Uu]nreachable)", sent.stdout), sent.stdout


@pytest.mark.req("N-15")
def test_nobody_outside_has_a_tenants_address(lab: None) -> None:
    at(OUTSIDE, "ip", "addr", "add", "10.42.0.99/32", "dev", "lo")
    assert at(OUTSIDE, "ping", "-c1", "-W1", "-I", "10.42.0.99", VM[4]).returncode == 1
    at(OUTSIDE, "ip", "addr", "del", "10.42.0.99/32", "dev", "lo")


@pytest.mark.req("R-19")
@pytest.mark.req("R-26")
@pytest.mark.parametrize("family", [4, 6])
def test_a_connection_from_outside_goes_through_moves_to_every_host(lab: None, family: int) -> None:
    """R-26: both ends see the same addresses throughout, on the gateway's host too.

    R-19: nothing from outside is lost, for the gateway's NVE turns before the VM is stopped.
    """
    port = 7000 + family
    guest(f"nc -ll -p {port} -e cat > /dev/null 2>&1 & sleep 1")
    talk = Talk(OUTSIDE, VM[family], port)
    seen = f"netstat -tn | grep :{port}"
    here, there = talk.ends(), guest(seen).split()[3:]
    routes = at(GATEWAY, "ip", "route").stdout + at(GATEWAY, "ip", "-6", "route").stdout
    pinging = subprocess.Popen(
        ["ip", "netns", "exec", OUTSIDE, "ping", "-i0.01", "-W2", VM[family]],
        stdout=subprocess.PIPE,
        text=True,
    )
    talk.start()
    for to in ("h2", "h3", "h2", "h1"):
        before = talk.answers
        receipt = migrated(to)
        assert receipt["packets"]["dropped"] == {}
        assert talk.answers > before
        assert (talk.ends(), guest(seen).split()[3:]) == (here, there)
    talk.over.set()
    talk.join(20)
    talk.socket.close()
    assert talk.failure == ""
    pinging.send_signal(2)
    said, _ = pinging.communicate(timeout=20)
    answered = [int(number) for number in re.findall(r"icmp_seq=(\d+)", said)]
    # Each once and in order; but not the one that was on its way when ping was interrupted.
    assert answered == list(range(1, len(answered) + 1))
    after = at(GATEWAY, "ip", "route").stdout + at(GATEWAY, "ip", "-6", "route").stdout
    assert after == routes, "6-14: a move changes nothing at the gateway"


def test_a_restarted_daemon_takes_its_gateway_over(lab: None) -> None:
    """Not one packet is lost, and nothing is made anew."""
    before = os.stat(path_of(GATEWAY)).st_ino, at(GATEWAY, "ip", "link").stdout
    pinging = subprocess.Popen(
        ["ip", "netns", "exec", OUTSIDE, "ping", "-c100", "-i0.02", "-W2", VM[4]],
        stdout=subprocess.PIPE,
        text=True,
    )
    ok("lab", "restart", "h2", "--name", LAB)
    said, _ = pinging.communicate(timeout=60)
    assert " 0% packet loss" in said
    assert (os.stat(path_of(GATEWAY)).st_ino, at(GATEWAY, "ip", "link").stdout) == before


def test_what_cannot_be_is_refused_and_leaves_nothing(lab: None) -> None:
    """All reasons at once; of a bridge that is not there only its host can tell."""
    second = run("lab", "outside", "red", "--host", "h2", "--name", LAB, "-o", "json")
    assert second.returncode == 3
    assert "remove red --host h2" in second.stderr
    leg = ("--ipv4", "192.0.2.9/24", "--via-ipv4", "192.0.2.1")
    nowhere = run("network", "gateway", "add", "amber", "--host", "h1", "--bridge", "nil", *leg)
    assert nowhere.returncode != 0
    assert "nil" in nowhere.stderr
    assert len(ok("network", "gateway", "list", "-o", "json")) == 1
    gone = f"ovl-{LAB}-h1-g79"
    wait_for(lambda: not os.path.exists(path_of(gone)))


def test_a_removed_gateway_leaves_nothing_and_may_come_back_elsewhere(lab: None) -> None:
    ok("network", "gateway", "remove", "red", "--host", "h2")
    wait_for(lambda: not os.path.exists(path_of(GATEWAY)))
    wait_for(lambda: at(f"ovl-{LAB}-h1-r77", "ip", "route", "get", FAR[4]).returncode != 0)
    assert at(OUTSIDE, "ping", "-c1", "-W1", VM[4]).returncode == 1
    ok("lab", "outside", "red", "--host", "h3", "--name", LAB)
    wait_for(lambda: at(OUTSIDE, "ping", "-c1", "-W1", VM[4]).returncode == 0)
    assert at(OUTSIDE, "ping", "-c1", "-W1", VM[6]).returncode == 0


# ------------------------------------------------------------ two gateways, on h2 and h3


def routed_outside_by(host: str) -> None:
    """Outside it is settled by which gateway packets come in."""
    legs = {each["host"]: each for each in ok("network", "gateway", "list", "-o", "json")}
    for family, subnet in (("ipv4", "10.42.0.0/24"), ("ipv6", "fd42::/64")):
        address = legs[host][family].partition("/")[0]
        assert at(OUTSIDE, "ip", "route", "replace", subnet, "via", address).returncode == 0


def gateway_of_web() -> str:
    found = ok("network", "gateway", "tenants", "red", "-o", "json")
    ((ipv4, ipv6),) = ((each["ipv4"], each["ipv6"]) for each in found if each["tenant"] == "web")
    assert ipv4 == ipv6
    return str(ipv4)


def leaves_by(gateway: str) -> bool:
    """Whether the router where web is sends what it says to outside to the one on `gateway`."""
    router = f"ovl-{LAB}-{ok('vm', 'show', 'web', '-o', 'json')['host']}-r77"
    to = inside(gateway)
    return all(
        f"via {to[family]} "
        in at(router, "ip", "route", "get", FAR[family], "from", VM[family], "iif", "gw").stdout
        for family in VM
    )


@pytest.fixture
def talks(lab: None) -> Iterator[list[Talk]]:
    """A connection from outside in each family, which must live through the test."""
    echoes = (f"nc -ll -p {7100 + family} -e cat > /dev/null 2>&1 &" for family in VM)
    guest(f"{' '.join(echoes)} sleep 1")
    found = [Talk(OUTSIDE, VM[family], 7100 + family) for family in VM]
    for talk in found:
        talk.start()
    yield found
    for talk in found:
        before = talk.answers
        wait_for(lambda talk=talk, before=before: talk.answers > before or talk.failure)
        talk.over.set()
        talk.join(20)
        talk.socket.close()
        assert talk.failure == ""


@pytest.mark.req("R-19")
def test_with_two_gateways_a_move_changes_neither_and_connections_live(talks: list[Talk]) -> None:
    """6-14: also a move to the host of the one that the VM does not use.

    By that one packets may come in all the same: both are told before the VM stops.
    """
    ok("lab", "outside", "red", "--host", "h2", "--name", LAB)
    assert gateway_of_web() == "h3", "a second gateway takes nobody from the first"
    for by, to in (("h3", "h2"), ("h2", "h1")):
        routed_outside_by(by)
        before = [talk.answers for talk in talks]
        receipt = migrated(to)
        assert receipt["packets"]["dropped"] == {}
        assert receipt["tunnel_close_reason"] == "all peers acknowledged"
        assert all(talk.answers > was for talk, was in zip(talks, before, strict=True))
        assert gateway_of_web() == "h3"
        assert leaves_by("h3")
    assert hops(6) == [ROUTER[6], inside("h3")[6], FAR[6]], "while all comes in by h2"


@pytest.mark.req("R-19")
@pytest.mark.req("N-11")
def test_when_a_gateways_host_dies_its_tenants_leave_by_the_other(talks: list[Talk]) -> None:
    """And stay there when it is back. A VM with correspondents outside may move meanwhile."""
    ok("vm", "eligibility", "set", "web", "--outside", FAR[4], "--outside", FAR[6])
    ok("network", "gateway", "assign", "red", "web", "--host", "h2")
    wait_for(lambda: leaves_by("h2"))
    with Lab(LAB).dead("h2"):
        routed_outside_by("h3")
        wait_for(lambda: leaves_by("h3"))
        assert gateway_of_web() == "h3"
        migrated("h3")
    assert gateway_of_web() == "h3"
    assert leaves_by("h3")


def test_a_removed_gateway_gives_its_tenants_to_the_other(lab: None) -> None:
    """Not one packet that goes out is lost: it is left by all before it is taken away.

    Nobody is given one by half: what is not of the network is refused, and all with it.
    """
    wish = ("network", "gateway", "assign", "red", "web")
    nobody = run(*wish, "nil", "--host", "h2")
    assert (nobody.returncode, gateway_of_web()) == (3, "h3")
    assert "nil" in nobody.stderr
    ok(*wish, "--host", "h2")
    wait_for(lambda: leaves_by("h2"))
    pinging = subprocess.Popen(
        ["ip", "netns", "exec", OUTSIDE, "ping", "-i0.01", "-W2", VM[4]],
        stdout=subprocess.PIPE,
        text=True,
    )
    ok("network", "gateway", "remove", "red", "--host", "h2")
    assert leaves_by("h3")
    assert gateway_of_web() == "h3"
    pinging.send_signal(2)
    answered = re.findall(r"icmp_seq=(\d+)", pinging.communicate(timeout=20)[0])
    assert [int(number) for number in answered] == list(range(1, len(answered) + 1))


def hops(family: int) -> list[str]:
    said = guest(f"traceroute -{family} -n -q1 -w2 -m6 {FAR[family]}")
    return re.findall(r"^ ?\d  (\S+)", said, re.MULTILINE)


def inside(host: str) -> dict[int, str]:
    """The addresses in the VN of the gateway on `host`, by family."""
    found = ok("network", "gateway", "list", "-o", "json")
    (said,) = (each["inside"] for each in found if each["host"] == host)
    return dict(zip((4, 6), said.split(", "), strict=True))


def wait_for(condition: Any) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
