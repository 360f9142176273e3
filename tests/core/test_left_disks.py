"""Disks that stay behind (pure): who may write an image when, who is told, and what is refused."""

from __future__ import annotations

import msgspec
import pytest

from overland.mobility import cold, coordinator
from overland.mobility import messages as m
from overland.model.cluster import Disk, DiskState, Export, Host, Vm, left_at, seen_from
from overland.model.handover import DiskChoice, Handover
from overland.model.receipt import receipt
from overland.nva import storage
from overland.nva.cluster import Cluster
from tests.core.cold_moves import ColdConversation
from tests.core.cold_moves import cold as cold_record
from tests.core.conversation import Conversation
from tests.core.moves import LEAVING, NEW, OLD, PEER, VM, planned
from tests.core.test_conversation import golden
from tests.core.test_storage import NOTHING, THERE, codes

FAR = "h4"
"""A host that is neither old nor new nor a peer."""

AWAY = msgspec.structs.replace(
    VM, disks=(Disk(path="data", kind="left", size_bytes=100, at=FAR, since=1),)
)
"""A VM whose disk stayed on a third host in an earlier move."""


def disk_of(vm: Vm) -> Disk:
    return vm.disks[0]


# ---------------------------------------------------------------- the records


def after(vm: Vm, to: str, version: int, choice: DiskChoice = "declared") -> Vm:
    """`vm` as its record says after a committed move to `to`."""
    moving = storage.chosen(vm, choice, [THERE] * len(vm.disks))
    record = msgspec.structs.replace(
        planned(moving), old_nve=vm.host, new_nve=to, version=version, phase="committed"
    )
    disks = storage.after_move(vm, record)
    return msgspec.structs.replace(vm, host=to, version=version, disks=disks)


@pytest.mark.req("R-53")
@pytest.mark.req("R-14")
def test_an_image_stays_at_its_first_host_and_is_offered_under_the_newest_version_only() -> None:
    vm = msgspec.structs.replace(VM, disks=(Disk(path="data", kind="left"),))
    for to, version, offered in (("h2", 2, True), ("h3", 3, True), ("h1", 4, False)):
        vm = after(vm, to, version)
        found = storage.exports(Cluster(vms={vm.name: vm}), "h1")
        expected = Export(vm=vm.name, index=0, disk=disk_of(vm), to=to, version=version)
        assert found == ((expected,) if offered else ())
    assert disk_of(vm) == Disk(path="data", kind="left"), "it is local again, as if never away"


@pytest.mark.req("R-53")
def test_other_addresses_do_not_cut_the_vm_off_from_its_disk() -> None:
    """H-04 raises the VM's version while it runs; the image is offered as before."""
    vm = after(msgspec.structs.replace(VM, disks=(Disk(path="data", kind="left"),)), "h2", 2)
    changed = msgspec.structs.replace(vm, version=3)
    before, now = (storage.exports(Cluster(vms={"web": each}), "h1") for each in (vm, changed))
    assert before == now


@pytest.mark.req("R-53")
@pytest.mark.parametrize("kind", ["shared", "moved"])
def test_what_was_left_for_once_stays_there_in_the_next_move_too(kind: str) -> None:
    vm = msgspec.structs.replace(VM, disks=(msgspec.convert({"path": "d", "kind": kind}, Disk),))
    vm = after(vm, "h2", 2, "left")
    assert (disk_of(vm).kind, disk_of(vm).at) == (kind, "h1")
    vm = after(vm, "h3", 3)
    assert (disk_of(vm).at, disk_of(vm).since) == ("h1", 3)
    assert disk_of(after(vm, "h1", 4)).at == ""


@pytest.mark.req("R-53")
def test_each_host_sees_an_image_as_it_reaches_it() -> None:
    record = msgspec.structs.replace(
        AWAY, disks=(msgspec.structs.replace(disk_of(AWAY), uri="nbd://192.0.2.4:10809"),)
    )
    assert disk_of(seen_from(record, FAR)).uri == ""
    assert disk_of(seen_from(record, OLD)).since == 1
    assert disk_of(seen_from(record, NEW, 7)).since == 7


def test_where_an_image_is_offered_is_a_family_that_both_hosts_have() -> None:
    both = Host(name="a", underlay_ipv4="192.0.2.1", underlay_ipv6="2001:db8::1")
    six = Host(name="b", underlay_ipv6="2001:db8::2", storage_port=7)
    four = Host(name="c", underlay_ipv4="192.0.2.3")
    assert storage.uri(both, four) == "nbd://192.0.2.1:10809"
    assert storage.uri(both, six) == "nbd://[2001:db8::1]:10809"
    assert storage.uri(six, both) == "nbd://[2001:db8::2]:7"


# ---------------------------------------------------------------- what is refused, what is shown


