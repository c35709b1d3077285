"""The whole configuration as frozen pydantic models; :mod:`dgpo_plugin.config.load` reads them.

One name for one thing (docs/architecture.md). Defaults are the published ones; presets (``dgpo list``) carry the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator, model_validator

from dgpo_plugin.common.errors import UserError
from dgpo_plugin.common.names import ALGORITHMS
from dgpo_plugin.config.short_forms import spelled_out, weighted_labels

Schedule = Literal["dpm", "native"]
"""Noise levels of DPM-Solver++'s own scheduler, or of the pipeline's."""
OdeSampler = Literal["euler", "dpm-solver++"]
AdvantageStd = Literal["group", "iteration"]
ADVANTAGE_STD = "whose rewards' standard deviation advantages are divided by: the prompt group's, or the iteration's"
Precision = Literal["fp32", "bf16", "fp16"]
RewardDevice = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps|xpu(:\d+)?)$")]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Config):
    """The base model.

    Attributes:
        path: ``shapes`` (shipped), a local diffusers folder, or a hub id.
        precision: of the frozen weights and the forward passes, but the VAE's; the adapter is always trained in
            float32. ``auto`` is bf16 where it works and is faster, else fp32: tried out on a CPU, and written into the
            run as what it is.
        vae_precision: of the VAE, whose pictures are what is rewarded; fp16 overflows in some (Stable Diffusion XL's).
        max_sequence_length: tokens of the T5 encoder, where the model has one.
        embedded_guidance: what a guidance-distilled model (FLUX dev) is told; others have no use for it.
        resolution: pixels a side; null for the model's own.
        quantization: of the frozen denoiser's linear layers, by the package that must be installed; null for none.
        shard: split the frozen base over the processes (FSDP2) instead of copying it to each, if it fits on none. One
            process holds all of it, and gains nothing.
        offload: keep the text encoders and the VAE in main memory while they are not used, and the denoiser while the
            encoders are.
        sliced_decode: decode image by image: less memory, the same pictures.
        tiled_decode: decode tile by tile too: still less memory, and faint seams in pictures larger than a tile, which
            rewards would see; so training refuses those unless this is ``accept-seams``.
        compile: let torch.compile fuse the denoiser's repeated blocks: a minute or more at the start, other rounding.
    """

    path: str
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    vae_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    max_sequence_length: int = Field(256, ge=1, le=512)
    embedded_guidance: float = Field(3.5, ge=0)
    resolution: int | None = Field(None, ge=16)
    quantization: Literal["torchao-int8", "bitsandbytes-int8", "bitsandbytes-nf4"] | None = None
    shard: bool = False
    offload: bool = False
    sliced_decode: bool = False
    tiled_decode: Literal[False, True, "accept-seams"] = False
    compile: bool = False


class LoraConfig(_Config):
    """The adapter.

    Attributes:
        init: what lora_A starts from (lora_B is 0): ``kaiming``, uniform within 1 / sqrt(inputs), peft's default; or
            ``gaussian``, normal with standard deviation 1 / rank, peft's ``init_lora_weights="gaussian"``, as in DGPO's
            released code.
        target_modules: null for the model family's attention projections.
        license: under which it is passed on, for its card; empty for none stated. The base model's terms may bind it.
    """

    rank: int = Field(64, ge=1)
    alpha: float = Field(128, gt=0)
    init: Literal["kaiming", "gaussian"] = "kaiming"
    target_modules: tuple[str, ...] | None = None
    license: str = ""


class ScoringConfig(_Config):
    """How rewards are computed; everything but ``aggregate`` may also stand in a reward of its own."""

    aggregate: Literal["rewards", "advantages"] = Field(
        "rewards",
        description="Of several rewards: the weighted sum of the rewards, whose scales then matter; or of their "
        "advantages, each reward normalised by itself first (GDPO, arXiv 2601.05242).",
    )
    device: RewardDevice = Field(
        "auto", description="Where rewards with weights run: cpu, cuda:1, ...; auto is the GPU if there is one."
    )
    precision: Precision = Field("fp32", description="Of the weights of rewards that are networks.")
    batch_size: int = Field(16, ge=1, description="Pictures through a reward's network at once.")
    offload: bool = Field(False, description="Keep rewards' weights in main memory between two uses.")
    retries: int = Field(
        2,
        ge=0,
        description="Further attempts after an exception; after a time-out the late call is waited for once more.",
    )
    timeout: float | None = Field(None, gt=0, description="Seconds an attempt may take; null for any.")


class RewardTerm(_Config):
    """One reward of a run, under a label of the user's."""

    reward: str | None = Field(
        None,
        description="As in `dgpo list rewards`, or one's own, path/to/file.py:function; null where the label says it.",
    )
    weight: float = Field(
        1.0,
        description="What its values are multiplied by before they are summed; below 0 for what is to fall, never 0.",
    )
    options: dict[str, Any] = Field(
        {}, description="Its own settings, such as {weights: /models/HPS_v2.1_compressed.pt}."
    )
    device: RewardDevice | None = Field(None, description="As scoring.device, for this reward; null for that.")
    precision: Precision | None = Field(None, description="As scoring.precision, for this reward; null for that.")
    batch_size: int | None = Field(None, ge=1, description="As scoring.batch_size, for this reward; null for that.")
    offload: bool | None = Field(None, description="As scoring.offload, for this reward; null for that.")
    retries: int | None = Field(None, ge=0, description="As scoring.retries, for this reward; null for that.")
    timeout: float | None = Field(None, gt=0, description="As scoring.timeout, for this reward; null for that.")

    def name(self, label: str) -> str:
        """The registered name, or the file's, of the reward under a label."""
        return label if self.reward is None else self.reward

    def scoring(self, shared: ScoringConfig) -> ScoringConfig:
        """How this reward is computed: as the run's are, but for what it says itself."""
        own = self.model_dump(exclude={"reward", "weight", "options"}, exclude_none=True)
        return shared.model_copy(update=own)

    @field_validator("weight")
    @classmethod
    def _counts(cls, weight: float) -> float:
        if weight == 0:
            raise ValueError("must not be 0; leave the reward out instead")
        return weight


class RolloutConfig(_Config):
    """How images are sampled in training.

    Attributes:
        steps: denoiser calls (twice as many evaluations with guidance).
        schedule: which noise levels they are at. ``dpm`` is the grid of diffusers' DPMSolverMultistepScheduler, on
            which DPM-Solver++ is stable; ``native`` the pipeline's own, made for Euler steps, whose last step is too
            long for a multistep solver. Null for ``dpm`` with DPM-Solver++, else ``native``.
        shift: of the timestep schedule; null for the model's own.
    """

    steps: int = Field(10, ge=2)
    schedule: Schedule | None = None
    shift: float | None = Field(None, gt=0)


class AlgorithmConfig(_Config):
    """What every algorithm's configuration has; the rest is in its file in :mod:`dgpo_plugin.algorithms`."""

    name: str
    advantage_std: AdvantageStd = Field("group", description=ADVANTAGE_STD)

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


class TrainingConfig(_Config):
    """The loop. P and G are global: the number of processes never changes them.

    Attributes:
        iterations: rollout, reward, optimizer step(s).
        prompts_per_iteration: P prompt groups an iteration.
        group_size: G images a group.
        micro_batch_size: images that go through the denoiser at once, per process; changes the memory, never the
            result. Null for all of a process's.
        gradient_checkpointing: compute the denoiser's inner values again in the backward pass instead of keeping them:
            far less memory, a third more time, the same result.
        updates_per_iteration: optimizer steps an iteration; the prompt groups are split evenly among them.
        decay: how the learning rate falls over the run: not at all, or along a line to nothing.
        ema_decay: of the evaluation weights' moving average; after s optimizer steps at most (1 + s) / (10 + s).
        ema_every: optimizer steps between two refreshes of it; the first is one step early (after 7, 15, 23, ... for
            8), as in the released codes.
        ema_repeats: times that a refresh is done at once. DGPO's released code does it once for every batch that a
            process cuts an iteration into: 2 in its GenEval and OCR settings, 4 in PickScore's.
        replanned: (iterations done, iterations planned until then), for each time that ``dgpo resume --iterations``
            moved the end of a falling learning rate; written there, not by hand.
    """

    seed: int = Field(0, ge=0)
    iterations: int = Field(100, ge=1)
    prompts_per_iteration: int = Field(8, ge=1)
    group_size: int = Field(16, ge=2)
    micro_batch_size: int | None = Field(None, ge=1)
    gradient_checkpointing: bool = False
    updates_per_iteration: int = Field(1, ge=1)
    learning_rate: float = Field(3e-4, gt=0)
    decay: Literal["none", "linear"] = "none"
    replanned: tuple[tuple[int, int], ...] = ()
    weight_decay: float = Field(1e-4, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.9, ge=0, lt=1)
    ema_every: int = Field(8, ge=1)
    ema_repeats: int = Field(1, ge=1)

    def rate_at(self, share_done: float) -> float:
        """The learning rate after a share of the run, in [0, 1]."""
        return self.learning_rate * (1 - share_done if self.decay == "linear" else 1)

    @property
    def images(self) -> int:
        """P * G, an iteration's."""
        return self.prompts_per_iteration * self.group_size

    @model_validator(mode="after")
    def _updates_split_evenly(self) -> TrainingConfig:
        if self.prompts_per_iteration % self.updates_per_iteration:
            raise ValueError(
                f"updates_per_iteration ({self.updates_per_iteration}) must divide "
                f"prompts_per_iteration ({self.prompts_per_iteration}), so that no prompt group is cut"
            )
        return self


class EvaluationConfig(_Config):
    """How a finished adapter is sampled and scored: what its users will do.

    Attributes:
        steps, guidance: of the pipeline's own Euler sampler.
        images: pictures that ``reward before / after`` is the mean of.
    """

    steps: int = Field(40, ge=1)
    guidance: float = Field(4.5, ge=1)
    images: int = Field(128, ge=2)


class LoggingConfig(_Config):
    """``metrics.jsonl`` is always written; ``trackers`` are accelerate's (tensorboard, wandb, ...)."""

    trackers: tuple[str, ...] = ()
    sample_every: int = Field(10, ge=0)
    sample_images: int = Field(16, ge=1)


class CheckpointConfig(_Config):
    """What ``dgpo resume`` goes on from.

    Attributes:
        every: iterations between two checkpoints; the last iteration has one in any case.
        keep: newest checkpoints kept, besides the best (by mean reward since the one before).
    """

    every: int = Field(10, ge=1)
    keep: int = Field(2, ge=1)


class PromptsConfig(_Config):
    """Prompt sets: a ``.txt`` or ``.jsonl`` file, or a built-in set such as ``shapes/train``.

    Attributes:
        train: what reinforcement learning sees.
        held_out: what ``reward before / after`` is measured on, disjoint from ``train``; null for ``train`` itself.
    """

    train: str
    held_out: str | None = None


class RunConfig(_Config):
    """Everything a training run depends on.

    Attributes:
        rewards: what is to be raised, by labels of the user's; ``ocr``, ``[ocr, hpsv2.1]`` and ``{ocr: 2}`` are short
            for ``{ocr: {weight: 1}}`` and so on.
    """

    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    prompts: PromptsConfig
    rewards: dict[str, RewardTerm]
    scoring: ScoringConfig = ScoringConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: SerializeAsAny[AlgorithmConfig] = Field({"name": "dgpo"}, validate_default=True)
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @field_validator("algorithm", mode="before")
    @classmethod
    def _named_algorithm(cls, value: Any) -> Any:
        """Have the algorithm that is named validate what is its own."""
        if isinstance(value, AlgorithmConfig) or not isinstance(value, Mapping):
            return value
        if "name" not in value:
            raise ValueError(f"name is missing; name {', '.join(ALGORITHMS)}")
        try:
            config: type[AlgorithmConfig] = ALGORITHMS.load(str(value["name"])).Config
        except UserError as error:
            raise ValueError(str(error)) from error
        return config.model_validate(value)

    @field_validator("rewards", mode="before")
    @classmethod
    def _spell_out(cls, rewards: Any) -> Any:
        return spelled_out(rewards)

    @field_validator("rewards")
    @classmethod
    def _at_least_one(cls, rewards: dict[str, RewardTerm]) -> dict[str, RewardTerm]:
        if not rewards:
            raise ValueError("is empty; name at least one of `dgpo list rewards`")
        return rewards

    @property
    def reward_label(self) -> str:
        """The rewards for people and headers, as ``ocr`` or ``1 ocr + 0.5 hps``."""
        return weighted_labels({label: term.weight for label, term in self.rewards.items()}.items())

    @property
    def schedule(self) -> Schedule:
        """The rollout's noise levels: what was asked for, else what suits the algorithm's sampler."""
        return self.rollout.schedule or self.algorithm.default_schedule

    @model_validator(mode="after")
    def _rollout_suits(self) -> RunConfig:
        self.algorithm.check_rollout(self.rollout.steps, self.schedule)
        return self
