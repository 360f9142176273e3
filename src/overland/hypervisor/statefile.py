"""A file of a VM at rest, its saved state or a disk image, carried from one host to another.

The taker listens and names itself by a URI with a secret; the giver says the secret, the length
and the bytes, and their SHA-256; the taker answers when all of it is on its disk, or why it is not.
Zeros take no room there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import socket
from collections.abc import Callable
from io import BufferedWriter
from pathlib import Path

from overland.ports import HypervisorFailure

PIECE_BYTES = 1 << 20
TAKE_LIMIT_S = 600.0
PIECE_LIMIT_S = 30.0
_SECRET_BYTES, _LENGTH_BYTES, _DIGEST_BYTES = 16, 8, 32
_KEPT = b"kept"
_ANSWER_BYTES = 200
_HOLE = bytes(64 << 10)

Place = Callable[[Path, Path], object]
"""Gives a whole file its name. OSError when it cannot have it."""


class Taker:
    """Waits for files that others give; each is waited for beside the caller."""

    def __init__(self) -> None:
        self._waiting: dict[Path, tuple[str, asyncio.Task[None]]] = {}

    async def take(self, path: Path, address: str, place: Place = Path.replace) -> str:
        """Wait for one file, and keep it at `path`; the URI to give it to.

        A former file stays until the new one is whole; `place` says what becomes of it then. One
        that is still waited for, or is coming, keeps its URI. HypervisorFailure when nobody can
        listen.
        """
        uri, task = self._waiting.get(path, ("", None))
        if task is not None and not task.done():
            return uri
        secret = secrets.token_bytes(_SECRET_BYTES)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            server = socket.create_server((address, 0), family=family)
        except OSError as error:
            raise HypervisorFailure(f"cannot take a state at {address}: {error.strerror}") from None
        server.setblocking(False)
        uri = f"state:{address}|{server.getsockname()[1]}|{secret.hex()}"
        task = asyncio.create_task(self._until_taken(server, path, secret, place))
        task.add_done_callback(lambda _: server.close())  # also of one that never began
        self._waiting[path] = uri, task
        return uri

    def awaited(self) -> list[Path]:
        """The files that are waited for, or are coming."""
        return list(self._waiting)

    async def give_up(self, path: Path) -> None:
        """Wait no longer for the file at `path`, and remove it; content with absence."""
        await self.stop_waiting(path)
        path.unlink(missing_ok=True)

    async def stop_waiting(self, path: Path) -> None:
        """Wait no longer for the file at `path`; what of it is not whole goes."""
        _, task = self._waiting.pop(path, ("", None))
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        _part(path).unlink(missing_ok=True)

    async def _until_taken(
        self, server: socket.socket, path: Path, secret: bytes, place: Place
    ) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(TAKE_LIMIT_S):
                    giver, _ = await loop.sock_accept(server)
                giver.settimeout(PIECE_LIMIT_S)
                with giver:
                    if await _cut_when_cancelled(giver, path, secret, place):
                        self._waiting.pop(path, None)  # who asks once it is kept waits anew
                        with contextlib.suppress(OSError):
                            giver.sendall(_KEPT)
                        return


def _part(path: Path) -> Path:
    """Where a file is until it is whole."""
    return path.with_name(f".{path.name}.part")


async def _cut_when_cancelled(
    giver: socket.socket, path: Path, secret: bytes, place: Place
) -> bool:
    """A thread cannot be cancelled: it is cut off, and nothing is written once this returns."""
    thread = asyncio.ensure_future(asyncio.to_thread(_taken, giver, path, secret, place))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        with contextlib.suppress(OSError):
            giver.shutdown(socket.SHUT_RDWR)
        await asyncio.wait({thread})
        raise


def _taken(giver: socket.socket, path: Path, secret: bytes, place: Place) -> bool:
    """Whether this one gave what was waited for; else nothing of it is kept."""
    try:
        _take_from(giver, path, secret, place)
    except ValueError:
        return False
    except OSError as error:
        with contextlib.suppress(OSError):
            giver.sendall((error.strerror or "no answer").encode()[:_ANSWER_BYTES])
        return False
    return True


def _take_from(giver: socket.socket, path: Path, secret: bytes, place: Place) -> None:
    with giver.makefile("rb") as stream:
        if not secrets.compare_digest(stream.read(_SECRET_BYTES), secret):
            raise ValueError("not the giver")
        left = length = int.from_bytes(stream.read(_LENGTH_BYTES), "big")
        part = _part(path)
        digest = hashlib.sha256()
        try:
            with part.open("wb") as file:
                while left and (piece := stream.read(min(left, PIECE_BYTES))):
                    digest.update(piece)
                    _write(file, piece)
                    left -= len(piece)
                if left or stream.read(_DIGEST_BYTES) != digest.digest():
                    raise ValueError("not whole")
                file.truncate(length)
                os.fsync(file.fileno())
            place(part, path)
        finally:
            part.unlink(missing_ok=True)


def _write(file: BufferedWriter, piece: bytes) -> None:
    for start in range(0, len(piece), len(_HOLE)):
        some = piece[start : start + len(_HOLE)]
        if some == _HOLE:
            file.seek(len(some), os.SEEK_CUR)
        else:
            file.write(some)


async def give(path: Path, uri: str) -> int:
    """Send the file at `path` to `uri`; bytes sent. HypervisorFailure unless it was kept there."""
    address, port, secret = uri.removeprefix("state:").split("|")
    try:
        # Made here, where the network namespace is the daemon's.
        taker = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        try:
            return await asyncio.to_thread(_given, taker, path, (address, int(port)), secret)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                taker.shutdown(socket.SHUT_RDWR)  # else the thread goes on, and it is kept there
            raise
    except OSError as error:
        why = error.strerror or "no answer"
        raise HypervisorFailure(f"{path.name} not taken by {address}: {why}") from None


def _given(taker: socket.socket, path: Path, address: tuple[str, int], secret: str) -> int:
    with taker, path.open("rb") as file:
        taker.settimeout(PIECE_LIMIT_S)
        taker.connect(address)
        length = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256()
        answer = b""
        with contextlib.suppress(ConnectionError):  # one that takes no more has said why
            taker.sendall(bytes.fromhex(secret) + length.to_bytes(_LENGTH_BYTES, "big"))
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
                taker.sendall(piece)
            taker.sendall(digest.digest())
        with contextlib.suppress(ConnectionError):
            answer = taker.recv(_ANSWER_BYTES)
        if answer != _KEPT:
            why = answer.decode(errors="replace") or "the connection broke"
            raise HypervisorFailure(f"{path.name} not kept by {address[0]}: {why}")
    return length
