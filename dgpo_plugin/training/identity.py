"""What a run's result depends on, and what of it may be another when the run is gone on with."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from dgpo_plugin.common.errors import UserError, resume_command
from dgpo_plugin.common.user_file import is_from_file
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.models.base_identity import BaseIdentity, PartIdentity, compared_parts
from dgpo_plugin.training.accept import BASE, Difference, other_setting, refuse_unaccepted
from dgpo_plugin.training.contents import option_values

MAY_CHANGE = (
    "logging.",
    "checkpoint.",
    "training.iterations",
    "training.replanned",
    "training.micro_batch_size",
    "training.gradient_checkpointing",
    "training.process_timeout",
    "model.offload",
    "model.shard",
    "scoring.retries",
    "scoring.timeout",
    "scoring.on_failure",
    "scoring.max_skipped",
)
"""Settings that a resumed run may have others of: how long, how loud, in how many pieces, how patient."""
PLACES = ("model.path", "prompts.", "pairs")
"""Settings that say where something is, which is compared by its content."""


SERVED = ("remote", "judge", "unifiedreward")
"""Rewards behind a wire."""
SERVED_MAY_CHANGE = ("timeout", "batch_size", "concurrency", "attempts", "token_variable", "key_variable")
"""Their options that a resumed run may have others of: how they are asked, not what."""
ROUNDS_OTHERWISE = ("device", "batch_size")
"""How a reward is computed that may be another on resume, and may change the last bits of its values."""


SECTIONS = ("model", "lora", "prompts", "rewards", "scoring", "rollout", "algorithm", "training", "evaluation")
"""Of a configuration, those that are looked into when two runs are compared."""


class RunIdentity(BaseModel):
    """What must not change while a run goes on.

    Attributes:
        config: the run's, as in config.yaml, with absolute paths; of it, what :data:`MAY_CHANGE` names may, and places.
        base: the base model's parts by their content.
        prompts_sha256, held_out_sha256, rewards_sha256: of the prompts of training, of the held-out ones, and of the
            files of users' own rewards, empty if there are none.
        pairs_sha256, held_out_pairs_sha256: of the preferred pairs, prompts and pictures, empty if there are none.
        contents: what lies at the other places that the configuration names
            (:func:`dgpo_plugin.training.contents.contents_of`).
        packages: versions by name; others are told, and not refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: dict[str, Any]
    base: dict[str, PartIdentity] = {}
    prompts_sha256: str
    held_out_sha256: str = ""
    rewards_sha256: str = ""
    pairs_sha256: str = ""
    held_out_pairs_sha256: str = ""
    contents: dict[str, str] = {}
    packages: dict[str, str]

    @field_validator("config")
    @classmethod
    def _in_sections(cls, config: dict[str, Any]) -> dict[str, Any]:
        sections = [config.get(name, {}) for name in SECTIONS]
        evaluation = config.get("evaluation", {})
        judges = [config.get("rewards", {}), evaluation.get("rewards", {}) if isinstance(evaluation, dict) else {}]
        terms = [term for rewards in judges if isinstance(rewards, dict) for term in rewards.values()]
        sections += [*judges, *terms, *(term.get("options", {}) for term in terms if isinstance(term, dict))]
        if not all(isinstance(section, dict) for section in sections):
            raise ValueError("config: a section of it is none")
        names = [term.get("reward") for term in terms]
        if not all(isinstance(name, str | None) for name in names):
            raise ValueError("config: the name of a reward is none")
        return config


def check_same_run(
    then: RunIdentity, now: RunIdentity, checkpoint: Path, iteration: int, accepted: Collection[str] = ()
) -> list[Difference]:
    """Refuse to go on with other settings, prompts or another base than a checkpoint was trained with.

    Args:
        checkpoint, iteration: its folder, and the iterations that were done by then.
        accepted: the parts in which it may be another run all the same (:mod:`dgpo_plugin.training.accept`).

    Returns:
        The differences that were accepted.

    Raises:
        UserError: names everything else that differs.
    """
    _check_end(then, now, checkpoint, iteration)
    found = list(differences(then, now, checkpoint))
    refuse_unaccepted(found, accepted, checkpoint.parent.parent)
    return found


