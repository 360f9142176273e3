"""A real VM moves between real daemons in namespaces, under numbered streams."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

OVERLAND = str(Path(sys.executable).parent / "overland")
LAB = "ovtest"
pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(180)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([OVERLAND, *arguments], capture_output=True, text=True, check=False)


def ok(*arguments: str) -> Any:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if done.stdout.startswith(("{", "[")) else done.stdout


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    context = tmp_path_factory.mktemp("config")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(context))
        run("lab", "down", "--name", LAB)
        ok("lab", "up", "--name", LAB)
        try:
            ok("network", "create", "blue", "--vni", "42", "--ipv4", "10.42.0.0/24")
            for n in (1, 2, 3):
                ok(
                    *("lab", "endpoint", "add", f"p{n}", "--lab", LAB),
                    *("--host", f"h{n}", "--network", "blue"),
                )
            ok("vm", "create", "web", "--network", "blue,ipv4=10.42.0.50", "--host", "h1")
            yield
        finally:
            run("lab", "down", "--name", LAB)
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert f"ovl-{LAB}-" not in left


@pytest.mark.req("R-14")
@pytest.mark.req("R-37")
def test_a_vm_moves_around_under_traffic(lab: None) -> None:
    ok("probe", "start", "web", "--rate", "600", "--lab", LAB)
    receipts = [ok("vm", "migrate", "web", "--to", host, "-o", "json") for host in ("h2", "h3")]
    verdict = json.loads(run("probe", "stop", "--lab", LAB, "-o", "json").stdout)
    total = verdict["total"]
    assert (total["duplicated"], total["out_of_order"]) == (0, 0)
    assert all(flow["problem"] == "" for flow in verdict["flows"])
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


def test_memory_is_the_same_at_equality(lab: None) -> None:
    receipt = ok("vm", "migrate", "web", "--to", "h1", "--verify", "-o", "json")
    assert receipt["outcome"] == "moved"
    assert len(receipt["memory"]["digest"]) == 64


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("vm", "migrate", "web", "--to", "nowhere"), "unknown_host"),
        (("vm", "migrate", "nobody", "--to", "h2"), "unknown_vm"),
        (("vm", "migrate", "web", "--to", "h1"), "same_host"),
        (("network", "create", "red", "--vni", "42"), "vni_taken"),
        (("network", "create", "red", "--vni", "16777216"), "malformed"),
        (("network", "create", "red", "--vni", "7", "--ipv4", "10.0.0.1/24"), "malformed"),
        (("network", "create", "red", "--vni", "7", "--mtu", "9000"), "mtu_too_small"),
        (("network", "delete", "blue"), "in_use"),
        (("vm", "create", "web", "--network", "blue", "--host", "h1"), "exists"),
        (("vm", "create", "x", "--network", "green", "--host", "h1"), "unknown_network"),
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
