"""Diffusion-DPO (arXiv 2311.12908): of each pair the chosen picture becomes likelier than the rejected one.

For flows it is Flow-DPO (arXiv 2501.13918) with a beta that does not depend on the time: with d the mean squared error
of the velocity and d_ref that of the frozen base, on the same noise and at the same flow time for both pictures, w
(chosen) and l (rejected),

    L = -log sigmoid( -(beta / 2) [ (d_w - d_w_ref) - (d_l - d_l_ref) ] ).

``diffusion-dpo`` learns from pairs that are there; ``online-dpo`` makes them, the best against the worst of each prompt
group that it samples. beta says how near the base holds the policy: the loss levels off where the bracket is some
multiples of 1 / beta. It is 100 in flow_grpo's setting for SD3.5 and 2000 in Flow-Factory's for FLUX.1, both before the
same mean over dims, so one has to be chosen.

It follows released code (flow_grpo's scripts/train_sd3_dpo.py as copies have it, Flow-Factory's offline_dpo.py), which
is not the paper's text:
1. beta stands before a mean over dims; the paper's equation 14 has T omega(lambda_t) before a sum.
2. The flow time is logit-normal among the base's shifted training levels, one for each pair; the paper's is uniform
   (``times: uniform``), as fits bases that predict noise, whose own error is then taken.
And it differs from that code:
3. A pair's pictures are resized to the base's size and cropped in the middle; nothing is mirrored at random.
4. A picture's latents are the mean of what the VAE thinks of it, there a draw.
5. Accuracy counts a pair that is ranked neither right nor wrong as half: it begins at .5, there at 0.
6. With ``online-dpo`` a prompt group of equal rewards has no pair; the loss is a mean over the pairs that there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from dgpo_plugin.algorithms.base import GROWTH, Cost, Metric, Random, Totals, log_norm
from dgpo_plugin.algorithms.flow_times import FlowTime, drawn_levels, rounds_of
from dgpo_plugin.algorithms.forward import Noised, OdeForwardConfig, matching_error
from dgpo_plugin.algorithms.forward_groups import GROUP_PASS, GroupAlgorithm, needs_group_pass
from dgpo_plugin.algorithms.rollout import Batch, Layout, Rollout, micro_batches
from dgpo_plugin.config.fields import AlgorithmConfig, RunConfig
from dgpo_plugin.config.learned_from import PAIR, PREFERRED, Need
from dgpo_plugin.models.base import guided_passes

CHOSEN, REJECTED = 1.0, -1.0
MEASURED_TIMES = 4
"""Flow times that each held-out pair is measured at."""


def preference_score(error: Tensor, reference_error: Tensor, signs: Tensor, beta: float) -> Tensor:
    """S = (beta / 2) sum over the group of A (d - d_ref), (P,): below 0 where the chosen picture became likelier.

    Args:
        error, reference_error: d and d_ref, (P, G).
        signs: A, 1 for the chosen picture, -1 for the rejected one, 0 for others, (P, G).
    """
    return beta / 2 * (signs * (error - reference_error)).sum(1)


def diffusion_dpo_loss(score: Tensor) -> Tensor:
    """-log sigmoid(-S) of each pair, (P,); its slope in S is sigmoid(S)."""
    return -logsigmoid(-score)


def ranked_right(score: Tensor) -> Tensor:
    """1 for a pair whose chosen picture became likelier than the rejected one, 0 for the contrary, else 1/2, (P,)."""
    return (1 - torch.sign(score)) / 2


def best_and_worst(advantages: Tensor) -> Tensor:
    """1 for each group's best picture, -1 for its worst, 0 for the rest and in groups without a best, (P, G)."""
    best, worst = advantages.argmax(1, keepdim=True), advantages.argmin(1, keepdim=True)
    signs = torch.zeros_like(advantages).scatter_(1, best, CHOSEN).scatter_(1, worst, REJECTED)
    return signs.masked_fill(best == worst, 0.0)


def pair_signs(pairs: int, device: torch.device) -> Tensor:
    """The signs of pairs, chosen first, (pairs, 2)."""
    return torch.tensor([CHOSEN, REJECTED], device=device).expand(pairs, PAIR)


class _Shared(AlgorithmConfig):
    beta: float = Field(
        gt=0,
        description="How near the base holds the policy, the larger, the nearer: 100 in flow_grpo's setting for SD3.5, "
        "2000 in Flow-Factory's for FLUX.1. Both are published, so there is no default.",
    )
    timesteps: int = Field(1, ge=1, description="Flow times that each pair is trained on in an iteration.")
    times: Literal["logit-normal", "uniform"] = Field(
        "logit-normal",
        description="How they are drawn from the base's thousand training levels; uniform is the paper's, for bases "
        "that predict noise.",
    )


