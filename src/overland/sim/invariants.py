"""What must hold: after every step, and at the end of a move."""

from __future__ import annotations

from typing import TYPE_CHECKING

from overland.mobility import coordinator
from overland.model.handover import Handover
from overland.sim.agent import rendered
from overland.sim.kernel import difference

if TYPE_CHECKING:
    from overland.sim.host import SimHost
    from overland.sim.world import World


class Violation(Exception):
    """An invariant does not hold; the text says which and how."""


class Copies:
    """Where copies of the VM run, where the record says it is, and which instant of its life it is.

    `instant` counts how often it has begun to run: a state is the instant at which it was saved.
    """

    def __init__(self) -> None:
        self.instant = 0
        self._running: set[str] = set()
        self._recorded = ""
        self.touched = False

    def changed(self, host: str, *, runs: bool) -> None:
        """The copy on `host` runs, or does not."""
        if runs and host not in self._running:
            self.instant += 1
        (self._running.add if runs else self._running.discard)(host)
        self.touched = True

    def recorded(self, host: str) -> None:
        """From now on `host` is where the record says that the VM is."""
        self._recorded = host
        self.touched = True

    def runs_on(self, host: str, memory: int) -> None:
        """A copy is about to run on `host` from a state: the newest, or time goes back."""
        if memory != self.instant:
            raise Violation(f"{host} runs on from state {memory}, the VM was at {self.instant}")

    def check(self) -> None:
        """After every step that touched either: one copy runs at most, where the record says."""
        self.touched = False
        running = self._running
        if len(running) > 1:
            raise Violation(f"two copies run: {sorted(running)}")
        if running and self._recorded not in running:
            raise Violation(f"a copy runs on {running}, the record says {self._recorded}")


def verdict(world: World, move: str) -> Handover:
    """At the end: the move has ended, the VM runs once, nothing of the move is left."""
    if world.nva.record is not None:
        raise Violation(f"the move did not end: it is {world.nva.record.phase}")
    record = world.nva.authority.ended_moves[move]
    vm = world.hosts[world.nva.vm_host]
    if not _is_as_it_must(world, vm, record) and vm.name not in world.faults.killed:
        raise Violation(f"the VM is not as it must be on {vm.name}: {vm.copy}")
    for host in world.hosts.values():
        _check_nothing_left(world, host, vm, record)
        _check_states(world, host, vm, record)
    _check_told(world, vm, record)
    world.nva.former.verdict(record)
    _check_converged(world)
    return record


def check_frames(world: World) -> None:
    """Where no fault costs frames each one has arrived."""
    books = world.underlay.books
    missing = books.sent - len(books.delivered)
    if missing and world.plan.lossless:
        raise Violation(f"{missing} frames were lost: {books.lost}")


def _is_as_it_must(world: World, vm: SimHost, record: Handover) -> bool:
    """A hot move leaves the VM running; a cold one as it was, or asleep, and says so."""
    before = world.plan.cold or "running"
    moved_cold = record.mode == "cold" and record.outcome == "moved"
    must = record.ends_as if moved_cold else before
    asleep = vm.copy == "none" and vm.hypervisor.saved == world.copies.instant
    match must:
        case "running" | "paused":
            return vm.copy == must
        case "suspended":
            # It woke, and nobody heard of it before its NVE was given up.
            return asleep or vm.copy == before
        case _:
            return vm.copy == "none"


def _check_nothing_left(world: World, host: SimHost, vm: SimHost, record: Handover) -> None:
    if host.part is not None or host.kept is not None:
        raise Violation(f"{host.name} still has a part: {host.part and host.part.stage}")
    if host.gate is not None or host.tunnel or host.held is not None:
        raise Violation(f"{host.name} still has a gate, a tunnel or a queue")
    if host.copy != "none" and host is not vm:
        raise Violation(f"a copy is left on {host.name}: {host.copy}")
    if host.keeping or (host.checkpoint and not coordinator.recoverable(record)):
        raise Violation(f"{host.name} still takes or keeps checkpoints")


def _check_states(world: World, host: SimHost, vm: SimHost, record: Handover) -> None:
    """No state is left that is older than the VM; a second one only while the VM sleeps."""
    left, instant = host.hypervisor, world.copies.instant
    if left.taken or left.saving is not None:
        raise Violation(f"{host.name} still has a state that it took, or one half written")
    if left.saved is None:
        return
    if host is not vm and host.name == record.old_nve and record.ends_as == "crashed":
        return  # perhaps the VM ran on: nobody wakes this state, and it goes when the VM is up
    if left.saved != instant:
        raise Violation(f"{host.name} has state {left.saved}, the VM is at {instant}")
    asleep = vm.hypervisor.saved is not None or vm.name in world.faults.killed
    if host is not vm and not (asleep and record.ends_as == "suspended"):
        raise Violation(f"{host.name} still has the VM's state")


def _check_told(world: World, vm: SimHost, record: Handover) -> None:
    """What `vm show` says of the VM after a cold move is what its host has."""
    told, seen = world.nva.vm().state, vm.seen()
    seen = "shutdown" if world.plan.cold == "shutdown" and seen == "crashed" else seen
    if record.mode == "cold" and told != seen:
        raise Violation(f"the record says that the VM is {told}, it is {seen}")


def _check_converged(world: World) -> None:
    """Every NVE has the newest of what the NVA holds, and its kernel that and nothing else."""
    view = world.nva.subscribers.view()
    for host in world.hosts.values():
        intent = host.agent.intent
        if intent is None or intent.vns != (view.intent(host.name),):
            raise Violation(f"{host.name} was not told: it has {intent}")
        wanted = rendered(intent)
        if host.kernel.state != wanted:
            what = difference(host.kernel.state, wanted)
            raise Violation(f"the kernel of {host.name} is not as its intent: {what}")
