"""Real VMs move cold between real daemons: running, paused, aborted, with daemons killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from overland.lab.topology import LABS
from overland.model.handover import FORWARD
from tests.lab.chaos import Lab
from tests.lab.command import ok, run
from tests.lab.test_hot_move import wait_for

LAB = "ovcold"
RUN = LABS / LAB / "run"
pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        run("lab", "down", "--name", LAB)
        ok("lab", "up", "--name", LAB)
        try:
            for name, vni in (("blue", 42), ("green", 43)):
                subnets = ("--ipv4", f"10.{vni}.0.0/24", "--ipv6", f"fd{vni}::/64")
                ok("network", "create", name, "--vni", str(vni), *subnets)
            for n in (1, 2, 3):
                place = ("--lab", LAB, "--host", f"h{n}", "--network", "blue")
                ok("lab", "endpoint", "add", f"blue{n}", *place)
            place = ("--lab", LAB, "--host", "h3", "--network", "green")
            ok("lab", "endpoint", "add", "green3", *place)
            ok("vm", "create", "web", "--network", "blue", "--network", "green", "--host", "h1")
            yield
        finally:
            run("lab", "down", "--name", LAB)


def shown(name: str = "web") -> Any:
    return ok("vm", "show", name, "-o", "json")


def elsewhere(name: str = "web") -> str:
    return "h1" if shown(name)["host"] != "h1" else "h2"


def boot_id() -> str:
    command = ("cat", "/proc/sys/kernel/random/boot_id")
    return str(ok("lab", "guest", "web", "--lab", LAB, "--", *command))


def files() -> list[str]:
    """Saved states and what was taken for moves, on all hosts."""
    found = (*RUN.glob("*/suspended/*"), *RUN.glob("*/taken/*"))
    return [str(path.relative_to(RUN)) for path in found]


def marked(host: str) -> str:
    command = ("nft", "list", "set", "bridge", "overland", "in_transit")
    return str(ok("lab", "exec", host, "--name", LAB, "--", *command))


def nothing_left() -> None:
    assert files() == []
    wait_for(lambda: all("elements" not in marked(host) for host in ("h1", "h2", "h3")))


@pytest.mark.req("R-12")
@pytest.mark.req("R-33")
@pytest.mark.req("R-34")
@pytest.mark.req("6-13")
def test_a_running_vm_moves_cold_under_traffic(lab: None) -> None:
    """R-33, R-34, 6-13: both networks' interfaces go as one; nothing comes after the stop."""
    same, new = boot_id(), elsewhere()
    address = shown()["interfaces"][0]["ipv4"]
    pings = [
        subprocess.Popen(
            ["ip", "netns", "exec", f"ovl-{LAB}-e-blue{n}", "ping", "-q", "-i", "0.01", address],
            stdout=subprocess.DEVNULL,
        )
        for n in (1, 2, 3)
    ]
    receipt = ok("vm", "migrate", "web", "--to", new, "--cold", "-o", "json")
    for ping in pings:
        ping.send_signal(signal.SIGINT)
        ping.wait(timeout=10)
    assert (receipt["mode"], receipt["outcome"]) == ("cold", "moved")
    assert receipt["outage_ms"] >= receipt["vm_stop_ms"] > 0
    assert receipt["packets"]["dropped"]["in_transit"] > 0
    assert receipt["packets"]["residual"] == 0
    assert receipt["memory"]["sent_bytes"] > 1 << 20
    peers = receipt["peers"]
    assert peers["acknowledged"] == peers["subscribed"] == 2
    now = shown()
    assert (now["host"], now["state"], now["version"]) == (new, "running", 2)
    assert boot_id() == same
    nothing_left()
    for device in ("ovx42", "ovx43"):
        entries = ok(
            "lab", "exec", "h3", "--name", LAB, "--", "bridge", "fdb", "show", "dev", device
        )
        macs = [each["mac"] for each in now["interfaces"]]
        assert any(f"{mac} dst 10.200.0.{new[1:]}" in entries for mac in macs)


