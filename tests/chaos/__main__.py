"""``python -m tests.chaos``: runs harmed at random moments, for some minutes or cases; the seed says which (Linux)."""

from __future__ import annotations

import functools
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["SOURCE_DATE_EPOCH"] = "1700000000"  # the adapter's header has the date
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click


@click.command()
@click.option("--minutes", default=10.0, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--cases", type=click.IntRange(1), help="End after so many.")
@click.option("--seed", type=int, help="Which cases; random if left out, and printed.")
@click.option("--first", default=0, type=click.IntRange(0), help="The number of the first case.")
@click.option(
    "--what",
    default="all",
    show_default=True,
    type=click.Choice(["all", "runs", "commands", "ranks", "servers", "comparisons"]),
)
def main(minutes: float, cases: int | None, seed: int | None, first: int, what: str) -> None:
    """Harm runs at random moments and see whether each goes on to the bits of one left alone."""
    seed = random.randrange(10**6) if seed is None else seed
    click.echo(f"seed {seed}")
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    root.chmod(0o755)
    campaign = prepare(root)
    until, number = time.monotonic() + 60 * minutes, first
    while time.monotonic() < until and (cases is None or number < first + cases):
        kind = PLAYS[kind_of(what, number)](campaign, number, seed)
        click.echo(f"case {number}: {kind}; {sum(campaign.harms.values())} harms, {campaign.kills} kills so far")
        while campaign.told < len(campaign.lost):
            click.echo(f"  LOST {campaign.lost[campaign.told]}")
            campaign.told += 1
        number += 1
    for kind, count in sorted(campaign.harms.items()):
        click.echo(f"{count:5d}  {kind}")
    click.echo(
        f"seed {seed}: {sum(campaign.harms.values())} harms, {campaign.kills} kills, {len(campaign.lost)} faults"
    )
    if campaign.lost:
        click.echo(f"what is left of them: {root}")
        sys.exit(1)
    shutil.rmtree(root)


def kind_of(what: str, number: int) -> str:
    """What a case is of: mostly a run, now and then what takes longer."""
    if what != "all":
        return what
    if number % 40 == 20:
        return "comparisons"
    if number % 10 == 9:
        return "commands"
    return {4: "ranks", 6: "servers"}.get(number % 8, "runs")


if __name__ == "__main__":
    # torch: after the environment
    from .cases import play, prepare
    from .ranks import play_ranks
    from .services import play_comparison, play_server

    PLAYS: dict[str, Callable[..., str]] = {
        "runs": play,
        "commands": functools.partial(play, real=True),
        "ranks": play_ranks,
        "servers": play_server,
        "comparisons": play_comparison,
    }
    main()
