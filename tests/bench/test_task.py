"""Tasks: the shipped ones, one's own, what is said of a mistaken one, and what a metric has to do with training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from dgpo_bench.commands import main
from dgpo_bench.measures import check_metrics, relation
from dgpo_bench.preset import bench_preset_names, load_preset
from dgpo_bench.prompt_sets import MOST_IMAGES, check_prompts, counted_tags, sampled_sets, spread
from dgpo_bench.task import Task, load_task, prompt_sources, task_names
from dgpo_plugin.common.errors import UserError
from dgpo_plugin.prompts.registry import prompt_set_names

pytestmark = pytest.mark.fast

TEN_LINES = """
version: 1
prompts: {train: train.txt, validation: validation.txt, test: test.jsonl}
rewards: {"mine.py:red": {weight: 1}}
in_domain: [{metric: "mine.py:red", by: kind}]
out_of_domain: [{prompts: other.txt, metrics: [brightness, "mine.py:red"]}]
sampling: {steps: 4, guidance: 1, guidances: [1]}
"""


def own_task(folder: Path, **changes: Any) -> str:
    """A task of one's own in a folder, with everything that it names beside it."""
    (folder / "train.txt").write_text("a cat\na dog\n")
    (folder / "validation.txt").write_text("a hen\n")
    (folder / "test.jsonl").write_text('{"prompt": "a cow", "kind": "farm"}\n{"prompt": "a fox", "kind": "wood"}\n')
    (folder / "other.txt").write_text("a tower\n")
    (folder / "mine.py").write_text("def red(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    (folder / "own.yaml").write_text(yaml.safe_dump({**yaml.safe_load(TEN_LINES), **changes}))
    return str(folder / "own.yaml")


def test_every_shipped_task_is_read_and_named_by_its_file() -> None:
    assert {"shapes", "words", "geneval", "ocr", "pickscore", "shapes-vivid"} <= set(task_names())
    for name in task_names():
        task = load_task(name)
        assert (task.name, bool(task.description)) == (name, True)
        assert task.headline_metric in task.metric_names()


def test_shipped_tasks_whose_prompts_are_here_are_valid() -> None:
    known = prompt_set_names()
    here = [
        task
        for task in map(load_task, task_names())
        if all(source in known or source.endswith(".jsonl") for _, source in prompt_sources(task))
    ]
    assert "shapes" in {task.name for task in here}
    for task in here:
        assert min(check_prompts(task).values()) > 0


def test_each_published_column_stands_in_the_published_tasks() -> None:
    for name in ("geneval", "ocr", "pickscore"):
        task = load_task(name)
        columns = {metric for each in task.out_of_domain for metric in each.metrics}
        assert {"aesthetic", "deqa", "imagereward", "pickscore", "unifiedreward", "hpsv2.1", "clipscore"} <= columns
        assert task.metric("deqa").reward == "remote"
        assert task.metric("deqa").optional


def test_every_comparison_stands_on_a_task() -> None:
    assert {"shapes", "shapes-unguided", "words", "sd35-geneval", "sd35-ocr", "sd35-pickscore"} <= set(
        bench_preset_names()
    )
    for name in bench_preset_names():
        preset, task = load_preset(name)
        assert task.name == preset.task


def test_ones_own_task_is_found_with_all_that_lies_beside_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["validate", own_task(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "own, version 1" in result.stdout
    assert "prompts.train: 2 prompts" in result.stdout
    assert "metric mine.py:red: trained, the headline" in result.stdout
    assert "metric brightness: statistic" in result.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"headlin": "x"}, "unknown key headlin; did you mean 'headline'?"),
        ({"in_domain": [{"metric": "brightnes"}]}, "no metric or reward 'brightnes'; did you mean 'brightness'"),
        ({"rewards": {"pickscor": 1}}, "rewards.pickscor: no metric or reward 'pickscor'; did you mean 'pickscore'"),
        ({"statistics": ["sharpnes"]}, "no statistic 'sharpnes'; did you mean 'sharpness'"),
        ({"headline": "sharpness"}, "headline: 'sharpness' is not among in_domain"),
        ({"thresholds": [0.5, 0.4]}, "thresholds: must rise"),
        ({"sampling": {"guidances": [2, 1]}}, "sampling.guidances: must rise"),
        ({"prompts": {"train": "train.txt", "validation": "train.txt", "test": "test.jsonl"}}, "stands there twice"),
        ({"in_domain": [{"metric": "brightness", "by": "a"}, {"metric": "sharpness", "by": "b"}]}, "different fields"),
        ({"sampling": {"images_per_prompt": 1001}}, "sampling.images_per_prompt: "),
        ({"version": 0}, "version: "),
        ({"metrics": {"mine.py:red": {"reward": "brightness", "optional": True}}}, "is optional; verdicts are about"),
    ],
)
def test_a_mistake_is_told_in_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["validate", own_task(tmp_path, **changes)])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    said = [line for line in result.stderr.strip().splitlines() if not line.startswith("running ")]
    assert len(said) == 1


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("validation.txt", "A  CAT\n", "prompts.validation: 1 of 1 prompts are in prompts.train too (first: 'A  CAT')"),
        ("test.jsonl", '{"prompt": "a hen"}\n', "prompts.test: 1 of 1 prompts are in prompts.validation too"),
        ("other.txt", "a dog\na  Cat\na pig\n", "out_of_domain.0.prompts: 2 of 3 prompts are in prompts.train too"),
    ],
)
def test_prompts_that_overlap_are_refused_with_their_number(file: str, text: str, message: str, tmp_path: Path) -> None:
    source = own_task(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError) as refused:
        check_prompts(load_task(source))
    assert message in str(refused.value)


