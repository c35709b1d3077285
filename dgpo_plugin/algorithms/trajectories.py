"""What the trajectory algorithms share: stochastic sampler steps are taken, kept, and differentiated once more.

They differ in which steps are stochastic, and how; in the loss of a step; and in what they keep of it. A member is a
file that says those.

Where an iteration makes one update, the policy that is differentiated is still the one that sampled, and the second
forward gives what the first one gave. With ``keep_graphs`` it is left out, and the rollout's graphs are differentiated,
which is LeanGRPO's idea (2026; its code has not been seen).
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from dgpo_plugin.algorithms.base import GROWTH, Algorithm, Cost, Metric, Random, Totals, initial_noise, log_norm
from dgpo_plugin.algorithms.rollout import Batch, Rollout, micro_batches
from dgpo_plugin.config.fields import AdvantageStd, AlgorithmConfig, RunConfig, TrainingConfig
from dgpo_plugin.models.base import guided_passes
from dgpo_plugin.samplers.ode import euler_step
from dgpo_plugin.samplers.sde import SdeStep


def kl_divergence(mean: Tensor, reference_mean: Tensor, diffusion: float) -> Tensor:
    """mean over dims of (mean - mean_ref)^2 / (2 sd^2), (N,)."""
    return (mean - reference_mean).square().flatten(1).mean(1) / (2 * diffusion**2)


KLWeight = Annotated[float, Field(ge=0, description="Weight of every trained step's KL divergence from the base.")]
Guidance = Annotated[
    float, Field(ge=1, description="Classifier-free guidance, in the rollout and in training; 1 is none.")
]


def check_window(window_range: int, steps: int) -> None:
    """Refuse a rollout that has no further step behind the range that stochastic ones are in.

    Raises:
        ValueError: it is too short.
    """
    if steps < window_range + 1:
        raise ValueError(f"rollout.steps ({steps}) must be at least {window_range + 1} for algorithm.window_range")


class TrajectoryConfig(AlgorithmConfig):
    """What all variants are told."""

    noise_level: float = Field(gt=0, description="Noise level a of the stochastic steps.")
    kl_weight: KLWeight
    guidance: Guidance
    reference_guidance: float | None = Field(
        None, ge=1, description="Guidance of the frozen base in the KL term; null for guidance, as published."
    )
    advantage_std: AdvantageStd = "iteration"
    keep_graphs: bool = Field(
        False,
        description="Differentiate the rollout's own passes of the trained steps instead of computing them again: one "
        "forward less for each, the same result, and the memory of all of an iteration's at once. Only where an "
        "iteration is one update.",
    )

    def trained_steps(self, steps: int) -> int:
        """How many of a rollout's steps are trained on."""
        raise NotImplementedError

    def check_training(self, training: TrainingConfig) -> None:
        for key in ("updates_per_iteration", "inner_epochs"):
            if self.keep_graphs and getattr(training, key) > 1:
                raise ValueError(
                    f"training.{key} ({getattr(training, key)}) must be 1 for algorithm.keep_graphs: after the first "
                    f"update the rollout's graphs are not the policy's any more"
                )


@dataclass(frozen=True)
class KeptGraphs:
    """A micro-batch's trained steps as they were sampled, to be differentiated.

    Attributes:
        sample_ids: of its samples, (n,), int64, on the CPU.
        velocities: at each trained step, (n, ...), with their graphs.
    """

    sample_ids: Tensor
    velocities: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class TrajectoryRollout(Rollout):
    """A rollout with its T stochastic steps.

    Attributes:
        steps: those steps, as indices into the schedule, T.
        noisy_latents: before each step, (N, T, ...), float32.
        next_latents: after it, (N, T, ...), float32.
        log_probability: of that step under the policy that took it, (N, T).
        means: of the Gaussians that it was drawn from, (N, T, ...), float32; None where the loss has no use for them.
        graphs: of its micro-batches; none where the steps are computed again.
    """

    steps: list[int]
    noisy_latents: Tensor
    next_latents: Tensor
    log_probability: Tensor
    means: Tensor | None = None
    graphs: tuple[KeptGraphs, ...] = ()


@dataclass(frozen=True)
class Taken:
    """A micro-batch's step, taken by the policy that is trained and by the one that sampled, n samples.

    Attributes:
        gaussian: what the policy would draw it from, with its graph.
        log_probability: of the step under it, (n,), with its graph.
        old_mean: the mean of the Gaussian that it was drawn from, (n, ...); None where the loss has no use for it.
        old_log_probability: of the step under that, (n,).
        advantages: (n,).
        length: of the step, sigma - sigma' > 0.
    """

    gaussian: SdeStep
    log_probability: Tensor
    old_mean: Tensor | None
    old_log_probability: Tensor
    advantages: Tensor
    length: float


