"""What a configuration's fields mean, in words and as YAML with comments.

Everything comes from the fields' own descriptions and limits (:mod:`dgpo_plugin.config.fields`, the algorithms' files).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, TypeGuard

import yaml
from pydantic import BaseModel

WIDTH = 110
"""Columns of a line of comment."""
TYPES = {"integer": "integer", "number": "number", "boolean": "true | false", "string": "text", "null": "null"}
LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def annotated_yaml(config: BaseModel) -> str:
    """The complete configuration as YAML, above each field what it means; reading it gives the same configuration."""
    return "\n".join(_lines(config, "")).lstrip() + "\n"


def _lines(config: BaseModel, indent: str) -> list[str]:
    properties = type(config).model_json_schema()["properties"]
    values = config.model_dump(mode="json")
    lines: list[str] = []
    for key in type(config).model_fields:
        value = dict(config)[key]
        if isinstance(value, BaseModel):
            lines += ["", *_comment(summary(type(value)), indent), f"{indent}{key}:", *_lines(value, indent + "  ")]
        elif isinstance(value, Mapping) and value and all(isinstance(each, BaseModel) for each in value.values()):
            lines += ["", *_comment(description(type(config), key), indent), f"{indent}{key}:"]
            for name, each in value.items():
                lines += [f"{indent}  {in_yaml(name)}:", *_lines(each, indent + "    ")]
        else:
            about = f"{description(type(config), key)} [{allowed(properties[key])}]".strip()
            lines += [*_comment(about, indent), f"{indent}{key}: {in_yaml(values[key])}"]
    return lines


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_on_hyphens=False
    )


def description(model: type[BaseModel], key: str) -> str:
    """What a field means: its own description, or that of the model it was inherited from and narrowed; else empty."""
    fields = [parent.model_fields[key] for parent in model.__mro__ if _has_field(parent, key)]
    return next((field.description for field in fields if field.description), "")


def _has_field(parent: type, key: str) -> TypeGuard[type[BaseModel]]:
    return issubclass(parent, BaseModel) and key in parent.model_fields


def summary(model: type[BaseModel]) -> str:
    """The first paragraph of a section's docstring, on one line."""
    return " ".join((model.__doc__ or "").partition("\n\n")[0].split())


def in_yaml(value: object) -> str:
    """A value of JSON's types on one line of YAML."""
    text: str = yaml.dump(value, Dumper=_OneLine, default_flow_style=True, width=float("inf"), sort_keys=False)
    return text.removesuffix("...\n").strip()


class _OneLine(yaml.SafeDumper):
    """PyYAML's own, but for texts of several lines, which it would write on as many."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = '"' if len(text.splitlines()) > 1 or text.endswith("\n") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_OneLine.add_representer(str, _OneLine.represent_text)


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
