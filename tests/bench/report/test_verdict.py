"""The verdict in full sentences; the numbers are worked out by hand in the comments. All data is synthetic."""

from __future__ import annotations

import pytest

from dgpo_bench.report.numbers import format_number, format_ratio
from dgpo_bench.report.verdict import verdict
from dgpo_bench.results import Metric, Results
from dgpo_plugin.common.errors import UserError
from tests.bench.conftest import MakeResults

pytestmark = pytest.mark.fast


def test_numbers_show_the_digits_that_matter() -> None:
    numbers = (0, 0.004123, -0.0712, 0.5, 22.344, 1234.56)
    assert [format_number(n) for n in numbers] == ["0", "0.0041", "-0.071", "0.500", "22.34", "1234.6"]
    assert [format_ratio(n) for n in (0.333, 1, 6.25, 19.4)] == ["0.33", "1.0", "6.2", "19"]


def test_verdict_of_a_plain_win(three_seeds: Results) -> None:
    # The geometric mean of 3.5, 3, 1.75 (a hair less in floats) is 2.64; the finals are 2.6 / 3 and 1.8 / 3.
    assert verdict(three_seeds) == (
        "DGPO reached the final score of Flow-GRPO with 2.6x fewer denoiser evaluations "
        "(95 % interval 1.7 to 3.5, 3 seeds) "
        "and ended at 0.867 against 0.600 (difference 0.267, 0.200 to 0.400)."
    )


def test_verdict_of_one_seed_slower_and_worse(make_results: MakeResults) -> None:
    results = make_results({("dgpo", 0): [0.0, 0.1, 0.5, 0.1], ("flow-grpo", 0): [0.0, 0.4, 0.4, 0.4]})
    # Flow-GRPO at 10 s, DGPO three quarters of the way from 10 to 20: 17.5 s. Finals .3 and .4.
    assert verdict(results) == (
        "DGPO took 1.8x as many denoiser evaluations to reach the final score of Flow-GRPO (one seed, no interval) "
        "and ended worse, at 0.300 against 0.400 (difference -0.100, one seed, no interval)."
    )


def test_verdict_not_reached(make_results: MakeResults) -> None:
    results = make_results({("dgpo", 0): [0.0, 0.1, 0.1], ("flow-grpo", 0): [0.0, 0.4, 0.4]})
    assert "DGPO did not reach the final score of Flow-GRPO in its one seed (a speed ratio of at most 0.5x)" in verdict(
        results
    )
    assert "fewer" not in verdict(results)


def test_verdict_says_when_nothing_is_clear(make_results: MakeResults) -> None:
    results = make_results(
        {
            ("dgpo", 0): [0.0, 0.8, 0.8],
            ("dgpo", 1): [0.0, 0.4, 0.4],
            ("flow-grpo", 0): [0.0, 0.4, 0.4],
            ("flow-grpo", 1): [0.0, 0.4, 0.4],
        }
    )
    assert "1.0 to 2.0, 2 seeds: no clear difference" in verdict(results)  # ratios 2 and 1
    assert "ended, not clearly different, at 0.600 against 0.400 (difference 0.200, 0 to 0.400)" in verdict(results)


def test_verdict_names_the_strongest_baseline_first(make_results: MakeResults) -> None:
    curves = {
        ("dgpo", 0): [0.0, 0.9, 0.9],
        ("flow-grpo", 0): [0.0, 0.3, 0.3],
        ("flow-grpo-fast", 0): [0.0, 0.6, 0.6],
    }
    text = verdict(make_results(curves))
    assert text.startswith("DGPO reached the final score of Flow-GRPO-Fast, the strongest baseline, with 1.5x fewer")
    assert "; it reached that of Flow-GRPO with 3.0x fewer" in text


def test_verdict_when_the_baseline_gained_nothing(make_results: MakeResults) -> None:
    results = make_results({("flow-grpo", 0): [0.3, 0.3], ("dgpo", 0): [0.3, 0.5]})
    assert "no speed ratio to Flow-GRPO because the untrained base already met the final score" in verdict(results)


def test_verdict_without_dgpo_or_without_another(make_results: MakeResults) -> None:
    assert verdict(make_results({("flow-grpo", 0): [0.0, 0.4]})) == (
        "There is no finished DGPO run, so nothing to compare with Flow-GRPO."
    )
    assert verdict(make_results({("dgpo", 0): [0.1, 0.4]})) == (
        "DGPO ended at score 0.400 from a base at 0.100 (one seed, no interval) "
        "but there is no finished run of another algorithm to compare it with."
    )


def test_verdict_of_an_incomplete_comparison(make_results: MakeResults) -> None:
    curves = {("dgpo", 0): [0.0, 0.5], ("dgpo", 1): [0.0, 0.5], ("flow-grpo", 0): [0.0, 0.4]}
    assert verdict(make_results(curves)).startswith("Incomplete comparison (3 of 4 runs): DGPO reached")
    assert verdict(make_results(curves, runs=[], complete=False)).startswith(
        "Incomplete comparison (0 of 4 runs): there is"
    )


def test_runs_of_different_seeds_are_not_compared(make_results: MakeResults) -> None:
    assert "no finished seed" in verdict(make_results({("dgpo", 0): [0.0, 0.5], ("flow-grpo", 1): [0.0, 0.4]}))


def test_an_unusable_primary_metric_is_the_users_to_mend(make_results: MakeResults) -> None:
    with pytest.raises(UserError, match="'speed' is not among the metrics"):
        verdict(make_results({("dgpo", 0): [0.0, 0.5]}, primary="speed"))
    neutral = {"score": Metric(label="Score", domain="in", better="none", description="")}
    with pytest.raises(UserError, match="no better direction"):
        verdict(make_results({("dgpo", 0): [0.0, 0.5]}, metrics=neutral))
