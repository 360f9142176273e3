"""Identifier-locator addressing: the vectors of requirements.md 4.2, round trips, and the trap."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overland.model import ila

PREFIX = "2001:db8:100::/64"
VECTORS = [
    ("2001:db8:100:0:2000::1", "2001:db8:a:1", True, 0xF0F4, "2001:db8:a:1:3000::f0f5"),
    ("2001:db8:100:0:2000::1", "2001:db8:a:1", False, 0x00F5, "2001:db8:a:1:2000::f6"),
    ("2001:db8:100:0:2000::1", "2001:db8:a:2", True, 0xF0F3, "2001:db8:a:2:3000::f0f4"),
    (
        *("2001:db8:100:0:2012:3456:dead:beef", "2001:db8:b:77", True, 0xF07D),
        "2001:db8:b:77:3012:3456:dead:af6d",
    ),
    (
        *("2001:db8:100:0:2012:3456:dead:beef", "2001:db8:b:77", False, 0x007E),
        "2001:db8:b:77:2012:3456:dead:bf6d",
    ),
]


def upper(address: str) -> int:
    return int(ipaddress.IPv6Address(address)) >> 64


@pytest.mark.parametrize(("sir", "locator", "marked", "delta", "wire"), VECTORS)
def test_vectors(sir: str, locator: str, marked: bool, delta: int, wire: str) -> None:
    """V1 to V5: the adjustment, there, and back again."""
    place = f"{locator}::/64"
    assert ila.adjustment(upper(sir), upper(f"{locator}::"), marked=marked) == delta
    assert ila.on_wire(sir, place, marked=marked) == wire
    assert ila.from_wire(wire, PREFIX, marked=marked) == sir


def test_the_trap() -> None:
    """V6: an identifier that ends in 0000 comes back as another; so nobody may have one."""
    wire = ila.on_wire("2001:db8:100:0:2000::", "2001:db8:a:1::")
    assert wire == "2001:db8:a:1:3000::f0f4"
    assert ila.from_wire(wire, PREFIX) == "2001:db8:100:0:2000::ffff"
    assert ila.on_wire("2001:db8:100:0:2000::ffff", "2001:db8:a:1::") == wire
    for end in ("", "1:0", "ffff"):
        fault = ila.identifier_fault(f"2001:db8:100:0:2000::{end}")
        assert fault is not None
        assert ila.identifier_fault(fault[1].removeprefix("choose ")) is None


@pytest.mark.parametrize("half", ["::5", ":0:1000::5", ":0:3000::5", ":0:4000::5"])
def test_only_locally_unique_identifiers_are_tenants(half: str) -> None:
    """Type 1 with the C-bit clear; the hint is an address that may be had."""
    fault = ila.identifier_fault(f"2001:db8:100{half}")
    assert fault is not None
    assert ila.identifier_fault(fault[1].removeprefix("choose ")) is None


halves = st.integers(0, 2**64 - 1)
identifiers = st.integers(0, 2**60 - 1).map(lambda bits: bits | 2 << 60)
ordinary = identifiers.filter(lambda bits: bits & 0xFFFF not in (0, 0xFFFF))


def address(upper: int, lower: int) -> str:
    return str(ipaddress.IPv6Address(upper << 64 | lower))


@given(halves, halves, ordinary, st.booleans())
def test_every_address_comes_back_and_no_checksum_changes(
    prefix: int, locator: int, identifier: int, marked: bool
) -> None:
    """With the same sum modulo 0xffff a pseudo-header gives the same checksum (RFC 1624)."""
    sir = address(prefix, identifier)
    wire = ila.on_wire(sir, address(locator, 0), marked=marked)
    assert upper(wire) == locator
    assert ila.identifier(wire) >> 60 == (3 if marked else 2)
    assert sum_of(wire) == sum_of(sir)
    home = f"{address(prefix, 0)}/64"
    assert ila.from_wire(wire, home, marked=marked) == sir


@given(halves, halves, ordinary, st.integers(1, 2**24 - 1))
def test_a_move_has_an_address_of_its_own_with_the_same_sum(
    prefix: int, locator: int, identifier: int, tunnel: int
) -> None:
    sir = address(prefix, identifier)
    wire = ila.in_move(sir, address(locator, 0), tunnel)
    assert upper(wire) == locator
    assert sum_of(wire) == sum_of(sir)
    assert ila.is_in_move(wire)
    assert not ila.is_in_move(ila.on_wire(sir, address(locator, 0)))
    assert ila.identifier(wire) >> 36 & (2**24 - 1) == tunnel


def sum_of(text: str) -> int:
    words: tuple[int, ...] = struct.unpack("!8H", ipaddress.IPv6Address(text).packed)
    return sum(words) % 0xFFFF


def test_addresses_that_nobody_named_are_sound_and_never_repeat() -> None:
    given_out = [next(each) for each in [ila.tenants(PREFIX)] for _ in range(70_000)]
    assert given_out[0] == "2001:db8:100:0:2000::1"
    assert len(set(given_out)) == len(given_out)
    assert all(ila.identifier_fault(each) is None for each in given_out)


@pytest.mark.parametrize("text", ["2001:db8:a::/48", "2001:db8:a:1::1/64", "10.0.0.0/8", "word"])
def test_a_locator_is_64_bits(text: str) -> None:
    with pytest.raises(ValueError, match="locator"):
        ila.parse_half(text, "locator")


def test_an_nve_has_an_address_in_its_locator() -> None:
    assert ila.own_address("2001:db8:a:1::/64") == "2001:db8:a:1::1"
