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
)
from overland.model.eligibility import Eligibility
from overland.model.handover import Handover, Marking, marking
from overland.model.readdress import beside

AT_REST: tuple[VmState, ...] = ("shutdown", "suspended", "crashed")
"""States in which a VM's interfaces are associated only: nothing from them, nothing to them."""


class Tsi(Record, frozen=True, kw_only=True):
    """One interface with its owner and place, be it a VM's, an endpoint's or a gateway's."""

    owner: str
    index: int
    kind: Literal["tap", "veth", "gateway"]
    host: str
    interface: Interface
    version: int
    namespace: str | None = None
    active: bool = True
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
    """By network: there is one way out of each."""
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
            for index, interface in enumerate(vm.interfaces):
                yield Tsi(
                    owner=vm.name,
                    index=index,
                    kind="tap",
                    host=vm.host,
                    interface=interface,
                    version=vm.version,
                    active=vm.state not in AT_REST,
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

    def near(self, networks: Iterable[str]) -> frozenset[str]:
        """These networks, and those whose tenants theirs may talk with (N-15)."""
        asked = frozenset(networks)
        pairs = (frozenset(policy.networks) for policy in self.policies.values())
        return asked.union(*(pair for pair in pairs if pair & asked))

    def places(self, network: str) -> set[str]:
        """Hosts with an interface in `network` or near it, and those where one is about to come.

        What is a peer in a move stays one until its end, whatever is no longer allowed meanwhile.
        """
        near = self.near((network,))
        hosts = {tsi.host for tsi in self.tsis() if tsi.interface.network in near}
        for move in self.moves.values():
            ports = {port.network for port in move.ports}
            if ports & near:
                hosts |= {move.new_nve, move.old_nve}
            if network in ports:
                hosts |= set(move.peers)
        return hosts
