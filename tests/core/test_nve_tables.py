"""The three NVE machines, every stage by every event, and what must hold in all cells."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overland.mobility import messages as m
from overland.mobility.nve import Part
from tests.core.moves import CHECKPOINT
from tests.core.parts import (
    CLOSE,
    EFFECTS,
    GIVE_BACK,
    ORDERS,
    RESTORE,
    RETIRE,
    WAYS,
    Role,
    Underway,
    begun,
    every_event,
    step,
)
from tests.core.tables import Table, check_table

ROLES: tuple[Role, ...] = ("old", "new", "peer")

FOR: dict[Role, frozenset[str]] = {
    "old": frozenset(
        {
            *("Send", "Send with disks", "Force", "Digest", "Retire", "Restore"),
            *("Close", "Close and keep"),
        }
    ),
    "new": frozenset({"Steer", "Digest", "Activate", "GiveBack", "Close", "Close and keep"}),
    "peer": frozenset({"Steer", "Steer back", "Close", "Close and keep"}),
}
"""The orders that a role obeys in some stage; a prepare order is for an NVE without a part."""

TWICE: dict[Role, frozenset[str]] = {
    "old": frozenset({"HoldPorts", "AwaitDrained", "ReleaseInto", "AwaitStop", "TakeDigest"}),
    "new": frozenset({"SteerHere", "TakeDigest"}),
    "peer": frozenset({"SteerHere"}),
}
"""Effects that may be done again, after a restart or a repeated order: their result is taken."""

UNGUARDED = {("old", "closing", "Done: StopCopy")}
"""Answers that cannot come, because a part that was not retired never ends its copy."""


def cell(part: Part, event: m.NveEvent) -> str:
    """What the machine does with `event`, as spec/handover.md writes it."""
    after, effects = step(part, event)
    stage = [f"→ {after.stage}"] if after.stage != part.stage else []
    did = ", ".join([*stage, *map(_named, effects)])
    noted = ", ".join(_noted(part, after))
    return "; ".join(each for each in (did, f"notes {noted}" if noted else "") if each) or "·"


def _named(effect: m.Do) -> str:
    match effect:
        case m.Say(report=report):
            return f"says {type(report).__name__}"
        case m.ReleaseInto(tunnel=tunnel):
            return f"ReleaseInto {'tunnel' if tunnel else 'port'}"
        case m.SteerHere(back=True):
            return "SteerHere back"
        case m.CleanUp(keep=True):
            return "CleanUp but for the checkpoint"
        case _:
            return type(effect).__name__


def _noted(part: Part, after: Part) -> list[str]:
    fields = [field for field in part.__struct_fields__ if field != "stage"]
    return [field for field in fields if getattr(part, field) != getattr(after, field)]


def folded(table: Table) -> Table:
    """Make one row of rows of one kind that say the same in every column."""
    columns = list(dict.fromkeys(column for column, _ in table))
    rows: dict[tuple[str, ...], list[str]] = {}
    for row in dict.fromkeys(row for _, row in table):
        kind = row.split(": ")[0] if ": " in row else ""
        rows.setdefault((kind, *(table[column, row] for column in columns)), []).append(row)
    return {
        (column, _joined(kind, names)): did
        for (kind, *cells), names in rows.items()
        for column, did in zip(columns, cells, strict=True)
    }


def _joined(kind: str, names: list[str]) -> str:
    return ", ".join([names[0], *(name.removeprefix(f"{kind}: ") for name in names[1:])])


def cells(role: Role) -> Iterator[tuple[str, Underway, str, m.NveEvent]]:
    """Every column with every event."""
    for column, way in WAYS[role].items():
        for name, event in every_event(role).items():
            yield column, way, name, event


def wants(effects: tuple[m.Do, ...]) -> set[str]:
    """The names of `effects`, reports apart."""
    return {type(effect).__name__ for effect in effects if not isinstance(effect, m.Say)}


@pytest.mark.req("R-45")
@pytest.mark.parametrize("role", ROLES)
def test_every_cell_of_the_specified_table_is_what_the_code_does(role: Role) -> None:
    table = {(column, name): cell(way.part, event) for column, way, name, event in cells(role)}
    check_table(f"{role} NVE", folded(table))


@pytest.mark.parametrize("role", ROLES)
def test_every_effect_of_a_role_has_its_row(role: Role) -> None:
    wanted = {type(effect).__name__ for effect in begun(role, checkpoints=1).effects}
    for _, way, _, event in cells(role):
        wanted |= wants(way.effects) | wants(step(way.part, event)[1])
    assert wanted == set(EFFECTS[role])


@pytest.mark.req("R-45")
@pytest.mark.parametrize("role", ROLES)
def test_an_order_that_is_not_for_this_role_changes_nothing(role: Role) -> None:
    for way in WAYS[role].values():
        for name in ORDERS.keys() - FOR[role]:
            assert step(way.part, ORDERS[name]) == (way.part, ())


@pytest.mark.req("R-45")
@pytest.mark.parametrize("role", ROLES)
def test_an_answer_that_nobody_waits_for_changes_no_stage_and_as_a_rule_nothing(role: Role) -> None:
    for column, way, name, event in cells(role):
        if not isinstance(event, m.Done) or way.waits_for(event.effect):
            continue
        after, effects = step(way.part, event)
        if (role, column, name) not in UNGUARDED:
            assert after.stage == way.part.stage
            assert event.effect in TWICE[role] or (after, effects) == (way.part, ())


@pytest.mark.req("R-45")
@pytest.mark.parametrize("role", ROLES)
def test_a_closed_part_stays_closed_and_wants_nothing_done(role: Role) -> None:
    for event in every_event(role).values():
        after, effects = step(WAYS[role]["closed"].part, event)
        assert (after.stage, wants(effects)) == ("closed", set())


@pytest.mark.req("R-46")
def test_a_retired_old_nve_has_no_way_back() -> None:
    retired = [each for each in cells("old") if each[1].part.retired]
    assert {column for column, *_ in retired} == {
        "stopped, retired",
        "stopped, retired, disks",
        "closing, retired",
    }
    for _, way, _, event in retired:
        after, effects = step(way.part, event)
        assert "ResumeVm" not in wants(effects)
        assert after.retired
        assert after.stage in ("stopped", "closing", "closed")
    for way in (way for _, way, name, _ in retired if name == "Restore"):
        assert step(way.part, RESTORE) == (way.part, ())


@pytest.mark.req("R-46")
def test_a_new_nve_wants_its_copy_to_run_only_after_activate() -> None:
    for _, way, _, event in cells("new"):
        effects = step(way.part, event)[1]
        if "ResumeVm" in wants(effects):
            assert isinstance(event, m.Activate) or way.part.version


@pytest.mark.req("R-46")
def test_a_new_nve_that_was_activated_neither_ends_its_copy_nor_gives_back() -> None:
    for _, way, _, event in cells("new"):
        if way.part.version:
            after, effects = step(way.part, event)
            assert not wants(effects) & {"StopCopy", "DropStale", "HoldPorts"}
            assert after.stage not in ("returning", "returned")


@pytest.mark.req("R-46")
@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(WAYS["old"])),
    st.lists(st.sampled_from(list(every_event("old").values())), max_size=30),
)
def test_whatever_a_retired_old_nve_hears_it_never_runs_its_copy(
    column: str, events: list[m.NveEvent]
) -> None:
    part = WAYS["old"][column].part
    for event in events:
        retired = part.retired
        part, effects = step(part, event)
        assert not (retired and "ResumeVm" in wants(effects))
        assert part.retired >= retired


@pytest.mark.req("R-46")
@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(list(every_event("new").values())), max_size=30))
def test_whatever_a_new_nve_hears_before_activate_its_copy_does_not_run(
    events: list[m.NveEvent],
) -> None:
    part = begun("new").part
    for event in events:
        if isinstance(event, m.Activate):
            return
        part, effects = step(part, event)
        assert "ResumeVm" not in wants(effects)


def ended(way: Underway, broken: str = "") -> Underway:
    """Turn back where there is a way back, else go forward; then close. Effect `broken` fails."""
    part = way.part
    if part.stage in ("closing", "closed"):
        return way.until("closed", broken)
    if part.role == "old" and not part.retired:
        way = way.hears(RESTORE).until("returned", broken)
    if part.role == "new":
        back = way.hears(GIVE_BACK)
        way = back.until("active") if part.version else back.until("returned", broken)
    return way.hears(CLOSE).until("closed", broken)


@pytest.mark.req("R-45")
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("restarted", [False, True])
def test_from_every_stage_there_is_a_way_to_the_end(role: Role, restarted: bool) -> None:
    for way in WAYS[role].values():
        assert ended(way.restarted() if restarted else way).part.stage == "closed"


@pytest.mark.req("R-45")
@pytest.mark.parametrize("role", ROLES)
def test_no_single_failure_bars_the_way_to_the_end(role: Role) -> None:
    for way in WAYS[role].values():
        for effect in EFFECTS[role]:
            assert ended(way, broken=effect).part.stage == "closed"


@pytest.mark.req("R-45")
@pytest.mark.parametrize("role", ROLES)
def test_close_alone_leads_to_the_end_wherever_it_is_obeyed(role: Role) -> None:
    obeyed = [way for way in WAYS[role].values() if step(way.part, CLOSE)[0] != way.part]
    assert obeyed
    for way in obeyed:
        assert way.hears(CLOSE).until("closed").part.stage == "closed"


@pytest.mark.req("R-14")
def test_a_dead_copy_is_not_offered_for_the_commit() -> None:
    """What came before the failure would let the coordinator commit to it (HO-4)."""
    failed = WAYS["new"]["whole, failed"]
    for event in (m.Reconnected(), m.Resumed()):
        _, effects = step(failed.part, event)
        said = [type(each.report).__name__ for each in effects if isinstance(each, m.Say)]
        assert said == ["Failed"]


@pytest.mark.req("R-45")
def test_a_peer_tells_of_the_turn_that_was_ordered_last() -> None:
    """It was ordered back while the turn to the new NVE was still under way."""
    both = WAYS["peer"]["active, turned back"]
    forward = both.does("SteerHere")
    assert not forward.part.steered_ns
    assert forward.does("SteerHere").part.steered_ns
    broken = both.hears(m.Broken(effect="SteerHere", why="no marker came back"))
    assert broken.effects == (m.SteerHere(back=True, local=False),)


@pytest.mark.req("R-36")
@pytest.mark.parametrize("broken", ["StopCopy", "vm"])
def test_what_waits_at_the_new_nve_goes_back_whatever_becomes_of_its_copy(broken: str) -> None:
    for column in ("returning", "closing"):
        after = WAYS["new"][column].hears(m.Broken(effect=broken, why="died"))
        assert after.waits_for("ReleaseInto")


@pytest.mark.req("R-14")
@pytest.mark.parametrize("column", ["returning", "closing"])
def test_a_turn_that_fails_does_not_save_the_copy_whose_end_stood_behind_it(column: str) -> None:
    """HO-46; an end that failed itself is not tried for ever."""
    broken = WAYS["new"][column].hears(m.Broken(effect="SteerHere", why="no marker"))
    assert broken.waits_for("StopCopy") or broken.waits_for("DropStale")
    ended = WAYS["new"][column].hears(m.Broken(effect="StopCopy", why="it does not end"))
    assert not ended.waits_for("StopCopy")


@pytest.mark.req("R-14")
@pytest.mark.parametrize("column", ["armed", "sending", "stopping"])
def test_an_old_nve_that_has_forgotten_its_stop_is_retired_and_closes(column: str) -> None:
    """HO-47: its disk was full when it stopped, and its daemon was killed after the commit."""
    back = WAYS["old"][column].restarted().hears(RETIRE)
    assert back.part.retired
    closing = back.hears(CLOSE)
    assert closing.waits_for("StopCopy")
    assert closing.until("closed").part.stage == "closed"


@pytest.mark.req("R-42")
def test_a_retired_old_nve_mutes_broadcasts_again_after_a_restart() -> None:
    assert WAYS["old"]["stopped, retired"].restarted().waits_for("MuteBroadcast")


@pytest.mark.req("R-36")
def test_an_old_nve_that_cannot_go_on_after_the_stop_says_so_before_the_commit() -> None:
    """After the commit it sends on what it can; there is no way back."""
    before = WAYS["old"]["stopped"].hears(m.Broken(effect="ArmPorts", why="no such device"))
    assert before.part.failure == ("ArmPorts", "no such device")
    after = WAYS["old"]["stopped, retired"].hears(m.Broken(effect="ArmPorts", why="gone"))
    assert after.waits_for("ReleaseInto")
    dead = WAYS["old"]["stopped"].hears(m.Broken(effect="vm", why="died"))
    assert dead.part.failure is None, "the new copy is whole: the move goes on"


@pytest.mark.req("R-11")
@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.sampled_from(list(every_event("old").values())), max_size=40),
)
def test_whatever_an_old_nve_hears_it_takes_no_more_checkpoints_than_were_asked_for(
    asked: int, events: list[m.NveEvent]
) -> None:
    """R-11: and none once it was told to restore or to close, or has failed."""
    part = begun("old", checkpoints=asked).until("armed").part
    taken, over = 0, False
    for event in events:
        part, effects = step(part, event)
        over |= isinstance(event, m.Restore | m.Close | m.Resumed) and part.stage != "armed"
        begins = "TakeCheckpoint" in wants(effects)
        assert not (over and begins)
        taken += begins
    assert taken <= asked


@pytest.mark.req("R-11")
def test_a_new_nve_takes_no_checkpoint_once_the_move_is_over() -> None:
    """R-11: also when the old NVE could not be told, and goes on."""
    warm = WAYS["new"]["awaiting, warm"]
    for over in (GIVE_BACK, CLOSE):
        assert warm.hears(over).waits_for("RefuseCheckpoints")
    assert warm.hears(GIVE_BACK).restarted().waits_for("RefuseCheckpoints")


def test_the_last_checkpoint_is_followed_by_the_last_delta_at_once() -> None:
    one = WAYS["old"]["resting"].does("AwaitInterval")
    assert one.waits_for("TakeCheckpoint")
    last = one.hears(m.CheckpointSeen(checkpoint=CHECKPOINT))
    assert last.part.stage == "sending"
    assert last.waits_for("BeginSend")


def test_a_checkpoint_is_due_an_interval_after_the_one_before() -> None:
    resting = WAYS["old"]["resting"]
    assert resting.effects[-1] == m.AwaitInterval(until_ns=CHECKPOINT.at_ns + 10**9)


def test_who_may_not_wait_any_longer_takes_no_more_checkpoints() -> None:
    """`--timeout-action pause`: Force ends mirroring, then it is a hot move that is forced."""
    resting = WAYS["old"]["resting"].hears(m.Force(move="m1")).does("AwaitInterval")
    assert resting.part.stage == "sending"
