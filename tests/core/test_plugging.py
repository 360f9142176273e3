"""What the hypervisor adapter asks of QEMU for an interface that comes or goes."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from qemu.qmp import QMPClient

from overland.hypervisor import qemu as qemu_adapter
from overland.hypervisor.command import qemu_command
from overland.hypervisor.images import Images
from overland.hypervisor.qemu import QemuHypervisor, _Machine
from overland.model.cluster import Interface, Vm, ports_of
from overland.ports import HypervisorFailure, Unplugged

FIRST = Interface(network="blue", mac="02:00:00:00:00:01", slot=0)
SECOND = Interface(network="red", mac="02:00:00:00:00:02", slot=1)
BARE = Vm(name="web", host="h1", state="running", interfaces=(FIRST,), machine="pc-i440fx-7.2")


def changing(change: str) -> Vm:
    second = msgspec.convert(msgspec.to_builtins(SECOND) | {"change": change}, Interface)
    return msgspec.structs.replace(BARE, interfaces=(FIRST, second))


class FakeQemu:
    """The devices of one process; its guest lets go at once, or never, or QEMU refuses."""

    def __init__(self, *, refuses: str = "", lets_go: bool = True) -> None:
        self.devices = {"nic0": {"mac": FIRST.mac}}
        self.backends = {"net0"}
        self.asked: list[str] = []
        self._refuses = refuses
        self.lets_go = lets_go
        self.machine: _Machine
        self.host: QemuHypervisor

    async def execute(self, command: str, arguments: Any = None, *, oob: bool = False) -> Any:
        del oob
        self.asked.append(command)
        if command == self._refuses:
            raise HypervisorFailure("QEMU says no")
        match command:
            case "qom-list":
                return [{"name": "type"}, *({"name": name} for name in self.devices)]
            case "netdev_add":
                self.backends.add(arguments["id"])
            case "netdev_del":
                self.backends.discard(arguments["id"])
            case "device_add":
                assert arguments["netdev"] in self.backends
                self.devices[arguments["id"]] = arguments
            case "device_del" if self.lets_go:
                await self.deleted(arguments["id"])
            case _:
                pass
        return {}

    async def deleted(self, name: str) -> None:
        del self.devices[name]
        for data in ({"path": f"/machine/peripheral/{name}/virtio-backend"}, {"device": name}):
            event = {"event": "DEVICE_DELETED", "data": data}
            stamp = {"timestamp": {"seconds": 1, "microseconds": 0}}
            await self.host._heard(self.machine, event | stamp)  # noqa: SLF001 - as it hears


class Taps:
    """Any descriptor will do."""

    def fd_for_child(self, name: str) -> int:
        del name
        return 0

    def adopt(self, name: str, pid: int) -> None: ...


Start = Callable[[FakeQemu], QemuHypervisor]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    ours, theirs = socket.socketpair()

    def runs(qemu: FakeQemu) -> QemuHypervisor:
        images = Images(tmp_path / "disks", tmp_path / "images")
        host = QemuHypervisor(tmp_path, Taps(), images, tmp_path / "tls")
        qemu.machine = _Machine("web", os.getpid(), cast("QMPClient", qemu), ours)
        qemu.host = host
        host._machines["web"] = qemu.machine  # noqa: SLF001 - as if it had started it
        return host

    with ours, theirs:
        yield runs


@pytest.mark.req("H-03")
async def test_it_gets_the_device_that_its_copy_will_be_started_with(
    start: Start, tmp_path: Path
) -> None:
    """A hot move needs the same devices at the same places on both hosts."""
    qemu = FakeQemu()
    host, vm = start(qemu), changing("adding")
    for _ in range(2):  # it is content with being done
        await host.fit(vm, ports_of(vm))
    assert await host.plugged("web") == {0, 1}
    whole = msgspec.structs.replace(BARE, interfaces=(FIRST, SECOND))
    command = qemu_command(
        "qemu", whole, "tcg", [7, 8], tmp_path, files=[], tls=None, firmware=None, incoming=True
    )
    started = [json.loads(word) for word in command if '"virtio-net-pci"' in word]
    assert started[1] == qemu.devices["nic1"]
    assert [device["addr"] for device in started] == ["0x10", "0x11"]


@pytest.mark.req("H-03")
@pytest.mark.parametrize("step", ["getfd", "netdev_add", "device_add"])
async def test_what_qemu_refuses_leaves_nothing(start: Start, step: str) -> None:
    qemu = FakeQemu(refuses=step)
    host, vm = start(qemu), changing("adding")
    with pytest.raises(HypervisorFailure, match="says no"):
        await host.fit(vm, ports_of(vm))
    assert (set(await host.plugged("web")), qemu.backends) == ({0}, {"net0"})


@pytest.mark.req("H-07")
async def test_what_the_guest_lets_go_of_is_gone_with_all_behind_it(start: Start) -> None:
    qemu = FakeQemu()
    host, vm = start(qemu), changing("adding")
    await host.fit(vm, ports_of(vm))
    for _ in range(2):
        await host.fit(changing("removing"), ports_of(vm))
    assert (set(await host.plugged("web")), qemu.backends) == ({0}, {"net0"})
    assert await anext(host.events()) == ("web", Unplugged(slot=1))


@pytest.mark.req("H-03")
async def test_a_guest_that_does_not_let_go_holds_nobody_up(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked, waited for, and keeps what it has; what it says later is told as it is."""
    monkeypatch.setattr(qemu_adapter, "UNPLUG_LIMIT_S", 0.05)
    qemu = FakeQemu(lets_go=False)
    host, vm = start(qemu), changing("adding")
    await host.fit(vm, ports_of(vm))
    with pytest.raises(HypervisorFailure, match="no word from the guest"):
        await host.fit(changing("removing"), ports_of(vm))
    assert (set(await host.plugged("web")), qemu.backends) == ({0, 1}, {"net0", "net1"})
    await qemu.deleted("nic1")
    async with asyncio.timeout(5):
        assert await anext(host.events()) == ("web", Unplugged(slot=1))
    await host.fit(vm, ports_of(vm))
    assert await host.plugged("web") == {0, 1}, "what was left behind it is in nobody's way"


