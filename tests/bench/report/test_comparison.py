"""Records and pictures checked against each other: every kind of disagreement is one line. All data is synthetic."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgpo_bench.pictures import Pictures, join
from dgpo_bench.records import TaskRecord
from dgpo_bench.report.comparison import comparison_of
from dgpo_bench.report.measures import best_of, curve_values, difference, expected_best, value
from dgpo_plugin.common.errors import UserError
from tests.bench.report.synthetic import METRICS, World, pictures_of, records, synthetic

pytestmark = pytest.mark.fast

WORLD = World({("ours", 0): [0.4, 0.6, 0.7], ("theirs", 0): [0.4, 0.5, 0.5]})
PATH = Path("pictures")


def changed(column: str, before: object, after: object) -> Pictures:
    """The pictures' table with one value in place of another, all the way down a column."""
    pictures = pictures_of(records(WORLD), WORLD)
    found = getattr(pictures, column)
    found = found.astype("U20") if isinstance(after, str) else found.copy()
    found[found == before] = after
    return replace(pictures, **{column: found})


@pytest.mark.parametrize(
    ("column", "before", "after", "message"),
    [
        ("entry", "theirs", "nobody", "entry nobody, seed 0 is no cell"),
        ("seed", 0, 7, "seed 7 is no cell"),
        ("seed", -1, 0, "entry base, seed 0 is no cell"),
        ("checkpoint", 2, 3, "has checkpoints 0 to 2 alone"),
        ("checkpoint", 1, -1, "has checkpoints 0 to 2 alone"),
        ("set", "unseen", "elsewhere", "set 'elsewhere' is none"),
        ("prompt", 13, 14, "a prompt or image of set"),
        ("image", 1, 2, "a prompt or image of set"),
        ("image", 1, 0, "stands there twice"),
    ],
)
def test_a_row_of_nothing_is_refused(column: str, before: object, after: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        comparison_of(records(WORLD), changed(column, before, after), PATH)
    assert "\n" not in str(raised.value)


def test_a_metric_nobody_knows_is_refused() -> None:
    pictures = pictures_of(records(WORLD), WORLD)
    extra = replace(pictures, metrics={**pictures.metrics, "odd": pictures.metrics["taste"]})
    with pytest.raises(UserError, match="metric 'odd' is none of"):
        comparison_of(records(WORLD), extra, PATH)


def records_with(**changes: Any) -> None:
    results = records(WORLD, **changes)
    comparison_of(results, pictures_of(results, WORLD), PATH)


def test_records_that_cannot_be_drawn_are_refused() -> None:
    neutral = {**METRICS, "accuracy": METRICS["accuracy"].model_copy(update={"better": "none"})}
    with pytest.raises(UserError, match="no better direction"):
        records_with(metrics=neutral)
    with pytest.raises(UserError, match="thresholds .* do not rise"):
        records_with(task=TaskRecord(name="t", version=1, headline="accuracy", thresholds=[0.5, 0.4]))
    cell = records(WORLD).cells[0]
    backwards = cell.model_copy(update={"checkpoints": [cell.checkpoints[i] for i in (0, 2, 1)]})
    with pytest.raises(UserError, match="falls between checkpoints"):
        records_with(cells=[backwards])


def test_the_headline_counts_tags_with_enough_prompts_alone() -> None:
    """The rare tag has two of fourteen prompts; it scores 1 more than the others, for everybody."""
    comparison = synthetic(WORLD)
    scores = comparison.pictures.metrics["accuracy"]
    moved = scores + (comparison.pictures.prompt >= 12)
    pictures = replace(comparison.pictures, metrics={**comparison.pictures.metrics, "accuracy": moved})
    found = comparison_of(comparison.results, pictures, PATH)
    ends = value(found, "ours", "in_domain", "accuracy")
    assert ends is not None
    assert ends.mean == pytest.approx(0.7)
    rare = value(found, "ours", "in_domain", "accuracy", "rare")
    assert rare is not None
    assert rare.mean == pytest.approx(1.7)
    task = comparison.results.task.model_copy(update={"prompts_per_tag": 99})
    all_count = comparison_of(comparison.results.model_copy(update={"task": task}), pictures, PATH)
    ends = value(all_count, "ours", "in_domain", "accuracy")
    assert ends is not None
    assert ends.mean == pytest.approx(0.7 + 2 / 14)  # no tag has 99, so every prompt counts


def test_differences_are_those_of_the_same_prompt_and_noise() -> None:
    """Pictures scatter by .5 around the truth, alike for both: the difference has no scatter at all."""
    found = difference(synthetic(replace(WORLD, noise=0.5)), "ours", "theirs", "in_domain", "accuracy")
    assert found is not None
    assert found.mean == pytest.approx(0.2)
    assert found.prompts is not None
    assert found.prompts.high - found.prompts.low < 1e-9


def test_a_picture_that_one_side_lacks_is_no_pair() -> None:
    comparison = synthetic(replace(WORLD, noise=0.5))
    pictures = comparison.pictures
    scores = pictures.metrics["accuracy"].copy()
    scores[(pictures.entry == "theirs") & (pictures.prompt < 4)] = np.nan
    scores[(pictures.entry == "ours") & (pictures.image == 1) & (pictures.prompt == 5)] = np.nan
    holed = comparison_of(comparison.results, replace(pictures, metrics={**pictures.metrics, "accuracy": scores}), PATH)
    found = difference(holed, "ours", "theirs", "in_domain", "accuracy")
    assert found is not None
    assert found.mean == pytest.approx(0.2)  # unpaired it would be off by what prompts 0 to 3 are above the others


def test_entries_are_read_at_their_own_guidance() -> None:
    cells = [cell.model_copy(update={"guidance": 4.5}) for cell in records(WORLD).cells]
    comparison = synthetic(WORLD, cells=cells, base_guidance=1.0)
    ours, base = (value(comparison, entry, "in_domain", "accuracy") for entry in ("ours", "base"))
    assert ours is not None
    assert base is not None
    assert (ours.mean, base.mean) == (pytest.approx(0.65), pytest.approx(0.3))
    assert curve_values(comparison, cells[0], "in_domain", "accuracy")[1] == pytest.approx([0.4, 0.6, 0.7])


def test_all_points_of_a_curve_are_over_the_same_pictures() -> None:
    """Checkpoint 1 has two prompts alone; the prompts differ by far more than the checkpoints do."""
    world = replace(WORLD, noise=2.0)
    pictures = pictures_of(records(world), world)
    few = pictures.where((pictures.checkpoint != 1) | (pictures.prompt < 2))
    found = comparison_of(records(world), join([few]), PATH)
    for cell, truth in zip(found.results.cells, ([0.4, 0.6, 0.7], [0.4, 0.5, 0.5]), strict=True):
        _, values = curve_values(found, cell, "in_domain", "accuracy")
        assert np.diff(values) == pytest.approx(np.diff(truth))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_expected_best_is_the_mean_over_all_choices(count: int, sign: float) -> None:
    scores = np.random.default_rng(0).normal(size=(3, 5))
    best = [
        np.mean([sign * max(sign * row[list(c)]) for c in itertools.combinations(range(5), count)]) for row in scores
    ]
    assert expected_best(scores, count, sign) == pytest.approx(best)


def test_more_pictures_of_the_base_are_for_the_best_of_n_alone() -> None:
    """The harness gives the base more pictures of a prompt; its mean stays that of those which every cell has."""
    pictures = pictures_of(records(WORLD), WORLD)
    chosen = (pictures.entry == "base") & (pictures.set == "held-out")
    more = pictures.where(chosen)
    high = {name: column + 1 for name, column in more.metrics.items()}
    extra = [replace(more, image=more.image + 2 * i, metrics=high) for i in (1, 2)]
    comparison = comparison_of(records(WORLD), join([pictures, *extra]), PATH)
    base = value(comparison, "base", "in_domain", "accuracy")
    assert base is not None
    assert base.mean == pytest.approx(0.4)
    # Two of six pictures are at .4, four at 1.4: a draw of two has none of the four in 1 of 15.
    assert best_of(comparison, "base", 2) == pytest.approx(1.4 - 1 / 15)
    assert best_of(comparison, "base", 6) == pytest.approx(1.4)
    assert best_of(comparison, "ours", 4) is None
    elsewhere = replace(extra[0], entry=np.full(len(more), "ours"), seed=np.zeros(len(more), dtype=np.int64))
    with pytest.raises(UserError, match="a prompt or image of set 'held-out'"):
        comparison_of(records(WORLD), join([pictures, elsewhere]), PATH)
