"""One request and its answer, both JSON, over httpx2: what rewards need of servers that may be anybody's.

httpx2's transport is used without its client: nothing follows a redirect (which would carry the token along), keeps a
cookie, reads a proxy or a .netrc from the environment, or writes a line into the log for each request.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import os
import re
import ssl
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

from dgpo_plugin.common.errors import UserError

USED_UP = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
"""OpenAI's codes beside status 429 for what no waiting mends."""
LOADING = re.compile(r"load|start|warm|not ready|initiali[sz]", re.IGNORECASE)
"""What servers say with status 503 until their model is there (llama.cpp, TGI, vLLM behind a proxy)."""
LONGEST_ANSWER = 16 * 2**20
"""Bytes of an answer that are read at most."""
CONNECT_SECONDS = 10.0
"""Within which a connection must be there."""
LONGEST_WAIT = 7 * 24 * 3600
"""Seconds that a time-out may be at most."""

Answer = TypeVar("Answer")


class RequestFailed(Exception):
    """A request had no good answer.

    Attributes:
        status: HTTP status; None if no whole answer came at all.
        code: what the server calls the error, such as OpenAI's ``insufficient_quota``; empty if it does not say.
        retry_after: seconds that the server asks to be left alone; None if it does not say.
    """

    def __init__(self, status: int | None, reason: str, *, code: str = "", retry_after: float | None = None) -> None:
        super().__init__(reason if status is None else f"{status}, {reason}")
        self.status = status
        self.code = code
        self.retry_after = retry_after

    @property
    def temporary(self) -> bool:
        """Whether the same request may succeed later: no connection, too long, too many, or the server's own fault."""
        passing = self.status is None or self.status in (408, 429) or self.status >= 500
        return passing and self.code not in USED_UP

    @property
    def busy(self) -> bool:
        """Whether the server is well and only asks to wait: too many requests, or its model is still loading."""
        loading = self.status == 503 and (self.retry_after is not None or LOADING.search(str(self)) is not None)
        return self.temporary and (self.status in (429, 529) or loading)


def ask(
    url: str,
    body: Any = None,
    *,
    token: str | None = None,
    headers: Mapping[str, str | None] | None = None,
    timeout: float,
) -> Any:
    """GET, or POST if there is a body; both sides JSON.

    Args:
        url: ``http://`` or ``https://``; see :func:`checked_urls`.
        token: sent as ``Authorization: Bearer``.
        headers: further ones; one of the usual ones by that name is replaced, or with None left out.
        timeout: seconds from the first byte sent to the last one read, however steadily they come.

    Raises:
        RequestFailed: no connection, no whole answer in time, one that is too long, a status other than 200, or an
            answer that is not JSON.
    """
    usual = {"Connection": "close", "Accept-Encoding": "identity"}
    if token:
        usual["Authorization"] = f"Bearer {token}"
    content = None
    if body is not None:
        content, usual["Content-Type"] = json.dumps(body).encode(), "application/json"
    replaced = {name.lower() for name in headers or {}}
    sent = {name: value for name, value in usual.items() if name.lower() not in replaced}
    sent |= {name: value for name, value in (headers or {}).items() if value is not None}
    limits = httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)).as_dict()
    method = "GET" if content is None else "POST"
    request = httpx2.Request(method, url, headers=sent, content=content, extensions={"timeout": limits})
    try:
        response, text = _outcome(asyncio.wait_for(_exchange(request), timeout))
    except httpx2.ConnectTimeout as error:
        raise RequestFailed(None, f"no connection in {limits['connect']:g} s") from error
    except (httpx2.TimeoutException, asyncio.TimeoutError) as error:
        raise RequestFailed(None, f"no answer in {timeout:g} s") from error
    except (OSError, httpx2.HTTPError) as error:
        cause = _cause(error)
        raise RequestFailed(None, f"{type(cause).__name__}: {cause}".rstrip(": ")) from error
    if response.status_code != 200:
        reason, code = _reason(text)
        retry_after = seconds_to_wait(dict(response.headers), time.time())
        raise RequestFailed(response.status_code, reason or response.reason_phrase, code=code, retry_after=retry_after)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestFailed(None, f"an answer that is not JSON: {_first_line(text)}") from error


