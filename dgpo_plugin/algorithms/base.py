"""What an algorithm is: a configuration, how it samples, how it makes a gradient of advantages, and what that costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor

from dgpo_plugin.algorithms.advantages import aggregate
from dgpo_plugin.algorithms.rollout import Batch, Layout, Rollout
from dgpo_plugin.common.seeding import derive_seed, seeded_noise
from dgpo_plugin.config.fields import AlgorithmConfig, RunConfig
from dgpo_plugin.distributed.processes import Processes

if TYPE_CHECKING:
    from dgpo_plugin.models.policy import Policy

Backward = Callable[[Tensor], None]
"""Differentiates a loss; accelerate's, so that it may scale it."""


@dataclass(frozen=True)
class Metric:
    """A key of ``metrics.jsonl``.

    Attributes:
        key: as in the record; ``reward/NAME`` stands for one key for each of several rewards.
        unit: what it counts or is measured in; ``1`` for a ratio, a share or what has no unit.
        how: how it is computed.
        healthy: what a run that learns shows.
        optional: whether an iteration may lack it.
        shown: how an iteration's line on the terminal shows it, as in ``kl {:.4f}``; empty for not at all.
    """

    key: str
    unit: str
    how: str
    healthy: str
    optional: bool = False
    shown: str = ""


@dataclass(frozen=True)
class Cost:
    """What an iteration of an algorithm takes, with every optional pass and none that is skipped.

    Attributes:
        sampling: denoiser evaluations for each sample of the rollout.
        training: denoiser evaluations for each sample in the updates; a forward counts 1, a backward 2, and one that
            the rollout has done already nothing.
        trained_steps: flow times or sampler steps that a sample is trained on, in all inner epochs.
        adapter_copies: copies of the adapter's weights that it keeps, besides the policy.
        latents: tensors of a sample's latents' size that it keeps for each sample.
        rollout_guidance: classifier-free guidance of the rollout's passes; 1 is none.
        training_guidance: likewise of the passes that are differentiated.
        kept_graphs: differentiated passes of a sample whose graphs are kept from its rollout.
    """

    sampling: int
    training: int
    trained_steps: int
    adapter_copies: int
    latents: int
    rollout_guidance: float
    training_guidance: float
    kept_graphs: int = 0


@dataclass(frozen=True)
class Judged:
    """What an iteration's pictures were found to be, of all processes' samples.

    Attributes:
        scores: by every reward, (P, G, K); NaN where a reward has skipped a picture.
        weights: of the rewards, (K,).
        how: whether their weighted sum is normalized, or each of them (``scoring.aggregate``).
        features: of the pictures, (P, G, D), where the configuration names a ``picture_network``; else None.
    """

    scores: Tensor
    weights: Tensor
    how: Literal["rewards", "advantages"]
    features: Tensor | None = None


@dataclass(frozen=True)
class Random:
    """Where the randomness of one iteration comes from (docs/architecture.md, section 5).

    Attributes:
        epoch: how often its samples were gone through before; each time has draws of its own.
    """

    seed: int
    iteration: int
    epoch: int = 0

    def noise(self, shape: Sequence[int], *purpose: int | str) -> Tensor:
        """Standard normal, of the shape, for one purpose."""
        return seeded_noise(shape, *self._from(*purpose))

    def sample_noise(self, shape: Sequence[int], sample_ids: Tensor, layout: Layout, *purpose: int | str) -> Tensor:
        """Standard normal noise, (N, ...), one draw for each sample."""
        drawn = [self.noise(shape, *purpose, *index) for index in layout.indices_of(sample_ids)]
        # A process may have no sample of a small update.
        return torch.stack(drawn) if drawn else torch.zeros(0, *shape)

    def group_noise(self, shape: Sequence[int], sample_ids: Tensor, layout: Layout, *purpose: int | str) -> Tensor:
        """Standard normal noise, (N, ...), one draw for each prompt group, the same for all its samples."""
        groups = layout.groups_of(sample_ids).tolist()
        drawn = {group: self.noise(shape, *purpose, group) for group in sorted(set(groups))}
        # A process may have no sample of a small update.
        return torch.stack([drawn[group] for group in groups]) if groups else torch.zeros(0, *shape)

    def choose(self, count: int, among: int, *purpose: int | str) -> list[int]:
        """``count`` of ``range(among)`` without replacement, in rising order."""
        return sorted(torch.randperm(among, generator=self._generator(*purpose))[:count].tolist())

    def uniform(self, count: int, *purpose: int | str) -> list[float]:
        """``count`` numbers in [0, 1)."""
        drawn: list[float] = torch.rand(count, generator=self._generator(*purpose), dtype=torch.float64).tolist()
        return drawn

    def _generator(self, *purpose: int | str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(*self._from(*purpose)))

    def _from(self, *purpose: int | str) -> tuple[int | str, ...]:
        """What a seed is derived from."""
        again = ("epoch", self.epoch) if self.epoch else ()
        return (self.seed, self.iteration, *again, *purpose)


