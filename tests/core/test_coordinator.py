"""The coordinator's machine: the whole state table, the straight way, and disordered ways."""

from __future__ import annotations

import itertools
import re

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overland.mobility import messages as m
from overland.mobility.coordinator import recoverable, step
from overland.model.handover import (
    ENDED,
    FORWARD,
    LEGAL,
    OLD_NVE_ACTION,
    Checkpoint,
    Handover,
    Phase,
    committed,
)
from overland.model.receipt import receipt
from tests.core.moves import NEW, OLD, PEER, every_event, in_phase, planned, warm
from tests.core.tables import SPEC, Table, check_table

STABLE: tuple[Phase, ...] = (
    "planned",
    "precopy",
    "paused",
    "equal",
    "committed",
    "converging",
    "drained",
    "aborting",
    "closed",
    "aborted",
)
LATE_S = 10_000.0


def cell(phase: Phase, event: m.CoordinatorEvent) -> str:
    """What the machine does with `event` in `phase`, as spec/handover.md writes it."""
    record = in_phase(phase)
    now_s = LATE_S if isinstance(event, m.Tick) else 0.0
    after, effects = step(record, event, now_s, 100)
    did = []
    if after.phase != phase:
        did.append(f"→ {after.phase}")
    for effect in effects:
        match effect:
            case m.Tell(nve=nve, order=order):
                role = {OLD: "old", NEW: "new", PEER: "peer"}[nve]
                did.append(f"{type(order).__name__} to {role}")
            case m.Commit():
                did.append("compare-and-set")
            case m.Serve():
                did.append("Serve")
    return ", ".join(did) or "·"


@pytest.mark.req("R-45")
def test_every_cell_of_the_specified_table_is_what_the_code_does() -> None:
    found: Table = {
        (phase, type(event).__name__): cell(phase, event)
        for phase in STABLE
        for event in every_event()
    }
    check_table("coordinator", found)


@pytest.mark.req("R-35")
def test_one_action_of_the_old_nve_for_each_phase() -> None:
    rows = re.findall(r"^\| (\w+) \| (deliver|hold|redirect|drop)", SPEC.read_text(), re.MULTILINE)
    assert dict(rows) == OLD_NVE_ACTION
    assert set(OLD_NVE_ACTION) == set(LEGAL)


@pytest.mark.req("R-46")
def test_no_commit_before_equality() -> None:
    for phase in STABLE:
        for event in every_event():
            now_s = LATE_S if isinstance(event, m.Tick) else 0.0
            after, effects = step(in_phase(phase), event, now_s, 100)
            if any(isinstance(effect, m.Commit) for effect in effects):
                assert after.phase == "equal"
                assert after.equal_ns >= after.stop_ns > 0
            for effect in effects:
                if isinstance(effect, m.Tell) and isinstance(effect.order, m.Activate):
                    assert committed(after.phase)


def test_no_commit_before_the_new_nve_has_turned_to_its_port() -> None:
    record, effects = step(in_phase("paused"), m.Received(move="m1", nve=NEW, at_ns=30), 0.0, 1)
    assert (record.phase, effects) == ("paused", ())


@pytest.mark.req("R-09")
def test_the_straight_way_orders_its_instants() -> None:
    record = in_phase("drained")
    assert 0 < record.held_ns < record.stop_ns < record.equal_ns <= record.commit_ns
    assert record.commit_ns <= record.resume_ns
    assert [each.phase for each in record.phases] == list(FORWARD[:-1])


def test_memory_that_differs_at_equality_never_commits() -> None:
    record = in_phase("paused")
    verify = msgspec.structs.replace(record.options, verify=True)
    record = msgspec.structs.replace(record, options=verify)
    record, _ = step(record, m.Steered(move="m1", nve=NEW, at_ns=25), 0.0, 1)
    record, _ = step(record, m.Received(move="m1", nve=NEW, at_ns=30), 0.0, 1)
    record, _ = step(record, m.Digested(move="m1", nve=OLD, sha256="aa"), 0.0, 1)
    record, effects = step(record, m.Digested(move="m1", nve=NEW, sha256="bb"), 0.0, 1)
    assert record.phase == "aborting"
    assert not any(isinstance(effect, m.Commit) for effect in effects)


