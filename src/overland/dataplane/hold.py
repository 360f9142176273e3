"""Hold queues: where frames wait, in the kernel, until a gate may let them go on.

A queue is a tap of ours: the gate redirects frames into its ring (bounded, drops counted by the
kernel), and we read them out and send them on. It has no virtio header, so the kernel finishes
checksums and segments before a frame enters.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable

from overland.dataplane.devices import device_counts, interface_index
from overland.dataplane.gate import MARK, PATH_FRAME
from overland.dataplane.pathframe import is_path_frame
from overland.dataplane.tap import open_tap, read_frames, set_queue_length
from overland.ports import KernelFailure

_SO_MARK = 36
_SOL_PACKET, _PACKET_VNET_HDR = 263, 15
_VIRTIO_NET_HDR_BYTES = 10
_PATH_FRAME = PATH_FRAME.to_bytes(2, "big")
_PATIENCE_S = 0.5

PLUG = bytes(12) + _PATH_FRAME + bytes(46)
"""To nobody, from nobody: whatever a hypervisor makes of it, no guest takes it (HO-8)."""


class Injectors:
    """The packet sockets of this host, one for each kind of sending.

    They stay open: the kernel takes 10 ms and more to close a packet socket (af_packet.c,
    packet_release waits for all CPUs), which is as long as a whole handover ought to take.
    """

    def __init__(self) -> None:
        self._socks: dict[tuple[int, bool], socket.socket] = {}

    def into(self, device: str, *, vnet_header: int = 0, mark: int = MARK) -> Injector:
        """Frames sent by the result leave by `device`, past its gate unless `mark` is 0.

        They begin with the `vnet_header` bytes that their tap gave them.
        KernelFailure when there is no such device.
        """
        interface_index(device)
        kind = mark, vnet_header > 0
        if kind not in self._socks:
            self._socks[kind] = _packet_socket(*kind)
        return Injector(self._socks[kind], device, vnet_header)

    def close(self) -> None:
        for sock in self._socks.values():
            sock.close()
        self._socks.clear()


def _packet_socket(mark: int, vnet_header: bool) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_MARK, mark)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24)
        if vnet_header:
            sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    except OSError as error:
        sock.close()
        raise KernelFailure(f"packet socket: {error.strerror}") from None
    return sock


class Injector:
    """Sends frames out of one device."""

    def __init__(self, sock: socket.socket, device: str, vnet_header: int) -> None:
        self._sock = sock
        self._to = device, 0
        self.vnet_header = vnet_header

    def send(self, frame: bytes) -> None:
        """Send one frame. KernelFailure when the device is gone or takes none for half a second."""
        if self.vnet_header:
            frame = frame[:_VIRTIO_NET_HDR_BYTES] + frame[self.vnet_header :]
        deadline_s = time.monotonic() + _PATIENCE_S
        while True:
            try:
                self._sock.sendto(frame, self._to)
                return
            except (BlockingIOError, OSError) as error:
                full = isinstance(error, BlockingIOError) or error.errno == errno.ENOBUFS
                if not full or time.monotonic() > deadline_s:
                    raise KernelFailure(f"frame not sent: {error.strerror}") from None


class HoldQueue:
    """The ring of one hold tap, and how many frames were taken out of it."""

    def __init__(self, name: str, frames: int) -> None:
        self.name = name
        self.fd = open_tap(name, vnet_header=False)
        set_queue_length(name, frames)

    def drain(self, send: Callable[[bytes], None], *, path_frames: bool) -> int:
        """Send on what waits, in order; returns how many frames left the queue.

        Our own path frames go along the path but never into a tenant's port.
        """
        taken = 0
        for frame in read_frames(self.fd):
            taken += 1
            if path_frames or not is_path_frame(frame):
                send(frame)
        return taken

    def overflowed(self) -> int:
        """Frames that found the ring full (R-39)."""
        return device_counts(self.name).send_drops

    def close(self) -> None:
        os.close(self.fd)


def rescue(fd: int, injector: Injector) -> int:
    """Send on every frame that a stopped VM left in its tap's ring; returns how many.

    A plug that it did not take is ours, and stays here.
    """
    count = 0
    for frame in read_frames(fd):
        if frame[injector.vnet_header :] != PLUG:
            injector.send(frame)
            count += 1
    return count
