"""May a move give its VM other addresses, and which are changed? Pure (ADR 0028).

Only its owner can know that its applications handle that, so only his registration allows it (R-24,
R-25). No move does it by itself: it has to be asked for, with the addresses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec

from overland.model.cluster import Interface, Refused, Vm
from overland.model.handover import Options
from overland.model.readdress import NewAddresses, Readdress, change_of
from overland.model.receipt import timestamp
from overland.nva.cluster import Cluster
from overland.nva.eligibility import record_of
from overland.nva.rules import interface_blockers, written

EXAMPLE = "--change-address NETWORK,ipv4=ADDRESS,ipv6=ADDRESS"


def planned(vm: Vm, options: Options) -> Readdress | None:
    """What a move of `vm` with `options` changes of its addresses; None: nothing."""
    if not options.addresses:
        return None
    faces = {each.network: each for each in vm.interfaces}
    changes = (change_of(faces[wish.network], _tidy(wish)) for wish in options.addresses)
    return Readdress(changes=tuple(changes), keep_s=options.keep_old_s)


def readdress_blockers(cluster: Cluster, name: str, options: Options) -> Iterator[Refused]:
    """Why VM `name` cannot get the addresses that `options` wish for it."""
    vm = cluster.vms.get(name)
    if vm is None or not options.addresses:
        return
    yield from _unregistered(cluster, vm)
    if options.keep_old_s < 0:
        why = f"former addresses cannot be kept for {options.keep_old_s:g} s"
        yield _no("malformed", vm, why, "--keep-old 30s")
    for network, times in Counter(each.network for each in options.addresses).items():
        if times > 1:
            yield _no("malformed", vm, f"network {network} is named {times} times", "name it once")
    for wish in options.addresses:
        yield from _wish_blockers(cluster, vm, wish)


def _unregistered(cluster: Cluster, vm: Vm) -> Iterator[Refused]:
    """What is missing of ground (b): an owner, or what he has to sign."""
    known = record_of(cluster, vm.name)
    if known.registration is not None:
        return
    if not vm.owner:
        why = "it has no owner who could state that its applications handle a change of address"
        yield _no("no_owner", vm, why, "`overland vm create --owner NAME`")
        return
    why = f"its owner {vm.owner} has not registered that all its applications handle a change of "
    why += "address"
    if known.revocation is not None:
        at = timestamp(known.revocation.at_ns)
        why = f"its registration was revoked by {known.revocation.origin} at {at}"
    hint = f"`overland vm eligibility register {vm.name}`, with the certificate of {vm.owner}"
    yield _no("address_change_not_registered", vm, why, hint)


def _wish_blockers(cluster: Cluster, vm: Vm, wish: NewAddresses) -> Iterator[Refused]:
    face = next((each for each in vm.interfaces if each.network == wish.network), None)
    network = cluster.networks.get(wish.network)
    if face is None or network is None:
        why = f"it has no interface in network {wish.network}"
        yield _no("unknown_interface", vm, why, f"`overland vm show {vm.name}`")
        return
    if network.kind == "ila":
        # An address there is the VM's identifier: a translator knows one for each MAC (ADR 0025).
        why = f"network {network.name} is ila: an interface has one address there, which stays"
        yield _no("one_address", vm, why, "move it without, or change another interface")
        return
    yield from _families(vm, face, _tidy(wish))
    yield from interface_blockers(cluster, vm.name, (_wished(face, wish),))


def _families(vm: Vm, face: Interface, wish: NewAddresses) -> Iterator[Refused]:
    for family, now, then in (("IPv4", face.ipv4, wish.ipv4), ("IPv6", face.ipv6, wish.ipv6)):
        if then and not now:
            why = f"it has no {family} address in network {face.network} that could be changed"
            hint = f"`overland vm interface change {vm.name}` gives it one"
            yield _no("no_address", vm, why, hint)
        elif then and then == now:
            yield _no("same_address", vm, f"it has {now} already", "choose another")
    if not (wish.ipv4 or wish.ipv6):
        yield _no("malformed", vm, f"no address is named for network {face.network}", EXAMPLE)


def _wished(face: Interface, wish: NewAddresses) -> Interface:
    given = {"ipv4": wish.ipv4 or face.ipv4, "ipv6": wish.ipv6 or face.ipv6}
    return written(msgspec.structs.replace(face, **given))


def _tidy(wish: NewAddresses) -> NewAddresses:
    """As kernels write addresses."""
    face = written(Interface(network=wish.network, mac="", ipv4=wish.ipv4, ipv6=wish.ipv6))
    return NewAddresses(network=wish.network, ipv4=face.ipv4, ipv6=face.ipv6)


def _no(code: str, vm: Vm, why: str, hint: str) -> Refused:
    return Refused(code=code, what=f"vm {vm.name}", why=why, hint=hint)
