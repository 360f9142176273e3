"""Interfaces that are added to a VM and removed from it (H-03, H-07). Pure.

Of a VM that is at rest only the record changes. Into one that is up an interface comes in two
steps, each a write: it is `adding`, its port made but not in use, until the NVE says that the VM
has its device; `removing`, in use as before, until the NVE says that the device is gone.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from overland.mobility.coordinator import keeper
from overland.model.cluster import PLUGGABLE, SLOTS, Interface, Refused, Vm, VmState, numbered
from overland.model.handover import Handover
from overland.nva import rules
from overland.nva.cluster import AT_REST, Cluster

_OFF: tuple[VmState, ...] = ("shutdown", "crashed")
_UP: tuple[VmState, ...] = ("running", "paused")


def completed(cluster: Cluster, vm: Vm, wish: Interface) -> Interface:
    """`wish` as an interface of `vm`: in its lowest free slot, the rest chosen as at its making."""
    taken = {slot for slot, _ in numbered(vm)}
    slot = next(number for number in range(SLOTS + 1) if number not in taken)
    chosen = rules.completed(cluster, vm.name, slot, wish)
    change = None if vm.state in _OFF else "adding"
    return msgspec.structs.replace(chosen, slot=slot, change=change)


def add_blockers(
    cluster: Cluster, vm: Vm, wish: Interface, point: Handover | None
) -> Iterator[Refused]:
    """Why `vm` cannot have `wish`, completed, as one more interface now. `point` as in `rules`."""
    what = f"vm {vm.name}"
    yield from _not_now(cluster, vm, point)
    yield from rules.too_many(vm.name, len(vm.interfaces) + 1)
    yield from rules.interface_blockers(cluster, vm.name, (wish,))
    for own in vm.interfaces:
        if own.mac == wish.mac:
            why = f"{wish.mac} belongs to its interface in {own.network}"
            yield Refused(code="address_taken", what=what, why=why, hint="choose another")
    host = cluster.hosts.get(vm.host)
    if host is not None:
        yield from rules.reach(cluster, host, (wish,))


def remove_blockers(
    cluster: Cluster, vm: Vm, which: str, point: Handover | None
) -> Iterator[Refused]:
    """Why the interface of `vm` in network, or with MAC, `which` cannot be removed now."""
    what, found = f"vm {vm.name}", named(vm, which)
    yield from _not_now(cluster, vm, point)
    if vm.state == "paused":
        why = "it is paused, and its guest must let go of an interface itself"
        hint = f"`overland vm resume {vm.name}` first, or stop it"
        yield Refused(code="guest_paused", what=what, why=why, hint=hint)
    if not found:
        why, hint = f"it has no interface {which}", f"`overland vm show {vm.name}`"
        yield Refused(code="unknown_interface", what=what, why=why, hint=hint)
    elif len(found) > 1:
        why = f"it has {len(found)} interfaces in network {which}"
        hint = f"say which by its MAC: {', '.join(each.mac for each in found)}"
        yield Refused(code="ambiguous", what=what, why=why, hint=hint)
    elif len(vm.interfaces) == 1:
        why = "it has no other interface, and must have one"
        yield Refused(code="last_interface", what=what, why=why, hint="add another first")


def _not_now(cluster: Cluster, vm: Vm, point: Handover | None) -> Iterator[Refused]:
    """What stands against any change of the interfaces of `vm`."""
    what = f"vm {vm.name}"
    yield from rules.already_moving(vm)
    yield from rules.changing(vm)
    if point is not None:
        yield rules.to_be_recovered(vm, keeper(point))
    if vm.state == "suspended":
        why = "it is suspended, and its saved state has the interfaces that it has"
        hint = f"`overland vm resume {vm.name}` first"
        yield Refused(code="suspended", what=what, why=why, hint=hint)
    elif vm.state not in (*_OFF, *_UP) and vm.move is None:
        yield Refused(code="wrong_state", what=what, why=f"it is {vm.state}", hint="wait a moment")
    if vm.state not in _UP:
        return
    yield from rules.away(cluster, vm.host)
    if not vm.machine.startswith(PLUGGABLE):
        why = f"nothing can be plugged into its machine ({vm.machine or 'not known'}) while it runs"
        hint = f"`overland vm stop {vm.name}` first; a VM that is made anew can have it plugged in"
        yield Refused(code="not_pluggable", what=what, why=why, hint=hint)


def named(vm: Vm, which: str) -> list[Interface]:
    """The interfaces of `vm` in network, or with MAC, `which`."""
    return [each for each in vm.interfaces if which.lower() in (each.network, each.mac.lower())]


def added(vm: Vm, wish: Interface) -> Vm:
    """`vm` with `wish` as its last interface, under the next version."""
    return _with(vm, (*_slotted(vm), wish))


def removed(vm: Vm, which: str) -> Vm:
    """`vm` with the one interface `which` on its way out; without it if it is off."""
    (leaving,) = named(vm, which)
    if vm.state in _OFF:
        return _with(vm, tuple(i for i in _slotted(vm) if i.mac != leaving.mac))
    going = [
        msgspec.structs.replace(i, change="removing") if i.mac == leaving.mac else i
        for i in _slotted(vm)
    ]
    return _with(vm, tuple(going))


def ended(vm: Vm, *, done: bool) -> Vm:
    """`vm` with its change under way brought to its end, as it was meant or as if it had not been.

    What is not there in the end leaves the record whole: addresses, mapping, port (H-07).
    """
    out = "removing" if done else "adding"
    kept = [msgspec.structs.replace(i, change=None) for i in vm.interfaces if i.change != out]
    return _with(vm, tuple(kept))


def without(vm: Vm, slot: int) -> Vm | None:
    """`vm` after its guest has let go of the interface in `slot`; None when that changes nothing.

    Not of a VM that is off or moves, nor of its only interface: the record says what its next
    start, or its copy, will have.
    """
    left = tuple(each for number, each in numbered(vm) if number != slot)
    is_news = len(left) == len(vm.interfaces) - 1
    if not (is_news and left) or vm.move is not None or vm.state not in _UP:
        return None
    return _with(vm, left)


def at_rest(vm: Vm, state: str) -> Vm:
    """`vm` as it is to be written when it is seen in `state`.

    With the end of its process it is known what it has: nothing that was on its way in or out.
    """
    if state not in AT_REST or not any(each.change for each in vm.interfaces):
        return vm
    return _with(vm, tuple(each for each in vm.interfaces if each.change is None))


def _slotted(vm: Vm) -> tuple[Interface, ...]:
    """From now on the order of the interfaces does not tell their slots any more."""
    return tuple(msgspec.structs.replace(each, slot=slot) for slot, each in numbered(vm))


def _with(vm: Vm, interfaces: tuple[Interface, ...]) -> Vm:
    return msgspec.structs.replace(vm, interfaces=interfaces, version=vm.version + 1)
