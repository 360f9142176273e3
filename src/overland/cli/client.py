"""The API as the command line uses it."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from overland.cli.output import Exit, Failure


def context_file() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "overland" / "context"


TAKEOVER_LIMIT_S, AGAIN_S = 20.0, 0.2
CONNECT_LIMIT_S, ANSWER_LIMIT_S = 3.0, 120.0


class _Silent(Exception):
    """An NVA does not answer; nothing was done."""


class Unreachable(Failure):
    """The NVA does not answer."""


class Client:
    """The API of the domain's NVAs: `--api`, else OVERLAND_API, else the context last written.

    One URL, or those of several NVAs with commas between; any of them leads to the active one.
    While one takes over from another, requests wait for it.
    """

    def __init__(self, api: str | None) -> None:
        url = api or os.environ.get("OVERLAND_API") or _context()
        if url is None:
            raise Failure(
                "api",
                "no NVA is known",
                "no_context",
                "`overland lab up`, --api URL or OVERLAND_API",
                Exit.USAGE,
            )
        self._addresses = [_address(each.strip()) for each in url.split(",")]

    def _open(self, method: str, path: str, body: Any) -> http.client.HTTPResponse:
        deadline_s = time.monotonic() + TAKEOVER_LIMIT_S
        while (answer := self._any(method, path, body)) is None:
            if time.monotonic() > deadline_s:
                why = f"none of the NVAs has become the active one in {TAKEOVER_LIMIT_S:g} s"
                raise Unreachable("api", why, "no_leader", "does their store have a majority?")
            time.sleep(AGAIN_S)
        if answer.status >= 400:
            raise _failure(answer)
        return answer

    def _any(self, method: str, path: str, body: Any) -> http.client.HTTPResponse | None:
        """The first answer of an active NVA; None when one is there, but none is active now."""
        standby, silent = False, ""
        for address in self._addresses:
            try:
                answer = _ask(address, method, path, body)
                if answer.status == 307:
                    standby = True
                    answer = _ask(_address(answer.headers["Location"]), method, path, body)
            except _Silent as failure:
                silent = silent or str(failure)
                continue
            if answer.status not in (307, 503):
                return answer
            standby = True
        if not standby:
            raise Unreachable("api", silent, "unreachable", "is it running?")
        return None

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """JSON answer of one request; Failure carries what the NVA says."""
        data = self._open(method, path, body).read()
        return json.loads(data) if data else None

    def events(self, path: str) -> Iterator[Any]:
        """Objects of a server-sent event stream, until it ends."""
        answer = self._open("GET", path, None)
        for raw in answer:
            line = raw.decode().strip()
            if line.startswith("data: "):
                yield json.loads(line[6:])


def _address(url: str) -> tuple[str, int]:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise Failure("api", f"{url} is not an http:// URL", "usage", exit_code=Exit.USAGE)
    return parts.hostname, parts.port or 80


def _ask(address: tuple[str, int], method: str, path: str, body: Any) -> http.client.HTTPResponse:
    """One request to one NVA. _Silent when it cannot have been carried out, else Unreachable."""
    connection = http.client.HTTPConnection(*address, timeout=CONNECT_LIMIT_S)
    headers = {"Content-Type": "application/json"}
    data = json.dumps(body) if body is not None else None
    asked = False
    try:
        connection.connect()
        connection.sock.settimeout(ANSWER_LIMIT_S)
        asked = method != "GET"
        connection.request(method, path, data, headers)
        return connection.getresponse()
    except OSError as error:
        at = f"http://{address[0]}:{address[1]}"
        why = f"the NVA at {at} does not answer ({error.strerror or error})"
        if asked:
            raise Unreachable("api", why, "unreachable", "it may have done it") from None
        raise _Silent(why) from None


def _failure(answer: http.client.HTTPResponse) -> Failure:
    data = answer.read()
    try:
        body = json.loads(data)
    except ValueError:
        body = {}
    if "code" in body:
        return Failure.of_problem(body)
    return Failure("api", f"HTTP {answer.status}", "http", data.decode(errors="replace")[:200])


def _context() -> str | None:
    path = context_file()
    return path.read_text().strip() if path.exists() else None


def write_context(url: str) -> None:
    path = context_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(url + "\n")
