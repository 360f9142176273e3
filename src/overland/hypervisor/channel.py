"""The connection that a VM's memory goes by, paced by the kernel.

QEMU's own pacing sends a tenth of a second's allowance at once and then sleeps, whatever it is told
meanwhile; the kernel paces evenly, and obeys a new rate within a millisecond. So we connect, hand
QEMU the descriptor, and keep one to set the rate with.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from overland.ports import HypervisorFailure

_SO_SNDBUFFORCE, _SO_MAX_PACING_RATE = 32, 47
_UNPACED = (1 << 64) - 1
_PACED_BUFFER_BYTES = 64 << 10
_FREE_BUFFER_BYTES = 8 << 20
CONNECT_LIMIT_S = 5.0


class Channel:
    """One memory stream, seen from its sending end: `sock`, which QEMU has as well."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    @classmethod
    async def open(cls, uri: str) -> Channel:
        """Connect to `uri` (tcp:ADDRESS:PORT). HypervisorFailure when nobody answers."""
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
        with contextlib.suppress(OSError):
            # BBR takes our pace for the path's bandwidth, and keeps to it when the pace ends.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        sock.setblocking(True)  # QEMU decides for itself; the flag belongs to the connection
        return cls(sock)

    def hand_to(self, monitor: socket.socket) -> None:
        """Send a copy of the descriptor along with whatever QMP command comes next."""
        socket.send_fds(monitor, [b" "], [self.sock.fileno()])

    def pace(self, bytes_per_s: int) -> None:
        """Send at most so much from now on; 0 is no limit.

        A paced sender gets a small buffer: what QEMU has written counts as sent, so not much may
        lie there unsent.
        """
        buffer = _PACED_BUFFER_BYTES if bytes_per_s else _FREE_BUFFER_BYTES
        rate = bytes_per_s or _UNPACED
        with contextlib.suppress(OSError):  # the other end is gone: QEMU will say so
            self.sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, buffer)
            self.sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, rate.to_bytes(8, "little"))

    def close(self) -> None:
        """Let go of our copy; QEMU's stays open."""
        self.sock.close()
