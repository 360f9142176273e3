"""Where parts are joined into the two daemons, and nowhere else."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

from overland.ports import PortFailure

NICE = -15
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def run_first() -> None:
    """Ask for the processor ahead of the guests: in a move their stop waits for our answers."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)


@contextlib.contextmanager
def inside(namespace: str | None) -> Iterator[None]:
    """Be in network namespace `namespace` (a path) for a moment: sockets made there stay there."""
    if namespace is None:
        yield
        return
    with _namespace("/proc/self/ns/net") as home, _namespace(namespace) as there:
        _enter(there)
        try:
            yield
        finally:
            _enter(home)


@contextlib.contextmanager
def _namespace(path: str) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise PortFailure(f"network namespace {path}: {error.strerror}") from None
    try:
        yield fd
    finally:
        os.close(fd)


def _enter(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        raise PortFailure(f"network namespace: {os.strerror(ctypes.get_errno())}")
