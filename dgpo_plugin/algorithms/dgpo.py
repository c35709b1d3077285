"""DGPO: direct preference optimization of prompt groups with deterministic sampling (arXiv 2510.08425).

The loss first, as pure functions on tensors; then its configuration, and the class that samples, measures matching
errors and differentiates, micro-batch by micro-batch and still with the whole group's exact weight.

It follows the authors' released code, which is not their paper:
1. d is the velocity's error and a mean over dims; the paper has the clean picture's, a sum, weighted with lambda_t.
2. The flow times are M of the rollout's noisiest steps, one set an iteration; the paper's is continuous (``t_min``).
3. Images that left a trust region around the old policy give no gradient; the paper has none (``clip: null``).
4. A KL term holds the policy to the frozen base; the paper has none (``kl_weight: 0``).
5. No text is dropped in training; the paper drops 5 % (``text_dropout``).
6. The old policy's decay rises to 0.3 over 300 steps; the paper's is 0.3 from the switch on.
7. Advantages are clipped to +-5, and their spread may be that of the whole iteration (``advantage_std``).
8. The reference may be the old policy (``reference``), which is TDM-R1's (arXiv 2603.07700).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dgpo_plugin.algorithms.base import Algorithm, Backward, Cost, Metric, Random, Totals, initial_noise
from dgpo_plugin.algorithms.rollout import Batch, Rollout, micro_batches
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import AlgorithmConfig, OdeSampler, RunConfig, Schedule
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.policy import Policy, move_towards
from dgpo_plugin.samplers.ode import sample_ode


def matching_error(predicted: Tensor, target: Tensor) -> Tensor:
    """d, (N,): mean over all but the batch axis of (target velocity - predicted velocity)^2."""
    return (target - predicted).square().flatten(1).mean(1)


def group_weight(error: Tensor, reference_error: Tensor, advantages: Tensor, beta: float) -> Tensor:
    """w = sigmoid(S), S = (beta / G) sum over the group of A (d - d_ref); all inputs (P, G), output (P,).

    The derivative of -log sigmoid(-S) in S (equation 14): large where the group is still ranked wrongly.
    """
    return torch.sigmoid(beta * (advantages * (error - reference_error)).mean(1))


def clipped(error: Tensor, old_error: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Which images have left the trust region, boolean like the inputs.

    ratio = exp(d_old - d); out where A > 0 and ratio > 1 + c, or A <= 0 and ratio < 1 - c.
    """
    ratio = torch.exp(old_error - error)
    return torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)


def dgpo_loss(error: Tensor, weight: Tensor, advantages: Tensor, is_clipped: Tensor) -> Tensor:
    """w A d for each image, (N,); gradient flows through d alone, and not through clipped images' d.

    The gradient of its mean over all images is that of the mean over groups of -log sigmoid(-S), divided by beta:
    beta shapes the weight, not the step.
    """
    kept = torch.where(is_clipped, error.detach(), error)
    return weight.detach() * advantages * kept


