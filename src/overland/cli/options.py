"""Options that many commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from overland.cli.output import Exit, Failure, Format

Api = Annotated[str | None, typer.Option("--api", help="URL of the NVA's API")]
LabName = Annotated[str, typer.Option("--name", "--lab", help="the lab's name")]
Output = Annotated[Format, typer.Option("--output", "-o", help="table, json or yaml")]


def spec(text: str) -> dict[str, str]:
    """`NAME,ipv4=A,ipv6=B,mac=M` as a dictionary with `network`."""
    network, *rest = text.split(",")
    found = {"network": network}
    for part in rest:
        key, separator, value = part.partition("=")
        if not separator or key not in ("ipv4", "ipv6", "mac"):
            why = f"{part!r}: write NAME,ipv4=A,ipv6=A,mac=M"
            raise Failure("--network", why, "usage", exit_code=Exit.USAGE)
        found[key] = value
    return found
