"""Mistakes in a configuration, all of them, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dgpo_plugin.common.errors import cut_in_the_middle, did_you_mean
from dgpo_plugin.common.names import ALGORITHMS
from dgpo_plugin.config.fields import RunConfig
from dgpo_plugin.config.short_forms import instead_of

MOST_SHOWN = 100
"""Bytes of a value or a key in a message."""
MOST_TOLD = 20
"""Of the mistakes, that are told one by one; nobody mends more at once."""
Location = tuple[int | str, ...]
WHAT_TO_GIVE = {
    "model.path": "name a diffusers folder, a hub id or one of `dgpo list models`",
    "prompts.train": "name a .txt or .jsonl file or one of `dgpo list prompts`",
    "pairs.train": "name a table or a folder of preferred pairs",
    "algorithm.beta": "give 100 as in flow_grpo's setting for SD3.5, or 2000 as in Flow-Factory's for FLUX.1",
    "rewards": "name at least one of `dgpo list rewards`",
}
"""For a run's required fields, which have no default because no default would be right."""


def explain(error: ValidationError, root: type[BaseModel], given: Mapping[str, Any] | None = None) -> str:
    """Every mistake that pydantic found: where, what, and the near key if it is a typo.

    Args:
        root: the model that refused the values.
        given: the values, for those models whose fields depend on them.
    """
    found = error.errors()
    renamed = root is RunConfig and any(mistake["loc"] == ("reward",) for mistake in found)
    found = [mistake for mistake in found if not (renamed and mistake["loc"] == ("rewards",))]
    told = [_told(mistake, root, given or {}) for mistake in found[:MOST_TOLD]]
    if len(found) == 1:
        return told[0]
    numbered = [f"({number}) {each}" for number, each in enumerate(told, start=1)]
    more = [f"and {len(found) - len(told)} more"] if len(found) > len(told) else []
    return f"{len(found)} mistakes: " + "; ".join([*numbered, *more])


def _told(mistake: ErrorDetails, root: type[BaseModel], given: Mapping[str, Any]) -> str:
    """One mistake."""
    location = mistake["loc"]
    where = _dotted(location)
    if mistake["type"] == "extra_forbidden":
        if root is RunConfig and location == ("reward",):
            return f"reward: is called rewards now; write {instead_of(mistake['input'])}"
        if location[-2:] == ("model", "resolution"):
            side = mistake["input"] if isinstance(mistake["input"], int) else "null"
            return f"{where}: is width and height now; write width: {side}, height: {side}"
        return f"unknown key {where}{did_you_mean(str(location[-1]), _fields_at(root, location[:-1], given))}"
    if mistake["type"] == "missing":
        lacking = ".".join([where, *_required_inside(root, location)])
        return f"{lacking} is missing; {WHAT_TO_GIVE.get(lacking, 'give it')}"
    value = mistake["input"]
    shown = f" (given {cut_in_the_middle(repr(value), MOST_SHOWN)})" if _is_plain(value) else ""
    if mistake["type"] in ("tuple_type", "list_type"):
        return f"{where}: must be a list, in [brackets]{shown}"
    return f"{where}: {mistake['msg'].removeprefix('Value error, ')}{shown}"


def _dotted(location: Location) -> str:
    """Where a mistake is, as ``section.field``, on one line whatever the keys are."""
    return cut_in_the_middle(".".join(str(part) for part in location), MOST_SHOWN) or "configuration"


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | None)


def _fields_at(root: type[BaseModel], location: Location, given: Mapping[str, Any]) -> list[str]:
    """What may stand at a place in a configuration."""
    if location == ("algorithm",):  # imported for this message alone
        return list(ALGORITHMS.load(given["algorithm"]["name"]).Config.model_fields)
    model = _model_at(root, location)
    return [] if model is None else list(model.model_fields)


def _required_inside(root: type[BaseModel], location: Location) -> list[str]:
    """The required field of a section that is missing as a whole, if it has just one."""
    model = _model_at(root, location)
    required = [] if model is None else [name for name, field in model.model_fields.items() if field.is_required()]
    return required if len(required) == 1 else []


def _model_at(root: type[BaseModel], location: Location) -> type[BaseModel] | None:
    """The pydantic model of the section at a place in a configuration; None where there is no section."""
    kind: Any = root
    for part in location:
        model = _as_model(kind)
        if model is not None:
            kind = model.model_fields[str(part)].annotation if part in model.model_fields else None
        else:  # a label of a mapping or a number in a list, whose values are annotated last
            inside = [argument for argument in get_args(kind) if argument is not Ellipsis]
            kind = inside[-1] if inside else None
    return _as_model(kind)


def _as_model(kind: Any) -> type[BaseModel] | None:
    """The model that an annotation is, or is if it is not None."""
    models = [each for each in (kind, *get_args(kind)) if isinstance(each, type) and issubclass(each, BaseModel)]
    return models[0] if len(models) == 1 and (kind is models[0] or type(None) in get_args(kind)) else None
