"""Gives up the addresses that moves have changed, when the time is over to which they are kept.

That instant is in the VM's record, so an NVA that starts, or takes over, goes on from there. What
is due while the VM moves waits for the move's end: its addresses move with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from overland.model.cluster import Former, Vm
from overland.ports import StoreFailure

AGAIN_S = 0.5
"""After how long it is tried again, when the VM moves or the store takes nothing."""

log = logging.getLogger(__name__)


class FormerAddresses:
    """`give_up(move)` gives up what that move has left; it tells whether that is done."""

    def __init__(self, give_up: Callable[[str], Awaitable[bool]]) -> None:
        self._give_up = give_up
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def look(self, vm: Vm) -> None:
        """See to all former addresses of `vm`; what is seen to already is not begun twice."""
        for interface in vm.interfaces:
            for former in interface.former:
                if former.move not in self._tasks:
                    self._tasks[former.move] = asyncio.create_task(self._end(former))

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    async def _end(self, former: Former) -> None:
        wait_s = max(0.0, _left_s(former))
        while True:
            await asyncio.sleep(wait_s)
            wait_s = _left_s(former)
            if wait_s > 0:
                continue  # a loop's timer may come a millisecond early
            if await self._done(former.move):
                break
            wait_s = AGAIN_S
        self._tasks.pop(former.move, None)

    async def _done(self, move: str) -> bool:
        try:
            return await self._give_up(move)
        except StoreFailure as failure:
            log.error("the old addresses of move %s are not given up: %s", move, failure)
            return False


def _left_s(former: Former) -> float:
    return (former.until_ns - time.time_ns()) / 1e9
