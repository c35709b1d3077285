"""How long a comparison will take on this machine: each algorithm is timed on it, nothing is guessed."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

from .cell import evaluator_of, new_trainer
from .plan import Forecast, Plan

TIMED_ITERATIONS = 2
FEW_PROMPTS = {"prompts_per_task": 2, "out_of_domain_prompts": 4}


@dataclass(frozen=True)
class Timing:
    """Seconds on this machine, with as many runs at once as the comparison has.

    Attributes:
        start: until a run's first iteration.
        training: per denoiser evaluation of training, rewards and decoding included.
        sampling: per denoiser evaluation of measuring, decoding and metrics included.
        evaluating: denoiser evaluations that measuring one run takes.
    """

    start: float
    training: float
    sampling: float
    evaluating: int


def time_algorithm(plan: Plan, algorithm: str) -> Timing:
    """Train for two iterations and take the quicker, then measure on a few of the prompts."""
    started = time.perf_counter()
    trainer = new_trainer(plan, algorithm, plan.seeds[0])
    evaluator = evaluator_of(plan, trainer)
    ready = time.perf_counter()
    records = list(itertools.islice(trainer.iterations(share_done=lambda: 0.0), TIMED_ITERATIONS))
    few = plan.model_copy(update={"size": plan.size.model_copy(update=FEW_PROMPTS)})
    small_evaluator = evaluator_of(few, trainer)
    trained = time.perf_counter()
    small_evaluator.measure(trainer.policy, trainer.evaluation_weights)
    guidance = plan.preset.evaluation.guidance
    return Timing(
        start=ready - started,
        training=min(record["seconds"] / record["denoiser_evaluations"] for record in records),
        sampling=(time.perf_counter() - trained) / small_evaluator.evaluations(guidance),
        evaluating=len(plan.size.schedule) * evaluator.evaluations(guidance)
        + sum(evaluator.evaluations(each) for each in plan.adapter_guidances),
    )


def forecast(plan: Plan, missing: list[tuple[str, int]], timings: dict[str, Timing]) -> Forecast:
    """Forecast what the missing runs will take, from each algorithm's timing.

    Args:
        missing: (algorithm, seed) of each, at least one.
    """
    seconds = sum(
        timing.start + timing.training * plan.size.evaluations + timing.sampling * timing.evaluating
        for timing in (timings[algorithm] for algorithm, _ in missing)
    )
    count = len(timings)
    return Forecast(
        runs=len(missing),
        seconds=seconds / min(plan.jobs, len(missing)),
        training=1000 * sum(timing.training for timing in timings.values()) / count,
        sampling=1000 * sum(timing.sampling for timing in timings.values()) / count,
    )
