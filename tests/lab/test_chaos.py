"""A short form of `scripts/bench chaos`: one fault at a time, on real parts, in bad phases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.chaos import HOSTS, Fault, Lab, ok, run

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        lab = Lab("ovchaos")
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
    ],
    ids=str,
)
def test_one_copy_runs_where_the_record_says(lab: Lab, phase: str, fault: Fault) -> None:
    """R-14, E-01: whatever fails, the VM runs exactly once and its addresses lead to it."""
    receipt = lab.break_a_move(phase, fault)
    assert receipt["outcome"] in ("moved", "aborted")
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
    move = lab.begin(lab.next_host(), "precopy", "--bandwidth", "8MiB")
    ok("probe", "start", "web", "--rate", "500", "--lab", lab.name)
    done = run("migration", "abort", move)
    assert done.returncode == 0, done.stderr
    receipt = lab.ended(move)
    verdict = ok("probe", "stop", "--lab", lab.name, "-o", "json")
    assert (receipt["outcome"], receipt["old_nve"]) == ("aborted", old)
    assert verdict["total"]["lost"] == 0
    assert lab.violations(receipt) == []


@pytest.mark.parametrize("daemon", ["nva", "nve"])
def test_a_restart_returns_when_the_daemon_is_back(lab: Lab, daemon: str) -> None:
    """An order to a VM is refused while the NVE of its host is not connected."""
    ok("lab", "restart", lab.where() if daemon == "nve" else daemon, "--name", lab.name)
    ok("vm", "pause", lab.vm)
    ok("vm", "resume", lab.vm)
