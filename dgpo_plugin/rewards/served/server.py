"""A reward in a process, environment or machine of its own: ``dgpo serve-reward``.

    GET  /health   -> {"name": ..., "version": ..., "ready": true}, and "title" if the reward calls itself something
    POST /check {"prompts": [{"text": ..., "metadata": {...}}, ...]}
                   -> {"name": ..., "version": ..., "problems": [one line, ...]}     of prompts that it cannot judge
    POST /score {"images": [PNG in base64, ...], "prompts": as there}
                   -> {"name": ..., "version": ..., "rewards": [...]}

Every answer says what gave it: a server may be another after a restart that no client noticed. Anything else is
answered with a status of 400 or more and ``{"error": one line}``. Connections are short, limited in number, and each
must have sent its request within :data:`READ_SECONDS`. A token is checked before any body is read.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import io
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.metadata import version as installed_version
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import dgpo_plugin
from dgpo_plugin.common.content import path_hash
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.user_file import files_hash, is_from_file, told
from dgpo_plugin.config.fields import RewardTerm, ScoringConfig
from dgpo_plugin.config.places import exists, may_be_path
from dgpo_plugin.distributed.device import make_current, this_device
from dgpo_plugin.rewards.base import Reward, checked_rewards
from dgpo_plugin.rewards.load import load_reward
from dgpo_plugin.rewards.registry import REWARDS
from dgpo_plugin.rewards.served.wire import is_loopback

MOST_PICTURES = 256
"""In a request."""
MOST_PIXELS = 2**26
"""In a request, all pictures together: 64 of 1024 x 1024. They take 12 bytes a pixel once decoded."""
READ_SECONDS = 60.0
"""Within which a whole request must have come."""
SILENCE_SECONDS = 10.0
"""Without a byte, after which a connection is given up."""
CONNECTIONS = 64
"""At once; further ones wait until one ends."""
METHODS = {"/health": "GET", "/check": "POST", "/score": "POST"}

log = logging.getLogger(__name__)


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(" ".join(reason.split()))
        self.status = status


class RewardServer(ThreadingTCPServer):
    """Scores one request at a time; others wait.

    Args:
        port: 0 for any that is free; ``server_address`` then tells.
        token: that every request must bring; None for none, which only a loopback address allows.
        most_bytes: of a request's body.

    Raises:
        UserError: the address is taken, or would be open to others without a token.
    """

    daemon_threads = True
    # On Windows this would let two servers have one port.
    allow_reuse_address = os.name == "posix"
    request_queue_size = 128

    def __init__(
        self,
        reward: Reward,
        name: str,
        version: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        most_bytes: int = 64 * 2**20,
    ) -> None:
        if token is None and not is_loopback(host):
            raise UserError(f"--host {host}: others can reach it, so it needs a token; give --token-variable")
        self.reward, self.name, self.version = reward, name, version
        self.token, self.most_bytes = token, most_bytes
        self._device = this_device()
        self.turn = threading.Lock()
        self._places = threading.Semaphore(CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise UserError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from error

    def score(self, body: bytes) -> list[float]:
        """The rewards that a request's body asks for.

        Raises:
            Refusal: it is malformed or too large, or the reward refuses or fails.
        """
        images, prompts = read_request(body)
        try:
            make_current(self._device)
            return [float(value) for value in checked_rewards(self.reward, images, prompts, self.name)]
        except UserError as error:
            raise Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error
        except BaseException as error:  # whatever a user's reward raises; Ctrl-C reaches the main thread alone
            log.exception("reward %s failed", self.name)
            raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, told(error)) from error

    def check(self, body: bytes) -> list[str]:
        """What the reward says of a request's prompts.

        Raises:
            Refusal: it is malformed, or the reward fails.
        """
        prompts = read_check_request(body)
        try:
            return self.reward.check(prompts)
        except UserError as error:
            raise Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error
        except BaseException as error:  # as above
            log.exception("reward %s failed", self.name)
            raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, told(error)) from error

    def process_request(self, request: Any, client_address: Any) -> None:
        self._places.acquire()
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""
        log.debug("connection of %s broken off", client_address, exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """One connection: requests read within limits, answers in JSON."""

    server: RewardServer
    timeout = SILENCE_SECONDS
    server_version, sys_version = "dgpo", ""

    def setup(self) -> None:
        super().setup()
        self._all_read = False
        self._cutoff = threading.Timer(READ_SECONDS, self._cut_off)
        self._cutoff.daemon = True
        self._cutoff.start()

    def finish(self) -> None:
        self._cutoff.cancel()
        super().finish()

    def _cut_off(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def _handle(self) -> None:
        try:
            self._answer(HTTPStatus.OK, self._served())
        except Refusal as refusal:
            self._answer(refusal.status, {"error": str(refusal)})
            if not self._all_read:
                self._linger()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _handle

    def _served(self) -> dict[str, Any]:
        given = self.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if self.server.token and not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            raise Refusal(HTTPStatus.UNAUTHORIZED, "the token is missing or wrong")
        if self.path not in METHODS:
            raise Refusal(HTTPStatus.NOT_FOUND, "there are GET /health, POST /check and POST /score only")
        if self.command != METHODS[self.path]:
            raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, f"{self.path} takes {METHODS[self.path]} only")
        serves = {"name": self.server.name, "version": self.server.version}
        if self.path == "/health":
            title = {"title": self.server.reward.title} if self.server.reward.title else {}
            return {**serves, **title, "ready": True}
        body = self._body()
        self._all_read = True
        self._cutoff.cancel()
        with self.server.turn:
            if self.path == "/check":
                return {**serves, "problems": self.server.check(body)}
            return {**serves, "rewards": self.server.score(body)}

    def _body(self) -> bytes:
        given = self.headers.get("Content-Length", "")
        if not given.isascii() or not given.isdigit() or len(given) > 15:
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "the request must say its Content-Length")
        length, most = int(given), self.server.most_bytes
        if length > most:
            raise Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body has {length} bytes, of {most} allowed; send fewer pictures, or raise --max-megabytes",
            )
        try:
            body = self.rfile.read(length)
        except TimeoutError as error:
            raise Refusal(HTTPStatus.REQUEST_TIMEOUT, f"nothing came for {SILENCE_SECONDS:g} s") from error
        if len(body) < length:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"the body ended after {len(body)} of {length} bytes")
        return body

    def _answer(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _linger(self) -> None:
        """Take what is still being sent, so that the client reads the answer and not of a reset connection."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.rfile.read1(2**16):
                pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses by itself, in JSON too."""
        self._answer(HTTPStatus(code), {"error": message or HTTPStatus(code).phrase})

    def log_message(self, format: str, *args: Any) -> None:
        log.info("%s %s", self.client_address[0], format % args)


def read_request(body: bytes) -> tuple[Tensor, list[Prompt]]:
    """Pictures (N, 3, H, W) in [0, 1] and N prompts.

    Raises:
        Refusal: 413 for too many pictures or pixels, 400 for all else.
    """
    content = _json_object(body, ["images", "prompts"])
    texts, prompts = content["images"], content["prompts"]
    if not isinstance(texts, list) or not isinstance(prompts, list) or len(texts) != len(prompts) or not texts:
        raise _malformed("images and prompts must be lists of the same length, at least 1")
    if len(texts) > MOST_PICTURES:
        raise Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{len(texts)} pictures, of {MOST_PICTURES} allowed; send fewer"
        )
    read = [_prompt(prompt, f"prompts[{at}]") for at, prompt in enumerate(prompts)]
    return _pictures(texts), read


def read_check_request(body: bytes) -> list[Prompt]:
    """The prompts that are to be checked.

    Raises:
        Refusal: it is malformed.
    """
    prompts = _json_object(body, ["prompts"])["prompts"]
    if not isinstance(prompts, list):
        raise _malformed("prompts must be a list")
    return [_prompt(prompt, f"prompts[{at}]") for at, prompt in enumerate(prompts)]


def _json_object(body: bytes, keys: Sequence[str]) -> dict[str, Any]:
    """A request's body, an object with these keys and no others."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _malformed("the body is not JSON") from error
    if not isinstance(content, dict) or content.keys() != set(keys):
        raise _malformed(f"the body must be an object with {' and '.join(keys)}")
    return content


