"""A domain in one process on a seeded clock: an NVA, four hosts, what connects them, and faults.

The coordinator, the NVE machines and the authority over its store (in memory) are the real ones;
wires, kernels and hypervisors are values.
"""

from __future__ import annotations

import random
from collections import deque

from overland.model.cluster import VmState
from overland.model.handover import Handover
from overland.sim.agenda import Agenda
from overland.sim.domain import NAMES
from overland.sim.faults import Faults, Plan
from overland.sim.host import SimHost
from overland.sim.invariants import Copies, check_frames, verdict
from overland.sim.nva import SimNva
from overland.sim.underlay import Underlay

QUIET_S = 120.0
"""After the last fault: long enough for every deadline of a move to pass twice."""


class World:
    """One seed's world. `run` moves the VM once; `trace` is kept only when asked for."""

    def __init__(self, seed: int, *, trace: bool = False) -> None:
        self.random = random.Random(seed)
        self.agenda = Agenda(self.random)
        self.trace: list[tuple[float, str, str]] | None = [] if trace else None
        self.plan = Plan()
        self.old, self.new = "h1", "h2"
        self.copies = Copies()
        self.underlay = Underlay(self)
        self.hosts = {name: SimHost(self, name) for name in NAMES}
        self.nva = SimNva(self)
        self.faults = Faults(self)
        self.hosts["h1"].copy = "running"
        self._moves = 0

    def note(self, who: str, *words: object) -> None:
        """One line of the trace."""
        if self.trace is not None:
            self.trace.append((self.agenda.now_s, who, " ".join(map(str, words))))

    def run(self, plan: Plan) -> Handover:
        """Move the VM to another host under `plan`; Violation when something does not hold."""
        self._begin(plan)
        end_s = self.agenda.now_s + QUIET_S + plan.last_s
        copies, nva = self.copies, self.nva
        for _ in self.agenda.until(end_s):
            if copies.touched:
                copies.check()
            if nva.record is None and not self._faults_to_come():
                break
        for _ in self.agenda.until(end_s):  # what is still under way comes to its end
            if copies.touched:
                copies.check()
        record = verdict(self, self.nva.move)
        self._tidy()
        check_frames(self)
        return record

    def _begin(self, plan: Plan) -> None:
        self.plan = plan
        self.faults.killed.clear()
        self.old = self.nva.vm_host
        self.new = self.random.choice([name for name in NAMES if name != self.old])
        self._moves += 1
        if plan.cold is not None:
            self._bring_to(plan.cold)
        self.nva.begin(f"m{self._moves}", self.new, plan.checkpoints, cold=plan.cold is not None)
        for at_s, kind, who, seconds in plan.faults:
            self.agenda.later(at_s, self.faults.strike, kind, who, seconds)
        self.underlay.stream(plan.frames)
        for host in self.hosts.values():
            self.agenda.later(0.1 * self.random.random(), host.look)

    def _bring_to(self, state: VmState) -> None:
        """The running VM is paused, suspended or shut down, long before the move."""
        host = self.hosts[self.old]
        if state == "suspended":
            host.hypervisor.saved = self.copies.instant
        if state != "running":
            host.hypervisor.memory = self.copies.instant
            host.copy = "paused" if state == "paused" else "none"
        self.nva.bring_to(state)

    def _faults_to_come(self) -> bool:
        now_s = self.agenda.now_s
        return now_s < self.plan.last_s or any(
            not (host.alive and host.connection.up) or now_s < host.cut_until
            for host in self.hosts.values()
        )

    def _tidy(self) -> None:
        """After a move the VM runs, and its owner starts it anew where it does not."""
        for host in self.hosts.values():
            host.checkpoint = False  # nobody needs it any more: the VM is back
            host.hypervisor.saved = None
        vm = self.hosts[self.nva.vm_host]
        if vm.copy != "running":
            vm.copy = "running"
            self.nva.bring_to("running")
            for host in self.hosts.values():
                host.ring = deque()

    def dismantle(self) -> None:
        """Open the circles by which its parts hold one another: its memory is free at once."""
        for part in (*self.hosts.values(), self.nva, self):
            vars(part).clear()
