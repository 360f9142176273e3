"""The API as the command line uses it."""

from __future__ import annotations

import http.client
import json
import os
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from overland.cli.output import Exit, Failure


def context_file() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "overland" / "context"


class Unreachable(Failure):
    """The NVA does not answer."""


class Client:
    """One NVA's API: `--api`, else OVERLAND_API, else the context that was last written."""

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
        self.url = url
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise Failure("api", f"{url} is not an http:// URL", "usage", exit_code=Exit.USAGE)
        self._address = (parts.hostname, parts.port or 80)

    def _open(self, method: str, path: str, body: Any) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(*self._address, timeout=120)
        headers = {"Content-Type": "application/json"}
        data = json.dumps(body) if body is not None else None
        try:
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
        except OSError as error:
            why = f"the NVA at {self.url} does not answer ({error.strerror or error})"
            raise Unreachable("api", why, "unreachable", "is it running?") from None
        if answer.status >= 400:
            raise _failure(answer)
        return answer

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
