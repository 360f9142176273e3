"""`overland sim`: many seeded moves in one process, with faults; the first broken rule is shown."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from overland.cli.options import Output
from overland.cli.output import Exit, Failure, Format, show
from overland.sim.run import Failing, Mode, failing, first_failing

CHUNK = 250
"""Seeds that a process takes at a time."""


def sim(
    seeds: Annotated[str, typer.Option(help="FROM:TO; FROM included, TO not")] = "0:1000",
    moves: Annotated[int, typer.Option(help="moves in a row under each seed")] = 3,
    mode: Annotated[
        Mode, typer.Option(help="how the VM moves; readdress: in any way, and to another address")
    ] = "hot",
    jobs: Annotated[int, typer.Option(help="processes at once; 0: one a processor")] = 0,
    output: Output = Format.table,
) -> None:
    """Simulate moves with faults; exit code 1 with the trace of the first failing seed."""
    first, last = _range(seeds)
    if moves < 1:
        raise Failure("--moves", f"{moves} moves: use 1 or more", "usage", exit_code=Exit.USAGE)
    began_s, used_s = time.monotonic(), _processor_s()
    found = _first(first, last, moves, mode, jobs or os.cpu_count() or 1)
    took_s, used_s = time.monotonic() - began_s, _processor_s() - used_s
    passed = (found.seed if found else last) - first
    if found:
        print("\n".join(found.trace))
        print(f"seed {found.seed}, move {found.move}: {found.why}")
        seeds = f"{found.seed}:{found.seed + 1}"
        print(f"again: overland sim --seeds {seeds} --moves {moves} --mode {mode}")
    failed, done = int(bool(found)), passed * moves
    rate, core_rate = round(done / took_s), round(done / used_s)
    if output is Format.table:
        speed = f"{rate} moves/s, {core_rate} for each second of a core"
        print(f"{passed} seeds passed, {failed} failed, {done} moves, {speed}")
    else:
        speeds = {"moves_per_s": rate, "moves_per_core_s": core_rate}
        show({"passed": passed, "failed": failed, "moves": done, **speeds}, output)
    sys.exit(failed)


def _processor_s() -> float:
    """Processor time of all processes that have ended, however much else the machine does."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise Failure("--seeds", f"{text!r}: write FROM:TO", "usage", exit_code=Exit.USAGE)
    return int(first), int(last)


def _first(first: int, last: int, moves: int, mode: Mode, jobs: int) -> Failing | None:
    """The failing seed with the lowest number, found by `jobs` processes."""
    starts = range(first, last, CHUNK)
    ends = [min(start + CHUNK, last) for start in starts]
    console = Console(stderr=True)
    with ProcessPoolExecutor(jobs) as pool:
        results: Iterator[int | None] = pool.map(
            first_failing, starts, ends, repeat(moves), repeat(mode)
        )
        shown = track(
            results,
            total=len(ends),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        for seed in shown:
            if seed is not None:
                pool.shutdown(cancel_futures=True)
                return failing(seed, moves, mode)
    return None
