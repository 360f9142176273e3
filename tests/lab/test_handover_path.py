"""Gates, hold queues, tunnels and the rescue on the real kernel, frame by frame, without a VM.

The test itself reads the tap where a hypervisor would, so it knows exactly what was in its ring
when the "VM" stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest
from pyroute2 import AsyncIPRoute

from overland.dataplane import gate
from overland.dataplane.devices import silence
from overland.dataplane.gate import PATH_FRAME
from overland.dataplane.gates import Gates
from overland.dataplane.handover import LinuxHandoverPath
from overland.dataplane.hold import Injectors
from overland.dataplane.ila import Ila
from overland.dataplane.namespace import inside
from overland.dataplane.reach import answers
from overland.dataplane.tap import TapTable, read_frames, ring_empty, vnet_header_bytes
from overland.model.names import hold_name, tunnel_name
from overland.ports import KernelFailure, Tunnel

pytestmark = [pytest.mark.root]
NAMESPACE = "ovpath-test"
PORT = "ovtpath"
MAC = bytes.fromhex("020000000001")
ETHERTYPE = 0x88B6
ADDRESSES = [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")]


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def ip(line: str) -> None:
    run("ip", *line.split())


@pytest.fixture
def namespace() -> Iterator[None]:
    """This very thread works inside a network namespace of its own."""
    subprocess.run(["ip", "netns", "del", NAMESPACE], check=False, capture_output=True)
    ip(f"netns add {NAMESPACE}")
    try:
        with inside(f"/run/netns/{NAMESPACE}"):
            ip("link set lo up")
            ip("link add under type veth peer name far")
            ip("link set under up")
            ip("link set far up")
            ip("addr add 192.0.2.1/24 dev under")
            ip("addr add 2001:db8::1/64 dev under nodad")
            ip("neigh add 192.0.2.2 lladdr 02:00:00:00:00:99 dev under")
            ip("neigh add 2001:db8::2 lladdr 02:00:00:00:00:99 dev under")
            yield
    finally:
        ip(f"netns del {NAMESPACE}")


@dataclass
class Bench:
    """A port whose ring we read ourselves, and the path around it."""

    path: LinuxHandoverPath
    taps: TapTable
    injectors: Injectors
    frames: Iterator[int]

    def send(self, count: int, *, to: bytes = MAC) -> list[int]:
        """Let `count` numbered frames come to the port; their numbers."""
        numbers = list(itertools.islice(self.frames, count))
        inject(PORT, [frame(number, to) for number in numbers])
        return numbers

    def taken(self) -> list[int]:
        """The numbers of what a hypervisor would read now."""
        fd = self.taps.fd(PORT)
        skip = vnet_header_bytes(fd)
        return [number_of(each[skip:]) for each in read_frames(fd) if ours(each[skip:])]


def inject(device: str, frames: list[bytes]) -> None:
    with contextlib.closing(Injectors()) as sockets:
        out = sockets.into(device, mark=0)
        for each in frames:
            out.send(each)


def frame(number: int, to: bytes) -> bytes:
    head = to + bytes.fromhex("020000000077") + ETHERTYPE.to_bytes(2, "big")
    return (head + number.to_bytes(8, "big")).ljust(60, b"\0")


def ours(raw: bytes) -> bool:
    return raw[12:14] == ETHERTYPE.to_bytes(2, "big")


def number_of(raw: bytes) -> int:
    return int.from_bytes(raw[14:22], "big")


@pytest.fixture
async def bench(namespace: None) -> AsyncIterator[Bench]:
    async with AsyncIPRoute() as netlink:
        taps = TapTable()
        taps.make(PORT, 1000)
        silence(PORT)
        ip(f"link set {PORT} up")
        with contextlib.closing(Injectors()) as injectors:
            path = LinuxHandoverPath(netlink, Gates(netlink), taps, injectors, Ila(netlink))
            yield Bench(path, taps, injectors, itertools.count())
            await path.disarm_port(PORT)
        taps.close()


def heir_of(bench: Bench, netlink: AsyncIPRoute) -> LinuxHandoverPath:
    """What a restarted daemon has."""
    return LinuxHandoverPath(netlink, Gates(netlink), bench.taps, bench.injectors, Ila(netlink))


class Ear:
    """What leaves a device, in order."""

    def __init__(self, device: str) -> None:
        self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        self._sock.bind((device, 3))

    def numbers(self) -> list[int]:
        found: list[int] = []
        while True:
            try:
                raw = self._sock.recv(65535)
            except BlockingIOError:
                return found
            if ours(raw):
                found.append(number_of(raw))

    def close(self) -> None:
        self._sock.close()


@pytest.mark.req("R-36")
@pytest.mark.req("R-52")
@pytest.mark.parametrize(("local", "remote"), ADDRESSES, ids=["outer-ipv4", "outer-ipv6"])
async def test_what_the_stopped_vm_left_goes_first_then_what_waited_then_the_rest(
    bench: Bench, local: str, remote: str
) -> None:
    """R-36, HO-6: the ring is not empty at the stop, and still nothing is lost or overtaken."""
    tunnel = Tunnel(number=7, local=local, remote=remote, mtu=1400)
    await bench.path.open_tunnel(PORT, tunnel, home=True)
    await bench.path.arm_port(PORT, "under", 1000)
    ear = Ear(tunnel_name(7))
    left = bench.send(30)
    await bench.path.hold_port(PORT)
    waiting = bench.send(40)
    assert not ring_empty(bench.taps.fd(PORT))
    rescued = await bench.path.release_port(PORT, tunnel)
    later = bench.send(20)
    assert rescued == len(left)
    assert ear.numbers() == left + waiting + later
    assert bench.taken() == []
    counts = await bench.path.count_port(PORT)
    assert (counts.passed, counts.redirected, counts.overflowed) == (30, 20, 0)
    ear.close()
    await bench.path.close_tunnel(PORT, tunnel)


async def test_an_abort_delivers_what_waited_at_home_in_order(bench: Bench) -> None:
    """HO-4: into the tunnel first, then back to the port."""
    tunnel = Tunnel(number=7, local="192.0.2.1", remote="192.0.2.2", mtu=1400)
    await bench.path.open_tunnel(PORT, tunnel, home=True)
    await bench.path.arm_port(PORT, "under", 1000)
    await bench.path.hold_port(PORT)
    bench.send(10)
    await bench.path.release_port(PORT, tunnel)
    await bench.path.hold_port(PORT)
    waiting = bench.send(15)
    await bench.path.release_port(PORT, None)
    later = bench.send(5)
    assert bench.taken() == waiting + later
    await bench.path.close_tunnel(PORT, tunnel)


@pytest.mark.req("R-39")
async def test_the_hold_is_bounded_and_what_it_cost_is_counted(bench: Bench) -> None:
    await bench.path.arm_port(PORT, "under", 50)
    await bench.path.hold_port(PORT)
    numbers = bench.send(80)
    await bench.path.release_port(PORT, None)
    later = bench.send(3)
    assert bench.taken() == numbers[:50] + later
    assert (await bench.path.count_port(PORT)).overflowed == 30


@pytest.mark.req("R-39")
async def test_the_ring_of_the_new_port_is_bounded_and_counted(bench: Bench) -> None:
    bench.taps.make(PORT, 64)
    await bench.path.arm_port(PORT, "under", 50)
    numbers = bench.send(100)
    assert bench.taken() == numbers[:64]
    assert (await bench.path.count_port(PORT)).ring_full == 36


@pytest.mark.req("R-16")
async def test_frames_of_other_nves_are_counted_apart_from_our_own_tenants(bench: Bench) -> None:
    """Only what came from another NVE and is redirected takes a detour: late, after the commit."""
    for line in (
        "link add name brtest type bridge mcast_snooping 0",
        f"link set {PORT} master brtest",
        "link add vxside type veth peer name network",
        "link add tenant type veth peer name inside",
        "link set vxside master brtest",
        "link set tenant master brtest",
    ):
        ip(line)
    for device in ("brtest", "vxside", "tenant", "network", "inside"):
        silence(device)  # or the kernel's own multicast listener reports would be counted too
        ip(f"link set {device} up")
    run("bridge", "fdb", "replace", "02:00:00:00:00:01", "dev", PORT, "master", "static")
    tunnel = Tunnel(number=7, local="192.0.2.1", remote="192.0.2.2", mtu=1400)
    await bench.path.open_tunnel(PORT, tunnel, home=True)
    await bench.path.arm_port(PORT, "vxside", 1000)
    await bench.path.hold_port(PORT)
    await bench.path.release_port(PORT, tunnel)
    for device, count in (("network", 12), ("inside", 34)):
        inject(device, [frame(number, MAC) for number in range(count)])
    counts = await bench.path.count_port(PORT)
    assert (counts.redirected, counts.detoured) == (46, 12)
    assert counts.last_detoured_ns > 0
    assert counts.first_local_ns > 0
    await bench.path.close_tunnel(PORT, tunnel)


@pytest.mark.req("R-16")
async def test_in_flight_and_late_are_counted_as_they_are_stamped(bench: Bench) -> None:
    """Numbered frames before the hold, under it, before the commit and after it: all apart."""
    ip("link add vxside type veth peer name network")
    ip("link add name brtest type bridge mcast_snooping 0")
    for line in (f"set {PORT}", "set vxside"):
        ip(f"link {line} master brtest")
    for device in ("brtest", "vxside", "network"):
        silence(device)
        ip(f"link set {device} up")
    run("bridge", "fdb", "replace", "02:00:00:00:00:01", "dev", PORT, "master", "static")
    tunnel = Tunnel(number=7, local="192.0.2.1", remote="192.0.2.2", mtu=1400)
    await bench.path.open_tunnel(PORT, tunnel, home=True)
    await bench.path.arm_port(PORT, "vxside", 1000)
    ear = Ear(tunnel_name(7))

    def stamped(first: int, count: int) -> list[int]:
        numbers = list(range(first, first + count))
        inject("network", [frame(number, MAC) for number in numbers])
        return numbers

    taken = stamped(100, 5)
    assert bench.taken() == taken
    await bench.path.hold_port(PORT)
    held = stamped(200, 11)
    await bench.path.release_port(PORT, tunnel)
    in_flight = stamped(300, 7)
    before_commit = await bench.path.count_port(PORT)
    await bench.path.mute_broadcast(PORT)  # what the old NVE does when it hears of the commit
    late = stamped(400, 3)
    after = await bench.path.count_port(PORT)
    assert (after.passed, after.held) == (len(taken), len(held))
    assert before_commit.detoured == len(in_flight)
    assert after.detoured - before_commit.detoured == len(late)
    assert ear.numbers() == held + in_flight + late
    ear.close()
    await bench.path.close_tunnel(PORT, tunnel)


@pytest.mark.req("R-14")
async def test_the_plug_is_the_only_frame_before_the_copy_reads(bench: Bench) -> None:
    """HO-8: the copy's first, spoiled read is ours; what comes before it waits and follows."""
    await bench.path.arm_port(PORT, "under", 1000)
    bench.send(3)  # broadcasts from before the move stand for anything stale
    await bench.path.quiet_port(PORT)
    early = bench.send(5)
    fd = bench.taps.fd(PORT)
    first = next(read_frames(fd))
    plug = first[vnet_header_bytes(fd) :]
    assert plug[:12] == bytes(12)
    assert plug[12:14] == PATH_FRAME.to_bytes(2, "big")
    assert ring_empty(fd)
    await bench.path.open_port(PORT, 1.0)
    later = bench.send(5)
    assert bench.taken() == early + later


