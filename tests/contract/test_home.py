"""What a VM's block layer is told of a disk that another host has, with real block layers.

A storage daemon stands for the VM's QEMU: it has the same nodes and jobs, and no guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from qemu.qmp import ExecuteError, QMPClient

from overland.hypervisor import away, home
from overland.hypervisor.exporter import PROGRAM
from overland.model.cluster import Disk, Vm, seen_from
from overland.model.names import export_name
from overland.ports import HypervisorFailure
from tests.contract.test_exporter import DISK, FIRST, Site, end
from tests.core.moves import VM
from tests.core.test_faults import until

pytestmark = [
    pytest.mark.skipif(shutil.which(PROGRAM) is None, reason=f"{PROGRAM} is not installed"),
    pytest.mark.timeout(60),
]


class Client:
    """The block layer of a VM on another host, and the guest's reads and writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.qmp = QMPClient("client")
        self.guest = folder / "guest.sock"

    async def begin(self) -> None:
        self.folder.mkdir()
        sock = self.folder / "qmp.sock"
        process = await asyncio.create_subprocess_exec(
            PROGRAM,
            *("--chardev", f"socket,id=qmp,path={sock},server=on,wait=off"),
            *("--monitor", "chardev=qmp"),
            *("--object", "secret,id=any,data=any"),  # QEMU always has a place for objects
        )
        (self.folder / "pid").write_text(str(process.pid))
        await until(sock.exists)
        await asyncio.sleep(0.1)
        await self.qmp.connect(str(sock))

    async def do(self, command: str, /, **arguments: Any) -> Any:
        try:
            return await self.qmp.execute(command, arguments or None)
        except ExecuteError as error:
            raise HypervisorFailure(str(error)) from None

    async def plug(self, file: dict[str, Any]) -> None:
        """A disk with `file` below it, which a guest has."""
        await self.do("blockdev-add", driver="raw", file=file, **{"node-name": "disk0"})
        address = {"type": "unix", "data": {"path": str(self.guest)}}
        await self.do("nbd-server-start", addr=address)
        names = {"node-name": "disk0", "name": "disk0"}
        await self.do("block-export-add", type="nbd", id="guest", writable=True, **names)

    async def io(self, *commands: str) -> bool:
        """Whether the guest can do this (as qemu-io says it)."""
        words = [word for each in commands for word in ("-c", each)]
        process = await asyncio.create_subprocess_exec(
            *("qemu-io", "-f", "raw", f"nbd+unix:///disk0?socket={self.guest}", *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        return not process.returncode and b"error" not in said


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    await site.images.make("db", [DISK])
    keeping = asyncio.create_task(site.exporter.keep())
    await site.exporter.serve((FIRST,))
    yield site
    keeping.cancel()
    await site.exporter.close()
    await end(site.folder / "x")


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    client = Client(tmp_path / "client")
    await client.begin()
    yield client
    with contextlib.suppress(Exception):
        await client.qmp.disconnect()
    await end(client.folder)


def vm(site: Site) -> Vm:
    disk = msgspec.structs.replace(DISK, at="h1", since=1, uri=site.uri)
    return seen_from(msgspec.structs.replace(VM, name="db", host="h2", disks=(disk,)), "h2", 2)


@pytest.mark.req("R-14")
async def test_a_copy_has_nothing_of_its_disk_before_it_is_attached_and_all_of_it_then(
    site: Site, client: Client
) -> None:
    """HO-72: what reads or writes too early sees an error, and the image sees nothing of it."""
    moved = vm(site)
    await client.plug(away.placeholder(moved.disks[0]))
    assert not await client.io("read 0 512")
    assert not await client.io("write -P 1 0 512")
    for _ in range(2):
        await away.attach(client.do, moved, site.tls)
    assert await client.io("read -P 0 0 512", "write -P 7 0 512", "flush")
    assert site.images.path(DISK).read_bytes()[:513] == b"\7" * 512 + b"\0"


@pytest.mark.req("R-53")
async def test_reads_and_writes_wait_for_an_exporter_that_is_started_again(
    site: Site, client: Client
) -> None:
    await client.plug(away.placeholder(vm(site).disks[0]))
    await away.attach(client.do, vm(site), site.tls)
    assert await client.io("write -P 3 0 512")
    os.kill(site.pid(), signal.SIGKILL)
    waiting = asyncio.create_task(client.io("write -P 4 512 512", "read -P 3 0 512"))
    assert await waiting
    assert site.images.path(DISK).read_bytes()[:1024] == b"\3" * 512 + b"\4" * 512


@pytest.mark.req("R-54")
@pytest.mark.req("R-56")
@pytest.mark.parametrize("format_", ["raw", "qcow2"])
async def test_a_disk_comes_home_with_every_write(site: Site, client: Client, format_: str) -> None:
    """Copied, kept the same, ended, and put below the node that the guest has; each step twice."""
    moved = vm(site)
    here = msgspec.convert({"path": f"here.{format_}", "format": format_}, Disk)
    here = msgspec.structs.replace(here, kind="moved", size_bytes=DISK.size_bytes)
    await site.images.make_for("m1", [here])
    await client.plug(away.placeholder(moved.disks[0]))
    await away.attach(client.do, moved, site.tls)
    assert await client.io("write -P 5 4096 4096")
    for _ in range(2):
        await home.begin(client.do, 0, here, site.images.file_node(here), 0)
    await until_ready(client.do)
    assert await client.io("write -P 6 8192 4096")
    for _ in range(2):
        await home.end(client.do, 0)
    assert await site.images.digest(here) == await site.images.digest(DISK)
    for _ in range(2):
        await home.switch(client.do, 0)
    await site.exporter.serve(())
    assert await client.io("read -P 5 4096 4096", "read -P 6 8192 4096", "write -P 9 0 512")
    assert site.images.path(DISK).read_bytes()[:512] == bytes(512)
    assert export_name("db", 0, 2) == "db/0/2"


async def until_ready(do: Callable[..., Any]) -> None:
    async with asyncio.timeout(20):
        while not (await home.look(do, 0)).ready:  # noqa: ASYNC110 - nothing else tells
            await asyncio.sleep(0.01)


@pytest.mark.req("R-54")
@pytest.mark.parametrize("ended", [False, True])
async def test_a_disk_that_is_given_up_leaves_the_guest_where_it_was(
    site: Site, client: Client, ended: bool
) -> None:
    here = Disk(path="here.raw", kind="moved", size_bytes=DISK.size_bytes)
    await site.images.make_for("m1", [here])
    await client.plug(away.placeholder(vm(site).disks[0]))
    await away.attach(client.do, vm(site), site.tls)
    await home.begin(client.do, 0, here, site.images.file_node(here), 0)
    if ended:
        await until_ready(client.do)
        await home.end(client.do, 0)
    for _ in range(2):
        await home.give_up(client.do, 0)
    with pytest.raises(HypervisorFailure, match="nothing copies"):
        await home.look(client.do, 0)
    await site.images.drop_taken("m1", [here])
    assert not site.images.path(here).exists()
    assert await client.io("write -P 8 0 512", "read -P 8 0 512")
    assert site.images.path(DISK).read_bytes()[:512] == b"\x08" * 512