def differences(then: RunIdentity, now: RunIdentity, checkpoint: Path) -> Iterator[Difference]:
    """Everything that makes two runs of one, the same places with other content among it."""
    places = {*then.contents, *now.contents}
    settings, before = (
        {key: value for key, value in bound_settings(each.config).items() if key not in places} for each in (now, then)
    )
    before = {**_defaults(now.config, _added(settings, before)), **before}
    for key in sorted({*settings, *before}):
        if settings.get(key) != before.get(key):
            yield other_setting(key, before.get(key), settings.get(key), checkpoint)
    yield from _other_parts(then.base, now.base, checkpoint)
    hashes = [
        ("prompts", "prompts", then.prompts_sha256, now.prompts_sha256, "the prompts are not those"),
        (
            "prompts",
            "held-out prompts",
            then.held_out_sha256,
            now.held_out_sha256,
            "the held-out prompts are not those",
        ),
        ("pairs", "pairs", then.pairs_sha256, now.pairs_sha256, "the preferred pairs are not those"),
        (
            "pairs",
            "held-out pairs",
            then.held_out_pairs_sha256,
            now.held_out_pairs_sha256,
            "the held-out pairs are not those",
        ),
        ("reward", "reward's file", then.rewards_sha256, now.rewards_sha256, "the reward's file is not the one"),
    ]
    for key in sorted(places):
        part = "reward" if key.startswith("rewards.") else key.partition(".")[0]
        told = f"{key} does not lead to the content"
        hashes.append((part, key, then.contents.get(key, ""), now.contents.get(key, ""), told))
    for part, what, old, new, told in hashes:
        if old != new:
            yield Difference(part, what, old, new, f"{told} that {checkpoint} was trained with")


