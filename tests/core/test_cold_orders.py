"""An NVE's orders of cold moves on a hypervisor in memory: repeated, refused, overtaken."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import msgspec
import pytest

from overland.mobility import messages as m
from overland.model.cluster import Disk, Network, Vm, VmState, moved_disks
from overland.model.names import router_name
from overland.model.nve import InTransit, NveIntent
from overland.model.ticket import Seal, Ticket, ticket_of
from overland.nva.cluster import Cluster
from overland.nva.mapping import VnView
from overland.nve.cold import ColdMoves, ColdSteps, may_be_last
from overland.nve.render import render
from overland.ports import Hypervisor, HypervisorFailure, Images
from tests.core.cold_moves import after, cold
from tests.core.moves import NEW, OLD, PORT, VM, WITH_DISK
from tests.core.test_mapping import BLUE, cluster

SEAL = Seal(ticket=b"", signature=b"", certificate=b"")


class FakeImages:
    """Images of a host: `own` are VMs' own, `brought` by a move and nobody's yet; by path."""

    def __init__(self) -> None:
        self.own: set[str] = set()
        self.brought: dict[str, set[str]] = {}

    async def take(self, move: str, disks: tuple[Disk, ...], listen: str) -> list[str]:
        self.brought[move] = {disk.path for disk in disks}
        return [f"state:{listen}|{disk.path}" for disk in disks]

    async def give(self, disk: Disk, uri: str) -> int:
        assert disk.path in self.own
        assert uri.endswith(disk.path)
        return 64

    async def keep_taken(self, move: str, disks: tuple[Disk, ...]) -> None:
        self.own |= self.brought.pop(move, set())

    async def drop_taken(self, move: str, disks: tuple[Disk, ...]) -> None:
        self.brought.pop(move, None)

    def remove(self, disks: tuple[Disk, ...]) -> None:
        self.own -= {disk.path for disk in disks}


class FakeHost:
    """A hypervisor and its ground: `here` is the state of web's copy, `files` by name."""

    def __init__(self, here: str | None = None) -> None:
        self.here = here
        self.files: set[str] = set()
        self.giving = asyncio.Event()
        self.bad_state = False
        self.said: asyncio.Queue[m.AnyReport] = asyncio.Queue()
        self.seen: dict[str, str | None] = {}
        self.dropped = {"ovt1": 3, PORT.device: 2}
        self.images = FakeImages()

    async def ready(self, port: str) -> None:
        assert port == PORT.port

    async def dropped_in_transit(self, bridge: str, mac: str) -> dict[str, int]:
        assert (bridge, mac) == ("ovb42", PORT.mac)
        return dict(self.dropped)

    async def state(self, vm: str) -> str | None:
        return self.here

    async def stop(self, vm: str) -> None:
        self.here = None
        self.files.discard(vm)

    async def suspend(self, vm: str) -> int:
        if self.here is None and vm not in self.files:
            raise HypervisorFailure("no process here")
        stopped = self.here is not None
        self.here = None
        self.files.add(vm)
        return 20 if stopped else 0

    async def saved_bytes(self, vm: str) -> int:
        return 9 if vm in self.files else 0

    async def take_state(self, move: str, listen: str) -> str:
        self.files.add(move)
        return f"state:{listen}"

    async def give_state(self, vm: str, uri: str) -> int:
        await self.giving.wait()
        return 9

    async def keep_state(self, vm: str, move: str) -> None:
        if not self.files & {move, vm} and self.here is None:
            raise HypervisorFailure("not here any more")
        if move in self.files:
            self.files.remove(move)
            self.files.add(vm)

    async def drop_taken(self, move: str) -> None:
        self.files.discard(move)

    async def wake(self, vm: Vm, ports: list[str]) -> int:
        if self.here is None and (self.bad_state or vm.name not in self.files):
            raise HypervisorFailure("no whole state")
        self.here = vm.state
        self.files.discard(vm.name)
        return 50

    async def back_to(self, vm: Vm, ports: list[str]) -> None:
        await self.wake(vm, ports)


def moves(host: FakeHost, nve: str = NEW, ticket: Ticket | str = "forged") -> ColdMoves:
    hypervisor = cast("Hypervisor", host)
    seen, images = host.seen.__setitem__, cast("Images", host.images)
    steps = ColdSteps(
        nve, "192.0.2.2", hypervisor, images, host, lambda _: ticket, seen, time.time_ns
    )
    return ColdMoves(steps, host.said.put_nowait)


def order(kind: type[m.Cold], vm: Vm = VM, **more: Any) -> Any:
    return kind(move="m1", vm=vm, ports=(PORT,), **more)


async def answer(host: FakeHost, to: ColdMoves, given: Any) -> m.AnyReport:
    to.order(given)
    return await host.said.get()


def ticket() -> Ticket:
    return ticket_of(cold(), 2, 2**62)


