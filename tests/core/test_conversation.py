"""A whole move by its real machines: the transcript, each failure, an abort in each phase."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from overland.model.handover import Handover, Options
from tests.core.conversation import Conversation
from tests.core.moves import NEW, OLD, PEER, WITH_DISK, planned, warm
from tests.core.parts import EFFECTS

GOLDEN = Path(__file__).parents[1] / "golden"

BEFORE_COMMIT = [
    (NEW, "DropStale"),
    (NEW, "QuietPorts"),
    (NEW, "MakeTunnel"),
    (NEW, "ArmPorts"),
    (NEW, "ArmPeers"),
    (NEW, "ReceiveCopy"),
    (NEW, "AwaitCopy"),
    (OLD, "MakeTunnel"),
    (OLD, "ArmPorts"),
    (OLD, "ProvePath"),
    (OLD, "BeginSend"),
    (OLD, "HoldPorts"),
    (OLD, "AwaitDrained"),
    (OLD, "FinishSend"),
    (OLD, "ReleaseInto"),
    (OLD, "AwaitStop"),
    (PEER, "ArmPeers"),
    (PEER, "ProvePath"),
]


def golden(name: str, transcript: list[str]) -> None:
    """Compare with the kept transcript; OVERLAND_ACCEPT=1 keeps the new one."""
    path = GOLDEN / f"{name}.txt"
    text = "\n".join(transcript) + "\n"
    if os.environ.get("OVERLAND_ACCEPT"):
        path.write_text(text)
    assert path.read_text() == text


@pytest.mark.req("R-47")
def test_a_hot_move_reads_as_the_specification_says() -> None:
    talk = Conversation()
    golden("hot_move", talk.play())
    assert talk.record.outcome == "moved"
    assert talk.running == {NEW}


@pytest.mark.req("R-10")
@pytest.mark.parametrize("mode", ["replicate", "standby", "mirror"])
def test_a_second_copy_beside_the_first_is_no_mode_of_a_move(mode: str) -> None:
    """Redundancy is another feature: no record of a move can ask for it, and no option either."""
    record = msgspec.to_builtins(planned())
    with pytest.raises(msgspec.ValidationError, match="mode"):
        msgspec.convert(record | {"mode": mode}, Handover)
    assert not {name for name in Options.__struct_fields__ if "cop" in name or mode in name}


@pytest.mark.req("R-10")
@pytest.mark.parametrize("abort_in", [None, "planned", "precopy", "paused", "equal"])
def test_no_way_of_a_move_needs_two_running_copies(abort_in: str | None) -> None:
    """`Conversation` fails at the first second copy; before the commit only the old one has run."""
    talk = Conversation()
    talk.play(abort_in=abort_in)
    assert talk.running == {NEW if abort_in is None else OLD}


@pytest.mark.req("R-56")
def test_a_disk_that_goes_along_is_equal_before_the_copy_is_whole() -> None:
    talk = Conversation(record=planned(WITH_DISK))
    transcript = talk.play()
    golden("hot_move_with_disk", transcript)
    assert talk.record.outcome == "moved"
    order = [
        f"{OLD}: AwaitStop",
        f"{OLD}: EndMirror",
        f"{OLD}: SendRest",
        f"{NEW}: WithdrawDisks",
        f"{NEW} -> nva: Received",
        "nva: compare-and-set",
        f"{NEW}: KeepDisks",
        f"{NEW}: ResumeVm",
        f"{OLD}: RemoveDisks",
    ]
    assert [line for line in transcript if line in order] == order


WITH_DISK_BEFORE_COMMIT = [
    (NEW, "OfferDisks"),
    (NEW, "WithdrawDisks"),
    (OLD, "BeginMirror"),
    (OLD, "EndMirror"),
    (OLD, "SendRest"),
]


@pytest.mark.req("R-53")
@pytest.mark.parametrize(("nve", "effect"), WITH_DISK_BEFORE_COMMIT)
def test_a_disk_that_cannot_go_along_stays_with_its_vm(nve: str, effect: str) -> None:
    talk = Conversation(record=planned(WITH_DISK), fail={(nve, effect)})
    transcript = talk.play()
    assert talk.record.outcome == "aborted"
    assert f"{nve}: {effect}: injected" in (talk.record.reason or "")
    assert talk.running == {OLD}
    assert f"{OLD}: RemoveDisks" not in transcript
    assert f"{NEW}: KeepDisks" not in transcript
    assert all(part.stage == "closed" for part in talk.parts.values())


def test_an_abort_after_the_stop_brings_the_vm_and_its_frames_home() -> None:
    talk = Conversation()
    golden("hot_abort_paused", talk.play(abort_in="paused"))
    assert talk.record.outcome == "aborted"
    assert talk.running == {OLD}


@pytest.mark.req("R-14")
@pytest.mark.parametrize(("nve", "effect"), BEFORE_COMMIT)
def test_any_failure_before_the_commit_ends_with_the_vm_at_the_old_host(
    nve: str, effect: str
) -> None:
    talk = Conversation(fail={(nve, effect)})
    talk.play()
    assert talk.record.outcome == "aborted"
    assert f"{nve}: {effect}: injected" in (talk.record.reason or "")
    assert talk.running == {OLD}
    assert all(part.stage == "closed" for part in talk.parts.values())


@pytest.mark.parametrize("phase", ["planned", "precopy", "paused", "equal"])
def test_an_abort_in_any_phase_before_the_commit_ends_at_the_old_host(phase: str) -> None:
    talk = Conversation()
    talk.play(abort_in=phase)
    assert (talk.record.outcome, talk.running) in (("aborted", {OLD}), ("moved", {NEW}))
    assert (talk.record.outcome == "aborted") == (phase != "equal" or OLD in talk.running)


def test_a_peer_that_cannot_steer_does_not_stop_the_move() -> None:
    talk = Conversation(fail={(PEER, "SteerHere")})
    talk.play()
    assert talk.record.outcome == "moved"


@pytest.mark.req("R-47")
@pytest.mark.req("R-12")
def test_a_warm_move_reads_as_the_specification_says() -> None:
    """R-12, R-47: whole checkpoints while the VM runs, then the last delta, then it runs there."""
    talk = Conversation(record=warm())
    golden("warm_move", talk.play())
    assert talk.record.outcome == "moved"
    assert talk.running == {NEW}
    assert talk.record.checkpoints.count == 2


@pytest.mark.req("R-11")
@pytest.mark.parametrize("nve", [OLD, NEW, PEER])
@pytest.mark.parametrize("effect", sorted({e for names in EFFECTS.values() for e in names}))
def test_whatever_fails_a_warm_move_ends_and_mirroring_with_it(nve: str, effect: str) -> None:
    """R-11: committed or aborted, and not one checkpoint after that."""
    talk = Conversation(record=warm(), fail={(nve, effect)})
    talk.play()
    assert talk.record.outcome in ("moved", "aborted")
    assert talk.running == ({NEW} if talk.record.outcome == "moved" else {OLD})
    took = [n for n, line in enumerate(talk.transcript) if line.endswith(": TakeCheckpoint")]
    over = [
        n for n, line in enumerate(talk.transcript) if line.endswith((": Restore", ": Activate"))
    ]
    assert max(took, default=-1) < min(over)


@pytest.mark.req("R-11")
@pytest.mark.parametrize("phase", ["planned", "precopy", "paused"])
def test_an_abort_of_a_warm_move_ends_it_and_mirroring(phase: str) -> None:
    """R-11."""
    talk = Conversation(record=warm())
    talk.play(abort_in=phase)
    assert (talk.record.outcome, talk.running) == ("aborted", {OLD})
    assert all(part.stage == "closed" for part in talk.parts.values())
    assert talk.record.checkpoints.count < 3
