"""``dgpo train`` and ``dgpo resume``."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from dgpo_plugin.commands.terminal import Changes, reports_user_errors, set_option
from dgpo_plugin.common.errors import resume_command


@click.command()
@click.argument("config")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for the run; must be new.")
@set_option(help="Set any field of the configuration, repeatable; `dgpo config CONFIG` shows them.")
@reports_user_errors
def train(config: str, output: Path, overrides: Changes) -> None:
    """Train an adapter. CONFIG is a preset's name or a YAML file."""
    from dgpo_plugin.config.load import load_config

    # Before torch is imported: a mistake is told at once.
    loaded = load_config(config, overrides)
    from dgpo_plugin.common.faults import explained
    from dgpo_plugin.distributed.processes import leave_processes
    from dgpo_plugin.training import run
    from dgpo_plugin.training.signals import as_interrupts

    with as_interrupts(), explained(f"go on with: {resume_command(output)}"):
        run.train(loaded, output, Console())
    leave_processes()


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--iterations",
    type=click.IntRange(1),
    help="Where the run is to end, in iterations from its beginning.  [default: where it was to end]",
)
@click.option(
    "--accept",
    multiple=True,
    metavar="PARTS",
    help="Go on although these are not what they were, as in prompts,reward; recorded in the run and its adapter.",
)
@set_option(help="Say where something is now, as in model.path=/new/place, or set what may change; repeatable.")
@reports_user_errors
def resume(run: Path, iterations: int | None, accept: tuple[str, ...], overrides: Changes) -> None:
    """Go on with a run, stopped, killed or finished.

    RUN is its folder. A finished one goes on with more --iterations. What was moved since is found with --set:
    model.path, prompts.train, prompts.held_out, and rewards' files and weights; it must hold what it held.
    """
    from dgpo_plugin.common.faults import explained
    from dgpo_plugin.distributed.processes import leave_processes
    from dgpo_plugin.training import run as runs
    from dgpo_plugin.training.signals import as_interrupts

    with as_interrupts(), explained(f"go on with: {resume_command(run)}"):
        runs.resume(run, Console(), iterations=iterations, accept=accept, overrides=overrides)
    leave_processes()