@pytest.mark.req("R-48")
def test_a_paused_vm_is_paused_at_the_end(lab: None) -> None:
    same, new = boot_id(), elsewhere()
    ok("vm", "pause", "web")
    ok("vm", "migrate", "web", "--to", new, "--cold")
    assert (shown()["host"], shown()["state"]) == (new, "paused")
    ok("vm", "resume", "web")
    assert boot_id() == same
    nothing_left()


def begun(new: str) -> str:
    return str(ok("vm", "migrate", "web", "--to", new, "--cold", "--no-wait")).strip()


def phase(move: str) -> str:
    return str(ok("migration", "show", move, "-o", "json")["phase"])


@pytest.mark.req("R-14")
def test_an_abort_wakes_the_vm_where_it_was(lab: None) -> None:
    same, old = boot_id(), shown()["host"]
    move = begun(elsewhere())
    wait_for(lambda: phase(move) not in ("planned", "staged"))
    done = run("migration", "abort", move, "-o", "json")
    moved = done.returncode == 3  # it had been committed already
    assert moved or json.loads(done.stdout)["outcome"] == "aborted"
    assert moved == (shown()["host"] != old)
    assert shown()["state"] == "running"
    assert boot_id() == same
    nothing_left()


@pytest.mark.req("R-14")
@pytest.mark.parametrize("who", ["nva", "old", "new"])
@pytest.mark.parametrize("when", ["paused", "committed"])
def test_a_daemon_killed_in_the_middle_leaves_one_vm_and_no_file(
    lab: None, who: str, when: str
) -> None:
    """Before the commit either way will do; the VM runs once, where the record says."""
    same, old, new = boot_id(), shown()["host"], elsewhere()
    move = begun(new)
    after = FORWARD[FORWARD.index(when) :]
    wait_for(lambda: phase(move) in (*after, "aborting", "aborted"))
    name = {"nva": "nva", "old": old, "new": new}[who]
    os.kill(int((LABS / LAB / f"{name}.pid").read_text()), signal.SIGKILL)
    ok("lab", "restart", name, "--name", LAB)
    receipt = json.loads(run("migration", "watch", move, "-o", "json").stdout)
    assert receipt["outcome"] in ("moved", "aborted")
    wait_for(lambda: shown()["state"] == "running")
    assert shown()["host"] == (new if receipt["outcome"] == "moved" else old)
    assert len(list(RUN.glob("*/web/pid"))) == 1
    assert boot_id() == same
    nothing_left()


def taken_at(host: str) -> bool:
    return any((RUN / host / "taken").glob("[!.]*"))


@pytest.mark.req("R-12")
@pytest.mark.req("R-14")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("recovers", [True, False])
def test_a_vm_whose_new_host_dies_before_it_wakes_is_not_lost(lab: None, recovers: bool) -> None:
    """HO-43, HO-52: it is recovered where it was, or it wakes when its new host is back."""
    domain = Lab(LAB)
    same, old, new = boot_id(), shown()["host"], elsewhere()
    move = begun(new)
    deadline_s = time.monotonic() + 30
    while not taken_at(new):  # whole at the new host, which is about to hear of the commit
        assert time.monotonic() < deadline_s
    with domain.dead(new):
        receipt = json.loads(run("migration", "watch", move, "-o", "json").stdout)
        moved = receipt["outcome"] == "moved"  # else it died before it had said that it has it
        if moved:
            assert (shown()["host"], shown()["state"]) == (new, "suspended")
        if moved and recovers:
            told = ok("vm", "recover", "web", "-o", "json")
            assert (told["host"], told["version"]) == (old, receipt["version"] + 1)
            assert told["age_ms"] > 0
            assert boot_id() == same
    wait_for(lambda: shown()["state"] == "running")
    assert shown()["host"] == (new if moved and not recovers else old)
    wait_for(lambda: files() == [])
    assert len(list(RUN.glob("*/web/pid"))) == 1
    assert boot_id() == same
