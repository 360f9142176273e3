"""Real etcd members for tests: on loopback, free ports, data in a folder of the test's."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

from overland.lab.etcd import command
from overland.ports import StoreFailure
from overland.store.etcd import EtcdStore

LIMIT_S = 20.0


class Members:
    """An etcd cluster in this network namespace."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        ports = _free_ports(2 * count)
        names = [f"m{number}" for number in range(count)]
        self.endpoints = [f"http://127.0.0.1:{port}" for port in ports[:count]]
        self._peers = [f"http://127.0.0.1:{port}" for port in ports[count:]]
        self._cluster = dict(zip(names, self._peers, strict=True))
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, number: int) -> None:
        name = f"m{number}"
        self._running[number] = subprocess.Popen(
            command(self._folder / name, name, self.endpoints[number], self._cluster),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def kill(self, number: int) -> None:
        member = self._running.pop(number)
        member.kill()
        member.wait()

    async def ready(self) -> None:
        """Return when they answer as one."""
        store = EtcdStore(self.endpoints)
        try:
            async with asyncio.timeout(LIMIT_S):
                while True:
                    with contextlib.suppress(StoreFailure):
                        await store.get("x")
                        return
                    await asyncio.sleep(0.05)
        finally:
            await store.close()

    def end(self) -> None:
        for number in tuple(self._running):
            self.kill(number)


@contextlib.asynccontextmanager
async def members(folder: Path, count: int) -> AsyncIterator[Members]:
    made = Members(folder, count)
    try:
        for number in range(count):
            made.start(number)
        await made.ready()
        yield made
    finally:
        made.end()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in socks]
