"""The Promela model: spin walks every state of it, and its transitions are those of the code."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest

from overland.mobility.coordinator import step
from overland.model.handover import LEGAL, Phase
from tests.core.moves import every_event, in_phase
from tests.core.test_coordinator import STABLE

MODEL = Path(__file__).parents[2] / "spec" / "handover.pml"
PASSED_THROUGH: frozenset[Phase] = frozenset({"staged", "running"})
"""Phases that the coordinator enters and leaves within one step: the model has none of them."""


def verdict(folder: Path, *defines: str) -> str:
    """What spin says after it has looked at every state."""
    assert shutil.which("spin"), "spin is missing: scripts/bootstrap installs it"
    shutil.copy(MODEL, folder / "handover.pml")
    flags = ("-O2", "-DSAFETY", "-DCOLLAPSE", "-DMEMLIM=4096", "-o", "pan", "pan.c")
    for command in (
        ("spin", *(f"-D{each}" for each in defines), "-a", "handover.pml"),
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
@pytest.mark.parametrize(("losses", "crashes"), [(1, 0), (0, 1)])
def test_no_two_runners_no_deadlock_and_everybody_converges(
    tmp_path: Path, losses: int, crashes: int
) -> None:
    said = verdict(tmp_path, f"LOSSES={losses}", f"CRASHES={crashes}")
    assert "errors: 0" in said, said
    assert "Search not completed" not in said, said


@pytest.mark.timeout(120)
def test_a_planted_bug_is_found(tmp_path: Path) -> None:
    said = verdict(tmp_path, "LOSSES=0", "CRASHES=0", "BUG_RUN_EARLY")
    assert "assertion violated" in said


@pytest.mark.req("R-45")
def test_the_model_and_the_code_have_the_same_transitions() -> None:
    text = MODEL.read_text()
    modelled = {
        (old, new) for old, new in re.findall(r"enter\((\w+), (\w+)\)", text) if old != "FROM"
    }
    assert modelled == {(old, new) for old in STABLE for new in _after(old)}
    walked = set()
    for phase, event in product(STABLE, every_event()):
        after, _ = step(in_phase(phase), event, 10_000.0, 100)
        if after.phase != phase:
            walked.add((phase, after.phase))
    assert walked <= modelled


def _after(phase: Phase) -> set[Phase]:
    """Phases that may follow, those that are passed through left out."""
    found: set[Phase] = set()
    for following in LEGAL[phase]:
        found |= _after(following) if following in PASSED_THROUGH else {following}
    return found
