"""A move that gives its VM other addresses, and which are its own at each instant. Pure (ADR 0028).

While such a move is open both the old and the new addresses are the VM's, in whatever phase it is:
so nothing is ever broken before it is made. When it has ended as moved, the old ones stay for a
while (`Former`); when it was aborted, the new ones are nobody's again.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from overland.model.cluster import Former, Interface, Record, Vm


class NewAddresses(Record, frozen=True, kw_only=True):
    """What the operator wishes for a VM's interface in `network`; None: that family stays."""

    network: str
    ipv4: str | None = None
    ipv6: str | None = None


class AddressChange(Record, frozen=True, kw_only=True):
    """In `network` each address of `old` gives way to the one of `new` at its place."""

    network: str
    old: tuple[str, ...]
    new: tuple[str, ...]


class Readdress(Record, frozen=True, kw_only=True):
    """All that one move changes, and what became of it.

    `keep_s`: how long the old addresses stay valid after the move. Instants are CLOCK_REALTIME ns
    at the NVA, 0 while they have not come: `until_ns`, to which they are kept, and `ended_ns`, when
    the last of them was given up; `ended_because` says why. `dns`: what became of the name; empty
    while nothing was heard.
    """

    changes: tuple[AddressChange, ...]
    keep_s: float
    until_ns: int = 0
    ended_ns: int = 0
    ended_because: str = ""
    dns: str = ""


def change_of(interface: Interface, wish: NewAddresses) -> AddressChange:
    """What `wish` changes of `interface`; an address that it has already is no change."""
    pairs = ((interface.ipv4, wish.ipv4), (interface.ipv6, wish.ipv6))
    given = [(old, new) for old, new in pairs if old and new and old != new]
    old, new = tuple(old for old, _ in given), tuple(new for _, new in given)
    return AddressChange(network=interface.network, old=old, new=new)


def beside(interface: Interface, open_one: Readdress | None) -> tuple[str, ...]:
    """The addresses of `interface` beside those it is known by; `open_one`: of its VM's move."""
    changes = open_one.changes if open_one is not None else ()
    here = [each for each in changes if each.network == interface.network]
    every = [former.address for former in interface.former]
    every += [address for change in here for address in (*change.old, *change.new)]
    own = (interface.ipv4, interface.ipv6)
    return tuple(dict.fromkeys(address for address in every if address not in own))


def readdressed(vm: Vm, readdress: Readdress) -> Vm:
    """The VM with its new addresses in place of the old ones: by the commit."""
    return _with(vm, (_changed(each, readdress) for each in vm.interfaces))


def keeping(vm: Vm, readdress: Readdress, move: str) -> Vm:
    """The VM after its move has ended as moved: the old addresses are valid for a while."""
    return _with(vm, (_keeps(each, readdress, move) for each in vm.interfaces))


def without_former(vm: Vm, move: str) -> Vm:
    """The VM without the addresses that move `move` had left it."""
    return _with(
        vm,
        (
            msgspec.structs.replace(each, former=tuple(f for f in each.former if f.move != move))
            for each in vm.interfaces
        ),
    )


def settled(interface: Interface) -> Interface:
    """What has come back as one of its own is not a former one any more."""
    own = (interface.ipv4, interface.ipv6)
    former = tuple(each for each in interface.former if each.address not in own)
    return msgspec.structs.replace(interface, former=former)


def former_of(vm: Vm | None) -> frozenset[str]:
    """The moves whose old addresses the VM has still."""
    interfaces = vm.interfaces if vm is not None else ()
    return frozenset(former.move for each in interfaces for former in each.former)


def _with(vm: Vm, interfaces: Iterable[Interface]) -> Vm:
    return msgspec.structs.replace(vm, interfaces=tuple(settled(each) for each in interfaces))


def _changed(interface: Interface, readdress: Readdress) -> Interface:
    here = [each for each in readdress.changes if each.network == interface.network]
    to = {old: new for each in here for old, new in zip(each.old, each.new, strict=True)}
    return msgspec.structs.replace(
        interface,
        ipv4=to.get(interface.ipv4 or "", interface.ipv4),
        ipv6=to.get(interface.ipv6 or "", interface.ipv6),
    )


def _keeps(interface: Interface, readdress: Readdress, move: str) -> Interface:
    here = [each for each in readdress.changes if each.network == interface.network]
    old = [
        Former(address=address, until_ns=readdress.until_ns, move=move)
        for each in here
        for address in each.old
    ]
    return msgspec.structs.replace(interface, former=(*interface.former, *old))
