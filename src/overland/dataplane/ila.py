"""Identifier-locator addressing (ILA) on one host: its devices, and the tables behind them.

A VN of kind `ila` has a device where others have a VXLAN device: a port of its bridge that gives
frames to the underlay translated, without encapsulation. A move's tunnel is such a device, too.
All addresses are worked out here, once for each change; packets only look them up
(`overland.dataplane.translate`).

What the maps hold is the truth, and lives in the kernel as long as the receiver at the underlay's
device does; a restarted daemon finds it there. A locator that a tenant has left is kept for
`QUOTED_HOLD_S`: an ICMPv6 error about a packet that was sent there may still be on its way.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator, Set
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from overland.dataplane import bpf
from overland.dataplane.devices import delete, exists, interface_index
from overland.dataplane.gate import CLSACT_EGRESS, CLSACT_INGRESS, attach, attached_program
from overland.dataplane.namespace import run
from overland.dataplane.pathframe import PROBE_MAC
from overland.dataplane.translate import (
    IN_VALUE,
    OUT_KEY,
    OUT_VALUE,
    PREFIX_VALUE,
    QUOTE_VALUE,
    Tables,
    receiver_program,
    sender_program,
)
from overland.model.ila import in_move, is_in_move, is_tenant, of_nve, on_wire, own_address
from overland.model.names import vni_of
from overland.model.nve import IdentifierEntry, Link, LocatorEntry
from overland.ports import KernelFailure, Tunnel

QUOTED_HOLD_S = 60.0
MAPPINGS_MAX = 2**18
"""How many tenants behind other NVEs one NVE can know of, in all its ILA VNs together."""

_OF_MOVES = 1 << 30
"""Numbers of devices: VNIs, and beyond them the tunnels of moves."""

_SENDER_TURN, _RECEIVER_TURN = 2, 0x6F76
_ALREADY = {errno.EEXIST}


def from_alias(alias: str) -> dict[str, Any]:
    """A VN's device as its mark tells: `overland ila NETWORK LOCAL PREFIX`."""
    local, *prefixes = alias.split()[3:]
    return {"local": local, "gateways": tuple(prefixes)}


