"""The tree is what the documents say, and every requirement of the main job has its test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from overland.wire import messages as w

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "overland"

MAIN_JOB = {
    *("R-03", "R-06", "R-07", "R-08", "R-09"),
    *(f"R-{number}" for number in range(14, 19)),
    *(f"R-{number}" for number in range(35, 50)),
    "R-52",
}

WHATEVER_FAILS = {
    *("R-09", "R-10", "R-14", "R-33", "R-35", "R-42", "R-45", "R-46"),
    *("N-09", "N-10", "N-11", "N-12", "E-01", "E-02"),
}
"""What "Whatever fails" names."""


L3_MOBILITY = {
    *("R-08", "R-19", "R-20", "R-30", "R-44", "R-50", "R-62", "N-15"),
    *(f"R-{number}" for number in range(22, 29)),
}
"""What "L3 mobility" names."""


def test_each_requirement_of_the_main_job_has_a_test_that_names_it() -> None:
    named = set()
    for path in (ROOT / "tests").rglob("*.py"):
        named |= set(re.findall(r'mark\.req\("([REN]-\d+)"\)', path.read_text()))
    assert sorted((MAIN_JOB | WHATEVER_FAILS | L3_MOBILITY) - named) == []


@pytest.mark.req("R-38")
def test_every_box_of_the_architecture_is_in_the_tree_and_every_folder_in_the_picture() -> None:
    """R-38: who handles packets is `dataplane`, at the NVE; `hypervisor` does not know of it."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    for name in re.findall(r"`([a-z_]+/(?:[a-z_]+\.py)?)`", text):
        assert (PACKAGE / name).exists(), name
    for dotted in re.findall(r"\b((?:nva|nve|api|dataplane|hypervisor|wire)\.[a-z_]+)\b", text):
        assert (PACKAGE / (dotted.replace(".", "/") + ".py")).exists(), dotted
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {folder for folder in folders if f"`{folder}/`" not in text} == set()
    for path in (PACKAGE / "hypervisor").glob("*.py"):
        assert "overland.dataplane" not in path.read_text()


def test_the_wire_specification_names_every_message_and_field() -> None:
    text = (ROOT / "spec" / "wire.md").read_text()
    for kind in {*w.FromNve.__args__, *w.FromNva.__args__}:
        rows = re.findall(rf"^\| {kind.__name__} \| (.*?) \|", text, re.MULTILINE)
        assert rows, kind.__name__
        assert re.findall(r"`(\w+)`", rows[0]) == list(kind.__struct_fields__), kind.__name__


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "spec").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            if not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert broken == []
