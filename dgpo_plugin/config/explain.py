"""Mistakes in a configuration, told in one line."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError

from dgpo_plugin.common.errors import did_you_mean
from dgpo_plugin.config.fields import DGPOConfig, FlowGRPOConfig, FlowGRPOFastConfig


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake in one line: where, what, and the near key if it is a typo."""
    first = error.errors()[0]
    # pydantic puts the union's tag behind "algorithm"; it is no key of the user's.
    places = list(first["loc"])
    if len(places) > 2 and places[0] == "algorithm":
        del places[1]
    location = [str(part) for part in places]
    where = " ".join(".".join(location).split()) or "configuration"
    if first["type"] == "extra_forbidden":
        known = _fields_at(root, first["loc"][:-1])
        return f"unknown key {where}{did_you_mean(location[-1], known)}"
    if first["type"] == "union_tag_invalid":
        tag = str(first["ctx"]["tag"])
        return f"{where}.name: unknown algorithm {tag!r}{did_you_mean(tag, ('dgpo', 'flow-grpo', 'flow-grpo-fast'))}"
    if first["type"] == "union_tag_not_found":
        return f"{where}.name is missing; name dgpo, flow-grpo or flow-grpo-fast"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (given {given!r})" if isinstance(given, str | int | float | bool | None) else ""
    return f"{where}: {message}{shown}"


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    algorithms: dict[str, type[BaseModel]] = {
        "dgpo": DGPOConfig,
        "flow-grpo": FlowGRPOConfig,
        "flow-grpo-fast": FlowGRPOFastConfig,
    }
    for part in location:
        if part in algorithms:
            model = algorithms[str(part)]
            continue
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return list(model.model_fields)
