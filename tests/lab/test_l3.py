"""Routed networks on the real kernel: what tenants see, what they cannot do, and real moves."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from overland.dataplane.namespace import inside, path_of
from tests.lab.command import ok, run, within

LAB = "ovl3"
VM = {4: "10.42.0.50", 6: "fd42::50"}
GATEWAY = {4: "10.42.0.1", 6: "fd42::1"}
pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(180)]


def at(place: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a namespace of the lab."""
    return within(f"ovl-{LAB}-{place}", *command)


def guest(command: str) -> str:
    return str(ok("lab", "guest", "web", "--name", LAB, "--", command))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """red and rival: two tenants with the same subnets; red allows less than a guest would send."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        run("lab", "down", "--name", LAB)
        ok("lab", "up", "--name", LAB)
        try:
            subnets = ("--ipv4", "10.42.0.0/24", "--ipv6", "fd42::/64", "--kind", "l3")
            ok("network", "create", "red", "--vni", "77", "--mtu", "1400", *subnets)
            ok("network", "create", "rival", "--vni", "78", *subnets)
            amber = ("--ipv4", "10.99.0.0/24", "--ipv6", "fd99::/64", "--kind", "l3")
            ok("network", "create", "amber", "--vni", "79", *amber)
            for name, host, network in (
                *((f"p{n}", f"h{n}", "red") for n in (1, 2, 3)),
                *((f"r{n}", f"h{n}", "rival") for n in (1, 2)),
                ("a1", "h1", "amber"),
            ):
                endpoint = ("--host", host, "--network", network, "--lab", LAB)
                ok("lab", "endpoint", "add", name, *endpoint)
            face = "red,ipv4=10.42.0.50,ipv6=fd42::50"
            ok("vm", "create", "web", "--host", "h1", "--network", face)
            guest("true")
            yield
        finally:
            run("lab", "down", "--name", LAB)
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert f"ovl-{LAB}-" not in left


def ping(place: str, address: str, *more: str) -> subprocess.CompletedProcess[str]:
    return at(place, "ping", "-c1", "-W2", *more, address)


@pytest.mark.req("N-23")
@pytest.mark.req("R-50")
@pytest.mark.parametrize("family", [4, 6])
def test_a_router_takes_one_hop_and_names_itself(lab: None, family: int) -> None:
    """Both families alike. An L2 network takes none: see below."""
    for peer in ("e-p1", "e-p2"):
        assert "ttl=63" in ping(peer, VM[family]).stdout
        assert "ttl=64" in ping(peer, GATEWAY[family]).stdout
        expired = ping(peer, VM[family], "-t1")
        assert re.search(rf"From {GATEWAY[family]} .*exceeded", expired.stdout)
    hops = guest(f"traceroute -{family} -n -q1 -w2 -m4 {VM[family].replace('50', '3')}")
    assert re.findall(r"^ ?\d  (\S+)", hops, re.MULTILINE)[0] == GATEWAY[family]


@pytest.mark.req("N-23")
def test_an_l2_network_takes_no_hop(lab: None) -> None:
    ok("network", "create", "plain", "--vni", "80", "--ipv4", "10.80.0.0/24")
    for name, host in (("b1", "h1"), ("b2", "h2")):
        ok("lab", "endpoint", "add", name, "--host", host, "--network", "plain", "--lab", LAB)
    assert "ttl=64" in ping("e-b1", "10.80.0.3").stdout


@pytest.mark.parametrize("family", [4, 6])
def test_who_sends_too_much_is_told_how_much_he_may(lab: None, family: int) -> None:
    """The guest believes in 1,500 bytes, its network in 1,400: the router says so, once."""
    big = f"ping -{family} -c1 -W2 -s 1440 {VM[family].replace('50', '3')}"
    before = too_big_heard(family)
    guest(f"{big}; true")
    assert too_big_heard(family) == before + 1
    assert "1 packets received" in guest(big)
    assert too_big_heard(family) == before + 1
    largest = ping("e-p2", VM[family], "-M", "do", "-s", str(1400 - {4: 28, 6: 48}[family]))
    assert largest.returncode == 0, "what the network allows passes in one piece"


def too_big_heard(family: int) -> int:
    """How often the guest was told (RFC 1191, RFC 8201)."""
    if family == 6:
        return int(guest("cat /proc/net/snmp6").partition("Icmp6InPktTooBigs")[2].split()[0])
    names, values = re.findall(r"^Icmp: (.*)", guest("cat /proc/net/snmp"), re.MULTILINE)
    return int(dict(zip(names.split(), values.split(), strict=True))["InDestUnreachs"])


@pytest.mark.req("N-15")
@pytest.mark.parametrize("family", [4, 6])
def test_two_networks_never_meet_even_with_the_same_addresses(lab: None, family: int) -> None:
    """N-15: r2 has p2's addresses; the VM's address is nobody's in rival; amber is nowhere."""
    second = VM[family].replace("50", "3")
    assert ping("e-r1", second).returncode == 0
    assert ping("e-p1", second).returncode == 0
    nobody = ping("e-r1", VM[family])
    assert nobody.returncode == 1
    assert "From" not in nobody.stdout, "silence, for it might be in transit (R-33)"
    elsewhere = ping("e-p1", {4: "10.99.0.2", 6: "fd99::2"}[family])
    assert elsewhere.returncode == 1
    assert f"From {GATEWAY[family]}" in elsewhere.stdout


