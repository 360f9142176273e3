"""What the hypervisor adapter does with saved states, with a QEMU that is spoken for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from qemu.qmp import QMPClient

from overland.hypervisor import qemu as qemu_adapter
from overland.hypervisor.images import Images
from overland.hypervisor.qemu import QemuHypervisor, TapSource, _Machine
from overland.ports import HypervisorFailure
from tests.core.moves import VM
from tests.core.test_faults import until

PAUSED = msgspec.structs.replace(VM, state="paused")


class FakeQemu:
    """The monitor of one process: it answers what it is asked, and remembers it."""

    def __init__(self, status: str) -> None:
        self.status = status
        self.asked: list[str] = []
        self.machine: _Machine

    async def execute(self, command: str, _arguments: Any = None, *, oob: bool = False) -> Any:
        if oob or command in ("query-jobs", "query-named-block-nodes"):
            return []  # it has no disks
        self.asked.append(command)
        if command == "stop":
            self.status, self.machine.stopped_ns = "paused", 20
        if command == "cont":
            self.status, self.machine.resumed_ns = "running", 30
        if command == "migrate":
            self.machine.migration = "failed"
        status = {"query-status": self.status, "query-migrate": self.machine.migration}
        return {"status": status[command]} if status.get(command) else {}

    async def loaded(self) -> None:
        async with self.machine.changed:
            self.machine.migration = "completed"
            self.machine.changed.notify_all()

    async def disconnect(self) -> None: ...


@pytest.fixture
def host(tmp_path: Path) -> QemuHypervisor:
    for folder in ("suspended", "taken", "web"):
        (tmp_path / folder).mkdir()
    images = Images(tmp_path / "disks", tmp_path / "images")
    return QemuHypervisor(tmp_path, cast("TapSource", None), images, tmp_path / "tls")


@pytest.fixture
async def process() -> AsyncIterator[int]:
    process = await asyncio.create_subprocess_exec("sleep", "60")
    yield process.pid
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


def runs(host: QemuHypervisor, pid: int, status: str, migration: str) -> FakeQemu:
    qemu = FakeQemu(status)
    machine = _Machine("web", pid, cast("QMPClient", qemu), cast("socket.socket", None))
    machine.migration = migration
    qemu.machine = machine
    host._machines["web"] = machine  # noqa: SLF001 - as if it had started it
    return qemu


async def test_a_state_that_is_nowhere_is_not_kept(host: QemuHypervisor, tmp_path: Path) -> None:
    """HO-43: the new host must not say that it has what it has not. What is kept stays kept."""
    with pytest.raises(HypervisorFailure, match="not here any more"):
        await host.keep_state("web", "m1")
    (tmp_path / "taken" / "m1").write_bytes(b"state")
    for _ in range(2):
        await host.keep_state("web", "m1")
        assert await host.saved_bytes("web") == 5


async def test_a_state_that_is_on_its_way_is_told_of(host: QemuHypervisor) -> None:
    """HO-43: the move may have ended without us, and its giver may go on."""
    await host.take_state("m1", "127.0.0.1")
    assert host.taken() == ["m1"]
    await host.drop_taken("m1")
    assert host.taken() == []


@pytest.mark.req("R-48")
@pytest.mark.parametrize("file", [".saving-web", "web"])
async def test_a_paused_vm_that_was_saved_wholly_wakes_from_its_state(
    host: QemuHypervisor, process: int, tmp_path: Path, monkeypatch: Any, file: str
) -> None:
    """Its process cannot go on without running: the file is the VM, so it must not go."""
    (tmp_path / "suspended" / file).write_bytes(b"state")
    woken: list[bytes] = []

    async def wake(_vm: Any, _ports: Any) -> int:
        assert await host.names() == []
        woken.append((tmp_path / "suspended" / "web").read_bytes())
        return 1

    monkeypatch.setattr(host, "wake", wake)
    qemu = runs(host, process, "postmigrate", "completed")
    await host.back_to(PAUSED, [])
    assert woken == [b"state"]
    assert "cont" not in qemu.asked


async def test_a_process_without_a_state_is_not_ended(host: QemuHypervisor, process: int) -> None:
    """What it holds in memory is all there is of the VM."""
    runs(host, process, "postmigrate", "completed")
    with pytest.raises(HypervisorFailure, match="not here"):
        await host.suspend("web")
    assert await host.names() == ["web"]


@pytest.mark.req("R-48")
@pytest.mark.parametrize("status", ["running", "paused"])
async def test_a_vm_that_cannot_be_saved_is_as_it_was(
    host: QemuHypervisor, process: int, status: str
) -> None:
    qemu = runs(host, process, status, "")
    with pytest.raises(HypervisorFailure, match="could not be saved"):
        await host.suspend("web")
    assert qemu.status == status


@pytest.mark.req("R-14")
@pytest.mark.parametrize("begun", [False, True])
async def test_a_process_that_a_killed_daemon_left_gets_its_state(
    host: QemuHypervisor, process: int, tmp_path: Path, *, begun: bool
) -> None:
    """It was killed before, or after, it could tell QEMU to load; twice is once too often."""
    (tmp_path / "suspended" / "web").write_bytes(b"state")
    qemu = runs(host, process, "inmigrate", "active" if begun else "")
    waking = asyncio.create_task(host.wake(VM, []))
    await until(lambda: ("query-migrate" if begun else "migrate-incoming") in qemu.asked)
    await qemu.loaded()
    async with asyncio.timeout(5):
        await waking
    assert qemu.asked.count("migrate-incoming") == (not begun)
    assert qemu.status == "running"


async def test_a_state_that_does_not_wake_is_no_crash(
    host: QemuHypervisor, process: int, tmp_path: Path, monkeypatch: Any
) -> None:
    """Its VM is suspended, as before: the file is there for another try."""
    (tmp_path / "suspended" / "web").write_bytes(b"state")
    listening: list[asyncio.Task[None]] = []

    async def spawn(*_: Any, **__: Any) -> _Machine:
        machine = runs(host, process, "inmigrate", "").machine
        listening.append(asyncio.create_task(host._listen(machine)))  # noqa: SLF001 - as it does
        return machine

    monkeypatch.setattr(host, "_spawn", spawn)
    waking = asyncio.create_task(host.wake(VM, []))
    await until(lambda: bool(listening))
    os.kill(process, signal.SIGKILL)
    with pytest.raises(HypervisorFailure, match="ended"):
        await waking
    await listening[0]
    assert host._events.empty()  # noqa: SLF001 - no event is to come, ever
    assert await host.saved() == ["web"]


@pytest.mark.req("R-14")
@pytest.mark.parametrize(
    ("status", "left"),
    [("running", (["web"], [])), ("paused", ([], ["web"])), ("inmigrate", ([], ["web"]))],
)
async def test_of_a_process_and_a_state_beside_it_one_is_the_vm(
    host: QemuHypervisor,
    process: int,
    tmp_path: Path,
    monkeypatch: Any,
    status: str,
    left: tuple[list[str], list[str]],
) -> None:
    """HO-55: a daemon was killed while it woke or suspended the VM; the next one settles it."""
    (tmp_path / "suspended" / "web").write_bytes(b"state")
    (tmp_path / "web" / "pid").write_text(str(process))
    monkeypatch.setattr(qemu_adapter, "ours", lambda *_: process)

    async def connect(*_: Any) -> _Machine:
        return runs(host, process, status, "").machine

    monkeypatch.setattr(host, "_connect", connect)
    await host.find()
    assert (await host.names(), await host.saved()) == left
    assert await host.saved_bytes("web") == (0 if status == "running" else 5)
