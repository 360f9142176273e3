"""Interfaces of a QEMU that runs: which there are, one more, one less.

A device can be plugged in at any time, also while the VM is paused. It goes only when the guest has
let go of it, which QEMU then tells (DEVICE_DELETED); nobody can make a guest do that.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

from overland.hypervisor.command import backend, backend_id, device_id, interface_device
from overland.hypervisor.mirror import Qmp
from overland.model.cluster import Interface
from overland.ports import HypervisorFailure

DELETED = "DEVICE_DELETED"
_OURS = re.compile(r"nic(\d+)")  # as `device_id` writes it


def deleted_slot(data: dict[str, Any]) -> int | None:
    """The slot of the interface that a DEVICE_DELETED event is about; None of other devices."""
    found = _OURS.fullmatch(data.get("device", ""))
    return int(found[1]) if found else None


async def slots(do: Qmp) -> frozenset[int]:
    """The slots of the interfaces that there are."""
    devices = await do("qom-list", path="/machine/peripheral")
    found = (_OURS.fullmatch(device["name"]) for device in devices)
    return frozenset(int(match[1]) for match in found if match)


async def plug(do: Qmp, slot: int, interface: Interface, descriptor: str) -> None:
    """Add a device; `descriptor` is the name of its tap's. Nothing is left if it cannot be."""
    await drop_backend(do, slot)  # of one that the guest let go of when nobody had asked
    await do("netdev_add", **backend(slot, descriptor))
    try:
        await do("device_add", **interface_device(slot, interface))
    except HypervisorFailure:
        await drop_backend(do, slot)
        raise


async def ask_out(do: Qmp, slot: int) -> None:
    """Tell the guest to let go of a device; it may have been told before."""
    with contextlib.suppress(HypervisorFailure):
        await do("device_del", id=device_id(slot))


async def drop_backend(do: Qmp, slot: int) -> None:
    """Remove what was behind a device that is gone; content with absence."""
    with contextlib.suppress(HypervisorFailure):
        await do("netdev_del", id=backend_id(slot))
