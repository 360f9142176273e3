"""Taps: the kernel's end of a VM's interface, and of our hold queues.

We make the tap and hand QEMU a descriptor of it, so that we keep one too: with the VM stopped, it
reads what QEMU has not taken from the ring (R-36). Both descriptors share one queue. A tap is
persistent: it outlives this daemon and the VM, and is removed by the agent, by its mark.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from overland.dataplane.devices import interface_index
from overland.ports import KernelFailure

_TUN = "/dev/net/tun"
_TUNSETIFF, _TUNSETPERSIST, _TUNGETIFF = 0x400454CA, 0x400454CB, 0x800454D2
_TUNSETVNETHDRSZ, _TUNGETVNETHDRSZ = 0x400454D8, 0x800454D7
_SIOCSIFTXQLEN = 0x8943
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_PIDFD_OPEN, _PIDFD_GETFD = 434, 438
_FRAME_BYTES = 1 << 17

VNET_HEADER_BYTES = 12
"""virtio_net_hdr_mrg_rxbuf; its first ten bytes are virtio_net_hdr."""

_libc = ctypes.CDLL(None, use_errno=True)


def open_tap(name: str, *, vnet_header: bool) -> int:
    """Open (making it if needed) tap `name`; returns a non-blocking descriptor."""
    flags = _IFF_TAP | _IFF_NO_PI | (_IFF_VNET_HDR if vnet_header else 0)
    try:
        fd = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise KernelFailure(f"{_TUN}: {error.strerror}") from None
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(fd, _TUNSETPERSIST, 1)
        if vnet_header:
            fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER_BYTES))
    except OSError as error:
        os.close(fd)
        raise KernelFailure(f"tap {name}: {error.strerror}") from None
    return fd


def set_queue_length(name: str, frames: int) -> None:
    """Let the ring of tap `name` hold `frames`. KernelFailure when there is no such device."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            fcntl.ioctl(sock, _SIOCSIFTXQLEN, struct.pack("16si20x", name.encode(), frames))
        except OSError as error:
            raise KernelFailure(f"queue of {name}: {error.strerror}") from None


def ring_empty(fd: int) -> bool:
    """Tell whether no frame waits in the ring."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return not poll.poll(0)


def vnet_header_bytes(fd: int) -> int:
    """Length of the virtio header before each frame; the hypervisor may have changed it."""
    return int(struct.unpack("i", fcntl.ioctl(fd, _TUNGETVNETHDRSZ, bytes(4)))[0])


def read_frames(fd: int) -> Iterator[bytes]:
    """Take every frame out of the ring, in order."""
    with contextlib.suppress(BlockingIOError):
        while True:
            yield os.read(fd, _FRAME_BYTES)


def take_descriptor(name: str, pid: int) -> int:
    """Take a descriptor of tap `name` from process `pid` that has it open (pidfd_getfd(2))."""
    pidfd = _libc.syscall(_PIDFD_OPEN, pid, 0)
    if pidfd < 0:
        raise KernelFailure(f"process {pid}: {os.strerror(ctypes.get_errno())}")
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(entry) != _TUN:
                    continue
                fd = int(_libc.syscall(_PIDFD_GETFD, pidfd, int(entry.name), 0))
                if fd >= 0:
                    if _name_of(fd) == name:
                        return fd
                    os.close(fd)
    except OSError as error:
        raise KernelFailure(f"process {pid}: {error.strerror}") from None
    finally:
        os.close(pidfd)
    raise KernelFailure(f"process {pid} does not have tap {name} open")


def _name_of(fd: int) -> str:
    raw = fcntl.ioctl(fd, _TUNGETIFF, bytes(40))
    return raw[:16].split(b"\0")[0].decode()


class TapTable:
    """The descriptors of this host's VM taps, by name. Owned by the daemon."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}

    def make(self, name: str, frames: int) -> None:
        """Make tap `name` with a ring for `frames`, or take it over if it is there and free.

        A tap in use by a VM that outlived us is left alone; `adopt` gets its descriptor.
        """
        if name not in self._fds:
            with contextlib.suppress(_Busy):
                self._fds[name] = _open_free(name)
        set_queue_length(name, frames)

    def fd(self, name: str) -> int:
        """Our own descriptor; KernelFailure when we have none.

        A tap that a former daemon left, and that no VM has, is ours again.
        """
        if name not in self._fds:
            interface_index(name)  # opening a tap that is not there would make it
            with contextlib.suppress(_Busy):
                self._fds[name] = _open_free(name)
        if name not in self._fds:
            raise KernelFailure(f"no descriptor of tap {name} here")
        return self._fds[name]

    def fd_for_child(self, name: str) -> int:
        """The descriptor to hand to a child process (pass it on with `pass_fds`)."""
        return self.fd(name)

    def adopt(self, name: str, pid: int) -> None:
        """After a restart: take a descriptor from the VM's process."""
        if name not in self._fds:
            self._fds[name] = take_descriptor(name, pid)

    def forget(self, name: str) -> None:
        """The device is removed: close our descriptor. Content with absence."""
        fd = self._fds.pop(name, None)
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        for name in list(self._fds):
            self.forget(name)


class _Busy(Exception):
    pass


def _open_free(name: str) -> int:
    try:
        return open_tap(name, vnet_header=True)
    except KernelFailure as failure:
        if "busy" in str(failure):
            raise _Busy from None
        raise
