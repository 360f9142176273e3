"""A disk that another host has comes to its VM, which runs: the conversation with QEMU.

QEMU copies it from there into an image beside it, and each write of the guest goes to both. When
the VM stands the job is ended, with both the same; then the image takes the place of what was
reached over the network, below the same node. Everything is asked of QEMU anew each time.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

from overland.hypervisor.command import disk_node
from overland.hypervisor.mirror import Qmp
from overland.model.cluster import Disk, Vm
from overland.model.handover import Storage
from overland.ports import HypervisorFailure

END_LIMIT_S = 5.0


def which(vm: Vm) -> tuple[int, Disk]:
    """The disk of `vm`, of a move's record, that moves alone; there is one."""
    [found] = [each for each in enumerate(vm.disks) if each[1].kind == "moved"]
    return found


async def begin(do: Qmp, index: int, disk: Disk, file: dict[str, Any], bytes_per_s: int) -> None:
    """Begin to copy; content with being at it."""
    if await _job(do, index):
        return
    if _home(index) not in await _nodes(do):
        node = {"driver": disk.format, "node-name": _home(index), "file": file}
        await do("blockdev-add", **node, discard="unmap", **{"detect-zeroes": "unmap"})
    await do(
        "blockdev-mirror",
        device=disk_node(index),
        target=_home(index),
        sync="full",
        speed=bytes_per_s,
        **{
            "job-id": _home(index),
            "copy-mode": "write-blocking",
            "on-target-error": "report",
            "on-source-error": "report",
            "auto-dismiss": False,
        },
    )


async def look(do: Qmp, index: int) -> Storage:
    """How far it is. HypervisorFailure when it cannot go on."""
    job = await _job(do, index)
    if job is None:
        raise HypervisorFailure("nothing copies the disk any more")
    if job["status"] in ("aborting", "concluded"):
        raise HypervisorFailure(job.get("error") or "the disk was not copied")
    total, sent = job["total-progress"], job["current-progress"]
    return Storage(total_bytes=total, sent_bytes=sent, ready=job["status"] == "ready")


async def end(do: Qmp, index: int) -> None:
    """With the VM stopped: both images are the same, and flushed; content with their being so."""
    deadline_s = time.monotonic() + END_LIMIT_S
    while (job := await _job(do, index)) is not None:
        if job["status"] == "ready":
            await do("block-job-cancel", device=_home(index))  # of one that is ready: it is whole
        elif job["status"] == "concluded":
            await _dismiss(do, job)
        elif time.monotonic() > deadline_s:
            raise HypervisorFailure(f"the disk is {job['status']}, not ready")
        await asyncio.sleep(0.001)


async def _dismiss(do: Qmp, job: dict[str, Any]) -> None:
    await do("job-dismiss", id=job["id"])
    if job.get("error"):
        raise HypervisorFailure(job["error"])


async def switch(do: Qmp, index: int) -> None:
    """The new image in place of what was reached over the network; content with its being so."""
    whole = {"driver": "raw", "node-name": disk_node(index), "file": _home(index)}
    await do("blockdev-reopen", options=[whole])
    with suppress(HypervisorFailure):  # nobody needs it, and nobody is harmed by it
        await do("blockdev-del", **{"node-name": f"away{index}"})


async def give_up(do: Qmp, index: int) -> None:
    """Copy no more, and let the new image go; content with absence."""
    deadline_s = time.monotonic() + END_LIMIT_S
    while (job := await _job(do, index)) is not None:
        with suppress(HypervisorFailure):
            if job["status"] == "concluded":
                await do("job-dismiss", id=job["id"])
            else:
                await do("block-job-cancel", device=_home(index), force=True)
        if time.monotonic() > deadline_s:
            raise HypervisorFailure(f"the copying of the disk does not end: {job['status']}")
        await asyncio.sleep(0.001)
    if _home(index) in await _nodes(do):
        await do("blockdev-del", **{"node-name": _home(index)})


async def _job(do: Qmp, index: int) -> dict[str, Any] | None:
    found = [job for job in await do("query-jobs") if job["id"] == _home(index)]
    return dict(found[0]) if found else None


async def _nodes(do: Qmp) -> set[str]:
    nodes = await do("query-named-block-nodes", flat=True)
    return {each["node-name"] for each in nodes}


def _home(index: int) -> str:
    """Name of the node of the new image, and of the job that fills it."""
    return f"home{index}"
