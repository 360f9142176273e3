"""The two BPF programs of identifier-locator addressing (ILA): out by a device, in by the underlay.

The *sender* stands behind the gate at the egress of a VN's device, or of a move's tunnel. It puts
the address on the wire in place of the tenant's, as the entry for the frame's MAC address has it
ready, and gives the packet to the underlay. The *receiver* stands where the underlay comes in: it
puts the tenant's address back and lets the frame enter the VN's bridge by that same device. No
checksum is touched, for no sum changes (requirements.md 4.2).

The receiver also repairs ICMPv6 errors from within the underlay, which quote a packet with the
address it had on the wire: the guest must find its own there (requirements.md 4.4).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from overland.dataplane.bpf import (
    DW,
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    R10,
    B,
    Code,
    H,
    Map,
    W,
)
from overland.dataplane.gate import MARK, PATH_LABEL, PATH_MARK, PATH_PROTOCOL
from overland.model.names import GATEWAY_MAC

UNTAGGED = bytes.fromhex("026f766c0002")
"""From whom frames out of the underlay are, in a VN's bridge: nobody answers to it."""

_PATH_LABEL_LE = int.from_bytes(PATH_LABEL.to_bytes(4, "big"), "little")
_IPV6_BE = 0xDD86
_SKB_MARK, _SKB_PROTOCOL = 8, 16
_TC_SHOT, _TC_NEXT = 2, -1
_TC_STOLEN = 4
"""Dropped as well, but whoever sends is not told that there was no room."""

_MAP_LOOKUP, _KTIME, _STORE, _REDIRECT, _LOAD, _REDIRECT_NEIGH = 1, 5, 9, 23, 26, 152
_INGRESS = 1
_ICMPV6, _FIRST_INFORMATIONAL = 58, 128

# The frame's Ethernet and IPv6 headers on the stack, so that the destination is aligned; below it a
# place for what is looked up or written; below that the quoted header of an ICMPv6 error.
_HEAD, _HEAD_BYTES = -62, 54
_LABEL, _NEXT_HEADER, _TO = _HEAD + 14, _HEAD + 20, _HEAD + 38
_SCRATCH, _VNI = -80, -88
_QUOTE, _QUOTE_BYTES, _QUOTED_TO = -136, 48, -104
_TO_OFFSET, _QUOTE_OFFSET, _QUOTED_TO_OFFSET = 38, 54, 86

OUT_KEY, OUT_VALUE = struct.Struct("<I6s2x"), struct.Struct("16s16s")
IN_VALUE = struct.Struct("<16s6s2xI4x")
QUOTE_VALUE = struct.Struct("<16sQI12x")
PREFIX_VALUE = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class Tables:
    """The maps of one NVE.

    `out`: (number of the device, MAC) to (wire address, tenant's address). `into`: wire address to
    (tenant's address, MAC, device). `quoted`: wire address to (tenant's address, until when, where
    0 is as long as it is in use, VNI). `prefixes`: SIR prefix to (the VN's device, VNI).
    """

    out: Map
    into: Map
    quoted: Map
    prefixes: Map

    def all(self) -> tuple[Map, ...]:
        return self.out, self.into, self.quoted, self.prefixes


