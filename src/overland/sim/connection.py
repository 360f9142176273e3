"""What the NVA and one NVE say to one another, like TCP: in order, while the connection lives.

What was under way when it dies may or may not have arrived; besides, any message may come twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from overland.mobility import messages as m
from overland.sim.agenda import Args

if TYPE_CHECKING:
    from overland.sim.host import SimHost

NOTICE_S = 4.0
"""A silent connection is given up after that long (wire.server)."""


class Connection:
    """The connection of `host`, up or down; `number` tells one from the next."""

    def __init__(self, host: SimHost) -> None:
        self.up = True
        self.number = 0
        self._host = host
        self._world = host.world
        self._agenda = host.world.agenda
        self._random = host.world.random.random
        self._told_s = self._said_s = 0.0
        self._unsaid: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def tell(self, deliver: Callable[[*Args], None], *args: *Args) -> None:
        """From the NVA to the NVE, unless the connection dies first."""
        if self.up:
            agenda = self._agenda
            due_s = max(self._told_s, agenda.now_s + agenda.short(), self._host.cut_until)
            self._told_s = due_s
            self._send(due_s, self._told, (self.number, deliver, args))

    def say(self, deliver: Callable[[*Args], None], *args: *Args) -> None:
        """From the NVE to the NVA: now, or after the next Hello."""
        if self.up:
            agenda = self._agenda
            due_s = max(self._said_s, agenda.now_s + agenda.short(), self._host.cut_until)
            self._said_s = due_s
            self._send(due_s, self._said, (self.number, self._world.nva.life, deliver, args))
        else:
            self._unsaid.append((deliver, args))

    def _send(self, due_s: float, arrive: Callable[..., None], message: tuple[Any, ...]) -> None:
        agenda = self._agenda
        agenda.at(due_s, arrive, *message)
        duplicate = self._world.plan.duplicate
        if duplicate and self._random() < duplicate:
            agenda.later(due_s - agenda.now_s + agenda.short(), arrive, *message)

    def _told(self, number: int, deliver: Callable[..., None], args: tuple[Any, ...]) -> None:
        if self._host.alive and number == self.number:
            deliver(*args)

    def _said(
        self, number: int, life: int, deliver: Callable[..., None], args: tuple[Any, ...]
    ) -> None:
        nva = self._world.nva
        if nva.alive and life == nva.life and number == self.number:
            deliver(*args)

    def lose(self) -> None:
        if self.up:
            self.up = False
            self.number += 1
            self._world.nva.watch_lease(self._host)
            self._agenda.later(0.05 + self._random(), self._try_again)

    def _try_again(self) -> None:
        if self.up:
            return
        host = self._host
        if not (host.alive and self._world.nva.alive and self._agenda.now_s >= host.cut_until):
            self._agenda.later(0.2 + self._random(), self._try_again)
            return
        self.up = True
        self._world.note(host.name, "connected")
        host.agent.revisions.connected()
        self._world.nva.hello(host)
        unsaid, self._unsaid = self._unsaid, []
        for deliver, args in unsaid:
            self.say(deliver, *args)
        if host.part is not None:
            host.event(m.Reconnected())

    def forget(self) -> None:
        """What was still to be said is gone with the daemon."""
        self._unsaid.clear()
