"""When memory slows down and when the VM may be stopped (ADR 0006, 0008)."""

from __future__ import annotations

import msgspec
import pytest

from overland.mobility.convergence import (
    COUNTDOWN_BYTES_PER_S,
    SINGLE_ROUND_BYTES_PER_S,
    converged,
    first_pace,
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
    ("mib", "rate", "stops"),
    [
        (128, SINGLE_ROUND_BYTES_PER_S, False),
        (13, SINGLE_ROUND_BYTES_PER_S, False),
        (12, COUNTDOWN_BYTES_PER_S, False),
        (4, COUNTDOWN_BYTES_PER_S, False),
        (3, COUNTDOWN_BYTES_PER_S, True),
        (0, SINGLE_ROUND_BYTES_PER_S, False),
    ],
)
def test_a_single_round_slows_in_its_countdown_and_stops_late_in_it(
    mib: float, rate: int, stops: bool
) -> None:
    """0 left is not the end but the time before QEMU has counted its memory."""
    assert pace(left(SINGLE, mib), Options()) == rate
    assert converged(left(SINGLE, mib), Options()) is stops


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
