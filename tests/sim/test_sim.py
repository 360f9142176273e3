"""The simulation in CI: twenty thousand seeds, and those that once found something."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from overland.mobility import messages as m
from overland.model.cluster import Interface, Vm, VmState
from overland.model.handover import OLD_NVE_ACTION, Handover, Phase
from overland.model.readdress import Readdress
from overland.nva import cluster, handovers
from overland.nva.authority import Authority
from overland.sim import nva, run
from overland.sim.cold import SimHypervisor
from overland.sim.faults import Plan
from overland.sim.host import SimHost
from overland.sim.invariants import Copies, Violation
from overland.sim.world import World

FOUND = Path(__file__).parent / "found.txt"
SEEDS, COLD_SEEDS, CHUNK = 20_000, 10_000, 500


def found_seeds() -> list[tuple[int, int, str]]:
    lines = [line.split() for line in FOUND.read_text().splitlines() if line[0] != "#"]
    return [(int(seed), int(moves), mode) for seed, moves, mode, *_ in lines]


def chunk(first: int, mode: run.Mode) -> int | None:
    return run.first_failing(first, first + CHUNK, 1, mode)


@pytest.mark.req("R-14")
@pytest.mark.req("R-45")
@pytest.mark.req("R-42")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("mode", "seeds"), [("hot", SEEDS), ("cold", COLD_SEEDS)])
def test_twenty_thousand_seeds(mode: run.Mode, seeds: int) -> None:
    """At most one copy runs, every move ends, every subscriber converges, nothing is left."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(chunk, range(0, seeds, CHUNK), repeat(mode))
        failed = [seed for seed in found if seed is not None]
    assert failed == [], run.failing(failed[0], 1, mode)


@pytest.mark.parametrize(("seed", "moves", "mode"), found_seeds())
def test_seeds_that_once_found_something(seed: int, moves: int, mode: run.Mode) -> None:
    assert run.failing(seed, moves, mode) is None


@pytest.mark.req("R-11")
@pytest.mark.timeout(300)
def test_a_warm_move_ends_and_mirroring_with_it_whatever_fails() -> None:
    """R-11: nothing is taken after the end, and a checkpoint stays only when the VM is lost."""
    assert run.first_failing(0, 3000, 2, "warm") is None


@pytest.mark.req("R-25")
@pytest.mark.timeout(300)
def test_a_change_of_address_is_whole_whatever_fails() -> None:
    """Both are known to every NVE of an open move; then one is left, and the record says when."""
    assert run.first_failing(0, 1000, 3, "readdress") is None


def nothing_beside(interface: Interface, open_one: Readdress | None) -> tuple[()]:
    del interface, open_one
    return ()


async def forgets(self: Authority, move_id: str) -> bool:
    """Says that it has given up what it has not."""
    del self, move_id
    return True


async def commits_it_only(self: Authority, record: Handover) -> None:
    """The place, and not the addresses."""
    await COMMIT(self, msgspec.structs.replace(record, readdress=None))


COMMIT = Authority.commit


@pytest.mark.parametrize(
    ("where", "name", "planted"),
    [
        (cluster, "beside", nothing_beside),
        (Authority, "give_up", forgets),
        (Authority, "commit", commits_it_only),
    ],
)
def test_a_bug_planted_in_a_change_of_address_is_found(
    where: Any, name: str, planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, planted)
    assert run.first_failing(0, 50, 3, "readdress") is not None


@pytest.mark.req("R-33")
@pytest.mark.parametrize("state", ["running", "paused", "suspended", "shutdown"])
def test_without_faults_a_cold_move_leaves_the_vm_as_it_was(state: VmState) -> None:
    """R-33: the one loss is of what was sent while the address was in transit."""
    for seed in range(50):
        world = World(seed)
        record = world.run(Plan(frames=40, cold=state))
        assert (record.outcome, record.ends_as) == ("moved", state)
        if state == "running":
            books = world.underlay.books
            assert {why for _, why in books.lost} <= {"in transit", "port removed"}
            assert len(books.delivered) + len(books.lost) == 40


def keeps_it_beside(self: SimHypervisor) -> None:
    """After a restart both a process and its state."""
    del self


def drops_what_is_back(record: Handover, _nve: str, _vm: Vm | None) -> m.ColdOrder:
    return m.DropCopy(move=record.id, vm=record.vm, ports=record.ports)


def nobody(record: Handover, vm: Vm | None) -> tuple[()]:
    del record, vm
    return ()


def always(vm: Vm, nve: str) -> bool:
    del vm, nve
    return True


