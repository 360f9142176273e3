"""A simulated host's part in cold moves: the real steps of an NVE on a hypervisor that is a value.

`ColdSteps` is the real one (nve/cold.py); what it awaits here are seconds of the seeded clock.
Processes and files outlive the daemon, what it waits for does not.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Sequence
from types import coroutine
from typing import TYPE_CHECKING, Any, Literal, cast

from overland.mobility import messages as m
from overland.model.cluster import Disk, Vm
from overland.model.ticket import Ticket
from overland.nve.cold import ColdSteps
from overland.ports import Hypervisor, HypervisorFailure, Images, KernelFailure, RunState
from overland.sim.domain import address_of, host_at

if TYPE_CHECKING:
    from overland.sim.host import SimHost

LOOK_S, READY_LIMIT_S, GIVE_LIMIT_S = 0.005, 10.0, 30.0

Migration = Literal["none", "active", "completed", "failed"]


@coroutine
def wait(seconds: float) -> Generator[float, None, None]:
    """Let so much of the seeded clock pass."""
    yield seconds


class SimHypervisor:
    """QEMU's process and its files, as far as cold moves use them (hypervisor/qemu.py).

    A state is the instant of the VM at which it was saved: how often it had begun to run. `saved`
    is the VM's own state, `saving` one that is being written, `taken` those of moves.
    """

    def __init__(self, host: SimHost) -> None:
        self._host = host
        self.memory = 0
        self.saved: int | None = None
        self.saving: int | None = None
        self.taken: dict[str, int] = {}
        self.migration: Migration = "none"
        self._loading = False
        self._takes: set[str] = set()
        self._ran = False
        self.wakes = False

    def daemon_died(self) -> None:
        """Nobody listens any more; files that were not whole are gone with the next start."""
        self._takes.clear()
        self._ran = self.wakes = False

    def daemon_started(self) -> None:
        """Of a process and a state beside it one is the VM (HO-55)."""
        if self._host.copy == "running":
            self.saved = None
        elif self.saved is not None:
            self._end()

    def process_died(self) -> None:
        """SIGKILL of QEMU: with it what it was writing."""
        self.saving, self.migration, self._loading = None, "none", False

    # ------------------------------------------------------------ the port

    async def state(self, vm: str) -> RunState | None:
        del vm
        if self._host.copy == "none":
            return None
        if self._host.copy == "running":
            return "running"
        if self._loading:
            return "incoming"
        return "sent" if self.migration == "completed" else "paused"

    async def suspend(self, vm: str) -> int:
        if self._host.copy == "none":
            if self.saved is None:
                raise HypervisorFailure(f"no process of {vm} here")
            return 0
        if self.migration != "active":
            if await self.state(vm) != "sent":
                await self._begin_saving()
            elif self.saving is None and self.saved is None:
                raise HypervisorFailure(f"QEMU of {vm} has sent its state, which is not here")
        while self.migration == "active":
            await wait(LOOK_S)
        self._alive()
        if self.migration == "failed":
            self.saving = None
            if self._ran:
                await self.resume(vm)
            raise HypervisorFailure("its state could not be saved (disk full?)")
        await self._end_saved()
        return 1

    async def _begin_saving(self) -> None:
        self._ran = self._host.copy == "running"
        await self._pause()
        self.migration, self.saving = "active", self.memory
        self._host.agenda.later(self._host.agenda.short(), self._written)

    async def _pause(self) -> None:
        await wait(self._host.agenda.short())
        self._alive()
        if self._host.copy == "running":
            self.memory = self._host.world.copies.instant
            self._host.copy = "paused"

    def _written(self) -> None:
        """QEMU's own doing, whether its daemon lives or not."""
        if self.migration == "active":
            self.migration = "failed" if self._host.disk_full else "completed"

    async def _end_saved(self) -> None:
        if self.saving is not None:
            self.saved, self.saving = self.saving, None
        self._end()

    def _end(self) -> None:
        self._host.copy, self.migration, self._loading = "none", "none", False

    def _alive(self) -> None:
        if self._host.copy == "none":
            raise HypervisorFailure("QEMU ended")

    async def resume(self, vm: str) -> int:
        del vm
        await wait(self._host.agenda.short())
        self._alive()
        if self._loading:
            raise HypervisorFailure("it does not run on: incoming")
        if self._host.copy != "running":
            self._host.world.copies.runs_on(self._host.name, self.memory)
            self.migration = "none"
            self._host.copy = "running"
            self._host.deliver()
        return 1

    async def wake(self, vm: Vm, ports: Sequence[str]) -> int:
        del ports
        if self._host.copy == "none":
            if self.saved is None:
                raise HypervisorFailure("there is no saved state here")
            self._host.copy, self.memory, self._loading = "paused", self.saved, True
            self.wakes = True
            self._host.agenda.later(self._host.agenda.short(), self._loaded)
        while self._loading:
            await wait(LOOK_S)
        self._alive()
        if vm.state != "paused":
            await self.resume(vm.name)
        await wait(0.0002)
        self.saved, self.wakes = None, False
        return 1

    def _loaded(self) -> None:
        self._loading = False

    async def back_to(self, vm: Vm, ports: Sequence[str]) -> None:
        if self._host.copy == "none":
            await self.wake(vm, ports)
            return
        if self.migration == "active":
            self.migration = "none"
        whole = self.migration == "completed" and (self.saving, self.saved) != (None, None)
        if vm.state == "paused" and whole:
            await self._end_saved()
            await self.wake(vm, ports)
            return
        self.saving = self.saved = None
        if vm.state != "paused" and self._host.copy != "running":
            await self.resume(vm.name)

    async def saved_bytes(self, vm: str) -> int:
        del vm
        return 1 if self.saved is not None else 0

    async def take_state(self, move: str, listen: str) -> str:
        self._takes.add(move)
        return f"state:{listen}|{move}"

    async def give_state(self, vm: str, uri: str) -> int:
        del vm
        address, move = uri.removeprefix("state:").split("|")
        agenda, new = self._host.agenda, self._host.world.hosts[host_at(address)]
        limit_s = agenda.now_s + GIVE_LIMIT_S
        await wait(agenda.short())
        while self._host.world.underlay.is_cut(self._host, new):
            await wait(0.1)
            if agenda.now_s > limit_s:
                raise HypervisorFailure("state not taken: no answer")
        if self.saved is None or not new.hypervisor.takes(move, self.saved):
            raise HypervisorFailure("state not taken")
        await wait(agenda.short())
        return 1

    def takes(self, move: str, state: int) -> bool:
        """Somebody gives the state for `move`; whether it is whole on this disk."""
        if move not in self._takes or self._host.disk_full:
            return False
        self._takes.remove(move)
        self.taken[move] = state
        return True

    def moves(self) -> list[str]:
        """The moves for which a state was taken, or is waited for."""
        return sorted({*self.taken, *self._takes})

    async def drop_taken(self, move: str) -> None:
        self._takes.discard(move)
        self.taken.pop(move, None)

    async def keep_state(self, vm: str, move: str) -> None:
        self._takes.discard(move)
        if move in self.taken:
            self.saved = self.taken.pop(move)
        elif self._host.copy == "none" and self.saved is None:
            raise HypervisorFailure(f"the state of VM {vm} is not here any more")

    async def stop(self, vm: str) -> None:
        del vm
        self.end_all()

    def end_all(self) -> None:
        """Process and state are of no use any more."""
        self._end()
        self.saved = self.saving = None


