"""`overland network allow`, `deny`, `policies`: which routed networks may talk with each other."""

from __future__ import annotations

from typing import Any

import typer

from overland.cli.client import Client
from overland.cli.options import Api, Output
from overland.cli.output import Failure, Format, done, show

COLUMNS = ("networks", "since")


def add_to(network: typer.Typer) -> None:
    """Give `overland network` these verbs."""
    network.command("allow")(allow)
    network.command("deny")(deny)
    network.command("policies")(policies)


def allow(one: str, other: str, api: Api = None, output: Output = Format.table) -> None:
    """Let the tenants of two routed networks talk; returns when it is so on all their hosts."""
    wish = {"networks": [one, other]}
    _finish(Client(api).call("POST", "/v1/policies", wish), output, "not yet allowed")


def deny(one: str, other: str, api: Api = None, output: Output = Format.table) -> None:
    """End that, as is the default; returns when it is so on all their hosts."""
    answer = Client(api).call("DELETE", f"/v1/policies/{one}/{other}")
    _finish(answer, output, "not yet denied")


def policies(api: Api = None, output: Output = Format.table) -> None:
    """All pairs of networks that may talk; no others may."""
    show(Client(api).call("GET", "/v1/policies"), output, COLUMNS)


def _finish(answer: dict[str, Any], output: Format, what: str) -> None:
    done(answer, output)
    if answer["waiting"]:
        why = f"{what} on {', '.join(answer['waiting'])}: the NVE does not answer, or could not"
        hint = "it is done once it can; the log of that NVE has the reason"
        raise Failure(f"networks {' and '.join(answer['networks'])}", why, "waiting", hint)
