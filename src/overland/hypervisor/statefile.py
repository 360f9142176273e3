"""A suspended VM's saved state, carried from one host to another as a file.

The taker listens once and names itself by a URI with a secret; the giver says the secret, the
length and the bytes, and their SHA-256; the taker answers when all of it is on its disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
from pathlib import Path

from overland.ports import HypervisorFailure

PIECE_BYTES = 1 << 20
TAKE_LIMIT_S = 600.0
_SECRET_BYTES, _LENGTH_BYTES, _DIGEST_BYTES = 16, 8, 32
_KEPT = b"kept"


class Taker:
    """Waits for files that others give; each is waited for beside the caller."""

    def __init__(self) -> None:
        self._listening: set[asyncio.Task[None]] = set()

    async def take(self, path: Path, address: str) -> str:
        """Wait for one file, and keep it at `path`; the URI to give it to.

        A former file stays until the new one is whole. HypervisorFailure when nobody can listen.
        """
        secret = secrets.token_bytes(_SECRET_BYTES)
        given = asyncio.Event()

        async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError):
                await _keep(reader, path, secret)
                writer.write(_KEPT)
                given.set()
            writer.close()

        try:
            path.parent.mkdir(exist_ok=True)
            server = await asyncio.start_server(one, address, 0)
        except OSError as error:
            raise HypervisorFailure(f"cannot take a state at {address}: {error.strerror}") from None
        task = asyncio.create_task(_until(server, given))
        self._listening.add(task)
        task.add_done_callback(self._listening.discard)
        port = server.sockets[0].getsockname()[1]
        return f"state:{address}|{port}|{secret.hex()}"


async def _until(server: asyncio.Server, given: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(given.wait(), TAKE_LIMIT_S)
    server.close()


async def _keep(reader: asyncio.StreamReader, path: Path, secret: bytes) -> None:
    """ValueError when it is not what was promised; nothing is kept then."""
    if not secrets.compare_digest(await reader.readexactly(_SECRET_BYTES), secret):
        raise ValueError("not the giver")
    left = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "big")
    digest = hashlib.sha256()
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            while left:
                piece = await reader.readexactly(min(left, PIECE_BYTES))
                digest.update(piece)
                await asyncio.to_thread(file.write, piece)
                left -= len(piece)
            if await reader.readexactly(_DIGEST_BYTES) != digest.digest():
                raise ValueError("damaged on its way")
            await asyncio.to_thread(os.fsync, file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


async def give(path: Path, uri: str) -> int:
    """Send the file at `path` to `uri`; bytes sent. HypervisorFailure unless it was kept there."""
    address, port, secret = uri.removeprefix("state:").split("|")
    try:
        reader, writer = await asyncio.open_connection(address, int(port))
        try:
            length = path.stat().st_size
            writer.write(bytes.fromhex(secret) + length.to_bytes(_LENGTH_BYTES, "big"))
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                    digest.update(piece)
                    writer.write(piece)
                    await writer.drain()
            writer.write(digest.digest())
            if await reader.readexactly(len(_KEPT)) != _KEPT:
                raise HypervisorFailure(f"{address} has not kept the state")
        finally:
            writer.close()
    except asyncio.IncompleteReadError:
        why = "it could not keep it (disk full?)"
        raise HypervisorFailure(f"state not taken by {address}: {why}") from None
    except OSError as error:
        why = error.strerror or "no answer"
        raise HypervisorFailure(f"state not sent to {address}: {why}") from None
    return length
