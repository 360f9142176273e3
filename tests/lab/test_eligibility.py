"""Who may be moved, asked of the real daemons by the commands, with real certificates."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

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
