"""How long a comparison will take, from timings that are made up."""

from __future__ import annotations

import pytest

from dgpo_bench.forecast import Timing, forecast
from dgpo_bench.plan import Plan
from dgpo_bench.preset import load_preset

pytestmark = pytest.mark.fast


def test_a_forecast_adds_up_what_was_timed() -> None:
    """3 runs of 1,000 evaluations, two at once: (5 + 1 + .2) twice for dgpo, (5 + 2 + .2) for flow-grpo."""
    preset = load_preset("shapes")
    size = preset.sizes["quick"].model_copy(update={"evaluations": 1000})
    two_seeds = size.model_copy(update={"seeds": 2})
    plan = Plan.of("shapes", preset, "quick", two_seeds, ["dgpo", "flow-grpo"], jobs=2)
    timings = {
        "dgpo": Timing(start=5, training=0.001, sampling=0.0005, evaluating=400),
        "flow-grpo": Timing(start=5, training=0.002, sampling=0.0005, evaluating=400),
    }
    found = forecast(plan, [("dgpo", 0), ("flow-grpo", 0), ("dgpo", 1)], timings)
    assert found.seconds == pytest.approx((6.2 + 7.2 + 6.2) / 2)
    assert (found.runs, found.training, found.sampling) == (3, pytest.approx(1.5), pytest.approx(0.5))
