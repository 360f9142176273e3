"""What each NVE is told of each VN, whole or as what has changed. Pure.

An NVE hears only of VNs in which it has an interface or is about to get one, and of those whose
tenants its own may talk with (N-04, N-15, R-44). Before the commit a moving VM is at the old NVE
and associated at the new; after it, at the new only. What an NVE on a dead host has mapped is told
to nobody (N-11).
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from typing import Literal

from overland.model.cluster import Host, Network
from overland.model.handover import Marking, committed
from overland.model.ila import own_address
from overland.model.names import gateway_of
from overland.model.nve import RemoteIntent, TsiIntent, VnChange, VnIntent
from overland.nva.cluster import Cluster, Tsi
from overland.nva.ways_out import Places, addresses, places


def underlay_address(host: Host, network: Network) -> str | None:
    """The host's address in the family that `network` is carried over; for ILA in its locator."""
    if network.kind == "ila":
        return own_address(host.locator) if host.locator else None
    return host.underlay_ipv4 if network.underlay == "ipv4" else host.underlay_ipv6


def gateways(network: Network) -> tuple[str, ...]:
    """The addresses of the router of a routed VN, each with its prefix length; none of an L2 VN."""
    if network.kind == "l2":
        return ()
    return tuple(gateway_of(subnet) for subnet in (network.ipv4, network.ipv6) if subnet)


NOTHING = VnChange()
"""What has changed where nothing has."""

_Difference = tuple[list[tuple[str, RemoteIntent]], list[str], bool]
"""Mappings that are new or other, with their hosts; MACs no longer mapped; the same members?"""


class VnView:
    """One VN at one instant, for all its NVEs: computed once, however many they are."""

    def __init__(self, cluster: Cluster, network: Network) -> None:
        self.network = network
        tsis = [tsi for tsi in cluster.tsis() if tsi.interface.network == network.name]
        self.versions = {tsi.owner: tsi.version for tsi in tsis}
        self.markings: dict[str, Marking] = {tsi.owner: tsi.marking for tsi in tsis}
        self._places = cluster.places(network.name)
        near = cluster.near((network.name,)) - {network.name}
        known = [cluster.networks[name].vni for name in near if name in cluster.networks]
        self.allowed = tuple(sorted(known))
        self._addresses = {
            name: address
            for name in self._places
            if name in cluster.hosts
            if (address := underlay_address(cluster.hosts[name], network))
        }
        self._members = {n: at for n, at in self._addresses.items() if not cluster.hosts[n].dead}
        self._all = sorted(self._members.values())
        self._last: tuple[VnView, _Difference] | None = None
        here: dict[str, list[TsiIntent]] = defaultdict(list)
        coming, ways = _coming(cluster), places(cluster, network.name)
        for tsi in sorted(tsis, key=_place):
            if tsi.state != "init":
                here[tsi.host].append(_local(tsi, tsi.state, ways))
            new = coming.get(tsi.owner, tsi.host) if tsi.kind == "tap" else tsi.host
            if new != tsi.host:
                here[new].append(_local(tsi, "associated", ways))
        self._here = {host: tuple(each) for host, each in here.items()}
        self._remotes = {
            tsi.interface.mac: (tsi.host, _remote(tsi, self._members[tsi.host]))
            for tsi in sorted(tsis, key=_mac)
            if tsi.state == "activated" and tsi.host in self._members
        }

    def includes(self, host: str) -> bool:
        """Tell whether NVE `host` has a part in the VN, and an address to have it at."""
        return host in self._places and host in self._addresses

    def intent(self, host: str) -> VnIntent:
        """The VN as NVE `host` must have it, which it includes."""
        network = self.network
        return VnIntent(
            network=network.name,
            vni=network.vni,
            mtu=network.mtu,
            underlay=network.underlay,
            local=self._addresses[host],
            ila=network.kind == "ila",
            gateways=gateways(network),
            allowed=self.allowed,
            ipv4_prefix=_prefix(network.ipv4, 24),
            ipv6_prefix=_prefix(network.ipv6, 64),
            members=self._others(host),
            tsis=self._tsis(host),
            remotes=tuple(remote for at, remote in self._remotes.values() if at != host),
        )

    def own(self, host: str, owner: str) -> tuple[TsiIntent, ...]:
        """The interfaces that `owner` has at NVE `host`."""
        return tuple(tsi for tsi in self._tsis(host) if tsi.owner == owner)

    def change(self, host: str, since: VnView) -> VnChange | None:
        """What NVE `host` has to change when it has `since`; None when only the whole will do."""
        same = since._addresses.get(host) == self._addresses[host]
        same = same and (since.network, since.allowed) == (self.network, self.allowed)
        if not (same and since.includes(host)):
            return None
        put, gone, same_members = self._difference(since)
        tsis = self._tsis(host)
        if same_members and not put and not gone and tsis == since._tsis(host):
            return NOTHING
        return VnChange(
            members=None if same_members else self._others(host),
            tsis=None if tsis == since._tsis(host) else tsis,
            remotes=tuple(remote for at, remote in put if at != host),
            gone=(*gone, *(remote.mac for at, remote in put if at == host)),
        )

    def same_tenants(self, host: str, since: VnView) -> bool:
        """Whether NVE `host`, which has `since`, has its own tenants as they must be."""
        return since.includes(host) and self._tsis(host) == since._tsis(host)

    def versions_since(self, since: VnView) -> dict[str, int]:
        """The versions that are news to whoever has `since`."""
        return dict(self.versions.items() - since.versions.items())

    def _difference(self, since: VnView) -> _Difference:
        """What is other for everybody; kept for the view that most NVEs have."""
        if self._last is None or self._last[0] is not since:
            put = [each for mac, each in self._remotes.items() if since._remotes.get(mac) != each]
            gone = [mac for mac in since._remotes if mac not in self._remotes]
            self._last = since, (put, gone, self._members == since._members)
        return self._last[1]

    def _tsis(self, host: str) -> tuple[TsiIntent, ...]:
        return self._here.get(host, ())

    def _others(self, host: str) -> tuple[str, ...]:
        mine = self._addresses[host]
        return tuple([address for address in self._all if address != mine])