async def test_a_plug_that_nobody_takes_is_a_failure(bench: Bench) -> None:
    await bench.path.arm_port(PORT, "under", 1000)
    await bench.path.quiet_port(PORT)
    with pytest.raises(KernelFailure, match="does not read"):
        await bench.path.open_port(PORT, 0.02)


async def test_a_frame_that_qemu_cannot_place_is_waited_for(bench: Bench) -> None:
    """HO-5: QEMU has read the last tenant's frame and reads nothing more until it is placed."""
    await bench.path.arm_port(PORT, "under", 1000)
    bench.send(3)
    await bench.path.hold_port(PORT)
    assert len(bench.taken()) == 3
    assert not await bench.path.port_drained(PORT, 0.02)
    fd = bench.taps.fd(PORT)
    (plug,) = (each[vnet_header_bytes(fd) :] for each in read_frames(fd))
    assert plug[12:14] == PATH_FRAME.to_bytes(2, "big")
    drained = asyncio.create_task(bench.path.port_drained(PORT, 5.0))
    readable = asyncio.Event()
    asyncio.get_running_loop().add_reader(fd, readable.set)
    await readable.wait()
    asyncio.get_running_loop().remove_reader(fd)
    assert bench.taken() == []
    assert await drained


async def test_a_plug_that_was_not_taken_is_not_rescued(bench: Bench) -> None:
    """It is ours: no tenant's port gets it, and no receipt counts it."""
    tunnel = Tunnel(number=7, local="192.0.2.1", remote="192.0.2.2", mtu=1400)
    await bench.path.open_tunnel(PORT, tunnel, home=True)
    await bench.path.arm_port(PORT, "under", 1000)
    with contextlib.closing(Ear(tunnel_name(7))) as ear:
        left = bench.send(3)
        await bench.path.hold_port(PORT)
        assert not await bench.path.port_drained(PORT, 0.02)
        assert await bench.path.release_port(PORT, tunnel) == len(left)
        assert ear.numbers() == left
    sent, _ = await bench.path.count_tunnel(tunnel)
    assert sent == len(left)
    await bench.path.close_tunnel(PORT, tunnel)


