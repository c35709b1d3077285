"""Made-up comparisons for the tests. Nothing here was measured; the preset says "synthetic" wherever it is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import pytest

from dgpo_bench.results import Budget, Evaluation, Metric, Results, Run

Curves: TypeAlias = Mapping[tuple[str, int], Sequence[float]]
MakeResults: TypeAlias = Callable[..., Results]

METRICS = {
    "score": Metric(label="Score", domain="in", better="higher", description="A made-up score."),
    "odd": Metric(label="Oddness", domain="out", better="lower", description="A made-up oddness."),
}


def synthetic_results(curves: Curves, step: float = 10.0, **changes: Any) -> Results:
    """Results whose primary metric follows ``curves``: {(algorithm, seed): values}.

    One evaluation every ``step`` seconds.
    A second costs 7 denoiser evaluations and ``odd`` is always 2 - score, so that either can be worked out by hand.
    """
    runs = [
        Run(
            algorithm=algorithm,
            seed=seed,
            adapter="synthetic.safetensors",
            evaluations=[
                Evaluation(
                    iteration=i,
                    seconds=i * step,
                    denoiser_evaluations=round(i * step * 7),
                    metrics={"score": value, "odd": 2 - value},
                )
                for i, value in enumerate(values)
            ],
        )
        for (algorithm, seed), values in curves.items()
    ]
    fields: dict[str, Any] = {
        "created": "2025-01-01T00:00:00Z",
        "preset": "synthetic",
        "git_hash": None,
        "packages": {"made-up": "1.0"},
        "machine": {"processor": "imaginary"},
        "budget": Budget(size="made-up", evaluations=280),
        "seeds": list(dict.fromkeys(seed for _, seed in curves)),
        "algorithms": list(dict.fromkeys(algorithm for algorithm, _ in curves)),
        "challenger": "dgpo",
        "labels": {"dgpo": "DGPO", "flow-grpo": "Flow-GRPO", "flow-grpo-fast": "Flow-GRPO-Fast"},
        "metrics": METRICS,
        "primary": "score",
        "settings": {},
        "runs": runs,
        "complete": True,
    }
    return Results(**{**fields, **changes})


@pytest.fixture(scope="session")
def make_results() -> MakeResults:
    return synthetic_results


@pytest.fixture(scope="session")
def three_seeds() -> Results:
    """DGPO meets Flow-GRPO's final 0.5, 0.6, 0.7 at 10, 10, 20 s; Flow-GRPO itself does so at 40, 30, 40 s."""
    return synthetic_results(
        {
            ("dgpo", 0): [0.1, 0.5, 0.8, 0.9, 0.9],
            ("dgpo", 1): [0.1, 0.6, 0.8, 0.9, 0.7],
            ("dgpo", 2): [0.1, 0.4, 0.7, 0.8, 1.0],
            ("flow-grpo", 0): [0.1, 0.2, 0.3, 0.4, 0.6],
            ("flow-grpo", 1): [0.1, 0.2, 0.3, 0.6, 0.6],
            ("flow-grpo", 2): [0.1, 0.2, 0.3, 0.6, 0.8],
        }
    )
