"""One move as a picture: VM lane and network lanes on one clock. Pure: receipt to SVG."""

from __future__ import annotations

from datetime import datetime
from typing import Any

WIDTH, LANE, LEFT, TOP = 900, 46, 150, 50
Bar = tuple[float, float, str, str]


def _at_ms(text: str) -> float:
    return datetime.fromisoformat(text).timestamp() * 1000


def _vm_lane(receipt: dict[str, Any], point: dict[str, float]) -> tuple[str, list[Bar]]:
    resume = point["running"]
    stop = resume - receipt["vm_stop_ms"]
    return (
        "VM",
        [
            (0, stop, "#4c9f70", f"runs on {receipt['old_nve']}"),
            (stop, resume, "#c8553d", "stopped"),
            (resume, point["closed"], "#2a6f97", f"runs on {receipt['new_nve']}"),
        ],
    )


def _cold_lanes(receipt: dict[str, Any], point: dict[str, float]) -> list[tuple[str, list[Bar]]]:
    commit, end = point["committed"], point["closed"]
    saved = (point["paused"], point["equal"], "#8d99ae", "saved, carried")
    return [
        _vm_lane(receipt, point),
        ("memory", [saved, (commit, point["running"], "#8d99ae", "loaded")]),
        (
            "address",
            [(point["staged"], point["drained"], "#e9a23b", "in transit, counted")],
        ),
        ("mapping", [(0, commit, "#4c9f70", "old"), (commit, end, "#2a6f97", "new")]),
    ]


def _lanes(receipt: dict[str, Any], point: dict[str, float]) -> list[tuple[str, list[Bar]]]:
    commit, resume, end = point["committed"], point["running"], point["closed"]
    held = resume - receipt["vm_stop_ms"] - (receipt["held_before_stop_ms"] or 0.0)
    redirected = commit + receipt["last_redirected_after_commit_ms"]
    return [
        _vm_lane(receipt, point),
        (
            "memory",
            [
                (0, point["precopy"], "#d9d9d9", "staging"),
                (point["precopy"], point["equal"], "#8d99ae", "copying"),
            ],
        ),
        ("old gate", [(held, redirected, "#e9a23b", "holds, then redirects")]),
        ("tunnel", [(point["staged"], end, "#bfa5d6", "open")]),
        ("new gate", [(held, resume, "#e9a23b", "holds")]),
        ("mapping", [(0, commit, "#4c9f70", "old"), (commit, end, "#2a6f97", "new")]),
    ]


def timeline(receipt: dict[str, Any]) -> str:
    """Return an SVG of `receipt` (of a move that has ended as moved); ValueError otherwise."""
    if receipt["outcome"] != "moved":
        raise ValueError("only a move that reached its new host has a timeline")
    if receipt["mode"] == "storage":
        raise ValueError("a disk moved alone: nothing of the network did")
    if receipt["vm_stop_ms"] is None:
        raise ValueError("the VM was at rest, or did not wake: there is nothing to draw")
    at = {each["phase"]: _at_ms(each["at"]) for each in receipt["phases"]}
    begin_ms = at["planned"]
    point = {phase: moment - begin_ms for phase, moment in at.items()}
    lanes = _cold_lanes(receipt, point) if receipt["mode"] == "cold" else _lanes(receipt, point)
    end, commit = point["closed"], point["committed"]
    scale = (WIDTH - LEFT - 20) / end
    height = TOP + LANE * len(lanes) + 40
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="20" y="25" font-size="15">{receipt["vm"]}: {receipt["old_nve"]} to '
        f"{receipt['new_nve']}, stop {receipt['vm_stop_ms']:.1f} ms, "
        f"whole move {end:.0f} ms</text>",
    ]
    for row, (name, bars) in enumerate(lanes):
        y = TOP + row * LANE
        out.append(f'<text x="20" y="{y + 20}">{name}</text>')
        for start, stop_at, colour, label in bars:
            x, wide = LEFT + start * scale, max(1.0, (stop_at - start) * scale)
            out.append(
                f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="30" fill="{colour}"/>'
            )
            if wide > 7 * len(label):
                out.append(f'<text x="{x + 4:.1f}" y="{y + 19}" fill="white">{label}</text>')
    x = LEFT + commit * scale
    bottom = TOP + LANE * len(lanes)
    out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="40" y2="{bottom}" stroke="black"/>')
    out.append(f'<text x="{x - 60:.1f}" y="{bottom + 16}">commit at {commit:.0f} ms</text>')
    return "\n".join([*out, "</svg>\n"])
