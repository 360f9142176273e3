"""A saved state goes from disk to disk, whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest

from overland.hypervisor.sealed import HEAD_BYTES, PIECE_BYTES, TAG_BYTES, Invitation, Pieces
from overland.hypervisor.statefile import Taker, give
from overland.ports import HypervisorFailure
from tests.core.test_faults import until


@pytest.mark.req("R-34")
async def test_the_file_is_kept_whole_and_the_former_one_until_then(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there" / "web"
    here.write_bytes(bytes(range(256)) * 20_000)
    there.parent.mkdir()
    there.write_bytes(b"former")
    taker = Taker()
    uri = await taker.take(there, "127.0.0.1")
    assert there.read_bytes() == b"former"
    assert await give(here, uri) == here.stat().st_size
    assert there.read_bytes() == here.read_bytes()
    assert [each.name for each in there.parent.iterdir()] == ["web"]


def _said(port: int, words: bytes) -> bytes:
    """What a taker answers to `words`; it may hang up with a reset, for much was unread."""
    with socket.create_connection(("127.0.0.1", port)) as taker, contextlib.suppress(OSError):
        taker.sendall(words)
        taker.shutdown(socket.SHUT_WR)
        return taker.recv(64)
    return b""


def _sealed(invitation: str, *pieces: bytes, length: int) -> list[bytes]:
    """The head, and each piece as it travels."""
    sealing, head = Pieces.answering(invitation, length)
    return [head, *(sealing.seal(piece) for piece in pieces)]


@pytest.mark.parametrize("what", ["for another", "cut", "damaged", "out of order"])
async def test_what_is_not_whole_is_not_kept(tmp_path: Path, what: str) -> None:
    there = tmp_path / "there" / "web"
    uri = await Taker().take(there, "127.0.0.1")
    _, port, invitation = uri.removeprefix("state:").split("|")
    if what == "for another":
        invitation = Invitation().text
    big = bytes(PIECE_BYTES)
    head, first, second = _sealed(invitation, big, big, length=2 * PIECE_BYTES)
    said = {
        "for another": head + first + second,
        "cut": head + first + second[:-1],
        "damaged": head + first + second[:-1] + bytes([second[-1] ^ 1]),
        "out of order": head + second + first,
    }[what]
    assert await asyncio.to_thread(_said, int(port), said) == b""
    assert not there.exists()
    assert not list(there.parent.iterdir())
    here = tmp_path / "here"
    here.write_bytes(b"state")
    assert await give(here, uri) == 5, "the true giver is still waited for"


async def test_nobody_on_the_way_can_read_it(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.write_bytes(b"the tenant's secret" * 1000)
    invitation = Invitation()
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"state:127.0.0.1|{server.getsockname()[1]}|{invitation.text}"
        giving = asyncio.create_task(give(here, uri))
        heard = await asyncio.to_thread(_heard, server)
        with pytest.raises(HypervisorFailure, match="the connection broke"):
            await giving
    assert b"secret" not in heard
    pieces, length = invitation.accept(heard[:HEAD_BYTES])
    assert pieces.open(heard[HEAD_BYTES:]) == here.read_bytes()
    assert length == here.stat().st_size


def _heard(server: socket.socket) -> bytes:
    """What the next connection says, until the file of the test above has come."""
    came, _ = server.accept()
    with came, came.makefile("rb") as stream:
        return stream.read(HEAD_BYTES + 19_000 + TAG_BYTES)


@pytest.mark.req("R-14")
async def test_what_is_asked_for_again_while_it_comes_is_not_cut_off(tmp_path: Path) -> None:
    """HO-42: an order is repeated whenever a link was away for a moment."""
    there = tmp_path / "there" / "m1"
    taker = Taker()
    uri = await taker.take(there, "127.0.0.1")
    _, port, invitation = uri.removeprefix("state:").split("|")
    _, writer = await asyncio.open_connection("127.0.0.1", int(port))
    writer.write(b"".join(_sealed(invitation, length=1 << 20)) + bytes(5000))
    await writer.drain()
    await until(lambda: any(there.parent.iterdir()))
    assert await taker.take(there, "127.0.0.1") == uri
    assert any(there.parent.iterdir()), "it is still being written"
    writer.close()
    here = tmp_path / "here"
    here.write_bytes(b"state")
    assert await give(here, uri) == 5
    await taker.give_up(there)


async def test_a_taker_that_is_gone_is_a_failure(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.write_bytes(b"state")
    uri = await Taker().take(tmp_path / "there" / "web", "127.0.0.1")
    await give(here, uri)
    with pytest.raises(HypervisorFailure, match="here not"):
        await give(here, uri)


@pytest.mark.req("R-55")
async def test_one_that_cannot_write_says_why_before_all_is_sent(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there" / "web"
    here.write_bytes(bytes(64 << 20))
    uri = await Taker().take(there, "127.0.0.1")
    (there.parent / ".web.part").mkdir()  # in the way of what is not whole yet
    for _ in range(2):
        with pytest.raises(
            HypervisorFailure, match=r"here not kept by 127\.0\.0\.1: Is a directory"
        ):
            await give(here, uri)


async def test_what_is_no_longer_to_be_given_does_not_arrive(tmp_path: Path) -> None:
    """The move turned back meanwhile: nobody would remove what came after that."""
    here, there = tmp_path / "here", tmp_path / "there" / "web"
    with here.open("wb") as file:
        file.truncate(8 << 30)
    taker = Taker()
    giving = asyncio.create_task(give(here, await taker.take(there, "127.0.0.1")))
    part = there.with_name(".web.part")
    await until(part.exists)
    giving.cancel()
    await until(lambda: not part.exists())
    assert not there.exists()
    await taker.give_up(there)


async def test_what_is_given_up_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    """An abort while a state is carried: no file, no part of one, and nobody listens any more."""
    there = tmp_path / "there" / "m1"
    taker = Taker()
    uri = await taker.take(there, "127.0.0.1")
    _, port, invitation = uri.removeprefix("state:").split("|")
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
    writer.write(b"".join(_sealed(invitation, length=1 << 20)) + bytes(5000))
    await writer.drain()
    await until(lambda: any(there.parent.iterdir()))  # it is being written now
    await taker.give_up(there)
    assert list(there.parent.iterdir()) == []
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    writer.close()
    with pytest.raises(ConnectionError):
        await asyncio.open_connection("127.0.0.1", int(port))
    await taker.give_up(there)
