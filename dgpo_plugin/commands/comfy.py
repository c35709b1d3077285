"""``dgpo comfy``."""

from __future__ import annotations

from pathlib import Path

import click

from dgpo_plugin.commands.terminal import reports_user_errors
from dgpo_plugin.common.errors import UserError


@click.group()
def comfy() -> None:
    """The ComfyUI node pack."""


@comfy.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--python", type=click.Path(path_type=Path), help="ComfyUI's interpreter.  [default: its environment's]")
@reports_user_errors
def install(path: Path, python: Path | None) -> None:
    """Link the nodes into the ComfyUI at PATH and say what they still need there."""
    from dgpo_plugin.commands.comfy_install import install as link_pack
    from dgpo_plugin.common.tables import as_table

    report = link_pack(path, python)
    click.echo(as_table(report.rows))
    if report.problems:
        raise UserError("; ".join(report.problems))
    click.echo("restart ComfyUI; the nodes are under DGPO")
