"""What `vm show` and `host list` say, again and again, while a move is broken."""

from __future__ import annotations

import threading
import time
from typing import Any

from overland.lab import lab as labs

EVERY_S = 0.1
NOTICED_S = 10.0
"""A silent host is known to be so by then: the connection is given up, then the lease ends."""


class Watch:
    """Reads the records of VM `vm` and of all hosts from `api` until `close`."""

    def __init__(self, api: str, vm: str) -> None:
        self._urls = (f"{api}/v1/vms/{vm}", f"{api}/v1/hosts")
        self._places: list[tuple[str, int]] = []
        self._ready: list[tuple[float, frozenset[str]]] = []
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def close(self) -> None:
        self._ends.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ends.wait(EVERY_S):
            try:
                vm, hosts = (labs.get(url) for url in self._urls)
            except OSError:
                continue  # the NVA itself is on its way back: nothing is said
            place = (vm["host"], vm["version"])
            if self._places[-1:] != [place]:
                self._places.append(place)
            ready = frozenset(host["name"] for host in hosts if host["ready"])
            self._ready.append((time.monotonic(), ready))

    def lies(self, receipt: dict[str, Any]) -> list[str]:
        """What was said and is not so: a place that the VM did not have at its version."""
        version = receipt["version"]
        moved = receipt["outcome"] == "moved"
        before = (receipt["old_nve"], version - 1 if moved else version)
        ways = [[before], [before, (receipt["new_nve"], version)]] if moved else [[before]]
        ways += [way[1:] for way in ways[1:]]  # seen after the commit only
        return [] if self._places in [*ways, []] else [f"vm show said {self._places}"]

    def hidden_silence(self, host: str, seconds: float) -> list[str]:
        """Whether `host`, silent for the last `seconds`, was called ready when it was known."""
        since_s = time.monotonic() - seconds + NOTICED_S
        said = [host in ready for at_s, ready in self._ready if at_s > since_s]
        return [f"host list calls {host} ready, and it is silent"] if any(said) else []
