"""DGPO: direct preference optimisation of prompt groups with deterministic sampling (arXiv 2510.08425).

The loss first, as pure functions on tensors; then the class that samples, measures matching errors and
differentiates, micro-batch by micro-batch and still with the whole group's exact weight.

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

import torch
from torch import Tensor

from dgpo_plugin.algorithms.base import Backward, Draw, Metrics, average, begin, totals
from dgpo_plugin.algorithms.rollout import Rollout, micro_batches
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.config.fields import AdvantageStd, DGPOConfig, RolloutConfig, Schedule
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


@dataclass(frozen=True)
class _Noised:
    """This process's images at one flow time, N of them.

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
        asked = self.conditioning[rows]
        return self.unit * policy.velocity(self.latents[rows], self.sigma, asked, guidance)


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
        from_old = self._steps_done > self.config.old_policy_after and not self._old_is_policy

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
        config, device = self.config, rollout.latents.device
        group_size = advantages.shape[1]
        batches = self._batches(rollout, advantages, processes)
        places = rollout.places(group_size).to(device)
        groups, own_advantages = places // group_size, advantages.flatten()[places]
        total = totals(device, "loss", "kl", "clip_fraction", "group_weight")
        times = self._times(rollout.sigmas, draw)
        count = len(times) * advantages.numel()
        for number, sigma in times.items():
            noised = self._noise(policy, rollout, number, sigma, group_size, draw)
            frozen = [self._measure_frozen(policy, noised, rows) for rows in batches]
            # The group's weight needs every d of the group before any gradient: a first pass without one, which a
            # single micro-batch saves by using the pass it differentiates.
            ahead = noised.predict(policy, batches[0]) if len(batches) == 1 else None
            errors = noised.target.new_zeros(len(places), 2)
            for rows, part in zip(batches, frozen, strict=True):
                with torch.no_grad():
                    predicted = noised.predict(policy, rows) if ahead is None else ahead
                    errors[rows, 0] = matching_error(predicted, noised.target[rows])
                errors[rows, 1] = part.reference_error
            everyone = processes.assemble(errors, places, advantages.numel())
            error, reference = everyone.T.reshape(2, *advantages.shape)
            weights = group_weight(error, reference, advantages, config.beta)[groups]
            for rows, part in zip(batches, frozen, strict=True):
                predicted = noised.predict(policy, rows) if ahead is None else ahead
                own_error = matching_error(predicted, noised.target[rows])
                out = torch.zeros_like(own_error, dtype=torch.bool)
                if part.old_error is not None and config.clip is not None:
                    out = clipped(own_error.detach(), part.old_error, own_advantages[rows], config.clip)
                loss = dgpo_loss(own_error, weights[rows], own_advantages[rows], out).sum()
                if part.base_velocity is not None:
                    kl = matching_error(predicted, part.base_velocity).sum()
                    loss = loss + config.kl_weight * kl
                    total["kl"] += kl.detach()
                backward(loss / count)
                total["loss"] += loss.detach()
                total["clip_fraction"] += out.sum()
            total["group_weight"] += weights.sum()
        return average(total, count, processes)

    def _batches(self, rollout: Rollout, advantages: Tensor, processes: Processes) -> tuple[Tensor, ...]:
        """Micro-batches of the rows to run; a group of equal rewards moves nothing, only the KL term would need it."""
        group_size = advantages.shape[1]
        groups = (rollout.places(group_size) // group_size).tolist()
        everyone = self.config.kl_weight > 0 or processes.lockstep
        moving = [True] * len(advantages) if everyone else (advantages != 0).any(1).tolist()
        rows = [row for row, group in enumerate(groups) if moving[group]]
        return micro_batches(torch.tensor(rows, dtype=torch.int64, device=advantages.device), self._micro_batch_size)

    def _times(self, sigmas: list[float], draw: Draw) -> dict[int, float]:
        """The flow times to train on, the same for every image, each by the number that its noise is drawn with."""
        config = self.config
        if config.t_min is None:
            chosen = draw.choose(config.timesteps, config.noisiest_steps, "timesteps")
            return {step: sigmas[step] for step in chosen}
        if config.t_min >= sigmas[0]:
            raise UserError(f"algorithm.t_min {config.t_min}: the rollout starts at {sigmas[0]:.4f}; set it lower")
        drawn = draw.uniform(config.timesteps, "timesteps")
        return {number: sigmas[0] - u * (sigmas[0] - config.t_min) for number, u in enumerate(drawn)}

    def _noise(
        self, policy: Policy, rollout: Rollout, number: int, sigma: float, group_size: int, draw: Draw
    ) -> _Noised:
        shape = rollout.latents.shape[1:]
        # One noise for a whole prompt group: its images then differ in the picture alone.
        noise = draw.group_noise(shape, rollout.images, group_size, "training noise", number).to(rollout.latents)
        # The matching error is that of the model's own prediction: its velocity's, times a weight.
        unit = policy.model.error_weight(sigma) ** 0.5
        noisy, target = (1 - sigma) * rollout.latents + sigma * noise, unit * (noise - rollout.latents)
        conditioning = rollout.conditioning
        if self.config.text_dropout > 0:
            groups = [n // group_size for n in rollout.images.tolist()]
            lost = {g for g in set(groups) if draw.uniform(1, "text dropout", number, g)[0] < self.config.text_dropout}
            dropped = torch.tensor([group in lost for group in groups], dtype=torch.bool, device=noisy.device)
            conditioning = conditioning.replaced(dropped, policy.unconditional)
        return _Noised(noisy, target, sigma, unit, conditioning)

    @torch.no_grad()
    def _measure_frozen(self, policy: Policy, noised: _Noised, rows: Tensor) -> _Frozen:
        """Matching errors under the reference and the old policy; forwards whose result is known are skipped."""
        config, target = self.config, noised.target[rows]
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
