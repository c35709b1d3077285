"""docs/configuration.md and docs/metrics.md from the code: `python tools/reference_pages.py [--write]`.

Without `--write` it only says which of them are out of date; a test holds them to it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dgpo_plugin.algorithms.base import Metric
from dgpo_plugin.commands.schema import json_schema
from dgpo_plugin.common.files import write_text_atomically
from dgpo_plugin.common.names import ALGORITHMS
from dgpo_plugin.config.describe import allowed, in_yaml
from dgpo_plugin.config.fields import RewardTerm
from dgpo_plugin.training.metrics import GUARD_METRICS, METRICS, OF_REWARDS, PAIR_METRICS

DOCS = Path(__file__).parents[1] / "docs"
MADE = "<!-- Made by tools/reference_pages.py; change the code's own descriptions, not this page. -->"


def configuration_page() -> str:
    """Every section, its fields, what they take, their defaults and what they mean."""
    schema = json_schema()
    lines = [
        "# Every field of a configuration",
        "",
        MADE,
        "",
        "A configuration is a YAML file of these sections; what it leaves out is the default. `dgpo train CONFIG`",
        "takes a preset's name (`dgpo list presets`) or a file, and `--set section.field=value` changes a field of it.",
        "`dgpo config CONFIG` prints a complete one with all of this in comments. For completion in an editor:",
        "`dgpo config --schema > dgpo.schema.json`, and as the first line of the file",
        "`# yaml-language-server: $schema=dgpo.schema.json`.",
    ]
    for name, field in schema["properties"].items():
        for heading, section in _sections(name, field, schema["$defs"]):
            lines += ["", f"## {heading}", "", _first_paragraph(section), "", *_table(section)]
    return "\n".join(lines) + "\n"


def _sections(
    name: str, field: Mapping[str, Any], definitions: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The headings and models that stand behind one key of a configuration: several if it is one of several."""
    if "oneOf" in field:
        for each in field["oneOf"]:
            section = definitions[_definition(each)]
            which = section["properties"]["name"].get("const", "path/to/file.py:Algorithm")
            yield f"`{name}` with `name: {which}`", section
    elif "$ref" in field:
        section = definitions[_definition(field)]
        yield f"`{name}`", section
        for key, inner in section["properties"].items():
            for each in inner.get("anyOf", []):
                if "$ref" in each:
                    yield f"`{name}.{key}`", definitions[_definition(each)]
    elif sections := [each for each in field.get("anyOf", []) if "$ref" in each]:
        yield f"`{name}`", definitions[_definition(sections[0])]
    else:
        term = definitions[RewardTerm.__name__]
        yield f"`{name}`, each under a label of its own", {**term, "description": field["description"]}


def _definition(reference: Mapping[str, Any]) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _first_paragraph(section: Mapping[str, Any]) -> str:
    return " ".join(str(section.get("description", "")).partition("\n\n")[0].split())


def _table(section: Mapping[str, Any]) -> Iterator[str]:
    yield "| field | values | default | meaning |"
    yield "|---|---|---|---|"
    for key, field in section["properties"].items():
        default = f"`{in_yaml(field['default'])}`" if "default" in field else "required"
        yield f"| `{key}` | {_cell(allowed(field))} | {default} | {_cell(field.get('description', ''))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def metrics_page() -> str:
    """Every key of metrics.jsonl."""
    lines = [
        "# Every key of metrics.jsonl",
        "",
        MADE,
        "",
        "A run's `metrics.jsonl` has one line of JSON for each iteration, of all processes where nothing else is said;",
        'trackers (`logging.trackers`) get the same keys. What "healthy" says is what to look at first, not a promise.',
        "",
        "## What every algorithm writes",
        "",
        *_metric_table(METRICS),
        "",
        "## With an algorithm that learns from pairs",
        "",
        "It has no rollout and no rewards, and none of the keys that begin with",
        f"{', '.join(f'`{key}`' for key in OF_REWARDS)}; but",
        "",
        *_metric_table(PAIR_METRICS),
    ]
    lines += ["", "## Besides, after each look of `training.guard`", "", *_metric_table(GUARD_METRICS)]
    for algorithm in ALGORITHMS:
        lines += ["", f"## Besides, with `{algorithm}`", "", *_metric_table(ALGORITHMS.load(algorithm).METRICS)]
    return "\n".join(lines) + "\n"


def _metric_table(metrics: Sequence[Metric]) -> Iterator[str]:
    yield "| key | unit | how it is computed | healthy |"
    yield "|---|---|---|---|"
    for metric in metrics:
        cells = (metric.unit, metric.how, metric.healthy)
        yield f"| `{metric.key}` | " + " | ".join(map(_cell, cells)) + " |"


def pages() -> dict[Path, str]:
    """What each file should hold."""
    return {DOCS / "configuration.md": configuration_page(), DOCS / "metrics.md": metrics_page()}


def main() -> None:
    """Write the pages, or say which are out of date."""
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(DOCS.parent)}: {'written' if '--write' in sys.argv else 'out of date'}")
        if "--write" in sys.argv:
            write_text_atomically(path, pages()[path])
    if stale and "--write" not in sys.argv:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
