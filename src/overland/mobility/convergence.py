"""How fast to send memory, and when to stop the VM: the rules of pre-copy. Pure."""

from __future__ import annotations

from overland.model.handover import Options, Transfer

IMPATIENT_AFTER_PASSES = 6
"""Rounds over memory after which the operator's limit counts instead of our own goal."""

GOAL_STOP_S = 0.02
"""Expected time to send what remains, for which a few more rounds are worth waiting."""

SINGLE_ROUND_BYTES_PER_S = 192 << 20
"""Of a single round: fast enough that little is written meanwhile, slow enough to be watched."""

LAST_PART = 1 / 8
"""The part of the countdown with which the VM may be stopped."""

UNSEEN_PART = 1 / 24
"""The part of the countdown that is never sent before the VM may be stopped.

Between it and the last part lies at least what QEMU can have written ahead (hypervisor.channel):
else the leash could become so short that nothing goes on.
"""

STOPPED = ("waiting", "completed")
"""Of a transfer: the VM has been stopped already."""


def expected_stop_s(transfer: Transfer) -> float:
    """Seconds to send what remains at the present rate; infinite while nothing is known."""
    if transfer.bandwidth_bytes_per_s <= 0:
        return float("inf")
    return transfer.remaining_bytes / transfer.bandwidth_bytes_per_s


def converged(transfer: Transfer, options: Options) -> bool:
    """Tell whether the VM may be stopped now.

    Of a single round: late in its countdown. Of several: after the first whole round, as soon as
    the rest fits our goal; after some, as soon as it fits what the operator allows.
    """
    if transfer.status in STOPPED:
        return True
    if transfer.countdown_bytes:
        return _within(transfer, transfer.countdown_bytes * LAST_PART)
    if transfer.status != "active" or transfer.passes < 2:
        return False
    limit_s = options.max_downtime_ms / 1000
    goal_s = GOAL_STOP_S if transfer.passes < IMPATIENT_AFTER_PASSES else limit_s
    return expected_stop_s(transfer) <= min(goal_s, limit_s)


def first_pace(options: Options) -> int:
    """Bytes/s to begin with, until the first look tells whether there is one round only.

    On a busy host that look may come late, and a single round must not be over by then.
    """
    limit = options.bandwidth_bytes_per_s
    return min(limit, SINGLE_ROUND_BYTES_PER_S) if limit else SINGLE_ROUND_BYTES_PER_S


def pace(transfer: Transfer, options: Options) -> int:
    """Bytes/s at which to send from now on; 0 is no limit but the operator's (`--bandwidth`)."""
    if not transfer.countdown_bytes:
        return options.bandwidth_bytes_per_s or 0
    return first_pace(options)


def leash(transfer: Transfer) -> int | None:
    """Bytes that may be written before somebody looks again; None is no limit.

    Of a single round: what is left before the countdown may cost nothing (pages of zeros), so until
    it is reached as much as the countdown has, then as much as is left of it; but never the last.
    """
    if not transfer.countdown_bytes:
        return None
    sure = min(transfer.countdown_bytes, transfer.remaining_bytes or transfer.countdown_bytes)
    return max(0, sure - int(transfer.countdown_bytes * UNSEEN_PART))


def _within(transfer: Transfer, left_bytes: float) -> bool:
    return transfer.status == "active" and 0 < transfer.remaining_bytes <= left_bytes
