"""Every key of ``metrics.jsonl``: unit, computation, what a healthy run shows; docs/metrics.md is made of it.

A line of that file is one iteration, over all processes together where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Sequence

from dgpo_plugin.algorithms.base import Metric
from dgpo_plugin.common.names import ALGORITHMS

OWN_PROCESS = "of the first process alone"

OF_REWARDS = ("reward", "constant_groups", "skipped", "rollout_seconds", "decode_seconds")
"""What the keys begin with that only algorithms have that learn from rewards."""

METRICS = (
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
        "Rises by training.updates_per_iteration times training.inner_epochs; where it stands still, every group's "
        "rewards were equal.",
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
        "Prompt groups whose images all have the same reward, or of which fewer than two were scored: nothing is "
        "learned from them.",
        "Low. Near 1 at the start: the task is too hard, or too easy, for this base; at 1 a line on the screen says "
        "so.",
    ),
    Metric(
        "skipped",
        "share, 0 to 1",
        "Images without a score by one reward or more, which scoring.on_failure: skip left out: their advantage is 0, "
        "and means and standard deviations are over the others.",
        "0. A few hundredths cost little; above scoring.max_skipped the run stops.",
    ),
    Metric(
        "reward/NAME", "that reward's", "As reward, for each of several rewards by itself.", "As reward.", optional=True
    ),
    Metric(
        "reward_group_std/NAME",
        "that reward's",
        "As reward_group_std, of one reward.",
        "As reward_group_std.",
        optional=True,
    ),
    Metric(
        "constant_groups/NAME",
        "share, 0 to 1",
        "As constant_groups, of one reward.",
        "As constant_groups.",
        optional=True,
    ),
    Metric(
        "skipped/NAME",
        "share, 0 to 1",
        "Images that this one of several rewards gave no score.",
        "As skipped.",
        optional=True,
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
        optional=True,
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
        "kept_evaluations",
        "denoiser evaluations",
        "Those of rollout_evaluations that were differentiated afterwards, so that they were not made again "
        "(algorithm.keep_graphs); differentiated_evaluations counts them too.",
        "0 without keep_graphs; with it the same every iteration where nothing is left out.",
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

GUARD_METRICS: tuple[Metric, ...] = (
    Metric(
        "guard/NAME",
        "that metric's",
        "Of the reward, sharpness, diversity and each of training.guard.metrics (times its weight): the mean over the "
        "guard's validation prompts of the evaluation weights' value less the base's, paired by prompt and noise.",
        "guard/reward rises, the others stay near 0.",
    ),
    Metric(
        "guard_error/NAME",
        "that metric's",
        "Standard error of that mean, prompts being the clusters.",
        "Small against what matters; more training.guard.prompts make it smaller.",
    ),
    Metric(
        "guard_alarm",
        "0 or 1",
        "Whether this look raised an alarm: one thing fallen (more than three standard errors below the base, and "
        "more than half of the base's standard deviation), for the second look in a row, with the reward above it, and "
        "for the first time in the run.",
        "0.",
    ),
    Metric("guard_seconds", "seconds", f"The look, {OWN_PROCESS}; not part of seconds.", "Steady."),
)
"""What the lines of those iterations have besides after which ``training.guard`` looks."""


PAIR_METRICS: tuple[Metric, ...] = (
    Metric(
        "picture_seconds",
        "seconds",
        f"Reading pairs' pictures and encoding them, {OWN_PROCESS}; part of seconds.",
        "Steady, and far below training_seconds.",
    ),
)
"""What algorithms have instead that learn from preferred pairs."""


def metrics_of(algorithm: str) -> tuple[Metric, ...]:
    """Every key of an algorithm's records: what all have, what goes with what it learns from, and its own."""
    found = ALGORITHMS.load(algorithm)
    if "pairs" not in found.Config.needs:
        return (*METRICS, *found.METRICS)
    return (*(metric for metric in METRICS if not metric.key.startswith(OF_REWARDS)), *PAIR_METRICS, *found.METRICS)


def keys(algorithm: str, rewards: Sequence[str] = ()) -> tuple[set[str], set[str]]:
    """Keys that every record of an algorithm has, and those that it may have besides.

    Args:
        rewards: their labels, if there are several.
    """
    own = metrics_of(algorithm)
    always = {metric.key for metric in own if not metric.optional}
    sometimes = {metric.key for metric in own if metric.optional and not metric.key.endswith("/NAME")}
    each = [metric.key.removesuffix("NAME") for metric in own if metric.key.endswith("/NAME")]
    return always | {key + name for key in each for name in rewards if len(rewards) > 1}, sometimes
