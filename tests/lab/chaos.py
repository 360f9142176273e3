"""Break one part of a real lab at one moment of a real move, and look whether the contract holds.

The contract after any fault: the move ends by itself, exactly one copy of the VM runs, it is where
the NVA says, every tenant address leads to it, and nothing of the move is left in any kernel.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from overland.lab import lab as labs
from overland.lab.topology import LABS, Topology, topology
from overland.model.names import port_name
from tests.lab.ears import Ears, overlaps

OVERLAND = str(Path(sys.executable).parent / "overland")
SETTLE_LIMIT_S = 60.0
HOSTS = ("h1", "h2", "h3")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([OVERLAND, *arguments], capture_output=True, text=True, check=False)


def ok(*arguments: str) -> Any:
    done = run(*arguments)
    if done.returncode:
        raise AssertionError(f"overland {' '.join(arguments)}: {done.stderr}")
    return json.loads(done.stdout) if done.stdout.startswith(("{", "[")) else done.stdout


@dataclass(frozen=True)
class Fault:
    """`kind`: daemon (SIGKILL, restarted), copy (SIGKILL of that host's QEMU), link (cut)."""

    kind: str
    who: str
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind}-{self.who}" + (f"-{self.seconds:g}s" if self.seconds else "")


@dataclass
class Lab:
    """A lab of three hosts with one VM and a correspondent on each host."""

    name: str
    vm: str = "web"
    number: int = 5
    nvas: int = 1
    overlaps: list[str] = field(default_factory=list)
    """Where the VM sent from two hosts at once in the last move; never."""

    def up(self, append: str = "") -> None:
        self.down()
        ok("lab", "up", "--name", self.name, "--nvas", str(self.nvas))
        ok(
            *("network", "create", "blue", "--vni", "42"),
            *("--ipv4", "10.42.0.0/24", "--ipv6", "fd42::/64"),
        )
        for n, host in enumerate(HOSTS, 1):
            ok(
                *("lab", "endpoint", "add", f"p{n}", "--host", host, "--lab", self.name),
                *("--network", "blue", "--ipv4", f"10.42.0.1{n}", "--ipv6", f"fd42::1{n}"),
            )
        ok(
            *("vm", "create", self.vm, "--host", "h1", "--append", append),
            *("--network", f"blue,ipv4={self.addresses[0]},ipv6={self.addresses[1]}"),
        )
        self.until(lambda: len(self.reachable()) == len(HOSTS))  # the guest has booted

    @property
    def addresses(self) -> tuple[str, str]:
        return f"10.42.0.{self.number}", f"fd42::{self.number}"

    def down(self) -> None:
        run("lab", "down", "--name", self.name)

    @property
    def folder(self) -> Path:
        return LABS / self.name

    @property
    def shape(self) -> Topology:
        return topology(self.name, len(HOSTS), self.nvas)

    @property
    def api(self) -> str:
        """Of the active NVA."""
        return str(ok("lab", "status", "--name", self.name, "-o", "json")["api"])

    def leaders(self) -> list[str]:
        """Names of the NVAs that say they are active."""
        nvas = json.loads((self.folder / "state.json").read_text())["nvas"]
        return [nva["name"] for nva in nvas if labs.leads(nva["api"])]

    def where(self) -> str:
        return str(ok("vm", "show", self.vm, "-o", "json")["host"])

    # ------------------------------------------------------------ faults

    def kill_daemon(self, name: str) -> None:
        """SIGKILL, and a restart a moment later, as a service manager does."""
        os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGKILL)
        labs.restart(self.shape, name)

    def kill_copy(self, host: str) -> None:
        """SIGKILL of the VM's QEMU on `host`, if there is one."""
        pid = self.copies().get(host)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

    def cut(self, name: str, seconds: float) -> None:
        """Take `name`'s underlay link down for a while."""
        self.link(name, up=False)
        time.sleep(seconds)
        self.link(name, up=True)

    def link(self, name: str, *, up: bool) -> None:
        namespace = f"ovl-{self.name}-{name}"
        link = ["ip", "-n", namespace, "link", "set", "underlay", "up" if up else "down"]
        subprocess.run(link, check=True)
        if not up:
            return
        shape = self.shape
        host = next(each for each in (*shape.nvas, *shape.hosts) if each.name == name)
        subprocess.run(  # the kernel forgets IPv6 addresses of a link that goes down
            [
                *("ip", "-n", namespace, "addr", "replace", f"{host.underlay_ipv6}/64"),
                *("dev", "underlay", "nodad"),
            ],
            check=True,
        )

    # ------------------------------------------------------------ looking

    def copies(self) -> dict[str, int]:
        """Host to pid of the VM's living QEMU processes, by looking at the machine itself."""
        found = {}
        for host in HOSTS:
            for pid in labs._inside([f"ovl-{self.name}-{host}"]):  # noqa: SLF001
                command = Path(f"/proc/{pid}/cmdline")
                if f"overland-{self.vm}".encode() in command.read_bytes():
                    found[host] = pid
        return found

    def running(self) -> set[str]:
        """Hosts where a copy executes instructions: its virtual CPUs have used time just now."""
        before = {host: _guest_ns(pid) for host, pid in self.copies().items()}
        time.sleep(0.5)
        after = {host: _guest_ns(pid) for host, pid in self.copies().items()}
        return {host for host in after if after[host] > before.get(host, 0) + 100_000}

    def litter(self) -> list[str]:
        """Devices of moves, in any host's namespace."""
        left = []
        for host in HOSTS:
            out = subprocess.run(
                ["ip", "-n", f"ovl-{self.name}-{host}", "-o", "link"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            names = [line.split(": ")[1].split("@")[0] for line in out.splitlines()]
            left += [f"{host}:{name}" for name in names if name.startswith(("ovm", "ovh"))]
            left += [str(path) for path in (self.folder / "run" / host / "moves").glob("*")]
        return left

    def reachable(self) -> set[str]:
        """Correspondents from which the VM answers over both families."""
        found = set()
        for n in (1, 2, 3):
            namespace = f"ovl-{self.name}-e-p{n}"
            pings = [
                subprocess.run(
                    ["ip", "netns", "exec", namespace, "ping", "-c1", "-W2", address],
                    capture_output=True,
                    check=False,
                ).returncode
                for address in self.addresses
            ]
            if pings == [0, 0]:
                found.add(f"p{n}")
        return found

    # ------------------------------------------------------------ a move

    def next_host(self) -> str:
        return HOSTS[(HOSTS.index(self.where()) + 1) % len(HOSTS)]

    def begin(self, to: str, phase: str, *options: str) -> str:
        """Start a move; returns its id once it has come to `phase`."""
        move = str(ok("vm", "migrate", self.vm, "--to", to, "--no-wait", *options)).strip()
        _until_phase(self.api, move, phase)
        return move

    def break_a_move(self, phase: str, fault: Fault) -> dict[str, Any]:
        """Move to the next host, do `fault` in `phase`; the receipt once the move has ended."""
        old, new = self.where(), self.next_host()
        peer = next(host for host in HOSTS if host not in (old, new))
        names = {"old": old, "new": new, "peer": peer, "nva": "nva"}
        with self.listening() as ears:
            move = self.begin(new, phase)
            self.do(fault.kind, names[fault.who], fault.seconds, move)
            receipt = self.ended(move)
            self.overlaps = overlaps(ears.sent())
        return receipt

    @contextlib.contextmanager
    def listening(self) -> Iterator[Ears]:
        """Let the VM speak, by answering, and hear where it does."""
        hosts = {host: f"ovl-{self.name}-{host}" for host in HOSTS}
        mac = ok("vm", "show", self.vm, "-o", "json")["interfaces"][0]["mac"]
        ears = Ears(hosts, port_name(self.vm, 0), mac)
        talk = ["ip", "netns", "exec", f"ovl-{self.name}-e-p1", "ping", "-q", "-i", "0.005"]
        with subprocess.Popen([*talk, self.addresses[0]], stdout=subprocess.DEVNULL) as ping:
            try:
                yield ears
            finally:
                ping.terminate()
                ears.close()

    def do(self, kind: str, name: str, seconds: float, move: str) -> None:
        match kind:
            case "abort":
                run("migration", "abort", move)  # refused after the commit
            case "daemon":
                self.kill_daemon(name)
            case "copy":
                self.kill_copy(name)
            case "link":
                self.cut(name, seconds)
            case _:
                raise AssertionError(kind)

    @contextlib.contextmanager
    def dead(self, host: str) -> Iterator[None]:
        """`host` has no daemon and no link meanwhile; its VMs' processes are left alone."""
        os.kill(int((self.folder / f"{host}.pid").read_text()), signal.SIGKILL)
        self.link(host, up=False)
        try:
            yield
        finally:
            self.link(host, up=True)
            labs.restart(self.shape, host)
            self.until_ready()

    def knows(self, host: str, underlay: str) -> bool:
        """Tell whether `host` would send a tenant's frames to `underlay`."""
        done = subprocess.run(
            ["bridge", "-n", f"ovl-{self.name}-{host}", "fdb"],
            capture_output=True,
            text=True,
            check=True,
        )
        return f"dst {underlay} " in done.stdout

    def until(self, holds: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + SETTLE_LIMIT_S
        while not holds():
            assert time.monotonic() < deadline_s, "it does not come to be so"
            time.sleep(0.1)

    def until_ready(self) -> None:
        """Return when every NVE is known to the NVA again."""
        deadline_s = time.monotonic() + SETTLE_LIMIT_S
        while not self._all_ready():
            assert time.monotonic() < deadline_s, "a host does not get ready"
            time.sleep(0.1)

    def _all_ready(self) -> bool:
        done = run("host", "list", "-o", "json")  # the NVA itself may be on its way back
        hosts = json.loads(done.stdout) if done.returncode == 0 else []
        return len(hosts) == len(HOSTS) and all(host["ready"] for host in hosts)

    def ended(self, move: str) -> dict[str, Any]:
        deadline_s = time.monotonic() + SETTLE_LIMIT_S
        receipt: dict[str, Any] = {}
        while time.monotonic() < deadline_s:
            done = run("migration", "show", move, "-o", "json")
            if done.returncode == 0:
                receipt = json.loads(done.stdout)
                if receipt["phase"] in ("closed", "aborted"):
                    return receipt
            time.sleep(0.1)
        raise AssertionError(f"the move did not end: {receipt}")

    def violations(self, receipt: dict[str, Any], *, vm_lives: bool = True) -> list[str]:
        """What of the contract does not hold; empty when all does."""
        found = []
        deadline_s = time.monotonic() + 20.0
        while time.monotonic() < deadline_s:
            found = self._violations(receipt, vm_lives=vm_lives)
            if not found:
                return []
        return found

    def _violations(self, receipt: dict[str, Any], *, vm_lives: bool) -> list[str]:
        shown = ok("vm", "show", self.vm, "-o", "json")
        expected = receipt["new_nve"] if receipt["outcome"] == "moved" else receipt["old_nve"]
        found = list(self.overlaps)
        if shown["host"] != expected:
            found.append(f"record says {shown['host']}, the outcome {expected}")
        running = self.running()
        if running != ({expected} if vm_lives else set()):
            found.append(f"running on {running}, expected {expected}")
        if set(self.copies()) - {expected}:
            found.append(f"copies on {sorted(self.copies())}")
        if vm_lives and len(self.reachable()) != 3:
            found.append(f"reachable from {sorted(self.reachable())} only")
        if self.litter():
            found.append(f"left: {self.litter()}")
        if vm_lives and shown["state"] != "running":
            found.append(f"state {shown['state']}")
        return found


def _guest_ns(pid: int) -> int:
    """Time that the threads of a QEMU have used, but for the first, which serves QMP."""
    total = 0
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        if thread.name != str(pid):
            with contextlib.suppress(OSError):
                total += int((thread / "schedstat").read_text().split()[0])
    return total


def _until_phase(api: str, move: str, phase: str) -> None:
    """Return when the move is in `phase` or past it."""
    connection = http.client.HTTPConnection(api.removeprefix("http://"), timeout=30)
    connection.request("GET", f"/v1/migrations/{move}/events")
    for raw in connection.getresponse():
        line = raw.decode().strip()
        if not line.startswith("data: "):
            continue
        state = json.loads(line[6:])
        seen = {each["phase"] for each in state["phases"]}
        if phase in seen or state["outcome"] != "open":
            break
    connection.close()
