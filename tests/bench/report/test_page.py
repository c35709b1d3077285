"""The page as a browser would meet it: balanced, self-contained, escaped, the same twice. All data is synthetic."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dgpo_bench.report.page import curves_csv, interval_note, render_report, write_report
from dgpo_bench.results import Evaluation, Metric, Results, Run, write_results
from dgpo_plugin.common.errors import UserError
from tests.bench.conftest import MakeResults

pytestmark = pytest.mark.fast

VOID = {"meta", "link", "br", "hr", "img", "input", "col", "base", "area", "source", "wbr", "embed", "track"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps attributes, ids and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]


@pytest.fixture
def full(three_seeds: Results, tmp_path: Path) -> Results:
    """Three seeds, two algorithms, settings and a gallery whose pictures lie in ``tmp_path``."""
    for i, name in enumerate(("base", "dgpo", "flow-grpo")):
        pixels = np.full((4, 8, 3), 80 * i, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return three_seeds.model_copy(
        update={
            "gallery": {name: f"{name}.png" for name in ("dgpo", "base", "flow-grpo")},
            "gallery_prompts": ["a <red> circle", "two & three"],
            "settings": {
                "dgpo": {"seed": 0, "algorithm": {"name": "dgpo", "beta": 100.0}},
                "flow-grpo": {"seed": 0, "algorithm": {"name": "flow-grpo", "clip": 1e-4}},
            },
        }
    )


def test_the_checker_itself_can_fail() -> None:
    for broken in ("<p>", "<p></div>", "</p>"):
        with pytest.raises(AssertionError):
            Page(broken)


def test_tags_are_balanced_and_ids_unique(full: Results, tmp_path: Path) -> None:
    page = Page(render_report(full, tmp_path))
    ids = page.values("id")
    assert len(ids) > 20
    assert len(ids) == len(set(ids))
    references = [value for value in page.values("href") if value.startswith("#")]
    references += re.findall(r"url\((#[^)]+)\)", render_report(full, tmp_path))
    assert references
    drawn = [f"Score against {cost}, by algorithm" for cost in ("training seconds", "denoiser evaluations")]
    assert [label for label in page.values("aria-label") if "by algorithm" in label] == [
        *drawn,
        "Oddness against Score, by algorithm",
    ]
    assert {reference[1:] for reference in references} <= set(ids)


def test_nothing_is_fetched(full: Results, tmp_path: Path) -> None:
    html = render_report(full, tmp_path)
    page = Page(html)
    for value in page.values("src") + page.values("href") + page.values("xlink:href"):
        assert value.startswith(("data:", "#")), value[:80]
    assert not {tag for tag, _, _ in page.attributes} & {"script", "iframe", "object"}
    assert re.search(r"https?://|@import|url\((?!#)", html) is None


def test_two_renders_are_equal(full: Results, tmp_path: Path) -> None:
    assert render_report(full, tmp_path) == render_report(full, tmp_path)


def test_everything_stands_in_its_order(full: Results, tmp_path: Path) -> None:
    text = Page(render_report(full, tmp_path)).text
    order = [
        "DGPO reached the final score of Flow-GRPO with 2.6x fewer",
        "Score against cost",
        "How soon is the baseline's final value reached?",
        "In training time",
        "In denoiser evaluations",
        "Where everyone ended",
        "In domain",
        "Out of domain",
        "A made-up oddness.",
        "What the gain cost",
        "Samples",
        "Everything that differs",
        "algorithm.beta",
        "All settings of DGPO",
        "published by the papers on SD3.5-M, not measured here",
        "23.89",
        "Provenance",
        "dgpo-bench report",
    ]
    places = [text.index(part, 0) for part in order[:1]]
    for part in order[1:]:
        places.append(text.index(part, places[-1]))
    assert "Incomplete" not in text


def test_gallery_is_inline_and_base_comes_first(full: Results, tmp_path: Path) -> None:
    page = Page(render_report(full, tmp_path))
    pictures = page.values("src")
    assert len(pictures) == 3
    assert all(value.startswith("data:image/png;base64,") for value in pictures)
    assert page.values("alt") == [
        f"Samples of {name}, one per prompt: a <red> circle; two & three" for name in ("Base", "DGPO", "Flow-GRPO")
    ]


def test_special_characters_are_escaped(make_results: MakeResults, tmp_path: Path) -> None:
    nasty = Metric(
        label='</svg><script>x</script> & "$a$"', domain="in", better="higher", description="<b>bold</b> & 'so'"
    )
    odd = Metric(label="</text><img src=x>", domain="out", better="lower", description="")
    results = make_results(
        {("dgpo", 0): [0.0, 0.5], ("<i>", 0): [0.0, 0.4]},
        metrics={"score": nasty, "odd": odd},
        settings={"dgpo": {"<u>": "<s>"}, "<i>": {"<u>": "</pre><script>"}},
    )
    page = Page(render_report(results, tmp_path))
    assert not {tag for tag, _, _ in page.attributes} & {"script", "img", "b", "i", "u", "s"}
    assert not page.values("src")
    assert "<b>bold</b> & 'so'" in page.text
    assert page.text.count('</svg><script>x</script> & "$a$" (higher is better)') >= 3  # the axes, dollars and all


def test_a_missing_picture_is_named(full: Results, tmp_path: Path) -> None:
    (tmp_path / "dgpo.png").unlink()
    with pytest.raises(UserError, match=r"dgpo\.png: No such file"):
        render_report(full, tmp_path)
    (tmp_path / "dgpo.png").write_text("<svg/>")
    with pytest.raises(UserError, match=r"dgpo\.png: not a PNG"):
        render_report(full, tmp_path)


@pytest.mark.parametrize("name", ["../secret.png", "pictures/../../secret.png", "link.png", "{absolute}"])
def test_a_picture_from_elsewhere_is_not_passed_on(name: str, full: Results, tmp_path: Path) -> None:
    folder, secret = tmp_path / "comparison", tmp_path / "secret.png"
    (folder / "pictures").mkdir(parents=True)
    secret.write_bytes((tmp_path / "dgpo.png").read_bytes())
    (folder / "link.png").symlink_to(secret)
    results = full.model_copy(update={"gallery": {"base": name.format(absolute=secret)}})
    with pytest.raises(UserError, match=r"secret\.png|link\.png: lies outside .*comparison"):
        render_report(results, folder)


def test_nothing_is_written_of_results_that_cannot_be_drawn(full: Results, tmp_path: Path) -> None:
    write_results(full, tmp_path / "results.json")
    (tmp_path / "dgpo.png").unlink()
    with pytest.raises(UserError, match=r"dgpo\.png"):
        write_report(tmp_path)
    assert not (tmp_path / "curves.csv").exists()
    assert not (tmp_path / "report.html").exists()


def test_write_report_reads_the_folder(full: Results, tmp_path: Path) -> None:
    write_results(full, tmp_path / "results.json")
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == render_report(full, tmp_path)
    assert (tmp_path / "curves.csv").read_text(encoding="utf-8") == curves_csv(full)
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match=r"results\.json"):
        write_report(tmp_path / "elsewhere")


def test_an_incomplete_comparison_is_announced(make_results: MakeResults, tmp_path: Path) -> None:
    results = make_results({("dgpo", 0): [0.0, 0.5], ("flow-grpo", 1): [0.0, 0.5]}, complete=False)
    text = Page(render_report(results, tmp_path)).text
    assert "Missing: DGPO seed 1, Flow-GRPO seed 0." in text
    assert "No seed has finished for both DGPO and another algorithm." in text


@pytest.mark.parametrize(
    "curves",
    [{}, {("dgpo", 0): []}, {("dgpo", 0): [0.1]}, {("flow-grpo", 0): [0.1, 0.2]}],
    ids=["no run", "no evaluation", "only the base", "no DGPO"],
)
def test_a_bare_comparison_still_renders(
    make_results: MakeResults, tmp_path: Path, curves: dict[tuple[str, int], list[float]]
) -> None:
    Page(render_report(make_results(curves), tmp_path))


@pytest.mark.parametrize(
    ("seeds", "words"),
    [(1, "no interval"), (2, "about 50 %"), (3, "about 75 %"), (5, "rough guide"), (10, "10,000 resamples.")],
)
def test_the_interval_note_is_honest(make_results: MakeResults, seeds: int, words: str) -> None:
    note = interval_note(make_results({("dgpo", seed): [0.0, 0.5] for seed in range(seeds)}))
    assert words in note
    assert ("rough guide" in note) == (1 < seeds < 10)


def test_curves_hold_every_evaluation(make_results: MakeResults) -> None:
    results = make_results({("dgpo", 4): [0.1, 0.25]})
    bare = Evaluation(iteration=2, seconds=20, denoiser_evaluations=140, metrics={"odd": 1})
    runs = [*results.runs, Run(algorithm="flow-grpo", seed=5, adapter="", evaluations=[bare])]
    rows = list(csv.reader(curves_csv(results.model_copy(update={"runs": runs})).splitlines()))
    assert rows == [
        ["algorithm", "seed", "iteration", "seconds", "denoiser_evaluations", "score", "odd"],
        ["dgpo", "4", "0", "0.0", "0", "0.1", "1.9"],
        ["dgpo", "4", "1", "10.0", "70", "0.25", "1.75"],
        ["flow-grpo", "5", "2", "20.0", "140", "", "1.0"],
    ]


def test_the_challenger_is_whom_the_results_say(make_results: MakeResults, tmp_path: Path) -> None:
    """Nothing in the report knows an algorithm by its name."""
    curves = {("a", 0): [0.1, 0.2, 0.4], ("mine", 0): [0.1, 0.4, 0.8]}
    labels, colors = {"mine": "My Own"}, {"mine": "#123456"}
    results = make_results(curves, challenger="mine", labels=labels, colors=colors, settings={"mine": {}, "a": {}})
    html = render_report(results, tmp_path)
    text = Page(html).text
    assert "My Own reached the final score of a with" in text
    assert "My Own less a" in text
    assert "A ratio above 1 means that My Own was sooner." in text
    assert "All settings of My Own" in text
    assert 'style="background:#123456"' in html
    for name in ("dgpo", "DGPO", "Flow-GRPO"):
        assert name not in html.partition("<h2>Published results</h2>")[0]
