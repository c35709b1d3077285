"""The figures: nothing of the user's reaches them, and every algorithm is told apart. All data is synthetic."""

from __future__ import annotations

import re

import matplotlib
import pytest

from dgpo_bench.report.figures import algorithm_colors, metric_figure, tradeoff_figure
from dgpo_bench.results import Results
from tests.bench.conftest import MakeResults

pytestmark = pytest.mark.fast


def test_drawing_leaves_matplotlib_as_it_was(three_seeds: Results) -> None:
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 17, "xtick.labelsize": 17}):
        changed = metric_figure(three_seeds, "score", "seconds", "a")
        assert matplotlib.rcParams["font.size"] == 17
        assert matplotlib.rcParams["svg.fonttype"] == "path"
    # And no setting of the user's reaches the figure.
    assert changed == metric_figure(three_seeds, "score", "seconds", "a")


def test_each_algorithm_keeps_one_color_and_the_figures_show_all(three_seeds: Results) -> None:
    five = ["dgpo", "flow-grpo", "flow-grpo-fast", "another", "a-third"]
    palette = algorithm_colors(three_seeds.model_copy(update={"algorithms": five}))
    assert len(set(palette.values())) == 5
    for figure in (metric_figure(three_seeds, "score", "seconds", "a"), tradeoff_figure(three_seeds, "odd", "b")):
        for label in ("DGPO", "Flow-GRPO", "Base"):
            assert f">{label}</text>" in figure
        assert palette["dgpo"].lower() in figure
        assert palette["flow-grpo"].lower() in figure


def test_colors_are_the_presets_and_the_others_get_what_is_free(three_seeds: Results) -> None:
    results = three_seeds.model_copy(update={"colors": {"flow-grpo": "#d55e00", "somebody-else": "#009E73"}})
    palette = algorithm_colors(results)
    assert palette == {"dgpo": "#0072B2", "flow-grpo": "#d55e00"}  # the first of the palette is taken
    figure = metric_figure(results, "score", "seconds", "a")
    assert all(color.lower() in figure for color in palette.values())


@pytest.mark.parametrize("challenger", ["dgpo", "flow-grpo"])
def test_the_challenger_stands_out_and_is_drawn_last(three_seeds: Results, challenger: str) -> None:
    """Whoever it is: its line alone is thick and whole, and comes after the others'."""
    results = three_seeds.model_copy(update={"challenger": challenger})
    figure = metric_figure(results, "score", "seconds", "a")
    color = algorithm_colors(results)[challenger].lower()
    thick = re.findall(r"stroke: (#\w+); stroke-width: 2\.2", figure)
    assert set(thick) == {color}
    others = [match.start() for match in re.finditer(r"stroke-width: 1\.5", figure)]
    assert others
    assert min(others) < figure.index("stroke-width: 2.2")


def test_one_seed_is_drawn_without_a_band(make_results: MakeResults) -> None:
    curves = {("dgpo", 0): [0.0, 0.5], ("dgpo", 1): [0.0, 0.7]}
    assert "FillBetweenPolyCollection" in metric_figure(make_results(curves), "score", "seconds", "a")
    del curves[("dgpo", 1)]
    alone = metric_figure(make_results(curves), "score", "seconds", "a")
    assert "FillBetweenPolyCollection" not in alone
    assert "stroke-opacity" not in alone  # nor a thin line under the thick one
