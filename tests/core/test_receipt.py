"""What a receipt says of a move."""

from __future__ import annotations

import msgspec

from overland.model.handover import Acknowledgement, Handover
from overland.model.receipt import receipt
from tests.core.moves import NEW, PEER, in_phase

MS = 10**6


def test_the_gap_counts_the_hold() -> None:
    """Hold to STOP and RESUME to the first direct frame; the stop itself is apart (ADR 0009)."""
    record = msgspec.structs.replace(
        in_phase("closed"), held_ns=100 * MS, stop_ns=104 * MS, resume_ns=140 * MS
    )

    def gap(first_direct_ms: int) -> float | None:
        packets = msgspec.structs.replace(record.packets, first_direct_ns=first_direct_ms * MS)
        told = receipt(msgspec.structs.replace(record, packets=packets))
        assert told["vm_stop_ms"] == 36.0
        return told["network_gap_ms"]  # type: ignore[no-any-return]

    assert gap(143) == 7.0
    assert gap(130) == 4.0, "it waited in the ring"
    assert gap(0) is None, "nobody sent"


def test_peers_are_those_that_held_the_old_mapping() -> None:
    """The new NVE steers first of all, but it is not among the peers that are counted."""
    record = msgspec.structs.replace(
        in_phase("drained"),
        resume_ns=50 * MS,
        steered=tuple(
            Acknowledgement(nve=nve, at_ns=at_ms * MS)
            for nve, at_ms in ((NEW, 20), (PEER, 30), ("h4", 60))
        ),
        peers=(PEER, "h4"),
    )

    def steered(of: Handover) -> tuple[int, int]:
        peers = receipt(of)["peers"]
        return peers["subscribed"], peers["steered_before_resume"]

    assert steered(record) == (3, 1), "h4 steered after RESUME"
    assert steered(msgspec.structs.replace(record, resume_ns=0)) == (3, 0)
