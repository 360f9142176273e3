"""Cold: suspended, beside a bare copy of the state, and running. Warm: pauses, recovery points. Hot
with a disk of 1 GiB that is written to, beside one of the same VM without a disk.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.lab.chaos import Lab, ok

from overland.dataplane.namespace import inside
from overland.lab.topology import LABS

LAB = "modes"


def copied_ms(source: Path, old: str, new: str) -> float:
    """A bare copy from namespace `old` to `new`: read, sent, written, on disk."""
    kept = source.with_name("copy")
    with inside(f"/run/netns/ovl-{LAB}-{new}"):
        server = socket.create_server(("0.0.0.0", 0))
    with inside(f"/run/netns/ovl-{LAB}-{old}"):
        client = socket.socket()

    def take() -> None:
        taken, _ = server.accept()
        with taken, kept.open("wb") as file:
            while piece := taken.recv(1 << 20):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())

    taker = threading.Thread(target=take)
    taker.start()
    began_s = time.perf_counter()
    client.connect((f"10.200.0.{new[1:]}", server.getsockname()[1]))
    with client, source.open("rb") as file:
        client.sendfile(file)
    taker.join()
    server.close()
    kept.unlink()
    return 1000 * (time.perf_counter() - began_s)


def moved_ms(api: str, new: str) -> float:
    """A cold move of a suspended VM, from the request to its end."""
    body = json.dumps({"to": new, "mode": "cold"}).encode()
    request = urllib.request.Request(
        f"{api}/v1/vms/web/migrate", body, {"content-type": "application/json"}
    )
    began_s = time.perf_counter()
    move = json.loads(urllib.request.urlopen(request).read())["id"]
    urllib.request.urlopen(f"{api}/v1/migrations/{move}/events").read()  # until it has ended
    return 1000 * (time.perf_counter() - began_s)


def cold(lab: Lab, moves: int) -> dict[str, Any]:
    copies, colds, sizes, running = [], [], [], []
    for _ in range(moves):
        old, new = lab.where(), lab.next_host()
        ok("vm", "suspend", "web")
        state = LABS / LAB / "run" / old / "suspended" / "web"
        sizes.append(state.stat().st_size)
        copies.append(copied_ms(state, old, new))
        colds.append(moved_ms(lab.api, new))
        ok("vm", "resume", "web")
        to = lab.next_host()
        running.append(ok("vm", "migrate", "web", "--to", to, "--cold", "-o", "json"))
    return {"copies_ms": copies, "cold_ms": colds, "bytes": sizes, "running": running}


def warm(lab: Lab, moves: int) -> list[dict[str, Any]]:
    """Receipts of warm moves, ten checkpoints each at an interval of a second."""
    options = ("--warm", "--interval", "1s", "--checkpoints", "10", "-o", "json")
    return [ok("vm", "migrate", "web", "--to", lab.next_host(), *options) for _ in range(moves)]


def measure(moves: int, warm_moves: int) -> dict[str, Any]:
    lab = Lab(LAB)
    lab.up("ov.dirty=32,20")
    try:
        return cold(lab, moves) | {"warm": warm(lab, warm_moves)}
    finally:
        lab.down()


def say_cold(found: dict[str, Any]) -> None:
    moved, copy = statistics.median(found["cold_ms"]), statistics.median(found["copies_ms"])
    print(
        f"{len(found['cold_ms'])} cold moves of a suspended VM of 128 MiB, "
        f"{statistics.median(found['bytes']) / 2**20:.0f} MiB of state: {moved:.0f} ms (median), "
        f"a bare copy {copy:.0f} ms, ratio {moved / copy:.2f}"
    )
    outages = [each["outage_ms"] for each in found["running"]]
    stops = [each["vm_stop_ms"] for each in found["running"]]
    print(
        f"{len(outages)} cold moves of the running VM: outage {statistics.median(outages):.0f} ms "
        f"(median, {max(outages):.0f} at most), of it the stop {statistics.median(stops):.0f} ms; "
        f"residual frames {sum(each['packets']['residual'] for each in found['running'])}"
    )


def say_warm(receipts: list[dict[str, Any]]) -> None:
    took = [each["checkpoints"] for each in receipts]
    count = sum(each["count"] for each in took)
    print(
        f"{len(took)} warm moves of a VM of 128 MiB, {count} checkpoints "
        f"at an interval of 1 s: pause {statistics.median(e['pause_ms'] for e in took):.1f} ms "
        f"(median), point of recovery at most {max(e['worst_age_ms'] for e in took):.0f} ms old, "
        f"stop {statistics.median(each['vm_stop_ms'] for each in receipts):.0f} ms (median)"
    )


DISK_MIB, WRITTEN_MIB, WRITES_PER_S = 1024, 256, 200


def stops_ms(moves: int, *, disk: bool) -> list[float]:
    """How long hot moves stop a VM; with `disk` one that goes along and is written to meanwhile."""
    lab = Lab(LAB)
    lab.up()
    found = []
    try:
        words = ("--disk", f"data.raw,size={DISK_MIB}MiB,kind=moved") if disk else ()
        ok("vm", "create", "db", "--host", "h1", "--network", "blue", *words)
        write = (
            f"dd if=/dev/urandom of=/dev/vda bs=1M count={WRITTEN_MIB} seek=64 conv=fsync 2>&1; "
            f"(journal /dev/vda {WRITES_PER_S} /tmp/told </dev/null >/tmp/said 2>&1 &)"
        )
        ok("lab", "guest", "db", "--name", LAB, "--", write if disk else "true")
        for number in range(moves):
            to = ("h2", "h1")[number % 2]
            receipt = ok("vm", "migrate", "db", "--to", to, "-o", "json")
            assert receipt["outcome"] == "moved", receipt["reason"]
            found.append(receipt["vm_stop_ms"])
    finally:
        lab.down()
    return found


def storage(moves: int) -> dict[str, Any]:
    if not moves:
        return {"stop_ms": [], "disk_stop_ms": []}
    return {"stop_ms": stops_ms(moves, disk=False), "disk_stop_ms": stops_ms(moves, disk=True)}


def say_storage(found: dict[str, Any]) -> None:
    bare, disk = statistics.median(found["stop_ms"]), statistics.median(found["disk_stop_ms"])
    print(
        f"{len(found['disk_stop_ms'])} hot moves with a disk of {DISK_MIB} MiB under "
        f"{WRITES_PER_S} writes/s: VM stop {disk:.0f} ms (median), without a disk {bare:.0f} ms, "
        f"ratio {disk / bare:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--moves", type=int, default=10)
    parser.add_argument("--warm-moves", type=int, default=3)
    parser.add_argument("--disk-moves", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("out/bench-modes.json"))
    options = parser.parse_args()
    os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="modes-")  # a context of our own
    found = measure(options.moves, options.warm_moves) | storage(options.disk_moves)
    if found["cold_ms"]:
        say_cold(found)
    if found["warm"]:
        say_warm(found["warm"])
    if found["disk_stop_ms"]:
        say_storage(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
