"""docs/benchmark.md: its tables are the code's own descriptions, its example is a comparison."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from dgpo_bench.preset import Preset, load_preset
from dgpo_bench.size import Size
from dgpo_bench.task import InDomain, Metric, OutOfDomain, Task, TaskPrompts, TaskSampling, load_task

pytestmark = pytest.mark.fast

PAGE = Path(__file__).parents[2] / "docs" / "benchmark.md"


TABLES: list[tuple[str, type[BaseModel]]] = [
    ("The comparison's file", Preset),
    ("A size, in `sizes`", Size),
    ("The task's file", Task),
    ("`prompts`", TaskPrompts),
    ("An entry of `metrics`", Metric),
    ("An entry of `in_domain`", InDomain),
    ("An entry of `out_of_domain`", OutOfDomain),
    ("`sampling`", TaskSampling),
]


def table(title: str, model: type[BaseModel]) -> str:
    properties = model.model_json_schema()["properties"]
    lines = [f"{title}:", "", "| field | default | meaning |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        value = properties[name].get("default")
        default = (
            "required"
            if field.is_required()
            else "above"
            if isinstance(value, dict) and value
            else f"`{json.dumps(value)}`"
        )
        lines.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(lines)


@pytest.mark.parametrize(("title", "model"), TABLES, ids=[model.__name__ for _, model in TABLES])
def test_every_field_stands_in_the_page_as_the_code_describes_it(title: str, model: type[BaseModel]) -> None:
    assert all(field.description for field in model.model_fields.values())
    assert table(title, model) in PAGE.read_text(encoding="utf-8")


def examples() -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_example_is_a_comparison(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(examples()[0])
    preset, task = load_preset(str(path))
    assert list(preset.algorithms) == ["plain", "with-kl"]
    names = {preset.run_config(task, entry, 0).algorithm.name for entry in preset.algorithms}
    assert len(names) == 1


def test_the_example_of_a_task_is_one_of_ten_lines(tmp_path: Path) -> None:
    text = examples()[1]
    assert len(text.splitlines()) <= 10
    (tmp_path / "mine-task.yaml").write_text(text)
    task = load_task(str(tmp_path / "mine-task.yaml"))
    assert task.name == "mine-task"
    assert task.out_of_domain
