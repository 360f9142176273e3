"""When memory slows down and when the VM may be stopped (ADR 0006, 0008)."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overland.hypervisor.channel import ROOM_BYTES
from overland.hypervisor.countdown import COUNTDOWN_BYTES
from overland.mobility.convergence import (
    LAST_PART,
    SINGLE_ROUND_BYTES_PER_S,
    converged,
    first_pace,
    leash,
    pace,
)
from overland.model.handover import Options, Transfer

MIB = 1 << 20
SINGLE = Transfer(status="active", total_bytes=128 * MIB, countdown_bytes=12 * MIB)
ROUNDS = Transfer(
    status="active", total_bytes=128 * MIB, passes=2, bandwidth_bytes_per_s=1000.0 * MIB
)


def left(transfer: Transfer, mib: float) -> Transfer:
    return msgspec.structs.replace(transfer, remaining_bytes=int(mib * MIB))


@pytest.mark.parametrize(
    ("mib", "leashed_mib", "stops"),
    [
        (128, 11.5, False),
        (13, 11.5, False),
        (12, 11.5, False),
        (3, 2.5, False),
        (1.5, 1, True),
        (0.5, 0, True),
        (0, 11.5, False),
    ],
)
def test_a_single_round_is_on_a_leash_and_stops_late_in_its_countdown(
    mib: float, leashed_mib: float, stops: bool
) -> None:
    """0 left is not the end but the time before QEMU has counted its memory."""
    assert pace(left(SINGLE, mib), Options()) == SINGLE_ROUND_BYTES_PER_S
    assert leash(left(SINGLE, mib)) == leashed_mib * MIB
    assert converged(left(SINGLE, mib), Options()) is stops


@given(st.floats(0.01, 128), st.lists(st.floats(0, 12), max_size=40))
def test_on_its_leash_a_single_round_never_ends_unseen(mib: float, written: list[float]) -> None:
    """However much is written between two looks, the last part is there when it is decided.

    Before the countdown a look may find any amount less left: pages of zeros cost nothing.
    """
    transfer = left(SINGLE, mib)
    for each in written:
        if converged(transfer, Options()):
            return
        may = leash(transfer)
        assert may is not None
        costly = min(transfer.remaining_bytes, transfer.countdown_bytes)
        transfer = msgspec.structs.replace(
            transfer, remaining_bytes=costly - min(int(each * MIB), may)
        )
        assert transfer.remaining_bytes >= min(mib, 0.5) * MIB - 1


def test_as_long_as_the_vm_may_not_be_stopped_the_leash_lets_something_through() -> None:
    """What QEMU wrote ahead counts against the leash: with a shorter one a move stood still."""
    shortest = leash(left(SINGLE, 12 * LAST_PART + 0.001))
    assert shortest is not None
    assert SINGLE.countdown_bytes == COUNTDOWN_BYTES
    assert shortest > ROOM_BYTES


def test_several_rounds_need_no_leash() -> None:
    """There QEMU goes on until it is told to finish."""
    assert leash(left(ROUNDS, 20)) is None


@pytest.mark.parametrize("mib", [100, 5])
def test_the_operators_bandwidth_is_a_limit_of_its_own(mib: int) -> None:
    options = Options(bandwidth_bytes_per_s=8 * MIB)
    assert pace(left(SINGLE, mib), options) == 8 * MIB
    assert pace(left(ROUNDS, mib), options) == 8 * MIB
    assert pace(left(ROUNDS, mib), Options()) == 0


def test_it_begins_as_if_there_were_one_round_only() -> None:
    """The first look may come late, and a single round must not be over by then."""
    assert first_pace(Options()) == SINGLE_ROUND_BYTES_PER_S
    assert first_pace(Options(bandwidth_bytes_per_s=8 * MIB)) == 8 * MIB
    assert first_pace(Options(bandwidth_bytes_per_s=1 << 40)) == SINGLE_ROUND_BYTES_PER_S


def test_a_transfer_in_rounds_stops_when_the_rest_is_small_or_as_small_as_allowed() -> None:
    patient = Options(max_downtime_ms=300)
    assert not converged(left(msgspec.structs.replace(ROUNDS, passes=1), 1), patient)
    assert converged(left(ROUNDS, 20), patient)
    assert not converged(left(ROUNDS, 100), patient)
    assert converged(left(msgspec.structs.replace(ROUNDS, passes=6), 100), patient)
    assert not converged(left(msgspec.structs.replace(ROUNDS, passes=6), 400), patient)


def test_a_transfer_that_has_ended_needs_no_rule() -> None:
    assert converged(msgspec.structs.replace(SINGLE, status="completed"), Options())
