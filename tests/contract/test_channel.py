"""The leash on real sockets: the writer stands for QEMU, the reader for the other host."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
from collections.abc import AsyncIterator

import pytest

from overland.hypervisor.channel import Channel

MIB = 1 << 20
WHOLE = os.urandom(24 * MIB)
FAST_BYTES_PER_S = 1 << 40


class Stream:
    """A channel between a writer of WHOLE, as fast as it is let, and the `other` host's socket."""

    def __init__(self, channel: Channel, qemu: socket.socket, other: socket.socket) -> None:
        self.channel = channel
        self.other = other
        self.written = 0
        self.refused = False
        self._end = qemu
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        view = memoryview(WHOLE)
        try:
            while self.written < len(WHOLE):
                self.written += self._end.send(view[self.written : self.written + 65536])
        except OSError:
            self.refused = True
        self._end.close()

    async def at_rest(self) -> int:
        """What is written once nothing more is: three equal looks in a row."""
        seen = [-1, -2, -3]
        while len(set(seen[-3:])) > 1:
            await asyncio.sleep(0.02)
            seen.append(self.written)
        return self.written

    async def writer_done(self) -> None:
        await asyncio.to_thread(self._thread.join)

    async def read_all(self) -> bytes:
        got = bytearray()
        while part := await asyncio.to_thread(self.other.recv, MIB):
            got += part
        return bytes(got)


@pytest.fixture
async def stream() -> AsyncIterator[Stream]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        channel = await Channel.open(f"tcp:127.0.0.1:{server.getsockname()[1]}")
        other, _ = server.accept()
    monitor, qmp = socket.socketpair()
    channel.pace(FAST_BYTES_PER_S)
    channel.leash(4 * MIB)
    channel.hand_to(monitor)
    _, fds, _, _ = socket.recv_fds(qmp, 1, 1)
    monitor.close()
    qmp.close()
    qemu = socket.socket(fileno=fds[0])
    qemu.setblocking(True)
    made = Stream(channel, qemu, other)
    yield made
    channel.close()
    other.close()
    await made.writer_done()


async def test_nobody_writes_past_the_leash_however_late_the_next_look_is(stream: Stream) -> None:
    assert MIB < await stream.at_rest() <= 4 * MIB
    stream.channel.mark()
    before = stream.written
    stream.channel.leash(6 * MIB)
    assert before < await stream.at_rest() <= before + 6 * MIB


async def test_what_was_written_between_look_and_leash_counts(stream: Stream) -> None:
    await stream.at_rest()
    stream.channel.mark()
    marked = stream.written
    stream.channel.leash(5 * MIB)
    await stream.at_rest()
    stream.channel.leash(5 * MIB)
    assert await stream.at_rest() <= marked + 5 * MIB


async def test_released_it_all_arrives_and_the_stream_ends(stream: Stream) -> None:
    await stream.at_rest()
    stream.channel.release()
    assert await stream.read_all() == WHOLE
    assert not stream.refused


async def test_a_leash_that_comes_after_the_release_catches_nobody(stream: Stream) -> None:
    """The network is blocked just then: what waits goes on when it takes more."""
    stream.other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    stream.other.settimeout(5)
    await stream.at_rest()
    stream.channel.release()
    assert await stream.at_rest() < len(WHOLE)
    stream.channel.leash(0)
    assert await stream.read_all() == WHOLE


async def test_the_writer_is_told_when_we_let_go(stream: Stream) -> None:
    await stream.at_rest()
    stream.channel.close()
    await stream.writer_done()
    assert stream.refused


async def test_the_writer_is_told_when_the_other_host_goes(stream: Stream) -> None:
    await stream.at_rest()
    reset = struct.pack("ii", 1, 0)
    stream.other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    stream.other.close()
    stream.channel.release()
    await stream.writer_done()
    assert stream.refused