T = TypeVar("T", bound=TrajectoryConfig)


class Trajectories(Algorithm[T, TrajectoryRollout]):
    """Any variant."""

    KEEPS_MEANS: ClassVar[bool] = False
    """Whether the loss asks for ``Taken.old_mean``, which costs as much memory as the latents."""
    KL_TO_BASE: ClassVar[bool] = True
    """Whether what the KL term pulls to is the frozen base."""
    METRICS: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "loss",
            "1",
            "Mean over images and trained steps of the clipped policy loss + kl_weight kl; mean over the updates.",
            "Near 0, without a trend: advantages have mean 0 in each group, and its gradient is what is learned from.",
        ),
        Metric(
            "clip_fraction",
            "share, 0 to 1",
            "Images and trained steps that have left the trust region: whose probability ratio is further than clip "
            "from 1, or with flow-dppo those that give no gradient any more.",
            "Low. Near 1 nothing is learned: clip (or threshold) is too narrow for the learning rate.",
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
        GROWTH,
    )

    @classmethod
    def cost(cls, config: RunConfig) -> Cost:
        algorithm, steps = config.algorithm, config.rollout.steps
        assert isinstance(algorithm, TrajectoryConfig)
        trained = algorithm.trained_steps(steps)
        passes = guided_passes(algorithm.guidance)
        reference = guided_passes(algorithm.reference_guidance or algorithm.guidance)
        again, epochs = 2 if algorithm.keep_graphs else 3, config.training.inner_epochs
        return Cost(
            sampling=steps * passes,
            training=epochs * trained * (again * passes + (reference if algorithm.kl_weight > 0 else 0)),
            trained_steps=epochs * trained,
            adapter_copies=0,
            latents=(3 if cls.KEEPS_MEANS else 2) * trained + 1,  # both ends of every trained step, and the clean ones
            rollout_guidance=algorithm.guidance,
            training_guidance=algorithm.guidance,
            kept_graphs=trained if algorithm.keep_graphs else 0,
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

    @abstractmethod
    def _step_loss(self, taken: Taken) -> tuple[Tensor, Tensor, Tensor]:
        """The policy's loss of each sample, its probability ratio, and whether it left the trust region, (n,) each."""

    def _reference(self) -> AbstractContextManager[None]:
        """What makes the policy what the KL term pulls to, without gradient."""
        return self.policy.as_reference()

    def _pulls(self, rows: Tensor) -> Tensor | float:
        """How much each sample's KL term counts, (n,), of rows of this process's rollout; 1 for alike."""
        return 1.0

    def _divergence(self, gaussian: SdeStep, base: SdeStep, clean: Tensor, base_clean: Tensor) -> Tensor:
        """What ``kl_weight`` weighs, (n,).

        Args:
            gaussian, base: the step under the policy and under the frozen base.
            clean, base_clean: the clean predictions, (n, ...).
        """
        return kl_divergence(gaussian.mean, base.mean, gaussian.diffusion)

    @torch.no_grad()
    def sample(self, batch: Batch, random: Random) -> TrajectoryRollout:
        ids, layout, sigmas = batch.sample_ids, batch.layout, batch.sigmas
        x = initial_noise(self.policy, batch, random)
        stochastic, trained = self._choose_steps(len(sigmas) - 1, random)
        before, after, means, log_probabilities, kept = [], [], [], [], list[Tensor]()
        for step in range(len(sigmas) - 1):
            keep = self.config.keep_graphs and step in trained
            velocity = self.policy.velocity(x, sigmas[step], batch.conditioning, self.config.guidance, keep=keep)
            if keep:
                kept.append(velocity)
                velocity = velocity.detach()
            if step not in stochastic:
                x = euler_step(x, velocity, sigmas[step], sigmas[step + 1])
                continue
            gaussian = self._gaussian(x, velocity, sigmas, step)
            fresh = random.sample_noise(x.shape[1:], ids, layout, "step noise", step).to(self.policy.device)
            x_next = gaussian.mean + gaussian.std * fresh
            if step in trained:
                before.append(x)
                after.append(x_next)
                means.append(gaussian.mean)
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
            means=torch.stack(means, dim=1) if self.KEEPS_MEANS else None,
            graphs=(KeptGraphs(ids, kept),) if kept else (),
        )

    def gradient(self, rollout: TrajectoryRollout, advantages: Tensor, random: Random) -> dict[str, float]:
        device = rollout.latents.device
        own_advantages = advantages.flatten()[rollout.positions.to(device)]
        # A sample no better or worse than its group's mean moves nothing and is dropped, its KL term with it.
        moves = [advantage != 0 for advantage in advantages.flatten().tolist()]
        batches = self._micro_batches(rollout, moves)
        of_base = ("velocity_growth",) if self.config.kl_weight > 0 and self.KL_TO_BASE else ()
        totals = Totals(device, "loss", "kl", "clip_fraction", "ratio", *of_base)
        deviation = torch.zeros((), device=device)
        count = max(1, len(rollout.steps) * sum(moves))
        for index in range(len(rollout.steps)):
            for rows, kept in batches:
                velocity = self._velocity(rollout, index, rows, kept)
                loss, apart = self._loss(rollout, index, rows, velocity, own_advantages[rows], totals)
                self.backward(loss / count)
                deviation = torch.maximum(deviation, apart)
        logged = totals.means(count, self.processes)
        if rollout.first_update:
            logged["ratio_deviation"] = self.processes.largest(deviation).item()
        return logged

    def _micro_batches(self, rollout: TrajectoryRollout, moves: list[bool]) -> list[tuple[Tensor, KeptGraphs | None]]:
        """The rows to train on, (n,) each, with their graphs: in the rollout's micro-batches where it kept those."""
        device, positions = rollout.latents.device, rollout.positions.tolist()
        trained = [row for row, at in enumerate(positions) if moves[at] or self.processes.lockstep]
        if not rollout.graphs:
            rows = torch.tensor(trained, dtype=torch.int64, device=device)
            return [(part, None) for part in micro_batches(rows, self.micro_batch_size)]
        row_of = {sample: row for row, sample in enumerate(rollout.sample_ids.tolist())}
        sampled = [[row_of[sample] for sample in each.sample_ids.tolist()] for each in rollout.graphs]
        return [
            (torch.tensor(batch, device=device), each)
            for batch, each in zip(sampled, rollout.graphs, strict=True)
            if not set(trained).isdisjoint(batch)
        ]

    def _velocity(self, rollout: TrajectoryRollout, index: int, rows: Tensor, kept: KeptGraphs | None) -> Tensor:
        """A micro-batch's velocity at one trained step, with its graph, (n, ...)."""
        step, guidance = rollout.steps[index], self.config.guidance
        if kept is not None:
            self.policy.count_kept(kept.velocities[index], guidance)
            return kept.velocities[index]
        x = rollout.noisy_latents[:, index][rows]
        return self.policy.velocity(x, rollout.sigmas[step], rollout.conditioning[rows], guidance)

    def _loss(
        self, rollout: TrajectoryRollout, index: int, rows: Tensor, velocity: Tensor, advantages: Tensor, totals: Totals
    ) -> tuple[Tensor, Tensor]:
        """The sum of a micro-batch's losses at one trained step, which is also added to the totals.

        Args:
            velocity: of the policy there, (n, ...), with its graph.

        Returns:
            The loss, and how far the ratio of a first update would be from 1 by rounding; two scalars.
        """
        config, step = self.config, rollout.steps[index]
        x, x_next = rollout.noisy_latents[:, index][rows], rollout.next_latents[:, index][rows]
        conditioning, moving = rollout.conditioning[rows], advantages != 0
        gaussian = self._gaussian(x, velocity, rollout.sigmas, step)
        log_probability = self._log_probability(x_next, gaussian)
        old, apart = rollout.log_probability[:, index][rows], log_probability.new_zeros(())
        old_mean = None if rollout.means is None else rollout.means[:, index][rows]
        if rollout.first_update:
            # The policy is still the one that sampled. The same step in a batch of another size may round
            # otherwise, in bf16 by more than the clip allows: so the ratio is taken against this very pass.
            apart = ((torch.exp(log_probability.detach() - old) - 1).abs() * moving).max()
            old = log_probability.detach()
            old_mean = None if old_mean is None else gaussian.mean.detach()
        sigma, sigma_next = rollout.sigmas[step : step + 2]
        taken = Taken(gaussian, log_probability, old_mean, old, advantages, sigma - sigma_next)
        losses, ratio, out = self._step_loss(taken)
        loss = (losses * moving).sum()
        if config.kl_weight > 0:
            with self._reference():
                guidance = config.reference_guidance or config.guidance
                base = self.policy.velocity(x, sigma, conditioning, guidance)
                base_step = self._gaussian(x, base, rollout.sigmas, step)
            divergence = self._divergence(gaussian, base_step, x - sigma * velocity, x - sigma * base)
            kl = (divergence * moving * self._pulls(rows)).sum()
            loss = loss + config.kl_weight * kl
            totals.add("kl", kl.detach())
            if self.KL_TO_BASE:
                totals.add("velocity_growth", ((log_norm(velocity) - log_norm(base)) * moving).sum())
        totals.add("loss", loss.detach())
        totals.add("ratio", (ratio.detach() * moving).sum())
        totals.add("clip_fraction", (out & moving).sum())
        return loss, apart
