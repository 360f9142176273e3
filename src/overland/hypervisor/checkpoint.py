"""Checkpoints of a running VM, on their way from host to host and at rest on the new one.

QEMU writes it (`background-snapshot`) into a relay, a process that sends it on: we say the keeper's
secret before it, and after it, when all is out, a last word that makes it whole. Without that word
nothing of it is kept. The newest whole one lies in a file, whose time of change is the instant that
it holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import socket
import struct
import time
from pathlib import Path
from typing import BinaryIO

from overland.hypervisor.channel import connect
from overland.ports import HypervisorFailure

PIECE_BYTES = 1 << 20
_SO_MAX_PACING_RATE, _UNPACED = 47, (1 << 64) - 1
STALL_LIMIT_MS = 500
"""A network that takes nothing for so long ends the checkpoint: the VM must not wait for it."""

ANSWER_LIMIT_S = 10.0
_SILENCE = struct.pack("ll", 30, 0)
"""A giver that is silent for so many seconds is gone, a timeval."""

_SECRET_BYTES, _INSTANT_BYTES = 16, 8
_LAST_WORD_BYTES = _SECRET_BYTES + _INSTANT_BYTES
_KEPT = b"kept"
_RELAY = "cat && exit 0; cat > /dev/null; exit 1"
"""From QEMU to the network, and where that ends to nowhere."""


class Giver:
    """One checkpoint, seen from the old host: what QEMU writes into it, a relay sends on.

    QEMU has to come to the end of what it has begun: one that fails, or is cancelled, leaves the
    VM's processors waiting for ever for pages that nobody releases any more (seen with 7.2). So the
    relay takes all that QEMU writes whatever becomes of the connection, and of this daemon.
    """

    def __init__(self, sock: socket.socket, secret: bytes) -> None:
        self._sock = sock
        self._secret = secret
        self._relay: asyncio.subprocess.Process | None = None

    @classmethod
    async def open(cls, uri: str, bytes_per_s: int) -> Giver:
        """Connect to a keeper. HypervisorFailure when it does not take any (more)."""
        address, port, secret = uri.removeprefix("checkpoint:").split("|")
        host = f"[{address}]" if ":" in address else address
        sock = await connect(f"tcp:{host}:{port}")
        sock.setblocking(True)  # QEMU decides for itself; the flag belongs to the connection
        # While QEMU waits for the network, so does each page that the VM wants to write.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_LIMIT_MS)
        pace = (bytes_per_s or _UNPACED).to_bytes(8, "little")
        sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, pace)
        try:
            sock.sendall(bytes.fromhex(secret))  # the first bytes always fit
        except OSError as error:
            sock.close()
            raise HypervisorFailure(f"checkpoint not taken: {error.strerror}") from None
        return cls(sock, bytes.fromhex(secret))

    async def relay(self) -> int:
        """Start the relay; the descriptor to write the checkpoint into, which the caller closes."""
        source, into = os.pipe()
        try:
            fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, PIECE_BYTES)
            self._relay = await asyncio.create_subprocess_exec(
                *("sh", "-c", _RELAY),
                stdin=source,
                stdout=self._sock.fileno(),
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # it outlives this daemon
            )
        except OSError as error:
            os.close(into)
            raise HypervisorFailure(f"checkpoint: no relay: {error.strerror}") from None
        finally:
            os.close(source)
        return into

    def break_off(self) -> None:
        """Nothing more gets to the new host; the relay throws the rest away."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of our end; what is not whole by now never is."""
        self._sock.close()

    async def whole(self, at_ns: int) -> int:
        """Say that all is out, and what instant it holds; when it was kept (CLOCK_REALTIME ns)."""
        assert self._relay is not None
        try:
            if await self._relay.wait():
                raise OSError(0, "the network, or the new host, did not take it")
            await asyncio.to_thread(self._last_word, at_ns)
        except OSError as error:
            why = error.strerror or "no answer"
            raise HypervisorFailure(f"checkpoint not kept by the new host: {why}") from None
        return time.time_ns()

    def _last_word(self, at_ns: int) -> None:
        sock = self._sock
        sock.settimeout(ANSWER_LIMIT_S)
        sock.sendall(self._secret + at_ns.to_bytes(_INSTANT_BYTES, "big"))
        sock.shutdown(socket.SHUT_WR)
        if sock.recv(len(_KEPT)) != _KEPT:
            raise OSError(0, "it has no room for it, or does not want it any more")


