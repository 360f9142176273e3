"""Seeds: from a number to faults to a verdict, and the trace of the first that fails."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from overland.model.cluster import VmState
from overland.sim.violation import Violation
from overland.sim.world import Plan, World

DISKS = ("store", "disk")
"""The NVA's disk is full, or that of an NVE."""

Mode = Literal["hot", "warm", "cold", "readdress"]
"""`readdress`: any of the others, the same all along, and each move changes the VM's address."""

COLD_FROM: tuple[VmState, ...] = ("running", "running", "paused", "suspended", "shutdown")
"""What a VM does before it moves cold."""

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
    world = World(random.Random(seed).randrange(2**32), trace=trace)
    for plan in plans_of(seed, moves, mode):
        world.run(plan)
    return world


def plans_of(seed: int, moves: int, mode: Mode) -> Iterator[Plan]:
    """What happens in each move under `seed`."""
    rng, disks, modes = (
        random.Random(seed),
        random.Random(f"disks {seed}"),
        random.Random(f"modes {seed}"),
    )
    rng.randrange(2**32)  # the world's own
    way: Mode = modes.choice(("hot", "hot", "warm", "cold")) if mode == "readdress" else mode
    for _ in range(moves):
        plan = in_mode(with_full_disk(plan_of(rng), disks), way, modes)
        yield to_another_address(plan, modes) if mode == "readdress" else plan


def failing(seed: int, moves: int, mode: Mode = "hot") -> Failing | None:
    """None when `seed` holds; else what broke, with the trace of a second, identical run."""
    try:
        simulate(seed, moves, mode)
    except Violation as violation:
        return _explained(seed, moves, mode, str(violation))
    return None


def _explained(seed: int, moves: int, mode: Mode, why: str) -> Failing:
    world = World(random.Random(seed).randrange(2**32), trace=True)
    move = 0
    try:
        for move, plan in enumerate(plans_of(seed, moves, mode), 1):  # noqa: B007 - it is told
            world.run(plan)
    except Violation:
        pass
    lines = tuple(f"{at_s:10.4f} {who:8} {what}" for at_s, who, what in world.trace or ())
    return Failing(seed=seed, move=move, why=why, trace=lines)


def first_failing(first: int, last: int, moves: int, mode: Mode = "hot") -> int | None:
    """The first seed from `first` on, before `last`, that does not hold; None when all do."""
    for seed in range(first, last):
        try:
            simulate(seed, moves, mode)
        except Violation:
            return seed
    return None
