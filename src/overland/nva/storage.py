"""May a VM have these disks, and may they go where it goes? Pure: all blockers at once (R-55).

And who offers which image to whom: a function of the records, as they are after each commit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import msgspec

from overland.model.cluster import Disk, DiskKind, DiskState, Export, Host, Refused, Vm
from overland.model.handover import DiskChoice, Handover
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
    return {_kind(disk, choice) for disk in vm.disks} <= {"shared"}


def _kind(disk: Disk, choice: DiskChoice) -> DiskKind:
    """What counts this time: an image that was left behind stays there unless one says otherwise"""
    if choice == "declared":
        return "left" if disk.at else disk.kind
    return choice


def place(vm: Vm, disk: Disk) -> str:
    """The host with the image of one of the VM's disks (of a shared one: one of those)."""
    return disk.at or vm.host


def chosen(vm: Vm, choice: DiskChoice, here: Sequence[DiskState]) -> Vm:
    """`vm` as it moves: the kind of each disk that counts this time, and its size as it is.

    Of those that stay it says where.
    """

    def counted(disk: Disk, state: DiskState) -> Disk:
        kind = _kind(disk, choice)
        at = place(vm, disk) if kind == "left" else disk.at
        size = state.virtual_bytes
        return msgspec.structs.replace(disk, kind=kind, at=at, size_bytes=size)

    disks = tuple(counted(disk, state) for disk, state in zip(vm.disks, here, strict=True))
    return msgspec.structs.replace(vm, disks=disks)


def after_move(vm: Vm, record: Handover) -> tuple[Disk, ...]:
    """The disks of `vm` once the move `record` is committed: as declared, and where they are."""

    def moved(disk: Disk, this_time: Disk) -> Disk:
        at = this_time.at if this_time.kind == "left" else ""
        return msgspec.structs.replace(disk, at=at)

    disks = tuple(moved(*pair) for pair in zip(vm.disks, record.vm.disks, strict=True))
    return settled(disks, record.new_nve, record.version)


def settled(disks: tuple[Disk, ...], host: str, version: int) -> tuple[Disk, ...]:
    """The disks of a VM that is on `host` since `version`: what lies there is its own again."""

    def there(disk: Disk) -> Disk:
        at = "" if disk.at == host else disk.at
        return msgspec.structs.replace(disk, at=at, since=version if at else 0)

    return tuple(there(disk) for disk in disks)


def alone(vm: Vm, path: str, states: Sequence[DiskState]) -> Vm:
    """`vm` as in the record of a move of disk `path` alone: that one is the only one that moves."""

    def counted(disk: Disk, state: DiskState) -> Disk:
        kind: DiskKind = "moved" if disk.path == path else "shared"
        return msgspec.structs.replace(disk, kind=kind, size_bytes=state.virtual_bytes)

    disks = tuple(counted(*pair) for pair in zip(vm.disks, states, strict=True))
    return msgspec.structs.replace(vm, disks=disks)


def brought(vm: Vm, record: Handover) -> tuple[Disk, ...]:
    """The disks of `vm` once the move `record` of one of them alone is committed."""

    def moved(disk: Disk, this_time: Disk) -> Disk:
        if this_time.kind != "moved":
            return disk
        return msgspec.structs.replace(disk, at="", since=0)

    return tuple(moved(*pair) for pair in zip(vm.disks, record.vm.disks, strict=True))


