"""The JSON schema of a training configuration, for editors: with every name that is registered."""

from __future__ import annotations

from typing import Any

from dgpo_plugin.common.names import ALGORITHMS, WORLDS
from dgpo_plugin.config.describe import description
from dgpo_plugin.config.fields import AlgorithmConfig, GuardConfig, RewardTerm, RunConfig
from dgpo_plugin.prompts.registry import prompt_set_names
from dgpo_plugin.rewards.registry import REWARDS

Schema = dict[str, Any]
"""A JSON schema, or one of its parts."""
OWN_FILE = r"\.py:"
"""What is in a name that is of a file, ``path/to/file.py:Name``."""


def json_schema() -> Schema:
    """The whole schema; ``algorithm`` is one of those that are registered, told apart by ``name``.

    Raises:
        UserError: an algorithm of another package that cannot be imported.
    """
    schema = RunConfig.model_json_schema()
    definitions, properties = schema["$defs"], schema["properties"]
    properties["algorithm"] = _algorithm(definitions)
    properties["rewards"] = _rewards(properties["rewards"]["description"])
    properties["pairs"]["anyOf"].append({"type": "string"})  # short for its train
    judges = definitions["EvaluationConfig"]["properties"]
    judges["rewards"] = {**_rewards(judges["rewards"]["description"]), "default": {}}
    # Prompts and rewards, or pairs: which of the two is the algorithm's to say.
    schema["required"] = [key for key in schema["required"] if key not in ("prompts", "rewards")]
    schema["anyOf"] = [{"required": ["prompts", "rewards"]}, {"required": ["pairs"]}]
    watched = definitions[GuardConfig.__name__]["properties"]
    watched["metrics"] = {**_rewards(watched["metrics"]["description"], least=0), "default": {}}
    # Names are offered, and others allowed: files, folders, hub ids.
    definitions["ModelConfig"]["properties"]["path"]["examples"] = list(WORLDS)
    for key in ("train", "held_out"):
        definitions["PromptsConfig"]["properties"][key]["examples"] = list(prompt_set_names())
    definitions[RewardTerm.__name__]["properties"]["reward"]["examples"] = list(REWARDS)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "dgpo training configuration"}


def _algorithm(definitions: Schema) -> Schema:
    """The key ``algorithm``, whose alternatives are added to the definitions."""
    del definitions[AlgorithmConfig.__name__]
    references = []
    for name in ALGORITHMS:
        config = ALGORITHMS.load(name).Config
        own = config.model_json_schema()
        own["properties"]["name"] = {"const": name, "type": "string", "description": description(config, "name")}
        definitions |= own.pop("$defs", {})
        # Without its name a section would fit them all.
        own["required"] = ["name", *(key for key in own.get("required", []) if key != "name")]
        definitions[f"algorithm-{name}"] = own
        references.append(f"#/$defs/algorithm-{name}")
    definitions["OwnAlgorithm"] = {
        "title": "OwnAlgorithm",
        "description": "An algorithm of one's own, with the fields of its own configuration.",
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": OWN_FILE, "description": "The class, path/to/file.py:Algorithm."}
        },
        "required": ["name"],
    }
    return {
        "description": "What trains: one of `dgpo list algorithms`, by its `name`.",
        "oneOf": [{"$ref": reference} for reference in (*references, "#/$defs/OwnAlgorithm")],
        "default": RunConfig.model_fields["algorithm"].default,
    }


def _rewards(about: str, least: int = 1) -> Schema:
    """The key ``rewards``, with its short forms: a name, several, or each with its weight; so many at least."""
    term = {"anyOf": [{"$ref": f"#/$defs/{RewardTerm.__name__}"}, {"type": "number"}, {"type": "null"}]}
    name = {"type": "string", "examples": list(REWARDS)}
    labels = {"type": "object", "minProperties": least, "properties": dict.fromkeys(REWARDS, term)}
    return {
        "description": about,
        "anyOf": [{**labels, "additionalProperties": term}, {"type": "array", "items": name, "minItems": least}, name],
    }
