"""What a configuration's fields mean, in the forms that people and editors read.

Everything comes from the fields' own descriptions and limits (:mod:`dgpo_plugin.config.fields`, the algorithms' files).
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from dgpo_plugin.common.names import ALGORITHMS
from dgpo_plugin.config.fields import RunConfig

WIDTH = 110
"""Columns of a line of comment."""
TYPES = {"integer": "integer", "number": "number", "boolean": "true | false", "string": "text", "null": "null"}
LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}

Schema = dict[str, Any]
"""A JSON schema, or one of its parts."""


def annotated_yaml(config: BaseModel) -> str:
    """The complete configuration as YAML, above each field what it means; reading it gives the same configuration."""
    return "\n".join(_lines(config, "")).lstrip() + "\n"


def _lines(config: BaseModel, indent: str) -> list[str]:
    properties = type(config).model_json_schema()["properties"]
    values = config.model_dump(mode="json")
    lines: list[str] = []
    for key, field in type(config).model_fields.items():
        value = dict(config)[key]
        if isinstance(value, BaseModel):
            lines += ["", *_comment(summary(type(value)), indent), f"{indent}{key}:", *_lines(value, indent + "  ")]
        elif isinstance(value, Mapping) and value and all(isinstance(each, BaseModel) for each in value.values()):
            lines += ["", *_comment(field.description or "", indent), f"{indent}{key}:"]
            for name, each in value.items():
                lines += [f"{indent}  {in_yaml(name)}:", *_lines(each, indent + "    ")]
        else:
            about = f"{field.description or ''} [{allowed(properties[key])}]".strip()
            lines += [*_comment(about, indent), f"{indent}{key}: {in_yaml(values[key])}"]
    return lines


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_on_hyphens=False
    )


def summary(model: type[BaseModel]) -> str:
    """The first paragraph of a section's docstring, on one line."""
    return " ".join((model.__doc__ or "").partition("\n\n")[0].split())


def in_yaml(value: object) -> str:
    """A value of JSON's types on one line of YAML."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False)
    return text.removesuffix("...\n").strip()


def allowed(field: Mapping[str, Any]) -> str:
    """The values that a field takes, from its JSON schema: ``integer, at least 1, or null``."""
    if "anyOf" in field:
        return ", or ".join(allowed(each) for each in field["anyOf"])
    if "const" in field or "enum" in field:
        return " | ".join(in_yaml(value) for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        inner = field.get("items", {})
        return "list of lists" if inner.get("type") == "array" else f"list of {allowed(inner)}"
    name = TYPES.get(field.get("type", ""), "mapping")
    limits = [f"{word} {field[key]:g}" for key, word in LIMITS.items() if key in field]
    return ", ".join([name, *limits])


def json_schema() -> Schema:
    """The JSON schema of a training configuration, for editors; ``algorithm`` is one of those that are registered.

    Raises:
        UserError: an algorithm of another package that cannot be imported.
    """
    schema = RunConfig.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    if "oneOf" not in schema["properties"]["algorithm"]:
        references = {}
        for name in ALGORITHMS:
            own = ALGORITHMS.load(name).Config.model_json_schema()
            definitions |= own.pop("$defs", {})
            definitions[own["title"]] = own
            references[name] = f"#/$defs/{own['title']}"
        schema["properties"]["algorithm"] = {
            "oneOf": [{"$ref": reference} for reference in references.values()],
            "discriminator": {"propertyName": "name", "mapping": references},
        }
    for reference in schema["properties"]["algorithm"]["oneOf"]:
        own = definitions[reference["$ref"].rpartition("/")[2]]
        # Without its name a section would fit them all.
        own["required"] = ["name", *(key for key in own.get("required", []) if key != "name")]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "dgpo training configuration"}


def json_schema_text() -> str:
    """:func:`json_schema` as a file's text."""
    return json.dumps(json_schema(), indent=2)
