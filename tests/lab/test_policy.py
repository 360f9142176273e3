"""Two routed networks whose tenants may talk, on the real kernel, while one of them moves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator

import pytest

from overland.lab.topology import LABS
from tests.lab.command import ok, run, within
from tests.lab.talk import Talk

LAB = "ovpol"
VM = {4: "10.42.0.50", 6: "fd42::50"}
FAR = {4: "10.43.0.2", 6: "fd43::2"}
GATEWAY = {4: "10.42.0.1", 6: "fd42::1"}
pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(180)]


def at(place: str, *command: str) -> subprocess.CompletedProcess[str]:
    return within(f"ovl-{LAB}-{place}", *command)


def guest(command: str) -> str:
    return str(ok("lab", "guest", "web", "--name", LAB, "--", command))


def ping(place: str, address: str, *more: str) -> subprocess.CompletedProcess[str]:
    return at(place, "ping", "-c1", "-W1", *more, address)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """red with web and p1 on h1, brown with b2 on h2, green with g3 on h3.

    What brown carries is smaller.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        run("lab", "down", "--name", LAB)
        ok("lab", "up", "--name", LAB)
        try:
            for n, name, mtu in ((42, "red", 1500), (43, "brown", 1400), (44, "green", 1500)):
                subnets = ("--ipv4", f"10.{n}.0.0/24", "--ipv6", f"fd{n}::/64", "--kind", "l3")
                ok("network", "create", name, "--vni", str(n), "--mtu", str(mtu), *subnets)
            for name, host, network in (
                ("p1", "h1", "red"),
                ("b2", "h2", "brown"),
                ("g3", "h3", "green"),
            ):
                place = ("--host", host, "--network", network, "--lab", LAB)
                ok("lab", "endpoint", "add", name, *place)
            face = f"red,ipv4={VM[4]},ipv6={VM[6]}"
            ok("vm", "create", "web", "--host", "h1", "--network", face)
            guest("true")
            yield
        finally:
            run("lab", "down", "--name", LAB)
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert f"ovl-{LAB}-" not in left


@pytest.mark.req("N-15")
@pytest.mark.parametrize("family", [4, 6])
def test_by_default_two_networks_have_no_way(lab: None, family: int) -> None:
    sent = ping("e-b2", VM[family])
    assert sent.returncode == 1
    assert f"From {GATEWAY[family].replace('42', '43')}" in sent.stdout
    assert "1 received" not in guest(f"ping -{family} -c1 -W1 {FAR[family]}; true")


def test_what_cannot_be_is_refused(lab: None) -> None:
    ok("network", "create", "again", "--vni", "52", "--kind", "l3", "--ipv4", "10.42.0.0/16")
    refused = run("network", "allow", "again", "red")
    assert refused.returncode == 3
    assert "10.42.0.0/24 of network red overlaps 10.42.0.0/16" in refused.stderr
    assert run("network", "allow", "red", "nil").returncode == 3
    assert ok("network", "policies", "-o", "json") == []


@pytest.mark.req("N-15")
@pytest.mark.req("R-44")
def test_allowed_they_talk_on_every_host_at_once(lab: None) -> None:
    """The command returns when all have it. R-44: h3, with a tenant of green, hears nothing."""
    answer = ok("network", "allow", "red", "brown", "-o", "json")
    assert answer == {"networks": ["brown", "red"], "allowed": True, "waiting": []}
    for family in (4, 6):
        assert "ttl=62" in ping("e-b2", VM[family]).stdout, "two routers, one after the other"
        assert "1 packets received" in guest(f"ping -{family} -c1 -W2 {FAR[family]}")
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    routers = set(re.findall(rf"ovl-{LAB}-(h\d-r\d+)", names))
    assert routers == {f"h{h}-r{n}" for h in (1, 2) for n in (42, 43)} | {"h3-r44"}
    assert run("network", "delete", "brown").returncode == 3


@pytest.mark.parametrize("family", [4, 6])
def test_who_sends_more_than_the_other_network_carries_is_told(lab: None, family: int) -> None:
    big = ping("e-p1", FAR[family], "-M", "do", "-s", "1440")
    assert f"From {GATEWAY[family].replace('42', '43')}" in big.stdout
    assert "1400" in big.stdout
    largest = str(1400 - {4: 28, 6: 48}[family])
    assert ping("e-p1", FAR[family], "-M", "do", "-s", largest).returncode == 0


@pytest.mark.req("N-15")
@pytest.mark.parametrize("family", [4, 6])
def test_who_makes_up_an_address_is_not_heard(lab: None, family: int) -> None:
    """An address of a third network, or one of the network that he sends to."""
    before = at("e-b2", "ip", "addr", "show", "dev", "eth0").stdout
    for made_up in ({4: "10.44.0.9", 6: "fd44::9"}[family], VM[family].replace("50", "77")):
        own = f"{made_up}/{32 if family == 4 else 128}"
        at("e-b2", "ip", "addr", "add", own, "dev", "eth0", "nodad")
        heard = received(family)
        assert ping("e-b2", VM[family], "-I", made_up).returncode == 1
        assert received(family) == heard
        at("e-b2", "ip", "addr", "del", own, "dev", "eth0")
    assert at("e-b2", "ip", "addr", "show", "dev", "eth0").stdout == before


