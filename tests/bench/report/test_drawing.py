"""Figures as text: colors from the page, honest axes, everything escaped. All data is synthetic."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from dgpo_bench.report.drawing import (
    Labels,
    Path,
    PointsRow,
    Scale,
    paths_figure,
    points_figure,
    value_span,
)
from dgpo_bench.report.figures import figure_groups, tradeoff_figures
from dgpo_bench.report.measures import value
from tests.bench.report.synthetic import World, synthetic

pytestmark = pytest.mark.fast

LABELS = Labels("a title", "across", "upwards")


def lines(svg: str) -> list[list[tuple[float, float]]]:
    """The points of every line."""
    found = re.findall(r'<polyline points="([^"]+)"', svg)
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in points.split())] for points in found]


def line(label: str, index: int, y: list[float], **more: bool) -> Path:
    return Path(label, index, np.arange(len(y), dtype=float), np.array(y), **more)


@pytest.mark.parametrize("values", [[0.7, 0.7115], [22.34, 22.7], [-0.5, -0.508], [1000.0, 1016.0]])
def test_a_change_of_little_does_not_fill_the_height(values: list[float]) -> None:
    low, high = value_span(values)
    assert (max(values) - min(values)) / (high - low) < 0.1
    assert low < min(values) <= max(values) < high
    drawn = lines(paths_figure(LABELS, [line("a", 0, values)]))[-1]
    height = max(y for points in lines(paths_figure(LABELS, [line("a", 0, values)])) for _, y in points) - 30
    assert abs(drawn[0][1] - drawn[1][1]) < 0.1 * height


def test_a_large_change_uses_the_height() -> None:
    low, high = value_span([0.1, 0.9])
    assert 0.8 / (high - low) > 0.85
    assert value_span([0.0, 0.0]) == (-0.5, 0.5)  # ticks that a person can read


def test_ticks_are_round_and_inside() -> None:
    for low, high in ((0.0, 1.0), (0.63, 0.79), (-3.2, 7.9), (0.0, 61_952.0), (1e-4, 2e-4)):
        ticks = Scale(low, high, 0, 100).ticks()
        assert 3 <= len(ticks) <= 12
        assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
        assert len({f"{tick:.3g}" for tick in ticks}) == len(ticks)


def test_colors_are_the_pages_and_shapes_tell_entries_apart() -> None:
    svg = paths_figure(LABELS, [line(f"entry {i}", i, [0.0, float(i)]) for i in range(6)], 0.5, "Base")
    assert not re.search(r"#[0-9a-fA-F]{3,6}\b|white|black|rgb", svg)
    assert {f"var(--entry-{i})" for i in range(6)} | {"var(--entry-base)", "var(--grid)"} <= set(
        re.findall(r"var\(--[\w-]+\)", svg)
    )
    assert "fill:currentColor" in svg  # text
    assert len(set(re.findall(r"stroke:var\(--entry-\d\);stroke-width:1.6[^\"]*", svg))) == 6
    assert svg.count("<text") >= 8


def test_the_strong_line_comes_last_and_is_thick() -> None:
    svg = paths_figure(LABELS, [line("ours", 0, [0, 1], strong=True), line("theirs", 1, [0, 1])])
    first, second = (
        svg.index("stroke:var(--entry-1);stroke-width:1.6"),
        svg.index("stroke:var(--entry-0);stroke-width:2.6"),
    )
    assert first < second


def test_labels_are_escaped_and_the_figure_is_xml() -> None:
    nasty = '</svg><script>"&$'
    svg = paths_figure(Labels(nasty, nasty, nasty), [line(nasty, 0, [0, 1])], 0.5, nasty)
    svg += points_figure(Labels(nasty, nasty, ""), [PointsRow(nasty, 0, [0.1], 0.1, (0.0, 0.2))])
    for part in svg.split("</svg>"):
        if part.strip():
            root = ElementTree.fromstring(part + "</svg>")
            assert root.attrib["aria-label"] == nasty
            assert nasty in [text.text for text in root.iter("text")]
    assert "<script" not in svg


WORLD = World({(name, s): c for name, c in (("ours", [0.4, 0.6, 0.7]), ("theirs", [0.4, 0.5, 0.5])) for s in (0, 1)})


def test_what_the_gain_cost_ends_where_the_table_ends() -> None:
    """Both at guidance 1, where they are .05 lower than their curves: the large marks are at the table's values."""
    cells = [cell.model_copy(update={"guidance": 1.0}) for cell in synthetic(WORLD).results.cells]
    comparison = synthetic(WORLD, cells=cells)
    ends = [value(comparison, name, "in_domain", "accuracy") for name in ("ours", "theirs", "base")]
    means = [end.mean for end in ends if end is not None]
    assert means == pytest.approx([0.65, 0.45, 0.4])
    figure = tradeoff_figures(comparison)[0]
    big = [float(x) for x in re.findall(r'<circle cx="([\d.]+)" cy="[\d.]+" r="6"', figure)]
    shown = [path for path in lines(figure) if len(path) == 3]
    assert [round(path[-1][0], 1) for path in shown[1:]] == [round(big[0], 1)]  # the challenger's, drawn last
    # Across, .65 to .45 to .4 keep their ratio whatever the axis.
    (ours,), (theirs,) = [path[-1:] for path in reversed(shown)]
    star = next(s for s in re.findall(r'<polygon points="([^"]+)"', figure) if len(s.split()) == 10)
    base = np.mean([float(corner.split(",")[0]) for corner in star.split()])
    assert (theirs[0] - base) / (ours[0] - base) == pytest.approx(0.2, abs=0.02)


def test_every_figure_that_is_promised_is_there() -> None:
    groups = {group.title: group for group in figure_groups(synthetic(WORLD))}
    titles = [re.findall(r'aria-label="([^"]+)"', figure)[0] for group in groups.values() for figure in group.figures]
    for cost in ("measured FLOPs of the denoiser", "denoiser evaluations", "training time, seconds", "images scored"):
        assert f"Accuracy against {cost}" in titles
    for title in (
        "Accuracy against optimizer steps",
        "Accuracy against drift",
        "Accuracy, out-of-domain prompts, against Accuracy",
        "Diversity, in domain, against Accuracy",
        "Accuracy against denoiser evaluations, rare",
        "Accuracy, in domain, by method and seed",
        "Best setting so far against trials",
    ):
        assert title in titles
    dots = re.findall(r'<circle cx="[\d.]+" cy="[\d.]+" r="3.2"', groups["Accuracy, every seed"].figures[0])
    assert len(dots) == 2  # one for each seed of ours
