"""ILA on the real kernel, packet by packet, without a VM: out, in, errors, a move's tunnel.

One namespace is the NVE, with a veth pair for the underlay: what leaves by `under` is read at
`far`, and what is sent at `far` comes in. The tenant's tap is read where a hypervisor would.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from pyroute2 import AsyncIPRoute

from overland.dataplane import ila as ila_module
from overland.dataplane import pathframe
from overland.dataplane.gate import MARK
from overland.dataplane.gates import Gates
from overland.dataplane.gateway import Gateways
from overland.dataplane.handover import LinuxHandoverPath
from overland.dataplane.hold import Injectors
from overland.dataplane.ila import Ila
from overland.dataplane.linux import LinuxKernel
from overland.dataplane.namespace import inside, path_of
from overland.dataplane.nftables import Nftables
from overland.dataplane.router import Routers
from overland.dataplane.tap import TapTable, read_frames, vnet_header_bytes
from overland.model.ila import in_move, of_nve, on_wire
from overland.model.names import GATEWAY_MAC, port_name, tunnel_name
from overland.model.nve import (
    IdentifierEntry,
    KernelState,
    LocatorEntry,
    NveIntent,
    RemoteIntent,
    TsiIntent,
    VnIntent,
)
from overland.nve.delta import delta
from overland.nve.render import render
from overland.ports import Tunnel

pytestmark = [pytest.mark.root]
NAMESPACE = "ovila-test"
LOCATOR, OWN = "2001:db8:a:1::/64", "2001:db8:a:1::1"
THERE, ELSEWHERE = "2001:db8:a:2::1", "2001:db8:a:3::1"
PREFIX = "2001:db8:100::/64"
WEB, WEB_MAC = "2001:db8:100:0:2000::1", "02:00:00:00:00:01"
PEER, PEER_MAC = "2001:db8:100:0:2000::9", "02:00:00:00:00:09"
PORT = port_name("web", 0)
UDP, ICMPV6 = 17, 58


def run(line: str) -> str:
    return subprocess.run(line.split(), capture_output=True, text=True, check=True).stdout


@pytest.fixture
def namespace() -> Iterator[None]:
    left = [path.name for path in Path("/run/netns").glob(f"{NAMESPACE}*")]
    for name in left:
        run(f"ip netns del {name}")
    run(f"ip netns add {NAMESPACE}")
    try:
        with inside(path_of(NAMESPACE)):
            run("ip link set lo up")
            run("ip link add under type veth peer name far")
            run("ip link set under mtu 1500 up")
            run("ip link set far mtu 1500 up")
            run("ip addr add fd00:200::1/64 dev under nodad")
            for n in (2, 3):
                run(f"ip neigh add fd00:200::{n} lladdr 02:00:00:00:99:0{n} dev under")
                run(f"ip route add 2001:db8:a:{n}::/64 via fd00:200::{n}")
            yield
    finally:
        for path in Path("/run/netns").glob(f"{NAMESPACE}*"):
            run(f"ip netns del {path.name}")


@dataclass
class Nve:
    """One NVE with tenant web here and tenant peer at THERE."""

    kernel: LinuxKernel
    path: LinuxHandoverPath
    ila: Ila
    taps: TapTable
    injectors: Injectors
    wire: socket.socket

    async def made_so(self, desired: KernelState) -> None:
        assert await self.kernel.apply(delta(desired, await self.kernel.snapshot())) == []
        assert delta(desired, await self.kernel.snapshot()) == ()

    def sent(self) -> list[bytes]:
        """The IPv6 packets that have left by the underlay, but for the kernel's own."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self.wire.recv(65535)[14:])
        return [each for each in found if destination(each).startswith("2001:db8")]

    def out(self, packet: bytes, mac: str = PEER_MAC, mark: int = 0) -> list[bytes]:
        """What the bridge gives to the device, and what comes of it on the wire."""
        frame = raw(mac) + raw(GATEWAY_MAC) + b"\x86\xdd" + packet
        self.injectors.into("ovi42", mark=mark).send(frame)
        return self.sent()

    def arrives(self, packet: bytes) -> list[bytes]:
        """The underlay brings `packet`; the frames that web's hypervisor reads."""
        self.wire.send(raw(address_of("under")) + raw("02:00:00:00:99:02") + b"\x86\xdd" + packet)
        return self.taken()

    def taken(self) -> list[bytes]:
        fd = self.taps.fd(PORT)
        skip = vnet_header_bytes(fd)
        return [each[skip:] for each in read_frames(fd)]


