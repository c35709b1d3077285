"""The whole configuration as frozen pydantic models; :mod:`dgpo_plugin.config.load` reads them.

One name for one thing (docs/architecture.md). Defaults are the published ones; presets (``dgpo list``) carry the rest.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Schedule = Literal["dpm", "native"]
"""Noise levels of DPM-Solver++'s own scheduler, or of the pipeline's."""
OdeSampler = Literal["euler", "dpm-solver++"]
AdvantageStd = Literal["group", "iteration"]
"""Whose rewards' standard deviation advantages are divided by: the prompt group's, or the whole iteration's."""


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Config):
    """The base model, and how it is held in memory."""

    path: str = Field(
        "shapes", description="A world's name (`dgpo list worlds`), a local diffusers folder, or a hub id."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="Floating-point type of the frozen weights and the forward passes, but the VAE's; the adapter is "
        "always trained in float32. auto is bf16 where it works and is faster, else fp32: tried out on a CPU, and "
        "written into the run as what it is.",
    )
    vae_precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="Floating-point type of the VAE, whose pictures are what is rewarded; fp16 overflows in some "
        "(Stable Diffusion XL's).",
    )
    max_sequence_length: int = Field(
        256, ge=1, le=512, description="Tokens of the T5 encoder, where the model has one."
    )
    embedded_guidance: float = Field(
        3.5, ge=0, description="What a guidance-distilled model (FLUX dev) is told; others have no use for it."
    )
    resolution: int | None = Field(None, ge=16, description="Pixels on a side; null for the model's own.")
    quantization: Literal["torchao-int8", "bitsandbytes-int8", "bitsandbytes-nf4"] | None = Field(
        None,
        description="How the frozen denoiser's linear layers are made smaller, and by which package, which must be "
        "installed; null for not at all.",
    )
    shard: bool = Field(
        False,
        description="Split the frozen base over the processes (FSDP2) instead of copying it to each, if it fits on "
        "none. One process holds all of it, and gains nothing.",
    )
    offload: bool = Field(
        False,
        description="Keep the text encoders and the VAE in main memory while they are not used, and the denoiser while "
        "the encoders are.",
    )
    sliced_decode: bool = Field(False, description="Decode image by image: less memory, the same pictures.")
    tiled_decode: Literal[False, True, "accept-seams"] = Field(
        False,
        description="Decode tile by tile too: still less memory, and faint seams in pictures larger than a tile, which "
        "rewards would see; so training refuses those unless this is accept-seams.",
    )
    compile: bool = Field(
        False,
        description="Let torch.compile fuse the denoiser's repeated blocks: a minute or more at the start, other "
        "rounding.",
    )


class LoraConfig(_Config):
    """The adapter."""

    rank: int = Field(
        64, ge=1, description="Columns of lora_B: how many directions the update of a layer's weights may have."
    )
    alpha: float = Field(128, gt=0, description="The update is multiplied by alpha / rank.")
    init: Literal["kaiming", "gaussian"] = Field(
        "kaiming",
        description="What lora_A starts from (lora_B is 0): kaiming, uniform within 1 / sqrt(inputs), peft's default; "
        "or gaussian, normal with standard deviation 1 / rank, peft's init_lora_weights=\"gaussian\", as in DGPO's "
        "released code.",
    )
    target_modules: tuple[str, ...] | None = Field(
        None,
        description="Ends of the names of the linear layers that get an adapter; null for the model family's attention "
        "projections.",
    )
    license: str = Field(
        "",
        description="License under which the adapter is passed on, for its card; empty for none stated. The base "
        "model's terms may bind it.",
    )


class RewardConfig(_Config):
    """What is to be raised.

    Attributes:
        name: as in ``dgpo list rewards``, or your own: ``path/to/file.py:function``; null with ``sum``.
        sum: several rewards by name, each with its weight, instead of ``name``.
        aggregate: of several, the weighted sum of the ``rewards``, whose scales then matter; or of their
            ``advantages``, each reward normalised by itself first (GDPO, arXiv 2601.05242).
        options: a reward's own settings by its name, such as ``{hpsv2.1: {weights: /models/HPS_v2.1_compressed.pt}}``.
        device: where rewards with weights run; ``auto`` is the GPU if there is one.
        precision: of their weights.
        batch_size: pictures through them at once.
        offload: keep their weights in main memory between two uses.
        retries: further attempts after an exception; after a time-out the late call is waited for once more.
        timeout: seconds an attempt may take; null for any.
    """

    name: str | None = "shapes"
    sum: dict[str, float] = {}
    aggregate: Literal["rewards", "advantages"] = "rewards"
    options: dict[str, dict[str, Any]] = {}
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps|xpu(:\d+)?)$")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch_size: int = Field(16, ge=1)
    offload: bool = False
    retries: int = Field(2, ge=0)
    timeout: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_of_two(self) -> RewardConfig:
        if bool(self.sum) == (self.name is not None):
            raise ValueError("give name, or sum with name: null")
        return self

    @property
    def label(self) -> str:
        """For people and headers."""
        return self.name or " + ".join(f"{weight:g} {name}" for name, weight in self.sum.items())


