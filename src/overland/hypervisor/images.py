"""The disk images of one host: looked at, made, compared, removed. No QEMU process is needed.

An image is made beside its place and then linked there, which fails when something is there: what
exists is never written over. Until `keep`, what was made is noted with its inode, and `drop`
removes that and nothing else, also after a crash between any two steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import stat
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from overland.hypervisor.statefile import Taker, give
from overland.model.cluster import Disk, DiskFormat, DiskState, Vm
from overland.ports import HypervisorFailure

PIECE_BYTES = 64 << 10
_TAKEN = ".taken"
"""After the name of a note of what a cold move has brought; before it stands the move, not a VM."""

_QCOW2 = b"QFI\xfb"
_QCOW2_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")


class Images:
    """Images of this host. Relative paths lie in `folder`; `notes` is for our own notes."""

    def __init__(self, folder: Path, notes: Path) -> None:
        self._folder = folder
        self._notes = notes
        self._taker = Taker()

    def path(self, disk: Disk) -> Path:
        return self._folder / disk.path

    def file_node(self, disk: Disk) -> dict[str, Any]:
        """QEMU's description of the file or device below a disk; locked by whoever may write."""
        path = self.path(disk)
        with contextlib.suppress(OSError):
            if stat.S_ISBLK(path.stat().st_mode):
                return {"driver": "host_device", "filename": str(path), "locking": "on"}
        return {
            "driver": "file",
            "filename": str(path),
            "locking": "on",
            "discard": "unmap" if disk.kind == "moved" else "ignore",
        }

    async def look(self, disks: Sequence[Disk]) -> tuple[DiskState, ...]:
        """What is there of each, in order; a file system that hangs stops nobody else."""
        return tuple([await asyncio.to_thread(_state, self.path(disk)) for disk in disks])

    async def make(self, vm: str, disks: Sequence[Disk]) -> None:
        """Make an empty image of each disk's size; HypervisorFailure when a file is in the way."""
        for disk in disks:
            path = self.path(disk)
            try:
                if not Path(disk.path).is_absolute():
                    path.parent.mkdir(parents=True, exist_ok=True)
                await self._made(vm, disk, path)
            except FileExistsError:
                raise HypervisorFailure(f"{path} is there already") from None
            except OSError as error:
                raise HypervisorFailure(f"{path}: {error.strerror}") from None

    async def make_for(self, move: str, disks: Sequence[Disk]) -> None:
        """As `make`, for `move`: nobody's until `keep_taken`; content with its having made them."""
        missing = [each for each in disks if not self._is_noted(_taken(move), self.path(each))]
        await self.make(_taken(move), missing)

    async def make_missing(self, vm: Vm) -> None:
        """Make what a VM declares with a size and does not have here yet."""
        here = [disk for disk in vm.disks if disk.size_bytes and not disk.uri]
        missing = [disk for disk in here if not self.path(disk).exists()]
        await self.make(vm.name, missing)

    async def _made(self, vm: str, disk: Disk, path: Path) -> None:
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        fresh = Path(name)
        try:
            with os.fdopen(fd, "wb") as file:
                file.truncate(disk.size_bytes)
            if disk.format == "qcow2":
                await _qemu_img("create", "-q", "-f", "qcow2", name, str(disk.size_bytes))
            self._note(vm, path, fresh.stat().st_ino)
            os.link(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)

    async def take(self, move: str, disks: Sequence[Disk], listen: str) -> list[str]:
        """Wait at `listen` for the images that `move` brings; the URIs to give them to, in order.

        The move is noted first: half an image is found after a crash. One that is still waited
        for, or is coming, keeps its URI; what was brought before stays until it comes again. They
        are nobody's until `keep_taken`.
        """

        def place(part: Path, path: Path) -> None:
            self._remove_noted(_taken(move), path)
            self._note(_taken(move), path, part.stat().st_ino)
            os.link(part, path)

        if disks:
            try:
                self._write_note(_taken(move), self._noted(_taken(move)))
            except OSError as error:
                raise HypervisorFailure(f"{self._notes}: {error.strerror}") from None
        return [await self._taker.take(self.path(disk), listen, place) for disk in disks]

    async def keep_taken(self, move: str, disks: Sequence[Disk]) -> None:
        """The images that `move` has brought are the VM's own; content with their being so.

        HypervisorFailure when one is not here any more.
        """
        for disk in disks:
            await self._taker.stop_waiting(self.path(disk))
            if not self.path(disk).exists():
                raise HypervisorFailure(f"{self.path(disk)} is not here any more")
        self.keep(_taken(move))

    async def drop_taken(self, move: str, disks: Sequence[Disk]) -> None:
        """Wait for `disks` no longer, and remove what `move` has brought; content with absence."""
        if move not in self.taken():
            return  # of that path another move may be bringing another VM's image
        for disk in disks:
            await self._taker.stop_waiting(self.path(disk))
        self.drop(_taken(move))

    def taken(self) -> list[str]:
        """The moves whose images were taken here and are nobody's yet."""
        return sorted(note.stem for note in self._notes.glob(f"*{_TAKEN}"))

    async def give(self, disk: Disk, uri: str) -> int:
        """Send the image of a VM at rest; bytes, once it is on the other host's disk."""
        return await give(self.path(disk), uri)

    def _note(self, vm: str, path: Path, inode: int) -> None:
        self._write_note(vm, [*self._noted(vm), (str(path), inode)])

    def _write_note(self, vm: str, noted: list[tuple[str, int]]) -> None:
        self._notes.mkdir(parents=True, exist_ok=True)
        fresh = (self._notes / vm).with_suffix(".new")
        fresh.write_text(json.dumps(noted))
        fresh.replace(self._notes / vm)

    def _noted(self, vm: str) -> list[tuple[str, int]]:
        with contextlib.suppress(OSError, ValueError):
            return [(path, inode) for path, inode in json.loads((self._notes / vm).read_text())]
        return []

    def keep(self, vm: str) -> None:
        """What was made is the VM's own from now on."""
        note = self._notes / vm
        if note.exists():
            note.unlink()
            _sync(self._notes, os.O_RDONLY)  # or a crash of the host brings it back

    def drop(self, vm: str) -> None:
        """Remove what was made for `vm` and not kept; content with absence."""
        for path, _ in self._noted(vm):
            self._remove_noted(vm, Path(path))
        self.keep(vm)

    def _remove_noted(self, vm: str, path: Path) -> None:
        with contextlib.suppress(OSError):
            if self._is_noted(vm, path):
                path.unlink()

    def _is_noted(self, vm: str, path: Path) -> bool:
        """Whether what is there is what was made, and not somebody else's of that name."""
        with contextlib.suppress(OSError):
            return (str(path), path.stat().st_ino) in self._noted(vm)
        return False

    async def settle(self, disks: Sequence[Disk]) -> None:
        """Return when the images are on this host's disk; HypervisorFailure when they cannot be."""
        for disk in disks:
            try:
                await asyncio.to_thread(_sync, self.path(disk))
            except OSError as error:
                raise HypervisorFailure(f"{self.path(disk)}: {error.strerror}") from None

    def remove(self, disks: Sequence[Disk]) -> None:
        """Remove images whose VM has moved away with them; content with absence."""
        for disk in disks:
            try:
                self.path(disk).unlink(missing_ok=True)
            except OSError as error:
                raise HypervisorFailure(f"{self.path(disk)}: {error.strerror}") from None

    async def digest(self, disk: Disk) -> str:
        """SHA-256 of what a guest sees in the image, holes and zeros alike (R-56)."""
        path = self.path(disk)
        try:
            if disk.format == "raw":
                return await asyncio.to_thread(_digest, path)
            self._notes.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._notes) as folder:
                flat = Path(folder) / "flat"
                await _qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", str(path), str(flat))
                return await asyncio.to_thread(_digest, flat)
        except OSError as error:
            raise HypervisorFailure(f"{path}: {error.strerror}") from None


