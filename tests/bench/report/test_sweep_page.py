"""The page of a sweep, of made-up pictures whose true effects are known."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dgpo_bench.pictures import PICTURES_FILE, Pictures, join, write_pictures
from dgpo_bench.records import NO_SEED, MetricRecord, PromptRecord, PromptSetRecord, Sampling, TaskRecord, write_record
from dgpo_bench.report.drawing import Labels, paths_figure
from dgpo_bench.report.drawing import Path as Line
from dgpo_bench.report.sweep_page import axis_figures, axis_sentence, axis_tables, verdict, write_sweep_report
from dgpo_bench.report.sweep_values import SweepView, read_sweep_view, view_of
from dgpo_bench.sweep_records import SWEEP_FILE, Setting, SweepRecord
from dgpo_plugin.common.errors import UserError
from tests.bench.report.browser import CHROMIUM, browser, fits_and_follows
from tests.bench.report.synthetic import METRICS
from tests.bench.report.test_page import Page

CENTER = Setting(strength=1, steps=20, guidance=3)
STRENGTHS, STEPS, GUIDANCES = [0.5, 1.0, 1.5], [10.0, 20.0], [1.0, 3.0]
Truth = Callable[[Setting, str], float]


def truth(setting: Setting, role: str) -> float:
    """Best at strength 1, guidance 3; more steps do not matter; out of domain falls with strength from 1.5 on."""
    base = {1.0: 0.3, 3.0: 0.4}[setting.guidance] + 0.05 * (role == "out_of_domain")
    if not setting.strength:
        return base
    gains = {0.5: 0.1, 1.0: 0.2, 1.5: 0.05} if role == "in_domain" else {0.5: 0.0, 1.0: 0.0, 1.5: -0.2}
    return base + gains[setting.strength]


def records(name: str = "mine", text: str = "a cat", **changes: Any) -> SweepRecord:
    tried = [CENTER.at("strength", each) for each in STRENGTHS]
    tried += [CENTER.at("steps", each) for each in STEPS] + [CENTER.at("guidance", each) for each in GUIDANCES]
    settings = list(dict.fromkeys(each for one in tried for each in (one.base(), one)))
    prompts = [PromptRecord(text=f"{text} {number}", tag="ab"[number % 2]) for number in range(12)]
    sampling: dict[str, Any] = {
        "sampler": "euler",
        "steps": 20,
        "guidance": 3,
        "guidances": GUIDANCES,
        "precision": "fp32",
    }
    values: dict[str, Any] = {
        "created": "2025-01-01T00:00:00Z",
        "command": "dgpo-bench sweep synthetic",
        "preset": "synthetic",
        "git_hash": None,
        "packages": {},
        "machine": {"processor": "imaginary"},
        "task": TaskRecord(name="made-up", version=1, headline="accuracy"),
        "sampling": Sampling(**sampling, width=8, height=8),
        "adapter": name,
        "adapter_sha256": "ab12",
        "axes": {"strength": STRENGTHS, "steps": STEPS, "guidance": GUIDANCES},
        "center": CENTER,
        "base_guidance": 3.0,
        "settings": settings,
        "metrics": METRICS,
        "sets": {
            "validation": PromptSetRecord(role="in_domain", prompts=prompts, images_per_prompt=2),
            "unseen": PromptSetRecord(role="out_of_domain", prompts=prompts, images_per_prompt=2),
        },
        "denoiser_evaluations": 1000,
        "galleries": {each.name: f"settings/{each.name}.png" for each in settings},
        "gallery_prompts": [text, "two & 3"],
        "complete": True,
    }
    return SweepRecord(**{**values, **changes})


def pictures_of(record: SweepRecord, true: Truth = truth, noise: float = 0.02) -> Pictures:
    """The same noise for every setting, and a little of its own."""
    parts = []
    for number, setting in enumerate(record.settings):
        for name, prompts in record.sets.items():
            shape = len(prompts.prompts), prompts.images_per_prompt
            common = np.random.default_rng(len(name)).normal(0, 0.2, shape)
            own = np.random.default_rng(number + 1).normal(0, noise, shape)
            score = (true(setting, prompts.role) + common + own).ravel()
            rows = np.indices(shape).reshape(2, -1)
            count = len(score)
            parts.append(
                Pictures(
                    entry=np.full(count, setting.entry),
                    seed=np.full(count, NO_SEED, dtype=np.int64),
                    checkpoint=np.zeros(count, dtype=np.int64),
                    guidance=np.full(count, setting.guidance),
                    set=np.full(count, name),
                    prompt=rows[0],
                    image=rows[1],
                    metrics={"accuracy": score, "taste": 5 - score, "diversity": 1 - score},
                )
            )
    return join(parts)


def view(true: Truth = truth, noise: float = 0.02, **changes: Any) -> SweepView:
    record = records(**changes)
    return view_of(record, pictures_of(record, true, noise), Path("made-up") / PICTURES_FILE)


def write(folder: Path, record: SweepRecord) -> None:
    (folder / "settings").mkdir(parents=True)
    for number, file in enumerate(record.galleries.values()):
        Image.fromarray(np.full((4, 8, 3), 10 * number, dtype=np.uint8)).save(folder / file)
    write_record(record, folder / SWEEP_FILE)
    write_pictures(pictures_of(record), folder / PICTURES_FILE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sweep") / "made"
    write(made, records())
    write_sweep_report(made)
    return made


@pytest.mark.fast
def test_differences_are_paired_by_prompt_and_noise() -> None:
    """Pictures differ by .2 among themselves, and settings by .02: unpaired, an interval would be five times that."""
    found = view().difference(CENTER, CENTER.base(), "in_domain", "accuracy")
    assert found is not None
    assert found.prompts is not None
    assert found.mean == pytest.approx(0.2, abs=0.02)
    assert 0.15 < found.prompts.low < found.mean < found.prompts.high < 0.25
    value = view().value(CENTER, "in_domain", "accuracy")
    assert value is not None
    assert value.prompts is not None
    assert value.prompts.high - value.prompts.low > 0.1


@pytest.mark.fast
def test_the_sentences_say_what_is_best_what_is_not_sure_and_what_it_costs() -> None:
    sentence = axis_sentence(view(), "strength")
    assert "Accuracy in domain is best at 1 (" in sentence
    assert "not clearly better" not in sentence
    assert sentence.endswith("On out-of-domain prompts worse than the base at 1.5.")
    assert "not clearly better than" in axis_sentence(view(noise=0.05), "steps")
    said = verdict(view())
    assert said.startswith(
        "mine at strength 1, 20 steps, guidance 3, against the untrained base at its best guidance (3)"
    )
    assert ": better in domain, " in said

    def higher(setting: Setting, role: str) -> float:
        return truth(setting, role) + 0.5 * (setting.strength == 0.5)

    assert "best at 0.5" in axis_sentence(view(higher), "strength")
    assert "surely better than 1 (+0." in axis_sentence(view(higher), "strength")


@pytest.mark.fast
def test_where_less_is_better_the_least_is_best() -> None:
    metrics = {**METRICS, "accuracy": METRICS["accuracy"].model_copy(update={"better": "lower"})}
    found = view(metrics=metrics)
    assert "is best at 0, the base (0." in axis_sentence(found, "strength")
    assert ": worse in domain, " in verdict(found)


@pytest.mark.fast
def test_tables_have_every_metric_and_the_base_beside_every_value() -> None:
    values, gains = axis_tables(view(), "steps")
    assert [row.label for row in values.rows] == ["10 steps, base", "10 steps", "20 steps, base", "20 steps"]
    assert [row.note for row in values.rows][:3:2] == ["20 evaluations a picture", "40 evaluations a picture"]
    groups = dict.fromkeys(column.group for column in values.columns)
    assert list(groups) == ["In domain", "Out-of-domain prompts", "Metrics not trained on", "Statistics of pictures"]
    assert [row.label for row in gains.rows] == ["10 steps", "20 steps"]
    assert gains.columns[0].group == "Less the base at its best guidance (3)"
    assert {len(row.cells) for row in gains.rows} == {len(gains.columns)}
    assert gains.rows[0].cells[0].note.endswith("better")
    assert [row.label for row in axis_tables(view(), "strength")[0].rows] == ["0, the base", "0.5", "1", "1.5"]


@pytest.mark.fast
def test_curves_are_drawn_of_every_metric_with_their_intervals() -> None:
    figures = axis_figures(view(), "guidance")
    assert len(figures) == 4  # the headline twice; taste and diversity
    for figure in figures:
        assert figure.count("stroke-width:4;") == 4  # two settings of the adapter and of the base
        assert "Base, best guidance" in figure
    assert all(figure.count("stroke-width:4;") == 4 for figure in axis_figures(view(), "strength"))


@pytest.mark.fast
def test_an_interval_that_is_unknown_is_not_drawn() -> None:
    line = np.array([0.0, 1.0])
    bounds = np.array([[-2.0, 2.0], [np.nan, np.nan]])
    labels = Labels("t", "x", "y", counts=False)
    with_one = paths_figure(labels, [Line("a", 0, line, line, intervals=bounds)])
    assert with_one.count("stroke-width:4;") == 1
    assert "nan" not in with_one
    # The axis reaches as far as the interval.
    assert ">-2<" in with_one
    assert ">2<" in with_one


@pytest.mark.fast
def test_the_page_is_whole_asks_for_nothing_and_shows_the_grids(folder: Path) -> None:
    html = (folder / "sweep.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not {tag for tag, _, _ in page.attributes} & {"script", "iframe", "object"}
    assert re.search(r"https?://|@import|url\(", html) is None
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert len(pictures) == 4 + 4 + 4
    assert all(value.startswith("data:image/png;base64,") for value in pictures)
    for part in ("Strength", "Steps", "Guidance", "A made-up taste. Not trained on.", "dgpo-bench sweep synthetic"):
        assert part in page.text
    assert "not chosen on test prompts" in page.text
    assert "Incomplete" not in page.text
    links = {value for tag, name, value in page.attributes if (tag, name) == ("a", "href")}
    assert all((folder / link).is_file() for link in links)
    for block in (folder / "tables.md").read_text(encoding="utf-8").split("## ")[1:]:
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


@pytest.mark.fast
def test_the_same_folder_gives_the_same_page(folder: Path) -> None:
    before = (folder / "sweep.html").read_bytes()
    write_sweep_report(folder)
    assert (folder / "sweep.html").read_bytes() == before


@pytest.mark.fast
def test_special_characters_are_escaped(tmp_path: Path) -> None:
    nasty = '</svg><script>x</script> & "$a$" |_%'
    metric = MetricRecord(label=nasty, description=nasty, better="higher", relation="trained", version=nasty)
    cautions: dict[str, Any] = {"cautions": [nasty], "command": nasty, "complete": False}
    write(tmp_path / "made", records(nasty, nasty, metrics={**METRICS, "accuracy": metric}, **cautions))
    write_sweep_report(tmp_path / "made")
    page = Page((tmp_path / "made" / "sweep.html").read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _, _ in page.attributes}
    assert "<script" not in (tmp_path / "made" / "sweep.html").read_text(encoding="utf-8")
    assert page.text.count(nasty) > 10
    assert "Incomplete" in page.text


@pytest.mark.fast
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("metric", "metric 'other' is none of sweep.json's"),
        ("setting", "strength 9, 20 steps, guidance 3, set validation is none of"),
        ("set", "set elsewhere is none of"),
        ("prompt", "a picture of validation that sweep.json does not have, or one twice"),
        ("twice", "a picture of validation that sweep.json does not have, or one twice"),
        ("schema", "schema version 9, this program reads 1"),
        ("no center", "lacks strength 1, 20 steps"),
        ("picture", "settings/strength"),
    ],
)
def test_files_that_do_not_belong_together_are_refused_in_one_line(damage: str, message: str, tmp_path: Path) -> None:
    folder, record = tmp_path / "made", records()
    write(folder, record)
    rows = pictures_of(record)
    if damage == "metric":
        rows.metrics["other"] = rows.metrics["accuracy"]
    elif damage == "setting":
        rows = join([rows, rows.where(np.array([0]))])
        entry = rows.entry.astype("<U40")
        entry[-1] = "strength 9, 20 steps"
        rows = Pictures(
            entry, rows.seed, rows.checkpoint, rows.guidance, rows.set, rows.prompt, rows.image, rows.metrics
        )
        rows.guidance[-1] = 3
    elif damage == "set":
        names = np.where(np.arange(len(rows)) == 0, "elsewhere", rows.set)
        rows = Pictures(
            rows.entry, rows.seed, rows.checkpoint, rows.guidance, names, rows.prompt, rows.image, rows.metrics
        )
    elif damage == "prompt":
        rows.prompt[0] = 99
    elif damage == "twice":
        rows = join([rows, rows.where(np.array([0]))])
    elif damage == "schema":
        text = (folder / SWEEP_FILE).read_text().replace('"schema_version": 1', '"schema_version": 9')
        (folder / SWEEP_FILE).write_text(text)
    elif damage == "no center":
        settings = [each for each in record.settings if each != CENTER]
        write_record(record.model_copy(update={"settings": settings}), folder / SWEEP_FILE)
    else:
        (folder / record.galleries[CENTER.name]).unlink()
    write_pictures(rows, folder / PICTURES_FILE)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        write_sweep_report(folder)
    assert "\n" not in str(raised.value)
    assert not (folder / "sweep.html").exists()


@pytest.mark.fast
def test_a_metric_that_lacks_some_settings_leaves_gaps() -> None:
    record = records()
    rows = pictures_of(record)
    rows.metrics["taste"][rows.entry == CENTER.entry] = np.nan
    found = view_of(record, rows, Path("made-up") / PICTURES_FILE)
    assert found.value(CENTER, "in_domain", "taste") is None
    assert axis_tables(found, "strength")
    assert axis_figures(found, "strength")


@pytest.mark.slow
def test_a_real_browser_shows_it_on_a_phone_and_in_the_dark(folder: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("NO CHROMIUM HERE: the page was not looked at in a browser")
    with browser() as tab:
        for scheme in ("light", "dark"):
            fits_and_follows(tab, folder / "sweep.html", scheme)
            shown = "[...document.querySelectorAll('.grids img')].filter(e => e.offsetParent).length"
            assert tab.evaluate(shown) == 12


@pytest.mark.fast
def test_it_is_read_back_as_it_was_written(folder: Path) -> None:
    assert read_sweep_view(folder).record == records()
