"""bpf(2) and just enough of an assembler for our gate programs.

A compiler would be a large thing to need on every host for forty instructions. The instruction
set is that of Documentation/bpf/standardization/instruction-set.rst; the kernel's verifier checks
what we wrote before it ever runs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator

from overland.ports import KernelFailure

_SYSCALL = {"x86_64": 321, "aarch64": 280}
_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _PROG_LOAD = 0, 1, 2, 3, 5
_MAP_LOOKUP_BATCH, _BATCH = 24, 4096
_PROG_GET_FD_BY_ID, _MAP_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD = 13, 14, 15
_PROG_TYPE_SCHED_CLS = 3
HASH, ARRAY = 1, 2
GROWING = 1
"""A map that takes memory for what it holds (BPF_F_NO_PREALLOC), not for what it could hold."""

_LOG_BYTES = 1 << 16

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 = range(11)
W, H, B, DW = 0x00, 0x08, 0x10, 0x18
LD_MAP_FD = 1

_libc = ctypes.CDLL(None, use_errno=True)


def _number() -> int:
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise KernelFailure(f"no bpf(2) number known for {platform.machine()}")
    return number


def _bpf(command: int, attributes: bytes, what: str) -> int:
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = int(_libc.syscall(_number(), command, buffer, len(attributes)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


class Map:
    """A kernel map with fixed key and value sizes. Owns its descriptor."""

    def __init__(self, fd: int, key_bytes: int, value_bytes: int) -> None:
        self.fd = fd
        self.key_bytes = key_bytes
        self.value_bytes = value_bytes

    @classmethod
    def create(
        cls, kind: int, key_bytes: int, value_bytes: int, entries: int, name: str, flags: int = 0
    ) -> Map:
        attributes = struct.pack(
            "<IIIIIII16s", kind, key_bytes, value_bytes, entries, flags, 0, 0, name.encode()[:15]
        )
        return cls(_bpf(_MAP_CREATE, attributes, "BPF map"), key_bytes, value_bytes)

    def _op(self, command: int, key: bytes, value: ctypes.Array[ctypes.c_char] | None) -> int:
        held = ctypes.create_string_buffer(key, len(key))
        address = ctypes.addressof(value) if value is not None else 0
        attributes = struct.pack("<IxxxxQQQ", self.fd, ctypes.addressof(held), address, 0)
        return _bpf(command, attributes, "BPF map access")

    def get(self, key: bytes) -> bytes | None:
        value = ctypes.create_string_buffer(self.value_bytes)
        try:
            self._op(_MAP_LOOKUP, key, value)
        except FileNotFoundError:
            return None
        return value.raw

    def put(self, key: bytes, value: bytes) -> None:
        self._op(_MAP_UPDATE, key, ctypes.create_string_buffer(value, len(value)))

    def remove(self, key: bytes) -> None:
        """Content with absence."""
        try:
            self._op(_MAP_DELETE, key, None)
        except FileNotFoundError:
            return

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All entries, in no order; what changes meanwhile may or may not be among them."""
        keys = ctypes.create_string_buffer(self.key_bytes * _BATCH)
        values = ctypes.create_string_buffer(self.value_bytes * _BATCH)
        here, next_ = ctypes.c_uint32(), ctypes.c_uint32()
        begun = False
        while True:
            request = struct.pack(
                "<QQQQIIQQ",
                ctypes.addressof(here) if begun else 0,
                ctypes.addressof(next_),
                ctypes.addressof(keys),
                ctypes.addressof(values),
                _BATCH,
                self.fd,
                0,
                0,
            )
            buffer = ctypes.create_string_buffer(request, len(request))
            last = _libc.syscall(_number(), _MAP_LOOKUP_BATCH, buffer, len(request)) < 0
            if last and ctypes.get_errno() != errno.ENOENT:
                code = ctypes.get_errno()
                raise OSError(code, f"BPF map listing: {os.strerror(code)}")
            count = struct.unpack_from("<I", buffer, 32)[0]
            yield from zip(
                _cut(keys.raw, self.key_bytes, count),
                _cut(values.raw, self.value_bytes, count),
                strict=True,
            )
            if last:
                return
            here.value, begun = next_.value, True

    def close(self) -> None:
        os.close(self.fd)


def _cut(raw: bytes, size: int, count: int) -> Iterator[bytes]:
    return (raw[at * size : (at + 1) * size] for at in range(count))


def load_classifier(instructions: bytes, name: str) -> int:
    """Load a tc classifier; returns its descriptor. KernelFailure carries the verifier's word."""
    code = ctypes.create_string_buffer(instructions, len(instructions))
    text = ctypes.create_string_buffer(b"GPL")
    log = ctypes.create_string_buffer(_LOG_BYTES)
    attributes = struct.pack(
        "<IIQQIIQII16s",
        _PROG_TYPE_SCHED_CLS,
        len(instructions) // 8,
        ctypes.addressof(code),
        ctypes.addressof(text),
        1,
        _LOG_BYTES,
        ctypes.addressof(log),
        0,
        0,
        name.encode()[:15],
    )
    try:
        return _bpf(_PROG_LOAD, attributes, "BPF program")
    except OSError as error:
        said = log.value.decode(errors="replace").strip().splitlines()[-3:]
        raise KernelFailure(f"{error.strerror}; the verifier said: {' / '.join(said)}") from None


