"""No two NVAs are active at once, whatever becomes of their messages to the store."""

from __future__ import annotations

import random

import pytest

from overland.nva.election import LEASE_S, Term, begun, renewed


@pytest.mark.req("N-10")
@pytest.mark.parametrize("seed", range(50))
def test_terms_do_not_overlap(seed: int) -> None:
    """N-10: NVAs ask at random moments; requests and answers take any time, some are lost."""
    draw = random.Random(seed)
    now_s, holder, revision, lease_end_s = 0.0, -1, 0, 0.0
    terms: dict[int, Term] = {}
    led: set[int] = set()
    for _ in range(500):
        asker = draw.randrange(3)
        asked_s = now_s
        now_s += draw.choice((0.01, 0.5, 2.0)) * draw.random()
        if now_s >= lease_end_s:
            holder = -1
        term = terms.get(asker)
        if term is None and holder < 0:
            holder, revision, lease_end_s = asker, revision + 1, now_s + LEASE_S
            answer: Term | None = begun(revision, asked_s)
        else:
            if holder == asker:
                lease_end_s = now_s + LEASE_S
            found = revision if holder >= 0 else 0
            answer = renewed(term, found, asked_s) if term is not None else None
        now_s += draw.choice((0.01, 2.0)) * draw.random()
        if draw.random() < 0.8:
            if answer is None:
                terms.pop(asker, None)
            else:
                terms[asker] = answer
        active = [each for each, held in terms.items() if held.holds(now_s)]
        assert len(active) <= 1
        led.update(active)
    assert led == {0, 1, 2}


def test_a_key_that_was_lost_and_won_again_is_another_term() -> None:
    """Its holder may have been deposed in between: what it knew is old."""
    assert renewed(begun(5, 0.0), 7, 1.0) is None
    assert renewed(begun(5, 0.0), 0, 1.0) is None
    assert renewed(begun(5, 0.0), 5, 1.0) == begun(5, 1.0)
