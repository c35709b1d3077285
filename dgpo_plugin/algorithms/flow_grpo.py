"""Flow-GRPO (arXiv 2505.05470) and Flow-GRPO-Fast: policy gradients through stochastic sampler steps.

The loss first, as pure functions on tensors; then their configurations, what a trajectory is, and the classes that
sample trajectories and differentiate them: the full one, and a window of CPS steps inside a deterministic rollout.

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

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dgpo_plugin.algorithms.base import Algorithm, Cost, Metric, Random, Totals, initial_noise
from dgpo_plugin.algorithms.rollout import Batch, Rollout, micro_batches
from dgpo_plugin.config.fields import AdvantageStd, AlgorithmConfig, RunConfig, Schedule
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


Clip = Annotated[float, Field(gt=0, description="Half-width of the clipped probability ratio.")]
KLWeight = Annotated[float, Field(ge=0, description="Weight of every trained step's KL divergence from the base.")]
Guidance = Annotated[
    float, Field(ge=1, description="Classifier-free guidance, in the rollout and in training; 1 is none.")
]


class TrajectoryConfig(AlgorithmConfig):
    """What both variants are told."""

    noise_level: float = Field(gt=0, description="Noise level a of the stochastic steps.")
    clip: Clip
    kl_weight: KLWeight
    guidance: Guidance
    reference_guidance: float | None = Field(
        None, ge=1, description="Guidance of the frozen base in the KL term; null for guidance, as published."
    )
    advantage_std: AdvantageStd = "iteration"

    def trained_steps(self, steps: int) -> int:
        """How many of a rollout's steps are trained on."""
        raise NotImplementedError


class FlowGRPOConfig(TrajectoryConfig):
    """Flow-GRPO: every step is stochastic, all but the last are trained."""

    name: Literal["flow-grpo"] = "flow-grpo"
    noise_level: float = Field(0.7, gt=0, description="Noise level a of the Flow-SDE steps.")
    clip: Clip = 1e-4
    kl_weight: KLWeight = 0.04
    guidance: Guidance = 4.5

    def trained_steps(self, steps: int) -> int:
        return steps - 1

    def check_rollout(self, steps: int, schedule: Schedule) -> None:
        if schedule == "dpm":
            # The SDE's noise grows without bound towards sigma = 1, which only the native grid starts at exactly.
            raise ValueError("rollout.schedule dpm: is for deterministic samplers; leave it out for flow-grpo")


class FlowGRPOFastConfig(TrajectoryConfig):
    """Flow-GRPO-Fast: deterministic steps, but for a random window of stochastic CPS steps, the only ones trained."""

    name: Literal["flow-grpo-fast"] = "flow-grpo-fast"
    noise_level: float = Field(0.8, gt=0, lt=1, description="Noise level a of the CPS steps.")
    clip: Clip = 1e-5
    kl_weight: KLWeight = 0.0
    guidance: Guidance = 1.0
    window: int = Field(
        3, ge=1, description="Stochastic steps; 3 in both published settings without guidance, 2 in the one with 4.5."
    )
    window_range: int = Field(5, ge=1, description="Steps, the noisiest, within which the window lies.")

    def trained_steps(self, steps: int) -> int:
        return self.window

    def check_rollout(self, steps: int, schedule: Schedule) -> None:
        if steps < self.window_range + 1:
            raise ValueError(
                f"rollout.steps ({steps}) must be at least {self.window_range + 1} for algorithm.window_range"
            )

    @model_validator(mode="after")
    def _window_fits(self) -> FlowGRPOFastConfig:
        if self.window > self.window_range:
            raise ValueError(f"window ({self.window}) cannot exceed window_range ({self.window_range})")
        return self


@dataclass(frozen=True, kw_only=True)
class TrajectoryRollout(Rollout):
    """A rollout with its T stochastic steps.

    Attributes:
        steps: those steps, as indices into the schedule, T.
        noisy_latents: before each step, (N, T, ...), float32.
        next_latents: after it, (N, T, ...), float32.
        log_probability: of that step under the policy that took it, (N, T).
    """

    steps: list[int]
    noisy_latents: Tensor
    next_latents: Tensor
    log_probability: Tensor


T = TypeVar("T", bound=TrajectoryConfig)


