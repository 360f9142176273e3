"""The field's words, and only these: one word per thing in code, commands, logs and documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = sorted(
    path
    for folder, pattern in (
        ("docs", "**/*.md"),
        ("spec", "*.md"),
        ("src", "**/*.py"),
        (".", "*.md"),
    )
    for path in (ROOT / folder).glob(pattern)
)
PROSE = [path for path in TEXTS if path.suffix == ".md"]

FORBIDDEN = {
    "R-15": r"\b(source|destination|src|dst)[ _-](NVE|hypervisor)\b",
    "R-17 L3 mobility, not IP-based": r"\bIP-based (mobility|move|VM)",
    "R-17 same subnet, not same link": r"\bsame link\b",
    "R-16 in flight and late": r"\b(straggling|residual|leftover) (packet|frame)s\b",
    "R-06 capitals are for standards": r"\b(MUST|SHALL|SHOULD|SHALL NOT|MUST NOT|SHOULD NOT)\b",
    "R-06 no claim without a test": r"\b(seamless|zero[- ]downtime|best[- ]in[- ]class)\b",
}
"""What must not be written anywhere, by the requirement that says so."""

ACRONYMS = {
    "NVA": "network virtualization authority|central authority",
    "NVE": "network\\s+virtualization\\s+edge|edge \\(NVE\\)",
    "VM": "virtual machine",
    "VN": "virtual network",
}


@pytest.mark.req("R-06")
@pytest.mark.req("R-15")
@pytest.mark.req("R-17")
@pytest.mark.parametrize("rule", sorted(FORBIDDEN))
def test_no_word_of_the_wrong_kind(rule: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in TEXTS
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(FORBIDDEN[rule], line)
    ]
    assert found == []


@pytest.mark.req("R-18")
@pytest.mark.parametrize("name", ["README.md", "spec/handover.md", "docs/architecture.md"])
@pytest.mark.parametrize("acronym", sorted(ACRONYMS))
def test_an_acronym_is_explained_where_it_is_first_used(name: str, acronym: str) -> None:
    text = (ROOT / name).read_text()
    first = re.search(rf"\b{acronym}s?\b", _prose(text))
    if first is None:
        return
    near = _prose(text)[max(0, first.start() - 250) : first.end() + 250]
    assert re.search(ACRONYMS[acronym], near, re.IGNORECASE), f"{acronym} in {name}"


def _prose(text: str) -> str:
    """Without pictures and code."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@pytest.mark.req("R-03")
def test_every_rule_has_one_level_one_number_and_its_reason() -> None:
    text = (ROOT / "spec" / "handover.md").read_text()
    rules = re.findall(
        r"^- \*\*HO-(\d+)\*\* (.*?)(?=^- \*\*HO-|^## )", text, re.MULTILINE | re.DOTALL
    )
    numbers = [int(number) for number, _ in rules]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    for number, rule in rules:
        assert re.search(r"\*[A-Z(].*\*", rule, re.DOTALL), f"HO-{number} gives no reason"
        assert not re.search(r"\b(should|may optionally|recommended)\b", rule), f"HO-{number}"


@pytest.mark.req("R-03")
@pytest.mark.req("R-07")
def test_no_rule_of_the_handover_is_for_one_address_family() -> None:
    """Except the courtesy announcements, which exist per family by their nature."""
    text = (ROOT / "spec" / "handover.md").read_text()
    rules = re.findall(r"^- (\*\*HO-\d+\*\* .*)$", text, re.MULTILINE)
    named = [rule for rule in rules if re.search(r"IPv[46]", rule)]
    assert named == []


@pytest.mark.req("R-49")
def test_each_step_says_whether_it_is_l2_l3_or_both() -> None:
    text = (ROOT / "spec" / "handover.md").read_text()
    table = text.split("## Order of stages")[1].split("## Rules")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 11
    assert {row[-1].strip() for row in rows} <= {"L2", "L3", "L2, L3", "both"}
