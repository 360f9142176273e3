"""Bring a lab up and take it down: namespaces, certificates, configs, and the real daemons.

Nothing outside the lab's own namespaces is touched, but for the API's port on loopback. Down needs
no memory: namespaces are known by name, processes by running inside them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from overland.lab import etcd
from overland.lab.topology import UNDERLAY_MTU, WIRE_PORT, LabHost, Topology, of_lab
from overland.wire import tls

READY_LIMIT_S = 60.0

NETNS = Path("/run/netns")


class LabFailure(Exception):
    """The lab cannot be; one line for a person."""


def ip(*lines: str, namespace: str | None = None) -> None:
    """Run each line as an `ip` command; LabFailure with the first that fails."""
    command = ["ip", *(("-n", namespace) if namespace else ()), "-batch", "-"]
    done = subprocess.run(
        command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LabFailure(f"ip: {done.stderr.strip().splitlines()[0]}")


def up(lab: Topology) -> dict[str, Any]:
    """Make the lab; returns its state when every host is ready. Nothing stays after a failure."""
    if os.geteuid() != 0:
        raise LabFailure("a lab makes network namespaces: run as root")
    if (NETNS / lab.underlay).exists():
        raise LabFailure(f"lab {lab.name} is up already: `overland lab down` first")
    try:
        shutil.rmtree(lab.folder, ignore_errors=True)
        lab.folder.mkdir(parents=True)
        _namespaces(lab)
        _locators(lab)
        _keep_home(lab)
        _certificates(lab)
        apis = _start(lab)
        nvas = [
            {"name": nva.name, "namespace": nva.namespace, "api": api}
            for nva, api in zip(lab.nvas, apis, strict=True)
        ]
        state: dict[str, Any] = {"name": lab.name, "api": apis[0], "nvas": nvas}
        (lab.folder / "state.json").write_text(json.dumps(state))
        names = {host.name for host in lab.hosts}
        _wait(lab, lambda: _away(apis, names, {}))
    except BaseException:
        down(lab.name, lab.folder, keep_logs=True)
        raise
    return state


def _namespaces(lab: Topology) -> None:
    ip(f"netns add {lab.underlay}")
    ip(
        "link add br0 type bridge stp_state 0 mcast_snooping 0",
        f"link set br0 mtu {UNDERLAY_MTU} up",
        "link set lo up",
        namespace=lab.underlay,
    )
    for index, host in enumerate((*lab.nvas, *lab.hosts)):
        ip(f"netns add {host.namespace}")
        ip(
            f"link add u{index} mtu {UNDERLAY_MTU} type veth peer name underlay "
            f"mtu {UNDERLAY_MTU} netns {host.namespace}",
            f"link set u{index} master br0 up",
            namespace=lab.underlay,
        )
        ip(
            "link set lo up",
            "link set underlay up",
            f"addr add {host.underlay_ipv4}/24 dev underlay",
            f"addr add {host.underlay_ipv6}/64 dev underlay nodad",
            namespace=host.namespace,
        )


def _locators(lab: Topology) -> None:
    """What a routing protocol would do in a real underlay: each locator leads to its host."""
    for host in lab.hosts:
        others = (each for each in lab.hosts if each != host)
        ip(
            *(f"route add {each.locator} via {each.underlay_ipv6}" for each in others),
            namespace=host.namespace,
        )


def _certificates(lab: Topology) -> None:
    folder = lab.folder / "certs"
    tls.create_authority(folder)
    for nva in lab.nvas:
        addresses = [nva.underlay_ipv4, nva.underlay_ipv6]
        tls.issue(folder, nva.name, "nva", addresses)
        if len(lab.nvas) > 1:
            # Another authority than the NVEs have: none of them may write a record.
            tls.create_authority(folder / "store")
            tls.issue(folder / "store", nva.name, "nva", addresses)
    # Owners have an authority of their own: none of them may speak to the daemons.
    tls.create_authority(folder / "owners")
    for host in lab.hosts:
        tls.issue(folder, host.name, f"nve:{host.name}", [host.underlay_ipv4, host.underlay_ipv6])


def owner(lab: Topology, name: str) -> dict[str, str]:
    """Issue a certificate to owner `name` of VMs; returns the paths of its files."""
    folder = lab.folder / "certs" / "owners"
    tls.issue(folder, name, f"owner:{name}", [])
    return {"owner": name, **{part: str(folder / f"{name}.{end}") for part, end in _PARTS}}


_PARTS = (("certificate", "crt"), ("key", "key"))


def _tls_section(folder: Path, name: str, section: str = "tls") -> str:
    ca, certificate, key = _pair(folder, name)
    return f'[{section}]\nca = "{ca}"\ncertificate = "{certificate}"\nkey = "{key}"\n'


def _pair(folder: Path, name: str) -> tuple[Path, Path, Path]:
    return folder / "ca.crt", folder / f"{name}.crt", folder / f"{name}.key"


def nve_config(lab: Topology, host: LabHost) -> Path:
    """Write and return the config file of one host's NVE."""
    path = lab.folder / f"{host.name}.toml"
    nvas = [f"wss://{nva.underlay_ipv4}:{WIRE_PORT}/" for nva in lab.nvas]
    path.write_text(
        f'host = "{host.name}"\n'
        f"nva = {json.dumps([nvas])}\n"
        f'underlay_ipv4 = "{host.underlay_ipv4}"\nunderlay_ipv6 = "{host.underlay_ipv6}"\n'
        f'locator = "{host.locator}"\n'
        f'run_dir = "{lab.folder}/run/{host.name}"\n'
        f'namespace_prefix = "{host.namespace}"\n'
        f'disk_dir = "{lab.folder}/run/{host.name}/disks"\n'
        f"memory_mib = 8192\n{_tls_section(lab.folder / 'certs', host.name)}"
    )
    return path


