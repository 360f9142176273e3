"""Where the VMs of a host can go when it is emptied. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import msgspec

from overland.model.cluster import Record, Refused, Vm
from overland.nva.cluster import Cluster
from overland.nva.rules import cold_blockers, free_memory_mib, move_blockers


class Placement(Record, frozen=True, kw_only=True):
    """VM `vm` goes to host `to` in a move of this `mode`."""

    vm: str
    to: str
    mode: Literal["hot", "cold"]


def drain_plan(cluster: Cluster, name: str) -> tuple[tuple[Placement, ...], tuple[Refused, ...]]:
    """A place for every VM of host `name`, the biggest first, and who has none and why.

    Each goes to the host with the most free memory of those that nothing speaks against, as it
    would be after the moves before it.
    """
    ahead = Cluster(**{field: dict(getattr(cluster, field)) for field in Cluster.__slots__})
    found: list[Placement] = []
    refused: list[Refused] = []
    vms = [vm for vm in cluster.vms.values() if vm.host == name]
    for vm in sorted(vms, key=lambda vm: (-vm.memory_mib, vm.name)):
        mode: Literal["hot", "cold"] = "hot" if vm.state == "running" else "cold"
        to, why = _best(ahead, vm, cold_blockers if mode == "cold" else move_blockers)
        if to is None:
            refused.append(Refused(code="nowhere_to_go", what=f"vm {vm.name}", why=why))
            continue
        found.append(Placement(vm=vm.name, to=to, mode=mode))
        ahead.vms[vm.name] = msgspec.structs.replace(vm, host=to)
    return tuple(found), tuple(refused)


def _best(
    cluster: Cluster, vm: Vm, blockers: Callable[[Cluster, str, str], Iterator[Refused]]
) -> tuple[str | None, str]:
    """The best host for `vm`, or what speaks against each."""
    against = {
        host: next(blockers(cluster, vm.name, host), None)
        for host in sorted(cluster.hosts)
        if host != vm.host
    }
    free = [host for host, refusal in against.items() if refusal is None]
    if free:
        return max(free, key=lambda host: free_memory_mib(cluster, cluster.hosts[host])), ""
    whys = [f"{host}: {refusal.why}" for host, refusal in against.items() if refusal is not None]
    return None, "; ".join(whys) or "there is no other host"
