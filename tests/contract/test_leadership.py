"""Several NVAs on one etcd: one is active, and nobody else writes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from overland.nva.leadership import Leader, Leadership
from overland.ports import Conflict, Expect, Put
from overland.store.etcd import EtcdStore
from tests.etcd import Members, members

LIMIT_S = 20.0


@contextlib.asynccontextmanager
async def candidate(etcd: Members, name: str) -> AsyncIterator[Leadership]:
    made = Leadership(EtcdStore(etcd.endpoints), Leader(name=name, api=f"http://{name}"))
    try:
        yield made
    finally:
        await made.close()


@pytest.mark.req("N-10")
async def test_another_takes_over_and_the_deposed_one_cannot_write(tmp_path: Path) -> None:
    """N-10: the first stops to renew, as if it were cut off, and still believes that it leads."""
    async with (
        asyncio.timeout(LIMIT_S),
        members(tmp_path, 1) as etcd,
        candidate(etcd, "a") as first,
        candidate(etcd, "b") as second,
    ):
        await first.win()
        revision = await first.commit([], [Put(key="vm/web", value=b"1")])
        await second.win()
        assert second.seen == Leader(name="b", api="http://b")
        assert (first.leads(), second.leads()) == (False, True)
        late = asyncio.create_task(
            first.commit([Expect(key="vm/web", revision=revision)], [Put(key="vm/web", value=b"2")])
        )
        done, _ = await asyncio.wait({late}, timeout=0.5)
        assert not done, "its caller is never answered, and so decides nothing"
        assert await first.keep()
        late.cancel()
        entries, _ = await second.list("vm/")
        assert [entry.value for entry in entries] == [b"1"]


@pytest.mark.req("N-10")
async def test_the_active_one_stays_active_and_is_refused_like_any_writer(tmp_path: Path) -> None:
    async with (
        asyncio.timeout(LIMIT_S),
        members(tmp_path, 1) as etcd,
        candidate(etcd, "a") as first,
        candidate(etcd, "b") as second,
    ):
        await first.win()
        keeping = asyncio.create_task(first.keep())
        waiting = asyncio.create_task(second.win())
        done, _ = await asyncio.wait({keeping, waiting}, timeout=5.0)
        assert not done
        assert first.leads()
        assert second.seen == Leader(name="a", api="http://a")
        with pytest.raises(Conflict):
            await first.commit([Expect(key="x", revision=1)], [Put(key="x", value=b"")])
        for task in (keeping, waiting):
            task.cancel()


@pytest.mark.req("N-10")
async def test_one_that_cannot_reach_the_store_ends_its_term(tmp_path: Path) -> None:
    """6-10: it does not decide, not even that a write has failed."""
    async with (
        asyncio.timeout(LIMIT_S),
        members(tmp_path, 1) as etcd,
        candidate(etcd, "a") as only,
    ):
        await only.win()
        etcd.kill(0)
        assert await only.keep() == "the store did not answer in time"
        assert not only.leads()


async def test_one_that_starts_again_does_not_wait_for_its_own_former_lease(tmp_path: Path) -> None:
    async with asyncio.timeout(LIMIT_S), members(tmp_path, 1) as etcd:
        async with candidate(etcd, "a") as former:
            await former.win()
        async with candidate(etcd, "a") as again, asyncio.timeout(1.0):
            await again.win()
