"""The page as a browser would meet it: balanced, self-contained, escaped, the same twice. All data is synthetic."""

from __future__ import annotations

import csv
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dgpo_bench.pictures import PICTURES_FILE
from dgpo_bench.records import EntryRecord, MetricRecord, write_record
from dgpo_bench.report.comparison import read_comparison
from dgpo_bench.report.gallery import gallery
from dgpo_bench.report.page import curves_csv, entry_colors, interval_note, write_report
from dgpo_plugin.common.errors import UserError
from tests.bench.report.browser import CHROMIUM, browser, fits_and_follows
from tests.bench.report.synthetic import METRICS, World, records, synthetic, write_synthetic
from tests.imports import imported_by

VOID = {"meta", "link", "br", "hr", "img", "input", "col", "base", "area", "source", "wbr", "embed", "track"}
CURVES = {("ours", s): [0.4, 0.6, 0.7] for s in (0, 1)} | {("theirs", s): [0.4, 0.5, 0.5] for s in (0, 1)}
OUTPUT = {"report.html", "curves.csv", "tables.md", "tables.tex"}


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that was drawn; tests read it and change copies."""
    made = tmp_path_factory.mktemp("comparison")
    write_synthetic(made, World(CURVES, own=0.02, images=4))
    write_report(made)
    return made


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.fast
def test_the_checker_itself_can_fail() -> None:
    for broken in ("<p>", "<p></div>", "</p>"):
        with pytest.raises(AssertionError):
            Page(broken)


@pytest.mark.fast
def test_tags_are_balanced_ids_unique_and_nothing_is_fetched(folder: Path) -> None:
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    ids = page.values("id")
    assert len(ids) == len(set(ids)) == 3  # the stops of the slider
    assert set(page.values("for")) == set(ids)
    for value in page.values("src"):
        assert value.startswith("data:image/png;base64,"), value[:80]
    links = {"data:,", "results.json", PICTURES_FILE, "curves.csv", "tables.md", "tables.tex"}
    assert set(page.values("href")) == links
    assert all((folder / link).is_file() for link in links - {"data:,"})
    assert not {tag for tag, _, _ in page.attributes} & {"script", "iframe", "object"}
    assert re.search(r"https?://|@import|url\(", html) is None


@pytest.mark.fast
def test_the_same_folder_gives_the_same_bytes(folder: Path, copied: Path) -> None:
    for name in OUTPUT:
        (copied / name).unlink()
    write_report(copied)
    for name in OUTPUT:
        drawn = (copied / name).read_text(encoding="utf-8").replace("report copy", f"report {folder.name}")
        assert drawn == (folder / name).read_text(encoding="utf-8"), name


@pytest.mark.fast
def test_everything_stands_in_its_order(folder: Path) -> None:
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    order = [
        "OURS at guidance 3, against the untrained base at its best guidance (3): better in domain",
        "on out-of-domain prompts",
        "OURS at guidance 3, against THEIRS",
        "Judge is missing: no server at 127.0.0.1:1.",
        "These adapters, new prompts",
        "To show a difference of 0.03",
        "Where everyone ended",
        "In domain",
        "Out-of-domain prompts",
        "Metrics not trained on",
        "Metrics that learnt from the same data",
        "Statistics of pictures",
        "trained on",
        "Gain over the untrained base at its best guidance",
        "OURS less the others",
        "A new run",
        "A made-up taste. Not trained on. Version 1, weights ab12.",
        "Accuracy at every guidance, in domain",
        "20 evaluations a picture",
        "How soon",
        "In measured FLOPs of the denoiser",
        "above 1: OURS is sooner",
        "In training time",
        "Accuracy by kind of prompt, in domain",
        "2 prompts, not in the headline",
        "Best of N pictures",
        "What a run cost",
        "GPU-hours",
        "Peak memory, GiB",
        "Drawn from",
        "Accuracy against cost",
        "Accuracy against drift",
        "What the gain cost",
        "Samples",
        "70 evaluations",
        "Settings that differ",
        "algorithm.beta",
        "All settings of OURS",
        "published by the papers on SD3.5-M, not measured here",
        "Provenance",
        "dgpo-bench compare synthetic",
        "dgpo-bench report",
    ]
    place = 0
    for part in order:
        place = text.find(part, place)
        assert place >= 0, part
    assert "Incomplete" not in text


@pytest.mark.fast
def test_the_slider_shows_one_picture_of_everybody_at_each_stop(folder: Path) -> None:
    html = (folder / "report.html").read_text(encoding="utf-8")
    shown = [value for tag, name, value in Page(html).attributes if (tag, name) == ("img", "class")]
    assert shown == ["at-0 at-1 at-2", "at-0", "at-1", "at-2", "at-0", "at-1", "at-2"]  # the base has one for all
    assert html.count(" checked") == 1
    for stop in range(3):
        assert f"#stop-{stop}:checked ~ .scroll .at-{stop} {{ display: block; }}" in html


@pytest.mark.fast
def test_special_characters_are_escaped_everywhere(tmp_path: Path) -> None:
    nasty = '</svg><script>x</script> & "$a$" |_%'
    metric = MetricRecord(label=nasty, description=nasty, better="higher", relation="trained", version=nasty)
    entries = {
        name: EntryRecord(label=nasty + name, color="#123456", settings={"<u>": nasty + name})
        for name in ("ours", "theirs")
    }
    world = World(CURVES, tags={nasty: 7, "b": 6})
    write_synthetic(tmp_path, world, entries=entries, metrics={**METRICS, "accuracy": metric}, command=nasty)
    write_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not {tag for tag, _, _ in page.attributes} & {"script", "u"}
    assert page.text.count(nasty) > 10
    for line in (tmp_path / "tables.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            assert "<script" not in re.sub(r"\\.", "", line)
    tex = (tmp_path / "tables.tex").read_text(encoding="utf-8")
    for line in tex.splitlines()[1:]:
        assert len(re.findall(r"(?<!\\)&", line)) in (0, *range(1, 40))
        assert not re.search(r"(?<!\\)[%_#]", line)
    assert tex.count("\\begin{table}") == tex.count("\\end{table}") > 5


@pytest.mark.fast
def test_every_line_of_a_table_has_as_many_cells_as_its_head(folder: Path) -> None:
    for block in (folder / "tables.md").read_text(encoding="utf-8").split("## ")[1:]:
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len(rows) >= 2
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    for block in (folder / "tables.tex").read_text(encoding="utf-8").split("\\begin{table}")[1:]:
        body = block.partition("\\midrule")[2].partition("\\bottomrule")[0]
        width = len(re.findall(r"\{l(r+)\}", block)[0])
        assert all(len(re.findall(r"(?<!\\)&", line)) == width for line in body.strip().splitlines())


@pytest.mark.fast
@pytest.mark.parametrize("name", ["../secret.png", "pictures/../../secret.png", "link.png", "{absolute}"])
def test_a_picture_from_elsewhere_is_not_passed_on(name: str, copied: Path) -> None:
    secret = copied.parent / "secret.png"
    (copied / "pictures").mkdir()
    secret.write_bytes((copied / "base.png").read_bytes())
    (copied / "link.png").symlink_to(secret)
    results = records(World(CURVES)).model_copy(update={"galleries": {"base": [name.format(absolute=secret)]}})
    with pytest.raises(UserError, match=r"secret\.png|link\.png: lies outside .*copy"):
        gallery(results, copied)


@pytest.mark.fast
@pytest.mark.parametrize("broken", ["missing picture", "no PNG", "no pictures", "color", "no results"])
def test_nothing_is_written_of_what_cannot_be_drawn(broken: str, copied: Path) -> None:
    for name in OUTPUT:
        (copied / name).unlink()
    if broken == "missing picture":
        (copied / "ours-1.png").unlink()
    elif broken == "no PNG":
        (copied / "ours-1.png").write_text("<svg/>")
    elif broken == "no pictures":
        (copied / PICTURES_FILE).unlink()
    elif broken == "no results":
        (copied / "results.json").unlink()
    else:
        results = read_comparison(copied).results
        entries = {n: e.model_copy(update={"color": "red;} body {x:y"}) for n, e in results.entries.items()}
        write_record(results.model_copy(update={"entries": entries}), copied / "results.json")
    with pytest.raises(UserError) as raised:
        write_report(copied)
    assert "\n" not in str(raised.value)
    assert not OUTPUT & {path.name for path in copied.iterdir()}


@pytest.mark.fast
def test_results_that_are_passed_on_without_their_pictures_are_drawn_without(copied: Path) -> None:
    for file in copied.glob("*.png"):
        file.unlink()
    write_report(copied)
    assert "There are no samples here" in Page((copied / "report.html").read_text(encoding="utf-8")).text


@pytest.mark.fast
@pytest.mark.parametrize(
    "curves",
    [{}, {("ours", 0): []}, {("ours", 0): [0.4]}, {("ours", 0): [0.4, 0.5]}, {("ours", 0): [0.4, 0.5], ("b", 1): []}],
    ids=["no cell", "no checkpoint", "only the base", "one entry", "no shared seed"],
)
def test_a_bare_comparison_still_renders(curves: dict[tuple[str, int], list[float]], tmp_path: Path) -> None:
    write_synthetic(tmp_path, World(curves), complete=False)
    write_report(tmp_path)
    assert "Incomplete" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text


@pytest.mark.fast
def test_curves_hold_every_checkpoint_and_its_costs(folder: Path) -> None:
    rows = list(csv.DictReader((folder / "curves.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["entry"], row["seed"], row["checkpoint"]) for row in rows[:4]] == [
        ("ours", "0", "0"),
        ("ours", "0", "1"),
        ("ours", "0", "2"),
        ("ours", "1", "0"),
    ]
    last = rows[2]
    costs = [last[axis] for axis in ("iteration", "steps", "denoiser_evaluations", "flops", "images_scored")]
    assert costs == ["2", "4", "140", "20000000000.0", "8"]
    assert float(last["total_seconds"]) == 20
    assert float(last["accuracy in_domain"]) == pytest.approx(0.7, abs=0.02)
    assert float(last["accuracy out_of_domain"]) == pytest.approx(0.8, abs=0.02)
    assert last["judge in_domain"] == ""
    assert curves_csv(read_comparison(folder)) == (folder / "curves.csv").read_text(encoding="utf-8")


@pytest.mark.fast
def test_colors_are_the_entries_and_the_others_get_what_is_free() -> None:
    entries = {n: EntryRecord(label=n, color=c, settings={}) for n, c in (("a", ""), ("b", "#d55e00"), ("c", ""))}
    assert entry_colors(records(World(CURVES)).model_copy(update={"entries": entries})) == [
        "#0072B2",
        "#d55e00",
        "#009E73",
    ]


@pytest.mark.fast
@pytest.mark.parametrize(("seeds", "words"), [(1, "of a method are 1"), (4, "of a method are 4"), (5, "over seeds).")])
def test_the_interval_note_says_what_few_seeds_mean(seeds: int, words: str) -> None:
    note = interval_note(synthetic(World({("ours", seed): [0.4, 0.5] for seed in range(seeds)})))
    assert words in note
    assert ("only the points" in note) == (seeds < 5)


@pytest.mark.slow
def test_a_real_browser_shows_it_on_a_phone_and_in_the_dark(folder: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("NO CHROMIUM HERE: the page was not looked at in a browser")
    color = "getComputedStyle(document.querySelector('figure.figure svg text')).fill.match(/[0-9.]+/g).map(Number)"
    with browser() as tab:
        for scheme, dark in (("light", False), ("dark", True)):
            fits_and_follows(tab, folder / "report.html", scheme)
            assert (min(tab.evaluate(color)[:3]) > 180) == dark
            sticky = (
                "(() => {const boxes = [...document.querySelectorAll('.scroll')];"
                "const box = boxes.find(e => e.scrollWidth > e.clientWidth + 50);"
                "box.scrollLeft = 1000; const r = box.querySelector('tbody th').getBoundingClientRect();"
                "return r.left >= box.getBoundingClientRect().left - 1 && r.left < 60})()"
            )
            assert tab.evaluate(sticky) is True
            ratio = (
                "(() => {const heads = [...document.querySelectorAll('thead th')];"
                "const h = heads.find(e => e.textContent.startsWith('Ratio'));"
                "const r = h.getBoundingClientRect(); return r.left > 0 && r.right <= 390})()"
            )
            assert tab.evaluate(ratio) is True
            visible = "[...document.querySelectorAll('.strips img')].filter(e => e.offsetParent).map(e => e.className)"
            assert tab.evaluate(visible) == ["at-0 at-1 at-2", "at-2", "at-2"]
            tab.evaluate("document.querySelector('label[for=stop-1]').click()")
            assert tab.evaluate(visible) == ["at-0 at-1 at-2", "at-1", "at-1"]


def test_drawing_a_comparisons_page_imports_neither_diffusers_nor_transformers(tmp_path: Path) -> None:
    write_synthetic(tmp_path, World(CURVES))
    draw = (
        "from pathlib import Path\nfrom dgpo_bench.finished_commands import draw_again\ndraw_again(Path(sys.argv[1]))"
    )
    assert imported_by(draw, str(tmp_path)) == ("", [])
