"""The Promela models: spin walks every state of each, and its transitions are those of the code."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest

from overland.mobility import cold
from overland.mobility.coordinator import step
from overland.model.handover import COLD_LEGAL, LEGAL, Phase
from tests.core.cold_moves import in_phase as cold_in_phase
from tests.core.moves import every_event, in_phase
from tests.core.test_coordinator import STABLE

SPEC = Path(__file__).parents[2] / "spec"
HOT, COLD = "handover.pml", "cold.pml"
PASSED_THROUGH: frozenset[Phase] = frozenset({"staged", "running"})
"""Phases that the coordinator enters and leaves within one step: the model has none of them."""


def verdict(folder: Path, model: str, *defines: str) -> str:
    """What spin says after it has looked at every state."""
    assert shutil.which("spin"), "spin is missing: scripts/bootstrap installs it"
    shutil.copy(SPEC / model, folder / model)
    flags = ("-O2", "-DSAFETY", "-DCOLLAPSE", "-DMEMLIM=4096", "-o", "pan", "pan.c")
    for command in (
        ("spin", *(f"-D{each}" for each in defines), "-a", model),
        ("gcc", *flags),
    ):
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    done = subprocess.run(
        ["./pan", "-m200000"], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout


@pytest.mark.req("R-14")
@pytest.mark.req("R-45")
@pytest.mark.req("R-46")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("model", "losses", "crashes"), [(HOT, 1, 0), (HOT, 0, 1), (COLD, 1, 1), (COLD, 0, 2)]
)
def test_no_two_runners_no_deadlock_and_everybody_converges(
    tmp_path: Path, model: str, losses: int, crashes: int
) -> None:
    """And, in a cold move, no VM that runs on from an old state, and no address left in transit."""
    said = verdict(tmp_path, model, f"LOSSES={losses}", f"CRASHES={crashes}")
    assert "errors: 0" in said, said
    assert "Search not completed" not in said, said


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("model", "bug"),
    [(HOT, "BUG_RUN_EARLY"), (COLD, "BUG_STOP_EARLY"), (COLD, "BUG_KEEP_BOTH")],
)
def test_a_planted_bug_is_found(tmp_path: Path, model: str, bug: str) -> None:
    said = verdict(tmp_path, model, "LOSSES=0", "CRASHES=0", bug)
    assert "assertion violated" in said


def modelled(model: str) -> set[tuple[str, str]]:
    text = (SPEC / model).read_text()
    found = re.findall(r"enter\((\w+), (\w+)\)", text)
    return {(old, new) for old, new in found if old != "FROM"}


@pytest.mark.req("R-45")
def test_the_model_and_the_code_have_the_same_transitions() -> None:
    assert modelled(HOT) == {(old, new) for old in STABLE for new in _after(old)}
    walked = set()
    for phase, event in product(STABLE, every_event()):
        after, _ = step(in_phase(phase), event, 10_000.0, 100)
        if after.phase != phase:
            walked.add((phase, after.phase))
    assert walked <= modelled(HOT)


@pytest.mark.req("R-33")
@pytest.mark.req("R-45")
def test_the_model_of_the_cold_move_and_its_code_have_the_same_transitions() -> None:
    """Of a VM that runs; one at rest skips the marking, which the model leaves out."""
    at_rest = {("planned", "paused"), ("planned", "equal"), ("committed", "drained")}
    stable = [phase for phase in COLD_LEGAL if phase != "running"]
    legal = {(old, new) for old in stable for new in _after_cold(old)}
    assert modelled(COLD) == legal - at_rest
    walked = set()
    for phase, event in product(stable, every_event()):
        if phase not in ("closed", "aborted"):
            after, _ = cold.step(cold_in_phase(phase), event, 10_000.0, 100)
            walked |= {(phase, after.phase)} if after.phase != phase else set()
    assert walked <= modelled(COLD) | {("committed", "drained")}


def _after_cold(phase: Phase) -> set[Phase]:
    return {"converging" if each == "running" else each for each in COLD_LEGAL[phase]}


def _after(phase: Phase) -> set[Phase]:
    """Phases that may follow, those that are passed through left out."""
    found: set[Phase] = set()
    for following in LEGAL[phase]:
        found |= _after(following) if following in PASSED_THROUGH else {following}
    return found
