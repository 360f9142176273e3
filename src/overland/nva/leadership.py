"""One of several NVAs is active: the one whose key is in their store (N-10).

Only what the active one writes is written: each of its transactions expects its own key as well.
On a write of which nobody knows whether it was made nothing may be decided, so its caller is never
answered: the whole NVA ends, and begins anew as a standby.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

import msgspec

from overland.model.cluster import Record
from overland.nva.election import LEASE_S, Term, begun, renewed
from overland.ports import (
    Conflict,
    Delete,
    Entry,
    Expect,
    Put,
    Store,
    StoreFailure,
    StoreUnsure,
)

KEY = "leader"
RENEW_S = 0.5
LOOK_S = 0.25
"""How often a standby looks: a watch would not notice that its store's member is cut off."""

log = logging.getLogger(__name__)


class Leader(Record, frozen=True, kw_only=True):
    """Who is active. `name` is one of a kind in the domain, `api` the URL of its API."""

    name: str
    api: str


class Leadership:
    """This NVA (`me`) among those on `store`. Also the store through which it writes."""

    def __init__(self, store: Store, me: Leader) -> None:
        self._store = store
        self._me = me
        self._lease = f"leader/{me.name}"
        self._term: Term | None = None
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.seen: Leader | None = None
        """Who leads, as last seen; None when nobody does or the store does not answer."""

    def leads(self) -> bool:
        """Whether nobody else can be active now."""
        return self._term is not None and self._term.holds(time.monotonic())

    async def win(self) -> None:
        """Return once this NVA is the active one."""
        why = ""
        forgotten = False
        while self._term is None:
            try:
                if not forgotten:
                    # Of a former process of ours: it has ended, its lease would still run.
                    await self._store.revoke(self._lease)
                    forgotten = True
                await self._stand()
            except StoreFailure as failure:
                self.seen = None
                if str(failure) != why:
                    log.warning("standby: %s", failure)
                why = str(failure)
            if self._term is None:
                await asyncio.sleep(LOOK_S)

    async def _stand(self) -> None:
        entry = await self._store.get(KEY)
        self.seen = msgspec.json.decode(entry.value, type=Leader) if entry is not None else None
        if entry is not None:
            return
        asked_s = time.monotonic()
        await self._store.grant(self._lease, LEASE_S)
        put = Put(key=KEY, value=msgspec.json.encode(self._me), lease=self._lease)
        try:
            revision = await self._store.commit([Expect(key=KEY, revision=0)], [put])
        except Conflict:
            return
        self.seen = self._me
        self._term = begun(revision, asked_s)

    async def keep(self) -> str:
        """Renew the lease for as long as it goes; why it does not any more."""
        while self._term is not None:
            asked_s = time.monotonic()
            try:
                async with asyncio.timeout(self._term.until_s - asked_s):
                    await self._store.grant(self._lease, LEASE_S)
                    found = _revision(await self._store.get(KEY))
            except (StoreFailure, TimeoutError) as failure:
                log.warning("the lease is not renewed: %s", failure or "the store is silent")
                if not self.leads():
                    return "the store did not answer in time"
            else:
                self._term = renewed(self._term, found, asked_s)
            left_s = self._term.until_s - time.monotonic() if self._term is not None else 0.0
            await asyncio.wait([self._ended], timeout=min(RENEW_S, left_s))
            if self._ended.done():
                return self._ended.result()
        return "another NVA has taken over"

    async def list(self, prefix: str) -> tuple[list[Entry], int]:
        return await self._store.list(prefix)

    async def commit(self, expects: Sequence[Expect], writes: Sequence[Put | Delete]) -> int:
        """As the store's; only while this NVA leads. Else it does not return: see above."""
        assert self._term is not None
        mine = Expect(key=KEY, revision=self._term.revision)
        try:
            return await self._store.commit([mine, *expects], writes)
        except StoreUnsure as failure:
            self._end(f"whether a record is written is not known: {failure}")
        except Conflict:
            if await self._is(mine):
                raise
            self._end("another NVA has taken over")
        never: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        return await never

    def _end(self, why: str) -> None:
        if not self._ended.done():
            self._ended.set_result(why)

    async def _is(self, mine: Expect) -> bool:
        try:
            return _revision(await self._store.get(KEY)) == mine.revision
        except StoreFailure:
            return False

    async def close(self) -> None:
        await self._store.close()


def _revision(entry: Entry | None) -> int:
    return entry.revision if entry is not None else 0
