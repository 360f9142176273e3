"""The Store port on SQLite: one node, durable (WAL, synchronous FULL).

Calls are made in place: a commit is about a millisecond, and handing it to a thread would cost the
hot path of a move more than that. Leases live in memory only: after a restart everybody's lease
has to be renewed anyway.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from overland.ports import Change, Conflict, Delete, Entry, Expect, Put, StoreFailure

SCHEMA = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS entry (key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER);
CREATE TABLE IF NOT EXISTS change (
  at INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, value BLOB, revision INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, number INTEGER NOT NULL);
"""
_KEPT_CHANGES = 10_000


class SqliteStore:
    """One file. StoreFailure when it cannot be used, with the reason in one line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_TABLES)
            for name, number in (("schema", SCHEMA), ("revision", 0)):
                self._db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (name, number))
            found = self._number("schema")
        except sqlite3.Error as error:
            raise StoreFailure(f"store {path}: {error}") from None
        if found != SCHEMA:
            raise StoreFailure(f"store {path}: schema {found}, this version knows {SCHEMA}")
        self._changed = asyncio.Condition()
        self._leases: dict[str, float] = {}
        self._held: dict[str, set[str]] = {}

    def _number(self, name: str) -> int:
        row = self._db.execute("SELECT number FROM meta WHERE name = ?", (name,)).fetchone()
        return int(row[0])

    async def get(self, key: str) -> Entry | None:
        await self._expire()
        try:
            row = self._db.execute("SELECT * FROM entry WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise StoreFailure(f"store {self._path}: {error}") from None
        return _entry(row) if row else None

    async def list(self, prefix: str) -> tuple[list[Entry], int]:
        await self._expire()
        try:
            rows = self._db.execute(
                "SELECT * FROM entry WHERE key >= ? AND key < ? ORDER BY key",
                (prefix, prefix + "\U0010ffff"),
            ).fetchall()
            return [_entry(row) for row in rows], self._number("revision")
        except sqlite3.Error as error:
            raise StoreFailure(f"store {self._path}: {error}") from None

    async def commit(self, expects: Sequence[Expect], writes: Sequence[Put | Delete]) -> int:
        await self._expire()
        return await self._transaction(expects, writes)

    async def _transaction(self, expects: Sequence[Expect], writes: Sequence[Put | Delete]) -> int:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                revision = self._write(expects, writes)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has rolled back already
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StoreFailure(f"store {self._path}: {error}") from None
        for write in writes:
            for keys in self._held.values():
                keys.discard(write.key)
            if isinstance(write, Put) and write.lease is not None:
                self._held.setdefault(write.lease, set()).add(write.key)
        async with self._changed:
            self._changed.notify_all()
        return revision

    def _write(self, expects: Sequence[Expect], writes: Sequence[Put | Delete]) -> int:
        for expect in expects:
            row = self._db.execute(
                "SELECT revision FROM entry WHERE key = ?", (expect.key,)
            ).fetchone()
            if (int(row[0]) if row else 0) != expect.revision:
                raise Conflict(f"{expect.key} has changed")
        revision = self._number("revision") + 1
        self._db.execute("UPDATE meta SET number = ? WHERE name = 'revision'", (revision,))
        for write in writes:
            value = write.value if isinstance(write, Put) else None
            if value is not None:
                self._db.execute(
                    "INSERT OR REPLACE INTO entry VALUES (?, ?, ?)", (write.key, value, revision)
                )
            elif not self._db.execute("DELETE FROM entry WHERE key = ?", (write.key,)).rowcount:
                continue
            self._db.execute(
                "INSERT INTO change (key, value, revision) VALUES (?, ?, ?)",
                (write.key, value, revision),
            )
        self._db.execute(
            "DELETE FROM change WHERE at <= (SELECT MAX(at) FROM change) - ?", (_KEPT_CHANGES,)
        )
        return revision

    async def watch(self, prefix: str, after: int) -> AsyncIterator[Change]:
        at = 0
        while True:
            rows = self._db.execute(
                "SELECT at, key, value, revision FROM change WHERE at > ? ORDER BY at", (at,)
            ).fetchall()
            for at, key, value, revision in rows:  # noqa: B007 - `at` is kept for the next look
                if revision > after and key.startswith(prefix):
                    yield Change(key=key, value=value, revision=revision)
            async with self._changed:
                await self._changed.wait_for(lambda seen=at: self._latest() > seen)  # type: ignore[misc]

    def _latest(self) -> int:
        row = self._db.execute("SELECT MAX(at) FROM change").fetchone()
        return int(row[0] or 0)

    async def grant(self, lease: str, ttl_s: float) -> None:
        self._leases[lease] = time.monotonic() + ttl_s

    async def revoke(self, lease: str) -> None:
        self._leases.pop(lease, None)
        keys = self._held.pop(lease, set())
        if keys:
            await self._transaction([], [Delete(key=key) for key in sorted(keys)])

    async def _expire(self) -> None:
        now_s = time.monotonic()
        for lease in [name for name, end_s in self._leases.items() if end_s <= now_s]:
            await self.revoke(lease)

    async def close(self) -> None:
        self._db.close()


def _entry(row: tuple[str, bytes, int]) -> Entry:
    return Entry(key=row[0], value=row[1], revision=row[2])
