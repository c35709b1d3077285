"""The ``dgpo`` command: one file for each group of commands, imported when one of them is named.

No file of this folder imports torch before a command runs: ``--help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from dgpo_plugin.common.registry import imported

COMMANDS = {
    "train": "dgpo_plugin.commands.train:train",
    "resume": "dgpo_plugin.commands.train:resume",
    "plan": "dgpo_plugin.commands.plan:plan",
    "config": "dgpo_plugin.commands.config:config",
    "list": "dgpo_plugin.commands.listing:list_names",
    "sample": "dgpo_plugin.commands.sample:sample",
    "inspect": "dgpo_plugin.commands.sample:inspect",
    "score": "dgpo_plugin.commands.score:score",
    "serve-reward": "dgpo_plugin.commands.score:serve_reward",
    "comfy": "dgpo_plugin.commands.comfy:comfy",
    "worlds": "dgpo_plugin.commands.worlds:worlds",
}
"""Where each is, in the order in which they are shown."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are looked up.

    Args:
        targets: ``package.module:command`` by name.
    """

    def __init__(self, *args: Any, targets: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._targets = targets

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._targets)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._targets:
            return None
        command: click.Command = imported(self._targets[cmd_name])
        return command


@click.group(cls=LazyGroup, targets=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dgpo-plugin")
def main() -> None:
    """Fine-tune text-to-image models with a reward."""
