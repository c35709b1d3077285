"""Every key of ``metrics.jsonl``: unit, computation, what a healthy run shows; docs/metrics.md is made of it.

A line of that file is one iteration, over all processes together where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DGPO = ("dgpo",)
FLOW_GRPO = ("flow-grpo", "flow-grpo-fast")
OWN_PROCESS = "of the first process alone"


@dataclass(frozen=True)
class Metric:
    """One key of a record.

    Attributes:
        key: as in the record; ``reward/NAME`` stands for one key for each of several rewards.
        unit: what it counts or is measured in; ``1`` for a ratio, a share or what has no unit.
        how: how it is computed.
        healthy: what a run that learns shows.
        algorithms: those that write it; empty for all.
        optional: whether an iteration may lack it.
    """

    key: str
    unit: str
    how: str
    healthy: str
    algorithms: tuple[str, ...] = ()
    optional: bool = False


METRICS: tuple[Metric, ...] = (
    Metric(
        "iteration",
        "count",
        "Iterations done, this one included.",
        "Rises by one from line to line, over resumed runs too.",
    ),
    Metric(
        "optimizer_steps",
        "count",
        "Optimizer steps done. An update whose gradient is nothing at all, or in fp16 not finite, is no step.",
        "Rises by training.updates_per_iteration; where it stands still, every group's rewards were equal.",
    ),
    Metric(
        "reward",
        "the reward's",
        "Mean over the iteration's images; of several rewards, their weighted sum.",
        "Rises over tens of iterations; from one to the next it scatters with the prompts that were drawn. Training "
        "rewards alone prove nothing: compare held-out prompts, and other rewards.",
    ),
    Metric(
        "reward_group_std",
        "the reward's",
        "Standard deviation inside a prompt group (without Bessel's correction), mean over the groups.",
        "Well above 0: it is all that is learned from. It may fall late, when most pictures are right.",
    ),
    Metric(
        "constant_groups",
        "share, 0 to 1",
        "Prompt groups whose images all have the same reward, from which nothing is learned.",
        "Low. Near 1 at the start: the task is too hard, or too easy, for this base; at 1 a line on the screen says "
        "so.",
    ),
    Metric("reward/NAME", "that reward's", "As reward, for each of several rewards by itself.", "As reward.", (), True),
    Metric(
        "reward_group_std/NAME",
        "that reward's",
        "As reward_group_std, of one reward.",
        "As reward_group_std.",
        (),
        True,
    ),
    Metric(
        "constant_groups/NAME", "share, 0 to 1", "As constant_groups, of one reward.", "As constant_groups.", (), True
    ),
    Metric(
        "loss",
        "1",
        "DGPO: mean over images and timesteps of w A d + kl_weight kl. Flow-GRPO: the same of its clipped policy loss. "
        "Mean over the iteration's updates.",
        "Near 0 and without a trend: advantages have mean 0 in each group, and what is learned from is its gradient.",
    ),
    Metric(
        "kl",
        "DGPO: velocity squared; Flow-GRPO: nats",
        "Distance from the frozen base, before kl_weight: DGPO's mean squared distance of the velocities; Flow-GRPO's "
        "mean over dims of (mean - mean of the base)^2 / (2 sd^2). 0 where kl_weight is 0.",
        "Rises from its start and levels off; one that runs away leaves the base behind: raise kl_weight or lower the "
        "learning rate. With algorithm.reference_guidance the start is not 0.",
    ),
    Metric(
        "clip_fraction",
        "share, 0 to 1",
        "DGPO: images and timesteps outside the trust region around the old policy, which give no gradient. Flow-GRPO: "
        "images and steps whose probability ratio is further than clip from 1.",
        "Low. In DGPO 0 while the old policy is the policy, or with clip: null. Near 1 nothing is learned: clip is too "
        "narrow for the learning rate.",
    ),
    Metric(
        "group_weight",
        "share, 0 to 1",
        "Mean of w = sigmoid(S) over the prompt groups, S = (beta / G) times the sum of A (d - d_ref).",
        "Around 0.5 at the start. Below it the groups are ranked better than by the reference, above it worse.",
        DGPO,
    ),
    Metric(
        "ratio",
        "1",
        "Mean over images and steps of the probability ratio, policy over the one that sampled.",
        "Within about clip of 1; exactly 1 in an iteration's first update.",
        FLOW_GRPO,
    ),
    Metric(
        "ratio_deviation",
        "1",
        "Largest distance from 1 that the ratio of an iteration's first update would have if it were taken against the "
        "rollout's own log-probability: what rounding makes of a batch of another size.",
        "Well below algorithm.clip; in float32 about 1e-7. In bf16 up to 2e-4 was measured.",
        FLOW_GRPO,
    ),
    Metric(
        "grad_norm",
        "1",
        "Norm of the adapter's whole gradient before it is cut to training.max_grad_norm; mean over the updates.",
        "Without a trend, or falling slowly. A run of jumps comes from a learning rate that is too high.",
    ),
    Metric(
        "encoding_seconds",
        "seconds",
        f"Encoding prompts in the middle of a run, {OWN_PROCESS}; only where the sets hold more than 1,024 texts.",
        "Absent from most iterations.",
        (),
        True,
    ),
    Metric("rollout_seconds", "seconds", f"Sampling latents, {OWN_PROCESS}.", "Steady."),
    Metric("decode_seconds", "seconds", f"The VAE's decoding, {OWN_PROCESS}.", "Steady."),
    Metric(
        "reward_wait_seconds",
        "seconds",
        "Waiting for rewards after the last image was decoded, and gathering them from all processes.",
        "Below reward_seconds with several micro-batches, because rewards are computed beside the sampling.",
    ),
    Metric(
        "training_seconds",
        "seconds",
        f"Advantages, forward and backward passes and optimizer steps, {OWN_PROCESS}.",
        "Steady; in Flow-GRPO and in DGPO without a KL term it falls with constant_groups, whose groups are left out.",
    ),
    Metric(
        "reward_seconds",
        "seconds",
        f"What the rewards took in their own thread, {OWN_PROCESS}; not part of seconds.",
        "Steady; if reward_wait_seconds comes near it, the rewards hold the run up.",
    ),
    Metric(
        "seconds",
        "seconds",
        "The iteration: the sum of encoding, rollout, decode, reward_wait and training.",
        "Steady; saving checkpoints and drawing sample pictures are not in it.",
    ),
    Metric(
        "rollout_evaluations",
        "denoiser evaluations",
        "Images through the denoiser while sampling; with guidance each step of an image counts 2.",
        "The same every iteration.",
    ),
    Metric(
        "differentiated_evaluations",
        "denoiser evaluations",
        "Those of the passes that carry a gradient, forward and backward, of which each counts 3 for an image.",
        "The same every iteration where nothing is left out.",
    ),
    Metric(
        "denoiser_evaluations",
        "denoiser evaluations",
        "All of the iteration's; a forward of one image counts 1, a backward 2. What comparisons hold equal.",
        "The same every iteration where nothing is left out.",
    ),
)


def keys(algorithm: str, rewards: Sequence[str] = ()) -> tuple[set[str], set[str]]:
    """Keys that every record of an algorithm has, and those that it may have besides.

    Args:
        rewards: their labels, if there are several.
    """
    own = [metric for metric in METRICS if not metric.algorithms or algorithm in metric.algorithms]
    always = {metric.key for metric in own if not metric.optional}
    sometimes = {metric.key for metric in own if metric.optional and not metric.key.endswith("/NAME")}
    each = [metric.key.removesuffix("NAME") for metric in own if metric.key.endswith("/NAME")]
    return always | {key + name for key in each for name in rewards if len(rewards) > 1}, sometimes