def address_of(device: str) -> str:
    return run(f"ip -o link show {device}").split("link/ether ")[1].split()[0]


def raw(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def destination(packet: bytes) -> str:
    return str(ipaddress.IPv6Address(packet[24:40]))


def ipv6(source: str, to: str, protocol: int, body: bytes, label: int = 0) -> bytes:
    addresses = ipaddress.IPv6Address(source).packed + ipaddress.IPv6Address(to).packed
    return struct.pack("!IHBB", 0x60000000 | label, len(body), protocol, 60) + addresses + body


def checksum(packet: bytes) -> int:
    """0 when the transport checksum behind the IPv6 header is right."""
    body = packet[40:] + bytes(len(packet) % 2)
    pseudo = packet[8:40] + struct.pack("!IHBB", len(packet) - 40, 0, 0, packet[6])
    total: int = sum(struct.unpack(f"!{len(pseudo + body) // 2}H", pseudo + body))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def summed(source: str, to: str, protocol: int, body: bytes, at: int) -> bytes:
    """A packet with its checksum, 16 bits at offset `at` of its body."""
    bare = ipv6(source, to, protocol, body)
    right = checksum(bare)
    return ipv6(source, to, protocol, body[:at] + right.to_bytes(2, "big") + body[at + 2 :])


def datagram(source: str, to: str, text: bytes = b"hello, task") -> bytes:
    body = struct.pack("!HHHH", 40000, 80, 8 + len(text), 0) + text
    return summed(source, to, UDP, body, 6)


def too_big(about: bytes, router: str = "fd00:200::99", to: str = WEB, kind: int = 2) -> bytes:
    """An ICMPv6 error of a router in the underlay about a packet as it was on the wire."""
    return summed(router, to, ICMPV6, struct.pack("!BBHI", kind, 0, 0, 1400) + about[:1000], 2)


def intent(*, remotes: int = 0, nve: str = THERE) -> NveIntent:
    here = TsiIntent(owner="web", index=0, kind="tap", mac=WEB_MAC, ipv6=WEB, state="activated")
    there = [RemoteIntent(mac=PEER_MAC, ipv6=PEER, nve=nve, version=1)]
    there += [
        RemoteIntent(
            mac=f"02:00:00:01:{n >> 8:02x}:{n & 255:02x}",
            ipv6=f"2001:db8:100:0:2000:0:1:{n:x}",
            nve=ELSEWHERE,
            version=1,
        )
        for n in range(1, remotes + 1)
    ]
    vn = VnIntent(
        network="jade",
        vni=42,
        mtu=1500,
        underlay="ipv6",
        local=OWN,
        ila=True,
        gateways=("2001:db8:100::1/64",),
        members=(THERE, ELSEWHERE),
        tsis=(here,),
        remotes=tuple(there),
    )
    return NveIntent(vns=(vn,))


@pytest.fixture
async def nve(namespace: None) -> AsyncIterator[Nve]:
    async with AsyncIPRoute() as ip:
        with (
            contextlib.closing(Nftables()) as nft,
            contextlib.closing(TapTable()) as taps,
            contextlib.closing(Injectors()) as injectors,
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK) as wire,
        ):
            nft.ensure()
            ila = Ila(ip)
            await ila.start(LOCATOR, "under")
            wire.bind(("far", 0x86DD))
            gates = Gates(ip)
            routers, gateways = Routers(ip, NAMESPACE), Gateways(ip, NAMESPACE)
            made = Nve(
                LinuxKernel(ip, nft, gates, taps, routers, gateways, ila, 1000),
                LinuxHandoverPath(ip, gates, taps, injectors, ila),
                ila,
                taps,
                injectors,
                wire,
            )
            await made.made_so(render(intent()))
            yield made
            for device in list(made.path._responders):  # noqa: SLF001
                made.path._silent(device)  # noqa: SLF001


