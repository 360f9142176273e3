"""A short form of `scripts/bench chaos`: one fault at a time, on real parts, in bad phases."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from overland.model.names import vxlan_name
from tests.lab.chaos import HOSTS, Fault, Lab, ok, run
from tests.lab.clock import HOUR_S
from tests.lab.ears import overlaps

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        lab = Lab("ovchaos", small_disks=True)
        lab.up("ov.dirty=16,10")
        try:
            yield lab
        finally:
            lab.down()


@pytest.mark.req("R-14")
@pytest.mark.parametrize(
    ("phase", "fault"),
    [
        ("precopy", Fault("daemon", "old")),
        ("precopy", Fault("copy", "new")),
        ("paused", Fault("daemon", "new")),
        ("paused", Fault("daemon", "nva")),
        ("committed", Fault("daemon", "new")),
        ("converging", Fault("daemon", "old")),
        ("paused", Fault("link", "new", seconds=1.0)),
        ("planned", Fault("clock", "nva", HOUR_S)),
        ("precopy", Fault("clock", "old", -HOUR_S)),
        ("precopy", Fault("clock", "new", HOUR_S)),
        ("planned", Fault("disk", "nva", 2.0)),
        ("precopy", Fault("full-disk-daemon", "new", 2.0)),
    ],
    ids=str,
)
def test_one_copy_runs_where_the_record_says(lab: Lab, phase: str, fault: Fault) -> None:
    """Whatever fails, the VM runs exactly once and its addresses lead to it."""
    receipt = lab.break_a_move(phase, fault)
    assert receipt["outcome"] in ("moved", "aborted")
    assert lab.felt or phase != "planned", "later an NVE may have nothing to write"
    assert lab.violations(receipt) == []


@pytest.mark.req("R-36")
def test_any_daemon_restarts_under_traffic_and_no_packet_notices(lab: Lab) -> None:
    """6-10, N-21: an NVA that does not know all hosts yet tells nobody half of a network."""
    ok("probe", "start", "web", "--rate", "1000", "--lab", lab.name)
    for daemon in ("nva", *HOSTS):
        lab.kill_daemon(daemon)
    lab.kill_daemon("nva")
    lab.until_ready()
    receipt = ok("vm", "migrate", "web", "--to", lab.next_host(), "-o", "json")
    verdict = ok("probe", "stop", "--lab", lab.name, "-o", "json")
    total = verdict["total"]
    assert (total["lost"], total["duplicated"], total["out_of_order"]) == (0, 0, 0)
    assert receipt["outcome"] == "moved"


def test_an_abort_in_precopy_leaves_the_vm_where_it_was(lab: Lab) -> None:
    old = lab.where()
    move = lab.begin(lab.next_host(), "precopy", bandwidth_bytes_per_s=8 << 20)
    ok("probe", "start", "web", "--rate", "500", "--lab", lab.name)
    done = run("migration", "abort", move)
    assert done.returncode == 0, done.stderr
    receipt = lab.ended(move)
    verdict = ok("probe", "stop", "--lab", lab.name, "-o", "json")
    assert (receipt["outcome"], receipt["old_nve"]) == ("aborted", old)
    assert verdict["total"]["lost"] == 0
    assert lab.violations(receipt) == []


@pytest.mark.req("R-14")
def test_the_vm_speaks_from_one_host_and_then_from_the_other(lab: Lab) -> None:
    """By capture at both taps: the last frame from the old host is before the first of the new."""
    old, new = lab.where(), lab.next_host()
    with lab.listening() as ears:
        lab.ended(lab.begin(new, "closed"))
        sent = ears.sent()
    assert {host for host, instants in sent.items() if instants} == {old, new}
    assert overlaps(sent) == []
    assert overlaps({old: sent[old], new: [sent[old][0], *sent[new]]}) != [], "it can be seen"


@pytest.mark.req("R-14")
@pytest.mark.parametrize("phase", ["planned", "precopy", "paused", "equal", "committed"])
def test_an_abort_in_any_phase(lab: Lab, phase: str) -> None:
    """Before the commit the VM stays; after it the abort is refused and the VM has moved."""
    receipt = lab.break_a_move(phase, Fault("abort", "nva"))
    assert lab.violations(receipt) == []
    assert receipt["outcome"] == "moved" if phase == "committed" else True


@pytest.mark.req("E-02")
def test_an_entry_that_contradicts_what_the_nva_said_is_put_right(lab: Lab) -> None:
    """Nobody but the NVA is believed (ADR 0017): not even what somebody wrote into the kernel."""
    peer = next(host for host in HOSTS if host != lab.where())
    right, wrong = f"10.200.0.{HOSTS.index(lab.where()) + 1}", "10.200.0.99"
    mac = ok("vm", "show", lab.vm, "-o", "json")["interfaces"][0]["mac"]
    device = vxlan_name(42)
    assert lab.leads_to(peer, mac, right)
    change = f"fdb replace {mac} dev {device} dst {wrong} self permanent"
    subprocess.run(["bridge", "-n", f"ovl-{lab.name}-{peer}", *change.split()], check=True)
    assert lab.leads_to(peer, mac, wrong)
    lab.until(lambda: lab.leads_to(peer, mac, right))
    lab.until(lambda: lab.reachable() == {"p1", "p2", "p3"})


@pytest.mark.req("R-14")
def test_two_vms_pass_each_other(lab: Lab) -> None:
    """Moves in both directions at once, each with its own tunnel, gates and version."""
    one = lab.where()
    other = next(host for host in HOSTS if host != one)
    second = Lab(lab.name, vm="db", number=6)
    ok(
        *("vm", "create", "db", "--host", other),
        *("--network", f"blue,ipv4={second.addresses[0]},ipv6={second.addresses[1]}"),
    )
    moves = {
        vm.vm: str(ok("vm", "migrate", vm.vm, "--to", to, "--no-wait")).strip()
        for vm, to in ((lab, other), (second, one))
    }
    for vm in (lab, second):
        receipt = vm.ended(moves[vm.vm])
        assert receipt["outcome"] == "moved", receipt["reason"]
        assert vm.violations(receipt) == []
    ok("vm", "delete", "db")


@pytest.mark.req("N-11")
def test_what_a_dead_host_had_vanishes_from_the_others(lab: Lab) -> None:
    """Its daemon is gone and its link is down; nobody has its address in his kernel any more."""
    dead = next(host for host in HOSTS if host != lab.where())
    number = HOSTS.index(dead) + 1
    others = [host for host in HOSTS if host != dead]
    assert all(lab.knows(host, f"10.200.0.{number}") for host in others)
    with lab.dead(dead):
        lab.until(lambda: not any(lab.knows(host, f"10.200.0.{number}") for host in others))
    lab.until(lambda: lab.reachable() == {"p1", "p2", "p3"})


@pytest.mark.parametrize("daemon", ["nva", "nve"])
def test_a_restart_returns_when_the_daemon_is_back(lab: Lab, daemon: str) -> None:
    """An order to a VM is refused while the NVE of its host is not connected."""
    ok("lab", "restart", lab.where() if daemon == "nve" else daemon, "--name", lab.name)
    ok("vm", "pause", lab.vm)
    ok("vm", "resume", lab.vm)
