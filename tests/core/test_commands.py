"""What commands print and accept, and how `lab restart` waits; no daemon runs here."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from overland.cli.main import app, main
from overland.cli.output import Exit, Format, show
from overland.config import ConfigFailure, NveConfig, load
from overland.lab import lab as labs
from overland.lab.topology import Topology, topology
from tests.core.test_faults import one_line, run

LONG = "x" * 200


# ---------------------------------------------------------------- tables


class Terminal(io.StringIO):
    """A standard output that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("value", [[{"name": "a", "why": LONG}], {"name": "a", "why": LONG}])
def test_a_table_that_is_piped_is_not_cut(value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    show(value, Format.table, ("name", "why"))
    printed = capsys.readouterr().out
    assert LONG in printed
    assert max(map(len, printed.splitlines())) < 2 * len(LONG), "no wider than what is in it"


@pytest.mark.parametrize("value", [[{"name": "a", "why": LONG}], {"name": "a", "why": LONG}])
def test_a_table_on_a_terminal_folds(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    show(value, Format.table, ("name", "why"))
    printed = terminal.getvalue()
    assert printed.count("x") == len(LONG), "it folds, nothing of it is cut"
    assert "…" not in printed


# ---------------------------------------------------------------- words of a command line


def commands(group: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its words, such as `lab endpoint add`."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{above}{name} ")
        else:
            yield above + name, command


def test_every_command_of_a_lab_takes_its_name_by_both_words() -> None:
    root: Any = typer.main.get_command(app)
    found = {
        words: [param.opts for param in command.params if "--lab" in param.opts]
        for words, command in commands(root)
        if words.startswith(("lab ", "probe "))
    }
    assert {"lab up", "lab endpoint add", "probe stop"} <= found.keys()
    assert {words for words, opts in found.items() if opts != [["--name", "--lab"]]} == set()


@pytest.mark.parametrize("option", ["--name", "--lab"])
def test_the_lab_is_the_one_that_was_named(option: str) -> None:
    one_line(run("lab", "status", option, "never"), Exit.REFUSED, "lab never: it is not up")


@pytest.mark.parametrize("group", ["vm", "host", "lab", "probe"])
def test_a_noun_alone_shows_its_help(group: str) -> None:
    done = run(group)
    assert f"Usage: overland {group}" in done.stdout
    assert "Commands" in done.stdout
    one_line(done, Exit.USAGE, "a verb is missing")


def test_a_wrong_timeout_action_is_a_usage_error() -> None:
    done = run("vm", "migrate", "web", "--to", "h2", "--timeout-action", "explode")
    one_line(done, Exit.USAGE, "--timeout-action", "abort or pause")


# ---------------------------------------------------------------- configuration


def nve_config(folder: Path, more: str) -> Path:
    path = folder / "nve.toml"
    path.write_text(
        f'host = "h1"\nnva = ["wss://192.0.2.1:6640/"]\nrun_dir = "{folder}"\n{more}\n'
        '[tls]\nca = "ca.crt"\ncertificate = "h1.crt"\nkey = "h1.key"\n'
    )
    return path


@pytest.mark.parametrize("more", ["", 'underlay_ipv4 = ""'], ids=["neither", "empty"])
def test_an_nve_without_an_underlay_address_is_refused(tmp_path: Path, more: str) -> None:
    config = str(nve_config(tmp_path, more))
    for command in (("config", "check"), ("nve", "run", "--config")):
        one_line(run(*command, config), Exit.USAGE, "underlay_ipv4", "underlay_ipv6", config)


@pytest.mark.parametrize("more", ['underlay_ipv4 = "192.0.2.2"', 'underlay_ipv6 = "2001:db8::2"'])
def test_one_underlay_address_is_enough(tmp_path: Path, more: str) -> None:
    assert load(nve_config(tmp_path, more), NveConfig)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ('underlay_ipv6 = "fd00::1"\nlocator = "2001:db8:a::/48"', "64 bits"),
        ('underlay_ipv6 = "fd00::1"\nlocator = "2001:db8:a:1::1/64"', "locator"),
        ('underlay_ipv4 = "192.0.2.2"\nlocator = "2001:db8:a:1::/64"', "underlay_ipv6"),
    ],
)
def test_a_locator_is_a_64_in_an_ipv6_underlay(tmp_path: Path, more: str, why: str) -> None:
    with pytest.raises(ConfigFailure, match=why):
        load(nve_config(tmp_path, more), NveConfig)
    right = 'underlay_ipv6 = "fd00::1"\nlocator = "2001:db8:a:1::/64"'
    assert load(nve_config(tmp_path, right), NveConfig)


def test_a_config_failure_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigFailure, match=r"nve\.toml: no underlay address"):
        load(nve_config(tmp_path, ""), NveConfig)


# ---------------------------------------------------------------- lab restart