class _Listening:
    """What waits for the checkpoints of one VM, and takes one after the other."""

    def __init__(self, server: socket.socket, path: Path) -> None:
        self.secret = secrets.token_bytes(_SECRET_BYTES)
        self.giver: socket.socket | None = None
        self.refused = False
        self.task = asyncio.create_task(self._take_all(server, path))

    async def _take_all(self, server: socket.socket, path: Path) -> None:
        loop = asyncio.get_running_loop()
        with server:
            while not self.refused:
                self.giver, _ = await loop.sock_accept(server)
                self.giver.settimeout(None)
                self.giver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _SILENCE)
                await asyncio.to_thread(_take, self.giver, self.secret, path)
                self.giver = None


class Keeper:
    """The checkpoints that this host has taken, at most one of each VM, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listening: dict[str, _Listening] = {}

    def path(self, vm: str) -> Path:
        """Where the newest whole one lies, if there is one."""
        return self._folder / vm

    def newest_ns(self, vm: str) -> int:
        """The instant that the newest whole one holds (CLOCK_REALTIME ns); 0: there is none."""
        try:
            return self.path(vm).stat().st_mtime_ns
        except OSError:
            return 0

    async def listen(self, vm: str, address: str) -> str:
        """Take checkpoints of `vm` from now on, the former one is dropped; the URI to send to.

        HypervisorFailure when nobody can listen there, or there is no place for the files.
        """
        await self.drop(vm)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            self._folder.mkdir(exist_ok=True)
            server = socket.create_server((address, 0), family=family)
        except OSError as error:
            why = f"cannot take checkpoints at {address}: {error.strerror}"
            raise HypervisorFailure(why) from None
        server.setblocking(False)
        listening = self._listening[vm] = _Listening(server, self.path(vm))
        return f"checkpoint:{address}|{server.getsockname()[1]}|{listening.secret.hex()}"

    async def refused(self, vm: str) -> None:
        """Take no more, not even the one on its way; what is whole stays. Content with absence."""
        listening = self._listening.pop(vm, None)
        if listening is None:
            return
        listening.refused = True
        if listening.giver is not None:
            with contextlib.suppress(OSError):
                listening.giver.shutdown(socket.SHUT_RDWR)
        else:
            listening.task.cancel()
        await asyncio.wait({listening.task})

    async def drop(self, vm: str) -> None:
        """Take no more, and forget what was taken, also what a killed daemon had half of it.

        Content with absence.
        """
        await self.refused(vm)
        for each in (self.path(vm), _part(self.path(vm))):
            each.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _take(giver: socket.socket, secret: bytes, path: Path) -> None:
    """Keep what comes at `path`, if it is whole; else nothing of it."""
    part = _part(path)
    with giver, contextlib.suppress(OSError):
        if not secrets.compare_digest(giver.recv(_SECRET_BYTES, socket.MSG_WAITALL), secret):
            return
        try:
            with part.open("w+b") as file:
                at_ns = _written(giver, file, secret)
            if at_ns:
                os.utime(part, ns=(at_ns, at_ns))
                part.replace(path)
                giver.sendall(_KEPT)
        finally:
            part.unlink(missing_ok=True)


def _written(giver: socket.socket, file: BinaryIO, secret: bytes) -> int:
    """Write all that comes; the instant that it holds, 0 when the last word is missing."""
    piece = memoryview(bytearray(PIECE_BYTES))
    while size := giver.recv_into(piece):
        file.write(piece[:size])
    length = file.tell() - _LAST_WORD_BYTES
    if length <= 0:
        return 0
    file.seek(length)
    last_word = file.read(_LAST_WORD_BYTES)
    file.truncate(length)
    if last_word[:_SECRET_BYTES] != secret:
        return 0
    return int.from_bytes(last_word[_SECRET_BYTES:], "big")
