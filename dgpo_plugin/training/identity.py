"""What a run's result depends on, and what of it may be another when the run is gone on with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.training.accept import Difference, other_setting, refuse_unaccepted

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
MAY_CHANGE_IN_A_REWARD = ("retries", "timeout", "on_failure")
"""Of those, what may also stand in a reward of its own."""


class RunIdentity(BaseModel):
    """What must not change while a run goes on.

    Attributes:
        config: the run's, as in config.yaml; of it, what :data:`MAY_CHANGE` names may.
        base_weights_hash, prompts_sha256, rewards_sha256: of the base's weights, of all prompts, and of the files of
            users' own rewards, empty if there are none.
        packages: versions by name; others are told, and not refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: dict[str, Any]
    base_weights_hash: str
    prompts_sha256: str
    rewards_sha256: str = ""
    packages: dict[str, str]


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
    """Everything that makes two runs of one."""
    settings, before = _bound_settings(now.config), _bound_settings(then.config)
    for key in sorted({*settings, *before}):
        if settings.get(key) != before.get(key):
            yield other_setting(key, before.get(key), settings.get(key), checkpoint)
    hashes = (
        ("model", "base", "base_weights_hash", "the base model's weights are not those that {} was trained on"),
        ("prompts", "prompts", "prompts_sha256", "the prompts are not those that {} was trained on"),
        ("reward", "reward's file", "rewards_sha256", "the reward's file is not the one that {} was trained with"),
    )
    old, new = then.model_dump(), now.model_dump()
    for part, what, key, told in hashes:
        if old[key] != new[key]:
            yield Difference(part, what, old[key], new[key], told.format(checkpoint))


def _bound_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed run must have the same of, by key."""
    rewards = {
        label: {key: value for key, value in term.items() if key not in MAY_CHANGE_IN_A_REWARD}
        for label, term in config.get("rewards", {}).items()
    }
    settings = _flat({**config, "rewards": rewards})
    return {key: value for key, value in settings.items() if not key.startswith(MAY_CHANGE)}


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
    training = identity.config["training"]
    return training["iterations"], tuple((done, planned) for done, planned in training["replanned"])


def _check_end(then: RunIdentity, now: RunIdentity, checkpoint: Path, iteration: int) -> None:
    """A falling learning rate depends on where the run ends, which only :func:`replan` may move."""
    (planned, before), (end, recorded) = _end(then), _end(now)
    as_planned = end == planned and recorded == before
    if now.config["training"]["decay"] == "none" or as_planned or recorded == (*before, (iteration, planned)):
        return
    raise UserError(
        f"config.yaml: training.iterations is {end}, but {checkpoint} was trained with "
        f"{planned}, to which its learning rate falls; put it back, or move the end with: "
        f"dgpo resume {checkpoint.parent.parent} --iterations {end}"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
