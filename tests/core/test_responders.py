"""Who answers the probe frames of a device."""

from __future__ import annotations

from typing import Any

import pytest

from overland.dataplane import handover
from overland.dataplane.handover import LinuxHandoverPath


class Listener:
    """Stands for a packet socket that is bound to the device as it is now."""

    def __init__(self, device: str) -> None:
        self.index = NOW[device]
        self.closed = False

    def close(self) -> None:
        self.closed = True


NOW = {"ovx42": 7}


def test_a_device_that_was_made_anew_is_listened_to_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A VN that left a host and came back: its NVE was deaf to probes, so no VM could go there."""
    monkeypatch.setattr("overland.dataplane.pathframe.Responder", Listener)
    monkeypatch.setattr(handover, "interface_index", NOW.__getitem__)
    nothing: Any = None
    path: Any = LinuxHandoverPath(nothing, nothing, nothing, nothing, nothing)
    path._respond_on("ovx42")  # noqa: SLF001 - as arm_peer and open_tunnel do
    first = path._responders["ovx42"]  # noqa: SLF001
    path._respond_on("ovx42")  # noqa: SLF001
    assert path._responders["ovx42"] is first  # noqa: SLF001
    monkeypatch.setitem(NOW, "ovx42", 9)
    path._respond_on("ovx42")  # noqa: SLF001
    again = path._responders["ovx42"]  # noqa: SLF001
    assert (first.closed, again.index) == (True, 9)