class RolloutConfig(_Config):
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


class DGPOConfig(_Config):
    """DGPO (arXiv 2510.08425); the defaults are its GenEval setting with a guided rollout.

    Attributes:
        sampler: deterministic sampler of the rollout.
        beta: sharpness of the group weight w_g = sigmoid(S_g); shapes the weight, not the step.
        kl_weight: on the squared distance between the policy's and the frozen base's velocity.
        clip: half-width c of the trust region on exp(d_old - d); null for none (saves the old policy's pass).
        timesteps: M, sampler steps trained on in an iteration, drawn without replacement.
        noisiest_steps: K, the steps they are drawn from.
        t_min: instead of sampler steps, train on M flow times drawn uniformly from [t_min, the rollout's first sigma],
            as in the paper's algorithm 1; ``noisiest_steps`` then has no say. Its authors name shift(0.3) and
            shift(0.4), .5625 and .6667 at shift 3. Null for sampler steps, as in the released code.
        text_dropout: share of prompt groups, drawn anew for each timestep, that are trained on the empty prompt instead
            of their own, under policy, old policy and reference alike; the paper's is 0.05, the released code has none.
        old_policy_after: the rollout comes from the old policy in iterations that begin after more optimizer steps than
            this (the released code's ``>``: at 200, from the first iteration that begins with 201 of them done).
        reference: what d_ref is measured under: the frozen base, or the old policy (TDM-R1).
        rollout_guidance: classifier-free guidance when sampling; 1 is none.
        reference_guidance: guidance of the frozen base's velocity; 1 is none.
    """

    name: Literal["dgpo"] = "dgpo"
    sampler: OdeSampler = "dpm-solver++"
    beta: float = Field(100.0, gt=0)
    kl_weight: float = Field(0.02, ge=0)
    clip: float | None = Field(1e-2, gt=0)
    timesteps: int = Field(4, ge=1)
    noisiest_steps: int = Field(5, ge=1)
    t_min: float | None = Field(None, ge=0, lt=1)
    text_dropout: float = Field(0.0, ge=0, lt=1)
    old_policy_after: int = Field(500, ge=0)
    advantage_std: AdvantageStd = "group"
    reference: Literal["base", "old_policy"] = "base"
    rollout_guidance: float = Field(4.5, ge=1)
    reference_guidance: float = Field(1.0, ge=1)

    @model_validator(mode="after")
    def _timesteps_fit(self) -> DGPOConfig:
        if self.t_min is None and self.timesteps > self.noisiest_steps:
            raise ValueError(f"timesteps ({self.timesteps}) cannot exceed noisiest_steps ({self.noisiest_steps})")
        return self


class FlowGRPOConfig(_Config):
    """Flow-GRPO (arXiv 2505.05470): every step is stochastic, all but the last are trained.

    Attributes:
        noise_level: a of the SDE.
        clip: half-width of the clipped probability ratio.
        kl_weight: on the KL divergence from the base of every trained step.
        guidance: classifier-free guidance, in the rollout and in training.
        reference_guidance: of the frozen base in the KL term; null for ``guidance``, as published.
    """

    name: Literal["flow-grpo"] = "flow-grpo"
    noise_level: float = Field(0.7, gt=0)
    clip: float = Field(1e-4, gt=0)
    kl_weight: float = Field(0.04, ge=0)
    guidance: float = Field(4.5, ge=1)
    reference_guidance: float | None = Field(None, ge=1)
    advantage_std: AdvantageStd = "iteration"


