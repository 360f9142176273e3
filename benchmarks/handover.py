"""30 hot moves in a row under numbered streams both ways, beside a plain bridge and QEMU alone."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import plain

OVERLAND = str(Path(sys.executable).parent / "overland")
LAB = "bench"
DIRTY = "ov.dirty=32,20"
HOSTS = ("h1", "h2", "h3")


def overland(*arguments: str, check: bool = True) -> Any:
    """Run the command; its JSON output, if any."""
    done = subprocess.run([OVERLAND, *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        sys.exit(f"overland {' '.join(arguments)}: {done.stderr.strip()}")
    return json.loads(done.stdout) if done.stdout.startswith("{") else done.stdout


def prepare(kind: str) -> None:
    overland("lab", "down", "--name", LAB)
    overland("lab", "up", "--name", LAB)
    overland(
        *("network", "create", "blue", "--vni", "42", "--kind", kind, "--ipv6", "fd42::/64"),
        *(() if kind == "ila" else ("--ipv4", "10.42.0.0/24")),
    )
    for index, host in enumerate(HOSTS, 1):
        where = ("--host", host, "--network", "blue", "--lab", LAB)
        faces = (f"--{family}={address}" for family, address in addresses(kind, 10 + index))
        overland("lab", "endpoint", "add", f"p{index}", *where, *faces)
    face = ",".join(f"{family}={address}" for family, address in addresses(kind, 5))
    overland(
        *("vm", "create", "web", "--host", "h1", "--memory", "128MiB"),
        *("--network", f"blue,{face}", "--append", DIRTY),
    )


def addresses(kind: str, number: int) -> list[tuple[str, str]]:
    """Of both families, but for identifier-locator addressing, which knows one."""
    if kind == "ila":
        return [("ipv6", f"fd42::2000:0:0:{number}")]
    return [("ipv4", f"10.42.0.{number}"), ("ipv6", f"fd42::{number}")]


def restart_under_traffic(rate: int) -> dict[str, Any]:
    """Kill and restart every daemon, one after the other, under streams."""
    overland("probe", "start", "web", "--lab", LAB, "--rate", str(rate))
    for daemon in (*HOSTS, "nva"):
        overland("lab", "restart", daemon, "--name", LAB)
        time.sleep(2)
    verdict = overland("probe", "stop", "--lab", LAB, "-o", "json", check=False)
    return dict(verdict["total"])


def moves_under_traffic(moves: int, rate: int, back: int) -> dict[str, Any]:
    """Move the VM around and around; the verdict and all receipts."""
    overland(
        *("probe", "start", "web", "--lab", LAB),
        *("--rate", str(rate), "--rate-from-vm", str(back)),
    )
    receipts = [
        overland("vm", "migrate", "web", "--to", HOSTS[(n + 1) % 3], "-o", "json", check=False)
        for n in range(moves)
    ]
    verdict = overland("probe", "stop", "--lab", LAB, "-o", "json", check=False)
    return {"total": verdict["total"], "flows": verdict["flows"], "receipts": receipts}


def quantile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.1f} / {quantile(values, 0.99):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--moves", type=int, default=30)
    parser.add_argument("--rate", type=int, default=5000)
    parser.add_argument("--rate-from-vm", type=int)
    parser.add_argument("--kind", choices=("l2", "l3", "ila"), default="l2", help="of the network")
    parser.add_argument("--no-plain", action="store_true", help="without the plain bridge")
    parser.add_argument("--out", type=Path, default=Path("out/bench-handover.json"))
    options = parser.parse_args()
    back = options.rate if options.rate_from_vm is None else options.rate_from_vm
    os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="bench-")  # a context of our own
    prepare(options.kind)
    try:
        ours = moves_under_traffic(options.moves, options.rate, back)
        restarts = restart_under_traffic(options.rate)
    finally:
        overland("lab", "down", "--name", LAB)
    theirs = None if options.no_plain else plain.measure(options.moves, options.rate, back, DIRTY)
    report(ours, restarts, theirs, options.rate, back)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"overland": ours, "restarts": restarts, "plain": theirs}
    options.out.write_text(json.dumps(result, indent=1))


def report(
    ours: dict[str, Any],
    restarts: dict[str, Any],
    theirs: dict[str, Any] | None,
    rate: int,
    back: int,
) -> None:
    """One table: overland beside plain bridge, flood and learn, and QEMU alone."""
    moved = [each for each in ours["receipts"] if each["outcome"] == "moved"]
    print(
        f"{len(ours['receipts'])} moves, {rate} packets/s to the VM and {back} from it, "
        "correspondents on three hosts"
    )
    print(f"{'':44}{'overland':>18}{'plain bridge, QEMU':>22}")

    def row(what: str, mine: Any, other: Any = "-") -> None:
        print(f"{what:44}{mine!s:>18}{other!s:>22}")

    row("moved", len(moved), len(theirs["stops_ms"]) if theirs else "-")
    for key in ("sent", "lost", "duplicated", "out_of_order"):
        row(key, ours["total"][key], theirs["total"][key] if theirs else "-")
    stops = [each["vm_stop_ms"] for each in moved]
    row("VM stop, ms (median / p99)", spread(stops), spread(theirs["stops_ms"]) if theirs else "-")
    if theirs:
        ratio = statistics.median(stops) / statistics.median(theirs["stops_ms"])
        row("VM stop, overland to QEMU alone (medians)", f"{ratio:.2f}")
    for key, what in (
        ("network_gap_ms", "network gap beyond the stop, ms"),
        ("last_redirected_after_commit_ms", "last redirected after commit, ms"),
        ("tunnel_closed_after_commit_ms", "tunnel closed after commit, ms"),
        ("total_ms", "whole move, ms"),
    ):
        row(what, spread([each[key] for each in moved if each[key] is not None]))
    lost = restarts["lost"], restarts["duplicated"], restarts["out_of_order"]
    row("restarts of 3 NVEs, NVA: lost, doubled, late", "{}, {}, {}".format(*lost))


if __name__ == "__main__":
    main()