class _Trajectories(Algorithm[T, TrajectoryRollout]):
    """Both variants, which differ in which steps are stochastic, and how."""

    METRICS = (
        Metric(
            "loss",
            "1",
            "Mean over images and trained steps of the clipped policy loss + kl_weight kl; mean over the updates.",
            "Near 0, without a trend: advantages have mean 0 in each group, and its gradient is what is learned from.",
        ),
        Metric(
            "clip_fraction",
            "share, 0 to 1",
            "Images and trained steps whose probability ratio is further than clip from 1.",
            "Low. Near 1 nothing is learned: clip is too narrow for the learning rate.",
            shown="clipped {:5.1%}",
        ),
        Metric(
            "kl",
            "nats",
            "Mean over dims of (mean - mean of the base)^2 / (2 sd^2), before kl_weight; 0 where that is 0.",
            "Rises from its start and levels off; one that runs away leaves the base behind: raise kl_weight or lower "
            "the learning rate.",
            shown="kl {:.4f}",
        ),
        Metric(
            "ratio",
            "1",
            "Mean over images and steps of the probability ratio, policy over the one that sampled.",
            "Within about clip of 1; exactly 1 in an iteration's first update.",
        ),
        Metric(
            "ratio_deviation",
            "1",
            "Largest distance from 1 that the ratio of an iteration's first update would have if it were taken against "
            "the rollout's own log-probability: what rounding makes of a batch of another size.",
            "Well below algorithm.clip; in float32 about 1e-7. In bf16 up to 2e-4 was measured.",
        ),
    )

    @staticmethod
    def cost(config: RunConfig) -> Cost:
        algorithm, steps = config.algorithm, config.rollout.steps
        assert isinstance(algorithm, TrajectoryConfig)
        trained = algorithm.trained_steps(steps)
        passes = 2 if algorithm.guidance > 1 else 1
        reference = 2 if (algorithm.reference_guidance or algorithm.guidance) > 1 else 1
        return Cost(
            sampling=steps * passes,
            training=trained * (3 * passes + (reference if algorithm.kl_weight > 0 else 0)),
            trained_steps=trained,
            adapter_copies=0,
            latents=2 * trained + 1,  # both ends of every trained step, and the clean ones
            rollout_guidance=algorithm.guidance,
            training_guidance=algorithm.guidance,
        )

    @abstractmethod
    def _choose_steps(self, steps: int, random: Random) -> tuple[list[int], list[int]]:
        """Which of a rollout's steps are stochastic, and which of those are trained."""

    @abstractmethod
    def _gaussian(self, x: Tensor, velocity: Tensor, sigmas: list[float], step: int) -> SdeStep:
        """The stochastic step from x, (N, ...), with the velocity there."""

    @abstractmethod
    def _log_probability(self, x_next: Tensor, gaussian: SdeStep) -> Tensor:
        """Log-probability of having come to x_next by that step, (N,)."""

    @torch.no_grad()
    def sample(self, batch: Batch, random: Random) -> TrajectoryRollout:
        ids, layout, sigmas = batch.sample_ids, batch.layout, batch.sigmas
        x = initial_noise(self.policy, batch, random)
        stochastic, trained = self._choose_steps(len(sigmas) - 1, random)
        before, after, log_probabilities = [], [], []
        for step in range(len(sigmas) - 1):
            velocity = self.policy.velocity(x, sigmas[step], batch.conditioning, self.config.guidance)
            if step not in stochastic:
                x = euler_step(x, velocity, sigmas[step], sigmas[step + 1])
                continue
            gaussian = self._gaussian(x, velocity, sigmas, step)
            fresh = random.sample_noise(x.shape[1:], ids, layout, "step noise", step).to(self.policy.device)
            x_next = gaussian.mean + gaussian.std * fresh
            if step in trained:
                before.append(x)
                after.append(x_next)
                log_probabilities.append(self._log_probability(x_next, gaussian))
            x = x_next
        return TrajectoryRollout(
            sample_ids=ids,
            conditioning=batch.conditioning,
            latents=x,
            sigmas=sigmas,
            layout=layout,
            steps=trained,
            noisy_latents=torch.stack(before, dim=1),
            next_latents=torch.stack(after, dim=1),
            log_probability=torch.stack(log_probabilities, dim=1),
        )

    def gradient(self, rollout: TrajectoryRollout, advantages: Tensor, random: Random) -> dict[str, float]:
        device = rollout.latents.device
        own_advantages = advantages.flatten()[rollout.positions.to(device)]
        # A sample no better or worse than its group's mean moves nothing and is dropped, its KL term with it.
        moves = [advantage != 0 for advantage in advantages.flatten().tolist()]
        kept = [n for n, at in enumerate(rollout.positions.tolist()) if moves[at] or self.processes.lockstep]
        batches = micro_batches(torch.tensor(kept, dtype=torch.int64, device=device), self.micro_batch_size)
        totals = Totals(device, "loss", "kl", "clip_fraction", "ratio")
        deviation = torch.zeros((), device=device)
        count = max(1, len(rollout.steps) * sum(moves))
        for index in range(len(rollout.steps)):
            for rows in batches:
                loss, apart = self._loss(rollout, index, rows, own_advantages[rows], totals)
                self.backward(loss / count)
                deviation = torch.maximum(deviation, apart)
        logged = totals.means(count, self.processes)
        if rollout.first_group == 0:
            logged["ratio_deviation"] = self.processes.largest(deviation).item()
        return logged

    def _loss(
        self, rollout: TrajectoryRollout, index: int, rows: Tensor, advantages: Tensor, totals: Totals
    ) -> tuple[Tensor, Tensor]:
        """The sum of a micro-batch's losses at one trained step, which is also added to the totals.

        Returns:
            The loss, and how far the ratio of a first update would be from 1 by rounding; two scalars.
        """
        config, step = self.config, rollout.steps[index]
        x, x_next = rollout.noisy_latents[:, index][rows], rollout.next_latents[:, index][rows]
        conditioning, moving = rollout.conditioning[rows], advantages != 0
        velocity = self.policy.velocity(x, rollout.sigmas[step], conditioning, config.guidance)
        gaussian = self._gaussian(x, velocity, rollout.sigmas, step)
        log_probability = self._log_probability(x_next, gaussian)
        old, apart = rollout.log_probability[:, index][rows], log_probability.new_zeros(())
        if rollout.first_group == 0:
            # The policy is still the one that sampled. The same step in a batch of another size may round
            # otherwise, in bf16 by more than the clip allows: so the ratio is taken against this very pass.
            apart = ((torch.exp(log_probability.detach() - old) - 1).abs() * moving).max()
            old = log_probability.detach()
        ratio = torch.exp(log_probability - old)
        loss = (policy_loss(ratio, advantages, config.clip) * moving).sum()
        if config.kl_weight > 0:
            with self.policy.as_reference():
                guidance = config.reference_guidance or config.guidance
                base = self.policy.velocity(x, rollout.sigmas[step], conditioning, guidance)
                base_mean = self._gaussian(x, base, rollout.sigmas, step).mean
            kl = (kl_divergence(gaussian.mean, base_mean, gaussian.diffusion) * moving).sum()
            loss = loss + config.kl_weight * kl
            totals.add("kl", kl.detach())
        totals.add("loss", loss.detach())
        totals.add("ratio", (ratio.detach() * moving).sum())
        totals.add("clip_fraction", (((ratio.detach() - 1).abs() > config.clip) & moving).sum())
        return loss, apart


