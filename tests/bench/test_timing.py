"""How often something is done to time it; how long it takes is made up."""

from __future__ import annotations

import pytest
import torch

from dgpo_bench import timing
from dgpo_bench.timing import median_seconds

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("options", "calls", "median"),
    [
        ({"rounds": 3}, 4, 3.0),  # the first warms up; then 2, 3 and 4 seconds
        ({"rounds": 3, "warm_up": False}, 3, 2.0),
        ({"rounds": 9, "most_seconds": 4.5}, 3, 2.5),  # 2 and 3 are more than 4.5 together
        ({"rounds": 9, "most_seconds": 0.5, "warm_up": False}, 1, 1.0),  # one in any case
    ],
)
def test_the_median_is_of_the_calls_after_the_first(
    options: dict[str, float], calls: int, median: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, done = [0.0], [0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def work() -> None:
        done[0] += 1
        now[0] += done[0]  # the n-th call takes n seconds

    assert median_seconds(work, torch.device("cpu"), **options) == median
    assert done[0] == calls