class DiffusionDPOConfig(_Shared):
    """Diffusion-DPO on preferred pairs; but for beta the defaults are those of released code for flows."""

    needs: ClassVar[frozenset[Need]] = PREFERRED

    name: Literal["diffusion-dpo"] = "diffusion-dpo"


class OnlineDPOConfig(_Shared, OdeForwardConfig):
    """Diffusion-DPO on pairs of its own: the best and the worst picture of each prompt group."""

    name: Literal["online-dpo"] = "online-dpo"


@dataclass(frozen=True)
class _Reference:
    """What is measured of a micro-batch under the frozen base, both (n,)."""

    error: Tensor
    log_norm: Tensor


ACCURACY = "preference_accuracy"
SHARED_METRICS = (
    Metric(
        "loss",
        "1",
        "Mean over pairs and flow times of -log sigmoid(-S), S = (beta/2) [(d_w - d_w_ref) - (d_l - d_l_ref)].",
        "Begins at log 2 = .693 and falls slowly; far below .5 on few pairs it learns them by heart.",
    ),
    Metric(
        ACCURACY,
        "share, 0 to 1",
        "Pairs whose chosen picture the policy finds likelier than the base does, compared with the rejected one: S "
        "below 0; half for S = 0.",
        ".5 at the start, then above it; single iterations scatter with their few pairs.",
        shown="accuracy {:5.1%}",
    ),
    Metric(
        "preference_margin",
        "1",
        "Mean of -S over pairs and flow times, the implicit reward's lead of the chosen picture.",
        "0 at the start, then rising. Together with a rising velocity_growth it may rise by making the rejected "
        "pictures unlikely, and the chosen ones with them.",
    ),
    GROUP_PASS,
    GROWTH,
)
HELD_OUT_METRICS = (
    Metric(
        "held_out_accuracy",
        "share, 0 to 1",
        f"As {ACCURACY}, of the averaged weights on the held-out pairs, each at {MEASURED_TIMES} flow times that stay "
        "the same, by its mean S; with each grid of sample pictures and at the end.",
        "Rises with the accuracy in training, to less. Falling while that rises is learning by heart: stop earlier, or "
        "find more pairs.",
        optional=True,
    ),
    Metric(
        "held_out_margin",
        "1",
        "As preference_margin, likewise.",
        "Rises with held_out_accuracy.",
        optional=True,
    ),
)


class _PairAlgorithm(GroupAlgorithm[_Shared, _Reference]):
    """What is done with pairs, wherever they are from: a group's signs stand where others have advantages."""

    KEEPS_OLD = False
    SUMMARY = 2
    config: _Shared

    @property
    def group_noise(self) -> bool:
        """Both pictures of a pair have the same noise."""
        return True

    def flow_times(self, rollout: Rollout, random: Random) -> list[FlowTime]:
        return self._times(rollout, self.config.timesteps, random)

    def _times(self, rollout: Rollout, count: int, random: Random) -> list[FlowTime]:
        levels, logit_normal = self.policy.model.training_sigmas(), self.config.times == "logit-normal"
        return drawn_levels(levels, rollout.layout, rollout.sample_ids, count, random, logit_normal=logit_normal)

    def trained_images(self, advantages: Tensor) -> int:
        return max(PAIR, int((advantages != 0).sum()))

    def keeps(self, advantages: Tensor) -> list[bool]:
        return [True] * len(advantages) if self.processes.lockstep else (advantages != 0).any(1).tolist()

    def totals(self, device: torch.device) -> Totals:
        return Totals(device, "loss", ACCURACY, "preference_margin", "velocity_growth")

    @torch.no_grad()
    def frozen(self, noised: Noised, rows: Tensor) -> _Reference:
        with self.policy.as_reference():
            velocity = noised.predict(self.policy, rows)
        return _Reference(matching_error(velocity, noised.target[rows]), log_norm(velocity))

    def summary(self, predicted: Tensor, target: Tensor, frozen: _Reference) -> Tensor:
        return torch.stack([matching_error(predicted, target), frozen.error], dim=1)

    def group_number(self, summary: Tensor, advantages: Tensor) -> Tensor:
        error, reference = summary
        return preference_score(error, reference, advantages, self.config.beta)

    def loss(
        self,
        predicted: Tensor,
        target: Tensor,
        frozen: _Reference,
        numbers: Tensor,
        advantages: Tensor,
        totals: Totals,
    ) -> Tensor:
        counts = advantages.abs()  # of both pictures of a pair; the total is over as many
        totals.add("loss", (counts * diffusion_dpo_loss(numbers)).sum())
        totals.add(ACCURACY, (counts * ranked_right(numbers)).sum())
        totals.add("preference_margin", -(counts * numbers).sum())
        totals.add("velocity_growth", (counts * (log_norm(predicted) - frozen.log_norm)).sum())
        # Half of beta before each picture's error; twice that, for a mean over pictures is over twice as many as pairs.
        slopes = self.config.beta * torch.sigmoid(numbers) * advantages
        return (slopes * matching_error(predicted, target)).sum()


