"""A running ComfyUI, and what its browser would say to it."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.comfy_nodes.environment import PYTHON, SERVER

START = 180.0
"""Seconds a start may take on a busy machine."""

Graph = Mapping[str, Mapping[str, Any]]


class BadPrompt(Exception):
    """POST /prompt answered 400; ``answer`` is its body."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(json.dumps(answer))
        self.answer = answer


def _die_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Server:
    """ComfyUI on a free port, with ``base`` for its models, packs and output.

    Args:
        front_end: the front end's files; None for an empty page.
    """

    def __init__(self, base: Path, front_end: Path | None = None) -> None:
        self.base = base
        for name in ("custom_nodes", "models", "input", "output", "user", "front"):
            (base / name).mkdir(parents=True, exist_ok=True)
        (base / "front" / "index.html").touch()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        command = [PYTHON, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", base, "--disable-api-nodes", "--front-end-root", front_end or base / "front"]
        command += ["--database-url", "sqlite:///:memory:"]
        self._log = base / "server.log"
        # What a test runner sets for itself must not reach the server.
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "ACCELERATE_USE_CPU")}
        self.process = subprocess.Popen(
            [str(word) for word in command],
            cwd=SERVER,
            stdout=self._log.open("w"),
            stderr=subprocess.STDOUT,
            env={**clean, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        atexit.register(self.stop)
        self._wait_until_up()

    def _wait_until_up(self) -> None:
        end = time.monotonic() + START
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended:\n{self.log()[-3000:]}")
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"the server did not come up in {START:.0f} s:\n{self.log()[-3000:]}")

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            body = answer.read()
        return json.loads(body) if answer.headers.get_content_type() == "application/json" else body

    def post(self, path: str, body: object) -> Any:
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            if error.code == 400:
                raise BadPrompt(json.loads(error.read())) from error
            raise
        return json.loads(text) if text else None

    @contextlib.contextmanager
    def listening(self, client: str) -> Iterator[Callable[[], list[dict[str, Any]]]]:
        """What the server has told a browser so far, by message."""
        file = self.base / f"{client}.jsonl"
        with file.open("w") as sink:
            command = [PYTHON, Path(__file__).with_name("listen.py"), self.address, client]
            listener = subprocess.Popen([str(word) for word in command], stdout=sink, preexec_fn=_die_with_parent)

        def messages() -> list[dict[str, Any]]:
            lines = file.read_text().splitlines(keepends=True)
            return [json.loads(line) for line in lines if line.endswith("\n")]

        try:
            until(lambda: messages(), "the server's greeting")
            yield messages
        finally:
            listener.kill()
            listener.wait()

    def queue(self, graph: Graph, client: str = "") -> str:
        """Its id.

        Raises:
            BadPrompt: the server refuses it.
        """
        answer = self.post("/prompt", {"prompt": graph, "client_id": client})
        assert not answer["node_errors"], answer
        return str(answer["prompt_id"])

    def wait(self, prompt: str, timeout: float = 300) -> dict[str, Any]:
        """Its entry in the history, once it has ended in whatever way."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            found = self.get(f"/history/{prompt}")
            if prompt in found:
                entry: dict[str, Any] = found[prompt]
                return entry
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended:\n{self.log()[-3000:]}")
            time.sleep(0.05)
        raise TimeoutError(f"prompt {prompt} still runs after {timeout:.0f} s:\n{self.log()[-3000:]}")

    def run(self, graph: Graph) -> dict[str, Any]:
        """The outputs of a prompt that must succeed, by node."""
        entry = self.wait(self.queue(graph))
        assert entry["status"]["status_str"] == "success", json.dumps(entry["status"], indent=1)[-3000:]
        outputs: dict[str, Any] = entry["outputs"]
        return outputs

    def error(self, graph: Graph) -> dict[str, Any]:
        """What went wrong in a prompt that must fail while it runs: node_id, exception_type, exception_message."""
        entry = self.wait(self.queue(graph))
        failures = [details for kind, details in entry["status"]["messages"] if kind == "execution_error"]
        assert failures, json.dumps(entry["status"])[-2000:]
        return dict(failures[0])


def until(happened: Callable[[], Any], what: str, timeout: float = 120) -> Any:
    """Wait for something, and give it back."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if found := happened():
            return found
        time.sleep(0.02)
    raise TimeoutError(f"waited {timeout:.0f} s for {what}")


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """One of a graph's nodes; a link is ["node", output]."""
    return {"class_type": kind, "inputs": inputs}
