"""Interfaces of a VM that come and go: what is recorded, told and refused, and what ends it."""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec
import pytest

from overland.model.cluster import (
    SLOTS,
    Interface,
    Network,
    Refused,
    Vm,
    VmState,
    numbered,
    ports_of,
)
from overland.model.handover import Options
from overland.model.names import port_name
from overland.model.nve import TsiIntent
from overland.nva.authority import Authority, Blocked
from overland.nva.mapping import VnView
from overland.nva.plugging import Plugging
from overland.nva.rules import action_refused
from overland.ports import StoreFailure
from overland.store.memory import MemoryStore
from tests.core.test_faults import until
from tests.core.test_mapping import cluster

RED = Network(name="red", vni=43, ipv4="10.43.0.0/24")
IN_RED = Interface(network="red", mac="")


async def domain(state: VmState = "running", machine: str = "pc-i440fx-7.2") -> Authority:
    """VM web on h1, in blue; red has a tenant on h3."""
    authority = Authority(MemoryStore(), lambda _: None)
    found = cluster()
    authority.cluster.networks |= found.networks | {"red": RED}
    authority.cluster.hosts |= {
        name: msgspec.structs.replace(
            host, memory_total_mib=4096, underlay_mtu=9000, machine_types=(machine,)
        )
        for name, host in found.hosts.items()
    }
    authority.cluster.endpoints |= found.endpoints
    face = Interface(network="blue", mac="", ipv4="10.0.0.5")
    await authority.create_vm(Vm(name="web", host="h1", interfaces=(face,)))
    await authority.vm_state("web", state)
    return authority


def tsis(authority: Authority, network: str = "red", host: str = "h1") -> list[TsiIntent]:
    view = VnView(authority.cluster, authority.cluster.networks[network])
    return list(view.intent(host).tsis) if view.includes(host) else []


def told_to(authority: Authority, host: str, network: str = "red") -> list[str]:
    """The MACs that `host` is told to be elsewhere."""
    view = VnView(authority.cluster, authority.cluster.networks[network])
    return [each.mac for each in view.intent(host).remotes] if view.includes(host) else []


def codes(blocked: pytest.ExceptionInfo[Blocked]) -> set[str]:
    assert all(each.hint for each in blocked.value.refusals), "each with its remedy"
    return {each.code for each in blocked.value.refusals}


# ---------------------------------------------------------------- what is recorded and told


@pytest.mark.req("H-03")
@pytest.mark.parametrize("state", ["running", "paused"])
async def test_an_interface_is_associated_before_it_is_there_and_activated_then(
    state: VmState,
) -> None:
    """Requirements 3.3: staged, its port made and closed, told to no peer; then in use."""
    authority = await domain(state)
    vm = await authority.add_interface("web", IN_RED)
    (mine,) = tsis(authority)
    assert (mine.state, mine.ipv4) == ("associated", "10.43.0.2")
    assert told_to(authority, "h3") == []
    assert [each.state for each in tsis(authority, "blue")] == ["activated"], "the other goes on"
    await authority.end_change(vm, done=True)
    assert [each.state for each in tsis(authority)] == ["activated"]
    assert told_to(authority, "h3") == [mine.mac]
    assert authority.vm("web").version == 3, "each step is told apart in what NVEs acknowledge"


@pytest.mark.req("H-03")
async def test_what_could_not_be_added_leaves_nothing() -> None:
    authority = await domain()
    before = authority.vm("web")
    vm = await authority.add_interface("web", IN_RED)
    await authority.end_change(vm, done=False)
    after = authority.vm("web")
    assert [each.network for each in after.interfaces] == ["blue"]
    assert ports_of(after) == ports_of(before)
    assert tsis(authority) == []


@pytest.mark.req("H-03")
@pytest.mark.req("H-07")
async def test_an_interface_is_in_use_until_its_device_is_gone_and_then_nothing_is_left() -> None:
    """H-07: with the interface go its addresses, its mapping and its port."""
    authority = await domain()
    await authority.end_change(await authority.add_interface("web", IN_RED), done=True)
    vm = await authority.remove_interface("web", "red")
    assert [each.state for each in tsis(authority)] == ["activated"]
    assert told_to(authority, "h3") == [vm.interfaces[1].mac]
    await authority.end_change(vm, done=True)
    assert (tsis(authority), told_to(authority, "h3")) == ([], [])
    again = await authority.add_interface("web", IN_RED)
    assert again.interfaces[1].ipv4 == "10.43.0.2", "its address is free again"


