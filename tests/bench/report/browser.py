"""A page in a real browser: Chromium, driven over its own pipe (Chrome DevTools Protocol); nothing to install."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One tab of a browser.

    Attributes:
        requests: the address of everything that was asked for, data URIs apart.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self._from, self._to = reading, writing
        self._buffer, self._last, self._session = b"", 0, ""
        self.requests: list[str] = []
        target = self.send("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self.send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.send(f"{domain}.enable")

    def send(self, method: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Call a method of the protocol and wait for what it answers."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters or {}}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path: Path, width: int, scheme: str) -> None:
        """Show a page as a screen of that width and color scheme does, and wait until it is all there."""
        mobile = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        self.send("Emulation.setDeviceMetricsOverride", mobile)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", {"features": features})
        self.requests.clear()
        self.send("Page.navigate", {"url": path.resolve().as_uri()})
        while self.evaluate("document.readyState") != "complete" or self.evaluate("location.href") == "about:blank":
            pass

    def evaluate(self, script: str) -> Any:
        """What an expression is in the page."""
        answer = self.send("Runtime.evaluate", {"expression": script, "returnByValue": True})
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._from, 1 << 16)
            assert part, "the browser is gone"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            address = message["params"]["request"]["url"]
            self.requests += [] if address.startswith("data:") else [address]
        return message


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser without a window, with a profile of its own, that is gone afterwards."""
    assert CHROMIUM, "no Chromium here"
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()

    def places() -> None:  # the protocol's: it reads from 3 and writes to 4
        first, second = os.dup(theirs_in), os.dup(theirs_out)
        os.dup2(first, 3)
        os.dup2(second, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        process = subprocess.Popen(
            command, preexec_fn=places, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Browser(ours_in, ours_out)
        finally:
            os.close(ours_out)
            os.close(ours_in)
            process.terminate()
            process.wait(30)


def fits_and_follows(tab: Browser, page: Path, scheme: str) -> None:
    """Show a page on a phone: it asks for nothing else, nothing reaches past the screen, and it is dark if asked."""
    tab.open(page, 390, scheme)
    assert tab.requests == [page.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    # Nothing reaches past the screen but what scrolls inside its own box.
    wide = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg') && "
    assert tab.evaluate(f"{wide}e.getBoundingClientRect().right > 391).map(e => e.outerHTML.slice(0, 80))") == []
    background = "getComputedStyle(document.querySelector('{}')).backgroundColor.match(/[0-9.]+/g).map(Number)"
    for where in ("body", "figure.figure"):
        assert (max(tab.evaluate(background.format(where))[:3]) < 80) == (scheme == "dark")
