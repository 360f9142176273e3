"""The machine of cold moves: the whole table, whole conversations, failures and restarts."""

from __future__ import annotations

import itertools
import re

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overland.cli.timeline import timeline
from overland.mobility import messages as m
from overland.mobility.cold import step
from overland.model.cluster import VmState
from overland.model.handover import (
    COLD_LEGAL,
    COLD_OLD_NVE_ACTION,
    ENDED,
    Phase,
    committed,
    marking,
)
from overland.model.receipt import receipt
from tests.core.cold_moves import (
    BY_COLUMN,
    ROLES,
    SAVED,
    ColdConversation,
    after,
    cold,
    has,
    in_phase,
)
from tests.core.moves import NEW, OLD, PEER, WITH_DISK, every_event
from tests.core.tables import SPEC, Table, check_table
from tests.core.test_conversation import golden

LATE_S = 10_000.0
UP: tuple[VmState, ...] = ("running", "paused")
STATES: tuple[VmState, ...] = (*UP, "suspended", "shutdown", "crashed")

COLUMNS = {name: after(*way) for name, way in BY_COLUMN.items()}
COLUMNS["paused, not awaited"] = step(COLUMNS["paused, saved"], m.Back(nve=NEW), 0.0, 1)[0]
COLUMNS |= {phase: in_phase(phase) for phase in ("aborting", "closed", "aborted")}

EVENTS: dict[str, m.CoordinatorEvent] = {
    type(event).__name__: event for event in every_event() if not isinstance(event, m.Acknowledged)
}
EVENTS |= {
    "Prepared": m.Prepared(move="m1", nve=NEW, uri="state:y"),
    "Stopped": m.Stopped(move="m1", nve=OLD, held_ns=0, stop_ns=20, memory=SAVED),
    "Received": m.Received(move="m1", nve=OLD, at_ns=30, state_bytes=9),
    "Acknowledged others": has(NEW, "others"),
    "Acknowledged all": has(OLD, "all"),
    "Acknowledged none": has(PEER, "none"),
    "Back (old)": m.Back(nve=OLD),
    "Back (new)": m.Back(nve=NEW),
    "Lost (away)": m.Lost(nve=PEER),
    "Lost (dead)": m.Lost(nve=PEER, dead=True),
}
for name in ("Back", "Lost"):
    del EVENTS[name]


def cell(column: str, event: m.CoordinatorEvent) -> str:
    """What the machine does with `event`, as spec/handover.md writes it."""
    before = COLUMNS[column]
    now_s = LATE_S if isinstance(event, m.Tick) else 0.0
    then, effects = step(before, event, now_s, 100)
    did = [f"→ {then.phase}"] if then.phase != before.phase else []
    for effect in effects:
        match effect:
            case m.Ask(nve=nve, order=order):
                did.append(f"{type(order).__name__} to {ROLES[nve]}")
            case m.Commit():
                did.append("compare-and-set")
            case m.Publish():
                did.append("push")
            case m.Serve():
                did.append("Serve")
    return ", ".join(did) or "·"


@pytest.mark.req("R-45")
@pytest.mark.req("R-12")
def test_every_cell_of_the_specified_table_is_what_the_code_does() -> None:
    found: Table = {
        (column, name): cell(column, event) for column in COLUMNS for name, event in EVENTS.items()
    }
    check_table("cold coordinator", found)


@pytest.mark.req("R-35")
def test_one_action_of_the_old_nve_for_each_phase_of_a_cold_move() -> None:
    """R-35, 6-3: and it is what the marking, from which the kernel is made, says."""
    rows = re.findall(r"^\| (\w+) \| cold: (deliver|drop)", SPEC.read_text(), re.MULTILINE)
    assert dict(rows) == COLD_OLD_NVE_ACTION
    assert set(COLD_OLD_NVE_ACTION) == set(COLD_LEGAL)
    for record in COLUMNS.values():
        if record.phase in ("planned", "staged", "paused", "equal", "committed"):
            drops = marking(record) == "all"
            assert COLD_OLD_NVE_ACTION[record.phase] == ("drop" if drops else "deliver")


