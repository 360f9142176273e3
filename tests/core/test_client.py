"""Commands find the active NVA among several."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from overland.cli import client
from overland.cli.client import Client, Unreachable
from overland.wire.client import in_turn

NOBODY = "http://127.0.0.1:9"


@contextlib.contextmanager
def nva(*answers: tuple[int, str]) -> Iterator[str]:
    """An API that gives one (status, Location) after the other, and then the last again."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, location = left.pop(0) if len(left) > 1 else left[0]
            body = b'"done"' if status == 200 else b"{}"
            self.send_response(status)
            if location:
                self.send_header("Location", location + self.path)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.req("N-09")
def test_any_address_leads_to_the_active_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """N-09: by way of a standby, past one that is gone, and through a takeover."""
    monkeypatch.setattr(client, "AGAIN_S", 0.0)
    with (
        nva((200, "")) as active,
        nva((307, active)) as standby,
        nva((503, ""), (200, "")) as next_,
    ):
        for url in (active, standby, f"{NOBODY},{standby}", next_, f"{NOBODY},{next_}"):
            assert Client(url).call("POST", "/v1/x", {}) == "done"
    with nva((307, NOBODY), (503, ""), (200, "")) as heir:  # it does not know yet who died
        assert Client(heir).call("POST", "/v1/x", {}) == "done"


def test_when_none_becomes_active_the_reason_is_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "TAKEOVER_LIMIT_S", 0.0)
    with nva((503, "")) as standby, pytest.raises(Unreachable) as raised:
        Client(standby).call("POST", "/v1/x", {})
    assert "no_leader" in raised.value.lines[0]


def test_when_no_nva_answers_nobody_waits() -> None:
    with pytest.raises(Unreachable) as raised:
        Client(f"{NOBODY},{NOBODY}").call("GET", "/v1/x")
    assert "does not answer" in raised.value.lines[0]


@pytest.mark.req("N-09")
def test_addresses_are_tried_by_preference_and_equal_ones_at_random() -> None:
    """N-09: priorities, and equal ones chosen at random."""
    turns = {tuple(in_turn([["a", "b", "c"], "d", ["e", "f"]])) for _ in range(500)}
    assert {frozenset(turn[:3]) for turn in turns} == {frozenset("abc")}
    assert {turn[3] for turn in turns} == {"d"}
    assert len(turns) == 6 * 2