def left(vm: Vm = AWAY, ways: dict[str, str] | None = None, **hosts: Host) -> list[str]:
    found = storage.move_blockers(Cluster(hosts=hosts), vm, NEW, (THERE,), (NOTHING,), ways or {})
    return [each.code for each in found]


@pytest.mark.req("R-55")
def test_a_disk_that_could_not_be_reached_from_the_new_host_is_refused_before_anything() -> None:
    assert left() == []
    assert left(ways={FAR: "192.0.2.4:10809 is not reached: no answer"}) == ["storage_unreachable"]
    there = msgspec.structs.replace(AWAY, disks=(msgspec.structs.replace(disk_of(AWAY), at=NEW),))
    assert left(there, ways={NEW: "who cares"}) == [], "there it is a file"
    assert left(LEAVING, h1=Host(name=OLD, drained=True)) == ["host_drained"]


@pytest.mark.req("R-55")
@pytest.mark.parametrize("choice", ["moved", "shared"])
def test_an_image_on_another_host_neither_goes_along_nor_is_shared(choice: DiskChoice) -> None:
    vm = storage.chosen(AWAY, choice, (THERE,))
    found = list(storage.move_blockers(Cluster(), vm, NEW, (THERE,), (NOTHING,), {}))
    assert [each.code for each in found] == ["disk_elsewhere"]
    assert "`overland vm disk move web data --to h1`" in found[0].hint


@pytest.mark.req("R-14")
@pytest.mark.parametrize(("where", "taken"), [(FAR, True), (OLD, False)])
def test_an_image_that_stayed_behind_is_taken_where_it_is(where: str, taken: bool) -> None:
    vms = {"other": msgspec.structs.replace(AWAY, name="other")}
    wish = msgspec.structs.replace(VM, host=where, disks=(Disk(path="data", kind="moved"),))
    found = [each.code for each in storage.wish_blockers(Cluster(vms=vms), wish)]
    assert found == (["disk_in_use"] if taken else [])
    moving = msgspec.structs.replace(wish, host="h9")
    cluster = Cluster(vms=vms)
    there = list(storage.move_blockers(cluster, moving, where, (THERE,), (NOTHING,), {}))
    assert [each.code for each in there] == (["disk_in_use"] if taken else [])


@pytest.mark.req("R-53")
def test_a_host_with_images_of_others_is_not_drained() -> None:
    declared = msgspec.structs.replace(VM, name="db", disks=(Disk(path="x", kind="left"),))
    cluster = Cluster(vms={"web": AWAY, "db": declared})
    [exported] = storage.drain_blockers(cluster, FAR)
    assert (exported.code, exported.what) == ("exports_disk", f"host {FAR}")
    assert "vm web" in exported.why
    assert exported.hint == "`overland vm disk move web data --to h1`"
    [leaving] = storage.drain_blockers(cluster, OLD)
    assert (leaving.code, leaving.what) == ("leaves_disk", "vm db")
    assert "--with-storage" in leaving.hint
    assert list(storage.drain_blockers(cluster, NEW)) == []


def test_people_see_where_each_image_is() -> None:
    vm = msgspec.structs.replace(
        AWAY, disks=(*AWAY.disks, Disk(path="own", kind="moved"), Disk(path="/shared"))
    )
    assert [disk["at"] for disk in storage.shown(vm)["disks"]] == [FAR, OLD, None]
    assert receipt(planned(AWAY))["storage"]["left"] == [{"disk": "data", "at": FAR}]
    assert receipt(planned())["storage"]["left"] == []


def test_a_file_that_is_missing_is_missing_where_the_image_is() -> None:
    [refusal] = storage.start_blockers(
        msgspec.structs.replace(VM, disks=(Disk(path="data", kind="left", at=FAR),)),
        (DiskState(),),
    )
    assert FAR in refusal.why


def test_left_disks_of_one_path_on_two_hosts_are_two() -> None:
    other = msgspec.structs.replace(
        LEAVING, name="other", host="h9", disks=(msgspec.structs.replace(disk_of(LEAVING), at=""),)
    )
    cluster = Cluster(vms={"other": other})
    mine = msgspec.structs.replace(VM, disks=(Disk(path="data", kind="left"),))
    assert list(storage.wish_blockers(cluster, mine)) == []
    assert codes(LEAVING, THERE, THERE, cluster) == []


# ---------------------------------------------------------------- one writer


def committed(vm: Vm) -> tuple[Handover, tuple[m.CoordinatorEffect, ...]]:
    """A hot move of `vm` that has just been committed, and what is done then."""
    record = msgspec.structs.replace(planned(vm), phase="equal", stop_ns=20, equal_ns=30)
    return coordinator.step(record, m.Committed(version=2, at_ns=40), 0.0, 1)


ACTIVATE = m.Tell(nve=NEW, order=m.Activate(move="m1", version=2))


