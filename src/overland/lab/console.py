"""Run a command in the lab's guest, over its second serial port."""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets
from pathlib import Path


class ConsoleFailure(Exception):
    """The guest does not answer; one line for a person."""


async def run(sock: Path, command: str, timeout_s: float) -> tuple[int, bytes]:
    """Run shell `command` in the guest; returns its exit code and output."""
    number = secrets.token_hex(4)
    line = f"RUN {number} {base64.b64encode(command.encode()).decode()}\n"
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(str(sock))
            try:
                writer.write(line.encode())
                return await _answer(reader, number)
            finally:
                writer.close()
    except TimeoutError:
        raise ConsoleFailure(f"the guest did not answer within {timeout_s:g} s") from None
    except OSError as error:
        raise ConsoleFailure(f"no console at {sock}: {error.strerror}") from None


async def _answer(reader: asyncio.StreamReader, number: str) -> tuple[int, bytes]:
    text: list[bytes] | None = None
    while True:
        raw = await reader.readline()
        if not raw:
            raise ConsoleFailure("the guest's console was closed")
        words = raw.decode(errors="replace").split()
        if words[:2] == ["BEGIN", number]:
            text = []
        elif words[:2] == ["END", number] and len(words) == 3:
            try:
                return int(words[2]), base64.b64decode(b"".join(text or []))
            except (ValueError, binascii.Error):
                raise ConsoleFailure("the guest's answer was garbled") from None
        elif text is not None:
            text.append(raw.strip())