class Ila:
    """The ILA devices of one NVE; there are none before `start`."""

    def __init__(self, ip: AsyncIPRoute) -> None:
        self._ip = ip
        self._own = self._underlay = ""
        self._tables: Tables | None = None

    async def start(self, locator: str, underlay: str) -> None:
        """Take the tables over, or make them. `locator` leads here by device `underlay`.

        The NVE's own address in it is put on the loopback device.
        """
        self._own, self._underlay = own_address(locator), underlay
        await run("-6", "addr", "replace", f"{self._own}/128", "dev", "lo")
        index = interface_index(underlay)
        await self._clsact(index)
        program = await attached_program(self._ip, index, CLSACT_INGRESS, _RECEIVER_TURN)
        self._tables = (_found(program) if program is not None else None) or _created()
        # In place of a former daemon's, in one step: the tables are the same.
        code = receiver_program(self._tables, _packed(self._own)[:8])
        await self._attach(index, CLSACT_INGRESS, code, "overland_ila_in", _RECEIVER_TURN)

    @property
    def tables(self) -> Tables:
        if self._tables is None:
            raise KernelFailure("this NVE has no locator")
        return self._tables

    # ------------------------------------------------------------ devices

    async def make(self, link: Link) -> None:
        """Make a VN's device, not yet in its bridge."""
        await self._device(link.name, link.mtu)
        assert link.vni is not None
        await self._send_by(link.name, link.vni)

    def enter(self, link: Link) -> None:
        """From now on probes, and errors about the VN's packets, may come in by `link`."""
        (prefix,) = link.gateways
        index = interface_index(link.name)
        probed = of_nve(self._own, vni_of(link.name))
        self._receive(probed, probed, PROBE_MAC.hex(":"), index)
        self.tables.prefixes.put(
            _packed(prefix.partition("/")[0])[:8], PREFIX_VALUE.pack(index, vni_of(link.name))
        )

    async def remove(self, name: str) -> None:
        """Take a VN's device away; content with absence."""
        if exists(name):
            index = interface_index(name)
            for prefix, value in list(self.tables.prefixes.items()):
                if PREFIX_VALUE.unpack(value)[0] == index:
                    self.tables.prefixes.remove(prefix)
            self.tables.into.remove(_packed(of_nve(self._own, vni_of(name))))
        await delete(self._ip, name)

    def has(self, device: str) -> bool:
        """Tell whether `device` is a VN's, with all that belongs to it."""
        return self._tables is not None and interface_index(device) in self._entered()

    def _entered(self) -> set[int]:
        return {PREFIX_VALUE.unpack(value)[0] for _, value in self.tables.prefixes.items()}

    async def open_tunnel(self, name: str, tunnel: Tunnel) -> None:
        """Make the device of a move's tunnel: packets to its one tenant have an address apart."""
        assert tunnel.address is not None
        await self._device(name, tunnel.mtu)
        number = _OF_MOVES | tunnel.number
        await self._send_by(name, number)
        there = in_move(tunnel.address, tunnel.remote, tunnel.number)
        here = in_move(tunnel.address, tunnel.local, tunnel.number)
        value = OUT_VALUE.pack(_packed(there), _packed(tunnel.address))
        _write(self.tables.out, _out_key(number, tunnel.mac), value)
        self._receive(here, tunnel.address, tunnel.mac, interface_index(name))

    def close_tunnel(self, tunnel: Tunnel) -> None:
        """Forget the tunnel's addresses; content with absence."""
        assert tunnel.address is not None
        self.tables.out.remove(_out_key(_OF_MOVES | tunnel.number, tunnel.mac))
        self.tables.into.remove(_packed(in_move(tunnel.address, tunnel.local, tunnel.number)))

    def sweep_tunnels(self, kept: Set[int]) -> None:
        """Forget the addresses of all tunnels but those numbered `kept`: the rest of a crash."""
        if self._tables is None:
            return
        for key, _ in list(self.tables.out.items()):
            number, _mac_bytes = OUT_KEY.unpack(key)
            if number & _OF_MOVES and number ^ _OF_MOVES not in kept:
                self.tables.out.remove(key)
        indices = {index for index, _ in socket.if_nameindex()}
        for key, value in list(self.tables.into.items()):
            gone = IN_VALUE.unpack(value)[2] not in indices
            if gone and is_in_move(socket.inet_ntop(socket.AF_INET6, key)):
                self.tables.into.remove(key)

    async def _device(self, name: str, mtu: int) -> None:
        try:
            await self._ip.link("add", ifname=name, kind="ifb", mtu=mtu)
        except NetlinkError as error:
            if error.code not in _ALREADY:
                raise KernelFailure(f"{name}: {error}") from None

    async def _send_by(self, name: str, number: int) -> None:
        index = interface_index(name)
        code = sender_program(self.tables.out.fd, number, interface_index(self._underlay))
        await self._clsact(index)
        await self._attach(index, CLSACT_EGRESS, code, "overland_ila_out", _SENDER_TURN)

    async def _attach(self, index: int, parent: int, code: bytes, name: str, turn: int) -> None:
        program = bpf.load_classifier(code, name)
        try:
            await attach(self._ip, index, parent, program, name, turn)
        except NetlinkError as error:
            raise KernelFailure(f"{name}: {error}") from None
        finally:
            os.close(program)

    async def _clsact(self, index: int) -> None:
        try:
            await self._ip.tc("add", "clsact", index)
        except NetlinkError as error:
            if error.code not in _ALREADY:
                raise KernelFailure(f"clsact: {error}") from None

    # ------------------------------------------------------------ entries

    def put(self, entry: LocatorEntry | IdentifierEntry) -> None:
        """Make `entry` so, in place of the one for the same tenant at the same device."""
        if isinstance(entry, LocatorEntry):
            self._send(entry.device, entry.mac, entry.address, entry.remote)
            return
        index = interface_index(entry.device)
        self._receive(on_wire(entry.address, entry.local), entry.address, entry.mac, index)

    def take(self, entry: LocatorEntry | IdentifierEntry) -> None:
        """Content with absence."""
        if isinstance(entry, IdentifierEntry):
            self.tables.into.remove(_packed(on_wire(entry.address, entry.local)))
            return
        key = _out_key(vni_of(entry.device), entry.mac)
        value = self.tables.out.get(key)
        if value is not None:
            self.tables.out.remove(key)
            self._left(value[:16])

    def turn(self, device: str, mac: str, remote: str) -> None:
        """Packets by `device` to `mac` go to NVE `remote` from now on: one atomic replacement."""
        self._send(device, mac, self.address(device, mac), remote)

    def address(self, device: str, mac: str) -> str:
        """The address of the tenant `mac` in the VN of `device`, be it here or elsewhere."""
        value = self.tables.out.get(_out_key(vni_of(device), mac))
        if value is not None:
            return _text(OUT_VALUE.unpack(value)[1])
        wanted = _mac(mac), interface_index(device)
        for address, *whom in (IN_VALUE.unpack(value) for _, value in self.tables.into.items()):
            if tuple(whom) == wanted:
                return _text(address)
        raise KernelFailure(f"nobody with {mac} is known at {device}")

    def entries(self, devices: Set[str]) -> Iterator[LocatorEntry | IdentifierEntry]:
        """What there is for the VNs of `devices`; what was held for long enough is forgotten."""
        if self._tables is None:
            return
        self._forget()
        by_number = {vni_of(device): device for device in devices}
        by_index = {interface_index(device): device for device in devices}
        for key, value in self.tables.out.items():
            number, mac = OUT_KEY.unpack(key)
            if number in by_number:
                wire, address = OUT_VALUE.unpack(value)
                yield LocatorEntry(
                    device=by_number[number],
                    mac=mac.hex(":"),
                    address=_text(address),
                    remote=_text(wire[:8] + bytes(7) + b"\x01"),
                )
        for key, value in self.tables.into.items():
            address, mac, index = IN_VALUE.unpack(value)
            if index in by_index and is_tenant(_text(key)):
                yield IdentifierEntry(
                    device=by_index[index],
                    mac=mac.hex(":"),
                    address=_text(address),
                    local=self._own,
                )

    def _send(self, device: str, mac: str, address: str, remote: str) -> None:
        key = _out_key(vni_of(device), mac)
        wire = _packed(on_wire(address, remote))
        before = self.tables.out.get(key)
        # Known before the first packet that may be quoted is sent.
        _write(self.tables.quoted, wire, QUOTE_VALUE.pack(_packed(address), 0, vni_of(device)))
        _write(self.tables.out, key, OUT_VALUE.pack(wire, _packed(address)))
        if before is not None and before[:16] != wire:
            self._left(before[:16])

    def _receive(self, wire: str, address: str, mac: str, index: int) -> None:
        value = IN_VALUE.pack(_packed(address), _mac(mac), index)
        _write(self.tables.into, _packed(wire), value)

    def _left(self, wire: bytes) -> None:
        """Nothing is sent to `wire` any more; errors about what was are still good for a time."""
        value = self.tables.quoted.get(wire)
        if value is not None:
            address, _, vni = QUOTE_VALUE.unpack(value)
            until = time.monotonic_ns() + int(QUOTED_HOLD_S * 1e9)
            self.tables.quoted.put(wire, QUOTE_VALUE.pack(address, until, vni))

    def _forget(self) -> None:
        """Drop what was held for long enough; hold what a crash has left in use."""
        now = time.monotonic_ns()
        in_use = {value[:16] for _, value in self.tables.out.items()}
        for wire, value in list(self.tables.quoted.items()):
            until = QUOTE_VALUE.unpack(value)[1]
            if until == 0 and wire not in in_use:
                self._left(wire)
            elif 0 < until < now:
                self.tables.quoted.remove(wire)


