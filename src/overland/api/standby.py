"""What an NVA that is not the active one answers: where that one is (N-10)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi.responses import JSONResponse, RedirectResponse, Response

Channel = Callable[..., Awaitable[Any]]


def standing_by(app: Any, leads: Callable[[], bool], leader: Callable[[], str | None]) -> Any:
    """`app` while this NVA `leads`; else each request is sent on to the API of the `leader`.

    307, or 503 with code `no_leader` while there is none. `/healthz` is answered by either.
    """

    async def answer(scope: dict[str, Any], receive: Channel, send: Channel) -> None:
        if scope["type"] != "http" or leads():
            await app(scope, receive, send)
        else:
            await _elsewhere(scope, leader())(scope, receive, send)

    return answer


def _elsewhere(scope: dict[str, Any], leader: str | None) -> Response:
    path = scope["path"]
    if path == "/healthz":
        return JSONResponse({"status": "standby", "leader": leader})
    if leader is not None:
        query = scope["query_string"].decode()
        return RedirectResponse(leader + path + (f"?{query}" if query else ""), 307)
    body = {
        "type": "urn:overland:no_leader",
        "title": "nva",
        "detail": "no NVA is the active one at the moment",
        "code": "no_leader",
        "hint": "another takes over within seconds; without a majority of the store none can",
        "blockers": [],
    }
    return JSONResponse(body, 503, media_type="application/problem+json")
