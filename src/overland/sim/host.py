"""One simulated host: the real NVE machines over a kernel, a hypervisor and a disk that are values.

What the fakes promise is what the real adapters do (spec/handover.md); what a crash takes along is
what it takes along on Linux: the daemon's queues go, gates, taps and QEMU stay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from overland.mobility import messages as m
from overland.mobility import new_nve, old_nve, peer_nve
from overland.mobility.nve import Part, PartStep
from overland.model.cluster import VmState
from overland.model.handover import Checkpoint, Options, Transfer
from overland.model.nve import BridgeEntry, Muted, Op, TunnelEntry
from overland.nve.moving import Moving
from overland.sim.agent import Prepare, SimAgent
from overland.sim.cold import SimColdMoves, SimHypervisor
from overland.sim.domain import BRIDGE, DEVICE, MAC, PORT, address_of
from overland.sim.kernel import Failures, FakeKernel, drops, remote_of, way

if TYPE_CHECKING:
    from overland.sim.world import World

MACHINES = {"old": old_nve, "new": new_nve, "peer": peer_nve}
Copy = Literal["none", "running", "paused", "incoming", "whole", "sent"]
MARKER_AGAIN_S, MARKER_LIMIT_S = 0.25, 3.0
LOOKS = 0.3
"""How often the agent looks at the kernel right after a handover has written to it."""

READY_LOOK_S, READY_LIMIT_S = 0.005, 10.0

Frame = tuple[str, int]
"""(sender, number); a marker is ("marker", its number)."""


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
        self.alive = True
        self.life = 0
        self.link = 0
        self.connected = True
        self.cut_until = 0.0
        self.part: Part | None = None
        self.kept: Part | None = None
        self.disk_full = False
        self.queue: deque[m.Do] = deque()
        self.busy = False
        self.voided = 0
        self._copy: Copy = "none"
        self._waiting: list[Callable[[], None]] = []
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
        self.unsent: list[Callable[[], None]] = []
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
        self.world.copy_changed(self.name, runs=copy == "running")
        waiting, self._waiting = self._waiting, []
        for again in waiting:
            self.world.later(0.005, again)

    # ------------------------------------------------------------ the shell (nve/handovers.py)

    def order(self, order: m.AnyOrder | m.ColdOrder) -> None:
        part = self.part
        if isinstance(order, Prepare | m.Cold):
            self.agent.heard(order)
            return
        if part is not None and part.move == order.move:
            self.event(order)
            return
        answers = {m.Close: m.Closed, m.GiveBack: m.GivenBack, m.Restore: m.Restored}
        answer = answers.get(type(order))
        if answer is not None:
            self.closed.add(order.move)
            self.world.report(self, answer(move=order.move, nve=self.name))
            return
        if isinstance(order, m.Retire) and order.move in self.closed:
            self.world.report(self, m.Closed(move=order.move, nve=self.name))
            return
        nothing = m.Failed(move=order.move, nve=self.name, step="order", why="no part in the move")
        self.world.report(self, nothing)

    def prepare(self, order: Prepare) -> None:
        if order.move in self.closed:
            self.world.report(self, m.Closed(move=order.move, nve=self.name))
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
            self.world.report(self, failed)
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
        turns_back = isinstance(event, m.GiveBack | m.Restore | m.Close | m.Resumed)
        if isinstance(event, m.Broken) or (turns_back and step[0].stage != self.part.stage):
            self.queue.clear()
        self._take(step)

    def _take(self, step: PartStep) -> None:
        self.part, effects = step
        if not self.disk_full:
            self.kept = self.part
        for effect in effects:
            if isinstance(effect, m.Say):
                self.world.report(self, effect.report)
            elif isinstance(effect, m.AwaitInterval):
                interval_s = self.part.options.interval_s
                self._later(interval_s, lambda: self.event(m.Done(effect="AwaitInterval")))
            elif isinstance(effect, m.WatchTransfer | m.AwaitStop | m.AwaitCopy | m.TakeCheckpoint):
                stage = self.part.stage
                self._later(0.005, lambda e=effect, s=stage: self._beside(e, s))  # type: ignore[misc]
            else:
                self.queue.append(effect)
        if self.part.stage == "closed":
            self.closed.add(self.part.move)
            self.part = self.kept = None
            self._void()
            self.agent.moving(frozenset())
        self.agent.part_changed()
        self._next()

    def _moving(self) -> frozenset[Moving]:
        """What the agent leaves to the part."""
        if self.part is None:
            return frozenset()
        role, version = self.part.role, self.base_version
        return frozenset(
            {Moving(role=role, mac=MAC, port=PORT, device=DEVICE, bridge=BRIDGE, version=version)}
        )

    def turns_first(self, versions: dict[str, int]) -> bool:
        """A peer turns behind its marker before a committed mapping takes effect (HO-28)."""
        part = self.part
        newer = versions.get(MAC, 0) > self.base_version
        if part is None or not newer or not peer_nve.behind(part):
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
        if self.ring and not self.kernel.has(PORT):
            for frame in self.ring:
                self.world.lost(frame, "port removed")
            self.ring.clear()
        return failures

    def _next(self) -> None:
        if self.queue and not self.busy:
            self.busy = True
            effect = self.queue.popleft()
            self._later(self.world.short(), lambda: self._perform(effect))

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        """Do `work` unless the daemon dies or its part is void before."""
        self.world.later(seconds, self._in_this_part(work))

    def _in_this_part(self, work: Callable[[], None]) -> Callable[[], None]:
        life, voided = self.life, self.voided

        def due() -> None:
            if self.alive and self.life == life and self.voided == voided:
                work()

        return due

    def while_it_lives(self, seconds: float, work: Callable[[], None]) -> None:
        """Do `work` unless the daemon dies before."""
        life = self.life

        def due() -> None:
            if self.alive and self.life == life:
                work()

        self.world.later(seconds, due)

    def _void(self) -> None:
        self.voided += 1
        self.queue.clear()
        self.busy = False

    def _done(self, event: m.NveEvent) -> None:
        self.busy = False
        self.event(event)
        self._next()

    # ------------------------------------------------------------ life and death

    def disk_freed(self) -> None:
        self.disk_full = False

    def crash(self) -> None:
        """SIGKILL of the daemon: what waited in its queues is gone, and counted as such."""
        self.alive = self.keeping = False
        self.life += 1
        self._void()
        self.part = None
        self.unsent.clear()
        self.closed.clear()
        self.hypervisor.daemon_died()
        self.listens = False
        for queue in (self.gate.queue if self.gate else None, self.held):
            while queue:
                self.world.lost(queue.popleft(), "daemon")

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
        if self.alive and not self.hypervisor.wakes:
            self.world.crashed(self)
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
        self.world.note(self.name, name)
        getattr(self, f"_{name}")(effect)

    def _ok(self, effect: m.Do, number: int = 1, text: str = "") -> None:
        name, back = type(effect).__name__, _back(effect)
        self._done(m.Done(effect=name, number=number, text=text, back=back))

    def _broken(self, effect: m.Do, why: str) -> None:
        self._done(m.Broken(effect=type(effect).__name__, why=why, back=_back(effect)))

    def _Forget(self, effect: m.Do) -> None:
        self._disarm()
        self._ok(effect)

    def _write(self, ops: tuple[Op, ...]) -> None:
        """The handover's own entries; now and then the agent looks just then."""
        self.apply(ops)
        if self.world.random.random() < LOOKS:
            self.look()

    def _ArmPorts(self, effect: m.Do) -> None:
        self._arm(effect, self.world.now_s + READY_LIMIT_S)

    def _arm(self, effect: m.Do, limit_s: float) -> None:
        if self.agent.ready(PORT):
            self.gate = self.gate or Gate()
            self._ok(effect)
        elif self.world.now_s < limit_s:
            self._later(READY_LOOK_S, lambda: self._arm(effect, limit_s))
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
        if new.alive and not self.world.is_cut(self, new):
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
        if self.copy != "running" or not new.keeping or self.world.is_cut(self, new):
            return m.Broken(effect=type(effect).__name__, why="not taken")
        self.world.mirrored(new)
        now_ns = int(self.world.now_s * 1e9) + 1
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
                self._waiting.append(self._in_this_part(lambda: self._beside(effect, stage)))
            elif self.part is not None and self.part.stage == stage:
                self.event(m.Broken(effect=name, why="QEMU ended"))
            return
        self.sent += 1
        new = self.world.hosts[self.world.new]
        broken = new.copy == "none" or self.world.is_cut(self, new)
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
        self.world.later(self.world.short(), self._stop)
        self._ok(effect)

    def _stop(self) -> None:
        """QEMU stops the VM, whether its daemon lives or not."""
        if self.finishing and self.copy == "running":
            self.copy = "sent"
            self.world.later(self.world.short(), lambda: self.world.arrive(self))

    def _ReleaseInto(self, effect: m.Do) -> None:
        assert isinstance(effect, m.ReleaseInto)
        rescued = 0
        if effect.tunnel:
            rescued = len(self.ring)
            while self.ring:
                self.world.tunnel(self, self.ring.popleft())
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
        number = self.world.marker(self, self._in_this_part(lambda: self._turn(effect)))
        self._ask(effect, number, self.world.now_s + MARKER_LIMIT_S)

    def _ask(self, effect: m.SteerHere, number: int, limit_s: float) -> None:
        """A marker can be lost like any frame: it is sent again."""
        if self.world.now_s < limit_s:
            if self.world.awaits(number):
                self._launch_by_device(("marker", number))
                self._later(MARKER_AGAIN_S, lambda: self._ask(effect, number, limit_s))
        elif self.world.forget_marker(number):
            self._turn(effect, proved=False)

    def _turn(self, effect: m.SteerHere, *, proved: bool = True) -> None:
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
        self._write((Op(verb="remove", fact=Muted(port=PORT)),))
        self._ok(effect)

    def _ResumeVm(self, effect: m.Do) -> None:
        if self.copy == "none" and self.part is not None and self.part.role == "new":
            self._done(m.Broken(effect="vm", why="QEMU ended"))
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

    def way(self) -> str | None:
        """Where the kernel sends frames for the VM: to its port, or to an NVE's address."""
        return way(self.kernel.state, DEVICE, MAC)

    def arrived(self, frame: Frame) -> None:
        """A frame for the VM comes in from the underlay: what is not for here goes nowhere."""
        if frame[0] == "marker" and self.listens:
            self.world.marker_seen(frame[1], self)
        elif drops(self.kernel.state, DEVICE, MAC):
            self.world.dropped(frame, self, late=True)
        elif self.way() == PORT:
            self._at_port(frame)
        else:
            self.world.lost(frame, "it does not live here")

    def _at_port(self, frame: Frame) -> None:
        gate = self.gate
        if not self.kernel.has(PORT):
            self.world.lost(frame, "no port")
        elif gate is None or gate.mode == "pass":
            self._ring(frame)
        elif gate.mode == "hold" or gate.queue:
            if self.alive:
                gate.queue.append(frame)
            else:
                self.world.lost(frame, "daemon")
        else:
            self._on(frame)

    def from_tunnel(self, frame: Frame, *, home: bool) -> None:
        """Out of the tunnel: past the gate at the old NVE, like any frame at the new one."""
        if not self.tunnel:
            self.world.lost(frame, "no tunnel")
        elif frame[0] == "marker":
            if self.alive:
                self.world.marker_seen(frame[1], self)
        elif home:
            self._ring(frame)
        else:
            self._at_port(frame)

    def _on(self, frame: Frame) -> None:
        if self.gate is not None and self.gate.into == "tunnel":
            self.world.tunnel(self, frame)
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
            self.world.delivered(self.ring.popleft())

    def send(self, frame: Frame) -> None:
        """A tenant of this host sends to the VM."""
        if self.held is None or self.way() == PORT:
            self._launch(frame)
        elif self.alive:
            self.held.append(frame)
        else:
            self.world.lost(frame, "daemon")

    def _launch_by_device(self, frame: Frame) -> None:
        """As markers go: by the VXLAN device, wherever the bridge would send a tenant's frame."""
        remote = remote_of(self.kernel.state, MAC)
        if remote is None:
            self.world.lost(frame, "no entry")
        else:
            self.world.launch(self, remote, frame)

    def _launch(self, frame: Frame) -> None:
        way = self.way()
        if drops(self.kernel.state, DEVICE, MAC):
            self.world.dropped(frame, self, late=False)
        elif way == PORT:
            self._at_port(frame)
        elif way is None:
            self.world.lost(frame, "nobody knows where it lives")
        else:
            self.world.launch(self, way, frame)


def _back(effect: m.Do) -> bool:
    return isinstance(effect, m.SteerHere) and effect.back


def _entry(host: str) -> tuple[Op, ...]:
    """Frames that leave by the VXLAN device go to `host` (dataplane/handover.py)."""
    return (Op(verb="put", fact=TunnelEntry(device=DEVICE, mac=MAC, remote=address_of(host))),)


def _local(port: str) -> tuple[Op, ...]:
    return (Op(verb="put", fact=BridgeEntry(bridge=BRIDGE, mac=MAC, port=port)),)


def _turned(host: str | None) -> tuple[Op, ...]:
    """This host's own tenants: to the port here, or to `host`."""
    return _local(PORT) if host is None else (*_entry(host), *_local(DEVICE))
