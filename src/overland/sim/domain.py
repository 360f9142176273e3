"""The domain that is simulated: four hosts, a VM and a tenant on each, as records in a store."""

from __future__ import annotations

from collections.abc import Coroutine
from functools import cache
from typing import Any, TypeVar

import msgspec

from overland.model.cluster import Endpoint, Host, Interface, Network, Vm
from overland.ports import Put

NAMES = ("h1", "h2", "h3", "h4")
VM = "web"
T = TypeVar("T")


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which has nothing to wait for: all that it uses is in memory."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("it waits")


@cache
def host_record(name: str) -> Host:
    """What the NVE of host `name` says of it."""
    return Host(
        name=name,
        underlay_ipv4=f"192.0.2.{name[1:]}",
        underlay_mtu=9000,
        memory_total_mib=4096,
        accelerator="kvm",
    )


@cache
def founded() -> tuple[Put, ...]:
    """The records that are there before the first move."""
    face = Interface(network="n", mac="02:00:00:00:00:01")
    records: dict[str, Network | Host | Vm | Endpoint] = {
        "network/n": Network(name="n", vni=1),
        f"vm/{VM}": Vm(name=VM, host="h1", state="running", interfaces=(face,)),
    }
    for name in NAMES:
        tenant = Interface(network="n", mac=f"02:00:00:00:01:0{name[1:]}")
        records[f"host/{name}"] = host_record(name)
        records[f"endpoint/p{name[1:]}"] = Endpoint(
            name=f"p{name[1:]}", host=name, namespace=name, interface=tenant
        )
    return tuple(Put(key=key, value=msgspec.json.encode(each)) for key, each in records.items())