_SHAPES = (
    ("ila_out", 12, OUT_VALUE.size, MAPPINGS_MAX),
    ("ila_into", 16, IN_VALUE.size, 2**16),
    ("ila_quoted", 16, QUOTE_VALUE.size, 2 * MAPPINGS_MAX),
    ("ila_prefixes", 8, PREFIX_VALUE.size, 2**12),
)


def _found(program: int) -> Tables | None:
    """The maps of the receiver in place; None when it is another release's."""
    maps = bpf.maps_of_program(program)
    by_size = {(each.key_bytes, each.value_bytes): each for each in maps}
    wanted = [(key, value) for _, key, value, _ in _SHAPES]
    if len(maps) == len(wanted) and by_size.keys() == set(wanted):
        return Tables(*(by_size[size] for size in wanted))
    for each in maps:
        each.close()
    return None


def _created() -> Tables:
    return Tables(
        *(
            bpf.Map.create(bpf.HASH, key, value, entries, name, bpf.GROWING)
            for name, key, value, entries in _SHAPES
        )
    )


def _write(table: bpf.Map, key: bytes, value: bytes) -> None:
    try:
        table.put(key, value)
    except OSError as error:
        if error.errno == errno.E2BIG:
            raise KernelFailure("this NVE knows of as many tenants as it can") from None
        raise KernelFailure(f"ILA entry: {error}") from None


def _out_key(number: int, mac: str) -> bytes:
    return OUT_KEY.pack(number, _mac(mac))


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6, address)


def _text(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET6, packed)
