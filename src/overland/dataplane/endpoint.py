"""Endpoints: a network namespace attached like a VM, by a veth pair.

What is inside the namespace is written into the outer end's alias, so that reading back needs no
look into other namespaces.
"""

from __future__ import annotations

from typing import Any

from pyroute2 import AsyncIPRoute

from overland.dataplane.namespace import batch
from overland.model.nve import Link
from overland.ports import KernelFailure

INNER = "eth0"


def from_alias(alias: str) -> dict[str, Any]:
    """The inner end as its mark tells.

    `overland port OWNER/INDEX NAMESPACE MAC IPV4 IPV6`, and the gateways of a routed VN.
    """
    words = alias.split()
    if len(words) < 7:
        return {}
    return {
        "namespace": words[3],
        "peer_mac": words[4],
        "peer_ipv4": words[5] if words[5] != "-" else None,
        "peer_ipv6": words[6] if words[6] != "-" else None,
        "gateways": tuple(words[7:]),
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
    for gateway in link.gateways:
        if link.peer_ipv6 if ":" in gateway else link.peer_ipv4:
            lines.append(f"route replace {gateway} dev {INNER}")
            lines.append(f"route replace default via {gateway} dev {INNER}")
    failed = await batch(link.namespace, lines)
    if failed:
        raise KernelFailure(f"namespace {link.namespace}: {next(iter(failed.values()))}")
