"""What may enter a bridge: one nftables table of ours, changed by atomic transactions.

A port that is associated but not activated may not be heard: its frames are dropped where they
enter the bridge. So are frames to an address that is in transit, which are counted by the port that
they came in by; the counts outlive the marking, until they are taken. A tenant of a routed VN
speaks with its gateway only, and asks for its MAC address with ARP and ND; whatever else it sends
would reach others past the router.

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
TRANSIT, COUNTED = "in_transit", "dropped_in_transit"
COUNTED_MAX = 65536
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


_INTO: Json = {"concat": [{"meta": {"key": "iifname"}}, _ether("daddr")]}
_COUNT: Json = {
    "set": {"op": "update", "elem": _INTO, "set": f"@{COUNTED}", "stmt": [{"counter": None}]}
}
_PORT_AND_MAC = ["ifname", "ether_addr"]
_COUNTED = (
    f"add table {FAMILY} {TABLE}; add set {FAMILY} {TABLE} {COUNTED} "
    f"{{ type ifname . ether_addr; size {COUNTED_MAX}; flags dynamic; }}"
)
"""In nft's own words: its JSON of 1.0.6 (Debian 12) does not know the flag."""

_FRAME: list[dict[str, Any]] = [
    {"add": {"table": {"family": FAMILY, "name": TABLE, "comment": "overland"}}},
    {"add": {"set": {**_ID, "name": MUTED, "type": "ifname"}}},
    {"add": {"set": {**_ID, "name": ROUTED, "type": "ifname"}}},
    {"add": {"set": {**_ID, "name": TRANSIT, "type": _PORT_AND_MAC}}},
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
    _rule(_is(_INTO, f"@{TRANSIT}"), _COUNT, {"drop": None}),
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
        return self._run_text(json.dumps({"nftables": commands}))

    def _run_text(self, text: str) -> dict[str, Any]:
        if self._lib.nft_run_cmd_from_buffer(self._context, text.encode()) != 0:
            said = self._lib.nft_ctx_get_error_buffer(self._context) or b""
            line = said.decode(errors="replace").strip().splitlines()
            raise KernelFailure(f"nftables: {line[0] if line else 'refused'}")
        out = self._lib.nft_ctx_get_output_buffer(self._context) or b""
        return dict(json.loads(out)) if out.strip() else {}

    def ensure(self) -> None:
        """Make our table, sets and rules; what the sets hold stays."""
        self._run_text(_COUNTED)
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
        return {str(port) for port in _elements(answer)}

    def in_transit(self) -> set[tuple[str, str]]:
        """(Port, MAC) of what is dropped and counted; empty when the table is not there."""
        try:
            answer = self._run([{"list": {"set": {**_ID, "name": TRANSIT}}}])
        except KernelFailure:
            return set()
        return {(port, mac) for port, mac in (each["concat"] for each in _elements(answer))}

    def drop(self, port: str, mac: str) -> None:
        """From now on frames from `port` to `mac` are dropped, and counted from 0."""
        counted = self._element(COUNTED, port, mac)
        marked = self._element(TRANSIT, port, mac)
        self._run([{"add": counted}, {"delete": counted}, {"add": marked}])

    def pass_again(self, port: str, mac: str) -> None:
        """Content with absence. What was counted stays."""
        marked = self._element(TRANSIT, port, mac)
        self._run([{"add": marked}, {"delete": marked}])

    def take_count(self, port: str, mac: str) -> int:
        """How many frames from `port` to `mac` were dropped; they are not counted again."""
        answer = self._run([{"list": {"set": {**_ID, "name": COUNTED}}}])
        for each in (each["elem"] for each in _elements(answer) if "elem" in each):
            if each["val"]["concat"] == [port, mac]:
                self._run([{"delete": self._element(COUNTED, port, mac)}])
                return int(each["counter"]["packets"])
        return 0

    def _element(self, name: str, port: str, mac: str) -> dict[str, Any]:
        return {"element": {**_ID, "name": name, "elem": [{"concat": [port, mac]}]}}

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


def _elements(answer: dict[str, Any]) -> list[Any]:
    """The elements of the one set that was listed."""
    sets = [item["set"] for item in answer.get("nftables", []) if "set" in item]
    return list(sets[0].get("elem", [])) if sets else []
