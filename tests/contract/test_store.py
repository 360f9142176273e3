"""One contract for every store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from overland.ports import (
    Change,
    Conflict,
    Delete,
    Expect,
    Put,
    Store,
    StoreFailure,
    StoreUnsure,
)
from overland.store.etcd import EtcdStore
from overland.store.memory import MemoryStore
from overland.store.sqlite import SqliteStore
from tests.etcd import Members, members


@pytest.fixture(params=["memory", "sqlite", "etcd"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    async with contextlib.AsyncExitStack() as stack:
        made: Store
        match request.param:
            case "memory":
                made = MemoryStore()
            case "sqlite":
                made = SqliteStore(tmp_path / "db")
            case _:
                etcd = await stack.enter_async_context(members(tmp_path, 1))
                made = EtcdStore(etcd.endpoints)
        stack.push_async_callback(made.close)
        yield made


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


@contextlib.asynccontextmanager
async def etcd_store(etcd: Members) -> AsyncIterator[EtcdStore]:
    store = EtcdStore(etcd.endpoints)
    try:
        yield store
    finally:
        await store.close()


@pytest.mark.req("N-10")
async def test_etcd_goes_on_without_any_one_member(tmp_path: Path) -> None:
    """N-10: the member that is asked first dies; reads, writes and a watch go on with others."""
    async with members(tmp_path, 3) as etcd, etcd_store(etcd) as store:
        revision = await store.commit([], [Put(key="a", value=b"1")])
        watch = store.watch("a", revision)
        change = asyncio.ensure_future(anext(aiter(watch)))
        etcd.kill(0)
        second = await _committed(store, Expect(key="a", revision=revision), b"2")
        assert await change == Change(key="a", value=b"2", revision=second)
        await watch.aclose()
        etcd.kill(1)
        with pytest.raises(StoreUnsure):  # one of three decides nothing
            await store.commit([Expect(key="a", revision=second)], [Put(key="a", value=b"3")])
        etcd.start(1)
        await etcd.ready()
        await _committed(store, Expect(key="a", revision=second), b"3")


async def _committed(store: Store, expect: Expect, value: bytes) -> int:
    """Write however long the members take to choose their own leader; the revision it has."""
    while True:
        with contextlib.suppress(StoreFailure, Conflict):  # an earlier try may have been written
            await store.commit([expect], [Put(key=expect.key, value=value)])
        with contextlib.suppress(StoreFailure):
            entry = await store.get(expect.key)
            if entry is not None and entry.value == value:
                return entry.revision


async def test_a_write_that_was_made_unheard_is_known_when_the_next_is_asked(
    tmp_path: Path,
) -> None:
    """The first member has written it and falls silent; the second is asked to write the same."""
    async with members(tmp_path, 1) as etcd, eaten(etcd.endpoints[0]) as first:
        expect = Expect(key="a", revision=0)
        puts = [Put(key="a", value=b"1"), Put(key="b", value=b"1")]
        for value in (b"1", b"2"):
            store = EtcdStore([first, etcd.endpoints[0]])
            puts = [Put(key="a", value=value), Put(key="b", value=value)]
            revision = await store.commit([expect], puts)
            _, now = await store.list("")
            assert revision == now
            with pytest.raises(Conflict):  # nobody was silent: somebody else wrote it
                await store.commit([expect], puts)
            await store.close()
            expect = Expect(key="a", revision=revision)


@contextlib.asynccontextmanager
async def eaten(endpoint: str) -> AsyncIterator[str]:
    """A way to `endpoint` that eats its answers."""
    port = int(endpoint.rpartition(":")[2])

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        )
        there, back = await asyncio.open_connection("127.0.0.1", port)
        back.write(head + await reader.readexactly(length))
        await there.readuntil(b"\r\n\r\n")
        back.close()
        writer.close()

    server = await asyncio.start_server(pass_on, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
