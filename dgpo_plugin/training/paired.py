"""Differences between pictures of two models, paired by prompt and noise, and how sure their means are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

STANDARD_ERRORS = 3.0
"""By how many of them a mean must lie below 0 to have fallen."""
SPREADS = 0.5
"""By how many of the base's standard deviations besides: whatever is trained differs surely in something, a little.

In a comparison of the world of words (2026-11-27, nothing was hacked) the falls of sharpness and diversity that were
sure (up to 6 standard errors) were .12 to .4 of them; where colors were hacked (`shapes-vivid`) what is drawn fell by
1.2 and 1.6 of them.
"""


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and its standard error.

    Attributes:
        mean: in the metric's unit, of what is compared less the base.
        error: of that mean, in the same unit; 0 where every prompt differs alike.
        prompts: that it is over.
        spread: standard deviation of the base's pictures, in the metric's unit; 0 asks for no size of a fall.
    """

    mean: float
    error: float
    prompts: int
    spread: float = 0.0

    @property
    def rose(self) -> bool:
        """Whether the mean is above the base's at all."""
        return self.mean > 0

    @property
    def fell(self) -> bool:
        """Whether the mean is below the base's by more than three standard errors, and by half of the spread."""
        return self.mean < -max(STANDARD_ERRORS * self.error, SPREADS * self.spread)

    @property
    def in_errors(self) -> str:
        """How far the mean is from 0, for people: ``4.2 standard errors``."""
        return f"{abs(self.mean) / self.error:.1f} standard errors" if self.error else "the same on every prompt"


def paired_difference(base: Tensor, other: Tensor) -> Difference:
    """The mean difference between two models' pictures, with prompts as clusters.

    Pictures of one prompt are not independent, so each prompt's mean difference is one observation; the standard error
    is that of the mean of those, sd / sqrt(P), which for prompts of equally many pictures is the clustered one. Pairing
    takes out what a prompt and a noise give both models (Miller, "Adding Error Bars to Evals", arXiv 2411.00640,
    sections on clustered and on paired standard errors).

    Args:
        base, other: values of the same P prompts and I noises, (P, I); NaN where a picture has none, and its pair is
            then left out.
    """
    values = base[~base.isnan()].double()
    spread = values.std().item() if len(values) > 1 else 0.0
    differences = (other.double() - base.double()).nanmean(1)
    differences = differences[~differences.isnan()]
    count = len(differences)
    error = differences.std().item() / count**0.5 if count > 1 else 0.0
    return Difference(differences.mean().item() if count else 0.0, error, count, spread)
