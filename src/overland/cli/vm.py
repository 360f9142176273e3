"""`overland vm` and `overland migration`."""

from __future__ import annotations

import http.client
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from overland.cli.client import Client, Unreachable
from overland.cli.eligibility import eligibility
from overland.cli.options import Api, Output, disk_spec, spec
from overland.cli.output import Exit, Failure, Format, done, show
from overland.cli.timeline import timeline
from overland.model.handover import KEEP_OLD_S
from overland.model.names import parse_duration, parse_size

vm = typer.Typer(no_args_is_help=True, help="Virtual machines.")
vm.add_typer(eligibility, name="eligibility")
migration = typer.Typer(no_args_is_help=True, help="Moves and their receipts.")
VM_COLUMNS = ("name", "state", "host", "version", "memory_mib", "move")
NVA_AWAY_S = 15.0
"""How long a command waits for an NVA that went away in the middle of a move."""

MOVE_COLUMNS = (
    "id",
    "vm",
    "old_nve",
    "new_nve",
    "phase",
    "outcome",
    "vm_stop_ms",
    "network_gap_ms",
    "total_ms",
)


def amount(text: str | None, what: str, parse: Any) -> Any:
    """A typed amount with its unit; a usage error names the option."""
    try:
        return parse(text) if text is not None else None
    except ValueError as error:
        raise Failure(what, str(error), "usage", exit_code=Exit.USAGE) from None


@vm.command("create")
def create(
    name: str,
    network: Annotated[list[str], typer.Option(help="NAME[,ipv4=A][,ipv6=A][,mac=M]")],
    host: Annotated[str, typer.Option(help="where it starts")],
    memory: Annotated[str, typer.Option(help="16MiB or more")] = "128MiB",
    vcpus: Annotated[int, typer.Option(help="virtual processors")] = 1,
    image: Annotated[str | None, typer.Option(help="the disk to boot from, as in --disk")] = None,
    disk: Annotated[
        list[str] | None,
        typer.Option(
            help="PATH[,kind=shared|moved|left][,size=1GiB][,format=raw|qcow2]; "
            "a relative PATH lies in the host's own disk folder"
        ),
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(help="kernel on the host, instead of an image")
    ] = None,
    initrd: Annotated[str | None, typer.Option(help="initial RAM disk on the host")] = None,
    append: Annotated[str, typer.Option(help="kernel command line")] = "",
    owner: Annotated[str, typer.Option(help="whose certificate may register it")] = "",
    api: Api = None,
    output: Output = Format.table,
) -> None:
    """Make a VM and start it; returns when it runs."""
    from overland.cli.lab import lab_guest_boot

    client = Client(api)
    interfaces = [spec(each) for each in network]
    disks = [disk_spec(image, "--image")] if image else []
    disks += [disk_spec(each, "--disk") for each in disk or ()]
    first = disks[0]["path"] if image else None
    boot: dict[str, Any] = {"image": first, "kernel": kernel, "initrd": initrd, "append": append}
    wish: dict[str, Any] = {
        "name": name,
        "owner": owner,
        "host": host,
        "interfaces": interfaces,
        "memory_mib": amount(memory, "--memory", parse_size) // 2**20,
        "vcpus": vcpus,
        "boot": boot,
        "disks": disks,
    }
    if not image and not kernel:
        # The lab's guest is told its addresses on its command line: they are chosen before.
        wish |= {
            "interfaces": client.call("POST", "/v1/vms", wish | {"dry_run": True})["interfaces"]
        }
        wish |= {"boot": lab_guest_boot(client, wish["interfaces"], append)}
    show(client.call("POST", "/v1/vms", wish), output)


@vm.command("list")
def vm_list(api: Api = None, output: Output = Format.table) -> None:
    """All VMs."""
    show(Client(api).call("GET", "/v1/vms"), output, VM_COLUMNS)


@vm.command("show")
def vm_show(name: str, api: Api = None, output: Output = Format.table) -> None:
    """One VM: its state, host, addresses and version."""
    show(Client(api).call("GET", f"/v1/vms/{name}"), output)


def _action(action: str, meaning: str) -> None:
    @vm.command(action, help=meaning)
    def act(name: str, api: Api = None, output: Output = Format.table) -> None:
        show(Client(api).call("POST", f"/v1/vms/{name}/{action}", {}), output)