@pytest.mark.req("H-03")
async def test_a_guest_that_does_not_let_go_keeps_it_as_it_was() -> None:
    authority = await domain()
    await authority.end_change(await authority.add_interface("web", IN_RED), done=True)
    there = tsis(authority)
    await authority.end_change(await authority.remove_interface("web", "red"), done=False)
    assert tsis(authority) == there
    assert all(each.change is None for each in authority.vm("web").interfaces)


@pytest.mark.req("H-07")
async def test_what_a_guest_lets_go_of_by_itself_leaves_the_record() -> None:
    """Late, after it was given up, or because it was told so inside."""
    authority = await domain()
    await authority.end_change(await authority.add_interface("web", IN_RED), done=True)
    await authority.let_go("web", "h2", 1)
    assert len(authority.vm("web").interfaces) == 2, "an old host's word is of no account"
    await authority.let_go("web", "h1", 1)
    assert (tsis(authority), told_to(authority, "h3")) == ([], [])
    await authority.let_go("web", "h1", 0)
    assert len(authority.vm("web").interfaces) == 1, "the last one comes back with its next start"


@pytest.mark.req("H-07")
@pytest.mark.parametrize("state", ["shutdown", "crashed"])
async def test_of_a_vm_that_is_off_only_the_record_changes(state: VmState) -> None:
    authority = await domain(state)
    vm = await authority.add_interface("web", IN_RED)
    assert [each.change for each in vm.interfaces] == [None, None]
    assert [each.state for each in tsis(authority)] == ["associated"] * (state == "crashed")
    await authority.vm_state("web", "running")
    assert [each.state for each in tsis(authority)] == ["activated"]
    await authority.vm_state("web", state)
    vm = await authority.remove_interface("web", vm.interfaces[0].mac.upper())
    assert [each.network for each in vm.interfaces] == ["red"]


@pytest.mark.req("H-07")
@pytest.mark.parametrize("change", ["adding", "removing"])
async def test_what_was_on_its_way_when_the_vm_ended_is_out(change: str) -> None:
    """No process, no device: neither is there any more, and the next start is as recorded."""
    authority = await domain()
    vm = await authority.add_interface("web", IN_RED)
    if change == "removing":
        await authority.end_change(vm, done=True)
        vm = await authority.remove_interface("web", "red")
    await authority.vm_state("web", "crashed", "QEMU ended")
    assert [each.network for each in authority.vm("web").interfaces] == ["blue"]
    await authority.end_change(vm, done=True)
    assert [each.network for each in authority.vm("web").interfaces] == ["blue"], "it is too late"


@pytest.mark.req("H-03")
async def test_an_interface_keeps_its_slot_and_port_whatever_comes_and_goes() -> None:
    """Its place on the bus, its port and its device are the same on the host it moves to."""
    authority = await domain("shutdown")
    await authority.add_interface("web", IN_RED)
    vm = await authority.remove_interface("web", "blue")
    assert (numbered(vm)[0][0], ports_of(vm)) == (1, [port_name("web", 1)])
    await authority.vm_state("web", "running")
    record = await authority.begin_move("m1", "web", "h2", Options())
    assert [each.port for each in record.ports] == [port_name("web", 1)]


def test_a_record_from_before_slots_has_them_by_its_order() -> None:
    face = {"network": "blue", "mac": "02:00:00:00:00:01", "ipv4": None, "ipv6": None}
    old = {"name": "web", "host": "h1", "interfaces": [face, face | {"network": "red"}]}
    vm = msgspec.convert(old, Vm)
    assert [slot for slot, _ in numbered(vm)] == [0, 1]
    assert ports_of(vm) == [port_name("web", 0), port_name("web", 1)]


@pytest.mark.req("H-04")
async def test_an_address_changes_for_a_vm_in_several_networks() -> None:
    """Its version governs all its addresses, so all its networks are told of the next one."""
    told: list[frozenset[str]] = []
    authority = await domain("shutdown")
    await authority.add_interface("web", IN_RED)
    authority._changed = told.append  # noqa: SLF001 - what `__init__` was given
    await authority.change_addresses("web", "red", {"ipv4": "10.43.0.77"})
    assert told == [frozenset({"blue", "red"})]


# ---------------------------------------------------------------- what is refused


@pytest.mark.req("H-03")
@pytest.mark.parametrize(
    ("state", "wish", "code"),
    [
        ("running", {"network": "grey"}, "unknown_network"),
        ("running", {"ipv4": "10.0.0.9"}, "address_outside"),
        ("running", {"network": "blue", "ipv4": "10.0.0.5"}, "address_taken"),
        ("suspended", {}, "suspended"),
        ("resuming", {}, "wrong_state"),
    ],
)
async def test_an_interface_that_cannot_be_added_is_refused(
    state: VmState, wish: dict[str, str], code: str
) -> None:
    authority = await domain(state)
    face = msgspec.convert(msgspec.to_builtins(IN_RED) | wish, Interface)
    with pytest.raises(Blocked) as blocked:
        await authority.add_interface("web", face)
    assert codes(blocked) == {code}
    assert authority.vm("web").version == 1


