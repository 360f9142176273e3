"""`overland network`, `overland host`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import typer

from overland.cli import policy
from overland.cli.client import Client
from overland.cli.gateway import gateway
from overland.cli.options import Api, Output
from overland.cli.output import Exit, Failure, Format, done, show
from overland.cli.vm import MOVE_COLUMNS, states

network = typer.Typer(no_args_is_help=True, help="Virtual networks.")
network.add_typer(gateway, name="gateway")
policy.add_to(network)
host = typer.Typer(no_args_is_help=True, help="Hosts and their NVEs.")
NETWORK_COLUMNS = ("name", "vni", "kind", "ipv4", "ipv6", "mtu", "underlay")
HOST_COLUMNS = (
    "name",
    "ready",
    "drained",
    "underlay_ipv4",
    "underlay_ipv6",
    "locator",
    "accelerator",
    "blockers",
)


@network.command("create")
def network_create(
    name: str,
    vni: Annotated[int, typer.Option(help="VXLAN identifier, 1 to 16777215")],
    kind: Annotated[
        str,
        typer.Option(help="l2; l3: routed, a gateway on every host; ila: IPv6, routed, no tunnels"),
    ] = "l2",
    ipv4: Annotated[str | None, typer.Option(help="subnet")] = None,
    ipv6: Annotated[str | None, typer.Option(help="subnet")] = None,
    mtu: Annotated[int, typer.Option(help="what tenants may use, in bytes")] = 1500,
    underlay: Annotated[str, typer.Option(help="ipv4 or ipv6: the outer family")] = "ipv4",
    api: Api = None,
    output: Output = Format.table,
) -> None:
    """Make a virtual network."""
    wish = {
        "name": name,
        "vni": vni,
        "kind": kind,
        "ipv4": ipv4,
        "ipv6": ipv6,
        "mtu": mtu,
        "underlay": underlay,
    }
    show(Client(api).call("POST", "/v1/networks", wish), output)


@network.command("list")
def network_list(api: Api = None, output: Output = Format.table) -> None:
    """All virtual networks."""
    show(Client(api).call("GET", "/v1/networks"), output, NETWORK_COLUMNS)


@network.command("show")
def network_show(name: str, api: Api = None, output: Output = Format.table) -> None:
    """One virtual network."""
    show(_one(Client(api), "network", name), output)


@network.command("delete")
def network_delete(name: str, api: Api = None, output: Output = Format.table) -> None:
    """Remove a virtual network that nobody uses."""
    Client(api).call("DELETE", f"/v1/networks/{name}")
    done({"deleted": name}, output)


@host.command("list")
def host_list(api: Api = None, output: Output = Format.table) -> None:
    """All hosts."""
    show(Client(api).call("GET", "/v1/hosts"), output, HOST_COLUMNS)


@host.command("show")
def host_show(name: str, api: Api = None, output: Output = Format.table) -> None:
    """One host."""
    show(_one(Client(api), "host", name), output)


@host.command("drain")
def host_drain(
    name: str,
    dry_run: Annotated[bool, typer.Option(help="only show where each VM would go")] = False,
    parallel: Annotated[int, typer.Option(min=1, help="moves at a time")] = 1,
    api: Api = None,
    output: Output = Format.table,
) -> None:
    """Move all VMs away from a host, and place nothing on it until `undrain`."""
    client = Client(api)
    plan = client.call("POST", f"/v1/hosts/{name}/drain", {"dry_run": dry_run})
    if dry_run:
        show(plan, output, ("vm", "to", "mode"))
        return
    with ThreadPoolExecutor(max_workers=parallel) as workers:
        receipts = list(workers.map(lambda each: _moved(client, each), plan))
    show(receipts, output, MOVE_COLUMNS)
    left = [each["vm"] for each in receipts if each["outcome"] != "moved"]
    if left:
        hint = f"`overland host drain {name}` goes on with them"
        whys = [each["reason"] for each in receipts if each["outcome"] == "refused"]
        why = "; ".join([f"not moved: {', '.join(left)}", *whys])
        raise Failure(f"host {name}", why, "aborted", hint, Exit.ABORTED)


def _moved(client: Client, placement: dict[str, str]) -> dict[str, Any]:
    """The receipt of one move, once it has ended; of one that was refused meanwhile, why."""
    wish = {"to": placement["to"], "mode": placement["mode"]}
    try:
        answer = client.call("POST", f"/v1/vms/{placement['vm']}/migrate", wish)
        *_, last = states(client, answer["id"])
    except Failure as failure:
        # The others go on, and their receipts are shown.
        return {"vm": placement["vm"], "outcome": "refused", "reason": failure.lines[0]}
    return {key: value for key, value in last.items() if key != "progress"}


@host.command("undrain")
def host_undrain(name: str, api: Api = None, output: Output = Format.table) -> None:
    """Let VMs be placed on a host again."""
    Client(api).call("POST", f"/v1/hosts/{name}/undrain")
    done({"undrained": name}, output)


def _one(client: Client, kind: str, name: str) -> object:
    for each in client.call("GET", f"/v1/{kind}s"):
        if each["name"] == name:
            return each
    raise Failure(
        f"{kind} {name}",
        f"there is no such {kind}",
        f"unknown_{kind}",
        f"`overland {kind} list` shows all",
        Exit.REFUSED,
    )