def maps_of_program(program_id: int) -> list[Map]:
    """Open the maps of a loaded program, in the order of their ids (creation)."""
    program = _bpf(_PROG_GET_FD_BY_ID, struct.pack("<III", program_id, 0, 0), "BPF program")
    try:
        ids = (ctypes.c_uint32 * 8)()
        # struct bpf_prog_info: nr_map_ids at 52, map_ids pointer at 56 (include/uapi/linux/bpf.h)
        info = ctypes.create_string_buffer(256)
        struct.pack_into("<IxxxxQ", info, 48, 0, 0)
        struct.pack_into("<I", info, 52, len(ids))
        struct.pack_into("<Q", info, 56, ctypes.addressof(ids))
        request = struct.pack("<IIQ", program, len(info), ctypes.addressof(info))
        _bpf(_OBJ_GET_INFO_BY_FD, request, "BPF program info")
        count = struct.unpack_from("<I", info, 52)[0]
        return [_open_map(ids[index]) for index in range(count)]
    finally:
        os.close(program)


def _open_map(map_id: int) -> Map:
    fd = _bpf(_MAP_GET_FD_BY_ID, struct.pack("<III", map_id, 0, 0), "BPF map")
    info = ctypes.create_string_buffer(128)
    _bpf(
        _OBJ_GET_INFO_BY_FD,
        struct.pack("<IIQ", fd, len(info), ctypes.addressof(info)),
        "BPF map info",
    )
    _kind, _id, key_bytes, value_bytes = struct.unpack_from("<IIII", info, 0)
    return Map(fd, key_bytes, value_bytes)


class Code:
    """A program under construction, with labels for forward jumps."""

    _ALU: dict[str, int] = {"add": 0x00, "sub": 0x10, "and": 0x50, "mov": 0xB0}  # noqa: RUF012
    _JUMP: dict[str, int] = {  # noqa: RUF012
        "always": 0x00,
        "eq": 0x10,
        "gt": 0x20,
        "ge": 0x30,
        "set": 0x40,
        "ne": 0x50,
    }

    def __init__(self) -> None:
        self._words: list[tuple[int, int, int, int, int]] = []
        self._labels: dict[str, int] = {}
        self._jumps: dict[int, str] = {}

    def _emit(self, op: int, dst: int, src: int, offset: int, immediate: int) -> None:
        self._words.append((op, dst, src, offset, immediate))

    def label(self, name: str) -> None:
        self._labels[name] = len(self._words)

    def alu(self, what: str, dst: int, immediate: int) -> None:
        self._emit(0x07 | self._ALU[what], dst, 0, 0, immediate)

    def alu_reg(self, what: str, dst: int, src: int) -> None:
        self._emit(0x0F | self._ALU[what], dst, src, 0, 0)

    def load(self, size: int, dst: int, src: int, offset: int) -> None:
        self._emit(0x61 | size, dst, src, offset, 0)

    def store(self, size: int, dst: int, offset: int, src: int) -> None:
        self._emit(0x63 | size, dst, src, offset, 0)

    def store_imm(self, size: int, dst: int, offset: int, immediate: int) -> None:
        self._emit(0x62 | size, dst, 0, offset, immediate)

    def atomic_add(self, dst: int, offset: int, src: int, *, fetch: bool = False) -> None:
        self._emit(0xDB, dst, src, offset, 0x01 if fetch else 0x00)

    def map_fd(self, dst: int, fd: int) -> None:
        self._emit(0x18, dst, LD_MAP_FD, 0, fd)
        self._emit(0, 0, 0, 0, 0)

    def constant(self, dst: int, value: int) -> None:
        """A 64-bit one, written as eight bytes."""
        low, high = struct.unpack("<ii", value.to_bytes(8, "little"))
        self._emit(0x18, dst, 0, 0, low)
        self._emit(0, 0, 0, 0, high)

    def jump(self, what: str, dst: int, immediate: int, to: str) -> None:
        self._jumps[len(self._words)] = to
        self._emit(0x05 | self._JUMP[what], dst, 0, 0, immediate)

    def jump_reg(self, what: str, dst: int, src: int, to: str) -> None:
        self._jumps[len(self._words)] = to
        self._emit(0x0D | self._JUMP[what], dst, src, 0, 0)

    def call(self, helper: int) -> None:
        self._emit(0x85, 0, 0, 0, helper)

    def exit(self) -> None:
        self._emit(0x95, 0, 0, 0, 0)

    def assemble(self) -> bytes:
        out = bytearray()
        for index, (op, dst, src, offset, immediate) in enumerate(self._words):
            if index in self._jumps:
                offset = self._labels[self._jumps[index]] - index - 1
            out += struct.pack("<BBhi", op, dst | src << 4, offset, immediate)
        return bytes(out)
