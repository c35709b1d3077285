"""``dgpo list``: everything that a configuration may name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import click

from dgpo_plugin.commands.terminal import reports_user_errors
from dgpo_plugin.common.errors import UserError, did_you_mean

Listed = Mapping[str, Sequence[str]]
"""Lines about each, by name."""


def _presets() -> Listed:
    from dgpo_plugin.config.load import preset_names, preset_says

    return {name: preset_says(path) for name, path in preset_names().items()}


def _algorithms() -> Listed:
    from dgpo_plugin.common.names import ALGORITHMS

    return {name: [entry.about] for name, entry in ALGORITHMS.entries().items()}


def _rewards() -> Listed:
    from dgpo_plugin.rewards import REWARDS

    return {name: [entry.about, "; ".join(entry.facts())] for name, entry in REWARDS.entries().items()}


def _prompts() -> Listed:
    from dgpo_plugin.prompts.fetched import FETCHED
    from dgpo_plugin.prompts.registry import prompt_set_names

    at_hand = {name: [about] if about else [] for name, about in prompt_set_names().items()}
    return at_hand | {name: [each.about, f"fetched; license: {each.license}"] for name, each in FETCHED.items()}


def _worlds() -> Listed:
    from dgpo_plugin.common.names import WORLDS

    return {
        name: [entry.about, f"prompts: {', '.join(f'{name}/{each}' for each in WORLDS.load(name).prompt_sets)}"]
        for name, entry in WORLDS.entries().items()
    }


def _models() -> Listed:
    from dgpo_plugin.common.names import FAMILIES, WORLDS

    return {**dict.fromkeys(WORLDS, ()), **{f"any {family}": () for family in FAMILIES}}


KINDS: dict[str, tuple[str, Callable[[], Listed]]] = {
    "presets": ("presets", _presets),
    "models": ("models", _models),
    "algorithms": ("algorithms", _algorithms),
    "prompts": ("prompt sets", _prompts),
    "rewards": ("rewards", _rewards),
    "worlds": ("worlds", _worlds),
}
"""What each kind is called for people, and what it lists."""


@click.command("list")
@click.argument("kind", required=False, type=click.Choice(list(KINDS)))
@click.argument("pattern", required=False, default="*")
@reports_user_errors
def list_names(kind: str | None, pattern: str) -> None:
    """List what a configuration may name.

    All of it, or one KIND with what is known of each. PATTERN keeps the names that it matches: 'sd35-*'.
    """
    if kind is None:
        for label, read in KINDS.values():
            click.echo(f"{label + ':':<13}{', '.join(read())}")
    elif kind == "models":
        click.echo("\n".join(_model_table(pattern)))
    else:
        listed = KINDS[kind][1]()
        for name in _matching(pattern, listed, kind):
            click.echo("\n    ".join([name, *listed[name]]))


def _matching(pattern: str, names: Mapping[str, object], kind: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise UserError(f"list {kind}: nothing matches {pattern!r}{did_you_mean(pattern, names)}")
    return found


def _model_table(pattern: str) -> list[str]:
    """The table of model families and their presets, rows whose family or preset matches."""
    from dgpo_plugin.common.names import FAMILIES
    from dgpo_plugin.training.plan import model_rows

    header, *rows, note = model_rows()
    shown = {row.split()[0] for row in rows}
    rows += [f"{family:<26} no preset" for family in FAMILIES if family not in shown]
    names = dict.fromkeys(name for row in rows for name in row.split()[:2])
    found = set(_matching(pattern, names, "models"))
    return [header, *(row for row in rows if found & set(row.split()[:2])), note]
