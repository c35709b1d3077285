"""What is known of a run before its first picture, and said then: of its prompts, and of rewards of one's own."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.seeding import seeded_globals
from dgpo_plugin.common.user_file import is_from_file
from dgpo_plugin.config.fields import ModelConfig, RunConfig
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.models.base import Model, TextLengths
from dgpo_plugin.models.load import model_skeleton
from dgpo_plugin.prompts.registry import DATASET, load_prompts
from dgpo_plugin.rewards import RewardSet
from dgpo_plugin.rewards.load import load_checks
from dgpo_plugin.rewards.trial import is_tried, try_out

log = logging.getLogger(__name__)


def prompt_sets(config: RunConfig) -> dict[str, list[Prompt]]:
    """The prompts of a run by the settings that name them; ``prompts.held_out`` only where it is a set of its own, and
    ``prompts.train`` not where prompts come with pairs.

    Raises:
        UserError: one is not there, or cannot be read.
    """
    sets = {} if config.pairs is not None else {"prompts.train": load_prompts(config.prompts.train)}
    if config.prompts.held_out is not None:
        sets["prompts.held_out"] = load_prompts(config.prompts.held_out)
    return sets


def check_prompts(config: RunConfig) -> None:
    """Put the prompts of a run to its rewards, as far as that loads nothing: no weights, no data set, no user's code.

    Raises:
        UserError: a prompt file cannot be read, or names all prompts that cannot be judged.
    """
    named = {"prompts.train": config.prompts.train, "prompts.held_out": config.prompts.held_out}
    found = {key: name for key, name in named.items() if name and not (is_from_file(name) or name.startswith(DATASET))}
    load_checks(config.judged_by, config.scoring).check({key: load_prompts(name) for key, name in found.items()})


def try_rewards(
    rewards: RewardSet, model: ModelConfig, sets: Mapping[str, Sequence[Prompt]], processes: Processes
) -> None:
    """Try the rewards that are somebody else's code on noise of the model's size; nothing of the model is loaded.

    Args:
        sets: prompts, of the first of which the first are shown.

    Raises:
        UserError: as :func:`~dgpo_plugin.rewards.trial.try_out`, on any process.
    """
    if not any(is_tried(member.reward) for member in rewards.members.values()):
        return
    problem: str | None = None
    try:
        with seeded_globals(0):
            width, height = picture_size(model)
            warnings = try_out(rewards, height, width, next(iter(sets.values())))
    except UserError as error:
        problem = str(error)
    processes.fail_together(problem)
    if processes.is_main:
        for line in warnings:
            log.warning(line)


def picture_size(model: ModelConfig) -> tuple[int, int]:
    """Width and height of a model's pictures in pixels, from its configuration files.

    Raises:
        UserError: as :func:`~dgpo_plugin.models.load.model_skeleton`.
    """
    if model.width is not None and model.height is not None:
        return model.width, model.height
    with torch.device("meta"):
        skeleton = model_skeleton(model)
    return skeleton.width, skeleton.height


def tell_cut_prompts(model: Model, sets: Mapping[str, Sequence[Prompt]]) -> None:
    """Warn of prompts that are longer than what the model reads: the reward judges what the model never saw."""
    for name, prompts in sets.items():
        for line in cut_prompts(model, prompts):
            log.warning("%s: %s", name, line)


def cut_prompts(model: Model, prompts: Sequence[Prompt]) -> list[str]:
    """Lines about prompts that are cut: by all text encoders whose tokens the denoiser reads, then by some of them.

    A limit that is a setting (T5's) is told only where no other encoder reads the prompt whole.
    """
    lengths = model.text_lengths([prompt.text for prompt in prompts])
    cut = [{n for n, tokens in enumerate(each.tokens) if tokens > each.limit} for each in lengths]
    by_all = set.intersection(*cut) if cut else set()
    lines = []
    if by_all:
        limits = ", ".join(f"{each.limit} in {each.encoder}" for each in lengths)
        settings = {f" or raise {each.setting}" for each in lengths if each.setting}
        lines.append(
            f"{len(by_all)} of {len(prompts)} prompts are longer than what this model reads "
            f"({_first(prompts, by_all, lengths[-1])}; it reads {limits}), and the reward judges them by all that they "
            f"say; shorten them{''.join(settings)}"
        )
    partly: dict[tuple[int, frozenset[int]], list[TextLengths]] = {}
    for each, found in zip(lengths, cut, strict=True):
        if not each.setting and found - by_all:
            partly.setdefault((each.limit, frozenset(found - by_all)), []).append(each)
    for (limit, those), readers in partly.items():
        names = " and ".join(each.encoder for each in readers)
        whole = " and ".join(each.encoder for each, them in zip(lengths, cut, strict=True) if not those & them)
        lines.append(
            f"{len(those)} of {len(prompts)} prompts are longer than the {limit} tokens of {names} "
            f"({_first(prompts, those, readers[0])}); {whole or 'another encoder'} reads them whole"
        )
    return lines


def _first(prompts: Sequence[Prompt], found: AbstractSet[int], lengths: TextLengths) -> str:
    """The first of the prompts that were found: where it is written, and its length."""
    first = min(found)
    place = prompts[first].place or repr(prompts[first].text[:60])
    return f"first: {place}, {lengths.tokens[first]} tokens"
