"""One simulated host: the real NVE machines over a kernel, a hypervisor and a disk that are values.

What the fakes promise is what the real adapters do (spec/handover.md); what a crash takes along is
what it takes along on Linux: the daemon's queues go, gates, taps and QEMU stay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from overland.mobility import messages as m
from overland.mobility import new_nve, old_nve, peer_nve
from overland.mobility.nve import Part, PartStep
from overland.model.cluster import Vm, VmState
from overland.model.handover import Checkpoint, Options, Transfer
from overland.model.nve import BridgeEntry, Muted, Op, TunnelEntry, VnIntent
from overland.nva.pushes import Update, Whole
from overland.nve.moving import Moving
from overland.sim.agenda import Args
from overland.sim.agent import SimAgent
from overland.sim.cold import SimColdMoves, SimHypervisor
from overland.sim.connection import Connection
from overland.sim.domain import BRIDGE, DEVICE, MAC, PORT, address_of
from overland.sim.invariants import Violation
from overland.sim.kernel import Failures, FakeKernel
from overland.sim.underlay import Frame

if TYPE_CHECKING:
    from overland.sim.world import World

MACHINES = {"old": old_nve, "new": new_nve, "peer": peer_nve}
Prepare = m.PrepareNew | m.PrepareOld | m.PreparePeer
PREPARES = (m.PrepareNew, m.PrepareOld, m.PreparePeer)

# Sets of types: with isinstance of unions a tenth of a move's time went into such questions.
TURNS = frozenset({m.GiveBack, m.Restore, m.Close, m.Resumed, m.Broken})
"""What may make effects void that have not begun."""

BESIDE = frozenset({m.WatchTransfer, m.AwaitStop, m.AwaitCopy, m.TakeCheckpoint, m.AwaitInterval})
"""Effects that wait for something while others are performed."""

Copy = Literal["none", "running", "paused", "incoming", "whole", "sent"]
MARKER_AGAIN_S, MARKER_LIMIT_S = 0.25, 3.0
LOOKS = 0.3
"""How often the agent looks at the kernel right after a handover has written to it."""

UNMUTED = (Op(verb="remove", fact=Muted(port=PORT)),)
READY_LOOK_S, READY_LIMIT_S = 0.005, 10.0


class Gate:
    """A port's gate: `pass` (into the ring), `hold`, or `flow` to `into` once nothing waits."""

    __slots__ = ("into", "mode", "queue")

    def __init__(self) -> None:
        self.mode = "pass"
        self.into = "ring"
        self.queue: deque[Frame] = deque()


