"""What is wrong outside is said in one line, with the documented exit code, and changes nothing."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from overland.lab import lab as labs
from overland.lab.topology import topology
from overland.mobility import messages as m
from overland.model.handover import Handover, Memory, committed
from overland.nva.handovers import Handovers
from overland.nva.mapping import VnView
from overland.ports import Put, StoreFailure
from overland.store.sqlite import SqliteStore
from tests.core.cold_moves import in_phase as cold_in_phase
from tests.core.moves import NEW, OLD, in_phase
from tests.core.test_mapping import BLUE, cluster

OVERLAND = str(Path(sys.executable).parent / "overland")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [OVERLAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environment},
        timeout=30,
    )


def nva_config(folder: Path, *, store: str = "nva.db", port: int = 0, more: str = "") -> Path:
    path = folder / "nva.toml"
    path.write_text(
        f'store = "{folder}/{store}"\napi_listen = "127.0.0.1:{port}"\n'
        f'wire_address = "127.0.0.1"\n{more}\n'
        f'[tls]\nca = "{folder}/ca.crt"\n'
        f'certificate = "{folder}/nva.crt"\nkey = "{folder}/nva.key"\n'
    )
    return path


def one_line(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == code, done.stderr
    assert len(said) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in said[0]


def test_a_config_with_an_unknown_key(tmp_path: Path) -> None:
    config = nva_config(tmp_path, more='frobnicate = "yes"')
    for command in (("nva", "run", "--config"), ("config", "check")):
        one_line(run(*command, str(config)), 2, "frobnicate")


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    one_line(run("nve", "run", "--config", str(tmp_path / "no.toml")), 2, "No such file")


def test_a_corrupt_store_is_named_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "nva.db").write_bytes(b"this is no database" * 100)
    one_line(run("nva", "run", "--config", str(nva_config(tmp_path))), 1, "nva.db")
    assert (tmp_path / "nva.db").read_bytes() == b"this is no database" * 100


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("nva", "run", "--config", str(nva_config(tmp_path, port=port)))
    one_line(done, 1, f"cannot listen on 127.0.0.1:{port}", "Address already in use")


@pytest.mark.parametrize(
    "arguments",
    [
        ("vm", "migrate"),
        ("vm", "migrate", "web", "--to"),
        ("frobnicate",),
        ("vm", "create", "web", "--host", "h1"),
        ("lab", "up", "--hosts", "0"),
        ("lab", "up", "--hosts", "many"),
        ("lab", "up", "--name", "a b"),
        ("vm", "list", "-o", "xml"),
        ("vm", "list", "--api", "ftp://nowhere"),
        ("vm", "list"),
        ("vm",),
        ("vm", "migrate", "web", "--to", "h2", "--timeout-action", "explode"),
    ],
    ids=" ".join,
)
def test_a_command_mistyped_is_a_usage_error(arguments: tuple[str, ...]) -> None:
    one_line(run(*arguments), 2)


def test_an_nva_that_does_not_answer() -> None:
    one_line(run("vm", "list", OVERLAND_API="http://127.0.0.1:9"), 1, "does not answer")


def test_a_lab_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(labs.LabFailure, match="root"):
        labs.up(topology("never", 1))


@pytest.mark.root
async def test_a_full_disk_refuses_the_write_and_keeps_what_was(tmp_path: Path) -> None:
    from overland.ports import Put

    subprocess.run(  # noqa: ASYNC221 - it returns at once
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], check=True
    )
    try:
        store = SqliteStore(tmp_path / "nva.db")
        await store.commit([], [Put(key="vm/web", value=b"here")])
        with pytest.raises(StoreFailure, match="full"):
            await fill(store)
        entry = await store.get("vm/web")
        assert entry is not None
        assert entry.value == b"here"
        await store.close()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)  # noqa: ASYNC221


async def fill(store: SqliteStore) -> None:
    for n in range(100):
        await store.commit([], [Put(key=f"vm/{n}", value=bytes(8000))])


class FullDisk:
    """Records whose store cannot be written from now on, until `free` is set."""

    def __init__(self) -> None:
        self.free = False
        self.written: list[Handover] = []
        self.refused: list[Handover] = []

    async def journal(self, record: Handover) -> None:
        if not self.free:
            self.refused.append(record)
            raise StoreFailure("store nva.db: database or disk is full")
        self.written.append(record)

    async def commit(self, record: Handover) -> None:
        await self.journal(record)

    def publish(self, record: Handover) -> None:
        assert committed(record.phase)

    async def open_moves(self) -> list[Handover]:
        return []


async def test_nobody_is_told_to_close_before_that_is_written() -> None:
    """HO-48: a restarted NVA must not go on from a record whose NVEs have forgotten the move."""
    records = FullDisk()
    told: list[m.AnyOrder | m.ColdOrder | m.DiskOrder] = []
    moves = Handovers(records, lambda _, order: told.append(order), lambda _: None, lambda _: None)
    moves.begin(msgspec.structs.replace(in_phase("drained"), closing=False, deadline_s=0.0))
    await until(lambda: any(record.closing for record in records.refused))
    assert m.Close not in map(type, told)
    records.free = True
    await until(lambda: m.Close in map(type, told))
    assert records.written[-1].closing


@pytest.mark.parametrize(
    ("phase", "why"), [("precopy", "disk is full"), ("paused", "the NVA was restarted")]
)
async def test_a_full_disk_aborts_the_move_and_says_so(phase: str, why: str) -> None:
    """The VM is ordered back home although not a word can be written; the end is written late.

    HO-68: one whose VM has been stopped turns back with the restart itself.
    """
    records = FullDisk()
    told: list[tuple[str, m.AnyOrder | m.ColdOrder | m.DiskOrder]] = []
    moves = Handovers(
        records, lambda nve, order: told.append((nve, order)), lambda _: None, lambda _: None
    )
    record = in_phase(phase)  # type: ignore[arg-type]
    moves.begin(record)
    await until(lambda: m.GiveBack in [type(order) for _, order in told])
    found = moves.record("m1")
    assert found is not None
    assert why in (found.reason or "")
    moves.report(m.GivenBack(move="m1", nve=NEW))
    await until(lambda: m.Restore in [type(order) for _, order in told])
    moves.report(m.Restored(move="m1", nve=OLD))
    records.free = True
    await until(lambda: m.Close in [type(order) for _, order in told])
    for nve in (OLD, NEW, "h3"):
        moves.report(m.Closed(move="m1", nve=nve))
    await until(lambda: bool(records.written) and records.written[-1].phase == "aborted")
    assert records.written[-1].outcome == "aborted"


class SlowToWrite(FullDisk):
    """Subscribers hear of a record as the store has it."""

    heard: Handover | None = None

    def publish(self, record: Handover) -> None:
        self.heard = self.written[-1] if self.written else None


async def test_a_cold_move_is_published_when_it_is_written_however_late() -> None:
    """R-33: else its address would stay in transit for ever, for nothing more is written."""
    records = SlowToWrite()
    records.free = True
    moves = Handovers(records, lambda _nve, _order: None, lambda _: None, lambda _: None)
    moves.begin(cold_in_phase("committed"))
    await until(lambda: bool(records.written))
    records.free = False
    moves.report(m.Running(move="m1", nve=NEW, at_ns=50, held=0))
    await until(lambda: bool(records.refused))
    records.heard, records.free = None, True
    await until(lambda: records.heard is not None)
    assert records.heard is not None
    assert records.heard.phase == "converging"


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 - nothing else tells
            await asyncio.sleep(0.005)


class Remembered:
    """Records in memory."""

    async def journal(self, record: Handover) -> None: ...

    async def commit(self, record: Handover) -> None: ...

    def publish(self, record: Handover) -> None: ...

    async def open_moves(self) -> list[Handover]:
        return []


@pytest.mark.req("R-33")
async def test_an_nve_counts_when_every_vn_of_the_vm_is_in_its_kernel() -> None:
    """HO-41: in all of those in which it has a part; of the others it never hears."""
    moves = Handovers(Remembered(), lambda _nve, _order: None, lambda _: None, lambda _: None)
    blue = cold_in_phase("converging")
    both = (*blue.ports, msgspec.structs.replace(blue.ports[0], network="red", vni=43))
    moves.begin(msgspec.structs.replace(blue, ports=both))
    views = {"blue": VnView(cluster(), BLUE)}
    moves.in_kernel(OLD, views.get, lambda _network: True)
    moves.in_kernel(NEW, views.get, lambda network: network == "blue")
    await until(lambda: bool((record := moves.record("m1")) and record.acknowledged))
    record = moves.record("m1")
    assert record is not None
    assert [each.nve for each in record.acknowledged] == [NEW]


async def test_a_deadline_is_kept_however_much_is_reported() -> None:
    """Reports that came faster than ticks hid a deadline that had passed."""
    record = in_phase("precopy")
    ended: list[Handover] = []
    handovers = Handovers(Remembered(), lambda _nve, _order: None, ended.append, lambda _: None)
    past = msgspec.structs.replace(record.options, timeout_s=0.01)
    handovers.begin(msgspec.structs.replace(record, options=past))

    def aborting() -> bool:
        handovers.report(m.Progress(move=record.id, nve=OLD, memory=Memory()))
        return any(each.phase == "aborting" for each in ended)

    await until(aborting)
