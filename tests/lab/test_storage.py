"""Disks of real VMs, written to without a pause: they go along, stay whole, or nothing moves."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overland.lab import lab as labs
from overland.lab.topology import LABS, topology
from tests.lab.chaos import Lab, ok, run

LAB = "ovdisk"
SECTOR, RING, FIRST = 512, 64, 1024
"""As in overland/lab/guest_files/journal.c."""

DATA = 48 << 20
"""What is in the disk before anybody writes to it, in bytes."""

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        lab = Lab(LAB)
        try:
            lab.up()
            create("db", "h1", "data.raw,size=256MiB,kind=moved")
            guest("db", "dd if=/dev/urandom of=/dev/vda bs=1M count=48 seek=32 conv=fsync")
            yield lab
        finally:
            lab.down()


def create(vm: str, host: str, *disks: str) -> dict[str, Any]:
    words = [word for disk in disks for word in ("--disk", disk)]
    made = ok("vm", "create", vm, "--host", host, "--network", "blue", *words, "-o", "json")
    guest(vm, "true")  # it has booted
    return dict(made)


def guest(vm: str, command: str) -> str:
    return str(ok("lab", "guest", vm, "--name", LAB, "--", command))


def disks(host: str) -> Path:
    return LABS / LAB / "run" / host / "disks"


def place(vm: str) -> str:
    return str(ok("vm", "show", vm, "-o", "json")["host"])


def elsewhere(vm: str) -> str:
    return "h2" if place(vm) != "h2" else "h3"


class Writer:
    """The guest's writer of numbered records."""

    def __init__(self, vm: str) -> None:
        self.vm = vm
        start = "(journal /dev/vda 200 /tmp/told </dev/null >/tmp/said 2>&1 &)"
        guest(vm, f"killall journal 2>/dev/null; {start}")

    def acknowledged(self) -> int:
        return int(guest(self.vm, "od -A n -t d8 /tmp/told") or 0)

    def goes_on(self) -> None:
        before = self.acknowledged()
        wait_for(lambda: self.acknowledged() > before)

    def stopped_at(self) -> int:
        guest(self.vm, "killall journal; sleep 0.1")
        assert guest(self.vm, "cat /tmp/said") == ""
        return self.acknowledged()


def lost_nothing(image: Path, acknowledged: int) -> None:
    """Each acknowledged record is where it was written, and none came back over a later one."""
    data = image.read_bytes()

    def record(sector: int) -> int:
        numbers = set(struct.unpack_from(f"{SECTOR // 8}Q", data, sector * SECTOR))
        assert len(numbers) == 1, f"sector {sector} is torn"
        return int(numbers.pop())

    assert acknowledged > RING
    for number in range(1, acknowledged + 1):
        assert record(FIRST + number) == number
    for number in range(acknowledged - RING + 2, acknowledged + 1):
        assert record(number % RING) == number
    assert record((acknowledged + 1) % RING) in (acknowledged + 1, acknowledged + 1 - RING)


