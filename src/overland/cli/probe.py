"""`overland probe`: numbered streams between a VM and endpoints; what was lost, twice, late."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

import msgspec
import typer

from overland.cli.lab import lab_client
from overland.cli.options import LabName, Output
from overland.cli.output import Failure, Format, done, show
from overland.lab import console
from overland.lab.topology import LABS
from overland.probe import run as runs
from overland.probe.plan import Node, PlanError, plan_probe
from overland.probe.report import ReportError
from overland.probe.verdict import Verdict

probe = typer.Typer(no_args_is_help=True, help="Count what the network loses, doubles, reorders.")
COLUMNS = ("id", "sent", "received", "lost", "duplicated", "out_of_order", "longest_gap_ms")


class _Guest:
    """Runs commands in a VM's guest, wherever it is."""

    def __init__(self, lab: str, vm: str) -> None:
        self._lab = lab
        self._vm = vm
        self._client = lab_client(lab)

    def __call__(self, command: str) -> tuple[int, bytes]:
        host = self._client.call("GET", f"/v1/vms/{self._vm}")["host"]
        sock = LABS / self._lab / "run" / host / self._vm / "console.sock"
        return asyncio.run(console.run(sock, command, 30.0))


def begin(
    lab: str,
    vm: str,
    peers: list[str],
    *,
    rate: int,
    rate_from_vm: int | None,
    size: int,
    tcp: bool,
) -> runs.Running:
    """Start a probe between `vm` and endpoints `peers` (all, when none is named)."""
    client = lab_client(lab)
    record = client.call("GET", f"/v1/vms/{vm}")
    endpoints = {each["name"]: each for each in client.call("GET", "/v1/endpoints")}
    unknown = [name for name in peers if name not in endpoints]
    if unknown:
        raise Failure(f"endpoint {unknown[0]}", "there is no such endpoint", "unknown_endpoint")
    chosen = peers or sorted(endpoints)
    face = record["interfaces"][0]
    nodes = [
        Node(
            name=name,
            ipv4=endpoints[name]["interface"]["ipv4"],
            ipv6=endpoints[name]["interface"]["ipv6"],
        )
        for name in chosen
    ]
    plan = plan_probe(
        Node(name=vm, ipv4=face["ipv4"], ipv6=face["ipv6"]),
        nodes,
        rate=rate,
        rate_from_vm=rate_from_vm,
        payload=size,
        tcp=tcp,
    )
    namespaces = {name: endpoints[name]["namespace"] for name in chosen}
    running = runs.start(plan, vm, namespaces, LABS / lab / "probe", _Guest(lab, vm))
    runs.save(running, LABS / lab / "probe.json")
    return running


def end(lab: str) -> Verdict:
    """Stop the lab's probe and judge."""
    path = LABS / lab / "probe.json"
    running = runs.saved(path)
    verdict = runs.stop(running, _Guest(lab, running.vm))
    path.unlink()
    return verdict


def _print(verdict: Verdict, output: Format) -> None:
    body: dict[str, Any] = msgspec.to_builtins(verdict)
    body["ok"] = verdict.ok
    body["total"] = msgspec.to_builtins(verdict.total)
    if output is Format.table:
        show([*body["flows"], body["total"]], output, COLUMNS)
    else:
        show(body, output)
    if not verdict.ok:
        raise Failure("probe", "packets were lost, doubled or reordered", "contract_broken")


@probe.command("start")
def start(
    vm: str,
    peer: Annotated[list[str] | None, typer.Option(help="endpoint; all when left out")] = None,
    rate: Annotated[int, typer.Option(help="packets a second, each direction")] = 5000,
    rate_from_vm: Annotated[int | None, typer.Option(help="if not the same as --rate")] = None,
    size: Annotated[int, typer.Option(help="payload bytes")] = 200,
    tcp: Annotated[bool, typer.Option(help="a TCP stream beside each UDP one")] = True,
    lab: LabName = "lab",
    output: Output = Format.table,
) -> None:
    """Start numbered streams both ways; they run until `probe stop`."""
    wish: dict[str, Any] = {"rate": rate, "rate_from_vm": rate_from_vm, "size": size, "tcp": tcp}
    running = _tried(lambda: begin(lab, vm, peer or [], **wish))
    done({"vm": vm, "flows": list(running.flow_ids)}, output)


@probe.command("stop")
def stop(lab: LabName = "lab", output: Output = Format.table) -> None:
    """Stop the streams and print the verdict."""
    _print(_tried(lambda: end(lab)), output)


@probe.command("run")
def run(
    vm: str,
    peer: Annotated[list[str] | None, typer.Option(help="endpoint; all when left out")] = None,
    rate: Annotated[int, typer.Option(help="packets a second, each direction")] = 5000,
    rate_from_vm: Annotated[int | None, typer.Option(help="if not the same as --rate")] = None,
    size: Annotated[int, typer.Option(help="payload bytes")] = 200,
    tcp: Annotated[bool, typer.Option(help="a TCP stream beside each UDP one")] = True,
    duration: Annotated[float, typer.Option(help="seconds")] = 10.0,
    lab: LabName = "lab",
    output: Output = Format.table,
) -> None:
    """Start, wait, stop, print the verdict."""
    wish: dict[str, Any] = {"rate": rate, "rate_from_vm": rate_from_vm, "size": size, "tcp": tcp}
    _tried(lambda: begin(lab, vm, peer or [], **wish))
    time.sleep(duration)
    _print(_tried(lambda: end(lab)), output)


def _tried(work: Any) -> Any:
    try:
        return work()
    except (runs.ProbeFailure, PlanError, ReportError, console.ConsoleFailure) as error:
        raise Failure("probe", str(error), "probe") from None