def _start(lab: Topology) -> list[str]:
    """Start everything; returns the URLs of the NVAs' APIs."""
    ports = _free_ports(len(lab.nvas))
    if len(lab.nvas) > 1:
        for nva in lab.nvas:
            _etcd(lab, nva)
    for nva, port in zip(lab.nvas, ports, strict=True):
        _nva_config(lab, nva, port)
        daemon(lab, nva)
    for host in lab.hosts:
        nve_config(lab, host)
        daemon(lab, host)
    return [f"http://127.0.0.1:{port}" for port in ports]


def _nva_config(lab: Topology, nva: LabHost, port: int) -> None:
    certs = lab.folder / "certs"
    store, trust = f"{lab.folder}/nva.db", ""
    if len(lab.nvas) > 1:
        members = (f"https://{each.underlay_ipv4}:{etcd.CLIENT_PORT}" for each in lab.nvas)
        store = f"etcd:{','.join(members)}"
        trust = _tls_section(certs / "store", nva.name, "store_tls")
    # The API is for people: it listens where they are, on loopback, not inside the lab.
    (lab.folder / f"{nva.name}.toml").write_text(
        f'store = "{store}"\napi_listen = "127.0.0.1:{port}"\n'
        f'api_namespace = "{home(lab.name)}"\n'
        f'wire_address = "{nva.underlay_ipv4}"\nwire_port = {WIRE_PORT}\n'
        f'owners_ca = "{certs}/owners/ca.crt"\n'
        f"{_tls_section(certs, nva.name)}{trust}"
    )


def _etcd(lab: Topology, nva: LabHost) -> None:
    """Start the member of the store that is on the NVA's host."""
    command = etcd.command(
        lab.folder / "etcd" / nva.name,
        nva.name,
        f"https://{nva.underlay_ipv4}:{etcd.CLIENT_PORT}",
        {each.name: f"https://{each.underlay_ipv4}:{etcd.PEER_PORT}" for each in lab.nvas},
        _pair(lab.folder / "certs" / "store", nva.name),
    )
    if shutil.which(command[0]) is None:
        raise LabFailure("etcd is missing: install etcd-server, or use --nvas 1")
    _spawn(lab, nva, command, f"etcd-{nva.name}")


def _keep_home(lab: Topology) -> None:
    """Give our own network namespace a name, for the NVA to find its way back into it."""
    handle = home(lab.name)
    handle.parent.mkdir(exist_ok=True)
    handle.touch()
    _mount("mount", "--bind", "/proc/self/ns/net", str(handle))


def _forget_home(name: str) -> None:
    handle = home(name)
    if handle.exists():
        if handle.is_mount() or os.stat(handle).st_ino == os.stat("/proc/self/ns/net").st_ino:
            _mount("umount", str(handle))
        handle.unlink()


def home(name: str) -> Path:
    """Not among the lab's namespaces: what runs in this one is not ours to end."""
    return Path("/run/overland") / f"home-{name}"


