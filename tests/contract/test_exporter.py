"""The exporter with a real storage daemon: one writer of an image, and what is written is there."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from overland.hypervisor.exporter import PROGRAM, Exporter, not_reached
from overland.hypervisor.images import Images
from overland.hypervisor.mirror import credentials
from overland.model.cluster import Disk, Export
from overland.ports import HypervisorFailure
from overland.wire import tls
from tests.core.test_faults import until

pytestmark = [
    pytest.mark.skipif(shutil.which(PROGRAM) is None, reason=f"{PROGRAM} is not installed"),
    pytest.mark.timeout(60),
]

DISK = Disk(path="data.raw", kind="left", size_bytes=1 << 20)
FIRST = Export(vm="db", index=0, disk=DISK, to="h2", version=2)
SECOND = msgspec.structs.replace(FIRST, to="h3", version=3)


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


class Site:
    """One host's exporter, its images, and a client's certificate."""

    def __init__(self, folder: Path) -> None:
        certs = folder / "certs"
        tls.create_authority(certs)
        tls.issue(certs, "h1", "nve:h1", ["127.0.0.1"])
        pems = (certs / "ca.crt", certs / "h1.crt", certs / "h1.key")
        self.tls = credentials(folder / "tls", *pems)
        self.images = Images(folder / "disks", folder / "notes")
        self.folder, self.port = folder, free_port()
        self.exporter = self.another()

    def another(self) -> Exporter:
        """As a restarted daemon has it."""
        return Exporter(self.folder / "x", self.images, self.tls, "127.0.0.1", self.port)

    @property
    def uri(self) -> str:
        return f"nbd://127.0.0.1:{self.port}"

    async def io(self, export: Export, *commands: str) -> tuple[int, str]:
        """What a client of `export` gets for these commands of qemu-io."""
        creds = f"tls-creds-x509,id=c,endpoint=client,dir={self.tls},verify-peer=on"
        at = f"driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={self.port}"
        name = f"export={export.vm}/{export.index}/{export.version},tls-creds=c"
        words = [word for each in commands for word in ("-c", each)]
        process = await asyncio.create_subprocess_exec(
            *(
                "qemu-io",
                "--object",
                creds,
                "--image-opts",
                f"driver=raw,file.{at.replace(',', ',file.')},file.{name.replace(',', ',file.')}",
            ),
            *words,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        return process.returncode or 0, said.decode()

    def pid(self) -> int:
        return int((self.folder / "x" / "pid").read_text())


async def end(folder: Path) -> None:
    """End the exporter of `folder`, if there is one, and let asyncio hear of it."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        pid = int((folder / "pid").read_text())
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not Path(f"/proc/{pid}").exists())
        await asyncio.sleep(0.05)  # its watcher is a thread, which says nothing


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    await site.images.make("db", [DISK])
    keeping = asyncio.create_task(site.exporter.keep())
    yield site
    keeping.cancel()
    await site.exporter.close()
    await end(site.folder / "x")


@pytest.mark.req("R-53")
async def test_what_a_client_writes_is_in_the_image_and_goes_on_under_the_next_version(
    site: Site,
) -> None:
    assert await site.exporter.serve((FIRST,)) == ()
    assert (await site.io(FIRST, "write -P 7 4096 4096", "flush"))[0] == 0
    assert await site.exporter.serve((SECOND,)) == ()
    assert (await site.io(SECOND, "read -P 7 4096 4096"))[0] == 0
    status, said = await site.io(FIRST, "read 0 512")
    assert status != 0, "the former version is over"
    assert "not present" in said
    assert site.images.path(DISK).read_bytes()[4096:8192] == b"\7" * 4096


@pytest.mark.req("R-14")
async def test_a_former_client_is_cut_off_before_the_next_is_let_in(site: Site) -> None:
    """One that is connected already, and writes: nothing of it comes once the next may write."""
    await site.exporter.serve((FIRST,))
    writer = asyncio.create_task(
        site.io(FIRST, *(f"write -P {number % 250 + 1} 0 512" for number in range(3000)))
    )
    image = site.images.path(DISK)
    await until(lambda: image.read_bytes()[:1] != b"\0")
    assert await site.exporter.serve((SECOND,)) == ()
    before = image.read_bytes()[:512]
    _, said = await writer
    assert "failed" in said
    assert image.read_bytes()[:512] == before


def locked(path: Path) -> bool:
    """Whether somebody may write the image, as every QEMU sees it that would write it alone.

    Byte 101 of the file is locked then (QEMU: block/file-posix.c, docs/system/images.rst).
    """
    with path.open("r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 101)
        except OSError:
            return True
    return False


@pytest.mark.req("R-14")
async def test_an_image_is_locked_as_long_as_it_is_offered_and_no_longer(site: Site) -> None:
    path = site.images.path(DISK)
    await site.exporter.serve((FIRST,))
    assert locked(path)
    await site.exporter.serve((SECOND,))
    assert locked(path)
    assert await site.exporter.serve(()) == ()
    assert not locked(path)


@pytest.mark.req("R-53")
async def test_an_exporter_that_is_killed_is_started_again_and_offers_the_same(site: Site) -> None:
    await site.exporter.serve((FIRST,))
    await site.io(FIRST, "write -P 9 0 4096", "flush")
    killed = site.pid()
    os.kill(killed, signal.SIGKILL)
    await until(lambda: site.pid() != killed)
    assert await site.exporter.serve((FIRST,)) == ()
    assert (await site.io(FIRST, "read -P 9 0 4096"))[0] == 0


@pytest.mark.req("R-53")
async def test_it_lives_without_the_daemon_and_the_next_one_finds_it(site: Site) -> None:
    await site.exporter.serve((FIRST,))
    pid = site.pid()
    await site.exporter.close()
    assert (await site.io(FIRST, "write -P 5 0 512"))[0] == 0
    next_one = site.another()
    await next_one.find()
    assert await next_one.serve((FIRST,)) == ()
    assert site.pid() == pid
    assert await next_one.serve(()) == ()
    assert (await site.io(FIRST, "read 0 512"))[0] != 0
    await next_one.close()


@pytest.mark.req("R-55")
async def test_whether_an_exporter_is_reached_is_known_before(site: Site) -> None:
    assert "is not reached" in (await not_reached(site.uri) or "")
    await site.exporter.ready()
    assert await not_reached(site.uri) is None
    stranger = await asyncio.start_server(lambda _, told: told.close(), "127.0.0.1", 0)
    async with stranger:
        port = stranger.sockets[0].getsockname()[1]
        assert await not_reached(f"nbd://127.0.0.1:{port}") is not None


@pytest.mark.req("R-57")
async def test_nobody_without_a_certificate_of_the_domain_gets_an_image(site: Site) -> None:
    await site.exporter.serve((FIRST,))
    process = await asyncio.create_subprocess_exec(
        *("qemu-io", "-f", "raw", "-c", "read 0 512", f"{site.uri}/db/0/2"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert await process.wait() != 0


async def test_an_image_that_is_not_there_is_named(site: Site) -> None:
    gone = msgspec.structs.replace(FIRST, disk=Disk(path="gone.raw", kind="left"))
    [why] = await site.exporter.serve((gone,))
    assert "gone.raw" in why
    site.images.path(DISK).rename(site.images.path(gone.disk))
    assert await site.exporter.serve((gone,)) == (), "once it is there it is offered"


async def test_a_host_that_cannot_offer_images_says_why(site: Site) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", site.port))
        taken.listen()
        with pytest.raises(HypervisorFailure, match=r"in use|bind"):
            await site.exporter.ready()
