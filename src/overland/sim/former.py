"""Moves that change the VM's address: what is kept, for how long, and what must hold of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from overland.mobility import saga
from overland.model.handover import ENDED, Handover
from overland.model.readdress import NewAddresses, former_of
from overland.nva.former import AGAIN_S
from overland.nva.handovers import RETRY_S
from overland.sim.domain import ADDRESSES, MAC, NETWORK, at_once
from overland.sim.invariants import Violation

if TYPE_CHECKING:
    from overland.sim.nva import SimNva
    from overland.sim.world import World

LATE_S = 10.0
"""Longer than a full disk, or a killed NVA, lets an address be kept after its time."""


class FormerAddresses:
    """One world's. The NVA's own part is in `nva/former.py`; here the clock is the world's."""

    def __init__(self, world: World, nva: SimNva) -> None:
        self._world = world
        self._nva = nva
        self._due_s: dict[str, float] = {}
        self._seen_to: set[tuple[str, int]] = set()

    def wish(self) -> tuple[NewAddresses, ...]:
        """Another address than the VM has, perhaps one that it had."""
        if self._world.plan.keep_s is None:
            return ()
        others = [each for each in ADDRESSES if each != self._address()]
        return (NewAddresses(network=NETWORK, ipv4=self._world.random.choice(others)),)

    def begun(self, record: Handover) -> None:
        """The end of a move is written: from now on the time runs, however often it is said."""
        if record.phase in ENDED and self._world.plan.keep_s is not None:
            due_s = self._world.agenda.now_s + self._world.plan.keep_s
            self._due_s.setdefault(record.id, due_s)
            self.look()

    def look(self) -> None:
        """See to all that is kept, once in each life of the NVA."""
        for move in sorted(former_of(self._nva.vm())):
            if (move, self._nva.life) not in self._seen_to:
                self._seen_to.add((move, self._nva.life))
                left_s = max(0.0, self._due_s[move] - self._world.agenda.now_s)
                self._nva.later(left_s, self._give_up, move)

    def _give_up(self, move: str) -> None:
        if self._nva.store_full:
            self._nva.later(RETRY_S, self._give_up, move)
        elif not at_once(self._nva.authority.give_up(move)):
            self._nva.later(AGAIN_S, self._give_up, move)
        else:
            self._world.note("nva", f"what {move} has left is given up")

    def check(self, record: Handover) -> None:
        """From the beginning of a hot move to its end every NVE knows both addresses.

        Of a host that was called dead it may know nothing, and so neither; one it never knows.
        """
        if record.readdress is None or record.mode == "cold":
            return
        if record.phase in ("planned", "aborting", "aborted"):
            return
        (change,) = record.readdress.changes
        both = {*change.old, *change.new}
        given_up = self._nva.vm_host in self._nva.called_dead
        for nve in sorted(set(saga.involved(record)) - set(record.fenced)):
            known = self._known_at(nve) & both
            if known != both and (known or not given_up):
                raise Violation(f"{nve} knows {sorted(known)} only, the move is {record.phase}")

    def _known_at(self, nve: str) -> frozenset[str]:
        state = self._world.hosts[nve].kernel.state
        return frozenset(each.address for each in state.neighbours if each.mac == MAC)

    def verdict(self, record: Handover) -> None:
        """The VM has the one address or the other, and none longer than it is kept."""
        readdress = record.readdress
        if readdress is not None:
            (change,) = readdress.changes
            (must,) = change.new if record.outcome == "moved" else change.old
            if self._address() != must:
                raise Violation(f"the VM has {self._address()}, it must have {must}")
        kept = former_of(self._nva.vm())
        for move in sorted(kept):
            if self._due_s[move] + LATE_S < self._world.agenda.now_s:
                raise Violation(f"what {move} has left is kept for ever")
        for move, ended in self._nva.authority.ended_moves.items():
            was_left = ended.readdress is not None and ended.outcome == "moved"
            if was_left and (not ended.readdress.ended_ns) is not (move in kept):  # type: ignore[union-attr]
                raise Violation(f"the record of {move} does not say whether its address is kept")

    def _address(self) -> str | None:
        return self._nva.vm().interfaces[0].ipv4
