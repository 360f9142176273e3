"""Break one part of a real lab at one moment of a real move, and look whether the contract holds.

The contract after any fault: the move ends by itself, exactly one copy of the VM runs, it is where
the NVA says, every tenant address leads to it, and nothing of the move is left in any kernel.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from overland.lab import lab as labs
from overland.lab.topology import LABS, Topology, topology
from overland.model.names import port_name
from tests.lab.clock import Clock
from tests.lab.disk import SmallDisk, unmount_below
from tests.lab.ears import Ears, overlaps
from tests.lab.watch import Watch

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
    """One thing that breaks.

    `kind`: daemon (SIGKILL, restarted), copy (SIGKILL of that host's QEMU), link (cut for
    `seconds`), disk (the daemon's is full for `seconds`), full-disk-daemon (SIGKILL while it is),
    clock (the daemon's jumps by `seconds`), abort (by the operator).
    """

    kind: str
    who: str
    seconds: float = 0.0

    def __str__(self) -> str:
        sign = "+" if self.kind == "clock" else ""
        how_much = f"-{self.seconds:{sign}g}s" if self.seconds else ""
        return f"{self.kind}-{self.who}{how_much}"


@dataclass
class Lab:
    """A lab of three hosts with one VM and a correspondent on each host."""

    name: str
    vm: str = "web"
    number: int = 5
    nvas: int = 1
    small_disks: bool = False
    """So that they can be filled; then there is no room for the memory of a VM on them."""
    seen: list[str] = field(default_factory=list)
    """What was wrong while the last move went on: the VM sent from two hosts at once, or a record
    said what was not so.
    """
    felt: bool = True
    """Whether the last fault was one: there was a copy to kill, a daemon noticed its full disk."""
    hit: str = ""
    """The phase in which the last fault came. Some last a few milliseconds."""
    disks: dict[str, SmallDisk] = field(default_factory=dict)
    clock: Clock | None = None

    def up(self, append: str = "") -> None:
        self.down()
        ok("lab", "up", "--name", self.name, "--nvas", str(self.nvas))
        if self.small_disks:
            self._give_small_disks()
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
        unmount_below(self.folder)
        run("lab", "down", "--name", self.name)

    def _give_small_disks(self) -> None:
        """The NVA's store and each host's run folder get a disk each, which can be filled."""
        config = self.folder / "nva.toml"
        store = self.folder / "store"
        config.write_text(config.read_text().replace("/nva.db", "/store/nva.db"))
        folders = {host: self.folder / "run" / host for host in HOSTS} | {"nva": store}
        for name, folder in folders.items():
            self._end_daemon(name)
            self.disks[name] = SmallDisk(folder)
            self.disks[name].mount()
        for name in folders:
            self._start_daemon(name)
        self.until_ready()

    @property
    def folder(self) -> Path:
        return LABS / self.name

    @property
    def shape(self) -> Topology:
        return topology(self.name, len(HOSTS), self.nvas)

    @property
    def api(self) -> str:
        """Of the active NVA."""
        return next(nva["api"] for nva in self._nvas() if labs.leads(nva["api"]))

    def leaders(self) -> list[str]:
        """Names of the NVAs that say they are active."""
        return [nva["name"] for nva in self._nvas() if labs.leads(nva["api"])]

    def _nvas(self) -> list[dict[str, str]]:
        found: list[dict[str, str]] = json.loads((self.folder / "state.json").read_text())["nvas"]
        return found

    def where(self) -> str:
        return str(ok("vm", "show", self.vm, "-o", "json")["host"])

    # ------------------------------------------------------------ faults

    def kill_daemon(self, name: str) -> None:
        """SIGKILL, and a restart a moment later, as a service manager does."""
        self._end_daemon(name)
        self._start_daemon(name)

    def _end_daemon(self, name: str) -> None:
        os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGKILL)

    def _start_daemon(self, name: str, environment: dict[str, str] | None = None) -> None:
        with _environment(environment or {}):
            labs.restart(self.shape, name)

    def kill_copy(self, host: str) -> bool:
        """SIGKILL of the VM's QEMU on `host`; whether there is one."""
        pid_file = self.folder / "run" / host / self.vm / "pid"
        try:
            pid = int(pid_file.read_text())
            ours = f"overland-{self.vm}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return False
        if ours:  # the file of one that was killed before stays, and its number may be another's
            os.kill(pid, signal.SIGKILL)
        return ours

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

    def begin(self, to: str, phase: str, mode: str = "hot", **options: Any) -> str:
        """Start a move; returns its id once it has come to `phase`.

        By the API: before a command has started, the phase may be over.
        """
        api = self.api
        wish = {"to": to, "mode": mode, "options": options}
        move = str(_post(f"{api}/v1/vms/{self.vm}/migrate", wish)["id"])
        _until_phase(api, move, phase)
        return move

    def break_a_move(self, phase: str, fault: Fault) -> dict[str, Any]:
        """Move to the next host, do `fault` in `phase`; the receipt once the move has ended."""
        old, new = self.where(), self.next_host()
        peer = next(host for host in HOSTS if host not in (old, new))
        name = {"old": old, "new": new, "peer": peer, "nva": "nva"}[fault.who]
        said_before = len(self._log(name))
        with self._prepared(fault, name), self.listening() as ears, self._watching() as watch:
            lasting = {} if "disk" in fault.kind and phase == "equal" else _LASTING.get(phase, {})
            move = self.begin(new, phase, **lasting)
            at_ns = time.time_ns()
            self.felt = self.do(fault.kind, name, fault.seconds, move)
            silence = watch.hidden_silence(name, fault.seconds) if fault.kind == "link" else []
            receipt = self.ended(move)
            self.seen = [*overlaps(ears.sent()), *silence]
        self.seen += watch.lies(receipt)
        self.hit = _phase_at(receipt, at_ns)
        if "disk" in fault.kind:
            said = self._log(name)[said_before:]
            self.felt = re.search("disk is full|No space left", said) is not None
        return receipt

    def _log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    @contextlib.contextmanager
    def _prepared(self, fault: Fault, name: str) -> Iterator[None]:
        """Before the move begins: a clock of its own for a daemon whose clock is to be set."""
        if "disk" in fault.kind:
            self._nearly_full(name)
        if fault.kind != "clock":
            yield
            return
        self.clock = Clock(self.folder / f"{name}.clock")
        self._end_daemon(name)
        self._start_daemon(name, self.clock.environment)
        self.until_ready()
        maps = Path(f"/proc/{int((self.folder / f'{name}.pid').read_text())}/maps").read_text()
        assert f"{name}.clock" in maps, "the daemon goes by this clock"
        try:
            yield
        finally:
            self.kill_daemon(name)  # by the machine's clock again: a second step, the other way
            self.until_ready()

    @contextlib.contextmanager
    def _watching(self) -> Iterator[Watch]:
        watch = Watch(self.api, self.vm)
        try:
            yield watch
        finally:
            watch.close()

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

    def do(self, kind: str, name: str, seconds: float, move: str) -> bool:
        """Whether there was anything to break."""
        match kind:
            case "abort":
                with contextlib.suppress(urllib.error.HTTPError):  # refused after the commit
                    _post(f"{self.api}/v1/migrations/{move}/abort", {})
            case "daemon":
                self.kill_daemon(name)
            case "copy":
                return self.kill_copy(name)
            case "link":
                self.cut(name, seconds)
            case "clock":
                assert self.clock is not None
                self.clock.step(int(seconds))
            case "disk":
                with self._full(name):
                    time.sleep(seconds)
            case "full-disk-daemon":
                with self._full(name):
                    self.kill_daemon(name)
                    time.sleep(seconds)
            case _:
                raise AssertionError(kind)
        return True

    def _nearly_full(self, name: str) -> None:
        """So that filling the rest of it takes no time."""
        if name == "nva":
            with contextlib.closing(sqlite3.connect(self.folder / "store" / "nva.db")) as store:
                store.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # else the log's room is reused
        self.disks[name].fill(but_bytes=1 << 20)

    @contextlib.contextmanager
    def _full(self, name: str) -> Iterator[None]:
        """The disk of daemon `name` has no byte left meanwhile."""
        self.disks[name].fill()
        try:
            yield
        finally:
            self.disks[name].free()

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
        return f"dst {underlay} " in self._entries(host)

    def leads_to(self, host: str, mac: str, underlay: str) -> bool:
        """Tell whether `host` would send frames to `mac` to `underlay`."""
        lines = self._entries(host).splitlines()
        return any(line.startswith(mac) and f"dst {underlay} " in line for line in lines)

    def _entries(self, host: str) -> str:
        return subprocess.run(
            ["bridge", "-n", f"ovl-{self.name}-{host}", "fdb"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout

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
        found = [*self.seen, *_insane(receipt)]
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


def _insane(receipt: dict[str, Any]) -> list[str]:
    """Figures that no move can have, whatever the clocks say."""
    figures = {key: value for key, value in receipt.items() if key.endswith("_ms")}
    return [f"{key} is {ms}" for key, ms in figures.items() if ms is not None and ms < 0]


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """This process's environment, which daemons inherit, with `changes` for a moment."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        for name in changes:
            os.environ.pop(name)
        os.environ.update(before)


def _guest_ns(pid: int) -> int:
    """Time that the threads of a QEMU have used, but for the first, which serves QMP."""
    total = 0
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        if thread.name != str(pid):
            with contextlib.suppress(OSError):
                total += int((thread / "schedstat").read_text().split()[0])
    return total


_LASTING: dict[str, dict[str, Any]] = {
    "precopy": {"bandwidth_bytes_per_s": 16 << 20},
    "equal": {"verify": True},
}
"""Options with which a phase lasts long enough to be met."""


def _post(url: str, wish: dict[str, Any]) -> Any:
    head = {"content-type": "application/json"}
    request = urllib.request.Request(url, json.dumps(wish).encode(), head)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def _phase_at(receipt: dict[str, Any], at_ns: int) -> str:
    """The phase of the move at an instant, after which the NVA's clock may have been set."""
    reached, before_ns = "planned", 0.0
    for each in receipt["phases"]:
        entered_ns = datetime.fromisoformat(each["at"]).timestamp() * 1e9
        if not before_ns <= entered_ns <= at_ns:
            break
        reached, before_ns = each["phase"], entered_ns
    return reached


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