@pytest.mark.req("R-58")
@pytest.mark.parametrize("kind", [m.WakeUp, m.DropState])
async def test_without_a_ticket_nothing_wakes_and_nothing_goes(kind: type[m.Cold]) -> None:
    """R-58: of a forged order, and of one for another VM, move or version."""
    other = msgspec.structs.replace(ticket(), base_version=7)
    for found in ("forged", other):
        host = FakeHost()
        host.files = {"m1", "web"}
        said = await answer(host, moves(host, ticket=found), order(kind, version=2, seal=SEAL))
        assert isinstance(said, m.Failed)
        assert said.step == "ticket"
        assert (host.here, host.files) == (None, {"m1", "web"})


@pytest.mark.req("R-14")
async def test_every_order_may_be_repeated() -> None:
    """HO-42: after a restart nobody knows which of them was carried out."""
    old, new = FakeHost("running"), FakeHost()
    at_old, at_new = moves(old, OLD, ticket()), moves(new, NEW, ticket())
    old.giving.set()
    for _ in range(2):
        assert isinstance(await answer(new, at_new, order(m.Associate)), m.Prepared)
    for stop_ns in (20, 0):
        stopped = await answer(old, at_old, order(m.Suspend))
        assert isinstance(stopped, m.Stopped)
        assert (stopped.stop_ns, stopped.memory.total_bytes) == (stop_ns, 9)
    for _ in range(2):
        assert isinstance(await answer(new, at_new, order(m.Associate)), m.Prepared)
        assert isinstance(await answer(old, at_old, order(m.GiveState, uri="u")), m.Received)
    for _ in range(2):
        woken = await answer(new, at_new, order(m.WakeUp, version=2, seal=SEAL))
        assert isinstance(woken, m.Running)
        assert (new.here, new.files) == ("running", set())
    for _ in range(2):
        closed = await answer(old, at_old, order(m.DropState, version=2, seal=SEAL))
        assert isinstance(closed, m.Closed)
        assert (old.here, old.files) == (None, set())


@pytest.mark.req("R-33")
async def test_what_came_from_others_is_residual_at_the_old_nve_only() -> None:
    for nve, expected in ((OLD, (3, 2)), (NEW, (5, 0))):
        host = FakeHost()
        closed = await answer(host, moves(host, nve), order(m.Count))
        assert isinstance(closed, m.Closed)
        assert (closed.packets.dropped["in_transit"], closed.packets.residual) == expected


async def test_the_order_to_turn_back_does_not_wait_for_a_state_on_its_way() -> None:
    host = FakeHost("running")
    at = moves(host, OLD)
    await answer(host, at, order(m.Suspend))
    at.order(order(m.GiveState, uri="u"))
    at.order(order(m.GiveState, uri="u"))
    await asyncio.sleep(0)
    assert isinstance(await answer(host, at, order(m.Return)), m.Restored)
    assert (host.here, host.files, host.said.qsize()) == ("running", set(), 0)


async def test_a_vm_that_crashed_meanwhile_is_not_made_again() -> None:
    host = FakeHost()
    assert isinstance(await answer(host, moves(host, OLD), order(m.Return)), m.Restored)
    assert host.here is None


async def test_a_state_that_does_not_wake_stays_on_the_disk_as_the_vms_own() -> None:
    host = FakeHost()
    host.files, host.bad_state = {"m1"}, True
    wake = order(m.WakeUp, version=2, seal=SEAL)
    said = await answer(host, moves(host, ticket=ticket()), wake)
    assert isinstance(said, m.Crashed)
    assert host.files == {"web"}


@pytest.mark.parametrize("state", ["running", "suspended"])
async def test_a_state_that_is_gone_from_the_new_host_is_said(state: Any) -> None:
    """HO-43: else the old host would drop the only good one."""
    host, vm = FakeHost(), msgspec.structs.replace(VM, state=state)
    wake = order(m.WakeUp, vm, version=2, seal=SEAL)
    said = await answer(host, moves(host, ticket=ticket()), wake)
    assert isinstance(said, m.Crashed)
    assert host.seen == {}


@pytest.mark.parametrize(("state", "left"), [("running", set()), ("suspended", {"web"})])
async def test_an_old_state_stays_while_the_vm_sleeps_elsewhere(state: Any, left: set[str]) -> None:
    """HO-43: it may be the last good one; a new move there puts its own in its place."""
    host, vm = FakeHost(), msgspec.structs.replace(VM, state=state)
    host.files = {"web"}
    assert may_be_last(vm, NEW) is bool(left)
    assert not may_be_last(vm, OLD)
    await answer(host, moves(host), order(m.Associate, vm))
    assert host.files == {*left, "m1"}, "and what comes is awaited"


@pytest.mark.req("R-48")
@pytest.mark.parametrize(("state", "here"), [("paused", "paused"), ("suspended", None)])
async def test_a_vm_wakes_no_further_than_it_was(state: str, here: str | None) -> None:
    host = FakeHost()
    host.files = {"m1"}
    vm = msgspec.structs.replace(VM, state=state)
    wake = order(m.WakeUp, vm, version=2, seal=SEAL)
    assert isinstance(await answer(host, moves(host, ticket=ticket()), wake), m.Running)
    assert host.here == here
    assert host.seen == {"web": state}, "the next Hello says so, else it would count as crashed"


