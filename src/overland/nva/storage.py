"""May a VM have these disks, and may they go where it goes? Pure: all blockers at once (R-55)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import msgspec

from overland.model.cluster import Disk, DiskState, Refused, Vm
from overland.model.handover import DiskChoice
from overland.nva.cluster import Cluster

MOST_DISKS = 8


def _no(code: str, what: str, why: str, hint: str = "") -> Refused:
    return Refused(code=code, what=what, why=why, hint=hint)


def with_boot_disk(vm: Vm) -> Vm:
    """`vm` with the image that it boots from among its disks."""
    image = vm.boot.image
    if image is None or image in {disk.path for disk in vm.disks}:
        return vm
    return msgspec.structs.replace(vm, disks=(Disk(path=image), *vm.disks))


def all_shared(vm: Vm, choice: DiskChoice) -> bool:
    """Tell whether a move treats each disk of `vm` as shared."""
    kinds = {disk.kind if choice == "declared" else choice for disk in vm.disks}
    return kinds <= {"shared"}


def chosen(vm: Vm, choice: DiskChoice, here: Sequence[DiskState]) -> Vm:
    """`vm` as it moves: the kind of each disk that counts this time, and its size as it is."""
    disks = tuple(
        msgspec.structs.replace(
            disk,
            kind=disk.kind if choice == "declared" else choice,
            size_bytes=state.virtual_bytes,
        )
        for disk, state in zip(vm.disks, here, strict=True)
    )
    return msgspec.structs.replace(vm, disks=disks)


def wish_blockers(cluster: Cluster, vm: Vm) -> Iterator[Refused]:
    """Why `vm` cannot have the disks that it declares."""
    what = f"vm {vm.name}"
    if len(vm.disks) > MOST_DISKS:
        yield _no("malformed", what, f"{len(vm.disks)} disks: at most {MOST_DISKS} are possible")
    paths = [disk.path for disk in vm.disks]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        yield _no("malformed", what, f"disk {path} is named twice")
    for disk in vm.disks:
        if not disk.path or ".." in PurePosixPath(disk.path).parts or "\n" in disk.path:
            yield _no("malformed", f"disk {disk.path!r}", "no path of an image")
        yield from _left(disk)
        yield from _taken(cluster, vm, disk, vm.host)


def _left(disk: Disk) -> Iterator[Refused]:
    if disk.kind == "left":
        why = "a disk that stays behind is not built yet"
        yield _no("unsupported_disk", f"disk {disk.path}", why, "take it along: --with-storage")


def _taken(cluster: Cluster, vm: Vm, disk: Disk, host: str) -> Iterator[Refused]:
    """Other VMs that have the image: of one path on all hosts, or of one on the same host."""
    for other in cluster.vms.values():
        for theirs in other.disks if other.name != vm.name else ():
            everywhere = "moved" not in (disk.kind, theirs.kind)
            if theirs.path == disk.path and (everywhere or other.host == host):
                hint = f"delete {other.name} first, or use another image"
                yield _no("disk_in_use", f"disk {disk.path}", f"vm {other.name} has it", hint)


def start_blockers(vm: Vm, states: Sequence[DiskState]) -> Iterator[Refused]:
    """Why `vm` cannot start on its host, where its disks are as `states` says."""
    for disk, state in zip(vm.disks, states, strict=True):
        what = f"disk {disk.path}"
        if state.trouble:
            yield _no("disk_unusable", what, f"on host {vm.host}: {state.trouble}")
        elif state.exists:
            yield from _format(disk, state, vm.host)
            yield from _whole(disk, state)
        elif not disk.size_bytes:
            hint = "make it, or say how big an empty one is: --disk PATH,size=1GiB"
            yield _no("file_missing", what, f"there is no such file on host {vm.host}", hint)


def _format(disk: Disk, state: DiskState, host: str) -> Iterator[Refused]:
    if state.format != disk.format:
        why = f"on host {host} it is {state.format}, declared is {disk.format}"
        hint = f"declare it: format={state.format}"
        yield _no("disk_format", f"disk {disk.path}", why, hint)


def _whole(disk: Disk, state: DiskState) -> Iterator[Refused]:
    """An image that goes along must be a file of its own."""
    if disk.kind != "moved":
        return
    if state.depends:
        why = "it has a backing file or snapshots inside, which would not go along"
        yield _no("disk_chain", f"disk {disk.path}", why, "flatten it: `qemu-img convert`")
    if state.device:
        why = "it is a block device, which cannot go along"
        yield _no("disk_unusable", f"disk {disk.path}", why, "share it: --shared-storage")


def move_blockers(
    cluster: Cluster, vm: Vm, to: str, here: Sequence[DiskState], there: Sequence[DiskState]
) -> Iterator[Refused]:
    """Why the disks of `vm`, of the kinds `chosen`, cannot follow it to host `to`.

    `here` is what its host says of each, `there` what the new one says.
    """
    need_bytes = 0
    for disk, old, new in zip(vm.disks, here, there, strict=True):
        yield from _left(disk)
        yield from _taken(cluster, vm, disk, to)
        yield from start_blockers(msgspec.structs.replace(vm, disks=(disk,)), (old,))
        if disk.kind == "shared":
            yield from _same(disk, old, new, to)
        elif disk.kind == "moved":
            need_bytes += old.allocated_bytes
            yield from _room(disk, new, to, need_bytes)


def _same(disk: Disk, old: DiskState, new: DiskState, to: str) -> Iterator[Refused]:
    what, hint = f"disk {disk.path}", "take it along: --with-storage"
    if not new.exists:
        yield _no("file_missing", what, f"there is no such file on host {to}", hint)
    elif new.trouble:
        yield _no("disk_unusable", what, f"on host {to}: {new.trouble}", hint)
    elif old.exists and not old.device and (old.inode, old.device) != (new.inode, new.device):
        # The number of a file is the same wherever its file system is mounted.
        why = f"it is another file on host {to} than on the VM's host"
        yield _no("disk_differs", what, why, hint)


def _room(disk: Disk, new: DiskState, to: str, need_bytes: int) -> Iterator[Refused]:
    what = f"disk {disk.path}"
    if new.exists:
        hint = "move it away, or use the disk as shared: --shared-storage"
        yield _no("file_in_the_way", what, f"a file of that name is on host {to}", hint)
    elif new.trouble:
        yield _no("disk_unusable", what, f"on host {to}: {new.trouble}")
    elif need_bytes > new.free_bytes:
        need, free = need_bytes / 2**20, new.free_bytes / 2**20
        why = f"{need:.0f} MiB are needed on host {to}, {free:.0f} MiB are free"
        yield _no("no_space", what, why, "make room there, or choose another host")
