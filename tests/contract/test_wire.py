"""The NVE-NVA protocol over its real WebSocket, TLS and store: what an NVE hears, and when."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from overland.config import NvaConfig, Tls
from overland.daemon.nva import Domain
from overland.mobility import messages as m
from overland.model.cluster import Disk, Endpoint, Host, Interface, Leg, Network, Vm, VmState
from overland.model.handover import Checkpoints, Handover, Memory, Options, PhaseAt
from overland.nva.authority import Blocked
from overland.ports import StoreFailure
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
        self.moves: tuple[str, ...] = ()
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
        return w.Hello(
            protocol=w.PROTOCOL,
            host=self.host,
            known=self.known,
            vms=self.vms,
            moves=self.moves,
        )

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

    async def heard(self) -> w.FromNva:
        """The next message, whatever it is."""
        async with asyncio.timeout(LIMIT_S):
            return await self._heard.get()

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


@pytest.mark.req("E-01")
async def test_the_three_indications_of_a_stale_mapping_come_from_the_nva(world: World) -> None:
    """Not here, try that NVE; no such interface; right NVE, undeliverable (ADR 0017)."""
    one, two = await begin(world)
    one.say(w.Query(id=1, network="blue", mac="02:00:00:00:00:02"))
    elsewhere = (await one.hears(w.Answer)).mapping
    assert elsewhere is not None
    assert elsewhere.nve == "h2"
    await world.domain.authority.delete_endpoint("p2")
    withdrawn = await one.hears(w.VnUpdate)
    assert withdrawn.change.gone == ("02:00:00:00:00:02",)
    one.say(w.Query(id=2, network="blue", mac="02:00:00:00:00:02"))
    assert (await one.hears(w.Answer)).mapping is None
    await world.endpoint("p3", "h2", 3)
    offered = await two.hears(w.VnPush)
    two.say(w.Ack(network="blue", revision=offered.revision, failures=("p3: no such device",)))
    two.say(w.Query(id=3, network="blue", mac="02:00:00:00:00:03"))
    await two.hears(w.Answer)  # so the Ack has been heard before
    await world.endpoint("p4", "h2", 4)
    again = await two.hears(w.VnPush)
    assert again.intent is not None
    assert [each.owner for each in again.intent.tsis] == ["p3", "p4"]


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
    said(two, m.Prepared(move=move, nve="h2", uri="state:there"))
    give = await told(one)
    assert isinstance(give, m.GiveState)
    assert give.uri == "state:there"
    said(one, m.Received(move=move, nve="h1", at_ns=1, state_bytes=7))
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


async def lost_host(world: World) -> tuple[Nve, Nve]:
    """VM web was on h1, moved warm to h2, and h1 was lost while checkpoints existed."""
    one, two = world.nve("h1"), world.nve("h2")
    for nve in (one, two):
        nve.host = msgspec.structs.replace(nve.host, memory_total_mib=4096, accelerator="tcg")
        nve.connect()
        await nve.hears(w.Welcome)
    authority = world.domain.authority
    await authority.create_network(Network(name="blue", vni=42))
    face = Interface(network="blue", mac="02:00:00:00:00:09")
    web = Vm(name="web", host="h1", state="running", interfaces=(face,), version=4)
    await authority._write({"vm/web": web})  # noqa: SLF001 - as it was left
    authority.cluster.vms["web"] = web
    authority.ended_moves["m1"] = Handover(
        id="m1",
        vm=web,
        mode="warm",
        old_nve="h1",
        new_nve="h2",
        ports=(),
        options=Options(checkpoints=3),
        version=4,
        phase="aborted",
        outcome="aborted",
        lost=True,
        phases=(PhaseAt(phase="planned", at_ns=1),),
        checkpoints=Checkpoints(count=2, at_ns=7),
    )
    return one, two


async def away(world: World, nve: Nve) -> None:
    """The NVE's lease has ended."""
    await nve.leave()
    async with asyncio.timeout(LIMIT_S):
        while world.domain.authority.cluster.hosts[nve.host.name].ready:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest.mark.req("R-12")
