"""Rewards loaded: found by name, given their options, and checked to be callable."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dgpo_plugin.common.errors import UserError, did_you_mean, prefixed
from dgpo_plugin.common.others_code import others_code
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.common.registry import imported
from dgpo_plugin.common.user_file import is_from_file, loaded_hash, told
from dgpo_plugin.config.fields import RewardTerm, ScoringConfig
from dgpo_plugin.rewards.base import USUAL_SCORING, Reward, RewardSet, WeightedReward, as_reward, problems
from dgpo_plugin.rewards.isolated import IsolatedReward
from dgpo_plugin.rewards.registry import REWARDS

ANY = RewardTerm()


def load_rewards(rewards: Mapping[str, RewardTerm], scoring: ScoringConfig = USUAL_SCORING) -> RewardSet:
    """Load the rewards of a configuration, each once.

    Args:
        rewards: by label.
        scoring: how they are computed, where a reward does not say it itself.

    Raises:
        UserError: as :func:`load_reward`.
    """
    members = {label: _weighted(label, term, scoring) for label, term in rewards.items()}
    # Of what was loaded, once: a file may change while a run goes on.
    return RewardSet(members, loaded_hash([member.name for member in members.values()]))


def _weighted(label: str, term: RewardTerm, scoring: ScoringConfig) -> WeightedReward:
    reward, own = load_reward(label, term, scoring), term.scoring(scoring)
    if term.isolate:  # it ends its process at a time-out by itself
        own = own.model_copy(update={"timeout": None})
    return WeightedReward(reward, term.weight, own, term.name(label))


class _PromptsOnly(Reward):
    """Says of prompts what a reward would, without that reward's weights."""

    def __init__(self, reads: Callable[[Prompt], object]) -> None:
        self._reads = reads

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        return problems(prompts, self._reads)


def load_checks(rewards: Mapping[str, RewardTerm], scoring: ScoringConfig = USUAL_SCORING) -> RewardSet:
    """What can be asked about prompts without loading weights, asking a server or running a user's code.

    Returns:
        A set to call :meth:`~dgpo_plugin.rewards.RewardSet.check` of, and nothing else.

    Raises:
        UserError: as :func:`load_reward`.
    """
    members = {}
    for label, term in rewards.items():
        name = term.name(label)
        entry = REWARDS.get(name)
        served = entry.target.startswith("dgpo_plugin.rewards.served.")
        if entry.reads:
            members[label] = WeightedReward(_PromptsOnly(imported(entry.reads)))
        elif not (is_from_file(name) or entry.package or entry.missing or entry.parameters or served or term.isolate):
            members[label] = WeightedReward(load_reward(label, term, scoring))
    return RewardSet(members)


def load_reward(label: str, term: RewardTerm = ANY, scoring: ScoringConfig = USUAL_SCORING) -> Reward:
    """Load one reward.

    Args:
        label: a registered name or a file.py:name, unless ``term`` names the reward.

    Raises:
        UserError: no such reward, one that needs a package that is not installed, an option that it does not have, or
            a user's own that is broken.
    """
    if term.isolate:
        with prefixed(f"reward {label}"):
            return IsolatedReward(label, term, scoring)
    name = term.name(label)
    kind, fixed = REWARDS.load(name), REWARDS.get(name).fixed
    with prefixed(f"reward {label}"):
        return as_reward(_checked(_made(kind, term.scoring(scoring), term.options, fixed)))


def _made(kind: Any, config: ScoringConfig, options: Mapping[str, Any], fixed: Mapping[str, Any]) -> Any:
    """An instance of a class, made with the configuration if it takes one; what is no class as it is."""
    parameters = inspect.signature(kind).parameters if isinstance(kind, type) else {}
    known = [key for key in parameters if key != "config" and key not in fixed]
    for key in options:
        if key not in known:
            raise UserError(f"has no option {key!r}{did_you_mean(key, known) if known else ', nor any other'}")
    if not isinstance(kind, type):
        return kind
    given = {"config": config} if "config" in parameters else {}
    try:
        with others_code():
            return kind(**given, **fixed, **options)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever the user's code raises
        raise UserError(told(error, " while loading it")) from error


def _checked(made: Any) -> Any:
    """Refuse what cannot be called with (images, prompts)."""
    if not callable(made):
        raise UserError("cannot be called; it must be a function of (images, prompts)")
    try:
        inspect.signature(made).bind(None, None)
    except TypeError as error:
        raise UserError(f"must take (images, prompts); {error}") from error
    except ValueError:  # a built-in without a signature
        pass
    return made