def alone_blockers(cluster: Cluster, name: str, path: str, to: str) -> Iterator[Refused]:
    """Why disk `path` of VM `name` cannot be brought to host `to` while the VM stays (R-54)."""
    vm = cluster.vms.get(name)
    if vm is None:
        hint = "`overland vm list` shows all"
        yield _no("unknown_vm", f"vm {name}", "there is no such vm", hint)
        return
    what, disk = f"disk {path}", {each.path: each for each in vm.disks}.get(path)
    if vm.move is not None:
        hint = f"wait for it, or `overland migration abort {vm.move}`"
        yield _no("move_in_progress", f"vm {name}", f"migration {vm.move} moves it", hint)
    elif vm.state not in ("running", "paused"):
        why = f"it is {vm.state}; a disk moves alone while its VM is up"
        yield _no("not_running", f"vm {name}", why, f"`overland vm start {name}`")
    if disk is None:
        hint = f"`overland vm show {name}` shows all"
        yield _no("unknown_disk", what, f"vm {name} has no such disk", hint)
    elif not disk.at:
        why = f"its image is with the VM already, on host {vm.host}"
        yield _no("disk_not_left", what, why, "only a disk that was left behind moves alone")
    if to != vm.host:
        why = f"a disk moves alone to the host of its VM only, which is {vm.host}"
        yield _no("unsupported_target", what, why, f"--to {vm.host}")


def room_blockers(
    moving: Vm, here: Sequence[DiskState], there: Sequence[DiskState]
) -> list[Refused]:
    """Why the disk that moves alone in `moving` has no place on the VM's host."""
    found: list[Refused] = []
    for disk, old, new in zip(moving.disks, here, there, strict=True):
        if disk.kind == "moved":
            found += _room(disk, new, moving.host, old.allocated_bytes)
    return found


def exports(cluster: Cluster, host: str) -> tuple[Export, ...]:
    """The images that `host` offers: one VM of one host may write each, and nobody else (R-14)."""
    by_record = (
        Export(vm=vm.name, index=index, disk=disk, to=vm.host, version=disk.since)
        for vm in sorted(cluster.vms.values(), key=lambda vm: vm.name)
        for index, disk in enumerate(vm.disks)
        if disk.at == host
    )
    return (*by_record, *offered_still(cluster, host))


def offered_still(cluster: Cluster, host: str) -> Iterator[Export]:
    """Images of disks that have moved away alone, until their VMs run with the new ones (R-54)."""
    for move in cluster.moves.values():
        if move.mode == "storage" and move.phase == "committed" and move.old_nve == host:
            for index, disk in enumerate(move.vm.disks):
                if disk.kind == "moved":
                    name, to = move.vm.name, move.new_nve
                    yield Export(vm=name, index=index, disk=disk, to=to, version=disk.since)


def with_ways(cluster: Cluster, vm: Vm, to: str) -> Vm:
    """`vm` with where host `to` reaches each image that another host has."""

    def way(disk: Disk) -> Disk:
        if not disk.at:
            return disk
        return msgspec.structs.replace(disk, uri=uri(cluster.hosts[disk.at], cluster.hosts[to]))

    return msgspec.structs.replace(vm, disks=tuple(way(disk) for disk in vm.disks))


def uri(exporter: Host, client: Host) -> str:
    """Where `exporter` offers its images to `client`: in a family that both have, if there is."""
    both4 = exporter.underlay_ipv4 and (client.underlay_ipv4 or not exporter.underlay_ipv6)
    address = exporter.underlay_ipv4 if both4 else f"[{exporter.underlay_ipv6}]"
    return f"nbd://{address}:{exporter.storage_port}"


def shown(vm: Vm) -> dict[str, Any]:
    """`vm` as people see it: where the image of each disk is, nothing of how it is reached."""
    built: dict[str, Any] = msgspec.to_builtins(vm)
    for disk, each in zip(vm.disks, built["disks"], strict=True):
        everywhere = disk.kind == "shared" and not disk.at
        each["at"] = None if everywhere else place(vm, disk)
        del each["since"], each["uri"]
    return built


