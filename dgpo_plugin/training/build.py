"""A trainer from a configuration: everything that a run needs, loaded and put in its place, top to bottom."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from dgpo_plugin.adapters.load import load_base
from dgpo_plugin.algorithms import algorithm_of
from dgpo_plugin.algorithms.rollout import holds_whole_groups
from dgpo_plugin.common.errors import UserError, prefixed
from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.distributed.device import runs_on_cpu
from dgpo_plugin.distributed.processes import Processes, join_processes
from dgpo_plugin.models.attention import checkpoint_blocks
from dgpo_plugin.models.base import Model, refuse_seams
from dgpo_plugin.models.generate import BATCH_SIZE
from dgpo_plugin.models.load import settled_model
from dgpo_plugin.models.memory import shard
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.models.speed import compile_blocks
from dgpo_plugin.models.text_cache import EncodedTexts
from dgpo_plugin.rewards import RewardSet, load_rewards
from dgpo_plugin.rewards.scorer import Scorer
from dgpo_plugin.training.checks import prompt_sets, tell_cut_prompts, try_rewards
from dgpo_plugin.training.evaluation import HeldOut, call_prompts
from dgpo_plugin.training.guard import Guard, guard_prompts
from dgpo_plugin.training.preferred_pairs import PreferredPairs, held_out_pairs, preferred_pairs
from dgpo_plugin.training.prompt_groups import PromptGroups
from dgpo_plugin.training.trainer import Trainer


def build_trainer(
    config: RunConfig, *, rewards: RewardSet | None = None, model: Model | None = None, failures: Path | None = None
) -> Trainer:
    """Everything a run needs, loaded; its precision is settled in the trainer's configuration.

    Args:
        rewards, model: loaded already; None to load the configuration's.
        failures: folder for the pictures of a reward that fails for good; None to save none.

    Raises:
        UserError: whatever of it cannot be had here, before the model is loaded where that can be known.
    """
    training, setting = config.training, config.training.guard
    processes = replace(join_processes(config.training.process_timeout), lockstep=config.model.shard)
    check_layout(config, processes.count)
    accelerator = _accelerator(config)
    sets, pairs = prompt_sets(config), preferred_pairs(config, processes)
    prompts = _add_prompts_of(pairs, sets)
    held_out = sets.get("prompts.held_out", prompts)
    rewards = checked_rewards(config, rewards, sets, processes)
    watched = [] if setting is None else guard_prompts(prompts, held_out, setting)
    metrics = guard_metrics(config, watched, processes)
    features = picture_features(config)
    rank = processes.rank if processes.count > 1 else None
    scorer = Scorer(rewards, failures, rank)
    config = settle_precision(config, accelerator.device, processes)
    model = load_base(config.model, accelerator.device, place=False) if model is None else model
    refuse_seams(model, config.model)
    if processes.is_main:
        tell_cut_prompts(model, sets if pairs is None else {**sets, "pairs.train": prompts})
    # Before the denoiser takes its place: the text encoders may need all of the memory there is.
    evaluated = held_out[: max(config.evaluation.images, config.logging.sample_images)]
    evaluated += [pair.prompt for pair in pairs.held_out] if pairs is not None else []
    groups = PromptGroups(model, prompts, evaluated, training.prompts_per_iteration, training.seed)
    watched_texts = EncodedTexts(model, ["", *(prompt.text for prompt in watched)]) if watched else groups.encoded
    policy = Policy(model, config.lora, training.seed, groups.encoded[[""]])
    if config.model.shard:
        shard(model.denoiser, list(policy.parameters.values()), accelerator.device)
    else:
        model.place()
    if config.model.compile:
        compile_blocks(model.denoiser)
    if training.gradient_checkpointing:
        checkpoint_blocks(model.denoiser)
    size, called = training.micro_batch_size, call_prompts(prompts, sets.get("prompts.held_out"))
    algorithm = algorithm_of(config.algorithm)(config.algorithm, policy, processes, size, accelerator.backward)
    optimizer = torch.optim.AdamW(
        list(policy.parameters.values()), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    measured = HeldOut(policy, scorer, held_out, groups, config.evaluation, processes, size or BATCH_SIZE, called)
    watching = Scorer(metrics, failures, rank)
    guard = None if setting is None else Guard(setting, measured, watching, watched, watched_texts, training.seed)
    return Trainer(
        config=config,
        policy=policy,
        algorithm=algorithm,
        scorer=scorer,
        groups=groups,
        held_out=measured,
        optimizer=optimizer,
        accelerator=accelerator,
        processes=processes,
        guard=guard,
        features=features,
        pairs=pairs,
        held_out_pairs=held_out_pairs(pairs, algorithm, groups),
    )


def _add_prompts_of(pairs: PreferredPairs | None, sets: dict[str, list[Prompt]]) -> list[Prompt]:
    """The prompts that a run is trained on; of a run with pairs, those of its evaluation are added to the sets."""
    if pairs is None:
        return sets["prompts.train"]
    sets.setdefault("prompts.held_out", pairs.evaluated)  # what evaluation.rewards have to judge
    return pairs.prompts


def checked_rewards(
    config: RunConfig, rewards: RewardSet | None, sets: dict[str, list[Prompt]], processes: Processes
) -> RewardSet:
    """The rewards of a run, loaded unless they are, which can judge its prompts.

    Raises:
        UserError: one cannot be had, cannot judge a prompt, or fails when it is tried.
    """
    loaded = load_rewards(config.judged_by, config.scoring) if rewards is None else rewards
    loaded.check(sets)
    if rewards is None:
        try_rewards(loaded, config.model, sets, processes)
    return loaded


def picture_features(config: RunConfig) -> Callable[[Tensor], Tensor] | None:
    """What the algorithm asks to be seen in pictures; None if it asks for nothing.

    Raises:
        UserError: the network is not there, or is another.
    """
    if config.algorithm.picture_network is None:
        return None
    from dgpo_plugin.rewards.networks.features import PictureFeatures  # transformers' models, for those who need them

    return PictureFeatures(config.algorithm.picture_network, config.scoring).features


def guard_metrics(config: RunConfig, prompts: list[Prompt], processes: Processes) -> RewardSet:
    """The rewards that a run's guard watches and does not train on, loaded and tried; none where it has none.

    Args:
        prompts: that the guard looks at.

    Raises:
        UserError: one misses its package, its weights or its server, or cannot judge a prompt.
    """
    named = {} if config.training.guard is None else config.training.guard.metrics
    with prefixed("training.guard"):
        metrics = load_rewards(named, config.scoring)
        metrics.check({"prompts.held_out": prompts})
        try_rewards(metrics, config.model, {"prompts.held_out": prompts}, processes)
    return metrics


def settle_precision(
    config: RunConfig, device: torch.device, processes: Processes, threads: int | None = None
) -> RunConfig:
    """Settle what ``model.precision: auto`` stands for here, on the first process, and that it works on all.

    Args:
        threads: that will compute; None for this process's.

    Raises:
        UserError: bf16 by name, where it does not work.
    """
    share = -(-config.training.images // processes.count)
    images = min(config.training.micro_batch_size or share, share)
    model = processes.decided_by_main(lambda: settled_model(config.model, device, images, threads))
    problem: str | None = None
    try:
        settled_model(model, device, images, threads)
    except UserError as error:
        problem = str(error)
    processes.fail_together(problem)
    return config.model_copy(update={"model": model})


OTHER_TRAINING = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")
"""What ``ACCELERATE_USE_...`` switches on in accelerate (accelerator.py, ``Accelerator.__init__``), and this loop has
no part in."""


def refuse_environment(environment: Mapping[str, str], precision: str) -> None:
    """Refuse what ``accelerate launch`` or a shell sets in the environment, that would change a run or be ignored.

    accelerate divides every loss by ``ACCELERATE_GRADIENT_ACCUMULATION_STEPS`` (accelerator.py, ``backward``).

    Args:
        precision: of the run's model.

    Raises:
        UserError: such a variable; what says the same in the configuration.
    """
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise UserError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps}: would divide every gradient; unset it, "
            f"training.micro_batch_size and training.updates_per_iteration say how gradients are gathered"
        )
    mixed = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("no", precision) and precision != "auto":
        raise UserError(
            f"ACCELERATE_MIXED_PRECISION={mixed}: the run computes in model.precision, which is {precision}; unset it "
            f'(mixed_precision: "no" in accelerate\'s file), or set model.precision'
        )
    for name in OTHER_TRAINING:
        if environment.get(f"ACCELERATE_USE_{name}", "false").lower() not in ("false", "0", ""):
            raise UserError(
                f"ACCELERATE_USE_{name}: has no part in this training; unset it, and split a large base by model.shard"
            )


def _accelerator(config: RunConfig) -> Accelerator:
    refuse_environment(os.environ, config.model.precision)
    fp16 = config.model.precision == "fp16"
    if fp16 and runs_on_cpu():
        raise UserError("model.precision fp16: needs a GPU; set it to bf16 or fp32")
    return Accelerator(mixed_precision="fp16" if fp16 else "no", cpu=runs_on_cpu())


def check_layout(config: RunConfig, processes: int) -> None:
    """Refuse what cannot be split, rather than adjust it."""
    training = config.training
    if processes > training.images:
        raise UserError(
            f"{processes} processes for {training.prompts_per_iteration} x {training.group_size} images an iteration; "
            f"start at most {training.images} or raise training.prompts_per_iteration"
        )
    if not config.model.shard:
        return
    if config.model.quantization is not None:
        raise UserError("model.shard: cannot split a quantized base; set model.quantization to null")
    whole = holds_whole_groups(training.prompts_per_iteration // training.updates_per_iteration, processes)
    if training.group_size % processes and not (config.pairs is not None and whole):
        raise UserError(
            f"model.shard: training.group_size {training.group_size} must be a multiple of the {processes} processes, "
            f"which have to run the denoiser in step"
        )
