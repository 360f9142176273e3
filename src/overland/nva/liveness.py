"""Tells a dead host from one whose NVE is away (N-11, 6-2).

An NVE whose lease has ended may be upgraded, or cut off from the NVA only: its VMs run, and frames
for them arrive. So other NVEs are asked whether the host's kernel answers on the underlay. It is
dead when nobody hears it who would have: a host that never answered such a question, perhaps
because of a firewall, is not called dead for being silent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

ASKED = 3
"""How many other NVEs are asked."""

AGAIN_S = 2.0
"""After how long a host that is away, but not dead, is asked for again."""

log = logging.getLogger(__name__)


class Liveness:
    """`others(host)` names NVEs to ask, `ask(asker, host)` lets one look: None when it is away.

    `found(host, fact)` hears that a host `answers`, or is `dead`.
    """

    def __init__(
        self,
        others: Callable[[str], list[str]],
        ask: Callable[[str, str], Awaitable[bool | None]],
        found: Callable[[str, str], None],
    ) -> None:
        self._others = others
        self._ask = ask
        self._found = found
        self._answered: set[str] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def connected(self, host: str, *, answers: bool) -> None:
        """The NVE is there: learn whether its host answers such questions, if it is not known."""
        if answers:
            self._answered.add(host)
        self._begin(host, self._learn(host))

    def lost(self, host: str, *, answers: bool) -> None:
        """Its lease has ended."""
        if answers:
            self._answered.add(host)
        self._begin(host, self._until_known(host))

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    def _begin(self, host: str, work: Awaitable[None]) -> None:
        former = self._tasks.get(host)
        if former is not None:
            former.cancel()
        self._tasks[host] = asyncio.ensure_future(work)

    async def _learn(self, host: str) -> None:
        while host not in self._answered:
            if await self._heard(host):
                self._answered.add(host)
                self._found(host, "answers")
            await asyncio.sleep(AGAIN_S)

    async def _until_known(self, host: str) -> None:
        while True:
            heard = await self._heard(host)
            if heard is False and host in self._answered:
                log.warning("host %s is dead: its mappings are withdrawn", host)
                self._found(host, "dead")
                return
            if heard:
                log.warning("NVE %s is away, its host lives: its mappings stay", host)
            await asyncio.sleep(AGAIN_S)

    async def _heard(self, host: str) -> bool | None:
        """Whether any other NVE hears the host; None when nobody could be asked."""
        askers = self._others(host)[:ASKED]
        answers = await asyncio.gather(*(self._ask(asker, host) for asker in askers))
        known = [each for each in answers if each is not None]
        return any(known) if known else None
