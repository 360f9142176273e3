"""When an NVA may take itself for the active one (N-10). Pure.

The store keeps one key with a lease. Its holder renews the lease and counts its own time from
before it asked: so its term ends, by its own clock, before the store lets go of the key, and no two
terms overlap. This holds while clocks run at the same rate; a write is fenced by the key besides.
"""

from __future__ import annotations

from dataclasses import dataclass

LEASE_S = 3.0
"""How long the store keeps the key of an NVA that is silent."""

MARGIN_S = 0.25
"""By how much a term ends earlier than the lease, for clocks that run at different rates."""


@dataclass(frozen=True, slots=True)
class Term:
    """The key was written at `revision`; until `until_s` (monotonic clock) it is held for sure."""

    revision: int
    until_s: float

    def holds(self, now_s: float) -> bool:
        return now_s < self.until_s


def begun(revision: int, asked_s: float) -> Term:
    """The key was written at `revision`, with a lease that was asked for at `asked_s`."""
    return Term(revision, asked_s + LEASE_S - MARGIN_S)


def renewed(term: Term, found: int, asked_s: float) -> Term | None:
    """The lease was renewed, asked for at `asked_s`, and then the key was at revision `found`.

    None when that is not our key any more: it was lost before the renewal.
    """
    return begun(term.revision, asked_s) if found == term.revision else None
