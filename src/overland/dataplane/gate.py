"""Gates: where frames for a moving VM pass, wait or turn, decided in the packet's own path.

A gate is a BPF program at the egress of a device. On a *port* (tap or veth) it sees every frame
for that TSI, whatever its origin; on a *peer* device (VXLAN) it looks at the destination MAC. With
no entry in its `control` map it lets everything by; that is its state at all times but in a move.

The `flow` mode is what keeps order. A frame may go straight to the target only if nothing waits:
the program compares how many frames it has diverted (`held`, an atomic counter of its own) with
how many user space says it has sent on (`released`). Turning the switch from user space instead
would leave an instant in which a later frame overtakes an earlier one.

Programs and maps live as long as the filter on the device does; a restarted daemon finds the maps
again through the program's id. Nothing is pinned, so nothing is left when the device goes.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass, replace
from typing import Literal

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.rtnl.tcmsg import sched_bpf

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
from overland.ports import GateCounters, KernelFailure

# pyroute2 0.9 does not name these three (include/uapi/linux/pkt_cls.h); the id is how a restarted
# daemon finds the gates of the former one.
sched_bpf.options.nla_map = (
    *sched_bpf.options.nla_map,
    ("TCA_BPF_FLAGS_GEN", "uint32"),
    ("TCA_BPF_TAG", "hex"),
    ("TCA_BPF_ID", "uint32"),
)

GateKind = Literal["port", "peer"]

MARK = 0x6F766C64
"""skb->mark of frames that our own daemon sends, or the tunnel home: gates let them by."""

TUNNEL_MARK = MARK + 1
"""skb->mark of frames that the tunnel brings to the new NVE: they wait like all others."""

PATH_MARK = MARK + 2
"""skb->mark of path frames that came in without an Ethernet header of their own (ILA)."""

PATH_FRAME = 0x88B5
"""EtherType of our path frames (IEEE 802 local experimental 1): never for a tenant."""

PATH_LABEL = 0x60088B55
"""How they begin where there is no Ethernet header (ILA): IPv6 and a flow label of our own."""

PATH_PROTOCOL = 254
"""Their next header there (RFC 3692: for experiments)."""

_PATH_FRAME_BE = int.from_bytes(PATH_FRAME.to_bytes(2, "big"), "little")

PASS, HOLD, FLOW = 0, 1, 2
DROP_BROADCAST, UNICAST_ONLY = 1, 2

_SKB_MARK, _SKB_PROTOCOL, _SKB_INGRESS, _SKB_DATA, _SKB_DATA_END = 8, 16, 36, 76, 80
_TC_OK, _TC_SHOT = 0, 2
_TC_NEXT = -1
"""Go on with the next program at this place, if there is one."""

_MAP_LOOKUP, _KTIME, _REDIRECT = 1, 5, 23
_PASSED, _HELD, _REDIRECTED, _DROPPED = 0, 8, 16, 24
_DETOURED, _LAST_DETOURED, _FIRST_PASSED, _FIRST_LOCAL = 32, 40, 48, 56
_CONTROL = struct.Struct("<IIIIQI4x")
_COUNTERS = struct.Struct("<8Q")
CONTROL_BYTES, COUNTER_BYTES = _CONTROL.size, _COUNTERS.size
_KEY_BYTES = 8
_ENTRIES = 4096

CLSACT_INGRESS, CLSACT_EGRESS = 0xFFFFFFF2, 0xFFFFFFF3
_ALL_PROTOCOLS = 0x0003


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """What one gate entry is told to do. Written as a whole, so a frame sees all of it or none.

    `detour` is the device whose frames take a detour when they are redirected: the VXLAN device.
    """

    mode: int = PASS
    target: int = 0
    hold: int = 0
    flags: int = 0
    released: int = 0
    detour: int = 0

    def pack(self) -> bytes:
        return _CONTROL.pack(
            self.mode, self.target, self.hold, self.flags, self.released, self.detour
        )

    @classmethod
    def unpack(cls, raw: bytes) -> Control:
        mode, target, hold, flags, released, detour = _CONTROL.unpack(raw)
        return cls(
            mode=mode, target=target, hold=hold, flags=flags, released=released, detour=detour
        )


def key_of(mac: str | None) -> bytes:
    """The map key of a MAC address; None is a port gate's one entry."""
    return bytes.fromhex(mac.replace(":", "")).ljust(_KEY_BYTES, b"\0") if mac else bytes(8)