class DiffusionDPO(_PairAlgorithm):
    """Preferred pairs in the place of a rollout: a prompt group is a pair, the chosen picture first."""

    Config = DiffusionDPOConfig
    METRICS = (*SHARED_METRICS, *HELD_OUT_METRICS)

    @staticmethod
    def cost(config: RunConfig) -> Cost:
        algorithm = config.algorithm
        assert isinstance(algorithm, DiffusionDPOConfig)
        return Cost(
            sampling=0,
            training=config.training.inner_epochs * algorithm.timesteps * (4 + needs_group_pass(config)),
            trained_steps=config.training.inner_epochs * algorithm.timesteps,
            adapter_copies=0,
            latents=4,  # clean, noise, noisy, target
            rollout_guidance=1.0,
            training_guidance=1.0,
        )

    def sample(self, batch: Batch, random: Random) -> Rollout:
        raise AssertionError("it learns from pairs")

    @torch.no_grad()
    def scores(self, rollout: Rollout, random: Random) -> Tensor:
        """The mean of S over some flow times of each pair, (P,), of all processes, under the weights in place."""
        device = rollout.latents.device
        signs, positions = pair_signs(rollout.layout.groups, device), rollout.positions.to(device)
        batches = micro_batches(torch.arange(len(positions), device=device), self.micro_batch_size)
        total = torch.zeros(len(signs), device=device)
        rounds = rounds_of(self._times(rollout, MEASURED_TIMES, random))
        for times in rounds:
            noised = self.noised_round(rollout, times, random)
            frozen = [self.frozen(noised, rows) for rows in batches]
            total += self._group_numbers(noised, batches, frozen, None, positions, signs)
        return total / len(rounds)


class OnlineDPO(_PairAlgorithm):
    """The best and the worst picture of each prompt group that was sampled are a pair."""

    Config = OnlineDPOConfig
    METRICS = SHARED_METRICS

    @staticmethod
    def cost(config: RunConfig) -> Cost:
        algorithm = config.algorithm
        assert isinstance(algorithm, OnlineDPOConfig)
        # Of each group two are trained on; rounded up where they are not whole evaluations for each.
        times, size = config.training.inner_epochs * algorithm.timesteps, config.training.group_size
        guided = guided_passes(algorithm.rollout_guidance)
        return Cost(
            sampling=config.rollout.steps * guided,
            training=-(-times * 4 * PAIR // size),
            trained_steps=times,
            adapter_copies=0,
            latents=4,  # clean, noise, noisy, target
            rollout_guidance=algorithm.rollout_guidance,
            training_guidance=1.0,
        )

    def gradient(self, rollout: Rollout, advantages: Tensor, random: Random) -> dict[str, float]:
        signs = best_and_worst(advantages)
        if not self.processes.lockstep:  # else all go along, so that every process runs the base equally often
            rollout, signs = pairs_of(rollout, signs)
        return super().gradient(rollout, signs, random)


def pairs_of(rollout: Rollout, signs: Tensor) -> tuple[Rollout, Tensor]:
    """The pictures of a rollout that are of pairs, and the signs of these alone, (P, 2), 0 in groups without a pair.

    Args:
        rollout: this process's samples of an update.
        signs: of all processes', (P, G).
    """
    group_size = signs.shape[1]
    flat = signs.flatten().tolist()
    rows, ids = [], []
    for row, position in enumerate(rollout.positions.tolist()):
        if flat[position]:
            rows.append(row)
            group = rollout.first_group + position // group_size
            ids.append(PAIR * group + (flat[position] == REJECTED))
    order = sorted(range(len(ids)), key=lambda at: ids[at])
    kept = rollout.select(torch.tensor([rows[at] for at in order], dtype=torch.int64))
    pairs = Rollout(
        sample_ids=torch.tensor([ids[at] for at in order], dtype=torch.int64),
        conditioning=kept.conditioning,
        latents=kept.latents,
        sigmas=rollout.sigmas,
        layout=Layout(rollout.layout.groups, PAIR),
        first_group=rollout.first_group,
        first_update=rollout.first_update,
    )
    has_pair = (signs != 0).any(1, keepdim=True)
    return pairs, pair_signs(len(signs), signs.device).to(signs.dtype) * has_pair
