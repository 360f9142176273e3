"""The one loop of a host: intent, snapshot, ops, and what went wrong.

The agent is the only one who reconciles this kernel. It is told the whole intent each time it
changes, looks at the kernel itself (never at a memory of it), and applies the difference. What a
handover has under way it leaves alone (`moving`). After a restart nothing needs to be known: the
first round reads back what is ours and finds it as wanted, so no packet notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from overland.model.handover import MovingPort
from overland.model.nve import KernelState, Muted, NveIntent, Op, OpFailure
from overland.nve.delta import delta
from overland.nve.moving import Moving, settle
from overland.nve.render import render
from overland.ports import Kernel, KernelFailure

RESYNC_S = 10.0
"""How often the kernel is read back although nothing is known to have changed."""

READY_LIMIT_S = 10.0

log = logging.getLogger(__name__)


class Agent:
    """Keeps one kernel as its intent says. Removes nothing before the intent is known to be whole.

    After a restart VNs come one by one: what belongs to one that has not come yet is in use.
    """

    def __init__(self, kernel: Kernel, courtesy: Callable[[MovingPort], None]) -> None:
        self._kernel = kernel
        self._courtesy = courtesy
        self._intent: NveIntent | None = None
        self._whole = False
        self._moving: frozenset[Moving] = frozenset()
        self._lock = asyncio.Lock()
        self._ports: frozenset[str] = frozenset()
        self._changed = asyncio.Condition()
        self._again = asyncio.Event()

    async def want(self, intent: NveIntent) -> list[OpFailure]:
        """Make the kernel so; returns what it refused. The caller acknowledges after this."""
        self._intent = intent
        return await self.reconcile()

    def complete(self) -> None:
        """The intent is whole: whatever else there is of ours in the kernel may go."""
        if not self._whole:
            self._whole = True
            self._intent = self._intent or NveIntent()
            self._again.set()

    async def reconcile(self) -> list[OpFailure]:
        """One round: read back, compare, apply."""
        async with self._lock:
            if self._intent is None:
                return []
            actual = await self._kernel.snapshot()
            desired = settle(render(self._intent), actual, self._intent, self._moving)
            ops = [op for op in delta(desired, actual) if self._whole or op.verb == "put"]
            failures = await self._kernel.apply(ops) if ops else []
            for failure in failures:
                log.warning("kernel refused %s: %s", failure.op, failure.why)
            await self._note(desired, failures)
            return failures

    async def run(self) -> None:
        """Look again now and then, and whenever a handover gives something back."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RESYNC_S):
                    await self._again.wait()
            self._again.clear()
            try:
                await self.reconcile()
            except KernelFailure as failure:
                log.warning("reconcile: %s", failure)

    async def _note(self, desired: KernelState, failures: list[OpFailure]) -> None:
        failed = {getattr(failure.op.fact, "name", "") for failure in failures}
        async with self._changed:
            self._ports = frozenset(link.name for link in desired.links) - failed
            self._changed.notify_all()

    # ------------------------------------------------------------ what handovers need

    def moving(self, entries: frozenset[Moving]) -> None:
        """Leave these to the handover from now on; look again when there are fewer."""
        fewer = bool(self._moving - entries)
        self._moving = entries
        if fewer:
            self._again.set()

    async def ready(self, port: str) -> None:
        """Wait until `port` is in the kernel; KernelFailure when it does not come."""
        if self._intent is None and await self._there(port):
            return  # a restarted daemon goes on with what is there, NVA or not
        try:
            async with asyncio.timeout(READY_LIMIT_S), self._changed:
                await self._changed.wait_for(lambda: port in self._ports)
        except TimeoutError:
            raise KernelFailure(f"port {port} did not come up in {READY_LIMIT_S:g} s") from None

    async def _there(self, port: str) -> bool:
        return any(link.name == port for link in (await self._kernel.snapshot()).links)

    async def unmute(self, ports: list[str]) -> None:
        """Let frames from `ports` in, now."""
        ops = [Op(verb="remove", fact=Muted(port=port)) for port in ports]
        failures = await self._kernel.apply(ops)
        if failures:
            raise KernelFailure(failures[0].why)

    async def dropped_in_transit(self, bridge: str, mac: str) -> dict[str, int]:
        """Frames to `mac` dropped since it was marked, by port; taken once."""
        return await self._kernel.dropped_in_transit(bridge, mac)

    async def announce(self, port: MovingPort) -> None:
        """Tell the VN by broadcast, and the ports of this host."""
        try:
            self._courtesy(port)
        except KernelFailure as error:
            log.warning("announcement of %s not sent: %s", port.mac, error)
