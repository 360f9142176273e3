"""Records in every phase of a cold move, and its whole conversation with NVEs in memory."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec

from overland.mobility import messages as m
from overland.mobility.cold import step
from overland.model.cluster import Vm, VmState, left_at, moved_disks
from overland.model.handover import (
    COLD_LEGAL,
    ENDED,
    Handover,
    Marking,
    Memory,
    Phase,
    has_state,
    is_up,
    marking,
)
from tests.core.moves import NEW, OLD, PEER, VM, planned

ROLES = {OLD: "old", NEW: "new", PEER: "peer"}
SAVED = Memory(total_bytes=9, remaining_bytes=9)
STEPS = 2000


def cold(state: VmState = "running", vm: Vm = VM) -> Handover:
    """A cold move as the authority journals it first; of a VM at rest nobody else has to hear."""
    vm = msgspec.structs.replace(vm, state=state)
    peers = (PEER,) if is_up(vm) else ()
    return msgspec.structs.replace(planned(), mode="cold", vm=vm, peers=peers, ends_as=state)


def has(nve: str, marking: Marking, at_ns: int = 5) -> m.Acknowledged:
    return m.Acknowledged(nve=nve, at_ns=at_ns, marking=marking)


_TO_PHASE: dict[Phase, tuple[m.CoordinatorEvent, ...]] = {
    "planned": (m.Start(),),
    "staged": (m.Prepared(move="m1", nve=NEW, uri="state:x"),),
    "paused": (has(PEER, "others"), has(NEW, "others")),
    "equal": (
        has(OLD, "all"),
        m.Stopped(move="m1", nve=OLD, held_ns=0, stop_ns=20, memory=SAVED),
        m.Received(move="m1", nve=OLD, at_ns=30, state_bytes=9),
    ),
    "committed": (m.Committed(version=2, at_ns=40),),
    "converging": (m.Running(move="m1", nve=NEW, at_ns=50, held=0),),
    "drained": tuple(has(nve, "none", 60) for nve in (OLD, NEW, PEER)),
}
STABLE: tuple[Phase, ...] = (*_TO_PHASE, "aborting", "closed", "aborted")

BY_COLUMN: dict[str, tuple[Phase, int]] = {
    **{phase: (phase, len(events)) for phase, events in _TO_PHASE.items() if phase != "paused"},
    "paused": ("paused", 2),
    "paused, marked": ("equal", 1),
    "paused, saved": ("equal", 2),
}


def in_phase(phase: Phase) -> Handover:
    """The record of a cold move that has come to `phase` the straight way."""
    if phase == "aborting":
        return step(after("equal", 2), m.Abort(why="test"), 0.0, 1)[0]
    if phase in ENDED:
        return msgspec.structs.replace(cold(), phase=phase)
    return after(phase, len(_TO_PHASE[phase]))


def after(phase: Phase, count: int) -> Handover:
    """After the first `count` of the events that lead to `phase` from the one before it."""
    record = cold()
    for target, events in _TO_PHASE.items():
        last = target == phase
        for event in events[: count if last else None]:
            record, _ = step(record, event, 0.0, 1)
        if last:
            return record
    raise AssertionError(f"no straight way to {phase}")


@dataclass
class ColdConversation:
    """One cold move with NVEs that do at once what they are told, and hear pushes in order.

    `fail` names (NVE, order) pairs that fail once. `copies`: where the VM runs; `states`: where its
    saved state is; `images`: where those of its disks are that go along; `kernels`: which marking
    each NVE has.
    """

    record: Handover = field(default_factory=cold)
    fail: set[tuple[str, str]] = field(default_factory=set)
    queue: deque[tuple[str, m.ColdOrder | m.CoordinatorEvent | Marking]] = field(
        default_factory=deque
    )
    transcript: list[str] = field(default_factory=list)
    copies: set[str] = field(default_factory=set)
    states: set[str] = field(default_factory=set)
    images: set[str] = field(default_factory=set)
    kernels: dict[str, Marking] = field(default_factory=dict)
    now_s: float = 0.0

    def __post_init__(self) -> None:
        self.images = {OLD} if moved_disks(self.record.vm) else set()
        if is_up(self.record.vm):
            self.copies = {OLD}
        elif self.record.vm.state == "suspended":
            self.states = {OLD}

    def play(self, *, abort_in: str | None = None, restart_in: str | None = None) -> list[str]:
        """Run to the end; returns the transcript. The NVA is killed and comes back, or aborts."""
        self._hears(m.Start())
        for _ in range(STEPS):
            if self.record.phase in ENDED:
                return self.transcript
            if abort_in == self.record.phase:
                abort_in = None
                self._hears(m.Abort(why="operator"))
            if restart_in == self.record.phase:
                restart_in = None
                self.transcript.append("nva: restarted")
                self.queue = deque(e for e in self.queue if e[0] != "nva")
                self._hears(m.Start())
            if self.queue:
                self._deliver(*self.queue.popleft())
            else:
                self.now_s += 1000.0
                self._hears(m.Tick())
        raise AssertionError(self.transcript)

    def _hears(self, event: m.CoordinatorEvent) -> None:
        before = self.record
        self.record, effects = step(before, event, self.now_s, int(self.now_s * 1e9) + 1)
        assert self.record.phase == before.phase or before.phase in COLD_LEGAL
        if self.record.phase != before.phase:
            self.transcript.append(f"nva: {before.phase} -> {self.record.phase}")
        for effect in effects:
            match effect:
                case m.Ask(nve=nve, order=order):
                    self.transcript.append(f"nva -> {nve}: {type(order).__name__}")
                    self.queue.append((nve, order))
                case m.Commit():
                    self.transcript.append("nva: compare-and-set")
                    self.queue.append(("nva", m.Committed(version=2, at_ns=40)))
                case m.Publish():
                    self._publish(marking(self.record))
                case m.Serve():
                    for nve in sorted(left_at(self.record.vm)):
                        self.transcript.append(f"nva -> {nve}: its images are for {NEW} now")
                        self.queue.append(("nva", m.Served(nve=nve)))

    def _publish(self, now: Marking) -> None:
        self.transcript.append(f"nva -> all: mapping, in transit at {now}")
        if is_up(self.record.vm):
            self.queue.extend((nve, now) for nve in (OLD, NEW, PEER))

    def _deliver(self, to: str, what: m.ColdOrder | m.CoordinatorEvent | Marking) -> None:
        if to == "nva":
            self._hears(what)  # type: ignore[arg-type]
        elif isinstance(what, str):
            self._map(to, what)
        else:
            self._do(to, what)  # type: ignore[arg-type]

    def _map(self, nve: str, now: Marking) -> None:
        if self.kernels.get(nve) != now:
            self.kernels[nve] = now
            self.transcript.append(f"{nve}: kernel has {now}")
            self.queue.append(("nva", m.Acknowledged(nve=nve, at_ns=60, marking=now)))

    def _do(self, nve: str, order: m.ColdOrder) -> None:
        name = type(order).__name__
        if (nve, name) in self.fail:
            self.fail.discard((nve, name))
            self.transcript.append(f"{nve}: {name} fails")
            self._say(m.Failed(move="m1", nve=nve, step=name, why="injected"))
            return
        match order:
            case m.Associate():
                uri = "state:x" if has_state(order.vm) else ""
                disks = "state:y" if self.images else ""
                self._say(m.Prepared(move="m1", nve=nve, uri=uri, disks_uri=disks))
            case m.Suspend():
                self.copies.discard(nve)
                self.states.add(nve)
                assert self.record.vm.state == "suspended" or set(self.kernels.values()) != {"none"}
                stopped = m.Stopped(move="m1", nve=nve, held_ns=0, stop_ns=20, memory=SAVED)
                self._say(stopped)
            case m.GiveState(uri=uri, disks_uri=disks):
                assert not self.copies, "the VM is stopped, and writes no disk"
                self.states |= {NEW} if uri else set()
                self.images |= {NEW} if disks else set()
                self._say(m.Received(move="m1", nve=nve, at_ns=30, state_bytes=9 if uri else 0))
            case m.WakeUp():
                if is_up(order.vm):
                    self.states.discard(nve)
                    self.copies.add(nve)
                self._say(m.Running(move="m1", nve=nve, at_ns=50, held=0))
            case m.Return():
                self.states.discard(nve)
                self.copies.add(nve)
                self._say(m.Restored(move="m1", nve=nve))
            case m.DropCopy():
                self.states.discard(nve)
                self.images.discard(nve)
                self._say(m.GivenBack(move="m1", nve=nve))
            case m.DropState():
                self.states.discard(nve)
                self.images.discard(nve)
                self._say(m.Closed(move="m1", nve=nve))
            case m.Count():
                self._say(m.Closed(move="m1", nve=nve))
        assert len(self.copies) <= 1, "two copies run"

    def _say(self, report: m.AnyReport) -> None:
        self.transcript.append(f"{report.nve} -> nva: {type(report).__name__}")
        self.queue.append(("nva", report))
