"""R-48: the life of a VM as a table: action, states on the way, and what its interfaces are."""

from __future__ import annotations

import msgspec
import pytest

from overland.model.cluster import Interface, Vm, VmState
from overland.model.handover import Options
from overland.model.nve import VnIntent
from overland.nva.authority import Authority, Blocked
from overland.nva.mapping import VnView
from overland.store.memory import MemoryStore
from tests.core.test_mapping import BLUE, cluster

LIFE: tuple[tuple[str, VmState, str, bool], ...] = (
    ("create", "preparing", "activated", True),
    ("start", "running", "activated", True),
    ("pause", "paused", "activated", True),
    ("resume", "running", "activated", True),
    ("suspend", "suspending", "activated", True),
    ("suspended", "suspended", "associated", False),
    ("resume", "resuming", "activated", True),
    ("resumed", "running", "activated", True),
    ("stop", "shutdown", "associated", False),
    ("start", "preparing", "activated", True),
    ("started", "running", "activated", True),
    ("migrate", "migrating", "activated", True),
    ("migrated", "running", "activated", True),
    ("crash", "crashed", "associated", False),
)
"""Requirements 3.3: RFC 7666 state, TSI state (RFC 8394), and whether others have a mapping."""


async def domain() -> Authority:
    authority = Authority(MemoryStore(), lambda _: None)
    found = cluster()
    authority.cluster.networks |= found.networks
    authority.cluster.hosts |= {
        name: msgspec.structs.replace(host, memory_total_mib=4096, underlay_mtu=9000)
        for name, host in found.hosts.items()
    }
    authority.cluster.endpoints |= found.endpoints
    face = Interface(network="blue", mac="", ipv4="10.0.0.5", ipv6=None)
    await authority.create_vm(Vm(name="web", host="h1", interfaces=(face,)))
    return authority


@pytest.mark.req("R-48")
async def test_the_whole_life_is_shown_by_the_states_of_its_interfaces() -> None:
    """R-48: create, start, pause, resume, suspend, resume, stop, start, migrate, crash, delete."""
    authority = await domain()
    for what, state, tsi, mapped in LIFE:
        await authority.vm_state("web", state)
        view = VnView(authority.cluster, BLUE)
        assert [each.state for each in view.intent("h1").tsis] == [tsi], what
        assert bool(view.intent("h2").remotes) is mapped, what
    await authority.delete_vm("web")
    assert not VnView(authority.cluster, BLUE).includes("h1"), "Init: nothing is left"


@pytest.mark.req("R-48")
async def test_a_cold_move_shows_migrating_and_ends_as_it_began() -> None:
    authority = await domain()
    await authority.vm_state("web", "paused")
    record = await authority.begin_move("m1", "web", "h2", Options(), cold=True)
    assert (authority.vm("web").state, record.ends_as) == ("migrating", "paused")
    ended = msgspec.structs.replace(record, phase="aborted", outcome="aborted")
    await authority.journal(ended)
    assert (authority.vm("web").state, authority.vm("web").move) == ("paused", None)


@pytest.mark.req("R-34")
async def test_with_the_commit_a_vm_at_rest_is_free_again() -> None:
    """Nothing has to converge: the commit ends the move, and no later write sets the VM free."""
    authority = await domain()
    await authority.vm_state("web", "shutdown")
    record = await authority.begin_move("m1", "web", "h2", Options(), cold=True)
    ended = msgspec.structs.replace(
        record, phase="closed", outcome="moved", version=record.version + 1
    )
    await authority.commit(ended)
    vm = authority.vm("web")
    assert (vm.host, vm.state, vm.move, vm.version) == ("h2", "shutdown", None, 2)
    assert authority.move("m1") == ended
    assert not await authority.open_moves()


def remote(authority: Authority) -> tuple[str | None, str | None, int]:
    intent: VnIntent = VnView(authority.cluster, BLUE).intent("h2")
    (found,) = intent.remotes
    return found.ipv4, found.ipv6, found.version


@pytest.mark.req("H-04")
async def test_addresses_of_a_running_vm_are_added_changed_and_removed() -> None:
    """H-04: mapping and neighbours follow, the version is raised, the interface stays activated."""
    authority = await domain()
    await authority.vm_state("web", "running")
    first = remote(authority)
    assert first[0] == "10.0.0.5"
    await authority.change_addresses("web", "blue", {"ipv4": "10.0.0.77"})
    assert remote(authority) == ("10.0.0.77", first[1], 2)
    await authority.change_addresses("web", "blue", {"ipv6": None})
    assert remote(authority) == ("10.0.0.77", None, 3)
    await authority.change_addresses("web", "blue", {"ipv6": "fd00::77"})
    assert remote(authority) == ("10.0.0.77", "fd00::77", 4)
    assert [each.state for each in VnView(authority.cluster, BLUE).intent("h1").tsis] == [
        "activated"
    ]


@pytest.mark.parametrize(
    ("network", "changes", "code"),
    [
        ("grey", {"ipv4": "10.0.0.9"}, "unknown_interface"),
        ("blue", {"ipv4": "10.9.0.9"}, "address_outside"),
        ("blue", {"ipv4": "ten"}, "malformed"),
    ],
)
async def test_an_address_that_cannot_be_is_refused(
    network: str, changes: dict[str, str | None], code: str
) -> None:
    authority = await domain()
    with pytest.raises(Blocked) as blocked:
        await authority.change_addresses("web", network, changes)
    assert [each.code for each in blocked.value.refusals] == [code]
    assert authority.vm("web").version == 1