@pytest.mark.req("R-14")
async def test_a_vm_is_recovered_only_when_its_former_copy_cannot_run(world: World) -> None:
    """R-14: its host is dead, or the operator says that it is off; not while it answers."""
    one, two = await lost_host(world)
    domain = world.domain
    with pytest.raises(Blocked, match="host h1 is there, and may run it"):
        await domain.recover("web", fenced=True)
    await away(world, one)
    with pytest.raises(Blocked, match="away, but not known to be dead"):
        await domain.recover("web", fenced=False)
    assert domain.authority.vm("web").host == "h1"
    recovering = asyncio.create_task(domain.recover("web", fenced=True))
    order = await two.hears(w.VmOrder)
    assert (order.action, order.vm.host, order.vm.version) == ("recover", "h2", 5)
    two.say(w.VmAnswer(id=order.id, at_ns=10**9))
    told = await recovering
    assert (told["host"], told["version"]) == ("h2", 5)
    assert told["recovery_point"] == "1970-01-01T00:00:01.000000Z"
    assert told["age_ms"] > 10**9
    vm = domain.authority.vm("web")
    assert (vm.state, vm.host, vm.version) == ("running", "h2", 5)
    with pytest.raises(Blocked, match="no move has left a checkpoint or a saved state"):
        await domain.recover("web", fenced=True)


@pytest.mark.req("R-12")
async def test_a_recovery_that_fails_may_be_tried_again(world: World) -> None:
    """The record has changed before anything runs; what failed after that is said, and repeated."""
    one, two = await lost_host(world)
    await away(world, one)
    for failure in ("disk full", None):
        recovering = asyncio.create_task(world.domain.recover("web", fenced=True))
        order = await two.hears(w.VmOrder)
        assert (order.action, order.vm.version) == ("recover", 5)
        two.say(w.VmAnswer(id=order.id, failure=failure, at_ns=1))
        if failure:
            with pytest.raises(Blocked, match="disk full"):
                await recovering
            assert world.domain.authority.vm("web").state == "crashed"
        else:
            assert (await recovering)["version"] == 5
    assert world.domain.authority.vm("web").state == "running"


@pytest.mark.req("R-14")
async def test_an_old_copy_that_comes_back_after_a_recovery_is_ended_before_all(
    world: World,
) -> None:
    """R-14: the move that it still has a part in was aborted, which else means: run on."""
    one, two = await lost_host(world)
    await away(world, one)
    recovering = asyncio.create_task(world.domain.recover("web", fenced=True))
    order = await two.hears(w.VmOrder)
    two.say(w.VmAnswer(id=order.id, at_ns=1))
    await recovering
    again = world.nve("h1")
    again.host, again.vms, again.moves = one.host, {"web": "running"}, ("m1",)
    again.connect()
    stop = await again.hears(w.VmOrder)
    assert (stop.action, stop.vm.name) == ("stop", "web")
    assert again._heard.empty()  # noqa: SLF001 - nothing of the move before that is done
    again.say(w.VmAnswer(id=stop.id))
    assert (await again.hears(w.MoveOrder)).order == m.Restore(move="m1")


@pytest.mark.req("R-12")
async def test_a_checkpoint_is_dropped_once_the_vm_is_found_alive(world: World) -> None:
    """Its host was thought dead; what it did since must not be taken back by a recovery."""
    one, two = await lost_host(world)
    one.say(w.MoveReport(report=m.Restored(move="m1", nve="h1")))
    assert (await one.hears(w.VmOrder)).action == "look"
    assert world.domain.authority.recovery_point("web") is not None, "it only says that it is done"
    one.say(w.VmReport(vm="web", state="running"))
    order = await two.hears(w.VmOrder)
    assert (order.action, order.vm.name) == ("forget", "web")
    assert world.domain.authority.recovery_point("web") is None


@pytest.mark.req("R-12")
async def test_a_lost_vm_keeps_its_addresses_while_it_may_be_recovered(world: World) -> None:
    """What is kept of it is known by its version, which other addresses would raise."""
    await lost_host(world)
    with pytest.raises(Blocked, match="h2 keeps a state of it"):
        await world.domain.change_addresses("web", "blue", {"ipv4": "10.0.0.7"})
    assert world.domain.authority.recovery_point("web") is not None


