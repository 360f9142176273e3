"""Every fault in every phase of a real move, again and again; prints the matrix, writes JSON.

Exit code 1 when the contract of tests/lab/chaos.py was broken once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.lab.chaos import Fault, Lab, ok
from tests.lab.clock import HOUR_S

PHASES = ("planned", "precopy", "paused", "equal", "committed", "converging", "drained")
FAULTS = (
    *(Fault("daemon", who) for who in ("old", "new", "peer", "nva")),
    Fault("copy", "new"),
    Fault("copy", "old"),
    Fault("abort", "nva"),
    *(Fault("link", who, seconds) for who in ("old", "new", "peer") for seconds in (1.0, 5.0)),
    Fault("link", "old", 30.0),
    Fault("link", "new", 30.0),
    Fault("link", "peer", 30.0),
    *(Fault("clock", who, by_s) for who in ("nva", "old", "new") for by_s in (HOUR_S, -HOUR_S)),
    *(Fault("disk", who, 3.0) for who in ("nva", "old", "new")),
    *(Fault("full-disk-daemon", who, 3.0) for who in ("nva", "old", "new")),
)


EVIDENCE = Path("out/chaos")
"""Logs of daemons and VMs after a fault that broke the contract."""


def _no_logs(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not (name.endswith(".log") or (Path(folder) / name).is_dir())]


def attempt(lab: Lab, phase: str, fault: Fault) -> dict[str, Any]:
    """One fault in one move: what came of it."""
    began_s = time.monotonic()
    try:
        receipt = lab.break_a_move(phase, fault)
        lab.until_ready()
    except AssertionError as error:
        return {"phase": phase, "fault": str(fault), "violations": [str(error)], "outcome": "?"}
    # A killed QEMU takes its VM along: that is the VM's end, not the move's.
    killed = {"old": receipt["old_nve"], "new": receipt["new_nve"]}.get(fault.who)
    final = receipt["new_nve"] if receipt["outcome"] == "moved" else receipt["old_nve"]
    lives = not (fault.kind == "copy" and killed == final)
    violations = lab.violations(receipt, vm_lives=lives)
    if violations:
        shutil.copytree(lab.folder, EVIDENCE / f"{phase}-{fault}", ignore=_no_logs)
    if not lives or ok("vm", "show", lab.vm, "-o", "json")["state"] != "running":
        ok("vm", "stop", lab.vm)
        ok("vm", "start", lab.vm)
    return {
        "phase": phase,
        "fault": str(fault),
        "outcome": receipt["outcome"],
        "reason": receipt["reason"],
        "stop_ms": receipt["vm_stop_ms"],
        "felt": lab.felt,
        "hit": lab.hit,
        "seconds": round(time.monotonic() - began_s, 1),
        "violations": violations,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--faults", default="", help="only those whose name contains this")
    parser.add_argument("--lab", default="chaos", help="its name: two may run side by side")
    parser.add_argument("--out", type=Path, default=Path("out/bench-chaos.json"))
    options = parser.parse_args()
    os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="chaos-")  # a context of our own
    lab = Lab(options.lab, small_disks=True)
    lab.up("ov.dirty=16,10")
    results = []
    try:
        for phase in options.phases.split(","):
            for fault in FAULTS:
                if options.faults in str(fault):
                    results.append(attempt(lab, phase, fault))
                    print(json.dumps(results[-1]), flush=True)
    finally:
        lab.down()
    broken = [each for each in results if each["violations"]]
    print(f"{len(results)} faults, {len(broken)} broke the contract")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1))
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
