"""Tables in documents that say cell by cell what the code does."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "spec" / "handover.md"

Table = dict[tuple[str, str], str]
"""What the code does by (column, row), in the order in which the document shows them."""


def check_table(name: str, found: Table, document: Path = SPEC, corner: str = "event") -> None:
    """Compare `found` with the document's table `name`; OVERLAND_ACCEPT=1 keeps `found`.

    `corner` heads the column in which the rows are named.
    """
    if os.environ.get("OVERLAND_ACCEPT"):
        _write(name, found, document, corner)
    assert found == _read(name, document)


def _mark(name: str) -> str:
    return f"<!-- {name} table -->"


def _read(name: str, document: Path) -> Table:
    block = document.read_text().split(_mark(name))[1]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in block.strip().splitlines()]
    header, body = rows[0][1:], rows[2:]
    return {
        (column, row[0]): did for row in body for column, did in zip(header, row[1:], strict=True)
    }


def _write(name: str, found: Table, document: Path, corner: str) -> None:
    """Put what the code does into the document; read the difference."""
    columns = list(dict.fromkeys(column for column, _ in found))
    rows = dict.fromkeys(row for _, row in found)
    head = f"| {corner} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}\n"
    body = (f"| {row} | {' | '.join(found[column, row] for column in columns)} |\n" for row in rows)
    before, _, after = document.read_text().split(_mark(name))
    document.write_text(f"{before}{_mark(name)}\n{head}{''.join(body)}\n{_mark(name)}{after}")
