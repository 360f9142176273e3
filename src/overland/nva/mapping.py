"""What each NVE is told of each VN. Pure.

An NVE hears only of VNs in which it has an interface or is about to get one (N-04, R-44). Before
the commit a moving VM is at the old NVE and associated at the new; after it, at the new only.
"""

from __future__ import annotations

import ipaddress

from overland.model.cluster import Host, Network
from overland.model.handover import committed
from overland.model.nve import RemoteIntent, TsiIntent, VnIntent
from overland.nva.cluster import Cluster, Tsi


def underlay_address(host: Host, network: Network) -> str | None:
    """The host's address in the family that `network` is carried over."""
    return host.underlay_ipv4 if network.underlay == "ipv4" else host.underlay_ipv6


def vn_intents(cluster: Cluster, host: str) -> dict[str, VnIntent]:
    """All VNs that NVE `host` has to know, by name."""
    return {
        name: intent
        for name in sorted(cluster.networks)
        if host in cluster.places(name)
        and (intent := vn_intent(cluster, cluster.networks[name], host)) is not None
    }


def vn_intent(cluster: Cluster, network: Network, host: str) -> VnIntent | None:
    """One VN as NVE `host` must have it; None while the host's address is not known."""
    me = cluster.hosts.get(host)
    local = underlay_address(me, network) if me else None
    if local is None:
        return None
    tsis = [tsi for tsi in cluster.tsis() if tsi.interface.network == network.name]
    here = [
        _local(tsi, "activated" if tsi.active else "associated") for tsi in tsis if tsi.host == host
    ]
    here += [_local(tsi, "associated") for tsi in _coming(cluster, network, host, tsis)]
    return VnIntent(
        network=network.name,
        vni=network.vni,
        mtu=network.mtu,
        underlay=network.underlay,
        local=local,
        ipv4_prefix=_prefix(network.ipv4, 24),
        ipv6_prefix=_prefix(network.ipv6, 64),
        members=tuple(
            sorted(
                address
                for name in cluster.places(network.name) - {host}
                if (address := _address(cluster, network, name)) is not None
            )
        ),
        tsis=tuple(sorted(here, key=lambda tsi: (tsi.owner, tsi.index))),
        remotes=tuple(
            RemoteIntent(
                mac=tsi.interface.mac,
                ipv4=tsi.interface.ipv4,
                ipv6=tsi.interface.ipv6,
                nve=address,
                version=tsi.version,
            )
            for tsi in tsis
            if tsi.active
            and tsi.host != host
            and (address := _address(cluster, network, tsi.host)) is not None
        ),
    )


def _coming(cluster: Cluster, network: Network, host: str, tsis: list[Tsi]) -> list[Tsi]:
    vms = {
        move.vm.name
        for move in cluster.moves.values()
        if move.new_nve == host and not committed(move.phase) and move.phase != "aborted"
    }
    return [tsi for tsi in tsis if tsi.kind == "tap" and tsi.owner in vms and tsi.host != host]


def _local(tsi: Tsi, state: str) -> TsiIntent:
    return TsiIntent(
        owner=tsi.owner,
        index=tsi.index,
        kind=tsi.kind,
        mac=tsi.interface.mac,
        ipv4=tsi.interface.ipv4,
        ipv6=tsi.interface.ipv6,
        state="activated" if state == "activated" else "associated",
        namespace=tsi.namespace,
    )


def _address(cluster: Cluster, network: Network, host: str) -> str | None:
    record = cluster.hosts.get(host)
    return underlay_address(record, network) if record else None


def _prefix(subnet: str | None, otherwise: int) -> int:
    return ipaddress.ip_network(subnet).prefixlen if subnet else otherwise