C = TypeVar("C", bound=AlgorithmConfig)
R = TypeVar("R", bound=Rollout)


class Algorithm(ABC, Generic[C, R]):
    """How to sample, and how to turn advantages into gradients. State lives in the algorithm's own copies.

    Class attributes:
        Config: what ``algorithm:`` in a configuration becomes.
        METRICS: what :meth:`gradient` returns.

    Args:
        backward: differentiates a loss, which adds to the policy's gradients.
        micro_batch_size: samples through the denoiser at once; None for all. It never changes the result.
    """

    Config: ClassVar[type[AlgorithmConfig]]
    METRICS: ClassVar[tuple[Metric, ...]] = ()

    def __init__(
        self,
        config: C,
        policy: Policy,
        processes: Processes,
        micro_batch_size: int | None,
        backward: Backward = torch.autograd.backward,
    ) -> None:
        self.config = config
        self.policy = policy
        self.processes = processes
        self.micro_batch_size = micro_batch_size
        self.backward = backward

    @staticmethod
    @abstractmethod
    def cost(config: RunConfig) -> Cost:
        """What an iteration of a run takes, whose ``algorithm`` is a :attr:`Config`."""

    @abstractmethod
    def sample(self, batch: Batch, random: Random) -> R:
        """A micro-batch's samples, without gradient."""

    def advantages(self, judged: Judged) -> Tensor:
        """Advantages (P, G) of an iteration's pictures; called once before its updates, by all processes alike."""
        return aggregate(judged.scores, judged.weights, self.config.advantage_std, judged.how)

    @abstractmethod
    def gradient(self, rollout: R, advantages: Tensor, random: Random) -> dict[str, float]:
        """Add this process's share of one optimizer step's gradient to the policy's.

        Args:
            rollout: this process's samples of one update.
            advantages: (P, G) of that update, of all processes' samples.

        Returns:
            What to log, by the keys of :attr:`METRICS`.
        """

    def after_step(self, step: int) -> None:
        """Take notice of optimizer step ``step`` (from 0)."""

    def after_iteration(self, iteration: int, steps: int) -> None:
        """Take notice of an iteration's end.

        Args:
            iteration: its number, from 0.
            steps: optimizer steps done by then.
        """

    def state(self) -> Mapping[str, dict[str, Tensor]]:
        """Copies of the adapter, and whatever else to checkpoint, by name; they are restored in place."""
        return {}

    def resume(self, steps: int) -> None:
        """Take notice that ``state`` was restored to what it was after ``steps`` optimizer steps."""


def initial_noise(policy: Policy, batch: Batch, random: Random) -> Tensor:
    """The samples' noise at the first sigma, (N, ...)."""
    noise = random.sample_noise(policy.model.latent_shape, batch.sample_ids, batch.layout, "initial noise")
    return noise.to(policy.device) * policy.model.initial_scale(batch.sigmas[0])


def log_norm(velocity: Tensor) -> Tensor:
    """The log of the norm over all but the batch axis, (N,), without gradient."""
    norm: Tensor = torch.linalg.vector_norm(velocity.detach().flatten(1), dim=1)
    return norm.log()


GROWTH = Metric(
    "velocity_growth",
    "1",
    "Mean log of the norm of the policy's velocity over that of the frozen base's on the same noisy latents, where "
    "the loss looks at the base (at its guidance, if it has one of its own); absent where it does not.",
    "Near 0. A steady rise is a model that overshoots: contrast and brightness rise with it at equal reward.",
    optional=True,
)


class Totals:
    """Sums added up where the numbers are; reading one for each micro-batch would wait for the device each time."""

    def __init__(self, device: torch.device, *names: str) -> None:
        self._sums = {name: torch.zeros((), device=device) for name in names}

    def add(self, name: str, value: Tensor) -> None:
        """Add a scalar."""
        self._sums[name] += value

    def means(self, count: int, processes: Processes) -> dict[str, float]:
        """What all processes' sums come to, over ``count``; the one time that they are read."""
        summed = processes.sum(torch.stack(list(self._sums.values())))
        return dict(zip(self._sums, (summed / count).tolist(), strict=True))