def wait_for(true: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.mark.req("R-53")
@pytest.mark.req("R-56")
def test_a_disk_goes_along_under_a_writer_that_waits_for_each_write(lab: Lab) -> None:
    """No acknowledged write is lost, none comes twice, and both images are equal at equality."""
    writer = Writer("db")
    old, new = place("db"), elsewhere("db")
    writer.goes_on()
    receipt = ok("vm", "migrate", "db", "--to", new, "--verify", "-o", "json")
    assert receipt["outcome"] == "moved"
    assert len(receipt["storage"]["digests"][0]) == 64
    assert receipt["storage"]["sent_bytes"] >= 256 << 20
    writer.goes_on()
    image = disks(new) / "data.raw"
    lost_nothing(image, writer.stopped_at())
    assert image.stat().st_blocks * 512 < 64 << 20, "holes are not filled"
    assert not (disks(old) / "data.raw").exists()
    assert list(disks(old).iterdir()) == []


@pytest.mark.req("R-53")
@pytest.mark.req("R-56")
def test_a_disk_goes_along_cold_with_a_vm_that_was_writing(lab: Lab) -> None:
    """The writer is stopped in the middle of a write or between two, and goes on from there."""
    writer = Writer("db")
    old, new = place("db"), elsewhere("db")
    writer.goes_on()
    receipt = ok("vm", "migrate", "db", "--to", new, "--cold", "-o", "json")
    assert (receipt["mode"], receipt["outcome"]) == ("cold", "moved")
    writer.goes_on()
    image = disks(new) / "data.raw"
    lost_nothing(image, writer.stopped_at())
    assert image.stat().st_blocks * 512 < 64 << 20, "holes are not filled"
    assert list(disks(old).iterdir()) == []


def mirroring(new: str) -> str:
    """Begin a slow move of `db` to `new`; its id, once a part of the disk has gone."""
    move = ok("vm", "migrate", "db", "--to", new, "--bandwidth", "8MiB", "--no-wait").strip()

    def begun() -> bool:
        receipt = ok("migration", "show", move, "-o", "json")
        assert receipt["outcome"] == "open", receipt["reason"]
        return bool(receipt["storage"]["sent_bytes"])

    wait_for(begun)
    return str(move)


def came_home(move: str, old: str, new: str) -> None:
    receipt = wait_ended(move)
    assert receipt["outcome"] == "aborted", receipt
    assert place("db") == old
    nothing_left(new)


def nothing_left(host: str) -> None:
    """Of the image of VM db, whole or in part, or of a state; other VMs may have images there."""
    wait_for(lambda: list(disks(host).glob("*data.raw*")) == [])
    run_dir = LABS / LAB / "run" / host
    assert not [*run_dir.glob("images/*"), *run_dir.glob("taken/*"), *run_dir.glob("suspended/*")]


def wait_ended(move: str) -> dict[str, Any]:
    wait_for(
        lambda: ok("migration", "show", move, "-o", "json")["outcome"] not in ("open", "unknown")
    )
    return dict(ok("migration", "show", move, "-o", "json"))


def cut(lab: Lab, old: str, new: str) -> None:
    lab.cut(new, 6.0)


def kill_new(lab: Lab, old: str, new: str) -> None:
    pid = int((LABS / LAB / "run" / new / "db" / "pid").read_text())
    os.kill(pid, signal.SIGKILL)


def restart_old(lab: Lab, old: str, new: str) -> None:
    labs.restart(topology(LAB, 3), old)


def restart_new(lab: Lab, old: str, new: str) -> None:
    """It goes on: QEMU serves the images, not the daemon. So the operator aborts."""
    labs.restart(topology(LAB, 3), new)
    run("migration", "abort", ok("vm", "show", "db", "-o", "json")["move"])


def wide(fault: Any) -> Any:
    """A fault that is tried by `scripts/test -m wide` only."""
    return pytest.param(fault, marks=pytest.mark.wide)


@pytest.mark.req("R-14")
@pytest.mark.req("R-53")
@pytest.mark.parametrize("fault", [cut, kill_new, *map(wide, (restart_old, restart_new))])
def test_a_fault_while_a_disk_is_copied_leaves_the_vm_writing_where_it_was(
    lab: Lab, fault: Callable[[Lab, str, str], None]
) -> None:
    old, new = place("db"), elsewhere("db")
    writer = Writer("db")
    move = mirroring(new)
    fault(lab, old, new)
    came_home(move, old, new)
    writer.goes_on()
    lost_nothing(disks(old) / "data.raw", writer.stopped_at())
    lab.until_ready()


@contextlib.contextmanager
def carrying(old: str, new: str) -> Iterator[str]:
    """A cold move of `db`, slow until the end of the block, a part of whose disk has gone."""
    qdisc = ["tc", "-n", f"ovl-{LAB}-{old}", "qdisc"]
    limit = ["rate", "128mbit", "burst", "256kb", "latency", "50ms"]
    subprocess.run([*qdisc, "add", "dev", "underlay", "root", "tbf", *limit], check=True)
    try:
        move = ok("vm", "migrate", "db", "--to", new, "--cold", "--no-wait").strip()
        wait_for(lambda: [*disks(new).glob(".data.raw.part")])
        yield str(move)
    finally:
        subprocess.run([*qdisc, "del", "dev", "underlay", "root"], check=True)


def abort(lab: Lab, old: str, new: str) -> None:
    run("migration", "abort", ok("vm", "show", "db", "-o", "json")["move"])


def just_restart_new(lab: Lab, old: str, new: str) -> None:
    labs.restart(topology(LAB, 3), new)


@pytest.mark.req("R-14")
@pytest.mark.req("R-53")
@pytest.mark.parametrize("fault", [cut, *map(wide, (abort, restart_old)), just_restart_new])
def test_a_fault_while_a_disk_is_carried_leaves_one_whole_disk(
    lab: Lab, fault: Callable[[Lab, str, str], None]
) -> None:
    """When link or NVE are back the disk is carried on, or the move turns back; never a half."""
    old, new = place("db"), elsewhere("db")
    writer = Writer("db")
    writer.goes_on()
    with carrying(old, new) as move:
        fault(lab, old, new)
    receipt = wait_ended(move)
    assert receipt["outcome"] in ("moved", "aborted")
    assert receipt["outcome"] == "aborted" or fault is not abort
    here = new if receipt["outcome"] == "moved" else old
    assert place("db") == here
    nothing_left(old if here == new else new)
    writer.goes_on()
    lost_nothing(disks(here) / "data.raw", writer.stopped_at())
    lab.until_ready()


@pytest.fixture
def small(lab: Lab) -> Iterator[str]:
    """A host whose disk folder has room for 96 MiB."""
    new = elsewhere("db")
    folder = disks(new)
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96M", "tmpfs", folder], check=True)
    yield new
    subprocess.run(["umount", "-l", folder], check=True)


def fill(host: str, leave_bytes: int = 1 << 20) -> None:
    """Take the room that is left beside the disks of `host`, but for so much."""
    free = os.statvfs(disks(host))
    with (disks(host) / "ballast").open("wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, free.f_bavail * free.f_frsize - leave_bytes)


def came_home_from_a_full_host(move: str, full: str) -> None:
    receipt = wait_ended(move)
    assert receipt["outcome"] == "aborted"
    assert "No space left" in receipt["reason"]
    assert "\n" not in receipt["reason"]
    wait_for(lambda: [path.name for path in disks(full).iterdir()] == ["ballast"])


@pytest.mark.req("R-55")
@pytest.mark.parametrize("part", [wide(0.1), 0.9])
def test_a_host_that_fills_up_while_a_disk_is_copied_takes_nothing(
    lab: Lab, small: str, part: float
) -> None:
    old = place("db")
    writer = Writer("db")
    move = mirroring(small)
    copied = (disks(small) / "data.raw").stat().st_blocks * 512
    fill(small, max(1 << 20, int(part * DATA) - copied))
    came_home_from_a_full_host(move, small)
    writer.goes_on()
    lost_nothing(disks(old) / "data.raw", writer.stopped_at())


@pytest.mark.req("R-55")
def test_a_host_that_fills_up_while_a_disk_is_carried_takes_nothing(lab: Lab, small: str) -> None:
    old = place("db")
    writer = Writer("db")
    writer.goes_on()
    with carrying(old, small) as move:
        fill(small)
    came_home_from_a_full_host(move, small)
    writer.goes_on()
    lost_nothing(disks(old) / "data.raw", writer.stopped_at())


def refused(*arguments: str) -> str:
    done = run(*arguments)
    assert done.returncode == 3, done.stderr or done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.req("R-55")
def test_what_stands_in_a_disks_way_is_said_before_anything_moves(lab: Lab, small: str) -> None:
    move = ("vm", "migrate", "db", "--to", small)
    with (disks(small) / "ballast").open("wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, 80 << 20)
    assert "(code no_space)" in refused(*move)
    assert "(code no_space)" in refused(*move, "--dry-run")
    (disks(small) / "ballast").rename(disks(small) / "data.raw")
    assert "(code file_in_the_way)" in refused(*move)
    assert (disks(small) / "data.raw").stat().st_size == 80 << 20
    assert "(code disk_differs)" in refused(*move, "--shared-storage")
    (disks(small) / "data.raw").unlink()
    assert "(code file_missing)" in refused(*move, "--shared-storage")


@pytest.mark.req("R-55")
def test_a_disk_that_a_vm_cannot_have_is_refused(lab: Lab, tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    image = ["qemu-img", "create", "-q", "-f", "qcow2"]
    subprocess.run([*image, base, "64M"], check=True)
    subprocess.run([*image, "-b", base, "-F", "qcow2", top], check=True)
    make = ("vm", "create", "x", "--host", "h1", "--network", "blue", "--disk")
    assert "(code file_missing)" in refused(*make, "nowhere.raw")
    assert "(code disk_format)" in refused(*make, f"{base},format=raw")
    assert "(code disk_chain)" in refused(*make, f"{top},kind=moved")
    create("chained", "h2", str(top))
    along = ("vm", "migrate", "chained", "--to", "h3", "--with-storage")
    assert "(code disk_chain)" in refused(*along)
    ok("vm", "delete", "chained")
    create("holder", "h2", str(base))
    assert "(code disk_in_use)" in refused(*make, str(base))
    receipt = ok("vm", "migrate", "holder", "--to", "h3", "-o", "json")
    assert receipt["outcome"] == "moved", "a shared disk is the same file there"
    assert "(code file_in_the_way)" in refused(
        "vm", "migrate", "holder", "--to", "h1", "--with-storage"
    )
    ok("vm", "delete", "holder")
    assert run(*make, str(base)).returncode == 0
    ok("vm", "delete", "x")


@pytest.mark.req("R-34")
@pytest.mark.req("R-56")
@pytest.mark.parametrize("rest", ["stop", "suspend"])
def test_a_disk_goes_along_with_a_vm_at_rest(lab: Lab, rest: str) -> None:
    create("cold", "h1", "cold.raw,size=64MiB,kind=moved")
    guest("cold", "dd if=/dev/urandom of=/dev/vda bs=1M count=4 seek=5 conv=fsync")
    before = guest("cold", "sha256sum /dev/vda")
    ok("vm", rest, "cold")
    receipt = ok("vm", "migrate", "cold", "--to", "h2", "--cold", "-o", "json")
    assert receipt["outcome"] == "moved"
    assert receipt["storage"]["sent_bytes"] == 64 << 20
    assert (disks("h2") / "cold.raw").stat().st_blocks * 512 < 8 << 20, "holes are not filled"
    assert not (disks("h1") / "cold.raw").exists()
    ok("vm", "start" if rest == "stop" else "resume", "cold")
    assert guest("cold", "echo 3 > /proc/sys/vm/drop_caches; sha256sum /dev/vda") == before
    ok("vm", "delete", "cold")
    (disks("h2") / "cold.raw").unlink()


@pytest.mark.req("R-56")
def test_a_qcow2_image_goes_along_as_one(lab: Lab) -> None:
    create("cow", "h1", "cow.qcow2,size=128MiB,kind=moved")
    guest("cow", "dd if=/dev/urandom of=/dev/vda bs=1M count=8 seek=5 conv=fsync")
    before = guest("cow", "sha256sum /dev/vda")
    receipt = ok("vm", "migrate", "cow", "--to", "h2", "--verify", "-o", "json")
    assert receipt["outcome"] == "moved"
    assert guest("cow", "echo 3 > /proc/sys/vm/drop_caches; sha256sum /dev/vda") == before
    assert (disks("h2") / "cow.qcow2").stat().st_blocks * 512 < 16 << 20
    ok("vm", "delete", "cow")


# ---------------------------------------------------------------- disks that stay behind


def image_at() -> str:
    """The host with the image of `db`, as the record says."""
    return str(ok("vm", "show", "db", "-o", "json")["disks"][0]["at"])


def exports(host: str) -> list[dict[str, Any]]:
    return list(ok("host", "show", host, "-o", "json")["exports"])


def part_of(vm: str) -> str:
    """A digest of a part of the disk, read from where it is now."""
    read = "dd if=/dev/vda bs=1M skip=32 count=4 2>/dev/null"
    return guest(vm, f"echo 3 > /proc/sys/vm/drop_caches; {read} | sha256sum")


def leave(to: str, *options: str) -> dict[str, Any]:
    receipt = ok("vm", "migrate", "db", "--to", to, "--leave-storage", *options, "-o", "json")
    assert receipt["outcome"] == "moved"
    return dict(receipt)


def exporter(host: str) -> int:
    return int((LABS / LAB / "run" / host / ".exporter" / "pid").read_text())


@pytest.mark.req("R-53")
def test_a_vm_is_stitched_back_to_a_disk_that_stays_wherever_it_goes(lab: Lab) -> None:
    """Away, on to a third host, and home again; no acknowledged write is lost or comes twice."""
    writer = Writer("db")
    first, second, third = place("db"), *sorted({"h1", "h2", "h3"} - {place("db")})
    receipt = leave(second)
    assert receipt["storage"]["left"] == [{"disk": "data.raw", "at": first}]
    assert receipt["storage"]["sent_bytes"] == 0
    writer.goes_on()
    assert (place("db"), image_at()) == (second, first)
    version = ok("vm", "show", "db", "-o", "json")["version"]
    offered = {"vm": "db", "disk": "data.raw", "to": second, "version": version}
    assert exports(first) == [offered]
    assert not (disks(second) / "data.raw").exists()
    assert "(code exports_disk)" in refused("host", "drain", first)
    assert "(code disk_elsewhere)" in refused(
        "vm", "migrate", "db", "--to", third, "--with-storage"
    )
    ok("vm", "migrate", "db", "--to", third, "-o", "json")
    writer.goes_on()
    assert (place("db"), image_at()) == (third, first)
    assert [each["to"] for each in exports(first)] == [third]
    ok("vm", "migrate", "db", "--to", first, "-o", "json")
    writer.goes_on()
    assert (place("db"), image_at(), exports(first)) == (first, first, [])
    lost_nothing(disks(first) / "data.raw", writer.stopped_at())


@pytest.mark.req("R-53")
def test_a_disk_stays_behind_in_a_cold_move_and_when_the_vm_is_off(lab: Lab) -> None:
    before = part_of("db")
    writer = Writer("db")
    first, second, third = place("db"), *sorted({"h1", "h2", "h3"} - {place("db")})
    leave(second, "--cold")
    writer.goes_on()
    lost_nothing(disks(first) / "data.raw", writer.stopped_at())
    ok("vm", "suspend", "db")
    ok("vm", "migrate", "db", "--to", third, "--cold")
    ok("vm", "resume", "db")
    assert part_of("db") == before
    ok("vm", "stop", "db")
    ok("vm", "start", "db")
    assert part_of("db") == before
    ok("vm", "stop", "db")
    ok("vm", "migrate", "db", "--to", first, "--cold")
    assert (image_at(), exports(first)) == (first, [])
    ok("vm", "start", "db")
    assert part_of("db") == before


@pytest.mark.req("R-53")
def test_a_vm_waits_for_a_disk_that_is_away_for_a_while(lab: Lab) -> None:
    """The exporter is killed, with and without the NVE beside it; the link is cut."""
    writer = Writer("db")
    first = place("db")
    leave(elsewhere("db"))
    for fault in ("exporter", "both", "link"):
        killed = exporter(first)
        if fault in ("exporter", "both"):
            os.kill(killed, signal.SIGKILL)
        if fault == "both":
            labs.restart(topology(LAB, 3), first)
        if fault == "link":
            lab.cut(first, 4.0)
        writer.goes_on()
        assert (exporter(first) == killed) == (fault == "link")
        lab.until_ready()
    ok("vm", "migrate", "db", "--to", first)
    writer.goes_on()
    lost_nothing(disks(first) / "data.raw", writer.stopped_at())


@pytest.mark.req("R-14")
@pytest.mark.req("R-53")
@pytest.mark.parametrize("who", [*map(wide, ("nva", "exporter", "old", "new"))])
def test_a_fault_while_a_vm_leaves_its_disk_ends_with_one_writer(lab: Lab, who: str) -> None:
    writer = Writer("db")
    first, second = place("db"), elsewhere("db")
    leave(second)
    third = next(iter({"h1", "h2", "h3"} - {first, second}))
    move = ok("vm", "migrate", "db", "--to", third, "--bandwidth", "64MiB", "--no-wait").strip()
    wait_for(lambda: ok("migration", "show", move, "-o", "json")["phase"] != "planned")
    host = {"old": second, "new": third, "exporter": first}.get(who, who)
    if who == "exporter":
        os.kill(exporter(first), signal.SIGKILL)
    labs.restart(topology(LAB, 3), host)
    lab.until_ready()
    receipt = wait_ended(move)
    here = third if receipt["outcome"] == "moved" else second
    assert (place("db"), image_at()) == (here, first)
    assert [each["to"] for each in exports(first)] == [here]
    writer.goes_on()
    ok("vm", "migrate", "db", "--to", first)
    writer.goes_on()
    lost_nothing(disks(first) / "data.raw", writer.stopped_at())


@pytest.mark.req("R-55")
def test_a_disk_that_the_new_host_could_not_reach_does_not_stay_behind(lab: Lab) -> None:
    """A zone whose border lets no storage through: said before anything moves."""
    old, new = place("db"), elsewhere("db")
    nft = ["ip", "netns", "exec", f"ovl-{LAB}-{old}", "nft"]
    chain = "add chain inet zone in { type filter hook input priority 0; }"
    rules = f"add table inet zone\n{chain}\nadd rule inet zone in tcp dport 10809 drop\n"
    subprocess.run([*nft, "-f", "-"], input=rules, text=True, check=True)
    try:
        move = ("vm", "migrate", "db", "--to", new, "--leave-storage")
        assert "(code storage_unreachable)" in refused(*move)
        assert "(code storage_unreachable)" in refused(*move, "--dry-run")
    finally:
        subprocess.run([*nft, "delete", "table", "inet", "zone"], check=True)
    assert (place("db"), image_at(), exports(old)) == (old, old, [])


@pytest.mark.req("R-53")
def test_what_is_declared_to_stay_stays_and_its_host_is_free_again_without_the_vm(lab: Lab) -> None:
    create("stay", "h1", "stay.qcow2,size=64MiB,kind=left")
    guest("stay", "dd if=/dev/urandom of=/dev/vda bs=1M count=4 seek=32 conv=fsync")
    before = part_of("stay")
    assert "(code leaves_disk)" in refused("host", "drain", "h1")
    ok("vm", "migrate", "stay", "--to", "h2")
    assert part_of("stay") == before
    assert [each["vm"] for each in exports("h1")] == ["stay"]
    ok("vm", "delete", "stay")
    assert exports("h1") == []
    image = disks("h1") / "stay.qcow2"
    check = ["qemu-img", "check", "-q", str(image)]
    wait_for(lambda: subprocess.run(check, capture_output=True, check=False).returncode == 0)
    image.unlink()


# ---------------------------------------------------------------- a disk that moves alone


def devices() -> set[str]:
    """Names of the network devices of all hosts."""
    found: set[str] = set()
    for host in ("h1", "h2", "h3"):
        shown = ["ip", "-n", f"ovl-{LAB}-{host}", "-o", "link"]
        out = subprocess.run(shown, capture_output=True, text=True, check=True).stdout
        found |= {line.split(": ")[1].split("@")[0] for line in out.splitlines()}
    return found


def bring(*options: str) -> Any:
    return ok("vm", "disk", "move", "db", "data.raw", "--to", place("db"), *options)


def being_copied(bandwidth: str) -> str:
    """Begin to bring the disk of `db` to it, slowly; the id, once a part is there."""
    move = str(bring("--bandwidth", bandwidth, "--no-wait")).strip()
    copy = disks(place("db")) / "data.raw"
    wait_for(lambda: copy.exists() and copy.stat().st_blocks * 512 > 1 << 20)
    assert ok("migration", "show", move, "-o", "json")["phase"] == "precopy"
    return move


@pytest.mark.req("R-54")
@pytest.mark.req("R-56")
def test_a_disk_moves_alone_under_a_writer_and_the_network_does_not_notice(lab: Lab) -> None:
    writer = Writer("db")
    first = place("db")
    leave(elsewhere("db"))
    here = place("db")
    before, version = devices(), ok("vm", "show", "db", "-o", "json")["version"]
    assert "(code unsupported_target)" in refused(
        "vm", "disk", "move", "db", "data.raw", "--to", first
    )
    move = being_copied("16MiB")
    assert devices() == before, "no tunnel, no queue"
    assert "(code move_in_progress)" in refused("vm", "migrate", "db", "--to", first)
    receipt = wait_ended(move)
    assert (receipt["outcome"], receipt["mode"]) == ("moved", "storage")
    assert receipt["storage"]["sent_bytes"] >= 256 << 20
    assert (receipt["version"], ok("vm", "show", "db", "-o", "json")["version"]) == (version,) * 2
    assert move in [each["id"] for each in ok("migration", "list", "-o", "json")]
    assert devices() == before
    writer.goes_on()
    assert (place("db"), image_at(), exports(first)) == (here, here, [])
    image = disks(here) / "data.raw"
    lost_nothing(image, writer.stopped_at())
    assert image.stat().st_blocks * 512 < 64 << 20, "holes are not filled"
    nothing_left(first)
    assert "(code disk_not_left)" in refused("vm", "disk", "move", "db", "data.raw", "--to", here)
    ok("vm", "migrate", "db", "--to", first, "--with-storage")


@pytest.mark.req("R-54")
@pytest.mark.parametrize(
    "who", ["qemu", *map(wide, ("nva", "nve", "exporter", "host with the image", "abort"))]
)
def test_a_fault_while_a_disk_moves_alone_leaves_one_image(lab: Lab, who: str) -> None:
    writer = Writer("db")
    first = place("db")
    leave(elsewhere("db"))
    here = place("db")
    told = writer.acknowledged()
    # A copy that goes on is to come to its end soon, one that is broken off is to be under way.
    move = being_copied("4MiB" if who in ("qemu", "abort") else "16MiB")
    match who:
        case "exporter":
            os.kill(exporter(first), signal.SIGKILL)
        case "abort":
            run("migration", "abort", move)
        case "qemu":
            os.kill(int((LABS / LAB / "run" / here / "db" / "pid").read_text()), signal.SIGKILL)
        case _:
            daemons = {"nva": "nva", "nve": here, "host with the image": first}
            labs.restart(topology(LAB, 3), daemons[who])
    lab.until_ready()
    receipt = wait_ended(move)
    at = here if receipt["outcome"] == "moved" else first
    assert (place("db"), image_at()) == (here, at)
    nothing_left(first if at == here else here)
    assert receipt["outcome"] == "aborted" or who not in ("qemu", "abort")
    if who == "qemu":
        wait_for(lambda: ok("vm", "show", "db", "-o", "json")["state"] == "crashed")
        data = (disks(at) / "data.raw").read_bytes()
        for number in range(1, told + 1):
            assert data[(FIRST + number) * SECTOR] == number & 0xFF
        ok("vm", "start", "db")
        guest("db", "true")
    else:
        writer.goes_on()
        lost_nothing(disks(at) / "data.raw", writer.stopped_at())
    if at == first:
        ok("vm", "migrate", "db", "--to", first)
    else:
        ok("vm", "migrate", "db", "--to", first, "--with-storage")
