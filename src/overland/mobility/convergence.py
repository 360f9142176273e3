"""When to stop the VM: the one rule of pre-copy. Pure."""

from __future__ import annotations

from overland.model.handover import Options, Transfer

IMPATIENT_AFTER_PASSES = 6
"""Rounds over memory after which the operator's limit counts instead of our own goal."""

GOAL_STOP_S = 0.02
"""Expected time to send what remains, for which a few more rounds are worth waiting."""

LEAD_S = 0.1
"""Of a single round: how long before its end the gate closes: QEMU's own window of rate limiting,
within which it may send the whole rest at once."""

SWEEP_BYTES = 64 << 20
"""What may go by between two looks besides: pages of zeros are not sent, so no rate limits them."""

LAST_PART = 0.5
"""The same as a part of memory, while the rate is not known yet; and at the most."""


def expected_stop_s(transfer: Transfer) -> float:
    """Seconds to send what remains at the present rate; infinite while nothing is known."""
    if transfer.bandwidth_bytes_per_s <= 0:
        return float("inf")
    return transfer.remaining_bytes / transfer.bandwidth_bytes_per_s


def converged(transfer: Transfer, options: Options) -> bool:
    """Tell whether the VM may be stopped now.

    After the first whole round, as soon as the rest fits our goal; after some rounds, as soon as
    it fits what the operator allows.
    """
    if transfer.status == "completed":
        return True
    if transfer.single_round and transfer.status == "active":
        rate = transfer.bandwidth_bytes_per_s
        most = transfer.total_bytes * LAST_PART
        lead_bytes = min(rate * LEAD_S + SWEEP_BYTES, most) if rate > 0 else most
        return 0 < transfer.remaining_bytes <= lead_bytes
    if transfer.status != "active" or transfer.passes < 2:
        return False
    limit_s = options.max_downtime_ms / 1000
    goal_s = GOAL_STOP_S if transfer.passes < IMPATIENT_AFTER_PASSES else limit_s
    return expected_stop_s(transfer) <= min(goal_s, limit_s)
