"""Which disks a VM may have and take along (pure), and what is made and removed on a host."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import msgspec
import pytest

from overland.hypervisor.images import Images
from overland.hypervisor.sealed import Pieces
from overland.model.cluster import Boot, Disk, DiskKind, DiskState, Vm
from overland.model.handover import DiskChoice
from overland.nva import storage
from overland.nva.cluster import Cluster
from overland.ports import HypervisorFailure
from tests.core.moves import VM
from tests.core.test_faults import until

MIB = 1 << 20
THERE = DiskState(
    exists=True, inode=7, virtual_bytes=64 * MIB, allocated_bytes=8 * MIB, free_bytes=100 * MIB
)
NOTHING = DiskState(free_bytes=100 * MIB)


def with_disk(kind: DiskKind = "moved", **fields: str) -> Vm:
    disk = msgspec.convert({"path": "/data", "kind": kind, **fields}, Disk)
    return msgspec.structs.replace(VM, disks=(disk,))


def state(of: DiskState, **fields: object) -> DiskState:
    return msgspec.convert({**msgspec.to_builtins(of), **fields}, DiskState)


def codes(vm: Vm, here: DiskState, there: DiskState, cluster: Cluster | None = None) -> list[str]:
    found = storage.move_blockers(cluster or Cluster(), vm, "h2", (here,), (there,), {})
    return [each.code for each in found]


@pytest.mark.req("R-55")
@pytest.mark.parametrize(
    ("kind", "here", "there", "found"),
    [
        ("moved", THERE, NOTHING, []),
        ("moved", THERE, THERE, ["file_in_the_way"]),
        ("moved", THERE, state(NOTHING, free_bytes=7 * MIB), ["no_space"]),
        ("moved", THERE, state(NOTHING, trouble="it is read-only"), ["disk_unusable"]),
        ("moved", state(THERE, depends=True), NOTHING, ["disk_chain"]),
        ("moved", state(THERE, device=True), NOTHING, ["disk_unusable"]),
        ("moved", state(THERE, format="qcow2"), NOTHING, ["disk_format"]),
        ("shared", THERE, THERE, []),
        ("shared", THERE, NOTHING, ["file_missing"]),
        ("shared", THERE, state(THERE, inode=8), ["disk_differs"]),
        ("shared", THERE, state(THERE, trouble="it cannot be read and written"), ["disk_unusable"]),
        ("left", THERE, THERE, []),
        ("left", THERE, NOTHING, []),
        ("left", NOTHING, THERE, ["file_missing"]),
        ("left", state(THERE, depends=True), NOTHING, []),
    ],
)
def test_a_disk_follows_its_vm_or_says_why_not(
    kind: DiskKind, here: DiskState, there: DiskState, found: list[str]
) -> None:
    assert codes(with_disk(kind), here, there) == found


@pytest.mark.req("R-55")
def test_all_that_stands_in_the_way_is_said_at_once_with_its_remedy() -> None:
    vm = msgspec.structs.replace(VM, disks=(Disk(path="a", kind="moved"), Disk(path="b")))
    both = (THERE, THERE), (THERE, NOTHING)
    found = list(storage.move_blockers(Cluster(), vm, "h2", *both, {}))
    assert [each.code for each in found] == ["file_in_the_way", "file_missing"]
    assert all(each.hint for each in found)


@pytest.mark.req("R-14")
@pytest.mark.parametrize(
    ("kind", "where", "taken"),
    [("shared", "h3", True), ("moved", "h2", True), ("moved", "h3", False)],
)
def test_a_disk_that_another_vm_has_is_refused(kind: DiskKind, where: str, taken: bool) -> None:
    other = msgspec.structs.replace(with_disk(kind), name="other", host=where)
    cluster = Cluster(vms={"other": other})
    there = THERE if kind == "shared" else NOTHING
    assert ("disk_in_use" in codes(with_disk(kind), THERE, there, cluster)) == taken


@pytest.mark.parametrize(
    ("choice", "kind"), [("declared", "shared"), ("moved", "moved"), ("shared", "shared")]
)
def test_a_move_may_say_otherwise_than_declared(choice: DiskChoice, kind: DiskKind) -> None:
    disk = storage.chosen(with_disk("shared"), choice, (THERE,)).disks[0]
    assert (disk.kind, disk.size_bytes) == (kind, 64 * MIB)


def test_the_image_to_boot_from_is_the_first_disk() -> None:
    vm = msgspec.structs.replace(VM, boot=Boot(image="/boot.raw"), disks=(Disk(path="/data"),))
    with_boot = storage.with_boot_disk(vm)
    assert [disk.path for disk in with_boot.disks] == ["/boot.raw", "/data"]
    assert storage.with_boot_disk(with_boot) == with_boot


EMPTY = Disk(path="deep/data", kind="moved", size_bytes=MIB)


async def test_what_is_made_is_sparse_and_never_over_something(tmp_path: Path) -> None:
    images = Images(tmp_path / "disks", tmp_path / "notes")
    await images.make("web", [EMPTY])
    path = images.path(EMPTY)
    assert (path.stat().st_size, path.stat().st_blocks) == (MIB, 0)
    images.keep("web")
    path.write_bytes(b"mine")
    with pytest.raises(HypervisorFailure, match="is there already"):
        await images.make("web", [EMPTY])
    images.drop("web")
    assert path.read_bytes() == b"mine"
    assert [each.name for each in path.parent.iterdir()] == ["data"]


async def test_what_was_made_and_not_kept_is_dropped_also_by_another_life(tmp_path: Path) -> None:
    folders = (tmp_path / "disks", tmp_path / "notes")
    await Images(*folders).make("web", [EMPTY])
    Images(*folders).drop("other")
    assert Images(*folders).path(EMPTY).exists()
    Images(*folders).drop("web")
    assert not Images(*folders).path(EMPTY).exists()


async def test_another_file_of_that_name_is_not_ours_to_drop(tmp_path: Path) -> None:
    images = Images(tmp_path / "disks", tmp_path / "notes")
    await images.make("web", [EMPTY])
    images.path(EMPTY).rename(tmp_path / "ours")
    images.path(EMPTY).write_bytes(b"theirs")
    images.drop("web")
    assert images.path(EMPTY).read_bytes() == b"theirs"


@pytest.mark.req("R-56")
async def test_a_digest_does_not_tell_holes_from_zeros(tmp_path: Path) -> None:
    images = Images(tmp_path, tmp_path / "notes")
    piece = bytes(range(256)) * 16
    (tmp_path / "dense").write_bytes(bytes(MIB) + piece + bytes(MIB))
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2 * MIB + len(piece))
        file.seek(MIB)
        file.write(piece)
    dense, sparse = [await images.digest(Disk(path=name)) for name in ("dense", "sparse")]
    assert dense == sparse
    (tmp_path / "dense").write_bytes(bytes(MIB) + piece + bytes(MIB + 1))
    assert await images.digest(Disk(path="dense")) != sparse


@pytest.mark.req("R-34")
async def test_an_image_is_carried_cold_with_its_holes(tmp_path: Path) -> None:
    old = Images(tmp_path / "old", tmp_path / "old-notes")
    new = Images(tmp_path / "new", tmp_path / "new-notes")
    await old.make("web", [EMPTY])
    with old.path(EMPTY).open("r+b") as file:
        file.seek(MIB // 2)
        file.write(b"data")
    [uri] = await new.take("m1", [EMPTY], "127.0.0.1")
    assert await old.give(EMPTY, uri) == MIB
    assert new.taken() == ["m1"]
    assert new.path(EMPTY).read_bytes() == old.path(EMPTY).read_bytes()
    assert new.path(EMPTY).stat().st_blocks * 512 < MIB
    [uri] = await new.take("m2", [EMPTY], "127.0.0.1")
    with pytest.raises(HypervisorFailure, match="not"):
        await old.give(EMPTY, uri)  # there is something in its place
    await new.drop_taken("m2", [EMPTY])
    assert new.path(EMPTY).exists(), "it is not of that move"
    await new.drop_taken("m1", [EMPTY])
    assert list(new.path(EMPTY).parent.iterdir()) == []
    assert new.taken() == []


@pytest.mark.req("R-53")
async def test_an_image_is_taken_again_until_it_is_the_vms_own(tmp_path: Path) -> None:
    """The old NVE, or this one, was restarted meanwhile: what the move has brought is replaced."""
    old = Images(tmp_path / "old", tmp_path / "old-notes")
    new = Images(tmp_path / "new", tmp_path / "new-notes")
    await old.make("web", [EMPTY])
    for _ in range(2):
        [uri] = await new.take("m1", [EMPTY], "127.0.0.1")
        assert await old.give(EMPTY, uri) == MIB
    for _ in range(2):
        await new.keep_taken("m1", [EMPTY])
    await new.drop_taken("m1", [EMPTY])
    assert new.path(EMPTY).exists()
    assert new.taken() == []
    new.remove([EMPTY])
    with pytest.raises(HypervisorFailure, match="not here any more"):
        await new.keep_taken("m1", [EMPTY])


@pytest.mark.req("R-53")
async def test_an_image_on_its_way_is_not_cut_off_when_it_is_asked_for_again(
    tmp_path: Path,
) -> None:
    new = Images(tmp_path / "new", tmp_path / "new-notes")
    uris = [await new.take("m1", [EMPTY], "127.0.0.1") for _ in range(2)]
    assert uris[0] == uris[1]
    await new.drop_taken("m1", [EMPTY])
    assert await new.take("m2", [EMPTY], "127.0.0.1") != uris[0]
    await new.drop_taken("m2", [EMPTY])


@pytest.mark.req("R-53")
async def test_an_image_that_is_given_up_on_its_way_leaves_nothing(tmp_path: Path) -> None:
    new = Images(tmp_path / "new", tmp_path / "new-notes")
    [uri] = await new.take("m1", [EMPTY], "127.0.0.1")
    _, port, invitation = uri.removeprefix("state:").split("|")
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
    writer.write(Pieces.answering(invitation, MIB)[1] + b"a part of it")
    await writer.drain()
    folder = new.path(EMPTY).parent
    await until(lambda: any(folder.iterdir()))  # it is being written now
    assert new.taken() == ["m1"], "an NVE that comes back asks what became of it"
    await new.drop_taken("m1", [EMPTY])
    assert (list(folder.iterdir()), new.taken()) == ([], [])
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    writer.close()
