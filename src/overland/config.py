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
    certificate: str
    key: str


class NvaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`api_listen` is ADDRESS:PORT, in the network namespace `api_namespace` (a path) if given.

    `lease_s`: how long an NVE counts as alive after its connection is lost.
    """

    store: str
    api_listen: str = "127.0.0.1:8080"
    api_namespace: str | None = None
    wire_address: str
    wire_port: int = 6640
    tls: Tls
    lease_s: float = 3.0


class NveConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`nva` lists wss:// addresses. `hold_frames` bounds every hold queue and tap ring."""

    host: str
    nva: tuple[str, ...]
    underlay_ipv4: str | None = None
    underlay_ipv6: str | None = None
    run_dir: str
    tls: Tls
    hold_frames: int = 20_000
    memory_mib: int = 0
    qemu: str = "qemu-system-x86_64"


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