async def test_the_wire_shows_the_vector_and_the_guest_does_not(nve: Nve) -> None:
    """V1 in, on the real kernel; every checksum holds in both forms, and no hop is taken."""
    plain = datagram(WEB, PEER)
    (sent,) = nve.out(plain)
    assert destination(sent) == on_wire(PEER, THERE)
    assert (checksum(sent), sent[40:], sent[:24]) == (0, plain[40:], plain[:24])
    home = datagram(PEER, WEB)
    wire = home[:24] + ipaddress.IPv6Address("2001:db8:a:1:3000::f0f5").packed + home[40:]
    assert checksum(wire) == 0
    (frame,) = nve.arrives(wire)
    assert frame == raw(WEB_MAC) + raw(GATEWAY_MAC) + b"\x86\xdd" + home


async def test_fragments_and_extension_headers_need_no_touch(nve: Nve) -> None:
    fragment = ipv6(WEB, PEER, 44, struct.pack("!BBHI", UDP, 0, 8, 77) + bytes(32))
    (sent,) = nve.out(fragment)
    assert (destination(sent), sent[40:]) == (on_wire(PEER, THERE), fragment[40:])


@pytest.mark.req("N-15")
async def test_nothing_but_what_is_mapped_goes_out_or_comes_in(nve: Nve) -> None:
    """N-15: default deny. Neither a tenant nor the underlay can name who is not its business."""
    assert nve.out(datagram(WEB, "2001:db8:200:0:2000::1")) == [], "peer's MAC, another's address"
    assert nve.out(datagram(WEB, PEER), mac="02:00:00:00:00:77") == []
    assert nve.arrives(datagram(PEER, WEB)) == [], "a tenant's address, straight from the underlay"
    assert nve.arrives(datagram(PEER, on_wire("2001:db8:100:0:2000::2", OWN))) == []
    assert nve.arrives(datagram(PEER, WEB.replace("2000::1", "3000::1"))) == []
    assert nve.sent() == [], "and nobody is told why (6-3)"


async def test_a_tenant_speaks_no_path_frame(nve: Nve) -> None:
    label = 0x60088B55 & 0xFFFFF
    ours = ipv6(WEB, PEER, 254, bytes(40), label)
    assert nve.out(ours) == []
    assert len(nve.out(ours, mark=MARK)) == 1
    assert len(nve.out(ipv6(WEB, PEER, 254, bytes(40)))) == 1, "the number alone is anybody's"
    to_web = ipv6("fd00:200::2", on_wire(WEB, OWN), 254, bytes(40), label)
    assert nve.arrives(to_web) == [], "ours ends before the guest"


async def test_an_error_quotes_what_the_guest_has_sent(nve: Nve) -> None:
    """4.4: Packet Too Big from within the underlay; its checksum holds with the quote repaired."""
    (sent,) = nve.out(datagram(WEB, PEER))
    error = too_big(sent)
    assert checksum(error) == 0
    (frame,) = nve.arrives(error)
    packet = frame[14:]
    assert (packet[8:24], destination(packet)) == (error[8:24], WEB)
    assert destination(packet[48:]) == PEER
    assert packet[40:48] == error[40:48]
    assert checksum(packet) == 0