async def test_the_vns_copy_of_a_broadcast_waits_for_the_activation(bench: Bench) -> None:
    """HO-17: until then broadcasts come by the tunnel."""
    broadcast = b"\xff" * 6
    await bench.path.arm_port(PORT, "under", 1000)
    await bench.path.quiet_port(PORT)
    list(read_frames(bench.taps.fd(PORT)))
    await bench.path.open_port(PORT, 1.0)
    with pytest.raises(KernelFailure, match="buffer"):  # how a drop shows to its sender
        bench.send(1, to=broadcast)
    await bench.path.admit_broadcast(PORT)
    admitted = bench.send(2, to=broadcast)
    assert bench.taken() == admitted
    assert (await bench.path.count_port(PORT)).dropped > 0


def _die(path: LinuxHandoverPath, port: str, tunnel: int) -> None:
    """What the kernel does when a daemon is killed: it closes every descriptor."""
    path._stop_forwarding(port, None)  # noqa: SLF001 - nobody is left to ask
    path._waiting.pop((port, None)).queue.close()  # noqa: SLF001
    path._silent(tunnel_name(tunnel))  # noqa: SLF001


async def test_a_gate_of_another_release_is_replaced(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upgraded daemon finds gates whose counters have another size: they are not for it."""
    async with AsyncIPRoute() as netlink:
        with monkeypatch.context() as older:
            older.setattr(gate, "COUNTER_BYTES", gate.COUNTER_BYTES + 8)
            await Gates(netlink).ensure(PORT, "port")
        heir = heir_of(bench, netlink)
        await heir.arm_port(PORT, "under", 100)
        numbers = bench.send(20)
        assert bench.taken() == numbers
        assert (await heir.count_port(PORT)).passed == 20
        await heir.disarm_port(PORT)


async def test_a_restarted_daemon_takes_a_released_gate_over(bench: Bench) -> None:
    """The gate's memory is in the kernel; a queue whose count nobody knows is counted anew."""
    tunnel = Tunnel(number=7, local="192.0.2.1", remote="192.0.2.2", mtu=1400)
    await bench.path.open_tunnel(PORT, tunnel, home=True)
    await bench.path.arm_port(PORT, "under", 1000)
    await bench.path.hold_port(PORT)
    bench.send(10)
    await bench.path.release_port(PORT, tunnel)
    ear = Ear(tunnel_name(7))
    async with AsyncIPRoute() as netlink:
        _die(bench.path, PORT, 7)
        heir = heir_of(bench, netlink)
        await heir.open_tunnel(PORT, tunnel, home=True)
        await heir.arm_port(PORT, "under", 1000)
        await heir.release_port(PORT, tunnel)
        after = bench.send(10)
        assert ear.numbers() == after
        assert (await heir.count_port(PORT)).held == 10
        await heir.disarm_port(PORT)
        await heir.close_tunnel(PORT, tunnel)
    assert hold_name(PORT, "") not in run("ip", "-o", "link")
    ear.close()


@pytest.mark.req("R-07")
@pytest.mark.parametrize("ethertype", [0x0800, 0x86DD, 0x0806, ETHERTYPE, 0x8847])
async def test_the_handover_looks_at_ethernet_only(bench: Bench, ethertype: int) -> None:
    """R-07: what is inside a frame makes no difference to hold and release."""
    await bench.path.arm_port(PORT, "under", 100)
    await bench.path.hold_port(PORT)
    raw = (MAC + bytes.fromhex("020000000077") + ethertype.to_bytes(2, "big")).ljust(60, b"\7")
    inject(PORT, [raw])
    await bench.path.release_port(PORT, None)
    fd = bench.taps.fd(PORT)
    skip = vnet_header_bytes(fd)
    assert [each[skip:] for each in read_frames(fd)] == [raw]


@pytest.mark.req("N-11")
@pytest.mark.parametrize(
    ("address", "heard"), [("192.0.2.1", True), ("2001:db8::1", True), ("192.0.2.2", False)]
)
async def test_a_kernel_answers_without_any_daemon(
    namespace: None, address: str, heard: bool
) -> None:
    """A refused connection is an answer; from behind the far end of the wire none comes."""
    assert await answers(address) is heard
