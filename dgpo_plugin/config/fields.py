"""The whole configuration as frozen pydantic models; :mod:`dgpo_plugin.config.load` reads them.

One name for one thing (docs/architecture.md). Defaults are the published ones; presets (``dgpo list``) carry the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.names import ALGORITHMS
from dgpo_plugin.config.around_training import CheckpointConfig as CheckpointConfig
from dgpo_plugin.config.around_training import EvaluationConfig as EvaluationConfig
from dgpo_plugin.config.around_training import LoggingConfig as LoggingConfig
from dgpo_plugin.config.around_training import PromptsConfig as PromptsConfig
from dgpo_plugin.config.guard_fields import GuardConfig as GuardConfig
from dgpo_plugin.config.guard_fields import refuse_trained
from dgpo_plugin.config.learned_from import REWARDED, Need, PairsConfig, filled_in, misplaced
from dgpo_plugin.config.model_fields import LoraConfig as LoraConfig
from dgpo_plugin.config.model_fields import ModelConfig as ModelConfig
from dgpo_plugin.config.reward_fields import Precision as Precision
from dgpo_plugin.config.reward_fields import RewardDevice as RewardDevice
from dgpo_plugin.config.reward_fields import RewardTerm as RewardTerm
from dgpo_plugin.config.reward_fields import ScoringConfig as ScoringConfig
from dgpo_plugin.config.reward_fields import Section, TrainedRewards, refuse_weightless
from dgpo_plugin.config.short_forms import weighted_labels

Schedule = Literal["dpm", "native"]
"""Noise levels of DPM-Solver++'s own scheduler, or of the pipeline's."""
OdeSampler = Literal["euler", "dpm-solver++"]
AdvantageStd = Annotated[
    Literal["group", "iteration", "none"],
    Field(
        description="Whose rewards' standard deviation advantages are divided by: the prompt group's, the "
        "iteration's, or none, so that a group of near-equal rewards says little; weights beside them, as kl_weight, "
        "then mean something else."
    ),
]


MOST_IMAGES = 1_000_000
"""Of an iteration, over all processes: hundreds of times what the papers train on."""


class RolloutConfig(Section):
    """How images are sampled in training."""

    steps: int = Field(
        10, ge=2, description="Denoiser calls of an image; with guidance each is two denoiser evaluations."
    )
    schedule: Schedule | None = Field(
        None,
        description="Which noise levels the steps are at. dpm is the grid of diffusers' DPMSolverMultistepScheduler, "
        "on which DPM-Solver++ is stable; native the pipeline's own, made for Euler steps, whose last step is too "
        "long for a multistep solver. Null for dpm with DPM-Solver++, else native.",
    )
    shift: float | None = Field(
        None,
        gt=0,
        description="How far the schedule leans towards noise: sigma = shift u / (1 + (shift - 1) u); null for the "
        "model's own.",
    )


class AlgorithmConfig(Section):
    """What every algorithm's configuration has; the rest is in its file in :mod:`dgpo_plugin.algorithms`.

    Class attributes:
        needs: what it learns from: a rollout and its rewards, or preferred pairs.
    """

    needs: ClassVar[frozenset[Need]] = REWARDED

    name: str = Field(description="As in `dgpo list algorithms`, or one's own, path/to/file.py:Algorithm.")
    advantage_std: AdvantageStd = "group"

    @property
    def default_schedule(self) -> Schedule:
        """The noise levels that suit its sampler, where ``rollout.schedule`` names none."""
        return "native"

    def check_rollout(self, steps: int, schedule: Schedule) -> None:
        """Refuse rollouts that it cannot be trained on.

        Args:
            steps: of the sampler.

        Raises:
            ValueError: too few steps, or noise levels that are not for its sampler.
        """

    def check_training(self, training: TrainingConfig) -> None:
        """Refuse a loop that it cannot be trained in, by a ValueError that says why."""

    def check_rewards(self, rewards: dict[str, RewardTerm]) -> None:
        """Refuse rewards that it has no use for, by a ValueError that says why."""
        try:
            refuse_weightless(rewards)
        except ValueError as error:
            raise ValueError(f"rewards.{error}") from None

    @property
    def picture_network(self) -> str | None:
        """What its field ``features`` names, if it has one: a network, whose features of pictures it makes its
        advantages with, by hub id or folder."""
        return None


Control = Literal["zero", "shuffled", "best"]


class TrainingConfig(Section):
    """The loop. The number of processes changes none of it."""

    seed: int = Field(0, ge=0, description="What every random draw of the run is derived from.")
    iterations: int = Field(
        100, ge=1, description="Iterations of the run, each a rollout, its rewards and its optimizer steps."
    )
    prompts_per_iteration: int = Field(
        8, ge=1, description="P, prompt groups in an iteration, over all processes together."
    )
    group_size: int = Field(16, ge=2, description="G, images of one prompt in an iteration, compared with each other.")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="Images that go through the denoiser at once, per process; changes the memory, never the result. "
        "Null for all of a process's.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute the denoiser's inner values again in the backward pass instead of keeping them: far less "
        "memory, a third more time, the same result.",
    )
    process_timeout: float = Field(
        1800.0,
        gt=0,
        le=10**7,
        description="Seconds that a process waits for the others of a run, their rewards included, before it ends with "
        "an error; no say in a run of one process.",
    )
    updates_per_iteration: int = Field(
        1,
        ge=1,
        description="Optimizer steps in an iteration; the prompt groups are split evenly among them.",
    )
    inner_epochs: int = Field(
        1,
        ge=1,
        description="Times that an iteration's samples are gone through, each time with noise and flow times anew; "
        "each adds its optimizer steps, and no rollout.",
    )
    learning_rate: float = Field(3e-4, gt=0, description="Learning rate of AdamW at the start of the run.")
    decay: Literal["none", "linear"] = Field(
        "none", description="How the learning rate falls over the run: not at all, or along a line to nothing."
    )
    replanned: tuple[tuple[int, int], ...] = Field(
        (),
        description="(iterations done, iterations planned until then), for each time that `dgpo resume --iterations` "
        "moved the end of a falling learning rate; written there, not by hand.",
    )
    weight_decay: float = Field(
        1e-4, ge=0, description="Weight decay of AdamW: a step shrinks the weights by the learning rate times this."
    )
    max_grad_norm: float = Field(
        1.0, gt=0, description="A gradient whose norm over all of the adapter is larger is scaled down to this."
    )
    ema_decay: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="Share that a refresh keeps of the evaluation weights, a moving average of the trained ones; after "
        "s optimizer steps at most (1 + s) / (10 + s).",
    )
    ema_every: int = Field(
        8,
        ge=1,
        description="Optimizer steps between two refreshes of that average; the first is one step early (after 7, "
        "15, 23, ... for 8), as in the released codes.",
    )
    ema_repeats: int = Field(
        1,
        ge=1,
        description="Times that a refresh is done at once. DGPO's released code does it once for every batch that a "
        "process cuts an iteration into: 2 in its GenEval and OCR settings, 4 in PickScore's.",
    )

    control: Control | None = Field(
        None,
        description="Train on something else than the reward, to see what a run owes to it: on no advantage at all "
        "(zero), on those of each group dealt out at random (shuffled), or on the best picture of each group alone "
        "(best).",
    )
    guard: GuardConfig | None = Field(
        None, description="An alarm for reward hacking, with the fields below; null for none, which costs nothing."
    )

    def rate_at(self, share_done: float) -> float:
        """The learning rate after a share of the run, in [0, 1]."""
        return self.learning_rate * (1 - share_done if self.decay == "linear" else 1)

    @property
    def images(self) -> int:
        """P * G, an iteration's."""
        return self.prompts_per_iteration * self.group_size

    @property
    def updates(self) -> int:
        """Optimizer steps of an iteration, at the most."""
        return self.updates_per_iteration * self.inner_epochs

    @model_validator(mode="after")
    def _within_reason(self) -> TrainingConfig:
        if self.images > MOST_IMAGES:
            raise ValueError(
                f"prompts_per_iteration ({self.prompts_per_iteration}) times group_size ({self.group_size}) is more "
                f"than {MOST_IMAGES:,} images an iteration; lower one of them"
            )
        if self.learning_rate * self.weight_decay >= 1:
            raise ValueError(
                f"weight_decay ({self.weight_decay:g}) times learning_rate ({self.learning_rate:g}) is 1 or more, so "
                f"that a step would turn the weights over instead of shrinking them; lower weight_decay"
            )
        return self

    @model_validator(mode="after")
    def _updates_split_evenly(self) -> TrainingConfig:
        if self.prompts_per_iteration % self.updates_per_iteration:
            raise ValueError(
                f"updates_per_iteration ({self.updates_per_iteration}) must divide "
                f"prompts_per_iteration ({self.prompts_per_iteration}), so that no prompt group is cut"
            )
        return self