def gate_program(kind: GateKind, control_fd: int, counters_fd: int) -> bytes:
    """The gate itself. R6 context, R7 mark then counters, R8 control, R9 multicast bit."""
    code = Code()
    code.alu_reg("mov", R6, R1)
    code.load(W, R7, R6, _SKB_MARK)
    code.store(W, R10, -16, R7)
    code.load(W, R2, R6, _SKB_DATA)
    code.load(W, R3, R6, _SKB_DATA_END)
    code.alu_reg("mov", R4, R2)
    code.alu("add", R4, 14)
    code.jump_reg("gt", R4, R3, "pass_uncounted")
    code.load(B, R9, R2, 0)
    code.alu("and", R9, 1)
    if kind == "port":
        code.store_imm(DW, R10, -8, 0)
    else:
        code.load(W, R5, R2, 0)
        code.store(W, R10, -8, R5)
        code.load(H, R5, R2, 4)
        code.store(W, R10, -4, R5)
    _lookup(code, control_fd)
    code.jump("eq", R0, 0, "no_entry")
    code.alu_reg("mov", R8, R0)
    code.jump("eq", R7, MARK, "pass_uncounted")
    _lookup(code, counters_fd)
    code.jump("eq", R0, 0, "no_entry")
    code.alu_reg("mov", R7, R0)
    code.load(W, R1, R8, 0)
    code.jump("eq", R1, HOLD, "hold")
    code.jump("eq", R1, FLOW, "flow")

    code.label("pass")
    code.load(W, R1, R10, -16)
    if kind == "port":
        code.jump("eq", R1, PATH_MARK, "shot")
        _drop_path_frames(code)
        code.load(W, R1, R10, -16)
    code.jump("eq", R1, TUNNEL_MARK, "tunnelled")
    code.jump("eq", R9, 0, "unicast")
    code.load(W, R1, R8, 12)
    code.jump("set", R1, UNICAST_ONLY, "drop")
    _count(code, _PASSED)
    code.jump("always", R0, 0, "pass_uncounted")
    code.label("unicast")
    _count(code, _PASSED)
    code.load(DW, R1, R7, _FIRST_PASSED)
    code.jump("ne", R1, 0, "pass_uncounted")
    code.call(_KTIME)
    code.store(DW, R7, _FIRST_PASSED, R0)
    code.jump("always", R0, 0, "pass_uncounted")

    code.label("tunnelled")
    _count(code, _REDIRECTED)
    code.jump("always", R0, 0, "pass_uncounted")

    code.label("hold")
    code.jump("eq", R9, 0, "do_hold")
    code.load(W, R1, R10, -16)
    code.jump("eq", R1, TUNNEL_MARK, "do_hold")
    code.load(W, R1, R8, 12)
    code.jump("set", R1, UNICAST_ONLY, "drop")
    code.label("do_hold")
    _count(code, _HELD)
    code.label("to_hold")
    code.load(W, R1, R8, 8)
    _redirect(code)

    code.label("flow")
    code.load(DW, R2, R8, 16)
    code.alu("mov", R1, 1)
    code.atomic_add(R7, _HELD, R1, fetch=True)
    code.jump_reg("ne", R1, R2, "to_hold")
    code.alu("mov", R1, -1)
    code.atomic_add(R7, _HELD, R1)
    code.load(W, R1, R8, 4)
    code.jump("eq", R1, 0, "pass")
    code.jump("eq", R9, 0, "count_redirected")
    code.load(W, R1, R8, 12)
    code.jump("set", R1, DROP_BROADCAST, "drop")
    code.label("count_redirected")
    _count(code, _REDIRECTED)
    code.load(W, R1, R6, _SKB_INGRESS)
    code.load(W, R2, R8, 24)
    code.jump_reg("ne", R1, R2, "local")
    _count(code, _DETOURED)
    code.call(_KTIME)
    code.store(DW, R7, _LAST_DETOURED, R0)
    code.jump("always", R0, 0, "to_target")
    code.label("local")
    code.load(DW, R1, R7, _FIRST_LOCAL)
    code.jump("ne", R1, 0, "to_target")
    code.call(_KTIME)
    code.store(DW, R7, _FIRST_LOCAL, R0)
    code.label("to_target")
    code.load(W, R1, R8, 4)
    _redirect(code)

    code.label("drop")
    _count(code, _DROPPED)
    code.label("shot")
    code.alu("mov", R0, _TC_SHOT)
    code.exit()

    code.label("no_entry")
    if kind == "port":
        code.load(W, R1, R10, -16)
        code.jump("eq", R1, PATH_MARK, "shot")
        _drop_path_frames(code)
    code.label("pass_uncounted")
    code.alu("mov", R0, _TC_NEXT)
    code.exit()
    return code.assemble()