@pytest.mark.req("R-46")
@pytest.mark.parametrize("said", [m.GivenBack(move="m1", nve=NEW), m.Restored(move="m1", nve=OLD)])
def test_what_a_former_nva_turned_back_is_aborted(said: m.AnyReport) -> None:
    """HO-49: it could not write the abort, and was killed. After the commit it means nothing."""
    record, effects = step(in_phase("precopy"), said, 0.0, 1)
    assert record.phase == "aborting"
    assert m.Tell(nve=NEW, order=m.GiveBack(move="m1")) in effects
    assert step(in_phase("committed"), said, 0.0, 1)[0].phase == "committed"


@pytest.mark.req("R-42")
def test_the_tunnel_lives_exactly_until_the_last_subscriber_acknowledged() -> None:
    record = in_phase("converging")
    for nve in (OLD, NEW):
        record, _ = step(record, m.Acknowledged(nve=nve, at_ns=60), 0.0, 1)
    for _hour in range(1000):
        record, effects = step(record, m.Tick(), LATE_S * 3600, 1)
        assert (record.phase, effects) == ("converging", ())
    record, effects = step(record, m.Acknowledged(nve=PEER, at_ns=70), 0.0, 1)
    assert record.phase == "drained"
    assert effects == ()
    record, effects = step(record, m.Tick(), LATE_S, 1)
    assert {type(e.order) for e in effects if isinstance(e, m.Tell)} == {m.Close, m.Retire}
    assert record.close_reason == "all peers acknowledged"


@pytest.mark.req("R-40")
def test_silence_of_tenants_is_no_event_at_all() -> None:
    """Nothing that a tenant sends or does not send can reach the coordinator."""
    said_by_tenants = {"Packet", "Fin", "Idle", "Announcement"}
    kinds = {type(event).__name__ for event in every_event()}
    assert not kinds & said_by_tenants
    record = in_phase("converging")
    after, _ = step(record, m.Tick(), LATE_S, 1)
    assert after == record


@pytest.mark.req("R-42")
def test_a_fenced_peer_is_not_waited_for_and_is_named() -> None:
    record = in_phase("converging")
    for nve in (OLD, NEW):
        record, _ = step(record, m.Acknowledged(nve=nve, at_ns=60), 0.0, 1)
    record, _ = step(record, m.Lost(nve=PEER, dead=True), 0.0, 1)
    assert record.phase == "drained"
    assert record.close_reason == f"all peers acknowledged; fenced: {PEER}"


@pytest.mark.req("R-42")
def test_a_peer_that_is_only_away_keeps_the_tunnel_open() -> None:
    """6-2: its kernel forwards as it was told last, so its tenants still use the tunnel."""
    record = in_phase("converging")
    for nve in (OLD, NEW):
        record, _ = step(record, m.Acknowledged(nve=nve, at_ns=60), 0.0, 1)
    record, _ = step(record, m.Lost(nve=PEER), 0.0, 1)
    assert (record.phase, record.fenced) == ("converging", ())
    assert "tunnel stays open" in (record.reason or "")
    record, _ = step(record, m.Acknowledged(nve=PEER, at_ns=60), 0.0, 1)
    assert record.phase == "drained"
    assert record.close_reason == "all peers acknowledged"


