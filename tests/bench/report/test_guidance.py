"""The base and the adapters at every guidance, by hand on made-up numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgpo_bench.report.guidance import (
    base_sentence,
    best_guidance,
    difference_to_base,
    guidances,
    guided_estimate,
    guided_values,
)
from dgpo_bench.report.page import render_report
from dgpo_bench.report.tables import guidance_tables
from dgpo_bench.results import Guided, Results
from tests.bench.conftest import METRICS, MakeResults

pytestmark = pytest.mark.fast


def guided(scores: dict[float, float]) -> list[Guided]:
    return [Guided(guidance=g, metrics={"score": score, "odd": 2 - score}) for g, score in scores.items()]


@pytest.fixture
def results(make_results: MakeResults) -> Results:
    """DGPO is best unguided (.7, .8), the base with guidance 3 (.72): ahead by .03, not by .75 - .5."""
    plain = make_results({("dgpo", 0): [0.5, 0.7], ("dgpo", 1): [0.5, 0.8], ("flow-grpo", 0): [0.5, 0.6]})
    measured = {
        ("dgpo", 0): guided({1: 0.7, 3: 0.6}),
        ("dgpo", 1): guided({1: 0.8, 3: 0.7}),
        ("flow-grpo", 0): guided({1: 0.6, 3: 0.66}),
    }
    runs = [run.model_copy(update={"guided": measured[run.algorithm, run.seed]}) for run in plain.runs]
    return plain.model_copy(update={"runs": runs, "base": guided({1: 0.5, 3: 0.72})})


def test_everyone_is_read_at_the_guidance_that_suits_it(results: Results) -> None:
    assert guidances(results) == [1, 3]
    best = {name: best_guidance(results, name) for name in ("base", "dgpo", "flow-grpo")}
    assert {name: each.guidance for name, each in best.items() if each} == {"base": 3, "dgpo": 1, "flow-grpo": 3}
    assert best["dgpo"] is not None
    assert best["dgpo"].value.mean == pytest.approx(0.75)
    assert guided_values(results, "dgpo", 3, "score") == {0: 0.6, 1: 0.7}


def test_the_gain_is_over_the_base_at_its_own_best(results: Results) -> None:
    found = difference_to_base(results, "dgpo", "score")
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((0.03, -0.02, 0.08))
    # Another metric is read at the guidances that the primary one chose.
    odd = difference_to_base(results, "dgpo", "odd")
    assert odd is not None
    assert odd.mean == pytest.approx(-0.03)


def test_the_sentence_does_not_call_guidance_a_gain(results: Results) -> None:
    assert base_sentence(results, "dgpo") == (
        "Each at its own best guidance, DGPO (1) is not clearly ahead of the untrained base (3): "
        "0.750 against 0.720 (difference 0.030, -0.020 to 0.080)."
    )
    assert base_sentence(results, "flow-grpo") == (
        "Each at its own best guidance, Flow-GRPO (3) is behind the untrained base (3): "
        "0.660 against 0.720 (difference -0.060, one seed, no interval)."
    )


def test_a_metric_that_should_fall_is_best_where_it_is_lowest(results: Results) -> None:
    turned = results.model_copy(update={"primary": "odd"})
    best = best_guidance(turned, "base")
    assert best is not None
    assert best.guidance == 3  # 2 - .72 is less than 2 - .5
    assert "is not clearly ahead" in base_sentence(turned, "dgpo")


def test_nothing_measured_says_nothing(make_results: MakeResults) -> None:
    bare = make_results({("dgpo", 0): [0.5, 0.7]})
    assert best_guidance(bare, "dgpo") is None
    assert difference_to_base(bare, "dgpo", "score") is None
    assert base_sentence(bare, "dgpo") == ""
    assert guidance_tables(bare) == []
    assert guided_estimate(bare, "base", 1, "score") is None


def test_the_report_shows_the_base_first_and_the_best_in_bold(results: Results, tmp_path: Path) -> None:
    out = METRICS["odd"].model_copy(update={"better": "higher"})
    shown = results.model_copy(update={"metrics": {**METRICS, "odd": out}})
    tables = guidance_tables(shown)
    assert [metric.label for metric, _ in tables] == ["Score", "Oddness"]
    base, dgpo, _ = tables[0][1]
    assert (base.name, base.best, base.gain.value) == ("Base", 1, "")
    assert (dgpo.name, dgpo.best, dgpo.gain.value) == ("DGPO", 0, "+0.030")
    page = render_report(shown, tmp_path)
    assert "<strong>0.720</strong>" in page
    assert "Each at its own best guidance, DGPO (1) is not clearly ahead of the untrained base (3)" in page