class DGPOConfig(AlgorithmConfig):
    """DGPO; the defaults are its GenEval setting with a guided rollout."""

    name: Literal["dgpo"] = "dgpo"
    sampler: OdeSampler = Field("dpm-solver++", description="Deterministic sampler of the rollout.")
    beta: float = Field(
        100.0, gt=0, description="Sharpness of the group weight w = sigmoid(S); it shapes the weight, not the step."
    )
    kl_weight: float = Field(
        0.02, ge=0, description="Weight of the squared distance between the policy's and the frozen base's velocity."
    )
    clip: float | None = Field(
        1e-2,
        gt=0,
        description="Half-width of the trust region on exp(d_old - d); null for none, which saves a pass.",
    )
    timesteps: int = Field(
        4, ge=1, description="M, sampler steps trained on in an iteration, drawn without replacement."
    )
    noisiest_steps: int = Field(5, ge=1, description="K, the noisiest sampler steps, which they are drawn from.")
    t_min: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Train instead on M flow times drawn uniformly from [t_min, the rollout's first sigma], as in the "
        "paper, which names shift(0.3) and shift(0.4): .5625 and .6667 at shift 3; noisiest_steps then has no say. "
        "Null for sampler steps, as in the released code.",
    )
    text_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of prompt groups, drawn anew for each timestep, that are trained on the empty prompt in all "
        "passes; the paper's is 0.05, the released code has none.",
    )
    old_policy_after: int = Field(
        500,
        ge=0,
        description="Optimizer steps; the rollout comes from the old policy in iterations that begin with more done.",
    )
    reference: Literal["base", "old_policy"] = Field(
        "base", description="What d_ref is measured under: the frozen base, or the old policy (TDM-R1)."
    )
    rollout_guidance: float = Field(4.5, ge=1, description="Classifier-free guidance of the rollout; 1 is none.")
    reference_guidance: float = Field(
        1.0, ge=1, description="Classifier-free guidance of the frozen base's velocity; 1 is none."
    )

    @property
    def default_schedule(self) -> Schedule:
        """DPM-Solver++ is stable on its own scheduler's noise levels; Euler was made for the pipeline's."""
        return "dpm" if self.sampler == "dpm-solver++" else "native"

    def check_rollout(self, steps: int, schedule: Schedule) -> None:
        if self.t_min is None and steps < self.noisiest_steps:
            raise ValueError(
                f"rollout.steps ({steps}) must be at least {self.noisiest_steps} for algorithm.noisiest_steps"
            )

    @model_validator(mode="after")
    def _timesteps_fit(self) -> DGPOConfig:
        if self.t_min is None and self.timesteps > self.noisiest_steps:
            raise ValueError(f"timesteps ({self.timesteps}) cannot exceed noisiest_steps ({self.noisiest_steps})")
        return self


@dataclass(frozen=True)
class Noised:
    """This process's samples at one flow time, N of them.

    Attributes:
        latents: noisy, (N, ...).
        target: the velocity to predict, times ``unit``, (N, ...).
        unit: the error of the model's own prediction over that of its velocity, of which the matching error is the
            square.
    """

    latents: Tensor
    target: Tensor
    sigma: float
    unit: float
    conditioning: Conditioning

    def predict(self, policy: Policy, rows: Tensor, guidance: float = 1.0) -> Tensor:
        """The velocity of some rows under the weights in place, times ``unit``."""
        return self.unit * policy.velocity(self.latents[rows], self.sigma, self.conditioning[rows], guidance)


@dataclass(frozen=True)
class _Frozen:
    """What is measured of a micro-batch without gradient at one flow time, all (N,) but the velocity."""

    reference_error: Tensor
    old_error: Tensor | None
    base_velocity: Tensor | None


