"""The HandoverPath port on Linux: tunnels, gates, hold queues and path frames put together.

What each step promises is written at the port (`overland.ports.HandoverPath`) and in
spec/handover.md; here stands how Linux does it. Everything may be repeated, and nothing is
remembered that the kernel does not hold, except the readers of hold queues.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time
from dataclasses import dataclass

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from overland.dataplane import pathframe
from overland.dataplane.devices import device_counts, interface_index, silence
from overland.dataplane.gate import (
    DROP_BROADCAST,
    FLOW,
    HOLD,
    MARK,
    PASS,
    TUNNEL_MARK,
    UNICAST_ONLY,
    Control,
    Gate,
)
from overland.dataplane.gates import Gates
from overland.dataplane.hold import PLUG, HoldQueue, Injector, Injectors, rescue
from overland.dataplane.ila import Ila
from overland.dataplane.tap import TapTable, read_frames, ring_empty, vnet_header_bytes
from overland.model.handover import MovingPort
from overland.model.names import bridge_name, hold_name, mark, tunnel_name, vni_of
from overland.ports import GateCounters, KernelFailure, Tunnel

TUNNEL_PORT = 4788
"""UDP port of handover tunnels, apart from the VNs' own (4789), so that identifiers never clash."""

_OF_MOVES = (mark("tunnel", ""), mark("hold", ""))
_HOLD_MTU = 65000
_DRAIN_LOOK_S = 0.0002
_MARKER_AGAIN_S = 0.25
"""A marker can be lost like any frame; each that comes back proves the same."""

_RECOUNT_LOOKS = 10_000
_DRAIN_QUIET = 2
"""Looks in a row that must find the ring empty: a frame may have passed the gate just before."""

log = logging.getLogger(__name__)


@dataclass
class _Waiting:
    """A hold queue and, once released, where its frames go on."""

    queue: HoldQueue
    gate: Gate
    mac: str | None
    injector: Injector | None = None
    path_frames: bool = True
    released: int = 0
    drops: int = 0
    adopted: bool = False
    """A former daemon's: how many frames it sent on is not known."""

    def forward(self) -> None:
        """Send on what waits and tell the gate; called whenever a frame is there."""
        assert self.injector is not None
        self.released += self.queue.drain(self.injector.send, path_frames=self.path_frames)
        dropped = self.queue.overflowed()
        self.released += dropped - self.drops
        self.drops = dropped
        self.gate.change(self.mac, released=self.released)

    def settled(self) -> bool:
        return self.gate.held(self.mac) == self.released

    def recount(self) -> None:
        """Learn `released` anew, under a hold: an instant with an empty queue tells it."""
        assert self.injector is not None
        self.gate.change(self.mac, mode=HOLD)
        for _attempt in range(_RECOUNT_LOOKS):
            held = self.gate.held(self.mac)
            taken = self.queue.drain(self.injector.send, path_frames=self.path_frames)
            if not taken and self.gate.held(self.mac) == held:
                self.released, self.adopted = held, False
                self.drops = self.queue.overflowed()
                return
        raise KernelFailure("frames come too fast to count what waits")


def _moment() -> None:
    """Sleep for less than an event loop can: its timers count in whole milliseconds."""
    time.sleep(_DRAIN_LOOK_S)


