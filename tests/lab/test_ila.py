"""Networks of kind ila in the lab, with a real guest: the wire, the limits, the errors, the moves.

The lab's locators are those of the vectors: 2001:db8:a:1::/64 leads to h1.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from overland.dataplane.namespace import inside, path_of
from tests.lab.command import ok, run, within

LAB = "ovila"
VM = "2001:db8:100:0:2000::1"
GATEWAY = "2001:db8:100::1"
PEERS = {f"p{n}": f"2001:db8:100:0:2000::1{n}" for n in (1, 2, 3)}
MTU, NARROW = 1600, 1400
pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(180)]


def at(place: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a namespace of the lab."""
    return within(f"ovl-{LAB}-{place}", *command)


def ip(place: str, line: str) -> None:
    done = at(place, "ip", *line.split())
    assert done.returncode == 0, done.stderr


def guest(command: str) -> str:
    return str(ok("lab", "guest", "web", "--name", LAB, "--", command))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """jade, with all that the underlay carries, and onyx, another tenant's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        run("lab", "down", "--name", LAB)
        ok("lab", "up", "--name", LAB)
        try:
            kind = ("--kind", "ila", "--mtu", str(MTU))
            ok("network", "create", "jade", "--vni", "77", "--ipv6", "2001:db8:100::/64", *kind)
            ok("network", "create", "onyx", "--vni", "78", "--ipv6", "2001:db8:200::/64", *kind)
            for n, (name, address) in enumerate(PEERS.items(), 1):
                where = ("--host", f"h{n}", "--network", "jade", "--ipv6", address)
                ok("lab", "endpoint", "add", name, *where, "--lab", LAB)
            for n in (1, 2):
                where = ("--host", f"h{n}", "--network", "onyx", "--lab", LAB)
                address = f"2001:db8:200:0:2000::2{n}"
                ok("lab", "endpoint", "add", f"o{n}", *where, "--ipv6", address)
            ok("vm", "create", "web", "--host", "h1", "--network", f"jade,ipv6={VM}")
            guest("true")
            yield
        finally:
            run("lab", "down", "--name", LAB)
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert f"ovl-{LAB}-" not in left


def ping(place: str, address: str, *more: str) -> subprocess.CompletedProcess[str]:
    return at(place, "ping", "-c1", "-W2", *more, address)


def to_host(host: str) -> dict[str, Any]:
    """Move the VM there; the receipt."""
    receipt: dict[str, Any] = ok("vm", "migrate", "web", "--to", host, "-o", "json")
    assert receipt["outcome"] == "moved"
    return receipt


def on_underlay(host: str, peer: str, *command: str) -> str:
    """The first packet from `peer` that the underlay of `host` shows while `command` runs there."""
    dump = ["tcpdump", "-nn", "-l", "-c1", "-i", "underlay", f"src host {PEERS[peer]}"]
    listen = ["ip", "netns", "exec", f"ovl-{LAB}-{host}", "timeout", "20", *dump]
    with subprocess.Popen(
        listen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as dumping:
        assert dumping.stderr is not None
        while "listening" not in dumping.stderr.readline():
            assert dumping.poll() is None
        assert at(f"e-{peer}", *command).returncode == 0
        said, _ = dumping.communicate(timeout=30)
    return said


def test_what_is_shown_of_it(lab: None) -> None:
    network = next(each for each in ok("network", "list", "-o", "json") if each["name"] == "jade")
    assert (network["kind"], network["ipv6"], network["mtu"]) == ("ila", "2001:db8:100::/64", MTU)
    hosts = ok("host", "list", "-o", "json")
    assert [each["locator"] for each in hosts] == [f"2001:db8:a:{n}::/64" for n in (1, 2, 3)]
    face = ok("vm", "show", "web", "-o", "json")["interfaces"][0]
    assert (face["ipv4"], face["ipv6"]) == (None, VM)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("2001:db8:100::5", "choose 2001:db8:100:0:2000::5"),
        ("2001:db8:100:0:2000::ffff", "choose 2001:db8:100:0:2000::1"),
        ("2001:db8:100:0:2000:1::", "choose 2001:db8:100:0:2000:1:0:1"),
    ],
)
def test_an_identifier_that_would_not_come_back_is_refused(
    lab: None, address: str, says: str
) -> None:
    done = run("vm", "create", "no", "--host", "h1", "--network", f"jade,ipv6={address}")
    assert done.returncode == 3
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_wire_shows_the_vectors_and_the_ends_do_not(lab: None) -> None:
    """V1 at h1, V3 at h2; the source is never translated."""
    for host, wire in (("h1", "2001:db8:a:1:3000::f0f5"), ("h2", "2001:db8:a:2:3000::f0f4")):
        if host != "h1":
            to_host(host)
        seen = on_underlay("h3", "p3", "ping", "-c2", "-W2", VM)
        assert f"IP6 {PEERS['p3']} > {wire}: ICMP6, echo request" in seen
    to_host("h1")


@pytest.mark.req("N-23")
def test_a_hop_is_taken_and_the_gateway_names_itself(lab: None) -> None:
    assert "ttl=63" in ping("e-p2", VM).stdout
    assert "ttl=63" in ping("e-p1", VM).stdout
    assert "ttl=64" in ping("e-p2", GATEWAY).stdout
    assert f"From {GATEWAY}" in ping("e-p2", VM, "-t1").stdout
    hops = guest(f"traceroute -6 -n -q1 -w2 -m4 {PEERS['p2']}")
    assert re.findall(r"^ ?\d  (\S+)", hops, re.MULTILINE)[:2] == [GATEWAY, PEERS["p2"]]


@pytest.mark.req("N-24")
def test_a_tenant_may_use_all_that_the_underlay_carries(lab: None) -> None:
    """N-24: no header is added, so nothing is taken from the MTU; more than that is told."""
    assert ping("e-p2", PEERS["p3"], "-M", "do", "-s", str(MTU - 48)).returncode == 0
    wide = ("network", "create", "wide", "--vni", "79", "--kind", "ila", "--mtu", str(MTU + 1))
    refused = run(*wide, "--ipv6", "2001:db8:300::/64")
    assert refused.returncode == 3
    assert f"use --mtu {MTU}" in refused.stderr


@pytest.mark.req("N-15")
def test_two_tenants_never_meet(lab: None) -> None:
    """N-15: no way by the router, and none by the underlay for who knows the prefix."""
    assert ping("e-o1", "2001:db8:200:0:2000::22").returncode == 0
    across = ping("e-o1", VM)
    assert across.returncode == 1
    assert "From 2001:db8:200::1" in across.stdout
    ip("nva", f"route add {VM}/128 via fd00:200::1")
    before = echoes_heard()
    assert ping("nva", VM).returncode == 1
    ip("nva", "route add 2001:db8:a:1::/64 via fd00:200::1")
    assert ping("nva", "2001:db8:a:1:3000::ffff").returncode == 1
    assert echoes_heard() == before


def echoes_heard() -> int:
    return int(guest("cat /proc/net/snmp6").partition("Icmp6InEchos ")[2].split()[0])


@pytest.fixture
def narrow(lab: None) -> Iterator[None]:
    """A router in the underlay, with less room behind it on the way to h3's locator.

    It knows tenants' prefixes by one way, h2, which has no part in what it answers.
    """
    mid = f"ovl-{LAB}-mid"
    subprocess.run(["ip", "netns", "add", mid], check=True)
    try:
        ip("u", f"link add umid mtu {MTU} type veth peer name underlay mtu {MTU} netns {mid}")
        ip("u", "link set umid master br0 up")
        for line in (
            "link set underlay address 02:00:00:00:00:99 up",
            "addr add fd00:200::99/64 dev underlay nodad",
            f"route add 2001:db8:a:3::/64 via fd00:200::3 mtu lock {NARROW}",
            "route add 2001:db8:100::/64 via fd00:200::2",
        ):
            ip("mid", line)
        at("mid", "sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")
        at("mid", "sysctl", "-qw", "net.ipv6.icmp.ratelimit=0")
        yield
    finally:
        for host in ("h1", "h2"):
            straight_to_h3(host)
        subprocess.run(["ip", "netns", "del", mid], check=True)


def narrow_to_h3(host: str) -> None:
    ip(host, "route replace 2001:db8:a:3::/64 via fd00:200::99")


def straight_to_h3(host: str) -> None:
    ip(host, "route replace 2001:db8:a:3::/64 via fd00:200::3")


@pytest.mark.req("R-26")
def test_an_error_from_the_underlay_finds_its_socket_through_a_move(narrow: None) -> None:
    """4.4: the guest is told by a router that quotes a locator, comes by another NVE, and is heard.

    What it has learned holds after its move, and is not asked for again.
    """
    for host in ("h1", "h2"):
        narrow_to_h3(host)
    big = f"ping -6 -c1 -W2 -s 1440 {PEERS['p3']}"
    before = too_big_heard()
    guest(f"{big}; true")
    assert too_big_heard() == before + 1
    assert "1 packets received" in guest(big), "in fragments, now that it knows"
    to_host("h2")
    assert "1 packets received" in guest(big)
    assert too_big_heard() == before + 1
    to_host("h1")


@pytest.mark.req("R-26")
def test_a_peer_learns_the_limit_of_the_way_to_the_new_place(narrow: None) -> None:
    """The peer knows nothing of the move, nor of the locators that the errors quote."""
    large = ("-M", "do", "-s", "1440")
    to_host("h2")
    assert ping("e-p1", VM, *large).returncode == 0
    to_host("h3")
    assert ping("e-p1", VM, *large).returncode == 0
    narrow_to_h3("h1")
    told = ping("e-p1", VM, *large)
    assert f"From fd00:200::99 icmp_seq=1 Packet too big: mtu={NARROW}" in told.stdout
    assert f"mtu {NARROW}" in at("e-p1", "ip", "-6", "route", "get", VM).stdout
    assert ping("e-p1", VM, "-s", "1440").returncode == 0, "in fragments, now that it knows"
    straight_to_h3("h1")
    to_host("h1")


def too_big_heard() -> int:
    return int(guest("cat /proc/net/snmp6").partition("Icmp6InPktTooBigs")[2].split()[0])


def test_a_hop_within_the_underlay_names_itself(narrow: None) -> None:
    """Time Exceeded, repaired like any error."""
    narrow_to_h3("h1")
    # Linux sends few ICMPv6 errors a second to one address, and former tests had some.
    hops = guest(f"traceroute -6 -n -q3 -w2 -m3 {PEERS['p3']}")
    found = re.findall(r"^ ?\d(?:  \*)*  (\S+)", hops, re.MULTILINE)
    assert found == [GATEWAY, "fd00:200::99", PEERS["p3"]], hops


def routes() -> dict[str, list[str]]:
    """Every host route of jade and every neighbour, at each NVE."""
    found = {}
    for host in ("h1", "h2", "h3"):
        shown = (
            at(f"{host}-r77", "ip", *line.split()).stdout
            for line in ("-6 route show", "neigh show nud permanent")
        )
        found[host] = sorted(line for each in shown for line in each.splitlines())
    return found


@pytest.mark.req("R-22")
@pytest.mark.req("R-27")
@pytest.mark.req("R-65")
def test_a_vm_moves_under_streams_and_nothing_is_lost_doubled_or_overtaken(lab: None) -> None:
    """The same handover, with other tables; no route changes, and no packet is encapsulated."""
    before = routes()
    assert before["h1"] == before["h2"] == before["h3"]
    dump = ["tcpdump", "-nn", "-i", "underlay", "-c1", "udp port 4788 or udp port 4789"]
    listening = [
        subprocess.Popen(
            ["ip", "netns", "exec", f"ovl-{LAB}-{host}", *dump],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for host in ("h1", "h2", "h3")
    ]
    peers = [word for name in PEERS for word in ("--peer", name)]
    ok("probe", "start", "web", "--rate", "600", "--lab", LAB, *peers)
    receipts = [to_host(host) for host in ("h2", "h3", "h1")]
    verdict = json.loads(run("probe", "stop", "--lab", LAB, "-o", "json").stdout)
    total = verdict["total"]
    assert (total["lost"], total["duplicated"], total["out_of_order"]) == (0, 0, 0)
    assert all(flow["problem"] == "" for flow in verdict["flows"])
    assert {flow["id"].split("/")[-1] for flow in verdict["flows"]} == {"ipv6", "tcp"}
    for receipt in receipts:
        assert receipt["packets"]["dropped"] == {}
        assert receipt["packets"]["redirected"] > 0
        assert receipt["tunnel_close_reason"] == "all peers acknowledged"
        shown = ok("migration", "show", receipt["id"], "-o", "json")
        assert shown == receipt
    assert routes() == before
    for each in listening:
        assert each.poll() is None, "a packet was encapsulated"
        each.terminate()
        each.communicate()


def ends(sock: socket.socket) -> tuple[Any, Any]:
    return sock.getsockname(), sock.getpeername()


@pytest.mark.req("R-26")
@pytest.mark.req("R-30")
def test_both_ends_see_the_same_addresses_and_an_idle_connection_lives(lab: None) -> None:
    """R-26: getsockname and getpeername at both ends, before and after; no locator in either."""
    guest("nc -ll -p 7006 -e cat > /dev/null 2>&1 & sleep 1")
    seen = "netstat -tn | grep :7006"
    with inside(path_of(f"ovl-{LAB}-e-p2")):
        client = socket.create_connection((VM, 7006), timeout=20)
    with client:
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        here, there = ends(client), guest(seen).split()
        for host in ("h3", "h2", "h1"):
            to_host(host)
            assert (ends(client), guest(seen).split()) == (here, there)
        assert here[0][0] == PEERS["p2"]
        assert here[1][0] == VM
        client.sendall(b"after")
        assert client.recv(100) == b"after"


def test_a_suspended_vm_moves_cold(lab: None) -> None:
    """The table of requirements.md 6-3 is the bridge's: what comes meanwhile is dropped there."""
    ok("vm", "suspend", "web")
    receipt = ok("vm", "migrate", "web", "--to", "h2", "--cold", "-o", "json")
    assert receipt["outcome"] == "moved"
    ok("vm", "resume", "web")
    assert ping("e-p1", VM).returncode == 0
    to_host("h1")