async def test_a_mac_that_the_vm_has_is_refused_in_any_network() -> None:
    authority = await domain()
    mac = authority.vm("web").interfaces[0].mac
    with pytest.raises(Blocked) as blocked:
        await authority.add_interface("web", msgspec.structs.replace(IN_RED, mac=mac))
    assert codes(blocked) == {"address_taken"}


async def test_there_is_room_for_so_many() -> None:
    authority = await domain("shutdown")
    for _ in range(SLOTS - 1):
        await authority.add_interface("web", IN_RED)
    with pytest.raises(Blocked) as blocked:
        await authority.add_interface("web", IN_RED)
    assert codes(blocked) == {"no_slot"}
    many = Vm(name="many", host="h1", interfaces=(IN_RED,) * (SLOTS + 1))
    with pytest.raises(Blocked) as blocked:
        await authority.create_vm(many)
    assert "no_slot" in {each.code for each in blocked.value.refusals}


@pytest.mark.parametrize(
    ("state", "which", "code"),
    [
        ("running", "grey", "unknown_interface"),
        ("running", "red", "ambiguous"),
        ("paused", "blue", "guest_paused"),
        ("suspended", "blue", "suspended"),
    ],
)
async def test_an_interface_that_cannot_be_removed_is_refused(
    state: VmState, which: str, code: str
) -> None:
    authority = await domain("shutdown")
    for _ in range(2):
        await authority.add_interface("web", IN_RED)
    await authority.vm_state("web", state)
    with pytest.raises(Blocked) as blocked:
        await authority.remove_interface("web", which)
    assert codes(blocked) == {code}


async def test_the_last_interface_stays() -> None:
    authority = await domain()
    with pytest.raises(Blocked) as blocked:
        await authority.remove_interface("web", "blue")
    assert codes(blocked) == {"last_interface"}


async def test_a_machine_from_before_takes_none_while_it_runs() -> None:
    authority = await domain(machine="pc-q35-7.2")
    with pytest.raises(Blocked) as blocked:
        await authority.add_interface("web", IN_RED)
    assert codes(blocked) == {"not_pluggable"}
    await authority.vm_state("web", "shutdown")
    await authority.add_interface("web", IN_RED)


async def test_nothing_is_plugged_where_nobody_is_to_do_it() -> None:
    authority = await domain()
    authority.host_changed("h1", ready=False)
    with pytest.raises(Blocked) as blocked:
        await authority.add_interface("web", IN_RED)
    assert codes(blocked) == {"host_not_ready"}


@pytest.mark.req("H-03")
async def test_a_move_blocks_a_change_and_a_change_a_move() -> None:
    authority = await domain()
    for cold in (False, True):
        vm = await authority.add_interface("web", IN_RED)
        with pytest.raises(Blocked) as blocked:
            await authority.begin_move("m1", "web", "h2", Options(), cold=cold)
        assert codes(blocked) == {"interface_change_in_progress"}
        await authority.end_change(vm, done=False)
    vm = await authority.add_interface("web", IN_RED)
    for wish in (authority.add_interface("web", IN_RED), authority.remove_interface("web", "blue")):
        with pytest.raises(Blocked) as blocked:
            await wish
        assert codes(blocked) == {"interface_change_in_progress"}
    refused = action_refused(authority.vm("web"), "suspend")
    assert isinstance(refused, Refused)
    assert refused.code == "interface_change_in_progress"
    await authority.end_change(vm, done=True)
    assert action_refused(authority.vm("web"), "suspend") is None
    await authority.begin_move("m1", "web", "h2", Options())
    for wish in (authority.add_interface("web", IN_RED), authority.remove_interface("web", "red")):
        with pytest.raises(Blocked) as blocked:
            await wish
        assert codes(blocked) == {"move_in_progress"}
    await authority.let_go("web", "h1", 1)
    assert len(authority.vm("web").interfaces) == 2, "what moves keeps what its copy has"


# ---------------------------------------------------------------- who carries it out


class Nves:
    """NVEs that are there, or not, and answer as they are told."""

    def __init__(self, *answers: str | None) -> None:
        self.connected = True
        self.associated = True
        self.answers = list(answers)
        self.asked: list[Vm] = []
        self.silent = asyncio.Event()

    def is_connected(self, host: str) -> bool:
        assert host == "h1"
        return self.connected

    async def is_associated(self, vm: Vm) -> bool:
        del vm
        return self.associated

    async def fit(self, vm: Vm) -> str | None:
        self.asked.append(vm)
        if not self.answers:
            await self.silent.wait()
        return self.answers.pop(0)


