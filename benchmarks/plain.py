"""The same guest, the same streams, the same number of moves, by what everybody has.

A plain bridge and VXLAN that floods and learns on each host, QEMU's own migration and QEMU's own
announcement; nothing of overland but its guest image and its proof tool. It is also the measure of
"QEMU alone": how long the VM stops when nobody stands beside QEMU.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from qemu.qmp import ConnectError, EventListener, QMPClient

from overland.cli.lab import CACHE
from overland.hypervisor.command import qemu_command
from overland.lab import console, guest
from overland.model.cluster import Boot, Interface, Vm
from overland.probe import run as probes
from overland.probe.build import helper_path
from overland.probe.plan import Node, plan_probe

HOSTS = (1, 2, 3)
VM = Vm(
    name="plain",
    host="h1",
    interfaces=(Interface(network="blue", mac="02:00:00:00:42:05"),),
    memory_mib=128,
    machine="pc-i440fx-7.2",
    cpu="max",
)


def ip(line: str, namespace: str | None = None) -> None:
    inside = ["-n", namespace] if namespace else []
    subprocess.run(["ip", *inside, *line.split()], check=True)


def host(n: int) -> str:
    return f"plain-h{n}"


def peer(n: int) -> str:
    return f"plain-p{n}"


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Three hosts, one underlay, one flooding and learning VN with a correspondent on each."""
    names = ["plain-u", *(host(n) for n in HOSTS), *(peer(n) for n in HOSTS)]
    try:
        for name in names:
            ip(f"netns add {name}")
        ip("link add br0 type bridge mcast_snooping 0", "plain-u")
        ip("link set br0 mtu 1600 up", "plain-u")
        for n in HOSTS:
            _host(n)
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def _host(n: int) -> None:
    ip(f"link add u{n} mtu 1600 type veth peer name under mtu 1600 netns {host(n)}", "plain-u")
    ip(f"link set u{n} master br0 up", "plain-u")
    for line in (
        "link set lo up",
        "link set under up",
        f"addr add 10.201.0.{n}/24 dev under",
        "link add br0 type bridge mcast_snooping 0",
        "link set br0 up",
        f"link add vx0 type vxlan id 42 dstport 4789 local 10.201.0.{n} learning",
        "link set vx0 master br0 up",
        "tuntap add tap0 mode tap vnet_hdr",
        "link set tap0 master br0 up",
        f"link add p0 type veth peer name eth0 netns {peer(n)}",
        "link set p0 master br0 up",
    ):
        ip(line, host(n))
    for other in HOSTS:
        if other != n:
            entry = ["bridge", "-n", host(n), "fdb", "append", "00:00:00:00:00:00", "dev", "vx0"]
            subprocess.run([*entry, "dst", f"10.201.0.{other}"], check=True)
    for line in (
        "link set eth0 up",
        f"addr add 10.42.0.1{n}/24 dev eth0",
        f"addr add fd42::1{n}/64 dev eth0 nodad",
    ):
        ip(line, peer(n))


@dataclass
class Copy:
    """One QEMU process."""

    process: subprocess.Popen[bytes]
    client: QMPClient
    folder: Path


@dataclass
class Plain:
    """The VM and its moves."""

    folder: Path
    boot: Boot
    at: int = 1
    copy: Copy | None = None
    stops_ms: list[float] = field(default_factory=list)

    def console(self, command: str) -> tuple[int, bytes]:
        assert self.copy is not None
        return asyncio.run(console.run(self.copy.folder / "console.sock", command, 30.0))

    async def start(self, n: int, incoming: str = "") -> Copy:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        vm = msgspec.structs.replace(VM, boot=self.boot)
        parts: dict[str, Any] = {"files": [], "tls": None, "firmware": None, "incoming": False}
        command = qemu_command("qemu-system-x86_64", vm, "tcg", [0], folder, **parts)
        tap = "ifname=tap0,script=no,downscript=no"
        command = [word.replace("fd=0", tap) for word in command]
        if incoming:
            command += ["-incoming", incoming]
        process = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
            ["ip", "netns", "exec", host(n), *command],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        client = QMPClient("plain")
        while True:
            with contextlib.suppress(ConnectError):
                await client.connect(str(folder / "qmp.sock"))
                return Copy(process, client, folder)
            await asyncio.sleep(0.02)

    async def boot_up(self) -> None:
        copy = await self.start(self.at)
        self.copy = copy
        await copy.client.disconnect()

    async def move(self) -> None:
        """One move with QEMU's defaults; notes how long the VM stood still."""
        assert self.copy is not None
        old, new_at = self.copy, self.at % len(HOSTS) + 1
        client = QMPClient("plain-old")
        await client.connect(str(old.folder / "qmp.sock"))
        uri = f"tcp:10.201.0.{new_at}:4444"
        new = await self.start(new_at, uri)
        stop, resume = EventListener(("STOP",)), EventListener(("RESUME",))
        client.register_listener(stop)
        new.client.register_listener(resume)
        await client.execute("migrate", {"uri": uri})
        stopped, resumed = await stop.get(), await resume.get()
        self.stops_ms.append(_ms(resumed) - _ms(stopped))
        await asyncio.sleep(0.3)
        old.process.send_signal(signal.SIGKILL)
        old.process.wait()
        with contextlib.suppress(Exception):
            await client.disconnect()
        await new.client.disconnect()
        self.copy, self.at = new, new_at


def _ms(event: Any) -> float:
    stamp = event["timestamp"]
    return float(stamp["seconds"]) * 1000 + float(stamp["microseconds"]) / 1000


def measure(moves: int, rate: int, rate_from_vm: int, append: str) -> dict[str, Any]:
    """Move `moves` times under streams; the proof tool's verdict and the stops in ms."""
    image = guest.build(CACHE, {"bin/overland-probe": helper_path()})
    words = f"console=ttyS0 quiet ov.ip=0,10.42.0.5/24,fd42::5/64 {append}"
    boot = Boot(kernel=str(image.kernel), initrd=str(image.initrd), append=words)
    with tempfile.TemporaryDirectory(prefix="plain-") as name, network():
        plain = Plain(Path(name), boot)
        try:
            asyncio.run(plain.boot_up())
            plain.console("true")
            plan = plan_probe(
                Node(name="plain", ipv4="10.42.0.5", ipv6="fd42::5"),
                [Node(name=peer(n), ipv4=f"10.42.0.1{n}", ipv6=f"fd42::1{n}") for n in HOSTS],
                rate=rate,
                rate_from_vm=rate_from_vm,
                payload=200,
                tcp=True,
            )
            spaces = {peer(n): peer(n) for n in HOSTS}
            running = probes.start(plan, "plain", spaces, Path(name) / "probe", plain.console)
            for _ in range(moves):
                asyncio.run(plain.move())
                time.sleep(0.5)
            verdict = probes.stop(running, plain.console)
        finally:
            if plain.copy is not None:
                os.kill(plain.copy.process.pid, signal.SIGKILL)
                plain.copy.process.wait()
    return {"total": msgspec.to_builtins(verdict.total), "stops_ms": plain.stops_ms}
