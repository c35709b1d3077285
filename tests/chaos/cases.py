"""What is done to a run, at a random moment, and what must be true of it afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from accelerate.state import AcceleratorState

from dgpo_plugin.commands.main import main
from dgpo_plugin.commands.terminal import quieten
from dgpo_plugin.common.folder_lock import OWNER
from dgpo_plugin.config.load import load_config
from dgpo_plugin.training.build import build_trainer
from dgpo_plugin.training.checkpoint import checkpoints
from dgpo_plugin.training.run import identity_of

from .disk import Fault
from .forks import DISK_ERRORS, NOBODY, Command, Ended, Way, adopt_orphans, beside, end, fill_disk, start
from .results import differences

TINY = (
    "model.precision=fp32",
    "rewards=brightness",
    "training.prompts_per_iteration=2",
    "training.group_size=2",
    "training.iterations=5",
    "training.learning_rate=3.0e-3",
    "lora.rank=2",
    "lora.alpha=2",
    "evaluation.images=2",
    "evaluation.steps=1",
    "evaluation.guidance=1",
    "logging.sample_every=2",
    "logging.sample_images=2",
    "checkpoint.every=1",
    "checkpoint.keep=2",
    "rollout.steps=2",
    "algorithm.sampler=euler",
    "algorithm.rollout_guidance=1",
    "algorithm.reference_guidance=1",
    "algorithm.timesteps=1",
    "algorithm.noisiest_steps=1",
)
"""The smallest run that writes everything a run writes, several times."""
HITS = 3
"""At most so many times a run is harmed before it may end."""


@dataclass
class Campaign:
    """A sequence of cases.

    Attributes:
        root: where the runs lie.
        whole: a run that nobody disturbed.
        calm: how its command ended: the length, and the number of its operations on the folder.
        kills: processes that were ended by a signal.
        harms: by kind.
        lost: what went wrong, one line each, of which so many were ``told``.
    """

    root: Path
    whole: Path
    calm: Ended
    kills: int = 0
    harms: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    told: int = 0


def prepare(root: Path) -> Campaign:
    """Import everything once, as a run does, and do the run that nobody disturbs."""
    adopt_orphans()
    quieten()
    trainer = build_trainer(load_config("shapes", TINY))  # no backward pass: none could follow in a fork
    identity_of(trainer)
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001
    whole = root / "whole" / "run"
    changes = [part for setting in TINY for part in ("--set", setting)]
    calm = end(start(main, ["train", "shapes", "--output", str(whole), *changes], whole))
    if calm.code:
        raise RuntimeError(calm.said)
    return Campaign(root, whole, calm)


@dataclass
class Run:
    """One run of a campaign and what was seen of it.

    Attributes:
        real: whether by the real command.
        may_lack_lines: of its metrics: a disk that fails once may have taken a checkpoint, and not the line.
    """

    campaign: Campaign
    folder: Path
    rng: random.Random
    settings: tuple[str, ...] = TINY
    unprivileged: bool = False
    real: bool = False
    may_lack_lines: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether the adapter of all iterations is there."""
        last = checkpoints(self.folder)[-1:]
        return (self.folder / "adapter.safetensors").exists() and [path.name for path in last] == ["000005"]

    def arguments(self) -> list[str]:
        """The command that begins the run, or goes on with it."""
        if (self.folder / "config.yaml").exists():
            return ["resume", str(self.folder)]
        changes = [part for setting in self.settings for part in ("--set", setting)]
        return ["train", "shapes", "--output", str(self.folder), *changes]

    def go(self, fault: Fault | None = None, file_size: int | None = None) -> Command:
        """Start that command."""
        program = "dgpo_plugin" if self.real else ""
        way = Way(fault, file_size, self.unprivileged, self.environment, program)
        return start(main, self.arguments(), self.folder, way)

    def moment(self) -> float:
        """Seconds into a command's work, somewhere in the length of a calm one."""
        return self.rng.uniform(0, self.campaign.calm.seconds)

    def wait(self, command: Command, seconds: float) -> None:
        """Wait so long, from when a command is at work, but not beyond its end."""
        owner, since = self.folder / OWNER, command.started
        while not _is_over(command) and (time.monotonic() < since + seconds or self.real):
            with contextlib.suppress(OSError, ValueError):
                if self.real and json.loads(owner.read_text())["pid"] == command.pid:
                    self.wait_on(command, time.monotonic() + seconds)
                    return
            time.sleep(0.002)

    def wait_on(self, command: Command, until: float) -> None:
        """Wait until then, but not beyond a command's end."""
        while time.monotonic() < until and not _is_over(command):
            time.sleep(0.002)

    def operation(self) -> int:
        """The number of an operation on the folder, of about as many as a command has."""
        return self.rng.randint(1, self.campaign.calm.operations)

    def must(self, holds: bool, what: str) -> None:
        """Note what should be so, and is not."""
        if not holds:
            self.seen.append(what)


