"""An algorithm of one's own in one file: reward-weighted regression onto the rollout's own samples.

Name it as `algorithm: {name: examples/my_algorithm.py:RewardWeighted}`. It is simple and no match for
DGPO; what it shows is all that an algorithm has to say: a configuration, how it samples, its gradient, what that costs.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from dgpo_plugin.algorithms import Algorithm, AlgorithmConfig, Batch, Cost, Metric, Random, Rollout
from dgpo_plugin.algorithms.base import Totals, initial_noise
from dgpo_plugin.algorithms.rollout import micro_batches
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.samplers.ode import sample_ode


def weighted_error(predicted: Tensor, target: Tensor, advantages: Tensor, temperature: float) -> Tensor:
    """exp(A / temperature) times the mean squared error of the velocity, for each sample, (N,)."""
    return torch.exp(advantages / temperature) * (target - predicted).square().flatten(1).mean(1)


class RewardWeightedConfig(AlgorithmConfig):
    """What `algorithm:` takes besides `name` and `advantage_std`."""

    temperature: float = Field(1.0, gt=0, description="How little advantages decide what is imitated.")
    timesteps: int = Field(2, ge=1, description="Sampler steps trained on in an iteration.")

    def check_rollout(self, steps: int, schedule: str) -> None:
        if steps < self.timesteps:
            raise ValueError(f"rollout.steps ({steps}) must be at least {self.timesteps} for algorithm.timesteps")


class RewardWeighted(Algorithm[RewardWeightedConfig, Rollout]):
    """Imitates its own samples, the better ones more."""

    Config = RewardWeightedConfig
    METRICS = (Metric("loss", "1", "Mean over samples and timesteps of exp(A / temperature) d.", "Falls slowly."),)

    @staticmethod
    def cost(config: RunConfig) -> Cost:
        algorithm = config.algorithm
        assert isinstance(algorithm, RewardWeightedConfig)
        return Cost(
            sampling=config.rollout.steps,
            training=3 * algorithm.timesteps,
            trained_steps=algorithm.timesteps,
            adapter_copies=0,
            latents=4,
            rollout_guidance=1.0,
            training_guidance=1.0,
        )

    @torch.no_grad()
    def sample(self, batch: Batch, random: Random) -> Rollout:
        def velocity(x: Tensor, sigma: float) -> Tensor:
            return self.policy.velocity(x, sigma, batch.conditioning)

        latents = sample_ode(velocity, initial_noise(self.policy, batch, random), batch.sigmas, "euler")
        return Rollout(batch.sample_ids, batch.conditioning, latents, batch.sigmas, batch.layout)

    def gradient(self, rollout: Rollout, advantages: Tensor, random: Random) -> dict[str, float]:
        clean, ids, layout = rollout.latents, rollout.sample_ids, rollout.layout
        own_advantages = advantages.flatten()[rollout.positions.to(clean.device)]
        batches = micro_batches(torch.arange(len(clean), device=clean.device), self.micro_batch_size)
        steps = random.choose(self.config.timesteps, len(rollout.sigmas) - 1, "timesteps")
        totals, count = Totals(clean.device, "loss"), len(steps) * advantages.numel()
        for step in steps:
            sigma = rollout.sigmas[step]
            noise = random.sample_noise(clean.shape[1:], ids, layout, "training noise", step).to(clean)
            noisy, target = (1 - sigma) * clean + sigma * noise, noise - clean
            for rows in batches:
                predicted = self.policy.velocity(noisy[rows], sigma, rollout.conditioning[rows])
                errors = weighted_error(predicted, target[rows], own_advantages[rows], self.config.temperature)
                self.backward(errors.sum() / count)
                totals.add("loss", errors.detach().sum())
        return totals.means(count, self.processes)
