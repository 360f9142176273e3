"""Seeds: from a number to faults to a verdict, and the trace of the first that fails."""

from __future__ import annotations

import random
from dataclasses import dataclass

from overland.sim.world import Plan, Violation, World

KINDS = ("daemon", "daemon", "daemon", "nva", "cut", "cut", "copy", "abort")


@dataclass(frozen=True, slots=True)
class Failing:
    """A seed that broke an invariant, and how it came to it."""

    seed: int
    move: int
    why: str
    trace: tuple[str, ...]


def plan_of(rng: random.Random, checkpoints: int = 0) -> Plan:
    """Up to three faults at any moment of a move; every fourth move has none.

    With `checkpoints` the move is warm.
    """
    faults = []
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3))):
        kind = rng.choice(KINDS)
        at_s = rng.random() * rng.choice((0.06, 0.06, 0.3, 3.0))
        seconds = rng.choice((0.05, 0.5, 2.0, 6.0)) * (0.5 + rng.random())
        faults.append((at_s, kind, rng.choice(("old", "new", "peer")), seconds))
    return Plan(
        faults=tuple(faults),
        duplicate=rng.choice((0.0, 0.0, 0.05)),
        checkpoints=checkpoints,
    )


def simulate(seed: int, moves: int, *, trace: bool = False, checkpoints: int = 0) -> World:
    """Run one seed: `moves` moves of one VM, one after the other. Raises Violation."""
    rng = random.Random(seed)
    world = World(rng.randrange(2**32), trace=trace)
    for _ in range(moves):
        world.run(plan_of(rng, checkpoints))
    return world


def failing(seed: int, moves: int) -> Failing | None:
    """None when `seed` holds; else what broke, with the trace of a second, identical run."""
    try:
        simulate(seed, moves)
    except Violation as violation:
        return _explained(seed, moves, str(violation))
    return None


def _explained(seed: int, moves: int, why: str) -> Failing:
    rng = random.Random(seed)
    world = World(rng.randrange(2**32), trace=True)
    move = 0
    try:
        for move in range(1, moves + 1):  # noqa: B007 - it is told
            world.run(plan_of(rng))
    except Violation:
        pass
    lines = tuple(f"{at_s:10.4f} {who:8} {what}" for at_s, who, what in world.trace or ())
    return Failing(seed=seed, move=move, why=why, trace=lines)


def first_failing(first: int, last: int, moves: int, checkpoints: int = 0) -> int | None:
    """The first seed from `first` on, before `last`, that does not hold; None when all do."""
    for seed in range(first, last):
        try:
            simulate(seed, moves, checkpoints=checkpoints)
        except Violation:
            return seed
    return None