for _verb, _meaning in (
    ("start", "Start a stopped VM."),
    ("pause", "Pause a running VM."),
    ("resume", "Resume a paused or suspended VM."),
    ("suspend", "Save a VM's state on its host and end it; `resume` brings it back."),
    ("stop", "Stop a VM."),
):
    _action(_verb, _meaning)


interface = typer.Typer(no_args_is_help=True, help="Interfaces of a VM.")
vm.add_typer(interface, name="interface")


@interface.command("change")
def interface_change(
    name: str,
    network: Annotated[str, typer.Option(help="which interface: the one in this network")],
    ipv4: Annotated[str | None, typer.Option(help="other address; `none` takes it away")] = None,
    ipv6: Annotated[str | None, typer.Option(help="other address; `none` takes it away")] = None,
    api: Api = None,
    output: Output = Format.table,
) -> None:
    """Add, change or remove the addresses of a VM's interface, while it runs.

    The guest is not told: it sets its own addresses.
    """
    given = {"ipv4": ipv4, "ipv6": ipv6}
    wish = {key: None if value == "none" else value for key, value in given.items() if value}
    show(Client(api).call("PATCH", f"/v1/vms/{name}/interfaces/{network}", wish), output)


@interface.command("add")
def interface_add(
    name: str,
    network: Annotated[str, typer.Argument(help="NETWORK[,ipv4=A][,ipv6=A][,mac=M]")],
    api: Api = None,
    output: Output = Format.table,
) -> None:
    """Give a VM one more interface; it is plugged in if the VM is up.

    Its addresses are chosen as for a new VM. The guest sets them itself.
    """
    wish = spec(network)
    show(Client(api).call("POST", f"/v1/vms/{name}/interfaces", wish), output)


@interface.command("remove")
def interface_remove(
    name: str,
    which: Annotated[str, typer.Argument(help="its network, or its MAC address")],
    api: Api = None,
    output: Output = Format.table,
) -> None:
    """Take an interface from a VM; its addresses go with it.

    The guest of a VM that runs has to let go of it, for which it has 10 seconds.
    """
    show(Client(api).call("DELETE", f"/v1/vms/{name}/interfaces/{which}"), output)


disk = typer.Typer(no_args_is_help=True, help="Disks of a VM.")
vm.add_typer(disk, name="disk")


@disk.command("move")
def disk_move(
    name: str,
    disk: Annotated[str, typer.Argument(help="its path, as `vm show` has it")],
    to: Annotated[str, typer.Option(help="the VM's own host")],
    bandwidth: Annotated[str | None, typer.Option(help="bytes a second, such as 1GiB")] = None,
    timeout: Annotated[str, typer.Option(help="for the copy")] = "1h",
    dry_run: Annotated[
        bool, typer.Option(help="check only, and list what stands against it")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="or print the id at once")] = True,
    api: Api = None,
    output: Output = Format.table,
) -> None:
    """Bring a disk that was left behind to its VM, which runs on meanwhile; prints the receipt."""
    client = Client(api)
    wish = {
        "disk": disk,
        "to": to,
        "dry_run": dry_run,
        "options": {
            "bandwidth_bytes_per_s": amount(bandwidth, "--bandwidth", parse_size),
            "timeout_s": amount(timeout, "--timeout", parse_duration),
        },
    }
    _moved(client, client.call("POST", f"/v1/vms/{name}/disks/move", wish), wish, wait, output)


@vm.command("delete")
def vm_delete(name: str, api: Api = None, output: Output = Format.table) -> None:
    """Stop and remove a VM."""
    Client(api).call("DELETE", f"/v1/vms/{name}")
    done({"deleted": name}, output)


@vm.command("recover")
def recover(
    name: str,
    fenced: Annotated[
        bool,
        typer.Option("--fenced", help="the old host is off, or cannot reach anybody: you know"),
    ] = False,
    api: Api = None,
    output: Output = Format.table,
) -> None:
    """Run a VM whose host is lost from the newest checkpoint of its warm move."""
    show(Client(api).call("POST", f"/v1/vms/{name}/recover", {"fenced": fenced}), output)


