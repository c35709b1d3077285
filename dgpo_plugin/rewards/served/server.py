"""A reward in a process, environment or machine of its own: ``dgpo serve-reward``, starlette on uvicorn.

    GET  /health   -> {"name": ..., "version": ..., "ready": true}, and "title" if the reward calls itself something
    POST /check {"prompts": [{"text": ..., "metadata": {...}}, ...]}
                   -> {"name": ..., "version": ..., "problems": [one line, ...]}     of prompts that it cannot judge
    POST /score {"images": [PNG in base64, ...], "prompts": as there}
                   -> {"name": ..., "version": ..., "rewards": [...]}

Every answer says what gave it: a server may be another after a restart that no client noticed. Anything else is
answered with a status of 400 or more and ``{"error": one line}``. A token is checked before any body is read; a
connection is for one request.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import logging
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Mapping
from http import HTTPStatus
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import dgpo_plugin
from dgpo_plugin.common.content import path_hash
from dgpo_plugin.common.errors import Stopped, UserError
from dgpo_plugin.common.user_file import files_hash, is_from_file, told
from dgpo_plugin.config.fields import RewardTerm, ScoringConfig
from dgpo_plugin.config.places import exists, may_be_path
from dgpo_plugin.distributed.device import this_device
from dgpo_plugin.rewards.base import Reward, checked_rewards
from dgpo_plugin.rewards.load import load_reward
from dgpo_plugin.rewards.registry import REWARDS
from dgpo_plugin.rewards.served import connections
from dgpo_plugin.rewards.served.answers import Lingering, TokenFirst, answer, failed, not_there, refused
from dgpo_plugin.rewards.served.connections import Connection, Connections, Server
from dgpo_plugin.rewards.served.request_body import Refusal, read_check_request, read_request
from dgpo_plugin.rewards.served.wire import is_loopback
from dgpo_plugin.rewards.served.worker import WAITING, Worker

BODIES = WAITING + 8
"""Requests of the largest size whose bytes are held at once."""

log = logging.getLogger(__name__)


class RewardServer:
    """Scores one request at a time; a few others wait, and further ones are told to come again.

    Args:
        port: 0 for any that is free; ``address`` then tells.
        token: that every request must bring; None for none, which only a loopback address allows.
        most_bytes: of a request's body.
        timeout: seconds that the reward may take for a request; None for any.
        tell: is given a line when requests in flight are waited for.

    Attributes:
        address: host and port.

    Raises:
        UserError: the address is taken, or would be open to others without a token.
    """

    def __init__(
        self,
        reward: Reward,
        serves: tuple[str, str],
        *,
        address: tuple[str, int] = ("127.0.0.1", 0),
        token: str | None = None,
        most_bytes: int = 64 * 2**20,
        timeout: float | None = None,
        tell: Callable[[str], object] = log.info,
    ) -> None:
        host, _ = address
        if token is None and not is_loopback(host):
            raise UserError(f"--host {host}: others can reach it, so it needs a token; give --token-variable")
        self.reward, self._most_bytes = reward, most_bytes
        self._name, version = serves
        self._serves = {"name": self._name, "version": version}
        self._connections = Connections(BODIES * most_bytes)
        self._socket = _listening(address)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self._worker = Worker(this_device(), timeout)
        config = uvicorn.Config(
            Lingering(TokenFirst(self._application(), token)),
            # Without it, each request's connection would be uvicorn's own, without our limits.
            http=functools.partial(Connection, connections=self._connections),  # type: ignore[arg-type]
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
        )
        self._server = Server(config, tell)

    def run(self) -> int | None:
        """Serve until :meth:`stop`, or until a signal where this is the main thread; requests in flight are answered.

        Returns:
            The signal's number; None if none came.
        """
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self.close()
        return self._server.signal

    def stop(self) -> None:
        """Have :meth:`run` return once the requests in flight are answered; from any thread."""
        self._server.should_exit = True

    def close(self) -> None:
        """Give the address back."""
        self._socket.close()
        self._worker.close()

    def _application(self) -> Starlette:
        routes = [
            Route("/health", self._health, methods=["GET"]),
            Route("/check", self._check, methods=["POST"]),
            Route("/score", self._score, methods=["POST"]),
        ]
        handlers = {Refusal: refused, HTTPException: not_there, Exception: failed}
        application = Starlette(routes=routes, exception_handlers=handlers)
        application.router.redirect_slashes = False
        return application

    async def _health(self, request: Request) -> Response:
        title = {"title": str(self.reward.title)} if self.reward.title else {}
        return answer({**self._serves, **title, "ready": self._worker.overdue() is None})

    async def _score(self, request: Request) -> Response:
        return answer({**self._serves, "rewards": await self._done(request, self._rewards)})

    async def _check(self, request: Request) -> Response:
        return answer({**self._serves, "problems": await self._done(request, self._problems)})

    async def _done(self, request: Request, work: Callable[[bytearray], Any]) -> Any:
        """What the reward's thread makes of a request's body; nothing, if the client goes away before its turn."""
        length = _length(request, self._most_bytes)
        self._worker.refuse_if_full()
        body = bytearray()
        try:
            await self._read(request, body, length)
            result = asyncio.wrap_future(self._worker.submit(functools.partial(work, body)))
            gone = asyncio.ensure_future(request.receive())
            try:
                while not result.done():
                    left = self._worker.time_left()
                    await asyncio.wait({result, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                    refusal = self._worker.overdue()
                    if gone.done():
                        refusal = Refusal(HTTPStatus.BAD_REQUEST, "the client went away")
                    if refusal and not result.done():
                        result.cancel()
                        raise refusal
                return result.result()
            finally:
                gone.cancel()
        finally:
            self._connections.hold(-len(body))

    async def _read(self, request: Request, body: bytearray, length: int) -> None:
        """Add a request's body to what there is of it.

        Raises:
            Refusal: it does not come in time, or not whole.
        """
        ends = time.monotonic() + connections.READ_SECONDS
        more = True
        while more:
            silence = min(connections.SILENCE_SECONDS, max(ends - time.monotonic(), 0.0))
            try:
                message = await asyncio.wait_for(request.receive(), silence)
            except asyncio.TimeoutError as error:
                reason = f"{len(body)} of {length} bytes came, then nothing for too long"
                raise Refusal(HTTPStatus.REQUEST_TIMEOUT, reason) from error
            if message["type"] == "http.disconnect":
                raise Refusal(HTTPStatus.BAD_REQUEST, f"the body ended after {len(body)} of {length} bytes")
            part = message.get("body", b"")
            body += part
            self._connections.hold(len(part))
            more = message.get("more_body", False)

    def _rewards(self, body: bytearray) -> list[float]:
        """The rewards that a request's body asks for.

        Raises:
            Refusal: it is malformed or too large, or the reward refuses or fails.
        """
        images, prompts = read_request(body)
        values = self._asked(lambda: checked_rewards(self.reward, images, prompts, self._name))
        return [float(value) for value in values]

    def _problems(self, body: bytearray) -> list[str]:
        """What the reward says of a request's prompts.

        Raises:
            Refusal: it is malformed, or the reward fails.
        """
        prompts = read_check_request(body)
        found = self._asked(lambda: self.reward.check(prompts))
        if not isinstance(found, list | tuple) or not all(isinstance(line, str) for line in found):
            reason = f"reward {self._name}: its check(prompts) must return a list of lines, not {type(found).__name__}"
            raise Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, reason)
        return list(found)

    def _asked(self, ask: Callable[[], Any]) -> Any:
        """What the reward answers.

        Raises:
            Refusal: it refuses or fails.
        """
        try:
            return ask()
        except UserError as error:
            raise Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error
        except BaseException as error:  # whatever a user's reward raises; Ctrl-C reaches the main thread alone
            log.error("reward %s failed: %s", self._name, told(error))
            raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, told(error)) from error


def _listening(address: tuple[str, int]) -> socket.socket:
    """A socket that clients can connect to.

    Raises:
        UserError: the address is taken, or is none of this machine's.
    """
    host, port = address
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name == "posix":  # on Windows this would let two servers have one port
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(connections.CONNECTIONS)
    except OSError as error:
        made.close()
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from error
    return made


def _length(request: Request, most: int) -> int:
    """How many bytes a request's body has.

    Raises:
        Refusal: it does not say, or more than so many.
    """
    given = request.headers.get("content-length")
    if given is None or "transfer-encoding" in request.headers:  # which would count instead
        raise Refusal(HTTPStatus.LENGTH_REQUIRED, "the request must say its Content-Length")
    if int(given) > most:
        raise Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the body has {given} bytes, of {most} allowed; send fewer pictures, or raise --max-megabytes",
        )
    return int(given)


def identity(label: str, term: RewardTerm, scoring: ScoringConfig) -> tuple[str, str]:
    """Name and version of a reward as served: the same for two servers if, and only if, they give the same rewards.

    The version changes with this package or the one that the reward comes from, its precision and options, and the file
    of a user's own. Of options that are places, what lies there counts.
    """
    name = term.name(label)
    path, _, attribute = name.rpartition(":")
    shown = f"{Path(path).name}:{attribute}" if is_from_file(name) else name
    package = REWARDS.get(name).package
    theirs = installed_version(package) if package else ""
    precision = term.scoring(scoring).precision
    options = {key: _content(key, value) for key, value in term.options.items()}
    settings = json.dumps([precision, options, files_hash([name]), theirs], sort_keys=True)
    return shown, f"{dgpo_plugin.__version__}+{hashlib.sha256(settings.encode()).hexdigest()[:12]}"


def _content(key: str, value: Any) -> Any:
    """What an option comes to: the hash of what lies there, if it is a place."""
    is_place = isinstance(value, str) and may_be_path(key, value) and exists(Path(value))
    return path_hash(Path(value)) if is_place else value


def serve(
    rewards: Mapping[str, RewardTerm],
    scoring: ScoringConfig,
    address: tuple[str, int],
    token: str | None,
    most_bytes: int,
    tell: Callable[[str], object],
) -> None:
    """Load a reward and serve it until a signal: returns after SIGTERM and its like.

    Args:
        rewards: one, by its label.
        address: host and port.
        tell: is given one line once the server is ready, and another if it waits for requests in flight.

    Raises:
        Stopped: it was Ctrl-C.
    """
    ((label, term),) = rewards.items()
    serves = identity(label, term, scoring)
    reward = load_reward(label, term, scoring)
    # Of pictures that are odd or large; what is wrong with one is told to its client.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    timeout = term.scoring(scoring).timeout
    server = RewardServer(
        reward, serves, address=address, token=token, most_bytes=most_bytes, timeout=timeout, tell=tell
    )
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    tell(f"serving {serves[0]} {serves[1]} at http://{shown}:{server.address[1]}; Ctrl-C ends it")
    if server.run() == signal.SIGINT:
        raise Stopped("stopped; the requests in flight were answered")
