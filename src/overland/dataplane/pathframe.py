"""Path frames: how an NVE learns that a path works, and that nothing is left behind on another.

Two questions travel as Ethernet frames with EtherType 0x88B5, exactly where tenant frames would:
*probe* (does a frame from here reach you, at full size?) and *marker* (have you seen all that I
sent down the old path?). The answer is a small UDP datagram straight to the asker: it proves
nothing by its way, only by the random number it repeats. Fields: spec/wire.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import ipaddress
import secrets
import socket
import struct
import time
from collections.abc import Callable

from overland.dataplane.devices import mtu_of
from overland.dataplane.gate import PATH_FRAME, PATH_LABEL, PATH_PROTOCOL
from overland.model.ila import of_nve
from overland.ports import KernelFailure

VERSION = 1
PROBE, MARKER = 1, 2
NONCE_BYTES = 16
PROBE_MAC = bytes.fromhex("0288b5000001")
VXLAN_PORT = 4789
ANSWER = b"overland-answer\x01"

_HEAD = struct.Struct("!BB16s16sH")
_IPV6, _IPV6_TYPE, _HOP_LIMIT = struct.Struct("!IHBB16s16s"), b"\x86\xdd", 64
_ETHERNET_BYTES = 14
_VXLAN_FLAGS = 0x08000000
_ETH_P_ALL = 3
_PACKET_OUTGOING = 4
_SO_ATTACH_FILTER = 26
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _DO_NOT_FRAGMENT = 10, 23, 2


def question(kind: int, nonce: bytes, asker: str, port: int, to: bytes) -> bytes:
    """The Ethernet frame of a question; `asker` and `port` say where the answer should go."""
    address = ipaddress.ip_address(asker)
    packed = address.packed.rjust(16, b"\0")
    head = _HEAD.pack(VERSION, kind | (0x80 if address.version == 6 else 0), nonce, packed, port)
    return (to + PROBE_MAC + PATH_FRAME.to_bytes(2, "big") + head).ljust(60, b"\0")


def packet(kind: int, nonce: bytes, asker: str, port: int, to: bytes, address: str) -> bytes:
    """The same question to IPv6 `address`, for VNs that carry no Ethernet header (ILA)."""
    frame = question(kind, nonce, asker, port, to)
    body = frame[_ETHERNET_BYTES:]
    own = ipaddress.ip_address(asker)
    head = _IPV6.pack(
        PATH_LABEL,
        len(body),
        PATH_PROTOCOL,
        _HOP_LIMIT,
        own.packed if own.version == 6 else bytes(16),
        ipaddress.IPv6Address(address).packed,
    )
    return frame[:12] + _IPV6_TYPE + head + body


def is_path_frame(frame: bytes) -> bool:
    """Tell whether `frame` is of either form."""
    return _body(frame) is not None


def _body(frame: bytes) -> bytes | None:
    if frame[12:14] == PATH_FRAME.to_bytes(2, "big"):
        return frame[_ETHERNET_BYTES:]
    inside = frame[12:18] == _IPV6_TYPE + PATH_LABEL.to_bytes(4, "big")
    if inside and frame[20:21] == bytes((PATH_PROTOCOL,)):
        return frame[_ETHERNET_BYTES + _IPV6.size :]
    return None


def read_question(frame: bytes) -> tuple[bytes, str, int] | None:
    """(nonce, asker's address, port) of a question; None for anything else."""
    body = _body(frame)
    if body is None or len(body) < _HEAD.size:
        return None
    version, kind, nonce, packed, port = _HEAD.unpack_from(body)
    if version != VERSION or kind & 0x7F not in (PROBE, MARKER) or port == 0:
        return None
    asker = ipaddress.IPv6Address(packed) if kind & 0x80 else ipaddress.IPv4Address(packed[12:])
    return nonce, str(asker), port


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


_CLASSIC = (
    (0x28, 0, 0, 12),  # the EtherType
    (0x15, 5, 0, PATH_FRAME),
    (0x15, 0, 5, 0x86DD),
    (0x20, 0, 0, 14),  # how the IPv6 header begins
    (0x15, 0, 3, PATH_LABEL),
    (0x30, 0, 0, 20),  # its next header
    (0x15, 0, 1, PATH_PROTOCOL),
    (0x06, 0, 0, 0xFFFF),
    (0x06, 0, 0, 0),
)


def _only_path_frames() -> tuple[_Filter, ctypes.Array[ctypes.c_char]]:
    """Classic BPF: keep path frames, so tenants' traffic is never copied to us."""
    code = b"".join(struct.pack("HBBI", *each) for each in _CLASSIC)
    kept = ctypes.create_string_buffer(code, len(code))
    return _Filter(len(_CLASSIC), ctypes.addressof(kept)), kept


class Responder:
    """Answers the questions that arrive on one device (a VXLAN device or a tunnel), `index`."""

    def __init__(self, device: str) -> None:
        self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK)
        program, kept = _only_path_frames()
        self._sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(program))
        del kept
        try:
            self._sock.bind((device, _ETH_P_ALL))
        except OSError as error:
            self._sock.close()
            raise KernelFailure(f"{device}: {error.strerror}") from None
        self.index = socket.if_nametoindex(device)
        asyncio.get_running_loop().add_reader(self._sock, self._arrived)

    def _arrived(self) -> None:
        while True:
            try:
                frame, address = self._sock.recvfrom(65535)
            except OSError:
                return
            asked = read_question(frame) if address[2] != _PACKET_OUTGOING else None
            if asked is not None:
                nonce, asker, port = asked
                family = socket.AF_INET6 if ":" in asker else socket.AF_INET
                with socket.socket(family, socket.SOCK_DGRAM) as out, contextlib.suppress(OSError):
                    out.sendto(ANSWER + nonce, (asker, port))

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()


