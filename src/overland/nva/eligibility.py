"""May VM `name` be moved, whatever way, and who knows that? Pure (R-19, R-20, R-23 to R-28, R-62).

Every address that its applications see, their own and their peers', must be kept the same by an
abstraction, before and after, at both ends. What keeps it is a matter of the kind of its VN.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from typing import Any

from overland.model.cluster import Family, Host, Interface, Network, Refused, Vm, VmState
from overland.model.eligibility import (
    LONGEST_OUTAGE_MS,
    Eligibility,
    Grounds,
    Statement,
)
from overland.model.handover import Handover, is_up
from overland.model.readdress import Readdress
from overland.model.receipt import outage_ms, timestamp
from overland.nva.cluster import Cluster
from overland.nva.mapping import underlay_address
from overland.nva.subnets import subnets, within
from overland.nva.ways_out import host_of

NAMED = 5
"""How many peers a refusal names."""

_OFF: tuple[VmState, ...] = ("shutdown", "crashed")

FRESH_S = 300
"""How far an owner's clock may be from the NVA's, and how long a statement may take to come."""


def lacking(network: Network, host: Host) -> str | None:
    """What keeps `host` from leaving addresses in `network` as they are; None: nothing does.

    A kind of VN is one line here.
    """
    there = underlay_address(host, network) is not None
    match network.kind:
        case "l2" | "l3":
            return None if there else f"host {host.name} has no {network.underlay} underlay address"
        case "ila":
            return None if there else f"host {host.name} has no locator"
        case _:
            return f"nothing keeps addresses in networks of kind {network.kind}"


def record_of(cluster: Cluster, name: str) -> Eligibility:
    """What is known of VM `name`: nothing is the default of every VM (R-24)."""
    return cluster.eligibilities.get(name) or Eligibility(vm=name)


# ------------------------------------------------------------ moves


def eligibility_blockers(cluster: Cluster, vm: Vm, to: str) -> Iterator[Refused]:
    """Why `vm` may not be moved to host `to`: each address that would not stay what it is."""
    known = record_of(cluster, vm.name)
    if known.declaration.latency == "fixed":
        why = "its latency class is fixed: it is not moved"
        yield Refused(code="latency_class", what=f"vm {vm.name}", why=why, hint=_other_class(vm))
    yield from _own_addresses(cluster, vm, to)
    if known.registration is not None:
        return  # its applications handle what happens to their peers
    yield from _peers(cluster, vm, to)
    if known.declaration.uncovered == "refuse":
        yield from _outside(cluster, vm)


def grounds(cluster: Cluster, vm: Vm, to: str, readdress: Readdress | None, now_ns: int) -> Grounds:
    """Why `vm` may be moved to `to`, when nothing of the above stands against it (R-28).

    `readdress`: what the move changes of its addresses, which is then not covered.
    """
    known = record_of(cluster, vm.name)
    lost = (*_peers(cluster, vm, to), *_outside(cluster, vm))
    open_ones = (*_changed(readdress), *(each.why for each in lost))
    if open_ones and known.registration is not None:
        origin, at_ns = known.registration.origin, known.registration.at_ns
        return Grounds(basis="registered", origin=origin, at_ns=at_ns, flags=open_ones)
    kinds = (cluster.networks[each.network] for each in vm.interfaces)
    kept_by = ", ".join(f"{network.kind} network {network.name}" for network in kinds)
    origin = f"NVA: {kept_by or 'it has no addresses'}"
    return Grounds(basis="covered", origin=origin, at_ns=now_ns, flags=open_ones)


def _changed(readdress: Readdress | None) -> Iterator[str]:
    for change in readdress.changes if readdress is not None else ():
        for old, new in zip(change.old, change.new, strict=True):
            yield f"its address {old} in network {change.network} becomes {new}"


def latency_blockers(
    cluster: Cluster, vm: Vm, expected_ms: float | None, how: str
) -> Iterator[Refused]:
    """Whether the VM's latency class bears an outage of `expected_ms`; None: nobody knows (R-62).

    A VM whose addresses are not in use has no outage.
    """
    latency = record_of(cluster, vm.name).declaration.latency
    longest_ms = LONGEST_OUTAGE_MS[latency]
    if latency == "fixed" or longest_ms is None or not is_up(vm):
        return  # `fixed` is no matter of figures
    if expected_ms is not None and expected_ms <= longest_ms:
        return
    expected = "not known" if expected_ms is None else f"about {expected_ms:.0f} ms"
    why = (
        f"its latency class {latency} bears {longest_ms:.0f} ms, "
        f"the outage of this {how} move is {expected}"
    )
    yield Refused(code="latency_class", what=f"vm {vm.name}", why=why, hint=_other_class(vm))


def longest_outage_ms(cluster: Cluster, name: str) -> float | None:
    """What the latency class of VM `name` bears, in ms; None: any."""
    return LONGEST_OUTAGE_MS[record_of(cluster, name).declaration.latency]


def outages_ms(ended: Iterable[Handover], name: str) -> dict[str, float]:
    """The longest outage that VM `name` has had in moves of each mode, in ms (R-62)."""
    found: dict[str, float] = {}
    for move in ended:
        outage = outage_ms(move)
        if move.vm.name == name and move.outcome == "moved" and outage is not None:
            found[move.mode] = max(found.get(move.mode, 0.0), outage)
    return found


def _other_class(vm: Vm) -> str:
    return f"`overland vm eligibility set {vm.name} --latency any` lets it be moved"


def _own_addresses(cluster: Cluster, vm: Vm, to: str) -> Iterator[Refused]:
    """Its own, at the old and at the new NVE (R-26)."""
    for interface in vm.interfaces:
        network = cluster.networks.get(interface.network)
        ends = [cluster.hosts[name] for name in (vm.host, to) if name in cluster.hosts]
        if network is None:
            whys = ["it is in no network"]
        else:
            whys = [why for host in ends if (why := lacking(network, host)) is not None]
        for why in dict.fromkeys(whys):
            what = f"its address {_addresses(interface)} in network {interface.network}"
            yield Refused(
                code="address_not_covered",
                what=f"vm {vm.name}",
                why=f"{what} would not stay: {why}",
                hint="choose another host, or give it an interface in another network",
            )


def _peers(cluster: Cluster, vm: Vm, to: str) -> Iterator[Refused]:
    """Tenants of its networks, and of those that may talk with them, at their own NVEs (R-20).

    A VM that is off has no connection with anybody.
    """
    if vm.state in _OFF:
        return
    lost: dict[str, list[str]] = {}
    for who, why in (*_lost_peers(cluster, vm), *_lost_networks(cluster, vm, to)):
        lost.setdefault(why, []).append(who)
    for why, each in lost.items():
        yield Refused(
            code="peer_not_covered",
            what=f"vm {vm.name}",
            why=f"its {_listed(each)} would lose it: {why}",
            hint="give that host what it lacks",
        )


def _lost_peers(cluster: Cluster, vm: Vm) -> Iterator[tuple[str, str]]:
    """Peers behind an NVE that could not be told where the VM is, each with what that NVE lacks."""
    own = {each.network for each in vm.interfaces} & cluster.networks.keys()
    near = {name: cluster.near((name,)) & own for name in cluster.near(own)}
    needed = {name: sorted({name, *mine}) for name, mine in near.items() if mine}
    lost: dict[tuple[str, str], str] = {}
    for host in cluster.hosts.values():
        for network, names in needed.items() if not host.dead else ():
            whys = [why for name in names if (why := lacking(cluster.networks[name], host))]
            if whys:
                lost[network, host.name] = whys[0]
    for tsi in cluster.tsis() if lost else ():
        why = lost.get((tsi.interface.network, tsi.host))
        if why is not None and tsi.owner != vm.name:
            yield f"peer {tsi.owner} ({_addresses(tsi.interface)})", why


def _lost_networks(cluster: Cluster, vm: Vm, to: str) -> Iterator[tuple[str, str]]:
    """Networks with which it may talk, and that the new NVE cannot carry."""
    own, host = {each.network for each in vm.interfaces}, cluster.hosts.get(to)
    for name in sorted((cluster.near(own) - own) & cluster.networks.keys()):
        why = lacking(cluster.networks[name], host) if host is not None else None
        if why is not None:
            yield f"peers in network {name}", why


def _listed(who: list[str]) -> str:
    """The first ones by name: there may be thousands."""
    more = f" and {len(who) - NAMED} more" if len(who) > NAMED else ""
    return ", ".join(who[:NAMED]) + more


def _outside(cluster: Cluster, vm: Vm) -> Iterator[Refused]:
    """Correspondents that the operator has declared, and that no gateway stands for (R-19)."""
    if vm.state in _OFF:
        return
    for address in record_of(cluster, vm.name).declaration.outside:
        if kept_by(cluster, vm, address) is None:
            yield Refused(
                code="outside_not_covered",
                what=f"vm {vm.name}",
                why=f"its correspondent {address} is outside, and no gateway of its networks can "
                "be told of the move",
                hint="`overland network gateway add`, or `overland vm eligibility set "
                f"{vm.name} --uncovered flag`",
            )


def kept_by(cluster: Cluster, vm: Vm, address: str) -> str | None:
    """Who stands for a correspondent's address or subnet, and can be told of a move; None: nobody.

    A network in which the VM is or with which its networks may talk, or the gateways of one: by
    which of them a correspondent comes in is settled outside, so each one's NVE must be there.
    """
    asked = ipaddress.ip_network(address)
    family: Family = "ipv4" if asked.version == 4 else "ipv6"
    own = {each.network for each in vm.interfaces}
    for name in sorted(cluster.near(own) & cluster.networks.keys()):
        if any(within(asked, subnet) for subnet in subnets(cluster.networks[name])):
            return f"network {name}"
    for name in sorted(own):
        host = _gateway_that_is_told(cluster, name, family, vm.name)
        if host is not None:
            return f"gateway of network {name} on host {host}"
    return None


def _gateway_that_is_told(
    cluster: Cluster, network: str, family: Family, tenant: str
) -> str | None:
    """The host of the gateway by which `tenant` goes out, if all that serve `family` are there."""
    serving = (g.host for g in cluster.gateways_of(network) if family in g.leg.families())
    ready = {name: _ready(cluster, name) for name in serving if not cluster.is_dead(name)}
    own = host_of(cluster.ways_out.get(f"{network}/{family}"), tenant)
    return own if own in ready and all(ready.values()) else None


def _ready(cluster: Cluster, name: str) -> bool:
    host = cluster.hosts.get(name)
    return host is not None and host.ready


def _addresses(interface: Interface) -> str:
    return " and ".join(filter(None, (interface.ipv4, interface.ipv6))) or interface.mac


# ------------------------------------------------------------ what is said of a VM


def declaration_blockers(name: str, outside: Iterable[str]) -> Iterator[Refused]:
    """What of the correspondents of VM `name` is no address and no subnet."""
    for address in outside:
        try:
            ipaddress.ip_network(address)
        except ValueError as error:
            hint = "--outside 198.51.100.1, or --outside 2001:db8::/32"
            yield Refused(code="malformed", what=f"vm {name}", why=str(error), hint=hint)


def statement_blockers(
    cluster: Cluster, name: str, owner: str, statement: Statement, now_ns: int
) -> Iterator[Refused]:
    """Why what `owner` has signed is not believed of VM `name` (R-25).

    Only of this one VM, only by its owner, only for a moment, and only once.
    """
    vm, what = cluster.vms.get(name), f"vm {name}"
    if vm is None:
        hint = "`overland vm list` shows all"
        yield Refused(code="unknown_vm", what=what, why="there is no such vm", hint=hint)
        return
    if not vm.owner:
        why = "it has no owner who could state anything of it"
        yield Refused(code="no_owner", what=what, why=why, hint="`overland vm create --owner NAME`")
    elif owner != vm.owner:
        why = f"it belongs to {vm.owner}, and {owner} has signed"
        hint = f"use the certificate of {vm.owner}"
        yield Refused(code="not_its_owner", what=what, why=why, hint=hint)
    if statement.vm != name:
        why = f"what was signed is of VM {statement.vm!r}"
        yield Refused(code="not_this_vm", what=what, why=why, hint="state it of this VM")
    if abs(now_ns - statement.at_ns) > FRESH_S * 10**9:
        why = f"it was signed at {timestamp(statement.at_ns)}, {FRESH_S} s from now at least"
        yield Refused(
            code="statement_stale", what=what, why=why, hint="sign it anew; set the clock"
        )
    if statement.at_ns <= record_of(cluster, name).heard_ns:
        why = "it, or one that is newer, was heard before"
        yield Refused(code="statement_repeated", what=what, why=why, hint="sign it anew")


def shown(cluster: Cluster, vm: Vm, ended: Iterable[Handover]) -> dict[str, Any]:
    """All that is known of whether `vm` may be moved, for a person or a script."""
    known = record_of(cluster, vm.name)
    said, registration, revocation = known.declaration, known.registration, known.revocation
    addresses = [_face(cluster, vm, interface) for interface in vm.interfaces]
    outside = [{"address": at, "covered_by": kept_by(cluster, vm, at)} for at in said.outside]
    return {
        "vm": vm.name,
        "owner": vm.owner or None,
        "covered": all(each["covered_by"] for each in (*addresses, *outside)),
        "addresses": addresses,
        "outside": outside,
        "uncovered": said.uncovered,
        "latency": said.latency,
        "longest_outage_ms": LONGEST_OUTAGE_MS[said.latency],
        "outage_ms": outages_ms(ended, vm.name),
        "declared": _who(said.origin, said.at_ns),
        "registered": _who(registration.origin, registration.at_ns) if registration else None,
        "revoked": _who(revocation.origin, revocation.at_ns) if revocation else None,
    }


def _face(cluster: Cluster, vm: Vm, interface: Interface) -> dict[str, Any]:
    network, host = cluster.networks.get(interface.network), cluster.hosts.get(vm.host)
    kept = network is not None and host is not None and lacking(network, host) is None
    return {
        "ipv4": interface.ipv4,
        "ipv6": interface.ipv6,
        "covered_by": f"{network.kind} network {network.name}" if kept and network else None,
    }


def _who(origin: str, at_ns: int) -> dict[str, str] | None:
    return {"origin": origin, "at": timestamp(at_ns)} if at_ns else None
