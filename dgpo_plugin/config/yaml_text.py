"""YAML as configurations need it: plain values, each key once, and numbers and texts read as they are written.

PyYAML follows YAML 1.1, where ``1:30:00`` is 5400, ``010`` is 8, ``no`` is false and ``2026-01-01`` a date, and of a
key that stands twice it keeps the last value. Here each of these is the text that it is, as in YAML 1.2
(yaml.org/spec/1.2.2, 10.3.2), and a key that stands twice is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from dgpo_plugin.common.errors import UserError, is_unicode

MOST_CHARACTERS = 100_000
MOST_DIGITS = 100
MOST_LEVELS = 50
MOST_VALUES = 100_000
"""Of a configuration with its anchors written out: a few lines of them can stand for billions of values."""
_DEEP = re.compile(rf"(?:[\[{{]\s*){{{MOST_LEVELS + 1}}}")
_TAG = "tag:yaml.org,2002:"
_PLAIN = {
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": ("true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": ("[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+|[-+]?0b[01_]+", list("-+0123456789")),
    "float": (
        r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    "merge": ("<<", ["<"]),
}
"""What is no text where it stands without quotes, and how it begins. All of it is what YAML 1.1 has too, and so what
PyYAML puts in quotes where it is to be a text."""


def read_yaml_text(text: str, where: str) -> Any:
    """What a text in YAML is: mappings, lists, texts, numbers, true, false and null.

    Args:
        where: whose it is, as messages begin: ``run.yaml``.

    Raises:
        UserError: it is not YAML; has a key twice, a tag, or characters that no name can have; or is longer or deeper
            than a configuration is. With the line where there is one.
    """
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{where} has {len(text):,} characters; a configuration has at most {MOST_CHARACTERS:,}")
    if _DEEP.search(text):  # which PyYAML would take a second or more to find out
        raise UserError(f"{where} is nested too deep; a configuration has at most {MOST_LEVELS} levels")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 (made from the safe one)
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise UserError(
            f"{where} is not YAML at line {line}: a control character, or half of one; remove it"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line_of_it = f" at line {mark.line + 1}" if mark else ""
        if isinstance(error, _Refused):
            raise UserError(f"{where} {error.problem}{line_of_it}; {error.note}") from error
        raise UserError(f"{where} is not YAML{line_of_it}; check indentation and quotes") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deep; a configuration has at most {MOST_LEVELS} levels") from error
    _refuse_unusable(value, where)
    return value


def _refuse_unusable(value: Any, where: str) -> None:
    """Refuse what could only fail later: texts that nothing can be named, depths and amounts beyond all use."""
    waiting, count = [(value, 1)], 0
    while waiting:
        each, level = waiting.pop()
        count += 1
        if level > MOST_LEVELS or count > MOST_VALUES:
            raise UserError(
                f"{where} has more than {MOST_LEVELS} levels or {MOST_VALUES:,} values, its anchors written out; a "
                f"configuration needs fewer"
            )
        if isinstance(each, str) and ("\0" in each or not is_unicode(each)):
            raise UserError(f"{where} has a NUL character or half of a character in {each!r}; remove it")
        if isinstance(each, dict):
            waiting += [(inner, level + 1) for pair in each.items() for inner in pair]
        elif isinstance(each, list):
            waiting += [(inner, level + 1) for inner in each]


# ---- PyYAML's safe loader, told so


class _Refused(yaml.constructor.ConstructorError):
    """What YAML allows and a configuration does not: what is wrong as its problem, what to do as its note."""

    def __init__(self, node: yaml.Node, problem: str, cure: str) -> None:
        super().__init__(None, None, problem, node.start_mark, cure)


class _Loader(yaml.SafeLoader):
    """The loader; which texts are no texts, and what is made of them, is added below."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (as PyYAML has it)
    yaml_constructors = {}  # noqa: RUF012

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in lines:
                    first = lines[key.tag, key.value]
                    raise _Refused(
                        key, f"has the key {key.value!r} a second time (first at line {first})", "remove one"
                    )
                lines[key.tag, key.value] = key.start_mark.line + 1
        return node


def _read_by(construct: Callable[[Any, Any], Any]) -> Callable[[_Loader, yaml.Node], Any]:
    """One of PyYAML's own constructors, for texts of which it may not be able to make a value: tagged or very long."""

    def made(loader: _Loader, node: yaml.Node) -> Any:
        try:
            if ":" in node.value:  # YAML 1.1's numbers in base 60, which a tag would bring back
                raise ValueError(node.value)
            value = construct(loader, node)
            too_long = isinstance(value, int) and abs(value) >= 10**MOST_DIGITS
        except (ValueError, KeyError, AttributeError) as error:
            if len(str(node.value)) <= MOST_DIGITS:
                raise _Refused(
                    node, f"has {node.value!r}, which is not what its tag says,", "leave the tag out"
                ) from error
            too_long = True
        if too_long:
            raise _Refused(node, f"has a number of more than {MOST_DIGITS} digits", "give a smaller one")
        return value

    return made


def _no_such_tag(loader: _Loader, node: yaml.Node) -> Any:  # noqa: ARG001 (PyYAML calls it so)
    raise _Refused(node, f"has the tag {node.tag.replace(_TAG, '!!')}", "write the value without it")


for _name, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), _first)
for _name, _construct in {
    "null": yaml.SafeLoader.construct_yaml_null,
    "str": yaml.SafeLoader.construct_yaml_str,
    "seq": yaml.SafeLoader.construct_yaml_seq,
    "map": yaml.SafeLoader.construct_yaml_map,
    "bool": _read_by(yaml.SafeLoader.construct_yaml_bool),
    "int": _read_by(yaml.SafeLoader.construct_yaml_int),
    "float": _read_by(yaml.SafeLoader.construct_yaml_float),
}.items():
    _Loader.add_constructor(_TAG + _name, _construct)
_Loader.add_constructor(None, _no_such_tag)
