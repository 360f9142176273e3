"""A real VM moves between real daemons in namespaces, under numbered streams."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overland.dataplane.namespace import inside, path_of
from overland.dataplane.nftables import Nftables
from overland.lab.topology import LABS
from overland.model.handover import FORWARD
from overland.model.names import port_name
from tests.lab.command import OVERLAND, ok, run

LAB = "ovtest"
pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    context = tmp_path_factory.mktemp("config")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(context))
        run("lab", "down", "--name", LAB)
        ok("lab", "up", "--name", LAB)
        try:
            for name, vni, underlay in (("blue", 42, "ipv4"), ("green", 43, "ipv6")):
                ok(
                    *("network", "create", name, "--vni", str(vni), "--underlay", underlay),
                    *("--ipv4", f"10.{vni}.0.0/24", "--ipv6", f"fd{vni}::/64"),
                )
                for n in (1, 2, 3):
                    ok(
                        *("lab", "endpoint", "add", f"{name}{n}", "--lab", LAB),
                        *("--host", f"h{n}", "--network", name),
                    )
            for name, network in (("web", "blue"), ("six", "green"), ("still", "blue")):
                ok("vm", "create", name, "--network", network, "--host", "h1")
            yield
        finally:
            run("lab", "down", "--name", LAB)
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert f"ovl-{LAB}-" not in left


def peers(network: str) -> list[str]:
    return [word for n in (1, 2, 3) for word in ("--peer", f"{network}{n}")]


def lost_nothing(verdict: dict[str, Any]) -> None:
    total = verdict["total"]
    assert (total["lost"], total["duplicated"], total["out_of_order"]) == (0, 0, 0)
    assert all(flow["problem"] == "" for flow in verdict["flows"])


@pytest.mark.req("R-37")
def test_a_vm_moves_around_under_traffic(lab: None) -> None:
    ok("probe", "start", "web", "--rate", "600", "--lab", LAB, *peers("blue"))
    receipts = [ok("vm", "migrate", "web", "--to", host, "-o", "json") for host in ("h2", "h3")]
    verdict = json.loads(run("probe", "stop", "--lab", LAB, "-o", "json").stdout)
    lost_nothing(verdict)
    for receipt, version in zip(receipts, (2, 3), strict=True):
        assert receipt["outcome"] == "moved"
        assert receipt["version"] == version
        assert receipt["tunnel_close_reason"] == "all peers acknowledged"
        assert receipt["packets"]["dropped"] == {}
    shown = ok("vm", "show", "web", "-o", "json")
    assert (shown["host"], shown["state"], shown["move"]) == ("h3", "running", None)
    for host in ("h1", "h2", "h3"):
        links = ok("lab", "exec", host, "--name", LAB, "--", "ip", "-o", "link")
        assert "ovm" not in links, "a tunnel is left"


@pytest.mark.req("R-07")
@pytest.mark.req("R-41")
@pytest.mark.req("R-52")
def test_inner_ipv4_ipv6_and_other_frames_move_over_an_ipv6_underlay(lab: None) -> None:
    """One L2 move carries all three; there is no TCP whose end could be waited for (R-41)."""
    sent = 1500
    dropped = "cat /sys/class/net/eth0/statistics/rx_dropped"
    before = int(ok("lab", "guest", "six", "--name", LAB, "--", dropped))
    mac = ok("vm", "show", "six", "-o", "json")["interfaces"][0]["mac"]
    ok("probe", "start", "six", "--rate", "600", "--no-tcp", "--lab", LAB, *peers("green"))
    script = f"{sys.executable} -c '{SEND_OTHER}' {mac} {sent}"
    other = subprocess.Popen(
        ["ip", "netns", "exec", f"ovl-{LAB}-e-green3", "sh", "-c", script], text=True
    )
    receipt = ok("vm", "migrate", "six", "--to", "h2", "-o", "json")
    assert other.wait(timeout=60) == 0
    verdict = json.loads(run("probe", "stop", "--lab", LAB, "-o", "json").stdout)
    lost_nothing(verdict)
    assert {flow["id"].rpartition("/")[2] for flow in verdict["flows"]} == {"ipv4", "ipv6"}
    after = int(ok("lab", "guest", "six", "--name", LAB, "--", dropped))
    assert after - before == sent, "the guest drops, and counts, each frame it has no use for"
    assert receipt["tunnel_close_reason"] == "all peers acknowledged"


SEND_OTHER = """
import socket, sys, time
out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
out.bind(("eth0", 0))
to = bytes.fromhex(sys.argv[1].replace(":", ""))
frame = to + bytes(5) + b"\\x02" + b"\\x88\\xb6" + bytes(46)
for _ in range(int(sys.argv[2])):
    out.send(frame)
    time.sleep(0.001)
