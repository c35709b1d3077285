"""Flow-GRPO-Guard (arXiv 2510.22319): the probability ratio is centered and scaled alike at every step.

A plain ratio's log has a mean below 0 and a spread that grows as the steps' noise falls, so that one clip means
something else at each step. It follows a copy of the authors' script, as far as others have read it:
1. The policy's loss of a step is divided by its length; Flow-Factory leaves that out.
2. The means are over dims, as all of Flow-GRPO's here.
Everything else is Flow-GRPO's, its deviations included.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dgpo_plugin.algorithms.flow_grpo import FlowSDEConfig, FlowSDESteps, policy_loss
from dgpo_plugin.algorithms.trajectories import Taken


def normalized_ratio(log_ratio: Tensor, mean: Tensor, old_mean: Tensor, std: float) -> Tensor:
    """exp((log ratio + mean over dims of (mean - old mean)^2 / (2 std^2)) std), (N,).

    Args:
        log_ratio: of the step, new over old, (N,), a mean over dims.
        mean, old_mean: of its Gaussians, (N, ...).
        std: their standard deviation.
    """
    distance = (mean - old_mean).square().flatten(1).mean(1)
    return torch.exp((log_ratio + distance / (2 * std**2)) * std)


class FlowGRPOGuardConfig(FlowSDEConfig):
    """Flow-GRPO-Guard: Flow-GRPO with another ratio."""

    name: Literal["flow-grpo-guard"] = "flow-grpo-guard"


class FlowGRPOGuard(FlowSDESteps[FlowGRPOGuardConfig]):
    """Every step is a Flow-SDE step, whose mean is kept."""

    Config = FlowGRPOGuardConfig
    KEEPS_MEANS = True

    def _step_loss(self, taken: Taken) -> tuple[Tensor, Tensor, Tensor]:
        assert taken.old_mean is not None
        log_ratio, clip = taken.log_probability - taken.old_log_probability, self.config.clip
        ratio = normalized_ratio(log_ratio, taken.gaussian.mean, taken.old_mean, taken.gaussian.std)
        losses = policy_loss(ratio, taken.advantages, clip) / taken.length
        return losses, ratio, (ratio.detach() - 1).abs() > clip
