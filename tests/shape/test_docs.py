"""The reference is what the code says: generated pages are fresh, the receipt's page is whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overland.mobility.forecast import forecast
from overland.model.cluster import Interface, Vm
from overland.model.eligibility import Grounds
from overland.model.forecast import Gauge
from overland.model.handover import (
    LEGAL,
    Acknowledgement,
    Handover,
    MovingPort,
    Options,
    Packets,
    PhaseAt,
)
from overland.model.readdress import AddressChange, Readdress
from overland.model.receipt import receipt

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"


def test_generated_pages_are_fresh() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "docs"), "--check"]
    paths = {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | paths
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_key_of_a_receipt_is_explained_and_no_other() -> None:
    text = (REFERENCE / "receipt.md").read_text().split("## Outcomes")[0]
    explained = re.findall(r"^\| `([a-z0-9_.]+)` \|", text, re.MULTILINE)
    assert explained == list(_keys(receipt(_record())))


@pytest.mark.parametrize("phase", sorted(LEGAL))
def test_every_phase_is_explained(phase: str) -> None:
    text = (REFERENCE / "receipt.md").read_text()
    assert f"`{phase}`" in text


def _keys(value: dict[str, Any], above: str = "") -> Iterator[str]:
    """Every key, with the keys of objects (and of the first of a list of objects) below it."""
    for key, inner in value.items():
        yield above + key
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            inner = inner[0]
        if isinstance(inner, dict):
            yield from _keys(inner, f"{above}{key}.")


def _record() -> Handover:
    interface = Interface(network="blue", mac="02:00:00:00:00:01", ipv4="10.42.0.50")
    port = MovingPort(
        network="blue",
        vni=42,
        device="ovx42",
        port="ovt0",
        mac=interface.mac,
        underlay="ipv4",
        mtu=1500,
        old="10.200.0.1",
        new="10.200.0.2",
        tunnel=1,
    )
    return Handover(
        id="m",
        mode="warm",
        vm=Vm(name="web", host="h1", interfaces=(interface,)),
        old_nve="h1",
        new_nve="h2",
        ports=(port,),
        readdress=Readdress(
            changes=(AddressChange(network="blue", old=("10.42.0.50",), new=("10.42.0.60",)),),
            keep_s=30.0,
        ),
        grounds=Grounds(basis="covered", origin="NVA: l2 network blue", at_ns=1),
        forecast=forecast(Gauge(memory_bytes=1 << 27, dirty_bytes_per_s=0.0), Options()),
        version=2,
        phases=(PhaseAt(phase="planned", at_ns=1),),
        acknowledged=(Acknowledgement(nve="h1", at_ns=1),),
        packets=Packets(),
    )
