"""Flow-GRPO (arXiv 2505.05470) and Flow-GRPO-Fast: policy gradients through stochastic sampler steps.

The loss first, as pure functions on tensors; then the class that samples trajectories and differentiates them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgpo_plugin.advantages import AdvantageStd
from dgpo_plugin.algorithms.base import Backward, Draw, Metrics
from dgpo_plugin.config import FlowGRPOConfig, FlowGRPOFastConfig, RolloutConfig
from dgpo_plugin.lora import Policy
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.rollout import Rollout, Trajectory, micro_batches, per_image
from dgpo_plugin.samplers.ode import euler_step
from dgpo_plugin.samplers.sde import (
    SdeStep,
    cps_log_probability,
    cps_step,
    flow_sde_log_probability,
    flow_sde_step,
)


def policy_loss(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) for each image, (N,)."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def kl_divergence(mean: Tensor, reference_mean: Tensor, diffusion: float) -> Tensor:
    """mean over dims of (mean - mean_ref)^2 / (2 sd^2), (N,)."""
    return (mean - reference_mean).square().flatten(1).mean(1) / (2 * diffusion**2)


class FlowGRPO:
    """Both variants: the full trajectory, or a window of CPS steps inside an ODE rollout.

    See :class:`dgpo_plugin.algorithms.base.Algorithm`.
    """

    def __init__(
        self, config: FlowGRPOConfig | FlowGRPOFastConfig, rollout: RolloutConfig, micro_batch_size: int | None
    ) -> None:
        self.config = config
        self.advantage_std: AdvantageStd = config.advantage_std
        self._rollout = rollout
        self._micro_batch_size = micro_batch_size

    @torch.no_grad()
    def sample(
        self, policy: Policy, conditioning: Conditioning, slots: list[int], group_size: int, draw: Draw
    ) -> Rollout:
        model = policy.model
        sigmas = model.sigmas(self._rollout.steps, self._rollout.shift)
        device = next(iter(conditioning.tensors.values())).device
        x = draw.initial_noise(model.latent_shape, slots, group_size).to(device)
        repeated = conditioning[per_image(torch.arange(len(slots), device=device), group_size)]
        batches = micro_batches(torch.arange(len(x), device=device), self._micro_batch_size)
        trained = self._trained_steps(draw)
        before, after, log_probabilities = [], [], []
        for step in range(len(sigmas) - 1):
            velocity = torch.cat(
                [policy.velocity(x[rows], sigmas[step], repeated[rows], self.config.guidance) for rows in batches]
            )
            # The full variant's last step is stochastic too, but its noise is too small to be trained on.
            if self.config.name == "flow-grpo-fast" and step not in trained:
                x = euler_step(x, velocity, sigmas[step], sigmas[step + 1])
                continue
            gaussian = self._gaussian(x, velocity, sigmas, step)
            fresh = draw.step_noise(model.latent_shape, slots, group_size, step).to(device)
            x_next = gaussian.mean + gaussian.std * fresh
            if step in trained:
                before.append(x)
                after.append(x_next)
                log_probabilities.append(self._log_probability(x_next, gaussian))
            x = x_next
        trajectory = Trajectory(trained, torch.stack(before), torch.stack(after), torch.stack(log_probabilities))
        return Rollout(repeated, x, sigmas, group_size, slots, trajectory)

    def _trained_steps(self, draw: Draw) -> list[int]:
        if isinstance(self.config, FlowGRPOConfig):
            return list(range(self._rollout.steps - 1))
        first = draw.choose(1, self.config.window_range - self.config.window + 1, "window")[0]
        return list(range(first, first + self.config.window))

    def _gaussian(self, x: Tensor, velocity: Tensor, sigmas: list[float], step: int) -> SdeStep:
        if isinstance(self.config, FlowGRPOConfig):
            return flow_sde_step(x, velocity, sigmas[step], sigmas[step + 1], self.config.noise_level, sigmas[1])
        return cps_step(x, velocity, sigmas[step], sigmas[step + 1], self.config.noise_level)

    def _log_probability(self, x_next: Tensor, gaussian: SdeStep) -> Tensor:
        if isinstance(self.config, FlowGRPOConfig):
            return flow_sde_log_probability(x_next, gaussian)
        return cps_log_probability(x_next, gaussian)

    def accumulate_gradient(
        self, policy: Policy, rollout: Rollout, advantages: Tensor, draw: Draw, backward: Backward
    ) -> Metrics:
        config, trajectory = self.config, rollout.trajectory
        assert trajectory is not None
        flat_advantages = advantages.flatten()
        # An image no better or worse than its group's mean moves nothing and is dropped, its KL term with it.
        kept = flat_advantages.nonzero().flatten()
        total = {"loss": 0.0, "kl": 0.0, "clip_fraction": 0.0, "ratio": 0.0}
        count = len(trajectory.steps) * len(kept)
        for index, step in enumerate(trajectory.steps):
            for rows in micro_batches(kept, self._micro_batch_size) if len(kept) else ():
                x, x_next = trajectory.noisy_latents[index][rows], trajectory.next_latents[index][rows]
                asked = rollout.conditioning[rows]
                velocity = policy.velocity(x, rollout.sigmas[step], asked, config.guidance)
                gaussian = self._gaussian(x, velocity, rollout.sigmas, step)
                log_ratio = self._log_probability(x_next, gaussian) - trajectory.log_probability[index][rows]
                ratio = torch.exp(log_ratio)
                loss = policy_loss(ratio, flat_advantages[rows], config.clip).sum()
                if config.kl_weight > 0:
                    with policy.as_reference():
                        base = policy.velocity(x, rollout.sigmas[step], asked, config.guidance)
                        base_mean = self._gaussian(x, base, rollout.sigmas, step).mean
                    kl = kl_divergence(gaussian.mean, base_mean, gaussian.diffusion).sum()
                    loss = loss + config.kl_weight * kl
                    total["kl"] += kl.item()
                loss = loss / count
                backward(loss)
                total["loss"] += loss.item()
                total["ratio"] += ratio.detach().sum().item()
                total["clip_fraction"] += ((ratio.detach() - 1).abs() > config.clip).sum().item()
        return {name: value if name == "loss" else value / max(1, count) for name, value in total.items()}

    def after_step(self, policy: Policy, step: int) -> None:
        """Nothing to keep: the old policy is the one that took the trajectory."""
