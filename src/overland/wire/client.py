"""An NVE's link to its NVA: connect, speak, connect again, over several addresses (N-09)."""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections.abc import Callable, Sequence

import msgspec
from picows import WSError, WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from overland.wire import messages as w
from overland.wire.server import IDLE_S, REPLY_S

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 1.0
"""An NVA that takes over waits for `lease_s` for the NVEs: they try again more often than that."""

CONNECT_LIMIT_S = 1.0
"""After so long the next address is tried: a host that is gone does not even refuse."""

log = logging.getLogger(__name__)


class WireClient:
    """`hello` is asked anew for each connection; `heard` gets every message, in order."""

    def __init__(
        self,
        urls: Sequence[str | Sequence[str]],
        tls: ssl.SSLContext,
        hello: Callable[[], w.Hello],
        heard: Callable[[w.FromNva], None],
    ) -> None:
        self._urls = tuple(urls)
        self._tls = tls
        self._hello = hello
        self._heard = heard
        self._transport: WSTransport | None = None
        self._unsent: list[w.FromNve] = []

    def send(self, message: w.FromNve) -> None:
        """Send now, or after the next Hello: what is said is not lost with a connection."""
        if self._transport is None:
            self._unsent.append(message)
        else:
            self._transport.send(WSMsgType.BINARY, w.encode(message))

    async def run(self) -> None:
        """Stay connected for ever."""
        pause_s = FIRST_PAUSE_S
        while True:
            for url in in_turn(self._urls):
                try:
                    await self._once(url)
                    pause_s = FIRST_PAUSE_S
                except (OSError, WSError, TimeoutError) as error:
                    log.info("NVA at %s: %s", url, error)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(LONGEST_PAUSE_S, pause_s * 2)

    async def _once(self, url: str) -> None:
        async with asyncio.timeout(CONNECT_LIMIT_S):
            transport, _ = await ws_connect(
                lambda: _Listener(self._heard),
                url,
                ssl_context=self._tls,
                enable_auto_ping=True,
                auto_ping_idle_timeout=IDLE_S,
                auto_ping_reply_timeout=REPLY_S,
            )
        transport.send(WSMsgType.BINARY, w.encode(self._hello()))
        self._transport = transport
        for message in self._unsent:
            self.send(message)
        self._unsent.clear()
        try:
            await transport.wait_disconnected()
        finally:
            self._transport = None
            transport.disconnect()


def in_turn(urls: Sequence[str | Sequence[str]]) -> list[str]:
    """The preferred addresses first; equal ones, in an inner sequence, in random order (N-09)."""
    turn: list[str] = []
    for each in urls:
        equal = [each] if isinstance(each, str) else list(each)
        turn += random.sample(equal, len(equal))
    return turn


class _Listener(WSListener):
    def __init__(self, heard: Callable[[w.FromNva], None]) -> None:
        self._heard = heard

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type != WSMsgType.BINARY:
            return
        try:
            message = w.decode_from_nva(frame.get_payload_as_bytes())
        except msgspec.DecodeError as error:
            transport.send(WSMsgType.BINARY, w.encode(w.Unsupported(why=str(error))))
            return
        self._heard(message)
