"""The Hypervisor port on QEMU, over QMP.

A QEMU process belongs to nobody's session: it outlives this daemon and is found again by its run
directory. The new copy is started paused and announces nothing. The old one is stopped by us at a
pass over memory that leaves little enough (QEMU's own idea of convergence is set to a millisecond
until `finish`), so that the gate can hold before the VM stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shlex
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient, QMPError

from overland.hypervisor import away, home, mirror, plugging
from overland.hypervisor.accel import NOTICE, accelerator
from overland.hypervisor.channel import Channel
from overland.hypervisor.checkpoint import Giver, Keeper
from overland.hypervisor.command import disk_node, qemu_command
from overland.hypervisor.countdown import COUNTDOWN_BYTES, long_firmware
from overland.hypervisor.images import Images
from overland.hypervisor.process import alive, ours, until_gone
from overland.hypervisor.statefile import Taker, give
from overland.model.cluster import PLUGGABLE, Disk, Vm, moved_disks, numbered
from overland.model.forecast import Gauge
from overland.model.handover import Checkpoint, Storage, Transfer
from overland.ports import HypervisorFacts, HypervisorFailure, RunState, Unplugged

OLDEST = (7, 2)
CONNECT_LIMIT_S = 10.0
STOP_LIMIT_S = 5.0
CANCEL_LIMIT_S = 0.5
CHECKPOINT_LIMIT_S = 3600.0
SAVE_LIMIT_S = 600.0
UNPLUG_LIMIT_S = 10.0
"""How long a guest may take to let go of an interface."""

GAUGE_S = 1
GAUGE_LIMIT_S = 2.5
_DONE = ("completed", "failed")
_OVER = (*_DONE, "cancelled")
_PAUSED = "pre-switchover"
_SAVING = ".saving-"
"""Before the name of a state that is not whole yet."""

UNLIMITED_BYTES_PER_S = 1 << 40
UNLIMITED_DOWNTIME_MS = 2_000_000
PRECOPY_DOWNTIME_MS = 1
_EVENTS = (
    *("STOP", "RESUME", "MIGRATION", "MIGRATION_PASS", "SHUTDOWN", "GUEST_PANICKED"),
    plugging.DELETED,
)
_STATES: dict[str, RunState] = {
    "running": "running",
    "paused": "paused",
    "prelaunch": "paused",
    "inmigrate": "incoming",
    "postmigrate": "sent",
    "finish-migrate": "sent",
    "shutdown": "stopped",
    "guest-panicked": "crashed",
    "internal-error": "crashed",
}


class TapSource(Protocol):
    """Where the descriptors of existing taps come from."""

    def fd_for_child(self, name: str) -> int: ...

    def adopt(self, name: str, pid: int) -> None: ...


class _Machine:
    """One QEMU process and the ear on its events."""

    def __init__(self, name: str, pid: int, client: QMPClient, monitor: socket.socket) -> None:
        self.name = name
        self.pid = pid
        self.client = client
        self.monitor = monitor
        self.channel: Channel | None = None
        self.giver: Giver | None = None
        self.stopped_ns = 0
        self.resumed_ns = 0
        self.changed = asyncio.Condition()
        self.migration = ""
        self.passes = 0
        self.cancels = 0
        self.unplugged: set[int] = set()
        self.ran = False  # when its saving began
        self.wakes = False  # from a state in a file, which is the VM until that is done
        self.mirror = mirror.Progress()
        self.ended = False
        self.listener = EventListener(_EVENTS)
        self.task: asyncio.Task[None] | None = None

    def let_go(self) -> None:
        """Close our end of a memory stream, if there is one."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None