class SimHost:
    """State that outlives the daemon: `kept` (journal), `gate`, `ring`, `copy`, `kernel`."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.agenda = world.agenda
        self.connection = Connection(self)
        self.alive = True
        self.life = 0
        self.cut_until = 0.0
        self.part: Part | None = None
        self.kept: Part | None = None
        self.disk_full = False
        self.queue: deque[m.Do] = deque()
        self.busy = False
        self.voided = 0
        self._copy: Copy = "none"
        self._waiting: list[tuple[int, m.Do, str]] = []
        self.ring: deque[Frame] = deque()
        self.gate: Gate | None = None
        self.tunnel = False
        self.kernel = FakeKernel()
        self.agent = SimAgent(self, self.kernel, frozenset())
        self.listens = False
        self.held: deque[Frame] | None = None
        self.sent = 0
        self.finishing = False
        self.base_version = 0
        self.closed: set[str] = set()
        self.hypervisor = SimHypervisor(self)
        self.cold = SimColdMoves(self)
        self.keeping = False
        self.checkpoint = False

    @property
    def copy(self) -> Copy:
        """This host's copy of the VM."""
        return self._copy

    @copy.setter
    def copy(self, copy: Copy) -> None:
        self._copy = copy
        self.world.copies.changed(self.name, runs=copy == "running")
        waiting, self._waiting = self._waiting, []
        for voided, *what in waiting:
            self.agenda.later(0.005, self._in_part, voided, self._beside, tuple(what))

    # ------------------------------------------------------------ the shell (nve/handovers.py)

    def pushed(self, push: Whole | Update) -> None:
        self.agent.pushed(push)

    def order(self, order: m.AnyOrder | m.ColdOrder) -> None:
        part = self.part
        if isinstance(order, m.Cold):
            self.agent.in_turn(self.cold.order, order)
        elif isinstance(order, PREPARES):
            self.agent.in_turn(self.prepare, order)
        elif part is not None and part.move == order.move:
            self.event(order)
        else:
            self._not_ours(order)

    def _not_ours(self, order: m.AnyOrder) -> None:
        answers = {m.Close: m.Closed, m.GiveBack: m.GivenBack, m.Restore: m.Restored}
        answer = answers.get(type(order))
        if answer is not None:
            self.closed.add(order.move)
            self.report(answer(move=order.move, nve=self.name))
            return
        if isinstance(order, m.Retire) and order.move in self.closed:
            self.report(m.Closed(move=order.move, nve=self.name))
            return
        why = "no part in the move"
        self.report(m.Failed(move=order.move, nve=self.name, step="order", why=why))

    def stop_stale(self, vm: Vm, may_be_last: bool) -> None:
        """The NVA says that this host's copy is not the VM."""
        self.cold.stop_stale(vm, may_be_last=may_be_last)

    def acknowledge(self, push: Whole | Update, failures: Failures) -> None:
        """All of `push` is in the kernel, but for the failures."""
        but = ("but for", failures) if failures else ()
        self.world.note(self.name, "has", push.revision, *but)
        self.connection.say(self.world.nva.acknowledged, self, push, failures)

    def ask_for_whole(self) -> None:
        """What the NVA says does not go with what this host has."""
        self.world.note(self.name, "asks for the whole")
        self.connection.say(self.world.nva.asked, self)

    def report(self, report: m.AnyReport) -> None:
        if self.world.trace is not None:
            self.world.note(self.name, "says", type(report).__name__)
        self.connection.say(self.world.nva.heard, self, report)

    def prepare(self, order: Prepare) -> None:
        if order.move in self.closed:
            self.report(m.Closed(move=order.move, nve=self.name))
        elif self.part is None or self.part.move != order.move:
            self._begin(order)

    def _begin(self, order: Prepare) -> None:
        self._void()
        role: Literal["old", "new", "peer"] = "peer"
        vm = None
        if not isinstance(order, m.PreparePeer):
            role, vm = ("new" if isinstance(order, m.PrepareNew) else "old"), order.vm
        if self.disk_full:
            failed = m.Failed(move=order.move, nve=self.name, step="journal", why="disk full")
            self.report(failed)
            return
        options = getattr(order, "options", Options())
        part = Part(
            move=order.move, nve=self.name, role=role, vm=vm, ports=order.ports, options=options
        )
        self.part, self.base_version = part, order.version
        self.agent.moving(self._moving())
        self._take(MACHINES[role].begin(part))

    def event(self, event: m.NveEvent) -> None:
        if self.part is None:
            return
        step = MACHINES[self.part.role].step(self.part, event)
        if type(event) in TURNS:
            turns = step[0].stage != self.part.stage
            if turns or isinstance(event, m.Broken):
                self.queue.clear()
        self._take(step)

    def _take(self, step: PartStep) -> None:
        part, effects = step
        self.part = part
        if not self.disk_full:
            self.kept = part
        for effect in effects:
            if type(effect) is m.Say:
                self.report(effect.report)
            elif type(effect) not in BESIDE:
                self.queue.append(effect)
            elif isinstance(effect, m.AwaitInterval):
                self._later(part.options.interval_s, self.event, m.Done(effect="AwaitInterval"))
            else:
                self._later(0.005, self._beside, effect, part.stage)
        if part.stage == "closed":
            self.closed.add(part.move)
            self.part = self.kept = None
            self._void()
            self.agent.moving(frozenset())
        if self.agent.waits is not None:
            self.agent.part_changed()
        if self.queue and not self.busy:
            self.busy = True
            self._later(self.agenda.short(), self._perform, self.queue.popleft())

    def _moving(self) -> frozenset[Moving]:
        """What the agent leaves to the part."""
        if self.part is None:
            return frozenset()
        role, version = self.part.role, self.base_version
        return frozenset(
            {Moving(role=role, mac=MAC, port=PORT, device=DEVICE, bridge=BRIDGE, version=version)}
        )

    def turns_first(self, vns: Iterable[VnIntent]) -> bool:
        """A peer turns behind its marker before a committed mapping takes effect (HO-28)."""
        part = self.part
        if part is None or not peer_nve.behind(part):
            return False
        told = [each.version for vn in vns for each in vn.remotes if each.mac == MAC]
        if max(told, default=0) <= self.base_version:
            return False
        if part.stage == "armed":
            self.event(m.Steer(move=part.move))
        return True

    def look(self) -> None:
        """Time for the agent to look at the kernel, although nothing is known to have changed."""
        if self.alive:
            self.agent.reconcile()

    def apply(self, ops: tuple[Op, ...]) -> Failures:
        """Write to the kernel, be it the agent or the handover; with its port a VM's ring goes."""
        failures = self.kernel.apply(ops)
        if self.ring and not self.kernel.forwarding.has_port:
            for frame in self.ring:
                self.world.underlay.lost(frame, "port removed")
            self.ring.clear()
        return failures

    def _later(self, seconds: float, work: Callable[[*Args], None], *args: *Args) -> None:
        """Do `work` unless the daemon dies, or its part is void, before."""
        self.agenda.later(seconds, self._in_part, self.voided, work, args)

    def _in_part(self, voided: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
        if self.alive and voided == self.voided:
            work(*args)

    def while_it_lives(self, seconds: float, work: Callable[[*Args], None], *args: *Args) -> None:
        """Do `work` unless the daemon dies before."""
        self.agenda.later(seconds, self._in_life, self.life, work, args)

    def _in_life(self, life: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
        if self.alive and life == self.life:
            work(*args)

    def _void(self) -> None:
        self.voided += 1
        self.queue.clear()
        self.busy = False

    # ------------------------------------------------------------ life and death

    def disk_freed(self) -> None:
        self.disk_full = False

    def crash(self) -> None:
        """SIGKILL of the daemon: what waited in its queues is gone, and counted as such."""
        self.alive = self.keeping = False
        self.life += 1
        self._void()
        self.part = None
        self.connection.forget()
        self.closed.clear()
        self.hypervisor.daemon_died()
        self.listens = False
        for queue in (self.gate.queue if self.gate else None, self.held):
            while queue:
                self.world.underlay.lost(queue.popleft(), "daemon")

    def restart(self) -> None:
        self.alive = True
        self.hypervisor.daemon_started()
        self.part = self.kept
        self.agent = SimAgent(self, self.kernel, self._moving())
        self.cold = SimColdMoves(self)
        if self.part is None:
            self.gate, self.tunnel, self.held = None, False, None
        else:
            self.event(m.Resumed())

    def kill_copy(self) -> None:
        """SIGKILL of QEMU."""
        if self.copy == "none":
            return
        self.copy = "none"
        self.hypervisor.process_died()
        if self.alive and not self.hypervisor.wakes and self.world.plan.cold is not None:
            self.connection.say(self.world.nva.crashed, self)
        if self.alive and self.part is not None and self.part.vm is not None:
            self.event(m.Broken(effect="vm", why="QEMU ended"))

    def seen(self) -> VmState:
        """What there is of the VM here, as the Hello says it."""
        if self.copy == "none":
            return "suspended" if self.hypervisor.saved is not None else "crashed"
        return "running" if self.copy == "running" else "paused"

    # ------------------------------------------------------------ effects

    def _perform(self, effect: m.Do) -> None:
        name = type(effect).__name__
        if self.world.trace is not None:
            self.world.note(self.name, name)
        getattr(self, f"_{name}")(effect)

    def _ok(self, effect: m.Do, number: int = 1, text: str = "") -> None:
        done = m.Done(
            effect=type(effect).__name__,
            number=number,
            text=text,
            back=type(effect) is m.SteerHere and effect.back,
        )
        self.busy = False
        self.event(done)

    def _broken(self, effect: m.Do, why: str) -> None:
        back = type(effect) is m.SteerHere and effect.back
        self._failed(m.Broken(effect=type(effect).__name__, why=why, back=back))

    def _failed(self, event: m.Broken) -> None:
        self.busy = False
        self.event(event)

    def _Forget(self, effect: m.Do) -> None:
        self._disarm()
        self._ok(effect)

    def _write(self, ops: tuple[Op, ...]) -> None:
        """The handover's own entries; now and then the agent looks just then."""
        self.apply(ops)
        if self.world.random.random() < LOOKS:
            self.look()

    def _ArmPorts(self, effect: m.Do) -> None:
        self._arm(effect, self.agenda.now_s + READY_LIMIT_S)

    def _arm(self, effect: m.Do, limit_s: float) -> None:
        if self.agent.ready():
            self.gate = self.gate or Gate()
            self._ok(effect)
        elif self.agenda.now_s < limit_s:
            self._later(READY_LOOK_S, self._arm, effect, limit_s)
        else:
            self._broken(effect, "its port did not come up")

    def _ArmPeers(self, effect: m.Do) -> None:
        self.listens = True
        self._ok(effect)

    def _QuietPorts(self, effect: m.Do) -> None:
        assert self.gate is not None
        self.gate.mode = "hold"
        self.ring.clear()
        self._ok(effect)

    def _OpenPorts(self, effect: m.Do) -> None:
        self._release("ring")
        self._ok(effect)

    def _MakeTunnel(self, effect: m.Do) -> None:
        self.tunnel = True
        self._ok(effect)

    def _ProvePath(self, effect: m.Do) -> None:
        new = self.world.hosts[self.world.new]
        if new.alive and not self.world.underlay.is_cut(self, new):
            self._ok(effect)
        else:
            self._broken(effect, "no answer")

    def _ReceiveCopy(self, effect: m.Do) -> None:
        if self.copy != "none":
            self._broken(effect, "there is a copy already")
            return
        self.copy = "incoming"
        self._ok(effect, text="tcp:new:1")

    def _DropStale(self, effect: m.Do) -> None:
        if self.copy in ("running", "paused"):
            self._broken(effect, "a copy runs here")
            return
        self.copy = "none"
        self._ok(effect)

    def _StopCopy(self, effect: m.Do) -> None:
        new = self.part is not None and self.part.role == "new"
        if not (new and self.copy == "running"):
            self.copy = "none"
        self._ok(effect)

    def _BeginSend(self, effect: m.Do) -> None:
        self.sent = 0
        self._ok(effect)

    def _KeepCheckpoints(self, effect: m.Do) -> None:
        self.keeping, self.checkpoint = True, False
        self._ok(effect, text="checkpoint:new|1|00")

    def _RefuseCheckpoints(self, effect: m.Do) -> None:
        self.keeping = False
        self._ok(effect)

    def _take_checkpoint(self, effect: m.TakeCheckpoint) -> m.NveEvent:
        new = self.world.hosts[self.world.new]
        if self.copy != "running" or not new.keeping or self.world.underlay.is_cut(self, new):
            return m.Broken(effect=type(effect).__name__, why="not taken")
        new.mirrored()
        now_ns = self.agenda.now_ns()
        taken = Checkpoint(at_ns=now_ns, kept_ns=now_ns, sent_bytes=1, pause_ms=1.0)
        return m.CheckpointSeen(checkpoint=taken)

    def _beside(self, effect: m.Do, stage: str) -> None:
        if isinstance(effect, m.TakeCheckpoint):
            if self.part is not None and self.part.stage == stage:
                self.event(self._take_checkpoint(effect))
            return
        if not isinstance(effect, m.WatchTransfer):
            name = type(effect).__name__
            awaited = ("whole", "running") if isinstance(effect, m.AwaitCopy) else ("sent",)
            if self.copy in awaited:
                self.event(m.Done(effect=name, number=1))
            elif self.copy != "none":
                self._waiting.append((self.voided, effect, stage))
            elif self.part is not None and self.part.stage == stage:
                self.event(m.Broken(effect=name, why="QEMU ended"))
            return
        self.sent += 1
        new = self.world.hosts[self.world.new]
        broken = new.copy == "none" or self.world.underlay.is_cut(self, new)
        status: Literal["failed", "active"] = "failed" if broken else "active"
        passes = 2 if self.sent > 4 else 1
        self.event(
            m.TransferSeen(
                transfer=Transfer(status=status, passes=passes, bandwidth_bytes_per_s=1e9)
            )
        )

    def _Pace(self, effect: m.Do) -> None:
        self._ok(effect)

    def _HoldPorts(self, effect: m.Do) -> None:
        assert self.gate is not None
        self.gate.mode = "hold"
        self._ok(effect)

    def _AwaitDrained(self, effect: m.Do) -> None:
        self._ok(effect, number=int(self.copy == "running" and self.world.random.random() < 0.8))

    def _FinishSend(self, effect: m.Do) -> None:
        if self.copy not in ("running", "sent"):
            self._broken(effect, "QEMU ended")
            return
        self.finishing = True
        self.agenda.later(self.agenda.short(), self._stop)
        self._ok(effect)

    def _stop(self) -> None:
        """QEMU stops the VM, whether its daemon lives or not."""
        if self.finishing and self.copy == "running":
            self.copy = "sent"
            self.agenda.later(self.agenda.short(), self._arrive)

    def _arrive(self) -> None:
        """The rest of memory reaches the new host, once the way is free."""
        new = self.world.hosts[self.world.new]
        if self.copy != "sent" or new.copy != "incoming":
            return
        if self.world.underlay.is_cut(self, new):
            self.agenda.later(0.1, self._arrive)
        else:
            new.copy = "whole"

    def mirrored(self) -> None:
        """A checkpoint is whole here; never once its move has ended (R-11)."""
        if self.world.nva.record is None:
            raise Violation("a checkpoint was taken after the end of its move")
        self.checkpoint = True

    def _ReleaseInto(self, effect: m.Do) -> None:
        assert isinstance(effect, m.ReleaseInto)
        rescued = 0
        if effect.tunnel:
            rescued = len(self.ring)
            while self.ring:
                self.world.underlay.tunnel(self, self.ring.popleft())
        self._release("tunnel" if effect.tunnel else "ring")
        self._ok(effect, number=rescued)

    def _release(self, into: str) -> None:
        gate = self.gate
        assert gate is not None
        gate.mode, gate.into = "flow", into
        while gate.queue:
            self._on(gate.queue.popleft())

    def _SteerHere(self, effect: m.Do) -> None:
        assert isinstance(effect, m.SteerHere)
        assert self.part is not None
        if self.part.role == "old":
            self._write(_turned(None if effect.back else self.world.new))
            self._ok(effect)
            return
        self.held = self.held if self.held is not None else deque()
        turn = (self.voided, self._turn, (effect, True))
        number = self.world.underlay.marker(self, self._in_part, *turn)
        self._ask(effect, number, self.agenda.now_s + MARKER_LIMIT_S)

    def _ask(self, effect: m.SteerHere, number: int, limit_s: float) -> None:
        """A marker can be lost like any frame: it is sent again."""
        if self.agenda.now_s < limit_s:
            if self.world.underlay.awaits(number):
                self._launch_by_device(("marker", number))
                self._later(MARKER_AGAIN_S, self._ask, effect, number, limit_s)
        elif self.world.underlay.forget_marker(number):
            self._turn(effect, False)

    def _turn(self, effect: m.SteerHere, proved: bool) -> None:
        held, self.held = self.held, None
        if effect.local:
            for frame in held or ():
                self._at_port(frame)
            self._write(_local(PORT))
        else:
            self._write(_entry(self.world.old if effect.back else self.world.new))
            for frame in held or ():
                self._launch(frame)
        if proved:
            self._ok(effect)
        else:
            self._broken(effect, "no marker came back")

    def _Unmute(self, effect: m.Do) -> None:
        if self.gate is None:
            self._broken(effect, "the gate is not armed")
            return
        self._write(UNMUTED)
        self._ok(effect)

    def _ResumeVm(self, effect: m.Do) -> None:
        if self.copy == "none" and self.part is not None and self.part.role == "new":
            self._failed(m.Broken(effect="vm", why="QEMU ended"))
            return
        if self.copy in ("none", "incoming"):
            self._broken(effect, "there is no whole copy")
            return
        self.copy = "running"
        self.deliver()
        self._ok(effect)

    def _Announce(self, effect: m.Do) -> None:
        self._ok(effect)

    def _MuteBroadcast(self, effect: m.Do) -> None:
        self._ok(effect)

    def _TakeDigest(self, effect: m.Do) -> None:
        self._ok(effect, text="same")

    def _CancelSend(self, effect: m.Do) -> None:
        self.finishing = False
        self._ok(effect)

    def _CleanUp(self, effect: m.Do) -> None:
        assert isinstance(effect, m.CleanUp)
        self.keeping = False
        self.checkpoint = self.checkpoint and effect.keep
        self._disarm()
        self._ok(effect)

    def _disarm(self) -> None:
        if self.gate is not None:
            for frame in self.gate.queue:
                self._on(frame)
        for frame in self.held or ():
            self._launch(frame)
        self.gate, self.tunnel, self.held, self.listens = None, False, None, False

    # ------------------------------------------------------------ frames

    def arrived(self, frame: Frame) -> None:
        """A frame for the VM comes in from the underlay: what is not for here goes nowhere."""
        if frame[0] == "marker" and self.listens:
            self.world.underlay.marker_seen(frame[1], self)
        elif self.kernel.forwarding.drops:
            self.world.underlay.dropped(frame, self, late=True)
        elif self.kernel.forwarding.way == PORT:
            self._at_port(frame)
        else:
            self.world.underlay.lost(frame, "it does not live here")

    def _at_port(self, frame: Frame) -> None:
        gate = self.gate
        if not self.kernel.forwarding.has_port:
            self.world.underlay.lost(frame, "no port")
        elif gate is None or gate.mode == "pass":
            self._ring(frame)
        elif gate.mode == "hold" or gate.queue:
            if self.alive:
                gate.queue.append(frame)
            else:
                self.world.underlay.lost(frame, "daemon")
        else:
            self._on(frame)

    def from_tunnel(self, frame: Frame, home: bool) -> None:
        """Out of the tunnel: past the gate at the old NVE, like any frame at the new one."""
        if not self.tunnel:
            self.world.underlay.lost(frame, "no tunnel")
        elif frame[0] == "marker":
            if self.alive:
                self.world.underlay.marker_seen(frame[1], self)
        elif home:
            self._ring(frame)
        else:
            self._at_port(frame)

    def _on(self, frame: Frame) -> None:
        if self.gate is not None and self.gate.into == "tunnel":
            self.world.underlay.tunnel(self, frame)
        else:
            self._ring(frame)

    def _ring(self, frame: Frame) -> None:
        if frame[0] == "marker":
            return  # the guest knows nothing of it
        self.ring.append(frame)
        if self.copy == "running":
            self.deliver()

    def deliver(self) -> None:
        """The guest takes what its tap holds."""
        while self.ring:
            self.world.underlay.delivered(self.ring.popleft())

    def send(self, frame: Frame) -> None:
        """A tenant of this host sends to the VM."""
        if self.held is None or self.kernel.forwarding.way == PORT:
            self._launch(frame)
        elif self.alive:
            self.held.append(frame)
        else:
            self.world.underlay.lost(frame, "daemon")

    def _launch_by_device(self, frame: Frame) -> None:
        """As markers go: by the VXLAN device, wherever the bridge would send a tenant's frame."""
        remote = self.kernel.forwarding.remote
        if remote is None:
            self.world.underlay.lost(frame, "no entry")
        else:
            self.world.underlay.launch(self, remote, frame)

    def _launch(self, frame: Frame) -> None:
        way = self.kernel.forwarding.way
        if self.kernel.forwarding.drops:
            self.world.underlay.dropped(frame, self, late=False)
        elif way == PORT:
            self._at_port(frame)
        elif way is None:
            self.world.underlay.lost(frame, "nobody knows where it lives")
        else:
            self.world.underlay.launch(self, way, frame)


@cache
def _entry(host: str) -> tuple[Op, ...]:
    """Frames that leave by the VXLAN device go to `host` (dataplane/handover.py)."""
    return (Op(verb="put", fact=TunnelEntry(device=DEVICE, mac=MAC, remote=address_of(host))),)


@cache
def _local(port: str) -> tuple[Op, ...]:
    return (Op(verb="put", fact=BridgeEntry(bridge=BRIDGE, mac=MAC, port=port)),)


@cache
def _turned(host: str | None) -> tuple[Op, ...]:
    """This host's own tenants: to the port here, or to `host`."""
    return _local(PORT) if host is None else (*_entry(host), *_local(DEVICE))
