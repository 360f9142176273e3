"""The command line of one etcd member (Debian's package etcd-server). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

CLIENT_PORT, PEER_PORT = 2379, 2380


def command(
    folder: Path,
    name: str,
    client: str,
    cluster: Mapping[str, str],
    pair: tuple[Path, Path, Path] | None = None,
) -> list[str]:
    """Run member `name` with its data in `folder`.

    `client` is the URL that stores ask, `cluster` every member's URL for the others. `pair`:
    authority, certificate and key (PEM files), for either; nobody without a certificate of that
    authority is answered.
    """
    words = [
        *("etcd", "--name", name, "--data-dir", str(folder)),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", cluster[name], "--initial-advertise-peer-urls", cluster[name]),
        *("--initial-cluster", ",".join(f"{each}={url}" for each, url in cluster.items())),
        # Without this every change would be kept for ever, until the disk is full.
        *("--auto-compaction-retention", "1h"),
        *("--logger", "zap", "--log-level", "error"),
    ]
    if pair is not None:
        ca, certificate, key = map(str, pair)
        for peer in ("", "peer-"):
            words += [f"--{peer}client-cert-auth", f"--{peer}trusted-ca-file", ca]
            words += [f"--{peer}cert-file", certificate, f"--{peer}key-file", key]
    return words
