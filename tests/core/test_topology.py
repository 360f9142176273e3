"""Which network namespaces are a lab's."""

from __future__ import annotations

from overland.lab.topology import of_lab

ALL = [
    *("ovl-a-u", "ovl-a-nva", "ovl-a-h1", "ovl-a-e-p1", "ovl-a-e-x-u"),
    *("ovl-a-b-u", "ovl-a-b-h1", "ovl-a-b-e-p1", "ovl-c-u", "somebody"),
]


def test_a_lab_is_not_taken_down_with_another_whose_name_begins_its_own() -> None:
    assert of_lab("a-b", ALL) == ["ovl-a-b-e-p1", "ovl-a-b-h1", "ovl-a-b-u"]
    assert set(of_lab("a", ALL)) == {
        "ovl-a-u",
        "ovl-a-nva",
        "ovl-a-h1",
        "ovl-a-e-p1",
        "ovl-a-e-x-u",
    }
    assert of_lab("d", ALL) == []


def test_what_a_crash_left_of_a_lab_is_still_its_own() -> None:
    assert of_lab("c", ["ovl-c-h1", "ovl-c-h2"]) == ["ovl-c-h1", "ovl-c-h2"]
