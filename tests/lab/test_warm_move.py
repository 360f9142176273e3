"""A real VM moves warm under numbered streams, and is run from a checkpoint when its host dies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.chaos import Lab, ok, run

LAB = "warm"
pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        lab = Lab(LAB)
        lab.up("ov.dirty=32,20")
        try:
            yield lab
        finally:
            lab.down()


def kept(lab: Lab, host: str) -> list[str]:
    """The files of checkpoints on `host`."""
    folder = lab.folder / "run" / host / "checkpoints"
    return sorted(path.name for path in folder.glob("*")) if folder.exists() else []


def mirroring(lab: Lab, to: str, count: int) -> str:
    """The id of a warm move to `to` that has taken at least `count` checkpoints."""
    move = lab.begin(to, "precopy", "warm", interval_s=0.3, checkpoints=1000)
    lab.until(lambda: shown(move)["checkpoints"]["count"] >= count)
    return move


def shown(move: str) -> dict[str, Any]:
    found: dict[str, Any] = ok("migration", "show", move, "-o", "json")
    return found


@pytest.mark.req("R-47")
@pytest.mark.req("R-12")
def test_a_warm_move_under_traffic(lab: Lab) -> None:
    """R-12, R-47: checkpoints and the move itself: no frame is lost, doubled or reordered."""
    to = lab.next_host()
    peers = [word for n in (1, 2, 3) for word in ("--peer", f"p{n}")]
    ok("probe", "start", "web", "--rate", "600", "--lab", LAB, *peers)
    options = ("--warm", "--interval", "500ms", "--checkpoints", "4", "--verify")
    receipt = ok("vm", "migrate", "web", "--to", to, *options, "-o", "json")
    total = json.loads(run("probe", "stop", "--lab", LAB, "-o", "json").stdout)["total"]
    assert (total["lost"], total["duplicated"], total["out_of_order"]) == (0, 0, 0)
    assert (receipt["mode"], receipt["outcome"]) == ("warm", "moved")
    took = receipt["checkpoints"]
    assert (took["count"], took["interval_ms"]) == (4, 500.0)
    assert took["sent_bytes"] > receipt["memory"]["sent_bytes"]
    assert took["last_age_ms"] > 0
    assert receipt["memory"]["digest"], "memory is the same at equality: no checkpoint disturbed it"
    assert kept(lab, to) == []
    assert lab.violations(receipt) == []


@pytest.mark.req("R-11")
@pytest.mark.parametrize("fault", ["abort", "daemon-old", "daemon-new", "daemon-nva", "copy-new"])
def test_a_warm_move_that_is_disturbed_ends_and_mirroring_with_it(lab: Lab, fault: str) -> None:
    """R-11: within one interval of the end no host takes a checkpoint any more."""
    lab.until_ready()
    old, new = lab.where(), lab.next_host()
    move = mirroring(lab, new, 2)
    kind, _, who = fault.partition("-")
    lab.do(kind, {"old": old, "new": new, "nva": "nva", "": ""}[who], 0.0, move)
    if who == "nva":
        lab.until_ready()
        count = shown(move)["checkpoints"]["count"]
        lab.until(lambda: shown(move)["checkpoints"]["count"] > count)
        lab.do("abort", "", 0.0, move)
    receipt = lab.ended(move)
    assert (receipt["outcome"], lab.where()) == ("aborted", old)
    lab.until_ready()
    lab.until(lambda: kept(lab, new) == [])
    assert lab.violations(receipt) == []
    assert kept(lab, new) == [], "nobody wants them: the VM lives"


@pytest.mark.req("R-12")
@pytest.mark.req("R-14")
def test_a_vm_whose_host_dies_is_run_from_its_newest_checkpoint(lab: Lab) -> None:
    """R-12, R-14: refused while its host is there; daemon, QEMU and link are killed then."""
    lab.until_ready()
    old, new = lab.where(), lab.next_host()
    version = ok("vm", "show", "web", "-o", "json")["version"]
    move = mirroring(lab, new, 2)
    refused = run("vm", "recover", "web", "--fenced")
    assert (refused.returncode, "may run it" in refused.stderr) == (3, True)
    with lab.dead(old):
        lab.kill_copy(old)
        assert run("vm", "recover", "web").returncode == 3, "nobody knows yet that it is dead"
        lab.until(lambda: bool(ok("host", "show", old, "-o", "json")["dead"]))
        told = ok("vm", "recover", "web", "-o", "json")
        assert (told["host"], told["version"]) == (new, version + 1)
        assert told["age_ms"] > 0
        assert shown(move)["outcome"] == "aborted"
        assert lab.running() == {new}
        lab.until(lambda: len(lab.reachable() - {f"p{old[1:]}"}) == 2)
        assert kept(lab, new) == []
    lab.until(lambda: len(lab.reachable()) == 3)
    assert (lab.where(), lab.running()) == (new, {new})
    lab.until(lambda: lab.litter() == [])


@pytest.mark.req("R-14")
def test_an_old_copy_that_lived_on_behind_a_cut_is_stopped_when_it_is_back(lab: Lab) -> None:
    """R-14: the operator said that it was off. It was not, and nobody could hear it."""
    lab.until_ready()
    old, new = lab.where(), lab.next_host()
    mirroring(lab, new, 2)
    with lab.dead(old):
        lab.until(lambda: not ok("host", "show", old, "-o", "json")["ready"])
        told = ok("vm", "recover", "web", "--fenced", "-o", "json")
        assert told["host"] == new
        assert set(lab.copies()) == {old, new}
    lab.until(lambda: set(lab.copies()) == {new})
    lab.until(lambda: len(lab.reachable()) == 3)
    assert (lab.where(), lab.running()) == (new, {new})
    lab.until(lambda: lab.litter() == [])
