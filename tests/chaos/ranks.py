"""A run on several processes, of which one is harmed: the others say so in one line and end, and the run goes on."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from safetensors.torch import load_file

from .cases import TINY, Campaign, Run
from .forks import Command, Ended, beside, end, hold_memory
from .results import results

CLOSE = 1e-3
"""Of the adapter's norm: how far apart runs of different numbers of processes may be."""
ANSWER = 20
"""Seconds that a process waits for the others here."""
GONE = "error: another process is gone, or did not answer within training.process_timeout"


@dataclass
class Ranks:
    """A run on several processes.

    Attributes:
        run: whose folder, settings and random moments are used.
    """

    run: Run
    reward: Path
    seen: list[str] = field(default_factory=list)

    def start(self, count: int, **reward: str) -> list[Command]:
        """Start as many processes as a launcher would.

        Args:
            reward: what the reward is to do, as its environment (see ``REWARD``).
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        commands = []
        for rank in range(count):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1"}
            self.run.environment = {name: str(value) for name, value in places.items()} | meeting | reward
            if count == 1:
                self.run.environment = dict(reward)
            commands.append(self.run.go())
        return commands

    def all_end(self, commands: list[Command]) -> list[Ended]:
        """Wait for every process's end."""
        ended = []
        for n, command in enumerate(commands):
            with beside(*commands[n + 1 :]):
                ended.append(end(command))
        return ended


REWARD = '''
import os, time

def reward(images, prompts):
    """The mean, but on the rank that is told to be slow or to fail: of its calls, the third."""
    reward.calls += 1
    if os.environ.get("RANK") == "1" and reward.calls == 3:
        time.sleep(float(os.environ.get("CHAOS_SLEEP", "0")))
        if os.environ.get("CHAOS_RAISES"):
            raise ValueError("the judge is out")
        if os.environ.get("CHAOS_LEAVES"):
            raise SystemExit(0)
    return images.mean((1, 2, 3))

reward.calls = 0
'''


def make_ranks(campaign: Campaign, folder: Path, rng: random.Random) -> Ranks:
    """A run with a reward of its own that can be slow or fail on one process."""
    file = folder.parent / "judge.py"
    file.write_text(REWARD)
    settings = (*TINY, f"rewards={file}:reward", f"training.process_timeout={ANSWER}", "scoring.retries=0")
    return Ranks(Run(campaign, folder, rng, settings), file)


def ends(ranks: Ranks, ended: list[Ended], harmed: int | None, codes: set[int], what: str) -> None:
    """Check each process's end: the harmed one's exit code, and one line on every other."""
    for rank, one in enumerate(ended):
        told, last = f"{what}: process {rank} ended with {one.code}", one.said.strip().splitlines()[-6:]
        ranks.run.must(one.code != 1000, f"{told}: it hung")
        ranks.run.must("Traceback" not in one.said and "left behind" not in one.said, f"{told}: {last}")
        if rank == harmed:
            ranks.run.must(one.code in codes, f"{told}: {last}")
        else:
            ranks.run.must(one.code in (0, 2, 130), f"{told}: {last}")
            ranks.run.must(one.code == 0 or len(one.errors) == 1, f"{told}, not in one line: {last}")


# ---- what is done to one of two


def killed(ranks: Ranks) -> None:
    """SIGKILL to one process."""
    commands, harmed = ranks.start(2), ranks.run.rng.randrange(2)
    _sleep(commands, ranks.run.moment() * 2)
    with contextlib.suppress(ProcessLookupError):
        os.kill(commands[harmed].pid, signal.SIGKILL)
    ended = ranks.all_end(commands)
    ranks.run.campaign.kills += ended[harmed].code == -signal.SIGKILL
    ends(ranks, ended, harmed, {0, -signal.SIGKILL, 2}, f"process {harmed} killed")


def hangs(ranks: Ranks) -> None:
    """SIGSTOP to one process: it keeps its connections, so that only the clock tells."""
    commands, harmed = ranks.start(2), ranks.run.rng.randrange(2)
    _sleep(commands, ranks.run.moment() * 2)
    with contextlib.suppress(ProcessLookupError):
        os.kill(commands[harmed].pid, signal.SIGSTOP)
    with beside(*commands):
        other = end(commands[1 - harmed])
    os.kill(commands[harmed].pid, signal.SIGKILL)
    stopped = end(commands[harmed])
    ended = [stopped, other] if harmed == 0 else [other, stopped]
    ends(ranks, ended, harmed, {0, -signal.SIGKILL}, f"process {harmed} hangs")


