"""R-12, R-47: each mode's page has its timeline, and it is what the mode's transcript comes to.

The transcript is written by the real machines (test_conversation, test_cold). Here it is folded:
each line may change what one lane is; a phase's row is how the lanes are when the phase ends.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.core.cold_moves import ColdConversation, cold
from tests.core.moves import NEW, WITH_DISK
from tests.core.tables import ROOT, Table, check_table
from tests.core.test_conversation import GOLDEN, golden

PAGES = ROOT / "docs" / "explanation"
LANES = ("VM", "memory", "disk", "tunnel", "mapping")
Story = dict[str, dict[str, str]]
"""By line of a transcript: what lanes are from then on."""

BEGIN = {
    "VM": "runs on h1",
    "memory": "on h1",
    "disk": "on h1",
    "tunnel": "none",
    "mapping": "h1",
}

HOT: Story = {
    "h2: ReceiveCopy": {"memory": "on h1; an empty copy waits on h2"},
    "h2: OfferDisks": {"disk": "on h1; an empty image waits on h2"},
    "h2: MakeTunnel": {"tunnel": "half made"},
    "h1: MakeTunnel": {"tunnel": "made"},
    "h1: ProvePath": {"tunnel": "made, empty: a probe has crossed"},
    "h1: BeginMirror": {"disk": "copied to h2; each write goes to both"},
    "h1: BeginSend": {"memory": "copied to h2 while the VM writes it"},
    "h1: HoldPorts": {"tunnel": "about to be used: frames wait at h1's gate"},
    "h1: ReleaseInto": {"tunnel": "in use: what comes to h1 goes to h2 and waits there"},
    "h1: AwaitStop": {"VM": "stopped", "memory": "its rest on the way to h2"},
    "h1: EndMirror": {"disk": "equal on both, flushed"},
    "h2: WithdrawDisks": {"disk": "equal on both; h1 cannot write it any more"},
    "h2: AwaitCopy": {"memory": "its rest on the way to h2"},
    "h2 -> nva: Received": {"memory": "equal on both"},
    "h2: SteerHere": {"mapping": "h1; h2's own tenants have turned"},
    "nva: compare-and-set": {"mapping": "h2 in the record; h2's own tenants have turned"},
    "h3: SteerHere": {"mapping": "h2; all but h1's own tenants have turned"},
    "h2: KeepDisks": {"disk": "h2's; the old image is still there"},
    "h2: ResumeVm": {"VM": "runs on h2", "memory": "on h2; the old copy stands"},
    "h1: MuteBroadcast": {"tunnel": "in use by h1's own tenants and by whoever is late"},
    "h1: SteerHere": {"mapping": "h2"},
    "h1: RemoveDisks": {"disk": "on h2"},
    "h1: CleanUp": {"tunnel": "h1's end is gone"},
    "h1: StopCopy": {"memory": "on h2"},
    "h2: CleanUp": {"tunnel": "none"},
}

WARM: Story = {line: after for line, after in HOT.items() if "disk" not in after} | {
    "h2: KeepCheckpoints": {"memory": "on h1; h2 takes checkpoints"},
    "h2: ReceiveCopy": {"memory": "on h1; h2 takes checkpoints, an empty copy waits there"},
    "h1 -> nva: Checkpointed": {"memory": "on h1; the newest whole checkpoint on h2"},
    "h2: CleanUp": {"tunnel": "none", "memory": "on h2; the checkpoint is dropped"},
}

COLD: Story = {
    "nva -> all: mapping, in transit at others": {
        "mapping": "h1; being put in transit at all but h1"
    },
    "h3: kernel has others": {"mapping": "h1; in transit at all but h1: they drop and count"},
    "h3: kernel has all": {"mapping": "in transit everywhere: dropped and counted"},
    "h1 -> nva: Stopped": {"VM": "stopped", "memory": "a file on h1"},
    "nva -> h1: GiveState": {
        "memory": "a file on h1, being carried to h2",
        "disk": "on h1, written by nobody, being carried to h2",
    },
    "h1 -> nva: Received": {"memory": "the same file on both", "disk": "the same on both"},
    "nva: compare-and-set": {"mapping": "h2 in the record; in transit everywhere"},
    "h2 -> nva: Running": {
        "VM": "runs on h2",
        "memory": "on h2; the file on h1 stays",
        "disk": "h2's; the old image is still there",
    },
    "h3: kernel has none": {"mapping": "h2"},
    "nva -> h1: DropState": {"memory": "on h2", "disk": "on h2"},
}


def folded(name: str, story: Story, **begin: str) -> Table:
    """The lanes at the end of each phase in the transcript `name`."""
    lines = (GOLDEN / f"{name}.txt").read_text().splitlines()
    assert set(story) <= set(lines), sorted(set(story) - set(lines))
    lanes, phase = BEGIN | begin, "planned"
    found: Table = {}
    for line in lines:
        before, arrow, after = line.removeprefix("nva: ").partition(" -> ")
        if arrow and before == phase:
            found |= {(lane, phase): lanes[lane] for lane in LANES}
            phase = after
        lanes |= story.get(line, {})
    assert phase == "closed"
    return found | {(lane, phase): lanes[lane] for lane in LANES}


def hot() -> Table:
    return folded("hot_move_with_disk", HOT)


def warm() -> Table:
    return folded("warm_move", WARM, disk="none: a VM with one is refused")


def cold_one() -> Table:
    return folded("cold_move_with_disk", COLD)


@pytest.mark.req("R-12")
@pytest.mark.req("R-47")
@pytest.mark.parametrize("mode", [hot, warm, cold_one], ids=["hot", "warm", "cold"])
def test_the_timeline_of_each_page_is_what_its_transcript_says(
    mode: Callable[[], Table], request: pytest.FixtureRequest
) -> None:
    """R-12, R-47: VM, memory, disk, tunnel and mapping at the end of each phase, cell by cell."""
    name = request.node.callspec.id
    if name == "cold":
        talk = ColdConversation(record=cold("running", WITH_DISK))
        golden("cold_move_with_disk", talk.play())
        assert (talk.record.outcome, talk.copies, talk.images) == ("moved", {NEW}, {NEW})
    check_table("timeline", mode(), PAGES / f"{name}-moves.md", "phase")


@pytest.mark.req("R-47")
def test_each_mode_has_a_timeline_of_its_own() -> None:
    """R-47: hot and warm have a tunnel, warm has checkpoints, and cold is in transit."""

    def lane(table: Table, name: str) -> dict[str, str]:
        return {phase: text for (column, phase), text in table.items() if column == name}

    for table in (hot(), warm()):
        assert "in use" in lane(table, "tunnel")["precopy"]
        assert lane(table, "memory")["equal"] == "equal on both"
    assert "checkpoint" in lane(warm(), "memory")["planned"]
    assert "checkpoint" not in " ".join(hot().values())
    assert set(lane(cold_one(), "tunnel").values()) == {"none"}
    assert "in transit everywhere" in lane(cold_one(), "mapping")["paused"]
    for table in (hot(), warm(), cold_one()):
        assert (lane(table, "VM")["closed"], lane(table, "mapping")["closed"]) == (
            "runs on h2",
            "h2",
        )