@vm.command("migrate")
def migrate(
    name: str,
    to: Annotated[str, typer.Option(help="the new host")],
    hot: Annotated[
        bool, typer.Option("--hot", "--live", help="the VM runs while it is copied; the default")
    ] = False,
    warm: Annotated[
        bool, typer.Option("--warm", help="whole checkpoints to the new host first, then as hot")
    ] = False,
    interval: Annotated[str, typer.Option(help="of a warm move, from checkpoint to checkpoint")] = (
        "1s"
    ),
    checkpoints: Annotated[int, typer.Option(min=1, help="of a warm move, how many")] = 3,
    cold: Annotated[
        bool,
        typer.Option("--cold", help="stop it, carry its state, wake it there; or at rest"),
    ] = False,
    max_downtime: Annotated[str, typer.Option(help="longest stop to accept")] = "300ms",
    bandwidth: Annotated[str | None, typer.Option(help="bytes a second, such as 1GiB")] = None,
    timeout: Annotated[str, typer.Option(help="for the copy of memory")] = "300s",
    timeout_action: Annotated[str, typer.Option(help="abort or pause")] = "abort",
    with_storage: Annotated[
        bool, typer.Option("--with-storage", help="all disks go along, whatever is declared")
    ] = False,
    shared_storage: Annotated[
        bool, typer.Option("--shared-storage", help="the new host has all disks already")
    ] = False,
    leave_storage: Annotated[
        bool, typer.Option("--leave-storage", help="all disks stay, reached over the network")
    ] = False,
    change_address: Annotated[
        list[str] | None,
        typer.Option(
            help="NETWORK[,ipv4=A][,ipv6=A]: other addresses for its interface there; its owner "
            "must have registered that its applications handle that"
        ),
    ] = None,
    keep_old: Annotated[
        str, typer.Option(help="for how long after the move changed addresses stay valid")
    ] = f"{KEEP_OLD_S:g}s",
    verify: Annotated[
        bool, typer.Option(help="compare digests of memory and moved disks at equality")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option(help="check only, and list what stands against it")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="or print the id at once")] = True,
    api: Api = None,
    output: Output = Format.table,
) -> None:
    """Move a VM to another host; prints the receipt."""
    if hot + warm + cold > 1:
        why = "one of --hot, --warm and --cold, not more"
        raise Failure("vm migrate", why, "usage", exit_code=Exit.USAGE)
    if timeout_action not in ("abort", "pause"):
        why = f"{timeout_action!r}: use abort or pause"
        raise Failure("--timeout-action", why, "usage", exit_code=Exit.USAGE)
    choice = _disk_choice(moved=with_storage, shared=shared_storage, left=leave_storage)
    client = Client(api)
    wish = {
        "to": to,
        "mode": "cold" if cold else "warm" if warm else "hot",
        "dry_run": dry_run,
        "options": {
            "max_downtime_ms": amount(max_downtime, "--max-downtime", parse_duration) * 1000,
            "bandwidth_bytes_per_s": amount(bandwidth, "--bandwidth", parse_size),
            "timeout_s": amount(timeout, "--timeout", parse_duration),
            "timeout_action": timeout_action,
            "verify": verify,
            "checkpoints": checkpoints if warm else 0,
            "interval_s": amount(interval, "--interval", parse_duration),
            "storage": choice,
            "addresses": [
                spec(each, "--change-address", ("ipv4", "ipv6")) for each in change_address or ()
            ],
            "keep_old_s": amount(keep_old, "--keep-old", parse_duration),
        },
    }
    _moved(client, client.call("POST", f"/v1/vms/{name}/migrate", wish), wish, wait, output)


def _moved(
    client: Client, answer: dict[str, Any], wish: dict[str, Any], wait: bool, output: Format
) -> None:
    """Show what the NVA says of a wish for a move, or follow the move to its end."""
    if wish["dry_run"]:
        if answer["blockers"]:
            raise Failure.of_problem(answer)
        show(answer, output)
    elif not wait:
        print(answer["id"]) if output is Format.table else show(answer, output)
    else:
        _finish(_follow(client, answer["id"]), output)


def _disk_choice(**kinds: bool) -> str:
    """What the storage options say of all disks."""
    chosen = [kind for kind, wanted in kinds.items() if wanted]
    if len(chosen) > 1:
        why = "--with-storage, --shared-storage or --leave-storage, not two of them"
        raise Failure("vm migrate", why, "usage", exit_code=Exit.USAGE)
    return chosen[0] if chosen else "declared"


def _follow(client: Client, move: str) -> dict[str, Any]:
    """Wait for the end, with a progress display on a terminal."""
    last: dict[str, Any] = {}
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("planned", total=100)
        for state in states(client, move):
            last = state
            progress.update(task, description=_headline(state), completed=_percent(state))
    return {key: value for key, value in last.items() if key != "progress"}