@pytest.mark.req("R-14")
@pytest.mark.req("R-53")
@pytest.mark.parametrize("vm", [LEAVING, AWAY])
def test_a_copy_runs_only_when_no_former_host_can_write_what_stayed(vm: Vm) -> None:
    """HO-70: whatever is heard before the host with the image has said so."""
    [host] = left_at(vm)
    record, effects = committed(vm)
    assert m.Serve() in effects
    for event in (
        m.Start(),
        m.Back(nve=NEW),
        m.Tick(),
        m.Acknowledged(nve=NEW, at_ns=60),
        m.Served(nve=PEER),
    ):
        record, more = coordinator.step(record, event, 1e4, 1)
        effects += more
    assert ACTIVATE not in effects
    record, effects = coordinator.step(record, m.Served(nve=host), 0.0, 1)
    assert effects == (ACTIVATE,)
    assert coordinator.step(record, m.Served(nve=host), 0.0, 1) == (record, ())
    assert ACTIVATE in coordinator.step(record, m.Back(nve=NEW), 0.0, 1)[1]


@pytest.mark.req("R-14")
def test_every_host_with_an_image_has_to_say_so() -> None:
    two = msgspec.structs.replace(AWAY, disks=(*AWAY.disks, *LEAVING.disks))
    record, _ = committed(two)
    record, effects = coordinator.step(record, m.Served(nve=OLD), 0.0, 1)
    assert effects == ()
    assert coordinator.step(record, m.Served(nve=FAR), 0.0, 1)[1] == (ACTIVATE,)


@pytest.mark.req("R-53")
def test_the_host_of_an_image_is_needed_before_the_commit_and_waited_for_after_it() -> None:
    record, _ = coordinator.step(planned(AWAY), m.Start(), 0.0, 1)
    record, _ = coordinator.step(record, m.Lost(nve=FAR), 0.0, 1)
    assert (record.phase, record.reason) == (
        "aborting",
        f"{FAR} is unreachable, and has a disk of the VM",
    )
    record, _ = committed(AWAY)
    record, effects = coordinator.step(record, m.Lost(nve=FAR, dead=True), 0.0, 1)
    assert (record.phase, effects) == ("committed", ())
    assert "the VM waits for it" in (record.reason or "")
    assert coordinator.step(record, m.Served(nve=FAR), 0.0, 1)[1] == (ACTIVATE,)


@pytest.mark.req("R-14")
@pytest.mark.parametrize("state", ["running", "paused", "suspended", "shutdown"])
def test_a_cold_move_wakes_the_vm_only_then(state: str) -> None:
    record = cold_record(state, AWAY)  # type: ignore[arg-type]
    record = msgspec.structs.replace(record, phase="equal")
    record, effects = cold.step(record, m.Committed(version=2, at_ns=40), 0.0, 1)
    for event in (m.Start(), m.Back(nve=NEW), m.Tick()):
        record, more = cold.step(record, event, 1e4, 1)
        effects += more
    assert m.Serve() in effects
    assert not [each for each in effects if isinstance(each, m.Ask)]
    assert record.phase == "committed"
    record, effects = cold.step(record, m.Served(nve=FAR), 0.0, 1)
    asked = [type(each.order) for each in effects if isinstance(each, m.Ask)]
    assert (asked, record.phase) == (
        ([], "closed") if state == "shutdown" else ([m.WakeUp], "committed")
    )


# ---------------------------------------------------------------- whole moves


@pytest.mark.req("R-53")
def test_a_hot_move_that_leaves_a_disk_reads_as_the_documents_say() -> None:
    talk = Conversation(record=planned(LEAVING))
    transcript = talk.play()
    golden("hot_move_leaving_disk", transcript)
    served = transcript.index(f"nva -> {OLD}: its images are for {NEW} now")
    assert served < transcript.index(f"nva -> {NEW}: Activate")
    assert talk.running == {NEW}


@pytest.mark.req("R-14")
@pytest.mark.parametrize("abort_in", ["planned", "precopy", "paused", "equal"])
def test_an_aborted_move_changes_nothing_of_who_may_write(abort_in: str) -> None:
    talk = Conversation(record=planned(LEAVING))
    assert not [line for line in talk.play(abort_in=abort_in) if "images" in line]
    assert talk.running == {OLD}


@pytest.mark.req("R-53")
@pytest.mark.parametrize("state", ["running", "paused", "suspended", "shutdown", "crashed"])
@pytest.mark.parametrize("restart_in", [None, "committed"])
def test_a_cold_move_that_leaves_a_disk_comes_to_its_end(
    state: str, restart_in: str | None
) -> None:
    talk = ColdConversation(record=cold_record(state, LEAVING))  # type: ignore[arg-type]
    transcript = talk.play(restart_in=restart_in)
    assert talk.record.outcome == "moved"
    assert any("its images are for" in line for line in transcript)