@pytest.mark.req("R-33")
def test_nobody_stops_the_vm_before_all_have_the_marking_in_their_kernels() -> None:
    """R-33: whatever order the acknowledgements come in, and however often."""
    heard = [has(PEER, "others"), has(NEW, "others"), has(OLD, "none"), has(OLD, "all")]
    for order in itertools.permutations(heard):
        record, told = after("staged", 1), set()
        for event in order:
            record, effects = step(record, event, 0.0, 1)
            told.add(event.nve) if event.marking != "none" else None
            if any(isinstance(e, m.Ask) and isinstance(e.order, m.Suspend) for e in effects):
                assert told == {OLD, NEW, PEER}
                assert record.phase == "paused"


@pytest.mark.req("R-33")
def test_the_old_nve_delivers_until_all_others_drop() -> None:
    record, effects = step(after("staged", 1), has(PEER, "others"), 0.0, 1)
    assert (marking(record), effects) == ("others", ())
    record, effects = step(record, has(NEW, "others"), 0.0, 1)
    assert (marking(record), effects) == ("all", (m.Publish(),))


@pytest.mark.req("R-33")
def test_no_timer_ends_the_marking() -> None:
    """A deadline turns the move back or asks again; at the end only acknowledgements count."""
    record = in_phase("converging")
    for hour in range(1000):
        record, effects = step(record, m.Tick(), LATE_S * hour, 1)
        assert (record.phase, effects) == ("converging", ())
    for waiting in (in_phase("staged"), in_phase("paused")):
        record, _ = step(waiting, m.Tick(), LATE_S, 1)
        assert record.phase == "aborting"


@pytest.mark.req("R-12")
@pytest.mark.req("R-47")
def test_a_cold_move_reads_as_the_specification_says() -> None:
    talk = ColdConversation()
    golden("cold_move", talk.play())
    assert (talk.record.outcome, talk.copies, talk.states) == ("moved", {NEW}, set())
    assert set(talk.kernels.values()) == {"none"}


@pytest.mark.req("R-47")
def test_an_abort_wakes_the_vm_at_the_old_host() -> None:
    talk = ColdConversation()
    golden("cold_abort_paused", talk.play(abort_in="paused"))
    assert (talk.record.outcome, talk.copies, talk.states) == ("aborted", {OLD}, set())
    assert set(talk.kernels.values()) == {"none"}


@pytest.mark.req("R-34")
def test_the_outage_is_stated_from_the_marking_to_the_last_acknowledgement() -> None:
    """R-34: what peers see, longer than the stop itself; null of a VM that was at rest."""
    record = cold()
    script: list[m.CoordinatorEvent] = [
        m.Start(),
        m.Prepared(move="m1", nve=NEW, uri="u"),
        has(PEER, "others"),
        has(NEW, "others"),
    ]
    script += [has(OLD, "all")]
    script += [m.Stopped(move="m1", nve=OLD, held_ns=0, stop_ns=4_000_000, memory=SAVED)]
    script += [m.Received(move="m1", nve=OLD, at_ns=1, state_bytes=9)]
    script += [m.Committed(version=2, at_ns=1)]
    script += [m.Running(move="m1", nve=NEW, at_ns=10_000_000, held=0)]
    script += [has(nve, "none") for nve in (OLD, NEW, PEER)]
    for number, event in enumerate(script):
        record, _ = step(record, event, 0.0, (number + 1) * 1_000_000)
    told = receipt(record)
    assert (told["outage_ms"], told["vm_stop_ms"]) == (10.0, 6.0)
    for nve in (OLD, NEW, PEER):
        record, _ = step(record, m.Closed(move="m1", nve=nve), 0.0, 20_000_000)
    assert "in transit" in timeline(receipt(record))
    rest = ColdConversation(record=cold("shutdown"))
    rest.play()
    assert receipt(rest.record)["outage_ms"] is None
    with pytest.raises(ValueError, match="at rest"):
        timeline(receipt(rest.record))


@pytest.mark.req("R-48")
@pytest.mark.parametrize("state", STATES)
def test_a_vm_ends_as_it_was(state: VmState) -> None:
    """Paused ends paused, asleep ends asleep with its state at the new host only."""
    talk = ColdConversation(record=cold(state))
    talk.play()
    assert (talk.record.outcome, talk.record.ends_as) == ("moved", state)
    assert talk.copies == ({NEW} if state in UP else set())
    assert talk.states == ({NEW} if state == "suspended" else set())