MACHINES = """Supported machines are:
pc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-7.2)
pc-i440fx-2.12       Standard PC (i440FX + PIIX, 1996)
pc-i440fx-2.2        Standard PC (i440FX + PIIX, 1996)
pc-i440fx-7.2        Standard PC (i440FX + PIIX, 1996) (default)
pc-i440fx-jammy      Ubuntu 22.04 PC (i440FX + PIIX, 1996)
q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)
pc-q35-8.0           Standard PC (Q35 + ICH9, 2009)
none                 empty machine
"""


async def test_new_vms_get_a_machine_that_takes_interfaces_and_old_ones_keep_theirs(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is taken for new VMs (`Authority`); the others are for those that are on them."""
    host = start(FakeQemu())

    async def ask(*_: str) -> str:
        return MACHINES

    monkeypatch.setattr(host, "_ask", ask)
    found = await host._machine_types()  # noqa: SLF001 - what it tells of this host
    numbers = ("7.2", "2.12", "2.2")
    assert found == (*(f"pc-i440fx-{number}" for number in numbers), "pc-q35-8.0")


@pytest.mark.parametrize(
    ("machine", "incoming", "asked"),
    [
        ("pc-i440fx-7.2", False, False),
        ("pc-i440fx-7.2", True, False),
        ("pc-q35-7.2", False, False),
        ("pc-q35-7.2", True, True),
    ],
)
def test_no_guest_is_asked_to_announce_itself_unless_it_began_with_that(
    tmp_path: Path, machine: str, *, incoming: bool, asked: bool
) -> None:
    """QEMU 7.2 ends when one that can be asked resets its device after a move."""
    vm = msgspec.structs.replace(BARE, machine=machine)
    command = qemu_command(
        "qemu", vm, "tcg", [7], tmp_path, files=[], tls=None, firmware=None, incoming=incoming
    )
    (device,) = [json.loads(word) for word in command if '"virtio-net-pci"' in word]
    assert device["guest_announce"] is asked
