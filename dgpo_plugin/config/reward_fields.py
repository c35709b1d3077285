"""The part of a configuration that says what is rewarded, and how rewards are computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from dgpo_plugin.config.short_forms import spelled_out

Precision = Literal["fp32", "bf16", "fp16"]
RewardDevice = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps|xpu(:\d+)?)$")]


MOST = 2**63 - 1
"""Of whole numbers, as torch holds them."""


class Section(BaseModel):
    """A section of the configuration: it knows all its keys, and its values do not change."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true for 1, and whole numbers that neither a machine's integer nor a float can hold."""
        if isinstance(value, bool) and _takes_numbers_alone(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("must be a number, and not true or false")
        if isinstance(value, int) and abs(value) > MOST:
            raise ValueError(f"must be at most {MOST:,}")
        return value


def _takes_numbers_alone(kind: Any) -> bool:
    """Whether a field of this annotation takes numbers, and no truth values."""
    kinds = get_args(kind) or (kind,)
    return bool({int, float} & set(kinds)) and bool not in kinds


def refuse_unwritable(value: Any, key: str) -> None:
    """Refuse a value that is no text, truth value, finite number, null, or list or mapping of these by text.

    Raises:
        ValueError: says at which key.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} is {value}; give a finite number")
    if isinstance(value, list | tuple):
        for number, each in enumerate(value):
            refuse_unwritable(each, f"{key}.{number}")
    elif isinstance(value, Mapping):
        for name, each in value.items():
            if not isinstance(name, str):
                raise ValueError(f"{key} has the key {name!r}; put it in quotes")
            refuse_unwritable(each, f"{key}.{name}")
    elif not isinstance(value, str | bool | int | float | None):
        raise ValueError(f"{key} is {value!r:.100}; give a text, number or truth value, or a list or mapping of these")


class ScoringConfig(Section):
    """How rewards are computed; everything but `aggregate` and `max_skipped` may also stand in a reward of its own."""

    aggregate: Literal["rewards", "advantages"] = Field(
        "rewards",
        description="Of several rewards: the weighted sum of the rewards, whose scales then matter; or of their "
        "advantages, each reward normalised by itself first (GDPO, arXiv 2601.05242).",
    )
    device: RewardDevice = Field(
        "auto", description="Where rewards with weights run: cpu, cuda:1, ...; auto is the GPU if there is one."
    )
    precision: Precision = Field("fp32", description="Floating-point type of the weights of rewards that are networks.")
    batch_size: int = Field(16, ge=1, description="Pictures through a reward's network at once.")
    offload: bool = Field(False, description="Keep rewards' weights in main memory between two uses.")
    retries: int = Field(
        2, ge=0, description="Further attempts after an exception; a call that timed out is waited for once more."
    )
    timeout: float | None = Field(None, gt=0, le=10**7, description="Seconds an attempt may take; null for any.")
    on_failure: Literal["stop", "skip"] = Field(
        "stop",
        description="Of a picture that a reward fails for, after all attempts, or gives no finite number: stop ends "
        "the run; skip leaves the picture out, with advantage 0 and in no mean.",
    )
    max_skipped: float = Field(0.1, ge=0, lt=1, description="Share of an iteration's pictures that may be skipped.")


class RewardTerm(Section):
    """One reward of a run, under a label of the user's."""

    reward: str | None = Field(
        None,
        description="As in `dgpo list rewards`, or one's own, path/to/file.py:function; null where the label says it.",
    )
    weight: float = Field(
        1.0,
        description="What its values are multiplied by before they are summed; below 0 for what is to fall, and 0 for "
        "what only judges beside the others, where the algorithm has a use for that (flow-grpo-gardo).",
    )
    options: dict[str, Any] = Field(
        {}, description="Its own settings, such as {weights: /models/HPS_v2.1_compressed.pt}."
    )
    device: RewardDevice | None = Field(None, description="As scoring.device, for this reward; null for that.")
    precision: Precision | None = Field(None, description="As scoring.precision, for this reward; null for that.")
    batch_size: int | None = Field(None, ge=1, description="As scoring.batch_size, for this reward; null for that.")
    offload: bool | None = Field(None, description="As scoring.offload, for this reward; null for that.")
    retries: int | None = Field(None, ge=0, description="As scoring.retries, for this reward; null for that.")
    timeout: float | None = Field(
        None, gt=0, le=10**7, description="As scoring.timeout, for this reward; null for that."
    )
    on_failure: Literal["stop", "skip"] | None = Field(
        None, description="As scoring.on_failure, for this reward; null for that."
    )
    isolate: bool = Field(
        False,
        description="Run it in a process of its own, to which the pictures are copied: a time-out ends that process, "
        "and the next attempt starts another; a crash is one failed attempt.",
    )

    def name(self, label: str) -> str:
        """The registered name, or the file's, of the reward under a label."""
        return label if self.reward is None else self.reward

    def scoring(self, shared: ScoringConfig) -> ScoringConfig:
        """How this reward is computed: as the run's are, but for what it says itself."""
        own = self.model_dump(exclude={"reward", "weight", "options", "isolate"}, exclude_none=True)
        return shared.model_copy(update=own)


def refuse_weightless(terms: dict[str, RewardTerm]) -> dict[str, RewardTerm]:
    """Rewards as they are, all of which count.

    Raises:
        ValueError: names one that does not.
    """
    for label, term in terms.items():
        if term.weight == 0:
            raise ValueError(f"{label}.weight must not be 0; leave the reward out instead")
    return terms


def _usable(terms: dict[str, RewardTerm]) -> dict[str, RewardTerm]:
    """Rewards as they are, unless a label is one that no table can show, or options ones that no file could say.

    Raises:
        ValueError: says which.
    """
    for label, term in terms.items():
        refuse_unwritable(term.options, f"{label}.options")
        if not label.isprintable() or not label.strip():
            raise ValueError(f"has the label {label!r}; a label is one line of text, as tables show it")
    return terms


TrainedRewards = Annotated[dict[str, RewardTerm], BeforeValidator(spelled_out), AfterValidator(_usable)]
"""What a run is trained on, and what judges beside it with the weight 0, if its algorithm has a use for that."""
RewardTerms = Annotated[TrainedRewards, AfterValidator(refuse_weightless)]
"""Rewards by label, all of which count: short forms are spelled out, and what cannot be used is refused."""
PlainTerms = Annotated[dict[str, RewardTerm], AfterValidator(refuse_weightless)]
"""Rewards by label, all of which count, where they are spelled out already."""
