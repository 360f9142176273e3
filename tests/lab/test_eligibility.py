"""Who may be moved, asked of the real daemons by the commands, with real certificates."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from overland.lab.topology import LABS
from tests.lab.command import within

OVERLAND = (sys.executable, "-m", "overland")
LAB = "ovelig"
FAR = "198.51.100.1"
pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(180)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*OVERLAND, *arguments], capture_output=True, text=True, check=False)


def ok(*arguments: str) -> Any:
    done = run(*arguments, "-o", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if done.stdout else None


def eligibility(verb: str, *more: str) -> Any:
    return ok("vm", "eligibility", verb, "web", *more)


def refused(*arguments: str) -> str:
    """The lines that a refused command says; its exit code is that of every refusal."""
    done = run("vm", *arguments)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def moved() -> Any:
    to = "h2" if ok("vm", "show", "web")["host"] == "h1" else "h1"
    receipt = ok("vm", "migrate", "web", "--to", to)
    assert receipt["outcome"] == "moved"
    return receipt["eligibility"]


def certificate(owner: str) -> tuple[str, ...]:
    made = ok("lab", "owner", owner, "--name", LAB)
    return "--certificate", made["certificate"], "--key", made["key"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """web belongs to alice, in an L2 network: a correspondent outside has no gateway."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        run("lab", "down", "--name", LAB)
        ok("lab", "up", "--hosts", "2", "--name", LAB)
        try:
            ok("network", "create", "blue", "--vni", "42", "--ipv4", "10.42.0.0/24")
            ok("vm", "create", "web", "--host", "h1", "--network", "blue", "--owner", "alice")
            yield
        finally:
            run("lab", "down", "--name", LAB)


@pytest.mark.req("R-19")
@pytest.mark.req("R-23")
def test_a_dry_run_shows_every_blocker_and_the_move_is_refused(lab: None) -> None:
    said = eligibility("set", "--outside", FAR, "--outside", "2001:db8::/32", "--latency", "fixed")
    assert said["declared"]["origin"] == "operator"
    assert not said["covered"]
    for command in (("--dry-run",), (), ("--cold",), ("--warm",)):
        lines = refused("migrate", "web", "--to", "h2", *command).splitlines()
        assert [line.rsplit("(code ", 1)[1].partition(")")[0] for line in lines] == [
            "latency_class",
            "outside_not_covered",
            "outside_not_covered",
        ]
        assert FAR in lines[1]
        assert "2001:db8::/32" in lines[2]
    assert ok("migration", "list") == []
    assert eligibility("set", "--outside", FAR, "--latency", "any")["latency"] == "any"


@pytest.mark.req("R-19")
@pytest.mark.req("R-28")
def test_as_configured_it_moves_and_the_receipt_says_what_was_left_behind(lab: None) -> None:
    eligibility("set", "--uncovered", "flag")
    (before,) = ok("vm", "migrate", "web", "--to", "h2", "--dry-run")["flags"]
    assert FAR in before
    grounds = moved()
    assert grounds["basis"] == "covered"
    (flag,) = grounds["flags"]
    assert FAR in flag
    eligibility("set", "--uncovered", "refuse")


@pytest.mark.req("R-25")
@pytest.mark.req("R-28")
def test_only_its_owner_registers_a_vm_and_the_move_says_so(lab: None) -> None:
    """R-25: authenticated; revoked by him with his certificate, by the operator without."""
    alice, bob = certificate("alice"), certificate("bob")
    assert "belongs to alice" in refused("eligibility", "register", "web", *bob)
    assert "outside_not_covered" in refused("migrate", "web", "--to", "h2", "--dry-run")
    assert eligibility("register", *alice)["registered"]["origin"] == "owner:alice"
    grounds = moved()
    assert (grounds["basis"], grounds["origin"]) == ("registered", "owner:alice")
    assert eligibility("revoke", *alice)["revoked"]["origin"] == "owner:alice"
    elsewhere = "h2" if ok("vm", "show", "web")["host"] == "h1" else "h1"
    assert "outside_not_covered" in refused("migrate", "web", "--to", elsewhere)
    eligibility("register", *alice)
    assert eligibility("revoke")["revoked"]["origin"] == "operator"
    assert "not_registered" in refused("eligibility", "revoke", "web")


@pytest.mark.req("R-28")
def test_what_was_said_is_there_after_the_nva_was_restarted(lab: None) -> None:
    before = eligibility("show")
    ok("lab", "restart", "nva", "--name", LAB)
    assert eligibility("show") == before


