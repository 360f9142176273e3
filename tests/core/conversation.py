"""All machines of one move, wired back to back in memory; every effect succeeds unless told.

The transcript is what a reader of a golden file sees: who was told what, and what was done.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec

from overland.mobility import messages as m
from overland.mobility import new_nve, old_nve, peer_nve
from overland.mobility.coordinator import step
from overland.mobility.nve import Part, PartStep
from overland.model.cluster import left_at
from overland.model.handover import ENDED, Handover, Storage, Transfer
from tests.core.moves import CHECKPOINT, NEW, OLD, PEER, PORT, planned

MACHINES = {"old": old_nve, "new": new_nve, "peer": peer_nve}
ROLES = {OLD: "old", NEW: "new", PEER: "peer"}

STEPS = 2000
"""Far more than any move takes: one that needs them hangs."""

Item = tuple[str, m.CoordinatorEvent | m.NveEvent | m.Do]


@dataclass
class Conversation:
    """One move from `Start` to its end. `fail` names (NVE, effect) pairs that fail once."""

    fail: set[tuple[str, str]] = field(default_factory=set)
    record: Handover = field(default_factory=planned)
    parts: dict[str, Part] = field(default_factory=dict)
    queue: deque[Item] = field(default_factory=deque)
    transcript: list[str] = field(default_factory=list)
    running: set[str] = field(default_factory=lambda: {OLD})
    now_s: float = 0.0

    def play(self, *, abort_in: str | None = None) -> list[str]:
        """Run to the end; returns the transcript. `abort_in`: the operator aborts in that phase."""
        self._coordinator(m.Start())
        for _ in range(STEPS):
            if self.record.phase in ENDED:
                break
            if abort_in and self.record.phase == abort_in:
                abort_in = None
                self._coordinator(m.Abort(why="operator"))
            if self.queue:
                self._deliver(*self.queue.popleft())
            else:
                self.now_s += 1000.0
                self._coordinator(m.Tick())
        assert self.record.phase in ENDED, self.transcript
        while self.queue:
            self._deliver(*self.queue.popleft())
        return self.transcript

    def _deliver(self, to: str, item: m.CoordinatorEvent | m.NveEvent | m.Do) -> None:
        if to == "nva":
            self._coordinator(item)  # type: ignore[arg-type]
        elif isinstance(item, m.Do):
            self._perform(to, item)
        else:
            self._nve(to, item)  # type: ignore[arg-type]

    def _coordinator(self, event: m.CoordinatorEvent) -> None:
        before = self.record
        self.record, effects = step(before, event, self.now_s, int(self.now_s * 1e9) + 1)
        if self.record.phase != before.phase:
            self.transcript.append(f"nva: {before.phase} -> {self.record.phase}")
        for effect in effects:
            match effect:
                case m.Tell(nve=nve, order=order):
                    self.transcript.append(f"nva -> {nve}: {type(order).__name__}")
                    self.queue.append((nve, order))
                case m.Serve():
                    for nve in sorted(left_at(self.record.vm)):
                        self.transcript.append(f"nva -> {nve}: its images are for {NEW} now")
                        self.queue.append(("nva", m.Served(nve=nve)))
                case m.Commit():
                    self.transcript.append("nva: compare-and-set")
                    self.queue.append(("nva", m.Committed(version=2, at_ns=40)))
                    for nve in (OLD, NEW, PEER):
                        self.queue.append(("nva", m.Acknowledged(nve=nve, at_ns=60)))

    def _nve(self, nve: str, event: m.NveEvent) -> None:
        if isinstance(event, m.PrepareNew | m.PrepareOld | m.PreparePeer):
            role = ROLES[nve]
            vm = None if isinstance(event, m.PreparePeer) else event.vm
            part = Part(move="m1", nve=nve, role=role, vm=vm, ports=(PORT,))  # type: ignore[arg-type]
            if not isinstance(event, m.PreparePeer):
                part = msgspec.structs.replace(part, options=event.options)
            self._take(nve, MACHINES[role].begin(part))
        elif nve in self.parts:
            part = self.parts[nve]
            taken = MACHINES[part.role].step(part, event)
            if isinstance(event, m.Broken) or (
                isinstance(event, m.GiveBack | m.Restore | m.Close) and taken[0].stage != part.stage
            ):
                kept = [i for i in self.queue if not (i[0] == nve and isinstance(i[1], m.Do))]
                self.queue = deque(kept)
            self._take(nve, taken)
        else:
            self._nothing_here(nve, event)

    def _nothing_here(self, nve: str, event: m.NveEvent) -> None:
        """Answer as an NVE without a part does."""
        answers = {m.GiveBack: m.GivenBack, m.Restore: m.Restored, m.Close: m.Closed}
        for asked, answer in answers.items():
            if isinstance(event, asked):
                self.queue.append(("nva", answer(move="m1", nve=nve)))  # type: ignore[arg-type]

    def _take(self, nve: str, taken: PartStep) -> None:
        self.parts[nve], effects = taken
        for effect in effects:
            if isinstance(effect, m.Say):
                self.transcript.append(f"{nve} -> nva: {type(effect.report).__name__}")
                self.queue.append(("nva", effect.report))
            else:
                self.queue.append((nve, effect))

    def _perform(self, nve: str, effect: m.Do) -> None:
        name = type(effect).__name__
        back = isinstance(effect, m.SteerHere) and effect.back
        if (nve, name) in self.fail:
            self.fail.discard((nve, name))
            self.transcript.append(f"{nve}: {name} fails")
            self._nve(nve, m.Broken(effect=name, why="injected", back=back))
            return
        if isinstance(effect, m.WatchTransfer):
            seen = Transfer(status="active", passes=2, bandwidth_bytes_per_s=1e9)
            self._nve(nve, m.TransferSeen(transfer=seen))
            return
        if isinstance(effect, m.TakeCheckpoint):
            assert nve in self.running
            self.transcript.append(f"{nve}: {name}")
            number = self.parts[nve].checkpoints
            taken = msgspec.structs.replace(CHECKPOINT, at_ns=CHECKPOINT.at_ns + number)
            self._nve(nve, m.CheckpointSeen(checkpoint=taken))
            return
        if isinstance(effect, m.WatchMirror):
            self._nve(nve, m.MirrorSeen(storage=Storage(total_bytes=9, sent_bytes=9, ready=True)))
            return
        if isinstance(effect, m.AwaitCopy) and OLD in self.running:
            if self.parts[nve].stage == "awaiting":
                self.queue.append((nve, effect))
            return
        self.transcript.append(f"{nve}: {name}")
        if isinstance(effect, m.AwaitStop):
            self.running.discard(nve)
        if isinstance(effect, m.ResumeVm):
            self.running.add(nve)
        assert len(self.running) <= 1, "two copies run"
        numbers = {"HoldPorts": 10, "AwaitStop": 20, "AwaitCopy": 30, "ResumeVm": 50}
        done = m.Done(effect=name, number=numbers.get(name, 25), text="tcp:x:1", back=back)
        self._nve(nve, done)