def _coming(cluster: Cluster) -> dict[str, str]:
    """The VMs that a move is about to bring, each with its new host."""
    return {
        move.vm.name: move.new_nve
        for move in cluster.moves.values()
        if not committed(move.phase) and move.phase != "aborted"
    }


def _place(tsi: Tsi) -> tuple[str, int]:
    return tsi.owner, tsi.index


def _mac(tsi: Tsi) -> str:
    return tsi.interface.mac


def _local(tsi: Tsi, state: Literal["associated", "activated"], ways: Places) -> TsiIntent:
    return TsiIntent(
        owner=tsi.owner,
        index=tsi.index,
        kind=tsi.kind,
        mac=tsi.interface.mac,
        ipv4=tsi.interface.ipv4,
        ipv6=tsi.interface.ipv6,
        beside=tsi.beside,
        state=state,
        namespace=tsi.namespace,
        in_transit=tsi.marking == "all",
        leg=tsi.leg,
        ways_out=() if tsi.leg else addresses(ways, tsi.owner),
    )


def _remote(tsi: Tsi, address: str) -> RemoteIntent:
    return RemoteIntent(
        mac=tsi.interface.mac,
        ipv4=tsi.interface.ipv4,
        ipv6=tsi.interface.ipv6,
        beside=tsi.beside,
        nve=address,
        version=tsi.version,
        in_transit=tsi.marking != "none",
        outside=tsi.leg.families() if tsi.leg else (),
    )


def _prefix(subnet: str | None, otherwise: int) -> int:
    return ipaddress.ip_network(subnet).prefixlen if subnet else otherwise
