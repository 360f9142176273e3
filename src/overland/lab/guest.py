"""The lab's guest image: Debian's cloud kernel and a static busybox, built once and cached."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_blk",
)
PROGRAMS = ("dirty", "journal")


class GuestFailure(Exception):
    """The image cannot be built; one line for a person."""


@dataclass(frozen=True, slots=True)
class GuestImage:
    """Files to boot from."""

    kernel: Path
    initrd: Path


def build(cache: Path, extra: Mapping[str, Path]) -> GuestImage:
    """Return the image with `extra` files (path in the guest to file here), building if needed."""
    kernel_dir = _kernel(cache)
    kernel = next((kernel_dir / "boot").glob("vmlinuz-*"))
    files = _files(kernel_dir, cache, extra)
    digest = hashlib.sha256()
    for name, (mode, data) in sorted(files.items()):
        digest.update(f"{name} {mode:o} {len(data)}\n".encode() + data)
    initrd = cache / f"initrd-{digest.hexdigest()[:16]}.gz"
    if not initrd.exists():
        part = initrd.with_suffix(".part")
        part.write_bytes(gzip.compress(_cpio(files), 6, mtime=0))
        part.rename(initrd)
    return GuestImage(kernel=kernel, initrd=initrd)


def _run(*command: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise GuestFailure(f"{command[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip().splitlines() or ["failed"]
        raise GuestFailure(f"{' '.join(command[:3])}: {said[-1]}") from None
    return done.stdout


def _kernel(cache: Path) -> Path:
    """Download and unpack Debian's cloud kernel; nothing is installed."""
    found = cache / "kernel"
    if found.exists():
        return found
    cache.mkdir(parents=True, exist_ok=True)
    shown = _run("apt-cache", "depends", "linux-image-cloud-amd64")
    match = re.search(r"Depends: (linux-image-\S+-cloud-amd64\S*)", shown)
    if match is None:
        raise GuestFailure("no Debian cloud kernel is known here: run apt-get update")
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        _run("apt-get", "-qq", "download", match[1], cwd=Path(folder))
        package = next(Path(folder).glob("*.deb"))
        unpacked = Path(folder) / "kernel"
        _run("dpkg-deb", "-x", str(package), str(unpacked))
        try:
            unpacked.rename(found)
        except OSError:
            shutil.rmtree(unpacked, ignore_errors=True)
    return found


Files = dict[str, tuple[int, bytes]]


def _files(kernel_dir: Path, cache: Path, extra: Mapping[str, Path]) -> Files:
    ours = resources.files("overland.lab") / "guest_files"
    busybox = shutil.which("busybox")
    if busybox is None:
        raise GuestFailure("busybox is not installed (busybox-static)")
    files: Files = {
        "init": (0o755, (ours / "init").read_bytes()),
        "bin/busybox": (0o755, Path(busybox).read_bytes()),
    }
    for program in PROGRAMS:
        code = ours.joinpath(f"{program}.c").read_bytes()
        files[f"bin/{program}"] = (0o755, _compile(program, code, cache))
    for module in MODULES:
        paths = list(kernel_dir.glob(f"lib/modules/*/kernel/**/{module}.ko"))
        paths += list(kernel_dir.glob(f"usr/lib/modules/*/kernel/**/{module}.ko"))
        if paths:
            files[f"modules/{module}.ko"] = (0o644, paths[0].read_bytes())
    for name, path in extra.items():
        files[name] = (0o755 if os.access(path, os.X_OK) else 0o644, path.read_bytes())
    return files


def _compile(program: str, code: bytes, cache: Path) -> bytes:
    out = cache / f"{program}-{hashlib.sha256(code).hexdigest()[:16]}"
    if not out.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            part = Path(folder) / f"{program}.c"
            part.write_bytes(code)
            _run("gcc", "-O2", "-static", "-o", f"{folder}/{program}", str(part))
            Path(folder, program).rename(out)
    return out.read_bytes()


def _cpio(files: Files) -> bytes:
    """A `newc` archive (kernel: Documentation/driver-api/early-userspace/buffer-format.rst)."""
    out = bytearray()
    folders = sorted({str(p) for name in files for p in Path(name).parents if str(p) != "."})
    for inode, folder in enumerate([*folders, "dev", "proc", "sys", "tmp"], 1):
        out += _member(folder, 0o040755, b"", inode)
    for inode, (name, (mode, data)) in enumerate(sorted(files.items()), 1000):
        out += _member(name, 0o100000 | mode, data, inode)
    out += _member("TRAILER!!!", 0, b"", 0)
    return bytes(out)


def _member(name: str, mode: int, data: bytes, inode: int) -> bytes:
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)
