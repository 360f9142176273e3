"""The gates of this host: attached once per device, found again after a restart."""

from __future__ import annotations

import errno
import os

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from overland.dataplane import bpf, gate
from overland.dataplane.devices import interface_index
from overland.dataplane.gate import CLSACT_EGRESS, CLSACT_INGRESS, Gate, GateKind
from overland.ports import KernelFailure

_NAME = "overland_gate"


class Gates:
    """One Gate per device, made when first asked for. `ip` is this namespace's netlink socket."""

    def __init__(self, ip: AsyncIPRoute) -> None:
        self._ip = ip
        self._gates: dict[int, Gate] = {}

    async def ensure(self, device: str, kind: GateKind) -> Gate:
        """The gate of `device`; attaches it where there is none, never disturbs one in place."""
        index = interface_index(device)
        if index in self._gates:
            return self._gates[index]
        try:
            await self._clsact(index)
            self._gates[index] = await self._found(index) or await self._attach(index, kind)
        except NetlinkError as error:
            raise KernelFailure(f"gate at {device}: {error}") from None
        return self._gates[index]

    async def _found(self, index: int) -> Gate | None:
        """The gate in place; None when there is none, or one of another release of overland.

        Such a one is replaced, in one step of the kernel; a move that was under way arms it anew.
        """
        program = await gate.attached_program(self._ip, index, CLSACT_EGRESS)
        if program is None:
            return None
        maps = sorted(bpf.maps_of_program(program), key=lambda each: each.value_bytes)
        if [each.value_bytes for each in maps] == [gate.CONTROL_BYTES, gate.COUNTER_BYTES]:
            return Gate(*maps)
        for each in maps:
            each.close()
        return None

    async def to_port(self, tunnel: str, port: str, mark: int) -> None:
        """Send everything that comes out of `tunnel` to `port`, and nowhere else."""
        index = interface_index(tunnel)
        program = bpf.load_classifier(
            gate.tunnel_program(interface_index(port), mark), "overland_tunnel"
        )
        try:
            await self._clsact(index)
            if await gate.attached_program(self._ip, index, CLSACT_INGRESS) is None:
                await gate.attach(self._ip, index, CLSACT_INGRESS, program, "overland_tunnel")
        except NetlinkError as error:
            raise KernelFailure(f"tunnel {tunnel}: {error}") from None
        finally:
            os.close(program)

    def forget(self, device_index: int) -> None:
        """The device is gone."""
        found = self._gates.pop(device_index, None)
        if found is not None:
            found.close()

    async def _clsact(self, index: int) -> None:
        try:
            await self._ip.tc("add", "clsact", index)
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise

    async def _attach(self, index: int, kind: GateKind) -> Gate:
        control = bpf.Map.create(bpf.HASH, 8, gate.CONTROL_BYTES, 4096, "overland_ctl")
        counters = bpf.Map.create(bpf.HASH, 8, gate.COUNTER_BYTES, 4096, "overland_cnt")
        program = bpf.load_classifier(
            gate.gate_program(kind, control.fd, counters.fd), "overland_gate"
        )
        try:
            await gate.attach(self._ip, index, CLSACT_EGRESS, program, _NAME)
        finally:
            os.close(program)
        if kind == "port":
            await self._filter(index)
        return Gate(control, counters)

    async def _filter(self, index: int) -> None:
        program = bpf.load_classifier(gate.filter_program(), "overland_filter")
        try:
            await gate.attach(self._ip, index, CLSACT_INGRESS, program, "overland_filter")
        finally:
            os.close(program)
