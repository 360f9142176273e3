"""Run a command in the lab's guest, over its second serial port."""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets
from pathlib import Path


class ConsoleFailure(Exception):
    """The guest does not answer; one line for a person."""


GREETING_S = 1.0


async def run(sock: Path, command: str, timeout_s: float) -> tuple[int, bytes]:
    """Run shell `command` in the guest; returns its exit code and output."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(str(sock))
            try:
                await _greet(reader, writer)
                return await _answer(reader, _ask(writer, command))
            finally:
                writer.close()
    except TimeoutError:
        raise ConsoleFailure(f"the guest did not answer within {timeout_s:g} s") from None
    except OSError as error:
        raise ConsoleFailure(f"no console at {sock}: {error.strerror}") from None


async def _greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Ask for nothing until an answer comes: a guest that still boots hears nothing."""
    while True:
        number = _ask(writer, "true")
        try:
            async with asyncio.timeout(GREETING_S):
                await _answer(reader, number)
                return
        except TimeoutError:
            continue


def _ask(writer: asyncio.StreamWriter, command: str) -> str:
    number = secrets.token_hex(4)
    writer.write(f"RUN {number} {base64.b64encode(command.encode()).decode()}\n".encode())
    return number


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
