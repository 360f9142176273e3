"""Seeds: from a number to faults to a verdict, and the trace of the first that fails."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from overland.model.cluster import VmState
from overland.sim.faults import Plan
from overland.sim.invariants import Violation
from overland.sim.world import World

DISKS = ("store", "disk")
"""The NVA's disk is full, or that of an NVE."""

Mode = Literal["hot", "warm", "cold", "readdress"]
"""`readdress`: any of the others, the same all along, and each move changes the VM's address."""

WAYS: tuple[Mode, ...] = ("hot", "hot", "warm", "cold")
"""How a VM moves whose address is changed."""

COLD_FROM: tuple[VmState, ...] = ("running", "running", "paused", "suspended", "shutdown")
"""What a VM does before it moves cold."""

YOUNG = 50_000
"""Objects that are left before garbage is looked for."""

KINDS = ("daemon", "daemon", "daemon", "nva", "cut", "cut", "copy", "abort")


@dataclass(frozen=True, slots=True)
class Failing:
    """A seed that broke an invariant, and how it came to it."""

    seed: int
    move: int
    why: str
    trace: tuple[str, ...]


def plan_of(rng: random.Random) -> Plan:
    """Up to three faults at any moment of a hot move; every fourth move has none."""
    faults = []
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3))):
        kind = rng.choice(KINDS)
        at_s = rng.random() * rng.choice((0.06, 0.06, 0.3, 3.0))
        seconds = rng.choice((0.05, 0.5, 2.0, 6.0)) * (0.5 + rng.random())
        faults.append((at_s, kind, rng.choice(("old", "new", "peer")), seconds))
    return Plan(faults=tuple(faults), duplicate=rng.choice((0.0, 0.0, 0.05)))


def in_mode(plan: Plan, mode: Mode, rng: random.Random) -> Plan:
    """The same faults in a move of `mode`. Drawn apart: seeds of hot moves stay what they were."""
    if mode == "warm":
        return replace(plan, checkpoints=rng.choice((1, 3)))
    if mode == "cold":
        return replace(plan, cold=rng.choice(COLD_FROM))
    return plan


def to_another_address(plan: Plan, rng: random.Random) -> Plan:
    """The same move, which also changes the VM's address; the old one may outlast it."""
    return replace(plan, keep_s=rng.choice((0.0, 1.0, 5.0, 1000.0)))


def with_full_disk(plan: Plan, rng: random.Random) -> Plan:
    """In every third move a disk is full for a while. Drawn apart: seeds stay what they were."""
    if rng.randrange(3):
        return plan
    at_s = rng.random() * rng.choice((0.06, 0.06, 0.3))
    who = rng.choice(("old", "new", "peer"))
    full = (at_s, rng.choice(DISKS), who, 3.0 * rng.random())
    return replace(plan, faults=(*plan.faults, full))


def simulate(seed: int, moves: int, mode: Mode = "hot", *, trace: bool = False) -> World:
    """Run one seed: `moves` moves of one VM, one after the other. Raises Violation."""
    chance, plans = drawn(seed, moves, mode)
    world = World(chance, trace=trace)
    for plan in plans:
        world.run(plan)
    return world


def drawn(seed: int, moves: int, mode: Mode) -> tuple[int, Iterator[Plan]]:
    """What `seed` stands for: the seed of the world's own chance, and what befalls each move."""
    rng, disks = random.Random(seed), random.Random(f"disks {seed}")
    chance = rng.randrange(2**32)
    plans = (with_full_disk(plan_of(rng), disks) for _ in range(moves))
    if mode == "hot":
        return chance, plans
    modes = random.Random(f"modes {seed}")
    if mode == "readdress":
        way = modes.choice(WAYS)
        return chance, (to_another_address(in_mode(plan, way, modes), modes) for plan in plans)
    return chance, (in_mode(plan, mode, modes) for plan in plans)


def failing(seed: int, moves: int, mode: Mode = "hot") -> Failing | None:
    """None when `seed` holds; else what broke, with the trace of a second, identical run."""
    try:
        simulate(seed, moves, mode)
    except Violation as violation:
        return _explained(seed, moves, mode, str(violation))
    return None


def _explained(seed: int, moves: int, mode: Mode, why: str) -> Failing:
    chance, plans = drawn(seed, moves, mode)
    world = World(chance, trace=True)
    move = 0
    try:
        for move, plan in enumerate(plans, 1):  # noqa: B007 - it is told
            world.run(plan)
    except Violation:
        pass
    lines = tuple(f"{at_s:10.4f} {who:8} {what}" for at_s, who, what in world.trace or ())
    return Failing(seed=seed, move=move, why=why, trace=lines)


def first_failing(first: int, last: int, moves: int, mode: Mode = "hot") -> int | None:
    """The first seed from `first` on, before `last`, that does not hold; None when all do."""
    with seldom_collected():
        for seed in range(first, last):
            try:
                simulate(seed, moves, mode).dismantle()
            except Violation:
                return seed
    return None


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Nearly nothing is left of a dismantled world for the garbage collector to find."""
    before = gc.get_threshold()
    gc.set_threshold(YOUNG, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