@pytest.mark.req("R-34")
@pytest.mark.req("R-56")
@pytest.mark.parametrize("state", STATES)
def test_disks_go_along_with_a_vm_in_any_state(state: VmState) -> None:
    talk = ColdConversation(record=cold(state, WITH_DISK))
    talk.play()
    assert (talk.record.outcome, talk.record.ends_as) == ("moved", state)
    assert talk.copies == ({NEW} if state in UP else set())
    assert talk.images == {NEW}


@pytest.mark.req("R-53")
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("nve", "order"), [(NEW, "Associate"), (OLD, "GiveState")])
def test_disks_that_are_not_carried_stay_where_they_are(
    nve: str, order: str, state: VmState
) -> None:
    talk = ColdConversation(record=cold(state, WITH_DISK), fail={(nve, order)})
    talk.play()
    assert talk.record.outcome == "aborted"
    assert talk.images == {OLD}


@pytest.mark.req("R-53")
@pytest.mark.parametrize(
    ("phase", "at"), [("paused", {OLD}), ("equal", {OLD}), ("committed", {NEW}), ("drained", {NEW})]
)
@pytest.mark.parametrize("state", ["running", "shutdown"])
def test_disks_have_one_place_whenever_the_nva_is_killed(
    state: VmState, phase: str, at: set[str]
) -> None:
    talk = ColdConversation(record=cold(state, WITH_DISK))
    talk.play(restart_in=phase)
    assert talk.images == at


BEFORE_COMMIT = [(NEW, "Associate"), (OLD, "Suspend"), (OLD, "GiveState")]


@pytest.mark.req("R-14")
@pytest.mark.parametrize(
    ("state", "nve", "order"),
    [
        (state, *failing)
        for state in (*UP, "suspended")
        for failing in BEFORE_COMMIT
        if state in UP or failing[1] != "Suspend"
    ],
)
def test_any_failure_before_the_commit_ends_at_the_old_host(
    state: VmState, nve: str, order: str
) -> None:
    talk = ColdConversation(record=cold(state), fail={(nve, order)})
    talk.play()
    assert talk.record.outcome == "aborted"
    assert f"{nve}: {order}: injected" in (talk.record.reason or "")
    assert (talk.copies or talk.states) == {OLD}
    assert NEW not in talk.states


@pytest.mark.parametrize("order", [(OLD, "Return"), (NEW, "DropCopy"), (PEER, "Count")])
def test_a_failure_on_the_way_back_is_tried_again(order: tuple[str, str]) -> None:
    talk = ColdConversation(fail={order})
    talk.play(abort_in="paused")
    assert (talk.record.outcome, talk.copies) == ("aborted", {OLD})


@pytest.mark.req("R-14")
@pytest.mark.parametrize(
    "phase", ["planned", "staged", "paused", "equal", "committed", "converging", "drained"]
)
def test_an_nva_killed_in_any_phase_turns_back_before_the_commit_and_goes_on_after_it(
    phase: str,
) -> None:
    talk = ColdConversation()
    talk.play(restart_in=phase)
    gone_on = phase in ("committed", "converging", "drained")
    assert talk.record.outcome == ("moved" if gone_on else "aborted")
    assert (talk.copies, talk.states) == ({NEW} if gone_on else {OLD}, set())
    assert set(talk.kernels.values()) <= {"none"}


def test_a_state_that_does_not_wake_leaves_the_vm_suspended_at_the_new_host() -> None:
    """After the commit only forward: its state is whole there, and can be woken again."""
    record, _ = step(in_phase("committed"), m.Crashed(move="m1", nve=NEW, why="bad"), 0.0, 1)
    assert (record.phase, record.ends_as) == ("converging", "suspended")
    assert "bad" in (record.reason or "")
    assert "h1 keeps the state" in (record.reason or "")
    told: list[m.AnyOrder | m.ColdOrder] = []
    for nve in (OLD, NEW, PEER):
        record, effects = step(record, has(nve, "none"), 0.0, 1)
        told += [each.order for each in effects if isinstance(each, m.Ask)]
    assert record.phase == "drained"
    assert {type(each) for each in told} == {m.Count}, "its old host drops nothing"
    for nve in (OLD, NEW, PEER):
        record, _ = step(record, m.Closed(move="m1", nve=nve), 0.0, 1)
    with pytest.raises(ValueError, match="did not wake"):
        timeline(receipt(record))


