"""The tables of spec/handover.md that say cell by cell what a machine does."""

from __future__ import annotations

import os
from pathlib import Path

SPEC = Path(__file__).parents[2] / "spec" / "handover.md"

Table = dict[tuple[str, str], str]
"""What a machine does by (column, row), in the order in which the specification shows them."""


def check_table(name: str, found: Table) -> None:
    """Compare `found` with the specification's table `name`; OVERLAND_ACCEPT=1 keeps `found`."""
    if os.environ.get("OVERLAND_ACCEPT"):
        _write(name, found)
    assert found == _read(name)


def _mark(name: str) -> str:
    return f"<!-- {name} table -->"


def _read(name: str) -> Table:
    block = SPEC.read_text().split(_mark(name))[1]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in block.strip().splitlines()]
    header, body = rows[0][1:], rows[2:]
    return {
        (column, row[0]): did for row in body for column, did in zip(header, row[1:], strict=True)
    }


def _write(name: str, found: Table) -> None:
    """Put what the code does into the specification; read the difference."""
    columns = list(dict.fromkeys(column for column, _ in found))
    rows = dict.fromkeys(row for _, row in found)
    head = f"| event | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}\n"
    body = (f"| {row} | {' | '.join(found[column, row] for column in columns)} |\n" for row in rows)
    before, _, after = SPEC.read_text().split(_mark(name))
    SPEC.write_text(f"{before}{_mark(name)}\n{head}{''.join(body)}\n{_mark(name)}{after}")
