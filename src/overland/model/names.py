"""Names and numbers of the domain: how they are written, checked and turned into kernel names.

Pure. Everything a person types passes through here once; past this module a value is known good.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from typing import NewType

HostName = NewType("HostName", str)
NetworkName = NewType("NetworkName", str)
VmName = NewType("VmName", str)
MoveId = NewType("MoveId", str)
Mac = NewType("Mac", str)

VNI_MAX = 2**24 - 1
"""Largest VXLAN network identifier (RFC 7348 section 5: 24 bits)."""

OVERHEAD_BYTES = {"ipv4": 50, "ipv6": 70}
"""What VXLAN adds to a tenant packet, by family of the underlay (N-24)."""

GATEWAY_MAC = "02:6f:76:6c:00:01"
"""MAC address of every router, on every NVE in every routed VN: a VM that moves finds it again."""

ROUTER_MTU_BYTES = 65000
"""What a router takes in. What it lets out is the VN's MTU, and it says so (Packet Too Big)."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")
_SIZES = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_name(text: str, what: str) -> str:
    """Return `text` when it can name a `what`; ValueError says what is allowed."""
    if not _NAME.fullmatch(text):
        raise ValueError(
            f"{what} name {text!r}: use 1 to 63 of a-z, 0-9, '.', '_', '-', "
            "beginning and ending with a letter or digit"
        )
    return text


def parse_mac(text: str) -> Mac:
    """Return a unicast MAC address in lower case with colons; ValueError otherwise."""
    mac = text.lower().replace("-", ":")
    if not _MAC.fullmatch(mac):
        raise ValueError(f"MAC address {text!r}: write it as 02:00:00:00:00:01")
    if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise ValueError(f"MAC address {text!r}: a host needs a unicast address")
    return Mac(mac)


def parse_vni(number: int) -> int:
    """Return `number` when it is a usable VNI (1 to 2^24 - 1); ValueError otherwise."""
    if not 1 <= number <= VNI_MAX:
        raise ValueError(f"VNI {number}: use 1 to {VNI_MAX} (24 bits)")
    return number


def parse_address(text: str, family: int) -> str:
    """Return the canonical text of a unicast host address of `family` (4 or 6)."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"address {text!r} is not an IPv{family} address") from None
    if address.version != family:
        raise ValueError(f"address {text!r} is not an IPv{family} address")
    if address.is_multicast or address.is_unspecified or address.is_loopback:
        raise ValueError(f"address {text!r} cannot be a host's own address")
    return str(address)


def parse_prefix(text: str, family: int) -> str:
    """Return the canonical text of a subnet of `family` (4 or 6) without host bits."""
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"subnet {text!r}: {error}") from None
    if network.version != family:
        raise ValueError(f"subnet {text!r} is not an IPv{family} subnet")
    return str(network)


def gateway_of(subnet: str) -> str:
    """The gateway of a routed VN in `subnet`, with its prefix length: the first host address."""
    network = ipaddress.ip_network(subnet)
    return f"{next(iter(network.hosts()))}/{network.prefixlen}"


def parse_size(text: str) -> int:
    """Return bytes from `128MiB`, `1GiB`, `4096`; ValueError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)?", text.strip())
    if not match:
        raise ValueError(f"size {text!r}: write a number and B, KiB, MiB, GiB or TiB")
    return int(float(match[1]) * _SIZES[match[2] or ""])


def parse_duration(text: str) -> float:
    """Return seconds from `50ms`, `1.5s`, `5m`; ValueError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(us|ms|s|m|h)", text.strip())
    if not match:
        raise ValueError(f"time {text!r}: write a number and us, ms, s, m or h")
    return float(match[1]) * _SECONDS[match[2]]


def default_mac(owner: str, index: int) -> Mac:
    """Return the MAC address of an interface whose owner did not choose one.

    Locally administered and the same every time, so that a lost record can be made again.
    """
    digest = hashlib.sha256(f"{owner}/{index}".encode()).digest()
    return Mac("02:" + ":".join(f"{byte:02x}" for byte in digest[:5]))


def _digest(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:8]


def bridge_name(vni: int) -> str:
    """Kernel name of the bridge of a VN on any NVE."""
    return f"ovb{vni}"


def vxlan_name(vni: int) -> str:
    """Kernel name of the VXLAN device of a VN on any NVE."""
    return f"ovx{vni}"


def ila_name(vni: int) -> str:
    """Kernel name of the device by which frames leave an ILA VN, on any NVE."""
    return f"ovi{vni}"


def port_name(owner: str, index: int) -> str:
    """Kernel name of the tap or veth behind interface `index` of `owner`; the same on every NVE."""
    return f"ovt{_digest(owner, index)}"


def router_name(vni: int) -> str:
    """Kernel name of the bridge port behind which the router of a routed VN is, on any NVE."""
    return f"ovr{vni}"


def gateway_name(vni: int) -> str:
    """Kernel name of the bridge port behind which the gateway of a routed VN is, on its host."""
    return f"ovg{vni}"


def leg_name(vni: int) -> str:
    """Kernel name of the gateway's port in a bridge of the physical network."""
    return f"ovl{vni}"


def way_out_table(via: str) -> int:
    """Number of the routing table with the way out by the gateway whose address in the VN is `via`.

    Away from the kernel's own tables; two addresses of a VN's gateways differ in their last bits.
    """
    return 1 << 31 | int(ipaddress.ip_address(via)) & (1 << 31) - 1


def gateway_namespace(prefix: str, device: str) -> str:
    """Network namespace of the gateway behind port or leg `device`; `prefix` is the NVE's own."""
    return f"{prefix}-g{vni_of(device)}"


def router_namespace(prefix: str, device: str) -> str:
    """Network namespace of the router behind bridge port `device`; `prefix` is the NVE's own."""
    return f"{prefix}-r{vni_of(device)}"


def export_name(vm: str, index: int, version: int) -> str:
    """Under which an image that stayed behind is offered: by version, so one that is over fails."""
    return f"{vm}/{index}/{version}"


def image_node(vm: str, index: int) -> str:
    """Name of the block node of an image in the exporter of the host that has it."""
    return f"ovd{_digest(vm, index)}"


def hold_name(device: str, mac: str) -> str:
    """Kernel name of the queue that holds frames for `mac` diverted from `device`."""
    return f"ovh{_digest(device, mac)}"


def tunnel_name(number: int) -> str:
    """Kernel name of the handover tunnel with VXLAN identifier `number`."""
    return f"ovm{number}"


def mark(kind: str, name: str) -> str:
    """The ifalias by which a kernel device is known to be ours, whoever restarts."""
    return f"overland {kind} {name}"


def is_ours(alias: str | None) -> bool:
    """Tell whether an ifalias carries our mark."""
    return bool(alias) and str(alias).startswith("overland ")


def vni_of(device: str) -> int:
    """The VNI in the kernel name of a VN's device, bridge, router port, gateway or leg."""
    return int(device[3:])
