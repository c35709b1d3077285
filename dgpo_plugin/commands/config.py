"""``dgpo config``."""

from __future__ import annotations

import json

import click

from dgpo_plugin.commands.terminal import Changes, reports_user_errors, set_option
from dgpo_plugin.common.errors import UserError


@click.command()
@click.argument("config", required=False)
@set_option(help="Set any field first, repeatable.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of configurations instead, for editors.")
@reports_user_errors
def config(config: str | None, overrides: Changes, schema: bool) -> None:
    """Print a complete configuration, explained.

    It is YAML that `dgpo train` reads, with what each field means. CONFIG as for train.
    """
    from dgpo_plugin.config.describe import annotated_yaml
    from dgpo_plugin.config.load import load_config

    if schema:
        from dgpo_plugin.commands.schema import json_schema

        if config is not None or overrides:
            raise UserError("--schema: is the same for every configuration; leave CONFIG and --set out")
        click.echo(json.dumps(json_schema(), indent=2))
        return
    if config is None:
        raise UserError("CONFIG is missing; name a preset (`dgpo list presets`) or a YAML file, or ask for --schema")
    click.echo(annotated_yaml(load_config(config, overrides)), nl=False)