@pytest.mark.req("R-62")
def test_a_class_asks_how_long_the_stop_will_be_before_it_lets_the_vm_move(lab: None) -> None:
    """R-62: also under emulation, where a move does not wait for a forecast otherwise."""
    eligibility("set", "--outside", "none", "--latency", "interactive")
    host = ok("vm", "show", "web")["host"]
    to = "h2" if host == "h1" else "h1"
    assert "is not known" in refused("migrate", "web", "--to", to, "--cold")
    receipt = ok("vm", "migrate", "web", "--to", to)
    assert receipt["forecast"]["stop_ms"] <= 1000
    assert receipt["eligibility"]["flags"] == []
    assert eligibility("show")["outage_ms"]["hot"] > 0


def test_what_is_wrong_is_one_clear_line(lab: None) -> None:
    for arguments, code in (
        (("set", "web", "--latency", "soon"), 2),
        (("set", "web", "--uncovered", "maybe"), 2),
        (("set", "web", "--outside", "example.org"), 3),
        (("show", "nil"), 3),
        (("register", "web", "--certificate", "/nil", "--key", "/nil"), 1),
        (("register", "web", "--certificate", "/etc/hosts", "--key", "/etc/hosts"), 2),
        (("revoke", "web", "--key", "/nil"), 2),
    ):
        done = run("vm", "eligibility", *arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


# ------------------------------------------------------------ to another address

APP, APP_NEW = "10.43.0.50", "10.43.0.60"


def in_guest(command: str) -> str:
    done = run("lab", "guest", "app", "--name", LAB, "--", command)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def app(lab: None, tmp_path_factory: pytest.TempPathFactory) -> None:
    """app belongs to alice, in a routed network: who has no route to an address has no answer.

    The NVA has a name server, and nobody in the lab hears any: the first of all name servers is
    silence.
    """
    key = tmp_path_factory.mktemp("dns") / "key"
    key.write_text("c2VjcmV0\n")
    with (LABS / LAB / "nva.toml").open("a") as settings:
        settings.write(
            '\n[dns]\nserver = "127.0.0.1"\nzone = "example.org"\nkey_name = "overland"\n'
            f'key_file = "{key}"\n'
        )
    ok("lab", "restart", "nva", "--name", LAB)
    ok("network", "create", "green", "--vni", "43", "--kind", "l3", "--ipv4", "10.43.0.0/24")
    for name, host in (("near", "h1"), ("far", "h2")):
        ok("lab", "endpoint", "add", name, "--host", host, "--network", "green", "--lab", LAB)
    face = f"green,ipv4={APP}"
    ok("vm", "create", "app", "--host", "h1", "--network", face, "--owner", "alice")
    in_guest(f"ip addr add {APP_NEW}/32 dev eth0")  # how it learns of it is its owner's business
    _block_names()


def _block_names() -> None:
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    for place in re.findall(rf"^(ovl-{LAB}-\S+)", names, re.MULTILINE):
        for line in (
            "add table inet nodns",
            "add chain inet nodns every { type filter hook prerouting priority 0; }",
            "add rule inet nodns every meta l4proto { tcp, udp } th dport 53 counter drop",
        ):
            subprocess.run(["ip", "netns", "exec", place, "nft", line], check=True)


def asked_for_names() -> int:
    """Packets to name servers that were dropped in the NVA's namespace."""
    nva = json.loads((LABS / LAB / "state.json").read_text())["nvas"][0]["namespace"]
    shown = ["ip", "netns", "exec", nva, "nft", "list", "table", "inet", "nodns"]
    text = subprocess.run(shown, capture_output=True, text=True, check=True).stdout
    return sum(int(each) for each in re.findall(r"packets (\d+)", text))


class Pings:
    """A hundred a second from each peer to one address, until they are ended."""

    def __init__(self, address: str) -> None:
        self._running = [
            subprocess.Popen(
                ["ip", "netns", "exec", f"ovl-{LAB}-e-{peer}", "ping", "-i0.01", "-W2", address],
                stdout=subprocess.PIPE,
                text=True,
            )
            for peer in ("near", "far")
        ]

    def lost(self) -> list[int]:
        """The numbers of those that were not answered; the last one may still be under way."""
        lost: list[int] = []
        for each in self._running:
            each.send_signal(signal.SIGINT)
            said, _ = each.communicate(timeout=30)
            found = re.search(r"(\d+) packets transmitted", said)
            assert found is not None, said
            assert "DUP!" not in said
            answered = {int(number) for number in re.findall(r"icmp_seq=(\d+) ttl=", said)}
            assert len(answered) > 10
            lost += sorted(set(range(1, int(found[1]))) - answered)
        return lost


def until(holds: Callable[[], Any]) -> Any:
    deadline_s = time.monotonic() + 60
    while not (found := holds()):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    return found


def wish(**more: Any) -> dict[str, Any]:
    """Another address for app, as the command asks for it."""
    addresses = [{"network": "green", "ipv4": APP_NEW}]
    return {"to": "h2", "options": {"addresses": addresses, "keep_old_s": 5.0}, **more}


def asked(path: str, body: Any = None) -> Any:
    """What the API answers; it is asked often, and a command takes a second."""
    url = f"{json.loads((LABS / LAB / 'state.json').read_text())['api']}/v1/{path}"
    data = json.dumps(body).encode() if body is not None else None
    with urllib.request.urlopen(urllib.request.Request(url, data)) as answer:
        return json.loads(answer.read())


def taken() -> bool:
    """Whether another tenant is refused app's former address."""
    face = {"network": "green", "mac": "", "ipv4": APP}
    body = {"name": "heir", "host": "h1", "namespace": f"ovl-{LAB}-e-heir", "interface": face}
    try:
        asked("endpoints", body)
    except urllib.error.HTTPError as refusal:
        with refusal:
            problem = json.loads(refusal.read())
        return problem["code"] == "address_taken" and "app keeps it until" in problem["hint"]
    return False


CHANGE = ("--change-address", f"green,ipv4={APP_NEW}")


@pytest.mark.req("R-24")
@pytest.mark.req("R-25")
@pytest.mark.req("R-27")
def test_a_registered_vm_moves_to_another_address_and_nothing_is_lost_at_either(app: None) -> None:
    """R-25: on its owner's word only. R-27: with DNS blocked everywhere.

    Both addresses answer from the beginning of the move to the end of the time for which the old
    one is kept; then that one is free, and another tenant gets it.
    """
    for more in ((), ("--dry-run",)):
        assert "has not registered" in refused("migrate", "app", "--to", "h2", *CHANGE, *more)
    ok("vm", "eligibility", "register", "app", *certificate("alice"))
    to_old, before = Pings(APP), asked_for_names()
    move = asked("vms/app/migrate", wish())["id"]

    def shown() -> Any:
        return asked(f"migrations/{move}")

    until(lambda: shown()["phase"] != "planned")
    to_new = Pings(APP_NEW)
    until(lambda: shown()["outcome"] != "open")
    assert taken()
    (face,) = asked("vms/app")["interfaces"]
    assert (to_old.lost(), to_new.lost()) == ([], [])
    assert (face["ipv4"], [each["address"] for each in face["former"]]) == (APP_NEW, [APP])
    receipt = shown()
    assert receipt["outcome"] == "moved"
    assert receipt["packets"]["dropped"] == {}
    grounds = receipt["eligibility"]
    assert (grounds["basis"], grounds["origin"]) == ("registered", "owner:alice")
    assert receipt["addresses"]["changes"] == [{"network": "green", "old": [APP], "new": [APP_NEW]}]
    receipt = until(lambda: r if (r := shown())["addresses"]["old_ended"] else None)
    assert receipt["addresses"]["old_ended_because"] == "its time was over"
    assert receipt["addresses"]["old_ended"] >= receipt["addresses"]["old_until"]
    receipt = until(lambda: r if (r := shown())["addresses"]["dns"] else None)
    assert receipt["addresses"]["dns"] == "not updated: 127.0.0.1: no answer in 6 s"
    assert asked_for_names() > before
    in_guest(f"ip addr del {APP}/32 dev eth0")
    heir = ("--host", "h1", "--network", "green", "--ipv4", APP)
    ok("lab", "endpoint", "add", "heir", *heir, "--lab", LAB)
    for address in (APP, APP_NEW):
        ping = ("ping", "-c20", "-i0.01", "-W2", address)
        assert " 0% packet loss" in within(f"ovl-{LAB}-e-far", *ping).stdout


@pytest.mark.req("R-25")
def test_neither_a_drain_nor_any_other_move_changes_an_address(app: None) -> None:
    """R-25: it is never chosen; and what was revoked allows it no more."""
    ok("vm", "eligibility", "register", "app", *certificate("alice"))
    host = ok("vm", "show", "app")["host"]
    faces = ok("vm", "show", "app")["interfaces"]
    drained = {each["vm"]: each for each in ok("host", "drain", host)}
    ok("host", "undrain", host)
    assert (drained["app"]["outcome"], drained["app"]["addresses"]) == ("moved", None)
    assert drained["app"]["eligibility"]["basis"] == "covered"
    assert ok("vm", "show", "app")["interfaces"] == faces
    ok("vm", "eligibility", "revoke", "app")
    other = ("--change-address", "green,ipv4=10.43.0.70")
    assert "revoked by operator" in refused("migrate", "app", "--to", host, *other)
