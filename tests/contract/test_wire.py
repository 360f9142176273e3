"""The NVE-NVA protocol over its real WebSocket, TLS and store: what an NVE hears, and when."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from overland.config import NvaConfig, Tls
from overland.daemon.nva import Domain
from overland.mobility import messages as m
from overland.model.cluster import Endpoint, Host, Interface, Network, Vm
from overland.model.handover import Memory, Options
from overland.nva.authority import Blocked
from overland.wire import messages as w
from overland.wire import tls
from overland.wire.client import WireClient

M = TypeVar("M", bound=w.FromNva)
LIMIT_S = 10.0


class Nve:
    """An NVE as the NVA sees one: a certificate, a Hello, and what it hears."""

    def __init__(self, folder: Path, urls: list[str], name: str, certificate: str = "") -> None:
        self.host = Host(name=name, underlay_ipv4=f"192.0.2.{name[1:]}", underlay_mtu=9000)
        self.known: dict[str, int] = {}
        self.vms: dict[str, str] = {}
        self._url = urls[-1]
        self._heard: asyncio.Queue[w.FromNva] = asyncio.Queue()
        pair = certificate or name
        context = tls.context(
            folder / "ca.crt", folder / f"{pair}.crt", folder / f"{pair}.key", server=False
        )
        self._link = WireClient(urls, context, self._hello, self._heard.put_nowait)
        self._task: asyncio.Task[None] | None = None
        self.say = self._link.send

    def _hello(self) -> w.Hello:
        return w.Hello(protocol=w.PROTOCOL, host=self.host, known=self.known, vms=self.vms)

    def connect(self) -> None:
        self._task = asyncio.create_task(self._link.run())

    async def leave(self) -> None:
        if self._task is None:
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def refused(self) -> None:
        """Connect once and return when the NVA has closed the connection."""
        async with asyncio.timeout(LIMIT_S):
            await self._link._once(self._url)  # noqa: SLF001 - `run` would connect again for ever

    async def hears(self, kind: type[M]) -> M:
        """The next message of that kind; the others before it are not of interest."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                message = await self._heard.get()
                if isinstance(message, kind):
                    return message

    async def gets(self, network: str) -> int:
        """Take the next push of `network`, as the kernel would; its revision."""
        message = await self.hears(w.VnPush)
        assert message.network == network
        self.known[network] = message.revision
        self.say(w.Ack(network=network, revision=message.revision, versions=message.versions))
        return message.revision


class Nva:
    """A running NVA."""

    def __init__(self, config: NvaConfig) -> None:
        self.config = config
        self.domain = Domain(config)
        self._task = asyncio.create_task(self.domain.run())

    async def end(self) -> None:
        self.domain.stop()
        await self._task


class World:
    """A domain with hosts h1 to h3 and network blue."""

    def __init__(self, folder: Path, nva: Nva) -> None:
        self._folder = folder
        self._running_nva = nva
        self.domain = nva.domain
        self._url = f"wss://127.0.0.1:{nva.config.wire_port}/"
        self._nves: list[Nve] = []

    async def restarted(self) -> Domain:
        """End the NVA and start another on its store."""
        await self._running_nva.end()
        self._running_nva = Nva(self._running_nva.config)
        self.domain = self._running_nva.domain
        return self.domain

    async def close(self) -> None:
        for nve in self._nves:
            await nve.leave()
        await self._running_nva.end()

    def nve(self, name: str, certificate: str = "", before: str = "") -> Nve:
        """`before` is an address of the NVA that is tried first."""
        urls = [before, self._url] if before else [self._url]
        nve = Nve(self._folder, urls, name, certificate)
        self._nves.append(nve)
        return nve

    async def endpoint(self, name: str, host: str, number: int) -> None:
        face = Interface(
            network="blue", mac=f"02:00:00:00:00:{number:02x}", ipv4=f"10.0.0.{number}"
        )
        await self.domain.authority.create_endpoint(
            Endpoint(name=name, host=host, namespace=name, interface=face)
        )


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    tls.create_authority(tmp_path)
    tls.issue(tmp_path, "nva", "nva", ["127.0.0.1"])
    for name in ("h1", "h2", "h3"):
        tls.issue(tmp_path, name, f"nve:{name}", [])
    wire, api = _free_port(), _free_port()
    config = NvaConfig(
        store=str(tmp_path / "store"),
        api_listen=f"127.0.0.1:{api}",
        wire_address="127.0.0.1",
        wire_port=wire,
        lease_s=0.2,
        tls=Tls(
            ca=str(tmp_path / "ca.crt"),
            certificate=str(tmp_path / "nva.crt"),
            key=str(tmp_path / "nva.key"),
        ),
    )
    world = World(tmp_path, Nva(config))
    try:
        yield world
    finally:
        await world.close()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def begin(world: World) -> tuple[Nve, Nve]:
    """h1 and h2 are in blue, and know of each other."""
    one, two = world.nve("h1"), world.nve("h2")
    one.connect()
    two.connect()
    await one.hears(w.Welcome)
    await two.hears(w.Welcome)
    await world.domain.authority.create_network(Network(name="blue", vni=42, ipv4="10.0.0.0/24"))
    await world.endpoint("p1", "h1", 1)
    await one.gets("blue")
    await world.endpoint("p2", "h2", 2)
    await two.gets("blue")
    update = await one.hears(w.VnUpdate)
    one.known["blue"] = update.revision
    return one, two