async def test_a_copy_that_runs_here_is_not_touched() -> None:
    host = FakeHost("running")
    assert isinstance(await answer(host, moves(host), order(m.Associate)), m.Failed)
    assert host.here == "running"


def in_transit(now: Cluster, host: str, network: Network = BLUE) -> set[str]:
    """The ports at which `host` drops what is for web."""
    state = render(NveIntent(vns=(VnView(now, network).intent(host),)))
    assert {type(each) for each in state.in_transit} <= {InTransit}
    return {each.port for each in state.in_transit}


@pytest.mark.req("R-33")
def test_others_drop_first_the_old_nve_last_and_nobody_once_it_runs() -> None:
    """From record to kernel: staged, paused, converging; and the mapping stays all the while."""
    now = cluster("migrating")
    now.vms["web"] = msgspec.structs.replace(now.vms["web"], move="m1")
    for record, here, there in (
        (after("planned", 1), False, False),
        (after("staged", 1), False, True),
        (after("paused", 2), True, True),
        (after("committed", 1), True, True),
        (after("converging", 1), False, False),
    ):
        now.moves["m1"] = record
        assert bool(in_transit(now, "h1")) is here, record.phase
        assert bool(in_transit(now, "h2")) is there, record.phase
        assert ("ovx42" in in_transit(now, "h2")) is there
        assert len(VnView(now, BLUE).intent("h2").remotes) == 1


@pytest.mark.req("R-33")
def test_in_a_routed_network_the_router_is_where_tenants_enter() -> None:
    now = cluster("migrating")
    now.networks["blue"] = routed = msgspec.structs.replace(BLUE, kind="l3")
    now.vms["web"] = msgspec.structs.replace(now.vms["web"], move="m1")
    now.moves["m1"] = after("paused", 2)
    for host in ("h1", "h2"):
        assert router_name(42) in in_transit(now, host, routed)
        assert router_name(42) not in in_transit(now, host, BLUE)


@pytest.mark.req("R-34")
@pytest.mark.req("R-56")
@pytest.mark.parametrize("state", ["running", "suspended", "shutdown"])
async def test_disks_that_go_along_are_carried_beside_the_state(state: VmState) -> None:
    """Removed at the old host at the end only; each order may be repeated."""
    vm = msgspec.structs.replace(WITH_DISK, state=state)
    paths = {disk.path for disk in moved_disks(vm)}
    old, new = FakeHost(), FakeHost()
    old.files, old.images.own = {"web"}, set(paths)
    old.giving.set()
    at_old, at_new = moves(old, OLD, ticket()), moves(new, NEW, ticket())
    for _ in range(2):
        taking = await answer(new, at_new, order(m.Associate, vm))
        assert isinstance(taking, m.Prepared)
        assert bool(taking.uri) == (state != "shutdown")
        uris = {"uri": taking.uri, "disks_uri": taking.disks_uri}
        given = await answer(old, at_old, order(m.GiveState, vm, **uris))
        assert isinstance(given, m.Received)
        assert given.storage.sent_bytes == 64 * len(paths)
    for _ in range(2):
        woken = await answer(new, at_new, order(m.WakeUp, vm, version=2, seal=SEAL))
        assert isinstance(woken, m.Running)
    assert (old.images.own, new.images.own) == (paths, paths)
    assert new.here == ("running" if state == "running" else None)
    for _ in range(2):
        dropped = await answer(old, at_old, order(m.DropState, vm, version=2, seal=SEAL))
        assert isinstance(dropped, m.Closed)
    assert old.images.own == set()


async def test_a_move_that_turns_back_drops_what_it_took() -> None:
    """Count drops nothing: after the commit it may be all that there is of the VM (HO-52)."""
    new = FakeHost()
    at_new = moves(new)
    await answer(new, at_new, order(m.Associate, WITH_DISK))
    assert isinstance(await answer(new, at_new, order(m.Count, WITH_DISK)), m.Closed)
    assert (new.images.brought, new.files) == ({"m1": {"data"}}, {"m1"})
    for _ in range(2):
        assert isinstance(await answer(new, at_new, order(m.DropCopy, WITH_DISK)), m.GivenBack)
        assert (new.images.own, new.images.brought, new.files) == (set(), {}, set())


@pytest.mark.req("R-14")
@pytest.mark.parametrize("last", [m.Return, m.DropCopy, m.Count])
async def test_an_order_from_before_the_end_of_its_move_is_nothing(last: type[m.ColdOrder]) -> None:
    """HO-69: what had been asked before the move turned back, and comes after that."""
    host = FakeHost("running")
    at = moves(host, OLD)
    await answer(host, at, order(last))
    here, files = host.here, set(host.files)
    for late in (order(m.Associate), order(m.Suspend), order(m.GiveState, uri="u")):
        at.order(late)
    await asyncio.sleep(0)
    await answer(host, at, order(m.Count))
    assert (host.here, host.files, host.said.qsize()) == (here, files, 0)
    other = msgspec.structs.replace(order(m.Suspend), move="m2")
    assert isinstance(await answer(host, at, other), m.Stopped), "of another move it is an order"