async def _exchange(request: httpx2.Request) -> tuple[httpx2.Response, bytes]:
    """A request sent over a connection of its own, and its answer's bytes as they came."""
    text = bytearray()
    async with httpx2.AsyncHTTPTransport(verify=tls_context(), trust_env=False) as transport:
        response = await transport.handle_async_request(request)
        async for part in response.aiter_raw():
            text += part
            if len(text) > LONGEST_ANSWER:
                raise RequestFailed(None, f"an answer of more than {LONGEST_ANSWER} bytes")
    return response, bytes(text)


def _outcome(work: Coroutine[Any, Any, Answer]) -> Answer:
    """What a coroutine comes to, run beside whatever the calling thread has of its own."""
    future = asyncio.run_coroutine_threadsafe(work, _loop(os.getpid()))
    try:
        return future.result()
    except BaseException:  # Ctrl-C in the calling thread
        future.cancel()
        raise


@functools.cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of all requests, in a thread of its own; a forked process needs another."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"requests of {process}", daemon=True).start()
    return loop


@functools.cache
def tls_context() -> ssl.SSLContext:
    """The system's certificates, or those that ``SSL_CERT_FILE`` names, as everything of Python's has them."""
    return ssl.create_default_context()


def _cause(error: BaseException) -> BaseException:
    """The system's own error behind httpx2's, where there is one."""
    found, at = error, error.__cause__ or error.__context__
    while at is not None:
        found = at if isinstance(at, OSError) else found
        several = getattr(at, "exceptions", ())  # an exception group: one for each of a name's addresses
        at = several[0] if several else at.__cause__ or at.__context__
    return found


def seconds_to_wait(headers: Mapping[str, str], now: float) -> float | None:
    """How long a server asks to be left alone, by ``Retry-After`` in seconds or as a date, or OpenAI's in ms.

    RFC 9110, section 10.2.3; ``retry-after-ms`` is what the openai package reads first.

    Args:
        headers: by their names in lower case.
        now: seconds since 1970.

    Returns:
        Seconds, at least 0; None if it does not say, or nothing that can be read.
    """
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        said = (headers.get(name) or "").strip()
        try:
            seconds = float(said) / unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(said).timestamp() - now
            except (ValueError, TypeError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    return None


def _reason(text: bytes) -> tuple[str, str]:
    """What an answer that is an error says, and its code: ours, OpenAI's, vLLM's, or its first line."""
    try:
        answer = json.loads(text)
        error = answer.get("error", answer)
        named = error if isinstance(error, dict) else {"message": error}
        code = str(named.get("code") or named.get("type") or "")
        return " ".join(str(named["message"]).split())[:500], code
    except (ValueError, RecursionError, AttributeError, KeyError):
        return _first_line(text), ""


def _first_line(text: bytes) -> str:
    return next(iter(text[:500].decode("utf-8", "replace").strip().splitlines()), "")


def checked_urls(where: str, given: str | Sequence[str]) -> list[str]:
    """One address or several, without the slash at the end.

    Raises:
        UserError: none, one that is not HTTP's, or the same twice.
    """
    urls = [given] if isinstance(given, str) else [str(url) for url in given]
    for url in urls:
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            good = good and url.isprintable() and " " not in url and bool(httpx2.URL(url).host)
        except (ValueError, httpx2.InvalidURL):
            good = False
        if not good or parts.query or parts.fragment or parts.username is not None:
            raise UserError(f"{where}: {url!r} is no address; write it as http://host:port")
    bare = [url.rstrip("/") for url in urls]
    if not bare or len(set(bare)) < len(bare):
        raise UserError(f"{where}: {'the same address twice' if bare else 'is empty'}; give each server's address once")
    return bare


def checked_number(option: str, value: Any, least: int = 1) -> int:
    """An option that counts something.

    Raises:
        UserError: not a whole number, or less than that.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"option {option} must be at least {least} and a whole number, not {value!r:.40}")
    return value


def checked_seconds(option: str, value: Any) -> float:
    """An option that says how long something may take.

    Raises:
        UserError: not a number of seconds that anybody waits for.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LONGEST_WAIT:
        raise UserError(f"option {option} must be more than 0 and at most {LONGEST_WAIT} seconds, not {value!r:.40}")
    return float(value)
