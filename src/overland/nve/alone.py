"""Carries out this host's orders of disks that move alone, while their VM stays (R-54).

The NVE keeps no part of it: what stands is what QEMU has (a job, a node) and the note of the image
that was made, and each order is content with being done already.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import assert_never

from overland.mobility import messages as m
from overland.model.cluster import moved_disks
from overland.model.handover import Memory
from overland.ports import Hypervisor, Images, PortFailure

WATCH_S = 0.05
"""How often a disk that is copied is looked at."""

log = logging.getLogger(__name__)


class DiskSteps:
    """`now_ns`: CLOCK_REALTIME."""

    def __init__(
        self, nve: str, hypervisor: Hypervisor, images: Images, now_ns: Callable[[], int]
    ) -> None:
        self._nve = nve
        self._hypervisor = hypervisor
        self._images = images
        self._now_ns = now_ns

    def still(self, order: m.DiskOrder) -> bool:
        """Always: the connection keeps the order of what is asked."""
        del order
        return True

    async def carry_out(self, order: m.DiskOrder) -> m.AnyReport:
        """Do what `order` says, unless it is done already; what it came to, good or bad."""
        move, nve = order.move, self._nve
        try:
            match order:
                case m.CopyDisk():
                    return await self._copy(order)
                case m.SettleDisk():
                    stop_ns = await self._hypervisor.settle_disk(order.vm)
                    await self._images.settle(moved_disks(order.vm))
                    return m.Stopped(
                        move=move, nve=nve, held_ns=0, stop_ns=stop_ns, memory=Memory()
                    )
                case m.KeepDisk():
                    return await self._keep(order)
                case m.LeaveDisk():
                    await self._hypervisor.leave_disk(order.vm)
                    await self._images.drop_taken(move, moved_disks(order.vm))
                    return m.Restored(move=move, nve=nve)
                case m.DropImage():
                    self._images.remove(moved_disks(order.vm))
                    return m.Closed(move=move, nve=nve)
                case _:
                    assert_never(order)
        except PortFailure as failure:
            return m.Failed(move=move, nve=nve, step=type(order).__name__, why=str(failure))

    async def _copy(self, order: m.CopyDisk) -> m.Received:
        """Return once both images are the same, and stay so."""
        await self._images.make_for(order.move, moved_disks(order.vm))
        await self._hypervisor.copy_disk(order.vm, order.bytes_per_s)
        while not (storage := await self._hypervisor.copied(order.vm)).ready:  # noqa: ASYNC110
            await asyncio.sleep(WATCH_S)  # QEMU tells nobody how far it is
        at_ns = self._now_ns()
        return m.Received(move=order.move, nve=self._nve, at_ns=at_ns, storage=storage)

    async def _keep(self, order: m.KeepDisk) -> m.Running | m.Crashed:
        """The record names the new image: it is the VM's, whatever becomes of the VM's process."""
        move, nve = order.move, self._nve
        await self._images.keep_taken(move, moved_disks(order.vm))
        if order.vm.name not in await self._hypervisor.names():
            return m.Crashed(move=move, nve=nve, why="QEMU ended")
        return m.Running(
            move=move, nve=nve, at_ns=await self._hypervisor.keep_disk(order.vm), held=0
        )
