"""How long a comparison will take on this machine: each algorithm is timed on it, nothing is guessed."""

from __future__ import annotations

import time
from dataclasses import dataclass

from dgpo_plugin.trainer import Trainer

from .plan import Forecast, Plan
from .single import evaluator_of, run_config

TIMED_ITERATIONS = 2


@dataclass(frozen=True)
class Timing:
    """Seconds on this machine, with as many runs at once as the comparison has.

    Attributes:
        start: until a run's first iteration.
        training: a denoiser evaluation of training, rewards and decoding included.
        sampling: a denoiser evaluation of an evaluation, decoding and metrics included.
        evaluating: denoiser evaluations that measuring one run takes.
    """

    start: float
    training: float
    sampling: float
    evaluating: int


def time_algorithm(plan: Plan, algorithm: str) -> Timing:
    """Train for two iterations and take the quicker, then measure once."""
    started = time.perf_counter()
    trainer = Trainer(run_config(plan, algorithm, plan.seeds[0]))
    evaluator = evaluator_of(plan, trainer)
    ready = time.perf_counter()
    records = [record for record, _ in zip(trainer.iterations(), range(TIMED_ITERATIONS), strict=False)]
    measured = time.perf_counter()
    evaluator.measure(trainer.policy, trainer.evaluation_weights)
    guidance = plan.preset.evaluation.guidance
    return Timing(
        start=ready - started,
        training=min(record["seconds"] / record["denoiser_evaluations"] for record in records),
        sampling=(time.perf_counter() - measured) / evaluator.evaluations(guidance),
        evaluating=len(plan.size.schedule) * evaluator.evaluations(guidance)
        + sum(evaluator.evaluations(each) for each in {*plan.preset.evaluation.guidances, guidance}),
    )


def forecast(plan: Plan, missing: list[tuple[str, int]], timings: dict[str, Timing]) -> Forecast:
    """What the missing runs will take, from each algorithm's timing."""
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