def test_a_fenced_peer_that_comes_back_while_others_close_is_told_to_close() -> None:
    """HO-21 (seen in the chaos runs): else its part and its queue stay for ever."""
    record = in_phase("converging")
    for nve in (OLD, NEW):
        record, _ = step(record, m.Acknowledged(nve=nve, at_ns=60), 0.0, 1)
    record, _ = step(record, m.Lost(nve=PEER, dead=True), 0.0, 1)
    record, _ = step(record, m.Tick(), LATE_S, 1)
    record, effects = step(record, m.Back(nve=PEER), LATE_S, 1)
    assert effects == (m.Tell(nve=PEER, order=m.Close(move="m1")),)
    for nve in (OLD, NEW, PEER):
        assert record.phase == "drained"
        record, _ = step(record, m.Closed(move="m1", nve=nve), LATE_S, 1)
    assert (record.phase, record.outcome) == ("closed", "moved")


orders = st.lists(
    st.sampled_from(
        [
            *every_event(),
            *(m.Prepared(move="m1", nve=nve, uri="u") for nve in (NEW, PEER)),
            *(m.Acknowledged(nve=nve, at_ns=60) for nve in (OLD, NEW)),
            *(m.Closed(move="m1", nve=nve) for nve in (OLD, NEW)),
            m.Lost(nve=OLD),
            m.Lost(nve=NEW),
        ]
    ),
    max_size=40,
)


def walk(record: Handover, events: list[m.CoordinatorEvent]) -> list[Handover]:
    seen = [record]
    now_s = 0.0
    for event in events:
        now_s += 30.0
        if isinstance(event, m.Committed) and record.phase != "equal":
            continue  # only the compare-and-set makes this event
        record, _ = step(record, event, now_s, int(now_s * 1e9) + 100)
        seen.append(record)
    return seen


@pytest.mark.req("R-45")
@settings(max_examples=400, deadline=None)
@given(orders)
def test_whatever_comes_in_whatever_order_phases_go_only_the_legal_ways(
    events: list[m.CoordinatorEvent],
) -> None:
    seen = walk(planned(), events)
    phases = [each.phase for each in seen[-1].phases]
    for earlier, later in itertools.pairwise(phases):
        assert later in LEGAL[earlier]
    assert not ("committed" in phases and "aborting" in phases)


@settings(max_examples=200, deadline=None)
@given(orders)
def test_repeating_an_event_changes_nothing_more(events: list[m.CoordinatorEvent]) -> None:
    once = walk(planned(), events)[-1]
    if not events or isinstance(events[-1], m.Tick | m.Start):
        return
    again, _ = step(once, events[-1], 0.0, 1)
    assert again.phase == once.phase or once.phase in ENDED


def mirroring(taken: int = 2) -> Handover:
    """A warm move that has taken so many checkpoints."""
    record = msgspec.structs.replace(in_phase("precopy"), mode="warm", options=warm().options)
    for number in range(taken):
        record, effects = step(record, _checkpointed(number), 0.0, 1)
        assert effects == ()
    return record


def _checkpointed(number: int) -> m.Checkpointed:
    at_ns = 10**9 * (number + 1)
    taken = Checkpoint(at_ns=at_ns, kept_ns=at_ns + 10**8, sent_bytes=100, pause_ms=float(number))
    return m.Checkpointed(move="m1", nve=OLD, checkpoint=taken)


@pytest.mark.req("R-12")
def test_checkpoints_are_counted_once_and_the_newest_is_the_point_of_recovery() -> None:
    record = mirroring(3)
    again, _ = step(record, _checkpointed(2), 0.0, 1)
    assert again.checkpoints == record.checkpoints
    told = receipt(record)["checkpoints"]
    assert (told["count"], told["sent_bytes"], told["pause_ms"]) == (3, 300, 1.0)
    assert told["last_at"] == "1970-01-01T00:00:03.000000Z"
    assert told["worst_age_ms"] == 1100.0, "the third was whole 1.1 s after the second's instant"
    assert receipt(planned())["checkpoints"] is None
    assert receipt(warm())["checkpoints"]["last_age_ms"] is None


