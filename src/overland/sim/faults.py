"""What goes wrong in a move, and what that breaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from overland.mobility import messages as m
from overland.model.cluster import VmState
from overland.sim.connection import NOTICE_S
from overland.sim.domain import NAMES
from overland.sim.host import SimHost

if TYPE_CHECKING:
    from overland.sim.world import World

Fault = tuple[float, str, str, float]
"""(at_s since the move began, kind, who, how long in seconds)"""


@dataclass
class Plan:
    """What happens in one move."""

    faults: tuple[Fault, ...] = ()
    frames: int = 12
    duplicate: float = 0.0
    checkpoints: int = 0
    cold: VmState | None = None
    """What a VM that moves cold does before; None: it moves hot, or warm with checkpoints."""
    keep_s: float | None = None
    """How long the old address is kept after a move that changes it; None: it stays."""

    @property
    def undisturbed(self) -> bool:
        """Nothing fails; at most the operator changes his mind."""
        return all(kind == "abort" for _, kind, _, _ in self.faults)

    @property
    def lossless(self) -> bool:
        """Tell whether the packet contract holds without exception."""
        return self.undisturbed and self.cold is None

    @property
    def last_s(self) -> float:
        """When the last of its faults is over, since the move began."""
        return max((at_s + seconds for at_s, _, _, seconds in self.faults), default=0.0)


class Faults:
    """They strike while a move is open."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.killed: set[str] = set()
        """Hosts where a fault took the VM's process: that is its own end, not the move's (6-11)."""

    def strike(self, kind: str, who: str, seconds: float) -> None:
        world, nva = self._world, self._world.nva
        if nva.record is None and kind != "abort":
            return
        host = self._host(who)
        world.note("fault", kind, who, f"{seconds:.2f}")
        match kind:
            case "abort":
                nva.step(m.Abort(why="operator"))
            case "nva" if nva.alive:
                nva.crash()
                world.agenda.later(seconds, nva.restart)
            case "daemon" if host.alive:
                host.crash()
                host.connection.lose()
                world.agenda.later(seconds, host.restart)
            case "copy":
                if host.copy != "none":
                    self.killed.add(host.name)
                host.kill_copy()
            case "store":
                nva.store_full = True
                world.agenda.later(seconds, nva.store_freed)
            case "disk":
                host.disk_full = True
                world.agenda.later(seconds, host.disk_freed)
            case "cut":
                host.cut_until = max(host.cut_until, world.agenda.now_s + seconds)
                world.agenda.later(NOTICE_S, self._notice, host)
            case _:
                pass

    def _host(self, who: str) -> SimHost:
        roles = {"old": self._world.old, "new": self._world.new}
        peers = [name for name in NAMES if name not in roles.values()]
        return self._world.hosts[roles.get(who, peers[0])]

    def _notice(self, host: SimHost) -> None:
        if self._world.agenda.now_s < host.cut_until:
            host.connection.lose()
