"""A file of a VM at rest, its saved state or a disk image, carried from one host to another.

The taker listens and names itself by a URI with an invitation; the giver answers that one with the
length and the bytes, sealed; the taker says when all of it is on its disk, or why it is not. Zeros
take no room there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from io import BufferedWriter
from pathlib import Path

from overland.hypervisor.sealed import HEAD_BYTES, TAG_BYTES, Invitation, Pieces, sizes
from overland.ports import HypervisorFailure

TAKE_LIMIT_S = 600.0
PIECE_LIMIT_S = 30.0
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
        invitation = Invitation()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            server = socket.create_server((address, 0), family=family)
        except OSError as error:
            raise HypervisorFailure(f"cannot take a state at {address}: {error.strerror}") from None
        server.setblocking(False)
        uri = f"state:{address}|{server.getsockname()[1]}|{invitation.text}"
        task = asyncio.create_task(self._until_taken(server, path, invitation, place))
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
        self, server: socket.socket, path: Path, invitation: Invitation, place: Place
    ) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(TAKE_LIMIT_S):
                    giver, _ = await loop.sock_accept(server)
                giver.settimeout(PIECE_LIMIT_S)
                with giver:
                    if await _cut_when_cancelled(giver, path, invitation, place):
                        self._waiting.pop(path, None)  # who asks once it is kept waits anew
                        with contextlib.suppress(OSError):
                            giver.sendall(_KEPT)
                        return


def _part(path: Path) -> Path:
    """Where a file is until it is whole."""
    return path.with_name(f".{path.name}.part")


async def _cut_when_cancelled(
    giver: socket.socket, path: Path, invitation: Invitation, place: Place
) -> bool:
    """A thread cannot be cancelled: it is cut off, and nothing is written once this returns."""
    thread = asyncio.ensure_future(asyncio.to_thread(_taken, giver, path, invitation, place))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        with contextlib.suppress(OSError):
            giver.shutdown(socket.SHUT_RDWR)
        await asyncio.wait({thread})
        raise


def _taken(giver: socket.socket, path: Path, invitation: Invitation, place: Place) -> bool:
    """Whether this one gave what was waited for; else nothing of it is kept."""
    try:
        _take_from(giver, path, invitation, place)
    except ValueError:
        return False
    except OSError as error:
        with contextlib.suppress(OSError):
            giver.sendall((error.strerror or "no answer").encode()[:_ANSWER_BYTES])
        return False
    return True


def _take_from(giver: socket.socket, path: Path, invitation: Invitation, place: Place) -> None:
    with giver.makefile("rb") as stream:
        pieces, length = invitation.accept(stream.read(HEAD_BYTES))
        part = _part(path)
        try:
            with part.open("wb") as file:
                for size in sizes(length):
                    _write(file, pieces.open(stream.read(size + TAG_BYTES)))
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
    address, port, invitation = uri.removeprefix("state:").split("|")
    try:
        # Made here, where the network namespace is the daemon's.
        taker = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        try:
            return await asyncio.to_thread(_given, taker, path, (address, int(port)), invitation)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                taker.shutdown(socket.SHUT_RDWR)  # else the thread goes on, and it is kept there
            raise
    except OSError as error:
        why = error.strerror or "no answer"
        raise HypervisorFailure(f"{path.name} not taken by {address}: {why}") from None


def _given(taker: socket.socket, path: Path, address: tuple[str, int], invitation: str) -> int:
    with taker, path.open("rb") as file:
        taker.settimeout(PIECE_LIMIT_S)
        taker.connect(address)
        length = os.fstat(file.fileno()).st_size
        pieces, head = Pieces.answering(invitation, length)
        answer = b""
        with contextlib.suppress(ConnectionError):  # one that takes no more has said why
            taker.sendall(head)
            for size in sizes(length):
                taker.sendall(pieces.seal(file.read(size)))
        with contextlib.suppress(ConnectionError):
            answer = taker.recv(_ANSWER_BYTES)
        if answer != _KEPT:
            why = answer.decode(errors="replace") or "the connection broke"
            raise HypervisorFailure(f"{path.name} not kept by {address[0]}: {why}")
    return length