class LinuxHandoverPath:
    """The moving parts of one host's data path. `taps` are the descriptors of its VM taps."""

    def __init__(
        self, ip: AsyncIPRoute, gates: Gates, taps: TapTable, injectors: Injectors, ila: Ila
    ) -> None:
        self._ip = ip
        self._gates = gates
        self._taps = taps
        self._injectors = injectors
        self._ila = ila
        self._waiting: dict[tuple[str, str | None], _Waiting] = {}
        self._responders: dict[str, pathframe.Responder] = {}

    # ------------------------------------------------------------ tunnel

    async def open_tunnel(self, port: str, tunnel: Tunnel, *, home: bool) -> None:
        name = tunnel_name(tunnel.number)
        if tunnel.address is not None:
            await self._ila.open_tunnel(name, tunnel)
        else:
            await self._encapsulate(name, tunnel)
        silence(name)
        await self._set_link(name, ifalias=mark("tunnel", port))
        await self._gates.to_port(name, port, MARK if home else TUNNEL_MARK)
        self._respond_on(name)
        await self._set_link(name, state="up")

    async def _encapsulate(self, name: str, tunnel: Tunnel) -> None:
        family = "6" if ":" in tunnel.remote else ""
        try:
            await self._ip.link(
                "add",
                ifname=name,
                kind="vxlan",
                mtu=tunnel.mtu,
                vxlan_id=tunnel.number,
                vxlan_port=TUNNEL_PORT,
                vxlan_learning=False,
                vxlan_ttl=64,
                **{f"vxlan_local{family}": tunnel.local, f"vxlan_group{family}": tunnel.remote},
            )
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise KernelFailure(f"tunnel to {tunnel.remote}: {error}") from None

    async def close_tunnel(self, port: str, tunnel: Tunnel) -> None:
        name = tunnel_name(tunnel.number)
        self._silent(name)
        if tunnel.address is not None:
            self._ila.close_tunnel(tunnel)
        await self._delete(name)

    async def count_tunnel(self, tunnel: Tunnel) -> tuple[int, int]:
        name = tunnel_name(tunnel.number)
        counts = device_counts(name)
        return counts.sent, counts.received

    # ------------------------------------------------------------ ports

    async def arm_port(self, port: str, device: str, frames: int) -> None:
        gate = await self._gates.ensure(port, "port")
        await self._arm(port, None, gate, frames)
        gate.change(None, detour=interface_index(device))

    async def quiet_port(self, port: str) -> None:
        gate = await self._gates.ensure(port, "port")
        gate.change(None, mode=HOLD, flags=UNICAST_ONLY)
        for _ in read_frames(self._taps.fd(port)):
            pass  # broadcasts from before the move: the VM has its own copies at the old host
        self._injectors.into(port).send(PLUG)

    async def open_port(self, port: str, timeout_s: float) -> None:
        gate = await self._gates.ensure(port, "port")
        if not await self._taken(port, timeout_s):
            raise KernelFailure(f"the hypervisor does not read {port}")
        await self._release(port, None, gate, self._injectors.into(port), 0, path_frames=False)

    async def admit_broadcast(self, port: str) -> None:
        gate = await self._gates.ensure(port, "port")
        gate.change(None, flags=0)

    async def hold_port(self, port: str) -> int:
        gate = await self._gates.ensure(port, "port")
        self._stop_forwarding(port, None)
        gate.change(None, mode=HOLD)
        return time.time_ns()

    async def port_drained(self, port: str, timeout_s: float) -> bool:
        self._injectors.into(port).send(PLUG)
        return await self._taken(port, timeout_s)

    async def _taken(self, port: str, timeout_s: float) -> bool:
        fd = self._taps.fd(port)
        deadline_s = time.monotonic() + timeout_s
        quiet = 0
        while quiet < _DRAIN_QUIET:
            quiet = quiet + 1 if ring_empty(fd) else 0
            if time.monotonic() > deadline_s:
                return False
            _moment()
            await asyncio.sleep(0)
        return True

    async def release_port(self, port: str, to: Tunnel | None) -> int:
        gate = await self._gates.ensure(port, "port")
        rescued = 0
        if to is not None:
            device = tunnel_name(to.number)
            ring = self._taps.fd(port)
            header = vnet_header_bytes(ring)
            rescued = rescue(ring, self._injectors.into(device, vnet_header=header))
        else:
            device = port
        target = interface_index(device) if to is not None else 0
        await self._release(
            port, None, gate, self._injectors.into(device), target, path_frames=to is not None
        )
        return rescued

    async def mute_broadcast(self, port: str) -> None:
        gate = await self._gates.ensure(port, "port")
        now = gate.control(None)
        if now is not None:
            gate.change(None, flags=now.flags | DROP_BROADCAST)

    async def disarm_port(self, port: str) -> None:
        try:
            gate = await self._gates.ensure(port, "port")
        except KernelFailure:
            gate = None
        await self._disarm(port, None, gate)

    async def count_port(self, port: str) -> GateCounters:
        return await self._count(port, None, "port")

    # ------------------------------------------------------------ peers

    async def arm_peer(self, device: str, mac: str, frames: int) -> None:
        gate = await self._gates.ensure(device, "peer")
        await self._arm(device, mac, gate, frames)
        self._respond_on(device)

    async def steer(
        self, device: str, mac: str, remote: str, port: str | None, timeout_s: float
    ) -> float:
        gate = await self._gates.ensure(device, "peer")
        began_s = time.monotonic()
        with pathframe.Asker(remote) as asker:
            self._stop_forwarding(device, mac)
            gate.change(mac, mode=HOLD)
            to = self._ila.address(device, mac) if self._ila.has(device) else None
            marker = asker.frame(pathframe.MARKER, bytes.fromhex(mac.replace(":", "")), to)
            proved = False
            while not proved and time.monotonic() < began_s + timeout_s:
                self._injectors.into(device).send(marker)
                proved = await asker.answered(_MARKER_AGAIN_S)
        if port is None:
            await self._entry(device, mac, remote)
            await self._release(
                device, mac, gate, self._injectors.into(device), 0, path_frames=True
            )
        else:
            target = interface_index(port)
            # Unmarked: at the port's own gate they take their turn among all that waits there.
            queue = self._injectors.into(port, mark=0)
            await self._release(device, mac, gate, queue, target, path_frames=False)
            await self._local(bridge_name(vni_of(device)), mac, port)
        if not proved:
            raise KernelFailure(f"no marker came back from {remote}: order is not proved")
        return time.monotonic() - began_s

    async def turn(self, device: str, mac: str, port: str, remote: str | None) -> None:
        bridge = bridge_name(vni_of(device))
        if remote is None:
            await self._local(bridge, mac, port)
        else:
            await self._entry(device, mac, remote)
            await self._local(bridge, mac, device)

    async def disarm_peer(self, device: str, mac: str) -> None:
        try:
            gate = await self._gates.ensure(device, "peer")
        except KernelFailure:
            gate = None
        await self._disarm(device, mac, gate)

    async def count_peer(self, device: str, mac: str) -> GateCounters:
        return await self._count(device, mac, "peer")

    async def cross(self, device: str, remote: str, timeout_s: float) -> float:
        if self._ila.has(device):
            out = self._injectors.into(device)
            vni = vni_of(device)
            return await pathframe.probe_locator(device, vni, out.send, remote, timeout_s)
        return await pathframe.probe(device, vni_of(device), remote, timeout_s)

    async def sweep(self, ports: frozenset[MovingPort]) -> None:
        self._ila.sweep_tunnels({port.tunnel for port in ports if port.ila})
        kept = {tunnel_name(port.tunnel) for port in ports}
        kept |= {hold_name(port.port, "") for port in ports}
        kept |= {hold_name(port.device, port.mac) for port in ports}
        async for message in await self._ip.get_links():
            alias = message.get_attr("IFLA_IFALIAS") or ""
            name = message.get_attr("IFLA_IFNAME")
            if alias.startswith(_OF_MOVES) and name not in kept:
                await self._delete(name)

    # ------------------------------------------------------------ how

    async def _arm(self, device: str, mac: str | None, gate: Gate, frames: int) -> None:
        name = hold_name(device, mac or "")
        waiting = self._waiting.get((device, mac))
        if waiting is None:
            adopted = gate.control(mac) is not None
            if not adopted:
                await self._delete(name)  # what a crash left; a fresh queue counts from nothing
            queue = HoldQueue(name, frames)
            waiting = _Waiting(queue=queue, gate=gate, mac=mac, adopted=adopted)
            silence(name)
            alias = mark("hold", device)
            await self._set_link(name, ifalias=alias, mtu=_HOLD_MTU, state="up")
            self._waiting[device, mac] = waiting
        now = gate.control(mac) or Control(mode=PASS)
        hold = interface_index(name)
        gate.arm(
            mac,
            Control(
                mode=now.mode,
                target=now.target,
                hold=hold,
                flags=now.flags,
                released=now.released,
                detour=now.detour,
            ),
        )

    async def _release(
        self,
        device: str,
        mac: str | None,
        gate: Gate,
        injector: Injector,
        target: int,
        *,
        path_frames: bool,
    ) -> None:
        """Send on what waits, let frames flow, and go on sending whatever still comes to wait."""
        waiting = self._waiting.get((device, mac))
        if waiting is None:
            raise KernelFailure(f"the gate at {device} was taken down meanwhile")
        waiting.injector = injector
        waiting.path_frames = path_frames
        if waiting.adopted:
            waiting.recount()
        waiting.forward()
        gate.change(mac, mode=FLOW, target=target)
        asyncio.get_running_loop().add_reader(waiting.queue.fd, waiting.forward)
        waiting.forward()
        while not waiting.settled():
            await asyncio.sleep(0)
            waiting.forward()

    def _stop_forwarding(self, device: str, mac: str | None) -> None:
        waiting = self._waiting.get((device, mac))
        if waiting is None or waiting.injector is None:
            return
        asyncio.get_running_loop().remove_reader(waiting.queue.fd)
        waiting.injector = None

    async def _disarm(self, device: str, mac: str | None, gate: Gate | None) -> None:
        if gate is not None:
            gate.disarm(mac)
        waiting = self._waiting.pop((device, mac), None)
        if waiting is not None:
            asyncio.get_running_loop().remove_reader(waiting.queue.fd)
            if waiting.injector is not None:
                # A frame may have entered just before the gate forgot: it still goes on.
                waiting.queue.drain(waiting.injector.send, path_frames=waiting.path_frames)
            waiting.queue.close()
        await self._delete(hold_name(device, mac or ""))

    async def _count(self, device: str, mac: str | None, kind: str) -> GateCounters:
        gate = await self._gates.ensure(device, "port" if kind == "port" else "peer")
        counters = gate.counters(mac)
        waiting = self._waiting.get((device, mac))
        return GateCounters(
            passed=counters.passed,
            held=counters.held,
            redirected=counters.redirected,
            dropped=counters.dropped,
            detoured=counters.detoured,
            overflowed=waiting.queue.overflowed() if waiting else 0,
            ring_full=device_counts(device).send_drops if kind == "port" else 0,
            last_detoured_ns=counters.last_detoured_ns,
            first_passed_ns=counters.first_passed_ns,
            first_local_ns=counters.first_local_ns,
        )

    async def _entry(self, device: str, mac: str, remote: str) -> None:
        """Frames leaving `device` for `mac` go to NVE `remote`: one atomic replacement."""
        if self._ila.has(device):
            self._ila.turn(device, mac, remote)
            return
        try:
            await self._ip.fdb(
                "replace",
                ifindex=interface_index(device),
                lladdr=mac,
                dst=remote,
                flags=_NTF_SELF,
                state=_NUD_PERMANENT,
            )
        except NetlinkError as error:
            raise KernelFailure(f"entry of {mac} at {device}: {error}") from None

    async def _local(self, bridge: str, mac: str, port: str) -> None:
        """Frames in `bridge` for `mac` go to local `port`."""
        try:
            await self._ip.fdb(
                "replace",
                ifindex=interface_index(port),
                lladdr=mac,
                flags=_NTF_MASTER,
                state=_NUD_NOARP,
            )
        except NetlinkError as error:
            raise KernelFailure(f"entry of {mac} in {bridge}: {error}") from None

    def _respond_on(self, device: str) -> None:
        """A device made anew is not heard by who listened to the former one of its name."""
        known = self._responders.get(device)
        if known is not None and known.index != interface_index(device):
            self._silent(device)
        if device not in self._responders:
            self._responders[device] = pathframe.Responder(device)

    def _silent(self, device: str) -> None:
        responder = self._responders.pop(device, None)
        if responder is not None:
            responder.close()

    async def _set_link(self, name: str, **attributes: str | int) -> None:
        try:
            await self._ip.link("set", index=interface_index(name), **attributes)
        except NetlinkError as error:
            raise KernelFailure(f"{name}: {error}") from None

    async def _delete(self, name: str) -> None:
        with contextlib.suppress(KernelFailure):
            index = interface_index(name)
            try:
                await self._ip.link("del", index=index)
            except NetlinkError as error:
                if error.code != errno.ENODEV:
                    raise KernelFailure(f"{name}: {error}") from None


_NTF_SELF, _NTF_MASTER = 0x02, 0x04
_NUD_NOARP, _NUD_PERMANENT = 0x40, 0x80