async def test_an_error_about_a_former_place_is_believed_for_a_time(
    nve: Nve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4.4, the trap: the table has the new locator, the error quotes the old one."""
    (before,) = nve.out(datagram(WEB, PEER))
    nve.ila.turn("ovi42", PEER_MAC, ELSEWHERE)
    (after,) = nve.out(datagram(WEB, PEER))
    assert (destination(before), destination(after)) == (
        on_wire(PEER, THERE),
        on_wire(PEER, ELSEWHERE),
    )
    for sent in (before, after):
        (frame,) = nve.arrives(too_big(sent))
        assert destination(frame[14 + 48 :]) == PEER
    await nve.made_so(render(intent(nve=ELSEWHERE)))  # the loop finds it as the move left it
    assert len(nve.arrives(too_big(before))) == 1
    monkeypatch.setattr(ila_module, "QUOTED_HOLD_S", 0.0)
    nve.ila.turn("ovi42", PEER_MAC, THERE)
    assert nve.arrives(too_big(after)) == []
    assert len(nve.arrives(too_big(before))) == 1, "it is there again, and no former place"


async def test_an_error_about_what_nobody_sent_is_no_error(nve: Nve) -> None:
    strange = datagram(WEB, on_wire(PEER, "2001:db8:a:7::1"))
    assert nve.arrives(too_big(strange)) == []
    (sent,) = nve.out(datagram(WEB, PEER))
    assert nve.arrives(too_big(sent, kind=128)) == [], "an echo request is none"
    assert nve.arrives(too_big(sent, to="2001:db8:200:0:2000::1")) == [], "nobody's prefix"


@pytest.mark.req("N-15")
async def test_a_forged_source_brings_no_error_to_another_tenant(nve: Nve) -> None:
    """Who sends with another VN's address as source has the underlay's errors sent there."""
    (jade,) = intent().vns
    far = RemoteIntent(
        mac="02:00:00:00:00:43", ipv6="2001:db8:200:0:2000::43", nve=THERE, version=1
    )
    onyx = msgspec.structs.replace(
        jade, network="onyx", vni=43, gateways=("2001:db8:200::1/64",), tsis=(), remotes=(far,)
    )
    await nve.made_so(render(NveIntent(vns=(jade, onyx))))
    theirs = datagram(WEB, on_wire(far.ipv6 or "", THERE))
    assert nve.arrives(too_big(theirs)) == []
    (sent,) = nve.out(datagram(WEB, PEER))
    assert len(nve.arrives(too_big(sent))) == 1


async def test_a_restarted_daemon_finds_all_as_wanted(nve: Nve) -> None:
    desired = render(intent(remotes=5))
    await nve.made_so(desired)
    async with AsyncIPRoute() as ip:
        with contextlib.closing(Nftables()) as nft, contextlib.closing(TapTable()) as taps:
            ila = Ila(ip)
            await ila.start(LOCATOR, "under")
            heir = LinuxKernel(
                *(ip, nft, Gates(ip), taps, Routers(ip, NAMESPACE), Gateways(ip, NAMESPACE)),
                *(ila, 1000),
            )
            assert delta(desired, await heir.snapshot()) == ()
    assert len(nve.out(datagram(WEB, PEER))) == 1


@pytest.mark.parametrize("damage", ["ip link del ovi42", "tc qdisc del dev under clsact"])
async def test_what_was_damaged_is_made_again(nve: Nve, damage: str) -> None:
    """The second as at a restart: nobody but the daemon's start looks at the underlay's device."""
    run(damage)
    await nve.ila.start(LOCATOR, "under")
    await nve.made_so(render(intent()))
    assert len(nve.out(datagram(WEB, PEER))) == 1
    assert len(nve.arrives(datagram(PEER, on_wire(WEB, OWN)))) == 1


async def test_what_is_gone_leaves_nothing(nve: Nve) -> None:
    await nve.made_so(render(intent(remotes=300)))
    assert len((await nve.kernel.snapshot()).locator_entries) == 301
    await nve.made_so(KernelState())
    tables = nve.ila.tables
    assert [list(each.items()) for each in (tables.out, tables.into, tables.prefixes)] == [[]] * 3
    assert "ovi42" not in run("ip -o link")


async def test_a_full_table_is_a_refusal(nve: Nve, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(key: bytes, value: bytes) -> None:
        raise OSError(7, "BPF map access: Argument list too long")

    monkeypatch.setattr(nve.ila.tables.out, "put", full)
    entry = LocatorEntry(device="ovi42", mac=PEER_MAC, address=PEER, remote=ELSEWHERE)
    ops = delta(
        msgspec.structs.replace(await nve.kernel.snapshot(), locator_entries=frozenset({entry})),
        await nve.kernel.snapshot(),
    )
    failures = await nve.kernel.apply(ops)
    assert [failure.op.fact for failure in failures] == [entry]
    assert "as many tenants as it can" in failures[0].why


TUNNEL = Tunnel(number=7, local=OWN, remote=THERE, mtu=1500, mac=WEB_MAC, address=WEB)


@pytest.mark.req("N-24")
async def test_a_moves_tunnel_adds_no_byte(nve: Nve) -> None:
    """N-24: old to new needs no more room than the first leg; full size, and back again."""
    await nve.path.open_tunnel(PORT, TUNNEL, home=True)
    await nve.path.arm_port(PORT, "ovi42", 100)
    await nve.path.hold_port(PORT)
    largest = datagram(PEER, WEB, bytes(1500 - 48))
    wire = largest[:24] + ipaddress.IPv6Address(on_wire(WEB, OWN)).packed + largest[40:]
    assert nve.arrives(wire) == []
    await nve.path.release_port(PORT, TUNNEL)
    (sent,) = nve.sent()
    assert len(sent) == 1500
    assert destination(sent) == in_move(WEB, THERE, 7)
    assert checksum(sent) == 0
    back = sent[:24] + ipaddress.IPv6Address(in_move(WEB, OWN, 7)).packed + sent[40:]
    (frame,) = nve.arrives(back)
    assert frame[14:] == largest
    assert nve.sent() == []
    counts = await nve.path.count_port(PORT)
    assert (counts.held, counts.redirected, counts.detoured) == (1, 0, 0)
    assert nve.arrives(wire) == []
    counts = await nve.path.count_port(PORT)
    assert (counts.redirected, counts.detoured) == (1, 1), "it had come from another NVE"
    await nve.path.disarm_port(PORT)
    await nve.path.close_tunnel(PORT, TUNNEL)
    nve.sent()
    assert nve.arrives(back) == []
    assert nve.sent() == []


async def test_a_marker_goes_where_the_packets_went(nve: Nve) -> None:
    """The old path to its end, in order behind what was sent; then the new one."""
    await nve.path.arm_peer("ovi42", PEER_MAC, 100)
    steering = asyncio.create_task(nve.path.steer("ovi42", PEER_MAC, ELSEWHERE, None, timeout_s=5))
    seen: list[bytes] = []
    while not seen:
        await asyncio.sleep(0.001)
        seen = nve.sent()
    assert nve.out(datagram(WEB, PEER)) == [], "it waits"
    (marker,) = seen
    assert destination(marker) == on_wire(PEER, THERE)
    asked = pathframe.read_question(bytes(12) + b"\x86\xdd" + marker)
    assert asked is not None
    nonce, _, port = asked
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as answer:
        answer.sendto(pathframe.ANSWER + nonce, (asked[1], port))
    await steering
    (sent,) = nve.sent()
    assert destination(sent) == on_wire(PEER, ELSEWHERE)
    await nve.path.disarm_peer("ovi42", PEER_MAC)


async def test_a_marker_is_heard_at_the_end_of_the_tunnel(nve: Nve) -> None:
    """By the new NVE, and by no guest."""
    await nve.path.open_tunnel(PORT, TUNNEL, home=False)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as ear:
        ear.bind(("fd00:200::1", 0))
        ear.settimeout(5)
        port = ear.getsockname()[1]
        question = pathframe.packet(
            pathframe.MARKER, bytes(16), "fd00:200::1", port, bytes(6), in_move(WEB, OWN, 7)
        )
        assert nve.arrives(question[14:]) == []
        await asyncio.sleep(0)
        heard = await asyncio.to_thread(ear.recv, 100)
    assert heard == pathframe.ANSWER + bytes(16)
    await nve.path.close_tunnel(PORT, TUNNEL)


async def test_a_probe_is_of_full_size_and_finds_the_vn(nve: Nve) -> None:
    await nve.path.arm_peer("ovi42", PEER_MAC, 100)
    crossing = asyncio.create_task(nve.path.cross("ovi42", THERE, 5))
    seen: list[bytes] = []
    while not seen:
        await asyncio.sleep(0.001)
        seen = nve.sent()
    probe = seen[0]
    assert (len(probe), destination(probe)) == (1500, of_nve(THERE, 42))
    here = probe[:24] + ipaddress.IPv6Address(of_nve(OWN, 42)).packed + probe[40:]
    assert nve.arrives(here) == []
    await crossing
    await nve.path.disarm_peer("ovi42", PEER_MAC)


async def test_the_rest_of_a_crash_is_swept(nve: Nve) -> None:
    await nve.path.open_tunnel(PORT, TUNNEL, home=True)
    await nve.path.sweep(frozenset())
    assert tunnel_name(7) not in run("ip -o link")
    tables = nve.ila.tables
    assert len(list(tables.out.items())) == 1
    assert {value[:16] for _, value in tables.into.items()} == {
        ipaddress.IPv6Address(WEB).packed,
        ipaddress.IPv6Address(of_nve(OWN, 42)).packed,
    }
    entries = {e for e in nve.ila.entries({"ovi42"}) if isinstance(e, IdentifierEntry)}
    assert len(entries) == 1