def _taken(move: str) -> str:
    return f"{move}{_TAKEN}"


def _state(path: Path) -> DiskState:
    try:
        free = os.statvfs(_nearest(path.parent))
        free_bytes = free.f_bavail * free.f_frsize
        if not path.exists():
            return DiskState(free_bytes=free_bytes, trouble=_no_folder(path))
        there = path.stat()
    except OSError as error:
        return DiskState(trouble=error.strerror or str(error))
    device = stat.S_ISBLK(there.st_mode)
    if not (device or stat.S_ISREG(there.st_mode)):
        return DiskState(exists=True, trouble="it is no file and no block device")
    if not os.access(path, os.R_OK | os.W_OK):
        return DiskState(exists=True, trouble="it cannot be read and written")
    head = _head(path)
    kind: DiskFormat = "qcow2" if head[:4] == _QCOW2 else "raw"
    return DiskState(
        exists=True,
        device=device,
        inode=there.st_rdev if device else there.st_ino,
        format=kind,
        virtual_bytes=_qcow2(head)[5] if kind == "qcow2" else there.st_size,
        allocated_bytes=there.st_blocks * 512,
        free_bytes=free_bytes,
        depends=kind == "qcow2" and bool(_qcow2(head)[2] or _qcow2(head)[11]),
    )


def _nearest(folder: Path) -> Path:
    """The nearest folder that exists: where one that is missing would be made."""
    return folder if folder.exists() or folder == folder.parent else _nearest(folder.parent)


def _no_folder(path: Path) -> str:
    folder = _nearest(path.parent)
    return "" if os.access(folder, os.W_OK) else f"{folder} cannot be written"


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_QCOW2_HEADER.size)
    except OSError:
        return b""


def _qcow2(head: bytes) -> tuple[Any, ...]:
    """Header of a qcow2 image (QEMU: docs/interop/qcow2.txt): [2] offset of the backing file's
    name, [5] virtual size, [11] number of snapshots inside."""
    return _QCOW2_HEADER.unpack(head.ljust(_QCOW2_HEADER.size, b"\0"))


def _sync(path: Path, flags: int = os.O_RDWR) -> None:
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(os.fstat(file.fileno()).st_size.to_bytes(8, "big"))
        for offset, piece in pieces(file.fileno()):
            digest.update(offset.to_bytes(8, "big") + piece)
    return digest.hexdigest()


def pieces(fd: int) -> Iterator[tuple[int, bytes]]:
    """The pieces of a file that are not all zeros, with their offsets, in order."""
    size = os.fstat(fd).st_size
    zeros = bytes(PIECE_BYTES)
    offset = 0
    while offset < size:
        try:
            data = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole from here on
            return
        offset = data - data % PIECE_BYTES
        piece = os.pread(fd, PIECE_BYTES, offset)
        if piece != zeros[: len(piece)]:
            yield offset, piece
        offset += PIECE_BYTES


async def _qemu_img(*arguments: str) -> None:
    try:
        process = await asyncio.create_subprocess_exec(
            "qemu-img", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
    except FileNotFoundError:
        raise HypervisorFailure("qemu-img is not installed (package qemu-utils)") from None
    said, _ = await process.communicate()
    if process.returncode:
        last = said.decode(errors="replace").strip().rpartition("\n")[2]
        raise HypervisorFailure(last or "qemu-img failed")
