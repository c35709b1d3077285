"""The shapes of published models' parts, so that they can be planned and measured without their (often gated) files.

A file of ``models/`` has a model's hub id, its pipeline class, its scheduler and the configuration of every part with
weights; and, under ``rehearsal``, what makes them tiny. A denoiser without numbers has diffusers' own defaults, which
are that model's. Sizes of language models are those of their published configurations.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

CLIP_TOKENIZER = {"model_max_length": 77}


class Rehearsal(BaseModel):
    """What of a model is changed to rehearse with it: some values of some parts, and the (square) pictures' side."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    side: int
    parts: dict[str, dict[str, Any]]


class Published(BaseModel):
    """A published model's shapes.

    Attributes:
        pipeline: its diffusers class.
        scheduler: its configuration.
        parts: the configuration of every part with weights, by its folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    hub_id: str
    pipeline: str
    scheduler: dict[str, Any]
    parts: dict[str, dict[str, Any]]
    rehearsal: Rehearsal | None = None

    @property
    def rehearsed_side(self) -> int:
        """Width and height of a rehearsal's pictures, in pixels."""
        assert self.rehearsal is not None
        return self.rehearsal.side

    def tiny(self) -> Published:
        """A model of the same classes with little in them."""
        assert self.rehearsal is not None
        changed = {name: {**values, **self.rehearsal.parts.get(name, {})} for name, values in self.parts.items()}
        return self.model_copy(update={"parts": changed})

    def write_configurations(self, folder: Path) -> None:
        """Write a diffusers folder with no weights in it."""
        index = {"_class_name": self.pipeline, "scheduler": ["diffusers", self.scheduler["_class_name"]]}
        others = {"scheduler": ("scheduler_config.json", self.scheduler)}
        if "num_hidden_layers" in self.parts["text_encoder"] and "projection_dim" in self.parts["text_encoder"]:
            others["tokenizer"] = ("tokenizer_config.json", CLIP_TOKENIZER)
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        configurations = {part: ("config.json", values) for part, values in self.parts.items()}
        for name, (file, values) in {**others, **configurations}.items():
            (folder / name).mkdir()
            (folder / name / file).write_text(json.dumps(values), encoding="utf-8")


def published(name: str) -> Published:
    """A model by its short name."""
    file = resources.files("dgpo_bench") / "gpu" / "models" / f"{name}.json"
    return Published.model_validate_json(file.read_text(encoding="utf-8"))


def published_models() -> dict[str, Published]:
    """All published models by their hub ids."""
    folder = resources.files("dgpo_bench") / "gpu" / "models"
    names = sorted(file.name.removesuffix(".json") for file in folder.iterdir())
    return {model.hub_id: model for model in map(published, names)}
