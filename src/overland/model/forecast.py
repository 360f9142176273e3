"""What a hot move is expected to cost before it begins, and from what that was reckoned."""

from __future__ import annotations

from typing import Literal

from overland.model.cluster import Record

RateFrom = Literal["bandwidth", "last move", "assumed"]


class Gauge(Record, frozen=True, kw_only=True):
    """A running VM as its hypervisor has just measured it.

    `memory_bytes` is all that a move would look at. `countdown_bytes` as in Transfer: not 0 where
    there is one round only.
    """

    memory_bytes: int
    dirty_bytes_per_s: float
    countdown_bytes: int = 0


class Forecast(Record, frozen=True, kw_only=True):
    """Expected: `sent_bytes` in `copy_ms` while the VM runs, `rest_bytes` in a stop of `stop_ms`.

    `rate_bytes_per_s` is what the network is taken to carry, and `rate_from` why. `converges`:
    rounds over memory get small enough for the operator's longest stop. `note`: what an operator
    should know of it, or empty.
    """

    sent_bytes: int
    rest_bytes: int
    copy_ms: float
    stop_ms: float
    rounds: int
    dirty_bytes_per_s: float
    rate_bytes_per_s: float
    rate_from: RateFrom
    converges: bool
    note: str = ""
