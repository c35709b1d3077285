"""Example workflows as the front end would send them: from a saved canvas to a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOTES = ("MarkdownNote", "Note")


def as_prompt(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What POST /prompt takes, by node number.

    Raises:
        AssertionError: a saved node that does not fit the server's definition of it.
    """
    links = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    prompt = {}
    for saved in workflow["nodes"]:
        if saved["type"] in NOTES:
            continue
        info = object_info[saved["type"]]
        assert [output["type"] for output in saved["outputs"]] == info["output"], saved["type"]
        inputs: dict[str, Any] = dict(_widget_values(saved, info))
        for slot in saved["inputs"]:
            if slot["link"] is not None:
                inputs[slot["name"]] = list(links[slot["link"]])
        prompt[str(saved["id"])] = {"class_type": saved["type"], "inputs": inputs}
    return prompt


def _widget_values(saved: Mapping[str, Any], info: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A node's own values come in the order of its inputs, a seed's followed by what happens to it afterwards."""
    values = list(saved["widgets_values"])
    definitions = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    for name, (kind, *rest) in definitions.items():
        if not isinstance(kind, list) and kind not in WIDGETS:
            continue
        yield name, values.pop(0)
        if rest and rest[0].get("control_after_generate"):
            assert values.pop(0) == "fixed", f"{saved['type']}: an example must give the same picture every time"
    assert not values, f"{saved['type']}: {len(values)} more values than inputs"
