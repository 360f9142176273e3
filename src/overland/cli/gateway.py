"""`overland network gateway`: the ways between a routed network and the physical one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from overland.cli.client import Client
from overland.cli.options import Api, Output
from overland.cli.output import Format, done, show

gateway = typer.Typer(no_args_is_help=True, help="The ways out of a routed network.")
COLUMNS = ("network", "host", "bridge", "ipv4", "ipv6", "via_ipv4", "via_ipv6", "inside")
USERS = ("tenant", "ipv4", "ipv6")


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
def remove(
    network: str,
    host: Annotated[str, typer.Option(help="where it is")],
    api: Api = None,
    output: Output = Format.table,
) -> None:
    """Take a gateway away; its tenants go out by the network's others, if there are any."""
    Client(api).call("DELETE", f"/v1/gateways/{network}/{host}")
    done({"removed": f"gateway of network {network} on host {host}"}, output)


@gateway.command("tenants")
def tenants(network: str, api: Api = None, output: Output = Format.table) -> None:
    """By which gateway each tenant of a network goes out; gateways are named by their hosts."""
    show(Client(api).call("GET", f"/v1/gateways/{network}/tenants"), output, USERS)


@gateway.command("assign")
def assign(
    network: str,
    names: Annotated[list[str], typer.Argument(metavar="TENANT...", help="VMs, endpoints")],
    host: Annotated[str, typer.Option(help="where the gateway is")],
    api: Api = None,
    output: Output = Format.table,
) -> None:
    """Let tenants go out by another gateway; they keep it as long as it is there."""
    path = f"/v1/gateways/{network}/{host}/tenants"
    show(Client(api).call("POST", path, {"tenants": names}), output, USERS)


@gateway.command("spread")
def spread(network: str, api: Api = None, output: Output = Format.table) -> None:
    """Share all tenants of a network evenly among its gateways; some change theirs."""
    show(Client(api).call("POST", f"/v1/gateways/{network}/spread"), output, USERS)