def test_a_vm_at_rest_without_a_state_needs_nothing_of_its_old_host() -> None:
    """It may be dead: that is why the VM is moved."""
    record, _ = step(cold("crashed"), m.Start(), 0.0, 1)
    record, _ = step(record, m.Lost(nve=OLD, dead=True), 0.0, 1)
    assert record.phase == "planned"


@pytest.mark.req("R-14")
@pytest.mark.parametrize("phase", ["staged", "paused", "aborting"])
def test_a_move_whose_old_host_is_dead_ends(phase: Phase) -> None:
    """Nobody is there to have the VM back; its address is in transit no more."""
    record, effects = step(in_phase(phase), m.Lost(nve=OLD, dead=True), 0.0, 1)
    assert (record.phase, record.closing, marking(record)) == ("aborting", False, "none")
    assert m.Publish() in effects
    assert OLD not in {each.nve for each in effects if isinstance(each, m.Ask)}
    record, _ = step(record, m.GivenBack(move="m1", nve=NEW), 0.0, 1)
    for nve in (NEW, PEER):
        record, _ = step(record, m.Closed(move="m1", nve=nve), 0.0, 1)
    assert (record.phase, record.outcome) == ("aborted", "aborted")
    assert "h1 is dead" in (record.reason or "")


def test_an_old_host_that_is_back_before_the_end_has_its_vm_back() -> None:
    record, _ = step(in_phase("aborting"), m.Lost(nve=OLD, dead=True), 0.0, 1)
    record, effects = step(record, m.Back(nve=OLD), 0.0, 1)
    assert [type(e.order) for e in effects if isinstance(e, m.Ask)] == [m.Return]
    assert OLD in record.waiting


@pytest.mark.req("R-14")
def test_a_move_whose_new_host_is_dead_after_the_commit_ends() -> None:
    """The VM has failed, not the move; what the old host saved stays (HO-43)."""
    record, _ = step(in_phase("committed"), m.Lost(nve=NEW, dead=True), 0.0, 1)
    assert (record.phase, record.ends_as) == ("converging", "suspended")
    assert "h2 is dead" in (record.reason or "")
    for nve in (OLD, PEER):
        record, _ = step(record, has(nve, "none"), 0.0, 1)
    for nve in (OLD, PEER):
        record, _ = step(record, m.Closed(move="m1", nve=nve), 0.0, 1)
    assert (record.phase, record.outcome) == ("closed", "moved")


def test_a_new_nve_that_was_restarted_listens_anew() -> None:
    record, effects = step(COLUMNS["paused, saved"], m.Back(nve=NEW), 0.0, 1)
    assert [type(e.order) for e in effects if isinstance(e, m.Ask)] == [m.Associate]
    _, effects = step(record, m.Prepared(move="m1", nve=NEW, uri="state:again"), 0.0, 1)
    assert [e.order.uri for e in effects if isinstance(e, m.Ask)] == ["state:again"]  # type: ignore[union-attr]


orders = st.lists(
    st.sampled_from(
        [
            *EVENTS.values(),
            *(has(n, "none") for n in ROLES),
            *(m.Lost(nve=n, dead=True) for n in (OLD, NEW)),
        ]
    ),
    max_size=40,
)


@pytest.mark.req("R-45")
@pytest.mark.req("R-46")
@settings(max_examples=400, deadline=None)
@given(st.sampled_from(STATES), orders)
def test_whatever_comes_in_whatever_order_phases_go_only_the_legal_ways(
    state: VmState, events: list[m.CoordinatorEvent]
) -> None:
    record, now_s = cold(state), 0.0
    for event in events:
        now_s += 30.0
        if isinstance(event, m.Committed) and record.phase != "equal":
            continue  # only the compare-and-set makes this event
        record, effects = step(record, event, now_s, int(now_s * 1e9) + 100)
        for effect in effects:
            if isinstance(effect, m.Ask) and isinstance(effect.order, m.WakeUp | m.DropState):
                assert committed(record.phase)
            if isinstance(effect, m.Ask) and isinstance(effect.order, m.Return | m.DropCopy):
                assert not committed(record.phase)
    phases = [each.phase for each in record.phases]
    for earlier, later in itertools.pairwise(phases):
        assert later in COLD_LEGAL[earlier]
    assert record.phase in ENDED or msgspec.json.encode(record)