@pytest.mark.req("R-14")
@pytest.mark.parametrize(
    ("first", "where", "name", "planted"),
    [
        (5_000, SimHypervisor, "daemon_started", keeps_it_beside),
        (7_000, handovers, "_last_order_cold", drops_what_is_back),
        (8_000, nva, "farewells", nobody),
        (0, nva, "may_be_last", always),
    ],
)
def test_a_bug_planted_in_cold_moves_is_found(
    first: int, where: Any, name: str, planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the simulation would not notice it does not test; some take two faults just so."""
    monkeypatch.setattr(where, name, planted)
    assert run.first_failing(first, first + 1000, 1, "cold") is not None


def test_a_warm_move_loses_no_frame() -> None:
    for seed in range(50):
        world = World(seed)
        record = world.run(Plan(frames=40, checkpoints=2))
        assert (record.outcome, record.checkpoints.count) == ("moved", 2)
        assert len(world.underlay.books.delivered) == world.underlay.books.sent == 40


@pytest.mark.req("R-36")
def test_without_faults_every_frame_arrives_once_and_in_order() -> None:
    for seed in range(50):
        world = World(seed)
        record = world.run(Plan(frames=40))
        assert record.outcome == "moved"
        assert len(world.underlay.books.delivered) == world.underlay.books.sent == 40


def action(old: SimHost) -> str:
    """What the old NVE does now with a frame for the VM."""
    if old.gate is None:
        return "deliver" if old.copy == "running" else "drop"
    if old.gate.mode == "pass":
        return "deliver"
    if old.gate.mode == "hold" or old.gate.queue:
        return "hold"
    return "redirect" if old.gate.into == "tunnel" else "deliver"


class AfterEachStep(Copies):
    """Looks after each step, whether it has touched anything or not."""

    def __init__(self, world: World, look: Callable[[], None]) -> None:
        super().__init__()
        self._look = look
        self.recorded(world.nva.vm_host)
        self.changed(world.nva.vm_host, runs=True)

    @property
    def touched(self) -> bool:
        return True

    @touched.setter
    def touched(self, touched: bool) -> None:
        del touched

    def check(self) -> None:
        super().check()
        self._look()


class Watched(World):
    """Notes what the old NVE does with a frame when a phase begins, and ever in that phase."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.copies = AfterEachStep(self, self.look)
        self.begins: dict[str, str] = {}
        self.ever: dict[str, set[str]] = {}

    def note(self, who: str, *words: object) -> None:
        if who == "nva" and "->" in words:
            self.begins.setdefault(str(words[-1]), self.does())

    def look(self) -> None:
        open_now = self.nva.record or self.nva.authority.ended_moves[self.nva.move]
        self.ever.setdefault(open_now.phase, set()).add(self.does())

    def does(self) -> str:
        return action(self.hosts[self.old])


@pytest.mark.req("R-35")
def test_the_old_nve_does_in_each_phase_what_the_one_table_says() -> None:
    """Every row of OLD_NVE_ACTION: at the phase's beginning, or once the abort has come to it."""
    begins: dict[str, set[str]] = {}
    ever: dict[str, set[str]] = {}
    for seed in range(200):
        world = Watched(seed)
        abort = ((0.02 + 0.0005 * (seed % 100), "abort", "old", 0.0),) if seed % 2 else ()
        world.run(Plan(frames=0, faults=abort))
        for phase, one in world.begins.items():
            begins.setdefault(phase, set()).add(one)
        for phase, all_of_them in world.ever.items():
            ever.setdefault(phase, set()).update(all_of_them)
    from_copy_on: tuple[Phase, ...] = (
        "precopy",
        "paused",
        "equal",
        "committed",
        "converging",
        "drained",
    )
    assert {phase: begins[phase] for phase in from_copy_on} == {
        phase: {OLD_NVE_ACTION[phase]} for phase in from_copy_on
    }
    never_changing: tuple[Phase, ...] = ("planned", "closed", "aborted")
    assert {phase: ever[phase] for phase in never_changing} == {
        phase: {OLD_NVE_ACTION[phase]} for phase in never_changing
    }
    assert OLD_NVE_ACTION["aborting"] in ever["aborting"]
    assert "drop" not in ever["aborting"]


def runs_at_once(self: SimHost, effect: m.Do) -> None:
    self.copy = "running"
    self._ok(effect, text="tcp:new:1")


def ends(world: World, plans: Iterator[Plan]) -> tuple[str, float]:
    """How it ends and when."""
    try:
        for plan in plans:
            world.run(plan)
    except Violation as violation:
        return str(violation), world.agenda.now_s
    return "", world.agenda.now_s


@pytest.mark.req("R-14")
@pytest.mark.parametrize("planted", [False, True])
def test_looking_only_after_steps_that_touched_something_misses_nothing(
    planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if planted:
        monkeypatch.setattr(SimHost, "_ReceiveCopy", runs_at_once)
    broken = 0
    for seed in range(300):
        chance, plans = run.drawn(seed, 1, "hot")
        quick = ends(World(chance), plans)
        whole = World(chance)
        whole.copies = AfterEachStep(whole, lambda: None)
        assert ends(whole, run.drawn(seed, 1, "hot")[1]) == quick
        broken += bool(quick[0])
    assert bool(broken) is planted


@pytest.mark.req("R-14")
def test_a_planted_bug_is_found_and_told_with_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimHost, "_ReceiveCopy", runs_at_once)
    failure = run.failing(0, 1)
    assert failure is not None
    assert "two copies run" in failure.why
    assert any("ReceiveCopy" in line for line in failure.trace)
    assert run.failing(0, 1) == failure


def test_a_seed_gives_the_same_trace_in_every_process() -> None:
    """No order that depends on how strings hash may decide anything."""
    told = "from overland.sim.run import simulate; print(simulate(7, 3, trace=True).trace)"
    traces = {
        subprocess.run(
            [sys.executable, "-c", told],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(traces) == 1
    assert "Activate" in traces.pop()


@pytest.mark.parametrize("words", [["--seeds", "x"], ["--seeds", "5:5"], ["--moves", "0"]])
def test_wrong_words_are_one_clear_line(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "overland", "sim", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --")
    assert len(done.stderr.splitlines()) == 1
