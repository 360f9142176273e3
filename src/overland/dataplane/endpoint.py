"""Endpoints: a network namespace attached like a VM, by a veth pair.

What is inside the namespace is written into the outer end's alias, so that reading back needs no
look into other namespaces.
"""

from __future__ import annotations

import asyncio

from pyroute2 import AsyncIPRoute

from overland.model.nve import Link
from overland.ports import KernelFailure

INNER = "eth0"


def from_alias(alias: str) -> dict[str, str | None]:
    """The inner end as its mark tells: `overland port OWNER/INDEX NAMESPACE MAC IPV4 IPV6`."""
    words = alias.split()
    if len(words) != 7:
        return {}
    return {
        "namespace": words[3],
        "peer_mac": words[4],
        "peer_ipv4": words[5] if words[5] != "-" else None,
        "peer_ipv6": words[6] if words[6] != "-" else None,
    }


async def make(ip: AsyncIPRoute, link: Link) -> None:
    """Make the pair and set the inner end up, its addresses usable at once (no DAD)."""
    assert link.namespace is not None
    await ip.link(
        "add",
        ifname=link.name,
        kind="veth",
        mtu=link.mtu,
        peer={
            "ifname": INNER,
            "address": link.peer_mac,
            "mtu": link.mtu,
            "net_ns_fd": link.namespace,
        },
    )
    lines = ["link set lo up", f"link set {INNER} up"]
    if link.peer_ipv4:
        lines.append(f"addr replace {link.peer_ipv4} dev {INNER}")
    if link.peer_ipv6:
        lines.append(f"addr replace {link.peer_ipv6} dev {INNER} nodad")
    await _inside(link.namespace, lines)


async def _inside(namespace: str, lines: list[str]) -> None:
    process = await asyncio.create_subprocess_exec(
        "ip",
        "-n",
        namespace,
        "-batch",
        "-",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate(("\n".join(lines) + "\n").encode())
    if process.returncode:
        raise KernelFailure(f"namespace {namespace}: {said.decode().strip().splitlines()[0]}")
