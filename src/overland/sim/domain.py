"""The domain that is simulated: four hosts, a VM and a tenant on each, as records in a store."""

from __future__ import annotations

from collections.abc import Coroutine
from functools import cache
from typing import Any, TypeVar

import msgspec

from overland.model.cluster import Endpoint, Host, Interface, Network, Vm
from overland.model.eligibility import Eligibility, Registration, Signed
from overland.model.names import bridge_name, port_name, vxlan_name
from overland.ports import Put

NAMES = ("h1", "h2", "h3", "h4")
VM, MAC = "web", "02:00:00:00:00:01"
ADDRESSES = ("10.0.0.1", "10.0.0.2", "10.0.0.3")
"""Those that the VM may have."""

NETWORK, VNI = "n", 1
BRIDGE, DEVICE, PORT = bridge_name(VNI), vxlan_name(VNI), port_name(VM, 0)
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
def address_of(host: str) -> str:
    """The underlay address of `host`."""
    return f"192.0.2.{host[1:]}"


@cache
def host_at(address: str) -> str:
    """The host with underlay address `address`."""
    return f"h{address.removeprefix('192.0.2.')}"


@cache
def host_record(name: str) -> Host:
    """What the NVE of host `name` says of it."""
    return Host(
        name=name,
        underlay_ipv4=address_of(name),
        underlay_mtu=9000,
        memory_total_mib=4096,
        accelerator="kvm",
    )


@cache
def founded() -> tuple[Put, ...]:
    """The records that are there before the first move."""
    face = Interface(network=NETWORK, mac=MAC, ipv4=ADDRESSES[0])
    signed = Signed(statement=b"", signature=b"", certificate=b"")
    registration = Registration(origin="owner:alice", at_ns=1, signed=signed)
    records: dict[str, Network | Host | Vm | Endpoint | Eligibility] = {
        f"network/{NETWORK}": Network(name=NETWORK, vni=VNI),
        f"vm/{VM}": Vm(name=VM, host="h1", state="running", interfaces=(face,)),
        f"eligibility/{VM}": Eligibility(vm=VM, registration=registration),
    }
    for name in NAMES:
        tenant = Interface(network=NETWORK, mac=f"02:00:00:00:01:0{name[1:]}")
        records[f"host/{name}"] = host_record(name)
        records[f"endpoint/p{name[1:]}"] = Endpoint(
            name=f"p{name[1:]}", host=name, namespace=name, interface=tenant
        )
    return tuple(Put(key=key, value=msgspec.json.encode(each)) for key, each in records.items())