def filter_program() -> bytes:
    """At the ingress of a tenant's port: no tenant speaks our path frames."""
    code = Code()
    code.alu_reg("mov", R6, R1)
    _drop_path_frames(code)
    code.alu("mov", R0, _TC_OK)
    code.exit()
    code.label("shot")
    code.alu("mov", R0, _TC_SHOT)
    code.exit()
    return code.assemble()


def tunnel_program(port_index: int, mark: int) -> bytes:
    """At the ingress of a handover tunnel: everything goes to one port, path frames end here."""
    code = Code()
    code.alu_reg("mov", R6, R1)
    code.load(W, R1, R6, _SKB_MARK)
    code.jump("eq", R1, PATH_MARK, "shot")
    _drop_path_frames(code)
    code.alu("mov", R1, mark)
    code.store(W, R6, _SKB_MARK, R1)
    code.alu("mov", R1, port_index)
    _redirect(code)
    code.label("shot")
    code.alu("mov", R0, _TC_SHOT)
    code.exit()
    return code.assemble()


def _lookup(code: Code, map_fd: int) -> None:
    code.map_fd(R1, map_fd)
    code.alu_reg("mov", R2, R10)
    code.alu("add", R2, -8)
    code.call(_MAP_LOOKUP)


def _redirect(code: Code) -> None:
    code.alu("mov", R2, 0)
    code.call(_REDIRECT)
    code.exit()


def _count(code: Code, offset: int) -> None:
    code.alu("mov", R1, 1)
    code.atomic_add(R7, offset, R1)


def _drop_path_frames(code: Code) -> None:
    code.load(W, R1, R6, _SKB_PROTOCOL)
    code.jump("eq", R1, _PATH_FRAME_BE, "shot")


class Gate:
    """The maps of one device's gate, seen from user space."""

    def __init__(self, control: Map, counters: Map) -> None:
        self._control = control
        self._counters = counters

    def arm(self, mac: str | None, control: Control) -> None:
        """Begin counting from nothing and obey `control`."""
        key = key_of(mac)
        if self._counters.get(key) is None:
            self._counters.put(key, bytes(_COUNTERS.size))
        self._control.put(key, control.pack())

    def control(self, mac: str | None) -> Control | None:
        raw = self._control.get(key_of(mac))
        return Control.unpack(raw) if raw is not None else None

    def change(self, mac: str | None, **changes: int) -> Control:
        """Change some of the entry's fields; KernelFailure when it was never armed."""
        now = self.control(mac)
        if now is None:
            raise KernelFailure("the gate is not armed")
        new = replace(now, **changes)
        self._control.put(key_of(mac), new.pack())
        return new

    def disarm(self, mac: str | None) -> None:
        self._control.remove(key_of(mac))
        self._counters.remove(key_of(mac))

    def held(self, mac: str | None) -> int:
        """How many frames were diverted into the hold queue so far."""
        raw = self._counters.get(key_of(mac))
        return int(_COUNTERS.unpack(raw)[1]) if raw else 0

    def counters(self, mac: str | None) -> GateCounters:
        raw = self._counters.get(key_of(mac))
        if raw is None:
            return GateCounters()
        passed, held, redirected, dropped, detoured, *stamps = _COUNTERS.unpack(raw)
        offset_ns = time.time_ns() - time.monotonic_ns()
        last_detoured, first_passed, first_local = (
            stamp + offset_ns if stamp else 0 for stamp in stamps
        )
        return GateCounters(
            passed=passed,
            held=held,
            redirected=redirected,
            dropped=dropped,
            detoured=detoured,
            last_detoured_ns=last_detoured,
            first_passed_ns=first_passed,
            first_local_ns=first_local,
        )

    def close(self) -> None:
        self._control.close()
        self._counters.close()


GATE_TURN = 1
"""The first program at a place; the others come after it, in the order of their turns."""


async def attach(
    ip: AsyncIPRoute,
    index: int,
    parent: int,
    program_fd: int,
    name: str,
    turn: int = GATE_TURN,
) -> None:
    """Put a classifier at ingress or egress of device `index`, in place of one of that turn."""
    await ip.tc(
        "replace-filter",
        "bpf",
        index,
        fd=program_fd,
        name=name,
        parent=parent,
        direct_action=True,
        protocol=_ALL_PROTOCOLS,
        prio=turn,
        handle=1,
    )


async def attached_program(
    ip: AsyncIPRoute, index: int, parent: int, turn: int = GATE_TURN
) -> int | None:
    """Id of our program at ingress or egress of device `index`, or None."""
    async for message in await ip.get_filters(index=index, parent=parent):
        options = message.get_attr("TCA_OPTIONS")
        if message["info"] >> 16 != turn:
            continue
        if options is not None and options.get_attr("TCA_BPF_ID"):
            return int(options.get_attr("TCA_BPF_ID"))
    return None
