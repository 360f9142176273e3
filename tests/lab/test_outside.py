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
        assert (peers["subscribed"], peers["steered_before_resume"]) == (2, 1)
        known = at(f"ovl-{LAB}-h2", "bridge", "fdb", "show", "dev", "ovx77").stdout
        assert f"{mac} dst 10.200.0.{to[1]}" in known


@pytest.mark.req("N-23")
@pytest.mark.parametrize("family", [4, 6])
def test_the_way_out_is_router_gateway_outside(lab: None, family: int) -> None:
    hops = guest(f"traceroute -{family} -n -q1 -w2 -m6 {FAR[family]}")
    (gateway,) = ok("network", "gateway", "list", "-o", "json")
    within = gateway["inside"].split(", ")[0 if family == 4 else 1]
    found = re.findall(r"^ ?\d  (\S+)", hops, re.MULTILINE)
    assert found == [ROUTER[family], within, FAR[family]]


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
    second = run("lab", "outside", "red", "--host", "h3", "--name", LAB, "-o", "json")
    assert second.returncode == 3
    assert "remove red" in second.stderr
    leg = ("--ipv4", "192.0.2.9/24", "--via-ipv4", "192.0.2.1")
    nowhere = run("network", "gateway", "add", "amber", "--host", "h1", "--bridge", "nil", *leg)
    assert nowhere.returncode != 0
    assert "nil" in nowhere.stderr
    assert len(ok("network", "gateway", "list", "-o", "json")) == 1
    gone = f"ovl-{LAB}-h1-g79"
    wait_for(lambda: not os.path.exists(path_of(gone)))


def test_a_removed_gateway_leaves_nothing_and_may_come_back_elsewhere(lab: None) -> None:
    ok("network", "gateway", "remove", "red")
    wait_for(lambda: not os.path.exists(path_of(GATEWAY)))
    wait_for(lambda: "default" not in at(f"ovl-{LAB}-h1-r77", "ip", "route").stdout)
    assert at(OUTSIDE, "ping", "-c1", "-W1", VM[4]).returncode == 1
    ok("lab", "outside", "red", "--host", "h3", "--name", LAB)
    wait_for(lambda: at(OUTSIDE, "ping", "-c1", "-W1", VM[4]).returncode == 0)
    assert at(OUTSIDE, "ping", "-c1", "-W1", VM[6]).returncode == 0


def wait_for(condition: Any) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