API = "http://127.0.0.1:9"


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Topology:
    """A lab of two hosts, all of whose daemons are this process."""
    monkeypatch.setattr("overland.lab.topology.LABS", tmp_path)
    monkeypatch.setattr("overland.lab.lab._inside", lambda _: [os.getpid()])
    monkeypatch.setattr("overland.lab.lab.READY_LIMIT_S", 0.3)
    lab = topology("never", 2)
    lab.folder.mkdir()
    for host in (*lab.nvas, *lab.hosts):
        (lab.folder / f"{host.name}.pid").write_text(str(os.getpid()))
    return lab


def in_turn(*answers: Any) -> Callable[..., Any]:
    """A function that gives one answer after the other, and then the last again."""
    left = list(answers)

    def answer(*_: Any) -> Any:
        found = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(found, Exception):
            raise found
        return found

    return answer


def hosts(**since: int) -> list[dict[str, Any]]:
    """What the NVA says of its hosts: `ready` outlives a connection by the lease."""
    return [{"name": n, "ready": True, "connected_ns": at} for n, at in since.items()]


BEFORE = {"h1": 5, "h2": 6}


def test_a_restarted_nve_is_waited_for_although_its_lease_holds(
    lab: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The NVA may not have noticed its end yet, nor its new Hello."""
    answers = [hosts(h1=5, h2=6), hosts(h1=0, h2=6), hosts(h1=7, h2=6)]
    looks: list[Any] = []
    answer = in_turn(*answers)

    def get(url: str) -> Any:
        looks.append(url)
        return answer()

    monkeypatch.setattr(labs, "get", get)
    labs.wait_back(lab, "h1", [API], os.getpid(), BEFORE)
    assert looks == [f"{API}/v1/hosts"] * 3


@pytest.mark.parametrize(
    ("daemon", "answer", "who"),
    [
        ("h1", hosts(h1=5, h2=6), "h1"),
        ("h1", hosts(h1=0, h2=6), "h1"),
        ("h1", hosts(h2=9), "h1"),
        ("h1", OSError("refused"), "nva"),
        ("nva", OSError("refused"), "nva"),
        ("nva", hosts(h1=7, h2=0), "h2"),
        ("nva", [], "h1, h2"),
    ],
)
def test_what_does_not_come_back_is_named_after_the_limit(
    lab: Topology, monkeypatch: pytest.MonkeyPatch, daemon: str, answer: Any, who: str
) -> None:
    monkeypatch.setattr(labs, "get", in_turn(answer))
    with pytest.raises(labs.LabFailure, match=f"^{who} did not get ready; logs in "):
        labs.wait_back(lab, daemon, [API], os.getpid(), BEFORE)


def test_a_restarted_nva_is_waited_for_until_it_hears_every_nve(
    lab: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [OSError("refused"), [], hosts(h1=7), hosts(h1=7, h2=8)]
    monkeypatch.setattr(labs, "get", in_turn(*answers))
    labs.wait_back(lab, "nva", [API], os.getpid(), BEFORE)


def test_an_nve_that_does_not_run_is_not_waited_for(
    lab: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lab.folder / "h2.pid").write_text("0")
    monkeypatch.setattr(labs, "get", in_turn(hosts(h1=7)))
    labs.wait_back(lab, "nva", [API], os.getpid(), BEFORE)


def test_a_daemon_that_ends_again_is_told_at_once(
    lab: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overland.lab.lab.READY_LIMIT_S", 3600.0)
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
        with pytest.raises(labs.LabFailure, match=r"^h1 ended again; its log is .*/h1\.log$"):
            labs.wait_back(lab, "h1", [API], ended.pid, BEFORE)


def test_the_command_restarts_and_then_waits(
    lab: Topology, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lab's size is known without its NVA, which may be what is restarted."""
    (lab.folder / "state.json").write_text(
        f'{{"name": "never", "api": "{API}", "nvas": [{{"api": "{API}"}}]}}'
    )
    (lab.folder / "nva.toml").touch()
    for host in lab.hosts:
        labs.nve_config(lab, host)
    did: list[tuple[Any, ...]] = []

    def wait_back(*arguments: Any) -> None:
        did.append(arguments)
        raise labs.LabFailure("h2 did not get ready; logs in there")

    monkeypatch.setattr("overland.cli.lab.LABS", lab.folder.parent)
    monkeypatch.setattr(labs, "get", in_turn(hosts(**BEFORE)))
    monkeypatch.setattr(labs, "restart", lambda *_: 7)
    monkeypatch.setattr(labs, "wait_back", wait_back)
    monkeypatch.setattr("sys.argv", ["overland", "lab", "restart", "h2", "--lab", "never"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert did == [(lab, "h2", [API], 7, BEFORE)]
    assert ended.value.code == Exit.ELSE
    said = "error: lab: h2 did not get ready; logs in there (code lab)\n"
    assert capsys.readouterr().err == said