def drain_blockers(cluster: Cluster, host: str) -> Iterator[Refused]:
    """Why `host` cannot be emptied: images on it that VMs elsewhere use, or would."""
    for each in exports(cluster, host):
        why = f"it has the image of disk {each.disk.path} of vm {each.vm}, which is on {each.to}"
        hint = f"`overland vm disk move {each.vm} {each.disk.path} --to {each.to}`"
        yield _no("exports_disk", f"host {host}", why, hint)
    for vm in cluster.vms.values():
        for disk in vm.disks:
            if vm.host == host and disk.kind == "left" and not disk.at:
                why = f"its disk {disk.path} would stay on host {host}"
                hint = f"`overland vm migrate {vm.name} --with-storage --to` another host"
                yield _no("leaves_disk", f"vm {vm.name}", why, hint)


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
        yield from _taken(cluster, vm, disk, vm.host)


def _taken(cluster: Cluster, vm: Vm, disk: Disk, host: str) -> Iterator[Refused]:
    """Other VMs that have the image: of one path on all hosts, or of one on the same host."""
    for other in cluster.vms.values():
        for theirs in other.disks if other.name != vm.name else ():
            kinds = {disk.kind, theirs.kind}
            everywhere = "shared" in kinds and "moved" not in kinds
            if theirs.path == disk.path and (everywhere or place(other, theirs) == host):
                hint = f"delete {other.name} first, or use another image"
                yield _no("disk_in_use", f"disk {disk.path}", f"vm {other.name} has it", hint)


def start_blockers(vm: Vm, states: Sequence[DiskState]) -> Iterator[Refused]:
    """Why `vm` cannot start on its host; its disks are as `states` says, each at its place."""
    for disk, state in zip(vm.disks, states, strict=True):
        what, host = f"disk {disk.path}", place(vm, disk)
        if state.trouble:
            yield _no("disk_unusable", what, f"on host {host}: {state.trouble}")
        elif state.exists:
            yield from _format(disk, state, host)
            yield from _whole(disk, state)
        elif not disk.size_bytes:
            hint = "make it, or say how big an empty one is: --disk PATH,size=1GiB"
            yield _no("file_missing", what, f"there is no such file on host {host}", hint)


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
    cluster: Cluster,
    vm: Vm,
    to: str,
    here: Sequence[DiskState],
    there: Sequence[DiskState],
    ways: Mapping[str, str],
) -> Iterator[Refused]:
    """Why the disks of `vm`, of the kinds `chosen`, cannot follow it to host `to`.

    `here` is what the host with the image says of each, `there` what the new one says. `ways`: why
    an image could not be reached from there, by the host that has it; empty when it could.
    """
    need_bytes = 0
    for disk, old, new in zip(vm.disks, here, there, strict=True):
        yield from start_blockers(msgspec.structs.replace(vm, disks=(disk,)), (old,))
        if disk.kind == "left":
            yield from _stays(cluster, vm, disk, to, ways)
            continue
        yield from _taken(cluster, vm, disk, to)
        if disk.at:
            yield _elsewhere(vm, disk)
        elif disk.kind == "shared":
            yield from _same(disk, old, new, to)
        else:
            need_bytes += old.allocated_bytes
            yield from _room(disk, new, to, need_bytes)


def _stays(
    cluster: Cluster, vm: Vm, disk: Disk, to: str, ways: Mapping[str, str]
) -> Iterator[Refused]:
    what, hint = f"disk {disk.path}", "take it along: --with-storage"
    host = cluster.hosts.get(disk.at)
    if host is not None and host.drained and disk.at == vm.host:
        why = f"it would stay on host {disk.at}, which is drained"
        yield _no("host_drained", what, why, hint)
    why = ways.get(disk.at, "")
    if why and disk.at != to:
        yield _no("storage_unreachable", what, f"it is on host {disk.at}: {why}", hint)


def _elsewhere(vm: Vm, disk: Disk) -> Refused:
    why = f"its image is on host {disk.at}, not with the VM"
    first = f"`overland vm disk move {vm.name} {disk.path} --to {vm.host}`"
    hint = f"leave it there: --leave-storage; or first {first}"
    return _no("disk_elsewhere", f"disk {disk.path}", why, hint)


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
