"""A disk that moves alone (R-54): the whole table, and one valid image whatever breaks when."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overland.mobility import messages as m
from overland.mobility.alone import step
from overland.model.cluster import Disk, Vm
from overland.model.handover import ENDED, Handover, Memory, Phase, PhaseAt
from overland.model.receipt import receipt
from overland.nva import storage
from overland.nva.cluster import Cluster
from tests.core.moves import VM, every_event
from tests.core.tables import check_table
from tests.core.test_storage import NOTHING, THERE, state

HOME, FAR = "h1", "h2"
"""The VM's host, and the one that has the image."""

AWAY = msgspec.structs.replace(
    VM,
    host=HOME,
    version=3,
    disks=(Disk(path="own"), Disk(path="data", kind="left", size_bytes=9, at=FAR, since=3)),
)
MOVING = storage.alone(AWAY, "data", (THERE, THERE))
LATE_S = 10_000.0


def planned() -> Handover:
    """As the authority journals it first."""
    return Handover(
        id="m1",
        vm=MOVING,
        mode="storage",
        old_nve=FAR,
        new_nve=HOME,
        ports=(),
        version=3,
        phases=(PhaseAt(phase="planned", at_ns=1),),
    )


_WAY: dict[Phase, m.CoordinatorEvent] = {
    "precopy": m.Start(),
    "paused": m.Received(move="m1", nve=HOME, at_ns=30),
    "equal": m.Stopped(move="m1", nve=HOME, held_ns=0, stop_ns=20, memory=Memory()),
    "committed": m.Committed(version=4, at_ns=40),
    "drained": m.Running(move="m1", nve=HOME, at_ns=50, held=0),
}
STABLE: tuple[Phase, ...] = ("planned", *_WAY, "aborting", "closed", "aborted")


def in_phase(phase: Phase) -> Handover:
    record = planned()
    if phase == "aborting":
        return step(in_phase("paused"), m.Abort(why="test"), 0.0, 1)[0]
    if phase in ENDED:
        return msgspec.structs.replace(record, phase=phase)
    for event in _WAY.values():
        if record.phase != phase:
            record, _ = step(record, event, 0.0, 1)
    return record


COLUMNS: dict[str, Handover] = {phase: in_phase(phase) for phase in STABLE}
COLUMNS["drained, served"] = step(COLUMNS["drained"], m.Served(nve=FAR), 0.0, 1)[0]

EVENTS: dict[str, m.CoordinatorEvent] = {type(each).__name__: each for each in every_event()}
for name in ("Back", "Lost", "Served", "Closed", "Restored"):
    del EVENTS[name]
EVENTS |= {
    "Served": m.Served(nve=FAR),
    "Restored": m.Restored(move="m1", nve=HOME),
    "Closed": m.Closed(move="m1", nve=FAR),
    "Back (VM's)": m.Back(nve=HOME),
    "Back (image's)": m.Back(nve=FAR),
    "Lost (VM's, dead)": m.Lost(nve=HOME, dead=True),
    "Lost (image's, away)": m.Lost(nve=FAR),
    "Lost (image's, dead)": m.Lost(nve=FAR, dead=True),
}


def cell(before: Handover, event: m.CoordinatorEvent) -> str:
    now_s = LATE_S if isinstance(event, m.Tick) else 0.0
    then, effects = step(before, event, now_s, 100)
    did = [f"→ {then.phase}"] if then.phase != before.phase else []
    for effect in effects:
        match effect:
            case m.Task(order=order):
                did.append(type(order).__name__)
            case m.Commit():
                did.append("compare-and-set")
            case m.Serve():
                did.append("Serve")
    return ", ".join(did) or "·"


@pytest.mark.req("R-45")
@pytest.mark.req("R-54")
def test_every_cell_of_the_specified_table_is_what_the_code_does() -> None:
    check_table(
        "disk alone",
        {
            (column, name): cell(record, event)
            for name, event in EVENTS.items()
            for column, record in COLUMNS.items()
        },
    )


def test_a_receipt_of_a_disks_move_says_what_it_can() -> None:
    told = receipt(in_phase("drained"))
    assert (told["mode"], told["version"], told["peers"]["subscribed"]) == ("storage", 3, 0)
    assert told["vm_stop_ms"] == 0.0
    assert told["network_gap_ms"] is None


# ---------------------------------------------------------------- what is refused


@pytest.mark.req("R-54")
def test_a_disk_moves_alone_only_to_its_vm_and_only_when_it_is_away() -> None:
    cluster = Cluster(vms={AWAY.name: AWAY})

    def codes(path: str = "data", to: str = HOME, vms: Cluster = cluster) -> list[str]:
        return [each.code for each in storage.alone_blockers(vms, AWAY.name, path, to)]

    assert codes() == []
    assert codes(path="own") == ["disk_not_left"]
    assert codes(path="other") == ["unknown_disk"]
    assert codes(to="h3") == ["unsupported_target"]
    for fields, code in (
        ({"state": "shutdown"}, "not_running"),
        ({"move": "m9"}, "move_in_progress"),
    ):
        vm = msgspec.convert({**msgspec.to_builtins(AWAY), **fields}, Vm)
        assert codes(vms=Cluster(vms={vm.name: vm})) == [code]
    assert codes(vms=Cluster()) == ["unknown_vm"]