@pytest.mark.req("R-11")
def test_the_time_limit_counts_from_the_last_checkpoint() -> None:
    """R-11: so mirroring lasts as long as was asked for, and one that hangs ends the move."""
    limit_s = warm().options.timeout_s + warm().options.interval_s
    record, _ = step(mirroring(1), _checkpointed(1), 1000.0, 1)
    record, _ = step(record, m.Tick(), 1000.0 + limit_s - 1, 1)
    assert record.phase == "precopy"
    record, _ = step(record, m.Tick(), 1000.0 + limit_s, 1)
    assert record.phase == "aborting"


def lost_host(taken: int) -> tuple[Handover, dict[str, m.AnyOrder]]:
    """The old host dies while checkpoints exist; who is told what when all but it have given up."""
    record, effects = step(mirroring(taken), m.Lost(nve=OLD), 0.0, 1)
    assert effects == (m.Tell(nve=NEW, order=m.GiveBack(move="m1")),)
    record, effects = step(record, m.GivenBack(move="m1", nve=NEW), 0.0, 1)
    assert effects == (m.Tell(nve=OLD, order=m.Restore(move="m1")),), "it may only be away"
    record, effects = step(record, m.Lost(nve=OLD, dead=True), 0.0, 1)
    return record, {e.nve: e.order for e in effects if isinstance(e, m.Tell)}


@pytest.mark.req("R-11")
@pytest.mark.parametrize("taken", [0, 2])
def test_a_move_whose_old_host_is_dead_ends_and_its_newest_checkpoint_stays(taken: int) -> None:
    """R-11: nobody is left to restore anything; the checkpoint is all there is of the VM."""
    record, told = lost_host(taken)
    kept = taken > 0
    assert told == {NEW: m.Close(move="m1", keep=kept), PEER: m.Close(move="m1")}
    for nve in (NEW, PEER):
        record, _ = step(record, m.Closed(move="m1", nve=nve), 0.0, 1)
    assert (record.phase, record.outcome, recoverable(record)) == ("aborted", "aborted", kept)
    assert record.reason == f"{OLD} is unreachable; {OLD} is dead"


def test_a_new_nve_that_speaks_late_of_a_lost_vm_keeps_the_checkpoint() -> None:
    """It was away longer than the close may take, and its part still holds the only state."""
    record = msgspec.structs.replace(lost_host(2)[0], waiting=frozenset({OLD}))
    _, effects = step(record, m.GivenBack(move="m1", nve=NEW), 0.0, 1)
    assert m.Tell(nve=NEW, order=m.Close(move="m1", keep=True)) in effects


def test_dead_may_be_known_before_the_new_nve_has_given_back() -> None:
    record, _ = step(mirroring(), m.Lost(nve=OLD), 0.0, 1)
    record, effects = step(record, m.Lost(nve=OLD, dead=True), 0.0, 1)
    assert effects == ()
    record, effects = step(record, m.GivenBack(move="m1", nve=NEW), 0.0, 1)
    assert m.Tell(nve=NEW, order=m.Close(move="m1", keep=True)) in effects


def test_an_old_host_that_is_back_before_the_end_takes_its_vm_home() -> None:
    """It was thought dead: it has never heard of the abort."""
    record, _ = lost_host(2)
    record, effects = step(record, m.Back(nve=OLD), 0.0, 1)
    told = [effect.order for effect in effects if isinstance(effect, m.Tell)]
    assert told == [m.Restore(move="m1"), m.Close(move="m1")]
    record, _ = step(mirroring(), m.Lost(nve=OLD), 0.0, 1)
    record, _ = step(record, m.Lost(nve=OLD, dead=True), 0.0, 1)
    record, _ = step(record, m.Back(nve=OLD), 0.0, 1)
    assert not record.lost, "it was not dead, and nobody has closed anything yet"


def test_a_checkpoint_is_not_kept_when_the_vm_lives() -> None:
    record, _ = step(mirroring(), m.Abort(why="operator"), 0.0, 1)
    record, _ = step(record, m.GivenBack(move="m1", nve=NEW), 0.0, 1)
    _, effects = step(record, m.Restored(move="m1", nve=OLD), 0.0, 1)
    assert m.Tell(nve=NEW, order=m.Close(move="m1")) in effects
