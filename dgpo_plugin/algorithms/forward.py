"""What the forward-process algorithms share: finished pictures are noised anew, and a loss made of the velocity there.

They differ in the loss, in whose noise it is, in the flow times and in which copies of the adapter look beside the
policy. A member is a file that says those; here are the rollout, the noising, the old copy, and the way through an
update image by image, for a loss that needs nothing of its group (:class:`ForwardAlgorithm`). For one that does there
is :mod:`~dgpo_plugin.algorithms.forward_groups`.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from dgpo_plugin.algorithms.base import Algorithm, Backward, Cost, Metric, Random, Totals, initial_noise, log_norm
from dgpo_plugin.algorithms.flow_times import FlowTime, rounds_of
from dgpo_plugin.algorithms.rollout import Batch, Rollout, micro_batches
from dgpo_plugin.config.fields import AlgorithmConfig, OdeSampler, RunConfig, Schedule
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.models.base import Sigma, guided_passes
from dgpo_plugin.models.conditioning import Conditioning
from dgpo_plugin.models.copies import move_towards
from dgpo_plugin.samplers.ode import Velocity, sample_ode

if TYPE_CHECKING:
    from dgpo_plugin.models.policy import Policy

Half = Literal["both", "conditional", "unconditional"]
"""What of a guided velocity has a gradient: both of its passes, or that with or without the prompt."""
FLOOR = 1e-5
"""Below it no mean absolute error is divided by."""


def matching_error(predicted: Tensor, target: Tensor) -> Tensor:
    """d, (N,): mean over all but the batch axis of (target velocity - predicted velocity)^2."""
    return (target - predicted).square().flatten(1).mean(1)


def absolute_error(predicted: Tensor, target: Tensor) -> Tensor:
    """The mean over all but the batch axis of |target velocity - predicted velocity|, (N,), without gradient."""
    return (target - predicted.detach()).abs().flatten(1).mean(1)


def normalized_error(predicted: Tensor, target: Tensor, sigma: float | Tensor) -> Tensor:
    """How far off the clean picture is, divided by its own size, (N,): mean e^2 / mean |e| of e = sigma (v - target).

    The clean picture that a velocity predicts is x - sigma v, so its error is sigma times the velocity's. No gradient
    flows through the division, which is by FLOOR at least (DiffusionNFT's released code, its ``weight_factor``).
    """
    scale = (sigma * absolute_error(predicted, target)).clamp(min=FLOOR)
    return sigma**2 * matching_error(predicted, target) / scale


KL = Metric(
    "kl",
    "velocity squared",
    "Mean squared distance of the policy's velocity from the frozen base's; 0 where the loss does not look at that.",
    "Rises from its start and levels off; one that runs away leaves the base behind: hold it tighter or lower the "
    "learning rate. With a guided base the start is not 0.",
    shown="kl {:.4f}",
)


class ForwardConfig(AlgorithmConfig):
    """What every algorithm of the family is told."""

    rollout_guidance: float = Field(1.0, ge=1, description="Classifier-free guidance of the rollout; 1 is none.")


class OdeForwardConfig(ForwardConfig):
    """What those are told whose rollout is deterministic."""

    sampler: OdeSampler = Field("dpm-solver++", description="Deterministic sampler of the rollout.")

    @property
    def default_schedule(self) -> Schedule:
        """DPM-Solver++ is stable on its own scheduler's noise levels; Euler was made for the pipeline's."""
        return "dpm" if self.sampler == "dpm-solver++" else "native"


class GuidedForwardConfig(OdeForwardConfig):
    """What those are told that may have guided velocities in their loss."""

    reference_guidance: float = Field(
        1.0, ge=1, description="Classifier-free guidance of the frozen base's velocity; 1 is none."
    )
    training_guidance: float = Field(
        1.0,
        ge=1,
        description="Classifier-free guidance of the policy's and the old policy's velocity in the loss; 1 is none, as "
        "published.",
    )
    differentiated_half: Half = Field(
        "both",
        description="What of a guided velocity in the loss has a gradient: its passes with and without the prompt, or "
        "one of them.",
    )

    @property
    def base_passes(self) -> int:
        """Denoiser evaluations of the base's velocity."""
        return guided_passes(self.reference_guidance)

    @property
    def passes(self) -> int:
        """Denoiser evaluations of the policy's velocity in the loss."""
        return guided_passes(self.training_guidance)

    @property
    def differentiated_passes(self) -> int:
        """The same where it has a gradient: three for a pass that has one."""
        return 3 * self.passes if self.differentiated_half == "both" else 2 + self.passes


@dataclass(frozen=True)
class Noised:
    """This process's samples, N of them, all at one flow time or each at its own.

    Attributes:
        latents: noisy, (N, ...).
        target: the velocity to predict, times ``unit``, (N, ...).
        sigma: the flow time of all, or of each, (N,).
        level: the same as the model takes it.
        unit: the error of the model's own prediction over that of its velocity, of which the matching error is the
            square; of all, or of each, (N, 1, ...).
    """

    latents: Tensor
    target: Tensor
    sigma: float | Tensor
    level: Sigma
    unit: float | Tensor
    conditioning: Conditioning

    def predict(self, policy: Policy, rows: Tensor, guidance: float = 1.0, half: Half = "both") -> Tensor:
        """The velocity of some rows under the weights in place, times ``unit``."""
        given = self.latents[rows], _of(self.level, rows), self.conditioning[rows], guidance
        velocity = policy.velocity(*given) if half == "both" or guidance == 1 else policy.half_guided(*given, half)
        return _of(self.unit, rows) * velocity


def _of(value: float | Tensor, rows: Tensor) -> float | Tensor:
    """What some rows have of a number that all share, or of one for each."""
    return value[rows] if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Seen:
    """A micro-batch, n samples; velocities are (n, ...), times the noised samples' ``unit``.

    Attributes:
        sigma: the flow time of all, or of each, (n,).
        target: what is to be predicted.
        predicted: by the policy, with its graph.
        old: by the old copy; None where the loss does not ask for it.
        base: by the frozen base, likewise.
    """

    sigma: float | Tensor
    target: Tensor
    predicted: Tensor
    old: Tensor | None
    base: Tensor | None


F = TypeVar("F", bound=AlgorithmConfig)


class Forward(Algorithm[F, Rollout], Generic[F]):
    """A policy and its old copy, and finished pictures noised anew.

    Class attributes:
        KEEPS_OLD: whether there is an old copy.
    """

    KEEPS_OLD: ClassVar[bool] = True

    def __init__(
        self,
        config: F,
        policy: Policy,
        processes: Processes,
        micro_batch_size: int | None,
        backward: Backward = torch.autograd.backward,
    ) -> None:
        super().__init__(config, policy, processes, micro_batch_size, backward)
        self.old_weights = policy.copy_weights() if self.KEEPS_OLD else {}

    @property
    def rollout_weights(self) -> Mapping[str, Tensor] | None:
        """The copy of the adapter that the rollout comes from; None for the policy's own."""
        return None

    @property
    def group_noise(self) -> bool:
        """Whether a prompt group shares its noise; else each image has its own at every flow time."""
        return False

    @abstractmethod
    def flow_times(self, rollout: Rollout, random: Random) -> list[FlowTime]:
        """What to train on; every sample of the update as often as any other."""

    @torch.no_grad()
    def sample(self, batch: Batch, random: Random) -> Rollout:
        assert isinstance(self.config, ForwardConfig)
        policy, guidance = self.policy, self.config.rollout_guidance

        def velocity(x: Tensor, sigma: float) -> Tensor:
            return policy.velocity(x, sigma, batch.conditioning, guidance)

        noise, copy = initial_noise(policy, batch, random), self.rollout_weights
        with contextlib.nullcontext() if copy is None else policy.with_weights(copy):
            latents = self.integrate(velocity, noise, batch, random)
        return Rollout(batch.sample_ids, batch.conditioning, latents, batch.sigmas, batch.layout)

    def integrate(self, velocity: Velocity, noise: Tensor, batch: Batch, random: Random) -> Tensor:
        """Clean latents from noise, (N, ...)."""
        assert isinstance(self.config, OdeForwardConfig)
        return sample_ode(velocity, noise, batch.sigmas, self.config.sampler)

    def noised(self, rollout: Rollout, number: int, sigmas: float | Sequence[float], random: Random) -> Noised:
        """The rollout's samples at a flow time, or each at its own, by the number that their noise is drawn with."""
        ids, layout, clean = rollout.sample_ids, rollout.layout, rollout.latents
        draw = random.group_noise if self.group_noise else random.sample_noise
        noise = draw(clean.shape[1:], ids, layout, "training noise", number).to(clean)
        model = self.policy.model
        sigma: float | Tensor
        level: Sigma
        unit: float | Tensor
        # The matching error is that of the model's own prediction: its velocity's, times a weight.
        if isinstance(sigmas, float):
            sigma, level, unit = sigmas, sigmas, model.error_weight(sigmas) ** 0.5
            noisy = (1 - sigma) * clean + sigma * noise
        else:
            rows = [(own, 1 - own, model.error_weight(own) ** 0.5) for own in sigmas]
            spread = clean.new_tensor(rows).view(-1, 3, *[1] * (clean.dim() - 1))
            each, rest, unit = spread.unbind(1)
            sigma, level = each.flatten(), model.levels(sigmas)
            noisy = rest * clean + each * noise
        return Noised(noisy, unit * (noise - clean), sigma, level, unit, rollout.conditioning)

    def predict(self, noised: Noised, rows: Tensor) -> Tensor:
        """The velocity in the loss under the weights in place, guided if the configuration says so."""
        config = self.config
        if not isinstance(config, GuidedForwardConfig):
            return noised.predict(self.policy, rows)
        return noised.predict(self.policy, rows, config.training_guidance, config.differentiated_half)

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {"old": self.old_weights} if self.KEEPS_OLD else {}

    def move_old(self, keep: float) -> None:
        """Move the old copy: old <- keep old + (1 - keep) policy."""
        move_towards(self.old_weights, self.policy.parameters, keep)


class ForwardAlgorithm(Forward[F], Generic[F]):
    """One whose loss of an image needs nothing of its group but the advantage."""

    @property
    def looks_at_old(self) -> bool:
        """Whether the loss asks for the old copy's velocity."""
        return True

    @property
    def base_guidance(self) -> float | None:
        """Guidance of the frozen base's velocity in the loss; None where the loss does not look at it."""
        return 1.0

    @property
    @abstractmethod
    def trained_times(self) -> int:
        """Flow times that each sample is trained on."""

    @abstractmethod
    def losses(self, seen: Seen, advantages: Tensor) -> Tensor:
        """The losses of a micro-batch's samples, (n,), from their advantages, (n,)."""

    def gradient(self, rollout: Rollout, advantages: Tensor, random: Random) -> dict[str, float]:
        device = rollout.latents.device
        of_base = ("velocity_growth",) if self.base_guidance is not None else ()
        totals = Totals(device, "loss", "kl", *of_base)
        count = self.trained_times * advantages.numel()
        for times in rounds_of(self.flow_times(rollout, random)):
            part, sigma = of_round(rollout, times)
            own = advantages.flatten()[part.positions.to(device)]
            noised = self.noised(part, times[0].number, sigma, random)
            for rows in micro_batches(torch.arange(len(own), device=device), self.micro_batch_size):
                seen = self.look(noised, rows)
                counts = 1.0 if times[0].counts is None else times[0].counts.to(device)[rows]
                losses = (self.losses(seen, own[rows]) * counts).sum()
                totals.add("loss", losses.detach())
                if seen.base is not None:
                    growth = log_norm(seen.predicted) - log_norm(seen.base)
                    totals.add("kl", (matching_error(seen.predicted.detach(), seen.base) * counts).sum())
                    totals.add("velocity_growth", (growth * counts).sum())
                self.backward(losses / count)
        return totals.means(count, self.processes)

    def look(self, noised: Noised, rows: Tensor) -> Seen:
        """What the policy, and before it the copies that the loss asks for, make of some rows."""
        policy, old, base = self.policy, None, None
        if self.looks_at_old:
            with policy.with_weights(self.old_weights):
                old = self.predict(noised, rows)
        if self.base_guidance is not None:
            with policy.as_reference():
                base = noised.predict(policy, rows, self.base_guidance)
        return Seen(_of(noised.sigma, rows), noised.target[rows], self.predict(noised, rows), old, base)


def of_round(rollout: Rollout, times: Sequence[FlowTime]) -> tuple[Rollout, float | list[float]]:
    """A round's samples, each there once, and the flow time of all or of each."""
    if len(times) == 1:
        (time,) = times
        return (rollout if time.rows is None else rollout.select(time.rows)), time.sigma
    own: dict[int, float] = {}
    for time in times:
        assert time.rows is not None
        assert time.counts is None
        own.update(dict.fromkeys(time.rows.tolist(), time.sigma))
    rows = sorted(own)
    part = rollout if len(rows) == len(rollout.sample_ids) else rollout.select(torch.tensor(rows, dtype=torch.int64))
    return part, [own[row] for row in rows]


def forward_cost(config: RunConfig, times: int, passes: int, copies: int = 1, *, sampling: int | None = None) -> Cost:
    """The cost of a forward-process algorithm.

    Args:
        times: flow times that a sample is trained on.
        passes: denoiser evaluations at each, the differentiated pass (3) included.
        copies: of the adapter, besides the policy.
        sampling: evaluations of a sample in the rollout; None for a step's one, or two with guidance.
    """
    algorithm = config.algorithm
    assert isinstance(algorithm, ForwardConfig)
    in_loss, epochs = 1.0, config.training.inner_epochs
    if isinstance(algorithm, GuidedForwardConfig) and algorithm.differentiated_half == "both":
        in_loss = algorithm.training_guidance
    return Cost(
        sampling=config.rollout.steps * guided_passes(algorithm.rollout_guidance) if sampling is None else sampling,
        training=epochs * times * passes,
        trained_steps=epochs * times,
        adapter_copies=copies,
        latents=4,  # clean, noise, noisy, target
        rollout_guidance=algorithm.rollout_guidance,
        training_guidance=in_loss,
    )