class DGPO(Algorithm[DGPOConfig, Rollout]):
    """The policy, its old copy, and the frozen base, measured on the same noised samples."""

    Config = DGPOConfig
    METRICS = (
        Metric(
            "loss",
            "1",
            "Mean over images and timesteps of w A d + kl_weight kl; mean over the iteration's updates.",
            "Near 0, without a trend: advantages have mean 0 in each group, and its gradient is what is learned from.",
        ),
        Metric(
            "clip_fraction",
            "share, 0 to 1",
            "Images and timesteps outside the trust region around the old policy, which give no gradient.",
            "Low; 0 while the old policy is the policy, or with clip: null. Near 1 nothing is learned: clip is too "
            "narrow for the learning rate.",
            shown="clipped {:5.1%}",
        ),
        Metric(
            "kl",
            "velocity squared",
            "Mean squared distance of the policy's velocity from the frozen base's; 0 where kl_weight is 0.",
            "Rises from its start and levels off; one that runs away leaves the base behind: raise kl_weight or lower "
            "the learning rate. With reference_guidance the start is not 0.",
            shown="kl {:.4f}",
        ),
        Metric(
            "group_weight",
            "share, 0 to 1",
            "Mean of w = sigmoid(S) over the prompt groups, S = (beta / G) times the sum of A (d - d_ref).",
            "Around 0.5 at the start. Below it the groups are ranked better than by the reference, above it worse.",
        ),
    )

    def __init__(
        self,
        config: DGPOConfig,
        policy: Policy,
        processes: Processes,
        micro_batch_size: int | None,
        backward: Backward = torch.autograd.backward,
    ) -> None:
        super().__init__(config, policy, processes, micro_batch_size, backward)
        self.old_weights = policy.copy_weights()
        self._steps_done = 0

    @staticmethod
    def cost(config: RunConfig) -> Cost:
        algorithm, training = config.algorithm, config.training
        assert isinstance(algorithm, DGPOConfig)
        passes = 3
        if algorithm.reference == "base" or algorithm.kl_weight > 0:
            passes += 2 if algorithm.reference_guidance > 1 else 1
        if algorithm.reference == "old_policy" or algorithm.clip is not None:
            passes += 1
        if training.micro_batch_size is not None and training.micro_batch_size < training.images:
            passes += 1  # the group's weight needs a pass of its own
        return Cost(
            sampling=config.rollout.steps * (2 if algorithm.rollout_guidance > 1 else 1),
            training=algorithm.timesteps * passes,
            trained_steps=algorithm.timesteps,
            adapter_copies=1,
            latents=4,  # clean, noise, noisy, target
            rollout_guidance=algorithm.rollout_guidance,
            training_guidance=1.0,
        )

    @property
    def _old_is_policy(self) -> bool:
        """Before the first step, and after it with mu = 0, the old copy is the policy itself."""
        return self._steps_done <= 1

    @torch.no_grad()
    def sample(self, batch: Batch, random: Random) -> Rollout:
        policy, guidance = self.policy, self.config.rollout_guidance
        from_old = self._steps_done > self.config.old_policy_after and not self._old_is_policy

        def velocity(x: Tensor, sigma: float) -> Tensor:
            return policy.velocity(x, sigma, batch.conditioning, guidance)

        noise = initial_noise(policy, batch, random)
        with policy.with_weights(self.old_weights) if from_old else contextlib.nullcontext():
            latents = sample_ode(velocity, noise, batch.sigmas, self.config.sampler)
        return Rollout(batch.sample_ids, batch.conditioning, latents, batch.sigmas, batch.layout)

    def gradient(self, rollout: Rollout, advantages: Tensor, random: Random) -> dict[str, float]:
        device = rollout.latents.device
        positions = rollout.positions.to(device)
        groups, own_advantages = positions // advantages.shape[1], advantages.flatten()[positions]
        batches = self._micro_batches(rollout, advantages)
        totals = Totals(device, "loss", "kl", "clip_fraction", "group_weight")
        times = self.flow_times(rollout.sigmas, random)
        count = len(times) * advantages.numel()
        for number, sigma in times.items():
            noised = self.noised(rollout, number, sigma, random)
            frozen = [self._measure_frozen(noised, rows) for rows in batches]
            # The group's weight needs every d of the group before any gradient: a first pass without one, which a
            # single micro-batch saves by using the pass it differentiates.
            only = noised.predict(self.policy, batches[0]) if len(batches) == 1 else None
            weights = self._group_weights(noised, batches, frozen, only, positions, advantages)[groups]
            for rows, measured in zip(batches, frozen, strict=True):
                predicted = noised.predict(self.policy, rows) if only is None else only
                given = (weights[rows], own_advantages[rows])
                self.backward(self._loss(predicted, noised.target[rows], measured, *given, totals) / count)
            totals.add("group_weight", weights.sum())
        return totals.means(count, self.processes)

    def _loss(
        self, predicted: Tensor, target: Tensor, measured: _Frozen, weights: Tensor, advantages: Tensor, totals: Totals
    ) -> Tensor:
        """The sum of a micro-batch's losses, which is also added to the totals."""
        config, error = self.config, matching_error(predicted, target)
        out = torch.zeros_like(error, dtype=torch.bool)
        if measured.old_error is not None and config.clip is not None:
            out = clipped(error.detach(), measured.old_error, advantages, config.clip)
        loss = dgpo_loss(error, weights, advantages, out).sum()
        if measured.base_velocity is not None:
            kl = matching_error(predicted, measured.base_velocity).sum()
            loss = loss + config.kl_weight * kl
            totals.add("kl", kl.detach())
        totals.add("loss", loss.detach())
        totals.add("clip_fraction", out.sum())
        return loss

    @torch.no_grad()
    def _group_weights(
        self,
        noised: Noised,
        batches: tuple[Tensor, ...],
        frozen: list[_Frozen],
        only: Tensor | None,
        positions: Tensor,
        advantages: Tensor,
    ) -> Tensor:
        """w of every prompt group of the update, (P,), from all processes' matching errors.

        Args:
            only: the prediction of the one micro-batch, if there is but one.
        """
        errors = noised.target.new_zeros(len(positions), 2)
        for rows, measured in zip(batches, frozen, strict=True):
            predicted = noised.predict(self.policy, rows) if only is None else only
            errors[rows, 0] = matching_error(predicted, noised.target[rows])
            errors[rows, 1] = measured.reference_error
        everyone = self.processes.assemble(errors, positions, advantages.numel())
        error, reference = everyone.T.reshape(2, *advantages.shape)
        return group_weight(error, reference, advantages, self.config.beta)

    def _micro_batches(self, rollout: Rollout, advantages: Tensor) -> tuple[Tensor, ...]:
        """The rows to run; a group of equal rewards moves nothing, only the KL term would need it."""
        groups = (rollout.positions // advantages.shape[1]).tolist()
        everyone = self.config.kl_weight > 0 or self.processes.lockstep
        moving = [True] * len(advantages) if everyone else (advantages != 0).any(1).tolist()
        rows = [row for row, group in enumerate(groups) if moving[group]]
        return micro_batches(torch.tensor(rows, dtype=torch.int64, device=advantages.device), self.micro_batch_size)

    def flow_times(self, sigmas: list[float], random: Random) -> dict[int, float]:
        """The flow times to train on, the same for every sample, each by the number that its noise is drawn with."""
        config = self.config
        if config.t_min is None:
            chosen = random.choose(config.timesteps, config.noisiest_steps, "timesteps")
            return {step: sigmas[step] for step in chosen}
        if config.t_min >= sigmas[0]:
            raise UserError(f"algorithm.t_min {config.t_min}: the rollout starts at {sigmas[0]:.4f}; set it lower")
        drawn = random.uniform(config.timesteps, "timesteps")
        return {number: sigmas[0] - u * (sigmas[0] - config.t_min) for number, u in enumerate(drawn)}

    def noised(self, rollout: Rollout, number: int, sigma: float, random: Random) -> Noised:
        """The rollout's samples at a flow time, by the number that its noise and dropped texts are drawn with."""
        ids, layout, clean = rollout.sample_ids, rollout.layout, rollout.latents
        # One noise for a whole prompt group: its samples then differ in the picture alone.
        noise = random.group_noise(clean.shape[1:], ids, layout, "training noise", number).to(clean)
        # The matching error is that of the model's own prediction: its velocity's, times a weight.
        unit = self.policy.model.error_weight(sigma) ** 0.5
        noisy, target = (1 - sigma) * clean + sigma * noise, unit * (noise - clean)
        conditioning = rollout.conditioning
        if self.config.text_dropout > 0:
            groups = layout.groups_of(ids).tolist()
            share = self.config.text_dropout
            lost = {g for g in set(groups) if random.uniform(1, "text dropout", number, g)[0] < share}
            dropped = torch.tensor([group in lost for group in groups], dtype=torch.bool, device=noisy.device)
            conditioning = conditioning.replaced(dropped, self.policy.unconditional)
        return Noised(noisy, target, sigma, unit, conditioning)

    @torch.no_grad()
    def _measure_frozen(self, noised: Noised, rows: Tensor) -> _Frozen:
        """Matching errors under the reference and the old policy; forwards whose result is known are skipped."""
        config, policy, target = self.config, self.policy, noised.target[rows]
        old_error = base_velocity = None
        needs_old = config.clip is not None or config.reference == "old_policy"
        if needs_old and not self._old_is_policy:
            with policy.with_weights(self.old_weights):
                old_error = matching_error(noised.predict(policy, rows), target)
        elif config.reference == "old_policy":
            old_error = matching_error(noised.predict(policy, rows), target)
        if config.reference == "base" or config.kl_weight > 0:
            with policy.as_reference():
                base_velocity = noised.predict(policy, rows, config.reference_guidance)
        if config.reference == "old_policy":
            assert old_error is not None
            reference_error = old_error
        else:
            assert base_velocity is not None
            reference_error = matching_error(base_velocity, target)
        return _Frozen(reference_error, old_error, base_velocity if config.kl_weight > 0 else None)

    def after_step(self, step: int) -> None:
        """Move the old policy: old <- mu old + (1 - mu) policy, mu = min(0.3, 0.001 step)."""
        keep = min(0.3, 0.001 * step)
        move_towards(self.old_weights, self.policy.parameters, keep)
        self.resume(step + 1)

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {"old": self.old_weights}

    def resume(self, steps: int) -> None:
        self._steps_done = steps