@pytest.mark.req("R-12")
@pytest.mark.req("R-47")
def test_a_vm_moves_warm_under_streams(lab: None) -> None:
    """R-12, R-47: checkpoints go by the hosts' own addresses; the move itself is the hot one."""
    peers = [word for name in PEERS for word in ("--peer", name)]
    ok("probe", "start", "web", "--rate", "600", "--lab", LAB, *peers)
    options = ("--warm", "--interval", "500ms", "--checkpoints", "3", "--verify")
    receipt = ok("vm", "migrate", "web", "--to", "h2", *options, "-o", "json")
    total = json.loads(run("probe", "stop", "--lab", LAB, "-o", "json").stdout)["total"]
    assert (total["lost"], total["duplicated"], total["out_of_order"]) == (0, 0, 0)
    assert (receipt["mode"], receipt["outcome"]) == ("warm", "moved")
    assert receipt["checkpoints"]["count"] == 3
    assert receipt["memory"]["digest"]
    assert receipt["tunnel_close_reason"] == "all peers acknowledged"
    to_host("h1")


def test_a_restarted_daemon_takes_its_tables_over(lab: None) -> None:
    """Not one packet is lost."""
    pinging = subprocess.Popen(
        ["ip", "netns", "exec", f"ovl-{LAB}-e-p2", "ping", "-c100", "-i0.02", "-W2", VM],
        stdout=subprocess.PIPE,
        text=True,
    )
    for host in ("h1", "h2"):
        ok("lab", "restart", host, "--name", LAB)
    said, _ = pinging.communicate(timeout=60)
    assert " 0% packet loss" in said
    to_host("h2")
    to_host("h1")


def test_nothing_is_left_when_the_last_tenant_goes(lab: None) -> None:
    made = ("--network", "onyx", "--host", "h3")
    ok("vm", "create", "short", *made)
    assert "ovi78" in at("h3", "ip", "-o", "link").stdout
    ok("vm", "delete", "short")
    deadline_s = time.monotonic() + 10
    while os.path.exists(path_of(f"ovl-{LAB}-h3-r78")):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert "ovi78" not in at("h3", "ip", "-o", "link").stdout
