"""The Store port as a dict: the reference semantics."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left, insort
from collections.abc import AsyncIterator, Sequence

from overland.ports import Change, Conflict, Delete, Entry, Expect, Put

LAST = "\U0010ffff"
"""No key goes on with this."""


class MemoryStore:
    """Everything in this process; gone with it."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._keys: list[str] = []
        """Those of the entries, in order."""
        self._revision = 0
        self._log: list[tuple[int, Put | Delete]] = []
        self._watchers: list[asyncio.Event] = []
        """Of watches that have seen all; the next write wakes them."""
        self._leases: dict[str, float] = {}
        self._held: dict[str, set[str]] = {}

    async def get(self, key: str) -> Entry | None:
        if self._leases:
            await self._expire()
        return self._entries.get(key)

    async def list(self, prefix: str) -> tuple[list[Entry], int]:
        if self._leases:
            await self._expire()
        first, end = bisect_left(self._keys, prefix), bisect_left(self._keys, prefix + LAST)
        return [self._entries[key] for key in self._keys[first:end]], self._revision

    async def commit(self, expects: Sequence[Expect], writes: Sequence[Put | Delete]) -> int:
        if self._leases:
            await self._expire()
        for expect in expects:
            entry = self._entries.get(expect.key)
            if (entry.revision if entry else 0) != expect.revision:
                raise Conflict(f"{expect.key} has changed")
        return await self._write(writes)

    async def _write(self, writes: Sequence[Put | Delete]) -> int:
        self._revision += 1
        for write in writes:
            for keys in self._held.values():
                keys.discard(write.key)
            if isinstance(write, Put):
                if write.key not in self._entries:
                    insort(self._keys, write.key)
                entry = Entry(key=write.key, value=write.value, revision=self._revision)
                self._entries[write.key] = entry
                if write.lease is not None:
                    self._held.setdefault(write.lease, set()).add(write.key)
                self._log.append((self._revision, write))
            elif self._entries.pop(write.key, None) is not None:
                self._keys.remove(write.key)
                self._log.append((self._revision, write))
        watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            watcher.set()
        return self._revision

    async def watch(self, prefix: str, after: int) -> AsyncIterator[Change]:
        at = 0
        while True:
            while at < len(self._log):
                revision, write = self._log[at]
                at += 1
                if revision > after and write.key.startswith(prefix):
                    value = write.value if isinstance(write, Put) else None
                    yield Change(key=write.key, value=value, revision=revision)
            news = asyncio.Event()
            self._watchers.append(news)
            await news.wait()

    async def grant(self, lease: str, ttl_s: float) -> None:
        self._leases[lease] = time.monotonic() + ttl_s

    async def revoke(self, lease: str) -> None:
        self._leases.pop(lease, None)
        keys = self._held.pop(lease, set())
        if keys:
            await self._write([Delete(key=key) for key in sorted(keys)])

    async def _expire(self) -> None:
        now_s = time.monotonic()
        for lease in [name for name, end_s in self._leases.items() if end_s <= now_s]:
            await self.revoke(lease)

    async def close(self) -> None:
        return
