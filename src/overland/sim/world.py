"""A domain in one process on a seeded clock: NVA, hosts, wires, faults, and what must always hold.

The coordinator, the NVE machines and the authority over its store (in memory) are the real ones;
wires, kernels and hypervisors are values. Wires behave like TCP: in order while a connection lives,
and what was under way when it dies may or may not have arrived; besides, any message may come
twice.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from overland.mobility import cold, coordinator
from overland.mobility import messages as m
from overland.model.cluster import VmState
from overland.model.handover import ENDED, Handover, Options, committed, marking
from overland.model.nve import NveIntent
from overland.model.ticket import ticket_of
from overland.nva.authority import Authority
from overland.nva.cluster import AT_REST
from overland.nva.handovers import (
    RETRY_S,
    Effects,
    Step,
    begins_to_close,
    drop_kept,
    farewells,
    last_orders,
    marked_at,
    state_since,
    turn_back,
)
from overland.nva.pushes import Update, Whole
from overland.nve.cold import may_be_last
from overland.ports import Conflict, StoreFailure
from overland.sim.agent import rendered
from overland.sim.cold import has_vm
from overland.sim.domain import NAMES, VM, at_once, founded, host_at, host_record
from overland.sim.former import FormerAddresses
from overland.sim.host import Frame, SimHost
from overland.sim.kernel import Failures, difference
from overland.sim.subscribers import Subscribers
from overland.sim.violation import Violation
from overland.store.memory import MemoryStore

LEASE_S = 3.0
MEMBERS_DELAY_S = 0.1
TICK_S = 0.25
NOTICE_S = 4.0
"""A silent connection is given up after that long (wire.server)."""

QUIET_S = 120.0
"""After the last fault: long enough for every deadline of a move to pass twice."""


@dataclass
class Plan:
    """What happens to this seed: faults as (at_s, kind, who, how long)."""

    faults: tuple[tuple[float, str, str, float], ...] = ()
    frames: int = 12
    duplicate: float = 0.0
    checkpoints: int = 0
    cold: VmState | None = None
    """What a VM that moves cold does before; None: it moves hot, or warm with checkpoints."""
    keep_s: float | None = None
    """How long the old address is kept after a move that changes it; None: it stays."""

    @property
    def undisturbed(self) -> bool:
        """Nothing fails; at most the operator changes his mind."""
        return all(kind == "abort" for _, kind, _, _ in self.faults)

    @property
    def lossless(self) -> bool:
        """Tell whether the packet contract holds without exception."""
        return self.undisturbed and self.cold is None


@dataclass
class Books:
    """What became of the frames of one move."""

    sent: int = 0
    delivered: set[Frame] = field(default_factory=set)
    newest: dict[str, int] = field(default_factory=dict)
    lost: list[tuple[Frame, str]] = field(default_factory=list)


class World:
    """One seed's world. `run` moves the VM once; `trace` is kept only when asked for."""

    def __init__(self, seed: int, *, trace: bool = False) -> None:
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.instant = 0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._running: set[str] = set()
        self.hosts = {name: SimHost(self, name) for name in NAMES}
        self._store = MemoryStore()
        at_once(self._store.commit([], founded()))
        self.store_full = False
        self._load(1)
        self.subscribers.found()
        self.hosts["h1"].copy = "running"
        self.old, self.new = "h1", "h2"
        self.record: Handover | None = None
        self._unwritten = False
        self._events: list[m.CoordinatorEvent] = []
        self.nva_alive = True
        self.nva_life = 0
        self.published = 0
        self.trace: list[tuple[float, str, str]] | None = [] if trace else None
        self.books = Books()
        self.plan = Plan()
        self._arrivals: dict[tuple[str, str], float] = {}
        self._wires: dict[tuple[str, str], float] = {}
        self._markers: dict[int, Callable[[SimHost], None]] = {}
        self._moves = self._frames = 0
        self._killed: set[str] = set()
        self.former = FormerAddresses(self)

    # ------------------------------------------------------------ clock

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        self._at(self.now_s + seconds, work)

    def _at(self, at_s: float, work: Callable[[], None]) -> None:
        """What is due at the same instant is done in the order in which it was asked for."""
        self._count += 1
        heapq.heappush(self._agenda, (at_s, self._count, work))

    def short(self) -> float:
        """A step's duration: mostly a millisecond, now and then far more."""
        r = self.random.random()
        return 0.0005 + 0.002 * r if r < 0.97 else r * 0.3

    def note(self, who: str, what: str) -> None:
        if self.trace is not None:
            self.trace.append((self.now_s, who, what))

    # ------------------------------------------------------------ one move

    def run(self, plan: Plan) -> Handover:
        """Move the VM to another host under `plan`; Violation when something does not hold."""
        self.plan = plan
        self.books = Books()
        self._killed.clear()
        self.old = self.vm_host
        self.new = self.random.choice([name for name in NAMES if name != self.old])
        self._moves += 1
        if plan.cold is not None:
            self._bring_to(plan.cold)
        self.record = self._begun()
        self._step(m.Start())
        self._tick(self.nva_life)
        for at_s, kind, who, seconds in plan.faults:
            self.later(at_s, lambda k=kind, w=who, s=seconds: self._fault(k, w, s))  # type: ignore[misc]
        self._stream()
        for host in self.hosts.values():
            self.later(0.1 * self.random.random(), host.look)
        end_s = self.now_s + QUIET_S + max((f[0] + f[3] for f in plan.faults), default=0.0)
        while self._something_before(end_s):
            self.now_s, _, work = heapq.heappop(self._agenda)
            work()
            self._check()
            if not self.record and not self._faults_to_come():
                self._drain(end_s)
                break
        return self._verdict()

    def _something_before(self, end_s: float) -> bool:
        """What is due later stays for another move."""
        return bool(self._agenda) and self._agenda[0][0] < end_s

    def _faults_to_come(self) -> bool:
        return any(not host.alive or self._is_away(host) for host in self.hosts.values()) or bool(
            self.plan.faults and self.now_s < max(f[0] + f[3] for f in self.plan.faults)
        )

    def _drain(self, end_s: float) -> None:
        """What is still under way comes to its end."""
        while self._something_before(end_s):
            self.now_s, _, work = heapq.heappop(self._agenda)
            work()
            self._check()

    def _begun(self) -> Handover:
        """As an operator's wish does it: all hosts are there, and the VM must be free."""
        for name in NAMES:
            self.authority.host_seen(host_record(name))
        options = Options(checkpoints=self.plan.checkpoints, addresses=self.former.wish())
        cold = self.plan.cold is not None
        move = f"m{self._moves}"
        return at_once(self.authority.begin_move(move, VM, self.new, options, cold=cold))

    def _bring_to(self, state: VmState) -> None:
        """The running VM is paused, suspended or shut down, long before the move."""
        host = self.hosts[self.old]
        if state == "suspended":
            host.hypervisor.saved = self.instant
        if state != "running":
            host.hypervisor.memory = self.instant
            host.copy = "paused" if state == "paused" else "none"
        at_once(self.authority.vm_state(VM, state))

    def _load(self, revision: int) -> None:
        """The NVA starts: it knows what its store has."""
        self.authority = Authority(self._store, lambda _: self.subscribers.changed())
        at_once(self.authority.load())
        hosts = list(self.hosts.values())
        self.subscribers = Subscribers(self.authority, hosts, self._push, revision)
        self._look()

    def _look(self) -> None:
        """Where the VM is, as the store has it."""
        vm = self.authority.vm(VM)
        self.vm_host, self.version = vm.host, vm.version

    # ------------------------------------------------------------ the NVA (nva/handovers.py)

    def _step(self, event: m.CoordinatorEvent) -> None:
        if self.record is None or not self.nva_alive:
            return
        if self._unwritten:
            self._events.append(event)
            return
        before = self.record
        after, effects = self._decided(before, event)
        commits = any(isinstance(effect, m.Commit) for effect in effects)
        if not commits and (effects or after.phase != before.phase):
            after, effects = self._journalled(before, after, effects)
        if self._unwritten:
            return
        self._written_down(after, effects)
        if commits:
            self._commit()

    def _decided(self, before: Handover, event: m.CoordinatorEvent) -> Step:
        step = cold.step if before.mode == "cold" else coordinator.step
        return step(before, event, self.now_s, self.clock_ns())

    def _written_down(self, after: Handover, effects: Effects) -> None:
        """The record is `after` now: its effects may be seen."""
        assert self.record is not None
        if after.phase != self.record.phase:
            self.note("nva", f"{self.record.phase} -> {after.phase}")
            self.former.check(after)
        self.record = after
        self._perform(effects)
        if after.mode != "cold" and committed(after.phase) and self.published < self.version:
            self._publish()
        if after.phase in ENDED:
            self.record = None
            self.former.begun(after)
            for nve, order in farewells(after, self.authority.vm(VM)):
                self._tell(nve, order)
            if self.plan.cold is not None and self.authority.vm(VM).state != "shutdown":
                host = self.hosts[self.vm_host]
                self._wire(host, "down", lambda: self._say(host, lambda: self._saw(host)))

    def _perform(self, effects: Effects) -> None:
        assert self.record is not None
        for effect in effects:
            if isinstance(effect, m.Tell | m.Ask):
                self._tell(effect.nve, effect.order)
            elif isinstance(effect, m.Publish):
                self.authority.publish(self.record)

    def _journalled(self, before: Handover, after: Handover, effects: Effects) -> Step:
        """As nva/handovers.py does it, the last record later if there is no room for it now."""
        try:
            self._written(lambda: at_once(self.authority.journal(after)))
        except StoreFailure as failure:
            decided = committed(after.phase) or after.phase == "aborting"
            marked = decided and marking(after) != marking(before)
            if after.phase in ENDED or marked or begins_to_close(before, after):
                self._unwritten = True
                life = self.nva_life
                self.later(RETRY_S, lambda: self._write_again(after, effects, life))
            elif not decided:
                return self._decided(before, m.Abort(why=str(failure)))
        return after, effects

    def _write_again(self, after: Handover, effects: Effects, life: int) -> None:
        if not (self.nva_alive and life == self.nva_life and self.record is not None):
            return
        self._unwritten = False
        self._journalled(self.record, after, effects)
        if not self._unwritten:
            self._written_down(after, effects)
            events, self._events = self._events, []
            for event in events:
                self._step(event)

    def _written(self, write: Callable[[], None]) -> None:
        if self.store_full:
            self.note("nva", "the disk is full")
            raise StoreFailure("the disk is full")
        write()

    def clock_ns(self) -> int:
        return int(self.now_s * 1e9) + 1

    def _commit(self) -> None:
        assert self.record is not None
        won = m.Committed(version=self.record.version + 1, at_ns=self.clock_ns())
        after, effects = self._decided(self.record, won)
        try:
            self._written(lambda: at_once(self.authority.commit(after)))
        except (Conflict, StoreFailure) as failure:
            self._step(m.CommitRefused(why=str(failure)))
            return
        self.note("nva", f"{self.record.phase} -> {after.phase}")
        self.record = after
        self._look()
        self._perform(effects)

    def _publish(self) -> None:
        assert self.record is not None
        self.published = self.version
        self.authority.publish(self.record)

    def _push(self, host: SimHost, push: Whole | Update) -> None:
        self.note("nva", f"{type(push).__name__} {push.revision} to {host.name}")
        self._wire(host, "down", lambda: host.agent.heard(push))

    def acknowledge(self, host: SimHost, push: Whole | Update, failures: Failures) -> None:
        """NVE `host` has `push` in its kernel, but for the failures."""
        self.note(
            host.name, f"has {push.revision}{' but for ' if failures else ''}{failures or ''}"
        )
        self._say(host, lambda: self._acknowledged(host, push, failures))

    def _acknowledged(self, host: SimHost, push: Whole | Update, failures: Failures) -> None:
        self.subscribers.acknowledged(host, push, failures)
        record = self.record
        if record is not None and record.mode == "cold":
            self._in_kernel(host, record)
            return
        version = 0 if failures else push.versions.get(VM, 0)
        if record is not None and record.commit_ns and version >= record.version:
            self._step(m.Acknowledged(nve=host.name, at_ns=1))

    def _in_kernel(self, host: SimHost, record: Handover) -> None:
        marking = marked_at(record, lambda _: self.subscribers.in_kernel(host), lambda _: True)
        if marking is not None:
            self._step(m.Acknowledged(nve=host.name, at_ns=1, marking=marking))

    def resync(self, host: SimHost) -> None:
        """NVE `host` was told what does not go with what it has."""
        self.note(host.name, "asks for the whole")
        self._say(host, lambda: self.subscribers.asked(host))

    def _tick(self, life: int) -> None:
        if self.nva_alive and life == self.nva_life and self.record is not None:
            self._step(m.Tick())
            left_s = self.record.deadline_s - self.now_s if self.record is not None else TICK_S
            wait_s = left_s if 0 < left_s < TICK_S else TICK_S
            self.later(wait_s + 1e-6, lambda: self._tick(life))

    # ------------------------------------------------------------ wires

    def _tell(self, nve: str, order: m.AnyOrder | m.ColdOrder) -> None:
        host = self.hosts[nve]
        if isinstance(order, m.WakeUp | m.DropState):
            record = self.record or self.authority.ended_moves[order.move]
            ticket: Any = ticket_of(record, order.version, self.clock_ns())
            order = msgspec.structs.replace(order, seal=ticket)  # this domain forges nothing
        self.note("nva", f"{type(order).__name__} to {nve}")
        self._wire(host, "down", lambda: host.order(order))

    def report(self, host: SimHost, report: m.AnyReport) -> None:
        self.note(host.name, f"says {type(report).__name__}")
        self._say(host, lambda: self._heard(host, report))

    def _say(self, host: SimHost, deliver: Callable[[], None]) -> None:
        """Now, or after the next Hello."""
        if host.connected:
            self._wire(host, "up", deliver)
        else:
            host.unsent.append(deliver)

    def _heard(self, host: SimHost, report: m.AnyReport) -> None:
        if self.record is not None and report.move == self.record.id:
            self._step(report)
            return
        ended = self.authority.ended_moves.get(report.move)
        if ended is None:
            return
        if ended.mode == "cold":
            self._straggled(host, ended, report)
        elif not isinstance(report, m.Closed | m.Failed | m.Progress):
            self._tell(host.name, coordinator.close_order(ended, host.name))

    def _straggled(self, host: SimHost, record: Handover, report: m.AnyReport) -> None:
        state = state_since(record, self.authority.vm(VM), host.name, report)
        if isinstance(report, m.Restored) and host.name == record.old_nve:
            with suppress(StoreFailure):
                self._written(lambda: at_once(self.authority.turned_back(record.id)))
        if state is not None:
            self._vm_state(state)

    def _wire(self, host: SimHost, way: str, deliver: Callable[[], None]) -> None:
        """Deliver in order, unless the connection dies first."""
        if not host.connected:
            return
        link, life = host.link, self.nva_life
        due_s = max(self._wires.get((host.name, way), 0.0), self.now_s + self.short())
        due_s = max(due_s, host.cut_until)
        self._wires[host.name, way] = due_s

        def arrive() -> None:
            alive = host.alive if way == "down" else self.nva_alive and life == self.nva_life
            if alive and link == host.link:
                deliver()

        self._at(due_s, arrive)
        if self.plan.duplicate and self.random.random() < self.plan.duplicate:
            self.later(due_s - self.now_s + self.short(), arrive)

    def _disconnect(self, host: SimHost) -> None:
        if not host.connected:
            return
        host.connected = False
        host.link += 1
        self._watch_lease(host)
        self.later(0.05 + self.random.random(), lambda: self._reconnect(host))

    def _watch_lease(self, host: SimHost) -> None:
        link, life = host.link, self.nva_life
        self.later(LEASE_S, lambda: self._lease_ended(host, link, life))

    def _lease_ended(self, host: SimHost, link: int, life: int) -> None:
        if host.connected or host.link != link or life != self.nva_life:
            return
        dead = self.random.random() < 0.5
        self.note("nva", f"{host.name} is {'dead' if dead else 'away'}")
        self.authority.host_changed(host.name, ready=False, dead=dead)
        self._keep(host)
        self._step(m.Lost(nve=host.name, dead=dead))
        if dead:
            self.subscribers.changed()

    def _keep(self, host: SimHost) -> None:
        with suppress(StoreFailure):
            self._written(lambda: at_once(self.authority.keep_host(host.name)))

    def _tell_members(self, life: int) -> None:
        if self.nva_alive and life == self.nva_life:
            self.subscribers.changed()

    def _reconnect(self, host: SimHost) -> None:
        if host.connected:
            return
        if not (host.alive and self.nva_alive and self.now_s >= host.cut_until):
            self.later(0.2 + self.random.random(), lambda: self._reconnect(host))
            return
        host.connected = True
        self.note(host.name, "connected")
        host.agent.revisions.connected()
        if self.authority.host_seen(host_record(host.name)):
            life = self.nva_life
            self.later(MEMBERS_DELAY_S, lambda: self._tell_members(life))
        self._keep(host)
        self.subscribers.connected(host, dict(host.agent.revisions.newest))
        moves = [host.part.move] if host.part is not None else []
        moves += host.hypervisor.moves()
        self._step(m.Back(nve=host.name))
        self._settle(host, moves)
        unsent, host.unsent = host.unsent, []
        for deliver in unsent:
            self._say(host, deliver)
        if host.part is not None:
            host.event(m.Reconnected())

    def _settle(self, host: SimHost, moves: list[str]) -> None:
        """What has ended meanwhile, and what it has that is not the VM (daemon/nva.py)."""
        vm = self.authority.vm(VM)
        for move in moves:
            ended = self.authority.ended_moves.get(move)
            for order in last_orders(ended, host.name, vm) if ended is not None else ():
                self._tell(host.name, order)
        if self.plan.cold is None or vm.move is not None or moves:
            return
        if vm.host != host.name and has_vm(host):
            last = may_be_last(vm, host.name)
            self._wire(host, "down", lambda: host.cold.stop_stale(vm, may_be_last=last))
        elif vm.host == host.name and (vm.state not in AT_REST or has_vm(host)):
            self._vm_state(host.seen())
        for record in self.authority.to_turn_back(host.name):
            self._tell(host.name, turn_back(record))

    def in_this_life(self, work: Callable[[], None]) -> Callable[[], None]:
        life = self.nva_life

        def due() -> None:
            if self.nva_alive and life == self.nva_life:
                work()

        return due

    def _vm_state(self, state: VmState) -> None:
        """Written as soon as the store takes it."""
        if self.store_full:
            self.later(RETRY_S, self.in_this_life(lambda: self._vm_state(state)))
            return
        at_once(self.authority.vm_state(VM, state))
        alive = self.authority.is_alive(VM, state)
        point = at_once(self.authority.no_recovery(VM)) if alive else None
        if point is not None and point.mode == "cold":
            self._tell(point.old_nve, drop_kept(point))

    def crashed(self, host: SimHost) -> None:
        """Its hypervisor says that the VM's process has ended (daemon/nve.py, `_watch`)."""
        if self.plan.cold is not None:
            self._say(host, lambda: self._heard_of_crash(host))

    def _heard_of_crash(self, host: SimHost) -> None:
        if self.authority.vm(VM).host == host.name:
            self._vm_state("crashed")

    def _saw(self, host: SimHost) -> None:
        if self.authority.vm(VM).host == host.name and not host.hypervisor.wakes:
            self._vm_state(host.seen())

    def _is_away(self, host: SimHost) -> bool:
        return not host.connected or self.now_s < host.cut_until

    def is_cut(self, one: SimHost, other: SimHost) -> bool:
        return self.now_s < one.cut_until or self.now_s < other.cut_until

    # ------------------------------------------------------------ faults

    def _fault(self, kind: str, who: str, seconds: float) -> None:
        if self.record is None and kind != "abort":
            return
        roles = {"old": self.old, "new": self.new}
        peers = [name for name in NAMES if name not in roles.values()]
        host = self.hosts[roles.get(who, peers[0])]
        self.note("fault", f"{kind} {who} {seconds:.2f}")
        match kind:
            case "abort":
                self._step(m.Abort(why="operator"))
            case "nva" if self.nva_alive:
                self.nva_alive = False
                for each in self.hosts.values():
                    self._disconnect(each)
                self.nva_life += 1
                self.later(seconds, self._nva_restart)
            case "daemon" if host.alive:
                host.crash()
                self._disconnect(host)
                self.later(seconds, host.restart)
            case "copy":
                if host.copy != "none":
                    self._killed.add(host.name)
                host.kill_copy()
            case "store":
                self.store_full = True
                self.later(seconds, self._store_freed)
            case "disk":
                host.disk_full = True
                self.later(seconds, host.disk_freed)
            case "cut":
                host.cut_until = max(host.cut_until, self.now_s + seconds)
                self.later(NOTICE_S, lambda: self._notice(host))
            case _:
                pass

    def _store_freed(self) -> None:
        self.store_full = False

    def _notice(self, host: SimHost) -> None:
        if self.now_s < host.cut_until:
            self._disconnect(host)

    def _nva_restart(self) -> None:
        self.nva_alive, self._unwritten = True, False
        self._events.clear()
        # Its clock may have been set back meanwhile.
        self._load(self.random.choice((1, self.clock_ns())))
        for host in self.hosts.values():
            self._watch_lease(host)
        self.record = self.authority.cluster.moves.get(f"m{self._moves}")
        self.published = self.version if self.record is None else 0
        self._step(m.Start())
        self._tick(self.nva_life)
        self.former.look()

    # ------------------------------------------------------------ memory

    def arrive(self, old: SimHost) -> None:
        """The rest of memory reaches the new host, once the way is free."""
        new = self.hosts[self.new]
        if old.copy != "sent" or new.copy != "incoming":
            return
        if self.is_cut(old, new):
            self.later(0.1, lambda: self.arrive(old))
        else:
            new.copy = "whole"

    def mirrored(self, new: SimHost) -> None:
        """A checkpoint is whole on the new host; never once its move has ended (R-11)."""
        if self.record is None:
            raise Violation("a checkpoint was taken after the end of its move")
        new.checkpoint = True

    # ------------------------------------------------------------ frames

    def _stream(self) -> None:
        senders = [name for name in NAMES if name not in (self.old, self.new)]
        for number in range(self.plan.frames):
            sender = self.hosts[senders[number % len(senders)]]
            at_s = 0.002 * number + 0.1 * self.random.random() * (number % 3)
            self.later(at_s, lambda s=sender: self._say_next(s))  # type: ignore[misc]

    def _say_next(self, sender: SimHost) -> None:
        self.books.sent += 1
        self._frames += 1
        sender.send((sender.name, self._frames))

    def _travel(self, one: str, other: str, deliver: Callable[[], None]) -> None:
        """Between two hosts, in order."""
        due_s = max(self._arrivals.get((one, other), 0.0), self.now_s + 0.0001)
        due_s += 0.0002 * self.random.random()
        self._arrivals[one, other] = due_s
        self._at(due_s, deliver)

    def launch(self, sender: SimHost, address: str, frame: Frame) -> None:
        host = self.hosts[host_at(address)]
        if self.is_cut(sender, host):
            self.lost(frame, "cut")
        else:
            self._travel(sender.name, host.name, lambda: host.arrived(frame))

    def tunnel(self, host: SimHost, frame: Frame) -> None:
        other = self.hosts[self.new if host.name == self.old else self.old]
        if self.is_cut(host, other):
            self.lost(frame, "cut")
        else:
            home = other.name == self.old
            self._travel(host.name, other.name, lambda: other.from_tunnel(frame, home=home))

    def marker(self, sender: SimHost, seen: Callable[[], None]) -> int:
        self._count += 1
        number = self._count
        self._markers[number] = lambda host: self._travel(host.name, sender.name, seen)
        return number

    def awaits(self, number: int) -> bool:
        """Tell whether marker `number` has not been seen yet."""
        return number in self._markers

    def marker_seen(self, number: int, host: SimHost) -> None:
        answer = self._markers.pop(number, None)
        if answer is not None:
            answer(host)

    def forget_marker(self, number: int) -> bool:
        return self._markers.pop(number, None) is not None

    def dropped(self, frame: Frame, host: SimHost, *, late: bool) -> None:
        """A frame for an address in transit; at the old NVE none may come that late (R-33)."""
        self.lost(frame, "in transit")
        if late and host.name == self.old and not self.plan.faults:
            raise Violation(f"frame {frame} came to the old NVE although all others drop")

    def lost(self, frame: Frame, why: str) -> None:
        if frame[0] != "marker":
            self.note("network", f"{frame} lost: {why}")
            self.books.lost.append((frame, why))

    def delivered(self, frame: Frame) -> None:
        if frame in self.books.delivered:
            raise Violation(f"frame {frame} was delivered twice")
        self.books.delivered.add(frame)
        if frame[1] < self.books.newest.get(frame[0], -1) and self.plan.lossless:
            raise Violation(f"frame {frame} was overtaken")
        self.books.newest[frame[0]] = max(frame[1], self.books.newest.get(frame[0], -1))

    # ------------------------------------------------------------ what must hold

    def _check(self) -> None:
        """After every step: at most one copy runs, and only where the record says."""
        running = self._running
        if len(running) > 1:
            raise Violation(f"two copies run: {sorted(running)}")
        if running and self.vm_host not in running:
            raise Violation(f"a copy runs on {running}, the record says {self.vm_host}")

    def copy_changed(self, host: str, *, runs: bool) -> None:
        """Where copies run, for the check after every step."""
        if runs and host not in self._running:
            self.instant += 1
        (self._running.add if runs else self._running.discard)(host)

    def runs_on(self, host: str, memory: int) -> None:
        """A copy is about to run on `host` from a state: the newest, or time goes back."""
        if memory != self.instant:
            raise Violation(f"{host} runs on from state {memory}, the VM was at {self.instant}")

    def _verdict(self) -> Handover:
        """At the end: the move has ended, the VM runs once, nothing of the move is left."""
        if self.record is not None:
            raise Violation(f"the move did not end: it is {self.record.phase}")
        record = self.authority.ended_moves[f"m{self._moves}"]
        vm = self.hosts[self.vm_host]
        if not self._is_as_it_must(vm, record) and vm.name not in self._killed:
            # With its process the VM is gone: its own end, not the move's (6-11).
            raise Violation(f"the VM is not as it must be on {vm.name}: {vm.copy}")
        for host in self.hosts.values():
            if host.part is not None or host.kept is not None:
                raise Violation(f"{host.name} still has a part: {host.part and host.part.stage}")
            if host.gate is not None or host.tunnel or host.held is not None:
                raise Violation(f"{host.name} still has a gate, a tunnel or a queue")
            if host.copy != "none" and host is not vm:
                raise Violation(f"a copy is left on {host.name}: {host.copy}")
            if host.keeping or (host.checkpoint and not coordinator.recoverable(record)):
                raise Violation(f"{host.name} still takes or keeps checkpoints")
            self._check_states(host, record)
        self._check_told(vm, record)
        self.former.verdict(record)
        self._converged()
        for host in self.hosts.values():
            host.checkpoint = False  # nobody needs it any more: the VM is back
            host.hypervisor.saved = None
        if vm.copy != "running":
            vm.copy = "running"  # its owner starts it anew
            at_once(self.authority.vm_state(VM, "running"))
            for host in self.hosts.values():
                host.ring = deque()
        missing = self.books.sent - len(self.books.delivered)
        if missing and self.plan.lossless:
            raise Violation(f"{missing} frames were lost: {self.books.lost}")
        return record

    def _is_as_it_must(self, vm: SimHost, record: Handover) -> bool:
        """A hot move leaves the VM running; a cold one as it was, or asleep, and says so."""
        before = self.plan.cold or "running"
        moved_cold = record.mode == "cold" and record.outcome == "moved"
        must = record.ends_as if moved_cold else before
        asleep = vm.copy == "none" and vm.hypervisor.saved == self.instant
        match must:
            case "running" | "paused":
                return vm.copy == must
            case "suspended":
                # It woke, and nobody heard of it before its NVE was given up.
                return asleep or vm.copy == before
            case _:
                return vm.copy == "none"

    def _check_told(self, vm: SimHost, record: Handover) -> None:
        """What `vm show` says of the VM after a cold move is what its host has."""
        told, seen = self.authority.vm(VM).state, vm.seen()
        seen = "shutdown" if self.plan.cold == "shutdown" and seen == "crashed" else seen
        if record.mode == "cold" and told != seen:
            raise Violation(f"the record says that the VM is {told}, it is {seen}")

    def _check_states(self, host: SimHost, record: Handover) -> None:
        """No state is left that is older than the VM; a second one only while the VM sleeps."""
        left, vm = host.hypervisor, self.hosts[self.vm_host]
        if left.taken or left.saving is not None:
            raise Violation(f"{host.name} still has a state that it took, or one half written")
        if left.saved is None:
            return
        if host is not vm and host.name == record.old_nve and record.ends_as == "crashed":
            return  # perhaps the VM ran on: nobody wakes this state, and it goes when the VM is up
        if left.saved != self.instant:
            raise Violation(f"{host.name} has state {left.saved}, the VM is at {self.instant}")
        asleep = vm.hypervisor.saved is not None or vm.name in self._killed
        if host is not vm and not (asleep and record.ends_as == "suspended"):
            raise Violation(f"{host.name} still has the VM's state")

    def _converged(self) -> None:
        """Every NVE has the newest of what the NVA holds, and its kernel that and nothing else."""
        view = self.subscribers.view()
        for host in self.hosts.values():
            intent = NveIntent(vns=(view.intent(host.name),))
            if host.agent.intent != intent:
                raise Violation(f"{host.name} was not told: it has {host.agent.intent}")
            wanted = rendered(intent)
            if host.kernel.state != wanted:
                what = difference(host.kernel.state, wanted)
                raise Violation(f"the kernel of {host.name} is not as its intent: {what}")