async def wish(authority: Authority, kind: Literal["adding", "removing"] = "adding") -> Vm:
    if kind == "adding":
        return await authority.add_interface("web", IN_RED)
    await authority.end_change(await authority.add_interface("web", IN_RED), done=True)
    return await authority.remove_interface("web", "red")


def networks(authority: Authority) -> list[str]:
    assert all(each.change is None for each in authority.vm("web").interfaces)
    return [each.network for each in authority.vm("web").interfaces]


@pytest.mark.req("H-03")
@pytest.mark.parametrize(
    ("kind", "answer", "left"),
    [
        ("adding", "", ["blue", "red"]),
        ("adding", "QEMU says no", ["blue"]),
        ("removing", "", ["blue"]),
        ("removing", "no word from the guest", ["blue", "red"]),
    ],
)
async def test_a_change_is_whole_or_not_at_all(
    kind: Literal["adding", "removing"], answer: str, left: list[str]
) -> None:
    authority = await domain()
    vm = await wish(authority, kind)
    plugging = Plugging(authority, Nves(answer))
    assert await plugging.carried_out(vm) == answer
    assert networks(authority) == left


@pytest.mark.req("H-03")
async def test_a_port_that_does_not_come_gets_no_device() -> None:
    authority = await domain()
    nves = Nves()
    nves.associated = False
    why = await Plugging(authority, nves).carried_out(await wish(authority))
    assert "not associated" in why
    assert (nves.asked, networks(authority)) == ([], ["blue"])


@pytest.mark.parametrize("kind", ["adding", "removing"])
async def test_a_killed_nva_is_followed_by_one_that_finishes(
    kind: Literal["adding", "removing"],
) -> None:
    """The record says what is wanted; the order may have been carried out or not."""
    authority = await domain()
    vm = await wish(authority, kind)
    killed = asyncio.create_task(Plugging(authority, first := Nves()).carried_out(vm))
    await until(lambda: bool(first.asked))
    killed.cancel()
    nves = Nves("")
    Plugging(authority, nves).back("h1")
    await until(lambda: authority.vm("web").version > vm.version)
    assert (nves.asked, networks(authority)) == ([vm], ["blue", "red"][: 2 - (kind == "removing")])


async def test_an_nve_that_goes_away_finishes_when_it_is_back() -> None:
    authority = await domain()
    vm = await wish(authority)
    nves = Nves()
    nves.connected = False
    plugging = Plugging(authority, nves)
    assert "goes on when that is back" in await plugging.carried_out(vm)
    assert authority.vm("web") == vm, "nobody knows what it has done"
    nves.connected, nves.answers = True, [None, ""]
    plugging.back("h1")
    await until(lambda: authority.vm("web").version > vm.version)
    assert (nves.asked, networks(authority)) == ([vm, vm], ["blue", "red"])


async def test_a_restarted_nve_is_asked_at_once() -> None:
    """Nobody waits for the answer of one that was killed."""
    authority = await domain()
    vm = await wish(authority)
    nves = Nves()
    plugging = Plugging(authority, nves)
    task = asyncio.create_task(plugging.carried_out(vm))
    await until(lambda: nves.asked == [vm])
    nves.answers.append("")
    plugging.back("h1")
    assert await task == ""
    assert (nves.asked, networks(authority)) == ([vm, vm], ["blue", "red"])


async def test_a_full_store_is_written_as_soon_as_it_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    authority = await domain()
    vm = await wish(authority)
    end, refusals = authority.end_change, iter([True, False])

    async def sometimes(vm: Vm, *, done: bool) -> None:
        if next(refusals):
            raise StoreFailure("store: disk is full")
        await end(vm, done=done)

    monkeypatch.setattr(authority, "end_change", sometimes)
    monkeypatch.setattr("overland.nva.plugging.RETRY_S", 0.0)
    assert await Plugging(authority, Nves("", "")).carried_out(vm) == ""
    assert networks(authority) == ["blue", "red"]


async def test_a_vm_that_ends_meanwhile_ends_the_change() -> None:
    authority = await domain()
    vm = await wish(authority)
    nves = Nves()
    task = asyncio.create_task(Plugging(authority, nves).carried_out(vm))
    await until(lambda: bool(nves.asked))
    await authority.vm_state("web", "crashed")
    nves.answers.append("QEMU of web ended")
    nves.silent.set()
    assert await task == "QEMU of web ended"
    assert networks(authority) == ["blue"]
