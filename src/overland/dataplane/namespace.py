"""Being in another network namespace for a moment, and working in one by iproute2."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from overland.dataplane.devices import exists
from overland.ports import KernelFailure

_CLONE_NEWNET = 0x40000000
_FAILED = re.compile(r"Command failed -:(\d+)")
_libc = ctypes.CDLL(None, use_errno=True)

log = logging.getLogger(__name__)


NETNS = Path("/run/netns")
"""Where iproute2 keeps named network namespaces."""


def path_of(namespace: str) -> str:
    """The file that stands for a named network namespace."""
    return str(NETNS / namespace)


async def _ip(*arguments: str, lines: Sequence[str] = ()) -> tuple[int, bytes, str]:
    process = await asyncio.create_subprocess_exec(
        "ip",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, said = await process.communicate("".join(f"{line}\n" for line in lines).encode())
    return process.returncode or 0, out, said.decode(errors="replace")


async def feed(namespace: str, *command: str, text: str) -> None:
    """Run a command in `namespace` with `text` on its standard input; KernelFailure says why."""
    process = await asyncio.create_subprocess_exec(
        *("ip", "netns", "exec", namespace, *command),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate(text.encode())
    if process.returncode:
        why = _first(said.decode(errors="replace"))
        raise KernelFailure(f"namespace {namespace}: {command[0]}: {why}")


async def run(*arguments: str) -> None:
    """Run one `ip` command here. KernelFailure says why not."""
    code, _, said = await _ip(*arguments)
    if code:
        raise KernelFailure(f"ip {' '.join(arguments)}: {_first(said)}")


def set_knobs(namespace: str, knobs: Mapping[str, int]) -> None:
    """Write values below /proc/sys/net of `namespace`; what the kernel has not is left out."""
    with inside(path_of(namespace)):
        for knob, value in knobs.items():
            path = Path("/proc/sys/net", knob)
            if path.exists():  # those of IPv6 are not where the kernel has none
                path.write_text(str(value))


async def sweep(begin: str, device_of: Callable[[int], str]) -> None:
    """Remove namespaces named `begin` and a number that have lost their device: a crash's rest."""
    for path in NETNS.glob(f"{begin}*"):
        number = path.name.removeprefix(begin)
        if number.isdecimal() and not exists(device_of(int(number))):
            try:
                await run("netns", "del", path.name)
            except KernelFailure as failure:
                log.warning("%s", failure)


async def batch(namespace: str, lines: Sequence[str], *options: str) -> dict[int, str]:
    """Run each line as an `ip` command in `namespace`, all in one process; the failed, with why.

    Lines are counted from 0. One that fails does not keep the others from being run. `options` are
    those of `ip` for all of them, as `-6`.
    """
    arguments = ("-n", namespace, *options, "-force", "-batch", "-")
    code, _, said = await _ip(*arguments, lines=lines)
    if code == 0:
        return {}
    failed: dict[int, str] = {}
    why = "refused"
    for line in said.splitlines():
        if match := _FAILED.match(line):
            failed[int(match[1]) - 1] = why
        else:
            why = line.strip()
    return failed or dict.fromkeys(range(len(lines)), why)


async def shown(namespace: str, lines: Sequence[str], *options: str) -> list[bytes]:
    """The JSON that each `show` line prints in `namespace`; KernelFailure when it cannot."""
    arguments = ("-n", namespace, *options, "-j", "-batch", "-")
    code, out, said = await _ip(*arguments, lines=lines)
    texts = out.splitlines()
    if code or len(texts) != len(lines):
        raise KernelFailure(f"namespace {namespace}: {_first(said)}")
    return texts


def _first(said: str) -> str:
    return next(iter(said.strip().splitlines()), "refused")


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
        raise KernelFailure(f"network namespace {path}: {error.strerror}") from None
    try:
        yield fd
    finally:
        os.close(fd)


def _enter(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        raise KernelFailure(f"network namespace: {os.strerror(ctypes.get_errno())}")
