"""Settings of the daemons: a TOML file, checked whole before anything starts."""

from __future__ import annotations

import ipaddress
import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from overland.model.ila import parse_half


class ConfigFailure(Exception):
    """A configuration that cannot be used; one line that names the key."""


class Tls(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Paths of PEM files."""

    ca: str
    """The domain's authority, which must have signed the other end's certificate."""
    certificate: str
    """This daemon's certificate. Its common name is `nva`, or `nve:HOST`."""
    key: str
    """The private key of that certificate, without a passphrase."""


KeyAlgorithm = Literal["hmac-sha256", "hmac-sha384", "hmac-sha512"]


class Dns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the name of a VM is updated after a move that has changed its addresses (RFC 2136,
    signed as RFC 8945 has it). A convenience: no move waits for it, or fails with it.
    """

    server: str
    """IP address of the zone's primary name server; `ADDRESS:PORT` or `[ADDRESS]:PORT` when it does
    not listen on port 53."""
    zone: str
    """The zone. The name of VM `web` is `web.` and this."""
    key_name: str
    """Name of the key (TSIG) that the name server knows for these updates."""
    key_file: str
    """Path of a file with that key's secret in base64 and nothing else, for the NVA's eyes only."""
    key_algorithm: KeyAlgorithm = "hmac-sha256"
    """The key's algorithm: `hmac-sha256`, `hmac-sha384` or `hmac-sha512`."""
    ttl_s: int = 30
    """Seconds for which others may remember the new addresses. Keep old ones longer than that."""

    def __post_init__(self) -> None:
        try:
            ipaddress.ip_address(self.address)
            parsed = 0 < self.port < 65536
        except ValueError:
            parsed = False
        if not parsed:
            raise ValueError(f"`server`: {self.server!r} is no IP address, with or without a port")

    @property
    def address(self) -> str:
        """The server's IP address."""
        return self._parts()[0]

    @property
    def port(self) -> int:
        """The server's UDP port."""
        return int(self._parts()[1])

    def _parts(self) -> tuple[str, str]:
        if self.server.startswith("["):
            address, _, port = self.server[1:].partition("]")
            return address, port.removeprefix(":") or "53"
        if self.server.count(":") == 1:
            address, _, port = self.server.partition(":")
            return address, port
        return self.server, "53"


class NvaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The network virtualization authority (NVA) of a domain."""

    store: str
    """Path of the SQLite file with all records, whose folder must exist; or `etcd:` and the URLs
    of an etcd cluster's members, with commas between: `etcd:https://a:2379,https://b:2379`. Of the
    NVAs on one etcd cluster one is active, and another takes over when it falls silent."""
    store_tls: Tls | None = None
    """Who the NVA is to etcd, and whom it believes there. Use an authority of its own: who has a
    certificate of etcd's authority can write every record."""
    api_listen: str = "127.0.0.1:8080"
    """ADDRESS:PORT of the REST API. The API asks nobody who he is: keep it on loopback."""
    api_url: str | None = None
    """Under which URL operators reach this API: other NVAs send them there while this one is the
    active one. `http://` and `api_listen` when left out."""
    api_namespace: str | None = None
    """Path of the network namespace in which the API listens; the daemon's own when left out."""
    wire_address: str
    """Address on which the NVA waits for the NVEs."""
    wire_port: int = 6640
    """TCP port on which the NVA waits for the NVEs."""
    tls: Tls
    """Who the NVA is, and whom it believes."""
    owners_ca: str | None = None
    """PEM file of the authority that issues the certificates of VMs' owners, with common names
    `owner:NAME`. Use one of its own. Left out, no owner can register a VM."""
    lease_s: float = 3.0
    """Seconds for which an NVE counts as alive after its connection is lost."""
    dns: Dns | None = None
    """Where names of VMs are updated whose addresses a move has changed. Left out, nowhere."""

    def __post_init__(self) -> None:
        if not all(url.startswith(("http://", "https://")) for url in self.etcd or ()):
            raise ValueError("`store`: after `etcd:` come URLs, with commas between")

    @property
    def etcd(self) -> tuple[str, ...] | None:
        """The members of the etcd cluster that is the store, if it is one."""
        kind, _, urls = self.store.partition(":")
        return tuple(urls.split(",")) if kind == "etcd" else None


class NveConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The network virtualization edge (NVE) of one host."""

    host: str
    """The host's name. The certificate's common name must be `nve:` and this name."""
    nva: tuple[str | tuple[str, ...], ...]
    """Addresses of the NVAs, as `wss://ADDRESS:PORT/`, the preferred ones first. Those in an inner
    list are equal, and tried in random order: `[["wss://a/", "wss://b/"], "wss://c/"]`."""
    underlay_ipv4: str | None = None
    """IPv4 address of this host between hosts: the outer address of its tunnels. Give it,
    `underlay_ipv6` or both; the device that carries it must be up when the daemon starts."""
    underlay_ipv6: str | None = None
    """IPv6 address of this host between hosts, for networks with `--underlay ipv6`."""
    locator: str | None = None
    """A /64 of IPv6 addresses that the underlay routes to `underlay_ipv6` of this host, and nobody
    else uses: its locator in networks of kind `ila`. Left out, the host has no part in them."""
    run_dir: str
    """Folder for the VMs' sockets and logs and for the open moves. It must survive a restart of the
    daemon: the VMs that run are found by it."""
    disk_dir: str | None = None
    """Folder of this host's own disk images: a relative path in `--disk` lies in it. `disks` in
    `run_dir` when left out."""
    storage_port: int = 10809
    """TCP port at which this host offers, on its underlay address, the images that VMs have left
    behind here: others reach them by the NBD protocol, with TLS."""
    tls: Tls
    """Who this NVE is, and whom it believes."""
    namespace_prefix: str = "ovl"
    """How the names of the network namespaces of this NVE's routers begin; no other NVE on the same
    machine may have the same."""
    hold_frames: int = 20_000
    """Bound of every hold queue and of each tap's ring, in frames."""
    memory_mib: int = 0
    """Memory in MiB that VMs may use here; 0 is all that the host has."""
    qemu: str = "qemu-system-x86_64"
    """The QEMU program, as a name on the PATH or a path. Version 7.2 or later."""

    def __post_init__(self) -> None:
        if not (self.underlay_ipv4 or self.underlay_ipv6):
            raise ValueError("no underlay address: give `underlay_ipv4`, `underlay_ipv6` or both")
        if self.locator is not None:
            parse_half(self.locator, "locator")
            if self.underlay_ipv6 is None:
                raise ValueError("`locator` needs `underlay_ipv6`, which it is routed to")


def load(path: Path, kind: type[NvaConfig] | type[NveConfig]) -> NvaConfig | NveConfig:
    """Return the settings in `path`; ConfigFailure when they are not of this `kind`."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), kind)
    except OSError as error:
        raise ConfigFailure(f"{path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigFailure(f"{path}: {error}") from None
    except msgspec.ValidationError as error:
        raise ConfigFailure(f"{path}: {error}") from None