@pytest.mark.req("R-55")
def test_there_must_be_room_for_it_and_nothing_in_its_way() -> None:
    for there, code in (
        (NOTHING, None),
        (THERE, "file_in_the_way"),
        (state(NOTHING, free_bytes=1), "no_space"),
    ):
        found = storage.room_blockers(MOVING, (THERE, THERE), (THERE, there))
        assert [each.code for each in found] == ([code] if code else [])


# ---------------------------------------------------------------- one valid image


class Site:
    """Both hosts, the VM and its record, as values. `images`: the last write that each has."""

    def __init__(self) -> None:
        self.record = planned()
        self.vm = msgspec.structs.replace(AWAY, move="m1")
        self.images: dict[str, int] = {FAR: 0}
        self.written = 0
        self.writes: set[str] = {FAR}
        self.runs = self.lives = True
        self.orders: list[m.Task] = []
        self.now_s = 0.0
        self.hears(m.Start())

    def named(self) -> str:
        return self.vm.disks[1].at or HOME

    def offered(self) -> bool:
        cluster = Cluster(vms={self.vm.name: self.vm}, moves={"m1": self.record})
        return bool(storage.exports(cluster, FAR))

    def hears(self, event: m.CoordinatorEvent) -> None:
        before = self.record
        self.record, effects = step(before, event, self.now_s, 1)
        for effect in effects:
            match effect:
                case m.Task():
                    self.orders.append(effect)
                case m.Serve():
                    self.hears(m.Served(nve=FAR))
                case m.Commit():
                    committed, _ = step(self.record, m.Committed(version=4, at_ns=1), 0.0, 1)
                    self.vm = msgspec.structs.replace(
                        self.vm, disks=storage.brought(self.vm, committed)
                    )
                    self.hears(m.Committed(version=4, at_ns=1))
        self.holds()

    def holds(self) -> None:
        """What must be true at every instant."""
        assert self.images.get(self.named()) == self.written, "the named image has every write"
        assert self.vm.version == AWAY.version
        if self.lives and FAR in self.writes:
            assert self.offered(), "nobody takes the image away from a VM that uses it"

    def write(self) -> None:
        if self.runs and self.lives:
            self.written += 1
            for host in self.writes:
                self.images[host] = self.written
        self.holds()

    def does(self) -> None:
        """Carry out the next order."""
        if not self.orders:
            return
        task = self.orders.pop(0)
        nve = task.nve
        match task.order:
            case m.CopyDisk() if self.lives:
                self.images[HOME], self.writes = self.images[FAR], {FAR, HOME}
                self.hears(m.Received(at_ns=1, move="m1", nve=nve))
            case m.SettleDisk() if self.lives:
                self.runs = False
                self.hears(m.Stopped(held_ns=0, stop_ns=1, memory=Memory(), move="m1", nve=nve))
            case m.CopyDisk() | m.SettleDisk():
                self.hears(m.Failed(step="x", why="QEMU ended", move="m1", nve=nve))
            case m.KeepDisk():
                self.writes = {HOME}
                self.runs = True
                self.hears(m.Running(at_ns=1, held=0, move="m1", nve=nve))
            case m.LeaveDisk():
                self.images.pop(HOME, None)
                self.writes, self.runs = {FAR}, True
                self.hears(m.Restored(move="m1", nve=nve))
            case m.DropImage():
                assert not self.offered()
                self.images.pop(FAR, None)
                self.hears(m.Closed(move="m1", nve=nve))

    def happens(self, what: str) -> None:
        match what:
            case "write":
                self.write()
            case "order":
                self.does()
            case "lost order":
                self.orders[:1] = []
            case "order twice":  # by one connection, so never behind a later one
                self.orders[1:1] = self.orders[:1]
            case "kill QEMU":
                self.lives = False
            case "kill NVA":
                self.orders.clear()
                self.hears(m.Start())
            case "tick":
                self.now_s += LATE_S
                self.hears(m.Tick())
            case "abort":
                self.hears(m.Abort(why="operator"))
            case _:  # back
                self.hears(m.Back(nve=HOME))
                self.hears(m.Back(nve=FAR))


FAULTS = ("lost order", "kill QEMU", "kill NVA", "tick", "abort", "back")


def ended(site: Site) -> None:
    for _ in range(50):
        if site.record.phase in ENDED:
            break
        site.does() if site.orders else site.happens("tick")
    assert site.record.phase in ENDED
    assert set(site.images) == {site.named()}, "one image, and nothing half copied"


@pytest.mark.req("R-54")
@pytest.mark.parametrize("faults", list(itertools.product(FAULTS, range(12))))
def test_whatever_breaks_at_whatever_step_one_image_is_left_and_it_is_the_named_one(
    faults: tuple[str, int],
) -> None:
    site, (fault, at) = Site(), faults
    for number in range(at):
        site.happens("order" if number % 2 else "write")
    site.happens(fault)
    ended(site)


@pytest.mark.req("R-54")
@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(("write", "order", "order", "order twice", *FAULTS))))
def test_whatever_breaks_in_whatever_order_the_named_image_has_every_write(
    what: list[str],
) -> None:
    site = Site()
    for each in what:
        if site.record.phase in ENDED:
            break
        site.happens(each)
    ended(site)