def slept(vm: Vm) -> Handover:
    """A cold move of `vm` from h1 to h2, where the VM did not wake."""
    new = msgspec.structs.replace(vm, host="h1", version=vm.version - 1, state="running")
    return Handover(
        id="m1",
        vm=new,
        mode="cold",
        old_nve="h1",
        new_nve="h2",
        ports=(),
        phase="closed",
        phases=(PhaseAt(phase="planned", at_ns=1),),
        version=vm.version,
        outcome="moved",
        ends_as="suspended",
        stop_ns=10**9,
        memory=Memory(total_bytes=7),
    )


async def asleep(world: World, state: VmState) -> tuple[Nve, Nve]:
    """VM web is at h2 by the record, since a cold move from h1 which it overslept."""
    one, two = await lost_host(world)
    authority = world.domain.authority
    vm = msgspec.structs.replace(authority.vm("web"), host="h2", version=5, state=state)
    await authority._write({"vm/web": vm})  # noqa: SLF001 - as it was left
    authority.cluster.vms["web"] = vm
    authority.ended_moves["m1"] = slept(vm)
    return one, two


@pytest.mark.req("R-12")
async def test_a_vm_that_overslept_its_move_is_recovered_from_its_old_host(world: World) -> None:
    """R-14: not while the new host, which has it asleep, is there."""
    one, two = await asleep(world, "suspended")
    with pytest.raises(Blocked, match="host h2 is there"):
        await world.domain.recover("web", fenced=False)
    await away(world, two)
    recovering = asyncio.create_task(world.domain.recover("web", fenced=True))
    order = await one.hears(w.VmOrder)
    assert (order.action, order.vm.host, order.vm.version) == ("wake", "h1", 6)
    one.say(w.VmAnswer(id=order.id))
    assert (await recovering)["recovery_point"] == "1970-01-01T00:00:01.000000Z"


@pytest.mark.req("R-14")
async def test_an_old_state_goes_once_the_vm_is_up_at_its_new_host(world: World) -> None:
    """HO-43: also when only a look at that host tells that it is."""
    one, two = await asleep(world, "suspended")
    two.say(w.VmReport(vm="web", state="running"))
    order = (await one.hears(w.MoveOrder)).order
    assert isinstance(order, m.DropState)
    assert order.seal is not None
    assert world.domain.authority.recovery_point("web") is None


@pytest.mark.req("R-14")
async def test_a_new_host_that_comes_back_has_its_vm_do_what_it_was_moved_for(
    world: World,
) -> None:
    """HO-52: what it took for the move is the VM; it is not dropped."""
    _, two = await asleep(world, "suspended")
    await away(world, two)
    again = world.nve("h2")
    again.host, again.moves = two.host, ("m1",)
    again.connect()
    order = (await again.hears(w.MoveOrder)).order
    assert isinstance(order, m.WakeUp)
    assert order.vm.state == "running"
    again.say(w.MoveReport(report=m.Running(move="m1", nve="h2", at_ns=1, held=0)))
    async with asyncio.timeout(LIMIT_S):
        while world.domain.authority.vm("web").state != "running":  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest.mark.req("R-12")
async def test_a_vm_that_crashed_with_its_host_may_be_recovered_when_that_is_back(
    world: World,
) -> None:
    _, two = await lost_host(world)
    await world.domain.authority.vm_state("web", "crashed", "seen at connection")
    recovering = asyncio.create_task(world.domain.recover("web", fenced=False))
    order = await two.hears(w.VmOrder)
    assert (order.action, order.vm.host) == ("recover", "h2")
    two.say(w.VmAnswer(id=order.id, at_ns=1))
    assert (await recovering)["version"] == 5


