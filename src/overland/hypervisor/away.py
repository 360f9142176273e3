"""Disks whose image another host has: how a QEMU reaches them (NBD, with TLS).

A copy that is still to be activated has something in their place that takes no write and gives no
data: nobody offers it the images before the move is committed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from overland.hypervisor.command import disk_node
from overland.hypervisor.mirror import Qmp, tls_credentials, tls_id
from overland.model.cluster import Disk, Vm
from overland.model.names import export_name

WAIT_S = 600
"""How long reads and writes wait for a host that no longer answers, before the VM sees errors."""


def elsewhere(vm: Vm) -> Iterator[tuple[int, Disk]]:
    """The disks of `vm` that it reaches over the network, with their numbers."""
    return ((index, disk) for index, disk in enumerate(vm.disks) if disk.uri)


def node(vm: Vm, index: int, disk: Disk) -> dict[str, Any]:
    """QEMU's description of what lies below such a disk."""
    at = urlsplit(disk.uri)
    return {
        "driver": "nbd",
        "node-name": _name(index),
        "server": {"type": "inet", "host": at.hostname, "port": str(at.port)},
        "export": export_name(vm.name, index, disk.since),
        "tls-creds": tls_id("client"),
        "reconnect-delay": WAIT_S,
    }


def placeholder(disk: Disk) -> dict[str, Any]:
    """What a copy has in its place until it is activated: of its size, and of no use."""
    errors = [{"event": "none", "iotype": kind, "errno": 5} for kind in ("read", "write")]
    nothing = {"driver": "null-co", "size": disk.size_bytes}
    return {"driver": "blkdebug", "image": nothing, "inject-error": errors}


async def attach(do: Qmp, vm: Vm, tls: Path) -> None:
    """Put the images where they are in place of the placeholders; content with its being done."""
    disks = list(elsewhere(vm))
    if disks:
        await tls_credentials(do, "client", tls)
    for index, disk in disks:
        nodes = await do("query-named-block-nodes", flat=True)
        if _name(index) not in {each["node-name"] for each in nodes}:
            await do("blockdev-add", **node(vm, index, disk))
        whole = {"driver": "raw", "node-name": disk_node(index), "file": _name(index)}
        await do("blockdev-reopen", options=[whole])


def _name(index: int) -> str:
    return f"away{index}"
