"""Run the proof tool in a lab: in the endpoints' namespaces and, over its console, in the guest."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from overland.probe.build import helper_path
from overland.probe.plan import NodePlan, ProbePlan
from overland.probe.report import parse_report
from overland.probe.verdict import Verdict, judge

NETNS = Path("/run/netns")
START_LIMIT_S = 20.0
SETTLE_S = 1.0
GUEST_TICK_US = 4000
"""An emulated guest is woken less often; a busy timer would cost it more than the packets."""

Guest = Callable[[str], tuple[int, bytes]]
"""Runs a shell command in the guest; exit code and output."""


class ProbeFailure(Exception):
    """The probe could not be run; one line for a person."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A correspondent's helper process."""

    name: str
    pid: int
    out: str


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """A probe under way; kept in a file between `start` and `stop`."""

    vm: str
    flow_ids: tuple[str, ...]
    members: tuple[Member, ...]


def start(
    plan: ProbePlan, vm: str, namespaces: dict[str, str], folder: Path, guest: Guest
) -> Running:
    """Start every node, wait until all hear each other, then let the numbered streams begin."""
    folder.mkdir(parents=True, exist_ok=True)
    members = []
    for node in plan.nodes:
        if node.name == vm:
            _start_guest(node, guest)
        else:
            members.append(_start_member(node, namespaces[node.name], folder))
    running = Running(vm=vm, flow_ids=plan.flow_ids, members=tuple(members))
    try:
        _await_heard(running, folder, guest)
    except ProbeFailure:
        stop(running, guest)
        raise
    for member in members:
        os.kill(member.pid, signal.SIGUSR2)
    guest("killall -USR2 overland-probe")
    return running


def _start_guest(node: NodePlan, guest: Guest) -> None:
    flows = " ".join(shlex.quote(flow) for flow in node.flows)
    code, out = guest(
        "rm -f /tmp/probe.json; overland-probe run --hold "
        f"--name {node.name} --tick {GUEST_TICK_US} --out /tmp/probe.json {flows} "
        "> /tmp/probe.log 2>&1 & echo $!"
    )
    if code:
        raise ProbeFailure(f"guest: {out.decode(errors='replace').strip()}")


def _start_member(node: NodePlan, namespace: str, folder: Path) -> Member:
    out = folder / f"{node.name}.json"
    out.unlink(missing_ok=True)
    with (folder / f"{node.name}.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *("nsenter", f"--net={NETNS / namespace}", str(helper_path())),
                *("run", "--hold", "--name", node.name, "--out", str(out), *node.flows),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return Member(name=node.name, pid=process.pid, out=str(out))


def _await_heard(running: Running, folder: Path, guest: Guest) -> None:
    deadline_s = time.monotonic() + START_LIMIT_S
    missing = {member.name for member in running.members}
    while missing:
        missing -= {
            name for name in missing if "heard" in (folder / f"{name}.log").read_text().split()
        }
        if missing and time.monotonic() > deadline_s:
            raise ProbeFailure(f"no word reaches {', '.join(sorted(missing))}")
        time.sleep(0.05)
    while b"heard" not in guest("cat /tmp/probe.log")[1].split():
        if time.monotonic() > deadline_s:
            raise ProbeFailure("no word reaches the guest")


def stop(running: Running, guest: Guest) -> Verdict:
    """Stop sending, let the last packets arrive, collect every report, judge."""
    for member in running.members:
        _signal(member.pid, signal.SIGUSR1)
    guest("killall -USR1 overland-probe")
    time.sleep(SETTLE_S)
    for member in running.members:
        _signal(member.pid, signal.SIGTERM)
    code, out = guest(
        "killall -TERM overland-probe; for i in 1 2 3 4 5 6 7 8 9; do "
        "[ -s /tmp/probe.json ] && break; sleep 0.2; done; cat /tmp/probe.json"
    )
    reports = [parse_report(out)] if code == 0 else []
    for member in running.members:
        _await_end(member.pid)
        path = Path(member.out)
        if path.exists():
            reports.append(parse_report(path.read_bytes()))
    return judge(reports, expected=running.flow_ids)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _await_end(pid: int) -> None:
    deadline_s = time.monotonic() + 5
    while time.monotonic() < deadline_s:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.02)


def save(running: Running, path: Path) -> None:
    path.write_bytes(msgspec.json.encode(running))


def saved(path: Path) -> Running:
    """ProbeFailure when no probe was started."""
    if not path.exists():
        raise ProbeFailure("no probe runs in this lab")
    return msgspec.json.decode(path.read_bytes(), type=Running)