"""
"""Frames of no known protocol to a MAC address: 1,000 a second."""


@pytest.mark.req("R-43")
def test_the_detour_does_not_wait_for_a_neighbour_cache(lab: None) -> None:
    """ARP and ND entries that live for hours change nothing: mappings come from the NVA."""
    for n in (1, 2, 3):
        for family in ("ipv4", "ipv6"):
            ok(
                *("lab", "exec", f"blue{n}", "--name", LAB, "--", "sysctl", "-q", "-w"),
                f"net.{family}.neigh.eth0.base_reachable_time_ms=36000000",
            )
    ok("probe", "start", "web", "--rate", "600", "--lab", LAB, *peers("blue"))
    receipt = ok("vm", "migrate", "web", "--to", elsewhere("web"), "-o", "json")
    lost_nothing(json.loads(run("probe", "stop", "--lab", LAB, "-o", "json").stdout))
    assert receipt["peers"]["acknowledged"] == receipt["peers"]["subscribed"] == 2
    assert receipt["tunnel_close_reason"] == "all peers acknowledged"
    assert receipt["packets"]["late"] <= receipt["packets"]["redirected"]


def elsewhere(name: str) -> str:
    return "h1" if ok("vm", "show", name, "-o", "json")["host"] != "h1" else "h2"


def vm_state(name: str) -> str:
    return str(ok("vm", "show", name, "-o", "json")["state"])


def tsi(name: str, host: str) -> str:
    """What the kernel of `host` has of the VM's first interface (RFC 8394)."""
    port = port_name(name, 0)
    with inside(path_of(f"ovl-{LAB}-{host}")):
        links = {link for _, link in socket.if_nameindex()}
        muted = Nftables().muted()
    return "init" if port not in links else "associated" if port in muted else "activated"