def received(family: int) -> int:
    """How many echo requests the VM has had."""
    if family == 6:
        return int(guest("cat /proc/net/snmp6").partition("Icmp6InEchos")[2].split()[0])
    names, values = re.findall(r"^Icmp: (.*)", guest("cat /proc/net/snmp"), re.MULTILINE)
    return int(dict(zip(names.split(), values.split(), strict=True))["InEchos"])


@pytest.mark.req("N-15")
@pytest.mark.req("R-26")
@pytest.mark.req("R-30")
@pytest.mark.parametrize("family", [4, 6])
def test_what_is_allowed_goes_through_hot_moves_to_every_host(lab: None, family: int) -> None:
    """To a host that had neither network, and to the other tenant's own; nothing is lost."""
    port = 7000 + family
    guest(f"nc -ll -p {port} -e cat > /dev/null 2>&1 & sleep 1")
    talk = Talk(f"ovl-{LAB}-e-b2", VM[family], port)
    seen = f"netstat -tn | grep :{talk.socket.getsockname()[1]}"
    here, there = talk.ends(), guest(seen).split()[3:]
    pinging = subprocess.Popen(
        ["ip", "netns", "exec", f"ovl-{LAB}-e-b2", "ping", "-i0.01", "-W2", VM[family]],
        stdout=subprocess.PIPE,
        text=True,
    )
    idle = Talk(f"ovl-{LAB}-e-b2", VM[family], port)
    talk.start()
    for to in ("h3", "h2", "h1"):
        before = talk.answers
        receipt = ok("vm", "migrate", "web", "--to", to, "-o", "json")
        assert receipt["outcome"] == "moved"
        assert receipt["packets"]["dropped"] == {}
        assert receipt["tunnel_close_reason"] == "all peers acknowledged"
        assert talk.answers > before
        assert (talk.ends(), guest(seen).split()[3:]) == (here, there)
    talk.over.set()
    talk.join(20)
    talk.socket.close()
    assert talk.failure == ""
    idle.socket.sendall(b"after")
    assert idle.socket.recv(100) == b"after", "R-30: no state of it was anywhere to expire"
    idle.socket.close()
    pinging.send_signal(2)
    said, _ = pinging.communicate(timeout=20)
    answered = [int(number) for number in re.findall(r"icmp_seq=(\d+)", said)]
    # Not the one that was on its way when ping was interrupted.
    assert answered == list(range(1, len(answered) + 1))


def test_what_is_allowed_is_there_after_a_cold_move(lab: None) -> None:
    """R-33: on its way the address is silence to the other network, too; then it answers."""
    for to in ("h3", "h1"):
        receipt = ok("vm", "migrate", "web", "--to", to, "--cold", "-o", "json")
        assert receipt["outcome"] == "moved"
        assert receipt["packets"]["residual"] == 0
        assert ping("e-b2", VM[4]).returncode == 0
        assert ping("e-b2", VM[6]).returncode == 0


def test_a_restarted_daemon_takes_the_way_over(lab: None) -> None:
    """Not one packet is lost."""
    pinging = subprocess.Popen(
        ["ip", "netns", "exec", f"ovl-{LAB}-e-b2", "ping", "-c100", "-i0.02", "-W2", VM[4]],
        stdout=subprocess.PIPE,
        text=True,
    )
    ok("lab", "restart", "h2", "--name", LAB)
    said, _ = pinging.communicate(timeout=60)
    assert " 0% packet loss" in said


@pytest.mark.req("N-15")
def test_a_host_that_does_not_hear_of_a_denial_is_named(lab: None) -> None:
    """Its NVE goes on with what it has (6-10); when it is back it hears of it."""
    os.kill(int((LABS / LAB / "h2.pid").read_text()), signal.SIGKILL)
    denied = run("network", "deny", "red", "brown")
    assert denied.returncode == 1
    assert "not yet denied on h2" in denied.stderr
    assert ok("network", "policies", "-o", "json") == []
    assert "to42" in at("h2-r43", "ip", "-o", "link").stdout
    ok("lab", "restart", "h2", "--name", LAB)
    ok("network", "deny", "red", "brown")  # returns when it is so everywhere
    assert ping("e-b2", VM[4]).returncode == 1
    assert "to42" not in at("h2-r43", "ip", "-o", "link").stdout


@pytest.mark.req("N-15")
@pytest.mark.parametrize("order", [("brown", "red"), ("red", "brown")])
def test_denied_again_they_have_no_way_and_nothing_is_left(lab: None, order: tuple[str]) -> None:
    """Also a connection that lives ends; the command returns when it is so."""
    ok("network", "allow", "red", "brown")
    assert ping("e-b2", VM[4]).returncode == 0
    answer = ok("network", "deny", *order, "-o", "json")
    assert answer == {"networks": ["brown", "red"], "allowed": False, "waiting": []}
    for family in (4, 6):
        assert ping("e-b2", VM[family]).returncode == 1
    tables = at("h1-r42", "nft", "list", "tables").stdout
    assert "to43" not in tables + at("h1-r42", "ip", "-o", "link").stdout
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert f"ovl-{LAB}-h1-r43" not in names
    assert f"ovl-{LAB}-h2-r42" not in names
