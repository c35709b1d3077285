"""Connections to a reward server, within limits: heads, bodies and answers must move on, and their number has an end.

uvicorn bounds neither the time a request's head may take (its time-out begins after an answer) nor, fairly, the number
of connections (beyond ``limit_concurrency`` it refuses whoever comes next): :class:`Connection` adds both to its own
protocol, ``uvicorn.protocols.http.h11_impl``.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dgpo_plugin.common.signals import ENDING, handled, heeded

CONNECTIONS = 256
"""At once; for a further one, the oldest whose request has not come whole gives way."""
HEAD_SECONDS = 10.0
"""Within which a request's head must have come."""
READ_SECONDS = 60.0
"""Within which a whole request must have come."""
SILENCE_SECONDS = 10.0
"""Without a byte of a body, or with an answer that is not taken, after which a connection is given up."""
STOPPING = ("SIGINT", *ENDING, "SIGBREAK")
"""Signals that end a server after the requests in flight: Ctrl-C, a cluster's, a closed terminal's, Slurm's."""


class Connections:
    """The connections that are open, and how many bytes of requests are held for them.

    Args:
        most_bytes: that may be held at once.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held = 0
        self._open: dict[Connection, None] = {}

    def opened(self, connection: Connection) -> None:
        """Count one more, and end the oldest of those that keep others waiting if there are too many."""
        self._open[connection] = None
        if len(self._open) > CONNECTIONS:
            self._end_the_oldest()

    def closed(self, connection: Connection) -> None:
        """Count one less."""
        self._open.pop(connection, None)

    def hold(self, count: int) -> None:
        """Note bytes that came, and make room if they are too many; negative for what is let go."""
        self._held += count
        if count > 0 and self._held > self._most_bytes:
            self._end_the_oldest()

    def _end_the_oldest(self) -> None:
        for connection in self._open:
            if not connection.has_all():
                self._open.pop(connection)
                connection.transport.abort()
                return


class Connection(H11Protocol):
    """One request and its answer."""

    def __init__(self, *args: Any, connections: Connections, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._all = connections
        self._cutoff: asyncio.TimerHandle | None = None
        self._refused = False

    def has_all(self) -> bool:
        """Whether the whole request has come."""
        return self.cycle is not None and not self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._end_in(HEAD_SECONDS)
        self._all.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._let_be()
        self._all.closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        before = self.cycle
        super().data_received(data)
        if before is None and self.cycle is not None:
            self._let_be()  # the application minds the body

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._end_in(SILENCE_SECONDS)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._end_in(SILENCE_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._let_be()

    def send_400_response(self, msg: str) -> None:
        """What the protocol refuses by itself, in JSON as everything else."""
        # Called while h11's error is handled, which knows better: 431 for a head that is too long.
        hint = getattr(sys.exc_info()[1], "error_status_hint", HTTPStatus.BAD_REQUEST)
        status = HTTPStatus(hint if hint < 500 else HTTPStatus.BAD_REQUEST)
        if self.cycle is not None and self.cycle.response_started:
            self.transport.abort()
            return
        data = json.dumps({"error": f"not a request that can be read ({status.phrase})"}).encode()
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.transport.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        self._refused = True
        # Closed at once, with bytes unread, the connection would be reset, and the answer lost.
        self.transport.write_eof()
        self._end_in(SILENCE_SECONDS)

    def shutdown(self) -> None:
        if self._refused:
            self.transport.abort()
            return
        super().shutdown()
        if not self.has_all():
            self._end_in(SILENCE_SECONDS)

    def _end_in(self, seconds: float) -> None:
        self._let_be()
        self._cutoff = self.loop.call_later(seconds, self.transport.abort)

    def _let_be(self) -> None:
        if self._cutoff is not None:
            self._cutoff.cancel()
            self._cutoff = None


class Server(uvicorn.Server):
    """uvicorn's server, ended by a signal after the requests in flight, and at once by a second.

    Args:
        tell: is given one line when requests in flight are waited for.

    Attributes:
        signal: that ended it; None if none did.
    """

    def __init__(self, config: uvicorn.Config, tell: Callable[[str], object]) -> None:
        super().__init__(config)
        self.signal: int | None = None
        self._tell = tell

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Have signals drain the server; uvicorn's own would raise them again once it has ended."""

        def stop(number: int, _frame: FrameType | None) -> None:
            if self.signal is not None:
                os._exit(128 + number)
            self.signal, self.should_exit = number, True
            if self.server_state.tasks:
                self._tell("answering the requests in flight; a second signal ends at once")

        with handled(heeded(STOPPING), stop):
            yield
