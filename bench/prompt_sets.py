"""The prompts that a comparison samples: which of each set, of which kind they are, and from which noises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Literal

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.overlap import overlapping
from dgpo_plugin.prompts.registry import load_prompts

from .records import PromptRecord, PromptSetRecord
from .size import Size
from .task import Task, prompt_sources

VALIDATION, TEST = "validation", "test"
TEST_SEED, VALIDATION_SEED = 1_000_003, 1_000_033
"""Seeds of the pictures' noise; no training seed draws from them, and what is chosen is not chosen on test noise."""
MOST_IMAGES = 1000
"""Pictures of a prompt at most: so many noises are set aside for each, whatever the number that is drawn."""
SWEPT_IMAGES = 2
"""Pictures of each prompt of a sweep: diversity needs two, and other prompts tell more than further pictures."""
MOST = 10**6
"""Prompts of a kind where all are taken."""


@dataclass(frozen=True)
class SampledSet:
    """Some prompts of one set, in order.

    Attributes:
        name: in results.
        tags: of each prompt, its kind; empty for none.
        images: pictures of each prompt, from noises 0 to that.
        curve: which of the prompts are measured at every checkpoint, rising.
        seed: of the noise.
        first: the number of the first prompt among all that share the seed.
        metrics: names of what is measured of its pictures.
    """

    name: str
    role: Literal["validation", "in_domain", "out_of_domain"]
    prompts: list[Prompt]
    tags: list[str]
    images: int
    curve: list[int]
    seed: int
    first: int
    metrics: tuple[str, ...]

    def noise_numbers(self, prompt: int, images: Sequence[int]) -> list[int]:
        """The numbers of a prompt's noises: the same for every cell, whatever number of pictures."""
        return [(self.first + prompt) * MOST_IMAGES + image for image in images]

    def record(self) -> PromptSetRecord:
        """What results say of it."""
        prompts = [PromptRecord(text=p.text, tag=tag) for p, tag in zip(self.prompts, self.tags, strict=True)]
        return PromptSetRecord(role=self.role, prompts=prompts, images_per_prompt=self.images)


def sampled_sets(task: Task, size: Size) -> dict[str, SampledSet]:
    """The sets that cells are measured on, by name: validation, test, then the out-of-domain ones.

    Raises:
        UserError: a prompt set that is not there.
    """
    headline = (task.headline_metric,)
    inside = tuple(dict.fromkeys([*(each.metric for each in task.in_domain), *task.statistics]))
    images = size.images_per_prompt or task.sampling.images_per_prompt
    sets = {
        VALIDATION: _sampled(
            VALIDATION, "validation", task.prompts.validation, task.tag_field, size.validation_prompts, headline
        ),
        TEST: _sampled(TEST, "in_domain", task.prompts.test, task.tag_field, size.test_prompts, inside),
    }
    for each in task.out_of_domain:
        name = PurePath(each.prompts).name if each.prompts.endswith((".txt", ".jsonl")) else each.prompts
        if name in sets:
            raise UserError(f"task {task.name}: two prompt sets are called {name}; rename a file")
        metrics = tuple(dict.fromkeys([*each.metrics, *task.statistics]))
        sets[name] = _sampled(name, "out_of_domain", each.prompts, each.by, size.out_of_domain_prompts, metrics)
    placed, first = {}, 0
    for name, chosen in sets.items():
        placed[name] = replace(chosen, images=images)
        if chosen.role != "validation":
            curve = spread(chosen.tags, size.curve_prompts or len(chosen.prompts))
            placed[name] = replace(placed[name], curve=curve, seed=TEST_SEED, first=first)
            first += len(chosen.prompts)
    return placed


def swept_sets(task: Task, most: int) -> dict[str, SampledSet]:
    """The sets that a sweep is measured on, at most so many prompts of each, evenly over its kinds.

    Validation prompts, with every metric in domain: what is chosen by a sweep is not chosen on test prompts, and their
    noise is not the test's. Then the out-of-domain ones, of which a task has no others.

    Raises:
        UserError: a prompt set that is not there.
    """
    inside = tuple(dict.fromkeys([*(each.metric for each in task.in_domain), *task.statistics]))
    everything = sampled_sets(
        task, Size(evaluations=1, test_prompts=1, validation_prompts=MOST, out_of_domain_prompts=MOST)
    )
    found, first = {}, 0
    for name, whole in everything.items():
        if name == TEST:
            continue
        chosen = few(whole.tags, most)
        found[name] = replace(
            whole,
            role="in_domain" if name == VALIDATION else whole.role,
            prompts=[whole.prompts[n] for n in chosen],
            tags=[whole.tags[n] for n in chosen],
            images=SWEPT_IMAGES,
            curve=[],
            seed=VALIDATION_SEED,
            first=first,
            metrics=inside if name == VALIDATION else whole.metrics,
        )
        first += len(chosen)
    return found


def few(tags: Sequence[str], most: int) -> list[int]:
    """Which of some prompts to take, rising: at most so many in all, as many of each kind as there is room for."""
    per_tag = 1
    while len(spread(tags, per_tag)) < min(most, len(tags)):
        per_tag += 1
    chosen = spread(tags, per_tag)
    return [chosen[slot * len(chosen) // most] for slot in range(most)] if len(chosen) > most else chosen


def _sampled(
    name: str,
    role: Literal["validation", "in_domain", "out_of_domain"],
    source: str,
    by: str,
    per_tag: int,
    metrics: tuple[str, ...],
) -> SampledSet:
    prompts = load_prompts(source)
    tags = [str(prompt.metadata.get(by, "")) if by else "" for prompt in prompts]
    chosen = spread(tags, per_tag)
    taken = [prompts[n] for n in chosen]
    return SampledSet(name, role, taken, [tags[n] for n in chosen], 1, [], VALIDATION_SEED, 0, metrics)


def spread(tags: Sequence[str], per_tag: int) -> list[int]:
    """Which of some prompts to take, rising: at most so many of each kind, evenly spread over it."""
    chosen: list[int] = []
    for tag in dict.fromkeys(tags):
        members = [number for number, each in enumerate(tags) if each == tag]
        count = min(per_tag, len(members))
        chosen += [members[slot * len(members) // count] for slot in range(count)]
    return sorted(chosen)


def check_prompts(task: Task) -> dict[str, int]:
    """Find out that nothing that is chosen on or reported is trained on, nor reported what is chosen on.

    Prompts are the same by text or by what a reward judges (:func:`dgpo_plugin.prompts.overlap.overlapping`).

    Returns:
        How many prompts each set has, by where the file names it.

    Raises:
        UserError: a set that is not there, or the number of prompts that two sets share.
    """
    sets = {where: load_prompts(source) for where, source in prompt_sources(task)}
    names = list(sets)
    for kept in ("prompts.train", "prompts.validation"):
        for other in names[names.index(kept) + 1 :]:
            if pairs := overlapping(sets[kept], sets[other]):
                same = sorted({second for _, second in pairs})
                raise UserError(
                    f"task {task.name}, {other}: {len(same)} of {len(sets[other])} prompts are in {kept} too (first: "
                    f"{sets[other][same[0]].text!r}); name sets that share none"
                )
    return {where: len(prompts) for where, prompts in sets.items()}


def counted_tags(tags: Sequence[str], least: int) -> set[str]:
    """The kinds that count for the headline: those with at least so many prompts, or all where none has."""
    enough = {tag for tag in tags if list(tags).count(tag) >= least}
    return enough or set(tags)
