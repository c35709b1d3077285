"""The campaign (``make fuzz``): cases until the time or their number is up, and every one that is not as it should be.

A case is right if its command ends with exit code 0 and means what it should, or with one line that says what is
wrong. One that takes ten seconds of the processor, or waits for two minutes, hangs. Of all cases a share goes through
the real command, in a process of its own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import click

from tests.fuzz.cases import Case, inside, judged, run_apart, run_here
from tests.fuzz.kinds import KINDS

WATCH = 10.0
"""Seconds of the processor that a case may take in this process, beyond its start-up."""
WAITING = 120.0
"""Seconds by the clock, which count what is waited for: a pipe, a lock, and whatever else a busy machine does."""
MEMORY = 6 * 2**30
"""Bytes of address space that all cases together may take beyond what the program has when it begins."""
STARTING = 600.0
"""The same of a process of its own, which imports torch first."""
REQUESTS = "tests.fuzz.requests"
"""Hostile requests to a reward server, which have no command and are made and judged there."""


class Hang(BaseException):
    """A case took longer than it may."""


@contextlib.contextmanager
def watched(clock: float = WAITING) -> Iterator[None]:
    """Raise :class:`Hang` in a block that hangs; where no bytecode runs any more, end the process with its stack."""

    def late(_number: int, _frame: object) -> None:
        raise Hang

    timers = ((signal.SIGALRM, signal.ITIMER_REAL, clock), (signal.SIGPROF, signal.ITIMER_PROF, WATCH))
    before = [signal.signal(number, late) for number, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    assert sys.__stderr__ is not None
    faulthandler.dump_traceback_later(2 * clock, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
        faulthandler.cancel_dump_traceback_later()


def bound_memory() -> None:
    """Have an allocation beyond all reason fail, instead of the machine."""
    with contextlib.suppress(OSError, ValueError):
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def tried(case: Case, *, apart: bool = False) -> tuple[str, str]:
    """Run a case and judge it: "accepted" or "refused", and what is wrong, if anything is."""
    folder, home = Path(tempfile.mkdtemp()), Path.cwd()
    started = time.process_time()
    try:
        case.write(folder)
        with watched(STARTING if apart else WAITING):
            outcome = (run_apart if apart else run_here)(case, folder)
            wrong = judged(case, outcome)
            if not wrong and outcome.code == 0:
                with inside(folder):
                    wrong = KINDS[case.kind][1](case, outcome, folder)
    except Hang:
        return "hang", f"{WATCH:g} seconds of the processor, or {WAITING:g} by the clock"
    except Exception:
        return "wrong", "the check failed: " + traceback.format_exc()
    finally:
        os.chdir(home)
        shutil.rmtree(folder, ignore_errors=True)
    taken = time.process_time() - started
    if taken > WATCH:  # and whoever ran then caught everything
        return "hang", f"{taken:.0f} seconds of the processor"
    if wrong:
        return "traceback" if wrong.startswith("traceback") else "wrong", wrong
    return "accepted" if outcome.code == 0 else "refused", ""


def made(seed: int, number: int, kinds: list[str]) -> Case:
    """A campaign's case of that number, the same whatever came before it."""
    random = Random(f"{seed} {number}")
    kind = random.choices(kinds, [KINDS[name][2] for name in kinds])[0]
    return KINDS[kind][0](random)


@click.command()
@click.option("--seed", type=int, default=lambda: int(time.time()), help="Of all cases.  [default: the time]")
@click.option("--minutes", type=float, default=10.0, show_default=True, help="No case is begun later.")
@click.option("--count", type=int, default=10**9, help="Cases at most.")
@click.option("--apart", type=float, default=0.02, show_default=True, help="Share that goes through the real command.")
@click.option("--kinds", default=",".join(KINDS), show_default=True, help="Of input, comma-separated.")
@click.option("--findings", type=click.Path(path_type=Path), default=Path("runs/fuzz"), show_default=True)
def campaign(seed: int, minutes: float, count: int, apart: float, kinds: str, findings: Path) -> None:
    """Try hostile inputs and keep every one that is not told in one line."""
    click.echo(f"seed {seed}")
    findings.mkdir(parents=True, exist_ok=True)
    for case in (
        Case("set", "dgpo", ("plan", "shapes", "--memory", "8"), {}),
        *(KINDS[kind][0](Random(0)) for kind in KINDS),
    ):
        tried(case)  # the start-up
    bound_memory()
    ends, verdicts, separate, number = time.monotonic() + 60 * minutes, Counter[tuple[str, str]](), 0, 0
    while number < count and time.monotonic() < ends:
        case = made(seed, number, kinds.split(","))
        as_program = Random(f"apart {seed} {number}").random() < apart
        (findings / "running.json").write_text(case.as_json())
        verdict, wrong = tried(case, apart=as_program)
        separate += as_program
        verdicts[case.kind, verdict] += 1
        if wrong:
            file = findings / f"{case.kind}-{seed}-{number}.json"
            file.write_text(case.as_json())
            file.with_suffix(".txt").write_text(f"{case.program} {case.arguments}\n{wrong}\n")
            click.echo(f"{case.kind} {number}: {verdict}: {wrong.strip().splitlines()[-1][:200]}")
        number += 1
        if number % 100 == 0:
            click.echo(
                f"{number} cases, {separate} through the real command, {time.process_time():.0f} s of the processor"
            )
    bad = sum(found for (_, verdict), found in verdicts.items() if verdict not in ("accepted", "refused"))
    wrong_requests, requests = run_requests(seed, number // 20)
    for kind in KINDS:
        told = ", ".join(f"{verdicts[key]} {key[1]}" for key in sorted(verdicts) if key[0] == kind)
        click.echo(f"{kind}: {told or 'none'}")
    click.echo(f"{number + requests} cases, {separate} through the real command, {bad + wrong_requests} findings")
    raise SystemExit(1 if bad or wrong_requests else 0)


def run_requests(seed: int, count: int) -> tuple[int, int]:
    """Hostile requests, where their file is there: findings, and cases."""
    if importlib.util.find_spec(REQUESTS) is None:
        return 0, 0
    requests = importlib.import_module(REQUESTS)
    found = 0
    cases = list(requests.cases(seed, count))
    for case in cases:
        with watched():
            try:
                requests.run(case)
            except Exception:
                found += 1
                click.echo(f"request {json.dumps(str(case))[:200]}: {traceback.format_exc()}")
    return found, len(cases)


if __name__ == "__main__":
    campaign()