class NoImages:
    """The simulated VM has no disk that goes along."""

    async def take(self, move: str, disks: Sequence[Disk], listen: str) -> list[str]:
        del move, disks, listen
        return []

    async def keep_taken(self, move: str, disks: Sequence[Disk]) -> None: ...

    async def drop_taken(self, move: str, disks: Sequence[Disk]) -> None: ...

    def remove(self, disks: Sequence[Disk]) -> None: ...


class _Job:
    def __init__(self, order: m.ColdOrder, work: Coroutine[Any, Any, m.AnyReport]) -> None:
        self.order = order
        self.work = work


class SimColdMoves:
    """One daemon's life: as `nve.cold.ColdMoves`, one order of a move at a time."""

    def __init__(self, host: SimHost) -> None:
        self._host = host
        self._steps = ColdSteps(
            host.name,
            address_of(host.name),
            cast("Hypervisor", host.hypervisor),
            cast("Images", NoImages()),
            self,
            cast("Callable[[Any], Ticket | str]", lambda ticket: ticket or "no ticket"),
            lambda _vm, _state: None,
            host.agenda.now_ns,
        )
        self._at_work: dict[str, _Job] = {}

    async def ready(self, port: str) -> None:
        limit_s = self._host.agenda.now_s + READY_LIMIT_S
        while not self._host.agent.ready():
            await wait(LOOK_S)
            if self._host.agenda.now_s > limit_s:
                raise KernelFailure(f"{port} did not come up")

    async def dropped_in_transit(self, bridge: str, mac: str) -> dict[str, int]:
        del bridge, mac
        return {}

    def order(self, order: m.ColdOrder) -> None:
        if not self._steps.still(order):
            return
        former = self._at_work.get(order.move)
        if former is not None:
            if type(former.order) is type(order):
                return
            former.work.close()
        job = self._at_work[order.move] = _Job(order, self._steps.carry_out(order))
        self._host.world.note(self._host.name, type(order).__name__)
        self._go_on(job)

    def stop_stale(self, vm: Vm, *, may_be_last: bool) -> None:
        """The NVA says that this host's copy is not the VM (daemon/nve.py, `_vm_do`)."""
        if not (may_be_last and self._host.copy == "none"):
            self._host.world.note(self._host.name, f"stops {vm.name}")
            self._host.hypervisor.end_all()

    def _go_on(self, job: _Job) -> None:
        if self._at_work.get(job.order.move) is not job:
            return
        try:
            seconds = job.work.send(None)
        except StopIteration as end:
            del self._at_work[job.order.move]
            self._host.report(end.value)
            return
        self._host.while_it_lives(seconds, self._go_on, job)


def has_vm(host: SimHost) -> bool:
    """Whether `host` has a process or a state of its own of the VM, for its Hello."""
    return host.copy != "none" or host.hypervisor.saved is not None
