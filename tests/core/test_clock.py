"""The clock that the lab's tests set for one daemon does what it says, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.lab.clock import HOUR_S, Clock

_TELLS = """
import sys, time
for _ in sys.stdin:
    time.sleep(0.001)
    print(time.time(), time.monotonic(), flush=True)
"""


def test_one_process_has_its_clock_set_and_its_monotonic_clock_goes_on(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "clock")
    with subprocess.Popen(
        [sys.executable, "-c", _TELLS],
        env=os.environ | clock.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def told() -> list[float]:
            process.stdin.write("?\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            return [float(each) for each in process.stdout.readline().split()]  # type: ignore[union-attr]

        began = told()
        for seconds in (HOUR_S, -HOUR_S, 0):
            clock.step(seconds)
            real_s, monotonic_s = told()
            passed_s = monotonic_s - began[1]
            assert 0 < passed_s < HOUR_S / 2
            assert abs(real_s - began[0] - passed_s - seconds) < HOUR_S / 2
        process.stdin.close()
