"""The Store port on etcd: many nodes, one order of transactions.

Speaks the JSON gateway of etcd's version 3 interface (`/v3/...`, etcd 3.4 and later) over HTTP.
Any member answers for all; when one is silent the next is asked, and the one that answered last is
asked first.
"""

from __future__ import annotations

import hashlib
import logging
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import aiohttp
import msgspec

from overland.ports import (
    Change,
    Conflict,
    Delete,
    Entry,
    Expect,
    Put,
    StoreFailure,
    StoreUnsure,
)

PREFIX = "overland/"
"""Before every key, so that others may use the same etcd."""

CONNECT_LIMIT_S, ANSWER_LIMIT_S = 0.5, 1.0
"""How long one member may be silent before the next is asked."""

SILENCE_S = 30.0
"""A watch that heard nothing for so long is begun anew: its member may be gone."""

_NOT_FOUND = 5
_UNAVAILABLE = (1, 4, 14)
"""gRPC codes: cancelled, deadline exceeded, unavailable (the cluster has no leader)."""

log = logging.getLogger(__name__)


class _Header(msgspec.Struct, frozen=True):
    revision: int = 0


class _Pair(msgspec.Struct, frozen=True):
    key: bytes
    value: bytes = b""
    mod_revision: int = 0


class _Range(msgspec.Struct, frozen=True):
    header: _Header = _Header()
    kvs: list[_Pair] = []


class _Response(msgspec.Struct, frozen=True):
    response_range: _Range | None = None


class _Txn(msgspec.Struct, frozen=True):
    header: _Header
    succeeded: bool = False
    responses: list[_Response] = []


class _Alive(msgspec.Struct, frozen=True):
    TTL: int = 0


class _AliveAnswer(msgspec.Struct, frozen=True):
    result: _Alive


class _Event(msgspec.Struct, frozen=True):
    kv: _Pair
    type: str = "PUT"


class _Watched(msgspec.Struct, frozen=True):
    events: list[_Event] = []
    canceled: bool = False
    compact_revision: int = 0


class _WatchAnswer(msgspec.Struct, frozen=True):
    result: _Watched


class _Problem(msgspec.Struct, frozen=True):
    code: int = 0
    message: str = ""


class _Refused(StoreFailure):
    """What a member says that will not do what it was asked."""

    def __init__(self, problem: _Problem) -> None:
        super().__init__(f"etcd: {problem.message}")
        self.code = problem.code