@pytest.mark.req("N-04")
@pytest.mark.req("N-06")
async def test_whoever_is_in_a_vn_hears_what_changes_and_nothing_else(world: World) -> None:
    one, two = await begin(world)
    await world.endpoint("p3", "h2", 3)
    update = await one.hears(w.VnUpdate)
    assert update.base == one.known["blue"]
    assert [each.ipv4 for each in update.change.remotes] == ["10.0.0.3"]
    assert (update.change.tsis, update.change.members) == (None, None)
    assert update.versions == {"p3": 1}
    own = await two.hears(w.VnUpdate)
    assert own.change.tsis is not None
    assert own.change.remotes == ()


@pytest.mark.req("N-20")
async def test_who_comes_back_hears_what_has_changed_since(world: World) -> None:
    one, _ = await begin(world)
    await one.leave()
    await world.endpoint("p3", "h2", 3)
    one.connect()
    update = await one.hears(w.VnUpdate)
    assert update.base == one.known["blue"]
    assert [each.ipv4 for each in update.change.remotes] == ["10.0.0.3"]


@pytest.mark.req("N-20")
async def test_who_comes_back_and_has_missed_nothing_is_asked_to_acknowledge_again(
    world: World,
) -> None:
    """Its acknowledgement may have been lost with the connection."""
    one, _ = await begin(world)
    await one.leave()
    one.connect()
    update = await one.hears(w.VnUpdate)
    assert update.change == type(update.change)()
    assert update.versions == {"p1": 1, "p2": 1}


@pytest.mark.parametrize("known", [{}, {"blue": 1}, {"blue": 1 << 62}])
async def test_who_has_something_else_hears_the_whole(world: World, known: dict[str, int]) -> None:
    """A restarted NVE knows nothing; a revision from before a clock step is newer than any."""
    one, _ = await begin(world)
    await one.leave()
    one.known = dict(known)
    one.connect()
    push = await one.hears(w.VnPush)
    assert push.revision > known.get("blue", 0)
    assert push.intent is not None
    assert [each.ipv4 for each in push.intent.remotes] == ["10.0.0.2"]


async def test_an_nve_that_cannot_use_an_update_gets_the_whole(world: World) -> None:
    one, _ = await begin(world)
    one.say(w.Resync(network="blue"))
    push = await one.hears(w.VnPush)
    assert push.intent is not None
    assert len(push.intent.remotes) == 1


async def test_what_a_kernel_refused_is_pushed_whole_the_next_time(world: World) -> None:
    one, _ = await begin(world)
    failed = w.Ack(network="blue", revision=one.known["blue"], failures=("no such device",))
    one.say(failed)
    one.say(w.Query(id=1, network="blue", address="10.0.0.2"))
    await one.hears(w.Answer)  # so the Ack has been heard before
    await world.endpoint("p3", "h2", 3)
    push = await one.hears(w.VnPush)
    assert push.intent is not None
    assert len(push.intent.remotes) == 2


