"""`overland NOUN VERB`: parses, calls, exits. No traceback ever reaches a person."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer._click.exceptions import ClickException

from overland.cli.client import Client, write_context
from overland.cli.lab import lab
from overland.cli.options import Output
from overland.cli.output import Exit, Failure, Format, done, fail
from overland.cli.probe import probe
from overland.cli.records import host, network
from overland.cli.sim import sim
from overland.cli.vm import migration, vm
from overland.config import ConfigFailure, NvaConfig, NveConfig, load
from overland.ports import PortFailure

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
nva = typer.Typer(no_args_is_help=True, help="The network virtualization authority.")
nve = typer.Typer(no_args_is_help=True, help="The network virtualization edge of one host.")
config = typer.Typer(no_args_is_help=True, help="Configuration files.")
context = typer.Typer(no_args_is_help=True, help="Which NVA commands go to.")
for _name, _part in (
    ("nva", nva),
    ("nve", nve),
    ("config", config),
    ("context", context),
    ("network", network),
    ("host", host),
    ("vm", vm),
    ("migration", migration),
    ("lab", lab),
    ("probe", probe),
):
    app.add_typer(_part, name=_name)
app.command("sim")(sim)


@app.callback()
def everywhere(
    api: Annotated[str | None, typer.Option("--api", help="URL of the NVA's API")] = None,
) -> None:
    """Move running virtual machines between hosts without losing a packet."""
    if api is not None:
        os.environ["OVERLAND_API"] = api


ConfigFile = Annotated[Path, typer.Option("--config", help="TOML file")]


def _logging() -> None:
    logging.getLogger("picows").setLevel(logging.WARNING)
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")


@nva.command("run")
def nva_run(config: ConfigFile) -> None:
    """Run the NVA of a domain."""
    from overland.daemon.nva import run_nva

    settings = load(config, NvaConfig)
    assert isinstance(settings, NvaConfig)
    _logging()
    run_nva(settings)


@nve.command("run")
def nve_run(config: ConfigFile) -> None:
    """Run the NVE of this host."""
    from overland.daemon.nve import run_nve

    settings = load(config, NveConfig)
    assert isinstance(settings, NveConfig)
    _logging()
    asyncio.run(run_nve(settings))


@config.command("check")
def config_check(file: Path, output: Output = Format.table) -> None:
    """Check a configuration file of either daemon."""
    kind = (
        NveConfig if "\nhost" in "\n" + (file.read_text() if file.exists() else "") else NvaConfig
    )
    load(file, kind)
    done({"file": str(file), "kind": kind.__name__}, output)


@context.command("use")
def context_use(url: str, output: Output = Format.table) -> None:
    """Send commands to the NVA at URL from now on."""
    Client(url)  # a URL that cannot be is refused before it is written
    write_context(url)
    done({"api": url}, output)


def main() -> None:
    """Entry point."""
    try:
        app(standalone_mode=False)
    except Failure as failure:
        fail(failure)
    except ConfigFailure as failure:
        fail(Failure("config", str(failure), "config", exit_code=Exit.USAGE))
    except PortFailure as failure:
        fail(Failure("daemon", str(failure), "failed"))
    except ClickException as error:
        fail(
            Failure(
                "usage",
                error.format_message() or "a verb is missing",
                "usage",
                "see --help",
                Exit.USAGE,
            )
        )
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except OSError as error:
        fail(Failure(error.filename or "system", error.strerror or str(error), "system"))