SEND_PAST = """
import socket, sys
out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
out.bind(("eth0", 0))
mac = lambda text: bytes.fromhex(text.replace(":", ""))
for to in (sys.argv[1], "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01"):
    out.send(mac(to) + bytes.fromhex("020000000077") + b"\\x88\\xb6" + bytes(46))
"""


@pytest.mark.parametrize("peer", ["p1", "p2"])
def test_nothing_reaches_a_tenant_past_the_router(lab: None, peer: str) -> None:
    """By MAC address, by broadcast, by multicast: from the same host and from another."""
    mac = ok("vm", "show", "web", "-o", "json")["interfaces"][0]["mac"]
    dropped = "cat /sys/class/net/eth0/statistics/rx_dropped"
    before = guest(dropped)
    sent = at(f"e-{peer}", sys.executable, "-c", SEND_PAST, mac)
    assert sent.returncode == 0, sent.stderr
    assert ping(f"e-{peer}", VM[4]).returncode == 0  # what was sent before has arrived by now
    assert guest(dropped) == before
    assert at("h1", "bridge", "fdb", "show", "dev", "ovx77").stdout.count("00:00:00:00:00:00") == 0


def test_who_has_an_address_of_nobody_is_not_heard(lab: None) -> None:
    """He gets no answer from the router, and no place in its neighbour table, which hosts share."""
    at("e-r2", "ip", "addr", "add", "10.42.0.200/32", "dev", "eth0")
    assert ping("e-r2", GATEWAY[4]).returncode == 0
    assert ping("e-r2", GATEWAY[4], "-I", "10.42.0.200").returncode == 1
    assert "10.42.0.200" not in at("h2-r78", "ip", "neigh").stdout


@pytest.mark.req("R-44")
def test_an_nve_without_a_tenant_has_no_router(lab: None) -> None:
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    routers = set(re.findall(rf"ovl-{LAB}-(h\d-r\d+)", names))
    assert {"h1-r77", "h2-r77", "h3-r77", "h1-r78", "h2-r78"} <= routers
    assert "h3-r78" not in routers
    assert "ovb78" not in at("h3", "ip", "-o", "link").stdout


def test_the_router_goes_with_the_last_tenant(lab: None) -> None:
    made = ("--network", "amber", "--host", "h3")
    ok("vm", "create", "short", *made)
    assert "gw" in at("h3-r79", "ip", "-o", "link").stdout
    ok("vm", "delete", "short")
    deadline_s = time.monotonic() + 10
    while os.path.exists(path_of(f"ovl-{LAB}-h3-r79")):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def routes() -> dict[str, list[str]]:
    """Every host route of red and every neighbour, at each NVE."""
    shown = ("route show", "-6 route show", "neigh show nud permanent")
    found = {}
    for host in ("h1", "h2", "h3"):
        inner = f"ovl-{LAB}-{host}-r77"
        texts = [
            subprocess.run(
                ["ip", "-n", inner, *s.split()], capture_output=True, text=True, check=True
            )
            for s in shown
        ]
        found[host] = sorted(line for each in texts for line in each.stdout.splitlines())
    return found


