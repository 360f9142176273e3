"""What the hypervisor adapter does with saved states, with a QEMU that is spoken for."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from overland.hypervisor.qemu import QemuHypervisor, TapSource
from overland.ports import HypervisorFailure


def hypervisor(folder: Path) -> QemuHypervisor:
    (folder / "suspended").mkdir()
    (folder / "taken").mkdir()
    return QemuHypervisor(folder, cast("TapSource", None))


async def test_a_state_that_is_nowhere_is_not_kept(tmp_path: Path) -> None:
    """HO-43: the new host must not say that it has what it has not. What is kept stays kept."""
    host = hypervisor(tmp_path)
    with pytest.raises(HypervisorFailure, match="not here any more"):
        await host.keep_state("web", "m1")
    (tmp_path / "taken" / "m1").write_bytes(b"state")
    for _ in range(2):
        await host.keep_state("web", "m1")
        assert await host.saved_bytes("web") == 5
