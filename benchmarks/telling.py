"""How long until a thousand NVEs have heard of one change in a VN that all of them are in.

The NVA is the real daemon (store, TLS, WebSocket); the NVEs are a thousand real connections, in
one process, that acknowledge at once: no kernel is changed. Time runs from the request for the
change to the last NVE's hearing of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import msgspec
import uvloop

from overland.model.cluster import Endpoint, Host, Interface, Network
from overland.nva.authority import Authority
from overland.store.sqlite import SqliteStore
from overland.wire import messages as w
from overland.wire import tls
from overland.wire.client import WireClient


class Crowd:
    """All NVEs: how many have heard of the newest change, and how many bytes that took."""

    def __init__(self, hosts: int) -> None:
        self.hosts = hosts
        self.waiting: set[str] = set()
        self.bytes = 0
        self.all_heard = asyncio.Event()
        self.welcome = 0

    def expect(self) -> None:
        self.waiting = {_host(n).name for n in range(self.hosts)}
        self.bytes = 0
        self.all_heard.clear()

    def heard(self, name: str, link: WireClient, message: w.FromNva) -> None:
        revision = getattr(message, "revision", None)
        if revision is None:
            return
        link.send(w.Ack(network="blue", revision=revision, versions=message.versions))  # type: ignore[union-attr]
        self.bytes += len(w.encode(message))
        self.waiting.discard(name)
        if not self.waiting:
            self.all_heard.set()


def _host(n: int) -> Host:
    address = f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}"
    return Host(name=f"n{n}", underlay_ipv4=address, underlay_mtu=9000, ready=True)


def _endpoint(n: int, host: str) -> Endpoint:
    mac = f"02:00:00:{n >> 16 & 255:02x}:{n >> 8 & 255:02x}:{n & 255:02x}"
    return Endpoint(
        name=f"p{n}", host=host, namespace=f"p{n}", interface=Interface(network="blue", mac=mac)
    )


async def _fill(store: Path, hosts: int) -> None:
    """One endpoint on each host, all in one VN, as an earlier NVA would have left it."""
    kept = SqliteStore(store)
    authority = Authority(kept, lambda _: None)
    await authority.load()
    await authority.create_network(Network(name="blue", vni=42))
    for n in range(hosts):
        host = _host(n)
        authority.host_seen(host)
        await authority.create_endpoint(_endpoint(n, host.name))
    await kept.close()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _post(api: int, n: int, host: str) -> None:
    wish = msgspec.json.encode(_endpoint(n, host))
    request = urllib.request.Request(
        f"http://127.0.0.1:{api}/v1/endpoints",
        data=wish,
        headers={"content-type": "application/json"},
    )
    urllib.request.urlopen(request).read()


async def measure(folder: Path, hosts: int, changes: int) -> dict[str, object]:
    tls.create_authority(folder)
    tls.issue(folder, "nva", "nva", ["127.0.0.1"])
    await _fill(folder / "store", hosts)
    wire, api = _free_port(), _free_port()
    (folder / "nva.toml").write_text(
        f'store = "{folder}/store"\napi_listen = "127.0.0.1:{api}"\n'
        f'wire_address = "127.0.0.1"\nwire_port = {wire}\n'
        f'[tls]\nca = "{folder}/ca.crt"\n'
        f'certificate = "{folder}/nva.crt"\nkey = "{folder}/nva.key"\n'
    )
    nva = await asyncio.create_subprocess_exec(
        *(str(Path(sys.executable).parent / "overland"), "nva", "run"),
        *("--config", str(folder / "nva.toml")),
    )
    crowd = Crowd(hosts)
    crowd.expect()
    links = [_connect(folder, crowd, n, wire) for n in range(hosts)]
    try:
        await crowd.all_heard.wait()
        await asyncio.sleep(3)  # until connections and acknowledgements have come to rest
        times = []
        for change in range(changes):
            crowd.expect()
            began_s = time.perf_counter()
            await asyncio.to_thread(_post, api, hosts + change, _host(change).name)
            await crowd.all_heard.wait()
            times.append(1000 * (time.perf_counter() - began_s))
            await asyncio.sleep(0.5)
    finally:
        for link in links:
            link.cancel()
        nva.terminate()
        await nva.wait()
    return {
        "nves": hosts,
        "changes": changes,
        "median_ms": round(statistics.median(times), 1),
        "worst_ms": round(max(times), 1),
        "bytes_per_nve": crowd.bytes // hosts,
    }


def _connect(folder: Path, crowd: Crowd, n: int, wire: int) -> asyncio.Task[None]:
    host = _host(n)
    tls.issue(folder, host.name, f"nve:{host.name}", [])
    paths = (folder / "ca.crt", folder / f"{host.name}.crt", folder / f"{host.name}.key")
    hello = w.Hello(protocol=w.PROTOCOL, host=host, known={}, vms={})
    link = WireClient(
        [f"wss://127.0.0.1:{wire}/"],
        tls.context(*paths, server=False),
        lambda: hello,
        lambda message: crowd.heard(host.name, link, message),
    )
    return asyncio.create_task(link.run())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nves", type=int, default=1000)
    parser.add_argument("--changes", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("out/bench-telling.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="telling-") as name:
        result = uvloop.run(measure(Path(name), options.nves, options.changes))
    print(
        f"{result['nves']} NVEs in one VN, {result['changes']} changes: all have heard after "
        f"{result['median_ms']} ms (median), {result['worst_ms']} ms (worst); "
        f"{result['bytes_per_nve']} bytes to each"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
