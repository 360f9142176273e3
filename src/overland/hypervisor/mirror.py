"""Disks that go along while their VM runs: the conversation with both QEMUs, over QMP.

The new copy offers its empty images over NBD with mutual TLS. The old QEMU copies each disk there,
and each write of the guest goes to both (`write-blocking`) before it is acknowledged, so nothing is
left to converge. Once the VM stands the jobs are ended: that flushes, and lets the images go.
Everything is asked of QEMU anew each time, so a restarted daemon goes on from there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from overland.model.handover import Storage
from overland.ports import HypervisorFailure

STALL_LIMIT_S = 3.0
"""How long nothing of what waits to be written may arrive. The guest's own writes wait as well."""

END_LIMIT_S = 3.0


class Qmp(Protocol):
    """Executes one command of one QEMU; HypervisorFailure when it is refused."""

    def __call__(self, command: str, /, **arguments: Any) -> Awaitable[Any]: ...


def credentials(folder: Path, ca: Path, certificate: Path, key: Path) -> Path:
    """Lay our certificate out as QEMU wants it (docs: system/tls.rst), by links; `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in (
        ("ca-cert.pem", ca),
        ("server-cert.pem", certificate),
        ("server-key.pem", key),
        ("client-cert.pem", certificate),
        ("client-key.pem", key),
    ):
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(target.absolute())
    return folder


async def offer(do: Qmp, nodes: list[str], address: str, port: int, tls: Path) -> str:
    """Let the old QEMU write `nodes`; the URI at which it finds them."""
    creds = await tls_credentials(do, "server", tls)
    inet = {"type": "inet", "data": {"host": address, "port": str(port)}}
    await do("nbd-server-start", addr=inet, **{"tls-creds": creds})
    for node in nodes:
        export = {"type": "nbd", "id": node, "node-name": node, "name": node, "writable": True}
        await do("block-export-add", **export)
    host = f"[{address}]" if ":" in address else address
    return f"nbd://{host}:{port}"


async def withdraw(do: Qmp) -> None:
    """Nobody but this QEMU writes its images any more; content when nobody could."""
    with suppress(HypervisorFailure):  # it was stopped before
        await do("nbd-server-stop")  # closes each export, and returns when all are closed
    if await do("query-block-exports"):
        raise HypervisorFailure("the old host still has a disk open")


async def begin(do: Qmp, nodes: list[str], uri: str, bytes_per_s: int, tls: Path) -> None:
    """Begin to copy `nodes` to where `uri` says; 0 is no limit."""
    creds = await tls_credentials(do, "client", tls)
    at = urlsplit(uri)
    for node in nodes:
        await do(
            "blockdev-add",
            driver="nbd",
            server={"type": "inet", "host": at.hostname, "port": str(at.port)},
            export=node,
            discard="unmap",
            **{"node-name": _target(node), "tls-creds": creds, "detect-zeroes": "unmap"},
        )
        await do(
            "blockdev-mirror",
            device=node,
            target=_target(node),
            sync="full",
            speed=bytes_per_s,
            **{
                "job-id": _job(node),
                "copy-mode": "write-blocking",
                "on-target-error": "report",
                "on-source-error": "report",
                "auto-dismiss": False,
            },
        )


class Progress:
    """How far the mirrors of one VM are, and whether they still get on."""

    def __init__(self) -> None:
        self._first_bytes = 0
        self._seen = (-1, 0.0)

    async def look(self, do: Qmp) -> Storage:
        """HypervisorFailure when a disk cannot be copied, or nothing has arrived for too long."""
        jobs = await _jobs(do)
        for job in jobs:
            _stop_if_failed(job)
        total = sum(job["total-progress"] for job in jobs)
        sent = sum(job["current-progress"] for job in jobs)
        self._first_bytes = self._first_bytes or total
        self._stop_if_stalled(sent, total)
        return Storage(
            total_bytes=total,
            sent_bytes=sent,
            resent_bytes=max(0, sent - self._first_bytes),
            ready=bool(jobs) and all(job["status"] == "ready" for job in jobs),
        )

    def _stop_if_stalled(self, sent: int, total: int) -> None:
        before, since_s = self._seen
        now_s = time.monotonic()
        if sent != before or sent >= total:
            self._seen = (sent, now_s)
        elif now_s - since_s > STALL_LIMIT_S:
            raise HypervisorFailure(f"nothing was taken for {STALL_LIMIT_S:g} s")


async def end(do: Qmp) -> None:
    """With the VM stopped: bring the copies up to it, and flush them.

    What is left of the jobs goes with this QEMU, or in `give_up`: it would take time here, in which
    the VM is deaf.
    """
    names = [job["id"] for job in await _until(do, None, "ready")]
    for name in names:
        await do("block-job-cancel", device=name)  # of a job that is ready: no more, but whole
    for job in await _until(do, names, "concluded"):
        _stop_if_failed(job)


async def cut(oob: Qmp) -> None:
    """Cut the mirrors off, out of band; content with absence.

    While a write waits for a peer that does not answer, a QEMU that is about to stop its VM hears
    nothing else.
    """
    for instance in await oob("query-yank"):
        if instance["type"] == "block-node" and instance["node-name"].startswith(_target("")):
            with suppress(HypervisorFailure):
                await oob("yank", instances=[instance])


async def give_up(do: Qmp) -> None:
    """End mirrors that were cut off, whatever state they are in; content with absence."""
    names = [job["id"] for job in await _jobs(do)]
    for name in names:
        with suppress(HypervisorFailure):
            await do("block-job-cancel", device=name, force=True)
    await _until(do, names, "concluded")
    await _clear(do)


async def _clear(do: Qmp) -> None:
    for job in await _jobs(do):
        with suppress(HypervisorFailure):
            await do("job-dismiss", id=job["id"])
    for node in await do("query-named-block-nodes", flat=True):
        if node["node-name"].startswith(_target("")):
            await do("blockdev-del", **{"node-name": node["node-name"]})
    with suppress(HypervisorFailure):
        await do("object-del", id=tls_id("client"))


async def _until(do: Qmp, names: list[str] | None, status: str) -> list[dict[str, Any]]:
    """The jobs `names`, or all, once all of them are `status`, or have ended."""
    deadline_s = time.monotonic() + END_LIMIT_S
    while True:
        jobs = [job for job in await _jobs(do) if names is None or job["id"] in names]
        if all(job["status"] in (status, "concluded") for job in jobs):
            return jobs
        if time.monotonic() > deadline_s:
            raise HypervisorFailure(f"the disks are not {status} within {END_LIMIT_S:g} s")
        await asyncio.sleep(0.001)


def _stop_if_failed(job: dict[str, Any]) -> None:
    if job.get("error") and job["status"] in ("aborting", "concluded"):
        raise HypervisorFailure(f"{job['id'].removeprefix('mirror-')}: {job['error']}")


async def _jobs(do: Qmp) -> list[dict[str, Any]]:
    return [job for job in await do("query-jobs") if job["id"].startswith("mirror-")]


async def tls_credentials(do: Qmp, endpoint: str, folder: Path) -> str:
    """The name of our credentials in this QEMU; a former connection may still hold on to them."""
    name = tls_id(endpoint)
    if name not in {each["name"] for each in await do("qom-list", path="/objects")}:
        await do(
            "object-add",
            id=name,
            endpoint=endpoint,
            dir=str(folder),
            **{"qom-type": "tls-creds-x509", "verify-peer": True},
        )
    return name


def tls_id(endpoint: str) -> str:
    """Its name, also of one that was made on the command line."""
    return f"disks-{endpoint}"


def _target(node: str) -> str:
    return f"target-{node}"


def _job(node: str) -> str:
    return f"mirror-{node}"
