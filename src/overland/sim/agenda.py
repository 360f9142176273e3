"""The seeded clock: what is due at which instant, and how long things take."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import count
from typing import Any, TypeVarTuple

Args = TypeVarTuple("Args")


class Agenda:
    """Work with its instants, in seconds since the beginning of the seed."""

    def __init__(self, rng: random.Random) -> None:
        self.now_s = 0.0
        self._random = rng.random
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()

    def now_ns(self) -> int:
        """CLOCK_REALTIME, as it were; 0 stands for what has not come."""
        return int(self.now_s * 1e9) + 1

    def later(self, seconds: float, work: Callable[[*Args], None], *args: *Args) -> None:
        heappush(self._due, (self.now_s + seconds, next(self._numbers), work, args))

    def at(self, at_s: float, work: Callable[[*Args], None], *args: *Args) -> None:
        """What is due at the same instant is done in the order in which it was asked for."""
        heappush(self._due, (at_s, next(self._numbers), work, args))

    def short(self) -> float:
        """A step's duration: mostly a millisecond, now and then far more."""
        r = self._random()
        return 0.0005 + 0.002 * r if r < 0.97 else r * 0.3

    def until(self, end_s: float) -> Iterator[None]:
        """Do what is due before `end_s`, one after the other; the caller looks after each.

        What is due later stays: an address may be kept for longer than a move is looked at.
        """
        due = self._due
        while due and due[0][0] < end_s:
            self.now_s, _, work, args = heappop(due)
            work(*args)
            yield
