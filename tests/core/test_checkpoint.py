"""Checkpoints on their way between two hosts: whole, or not there at all (R-11, R-12)."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from overland.hypervisor.checkpoint import Giver, Keeper
from overland.ports import HypervisorFailure

pytestmark = pytest.mark.req("R-12")
STATE = bytes(range(256)) * 20_000


@pytest.fixture
async def keeper(tmp_path: Path) -> AsyncIterator[Keeper]:
    keeper = Keeper(tmp_path / "checkpoints")
    yield keeper
    await keeper.drop("web")


async def sent(uri: str, state: bytes) -> Giver:
    """A giver whose QEMU has written `state`, and has not been heard to be done."""
    giver = await Giver.open(uri, 0)
    into = await giver.relay()
    await asyncio.to_thread(_write_all, into, state)
    return giver


def _write_all(into: int, state: bytes) -> None:
    with open(into, "wb") as file:
        file.write(state)


async def given(uri: str, state: bytes, at_ns: int) -> None:
    giver = await sent(uri, state)
    try:
        await giver.whole(at_ns)
    finally:
        giver.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_the_newest_whole_one_is_kept_with_its_instant(keeper: Keeper, address: str) -> None:
    uri = await keeper.listen("web", address)
    assert keeper.newest_ns("web") == 0
    for at_ns in (5 * 10**9 + 1, 7 * 10**9 + 3):
        state = STATE + str(at_ns).encode()
        await given(uri, state, at_ns)
        assert keeper.path("web").read_bytes() == state
        assert keeper.newest_ns("web") == at_ns
    assert [path.name for path in keeper.path("web").parent.iterdir()] == ["web"]


async def test_one_that_breaks_off_leaves_the_one_before(keeper: Keeper) -> None:
    """Its sender dies in the middle, or after all of it but the last word."""
    uri = await keeper.listen("web", "127.0.0.1")
    await given(uri, STATE, 9)
    for state in (b"", b"x", STATE[:1000], STATE * 2):
        giver = await sent(uri, state)
        giver.close()
    await given(uri, STATE[::-1], 11)  # they are taken one after the other: it comes last
    assert (keeper.path("web").read_bytes(), keeper.newest_ns("web")) == (STATE[::-1], 11)
    giver = await sent(uri, STATE)
    giver.close()
    await keeper.refused("web")
    assert (keeper.path("web").read_bytes(), keeper.newest_ns("web")) == (STATE[::-1], 11)


async def test_a_stranger_gives_nothing(keeper: Keeper) -> None:
    uri = await keeper.listen("web", "127.0.0.1")
    address, port, _ = uri.removeprefix("checkpoint:").split("|")
    with pytest.raises(HypervisorFailure):
        await given(f"checkpoint:{address}|{port}|{'00' * 16}", STATE, 5)
    assert keeper.newest_ns("web") == 0
    await given(uri, STATE, 6)
    assert keeper.newest_ns("web") == 6


@pytest.mark.req("R-11")
async def test_who_refuses_takes_nothing_more_and_keeps_what_is_whole(keeper: Keeper) -> None:
    """R-11: not even the one on its way, whose sender hears of it at once."""
    uri = await keeper.listen("web", "127.0.0.1")
    await given(uri, STATE, 5)
    giver = await sent(uri, STATE[:1000])
    await keeper.refused("web")
    with pytest.raises(HypervisorFailure, match="checkpoint not kept"):
        await giver.whole(6)
    giver.close()
    with pytest.raises(HypervisorFailure):
        await given(uri, STATE, 7)
    assert (keeper.path("web").read_bytes(), keeper.newest_ns("web")) == (STATE, 5)
    await keeper.drop("web")
    assert list(keeper.path("web").parent.iterdir()) == []


async def test_a_full_disk_is_said_to_the_old_host(keeper: Keeper) -> None:
    """The file cannot be written: here a folder is in its place."""
    uri = await keeper.listen("web", "127.0.0.1")
    keeper.path("web").with_name(".web.part").mkdir()
    with pytest.raises(HypervisorFailure, match="checkpoint not kept by the new host"):
        await given(uri, STATE[:100], 5)
    keeper.path("web").with_name(".web.part").rmdir()


async def test_half_of_one_that_a_killed_daemon_left_goes_as_well(keeper: Keeper) -> None:
    part = keeper.path("web").with_name(".web.part")
    part.parent.mkdir()
    part.write_bytes(b"half")
    await keeper.drop("web")
    assert not list(part.parent.iterdir())


async def test_listening_again_drops_what_a_former_move_left(keeper: Keeper) -> None:
    first = await keeper.listen("web", "127.0.0.1")
    await given(first, STATE, 5)
    second = await keeper.listen("web", "127.0.0.1")
    assert keeper.newest_ns("web") == 0
    with pytest.raises(HypervisorFailure):
        await given(first, STATE, 6)
    await given(second, STATE, 7)
    assert keeper.newest_ns("web") == 7


async def test_an_address_that_is_not_here_is_one_line(keeper: Keeper) -> None:
    with pytest.raises(HypervisorFailure, match=r"cannot take checkpoints at 192\.0\.2\.9"):
        await keeper.listen("web", "192.0.2.9")


@pytest.mark.parametrize("what", ["deaf", "gone", "broken off"])
async def test_all_that_qemu_writes_is_taken_whatever_becomes_of_the_network(what: str) -> None:
    """Else the VM's processors would wait for ever: QEMU does not survive a failed checkpoint."""
    with socket.create_server(("127.0.0.1", 0)) as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        giver = await Giver.open(f"checkpoint:127.0.0.1|{keeper.getsockname()[1]}|{'00' * 16}", 0)
        taken, _ = keeper.accept()
        into = await giver.relay()
        if what == "gone":
            taken.close()
        writing = asyncio.create_task(asyncio.to_thread(_write_all, into, bytes(1 << 26)))
        if what == "broken off":
            giver.break_off()
        await writing
        with pytest.raises(HypervisorFailure, match="did not take it"):
            await giver.whole(5)
        giver.close()
        taken.close()
