"""Who sent as the VM, where and when: a capture at its taps on all hosts of a lab, on one clock."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from itertools import pairwise

from overland.dataplane.namespace import inside

_ETH_P_ALL, _SO_RCVBUFFORCE, _SO_TIMESTAMPNS, _OUTGOING = 3, 33, 35, 4


class Ears:
    """Hears all frames in each host's namespace; what VM `mac` itself sent at `tap` is kept."""

    def __init__(self, namespaces: dict[str, str], tap: str, mac: str) -> None:
        self._taps = (tap, "")  # a tap that is gone by now has no name
        self._mac = bytes.fromhex(mac.replace(":", ""))
        self._socks = {}
        for host, namespace in namespaces.items():
            with inside(f"/run/netns/{namespace}"):
                # Not bound to a device: the tap of the new host is not there yet.
                kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
                sock = socket.socket(socket.AF_PACKET, kind, socket.htons(_ETH_P_ALL))
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 26)
            sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            self._socks[host] = sock

    def sent(self) -> dict[str, list[int]]:
        """Host to the instants (CLOCK_REALTIME ns) at which the VM sent there, in order."""
        return {host: sorted(self._instants(sock)) for host, sock in self._socks.items()}

    def _instants(self, sock: socket.socket) -> Iterator[int]:
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, ancillary, _, address = sock.recvmsg(64, 64)
                comes_in = address[0] in self._taps and address[2] != _OUTGOING
                if comes_in and frame[6:12] == self._mac:
                    seconds, nanoseconds = struct.unpack("qq", ancillary[0][2])
                    yield seconds * 10**9 + nanoseconds

    def close(self) -> None:
        for sock in self._socks.values():
            sock.close()


def overlaps(sent: dict[str, list[int]]) -> list[str]:
    """Pairs of hosts on which the VM sent at overlapping times: in a move each has one stretch."""
    spans = sorted((each[0], each[-1], host) for host, each in sent.items() if each)
    return [
        f"{host} sent until {last}, {after} from {first}"
        for (_, last, host), (first, _, after) in pairwise(spans)
        if first <= last
    ]
