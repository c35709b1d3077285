"""What a person sees of a run while it goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dgpo_plugin.algorithms.base import Metric
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.training.evaluation import trained_on


def progress_bar(console: Console) -> Progress:
    """Iterations done and time left; nothing where nobody looks."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def record_lines(record: dict[str, float], metrics: Iterable[Metric], config: RunConfig, failures: Path) -> list[str]:
    """All that is said of an iteration.

    Args:
        failures: the folder that pictures without a score are kept in.
    """
    return [
        iteration_line(record, metrics),
        *skipped_lines(record, config, failures),
        *constant_reward_lines(record, config),
    ]


def iteration_line(record: dict[str, float], metrics: Iterable[Metric]) -> str:
    """An iteration in a line: what all algorithms have, and what this one's metrics show."""
    own = [metric.shown.format(record[metric.key]) for metric in metrics if metric.shown and metric.key in record]
    judged = []
    if "reward" in record:
        judged = [f"reward {record['reward']:.3f}", f"group std {record['reward_group_std']:.3f}"]
    return "  ".join(
        [
            f"iteration {record['iteration']:4.0f}",
            *judged,
            *own,
            *([f"graphs kept of {record['kept_evaluations']:.0f} passes"] if record["kept_evaluations"] else []),
            f"{record['seconds']:.2f} s",
        ]
    )


def overlap_lines(train: Sequence[Prompt], evaluated: Sequence[Prompt], config: RunConfig) -> list[str]:
    """A line if prompts that are to be held out are trained on."""
    seen = [] if config.prompts.held_out is None else trained_on(train, evaluated)
    if not seen:
        return []
    return [
        f"prompts.held_out: {len(seen)} of {len(evaluated)} prompts are in prompts.train too (first: "
        f"{seen[0].text!r}), so what is measured on them is not called held-out"
    ]


def constant_reward_lines(record: dict[str, float], config: RunConfig) -> list[str]:
    """A line for each reward that varied inside no prompt group."""
    key = "constant_groups"
    marked = [name[len(key) :] for name, share in record.items() if name.startswith(key) and share == 1]
    groups = config.training.prompts_per_iteration
    return [
        f"  reward {name or config.reward_label}: the same for all images of each of the {groups} prompt groups, "
        f"so nothing was learned from it"
        for name in [name[1:] for name in marked if name] or marked
    ]


def skipped_lines(record: dict[str, float], config: RunConfig, where: Path) -> list[str]:
    """A line if some pictures were left out, with which rewards have no score of how many; none otherwise.

    Args:
        where: the folder that they are kept in.
    """
    if not record.get("skipped"):
        return []
    images = config.training.images
    each = [(name.partition("/")[2], share) for name, share in record.items() if name.startswith("skipped/") and share]
    by = [f"{name} {share * images:.0f}" for name, share in each] or [config.reward_label]
    return [
        f"  {record['skipped'] * images:.0f} of {images} pictures could not be scored (reward {', '.join(by)}) "
        f"and were left out; they are in {where}"
    ]
