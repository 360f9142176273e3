"""`overland lab`: hosts as network namespaces, the same daemons and commands as in production."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from overland.cli.client import Client, write_context
from overland.cli.gateway import row
from overland.cli.options import Api, LabName, Output
from overland.cli.output import Exit, Failure, Format, done, show
from overland.lab import console, guest, outside
from overland.lab import lab as labs
from overland.lab.topology import LABS, Topology, endpoint_namespace, topology
from overland.model.names import gateway_of, parse_name
from overland.probe.build import BuildError, helper_path

lab = typer.Typer(no_args_is_help=True, help="A data centre on one machine.")
endpoint = typer.Typer(no_args_is_help=True, help="Namespaces attached like VMs.")
lab.add_typer(endpoint, name="endpoint")
Timeout = Annotated[float, typer.Option(help="seconds to wait for the guest")]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "overland"
ANYTHING = {"allow_extra_args": True, "ignore_unknown_options": True}


def _failure(error: Exception, code: str = "lab") -> Failure:
    return Failure("lab", str(error), code)


def _topology(name: str, hosts: int, nvas: int = 1) -> Topology:
    try:
        return topology(name, hosts, nvas)
    except ValueError as error:
        raise Failure("lab up", str(error), "usage", exit_code=Exit.USAGE) from None


def lab_state(name: str) -> dict[str, Any]:
    path = LABS / name / "state.json"
    if not path.exists():
        raise Failure(f"lab {name}", "it is not up", "lab_down", "`overland lab up`", Exit.REFUSED)
    return dict(json.loads(path.read_text()))


def _apis(state: dict[str, Any]) -> list[str]:
    return [nva["api"] for nva in state["nvas"]]


def lab_client(name: str) -> Client:
    """The API of lab `name`, whichever of its NVAs is the active one."""
    return Client(",".join(_apis(lab_state(name))))


@lab.command("up")
def up(
    hosts: Annotated[int, typer.Option(help="1 to 200")] = 3,
    name: LabName = "lab",
    nvas: Annotated[int, typer.Option(help="1, or 3 or 5 on a store of their own each")] = 1,
    output: Output = Format.table,
) -> None:
    """Bring a lab up; returns when all hosts are ready."""
    try:
        state = labs.up(_topology(name, hosts, nvas))
    except (labs.LabFailure, OSError) as error:
        raise _failure(error) from None
    write_context(",".join(_apis(state)))
    show(_status(name), output)


@lab.command("down")
def down(name: LabName = "lab", output: Output = Format.table) -> None:
    """Take a lab down, whatever is left of it."""
    try:
        found = labs.down(_topology(name, 1).name, LABS / name)
    except (labs.LabFailure, OSError) as error:
        raise _failure(error) from None
    done({"removed": found}, output)


@lab.command("restart")
def restart(
    daemon: Annotated[
        str, typer.Argument(help="nva (of several: nva1), or a host's name for its NVE")
    ],
    name: LabName = "lab",
    output: Output = Format.table,
) -> None:
    """Kill one daemon (SIGKILL) and start it anew; VMs and traffic go on.

    Returns when it is back: an NVE is connected to the NVA, an NVA hears every NVE that runs.
    """
    apis = _apis(lab_state(name))
    shape = _topology(name, *labs.size(LABS / name))
    before = labs.connections(apis) or {}
    try:
        labs.wait_back(shape, daemon, apis, labs.restart(shape, daemon), before)
    except (labs.LabFailure, OSError) as error:
        raise _failure(error) from None
    done({"restarted": daemon}, output)


def _status(name: str) -> dict[str, Any]:
    state = lab_state(name)
    client = lab_client(name)
    hosts = [
        {
            "name": host["name"],
            "namespace": f"ovl-{name}-{host['name']}",
            "underlay_ipv4": host["underlay_ipv4"],
            "underlay_ipv6": host["underlay_ipv6"],
            "locator": host["locator"],
            "ready": host["ready"],
        }
        for host in client.call("GET", "/v1/hosts")
    ]
    endpoints = [
        {
            "name": each["name"],
            "namespace": each["namespace"],
            "host": each["host"],
            **{key: each["interface"][key] for key in ("network", "mac", "ipv4", "ipv6")},
        }
        for each in client.call("GET", "/v1/endpoints")
    ]
    nvas = [nva | {"leader": labs.leads(nva["api"])} for nva in state["nvas"]]
    api = next((nva["api"] for nva in nvas if nva["leader"]), state["api"])
    return {"name": name, "api": api, "nvas": nvas, "hosts": hosts, "endpoints": endpoints}


@lab.command("status")
def status(name: LabName = "lab", output: Output = Format.table) -> None:
    """NVAs, hosts and endpoints of a lab that is up; `api` is that of the active NVA."""
    show(_status(name), output)


@lab.command("exec", context_settings=ANYTHING)
def execute(context: typer.Context, host: str, name: LabName = "lab") -> None:
    """Run a command in a host's (or an endpoint's) network namespace."""
    found = [f"ovl-{name}-{host}", endpoint_namespace(name, host)]
    namespace = next((each for each in found if (labs.NETNS / each).exists()), None)
    if namespace is None:
        raise Failure(f"host {host}", "there is no such host", "unknown_host", exit_code=3)
    command = ["nsenter", f"--net={labs.NETNS / namespace}", *context.args]
    sys.exit(subprocess.run(command, check=False).returncode)


@lab.command("guest", context_settings=ANYTHING)
def in_guest(
    context: typer.Context, vm: str, name: LabName = "lab", timeout: Timeout = 30.0
) -> None:
    """Run a command in a VM that runs the lab's guest image; prints its output."""
    client = lab_client(name)
    host = client.call("GET", f"/v1/vms/{vm}")["host"]
    sock = LABS / name / "run" / host / vm / "console.sock"
    try:
        code, out = asyncio.run(console.run(sock, " ".join(context.args), timeout))
    except console.ConsoleFailure as error:
        raise Failure(f"vm {vm}", str(error), "console") from None
    sys.stdout.buffer.write(out)
    sys.stdout.flush()
    sys.exit(code)