def sender_program(out_fd: int, number: int, underlay: int) -> bytes:
    """At the egress of the device with `number`; R6 context, R8 entry. Not IPv6: dropped."""
    code = Code()
    code.alu_reg("mov", R6, R1)
    _load_head(code, "drop")
    _lookup_mac(code, out_fd, number)
    code.jump("eq", R0, 0, "unknown")
    code.alu_reg("mov", R8, R0)
    for half in (0, 8):
        code.load(DW, R1, R8, 16 + half)
        code.load(DW, R2, R10, _TO + half)
        code.jump_reg("ne", R1, R2, "drop")
    _jump_unless_path(code, "translate")
    code.load(W, R1, R6, _SKB_MARK)  # a path frame of ours, not of a tenant
    code.jump("eq", R1, MARK, "translate")
    code.jump("ne", R1, PATH_MARK, "drop")
    code.label("translate")
    code.alu_reg("mov", R1, R6)
    code.alu("mov", R2, _TO_OFFSET)
    code.alu_reg("mov", R3, R8)
    code.alu("mov", R4, 16)
    code.alu("mov", R5, 0)
    code.call(_STORE)
    code.jump("ne", R0, 0, "drop")
    code.label("onto_underlay")
    code.alu("mov", R1, underlay)
    code.alu("mov", R2, 0)
    code.alu("mov", R3, 0)
    code.alu("mov", R4, 0)
    code.call(_REDIRECT_NEIGH)
    code.exit()
    code.label("unknown")  # a probe of ours has its place on the wire from the start
    _jump_unless_path(code, "drop")
    code.load(W, R1, R6, _SKB_MARK)
    code.jump("eq", R1, MARK, "onto_underlay")
    _dropped(code, _TC_STOLEN)
    return code.assemble()


def receiver_program(tables: Tables, locator: bytes) -> bytes:
    """At the ingress of the underlay's device; `locator` is the first half of what leads here."""
    code = Code()
    code.alu_reg("mov", R6, R1)
    code.map_fd(R7, tables.out.fd)  # not needed here: so that it lives as long as this program
    _load_head(code, "next")
    code.load(DW, R2, R10, _TO)
    code.constant(R3, int.from_bytes(locator, "little"))
    code.jump_reg("ne", R2, R3, "elsewhere")

    code.load(B, R2, R10, _TO + 8)
    code.alu("and", R2, 0xE0)
    code.jump("eq", R2, 0, "next")  # an interface's own identifier: the host's business
    _lookup(code, tables.into, _TO)
    code.jump("eq", R0, 0, "drop")
    code.alu_reg("mov", R8, R0)
    for at in (0, 2, 4):
        code.load(H, R1, R8, 16 + at)
        code.store(H, R10, _SCRATCH + at, R1)
    _from_gateway(code, _SCRATCH + 6, bytes.fromhex(GATEWAY_MAC.replace(":", "")))
    _store(code, 0, _SCRATCH, 12)
    code.jump("ne", R0, 0, "drop")
    code.alu_reg("mov", R1, R6)
    code.alu("mov", R2, _TO_OFFSET)
    code.alu_reg("mov", R3, R8)
    code.alu("mov", R4, 16)
    code.alu("mov", R5, 0)
    code.call(_STORE)
    code.jump("ne", R0, 0, "drop")
    code.alu("mov", R1, 0)
    _jump_unless_path(code, "marked", scratch=R2)
    code.alu("mov", R1, PATH_MARK)
    code.label("marked")
    code.store(W, R6, _SKB_MARK, R1)
    code.load(W, R1, R8, 24)
    _enter(code)

    code.label("elsewhere")
    _lookup(code, tables.prefixes, _TO)
    code.jump("eq", R0, 0, "next")
    code.load(W, R7, R0, 0)
    code.load(W, R1, R0, 4)
    code.store(W, R10, _VNI, R1)
    # To a tenant's own address nothing comes from the underlay but errors.
    code.load(B, R1, R10, _NEXT_HEADER)
    code.jump("ne", R1, _ICMPV6, "drop")
    _load_bytes(code, _QUOTE_OFFSET, _QUOTE, _QUOTE_BYTES)
    code.jump("ne", R0, 0, "drop")
    code.load(B, R1, R10, _QUOTE)
    code.jump("ge", R1, _FIRST_INFORMATIONAL, "drop")
    _lookup(code, tables.quoted, _QUOTED_TO)
    code.jump("eq", R0, 0, "drop")  # about a packet that nobody here has sent
    code.alu_reg("mov", R8, R0)
    code.load(W, R1, R8, 24)
    code.load(W, R2, R10, _VNI)
    code.jump_reg("ne", R1, R2, "drop")  # to one tenant about another's: a forged source
    code.load(DW, R9, R8, 16)
    code.jump("eq", R9, 0, "repair")
    code.call(_KTIME)
    code.jump_reg("gt", R0, R9, "drop")
    code.label("repair")
    code.alu_reg("mov", R1, R6)
    code.alu("mov", R2, _QUOTED_TO_OFFSET)
    code.alu_reg("mov", R3, R8)
    code.alu("mov", R4, 16)
    code.alu("mov", R5, 0)
    code.call(_STORE)
    code.jump("ne", R0, 0, "drop")
    _from_gateway(code, _SCRATCH, bytes.fromhex(GATEWAY_MAC.replace(":", "")))
    _from_gateway(code, _SCRATCH + 6, UNTAGGED)
    _store(code, 0, _SCRATCH, 12)
    code.jump("ne", R0, 0, "drop")
    code.alu("mov", R1, 0)
    code.store(W, R6, _SKB_MARK, R1)
    code.alu_reg("mov", R1, R7)
    _enter(code)

    code.label("next")
    code.alu("mov", R0, _TC_NEXT)
    code.exit()
    _dropped(code, _TC_SHOT)
    return code.assemble()


