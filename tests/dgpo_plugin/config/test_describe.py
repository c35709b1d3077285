"""What a configuration's fields mean: as YAML with comments, as a JSON schema, and nowhere left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import yaml
from click.testing import CliRunner, Result
from pydantic import Field

from dgpo_plugin.commands.main import main
from dgpo_plugin.commands.schema import json_schema
from dgpo_plugin.common.names import ALGORITHMS, WORLDS
from dgpo_plugin.common.registry import Entry, Registry
from dgpo_plugin.config.describe import allowed, annotated_yaml, in_yaml
from dgpo_plugin.config.fields import AlgorithmConfig
from dgpo_plugin.config.load import load_config, parse_config, preset_names
from dgpo_plugin.rewards.registry import REWARDS

pytestmark = pytest.mark.fast


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def sections() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every section of a configuration by the name of its class, as its schema."""
    yield from json_schema()["$defs"].items()


@pytest.mark.parametrize("preset", preset_names())
def test_the_explained_configuration_is_the_same_one(preset: str) -> None:
    config = load_config(preset)
    assert parse_config(yaml.safe_load(annotated_yaml(config)), "again") == config


def test_every_field_has_its_description_above_it() -> None:
    lines = run("config", "shapes", "--set", "training.seed=7").output.splitlines()
    at = lines.index("  seed: 7")
    assert lines[at - 1] == "  # What every random draw of the run is derived from. [integer, at least 0]"
    assert all(len(line) <= 120 for line in lines)
    assert lines[:2] == ["# The base model, and how it is held in memory.", "model:"]


def test_a_mistake_is_one_line() -> None:
    for arguments, said in [
        (["config"], "CONFIG is missing"),
        (["config", "shapse"], "did you mean 'shapes'"),
        (["config", "shapes", "--set", "training.sed=1"], "did you mean 'seed'"),
        (["config", "shapes", "--schema"], "leave CONFIG and --set out"),
    ]:
        done = run(*arguments)
        assert done.exit_code == 2
        (line,) = done.stderr.strip().splitlines()
        assert said in line


@pytest.mark.parametrize(
    ("name", "section"), list(sections()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_section_and_field_is_described(name: str, section: dict[str, Any]) -> None:
    assert section["description"].strip()
    assert "Attributes:" not in section["description"]
    for key, field in section["properties"].items():
        assert len(field.get("description", "").split()) > 2, f"{name}.{key} is not described"
        assert field["description"].endswith("."), f"{name}.{key}"


def test_the_schema_is_what_a_configuration_may_be() -> None:
    schema = json.loads(run("config", "--schema").output)
    assert schema == json_schema()
    assert schema["additionalProperties"] is False
    *registered, own = schema["properties"]["algorithm"]["oneOf"]
    sections = [schema["$defs"][each["$ref"].removeprefix("#/$defs/")] for each in registered]
    assert [section["properties"]["name"]["const"] for section in sections] == list(ALGORITHMS)
    for section in sections:
        assert section["required"][0] == "name"
        assert section["additionalProperties"] is False
    assert schema["$defs"][own["$ref"].removeprefix("#/$defs/")]["properties"]["name"]["pattern"] == r"\.py:"


def test_the_schema_offers_every_registered_name() -> None:
    schema = json_schema()
    labels, several, one = schema["properties"]["rewards"]["anyOf"]
    assert list(labels["properties"]) == several["items"]["examples"] == one["examples"] == list(REWARDS)
    assert labels["additionalProperties"] == labels["properties"]["ocr"], "a label of one's own has the same fields"
    assert "ocr/test" in schema["$defs"]["PromptsConfig"]["properties"]["held_out"]["examples"]
    assert schema["$defs"]["ModelConfig"]["properties"]["path"]["examples"] == list(WORLDS)
    assert schema["required"] == ["model"]
    assert schema["anyOf"] == [{"required": ["prompts", "rewards"]}, {"required": ["pairs"]}]


class MineConfig(AlgorithmConfig):
    """An algorithm from elsewhere."""

    name: Literal["mine"] = "mine"
    beta: float = Field(3.0, gt=0, description="How sharp it is.")


class Mine:
    Config = MineConfig


def test_an_algorithm_that_is_registered_is_in_the_schema_and_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry("algorithm", "algorithms", {"mine": Entry(f"{__name__}:Mine")}, Entry)
    monkeypatch.setattr("dgpo_plugin.commands.schema.ALGORITHMS", registry)
    monkeypatch.setattr("dgpo_plugin.config.fields.ALGORITHMS", registry)
    schema = json_schema()
    assert schema["properties"]["algorithm"]["oneOf"][0] == {"$ref": "#/$defs/algorithm-mine"}
    section = schema["$defs"]["algorithm-mine"]
    assert section["properties"]["beta"]["exclusiveMinimum"] == 0
    assert section["properties"]["name"]["description"].startswith("As in `dgpo list algorithms`")
    explained = annotated_yaml(load_config("shapes", ["algorithm={name: mine}"]))
    assert "# An algorithm from elsewhere.\nalgorithm:\n  # As in `dgpo list algorithms`" in explained
    assert "  # How sharp it is. [number, above 0]\n  beta: 3.0\n" in explained


def test_several_rewards_are_explained_under_their_labels() -> None:
    explained = annotated_yaml(load_config("shapes", ["rewards={shapes: 1, mine: {reward: brightness, weight: 0.5}}"]))
    assert "\nrewards:\n  shapes:\n    # As in `dgpo list rewards`" in explained
    assert "\n  mine:\n" in explained
    assert "    reward: brightness\n" in explained


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 512}, "integer, at least 1, at most 512"),
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, "number, at least 0, below 1"),
        ({"enum": ["dpm", False], "default": False}, "dpm | false"),
        ({"const": "dgpo", "type": "string"}, "dgpo"),
        ({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]}, "number, above 0, or null"),
        ({"type": "array", "items": {"type": "string"}}, "list of text"),
        ({"type": "array", "items": {"type": "array"}}, "list of lists"),
        ({"type": "object"}, "mapping"),
    ],
)
def test_what_a_field_takes_in_words(field: dict[str, Any], said: str) -> None:
    assert allowed(field) == said


@pytest.mark.parametrize(
    "value",
    [None, True, 1e-5, "", "a: b", "#x", [1, [2]], {"a": {"b": 1}}, "x " * 200, "null"]
    + ["a\n\n  b", "\n", "a\r", ["a\u2028b", 1.5], "\U0001f600\n'\""],
)
def test_a_value_on_one_line_of_yaml_is_the_value(value: object) -> None:
    text = in_yaml(value)
    assert "\n" not in text
    assert yaml.safe_load(f"key: {text}")["key"] == value