def told(run: Run, ended: Ended, codes: set[int], what: str) -> None:
    """Check an end that was not death itself: its exit code, one line that says why, and nothing left running."""
    last = ended.said.strip().splitlines()[-6:]
    run.must(ended.code in codes, f"{what}: exit code {ended.code} is none of {sorted(codes)}: {last}")
    trace = ended.said.partition("Traceback")[2].splitlines()[-12:]
    run.must("Traceback" not in ended.said, f"{what}: a traceback: {trace} {last}")
    run.must("left behind" not in ended.said, f"{what}: {last}")
    if ended.code > 0:
        run.must(len(ended.errors) == 1, f"{what}: {len(ended.errors)} lines tell why: {last}")


def died(run: Run, ended: Ended, number: int, what: str) -> None:
    """Check the end of a process that a signal may have killed, if it came in time."""
    if ended.code == -number:
        run.campaign.kills += 1
        run.must("left behind" not in ended.said, f"{what}: {ended.said}")
    else:
        told(run, ended, {0}, what)


# ---- what is done to a run


def by_signal(number: int, codes: set[int]) -> Callable[[Run], None]:
    """Send a signal at a random moment."""

    def harm(run: Run) -> None:
        command = run.go()
        run.wait(command, run.moment())
        with contextlib.suppress(ProcessLookupError):
            os.kill(command.pid, number)
        ended = end(command)
        if ended.code == -number and (number in (signal.SIGKILL, signal.SIGILL) or not ended.said):
            died(run, ended, number, signal.Signals(number).name)  # or before it had begun
        else:
            run.campaign.kills += ended.code != 0
            told(run, ended, codes | {0}, signal.Signals(number).name)

    return harm


def killed_writing(run: Run) -> None:
    """SIGKILL just before a random operation on the folder."""
    died(run, end(run.go(Fault(run.operation(), signal=signal.SIGKILL))), signal.SIGKILL, "killed while writing")


def disk_fails(name: str, stays: bool) -> Callable[[Run], None]:
    """A random operation on the folder is answered with an error (imitated), and all that follow, or not."""

    def harm(run: Run) -> None:
        at, run.may_lack_lines = run.operation(), True
        ended = end(run.go(Fault(at, DISK_ERRORS[name], stays)))
        told(run, ended, {0, 2}, f"{name} disk from operation {at}" if stays else f"{name} disk at operation {at}")

    return harm


def file_size(run: Run) -> None:
    """Writes fail from a random moment on: no file may grow beyond a few bytes (RLIMIT_FSIZE)."""
    run.may_lack_lines = True
    size = run.rng.choice((0, 1, 100, 1000, 10_000, 100_000))
    if run.rng.random() < 0.3:
        ended = end(run.go(file_size=size))
    else:
        command = run.go()
        run.wait(command, run.moment())
        fill_disk(command, size)
        ended = end(command)
    told(run, ended, {0, 2}, f"files of at most {size} bytes")


def read_only(run: Run) -> None:
    """The folder and all below loses its write permission, as seen by a user who is not root."""
    command = run.go()
    run.wait(command, run.moment())
    _permit(run.folder, 0o555)
    ended = end(command)
    told(run, ended, {0, 2}, "read-only folder")
    if run.rng.random() < 0.3 and not run.is_over:
        told(run, end(run.go()), {2}, "started in a read-only folder")
    _permit(run.folder, 0o755)


def removed(run: Run) -> None:
    """The folder is removed, as by rm -rf."""
    command = run.go()
    run.wait(command, run.moment())
    was_there = (run.folder / "config.yaml").exists()
    while run.folder.exists():
        shutil.rmtree(run.folder, ignore_errors=True)
    ended = end(command)
    told(run, ended, {2} if was_there and command.disk.count and not _was_done(ended) else {0, 2}, "removed folder")
    if ended.code == 2:
        run.must(not run.folder.exists(), f"removed folder: it was made again: {_names(run.folder)}")


