"""docs/benchmark.md: its tables are the code's own descriptions, its example is a comparison."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from dgpo_bench.preset import EvaluationPlan, Preset, Size, load_preset

pytestmark = pytest.mark.fast

PAGE = Path(__file__).parents[2] / "docs" / "benchmark.md"


def table(title: str, model: type[BaseModel]) -> str:
    properties = model.model_json_schema()["properties"]
    lines = [f"{title}:", "", "| field | default | meaning |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else f"`{json.dumps(properties[name]['default'])}`"
        lines.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("title", "model"), [("The file", Preset), ("`evaluation`", EvaluationPlan), ("A size, in `sizes`", Size)]
)
def test_every_field_stands_in_the_page_as_the_code_describes_it(title: str, model: type[BaseModel]) -> None:
    assert all(field.description for field in model.model_fields.values())
    assert table(title, model) in PAGE.read_text(encoding="utf-8")


def test_the_example_is_a_comparison(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    path = tmp_path / "mine.yaml"
    path.write_text(example)
    preset = load_preset(str(path))
    assert list(preset.algorithms) == ["plain", "with-kl"]
    assert preset.run_config("plain", 0).algorithm.name == preset.run_config("with-kl", 0).algorithm.name
