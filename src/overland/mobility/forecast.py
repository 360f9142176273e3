"""What a hot move will cost, reckoned before it begins: the rules of pre-copy played in numbers.

Pure. It knows the two ways in which memory is copied (convergence.py): several rounds, each over
what was written in the one before, until the rest is small; or, under emulation, one round, at the
end of which the VM stops (ADR 0006), so that it always ends, however much is written.
"""

from __future__ import annotations

from collections.abc import Iterable

from overland.mobility.convergence import (
    GOAL_STOP_S,
    IMPATIENT_AFTER_PASSES,
    LAST_PART,
    SINGLE_ROUND_BYTES_PER_S,
)
from overland.model.cluster import Vm
from overland.model.forecast import Forecast, Gauge, RateFrom
from overland.model.handover import Handover, Options

ASSUMED_LINK_BYTES_PER_S = 1_250_000_000
"""Of a link of which nothing is known: 10 Gbit/s."""

EMULATED_BYTES_PER_S = 512 << 20
"""What QEMU sends at most of an emulated VM, whatever the link takes."""

BASE_STOP_S = 0.03
"""Of every stop: the state of the devices, the orders between the hosts, RESUME."""

MAX_ROUNDS = 100
"""A copy that is not done by then is taken never to be."""


def link_rate(options: Options, measured_bytes_per_s: float) -> tuple[float, RateFrom]:
    """What the network carries: the operator's limit, else as last measured (0: never was)."""
    if options.bandwidth_bytes_per_s:
        return float(options.bandwidth_bytes_per_s), "bandwidth"
    if measured_bytes_per_s > 0:
        return measured_bytes_per_s, "last move"
    return float(ASSUMED_LINK_BYTES_PER_S), "assumed"


def forecast(
    gauge: Gauge, options: Options, *, measured_bytes_per_s: float = 0.0, filled: float = 1.0
) -> Forecast:
    """Reckon a hot move of a VM that was gauged so.

    `measured_bytes_per_s` is what the last move between the two hosts has seen, 0 for none.
    `filled` (0 to 1) is the part of the VM's memory that its last move had to send: pages of zeros
    cost nothing.
    """
    one_round = gauge.countdown_bytes > 0
    rate, why = link_rate(options, 0.0 if one_round else measured_bytes_per_s)
    if one_round:
        return _one_round(gauge, options, rate, why, filled)
    return _rounds(gauge, options, rate, why, filled)


def seen_before(ended: Iterable[Handover], vm: Vm, to: str) -> tuple[float, float]:
    """(bytes/s of the last move between these hosts, part of memory this VM's last move sent)."""
    measured, filled = 0.0, 1.0
    moved = (each for each in ended if each.outcome == "moved" and each.mode != "cold")
    for move in sorted(moved, key=lambda each: each.commit_ns):
        if {move.old_nve, move.new_nve} == {vm.host, to} and move.memory.bandwidth_bytes_per_s:
            measured = move.memory.bandwidth_bytes_per_s
        if move.vm.name == vm.name and move.vm.memory_mib == vm.memory_mib:
            total = move.memory.total_bytes
            filled = min(1.0, move.memory.sent_bytes / total) if total else filled
    return measured, filled


def _one_round(
    gauge: Gauge, options: Options, rate: float, why: RateFrom, filled: float
) -> Forecast:
    pace = min(rate, SINGLE_ROUND_BYTES_PER_S)
    countdown_bytes = gauge.countdown_bytes * (1 - LAST_PART)
    sent = max(0.0, gauge.memory_bytes - gauge.countdown_bytes) * filled
    copy_s = (sent + countdown_bytes) / pace
    written = min(gauge.memory_bytes, gauge.dirty_bytes_per_s * copy_s)
    rest = written + gauge.countdown_bytes * LAST_PART
    # The rest goes unpaced, because the VM hears nothing meanwhile.
    stop_s = BASE_STOP_S + rest / min(EMULATED_BYTES_PER_S, ASSUMED_LINK_BYTES_PER_S)
    note = ""
    if stop_s * 1000 > options.max_downtime_ms:
        note = f"one round only: the stop will be about {stop_s * 1000:.0f} ms, whatever is wished"
    return Forecast(
        sent_bytes=int(sent + countdown_bytes),
        rest_bytes=int(rest),
        copy_ms=_ms(copy_s),
        stop_ms=_ms(stop_s),
        rounds=1,
        dirty_bytes_per_s=gauge.dirty_bytes_per_s,
        rate_bytes_per_s=rate,
        rate_from=why,
        converges=True,
        note=note,
    )


def _rounds(gauge: Gauge, options: Options, rate: float, why: RateFrom, filled: float) -> Forecast:
    limit_s = options.max_downtime_ms / 1000
    left, sent, copy_s, rounds = gauge.memory_bytes * filled, 0.0, 0.0, 0
    converges = False
    while not converges and rounds < MAX_ROUNDS:
        rounds += 1
        sent += left
        copy_s += left / rate
        left = min(gauge.memory_bytes, gauge.dirty_bytes_per_s * left / rate)
        goal_s = min(GOAL_STOP_S, limit_s) if rounds + 1 < IMPATIENT_AFTER_PASSES else limit_s
        converges = left / rate <= goal_s
    note = ""
    if not converges:
        note = (
            f"it writes {gauge.dirty_bytes_per_s / 2**20:.0f} MiB/s, the link takes "
            f"{rate / 2**20:.0f}: its memory would never be equal within {limit_s * 1000:.0f} ms"
        )
    return Forecast(
        sent_bytes=int(sent),
        rest_bytes=int(left),
        copy_ms=_ms(copy_s),
        stop_ms=_ms(BASE_STOP_S + left / rate),
        rounds=rounds,
        dirty_bytes_per_s=gauge.dirty_bytes_per_s,
        rate_bytes_per_s=rate,
        rate_from=why,
        converges=converges,
        note=note,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
