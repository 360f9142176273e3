"""What identifier-locator addressing costs: beside VXLAN on the same path, and with many mappings.

Two endpoints on two hosts speak by iperf3 in a network of kind ila and in one of kind l3, in turns;
then the ila one again, with 10 and with 100,000 mappings in the sender's NVE.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from handover import overland, quantile
from pyroute2 import AsyncIPRoute

from overland.dataplane.ila import Ila
from overland.dataplane.namespace import inside, path_of
from overland.model.nve import LocatorEntry

LAB = "benchila"
H1 = f"ovl-{LAB}-h1"
JADE, GREY = "2001:db8:100:0:2000::2", "fd42::12"
FILLING = "ovi16777215"
"""Its number is that of no network: the NVE leaves these mappings alone, its packets meet them."""

CHANGES = 2000


def prepare() -> None:
    overland("lab", "down", "--name", LAB)
    overland("lab", "up", "--name", LAB, "--hosts", "2")
    for name, vni, kind, subnet in (
        ("jade", "60", "ila", "2001:db8:100::/64"),
        ("grey", "61", "l3", "fd42::/64"),
    ):
        overland(
            *("network", "create", name, "--vni", vni, "--kind", kind, "--ipv6", subnet),
            *("--mtu", "1500"),
        )
        for n in (1, 2):
            address = f"2001:db8:100:0:2000::{n}" if kind == "ila" else f"fd42::1{n}"
            where = ("--host", f"h{n}", "--network", name, "--ipv6", address, "--lab", LAB)
            overland("lab", "endpoint", "add", f"{name}{n}", *where)


def iperf(network: str, to: str, seconds: float, *more: str) -> dict[str, Any]:
    """One run from host 1 to host 2; iperf3's own report of its end."""
    at = ("ip", "netns", "exec")
    server = [*at, f"ovl-{LAB}-e-{network}2", "iperf3", "-s", "-1", "--forceflush"]
    client = [*at, f"ovl-{LAB}-e-{network}1", "iperf3", "-c", to, "-t", str(seconds), "-J", *more]
    with subprocess.Popen(server, stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout is not None
        while "listening" not in serving.stdout.readline():
            assert serving.poll() is None
        done = subprocess.run(client, capture_output=True, text=True, check=False)
        serving.communicate(timeout=30)
    report: dict[str, Any] = json.loads(done.stdout)
    if "end" not in report or "error" in report:
        sys.exit(f"iperf3: {report.get('error', done.stderr)}")
    return dict(report["end"])


def stream(network: str, to: str, seconds: float) -> float:
    """TCP, in Gbit/s as received."""
    end = iperf(network, to, seconds)
    return float(end["sum_received"]["bits_per_second"]) / 1e9


def packets(network: str, to: str, seconds: float) -> float:
    """UDP with 64 bytes in each packet as fast as it goes, in thousands a second as received."""
    total = iperf(network, to, seconds, "-u", "-b", "0", "-l", "64")["sum"]
    return float(total["packets"] - total["lost_packets"]) / float(total["seconds"]) / 1e3


def in_turns(kinds: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Each kind once in every round, so that a disturbed moment hits all alike."""
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, measure in kinds.items():
            found[name].append(measure())
    return found


class Filling:
    """Mappings put into the tables of host 1's NVE while it runs."""

    def __init__(self, ila: Ila) -> None:
        self._ila = ila
        self._there = 0

    def fill(self, count: int) -> None:
        for number in range(self._there, count):
            self._ila.put(entry(number))
        for number in range(count, self._there):
            self._ila.take(entry(number))
        self._there = count

    def changes(self) -> list[float]:
        """Milliseconds that one mapping takes to be another, each time."""
        found = []
        for number in range(CHANGES):
            mac, place = entry(number % self._there).mac, f"2001:db8:a:{3 + number % 2:x}::1"
            began_s = time.perf_counter()
            self._ila.turn(FILLING, mac, place)
            found.append((time.perf_counter() - began_s) * 1e3)
        return found


def entry(number: int) -> LocatorEntry:
    mac = bytes((2, 0x77, *number.to_bytes(4, "big"))).hex(":")
    address = f"2001:db8:200:0:2000::{number >> 15:x}:{(number & 0x7FFF) + 1:x}"
    return LocatorEntry(device=FILLING, mac=mac, address=address, remote="2001:db8:a:2::1")


async def filled(rounds: int, seconds: float, counts: Sequence[int]) -> dict[str, Any]:
    """Throughput with few and many mappings, in turns, and what a change takes with many."""
    with inside(path_of(H1)):
        async with AsyncIPRoute() as ip:
            ila = Ila(ip)
            await ila.start("2001:db8:a:1::/64", "underlay")
            filling = Filling(ila)
            found: dict[str, dict[int, list[float]]] = {"stream": {}, "packets": {}}
            for _ in range(rounds):
                for count in counts:
                    filling.fill(count)
                    for what, measure in (("stream", stream), ("packets", packets)):
                        found[what].setdefault(count, []).append(measure("jade", JADE, seconds))
            changes = filling.changes()
            filling.fill(0)
    return {"throughput": found, "changes_ms": changes}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--mappings", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=Path("out/bench-ila.json"))
    options = parser.parse_args()
    if shutil.which("iperf3") is None:
        sys.exit("iperf3 is missing: apt-get install iperf3")
    os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="bench-")  # a context of our own
    prepare()
    try:
        kinds = {"ila": ("jade", JADE), "vxlan": ("grey", GREY)}
        beside = {
            what: in_turns(
                {
                    name: lambda to=to, measure=measure: measure(*to, options.seconds)
                    for name, to in kinds.items()
                },
                options.rounds,
            )
            for what, measure in (("stream", stream), ("packets", packets))
        }
        few_and_many = (10, options.mappings)
        many = asyncio.run(filled(options.rounds, options.seconds, few_and_many))
    finally:
        overland("lab", "down", "--name", LAB)
    report(beside, many, few_and_many)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"beside": beside, "many": many}, indent=1))


def report(
    beside: dict[str, dict[str, list[float]]], many: dict[str, Any], counts: tuple[int, int]
) -> None:
    """Medians, and the ratios that are promised."""
    print(f"{'medians':34}{'ila':>12}{'vxlan':>12}{'ratio':>8}")
    units = {"stream": "TCP stream, Gbit/s", "packets": "UDP of 64 bytes, 1,000/s"}
    for what, unit in units.items():
        ila, vxlan = (statistics.median(beside[what][each]) for each in ("ila", "vxlan"))
        print(f"{unit:34}{ila:>12.2f}{vxlan:>12.2f}{ila / vxlan:>8.2f}")
    print(f"{'ila, by mappings in the NVE':34}{counts[1]:>12,}{counts[0]:>12,}{'ratio':>8}")
    for what, unit in units.items():
        few, lots = (statistics.median(many["throughput"][what][each]) for each in counts)
        print(f"{unit:34}{lots:>12.2f}{few:>12.2f}{lots / few:>8.2f}")
    changes = many["changes_ms"]
    print(
        f"one mapping changed among {counts[1]:,}, ms: median {statistics.median(changes):.3f}, "
        f"p99 {quantile(changes, 0.99):.3f}, longest {max(changes):.3f}"
    )


if __name__ == "__main__":
    main()
