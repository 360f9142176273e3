"""R-48: the life of a VM as a table: action, states on the way, and what its interfaces are."""

from __future__ import annotations

from typing import Literal

import msgspec
import pytest

from overland.model.cluster import Endpoint, Interface, Vm, VmState
from overland.model.handover import Handover, Options, Phase, PhaseAt
from overland.model.names import bridge_name, port_name
from overland.model.nve import KernelState, Muted, NveIntent, VnIntent
from overland.nva.authority import Authority, Blocked
from overland.nva.mapping import VnView
from overland.nve.moving import Moving, settle
from overland.nve.render import render
from overland.store.memory import MemoryStore
from tests.core.tables import ROOT, Table, check_table
from tests.core.test_mapping import BLUE, cluster


def tenant(host: str) -> Endpoint:
    face = Interface(network="blue", mac="")
    return Endpoint(name=f"tenant-{host}", host=host, namespace="t", interface=face)


async def domain(*, made: bool = True) -> Authority:
    authority = Authority(MemoryStore(), lambda _: None)
    found = cluster()
    authority.cluster.networks |= found.networks
    authority.cluster.hosts |= {
        name: msgspec.structs.replace(host, memory_total_mib=4096, underlay_mtu=9000)
        for name, host in found.hosts.items()
    }
    authority.cluster.endpoints |= found.endpoints
    if not made:
        await authority.create_endpoint(tenant("h3"))
        return authority
    face = Interface(network="blue", mac="", ipv4="10.0.0.5", ipv6=None)
    await authority.create_vm(Vm(name="web", host="h1", interfaces=(face,)))
    return authority


PAGE = ROOT / "docs" / "explanation" / "life-of-a-vm.md"
PORT, MAC = port_name("web", 0), "02:00:00:00:00:01"


class Edge:
    """One NVE's kernel as a value: what its intent comes to, but for what a move has under way."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.kernel = KernelState()
        self.moving: frozenset[Moving] = frozenset()

    def told(self, view: VnView) -> None:
        vns = (view.intent(self.host),) if view.includes(self.host) else ()
        intent = NveIntent(vns=vns)
        wanted = settle(render(intent), self.kernel, intent, self.moving)
        self.kernel = wanted

    def moves(self, role: Literal["old", "new"], record: Handover) -> None:
        (port,) = record.ports
        self.moving = frozenset(
            {
                Moving(
                    role=role,
                    mac=port.mac,
                    port=port.port,
                    device=port.device,
                    bridge=bridge_name(port.vni),
                    version=record.version,
                )
            }
        )

    def activates(self) -> None:
        """`Activate` opens the port at once; the push that says so may come later."""
        left = self.kernel.muted - {Muted(port=PORT)}
        self.kernel = msgspec.structs.replace(self.kernel, muted=left)

    def tsi(self, view: VnView) -> str:
        """What the kernel makes of the interface."""
        if not any(link.name == PORT for link in self.kernel.links):
            return "init"
        here = view.includes(self.host) and view.own(self.host, "web")
        if not here:
            return "kept by the move"
        return "associated" if Muted(port=PORT) in self.kernel.muted else "activated"


class Walk:
    """A life from its making to its end; each step is a row of the page's table."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self._edges = {host: Edge(host) for host in ("h1", "h2")}
        self._record: Handover | None = None
        self.rows: Table = {}

    def _note(self, what: str) -> None:
        view = VnView(self._authority.cluster, BLUE)
        for edge in self._edges.values():
            edge.told(view)
        vm = self._authority.find_vm("web")
        told = view.intent("h3").remotes
        seen = [each for each in told if each.mac == MAC]
        at = {"192.0.2.1": "h1", "192.0.2.2": "h2"}
        peers = ", ".join(at[r.nve] + (", in transit" if r.in_transit else "") for r in seen)
        self.rows[("VM", what)] = vm.state if vm is not None else "gone"
        for host, edge in self._edges.items():
            own = view.own(host, "web") if view.includes(host) else ()
            self.rows[(f"NVA, {host}", what)] = own[0].state if own else "init"
            self.rows[(f"NVE {host}", what)] = edge.tsi(view)
        self.rows[("peers send to", what)] = peers or "nobody"

    async def state(self, what: str, state: VmState) -> None:
        await self._authority.vm_state("web", state)
        self._note(what)

    async def begin(self, what: str, to: str, *, cold: bool = False) -> None:
        self._record = await self._authority.begin_move(what, "web", to, Options(), cold=cold)
        self._note(what)  # a prepare order waits for that (HO-22)
        if not cold:  # a cold one has no part on the edge (ADR 0015)
            self._edges[self._record.old_nve].moves("old", self._record)
            self._edges[to].moves("new", self._record)

    async def phase(self, what: str, phase: Phase) -> None:
        assert self._record is not None
        entered = (*self._record.phases, PhaseAt(phase=phase, at_ns=1))
        self._record = msgspec.structs.replace(self._record, phase=phase, phases=entered)
        if phase == "committed":
            version = self._record.version + 1
            self._record = msgspec.structs.replace(self._record, version=version, outcome="moved")
            await self._authority.commit(self._record)
            if self._record.mode != "cold":
                self._edges[self._record.new_nve].activates()
        else:
            await self._authority.journal(self._record)
        if phase == "closed":
            for edge in self._edges.values():
                edge.moving = frozenset()
        self._note(what)

    async def create(self) -> None:
        face = Interface(network="blue", mac=MAC, ipv4="10.0.0.5")
        await self._authority.create_vm(Vm(name="web", host="h1", interfaces=(face,)))
        self._note("create")

    async def delete(self) -> None:
        await self._authority.delete_vm("web")
        self._note("delete")


@pytest.mark.req("R-48")
@pytest.mark.req("H-03")
@pytest.mark.req("H-07")
async def test_the_whole_life_is_what_the_page_says_step_by_step() -> None:
    """R-48: create, start, run, pause, suspend, resume, migrate, stop, crash, delete.

    Requirements 3.3, at the NVA (what NVEs are told) and at the NVEs (what their kernels have):
    associated before the VM runs, activated when it does, at the new NVE early and activated at the
    commit, init when it is off.
    """
    authority = await domain(made=False)
    walk = Walk(authority)
    await walk.create()
    await walk.state("start", "running")
    await walk.state("pause", "paused")
    await walk.state("resume", "running")
    await walk.state("suspend", "suspending")
    await walk.state("suspended", "suspended")
    await walk.state("resume from its state", "resuming")
    await walk.state("runs on", "running")
    await walk.begin("migrate hot", "h2")
    await walk.phase("copied", "precopy")
    await walk.phase("committed", "committed")
    await walk.phase("closed", "closed")
    await walk.begin("migrate cold", "h1", cold=True)
    await walk.phase("others drop", "staged")
    await walk.phase("stopped", "paused")
    await walk.phase("committed, cold", "committed")
    await walk.phase("in use again", "converging")
    await walk.phase("closed, cold", "closed")
    await walk.state("crash", "crashed")
    await walk.state("start again", "preparing")
    await walk.state("runs", "running")
    await walk.state("stop", "shutdown")
    await walk.delete()
    check_table("life", walk.rows, PAGE, "step")


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