def states(client: Client, move: str) -> Iterator[dict[str, Any]]:
    """Every state of a move until its outcome is known, also over a restart of the NVA.

    A move may say nothing new for long; only an NVA that cannot be asked counts as away.
    """
    away_since_s: float | None = None
    while away_since_s is None or time.monotonic() < away_since_s + NVA_AWAY_S:
        try:
            for state in client.events(f"/v1/migrations/{move}/events"):
                away_since_s = None
                yield state
                if state["outcome"] != "open":
                    return
        except (Unreachable, OSError, http.client.HTTPException):
            away_since_s = away_since_s or time.monotonic()
            time.sleep(0.2)
    raise Failure(
        f"migration {move}",
        "the NVA does not answer: its outcome is not known",
        "unknown",
        f"`overland migration repair {move}` once the NVA is back",
        Exit.UNKNOWN,
    )


def _headline(state: dict[str, Any]) -> str:
    memory, taken = state["progress"], state["checkpoints"]
    if state["phase"] == "precopy" and taken and not memory["sent_bytes"]:
        return f"precopy: {taken['count']} checkpoints, the newest of {taken['last_at'] or '-'}"
    rate = memory["bandwidth_bytes_per_s"]
    forecast = f", stop about {memory['remaining_bytes'] / rate * 1000:.0f} ms" if rate else ""
    return (
        f"{state['phase']}: {memory['remaining_bytes'] / 2**20:.0f} MiB left, "
        f"{rate / 2**20:.0f} MiB/s, dirty {memory['dirty_bytes_per_s'] / 2**20:.0f} MiB/s{forecast}"
    )


def _percent(state: dict[str, Any]) -> float:
    memory = state["progress"]
    if state["outcome"] != "open" or not memory["total_bytes"]:
        return 100.0 if state["outcome"] != "open" else 0.0
    return max(0.0, 99.0 * (1 - float(memory["remaining_bytes"]) / float(memory["total_bytes"])))


def _finish(receipt: dict[str, Any], output: Format) -> None:
    show(receipt, output)
    match receipt.get("outcome"):
        case "moved":
            return
        case "aborted":
            raise Failure(
                f"vm {receipt['vm']}",
                f"still on {receipt['old_nve']}: {receipt['reason']}",
                "aborted",
                exit_code=Exit.ABORTED,
            )
        case _:
            raise Failure(
                "migration",
                "its outcome is not known",
                "unknown",
                f"`overland migration repair {receipt.get('id', '')}`",
                Exit.UNKNOWN,
            )


@migration.command("list")
def migration_list(api: Api = None, output: Output = Format.table) -> None:
    """All moves, oldest first."""
    show(Client(api).call("GET", "/v1/migrations"), output, MOVE_COLUMNS)


@migration.command("show")
def migration_show(move: str, api: Api = None, output: Output = Format.table) -> None:
    """The receipt of a move."""
    show(Client(api).call("GET", f"/v1/migrations/{move}"), output)


@migration.command("timeline")
def migration_timeline(
    move: str,
    svg: Annotated[Path, typer.Option(help="where the picture goes")] = Path("timeline.svg"),
    api: Api = None,
    output: Output = Format.table,
) -> None:
    """Draw a move: VM lane and network lanes on one clock."""
    receipt = Client(api).call("GET", f"/v1/migrations/{move}")
    try:
        svg.write_text(timeline(receipt))
    except ValueError as error:
        raise Failure(f"migration {move}", str(error), "not_moved", exit_code=3) from None
    show({"svg": str(svg)}, output)


@migration.command("watch")
def migration_watch(move: str, api: Api = None, output: Output = Format.table) -> None:
    """Follow a move to its end."""
    _finish(_follow(Client(api), move), output)


@migration.command("abort")
def migration_abort(move: str, api: Api = None, output: Output = Format.table) -> None:
    """Bring the VM back, while the move is not committed."""
    client = Client(api)
    client.call("POST", f"/v1/migrations/{move}/abort")
    receipt = _follow(client, move)
    if receipt["outcome"] == "moved":
        why = "it was committed already; the VM has moved"
        raise Failure(f"migration {move}", why, "committed", exit_code=Exit.REFUSED)
    done(receipt, output)


@migration.command("repair")
def migration_repair(
    move: Annotated[str | None, typer.Argument(help="all open moves, when left out")] = None,
    api: Api = None,
    output: Output = Format.table,
) -> None:
    """Settle what a failure left open, and say what was done."""
    path = f"/v1/migrations/{move}/repair" if move else "/v1/migrations/repair"
    show(Client(api).call("POST", path), output, ("id", "vm", "did"))
