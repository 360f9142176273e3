"""Changed addresses in a running NVA: when the old ones end, the name that follows, the API."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import dns.name
import msgspec
import pytest

from overland.cli.output import Exit
from overland.model.cluster import Interface, Network, Vm
from overland.model.eligibility import Eligibility, Registration, Signed
from overland.model.handover import Handover, Options
from overland.model.readdress import NewAddresses
from overland.model.receipt import receipt
from overland.nva.authority import Authority
from overland.wire import dns as names
from overland.wire import messages as w
from tests.contract.test_wire import Nve, World, until, world
from tests.core.test_names import NameServer, settings

__all__ = ["world"]
OLD, NEW = "10.0.0.50", "10.0.0.60"
SIGNED = Signed(statement=b"", signature=b"", certificate=b"")


@pytest.fixture
async def server() -> AsyncIterator[NameServer]:
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(
        lambda: NameServer("example.org."), local_addr=("127.0.0.1", 0)
    )
    try:
        yield server
    finally:
        transport.close()


async def begin(world: World, *, registered: bool = True, answering: bool = False) -> Nve:
    """web, off, on h1 in blue, whose owner alice has registered it; h2 is there. Returns h3's."""
    authority = world.domain.authority
    await authority.create_network(Network(name="blue", vni=42, kind="l3", ipv4="10.0.0.0/24"))
    nves = [world.nve(name) for name in ("h1", "h2", "h3")]
    for each in nves:
        each.host = msgspec.structs.replace(each.host, memory_total_mib=4096)
        if answering:
            answers_questions(each)
        each.connect()
        await each.hears(w.Welcome)
    await world.endpoint("p3", "h3", 3)
    if registered:
        registration = Registration(origin="owner:alice", at_ns=1, signed=SIGNED)
        known = Eligibility(vm="web", registration=registration)
        await authority._keep_known(known)  # noqa: SLF001 - as if he had been heard
    face = Interface(network="blue", mac="02:00:00:00:00:50", ipv4=OLD)
    wish = Vm(name="web", owner="alice", host="h1", state="shutdown", interfaces=(face,))
    await authority.create_vm(wish)
    return nves[2]


async def moved(world: World, keep_s: float, new: str = NEW, to: str = "h2") -> Handover:
    """The whole move, as far as the records go, and then what the daemon does at its end."""
    authority = world.domain.authority
    wish = NewAddresses(network="blue", ipv4=new)
    options = Options(addresses=(wish,), keep_old_s=keep_s)
    number = f"m{len(authority.ended_moves) + 1}"
    record = await authority.begin_move(number, "web", to, options, cold=True)
    ended = msgspec.structs.replace(
        record, phase="closed", outcome="moved", version=record.version + 1
    )
    await authority.commit(ended)
    world.domain._move_changed(ended)  # noqa: SLF001 - as nva.handovers calls it
    return authority.ended_moves[number]


def own(authority: Authority) -> list[str]:
    """All addresses of web."""
    return [a for tsi in authority.cluster.tsis() if tsi.owner == "web" for a in tsi.addresses]


async def up(world: World) -> None:
    """Others have a mapping of a VM that is up only."""
    await world.domain.authority.vm_state("web", "running")


async def hears_of(nve: Nve, beside: tuple[str, ...]) -> None:
    """Wait until the NVE is told of a VM with these addresses beside its own."""
    async with asyncio.timeout(10):
        while True:
            message = await nve._heard.get()  # noqa: SLF001 - a push or an update
            remotes: Any = ()
            if isinstance(message, w.VnUpdate):
                remotes = message.change.remotes
            elif isinstance(message, w.VnPush) and message.intent is not None:
                remotes = message.intent.remotes
            if any((each.ipv4, each.beside) == (NEW, beside) for each in remotes):
                return


async def test_when_the_time_is_over_every_nve_hears_of_it(world: World) -> None:
    peer = await begin(world)
    await moved(world, keep_s=0.5)
    await up(world)
    await hears_of(peer, (OLD,))
    await hears_of(peer, ())
    authority = world.domain.authority
    assert own(authority) == [NEW]
    assert receipt(authority.ended_moves["m1"])["addresses"]["old_ended"] is not None


