"""What an NVE believes of what it is pushed."""

from __future__ import annotations

import pytest

from overland.nve.revisions import Revisions


@pytest.fixture
def blue() -> Revisions:
    """It has revision 5 of VN blue."""
    revisions = Revisions()
    assert revisions.judge("blue", 5, None) == "take"
    revisions.applied("blue", 5, held=True)
    return revisions


def test_an_update_of_what_is_here_is_taken_and_an_older_one_changes_nothing(
    blue: Revisions,
) -> None:
    assert blue.judge("blue", 6, 5) == "take"
    blue.applied("blue", 6, held=True)
    assert blue.judge("blue", 6, 5) == "skip"
    assert blue.judge("blue", 5, None) == "skip"
    assert blue.known == {"blue": 6}


@pytest.mark.req("E-02")
def test_who_is_told_what_contradicts_what_he_has_asks_the_nva_once(blue: Revisions) -> None:
    """However many contradictions come meanwhile: the answer is the whole, and ends the doubt."""
    assert blue.judge("blue", 9, 8) == "ask"
    assert [blue.judge("blue", 9 + n, 8 + n) for n in range(1, 1000)] == ["skip"] * 999
    assert blue.known == {"blue": 5}, "nothing was believed"
    assert blue.judge("red", 3, 2) == "ask", "each VN has its own doubt"
    assert blue.judge("blue", 2000, None) == "take"
    blue.applied("blue", 2000, held=True)
    assert blue.judge("blue", 2001, 2000) == "take"
    assert blue.judge("blue", 2003, 2002) == "ask"


def test_a_push_that_waits_for_its_turn_is_told_of_in_the_hello(blue: Revisions) -> None:
    """HO-54: else a restarted NVA would give its number to another push."""
    blue.heard("blue", 9)
    blue.heard("blue", 8)
    assert (blue.known, blue.newest) == ({"blue": 5}, {"blue": 9})


@pytest.mark.req("E-02")
def test_a_question_that_may_be_lost_is_asked_again_on_the_next_connection(
    blue: Revisions,
) -> None:
    assert blue.judge("blue", 9, 8) == "ask"
    blue.connected()
    assert blue.judge("blue", 10, 9) == "ask"


def test_an_update_of_a_vn_that_was_taken_away_is_asked_about(blue: Revisions) -> None:
    assert blue.judge("blue", 6, None) == "take"
    blue.applied("blue", 6, held=False)
    assert blue.judge("blue", 7, 6) == "ask"
