"""One contract for every store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from overland.ports import Conflict, Delete, Expect, Put, Store, StoreFailure
from overland.store.memory import MemoryStore
from overland.store.sqlite import SqliteStore


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    made: Store = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "db")
    yield made
    await made.close()


async def test_what_was_put_is_there_at_the_revision_of_its_commit(store: Store) -> None:
    revision = await store.commit([], [Put(key="a", value=b"1")])
    entry = await store.get("a")
    assert entry is not None
    assert (entry.value, entry.revision) == (b"1", revision)
    assert await store.get("b") is None


async def test_a_commit_that_expects_wrongly_writes_nothing(store: Store) -> None:
    revision = await store.commit([Expect(key="a", revision=0)], [Put(key="a", value=b"1")])
    with pytest.raises(Conflict):
        await store.commit(
            [Expect(key="a", revision=revision + 1)],
            [Put(key="a", value=b"2"), Put(key="b", value=b"2")],
        )
    entry = await store.get("a")
    assert entry is not None
    assert entry.value == b"1"
    assert await store.get("b") is None


async def test_a_list_is_in_key_order_and_only_below_the_prefix(store: Store) -> None:
    for key in ("vm/b", "vm/a", "vn/a"):
        await store.commit([], [Put(key=key, value=b"")])
    entries, revision = await store.list("vm/")
    assert [entry.key for entry in entries] == ["vm/a", "vm/b"]
    assert revision == (await store.commit([], [Delete(key="vn/a")])) - 1


async def test_a_watch_tells_every_change_after_a_revision_in_order(store: Store) -> None:
    first = await store.commit([], [Put(key="a/1", value=b"1")])
    await store.commit([], [Put(key="b", value=b"x"), Put(key="a/2", value=b"2")])
    await store.commit([], [Delete(key="a/1")])
    seen = []
    watch = store.watch("a/", first)
    async for change in watch:
        seen.append((change.key, change.value))
        if len(seen) == 2:
            break
    assert seen == [("a/2", b"2"), ("a/1", None)]

    async def next_change() -> str:
        async for change in watch2:
            return change.key
        raise AssertionError

    _, now = await store.list("")
    watch2 = store.watch("a/", now)
    waiting = asyncio.create_task(next_change())
    await store.commit([], [Put(key="a/3", value=b"3")])
    assert await waiting == "a/3"


async def test_keys_of_an_ended_lease_are_gone(store: Store) -> None:
    await store.grant("h1", 60.0)
    await store.commit([], [Put(key="host/h1", value=b"", lease="h1")])
    await store.revoke("h1")
    assert await store.get("host/h1") is None
    await store.grant("h1", 0.0)
    await store.commit([], [Put(key="vm/a", value=b"")])
    await store.grant("h1", 0.0)
    assert await store.get("vm/a") is not None


async def test_sqlite_keeps_its_word_across_a_restart(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "db")
    revision = await store.commit([], [Put(key="a", value=b"1")])
    await store.close()
    again = SqliteStore(tmp_path / "db")
    entry = await again.get("a")
    assert entry is not None
    assert entry.revision == revision
    assert await again.commit([], [Delete(key="a")]) == revision + 1
    await again.close()


def test_a_corrupt_file_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "db"
    path.write_bytes(b"this is not a database at all" * 100)
    with pytest.raises(StoreFailure, match="file is not a database"):
        SqliteStore(path)
