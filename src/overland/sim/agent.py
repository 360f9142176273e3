"""What a simulated NVE makes of pushes: the turns of daemon/nve.py and the rounds of nve/agent.py.

Built of the agent's pure functions (`Revisions`, `render`, `settle`, `delta`), not of its class.
What counts is what a handover does between the agent's look at the kernel and its writes; the class
over a kernel in memory would do both at one instant. And what follows from the same intent and the
same kernel is the same: it is worked out once for all seeds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from overland.model.nve import KernelState, NveIntent, Op, VnIntent, changed
from overland.nva.pushes import Update, Whole
from overland.nve.delta import delta
from overland.nve.moving import Moving, settle
from overland.nve.render import render
from overland.nve.revisions import Revisions
from overland.sim.domain import NETWORK, PORT, T
from overland.sim.kernel import KEPT, Failures, FakeKernel

if TYPE_CHECKING:
    from overland.sim.host import SimHost

TURN_LIMIT_S = 5.0
Done = Callable[[Failures], None]

rendered = lru_cache(KEPT)(render)


@lru_cache(KEPT)
def intent_of(vns: tuple[VnIntent, ...]) -> NveIntent:
    """The same object for the same VNs: to find what follows from it costs next to nothing then."""
    return NveIntent(vns=vns)


@lru_cache(KEPT)
def compared(
    intent: NveIntent, actual: KernelState, moving: frozenset[Moving]
) -> tuple[frozenset[str], tuple[Op, ...]]:
    """The links that should be, and what is to be done for `intent` in a kernel that is so."""
    desired = settle(rendered(intent), actual, intent, moving)
    return frozenset(link.name for link in desired.links), delta(desired, actual)


class SimAgent:
    """One daemon's life: intent and revisions go with it, the kernel stays."""

    def __init__(self, host: SimHost, kernel: FakeKernel, moving: frozenset[Moving]) -> None:
        self.revisions = Revisions()
        self.intent: NveIntent | None = None
        self._host = host
        self._kernel = kernel
        self._moving = moving
        self._vns: dict[str, VnIntent] = {}
        self._turns: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._at_work = False
        self.waits: Callable[[], None] | None = None
        self._rounds: deque[Done] = deque()
        self._looking = False
        self._links: frozenset[str] = frozenset()

    # ------------------------------------------------------------ turns

    def pushed(self, push: Whole | Update) -> None:
        self.revisions.heard(NETWORK, push.revision)
        self.in_turn(self._take, push)

    def in_turn(self, work: Callable[[T], None], message: T) -> None:
        """What stands on one another is done in order: a prepare order waits for pushes (HO-22)."""
        self._turns.append((work, message))
        self._next()

    def _next(self) -> None:
        while self._turns and not self._at_work:
            work, message = self._turns.popleft()
            work(message)

    def _take(self, push: Whole | Update) -> None:
        base = push.base if isinstance(push, Update) else None
        judgement = self.revisions.judge(NETWORK, push.revision, base)
        if judgement == "ask":
            self._host.ask_for_whole()
        if judgement == "take":
            self._at_work = True
            vn = (
                push.intent if isinstance(push, Whole) else changed(self._vns[NETWORK], push.change)
            )
            if vn is None:
                self._vns.pop(NETWORK, None)
            else:
                self._vns[NETWORK] = vn
            self._want(push, self._host.agenda.now_s + TURN_LIMIT_S)

    def _want(self, push: Whole | Update, limit_s: float) -> None:
        """Apply it once no part of a peer is behind it (HO-28), then acknowledge (HO-12)."""
        if self._host.turns_first(self._vns.values()) and self._host.agenda.now_s < limit_s:
            self.waits = lambda: self._want(push, limit_s)
            self._host.while_it_lives(TURN_LIMIT_S, self.part_changed)
            return
        self.intent = intent_of(tuple(self._vns.values()))
        self.reconcile(lambda failures: self._applied(push, failures))

    def part_changed(self) -> None:
        """The handover has gone on: a push may have waited for that."""
        again, self.waits = self.waits, None
        if again is not None:
            again()

    def _applied(self, push: Whole | Update, failures: Failures) -> None:
        self.revisions.applied(NETWORK, push.revision, held=NETWORK in self._vns)
        self._host.acknowledge(push, failures)
        self._at_work = False
        self._next()

    # ------------------------------------------------------------ rounds

    def reconcile(self, done: Done = lambda _: None) -> None:
        """One round: look, compare, apply; one round at a time."""
        self._rounds.append(done)
        if not self._looking:
            self._look()

    def _look(self) -> None:
        self._looking = True
        host = self._host
        host.while_it_lives(host.agenda.short(), self._compare, self._kernel.state)

    def _compare(self, seen: KernelState) -> None:
        if self.intent is None:
            self._end(())
            return
        self._links, ops = compared(self.intent, seen, self._moving)
        if ops:
            self._host.while_it_lives(0.0005, self._write, ops)
        else:
            self._end(())

    def _write(self, ops: tuple[Op, ...]) -> None:
        self._end(self._host.apply(ops))

    def _end(self, failures: Failures) -> None:
        self._looking = False
        if failures:
            self._links -= {getattr(failure.op.fact, "name", "") for failure in failures}
        done = self._rounds.popleft()
        if self._rounds:
            self._look()
        done(failures)

    # ------------------------------------------------------------ what handovers need

    def moving(self, entries: frozenset[Moving]) -> None:
        """Leave these to the handover from now on; look again when there are fewer."""
        fewer = bool(self._moving - entries)
        self._moving = entries
        if fewer:
            self.reconcile()

    def ready(self) -> bool:
        """Tell whether the VM's port is in the kernel, to stay there."""
        return self._kernel.forwarding.has_port if self.intent is None else PORT in self._links

    def founded(self, vn: VnIntent, revision: int) -> None:
        """All this was pushed, applied and acknowledged long ago."""
        self._vns[NETWORK] = vn
        self.intent = intent_of((vn,))
        self._links, ops = compared(self.intent, self._kernel.state, self._moving)
        self._kernel.apply(ops)
        self.revisions.heard(NETWORK, revision)
        self.revisions.applied(NETWORK, revision, held=True)
