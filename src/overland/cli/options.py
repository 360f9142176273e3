"""Options that many commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from overland.cli.output import Exit, Failure, Format
from overland.model.names import parse_size

Api = Annotated[str | None, typer.Option("--api", help="URL of the NVA's API")]
LabName = Annotated[str, typer.Option("--name", "--lab", help="the lab's name")]
Output = Annotated[Format, typer.Option("--output", "-o", help="table, json or yaml")]


def disk_spec(text: str, option: str) -> dict[str, Any]:
    """`PATH,kind=K,size=S,format=F` as a disk."""
    path, *rest = text.split(",")
    found: dict[str, Any] = {"path": path}
    if path.endswith(".qcow2"):
        found["format"] = "qcow2"
    for part in rest:
        key, _, value = part.partition("=")
        allowed = {"kind": ("shared", "moved", "left"), "format": ("raw", "qcow2")}
        try:
            if key == "size":
                found["size_bytes"] = parse_size(value)
            elif value in allowed.get(key, ()):
                found[key] = value
            else:
                use = "PATH[,kind=shared|moved|left][,size=1GiB][,format=raw|qcow2]"
                raise ValueError(f"{part!r}: write {use}")
        except ValueError as error:
            raise Failure(option, str(error), "usage", exit_code=Exit.USAGE) from None
    return found


def spec(
    text: str, option: str = "--network", keys: tuple[str, ...] = ("ipv4", "ipv6", "mac")
) -> dict[str, str]:
    """`NAME,ipv4=A,ipv6=B,mac=M` as a dictionary with `network` and what is given of `keys`."""
    network, *rest = text.split(",")
    found = {"network": network}
    for part in rest:
        key, separator, value = part.partition("=")
        if not separator or key not in keys:
            why = f"{part!r}: write {','.join(('NAME', *(f'{each}=A' for each in keys)))}"
            raise Failure(option, why, "usage", exit_code=Exit.USAGE)
        found[key] = value
    return found
