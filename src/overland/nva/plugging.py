"""Drives every change of interfaces that is under way: associate, have the NVE fit it, record it.

The record says what is wanted (`Interface.change`), and an order to fit is content with being done.
So whoever was killed meanwhile, the next NVA, or the next word of the NVE, begins here anew.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from overland.model.cluster import Vm
from overland.nva import rules
from overland.ports import StoreFailure

log = logging.getLogger(__name__)

RETRY_S = 1.0
CHANGE_LIMIT_S = 40.0
"""How long who asked for a change waits for it; it goes on without him."""


class Records(Protocol):
    """Where VMs are kept."""

    def find_vm(self, name: str) -> Vm | None: ...

    def vms_on(self, host: str) -> list[Vm]: ...

    async def end_change(self, vm: Vm, *, done: bool) -> None:
        """The change of `vm` is as it was meant, or as if it had never been."""
        ...


class Nves(Protocol):
    """What is asked of NVEs."""

    def is_connected(self, host: str) -> bool: ...

    async def is_associated(self, vm: Vm) -> bool:
        """Wait until the VM's NVE has its interfaces in the kernel; False at a timeout."""
        ...

    async def fit(self, vm: Vm) -> str | None:
        """Have the VM's devices made as `vm` says: empty, or why not; None without an answer."""
        ...


class Plugging:
    """One task for each VM whose interfaces change."""

    def __init__(self, records: Records, nves: Nves) -> None:
        self._records = records
        self._nves = nves
        self._tasks: dict[str, asyncio.Task[str]] = {}
        self._back: dict[str, asyncio.Event] = {}

    def back(self, host: str) -> None:
        """The NVE of `host` is connected (again): what it was asked before it is asked anew."""
        self._back.pop(host, asyncio.Event()).set()
        for vm in self._records.vms_on(host):
            if _is_changing(vm):
                self._at_work(vm.name)

    async def carried_out(self, vm: Vm) -> str:
        """Wait until the change of `vm` has ended, if there is one; why it came to nothing.

        Empty as well when somebody else has ended it: then the record tells.
        """
        if not _is_changing(vm):
            return ""
        self._at_work(vm.name)
        task = self._tasks[vm.name]
        await asyncio.wait({task}, timeout=CHANGE_LIMIT_S)
        if task.done():
            return task.result()
        return f"host {vm.host} has not said so within {CHANGE_LIMIT_S:g} s; it goes on by itself"

    def _at_work(self, name: str) -> None:
        if name not in self._tasks:
            task = self._tasks[name] = asyncio.create_task(self._to_its_end(name))
            task.add_done_callback(lambda done: self._forget(name, done))

    def _forget(self, name: str, task: asyncio.Task[str]) -> None:
        if self._tasks.get(name) is task:
            del self._tasks[name]

    async def _to_its_end(self, name: str) -> str:
        while (vm := self._records.find_vm(name)) is not None and _is_changing(vm):
            if not self._nves.is_connected(vm.host):
                return f"the NVE of host {vm.host} is away; it goes on when that is back"
            why = await self._why_not(vm)
            if why is None:
                continue
            try:
                await self._records.end_change(vm, done=not why)
            except StoreFailure as failure:
                log.error("interfaces of VM %s: %s", name, failure)
                await asyncio.sleep(RETRY_S)  # and fit again, which finds it done
                continue
            return why
        return ""

    async def _why_not(self, vm: Vm) -> str | None:
        """Associated before the device appears (requirements 3.3); None when it is not known."""
        if not await self._nves.is_associated(vm):
            is_there = self._nves.is_connected(vm.host)
            return "it was not associated: its host's kernel does not have it" if is_there else None
        fitted = asyncio.ensure_future(self._nves.fit(vm))
        back = asyncio.ensure_future(self._back.setdefault(vm.host, asyncio.Event()).wait())
        await asyncio.wait({fitted, back}, return_when=asyncio.FIRST_COMPLETED)
        back.cancel()
        if fitted.done():
            return fitted.result()
        fitted.cancel()  # who was asked is another one now, or may not have heard
        return None


def _is_changing(vm: Vm) -> bool:
    return next(rules.changing(vm), None) is not None
