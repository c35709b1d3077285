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
from dgpo_plugin.algorithms.base import Backward, Draw, Metrics
from dgpo_plugin.config import DGPOConfig, RolloutConfig
from dgpo_plugin.lora import Policy, move_towards
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.rollout import Rollout, micro_batches, per_image
from dgpo_plugin.samplers.ode import sample_ode

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
        self, config: DGPOConfig, rollout: RolloutConfig, policy: Policy, micro_batch_size: int | None
    ) -> None:
        self.config = config
        self.advantage_std: AdvantageStd = config.advantage_std
        self._rollout = rollout
        self._micro_batch_size = micro_batch_size
        self.old_weights = policy.copy_weights()
        self._old_is_policy = True
        self._steps_done = 0

    @torch.no_grad()
    def sample(
        self, policy: Policy, conditioning: Conditioning, slots: list[int], group_size: int, draw: Draw
    ) -> Rollout:
        model = policy.model
        sigmas = model.sigmas(self._rollout.steps, self._rollout.shift)
        device = next(iter(conditioning.tensors.values())).device
        noise = draw.initial_noise(model.latent_shape, slots, group_size).to(device)
        repeated = conditioning[per_image(torch.arange(len(slots), device=device), group_size)]
        from_old = self._steps_done >= self.config.old_policy_after and not self._old_is_policy
        parts = []
        with policy.with_weights(self.old_weights) if from_old else contextlib.nullcontext():
            for rows in micro_batches(torch.arange(len(noise), device=device), self._micro_batch_size):
                asked = repeated[rows]

                def velocity(x: Tensor, sigma: float, asked: Conditioning = asked) -> Tensor:
                    return policy.velocity(x, sigma, asked, self.config.rollout_guidance)

                parts.append(sample_ode(velocity, noise[rows], sigmas, self.config.sampler))
        return Rollout(repeated, torch.cat(parts), sigmas, group_size, slots)

    def accumulate_gradient(
        self, policy: Policy, rollout: Rollout, advantages: Tensor, draw: Draw, backward: Backward
    ) -> Metrics:
        config = self.config
        total = {"loss": 0.0, "kl": 0.0, "clip_fraction": 0.0, "group_weight": 0.0}
        chosen = draw.choose(config.timesteps, config.noisiest_steps, "timesteps")
        batches = micro_batches(
            torch.arange(len(rollout.latents), device=rollout.latents.device), self._micro_batch_size
        )
        flat_advantages = advantages.flatten()
        for step in chosen:
            sigma = rollout.sigmas[step]
            shape = rollout.latents.shape[1:]
            # One noise for a whole prompt group: its images then differ in the picture alone.
            noise = torch.stack([draw.noise(shape, "training noise", step, slot) for slot in rollout.slots])
            noise = per_image(noise.to(rollout.latents), rollout.group_size)
            noisy, target = (1 - sigma) * rollout.latents + sigma * noise, noise - rollout.latents

            def predict(rows: Tensor, guidance: float = 1.0, x: Tensor = noisy, s: float = sigma) -> Tensor:
                return policy.velocity(x[rows], s, rollout.conditioning[rows], guidance)

            frozen = [self._measure_frozen(policy, predict, target, rows) for rows in batches]
            # The group's weight needs every d of the group before any gradient: a first pass without one, which a
            # single micro-batch saves by using the pass it differentiates.
            ahead = predict(batches[0]) if len(batches) == 1 else None
            if ahead is not None:
                errors = matching_error(ahead.detach(), target)
            else:
                with torch.no_grad():
                    errors = torch.cat([matching_error(predict(rows), target[rows]) for rows in batches])
            reference = torch.cat([part.reference_error for part in frozen])
            weight = group_weight(errors.view_as(advantages), reference.view_as(advantages), advantages, config.beta)
            weights = per_image(weight, rollout.group_size)
            for rows, part in zip(batches, frozen, strict=True):
                predicted = predict(rows) if ahead is None else ahead
                error = matching_error(predicted, target[rows])
                out = torch.zeros_like(error, dtype=torch.bool)
                if part.old_error is not None and config.clip is not None:
                    out = clipped(error.detach(), part.old_error, flat_advantages[rows], config.clip)
                loss = dgpo_loss(error, weights[rows], flat_advantages[rows], out).sum()
                if part.base_velocity is not None:
                    kl = matching_error(predicted, part.base_velocity).sum()
                    loss = loss + config.kl_weight * kl
                    total["kl"] += kl.item()
                loss = loss / (len(chosen) * len(rollout.latents))
                backward(loss)
                total["loss"] += loss.item()
                total["clip_fraction"] += out.sum().item()
            total["group_weight"] += weight.sum().item() * rollout.group_size
        count = len(chosen) * len(rollout.latents)
        return {name: value if name == "loss" else value / count for name, value in total.items()}

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
        self._old_is_policy = keep == 0
        self._steps_done = step + 1
