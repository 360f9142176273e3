"""The exporter of one host: offers the images that VMs have left behind here (NBD, with TLS).

It is a process of its own, QEMU's storage daemon, which outlives this daemon as the VMs do. It has
an image open, and locked, from the instant that it is offered until it is not. Everything is asked
of it anew each time, so a restarted daemon goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError

from overland.hypervisor.images import Images
from overland.hypervisor.process import alive, ours, until_gone
from overland.model.cluster import Export
from overland.model.names import export_name, image_node
from overland.ports import HypervisorFailure

PROGRAM = "qemu-storage-daemon"
START_LIMIT_S = 5.0
WITHDRAW_LIMIT_S = 5.0
RETRY_S = 0.2
GREETING_LIMIT_S = 3.0
_GREETING = b"NBDMAGIC"

log = logging.getLogger(__name__)


class Exporter:
    """`folder` is its own; `tls` as for QEMU. It listens at `address` and `port`."""

    def __init__(self, folder: Path, images: Images, tls: Path, address: str, port: int) -> None:
        self._folder = folder
        self._images = images
        self._tls = tls
        self._address = address
        self._port = port
        self._wanted: tuple[Export, ...] = ()
        self._pid = 0
        self._client = QMPClient("exporter")
        self._started = asyncio.Event()
        self._lock = asyncio.Lock()

    @property
    def _socket(self) -> Path:
        return self._folder / "qmp.sock"

    async def find(self) -> None:
        """After a restart: take over the one that runs, if there is one."""
        pid = ours(self._folder / "pid", str(self._socket))
        if pid is not None:
            with contextlib.suppress(HypervisorFailure):
                await self._connect(pid)

    async def ready(self) -> None:
        """Start it, unless it runs. HypervisorFailure: this host cannot offer images."""
        async with self._lock:
            await self._run()

    async def serve(self, exports: tuple[Export, ...]) -> tuple[str, ...]:
        """Offer these and nothing else, from now on; what could not be done, in words.

        What goes is withdrawn first, and whoever wrote it has done so.
        """
        async with self._lock:
            self._wanted = exports
            if not exports and not self._started.is_set():
                return ()
            try:
                await self._run()
                await self._withdraw_others()
            except HypervisorFailure as failure:
                return (str(failure),)
            return tuple([why for each in exports if (why := await self._offered(each))])

    async def keep(self) -> None:
        """Start it again whenever it ends, for as long as anything is to be offered."""
        while True:
            await self._started.wait()
            pid = self._pid
            await until_gone(pid)
            async with self._lock:
                if self._pid != pid:
                    continue  # somebody needed it, and has started it again
                await self.close()
                self._started.clear()
            log.warning("the exporter ended: %s", self._last_word())
            while self._wanted and (failures := await self.serve(self._wanted)):
                log.warning("%s", "; ".join(failures))
                await asyncio.sleep(RETRY_S)

    async def close(self) -> None:
        """Let go of it; it goes on."""
        with contextlib.suppress(QMPError, EOFError, OSError):
            await self._client.disconnect()

    # ------------------------------------------------------------ the process

    async def _run(self) -> None:
        if self._started.is_set():
            if alive(self._pid):
                return
            await self.close()
        listen = f"addr.type=inet,addr.host={self._address},addr.port={self._port}"
        command = [
            PROGRAM,
            *("--chardev", f"socket,id=qmp,path={self._socket},server=on,wait=off"),
            *("--monitor", "chardev=qmp"),
            *("--object", f"tls-creds-x509,id=tls,endpoint=server,dir={self._tls},verify-peer=on"),
            *("--nbd-server", f"{listen},tls-creds=tls"),
        ]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._socket.unlink(missing_ok=True)
            with (self._folder / "log").open("wb") as log_file:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=log_file,
                    start_new_session=True,
                )
        except FileNotFoundError:
            raise HypervisorFailure(f"{PROGRAM} is not installed") from None
        except OSError as error:
            raise HypervisorFailure(f"{self._folder}: {error.strerror}") from None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpriority(os.PRIO_PROCESS, process.pid, 0)
        (self._folder / "pid").write_text(f"{process.pid}\n")
        await self._connect(process.pid)

    async def _connect(self, pid: int) -> None:
        client = QMPClient("exporter")
        deadline_s = time.monotonic() + START_LIMIT_S
        while True:
            monitor = socket.socket(socket.AF_UNIX)
            try:
                monitor.connect(str(self._socket))
                monitor.setblocking(False)
                await client.connect(monitor)
                break
            except (ConnectError, OSError):
                monitor.close()
                if not alive(pid) or time.monotonic() > deadline_s:
                    raise HypervisorFailure(f"no exporter: {self._last_word()}") from None
                await asyncio.sleep(0.005)
        self._client, self._pid = client, pid
        self._started.set()

    def _last_word(self) -> str:
        path = self._folder / "log"
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        return lines[-1] if lines else "it said nothing"

    async def _do(self, command: str, /, **arguments: Any) -> Any:
        try:
            return await self._client.execute(command, arguments or None)
        except ExecuteError as error:
            raise HypervisorFailure(f"exporter: {command}: {error}") from None
        except (QMPError, EOFError, OSError) as error:
            raise HypervisorFailure(f"the exporter ended: {error}") from None

    # ------------------------------------------------------------ what it offers

    async def _offers(self) -> set[str]:
        return {each["id"] for each in await self._do("query-block-exports")}

    async def _nodes(self) -> set[str]:
        nodes = await self._do("query-named-block-nodes", flat=True)
        return {each["node-name"] for each in nodes}

    async def _withdraw_others(self) -> None:
        gone = await self._offers() - {_id(each) for each in self._wanted}
        for each in gone:
            with contextlib.suppress(HypervisorFailure):  # it is being withdrawn already
                await self._do("block-export-del", id=each, mode="hard")
        deadline_s = time.monotonic() + WITHDRAW_LIMIT_S
        while gone & await self._offers():
            if time.monotonic() > deadline_s:
                raise HypervisorFailure("an image is still written by a VM's former host")
            await asyncio.sleep(0.001)
        ours_now = {image_node(each.vm, each.index) for each in self._wanted}
        for name in {each for each in await self._nodes() if each.startswith("ovd")} - ours_now:
            await self._do("blockdev-del", **{"node-name": name})

    async def _offered(self, export: Export) -> str:
        """Offer one, unless it is offered; why not, or nothing."""
        node = image_node(export.vm, export.index)
        try:
            if _id(export) in await self._offers():
                return ""
            if node not in await self._nodes():
                file = self._images.file_node(export.disk)
                whole = {"driver": export.disk.format, "node-name": node, "file": file}
                await self._do("blockdev-add", **whole)
            await self._do(
                "block-export-add",
                type="nbd",
                id=_id(export),
                name=export_name(export.vm, export.index, export.version),
                writable=True,
                **{"node-name": node},
            )
        except HypervisorFailure as failure:
            return f"disk {export.disk.path} of vm {export.vm} is not offered: {failure}"
        return ""


def _id(export: Export) -> str:
    return f"v{export.version}-{export.index}-{export.vm}"


async def not_reached(uri: str) -> str | None:
    """Why no exporter is reached at `uri`; None when one is."""
    at = urlsplit(uri)
    try:
        async with asyncio.timeout(GREETING_LIMIT_S):
            reader, writer = await asyncio.open_connection(at.hostname, at.port)
            try:
                greeting = await reader.read(len(_GREETING))
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        why = (
            os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "no answer"
        )
        return f"{at.netloc} is not reached: {why}"
    return None if greeting == _GREETING else f"nobody offers images at {at.netloc}"