@pytest.mark.req("R-48")
def test_the_whole_life_of_a_vm(lab: None) -> None:
    """Create, run, pause, resume, suspend, resume, move, stop, start, crash, start, delete.

    At each step its interface is in the kernels what docs/explanation/life-of-a-vm.md says.
    """
    made = ok("vm", "create", "life", "--network", "blue", "--host", "h2", "-o", "json")
    address = made["interfaces"][0]["ipv4"]
    ping = ("lab", "exec", "blue3", "--name", LAB, "--", "ping", "-c1", "-W1", address)
    assert tsi("life", "h2") == "activated"
    ok("lab", "guest", "life", "--name", LAB, "--", "echo alive > /tmp/sign")
    assert run(*ping).returncode == 0
    ok("vm", "pause", "life")
    assert (vm_state("life"), run(*ping).returncode) == ("paused", 1)
    assert tsi("life", "h2") == "activated"
    ok("vm", "resume", "life")
    assert (vm_state("life"), run(*ping).returncode) == ("running", 0)
    ok("vm", "suspend", "life")
    assert (vm_state("life"), run(*ping).returncode) == ("suspended", 1)
    assert tsi("life", "h2") == "associated"
    assert run("vm", "migrate", "life", "--to", "h3").returncode == 3
    ok("vm", "resume", "life")
    assert tsi("life", "h2") == "activated"
    assert ok("lab", "guest", "life", "--name", LAB, "--", "cat /tmp/sign") == "alive\n"
    ok("vm", "migrate", "life", "--to", "h3")
    assert ok("lab", "guest", "life", "--name", LAB, "--", "cat /tmp/sign") == "alive\n"
    assert tsi("life", "h3") == "activated"
    wait_for(lambda: tsi("life", "h2") == "init")
    ok("vm", "stop", "life")
    assert (vm_state("life"), tsi("life", "h3")) == ("shutdown", "init")
    assert run("vm", "pause", "life").returncode == 3
    ok("vm", "start", "life")
    assert (vm_state("life"), tsi("life", "h3")) == ("running", "activated")
    pid = int(Path(f"/var/lib/overland/labs/{LAB}/run/h3/life/pid").read_text())
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: vm_state("life") == "crashed")
    wait_for(lambda: tsi("life", "h3") == "associated")
    ok("vm", "start", "life")
    ok("vm", "delete", "life")
    assert run("vm", "show", "life").returncode == 3
    wait_for(lambda: tsi("life", "h3") == "init")
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def wait_for(true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def in_guest(name: str, command: str) -> str:
    return str(ok("lab", "guest", name, "--lab", LAB, "--", command))


def has(name: str) -> list[str]:
    """The networks of a VM's interfaces, which are all whole."""
    faces = ok("vm", "show", name, "-o", "json")["interfaces"]
    assert all(each["change"] is None for each in faces)
    return [each["network"] for each in faces]


@pytest.mark.req("H-03")
@pytest.mark.req("H-07")
def test_an_interface_comes_and_goes_and_the_vm_moves_in_every_way(lab: None) -> None:
    """Both copies have the same devices after each of them; with the interface all of it goes."""
    ok("vm", "create", "plug", "--network", "blue", "--host", "h1")
    in_guest("plug", "true")
    made = ok("vm", "interface", "add", "plug", "green", "-o", "json")["interfaces"][1]
    waited = "until ip link set eth1 up 2>/dev/null; do usleep 50000; done"
    assert made["mac"] in in_guest("plug", f"{waited}; cat /sys/class/net/eth1/address")
    in_guest("plug", f"ip addr add {made['ipv4']}/24 dev eth1")
    ping = ("lab", "exec", "green3", "--name", LAB, "--", "ping", "-c1", "-W2", made["ipv4"])

    def is_reached() -> bool:
        return run(*ping).returncode == 0

    assert is_reached()
    assert ok("vm", "migrate", "plug", "--to", "h2", "--verify", "-o", "json")["outcome"] == "moved"
    assert is_reached()
    ok("vm", "suspend", "plug")
    assert "(code suspended)" in run("vm", "interface", "remove", "plug", "green").stderr
    ok("vm", "resume", "plug")
    assert is_reached()
    ok("vm", "migrate", "plug", "--to", "h3", "--cold")
    assert is_reached()
    ok("vm", "migrate", "plug", "--to", "h1", "--warm", "--interval", "200ms", "--checkpoints", "1")
    assert is_reached()
    ok("vm", "interface", "remove", "plug", "green")
    assert has("plug") == ["blue"]
    assert in_guest("plug", "ls /sys/class/net").split() == ["eth0", "lo"]
    links = ok("lab", "exec", "h1", "--name", LAB, "--", "ip", "-o", "link")
    assert port_name("plug", 1) not in links
    entries = ok("lab", "exec", "h3", "--name", LAB, "--", "bridge", "fdb", "show")
    assert made["mac"] not in entries
    ok("vm", "pause", "plug")
    ok("vm", "interface", "add", "plug", "green")
    assert "(code guest_paused)" in run("vm", "interface", "remove", "plug", "green").stderr
    ok("vm", "resume", "plug")
    in_guest("plug", waited)
    assert ok("vm", "migrate", "plug", "--to", "h2", "--verify", "-o", "json")["outcome"] == "moved"
    ok("vm", "delete", "plug")


@pytest.mark.req("H-03")
def test_a_guest_that_does_not_let_go_keeps_its_interface_and_moves_with_it(lab: None) -> None:
    """Its NVE is killed while it waits; the next one asks again, and says how it ended."""
    ok("vm", "create", "deaf", "--network", "blue", "--host", "h1", "--append", "acpiphp.disable=1")
    in_guest("deaf", "true")
    ok("vm", "interface", "add", "deaf", "green")
    command = (*OVERLAND, "vm", "interface", "remove", "deaf", "green")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as removing:
        wait_for(lambda: "removing" in ok("vm", "show", "deaf", "-o", "yaml"))
        refused = run("vm", "migrate", "deaf", "--to", "h2")
        os.kill(int((LABS / LAB / "h1.pid").read_text()), signal.SIGKILL)
        ok("lab", "restart", "h1", "--name", LAB)
        _, said = removing.communicate(timeout=60)
    assert (refused.returncode, "interface_change_in_progress" in refused.stderr) == (3, True)
    assert (removing.returncode, said.count("\n")) == (1, 1)
    assert "no word from the guest" in said
    assert has("deaf") == ["blue", "green"]
    assert ok("vm", "migrate", "deaf", "--to", "h2", "-o", "json")["outcome"] == "moved"
    assert has("deaf") == ["blue", "green"]
    ok("vm", "delete", "deaf")


@pytest.mark.req("R-14")
def test_the_right_to_write_a_shared_disk_goes_with_the_vm(lab: None, tmp_path: Path) -> None:
    """Its lock is held where the VM runs, from start to stop, and by nobody else (6-11)."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    create = ("vm", "create", "--network", "blue", "--image", str(disk))
    ok(*create, "writer", "--host", "h1")

    def locked() -> bool:
        write = ["qemu-io", "-f", "raw", "-c", "quit", str(disk)]  # opens it, and closes it again
        done = subprocess.run(write, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or "lock" in done.stderr
        return done.returncode != 0

    assert locked()
    assert "(code disk_in_use)" in run(*create, "second", "--host", "h2").stderr
    receipt = ok("vm", "migrate", "writer", "--to", "h2", "-o", "json")
    assert receipt["outcome"] == "moved"
    assert locked()
    ok("vm", "delete", "writer")
    assert not locked()
    ok(*create, "second", "--host", "h1")
    ok("vm", "delete", "second")


def test_a_host_is_emptied_and_stays_so_until_it_is_undrained(lab: None) -> None:
    old = ok("vm", "show", "web", "-o", "json")["host"]

    def here() -> set[str]:
        return {each["name"] for each in ok("vm", "list", "-o", "json") if each["host"] == old}

    before = here()
    plan = {each["vm"]: each["to"] for each in ok("host", "drain", old, "--dry-run", "-o", "json")}
    assert set(plan) == before == here()
    receipts = ok("host", "drain", old, "--parallel", "2", "-o", "json")
    assert {each["vm"]: each["new_nve"] for each in receipts} == plan
    assert {each["outcome"] for each in receipts} == {"moved"}
    assert here() == set()
    refused = run("vm", "migrate", "web", "--to", old)
    assert refused.returncode == 3
    assert f"error: host {old}: it is drained (code host_drained)" in refused.stderr
    assert ok("host", "drain", old, "-o", "json") == []
    ok("host", "undrain", old)
    for vm in before:
        assert ok("vm", "migrate", vm, "--to", old, "-o", "json")["outcome"] == "moved"
    unknown = run("host", "drain", "nowhere")
    assert (unknown.returncode, "unknown_host" in unknown.stderr) == (3, True)


@pytest.mark.req("R-34")
@pytest.mark.req("R-55")
def test_a_vm_at_rest_moves_cold(lab: None, tmp_path: Path) -> None:
    """The same machine, without marking and waking. What it starts from is looked for before."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    ok("vm", "create", "rest", "--host", "h1", "--network", "blue", "--image", str(disk))
    ok("vm", "stop", "rest")
    disk.rename(tmp_path / "away")
    missing = run("vm", "migrate", "rest", "--to", "h2", "--cold")
    why = "there is no such file on host h2 (code file_missing)"
    assert f"error: disk {disk}: {why}" in missing.stderr
    assert missing.returncode == 3
    (tmp_path / "away").rename(disk)
    receipt = ok("vm", "migrate", "rest", "--to", "h2", "--cold", "-o", "json")
    assert (receipt["mode"], receipt["outcome"], receipt["version"]) == ("cold", "moved", 2)
    assert [each["phase"] for each in receipt["phases"]] == [p for p in FORWARD if p != "precopy"]
    assert (receipt["outage_ms"], receipt["packets"]["residual"]) == (None, 0)
    assert ok("migration", "show", receipt["id"], "-o", "json") == receipt
    shown = ok("vm", "show", "rest", "-o", "json")
    assert (shown["host"], shown["state"], shown["version"]) == ("h2", "shutdown", 2)
    ok("vm", "start", "rest")
    assert ok("vm", "show", "rest", "-o", "json")["state"] == "running"
    ok("vm", "delete", "rest")


@pytest.mark.req("R-34")
@pytest.mark.req("R-67")
def test_a_suspended_vm_moves_with_its_state_and_wakes_where_it_was(lab: None) -> None:
    """Its uptime goes on: it is the same boot, on another host; on the old one nothing is left."""
    old = ok("vm", "show", "web", "-o", "json")["host"]
    new = next(host for host in ("h1", "h2", "h3") if host != old)
    boot = ok("lab", "guest", "web", "--lab", LAB, "--", "cat", "/proc/sys/kernel/random/boot_id")
    ok("vm", "suspend", "web")
    receipt = ok("vm", "migrate", "web", "--to", new, "--cold", "-o", "json")
    assert (receipt["mode"], receipt["outcome"]) == ("cold", "moved")
    assert receipt["memory"]["sent_bytes"] > 1 << 20
    shown = ok("vm", "show", "web", "-o", "json")
    assert (shown["host"], shown["state"]) == (new, "suspended")
    assert not list((LABS / LAB / "run" / old / "suspended").iterdir())
    ok("vm", "resume", "web")
    same = ok("lab", "guest", "web", "--lab", LAB, "--", "cat", "/proc/sys/kernel/random/boot_id")
    assert same == boot


@pytest.mark.req("R-10")
@pytest.mark.parametrize("mode", ["standby", "replicate"])
def test_a_mode_that_is_not_built_is_refused_by_name(lab: None, mode: str) -> None:
    """R-10: a standby copy is no mode of moving; nor is replication."""
    body = json.dumps({"to": "h2", "mode": mode}).encode()
    api = json.loads((LABS / LAB / "state.json").read_text())["api"]
    request = urllib.request.Request(
        f"{api}/v1/vms/web/migrate", body, {"content-type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 409
    assert mode in json.loads(refused.value.read())["detail"]


@pytest.mark.req("R-09")
def test_memory_is_the_same_at_equality(lab: None) -> None:
    """The NVA commits only if both digests agree; STOP, equality, commit, RESUME in that order."""
    receipt = ok("vm", "migrate", "web", "--to", elsewhere("web"), "--verify", "-o", "json")
    assert receipt["outcome"] == "moved"
    assert len(receipt["memory"]["digest"]) == 64
    at = {each["phase"]: each["at"] for each in receipt["phases"]}
    assert at["paused"] < at["equal"] <= at["committed"] <= at["running"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("vm", "migrate", "web", "--to", "nowhere"), "unknown_host"),
        (("vm", "migrate", "nobody", "--to", "h2"), "unknown_vm"),
        (("vm", "migrate", "still", "--to", "h1"), "same_host"),
        (("network", "create", "red", "--vni", "42"), "vni_taken"),
        (("network", "create", "red", "--vni", "16777216"), "malformed"),
        (("network", "create", "red", "--vni", "7", "--ipv4", "10.0.0.1/24"), "malformed"),
        (("network", "create", "red", "--vni", "7", "--mtu", "9000"), "mtu_too_small"),
        (("network", "delete", "blue"), "in_use"),
        (("vm", "create", "web", "--network", "blue", "--host", "h1"), "exists"),
        (("vm", "create", "x", "--network", "grey", "--host", "h1"), "unknown_network"),
        (
            ("vm", "create", "x", "--network", "blue", "--host", "h1", "--memory", "9GiB"),
            "not_enough_memory",
        ),
    ],
)
def test_a_wish_that_cannot_be_is_refused_in_one_line(
    lab: None, arguments: tuple[str, ...], code: str
) -> None:
    done = run(*arguments)
    assert done.returncode == 3
    assert f"(code {code})" in done.stderr
    assert "Traceback" not in done.stderr
