"""What is said of a row, from results by hand."""

from __future__ import annotations

from typing import Any

import pytest

from dgpo_bench.gpu.card import nominal_tflops
from dgpo_bench.gpu.table import markdown, verdict
from tests.bench.gpu.results_by_hand import result

GIB = 2**30


pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({"peak_bytes": 10 * GIB, "planned_bytes": 10.5 * GIB}, "memory as planned"),
        ({"peak_bytes": 12 * GIB, "planned_bytes": 10 * GIB}, "memory 20% more than planned"),
        ({"peak_bytes": 8 * GIB, "planned_bytes": 10 * GIB}, "memory 20% less than planned"),
        (
            {"peak_bytes": 12.5 * GIB, "planned_bytes": 12.5 * GIB, "aim_bytes": 12 * GIB},
            "memory as planned; not within 12 GiB",
        ),
        ({"works": False, "messages": ["Duplicate GPU detected"]}, "refused: Duplicate GPU detected"),
        ({"works": False, "note": "NCCL 2.28.9 allows one", "messages": ["no"]}, "refused: NCCL 2.28.9 allows one; no"),
    ],
)
def test_verdicts(measured: dict[str, Any], expected: str) -> None:
    assert verdict(result("a", "measured", measured)) == expected


def test_utilization_is_of_the_nominal_rate() -> None:
    measured = {"rollout_tflops": 600.0, "training_tflops": 300.0}
    device = {"device": "NVIDIA H200", "nominal_bf16_tflops": nominal_tflops("NVIDIA H200")}
    assert verdict(result("a", "measured", measured, device=device)) == "below the aim of 50%: training 30%"
    assert nominal_tflops("NVIDIA H100 PCIe") == 756.5
    assert nominal_tflops("something new") is None


def test_a_failed_row_says_why_in_the_table() -> None:
    kept = {
        "a": result("a", "failed", reason="RuntimeError: no kernel"),
        "b": result("b", "timed out", reason="after 60 s"),
    }
    text = markdown(kept, ["a", "b", "c"], ["c"])
    assert "failed: RuntimeError: no kernel" in text
    assert "timed out: after 60 s" in text
    assert "want of time: c" in text