async def test_a_vm_with_a_disk_does_not_move_warm(world: World) -> None:
    """A checkpoint holds memory only; disk and memory have to be of one instant."""
    await lost_host(world)
    authority = world.domain.authority
    vm = authority.vm("web")
    authority.cluster.vms["web"] = msgspec.structs.replace(vm, disks=(Disk(path="/x"),))

    def codes(options: Options) -> set[str]:
        return {each.code for each in authority.live_blockers("web", "h2", options)}

    assert codes(Options()) == set()
    assert codes(Options(checkpoints=3)) == {"disk_not_in_checkpoint"}
    authority.cluster.vms["web"] = vm
    assert codes(Options(checkpoints=3)) == set()
    assert codes(Options(checkpoints=3, interval_s=0.0)) == {"malformed"}


async def test_the_end_of_a_vm_is_recorded_although_the_disk_was_full(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The NVE says it once; `vm show` must not call it running for ever."""
    monkeypatch.setattr("overland.daemon.nva.RETRY_S", 0.01)
    authority = world.domain.authority
    face = Interface(network="blue", mac="02:00:00:00:00:09")
    web = Vm(name="web", host="h1", state="running", interfaces=(face,))
    await authority._write({"vm/web": web})  # noqa: SLF001 - as it was left
    authority.cluster.vms["web"] = web
    one = world.nve("h1")
    one.vms = {"web": "running"}
    one.connect()
    await one.hears(w.Welcome)
    tried = 0

    async def full(*_: object) -> int:
        nonlocal tried
        tried += 1
        raise StoreFailure("database or disk is full")

    with monkeypatch.context() as while_full:
        while_full.setattr(authority._store, "commit", full)  # noqa: SLF001
        one.say(w.VmReport(vm="web", state="crashed", reason="QEMU ended"))
        await until(lambda: tried > 1)
    await until(lambda: authority.vm("web").state == "crashed")


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not holds():  # noqa: ASYNC110 - nothing else tells
            await asyncio.sleep(0.005)


@pytest.mark.req("N-21")
async def told(nve: Nve) -> w.VnUpdate:
    """The next update, as the kernel has taken it."""
    update = await nve.hears(w.VnUpdate)
    nve.say(w.Ack(network=update.network, revision=update.revision, versions=update.versions))
    return update


async def test_a_gateway_goes_when_those_who_used_it_have_another_in_their_kernels(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the others nobody is waited for: they are told nothing new."""
    monkeypatch.setattr("overland.daemon.nva.ASSOCIATE_LIMIT_S", 3600.0)
    authority, nves = world.domain.authority, [world.nve(name) for name in ("h1", "h2", "h3")]
    for nve in nves:
        nve.connect()
        await nve.hears(w.Welcome)
    one, two, three = nves
    await authority.create_network(Network(name="red", vni=77, kind="l3", ipv4="10.9.0.0/24"))
    face = Interface(network="red", mac="")
    await authority.create_endpoint(Endpoint(name="p1", host="h1", namespace="p1", interface=face))
    await one.gets("red")
    leg = Leg(bridge="out0", ipv4="198.51.100.2/24", via_ipv4="198.51.100.1")
    first = await authority.create_gateway("red", "h2", leg)
    await two.gets("red")
    await told(one)
    leg = msgspec.structs.replace(leg, ipv4="198.51.100.3/24")
    second = await authority.create_gateway("red", "h3", leg)
    await three.gets("red")
    for nve in (one, two):
        await told(nve)
    removal = asyncio.create_task(world.domain.delete_gateway("red", "h2"))
    update = await one.hears(w.VnUpdate)
    assert update.change.tsis is not None
    assert [tsi.ways_out for tsi in update.change.tsis] == [(second.interface.ipv4,)]
    assert first.key in authority.cluster.gateways
    one.say(w.Ack(network="red", revision=update.revision, versions=update.versions))
    await removal
    assert list(authority.cluster.gateways) == [second.key]
    assert (await told(one)).change.gone == (first.interface.mac,)


async def test_an_nve_is_told_when_it_has_heard_of_every_vn(world: World) -> None:
    """After the last of them, also after a Hello that knows nothing: until then it removes none."""
    one, _ = await begin(world)
    await one.leave()
    heir = world.nve("h1")
    heir.connect()
    await heir.gets("blue")
    await heir.hears(w.Complete)


@pytest.mark.req("N-09")
async def test_an_nve_goes_on_to_the_next_address_of_its_nva(world: World) -> None:
    one = world.nve("h1", before=f"wss://127.0.0.1:{_free_port()}/")
    one.connect()
    await one.hears(w.Welcome)


# ---------------------------------------------------------------- images that stay behind


async def leaving(world: World) -> tuple[Nve, Nve]:
    """VM web has just been committed to h2, and its disk stays on h1."""
    one, two = await begin(world)
    authority = world.domain.authority
    face = Interface(network="blue", mac="02:00:00:00:00:09")
    disk = Disk(path="data", kind="left")
    old = Vm(name="web", host="h1", state="running", interfaces=(face,), disks=(disk,))
    vm = msgspec.structs.replace(
        old,
        host="h2",
        version=2,
        move="m1",
        disks=(msgspec.structs.replace(disk, at="h1", since=2),),
    )
    staying = msgspec.structs.replace(old, disks=(msgspec.structs.replace(disk, at="h1"),))
    record = Handover(
        id="m1",
        vm=staying,
        old_nve="h1",
        new_nve="h2",
        ports=(),
        version=2,
        phase="committed",
        phases=(PhaseAt(phase="planned", at_ns=1),),
        commit_ns=1,
    )
    await authority._write({"move/m1": record, "vm/web": vm})  # noqa: SLF001 - as it was left
    authority.cluster.vms["web"] = vm
    authority.cluster.moves["m1"] = record
    return one, two


async def offering(nve: Nve) -> w.Serve:
    """The next thing that `nve` is told to offer, if it is anything."""
    while not (serve := await nve.hears(w.Serve)).exports:
        pass
    return serve


async def ordered(nve: Nve) -> list[type[m.AnyOrder | m.ColdOrder | m.DiskOrder]]:
    """The orders that `nve` has been given until now."""
    nve.say(w.Query(id=9, network="blue", address="10.0.0.1"))
    orders = []
    while not isinstance(message := await nve.heard(), w.Answer):
        if isinstance(message, w.MoveOrder):
            orders.append(type(message.order))
    return orders


@pytest.mark.req("R-14")
@pytest.mark.req("R-53")
async def test_a_vm_runs_once_what_its_disk_is_offered_as_now_is_said_and_not_before(
    world: World,
) -> None:
    """What is said of an older Serve, or that it failed, or by another host, is not enough."""
    one, two = await leaving(world)
    await world.domain.handovers.recover()
    serve = await offering(one)
    assert [(each.to, each.version) for each in serve.exports] == [("h2", 2)]
    one.say(w.Served(revision=serve.revision - 1))
    one.say(w.Served(revision=serve.revision, failures=("it is locked",)))
    two.say(w.Served(revision=serve.revision))
    await ordered(one)  # it has been heard
    assert m.Activate not in await ordered(two)
    one.say(w.Served(revision=serve.revision))
    order = await two.hears(w.MoveOrder)
    assert isinstance(order.order, m.Activate)


@pytest.mark.req("R-53")
async def test_who_comes_back_hears_all_that_it_offers(world: World) -> None:
    one, _ = await leaving(world)
    await one.leave()
    one.connect()
    assert [each.to for each in (await offering(one)).exports] == ["h2"]


@pytest.mark.req("R-53")
async def test_the_image_of_a_vm_that_is_deleted_is_offered_to_nobody(world: World) -> None:
    one, _ = await leaving(world)
    authority = world.domain.authority
    authority.cluster.moves.clear()
    authority.cluster.vms["web"] = msgspec.structs.replace(authority.vm("web"), move=None)
    world.domain._exports_changed()  # noqa: SLF001 - as after any change
    await offering(one)
    await authority.delete_vm("web")
    assert (await one.hears(w.Serve)).exports == ()


async def with_vm(world: World) -> Nve:
    """h1 runs VM web in blue; there is a network red, too."""
    authority = world.domain.authority
    await authority.create_network(Network(name="blue", vni=42, ipv4="10.0.0.0/24"))
    await authority.create_network(Network(name="red", vni=43, ipv4="10.43.0.0/24"))
    face = Interface(network="blue", mac="02:00:00:00:00:09", slot=0)
    web = Vm(name="web", host="h1", state="running", interfaces=(face,), machine="pc-i440fx-7.2")
    await authority._write({"vm/web": web})  # noqa: SLF001 - as it was left
    authority.cluster.vms["web"] = web
    one = world.nve("h1")
    one.vms = {"web": "running"}
    one.connect()
    await one.hears(w.Complete)
    return one


IN_RED = Interface(network="red", mac="")


async def kept_until(one: Nve, wanted: Callable[[w.Message], bool]) -> w.Message:
    """The next message that is `wanted`; each push until then is in the kernel at once."""
    while True:
        message: w.Message = await one.hears(w.Message)  # type: ignore[type-var]
        if isinstance(message, w.VnPush | w.VnUpdate):
            revision, versions = message.revision, message.versions
            one.say(w.Ack(network=message.network, revision=revision, versions=versions))
        if wanted(message):
            return message


async def order_to_fit(one: Nve, change: str) -> w.VmOrder:
    order = await kept_until(one, lambda message: isinstance(message, w.VmOrder))
    assert isinstance(order, w.VmOrder)
    assert (order.action, order.vm.interfaces[1].change) == ("fit", change)
    return order


def states(message: w.Message) -> list[str]:
    """The states of the interfaces that a push of red brings."""
    if isinstance(message, w.VnPush) and message.network == "red" and message.intent is not None:
        return [each.state for each in message.intent.tsis]
    if isinstance(message, w.VnUpdate) and message.network == "red":
        return [each.state for each in message.change.tsis or ()]
    return []


@pytest.mark.req("H-03")
async def test_an_interface_comes_into_use_after_its_device_is_there(world: World) -> None:
    """Associated and acknowledged, then the order; activated when that has been carried out."""
    one = await with_vm(world)
    adding = asyncio.create_task(world.domain.add_interface("web", IN_RED))
    await kept_until(one, lambda message: states(message) == ["associated"])
    order = await order_to_fit(one, "adding")
    one.say(w.VmAnswer(id=order.id))
    await kept_until(one, lambda message: states(message) == ["activated"])
    vm = await adding
    assert [(each.network, each.change) for each in vm.interfaces] == [
        ("blue", None),
        ("red", None),
    ]


@pytest.mark.req("H-03")
@pytest.mark.parametrize("failure", [None, "QEMU says no"])
async def test_a_restarted_nva_finishes_what_was_under_way(
    world: World, failure: str | None
) -> None:
    """The order may have been carried out or not; it is given again, and answered again."""
    one = await with_vm(world)
    lost = asyncio.create_task(world.domain.add_interface("web", IN_RED))
    await order_to_fit(one, "adding")
    lost.cancel()
    await one.leave()
    heir = await world.restarted()
    one.connect()
    order = await order_to_fit(one, "adding")
    one.say(w.VmAnswer(id=order.id, failure=failure))
    if failure is None:
        await kept_until(one, lambda message: states(message) == ["activated"])
    else:
        gone = await kept_until(one, lambda message: getattr(message, "intent", 0) is None)
        assert getattr(gone, "network", "") == "red"
    names = [each.network for each in heir.authority.vm("web").interfaces]
    assert names == (["blue", "red"] if failure is None else ["blue"])


@pytest.mark.req("H-07")
async def test_a_guest_that_lets_go_late_is_believed(world: World) -> None:
    one = await with_vm(world)
    authority = world.domain.authority
    vm = await authority.add_interface("web", IN_RED)
    await authority.end_change(vm, done=True)
    await kept_until(one, lambda message: states(message) == ["activated"])
    one.say(w.Unplugged(vm="web", slot=1))
    gone = await kept_until(one, lambda message: getattr(message, "intent", 0) is None)
    assert getattr(gone, "network", "") == "red", "nothing of it is left there"
