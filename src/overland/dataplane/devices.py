"""Small facts about the devices of this network namespace."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from pyroute2 import AsyncIPRoute

from overland.model.nve import Link
from overland.ports import KernelFailure

_SIOCGIFMTU = 0x8921


@dataclass(frozen=True, slots=True)
class DeviceCounts:
    """Frames received and sent by a device, and those it could not send."""

    received: int = 0
    sent: int = 0
    send_drops: int = 0


def device_counts(device: str) -> DeviceCounts:
    """From /proc/net/dev (sysfs may show another namespace); zeros when there is no such device."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == device:
            fields = counts.split()
            return DeviceCounts(int(fields[1]), int(fields[9]), int(fields[11]))
    return DeviceCounts()


def interface_index(device: str) -> int:
    """KernelFailure when there is no such device."""
    try:
        return socket.if_nametoindex(device)
    except OSError:
        raise KernelFailure(f"no device {device}") from None


def mtu_of(device: str) -> int:
    """MTU in bytes. KernelFailure when there is no such device."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            raw = fcntl.ioctl(sock, _SIOCGIFMTU, struct.pack("16si20x", device.encode(), 0))
        except OSError as error:
            raise KernelFailure(f"{device}: {error.strerror}") from None
    return int(struct.unpack("16si20x", raw)[1])


def silence(name: str) -> None:
    """Keep the kernel's own IPv6 off a device of ours: not one frame of its own may leave."""
    path = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
    if path.exists():
        path.write_text("1")


def answer_only(name: str) -> None:
    """Let the kernel hold IPv6 neighbours on bridge `name`, to answer ND, but no address.

    Without an address it has nothing of its own to say (net/ipv6/addrconf.c, addr_gen_mode none).
    Nor does it answer ARP for the host's own addresses, which are none of the tenants' business.
    """
    ipv4 = Path(f"/proc/sys/net/ipv4/conf/{name}/arp_ignore")
    if ipv4.exists():
        ipv4.write_text("8")
    folder = Path(f"/proc/sys/net/ipv6/conf/{name}")
    if folder.exists():
        (folder / "addr_gen_mode").write_text("1")
        (folder / "accept_ra").write_text("0")


def exists(name: str) -> bool:
    """Tell whether there is such a device."""
    with contextlib.suppress(KernelFailure):
        return interface_index(name) > 0
    return False


async def delete(ip: AsyncIPRoute, name: str) -> None:
    """Take a device away; content with absence."""
    with contextlib.suppress(KernelFailure):
        await ip.link("del", index=interface_index(name))


async def pair_into(ip: AsyncIPRoute, link: Link, namespace: str, inner: str, mac: str) -> None:
    """Make `link` as a veth pair whose other end is `inner`, with address `mac`, in `namespace`."""
    peer = {"ifname": inner, "address": mac, "mtu": link.mtu, "net_ns_fd": namespace}
    await ip.link("add", ifname=link.name, kind="veth", mtu=link.mtu, peer=peer)
