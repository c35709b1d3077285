"""``dgpo worlds``."""

from __future__ import annotations

from pathlib import Path

import click

from dgpo_plugin.commands.terminal import reports_user_errors
from dgpo_plugin.common.errors import UserError


@click.group()
def worlds() -> None:
    """The embedded worlds."""


@worlds.command()
@click.argument("world")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for the pipeline.")
@click.option("--seed", default=0, show_default=True, type=int, help="Seed of the pictures and of the weights.")
@click.option("--iterations", type=click.IntRange(1), help="Steps of the denoiser; the shipped number if left out.")
@click.option("--compile/--no-compile", "compile_model", default=True, help="torch.compile the denoiser.")
@reports_user_errors
def pretrain(world: str, output: Path, seed: int, iterations: int | None, compile_model: bool) -> None:
    """Make a world's pipeline again, from nothing.

    WORLD as in `dgpo list worlds`; shapes takes about an hour on two cores.
    """
    from dgpo_plugin.common.names import WORLDS
    from dgpo_plugin.common.registry import resolved

    make = WORLDS.load(world).pretrain
    if make == "":
        raise UserError(f"world {world}: its pipeline cannot be made again; it says of no function that does")
    if (output / "model_index.json").exists():
        raise UserError(f"--output {output}: holds a pipeline already; choose another folder")
    resolved(make)(output, seed, iterations, compile_model)
    click.echo(str(output))
