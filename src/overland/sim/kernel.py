"""A host's kernel as a value: what a write makes of it, and where a frame goes by it.

It refuses what Linux refuses (an entry by a port that is not there), and a device that goes takes
its entries along.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import NamedTuple

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
from overland.sim.domain import DEVICE, MAC, PORT

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

    __slots__ = ("forwarding", "state")

    def __init__(self) -> None:
        self.state = KernelState()
        self.forwarding = forwarding(self.state)

    def apply(self, ops: tuple[Op, ...]) -> Failures:
        """Perform `ops` in order; what is refused does not stop the others."""
        self.state, failures = after(self.state, ops)
        self.forwarding = forwarding(self.state)
        return failures


class Forwarding(NamedTuple):
    """What a host does with frames for the VM.

    `has_port`: it is here, or about to come. `way`: where those of this host's tenants go, a local
    port or an NVE's address; None: the bridge does not know. It would flood, and that is a hole in
    the mappings. `remote`: where what leaves by the VXLAN device goes. `drops`: what comes in by
    that device is dropped and counted (R-33).
    """

    has_port: bool
    way: str | None
    remote: str | None
    drops: bool


@lru_cache(KEPT)
def forwarding(state: KernelState) -> Forwarding:
    port = next((each.port for each in state.bridge_entries if each.mac == MAC), None)
    remote = next((each.remote for each in state.tunnel_entries if each.mac == MAC), None)
    return Forwarding(
        has_port=any(link.name == PORT for link in state.links),
        way=remote if port == DEVICE else port,
        remote=remote,
        drops=InTransit(port=DEVICE, mac=MAC) in state.in_transit,
    )


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
