"""GARDO (arXiv 2512.24138) on Flow-GRPO: what holds the policy back is gated, moves along, and variety is paid for.

Three things against reward hacking. The KL term counts for the samples alone of which the reward that is trained on and
others that are not think most differently. It pulls towards a copy of the policy that is renewed, not to the base. And
what is good and unlike the other pictures of its prompt counts for more.

It follows the authors' code, in their repository and in Flow-GRPO's (``train_sd3_gardo.py``); the paper's equations
have not been seen:
1. ``gated: behind`` is the code's: those samples are held that the trained reward ranks *behind* the others' ranks.
   What its descriptions speak of, a reward that is believed too much, is ``ahead``.
2. Rewards of weight 0 are the others; the code names an aesthetic score and ImageReward.
3. Equal rewards share a mean rank; the code ranks them by chance.
4. Which KL terms count is decided once for an iteration, and their mean is over those of an update; there over those of
   a micro-batch.
5. Pictures' features are the class token of transformers' DINOv3; the code takes what timm's model gives. In a group of
   equal pictures nothing is unlike: the code divides 0 by 0.
6. The copy is renewed at an iteration's end; the code does it after the next rollout, of the same policy.
7. All but the last step are trained; the code's fraction of .89 leaves out two of ten.
Everything else is Flow-GRPO's, its deviations included; advantages are divided by no spread, as in the code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from dgpo_plugin.algorithms.advantages import LIMIT
from dgpo_plugin.algorithms.base import GROWTH, Cost, Judged, Metric, Random
from dgpo_plugin.algorithms.flow_grpo import FlowSDEConfig, FlowSDESteps
from dgpo_plugin.algorithms.trajectories import KLWeight, Trajectories, TrajectoryRollout
from dgpo_plugin.config.fields import AdvantageStd, RewardTerm, RunConfig
from dgpo_plugin.models.copies import move_towards

FIRST_SHARE, LEAST_SHARE, LARGEST_SHARE, SHARE_STEP = 0.1, 0.02, 0.2, 0.1
"""Of the samples that could be held: how many are at first, the bounds of that, and by what share of it it moves."""
REMEMBERED = 20
"""Iterations whose mean uncertainty the next one's is compared with."""


def distinctness(features: Tensor) -> Tensor:
    """How unlike its nearest one in the group each picture is, 1 - cosine in [0, 2], (P, G), of features (P, G, D)."""
    unit = normalize(features, dim=2)
    distance = 1 - (unit @ unit.transpose(1, 2)).clamp(-1, 1)
    own = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
    return distance.masked_fill(own, math.inf).amin(2)


def varied(advantages: Tensor, distinct: Tensor) -> Tensor:
    """Advantages (P, G), those that are not below 0 times their picture's distinctness over its group's mean."""
    mean = distinct.mean(1, keepdim=True)
    factor = torch.where(mean > 0, distinct / mean, torch.ones_like(distinct))
    return torch.where(advantages < 0, advantages, advantages * factor)


def ranks(values: Tensor) -> Tensor:
    """Ranks (N,) of values (N,), 1 for the highest; equal ones share their mean rank."""
    above = (values[None, :] > values[:, None]).sum(1)
    equal = (values[None, :] == values[:, None]).sum(1)
    return above + (equal + 1) / 2


def uncertainty(trained: Tensor, others: Tensor) -> Tensor:
    """Rank by the trained reward (N,) less the mean rank by the others (N, K), (N,): above 0 where it lags behind."""
    return ranks(trained).double() - torch.stack([ranks(each).double() for each in others.unbind(1)]).mean(0)


def held(uncertain: Tensor, share: float) -> Tensor:
    """Which samples are held back, boolean, (N,): of those not below 0 the share that is most uncertain."""
    candidates = uncertain[uncertain >= 0]
    if not len(candidates):
        return torch.zeros_like(uncertain, dtype=torch.bool)
    return uncertain > torch.quantile(candidates, 1 - share)


def next_share(share: float, mean: float, remembered: Tensor) -> float:
    """The share to hold back, by how an iteration's mean uncertainty compares with those remembered.

    Args:
        remembered: those of the last iterations; below 0 where there is none.
    """
    known = remembered[remembered >= 0]
    if not len(known):
        return FIRST_SHARE
    if mean > float(known.max()):
        share *= 1 + SHARE_STEP
    elif mean < float(known.min()):
        share *= 1 - SHARE_STEP
    return min(max(share, LEAST_SHARE), LARGEST_SHARE)


class FlowGRPOGardoConfig(FlowSDEConfig):
    """GARDO on Flow-GRPO: a gated KL term, whose reference moves, and advantages that pay for variety."""

    name: Literal["flow-grpo-gardo"] = "flow-grpo-gardo"
    kl_weight: KLWeight = 0.07
    gated: Literal["behind", "ahead"] = Field(
        "behind",
        description="Which samples the KL term is for: those that the trained reward ranks behind what the rewards of "
        "weight 0 think of them, as in the released code, or ahead of it, as the method is described.",
    )
    renew_after: int = Field(15, ge=1, description="Iterations after which the reference becomes the policy.")
    renew_above: float = Field(
        3e-4, gt=0, description="KL divergence of an update from which it does so at the iteration's end; by the task."
    )
    features: str | None = Field(
        "facebook/dinov3-vitl16-pretrain-lvd1689m",
        description="DINOv2 or DINOv3 of transformers, a hub id or a folder, by which pictures are told apart; null to "
        "pay nothing for variety.",
    )
    advantage_std: AdvantageStd = "none"

    @property
    def picture_network(self) -> str | None:
        return self.features

    def check_rewards(self, rewards: dict[str, RewardTerm]) -> None:
        weights = [term.weight for term in rewards.values()]
        if not any(weights):
            raise ValueError("rewards have no weight but 0; nothing would be trained on")
        if self.kl_weight > 0 and all(weights):
            raise ValueError(
                f"rewards are all trained on: {self.name} compares them with others, so give one the weight 0, or set "
                f"algorithm.kl_weight=0"
            )


