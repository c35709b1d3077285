"""``dgpo plan``."""

from __future__ import annotations

import click

from dgpo_plugin.commands.terminal import Changes, reports_user_errors, set_option


@click.command()
@click.argument("config")
@set_option(help="Set any field of the configuration, repeatable; `dgpo config CONFIG` shows them.")
@click.option(
    "--processes", default=1, show_default=True, type=click.IntRange(1), help="How many share an iteration's images."
)
@click.option(
    "--memory", type=click.FloatRange(0, min_open=True), help="GiB of the GPU to plan for.  [default: this one]"
)
@reports_user_errors
def plan(config: str, overrides: Changes, processes: int, memory: float | None) -> None:
    """Say what a run takes, and whether it fits.

    No weights are loaded for it; prompts are put to the rewards that need none. CONFIG as for train.
    """
    from dgpo_plugin.common.tables import as_table
    from dgpo_plugin.config.load import load_config
    from dgpo_plugin.distributed.device import device_memory
    from dgpo_plugin.training.checks import check_prompts
    from dgpo_plugin.training.plan import make_plan, rows

    name, available = (f"a GPU of {memory:g} GiB", int(memory * 2**30)) if memory else device_memory()
    loaded = load_config(config, overrides)
    check_prompts(loaded)
    lines = rows(make_plan(loaded, processes), available, name)
    if loaded.model.precision == "auto":
        lines.append(("precision", "auto, planned as fp32: the larger of the two that it can be"))
    click.echo(as_table(lines))
