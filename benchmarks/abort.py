"""How long an abort takes in each phase before the commit: from asking to the end of the move.

Exit code 1 when one took longer than 2 s, or did not leave the VM where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.lab.chaos import Lab

LIMIT_S = 2.0
ASKED = {
    "planned": (),
    "precopy": ("--bandwidth", "8MiB"),
    "paused": (),
    "equal": ("--verify",),
}
"""In which phase the abort is asked for, with what makes that phase last."""


def abort(lab: Lab, phase: str) -> dict[str, Any] | None:
    """One abort asked for in `phase`; None when the commit was faster."""
    old = lab.where()
    move = lab.begin(lab.next_host(), phase, *ASKED[phase])
    began_s = time.monotonic()
    request = urllib.request.Request(f"{lab.api}/v1/migrations/{move}/abort", method="POST")
    with contextlib.suppress(urllib.error.HTTPError):  # it has ended: that is seen below
        urllib.request.urlopen(request, timeout=30).close()
    receipt = lab.ended(move)
    took_s = time.monotonic() - began_s
    if receipt["outcome"] == "moved":
        return None
    phases = [each["phase"] for each in receipt["phases"]]
    print(f"asked for in {phase}: {took_s:.2f} s", flush=True)
    return {
        "phase": phases[phases.index("aborting") - 1],
        "ended_s": round(took_s, 3),
        "violations": lab.violations(receipt),
        "stayed": lab.where() == old,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=5, help="aborts asked for in each phase")
    parser.add_argument("--out", type=Path, default=Path("out/bench-abort.json"))
    options = parser.parse_args()
    os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="abort-")  # a context of our own
    lab = Lab("abort")
    lab.up("ov.dirty=16,10")
    try:
        tried = [abort(lab, phase) for phase in ASKED for _ in range(options.times)]
    finally:
        lab.down()
    done = [each for each in tried if each is not None]
    for phase in dict.fromkeys(each["phase"] for each in done):
        took = [each["ended_s"] for each in done if each["phase"] == phase]
        median = statistics.median(took)
        print(f"{phase}: {len(took)} aborts, median {median:.2f} s, longest {max(took):.2f} s")
    print(f"{len(tried) - len(done)} asked for after the commit: the move went on")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(done, indent=1))
    bad = [e for e in done if e["ended_s"] > LIMIT_S or e["violations"] or not e["stayed"]]
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