async def test_the_time_goes_on_over_a_restart_of_the_nva(world: World) -> None:
    """What is due when it comes back is given up at once, what is not is kept until it is."""
    await begin(world)
    await moved(world, keep_s=3600.0)
    domain = await world.restarted()
    await until(lambda: domain._began)  # noqa: SLF001 - it has looked at everything by then
    authority = domain.authority
    assert own(authority) == [NEW, OLD]
    vm = authority.vm("web")
    (face,) = vm.interfaces
    over = tuple(msgspec.structs.replace(f, until_ns=time.time_ns() - 1) for f in face.former)
    face = msgspec.structs.replace(face, former=over)
    vm = msgspec.structs.replace(vm, interfaces=(face,))
    await authority._write({"vm/web": vm})  # noqa: SLF001 - as if an hour had passed
    domain = await world.restarted()
    await until(lambda: domain._began and own(domain.authority) == [NEW])  # noqa: SLF001
    assert receipt(domain.authority.ended_moves["m1"])["addresses"]["old_ended"] is not None


async def test_a_question_for_an_address_on_its_way_out_is_answered(world: World) -> None:
    peer = await begin(world)
    await moved(world, keep_s=3600.0)
    peer.say(w.Query(id=1, network="blue", address=OLD))
    answer = await peer.hears(w.Answer)
    assert answer.mapping is not None
    assert (answer.mapping.ipv4, answer.mapping.beside) == (NEW, (OLD,))


# ------------------------------------------------------------ the name


def with_names(world: World, folder: Path, port: int) -> None:
    """The NVA's settings have a name server."""
    config = world._running_nva.config  # noqa: SLF001
    config = msgspec.structs.replace(config, dns=settings(folder, port))
    world._running_nva.config = world.domain._config = config  # noqa: SLF001


def said_of_the_name(authority: Authority, move: str = "m1") -> str | None:
    record = authority.ended_moves[move]
    return record.readdress.dns if record.readdress is not None else None


@pytest.mark.req("R-27")
async def test_the_name_follows_after_the_move(
    world: World, server: NameServer, tmp_path: Path
) -> None:
    with_names(world, tmp_path, server.port)
    await begin(world)
    await moved(world, keep_s=3600.0)
    await until(lambda: bool(said_of_the_name(world.domain.authority)))
    assert server.records == {("web.example.org.", "A", NEW)}
    await moved(world, keep_s=3600.0, new="10.0.0.70", to="h1")
    await until(lambda: bool(said_of_the_name(world.domain.authority, "m2")))
    assert server.records == {("web.example.org.", "A", "10.0.0.70")}
    asked = server.asked
    record = await world.domain.authority.begin_move("m3", "web", "h2", Options(), cold=True)
    ended = msgspec.structs.replace(record, phase="closed", outcome="moved", version=4)
    await world.domain.authority.commit(ended)
    world.domain._move_changed(ended)  # noqa: SLF001
    assert server.asked == asked, "a move that keeps the addresses has nothing to say"


