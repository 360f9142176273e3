"""Which of a VN's gateways each tenant goes out by. Pure (6-14).

The choice is a matter of the tenant and of the gateways, never of the host where the tenant is. It
is the tenant's first one among them, so gateways share tenants evenly and most need no record. When
the gateways change, whoever has one that is still there keeps it, and that is what is recorded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from functools import lru_cache

import msgspec

from overland.model.cluster import Family, Gateway, WaysOut
from overland.nva.cluster import Cluster

FAMILIES: tuple[Family, ...] = ("ipv4", "ipv6")

Changes = dict[str, WaysOut | None]
"""Records by key that are other now; None: there is none any more."""


def host_of(ways: WaysOut | None, tenant: str) -> str | None:
    """The host of the gateway by which `tenant` goes out; None when there is none."""
    if ways is None:
        return None
    return ways.kept.get(tenant) or _first_choice(tenant, ways.among)


@lru_cache(maxsize=2**17)  # it is asked of every tenant whenever one of them changes
def _first_choice(tenant: str, among: tuple[str, ...]) -> str:
    """By the highest random weight (Thaler and Ravishankar, 1998): none changes but who must."""
    return max(among, key=lambda host: hashlib.sha256(f"{tenant}/{host}".encode()).digest())


Places = tuple[tuple[WaysOut, dict[str, str | None]], ...]
"""Who uses which gateways, and their addresses in the VN by host; of each family that has any."""


def places(cluster: Cluster, network: str) -> Places:
    """The gateways of `network` as `addresses` needs them."""
    faces = {each.host: each.interface for each in cluster.gateways_of(network)}
    return tuple(
        (ways, {host: f.ipv4 if ways.family == "ipv4" else f.ipv6 for host, f in faces.items()})
        for ways in _of(cluster, network)
    )


def addresses(places: Places, tenant: str) -> tuple[str, ...]:
    """The addresses in the VN of the gateways by which `tenant` goes out."""
    found = (faces.get(host_of(ways, tenant) or "") for ways, faces in places)
    return tuple(filter(None, found))


def settled(cluster: Cluster, network: str, gateways: Iterable[Gateway]) -> Changes:
    """What becomes other when these are the gateways of `network`.

    One whose host is dead has no tenants, unless all hosts are. Whoever loses his gateway takes his
    first choice of the others, and keeps that when the former comes back.
    """
    mine, changes = list(gateways), Changes()
    for family in FAMILIES:
        serving = tuple(sorted(g.host for g in mine if family in g.leg.families()))
        among = tuple(host for host in serving if not cluster.is_dead(host)) or serving
        ways = WaysOut(network=network, family=family, among=among)
        before = cluster.ways_out.get(ways.key)
        if before is not None and before.among != among:
            changes[ways.key] = _kept(ways, before, tenants(cluster, network)) if among else None
        elif before is None and among:
            changes[ways.key] = ways
    return changes


def left(cluster: Cluster, network: str, host: str) -> Changes:
    """What becomes other when nobody goes out by the gateway on `host`, in families with others."""
    others = (each for each in cluster.gateways_of(network) if each.host != host)
    return {key: ways for key, ways in settled(cluster, network, others).items() if ways}


def all_settled(cluster: Cluster) -> Changes:
    """What becomes other now that hosts have died, or have come back."""
    networks = {gateway.network for gateway in cluster.gateways.values()}
    changes = Changes()
    for network in sorted(networks):
        changes |= settled(cluster, network, cluster.gateways_of(network))
    return changes


def _kept(ways: WaysOut, before: WaysOut, names: Collection[str]) -> WaysOut:
    was = {name: host_of(before, name) for name in names}
    kept = {
        name: host
        for name, host in was.items()
        if host in ways.among and host != _first_choice(name, ways.among)
    }
    return msgspec.structs.replace(ways, kept=kept)


def tenants(cluster: Cluster, network: str) -> list[str]:
    """Who is in `network`, its gateways apart."""
    found = {t.owner for t in cluster.tsis() if t.interface.network == network and t.leg is None}
    return sorted(found)


# ------------------------------------------------------------ what an operator asks for


def assigned(cluster: Cluster, network: str, host: str, names: Iterable[str]) -> Changes:
    """What becomes other when tenants `names` go out by the gateway on `host`, where it serves."""
    given, changes = dict.fromkeys(names, host), Changes()
    for ways in _of(cluster, network):
        if host in ways.among:
            kept = {**ways.kept, **given}
            changes[ways.key] = msgspec.structs.replace(ways, kept=kept)
    return changes


def spread(cluster: Cluster, network: str) -> Changes:
    """What becomes other when every tenant of `network` takes his first choice again."""
    return {ways.key: msgspec.structs.replace(ways, kept={}) for ways in _of(cluster, network)}


def shown(cluster: Cluster, network: str) -> list[dict[str, str | None]]:
    """The hosts of the gateways by which each tenant goes out, for a person or a script."""
    every = {family: cluster.ways_out.get(f"{network}/{family}") for family in FAMILIES}
    return [
        {"tenant": name, **{family: host_of(ways, name) for family, ways in every.items()}}
        for name in tenants(cluster, network)
    ]


def without(cluster: Cluster, tenant: str) -> Changes:
    """What becomes other when `tenant` is no more; one that comes under its name is another."""
    changes = Changes()
    for ways in cluster.ways_out.values():
        if tenant in ways.kept:
            kept = {name: host for name, host in ways.kept.items() if name != tenant}
            changes[ways.key] = msgspec.structs.replace(ways, kept=kept)
    return changes


def _of(cluster: Cluster, network: str) -> list[WaysOut]:
    every = (cluster.ways_out.get(f"{network}/{family}") for family in FAMILIES)
    return [ways for ways in every if ways is not None]
