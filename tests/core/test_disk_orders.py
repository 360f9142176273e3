"""An NVE carries out the orders of a disk that moves alone; files are real, QEMU is a value."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import msgspec
import pytest

from overland.hypervisor.images import Images
from overland.mobility import messages as m
from overland.model.cluster import Disk, Vm
from overland.model.handover import Storage
from overland.nve.alone import DiskSteps
from overland.ports import Hypervisor, HypervisorFailure
from tests.core.moves import VM

DISK = Disk(path="data.raw", kind="moved", size_bytes=1 << 20, at="h2", since=2)
MOVING = msgspec.structs.replace(VM, name="db", disks=(Disk(path="own"), DISK))


class Qemu:
    """Copies at once. `alive`: there is a process; `runs`: it runs the VM."""

    def __init__(self) -> None:
        self.alive = self.runs = True
        self.writes = {"h2"}

    def _needs(self) -> None:
        if not self.alive:
            raise HypervisorFailure("QEMU ended")

    async def names(self) -> list[str]:
        return ["db"] if self.alive else []

    async def copy_disk(self, vm: Vm, bytes_per_s: int) -> None:
        self._needs()
        self.writes = {"h1", "h2"}

    async def copied(self, vm: Vm) -> Storage:
        self._needs()
        return Storage(total_bytes=9, sent_bytes=9, ready=True)

    async def settle_disk(self, vm: Vm) -> int:
        self._needs()
        self.runs = False
        return 20

    async def keep_disk(self, vm: Vm) -> int:
        self.runs, self.writes = True, {"h1"}
        return 30

    async def leave_disk(self, vm: Vm) -> None:
        self.runs, self.writes = True, {"h2"}


class Nve:
    """This host's NVE, which may be restarted at any time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.qemu = folder, Qemu()

    @property
    def images(self) -> Images:
        return Images(self.folder / "disks", self.folder / "notes")

    async def does(self, *kinds: type[m.DiskTask]) -> list[str]:
        """Each order twice, by a daemon that has just been started; what was said."""
        said = []
        for kind in kinds:
            for _ in range(2):
                steps = DiskSteps("h1", cast("Hypervisor", self.qemu), self.images, lambda: 5)
                report = await steps.carry_out(kind(move="m1", vm=MOVING))  # type: ignore[arg-type]
                said.append(type(report).__name__)
        return said[1::2]


@pytest.fixture
def nve(tmp_path: Path) -> Nve:
    return Nve(tmp_path)


@pytest.mark.req("R-54")
async def test_a_disk_that_is_kept_is_the_vms_own(nve: Nve) -> None:
    assert await nve.does(m.CopyDisk, m.SettleDisk) == ["Received", "Stopped"]
    assert nve.images.taken() == ["m1"], "an NVE that comes back asks what became of it"
    assert not nve.qemu.runs
    assert await nve.does(m.KeepDisk) == ["Running"]
    assert (nve.qemu.runs, nve.qemu.writes) == (True, {"h1"})
    assert (nve.images.taken(), nve.images.path(DISK).exists()) == ([], True)
    await nve.images.drop_taken("m1", [DISK])
    assert nve.images.path(DISK).exists()


@pytest.mark.req("R-54")
@pytest.mark.parametrize("done", [(), (m.CopyDisk,), (m.CopyDisk, m.SettleDisk)])
async def test_a_disk_that_is_left_leaves_nothing_here(
    nve: Nve, done: tuple[type[m.DiskTask], ...]
) -> None:
    await nve.does(*done)
    assert await nve.does(m.LeaveDisk) == ["Restored"]
    assert (nve.qemu.runs, nve.qemu.writes) == (True, {"h2"})
    assert (nve.images.taken(), nve.images.path(DISK).exists()) == ([], False)


@pytest.mark.req("R-54")
async def test_of_a_vm_that_ended_the_image_is_kept_or_left_all_the_same(nve: Nve) -> None:
    await nve.does(m.CopyDisk)
    nve.qemu.alive = False
    assert await nve.does(m.SettleDisk, m.LeaveDisk) == ["Failed", "Restored"]
    assert not nve.images.path(DISK).exists()
    nve.qemu.alive = True
    await nve.does(m.CopyDisk, m.SettleDisk)
    nve.qemu.alive = False
    assert await nve.does(m.KeepDisk) == ["Crashed"]
    assert nve.images.path(DISK).exists()


@pytest.mark.req("R-14")
async def test_what_is_there_already_is_never_written_over(nve: Nve) -> None:
    path = nve.images.path(DISK)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"theirs")
    assert await nve.does(m.CopyDisk) == ["Failed"]
    assert await nve.does(m.LeaveDisk) == ["Restored"]
    assert path.read_bytes() == b"theirs"


@pytest.mark.req("R-54")
async def test_the_former_image_goes_where_it_was(nve: Nve) -> None:
    await nve.images.make("db", [DISK])
    assert await nve.does(m.DropImage) == ["Closed"]
    assert not nve.images.path(DISK).exists()
