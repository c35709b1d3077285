"""What a reward server sends back: JSON of one line, whatever went wrong, and in such a way that it arrives."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dgpo_plugin.common.user_file import told
from dgpo_plugin.rewards.served import connections
from dgpo_plugin.rewards.served.request_body import Refusal

log = logging.getLogger(__name__)


class TokenFirst:
    """Refuses whatever does not bring the token, before anything else is looked at; an ASGI application.

    Args:
        token: None for none.
    """

    def __init__(self, application: ASGIApp, token: str | None) -> None:
        self._application = application
        self._expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope["headers"]).get(b"authorization", b"")
        served = self._application
        if self._expected is not None and not hmac.compare_digest(given, self._expected):
            served = answer({"error": "the token is missing or wrong"}, HTTPStatus.UNAUTHORIZED)
        await served(scope, receive, send)


class Lingering:
    """Takes what is still being sent after an early answer, so that the client reads it and not of a reset connection.

    What comes is thrown away, for as long as a request may take to come at most. An ASGI application.
    """

    def __init__(self, application: ASGIApp) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ends = time.monotonic() + connections.READ_SECONDS
        more = True

        async def receive_and_note() -> Message:
            nonlocal more
            message = await receive()
            more = message.get("more_body", False)
            return message

        async def send_and_wait(message: Message) -> None:
            if message["type"] == "http.response.start":
                client, target = (scope["client"] or ("", 0))[0], scope["raw_path"].decode("latin-1")
                log.info("%s %s %s %d", client, scope["method"], target, message["status"])
            if message["type"] != "http.response.body" or message.get("more_body", False) or not more:
                await send(message)
                return
            await send({**message, "more_body": True})
            try:
                while more:
                    left = min(connections.SILENCE_SECONDS, max(ends - time.monotonic(), 0.0))
                    await asyncio.wait_for(receive_and_note(), left)
            except asyncio.TimeoutError:
                pass
            await send({"type": "http.response.body", "body": b""})

        await self._application(scope, receive_and_note, send_and_wait)


def answer(content: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK, retry_after: int | None = None) -> Response:
    """JSON, after which the connection ends."""
    headers = {"Connection": "close", **({} if retry_after is None else {"Retry-After": str(retry_after)})}
    # In ASCII: a prompt may hold half a surrogate pair, which UTF-8 has no bytes for.
    return Response(json.dumps(content), int(status), headers, "application/json")


async def refused(_request: Request, error: Exception) -> Response:
    """A request that is answered with an error, for starlette."""
    assert isinstance(error, Refusal)
    return answer({"error": str(error)}, error.status, error.retry_after)


async def not_there(request: Request, error: Exception) -> Response:
    """A path or a method that is none of ours, for starlette."""
    assert isinstance(error, HTTPException)
    reasons = {
        404: "there are GET /health, POST /check and POST /score only",
        405: f"{request.url.path} does not take {request.method}; there are GET /health, POST /check and POST /score",
    }
    return answer({"error": reasons.get(error.status_code, str(error.detail))}, HTTPStatus(error.status_code))


async def failed(_request: Request, error: Exception) -> Response:
    """What nobody thought of, for starlette."""
    log.error("a request failed: %s", told(error))
    return answer({"error": told(error)}, HTTPStatus.INTERNAL_SERVER_ERROR)
