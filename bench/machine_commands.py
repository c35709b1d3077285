"""The commands of ``dgpo-bench`` that time this machine: ``throughput`` and ``gpu``."""

from __future__ import annotations

import functools
from pathlib import Path

import click

from dgpo_plugin.commands.terminal import reports_user_errors
from dgpo_plugin.common.errors import UserError


@click.command()
@click.argument("config")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override any field, repeatable.")
@click.option(
    "--iterations", default=8, show_default=True, type=click.IntRange(1), help="To time, after two that warm up."
)
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to write as well.")
@reports_user_errors
def throughput(config: str, overrides: tuple[str, ...], iterations: int, output: Path | None) -> None:
    """Time training against the bare denoiser's rate on this machine. CONFIG as for `dgpo train`."""
    from rich.console import Console

    from dgpo_plugin.common.tables import as_table
    from dgpo_plugin.config.load import load_config

    from .throughput import measure, write_throughput

    loaded = load_config(config, overrides)
    with Console(stderr=True).status("starting") as status:
        measured = measure(config, loaded, iterations, status.update)
    click.echo(as_table(measured.rows()))
    if output is not None:
        write_throughput(measured, output)


@click.command()
@click.option("--minutes", default=8.0, show_default=True, type=click.FloatRange(0.1), help="No row is begun later.")
@click.option("--only", metavar="NAMES", help="Rows or models, comma-separated; measured again if they were.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/gpu"), show_default=True, help="Folder.")
@click.option("--rehearsal", is_flag=True, help="Tiny models on the processor: whether everything runs.")
@reports_user_errors
def gpu(minutes: float, only: str | None, output: Path, rehearsal: bool) -> None:
    """Measure full-size models with random weights on this GPU, the most telling rows first; no download.

    Every row is kept as soon as it is done, in gpu.jsonl; the same command goes on with those that are missing.
    """
    from dgpo_plugin.distributed.device import runs_on_cpu

    from .gpu.results import read_results
    from .gpu.rows import choose_rows
    from .gpu.session import measure
    from .gpu.table import write_table
    from .workers import signals_as_exit

    if runs_on_cpu() and not rehearsal:
        raise UserError("no GPU here; --rehearsal runs every row on the processor with tiny models")
    rows = choose_rows(only)
    read_results(output)  # refused now rather than after the first row
    missing = [row.name for row in rows]
    say = functools.partial(click.echo, err=True)
    try:
        with signals_as_exit():
            missing = measure(rows, output, minutes, say, tiny=rehearsal, again=only is not None)
    finally:
        text = write_table(output, missing)
    click.echo(text)
    if not any(result.status == "measured" for name, result in read_results(output).items() if name != "card"):
        raise UserError(f"no row could be measured here; {output / 'gpu.md'} says why, row by row")
