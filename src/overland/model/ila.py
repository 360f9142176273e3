"""Identifier-locator addressing (ILA): which address is seen, and which is on the wire. Pure.

A tenant's address is a SIR prefix (64 bits) and an identifier (64 bits); applications see nothing
else, at both ends. On the wire the prefix is replaced by the locator of the NVE where the tenant
is. The last 16 bits take up the difference, so that the sum over the whole address, and with it
every checksum that covers it, stays as it was (draft-herbert-intarea-ila-01, checksum-neutral
mapping with the C-bit; requirements.md 4).
"""

from __future__ import annotations

import ipaddress
import itertools
import struct
from collections.abc import Iterator

HALF_BITS = 64
"""Of an address is the locator, or the SIR prefix; the rest is the identifier."""

UNIQUE = 1
"""Type of a tenant's identifier: locally unique. Type 0 is an interface's own, never translated."""

_TYPE_SHIFT, _C_BIT = 61, 1 << 60
_UNIQUE = UNIQUE << _TYPE_SHIFT
_IN_MOVE, _OF_NVE = 6 << _TYPE_SHIFT, 7 << _TYPE_SHIFT
"""Reserved by the draft; no tenant has them. Ours for what a move redirects, and for probes."""

_NUMBER_SHIFT = 36
_HALF = (1 << HALF_BITS) - 1
_LOW = 0xFFFF


def words_sum(bits: int) -> int:
    """One's complement sum of the 16-bit words of a 64-bit or 128-bit number (RFC 1071)."""
    total: int = sum(struct.unpack("!8H", bits.to_bytes(16, "big")))
    while total > _LOW:
        total = (total & _LOW) + (total >> 16)
    return total


def adjustment(prefix: int, locator: int, *, marked: bool = True) -> int:
    """What the last 16 bits gain when `prefix` gives way to `locator`; 16 bits.

    With `marked` the C-bit is set as well, and made up for.
    """
    total = words_sum(prefix) + (~words_sum(locator) & _LOW) + (0xEFFF if marked else 0)
    return words_sum(total)


def on_wire(address: str, locator: str, *, marked: bool = True) -> str:
    """The address that leads to tenant `address` at the NVE of `locator` (a /64, or one in it)."""
    prefix, identifier = _halves(address)
    place = _halves(locator)[0]
    return _joined(place, _adjusted(identifier, adjustment(prefix, place, marked=marked), marked))


def from_wire(address: str, prefix: str, *, marked: bool = True) -> str:
    """The tenant's address in SIR `prefix` (a /64) that wire `address` stands for."""
    place, identifier = _halves(address)
    home = _halves(prefix)[0]
    back = ~adjustment(home, place, marked=marked) & _LOW
    return _joined(home, _adjusted(identifier, back, marked))


def in_move(address: str, locator: str, tunnel: int) -> str:
    """Under which address a packet to tenant `address` is redirected in move tunnel `tunnel`.

    It names the tunnel (24 bits) in place of the identifier; its sum is still that of `address`.
    """
    place = _halves(locator)[0]
    identifier = _IN_MOVE | _C_BIT | tunnel << _NUMBER_SHIFT
    whole = words_sum(int(ipaddress.IPv6Address(address)))
    rest = words_sum(words_sum(place) + words_sum(identifier))
    return _joined(place, identifier | words_sum(whole + (~rest & _LOW)))


def of_nve(locator: str, vni: int) -> str:
    """Where a probe finds the NVE of `locator`, in the VN with `vni`: it is no tenant's."""
    return _joined(_halves(locator)[0], _OF_NVE | vni << _NUMBER_SHIFT | 1)


def is_in_move(address: str) -> bool:
    """Tell whether wire `address` names a move's tunnel."""
    return _type(address) == _IN_MOVE >> _TYPE_SHIFT


def is_tenant(address: str) -> bool:
    """Tell whether wire `address` is a tenant's, and nothing of ours."""
    return _type(address) == UNIQUE


def parse_half(text: str, what: str) -> str:
    """The canonical text of a SIR prefix or a locator: a /64; ValueError otherwise."""
    try:
        network = ipaddress.IPv6Network(text)
    except ValueError as error:
        raise ValueError(f"{what} {text!r}: {error}") from None
    if network.prefixlen != HALF_BITS:
        raise ValueError(f"{what} {text}: it is 64 bits long, write a /64")
    return str(network)


def own_address(locator: str) -> str:
    """The NVE's own address in its `locator`: an identifier of type 0, never translated."""
    return _joined(_halves(locator)[0], 1)


def identifier(address: str) -> int:
    """The 64 bits by which a tenant is known wherever it is."""
    return _halves(address)[1]


def identifier_fault(address: str) -> tuple[str, str] | None:
    """Why a tenant cannot have `address`, and what to write instead; None when it can."""
    prefix, bits = _halves(address)
    if bits >> _TYPE_SHIFT != UNIQUE or bits & _C_BIT:
        better = bits & (_C_BIT - 1) | _UNIQUE
        low = 1 if better & _LOW in (0, _LOW) else better & _LOW
        why = f"{address}: a tenant's identifier (the last 64 bits) begins with the digit 2"
        return why, f"choose {_joined(prefix, better & ~_LOW | low)}"
    if bits & _LOW in (0, _LOW):
        # 0000 comes back as ffff, and both are the same on the wire (requirements.md 4.2).
        why = f"{address}: an identifier that ends in 0000 or ffff does not come back as it was"
        return why, f"choose {_joined(prefix, bits & ~_LOW | 1)}"
    return None


def tenants(prefix: str) -> Iterator[str]:
    """The addresses that tenants in SIR `prefix` get who name none: from `...:2000::1` on."""
    home = _halves(prefix)[0]
    for number in itertools.count(1):
        if number & _LOW not in (0, _LOW):
            yield _joined(home, _UNIQUE | number)


def _type(address: str) -> int:
    return identifier(address) >> _TYPE_SHIFT


def _halves(address: str) -> tuple[int, int]:
    bits = int(ipaddress.IPv6Address(address.partition("/")[0]))
    return bits >> HALF_BITS, bits & _HALF


def _joined(upper: int, lower: int) -> str:
    return str(ipaddress.IPv6Address(upper << HALF_BITS | lower))


def _adjusted(identifier: int, by: int, marked: bool) -> int:
    low = words_sum((identifier & _LOW) + by)
    return (identifier ^ _C_BIT if marked else identifier) & ~_LOW | low