def moved(run: Run) -> None:
    """The folder is moved away, and back when the command has ended."""
    command = run.go()
    run.wait(command, run.moment())
    away = run.folder.with_name("away")
    if not (run.folder / "config.yaml").exists():
        told(run, end(command), {0}, "not moved")
        return
    os.rename(run.folder, away)
    ended = end(command)
    told(run, ended, {0} if _was_done(ended) else {2}, "moved folder")
    run.must(not run.folder.exists(), f"moved folder: it was made again: {_names(run.folder)}")
    shutil.rmtree(run.folder, ignore_errors=True)
    os.rename(away, run.folder)


def two_writers(run: Run) -> None:
    """A second command is started while the first is at work: it is refused, and the first knows nothing of it."""
    first = run.go()
    run.wait(first, run.moment())
    os.kill(first.pid, signal.SIGSTOP)  # so that it is still there
    is_held = _is_held(run.folder)
    with beside(first):
        second = end(run.go()) if is_held else None
    os.kill(first.pid, signal.SIGCONT)
    if second is not None:
        told(run, second, {2}, "second writer")
        run.must("another process is at work there" in second.said, f"second writer: {second.said}")
    told(run, end(first), {0}, "first writer")


KINDS: dict[str, Callable[[Run], None]] = {
    "SIGKILL": by_signal(signal.SIGKILL, set()),
    "SIGKILL while writing": killed_writing,
    "SIGILL": by_signal(signal.SIGILL, set()),
    "SIGTERM": by_signal(signal.SIGTERM, {130}),
    "SIGINT": by_signal(signal.SIGINT, {130}),
    "SIGHUP": by_signal(signal.SIGHUP, {130}),
    "SIGUSR1": by_signal(signal.SIGUSR1, {130}),
    "full disk": file_size,
    "full disk (imitated)": disk_fails("full", True),
    "read-only disk (imitated)": disk_fails("read-only", True),
    "an operation fails (imitated)": disk_fails("full", False),
    "broken disk (imitated)": disk_fails("broken", True),
    "read-only folder": read_only,
    "removed folder": removed,
    "moved folder": moved,
    "two writers": two_writers,
}
MOSTLY = ("SIGKILL", "SIGKILL while writing")
"""Every second case is one of these."""
TIMED = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "full disk", "removed folder", "moved folder", "two writers")
"""What is done to the real command, whose operations nobody counts."""


def play(campaign: Campaign, number: int, seed: int, *, real: bool = False) -> str:
    """Harm a run a few times, let it end, and compare it with the one that nobody disturbed.

    Args:
        real: by the real command, once: each start of it takes as long as several cases.

    Returns:
        The kind of harm; what went wrong is noted in the campaign.
    """
    rng = random.Random(f"{seed}/{number}")
    kind = rng.choice(TIMED if real else MOSTLY if number % 2 else list(KINDS))
    folder = campaign.root / f"{number:04d}" / "run"
    run = Run(campaign, folder, rng, unprivileged=kind == "read-only folder", real=real)
    run.folder.parent.mkdir()
    if run.unprivileged and os.geteuid() == 0:
        os.chown(run.folder.parent, NOBODY, NOBODY)
    for _ in range(1 if real else rng.randint(1, HITS)):
        KINDS[kind](run)
        campaign.harms[kind] = campaign.harms.get(kind, 0) + 1
        if run.is_over:
            break
    finish(run, campaign.whole)
    campaign.lost += [f"case {number} ({kind}): {what}" for what in run.seen]
    if not run.seen:
        shutil.rmtree(run.folder.parent)
    return kind


def finish(run: Run, whole: Path) -> None:
    """Let a run end in peace, and compare it with one that nobody disturbed."""
    told(run, end(run.go()), {0}, "left alone")
    if not run.is_over:
        run.must(False, "it did not end")
        return
    for name, (found, expected) in differences(run.folder, whole).items():
        is_line = name.startswith("iteration ") and found is None
        run.must(is_line and run.may_lack_lines, f"{name} is not that of a run left alone: {found} for {expected}")


def _is_over(command: Command) -> bool:
    return os.waitid(os.P_PID, command.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _was_done(ended: Ended) -> bool:
    """Whether the adapter was written already when the harm came."""
    return "; adapter: " in ended.said


def _is_held(folder: Path) -> bool:
    return (folder / OWNER).exists()


def _permit(folder: Path, mode: int) -> None:
    for path in (folder, *_folders(folder)):
        with contextlib.suppress(FileNotFoundError):
            path.chmod(mode)


def _folders(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):
        yield from [path for path in folder.rglob("*") if path.is_dir()]


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