@pytest.mark.req("N-05")
@pytest.mark.req("N-18")
async def test_a_question_is_answered_and_a_negative_answer_is_withdrawn(world: World) -> None:
    """The withdrawal is the push to everybody who is in the VN."""
    one, _ = await begin(world)
    one.say(w.Query(id=7, network="blue", address="10.0.0.2"))
    found = await one.hears(w.Answer)
    assert found.mapping is not None
    assert (found.id, found.mapping.nve) == (7, "h2")
    one.say(w.Query(id=8, network="blue", mac="02:00:00:00:00:03"))
    nothing = await one.hears(w.Answer)
    assert (nothing.id, nothing.mapping) == (8, None)
    assert 0 < nothing.lifetime_100ms < 100
    await world.endpoint("p3", "h2", 3)
    update = await one.hears(w.VnUpdate)
    assert [each.mac for each in update.change.remotes] == ["02:00:00:00:00:03"]


@pytest.mark.req("N-12")
async def test_a_certificate_speaks_for_its_own_host_only(world: World) -> None:
    honest = world.nve("h3")
    honest.connect()
    await honest.hears(w.Welcome)  # so the NVA listens
    await world.nve("h1", certificate="h2").refused()
    assert set(world.domain.authority.cluster.hosts) == {"h3"}


@pytest.mark.req("N-17")
async def test_a_message_from_the_future_is_answered_and_not_fatal(world: World) -> None:
    one, _ = await begin(world)
    strange = msgspec.defstruct("Strange", [("x", int)], frozen=True, tag=True, kw_only=True)
    one.say(strange(x=1))  # type: ignore[arg-type]
    assert "Strange" in (await one.hears(w.Unsupported)).why
    one.say(w.Query(id=9, network="blue", address="10.0.0.2"))
    assert (await one.hears(w.Answer)).mapping is not None


async def question(nve: Nve, *, answers: bool) -> None:
    """Take the next question for another host, and answer it."""
    asked = await nve.hears(w.HostQuestion)
    assert asked.address == "192.0.2.1"
    nve.say(w.HostAnswer(id=asked.id, answers=answers))


@pytest.mark.req("N-11")
async def test_what_a_dead_host_had_is_withdrawn_and_comes_back_with_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overland.nva.liveness.AGAIN_S", 0.05)
    one, two = await begin(world)
    await question(two, answers=True)  # while it is there: so its silence will mean something
    await one.leave()
    await question(two, answers=True)  # its NVE is away, the host lives: nothing is withdrawn
    await question(two, answers=False)
    update = await two.hears(w.VnUpdate)
    assert (update.change.members, update.change.gone) == ((), ("02:00:00:00:00:01",))
    assert world.domain.authority.cluster.hosts["h1"].dead
    one.connect()
    back = await two.hears(w.VnUpdate)
    assert back.change.members == ("192.0.2.1",)
    assert [each.mac for each in back.change.remotes] == ["02:00:00:00:00:01"]