class FlowGRPO(_Trajectories[FlowGRPOConfig]):
    """Every step is a Flow-SDE step."""

    Config = FlowGRPOConfig

    def _choose_steps(self, steps: int, random: Random) -> tuple[list[int], list[int]]:
        # The last step's noise is too small to be trained on.
        return list(range(steps)), list(range(steps - 1))

    def _gaussian(self, x: Tensor, velocity: Tensor, sigmas: list[float], step: int) -> SdeStep:
        return flow_sde_step(x, velocity, sigmas[step], sigmas[step + 1], self.config.noise_level, sigmas[1])

    def _log_probability(self, x_next: Tensor, gaussian: SdeStep) -> Tensor:
        return flow_sde_log_probability(x_next, gaussian)


class FlowGRPOFast(_Trajectories[FlowGRPOFastConfig]):
    """A window of CPS steps, drawn anew each iteration."""

    Config = FlowGRPOFastConfig

    def _choose_steps(self, steps: int, random: Random) -> tuple[list[int], list[int]]:
        first = random.choose(1, self.config.window_range - self.config.window + 1, "window")[0]
        window = list(range(first, first + self.config.window))
        return window, window

    def _gaussian(self, x: Tensor, velocity: Tensor, sigmas: list[float], step: int) -> SdeStep:
        return cps_step(x, velocity, sigmas[step], sigmas[step + 1], self.config.noise_level)

    def _log_probability(self, x_next: Tensor, gaussian: SdeStep) -> Tensor:
        return cps_log_probability(x_next, gaussian)
