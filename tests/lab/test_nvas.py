"""Three NVAs, each with a member of their store; the active one falls away."""

from __future__ import annotations

import http.client
import json
import os
import signal
from collections.abc import Iterator

import pytest

from tests.lab.chaos import Lab, ok, run

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        lab = Lab("ovnvas", nvas=3)
        lab.up("ov.dirty=16,10")
        try:
            yield lab
        finally:
            lab.down()


def status(lab: Lab) -> dict[str, str]:
    """NVA to its API, the active one first."""
    nvas = ok("lab", "status", "--name", lab.name, "-o", "json")["nvas"]
    assert sum(nva["leader"] for nva in nvas) == 1
    return {nva["name"]: nva["api"] for nva in sorted(nvas, key=lambda nva: not nva["leader"])}


def asked_to_write(api: str) -> int | None:
    """What that NVA itself answers (HTTP status); None when it does not."""
    wish = {"name": "red", "vni": 77, "kind": "l2", "ipv4": "10.77.0.0/24"}
    connection = http.client.HTTPConnection(api.removeprefix("http://"), timeout=30)
    try:
        connection.request("POST", "/v1/networks", json.dumps(wish))
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


@pytest.mark.req("N-09")
@pytest.mark.req("N-10")
@pytest.mark.parametrize("phase", ["precopy", "paused"])
def test_the_active_nva_is_killed_in_the_middle_of_a_move(lab: Lab, phase: str) -> None:
    """N-09, N-10: another takes over, and the move ends by itself, whole or not at all."""
    was, *others = status(lab)
    move = lab.begin(lab.next_host(), phase)
    os.kill(int((lab.folder / f"{was}.pid").read_text()), signal.SIGKILL)
    receipt = lab.ended(move)
    assert receipt["outcome"] in ("moved", "aborted")
    assert lab.leaders()[0] in others
    assert lab.violations(receipt) == []
    ok("lab", "restart", was, "--name", lab.name)
    assert lab.leaders() != [was], "it stands by"


@pytest.mark.req("N-09")
def test_commands_work_with_the_address_of_any_nva(lab: Lab) -> None:
    for api in status(lab).values():
        assert ok("vm", "show", lab.vm, "--api", api, "-o", "json")["name"] == lab.vm


@pytest.mark.req("N-10")
def test_an_active_nva_that_is_cut_off_cannot_write(lab: Lab) -> None:
    """N-10, 6-10: its link is down, its API still answers; another takes over and moves a VM."""
    was, *others = status(lab)
    cut_off = status(lab)[was]
    lab.link(was, up=False)
    try:
        lab.until(lambda: set(lab.leaders()) <= set(others) and len(lab.leaders()) == 1)
        lab.until(lambda: asked_to_write(cut_off) is not None)  # it starts over as a standby
        assert asked_to_write(cut_off) in (307, 503)
        lab.until_ready()
        receipt = ok("vm", "migrate", lab.vm, "--to", lab.next_host(), "-o", "json")
        assert receipt["outcome"] == "moved"
        assert lab.violations(receipt) == []
    finally:
        lab.link(was, up=True)
    lab.until(lambda: len(lab.leaders()) == 1)
    assert "red" not in run("network", "list").stdout