class Asker:
    """One question's ear: a UDP socket on the underlay, bound where `towards` is reached from."""

    def __init__(self, towards: str) -> None:
        family = socket.AF_INET6 if ":" in towards else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as finder:
            try:
                finder.connect((towards, VXLAN_PORT))
            except OSError as error:
                raise KernelFailure(f"no way to {towards}: {error.strerror}") from None
            self.address = finder.getsockname()[0]
        self._sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sock.bind((self.address, 0))
        self.port = self._sock.getsockname()[1]
        self.nonce = secrets.token_bytes(NONCE_BYTES)

    def frame(self, kind: int, to: bytes, address: str | None = None) -> bytes:
        """A question to MAC `to`; with `address`, as an IPv6 packet to it."""
        if address is not None:
            return packet(kind, self.nonce, self.address, self.port, to, address)
        return question(kind, self.nonce, self.address, self.port, to)

    async def answered(self, timeout_s: float) -> bool:
        """Wait for the answer to our number; False at the timeout."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                while await loop.sock_recv(self._sock, 512) != ANSWER + self.nonce:
                    pass
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def probe_locator(
    device: str, vni: int, send: Callable[[bytes], None], remote: str, timeout_s: float
) -> float:
    """`send` a full-size packet out of ILA `device` to NVE `remote` in VN `vni`.

    It is as large as the VN allows. The round trip in seconds; KernelFailure when no answer comes.
    """
    with Asker(remote) as asker:
        frame = asker.frame(PROBE, PROBE_MAC, of_nve(remote, vni))
        frame = _grown(frame, mtu_of(device) + _ETHERNET_BYTES)
        began_s = time.monotonic()
        for _attempt in range(3):
            send(frame)
            if await asker.answered(timeout_s / 3):
                return time.monotonic() - began_s
    raise KernelFailure(f"no packet of {mtu_of(device)} bytes reaches the locator of {remote}")


def _grown(frame: bytes, size: int) -> bytes:
    length = (size - _ETHERNET_BYTES - _IPV6.size).to_bytes(2, "big")
    return (frame[:18] + length + frame[20:]).ljust(size, b"\0")


async def probe(device: str, vni: int, remote: str, timeout_s: float) -> float:
    """Send a full-size tenant frame to NVE `remote` in VN `vni`; its round trip in seconds.

    The VXLAN header is written here, so no forwarding entry is needed, and fragments are
    forbidden, so an underlay that is too small shows. KernelFailure when no answer comes.
    """
    with Asker(remote) as asker:
        frame = asker.frame(PROBE, PROBE_MAC).ljust(mtu_of(device) + _ETHERNET_BYTES, b"\0")
        packet = struct.pack("!II", _VXLAN_FLAGS, vni << 8) + frame
        family = socket.AF_INET6 if ":" in remote else socket.AF_INET
        began_s = time.monotonic()
        with socket.socket(family, socket.SOCK_DGRAM) as out:
            if family == socket.AF_INET:
                out.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _DO_NOT_FRAGMENT)
            else:
                out.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _DO_NOT_FRAGMENT)
            for _attempt in range(3):
                try:
                    out.sendto(packet, (remote, VXLAN_PORT))
                except OSError as error:
                    raise KernelFailure(f"underlay to {remote}: {error.strerror}") from None
                if await asker.answered(timeout_s / 3):
                    return time.monotonic() - began_s
    raise KernelFailure(f"no frame of {len(frame)} bytes reaches NVE {remote} in VN {vni}")
