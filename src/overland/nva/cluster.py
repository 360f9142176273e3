"""One consistent view of all records. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from overland.model.cluster import (
    Endpoint,
    Gateway,
    Host,
    Interface,
    Leg,
    Network,
    Policy,
    Record,
    Vm,
    VmState,
    WaysOut,
    numbered,
)
from overland.model.eligibility import Eligibility
from overland.model.handover import Handover, Marking, marking
from overland.model.readdress import beside

AT_REST: tuple[VmState, ...] = ("shutdown", "suspended", "crashed")
"""States of a VM that does not run and is not about to."""

TsiState = Literal["init", "associated", "activated"]

_CLOSED: dict[VmState, TsiState] = {
    "shutdown": "init",
    "preparing": "associated",
    "suspended": "associated",
    "crashed": "associated",
}
"""What the interfaces of a VM in such a state are; in all others they are activated."""


def tsi_state(vm: Vm, interface: Interface) -> TsiState:
    """What `interface` of `vm` is on the VM's host (RFC 8394, requirements 3.3).

    Init: a record and no more. Associated: its port is there, but nothing passes, and no peer is
    told where it is. Activated: in use.
    """
    state = _CLOSED.get(vm.state, "activated")
    is_coming = interface.change == "adding" and state == "activated"
    return "associated" if is_coming else state


class Tsi(Record, frozen=True, kw_only=True):
    """One interface with its owner and place, be it a VM's, an endpoint's or a gateway's."""

    owner: str
    index: int
    kind: Literal["tap", "veth", "gateway"]
    host: str
    interface: Interface
    version: int
    namespace: str | None = None
    state: TsiState = "activated"
    marking: Marking = "none"
    leg: Leg | None = None
    beside: tuple[str, ...] = ()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Every IP address that is its own now."""
        own = (self.interface.ipv4, self.interface.ipv6)
        return (*(address for address in own if address), *self.beside)


@dataclass(slots=True)
class Cluster:
    """Records by name. The authority is its only writer."""

    networks: dict[str, Network] = field(default_factory=dict)
    hosts: dict[str, Host] = field(default_factory=dict)
    vms: dict[str, Vm] = field(default_factory=dict)
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    gateways: dict[str, Gateway] = field(default_factory=dict)
    """By network and host."""
    ways_out: dict[str, WaysOut] = field(default_factory=dict)
    """By network and family: who uses which of the gateways."""
    policies: dict[str, Policy] = field(default_factory=dict)
    """By the pair of networks."""
    eligibilities: dict[str, Eligibility] = field(default_factory=dict)
    """By VM; of most there is none."""
    moves: dict[str, Handover] = field(default_factory=dict)
    """Open moves only."""

    def tsis(self) -> Iterator[Tsi]:
        """Every interface, where its owner's record says it is."""
        for vm in self.vms.values():
            move = self.moves.get(vm.move or "")
            for index, interface in numbered(vm):
                yield Tsi(
                    owner=vm.name,
                    index=index,
                    kind="tap",
                    host=vm.host,
                    interface=interface,
                    version=vm.version,
                    state=tsi_state(vm, interface),
                    marking=marking(move) if move is not None else "none",
                    beside=beside(interface, move.readdress if move is not None else None),
                )
        for endpoint in self.endpoints.values():
            yield Tsi(
                owner=endpoint.name,
                index=0,
                kind="veth",
                host=endpoint.host,
                interface=endpoint.interface,
                version=endpoint.version,
                namespace=endpoint.namespace,
            )
        for gateway in self.gateways.values():
            yield Tsi(
                owner=gateway.owner,
                index=0,
                kind="gateway",
                host=gateway.host,
                interface=gateway.interface,
                version=gateway.version,
                leg=gateway.leg,
            )

    def is_dead(self, host: str) -> bool:
        """Whether host `host` is known to be dead."""
        found = self.hosts.get(host)
        return found is not None and found.dead

    def gateways_of(self, network: str) -> list[Gateway]:
        """The gateways of `network`, in the order of their hosts."""
        mine = (each for each in self.gateways.values() if each.network == network)
        return sorted(mine, key=lambda each: each.host)

    def near(self, networks: Iterable[str]) -> frozenset[str]:
        """These networks, and those whose tenants theirs may talk with (N-15)."""
        asked = frozenset(networks)
        if not self.policies:
            return asked
        pairs = (frozenset(policy.networks) for policy in self.policies.values())
        return asked.union(*(pair for pair in pairs if pair & asked))

    def places(self, network: str) -> set[str]:
        """Hosts with an interface in `network` or near it, and those where one is about to come.

        What is a peer in a move stays one until its end, whatever is no longer allowed meanwhile.
        """
        near = self.near((network,))
        hosts = {
            vm.host
            for vm in self.vms.values()
            for each in vm.interfaces
            if each.network in near and tsi_state(vm, each) != "init"
        }
        hosts |= {at.host for at in self.endpoints.values() if at.interface.network in near}
        hosts |= {at.host for at in self.gateways.values() if at.interface.network in near}
        for move in self.moves.values():
            ports = {port.network for port in move.ports}
            if ports & near:
                hosts |= {move.new_nve, move.old_nve}
            if network in ports:
                hosts |= set(move.peers)
        return hosts