@pytest.mark.req("R-08")
@pytest.mark.req("R-22")
@pytest.mark.req("R-27")
@pytest.mark.req("R-50")
def test_a_vm_moves_across_hosts_with_its_addresses_and_no_route_changes(lab: None) -> None:
    """R-22, R-08: hot moves under streams of both families. R-27: with DNS blocked everywhere."""
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    places = re.findall(rf"^(ovl-{LAB}-\S+)", names, re.MULTILINE)
    for place in places:
        for line in (
            "add table inet nodns",
            "add chain inet nodns every { type filter hook prerouting priority 0; }",
            "add rule inet nodns every meta l4proto { tcp, udp } th dport 53 drop",
        ):
            subprocess.run(["ip", "netns", "exec", place, "nft", line], check=True)
    before = routes()
    assert before["h1"] == before["h2"] == before["h3"]
    peers = [word for n in (1, 2, 3) for word in ("--peer", f"p{n}")]
    ok("probe", "start", "web", "--rate", "600", "--lab", LAB, *peers)
    receipts = [ok("vm", "migrate", "web", "--to", h, "-o", "json") for h in ("h2", "h3", "h1")]
    verdict = json.loads(run("probe", "stop", "--lab", LAB, "-o", "json").stdout)
    total = verdict["total"]
    assert (total["lost"], total["duplicated"], total["out_of_order"]) == (0, 0, 0)
    assert all(flow["problem"] == "" for flow in verdict["flows"])
    assert {flow["id"].split("/")[-1] for flow in verdict["flows"]} >= {"ipv4", "ipv6"}
    for receipt in receipts:
        assert receipt["outcome"] == "moved"
        assert receipt["packets"]["dropped"] == {}
        assert receipt["tunnel_close_reason"] == "all peers acknowledged"
    assert routes() == before


def ends(sock: socket.socket) -> tuple[Any, Any]:
    return sock.getsockname(), sock.getpeername()


@pytest.mark.req("R-26")
@pytest.mark.req("R-30")
@pytest.mark.parametrize("family", [4, 6])
def test_both_ends_see_the_same_addresses_and_an_idle_connection_lives(
    lab: None, family: int
) -> None:
    """R-26: getsockname and getpeername at both ends, before and after.

    R-30: nothing is sent while the VM moves, and no router keeps anything that could expire.
    """
    port = 7000 + family
    guest(f"nc -ll -p {port} -e cat > /dev/null 2>&1 & sleep 1")
    seen = f"netstat -tn | grep :{port}"
    with inside(path_of(f"ovl-{LAB}-e-p2")):
        client = socket.create_connection((VM[family], port), timeout=20)
    with client:
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        here, there = ends(client), guest(seen).split()
        receipt = ok("vm", "migrate", "web", "--to", elsewhere(), "-o", "json")
        assert receipt["outcome"] == "moved"
        assert (ends(client), guest(seen).split()) == (here, there)
        client.sendall(b"after")
        assert client.recv(100) == b"after"


def elsewhere() -> str:
    return "h2" if ok("vm", "show", "web", "-o", "json")["host"] != "h2" else "h3"


def test_a_restarted_daemon_takes_its_routers_over(lab: None) -> None:
    """Not one packet is lost, and nothing is made anew."""
    place = f"ovl-{LAB}-h2-r77"
    before = os.stat(path_of(place)).st_ino, routes()
    pinging = subprocess.Popen(
        ["ip", "netns", "exec", f"ovl-{LAB}-e-p2", "ping", "-c100", "-i0.02", "-W2", VM[4]],
        stdout=subprocess.PIPE,
        text=True,
    )
    ok("lab", "restart", "h2", "--name", LAB)
    said, _ = pinging.communicate(timeout=60)
    assert " 0% packet loss" in said
    assert (os.stat(path_of(place)).st_ino, routes()) == before