def _added(settings: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """The settings that a checkpoint may not have because there were none such; another reward's are no such ones."""
    others = ["rewards.", "evaluation.rewards."]
    if settings.get("algorithm.name") != before.get("algorithm.name"):
        others.append("algorithm.")
    return [key for key in settings if key not in before and not key.startswith(tuple(others))]


def _defaults(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """What some settings of a configuration are where it does not name them: a checkpoint of before there were such.

    A setting that is added leaves, with its default, runs as they were. One that has no default is left out.

    Args:
        config: of the run that goes on, not the checkpoint's, which may name files of code that nobody has read yet.
    """
    if not keys:
        return {}
    without = copy.deepcopy(dict(config))
    for key in keys:
        *path, last = key.split(".")
        section: Any = without
        for name in path:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(last, None)
    try:
        values = bound_settings(RunConfig.model_validate(without).model_dump(mode="json"))
    except (ValidationError, UserError):
        return {}
    return {key: values[key] for key in keys if key in values}


def _other_parts(then: BaseIdentity, now: BaseIdentity, checkpoint: Path) -> Iterator[Difference]:
    for name, found in compared_parts(then, now).items():
        if found.verdict == "the same":
            continue
        old, new = (part.digest if part else "" for part in (then.get(name), now.get(name)))
        if found.settings and old == new:  # the same weights, or none, under other settings
            old, new = (json.dumps({key: each[name].settings[key] for key in found.settings}) for each in (then, now))
        said = {
            "differs": f"the base's {name} is not the one that {checkpoint} was trained on",
            "the same but rounded": f"the base's {name} is the same but rounded: {checkpoint} was trained on weights "
            f"stored in another type",
            "cannot be told": f"whether the base's {name} is the one that {checkpoint} was trained on cannot be told",
        }[found.verdict]
        yield Difference("model", BASE + name, old, new, said + (f" ({found.detail})" if found.detail else ""))


def bound_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed run must have the same of, by key: no places, and of rewards what is in force for each."""
    shared = config.get("scoring", {})
    rewards = {label: _bound_reward(label, term, shared) for label, term in config.get("rewards", {}).items()}
    evaluation = {**config.get("evaluation", {})}
    judges = {label: _bound_reward(label, term, shared) for label, term in evaluation.pop("rewards", {}).items()}
    evaluation |= {"rewards": judges} if judges else {}
    algorithm = {**config.get("algorithm", {})}
    if is_from_file(name := str(algorithm.get("name", ""))):
        algorithm["name"] = name.rpartition(":")[2]
    training = {**config.get("training", {})}
    training["guard"] = _bound_guard(training.get("guard"), shared)
    values = {
        **config,
        "rewards": rewards,
        "evaluation": evaluation,
        "algorithm": algorithm,
        "scoring": {"aggregate": shared.get("aggregate")},
        "training": training,
    }
    return {key: value for key, value in _flat(values).items() if not key.startswith((*MAY_CHANGE, *PLACES))}


def _bound_reward(label: str, term: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    name = term.get("reward") or label
    left_out = SERVED_MAY_CHANGE if name in SERVED else ()
    options = {key: value for key, value in term.get("options", {}).items() if key not in left_out}
    return {
        "reward": name.rpartition(":")[2] if is_from_file(name) else name,
        "weight": term.get("weight"),
        "options": dict(option_values(options)),
        "precision": term.get("precision") or shared.get("precision"),
    }


def _bound_guard(guard: Any, shared: Mapping[str, Any]) -> dict[str, Any] | None:
    """A guard as far as it can change what a run leaves: not at all, unless it stops the run."""
    if not isinstance(guard, Mapping) or not guard.get("stop"):
        return None
    metrics = guard.get("metrics") or {}
    return {**guard, "metrics": {label: _bound_reward(label, term, shared) for label, term in metrics.items()}}


def rounding_notes(then: RunIdentity, now: RunIdentity) -> list[str]:
    """Lines on what is computed elsewhere or in other batches than before, for people."""
    lines = []
    for label, term in now.config.get("rewards", {}).items():
        before = then.config.get("rewards", {}).get(label, {})
        for key in ROUNDS_OTHERWISE:
            values = [
                each.get(key) or config.get("scoring", {}).get(key)
                for each, config in ((before, then.config), (term, now.config))
            ]
            if values[0] != values[1]:
                lines.append(f"reward {label}: {key} is {values[1]} and was {values[0]}; last bits may differ")
    return lines


def replan(config: RunConfig, then: RunIdentity | None, done: int, iterations: int) -> RunConfig:
    """The run with its end elsewhere: ``iterations`` in all.

    A learning rate that falls to the end follows, from the checkpoint on, the line of a run that long. That is neither
    the run that was planned nor one that was so long from the start, so ``training.replanned`` says it.

    Args:
        then: the run as its last checkpoint knows it, after ``done`` iterations; None if it has none.

    Raises:
        UserError: the checkpoint is beyond that end.
    """
    if iterations < done:
        raise UserError(f"--iterations {iterations}: the checkpoint {done:06d} is beyond that; give more")
    changes: dict[str, Any] = {"iterations": iterations}
    if then is not None and config.training.decay != "none":
        planned, before = _end(then)
        moved = iterations != planned and done > 0
        changes["replanned"] = (*before, (done, planned)) if moved else before
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def _end(identity: RunIdentity) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Where the run was to end, and how often that had been moved."""
    try:
        training = identity.config["training"]
        return int(training["iterations"]), tuple((done, planned) for done, planned in training["replanned"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError("the last checkpoint's configuration is none; remove its folder to go on without it") from error


def _check_end(then: RunIdentity, now: RunIdentity, checkpoint: Path, iteration: int) -> None:
    """A falling learning rate depends on where the run ends, which only :func:`replan` may move."""
    (planned, before), (end, recorded) = _end(then), _end(now)
    as_planned = end == planned and recorded == before
    if now.config["training"]["decay"] == "none" or as_planned or recorded == (*before, (iteration, planned)):
        return
    raise UserError(
        f"config.yaml: training.iterations is {end}, but {checkpoint} was trained with "
        f"{planned}, to which its learning rate falls; put it back, or move the end with: "
        f"{resume_command(checkpoint.parent.parent)} --iterations {end}"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