class FlowGRPOFastConfig(_Config):
    """Flow-GRPO-Fast: ODE steps, but for a random window of stochastic CPS steps, the only ones trained.

    Attributes:
        window: stochastic steps; 3 in both published settings without guidance, 2 in the one with guidance 4.5.
        window_range: the window lies within the first so many steps (the noisier ones).
    """

    name: Literal["flow-grpo-fast"] = "flow-grpo-fast"
    noise_level: float = Field(0.8, gt=0, lt=1)
    clip: float = Field(1e-5, gt=0)
    kl_weight: float = Field(0.0, ge=0)
    guidance: float = Field(1.0, ge=1)
    reference_guidance: float | None = Field(None, ge=1)
    advantage_std: AdvantageStd = "iteration"
    window: int = Field(3, ge=1)
    window_range: int = Field(5, ge=1)

    @model_validator(mode="after")
    def _window_fits(self) -> FlowGRPOFastConfig:
        if self.window > self.window_range:
            raise ValueError(f"window ({self.window}) cannot exceed window_range ({self.window_range})")
        return self


AlgorithmConfig = Annotated[DGPOConfig | FlowGRPOConfig | FlowGRPOFastConfig, Field(discriminator="name")]


class TrainingConfig(_Config):
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
    updates_per_iteration: int = Field(
        1,
        ge=1,
        description="Optimizer steps in an iteration; the prompt groups are split evenly among them.",
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
    """How a finished adapter is sampled and scored: what its users will do."""

    steps: int = Field(40, ge=1, description="Denoiser calls of an image, on the pipeline's own Euler sampler.")
    guidance: float = Field(4.5, ge=1, description="Classifier-free guidance; 1 is none.")
    images: int = Field(128, ge=2, description="Pictures that `reward before` and `reward after` are the mean of.")


class LoggingConfig(_Config):
    """What is shown of a run; `metrics.jsonl` is always written."""

    trackers: tuple[str, ...] = Field(
        (), description="accelerate's trackers that get the metrics too: tensorboard, wandb and others, if installed."
    )
    sample_every: int = Field(
        10, ge=0, description="Iterations between two grids of pictures in the run's samples/; 0 for none."
    )
    sample_images: int = Field(16, ge=1, description="Pictures in such a grid, of the first held-out prompts.")


class CheckpointConfig(_Config):
    """What `dgpo resume` goes on from."""

    every: int = Field(
        10, ge=1, description="Iterations between two checkpoints; the last iteration has one in any case."
    )
    keep: int = Field(
        2, ge=1, description="Newest checkpoints kept, besides the best (by mean reward since the one before)."
    )


class PromptsConfig(_Config):
    """Prompt sets: a `.txt` or `.jsonl` file, `hf:owner/dataset`, or a set of `dgpo list prompts`."""

    train: str = Field("shapes/train", description="What reinforcement learning sees.")
    held_out: str | None = Field(
        None,
        description="What `reward before` and `reward after` are measured on, disjoint from train; null for train "
        "itself.",
    )


class RunConfig(_Config):
    """Everything a training run depends on."""

    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    prompts: PromptsConfig = PromptsConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = DGPOConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def schedule(self) -> Schedule:
        """The rollout's noise levels: what was asked for, else what fits the sampler."""
        if self.rollout.schedule is not None:
            return self.rollout.schedule
        multistep = isinstance(self.algorithm, DGPOConfig) and self.algorithm.sampler == "dpm-solver++"
        return "dpm" if multistep else "native"

    @property
    def trained_steps(self) -> int:
        """Sampler steps that an iteration trains on."""
        if isinstance(self.algorithm, DGPOConfig):
            return self.algorithm.timesteps
        return self.algorithm.window if isinstance(self.algorithm, FlowGRPOFastConfig) else self.rollout.steps - 1

    @model_validator(mode="after")
    def _steps_reach(self) -> RunConfig:
        from_steps = getattr(self.algorithm, "t_min", None) is None
        need = {
            "dgpo": ("noisiest_steps", getattr(self.algorithm, "noisiest_steps", 0) if from_steps else 2),
            "flow-grpo": ("steps", 2),
            "flow-grpo-fast": ("window_range", getattr(self.algorithm, "window_range", 0) + 1),
        }
        name, least = need[self.algorithm.name]
        if self.rollout.steps < least:
            raise ValueError(f"rollout.steps ({self.rollout.steps}) must be at least {least} for algorithm.{name}")
        if self.schedule == "dpm" and self.algorithm.name == "flow-grpo":
            # The SDE's noise grows without bound towards sigma = 1, which only the native grid starts at exactly.
            raise ValueError("rollout.schedule dpm: is for deterministic samplers; leave it out for flow-grpo")
        return self
