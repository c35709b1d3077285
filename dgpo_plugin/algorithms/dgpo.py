"""DGPO: direct preference optimisation of prompt groups with deterministic sampling (arXiv 2510.08425).

The loss first, as pure functions on tensors; then the class that samples, measures matching errors and
differentiates, micro-batch by micro-batch and still with the whole group's exact weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dgpo_plugin.advantages import AdvantageStd
from dgpo_plugin.algorithms.base import Backward, Draw, Metrics, average, begin
from dgpo_plugin.config import DGPOConfig, RolloutConfig
from dgpo_plugin.lora import Policy, move_towards
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.processes import Processes
from dgpo_plugin.rollout import Rollout, micro_batches
from dgpo_plugin.samplers.ode import Schedule, sample_ode

_Predict = Callable[..., Tensor]


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


@dataclass(frozen=True)
class _Frozen:
    """Measurements without gradient at one timestep, all (N,) but the velocity."""

    reference_error: Tensor
    old_error: Tensor | None
    base_velocity: Tensor | None


class DGPO:
    """See :class:`dgpo_plugin.algorithms.base.Algorithm`."""

    def __init__(
        self,
        config: DGPOConfig,
        rollout: RolloutConfig,
        schedule: Schedule,
        policy: Policy,
        micro_batch_size: int | None,
    ) -> None:
        self.config = config
        self.advantage_std: AdvantageStd = config.advantage_std
        self._rollout = rollout
        self._schedule = schedule
        self._micro_batch_size = micro_batch_size
        self.old_weights = policy.copy_weights()
        self._old_is_policy = True
        self._steps_done = 0

    @torch.no_grad()
    def sample(
        self, policy: Policy, conditioning: Conditioning, images: Tensor, group_size: int, draw: Draw
    ) -> Rollout:
        sigmas, noise = begin(policy, self._rollout, self._schedule, images, group_size, draw)
        from_old = self._steps_done >= self.config.old_policy_after and not self._old_is_policy

        def velocity(x: Tensor, sigma: float) -> Tensor:
            return policy.velocity(x, sigma, conditioning, self.config.rollout_guidance)

        with policy.with_weights(self.old_weights) if from_old else contextlib.nullcontext():
            latents = sample_ode(velocity, noise, sigmas, self.config.sampler)
        return Rollout(images, conditioning, latents, sigmas)

    def accumulate_gradient(
        self,
        policy: Policy,
        rollout: Rollout,
        advantages: Tensor,
        draw: Draw,
        backward: Backward,
        processes: Processes,
    ) -> Metrics:
        config = self.config
        total = dict.fromkeys(("loss", "kl", "clip_fraction", "group_weight"), 0.0)
        group_size = advantages.shape[1]
        places = rollout.places(group_size)
        own_advantages = advantages.flatten()[places]
        chosen = draw.choose(config.timesteps, config.noisiest_steps, "timesteps")
        count = len(chosen) * advantages.numel()
        # A group of equal rewards moves nothing; only the KL term would still need it.
        needed = (advantages != 0).any(1)[places // group_size] | (config.kl_weight > 0) | processes.lockstep
        batches = micro_batches(needed.nonzero().flatten(), self._micro_batch_size)
        shape = rollout.latents.shape[1:]
        for step in chosen:
            sigma = rollout.sigmas[step]
            # One noise for a whole prompt group: its images then differ in the picture alone.
            noise = draw.group_noise(shape, rollout.images, group_size, "training noise", step).to(rollout.latents)
            # The matching error is that of the model's own prediction: its velocity's, times a weight.
            unit = policy.model.error_weight(sigma) ** 0.5
            noisy, target = (1 - sigma) * rollout.latents + sigma * noise, unit * (noise - rollout.latents)

            def predict(
                rows: Tensor, guidance: float = 1.0, x: Tensor = noisy, s: float = sigma, unit: float = unit
            ) -> Tensor:
                return unit * policy.velocity(x[rows], s, rollout.conditioning[rows], guidance)

            frozen = [self._measure_frozen(policy, predict, target, rows) for rows in batches]
            # The group's weight needs every d of the group before any gradient: a first pass without one, which a
            # single micro-batch saves by using the pass it differentiates.
            ahead = predict(batches[0]) if len(batches) == 1 else None
            errors = target.new_zeros(len(target), 2)
            for rows, part in zip(batches, frozen, strict=True):
                with torch.no_grad():
                    predicted = predict(rows) if ahead is None else ahead
                    errors[rows, 0] = matching_error(predicted, target[rows])
                errors[rows, 1] = part.reference_error
            everyone = processes.assemble(errors, places, advantages.numel())
            error, reference = everyone.T.reshape(2, *advantages.shape)
            weight = group_weight(error, reference, advantages, config.beta)
            weights = weight[places // group_size]
            for rows, part in zip(batches, frozen, strict=True):
                predicted = predict(rows) if ahead is None else ahead
                own_error = matching_error(predicted, target[rows])
                out = torch.zeros_like(own_error, dtype=torch.bool)
                if part.old_error is not None and config.clip is not None:
                    out = clipped(own_error.detach(), part.old_error, own_advantages[rows], config.clip)
                loss = dgpo_loss(own_error, weights[rows], own_advantages[rows], out).sum()
                if part.base_velocity is not None:
                    kl = matching_error(predicted, part.base_velocity).sum()
                    loss = loss + config.kl_weight * kl
                    total["kl"] += kl.item()
                backward(loss / count)
                total["loss"] += loss.item()
                total["clip_fraction"] += out.sum().item()
            total["group_weight"] += weights.sum().item()
        return average(total, count, processes, rollout.latents.device)

    @torch.no_grad()
    def _measure_frozen(self, policy: Policy, predict: _Predict, target: Tensor, rows: Tensor) -> _Frozen:
        """Matching errors under the reference and the old policy; forwards whose result is known are skipped."""
        config = self.config
        old_error = base_velocity = None
        needs_old = config.clip is not None or config.reference == "old_policy"
        if needs_old and not self._old_is_policy:
            with policy.with_weights(self.old_weights):
                old_error = matching_error(predict(rows), target[rows])
        elif config.reference == "old_policy":
            old_error = matching_error(predict(rows), target[rows])
        if config.reference == "base" or config.kl_weight > 0:
            with policy.as_reference():
                base_velocity = predict(rows, config.reference_guidance)
        if config.reference == "old_policy":
            assert old_error is not None
            reference_error = old_error
        else:
            assert base_velocity is not None
            reference_error = matching_error(base_velocity, target[rows])
        return _Frozen(reference_error, old_error, base_velocity if config.kl_weight > 0 else None)

    def after_step(self, policy: Policy, step: int) -> None:
        """old <- mu old + (1 - mu) policy, mu = min(0.3, 0.001 step)."""
        keep = min(0.3, 0.001 * step)
        move_towards(self.old_weights, policy.parameters, keep)
        self.resume(step + 1)

    def state(self) -> dict[str, list[Tensor]]:
        return {"old": self.old_weights}

    def resume(self, steps: int) -> None:
        self._steps_done = steps
        # Before the first step, and after it with mu = 0, the copy is the policy itself.
        self._old_is_policy = steps <= 1