def _mount(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabFailure(done.stderr.strip())


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        trials = [stack.enter_context(socket.socket()) for _ in range(count)]
        for trial in trials:
            trial.bind(("127.0.0.1", 0))
        return [int(trial.getsockname()[1]) for trial in trials]


def daemon(lab: Topology, host: LabHost) -> int:
    """Start one daemon inside its namespace, in a session of its own; returns its pid."""
    role = "nva" if host in lab.nvas else "nve"
    config = lab.folder / f"{host.name}.toml"
    command = [sys.executable, "-m", "overland", role, "run", "--config", str(config)]
    return _spawn(lab, host, command, host.name)


def _spawn(lab: Topology, host: LabHost, command: list[str], called: str) -> int:
    """Run `command` on `host`, with a log and a pid file of the name `called`."""
    inside = ["nsenter", f"--net={NETNS / host.namespace}", *command]
    log = str(lab.folder / f"{called}.log")
    to_log = (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    pid = os.posix_spawnp(
        inside[0],
        inside,
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            to_log,
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    (lab.folder / f"{called}.pid").write_text(str(pid))
    return pid


def size(folder: Path) -> tuple[int, int]:
    """How many hosts and NVAs the lab in `folder` has; told by its files: an NVA may be away."""
    return len(list(folder.glob("h*.toml"))), len(list(folder.glob("nva*.toml")))


def restart(lab: Topology, name: str) -> int:
    """End one daemon (SIGKILL) and start it anew; returns its pid at once (see `wait_back`).

    VMs and traffic are left alone.
    """
    host = next((each for each in (*lab.nvas, *lab.hosts) if each.name == name), None)
    if host is None or not (NETNS / host.namespace).exists():
        raise LabFailure(f"there is no daemon {name}")
    pid = _pid(lab, host)
    if pid in _inside([host.namespace]):
        os.kill(pid, signal.SIGKILL)
        _until_gone_pid(pid, host.namespace)
    return daemon(lab, host)


def _pid(lab: Topology, host: LabHost) -> int:
    return int((lab.folder / f"{host.name}.pid").read_text())


def _until_gone_pid(pid: int, namespace: str) -> None:
    while pid in _inside([namespace]):
        time.sleep(0.005)


def get(url: str) -> Any:
    """GET JSON."""
    with urllib.request.urlopen(url, timeout=5) as answer:
        return json.load(answer)


def leads(api: str) -> bool:
    """Whether the NVA with this API answers and is the active one."""
    with contextlib.suppress(OSError, ValueError):
        return bool(get(f"{api}/healthz")["status"] == "ok")
    return False


def connections(apis: Sequence[str]) -> dict[str, int] | None:
    """Since when each NVE is connected to the active NVA (CLOCK_REALTIME ns, 0: it is not).

    None when no NVA of `apis` is active.
    """
    for api in apis:
        with contextlib.suppress(OSError, ValueError):
            return {host["name"]: host["connected_ns"] for host in get(f"{api}/v1/hosts")}
    return None


def wait_back(
    lab: Topology, name: str, apis: Sequence[str], pid: int, before: dict[str, int]
) -> None:
    """Return when daemon `name`, restarted as `pid`, does its work again; else LabFailure.

    An NVE is back when it is connected anew, which `before` (`connections` before the restart)
    tells; an NVA when it answers, and every NVE that runs is connected to the active one.
    """
    own = {nva.name: api for nva, api in zip(lab.nvas, apis, strict=True)}.get(name)
    if own is not None:
        needed = {host.name for host in lab.hosts if _pid(lab, host) in _inside([host.namespace])}
        before = {}
    else:
        needed = {name}

    def missing() -> set[str]:
        if not _lives(pid):
            raise LabFailure(f"{name} ended again; its log is {lab.folder}/{name}.log")
        if own is not None and not _answers(own):
            return {name}
        return _away(apis, needed, before)

    _wait(lab, missing)


def _answers(api: str) -> bool:
    try:
        get(f"{api}/healthz")
    except (OSError, ValueError):
        return False
    return True


def _wait(lab: Topology, missing: Callable[[], set[str]]) -> None:
    """Return when nobody is `missing` any more; LabFailure names who still is after the limit."""
    deadline_s = time.monotonic() + READY_LIMIT_S
    while left := missing():
        if time.monotonic() > deadline_s:
            raise LabFailure(f"{', '.join(sorted(left))} did not get ready; logs in {lab.folder}")
        time.sleep(0.05)


def _away(apis: Sequence[str], names: set[str], before: dict[str, int]) -> set[str]:
    """Which of the hosts `names` are not connected anew; the NVA itself if it is silent."""
    since = connections(apis)
    if since is None:
        return {"nva"}
    return {name for name in names if since.get(name, 0) in (0, before.get(name, 0))}


def namespaces(name: str) -> list[str]:
    """The network namespaces of lab `name`."""
    return of_lab(name, [each.name for each in NETNS.iterdir()]) if NETNS.exists() else []


def down(name: str, folder: Path, *, keep_logs: bool = False) -> list[str]:
    """Remove everything of lab `name`, whether it runs or crashed; returns what was there."""
    found = namespaces(name)
    for pid in _inside(found):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _until_gone(found)
    for namespace in found:
        ip(f"netns del {namespace}")
    _forget_home(name)
    if not keep_logs:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _until_gone(found: list[str]) -> None:
    deadline_s = time.monotonic() + 5
    while _inside(found) and time.monotonic() < deadline_s:
        time.sleep(0.01)


def _inside(found: list[str]) -> list[int]:
    """Processes whose network namespace is one of ours: nobody else's can be in there."""
    wanted = {os.stat(NETNS / name).st_ino for name in found}
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.stat(entry / "ns/net").st_ino in wanted and _lives(int(entry.name)):
                pids.append(int(entry.name))
    return pids


def _lives(pid: int) -> bool:
    """Whether there is such a process and it has not ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False