class QemuHypervisor:
    """The VMs of one host. Everything of a VM lies in `run_dir/NAME`."""

    def __init__(
        self,
        run_dir: Path,
        taps: TapSource,
        images: Images,
        tls: Path,
        binary: str = "qemu-system-x86_64",
    ) -> None:
        """`tls`: a folder with our certificate as QEMU wants it (`mirror.credentials`)."""
        self._images = images
        self._tls = tls
        self._run_dir = run_dir
        self._taps = taps
        self._binary = binary
        self._facts: HypervisorFacts | None = None
        self._firmware: Path | None = None
        self._taker = Taker()
        self._keeper = Keeper(run_dir / "checkpoints")
        self._machines: dict[str, _Machine] = {}
        self._events: asyncio.Queue[tuple[str, RunState | Unplugged]] = asyncio.Queue()

    # ------------------------------------------------------------ the host

    async def facts(self) -> HypervisorFacts:
        if self._facts is None:
            if shutil.which(self._binary) is None:
                raise HypervisorFailure(f"{self._binary} is not installed")
            version = await self._version()
            kind = await accelerator(self._binary)
            self._facts = HypervisorFacts(
                version=version,
                accelerator="kvm" if kind == "kvm" else "tcg",
                machine_types=await self._machine_types(),
                cpu_models=("max", "qemu64") if kind == "tcg" else ("qemu64", "host"),
                notice="" if kind == "kvm" else NOTICE,
            )
        return self._facts

    async def _ask(self, *arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            self._binary,
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        out, _ = await process.communicate()
        return out.decode(errors="replace")

    async def _version(self) -> str:
        match = re.search(r"version (\d+)\.(\d+)\.(\d+)", await self._ask("--version"))
        if match is None:
            raise HypervisorFailure(f"{self._binary} does not tell its version")
        if (int(match[1]), int(match[2])) < OLDEST:
            raise HypervisorFailure(f"QEMU {match[0][8:]} is too old: 7.2 or later is needed")
        return match[0][8:]

    async def _machine_types(self) -> tuple[str, ...]:
        """The newest first, and first those that interfaces can be plugged into.

        The others are for VMs that were made on one of them.
        """
        out = await self._ask("-M", "help")
        found = re.findall(r"^(pc-(?:i440fx|q35)-)(\d[\d.]*)\s", out, re.MULTILINE)
        order = sorted(found, key=lambda it: (it[0] == PLUGGABLE, _numbers(it[1])), reverse=True)
        return tuple(kind + version for kind, version in order)

    async def names(self) -> list[str]:
        return sorted(self._machines)

    async def find(self) -> list[str]:
        """After a restart: connect to every VM of ours that still runs.

        What a former daemon was taking when it ended is not whole, and goes.
        """
        for part in (self._run_dir / "taken").glob(".*"):
            part.unlink(missing_ok=True)
        for folder in sorted(self._run_dir.glob("*/pid")):
            name = folder.parent.name
            pid = ours(folder, f"overland-{name}")
            if pid and name not in self._machines:
                with contextlib.suppress(HypervisorFailure):
                    await self._recall(await self._connect(name, pid))
        return await self.names()

    async def _recall(self, machine: _Machine) -> None:
        """What its events would have told, had we listened."""
        machine.migration = (await self._do(machine, "query-migrate")).get("status", "")
        status = (await self._do(machine, "query-status"))["status"]
        if status not in ("running", "inmigrate"):
            machine.stopped_ns = time.time_ns()
        await self._process_or_state(machine.name, runs=status == "running")

    async def _process_or_state(self, vm: str, *, runs: bool) -> None:
        """Where both are left, one is the VM: its state, unless it has run on from it (HO-55).

        A former daemon was killed between the two, while it suspended or woke the VM. A state that
        stayed beside a VM that runs could be woken, much later, as if it were the VM.
        """
        saved = self._saved(vm)
        if saved.exists() and runs:
            saved.unlink()
        elif saved.exists():
            await self._end(vm)

    def adopt(self, vm: str, port: str) -> None:
        """After a restart: take a descriptor of tap `port` from the VM's process."""
        self._taps.adopt(port, self._machine(vm).pid)

    async def events(self) -> AsyncIterator[tuple[str, RunState | Unplugged]]:
        while True:
            yield await self._events.get()

    # ------------------------------------------------------------ life

    async def start(self, vm: Vm, ports: Sequence[str]) -> None:
        self._images.keep(vm.name)
        try:
            await self._images.make_missing(vm)
            await self._spawn(vm, ports, incoming=False)
        except HypervisorFailure:
            self._images.drop(vm.name)
            raise
        self._images.keep(vm.name)

    async def receive(self, vm: Vm, ports: Sequence[str], listen: str) -> str:
        await self._images.make(vm.name, moved_disks(vm))
        machine = await self._spawn(vm, ports, incoming=True, attached=False)
        capabilities = _capabilities(waiting=True)
        await self._do(machine, "migrate-set-capabilities", capabilities=capabilities)
        # Not one frame may leave before the commit, so QEMU announces nothing (HO-13).
        await self._do(machine, "migrate-set-parameters", **{"announce-rounds": 0})
        port = _free_port(listen)
        host = f"[{listen}]" if ":" in listen else listen
        uri = f"tcp:{host}:{port}"
        await self._do(machine, "migrate-incoming", uri=uri)
        return uri

    async def _spawn(
        self, vm: Vm, ports: Sequence[str], *, incoming: bool, attached: bool = True
    ) -> _Machine:
        """Without `attached` it gets the images on other hosts by `attach_disks`."""
        if vm.name in self._machines:
            raise HypervisorFailure(f"VM {vm.name} is already on this host")
        facts = await self.facts()
        folder = self._run_dir / vm.name
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            log = (folder / "qemu.log").open("wb")
        except OSError as error:
            raise HypervisorFailure(f"{folder}: {error.strerror}") from None
        fds = [self._taps.fd_for_child(port) for port in ports]
        command = qemu_command(
            self._binary,
            vm,
            facts.accelerator,
            fds,
            folder,
            files=[
                self._below(vm, index, disk, attached=attached)
                for index, disk in enumerate(vm.disks)
            ],
            tls=self._tls if any(away.elsewhere(vm)) else None,
            firmware=await self._long_firmware(),
            incoming=incoming,
        )
        with log:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=fds,
                start_new_session=True,
            )
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # A guest does not run with the daemon's own priority.
            os.setpriority(os.PRIO_PROCESS, process.pid, 0)
        (folder / "pid").write_text(f"{process.pid}\n")
        try:
            return await self._connect(vm.name, process.pid)
        except HypervisorFailure:
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # or it would run, when a disk is reached at last
            raise

    def _below(self, vm: Vm, index: int, disk: Disk, *, attached: bool) -> dict[str, Any]:
        if not disk.uri:
            return self._images.file_node(disk)
        return away.node(vm, index, disk) if attached else away.placeholder(disk)

    async def _long_firmware(self) -> Path | None:
        if self._firmware is None and await self._single_round():
            folders = (await self._ask("-L", "help")).split()
            self._firmware = long_firmware(folders, self._run_dir / "firmware.bin")
        return self._firmware

    async def _connect(self, name: str, pid: int) -> _Machine:
        client = QMPClient(f"overland-{name}")
        deadline_s = time.monotonic() + CONNECT_LIMIT_S
        while True:
            monitor = socket.socket(socket.AF_UNIX)
            try:
                monitor.connect(str(self._run_dir / name / "qmp.sock"))
                monitor.setblocking(False)
                await client.connect(monitor)
                break
            except (ConnectError, OSError):
                monitor.close()
                if not alive(pid) or time.monotonic() > deadline_s:
                    raise HypervisorFailure(f"QEMU of {name}: {self._last_word(name)}") from None
                await asyncio.sleep(0.01)
        machine = _Machine(name, pid, client, monitor)
        client.register_listener(machine.listener)
        machine.task = asyncio.create_task(self._listen(machine))
        self._machines[name] = machine
        return machine

    def _last_word(self, name: str) -> str:
        log = self._run_dir / name / "qemu.log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        return lines[-1] if lines else "it ended without a word"

    async def _listen(self, machine: _Machine) -> None:
        ended = asyncio.create_task(until_gone(machine.pid))
        events = aiter(machine.listener)
        while True:
            following = asyncio.ensure_future(anext(events))
            await asyncio.wait({following, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                following.cancel()
                break
            try:
                event = following.result()
            except (QMPError, EOFError, OSError):
                await ended
                break
            await self._heard(machine, event)
        machine.ended = True
        machine.let_go()
        async with machine.changed:
            machine.changed.notify_all()
        if self._machines.get(machine.name) is machine:
            del self._machines[machine.name]
            if not machine.wakes:
                self._events.put_nowait((machine.name, "crashed"))
        with contextlib.suppress(QMPError, EOFError, OSError):
            await machine.client.disconnect()

    async def _heard(self, machine: _Machine, event: Any) -> None:
        stamp = event["timestamp"]
        at_ns = int(stamp["seconds"]) * 10**9 + int(stamp["microseconds"]) * 1000
        async with machine.changed:
            match event["event"]:
                case "STOP":
                    machine.stopped_ns = at_ns
                case "RESUME":
                    machine.resumed_ns = at_ns
                    self._events.put_nowait((machine.name, "running"))
                case "MIGRATION":
                    machine.migration = event["data"]["status"]
                case "MIGRATION_PASS":
                    machine.passes = event["data"]["pass"]
                case "GUEST_PANICKED":
                    self._events.put_nowait((machine.name, "crashed"))
                case plugging.DELETED:
                    slot = plugging.deleted_slot(event["data"])
                    if slot is not None:
                        machine.unplugged.add(slot)
                        self._events.put_nowait((machine.name, Unplugged(slot=slot)))
                case _:
                    pass
            machine.changed.notify_all()

    def _machine(self, name: str) -> _Machine:
        machine = self._machines.get(name)
        if machine is None:
            raise HypervisorFailure(f"VM {name} has no process here")
        return machine

    async def _do(self, machine: _Machine, command: str, /, **arguments: Any) -> Any:
        return await self._execute(machine, command, arguments, oob=False)

    async def _execute(
        self, machine: _Machine, command: str, arguments: dict[str, Any], *, oob: bool
    ) -> Any:
        """With `oob` past whatever QEMU is busy with."""
        try:
            return await machine.client.execute(command, arguments or None, oob=oob)
        except ExecuteError as error:
            raise HypervisorFailure(f"QEMU of {machine.name}: {command}: {error}") from None
        except (QMPError, EOFError, OSError, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and not machine.ended:
                raise
            word = self._last_word(machine.name)
            raise HypervisorFailure(f"QEMU of {machine.name} ended: {word}") from None

    async def _wait(self, machine: _Machine, what: str, ready: Any, limit_s: float) -> None:
        try:
            async with asyncio.timeout(limit_s), machine.changed:
                await machine.changed.wait_for(lambda: ready() or machine.ended)
        except TimeoutError:
            raise HypervisorFailure(
                f"QEMU of {machine.name}: no {what} within {limit_s:g} s"
            ) from None
        if machine.ended:
            raise HypervisorFailure(
                f"QEMU of {machine.name} ended: {self._last_word(machine.name)}"
            )

    async def state(self, vm: str) -> RunState | None:
        if vm not in self._machines:
            return None
        status = await self._do(self._machine(vm), "query-status")
        return _STATES.get(status["status"], "paused")

    async def pause(self, vm: str) -> int:
        machine = self._machine(vm)
        machine.stopped_ns = 0
        await self._do(machine, "stop")
        await self._wait(machine, "STOP", lambda: machine.stopped_ns, STOP_LIMIT_S)
        return machine.stopped_ns

    async def resume(self, vm: str) -> int:
        machine = self._machine(vm)
        machine.resumed_ns = 0
        await self._do(machine, "cont")
        if not machine.resumed_ns:
            status = await self._do(machine, "query-status")
            if status["status"] != "running":
                raise HypervisorFailure(f"QEMU of {vm} does not run on: {status['status']}")
            return machine.resumed_ns or time.time_ns()
        return machine.resumed_ns

    async def suspend(self, vm: str) -> int:
        if vm not in self._machines and self._saved(vm).exists():
            return 0
        machine = self._machine(vm)
        saving = self._saved(vm, _SAVING)
        if machine.migration not in ("setup", "active"):
            if await self.state(vm) != "sent":
                await self._begin_saving(machine)
            elif not saving.exists() and not self._saved(vm).exists():
                raise HypervisorFailure(f"QEMU of {vm} has sent its state, which is not here")
        await self._wait(machine, "saved state", lambda: machine.migration in _DONE, SAVE_LIMIT_S)
        if machine.migration == "failed":
            saving.unlink(missing_ok=True)
            if machine.ran:
                await self.resume(vm)
            raise HypervisorFailure(f"QEMU of {vm}: its state could not be saved (disk full?)")
        await self._end_saved(vm)
        return machine.stopped_ns

    async def _end_saved(self, vm: str) -> None:
        """The state is whole: from now on it is the VM, and not the process."""
        saving = self._saved(vm, _SAVING)
        if saving.exists():
            saving.replace(self._saved(vm))
        await self._end(vm)

    async def _begin_saving(self, machine: _Machine) -> None:
        saving = self._saved(machine.name, _SAVING)
        try:
            saving.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise HypervisorFailure(f"{saving.parent}: {error.strerror}") from None
        await self._stop_for(machine)
        machine.migration = "setup"
        await self._do(machine, "migrate-set-capabilities", capabilities=_capabilities())
        await self._do(machine, "migrate-set-parameters", **_bandwidth(0))
        await self._do(machine, "migrate", uri=f"exec:cat > {shlex.quote(str(saving))}")

    async def _stop_for(self, machine: _Machine) -> None:
        """A VM that is paused already has no STOP to wait for: its saving begins now."""
        machine.ran = await self.state(machine.name) == "running"
        if machine.ran:
            await self.pause(machine.name)
        else:
            machine.stopped_ns = time.time_ns()

    async def wake(self, vm: Vm, ports: Sequence[str]) -> int:
        saved = self._saved(vm.name)
        at_ns = await self._run_from(saved, vm, ports)
        saved.unlink(missing_ok=True)
        return at_ns

    async def _run_from(self, state: Path, vm: Vm, ports: Sequence[str]) -> int:
        """Run a VM from its state in a file, or leave it paused if it was; may be repeated."""
        machine = self._machines.get(vm.name)
        if machine is None:
            if not state.exists():
                raise HypervisorFailure(f"VM {vm.name} has no saved state here")
            machine = await self._spawn(vm, ports, incoming=True)
        if await self.state(vm.name) == "incoming":
            await self._load(machine, state)
        try:
            at_ns = await self.received(vm.name, SAVE_LIMIT_S)
            if vm.state != "paused":
                at_ns = await self.resume(vm.name)
        except HypervisorFailure:
            await self._end(vm.name)  # the state is there for another try
            raise
        machine.wakes = False
        return at_ns

    async def _load(self, machine: _Machine, state: Path) -> None:
        """Begin, unless a former daemon has: it may have been killed before it could."""
        machine.wakes = True
        if not await self._under_way(machine):
            await self._do(machine, "migrate-set-capabilities", capabilities=_capabilities())
            await self._do(machine, "migrate-incoming", uri=f"exec:cat {shlex.quote(str(state))}")

    async def recover(self, vm: Vm, ports: Sequence[str]) -> int:
        at_ns = self._keeper.newest_ns(vm.name)
        if not at_ns:
            raise HypervisorFailure(f"VM {vm.name} has no whole checkpoint here")
        await self._run_from(self._keeper.path(vm.name), vm, ports)
        await self.drop_checkpoint(vm.name)
        return at_ns

    async def keep_checkpoints(self, vm: str, listen: str) -> str:
        return await self._keeper.listen(vm, listen)

    async def refuse_checkpoints(self, vm: str) -> None:
        await self._keeper.refused(vm)

    async def drop_checkpoint(self, vm: str) -> None:
        await self._keeper.drop(vm)

    async def back_to(self, vm: Vm, ports: Sequence[str]) -> None:
        machine = self._machines.get(vm.name)
        if machine is None:
            await self.wake(vm, ports)
            return
        if machine.migration in ("setup", "active"):
            await self.cancel(vm.name)
        if vm.state == "paused" and await self._is_saved(machine):
            # What has been sent can only run on; a VM that is to stay paused wakes from its state.
            await self._end_saved(vm.name)
            await self.wake(vm, ports)
            return
        for kind in (_SAVING, ""):
            self._saved(vm.name, kind).unlink(missing_ok=True)
        if vm.state != "paused" and await self.state(vm.name) != "running":
            await self.resume(vm.name)

    async def _is_saved(self, machine: _Machine) -> bool:
        files = (self._saved(machine.name, kind) for kind in (_SAVING, ""))
        whole = machine.migration == "completed" and any(file.exists() for file in files)
        return whole and await self.state(machine.name) == "sent"

    async def saved_bytes(self, vm: str) -> int:
        saved = self._saved(vm)
        return saved.stat().st_size if saved.exists() else 0

    async def saved(self) -> list[str]:
        return [name for name in self._names_in("suspended") if name not in self._machines]

    async def take_state(self, move: str, listen: str) -> str:
        return await self._taker.take(self._run_dir / "taken" / move, listen)

    async def keep_state(self, vm: str, move: str) -> None:
        taken = self._run_dir / "taken" / move
        await self._taker.stop_waiting(taken)  # a state that is given twice comes to nobody
        if taken.exists():
            self._saved(vm).parent.mkdir(exist_ok=True)
            taken.replace(self._saved(vm))
        elif vm not in self._machines and not self._saved(vm).exists():
            raise HypervisorFailure(f"the state of VM {vm} is not here any more")

    async def drop_taken(self, move: str) -> None:
        await self._taker.give_up(self._run_dir / "taken" / move)

    def taken(self) -> list[str]:
        return sorted({*self._names_in("taken"), *(path.name for path in self._taker.awaited())})

    def _names_in(self, folder: str) -> list[str]:
        """Whole files only; what is being written has a name that begins with a dot."""
        found = (self._run_dir / folder).glob("[!.]*")
        return sorted(path.name for path in found)

    async def give_state(self, vm: str, uri: str) -> int:
        return await give(self._saved(vm), uri)

    def _saved(self, vm: str, kind: str = "") -> Path:
        return self._run_dir / "suspended" / f"{kind}{vm}"

    async def stop(self, vm: str) -> None:
        await self._end(vm)
        self._saved(vm).unlink(missing_ok=True)

    async def _end(self, vm: str) -> None:
        machine = self._machines.pop(vm, None)
        if machine is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(machine.pid, signal.SIGKILL)
        await until_gone(machine.pid)
        (self._run_dir / vm / "pid").unlink(missing_ok=True)

    async def digest(self, vm: str) -> str:
        machine = self._machine(vm)
        summary = await self._do(machine, "query-memory-size-summary")
        path = self._run_dir / vm / "memory"
        try:
            size = int(summary["base-memory"])
            await self._do(machine, "pmemsave", val=0, size=size, filename=str(path))
            return await asyncio.to_thread(_sha256, path)
        finally:
            path.unlink(missing_ok=True)

    # ------------------------------------------------------------ interfaces

    async def fit(self, vm: Vm, ports: Sequence[str]) -> None:
        machine = self._machine(vm.name)
        there = await self.plugged(vm.name)
        for (slot, interface), port in zip(numbered(vm), ports, strict=True):
            if interface.change == "removing" and slot in there:
                await self._unplug(machine, slot)
            elif interface.change != "removing" and slot not in there:
                name = f"tap{slot}"
                socket.send_fds(machine.monitor, [b" "], [self._taps.fd_for_child(port)])
                await self._do(machine, "getfd", fdname=name)
                await plugging.plug(self._qmp(machine), slot, interface, name)

    async def plugged(self, vm: str) -> frozenset[int]:
        return await plugging.slots(self._qmp(self._machine(vm)))

    async def _unplug(self, machine: _Machine, slot: int) -> None:
        machine.unplugged.discard(slot)
        await plugging.ask_out(self._qmp(machine), slot)
        word = "word from the guest that it has let go of the interface"
        await self._wait(machine, word, lambda: slot in machine.unplugged, UNPLUG_LIMIT_S)
        await plugging.drop_backend(self._qmp(machine), slot)

    # ------------------------------------------------------------ moving

    async def gauge(self, vm: str) -> Gauge:
        machine = self._machine(vm)
        await self._do(machine, "calc-dirty-rate", **{"calc-time": GAUGE_S})
        deadline_s = time.monotonic() + GAUGE_LIMIT_S
        while (said := await self._do(machine, "query-dirty-rate"))["status"] != "measured":
            if time.monotonic() > deadline_s:
                raise HypervisorFailure(f"QEMU of {vm} does not say how fast its memory changes")
            await asyncio.sleep(0.05)
        countdown = COUNTDOWN_BYTES if await self._single_round() else 0
        memory = await self._do(machine, "query-memory-size-summary")
        return Gauge(
            memory_bytes=int(memory["base-memory"]) + countdown,
            dirty_bytes_per_s=float(said["dirty-rate"] << 20),
            countdown_bytes=countdown,
        )

    async def send(self, vm: str, uri: str, bytes_per_s: int) -> None:
        machine = self._machine(vm)
        machine.stopped_ns = 0
        machine.migration = ""
        machine.passes = 0
        pausing = bool(await self._do(machine, "query-jobs"))  # of disks that go along
        capabilities = _capabilities(pausing=pausing)
        await self._do(machine, "migrate-set-capabilities", capabilities=capabilities)
        machine.let_go()
        if not await self._single_round():
            parameters = {"downtime-limit": PRECOPY_DOWNTIME_MS, **_bandwidth(bytes_per_s)}
            await self._do(machine, "migrate-set-parameters", **parameters)
            await self._do(machine, "migrate", uri=uri)
            return
        parameters = {"downtime-limit": 0, **_bandwidth(0)}
        await self._do(machine, "migrate-set-parameters", **parameters)
        machine.channel = await Channel.open(uri)
        machine.channel.pace(bytes_per_s)
        machine.channel.leash(COUNTDOWN_BYTES // 2)
        machine.channel.hand_to(machine.monitor)
        await self._do(machine, "getfd", fdname="memory")
        await self._do(machine, "migrate", uri="fd:memory")

    async def checkpoint(
        self,
        vm: str,
        uri: str,
        bytes_per_s: int,
        still: contextlib.AbstractAsyncContextManager[None],
    ) -> Checkpoint:
        machine = self._machine(vm)
        cancels = machine.cancels
        await self._do(
            machine, "migrate-set-capabilities", capabilities=_capabilities(background=True)
        )
        await self._do(machine, "migrate-set-parameters", **_bandwidth(0))
        machine.giver = giver = await Giver.open(uri, bytes_per_s)
        try:
            into = await giver.relay()
            try:
                socket.send_fds(machine.monitor, [b" "], [into])
                await self._do(machine, "getfd", fdname="checkpoint")
            finally:
                os.close(into)
            async with still:
                if machine.cancels != cancels:
                    raise HypervisorFailure(f"QEMU of {vm}: the checkpoint was given up")
                machine.migration = ""
                machine.stopped_ns = machine.resumed_ns = 0
                await self._do(machine, "migrate", uri="fd:checkpoint")
                await self._wait(
                    machine,
                    "instant",
                    lambda: machine.resumed_ns or machine.migration in _OVER,
                    STOP_LIMIT_S,
                )
            await self._wait(
                machine, "checkpoint", lambda: machine.migration in _OVER, CHECKPOINT_LIMIT_S
            )
            said = await self._do(machine, "query-migrate")
            if machine.migration != "completed":
                why = said.get("error-desc", "the new host does not take it")
                raise HypervisorFailure(f"QEMU of {vm}: checkpoint {machine.migration}: {why}")
            kept_ns = await giver.whole(machine.stopped_ns)
        finally:
            giver.close()
            machine.giver = None
        return Checkpoint(
            at_ns=machine.stopped_ns,
            kept_ns=kept_ns,
            sent_bytes=int(said["ram"]["transferred"]),
            pause_ms=float(said.get("downtime", 0)),
        )

    async def transfer(self, vm: str) -> Transfer:
        machine = self._machine(vm)
        if machine.channel is not None:
            machine.channel.mark()  # before the answer: what is written meanwhile counts
        said = await self._do(machine, "query-migrate")
        if machine.migration in ("", "setup"):
            # Until the new transfer is under way QEMU still tells of the one it came by.
            return Transfer(status="setup")
        countdown = COUNTDOWN_BYTES if await self._single_round() else 0
        return msgspec.structs.replace(_transfer(said), countdown_bytes=countdown)

    async def _single_round(self) -> bool:
        """Under emulation memory is copied in one round, and QEMU stops the VM at its end.

        With more rounds some of the pages that the guest writes between the last look at the
        dirty log and its stop do not arrive (seen by comparing memory at equality: ADR 0006).
        """
        return (await self.facts()).accelerator == "tcg"

    async def progressed(self, vm: str, passes: int, timeout_s: float) -> None:
        machine = self._machine(vm)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), machine.changed:
                await machine.changed.wait_for(
                    lambda: machine.passes > passes or machine.migration == "completed"
                )

    async def pace(self, vm: str, bytes_per_s: int, leash_bytes: int | None) -> None:
        machine = self._machine(vm)
        if machine.channel is None:
            await self._do(machine, "migrate-set-parameters", **_bandwidth(bytes_per_s))
            return
        machine.channel.pace(bytes_per_s)
        if leash_bytes is not None:
            machine.channel.leash(leash_bytes)

    async def finish(self, vm: str) -> None:
        machine = self._machine(vm)
        # QEMU stops the VM itself as soon as it may: a single round when its rest is sent, which is
        # no longer paced, because the VM hears nothing meanwhile. It may already have done so.
        if machine.channel is not None:
            machine.channel.release()
        if not await self._single_round():
            with contextlib.suppress(HypervisorFailure):
                limits = {"downtime-limit": UNLIMITED_DOWNTIME_MS, **_bandwidth(0)}
                await self._do(machine, "migrate-set-parameters", **limits)

    async def stopped(self, vm: str) -> int:
        machine = self._machine(vm)
        await self._wait(machine, "STOP", lambda: machine.stopped_ns, STOP_LIMIT_S)
        return machine.stopped_ns

    async def received(self, vm: str, timeout_s: float) -> int:
        machine = self._machine(vm)
        await self._wait(machine, "whole copy", lambda: machine.migration in _DONE, timeout_s)
        if machine.migration == "failed":
            raise HypervisorFailure(f"QEMU of {vm}: {self._last_word(vm)}")
        return time.time_ns()

    async def cancel(self, vm: str) -> None:
        machine = self._machine(vm)
        machine.cancels += 1
        await mirror.cut(self._qmp(machine, oob=True))
        # With a channel of ours it is a move's own transfer. Else the daemon was restarted: ask.
        if machine.channel is None and await self._in_background(machine):
            await self._break_off(machine)
        else:
            await self._cancel_transfer(machine)
        await mirror.give_up(self._qmp(machine))

    async def _cancel_transfer(self, machine: _Machine) -> None:
        try:
            async with asyncio.timeout(CANCEL_LIMIT_S):
                await self._do(machine, "migrate_cancel")
        except TimeoutError:
            # QEMU stands still until the network takes what it writes: cut it off (out of band).
            channels = {"instances": [{"type": "migration"}]}
            with contextlib.suppress(QMPError):
                await machine.client.execute("yank", channels, oob=True)
        machine.let_go()
        deadline_s = time.monotonic() + STOP_LIMIT_S
        while await self._under_way(machine):
            if time.monotonic() > deadline_s:
                raise HypervisorFailure(f"QEMU of {machine.name} does not give up its transfer")
            await asyncio.sleep(0.01)

    async def _in_background(self, machine: _Machine) -> bool:
        """Whether what is sent, or was last, is a checkpoint."""
        try:
            async with asyncio.timeout(CANCEL_LIMIT_S):
                said = await self._do(machine, "query-migrate-capabilities")
        except TimeoutError:
            return False  # it stands still for the network, which it does in a move only
        on = [each["capability"] for each in said if each["state"]]
        return "background-snapshot" in on

    async def _break_off(self, machine: _Machine) -> None:
        """A checkpoint is not cancelled (hypervisor/checkpoint.py): what is left is thrown away."""
        if machine.giver is not None:
            machine.giver.break_off()
        if await self._under_way(machine):
            with contextlib.suppress(HypervisorFailure):
                await self._wait(machine, "end", lambda: machine.migration in _OVER, STOP_LIMIT_S)

    async def _under_way(self, machine: _Machine) -> bool:
        said = await self._do(machine, "query-migrate")
        return said.get("status", "none") not in ("none", *_OVER)

    # ------------------------------------------------------------ disks that stay, or go along

    async def attach_disks(self, vm: Vm) -> None:
        await away.attach(self._qmp(self._machine(vm.name)), vm, self._tls)

    async def copy_disk(self, vm: Vm, bytes_per_s: int) -> None:
        index, disk = home.which(vm)
        do = self._qmp(self._machine(vm.name))
        await home.begin(do, index, disk, self._images.file_node(disk), bytes_per_s)

    async def copied(self, vm: Vm) -> Storage:
        return await home.look(self._qmp(self._machine(vm.name)), home.which(vm)[0])

    async def settle_disk(self, vm: Vm) -> int:
        machine = self._machine(vm.name)
        if await self.state(vm.name) == "running":
            await self.pause(vm.name)
        await home.end(self._qmp(machine), home.which(vm)[0])
        return machine.stopped_ns or time.time_ns()

    async def keep_disk(self, vm: Vm) -> int:
        await home.switch(self._qmp(self._machine(vm.name)), home.which(vm)[0])
        return await self._run_on(vm)

    async def leave_disk(self, vm: Vm) -> None:
        if vm.name in self._machines:
            await home.give_up(self._qmp(self._machine(vm.name)), home.which(vm)[0])
            await self._run_on(vm)

    async def _run_on(self, vm: Vm) -> int:
        """As it was: one that had been paused stays so."""
        stands = await self.state(vm.name) == "paused" and vm.state == "running"
        return await self.resume(vm.name) if stands else time.time_ns()

    async def offer_disks(self, vm: Vm, listen: str) -> str:
        do = self._qmp(self._machine(vm.name))
        return await mirror.offer(do, _moving(vm), listen, _free_port(listen), self._tls)

    async def withdraw_disks(self, vm: str) -> None:
        await mirror.withdraw(self._qmp(self._machine(vm)))

    async def begin_mirror(self, vm: Vm, uri: str, bytes_per_s: int) -> None:
        machine = self._machine(vm.name)
        machine.mirror = mirror.Progress()
        await mirror.begin(self._qmp(machine), _moving(vm), uri, bytes_per_s, self._tls)

    async def mirrored(self, vm: str) -> Storage:
        machine = self._machine(vm)
        return await machine.mirror.look(self._qmp(machine))

    async def end_mirror(self, vm: str) -> None:
        machine = self._machine(vm)
        await self._wait(machine, "pause", lambda: machine.migration == _PAUSED, STOP_LIMIT_S)
        await mirror.end(self._qmp(machine))

    async def send_rest(self, vm: str) -> None:
        machine = self._machine(vm)
        if machine.channel is not None:
            # A VM that stopped before anybody had said so may: its rest is on no leash either.
            machine.channel.release()
        await self._do(machine, "migrate-continue", state="pre-switchover")

    def _qmp(self, machine: _Machine, *, oob: bool = False) -> mirror.Qmp:
        async def do(command: str, /, **arguments: Any) -> Any:
            return await self._execute(machine, command, arguments, oob=oob)

        return do

    async def close(self) -> None:
        """Let go of every QMP connection; the VMs run on."""
        for machine in list(self._machines.values()):
            if machine.task is not None:
                machine.task.cancel()
            with contextlib.suppress(QMPError, OSError):
                await machine.client.disconnect()


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def _moving(vm: Vm) -> list[str]:
    return [disk_node(index) for index, disk in enumerate(vm.disks) if disk.kind == "moved"]


def _capabilities(
    *, waiting: bool = False, pausing: bool = False, background: bool = False
) -> list[dict[str, Any]]:
    """What a transfer needs of QEMU; all are said, because a former one may have left others.

    `waiting`: the copy takes the locks of its images when it is made to run, and not when it is
    whole (HO-29). `pausing`: once the VM is stopped the rest of its memory waits. `background`: the
    state of one instant is sent while the VM runs on, and it stays here.
    """
    wanted = {
        "events": True,
        "late-block-activate": waiting,
        "pause-before-switchover": pausing,
        "background-snapshot": background,
    }
    return [{"capability": name, "state": state} for name, state in wanted.items()]


def _bandwidth(bytes_per_s: int) -> dict[str, int]:
    """QEMU's own limit; 0 is none."""
    return {"max-bandwidth": bytes_per_s or UNLIMITED_BYTES_PER_S}


def _transfer(said: dict[str, Any]) -> Transfer:
    status = said.get("status", "setup")
    if status == _PAUSED:
        status = "waiting"
    known = {"setup", "active", "waiting", "completed", "failed", "cancelled"}
    ram = said.get("ram", {})
    page = ram.get("page-size", 4096)
    total = int(ram.get("total", 0))
    sent = int(ram.get("transferred", 0))
    pages = int(ram.get("normal", 0)) * page
    return Transfer(
        status=status if status in known else "active",
        total_bytes=total,
        sent_bytes=sent,
        remaining_bytes=int(ram.get("remaining", 0)),
        resent_bytes=max(0, pages - total),
        passes=int(ram.get("dirty-sync-count", 0)),
        bandwidth_bytes_per_s=float(ram.get("mbps", 0.0)) * 1e6 / 8,
        dirty_bytes_per_s=float(ram.get("dirty-pages-rate", 0)) * page,
        error=said.get("error-desc", ""),
    )


def _free_port(address: str) -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        try:
            sock.bind((address, 0))
        except OSError as error:
            raise HypervisorFailure(f"cannot listen on {address}: {error.strerror}") from None
        return int(sock.getsockname()[1])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
