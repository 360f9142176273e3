"""Ways between the routers of two VNs that may talk: a veth pair from the one to the other.

Without it there is no device in both, so what is not allowed has no way (N-15). Each end knows the
other VN's subnets behind the other router, whose MAC address nobody has to be asked for, and nft
lets nothing pass but from one subnet to the other: who makes up an address of a third VN, or of the
one he sends to, is not heard, IPv6 as IPv4. The mark, written last, tells that all of it is there.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

import msgspec

from overland.dataplane.namespace import batch, feed, run, set_knobs
from overland.model.names import ROUTER_MTU_BYTES, default_mac, mark, router_namespace, vni_of
from overland.model.nve import Passage
from overland.ports import KernelFailure

INNER = "gw"
"""The router's device in its own VN."""


class Seen(msgspec.Struct):
    """A device in a router's namespace, as `ip -j link` shows it."""

    ifname: str
    ifalias: str = ""


def read(devices: list[Seen]) -> list[Passage]:
    """Those that begin here whole, as their marks tell.

    `overland passage ROUTER OTHER NEAR... - FAR...`
    """
    return [
        _from_alias(each.ifalias)
        for each in devices
        if each.ifalias.startswith(mark("passage", ""))
    ]


def _from_alias(alias: str) -> Passage:
    router, other, *gateways = alias.split()[2:]
    middle = gateways.index("-")
    return Passage(
        router=router,
        other=other,
        near=tuple(gateways[:middle]),
        far=tuple(gateways[middle + 1 :]),
    )


@dataclass(frozen=True, slots=True)
class _End:
    """One side of a passage: `device` in the router's namespace, subnets `near` and `far` of it."""

    namespace: str
    device: str
    mac: str
    peer_mac: str
    near: tuple[str, ...]
    far: tuple[str, ...]


class Passages:
    """The passages of one NVE; `prefix` is that of its routers' namespaces."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    async def make(self, passage: Passage) -> None:
        """Make both ends anew. KernelFailure when that is not possible; nothing is there then."""
        await self.remove(passage)
        try:
            await self._make(passage)
        except (KernelFailure, OSError):
            await self.remove(passage)
            raise

    async def _make(self, passage: Passage) -> None:
        one, other = _ends(self._prefix, passage)
        # Nothing passes before the filters stand: there is no route yet, and no link is up.
        made = f"link add {one.device} type veth peer name {other.device} netns {other.namespace}"
        await run("-n", one.namespace, *made.split())
        for end in (one, other):
            await feed(end.namespace, "nft", "-f", "-", text=_rules(end))
            set_knobs(end.namespace, _knobs(end.device))
            for why in (await batch(end.namespace, _lines(end))).values():
                raise KernelFailure(f"router {end.namespace}: {why}")
        gateways = (*passage.near, "-", *passage.far)
        alias = mark("passage", " ".join((passage.router, passage.other, *gateways)))
        await run("-n", one.namespace, "link", "set", one.device, "alias", alias)

    async def remove(self, passage: Passage) -> None:
        """Take both ends away, with all that leads to them; content with absence."""
        for end in _ends(self._prefix, passage):
            await batch(end.namespace, [f"link del {end.device}"])
        for end in _ends(self._prefix, passage):
            text = f"add table inet {end.device}; delete table inet {end.device}"
            try:
                await feed(end.namespace, "nft", "-f", "-", text=text)
            except KernelFailure:
                if await _there(end.namespace):
                    raise


async def _there(namespace: str) -> bool:
    return not await batch(namespace, ["link show lo"])


def _ends(prefix: str, passage: Passage) -> tuple[_End, _End]:
    one, other = vni_of(passage.router), vni_of(passage.other)
    macs = tuple(default_mac(f"passage/{one}/{other}", index) for index in (0, 1))
    return (
        _End(
            namespace=router_namespace(prefix, passage.router),
            device=f"to{other}",
            mac=macs[0],
            peer_mac=macs[1],
            near=passage.near,
            far=passage.far,
        ),
        _End(
            namespace=router_namespace(prefix, passage.other),
            device=f"to{one}",
            mac=macs[1],
            peer_mac=macs[0],
            near=passage.far,
            far=passage.near,
        ),
    )


def _knobs(device: str) -> dict[str, int]:
    return {
        f"ipv4/conf/{device}/rp_filter": 1,
        f"ipv4/conf/{device}/send_redirects": 0,
        f"ipv4/conf/{device}/accept_redirects": 0,
        f"ipv6/conf/{device}/accept_ra": 0,
        f"ipv6/conf/{device}/accept_redirects": 0,
        f"ipv6/conf/{device}/addr_gen_mode": 1,
    }


def _lines(end: _End) -> list[str]:
    """The other VN's subnets are behind its gateway's address, at a MAC address that is known."""
    lines = [f"link set {end.device} address {end.mac} mtu {ROUTER_MTU_BYTES} arp off up"]
    for gateway in end.far:
        router = ipaddress.ip_interface(gateway)
        lines += [
            f"neigh replace {router.ip} lladdr {end.peer_mac} nud permanent dev {end.device}",
            f"route replace {router.network} via {router.ip} dev {end.device} onlink",
        ]
    return lines


def _rules(end: _End) -> str:
    """One table for each end, named as its device."""
    out, into = [], []
    for mine, theirs in zip(end.near, end.far, strict=True):
        near, far = (ipaddress.ip_interface(each).network for each in (mine, theirs))
        ip = "ip" if near.version == 4 else "ip6"
        out.append(
            f'iifname "{INNER}" oifname "{end.device}" {ip} saddr {near} {ip} daddr {far} accept'
        )
        into.append(
            f'iifname "{end.device}" oifname "{INNER}" {ip} saddr {far} {ip} daddr {near} accept'
        )
    rules = (
        *out,
        *into,
        f'oifname "{end.device}" counter drop',
        f'iifname "{end.device}" counter drop',
    )
    lines = "\n".join(rules)
    return (
        f"table inet {end.device} {{\nchain forward {{\n"
        f"type filter hook forward priority 0; policy accept;\n{lines}\n}}\n}}\n"
    )
