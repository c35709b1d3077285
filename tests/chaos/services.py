"""A reward server that dies or is started again, and a comparison whose processes are killed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from dgpo_bench.commands import main as bench
from dgpo_plugin.commands.main import main as dgpo
from dgpo_plugin.training.checkpoint import checkpoints
from tests.bench.test_compare import small_preset

from .cases import TINY, Campaign, Run, finish, told
from .forks import Command, Way, beside, end, start

# ---- a reward server


def _served(port: int, folder: Path, *options: str) -> Command:
    """A reward server in a fork, once it answers."""
    server = start(dgpo, ["serve-reward", "brightness", "--port", str(port), *options], folder)
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return server
        time.sleep(0.05)


def _kill(server: Command) -> None:
    os.kill(server.pid, signal.SIGKILL)
    end(server)


def dies(run: Run, server: Command, port: int) -> Command:
    """The server is killed at a random moment, and started again when the run has ended."""
    command = run.go()
    run.wait(command, run.moment())
    with beside(command):
        _kill(server)
    told(run, end(command), {0, 2}, "dead reward server")
    return _served(port, run.folder.parent)


def starts_again(run: Run, server: Command, port: int) -> Command:
    """The server is killed at a random moment, and started again at once."""
    command = run.go()
    run.wait(command, run.moment())
    with beside(command):
        _kill(server)
        server = _served(port, run.folder.parent)
    with beside(server):
        told(run, end(command), {0, 2}, "restarted reward server")  # 2: it is asked once before the first picture
    return server


def another_version(run: Run, server: Command, port: int) -> Command:
    """The server is killed at a random moment and another version takes its place, which no run goes on with."""
    command = run.go()
    run.wait(command, run.moment())
    began = bool(checkpoints(run.folder))
    with beside(command):
        _kill(server)
        server = _served(port, run.folder.parent, "--set", "precision=bf16")
    with beside(server):
        told(run, end(command), {0, 2}, "another version")
        if began and not run.is_over:
            told(run, end(run.go()), {2}, "gone on with another version")
    _kill(server)
    if not began:  # it may have begun with that version, and so be another run
        shutil.rmtree(run.folder, ignore_errors=True)
    return _served(port, run.folder.parent)


SERVERS: dict[str, Callable[[Run, Command, int], Command]] = {
    "dead reward server": dies,
    "restarted reward server": starts_again,
    "reward server of another version": another_version,
}


def play_server(campaign: Campaign, number: int, seed: int) -> str:
    """Rob a run of its reward server, let it end with one, and compare it.

    A picture reaches the server as PNG, so that the run left alone, too, is one with a server.
    """
    rng = random.Random(f"{seed}/server/{number}")
    kind = list(SERVERS)[number % len(SERVERS)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    remote = f'rewards={{remote: {{options: {{urls: ["http://127.0.0.1:{port}"]}}}}}}'
    settings = (*(each for each in TINY if not each.startswith("rewards=")), remote, "scoring.retries=5")
    folders = [campaign.root / f"{name}-{number:04d}" / "run" for name in ("served", "served-whole")]
    for folder in folders:
        folder.parent.mkdir()
    run, calm = (Run(campaign, folder, rng, settings) for folder in folders)
    server = _served(port, run.folder.parent)
    with beside(server):
        told(run, end(calm.go()), {0}, "with a server left alone")
    server = SERVERS[kind](run, server, port)
    with beside(server):
        finish(run, calm.folder)
    _kill(server)
    campaign.harms[kind] = campaign.harms.get(kind, 0) + 1
    campaign.kills += 1
    campaign.lost += [f"server {number} ({kind}): {what}" for what in run.seen]
    return kind


# ---- a comparison


def play_comparison(campaign: Campaign, number: int, seed: int) -> str:
    """Kill a comparison, or one of its workers, at a random moment; the same command ends with the same adapters.

    Its workers are new interpreters, which take longer than what they do here.
    """
    rng = random.Random(f"{seed}/comparison/{number}")
    root = campaign.root / f"comparison-{number:04d}"
    root.mkdir()
    preset, run = small_preset(root), Run(campaign, root / "out", rng, real=True)

    def go(folder: Path) -> Command:
        arguments = ["compare", preset, "--size", "quick", "--output", str(folder), "--threads", "1", "--jobs", "1"]
        arguments += ["--algorithms", "dgpo", "--seeds", "1", "--evaluations", "2000"]
        return start(bench, arguments, folder, Way(program="dgpo_bench.commands"))

    calm = end(go(root / "whole"))
    told(run, calm, {0}, "a comparison left alone")
    victim = rng.choice(("comparison", "worker"))
    kinds = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP) if victim == "comparison" else (signal.SIGKILL,)
    signal_sent = rng.choice(kinds)
    command = go(run.folder)
    run.wait_on(command, command.started + rng.uniform(0.3, 0.9) * calm.seconds)
    for process in [command.pid] if victim == "comparison" else _workers(command.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal_sent)
    ended = end(command)
    if ended.code != -signal.SIGKILL:
        told(run, ended, {0, 2, 128 + signal_sent}, f"{victim} got {signal_sent.name}")
    run.must("left behind" not in ended.said, ended.said)
    campaign.kills += ended.code != 0
    told(run, end(go(run.folder)), {0}, "the same command again")
    run.must(_adapters(run.folder) == _adapters(root / "whole"), "its adapters are not those of one left alone")
    kind = f"{victim} of a comparison killed"
    campaign.harms[kind] = campaign.harms.get(kind, 0) + 1
    campaign.lost += [f"comparison {number} ({kind}): {what}" for what in run.seen]
    return kind


def _workers(pid: int) -> list[int]:
    """The processes of a comparison that import its code, and not multiprocessing's own helpers."""
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(pid).children()
        return [child.pid for child in children if "spawn_main" in " ".join(child.cmdline())]
    return []


def _adapters(folder: Path) -> dict[str, str]:
    found = sorted(folder.rglob("adapter.safetensors"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}