def _prompt(content: Any, where: str) -> Prompt:
    if not isinstance(content, dict) or not {"text"} <= content.keys() <= {"text", "metadata"}:
        raise _malformed(f"{where} must be an object with text and, if it has any, metadata")
    text, metadata = content["text"], content.get("metadata", {})
    if not isinstance(text, str) or not isinstance(metadata, dict):
        raise _malformed(f"{where}: text must be a string and metadata an object")
    return Prompt(text, metadata)


def _pictures(texts: Sequence[Any]) -> Tensor:
    """The pictures of a request, all of one size; nothing is decoded before all sizes are known and allowed."""
    opened = [_opened(text, f"images[{at}]") for at, text in enumerate(texts)]
    width, height = opened[0].size
    for at, picture in enumerate(opened):
        if picture.size != (width, height):
            raise _malformed(f"images[{at}] is {picture.size}, images[0] {(width, height)}; send one size a request")
    if width * height * len(opened) > MOST_PIXELS:
        raise Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"{len(opened)} pictures of {width} x {height}: more than {MOST_PIXELS} pixels; send fewer or smaller ones",
        )
    images = torch.empty(len(opened), 3, height, width)
    for at, picture in enumerate(opened):
        try:
            pixels = np.array(picture.convert("RGB"))
        except Exception as error:  # Pillow has no one class for a broken file
            raise _malformed(f"images[{at}] is a broken PNG") from error
        images[at] = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    return images


def _opened(text: Any, where: str) -> Image.Image:
    """A picture of which only the head has been read."""
    if not isinstance(text, str):
        raise _malformed(f"{where} must be a string")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _malformed(f"{where} is not base64") from error
    try:
        return Image.open(io.BytesIO(data), formats=["PNG"])
    except Image.DecompressionBombError as error:
        raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{where} has too many pixels") from error
    except Exception as error:  # as above
        raise _malformed(f"{where} is not a PNG") from error


def _malformed(reason: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, reason)


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
    """Load a reward and serve it until Ctrl-C.

    Args:
        rewards: one, by its label.
        address: host and port.
        tell: is given one line once the server is ready.
    """
    ((label, term),) = rewards.items()
    name, version = identity(label, term, scoring)
    host, port = address
    with RewardServer(
        load_reward(label, term, scoring), name, version, host=host, port=port, token=token, most_bytes=most_bytes
    ) as server:
        shown = f"[{host}]" if ":" in host else host
        tell(f"serving {name} {version} at http://{shown}:{server.server_address[1]}; Ctrl-C ends it")
        with suppress(KeyboardInterrupt):
            server.serve_forever()