@pytest.mark.req("N-11")
async def test_a_host_that_never_answered_is_not_dead_because_it_is_silent(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall may keep it from answering; its VMs run."""
    monkeypatch.setattr("overland.nva.liveness.AGAIN_S", 0.05)
    one, two = await begin(world)
    await question(two, answers=False)
    await one.leave()
    for _ in range(10):
        await question(two, answers=False)
    assert not world.domain.authority.cluster.hosts["h1"].dead


@pytest.mark.req("N-21")
async def test_a_restarted_nva_knows_where_tenants_of_an_absent_nve_are(world: World) -> None:
    """Its daemon is away, its kernel forwards: others keep its mappings."""
    one, two = await begin(world)
    await two.leave()
    await one.leave()
    heir = await world.restarted()
    one.known = {}
    one.connect()
    push = await one.hears(w.VnPush)
    assert push.intent is not None
    assert push.intent.members == ("192.0.2.2",)
    assert [each.ipv4 for each in push.intent.remotes] == ["10.0.0.2"]
    assert not heir.authority.cluster.hosts["h2"].ready


@pytest.mark.req("R-34")
async def test_nothing_is_done_to_a_vm_whose_saved_state_is_on_its_way(world: World) -> None:
    """It could be woken and sleep again meanwhile, and would lose what it did."""
    one, two = world.nve("h1"), world.nve("h2")
    for nve in (one, two):
        nve.host = msgspec.structs.replace(nve.host, memory_total_mib=4096, accelerator="tcg")
        nve.connect()
        await nve.hears(w.Welcome)
    domain = world.domain
    await domain.authority.create_network(Network(name="blue", vni=42))
    face = Interface(network="blue", mac="02:00:00:00:00:09")
    web = Vm(name="web", host="h1", state="suspended", interfaces=(face,), version=4)
    await domain.authority._write({"vm/web": web})  # noqa: SLF001 - as it was left
    domain.authority.cluster.vms["web"] = web
    moving = asyncio.create_task(domain.migrate("web", "h2", Options(), cold=True))
    files = await two.hears(w.FilesQuestion)
    two.say(w.FilesAnswer(id=files.id, missing=()))
    move = await moving

    async def told(nve: Nve) -> m.Order:
        return (await nve.hears(w.MoveOrder)).order

    def said(nve: Nve, report: m.AnyReport) -> None:
        nve.say(w.MoveReport(report=report))

    assert isinstance(await told(two), m.Associate)
    for wish in (
        domain.vm_action("web", "resume"),
        domain.delete_vm("web"),
        domain.migrate("web", "h2", Options(), cold=True),
    ):
        with pytest.raises(Blocked, match=r"moving|moves it"):
            await wish
    said(two, m.Prepared(move=move, nve="h2"))
    assert isinstance(await told(one), m.Suspend)
    saved = Memory(total_bytes=7, remaining_bytes=7)
    said(one, m.Stopped(move=move, nve="h1", held_ns=0, stop_ns=0, memory=saved))
    assert isinstance(await told(two), m.TakeState)
    said(two, m.Prepared(move=move, nve="h2", uri="state:there"))
    give = await told(one)
    assert isinstance(give, m.GiveState)
    assert give.uri == "state:there"
    said(one, m.Received(move=move, nve="h1", at_ns=1))
    wake = await told(two)
    assert isinstance(wake, m.WakeUp)
    assert wake.seal is not None
    said(two, m.Running(move=move, nve="h2", at_ns=2, held=0))
    drop = await told(one)
    assert isinstance(drop, m.DropState)
    assert drop.seal is not None
    said(one, m.Closed(move=move, nve="h1"))
    async for _ in domain.follow(move):
        pass
    record = domain.authority.move(move)
    assert record is not None
    assert (record.memory.sent_bytes, record.outcome) == (7, "moved")
    web = domain.authority.vm("web")
    assert (web.host, web.state, web.version, web.move) == ("h2", "suspended", 5, None)


@pytest.mark.req("E-02")
@pytest.mark.req("R-14")
async def test_who_has_a_copy_that_the_record_denies_is_told_to_stop_it(world: World) -> None:
    """Two places for one VM: the NVA's record decides, not who speaks last."""
    face = Interface(network="blue", mac="02:00:00:00:00:09")
    web = Vm(name="web", host="h1", state="running", interfaces=(face,), version=4)
    world.domain.authority.cluster.vms["web"] = web
    one, two = world.nve("h1"), world.nve("h2")
    one.vms = two.vms = {"web": "running"}
    one.connect()
    await one.hears(w.Welcome)
    two.connect()
    order = await two.hears(w.VmOrder)
    assert (order.action, order.vm.name) == ("stop", "web")
    assert world.domain.authority.cluster.vms["web"].host == "h1"


@pytest.mark.req("N-09")
async def test_an_nve_goes_on_to_the_next_address_of_its_nva(world: World) -> None:
    one = world.nve("h1", before=f"wss://127.0.0.1:{_free_port()}/")
    one.connect()
    await one.hears(w.Welcome)