def test_scenes_that_overlap_are_refused_whatever_their_words(tmp_path: Path) -> None:
    source = own_task(
        tmp_path, prompts={"train": "shapes/train", "validation": "validation.txt", "test": "shapes/held-out"}
    )
    check_prompts(load_task(source))
    (tmp_path / "validation.txt").write_text("a circle and a triangle\n")
    with pytest.raises(UserError, match=r"prompts.test: [1-9]\d* of 46 prompts are in prompts.validation too"):
        check_prompts(load_task(source))


@pytest.mark.parametrize(("optional", "refused"), [(True, False), (False, True)])
def test_a_metric_whose_server_or_package_is_missing(optional: bool, refused: bool, tmp_path: Path) -> None:
    """Named before anything is trained; left out where the task may go on without it, and never measured as nothing."""
    metrics = {
        "served": {"reward": "remote", "options": {"urls": ["http://127.0.0.1:9"]}, "optional": optional},
    }
    task = load_task(own_task(tmp_path, metrics=metrics, in_domain=[{"metric": "brightness"}, {"metric": "served"}]))
    if refused:
        with pytest.raises(UserError, match="task own, metric served: "):
            check_metrics(task)
    else:
        assert "127.0.0.1:9" in check_metrics(task)["served"]


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dgpo_plugin.common import registry

    monkeypatch.setattr(registry, "find_spec", lambda module: None)
    task = load_task(own_task(tmp_path, in_domain=[{"metric": "ocr"}]))
    with pytest.raises(UserError, match=r"metric ocr: needs rapidocr.*pip install"):
        check_metrics(task)


def tiny_task(trained: str, **options: Any) -> Task:
    return Task.model_validate(
        {
            "version": 1,
            "prompts": {"train": "a.txt", "validation": "b.txt", "test": "c.txt"},
            "rewards": {"label": {"reward": trained, "options": options}},
            "metrics": {
                "strict": {"reward": trained, "at_least": 1},
                "served": {"reward": "remote", "options": {"urls": "u"}},
            },
            "in_domain": [{"metric": "label"}, {"metric": "strict"}, {"metric": "served"}],
        }
    )


@pytest.mark.parametrize(
    ("trained", "metric", "expected"),
    [
        ("pickscore", "label", "trained"),
        ("pickscore", "strict", "trained"),
        ("pickscore", "pickscore", "trained"),
        ("pickscore", "unifiedreward", "same data"),
        ("hpsv2", "hpsv2.1", "same data"),
        ("geneval", "geneval-strict", "same data"),
        ("pickscore", "aesthetic", "untrained"),
        ("ocr", "clipscore", "untrained"),
        ("ocr", "sharpness", "statistic"),
        ("ocr", "diversity", "statistic"),
        ("sharpness", "sharpness", "trained"),
    ],
)
def test_what_a_metric_has_to_do_with_training(trained: str, metric: str, expected: str) -> None:
    assert relation(tiny_task(trained), metric) == expected


def test_two_servers_are_two_rewards() -> None:
    assert relation(tiny_task("remote", urls="other"), "served") == "untrained"
    assert relation(tiny_task("remote", urls="u"), "served") == "trained"


def test_prompts_are_spread_over_each_kind_and_noises_stay_with_them() -> None:
    tags = [*"aaaaaaaa", *"bb", *"a"]
    assert spread(tags, 3) == [0, 3, 6, 8, 9]
    assert counted_tags(tags, 3) == {"a"}
    assert counted_tags(tags, 20) == {"a", "b"}
    preset, task = load_preset("shapes")
    sets = sampled_sets(task, preset.sizes["default"])
    numbers = {
        name: [n for prompt in range(len(each.prompts)) for n in each.noise_numbers(prompt, range(each.images))]
        for name, each in sets.items()
    }
    test, outside = numbers["test"], numbers["shapes/out-of-domain"]
    assert len({*test, *outside}) == len(test) + len(outside)
    assert test[:5] == [0, 1, 2, 3, MOST_IMAGES]
    assert sets["validation"].seed != sets["test"].seed == sets["shapes/out-of-domain"].seed
    assert set(sets["test"].curve) < set(range(len(sets["test"].prompts)))


def test_tasks_are_listed() -> None:
    listed = CliRunner().invoke(main, ["list", "tasks"]).stdout.splitlines()
    assert [line.split()[0] for line in listed] == list(task_names())
