"""Pictures without a score (``scoring.on_failure: skip``): what is left of means, and when there are too many of them.

A score is NaN where there is none, and a picture that lacks one of several counts for none of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dgpo_plugin.algorithms.advantages import constant_groups, group_statistics
from dgpo_plugin.distributed.processes import Processes
from dgpo_plugin.rewards import RewardSet
from dgpo_plugin.rewards.scorer import Scorer


@dataclass(frozen=True)
class HeldOutMean:
    """A mean over held-out pictures, and over how many.

    Attributes:
        value: the mean of the rewards' weighted sum.
        scored: pictures that it is over.
        pictures: that were asked about.
    """

    value: float
    scored: int
    pictures: int

    @property
    def note(self) -> str:
        """Over how many, where they are not all, as ``126 of 128 pictures``; else empty."""
        return "" if self.scored == self.pictures else f"{self.scored} of {self.pictures} pictures"

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.note})" if self.note else f"{self.value:.3f}"


def held_out_mean(scores: Tensor, scorer: Scorer, processes: Processes) -> HeldOutMean:
    """The mean over the held-out pictures that were scored.

    Args:
        scores: (N, K), of all processes.

    Raises:
        UserError: not one was.
    """
    values = scorer.rewards.total(scores)
    scored = values[~values.isnan()]
    why = scorer.say_unscored()
    if not len(scored):
        processes.fail_together(f"none of {len(values)} held-out pictures could be scored; {why}" if why else None)
    return HeldOutMean(scored.mean().item(), len(scored), len(values))


def refuse_too_many(scores: Tensor, scorer: Scorer, iteration: int, limit: float, processes: Processes) -> None:
    """Stop where more of an iteration's pictures have no score than may be left out.

    Args:
        scores: (N, K), of all processes.
        iteration: from 1.
        limit: the share of the N that may lack one.

    Raises:
        UserError: on all processes, in the words of the first that has such pictures: how many, by which rewards, the
            last one's reason, and where they are.
    """
    missing, why = scores.isnan(), scorer.say_unscored()
    lost = int(missing.any(1).sum())
    if lost <= limit * len(scores):
        return
    by = [f"{label} {n}" for label, n in zip(scorer.rewards.names, missing.sum(0).tolist(), strict=True) if n]
    problem = (
        f"iteration {iteration}: {lost} of {len(scores)} pictures could not be scored (reward {', '.join(by)}), more "
        f"than scoring.max_skipped {limit:g} allows; {why}; mend the reward, or raise scoring.max_skipped, and go on "
        f"with dgpo resume"
    )
    processes.fail_together(problem if why else None)


def reward_record(scores: Tensor, rewards: RewardSet) -> dict[str, float]:
    """What to log of an iteration's scores (P, G, K): their weighted sum, and each of several by itself."""
    columns = {"": rewards.total(scores)}
    if len(rewards.names) > 1:
        columns |= {f"/{name}": column for name, column in zip(rewards.names, scores.unbind(2), strict=True)}
    record: dict[str, float] = {}
    for name, values in columns.items():
        missing = values.isnan()
        record[f"reward{name}"] = (values[~missing] if missing.any() else values).mean().item()
        record[f"reward_group_std{name}"] = group_statistics(values)[1].mean().item()
        record[f"constant_groups{name}"] = constant_groups(values).float().mean().item()
        record[f"skipped{name}"] = missing.float().mean().item()
    return record
