"""The connection that a VM's memory goes by, on a leash.

Under emulation QEMU stops the VM by itself at the end of its one round over memory, and before that
the gate has to be closed. So QEMU writes into a pair of sockets of ours, and we let through what
the leash allows: whoever is late, QEMU with its answers or this daemon, the copy waits for us, and
the end of the round never comes unseen (ADR 0019). The bytes are spliced, they do not enter Python.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import termios
import time

from overland.ports import HypervisorFailure

CONNECT_LIMIT_S = 5.0
TICK_S = 0.005
_SO_SNDBUFFORCE, _F_SETPIPE_SZ = 32, 1031
ROOM_BYTES = 1 << 20
"""What QEMU can have written that we have not let through: twice the send buffer we ask for."""

_FREE_BYTES = 8 << 20
_UNLEASHED = 1 << 62


async def connect(uri: str) -> socket.socket:
    """A connection to `uri` (tcp:ADDRESS:PORT), not blocking; HypervisorFailure without answer."""
    host, _, port = uri.removeprefix("tcp:").rpartition(":")
    address = host.strip("[]")
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    sock.setblocking(False)
    try:
        async with asyncio.timeout(CONNECT_LIMIT_S):
            await asyncio.get_running_loop().sock_connect(sock, (address, int(port)))
    except OSError as error:
        sock.close()
        raise HypervisorFailure(f"{uri}: {error.strerror or 'no answer'}") from None
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class Channel:
    """One memory stream: QEMU's end, the pair's other end, a pipe to splice by, the network."""

    def __init__(self, network: socket.socket) -> None:
        self._network = network
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM_BYTES // 2)
        self._ours.setblocking(False)
        self._out, self._in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(self._in, _F_SETPIPE_SZ, ROOM_BYTES)
        self._piped = 0
        self._passed = 0
        self._marked = 0
        self._limit = 0
        self._bytes_per_s = 0
        self._open = True
        self._ticked_s = time.monotonic()
        self._ticking: asyncio.TimerHandle | None = None

    @classmethod
    async def open(cls, uri: str) -> Channel:
        """Connect to `uri` (tcp:ADDRESS:PORT). HypervisorFailure when nobody answers."""
        sock = await connect(uri)
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _FREE_BYTES)
        return cls(sock)

    def hand_to(self, monitor: socket.socket) -> None:
        """Give QEMU its end along with whatever QMP command comes next; begin to let through."""
        socket.send_fds(monitor, [b" "], [self._theirs.fileno()])
        self._theirs.close()
        self._tick()

    # ------------------------------------------------------------ how much, how fast

    def mark(self) -> None:
        """Remember how much QEMU has written by now: the next leash counts from here."""
        if self._open:
            self._marked = self._passed + self._written()

    def leash(self, more_bytes: int) -> None:
        """QEMU can write at most so much more than it had at the mark, until the next leash.

        Once released it is not caught again.
        """
        if self._limit != _UNLEASHED:
            self._limit = max(self._passed, self._marked + more_bytes - ROOM_BYTES)

    def pace(self, bytes_per_s: int) -> None:
        """Let at most so much through a second, not 0."""
        self._bytes_per_s = bytes_per_s

    def release(self) -> None:
        """Let everything through from now on, as fast as the network takes it."""
        if self._open and self._limit != _UNLEASHED:
            self._limit = _UNLEASHED
            self._stop_ticking()
            asyncio.get_running_loop().add_reader(self._ours, self._flow)
            self._flow()

    def close(self) -> None:
        """Let go of the stream; QEMU, if it still writes, is told that nobody reads."""
        if not self._open:
            return
        self._open = False
        self._stop_ticking()
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._ours)
        loop.remove_writer(self._network)
        for end in (self._ours, self._theirs, self._network):
            end.close()
        os.close(self._out)
        os.close(self._in)

    # ------------------------------------------------------------ letting through

    def _written(self) -> int:
        """Bytes that QEMU has written and we have not taken."""
        waiting = bytearray(4)
        fcntl.ioctl(self._ours, termios.FIONREAD, waiting)
        return int.from_bytes(waiting, "little")

    def _tick(self) -> None:
        now_s = time.monotonic()
        # A late tick does not catch up: the pace is there to leave the guest its processor.
        due = int(self._bytes_per_s * min(now_s - self._ticked_s, 2 * TICK_S))
        self._ticked_s = now_s
        self._pass(min(due, self._limit - self._passed))
        if self._open:
            self._ticking = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _stop_ticking(self) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None

    def _flow(self) -> None:
        self._pass(ROOM_BYTES)

    def _pass(self, at_most: int) -> None:
        """Splice what is there, at most so much, to the network; what it does not take waits."""
        try:
            if self._emptied() and at_most > 0:
                self._take(at_most)
        except OSError:
            self.close()  # the other host is gone: QEMU will say so

    def _take(self, at_most: int) -> None:
        with contextlib.suppress(BlockingIOError):
            taken = os.splice(self._ours.fileno(), self._in, at_most, flags=os.SPLICE_F_NONBLOCK)
            if not taken:
                self.close()  # QEMU has written all
                return
            self._passed += taken
            self._piped += taken
            self._emptied()

    def _emptied(self) -> bool:
        """Move what is in the pipe on; whether the pipe is empty now."""
        loop = asyncio.get_running_loop()
        while self._piped:
            try:
                self._piped -= os.splice(self._out, self._network.fileno(), self._piped)
            except BlockingIOError:
                loop.remove_reader(self._ours)
                loop.add_writer(self._network, self._writable)
                return False
        loop.remove_writer(self._network)
        return True

    def _writable(self) -> None:
        if self._limit == _UNLEASHED:
            asyncio.get_running_loop().add_reader(self._ours, self._flow)
        self._pass(0)
