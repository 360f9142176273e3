"""What a port may say: one nftables table of ours, changed by atomic transactions.

A port that is associated but not activated may not be heard: its frames are dropped where they
enter the bridge. A tenant of a routed VN speaks with its gateway only, and asks for its MAC address
with ARP and ND; whatever else it sends would reach others past the router.

libnftables' JSON interface (libnftables-json(5)) takes a list of commands and performs all or none.
"""

from __future__ import annotations

import ctypes
import json
from typing import Any

from overland.model.names import GATEWAY_MAC
from overland.ports import KernelFailure

FAMILY, TABLE = "bridge", "overland"
MUTED, ROUTED = "muted", "routed"
_OUTPUT_JSON = 1 << 4
_ID = {"family": FAMILY, "table": TABLE}

Json = dict[str, Any]


def _is(left: Json, right: Any) -> Json:
    return {"match": {"op": "==", "left": left, "right": right}}


def _from(ports: str) -> Json:
    return _is({"meta": {"key": "iifname"}}, f"@{ports}")


def _ether(field: str) -> Json:
    return {"payload": {"protocol": "ether", "field": field}}


def _rule(*expr: Json) -> Json:
    return {"add": {"rule": {**_ID, "chain": "ingress", "expr": list(expr)}}}


_FRAME: list[dict[str, Any]] = [
    {"add": {"table": {"family": FAMILY, "name": TABLE, "comment": "overland"}}},
    {"add": {"set": {**_ID, "name": MUTED, "type": "ifname"}}},
    {"add": {"set": {**_ID, "name": ROUTED, "type": "ifname"}}},
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
    _rule(_from(MUTED), {"counter": None}, {"drop": None}),
    _rule(_from(ROUTED), _is(_ether("daddr"), GATEWAY_MAC), {"accept": None}),
    _rule(
        _from(ROUTED),
        _is(_ether("type"), {"set": ["arp", "ip6"]}),
        _is({"meta": {"key": "pkttype"}}, {"set": ["broadcast", "multicast"]}),
        {"accept": None},
    ),
    _rule(_from(ROUTED), {"counter": None}, {"drop": None}),
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
        """Make our table, sets and rules; what the sets hold stays."""
        self._run(_FRAME)

    def muted(self) -> set[str]:
        """Names of the muted ports; empty when the table is not there."""
        return self._ports(MUTED)

    def routed(self) -> set[str]:
        """Names of the tenants' ports that speak with a router only."""
        return self._ports(ROUTED)

    def mute(self, port: str) -> None:
        self._put(MUTED, port)

    def unmute(self, port: str) -> None:
        """Content with absence."""
        self._take(MUTED, port)

    def route(self, port: str) -> None:
        """From now on `port` speaks with its router only."""
        self._put(ROUTED, port)

    def unroute(self, port: str) -> None:
        """Content with absence."""
        self._take(ROUTED, port)

    def _ports(self, name: str) -> set[str]:
        try:
            answer = self._run([{"list": {"set": {**_ID, "name": name}}}])
        except KernelFailure:
            return set()
        for item in answer.get("nftables", []):
            if "set" in item:
                return {str(port) for port in item["set"].get("elem", [])}
        return set()

    def _put(self, name: str, port: str) -> None:
        self._run([{"add": {"element": {**_ID, "name": name, "elem": [port]}}}])

    def _take(self, name: str, port: str) -> None:
        element = {"element": {**_ID, "name": name, "elem": [port]}}
        self._run([{"add": element}, {"delete": element}])

    def remove(self) -> None:
        """Take our table away; content with absence."""
        table = {"table": {"family": FAMILY, "name": TABLE}}
        self._run([{"add": table}, {"delete": table}])

    def close(self) -> None:
        self._lib.nft_ctx_free(self._context)
