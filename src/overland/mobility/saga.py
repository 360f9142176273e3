"""What the coordinator's machines share: how a record enters a phase, ends, and adds up. Pure."""

from __future__ import annotations

import msgspec

from overland.mobility.messages import AnyOrder, Tell
from overland.model.cluster import left_at
from overland.model.handover import (
    ALONE_LEGAL,
    COLD_LEGAL,
    LEGAL,
    Acknowledgement,
    Handover,
    Packets,
    Phase,
    PhaseAt,
)

PREPARE_LIMIT_S = 20.0
"""An NVE that has not prepared by then makes the move abort."""

CLOSE_LIMIT_S = 10.0
"""How long closing waits for the counts of each NVE."""


def involved(record: Handover) -> tuple[str, ...]:
    """All NVEs of a move: old, new, then peers."""
    return (record.old_nve, record.new_nve, *record.peers)


def serving(record: Handover) -> frozenset[str]:
    """Hosts that offer other images, or to others, once the move is committed."""
    return frozenset({record.old_nve}) if record.mode == "storage" else left_at(record.vm)


def unserved(record: Handover) -> frozenset[str]:
    """Hosts with images that stay, and of which nobody knows yet that they are the new host's.

    The VM does not run before: its former host might still write them (R-14).
    """
    return left_at(record.vm) - record.served


def names(seen: tuple[Acknowledgement, ...]) -> frozenset[str]:
    """Who has acknowledged."""
    return frozenset(each.nve for each in seen)


def tell(nve: str, order: AnyOrder) -> Tell:
    """The effect that gives `nve` its order."""
    return Tell(nve=nve, order=order)


def enter(record: Handover, phase: Phase, now_ns: int) -> Handover:
    """The record in `phase`, to which a legal way must lead."""
    legal = {"cold": COLD_LEGAL, "storage": ALONE_LEGAL}.get(record.mode, LEGAL)
    assert phase in legal[record.phase], f"{record.phase} -> {phase}"
    entry = PhaseAt(phase=phase, at_ns=now_ns)
    return msgspec.structs.replace(record, phase=phase, phases=(*record.phases, entry))


def end(record: Handover, now_ns: int) -> Handover:
    """The record of a move that is over, one way or the other."""
    moved = record.phase == "drained"
    record = enter(record, "closed" if moved else "aborted", now_ns)
    return msgspec.structs.replace(
        record, outcome="moved" if moved else "aborted", closed_ns=now_ns
    )


def close_reason(record: Handover) -> str:
    """The criterion that was met (R-42), and who was not waited for."""
    reason = "all peers acknowledged"
    return f"{reason}; fenced: {', '.join(record.fenced)}" if record.fenced else reason


def merge(mine: Packets, theirs: Packets) -> Packets:
    """Join the counts of one more NVE; each count is made at one NVE only."""
    dropped = dict(mine.dropped)
    for cause, count in theirs.dropped.items():
        dropped[cause] = dropped.get(cause, 0) + count
    firsts = [each for each in (mine.first_direct_ns, theirs.first_direct_ns) if each]
    return Packets(
        held=mine.held + theirs.held,
        rescued=mine.rescued + theirs.rescued,
        redirected=mine.redirected + theirs.redirected,
        late=mine.late + theirs.late,
        residual=mine.residual + theirs.residual,
        dropped=dropped,
        last_redirected_ns=max(mine.last_redirected_ns, theirs.last_redirected_ns),
        first_direct_ns=min(firsts, default=0),
    )
