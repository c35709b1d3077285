"""The whole configuration as frozen pydantic models, read from YAML; an unknown key is an error naming the near one.

One name for one thing (DESIGN section 3). Defaults are the published ones; presets (``dgpo list``) carry the rest.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dgpo_plugin.advantages import AdvantageStd
from dgpo_plugin.errors import UserError
from dgpo_plugin.samplers.ode import OdeSampler


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Config):
    """The base model.

    Attributes:
        path: ``shapes`` (shipped), a local diffusers folder, or a hub id.
        precision: of the frozen weights and the forward passes; the adapter is always trained in float32. ``auto`` is
            bf16 where the processor computes in it, else fp32.
        max_sequence_length: tokens of the T5 encoder, where the model has one.
        embedded_guidance: what a guidance-distilled model (FLUX dev) is told; others have no use for it.
        resolution: pixels a side; null for the model's own.
        quantization: of the frozen denoiser's linear layers, by the package that must be installed; null for none.
        shard: split the frozen base over the processes (FSDP2) instead of copying it to each, if it fits on none.
        offload: keep the text encoders and the VAE in main memory while they are not used.
        tiled_decode: decode image by image and tile by tile: less memory, slower, faint seams in large images.
    """

    path: str = "shapes"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    max_sequence_length: int = Field(256, ge=1, le=512)
    embedded_guidance: float = Field(3.5, ge=0)
    resolution: int | None = Field(None, ge=16)
    quantization: Literal["torchao-int8", "bitsandbytes-int8", "bitsandbytes-nf4"] | None = None
    shard: bool = False
    offload: bool = False
    tiled_decode: bool = False


class LoraConfig(_Config):
    """The adapter.

    Attributes:
        target_modules: null for the model family's attention projections.
        license: under which it is passed on, for its card; empty for none stated. The base model's terms may bind it.
    """

    rank: int = Field(64, ge=1)
    alpha: float = Field(128, gt=0)
    target_modules: tuple[str, ...] | None = None
    license: str = ""


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
        retries: further attempts after an exception or a time-out.
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
    """How images are sampled in training.

    Attributes:
        steps: denoiser calls (twice as many evaluations with guidance).
        shift: of the timestep schedule; null for the model's own.
    """

    steps: int = Field(10, ge=2)
    shift: float | None = Field(None, gt=0)


class DGPOConfig(_Config):
    """DGPO (arXiv 2510.08425); the defaults are its GenEval setting with a guided rollout.

    Attributes:
        sampler: deterministic sampler of the rollout.
        beta: sharpness of the group weight w_g = sigmoid(S_g); shapes the weight, not the step.
        kl_weight: on the squared distance between the policy's and the frozen base's velocity.
        clip: half-width c of the trust region on exp(d_old - d); null for none (saves the old policy's pass).
        timesteps: M, sampler steps trained on in an iteration, drawn without replacement.
        noisiest_steps: K, the steps they are drawn from.
        old_policy_after: optimizer steps after which the rollout comes from the old policy.
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
    old_policy_after: int = Field(500, ge=0)
    advantage_std: AdvantageStd = "group"
    reference: Literal["base", "old_policy"] = "base"
    rollout_guidance: float = Field(4.5, ge=1)
    reference_guidance: float = Field(1.0, ge=1)

    @model_validator(mode="after")
    def _timesteps_fit(self) -> DGPOConfig:
        if self.timesteps > self.noisiest_steps:
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
        window: stochastic steps.
        window_range: the window lies within the first so many steps (the noisier ones).
    """

    name: Literal["flow-grpo-fast"] = "flow-grpo-fast"
    noise_level: float = Field(0.8, gt=0, lt=1)
    clip: float = Field(1e-5, gt=0)
    kl_weight: float = Field(0.0, ge=0)
    guidance: float = Field(1.0, ge=1)
    reference_guidance: float | None = Field(None, ge=1)
    advantage_std: AdvantageStd = "iteration"
    window: int = Field(2, ge=1)
    window_range: int = Field(5, ge=1)

    @model_validator(mode="after")
    def _window_fits(self) -> FlowGRPOFastConfig:
        if self.window > self.window_range:
            raise ValueError(f"window ({self.window}) cannot exceed window_range ({self.window_range})")
        return self


AlgorithmConfig = Annotated[DGPOConfig | FlowGRPOConfig | FlowGRPOFastConfig, Field(discriminator="name")]


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
    weight_decay: float = Field(1e-4, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.9, ge=0, lt=1)
    ema_every: int = Field(8, ge=1)

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

    train: str = "shapes/train"
    held_out: str | None = None


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
    def trained_steps(self) -> int:
        """Sampler steps that an iteration trains on."""
        if isinstance(self.algorithm, DGPOConfig):
            return self.algorithm.timesteps
        return self.algorithm.window if isinstance(self.algorithm, FlowGRPOFastConfig) else self.rollout.steps - 1

    @model_validator(mode="after")
    def _steps_reach(self) -> RunConfig:
        need = {
            "dgpo": ("noisiest_steps", getattr(self.algorithm, "noisiest_steps", 0)),
            "flow-grpo": ("steps", 2),
            "flow-grpo-fast": ("window_range", getattr(self.algorithm, "window_range", 0) + 1),
        }
        name, least = need[self.algorithm.name]
        if self.rollout.steps < least:
            raise ValueError(f"rollout.steps ({self.rollout.steps}) must be at least {least} for algorithm.{name}")
        return self


def load_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a preset's name or a YAML file, with ``section.field=value`` overrides on top.

    Raises:
        UserError: no such preset or file, not YAML, an unknown key, or a value out of range.
    """
    values = read_yaml(source, preset_names(), "preset")
    # The algorithm's name first, because it clears the fields of the one before it.
    for override in sorted(overrides, key=lambda text: not text.startswith("algorithm.name=")):
        apply_override(values, override)
    return parse_config(values, source)


def parse_config(values: Mapping[str, Any], where: str) -> RunConfig:
    """Validate nested values; ``where`` opens the message of the UserError that a mistake raises."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, RunConfig)}") from error


def reward_config(name: str, overrides: Sequence[str] = ()) -> RewardConfig:
    """One reward to be loaded, with ``field=value`` on top: ``device=cuda``, ``batch_size=8``, ``options.weights=...``.

    Raises:
        UserError: an unknown key, or a value out of range.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        apply_override(values, override)
    if "options" in values:
        values["options"] = {name: values["options"]}
    try:
        return RewardConfig.model_validate({**values, "name": name})
    except ValidationError as error:
        raise UserError(f"--set: {explain(error, RewardConfig)}") from error


def reward_configs(names: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, RewardConfig]:
    """Rewards to be loaded one by one, with ``field=value`` overrides for all of them; ``options`` by their names.

    Raises:
        UserError: an unknown key, a value out of range, or options of a reward that is not among the names.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        apply_override(values, override)
    options = values.pop("options", {})
    for name in options:
        if name not in names:
            raise UserError(f"--set options: {name} is not among the rewards{did_you_mean(name, names)}")
    configs = {}
    for name in names:
        own = {"name": name, "options": {name: options[name]} if name in options else {}}
        try:
            configs[name] = RewardConfig.model_validate({**values, **own})
        except ValidationError as error:
            raise UserError(f"--set: {explain(error, RewardConfig)}") from error
    return configs


def preset_names() -> dict[str, Path]:
    """Shipped training presets by name."""
    folder = Path(str(resources.files("dgpo_plugin") / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_yaml(source: str, presets: Mapping[str, Path], kind: str) -> dict[str, Any]:
    """The mapping in a preset or a YAML file."""
    path = presets.get(source)
    if path is None:
        path = Path(source)
        if path.suffix not in (".yaml", ".yml"):
            raise UserError(f"no {kind} {source!r}{did_you_mean(source, presets)}; or name a .yaml file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}: not YAML{line}; check indentation and quotes") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: needs keys and values at the top level")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set the field of ``section.field=value``, the value in YAML."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override}: write it as section.field=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not YAML") from error
    set_dotted(values, key, value)


def set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b`` in nested mappings. Naming another algorithm drops the fields of the one before it."""
    *sections, field = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{key}: {section} is a value, not a section")
    if sections == ["algorithm"] and field == "name" and values.get("name") != value:
        values.clear()
    values[field] = value


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake in one line: where, what, and the near key if it is a typo."""
    first = error.errors()[0]
    # pydantic puts the union's tag behind "algorithm"; it is no key of the user's.
    places = list(first["loc"])
    if len(places) > 2 and places[0] == "algorithm":
        del places[1]
    location = [str(part) for part in places]
    where = " ".join(".".join(location).split()) or "configuration"
    if first["type"] == "extra_forbidden":
        known = _fields_at(root, first["loc"][:-1])
        return f"unknown key {where}{did_you_mean(location[-1], known)}"
    if first["type"] == "union_tag_invalid":
        tag = str(first["ctx"]["tag"])
        return f"{where}.name: unknown algorithm {tag!r}{did_you_mean(tag, ('dgpo', 'flow-grpo', 'flow-grpo-fast'))}"
    if first["type"] == "union_tag_not_found":
        return f"{where}.name is missing; name dgpo, flow-grpo or flow-grpo-fast"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (given {given!r})" if isinstance(given, str | int | float | bool | None) else ""
    return f"{where}: {message}{shown}"


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    algorithms: dict[str, type[BaseModel]] = {
        "dgpo": DGPOConfig,
        "flow-grpo": FlowGRPOConfig,
        "flow-grpo-fast": FlowGRPOFastConfig,
    }
    for part in location:
        if part in algorithms:
            model = algorithms[str(part)]
            continue
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(model.model_fields)


def did_you_mean(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """``; did you mean 'x'?`` for a near name, else ``; known: a, b``."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
