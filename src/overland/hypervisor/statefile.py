"""A suspended VM's saved state, carried from one host to another as a file.

The taker listens and names itself by a URI with a secret; the giver says the secret, the length
and the bytes, and their SHA-256; the taker answers when all of it is on its disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import socket
from pathlib import Path

from overland.ports import HypervisorFailure

PIECE_BYTES = 1 << 20
TAKE_LIMIT_S = 600.0
PIECE_LIMIT_S = 30.0
_SECRET_BYTES, _LENGTH_BYTES, _DIGEST_BYTES = 16, 8, 32
_KEPT = b"kept"


class Taker:
    """Waits for files that others give; each is waited for beside the caller."""

    def __init__(self) -> None:
        self._waiting: dict[Path, tuple[str, asyncio.Task[None]]] = {}

    async def take(self, path: Path, address: str) -> str:
        """Wait for one file, and keep it at `path`; the URI to give it to.

        A former file stays until the new one is whole. One that is still waited for, or is coming,
        keeps its URI. HypervisorFailure when nobody can listen.
        """
        uri, task = self._waiting.get(path, ("", None))
        if task is not None and not task.done():
            return uri
        secret = secrets.token_bytes(_SECRET_BYTES)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            path.parent.mkdir(exist_ok=True)
            server = socket.create_server((address, 0), family=family)
        except OSError as error:
            raise HypervisorFailure(f"cannot take a state at {address}: {error.strerror}") from None
        server.setblocking(False)
        uri = f"state:{address}|{server.getsockname()[1]}|{secret.hex()}"
        self._waiting[path] = uri, asyncio.create_task(_until_taken(server, path, secret))
        return uri

    async def give_up(self, path: Path) -> None:
        """Wait no longer for the file at `path`, and remove it; content with absence."""
        await self.close(path)
        path.unlink(missing_ok=True)

    async def close(self, path: Path) -> None:
        """Wait no longer for the file at `path`; one that is whole stays."""
        _, task = self._waiting.pop(path, ("", None))
        if task is not None:
            task.cancel()
            await asyncio.wait({task})


async def _until_taken(server: socket.socket, path: Path, secret: bytes) -> None:
    loop = asyncio.get_running_loop()
    taken = False
    with server, contextlib.suppress(TimeoutError):
        while not taken:
            async with asyncio.timeout(TAKE_LIMIT_S):
                giver, _ = await loop.sock_accept(server)
            giver.settimeout(PIECE_LIMIT_S)
            taken = await _cut_when_cancelled(giver, path, secret)


async def _cut_when_cancelled(giver: socket.socket, path: Path, secret: bytes) -> bool:
    """A thread cannot be cancelled: it is cut off, and nothing is written once this returns."""
    thread = asyncio.ensure_future(asyncio.to_thread(_taken, giver, path, secret))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        with contextlib.suppress(OSError):
            giver.shutdown(socket.SHUT_RDWR)
        await asyncio.wait({thread})
        raise


def _taken(giver: socket.socket, path: Path, secret: bytes) -> bool:
    """Whether this one gave what was waited for; else nothing of it is kept."""
    with giver, contextlib.suppress(OSError, ValueError), giver.makefile("rb") as stream:
        if not secrets.compare_digest(stream.read(_SECRET_BYTES), secret):
            raise ValueError("not the giver")
        left = int.from_bytes(stream.read(_LENGTH_BYTES), "big")
        part = path.with_name(f".{path.name}.part")
        digest = hashlib.sha256()
        try:
            with part.open("wb") as file:
                while left and (piece := stream.read(min(left, PIECE_BYTES))):
                    digest.update(piece)
                    file.write(piece)
                    left -= len(piece)
                if left or stream.read(_DIGEST_BYTES) != digest.digest():
                    raise ValueError("not whole")
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        giver.sendall(_KEPT)
        return True
    return False


async def give(path: Path, uri: str) -> int:
    """Send the file at `path` to `uri`; bytes sent. HypervisorFailure unless it was kept there."""
    address, port, secret = uri.removeprefix("state:").split("|")
    try:
        # Made here, where the network namespace is the daemon's.
        taker = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        return await asyncio.to_thread(_given, taker, path, (address, int(port)), secret)
    except OSError as error:
        why = error.strerror or "no answer"
        raise HypervisorFailure(f"state not taken by {address}: {why}") from None


def _given(taker: socket.socket, path: Path, address: tuple[str, int], secret: str) -> int:
    with taker, path.open("rb") as file:
        taker.settimeout(PIECE_LIMIT_S)
        taker.connect(address)
        length = os.fstat(file.fileno()).st_size
        taker.sendall(bytes.fromhex(secret) + length.to_bytes(_LENGTH_BYTES, "big"))
        digest = hashlib.sha256()
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            taker.sendall(piece)
        taker.sendall(digest.digest())
        if taker.recv(len(_KEPT)) != _KEPT:
            raise HypervisorFailure(f"state not kept by {address[0]} (disk full?)")
    return length