class RunConfig(Section):
    """Everything a training run depends on."""

    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    prompts: PromptsConfig
    pairs: PairsConfig | None = Field(
        None, description="Preferred pairs, for an algorithm that learns from them; then rewards and prompts are none."
    )
    rewards: TrainedRewards = Field(
        description="What is to be raised, by labels of yours; `ocr`, `[ocr, hpsv2.1]` and `{ocr: 2}` are short forms."
    )
    scoring: ScoringConfig = ScoringConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: SerializeAsAny[AlgorithmConfig] = Field({"name": "dgpo"}, validate_default=True)
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="before")
    @classmethod
    def _learned_from(cls, values: Any) -> Any:
        """What follows from what the algorithm learns from, where it is known."""
        if not isinstance(values, Mapping):
            return values
        algorithm, needs = values.get("algorithm"), REWARDED
        if isinstance(algorithm, AlgorithmConfig):
            needs = algorithm.needs
        elif isinstance(algorithm, Mapping):
            with contextlib.suppress(ValueError):  # said of the field itself
                needs = _config_class(algorithm).needs
        return filled_in(values, needs)

    @field_validator("algorithm", mode="before")
    @classmethod
    def _named_algorithm(cls, value: Any) -> Any:
        """Have the algorithm that is named validate what is its own."""
        if isinstance(value, AlgorithmConfig) or not isinstance(value, Mapping):
            return value
        return _config_class(value).model_validate(value)

    @field_validator("rewards")
    @classmethod
    def _at_least_one(cls, rewards: dict[str, RewardTerm], info: ValidationInfo) -> dict[str, RewardTerm]:
        if not rewards and info.data.get("pairs", rewards) is None:
            raise ValueError("is empty; name at least one of `dgpo list rewards`")
        return rewards

    @property
    def judged_by(self) -> dict[str, RewardTerm]:
        """The rewards of the run's pictures, by label: those that it learns from, else its evaluation's."""
        return self.rewards or self.evaluation.rewards

    @property
    def reward_label(self) -> str:
        """The rewards for people and headers, as ``ocr`` or ``1 ocr + 0.5 hps``; ``none`` where there are none."""
        return weighted_labels({label: term.weight for label, term in self.judged_by.items()}.items()) or "none"

    @property
    def schedule(self) -> Schedule:
        """The rollout's noise levels: what was asked for, else what suits the algorithm's sampler."""
        return self.rollout.schedule or self.algorithm.default_schedule

    @model_validator(mode="after")
    def _parts_suit(self) -> RunConfig:
        if self.lora.target_modules == ():
            raise ValueError("lora.target_modules is empty, so nothing would be trained; leave it out, or name layers")
        if problems := misplaced(self):
            raise ValueError("; ".join(problems))
        self.algorithm.check_rollout(self.rollout.steps, self.schedule)
        self.algorithm.check_training(self.training)
        self.algorithm.check_rewards(self.rewards)
        if self.training.guard is not None:
            if self.pairs is not None:
                raise ValueError("training.guard watches what a reward does, and a run on pairs has none; leave it out")
            if self.prompts.held_out is None:
                raise ValueError("training.guard looks at validation prompts; name them in prompts.held_out")
            refuse_trained(self.training.guard, self.rewards)
        return self


def _config_class(algorithm: Mapping[str, Any]) -> type[AlgorithmConfig]:
    """The configuration of the algorithm that a section names.

    Raises:
        ValueError: it names none.
    """
    if "name" not in algorithm:
        raise ValueError(f"name is missing; name {', '.join(ALGORITHMS)}")
    try:
        config = vars(ALGORITHMS.load(str(algorithm["name"]))).get("Config")
    except UserError as error:
        raise ValueError(str(error)) from error
    if not (isinstance(config, type) and issubclass(config, AlgorithmConfig)):
        raise ValueError(f"{algorithm['name']} names no AlgorithmConfig as its Config; see docs/adding-an-algorithm.md")
    return config