def _load_head(code: Code, otherwise: str) -> None:
    code.load(W, R1, R6, _SKB_PROTOCOL)
    code.jump("ne", R1, _IPV6_BE, otherwise)
    _load_bytes(code, 0, _HEAD, _HEAD_BYTES)
    code.jump("ne", R0, 0, otherwise)


def _load_bytes(code: Code, offset: int, to: int, count: int) -> None:
    code.alu_reg("mov", R1, R6)
    code.alu("mov", R2, offset)
    code.alu_reg("mov", R3, R10)
    code.alu("add", R3, to)
    code.alu("mov", R4, count)
    code.call(_LOAD)


def _store(code: Code, offset: int, of: int, count: int) -> None:
    code.alu_reg("mov", R1, R6)
    code.alu("mov", R2, offset)
    code.alu_reg("mov", R3, R10)
    code.alu("add", R3, of)
    code.alu("mov", R4, count)
    code.alu("mov", R5, 0)
    code.call(_STORE)


def _lookup(code: Code, table: Map, key: int) -> None:
    code.map_fd(R1, table.fd)
    code.alu_reg("mov", R2, R10)
    code.alu("add", R2, key)
    code.call(_MAP_LOOKUP)


def _lookup_mac(code: Code, out_fd: int, number: int) -> None:
    code.store_imm(W, R10, _SCRATCH, number)
    for at in (0, 2, 4):
        code.load(H, R1, R10, _HEAD + at)
        code.store(H, R10, _SCRATCH + 4 + at, R1)
    code.store_imm(H, R10, _SCRATCH + 10, 0)
    code.map_fd(R1, out_fd)
    code.alu_reg("mov", R2, R10)
    code.alu("add", R2, _SCRATCH)
    code.call(_MAP_LOOKUP)


def _jump_unless_path(code: Code, to: str, scratch: int = R1) -> None:
    code.load(B, scratch, R10, _NEXT_HEADER)
    code.jump("ne", scratch, PATH_PROTOCOL, to)
    code.load(W, scratch, R10, _LABEL)
    code.jump("ne", scratch, _PATH_LABEL_LE, to)


def _from_gateway(code: Code, at: int, mac: bytes) -> None:
    for offset in (0, 2, 4):
        word = int.from_bytes(mac[offset : offset + 2], "little")
        code.store_imm(H, R10, at + offset, word)


def _enter(code: Code) -> None:
    """Let the frame come in by the device in R1, into the bridge that it is a port of."""
    code.alu("mov", R2, _INGRESS)
    code.call(_REDIRECT)
    code.exit()


def _dropped(code: Code, how: int) -> None:
    code.label("drop")
    code.alu("mov", R0, how)
    code.exit()