def asked_to_stop(number: int, everyone: bool) -> Callable[[Ranks], None]:
    """A signal that asks to stop, to one process or to all."""

    def harm(ranks: Ranks) -> None:
        commands, harmed = ranks.start(2), ranks.run.rng.randrange(2)
        _sleep(commands, ranks.run.moment() * 2)
        for command in commands if everyone else [commands[harmed]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(command.pid, number)
        name = signal.Signals(number).name
        ends(ranks, ranks.all_end(commands), harmed, {0, 2, 130, -number}, f"{name} to {'all' if everyone else harmed}")

    return harm


def out_of_memory(ranks: Ranks) -> None:
    """One process gets no more memory (RLIMIT_AS) from a random moment on."""
    commands, harmed = ranks.start(2), ranks.run.rng.randrange(2)
    _sleep(commands, ranks.run.moment() * 2)
    with contextlib.suppress(psutil.Error):
        hold_memory(commands[harmed], psutil.Process(commands[harmed].pid).memory_info().vms)
    ended = ranks.all_end(commands)
    ends(ranks, ended, harmed, {0, 1, 2, -signal.SIGABRT, -signal.SIGSEGV}, f"process {harmed} without memory")


def judge(what: str, code: int, **reward: str) -> Callable[[Ranks], None]:
    """The reward of one process is slow, or fails."""

    def harm(ranks: Ranks) -> None:
        ended = ranks.all_end(ranks.start(2, **reward))
        ends(ranks, ended, 1, {code, 0 if not ranks.run.is_over else code}, what)
        ranks.run.must({one.code for one in ended} <= {0, code}, f"{what}: exit codes {[one.code for one in ended]}")

    return harm


KINDS: dict[str, Callable[[Ranks], None]] = {
    "one of two killed": killed,
    "one of two hangs": hangs,
    "one of two out of memory": out_of_memory,
    "SIGTERM to one of two": asked_to_stop(signal.SIGTERM, everyone=False),
    "SIGTERM to both": asked_to_stop(signal.SIGTERM, everyone=True),
    "SIGHUP to both": asked_to_stop(signal.SIGHUP, everyone=True),
    "SIGUSR1 to one of two": asked_to_stop(signal.SIGUSR1, everyone=False),
    "a slow judge": judge("a slow judge", 0, CHAOS_SLEEP="3"),
    "a judge slower than the time-out": judge("a judge that is too slow", 2, CHAOS_SLEEP=str(2 * ANSWER)),
    "a judge that fails": judge("a judge that fails", 2, CHAOS_RAISES="1"),
    "a judge that leaves": judge("a judge that leaves", 2, CHAOS_LEAVES="1"),
}


def play_ranks(campaign: Campaign, number: int, seed: int) -> str:
    """Harm a run on two processes, let it end on one, two or three, and compare it with one left alone on two."""
    rng, whole = random.Random(f"{seed}/ranks/{number}"), campaign.root / "ranks" / "run"
    if not whole.exists():
        whole.parent.mkdir()
        calm = make_ranks(campaign, whole, rng)
        for one in calm.all_end(calm.start(2)):
            if one.code:
                raise RuntimeError(one.said)
    kind = list(KINDS)[number % len(KINDS)]
    folder = campaign.root / f"ranks-{number:04d}" / "run"
    folder.parent.mkdir()
    ranks = make_ranks(campaign, folder, rng)
    KINDS[kind](ranks)
    campaign.harms[kind] = campaign.harms.get(kind, 0) + 1
    count = rng.choice((1, 2, 2, 3))
    ends(ranks, ranks.all_end(ranks.start(count)), None, {0}, f"left alone on {count}")
    if not ranks.run.is_over:
        ranks.run.must(False, f"it did not end on {count}")
    elif count == 2:
        ranks.run.must(results(folder) == results(whole), "it is not the run left alone, to the bit")
    else:
        ranks.run.must(_distance(folder, whole) < CLOSE, f"on {count} it is {_distance(folder, whole):.2g} away")
    campaign.lost += [f"ranks {number} ({kind}): {what}" for what in ranks.run.seen]
    return kind


def _distance(folder: Path, other: Path) -> float:
    a, b = (load_file(each / "adapter.safetensors") for each in (folder, other))
    apart = sum(float((a[name] - b[name]).square().sum()) for name in a)
    return float((apart / sum(float(tensor.square().sum()) for tensor in a.values())) ** 0.5)


def _sleep(commands: list[Command], seconds: float) -> None:
    until = commands[-1].started + seconds
    while time.monotonic() < until and all(psutil.pid_exists(command.pid) for command in commands):
        time.sleep(0.01)
