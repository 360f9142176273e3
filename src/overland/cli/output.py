"""What people and scripts read: tables, JSON, YAML; errors in one line. The only prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NoReturn

import yaml
from rich.console import Console
from rich.table import Table

UNCUT = 10**6
"""Columns of what is not a terminal; a table is no wider than what is in it."""


class Format(StrEnum):
    table = "table"
    json = "json"
    yaml = "yaml"


class Exit:
    """Exit codes; docs/reference/cli.md."""

    DONE, ELSE, USAGE, REFUSED, ABORTED, UNKNOWN = range(6)


class Failure(Exception):
    """What ends a command: printed as one line, with an exit code."""

    def __init__(self, what: str, why: str, code: str, hint: str = "", exit_code: int = 1) -> None:
        super().__init__(what)
        self.lines = [_line(what, why, code, hint)]
        self.exit_code = exit_code

    @classmethod
    def of_problem(cls, body: dict[str, Any]) -> Failure:
        """A problem from the API: every blocker in a line of its own."""
        blockers = body.get("blockers") or [
            {"what": body["title"], "why": body["detail"], "code": body["code"], "hint": ""}
        ]
        failure = cls("", "", "", exit_code=Exit.REFUSED)
        failure.lines = [_line(b["what"], b["why"], b["code"], b["hint"]) for b in blockers]
        if blockers[0]["code"] in ("failed", "store"):
            failure.exit_code = Exit.ELSE
        return failure


def _line(what: str, why: str, code: str, hint: str) -> str:
    return f"error: {what}: {why} (code {code})" + (f"; {hint}" if hint else "")


def fail(failure: Failure) -> NoReturn:
    for line in failure.lines:
        print(line, file=sys.stderr)
    sys.exit(failure.exit_code)


def show(value: Any, form: Format, columns: Sequence[str] = ()) -> None:
    """Print one object or a list of them; `columns` choose what a table shows."""
    if form is Format.json:
        print(json.dumps(value, indent=2))
    elif form is Format.yaml:
        print(yaml.safe_dump(value, sort_keys=False), end="")
    elif isinstance(value, list):
        table = Table(box=None, header_style="bold")
        for column in columns:
            table.add_column(column, overflow="fold")
        for each in value:
            table.add_row(*(_cell(each.get(column)) for column in columns))
        _print(table)
    else:
        table = Table(box=None, show_header=False)
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        for key, content in value.items():
            table.add_row(key, _cell(content))
        _print(table)


def _print(table: Table) -> None:
    """As wide as the terminal, whose lines fold; uncut when a file or a program reads it."""
    console = Console() if sys.stdout.isatty() else Console(width=UNCUT, height=1)
    console.print(table)


def done(value: dict[str, Any], form: Format) -> None:
    """Answer of a command whose success says it all: silent for people, an object for scripts."""
    if form is not Format.table:
        show(value, form)


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case dict() | list():
            return json.dumps(value)
        case _:
            return str(value)
