"""30 hot moves in a row under numbered streams both ways; prints a table, writes JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

OVERLAND = str(Path(sys.executable).parent / "overland")
LAB = "bench"
HOSTS = ("h1", "h2", "h3")


def overland(*arguments: str, check: bool = True) -> Any:
    """Run the command; its JSON output, if any."""
    done = subprocess.run([OVERLAND, *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        sys.exit(f"overland {' '.join(arguments)}: {done.stderr.strip()}")
    return json.loads(done.stdout) if done.stdout.startswith("{") else done.stdout


def prepare() -> None:
    overland("lab", "down", "--name", LAB)
    overland("lab", "up", "--name", LAB)
    overland(
        *("network", "create", "blue", "--vni", "42"),
        *("--ipv4", "10.42.0.0/24", "--ipv6", "fd42::/64"),
    )
    for index, host in enumerate(HOSTS, 1):
        overland(
            *("lab", "endpoint", "add", f"p{index}", "--host", host, "--network", "blue"),
            *("--ipv4", f"10.42.0.1{index}", "--ipv6", f"fd42::1{index}", "--lab", LAB),
        )
    overland(
        *("vm", "create", "web", "--host", "h1", "--memory", "128MiB"),
        *("--network", "blue,ipv4=10.42.0.5,ipv6=fd42::5", "--append", "ov.dirty=32,20"),
    )


def quantile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--moves", type=int, default=30)
    parser.add_argument("--rate", type=int, default=5000)
    parser.add_argument("--rate-from-vm", type=int)
    parser.add_argument("--out", type=Path, default=Path("out/bench-handover.json"))
    options = parser.parse_args()
    prepare()
    try:
        back = str(options.rate if options.rate_from_vm is None else options.rate_from_vm)
        overland(
            *("probe", "start", "web", "--lab", LAB),
            *("--rate", str(options.rate), "--rate-from-vm", back),
        )
        receipts = [
            overland("vm", "migrate", "web", "--to", HOSTS[(n + 1) % 3], "-o", "json", check=False)
            for n in range(options.moves)
        ]
        verdict = overland("probe", "stop", "--lab", LAB, "-o", "json", check=False)
    finally:
        overland("lab", "down", "--name", LAB)
    total = verdict["total"]
    print(f"{options.moves} moves at {options.rate} packets/s each way, IPv4 and IPv6, 3 peers")
    for key in ("sent", "received", "lost", "duplicated", "out_of_order"):
        print(f"  {key:32} {total[key]}")
    moved = [each for each in receipts if each["outcome"] == "moved"]
    print(f"  {'moved':32} {len(moved)}")
    for key in ("vm_stop_ms", "network_gap_ms", "last_redirected_after_commit_ms", "total_ms"):
        values = [each[key] for each in moved if each[key] is not None]
        median, worst = statistics.median(values), quantile(values, 0.99)
        print(f"  {key:32} median {median:8.1f}   p99 {worst:8.1f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"verdict": verdict, "receipts": receipts}, indent=1))


if __name__ == "__main__":
    main()
