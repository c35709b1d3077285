"""Flow-GRPO (arXiv 2505.05470) and Flow-GRPO-Fast: policy gradients through stochastic sampler steps.

The loss first, as pure functions on tensors; then the class that samples trajectories and differentiates them.

It follows the authors' released code, and differs from the paper, from that code too where it says so:
1. Log-probabilities are means over dims, not sums, so that a clip means the same at every size.
2. The KL term is the means' squared distance, a mean over dims, over 2 sd^2: without the step's length.
3. Advantages are clipped to +-5; their spread is the iteration's (``advantage_std``).
4. The last step is stochastic and not trained.
5. All images of advantage 0 are dropped; the code keeps some by chance, so that its batches come out even.
6. In an iteration's first update the ratio is 1 exactly; the code compares with the rollout's pass, which rounds apart.
7. Fast takes CPS steps (arXiv 2509.05952) in its window. Guard (arXiv 2510.22319) is not built.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgpo_plugin.algorithms.base import Backward, Draw, Metrics, average, begin, totals
from dgpo_plugin.algorithms.rollout import Rollout, Trajectory, micro_batches
from dgpo_plugin.config.fields import AdvantageStd, FlowGRPOConfig, FlowGRPOFastConfig, RolloutConfig, Schedule
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.policy import Policy
from dgpo_plugin.samplers.ode import euler_step
from dgpo_plugin.samplers.sde import SdeStep, cps_log_probability, cps_step, flow_sde_log_probability, flow_sde_step


def policy_loss(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) for each image, (N,)."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def kl_divergence(mean: Tensor, reference_mean: Tensor, diffusion: float) -> Tensor:
    """mean over dims of (mean - mean_ref)^2 / (2 sd^2), (N,)."""
    return (mean - reference_mean).square().flatten(1).mean(1) / (2 * diffusion**2)


class FlowGRPO:
    """Both variants: the full trajectory, or a window of CPS steps inside an ODE rollout.

    See :class:`dgpo_plugin.algorithms.base.Algorithm`. Of its metrics, ``ratio`` is the mean, and ``ratio_deviation``
    the largest distance from 1 that the ratio of an iteration's first update would have if it were taken against the
    rollout's own log-probability: what rounding makes of another batch, to be held against ``clip``.
    """

    def __init__(
        self,
        config: FlowGRPOConfig | FlowGRPOFastConfig,
        rollout: RolloutConfig,
        schedule: Schedule,
        micro_batch_size: int | None,
    ) -> None:
        self.config = config
        self.advantage_std: AdvantageStd = config.advantage_std
        self._rollout = rollout
        self._schedule = schedule
        self._micro_batch_size = micro_batch_size

    @torch.no_grad()
    def sample(
        self, policy: Policy, conditioning: Conditioning, images: Tensor, group_size: int, draw: Draw
    ) -> Rollout:
        sigmas, x = begin(policy, self._rollout, self._schedule, images, group_size, draw)
        trained = self._trained_steps(draw)
        before, after, log_probabilities = [], [], []
        for step in range(len(sigmas) - 1):
            velocity = policy.velocity(x, sigmas[step], conditioning, self.config.guidance)
            # The full variant's last step is stochastic too, but its noise is too small to be trained on.
            if self.config.name == "flow-grpo-fast" and step not in trained:
                x = euler_step(x, velocity, sigmas[step], sigmas[step + 1])
                continue
            gaussian = self._gaussian(x, velocity, sigmas, step)
            fresh = draw.image_noise(x.shape[1:], images, group_size, "step noise", step).to(policy.device)
            x_next = gaussian.mean + gaussian.std * fresh
            if step in trained:
                before.append(x)
                after.append(x_next)
                log_probabilities.append(self._log_probability(x_next, gaussian))
            x = x_next
        trajectory = Trajectory(trained, torch.stack(before), torch.stack(after), torch.stack(log_probabilities))
        return Rollout(images, conditioning, x, sigmas, trajectory)

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
        self,
        policy: Policy,
        rollout: Rollout,
        advantages: Tensor,
        draw: Draw,
        backward: Backward,
        processes: Processes,
    ) -> Metrics:
        config, trajectory = self.config, rollout.trajectory
        assert trajectory is not None
        places = rollout.places(advantages.shape[1])
        # An image no better or worse than its group's mean moves nothing and is dropped, its KL term with it.
        moves = [advantage != 0 for advantage in advantages.flatten().tolist()]
        kept = [row for row, place in enumerate(places.tolist()) if moves[place] or processes.lockstep]
        device = rollout.latents.device
        batches = micro_batches(torch.tensor(kept, dtype=torch.int64, device=device), self._micro_batch_size)
        own_advantages = advantages.flatten()[places.to(device)]
        moving = own_advantages != 0
        reference_guidance = config.reference_guidance or config.guidance
        total = totals(device, "loss", "kl", "clip_fraction", "ratio")
        deviation = torch.zeros((), device=device)
        first_update = rollout.first_group == 0
        count = max(1, len(trajectory.steps) * sum(moves))
        for index, step in enumerate(trajectory.steps):
            for rows in batches:
                x, x_next = trajectory.noisy_latents[index][rows], trajectory.next_latents[index][rows]
                asked = rollout.conditioning[rows]
                velocity = policy.velocity(x, rollout.sigmas[step], asked, config.guidance)
                gaussian = self._gaussian(x, velocity, rollout.sigmas, step)
                log_probability = self._log_probability(x_next, gaussian)
                old = trajectory.log_probability[index][rows]
                if first_update:
                    # The policy is still the one that sampled. The same step in a batch of another size may round
                    # otherwise, in bf16 by more than the clip allows: so the ratio is taken against this very pass.
                    apart = (torch.exp(log_probability.detach() - old) - 1).abs() * moving[rows]
                    deviation = torch.maximum(deviation, apart.max())
                    old = log_probability.detach()
                ratio = torch.exp(log_probability - old)
                loss = (policy_loss(ratio, own_advantages[rows], config.clip) * moving[rows]).sum()
                if config.kl_weight > 0:
                    with policy.as_reference():
                        base = policy.velocity(x, rollout.sigmas[step], asked, reference_guidance)
                        base_mean = self._gaussian(x, base, rollout.sigmas, step).mean
                    kl = (kl_divergence(gaussian.mean, base_mean, gaussian.diffusion) * moving[rows]).sum()
                    loss = loss + config.kl_weight * kl
                    total["kl"] += kl.detach()
                backward(loss / count)
                total["loss"] += loss.detach()
                total["ratio"] += (ratio.detach() * moving[rows]).sum()
                total["clip_fraction"] += (((ratio.detach() - 1).abs() > config.clip) & moving[rows]).sum()
        logged = average(total, count, processes)
        if first_update:
            logged["ratio_deviation"] = processes.largest(deviation).item()
        return logged

    def after_step(self, policy: Policy, step: int) -> None:
        """Nothing to keep: the old policy is the one that took the trajectory."""

    def state(self) -> dict[str, list[Tensor]]:
        return {}

    def resume(self, steps: int) -> None:
        """Nothing depends on it."""
