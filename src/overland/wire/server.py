"""The NVA's end: WebSocket (picows) over mutual TLS. Decides nothing.

A connection speaks for the host whose certificate it shows; anything else is closed at once (N-12).
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Protocol

import msgspec
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_create_server

from overland.wire import messages as w
from overland.wire.tls import common_name

IDLE_S, REPLY_S = 2.0, 2.0
"""A silent connection is asked after two seconds and given up two seconds later."""

log = logging.getLogger(__name__)


class Hearing(Protocol):
    """Who listens at the NVA. Called in order per connection."""

    def connected(self, host: str, hello: w.Hello) -> None: ...

    def disconnected(self, host: str) -> None: ...

    def heard(self, host: str, message: w.FromNve) -> None: ...


class WireServer:
    """All NVEs that are connected, by host name."""

    def __init__(self, hearing: Hearing) -> None:
        self._hearing = hearing
        self._transports: dict[str, WSTransport] = {}
        self._server: asyncio.Server | None = None

    async def listen(self, address: str, port: int, tls: ssl.SSLContext) -> None:
        """OSError when the port is taken."""
        self._server = await ws_create_server(
            lambda _: _Connection(self),
            address,
            port,
            ssl=tls,
            enable_auto_ping=True,
            auto_ping_idle_timeout=IDLE_S,
            auto_ping_reply_timeout=REPLY_S,
        )

    def send(self, host: str, message: w.FromNva) -> bool:
        """Send now; False when that NVE is not connected."""
        transport = self._transports.get(host)
        if transport is None:
            return False
        transport.send(WSMsgType.BINARY, w.encode(message))
        return True

    def hosts(self) -> frozenset[str]:
        return frozenset(self._transports)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    def take(self, host: str, transport: WSTransport, hello: w.Hello) -> None:
        former = self._transports.get(host)
        self._transports[host] = transport
        if former is not None:
            former.disconnect()
        self._hearing.connected(host, hello)

    def drop(self, host: str, transport: WSTransport) -> None:
        if self._transports.get(host) is transport:
            del self._transports[host]
            self._hearing.disconnected(host)

    def heard(self, host: str, message: w.FromNve) -> None:
        self._hearing.heard(host, message)


class _Connection(WSListener):
    """One NVE's connection: Hello first, then whatever it says."""

    def __init__(self, server: WireServer) -> None:
        self._server = server
        self._host = ""
        self._identity = ""

    def on_ws_connected(self, transport: WSTransport) -> None:
        peer = transport.underlying_transport.get_extra_info("peercert")
        self._identity = common_name(peer)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type != WSMsgType.BINARY:
            return
        try:
            message = w.decode_from_nve(frame.get_payload_as_bytes())
        except msgspec.DecodeError as error:
            transport.send(WSMsgType.BINARY, w.encode(w.Unsupported(why=str(error))))
            return
        if isinstance(message, w.Hello):
            if self._identity != f"nve:{message.host.name}":
                log.warning("%s claims to be host %s", self._identity, message.host.name)
                transport.disconnect()
                return
            self._host = message.host.name
            self._server.take(self._host, transport, message)
        elif self._host:
            self._server.heard(self._host, message)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        if self._host:
            self._server.drop(self._host, transport)
