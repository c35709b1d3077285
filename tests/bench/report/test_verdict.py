"""The verdict in full sentences; the numbers are worked out by hand in the comments. All data is synthetic."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dgpo_bench.records import CellRecord
from dgpo_bench.report.comparison import comparison_of
from dgpo_bench.report.intervals import Estimate, Interval
from dgpo_bench.report.numbers import format_amount, format_between, format_number, format_ratio
from dgpo_bench.report.verdict import cautions, headline, judge, rivals
from tests.bench.report.synthetic import World, records, synthetic

pytestmark = pytest.mark.fast

WIN = World({(name, s): c for name, c in (("ours", [0.4, 0.6, 0.7]), ("theirs", [0.4, 0.5, 0.5])) for s in (0, 1)})


def test_numbers_show_the_digits_that_matter() -> None:
    numbers = (0, 0.004123, -0.0712, 0.5, 22.344, 1234.56)
    assert [format_number(n) for n in numbers] == ["0", "0.0041", "-0.071", "0.500", "22.34", "1234.6"]
    assert [format_number(n, signed=True) for n in (0.03, -0.03, 0, 1e-17)] == ["+0.030", "-0.030", "0", "0"]
    assert [format_ratio(n) for n in (0.333, 1, 6.25, 19.4)] == ["0.33", "1.0", "6.2", "19"]
    assert [format_amount(n) for n in (0, 0.02, 7, 61_952, 1.5e15)] == ["0", "0.02", "7", "62k", "1.5P"]
    bounds = [format_between(*each) for each in ((1.0, 3.0), (0, 0.5), (2.0, float("inf")))]
    assert bounds == ["1.0× to 3.0×", "at most 0.5×", "at least 2.0×"]


@pytest.mark.parametrize(
    ("low", "high", "in_domain", "with_margin"),
    [
        (0.01, 0.05, "better", "better"),
        (-0.01, 0.05, "not clear", "not worse"),
        (-0.019, -0.001, "worse", "slightly worse"),
        (-0.02, 0.05, "not clear", "not clear"),  # the bound itself is not above the margin
        (-0.05, 0.01, "not clear", "not clear"),
        (-0.05, -0.03, "worse", "worse"),
    ],
)
def test_judgements_go_by_the_bounds(low: float, high: float, in_domain: str, with_margin: str) -> None:
    gain = Estimate((low + high) / 2, (0.0,), Interval(low, high), None)
    assert (judge(gain), judge(gain, 0.02)) == (in_domain, with_margin)
    wider = replace(gain, runs=Interval(low - 1, high + 1))
    assert (judge(wider), judge(wider, 0.02)) == ("not clear", "not clear")  # both intervals have to show it
    assert judge(Estimate(0.5, (0.5,), None, None)) == "no interval"


def test_the_headline_is_one_sentence_on_both_axes_against_the_base_at_its_best() -> None:
    # The base is best at 3, with .4; nothing scatters, so the intervals are points.
    assert headline(synthetic(WIN)) == (
        "OURS at guidance 3, against the untrained base at its best guidance (3): better in domain, accuracy 0.700 "
        "against 0.400 (+0.300; 95 % interval +0.300 to +0.300 for new prompts); better on out-of-domain prompts, "
        "0.800 against 0.500 (+0.300; 95 % interval +0.300 to +0.300 for new prompts)."
    )


def test_a_base_that_is_better_at_its_best_guidance_is_seen() -> None:
    """Trained to .45 from .3 at guidance 1, where it is curves' and its own; the base has .5 at guidance 4.5."""
    world = World({("ours", 0): [0.3, 0.45]}, base={1.0: 0.3, 3.0: 0.3, 4.5: 0.5})
    text = headline(synthetic(world, base_guidance=4.5))
    assert (
        "the untrained base at its best guidance (4.5): worse in domain, accuracy 0.450 against 0.500 (-0.050;" in text
    )


def test_a_guidance_that_would_have_suited_the_base_better_is_told() -> None:
    """Validation prompts chose 3; on the test prompts 4.5 has .5, of which .45 is no gain."""
    world = World({("ours", 0): [0.3, 0.45]}, base={1.0: 0.3, 3.0: 0.3, 4.5: 0.5})
    assert cautions(synthetic(world, base_guidance=3.0))[0] == (
        "On the test prompts themselves the base is better at guidance 4.5 than at 3, which validation prompts chose: "
        "0.500 against 0.300; over that OURS has -0.050 (95 % interval -0.050 to -0.050 for new prompts)."
    )
    assert not any("themselves" in line for line in cautions(synthetic(world, base_guidance=4.5)))


def test_five_seeds_have_an_interval_of_a_new_run() -> None:
    curves = {("ours", s): [0.4, 0.6 + 0.01 * s, 0.7 + 0.01 * s] for s in range(5)}
    # Seed means .30 .31 .32 .33 .34: mean .32, standard error .00707, t 2.776: .300 to .340.
    text = headline(synthetic(World(curves)))
    assert "95 % interval +0.300 to +0.340 for a new run" in text
    assert "for a new run" not in headline(synthetic(World({k: v for k, v in curves.items() if k[1] < 4})))


