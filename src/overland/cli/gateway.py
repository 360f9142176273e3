"""`overland network gateway`: the way between a routed network and the physical one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from overland.cli.client import Client
from overland.cli.options import Api, Output
from overland.cli.output import Format, done, show

gateway = typer.Typer(no_args_is_help=True, help="The way out of a routed network.")
COLUMNS = ("network", "host", "bridge", "ipv4", "ipv6", "via_ipv4", "via_ipv6", "inside")


def row(gateway: dict[str, Any]) -> dict[str, Any]:
    """A gateway as one line: both of its sides."""
    face, leg = gateway["interface"], gateway["leg"]
    inside = ", ".join(filter(None, (face["ipv4"], face["ipv6"])))
    return {"network": gateway["network"], "host": gateway["host"], **leg, "inside": inside}


@gateway.command("add")
def add(
    network: str,
    host: Annotated[str, typer.Option(help="where it is; it stays there when VMs move")],
    bridge: Annotated[str, typer.Option(help="device of that host, in the physical network")],
    ipv4: Annotated[str | None, typer.Option(help="its own address there, with length")] = None,
    via_ipv4: Annotated[str | None, typer.Option(help="the next router there")] = None,
    ipv6: Annotated[str | None, typer.Option(help="its own address there, with length")] = None,
    via_ipv6: Annotated[str | None, typer.Option(help="the next router there")] = None,
    api: Api = None,
    output: Output = Format.table,
) -> None:
    """Connect a routed network to the physical one; returns when it is so on that host."""
    leg = {"bridge": bridge, "ipv4": ipv4, "via_ipv4": via_ipv4, "ipv6": ipv6, "via_ipv6": via_ipv6}
    wish = {"network": network, "host": host, "leg": leg}
    made = Client(api).call("POST", "/v1/gateways", wish)
    show(row(made), output)


@gateway.command("list")
def listed(api: Api = None, output: Output = Format.table) -> None:
    """All gateways."""
    show([row(each) for each in Client(api).call("GET", "/v1/gateways")], output, COLUMNS)


@gateway.command("remove")
def remove(network: str, api: Api = None, output: Output = Format.table) -> None:
    """Cut a routed network off from the physical one."""
    Client(api).call("DELETE", f"/v1/gateways/{network}")
    done({"removed": f"gateway of network {network}"}, output)