class FlowGRPOGardo(FlowSDESteps[FlowGRPOGardoConfig]):
    """Every step is a Flow-SDE step; the gate is decided with the advantages."""

    Config = FlowGRPOGardoConfig
    KL_TO_BASE = False
    METRICS = (
        *(metric for metric in Trajectories.METRICS if metric is not GROWTH and metric.key != "kl"),
        Metric(
            "kl",
            "nats",
            "Mean over the samples that are held back, and dims, of (mean - mean of the reference)^2 / (2 sd^2), "
            "before kl_weight; 0 where none is.",
            "Rises from 0 after each renewal of the reference.",
            shown="kl {:.4f}",
        ),
        Metric(
            "held",
            "share, 0 to 1",
            "Samples whose KL term counts, of those that are trained on; mean over the updates.",
            "About half of held_share.",
            shown="held {:5.1%}",
        ),
        Metric(
            "held_share",
            "share, 0 to 1",
            "The share of the samples on the gated side that is held back; it grows while the rewards disagree more "
            f"than in the last {REMEMBERED} iterations, and falls while they do less.",
            f"Between {LEAST_SHARE} and {LARGEST_SHARE}.",
        ),
        Metric(
            "reference_age",
            "iterations",
            "Since the reference was the policy.",
            "Never above algorithm.renew_after.",
        ),
        Metric(
            "features_seconds",
            "seconds",
            "Seeing what the pictures show, of the first process alone; absent where algorithm.features is null.",
            "Steady.",
            optional=True,
        ),
    )

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.reference_weights = self.policy.copy_weights()
        self._remembered = torch.full((REMEMBERED,), -1.0, dtype=torch.float64)
        self._share = torch.tensor(FIRST_SHARE, dtype=torch.float64)
        self._renewed = torch.tensor(0)
        self._due = torch.tensor(False)
        self._held: Tensor | None = None
        self._pull = torch.zeros(0)

    @classmethod
    def cost(cls, config: RunConfig) -> Cost:
        return replace(super().cost(config), adapter_copies=1)

    def advantages(self, judged: Judged) -> Tensor:
        advantages = super().advantages(judged)
        if judged.features is not None:
            advantages = varied(advantages, distinctness(judged.features)).clamp(-LIMIT, LIMIT)
        if self.config.kl_weight > 0:
            self._held = self._gate(judged).view(advantages.shape)
        return advantages

    def _gate(self, judged: Judged) -> Tensor:
        """Which of an iteration's samples are held back, (P G,), on the CPU; the share follows their uncertainty."""
        scores, weights = judged.scores.flatten(0, 1).double().cpu(), judged.weights.double().cpu()
        scored, trained = ~scores.isnan().any(1), weights != 0
        if trained.all():  # rewards of a caller's own, which no configuration has looked at
            return torch.ones_like(scored)
        known = scores[scored]
        found = uncertainty(known[:, trained] @ weights[trained], known[:, ~trained])
        if self.config.gated == "ahead":
            found = -found
        gate = torch.zeros(len(scores), dtype=torch.bool)
        candidates = found[found >= 0]
        if len(candidates):
            mean = candidates.mean()
            self._share.fill_(next_share(float(self._share), float(mean), self._remembered))
            self._remembered.copy_(torch.cat([self._remembered[1:], mean[None]]))
            gate[scored] = held(found, float(self._share))
        return gate

    def gradient(self, rollout: TrajectoryRollout, advantages: Tensor, random: Random) -> dict[str, float]:
        moving = advantages.flatten().cpu() != 0
        gate = torch.ones_like(moving)
        if self._held is not None:
            gate = self._held[rollout.first_group : rollout.first_group + len(advantages)].flatten()
        pulled = gate & moving
        among, count = max(1, int(moving.sum())), int(pulled.sum())
        # The update's mean is over all that move: so this one's is over those that are held.
        self._pull = (pulled * (among / max(1, count)))[rollout.positions].to(rollout.latents)
        logged = super().gradient(rollout, advantages, random)
        if logged["kl"] > self.config.renew_above:
            self._due.fill_(True)
        return {
            **logged,
            "held": count / among,
            "held_share": float(self._share),
            "reference_age": float(random.iteration - int(self._renewed)),
        }

    @contextmanager
    def _reference(self) -> Iterator[None]:
        with self.policy.with_weights(self.reference_weights):
            yield

    def _pulls(self, rows: Tensor) -> Tensor:
        return self._pull[rows]

    def after_iteration(self, iteration: int, steps: int) -> None:
        """Have the reference become the policy, where it is due or old."""
        if bool(self._due) or iteration + 1 - int(self._renewed) > self.config.renew_after:
            move_towards(self.reference_weights, self.policy.parameters, 0)
            self._renewed.fill_(iteration + 1)
            self._due.fill_(False)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The reference, and what the gate goes by."""
        gate = {"remembered": self._remembered, "share": self._share, "renewed": self._renewed, "due": self._due}
        return {"reference": self.reference_weights, "gate": gate}
