"""The courtesy after a move: gratuitous ARP, unsolicited Neighbor Advertisement, RARP (6-8).

Peers do not depend on it: their mappings came from the NVA. Switches behind a split NVE and
tenants that cache a neighbour's port like to hear it.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable

from overland.dataplane.hold import Injector
from overland.dataplane.tap import vnet_header_bytes
from overland.model.handover import MovingPort
from overland.ports import KernelFailure

ARP, RARP, IPV6 = 0x0806, 0x8035, 0x86DD
BROADCAST = b"\xff" * 6
ALL_NODES = ipaddress.IPv6Address("ff02::1")
ALL_NODES_MAC = b"\x33\x33\x00\x00\x00\x01"
ICMPV6, NEIGHBOR_ADVERTISEMENT = 58, 136
OVERRIDE = 0x20000000
_MINIMUM_BYTES = 60


def _bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def _frame(to: bytes, mac: bytes, ethertype: int, payload: bytes) -> bytes:
    return (to + mac + ethertype.to_bytes(2, "big") + payload).ljust(_MINIMUM_BYTES, b"\0")


def _arp_like(ethertype: int, operation: int, mac: bytes, ipv4: bytes) -> bytes:
    """An (R)ARP packet in which the sender speaks of itself (RFC 826, RFC 903)."""
    head = b"\x00\x01\x08\x00\x06\x04" + operation.to_bytes(2, "big")
    target = mac if ethertype == RARP else b"\0" * 6
    return _frame(BROADCAST, mac, ethertype, head + mac + ipv4 + target + ipv4)


def gratuitous_arp(mac: str, ipv4: str) -> bytes:
    """A broadcast ARP request whose sender and target are the same (RFC 5227 section 3)."""
    return _arp_like(ARP, 1, _bytes(mac), ipaddress.IPv4Address(ipv4).packed)


def reverse_arp(mac: str) -> bytes:
    """What hypervisors send: RARP request reverse, no protocol address (requirements 1.5)."""
    return _arp_like(RARP, 3, _bytes(mac), b"\0" * 4)


def _checksum(data: bytes) -> int:
    total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def unsolicited_advertisement(mac: str, ipv6: str) -> bytes:
    """An unsolicited NA to all nodes, Override set (RFC 4861 section 7.2.6)."""
    sender = ipaddress.IPv6Address(ipv6).packed
    body = (
        bytes([NEIGHBOR_ADVERTISEMENT, 0, 0, 0])
        + OVERRIDE.to_bytes(4, "big")
        + sender
        + b"\x02\x01"
        + _bytes(mac)
    )
    pseudo = sender + ALL_NODES.packed + len(body).to_bytes(4, "big") + bytes([0, 0, 0, ICMPV6])
    body = body[:2] + _checksum(pseudo + body).to_bytes(2, "big") + body[4:]
    head = b"\x60\0\0\0" + len(body).to_bytes(2, "big") + bytes([ICMPV6, 255])
    return _frame(ALL_NODES_MAC, _bytes(mac), IPV6, head + sender + ALL_NODES.packed + body)


def announcements(mac: str, addresses: Iterable[str]) -> list[bytes]:
    """Every frame to send for one moved interface."""
    frames = [reverse_arp(mac)]
    for address in addresses:
        frame = unsolicited_advertisement if ":" in address else gratuitous_arp
        frames.append(frame(mac, address))
    return frames


def announce(port: MovingPort, vn: Injector, tap: int) -> None:
    """Tell the other NVEs of the VN, and the tenants of this one.

    KernelFailure when a device is gone. To the other NVEs straight from the VXLAN device (`vn`):
    the bridge keeps gratuitous ARP from it. To the tenants here as if the VM had spoken, by its
    `tap`: so it does not hear of itself.
    """
    frames = announcements(port.mac, filter(None, (port.ipv4, port.ipv6, *port.beside)))
    for frame in frames:
        vn.send(frame)
    try:
        for frame in frames:
            os.write(tap, bytes(vnet_header_bytes(tap)) + frame)
    except OSError as error:
        raise KernelFailure(f"{port.port}: {error.strerror}") from None
