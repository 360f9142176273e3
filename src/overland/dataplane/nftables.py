"""The mute of ports: one nftables table of ours, changed by atomic transactions.

A port that is associated but not activated may not be heard: its frames are dropped where they
enter the bridge. libnftables' JSON interface (libnftables-json(5)) takes a list of commands and
performs all or none.
"""

from __future__ import annotations

import ctypes
import json
from typing import Any

from overland.ports import KernelFailure

FAMILY, TABLE, SET = "bridge", "overland", "muted"
_OUTPUT_JSON = 1 << 4
_ID = {"family": FAMILY, "table": TABLE}

_FRAME: list[dict[str, Any]] = [
    {"add": {"table": {"family": FAMILY, "name": TABLE, "comment": "overland"}}},
    {"add": {"set": {**_ID, "name": SET, "type": "ifname"}}},
    {
        "add": {
            "chain": {
                **_ID,
                "name": "ingress",
                "type": "filter",
                "hook": "prerouting",
                "prio": -400,
                "policy": "accept",
            }
        }
    },
    {"flush": {"chain": {**_ID, "name": "ingress"}}},
    {
        "add": {
            "rule": {
                **_ID,
                "chain": "ingress",
                "expr": [
                    {
                        "match": {
                            "op": "==",
                            "left": {"meta": {"key": "iifname"}},
                            "right": f"@{SET}",
                        }
                    },
                    {"counter": None},
                    {"drop": None},
                ],
            }
        }
    },
]


class Nftables:
    """One libnftables context in this process's network namespace."""

    def __init__(self) -> None:
        try:
            self._lib = ctypes.CDLL("libnftables.so.1")
        except OSError:
            raise KernelFailure("libnftables.so.1 is missing: install nftables") from None
        self._lib.nft_ctx_new.restype = ctypes.c_void_p
        self._lib.nft_ctx_get_output_buffer.restype = ctypes.c_char_p
        self._lib.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        self._context = ctypes.c_void_p(self._lib.nft_ctx_new(0))
        self._lib.nft_ctx_output_set_flags(self._context, _OUTPUT_JSON)
        self._lib.nft_ctx_buffer_output(self._context)
        self._lib.nft_ctx_buffer_error(self._context)

    def _run(self, commands: list[dict[str, Any]]) -> dict[str, Any]:
        text = json.dumps({"nftables": commands}).encode()
        if self._lib.nft_run_cmd_from_buffer(self._context, text) != 0:
            said = self._lib.nft_ctx_get_error_buffer(self._context) or b""
            line = said.decode(errors="replace").strip().splitlines()
            raise KernelFailure(f"nftables: {line[0] if line else 'refused'}")
        out = self._lib.nft_ctx_get_output_buffer(self._context) or b""
        return dict(json.loads(out)) if out.strip() else {}

    def ensure(self) -> None:
        """Make our table, set and rule; what the set holds stays."""
        self._run(_FRAME)

    def muted(self) -> set[str]:
        """Names of the muted ports; empty when the table is not there."""
        try:
            answer = self._run([{"list": {"set": {**_ID, "name": SET}}}])
        except KernelFailure:
            return set()
        for item in answer.get("nftables", []):
            if "set" in item:
                return {str(port) for port in item["set"].get("elem", [])}
        return set()

    def mute(self, port: str) -> None:
        self._run([{"add": {"element": {**_ID, "name": SET, "elem": [port]}}}])

    def unmute(self, port: str) -> None:
        """Content with absence."""
        element = {"element": {**_ID, "name": SET, "elem": [port]}}
        self._run([{"add": element}, {"delete": element}])

    def remove(self) -> None:
        """Take our table away; content with absence."""
        table = {"table": {"family": FAMILY, "name": TABLE}}
        self._run([{"add": table}, {"delete": table}])

    def close(self) -> None:
        self._lib.nft_ctx_free(self._context)