def test_rivals_are_compared_and_timed() -> None:
    first, second = rivals(synthetic(WIN))
    assert first.startswith(
        "OURS at guidance 3, against THEIRS at guidance 3: better in domain, accuracy 0.700 against 0.5"
    )
    # Ours holds .55 by 10 s, theirs not by 20; .7 is met by ours at the last checkpoint, which has no next to hold at.
    assert second == (
        "To reach 0.550, THEIRS needs at least 2.0× what OURS needs, in measured FLOPs of the denoiser (2 seeds)."
    )
    controls = {name: e.model_copy(update={"kind": "control"}) for name, e in records(WIN).entries.items()}
    entries = {**controls, "ours": records(WIN).entries["ours"]}
    assert rivals(synthetic(WIN, entries=entries)) == []


def test_no_ratio_without_a_sure_gain_of_the_other() -> None:
    flat = World({("ours", 0): [0.4, 0.6, 0.7], ("theirs", 0): [0.4, 0.5, 0.4]}, own=0.1)
    text = rivals(synthetic(flat))[1]
    assert text.startswith("How much sooner OURS is than THEIRS is undefined, because THEIRS has no sure gain")
    assert re.search(r"The gains: OURS \+0\.\d+ .*; THEIRS -?\+?0\.\d+ ", text)


def test_what_is_missing_is_named() -> None:
    failed = CellRecord(entry="theirs", seed=1, status="failed", reason="out of memory in iteration 3")
    cells = [cell for cell in records(WIN).cells if (cell.entry, cell.seed) != ("theirs", 1)]
    comparison = synthetic(WIN, cells=[*cells, failed])
    text = " ".join(cautions(comparison))
    assert "THEIRS, seed 1, failed: out of memory in iteration 3." in text
    assert "Judge is missing: no server at 127.0.0.1:1." in text
    assert "Shown, but not in the headline in domain, for fewer than 6 prompts: rare." in text
    assert not headline(comparison).startswith("Incomplete")
    assert headline(synthetic(WIN, cells=cells, complete=False)).startswith("Incomplete (3 of 4 cells): OURS at")
    assert headline(synthetic(WIN, cells=cells[2:], complete=False)).startswith(
        "Incomplete (1 of 4 cells): there is no"
    )
    task = records(WIN).task.model_copy(update={"prompts_per_tag": 60})
    assert "No kind of prompt in domain has the 60 prompts" in " ".join(cautions(synthetic(WIN, task=task)))


def test_an_alarm_is_a_caution_with_its_iteration() -> None:
    first, *others = records(WIN).cells
    told = "after iteration 40: sharpness fell by 0.2 (4.0 standard errors) while reward rose by 0.1"
    text = cautions(synthetic(WIN, cells=[first.model_copy(update={"alarms": [told]}), *others]))
    assert sum("Alarm for reward hacking" in sentence for sentence in text) == 1
    assert f"Alarm for reward hacking on validation prompts, OURS, seed 0, {told}." in text


def test_seeds_that_are_not_shared_are_not_compared() -> None:
    text = rivals(synthetic(World({("ours", 0): [0.4, 0.7], ("theirs", 1): [0.4, 0.5]})))
    assert text == ["THEIRS shares no finished seed with OURS: not compared."]


def test_out_of_domain_prompts_that_only_other_metrics_judge_are_not_called_unmeasured() -> None:
    plain = synthetic(WIN)
    pictures = plain.pictures
    scores = np.where(pictures.set == "unseen", np.nan, pictures.metrics["accuracy"])
    judged = replace(pictures, metrics={**pictures.metrics, "accuracy": scores})
    sentence = headline(comparison_of(plain.results, judged, Path("made-up")))
    assert sentence.endswith(
        "; accuracy was not measured on out-of-domain prompts, which Taste, Cousin judge; the tables have them."
    )


def test_without_out_of_domain_prompts_that_is_what_is_said() -> None:
    sets = {name: each for name, each in records(WIN).sets.items() if each.role != "out_of_domain"}
    assert headline(synthetic(WIN, sets=sets)).endswith("; there are no out-of-domain prompts.")


def test_both_numbers_of_a_difference_are_of_the_seeds_that_it_is_of() -> None:
    """Theirs failed with seed 1, where ours had .9: .6 against .5 is a difference of .1, .75 against .5 is not."""
    curves = {("ours", 0): [0.4, 0.6], ("ours", 1): [0.4, 0.9], ("theirs", 0): [0.4, 0.5], ("theirs", 1): [0.4, 0.5]}
    cells = [
        cell if (cell.entry, cell.seed) != ("theirs", 1) else CellRecord(entry="theirs", seed=1, status="failed")
        for cell in records(World(curves)).cells
    ]
    sentence = rivals(synthetic(World(curves), cells=cells))[0]
    assert "accuracy 0.600 against 0.500 (+0.100;" in sentence
