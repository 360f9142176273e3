"""Settings of the daemons: a TOML file, checked whole before anything starts."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec


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


class NvaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The network virtualization authority (NVA) of a domain."""

    store: str
    """Path of the SQLite file with all records. Its folder must exist."""
    api_listen: str = "127.0.0.1:8080"
    """ADDRESS:PORT of the REST API. The API asks nobody who he is: keep it on loopback."""
    api_namespace: str | None = None
    """Path of the network namespace in which the API listens; the daemon's own when left out."""
    wire_address: str
    """Address on which the NVA waits for the NVEs."""
    wire_port: int = 6640
    """TCP port on which the NVA waits for the NVEs."""
    tls: Tls
    """Who the NVA is, and whom it believes."""
    lease_s: float = 3.0
    """Seconds for which an NVE counts as alive after its connection is lost."""


class NveConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The network virtualization edge (NVE) of one host."""

    host: str
    """The host's name. The certificate's common name must be `nve:` and this name."""
    nva: tuple[str, ...]
    """Addresses of the NVA, as `wss://ADDRESS:PORT/`. They are tried in turn."""
    underlay_ipv4: str | None = None
    """IPv4 address of this host between hosts: the outer address of its tunnels. Give it,
    `underlay_ipv6` or both; the device that carries it must be up when the daemon starts."""
    underlay_ipv6: str | None = None
    """IPv6 address of this host between hosts, for networks with `--underlay ipv6`."""
    run_dir: str
    """Folder for the VMs' sockets and logs and for the open moves. It must survive a restart of the
    daemon: the VMs that run are found by it."""
    disk_dir: str | None = None
    """Folder of this host's own disk images: a relative path in `--disk` lies in it. `disks` in
    `run_dir` when left out."""
    tls: Tls
    """Who this NVE is, and whom it believes."""
    hold_frames: int = 20_000
    """Bound of every hold queue and of each tap's ring, in frames."""
    memory_mib: int = 0
    """Memory in MiB that VMs may use here; 0 is all that the host has."""
    qemu: str = "qemu-system-x86_64"
    """The QEMU program, as a name on the PATH or a path. Version 7.2 or later."""

    def __post_init__(self) -> None:
        if not (self.underlay_ipv4 or self.underlay_ipv6):
            raise ValueError("no underlay address: give `underlay_ipv4`, `underlay_ipv6` or both")


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
