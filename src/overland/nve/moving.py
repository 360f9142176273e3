"""Who writes what while a VM moves: the handover, or the reconcile loop. Pure.

From its preparation to its end a handover is the only writer of the forwarding entries of the
moved MAC and of its port's mute; the loop leaves them as they are. It takes them back, one by one,
as soon as the intent carries the committed version.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from overland.model.cluster import Record
from overland.model.nve import KernelState, NveIntent


class Moving(Record, frozen=True, kw_only=True):
    """One interface under way; `version` is the one the move began with."""

    role: Literal["old", "new", "peer"]
    mac: str
    port: str
    device: str
    bridge: str
    version: int


def settle(
    desired: KernelState, actual: KernelState, intent: NveIntent, moving: frozenset[Moving]
) -> KernelState:
    """Return `desired` with what belongs to a handover replaced by what is there."""
    for each in moving:
        desired = _keep_port(desired, actual, each)
        if not _superseded(intent, each):
            desired = _keep_paths(desired, actual, each)
    return desired


def _superseded(intent: NveIntent, moving: Moving) -> bool:
    """Tell whether the intent knows of the commit, or the MAC has no place in it any more."""
    here = [tsi.state for vn in intent.vns for tsi in vn.tsis if tsi.mac == moving.mac]
    there = [r.version for vn in intent.vns for r in vn.remotes if r.mac == moving.mac]
    if moving.role == "new":
        return "activated" in here or not (here or there)
    if moving.role == "old":
        return False  # stale senders still come through here; the handover turns it at its close
    return any(version > moving.version for version in there) or not there


def _keep_port(desired: KernelState, actual: KernelState, moving: Moving) -> KernelState:
    """A port of a move stays until the move is closed, whatever the intent says."""
    if any(link.name == moving.port for link in desired.links):
        return desired
    kept = frozenset(link for link in actual.links if link.name == moving.port)
    return msgspec.structs.replace(desired, links=desired.links | kept)


def _keep_paths(desired: KernelState, actual: KernelState, moving: Moving) -> KernelState:
    def ours(bridge: str, mac: str) -> bool:
        return bridge in (moving.bridge, moving.device) and mac == moving.mac

    entries = {e for e in desired.bridge_entries if not ours(e.bridge, e.mac)}
    entries |= {e for e in actual.bridge_entries if ours(e.bridge, e.mac)}
    tunnels = {e for e in desired.tunnel_entries if not ours(e.device, e.mac)}
    tunnels |= {e for e in actual.tunnel_entries if ours(e.device, e.mac)}
    locators = {e for e in desired.locator_entries if not ours(e.device, e.mac)}
    locators |= {e for e in actual.locator_entries if ours(e.device, e.mac)}
    # What is wanted here too: the new NVE takes in from the first what is sent to it.
    identifiers = desired.identifier_entries | {
        e for e in actual.identifier_entries if ours(e.device, e.mac)
    }
    muted = {m for m in desired.muted if m.port != moving.port}
    muted |= {m for m in actual.muted if m.port == moving.port}
    return msgspec.structs.replace(
        desired,
        bridge_entries=frozenset(entries),
        tunnel_entries=frozenset(tunnels),
        locator_entries=frozenset(locators),
        identifier_entries=identifiers,
        muted=frozenset(muted),
    )
