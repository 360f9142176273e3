"""The simulated NVA: what nva/handovers.py and daemon/nva.py do around coordinator and authority.

Coordinator, authority and what it pushes are the real ones, over a store in memory that outlives
the NVA's process.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from overland.mobility import cold, coordinator
from overland.mobility import messages as m
from overland.model.cluster import Vm, VmState
from overland.model.handover import ENDED, Handover, Options, committed, marking
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
from overland.sim.agenda import Args
from overland.sim.cold import has_vm
from overland.sim.domain import NAMES, VM, at_once, founded, host_record
from overland.sim.former import FormerAddresses
from overland.sim.kernel import Failures
from overland.sim.subscribers import Subscribers
from overland.store.memory import MemoryStore

if TYPE_CHECKING:
    from overland.sim.host import SimHost
    from overland.sim.world import World

LEASE_S = 3.0
MEMBERS_DELAY_S = 0.1
TICK_S = 0.25


class SimNva:
    """`life` counts its processes; of one that was killed nothing stays but the store."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._agenda = world.agenda
        self._store = MemoryStore()
        at_once(self._store.commit([], founded()))
        self.store_full = False
        self.alive = True
        self.life = 0
        self.record: Handover | None = None
        """The open move."""
        self.move = ""
        """The last move that was begun."""
        self.called_dead: set[str] = set()
        """Hosts whose tenants nobody was to know any more, since the last move began."""
        self._unwritten = False
        self._events: list[m.CoordinatorEvent] = []
        self._published = 0
        self.former = FormerAddresses(world, self)
        self._load(1)
        self.subscribers.found()

    def vm(self) -> Vm:
        """The VM as the NVA knows it."""
        return self.authority.vm(VM)

    # ------------------------------------------------------------ life and death

    def _load(self, revision: int) -> None:
        """The NVA starts: it knows what its store has."""
        self.authority = Authority(self._store, lambda _: self.subscribers.changed())
        at_once(self.authority.load())
        hosts = list(self._world.hosts.values())
        self.subscribers = Subscribers(self.authority, hosts, self._push, revision)
        self._look()

    def _look(self) -> None:
        """Where the VM is, as the store has it."""
        vm = self.vm()
        self.vm_host, self._version = vm.host, vm.version
        self._world.copies.recorded(vm.host)

    def crash(self) -> None:
        """SIGKILL."""
        self.alive = False
        for host in self._world.hosts.values():
            host.connection.lose()
        self.life += 1

    def restart(self) -> None:
        self.alive, self._unwritten = True, False
        self._events.clear()
        # Its clock may have been set back meanwhile.
        self._load(self._world.random.choice((1, self._agenda.now_ns())))
        for host in self._world.hosts.values():
            self.watch_lease(host)
        self.record = self.authority.cluster.moves.get(self.move)
        self._published = self._version if self.record is None else 0
        self.step(m.Start())
        self._tick(self.life)
        self.former.look()

    def _in_this_life(self, life: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
        if self.alive and life == self.life:
            work(*args)

    def later(self, seconds: float, work: Callable[[*Args], None], *args: *Args) -> None:
        """Do `work` unless the NVA dies before."""
        self._agenda.later(seconds, self._in_this_life, self.life, work, args)

    def store_freed(self) -> None:
        self.store_full = False

    def _written(self, write: Callable[[], None]) -> None:
        if self.store_full:
            self._world.note("nva", "the disk is full")
            raise StoreFailure("the disk is full")
        write()

    # ------------------------------------------------------------ the move (nva/handovers.py)

    def bring_to(self, state: VmState) -> None:
        """The VM has been paused, suspended or shut down, or it runs (again)."""
        at_once(self.authority.vm_state(VM, state))

    def begin(self, move: str, new: str, checkpoints: int, *, cold: bool) -> None:
        """As an operator's wish does it: all hosts are there, and the VM must be free."""
        for name in NAMES:
            self.authority.host_seen(host_record(name))
        options = Options(checkpoints=checkpoints, addresses=self.former.wish())
        self.move = move
        self.called_dead.clear()
        self.record = at_once(self.authority.begin_move(move, VM, new, options, cold=cold))
        self.step(m.Start())
        self._tick(self.life)

    def step(self, event: m.CoordinatorEvent) -> None:
        before = self.record
        if before is None or not self.alive:
            return
        if self._unwritten:
            self._events.append(event)
            return
        after, effects = self._decided(before, event)
        commits = bool(effects) and m.Commit in map(type, effects)
        if not commits and (effects or after.phase != before.phase):
            after, effects = self._journalled(before, after, effects)
        if self._unwritten:
            return
        self._written_down(after, effects)
        if commits:
            self._commit()

    def _decided(self, before: Handover, event: m.CoordinatorEvent) -> Step:
        step = cold.step if before.mode == "cold" else coordinator.step
        return step(before, event, self._agenda.now_s, self._agenda.now_ns())

    def _written_down(self, after: Handover, effects: Effects) -> None:
        """The record is `after` now: its effects may be seen."""
        assert self.record is not None
        if after.phase != self.record.phase:
            self._world.note("nva", self.record.phase, "->", after.phase)
            self.former.check(after)
        self.record = after
        self._perform(effects)
        hot = after.mode != "cold"
        if hot and self._published < self._version and committed(after.phase):
            self._publish()
        if after.phase in ENDED:
            self._ended(after)

    def _ended(self, record: Handover) -> None:
        self.record = None
        self.former.begun(record)
        for nve, order in farewells(record, self.vm()):
            self._tell(nve, order)
        if record.mode == "cold" and self.vm().state != "shutdown":
            host = self._world.hosts[self.vm_host]
            host.connection.tell(self._asked_for_vm, host)

    def _asked_for_vm(self, host: SimHost) -> None:
        host.connection.say(self._saw, host)

    def _perform(self, effects: Effects) -> None:
        for effect in effects:
            match effect:
                case m.Tell(nve=nve, order=order) | m.Ask(nve=nve, order=order):
                    self._tell(nve, order)
                case m.Publish():
                    self._publish_record()
                case m.Commit() | m.Serve() | m.Task():
                    pass  # it has no disks

    def _journalled(self, before: Handover, after: Handover, effects: Effects) -> Step:
        """As nva/handovers.py does it, the last record later if there is no room for it now."""
        try:
            self._written(lambda: at_once(self.authority.journal(after)))
        except StoreFailure as failure:
            decided = committed(after.phase) or after.phase == "aborting"
            marked = decided and marking(after) != marking(before)
            if after.phase in ENDED or marked or begins_to_close(before, after):
                self._unwritten = True
                self.later(RETRY_S, self._write_again, after, effects)
            elif not decided:
                return self._decided(before, m.Abort(why=str(failure)))
        return after, effects

    def _write_again(self, after: Handover, effects: Effects) -> None:
        if self.record is None:
            return
        self._unwritten = False
        self._journalled(self.record, after, effects)
        if not self._unwritten:
            self._written_down(after, effects)
            events, self._events = self._events, []
            for event in events:
                self.step(event)

    def _commit(self) -> None:
        assert self.record is not None
        won = m.Committed(version=self.record.version + 1, at_ns=self._agenda.now_ns())
        after, effects = self._decided(self.record, won)
        try:
            self._written(lambda: at_once(self.authority.commit(after)))
        except (Conflict, StoreFailure) as failure:
            self.step(m.CommitRefused(why=str(failure)))
            return
        self._world.note("nva", self.record.phase, "->", after.phase)
        self.record = after
        self._look()
        self.former.begun(after)  # with the commit a move of a VM at rest has ended
        self._perform(effects)

    def _publish(self) -> None:
        self._published = self._version
        self._publish_record()

    def _publish_record(self) -> None:
        assert self.record is not None
        self.authority.publish(self.record)

    def _tick(self, life: int) -> None:
        if self.alive and life == self.life and self.record is not None:
            self.step(m.Tick())
            left_s = self.record.deadline_s - self._agenda.now_s if self.record else TICK_S
            wait_s = left_s if 0 < left_s < TICK_S else TICK_S
            self._agenda.later(wait_s + 1e-6, self._tick, life)

    # ------------------------------------------------------------ what it says

    def _tell(self, nve: str, order: m.AnyOrder | m.ColdOrder) -> None:
        host = self._world.hosts[nve]
        if isinstance(order, m.Cold) and isinstance(order, m.WakeUp | m.DropState):
            record = self.record or self.authority.ended_moves[order.move]
            ticket: Any = ticket_of(record, order.version, self._agenda.now_ns())
            order = msgspec.structs.replace(order, seal=ticket)  # this domain forges nothing
        if self._world.trace is not None:
            self._world.note("nva", type(order).__name__, "to", nve)
        host.connection.tell(host.order, order)

    def _push(self, host: SimHost, push: Whole | Update) -> None:
        self._world.note("nva", type(push).__name__, push.revision, "to", host.name)
        host.connection.tell(host.pushed, push)

    # ------------------------------------------------------------ what it hears

    def heard(self, host: SimHost, report: m.AnyReport) -> None:
        if self.record is not None and report.move == self.record.id:
            self.step(report)
            return
        ended = self.authority.ended_moves.get(report.move)
        if ended is None:
            return
        if ended.mode == "cold":
            self._straggled(host, ended, report)
        elif not isinstance(report, m.Closed | m.Failed | m.Progress):
            self._tell(host.name, coordinator.close_order(ended, host.name))

    def _straggled(self, host: SimHost, record: Handover, report: m.AnyReport) -> None:
        state = state_since(record, self.vm(), host.name, report)
        if isinstance(report, m.Restored) and host.name == record.old_nve:
            with suppress(StoreFailure):
                self._written(lambda: at_once(self.authority.turned_back(record.id)))
        if state is not None:
            self._vm_state(state)

    def acknowledged(self, host: SimHost, push: Whole | Update, failures: Failures) -> None:
        """NVE `host` has `push` in its kernel, but for the failures."""
        self.subscribers.acknowledged(host, push, failures)
        record = self.record
        if record is not None and record.mode == "cold":
            self._in_kernel(host, record)
            return
        version = 0 if failures else push.versions.get(VM, 0)
        if record is not None and record.commit_ns and version >= record.version:
            self.step(m.Acknowledged(nve=host.name, at_ns=1))

    def _in_kernel(self, host: SimHost, record: Handover) -> None:
        marking = marked_at(record, lambda _: self.subscribers.in_kernel(host), lambda _: True)
        if marking is not None:
            self.step(m.Acknowledged(nve=host.name, at_ns=1, marking=marking))

    def asked(self, host: SimHost) -> None:
        """NVE `host` was told what does not go with what it has."""
        self.subscribers.asked(host)

    def crashed(self, host: SimHost) -> None:
        """The hypervisor of `host` has said that the VM's process has ended."""
        if self.vm().host == host.name:
            self._vm_state("crashed")

    def _saw(self, host: SimHost) -> None:
        if self.vm().host == host.name and not host.hypervisor.wakes:
            self._vm_state(host.seen())

    def _vm_state(self, state: VmState) -> None:
        """Written as soon as the store takes it."""
        if self.store_full:
            self.later(RETRY_S, self._vm_state, state)
            return
        at_once(self.authority.vm_state(VM, state))
        alive = self.authority.is_alive(VM, state)
        point = at_once(self.authority.no_recovery(VM)) if alive else None
        if point is not None and point.mode == "cold":
            self._tell(point.old_nve, drop_kept(point))

    # ------------------------------------------------------------ who is there (daemon/nva.py)

    def hello(self, host: SimHost) -> None:
        """NVE `host` is there (again)."""
        if self.authority.host_seen(host_record(host.name)):
            self.later(MEMBERS_DELAY_S, self.subscribers.changed)
        self._keep(host)
        self.subscribers.connected(host, dict(host.agent.revisions.newest))
        moves = [host.part.move] if host.part is not None else []
        moves += host.hypervisor.moves()
        self.step(m.Back(nve=host.name))
        self._settle(host, moves)

    def _settle(self, host: SimHost, moves: list[str]) -> None:
        """What has ended meanwhile, and what it has that is not the VM."""
        vm = self.vm()
        for move in moves:
            ended = self.authority.ended_moves.get(move)
            for order in last_orders(ended, host.name, vm) if ended is not None else ():
                self._tell(host.name, order)
        if self._world.plan.cold is None or vm.move is not None or moves:
            return
        if vm.host != host.name and has_vm(host):
            last = may_be_last(vm, host.name)
            host.connection.tell(host.stop_stale, vm, last)
        elif vm.host == host.name and (vm.state not in AT_REST or has_vm(host)):
            self._vm_state(host.seen())
        for record in self.authority.to_turn_back(host.name):
            self._tell(host.name, turn_back(record))

    def watch_lease(self, host: SimHost) -> None:
        """The connection of NVE `host` has ended; its lease will."""
        self._agenda.later(LEASE_S, self._lease_ended, host, host.connection.number, self.life)

    def _lease_ended(self, host: SimHost, number: int, life: int) -> None:
        if host.connection.up or host.connection.number != number or life != self.life:
            return
        dead = self._world.random.random() < 0.5
        self._world.note("nva", host.name, "is", "dead" if dead else "away")
        self.authority.host_changed(host.name, ready=False, dead=dead)
        self._keep(host)
        self.step(m.Lost(nve=host.name, dead=dead))
        if dead:
            self.called_dead.add(host.name)
            self.subscribers.changed()

    def _keep(self, host: SimHost) -> None:
        with suppress(StoreFailure):
            self._written(lambda: at_once(self.authority.keep_host(host.name)))
