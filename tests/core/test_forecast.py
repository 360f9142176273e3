"""What a move is expected to cost before it begins (R-69, issue 'hot on hard VMs')."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overland.mobility.forecast import (
    ASSUMED_LINK_BYTES_PER_S,
    MAX_ROUNDS,
    forecast,
    link_rate,
    seen_before,
)
from overland.model.forecast import Forecast, Gauge
from overland.model.handover import Handover, Memory, Options
from overland.model.receipt import receipt
from overland.nva.rules import forecast_blockers
from tests.core.moves import NEW, OLD, VM, in_phase, planned

MIB = 1 << 20
LINK = float(ASSUMED_LINK_BYTES_PER_S)


def gauge(memory_mib: int, dirty_mib: float, countdown_mib: int = 0) -> Gauge:
    return Gauge(
        memory_bytes=memory_mib * MIB,
        dirty_bytes_per_s=dirty_mib * MIB,
        countdown_bytes=countdown_mib * MIB,
    )


def blocked(found: Forecast, options: Options) -> list[str]:
    return [each.code for each in forecast_blockers("web", found, options)]


SIZES = st.integers(16, 1 << 20)
RATES = st.floats(0, 1e5)


@given(SIZES, RATES, st.integers(1, 1 << 40), st.sampled_from((0, 12)))
def test_a_forecast_is_bounded_by_memory(
    memory_mib: int, dirty: float, bandwidth: int, countdown: int
) -> None:
    """However much is written, one round sends memory once, and the stop memory once more."""
    found = forecast(gauge(memory_mib, dirty, countdown), Options(bandwidth_bytes_per_s=bandwidth))
    assert 0 <= found.rest_bytes <= (memory_mib + countdown) * MIB
    assert memory_mib * MIB * 0.2 <= found.sent_bytes <= found.rounds * memory_mib * MIB
    assert 1 <= found.rounds <= MAX_ROUNDS
    assert found.copy_ms > 0
    assert found.stop_ms > 0


@given(SIZES, RATES, RATES, st.sampled_from((0, 12)))
def test_who_writes_more_stops_longer(
    memory_mib: int, one: float, two: float, countdown: int
) -> None:
    """With a goal that is out of reach, so that rounds do not end at different moments."""
    options = Options(max_downtime_ms=0)
    less, more = sorted((one, two))
    first = forecast(gauge(memory_mib, less, countdown), options)
    second = forecast(gauge(memory_mib, more, countdown), options)
    if first.rounds == second.rounds:
        assert first.stop_ms <= second.stop_ms


@given(SIZES, st.floats(1.01, 100))
def test_several_rounds_never_end_for_who_writes_faster_than_the_link(
    memory_mib: int, times: float
) -> None:
    """It is said before the move, with what would help, and not after an hour."""
    found = forecast(gauge(memory_mib, times * LINK / MIB), Options(max_downtime_ms=1))
    assert not found.converges
    assert "never be equal" in found.note
    (refusal,) = forecast_blockers("web", found, Options(max_downtime_ms=1))
    assert refusal.code == "not_converging"
    assert "--timeout-action pause" in refusal.hint
    assert "--max-downtime" in refusal.hint


@given(SIZES, st.floats(0, 0.5))
def test_several_rounds_end_for_who_writes_half_as_fast(memory_mib: int, times: float) -> None:
    """Each round is at most half of the one before."""
    found = forecast(gauge(memory_mib, times * LINK / MIB), Options())
    assert found.converges
    assert found.rest_bytes / LINK <= 0.3
    assert found.sent_bytes <= 2 * memory_mib * MIB


@given(SIZES, RATES)
def test_the_remedies_of_a_refusal_help(memory_mib: int, dirty: float) -> None:
    found = forecast(gauge(memory_mib, dirty), Options(timeout_s=1e9))
    if found.converges:
        return
    assert blocked(found, Options(timeout_action="pause")) == []
    patient = Options(max_downtime_ms=found.stop_ms, timeout_s=1e9)
    assert blocked(forecast(gauge(memory_mib, dirty), patient), patient) == []


@given(SIZES, RATES)
def test_a_single_round_always_ends(memory_mib: int, dirty: float) -> None:
    """Under emulation QEMU stops the VM at the end of the round (ADR 0006): the stop is bounded."""
    found = forecast(gauge(memory_mib, dirty, 12), Options())
    assert (found.converges, found.rounds) == (True, 1)
    assert blocked(found, Options(timeout_s=1e9)) == []
    assert bool(found.note) == (found.stop_ms > 300)


def test_a_copy_longer_than_its_time_limit_is_refused() -> None:
    options = Options(bandwidth_bytes_per_s=MIB, timeout_s=60)
    found = forecast(gauge(128, 0, 12), options)
    assert blocked(found, options) == ["too_slow"]
    assert blocked(found, Options(timeout_s=600)) == []
    assert blocked(found, Options(timeout_s=60, timeout_action="pause")) == []


def test_the_rate_is_the_operators_else_the_last_measured_else_a_stated_one() -> None:
    assert link_rate(Options(bandwidth_bytes_per_s=7), 9.0) == (7.0, "bandwidth")
    assert link_rate(Options(), 9.0) == (9.0, "last move")
    assert link_rate(Options(), 0.0) == (LINK, "assumed")


def test_pages_of_zeros_that_the_last_move_did_not_send_are_not_reckoned() -> None:
    whole, half = (forecast(gauge(1024, 0), Options(), filled=part) for part in (1.0, 0.5))
    assert half.sent_bytes * 2 == whole.sent_bytes


def moved(at_ns: int, old: str, new: str, sent: int, rate: float, name: str = "web") -> Handover:
    return msgspec.structs.replace(
        in_phase("closed"),
        vm=msgspec.structs.replace(VM, name=name),
        old_nve=old,
        new_nve=new,
        commit_ns=at_ns,
        memory=Memory(total_bytes=100, sent_bytes=sent, bandwidth_bytes_per_s=rate),
    )


def test_the_last_move_teaches() -> None:
    """The rate of the last one between the two hosts, what the last one of this VM had to send."""
    ended = [
        moved(3, OLD, NEW, 40, 7.0),
        moved(2, OLD, NEW, 90, 9.0),
        moved(4, NEW, "h3", 60, 8.0),
        moved(5, NEW, OLD, 99, 6.0, "db"),
        msgspec.structs.replace(moved(6, OLD, NEW, 1, 1.0), outcome="aborted"),
        msgspec.structs.replace(moved(7, OLD, NEW, 1, 1.0), mode="cold"),
    ]
    assert seen_before(ended, VM, NEW) == (6.0, 0.6)
    assert seen_before([], VM, NEW) == (0.0, 1.0)


@pytest.mark.req("R-69")
def test_a_receipt_has_the_forecast_beside_what_came() -> None:
    """The error of the forecast is published, so that the next one can be judged."""
    found = forecast(gauge(100, 0), Options(bandwidth_bytes_per_s=100 * MIB))
    record = msgspec.structs.replace(
        in_phase("closed"),
        forecast=found,
        stop_ns=10**9,
        resume_ns=10**9 + 50 * 10**6,
        memory=Memory(sent_bytes=90 * MIB),
    )
    told = receipt(record)["forecast"]
    assert (told["sent_bytes"], told["copy_ms"], told["stop_ms"]) == (100 * MIB, 1000.0, 30.0)
    assert told["real"]["stop_ms"] == 50.0
    assert told["error"]["stop_ms"] == 20.0
    assert told["error"]["sent_bytes"] == -10 * MIB
    open_move = receipt(msgspec.structs.replace(planned(), forecast=found))["forecast"]
    assert open_move["real"] == open_move["error"] == dict.fromkeys(open_move["real"])
    assert receipt(planned())["forecast"] is None