class EtcdStore:
    """`endpoints`: URLs of the members. Call from inside the loop that will use it."""

    def __init__(self, endpoints: Sequence[str], tls: ssl.SSLContext | None = None) -> None:
        self._endpoints = [endpoint.rstrip("/") for endpoint in endpoints]
        connector = aiohttp.TCPConnector(ssl=tls if tls is not None else True)
        timeout = aiohttp.ClientTimeout(
            sock_connect=CONNECT_LIMIT_S, connect=ANSWER_LIMIT_S, sock_read=ANSWER_LIMIT_S
        )
        self._http = aiohttp.ClientSession(connector=connector, timeout=timeout)

    async def get(self, key: str) -> Entry | None:
        answer: _Range = await self._ask("kv/range", {"key": _bytes(key)}, _Range)
        return _entry(answer.kvs[0]) if answer.kvs else None

    async def list(self, prefix: str) -> tuple[list[Entry], int]:
        answer: _Range = await self._ask("kv/range", _below(prefix), _Range)
        return [_entry(pair) for pair in answer.kvs], answer.header.revision

    async def commit(self, expects: Sequence[Expect], writes: Sequence[Put | Delete]) -> int:
        """StoreUnsure when no member said whether it is written.

        A member that was asked and fell silent may have written it. So when the next one finds
        other revisions than expected, it also tells what is there: what we write, if we did.
        """
        puts = [write for write in writes if isinstance(write, Put)]
        asked = {
            "compare": [
                {
                    "key": _bytes(expect.key),
                    "target": "MOD",
                    "result": "EQUAL",
                    "mod_revision": str(expect.revision),
                }
                for expect in expects
            ],
            "success": [_operation(write) for write in writes],
            "failure": [{"request_range": {"key": _bytes(put.key)}} for put in puts],
        }
        answer: _Txn
        answer, silent = await self._ask_any("kv/txn", asked, _Txn)
        if answer is None:
            raise StoreUnsure(_nobody(silent))
        if answer.succeeded:
            return answer.header.revision
        if silent and not puts:
            raise StoreUnsure(_nobody(silent))
        written = _written(puts, answer.responses) if silent else None
        if written is None:
            raise Conflict(f"{', '.join(expect.key for expect in expects)}: one has changed")
        return written

    async def watch(self, prefix: str, after: int) -> AsyncGenerator[Change, None]:
        """StoreFailure when no member can be asked, or `after` is so old that etcd forgot it."""
        failed = 0
        while failed < len(self._endpoints):
            endpoint = self._endpoints[0]
            try:
                async for change in self._watched(endpoint, prefix, after):
                    after, failed = change.revision, 0
                    yield change
            except aiohttp.SocketTimeoutError:
                failed = 0  # it was there; nothing has happened for long
                continue
            except aiohttp.ClientError as error:
                log.info("etcd at %s: %s", endpoint, error)
            failed += 1
            self._last(endpoint)
        raise StoreFailure(f"etcd: none of {', '.join(self._endpoints)} can be watched")

    async def _watched(self, endpoint: str, prefix: str, after: int) -> AsyncIterator[Change]:
        """All changes of a revision come in one line: what ends between two lines loses none."""
        wish = {"create_request": {**_below(prefix), "start_revision": str(after + 1)}}
        limit = aiohttp.ClientTimeout(sock_connect=CONNECT_LIMIT_S, sock_read=SILENCE_S)
        url = f"{endpoint}/v3/watch"
        async with self._http.post(url, data=msgspec.json.encode(wish), timeout=limit) as answer:
            async for line in answer.content:
                told = msgspec.json.decode(line, type=_WatchAnswer, strict=False).result
                if told.compact_revision:
                    raise StoreFailure(f"etcd: revision {after} is forgotten")
                if told.canceled:
                    return
                for event in told.events:
                    value = None if event.type == "DELETE" else event.kv.value
                    yield Change(
                        key=event.kv.key.decode().removeprefix(PREFIX),
                        value=value,
                        revision=event.kv.mod_revision,
                    )

    async def grant(self, lease: str, ttl_s: float) -> None:
        """Whole seconds, at least etcd's own minimum; a renewal keeps what was granted first."""
        number = _lease(lease)
        alive: _AliveAnswer = await self._ask("lease/keepalive", {"ID": number}, _AliveAnswer)
        if alive.result.TTL == 0:
            wish = {"ID": number, "TTL": str(max(1, round(ttl_s)))}
            await self._ask("lease/grant", wish, _Alive)

    async def revoke(self, lease: str) -> None:
        try:
            await self._ask("lease/revoke", {"ID": _lease(lease)}, _Header)
        except _Refused as refused:
            if refused.code != _NOT_FOUND:
                raise

    async def close(self) -> None:
        await self._http.close()

    # ------------------------------------------------------------ members

    async def _ask(self, path: str, asked: Any, kind: Any) -> Any:
        answer, silent = await self._ask_any(path, asked, kind)
        if answer is None:
            raise StoreFailure(_nobody(silent))
        return answer

    async def _ask_any(self, path: str, asked: Any, kind: Any) -> tuple[Any, Sequence[str]]:
        """The answer of the first member that gives one, and what became of those before it."""
        body = msgspec.json.encode(asked)
        silent: tuple[str, ...] = ()
        for endpoint in tuple(self._endpoints):
            try:
                return await self._one(f"{endpoint}/v3/{path}", body, kind), silent
            except _Refused as refused:
                if refused.code not in _UNAVAILABLE and not silent:
                    raise
                silent += (f"{endpoint}: {refused}",)
            except (aiohttp.ClientError, TimeoutError) as error:
                silent += (f"{endpoint}: {error or 'silent'}",)
            self._last(endpoint)
        return None, silent

    async def _one(self, url: str, body: bytes, kind: Any) -> Any:
        async with self._http.post(url, data=body) as answer:
            data = await answer.read()
            if answer.status == 200:
                return msgspec.json.decode(data, type=kind, strict=False)
        try:
            raise _Refused(msgspec.json.decode(data, type=_Problem, strict=False))
        except msgspec.DecodeError:
            raise _Refused(_Problem(14, f"HTTP {answer.status}")) from None

    def _last(self, endpoint: str) -> None:
        """The next time `endpoint` is asked after all others."""
        self._endpoints.remove(endpoint)
        self._endpoints.append(endpoint)


def _nobody(silent: Sequence[str]) -> str:
    return f"etcd does not answer ({'; '.join(silent)})"


def _bytes(key: str) -> bytes:
    return (PREFIX + key).encode()


def _below(prefix: str) -> dict[str, bytes]:
    """All keys that begin so: up to the first that is behind them all."""
    first = _bytes(prefix)
    return {"key": first, "range_end": first[:-1] + bytes([first[-1] + 1])}


def _entry(pair: _Pair) -> Entry:
    key = pair.key.decode().removeprefix(PREFIX)
    return Entry(key=key, value=pair.value, revision=pair.mod_revision)


def _operation(write: Put | Delete) -> dict[str, Any]:
    if isinstance(write, Delete):
        return {"request_delete_range": {"key": _bytes(write.key)}}
    put = {"key": _bytes(write.key), "value": write.value}
    return {"request_put": put if write.lease is None else put | {"lease": _lease(write.lease)}}


def _lease(name: str) -> str:
    """etcd's number for a lease: 63 bits, never 0."""
    digest = hashlib.sha256(name.encode()).digest()
    return str(int.from_bytes(digest[:8]) >> 1 or 1)


def _written(puts: Sequence[Put], found: Sequence[_Response]) -> int | None:
    """The revision with which all of `puts` were written together; None when they were not."""
    revisions = set()
    for put, response in zip(puts, found, strict=True):
        pairs = response.response_range.kvs if response.response_range else []
        if not pairs or pairs[0].value != put.value:
            return None
        revisions.add(pairs[0].mod_revision)
    return revisions.pop() if len(revisions) == 1 else None