@pytest.mark.req("R-27")
async def test_a_silent_name_server_changes_nothing_but_a_line_in_the_receipt(
    world: World, server: NameServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-27: the move has ended and its old address is free while the server is still asked."""
    monkeypatch.setattr(names, "TRY_S", 0.05)
    monkeypatch.setattr(names, "TRIES", 10_000)
    server.silent = True
    with_names(world, tmp_path, server.port)
    await begin(world)
    await moved(world, keep_s=0.0)
    await until(lambda: own(world.domain.authority) == [NEW] and server.asked > 0)
    assert said_of_the_name(world.domain.authority) == "", "it is still asked"
    server.silent, server.zone = False, dns.name.from_text("example.com")
    await until(lambda: bool(said_of_the_name(world.domain.authority)))
    assert "not updated: web.example.org.: " in str(said_of_the_name(world.domain.authority))
    assert world.domain.authority.ended_moves["m1"].outcome == "moved"


@pytest.mark.req("R-27")
async def test_a_restarted_nva_asks_again_for_what_it_may_not_have_asked(
    world: World, server: NameServer, tmp_path: Path
) -> None:
    """In the order of the moves."""
    await begin(world)
    server.records = {("web.example.org.", "A", OLD)}
    await moved(world, keep_s=3600.0)  # nobody was asked: as if it had been killed just then
    await moved(world, keep_s=3600.0, new="10.0.0.70", to="h1")
    with_names(world, tmp_path, server.port)
    domain = await world.restarted()
    await until(lambda: domain._began)  # noqa: SLF001
    await until(lambda: all(said_of_the_name(domain.authority, each) for each in ("m1", "m2")))
    assert server.records == {("web.example.org.", "A", "10.0.0.70")}


# ------------------------------------------------------------ the command


async def migrate(world: World, *words: str) -> tuple[int, str, str]:
    """`overland vm migrate web --to h2 --cold`: exit code, output, errors."""
    command = (sys.executable, "-m", "overland", "vm", "migrate", "web", "--to", "h2", "--cold")
    api = ("--api", f"http://{world._running_nva.config.api_listen}", "-o", "json")  # noqa: SLF001
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, *api, *words, stdout=pipe, stderr=pipe)
    out, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), errors.decode()


CHANGE = ("--change-address", f"blue,ipv4={NEW}")


@pytest.mark.req("R-23")
@pytest.mark.req("R-25")
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
async def test_without_the_owners_word_the_command_is_refused(
    world: World, more: tuple[str, ...]
) -> None:
    """R-25: and the refusal says what is missing, and who can give it."""
    await begin(world, registered=False)
    code, _, errors = await migrate(world, *CHANGE, *more)
    assert code == Exit.REFUSED
    assert errors.count("\n") == 1
    assert "its owner alice has not registered" in errors
    assert "(code address_change_not_registered)" in errors
    assert world.domain.authority.cluster.moves == {}


def answers_questions(nve: Nve) -> None:
    """It has every file that it is asked for."""
    heard = nve._link._heard  # noqa: SLF001

    def hear(message: w.FromNva) -> None:
        if isinstance(message, w.FilesQuestion):
            nve.say(w.FilesAnswer(id=message.id, missing=()))
        heard(message)

    nve._link._heard = hear  # noqa: SLF001


async def test_with_it_a_dry_run_says_what_will_not_stay(world: World) -> None:
    await begin(world, answering=True)
    code, out, _ = await migrate(world, *CHANGE, "--dry-run")
    assert code == Exit.DONE
    said = json.loads(out)
    assert said["blockers"] == []
    assert said["flags"] == [f"its address {OLD} in network blue becomes {NEW}"]
    _, out, _ = await migrate(world, "--dry-run")
    assert json.loads(out)["flags"] == []
    assert own(world.domain.authority) == [OLD]


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("--change-address", "blue,mac=02:00:00:00:00:01"), Exit.USAGE, "NAME,ipv4=A,ipv6=A"),
        (("--change-address", "blue", "--keep-old", "soon"), Exit.USAGE, "--keep-old"),
        (("--change-address", "blue"), Exit.REFUSED, "no address is named for network blue"),
        (("--change-address", f"red,ipv4={NEW}"), Exit.REFUSED, "no interface in network red"),
        (("--change-address", "blue,ipv4=10.0.0.3"), Exit.REFUSED, "10.0.0.3 belongs to p3"),
    ],
)
async def test_what_is_wrong_is_one_clear_line(
    world: World, words: tuple[str, ...], code: int, why: str
) -> None:
    await begin(world)
    ended, _, errors = await migrate(world, *words)
    assert (ended, errors.count("\n")) == (code, 1)
    assert errors.startswith("error: ")
    assert why in errors


async def test_what_a_dry_run_answers_makes_the_vm_and_no_former_address(world: World) -> None:
    """`vm create` asks so for the addresses that are told to the lab's guest."""
    await begin(world)
    url = f"http://{world._running_nva.config.api_listen}/v1/vms"  # noqa: SLF001

    def post(**wish: Any) -> Any:
        body = json.dumps({"name": "db", "host": "h1", "dry_run": True, **wish}).encode()
        with urllib.request.urlopen(urllib.request.Request(url, body)) as answer:
            return json.loads(answer.read())

    chosen = await asyncio.to_thread(post, interfaces=[{"network": "blue", "ipv4": None}])
    (face,) = chosen["interfaces"]
    assert face["former"] == []
    stolen = face | {"former": [{"address": OLD, "until_ns": 1 << 62, "move": "m1"}]}
    again = await asyncio.to_thread(post, interfaces=[stolen])
    assert again["interfaces"] == [face]
