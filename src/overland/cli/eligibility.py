"""`overland vm eligibility`: whether a VM may be moved, what is known of that, and from whom."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from overland.cli.client import Client
from overland.cli.options import Api, Output
from overland.cli.output import Exit, Failure, Format, show
from overland.model.eligibility import LONGEST_OUTAGE_MS, Statement
from overland.wire.seal import Sealer

eligibility = typer.Typer(no_args_is_help=True, help="Whether a VM may be moved, and who knows.")
Certificate = Annotated[Path, typer.Option(help="the owner's certificate, PEM")]
Key = Annotated[Path, typer.Option(help="its private key, PEM; it stays here")]
MaybeCertificate = Annotated[Path | None, typer.Option(help="the owner's certificate, PEM")]
MaybeKey = Annotated[Path | None, typer.Option(help="its private key, PEM; it stays here")]
NONE = "none"


@eligibility.command("show")
def shown(name: str, api: Api = None, output: Output = Format.table) -> None:
    """What keeps each address of a VM the same in a move, and all that was said of it."""
    show(Client(api).call("GET", f"/v1/vms/{name}/eligibility"), output)


@eligibility.command("set")
def declare(
    name: str,
    outside: Annotated[
        list[str] | None,
        typer.Option(help="correspondent that may be in no network: address or subnet; none: none"),
    ] = None,
    uncovered: Annotated[
        str | None, typer.Option(help="if one cannot be told of a move: refuse it, or flag it")
    ] = None,
    latency: Annotated[str | None, typer.Option(help=", ".join(LONGEST_OUTAGE_MS))] = None,
    api: Api = None,
    output: Output = Format.table,
) -> None:
    """Say what you know of a VM's work; what is left out stays as it was."""
    _one_of("--uncovered", uncovered, ("refuse", "flag"))
    _one_of("--latency", latency, tuple(LONGEST_OUTAGE_MS))
    wish: dict[str, Any] = {"uncovered": uncovered, "latency": latency}
    wish["outside"] = [each for each in outside if each != NONE] if outside else None
    said = {key: value for key, value in wish.items() if value is not None}
    show(Client(api).call("PATCH", f"/v1/vms/{name}/eligibility", said), output)


@eligibility.command("register")
def register(
    name: str, certificate: Certificate, key: Key, api: Api = None, output: Output = Format.table
) -> None:
    """As its owner: all applications of this VM handle a change of address, for good."""
    show(_state(name, certificate, key, api, handles=True), output)


@eligibility.command("revoke")
def revoke(
    name: str,
    certificate: MaybeCertificate = None,
    key: MaybeKey = None,
    api: Api = None,
    output: Output = Format.table,
) -> None:
    """End that: as its owner, with his certificate; or as the operator, without."""
    if certificate is not None and key is not None:
        show(_state(name, certificate, key, api, handles=False), output)
    elif certificate is None and key is None:
        show(Client(api).call("DELETE", f"/v1/vms/{name}/registration"), output)
    else:
        why = "a certificate and its key belong together"
        raise Failure("vm eligibility revoke", why, "usage", exit_code=Exit.USAGE)


def _state(name: str, certificate: Path, key: Path, api: str | None, *, handles: bool) -> Any:
    """Sign it here, and let the NVA hear it: the key is shown to nobody."""
    try:
        sealer = Sealer(certificate, key)
    except ValueError as error:
        raise Failure("--certificate", str(error), "usage", exit_code=Exit.USAGE) from None
    statement = Statement(vm=name, handles_address_change=handles, at_ns=time.time_ns())
    signed = msgspec.to_builtins(sealer.sign(statement))
    return Client(api).call("POST", f"/v1/vms/{name}/registration", signed)


def _one_of(option: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        why = f"{value!r}: use {', '.join(allowed)}"
        raise Failure(option, why, "usage", exit_code=Exit.USAGE)