@lab.command("owner")
def lab_owner(owner: str, name: LabName = "lab", output: Output = Format.table) -> None:
    """Issue the certificate with which owner OWNER states things of his VMs."""
    lab_state(name)
    try:
        parse_name(owner, "owner")
    except ValueError as error:
        raise Failure("lab owner", str(error), "usage", exit_code=Exit.USAGE) from None
    show(labs.owner(_topology(name, 1), owner), output)


@lab.command("outside")
def lead_outside(
    network: str,
    host: Annotated[str, typer.Option(help="where the gateway is")],
    name: LabName = "lab",
    output: Output = Format.table,
) -> None:
    """Give a routed network a gateway to the lab's outside; `lab exec outside` is a host there.

    With several, the router outside sends to each of them.
    """
    client = lab_client(name)
    networks = {each["name"]: each for each in client.call("GET", "/v1/networks")}
    subnets = {family: networks.get(network, {}).get(family) for family in outside.ROUTER}
    others = client.call("GET", "/v1/gateways")
    taken = [each["leg"][family] for each in others for family in outside.ROUTER]
    leg = outside.free_leg(taken, [family for family, subnet in subnets.items() if subnet])
    try:
        outside.reach(name, host)
        wish = {"network": network, "host": host, "leg": leg}
        made = client.call("POST", "/v1/gateways", wish)
        legs = [each["leg"] for each in (*others, made) if each["network"] == network]
        outside.route(
            name,
            {
                subnet: [each[family].partition("/")[0] for each in legs if each[family]]
                for family, subnet in subnets.items()
                if subnet
            },
        )
    except labs.LabFailure as error:
        raise _failure(error) from None
    show(row(made), output)


@endpoint.command("add")
def endpoint_add(
    name: str,
    host: Annotated[str, typer.Option(help="where it is attached")],
    network: Annotated[str, typer.Option(help="which network")],
    ipv4: Annotated[str | None, typer.Option(help="chosen when left out")] = None,
    ipv6: Annotated[str | None, typer.Option(help="chosen when left out")] = None,
    lab_name: LabName = "lab",
    api: Api = None,
    output: Output = Format.table,
) -> None:
    """Attach a new network namespace to a network, like a VM."""
    namespace = endpoint_namespace(lab_name, name)
    client = Client(api) if api else lab_client(lab_name)
    fresh = not (labs.NETNS / namespace).exists()
    if fresh:
        subprocess.run(["ip", "netns", "add", namespace], check=False, capture_output=True)
    wish = {
        "name": name,
        "host": host,
        "namespace": namespace,
        "interface": {"network": network, "mac": "", "ipv4": ipv4, "ipv6": ipv6},
    }
    try:
        made = client.call("POST", "/v1/endpoints", wish)
    except Failure:
        if fresh:
            subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)
        raise
    _wait_attached(namespace)
    show(made, output)


def _wait_attached(namespace: str) -> None:
    """Return when the endpoint's interface is up: the NVE makes it after the NVA's push."""
    command = f"ip -n {namespace} -o link show eth0 up"
    for _ in range(200):
        done = subprocess.run(command.split(), check=False, capture_output=True)
        if done.stdout:
            return
        subprocess.run(["sleep", "0.02"], check=False)
    raise Failure("endpoint", "its interface did not come up", "not_attached")


def lab_guest_boot(client: Client, interfaces: list[dict[str, str]], append: str) -> dict[str, Any]:
    """The lab's own guest image for a VM that brings none, with its addresses to configure."""
    networks = {each["name"]: each for each in client.call("GET", "/v1/networks")}
    try:
        image = guest.build(CACHE, {"bin/overland-probe": helper_path()})
    except (guest.GuestFailure, BuildError, OSError) as error:
        raise Failure("guest image", str(error), "guest_image") from None
    words = ["console=ttyS0", "quiet"]
    for index, interface in enumerate(interfaces):
        words += _guest_words(index, interface, networks.get(interface["network"], {}))
    return {
        "kernel": str(image.kernel),
        "initrd": str(image.initrd),
        "append": " ".join([*words, append]).strip(),
    }


def _guest_words(index: int, interface: dict[str, str], network: dict[str, Any]) -> list[str]:
    """The interface's addresses, and in a routed network its gateways, as the guest reads them."""
    routed = network.get("kind") in ("l3", "ila")
    addresses, gateways = [], []
    for family, whole in (("ipv4", "32"), ("ipv6", "128")):
        if interface.get(family) and network.get(family):
            gateway, _, length = gateway_of(network[family]).partition("/")
            addresses.append(f"{interface[family]}/{whole if routed else length}")
            gateways.append(gateway)
    words = [f"ov.ip={index},{','.join(addresses) or '-'}"]
    return [*words, f"ov.gw={index},{','.join(gateways)}"] if routed else words
