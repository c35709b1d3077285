"""The loop: prompt groups -> rollout -> rewards -> advantages -> gradient -> optimizer -> weight copies.

``Trainer.iterations()`` is a generator, so whoever drives it decides when to stop, log, evaluate or save.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from dgpo_plugin.advantages import normalise
from dgpo_plugin.algorithms import Draw, make_algorithm
from dgpo_plugin.config import RunConfig
from dgpo_plugin.errors import UserError
from dgpo_plugin.lora import Policy, move_towards
from dgpo_plugin.models import Conditioning, load_model
from dgpo_plugin.prompts import Prompt, draw_prompt_groups
from dgpo_plugin.rewards import Reward, checked_rewards, load_reward
from dgpo_plugin.sampling import decode_in_batches, fixed_noise, sample_latents
from dgpo_plugin.worlds import load_prompts


@dataclass
class Clock:
    """Seconds by part of the loop; CUDA work is waited for, so that a part is charged what it started."""

    parts: dict[str, float] = field(default_factory=dict)
    _since: float = 0.0

    def start(self) -> None:
        self.parts = {}
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._since
        self._since = now


class Trainer:
    """One training run.

    Attributes:
        policy: the model with its adapter.
        evaluation_weights: the averaged copy of the adapter that is evaluated and exported.
        steps: optimizer steps done.
    """

    def __init__(self, config: RunConfig, *, reward: Reward | None = None) -> None:
        self.config = config
        self.accelerator = Accelerator(mixed_precision="fp16" if config.model.precision == "fp16" else "no")
        if self.accelerator.num_processes > 1:
            raise UserError("training on several processes is not supported yet; start one process")
        self.prompts = load_prompts(config.prompts.train)
        self.held_out = load_prompts(config.prompts.held_out) if config.prompts.held_out else self.prompts
        self.reward = reward or load_reward(config.reward)
        self.model = load_model(config.model, self.accelerator.device)
        self.policy = Policy(self.model, config.lora, config.training.seed)
        self.algorithm = make_algorithm(config, self.policy)
        training = config.training
        self.optimizer = self.accelerator.prepare(
            torch.optim.AdamW(self.policy.parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
        )
        self.evaluation_weights = self.policy.copy_weights()
        self.steps = 0
        self._conditioning = self.model.encode([prompt.text for prompt in self.prompts])

    def iterations(self) -> Iterator[dict[str, float]]:
        """Train, yielding one record an iteration (the line of ``metrics.jsonl``)."""
        for iteration in range(self.config.training.iterations):
            yield self._iterate(iteration)

    def _iterate(self, iteration: int) -> dict[str, float]:
        training, clock = self.config.training, Clock()
        clock.start()
        evaluations_before = self.policy.denoiser_evaluations
        draw = Draw(training.seed, iteration)
        count, groups, size = len(self.prompts), training.prompts_per_iteration, training.group_size
        rows = draw_prompt_groups(count, groups, iteration, training.seed)
        rollout = self.algorithm.sample(
            self.policy, self._conditioning[torch.tensor(rows)], list(range(groups)), size, draw
        )
        clock.lap("rollout_seconds")
        images = decode_in_batches(self.model.decode, rollout.latents, training.micro_batch_size or groups * size)
        clock.lap("decode_seconds")
        prompts = [self.prompts[row] for row in rows for _ in range(size)]
        rewards = checked_rewards(self.reward, images, prompts, self.config.reward.name).view(groups, size)
        clock.lap("reward_seconds")
        advantages = normalise(rewards, self.algorithm.advantage_std).to(self.accelerator.device)
        record: dict[str, float] = {}
        parts = training.updates_per_iteration
        for chosen, part in rollout.split(parts):
            logged = self.algorithm.accumulate_gradient(
                self.policy, part, advantages[chosen], draw, self.accelerator.backward
            )
            logged["grad_norm"] = self._step()
            for name, value in logged.items():
                record[name] = record.get(name, 0.0) + value / parts
        clock.lap("training_seconds")
        return {
            "iteration": iteration + 1,
            "optimizer_steps": self.steps,
            "reward": rewards.mean().item(),
            "reward_group_std": rewards.std(1, correction=0).mean().item(),
            "constant_groups": (rewards == rewards[:, :1]).all(1).float().mean().item(),
            **record,
            **{name: round(seconds, 4) for name, seconds in clock.parts.items()},
            "seconds": round(sum(clock.parts.values()), 4),
            "denoiser_evaluations": self.policy.denoiser_evaluations - evaluations_before,
        }

    def _step(self) -> float:
        """Clip, step, and refresh the weight copies; an update in which nothing had a gradient moves nothing."""
        if all(parameter.grad is None for parameter in self.policy.parameters):
            return 0.0
        norm = float(self.accelerator.clip_grad_norm_(self.policy.parameters, self.config.training.max_grad_norm))
        if not norm < float("inf"):
            raise UserError(
                f"optimizer step {self.steps}: the gradient is not finite; lower training.learning_rate "
                f"or use model.precision fp32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.algorithm.after_step(self.policy, self.steps)
        self.steps += 1
        if self.steps % self.config.training.ema_every == 0:
            # Warm-up: early averages must not be ruled by the untrained start (DESIGN section 4.6).
            decay = min(self.config.training.ema_decay, (1 + self.steps) / (10 + self.steps))
            move_towards(self.evaluation_weights, self.policy.parameters, decay)
        return norm

    def sample(self, prompts: Sequence[Prompt], seed: int) -> Tensor:
        """Pictures under the evaluation weights, from fixed noises, (N, 3, H, W) in [0, 1]."""
        evaluation = self.config.evaluation
        noise = fixed_noise(self.model, len(prompts), seed)
        with self.policy.with_weights(self.evaluation_weights):
            latents = sample_latents(
                self.model, [p.text for p in prompts], noise, evaluation.steps, evaluation.guidance
            )
        return decode_in_batches(self.model.decode, latents)

    def held_out_reward(self) -> float:
        """Mean reward of ``evaluation.images`` pictures of the held-out prompts under the evaluation weights."""
        prompts = [self.held_out[index % len(self.held_out)] for index in range(self.config.evaluation.images)]
        images = self.sample(prompts, seed=0)
        return checked_rewards(self.reward, images, prompts, self.config.reward.name).mean().item()


__all__ = ["Clock", "Conditioning", "Trainer"]
