"""What goes from host to host: frames, tunnels, markers; and what became of each frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from overland.sim.agenda import Args
from overland.sim.domain import NAMES, host_at
from overland.sim.invariants import Violation

if TYPE_CHECKING:
    from overland.sim.host import SimHost
    from overland.sim.world import World

Frame = tuple[str, int]
"""(sender, number); a marker is ("marker", its number)."""


@dataclass
class Books:
    """What became of the frames of one move."""

    sent: int = 0
    delivered: set[Frame] = field(default_factory=set)
    newest: dict[str, int] = field(default_factory=dict)
    lost: list[tuple[Frame, str]] = field(default_factory=list)


class Underlay:
    """Between each two hosts what was sent first arrives first."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._agenda = world.agenda
        self._random = world.random.random
        self.books = Books()
        self._frames = 0
        self._arrivals: dict[tuple[str, str], float] = {}
        self._markers: dict[int, tuple[SimHost, Callable[..., None], tuple[Any, ...]]] = {}
        self._numbers = count(1)

    def stream(self, frames: int) -> None:
        """The VM's correspondents send to it throughout the move."""
        self.books = Books()
        senders = [name for name in NAMES if name not in (self._world.old, self._world.new)]
        for number in range(frames):
            sender = self._world.hosts[senders[number % len(senders)]]
            at_s = 0.002 * number + 0.1 * self._random() * (number % 3)
            self._agenda.later(at_s, self._send_next, sender)

    def _send_next(self, sender: SimHost) -> None:
        self.books.sent += 1
        self._frames += 1
        sender.send((sender.name, self._frames))

    def is_cut(self, one: SimHost, other: SimHost) -> bool:
        now_s = self._agenda.now_s
        return now_s < one.cut_until or now_s < other.cut_until

    def _travel(
        self, one: SimHost, other: SimHost, deliver: Callable[[*Args], None], *args: *Args
    ) -> None:
        way, agenda = (one.name, other.name), self._agenda
        due_s = max(self._arrivals.get(way, 0.0), agenda.now_s + 0.0001) + 0.0002 * self._random()
        self._arrivals[way] = due_s
        agenda.at(due_s, deliver, *args)

    def launch(self, sender: SimHost, address: str, frame: Frame) -> None:
        host = self._world.hosts[host_at(address)]
        if self.is_cut(sender, host):
            self.lost(frame, "cut")
        else:
            self._travel(sender, host, host.arrived, frame)

    def tunnel(self, host: SimHost, frame: Frame) -> None:
        world = self._world
        other = world.hosts[world.new if host.name == world.old else world.old]
        if self.is_cut(host, other):
            self.lost(frame, "cut")
        else:
            self._travel(host, other, other.from_tunnel, frame, other.name == world.old)

    # ------------------------------------------------------------ markers

    def marker(self, sender: SimHost, seen: Callable[[*Args], None], *args: *Args) -> int:
        """The number of a new marker, whose answer is `seen` by its sender."""
        number = next(self._numbers)
        self._markers[number] = sender, seen, args
        return number

    def awaits(self, number: int) -> bool:
        """Tell whether marker `number` has not been seen yet."""
        return number in self._markers

    def marker_seen(self, number: int, host: SimHost) -> None:
        answer = self._markers.pop(number, None)
        if answer is not None:
            sender, seen, args = answer
            self._travel(host, sender, seen, *args)

    def forget_marker(self, number: int) -> bool:
        return self._markers.pop(number, None) is not None

    # ------------------------------------------------------------ what became of frames

    def dropped(self, frame: Frame, host: SimHost, *, late: bool) -> None:
        """A frame for an address in transit; at the old NVE none may come that late (R-33)."""
        self.lost(frame, "in transit")
        if late and host.name == self._world.old and not self._world.plan.faults:
            raise Violation(f"frame {frame} came to the old NVE although all others drop")

    def lost(self, frame: Frame, why: str) -> None:
        if frame[0] != "marker":
            self._world.note("network", frame, "lost:", why)
            self.books.lost.append((frame, why))

    def delivered(self, frame: Frame) -> None:
        books, (sender, number) = self.books, frame
        if frame in books.delivered:
            raise Violation(f"frame {frame} was delivered twice")
        books.delivered.add(frame)
        newest = books.newest.get(sender, -1)
        if number < newest and self._world.plan.lossless:
            raise Violation(f"frame {frame} was overtaken")
        books.newest[sender] = max(number, newest)
