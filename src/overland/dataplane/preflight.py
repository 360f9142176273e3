"""What stands against an NVE on this host: one line each, with the remedy."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from overland.dataplane.devices import mtu_of
from overland.ports import KernelFailure

_TRIAL = "ovxtrial"


def blockers() -> Iterator[str]:
    """Reasons that need no trial."""
    if os.geteuid() != 0:
        yield "the NVE does not run as root: start it with sudo or as a system service"
    if not Path("/dev/net/tun").exists():
        yield "/dev/net/tun is missing: load the tun module"


async def kernel_blockers() -> list[str]:
    """What this kernel cannot do, found by trying; the trial device is removed at once."""
    try:
        async with AsyncIPRoute() as ip:
            await ip.link("add", ifname=_TRIAL, kind="vxlan", vxlan_id=1, vxlan_port=65099)
            await ip.link("del", index=socket.if_nametoindex(_TRIAL))
    except (NetlinkError, OSError) as error:
        return [f"this kernel makes no VXLAN device ({error}): load the vxlan module"]
    return []


async def underlay_mtu(address: str | None) -> int:
    """MTU in bytes of the device that carries `address`; KernelFailure when none does."""
    return mtu_of(await underlay_device(address))


async def underlay_device(address: str | None) -> str:
    """The device that carries `address`; KernelFailure when none does."""
    async with AsyncIPRoute() as ip:
        async for message in await ip.get_addr():
            if message.get_attr("IFA_ADDRESS") == address:
                return socket.if_indextoname(message["index"])
    raise KernelFailure(f"no device here has the underlay address {address}")
