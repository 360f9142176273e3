"""A host's kernel as a value: what a write makes of it, and where a frame goes by it.

It refuses what Linux refuses (an entry by a port that is not there), and a device that goes takes
its entries along.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache

import msgspec

from overland.model.nve import (
    FLOOD,
    BridgeEntry,
    Fact,
    InTransit,
    KernelState,
    Link,
    Muted,
    Neighbour,
    Op,
    OpFailure,
    TunnelEntry,
)

KEPT = 20_000
"""Seeds come by the same states again and again: what follows from one is worked out once."""

_FIELDS = {
    Link: "links",
    BridgeEntry: "bridge_entries",
    TunnelEntry: "tunnel_entries",
    Neighbour: "neighbours",
    Muted: "muted",
    InTransit: "in_transit",
}
Failures = tuple[OpFailure, ...]


class FakeKernel:
    """What is ours in one host's kernel; it outlives the daemon."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = KernelState()

    def apply(self, ops: Sequence[Op]) -> Failures:
        """Perform `ops` in order; what is refused does not stop the others."""
        self.state, failures = after(self.state, tuple(ops))
        return failures

    def has(self, link: str) -> bool:
        return has_link(self.state, link)


@lru_cache(KEPT)
def after(state: KernelState, ops: tuple[Op, ...]) -> tuple[KernelState, Failures]:
    """The state that `ops` make of `state`, and what was refused."""
    facts = {_key(fact): fact for name in _FIELDS.values() for fact in getattr(state, name)}
    failures = []
    for op in ops:
        fact = op.fact
        if op.verb == "put" and (why := _refusal(facts, fact)):
            failures.append(OpFailure(op=op, why=why))
        elif op.verb == "put":
            facts[_key(fact)] = fact
        else:
            facts.pop(_key(fact), None)
            if isinstance(fact, Link):
                facts = {key: each for key, each in facts.items() if fact.name not in _on(each)}
    return _state(facts), tuple(failures)


@lru_cache(KEPT)
def has_link(state: KernelState, name: str) -> bool:
    return any(link.name == name for link in state.links)


@lru_cache(KEPT)
def way(state: KernelState, device: str, mac: str) -> str | None:
    """Where a frame of this host's tenants for `mac` goes: a local port, or an NVE's address.

    None: the bridge does not know; it would flood, and that is a hole in the mappings.
    """
    port = next((each.port for each in state.bridge_entries if each.mac == mac), None)
    if port != device:
        return port
    return remote_of(state, mac)


@lru_cache(KEPT)
def remote_of(state: KernelState, mac: str) -> str | None:
    """Where what leaves by the VXLAN device for `mac` goes."""
    return next((each.remote for each in state.tunnel_entries if each.mac == mac), None)


@lru_cache(KEPT)
def drops(state: KernelState, port: str, mac: str) -> bool:
    """Tell whether frames to `mac` that come in by `port` are dropped and counted (R-33)."""
    return any(each.mac == mac and each.port == port for each in state.in_transit)


def difference(one: KernelState, other: KernelState) -> str:
    """What only one of the two has, in words."""
    mine, others = (
        {f for name in _FIELDS.values() for f in getattr(s, name)} for s in (one, other)
    )
    return (
        f"too much: {sorted(map(repr, mine - others))}, missing: {sorted(map(repr, others - mine))}"
    )


def _state(facts: dict[Hashable, Fact]) -> KernelState:
    of_kind: dict[str, list[Fact]] = {name: [] for name in _FIELDS.values()}
    for fact in facts.values():
        of_kind[_FIELDS[type(fact)]].append(fact)
    return msgspec.structs.replace(
        KernelState(), **{name: frozenset(each) for name, each in of_kind.items()}
    )


def _key(fact: Fact) -> Hashable:
    """The kernel has one fact for each of these: what is put takes its predecessor's place."""
    match fact:
        case Link(name=name):
            return (Link, name)
        case BridgeEntry(bridge=bridge, mac=mac):
            return (BridgeEntry, bridge, mac)
        case TunnelEntry(device=device, mac=mac, remote=remote):
            return (TunnelEntry, device, mac, remote if mac == FLOOD else "")
        case Neighbour(bridge=bridge, address=address):
            return (Neighbour, bridge, address)
        case Muted(port=port):
            return (Muted, port)
        case InTransit(port=port, mac=mac):
            return (InTransit, port, mac)
        case _:
            raise AssertionError(f"no VN is routed here: {fact}")


def _on(fact: Fact) -> tuple[str, ...]:
    """The devices that `fact` stands on."""
    match fact:
        case BridgeEntry(bridge=bridge, port=port):
            return (bridge, port)
        case TunnelEntry(device=device):
            return (device,)
        case Neighbour(bridge=bridge):
            return (bridge,)
        case _:
            return ()


def _refusal(facts: dict[Hashable, Fact], fact: Fact) -> str:
    missing = [device for device in _on(fact) if (Link, device) not in facts]
    if isinstance(fact, Link) and fact.master and (Link, fact.master) not in facts:
        missing.append(fact.master)
    return f"there is no {' nor '.join(missing)}" if missing else ""
