"""The receipt of a move: what happened, in numbers that anyone can check. Pure.

Keys are those of docs/reference/receipt.md; they are stable, and times carry their unit.
"""

from __future__ import annotations

import statistics
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from overland.model.handover import Handover, is_up

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def timestamp(at_ns: int) -> str:
    """RFC 3339 text, in UTC with microseconds, of CLOCK_REALTIME ns."""
    moment = _EPOCH + timedelta(microseconds=at_ns // 1000)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _ms(later_ns: int, earlier_ns: int) -> float | None:
    """Milliseconds from `earlier_ns` to `later_ns`, not below 0; None when one never came."""
    if not later_ns or not earlier_ns:
        return None
    return round(max(0, later_ns - earlier_ns) / 1e6, 3)


def receipt(record: Handover) -> dict[str, Any]:
    """Return the receipt of `record`, also of a move under way (what has not come yet is null)."""
    first_ns = record.phases[0].at_ns if record.phases else 0
    packets = record.packets
    return {
        "id": record.id,
        "vm": record.vm.name,
        "mode": record.mode,
        "old_nve": record.old_nve,
        "new_nve": record.new_nve,
        "outcome": record.outcome,
        "reason": record.reason,
        "version": record.version,
        "phase": record.phase,
        "phases": [{"phase": p.phase, "at": timestamp(p.at_ns)} for p in record.phases],
        "total_ms": _ms(record.closed_ns, first_ns),
        "vm_stop_ms": _ms(record.resume_ns, record.stop_ns),
        "network_gap_ms": _gap(record),
        "outage_ms": outage_ms(record),
        "held_before_stop_ms": _ms(record.stop_ns, record.held_ns),
        "memory": {
            "total_bytes": record.memory.total_bytes,
            "sent_bytes": record.memory.sent_bytes,
            "resent_bytes": record.memory.resent_bytes,
            "rounds": record.memory.rounds,
            "digest": record.digest_new.partition(" ")[0] or None,
        },
        "eligibility": _eligibility(record),
        "addresses": _addresses(record),
        "checkpoints": _checkpoints(record),
        "forecast": _forecast(record),
        "storage": {
            "sent_bytes": record.storage.sent_bytes,
            "resent_bytes": record.storage.resent_bytes,
            "digests": record.digest_new.split(" ")[1:],
            "left": [
                {"disk": disk.path, "at": disk.at}
                for disk in record.vm.disks
                if disk.kind == "left"
            ],
        },
        "packets": {
            "held": packets.held,
            "rescued": packets.rescued,
            "redirected": packets.redirected,
            "late": packets.late,
            "residual": packets.residual,
            "dropped": packets.dropped,
        },
        "last_redirected_after_commit_ms": _ms(
            max(packets.last_redirected_ns, record.commit_ns), record.commit_ns
        ),
        "tunnel_closed_after_commit_ms": _ms(record.closed_ns, record.commit_ns),
        "tunnel_close_reason": record.close_reason,
        "peers": _peers(record),
    }


def _eligibility(record: Handover) -> dict[str, Any] | None:
    """Why the move could begin, and who knew that (R-28); None of one that is older than this."""
    grounds = record.grounds
    if grounds is None:
        return None
    return {
        "basis": grounds.basis,
        "origin": grounds.origin,
        "at": timestamp(grounds.at_ns),
        "flags": list(grounds.flags),
    }


def _addresses(record: Handover) -> dict[str, Any] | None:
    """Which addresses the move changes, and when the old ones ended; None where all stay."""
    readdress = record.readdress
    if readdress is None:
        return None
    return {
        "changes": [
            {"network": each.network, "old": list(each.old), "new": list(each.new)}
            for each in readdress.changes
        ],
        "keep_ms": round(readdress.keep_s * 1000, 3),
        "old_until": timestamp(readdress.until_ns) if readdress.until_ns else None,
        "old_ended": timestamp(readdress.ended_ns) if readdress.ended_ns else None,
        "old_ended_because": readdress.ended_because or None,
        "dns": readdress.dns or None,
    }


def _checkpoints(record: Handover) -> dict[str, Any] | None:
    """What a warm move took before its last delta (R-12); None of the others.

    `last_age_ms`: how old the newest one was when the VM stopped, or, where it did not, at the end.
    """
    if record.mode != "warm":
        return None
    taken = record.checkpoints
    return {
        "interval_ms": round(record.options.interval_s * 1000, 3),
        "count": taken.count,
        "last_at": timestamp(taken.at_ns) if taken.at_ns else None,
        "last_age_ms": _ms(record.stop_ns or record.closed_ns, taken.at_ns),
        "worst_age_ms": round(taken.worst_age_ms, 3),
        "pause_ms": statistics.median(taken.pauses_ms) if taken.pauses_ms else None,
        "sent_bytes": taken.sent_bytes,
    }


def _forecast(record: Handover) -> dict[str, Any] | None:
    """What was expected, what came, and by how much it was wrong (R-69); None without a forecast.

    `sent_bytes` are those sent while the VM ran; the rest goes while it is stopped.
    """
    if record.forecast is None:
        return None
    entered = {each.phase: each.at_ns for each in record.phases}
    began_ns = max(entered.get("precopy", 0), record.checkpoints.kept_ns)
    real = {
        "sent_bytes": record.memory.sent_bytes if record.stop_ns else None,
        "copy_ms": _ms(entered.get("paused", 0), began_ns),
        "stop_ms": _ms(record.resume_ns, record.stop_ns),
    }
    expected: dict[str, Any] = msgspec.to_builtins(record.forecast)
    error = {
        key: None if value is None else round(value - expected[key], 3)
        for key, value in real.items()
    }
    return expected | {"real": real, "error": error}


def outage_ms(record: Handover) -> float | None:
    """How long the VM could not be reached (R-34, R-62), whatever the mode.

    Cold: from the marking in transit, which silences its peers, to the last subscriber that has the
    address in use again. Hot: from the closing of the old gate to RESUME. None at rest.
    """
    if record.mode != "cold":
        return _ms(record.resume_ns, record.held_ns)
    if not is_up(record.vm):
        return None
    at_ns = {each.phase: each.at_ns for each in record.phases}
    return _ms(at_ns.get("drained", 0), at_ns.get("staged", 0))


def _gap(record: Handover) -> float | None:
    """What the network added to the stop: hold to STOP, and RESUME to the first frame direct.

    The VM heard nothing since the old gate closed, so that counts as well (ADR 0008). A frame that
    came by the final path before RESUME waited in the tap's ring and was delivered at once. For the
    old host's own tenants the tunnel is no detour, and so the final path. None when no tenant sent
    anything.
    """
    before_ms = _ms(record.stop_ns, record.held_ns)
    after_ms = _ms(record.packets.first_direct_ns, record.resume_ns)
    if before_ms is None or after_ms is None:
        return None
    return round(before_ms + after_ms, 3)


def _peers(record: Handover) -> dict[str, Any]:
    """Subscribers that held the old mapping: the old NVE and the peers."""
    holders = {record.old_nve, *record.peers} if record.mode != "storage" else set()
    seen = [each for each in record.acknowledged if each.nve in holders]
    slowest = max(seen, key=lambda each: each.at_ns, default=None)
    return {
        "subscribed": len(holders),
        "acknowledged": len(seen),
        "steered_before_resume": sum(
            each.nve in holders and each.at_ns <= record.resume_ns for each in record.steered
        ),
        "fenced": list(record.fenced),
        "slowest": slowest.nve if slowest else None,
        "slowest_ms": _ms(slowest.at_ns, record.commit_ns) if slowest else None,
    }
